"""What is refused and what is left, against verdicts and hand-made prompts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from experiment_samples import outcome
from shield_samples import Scored, margins, text

from tracealign_lib.calibration import EVERY_SPAN
from tracealign_lib.experiments import shield_judged as chapter
from tracealign_lib.experiments.bci_texts import FIT, JUDGE, RARE, STORY, UNSAFE


@pytest.mark.parametrize("threshold", [2.0, 0.0, -3.5, EVERY_SPAN])
def test_a_margin_is_above_zero_where_the_filter_refuses(threshold: float) -> None:
    scores = ["-inf", "-4", "-3.5", "0", "2", "2.0000000000000004", "1e200"]
    texts = [text(STORY, f"{n}", JUDGE, score) for n, score in enumerate(scores)]
    rule = Scored(threshold)
    frame = chapter.margin_frame({"a": rule, "b": Scored(2.0)}, [*texts, texts[-1]])
    mine = frame[frame["filter"] == "a"]
    assert (mine["score"] > 0).tolist() == [rule.check(t.text).refused for t in [*texts, texts[-1]]]
    assert mine["text"].tolist() == list(range(len(scores) + 1))
    assert len(frame) == 2 * len(mine)


def test_refusals_are_those_of_the_half_and_group_that_is_asked_for() -> None:
    data = margins({"a": {UNSAFE: [0, 1, 0, 1], RARE: [1, 0, 1, 0, 1, 1]}, "b": {UNSAFE: [1, 1]}})
    assert chapter.refused(data, "a", UNSAFE)[::3] == (1.0, 2)
    assert chapter.refused(data, "a", UNSAFE, half=FIT).estimate == 0
    assert chapter.refused(data, "a", UNSAFE, RARE).estimate == 3 / 5
    assert chapter.refused(data, "a", STORY).n == 0
    table = chapter.refusals(data).set_index(["filter", "group"])["estimate"]
    assert table.to_dict() == {("a", UNSAFE): 1.0, ("a", RARE): 1 / 3, ("b", UNSAFE): 1.0}


def test_prompts_of_the_fit_half_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        outcome("suffix", "a", "drift", "b", "9"),  # leaks an item of the judged half
        outcome("suffix", "b", "drift", "a", "9"),
        outcome("direct", "b", "refusal", None, "0"),
        outcome("fact", "b", "correct", None, "5"),
        outcome("fact", "a", "correct", None, "5"),
    ]
    monkeypatch.setattr(chapter, "halves", lambda world: {"a": FIT, "b": JUDGE})
    pipeline: Any = SimpleNamespace(seed=3, world=None, outcomes=lambda: answers)
    frame = chapter.prompt_frame(pipeline, {"rule": Scored(4.0)})
    assert frame[["group", "item", "attack", "label", "refused"]].to_numpy().tolist() == [
        ["suffix", "b", True, "drift", True],
        ["direct", "b", False, "refusal", False],
        ["fact", "b", False, "correct", True],
    ]
    assert set(frame["seed"]) == {3}


def test_what_is_left_behind_a_filter() -> None:
    rows = [
        ("suffix", True, "drift", True),
        ("suffix", True, "drift", False),
        ("suffix", True, "near_drift", True),
        ("suffix", True, "other", True),
        ("prefill", True, "refusal", False),
        ("direct", False, "refusal", False),
        ("fact", False, "correct", True),
        ("fact", False, "correct", False),
        ("how_to", False, "refusal", False),
        ("how_to", False, "other", False),
    ]
    frame = pd.DataFrame(
        [
            (0, g, f"i{n}", attack, "rule", label, refused)
            for n, (g, attack, label, refused) in enumerate(rows)
        ],
        columns=["seed", "group", "item", "attack", "filter", "label", "refused"],
    )
    table = chapter.after_table(frame).set_index(["filter", "measure"])["estimate"]
    assert table["rule"].to_dict() == pytest.approx(
        {
            "drift left": 1 / 5,
            "near-drift left": 0,
            "refused under attack": 4 / 5,
            "right refusals": 2 / 4,
            "harmless questions answered": 1 / 4,
            "harmless questions refused": 2 / 4,
        }
    )
    bare = table[chapter.UNGUARDED]
    assert (bare["drift left"], bare["near-drift left"], bare["refused under attack"]) == (
        2 / 5,
        1 / 5,
        1 / 5,
    )
    assert math.isnan(bare["right refusals"])
    assert (bare["harmless questions answered"], bare["harmless questions refused"]) == (2 / 4, 1 / 4)
    assert list(bare.index) == list(chapter.MEASURES)


def test_time_is_measured_per_100_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(chapter.time, "process_time", lambda: next(ticks))
    index: Any = SimpleNamespace(encode=lambda spelled: [0] * 50)
    texts = [text(STORY, f"s{n}", JUDGE, "1") for n in range(3)]
    assert chapter.milliseconds({"rule": Scored(0.0)}, index, texts) == {"rule": 2000.0}
