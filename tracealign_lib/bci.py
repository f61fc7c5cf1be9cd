"""The Belief Conflict Index and its variants: how surprising, or how forbidden, is a reactivated span?

The paper scores a span s = t_1 ... t_k that occurs in the training corpus by

    BCI(s) = - sum_j log P_train(t_j),

with unigram probabilities of the training corpus (as reported by readers of the full text). It asks how
rare the words are, not what they say. The variants here ask other questions about the same span, and
each says which labels it needs, because a score that needs none is worth more than one that needs many.

A scorer is an object that maps an index, the ids of a text and a span of it to a number; higher is more
conflicting. `max_bci` turns scores of spans into the score of a text, as TraceShield does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracealign_lib.engine import Engine, Span
from tracealign_lib.errors import ParameterError, VocabularyError
from tracealign_lib.suffix_array import Ids

if TYPE_CHECKING:  # only one scorer needs a model, so the others should not wait for one
    from tracealign_lib.lm import LanguageModel

Scores = NDArray[np.float64]
Smoothing = Literal["laplace", "good-turing"]

SMOOTHINGS = ("laplace", "good-turing")
RETRIEVED = 100
"""Occurrences of a span that ConflictBCI reads, at most."""
_MODEL_BATCH = 32


class Scorer(Protocol):
    """Scores one span of a text; higher is more conflicting, in nats unless the scorer says otherwise.

    Attributes
    ----------
    labels:
        What must be known about documents before this score can be computed.
    source:
        Where the score comes from.
    """

    labels: ClassVar[str]
    source: ClassVar[str]

    def __call__(self, index: Engine, ids: NDArray[Any], span: Span) -> float:
        """The score of `ids[span.start:span.end]`."""
        ...


# --- unigrams ------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def unigram_surprisal(index: Engine, smoothing: Smoothing = "laplace") -> Scores:
    """`-log P_train(t)` of each id, shape (vocab_size,), in nats; read-only.

    Parameters
    ----------
    smoothing:
        What ids that the corpus never holds receive. "laplace" adds one to every count. "good-turing"
        gives all of them together the share N_1 / N of tokens that occur once, in equal parts; the
        others keep their relative frequencies, scaled to sum to 1 - N_1 / N. With no unseen id there is
        nothing to reserve, and frequencies stay as they are.

    Raises
    ------
    ParameterError
        An unknown smoothing, an index without tokens, or "good-turing" where ids are unseen but no token
        (or every token) occurs once: its estimate would then be 0 for some id.

    References
    ----------
    Good, "The population frequencies of species", Biometrika 40 (1953), for the missing mass N_1 / N.
    """
    _check_collection(index, "The index")
    _check_smoothing(smoothing)
    if smoothing == "laplace":
        surprisal = np.array(index.surprisal[np.arange(index.vocab_size)])
    else:
        surprisal = -np.log(_good_turing(_counts(index)))
    surprisal.setflags(write=False)
    return surprisal


def _counts(index: Engine) -> Ids:
    """How often each id occurs, shape (vocab_size,): what follows the empty context."""
    tokens, found = index.continuations([])
    counts = np.zeros(index.vocab_size, dtype=np.int64)
    counts[tokens] = found
    return counts


def _good_turing(counts: Ids) -> Scores:
    total, singles, unseen = int(counts.sum()), int((counts == 1).sum()), int((counts == 0).sum())
    if not unseen:
        return counts / total
    if not 0 < singles < total:
        raise ParameterError(
            "Good-Turing cannot tell how likely an unseen token is.",
            given=f"{singles} of {total} tokens occur once, {unseen} ids never",
            expected="some, but not all, of the tokens to occur once",
            mend='use smoothing="laplace", or a larger collection',
        )
    missing = singles / total
    return np.where(counts > 0, counts / total * (1 - missing), missing / unseen)


# --- what scorers share --------------------------------------------------------------------------


class SpanScorer(ABC):
    """A scorer that checks its input once and scores all spans of a text together.

    Derive from it, state `labels` and `source`, and define `_score`.

    Attributes
    ----------
    by_span:
        Whether the score is a function of the span's ids and the index alone, so that it may be remembered;
        False where the text around the span has a part in it, and unless a class says otherwise.
    """

    labels: ClassVar[str]
    source: ClassVar[str]
    by_span: ClassVar[bool] = False

    def __call__(self, index: Engine, ids: ArrayLike, span: Span) -> float:
        """The score of `ids[span.start:span.end]`; see `score_spans` for the errors."""
        return float(self.score_spans(index, ids, [span])[0])

    def score_spans(self, index: Engine, ids: ArrayLike, spans: Sequence[Span]) -> Scores:
        """The score of each span of one text, shape (spans,).

        Raises
        ------
        ParameterError
            A span is empty or reaches outside the text, or the index holds no tokens.
        VocabularyError
            Ids are not integers of the index's vocabulary, or another collection has another one.
        """
        _check_collection(index, "The index")
        index.count(ids)  # the index checks ids at its own edge
        query = np.asarray(ids, dtype=np.int64)  # (n,)
        bounds = _check_spans(spans, len(query))  # (spans, 2)
        return self._score(index, query, bounds) if len(bounds) else np.empty(0)

    @abstractmethod
    def _score(self, index: Engine, query: Ids, bounds: Ids) -> Scores:
        """Scores, shape (spans,), of checked spans `query[start:end]`; bounds has shape (spans, 2)."""


class TokenScorer(SpanScorer):
    """A score that is a sum over tokens, so that it is additive when spans are joined."""

    def _score(self, index: Engine, query: Ids, bounds: Ids) -> Scores:
        first, last = int(bounds[:, 0].min()), int(bounds[:, 1].max())
        return _reduce(np.add, self._token_scores(index, query, first, last), bounds - first)

    @abstractmethod
    def _token_scores(self, index: Engine, query: Ids, first: int, last: int) -> Scores:
        """The score of each of `query[first:last]`, shape (last - first,)."""


class _UnigramScorer(SpanScorer):
    labels = "none: counts of the indexed tokens are enough"
    by_span = True

    def __init__(self, smoothing: Smoothing = "laplace") -> None:
        _check_smoothing(smoothing)
        self.smoothing: Smoothing = smoothing

    def _surprisals(self, index: Engine, query: Ids) -> Scores:
        if self.smoothing == "laplace":  # an engine of others may look ids up, and not have them all
            _check_collection(index, "The index")
            return np.asarray(index.surprisal[query])
        return unigram_surprisal(index, self.smoothing)[query]


def _reduce(ufunc: np.ufunc, values: Scores, bounds: Ids) -> Scores:
    """`ufunc` over `values[start:end]` for each of bounds (spans, 2); shape (spans,)."""
    padded = np.append(values, 0.0)  # reduceat wants every end to be a position too
    return np.asarray(ufunc.reduceat(padded, bounds.ravel())[::2], dtype=np.float64)


# --- the paper, and the public code --------------------------------------------------------------


class RawBCI(TokenScorer, _UnigramScorer):
    """The paper's BCI: the summed unigram surprisal of the span's tokens, in nats.

    It needs no labels, only the indexed corpus. It grows with length, and with rare words whether
    they are harmful or not.

    Parameters
    ----------
    smoothing:
        See `unigram_surprisal`; how the paper treats unseen tokens is not known.
    """

    source = "arXiv 2508.02063, as reported by readers of the full text"

    def _token_scores(self, index: Engine, query: Ids, first: int, last: int) -> Scores:
        return self._surprisals(index, query[first:last])


class DensityBCI(_UnigramScorer):
    """BCI per token: the mean surprisal of the span, in nats per token. It does not grow with length."""

    source = "the public code of arXiv 2508.02063, there called density"

    def _score(self, index: Engine, query: Ids, bounds: Ids) -> Scores:
        sums = _reduce(np.add, self._surprisals(index, query), bounds)
        return np.asarray(sums / (bounds[:, 1] - bounds[:, 0]), dtype=np.float64)


class PriorKL(_UnigramScorer):
    """KL divergence from the span's own token frequencies to the unigram prior, in nats.

    With p the frequencies within the span, sum_t p(t) log(p(t) / P_train(t)): the density less the
    entropy of p, so that a span which repeats itself scores higher than one which does not.
    """

    source = "the public code of arXiv 2508.02063; the paper is reported to relate BCI to a KL divergence"

    def _score(self, index: Engine, query: Ids, bounds: Ids) -> Scores:
        surprisals = self._surprisals(index, query)
        scores = np.empty(len(bounds))
        for i, (start, end) in enumerate(bounds.tolist()):
            _, counts = np.unique(query[start:end], return_counts=True)
            frequencies = counts / (end - start)
            scores[i] = surprisals[start:end].mean() + frequencies @ np.log(frequencies)
        return scores


class MaxTokenRisk(_UnigramScorer):
    """The largest surprisal of a single token of the span, in nats."""

    source = "the public code of arXiv 2508.02063, there called max_token_risk"

    def _score(self, index: Engine, query: Ids, bounds: Ids) -> Scores:
        return _reduce(np.maximum, self._surprisals(index, query), bounds)


class Membership(SpanScorer):
    """The control: 1 if the indexed collection holds the span and it has `min_length` tokens, else 0.

    What a score adds to "it is in there" shows only beside this one. No unit.
    """

    labels = "none beyond the choice of what is indexed; an unsafe slice needs its documents labelled"
    source = "ours: the part of TraceShield that is left when no score is used"
    by_span = True

    def __init__(self, min_length: int = 8) -> None:
        _check_length(min_length, "min_length")
        self.min_length = min_length

    def _score(self, index: Engine, query: Ids, bounds: Ids) -> Scores:
        long = bounds[:, 1] - bounds[:, 0] >= self.min_length
        held = [bool(index.count(query[start:end])) for start, end in bounds.tolist()]
        return np.asarray(long & np.array(held), dtype=np.float64)


class SpanLength(SpanScorer):
    """The fair control: how many tokens the span has. In tokens.

    A threshold on it is membership with a fitted `min_length`. Every sum over tokens grows with length,
    so a score that does no better than this one owes what it shows to length, not to rarity.
    """

    labels = Membership.labels
    source = "ours"
    by_span = True

    def _score(self, index: Engine, query: Ids, bounds: Ids) -> Scores:
        return np.asarray(bounds[:, 1] - bounds[:, 0], dtype=np.float64)


# --- variants ------------------------------------------------------------------------------------


class LongestMatchBCI(TokenScorer):
    """Surprisal under the longest match: what a corpus that has read the context expects next, in nats.

    Each token is predicted from the longest suffix of all the text before it that the index holds. With
    c(t) the times that t follows this suffix, C their sum over t, and k the `strength`,

        P(t) = (c(t) + k P_train(t)) / (C + k):

    the infinity-gram estimate c(t) / C, backed off to the add-one unigram probability in proportion to
    how little was seen (a Dirichlet prior). It sums to 1 over the vocabulary, and is never 0. Where the
    suffix only ever ends documents, C = 0 and P is the unigram.

    A passage recited from the corpus is *expected* by this model: its score is low but for the places
    where documents part ways. Set beside the raw score, it tells rare words from rare sentences.

    Parameters
    ----------
    strength:
        k, in occurrences; finite and above 0.

    References
    ----------
    Liu et al., arXiv 2401.17377 (infinity-gram); MacKay and Peto, "A hierarchical Dirichlet language
    model", Natural Language Engineering 1 (1995).
    """

    labels = "none: the indexed tokens are enough"
    source = "ours, after arXiv 2401.17377"

    def __init__(self, strength: float = 1.0) -> None:
        _check_positive(strength, "strength")
        self.strength = float(strength)

    def _token_scores(self, index: Engine, query: Ids, first: int, last: int) -> Scores:
        prior = self.strength * np.exp(-index.surprisal[query])  # (n,)
        scores = np.empty(last - first)
        for j in range(first, last):
            tokens, counts = index.continuations(query[:j])
            seen = counts[tokens == query[j]].sum()
            scores[j - first] = math.log(counts.sum() + self.strength) - math.log(seen + prior[j])
        return scores


class LikelihoodRatioBCI(TokenScorer):
    """How much better an unsafe collection predicts the span's words than another one, in nats.

    The sum over tokens of log P_unsafe(t) - log P_other(t), with unigram probabilities
    P(t) = (c(t) + alpha) / (N + alpha V). It is 0 for words that both collections use alike, however
    rare they are.

    Parameters
    ----------
    unsafe_index, other_index:
        Indexes with one vocabulary; the other collection may be benign text or the policy.
    alpha:
        Added to every count; finite and above 0.

    Raises
    ------
    ParameterError
        A collection is missing or holds no tokens, or alpha is out of range.
    VocabularyError
        The collections were encoded with different tokenizers.

    References
    ----------
    Moore and Lewis, "Intelligent selection of language model training data", ACL 2010.
    """

    labels = "which documents are unsafe, and which belong to the collection they are compared with"
    source = "ours, after Moore and Lewis (ACL 2010)"
    by_span = True

    def __init__(self, unsafe_index: Engine, other_index: Engine, alpha: float = 1.0) -> None:
        for given, name in (
            (unsafe_index, "The unsafe collection"),
            (other_index, "The collection to compare with"),
        ):
            _check_index(given, name)
            _check_collection(given, name)
        _check_same_tokens(unsafe_index, other_index)
        _check_positive(alpha, "alpha")
        self.alpha = float(alpha)
        self._unsafe_index = unsafe_index
        self._ratio = self._log_probabilities(unsafe_index) - self._log_probabilities(other_index)  # (V,)

    def _log_probabilities(self, index: Engine) -> Scores:
        total = index.n_tokens + self.alpha * index.vocab_size
        return np.asarray(np.log(_counts(index) + self.alpha) - math.log(total), dtype=np.float64)

    def _token_scores(self, index: Engine, query: Ids, first: int, last: int) -> Scores:
        _check_same_tokens(index, self._unsafe_index)
        return np.asarray(self._ratio[query[first:last]], dtype=np.float64)


class ConflictBCI(SpanScorer):
    """Do the documents that hold the span talk of what a rule forbids? In nats.

    The documents that hold the span are retrieved, and each is contrasted with the rules: its conflict
    is the BCI, under the index, of the most surprising run of `min_length` or more tokens that it shares
    with a rule (0 if it shares none). The score is the mean over the retrieved documents. So a span need
    not name the forbidden thing itself: the documents that it comes from do.

    A document that *quotes* the rule shares most with it, and so scores highest, though it is in no
    conflict with it. With a `quote_length`, documents that share a run of that length with a rule count
    as restating it and are set aside; the score is 0 when none is left.

    Parameters
    ----------
    rules:
        Index of the rules that forbid, and of nothing else.
    min_length:
        Shortest shared run that counts as the same subject (tokens).
    quote_length:
        Shortest shared run that counts as a quotation (tokens), above `min_length`; None: no such test.

    Raises
    ------
    ParameterError
        The collection of rules is missing or holds no tokens, or a length is out of range.
    """

    labels = "which documents are rules that forbid something"
    source = "ours"
    by_span = True

    def __init__(self, rules: Engine, *, min_length: int = 4, quote_length: int | None = None) -> None:
        _check_index(rules, "The collection of rules")
        _check_collection(rules, "The collection of rules")
        _check_length(min_length, "min_length")
        if quote_length is not None and (_check_length(quote_length, "quote_length") <= min_length):
            raise ParameterError(
                "A quotation is not longer than a shared subject.",
                given=f"quote_length={quote_length}, min_length={min_length}",
                expected="quote_length above min_length",
                mend="raise quote_length, or pass None to keep documents that quote a rule",
            )
        self.rules, self.min_length, self.quote_length = rules, min_length, quote_length
        self._conflicts: WeakKeyDictionary[Engine, dict[str, float]] = WeakKeyDictionary()

    def _score(self, index: Engine, query: Ids, bounds: Ids) -> Scores:
        _check_same_tokens(index, self.rules)
        known = self._conflicts.setdefault(index, {})
        scores = np.zeros(len(bounds))
        for i, (start, end) in enumerate(bounds.tolist()):
            found = index.locate(query[start:end], limit=RETRIEVED)
            held = {document_id for document_id, _ in found}
            for document_id in held - known.keys():
                known[document_id] = self._conflict(index, document_id)
            kept = [known[d] for d in held if not math.isnan(known[d])]
            scores[i] = math.fsum(kept) / len(kept) if kept else 0.0
        return scores

    def _conflict(self, index: Engine, document_id: str) -> float:
        """The conflict of one document with the rules; NaN if it restates one."""
        ids = index.document_tokens(document_id)
        shared = self.rules.spans(ids, min_length=self.min_length)
        longest = max((end - start for start, end, _ in shared), default=0)
        if self.quote_length is not None and longest >= self.quote_length:
            return math.nan
        return max((float(index.surprisal[ids[s:e]].sum()) for s, e, _ in shared), default=0.0)


class MemorisationLift(TokenScorer):
    """How much likelier the model finds the span than its words alone make it, in nats.

    log p_model(span | prompt and the text before it) + BCI(span): near 0 for text that the model does
    not know, and up to BCI(span) for what it recites. It needs the model's probabilities, so it can
    judge a model's own completions but no model behind an interface that hides them.

    Parameters
    ----------
    model:
        Its tokenizer must be the index's.
    prompt:
        What stood before the text, as `model.chat` makes it; "" for the start of a document.

    Raises
    ------
    VocabularyError
        On scoring: the model's tokenizer is not the one of the index.
    ParameterError
        On scoring: prompt and text together are longer than the model's context.

    References
    ----------
    Carlini et al., arXiv 2012.07805, who compare a model's likelihood with a simpler one's.
    """

    labels = "none, but it needs the model and the prompt"
    source = "ours, after arXiv 2012.07805"

    def __init__(self, model: LanguageModel, prompt: str = "") -> None:
        self.model, self.prompt = model, prompt
        self._known: dict[bytes, Scores] = {}

    @classmethod
    def for_texts(
        cls, model: LanguageModel, prompts: Sequence[str], texts: Sequence[ArrayLike]
    ) -> list[Self]:
        """One scorer for each prompt and text (ids), the model having read them all in batches."""
        queries = [np.asarray(ids, dtype=np.int64) for ids in texts]
        scorers = [cls(model, prompt) for prompt in prompts]
        log_probs = _model_log_probs(model, prompts, queries)
        for scorer, query, values in zip(scorers, queries, log_probs, strict=True):
            scorer._known[query.tobytes()] = values
        return scorers

    def _token_scores(self, index: Engine, query: Ids, first: int, last: int) -> Scores:
        _check_tokenizer(index, self.model.tokenizer)
        key = query.tobytes()
        if key not in self._known:
            self._known = {key: _model_log_probs(self.model, [self.prompt], [query])[0]}
        return self._known[key][first:last] + unigram_surprisal(index)[query[first:last]]


def _model_log_probs(model: LanguageModel, prompts: Sequence[str], queries: Sequence[Ids]) -> list[Scores]:
    """log p(token | prompt, earlier tokens) of each query (n,), in nats; shape (n,) each."""
    import torch

    tokenizer = model.tokenizer
    rows: list[tuple[int, list[int]]] = []
    for prompt, query in zip(prompts, queries, strict=True):
        # Training documents follow the end of another one, so that is what an empty prompt stands for.
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
        rows.append((len(before), [*before, *query.tolist()]))
    _check_context(model, max((len(ids) for _, ids in rows), default=0))
    log_probs: list[Scores] = [np.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
    for first in range(0, len(order), _MODEL_BATCH):
        chosen = order[first : first + _MODEL_BATCH]
        width = len(rows[chosen[-1]][1])
        # Causal attention: what pads the right end is never seen from the left.
        padded = [rows[i][1] + [tokenizer.pad_token_id] * (width - len(rows[i][1])) for i in chosen]
        ids = torch.tensor(padded, device=model.device)  # (B, T)
        with torch.inference_mode():
            logits = model.model(input_ids=ids).logits[:, :-1].float()  # (B, T - 1, V)
            found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double().cpu().numpy()
        for i, row in zip(chosen, found, strict=True):
            start, tokens = rows[i]
            log_probs[i] = row[start - 1 : len(tokens) - 1]
    return log_probs


# --- from spans to a text ------------------------------------------------------------------------


def candidate_spans(
    index: Engine, ids: ArrayLike, *, min_length: int, max_count: int | None, window: int | None
) -> list[Span]:
    """The spans of a text that are scored, from left to right.

    Parameters
    ----------
    min_length:
        Shortest maximal matching span (tokens).
    max_count:
        Largest number of occurrences; the paper keeps 3 (reported). None keeps all.
    window:
        None for maximal matching spans, as TraceShield scores them. A number of tokens for every window
        of that many tokens inside such a span; `max_count` then applies to the window's own occurrences,
        which are at least those of the span around it.
    """
    if window is None:
        return index.spans(ids, min_length=min_length, max_count=max_count)
    _check_length(window, "window")
    if max_count is not None:
        _check_length(max_count, "max_count")
    query = np.asarray(ids)
    spans = index.spans(query, min_length=min_length)
    starts = sorted({i for start, end, _ in spans for i in range(start, end - window + 1)})
    windows = [Span(i, i + window, index.count(query[i : i + window])) for i in starts]
    return [span for span in windows if max_count is None or span.count <= max_count]


def max_bci(
    index: Engine,
    ids: ArrayLike,
    scorer: Scorer,
    *,
    min_length: int,
    max_count: int | None,
    window: int | None,
) -> float:
    """The score of a text: the largest score of a span of it, max_i BCI(s_i).

    Parameters
    ----------
    scorer:
        Any scorer; a `SpanScorer` is asked once for all spans.
    min_length, max_count, window:
        See `candidate_spans`.

    Returns
    -------
    float
        In the scorer's unit; minus infinity where no span remains, since no threshold refuses such a
        text.
    """
    spans = candidate_spans(index, ids, min_length=min_length, max_count=max_count, window=window)
    return float(score_all(scorer, index, ids, spans).max(initial=-math.inf))


def score_all(scorer: Scorer, index: Engine, ids: ArrayLike, spans: Sequence[Span]) -> Scores:
    """The score of each span of one text, shape (spans,), by any scorer."""
    if isinstance(scorer, SpanScorer):
        return scorer.score_spans(index, ids, spans)
    query = np.asarray(ids)
    return np.array([scorer(index, query, span) for span in spans], dtype=np.float64)


# --- checks --------------------------------------------------------------------------------------


def _check_index(given: object, name: str) -> None:
    if not isinstance(given, Engine):
        raise ParameterError(
            f"{name} is missing.",
            given=repr(given)[:80],
            expected="a TraceIndex or another engine",
            mend="build one with TraceIndex.build(documents, tokenizer, path)",
        )


def _check_collection(index: Engine, what: str) -> None:
    if index.n_tokens == 0:
        raise ParameterError(
            f"{what} holds no text.",
            given=f"{index!r}",
            expected="at least one document with at least one token",
            mend="check which documents were selected",
        )


def _check_smoothing(smoothing: str) -> None:
    if smoothing not in SMOOTHINGS:
        raise ParameterError(
            "Unknown smoothing.",
            given=repr(smoothing),
            expected=" or ".join(map(repr, SMOOTHINGS)),
            mend='use "laplace", which is always defined',
        )


def _check_spans(spans: Sequence[Span], length: int) -> Ids:
    """Start and end of each span, shape (spans, 2)."""
    bounds = np.array([(span.start, span.end) for span in spans], dtype=np.int64).reshape(-1, 2)
    for start, end in bounds.tolist():
        if not 0 <= start < end <= length:
            raise ParameterError(
                "The span is empty." if start >= end else "The span reaches outside the text.",
                given=f"tokens {start} to {end} of a text of {length} tokens",
                expected=f"0 <= start < end <= {length}",
                mend="take spans from index.spans(ids) of the same ids",
            )
    return bounds


def _check_positive(value: float, name: str) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ParameterError(
            f"{name} is out of range.",
            given=f"{name}={value!r}",
            expected="a finite number above 0",
            mend=f"for example {name}=1.0, which adds one to every count",
        )


def _check_length(value: int, name: str) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ParameterError(
            f"{name} is out of range.",
            given=f"{name}={value!r}",
            expected="an integer of at least 1",
            mend=f"choose another {name}",
        )
    return int(value)


def _check_same_tokens(index: Engine, other: Engine) -> None:
    hashes = {index.tokenizer_hash, other.tokenizer_hash} - {None}
    if index.vocab_size != other.vocab_size or len(hashes) > 1:
        raise VocabularyError(
            "Two collections were encoded with different tokenizers.",
            given=f"{index!r} and {other!r}",
            expected="one tokenizer for both",
            mend="build both indexes with the same tokenizer",
        )


@lru_cache(maxsize=16)
def _check_tokenizer(index: Engine, tokenizer: Any) -> None:
    index.check_tokenizer(tokenizer)  # hashing a tokenizer takes longer than scoring a text


def _check_context(model: LanguageModel, length: int) -> None:
    context = getattr(model.model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ParameterError(
            "Prompt and text are longer than the model's context.",
            given=f"{length} tokens",
            expected=f"at most {context}",
            mend="shorten the text, or use a model with a longer context",
        )
