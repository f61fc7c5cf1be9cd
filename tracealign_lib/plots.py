"""One look for every figure of the book, and figures that say in words what they show.

Colours follow Okabe and Ito's palette, which readers with the common colour-vision deficiencies can tell
apart; the yellow is left out because it vanishes on white. Colour never stands alone: `style` also cycles
line styles, and `labelled_lines` writes names at the ends of lines.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from tracealign_lib.errors import ParameterError

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
"""Blue, vermilion, green, purple, black, orange, sky."""
WIDTH = 7.2
"""Inches: the text column of a page of the book."""
DPI = 200
"""Dots per inch of a stored figure. It is shown at half that, so it stays sharp on dense screens."""
COLOURS = 128
"""Colours kept in a stored figure. A plot needs few, and a palette makes the file several times smaller."""


class Interval(Protocol):
    """An estimate and its interval, in any unit."""

    @property
    def estimate(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@contextmanager
def style(*, width: float = WIDTH, height: float = 3.6) -> Iterator[None]:
    """Draw figures of `width` x `height` inches in the book's look inside this context."""
    dashes = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
    settings: dict[Any, Any] = {
        "figure.figsize": (width, height),
        "figure.dpi": DPI / 2,
        "figure.facecolor": "white",
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.labelsize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e3e6ea",
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "axes.prop_cycle": cycler(color=PALETTE, linestyle=dashes),
    }
    with mpl.rc_context(settings):
        yield


def labelled_lines(ax: Axes, *, gap: float = 1.25) -> None:
    """Write each line's label at its right end, in its colour (darker if need be), instead of a legend.

    Labels that would overlap are moved apart to `gap` times the height of the text. Lines without a label
    are left alone.
    """
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    ends = [_last_finite(line.get_xdata(), line.get_ydata()) for line in lines]
    shown = [(line, end) for line, end in zip(lines, ends, strict=True) if end is not None]
    if not shown:
        return
    ax.figure.canvas.draw()
    points = ax.transData.transform([end for _, end in shown])  # (lines, 2), pixels
    size = float(mpl.rcParams["font.size"]) * ax.figure.dpi / 72
    heights = _spread(points[:, 1], gap * size)
    for (line, end), point, height in zip(shown, points, heights, strict=True):
        ax.annotate(
            str(line.get_label()),
            xy=end,
            xytext=(8, (height - point[1]) * 72 / ax.figure.dpi),
            textcoords="offset points",
            va="center",
            color=_legible(line.get_color()),
            annotation_clip=False,
        )


def interval_bars(
    ax: Axes,
    labels: Sequence[str],
    intervals: Sequence[Interval],
    *,
    digits: int = 2,
    colour: str = PALETTE[0],
) -> None:
    """One row per label, from the top: the estimate as a dot, its interval as a bar, both as numbers.

    Raises
    ------
    ParameterError
        There are not as many labels as intervals.
    """
    if len(labels) != len(intervals):
        raise ParameterError(
            "Labels and intervals do not match.",
            given=f"{len(labels)} labels, {len(intervals)} intervals",
            expected="one label for each interval",
            mend="pass both from the same table",
        )
    rows = np.arange(len(labels))
    for row, item in zip(rows, intervals, strict=True):
        ax.plot(
            [item.low, item.high], [row, row], color=colour, linewidth=4, alpha=0.45, linestyle="-", marker=""
        )
        ax.plot([item.estimate], [row], color=colour, marker="o", linestyle="")
        numbers = f"{item.estimate:.{digits}f} [{item.low:.{digits}f}, {item.high:.{digits}f}]"
        ax.annotate(
            numbers,
            (1.0, row),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    ax.set_yticks(rows, labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")


@dataclass(frozen=True, slots=True)
class Picture:
    """A rendered figure and its description; a notebook stores both.

    The HTML form carries the description as the image's `alt`, since myst-nb passes no `alt` from the output
    metadata of a bare PNG. The PNG is there for readers that show no HTML.
    """

    png: bytes
    alt: str
    width: int

    def _repr_mimebundle_(
        self, include: Any = None, exclude: Any = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        data = base64.b64encode(self.png).decode("ascii")
        alt = html.escape(self.alt, quote=True)
        # "dark-light" keeps the book's theme from dimming the image; the card behind it stays light.
        image = (
            "<style>html[data-theme] .bd-content div.cell_output .text_html.text_html:has(> .ta-figure)"
            "{background:none;padding:0}</style>"
            f'<img class="dark-light ta-figure" alt="{alt}" width="{self.width}" '
            f'src="data:image/png;base64,{data}" '
            'style="max-width:100%;height:auto;background:#fff;border-radius:6px">'
        )
        described = {"alt": self.alt, "width": self.width}
        bundle = {"text/plain": self.alt, "text/html": image, "image/png": data}
        return bundle, {"image/png": described, "alt": self.alt}

    def __repr__(self) -> str:
        return self.alt


def picture(figure: Figure, alt: str) -> Picture:
    """Render a figure to a small PNG at twice the screen resolution, and close it.

    Raises
    ------
    ParameterError
        `alt` is not a sentence: a reader who cannot see the figure reads it instead.
    """
    if not isinstance(alt, str) or len(alt.split()) < 3:
        raise ParameterError(
            "The figure has no description.",
            given=repr(alt),
            expected="alt text of at least three words",
            mend="say what the figure shows and what to see in it",
        )
    buffer = io.BytesIO()
    # No software version in the file: the same figure gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    image = Image.open(buffer).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, format="png", optimize=True)
    return Picture(small.getvalue(), " ".join(alt.split()), image.width // 2)


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook with its description; elsewhere print the description."""
    from IPython.display import display

    display(picture(figure, alt))  # type: ignore[no-untyped-call]


def _legible(colour: Any) -> tuple[float, float, float]:
    """`colour`, darkened until text in it has a contrast of 4.5 on white (WCAG 2.1, 1.4.3)."""
    red, green, blue = to_rgb(colour)
    while 1.05 / (_luminance(red, green, blue) + 0.05) < 4.5:
        red, green, blue = 0.95 * red, 0.95 * green, 0.95 * blue
    return red, green, blue


def _luminance(red: float, green: float, blue: float) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _last_finite(x: Any, y: Any) -> tuple[float, float] | None:
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    known = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    return (float(xs[known[-1]]), float(ys[known[-1]])) if len(known) else None


def _spread(positions: Any, gap: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Positions moved as little as needed for neighbours to lie at least `gap` apart, order kept."""
    # Of two equal positions the earlier one comes out on top.
    order = np.argsort(positions[::-1], kind="stable")
    order = len(order) - 1 - order
    # Blocks of (sum of free positions, members): neighbours that would touch share one mean.
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([float(positions[i]) - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, members = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += members
    free = [total / members for total, members in blocks for _ in range(int(members))]
    spread = np.empty(len(order))
    spread[order] = np.array(free) + gap * np.arange(len(order))
    return spread
