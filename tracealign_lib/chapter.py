"""The few things that every chapter does: say a number aloud, and hold it against the published one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import pandas as pd
from IPython.display import HTML, Markdown, display

from tracealign_lib.errors import ResultsError
from tracealign_lib.results import Comparison, compare, load_results
from tracealign_lib.stats import Interval


def say(text: str) -> None:
    """Show a sentence in the page's own type; numbers in it come from the cell that calls it."""
    display(Markdown(text))  # type: ignore[no-untyped-call]


def table(frame: pd.DataFrame, caption: str) -> None:
    """Show a frame as a table with a caption, two decimals, and no row numbers."""
    styled = frame.style.hide(axis="index").set_caption(caption).format(precision=2, escape="html")
    styled = styled.set_table_attributes('class="dataframe"')  # what the theme knows in light and dark
    # An id from the caption instead of a random one: a stored page must not change when nothing else does.
    name = hashlib.sha256(caption.encode()).hexdigest()[:8]
    page = HTML(styled.set_uuid(name).to_html())  # type: ignore[no-untyped-call]
    display(page)  # type: ignore[no-untyped-call]


def against_published(
    name: str, measured: Mapping[str, Interval], *, tolerance: float | Mapping[str, float]
) -> Comparison:
    """Hold this run's headlines against data/results/<name>.json; shows itself as a table."""
    return compare(load_results(name), measured, tolerance=tolerance)


def run_time(name: str) -> None:
    """Say how long a chapter took when its run time was last measured (benchmarks/run_times.py)."""
    try:
        measured = load_results("run-times")
        empty, full = (measured[cache][name] for cache in ("empty cache", "full cache"))
    except (ResultsError, KeyError):  # the file is made by running the chapters: a new one is not in it yet
        say("*Run time: not measured yet (benchmarks/run_times.py).*")
        return
    machine = f"{measured.provenance['cores']} cores, {measured.provenance['date']}"
    say(
        f"*Measured run time, profile `{measured.profile}` ({machine}): {full:.0f} s with a full cache; in a "
        f"first run of the whole book, {empty:.0f} s fell to this chapter.*"
    )
