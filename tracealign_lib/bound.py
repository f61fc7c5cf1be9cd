"""The drift bound: four statements, each with its assumptions, and checks that can fail.

The paper's abstract announces an upper bound Pr[drift(q)] <= f(M(q), l_q, tau) from match counts and
span lengths; its closed form is not known to us, so the forms here are ours.

T0, union bound.
    Let a text drift only if it holds a risky window, and let W be the number of risky windows in it.
    Then P(drift) <= P(W >= 1) <= E[W].  Proof: 1[W >= 1] <= W; take expectations.
T1, planting, for an order-k add-alpha model p(w | h) = (c(h, w) + alpha) / (c(h) + alpha V).
    Add documents to a corpus that count the j-th gram (context and token) of a span a_j more times.
    Then the span's probability grows at most by the factor prod_j (1 + a_j / alpha).
    Proof: one token's factor is (1 + a_j / (c_j + alpha)) (C_j + alpha V) / (C_j + A_j + alpha V),
    where C_j and A_j >= a_j count its context before and in the planted documents. The second factor
    is at most 1, the first at most 1 + a_j / alpha. The product over j is the claim.
    The short form (1 + m / alpha)^l for m planted copies needs a_j <= m: no copy may hold a gram of
    the span twice. Without that it is false (`enumerate_planting` finds counterexamples); a copy that
    holds a gram r times needs (1 + r m / alpha)^l. A repeated *context* does no harm as long as
    another token follows each time. No smaller constant holds for all corpora: with c_j = 0 and C_j
    towards infinity the factor tends to prod_j (1 + a_j / alpha).
    Corollary: if the span scores BCI > tau and P_-A(span | h) <= exp(gain - BCI) for every context
    h, then P_D(span | h) <= (1 + r M / alpha)^l exp(gain - tau); T0 adds this up over windows.
T2, any two models, one sampler.
    With L = log P_D(x) - log P_-A(x) of the sampled x, every event E and every kappa satisfy
    P_D(E) <= e^kappa P_-A(E) + P_D(L > kappa).
    Proof: P_D(E) = P_D(E, L <= kappa) + P_D(E, L > kappa); where L <= kappa each outcome has
    P_D(x) <= e^kappa P_-A(x), so the first term is at most e^kappa P_-A(E). This is the tail form of
    near access-freeness (arXiv 2302.10870). The tail is taken under P_D; under P_-A it would be false.
T3, a log-linear fit of emission in copies, length and context (after arXiv 2202.07646) with a
    split-conformal upper limit. It describes measurements of one kind of item; it derives nothing.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binomtest
from transformers import PreTrainedTokenizerBase, set_seed

from tracealign_lib.errors import ParameterError, VocabularyError
from tracealign_lib.index import TraceIndex
from tracealign_lib.lm import LanguageModel
from tracealign_lib.progress import progress
from tracealign_lib.stats import Interval
from tracealign_lib.world import Item

KAPPAS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)  # nats
MAX_STATES = 5_000_000

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


# --- an order-k add-alpha model ------------------------------------------------------------------


class NGramModel:
    """p(w | h) = (c(h, w) + alpha) / (c(h) + alpha V), where h are the `order` tokens before w.

    A document is read as if `order` start marks stood before it; no gram crosses two documents. A
    context shorter than `order` is taken to stand at the start of a document.

    Parameters
    ----------
    documents:
        Token ids, one sequence per document; with none, the model is uniform.
    vocab_size, order, alpha:
        V >= 2, k >= 0, and the pseudo-count alpha > 0 of every token.
    across_documents:
        Count over the documents as one stream, as packed training does. It breaks T1's assumption
        that a planted copy adds only its own grams.

    Raises
    ------
    ParameterError
        A setting is out of range, or the grams do not fit into 63 bits.
    VocabularyError
        A token lies outside the vocabulary.
    """

    def __init__(
        self,
        documents: Sequence[ArrayLike],
        *,
        vocab_size: int,
        order: int,
        alpha: float,
        across_documents: bool = False,
    ) -> None:
        self.vocab_size = _integer(vocab_size, "vocab_size", at_least=2)
        self.order = _integer(order, "order", at_least=0)
        self.alpha = _positive(alpha, "alpha, the pseudo-count,")
        self._base = self.vocab_size + 1  # the last digit is the start mark
        if (self.order + 1) * math.log2(self._base) >= 63:
            raise ParameterError(
                "Grams of this order do not fit into 63 bits.",
                given=f"order={self.order}, vocab_size={self.vocab_size}",
                expected=f"order of at most {int(63 / math.log2(self._base)) - 1} for this vocabulary",
                mend="lower the order",
            )
        texts = [_ids(ids, self.vocab_size, "document") for ids in documents]
        texts = [np.concatenate(texts)] if across_documents and texts else texts
        marks: Ids = np.full(self.order, self.vocab_size, dtype=np.int64)
        stream = np.concatenate([part for ids in texts for part in (marks, ids)] or [marks])
        keys = self._keys(stream) if len(stream) > self.order else np.empty(0, dtype=np.int64)
        keys = keys[keys % self._base != self.vocab_size]  # a start mark is never predicted
        self._grams, self._gram_counts = np.unique(keys, return_counts=True)
        self._contexts, self._context_counts = np.unique(keys // self._base, return_counts=True)
        self._cumulative = np.concatenate([[0], np.cumsum(self._gram_counts)])

    def gram_counts(self, span: ArrayLike, context: ArrayLike = ()) -> Ids:
        """c(h_j, t_j): how often each gram of the span was counted.  # (l,)"""
        rows = _rows(_ids(span, self.vocab_size, "span")[None], self.vocab_size)
        return _look_up(self._grams, self._gram_counts, self._span_keys(rows, context)[0])

    def token_log_probs(
        self, spans: ArrayLike, context: ArrayLike = (), *, temperature: float = 1.0
    ) -> Floats:
        """log p(t_j | context, t_1 .. t_(j-1)) in nats for every span.  # (n, l) -> (n, l)

        A `temperature` other than 1 renormalises p^(1 / temperature) over the vocabulary.
        """
        temperature = _positive(temperature, "temperature")
        rows = _rows(spans, self.vocab_size)
        keys = self._span_keys(rows, context)  # (n, l)
        if temperature == 1.0:
            return self._log_probs(keys)
        everything = np.arange(self.vocab_size) + (keys - rows)[..., None]  # (n, l, V)
        logits = self._log_probs(everything) / temperature
        chosen = np.take_along_axis(logits, rows[..., None], axis=-1)[..., 0]
        return np.asarray(chosen - np.logaddexp.reduce(logits, axis=-1), dtype=np.float64)

    def span_log_prob(self, span: ArrayLike, context: ArrayLike = (), *, temperature: float = 1.0) -> float:
        """log P(span | context) in nats, exactly; `ParameterError` for an empty span."""
        ids = _ids(span, self.vocab_size, "span")
        return float(self.token_log_probs(ids[None], context, temperature=temperature).sum())

    def sample(self, n: int, steps: int, context: ArrayLike = (), *, seed: int = 0) -> Ids:
        """`n` independent continuations of `steps` tokens.  # (n, steps)

        Each token is drawn from the counts with probability c(h) / (c(h) + alpha V), else uniformly.
        """
        n, steps = _integer(n, "n", at_least=1), _integer(steps, "steps", at_least=1)
        rng = np.random.default_rng(seed)
        drawn = np.empty((n, steps), dtype=np.int64)
        keep = self._base ** max(self.order - 1, 0)
        start = int(_digits(self._context(context)[None], self._base)[0])
        state = np.full(n, start, dtype=np.int64)
        for step in range(steps):
            counts = _look_up(self._contexts, self._context_counts, state)  # (n,)
            ticket = rng.random(n) * (counts + self.alpha * self.vocab_size)
            first = self._cumulative[np.searchsorted(self._grams, state * self._base)]
            place = np.searchsorted(self._cumulative, first + np.floor(ticket), side="right") - 1
            tokens = rng.integers(self.vocab_size, size=n)
            counted = ticket < counts
            tokens[counted] = self._grams[place[counted]] % self._base
            drawn[:, step] = tokens
            state = (state % keep) * self._base + tokens if self.order else state
        return drawn

    def expected_windows(self, spans: ArrayLike, steps: int, context: ArrayLike = ()) -> Floats:
        """Expected number of times each span occurs in `steps` sampled tokens, exactly.  # (R,)

        With l >= k, P(span at i) = P(the k tokens from i on are t_1 .. t_k) P(t_(k+1) .. t_l | those);
        the first factor is carried forward over all contexts. Sum the result for T0.

        Raises
        ------
        ParameterError
            The spans are shorter than the order or longer than `steps`, or the contexts too many.
        """
        rows = _rows(spans, self.vocab_size)
        length, steps = rows.shape[1], _integer(steps, "steps", at_least=1)
        states = self._base**self.order
        if not self.order <= length <= steps or states > MAX_STATES:
            raise ParameterError(
                "Expected windows cannot be computed exactly.",
                given=f"spans of {length} tokens, {steps} steps, order {self.order}, {states} contexts",
                expected=f"order <= length <= steps, and at most {MAX_STATES} contexts",
                mend="lower the order, or count windows in samples",
            )
        counts = _look_up(self._contexts, self._context_counts, np.arange(states))
        weight: Floats = np.asarray(
            1.0 / (counts + self.alpha * self.vocab_size), dtype=np.float64
        )  # (states,)
        present: Floats = np.zeros(states, dtype=np.float64)
        present[_digits(self._context(context)[None], self._base)] = 1.0
        total: Floats = np.zeros(states)
        for step in range(steps - length + self.order + 1):
            if step >= self.order:
                total += present
            present = self._advance(present, weight)
        heads = total[_digits(rows[:, : self.order], self._base)]  # (R,)
        tails: Floats = np.zeros(len(rows))
        if length > self.order:
            tails = self._log_probs(self._keys(rows)).sum(axis=1)
        return np.asarray(heads * np.exp(tails), dtype=np.float64)

    def _advance(self, present: Floats, weight: Floats) -> Floats:
        """Distribution over contexts after one more token."""
        if self.order == 0:
            return present
        scaled = present * weight
        counted = scaled[self._grams // self._base] * self._gram_counts
        after = np.bincount(self._grams % len(present), weights=counted, minlength=len(present))
        smoothed = self.alpha * scaled.reshape(self._base, -1).sum(axis=0)  # (states / base,)
        after.reshape(-1, self._base)[:, : self.vocab_size] += smoothed[:, None]
        return np.asarray(after, dtype=np.float64)

    def _log_probs(self, keys: Ids) -> Floats:
        grams = _look_up(self._grams, self._gram_counts, keys)
        contexts = _look_up(self._contexts, self._context_counts, keys // self._base)
        return np.asarray(
            np.log(grams + self.alpha) - np.log(contexts + self.alpha * self.vocab_size), dtype=np.float64
        )

    def _context(self, context: ArrayLike) -> Ids:
        """The last `order` tokens, start marks where there are fewer.  # (order,)"""
        ids = _ids(context, self.vocab_size, "context")
        marks: Ids = np.full(self.order, self.vocab_size, dtype=np.int64)
        return np.concatenate([marks, ids])[len(ids) :]

    def _span_keys(self, rows: Ids, context: ArrayLike) -> Ids:
        before = np.broadcast_to(self._context(context), (len(rows), self.order))
        return self._keys(np.concatenate([before, rows], axis=1))

    def _keys(self, stream: Ids) -> Ids:
        """Every window of `order` + 1 tokens as one integer.  # (..., T) -> (..., T - order)"""
        return _digits(sliding_window_view(stream, self.order + 1, axis=-1), self._base)


def _digits(windows: NDArray[Any], base: int) -> Ids:
    """Each row read as a number in `base`, its last entry the units.  # (..., d) -> (...)"""
    powers = base ** np.arange(windows.shape[-1] - 1, -1, -1, dtype=np.int64)
    return np.asarray(windows @ powers, dtype=np.int64)


def _look_up(keys: Ids, counts: Ids, wanted: Ids) -> Ids:
    """The count of each wanted key, 0 where it is not among the sorted keys."""
    if not len(keys):
        return np.zeros(wanted.shape, dtype=np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, counts[places], 0)


# --- T0: the union bound -------------------------------------------------------------------------


def union_bound(expected_windows: ArrayLike) -> float:
    """T0: min(1, sum of the expected numbers of risky windows)."""
    values = np.asarray(expected_windows, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ParameterError(
            "An expected number of windows is not a number of 0 or more.",
            given=values.tolist(),
            expected="finite numbers of 0 or more",
            mend="pass what NGramModel.expected_windows returned, or mean counts",
        )
    return min(1.0, float(values.sum()))


def risky_windows(
    index: TraceIndex, ids: ArrayLike, *, length: int, threshold: float, max_count: int | None = None
) -> NDArray[np.bool_]:
    """Which windows of each text occur in the indexed corpus and have BCI above tau.

    Parameters
    ----------
    ids:
        Token ids, one text a row.  # (n, T)
    length, threshold, max_count:
        Window length (tokens), tau (nats), and the largest match count that still counts as risky.

    Returns
    -------
    NDArray[np.bool_]
        True at (i, s) where window [s, s + length) of text i is risky.  # (n, T - length + 1)
    """
    length, rows = _integer(length, "length", at_least=1), _rows(ids, index.vocab_size)
    if not math.isfinite(threshold):
        raise ParameterError(
            "The threshold is not finite.", given=threshold, expected="nats, such as 20.0", mend="correct it"
        )
    if length > rows.shape[1]:
        return np.zeros((len(rows), 0), dtype=np.bool_)
    score = sliding_window_view(index.surprisal[rows], length, axis=1).sum(axis=-1)
    matched = np.zeros(score.shape, dtype=np.bool_)
    for i, row in enumerate(rows):
        for span in index.spans(row, min_length=length):
            matched[i, span.start : span.end - length + 1] = True
    risky = np.asarray(matched & (score > threshold), dtype=np.bool_)
    if max_count is not None:
        for i, start in np.argwhere(risky):
            risky[i, start] = index.count(rows[i, start : start + length]) <= max_count
    return risky


# --- T1: planting --------------------------------------------------------------------------------


class Planting(NamedTuple):
    """One case of T1, all in nats.

    Attributes
    ----------
    span, context, match_count:
        What was planted, after which tokens, and in how many documents.
    repetition:
        r: how often one planted copy holds the span's most repeated gram.
    before, after:
        log P(span | context) without and with the planted documents, exact.
    stated, corrected:
        log of the factor (1 + m / alpha)^l, and of prod_j (1 + a_j / alpha).
    """

    span: tuple[int, ...]
    context: tuple[int, ...]
    match_count: int
    repetition: int
    before: float
    after: float
    stated: float
    corrected: float

    @property
    def growth(self) -> float:
        """log of the factor by which planting multiplied the span's probability."""
        return self.after - self.before

    @property
    def stated_fails(self) -> bool:
        """Whether the probability grew by more than (1 + m / alpha)^l."""
        return self.growth > self.stated + 1e-9

    @property
    def corrected_fails(self) -> bool:
        """Whether the probability grew by more than prod_j (1 + a_j / alpha); never, if T1 is right."""
        return self.growth > self.corrected + 1e-9


def log_multiplier(match_count: int, length: int, alpha: float, *, repetition: int = 1) -> float:
    """log (1 + r m / alpha)^l in nats: T1 in match count and length.

    `repetition` is r, the largest number of times that one planted copy holds one gram (context and
    token) of the span; 1 gives the form that is usually stated.
    """
    match_count = _integer(match_count, "match_count", at_least=0)
    length, repetition = (
        _integer(length, "length", at_least=1),
        _integer(repetition, "repetition", at_least=1),
    )
    return length * math.log1p(repetition * match_count / _positive(alpha, "alpha, the pseudo-count,"))


def gram_log_multiplier(added: ArrayLike, alpha: float) -> float:
    """log prod_j (1 + a_j / alpha) in nats: T1 for known added counts a_j >= 0.  # (l,)"""
    counts = np.asarray(added)
    if counts.ndim != 1 or not counts.size or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise ParameterError(
            "Added counts are not counts.",
            given=repr(added)[:80],
            expected="one integer of 0 or more for every token of the span",
            mend="pass what added_counts returned",
        )
    return float(np.log1p(counts / _positive(alpha, "alpha, the pseudo-count,")).sum())


def added_counts(
    planted: Sequence[ArrayLike], span: ArrayLike, context: ArrayLike = (), *, vocab_size: int, order: int
) -> Ids:
    """a_j: how often the planted documents hold the j-th gram of the span.  # (l,)"""
    model = NGramModel(planted, vocab_size=vocab_size, order=order, alpha=1.0)
    return model.gram_counts(span, context)


def plant(
    base: Sequence[ArrayLike],
    document: ArrayLike,
    match_count: int,
    span: ArrayLike,
    context: ArrayLike = (),
    *,
    vocab_size: int,
    order: int,
    alpha: float,
) -> Planting:
    """Plant `document`, which holds `span` after `context`, `match_count` times; measure T1 exactly."""
    copies = [document] * _integer(match_count, "match_count", at_least=0)
    settings: dict[str, Any] = {"vocab_size": vocab_size, "order": order, "alpha": alpha}
    before = NGramModel(base, **settings).span_log_prob(span, context)
    after = NGramModel([*base, *copies], **settings).span_log_prob(span, context)
    once = added_counts([document], span, context, vocab_size=vocab_size, order=order)
    return Planting(
        tuple(np.asarray(span).tolist()),
        tuple(np.asarray(context).tolist()),
        match_count,
        int(once.max()),
        before,
        after,
        log_multiplier(match_count, len(once), alpha),
        gram_log_multiplier(once * match_count, alpha),
    )


def enumerate_planting(
    base: Sequence[ArrayLike],
    match_count: int,
    *,
    length: int,
    vocab_size: int = 3,
    order: int = 1,
    alpha: float = 1.0,
) -> list[Planting]:
    """T1 for every span of `length` tokens after every context of `order` tokens.

    The planted document is the context followed by the span: V^(order + length) cases.
    """
    tokens = range(_integer(vocab_size, "vocab_size", at_least=2))
    texts = itertools.product(tokens, repeat=order + _integer(length, "length", at_least=1))
    settings: dict[str, Any] = {"vocab_size": vocab_size, "order": order, "alpha": alpha}
    return [plant(base, text, match_count, text[order:], text[:order], **settings) for text in texts]


def context_gain(log_prob_without: float, bci: float) -> float:
    """log P_-A(span | h) + BCI(span) in nats: how much better than unigrams the model already knew it.

    This is the quantity that the corollary of T1 needs bounded, and that neither M, l nor tau knows.
    """
    return log_prob_without + bci


def drift_bound(
    match_count: int,
    length: int,
    threshold: float,
    *,
    alpha: float,
    repetition: int = 1,
    gain: float = 0.0,
    windows: int = 1,
) -> float:
    """f(M, l, tau) = min(1, n (1 + r M / alpha)^l exp(gain - tau)): T0 with the corollary of T1.

    Parameters
    ----------
    match_count, length, threshold:
        Largest M and l, and tau (nats), over the risky windows.
    alpha, repetition, gain:
        Pseudo-count; r of `log_multiplier`; an upper limit on `context_gain` (nats).
    windows:
        n: pairs of a position and a risky span that may stand there.
    """
    windows = _integer(windows, "windows", at_least=1)
    if not math.isfinite(threshold) or not math.isfinite(gain):
        raise ParameterError(
            "Threshold and gain are not finite.",
            given=f"threshold={threshold}, gain={gain}",
            expected="numbers of nats",
            mend="correct them",
        )
    growth = log_multiplier(match_count, length, alpha, repetition=repetition)
    return math.exp(min(0.0, math.log(windows) + growth + gain - threshold))


# --- T2: two models, one sampler -----------------------------------------------------------------


class Certificate(NamedTuple):
    """An upper limit on P_D(E) that holds with probability at least 1 - delta.

    Attributes
    ----------
    bound:
        The least of `bounds`, at most 1.
    kappa:
        Where it stands on the grid (nats).
    event_limit, tail_limits:
        Upper limits of P_-A(E), and of P_D(L > kappa) for each kappa.  # (grid,)
    bounds:
        exp(kappa) event_limit + tail_limits.  # (grid,)
    floor:
        The tail limit when no sample exceeds kappa: no bound from these samples can be lower.
    """

    bound: float
    kappa: float
    event_limit: float
    tail_limits: tuple[float, ...]
    bounds: tuple[float, ...]
    floor: float


def clopper_pearson_upper(hits: ArrayLike, n: int, delta: float) -> Floats:
    """One-sided upper limit of a probability at confidence 1 - delta; 1 where every trial hit.

    References
    ----------
    Clopper and Pearson, "The use of confidence or fiducial limits", Biometrika 26 (1934).
    """
    n, delta = _integer(n, "n", at_least=1), _share(delta, "delta")
    counts = np.asarray(hits)
    if counts.dtype.kind not in "iu" or (counts.size and (counts.min() < 0 or counts.max() > n)):
        raise ParameterError(
            "Hits are not counts.",
            given=f"hits={hits!r}, n={n}",
            expected="integers with 0 <= hits <= n",
            mend="count the trials in which the event happened",
        )
    limits = beta.ppf(1.0 - delta, counts + 1.0, np.maximum(n - counts, 1))
    return np.asarray(np.where(counts == n, 1.0, limits), dtype=np.float64)


def samples_needed(precision: float, delta: float, *, limits: int = 1) -> int:
    """Fewest samples whose Clopper-Pearson upper limit without any hit is at most `precision`.

    `limits` is the number of limits that share delta (Bonferroni): n >= log(delta / limits) /
    log(1 - precision).
    """
    precision, delta = _share(precision, "precision"), _share(delta, "delta")
    limits = _integer(limits, "limits", at_least=1)
    return math.ceil(math.log(delta / limits) / math.log1p(-precision) - 1e-9)


def certify(
    log_ratios: ArrayLike,
    event: float | tuple[int, int],
    *,
    kappas: Sequence[float] = KAPPAS,
    delta: float = 0.05,
    precision: float | None = None,
) -> Certificate:
    """T2 with confidence limits: P_D(E) <= min over kappa of e^kappa P_-A(E) + P_D(L > kappa).

    Each limit gets delta / (number of limits), so choosing the best kappa afterwards is allowed,
    provided that the grid was fixed before the samples were seen.

    Parameters
    ----------
    log_ratios:
        L of samples drawn independently from P_D by the sampler that L belongs to.  # (n,)
    event:
        P_-A(E) where it is known exactly, else (hits, samples) of E under P_-A.
    kappas:
        The grid (nats).
    delta:
        Allowed probability that the limit is too low.
    precision:
        If given, the floor asked for.

    Raises
    ------
    ParameterError
        The grid is empty, delta not in (0, 1), there are no samples, or too few for `precision`.
    """
    ratios, grid = np.asarray(log_ratios, dtype=np.float64), np.asarray(kappas, dtype=np.float64)
    delta = _share(delta, "delta")
    _check_certificate(ratios, grid)
    known = not isinstance(event, tuple)
    limits = len(grid) + (not known)
    n = min(len(ratios), event[1]) if isinstance(event, tuple) else len(ratios)
    if precision is not None and n < (needed := samples_needed(precision, delta, limits=limits)):
        raise ParameterError(
            "There are too few samples for the asked guarantee.",
            given=f"{n} samples",
            expected=f"at least {needed} samples: {limits} limits share delta={delta:g}, floor {precision:g}",
            mend=f"draw {needed} samples, ask for less precision, or shorten the grid of kappa",
        )
    exceed = (ratios[:, None] > grid).sum(axis=0)  # (grid,)
    tails = clopper_pearson_upper(exceed, len(ratios), delta / limits)
    limit = _event_limit(event, delta / limits)
    with np.errstate(over="ignore"):
        bounds = np.exp(grid) * limit + tails if limit else tails
    best = int(np.argmin(bounds))
    return Certificate(
        min(1.0, float(bounds[best])),
        float(grid[best]),
        limit,
        tuple(tails.tolist()),
        tuple(bounds.tolist()),
        monte_carlo_floor(len(ratios), delta, limits=limits),
    )


def monte_carlo_floor(n: int, delta: float, *, limits: int = 1) -> float:
    """1 - (delta / limits)^(1 / n): the upper limit of a probability that n samples never hit."""
    n, limits = _integer(n, "n", at_least=1), _integer(limits, "limits", at_least=1)
    return -math.expm1(math.log(_share(delta, "delta") / limits) / n)


def _event_limit(event: float | tuple[int, int], delta: float) -> float:
    if isinstance(event, tuple):
        return float(clopper_pearson_upper(event[0], event[1], delta))
    if not 0 <= event <= 1:
        raise ParameterError(
            "The event's probability is out of range.",
            given=event,
            expected="a number from 0 to 1, or a tuple (hits, samples)",
            mend="pass exp of a log-probability",
        )
    return float(event)


def _check_certificate(ratios: Floats, grid: Floats) -> None:
    if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all():
        raise ParameterError(
            "The grid of kappa is empty or not finite.",
            given=repr(grid.tolist()),
            expected="at least one finite number of nats",
            mend="use the default grid, bound.KAPPAS",
        )
    if ratios.ndim != 1 or not len(ratios) or np.isnan(ratios).any():
        raise ParameterError(
            "There are no log-ratios, or one is undefined.",
            given=f"shape {ratios.shape}, {int(np.isnan(ratios).sum())} undefined",
            expected="one number per sample, at least 1 sample; samples_needed() says how many",
            mend="score each sample under both models",
        )


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
    n, steps = _integer(n, "n", at_least=1), _integer(steps, "steps", at_least=1)
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
            temperature=_positive(temperature, "temperature"),
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
    rows = _rows(completions, vocab_size)
    ended = _after_end(rows, model)
    distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
    scored: Floats = np.zeros(distinct.shape)
    for first in range(0, len(distinct), batch_size):
        tail = torch.from_numpy(distinct[first : first + batch_size]).to(model.device)  # (B, T)
        inputs = torch.cat([head.expand(len(tail), -1), tail], dim=1)
        logits = model.model(input_ids=inputs).logits[:, len(head) - 1 : -1].double()  # (B, T, V)
        chosen = (logits / _positive(temperature, "temperature")).log_softmax(-1).gather(-1, tail[..., None])
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
    longest = [_integer(length, "length", at_least=1) for length in lengths]
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


# --- checks of a bound ---------------------------------------------------------------------------


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
    promised = 1.0 - _share(delta, "delta")
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


# --- T3: a descriptive fit -----------------------------------------------------------------------


class EmissionFit(NamedTuple):
    """Emission as a linear function of log2 copies, log2 length and log2 context: a description.

    Attributes
    ----------
    intercept, per_doubling:
        Emission at one copy, one token and one context token; change for each doubling of the three.
    margin:
        What split-conformal calibration adds for the upper limit.
    alpha:
        Share of new items, exchangeable with the calibration items, whose emission may exceed it.
    fitted, calibrated:
        Clusters used for the line and for the margin.
    """

    intercept: float
    per_doubling: tuple[float, float, float]
    margin: float
    alpha: float
    fitted: int
    calibrated: int

    def line(self, copies: ArrayLike, lengths: ArrayLike, contexts: ArrayLike) -> Floats:
        """The fitted emission, not cut at 0 or 1.  # (n,)"""
        line = _features(copies, lengths, contexts) @ np.array([self.intercept, *self.per_doubling])
        return np.asarray(line, dtype=np.float64)

    def upper(self, copies: ArrayLike, lengths: ArrayLike, contexts: ArrayLike) -> Floats:
        """The upper limit, cut to [0, 1].  # (n,)"""
        return np.clip(self.line(copies, lengths, contexts) + self.margin, 0.0, 1.0)


def fit_emission(
    copies: ArrayLike,
    lengths: ArrayLike,
    contexts: ArrayLike,
    emission: ArrayLike,
    clusters: Sequence[Any],
    *,
    alpha: float = 0.1,
    seed: int = 0,
) -> EmissionFit:
    """Fit on half of the clusters, calibrate the upper limit on the other half.

    One cluster's conformity score is the largest excess over the line among its rows, so the limit
    holds for all rows of a new, exchangeable cluster at once with probability at least 1 - alpha.
    Nothing follows for other corpora, copies beyond those seen, or another model.

    Parameters
    ----------
    copies, lengths, contexts:
        Numbers of at least 1: copies, span tokens, and tokens of context in the prompt.  # (n,)
    emission:
        Share or probability of emission, from 0 to 1.  # (n,)
    clusters:
        What each row belongs to, usually a planted item.  # (n,)

    Raises
    ------
    ParameterError
        A number is out of range, or there are too few clusters: the calibration half needs at least
        (1 - alpha) / alpha of them.

    References
    ----------
    Carlini et al., arXiv 2202.07646, for the log-linear shape; Lei et al., "Distribution-free
    predictive inference for regression", JASA 113 (2018), for split-conformal limits.
    """
    alpha = _share(alpha, "alpha")
    features = _features(copies, lengths, contexts)  # (n, 4)
    shares, codes = _emissions(emission, clusters, len(features))
    names = np.unique(codes)
    needed = math.ceil((1 - alpha) / alpha - 1e-9)
    if len(names) < 2 * max(needed, 2):
        raise ParameterError(
            "There are too few clusters for the asked guarantee.",
            given=f"{len(names)} clusters, half of them for calibration",
            expected=f"at least {2 * max(needed, 2)} clusters for alpha={alpha:g}",
            mend="measure more items, or ask for a larger alpha",
        )
    shuffled = np.random.default_rng(seed).permutation(names)
    held = shuffled[: len(names) // 2]
    fitting = ~np.isin(codes, held)
    weights, *_ = np.linalg.lstsq(features[fitting], shares[fitting], rcond=None)
    excess = pd.Series((shares - features @ weights)[~fitting]).groupby(codes[~fitting]).max().to_numpy()
    rank = math.ceil((len(excess) + 1) * (1 - alpha) - 1e-9)  # 1 .. len(excess)
    margin = float(np.sort(excess)[rank - 1])
    slopes = (float(weights[1]), float(weights[2]), float(weights[3]))
    return EmissionFit(float(weights[0]), slopes, margin, alpha, len(names) - len(held), len(held))


def _features(copies: ArrayLike, lengths: ArrayLike, contexts: ArrayLike) -> Floats:
    columns = [np.atleast_1d(np.asarray(c, dtype=np.float64)) for c in (copies, lengths, contexts)]
    table = np.stack(np.broadcast_arrays(*columns), axis=1)  # (n, 3)
    if table.ndim != 2 or not len(table) or not np.isfinite(table).all() or table.min() < 1:
        raise ParameterError(
            "Copies, lengths and contexts are not numbers of at least 1.",
            given=f"shape {table.shape}, smallest {table.min() if table.size else None}",
            expected="finite numbers of at least 1, one of each per row",
            mend="leave out items that were never planted: their logarithm is undefined",
        )
    return np.column_stack([np.ones(len(table)), np.log2(table)])


def _emissions(emission: ArrayLike, clusters: Sequence[Any], n: int) -> tuple[Floats, Ids]:
    shares = np.asarray(emission, dtype=np.float64)
    codes, _ = pd.factorize(pd.Series(list(clusters), dtype=object))
    if shares.shape != (n,) or len(codes) != n or (codes < 0).any():
        raise ParameterError(
            "Emissions, clusters and predictors do not pair up.",
            given=f"{n} rows, emissions of shape {shares.shape}, {len(codes)} cluster labels",
            expected="one emission and one cluster label per row",
            mend="pass sequences of one and the same length",
        )
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ParameterError(
            "An emission is no share.",
            given=f"from {shares.min()} to {shares.max()}",
            expected="numbers from 0 to 1",
            mend="pass probabilities, not log-probabilities",
        )
    return shares, codes.astype(np.int64)


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
    planted = [[0, 1], [2, other]] * _integer(match_count, "match_count", at_least=1)
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
    broken = -math.expm1(_integer(queries, "queries", at_least=1) * math.log1p(-kept))
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


# --- checks of input -----------------------------------------------------------------------------


def _integer(value: Any, name: str, *, at_least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = at_least - 1
    if isinstance(value, bool) or number < at_least:
        raise ParameterError(
            f"{name} is out of range.",
            given=repr(value),
            expected=f"an integer of at least {at_least}",
            mend=f"choose another {name}",
        )
    return number


def _positive(value: float, name: str) -> float:
    if not (isinstance(value, int | float | np.floating) and 0 < value < math.inf):
        raise ParameterError(
            f"{name} is not positive.", given=repr(value), expected="a finite number above 0", mend="raise it"
        )
    return float(value)


def _share(value: float, name: str) -> float:
    if not (isinstance(value, int | float | np.floating) and 0 < value < 1):
        raise ParameterError(
            f"{name} is not in (0, 1).",
            given=repr(value),
            expected="a number between 0 and 1, for example 0.05",
            mend="write 5 % as 0.05",
        )
    return float(value)


def _ids(ids: ArrayLike, vocab_size: int, what: str) -> Ids:
    """`ids` as (n,) int64 after checking shape, type and range; may be empty."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise VocabularyError(
            f"The {what} is not a sequence of token ids.",
            given=f"shape {array.shape}, dtype {array.dtype}",
            expected="a one-dimensional sequence of integers",
            mend="pass token ids",
        )
    return _in_vocabulary(array, vocab_size, what)


def _rows(ids: ArrayLike, vocab_size: int) -> Ids:
    """`ids` as (n, T) int64 after the same checks; n and T at least 1."""
    array = np.asarray(ids)
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        raise ParameterError(
            "Spans are not a table of token ids.",
            given=f"shape {array.shape}, dtype {array.dtype}",
            expected="integers of shape (n, T), n and T at least 1",
            mend="pass spans of one length together",
        )
    return _in_vocabulary(array, vocab_size, "table of spans")


def _in_vocabulary(array: NDArray[Any], vocab_size: int, what: str) -> Ids:
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise VocabularyError(
            f"The {what} has an id outside the vocabulary.",
            given=f"ids from {array.min()} to {array.max()}",
            expected=f"ids from 0 to {vocab_size - 1}",
            mend="encode with the tokenizer of this model",
        )
    return array.astype(np.int64)
