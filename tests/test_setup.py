"""pyproject.toml, requirements.lock and environment.yml say the same, and so do the version numbers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import tracealign_lib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK_TEXT = (ROOT / "requirements.lock").read_text(encoding="utf-8")
LOCK_LINES = [line for line in LOCK_TEXT.splitlines() if not line.startswith("#")]
COMMANDS = {
    "book": "bin/tracealign run",
    "test": "bin/pytest",
    "test-slow": "bin/pytest",
    "lab": "bin/jupyter lab",
    "lint": "bin/ruff",
}
PINS = {line.partition("==")[0]: line.partition("==")[2] for line in LOCK_LINES}


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked_requirements() -> list[str]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    return [
        *project["dependencies"],
        *extras["book"],
        *extras["test"],
        *PYPROJECT["build-system"]["requires"],
    ]


@pytest.mark.parametrize("line", locked_requirements())
def test_each_requirement_is_satisfied_by_a_pin(line: str) -> None:
    requirement = Requirement(line)
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin), f"{line} is not satisfied by {pin}"


def test_lock_holds_names_and_exact_versions_only() -> None:
    for line in LOCK_LINES:
        assert re.fullmatch(
            r"[a-z0-9]+(-[a-z0-9]+)*==[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?", line
        ), line
    assert sorted(PINS) == list(PINS)
    assert len(PINS) == len(LOCK_LINES)
    assert not re.search(r"://|--|sha256|@|\+|nvidia", LOCK_TEXT)


def test_lock_pins_what_the_project_promises() -> None:
    assert PINS["torch"] == "2.13.0"
    assert PINS["jupyter-book"] == "1.0.4.post1"


def test_lock_is_the_closure_of_the_requirements(lock: ModuleType) -> None:
    try:
        differs = {
            name: pin for name, pin in PINS.items() if Version(distribution(name).version).public != pin
        }
    except PackageNotFoundError as missing:
        differs = {str(missing): "not installed"}
    if differs or not sys.platform.startswith("linux") or sys.version_info[:2] != (3, 11):
        pytest.skip(f"this environment is not the locked one: {differs or sys.platform}")
    assert lock.render(lock.closure(ROOT / "pyproject.toml")) == LOCK_TEXT


def test_closure_follows_markers_and_extras(lock: ModuleType, tmp_path: Path) -> None:
    toml = tmp_path / "pyproject.toml"
    toml.write_text(
        '[project]\ndependencies = ["pytest"]\noptional-dependencies = {book = ["coverage"], test = []}\n'
    )
    pins = lock.closure(toml)
    assert {"pytest", "pluggy", "iniconfig", "packaging", "coverage"} <= set(pins)
    assert "colorama" not in pins or sys.platform == "win32"
    assert "hypothesis" not in pins  # an extra of pytest that nobody asked for


def test_conda_environment_installs_from_the_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.lock", "-e ."]}]
    assert Version("3.11") in Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier


def test_version_is_the_same_everywhere() -> None:
    version = tracealign_lib.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert PYPROJECT["project"]["version"] == version == str(citation["version"]) == newest.group(1)


def test_licences_are_those_that_are_named() -> None:
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()
    assert "https://creativecommons.org/licenses/by/4.0/" in (ROOT / "LICENSE-TEXT").read_text()


def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tracealign_lib", source / "tracealign_lib", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tracealign_lib/")}
    files = (path for path in (ROOT / "tracealign_lib").rglob("*") if path.is_file())
    assert packed == {p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts}


@pytest.mark.parametrize("target", sorted(COMMANDS))
def test_each_target_makes_the_environment_first(target: str, tmp_path: Path) -> None:
    plan = dry_run(target, tmp_path, "requirements.lock", "pyproject.toml")
    install = plan.index("pip --disable-pip-version-check install --quiet -r requirements.lock")
    assert plan.index("-m venv --clear .venv") < install < plan.index("--no-deps --no-build-isolation -e .")
    assert install < plan.index(COMMANDS[target])


def test_environment_is_renewed_only_when_the_lock_has_changed(tmp_path: Path) -> None:
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("")
    ready = tmp_path / ".venv" / ".ready"
    ready.parent.mkdir()
    ready.write_text("")
    after = (tmp_path / "requirements.lock").stat().st_mtime + 10
    os.utime(ready, (after, after))
    assert "install" not in dry_run("test", tmp_path)
    os.utime(tmp_path / "requirements.lock", (after + 10, after + 10))
    assert "install --quiet -r requirements.lock" in dry_run("test", tmp_path)


def test_make_alone_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^make (\S+)", listed, re.MULTILINE)) == set(phony.group(1).split()) - {"help"}


def test_a_missing_python_is_said_plainly(tmp_path: Path) -> None:
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("")
    command = ["make", "-f", str(ROOT / "Makefile"), "test", "PYTHON="]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "No Python 3.11 or 3.12 was found." in run.stdout
    assert not (tmp_path / ".venv").exists()


def dry_run(target: str, folder: Path, *files: str) -> str:
    """What `make target` would do in `folder`, without doing it."""
    for name in files:
        (folder / name).write_text("")
    command = ["make", "-n", "-f", str(ROOT / "Makefile"), target, "PYTHON=python3.11"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
