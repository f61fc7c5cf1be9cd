"""Is the drift bound kept? Certificates on pairs of language models, their coverage and tightness.

A pair is two models and one sampler, as T2 of `bound` has it: one model trained on the whole corpus,
one without the documents in question. The negative controls break one assumption of a theorem each,
and show that its bound is violated then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from transformers import PreTrainedTokenizerBase, set_seed

from tracealign_lib.bound import KAPPAS, added_counts, certify, check_share, gram_log_multiplier
from tracealign_lib.errors import ParameterError, VocabularyError
from tracealign_lib.lm import LanguageModel
from tracealign_lib.ngram import Floats, Ids, NGramModel, check_integer, check_positive, check_rows
from tracealign_lib.progress import progress
from tracealign_lib.stats import Interval
from tracealign_lib.world import Item

# --- T2 on language models -----------------------------------------------------------------------

_PAIR_COLUMNS = ["item", "copies", "length", "truth", "without", "hits", "bound", "kappa", "floor"]


class PairCase(NamedTuple):
    """A prompt and the planted span that could follow it, as token ids."""

    item: str
    copies: int
    prompt: tuple[int, ...]
    span: tuple[int, ...]


def pair_cases(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[PairCase]:
    """Each item's recipe, cut after its opening: the opening is the prompt, the steps are the span."""
    cases = []
    for item in items:
        opening, recipe = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (item.opening, item.recipe)
        )
        if recipe[: len(opening)] != opening or len(recipe) == len(opening):
            raise VocabularyError(
                "The tokenizer does not split the recipe after its opening.",
                given=repr(item.opening),
                expected="the tokens of the opening, then those of the steps",
                mend="use the tokenizer that belongs to the world",
            )
        cases.append(PairCase(item.id, item.copies, tuple(opening), tuple(recipe[len(opening) :])))
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
    start = torch.tensor([_prompt(prompt)], device=model.device)  # (1, P)
    pad = model.tokenizer.pad_token_id
    drawn = np.full((n, steps), pad, dtype=np.int64)
    set_seed(seed)
    for first in range(0, n, batch_size):
        output = model.model.generate(  # type: ignore[operator]
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=steps,
            num_return_sequences=min(batch_size, n - first),
            do_sample=True,
            temperature=check_positive(temperature, "temperature"),
            top_k=0,
            top_p=1.0,
            pad_token_id=pad,
        )
        new = output[:, start.shape[1] :].cpu().numpy()  # (B, <= steps)
        drawn[first : first + len(new), : new.shape[1]] = new
    return drawn


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
    head = torch.tensor(_prompt(prompt), device=model.device)  # (P,)
    vocab_size = int(model.model.config.vocab_size)
    rows = check_rows(completions, vocab_size)
    ended = _after_end(rows, model)
    distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
    scored: Floats = np.zeros(distinct.shape)
    for first in range(0, len(distinct), batch_size):
        tail = torch.from_numpy(distinct[first : first + batch_size]).to(model.device)  # (B, T)
        inputs = torch.cat([head.expand(len(tail), -1), tail], dim=1)
        logits = model.model(input_ids=inputs).logits[:, len(head) - 1 : -1].double()  # (B, T, V)
        chosen = (
            (logits / check_positive(temperature, "temperature")).log_softmax(-1).gather(-1, tail[..., None])
        )
        scored[first : first + len(tail)] = chosen[..., 0].cpu().numpy()
    return np.where(ended, 0.0, scored[inverse.reshape(-1)])


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


def measure_pair(
    full: LanguageModel,
    without: LanguageModel,
    cases: Sequence[PairCase],
    *,
    lengths: Sequence[int],
    samples: int,
    kappas: Sequence[float] = KAPPAS,
    delta: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """T2 on two trained models: one certificate for each case and span length.

    E is "the completion begins with the first l tokens of the span", so P_D(E) and P_-A(E) are known
    exactly; only the tail of L over the first l tokens is estimated, from `samples` completions of
    `full`. Every certificate holds with probability 1 - delta by itself, not all of them together.

    Returns
    -------
    pandas.DataFrame
        item, copies, length, truth (P_D(E)), without (P_-A(E)), hits (samples in which E happened),
        bound, kappa, floor, tightness (bound / truth) and covered (bound >= truth). Spans shorter
        than a length have no row for it.
    """
    _check_pair(full, without)
    longest = [check_integer(length, "length", at_least=1) for length in lengths]
    rows: list[dict[str, Any]] = []
    for case in progress(cases, description="Certifying spans", unit="span"):
        usable = [length for length in longest if length <= len(case.span)]
        if not usable:
            continue
        span = np.asarray(case.span[: max(usable)], dtype=np.int64)
        truth, base = (
            np.exp(np.cumsum(completion_log_probs(model, case.prompt, span[None])[0]))
            for model in (full, without)
        )  # (T,), (T,)
        own_seed = Random(f"{seed}/{case.item}").getrandbits(31)
        drawn = sample_completions(full, case.prompt, samples, steps=len(span), seed=own_seed)
        ratios = log_ratios(full, without, case.prompt, drawn)  # (n, T)
        same = np.cumprod(drawn == span, axis=1).sum(axis=0)  # (T,)
        for last in (length - 1 for length in usable):
            certificate = certify(ratios[:, last], float(base[last]), kappas=kappas, delta=delta)
            rows.append(
                {"item": case.item, "copies": case.copies, "length": last + 1}
                | {"truth": float(truth[last]), "without": float(base[last]), "hits": int(same[last])}
                | {name: getattr(certificate, name) for name in ("bound", "kappa", "floor")}
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
