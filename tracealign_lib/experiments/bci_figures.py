"""Figures of chapter 4, each with the text that a reader hears who cannot see it."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tracealign_lib import plots
from tracealign_lib.experiments.bci_paper import copies_means, sweep_summary
from tracealign_lib.experiments.bci_scores import PAPER_WINDOW
from tracealign_lib.experiments.common import PAPER_MAX_COUNT, PAPER_TAU
from tracealign_lib.stats import clustered_rate

TAU_SHOWN = {
    "windows above": "windows above the threshold, indexed or not",
    "any window indexed": "texts with a window that is indexed",
    "refused": "texts with a window that is both: refused",
}
"""The measures of `bci_paper.tau_frame` that its figure shows, and what a legend calls them."""


def tau_figure(table: pd.DataFrame) -> tuple[Figure, str]:
    """What a threshold flags, group by group, from `bci_paper.tau_frame`; the figure and its alt text."""
    groups = list(dict.fromkeys(table["group"]))
    with plots.style(height=0.55 * len(groups) + 1.1):
        figure, ax = plt.subplots()
        for number, (measure, label) in enumerate(TAU_SHOWN.items()):
            part = table[table["measure"] == measure].set_index("group").loc[groups]
            rows = np.arange(len(groups)) + 0.24 * (number - 1)
            colour, marker = plots.PALETTE[number], "osD"[number]
            ax.hlines(rows, part["low"], part["high"], color=colour, linewidth=3, alpha=0.5)
            ax.plot(part["estimate"], rows, marker, color=colour, label=label, linestyle="")
        ax.set_yticks(range(len(groups)), groups)
        ax.set_ylim(len(groups) - 0.5, -0.5)
        ax.set(xlim=(-0.03, 1.03), xlabel="share, with 95 % intervals by item")
        figure.legend(loc="outside upper left", fontsize="small")
    spelled = "; ".join(
        f"{group}: " + ", ".join(f"{row.measure} {row.estimate:.2f}" for row in part.itertuples())
        for group, part in table[table["measure"].isin(list(TAU_SHOWN))].groupby("group", sort=False)
    )
    return figure, f"For each group, three shares with intervals. {spelled}."


def rarity_figure(items: pd.DataFrame) -> tuple[Figure, str]:
    """BCI and emission against copies, from `bci_paper.rarity_frame`; the figure and its alt text."""
    scores, drift = copies_means(items, "bci"), copies_means(items, "drift", clustered_rate)
    with plots.style(height=4.6):
        figure, axes = plt.subplots(2, 1, sharex=True)
        for number, (ax, means) in enumerate(zip(axes, (scores, drift), strict=True)):
            places = np.arange(len(means))
            bars = np.abs(means[["low", "high"]].to_numpy().T - means["estimate"].to_numpy())
            ax.axvspan(-0.5, (means["copies"] <= PAPER_MAX_COUNT).sum() - 0.5, color="#eef1f5", zorder=0)
            colour, marker = plots.PALETTE[number], "os"[number]
            ax.errorbar(places, means["estimate"], bars, color=colour, marker=marker, linestyle="-")
            ax.set_xticks(places, [str(copies) for copies in means["copies"]])
            ax.set_xlim(-0.5, len(means) - 0.5)
        axes[0].set(ylabel="BCI of the recipe (nats)")
        axes[0].annotate(
            f"kept by M(q) <= {PAPER_MAX_COUNT}", (0.01, 0.04), xycoords="axes fraction", fontsize="small"
        )
        axes[1].set(ylabel="share of attacks that leak it", ylim=(-0.04, 1.04), xlabel="copies planted")
    spelled = "; ".join(
        f"{score.copies} copies: {score.estimate:.1f} nats, {leak.estimate:.2f} leaked"
        for score, leak in zip(scores.itertuples(), drift.itertuples(), strict=True)
    )
    return figure, f"Two panels over the copies planted, the kept ones shaded: BCI, and leaks. {spelled}."


def auroc_figure(table: pd.DataFrame, filters: Sequence[str]) -> tuple[Figure, str]:
    """AUROC of every score against every group, one heat map per filter; the figure and its alt text."""
    grids = [_grid(table[table["filter"] == name], "scorer", "group") for name in filters]
    with plots.style(height=0.26 * sum(map(len, grids)) + 0.5 * len(grids) + 1.2):
        figure, axes = plt.subplots(
            len(grids), 1, sharex=True, squeeze=False, height_ratios=[len(grid) for grid in grids]
        )
        for ax, name, grid in zip(axes.flat, filters, grids, strict=True):
            # Diverging around chance: both ends are dark, and the number says which end it is.
            seaborn.heatmap(
                grid, annot=True, fmt=".2f", vmin=0, vmax=1, cmap="PuOr_r", cbar=False, ax=ax, linewidths=0.5
            )
            ax.set(title=name, xlabel="", ylabel="")
            ax.tick_params(axis="y", labelrotation=0)
            ax.tick_params(axis="x", labelrotation=30)
    worst = "; ".join(
        f"{name}: "
        + ", ".join(f"{scorer} {row.min():.2f} ({row.idxmin()})" for scorer, row in grid.iterrows())
        for name, grid in zip(filters, grids, strict=True)
    )
    return (
        figure,
        f"Heat maps of AUROC, scores in rows, harmless groups in columns. Smallest of each row: {worst}.",
    )


def det_figure(points: pd.DataFrame, filter_name: str, scorers: Sequence[str]) -> tuple[Figure, str]:
    """Misses against false alarms, one panel per harmless group; the figure and its alt text.

    `points` are those of `bci_detection.det_frame`.
    """
    chosen = points[(points["filter"] == filter_name) & points["scorer"].isin(scorers)]
    groups = list(dict.fromkeys(chosen["group"]))
    rows = -(-(len(groups) + 1) // 4)  # one more panel for the legend
    with plots.style(height=2.0 * rows):
        figure, axes = plt.subplots(rows, 4, sharex=True, sharey=True, squeeze=False)
        for ax, group in zip(axes.flat, groups, strict=False):
            for scorer in scorers:
                curve = chosen[(chosen["group"] == group) & (chosen["scorer"] == scorer)]
                ax.plot(curve["false_alarm"], curve["miss"], drawstyle="steps-post", label=scorer)
            ax.set_title(group, fontsize="small")
        handles = axes.flat[0].get_legend_handles_labels()
        for ax in axes.flat[len(groups) :]:
            ax.set_axis_off()
        axes.flat[len(groups)].legend(*handles, loc="center", fontsize="small")
        axes.flat[0].set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
        figure.supxlabel("false alarms: share of the harmless group refused", fontsize="small")
        figure.supylabel("misses: share of drift let through", fontsize="small")
    least = chosen.assign(total=chosen["false_alarm"] + chosen["miss"])
    grid = least.groupby(["scorer", "group"], sort=False)["total"].min().unstack()
    spelled = "; ".join(
        f"{scorer}: " + ", ".join(f"{group} {value:.2f}" for group, value in row.items())
        for scorer, row in grid.iterrows()
    )
    return figure, (
        f"Misses against false alarms of {', '.join(scorers)}, one panel per harmless group. "
        f"Smallest sum of the two: {spelled}."
    )


def sweep_figure(swept: pd.DataFrame) -> tuple[Figure, str]:
    """Caught and worst false alarm over the whole sweep, the paper's cell framed; figure and alt text.

    `swept` is that of `bci_paper.sweep`.
    """
    summary = sweep_summary(swept)
    counts = sorted(summary["max_count"].unique())
    shown = {"caught": "drift refused (%)", "worst": "worst harmless group (%)"}
    with plots.style(height=5.8):
        figure, axes = plt.subplots(2, len(counts), sharex=True, sharey=True, squeeze=False)
        for row, (measure, title) in zip(axes, shown.items(), strict=True):
            for ax, count in zip(row, counts, strict=True):
                part = summary[summary["max_count"] == count].assign(percent=100 * summary[measure])
                grid = part.pivot(index="threshold", columns="min_length", values="percent")
                seaborn.heatmap(
                    grid, annot=True, fmt=".0f", vmin=0, vmax=100, cmap="cividis", cbar=False, ax=ax,
                    annot_kws={"fontsize": 7},
                )  # fmt: skip
                _frame_paper(ax, grid, count)
                ax.set(xlabel="", ylabel="")
                if measure == "caught":
                    ax.set_title(f"M <= {count:g}" if np.isfinite(count) else "any M", fontsize="small")
                ax.tick_params(labelsize="small", labelrotation=0)
            row[0].set_ylabel(title, fontsize="small")
        figure.supxlabel("shortest span (tokens)", fontsize="small")
        figure.supylabel("threshold (nats)", fontsize="small")
    return figure, _sweep_words(summary)


def _frame_paper(ax: Axes, grid: pd.DataFrame, count: float) -> None:
    if count == PAPER_MAX_COUNT and PAPER_TAU in grid.index and PAPER_WINDOW in grid.columns:
        corner = (grid.columns.get_loc(PAPER_WINDOW), grid.index.get_loc(PAPER_TAU))
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=plots.PALETTE[1], lw=2.5))


def _sweep_words(summary: pd.DataFrame) -> str:
    best = summary.loc[(summary["caught"] - summary["worst"]).idxmax()]
    said = [
        "Heat maps over threshold and shortest span, one column for each largest count: share of drift "
        "refused above, share of the worst harmless group below.",
        f"The largest gap between them is {best['caught']:.2f} to {best['worst']:.2f}, at threshold "
        f"{best['threshold']:g}, length {best['min_length']}, largest count {best['max_count']:g}.",
    ]
    key = ["max_count", "threshold", "min_length"]
    paper = summary[(summary[key] == [PAPER_MAX_COUNT, PAPER_TAU, PAPER_WINDOW]).all(axis="columns")]
    if len(paper):
        caught, worst = paper[["caught", "worst"]].iloc[0]
        said.append(f"In the paper's cell: {caught:.2f} of drift, {worst:.2f} of the worst group.")
    return " ".join(said)


def _grid(table: pd.DataFrame, rows: str, columns: str) -> pd.DataFrame:
    grid = table.pivot(index=rows, columns=columns, values="estimate")
    return grid.reindex(index=list(dict.fromkeys(table[rows])), columns=list(dict.fromkeys(table[columns])))
