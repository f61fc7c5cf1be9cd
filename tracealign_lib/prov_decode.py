"""Prov-Decode: keep a risky span of training text from being completed while the model decodes.

The paper describes a beam search that drops expansions predicted to complete a high-BCI span (arXiv
2508.02063, as reported by readers of the full text; its exact score is not known to us). This is the same
idea as a logits processor, so that it serves greedy search, sampling and beam search alike.

Definition. Let x be the text so far, t a token, and s the longest suffix of x + t that the index holds. t is
*vetoed* if s has at least `min_length` tokens, occurs at most `max_count` times, and scores above the
threshold. The span s cannot be extended to the left, so t is vetoed exactly if TraceShield would refuse x + t
for a span that ends in t. Two things follow for every scorer that looks at nothing behind the span:

* A maximal matching span of the finished text was the longest suffix when its last token was chosen. So no
  text that came through the veto is refused by TraceShield with the same settings.
* The converse fails only for scores that may fall when a span grows to the right (a density, a ratio, a
  conflict). TraceShield sees only where the span ends up; the veto has to decide earlier, since the text may
  stop there. It then vetoes a span that a longer, lower-scored one would have swallowed.

For scores that never fall when a span grows to the left (sums of terms of 0 or more, length, membership),
"the longest suffix is risky" and "some suffix is risky" are the same; for others, a shorter suffix may be
risky and is let pass, as TraceShield lets it pass inside a longer span.

All this holds for token ids as they were generated. A model that spells a word in unusual pieces writes ids
that the index does not hold, and the same text, decoded and encoded anew, may match after all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from tracealign_lib import bci
from tracealign_lib.bci import Scorer
from tracealign_lib.compiled import compiled
from tracealign_lib.engine import Engine
from tracealign_lib.errors import ModelError, ParameterError, VocabularyError
from tracealign_lib.guard import MODES, generation_mode
from tracealign_lib.index import Ids, Span, TraceIndex
from tracealign_lib.lm import LanguageModel
from tracealign_lib.shield import TraceShield
from tracealign_lib.suffix_array import find_interval, find_longest_suffix

Reads = Literal["completion", "answer", "everything"]
Trigger = Literal["wanted", "possible"]

REMEMBERED = 2**17
"""Verdicts on spans that are kept; when there are more, all are forgotten."""
# Slots of the table of grams for each token of the corpus: one benign gram in sixteen costs a search.
_SLOTS = 16
# Columns of candidates: token `TOKEN` would give row `ROW`, without its last `BACK` tokens, a held suffix of
# `LENGTH` tokens, which stands at ranks [LOW, HIGH) of the suffix array.
ROW, BACK, TOKEN, LOW, HIGH, LENGTH = range(6)


class ProvDecode(LogitsProcessor):  # type: ignore[misc]
    """Vetoes tokens that would complete a risky span, and can redirect to a refusal.

    The definition of the veto stands at the top of this module. Rows are judged one by one from their own
    ids and nothing is remembered about them, so beams may be reordered, and rows of a batch in any order,
    with any left padding, and beside any others, get the same treatment. Scores are changed in place, since a
    copy would cost more than all the rest; `output_logits` of `generate` shows them changed.

    *Escape.* End marks are never vetoed: they are no part of the text. A row that has no score above minus
    infinity, because of the veto or because it came like that, gets the end mark with score 0.

    *Redirect.* Where the veto strikes, a row is led into the refusal: its next token is fixed by giving that
    token score 0 and all others minus infinity. Where the row stands is read from the row: if it ends in
    the first j tokens of the refusal, and the text before them has a vetoed token, it stands at token
    j + 1, and after the last token comes the end mark. In beam search, a score of 0 is a probability of 1:
    a redirected beam keeps the standing of the text that it interrupts. If it paid for the refusal's words
    instead, the beams that change a word of the risky span would overtake it. A token of the refusal that is
    itself vetoed is replaced by the end mark. A row that writes the refusal's first token by itself, just
    where another token would be vetoed, is taken to have begun the refusal: its ids tell no more.

    *Look-ahead.* With a horizon h > 0, t is vetoed too if every occurrence of s in the corpus leads, within
    h more tokens, to a token that would be vetoed. An occurrence at the end of a document leads to none.

    Parameters
    ----------
    index:
        What must not be reproduced. An index without tokens lets everything pass.
    scorer:
        Score of one span, from its ids and the text before it, in nats.
    threshold:
        tau, in nats: a span that scores above it is risky.
    min_length:
        Shortest risky span (tokens).
    max_count:
        Spans that occur more often are not risky; None: all may be.
    horizon:
        h, in tokens; 0 vetoes only the token that completes a span.
    redirect:
        A refusal, as text or as token ids; None: veto only.
    trigger:
        When to redirect: "wanted", if the row's most probable token is vetoed; "possible", if any token is.
    tokenizer:
        The generating model's; it has to be the index's. Without it, `generate` asks for it, unless the
        index was built from bare ids.
    end_ids:
        Marks at which the model's `generate` stops; by default that of the tokenizer.

    Raises
    ------
    ParameterError
        A value is out of range, the scorer cannot score this index (it says why itself) or gives a value
        that is not finite, the refusal is empty or would itself be refused, or no end mark is known.
    VocabularyError
        `tokenizer` is not the one of the index, or ids are outside its vocabulary.
    ModelError
        The refusal is text, and the index holds no tokenizer.

    Examples
    --------
    Prompts are no part of the text, so how far they reach has to be told for each call. Either of these
    does it:

    >>> guard.generate(model, tokenizer=tokenizer, input_ids=ids, attention_mask=mask, num_beams=4)
    >>> with guard.guarding(language_model):
    ...     language_model.generate(prompts)
    """

    def __init__(
        self,
        index: TraceIndex,
        scorer: Scorer,
        threshold: float,
        *,
        min_length: int = 8,
        max_count: int | None = None,
        horizon: int = 0,
        redirect: str | Sequence[int] | None = None,
        trigger: Trigger = "wanted",
        tokenizer: Any = None,
        end_ids: Sequence[int] | None = None,
    ) -> None:
        if isinstance(index, Engine) and not isinstance(index, TraceIndex):
            raise ParameterError(
                "Prov-Decode needs the arrays of an index on this machine.",
                given=repr(index),
                expected="a TraceIndex",
                mend="build one of the documents that matter, or shield the answers instead",
            )
        # the shield's checks are the same, and so is its verdict on the refusal
        self._shield = TraceShield(index, scorer, threshold, min_length=min_length, max_count=max_count)
        _check_choice("trigger", trigger, get_args(Trigger))
        if tokenizer is not None:
            index.check_tokenizer(tokenizer)
        self._is_checked = tokenizer is not None or index.tokenizer_hash is None
        self.index, self.scorer, self.threshold = index, scorer, self._shield.threshold
        self._by_span = bool(getattr(scorer, "by_span", False))
        self.min_length, self.max_count, self.trigger = min_length, max_count, trigger
        self.horizon = _check_horizon(horizon)
        self.tokenizer = index.tokenizer if tokenizer is None else tokenizer
        self._end_ids = _check_end_ids(self.tokenizer, end_ids)
        self._corpus = _Corpus.of(index, max(0, self._shortest_risky() - 1 - self.horizon))
        self._end = int(self._end_ids[0])
        self._forced = np.empty(0, dtype=np.int64)  # the refusal and the end mark
        if redirect is not None:
            self._forced = np.append(self._refusal(redirect), self._end)
        self._begins = np.zeros(1, dtype=np.int64)
        self._verdicts: dict[tuple[int, int], bool] = {}

    def after(self, columns: int | Sequence[int]) -> ProvDecode:
        """The same guard for rows whose first `columns` ids are not read: a number, or one for each prompt.

        `generate` pads the prompts of a batch on the left to one length, so the number of columns of
        `input_ids` leaves out all prompts. Where a prompt has several rows (beams), they stand together.
        """
        begins = np.atleast_1d(np.asarray(columns))
        if begins.ndim != 1 or not len(begins) or begins.dtype.kind not in "iu" or begins.min() < 0:
            raise ParameterError(
                "The columns to leave out are out of range.",
                given=repr(columns)[:80],
                expected="a whole number of 0 or more, or one for each prompt",
                mend="pass input_ids.shape[1]",
            )
        guard = copy.copy(self)  # tables and verdicts are shared
        guard._begins = begins.astype(np.int64)
        return guard

    # ------------------------------------------------------------------ generation

    def generate(self, model: PreTrainedModel, *, reads: Reads = "completion", **arguments: Any) -> Any:
        """`model.generate(**arguments)` under this guard.

        Parameters
        ----------
        reads:
            What belongs to the text: "completion", the new tokens only; "answer", the prefill too, which is
            what follows the chat template's last call for an answer; "everything", the whole row.
        arguments:
            For `generate`; `input_ids` is needed, and the model's `tokenizer` if the guard was made without.

        Raises
        ------
        ParameterError
            Unknown `reads`, no `input_ids` or no tokenizer, an encoder-decoder model, a way of decoding that
            is not one of `guard.MODES` or a loop of another's making, no end mark of the guard at which
            this call would stop, or "answer" where no answer is called for.
        VocabularyError
            The tokenizer is not the one of the index, or the model gives scores to fewer ids than it holds.
        """
        if not self._is_checked:
            self._check_model_tokenizer(arguments.get("tokenizer"))
        return model.generate(**self._arguments(model, reads, arguments))

    def _check_model_tokenizer(self, tokenizer: Any) -> None:
        if tokenizer is None:
            raise ParameterError(
                "The model's tokenizer is not known.",
                given="tokenizer=None",
                expected="the tokenizer of the model that generates",
                mend="pass tokenizer=... here or to ProvDecode, or use guarding(language_model)",
            )
        self.index.check_tokenizer(tokenizer)

    @contextmanager
    def guarding(self, model: LanguageModel, *, reads: Reads = "completion") -> Iterator[LanguageModel]:
        """Within the block, whatever `model` generates goes through this guard; see `generate`.

        Raises
        ------
        VocabularyError
            The model's tokenizer is not the one of the index.
        """
        _check_choice("reads", reads, get_args(Reads))
        if self.index.tokenizer_hash is not None:
            self._check_model_tokenizer(model.tokenizer)
        inner, unguarded, outer = model.model, model.model.generate, vars(model.model).get("generate")

        def guarded(inputs: Tensor | None = None, generation_config: Any = None, **arguments: Any) -> Any:
            if inputs is not None:
                arguments["input_ids"] = inputs
            if generation_config is not None:
                arguments["generation_config"] = generation_config
            return unguarded(**self._arguments(inner, reads, arguments))

        inner.generate = guarded
        try:
            yield model
        finally:
            del inner.generate
            if outer is not None:
                inner.generate = outer

    def _arguments(self, model: PreTrainedModel, reads: Reads, arguments: dict[str, Any]) -> dict[str, Any]:
        _check_choice("reads", reads, get_args(Reads))
        _check_mode(model, arguments, self.index.vocab_size)
        rows = arguments["input_ids"]
        if reads == "completion":
            columns: int | Sequence[int] = rows.shape[1]
        else:
            columns = 0 if reads == "everything" else _answers(self.tokenizer, rows)
        guard = self.after(columns)._ending_at(_end_marks(model, arguments))
        processors = [*(arguments.get("logits_processor") or ()), guard]
        return {**arguments, "logits_processor": LogitsProcessorList(processors)}

    def _ending_at(self, marks: Sequence[int]) -> ProvDecode:
        """This guard (a copy of one's own) for a call that stops at these ids: it ends at one of them."""
        shared = [end for end in self._end_ids.tolist() if end in marks]
        if not shared:
            raise ParameterError(
                "The guard's end mark is none at which this model stops.",
                given=f"end_ids {self._end_ids.tolist()}; the model stops at {list(marks) or 'none'}",
                expected="at least one id in both",
                mend="pass end_ids=[...] with the eos_token_id of model.generation_config to ProvDecode",
            )
        self._end = shared[0]
        self._end_ids = np.union1d(self._end_ids, np.asarray(marks, dtype=np.int64))
        if len(self._forced):
            self._forced = np.append(self._forced[:-1], self._end)
        return self

    # ------------------------------------------------------------------ one step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Apply veto, escape and redirect to one step.

        Parameters
        ----------
        input_ids:
            Shape (rows, T).
        scores:
            Logits or log-probabilities, shape (rows, V); changed in place.

        Returns
        -------
        Tensor
            `scores`.

        Raises
        ------
        VocabularyError
            V is smaller than the index's vocabulary.
        """
        _check_width(scores.shape[-1], self.index.vocab_size)
        rows = np.ascontiguousarray(input_ids.cpu().numpy(), dtype=np.int64)
        each = self._rows_each(len(rows))
        found: Ids = _find_candidates(rows, self._begins, each, self._forced, self._end_ids, *self._corpus)
        # numpy and torch read the same code, and on a CPU numpy's calls are several times shorter
        table = scores.numpy() if scores.device.type == "cpu" and scores.dtype == torch.float32 else scores
        vetoed = self._vetoed(rows, each, found) if len(found) else []
        now = [(row, token) for row, back, token in vetoed if back == 0]
        steps = self._refusal_steps(table, vetoed, now) if vetoed and len(self._forced) else {}
        if now:
            table[tuple(zip(*now, strict=True))] = -math.inf
        self._keep_escape(table, len(now))
        if steps:
            tokens = [int(self._forced[step]) for step in steps.values()]
            struck = set(now).intersection(zip(steps, tokens, strict=True))
            table[list(steps)] = -math.inf
            for row, token in zip(steps, tokens, strict=True):
                table[row, self._end if (row, token) in struck else token] = 0.0
        return scores

    def _rows_each(self, rows: int) -> int:
        """How many rows each prompt has."""
        each, rest = divmod(rows, len(self._begins))
        if rest:
            raise ParameterError(
                "The rows do not fit the prompts.",
                given=f"{rows} rows for {len(self._begins)} prompts",
                expected="the same number of rows for each prompt",
                mend="call after(...) anew for each call of generate",
            )
        return each

    def _keep_escape(self, table: Any, most: int) -> None:
        """Give the end mark to rows (rows, V) without a score; the veto took at most `most` tokens away."""
        if (table[:, 0] > -math.inf).all():
            return  # as nearly always
        # one of any most + 1 tokens of a row was not vetoed, so few columns tell enough about most rows
        left = (table[:, : most + 1] > -math.inf).any(1)
        for row, some in enumerate(left.tolist()):
            if not some and not (table[row] > -math.inf).any():
                table[row, self._end] = 0.0

    def _refusal_steps(
        self, table: Any, vetoed: list[tuple[int, int, int]], now: list[tuple[int, int]]
    ) -> dict[int, int]:
        """Rows that begin the refusal, or stand within it: how many of its tokens each has written."""
        steps = {row: 0 for row, _ in now}
        if self.trigger == "wanted" and steps:
            rows = list(steps)
            best = table[rows].argmax(1).tolist()  # (len(rows),)
            struck = set(now).intersection(zip(rows, best, strict=True))
            steps = {row: 0 for row, token in struck if table[row, token] > -math.inf}
        # candidates are in order of rows and of tokens written, so the longest part that fits is what stays
        return steps | {row: back for row, back, _ in vetoed if back}

    # ------------------------------------------------------------------ verdicts

    def _shortest_risky(self) -> int:
        """Tokens below which no span is risky: the longer, the sooner a step is left without a search."""
        if type(self.scorer) is bci.SpanLength:
            above = math.floor(self.threshold) + 1
            return max(self.min_length, min(above, self.index.n_tokens + 1))  # a table of counts has no 1e300
        return self.min_length

    def _vetoed(self, rows: Ids, each: int, found: Ids) -> list[tuple[int, int, int]]:
        """Row, tokens of the refusal written, and token of each candidate (k, 6) that is vetoed."""
        candidates = found.tolist()
        if not self._by_span:
            verdicts = self._judge(rows, each, found).tolist()
        else:
            keys = [(low, length) for _, _, _, low, _, length in candidates]  # they determine the span
            known = self._verdicts
            new = [i for i, key in enumerate(keys) if key not in known]
            if new:
                if len(known) > REMEMBERED:
                    known.clear()
                    new = list(range(len(keys)))
                fresh = self._judge(rows, each, found[new]).tolist()
                known.update(zip((keys[i] for i in new), fresh, strict=True))
            verdicts = [known[key] for key in keys]
        return [tuple(c[:3]) for c, verdict in zip(candidates, verdicts, strict=True) if verdict]

    def _judge(self, rows: Ids, each: int, found: Ids) -> NDArray[np.bool_]:
        """Whether each candidate (k, 6) is vetoed, shape (k,)."""
        corpus = self._corpus
        nodes: Ids = _look_ahead(
            found, self.horizon, corpus.tokens, corpus.suffixes, corpus.vocab_size
        )  # (n, 6)
        counts = nodes[:, _HIGH] - nodes[:, _LOW]
        most = self.index.n_tokens if self.max_count is None else self.max_count
        scored = np.flatnonzero((nodes[:, _LENGTH] >= self.min_length) & (counts <= most))
        risky = np.zeros(len(nodes), dtype=np.bool_)
        if len(scored):
            risky[scored] = self._scores(rows, each, found, nodes[scored]) > self.threshold
        verdicts: NDArray[np.bool_] = _fold(nodes, risky)
        return verdicts[: len(found)]

    def _scores(self, rows: Ids, each: int, found: Ids, nodes: Ids) -> NDArray[np.float64]:
        """The score of the span of each node, shape (nodes,)."""
        held = [self._corpus.span(low, length) for _, _, low, _, length, _ in nodes.tolist()]
        counts = (nodes[:, _HIGH] - nodes[:, _LOW]).tolist()
        if self._by_span:
            ends = np.cumsum([len(ids) for ids in held]).tolist()
            spans = [Span(end - len(ids), end, n) for ids, end, n in zip(held, ends, counts, strict=True)]
            return self._shield.score_spans(np.concatenate(held), spans)
        scores = np.empty(len(nodes))
        for i, (root, ids, n) in enumerate(zip(nodes[:, _ROOT].tolist(), held, counts, strict=True)):
            row, back, _, _, _, length = found[root].tolist()
            before = self._known(rows[row, self._begins[row // each] : rows.shape[1] - back])
            text = np.concatenate([before, ids[length - 1 :]])
            scores[i] = self._shield.score_spans(text, [Span(len(text) - len(ids), len(text), n)])[0]
        return scores

    def _known(self, text: Ids) -> Ids:
        """The end of a text (n,) that holds ids of the index's vocabulary only."""
        foreign = np.flatnonzero((text < 0) | (text >= self.index.vocab_size))
        return text[foreign[-1] + 1 :] if len(foreign) else text

    def _refusal(self, redirect: str | Sequence[int]) -> Ids:
        """The ids of the refusal, checked; shape (n,)."""
        ids = self.index.encode(redirect) if isinstance(redirect, str) else np.asarray(redirect)
        verdict = self._shield.check(ids)
        if len(ids) == 0 or verdict.refused:
            raise ParameterError(
                "The refusal would itself be refused." if len(ids) else "The refusal is empty.",
                given=f"{redirect!r}: {verdict.reason}",
                expected=f"at least one token, and no span that scores above {self.threshold:g}",
                mend="word it differently, or pass redirect=None to veto only",
            )
        return ids.astype(np.int64)


# --- the corpus, in compiled code ------------------------------------------------------------------

# Columns of nodes: a held span of `_LENGTH` tokens at ranks [_LOW, _HIGH); node `_PARENT` (-1: none) is the
# same span without its last token, and candidate `_ROOT` is where it started. `_ENDS`: occurrences that end a
# document.
_ROOT, _PARENT, _LOW, _HIGH, _LENGTH, _ENDS = range(6)


class _Corpus(NamedTuple):
    """An index as compiled code reads it, with a table of the hashes of its grams of `gram` tokens."""

    tokens: NDArray[Any]
    suffixes: NDArray[Any]
    keys: NDArray[np.uint64]
    vocab_size: int
    grams: NDArray[np.bool_]  # (a power of two,)
    gram: int

    @classmethod
    def of(cls, index: TraceIndex, gram: int) -> _Corpus:
        tokens, suffixes, keys, *_ = index.arrays
        grams = np.zeros(1 << max(4, (_SLOTS * len(suffixes)).bit_length()), dtype=np.bool_)
        _mark_grams(tokens, index.vocab_size, gram, grams)
        return cls(tokens, suffixes, keys, index.vocab_size, grams, gram)

    def span(self, rank: int, length: int) -> Ids:
        """The first `length` tokens of the suffix at `rank`."""
        place = int(self.suffixes[rank])
        return np.asarray(self.tokens[place : place + length], dtype=np.int64)


@compiled
def _slot(ids: NDArray[Any], start: int, end: int, slots: int) -> int:
    """The place of `ids[start:end]` in a table of `slots` (a power of two): FNV-1a over ids."""
    value = np.uint64(14695981039346656037)
    for i in range(start, end):
        value = (value ^ np.uint64(ids[i])) * np.uint64(1099511628211)
    return int((value ^ (value >> np.uint64(32))) & np.uint64(slots - 1))


@compiled
def _mark_grams(tokens: NDArray[Any], vocab_size: int, gram: int, grams: NDArray[np.bool_]) -> None:
    """Mark every run of `gram` tokens within a document."""
    run = 0
    for i in range(len(tokens)):
        run = run + 1 if tokens[i] < vocab_size else 0
        if run and run >= gram:
            grams[_slot(tokens, i + 1 - gram, i + 1, len(grams))] = True


@compiled
def _token(tokens: NDArray[Any], suffixes: NDArray[Any], rank: int, depth: int, vocab_size: int) -> int:
    """The token at `depth` of the suffix at `rank`; `vocab_size` where its document has ended."""
    place = np.int64(suffixes[rank]) + depth
    # a damaged file must not make compiled code read outside the array
    return int(np.int64(tokens[place])) if 0 <= place < len(tokens) else vocab_size


@compiled
def _run_end(
    tokens: NDArray[Any], suffixes: NDArray[Any], low: int, high: int, depth: int, vocab_size: int
) -> int:
    """Where the run of suffixes in `[low, high)` that share the token at `depth` with the first one ends."""
    token = _token(tokens, suffixes, low, depth, vocab_size)
    while high - low > 1:
        middle = (low + high) // 2
        if _token(tokens, suffixes, middle, depth, vocab_size) <= token:
            low = middle
        else:
            high = middle
    return high


@compiled
def _appended(table: Ids, size: int, record: tuple[int, int, int, int, int, int]) -> Ids:
    """`table` (n, 6) with `record` at row `size`; a larger copy where it was full."""
    if size == len(table):
        larger = np.empty((2 * size, 6), dtype=np.int64)
        larger[:size] = table
        table = larger
    for column in range(6):
        table[size, column] = record[column]
    return table


@compiled
def _find_candidates(
    rows: Ids,
    begins: Ids,
    each: int,
    forced: Ids,
    ends: Ids,
    tokens: NDArray[Any],
    suffixes: NDArray[Any],
    keys: NDArray[np.uint64],
    vocab_size: int,
    grams: NDArray[np.bool_],
    gram: int,
) -> Ids:
    """Every token that gives a row a held suffix of more than `gram` tokens; shape (k, 6).

    The text of a row begins at column `begins[row // each]`. Rows are also read without their last `back`
    tokens where these are the beginning of the refusal `forced` (n,). Of the suffixes that a token
    completes, only the longest is listed; end marks, `ends` (m,), are not.
    """
    found, size = np.empty((16, 6), dtype=np.int64), 0
    width = rows.shape[1]
    for row in range(len(rows)):
        first = begins[row // each]
        for back in range(max(1, len(forced))):
            end = width - back
            if end - first < gram:
                break
            begun = True
            for i in range(back):
                begun = begun and rows[row, end + i] == forced[i]
            if not begun or not grams[_slot(rows[row], end - gram, end, len(grams))]:
                continue
            begin = end
            while begin > first and 0 <= rows[row, begin - 1] < vocab_size:
                begin -= 1
            if end - begin >= gram:
                text = rows[row, begin:end]
                found, size = _continue(
                    found, size, row, back, text, ends, tokens, suffixes, keys, vocab_size, gram
                )
    return found[:size]


@compiled
def _continue(
    found: Ids,
    size: int,
    row: int,
    back: int,
    text: Ids,
    ends: Ids,
    tokens: NDArray[Any],
    suffixes: NDArray[Any],
    keys: NDArray[np.uint64],
    vocab_size: int,
    gram: int,
) -> tuple[Ids, int]:
    """Add what follows the held suffixes of `text` that have `gram` tokens or more, longest first."""
    end, first = len(text), size
    least_low, least_high = find_interval(tokens, suffixes, keys, text, end - gram, end)
    if least_low == least_high:
        return found, size
    low, high, length = find_longest_suffix(tokens, suffixes, keys, text)
    while True:
        longer = size
        while low < high:
            token = _token(tokens, suffixes, low, length, vocab_size)
            if token == vocab_size:
                break  # the separator is the greatest id, so the other occurrences end documents too
            after = _run_end(tokens, suffixes, low, high, length, vocab_size)
            if not (ends == token).any() and not (found[first:longer, TOKEN] == token).any():
                found = _appended(found, size, (row, back, token, low, after, length + 1))
                size += 1
            low = after
        if length == gram:
            return found, size
        low, high, length = _shorter(text, length, tokens, suffixes, keys, gram)
        if length < 0:
            return found, size


@compiled
def _shorter(
    text: Ids,
    length: int,
    tokens: NDArray[Any],
    suffixes: NDArray[Any],
    keys: NDArray[np.uint64],
    gram: int,
) -> tuple[int, int, int]:
    """Ranks and length of the longest suffix of `text` that occurs more often than that of `length >= 1`.

    The length is -1 if none of `gram` tokens or more does. Suffixes in between end at the same places as
    the longer one, so nothing else follows them.
    """
    end = len(text)
    low, high = find_interval(tokens, suffixes, keys, text, end - length, end)
    count = high - low
    rarer, commoner = length, max(gram, 1) - 1
    while rarer - commoner > 1:
        middle = (rarer + commoner) // 2
        low, high = find_interval(tokens, suffixes, keys, text, end - middle, end)
        if high - low > count:
            commoner = middle
        else:
            rarer = middle
    if commoner < gram:
        return 0, 0, -1
    # the empty suffix, if it is reached, is followed by every token of the corpus
    low, high = find_interval(tokens, suffixes, keys, text, end - commoner, end)
    return low, high, commoner


@compiled
def _look_ahead(
    found: Ids, horizon: int, tokens: NDArray[Any], suffixes: NDArray[Any], vocab_size: int
) -> Ids:
    """The candidates' spans and all that extend them by up to `horizon` tokens, shape (n, 6).

    The first nodes are the candidates; every other one stands behind its parent.
    """
    nodes, size = np.empty((max(16, len(found)), 6), dtype=np.int64), 0
    for i in range(len(found)):
        low, high, length = found[i, LOW], found[i, HIGH], found[i, LENGTH]
        nodes = _appended(nodes, size, (i, -1, low, high, length, 0))
        size += 1
    node = 0
    while node < size:
        root, low, high, length = (
            nodes[node, _ROOT],
            nodes[node, _LOW],
            nodes[node, _HIGH],
            nodes[node, _LENGTH],
        )
        if length - found[root, LENGTH] < horizon:
            while low < high and _token(tokens, suffixes, low, length, vocab_size) < vocab_size:
                after = _run_end(tokens, suffixes, low, high, length, vocab_size)
                nodes = _appended(nodes, size, (root, node, low, after, length + 1, 0))
                size += 1
                low = after
            nodes[node, _ENDS] = high - low
        node += 1
    return nodes[:size]


@compiled
def _fold(nodes: Ids, risky: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each node is risky, or else all its children are and no occurrence ends a document; (n,)."""
    children, vetoed = np.zeros(len(nodes), dtype=np.int64), np.zeros(len(nodes), dtype=np.int64)
    verdicts = risky.copy()
    for node in range(len(nodes) - 1, -1, -1):
        if children[node] and vetoed[node] == children[node] and nodes[node, _ENDS] == 0:
            verdicts[node] = True
        parent = nodes[node, _PARENT]
        if parent >= 0:
            children[parent] += 1
            vetoed[parent] += verdicts[node]
    return verdicts


# --- checks ----------------------------------------------------------------------------------------


def _check_horizon(horizon: int) -> int:
    if not isinstance(horizon, int | np.integer) or isinstance(horizon, bool) or horizon < 0:
        raise ParameterError(
            "The horizon is out of range.",
            given=repr(horizon),
            expected="a whole number of tokens, 0 or more",
            mend="use horizon=0 to veto only the token that completes a span",
        )
    return int(horizon)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ParameterError(
            f"Unknown {name}.",
            given=repr(value),
            expected=" or ".join(map(repr, choices)),
            mend=f"use {name}={choices[0]!r}",
        )


def _check_width(scores: int, vocab_size: int) -> None:
    if scores < vocab_size:
        raise VocabularyError(
            "The model knows fewer ids than the index.",
            given=f"scores for {scores} ids",
            expected=f"at least {vocab_size}",
            mend="build the index with the model's tokenizer",
        )


def _check_mode(model: PreTrainedModel, arguments: dict[str, Any], vocab_size: int) -> None:
    """Refuse what a processor of (rows, T) ids cannot guard."""
    if model.config.is_encoder_decoder:
        problem, given = "Encoder-decoder models cannot be guarded.", type(model).__name__
    elif arguments.get("custom_generate") is not None:
        problem, given = "A decoding loop of another's making need not ask the guard.", "custom_generate"
    elif (mode := generation_mode(model, arguments)) not in MODES:
        problem, given = "This way of decoding is a loop fetched from elsewhere.", mode.value
    elif not isinstance(arguments.get("input_ids"), Tensor) or arguments["input_ids"].ndim != 2:
        problem, given = "The prompts are not token ids.", f"input_ids={arguments.get('input_ids')!r}"[:80]
    else:
        _check_width(model.config.get_text_config().vocab_size, vocab_size)
        return
    raise ParameterError(
        problem,
        given=given,
        expected="a causal model, its own generate, and input_ids of shape (prompts, T)",
        mend="greedy search, sampling, beam search and assisted decoding of a causal model are guarded",
    )


def _end_marks(model: PreTrainedModel, arguments: dict[str, Any]) -> list[int]:
    """The ids at which `model.generate(**arguments)` stops a row."""
    for known in (arguments, arguments.get("generation_config"), model.generation_config):
        marks = known.get("eos_token_id") if isinstance(known, dict) else getattr(known, "eos_token_id", None)
        if marks is not None:
            return [int(mark) for mark in np.ravel(np.asarray(marks))]
    return []


def _check_end_ids(tokenizer: Any, end_ids: Sequence[int] | None) -> Ids:
    """The end marks that were given, or else the tokenizer's; shape (n >= 1,)."""
    if end_ids is None:
        found = getattr(tokenizer, "eos_token_id", None)
        end_ids = [] if found is None else [found]
    ids = np.asarray(end_ids)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu" or ids.min() < 0:
        raise ParameterError(
            "No end mark is known, so a veto might leave a row without any token.",
            given=f"end_ids={end_ids!r}",
            expected="at least one token id",
            mend="pass end_ids=[model.generation_config.eos_token_id]",
        )
    return ids.astype(np.int64)


def _answers(tokenizer: Any, rows: Tensor) -> list[int]:
    """Where the answer begins in each prompt (prompts, T): behind the last call for one."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            "Without a chat template, nobody can tell where an answer begins.",
            given=type(tokenizer).__name__,
            expected="a tokenizer with a chat template",
            mend='use reads="completion" or reads="everything", or after(...) with columns of your own',
        )
    turn = [{"role": "user", "content": "?"}]
    asked, open_ = (
        tokenizer.apply_chat_template(turn, add_generation_prompt=prompt, return_dict=False)
        for prompt in (False, True)
    )
    call = open_[len(asked) :]
    begins: list[int] = []
    for row in rows.tolist():
        ends = (end for end in range(len(row), len(call) - 1, -1) if row[end - len(call) : end] == call)
        begins.append(next(ends, -1))
    if not call or min(begins) < 0:
        raise ParameterError(
            "A prompt does not call for an answer.",
            given=f"prompt {begins.index(min(begins))}",
            expected=f"prompts that hold {tokenizer.decode(call)!r}",
            mend='make prompts with model.chat, or use reads="completion"',
        )
    return begins
