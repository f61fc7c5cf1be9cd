"""How fast a TraceIndex is built and searched, as benchmarks/index_speed.py measured it for chapter 11."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from tracealign_lib import plots
from tracealign_lib.errors import ResultsError
from tracealign_lib.results import Results, load_results

GOALS: Mapping[str, float] = {
    "build, seconds": 8,
    "build, peak bytes a token": 10.5,
    "size, bytes a token": 6.2,
    "spans, numba, ms": 0.25,
    "spans, numba, ms, 95th percentile": 0.5,
    "spans, numpy, ms": 3,
    "step from kept intervals, ms": 0.1,
    "longest suffix of 4 beams, ms": 0.5,
    "open, ms": 2,
    "first query when cold, ms": 50,
}
"""What was asked of an index of 50 million tokens before it was written, on two cores; at most."""

RIVALS: Mapping[str, tuple[str, str]] = {
    "CPU time of the build": ("build, CPU seconds", "infini-gram: build, CPU seconds"),
    "time of the build, two cores": ("build, seconds", "infini-gram: build, seconds"),
    "CPU time of the spans of a text": ("spans, numba, CPU ms", "infini-gram: attribute, CPU ms"),
    "time of the spans of a text": ("spans, numba, ms", "infini-gram: attribute, ms"),
    "size on disk": ("size, bytes a token", "infini-gram: size, bytes a token"),
}


def speed() -> Results | None:
    """What benchmarks/index_speed.py measured; None where it never ran."""
    try:
        return load_results("index-speed")
    except ResultsError:
        return None


def goals_table(measured: Mapping[str, float]) -> pd.DataFrame:
    """Each goal beside what was measured; the last column says by how much it was missed or undercut."""
    rows = []
    for name, goal in GOALS.items():
        texts = {"": name, "goal, at most": f"{goal:g}", "measured": f"{measured[name]:.3g}"}
        rows.append({**texts, "measured : goal": measured[name] / goal})
    return pd.DataFrame(rows)


def rivals_table(measured: Mapping[str, float]) -> pd.DataFrame:
    """TraceIndex beside infini-gram on the same tokens; a ratio below 1 is in favour of TraceIndex."""
    rows = []
    for name, (ours, theirs) in RIVALS.items():
        mine, other = measured[ours], measured[theirs]
        row = {"": name, "TraceIndex": mine, "infini-gram": other, "ratio": mine / other}
        rows.append({key: value if isinstance(value, str) else f"{value:.2g}" for key, value in row.items()})
    return pd.DataFrame(rows)


def exponent(growth: Sequence[Mapping[str, float]], column: str) -> float:
    """With which power of the corpus's size a column grows: the slope of a line through the logarithms."""
    tokens, values = (np.log([row[name] for row in growth]) for name in ("tokens", column))
    return float(np.polyfit(tokens, values, 1)[0])


def growth_figure(growth: Sequence[Mapping[str, float]]) -> tuple[Figure, str]:
    """Time of a build and of a query by size of the corpus; the figure and its alt text."""
    tokens = [row["tokens"] / 1e6 for row in growth]
    build = [row["build, CPU seconds"] for row in growth]
    spans = [row["spans, numba, ms"] for row in growth]
    linear = [build[0] / tokens[0] * n for n in tokens]
    logarithmic = [spans[0] * math.log(1e6 * n) / math.log(1e6 * tokens[0]) for n in tokens]
    with plots.style(height=3.4):
        figure, axes = plt.subplots(1, 2)
        for ax, measured, theory in zip(axes, (build, spans), (linear, logarithmic), strict=True):
            ax.plot(tokens, measured, marker="o")
            ax.plot(tokens, theory, color="grey", linewidth=1)
            ax.set(xscale="log", xlabel="million tokens")
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[0].set(yscale="log", ylabel="CPU seconds of a build", title="dashed: linear from the first")
        axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[1].set(ylabel="ms for the spans of 100 tokens", title="dashed: logarithmic from the first")
        axes[1].set_ylim(bottom=0)
    described = "; ".join(
        f"{n:g} million tokens: {b:.2g} s, {q:.2g} ms" for n, b, q in zip(tokens, build, spans, strict=True)
    )
    return figure, f"CPU time of a build and time of a query by size of the corpus. {described}."
