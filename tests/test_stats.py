"""Intervals against closed formulas, a literal resampling loop, and their own coverage."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib.errors import ParameterError, ResultsError
from tracealign_lib.stats import Interval, SeedSpread, clustered_bootstrap, clustered_rate, over_seeds, wilson


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_wilson_is_the_closed_formula(counts: tuple[int, int]) -> None:
    k, n = counts
    z, p = 1.959963984540054, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    interval = wilson(k, n)
    assert interval == pytest.approx((p, max(0.0, centre - half), min(1.0, centre + half), n), abs=1e-9)
    assert isinstance(interval, Interval)


def test_wilson_takes_numpy_counts_and_other_confidences() -> None:
    wide, narrow = wilson(np.int64(8), np.int64(10), confidence=0.99), wilson(8, 10, confidence=0.5)
    assert wide.low < narrow.low < 0.8 < narrow.high < wide.high
    assert wide.n == 10


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 3), (4, 3), (0.5, 3), (1, 2.0), ("1", 3)])
def test_wilson_refuses_what_is_no_count(k: object, n: object) -> None:
    with pytest.raises(ParameterError, match="A rate needs counts"):
        wilson(k, n)  # type: ignore[arg-type]


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, math.nan])
def test_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ParameterError, match="confidence"):
        wilson(1, 2, confidence=confidence)
    with pytest.raises(ParameterError, match="confidence"):
        clustered_bootstrap([1.0, 2.0], ["a", "b"], confidence=confidence)


def literal_bootstrap(values: list[float], clusters: list[str], resamples: int) -> np.ndarray:
    """The definition, one draw at a time: whole clusters with replacement, the mean of what was drawn."""
    names = sorted(set(clusters))
    members = {name: [v for v, c in zip(values, clusters, strict=True) if c == name] for name in names}
    rng = np.random.default_rng(99)
    draws = (rng.choice(names, size=len(names)) for _ in range(resamples))
    return np.asarray([np.mean([v for name in draw for v in members[name]]) for draw in draws])


def test_bootstrap_equals_the_literal_loop() -> None:
    rng = np.random.default_rng(1)
    clusters = [f"item{i}" for i in range(25) for _ in range(int(rng.integers(1, 9)))]
    level = {name: rng.random() for name in sorted(set(clusters))}
    values = [float(rng.random() < level[name]) for name in clusters]
    means = literal_bootstrap(values, clusters, 4000)
    interval = clustered_bootstrap(values, clusters, resamples=20_000)
    assert interval.estimate == pytest.approx(np.mean(values))
    assert interval.n == len(values)
    # Both are simulations; a quantile of 4000 draws is known to about 0.004 here.
    assert (interval.low, interval.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.012)


def test_clusters_widen_the_interval() -> None:
    """Ten copies of each value, in ten clusters of ten, carry no more than the ten values."""
    values = np.random.default_rng(2).normal(size=10)
    once = clustered_bootstrap(values, range(10), seed=5)
    tenfold = clustered_bootstrap(np.repeat(values, 10), np.repeat(np.arange(10), 10).tolist(), seed=5)
    alone = clustered_bootstrap(np.repeat(values, 10), range(100), seed=5)
    assert tenfold[:3] == pytest.approx(once[:3])
    assert tenfold.n == 100
    assert (alone.high - alone.low) < 0.5 * (tenfold.high - tenfold.low)


def test_bootstrap_covers_the_truth() -> None:
    """Of 300 experiments with a true mean of 0, about 95 % of the intervals hold it; unclustered, fewer."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(40), 6)
    held = {"clustered": 0, "ignored": 0}
    for number in range(300):
        values = rng.normal(size=40)[labels] + rng.normal(size=240)
        for name, units in (("clustered", labels), ("ignored", np.arange(240))):
            interval = clustered_bootstrap(values, units.tolist(), resamples=400, seed=number)
            held[name] += interval.low <= 0 <= interval.high
    assert 0.90 <= held["clustered"] / 300 <= 0.985
    assert held["ignored"] / 300 < 0.80


def test_mean_of_clusters_weighs_clusters() -> None:
    values, clusters = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    assert clustered_bootstrap(values, clusters).estimate == 0.75
    assert clustered_bootstrap(values, clusters, statistic="mean_of_clusters").estimate == 0.5


def test_bootstrap_is_seeded() -> None:
    values, clusters = np.random.default_rng(4).normal(size=30), list(range(30))
    assert clustered_bootstrap(values, clusters, seed=1) == clustered_bootstrap(values, clusters, seed=1)
    assert clustered_bootstrap(values, clusters, seed=1) != clustered_bootstrap(values, clusters, seed=2)


def test_one_cluster_has_no_bounds() -> None:
    interval = clustered_bootstrap([0.0, 1.0], ["a", "a"])
    assert interval.estimate == 0.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert str(interval) == "0.50 [no interval] (n = 2)"


def test_tuples_are_labels() -> None:
    """A world's seed and an item make a label together."""
    values = [0.0, 1.0, 4.0, 5.0]
    tuples = clustered_bootstrap(values, [(0, "a"), (0, "b"), (1, "a"), (1, "b")])
    assert tuples == clustered_bootstrap(values, ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("values", "clusters", "options"),
    [
        ([], [], {}),
        ([1.0], ["a", "b"], {}),
        ([[1.0]], ["a"], {}),
        ([1.0, math.nan], ["a", "b"], {}),
        ([1.0, math.inf], ["a", "b"], {}),
        ([1.0, 2.0], ["a", None], {}),
        ([1.0, 2.0], ["a", "b"], {"statistic": "mode"}),
        ([1.0, 2.0], ["a", "b"], {"resamples": 10}),
    ],
)
def test_bootstrap_refuses(values: list[float], clusters: list[str], options: dict[str, object]) -> None:
    with pytest.raises(ParameterError):
        clustered_bootstrap(values, clusters, **options)  # type: ignore[arg-type]


def test_over_seeds() -> None:
    spread = over_seeds({0: 0.5, 1: 0.6, 2: 0.1})
    assert spread == pytest.approx((0.4, 0.1, 0.6, 3))
    assert str(spread) == "0.40 (0.10 to 0.60 over 3 seeds)"
    assert str(over_seeds({7: 0.5})) == "0.50 (0.50 to 0.50 over 1 seed)"
    for wrong in ({}, {0: math.nan}):
        with pytest.raises(ParameterError):
            over_seeds(wrong)


def test_intervals_print_compactly() -> None:
    assert str(Interval(0.5377, 0.48, 0.6, 377)) == "0.54 [0.48, 0.60] (n = 377)"
    assert str(Interval(math.nan, math.nan, math.nan, 0)) == "undefined (n = 0)"


@pytest.mark.parametrize(
    "summary", [Interval(0.1 + 0.2, 0.25, 1 / 3, 7), Interval(0.0, 0.0, 1.0, 1), SeedSpread(0.4, 0.1, 0.6, 3)]
)
def test_summaries_survive_json(summary: Interval | SeedSpread) -> None:
    assert type(summary).from_json(json.loads(json.dumps(summary.to_json(), allow_nan=False))) == summary


def test_missing_bounds_survive_json() -> None:
    record = json.loads(json.dumps(Interval(0.5, math.nan, math.nan, 2).to_json(), allow_nan=False))
    assert record == {"estimate": 0.5, "low": None, "high": None, "n": 2}
    back = Interval.from_json(record)
    assert (back.estimate, back.n) == (0.5, 2)
    assert math.isnan(back.low)


@pytest.mark.parametrize(
    "record",
    [
        {},
        [0.5, 0.4, 0.6, 3],
        {"estimate": 0.5, "low": 0.4, "high": 0.6},
        {"estimate": "0.5", "low": 0.4, "high": 0.6, "n": 3},
        {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": 3.5},
        {"estimate": True, "low": 0.4, "high": 0.6, "n": 3},
        {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": 3, "more": 1},
    ],
)
def test_foreign_records_are_refused(record: object) -> None:
    with pytest.raises(ResultsError):
        Interval.from_json(record)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_rate_without_exceptions_still_leaves_room_for_doubt(value: float) -> None:
    clusters = [item for item in range(20) for _ in range(5)]
    interval = clustered_rate([value] * 100, clusters)
    by_items = wilson(int(20 * value), 20)
    assert (interval.low, interval.high) == (by_items.low, by_items.high)
    assert (interval.estimate, interval.n) == (value, 100)
    assert interval.high - interval.low > 0.1


def test_a_rate_with_exceptions_is_the_clustered_bootstrap() -> None:
    values, clusters = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0], list("aabbcc")
    assert clustered_rate(values, clusters, seed=3) == clustered_bootstrap(values, clusters, seed=3)
