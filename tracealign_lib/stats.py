"""Intervals for what the book measures: no number stands on a page without one.

Three situations occur. A *rate* counts successes among independent trials: Wilson's interval. A *mean
over prompts* is taken over values that are not independent, because many prompts ask for the same
planted item: the bootstrap draws whole items, with every prompt that belongs to them. And a *spread over
seeds*, where three worlds are too few for an interval: the range is shown, under its own name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from tracealign_lib.errors import ParameterError, ResultsError


class Interval(NamedTuple):
    """An estimate with its confidence interval.

    Attributes
    ----------
    estimate, low, high:
        In the unit of what was measured. NaN where undefined: all three when nothing was measured
        (`n` is 0), the bounds alone when there is no second cluster to estimate a spread from.
    n:
        Number of values (trials, prompts) behind the estimate.
    """

    estimate: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n == 0:
            return "undefined (n = 0)"
        if math.isnan(self.low):
            return f"{self.estimate:.2f} [no interval] (n = {self.n})"
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n})"

    def to_json(self) -> dict[str, float | int | None]:
        """A dictionary that `json.dumps` writes as strict JSON: NaN becomes null."""
        return _to_json(self._asdict())

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The interval that `to_json` wrote; `ResultsError` for a record of another shape."""
        return cls(**_from_json(record, numbers=("estimate", "low", "high"), count="n"))


class SeedSpread(NamedTuple):
    """Mean and range of one quantity over seeds: a description, not a confidence interval.

    Attributes
    ----------
    mean, minimum, maximum:
        Over the seeds, each seed weighing the same.
    seeds:
        Number of seeds.
    """

    mean: float
    minimum: float
    maximum: float
    seeds: int

    def __str__(self) -> str:
        noun = "seed" if self.seeds == 1 else "seeds"
        return f"{self.mean:.2f} ({self.minimum:.2f} to {self.maximum:.2f} over {self.seeds} {noun})"

    def to_json(self) -> dict[str, float | int | None]:
        """A dictionary that `json.dumps` writes as strict JSON."""
        return _to_json(self._asdict())

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The spread that `to_json` wrote; `ResultsError` for a record of another shape."""
        return cls(**_from_json(record, numbers=("mean", "minimum", "maximum"), count="seeds"))


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a rate of independent trials.

    Parameters
    ----------
    successes, n:
        Counts, 0 <= successes <= n and n >= 1.

    Raises
    ------
    ParameterError
        The counts are no counts, n is 0, or the confidence is not between 0 and 1.

    References
    ----------
    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    _check_confidence(confidence)
    try:
        k, trials = operator.index(successes), operator.index(n)
    except TypeError as error:
        raise _no_counts(successes, n) from error
    if trials < 1 or not 0 <= k <= trials:
        raise _no_counts(successes, n)
    bounds = binomtest(k, trials).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(k / trials, float(bounds.low), float(bounds.high), trials)


def clustered_bootstrap(
    values: Sequence[float] | np.ndarray[Any, Any],
    clusters: Sequence[Hashable],
    *,
    statistic: Literal["mean", "mean_of_clusters"] = "mean",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean, drawing whole clusters with replacement.

    The effective sample size is closer to the number of clusters than to `n`, so say both on the page.
    With few clusters (below about 15) percentile intervals are somewhat too narrow.

    Parameters
    ----------
    values:
        One finite number per observation, for example 1.0 for a prompt whose answer drifted.  # (n,)
    clusters:
        What each value belongs to, usually the id of a planted item; any hashable label.  # (n,)
    statistic:
        "mean" weighs every value the same, "mean_of_clusters" every cluster.

    Returns
    -------
    Interval
        `n` is the number of values. With a single cluster the bounds are NaN: one cluster says
        nothing about how clusters differ.

    Raises
    ------
    ParameterError
        No values, a value that is not finite, another number of labels, a missing label, or a
        setting out of range.

    References
    ----------
    Davison and Hinkley, *Bootstrap Methods and their Application* (1997), section 3.8; for why
    evaluations should cluster their errors, Miller, arXiv 2411.00640.
    """
    _check_confidence(confidence)
    _check_bootstrap(statistic, resamples)
    array, codes = _check_observations(values, clusters)  # (n,), (n,)
    sums: np.ndarray[Any, Any] = np.bincount(codes, weights=array)  # (clusters,)
    sizes: np.ndarray[Any, Any] = np.bincount(codes)  # (clusters,)
    if statistic == "mean_of_clusters":
        sums, sizes = sums / sizes, np.ones_like(sizes)
    estimate = float(sums.sum() / sizes.sum())
    if len(sizes) == 1:
        return Interval(estimate, math.nan, math.nan, len(array))
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sizes), size=(resamples, len(sizes)))  # (resamples, clusters)
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)  # (resamples,)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(estimate, float(low), float(high), len(array))


def clustered_rate(
    values: Sequence[float] | np.ndarray[Any, Any],
    clusters: Sequence[Hashable],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """`clustered_bootstrap` of values that lie between 0 and 1, such as outcomes that happened or did not.

    Where every value is 0, or every value is 1, no resample differs from another, and the bootstrap would
    claim certainty. The interval is then Wilson's, with the clusters as trials.
    """
    interval = clustered_bootstrap(values, clusters, confidence=confidence, seed=seed)
    trials = len(set(clusters))
    if interval.low == interval.high and interval.estimate in (0.0, 1.0):
        bounds = wilson(round(interval.estimate * trials), trials, confidence=confidence)
        return bounds._replace(n=interval.n)
    return interval


def over_seeds(values_by_seed: Mapping[int, float]) -> SeedSpread:
    """Mean, smallest and largest value over seeds.

    Parameters
    ----------
    values_by_seed:
        One finite number per seed, for example the drift rate of each world.

    Raises
    ------
    ParameterError
        There is no seed, or a value is not finite.
    """
    values = np.asarray(list(values_by_seed.values()), dtype=np.float64)  # (seeds,)
    if not len(values) or not np.isfinite(values).all():
        raise ParameterError(
            "There is no number for every seed.",
            given=dict(values_by_seed),
            expected="at least one seed, and a finite number for each",
            mend="run the missing seed, or leave it out and say so",
        )
    return SeedSpread(float(values.mean()), float(values.min()), float(values.max()), len(values))


def _check_observations(
    values: Sequence[float] | np.ndarray[Any, Any], clusters: Sequence[Hashable]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The values as float64 and each one's cluster number, in order of first appearance."""
    array = np.asarray(values, dtype=np.float64)  # (n,)
    if array.ndim != 1 or not len(array) or len(array) != len(clusters):
        raise ParameterError(
            "Values and clusters do not pair up.",
            given=f"values of shape {array.shape}, {len(clusters)} cluster labels",
            expected="two sequences of one and the same length, at least 1",
            mend="pass one cluster label per value",
        )
    codes, _ = pd.factorize(pd.Series(list(clusters), dtype=object))  # (n,)
    undefined, unlabelled = int((~np.isfinite(array)).sum()), int((codes < 0).sum())
    if undefined or unlabelled:
        raise ParameterError(
            "A value or a cluster label is missing.",
            given=f"{undefined} values not finite, {unlabelled} labels missing",
            expected="finite values, a label for each",
            mend="drop the observations that are undefined, and report how many they were",
        )
    return array, codes


def _check_bootstrap(statistic: str, resamples: int) -> None:
    if statistic not in {"mean", "mean_of_clusters"}:
        raise ParameterError(
            "The statistic is unknown.",
            given=repr(statistic),
            expected='"mean" or "mean_of_clusters"',
            mend="choose whether values or clusters weigh the same",
        )
    if resamples < 100:
        raise ParameterError(
            "Too few resamples for a percentile interval.",
            given=resamples,
            expected="at least 100; 2000 for a published number",
            mend="raise resamples",
        )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ParameterError(
            "The confidence is out of range.",
            given=confidence,
            expected="a number between 0 and 1, for example 0.95",
            mend="write 95 % as 0.95",
        )


def _no_counts(successes: object, n: object) -> ParameterError:
    return ParameterError(
        "A rate needs counts.",
        given=f"successes={successes!r}, n={n!r}",
        expected="integers with 0 <= successes <= n and n >= 1",
        mend="with no trials there is no rate: leave the row out and say so",
    )


def _to_json(fields: Mapping[str, float | int]) -> dict[str, float | int | None]:
    return {name: None if math.isnan(value) else value for name, value in fields.items()}


def _from_json(record: Mapping[str, Any], *, numbers: tuple[str, ...], count: str) -> dict[str, Any]:
    fields = {}
    if isinstance(record, Mapping) and set(record) == {*numbers, count}:
        fields = {name: math.nan if record[name] is None else record[name] for name in (*numbers, count)}
    if not fields or not isinstance(fields[count], int) or not all(_is_number(v) for v in fields.values()):
        raise ResultsError(
            "A stored summary has another shape.",
            given=record,
            expected=f"an object with the numbers {', '.join(numbers)} and the integer {count}",
            mend="measure it again with this version",
        )
    return {**{name: float(fields[name]) for name in numbers}, count: fields[count]}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
