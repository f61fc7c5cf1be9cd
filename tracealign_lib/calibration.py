"""Thresholds that keep a promise about false refusals, from finitely many benign scores.

A filter refuses a text whose score is *above* its threshold. Where the threshold is an order statistic of
n benign scores, what becomes of the next benign text can be said exactly, whatever the distribution of
scores is. Two promises are offered:

marginal (split conformal)
    E[false-refusal rate] <= alpha. On average over calibrations; a single one may do worse. The rank is
    k = ceil((n + 1)(1 - alpha)).
high probability (the Neyman-Pearson umbrella)
    P(false-refusal rate > alpha) <= delta. Nearly every calibration keeps to alpha. The rank is the
    smallest k with P(Binomial(n, 1 - alpha) >= k) <= delta.

Both need benign scores that are exchangeable (for the second: independent and alike) with those of later
benign texts. Ten completions about one item are not ten draws: pass one of them. Ties only make the
filter refuse less, so nothing is randomised. A text without a span has the score minus infinity and
counts like any other. And where later texts come from elsewhere, neither promise holds.

References
----------
Vovk, Gammerman and Shafer, *Algorithmic Learning in a Random World* (2005), for conformal prediction and
its form by group (Mondrian); Tong, Feng and Li, "Neyman-Pearson classification algorithms and NP receiver
operating characteristics", Science Advances 4 (2018), doi:10.1126/sciadv.aao1659, for the umbrella.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from tracealign_lib.errors import ParameterError
from tracealign_lib.stats import Interval, clustered_rate, wilson

Scores = NDArray[np.float64]

EVERY_SPAN = -sys.float_info.max
"""The lowest threshold: above it is every finite score, so every text with a span is refused."""
# A probability that equals delta on paper may come out a last bit larger.
_ROUNDING = 1 + 1e-9


def calibration_rank(n: int, *, alpha: float, delta: float | None = None) -> int:
    """Which of n benign scores, in rising order and counted from 1, is the threshold.

    Parameters
    ----------
    alpha:
        Largest false-refusal rate, between 0 and 1.
    delta:
        None for the marginal promise; else the largest probability that the rate exceeds alpha.

    Raises
    ------
    ParameterError
        alpha or delta is not between 0 and 1, or n is too small for any rank to do; the message says how
        many scores are needed.
    """
    needed = scores_needed(alpha=alpha, delta=delta)
    if n < needed:
        level = f"alpha={alpha:g}" + ("" if delta is None else f", delta={delta:g}")
        raise ParameterError(
            "Too few benign scores for this promise.",
            given=f"{n} for {level}",
            expected=f"at least {needed}",
            mend="score more benign completions, or promise less: raise alpha or delta",
        )
    if delta is None:
        return math.ceil((n + 1) * (1 - _exact(alpha)))
    tail = binom.sf(np.arange(n), n, 1 - alpha)  # (n,) P(X >= k) for k = 1 ... n, falling
    return 1 + int((tail > delta * _ROUNDING).sum())


def scores_needed(*, alpha: float, delta: float | None = None) -> int:
    """The fewest benign scores from which the promise can be kept.

    1 / alpha - 1 for the marginal one, log(delta) / log(1 - alpha) for the other, both rounded up.

    Raises
    ------
    ParameterError
        alpha or delta is not between 0 and 1.
    """
    _check_level(alpha, "alpha")
    if delta is None:
        return math.ceil(1 / _exact(alpha)) - 1
    _check_level(delta, "delta")
    return math.ceil(round(math.log(delta) / math.log1p(-alpha), 9))


def calibrated_threshold(scores: ArrayLike, *, alpha: float, delta: float | None = None) -> float:
    """The threshold that keeps the promise for texts like those that were scored.

    Parameters
    ----------
    scores:
        Of benign texts, one per independent draw; minus infinity where no span was found.  # (n,)
    alpha, delta:
        See `calibration_rank`.

    Returns
    -------
    float
        In the unit of the scores, and finite: `EVERY_SPAN` where the order statistic is minus infinity.

    Raises
    ------
    ParameterError
        A level is out of range, a score is NaN or plus infinity, or there are too few.
    """
    values = _check_scores(scores)
    rank = calibration_rank(len(values), alpha=alpha, delta=delta)
    return max(float(np.sort(values)[rank - 1]), EVERY_SPAN)


def group_thresholds(
    scores: ArrayLike, groups: Sequence[Hashable], *, alpha: float, delta: float | None = None
) -> dict[Hashable, float]:
    """`calibrated_threshold` of each group on its own, in order of first appearance.

    A promise for all texts together may be kept at the cost of one kind of them. These are kept for each
    group. With a `delta`, it is spent on each group, not shared among them.

    Parameters
    ----------
    groups:
        One label for each score, never None or NaN.  # (n,)

    Raises
    ------
    ParameterError
        As `calibrated_threshold`, naming the group; labels are missing, or not as many as scores.
    """
    values = _check_scores(scores)
    members = _members(groups, len(values))
    thresholds = {}
    for group, positions in members.items():
        try:
            thresholds[group] = calibrated_threshold(values[positions], alpha=alpha, delta=delta)
        except ParameterError as error:
            raise ParameterError(
                error.problem,
                given=f"{error.given} in group {group!r}",
                expected=error.expected,
                mend=error.mend,
            ) from error
    return thresholds


# --- is the promise kept? ------------------------------------------------------------------------


class Simulation(NamedTuple):
    """Many calibrations on fresh draws, and what each one does to later texts.

    Attributes
    ----------
    rates:
        The realised false-refusal rate of each calibration.  # (repeats,)
    mean:
        Their mean, to hold against alpha; the interval is over calibrations.
    exceeded:
        Share of calibrations whose rate is above alpha, to hold against delta.
    """

    rates: Scores
    mean: Interval
    exceeded: Interval


def simulate_guarantee(
    pool: ArrayLike,
    *,
    n: int,
    alpha: float,
    delta: float | None = None,
    later: ArrayLike | None = None,
    rank: int | None = None,
    repeats: int = 1000,
    seed: int = 0,
) -> Simulation:
    """Repeat the calibration on n scores drawn from a pool, and measure the rates that follow.

    The pool stands for the distribution of benign scores: draws are with replacement, and the rate of
    a threshold is its exact rate on the pool.

    Parameters
    ----------
    pool:
        Benign scores, as for `calibrated_threshold`.  # (scores,)
    n:
        Scores in each calibration.
    later:
        Scores of the texts that come after the calibration; the pool itself by default. Texts of
        another kind show what is left of the promise when the distribution has shifted.  # (texts,)
    rank:
        Take this order statistic, counted from 1, and not that of `calibration_rank`: to see a wrong one
        fail.

    Raises
    ------
    ParameterError
        As `calibrated_threshold`, the rank is not one of n, or `repeats` is below 1.
    """
    source = _check_scores(pool)
    target = source if later is None else _check_scores(later)
    for name, values in (("pool", source), ("later", target)):
        if not len(values):
            raise ParameterError(
                "There are no scores to draw.", given=f"{name} is empty", mend="score some texts first"
            )
    if repeats < 1:
        raise ParameterError(
            "Nothing is repeated.", given=f"repeats={repeats!r}", expected="at least 1", mend="try 1000"
        )
    promised = calibration_rank(n, alpha=alpha, delta=delta)
    chosen = promised if rank is None else _check_rank(rank, n)
    drawn = np.random.default_rng(seed).choice(source, size=(repeats, n))
    thresholds = np.partition(drawn, chosen - 1, axis=1)[:, chosen - 1]  # (repeats,)
    refused = len(target) - np.searchsorted(np.sort(target), thresholds, side="right")  # (repeats,)
    above = int((refused > math.floor(_exact(alpha) * len(target))).sum())
    rates = refused / len(target)
    return Simulation(rates, clustered_rate(rates, range(repeats)), wilson(above, repeats))


# --- checks --------------------------------------------------------------------------------------


def _exact(level: float) -> Fraction:
    """The decimal that was written: 0.1 is a tenth, not the binary number next to it."""
    return Fraction(str(float(level)))


def _check_level(value: float, name: str) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 < value < 1:
        raise ParameterError(
            f"{name} is out of range.",
            given=f"{name}={value!r}",
            expected="a number between 0 and 1, both excluded",
            mend="write 5 % as 0.05",
        )


def _check_rank(rank: int, n: int) -> int:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= n:
        raise ParameterError(
            "There is no such order statistic.",
            given=f"rank={rank!r}",
            expected=f"an integer from 1 to {n}",
            mend="leave rank out for the one that keeps the promise",
        )
    return rank


def _check_scores(scores: ArrayLike) -> Scores:
    try:
        values = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.full(1, math.nan)
    wrong = np.isnan(values) | (values == math.inf)
    if values.ndim != 1 or wrong.any():
        raise ParameterError(
            "These are not scores of texts.",
            given=f"shape {np.shape(values)}, {int(wrong.sum())} NaN or plus infinity: {repr(scores)[:60]}",
            expected="one number per text; minus infinity for a text without a span",
            mend="take them from scores(texts) of the filter, and mend a scorer that returns NaN",
        )
    return values


def _members(groups: Sequence[Hashable], n: int) -> dict[Hashable, list[int]]:
    """Positions of each group's scores."""
    labels = list(groups)
    missing = sum(label is None or _is_nan(label) for label in labels)
    if len(labels) != n or missing or not n:
        raise ParameterError(
            "Groups and scores do not pair up.",
            given=f"{n} scores, {len(labels)} labels, {missing} of them missing",
            expected="at least one score, and a label for each",
            mend="leave groups out for one threshold, or label every score",
        )
    members: dict[Hashable, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(label, []).append(position)
    return members


def _is_nan(label: Any) -> bool:
    return isinstance(label, float) and math.isnan(label)
