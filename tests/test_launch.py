"""Several processes of one launch: who builds, who waits, and that nobody waits for a failed one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tracealign_lib import launch, stages
from tracealign_lib.errors import ParameterError
from tracealign_lib.stages import Stage

SCRIPT = Path(__file__).with_name("launch_ranks.py")


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


def test_without_a_launch_there_is_one_process_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "8")  # alone it says nothing: a cluster sets it for other purposes
    assert (launch.processes(), launch.is_main(), launch.share(5, "cpu")) == (1, True, 5)
    assert [launch.agreed(value) for value in (True, False)] == [True, False]
    launch.once(lambda: done.append("once"))
    launch.leave()
    assert done == ["once"]


@pytest.mark.parametrize(("batch", "count", "rows"), [(4, 2, 2), (4, 4, 1), (32, 8, 4), (1, 1, 1)])
def test_equal_shares_make_the_whole_batch(monkeypatch, batch, count, rows) -> None:
    pretend(monkeypatch, 0, count)
    assert launch.share(batch, "cpu") == rows


def test_a_batch_that_cannot_be_shared_names_the_numbers_that_fit(monkeypatch) -> None:
    pretend(monkeypatch, 1, 3)
    with pytest.raises(ParameterError, match=r"3 processes for a batch of 4 rows\n.*1 or 2 or 4 processes"):
        launch.share(4, "cpu")


def test_each_process_has_one_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ParameterError, match="accelerate launch --num_processes 4"):
        launch.share(8, "cuda")
    assert launch.share(8, "cpu") == 8
    pretend(monkeypatch, 3, 4)
    assert launch.share(8, "cuda") == 2
    pretend(monkeypatch, 4, 8)
    with pytest.raises(ParameterError, match="no more than 4"):
        launch.share(8, "cuda")


def test_alone_a_process_is_the_main_one_of_one(monkeypatch) -> None:
    pretend(monkeypatch, 1, 2)
    assert (launch.processes(), launch.is_main()) == (2, False)
    with launch.alone():
        assert (launch.processes(), launch.is_main()) == (1, True)
        assert "LOCAL_RANK" not in os.environ, "accelerate looks for it"
    assert (launch.processes(), launch.is_main()) == (2, False)


def test_the_number_of_processes_does_not_change_the_key(monkeypatch) -> None:
    keys = {Stage("model", {}, print, (stages,), together=together).key for together in (True, False)}
    pretend(monkeypatch, 1, 2)
    keys.add(Stage("model", {}, print, (stages,), together=True).key)
    assert len(keys) == 1


# --- real processes


def run(folder: Path, scenario: str, count: int = 2) -> list[tuple[int, str]]:
    """Exit status and stderr of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    here |= {"TRACEALIGN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), scenario],
            cwd=folder,
            env={**os.environ, **here, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ended = [(process.communicate(timeout=100)[1], process.returncode) for process in started]
    return [(status, errors) for errors, status in ended]


def log(folder: Path) -> list[str]:
    return sorted((folder / "log").read_text().splitlines())


def test_trainings_are_built_by_all_and_everything_else_by_one(tmp_path: Path) -> None:
    assert [status for status, _ in run(tmp_path, "builds")] == [0, 0]
    inner = [line for line in log(tmp_path) if line.startswith("inner")]
    assert inner in (["inner by 0 of 1"], ["inner by 1 of 1"]), "within a stage of one process, it is alone"
    assert [line for line in log(tmp_path) if line not in inner] == [
        "agreed on True",
        "agreed on True",
        "model by 0 of 2",
        "model by 1 of 2",
        "world by 1 of 1",
    ]
    entries = {path.name.split("-")[0]: path for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert set(entries) == {"world", "model", "inner", "outcomes"}
    assert not any("partial" in path.name for path in entries.values())
    manifests = {name: json.loads((path / "manifest.json").read_text()) for name, path in entries.items()}
    assert {name: manifest["processes"] for name, manifest in manifests.items()} == {
        "world": 1, "model": 2, "inner": 1, "outcomes": 1,
    }  # fmt: skip
    # The main process waited for the late one before it sealed the folder.
    assert [file["path"] for file in manifests["model"]["files"]] == ["from-0", "from-1"]


@pytest.mark.parametrize(
    ("scenario", "rank", "message"),
    [
        ("failure", 1, "1 cannot go on"),
        ("refused", 0, "wrote a file that belongs to the cache"),
    ],
)
def test_a_process_that_fails_ends_the_others_too(tmp_path, scenario, rank, message) -> None:
    ended = run(tmp_path, scenario)
    assert all(status != 0 for status, _ in ended)
    assert message in ended[rank][1]
    left = [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].endswith(".partial")
