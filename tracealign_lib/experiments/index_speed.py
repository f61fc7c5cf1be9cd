"""How fast a TraceIndex is built and searched, as benchmarks/index_speed.py measured it for chapter 11."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from tracealign_lib import plots
from tracealign_lib.errors import ResultsError
from tracealign_lib.results import Results, load_results

Rounds = Sequence[float]
"""Median, least and greatest value of several rounds."""
Row = Mapping[str, Rounds]

GOALS: Mapping[str, tuple[str, float]] = {
    "build, seconds": ("build from token ids (s)", 8),
    "build, peak bytes a token": ("memory of the build, above its input (bytes a token)", 10.5),
    "size, bytes a token": ("arrays on disk (bytes a token)", 6.2),
    "spans, numba, ms": ("spans of a text, compiled loops (ms)", 0.25),
    "spans, numba, ms, 95th percentile": ("the same, 95th percentile of texts (ms)", 0.5),
    "spans, numpy, ms": ("spans of a text without numba (ms)", 3),
    "step from kept intervals, ms": ("decoding step from kept intervals (ms)", 0.1),
    "longest suffix of 4 beams, ms": ("intervals of 4 beams found anew (ms)", 0.5),
    "open, ms": ("open (ms)", 2),
    "first query when cold, ms": ("first answer, nothing in memory (ms)", 50),
}
"""What was asked of an index of 50 million tokens before it was written, on two cores; at most."""

RIVALS: Mapping[str, tuple[str, str, float | None]] = {
    "build, CPU time (s)": ("build, CPU seconds", "infini-gram: build, CPU seconds", 0.25),
    "build, one core against two (s)": ("build, seconds", "infini-gram: build, seconds", None),
    "spans alone, CPU time (ms)": ("spans, numba, CPU ms", "infini-gram: no places, CPU ms", 0.01),
    "spans and all their places, CPU time (ms)": (
        "spans and all places, CPU ms",
        "infini-gram: all places, CPU ms",
        None,
    ),
    "arrays on disk (bytes a token)": ("size, bytes a token", "infini-gram: size, bytes a token", None),
}
"""What is compared: the measure of TraceIndex, that of infini-gram, and the goal of their ratio."""


def speed() -> Results | None:
    """What benchmarks/index_speed.py measured; None where it never ran."""
    try:
        return load_results("index-speed")
    except ResultsError:
        return None


def setting(measured: Results) -> str:
    """On what, of what and when it was measured."""
    machine, settings = measured.provenance, measured.settings
    return (
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory']:.0f} GiB; "
        f"infini-gram {settings['infini-gram']}; {settings['tokens_of_text'] / 1e6:.0f} million tokens of "
        f"text, and beyond them copies with shuffled ids; {settings['queries']} texts of "
        f"{settings['query_tokens']} tokens; {settings['rounds']} rounds"
    )


def goals_table(compared: Row) -> pd.DataFrame:
    """Each goal beside what was measured; the last column says by how much it was missed or undercut."""
    rows = []
    for measure, (name, goal) in GOALS.items():
        texts = {"": name, "goal, at most": f"{goal:g}", "measured (range)": _spelled(compared[measure])}
        rows.append({**texts, "measured : goal": compared[measure][0] / goal})
    return pd.DataFrame(rows)


def rivals_table(compared: Row) -> pd.DataFrame:
    """TraceIndex beside infini-gram on the same tokens and texts; a ratio below 1 favours TraceIndex."""
    rows = []
    for name, (ours, theirs, goal) in RIVALS.items():
        row = {"": name, "TraceIndex": _spelled(compared[ours]), "infini-gram": _spelled(compared[theirs])}
        row["ratio"] = _plain(compared[ours][0] / compared[theirs][0])
        rows.append({**row, "goal": "" if goal is None else f"{goal:g}"})
    return pd.DataFrame(rows)


def shards_table(compared: Row) -> pd.DataFrame:
    """What the number of shards costs a query and the opening of one and the same corpus."""
    numbers = sorted(int(name.split()[0]) for name in compared if name.endswith(" shards: open, ms"))
    rows = []
    for number in numbers:
        times = {what: _spelled(compared[f"{number} shards: {what}, ms"]) for what in ("spans", "open")}
        rows.append({"shards": number, "spans of a text (ms)": times["spans"], "open (ms)": times["open"]})
    return pd.DataFrame(rows)


def _plain(value: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _spelled(rounds: Rounds) -> str:
    middle, least, greatest = map(_plain, rounds)
    return middle if least == greatest else f"{middle} ({least} to {greatest})"


def exponent(growth: Sequence[Row], measure: str, *, most: float = math.inf) -> float:
    """With which power of the corpus's size a measure grows, up to `most` tokens.

    It is the slope of a line through the logarithms of the medians.
    """
    rows = [row for row in growth if row["tokens"][0] <= most]
    tokens, values = (np.log([row[name][0] for row in rows]) for name in ("tokens", measure))
    return float(np.polyfit(tokens, values, 1)[0])


def times_the_first(growth: Sequence[Row], measure: str, tokens: float) -> tuple[float, float]:
    """How many times the first size's value that of `tokens` is, and what a logarithm would allow."""
    first, other = growth[0], next(row for row in growth if row["tokens"][0] == tokens)
    return other[measure][0] / first[measure][0], math.log(tokens) / math.log(first["tokens"][0])


def growth_figure(growth: Sequence[Row]) -> tuple[Figure, str]:
    """Time of a build and of a query by size of the corpus; the figure and its alt text."""
    tokens = [row["tokens"][0] / 1e6 for row in growth]
    build, spans = ([row[name] for row in growth] for name in ("build, CPU seconds", "spans, numba, ms"))
    linear = [build[0][0] / tokens[0] * n for n in tokens]
    logarithmic = [spans[0][0] * math.log(1e6 * n) / math.log(1e6 * tokens[0]) for n in tokens]
    with plots.style(height=5.6):
        figure, axes = plt.subplots(2, 1, sharex=True)
        _panel(axes[0], tokens, build, linear, "linear from the first")
        _panel(axes[1], tokens, spans, logarithmic, "logarithmic from the first")
        axes[0].set(yscale="log", ylabel="CPU seconds of a build")
        axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[1].set(xlabel="million tokens", ylabel="ms for the spans of a text")
        axes[1].set_ylim(bottom=0)
    described = "; ".join(
        f"{n:g} million tokens: {_plain(b[0])} s, {_plain(q[0])} ms"
        for n, b, q in zip(tokens, build, spans, strict=True)
    )
    words = "CPU time of a build, with a line for linear growth; of a query, with one for logarithmic"
    return figure, f"{words}. {described}."


def _panel(ax: Any, tokens: list[float], rounds: list[Rounds], theory: list[float], name: str) -> None:
    middle, least, greatest = np.array(rounds).T
    ax.errorbar(
        tokens, middle, yerr=[middle - least, greatest - middle], marker="o", label="measured (range)"
    )
    ax.plot(tokens, theory, color="grey", linewidth=1, label=name)
    ax.set(xscale="log")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.legend(loc="upper left", frameon=False)
