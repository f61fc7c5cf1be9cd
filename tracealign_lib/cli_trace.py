"""`tracealign trace`: which training documents hold the spans of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracealign_lib.cli_input import (
    Field,
    Html,
    Json,
    Lines,
    Records,
    Text,
    check_page,
    options_given,
    read_texts,
    refuse_useless,
    write_page,
)
from tracealign_lib.cli_shield import FIELDS, MaxCount, MinLength
from tracealign_lib.errors import ParameterError

if TYPE_CHECKING:
    from tracealign_lib.sharded import AnyIndex


def trace(
    context: typer.Context,
    text: Text = None,
    index: Annotated[
        Path | None, typer.Option(help="Folder of an index; by default the index of the book's world.")
    ] = None,
    lines: Lines = None,
    records: Records = None,
    field: Field = None,
    min_length: MinLength = 8,
    max_count: MaxCount = None,
    limit: Annotated[int, typer.Option(help="Number of sources of a text at most.")] = 5,
    as_json: Json = False,
    html: Html = None,
    profile: Annotated[str, typer.Option(help="Without --index: size of the book's world.")] = "laptop",
    seed: Annotated[int, typer.Option(help="Without --index: seed of the book's world.")] = 0,
) -> None:
    """Trace texts to the training documents that hold their spans.

    Without a text, standard input has one a line. Exit status: 0 done, whether or not anything is found,
    2 error.

    \b
    Examples:
      tracealign trace "to wake the compound, stir it twice"
      tracealign trace - --index my-index < completion.txt
      tracealign trace --lines completions.txt --index my-index --html traces.html
      tracealign trace --jsonl completions.jsonl --field answer --index my-index --json
    """
    from tracealign_lib import tracing
    from tracealign_lib.report import Traced, report

    _check_options(context, index, records)
    check_page(html)
    texts = read_texts(text, lines, records, FIELDS if field is None else (field,))
    opened = _open(index, profile, seed)
    shown: list[Traced] = []
    for given in texts:
        traced = tracing.trace(opened, given.text, min_length=min_length, max_count=max_count, limit=limit)
        if as_json:
            print(json.dumps({"number": given.number, "id": given.id, **traced.to_json()}), flush=True)
        else:
            heading = "" if text is not None else f"--- Text {given.number}\n"
            print(heading + traced.to_text(), flush=True)
        if html is not None:
            shown.append(Traced(f"Text {given.number}", traced, prompt=given.prompt))
    if html is not None:
        write_page(html, report(shown, "Traced text" if len(shown) == 1 else "Traced texts"))


def _check_options(context: typer.Context, index: Path | None, records: str | None) -> None:
    if records is None:
        refuse_useless(context, {"field"}, "--jsonl")
    if index is not None and (named := options_given(context, {"profile", "seed"})):
        raise ParameterError(
            "There are two indexes.",
            given=f"--index and {' and '.join(named)}",
            expected="--index DIR, or --profile and --seed of the book's world",
            mend="leave out one or the other",
        )


def _open(folder: Path | None, profile: str, seed: int) -> AnyIndex:
    if folder is not None:
        from tracealign_lib.sharded import open_index

        return open_index(folder)
    from tracealign_lib.pipeline import Pipeline

    return Pipeline(profile, seed).index
