"""Rates, verdicts and tables by hand, and what publishing writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pandas as pd
import pytest

from tracealign_lib.experiments import EXPERIMENTS, common
from tracealign_lib.experiments.common import Prediction
from tracealign_lib.profiles import get_profile
from tracealign_lib.stats import Interval


def test_a_rate_draws_items_of_each_world_apart() -> None:
    frame = pd.DataFrame({"seed": [0, 0, 1, 1], "item": ["a", "a", "a", "a"], "drift": [1, 1, 0, 0]})
    measured = common.rate(frame, "drift")
    assert (measured.low, measured.high) == (0.0, 1.0)
    assert math.isnan(common.rate(frame[frame["seed"] == 0], "drift").low)


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (Interval(0.05, 0.0, 0.1, 9), "held"),
        (Interval(0.05, 0.0, 0.2, 9), "undecided"),
        (Interval(0.30, 0.2, 0.4, 9), "failed"),
        (Interval(-0.3, -0.4, -0.2, 9), "failed"),
        (Interval(0.05, math.nan, math.nan, 1), "held"),
        (Interval(0.50, math.nan, math.nan, 1), "failed"),
        (Interval(math.nan, math.nan, math.nan, 0), "undecided"),
    ],
)
def test_a_prediction_is_judged_by_the_whole_interval(measured: Interval, verdict: str) -> None:
    prediction = Prediction("claim", "quantity", 0.0, 0.1, lambda frame: measured)
    assert prediction.verdict(measured) == verdict


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (Interval(0.5, 0.4, 0.6, 9), "held"),
        (Interval(0.5, 0.2, 0.6, 9), "undecided"),
        (Interval(0.1, 0.0, 0.2, 9), "failed"),
        (Interval(0.5, float("nan"), float("nan"), 1), "held"),
    ],
)
def test_a_verdict_depends_on_the_whole_interval(measured: Interval, said: str) -> None:
    assert common.verdict(measured, 0.3, 0.65) == said


def test_predictions_without_a_measurement_have_no_verdict() -> None:
    prediction = Prediction("claim", "quantity", 0.0, 0.1, lambda frame: common.rate(frame, "x"))
    frame = pd.DataFrame({"seed": [0, 0], "item": ["a", "b"], "x": [1.0, 1.0]})
    for nothing in (None, frame[:0]):
        [row] = common.prediction_table([prediction], nothing).to_dict("records")
        assert row == {"prediction": "claim", "quantity": "quantity", "holds between": "0 and 0.1"}
    assert common.prediction_table([prediction], frame)["verdict"].tolist() == ["failed"]


def test_headlines_are_named_by_the_chosen_columns() -> None:
    table = pd.DataFrame([("x", 4, 0.5, 0.25, 0.75, 8)], columns=["method", "copies", *Interval._fields])
    assert common.headlines_of(table, ["method", "copies"]) == {"x | 4": Interval(0.5, 0.25, 0.75, 8)}
    assert common.headlines_of(table[:0], ["method", "copies"]) == {}


def test_publishing_writes_the_pooled_values_and_those_of_each_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(profile: str, seed: int, device: str) -> SimpleNamespace:
        return SimpleNamespace(seed=seed, device=device)

    seeds = get_profile("full").seeds
    monkeypatch.setattr(common, "Pipeline", made)
    monkeypatch.setattr("tracealign_lib.results.results_folder", lambda: tmp_path)
    common.publish("model", lambda pipelines: {"n": Interval(len(pipelines), 0, 9, 1)}, "cpu")
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["values"]["n"]["estimate"] == len(seeds)
    counts = {seed: values["n"]["estimate"] for seed, values in record["values"]["per seed"].items()}
    assert counts == {str(seed): 1 for seed in seeds}
    assert (record["profile"], record["seeds"]) == ("full", list(seeds))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_found_by_its_name(name: str) -> None:
    assert resolve_name(EXPERIMENTS[name]).__name__ == f"publish_{name.replace('-', '_')}"
