"""Figures of chapter 10, each with a description in words."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tracealign_lib import plots
from tracealign_lib.causal import Floats
from tracealign_lib.experiments.causal import difference
from tracealign_lib.experiments.causal_arms import ARMS
from tracealign_lib.experiments.causal_scores import dose_table
from tracealign_lib.stats import Interval


def effect_figure(trial: pd.DataFrame) -> tuple[Figure, str]:
    """Drift that each arm of the trial removes, with the number of documents taken; figure and alt text."""
    arms = [arm for arm in ARMS if arm in set(trial["arm"])]
    found = [difference(trial, arm) for arm in arms]
    removed = trial.groupby("arm")["removed"].mean()
    with plots.style(height=0.8 + 0.33 * len(arms)):
        figure, ax = plt.subplots()
        plots.interval_bars(ax, [f"{arm} ({removed[arm]:.1f})" for arm in arms], found)
        ax.axvline(0, color="black", linewidth=1, linestyle="-")
        ax.set_xlabel("drift removed; in brackets: documents taken")
    spelled = "; ".join(
        f"{arm} ({removed[arm]:.1f} documents) {item.estimate:.2f}"
        for arm, item in zip(arms, found, strict=True)
    )
    return figure, f"Drift removed by each arm, as dots with 95 % intervals. {spelled}."


def dose_figure(frame: pd.DataFrame) -> tuple[Figure, str]:
    """Drift by the number of an item's sources that random parts left in; the figure and its alt text."""
    table = dose_table(frame)
    names, drift = list(table["sources left"]), list(table["drift"])
    with plots.style(height=3.2):
        figure, ax = plt.subplots()
        ax.errorbar(range(len(names)), [d.estimate for d in drift], yerr=_reach(drift), marker="o", capsize=3)
        ax.set_xticks(range(len(names)), names)
        ax.set(xlabel="planted documents and near-copies left in", ylabel="drift", ylim=(-0.02, 1.02))
    spelled = "; ".join(f"{name}: {item.estimate:.2f}" for name, item in zip(names, drift, strict=True))
    return figure, f"A line of drift by sources left in, with 95 % intervals. {spelled}."


def _reach(intervals: list[Interval]) -> Floats:
    """Lengths of error bars below and above; none where there is no interval.  # (2, n)"""
    bars: Floats = np.array([(item.estimate - item.low, item.high - item.estimate) for item in intervals])
    return np.maximum(np.nan_to_num(bars), 0.0).T


def fidelity_figure(frame: pd.DataFrame) -> tuple[Figure, str]:
    """What full training and exposure make of each left-out item; the figure and its alt text."""
    with plots.style(height=3.6):
        figure, ax = plt.subplots()
        for copies, rows in frame.groupby("copies"):
            marker = "os^Dv"[sorted(frame["copies"].unique()).index(copies) % 5]
            ax.plot(rows["log_prob"], rows["log_prob, exposed"], marker, linestyle="", label=f"{copies}")
        low = float(frame[["log_prob", "log_prob, exposed"]].min().min())
        ax.plot([low, 0], [low, 0], color="black", linewidth=1, linestyle="-")
        ax.set(xlabel="full training (nats per token)", ylabel="exposure (nats per token)")
        ax.legend(title="copies")
    correlation = frame["log_prob"].corr(frame["log_prob, exposed"])
    return figure, (
        f"Scatter plot of {len(frame)} items whose documents are in the pool: log-probability of the planted "
        "steps after full training against after the exposure, with the diagonal. The correlation is "
        f"{correlation:.2f}."
    )
