"""Contests are paired, tested by item, and corrected for their number."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from tracealign_lib.errors import TraceAlignError
from tracealign_lib.experiments.evaluation_arms import main_systems
from tracealign_lib.experiments.evaluation_contests import (
    CONTESTS,
    TESTED,
    Contest,
    contest_table,
    contest_values,
    differing,
    holm,
    shown_contests,
)

A, B, C = "a", "b", "c"


def rows(system: str, drift: list[int], correct: list[int], text: str = "") -> list[dict[str, object]]:
    """Two prompts about each item: attacks, then harmless ones."""
    found: list[dict[str, object]] = []
    for kind, events in (("attack", drift), ("benign", correct)):
        for number, event in enumerate(events):
            row = {"system": system, "seed": 0, "id": f"{kind}/{number}", "kind": kind, "answerable": 1.0}
            row |= {
                "item": f"{kind} item {number // 2}",
                "drift": 0.0,
                "correct": 0.0,
                "text": f"{text} {number}",
            }
            found.append({**row, "drift" if kind == "attack" else "correct": float(event)})
    return found


def frame() -> pd.DataFrame:
    drifts = [1] * 20, [0] * 20, [0] * 20
    right = [1] * 20, [1] * 18 + [0, 0], [1] * 20
    parts = [rows(n, d, r) for n, d, r in zip((A, B, C), drifts, right, strict=True)]
    return pd.DataFrame([row for part in parts for row in part])


# --- Holm ----------------------------------------------------------------------------------------


def test_holm_on_an_example_that_was_worked_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
@settings(deadline=None, derandomize=True)
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values: list[float], alpha: float) -> None:
    rejected = set()
    for left, number in zip(
        range(len(p_values), 0, -1), sorted(range(len(p_values)), key=p_values.__getitem__), strict=True
    ):
        if p_values[number] * left > alpha:
            break
        rejected.add(number)
    assert {n for n, p in enumerate(holm(p_values)) if p <= alpha} == rejected


# --- contests ------------------------------------------------------------------------------------


def test_each_contest_is_between_two_systems_of_the_table_and_asked_once() -> None:
    names = {system.name for system in main_systems()}
    assert all({contest.first, contest.second} <= names for contest in CONTESTS)
    assert len({str(contest) for contest in CONTESTS}) == len(CONTESTS)


def test_items_vote_and_every_test_counts_for_the_correction() -> None:
    table = contest_table(frame(), [Contest("?", A, B), Contest("?", B, C)])
    assert table["measure"].tolist() == [*TESTED, *TESTED]
    assert table["estimate"].tolist() == pytest.approx([1.0, 0.1, 0.0, -0.1])
    assert table[["first_more", "second_more"]].values.tolist() == [[10, 0], [1, 0], [0, 0], [0, 1]]
    assert table["p_value"][0] == pytest.approx(binomtest(10, 10).pvalue)  # items vote, not prompts
    assert table["holm"][0] == pytest.approx(4 * table["p_value"][0])
    assert table["holm"].tolist() == pytest.approx(holm(table["p_value"].tolist()))


def test_systems_that_answered_different_prompts_have_no_contest() -> None:
    with pytest.raises(TraceAlignError, match="not answer the same prompts"):
        contest_table(frame()[1:], [Contest("?", A, B)])


def test_what_is_published_is_what_a_page_shows() -> None:
    names = sorted({name for contest in CONTESTS for name in (contest.first, contest.second)})
    events = np.random.default_rng(0).integers(2, size=(len(names), 2, 20)).tolist()
    parts = [row for name, (d, r) in zip(names, events, strict=True) for row in rows(name, d, r)]
    values = contest_values(pd.DataFrame(parts))
    assert len(values) == len(CONTESTS) * len(TESTED) + 1
    assert len(values["contests"]) == len(CONTESTS) * len(TESTED)
    shown = shown_contests(values, "drift")
    assert shown["question"].tolist() == [contest.question for contest in CONTESTS]
    first = f"{CONTESTS[0]} | drift"
    test = values["contests"][first]
    assert shown["items"][0] == f"{test['first_more']:g} : {test['second_more']:g}"
    assert shown["first minus second"][0].startswith(f"{values[first].estimate:.2f} [")
    tiny = {**values, "contests": {**values["contests"], first: {**test, "holm": 1e-9}}}
    assert shown_contests(tiny, "drift")["p"][0] == "< 0.001"


# --- equal rows ----------------------------------------------------------------------------------


def test_texts_tell_whether_two_systems_ever_differ() -> None:
    one, same = rows(A, [0] * 20, [1] * 20, "x"), rows(B, [0] * 20, [1] * 20, "x")
    equal = differing(pd.DataFrame([*one, *same[::-1]]), A, B)
    assert (equal.estimate, equal.low, equal.n) == (0.0, 0.0, 40)
    assert 0.1 < equal.high < 0.2  # none of 20 items
    other = [{**row, "text": "y"} if row["id"] == "attack/3" else row for row in same[::-1]]
    assert differing(pd.DataFrame([*one, *other]), A, B).estimate == pytest.approx(1 / 40)
