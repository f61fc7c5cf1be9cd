"""How far an exposure stands for the training that it replaces: agreement, beside what chance would give.

Most items of the pool drift after full training, so always answering "drift" agrees with it for most items.
Agreement alone therefore says little; Cohen's kappa takes out what two raters with these shares would agree
on by chance, and the shares found among items with and without drift show where the two part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracealign_lib import causal
from tracealign_lib.causal import Floats
from tracealign_lib.experiments import bound, causal_arms
from tracealign_lib.experiments.common import Headlines, clusters, short
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.results import Results
from tracealign_lib.stats import Interval, JudgeError, clustered_rate

SAME, CONSTANT, KAPPA = "same verdict", "same verdict, always answering the commoner one", "Cohen's kappa"
KEPT, CALM = "drifting items that drift in the exposure", "other items that do not drift in it"
FULL, EXPOSED = "drift after full training", "drift after the exposure"
CORRELATION = "correlation of log-probabilities"


def fidelity_frame(pipelines: Sequence[Pipeline]) -> pd.DataFrame:
    """One row per left-out item: drift and log_prob of the base model and of the reference exposure."""
    frames = []
    for pipeline in pipelines:
        whole = causal.measure_items(pipeline.model("base"), pipeline)
        exposed = causal_arms.exposure(pipeline).measure()
        kept = ["item", "copies", "drift", "log_prob"]
        both = whole[kept].merge(
            exposed[["item", "drift", "log_prob"]], on="item", suffixes=("", ", exposed")
        )
        items = [item.id for item in bound.left_out_items(pipeline.world)]
        frames.append(both[both["item"].isin(items)].assign(seed=pipeline.seed))
    return pd.concat(frames, ignore_index=True)


def fidelity(frame: pd.DataFrame) -> Headlines:
    """How full training and exposure agree on the left-out items; measures that are undefined have n = 0."""
    full, exposed = (frame[name].to_numpy(dtype=bool) for name in ("drift", "drift, exposed"))
    common = full == (full.mean() >= 0.5)
    labels = clusters(frame)
    rates = {FULL: full, EXPOSED: exposed, SAME: full == exposed, CONSTANT: common}
    found = {name: clustered_rate(values.astype(float), labels) for name, values in rates.items()}
    found[KAPPA] = _of_pairs(_kappa, full.astype(float), exposed.astype(float))
    error = JudgeError.of(full.tolist(), exposed.tolist())
    found[KEPT] = error.sensitivity if error.positives else _UNDEFINED
    found[CALM] = error.specificity if error.negatives else _UNDEFINED
    columns = (frame[name].to_numpy(dtype=float) for name in ("log_prob", "log_prob, exposed"))
    return found | {CORRELATION: _of_pairs(_correlation, *columns)}


def fidelity_table(frame: pd.DataFrame, published: Results) -> pd.DataFrame:
    """`fidelity` of this run beside the published worlds': all items together, and the range over worlds."""
    rows = []
    for name, found in fidelity(frame).items():
        worlds = [values["fidelity"].get(name) for values in published["per seed"].values()]
        known = [interval.estimate for interval in worlds if interval]
        rows.append(
            {
                "measure": name,
                "this run": short(found),
                "published": short(published["fidelity"].get(name, _UNDEFINED)),
                "range over worlds": f"{min(known):.2f} to {max(known):.2f}" if known else "",
            }
        )
    return pd.DataFrame(rows)


_UNDEFINED = Interval(math.nan, math.nan, math.nan, 0)


def _of_pairs(statistic: Callable[..., NDArray[np.float64]], first: Floats, second: Floats) -> Interval:
    """A statistic of paired values, with its percentile bootstrap interval over pairs."""
    estimate = float(statistic(first, second))
    if math.isnan(estimate):
        return _UNDEFINED
    drawn = np.random.default_rng(0).integers(len(first), size=(2000, len(first)))
    again = statistic(first[drawn], second[drawn])  # (2000,)
    low, high = np.nanquantile(again, [0.025, 0.975])  # undefined where a resample holds one value alone
    return Interval(estimate, float(low), float(high), len(first))


def _kappa(first: Floats, second: Floats, axis: int = -1) -> Floats:
    """Cohen's kappa of two yes-or-no verdicts, coded 1 and 0."""
    a, b = first.mean(axis), second.mean(axis)
    chance = a * b + (1 - a) * (1 - b)
    return _ratio((first == second).mean(axis) - chance, 1 - chance)


def _correlation(first: Floats, second: Floats, axis: int = -1) -> Floats:
    """Pearson's correlation."""
    a, b = (part - part.mean(axis, keepdims=True) for part in (first, second))
    return _ratio((a * b).sum(axis), np.sqrt((a * a).sum(axis) * (b * b).sum(axis)))


def _ratio(over: Floats, under: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.abs(under) > 1e-12, np.divide(over, under), np.nan)
