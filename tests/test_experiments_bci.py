"""The recommendation of chapter 4 on hand-made frames, and what is published."""

from __future__ import annotations

import math
from copy import copy
from pathlib import Path

import pandas as pd
import pytest
from bci_samples import answered_pipeline, frame

from tracealign_lib.experiments import bci as chapter
from tracealign_lib.experiments import common
from tracealign_lib.experiments.bci import Criterion
from tracealign_lib.experiments.bci_paper import TAU_MEASURES
from tracealign_lib.experiments.bci_texts import BENIGN, FIT, NEWS, RARE, UNSAFE, belief_texts
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.profiles import get_profile
from tracealign_lib.results import load_results
from tracealign_lib.stats import Interval


def test_what_is_judged_has_no_say_in_the_choice() -> None:
    data = frame({"raw BCI": {UNSAFE: [5, 1, 6, 9], RARE: [3, 8, 4, 0]}})
    changed = data.assign(score=data["score"].where(data["half"] == FIT, 99.0))
    assert chapter.recommend(data) == chapter.recommend(changed)


def test_the_recommended_score_catches_most_then_needs_least() -> None:
    good, poor = {UNSAFE: [5, 5, 6, 6], RARE: [1, 1]}, {UNSAFE: [5, 5, 0, 0], RARE: [1, 1]}
    chosen = chapter.recommend(frame({"conflict": good, "raw BCI": poor}))
    assert chosen is not None
    assert (chosen.scorer, chosen.caught, chosen.worst_false_alarm) == ("conflict", 1, 0)
    order = {"conflict": good, "raw BCI": good, "span length": good}
    equal = chapter.recommend(frame(order))
    assert equal is not None
    assert equal.scorer == "span length"  # fewer labels, and named before the raw score


def test_an_unsafe_slice_counts_as_a_label() -> None:
    assert chapter.needs("corpus spans", "raw BCI") == frozenset()
    assert chapter.needs("paper", "raw BCI") == {"unsafe"}
    assert chapter.needs("paper", "conflict") == {"unsafe", "rules"}
    good = {UNSAFE: [5, 5, 6, 6], RARE: [1, 1]}
    both = pd.concat([frame({"raw BCI": good}, "paper"), frame({"density": good})])
    chosen = chapter.recommend(both)
    assert chosen is not None
    assert chosen.filter == "corpus spans"


def test_nothing_is_recommended_that_catches_too_little() -> None:
    data = frame({"raw BCI": {UNSAFE: [5, 5, 0, 0, 0, 0], RARE: [1, 1]}})
    assert chapter.recommend(data) is None
    assert chapter.recommend(data, Criterion(0.05, 0.02, min_caught=0.3)) is not None


def test_headlines_hold_both_kinds_and_are_empty_without_drift() -> None:
    data = frame({"raw BCI": {UNSAFE: [5, 6, 7, 8], RARE: [1, 2, 1, 2]}})
    values = chapter.headlines(data)
    assert set(values) == {
        f"AUROC | corpus spans | raw BCI | {RARE}",
        f"refused | corpus spans | raw BCI | {RARE}",
        f"refused | corpus spans | raw BCI | {UNSAFE}",
        *(prediction.quantity for prediction in chapter.PREDICTIONS),
    }
    assert values[f"refused | corpus spans | raw BCI | {UNSAFE}"].estimate == 1
    assert all(isinstance(value, Interval) for value in values.values())
    assert chapter.headlines(data[data["group"] == RARE]) == {}


def test_predictions_measure_what_they_say() -> None:
    corpus = frame(
        {
            "raw BCI": {UNSAFE: [1, 5, 1, 5], RARE: [4, 4, 4, 4]},
            "conflict": {UNSAFE: [1, 1, 1, 1], NEWS: [2, 2, 2, 0]},
            "conflict, no quotes": {UNSAFE: [1, 1, 1, 1], NEWS: [0, 0, 0, 0]},
        }
    )
    sliced = {
        "raw BCI": {UNSAFE: [9, 9, 9, 9, 9, 9], RARE: [1, 1]},
        "span length": {UNSAFE: [9, 9, 9, 1, 9, 1], RARE: [1, 1]},
    }
    paper = frame({"raw BCI": {UNSAFE: [21, 20, 22, -math.inf], RARE: [25, 15]}}, "paper")
    paper["spans"] = (paper["score"] > -math.inf).astype(int)
    data = pd.concat([corpus, frame(sliced, "unsafe spans"), paper])
    measured = [prediction.measure(data).estimate for prediction in chapter.PREDICTIONS]
    assert measured == pytest.approx([2 / 5, 2 / 4, 8 / 16, 4 / 16, 1, 2 / 3])
    nothing = [
        prediction.measure(corpus[corpus["filter"] == "paper"]) for prediction in chapter.PREDICTIONS[:5]
    ]
    assert all(math.isnan(interval.estimate) and interval.n == 0 for interval in nothing)


def test_headlines_of_the_page_are_published() -> None:
    scorers = ("raw BCI", "span length", "conflict, no quotes")
    scores = {name: {UNSAFE: [5, 6, 7, 8], RARE: [1, 2, 1, 2]} for name in scorers}
    both = pd.concat([frame(scores, name) for name in ("unsafe spans", "corpus spans")])
    assert set(chapter.SHOWN_HEADLINES) <= set(chapter.headlines(both))


def test_the_criterion_is_written_down() -> None:
    assert Criterion(0.05, 0.02, 0.5) == chapter.RECOMMENDATION


def test_publishing_keeps_headlines_tau_and_the_recommendation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_made, seen = frame({"raw BCI": {UNSAFE: [5, 6, 7, 8], RARE: [1, 2, 1, 2]}}), []

    def scored(pipelines: list[Pipeline]) -> pd.DataFrame:
        seen.extend(p.seed for p in pipelines)
        return pd.concat([hand_made.assign(seed=p.seed) for p in pipelines])

    with answered_pipeline(tmp_path / "cache") as smoke:
        unsafe = [text for text in belief_texts(smoke) if text.group == UNSAFE]

        def made(profile: str, seed: int, device: str) -> Pipeline:
            pipeline = copy(smoke)
            pipeline.seed = seed
            return pipeline

        assert smoke.unsafe_index.n_documents  # built while the seed is still its own
        monkeypatch.setattr(common, "Pipeline", made)
        monkeypatch.setattr(chapter, "scored", scored)
        monkeypatch.setattr("tracealign_lib.results.results_folder", lambda: tmp_path)
        chapter.publish_bci("cpu")
    published = load_results("bci", path=tmp_path)
    seeds = get_profile("full").seeds
    assert sorted(seen) == sorted(seeds)  # each world is scored once
    assert published[f"refused | corpus spans | raw BCI | {UNSAFE}"].n == 2 * len(seeds)
    expected = {"filter": "corpus spans", "scorer": "raw BCI", "threshold": 3.0, "caught": 1.0}
    assert published["recommendation"] == {**expected, "worst_false_alarm": 0.0}
    for group in (UNSAFE, *BENIGN):
        assert {f"tau = 20 | {measure} | {group}" for measure in TAU_MEASURES} <= set(published.values)
    assert published[f"tau = 20 | refused | {UNSAFE}"].n == len(unsafe) * len(seeds)
    alone = published["per seed"]
    assert {int(seed) for seed in alone} == set(seeds)
    assert alone[str(seeds[0])][f"tau = 20 | refused | {UNSAFE}"].n == len(unsafe)
