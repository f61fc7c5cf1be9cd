"""Training documents, and how a corpus is read from disk.

A corpus is a sequence of `Document`: an id, a text, and metadata that says where it came from.
Readers accept what people have: a JSON Lines file (`{"id": ..., "text": ..., "meta": {...}}`, also
gzipped), or a folder of UTF-8 text files whose relative paths become the ids.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracealign_lib.errors import CorpusError


@dataclass(frozen=True, slots=True)
class Document:
    """One training document.

    Attributes
    ----------
    id:
        Unique within its corpus; what attribution returns.
    text:
        The whole text.
    meta:
        JSON-serialisable provenance, for example `{"collection": "web", "file": "a.txt"}`.
    """

    id: str
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """This document as one line of JSON Lines, keys in a fixed order."""
        record = {"id": self.id, "text": self.text, "meta": dict(self.meta)}
        return json.dumps(record, ensure_ascii=False, sort_keys=True)


def read_documents(path: str | Path) -> list[Document]:
    """Read a corpus from a `.jsonl` or `.jsonl.gz` file, or from a folder of `.txt` and `.md` files.

    Raises
    ------
    CorpusError
        The path is missing, holds no document, is not UTF-8, or has a malformed or duplicate
        record; the message names the file and line.
    """
    path = Path(path)
    if path.is_dir():
        documents = list(_read_folder(path))
    elif path.is_file():
        documents = list(_read_jsonl(path))
    else:
        raise CorpusError(
            "The corpus does not exist.",
            given=path,
            expected="a .jsonl or .jsonl.gz file, or a folder of .txt or .md files",
            mend="check the path; relative paths start at the current folder",
        )
    return check_documents(documents, origin=str(path))


def write_documents(documents: Iterable[Document], path: str | Path) -> None:
    """Write a corpus as JSON Lines (UTF-8, one document a line)."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            file.write(document.to_json() + "\n")


def check_documents(documents: Iterable[Document], *, origin: str = "documents") -> list[Document]:
    """Return `documents` as a list after checking that it is not empty and that ids are unique."""
    checked = list(documents)
    if not checked:
        raise CorpusError(
            "The corpus is empty.",
            given=origin,
            expected="at least one document",
            mend="check the file, or the filter that chose the documents",
        )
    seen: set[str] = set()
    for position, document in enumerate(checked):
        if document.id in seen:
            raise CorpusError(
                "Two documents have the same id.",
                given=f"{document.id!r}, again at position {position} of {origin}",
                expected="an id that occurs once: attribution answers with ids",
                mend="rename one of them, or drop the duplicate",
            )
        seen.add(document.id)
    return checked


def _read_folder(folder: Path) -> Iterator[Document]:
    files = (p for p in folder.rglob("*") if p.suffix in {".txt", ".md"} and p.is_file())
    for path in sorted(files):
        name = path.relative_to(folder).as_posix()
        yield Document(id=name, text=_decode(path.read_bytes(), str(path)), meta={"file": name})


def _read_jsonl(path: Path) -> Iterator[Document]:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError) as error:
            raise CorpusError(
                "The corpus cannot be decompressed.",
                given=f"{path}: {error}",
                expected="a complete gzip file",
                mend="copy or download the file again",
            ) from error
    for number, line in enumerate(_decode(raw, str(path)).split("\n"), start=1):
        if line.strip():
            yield _parse_record(line, where=f"{path}, line {number}")


def _parse_record(line: str, *, where: str) -> Document:
    expected = 'an object with strings "id" and "text", and an optional object "meta"'
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorpusError(
            "A line is not JSON.", given=f"{where}: {error}", expected=expected, mend="mend the line"
        ) from error
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("id"), str)
        or not isinstance(record.get("text"), str)
        or not isinstance(record.get("meta", {}), dict)
    ):
        raise CorpusError(
            "A record lacks a field, or has one of the wrong type.",
            given=f"{where}: {line[:120]}",
            expected=expected,
            mend="mend the line",
        )
    return Document(id=record["id"], text=record["text"], meta=record.get("meta", {}))


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            "The text is not UTF-8.",
            given=f"{where}: byte {error.start} is 0x{raw[error.start]:02x}",
            expected="UTF-8 text",
            mend="convert it, for example: iconv -f latin1 -t utf-8 old.txt > new.txt",
        ) from error
