"""Figures of chapter 5, each with a description in words."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tracealign_lib import plots
from tracealign_lib.bound import kappas_for
from tracealign_lib.bound_checks import CaseCertificate, tightness_map
from tracealign_lib.experiments.bound import DELTA, LIMITS, coverage_of
from tracealign_lib.experiments.bound_emission import Judged

_SHOWN_LENGTHS = (1, 4, 16)  # tokens
_NATS = 8.0  # where the picture of planted spans ends
_MARKERS = ((False, plots.PALETTE[0], ".", 3), (True, plots.PALETTE[1], "x", 7))  # below, above a factor
_LOOSE = 1000.0  # bound / truth where the colours of a map end


def planting_figure(frame: pd.DataFrame) -> tuple[Figure, str]:
    """Growth of each planted span against the short form and against T1's own factor."""
    panels = {
        "stated": ("short form", "log $(1 + m/\\alpha)^\\ell$ (nats)", "short form exceeded"),
        "corrected": ("T1", "log $\\prod_j (1 + a_j/\\alpha)$ (nats)", "T1 exceeded"),
    }
    with plots.style(height=3.3):
        figure, axes = plt.subplots(1, 2, sharex=True, sharey=True)
        for ax, (column, (title, label, exceeded)) in zip(axes, panels.items(), strict=True):
            ax.plot([0, _NATS], [0, _NATS], color="black", linestyle="-", linewidth=1)
            for above, colour, marker, size in _MARKERS:
                chosen = frame[frame[exceeded] == above]
                ax.plot(chosen[column], chosen["growth"], marker, color=colour, markersize=size, linestyle="")
            ax.set(title=f"{title}: {int(frame[exceeded].sum())} above", xlabel=label)
            ax.set(xlim=(-0.2, _NATS), ylim=(-1.2, 0.75 * _NATS))
        axes[0].set_ylabel("growth of the span (nats)")
    return figure, (
        f"Two scatter plots of {len(frame)} planted spans: how much the log-probability of the span grew "
        f"against the logarithm of the factor that should limit it, with the diagonal; up to {_NATS:g} nats "
        "are shown. Above the diagonal "
        f"lie {int(frame['short form exceeded'].sum())} cases for the short form and "
        f"{int(frame['T1 exceeded'].sum())} for T1."
    )


def certificate_figure(found: CaseCertificate) -> tuple[Figure, str]:
    """One certificate taken apart: both terms, their sum, the truth and the Monte-Carlo floor over kappa."""
    certificate = found.certificate
    kappas = np.array(kappas_for(found.without))
    first = np.exp(kappas) * found.without
    with plots.style(height=3.4):
        figure, ax = plt.subplots()
        ax.plot(kappas, first, marker="o", label=r"$e^\kappa P_{-A}(E)$")
        ax.plot(kappas, certificate.tail_limits, marker="s", label="limit of the tail")
        ax.plot(kappas, np.minimum(certificate.bounds, 1), marker="^", label="sum, at most 1")
        plots.labelled_lines(ax)
        ax.axhline(found.truth, color="black", linestyle="-", linewidth=1.2)
        ax.axhline(certificate.floor, color="black", linestyle="--", linewidth=1.2)
        ax.axvline(np.log(found.truth / found.without), color="black", linestyle=":", linewidth=1.2)
        left = ax.get_yaxis_transform()
        ax.text(0.01, found.truth, "truth", transform=left, va="bottom")
        ax.text(0.01, certificate.floor, "floor", transform=left, va="bottom")
        ax.set(ylim=(0, 1.04), xlabel=r"$\kappa$ (nats)", ylabel="probability")
    return figure, (
        f"Probability against kappa for a span of {found.length} tokens with {found.case.copies} copies. "
        "The first term rises exponentially, the limit of the tail falls, and their sum is least at kappa "
        f"{certificate.kappa:.1f}: {certificate.bound:.3f}. The truth is {found.truth:.3f}, the floor "
        f"{certificate.floor:.3f}; an upright line marks the log-ratio of the span itself."
    )


def coverage_figure(frame: pd.DataFrame) -> tuple[Figure, str]:
    """How often each limit held on each pair, with exact intervals, beside what is promised."""
    held = {
        f"{limit}, {name}": coverage_of(chosen, limit).held
        for limit in LIMITS
        for name, chosen in frame.groupby("pair", sort=False)
    }
    with plots.style(height=0.34 * len(held) + 0.8):
        figure, ax = plt.subplots()
        plots.interval_bars(ax, list(held), list(held.values()))
        ax.axvline(1 - DELTA, color="black", linestyle=":", linewidth=1.2)
        ax.set(xlabel=f"share of limits that held (dotted: {1 - DELTA:g})")
        ax.set_xlim(right=1.01)
    shares = "; ".join(f"{name}: {value.estimate:.2f}" for name, value in held.items())
    return figure, f"Shares of limits that held, with intervals, beside a line at {1 - DELTA:g}. {shares}."


def bound_figure(frame: pd.DataFrame) -> tuple[Figure, str]:
    """Every certificate against its truth, with the floor below which no bound can go."""
    floor = float(frame["floor"].max())
    pairs = list(dict.fromkeys(frame["pair"]))
    with plots.style(height=3.4):
        figure, axes = plt.subplots(1, len(pairs), sharex=True, sharey=True, squeeze=False)
        for ax, name in zip(axes[0], pairs, strict=True):
            _bounds(ax, frame[frame["pair"] == name], floor)
            ax.set(title=name, xlabel="truth, $P_D(E)$")
        axes[0, 0].set_ylabel("certified bound")
        axes[0, -1].legend(title="copies", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    below = float((frame["truth"] < floor).mean())
    return figure, (
        f"Certified bound against the true probability, both on logarithmic axes, for {len(frame)} "
        f"certificates, with the diagonal. The floor is {floor:.3f}; {below:.0%} of the truths lie below it. "
        f"{float((frame['bound'] >= 1).mean()):.0%} of the bounds are 1."
    )


def _bounds(ax: Axes, frame: pd.DataFrame, floor: float) -> None:
    least = 1e-6
    ax.plot([least, 1], [least, 1], color="black", linestyle="-", linewidth=1)
    ax.axhline(floor, color="black", linestyle=":", linewidth=1.2)
    for colour, marker, (copies, chosen) in zip(
        plots.PALETTE, "ovs^D", frame.groupby("copies"), strict=False
    ):
        truth = chosen["truth"].clip(lower=least)
        ax.plot(truth, chosen["bound"], marker, color=colour, linestyle="", alpha=0.7, label=f"{copies}")
    ax.set(xscale="log", yscale="log", ylim=(floor / 3, 1.5))


def tightness_figure(frame: pd.DataFrame) -> tuple[Figure, str]:
    """Median of bound / truth over copies and length; framed where the median truth is below the floor."""
    pairs = list(dict.fromkeys(frame["pair"]))
    spelled = []
    with plots.style(height=3.2):
        figure, axes = plt.subplots(1, len(pairs), squeeze=False)
        for ax, name in zip(axes[0], pairs, strict=True):
            chosen = frame[frame["pair"] == name]
            table = tightness_map(chosen)
            _map(ax, table)
            _frame_cells(ax, _below_floor(chosen).reindex_like(table))
            ax.set(title=name, xlabel="length (tokens)", ylabel="copies")
            ax.label_outer()
            spelled += [
                f"{name}, {copies} copies: {', '.join(map(_ratio, row))}" for copies, row in table.iterrows()
            ]
    lengths = ", ".join(map(str, sorted(frame["length"].unique())))
    return figure, (
        f"Heat maps of the median of bound over truth for spans of {lengths} tokens. {'; '.join(spelled)}. "
        "A framed cell has a median truth below the Monte-Carlo floor."
    )


def _map(ax: Axes, table: pd.DataFrame) -> None:
    seaborn.heatmap(
        table.clip(upper=_LOOSE),
        annot=table.map(_ratio),
        fmt="",
        norm=LogNorm(1, _LOOSE),
        cmap="cividis_r",
        cbar=False,
        annot_kws={"fontsize": 9},
        ax=ax,
    )
    ax.tick_params(axis="y", labelrotation=0)


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}" if value < _LOOSE else f"> {_LOOSE:.0f}"


def _below_floor(frame: pd.DataFrame) -> pd.DataFrame:
    medians = frame.groupby(["copies", "length"])[["truth", "floor"]].median()
    return (medians["truth"] < medians["floor"]).unstack()


def _frame_cells(ax: Axes, framed: pd.DataFrame) -> None:
    for row, column in np.argwhere(framed.to_numpy(dtype=bool)):
        edge = Rectangle(
            (column + 0.05, row + 0.05), 0.9, 0.9, fill=False, edgecolor=plots.PALETTE[1], lw=2, ls="--"
        )
        ax.add_patch(edge)


def emission_figure(
    judged: Judged, *, context: int, lengths: Sequence[int] = _SHOWN_LENGTHS
) -> tuple[Figure, str]:
    """Judged emissions by copies, with the fitted line and the limit, for one context and some lengths."""
    rows = judged.rows[judged.rows["context"] == context]
    copies = np.array(sorted(rows["copies"].unique()), dtype=np.float64)
    with plots.style(height=3.0):
        figure, axes = plt.subplots(1, len(lengths), sharey=True)
        for ax, length in zip(axes, lengths, strict=True):
            chosen = rows[rows["length"] == length]
            ax.plot(
                chosen["copies"], chosen["emission"], "o", color=plots.PALETTE[0], alpha=0.5, linestyle=""
            )
            ax.plot(copies, judged.fit.line(copies, length, context), color=plots.PALETTE[4], label="line")
            limit = judged.fit.upper(copies, length, context)
            ax.plot(copies, limit, color=plots.PALETTE[1], linestyle="--", label="limit")
            ax.set_xscale("log", base=2)
            ax.set_xticks(copies, [f"{c:g}" for c in copies])
            ax.set(title=f"{length} token{'s' * (length > 1)}", xlabel="copies", ylim=(-0.05, 1.08))
        axes[0].set_ylabel("emission (probability)")
        axes[-1].legend(loc="upper left", fontsize="small")
    slope = judged.fit.per_doubling[0]
    return figure, (
        f"Emission of judged items against copies after {context} tokens of context, for spans of "
        f"{', '.join(map(str, lengths))} tokens, with a line that changes by {slope:+.2f} for each doubling "
        f"of copies, and a limit {judged.fit.margin:.2f} above it."
    )
