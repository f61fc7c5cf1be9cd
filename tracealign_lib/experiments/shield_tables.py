"""Tables of chapter 6: what is refused, and what a guarded model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from tracealign_lib import adb, lexicon
from tracealign_lib.adb import Outcome
from tracealign_lib.calibration import EVERY_SPAN
from tracealign_lib.experiments.bci_texts import JUDGE, RARE, TWIN, UNSAFE
from tracealign_lib.experiments.common import Prediction, short
from tracealign_lib.experiments.shield import RECOMMENDED, UNCALIBRATED, against_rival
from tracealign_lib.experiments.shield_judged import refusals, refused
from tracealign_lib.experiments.shield_texts import HARMLESS, NEAR
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.results import Results
from tracealign_lib.shield import TraceShield
from tracealign_lib.stats import Interval

# --- what is refused -----------------------------------------------------------------------------


def rule_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Each filter on the judged half: drift, near-drift, how-to answers, and the worst harmless group."""
    rows = []
    for name in dict.fromkeys(frame["filter"]):
        harmful = [_said(refused(frame, name, group)) for group in (UNSAFE, NEAR)]
        how_to = _said(refused(frame, name, RARE, TWIN))
        mark = ", not calibrated" if name in UNCALIBRATED else ""
        rows.append((name + mark, *harmful, how_to, _worst(frame, name)))
    columns = ["filter", "drift", "near-drift", "how-to answers", "worst harmless group"]
    return pd.DataFrame(rows, columns=columns)


def threshold_label(threshold: float) -> str:
    """A threshold as it stands on the page."""
    return "every span" if threshold == EVERY_SPAN else f"{threshold:.4g}"


def _said(interval: Interval) -> str:
    return short(interval) if interval.n else "none"


def _worst(frame: pd.DataFrame, name: str) -> str:
    table = refusals(frame[(frame["filter"] == name) & frame["group"].isin(HARMLESS)])
    # Of groups that are hit alike, the one that leaves most doubt.
    worst = table.sort_values(["estimate", "high"]).iloc[-1]
    return f"{worst['group']}: {short(Interval(*worst[list(Interval._fields)]))}"


def group_table(frame: pd.DataFrame, groups: Sequence[str], names: Sequence[str] = ()) -> pd.DataFrame:
    """Share of each group that filters refuse, on the judged half: one row per group, labelled by `counted`.

    A group without texts has no row. `names` chooses among the filters of `margin_frame`; default: all.
    """
    chosen = list(names or dict.fromkeys(frame["filter"]))
    rows = []
    for group in groups:
        shares = [refused(frame, name, group) for name in chosen]
        if any(share.n for share in shares):
            rows.append((counted(frame, group), *map(_said, shares)))
    return pd.DataFrame(rows, columns=["group", *chosen])


def counted(frame: pd.DataFrame, group: str) -> str:
    """A group with how many texts of the judged half it has, and about how many items they are."""
    part = frame[(frame["group"] == group) & (frame["half"] == JUDGE)]
    items = part[["seed", "item"]].drop_duplicates()
    return f"{group} ({len(part[['seed', 'text']].drop_duplicates())} texts, {len(items)} items)"


def rival_table(frame: pd.DataFrame, rival: str, groups: Sequence[str]) -> pd.DataFrame:
    """Recommended against a rival, group by group: both shares and their paired difference."""
    rows = []
    for group in groups:
        if (frame["group"] == group).any():
            shares = [refused(frame, name, group) for name in (RECOMMENDED, rival)]
            difference = _said(against_rival(frame, rival, group))
            rows.append((counted(frame, group), *map(_said, shares), difference))
    return pd.DataFrame(rows, columns=["group", RECOMMENDED, rival, "difference"])


# --- published worlds ----------------------------------------------------------------------------


def calibration_table(published: Results) -> pd.DataFrame:
    """On which texts the recommended shield of each published world was calibrated, and who is promised."""
    rows = []
    for name, groups in published.values.items():
        if name.startswith("calibration | "):
            for group, (texts, threshold) in groups.items():
                promised = "to the mixture only" if " + " in group else "yes"
                rows.append((name.split(" | ")[1], group, texts, threshold_label(threshold), promised))
    return pd.DataFrame(rows, columns=["world", "calibrated together", "texts", "threshold", "promise"])


def published_table(predictions: Sequence[Prediction], published: Results) -> pd.DataFrame:
    """Predictions on the published worlds: all together, each world's estimate, and a verdict.

    One calibration serves all items of a world, so the pooled interval, by item, does not know how worlds
    differ. A claim is therefore "held" only if the pooled interval and the estimate of every world lie in its
    range; where only some worlds do, the verdict says how many.
    """
    worlds = published["per seed"].values()
    rows = []
    for prediction in predictions:
        pooled, *alone = (found[prediction.quantity] for found in (published, *worlds))
        inside = sum(prediction.low <= value.estimate <= prediction.high for value in alone)
        said = prediction.verdict(pooled)
        if said == "held" and inside < len(alone):
            said = f"held in {inside} of {len(alone)}"
        shown = ", ".join(f"{value.estimate:.2f}" for value in alone)
        rows.append((prediction.claim, short(pooled), shown, said))
    return pd.DataFrame(rows, columns=["prediction", "all worlds", "each world", "verdict"])


# --- guards ---------------------------------------------------------------------------


def guarded_frame(pipeline: Pipeline, shield: TraceShield, asked: Sequence[Outcome]) -> pd.DataFrame:
    """Prompts put to the guarded model: kind ("attack" or "harmless"), before, after, one row per prompt."""
    guarded = shield.wrap(pipeline.model(), refusal=lexicon.REFUSAL)
    after = adb.ask(guarded, pipeline.world, [outcome.prompt for outcome in asked], seed=pipeline.seed)
    rows = [
        (
            "harmless" if old.prompt.group in adb.BENIGN_GROUPS else "attack",
            old.judgement.label,
            new.judgement.label,
        )
        for old, new in zip(asked, after, strict=True)
    ]
    return pd.DataFrame(rows, columns=["kind", "before", "after"])


def greedy_sample(outcomes: Sequence[Outcome], half: Mapping[str, str], limit: int) -> list[Outcome]:
    """Greedily answered prompts of the judged half: as many drifted as right, if there are any."""
    judged = [
        o for o in outcomes if half[o.judgement.leaked or o.prompt.item] == JUDGE and o.prompt.samples == 1
    ]
    drifted = [outcome for outcome in judged if outcome.drifted][: limit // 2]
    right = [outcome for outcome in judged if outcome.judgement.label == "correct"]
    chosen = [*drifted, *right[:: max(1, len(right) // (limit // 2))][: limit // 2]]
    return chosen or judged[:limit]


def after_wide(table: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """`shield.after_table` as text, one row per filter and one column per measure."""
    rows = []
    for name, part in table.groupby("filter", sort=False):
        found = part.set_index("measure")
        cells = [_said(Interval(*found.loc[m, list(Interval._fields)])) for m in measures]
        rows.append((name, *cells))
    return pd.DataFrame(rows, columns=["filter", *measures])
