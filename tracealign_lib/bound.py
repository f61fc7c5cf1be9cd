"""The drift bound: four statements, each with its assumptions; the proofs stand in chapter 5.

The paper's abstract announces an upper bound Pr[drift(q)] <= f(M(q), l_q, tau) from match counts and
span lengths; its closed form is not known to us, so the forms here are ours.

T0, union bound.
    Let a text drift only if it holds a risky window, and let W be the number of risky windows in it.
    Then P(drift) <= P(W >= 1) <= E[W].
T1, planting, for an order-k add-alpha model p(w | h) = (c(h, w) + alpha) / (c(h) + alpha V).
    Add documents to a corpus that count the j-th gram (context and token) of a span a_j more times.
    Then the span's probability grows at most by the factor prod_j (1 + a_j / alpha), and no smaller
    one holds for all corpora. The short form (1 + m / alpha)^l for m planted copies needs a_j <= m: no
    copy may hold a gram of the span twice. Without that it is false (`enumerate_planting` finds
    counterexamples); a copy that holds a gram r times needs (1 + r m / alpha)^l.
    Corollary: if A are all documents that hold the span, it scores BCI > tau, and P_-A(span | h) <=
    exp(gain - BCI) for every context h, then P_D(span | h) <= (1 + r M / alpha)^l exp(gain - tau), with
    r the most often that one document of A holds one gram; T0 adds this up over windows.
T2, any two models, one sampler.
    With L = log P_D(x) - log P_-A(x) of the sampled x, every event E and every kappa satisfy
    P_D(E) <= e^kappa P_-A(E) + P_D(L > kappa), the tail form of near access-freeness (arXiv
    2302.10870). The tail is taken under P_D; under P_-A the statement is false in general.
T3, a log-linear fit of emission in copies and context (after arXiv 2202.07646) and in length (our
    addition), with a split-conformal upper limit. It describes measurements of one kind of item; it
    derives nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from tracealign_lib.errors import ParameterError
from tracealign_lib.index import TraceIndex
from tracealign_lib.ngram import Floats, Ids, NGramModel, check_positive, check_rows
from tracealign_lib.queries import check_integer

KAPPAS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)  # nats
FIRST_TERMS = (0.003, 0.01, 0.03, 0.1, 0.3)  # probabilities


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
    length, rows = check_integer(length, "length", at_least=1), check_rows(ids, index.vocab_size)
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
    match_count = check_integer(match_count, "match_count", at_least=0)
    length, repetition = (
        check_integer(length, "length", at_least=1),
        check_integer(repetition, "repetition", at_least=1),
    )
    return length * math.log1p(repetition * match_count / check_positive(alpha, "alpha, the pseudo-count,"))


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
    return float(np.log1p(counts / check_positive(alpha, "alpha, the pseudo-count,")).sum())


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
    copies = [document] * check_integer(match_count, "match_count", at_least=0)
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
    tokens = range(check_integer(vocab_size, "vocab_size", at_least=2))
    texts = itertools.product(tokens, repeat=order + check_integer(length, "length", at_least=1))
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
    windows = check_integer(windows, "windows", at_least=1)
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
    """An upper limit on `P_D(E)` that holds with probability at least 1 - delta.

    Attributes
    ----------
    bound:
        The least of `bounds`, at most 1.
    kappa:
        Where it stands on the grid (nats).
    event_limit:
        Upper limit of `P_-A(E)`.
    tail_limits:
        Upper limits of `P_D(L > kappa)` for each kappa.  # (grid,)
    bounds:
        `exp(kappa) event_limit + tail_limits`.  # (grid,)
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
    n, delta = check_integer(n, "n", at_least=1), check_share(delta, "delta")
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
    precision, delta = check_share(precision, "precision"), check_share(delta, "delta")
    limits = check_integer(limits, "limits", at_least=1)
    return math.ceil(math.log(delta / limits) / math.log1p(-precision) - 1e-9)


def certify(
    log_ratios: ArrayLike,
    event: float | tuple[int, int],
    *,
    kappas: Sequence[float] = KAPPAS,
    delta: float = 0.05,
    precision: float | None = None,
) -> Certificate:
    """T2 with confidence limits: `P_D(E) <= min over kappa of e^kappa P_-A(E) + P_D(L > kappa)`.

    Each limit gets delta / (number of limits), so choosing the best kappa afterwards is allowed,
    provided that the grid was fixed before the samples were seen.

    Parameters
    ----------
    log_ratios:
        L of samples drawn independently from `P_D` by the sampler that L belongs to.  # (n,)
    event:
        `P_-A(E)` where it is known exactly, else (hits, samples) of E under `P_-A`.
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
    delta = check_share(delta, "delta")
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


def kappas_for(event: float, first_terms: Sequence[float] = FIRST_TERMS) -> tuple[float, ...]:
    """The grid of kappa on which e^kappa P_-A(E) takes the values `first_terms`, but no kappa below 0.

    P_-A(E) must be known exactly: a grid that depends on it is fixed before any sample is drawn. Below
    kappa 0 the tail is at least 1 - e^kappa, so such values are replaced by 0. The grid is short
    because each value takes a share of delta; a value between two of these, or above the last, can
    be better.

    Raises
    ------
    ParameterError
        P_-A(E) is not in (0, 1], or a first term is not in (0, 1).
    """
    if not (isinstance(event, int | float | np.floating) and 0 < event <= 1):
        raise ParameterError(
            "The event's probability is out of range.",
            given=repr(event),
            expected="a number above 0, at most 1",
            mend="where the other model never says it, use the default grid, bound.KAPPAS",
        )
    return tuple(max(0.0, math.log(check_share(term, "first term") / event)) for term in first_terms)


def monte_carlo_floor(n: int, delta: float, *, limits: int = 1) -> float:
    """1 - (delta / limits)^(1 / n): the upper limit of a probability that n samples never hit."""
    n, limits = check_integer(n, "n", at_least=1), check_integer(limits, "limits", at_least=1)
    return -math.expm1(math.log(check_share(delta, "delta") / limits) / n)


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
    Carlini et al., arXiv 2202.07646, for the log-linear shape in copies and context (length is our
    addition); Lei et al., "Distribution-free
    predictive inference for regression", JASA 113 (2018), for split-conformal limits.
    """
    alpha = check_share(alpha, "alpha")
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


# --- checks of input -----------------------------------------------------------------------------


def check_share(value: float, name: str) -> float:
    """`value` as a float; `ParameterError` with its `name` unless it lies between 0 and 1."""
    if not (isinstance(value, int | float | np.floating) and 0 < value < 1):
        raise ParameterError(
            f"{name} is not in (0, 1).",
            given=repr(value),
            expected="a number between 0 and 1, for example 0.05",
            mend="write 5 % as 0.05",
        )
    return float(value)
