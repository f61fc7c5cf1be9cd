"""Where the texts of a command come from; the commands' own tests cover what is done with them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tracealign_lib.cli_input import Given, options_given, read_texts, with_options, write_page
from tracealign_lib.errors import ParameterError

FIELDS = ("text",)


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def feed(
    monkeypatch: pytest.MonkeyPatch, raw: bytes, kind: type[io.TextIOWrapper] = io.TextIOWrapper
) -> None:
    monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(raw), encoding="utf-8"))


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, b"typed\n", Terminal)
    with pytest.raises(ParameterError, match="terminal"):
        read_texts(None, None, None, FIELDS)
    assert [one.text for one in read_texts(None, "-", None, FIELDS)] == ["typed"]  # when it is asked for


def test_lines_are_read_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            buffer[:5] = b"more\n"
            return 5

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    texts: Iterator[Given] = read_texts(None, None, None, FIELDS)
    assert [next(texts).number for _ in range(3)] == [1, 2, 3]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")), min_size=1))
def test_every_line_is_one_text(texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        feed(patch, "".join(f"{text}\n" for text in texts).encode())
        read = list(read_texts(None, "-", None, FIELDS))
    assert [one.text for one in read] == [text.removeprefix("\ufeff") for text in texts]
    assert [one.number for one in read] == list(range(1, len(texts) + 1))


class Colour(NamedTuple):
    """Options of a group."""

    hue: Annotated[str, typer.Option("--hue-name", help="Which.")] = "red"
    light: Annotated[bool, typer.Option("--light")] = False


def test_the_fields_of_a_group_are_options_of_the_command() -> None:
    app = typer.Typer()

    @app.command()
    @with_options
    def paint(context: typer.Context, what: str, *, colour: Colour, times: int = 1) -> None:
        """Paint."""
        print(what, colour, times, options_given(context, {"hue", "light", "times"}))

    def painted(*arguments: str) -> str:
        return CliRunner().invoke(app, arguments).stdout

    assert painted("door") == "door Colour(hue='red', light=False) 1 []\n"
    every = painted("--hue-name", "red", "--light", "--times", "2", "door")
    assert every == "door Colour(hue='red', light=True) 2 ['--hue-name', '--light', '--times']\n"
    assert "Which." in painted("--help")


def test_a_page_is_written_whole_or_refused(tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", "page")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == "page"
    with pytest.raises(ParameterError, match="page cannot be written"):
        write_page(tmp_path / "a.html" / "b.html", "page")
