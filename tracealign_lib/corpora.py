"""A corpus in the form in which people have it, read as a stream that never holds it.

JSON Lines, Parquet, text files, folders of these, packed or not, or a data set of the Hugging Face hub:
each becomes an iterator of `Document`. Whatever cannot be read is a `CorpusError` that names file and line.
Nothing in a file is executed, and nothing in it decides how much memory is taken: a line, a text file or a
text above `LONGEST` is refused before it is read to its end.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, cast

from tracealign_lib.documents import Document
from tracealign_lib.errors import CorpusError, ParameterError

LONGEST = 2**26
"""Bytes that a line or text file may have, and characters that a text may have."""
HUB = "hub:"
"""What the name of a data set of the hub begins with where a path is expected."""

Format = str
Read = Document | CorpusError
"""A document, or why there is none."""

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
_PACKED = (".gz", ".zst")
_ROWS = 64  # rows of Parquet that are held at a time: one may be as long as a book


class Columns(NamedTuple):
    """Which fields of a record hold what.

    `id` None: the field "id" where a record has one, else file and line. `meta` are further fields that are
    kept beside the record's own object "meta".
    """

    text: str = "text"
    id: str | None = None
    meta: tuple[str, ...] = ()


class HubPart(NamedTuple):
    """Which part of a data set of the hub is read."""

    configuration: str | None = None
    split: str = "train"


_COLUMNS, _PART = Columns(), HubPart()


class _File(NamedTuple):
    """A file, how it is called in ids and metadata, and its format."""

    path: Path
    name: str
    format: Format


def read_corpus(
    paths: Sequence[str | Path],
    *,
    columns: Columns = _COLUMNS,
    patterns: Sequence[str] = (),
    part: HubPart = _PART,
    on_bad: Callable[[CorpusError], None] | None = None,
) -> Iterator[Document]:
    """Documents of files, folders and data sets of the hub, one after the other.

    Paths are checked at once, their contents as they are read. The ending of a file tells its format:
    `.jsonl` or `.ndjson`, `.parquet`, `.txt` or `.md`, each but Parquet also packed as `.gz` or `.zst`; a
    file that `patterns` matches is text whatever its ending. A folder is searched to its bottom, in the
    order of names. The id of a text file is its path within the folder, after the folder's name if there
    are several paths; `meta["file"]` says where a document comes from.

    Parameters
    ----------
    paths:
        Files, folders, `"-"` for JSON Lines on standard input, or `"hub:owner/name"`.
    patterns:
        Which files of folders are read, such as `"*.py"`; by default those of a known ending.
    part:
        For data sets of the hub.
    on_bad:
        Called with the error of each record or text file that cannot be read, which is then left out.
        None: the first one is raised. Files that cannot be opened or end too early are always raised.

    Raises
    ------
    CorpusError
        A path is missing or holds nothing of a known format; while reading, also a record that lacks a
        field, is malformed, too long or not UTF-8, and a file that is damaged.
    """
    if not paths:
        raise ParameterError(
            "No corpus is named.", expected="at least one path", mend="name a file or folder"
        )
    sources = [_expand(path, patterns, several=len(paths) > 1) for path in paths]
    return _documents(sources, columns, part, on_bad)


def _documents(
    sources: Sequence[str | list[_File]],
    columns: Columns,
    part: HubPart,
    on_bad: Callable[[CorpusError], None] | None,
) -> Iterator[Document]:
    for source in sources:
        if isinstance(source, str):
            found = _read_hub(source, columns, part)
        else:
            found = chain.from_iterable(_read_file(file, columns) for file in source)
        for read in found:
            if isinstance(read, Document):
                yield read
            elif on_bad is None:
                raise read
            else:
                on_bad(read)


# --- files and folders ---------------------------------------------------------------------------


def _expand(path: str | Path, patterns: Sequence[str], *, several: bool) -> str | list[_File]:
    """The files behind a path; the path itself if it names a data set of the hub."""
    if str(path).startswith(HUB):
        return str(path).removeprefix(HUB)
    path = Path(path)
    if str(path) == "-":
        files = [_File(Path("/dev/stdin"), "stdin", "jsonl")]
    elif path.is_dir():
        files = _expand_folder(path, patterns, f"{path.resolve().name}/" if several else "")
    elif path.exists():
        files = [_File(path, path.name, format_of(path, patterns) or "")]
    else:
        raise CorpusError(
            "The corpus does not exist.",
            given=path,
            expected=f'a file, a folder, or the name of a data set of the hub after "{HUB}"',
            mend="check the path; relative paths start at the current folder",
        )
    if not files or not files[0].format:
        raise CorpusError(
            "No file of a known format is here.",
            given=f"{path}" + (f", searched for {', '.join(patterns)}" if patterns else ""),
            expected=f"files that end in {', '.join(_FORMATS)}, also with {' or '.join(_PACKED)}",
            mend='say which files are text with a pattern such as "*.py"',
        )
    return files


def _expand_folder(folder: Path, patterns: Sequence[str], prefix: str) -> list[_File]:
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        chosen = not patterns or any(PurePath(name).match(pattern) for pattern in patterns)
        format = format_of(path, patterns) if chosen else None
        if format is not None and path.is_file():
            found.append(_File(path, prefix + name, format))
    return found


def format_of(path: Path, patterns: Sequence[str] = ()) -> Format | None:
    """ "jsonl", "parquet" or "text" by the ending of a file; None if it tells nothing."""
    inner = path.with_suffix("") if path.suffix in _PACKED else path
    known = _FORMATS.get(inner.suffix)
    matched = any(PurePath(path.name).match(pattern) for pattern in patterns)
    return "text" if known is None and matched else known


def _read_file(file: _File, columns: Columns) -> Iterator[Read]:
    if file.format == "parquet":
        yield from _read_parquet(file, columns)
    elif file.format == "text":
        yield _read_text(file)
    else:
        with open_bytes(file.path) as stream:
            for number, record in json_lines(stream, str(file.path)):
                where = f"{file.path}, line {number}"
                yield _document(record, columns, where, f"{file.name}:{number}", file.name)


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file as a stream, unpacked if it ends in `.gz` or `.zst`.

    Raises
    ------
    CorpusError
        On opening or, within the block, on reading: the file is missing, may not be read, or is damaged.
    """
    try:
        with _unpacked(path) as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:  # for a damaged file, too
        packed = path.suffix in _PACKED and not (isinstance(error, OSError) and error.errno)
        raise CorpusError(
            "The file cannot be unpacked." if packed else "The file cannot be read.",
            given=f"{path}: {getattr(error, 'strerror', None) or error}",
            expected=f"a complete {path.suffix} file" if packed else "a file that you may read",
            mend="copy or download the file again" if packed else "check the path and its permissions",
        ) from error


def _unpacked(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".zst":
        # the standard library learns zstd only in Python 3.14
        import pyarrow  # type: ignore[import-untyped]

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return open(path, "rb")


# --- text and JSON Lines -------------------------------------------------------------------------


def _read_text(file: _File) -> Read:
    with open_bytes(file.path) as stream:
        raw = stream.read(LONGEST + 1)
    if len(raw) > LONGEST:
        return _too_long(str(file.path))
    text = decode(raw, str(file.path))
    if isinstance(text, CorpusError):
        return text
    return _storable(Document(file.name, text, {"file": file.name}), str(file.path))


def json_lines(stream: BinaryIO, where: str) -> Iterator[tuple[int, Any]]:
    """Each line that is not blank: its number from 1, and its value or a `CorpusError`."""
    for number, line in text_lines(stream, where):
        if isinstance(line, CorpusError):
            yield number, line
        elif line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield (
                    number,
                    CorpusError(
                        "A line is not JSON.",
                        given=f"{where}, line {number}: {error}",
                        expected="one JSON object a line",
                        mend="mend the line, or skip bad ones",
                    ),
                )


def text_lines(stream: BinaryIO, where: str) -> Iterator[tuple[int, str | CorpusError]]:
    """Each line without its end: its number from 1, and its text or a `CorpusError`."""
    number = 0
    while raw := stream.readline(LONGEST + 1):
        number += 1
        if len(raw) > LONGEST and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(LONGEST)
            yield number, _too_long(f"{where}, line {number}")
        else:
            yield number, decode(raw.removesuffix(b"\n").removesuffix(b"\r"), f"{where}, line {number}")


def decode(raw: bytes, where: str) -> str | CorpusError:
    """The text of UTF-8 bytes, without a byte order mark; or why they are none."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return CorpusError(
            "The text is not UTF-8.",
            given=f"{where}: byte {error.start} is 0x{raw[error.start]:02x}",
            expected="UTF-8 text",
            mend="convert it, for example: iconv -f latin1 -t utf-8 old.txt > new.txt",
        )


def _too_long(where: str) -> CorpusError:
    return CorpusError(
        "A document is too long.",
        given=where,
        expected=f"at most {LONGEST // 2**20} MiB a document",
        mend="cut it into chapters or pages, each a document of its own",
    )


# --- records -------------------------------------------------------------------------------------


def _document(record: Any, columns: Columns, where: str, default_id: str, file: str) -> Read:
    """The document in a record; a `CorpusError` is handed on."""
    if isinstance(record, CorpusError):
        return record
    if not isinstance(record, Mapping):
        return _bad(where, f"{type(record).__name__}, not an object", "an object with a text")
    given_id = record.get(columns.id or "id")
    if columns.id is None and not isinstance(given_id, str | int):
        given_id = default_id
    text, own = record.get(columns.text), record.get("meta")
    if not isinstance(text, str):
        return _bad(where, _field(record, columns.text), f'a string "{columns.text}"')
    if not isinstance(given_id, str | int) or isinstance(given_id, bool):
        return _bad(where, _field(record, columns.id or "id"), f'a string or number "{columns.id or "id"}"')
    if len(text) > LONGEST:
        return _too_long(where)
    meta = {"file": file, **(own if isinstance(own, Mapping) else {})}
    meta |= {name: record[name] for name in columns.meta if name in record}
    return _storable(Document(str(given_id), text, meta), where)


def _storable(document: Document, where: str) -> Read:
    """The document if an index can keep it: all of it can be written as JSON in UTF-8."""
    try:
        document.to_json().encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = f"U+{ord(error.object[error.start]):04X}, half of a character (a lone surrogate)"
        return _bad(where, wrong, "text that can be written as UTF-8")
    except (TypeError, ValueError) as error:
        return _bad(where, str(error), "metadata that can be written as JSON")
    return document


def _field(record: Mapping[str, Any], name: str) -> str:
    if name not in record:
        fields = ", ".join(map(str, list(record)[:8]))
        return f'no "{name}" among its fields: {fields}'[:200]
    return f'"{name}" is {repr(record[name])[:60]}'


def _bad(where: str, problem: str, expected: str) -> CorpusError:
    return CorpusError(
        "A record cannot be used.",
        given=f"{where}: {problem}",
        expected=expected,
        mend="mend the record, name the right fields, or skip bad ones",
    )


# --- tables --------------------------------------------------------------------------------------


def _read_parquet(file: _File, columns: Columns) -> Iterator[Read]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            wanted = _wanted(table.schema_arrow.names, columns, file.path)
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=wanted):
                for row in range(batch.num_rows):
                    number += 1
                    where = f"{file.path}, row {number}"
                    record = _row(batch, row, where)
                    yield _document(record, columns, where, f"{file.name}:{number}", file.name)
    except CorpusError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # a damaged name is no UTF-8
        raise CorpusError(
            "The Parquet file cannot be read.",
            given=f"{file.path}: {str(error).splitlines()[0]}",
            expected="a complete Parquet file",
            mend="copy or download the file again",
        ) from error


def _wanted(names: Sequence[str], columns: Columns, path: Path) -> list[str]:
    """The columns of a table that are read; others may be large."""
    needed = [name for name in (columns.text, columns.id, *columns.meta) if name is not None]
    missing = [name for name in needed if name not in names]
    if missing:
        raise CorpusError(
            "A column is missing.",
            given=f"{path} with {', '.join(names)[:200]}",
            expected=", ".join(missing),
            mend="name the columns that hold text and id",
        )
    return [name for name in names if name in {*needed, "id", "meta"}]


def _row(batch: Any, row: int, where: str) -> dict[str, Any] | CorpusError:
    try:
        return {name: batch.column(i)[row].as_py() for i, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError as error:  # Arrow does not check what a writer calls a string
        return _bad(where, f"byte {error.start} of a text is not UTF-8", "UTF-8 text")


def _read_hub(name: str, columns: Columns, part: HubPart) -> Iterator[Read]:
    for number, record in enumerate(_hub_records(name, part), start=1):
        default_id = f"{name}:{number}"
        yield _document(record, columns, f"{HUB}{name}, record {number}", default_id, f"{HUB}{name}")


def _hub_records(name: str, part: HubPart) -> Iterable[Any]:
    import datasets  # takes a second, which a local file does not need

    try:
        found = datasets.load_dataset(name, part.configuration, split=part.split, streaming=True)
        yield from found
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = (str(error).strip().splitlines() or [""])[0]
        asked = ", ".join([HUB + name, *filter(None, part)])
        raise CorpusError(
            "The data set cannot be read from the hub.",
            given=f"{asked}: {type(error).__name__}: {reason}",
            expected="an existing data set, configuration and split, and a network",
            mend="check their names on the hub; a private set needs a login there",
        ) from error
