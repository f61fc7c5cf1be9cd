"""Sweeps and the paper's threshold on a smoke world against plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from bci_samples import QUIET, answered_pipeline
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tracealign_lib.bci import RawBCI, max_bci
from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments import bci_paper, bci_texts
from tracealign_lib.experiments.bci_texts import FIT, NEWS, STORY, UNSAFE, BeliefText
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import clustered_bootstrap, clustered_rate, wilson


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with answered_pipeline(tmp_path_factory.mktemp("cache")) as pipeline:
        yield pipeline


@QUIET
@given(
    values=st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=15),
    clusters=st.integers(1, 5),
)
def test_many_rates_have_the_intervals_of_one(values: list[tuple[bool, float]], clusters: int) -> None:
    table = np.array(values, dtype=np.float64)
    labels = [f"c{i % clusters}" for i in range(len(table))]
    for column, interval in zip(table.T, bci_paper.clustered_rates(table, labels), strict=True):
        assert interval == pytest.approx(clustered_rate(column, labels), nan_ok=True)


def test_rates_without_exceptions_keep_an_honest_interval() -> None:
    never, always = bci_paper.clustered_rates(np.array([[0.0, 1.0]] * 6), ["a", "a", "b", "b", "c", "c"])
    assert never == (0, 0, pytest.approx(wilson(0, 3).high), 6)
    assert always == (1, pytest.approx(wilson(3, 3).low), 1, 6)


@pytest.mark.parametrize("window", [None, 5])
def test_the_sweep_gives_what_each_cell_would(pipeline: Pipeline, window: int | None) -> None:
    texts, index = bci_texts.planted_texts(pipeline)[::2], pipeline.unsafe_index
    grid = bci_paper.Grid(thresholds=(21.0, 26.0, 60.0), min_lengths=(4, 8), max_counts=(3, None))
    worlds = [(texts[::2], index), (texts[1::2], index)]
    swept = bci_paper.sweep(worlds, RawBCI(), grid, window=window)
    cells = swept.set_index(["group", "min_length", "max_count", "threshold"])["estimate"]
    assert cells.nunique() > 2
    for (group, min_length, max_count, threshold), estimate in cells.items():
        limit = None if math.isinf(max_count) else int(max_count)
        refused = [
            max_bci(
                index, index.encode(t.text), RawBCI(), min_length=min_length, max_count=limit, window=window
            )
            > threshold
            for t in texts
            if t.group == group
        ]
        assert estimate == pytest.approx(np.mean(refused))


def test_a_sweep_needs_finite_thresholds(pipeline: Pipeline) -> None:
    for thresholds in ([], [20.0, math.inf]):
        with pytest.raises(ParameterError, match="not finite"):
            bci_paper.sweep([([], pipeline.index)], RawBCI(), bci_paper.Grid(thresholds, [8], [None]))


def test_what_tau_flags_against_a_loop_over_windows(pipeline: Pipeline) -> None:
    texts, index = bci_texts.planted_texts(pipeline)[::4], pipeline.unsafe_index
    rows = bci_paper.tau_frame(bci_paper.tau_shares(texts, index, threshold=30.0, window=6, max_count=2))
    measured = rows.set_index(["group", "measure"])["estimate"]
    apart = 0  # texts with one window above and another one indexed: not refused
    for group in dict.fromkeys(t.group for t in texts):
        found = []
        for text in (t.text for t in texts if t.group == group):
            ids = index.encode(text)
            windows = [ids[i : i + 6] for i in range(len(ids) - 5)]
            above = [index.surprisal[w].sum() > 30.0 for w in windows]
            held = [0 < index.count(w) <= 2 for w in windows]
            both = [a and b for a, b in zip(above, held, strict=True)]
            apart += any(above) and any(held) and not any(both)
            found.append((np.mean(above) if above else 0, any(above), any(held), any(both)))
        expected = np.mean(np.array(found, dtype=float), axis=0)
        assert [measured[group, name] for name in bci_paper.TAU_MEASURES] == pytest.approx(expected)
    assert 0 < rows.loc[rows["measure"] == "refused", "estimate"].mean() < 1
    assert apart > 0


def test_a_text_shorter_than_a_window_has_none(pipeline: Pipeline) -> None:
    text = BeliefText(0, STORY, "d1", 0, FIT, "soup")
    rows = bci_paper.tau_frame(bci_paper.tau_shares([text], pipeline.index, window=50))
    assert rows["estimate"].tolist() == [0, 0, 0, 0]


def test_rarity_and_emission_stand_side_by_side(pipeline: Pipeline) -> None:
    rows = bci_paper.rarity_frame([pipeline]).set_index("item")
    first, second, third = pipeline.world.of_kind("unsafe")[:3]
    assert rows.loc[first.id, "drift"] == pytest.approx(2 / 3)  # one of three answers leaked another item
    assert rows.loc[second.id, "drift"] == 0  # the direct request is no attack, the other one failed
    assert rows.loc[second.id, "prompts"] == 1
    assert math.isnan(rows.loc[third.id, "drift"])
    ids = pipeline.index.encode(first.recipe)
    assert rows.loc[first.id, "bci"] == pytest.approx(pipeline.index.surprisal[ids].sum())
    assert rows.loc[first.id, "match_count"] == first.copies


def test_worlds_are_pooled_with_items_of_one_name_apart() -> None:
    measures = dict.fromkeys(bci_paper.TAU_MEASURES, 0.0)
    rows = [
        {"seed": s, "group": STORY, "item": "d1", **measures, "refused": float(s == 3)} for s in (3, 3, 4, 4)
    ]
    table = bci_paper.tau_frame(pd.DataFrame(rows)).set_index("measure")
    assert table.loc["refused", ["estimate", "low", "high", "n"]].tolist() == [0.5, 0, 1, 4]


def test_means_by_copies_leave_out_items_that_were_never_asked_about() -> None:
    items = pd.DataFrame(
        {
            "seed": 0,
            "item": list("abcd"),
            "copies": [1, 1, 4, 4],
            "bci": [10.0, 12.0, 8.0, 9.0],
            "drift": [0.0, 0.0, 0.5, math.nan],
        }
    )
    scores, drift = (
        bci_paper.copies_means(items, "bci"),
        bci_paper.copies_means(items, "drift", clustered_rate),
    )
    assert scores["copies"].tolist() == drift["copies"].tolist() == [1, 4]
    assert scores["estimate"].tolist() == [11, 8.5]
    assert scores.loc[0, ["low", "high", "n"]].tolist() == list(clustered_bootstrap([10, 12], "ab")[1:])
    assert drift[["estimate", "n"]].to_numpy().tolist() == [[0, 2], [0.5, 1]]
    assert drift.loc[0, "high"] == pytest.approx(wilson(0, 2).high)


def test_the_rank_correlation_is_spearmans_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(0)
    copies = np.repeat([1, 2, 4, 8], 8)
    items = pd.DataFrame({"copies": copies, "bci": -np.log(copies) + rng.normal(size=32), "drift": 0.0})
    measured = bci_paper.rank_correlation(items, "copies", "bci")
    assert measured.estimate == pytest.approx(spearmanr(items["copies"], items["bci"]).statistic)
    draws = [items.sample(32, replace=True, random_state=n) for n in range(1000)]
    low, high = np.quantile([spearmanr(d["copies"], d["bci"]).statistic for d in draws], [0.025, 0.975])
    assert (measured.low, measured.high) == pytest.approx((low, high), abs=0.06)
    assert measured.n == 32
    assert math.isnan(bci_paper.rank_correlation(items, "copies", "drift").estimate)  # nothing leaked


def test_the_summary_of_a_sweep_names_the_worst_group_of_each_cell() -> None:
    rows = [
        (group, 8, 3.0, threshold, share)
        for group, shares in {UNSAFE: (0.9, 0.5), STORY: (0.2, 0.1), NEWS: (0.1, 0.3)}.items()
        for threshold, share in zip((10, 20), shares, strict=True)
    ]
    swept = pd.DataFrame(rows, columns=["group", "min_length", "max_count", "threshold", "estimate"])
    summary = bci_paper.sweep_summary(swept)
    assert summary[["threshold", "caught", "worst", "worst_group"]].to_numpy().tolist() == [
        [10, 0.9, 0.2, STORY],
        [20, 0.5, 0.3, NEWS],
    ]


def test_a_published_sweep_reads_as_it_was_measured(pipeline: Pipeline) -> None:
    worlds = [(bci_texts.planted_texts(pipeline)[::2], pipeline.unsafe_index)]
    swept = bci_paper.sweep(worlds, RawBCI(), bci_paper.Grid((0, 20.5), (4, 8), (3, None)))
    headlines = bci_paper.sweep_headlines(swept)
    assert len(headlines) == 2 * 2 * 2 * 2  # cells; drift and the worst group of each
    again = bci_paper.read_sweep(headlines)
    key = ["max_count", "min_length", "threshold"]
    measured = bci_paper.sweep_summary(swept)
    pd.testing.assert_frame_equal(
        again.sort_values(key, ignore_index=True)[measured.columns],
        measured.sort_values(key, ignore_index=True),
        check_dtype=False,
    )
