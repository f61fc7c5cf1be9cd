"""Figures of chapter 9, each with the text that a reader hears who cannot see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from tracealign_lib import plots
from tracealign_lib.evaluate import NONE
from tracealign_lib.experiments.evaluation_arms import FILTERED, RAW, RECOMMENDED, RIVAL, System
from tracealign_lib.stats import Interval

_TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1)
COST, DRIFT = "over-refusal", "drift"
"""The two axes of the trade-off: what a defence costs, and what it leaves."""
_LOOKS: Mapping[str, tuple[str, str]] = {
    NONE: ("*", plots.PALETTE[4]),
    RAW: ("s", plots.PALETTE[1]),
    FILTERED: ("D", plots.PALETTE[3]),
    RECOMMENDED: ("o", plots.PALETTE[0]),
    RIVAL: ("^", plots.PALETTE[2]),
}


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other equals in one coordinate and undercuts in the other, left first.

    Both coordinates are costs. Of equal points all are named.
    """
    kept = [
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    ]
    return sorted(kept, key=lambda name: points[name])


def pareto_figure(values: Mapping[str, Interval], systems: Sequence[System]) -> tuple[Figure, str]:
    """Drift left against harmless prompts refused, for every system, and the front of those not dominated.

    `values` are headlines "system | measure". Axes are stretched near 0, where most points lie.
    """
    points = {s.name: (_value(values, s.name, COST), _value(values, s.name, DRIFT)) for s in systems}
    front = pareto_front(points)
    with plots.style(height=6.4):
        figure, ax = plt.subplots()
        for number, system in enumerate(systems, 1):
            marker, colour = _LOOKS[system.scorers]
            x, y = points[system.name]
            for measure, axis in ((COST, "x"), (DRIFT, "y")):
                _bar(ax, values[f"{system.name} | {measure}"], x, y, axis, colour)
            look: dict[str, Any] = {"color": colour, "linestyle": "", "clip_on": False}
            ax.plot([x], [y], marker, label=f"{number}  {system.name}", **look)
        for point, numbers in _together(points).items():
            ax.annotate(numbers, point, xytext=(4, 4), textcoords="offset points", fontsize="x-small")
        ax.plot(*np.transpose([points[name] for name in front]), color="#8a8f98", linestyle=":", zorder=0)
        for scale in (ax.set_xscale, ax.set_yscale):
            scale("function", functions=(_root, np.square))
        ax.set(xlabel="harmless prompts refused (share)", ylabel="drift under attack (share)")
        ax.set(xticks=_TICKS, yticks=_TICKS)
        ax.set_xlim(0, 1.02 * max(0.1, *(values[f"{s.name} | {COST}"].high for s in systems)))
        ax.set_ylim(0, 1.02 * max(0.1, *(values[f"{s.name} | {DRIFT}"].high for s in systems)))
        figure.legend(loc="outside lower left", fontsize="x-small", ncols=2, markerscale=0.8)
    told = "; ".join(f"{name}: {x:.2f} and {y:.2f}" for name, (x, y) in points.items())
    return figure, (
        "Every defence as a point: harmless prompts refused, and drift under attack. "
        f"{told}. No other defence is better in both than these: {', '.join(front)}."
    )


def _together(points: Mapping[str, tuple[float, float]]) -> dict[tuple[float, float], str]:
    """The numbers of the points at each place, counted from 1; equal points share a label."""
    labels: dict[tuple[float, float], str] = {}
    for number, point in enumerate(points.values(), 1):
        labels[point] = f"{labels[point]}, {number}" if point in labels else str(number)
    return labels


def _root(values: Any) -> Any:
    return np.sqrt(np.maximum(values, 0.0))


def _value(values: Mapping[str, Interval], system: str, measure: str) -> float:
    return values[f"{system} | {measure}"].estimate


def _bar(ax: Any, interval: Interval, x: float, y: float, axis: str, colour: str) -> None:
    ends = [interval.low, interval.high]
    horizontal, vertical = (ends, [y, y]) if axis == "x" else ([x, x], ends)
    ax.plot(horizontal, vertical, color=colour, linewidth=1.2, alpha=0.35, linestyle="-", marker="")
