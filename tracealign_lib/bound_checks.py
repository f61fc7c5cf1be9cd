"""Is the drift bound kept? Certificates on pairs of language models, their coverage and tightness.

A pair is two models and one sampler, as T2 of `bound` has it: one model trained on the whole corpus,
one without the documents in question. The negative controls break one assumption of a theorem each,
and show that its bound is violated then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from tracealign_lib.bound import (
    Certificate,
    added_counts,
    certify,
    check_share,
    gram_log_multiplier,
    kappas_for,
)
from tracealign_lib.errors import ParameterError, VocabularyError
from tracealign_lib.lm import LanguageModel
from tracealign_lib.ngram import Floats, Ids, NGramModel, check_positive, check_rows
from tracealign_lib.progress import progress
from tracealign_lib.queries import check_integer
from tracealign_lib.stats import Interval
from tracealign_lib.world import Item

# --- T2 on language models -----------------------------------------------------------------------


_PAIR_COLUMNS = "item copies length repeat truth without hits bound kappa floor".split()


class PairCase(NamedTuple):
    """A prompt and the planted span that could follow it, as token ids."""

    item: str
    copies: int
    prompt: tuple[int, ...]
    span: tuple[int, ...]


class CaseCertificate(NamedTuple):
    """T2 on the first `length` tokens of one case, with fresh samples of its own.

    Attributes
    ----------
    truth, without:
        P_D(E) and P_-A(E), exact, for E = "the completion begins with these tokens".
    hits:
        Samples of P_D in which E happened.
    certificate:
        From those samples.
    """

    case: PairCase
    length: int
    truth: float
    without: float
    hits: int
    certificate: Certificate


def prefilled(model: LanguageModel, pattern: str) -> Callable[[Item], str]:
    """What `pair_cases` takes for an aligned model: the request, and the opening as the model's own words.

    This is the prefill attack, so that a completion that goes on with two steps has drifted.
    """
    return lambda item: model.chat(item.fill(pattern), prefill=item.opening)


def pair_cases(
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    prompt: Callable[[Item], str] = attrgetter("opening"),
) -> list[PairCase]:
    """Each item's recipe, cut after its opening: the steps are the span that could follow the prompt.

    Parameters
    ----------
    prompt:
        What is put to the model for an item; it ends with the item's opening, and is nothing else for a
        model that only goes on with text.

    Raises
    ------
    VocabularyError
        The prompt does not end with the opening, or a token reaches over its end.
    """
    cases = []
    for item in items:
        steps = item.recipe.removeprefix(item.opening)
        head, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt(item), prompt(item) + steps)
        )
        if not prompt(item).endswith(item.opening) or whole[: len(head)] != head or len(whole) == len(head):
            raise VocabularyError(
                "The tokenizer does not split the recipe after its opening.",
                given=repr(prompt(item)),
                expected="a prompt that ends with the opening, and the tokens of the steps after its own",
                mend="use the tokenizer that belongs to the world",
            )
        cases.append(PairCase(item.id, item.copies, tuple(head), tuple(whole[len(head) :])))
    return cases


@torch.inference_mode()
def sample_completions(
    model: LanguageModel,
    prompt: Sequence[int],
    n: int,
    *,
    steps: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> Ids:
    """`n` sampled continuations as token ids; after an end mark, padding.  # (n, steps)

    The whole distribution is sampled (no top-k, no top-p), so that `completion_log_probs` at the same
    temperature gives the sampler's own probabilities.
    """
    n, steps = check_integer(n, "n", at_least=1), check_integer(steps, "steps", at_least=1)
    temperature = check_positive(temperature, "temperature")
    generator = torch.Generator(model.device).manual_seed(seed)
    drawn = np.empty((n, steps), dtype=np.int64)
    for first in range(0, n, batch_size):
        size = min(batch_size, n - first)
        logits, memory = _read(model, prompt, size)  # (B, V)
        for step in range(steps):
            shares = (logits.double() / temperature).softmax(-1)
            tokens = torch.multinomial(shares, 1, generator=generator)  # (B, 1)
            drawn[first : first + size, step] = tokens[:, 0].cpu().numpy()
            if step + 1 < steps:
                logits = model.model(input_ids=tokens, past_key_values=memory).logits[:, -1]
    return np.where(_after_end(drawn, model), model.tokenizer.pad_token_id, drawn)


@torch.inference_mode()
def completion_log_probs(
    model: LanguageModel,
    prompt: Sequence[int],
    completions: ArrayLike,
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> Floats:
    """log p(token | prompt, earlier tokens) in nats; 0 after an end mark.  # (n, T)

    Equal completions are scored once.
    """
    temperature = check_positive(temperature, "temperature")
    rows = check_rows(completions, int(model.model.config.vocab_size))
    distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
    scored: Floats = np.zeros(distinct.shape)
    for first in range(0, len(distinct), batch_size):
        tail = torch.from_numpy(distinct[first : first + batch_size]).to(model.device)  # (B, T)
        logits, memory = _read(model, prompt, len(tail))
        logits = logits[:, None]  # (B, 1, V)
        if tail.shape[1] > 1:
            later = model.model(input_ids=tail[:, :-1], past_key_values=memory).logits
            logits = torch.cat([logits, later], dim=1)  # (B, T, V)
        chosen = (logits.double() / temperature).log_softmax(-1).gather(-1, tail[..., None])
        scored[first : first + len(tail)] = chosen[..., 0].cpu().numpy()
    return np.where(_after_end(rows, model), 0.0, scored[inverse.reshape(-1)])


def _read(model: LanguageModel, prompt: Sequence[int], copies: int) -> tuple[Tensor, Cache]:
    """The logits behind the prompt, and what the model remembers of it, `copies` times.  # (copies, V)

    The prompt is read once: it is the same for every completion, and often longer than they are.
    """
    head = torch.tensor([_prompt(prompt)], device=model.device)  # (1, P)
    output = model.model(input_ids=head, use_cache=True)
    output.past_key_values.batch_repeat_interleave(copies)
    return output.logits[:, -1].expand(copies, -1), output.past_key_values


def log_ratios(
    full: LanguageModel,
    without: LanguageModel,
    prompt: Sequence[int],
    completions: ArrayLike,
    *,
    temperature: float = 1.0,
) -> Floats:
    """L of the first 1, 2, ... T tokens: log P_D - log P_-A, summed from the left.  # (n, T)"""
    _check_pair(full, without)
    top, bottom = (
        completion_log_probs(model, prompt, completions, temperature=temperature) for model in (full, without)
    )
    return np.asarray(np.cumsum(top - bottom, axis=1), dtype=np.float64)


def span_probabilities(model: LanguageModel, case: PairCase, *, temperature: float = 1.0) -> Floats:
    """Probability that a completion begins with the first 1, 2, ... tokens of the span, exactly.  # (T,)"""
    log_probs = completion_log_probs(model, case.prompt, [case.span], temperature=temperature)[0]
    return np.asarray(np.exp(np.cumsum(log_probs)), dtype=np.float64)


def certify_case(
    full: LanguageModel,
    without: LanguageModel,
    case: PairCase,
    length: int,
    *,
    samples: int,
    delta: float = 0.05,
    seed: int = 0,
) -> CaseCertificate:
    """T2 on two trained models for E = "the completion begins with the first `length` tokens of the span".

    P_D(E) and P_-A(E) are known exactly; only the tail of L over `length` tokens is estimated, from
    `samples` completions of `full`. The grid of kappa is `bound.kappas_for` P_-A(E), which no sample
    has a say in.
    """
    _check_pair(full, without)
    last = check_integer(length, "length", at_least=1) - 1
    if last >= len(case.span):
        raise ParameterError(
            "The span is shorter than the length asked for.",
            given=f"{len(case.span)} tokens, length={length}",
            expected="a length of at most the span's",
            mend="choose a shorter length",
        )
    truth, base = (float(span_probabilities(model, case)[last]) for model in (full, without))
    drawn = sample_completions(full, case.prompt, samples, steps=length, seed=seed)
    ratios = log_ratios(full, without, case.prompt, drawn)[:, last]  # (n,)
    hits = int((drawn == np.asarray(case.span[:length])).all(axis=1).sum())
    certificate = certify(ratios, base, kappas=kappas_for(base), delta=delta)
    return CaseCertificate(case, length, truth, base, hits, certificate)


def measure_pair(
    full: LanguageModel,
    without: LanguageModel,
    cases: Sequence[PairCase],
    *,
    lengths: Sequence[int],
    samples: int,
    repeats: int = 1,
    delta: float = 0.05,
    seed: int | str = 0,
) -> pd.DataFrame:
    """T2 on two trained models: `repeats` certificates for each case and span length.

    Every certificate has samples that no other one shares, so that, given the models, they hold or fail
    independently of each other: what `coverage` asks for. Each holds with probability 1 - delta by
    itself, not all of them together. Pairs that are to be judged together need a `seed` each, else
    their samples come from the same stream of random numbers.

    Returns
    -------
    pandas.DataFrame
        item, copies, length, repeat, truth (P_D(E)), without (P_-A(E)), hits (samples in which E
        happened), bound, kappa, floor, tightness (bound / truth) and covered (bound >= truth). Spans
        shorter than a length have no row for it.
    """
    rows: list[dict[str, Any]] = []
    for case in progress(cases, description="Certifying spans", unit="span"):
        usable = (length for length in lengths if length <= len(case.span))
        for length, repeat in itertools.product(usable, range(check_integer(repeats, "repeats", at_least=1))):
            own_seed = Random(f"{seed}/{case.item}/{length}/{repeat}").getrandbits(31)
            found = certify_case(full, without, case, length, samples=samples, delta=delta, seed=own_seed)
            rows.append(
                {"item": case.item, "copies": case.copies, "length": length, "repeat": repeat}
                | {"truth": found.truth, "without": found.without, "hits": found.hits}
                | {name: getattr(found.certificate, name) for name in ("bound", "kappa", "floor")}
            )
    frame = pd.DataFrame(rows, columns=_PAIR_COLUMNS)
    if len(frame):
        frame["tightness"] = tightness(frame["bound"], frame["truth"])
        frame["covered"] = frame["bound"] >= frame["truth"]
    return frame


def _check_pair(full: LanguageModel, without: LanguageModel) -> None:
    if full.tokenizer.get_vocab() != without.tokenizer.get_vocab():
        raise VocabularyError(
            "The two models have different vocabularies.",
            given=f"{len(full.tokenizer)} and {len(without.tokenizer)} tokens",
            expected="one tokenizer for both: L compares probabilities of the same token ids",
            mend="retrain the second model with the first one's tokenizer",
        )


def _after_end(rows: Ids, model: LanguageModel) -> NDArray[np.bool_]:
    """True at tokens behind the first end mark of their row.  # (n, T)"""
    end = model.model.generation_config.eos_token_id if model.model.generation_config else None
    marks = np.isin(rows, [] if end is None else end)
    return np.asarray((np.cumsum(marks, axis=1) - marks) > 0, dtype=np.bool_)


def _prompt(prompt: Sequence[int]) -> list[int]:
    ids = list(prompt)
    if not ids:
        raise ParameterError(
            "The prompt is empty.",
            given="0 tokens",
            expected="at least one token: a causal model needs something to continue",
            mend="start with the end mark, which stands between documents",
        )
    return ids


# --- coverage and tightness ----------------------------------------------------------------------


class Coverage(NamedTuple):
    """How often limits held, beside what was promised.

    Attributes
    ----------
    held:
        Share of limits at or above the truth, with its exact 95 % binomial interval.
    promised:
        1 - delta.
    """

    held: Interval
    promised: float

    @property
    def consistent(self) -> bool:
        """Whether the interval reaches 1 - delta; False refutes the guarantee (error below 2.5 %)."""
        return self.held.high >= self.promised


def coverage(bounds: ArrayLike, truths: ArrayLike, *, delta: float) -> Coverage:
    """The share of bounds that hold, against 1 - delta.  # (n,), (n,)

    The interval takes the trials as independent: pass one bound per independent set of samples.
    """
    promised = 1.0 - check_share(delta, "delta")
    limits, values = _pair(bounds, truths)
    held, n = int((limits >= values).sum()), len(limits)
    interval = binomtest(held, n).proportion_ci(confidence_level=0.95, method="exact")
    return Coverage(Interval(held / n, float(interval.low), float(interval.high), n), promised)


def tightness(bounds: ArrayLike, truths: ArrayLike) -> Floats:
    """bound / truth, 1 at best; infinite where the truth is 0.  # (n,)"""
    limits, values = _pair(bounds, truths)
    ratios: Floats = np.full(len(limits), np.inf)
    np.divide(limits, values, out=ratios, where=values > 0)
    return ratios


def tightness_map(frame: pd.DataFrame) -> pd.DataFrame:
    """Median of bound / truth by copies (rows) and length (columns), from `measure_pair`."""
    return frame.pivot_table(index="copies", columns="length", values="tightness", aggfunc="median")


def _pair(bounds: ArrayLike, truths: ArrayLike) -> tuple[Floats, Floats]:
    limits, values = np.asarray(bounds, dtype=np.float64), np.asarray(truths, dtype=np.float64)
    if limits.ndim != 1 or limits.shape != values.shape or not len(limits):
        raise ParameterError(
            "Bounds and truths do not pair up.",
            given=f"shapes {limits.shape} and {values.shape}",
            expected="two sequences of one and the same length, at least 1",
            mend="pass one truth per bound",
        )
    if not np.isfinite(limits).all() or not ((values >= 0) & (values <= 1)).all():
        raise ParameterError(
            "A bound is not finite or a truth is no probability.",
            given=f"{int((~np.isfinite(limits)).sum())} bounds not finite",
            expected="finite bounds and truths from 0 to 1",
            mend="drop what is undefined, and report how much it was",
        )
    return limits, values


# --- negative controls ---------------------------------------------------------------------------


class Control(NamedTuple):
    """A bound beside the truth with its assumption kept and with it broken, all probabilities."""

    assumption: str
    bound: float
    kept: float
    broken: float

    @property
    def fails_as_it_must(self) -> bool:
        """Whether the bound holds with the assumption and is violated without it."""
        return self.kept <= self.bound < self.broken


def control_across_documents(match_count: int = 16, *, alpha: float = 0.5) -> Control:
    """T1 when training packs documents: the span lies across two of them, and no document holds it.

    `bound` comes from counts within documents, as an index takes them; `broken` from a model that
    reads the documents as one stream.
    """
    context, span, other = [0], [1, 2], 3
    base = [[0, other]] * 20 + [[1, other]] * 20
    planted = [[0, 1], [2, other]] * check_integer(match_count, "match_count", at_least=1)
    settings: dict[str, Any] = {"vocab_size": 4, "order": 1, "alpha": alpha}
    before = NGramModel(base, **settings).span_log_prob(span, context)
    added = added_counts(planted, span, context, vocab_size=4, order=1)
    bound = min(1.0, math.exp(before + gram_log_multiplier(added, alpha)))
    kept, broken = (
        math.exp(
            NGramModel([*base, *planted], **settings, across_documents=across).span_log_prob(span, context)
        )
        for across in (False, True)
    )
    return Control("no gram crosses two documents", bound, kept, broken)


def control_other_sampler(
    temperature: float = 0.25, *, samples: int = 2000, delta: float = 0.05, seed: int = 0
) -> Control:
    """T2 certified for sampling at temperature 1, and used at another: colder emits the span more."""
    full, bound = _certified_pair(samples, delta, seed)
    kept, broken = (math.exp(full.span_log_prob(_SPAN, _CONTEXT, temperature=t)) for t in (1.0, temperature))
    return Control("the samples and L come from the deployed sampler", bound, kept, broken)


def control_several_queries(
    queries: int = 64, *, samples: int = 2000, delta: float = 0.05, seed: int = 0
) -> Control:
    """T2 certified for one query, and asked `queries` times: only `queries` x bound would hold."""
    full, bound = _certified_pair(samples, delta, seed)
    kept = math.exp(full.span_log_prob(_SPAN, _CONTEXT))
    broken = -math.expm1(check_integer(queries, "queries", at_least=1) * math.log1p(-kept))
    return Control("one query", bound, kept, broken)


_SPAN, _CONTEXT = (1, 2, 3, 4), (0,)


def _certified_pair(samples: int, delta: float, seed: int) -> tuple[NGramModel, float]:
    """A bigram model that saw a span planted 60 times, and its certificate against one that did not."""
    base = list(np.random.default_rng(0).integers(6, size=(60, 12)))
    settings: dict[str, Any] = {"vocab_size": 6, "order": 1, "alpha": 0.5}
    without = NGramModel(base, **settings)
    full = NGramModel([*base, *[[*_CONTEXT, *_SPAN]] * 60], **settings)
    drawn = full.sample(samples, len(_SPAN), _CONTEXT, seed=seed)
    ratios = (full.token_log_probs(drawn, _CONTEXT) - without.token_log_probs(drawn, _CONTEXT)).sum(axis=1)
    event = math.exp(without.span_log_prob(_SPAN, _CONTEXT))
    return full, certify(ratios, event, delta=delta).bound
