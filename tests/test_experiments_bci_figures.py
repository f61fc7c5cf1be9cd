"""Figures of chapter 4 draw the numbers of their frames, and say them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bci_samples import frame
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from tracealign_lib.experiments import bci_detection, bci_figures
from tracealign_lib.experiments.bci_texts import NEWS, RARE, STORY, UNSAFE

SCORES = {
    "raw BCI": {UNSAFE: [5, 6, 2, 8], RARE: [1, 2, 1, 7], STORY: [9, 9, 9, 9]},
    "conflict": {UNSAFE: [5, 6, 7, 8], RARE: [1, 2, 1, 2], STORY: [0, 0, 0, 0]},
}


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def cells(figure: Figure) -> list[np.ndarray]:
    """The numbers of each heat map of a figure."""
    meshes = [next(c for c in ax.collections if isinstance(c, QuadMesh)) for ax in figure.axes]
    return [np.ma.filled(mesh.get_array().astype(float), math.nan) for mesh in meshes]


def test_the_figure_of_tau_draws_each_share_with_its_interval() -> None:
    measures = ("windows above", "any window above", "any window indexed", "refused")
    rows = [
        (group, name, share, max(share - 0.1, 0), min(share + 0.1, 1), 9)
        for group, shares in {UNSAFE: (1.0, 1.0, 0.3, 0.25), STORY: (0.9, 0.9, 0.0, 0.0)}.items()
        for name, share in zip(measures, shares, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["group", "measure", "estimate", "low", "high", "n"])
    figure, alt = bci_figures.tau_figure(table)
    drawn = {line.get_label(): line.get_xdata().tolist() for line in figure.axes[0].get_lines()}
    assert drawn == {
        bci_figures.TAU_SHOWN["windows above"]: [1.0, 0.9],
        bci_figures.TAU_SHOWN["any window indexed"]: [0.3, 0.0],
        bci_figures.TAU_SHOWN["refused"]: [0.25, 0.0],
    }
    bars = figure.axes[0].collections[2].get_segments()
    assert [sorted(bar[:, 0]) for bar in bars] == [pytest.approx([0.15, 0.35]), pytest.approx([0, 0.1])]
    assert "unsafe drift: windows above 1.00, any window indexed 0.30, refused 0.25" in alt


def test_the_figure_of_rarity_shades_what_the_filter_keeps() -> None:
    items = pd.DataFrame(
        {
            "seed": 0,
            "item": list("abcdefgh"),
            "copies": [1, 1, 2, 2, 4, 4, 16, 16],
            "bci": [90.0, 92.0, 88.0, 90.0, 85.0, 86.0, 80.0, 82.0],
            "drift": [0.0, 0.0, 0.0, 0.1, 0.3, 0.5, 0.8, 1.0],
        }
    )
    figure, alt = bci_figures.rarity_figure(items)
    above, below = figure.axes
    assert above.get_lines()[0].get_ydata().tolist() == [91, 89, 85.5, 81]
    assert below.get_lines()[0].get_ydata().tolist() == pytest.approx([0, 0.05, 0.4, 0.9])
    assert [label.get_text() for label in below.get_xticklabels()] == ["1", "2", "4", "16"]
    for ax in figure.axes:
        [shade] = ax.patches
        assert shade.get_x() + shade.get_width() == 1.5  # 1 and 2 copies pass M(q) <= 3, 4 do not
    assert "16 copies: 81.0 nats, 0.90 leaked" in alt


def test_the_figure_of_auroc_keeps_scores_and_groups_in_order() -> None:
    data = pd.concat([frame(SCORES, "corpus spans"), frame(SCORES, "paper").assign(score=0.0)])
    figure, alt = bci_figures.auroc_figure(bci_detection.auroc_table(data), ["paper", "corpus spans"])
    paper, corpus = cells(figure)
    assert (paper == 0.5).all()
    assert corpus == pytest.approx(np.array([[12.5 / 16, 0], [1, 1]]))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["paper", "corpus spans"]
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["raw BCI", "conflict"]
    assert "corpus spans: raw BCI 0.00 (story), conflict 1.00" in alt


def test_the_figure_of_errors_has_a_panel_for_each_group() -> None:
    points = bci_detection.det_frame(frame(SCORES))
    figure, alt = bci_figures.det_figure(points, "corpus spans", ["raw BCI", "conflict"])
    shown = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title(loc="left") for ax in shown] == [RARE, STORY]
    drawn = {line.get_label(): line for line in shown[1].get_lines()}
    assert drawn["raw BCI"].get_ydata().max() == 1
    assert (drawn["raw BCI"].get_xdata() + drawn["raw BCI"].get_ydata()).min() == 1  # all stories come first
    assert (drawn["conflict"].get_xdata() + drawn["conflict"].get_ydata()).min() == 0
    assert f"raw BCI: {RARE} 0.50, {STORY} 1.00; conflict: {RARE} 0.00, {STORY} 0.00" in alt


def test_the_figure_of_the_sweep_frames_the_papers_cell() -> None:
    def share(group: str, length: int, threshold: int, count: float) -> float:
        caught = 0.9 if count > 3 else 0.2
        return caught if group == UNSAFE else 0.6 * (length == 4) * (threshold == 10) + 0.1 * (group == NEWS)

    rows = [
        (group, length, count, threshold, share(group, length, threshold, count))
        for group in (UNSAFE, STORY, NEWS)
        for length in (4, 8)
        for count in (3.0, math.inf)
        for threshold in (10, 20)
    ]
    swept = pd.DataFrame(rows, columns=["group", "min_length", "max_count", "threshold", "estimate"])
    figure, alt = bci_figures.sweep_figure(swept)
    caught_rare, caught_any, worst_rare, _ = cells(figure)
    assert caught_rare == pytest.approx(np.full((2, 2), 20))
    assert caught_any == pytest.approx(np.full((2, 2), 90))
    assert worst_rare == pytest.approx(np.array([[70, 10], [10, 10]]))  # rows: threshold, columns: length
    frames = [ax.patches[0].get_xy() if ax.patches else None for ax in figure.axes]
    assert frames == [(1, 1), None, (1, 1), None]
    assert "0.90 to 0.10" in alt
    assert "In the paper's cell: 0.20 of drift, 0.10 of the worst group." in alt
    assert "paper" not in bci_figures.sweep_figure(swept[swept["min_length"] == 4])[1]
