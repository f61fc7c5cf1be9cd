"""Chapter 7's question in a harder world: does BCI add anything where more of the corpus misleads?

`HARDER` changes the settings of the world and nothing else: every unsafe item has four near-copies instead of
one, three garbled retellings and four mentions; there are four times as many recombinations and more news
that quotes the rules; fewer stories pay for part of it. Copies that are nearly alike blur what is traced, and
whatever ranks passages has more to be misled by.

The settings were chosen on the worlds of seeds 0 and 1, by looking at chapter 2's model, at what is traced of
its drift, and at what the rankings find on seed 0; no arm was trained there. All of the following was written
before any result of a harder world of the seeds 3, 4 and 5 was seen. The rule is that of `cbd`, word for
word; only its contests on *the score* are held, and each arm is trained as in the ordinary worlds. With six
contests, each gets a sixth of `cbd.ALPHA`. BCI adds something here if it adds in at least one of them.

Predicted, from what decides in the ordinary worlds: it adds in none. A recited recipe is still one span, so
weights by BCI are still weights by length. Near-copies are forbidden passages too, so every ranking finds
more of them than before, chance included, and the rankings come closer to each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from tracealign_lib import attribution
from tracealign_lib.attribution import CoverRanker
from tracealign_lib.experiments import cbd, model, traceindex
from tracealign_lib.experiments.cbd import (
    BEFORE,
    REFERENCE,
    SCORE,
    TWICE,
    Contest,
    admissible,
    contest_table,
    contest_values,
    grid_name,
    headlines,
)
from tracealign_lib.experiments.cbd_arms import Arm
from tracealign_lib.experiments.cbd_measures import answer_frame
from tracealign_lib.experiments.cbd_passages import EVERY, RANKINGS, passage_frame, passage_values
from tracealign_lib.experiments.common import Headlines, headlines_of, publish, short
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import Interval, SeedSpread

HARDER = {
    "near_copies": 4,
    "garbled": 3,
    "mentions": 4,
    "recombinations": 100,
    "news": 150,
    "stories": 150,
}
"""Settings of the world that differ from `world.WorldSettings`."""

# --- worlds --------------------------------------------------------------------------------------


def harder(pipeline: Pipeline) -> Pipeline:
    """Profile, seed and device of `pipeline` with the settings `HARDER`: materials of its own."""
    made = Pipeline(pipeline.profile.name, pipeline.seed, pipeline.device)
    name, world = f"{pipeline.profile.name}, harder", replace(pipeline.profile.world, **HARDER)
    made.profile = pipeline.profile._replace(name=name, world=world)
    return made


MEASURED = ("mean drift", "direct refused", "correct: how_to", "correct: fact")
"""Of `model.headlines`: whether the phenomenon is still there, and the model still sound."""
_FOUND = {
    "strict | r_precision": "sources found (R-precision, planted copies)",
    "strict | precision": "sources named rightly (precision, planted copies)",
}


def world_values(pipelines: Sequence[Pipeline]) -> Headlines:
    """How hard worlds are: `MEASURED` of the aligned model, and how well the cover ranking finds sources."""
    values = model.headlines(pipelines)
    graded = []
    for pipeline in pipelines:
        cases, ranker = (
            traceindex.attribution_cases(pipeline),
            {traceindex.COVER: CoverRanker(pipeline.index)},
        )
        if cases:
            grades = attribution.grade_many(ranker, cases, seed=pipeline.seed)
            graded.append(grades.assign(seed=pipeline.seed))
    found: Headlines = {}
    if graded:
        table = traceindex.summarise(pd.concat(graded, ignore_index=True), ["truth"])
        named = headlines_of(table, ["truth", "metric"])
        found = {label: named[name] for name, label in _FOUND.items()}
    return {name: values[name] for name in MEASURED} | found


def world_table(worlds: Mapping[str, Mapping[str, Interval]]) -> pd.DataFrame:
    """`world_values` under "ordinary" and "harder": one row per quantity, one column per kind of world."""
    names = [name for name in (*MEASURED, *_FOUND.values()) if name in worlds["ordinary"]]
    kinds = {kind: [short(worlds[kind][name]) for name in names] for kind in ("ordinary", "harder")}
    return pd.DataFrame({"quantity": names, **kinds})


# --- the question --------------------------------------------------------------------------------

CONTESTS: tuple[Contest, ...] = tuple(
    contest._replace(fixed=BEFORE) for contest in cbd.CONTESTS if contest.asks == SCORE
)
"""The contests of chapter 7 on the score, all fixed before any judged harder world was looked at."""
_NAMES = (REFERENCE.name, grid_name(1e-4, 0), TWICE.name, *(n for c in CONTESTS for n in (c.first, c.second)))
ARMS = tuple(cbd.ARMS[name] for name in dict.fromkeys(_NAMES))
"""Chapter 2's DPO as the reference, DPO at the higher rate for one epoch and two, and who contests."""


def published_values(pipelines: Sequence[Pipeline], arms: Sequence[Arm] = ARMS) -> dict[str, Any]:
    """What is published of the harder worlds of these pipelines.

    "arm | measure", "first - second" and "contests" as in `cbd.published_values`; "admissible"; "passages",
    what each ranking finds; "worlds", `world_values` of the ordinary worlds beside the harder ones; and
    "settings", which are `HARDER`.
    """
    worlds = [harder(pipeline) for pipeline in pipelines]
    frame = answer_frame(worlds, arms)
    return {
        **headlines(frame),
        **contest_values(contest_table(frame, CONTESTS)),
        "admissible": [arm for arm, fine in admissible(frame).items() if fine],
        "passages": passage_values(passage_frame(worlds)),
        "worlds": {"ordinary": world_values(pipelines), "harder": world_values(worlds)},
        "settings": HARDER,
    }


def passage_table(ordinary: Mapping[str, Any], harder: Mapping[str, Any]) -> pd.DataFrame:
    """The forbidden share of what each ranking finds, with its range over worlds, in both kinds of world.

    Both are `cbd_passages.passage_values`, as they were published.
    """
    rows = []
    for how in (*RANKINGS, EVERY):
        shares = [SeedSpread.from_json(values[how]["forbidden"]) for values in (ordinary, harder)]
        rows.append((how, *map(str, shares)))
    return pd.DataFrame(rows, columns=["ranked by", "ordinary", "harder"])


def gap_text(ordinary: Mapping[str, Any], harder: Mapping[str, Any]) -> str:
    """Whether raw BCI, length and chance come closer to each other in the harder worlds, as was predicted."""
    pairs = (("span length", "raw BCI"), ("span length", "random"), ("raw BCI", "random"))
    said = []
    for pair in pairs:
        first, second = (
            abs(values[pair[0]]["forbidden"]["mean"] - values[pair[1]]["forbidden"]["mean"])
            for values in (ordinary, harder)
        )
        word = "closer" if second < first else "no closer"
        said.append(f"{pair[0]} and {pair[1]}, {first:.2f} to {second:.2f}: *{word}*")
    return f"Distance between shares, ordinary to harder: {'; '.join(said)}."


def verdict_text(contests: pd.DataFrame) -> str:
    """The verdicts of a contest table: how often each was given, and where a contest was decided."""
    said = []
    for verdict in ("adds", "adds, but is not admissible", "is beaten", "cannot tell"):
        places = contests.loc[contests["verdict"] == verdict, "contest"].tolist()
        named = f" ({'; '.join(places)})" if places and verdict != "cannot tell" else ""
        if places or verdict == "adds":
            said.append(f"*{verdict}* in {len(places)}{named}")
    return f"of {len(contests)} contests on the score, the verdict is {', '.join(said)}."


def publish_cbd_harder(device: str = "auto") -> None:
    """Measure `ARMS` on the harder world of every seed of `full` and write data/results/cbd-harder.json."""
    publish("cbd-harder", published_values, device)
