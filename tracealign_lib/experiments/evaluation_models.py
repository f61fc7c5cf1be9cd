"""The models that chapter 9 compares, beside those of chapters 2 and 7: by reinforcement, and an expert.

Every model is a stage of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tracealign_lib import alignment, lexicon, lm, reinforcement
from tracealign_lib.errors import ParameterError
from tracealign_lib.evaluate import NONE
from tracealign_lib.experiments import cbd, cbd_arms
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.reinforcement import ReinforcementSettings
from tracealign_lib.results import load_results
from tracealign_lib.stages import Stage

SFT, DPO, RL = "sft", "dpo", "rl"
MODELS = {SFT: "SFT", DPO: "DPO", RL: "reinforcement learning"}
"""How models are aligned: names in the file of answers, and on a page."""

CBD, RECOVERY, UNLIKELIHOOD, LABELLED = "cbd", "recovery", "unlikelihood", "labelled recovery"

CBD_ARM = cbd.grid_name(1e-4, 0.03)
"""The CBD loss as chapter 7 sends it into its contests: the strongest that is nearly admissible."""
EXPERT_EPOCHS, EXPERT_RATE = 1, 1e-4
RL_SETTINGS = ReinforcementSettings()
# What is trained on stands in these modules, and how in the settings of the stages.
_RL_CODE = tuple(f"tracealign_lib.{name}" for name in ("reinforcement", "adb", "lm", "lexicon"))
_EXPERT_CODE = tuple(f"tracealign_lib.{name}" for name in ("alignment", "lm", "lexicon"))


def recovery_arm() -> cbd_arms.Arm:
    """The training that chapter 7 recommends, by its published results."""
    return cbd.ARMS[str(load_results("cbd")["recommended"])]


def reinforced_folder(pipeline: Pipeline, start: Path) -> Path:
    """The model in `start` after reinforcement learning; a stage of the cache."""
    settings = {"start": start.name, "seed": pipeline.seed, "device": pipeline.device} | asdict(RL_SETTINGS)

    def build(folder: Path) -> None:
        world = pipeline.world
        prompts, reward = reinforcement.requests_of(world), reinforcement.reward_of(world)
        seeded: dict[str, Any] = {"seed": pipeline.seed, "device": pipeline.device}
        reinforcement.reinforce(start, prompts, reward, RL_SETTINGS, folder, **seeded)

    return Stage("rl", settings, build, _RL_CODE).path()


def advantages(points: Sequence[float]) -> list[float]:
    """What each of the answers to one request is worth to RLOO: its points minus the mean of the others'.

    Raises
    ------
    ParameterError
        There are fewer than two answers.
    """
    earned = np.asarray(points, dtype=np.float64)  # (k,)
    if len(earned) < 2:
        raise ParameterError(
            "An answer has nothing to be compared with.",
            given=f"{len(earned)} answers",
            expected="at least 2",
            mend="draw more answers to each request",
        )
    others = (earned.sum() - earned) / (len(earned) - 1)  # (k,)
    return [float(value) for value in earned - others]


def expert_folder(pipeline: Pipeline) -> Path:
    """A copy of the DPO model that was fine-tuned to refuse: the expert of `ExpertMixing`."""
    start = pipeline.model_folder(DPO)
    recipe = {"epochs": EXPERT_EPOCHS, "rate": EXPERT_RATE, "model": asdict(pipeline.profile.model)}
    settings = {"start": start.name, "seed": pipeline.seed, "device": pipeline.device, **recipe}

    def build(folder: Path) -> None:
        pairs = [p for p in alignment.sft_pairs(pipeline.world) if p["completion"] == lexicon.REFUSAL]
        model = replace(pipeline.profile.model, sft_epochs=EXPERT_EPOCHS, sft_rate=EXPERT_RATE)
        seeded: dict[str, Any] = {"seed": pipeline.seed, "device": pipeline.device}
        lm.finetune(start, pairs, (), model, folder, description="Expert", **seeded)

    return Stage("expert", settings, build, _EXPERT_CODE).path()


def model_folder(pipeline: Pipeline, model: str, training: str = NONE) -> Path:
    """The folder of the model of an arm; trained first where it is missing.

    Recovery training takes the place of DPO, as in chapter 7; reinforcement learning follows it.
    """
    if model == RL:
        start = pipeline.model_folder(SFT) if training == NONE else model_folder(pipeline, SFT, training)
        return reinforced_folder(pipeline, start)
    if training == NONE:
        return pipeline.model_folder(model)
    arms = {
        CBD: cbd.ARMS[CBD_ARM],
        UNLIKELIHOOD: cbd.UNLIKELIHOOD,
        LABELLED: cbd.LABELLED,
    }
    return cbd_arms.arm_folder(pipeline, arms[training] if training in arms else recovery_arm())
