"""Write requirements.lock: the exact versions of everything that the book and its tests need.

Usage, in an environment where `pip install -e ".[book,test]"` gave the versions you want:

    .venv/bin/python tools/lock.py > requirements.lock

The closure of the project's requirements is walked in the installed metadata, with markers evaluated
for the running platform. Local version labels (`+cpu`) are dropped: which build of torch to install is
the reader's choice.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRAS = ("book", "test")
HEADER = """\
# Exact versions of everything that `make book` and `make test` need (Python 3.11, Linux, CPU).
# Made by tools/lock.py from an environment in which the tests pass; do not edit by hand.
"""


def closure(project: Path, extras: tuple[str, ...] = EXTRAS) -> dict[str, str]:
    """Canonical name -> installed version, for all that `project`'s pyproject.toml asks for."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(line) for line in table["dependencies"]]
    waiting += [Requirement(line) for extra in extras for line in table["optional-dependencies"][extra]]
    pins: dict[str, str] = {}
    walked: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras}:
            name = canonicalize_name(requirement.name)
            if (name, extra) in walked:
                continue
            walked.add((name, extra))
            installed = distribution(name)
            pins[name] = Version(installed.version).public
            needed = (Requirement(line) for line in installed.requires or [])
            waiting += [need for need in needed if _applies(need.marker, extra)]
    return dict(sorted(pins.items()))


def render(pins: dict[str, str]) -> str:
    """The text of the lock file."""
    return HEADER + "".join(f"{name}=={version}\n" for name, version in pins.items())


def _applies(marker: Marker | None, extra: str) -> bool:
    return marker is None or marker.evaluate({"extra": extra})


if __name__ == "__main__":
    sys.stdout.write(render(closure(Path(__file__).resolve().parent.parent / "pyproject.toml")))
