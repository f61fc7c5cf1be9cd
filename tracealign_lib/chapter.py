"""The few things that every chapter does: say a number aloud, and hold it against the published one."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from IPython.display import HTML, Markdown, display

from tracealign_lib.results import Comparison, compare, load_results
from tracealign_lib.stats import Interval


def say(text: str) -> None:
    """Show a sentence in the page's own type; numbers in it come from the cell that calls it."""
    display(Markdown(text))


def table(frame: pd.DataFrame, caption: str) -> None:
    """Show a frame as a table with a caption, two decimals, and no row numbers."""
    styled = frame.style.hide(axis="index").set_caption(caption).format(precision=2)
    # A fixed id instead of a random one: the stored page must not change when nothing else does.
    display(HTML(styled.set_uuid("table").to_html(escape=True)))


def against_published(
    name: str, measured: Mapping[str, Interval], *, tolerance: float | Mapping[str, float]
) -> Comparison:
    """Hold this run's headlines against data/results/<name>.json; shows itself as a table."""
    return compare(load_results(name), measured, tolerance=tolerance)
