"""Execute the book: every chapter, or some, through papermill, into a source that Jupyter Book renders.

A chapter is executed in its own kernel, in the folder of its notebook, where JupyterLab and nbval
run it too. What is written to `_build/source/` is a complete Jupyter Book: the executed notebooks,
with what would differ from run to run taken out of them, next to copies of everything else that the
table of contents needs.
"""

from __future__ import annotations

import ast
import copy
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tracealign_lib.errors import ParameterError
from tracealign_lib.files import write_atomically
from tracealign_lib.progress import progress

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from rich.table import Table

OUTPUT = Path("_build/source")

_TOC = "_toc.yml"
_COPIED = ("_config.yml", _TOC, "book", "data", "README.md", "CHANGELOG.md", "CITATION.cff")
_KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # spinning threads slow each other down on small machines
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRACEALIGN_PROGRESS": "0",  # stderr is not kept, so a bar there would only cost time
}
_INJECTED = "injected-parameters"
_ERROR_MARKER = "papermill-error-cell-tag"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TYPES: dict[str, type] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "list": list,
    "tuple": tuple,
    "dict": dict,
}


class ChapterRun(NamedTuple):
    """How the execution of one chapter ended."""

    chapter: str
    seconds: float
    status: str  # "done" or "failed"


class Parameter(NamedTuple):
    """One line of a chapter's `parameters` cell."""

    name: str
    type: str  # "str", "list[int]", ... or "None" where the cell does not say
    default: str  # source code

    def __str__(self) -> str:
        return f"{self.name}: {self.type} = {self.default}"


def book_root(start: str | Path | None = None) -> Path:
    """The folder with `_toc.yml` at or above `start` (the current folder by default).

    Raises
    ------
    ParameterError
        There is none.
    """
    here = Path(start or Path.cwd()).absolute()
    for folder in (here, *here.parents):
        if (folder / _TOC).is_file():
            return folder
    raise ParameterError(
        "This is not a folder of the book.",
        given=here,
        expected=f"a folder with {_TOC}, or one below it",
        mend="change to the folder of the book",
    )


def list_chapters(root: Path) -> list[str]:
    """The notebooks of the table of contents, in its order, such as `notebooks/03-traceindex`."""
    return [file for file in _toc_files(root) if (root / f"{file}.ipynb").is_file()]


def choose_chapters(root: Path, wanted: Sequence[str] | None) -> list[str]:
    """The chapters that `wanted` names, in the order of the book; all of them for None or nothing.

    A chapter has its file name ("03-traceindex") or a unique beginning of it, with or without the
    number ("03", "trace"). `ParameterError` for a name that fits none, or more than one.
    """
    known = list_chapters(root)
    chosen = {_find(name, known) for name in wanted or ()}
    return [chapter for chapter in known if not wanted or chapter in chosen]


def run_book(
    chapters: Sequence[str] | None = None,
    *,
    profile: str = "laptop",
    seed: int = 0,
    device: str = "auto",
    parameters: Mapping[str, Any] | None = None,
    output: str | Path = OUTPUT,
    store: bool = False,
) -> list[ChapterRun]:
    """Execute chapters one after another; a chapter that fails is reported on stderr, the rest go on.

    Parameters
    ----------
    chapters:
        Names as `choose_chapters` takes them; all by default.
    profile, seed, device, parameters:
        Injected into the chapters. Each must be accepted, with its type, by every chosen chapter that
        has a parameter of that name, and by at least one of them.
    output:
        Folder that becomes a complete Jupyter Book source; relative to the folder of the book. Chapters
        that are not chosen come from an earlier run if their source has not changed since, else they
        are copied with the outputs that are stored in them.
    store:
        Also write the outputs into the notebooks themselves; only with the chapters' own defaults.

    Raises
    ------
    ParameterError
        No book here, or an unknown chapter, profile or parameter, or a value of the wrong type.
    KeyboardInterrupt
        With a message that says what is kept.
    """
    from tracealign_lib.profiles import get_profile

    root = book_root()
    chosen = choose_chapters(root, chapters)
    given = {"profile": profile, "seed": seed, "device": device, **(parameters or {})}
    injected = _check_parameters(root, chosen, given, only_defaults=store)
    get_profile(given["profile"])
    if given["device"] != "auto":
        from tracealign_lib.lm import resolve_device

        resolve_device(given["device"])
    _prepare_source(root, root / output, chosen)
    return _run_chapters(root, root / output, injected, store)


def run_table(runs: Sequence[ChapterRun]) -> Table:
    """The run times as a table, with their sum."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("chapter", title="Run times", box=SIMPLE)
    table.add_column("seconds", justify="right")
    table.add_column("status")
    for run in runs:
        table.add_row(run.chapter, f"{run.seconds:.1f}", run.status)
    failed = sum(run.status == "failed" for run in runs)
    summary = f"{failed} failed" if failed else "all done"
    table.add_section()
    table.add_row("total", f"{sum(run.seconds for run in runs):.1f}", summary)
    return table


def parse_parameters(assignments: Sequence[str], chapters: Sequence[str] | None = None) -> dict[str, Any]:
    """Turn `name=value` texts into values of the types that the chosen chapters declare.

    A parameter of type str takes the text as it stands; the others read it as a Python literal.
    """
    root = book_root()
    types = {
        parameter.name: parameter.type
        for chapter in choose_chapters(root, chapters)
        for parameter in chapter_parameters(root, chapter)
    }
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ParameterError(
                "A parameter is not given as name=value.",
                given=assignment,
                expected="for example: --set min_length=8",
                mend="write the name, an equals sign and the value, without spaces around the sign",
            )
        values[name.strip()] = text if types.get(name.strip()) == "str" else _literal(text)
    return values


def chapter_parameters(root: Path, chapter: str) -> list[Parameter]:
    """The parameters that a chapter declares in its cell tagged `parameters`."""
    import papermill

    path = root / f"{chapter}.ipynb"
    try:
        found = papermill.inspect_notebook(_template(path))
    except Exception as error:  # papermill lets through whatever JSON, nbformat and the disk raise
        raise ParameterError(
            "A chapter is not a notebook.",
            given=f"{path}: {error}",
            expected="a Jupyter notebook of format 4",
            mend="restore the file",
        ) from error
    return [Parameter(name, p["inferred_type_name"], p["default"]) for name, p in found.items()]


def _toc_files(root: Path) -> list[str]:
    import yaml

    try:
        toc = yaml.safe_load((root / _TOC).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(
            "The table of contents cannot be read.",
            given=f"{root / _TOC}: {error}",
            expected="a Jupyter Book table of contents in YAML",
            mend="mend the file",
        ) from error
    return list(dict.fromkeys(_walk_toc(toc)))


def _walk_toc(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for entry in node:
            yield from _walk_toc(entry)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in {"root", "file"}:
                yield str(value).removesuffix(".ipynb").removesuffix(".md")
            else:
                yield from _walk_toc(value)


def _find(wanted: str, known: Sequence[str]) -> str:
    name = Path(wanted).name.removesuffix(".ipynb")
    stems = {Path(chapter).name: chapter for chapter in known}
    if name in stems:
        return stems[name]
    matches = [stem for stem in stems if name and name in _beginnings(stem, len(name))]
    if len(matches) == 1:
        return stems[matches[0]]
    raise ParameterError(
        f"{len(matches)} chapters fit this name." if matches else "No chapter has this name.",
        given=wanted,
        expected="the name, or a unique beginning, of one of: " + (", ".join(matches or stems) or "none"),
        mend="write more of the name" if matches else "check the spelling",
    )


def _beginnings(stem: str, length: int) -> tuple[str, str]:
    return stem[:length], re.sub(r"^\d+-", "", stem)[:length]


def _check_parameters(
    root: Path, chosen: Sequence[str], given: Mapping[str, Any], *, only_defaults: bool
) -> dict[str, dict[str, Any]]:
    """For each chapter the values to inject; raises if a name is unknown or a value ill-typed."""
    accepted = {chapter: chapter_parameters(root, chapter) for chapter in chosen}
    for name in given:
        if chosen and not any(p.name == name for known in accepted.values() for p in known):
            raise ParameterError(
                "No chosen chapter has this parameter.",
                given=name,
                expected=_listing(accepted),
                mend="check the spelling; `tracealign run` injects profile, seed and device itself",
            )
    for chapter, known in accepted.items():
        for parameter in known:
            if parameter.name in given:
                _check_value(given[parameter.name], parameter, chapter)
                if only_defaults:
                    _check_default(given[parameter.name], parameter, chapter)
    return {
        chapter: {p.name: given[p.name] for p in known if p.name in given}
        for chapter, known in accepted.items()
    }


def _listing(accepted: Mapping[str, Sequence[Parameter]]) -> str:
    lines = (
        f"{Path(chapter).name}: " + ("; ".join(map(str, known)) or "none")
        for chapter, known in accepted.items()
    )
    return "\n            ".join(lines)


def _check_value(value: Any, parameter: Parameter, chapter: str) -> None:
    if not _fits(value, _declared(parameter)):
        raise ParameterError(
            f"A parameter of {Path(chapter).name} has the wrong type.",
            given=f"{parameter.name}={value!r} ({type(value).__name__})",
            expected=str(parameter),
            mend=f"give a value of type {parameter.type}",
        )


def _check_default(value: Any, parameter: Parameter, chapter: str) -> None:
    if value != _literal(parameter.default):
        raise ParameterError(
            "Stored outputs must be those of the parameters that the reader sees.",
            given=f"{parameter.name}={value!r}",
            expected=f"the default of {Path(chapter).name}: {parameter}",
            mend="leave out --store, or change the default in the notebook",
        )


def _declared(parameter: Parameter) -> ast.expr:
    """The declared type, or that of the default where the cell declares none."""
    if parameter.type != "None":
        return ast.parse(parameter.type, mode="eval").body
    return ast.Name(type(_literal(parameter.default)).__name__)


def _fits(value: Any, declared: ast.expr) -> bool:
    """Whether `value` has the declared type; a type that is not in `_TYPES` accepts everything."""
    if isinstance(declared, ast.Subscript):
        if not _fits(value, declared.value):
            return False
        inner = declared.slice.elts if isinstance(declared.slice, ast.Tuple) else [declared.slice]
        if isinstance(value, dict):
            return all(_fits(key, inner[0]) and _fits(entry, inner[-1]) for key, entry in value.items())
        return not isinstance(value, list | tuple) or all(_fits(entry, inner[0]) for entry in value)
    if not isinstance(declared, ast.Name) or declared.id not in _TYPES:
        return True
    if isinstance(value, bool):
        return declared.id == "bool"
    if declared.id == "float":
        return isinstance(value, int | float)
    return isinstance(value, _TYPES[declared.id])


def _literal(text: str) -> Any:
    """The value of a Python literal; the text itself if it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _prepare_source(root: Path, target: Path, chosen: Sequence[str]) -> None:
    """Copy what the table of contents needs into `target`, and every notebook that is not executed.

    Chosen chapters are copied too: one that dies or is interrupted must not leave a gap.
    """
    if root.resolve().is_relative_to(target.resolve()):
        raise _bad_output(target, "it holds the book itself")
    if any(target.resolve().is_relative_to((root / name).resolve()) for name in _COPIED):
        raise _bad_output(target, "it lies in a folder that is copied")
    if target.exists() and not (target.is_dir() and ((target / _TOC).exists() or not any(target.iterdir()))):
        raise _bad_output(target, "it holds something else")
    for name in _COPIED:
        _copy(root / name, target / name)
    for file in _toc_files(root):
        for suffix in (".md", ".rst"):
            _copy(root / f"{file}{suffix}", target / f"{file}{suffix}")
    for chapter in list_chapters(root):
        stored, executed = root / f"{chapter}.ipynb", target / f"{chapter}.ipynb"
        if chapter in chosen or not executed.exists() or not _same_sources(stored, executed):
            _copy(stored, executed)


def _bad_output(target: Path, reason: str) -> ParameterError:
    return ParameterError(
        "The output folder cannot be used.",
        given=f"{target}: {reason}",
        expected="a new or empty folder, or one that an earlier run made",
        mend="choose another folder with --output",
    )


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _same_sources(stored: Path, executed: Path) -> bool:
    def sources(path: Path) -> list[tuple[str, str]]:
        cells = _read(path).cells
        return [(cell.cell_type, cell.source) for cell in cells if _INJECTED not in _tags(cell)]

    return sources(stored) == sources(executed)


@contextmanager
def _environment() -> Iterator[None]:
    """Set what kernels inherit, unless the caller has set it; HF_HUB_OFFLINE is the reader's choice."""
    added = [name for name in _KERNEL_ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _KERNEL_ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _run_chapters(
    root: Path, target: Path, injected: Mapping[str, Mapping[str, Any]], store: bool
) -> list[ChapterRun]:
    runs: list[ChapterRun] = []
    with progress(description="chapters", total=len(injected), unit="chapter") as bar, _environment():
        for chapter, values in injected.items():
            bar.set_postfix_str(Path(chapter).name)
            started = time.monotonic()
            try:
                done = _run_chapter(root, target, chapter, values, store, quiet=bar.disable)
            except KeyboardInterrupt:
                kept = target.relative_to(root) if target.is_relative_to(root) else target
                raise KeyboardInterrupt(
                    f"{len(runs)} of {len(injected)} chapters were finished and are kept in {kept}"
                ) from None
            status = "done" if done else "failed"
            runs.append(ChapterRun(Path(chapter).name, time.monotonic() - started, status))
            bar.update()
    return runs


def _run_chapter(
    root: Path, target: Path, chapter: str, values: Mapping[str, Any], store: bool, *, quiet: bool
) -> bool:
    """Execute one chapter and write it, also when it fails; whether it went through."""
    import papermill

    source = root / f"{chapter}.ipynb"
    running = target / f"{chapter}.running.ipynb"
    running.parent.mkdir(parents=True, exist_ok=True)
    bar = {"desc": Path(chapter).name, "leave": False, "position": 1, "disable": quiet, "unit": "cell"}
    try:
        papermill.execute_notebook(
            _template(source),
            _template(running),
            dict(values),
            kernel_name="python3",
            cwd=str(source.parent),
            progress_bar=bar,
            start_timeout=300,
            extra_arguments=["--log-level=CRITICAL"],  # its remarks on transports are not for readers
        )
    except Exception as error:  # whatever a chapter or its kernel raises, the next chapter must run
        _report(Path(chapter).name, error)
        if running.exists():
            _write(cleaned(_read(running)), target / f"{chapter}.ipynb")
        return False
    else:
        executed = cleaned(_read(running))
        _write(executed, target / f"{chapter}.ipynb")
        if store:
            _write(without_injected(executed, _read(source)), source)
        return True
    finally:
        running.unlink(missing_ok=True)


def _report(chapter: str, error: Exception) -> None:
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        cell = "\n".join(f"    {line}" for line in error.source.splitlines())
        traceback = _ANSI.sub("", "\n".join(error.traceback))
        message = f"\n{chapter} failed in cell In [{error.exec_count}]:\n\n{cell}\n\n{traceback}\n"
    else:
        message = f"\n{chapter} failed: {type(error).__name__}: {error}\n"
    print(message, file=sys.stderr, flush=True)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """A copy of an executed notebook without what differs between equal runs.

    Taken out: stderr, times, papermill's metadata and markers, widgets (their state is large, and a
    page without a kernel cannot use it). The injected cell is tagged so that the page hides it.
    """
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if _ERROR_MARKER not in _tags(cell)]
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if _INJECTED in _tags(cell):
            cell["id"] = _INJECTED
            cell.metadata["tags"] = [_INJECTED, "remove-cell"]
        elif not _tags(cell):
            cell.metadata.pop("tags", None)
        if cell.cell_type == "code":
            cell.outputs = _cleaned_outputs(cell.outputs)
    return notebook


def _cleaned_outputs(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr" or _WIDGET in output.get("data", {}):
            continue
        # How a kernel cuts a stream into messages depends on timing.
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1]["text"] += output.text
        else:
            kept.append(output)
    return kept


def without_injected(executed: NotebookNode, source: NotebookNode) -> NotebookNode:
    """A copy of `executed` as git keeps it: no injected cell, counts from 1, metadata of `source`."""
    notebook = copy.deepcopy(executed)
    notebook.cells = [cell for cell in notebook.cells if _INJECTED not in _tags(cell)]
    notebook.metadata = copy.deepcopy(source.metadata)
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.execution_count is not None:
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output["execution_count"] = count
    return notebook


def _read(path: Path) -> NotebookNode:
    import nbformat

    notebook: NotebookNode = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    return notebook


def _write(notebook: NotebookNode, path: Path) -> None:
    import nbformat

    write_atomically(path, nbformat.writes(notebook) + "\n")  # type: ignore[no-untyped-call]


def _tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _template(path: Path) -> str:
    """`path` for papermill, which fills in names in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")
