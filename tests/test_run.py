"""The runner: which chapters, which parameters, what is written, and how failures and Ctrl-C end."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tracealign_lib.errors import ParameterError
from tracealign_lib.run import (
    ChapterRun,
    book_root,
    choose_chapters,
    cleaned,
    list_chapters,
    parse_parameters,
    run_book,
    run_table,
)

STANDARD = 'profile: str = "smoke"\nseed: int = 0\ndevice: str = "auto"\n'
ALL_TYPES = (
    STANDARD
    + """\
lengths: list[int] = [4, 8]
rate: float = 0.5
fast: bool = False
loose = 3
table: dict[str, float] = {"a": 1.0}
"""
)
FIRST = """\
import os, sys
print("before", flush=True)
print("no" + "ise", file=sys.stderr, flush=True)
print("after", profile, seed, os.path.basename(os.getcwd()))
print(os.environ["OMP_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"], "HF_HUB_OFFLINE" in os.environ)
"""


def write_chapter(root: Path, name: str, *sources: str, parameters: str = STANDARD) -> Path:
    cells = [new_markdown_cell("# A title"), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source) for source in sources]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def write_book(root: Path, *chapters: str) -> None:
    entries = "".join(f"      - file: notebooks/{name}\n" for name in chapters)
    toc = f"format: jb-book\nroot: book/preface\nparts:\n  - caption: One\n    chapters:\n{entries}"
    root.mkdir(parents=True, exist_ok=True)
    (root / "_toc.yml").write_text(toc + "      - file: extra/page\n")
    (root / "_config.yml").write_text("title: T\n")
    for page in ("book/preface.md", "extra/page.md", "data/card.md", "tests/test_x.py"):
        (root / page).parent.mkdir(exist_ok=True)
        (root / page).write_text("# Page\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A book with chapters of which none is ever executed."""
    folder = tmp_path / "book"
    write_book(folder, "00-five-minutes", "01-world", "03-traceindex", "10-traceless")
    for name in ("00-five-minutes", "01-world", "10-traceless"):
        write_chapter(folder, name)
    write_chapter(folder, "03-traceindex", parameters=ALL_TYPES)
    monkeypatch.chdir(folder)
    return folder


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a chapter was executed although its parameters are wrong")


# --- what is executed


def test_root_is_found_from_below(root: Path) -> None:
    assert book_root(root / "notebooks") == root
    with pytest.raises(ParameterError, match="not a folder of the book"):
        book_root(root.parent)


def test_chapters_come_in_the_order_of_the_book(root: Path) -> None:
    names = ["00-five-minutes", "01-world", "03-traceindex", "10-traceless"]
    assert list_chapters(root) == [f"notebooks/{name}" for name in names]
    assert choose_chapters(root, None) == choose_chapters(root, []) == list_chapters(root)
    assert choose_chapters(root, ["03", "00", "03"]) == [
        "notebooks/00-five-minutes",
        "notebooks/03-traceindex",
    ]


@pytest.mark.parametrize(
    "name", ["03", "03-traceindex", "traceindex", "tracei", "notebooks/03-traceindex.ipynb"]
)
def test_a_chapter_has_many_names(root: Path, name: str) -> None:
    assert choose_chapters(root, [name]) == ["notebooks/03-traceindex"]


@pytest.mark.parametrize(
    ("name", "message"), [("trace", "2 chapters fit"), ("04", "No chapter"), ("index", "No"), ("", "No")]
)
def test_an_unknown_or_ambiguous_chapter_lists_the_candidates(root: Path, name: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message) as caught:
        choose_chapters(root, [name])
    assert "03-traceindex" in str(caught.value)


def test_a_broken_table_of_contents_is_named(root: Path) -> None:
    (root / "_toc.yml").write_text("root: [unclosed")
    with pytest.raises(ParameterError, match="table of contents"):
        list_chapters(root)


# --- parameters


@pytest.mark.parametrize(
    ("given", "culprit"),
    [
        ({"min_lenght": 4}, "min_lenght"),
        ({"lengths": [4, "8"]}, "lengths: list"),
        ({"lengths": 4}, "lengths: list"),
        ({"rate": "0.5"}, "rate: float"),
        ({"rate": True}, "rate: float"),
        ({"fast": 1}, "fast: bool"),
        ({"loose": "x"}, "loose"),
        ({"table": {"a": "x"}}, "table: dict"),
        ({"table": {1: 1.0}}, "table: dict"),
    ],
)
def test_wrong_parameters_stop_before_anything_runs(
    root: Path, monkeypatch: pytest.MonkeyPatch, given: Mapping[str, Any], culprit: str
) -> None:
    monkeypatch.setattr("papermill.execute_notebook", refuse)
    with pytest.raises(ParameterError) as caught:
        run_book(["03"], parameters=given)
    assert culprit in str(caught.value)
    assert not (root / "_build").exists()


def test_an_unknown_parameter_lists_names_types_and_defaults(root: Path) -> None:
    with pytest.raises(ParameterError) as caught:
        run_book(["03"], parameters={"x": 1})
    for line in ("seed: int = 0", "lengths: list[int] = [4, 8]", 'profile: str = "smoke"'):
        assert line in str(caught.value)


@pytest.mark.parametrize("wrong", [{"profile": "huge"}, {"seed": "zero"}, {"device": "abacus"}])
def test_wrong_profile_seed_and_device(
    root: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    monkeypatch.setattr("papermill.execute_notebook", refuse)
    with pytest.raises(ParameterError, match=str(next(iter(wrong.values())))):
        run_book(["00"], **wrong)
    with pytest.raises(ParameterError, match=str(next(iter(wrong.values())))):
        run_book(["00"], parameters=wrong)


def test_a_parameter_of_one_chapter_goes_to_that_chapter_only(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    injected = {}

    def execute(source: str, target: str, parameters: dict[str, Any], **_: Any) -> None:
        injected[Path(source).stem] = parameters
        Path(target).write_text(Path(source).read_text())

    monkeypatch.setattr("papermill.execute_notebook", execute)
    run_book(["01", "03"], profile="smoke", seed=7, parameters={"rate": 1, "lengths": [2], "table": {"b": 2}})
    standard = {"profile": "smoke", "seed": 7, "device": "auto"}
    assert injected["01-world"] == standard
    assert injected["03-traceindex"] == standard | {"rate": 1, "lengths": [2], "table": {"b": 2}}


def test_texts_become_values_of_the_declared_type(root: Path) -> None:
    given = ["rate=0.25", "lengths=[1, 2]", "profile=7", "fast=True", "loose=9", "other=a=b"]
    assert parse_parameters(given, ["03"]) == {
        "rate": 0.25,
        "lengths": [1, 2],
        "profile": "7",
        "fast": True,
        "loose": 9,
        "other": "a=b",
    }


@pytest.mark.parametrize("text", ["rate", "=4", "a b=4"])
def test_an_assignment_without_name_or_value_is_named(root: Path, text: str) -> None:
    with pytest.raises(ParameterError, match="name=value"):
        parse_parameters([text])


def test_a_chapter_that_is_no_notebook_is_named(root: Path) -> None:
    (root / "notebooks" / "01-world.ipynb").write_text("{")
    with pytest.raises(ParameterError, match=r"01-world\.ipynb"):
        run_book()


def test_stored_outputs_must_be_those_of_the_defaults(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papermill.execute_notebook", refuse)
    with pytest.raises(ParameterError, match="leave out --store"):
        run_book(["01"], profile="smoke", seed=3, store=True)


# --- what is written


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ChapterRun], str]:
    """A book of which three chapters ran: one succeeds, one fails, one loses its kernel."""
    root = tmp_path_factory.mktemp("run") / "a {book}"
    write_book(root, "00-good", "01-fails", "02-dies", "03-left")
    write_chapter(root, "00-good", FIRST, "seed + 1")
    write_chapter(root, "01-fails", "print('so far')", "value = 1 / 0", "print('never')")
    write_chapter(root, "02-dies", "import os; os._exit(3)")
    write_chapter(root, "03-left", "print('not run')")
    code = (
        "from tracealign_lib.run import run_book\n"
        "runs = run_book(['00', '01', '02'], profile='smoke', store=True)\n"
        "import json; print(json.dumps(runs))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in {"HF_HUB_OFFLINE"}}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return root, [ChapterRun(*run) for run in json.loads(done.stdout)], done.stderr


def read(root: Path, name: str, folder: str = "_build/source/notebooks") -> Any:
    return nbformat.read(root / folder / f"{name}.ipynb", as_version=4)


def test_each_chapter_has_a_status_and_a_time(executed: tuple[Path, list[ChapterRun], str]) -> None:
    _, runs, _ = executed
    assert [(run.chapter, run.status) for run in runs] == [
        ("00-good", "done"),
        ("01-fails", "failed"),
        ("02-dies", "failed"),
    ]
    assert all(run.seconds > 0 for run in runs)


def test_a_failure_shows_its_cell_and_traceback(executed: tuple[Path, list[ChapterRun], str]) -> None:
    root, _, report = executed
    assert "01-fails failed in cell In [4]" in report
    assert "value = 1 / 0" in report
    assert "ZeroDivisionError: division by zero" in report
    assert "\x1b" not in report
    assert "02-dies failed: DeadKernelError" in report
    outputs = read(root, "01-fails").cells[-2].outputs
    assert outputs[0].ename == "ZeroDivisionError"
    assert [cell.cell_type for cell in read(root, "01-fails").cells[:2]] == ["markdown", "code"]


def test_outputs_are_kept_and_noise_is_not(executed: tuple[Path, list[ChapterRun], str]) -> None:
    root, _, _ = executed
    notebook = read(root, "00-good")
    printed, value = notebook.cells[-2:]
    assert [output.output_type for output in printed.outputs] == ["stream"]
    assert printed.outputs[0].text.startswith("before\nafter smoke 0 notebooks\n")
    assert printed.outputs[0].text.endswith(f"{os.environ.get('OMP_NUM_THREADS', '1')} false False\n")
    assert value.outputs[0].data["text/plain"] == "1"
    text = json.dumps(notebook)
    for noise in ("papermill", "noise", "execution_time", "iopub", str(root), "start_time"):
        assert noise not in text


def test_the_injected_cell_is_hidden(executed: tuple[Path, list[ChapterRun], str]) -> None:
    root, _, _ = executed
    injected = read(root, "00-good").cells[2]
    assert "remove-cell" in injected.metadata.tags
    assert 'profile = "smoke"' in injected.source


def test_the_source_is_a_complete_book(executed: tuple[Path, list[ChapterRun], str]) -> None:
    root, _, _ = executed
    source = root / "_build" / "source"
    found = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert found == {
        "_config.yml",
        "_toc.yml",
        "book/preface.md",
        "data/card.md",
        "extra/page.md",
        *(f"notebooks/{name}.ipynb" for name in ("00-good", "01-fails", "02-dies", "03-left")),
    }


def test_store_puts_outputs_but_not_the_injected_cell(executed: tuple[Path, list[ChapterRun], str]) -> None:
    root, _, _ = executed
    stored = read(root, "00-good", "notebooks")
    assert [cell.get("execution_count") for cell in stored.cells] == [None, 1, 2, 3]
    assert stored.cells[-1].outputs[0]["execution_count"] == 3
    assert stored.cells[-1].outputs[0].data["text/plain"] == "1"
    assert "injected" not in json.dumps(stored)
    assert "noise" not in json.dumps(stored)
    assert not read(root, "01-fails", "notebooks").cells[-3].outputs, "a failed chapter is not stored"


def test_a_second_run_writes_the_same_bytes_and_keeps_the_other_chapters(
    executed: tuple[Path, list[ChapterRun], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _, _ = executed
    monkeypatch.chdir(root)
    folder = root / "_build" / "source" / "notebooks"
    before = (folder / "00-good.ipynb").read_bytes()
    assert [run.status for run in run_book(["00"], profile="smoke")] == ["done"]
    assert (folder / "00-good.ipynb").read_bytes() == before
    assert read(root, "01-fails").cells[-2].outputs, "the executed version of an unchanged chapter stays"


def test_a_chapter_changed_since_its_run_is_copied_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(source: str, target: str, *_: Any, **__: Any) -> None:
        Path(target).write_text(Path(source).read_text())

    monkeypatch.setattr("papermill.execute_notebook", execute)
    run_book(["00", "01"])
    for name, source in (("00-five-minutes", "print('old')"), ("01-world", "print('new')")):
        write_chapter(root, name, source)
    run_book(["00"])
    assert read(root, "01-world").cells[-1].source == "print('new')"


def test_a_chapter_that_dies_shows_no_output_of_an_earlier_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(source: str, target: str, *_: Any, **__: Any) -> None:
        notebook = nbformat.read(source, as_version=4)
        notebook.cells[1].outputs = [new_output("stream", text="an earlier seed")]
        nbformat.write(notebook, target)

    def die(*_: Any, **__: Any) -> None:
        raise RuntimeError("the kernel did not start")

    monkeypatch.setattr("papermill.execute_notebook", execute)
    run_book(["01"])
    assert read(root, "01-world").cells[1].outputs
    monkeypatch.setattr("papermill.execute_notebook", die)
    assert [run.status for run in run_book(["01"])] == ["failed"]
    assert not read(root, "01-world").cells[1].outputs


@pytest.mark.parametrize("output", [".", "..", "notebooks", "_toc.yml", "book/out", "data/new/out"])
def test_an_output_that_would_overwrite_something_is_refused(root: Path, output: str) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(ParameterError, match="output folder cannot be used"):
        run_book(["00"], output=output)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_widgets_and_cut_streams_are_cleaned() -> None:
    widget = new_output(
        "display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "HBox()"}
    )
    streams = [
        new_output("stream", name=name, text=text) for name, text in (("stdout", "a"), ("stderr", "b"))
    ]
    cell = new_code_cell("x", outputs=[streams[0], widget, streams[1], new_output("stream", text="c")])
    notebook = new_notebook(cells=[cell], metadata={"widgets": {"state": "x" * 1000}})
    cleansed = cleaned(notebook)
    assert [output.text for output in cleansed.cells[0].outputs] == ["ac"]
    assert "widgets" not in cleansed.metadata
    assert len(notebook.cells[0].outputs) == 4, "the argument is left alone"


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals_and_never_for_kernels(
    root: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    seen = []

    def execute(source: str, target: str, *_: Any, progress_bar: dict[str, Any], **__: Any) -> None:
        seen.append((not progress_bar["disable"], os.environ["TRACEALIGN_PROGRESS"]))
        Path(target).write_text(Path(source).read_text())

    monkeypatch.delenv("TRACEALIGN_PROGRESS", raising=False)
    monkeypatch.setattr(
        "tracealign_lib.progress._visible", lambda: "TRACEALIGN_PROGRESS" not in os.environ and terminal
    )
    monkeypatch.setattr("papermill.execute_notebook", execute)
    run_book(["00"])
    assert seen == [(terminal, "0")]
    assert "TRACEALIGN_PROGRESS" not in os.environ


def test_the_table_shows_times_and_failures() -> None:
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        console.print(run_table([ChapterRun("00-a", 1.26, "done"), ChapterRun("01-b", 2.0, "failed")]))
    text = capture.get()
    assert "1.3" in text
    assert "3.3" in text
    assert "1 failed" in text


def test_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    root = tmp_path / "book"
    write_book(root, "00-quick", "01-slow")
    write_chapter(root, "00-quick", "print('finished')")
    write_chapter(
        root, "01-slow", "from pathlib import Path; Path('started').touch()", "import time; time.sleep(300)"
    )
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tracealign_lib.cli import app; app(['run', '--profile', 'smoke'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not (root / "notebooks" / "started").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "1 of 2 chapters were finished and are kept in _build/source" in err
    assert "Traceback" not in err
    assert read(root, "00-quick").cells[-1].outputs[0].text == "finished\n"
    assert not list((root / "_build" / "source" / "notebooks").glob("*running*"))
