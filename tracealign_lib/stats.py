"""Intervals for what the book measures: no number stands on a page without one.

A *rate* counts successes among independent trials: Wilson's interval. A *mean over prompts* is taken over
values that are not independent, because many prompts ask for the same planted item: the bootstrap draws
whole items, with every prompt that belongs to them. A *spread over seeds*, where three worlds are too few
for an interval, is a range, under its own name. Two defences that answered the same prompts are compared
in *pairs*: McNemar's exact test. And a rate that an *imperfect judge* counted is corrected by what the judge
got wrong on a labelled set, whose own uncertainty widens the interval.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from scipy.stats import binom, binomtest, norm

from tracealign_lib.errors import ParameterError, ResultsError


class Interval(NamedTuple):
    """An estimate with its confidence interval.

    Attributes
    ----------
    estimate:
        With the bounds `low` and `high`, in the unit of what was measured. NaN where undefined: all three
        when nothing was measured (`n` is 0), the bounds alone when there is no second cluster to estimate
        a spread from.
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
    sums, sizes = _cluster_sums(values, clusters)  # (clusters,), (clusters,)
    n = int(sizes.sum())
    if statistic == "mean_of_clusters":
        sums, sizes = sums / sizes, np.ones_like(sizes)
    estimate = float(sums.sum() / sizes.sum())
    if len(sizes) == 1:
        return Interval(estimate, math.nan, math.nan, n)
    means = _resampled_means(sums, sizes, resamples, np.random.default_rng(seed))
    return Interval(estimate, *_percentiles(means, confidence), n)


def clustered_rate(
    values: Sequence[float] | np.ndarray[Any, Any],
    clusters: Sequence[Hashable],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """`clustered_bootstrap` of values that lie between 0 and 1, such as outcomes that happened or did not.

    Where the event was seen in fewer than `SPARSE` clusters, or its absence was, resamples differ by those
    few clusters alone, and their spread says next to nothing: with no event at all the bootstrap would claim
    certainty. The interval is then widened to Wilson's for this rate with the clusters as trials.
    """
    interval = clustered_bootstrap(values, clusters, confidence=confidence, seed=seed)
    sums, sizes = _cluster_sums(values, clusters)
    return with_doubt(interval, sums / sizes, confidence=confidence)


def with_doubt(interval: Interval, shares: np.ndarray[Any, Any], *, confidence: float = 0.95) -> Interval:
    """A bootstrapped interval of a rate, widened as `clustered_rate` says.

    Parameters
    ----------
    shares:
        The rate within each cluster.  # (clusters,)
    """
    rounded = np.round(shares, 9)  # a mean of ones is not always 1 in floating point
    if len(shares) == 1 or min((rounded > 0).sum(), (rounded < 1).sum()) >= SPARSE:
        return interval
    low, high = _wilson_bounds(interval.estimate, len(shares), confidence)
    return interval._replace(low=min(interval.low, low), high=min(1.0, max(interval.high, high)))


SPARSE = 5
"""Clusters with an event, or without one, below which `clustered_rate` does not trust the bootstrap alone."""


def _wilson_bounds(share: float, trials: int, confidence: float) -> tuple[float, float]:
    """Wilson's bounds for any share of `trials`; scipy has them for whole successes only."""
    share = min(max(share, 0.0), 1.0)
    z = float(norm.ppf((1 + confidence) / 2)) ** 2 / trials
    centre, half = (share + z / 2) / (1 + z), math.sqrt(z * share * (1 - share) + z * z / 4) / (1 + z)
    return max(0.0, centre - half), min(1.0, centre + half)


def median_interval(values: Sequence[float] | np.ndarray[Any, Any], *, confidence: float = 0.95) -> Interval:
    """The median with the interval between two order statistics, exact for any continuous distribution.

    With `j` the largest rank for which P(Binomial(n, 1/2) < j) <= (1 - confidence) / 2, the interval reaches
    from the j-th smallest to the j-th largest value; its true confidence is at least the one asked for.

    Returns
    -------
    Interval
        The bounds are NaN where there are too few values for this confidence (below 6 for 95 %).

    Raises
    ------
    ParameterError
        No values, or one that is not finite.

    References
    ----------
    Thompson, "On confidence ranges for the median ...", Ann. Math. Stat. 7 (1936).
    """
    _check_confidence(confidence)
    array, _ = _check_observations(values, range(len(values)))
    ordered = np.sort(array)
    j = int(binom.ppf((1 - confidence) / 2, len(ordered), 0.5))
    if binom.cdf(j - 1, len(ordered), 0.5) > (1 - confidence) / 2:
        j -= 1
    low, high = (ordered[j - 1], ordered[-j]) if j >= 1 else (math.nan, math.nan)
    return Interval(float(np.median(ordered)), float(low), float(high), len(ordered))


# --- pairs ---------------------------------------------------------------------------------------


class Paired(NamedTuple):
    """Two defences on the same prompts: where they differ, and how surprising that would be by chance.

    Attributes
    ----------
    first_only, second_only:
        Prompts (or clusters) of which only the first, or only the second, has the event (or more of it).
    p_value:
        Two-sided and exact: both kinds of discordance are equally likely under the null hypothesis.
    n:
        Pairs (or clusters) compared.
    """

    first_only: int
    second_only: int
    p_value: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """A dictionary that `json.dumps` writes as strict JSON."""
        return _to_json(self._asdict())


def mcnemar(
    first: Sequence[bool] | np.ndarray[Any, Any],
    second: Sequence[bool] | np.ndarray[Any, Any],
    clusters: Sequence[Hashable] | None = None,
) -> Paired:
    """McNemar's exact test: does an event happen as often under one defence as under another?

    Parameters
    ----------
    first, second:
        Whether the event happened, one value per prompt, the same prompts in the same order.  # (n,), (n,)
    clusters:
        What each prompt belongs to. Prompts of one item are not independent, so with clusters each casts one
        vote, for the defence under which the event happened more often in it (none where it is a tie). By
        default every prompt votes, which is too confident where prompts share an item.

    Raises
    ------
    ParameterError
        The two do not pair up, or hold anything but 0 and 1.

    References
    ----------
    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947).
    """
    a, b = (np.asarray(events, dtype=np.float64) for events in (first, second))
    if a.shape != b.shape or not np.isin(a, (0, 1)).all() or not np.isin(b, (0, 1)).all():
        raise ParameterError(
            "Two defences are compared on pairs of events.",
            given=f"values of shapes {a.shape} and {b.shape}",
            expected="two sequences of 0 and 1 of one length, one value per prompt",
            mend="ask both about the same prompts, and drop those that a judge could not label",
        )
    votes, _ = _cluster_sums(a - b, range(len(a)) if clusters is None else clusters)
    more, less = int((votes > 0).sum()), int((votes < 0).sum())
    p_value = float(binomtest(more, more + less).pvalue) if more + less else 1.0
    return Paired(more, less, p_value, len(votes))


# --- judges that err -----------------------------------------------------------------------------


class JudgeError(NamedTuple):
    """What a judge got right on a set with known labels, for one label such as drift.

    Attributes
    ----------
    hits, positives:
        Texts that have the label, and those of them that the judge gave it to.
    rejections, negatives:
        Texts that have not, and those of them that the judge did not give it to.
    """

    hits: int
    positives: int
    rejections: int
    negatives: int

    @classmethod
    def of(cls, truth: Sequence[bool], said: Sequence[bool]) -> Self:
        """Compare what is true with what the judge said, text by text."""
        pairs = [(bool(t), bool(s)) for t, s in zip(truth, said, strict=True)]
        positives = sum(t for t, _ in pairs)
        rejections = sum(not t and not s for t, s in pairs)
        return cls(sum(t and s for t, s in pairs), positives, rejections, len(pairs) - positives)

    @property
    def sensitivity(self) -> Interval:
        """Share of what has the label that the judge finds, with Wilson's interval."""
        return wilson(self.hits, self.positives)

    @property
    def specificity(self) -> Interval:
        """Share of what has not the label that the judge leaves alone, with Wilson's interval."""
        return wilson(self.rejections, self.negatives)


def rogan_gladen(successes: int, n: int, error: JudgeError, *, confidence: float = 0.95) -> Interval:
    """The true rate behind a rate that an imperfect judge counted, with the judge's uncertainty in it.

    If the judge finds a share `Se` of the events and leaves a share `Sp` of the others alone, it counts
    `r = p Se + (1 - p)(1 - Sp)`; solved for `p`. It is enough that the judge errs as often here as on the
    labelled set, label by label: the set may hold more drift than the prompts do. The interval is the one of
    Lang and Reiczigel, which holds its level also where a judge made no error on a small set.

    Parameters
    ----------
    successes, n:
        What the judge counted, among independent texts.
    error:
        What the judge got right on the labelled set, which shares no text with the counted ones.

    Returns
    -------
    Interval
        Within 0 and 1.

    Raises
    ------
    ParameterError
        The labelled set lacks positives or negatives, or the judge was no better than chance on it.

    References
    ----------
    Rogan and Gladen, "Estimating prevalence from the results of a screening test", Am. J. Epidemiol. 107
    (1978); Lang and Reiczigel, "Confidence limits for prevalence of disease adjusted for estimated
    sensitivity and specificity", Prev. Vet. Med. 113 (2014).
    """
    rate = wilson(successes, n, confidence=confidence).estimate
    se, sp = error.sensitivity.estimate, error.specificity.estimate
    if se + sp <= 1:
        raise ParameterError(
            "This judge is no better than chance.",
            given=f"sensitivity {se:.2f}, specificity {sp:.2f} on {error.positives + error.negatives} texts",
            expected="a sum above 1",
            mend="use another judge, or label more texts",
        )
    z = float(norm.ppf((1 + confidence) / 2))
    n_r, n_se, n_sp = n + z * z, error.positives + 2, error.negatives + 2
    r, se_, sp_ = (n * rate + z * z / 2) / n_r, (error.hits + 1) / n_se, (error.rejections + 1) / n_sp
    youden = se_ + sp_ - 1
    p = (r + sp_ - 1) / youden
    var_se, var_sp = se_ * (1 - se_) / n_se, sp_ * (1 - sp_) / n_sp
    shift = 2 * z * z * (p * var_se - (1 - p) * var_sp)
    half = z / youden * math.sqrt(r * (1 - r) / n_r + p * p * var_se + (1 - p) ** 2 * var_sp)
    estimate, low, high = (
        min(1.0, max(0.0, value))
        for value in ((rate + sp - 1) / (se + sp - 1), p + shift - half, p + shift + half)
    )
    return Interval(estimate, low, high, n)


def prediction_powered(
    judged: Sequence[float] | np.ndarray[Any, Any],
    clusters: Sequence[Hashable],
    truth: Sequence[float] | np.ndarray[Any, Any],
    said: Sequence[float] | np.ndarray[Any, Any],
    labelled_clusters: Sequence[Hashable],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The true mean of what an imperfect judge measured: its mean, plus its mean error on a labelled set.

    Nothing is assumed about how the judge errs, but the labelled texts must be drawn like the others: a set
    with more drift in it gives a wrong answer (then use `rogan_gladen`). Both parts are resampled by cluster.
    Where the judge made no error on `m` labelled clusters, the bootstrap would trust it blindly; each bound
    then moves by Wilson's upper limit for 0 of m.

    Parameters
    ----------
    judged, clusters:
        What the judge said of the texts without labels, from 0 to 1, and what each belongs to (a score from 1
        to 5 is brought to this range first).  # (n,), (n,)
    truth, said, labelled_clusters:
        True and judged values of the labelled texts, which are not among the others.  # (m,), (m,), (m,)

    Raises
    ------
    ParameterError
        Values and clusters do not pair up, or a value is missing or not within 0 and 1.

    References
    ----------
    Angelopoulos et al., "Prediction-powered inference", arXiv 2301.09633.
    """
    _check_confidence(confidence)
    _check_bootstrap("mean", resamples)
    errors = _judge_errors(truth, said, judged)  # (m,)
    parts = [_cluster_sums(judged, clusters), _cluster_sums(errors, labelled_clusters)]
    estimate = sum(float(sums.sum() / sizes.sum()) for sums, sizes in parts)
    if min(len(sizes) for _, sizes in parts) == 1:
        return Interval(estimate, math.nan, math.nan, len(judged))
    rng = np.random.default_rng(seed)
    means = [_resampled_means(sums, sizes, resamples, rng) for sums, sizes in parts]  # 2 x (resamples,)
    low, high = _percentiles(np.sum(means, axis=0), confidence)
    unseen = 0.0 if errors.any() else wilson(0, len(parts[1][1]), confidence=confidence).high
    return Interval(estimate, low - unseen, high + unseen, len(judged))


# --- seeds ---------------------------------------------------------------------------------------


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


def _judge_errors(*values: Sequence[float] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """True minus judged values; `values` are truth, what was said of it, and what was judged besides."""
    truth, said, judged = (np.asarray(part, dtype=np.float64) for part in values)
    # NaN compares false, so a missing value is refused here.
    if truth.shape != said.shape or not all(((v >= 0) & (v <= 1)).all() for v in (truth, said, judged)):
        raise ParameterError(
            "A judge cannot be corrected from these values.",
            given=f"{len(truth)} true, {len(said)} judged with a label, {len(judged)} judged without",
            expected="a true and a judged value for each labelled text, all of them from 0 to 1",
            mend="drop what the judge could not label, and report how much it was; bring scores to 0 to 1",
        )
    errors: np.ndarray[Any, Any] = truth - said
    return errors


def _cluster_sums(
    values: Sequence[float] | np.ndarray[Any, Any], clusters: Sequence[Hashable]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sum and number of the values of each cluster, in order of first appearance."""
    array, codes = _check_observations(values, clusters)  # (n,), (n,)
    return np.bincount(codes, weights=array), np.bincount(codes)


def _resampled_means(
    sums: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any], resamples: int, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    drawn = rng.integers(len(sizes), size=(resamples, len(sizes)))  # (resamples, clusters)
    means: np.ndarray[Any, Any] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)  # (resamples,)
    return means


def _percentiles(draws: np.ndarray[Any, Any], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


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
