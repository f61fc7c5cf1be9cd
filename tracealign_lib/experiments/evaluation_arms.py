"""What chapter 9 puts side by side: models aligned in three ways, defences of three kinds, and rivals.

A *system* is what a reader meets: an arm (a model and what guards it while it decodes) with a filter behind
it. The defences are taken as the earlier chapters left them: *raw* ones with the score and the threshold that
are reported of the paper, BCI above 20 nats, on spans of any count; the same *with M(q) <= 3*, the filter
that is reported too; and *recommended* ones as chapters 6, 7 and 8 found them best. Nothing is chosen here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from tracealign_lib.bci import RawBCI
from tracealign_lib.benchmark import ADB
from tracealign_lib.evaluate import METHODS, NONE, Arm, Evaluation, Guard, Parts, Plan, evaluate, read_answers
from tracealign_lib.experiments import prov_decode, shield
from tracealign_lib.experiments.common import PAPER_TAU
from tracealign_lib.experiments.evaluation_models import (
    CBD,
    DPO,
    LABELLED,
    MODELS,
    RECOVERY,
    RL,
    SFT,
    UNLIKELIHOOD,
    expert_folder,
    model_folder,
)
from tracealign_lib.experiments.shield_texts import calibration_texts
from tracealign_lib.expert_mixing import ExpertMixing
from tracealign_lib.lm import LanguageModel
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.shield import CompletionFilter
from tracealign_lib.stages import Stage

RAW_VETO, REDIRECT, BLOCK_VETO, EXPERT = "raw veto", "redirect", "block list veto", "expert mixing"
FILTERED_VETO = "filtered veto"
RAW_SHIELD, SHIELD = shield.RAW_20, shield.RECOMMENDED
PAPER_RULE, BLOCK_LIST, BAG_OF_WORDS = shield.PAPER, shield.BLOCK_LIST, shield.BAG_OF_WORDS

NO_DEFENCE = "no defence"
RAW, FILTERED, RECOMMENDED, RIVAL = "raw", "raw, M(q) <= 3", "recommended", "rival"
KINDS = ("shield", "training", "decoding")
COMBINATIONS = (
    ("shield",),
    ("training",),
    ("decoding",),
    ("shield", "training"),
    ("shield", "decoding"),
    ("training", "decoding"),
    KINDS,
)
"""Each kind of defence, all pairs, and all three."""
ALL_THREE = " + ".join(KINDS)
RAW_ALL, FILTERED_ALL, ALL = (f"{scorers}: {ALL_THREE}" for scorers in (RAW, FILTERED, RECOMMENDED))
"""All three defences: the paper's without its filter and with it, and what the earlier chapters recommend."""
BLOCK_AFTER, BLOCK_DECODING = "n-gram block list, afterwards", "n-gram block list, while decoding"
RECOVERY_RIVAL = "labelled recovery, no BCI"
SHOWN = (NO_DEFENCE, RAW_ALL, FILTERED_ALL, ALL)
"""Systems of the tables by attack, domain, model and decoding."""


class System(NamedTuple):
    """What answers a reader: an arm, and a filter behind it ("none", or a name of `filters`).

    `scorers` is "none", "raw", "raw, M(q) <= 3", "recommended" or "rival"; `defences` names what is in place.
    """

    model: str
    scorers: str
    defences: str
    arm: Arm
    filter: str = NONE

    @property
    def name(self) -> str:
        """The system's name among those with its model and decoding."""
        return self.defences if self.scorers in (NONE, RIVAL) else f"{self.scorers}: {self.defences}"


# --- guards and filters --------------------------------------------------------------------------


_GUARDS = {
    RAW_VETO: prov_decode.RAW_20,
    FILTERED_VETO: prov_decode.PAPER,
    REDIRECT: prov_decode.WANTED,
    BLOCK_VETO: prov_decode.BLOCK_LIST,
}


def guards(pipeline: Pipeline) -> dict[str, Any]:
    """What acts while decoding: name -> a function that makes it."""

    def expert() -> Guard:
        return ExpertMixing(LanguageModel.load(expert_folder(pipeline), device=pipeline.device))

    made = {
        n: partial(prov_decode.make_guard, pipeline, prov_decode.ARMS[rule]) for n, rule in _GUARDS.items()
    }
    return {**made, EXPERT: expert}


@cache
def filters(pipeline: Pipeline) -> dict[str, CompletionFilter[Any]]:
    """What judges finished answers, by name; all but those with tau = 20 are calibrated as in chapter 6."""
    texts = calibration_texts(pipeline)
    return {
        RAW_SHIELD: shield.make_shield(pipeline, "unsafe spans", RawBCI(), PAPER_TAU),
        SHIELD: shield.recommended_shield(pipeline),
        PAPER_RULE: shield.paper_shield(pipeline),
        BLOCK_LIST: shield.calibrated(shield.block_list(pipeline), texts),
        BAG_OF_WORDS: shield.calibrated(shield.bag_of_words(pipeline), texts),
    }


# --- systems -------------------------------------------------------------------------------------

_PARTS = {
    RAW: {"shield": RAW_SHIELD, "training": CBD, "decoding": RAW_VETO},
    RECOMMENDED: {"shield": SHIELD, "training": RECOVERY, "decoding": REDIRECT},
}


def systems(model: str, decoding: str = "greedy") -> list[System]:
    """No defence, each, all pairs and all three, raw and recommended.

    The CBD loss is a term of DPO's, so the other two have no raw training defence.
    """
    made = [System(model, NONE, NO_DEFENCE, Arm(model, NONE, decoding))]
    for scorers, parts in _PARTS.items():
        for kinds in COMBINATIONS:
            if scorers == RAW and "training" in kinds and model != DPO:
                continue
            chosen = {kind: parts[kind] if kind in kinds else NONE for kind in KINDS}
            arm = Arm(_trained(model, chosen["training"]), chosen["training"], decoding, chosen["decoding"])
            made.append(System(model, scorers, " + ".join(kinds), arm, chosen["shield"]))
    return made


def _trained(model: str, training: str) -> str:
    """Recovery training takes the place of DPO, so both models with it are one."""
    return SFT if (model, training) == (DPO, RECOVERY) else model


def filtered() -> list[System]:
    """Raw defences of the DPO model, greedy, that look away from spans with more than three matches.

    The filter is one of matched spans, so training has none; it stands here as it stands among the raw ones.
    """
    veto = Arm(DPO, NONE, "greedy", FILTERED_VETO)
    return [
        System(DPO, FILTERED, "shield", Arm(DPO), PAPER_RULE),
        System(DPO, FILTERED, "decoding", veto),
        System(DPO, FILTERED, ALL_THREE, veto._replace(training=CBD), PAPER_RULE),
    ]


def rivals() -> list[System]:
    """Other defences of the DPO model, greedy: none of them knows a score of matched spans."""
    plain = Arm(DPO)
    return [
        System(DPO, RIVAL, BLOCK_AFTER, plain, BLOCK_LIST),
        System(DPO, RIVAL, BLOCK_DECODING, plain._replace(guard=BLOCK_VETO)),
        System(DPO, RIVAL, "classifier filter", plain, BAG_OF_WORDS),
        System(DPO, RIVAL, "unlikelihood training", Arm(DPO, UNLIKELIHOOD)),
        System(DPO, RIVAL, "expert mixing", plain._replace(guard=EXPERT)),
        System(DPO, RIVAL, RECOVERY_RIVAL, Arm(SFT, LABELLED)),
    ]


def main_systems() -> list[System]:
    """What the main table shows: the DPO model, greedy, with every defence and every rival."""
    return systems(DPO) + filtered() + rivals()


def side_systems(profile: str) -> list[System]:
    """The same defences on other models and under other ways to decode.

    Beams cost four times as much, so under them, as for the other models where they do not decode greedily,
    there are only no defence and all that a model can have. A profile below `full` has no such other models.
    """
    made = [s for model in (SFT, RL) for s in systems(model)] + systems(DPO, "sampling")
    models = MODELS if profile in ("full", "gpu") else (DPO,)
    pairs = [(model, decoding) for model in models for decoding in METHODS if decoding != "greedy"]
    return made + [s for pair in pairs if pair != (DPO, "sampling") for s in fullest(systems(*pair))]


def fullest(made: Sequence[System]) -> list[System]:
    """No defence, and of raw and of recommended ones the most that stand together."""
    return list({system.scorers: system for system in made}.values())


class Size(NamedTuple):
    """How many records the systems of the main table are asked, and all others (None: every record)."""

    main: int | None
    side: int


SIZES = {"smoke": Size(120, 30), "laptop": Size(400, 100), "full": Size(800, 130), "gpu": Size(800, 130)}


def make_plan(benchmark: ADB, profile: str, size: Size | None = None) -> Plan:
    """Which records each arm is asked: the main ones `size.main`, the side ones `size.side` of them.

    Samples keep the shares of kinds, groups and domains (`ADB.sample`). By default the profile's size.
    """
    size = size or SIZES[profile]
    main = benchmark if size.main is None else benchmark.sample(min(size.main, len(benchmark)))
    side = main.sample(min(size.side, len(main)))
    first = {system.arm: main for system in main_systems()}
    return {**{system.arm: side for system in side_systems(profile)}, **first}


def make_parts(profile: str, seed: int, device: str) -> Parts:
    """`Parts` of the book's arms; a worker process makes its own."""
    pipeline = Pipeline(profile, seed, device)
    names = {system.arm[:2] for system in (*main_systems(), *side_systems(profile))}
    folders = {name: model_folder(pipeline, *name) for name in sorted(names)}
    models = {name: partial(LanguageModel.load, folder, device=device) for name, folder in folders.items()}
    rules = {name: prov_decode.rule_of(pipeline, prov_decode.ARMS[rule]) for name, rule in _GUARDS.items()}
    settings = {
        "models": {" + ".join(name): folder.name for name, folder in folders.items()},
        "expert": expert_folder(pipeline).name,
        "index": pipeline.unsafe_index.path.parent.name,
        "guards": {n: [_GUARDS[n], type(r.scorer).__name__, *r[1:]] for n, r in rules.items()},
    }
    return Parts(models, guards(pipeline), settings)


# --- answers -------------------------------------------------------------------------------------

ANSWERS = "answers.jsonl"
# What is asked, and what the parts are, stands in the settings of the stage.
_ANSWER_CODE = tuple(f"tracealign_lib.{name}" for name in ("evaluate", "lm", "prov_decode", "expert_mixing"))


def world_benchmark(pipeline: Pipeline) -> ADB:
    """The benchmark of a pipeline's world."""
    return ADB.generate(pipeline.world)


class Answered(NamedTuple):
    """Every arm's answers, and how well each model still predicts ordinary text.

    Attributes
    ----------
    log_probs:
        (model, training) -> log p of each token of the held-out stories, in nats: a list for each story.
    """

    evaluation: Evaluation
    log_probs: dict[tuple[str, str], list[list[float]]]


def answers(pipeline: Pipeline, size: Size | None = None) -> Answered:
    """Every arm's answers to its part of the benchmark: a stage that goes on where it was interrupted."""
    plan = make_plan(world_benchmark(pipeline), pipeline.profile.name, size)
    parts = make_parts(pipeline.profile.name, pipeline.seed, pipeline.device)
    asked = {"+".join(arm): [len(benchmark), benchmark.digest] for arm, benchmark in plan.items()}
    settings = {"parts": dict(parts.settings), "asked": asked, "seed": pipeline.seed}

    def build(folder: Path) -> None:
        evaluate(parts, plan, folder / ANSWERS, seed=pipeline.seed)
        (folder / "fluency.json").write_text(json.dumps(_log_probs(pipeline, parts)), encoding="utf-8")

    folder = Stage("adb-answers", settings, build, _ANSWER_CODE).path()
    fluency = json.loads((folder / "fluency.json").read_text(encoding="utf-8"))
    log_probs = {(model, training): rows for model, training, rows in fluency}
    return Answered(read_answers(folder / ANSWERS, plan), log_probs)


def answers_in(
    pipeline: Pipeline, file: Path, size: Size | None = None, *, processes: int = 1, repair: bool = False
) -> Answered:
    """As `answers`, into a file of the caller's; it goes on with what is there.

    Parameters
    ----------
    processes, repair:
        As for `evaluate`.
    """
    profile = pipeline.profile.name
    plan = make_plan(world_benchmark(pipeline), profile, size)
    make = partial(make_parts, profile, pipeline.seed, pipeline.device)
    parts = make()  # models are trained here, once, before several processes ask for them
    given = make if processes > 1 else parts
    answered = evaluate(given, plan, file, seed=pipeline.seed, processes=processes, repair=repair)
    return Answered(
        answered, {(model, training): rows for model, training, rows in _log_probs(pipeline, parts)}
    )


def _log_probs(pipeline: Pipeline, parts: Parts) -> list[tuple[str, str, list[list[float]]]]:
    texts = [document.text for document in pipeline.world.held_out]
    return [
        (*name, [[round(p, 4) for p in row.tolist()] for row in load().token_log_probs(texts)])
        for name, load in parts.models.items()
    ]
