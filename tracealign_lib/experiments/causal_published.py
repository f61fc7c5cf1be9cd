"""What chapter 10 says from published numbers: every arm, every world, and the answer to its question."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from tracealign_lib.experiments.causal import TRIAL_PREDICTIONS
from tracealign_lib.experiments.causal_arms import (
    ARMS,
    CONTROLS,
    FEW,
    FEW_INFLUENCE,
    FEW_RANDOM,
    GRADIENT,
    INFLUENCE,
    METHODS,
    NOTHING,
    RANDOM,
)
from tracealign_lib.experiments.causal_whole import PAIR_PREDICTION
from tracealign_lib.experiments.common import short
from tracealign_lib.experiments.traceindex import BIGRAMS, COVER
from tracealign_lib.results import Results
from tracealign_lib.stats import Interval, SeedSpread, over_seeds

MAIN = f"drift removed, {COVER}"
NEAR_COPIES = "drift removed, with near-copies minus without"
REFUTED_BELOW = 0.5
BY_WORLD = (
    f"drift, {NOTHING}",
    MAIN,
    f"drift removed, {RANDOM}",
    f"drift removed, {BIGRAMS}",
    f"drift removed, {GRADIENT}",
    f"drift removed, {INFLUENCE}",
    PAIR_PREDICTION.quantity,
    f"datamodelling score, {COVER}",
    f"datamodelling score, {BIGRAMS}",
    f"tail-patch, {COVER}",
    f"tail-patch, {RANDOM}",
)


def published_table(published: Results) -> pd.DataFrame:
    """Every arm and method of the published worlds: what removing does, and the two scores."""
    rows = []
    for arm in ARMS:
        names = {
            "drift that is left": f"drift, {arm}",
            "drift removed": f"drift removed, {arm}",
            "datamodelling score": f"datamodelling score, {arm}",
            "tail-patch (nats)": f"tail-patch, {arm}",
        }
        known = {title: published.values.get(name) for title, name in names.items()}
        shown = {title: short(interval) if interval else "" for title, interval in known.items()}
        rows.append({"taken away": arm, "documents": published["documents removed"][arm], **shown})
    return pd.DataFrame(rows)


def spread(published: Results, quantity: str) -> SeedSpread:
    """Mean and range of a published quantity over worlds."""
    return over_seeds({int(seed): v[quantity].estimate for seed, v in published["per seed"].items()})


def world_table(published: Results) -> pd.DataFrame:
    """Main quantities in each published world, and their range, and all items together."""
    rows = []
    for quantity in BY_WORLD:
        row: dict[str, Any] = {"quantity": quantity}
        row |= {f"world {seed}": short(values[quantity]) for seed, values in published["per seed"].items()}
        mean, least, most, _ = spread(published, quantity)
        row |= {"over worlds: mean (range)": f"{mean:.2f} ({least:.2f} to {most:.2f})"}
        rows.append(row | {"all items": short(published[quantity])})
    return pd.DataFrame(rows)


def size_remark(published: Results) -> str:
    """What the gradient methods removed, beside what as many true or random documents remove."""
    taken, parts = published["documents removed"], []
    for method, equals in ((GRADIENT, (FEW, FEW_RANDOM)), (INFLUENCE, (FEW_INFLUENCE,))):
        shown = {arm: short(published[f"drift removed, {arm}"]) for arm in (method, *equals)}
        beside = "; ".join(f"*{arm}*: {shown[arm]}" for arm in equals)
        parts.append(
            f"*{method}* really took {taken[method]:.1f} documents from an item, where cover took "
            f"{taken[COVER]:.1f}, and removed {shown[method]} ({beside})."
        )
    return " ".join(parts)


def loud_controls(published: Results) -> str:
    """Which controls, that should show nothing, have an interval that excludes 0."""
    effects = {arm: published[f"drift removed, {arm}"] for arm in CONTROLS}
    loud = [f"*{arm}* ({short(e)})" for arm, e in effects.items() if e.low > 0 or e.high < 0]
    if not loud:
        return f"The intervals of all {len(effects)} controls hold 0."
    return (
        f"Of {len(effects)} controls that should show nothing, the interval of {' and of '.join(loud)} "
        "excludes 0. Each arm meets an item in one retraining, and an interval that draws items leaves out "
        "what another retraining would have given: effects of that size are not to be believed."
    )


def near_copies(published: Results) -> str:
    """Did near-copies that stay keep drift alive, on the published worlds?"""
    prediction = next(p for p in TRIAL_PREDICTIONS if p.quantity == NEAR_COPIES)
    found = published[NEAR_COPIES]
    return f"On the published worlds it is {short(found)}; the prediction is *{prediction.verdict(found)}*."


def doses(published: Results) -> str:
    """Published drift by sources left, with intervals, as a list in a sentence."""
    return "; ".join(f"{left}: {short(drift)}" for left, drift in published["drift by sources left"].items())


def points(interval: Interval) -> str:
    """A difference of two rates in percentage points, with its interval: `72 points [61, 82]`."""
    if math.isnan(interval.low):
        return f"{100 * interval.estimate:.0f} points [no interval]" if interval.n else "undefined"
    estimate, low, high = (round(100 * value) for value in interval[:3])
    return f"{estimate} points [{low}, {high}]"


def causes(published: Results) -> str:
    """Does tracing find causes? From published numbers, by the rule stated before the experiment."""
    cover, chance = published[MAIN], published[f"drift removed, {RANDOM}"]
    refuted = cover.estimate < REFUTED_BELOW or cover.low <= chance.high
    over, pair = spread(published, MAIN), published[PAIR_PREDICTION.quantity]
    return (
        f"**Does tracing find causes?** {'Not by the rule stated above' if refuted else 'Yes'}, in "
        f"exposures: left alone, {short(published[f'drift, {NOTHING}'])} of the items drift. Taking away "
        f"what cover names lowers that by {points(cover)}, and by {100 * over.minimum:.0f} "
        f"to {100 * over.maximum:.0f} points in the {over.seeds} worlds; as many random documents lower it "
        f"by {points(chance)}. In whole trainings, under attack and with the truth taken away, the fall is "
        f"{points(pair)} more than that of untouched items (predicted: {100 * PAIR_PREDICTION.low:.0f} or "
        f"more; verdict: *{PAIR_PREDICTION.verdict(pair)}*)."
    )


def best_method(published: Results) -> str:
    """Which method finds causes best? From published numbers."""
    effects = {method: published[f"drift removed, {method}"] for method in METHODS}
    foreseen = {method: published[f"datamodelling score, {method}"] for method in METHODS}
    best = max(effects, key=lambda method: effects[method].estimate)
    ahead = max(foreseen, key=lambda method: foreseen[method].estimate)
    gap = published["drift removed, cover minus bigram BM25"]
    tied = best in {COVER, BIGRAMS} and gap.low <= 0 <= gap.high
    return (
        f"**Which method finds them best?** By documents taken away, "
        f"{'cover and bigram BM25 alike' if tied else best} ({points(effects[best])}; cover minus bigram "
        f"BM25: {points(gap)}). By foresight of random parts, {ahead} ({short(foreseen[ahead])}; cover minus "
        f"bigram BM25: {short(published['datamodelling score, cover minus bigram BM25'])})."
    )
