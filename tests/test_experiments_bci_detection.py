"""AUROC, DET points and thresholds against scikit-learn and hand-made frames."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bci_samples import QUIET, frame
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import det_curve, roc_auc_score

from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments import bci_detection
from tracealign_lib.experiments.bci_texts import FIT, JUDGE, NEWS, RARE, STORY, UNSAFE
from tracealign_lib.stats import wilson

SCORES = st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, 3.0]), min_size=1, max_size=12)


# --- AUROC and DET -------------------------------------------------------------------------------


@QUIET
@given(positives=SCORES, negatives=SCORES)
def test_auroc_is_scikit_learns(positives: list[float], negatives: list[float]) -> None:
    interval = bci_detection.auroc(
        positives, negatives, range(len(positives)), range(100, 100 + len(negatives))
    )
    labels = [1] * len(positives) + [0] * len(negatives)
    finite = np.nan_to_num([*positives, *negatives], neginf=-99)  # scikit-learn takes no infinity
    assert interval.estimate == pytest.approx(roc_auc_score(labels, finite))
    assert interval.n == len(labels)
    if min(len(positives), len(negatives)) > 1:
        assert interval.low <= interval.estimate + 1e-9
        assert interval.high >= interval.estimate - 1e-9


def test_the_interval_of_auroc_draws_whole_clusters() -> None:
    rng = np.random.default_rng(1)
    positive_clusters = np.repeat(np.arange(12), 4)
    negative_clusters = np.repeat(np.arange(6, 26), 3)  # six clusters hold both
    effect = rng.normal(size=26)
    positives = 0.7 + effect[positive_clusters] + 0.3 * rng.normal(size=48)
    negatives = effect[negative_clusters] + 0.3 * rng.normal(size=60)
    measured = bci_detection.auroc(
        positives, negatives, positive_clusters.tolist(), negative_clusters.tolist()
    )
    values = []
    for _ in range(1500):
        drawn = [*rng.choice(12, 12), *(12 + rng.choice(14, 14))]
        ours = np.concatenate([positives[positive_clusters == c] for c in drawn])
        theirs = np.concatenate([negatives[negative_clusters == c] for c in drawn])
        if len(theirs):
            values.append(roc_auc_score([1] * len(ours) + [0] * len(theirs), [*ours, *theirs]))
    low, high = np.quantile(values, [0.025, 0.975])
    assert (measured.low, measured.high) == pytest.approx((low, high), abs=0.03)
    as_if_independent = bci_detection.auroc(positives, negatives, range(48), range(100, 160))
    assert as_if_independent.high - as_if_independent.low < 0.8 * (high - low)


def test_one_cluster_says_nothing_about_the_spread() -> None:
    interval = bci_detection.auroc([1.0, 2.0], [0.0, 0.0], ["a", "a"], ["b", "c"])
    assert interval.estimate == 1
    assert math.isnan(interval.low)


@QUIET
@given(
    positives=st.lists(st.integers(0, 6), min_size=2, max_size=15),
    negatives=st.lists(st.integers(0, 6), min_size=2, max_size=15),
)
def test_det_points_are_scikit_learns(positives: list[float], negatives: list[float]) -> None:
    points = bci_detection.det_points(positives, negatives)
    labels = [1] * len(positives) + [0] * len(negatives)
    # scikit-learn refuses at the threshold too, we above it: compare curves, not thresholds
    alarms, misses, _ = det_curve(labels, [*positives, *negatives])
    ours = set(zip(points["false_alarm"].round(9), points["miss"].round(9), strict=True))
    assert set(zip(alarms.round(9), misses.round(9), strict=True)) <= ours


def test_det_points_by_hand() -> None:
    points = bci_detection.det_points([1.0, 3.0], [-math.inf, 1.0, 2.0, 2.0])
    assert points["threshold"].tolist() == [-math.inf, 1, 2, 3]
    assert points["false_alarm"].tolist() == pytest.approx([0.75, 0.5, 0, 0])
    assert points["miss"].tolist() == [0, 0.5, 0.5, 1]


@pytest.mark.parametrize("scores", [[], [1.0, math.nan]])
def test_missing_scores_are_refused(scores: list[float]) -> None:
    with pytest.raises(ParameterError, match="missing"):
        bci_detection.auroc(scores, [1.0], range(len(scores)), [0])
    with pytest.raises(ParameterError, match="missing"):
        bci_detection.det_points([1.0], scores)


# --- thresholds ----------------------------------------------------------------------------------


def share(values: list[float], threshold: float) -> float:
    return float(np.mean([value > threshold for value in values]))


@QUIET
@given(
    positives=SCORES,
    groups=st.lists(SCORES, min_size=1, max_size=3),
    rate=st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5]),
)
def test_a_fitted_threshold_is_the_lowest_that_keeps_the_promise(
    positives: list[float], groups: list[list[float]], rate: float
) -> None:
    everything = [*positives, *(value for group in groups for value in group)]
    named = {str(i): group for i, group in enumerate(groups)}
    if not np.isfinite(everything).any():
        with pytest.raises(ParameterError, match="No text has a score"):
            bci_detection.fit_threshold(positives, named, rate)
        return
    threshold = bci_detection.fit_threshold(positives, named, rate)
    assert math.isfinite(threshold)
    assert all(share(group, threshold) <= rate + 1e-9 for group in groups)
    lower = [value for value in everything if value <= threshold and math.isfinite(value)]
    if lower:  # to refuse one text more would break it
        below = max(lower) - 1e-6
        assert any(share(group, below) > rate for group in groups)


def test_a_fitted_threshold_by_hand() -> None:
    benign = {"a": [1.0] * 19 + [9.0], "b": [2.0, 3.0]}
    assert bci_detection.fit_threshold([4.0, 12.0], benign, 0.05) == 3.5  # 9 may be refused, 3 may not
    assert bci_detection.fit_threshold([4.0, 12.0], {"a": [-math.inf]}, 0.05) == 3.0
    assert bci_detection.fit_threshold([1.0], {"a": [5.0]}, 0.0) == 5.0


@pytest.mark.parametrize(("groups", "rate"), [({}, 0.05), ({"a": [1.0]}, 1.0), ({"a": [1.0]}, -0.1)])
def test_a_threshold_that_cannot_be_fitted_is_an_error(groups: dict[str, list[float]], rate: float) -> None:
    with pytest.raises(ParameterError, match="cannot be fitted"):
        bci_detection.fit_threshold([1.0], groups, rate)


def test_thresholds_come_from_one_half_and_are_judged_on_the_other() -> None:
    data = frame({"raw BCI": {UNSAFE: [5, 1, 6, 9, 7, 2], RARE: [3, 8, 4, 0], STORY: [1, 1, 1, 5]}})
    fitted = bci_detection.fit_thresholds(data, 0.05)
    assert fitted[["threshold", "caught", "worst_false_alarm"]].to_numpy().tolist() == [[4.5, 1, 0]]
    judged = bci_detection.flag_table(data, fitted, half=JUDGE).set_index("group")
    assert judged["estimate"].to_dict() == {UNSAFE: pytest.approx(1 / 3), RARE: 0.5, STORY: 0.5}
    assert (judged["n"] == [3, 2, 2]).all()
    paper = bci_detection.flag_table(data, 5.0, half=None).set_index("group")
    assert paper["estimate"].to_dict() == {UNSAFE: 0.5, RARE: 0.25, STORY: 0}


def test_a_half_without_texts_is_an_error() -> None:
    data = frame({"raw BCI": {UNSAFE: [5, 5], RARE: [1, 1]}})
    with pytest.raises(ParameterError, match="nothing to fit on"):
        bci_detection.fit_thresholds(data[data["half"] == JUDGE], 0.05)
    with pytest.raises(ParameterError, match="missing"):
        bci_detection.fit_thresholds(data[data["group"] != UNSAFE], 0.05)
    with pytest.raises(ParameterError, match="not finite"):
        bci_detection.flag_table(data, math.nan, half=None)


def test_tables_tell_which_group_breaks_a_score() -> None:
    data = frame({"raw BCI": {UNSAFE: [5, 6, 7], RARE: [1, 2], NEWS: [9, 8]}})
    table = bci_detection.auroc_table(data)
    assert table.set_index("group")["estimate"].to_dict() == {RARE: 1, NEWS: 0}
    assert table[["positives", "negatives", "items"]].to_numpy().tolist() == [[3, 2, 5]] * 2
    assert bci_detection.worst_groups(table)["group"].tolist() == [NEWS]
    points = bci_detection.det_frame(data)
    assert set(points["group"]) == {RARE, NEWS}
    assert points.loc[points["group"] == NEWS, "miss"].max() == 1


def test_a_perfect_order_keeps_an_honest_interval() -> None:
    perfect = bci_detection.auroc([3, 3, 4], [1, 2, 2, 0], ["a", "a", "b"], list("cdef"))
    assert perfect == (1, pytest.approx(wilson(2, 2).low), 1, 7)  # two items on the smaller side
    assert bci_detection.auroc([0, 0], [1, 1], "ab", "cd").high == pytest.approx(wilson(0, 2).high)


def test_shares_without_exceptions_keep_an_honest_interval() -> None:
    flagged = bci_detection.flag_table(frame({"raw BCI": {UNSAFE: [5, 6, 7], RARE: [1, 2, 1]}}), 4, half=None)
    assert flagged["low"].tolist() == pytest.approx([wilson(3, 3).low, 0])
    assert flagged["high"].tolist() == pytest.approx([1, wilson(0, 3).high])


def test_rules_are_compared_on_the_same_judged_texts() -> None:
    scores = {
        "raw BCI": {UNSAFE: [9, 5, 9, 5, 9, 1], RARE: [1, 1]},
        "span length": {UNSAFE: [9, 1, 9, 5, 9, 1], RARE: [1, 1]},
    }
    data = frame(scores)
    fitted = bci_detection.fit_thresholds(data, 0.05)
    rules = [("corpus spans", name) for name in scores]
    data.loc[data["half"] == FIT, "score"] = 0.0  # what was fitted on has no say
    gain = bci_detection.paired_refusals(data, fitted, *rules)
    assert gain == (0, pytest.approx(-wilson(0, 3).high), pytest.approx(wilson(0, 3).high), 3)
    fitted["threshold"] = 2.0
    gain = bci_detection.paired_refusals(data, fitted, *rules)
    assert gain.estimate == pytest.approx(1 / 3)
    assert gain.low == 0
    assert bci_detection.paired_refusals(data, fitted, *rules[::-1]).estimate == pytest.approx(-1 / 3)
    assert math.isnan(bci_detection.paired_refusals(data, fitted, rules[0], ("paper", "raw BCI")).estimate)


def test_the_interval_of_a_row() -> None:
    row = bci_detection.auroc_table(frame({"raw BCI": {UNSAFE: [1, 3], RARE: [0, 2]}})).iloc[0]
    interval = bci_detection.interval_of(row)
    assert interval.estimate == 0.75
    assert type(interval.n) is int
