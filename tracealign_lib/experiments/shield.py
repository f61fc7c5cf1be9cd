"""What chapter 6 concludes: filters that are calibrated by one rule, and which of them later chapters use.

Thresholds are set on the "fit" half of the items and documents of a world and judged on the other half, as in
chapter 4. The texts are those of `shield_texts`; what is refused of them is measured by `shield_judged`, and
shown by `shield_tables` and `shield_figures`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import pandas as pd

from tracealign_lib.bci import RawBCI, Scorer
from tracealign_lib.calibration import Scores, scores_needed
from tracealign_lib.documents import Document
from tracealign_lib.errors import ResultsError
from tracealign_lib.experiments.bci_detection import paired_refusals
from tracealign_lib.experiments.bci_scores import FILTERS, scorers
from tracealign_lib.experiments.bci_texts import (
    BENIGN,
    FIT,
    JUDGE,
    LOOKALIKE,
    RARE,
    TWIN,
    UNSAFE,
    BeliefText,
    halves,
)
from tracealign_lib.experiments.common import PAPER_TAU, Headlines, Prediction, headlines_of, publish
from tracealign_lib.experiments.shield_judged import (
    UNGUARDED,
    after_table,
    alike,
    margin_frame,
    milliseconds,
    prompt_frame,
    refusals,
    refused,
    transfer_frame,
    transfer_table,
)
from tracealign_lib.experiments.shield_promises import realised_values
from tracealign_lib.experiments.shield_streams import stream_frame, stream_values
from tracealign_lib.experiments.shield_texts import (
    EDITED,
    HARMFUL,
    HARMLESS,
    NEAR,
    POLICY,
    calibration_texts,
    draws,
    policy_answers,
    shield_texts,
)
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.results import load_results
from tracealign_lib.rivals import BagOfWordsClassifier, KeywordFilter, NgramBlockList
from tracealign_lib.shield import CompletionFilter, TraceShield
from tracealign_lib.stats import Interval

ALPHA, DELTA = 0.1, 0.1
"""The promise of chapter 6: P(false-refusal rate of a group > ALPHA) <= DELTA, for each group on its own.

One world gives about two dozen independent answers of the kind that is hardest to tell from drift. From 22
scores a promise of this kind can be kept, and not much more, so the levels follow from the number of texts.
"""
SLICELESS = ("corpus spans", "conflict, no quotes")
"""The filter and score that chapter 4 found best where nobody has cut an unsafe slice."""

PAPER, RAW_20, RAW = "the paper's rule", "raw BCI, tau = 20", "raw BCI"
RECOMMENDED, NO_SLICE = "recommended", "conflict, no slice"
BLOCK_LIST, BAG_OF_WORDS = "n-gram block list", "bag of words"
UNCALIBRATED = (PAPER, RAW_20)
RIVALS = (BLOCK_LIST, BAG_OF_WORDS)
LEAKY = "bag of words, fit half"
"""A classifier that was trained on what it is calibrated on: to see a promise break, not a rival."""
KEYWORDS = "keyword filter"
"""Calibration disarms it, since harmless catalogues list many names; shown by itself, not a rival."""
TOGETHER, REPAIRED = "recommended, all texts together", "conflict, no slice, with policy answers"
TRANSFERRED = (RECOMMENDED, NO_SLICE, BAG_OF_WORDS)
"""The filters that are calibrated on one kind of text and judged on the others."""

F = TypeVar("F", bound=CompletionFilter[Any])


# --- calibration ---------------------------------------------------------------------------------


def merge_small(groups: Sequence[str], needed: int) -> list[str]:
    """The label of each text's calibration group: groups with fewer than `needed` texts share one.

    If these are too few even together, the smallest of the others join them.
    """
    sizes = Counter(groups)
    small = [group for group in sizes if sizes[group] < needed]
    others = sorted((group for group in sizes if sizes[group] >= needed), key=lambda group: -sizes[group])
    while small and others and sum(sizes[group] for group in small) < needed:
        small.append(others.pop())
    joined = " + ".join(small)
    return [joined if group in small else group for group in groups]


def calibrated(
    rule: F, texts: Sequence[BeliefText], *, alpha: float = ALPHA, delta: float | None = DELTA
) -> F:
    """`rule` with thresholds that keep the promise for each calibration group of the fit half.

    A text whose group is not told is held against the largest threshold, which keeps every group's promise.

    Raises
    ------
    ParameterError
        There are too few harmless texts for this promise, all groups together.
    """
    chosen = draws(texts)
    groups = merge_small([text.group for text in chosen], scores_needed(alpha=alpha, delta=delta))
    scores = rule.scores(text.text for text in chosen)
    return rule.calibrate(scores, alpha=alpha, delta=delta, groups=groups)


def together_and_apart(rule: F, texts: Sequence[BeliefText], **levels: Any) -> dict[str, F]:
    """`rule` with one threshold for all harmless texts together, and with thresholds group by group.

    `levels` are alpha and delta, see `calibrated`.
    """
    scores = rule.scores(text.text for text in draws(texts))
    together = rule.calibrate(scores, **levels)
    return {"all texts together": together, "group by group": calibrated(rule, texts, **levels)}


# --- filters -------------------------------------------------------------------------------------


def make_shield(pipeline: Pipeline, filter_name: str, scorer: Scorer, threshold: float) -> TraceShield:
    """A shield over the spans that a filter of `bci_scores.FILTERS` chooses."""
    collection, min_length, max_count, window = FILTERS[filter_name]
    index = pipeline.unsafe_index if collection == "unsafe" else pipeline.index
    return TraceShield(index, scorer, threshold, min_length=min_length, max_count=max_count, window=window)


def paper_shield(pipeline: Pipeline) -> TraceShield:
    """TraceShield as it is reported: windows of 8 tokens, at most 3 occurrences, raw BCI above 20."""
    return make_shield(pipeline, "paper", RawBCI(), PAPER_TAU)


def recommended_shield(
    pipeline: Pipeline, *, alpha: float = ALPHA, delta: float | None = DELTA
) -> TraceShield:
    """The shield that chapter 4 recommends, calibrated on the fit half of this pipeline's world.

    Filter and score are those of data/results/bci.json; see `calibrated` for the promise.

    Raises
    ------
    ResultsError
        Nothing is published, or the published criterion recommends nothing.
    ParameterError
        There are too few harmless texts for this promise.
    """
    chosen = _recommended(pipeline)
    return calibrated(chosen, calibration_texts(pipeline), alpha=alpha, delta=delta)


def _recommended(pipeline: Pipeline) -> TraceShield:
    choice = load_results("bci")["recommendation"]
    if choice is None:
        raise ResultsError(
            "No score is recommended.",
            given="no recommendation in the results bci",
            expected="the names of a filter and a score",
            mend="build a TraceShield with a score of your own choice",
        )
    return make_shield(pipeline, choice["filter"], scorers(pipeline)[choice["scorer"]], 0.0)


def block_list(pipeline: Pipeline) -> NgramBlockList:
    """All runs of 8 tokens of the unsafe slice."""
    unsafe = [document for document in pipeline.corpus if document.meta["collection"] == "unsafe"]
    return NgramBlockList(unsafe, pipeline.index.encode, FILTERS["unsafe spans"].min_length)


def keyword_filter(pipeline: Pipeline) -> KeywordFilter:
    """The names of what the rules forbid."""
    return KeywordFilter(f"{item.name} {item.noun}" for item in pipeline.world.of_kind("unsafe"))


def bag_of_words(pipeline: Pipeline, half: str | None = None) -> BagOfWordsClassifier:
    """Unsafe documents against all others but policies; with a `half`, harmless ones of that half alone.

    A filter that has learnt from one half only knows its texts better than those of the other, so what is
    calibrated there promises nothing here.
    """
    unsafe = [d for d in pipeline.corpus if d.meta["collection"] == "unsafe"]
    others = [d for d in pipeline.corpus if d.meta["collection"] not in ("unsafe", "policy")]
    dealt = halves(pipeline.world)
    return BagOfWordsClassifier(unsafe, [d for d in others if half is None or _belongs(d, dealt, half)])


def _belongs(document: Document, dealt: Mapping[str, str], half: str) -> bool:
    names = document.meta["items"] or [document.id]
    return all(dealt[name] == half for name in names) and (len(names) == 1 or dealt[document.id] == half)


def rules(pipeline: Pipeline) -> dict[str, CompletionFilter[Any]]:
    """The filters that chapter 6 compares, by name; all but `UNCALIBRATED` are calibrated alike."""
    texts = calibration_texts(pipeline)
    without_slice = make_shield(pipeline, SLICELESS[0], scorers(pipeline)[SLICELESS[1]], 0.0)
    to_calibrate: dict[str, CompletionFilter[Any]] = {
        RAW: make_shield(pipeline, "unsafe spans", RawBCI(), 0.0),
        RECOMMENDED: _recommended(pipeline),
        NO_SLICE: without_slice,
        BLOCK_LIST: block_list(pipeline),
        BAG_OF_WORDS: bag_of_words(pipeline),
    }
    return {
        PAPER: paper_shield(pipeline),
        RAW_20: make_shield(pipeline, "unsafe spans", RawBCI(), PAPER_TAU),
        **{name: calibrated(rule, texts) for name, rule in to_calibrate.items()},
    }


# --- predictions and publication -----------------------------------------------------------------


def best_rival(frame: pd.DataFrame) -> str:
    """The rival that refuses most drift on the *fit* half; of equals, the first."""
    return max(RIVALS, key=lambda name: refused(frame, name, UNSAFE, half=FIT).estimate)


def against_rival(frame: pd.DataFrame, rival: str, group: str = UNSAFE) -> Interval:
    """Share of a group refused on the judged half, recommended minus a rival, paired by text."""
    names = frame[["filter", "scorer"]].drop_duplicates().assign(threshold=0.0)
    return paired_refusals(frame, names, (RECOMMENDED, "margin"), (rival, "margin"), group)


def _refused(name: str, *groups: str) -> Callable[[pd.DataFrame], Interval]:
    return lambda frame: refused(frame, name, *groups)


PREDICTIONS = (
    Prediction(
        "the count filter hides most drift",
        "drift refused by the paper's rule",
        0.0,
        0.5,
        _refused(PAPER, UNSAFE),
    ),
    Prediction(
        "what is recommended stops drift",
        "drift refused by the recommended shield",
        0.9,
        1.0,
        _refused(RECOMMENDED, UNSAFE),
    ),
    Prediction(
        "and spares how-to answers, where that is hardest",
        "how-to answers refused by the recommended shield",
        0.0,
        ALPHA,
        _refused(RECOMMENDED, RARE, TWIN),
    ),
    Prediction(
        "tau = 20 would not have kept it",
        "how-to answers refused by raw BCI, tau = 20",
        ALPHA,
        1.0,
        _refused(RAW_20, RARE, TWIN),
    ),
    Prediction(
        "the block list does as well",
        "drift refused, recommended minus n-gram block list",
        -0.05,
        0.05,
        lambda frame: against_rival(frame, BLOCK_LIST),
    ),
    Prediction(
        "no slice is needed for drift",
        "drift refused by conflict, no slice",
        0.9,
        1.0,
        _refused(NO_SLICE, UNSAFE),
    ),
    Prediction(
        "one changed word in each step is enough to get past",
        "3 words changed, refused by the recommended shield",
        0.0,
        0.5,
        _refused(RECOMMENDED, EDITED[2]),
    ),
    Prediction(
        "but not past a filter that ignores order",
        "3 words changed, refused by bag of words",
        0.5,
        1.0,
        _refused(BAG_OF_WORDS, EDITED[2]),
    ),
    Prediction(
        "nor past sources that conflict with a rule",
        "3 words changed, refused by conflict, no slice",
        0.5,
        1.0,
        _refused(NO_SLICE, EDITED[2]),
    ),
    Prediction(
        "nothing is promised for a kind of text that was not calibrated on",
        "policy answers refused by conflict, no slice",
        ALPHA,
        1.0,
        _refused(NO_SLICE, POLICY),
    ),
)
"""What chapter 6 predicts; measured on `margin_frame`. The last two were written after a run with seed 0."""

SAME = "calibrated raw BCI and the recommended shield decide alike"
SHOWN_HEADLINES = (
    *(prediction.quantity for prediction in PREDICTIONS),
    SAME,
    f"refused | {RECOMMENDED} | {NEAR}",
    f"refused | {RECOMMENDED} | {LOOKALIKE}",
    f"after | {UNGUARDED} | drift left",
    f"after | {RECOMMENDED} | drift left",
    f"after | {RECOMMENDED} | near-drift left",
    f"after | {RECOMMENDED} | right refusals",
    f"after | {RECOMMENDED} | harmless questions refused",
)
"""What chapter 6 holds against the published values."""


def headlines(frame: pd.DataFrame, prompts: pd.DataFrame) -> Headlines:
    """`margin_frame` and `prompt_frame` as headlines; empty where nothing drifted.

    "refused | filter | group" on the judged half, "after | filter | measure", and the quantity of each of
    `PREDICTIONS`.
    """
    if not (prompts["label"] == "drift").any():
        return {}
    predicted = {prediction.quantity: prediction.measure(frame) for prediction in PREDICTIONS}
    predicted[SAME] = alike(frame, RAW, RECOMMENDED)
    return {
        **headlines_of(refusals(frame).assign(kind="refused"), ["kind", "filter", "group"]),
        **headlines_of(after_table(prompts).assign(kind="after"), ["kind", "filter", "measure"]),
        **predicted,
    }


def published_values(frame: pd.DataFrame, prompts: pd.DataFrame) -> dict[str, Any]:
    """What is published of chapter 6: `headlines`, and the recommended shield against its best rival.

    "best rival" is its name, or None where nothing drifted; "recommended minus best rival | group" are paired
    differences of what is refused.
    """
    values = headlines(frame, prompts)
    if not values:
        return {"best rival": None}
    rival = best_rival(frame)
    groups = [group for group in (*HARMFUL, *HARMLESS) if (frame["group"] == group).any()]
    differences = {f"recommended minus best rival | {g}": against_rival(frame, rival, g) for g in groups}
    return {**values, **differences, "best rival": rival}


class World(NamedTuple):
    """What is measured of one world.

    `margin_frame`, `prompt_frame`, `transfer_frame`, time, calibration, `stream_frame` of judged drift behind
    the recommended shield, and `benign_pool`.
    """

    margins: pd.DataFrame
    prompts: pd.DataFrame
    moved: pd.DataFrame
    spent: pd.Series[float]
    calibration: dict[str, dict[str, tuple[int, float]]]
    streams: pd.DataFrame
    pool: Scores


def measure_world(pipeline: Pipeline) -> World:
    """Every experiment of chapter 6 on one world."""
    filters, texts, fitted = rules(pipeline), shield_texts(pipeline), calibration_texts(pipeline)
    levels: dict[str, float] = {"alpha": ALPHA, "delta": DELTA}
    others = {
        LEAKY: calibrated(bag_of_words(pipeline, FIT), fitted),
        TOGETHER: together_and_apart(filters[RECOMMENDED], fitted, **levels)["all texts together"],
        REPAIRED: calibrated(filters[NO_SLICE], [*fitted, *policy_answers(pipeline)]),
        KEYWORDS: calibrated(keyword_filter(pipeline), fitted),
    }
    moved = transfer_frame({name: filters[name] for name in TRANSFERRED}, texts, alpha=ALPHA)
    return World(
        margin_frame(filters | others, texts),
        prompt_frame(pipeline, filters),
        moved,
        pd.Series(milliseconds(filters, pipeline.index, texts)),
        {f"calibration | {pipeline.seed}": calibration_groups(filters[RECOMMENDED], fitted)},
        stream_frame(cast(TraceShield, filters[RECOMMENDED]), judged_drift(fitted)),
        benign_pool(pipeline, fitted),
    )


def judged_drift(texts: Sequence[BeliefText]) -> list[BeliefText]:
    """The drifting completions of the judged half."""
    return [text for text in texts if text.group == UNSAFE and text.half == JUDGE]


def benign_pool(pipeline: Pipeline, texts: Sequence[BeliefText]) -> Scores:
    """Raw BCI over the whole corpus of every harmless text, from which calibrations are drawn."""
    whole = make_shield(pipeline, "corpus spans", RawBCI(), 0.0)
    return whole.scores(text.text for text in texts if text.group in BENIGN)


def calibration_groups(
    rule: CompletionFilter[Any], texts: Sequence[BeliefText]
) -> dict[str, tuple[int, float]]:
    """The groups on which `calibrated` set thresholds: how many texts, and which threshold."""
    labels = merge_small([text.group for text in draws(texts)], scores_needed(alpha=ALPHA, delta=DELTA))
    return {label: (size, rule.group_thresholds[label]) for label, size in Counter(labels).items()}


def publish_shield(device: str = "auto") -> None:
    """Measure chapter 6 on every seed of `full` and write data/results/shield.json.

    Beside `published_values`: "transfer | filter | source | group"; "calibration | seed", texts and threshold
    of each group of the recommended shield; "milliseconds | filter" for 100 tokens, medians of a world,
    mean over worlds; `stream_values`; and `realised_values`.
    """
    world = cache(measure_world)  # pooled and alone, a world is measured once

    def measure(pipelines: Sequence[Pipeline]) -> dict[str, Any]:
        margins, prompts, moved, spent, groups, streams, pools = zip(*map(world, pipelines), strict=True)
        mean = pd.concat(spent, axis="columns").mean(axis="columns")
        times = {f"milliseconds | {name}": round(float(value), 3) for name, value in mean.items()}
        pooled = [pd.concat(part, ignore_index=True) for part in (margins, prompts)]
        table = transfer_table(pd.concat(moved, ignore_index=True)).assign(kind="transfer")
        transfer = headlines_of(table, ["kind", "filter", "source", "group"])
        values = {**published_values(*pooled), **transfer, **times}
        values |= stream_values(pd.concat(streams, ignore_index=True))
        values |= realised_values(pools, delta=DELTA)
        return {**values, **{name: found for part in groups for name, found in part.items()}}

    publish("shield", measure, device)
