"""Every chapter runs at profile smoke, gives the same checked outputs again, and runs alone from nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tracealign_lib.run import list_chapters, run_book

pytestmark = pytest.mark.notebook

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = list_chapters(ROOT)
ONE_CHAPTER = pytest.mark.parametrize("chapter", CHAPTERS, ids=[Path(chapter).name for chapter in CHAPTERS])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def executed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book source with every chapter executed at smoke, one after another, from one empty cache."""
    output = tmp_path_factory.mktemp("executed") / "source"
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(ROOT):
        patch.setenv("TRACEALIGN_CACHE", str(cache))
        runs = run_book(profile="smoke", output=output)
    failed = [run.chapter for run in runs if run.status != "done"]
    assert not failed, f"chapters failed, see stderr: {failed}"
    return output


def nbval(path: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a notebook again; cells tagged `nbval-check-output` must print what they printed before."""
    options = ["--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "-c", os.devnull, "-q"]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={path.parent}", str(path)]
    quiet = {"TRACEALIGN_PROGRESS": "0", "OMP_NUM_THREADS": "1"}  # a bar would be an output of its cell
    environment = {**os.environ, "TRACEALIGN_CACHE": str(cache), **quiet}
    return subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True)


def test_there_are_chapters() -> None:
    assert CHAPTERS


@ONE_CHAPTER
def test_chapter_runs_at_smoke(chapter: str, executed: Path) -> None:
    notebook = nbformat.read(executed / f"{chapter}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert all(cell.execution_count for cell in cells)
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    [injected] = [cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert 'profile = "smoke"' in injected.source


@ONE_CHAPTER
def test_chapter_prints_the_same_again(chapter: str, executed: Path, cache: Path) -> None:
    path = executed / f"{chapter}.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    assert [cell for cell in cells if "nbval-check-output" in cell.metadata.get("tags", [])], (
        "nothing is checked"
    )
    run = nbval(path, cache)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


def test_a_changed_output_is_noticed(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("print(1 + 1)", metadata={"tags": ["nbval-check-output"]})
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="3\n")]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, tmp_path / "changed.ipynb")
    assert nbval(tmp_path / "changed.ipynb", tmp_path).returncode == 1


@pytest.mark.slow
@ONE_CHAPTER
def test_chapter_runs_alone_from_an_empty_cache(chapter: str, executed: Path, tmp_path: Path) -> None:
    """A new cache gives the same checked outputs as the whole book did."""
    run = nbval(executed / f"{chapter}.ipynb", tmp_path / "empty")
    assert run.returncode == 0, run.stdout[-4000:]
