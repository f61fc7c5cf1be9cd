"""Contests of chapter 9: two systems on the same prompts, and a test for each that knows of the others.

The main table has more than two hundred numbers, and none of them is tested: each has its interval, which
describes it. What is tested is the short list `CONTESTS`, on two measures. It was drawn up after a first look
at the table, so the tests are corrected for being many (Holm), and cannot be for having been chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tracealign_lib.experiments.common import short
from tracealign_lib.experiments.evaluation_arms import (
    ALL,
    BLOCK_AFTER,
    BLOCK_DECODING,
    FILTERED,
    FILTERED_ALL,
    NO_DEFENCE,
    RAW,
    RAW_ALL,
    RECOMMENDED,
    RECOVERY_RIVAL,
)
from tracealign_lib.metrics import clusters, paired_table
from tracealign_lib.stats import Interval, clustered_rate


class Contest(NamedTuple):
    """Two systems that one question sets against each other; both are names of `System`."""

    question: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.first} minus {self.second}"


CONTESTS = (
    Contest("What does M(q) <= 3 change, all three?", FILTERED_ALL, RAW_ALL),
    Contest("And in the shield?", f"{FILTERED}: shield", f"{RAW}: shield"),
    Contest("And in decoding?", f"{FILTERED}: decoding", f"{RAW}: decoding"),
    Contest("All three: recommended or raw?", ALL, RAW_ALL),
    Contest("Training: recommended or raw?", f"{RECOMMENDED}: training", f"{RAW}: training"),
    Contest(
        "What does training add to a redirect?",
        f"{RECOMMENDED}: training + decoding",
        f"{RECOMMENDED}: decoding",
    ),
    Contest("What does a veto add to a shield?", f"{RAW}: shield + decoding", f"{RAW}: shield"),
    Contest("An n-gram block list in place of the shield?", BLOCK_AFTER, f"{RECOMMENDED}: shield"),
    Contest("An n-gram block list in place of the veto?", BLOCK_DECODING, f"{RAW}: decoding"),
    Contest("A bag of words in place of the shield?", "classifier filter", f"{RECOMMENDED}: shield"),
    Contest("Recovery without corpus or score?", RECOVERY_RIVAL, f"{RECOMMENDED}: training"),
    Contest("Unlikelihood in place of the CBD loss?", "unlikelihood training", f"{RAW}: training"),
    Contest("What does expert mixing do?", "expert mixing", NO_DEFENCE),
)
"""What is tested on the published worlds."""
TESTED = ("drift", "benign accuracy")
"""The measures on which each contest is tested: one of safety, one of its price."""


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: rejecting those below alpha errs anywhere in the family with probability alpha.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none falls below the one before it.
    Nothing is assumed about how the tests depend on each other.

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    values = np.asarray(p_values, dtype=np.float64)  # (m,)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(steps, 1.0)
    return [float(value) for value in adjusted]


def contest_table(frame: pd.DataFrame, contests: Sequence[Contest] = CONTESTS) -> pd.DataFrame:
    """Every contest on every measure of `TESTED`, from `Frames.main`.

    Returns
    -------
    DataFrame
        question, first, second, measure; the paired difference with its interval by item (the fields of
        `Interval`); first_more and second_more, items in which the event is more frequent under one of them;
        p_value, McNemar's exact test in which each item votes once; and holm, the same adjusted for all rows
        of the table together.

    Raises
    ------
    ParameterError
        The two systems of a contest did not answer the same prompts.
    """
    parts = dict(list(frame.groupby("system", sort=False)))
    rows = [
        (*contest, *row)
        for contest in contests
        for row in paired_table(parts[contest.first], parts[contest.second], TESTED)[_TAKEN].itertuples(
            index=False, name=None
        )
    ]
    table = pd.DataFrame(rows, columns=[*Contest._fields, *_TAKEN])
    return table.assign(holm=holm(table["p_value"]))


_TAKEN = ["measure", *Interval._fields, "first_more", "second_more", "p_value"]


def contest_values(frame: pd.DataFrame) -> dict[str, Any]:
    """`contest_table` as headlines, "first minus second | measure" and under "contests" the tests.

    The difference is an `Interval`; a test holds items (first_more, second_more), p_value and holm.
    """
    table = contest_table(frame)
    names = [f"{row.first} minus {row.second} | {row.measure}" for row in table.itertuples()]
    intervals = table[list(Interval._fields)].itertuples(index=False, name=None)
    votes = table[_VOTES].to_dict("records")
    tests = [{name: float(f"{value:.4g}") for name, value in vote.items()} for vote in votes]
    return {
        **{name: Interval(*row) for name, row in zip(names, intervals, strict=True)},
        "contests": dict(zip(names, tests, strict=True)),
    }


_VOTES = ["first_more", "second_more", "p_value", "holm"]


def shown_contests(values: Mapping[str, Any], measure: str) -> pd.DataFrame:
    """One row for each contest, as a page shows it; `values` are those of `contest_values`, or published."""
    rows = []
    for contest in CONTESTS:
        name = f"{contest} | {measure}"
        test = values["contests"][name]
        votes = f"{test['first_more']:g} : {test['second_more']:g}"
        rows.append((*contest, short(values[name]), votes, _probability(test["holm"])))
    return pd.DataFrame(rows, columns=["question", "first", "second", "first minus second", "items", "p"])


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def differing(frame: pd.DataFrame, first: str, second: str) -> Interval:
    """The share of prompts that two systems answer with different texts.

    Where they never do, the upper bound is Wilson's for none of as many items: how often they may differ on
    items that were not asked about.
    """
    one, other = (frame[frame["system"] == name].set_index(["seed", "id"]) for name in (first, second))
    changed = (one["text"] != other["text"].reindex(one.index)).astype(float)
    return clustered_rate(changed.to_numpy(), clusters(one.reset_index()))
