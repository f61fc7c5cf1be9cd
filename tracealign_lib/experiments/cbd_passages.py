"""What the rankings of chapter 7 find in the corpus, and whether it helps just where they found something.

*Forbidden* is a passage that holds two steps of one unsafe item, as a drifted answer does; a ranking *tells
of* an item if one of its passages does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tracealign_lib.adb import STEPS_TO_DRIFT
from tracealign_lib.experiments.cbd_arms import (
    MINED_PER_ANSWER,
    REPLAY,
    Arm,
    Preference,
    Recovery,
    preference_triples,
    ranked_passages,
    recovery_turns,
)
from tracealign_lib.experiments.common import clusters, rate
from tracealign_lib.lexicon import REFUSAL
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import Interval, over_seeds
from tracealign_lib.world import Item

RANKINGS = ("conflict, no quotes", "keywords", "raw BCI", "span length", "random")
"""What ranks passages, from much knowledge to none."""
EVERY = "no ranking: every sentence"
PASSAGE_COLUMNS = ["seed", "ranked by", "text", "tells of", "held out"]


def budget_table(pipeline: Pipeline, arms: Sequence[Arm]) -> pd.DataFrame:
    """What each arm is trained on: arm, epochs, rate, texts, `turn round` (of these), and texts seen in all.

    A text is a triple, a pair, a cut answer or a replayed document; of an arm that starts from another, only
    its own training counts. A model of the pipeline that is taken as it is is left out.
    """
    rows = []
    for arm in arms:
        training, turns = arm.training, 0
        if training is None:
            continue
        if isinstance(training, Preference):
            texts = len(preference_triples(pipeline, training.rejected))
        elif isinstance(training, Recovery):
            made = recovery_turns(pipeline, training)
            turns = sum(bool(turn.prefix) and turn.completion == REFUSAL for turn in made)
            texts = len(made) + min(REPLAY, len(pipeline.corpus))
        else:  # as many as labelled recovery
            texts = len(recovery_turns(pipeline, Recovery())) + min(REPLAY, len(pipeline.corpus))
        rows.append((arm.name, training.epochs, f"{training.rate:g}", texts, turns, training.epochs * texts))
    return pd.DataFrame(rows, columns=["arm", "epochs", "rate", "texts", "turn round", "seen"])


def passage_frame(pipelines: Sequence[Pipeline], ways: Sequence[str] = RANKINGS) -> pd.DataFrame:
    """One row per passage that each ranking would have recovery training refuse, held against the truth.

    Columns: seed; `ranked by`, with all sentences under `EVERY`; text; `tells of`, the unsafe items of which
    it holds two steps; `held out`, those of them that alignment never asked for.
    """
    rows = []
    for pipeline in pipelines:
        unsafe = pipeline.world.of_kind("unsafe")
        taken = MINED_PER_ANSWER * sum(item.aligned for item in unsafe)
        ranked = {how: ranked_passages(pipeline, how) for how in ways}
        chosen = {how: texts[:taken] for how, texts in ranked.items()} | {EVERY: ranked[ways[0]]}
        for how, texts in chosen.items():
            for text in texts:
                told = told_of(text, unsafe)
                held_out = tuple(i.id for i in told if not i.aligned)
                rows.append((pipeline.seed, how, text, tuple(i.id for i in told), held_out))
    return pd.DataFrame(rows, columns=PASSAGE_COLUMNS)


def told_of(text: str, items: Sequence[Item]) -> list[Item]:
    """The items of which a text holds as many steps as a drifted answer does."""
    return [item for item in items if sum(step in text for step in item.steps) >= STEPS_TO_DRIFT]


def forbidden_share(pipeline: Pipeline, texts: Sequence[str]) -> float:
    """Share of texts that tell of an unsafe item of this world."""
    unsafe = pipeline.world.of_kind("unsafe")
    return float(np.mean([bool(told_of(text, unsafe)) for text in texts]))


def passage_table(passages: pd.DataFrame) -> pd.DataFrame:
    """Of each ranking and world: `forbidden`, a share, and `held-out items`, how many it tells of."""
    rows = []
    for (how, seed), part in passages.groupby(["ranked by", "seed"], sort=False):
        held_out = {item for items in part["held out"] for item in items}
        rows.append((how, seed, float(part["tells of"].map(bool).mean()), len(held_out)))
    return pd.DataFrame(rows, columns=["ranked by", "seed", "forbidden", "held-out items"])


def passage_values(passages: pd.DataFrame) -> dict[str, Any]:
    """`passage_table` over worlds, to be published: ranking -> column -> spread over seeds."""
    return {
        str(how): {
            column: over_seeds(dict(zip(part["seed"], part[column], strict=True))).to_json()
            for column in ("forbidden", "held-out items")
        }
        for how, part in passage_table(passages).groupby("ranked by", sort=False)
    }


def told_table(
    drift: pd.DataFrame, passages: pd.DataFrame, arms: Mapping[str, str], beside: Mapping[str, str]
) -> pd.DataFrame:
    """Drift on held-out items that a ranking's passages tell of, and on those that they do not.

    Parameters
    ----------
    drift:
        One value per arm, seed and held-out item (`cbd.by_item`).
    arms:
        Ranking -> the arm that was trained on its passages.
    beside:
        Column -> arm that is shown for the same items.

    Returns
    -------
    pd.DataFrame
        `ranked by`, `told of` ("yes" or "no"), items (their number), `with passages` and a column for each
        of `beside`: intervals by item. A part without items is left out.
    """
    rows = []
    for how, arm in arms.items():
        part = passages[passages["ranked by"] == how]
        pairs = zip(part["seed"], part["held out"], strict=True)
        told = {(seed, item) for seed, items in pairs for item in items}
        asked = drift[drift["arm"].isin([arm, *beside.values()])]
        inside = np.array([pair in told for pair in clusters(asked)])
        for answer, here in (("yes", asked[inside]), ("no", asked[~inside])):
            if here.empty:
                continue
            compared = {"with passages": arm, **beside}
            shown = {name: rate(here[here["arm"] == one], "value") for name, one in compared.items()}
            rows.append({"ranked by": how, "told of": answer, "items": shown["with passages"].n, **shown})
    return pd.DataFrame(rows)


def copies_table(frame: pd.DataFrame, arms: Sequence[str], groups: Sequence[str]) -> pd.DataFrame:
    """Drift on held-out items by their number of copies: arm, copies and an interval by item.

    `frame` holds answers as in `cbd.answer_frame`, `groups` are the attacks that count.
    """
    chosen = frame[frame["arm"].isin(arms) & frame["group"].isin(groups) & ~frame["aligned"].astype(bool)]
    items = chosen.groupby(["arm", "copies", "seed", "item"], sort=False)["drift"].mean().reset_index()
    rows = [(arm, copies, *rate(part, "drift")) for (arm, copies), part in items.groupby(["arm", "copies"])]
    table = pd.DataFrame(rows, columns=["arm", "copies", *Interval._fields])
    return table.sort_values("copies", kind="stable").set_index("arm").loc[list(arms)].reset_index()
