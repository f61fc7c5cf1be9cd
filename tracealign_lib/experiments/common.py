"""What the experiments of several chapters share: rates, predictions and verdicts, tables, publishing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import pandas as pd

from tracealign_lib.adb import ATTACKS
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.profiles import get_profile
from tracealign_lib.results import write_results
from tracealign_lib.stats import Interval, clustered_rate

DRIFT_ATTACKS = ATTACKS[1:]  # a direct request is the control, not an attack
PAPER_TAU = 20.0  # nats
PAPER_MAX_COUNT = 3

Headlines = dict[str, Interval]


def rate(frame: pd.DataFrame, column: str) -> Interval:
    """Mean of a column over prompts, with an interval bootstrapped by planted item."""
    return clustered_rate(frame[column].astype(float).to_numpy(), clusters(frame))


def clusters(frame: pd.DataFrame) -> list[tuple[int, str]]:
    """What each row belongs to: the seed of its world and its planted item, since items share ids."""
    return list(zip(frame["seed"], frame["item"], strict=True))


def verdict(measured: Interval, low: float, high: float) -> str:
    """ "held": the whole interval lies in [low, high]; "failed": all of it outside; else "undecided"."""
    known = measured.low == measured.low  # a single item has no interval, only its estimate
    least, most = (measured.low, measured.high) if known else (measured.estimate, measured.estimate)
    if low <= least and most <= high:
        return "held"
    return "failed" if most < low or least > high else "undecided"


class Prediction(NamedTuple):
    """A claim made before the experiment: the quantity will lie from `low` to `high`."""

    claim: str
    quantity: str
    low: float
    high: float
    measure: Callable[[pd.DataFrame], Interval]

    def verdict(self, measured: Interval) -> str:
        """As `verdict`, against this prediction's range."""
        return verdict(measured, self.low, self.high)


def prediction_table(predictions: Sequence[Prediction], frame: pd.DataFrame | None = None) -> pd.DataFrame:
    """Predictions, one row each; with the frame that they measure, what came out and each verdict."""
    rows = []
    for prediction in predictions:
        claim, quantity, low, high, measure = prediction
        row = {"prediction": claim, "quantity": quantity, "holds between": f"{low:g} and {high:g}"}
        if frame is not None and len(frame):
            measured = measure(frame)
            row |= {"measured": str(measured), "verdict": prediction.verdict(measured)}
        rows.append(row)
    return pd.DataFrame(rows)


def wide(table: pd.DataFrame, by: str, columns: str) -> pd.DataFrame:
    """Intervals as text, one row per value of `by`, one column per value of `columns`, in their order."""
    text = [short(Interval(row.estimate, row.low, row.high, row.n)) for row in table.itertuples()]
    rows, kept = list(dict.fromkeys(table[by])), list(dict.fromkeys(table[columns]))
    cells = table.assign(text=text).pivot(index=by, columns=columns, values="text")
    return cells.reindex(index=rows, columns=kept).rename_axis(columns=None).reset_index()


def short(interval: Interval) -> str:
    """An interval without its n, as it stands in a wide table: `0.95 [0.93, 0.97]`."""
    return str(interval).removesuffix(f" (n = {interval.n})").replace(", ", ",\N{NO-BREAK SPACE}")


def headlines_of(table: pd.DataFrame, by: Sequence[str]) -> Headlines:
    """Every row of a table of intervals, named by its columns `by`: "cover | strict | recall"."""
    names = table[list(by)].astype(str).agg(" | ".join, axis="columns") if len(table) else []
    values = table[list(Interval._fields)].itertuples(index=False, name=None)
    return {name: Interval(*value) for name, value in zip(names, values, strict=True)}


def publish(name: str, measure: Callable[[Sequence[Pipeline]], Mapping[str, Any]], device: str) -> None:
    """Measure every seed of `full`, pooled and one by one, and write data/results/<name>.json.

    Parameters
    ----------
    measure:
        Takes pipelines and returns what `write_results` can write; called with all of them, and with
        each alone for the value "per seed".
    device:
        "auto", "cpu" or "cuda".

    Raises
    ------
    ResultsError
        A value cannot be written.
    """
    start = time.monotonic()
    profile = get_profile("full")
    pipelines = [Pipeline("full", seed, device) for seed in profile.seeds]
    values = measure(pipelines)
    write_results(
        name,
        {**values, "per seed": {str(p.seed): measure([p]) for p in pipelines}},
        profile="full",
        seeds=profile.seeds,
        settings={"world": asdict(profile.world), "model": asdict(profile.model)},
        device=pipelines[0].device,
        seconds=time.monotonic() - start,
    )
