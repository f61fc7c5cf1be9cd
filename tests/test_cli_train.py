"""`tracealign train`: one process, and several that `accelerate launch` starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tracealign_lib import lm, stages
from tracealign_lib.cli import app
from tracealign_lib.lm import LanguageModel
from tracealign_lib.pipeline import MODELS, Pipeline

SMOKE = ["--profile", "smoke", "--device", "cpu"]
LAUNCHER = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--main_process_port", "0"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACEALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "cache"


def test_the_model_that_was_asked_for_is_trained_and_its_folder_printed(monkeypatch) -> None:
    asked: list[Any] = []

    def folder(pipeline: Pipeline, name: str) -> Path:
        asked.append((pipeline.profile.name, pipeline.seed, pipeline.device, name))
        return Path("folder")

    monkeypatch.setattr(Pipeline, "model_folder", folder)
    done = CliRunner().invoke(app, ["train", "sft", "--seed", "3", *SMOKE])
    assert (done.exit_code, done.stdout) == (0, "folder\n")
    assert asked == [("smoke", 3, "cpu", "sft")]


def test_one_of_several_processes_speaks(monkeypatch) -> None:
    monkeypatch.setattr(Pipeline, "model_folder", lambda *_: Path("folder"))
    monkeypatch.setattr("tracealign_lib.launch.leave", lambda: None)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRACEALIGN_PROGRESS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    done = CliRunner().invoke(app, ["train", "sft", *SMOKE])
    assert (done.exit_code, done.output) == (0, "")
    assert os.environ["TRACEALIGN_PROGRESS"] == "0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_that_cannot_be_shared_is_named_before_anything_is_built(name, cache, monkeypatch) -> None:
    for variable, value in (("WORLD_SIZE", "8"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = CliRunner().invoke(app, ["train", name, *SMOKE])
    assert done.exit_code == 2
    assert "8 processes for a batch of 4 rows" in done.stderr
    assert not cache.exists()


@pytest.mark.parametrize("wrong", [["rlhf"], ["dpo", "--profile", "huge"], ["dpo", "--seed", "-1"]])
def test_what_cannot_be_trained_is_refused(wrong: list[str]) -> None:
    assert CliRunner().invoke(app, ["train", *wrong]).exit_code == 2


# --- launches


def launch(*command: str, cache: Path, processes: int = 2) -> subprocess.Popen[str]:
    """`accelerate launch` of two processes on the CPU, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *LAUNCHER, "--num_processes", str(processes), *command],
        env={**os.environ, "TRACEALIGN_CACHE": str(cache), "TRACEALIGN_PROGRESS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def train(model: str, *, cache: Path, processes: int = 2) -> subprocess.Popen[str]:
    return launch("-m", "tracealign_lib", "train", model, *SMOKE, cache=cache, processes=processes)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed[1]
    return printed


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that one process has filled, without accelerate."""
    cache = tmp_path_factory.mktemp("single")
    command = [sys.executable, "-m", "tracealign_lib", "train", "dpo", *SMOKE]
    environment = {**os.environ, "TRACEALIGN_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()).parent == cache
    return cache


def folders(cache: Path) -> dict[str, Path]:
    """Every stage of a cache by its name, all of them complete."""
    assert all(not path.name.endswith(".partial") for path in cache.iterdir())
    return {path.name.rsplit("-", 1)[0]: path for path in cache.iterdir() if path.is_dir()}


def without_models(single: Path, cache: Path, *models: str) -> None:
    """Copy a cache, but not these models."""
    names = [f"{model}-*" for model in models]
    shutil.copytree(single, cache, ignore=shutil.ignore_patterns(*names), dirs_exist_ok=True)


@pytest.mark.slow
def test_two_processes_train_what_one_does_under_the_same_keys(single: Path, cache: Path, say: Any) -> None:
    printed, _ = finish(train("dpo", cache=cache))
    ones, twos = folders(single), folders(cache)
    assert printed.splitlines() == [str(twos["dpo"])]
    assert {path.name for path in ones.values()} == {path.name for path in twos.values()}
    for name, most in (("base", 1e-5), ("sft", 0.02), ("dpo", 0.1)):
        manifest = json.loads((twos[name] / "manifest.json").read_text())
        assert manifest["processes"] == 2
        first, second = (lm.training_log(stage[name]) for stage in (ones, twos))
        assert [entry["step"] for entry in first] == [entry["step"] for entry in second]
        apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(first, second, strict=True))
        weights, others = (load_file(stage[name] / "model.safetensors") for stage in (ones, twos))
        moved = torch.cat([(weights[key] - others[key]).flatten() for key in weights]).norm()
        relative = float(moved / torch.cat([value.flatten() for value in weights.values()]).norm())
        say(f"{name}: losses {apart:.1e} apart at most, weights {relative:.1e} of their norm")
        assert apart < most
        assert {p.name for p in ones[name].iterdir()} == {p.name for p in twos[name].iterdir()}
        assert LanguageModel.load(twos[name], device="cpu").generate(["the"], max_new_tokens=2)


@pytest.mark.slow
def test_a_chapter_finds_the_model_that_a_launch_trained(single, cache, monkeypatch) -> None:
    without_models(single, cache, "dpo")
    printed, _ = finish(train("dpo", cache=cache))

    def refuse(*_: Any) -> None:
        raise AssertionError("a cached stage was built again")

    monkeypatch.setattr(stages.Stage, "_build_locked", refuse)
    assert Pipeline("smoke", 0, "cpu").model_folder("dpo") == Path(printed.strip())


def until(condition: Any, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["all processes", "the launcher only"])
def test_a_launch_that_was_killed_is_followed_by_one_that_ends_well(single, cache, whole) -> None:
    without_models(single, cache, "base", "sft", "dpo")
    first = train("base", cache=cache)
    until(lambda: list(cache.glob("base-*.partial/scratch/checkpoint-*/trainer_state.json")), first)
    workers = psutil.Process(first.pid).children(recursive=True)
    if whole:
        os.killpg(first.pid, signal.SIGKILL)
    else:
        first.kill()  # its processes go on by themselves, and hold the lock
    first.wait()
    assert list(cache.glob("base-*.partial")) or not whole
    finish(train("base", cache=cache))
    psutil.wait_procs(workers, timeout=60)
    ones, twos = folders(single), folders(cache)
    assert lm.training_log(twos["base"])[-1] == pytest.approx(lm.training_log(ones["base"])[-1], rel=1e-4)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_launch(single, cache) -> None:
    without_models(single, cache, "base", "sft", "dpo")
    launched = train("base", cache=cache)
    until(lambda: list(cache.glob("base-*.partial/scratch/checkpoint-*")), launched)
    workers = psutil.Process(launched.pid).children(recursive=True)
    workers[-1].kill()
    errors = launched.communicate(timeout=100)[1]
    assert launched.returncode != 0
    assert "SIGKILL" in errors
    assert not psutil.wait_procs(workers, timeout=10)[1]
    finish(train("base", cache=cache))
    assert "base" in folders(cache)


@pytest.mark.slow
def test_of_two_launches_one_trains_and_the_other_waits(single, cache) -> None:
    without_models(single, cache, "base", "sft", "dpo")
    first = train("base", cache=cache)
    until(lambda: list(cache.glob("base-*.partial")), first)
    second = train("base", cache=cache)
    printed = [finish(process) for process in (first, second)]
    assert printed[0][0] == printed[1][0]
    waited = [len(re.findall("Another process is building base-", errors)) for _, errors in printed]
    assert sorted(waited) in ([0, 0], [0, 1]), "only the main process of a launch may say so"
    assert set(folders(cache)) == {"world", "tokenizer", "base"}


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_fit_is_named(cache) -> None:
    launched = train("dpo", cache=cache, processes=3)
    errors = launched.communicate(timeout=100)[1]
    assert launched.returncode != 0
    assert "3 processes for a batch of 4 rows" in errors
    assert not cache.exists()
