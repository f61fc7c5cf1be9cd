"""A threshold that a reader can drag: what share of each group is refused, in a page without a kernel.

The curves of every score under every filter are computed here and stored in the HTML as small numbers; a
few lines of script move along them. Nothing is loaded. A reader without JavaScript sees a table at the
marked threshold instead. All text is escaped by Jinja, after `visible` has replaced characters that could
mislead; the numbers stand in a block of JSON in which no tag can be closed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments.bci_paper import clustered_rates
from tracealign_lib.experiments.bci_texts import UNSAFE
from tracealign_lib.experiments.common import clusters
from tracealign_lib.stats import Interval
from tracealign_lib.tracing import visible

STEPS = 60
"""Steps of a curve, at most."""
COLUMNS = ("seed", "item", "text", "group", "filter", "scorer", "score")
_NICE = (1, 2, 5, 10)


@dataclass(frozen=True)
class ThresholdSlider:
    """Shares refused over threshold, filter and score; displays itself as HTML.

    Attributes
    ----------
    groups:
        Names and sizes (texts) of the groups, the one that ought to be refused first.
    filters, scorers:
        What a reader can choose.
    curves:
        Filter and scorer -> curve: `thresholds`, `unit`, `marked` (position of the marked threshold, or
        None), and `groups`: for each group the runs of its share, lower and upper limit.
    start:
        The filter and the scorer that are shown first.
    """

    groups: tuple[tuple[str, int], ...]
    filters: tuple[str, ...]
    scorers: tuple[str, ...]
    curves: Mapping[tuple[str, str], Mapping[str, Any]]
    start: tuple[str, str]

    def shares(self, threshold: int) -> list[tuple[int, int, int]]:
        """Share, lower and upper limit in percent of each group at a position of the curve shown first."""
        runs = self.curves[self.start]["groups"]
        return [tuple(_at(part, threshold) for part in group) for group in runs]  # type: ignore[misc]

    def _repr_html_(self) -> str:
        curve = self.curves[self.start]
        position = curve["marked"] if curve["marked"] is not None else (len(curve["thresholds"]) - 1) // 2
        rows = [
            _row(name, texts, share, first=number == 0)
            for number, ((name, texts), share) in enumerate(
                zip(self.groups, self.shares(position), strict=True)
            )
        ]
        threshold = f"{curve['thresholds'][position]:g} {curve['unit']}".strip()
        data = {
            "groups": [visible(name) for name, _ in self.groups],
            "start": [self.filters.index(self.start[0]), self.scorers.index(self.start[1])],
            "curves": [[self.curves[name, scorer] for scorer in self.scorers] for name in self.filters],
        }
        return _TEMPLATES.get_template("slider.html").render(
            style=_STYLE,
            script=_SCRIPT,
            filters=self.filters,
            scorers=self.scorers,
            shown={"filter": self.start[0], "scorer": self.start[1], "threshold": threshold},
            rows=rows,
            data=data,
        )


def threshold_slider(
    frame: pd.DataFrame,
    *,
    start: tuple[str, str],
    units: Mapping[str, str],
    marks: Mapping[str, float],
    positive: str = UNSAFE,
) -> ThresholdSlider:
    """A slider over the scores of `bci_scores.scored`.

    Parameters
    ----------
    frame:
        One row per text, filter and scorer, with the columns `COLUMNS`. Scores may be minus infinity.
    start:
        The filter and the scorer that are shown first.
    units:
        Scorer -> unit of its score; "nats" for those that are not named.
    marks:
        Scorer -> a threshold to mark on its track and to start from.
    positive:
        The group that ought to be refused; it stands first.

    Returns
    -------
    ThresholdSlider
        With intervals clustered by item, in whole percent.

    Raises
    ------
    ParameterError
        A column is missing, there are no rows, a score is NaN or plus infinity, the positive group or the
        start is unknown, or a combination of filter and scorer has no scores.
    """
    filters, scorers = _check(frame, start, positive)
    sizes = frame.drop_duplicates(["seed", "item", "text", "group"]).groupby("group", sort=False).size()
    groups = sorted(sizes.items(), key=lambda pair: pair[0] != positive)  # the sort is stable
    curves: dict[tuple[str, str], dict[str, Any]] = {}
    for name in filters:
        part = frame[frame["filter"] == name]
        grids = {
            scorer: _grid(rows["score"].to_numpy(), marks.get(scorer))
            for scorer, rows in part.groupby("scorer", sort=False)
        }
        runs = [_runs_of_group(part[part["group"] == group], grids) for group, _ in groups]
        for scorer, grid in grids.items():
            marked = int(np.flatnonzero(grid == marks[scorer])[0]) if scorer in marks else None
            curves[name, str(scorer)] = {
                "thresholds": [_short(value) for value in grid.tolist()],
                "unit": units.get(str(scorer), "nats"),
                "marked": marked,
                "groups": [group[scorer] for group in runs],
            }
    named = tuple((str(group), int(size)) for group, size in groups)
    return ThresholdSlider(named, filters, scorers, curves, start)


def _runs_of_group(
    texts: pd.DataFrame, grids: Mapping[Any, NDArray[np.float64]]
) -> dict[Any, list[list[int]]]:
    """Scorer -> runs of share, lower and upper limit over that scorer's thresholds, for one group."""
    table = texts.pivot(index=["seed", "item", "text"], columns="scorer", values="score")
    refused = [table[scorer].to_numpy()[:, None] > grid for scorer, grid in grids.items()]
    means = clustered_rates(
        np.hstack(refused), clusters(table.reset_index())
    )  # all curves, one after another
    runs, first = {}, 0
    for scorer, grid in grids.items():
        percent = [_percent(mean) for mean in means[first : first + len(grid)]]
        runs[scorer] = [_runs(column) for column in zip(*percent, strict=True)]
        first += len(grid)
    return runs


def _percent(mean: Interval) -> tuple[int, int, int]:
    """Estimate and limits in whole percent; -1 for limits that are not known."""
    if math.isnan(mean.low):
        return round(100 * mean.estimate), -1, -1
    return round(100 * mean.estimate), round(100 * mean.low), round(100 * mean.high)


def _runs(values: Sequence[int]) -> list[int]:
    """Values as `[value, end, value, end, ...]`: each holds up to, and without, position `end`."""
    runs, end = [], 0
    for value, equal in groupby(values):
        end += len(list(equal))
        runs += [value, end]
    return runs


def _at(runs: Sequence[int], position: int) -> int:
    return next(value for value, end in zip(runs[::2], runs[1::2], strict=True) if position < end)


def _grid(scores: NDArray[np.float64], mark: float | None) -> NDArray[np.float64]:
    """Thresholds in equal round steps, from below 0 and the lowest score to the highest, and the mark."""
    finite = scores[np.isfinite(scores)]
    known = [0.0, *finite.tolist(), *([] if mark is None else [mark])]
    low, high = min(known), max(known)
    wanted = (high - low) / STEPS or 1.0
    power = 10.0 ** math.floor(math.log10(wanted))
    step = power * next(nice for nice in _NICE if nice * power >= wanted * (1 - 1e-9))
    # One step below the lowest score: there, whatever has a score is refused.
    grid = step * np.arange(math.floor(low / step) - 1, math.ceil(high / step) + 1)
    grid = np.round(grid, max(0, -math.floor(math.log10(step))))
    return grid if mark is None else np.union1d(grid, [mark])


def _short(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _row(group: str, texts: int, shares: tuple[int, int, int], *, first: bool) -> dict[str, Any]:
    share, low, high = shares
    label = f"{share} % [{low}, {high}]" if low >= 0 else f"{share} % [no interval]"
    low, high = (low, high) if low >= 0 else (0, 0)
    return {
        "group": group,
        "texts": texts,
        "share": share,
        "low": low,
        "high": high,
        "label": label,
        "positive": first,
    }


def _check(
    frame: pd.DataFrame, start: tuple[str, str], positive: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    missing = [column for column in COLUMNS if column not in frame]
    scores = pd.Series(dtype=float) if missing else frame["score"]
    if missing or not len(frame) or scores.isna().any() or (scores == math.inf).any():
        raise ParameterError(
            "There are no scores to move a threshold over.",
            given=f"{len(frame)} rows, missing columns: {', '.join(missing) or 'none'}",
            expected=f"rows with {', '.join(COLUMNS)}, and scores below infinity",
            mend="pass the frame of bci_scores.scored",
        )
    filters, scorers = (tuple(map(str, frame[column].unique())) for column in ("filter", "scorer"))
    if start[0] not in filters or start[1] not in scorers or positive not in set(frame["group"]):
        raise ParameterError(
            "The slider cannot start there.",
            given=f"start={start!r}, positive={positive!r}",
            expected=f"one of {', '.join(filters)}; one of {', '.join(scorers)}; a group with texts",
            mend="choose them from the frame",
        )
    if (
        frame.groupby(["filter", "scorer", "group"]).ngroups
        != len(filters) * len(scorers) * frame["group"].nunique()
    ):
        raise ParameterError(
            "A score is missing under some filter.",
            given=f"{len(filters)} filters, {len(scorers)} scorers, {frame['group'].nunique()} groups",
            expected="scores of every group by every scorer under every filter",
            mend="score the same texts with the same scorers under each filter",
        )
    return filters, scorers


def _one_line(text: str) -> str:
    """A style sheet or script without line breaks and indentation: every slider carries both."""
    return re.sub(r"\s*\n\s*", " ", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)).strip()


_TEMPLATES = Environment(
    loader=PackageLoader("tracealign_lib"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
_TEMPLATES.filters["visible"] = visible
_TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
_STYLE = Markup(_one_line(_TEMPLATES.get_template("slider.css").render()))
_SCRIPT = Markup(_one_line(_TEMPLATES.get_template("slider.js").render()))
