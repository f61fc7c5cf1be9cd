"""What a calibrated threshold promises, and what it realises: chapter 6's two ranks, simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, comb
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from tracealign_lib.calibration import calibration_rank, scores_needed, simulate_guarantee
from tracealign_lib.experiments.common import Headlines, short
from tracealign_lib.stats import Interval, clustered_rate, wilson

REALISED_TEXTS = 100
"""Texts in each calibration of `realised_values`."""
REALISED_ALPHAS = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
MEAN_RATE, ABOVE = "marginal: mean rate", "umbrella: share of calibrations above alpha"

# --- the ranks, as chapter 6 writes them ---------------------------------------------------------


def marginal_rank(n: int, alpha: float) -> int:
    """k = ceil((n + 1)(1 - alpha)), the order statistic of split conformal prediction."""
    return ceil(round((n + 1) * (1 - alpha), 9))


def tail(n: int, k: int, alpha: float) -> float:
    """P(Bin(n, 1 - alpha) >= k)."""
    p = 1 - alpha
    return sum(comb(n, i) * p**i * alpha ** (n - i) for i in range(k, n + 1))


def umbrella_rank(n: int, alpha: float, delta: float) -> int:
    """The smallest k whose `tail` is at most delta.

    Raises
    ------
    StopIteration
        n is too small for this promise; `calibration.calibration_rank` says by how much.
    """
    return next(k for k in range(1, n + 1) if tail(n, k, alpha) <= delta)


# --- simulations ---------------------------------------------------------------------------------


def needed_table(alphas: Sequence[float], deltas: Sequence[float]) -> pd.DataFrame:
    """The fewest benign texts for each promise: one row per alpha, "on average" and one column per delta."""
    rows = []
    for alpha in alphas:
        counts = [scores_needed(alpha=alpha), *(scores_needed(alpha=alpha, delta=delta) for delta in deltas)]
        rows.append((f"{alpha:g}", *counts))
    return pd.DataFrame(rows, columns=["alpha", "on average", *(f"delta = {delta:g}" for delta in deltas)])


def roc_rank(n: int, alpha: float) -> int:
    """The order statistic that an ROC curve suggests: no more than a share alpha of these n lies above it."""
    return n - int(np.floor(alpha * n + 1e-9))


def guarantee_frame(
    pool: ArrayLike, *, n: int, alpha: float, delta: float, repeats: int = 2000
) -> pd.DataFrame:
    """Three ways to read a threshold off n scores, each repeated on fresh draws from a pool.

    Columns: threshold (its name), rank, promise, rates (realised, one per repeat), mean, exceeded (share of
    calibrations above alpha); the last two with intervals.
    """
    marginal, umbrella = calibration_rank(n, alpha=alpha), calibration_rank(n, alpha=alpha, delta=delta)
    roc = roc_rank(n, alpha)
    ranks = {
        "ROC point": (roc, f"mean at most {(n + 1 - roc) / (n + 1):.3g}"),
        "marginal": (marginal, f"mean at most {alpha:g}"),
        "umbrella": (umbrella, f"above {alpha:g} in at most {delta:g}"),
    }
    rows = []
    for name, (rank, promise) in ranks.items():
        run = simulate_guarantee(pool, n=n, alpha=alpha, delta=delta, rank=rank, repeats=repeats)
        rows.append((name, rank, promise, run.rates, run.mean, run.exceeded))
    return pd.DataFrame(rows, columns=["threshold", "rank", "promise", "rates", "mean", "exceeded"])


def guarantee_table(frame: pd.DataFrame) -> pd.DataFrame:
    """`guarantee_frame` as a table for the page."""
    shown = frame.assign(mean=frame["mean"].map(_fine), exceeded=frame["exceeded"].map(short))
    names = {"mean": "mean rate", "exceeded": "calibrations above alpha"}
    return shown.drop(columns="rates").rename(columns=names)


def realised_frame(
    pool: ArrayLike, *, n: int, alphas: Sequence[float], delta: float, repeats: int = 2000
) -> pd.DataFrame:
    """What thresholds from n scores realise for each alpha, over calibrations repeated on fresh draws.

    Columns: alpha, mean (of the marginal threshold's rates), high (the 1 - delta quantile of the umbrella's).
    """
    rows = []
    for alpha in alphas:
        marginal = simulate_guarantee(pool, n=n, alpha=alpha, repeats=repeats)
        umbrella = simulate_guarantee(pool, n=n, alpha=alpha, delta=delta, repeats=repeats)
        # an observed rate: between two of them nothing is promised
        high = np.quantile(umbrella.rates, 1 - delta, method="inverted_cdf")
        rows.append((alpha, marginal.mean.estimate, float(high)))
    return pd.DataFrame(rows, columns=["alpha", "mean", "high"])


# --- over several worlds -------------------------------------------------------------------------


def realised_values(
    pools: Sequence[ArrayLike],
    *,
    alphas: Sequence[float] = REALISED_ALPHAS,
    delta: float,
    n: int = REALISED_TEXTS,
    repeats: int = 2000,
) -> Headlines:
    """What thresholds from n scores realise on the pools of several worlds, each calibrated `repeats` times.

    "realised | alpha | `MEAN_RATE`" and "realised | alpha | `ABOVE`", over all calibrations. The
    intervals are over calibrations, and say nothing of worlds that are not among these.
    """
    values: Headlines = {}
    for alpha in alphas:
        rates, above = [], 0
        for seed, pool in enumerate(pools):
            shared: dict[str, Any] = {"n": n, "alpha": alpha, "repeats": repeats, "seed": seed}
            rates.append(simulate_guarantee(pool, **shared).rates)
            above += round(repeats * simulate_guarantee(pool, delta=delta, **shared).exceeded.estimate)
        every = np.concatenate(rates)
        values[realised_name(alpha, MEAN_RATE)] = clustered_rate(every, range(len(every)))
        values[realised_name(alpha, ABOVE)] = wilson(above, len(every))
    return values


def realised_name(alpha: float, what: str) -> str:
    """The headline of a realised rate."""
    return f"realised | {alpha:g} | {what}"


def realised_table(
    here: Mapping[str, Interval], published: Mapping[str, Any], what: str, alphas: Sequence[float]
) -> pd.DataFrame:
    """One of `MEAN_RATE` and `ABOVE` by alpha: this run, the published worlds together, and each of them."""
    rows = []
    for alpha in alphas:
        name = realised_name(alpha, what)
        alone = ", ".join(f"{world[name].estimate:.3f}" for world in published["per seed"].values())
        rows.append((f"{alpha:g}", _fine(here[name]), _fine(published[name]), alone))
    return pd.DataFrame(rows, columns=["alpha", "this run", "published worlds", "each world"])


def _fine(interval: Interval) -> str:
    # rates of a tenth need a third decimal to be told from alpha
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
