"""One of several processes that ask for the same stages: launch_ranks.py SCENARIO, with RANK etc. set.

Every build adds a line to the file `log` of the working folder.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tracealign_lib import launch, stages
from tracealign_lib.stages import Stage

RANK = os.environ["RANK"]


def note(line: str) -> None:
    with open("log", "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def plain(name: str) -> Stage:
    """A stage that one process builds, slowly enough for the other to come meanwhile."""

    def build(folder: Path) -> None:
        note(f"{name} by 1 of {launch.processes()}")
        time.sleep(0.5)
        (folder / "data").write_text(name)

    return Stage(name, {}, build, (stages,))


def shared(name: str, *inputs: Stage) -> Stage:
    """A stage that all processes build; each leaves a file of its own, one late."""

    def build(folder: Path) -> None:
        note(f"{name} by {RANK} of {launch.processes()}")
        time.sleep(0.5 * int(RANK))
        (folder / f"from-{RANK}").write_text("done")

    return Stage(name, {}, build, (stages,), inputs, together=True)


def builds() -> None:
    """Stages of both kinds, one that asks for the other kind while it is built, and both a second time."""
    asked = [shared("model", plain("world"))]

    def outcomes(folder: Path) -> None:
        shared("inner").path()
        (folder / "data").write_text("outcomes")

    asked.append(Stage("outcomes", {}, outcomes, (stages,)))
    for stage in asked + asked:
        stage.path()
    note(f"agreed on {launch.agreed(RANK == '0')}")


def failure() -> None:
    """The second process fails while both build."""

    def build(folder: Path) -> None:
        if RANK == "1":
            raise SystemExit("1 cannot go on")

    Stage("model", {}, build, (stages,), together=True).path()


def refused() -> None:
    """What was built cannot be completed, which only the main process notices."""
    Stage("model", {}, lambda folder: (folder / "manifest.json").touch(), (stages,), together=True).path()


if __name__ == "__main__":
    {"builds": builds, "failure": failure, "refused": refused}[sys.argv[1]]()
    launch.leave()
