"""The tables and the figure of chapter 11 about speed say what benchmarks/index_speed.py wrote."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tracealign_lib.experiments import index_speed
from tracealign_lib.results import write_results

MEASURED = dict.fromkeys([*index_speed.GOALS, *sum(index_speed.RIVALS.values(), ())], 3.0)
GROWTH = [
    {"tokens": n, "build, CPU seconds": (n / 1e6) ** 1.5, "spans, numba, ms": 2 * n**0.25}
    for n in (10**6, 10**7, 10**8)
]


def test_without_a_file_there_is_nothing_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracealign_lib.results.results_folder", lambda: tmp_path)
    assert index_speed.speed() is None
    rest = {"profile": "full", "seeds": [0], "settings": {}, "path": tmp_path}
    write_results("index-speed", {**MEASURED, "growth": GROWTH}, **rest)
    found = index_speed.speed()
    assert found is not None
    assert found["growth"] == GROWTH


def test_goals_are_held_against_what_was_measured() -> None:
    table = index_speed.goals_table(MEASURED).set_index("")
    assert list(table.index) == list(index_speed.GOALS)
    assert table.loc["build, seconds", "measured : goal"] == 3 / 8
    assert table.loc["spans, numba, ms", "measured : goal"] == 12  # missed
    assert set(table["measured"]) == {"3"}


def test_ratios_below_one_favour_trace_index() -> None:
    theirs = {name: 12.0 for _, name in index_speed.RIVALS.values()}
    table = index_speed.rivals_table({**MEASURED, **theirs})
    assert set(table["TraceIndex"]) == {"3"}
    assert set(table["infini-gram"]) == {"12"}
    assert set(table["ratio"]) == {"0.25"}


def test_the_exponent_is_that_of_a_power() -> None:
    assert index_speed.exponent(GROWTH, "build, CPU seconds") == pytest.approx(1.5)
    assert index_speed.exponent(GROWTH, "spans, numba, ms") == pytest.approx(0.25)


def test_the_figure_says_in_words_what_it_shows() -> None:
    figure, words = index_speed.growth_figure(GROWTH)
    left, right = figure.axes
    assert list(left.lines[0].get_ydata()) == [row["build, CPU seconds"] for row in GROWTH]
    assert list(left.lines[1].get_ydata()) == pytest.approx([1, 10, 100])  # linear from the first
    assert list(right.lines[1].get_ydata()) == pytest.approx(
        [GROWTH[0]["spans, numba, ms"] * n for n in (1, 7 / 6, 8 / 6)]
    )
    assert "100 million tokens: 1e+03 s, 2e+02 ms" in words
    plt.close(figure)
