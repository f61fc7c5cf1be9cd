"""Figures of chapter 6, each with the text that a reader hears who cannot see it."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tracealign_lib import plots
from tracealign_lib.experiments.bci_texts import UNSAFE
from tracealign_lib.experiments.shield_judged import refused
from tracealign_lib.experiments.shield_texts import EDITED


def guarantee_figure(frame: pd.DataFrame, alpha: float, delta: float) -> tuple[Figure, str]:
    """Realised false-refusal rates of repeated calibrations, from `shield_promises.guarantee_frame`."""
    with plots.style(height=3.4):
        figure, ax = plt.subplots()
        for row in frame.itertuples():
            rates = np.sort(row.rates)
            share = np.arange(1, len(rates) + 1) / len(rates)
            ax.plot(rates, share, drawstyle="steps-post", label=f"{row.threshold} (rank {row.rank})")
        ax.axvline(alpha, color="#555555", linewidth=1, linestyle="-")
        ax.axhline(1 - delta, color="#555555", linewidth=1, linestyle=":")
        ax.annotate("alpha", (alpha, 0.02), xytext=(4, 0), textcoords="offset points", fontsize="small")
        right = ax.get_xlim()[1]
        ax.annotate(
            "1 - delta", (right, 1 - delta), xytext=(-4, -12), textcoords="offset points", fontsize="small",
            ha="right",
        )  # fmt: skip
        ax.set(ylim=(0, 1.02), xlabel="realised false-refusal rate", ylabel="share of calibrations up to it")
        ax.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 0.1))
    spelled = "; ".join(
        f"{row.threshold}: mean {row.mean.estimate:.3f}, at most alpha in {1 - row.exceeded.estimate:.2f}"
        for row in frame.itertuples()
    )
    return figure, (
        f"Cumulative curves of the realised false-refusal rate over repeated calibrations, with lines at "
        f"alpha = {alpha:g} and 1 - delta = {1 - delta:g}. {spelled} of the calibrations."
    )


def realised_figure(frame: pd.DataFrame, n: int, delta: float) -> tuple[Figure, str]:
    """Realised false-refusal rates against the alpha asked for, from `shield_promises.realised_frame`."""
    lines = {"mean": "marginal: mean rate", "high": f"umbrella: {1 - delta:.0%} of calibrations stay below"}
    with plots.style(height=3.2):
        figure, ax = plt.subplots()
        for (column, label), marker in zip(lines.items(), "os", strict=True):
            ax.plot(frame["alpha"], frame[column], marker=marker, label=label)
        top = float(frame["alpha"].max())
        ax.plot([0, top], [0, top], color="#555555", linewidth=1, label="rate = alpha")
        ax.set(xlabel="alpha", ylabel="realised false-refusal rate", xlim=(0, None), ylim=(0, None))
        ax.legend(fontsize="small")
    spelled = "; ".join(
        f"alpha {row.alpha:g}: mean {row.mean:.3f}, umbrella {row.high:.3f}"
        for row in frame.itertuples(index=False, name="Row")
    )
    return figure, (
        f"Realised false-refusal rate against alpha, thresholds from {n} texts. The mean rate of the "
        f"marginal threshold, and the rate that the umbrella's keeps to in {1 - delta:.0%} of calibrations, "
        f"beside the diagonal. {spelled}."
    )


def transfer_figure(table: pd.DataFrame) -> tuple[Figure, str]:
    """Calibrated on the row, judged on the column, from `shield_judged.transfer_table`; percent refused.

    Cells in which a kind of text is judged by its own threshold have a frame.
    """
    names = list(dict.fromkeys(table["filter"]))
    sources = list(dict.fromkeys(table["source"]))
    groups = list(dict.fromkeys([*sources, *table["group"]]))  # so that the diagonal is one
    rows = -(-len(names) // 2)
    with plots.style(height=rows * (0.34 * len(sources) + 0.5) + 1.4):
        figure, axes = plt.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
        for ax, name in zip(axes.flat, names, strict=False):
            part = table[table["filter"] == name].assign(percent=100 * table["estimate"])
            grid = part.pivot(index="source", columns="group", values="percent").loc[sources, groups]
            seaborn.heatmap(
                grid, annot=True, fmt=".0f", vmin=0, vmax=100, cmap="cividis", cbar=False, ax=ax,
                annot_kws={"fontsize": 8},
            )  # fmt: skip
            for place in range(len(sources)):
                ax.add_patch(Rectangle((place, place), 1, 1, fill=False, edgecolor="white", linewidth=2))
            ax.set(xlabel="", ylabel="")
            ax.set_title(name, fontsize="small")
            ax.tick_params(labelsize="small")
        for ax in axes.flat[len(names) :]:
            ax.set_axis_off()
        figure.supxlabel("judged on (percent refused)", fontsize="small")
        figure.supylabel("calibrated on", fontsize="small")
    worst = table.loc[table.groupby("filter", sort=False)["estimate"].idxmax()]
    spelled = "; ".join(
        f"{row.filter}: {row.estimate:.0%} of {row.group} when calibrated on {row.source}"
        for row in worst.itertuples()
    )
    return (
        figure,
        f"Heat maps of what is refused of each kind of harmless text. The largest cells: {spelled}.",
    )


def edits_figure(frame: pd.DataFrame, names: Sequence[str]) -> tuple[Figure, str]:
    """Share refused against the number of steps in which a word was changed, from `shield.margin_frame`."""
    groups = (UNSAFE, *EDITED)
    shares = {name: [refused(frame, name, group) for group in groups] for name in names}
    with plots.style(height=3.4):
        figure, ax = plt.subplots()
        for number, (name, intervals) in enumerate(shares.items()):
            places = np.arange(len(groups)) + 0.14 * (number - (len(names) - 1) / 2)
            ax.vlines(
                places,
                [i.low for i in intervals],
                [i.high for i in intervals],
                color=plots.PALETTE[number], linewidth=3, alpha=0.35,
            )  # fmt: skip
            marker = "osDv^<>"[number]
            ax.plot(places, [i.estimate for i in intervals], marker=marker, label=name, linestyle=":")
        ax.set_xticks(range(len(groups)), ["none", "1", "2", "3"])
        ax.set(xlabel="steps in which one word was changed", ylabel="share refused", ylim=(-0.03, 1.03))
        figure.legend(loc="outside right upper", fontsize="small")
    spelled = "; ".join(
        f"{name} {', '.join(f'{i.estimate:.2f}' for i in intervals)}" for name, intervals in shares.items()
    )
    return figure, f"Share refused of drift with a word changed in 0, 1, 2 and 3 steps. {spelled}."
