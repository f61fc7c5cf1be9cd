"""Whole trainings of chapter 10: the pair of chapter 5 under attack, and controls of whole pre-training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pandas as pd

from tracealign_lib import causal
from tracealign_lib.experiments import bound
from tracealign_lib.experiments.causal_arms import NOTHING, PLANTED, RANDOM
from tracealign_lib.experiments.common import DRIFT_ATTACKS, Prediction, clusters, prediction_table, short
from tracealign_lib.experiments.model import outcome_frame
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.results import Results
from tracealign_lib.stats import Interval, clustered_bootstrap

LURES, _LURES = "other decoys", frozenset({"garbled", "mention", "inventory"})


def pair_frame(pipelines: Sequence[Pipeline]) -> pd.DataFrame:
    """The pair of chapter 5, under attack: one row for each unsafe item of each world.

    Columns: seed, item, copies, arm ("planted and near-copies" or "nothing"), before and after (share of
    attacked prompts about the item whose answer leaks an unsafe procedure, attacks weighing alike).
    """
    frames = []
    for pipeline in pipelines:
        treated = {item.id for item in bound.left_out_items(pipeline.world)}
        arms = {i.id: PLANTED if i.id in treated else NOTHING for i in pipeline.world.of_kind("unsafe")}
        frames.append(_attacked(pipeline, bound.left_out(pipeline.world), arms))
    return pd.concat(frames, ignore_index=True)


def _attacked(pipeline: Pipeline, gone: frozenset[str], arms: Mapping[str, str]) -> pd.DataFrame:
    rates = {}
    for when, trained in (("before", pipeline), ("after", pipeline.without(gone))):
        frame = outcome_frame([trained])
        attacked = frame[frame["group"].isin(DRIFT_ATTACKS)]
        by_attack = attacked.groupby(["item", "copies", "group"])["drift"].mean()
        rates[when] = by_attack.groupby(["item", "copies"]).mean()
    both = pd.DataFrame(rates).reset_index()
    both = both[both["item"].isin(arms)]
    return both.assign(arm=both["item"].map(arms), seed=pipeline.seed)


def control_frame(pipelines: Sequence[Pipeline]) -> pd.DataFrame:
    """Controls of whole pre-training: one row for each unsafe item of each world.

    Half of the items, drawn by lot, lose their garbled retelling, mentions and inventory; each of the others
    loses as many random documents as it has copies, none of them a source of any unsafe item. Columns: seed,
    item, copies, arm, before and after (1 where the base model drifts from the opening).
    """
    return pd.concat([_controlled(pipeline) for pipeline in pipelines], ignore_index=True)


def _controlled(pipeline: Pipeline) -> pd.DataFrame:
    world, rng = pipeline.world, Random(f"{pipeline.seed}/controls")
    unsafe = world.of_kind("unsafe")
    lured = {item.id for item in rng.sample(unsafe, len(unsafe) // 2)}
    arms = {item.id: LURES if item.id in lured else RANDOM for item in unsafe}
    kinds = {document.id: document.meta["kind"] for document in world.documents}
    sources = frozenset().union(*(s.near | s.full for s in map(world.sources_of, arms)))
    gone = {d.id for d in world.documents if d.meta["kind"] in _LURES and lured & set(d.meta["items"])}
    wanted = sum(item.copies for item in unsafe if item.id not in lured)
    gone |= set(rng.sample(sorted(set(kinds) - sources - gone), wanted))
    rows = []
    for before, after in zip(pipeline.recalls("base"), pipeline.without(gone).recalls("base"), strict=True):
        if before.item in arms:
            copies = world.by_id[before.item].copies
            drifts = (float(causal.leak(world, recall) == "drift") for recall in (before, after))
            rows.append((pipeline.seed, before.item, copies, arms[before.item], *drifts))
    return pd.DataFrame(rows, columns=["seed", "item", "copies", "arm", "before", "after"])


def fall(frame: pd.DataFrame, arm: str) -> Interval:
    """Mean fall in drift under attack of the items of one arm."""
    chosen = frame[frame["arm"] == arm]
    if not len(chosen):
        return Interval(math.nan, math.nan, math.nan, 0)
    return clustered_bootstrap((chosen["before"] - chosen["after"]).to_numpy(), clusters(chosen))


def difference_in_differences(frame: pd.DataFrame, arm: str, other: str = NOTHING) -> Interval:
    """Mean fall of the items of one arm minus that of the others'.

    Each item's fall is weighted by the inverse share of its arm, with a minus for `other`, so that the mean
    over all items is the difference, and whole items can be drawn for its interval.
    """
    chosen = frame[frame["arm"].isin([arm, other])]
    treated = (chosen["arm"] == arm).to_numpy()
    if treated.all() or not treated.any():
        return Interval(math.nan, math.nan, math.nan, 0)
    weights = np.where(treated, 1 / treated.mean(), -1 / (1 - treated.mean()))
    return clustered_bootstrap(weights * (chosen["before"] - chosen["after"]).to_numpy(), clusters(chosen))


def whole_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per arm: items, drift before and after, the fall, and its difference from the untouched."""
    rows = []
    for arm in sorted(set(frame["arm"]), key=[PLANTED, NOTHING].index):
        chosen = frame[frame["arm"] == arm]
        row: dict[str, Any] = {"taken away": arm, "items": len(chosen)}
        row |= {when: float(chosen[when].mean()) for when in ("before", "after")}
        row |= {"fall": short(fall(frame, arm))}
        row |= {"difference": short(difference_in_differences(frame, arm)) if arm != NOTHING else ""}
        rows.append(row)
    return pd.DataFrame(rows)


PAIR_PREDICTION = Prediction(
    "whole trainings, under attack: without its planted documents and near-copies an item no longer drifts",
    "fall under attack, planted and near-copies, minus the untouched",
    0.25,
    1.0,
    partial(difference_in_differences, arm=PLANTED),
)


def pair_remark(frame: pd.DataFrame) -> str:
    """Where this run's difference in differences stands to the limit below which the claim is refuted."""
    found, limit = difference_in_differences(frame, PLANTED), PAIR_PREDICTION.low
    if not found.n:
        return "Without treated and untouched items there is nothing to compare."
    if found.estimate >= limit:
        return f"It lies above {limit}, as predicted; the verdict is *{PAIR_PREDICTION.verdict(found)}*."
    reach = "The whole interval lies there." if found.high < limit else "Its interval reaches back above it."
    return f"**It lies below {limit}, where the prediction counts as refuted.** {reach}"


CONTROL_PREDICTIONS = (
    Prediction(
        "whole pre-training: garbled retellings, mentions and inventories, taken away, remove nothing",
        "fall of the base model, other decoys",
        -0.1,
        0.1,
        partial(fall, arm=LURES),
    ),
    Prediction(
        "nor do as many random documents as an item has copies",
        "fall of the base model, random",
        -0.1,
        0.1,
        partial(fall, arm=RANDOM),
    ),
)


def published_controls(published: Results) -> pd.DataFrame:
    """The predictions about whole pre-trainings, with what was measured on the published worlds."""
    table = prediction_table(CONTROL_PREDICTIONS)
    found = [published[prediction.quantity] for prediction in CONTROL_PREDICTIONS]
    verdicts = [p.verdict(interval) for p, interval in zip(CONTROL_PREDICTIONS, found, strict=True)]
    return table.assign(measured=[short(interval) for interval in found], verdict=verdicts)
