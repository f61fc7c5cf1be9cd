"""`tracealign index`: make an index of one's own corpus, show it, verify it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tracealign_lib.cli_input import Json, check_source, refuse_useless
from tracealign_lib.cli_status import interrupted
from tracealign_lib.corpora import HUB, Columns, HubPart, read_corpus
from tracealign_lib.documents import Document
from tracealign_lib.errors import CorpusError, IndexFormatError, ModelError, ParameterError, TraceAlignError

if TYPE_CHECKING:
    from tracealign_lib.sharded import AnyIndex

REPORTED = 10
"""Bad records that are told one by one; the others are counted."""

app = typer.Typer(
    cls=TyperGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make, show and verify an index of your own corpus.",
)

Folders = Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders of indexes.")]


Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH",
        help='Files, folders, "hub:owner/name" for a data set of the Hugging Face hub, or "-" for JSON Lines '
        "on standard input.",
    ),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the index.")]
Tokenizer = Annotated[
    str, typer.Option(metavar="ID_OR_FOLDER", help="Tokenizer of the model, from the hub or a folder.")
]
Collection = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PATH", help="Another index, DIR.NAME, of the same tokenizer; repeatable."),
]
Glob = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help='Which files of folders, such as "*.py"; repeatable.'),
]
TextField = Annotated[str, typer.Option(help="Field or column that holds the text.")]
IdField = Annotated[
    str | None, typer.Option(help='Field that holds the id; by default "id", else file and line.')
]
Meta = Annotated[
    list[str] | None, typer.Option(metavar="FIELD", help="Field to show with a source; repeatable.")
]
Config = Annotated[str | None, typer.Option(help="Configuration of a data set of the hub.")]
Split = Annotated[str, typer.Option(help="Split of a data set of the hub.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents to read at most.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out and report what cannot be read.")]
ShardMegabytes = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="MB",
        help="Index in shards of so much text: for a corpus larger than memory, and goes on after a stop.",
    ),
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Replace an older index, once the new one is whole.")
]


@app.command()
def build(
    context: typer.Context,
    paths: Paths,
    out: Out,
    tokenizer: Tokenizer,
    collection: Collection = None,
    glob: Glob = None,
    text_field: TextField = "text",
    id_field: IdField = None,
    meta: Meta = None,
    config: Config = None,
    split: Split = "train",
    limit: Limit = None,
    skip_bad: SkipBad = False,
    shard_mb: ShardMegabytes = None,
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Index a corpus, so that texts can be traced to its documents.

    The ending of a file tells its format: .jsonl, .ndjson, .parquet, .txt or .md, but for Parquet also packed
    as .gz or .zst. An index is there as a whole or not at all. Exit status: 0 done, 2 error, 130 interrupted.

    \b
    Examples:
      tracealign index build corpus.jsonl.zst --out my-index --tokenizer allenai/OLMo-2-0425-1B
      tracealign index build src docs --glob "*.py" --glob "*.md" --out my-index --tokenizer ./my-model
      tracealign index build hub:owner/name --text-field content --limit 10000 --out i --tokenizer gpt2
      tracealign index build web-*.jsonl.zst --shard-mb 200 --out my-index --tokenizer gpt2
      tracealign index build unsafe.jsonl --collection rules=policy.jsonl --out my-index --tokenizer gpt2
    """
    columns, part = Columns(text_field, id_field, tuple(meta or ())), HubPart(config, split)
    sources = {out: paths} | _collections(collection or [], out)
    _check_options(context, sources, replace)
    skipped = _Skipped() if skip_bad else None
    corpora = {
        target: _some(
            islice(
                read_corpus(named, columns=columns, patterns=glob or (), part=part, on_bad=skipped), limit
            ),
            named,
        )
        for target, named in sources.items()
    }
    loaded = load_tokenizer(tokenizer)
    for target, documents in reversed(corpora.items()):  # the index itself comes last: then all are there
        built = _build(documents, loaded, target, shard_mb)
        _print(built, as_json)
    if skipped is not None:
        skipped.tell()


@app.command()
def info(folders: Folders, as_json: Json = False) -> None:
    """Show what an index holds.

    \b
    Examples:
      tracealign index info my-index
      tracealign index info my-index --json
    """
    from tracealign_lib.sharded import open_index

    for folder in folders:
        _print(open_index(folder), as_json)


@app.command()
def verify(folders: Folders) -> None:
    """Read all of an index, and find any change since it was built.

    Exit status: 0 every index is whole, 1 one is not, 2 error.

    \b
    Example:
      tracealign index verify my-index && echo whole
    """
    from tracealign_lib.sharded import open_index

    damaged = 0
    for folder in folders:
        try:
            open_index(folder, verify="full")
        except IndexFormatError as error:
            if not folder.exists():  # a slip of the pen must not look like damage to a script
                raise
            damaged += 1
            print(error, file=sys.stderr)
        else:
            print(f"{folder}: whole")
    if damaged:
        raise typer.Exit(1)


def load_tokenizer(name: str) -> Any:
    """A tokenizer from a folder or by its id on the hub; code that comes with one is never run.

    Raises
    ------
    ModelError
        There is none, or it cannot be fetched.
    """
    check_source(name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a damaged file makes tokenizers raise bare Exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            "The tokenizer cannot be loaded.",
            given=f"{name}: {reason}",
            expected="a folder with a tokenizer.json, or an id of the hub and a network",
            mend="check the spelling and the connection, or download it once and name its folder",
        ) from error


class _Skipped:
    """Tells the first bad records on standard error, and counts them all."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, error: CorpusError) -> None:
        self.count += 1
        if self.count <= REPORTED:
            print(f"Left out: {error.problem} {error.given}", file=sys.stderr)

    def tell(self) -> None:
        left_out = "nothing" if not self.count else "1 record" if self.count == 1 else f"{self.count} records"
        print(f"Left out: {left_out} in all.", file=sys.stderr)


def _collections(assignments: list[str], out: Path) -> dict[Path, list[str]]:
    """Folder of each further index -> its paths."""
    found: dict[Path, list[str]] = {}
    for assignment in assignments:
        name, equals, path = assignment.partition("=")
        if not equals or not path or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ParameterError(
                "This names no collection.",
                given=f"--collection {assignment}",
                expected="NAME=PATH, with a name of letters, digits, - and _",
                mend="for example --collection rules=policy.jsonl",
            )
        found.setdefault(out.with_name(f"{out.name}.{name}"), []).append(path)
    return found


def _some(documents: Iterator[Document], paths: list[str]) -> Iterator[Document]:
    """The documents; an error that names the paths if there are none."""
    first = next(documents, None)
    if first is None:
        raise CorpusError(
            "The corpus is empty.",
            given=", ".join(paths),
            expected="at least one document that can be read",
            mend="check the files, and what --skip-bad left out",
        )
    yield first
    yield from documents


def _check_options(context: typer.Context, sources: Mapping[Path, list[str]], replace: bool) -> None:
    if not any(path.startswith(HUB) for named in sources.values() for path in named):
        refuse_useless(context, {"config", "split"}, f"{HUB}owner/name")
    for target in sources:
        _check_free(target, replace)


def _check_free(target: Path, replace: bool) -> None:
    if target.exists() and not replace and not (target.is_dir() and not any(target.iterdir())):
        raise ParameterError(
            "Something is in the place of the index.",
            given=str(target),
            expected="a new or empty folder",
            mend="choose another folder, or replace an older index with --replace",
        )


def _build(documents: Iterator[Document], tokenizer: Any, target: Path, shard_mb: int | None) -> AnyIndex:
    from tracealign_lib.index import TraceIndex
    from tracealign_lib.progress import progress
    from tracealign_lib.sharded import ShardedIndex

    try:
        if shard_mb is not None:
            return ShardedIndex.build(documents, tokenizer, target, shard_bytes=shard_mb * 10**6)
        return TraceIndex.build(
            progress(documents, description="Reading documents", unit=" documents"), tokenizer, target
        )
    except KeyboardInterrupt as error:
        kept = "" if shard_mb is None else "; the same command goes on behind the shards that are finished"
        raise interrupted(f"{target} is as it was before{kept}") from error
    except TraceAlignError:  # among them a full disk, which is an OSError too
        raise
    except OSError as error:
        raise ParameterError(
            "The index cannot be written.",
            given=f"{target}: {error.strerror or error}",
            expected="a folder in which you may write, with enough room",
            mend="choose another folder with --out",
        ) from error


def _print(index: AnyIndex, as_json: bool) -> None:
    size = sum(path.stat().st_size for path in index.path.rglob("*") if path.is_file())
    if as_json:
        print(json.dumps({"format": "tracealign.index", "version": 1, **_record(index), "bytes": size}))
        return
    print(index.path)
    print(f"  documents   {index.n_documents:,}")
    print(f"  tokens      {index.n_tokens:,}")
    print(f"  vocabulary  {index.vocab_size:,}")
    print(f"  tokenizer   {index.tokenizer_hash or 'none: built from token ids'}")
    print(f"  on disk     {size / 1e6:,.1f} MB")


def _record(index: AnyIndex) -> dict[str, Any]:
    return {
        "path": str(index.path),
        "documents": index.n_documents,
        "tokens": index.n_tokens,
        "vocabulary": index.vocab_size,
        "tokenizer_hash": index.tokenizer_hash,
    }
