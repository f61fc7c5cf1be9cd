"""Figures of the book: described in words, small, and labelled without overlap."""

from __future__ import annotations

import base64
import io
import json
from types import SimpleNamespace

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from tracealign_lib import plots
from tracealign_lib.errors import ParameterError

ALT = 'Two lines cross; "cover" ends <higher>.'


def two_lines() -> plt.Figure:
    with plots.style():
        figure, ax = plt.subplots()
        ax.plot([0, 1], [0, 1], label="cover")
        ax.plot([0, 1], [1, 0], label="TF-IDF")
        plots.labelled_lines(ax)
    return figure


def test_a_figure_carries_its_description_into_html_and_metadata() -> None:
    data, metadata = DisplayFormatter().format(plots.picture(two_lines(), ALT))
    assert data["text/plain"] == ALT
    image = BeautifulSoup(data["text/html"], "html.parser").img
    assert image["alt"] == ALT
    assert image["src"] == f"data:image/png;base64,{data['image/png']}"
    assert metadata["image/png"]["alt"] == ALT
    json.dumps([data, metadata])


def test_a_figure_is_small_sharp_reproducible_and_closed() -> None:
    before = plt.get_fignums()
    first, second = plots.picture(two_lines(), ALT), plots.picture(two_lines(), ALT)
    assert first.png == second.png
    assert plt.get_fignums() == before
    assert len(first.png) < 60_000
    image = Image.open(io.BytesIO(first.png))
    assert image.width == 2 * first.width == plots.WIDTH * plots.DPI


def test_show_displays_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[plots.Picture] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    plots.show(two_lines(), ALT)
    assert [picture.alt for picture in shown] == [ALT]
    assert base64.b64encode(shown[0].png)


@pytest.mark.parametrize("alt", ["", "figure", None])
def test_a_figure_without_a_description_is_refused(alt: str) -> None:
    with pytest.raises(ParameterError, match="no description"):
        plots.picture(plt.figure(), alt)
    plt.close("all")


def test_style_ends_with_its_context() -> None:
    before = mpl.rcParams["figure.figsize"]
    with plots.style(height=2):
        assert list(mpl.rcParams["figure.figsize"]) == [plots.WIDTH, 2]
    assert mpl.rcParams["figure.figsize"] == before


def test_lines_differ_by_more_than_colour() -> None:
    with plots.style():
        _, ax = plt.subplots()
        lines = [ax.plot([0, 1])[0] for _ in plots.PALETTE]
    assert len({str(line._dash_pattern) for line in lines}) == len(plots.PALETTE)
    plt.close("all")


@pytest.mark.parametrize("colour", plots.PALETTE)
def test_labels_are_dark_enough_to_read(colour: str) -> None:
    shades = np.array(plots._legible(colour))
    linear = np.where(shades <= 0.04045, shades / 12.92, ((shades + 0.055) / 1.055) ** 2.4)
    assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.5
    original = np.array(mpl.colors.to_rgb(colour))
    assert np.allclose(shades * original.max(), original * shades.max())


def test_labels_of_lines_that_end_together_do_not_overlap() -> None:
    with plots.style():
        figure, ax = plt.subplots()
        for name in ("first", "second", "third"):
            ax.plot([0, 1, 2], [0, 1, np.nan], label=name)
        ax.plot([0, 1], [0, 0])
        plots.labelled_lines(ax)
        figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [text.get_text() for text in ax.texts] == ["first", "second", "third"]
    assert boxes[0].y0 > boxes[1].y1 > boxes[1].y0 > boxes[2].y1
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)
    plt.close("all")


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.floats(0.1, 20))
def test_spread_keeps_order_and_distance_and_moves_only_what_it_must(values: list[float], gap: float) -> None:
    positions = np.array(values)
    moved = plots._spread(positions, gap)
    order = np.argsort(moved)
    assert (np.diff(moved[order]) >= gap - 1e-9).all()
    assert (np.diff(positions[order]) >= 0).all()
    if (np.diff(np.sort(positions)) >= gap).all():
        assert np.allclose(moved, positions)
    assert moved.mean() == pytest.approx(positions.mean(), abs=1e-6)


def test_interval_bars_show_the_estimate_and_its_interval_in_numbers() -> None:
    rows = [
        SimpleNamespace(estimate=0.5, low=0.25, high=0.75),
        SimpleNamespace(estimate=0.1, low=0.0, high=0.2),
    ]
    _, ax = plt.subplots()
    plots.interval_bars(ax, ["direct", "prefill"], rows)
    assert [text.get_text() for text in ax.texts] == ["0.50 [0.25, 0.75]", "0.10 [0.00, 0.20]"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["direct", "prefill"]
    bar, dot = ax.lines[:2]
    assert list(bar.get_xdata()) == [0.25, 0.75]
    assert list(dot.get_xdata()) == [0.5]
    with pytest.raises(ParameterError, match="do not match"):
        plots.interval_bars(ax, ["direct"], rows)
    plt.close("all")
