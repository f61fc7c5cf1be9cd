"""Writing an index: one build of a path at a time, and the whole index or none.

Two processes of one machine cannot build one path: a build holds the lock file `.<name>.lock`. What is
written, and how it is read, is told in `index_format`; how it takes its place, in `index_place`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from tracealign_lib import files
from tracealign_lib.documents import Document
from tracealign_lib.errors import BusyError, CorpusError, ModelError, ParameterError, StorageError
from tracealign_lib.index_format import (
    ARRAYS,
    CORE_FILES,
    FORMAT_VERSION,
    IDS,
    MAGIC,
    MANIFEST,
    OPTIONAL_FILES,
    SHARD,
    SHARDED_MAGIC,
    TEXT_FILES,
    TEXTS,
    TOKENIZER,
    TOKENIZER_FILES,
    hash_tokenizer,
    magic_of,
    npy_header,
    open_tokenizer,
    write_manifest,
)
from tracealign_lib.index_place import clear_leftovers, put_in_place
from tracealign_lib.suffix_array import CorpusArrays


class Texts(NamedTuple):
    """What an index keeps beside its arrays when it is built from documents."""

    records: list[bytes]  # one line of JSON Lines per document, see `encode_record`
    tokenizer: Any
    tokenizer_hash: str


@contextmanager
def building(path: str | Path) -> Iterator[Path]:
    """Where to build an index, for this process alone.

    Raises
    ------
    ParameterError
        The path holds anything but an index.
    BusyError
        Another process is building there.
    StorageError
        The folder in which it is to stand cannot be written to.
    """
    target = Path(path).resolve()
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout as error:
        raise BusyError(
            "Another process is building this index.",
            given=str(target),
            expected="one build of a path at a time",
            mend="wait until it has ended, or choose another path",
        ) from error
    try:
        _check_target(target)
        yield target
    finally:
        with suppress(OSError):  # while it is held: who waits for it notices, and makes a new one
            Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def writing(target: Path, size: int | None = None) -> Iterator[None]:
    """Turn an `OSError` while `size` bytes are written for `target` into a `StorageError`."""
    try:
        yield
    except (StorageError, Timeout):
        raise
    except OSError as error:
        needed = ""
        with suppress(OSError):
            free = shutil.disk_usage(target.parent).free
            needed = f"; {free:,} bytes are free" + ("" if size is None else f", {size:,} are needed")
        raise StorageError(
            "The index cannot be written.",
            given=f"{target}: {error}{needed}",
            expected="a disk with room for the index, and for the older one until it is replaced",
            mend="free some space, or choose a path on another disk; an older index is as it was",
        ) from error


def _check_target(target: Path) -> None:
    if target.is_dir():
        known = {MANIFEST, TOKENIZER, *CORE_FILES, *TEXT_FILES}
        entries = {entry.name for entry in target.iterdir() if not SHARD.fullmatch(entry.name)}
        empty = next(target.iterdir(), None) is None
        free = empty or (entries <= known and magic_of(target) in (MAGIC, SHARDED_MAGIC))
    else:
        free = not target.exists()
    if not free:
        raise ParameterError(
            "The path holds something that is not an index.",
            given=str(target),
            expected="a new folder, or an index that may be replaced",
            mend="choose another path, or move away what is there",
        )


def encode_record(document: Document) -> bytes:
    """A document as one line of JSON Lines in UTF-8."""
    try:
        if isinstance(document.id, str) and isinstance(document.text, str):
            return document.to_json().encode("utf-8") + b"\n"
        problem = "id and text are not both strings"
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        problem = str(error)
    raise CorpusError(
        "A document cannot be stored.",
        given=f"{document.id!r}: {problem}",
        expected="strings that can be written as UTF-8, and metadata that can be written as JSON",
        mend="mend the document",
    )


def write_index(target: Path, arrays: CorpusArrays, names: list[str], texts: Texts | None = None) -> None:
    """Write a whole index and put it in the place of `target`, which `building` has given.

    An error or an interruption leaves `target` as it was, and nothing beside it.

    Raises
    ------
    ModelError
        The tokenizer changes when it is saved and loaded.
    StorageError
        The disk is full, or cannot be written to.
    """
    clear_leftovers(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}-{time.time_ns()}.partial")
    size = sum(array.nbytes for array in arrays) + sum(map(len, texts.records if texts else ()))
    with writing(target, size):
        try:
            partial.mkdir()
            _write_files(partial, arrays, names, texts)
            put_in_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_files(folder: Path, arrays: CorpusArrays, names: list[str], texts: Texts | None) -> None:
    for name, array in zip(ARRAYS, arrays, strict=True):
        _save_array(folder / name, array)
    (folder / IDS).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    if texts is not None:
        (folder / TEXTS).write_bytes(b"".join(texts.records))
        offsets = np.cumsum([0, *map(len, texts.records)], dtype="<i8")
        _save_array(folder / "document_offsets.npy", offsets)
        _save_tokenizer(texts, folder / TOKENIZER)
    _write_manifest(folder, arrays, None if texts is None else texts.tokenizer_hash)


def _save_array(place: Path, array: NDArray[Any]) -> None:
    np.save(place, array, allow_pickle=False)
    # numpy does not notice a disk that is full when the last buffer is written
    if place.stat().st_size != len(npy_header(array.dtype.str, len(array))) + array.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))


def _save_tokenizer(texts: Texts, folder: Path) -> None:
    tokenizer, fingerprint = texts.tokenizer, texts.tokenizer_hash
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        # tokenizers raises bare Exception where a disk is full
        raise OSError(f"the tokenizer cannot be written: {error}") from error
    known = {*TOKENIZER_FILES, *OPTIONAL_FILES}
    for entry in folder.iterdir():
        if f"{TOKENIZER}/{entry.name}" not in known:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    found = hash_tokenizer(open_tokenizer(folder))
    if found != fingerprint:
        raise ModelError(
            "The tokenizer changes when it is saved and loaded again.",
            given=f"{type(tokenizer).__name__}: hash {fingerprint} before, {found} after",
            expected="a tokenizer that its tokenizer.json describes fully",
            mend="wrap its backend: PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)",
        )


def _write_manifest(folder: Path, arrays: CorpusArrays, fingerprint: str | None) -> None:
    """Put every file onto the disk, then write the manifest that vouches for them."""
    dtypes = {name: array.dtype.str for name, array in zip(ARRAYS, arrays, strict=True)}
    content = {
        "magic": MAGIC,
        "version": FORMAT_VERSION,
        "byte_order": "little",
        "vocab_size": len(arrays.unigrams),
        "n_tokens": len(arrays.suffixes),
        "n_documents": len(arrays.starts) - 1,
        "tokenizer_hash": fingerprint,
        "dtypes": dtypes if fingerprint is None else {**dtypes, "document_offsets.npy": "<i8"},
        "files": files.seal(folder),
    }
    write_manifest(folder, content)
