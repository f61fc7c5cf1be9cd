"""What the commands for one's own texts share: their options, the texts they read, the pages they write."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

import typer

from tracealign_lib.corpora import decode, json_lines, open_bytes, text_lines
from tracealign_lib.errors import CorpusError, ParameterError

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
        raise ParameterError(
            "The page cannot be written.",
            given=f"{path}: {error.strerror}",
            expected="a file in a folder in which you may write",
            mend="choose another file with --html",
        ) from error


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
    if empty:
        raise _nothing(f"{where} is empty")


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
