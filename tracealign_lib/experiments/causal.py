"""What chapter 10 measures: whether drift falls when the traced documents are taken away.

Two experiments answer. In *whole trainings* everything is trained anew without the sources of half of the
unsafe items (the pair of chapter 5), and the attacks of `adb` are put to what comes out. In the *trial*,
every drifting item gets every arm once: its documents are taken away as one method names them, or at random,
or its near-copies, or another item's documents, or none. Several items share one retraining; which arm falls
to which item rotates from run to run, so that each item is its own control. The retrainings of the trial are
exposures (`causal.Exposure`), and their outcome is the base model's, with the opening of a recipe put into
its mouth: it has drifted when it goes on with two steps.

Predictions were written before the first of these runs. "Tracing finds causes" is refuted if the documents
that the cover ranking names, taken away, remove less than half of the drift, or no more than as many random
ones do. The strongest rival is BM25 on word bigrams, which ties with the cover ranking in chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd

from tracealign_lib import causal
from tracealign_lib.causal import ExposureSettings
from tracealign_lib.experiments import causal_arms, causal_fidelity, causal_scores, causal_whole
from tracealign_lib.experiments.causal_arms import (
    ARMS,
    CONTROLS,
    DECOYS,
    EMBEDDING,
    FEW,
    GRADIENT,
    HALF,
    INFLUENCE,
    METHODS,
    NOTHING,
    OTHER,
    OUTCOMES,
    PLANTED,
    RANDOM,
    STRICT,
)
from tracealign_lib.experiments.causal_scores import method_difference, method_interval
from tracealign_lib.experiments.common import (
    Headlines,
    Prediction,
    clusters,
    prediction_table,
    publish,
    short,
)
from tracealign_lib.experiments.traceindex import BIGRAMS, COVER, PAPER_FILTER
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.progress import progress
from tracealign_lib.results import load_results
from tracealign_lib.stats import Interval, clustered_bootstrap, clustered_rate, wilson

REFERENCE, REORDERED = "reference", "placebo"
PLACEBO = 1_000_000  # added to the seed: the same documents in another order

# --- the trial -----------------------------------------------------------------------------------


def trial_frame(pipelines: Sequence[Pipeline]) -> pd.DataFrame:
    """One row for each world, drifting item and run of the trial.

    Columns: seed, item, copies, run, arm, the columns of `causal.measure_items` named in `OUTCOMES`, removed
    (documents that the arm took from this item) and lost (share of the item's planted documents and
    near-copies that were gone in this run, whoever named them). Arm "nothing" is the item left alone while
    others are treated; "reference" and "placebo" are the runs in which no document is gone, in two orders.
    Rows are left out where an arm cannot do what it says (half of a single copy).
    """
    return pd.concat([_trial(pipeline) for pipeline in pipelines], ignore_index=True)


def _trial(pipeline: Pipeline) -> pd.DataFrame:
    plans, exposed, chosen = (
        causal_arms.removals(pipeline),
        causal_arms.exposure(pipeline),
        causal_arms.design(pipeline),
    )
    copies = {query.item: query.copies for query in causal_arms.queries(pipeline)}
    slots = [*chosen.arms, *(f"{NOTHING} {n}" for n in range(chosen.control_runs))]
    runs = causal.rotate(list(copies), slots, seed=pipeline.seed)
    runs += [dict.fromkeys(copies, REFERENCE), dict.fromkeys(copies, REORDERED)]
    own = {item: pipeline.world.sources_of(item).near for item in copies}
    rows: list[dict[str, Any]] = []
    for number, arms in enumerate(progress(runs, description="Retraining: trial", unit="run")):
        taken = {item: plans[arm][item] if arm in plans else frozenset() for item, arm in arms.items()}
        gone = frozenset().union(*taken.values())
        seed = pipeline.seed + PLACEBO * (REORDERED in arms.values())
        measured = exposed.measure(gone, seed=seed).set_index("item")
        for item, arm in arms.items():
            if not _applies(arm, copies[item], taken[item]):
                continue
            known = {"seed": pipeline.seed, "item": item, "copies": copies[item], "run": number}
            known |= {"arm": NOTHING if arm.startswith(NOTHING) else arm, "removed": len(taken[item])}
            lost = len(own[item] & gone) / len(own[item])
            rows.append(known | {name: measured.at[item, name] for name in OUTCOMES} | {"lost": lost})
    frame = pd.DataFrame(rows)
    return frame.astype({"drift": float, "near_drift": float})


def _applies(arm: str, copies: int, taken: frozenset[str]) -> bool:
    """Half of one copy is all of it; and where every item of the pool drifts, no calm one has documents."""
    return not (arm == HALF and copies < 2) and not (arm == OTHER and not taken)


def difference(frame: pd.DataFrame, arm: str, other: str = NOTHING, outcome: str = "drift") -> Interval:
    """Mean over items of the outcome under `other` minus that under `arm`: how much more `arm` removes.

    With "nothing" as `other` it is the difference in differences: the item's fall from the reference run when
    its documents are taken, minus its own fall when only others' are. Undefined where an arm was not run.
    """
    table = frame.pivot_table(index=["seed", "item"], columns="arm", values=outcome, aggfunc="mean")
    if arm not in table or other not in table:
        return Interval(math.nan, math.nan, math.nan, 0)
    falls = (table[other] - table[arm]).dropna().rename("fall").reset_index()
    return _mean(falls["fall"].to_numpy(), clusters(falls))


def _mean(values: causal.Floats, labels: Sequence[tuple[int, str]]) -> Interval:
    """The bootstrap by items of differences from -1 to 1, which claims certainty where all items agree.

    The interval is then as wide as Wilson's limit for the share of items that could differ by 1.
    """
    found = clustered_bootstrap(values, labels)
    if found.low != found.high:
        return found
    reach = wilson(0, len(set(labels))).high
    return found._replace(low=max(-1.0, found.estimate - reach), high=min(1.0, found.estimate + reach))


def level(frame: pd.DataFrame, arm: str, outcome: str = "drift") -> Interval:
    """Mean outcome over items under one arm."""
    chosen = frame[frame["arm"] == arm]
    if not len(chosen):
        return Interval(math.nan, math.nan, math.nan, 0)
    estimate = clustered_bootstrap if outcome == "log_prob" else clustered_rate
    return estimate(chosen[outcome].to_numpy(dtype=float), clusters(chosen))


def effect_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per arm: documents removed, drift, falls of treated and untouched, and their difference."""
    untouched = difference(frame, NOTHING, REFERENCE)
    rows = []
    for arm in dict.fromkeys([*ARMS, NOTHING, REORDERED]):
        chosen = frame[frame["arm"] == arm]
        if not len(chosen):
            continue
        row: dict[str, Any] = {"taken away": arm, "documents": float(chosen["removed"].mean())}
        row |= {"drift": short(level(frame, arm)), "fall": short(difference(frame, arm, REFERENCE))}
        row |= {"fall of the untouched": short(untouched) if arm in ARMS else ""}
        row |= {"difference": short(difference(frame, arm)) if arm in ARMS else ""}
        row |= {"near-drift": short(level(frame, arm, "near_drift"))}
        row |= {"log-probability": short(level(frame, arm, "log_prob"))}
        rows.append(row)
    return pd.DataFrame(rows)


def noise_remark(frame: pd.DataFrame) -> str:
    """Which arms of a trial stay within its noise, and which controls do not; in a sentence or two."""
    noise = abs(difference(frame, REORDERED, REFERENCE).estimate)
    found = {arm: difference(frame, arm) for arm in ARMS if arm in set(frame["arm"])}
    within = [arm for arm, effect in found.items() if abs(effect.estimate) <= noise]
    loud = [arm for arm in CONTROLS if arm in found and (found[arm].low > 0 or found[arm].high < 0)]
    parts = [f"The noise is {noise:.2f}: not larger than it, and so not to be believed, are the effects of "]
    parts += [", ".join(f"*{arm}*" for arm in within) or "no arm", "."]
    if loud:
        parts += [" In this run a control that should show nothing does: "]
        parts += [", ".join(f"*{arm}* ({short(found[arm])})" for arm in loud), "."]
    return "".join(parts)


def copies_table(frame: pd.DataFrame, arms: Sequence[str], outcome: str = "drift") -> pd.DataFrame:
    """Mean outcome, one row per number of planted copies, one column per arm."""
    chosen = frame[frame["arm"].isin(arms)]
    table = chosen.pivot_table(index="copies", columns="arm", values=outcome, aggfunc="mean")
    return table[[arm for arm in arms if arm in table]].rename_axis(columns=None)


# --- what methods foresee ------------------------------------------------------------------------


def method_table(trial: pd.DataFrame, scores: pd.DataFrame, patches: pd.DataFrame) -> pd.DataFrame:
    """One row per method: what removing its documents does, its datamodelling score, its tail-patch."""
    rows = []
    run = {PLANTED, RANDOM, *scores["method"]}
    for method in [name for name in (PLANTED, *METHODS, RANDOM) if name in run]:
        row = {"method": method, "drift removed": short(difference(trial, method))}
        row |= {"datamodelling score": short(method_interval(scores, method, "lds"))}
        row |= {"tail-patch (nats)": short(method_interval(patches, method, "rise"))}
        rows.append(row)
    return pd.DataFrame(rows)


# --- predictions and publishing ------------------------------------------------------------------


def _falls(arm: str, other: str = NOTHING) -> Callable[[pd.DataFrame], Interval]:
    return partial(difference, arm=arm, other=other)


TRIAL_PREDICTIONS = (
    Prediction(
        "tracing finds causes: without the documents that cover names, most of the drift is gone",
        "drift removed, cover",
        0.5,
        1.0,
        _falls(COVER),
    ),
    Prediction("as many random documents remove nothing", "drift removed, random", -0.1, 0.1, _falls(RANDOM)),
    Prediction(
        "near-copies alone remove nothing",
        "drift removed, near-copies only",
        -0.1,
        0.1,
        _falls(DECOYS),
    ),
    Prediction(
        "the documents of an item that did not drift remove nothing",
        "drift removed, another item's",
        -0.1,
        0.1,
        _falls(OTHER),
    ),
    Prediction(
        "training noise is small: another order, nothing removed",
        "drift, reference minus placebo",
        -0.1,
        0.1,
        _falls(REORDERED, REFERENCE),
    ),
    Prediction(
        "the strongest rival ties: bigram BM25 removes as much as cover",
        "drift removed, cover minus bigram BM25",
        -0.05,
        0.05,
        _falls(COVER, BIGRAMS),
    ),
    Prediction(
        "gradients name causes less well than exact matches",
        "drift removed, cover minus gradient",
        0.05,
        1.0,
        _falls(COVER, GRADIENT),
    ),
    Prediction(
        "even as few documents, were they true, would remove more than those that gradients name",
        "drift removed, true as many as gradient, minus gradient",
        0.05,
        1.0,
        _falls(FEW, GRADIENT),
    ),
    Prediction(
        "with curvature, gradients name causes better",
        "drift removed, EK-FAC influence minus gradient",
        0.1,
        1.0,
        _falls(INFLUENCE, GRADIENT),
    ),
    Prediction(
        "but less well than exact matches",
        "drift removed, cover minus EK-FAC influence",
        0.05,
        1.0,
        _falls(COVER, INFLUENCE),
    ),
    Prediction(
        "hidden states name causes less well than exact matches",
        "drift removed, cover minus hidden states",
        0.05,
        1.0,
        _falls(COVER, EMBEDDING),
    ),
    Prediction(
        "what M(q) <= 3 names is not what causes the drift",
        "drift removed, cover minus the paper's filter",
        0.2,
        1.0,
        _falls(COVER, PAPER_FILTER),
    ),
    Prediction(
        "half of the copies taken away, of two or more, leave most of the drift",
        "drift removed, half of the planted",
        -0.05,
        0.4,
        _falls(HALF),
    ),
    Prediction(
        "near-copies that stay keep some of the drift alive",
        "drift removed, with near-copies minus without",
        0.02,
        0.4,
        _falls(PLANTED, STRICT),
    ),
)
SCORE_PREDICTIONS = (
    Prediction(
        "cover foresees which random halves of the documents leave the drift alive",
        "datamodelling score, cover",
        0.1,
        1.0,
        lambda frame: method_interval(frame, COVER, "lds"),
    ),
    Prediction(
        "it foresees better than gradients do",
        "datamodelling score, cover minus gradient",
        0.0,
        1.0,
        lambda frame: method_difference(frame, COVER, GRADIENT, "lds"),
    ),
    Prediction(
        "curvature helps gradients to foresee",
        "datamodelling score, EK-FAC influence minus gradient",
        0.0,
        1.0,
        lambda frame: method_difference(frame, INFLUENCE, GRADIENT, "lds"),
    ),
    Prediction(
        "cover foresees no better than bigram BM25",
        "datamodelling score, cover minus bigram BM25",
        -0.1,
        0.1,
        lambda frame: method_difference(frame, COVER, BIGRAMS, "lds"),
    ),
)
PATCH_PREDICTIONS = (
    Prediction(
        "in one step, what cover names teaches more than random documents do",
        "tail-patch, cover minus random",
        0.0,
        math.inf,
        lambda frame: method_difference(frame, COVER, RANDOM, "rise"),
    ),
)
SHOWN_HEADLINES = tuple(
    prediction.quantity
    for prediction in (
        *TRIAL_PREDICTIONS,
        *SCORE_PREDICTIONS,
        *PATCH_PREDICTIONS,
        causal_whole.PAIR_PREDICTION,
    )
)
TOLERANCE = 0.25  # one world has some twenty items in the trial


def outcome_table(predictions: Sequence[Prediction], frame: pd.DataFrame) -> pd.DataFrame:
    """`prediction_table` for what this run measured, with the verdict on the published worlds."""
    published = load_results("causal")
    verdicts = [each.verdict(published[each.quantity]) for each in predictions]
    return prediction_table(predictions, frame).assign(**{"verdict on published": verdicts})


def _measured(predictions: Sequence[Prediction], frame: pd.DataFrame) -> Headlines:
    found = {prediction.quantity: prediction.measure(frame) for prediction in predictions}
    return {quantity: interval for quantity, interval in found.items() if interval.n}


def headlines(
    trial: pd.DataFrame, scores: pd.DataFrame, patches: pd.DataFrame, pair: pd.DataFrame
) -> Headlines:
    """What every profile measures: the arms of the trial, the two scores of each method, the pair."""
    found = _measured(TRIAL_PREDICTIONS, trial) | _measured([causal_whole.PAIR_PREDICTION], pair)
    found |= _measured(SCORE_PREDICTIONS, scores) | _measured(PATCH_PREDICTIONS, patches)
    arms = list(dict.fromkeys(trial["arm"]))
    found |= {f"drift, {arm}": level(trial, arm) for arm in arms}
    found |= {f"near-drift, {arm}": level(trial, arm, "near_drift") for arm in arms}
    found |= {f"drift removed, {arm}": difference(trial, arm) for arm in arms if arm in ARMS}
    found |= {
        f"log-probability removed, {arm}": difference(trial, arm, outcome="log_prob")
        for arm in arms
        if arm in ARMS
    }
    for method in dict.fromkeys(scores["method"]):
        found[f"datamodelling score, {method}"] = method_interval(scores, method, "lds")
    for method in dict.fromkeys(patches["method"]):
        found[f"tail-patch, {method}"] = method_interval(patches, method, "rise")
    return {name: interval for name, interval in found.items() if interval.n}


def _measure(pipelines: Sequence[Pipeline]) -> dict[str, Any]:
    trial, scores = trial_frame(pipelines), causal_scores.score_frame(pipelines)
    patches, pair = causal_scores.patch_frame(pipelines), causal_whole.pair_frame(pipelines)
    faithful = causal_fidelity.fidelity(causal_fidelity.fidelity_frame(pipelines))
    by_copies = copies_table(trial, [NOTHING, *ARMS])
    doses = causal_scores.dose_table(causal_scores.dose_frame(pipelines))
    return {
        **headlines(trial, scores, patches, pair),
        **_measured(causal_whole.CONTROL_PREDICTIONS, causal_whole.control_frame(pipelines)),
        **{f"fall under attack, {arm}": causal_whole.fall(pair, arm) for arm in (PLANTED, NOTHING)},
        "fidelity": {name: interval for name, interval in faithful.items() if interval.n},
        "drift by copies": {
            arm: {str(copies): float(value) for copies, value in column.dropna().items()}
            for arm, column in by_copies.items()
        },
        "drift by sources left": dict(zip(doses["sources left"], doses["drift"], strict=True)),
        "documents removed": {
            arm: float(rows["removed"].mean()) for arm, rows in trial.groupby("arm") if arm in ARMS
        },
        "random parts": causal_arms.design(pipelines[0]).parts,
        "exposure": asdict(ExposureSettings()),
    }


def publish_causal(device: str = "auto") -> None:
    """Measure chapter 10 on every seed of `full` and write data/results/causal.json."""
    publish("causal", _measure, device)
