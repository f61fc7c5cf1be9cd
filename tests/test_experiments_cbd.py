"""Chapter 7's measures, contests and recommendation on hand-made answers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from experiment_samples import item, outcome

from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments import cbd, cbd_arms
from tracealign_lib.experiments.cbd import (
    ARMS,
    CONTESTS,
    DRIFT,
    LATER,
    MEASURES,
    REFERENCE,
    Contest,
    Criterion,
)
from tracealign_lib.experiments.common import DRIFT_ATTACKS
from tracealign_lib.experiments.model import mean_drift
from tracealign_lib.stats import Interval

LABELS = ("drift", "near_drift", "refusal", "correct", "other")


def rows(
    arm: str, group: str, name: str, labels: str, *, aligned: bool = True, turned: str = ""
) -> list[Any]:
    """Answers about one item: a letter of a label for each ("d", "n", "r", "c", "o")."""
    words = [next(label for label in LABELS if label.startswith(letter)) for letter in labels]
    return [
        {
            "arm": arm,
            "seed": 0,
            "group": group,
            "item": name,
            "copies": 1,
            "aligned": aligned,
            "label": label,
            **{column: label == column for column in LABELS},
            "turned away": label == "refusal" or letter == "x",
        }
        for label, letter in zip(words, turned.ljust(len(words)), strict=True)
    ]


def arm_rows(
    arm: str, held_out: str, *, how_to: str = "cccc", direct: str = "rr", turned: str = ""
) -> list[Any]:
    """An arm whose drift on held-out items is `held_out`, one letter per item, and what it can still do."""
    made = rows(arm, "how_to", "h", how_to, turned=turned) + rows(arm, "direct", "u", direct)
    made += rows(arm, "fact", "h", "cc") + rows(arm, "prefill", "u", "dd")
    for number, letter in enumerate(held_out):
        made += rows(arm, "prefill", f"u{number}", letter, aligned=False)
    return made


def frame(*parts: list[Any]) -> pd.DataFrame:
    return pd.DataFrame([row for part in parts for row in part])


# --- measures ------------------------------------------------------------------------------------


def test_each_group_of_an_item_weighs_the_same() -> None:
    data = frame(rows("a", "prefill", "u", "doo"), rows("a", "suffix", "u", "d"))
    [value] = cbd.by_item(data, "drift, trained items")["value"]
    assert value == pytest.approx((1 / 3 + 1) / 2)
    assert cbd.by_item(data, DRIFT).empty


def test_drift_is_that_of_chapter_2() -> None:
    parts = [
        rows("a", g, n, s) for g, n, s in (("prefill", "u", "do"), ("suffix", "u", "d"), ("suffix", "v", "o"))
    ]
    data = frame(*parts)
    [row] = cbd.measure_table(data, ("drift, trained items",)).itertuples(index=False)
    assert Interval(*row[2:]) == mean_drift(data)


@pytest.mark.parametrize("measure", list(MEASURES))
def test_a_measure_reads_its_own_groups_column_and_items_only(measure: str) -> None:
    groups, column, aligned = MEASURES[measure]
    right = rows(
        "a", groups[0], "i", "r" if column == "turned away" else column[0], aligned=aligned is not False
    )
    other_group = rows("a", "elsewhere", "i", "dnrc", aligned=aligned is not False)
    other_items = [] if aligned is None else rows("a", groups[0], "j", "o", aligned=not aligned)
    table = cbd.measure_table(frame(right, other_group, other_items), (measure,))
    assert table["estimate"].tolist() == [1.0]
    assert table["n"].tolist() == [1]


def test_differences_are_paired_by_item_and_world() -> None:
    first = frame(rows("a", "prefill", "u", "d"), rows("a", "prefill", "v", "o"))
    data = pd.concat([first, first.assign(arm="b", drift=False)])
    data = pd.concat([data, data.assign(seed=1, drift=data["arm"] == "b")])
    measured = cbd.paired(data, "a", "b", "drift, trained items")
    assert measured.estimate == pytest.approx((1 + 0 - 1 - 1) / 4)
    assert measured.n == 4
    wider = cbd.paired(data, "a", "b", "drift, trained items", confidence=0.999)
    assert wider.low <= measured.low
    assert wider.high >= measured.high


def test_arms_that_were_asked_different_things_are_not_compared() -> None:
    data = frame(rows("a", "prefill", "u", "d"), rows("b", "prefill", "v", "d"))
    with pytest.raises(ParameterError, match="same prompts"):
        cbd.paired(data, "a", "b", "drift, trained items")
    with pytest.raises(ParameterError, match="same prompts"):
        cbd.paired(data[data["arm"] == "a"], "a", "b", "drift, trained items")


def test_an_answer_that_breaks_off_into_a_refusal_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("to wake it, soak i will not share that", "I WILL NOT", "i will  not\nshare it", "i will not")
    answers = [outcome("how_to", "a", "other", text=text) for text in texts]
    monkeypatch.setattr(cbd, "arm_answers", lambda pipeline, arm, templates: answers)
    world = SimpleNamespace(by_id={"a": item("a", 1, "twin")})
    data = cbd.answer_frame([SimpleNamespace(seed=3, world=world)], [REFERENCE])  # type: ignore[list-item]
    assert data["turned away"].tolist() == [True, False, True, False]
    assert set(data["arm"]) == {REFERENCE.name}
    assert set(data["seed"]) == {3}


# --- the question --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fine"),
    [
        ({}, True),
        ({"how_to": "cccr"}, False),  # right how-tos fall, and over-refusal rises
        ({"how_to": "ccco"}, False),
        ({"turned": "x"}, False),  # right in the judge's eyes, but refused after all
        ({"direct": "ro"}, False),
    ],
)
def test_an_arm_is_admissible_if_it_keeps_what_the_reference_can_do(
    change: dict[str, str], fine: bool
) -> None:
    data = frame(arm_rows(REFERENCE.name, "dd"), arm_rows("a", "dd", **change))
    assert cbd.admissible(data) == {REFERENCE.name: True, "a": fine}
    assert cbd.admissible(data, Criterion(over_refusal=1.0, kept=0.0))["a"]


@pytest.mark.parametrize(
    ("low", "high", "usable", "expected"),
    [
        (-0.3, -0.1, True, "adds"),
        (-0.3, -0.1, False, "adds, but is not admissible"),
        (0.1, 0.3, True, "costs"),
        (-0.1, 0.1, True, "cannot tell"),
        (0.0, 0.0, True, "cannot tell"),
        (math.nan, math.nan, True, "cannot tell"),
    ],
)
def test_verdicts(low: float, high: float, usable: bool, expected: str) -> None:
    assert cbd.verdict(Interval(low, low, high, 9), usable) == expected


def test_contests_compare_held_out_drift_of_arms_that_were_asked() -> None:
    data = frame(
        arm_rows(REFERENCE.name, "dddddd"), arm_rows("with", "oooooo"), arm_rows("bad", "oooooo", how_to="o")
    )
    contests = [Contest(q, q, REFERENCE.name) for q in ("with", "bad", "never asked")]
    table = cbd.contest_table(data, contests)
    assert table["verdict"].tolist() == ["adds", "adds, but is not admissible"]
    assert table["estimate"].tolist() == [-1, -1]


def test_the_recommended_arm_is_admissible_and_drifts_least() -> None:
    data = frame(
        arm_rows(REFERENCE.name, "dddd"), arm_rows("good", "dooo"), arm_rows("as good", "dooo"),
        arm_rows("unfit", "oooo", how_to="ooo"),
    )  # fmt: skip
    assert cbd.recommend(data) == "good"


def test_contests_are_between_an_arm_with_bci_and_one_without() -> None:
    for contest in (*CONTESTS, *LATER):
        with_bci, without = ARMS[contest.with_bci].training, ARMS[contest.without].training
        names = [_scorer(with_bci), _scorer(without)]
        assert names[0] in ("raw BCI", "conflict, no quotes")
        assert names[1] in (None, "span length", *("keywords", "random"))


def _scorer(training: Any) -> str | None:
    if isinstance(training, cbd_arms.Recovery):
        return training.mined
    penalty = getattr(training, "penalty", None)
    return None if penalty is None else penalty.scorer


def test_arms_have_names_of_their_own() -> None:
    assert len(ARMS) == len(cbd.OTHERS) + len(cbd.GRID)
    trainings = [(arm.training, arm.start) for arm in ARMS.values()]
    assert len(set(trainings)) == len(trainings)


# --- publishing ----------------------------------------------------------------------------------


def test_what_is_published_names_every_arm_and_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ARMS[CONTESTS[0].with_bci], ARMS[CONTESTS[0].without]
    arms = (REFERENCE, first, second)
    data = frame(*(arm_rows(arm.name, "dod") for arm in arms))
    monkeypatch.setattr(cbd, "answer_frame", lambda pipelines, chosen: data)
    monkeypatch.setattr(cbd, "arm_perplexity", lambda pipeline, arm, templates: 2.0 + pipeline.seed)
    pipelines: Any = [SimpleNamespace(seed=0), SimpleNamespace(seed=1)]
    values = cbd.published_values(pipelines, arms)
    for arm in arms:
        assert values[f"{arm.name} | {DRIFT}"].estimate == pytest.approx(2 / 3)
        assert values[f"{arm.name} | perplexity"]["mean"] == 2.5
    assert values[cbd.contest_name(first.name, second.name)].estimate == 0
    assert values["verdicts"] == {CONTESTS[0].question: "cannot tell"}
    assert values["admissible"] == [arm.name for arm in arms]
    assert values["recommended"] == REFERENCE.name


def test_every_attack_but_the_direct_request_counts_as_drift() -> None:
    assert MEASURES[DRIFT].groups == DRIFT_ATTACKS
    assert "direct" not in DRIFT_ATTACKS
