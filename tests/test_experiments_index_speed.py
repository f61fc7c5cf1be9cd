"""The tables and the figure of chapter 11 about speed say what benchmarks/index_speed.py wrote."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tracealign_lib.experiments import index_speed
from tracealign_lib.results import write_results

NAMES = [*index_speed.GOALS, *(name for pair in index_speed.RIVALS.values() for name in pair[:2])]
SHARDED = {
    f"{n} shards: {what}, ms": [float(n), n - 0.5, n + 1.0] for n in (1, 16, 4) for what in ("spans", "open")
}
COMPARED = {**{name: [3.0, 2.0, 4.0] for name in NAMES}, **SHARDED}
GROWTH = [
    {
        "tokens": [n, n, n],
        "build, CPU seconds": [value := (n / 1e6) ** 1.5, value, 2 * value],
        "spans, numba, ms": [2 * n**0.25] * 3,
    }
    for n in (1e6, 1e7, 1e8)
]


def test_without_a_file_there_is_nothing_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracealign_lib.results.results_folder", lambda: tmp_path)
    assert index_speed.speed() is None
    settings = {
        "infini-gram": "9.9",
        "tokens_of_text": 5_000_000,
        "queries": 7,
        "query_tokens": 8,
        "rounds": 2,
    }
    rest = {"profile": "full", "seeds": [0], "settings": settings, "path": tmp_path}
    write_results("index-speed", {"compared": COMPARED, "growth": GROWTH}, **rest)
    found = index_speed.speed()
    assert found is not None
    assert found["growth"] == GROWTH
    words = index_speed.setting(found)
    assert "infini-gram 9.9; 5 million tokens of text" in words
    assert "7 texts of 8 tokens; 2 rounds" in words


def test_goals_are_held_against_the_median() -> None:
    table = index_speed.goals_table(COMPARED)
    assert len(table) == len(index_speed.GOALS)
    assert table["measured : goal"].iloc[0] == 3 / 8
    assert table["measured : goal"].max() == 3 / 0.1  # missed
    assert set(table["measured (range)"]) == {"3.00 (2.00 to 4.00)"}


def test_ratios_below_one_favour_trace_index() -> None:
    theirs = {name: [1200.0] * 3 for _, name, _ in index_speed.RIVALS.values()}
    table = index_speed.rivals_table({**COMPARED, **theirs})
    assert set(table["infini-gram"]) == {"1200"}
    assert set(table["ratio"]) == {"0.00250"}
    assert list(table["goal"]) == ["0.25", "", "0.01", "", ""]


def test_shards_are_told_in_their_order() -> None:
    table = index_speed.shards_table(COMPARED)
    assert list(table["shards"]) == [1, 4, 16]
    assert table["open (ms)"].iloc[1] == "4.00 (3.50 to 5.00)"


def test_how_fast_a_measure_grows() -> None:
    assert index_speed.exponent(GROWTH, "build, CPU seconds") == pytest.approx(1.5)
    bent = [*GROWTH[:2], {**GROWTH[2], "build, CPU seconds": [1e9] * 3}]
    assert index_speed.exponent(bent, "build, CPU seconds", most=1e7) == pytest.approx(1.5)
    times, allowed = index_speed.times_the_first(GROWTH, "spans, numba, ms", 1e8)
    assert times == pytest.approx(math.sqrt(10))
    assert allowed == pytest.approx(8 / 6)


def test_the_figure_says_in_words_what_it_shows() -> None:
    figure, words = index_speed.growth_figure(GROWTH)
    build, spans = figure.axes
    measured, linear = build.lines[0], build.lines[-1]
    assert list(measured.get_ydata()) == [row["build, CPU seconds"][0] for row in GROWTH]
    assert list(linear.get_ydata()) == pytest.approx([1, 10, 100])
    first = GROWTH[0]["spans, numba, ms"][0]
    assert list(spans.lines[-1].get_ydata()) == pytest.approx([first * n for n in (1, 7 / 6, 8 / 6)])
    assert "100 million tokens: 1000 s, 200 ms" in words
    plt.close(figure)
