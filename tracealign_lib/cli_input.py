"""What the commands for one's own texts share: their options, the texts they read, the pages they write."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, get_type_hints

import typer

from tracealign_lib.corpora import decode, json_lines, open_bytes, text_lines
from tracealign_lib.errors import CorpusError, ModelError, ParameterError

STDIN = "-"

Text = Annotated[str | None, typer.Argument(help='One text; "-" reads it from standard input.')]
Index = Annotated[Path, typer.Option(help="Folder of an index, made by `tracealign index build`.")]
Lines = Annotated[str | None, typer.Option(metavar="FILE", help='One text a line; "-" is standard input.')]
Records = Annotated[
    str | None,
    typer.Option(
        "--jsonl", metavar="FILE", help='One JSON object with a text a line; "-" is standard input.'
    ),
]
Field = Annotated[
    str | None,
    typer.Option(help='Field of --jsonl that holds the text; by default "text", else "completion".'),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Html = Annotated[Path | None, typer.Option(help="Also write a page to this file.")]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command in which each parameter that is a NamedTuple becomes one option for each of its fields."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if hasattr(group, "_fields"):
            groups[parameter.name] = group
            hints = get_type_hints(group, include_extras=True)
            own = [
                inspect.Parameter(
                    field,
                    parameter.KEYWORD_ONLY,
                    annotation=hints[field],
                    default=group._field_defaults[field],
                )
                for field in group._fields
            ]
        else:
            own = [parameter.replace(kind=parameter.KEYWORD_ONLY)]
        parameters += own

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field: given.pop(field) for field in group._fields})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def options_given(context: typer.Context, names: Collection[str]) -> list[str]:
    """Those options among the parameters `names` that the user wrote, as they are written."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    ]


def refuse_useless(context: typer.Context, names: Collection[str], without: str) -> None:
    """`ParameterError` if the user wrote one of the options `names`, which do nothing without `without`."""
    if given := options_given(context, names):
        raise ParameterError(
            "An option would do nothing.",
            given=f"{' and '.join(given)} without {without}",
            expected=f"{without} beside it",
            mend=f"add {without}, or leave {' and '.join(given)} out",
        )


def check_source(name: str) -> None:
    """`ModelError` for what can only be a folder and is none: a hub would be asked for it in vain."""
    path = Path(name)
    is_path = name.startswith((".", "/")) or (path.parent != Path() and path.parent.is_dir())
    if is_path and not path.is_dir():
        raise ModelError(
            "There is no such folder.",
            given=name,
            expected="a folder with a tokenizer or model, or an id of the hub",
            mend="check the path; relative paths start at the current folder",
        )


class Given(NamedTuple):
    """A text that a command was given, the line it stands on, and what its record says besides."""

    number: int
    text: str
    id: str | int | None = None
    prompt: str | None = None


def read_texts(
    text: str | None, lines: str | None, jsonl: str | None, fields: tuple[str, ...]
) -> Iterator[Given]:
    """The texts of a command, read as they are asked for.

    Parameters
    ----------
    text:
        One text; "-" for all of standard input as one.
    lines, jsonl:
        A file, also packed, or "-". When nothing at all is named, standard input has one text a line.
    fields:
        Fields of a record that may hold the text; the first that is there does.

    Raises
    ------
    ParameterError
        Several places are named, or there is no text at all: what was to write them may have failed, and a
        command that looked at nothing must not say that all is well.
    CorpusError
        A file cannot be read, or a line is not what it should be; the message names both.
    """
    named = {"TEXT": text, "--lines": lines, "--jsonl": jsonl}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise ParameterError(
            "Texts come from several places at once.",
            given=" and ".join(given),
            expected="one of " + ", ".join(named),
            mend="leave out all but one",
        )
    if text is not None:
        return iter([Given(1, _read_all() if text == STDIN else text)])
    if not given and sys.stdin.isatty():
        raise _nothing("nothing, and standard input is a terminal")
    return _read_stream(lines or jsonl or STDIN, None if jsonl is None else fields)


def write_page(path: Path, page: str) -> None:
    """Write an HTML page whole; `ParameterError` if the place does not allow it."""
    from tracealign_lib.files import write_atomically

    try:
        write_atomically(path, page)
    except OSError as error:
        raise _no_page(path, str(error.strerror)) from error


def check_page(path: Path | None) -> None:
    """`ParameterError` if a page cannot stand there: told before the work, which may take long."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise _no_page(path, "a folder" if path.is_dir() else f"there is no folder {path.parent}")


def _no_page(path: Path, reason: str) -> ParameterError:
    return ParameterError(
        "The page cannot be written.",
        given=f"{path}: {reason}",
        expected="a file in a folder in which you may write",
        mend="choose another file with --html",
    )


def _read_all() -> str:
    text = decode(sys.stdin.buffer.read(), "standard input")
    if isinstance(text, CorpusError):
        raise text
    return text


def _read_stream(source: str, fields: tuple[str, ...] | None) -> Iterator[Given]:
    stdin: AbstractContextManager[BinaryIO] = nullcontext(sys.stdin.buffer)
    where = "standard input" if source == STDIN else source
    empty = True
    with stdin if source == STDIN else open_bytes(Path(source)) as stream:
        for given in _texts(stream, where) if fields is None else _records(stream, where, fields):
            empty = False
            yield given
    if empty and source == STDIN:
        raise _nothing(f"{where} is empty")
    if empty:
        raise CorpusError(
            "The file is empty.",
            given=where,
            expected="one text or record a line",
            mend="check the path, and the command that should have written it",
        )


def _texts(stream: BinaryIO, where: str) -> Iterator[Given]:
    for number, line in text_lines(stream, where):
        if isinstance(line, CorpusError):
            raise line
        yield Given(number, line)


def _records(stream: BinaryIO, where: str, fields: tuple[str, ...]) -> Iterator[Given]:
    for number, record in json_lines(stream, where):
        if isinstance(record, CorpusError):
            raise record
        known = record if isinstance(record, Mapping) else {}
        name = next((field for field in fields if field in known), "")
        if not isinstance(known.get(name), str):
            raise CorpusError(
                "A record holds no text.",
                given=f"{where}, line {number}: {str(record)[:80]}",
                expected=f"an object with a string {' or '.join(map(repr, fields))}",
                mend="name the field that holds the text with --field",
            )
        id, prompt = known.get("id"), None if name == "prompt" else known.get("prompt")
        yield Given(
            number,
            known[name],
            id if isinstance(id, str | int) else None,
            prompt if isinstance(prompt, str) else None,
        )


def _nothing(given: str) -> ParameterError:
    return ParameterError(
        "There is no text.",
        given=given,
        expected="an argument, --lines FILE, --jsonl FILE, or one text a line on standard input",
        mend="check the command that should have written the text",
    )
