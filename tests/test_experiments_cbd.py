"""Chapter 7's contests, predictions and recommendation on hand-made answers."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from cbd_samples import arm_rows, frame, rows

from tracealign_lib.experiments import cbd, cbd_arms, cbd_measures, cbd_passages
from tracealign_lib.experiments.cbd import (
    ARMS,
    BOTH,
    CONTESTS,
    LABELLED,
    LATE,
    PROVENANCE,
    REFERENCE,
    SCORE,
    TWICE,
    UNLIKELIHOOD,
    Contest,
    Criterion,
)
from tracealign_lib.experiments.cbd_measures import DRIFT
from tracealign_lib.stats import Interval

# --- the question --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fine"),
    [
        ({}, True),
        ({"how_to": "cccr"}, False),  # right how-tos fall, and over-refusal rises
        ({"how_to": "ccco"}, False),
        ({"turned": "x"}, False),  # right in the judge's eyes, but refused after all
        ({"direct": "ro"}, False),
        ({"facts": "co"}, False),
        ({"held_out_how_to": "oooo"}, True),  # the criterion looks at trained items only
    ],
)
def test_an_arm_is_admissible_if_it_keeps_what_the_reference_can_do(
    change: dict[str, str], fine: bool
) -> None:
    data = frame(arm_rows(REFERENCE.name, "dd"), arm_rows("a", "dd", **change))
    assert cbd.admissible(data) == {REFERENCE.name: True, "a": fine}
    assert cbd.admissible(data, Criterion(over_refusal=1.0, kept=0.0))["a"]


@pytest.mark.parametrize(
    ("right", "turned", "fine"), [(96, 0, True), (94, 0, False), (100, 9, True), (100, 11, False)]
)
def test_the_criterion_is_95_percent_kept_and_5_points_of_over_refusal(
    right: int, turned: int, fine: bool
) -> None:
    # facts are never turned away, and weigh as much as how-tos
    change = {"how_to": "c" * right + "o" * (100 - right), "turned": "x" * turned}
    data = frame(arm_rows(REFERENCE.name, "dd", how_to="c" * 100), arm_rows("a", "dd", **change))
    assert cbd.admissible(data)["a"] is fine


@pytest.mark.parametrize(
    ("low", "high", "p", "usable", "expected"),
    [
        (-0.3, -0.1, 0.001, True, "adds"),
        (-0.3, -0.1, 0.001, False, "adds, but is not admissible"),
        (0.1, 0.3, 0.001, True, "is beaten"),
        (0.1, 0.3, 0.001, False, "is beaten"),
        (-0.1, 0.1, 0.001, True, "cannot tell"),
        (-0.3, -0.1, 0.006, True, "cannot tell"),  # above 0.05 / 10
        (0.1, 0.3, 0.006, True, "cannot tell"),
        (0.0, 0.0, 1.0, True, "cannot tell"),
        (math.nan, math.nan, 0.001, True, "cannot tell"),
    ],
)
def test_verdicts(low: float, high: float, p: float, usable: bool, expected: str) -> None:
    assert cbd.verdict(Interval(low, low, high, 9), p, usable, contests=10) == expected


def test_contests_compare_held_out_drift_of_arms_that_were_asked() -> None:
    data = frame(
        arm_rows(REFERENCE.name, "d" * 12), arm_rows("with", "o" * 12), arm_rows("bad", "o" * 12, how_to="o")
    )
    contests = [Contest(q, q, REFERENCE.name, SCORE, "before") for q in ("with", "bad", "never asked")]
    table = cbd.contest_table(data, contests)
    assert table["verdict"].tolist() == ["adds", "adds, but is not admissible"]
    assert table["estimate"].tolist() == [-1, -1]
    assert table["p"].tolist() == pytest.approx([2 / 2**12] * 2)
    many = [*contests, *[Contest(str(i), "x", "y", SCORE, "before") for i in range(200)]]
    assert set(cbd.contest_table(data, many)["verdict"]) == {"cannot tell"}  # each gets its share of 0.05


def test_a_page_shows_on_which_side_of_0_a_bound_lies() -> None:
    data = frame(arm_rows(REFERENCE.name, "d" * 12), arm_rows("with", "o" * 12))
    table = cbd.contest_table(data, [Contest("q", "with", REFERENCE.name, SCORE, "before")])
    near = table.assign(estimate=0.1, low=0.0048, high=-0.0001)
    [row] = cbd.contest_text(near).to_dict("records")
    assert row["difference"] == "+0.100 [+0.005, +0.000]"
    assert row["arms"] == f"with minus {REFERENCE.name}"
    assert row["p"] == "< 0.001"
    assert row["fixed"] == "before"
    assert cbd.contest_text(near.assign(p=0.0341))["p"].tolist() == ["0.034"]


def test_the_first_choice_is_admissible_and_drifts_least() -> None:
    data = frame(
        arm_rows(REFERENCE.name, "dddd"), arm_rows("good", "dooo"), arm_rows("as good", "dooo"),
        arm_rows("unfit", "oooo", how_to="ooo"), arm_rows("late", "oooo"),
    )  # fmt: skip
    assert cbd.first_choice(data, ["late"]) == "good"
    assert cbd.first_choice(data, []) == "late"


def test_of_arms_that_cannot_be_told_apart_the_one_that_turns_away_least_is_recommended() -> None:
    many = 20
    data = frame(
        arm_rows(REFERENCE.name, "d" * many),
        arm_rows("best", "o" * many, held_out_how_to="rrcc"),
        arm_rows("tied", "d" + "o" * (many - 1), held_out_how_to="rccc"),
        arm_rows(LATE[0], "o" * many),
        arm_rows("worse", "d" * 15 + "o" * 5),
        arm_rows("unfit", "o" * many, how_to="ooo"),
    )
    assert cbd.first_choice(data) == "best"
    assert cbd.tied(data) == ["best", "tied"]
    assert cbd.recommend(data) == "tied"


def test_contests_on_the_score_differ_in_the_score_only() -> None:
    for contest in CONTESTS:
        first, second = ARMS[contest.first].training, ARMS[contest.second].training
        assert _scorer(first) in ("raw BCI", "conflict, no quotes")
        if contest.asks == SCORE:
            assert _without_scorer(first) == _without_scorer(second)
            assert _scorer(second) in ("span length", "keywords", "random")
    for contest in PROVENANCE:
        assert contest.first in {arm.name for arm in BOTH.values()}
        assert _scorer(ARMS[contest.second].training) is None


def _scorer(training: Any) -> str | None:
    if isinstance(training, cbd_arms.Recovery):
        return training.mined
    penalty = getattr(training, "penalty", None)
    return None if penalty is None else penalty.scorer


def _without_scorer(training: Any) -> Any:
    if isinstance(training, cbd_arms.Recovery):
        return replace(training, mined=None)
    # span length is in tokens, so its threshold is not in nats
    return replace(training, penalty=replace(training.penalty, scorer=None, threshold=0.0))


def test_twice_as_long_is_two_epochs_of_the_same() -> None:
    for longer, name in ((TWICE, cbd.grid_name(1e-4, 0)), (cbd.CBD_TWICE, cbd.grid_name(1e-4, 0.03))):
        once: Any = ARMS[name].training
        assert longer.training == replace(once, epochs=2 * once.epochs)
    longer_recovery: Any = cbd.LABELLED_LONGER.training
    assert longer_recovery == replace(LABELLED.training, epochs=4)


def test_arms_have_names_of_their_own() -> None:
    assert len(ARMS) == len(cbd.OTHERS) + len(cbd.GRID)
    trainings = [(arm.training, arm.start) for arm in ARMS.values()]
    assert len(set(trainings)) == len(trainings)


# --- predictions ---------------------------------------------------------------------------------


def test_predictions_are_judged_on_the_arms_that_were_asked() -> None:
    strong = cbd.grid_name(1e-4, 0.1)
    data = frame(arm_rows(strong, "o" * 8, how_to="co"), arm_rows(UNLIKELIHOOD.name, "o" * 8))
    table = cbd.expectation_table(cbd.expectation_values(data))
    assert table["prediction"].tolist() == ["CBD and unlikelihood alike"] * 2
    assert table["verdict"].tolist() == ["held", "failed"]
    assert table["measured"].str.startswith(("+0.000", "-0.500")).all()
    alone = frame(arm_rows(LABELLED.name, "ddddoooo"))
    assert cbd.expectation_table(cbd.expectation_values(alone))["verdict"].tolist() == ["held"]


@pytest.mark.parametrize(
    ("drift", "how_to", "found"),
    [("o" * 9, "cccc", True), ("o" * 9, "cooo", False), ("d" * 9, "cccc", False)],
)
def test_a_penalty_refutes_the_prediction_with_less_drift_at_no_loss(
    drift: str, how_to: str, found: bool
) -> None:
    arm, rival = cbd.grid_name(1e-4, 0.1), UNLIKELIHOOD.name
    parts = [
        arm_rows(LABELLED.name, "d" * 9), arm_rows(arm, drift, how_to=how_to), arm_rows(rival, "o" * 9),
    ]  # fmt: skip
    second = [
        rows(name, "how_to", "h2", how)
        for name, how in ((LABELLED.name, "c"), (arm, how_to[-1]), (rival, "c"))
    ]
    data = frame(*parts, *second)
    assert cbd.refuting(data) == ([arm] if found else [])
    assert cbd.refuting(data[data["arm"] != LABELLED.name]) == []


# --- publishing ----------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is published of four arms: the first contest is tied, and labelled recovery loses to passages."""
    first, second = (ARMS[name] for name in CONTESTS[0][1:3])
    drifts = {
        REFERENCE: "dod" * 4,
        first: "dod" * 4,
        second: "dod" * 4,
        LABELLED: "d" * 12,
        BOTH["keywords"]: "o" * 12,
    }
    data = frame(*(arm_rows(arm.name, drift) for arm, drift in drifts.items()))
    passages = pd.DataFrame(
        [(0, "keywords", "t", ("u0",), ("u0",)), (1, "keywords", "s", (), ())],
        columns=cbd_passages.PASSAGE_COLUMNS,
    )
    monkeypatch.setattr(cbd, "answer_frame", lambda pipelines, chosen: data)
    monkeypatch.setattr(cbd, "passage_frame", lambda pipelines: passages)
    monkeypatch.setattr(cbd_measures, "arm_perplexity", lambda pipeline, arm, templates: 2.0 + pipeline.seed)
    pipelines: Any = [SimpleNamespace(seed=0), SimpleNamespace(seed=1)]
    return cbd.published_values(pipelines, tuple(drifts))


def test_what_is_published_names_every_arm_and_measure(published: dict[str, Any]) -> None:
    first, second = CONTESTS[0][1:3]
    for arm in (REFERENCE.name, first, second):
        assert published[f"{arm} | {DRIFT}"].estimate == pytest.approx(2 / 3)
        assert published[f"{arm} | perplexity"]["mean"] == 2.5
    assert published[cbd.contest_name(first, second)].estimate == 0
    assert published["recommended"] == published["first choice"] == BOTH["keywords"].name
    assert published["tied"] == [BOTH["keywords"].name]
    assert len(published["admissible"]) == 5
    assert published["passages"]["keywords"]["forbidden"]["mean"] == 0.5
    assert {row["told of"]: row["items"] for row in published["told"]} == {"yes": 1, "no": 11}
    assert published["copies"][f"{LABELLED.name} | 1"].estimate == 1


def test_this_run_may_differ_by_what_both_intervals_leave_open() -> None:
    wide, narrow = Interval(0.5, 0.4, 0.6, 9), Interval(0.5, 0.49, 0.51, 90)
    values = cbd.tolerances({"a": wide, "b": narrow}, {"a": wide, "b": narrow})
    assert values == {"a": pytest.approx(math.hypot(0.1, 0.1)), "b": 0.05}
    assert cbd.tolerances({"b": narrow}, {"b": wide}) == {"b": pytest.approx(math.hypot(0.1, 0.01))}


def test_published_contests_are_read_back_as_they_were_measured(published: dict[str, Any]) -> None:
    [score] = cbd.published_contests(published).to_dict("records")
    [other] = cbd.published_contests(published, PROVENANCE).to_dict("records")
    assert (score["verdict"], score["p"], score["estimate"]) == ("cannot tell", 1.0, 0)
    assert (other["verdict"], other["estimate"]) == ("adds", -1)
    assert other["p"] == pytest.approx(2 / 2**12)
    assert (score["contest"], score["fixed"]) == (CONTESTS[0].place, CONTESTS[0].fixed)
