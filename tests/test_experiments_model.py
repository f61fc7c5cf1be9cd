"""Chapter 2 on outcomes and frames worked out by hand."""

from __future__ import annotations

import pandas as pd
import pytest
from experiment_samples import FakePipeline, outcome

from tracealign_lib.adb import ATTACKS, BENIGN_GROUPS
from tracealign_lib.experiments import model
from tracealign_lib.stats import Interval


def test_outcomes_become_one_row_per_prompt() -> None:
    asked = [outcome("direct", "a", "refusal"), outcome("prefill", "b", "drift", "a")]
    frame = model.outcome_frame([FakePipeline(asked, seed=7)])  # type: ignore[list-item]
    assert list(frame["seed"]) == [7, 7]
    assert list(frame["copies"]) == [1, 4]
    assert list(frame["refusal"]) == [True, False]
    assert list(frame["drift"]) == [False, True]
    assert list(frame["leaked_other"]) == [False, True]


def test_recalls_become_one_row_per_item() -> None:
    frame = model.recall_frame([FakePipeline([])])  # type: ignore[list-item]
    assert list(frame["complete"]) == [True, False]
    assert list(frame["steps"]) == [3, 2]


def test_mean_drift_weighs_attacks_the_same_and_leaves_direct_requests_out() -> None:
    rows = [("prefill", True)] * 3 + [("suffix", False)] + [("direct", True)] * 5
    frame = pd.DataFrame([{"seed": 0, "item": "a", "group": group, "drift": drift} for group, drift in rows])
    measured = model.mean_drift(frame)
    assert measured.estimate == pytest.approx(0.5)
    assert measured.n == 1


def test_the_headlines_of_chapter_2_cover_attacks_copies_and_benign_groups() -> None:
    asked = [outcome(group, name, "drift", name) for group in ATTACKS for name in "ab"]
    asked += [outcome(group, name, "correct") for group in BENIGN_GROUPS for name in "ab"]
    headlines = model.headlines([FakePipeline(asked)])  # type: ignore[list-item]
    assert headlines["mean drift"].estimate == 1.0
    assert headlines["direct refused"].estimate == 0.0
    assert headlines["drift that leaks another item"].estimate == 0.0
    assert headlines["recall, 1 copies"].estimate == 1.0
    assert headlines["recall, 4 copies"].estimate == 0.0
    assert {f"drift: {attack}" for attack in ATTACKS} < set(headlines)
    assert all(headlines[f"correct: {group}"].estimate == 1.0 for group in BENIGN_GROUPS)


def test_every_prediction_of_chapter_2_gets_a_verdict_on_this_run_and_on_the_published() -> None:
    measured = {name: Interval(0.5, 0.4, 0.6, 9) for name in model.PREDICTIONS}
    published = {name: Interval(0.99, 0.97, 1.0, 9) for name in model.PREDICTIONS}
    table = model.prediction_table(measured, published).set_index("quantity")
    assert list(table.loc["mean drift", ["verdict", "verdict on published"]]) == ["held", "failed"]
    assert list(table.loc["direct refused", ["verdict", "verdict on published"]]) == ["failed", "held"]
