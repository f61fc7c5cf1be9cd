"""`tracealign train`: train a model of the book into the cache, by one process or by several together."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from tracealign_lib import launch


class Model(StrEnum):
    """The trainings of chapter 2; each starts from the one before."""

    base = "base"
    sft = "sft"
    dpo = "dpo"


Name = Annotated[Model, typer.Argument(help="How far: pre-training, then fine-tuning, then preferences.")]
Profile = Annotated[str, typer.Option(help="Size of world and model: smoke, laptop, full or gpu.")]
Seed = Annotated[int, typer.Option(help="Seed of the world and of all training.")]
Device = Annotated[str, typer.Option(help="Where the model trains: auto, cpu or cuda.")]


def train(
    model: Name = Model.dpo, profile: Profile = "laptop", seed: Seed = 0, device: Device = "auto"
) -> None:
    """Train a model of the book into the cache, and print its folder.

    What it starts from is trained before, and what the cache holds is not trained again. An interrupted
    training goes on where it stopped. The chapters then find the model.

    On several GPUs, accelerate starts a process for each, and they share every batch. Without a GPU,
    --multi_gpu starts several all the same; accelerate's --cpu starts one.

    \b
    Examples:
      tracealign train dpo --profile smoke
      accelerate launch --num_processes 4 -m tracealign_lib train dpo --profile gpu
      accelerate launch --multi_gpu --num_processes 2 -m tracealign_lib train sft --device cpu
    """
    if not launch.is_main():
        os.environ["TRACEALIGN_PROGRESS"] = "0"  # one bar for all
    if launch.processes() > 1 and device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # they would talk to each other over the GPUs
    from tracealign_lib.pipeline import MODELS, Pipeline

    pipeline = Pipeline(profile, seed, device)
    for name in MODELS[: MODELS.index(model) + 1]:  # now, and not when those before have trained for hours
        launch.share(getattr(pipeline.profile.model, f"{name}_batch"), pipeline.device)
    folder = pipeline.model_folder(model)
    if launch.is_main():
        print(folder)
    launch.leave()
