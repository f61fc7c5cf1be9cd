"""The folder of an infini-gram index: how one is written and sorted, and what is checked on opening.

An index is cut into shards. Shard N is the files `tokenized.N` (token ids, each document behind a
separator, the greatest value of its two or four bytes), `offset.N` (where each document starts),
`table.N` (the suffix array: the byte at which the suffix of each rank starts) and, with documents,
`metadata.N` and `metaoff.N`. Numbers are little-endian. An index that this library makes also has a
manifest, written last, with the size and SHA-256 of every file, the ids of its documents as JSON, and
their tokenizer.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydivsufsort import divsufsort

from tracealign_lib import files
from tracealign_lib.documents import Document, check_documents
from tracealign_lib.engine import EngineError
from tracealign_lib.errors import IndexFormatError, ParameterError
from tracealign_lib.index_format import load_tokenizer
from tracealign_lib.progress import progress
from tracealign_lib.queries import check_integer
from tracealign_lib.suffix_array import Ids

MAGIC = "tracealign.infini-gram"
FORMAT_VERSION = 1
IDS = "document_ids.json"

_MANIFEST = "manifest.json"
_NEEDED = ("tokenized", "offset", "table")
_OPTIONAL = ("metadata", "metaoff")
_SHARD_FILE = re.compile(rf"({'|'.join(_NEEDED + _OPTIONAL)})\.(0|[1-9][0-9]{{0,8}})")
# The engine looks for these words anywhere in the path of a file.
_WORDS = (*_NEEDED, *_OPTIONAL, "unigram")
_OVERLAP = 100_000  # bytes by which parts of a shard overlap while they are sorted, the indexer's own value
_POINTERS = 2**20  # checked at a time


class Row(NamedTuple):
    """A document to be indexed: its id, its token ids (n,), and what is kept of it beside them."""

    name: str
    ids: NDArray[Any]
    record: bytes | None


class Shard(NamedTuple):
    """The files of one shard, memory-mapped."""

    tokens: NDArray[Any]  # (n,) separators included
    table: NDArray[np.uint8]  # (n, width) the byte at which the suffix of each rank starts
    starts: NDArray[np.int64]  # (n_documents,) the byte at which the separator before each document stands
    first: int  # number of the first document

    def places(self, low: int, high: int) -> Ids:
        """Positions in `tokens` of the suffixes of ranks `[low, high)`, sorted."""
        return np.sort(self.pointers(slice(low, high)) // self.tokens.itemsize)

    def pointers(self, ranks: slice | Ids) -> Ids:
        """The byte at which the suffix of each rank starts."""
        rows = self.table[ranks]
        padded = np.zeros((len(rows), 8), dtype=np.uint8)
        padded[:, : rows.shape[1]] = rows
        return np.asarray(padded.view("<i8")[:, 0], dtype=np.int64)

    def unigrams(self, vocab_size: int) -> Ids:
        """How often each id occurs, shape (vocab_size,); bisection for all ids at once reads little."""
        ids = np.append(np.arange(vocab_size), np.iinfo(self.tokens.dtype).max).astype(self.tokens.dtype)
        keys = np.sort(ids.byteswap())  # suffixes stand in the order of their bytes
        low, high = np.zeros(len(keys), dtype=np.int64), np.full(len(keys), len(self.tokens))
        while (low < high).any():
            middle = np.minimum((low + high) // 2, len(self.tokens) - 1)
            first = self.tokens[self.pointers(middle) // self.tokens.itemsize].byteswap()
            less = (first < keys) & (low < high)
            low, high = np.where(less, middle + 1, low), np.where(less, high, np.minimum(middle, high))
        counts = np.zeros(vocab_size, dtype=np.int64)
        counts[keys[:-1].byteswap()] = np.diff(low)
        return counts

    def documents_at(self, places: Ids) -> Ids:
        """The numbers of the documents at `places`."""
        before = np.searchsorted(self.starts, places * self.tokens.itemsize, side="right")
        return np.asarray(before, dtype=np.int64) - 1

    def document(self, number: int) -> NDArray[Any]:
        """The token ids of the document that is the `number`th of this shard."""
        size = self.tokens.itemsize
        end = self.starts[number + 1] // size if number + 1 < len(self.starts) else len(self.tokens)
        return self.tokens[self.starts[number] // size + 1 : end]


# ---------------------------------------------------------------------- building


def build(
    rows: Iterator[Row],
    path: str | Path,
    vocab_size: int,
    shard_tokens: int,
    jobs: int,
    tokenizer: tuple[Any, str] | None,
) -> Path:
    """Write the index of `rows` to `path`: as a whole, or not at all."""
    shard_tokens = check_integer(shard_tokens, "shard_tokens", at_least=1)
    jobs = check_integer(jobs, "jobs", at_least=1)
    dtype, indexer, target = token_dtype(vocab_size), _indexer(), _check_target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}-{time.time_ns()}.partial")
    partial.mkdir()
    try:
        names: list[str] = []
        with progress(description="Writing and sorting shards", unit=" shards") as bar:
            for number, block in enumerate(_blocks(rows, shard_tokens)):
                names += [row.name for row in block]
                _write_shard(partial, number, block, dtype)
                if dtype.itemsize == 2:
                    _run_indexer(indexer, partial, number, dtype.itemsize, jobs)
                else:  # the indexer asks for 34 GB of memory here, however small the shard
                    _sort(partial, number, dtype)
                bar.update()
        check_documents((Document(name, "") for name in names), origin="documents")
        _write_manifest(partial, names, vocab_size, tokenizer)
        os.replace(partial, target)
        files.sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _blocks(rows: Iterator[Row], shard_tokens: int) -> Iterator[list[Row]]:
    """Rows in blocks of at most `shard_tokens` tokens and separators, or of one row."""
    block: list[Row] = []
    size = 0
    for row in rows:
        if block and size + len(row.ids) + 1 > shard_tokens:
            yield block
            block, size = [], 0
        block.append(row)
        size += len(row.ids) + 1
    if block:
        yield block


def _write_shard(folder: Path, number: int, block: list[Row], dtype: np.dtype[Any]) -> None:
    """Write everything of a shard but its suffix array."""
    starts = np.cumsum([0, *(len(row.ids) + 1 for row in block)], dtype=np.int64)
    stream = np.full(starts[-1], np.iinfo(dtype).max, dtype=dtype)  # separators
    for row, start in zip(block, starts.tolist(), strict=False):
        stream[start + 1 : start + 1 + len(row.ids)] = row.ids
    stream.tofile(folder / f"tokenized.{number}")
    (starts[:-1] * dtype.itemsize).astype("<u8").tofile(folder / f"offset.{number}")
    records = [row.record for row in block if row.record is not None]
    if records:
        (folder / f"metadata.{number}").write_bytes(b"".join(records))
        bytes_before = np.cumsum([0, *map(len, records[:-1])], dtype="<u8")
        bytes_before.tofile(folder / f"metaoff.{number}")


def _run_indexer(indexer: Path, folder: Path, number: int, itemsize: int, jobs: int) -> None:
    """Write the suffix array of a shard of two-byte ids with infini-gram's indexer.

    Its Python module is not used: that hands paths to a shell, changes the folder of the process and
    knows three tokenizers only.
    """
    data = f"tokenized.{number}"
    size = (folder / data).stat().st_size
    common = ["--data-file", data, "--ratio", str(_pointer_width(size)), "--token-width", str(itemsize)]
    parts = max(1, min(jobs, size // (2 * _OVERLAP)))
    step = math.ceil(size / parts / itemsize) * itemsize

    def sort_part(start: int) -> None:
        end = min(start + step + _OVERLAP, size)
        bounds = ["--parts-dir", "parts", "--start-byte", str(start), "--end-byte", str(end)]
        _run(indexer, folder, ["make-part", *common, *bounds])

    for name in ("parts", "merged"):
        (folder / name).mkdir()
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(sort_part, range(0, size, step)))
    merged = ["--merged-dir", "merged", "--num-threads", str(parts)]
    _run(indexer, folder, ["merge", *common, *merged, "--parts-dir", "parts", "--hacksize", str(_OVERLAP)])
    _run(indexer, folder, ["concat", *common, *merged, "--merged-file", f"table.{number}"])
    for name in ("parts", "merged"):
        shutil.rmtree(folder / name)


def _sort(folder: Path, number: int, dtype: np.dtype[Any]) -> None:
    """Write the suffix array of a shard as the indexer would: suffixes in the order of their bytes."""
    tokens = np.fromfile(folder / f"tokenized.{number}", dtype)
    _, order = np.unique(tokens.byteswap(), return_inverse=True)
    pointers = divsufsort(order.astype("<u4")).astype("<i8") * dtype.itemsize
    width = _pointer_width(tokens.nbytes)
    pointers.view(np.uint8).reshape(-1, 8)[:, :width].tofile(folder / f"table.{number}")


def _run(indexer: Path, folder: Path, arguments: list[str]) -> None:
    """Call the indexer inside `folder`: it would take special characters of a longer path for a pattern."""
    done = subprocess.run([indexer, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(
            "infini-gram's indexer has failed.",
            given=f"{arguments[0]} ended with {done.returncode}: {done.stderr[-300:].strip()}",
            expected="a sorted shard",
            mend="check free memory and disk; smaller shards (shard_tokens) need less of both",
        )


def _write_manifest(
    folder: Path, names: list[str], vocab_size: int, tokenizer: tuple[Any, str] | None
) -> None:
    """Put every file onto the disk, then write the manifest that vouches for them."""
    files.write_atomically(folder / IDS, json.dumps(names, ensure_ascii=False))
    if tokenizer is not None:
        tokenizer[0].save_pretrained(str(folder / "tokenizer"))
        load_tokenizer(folder, tokenizer[1])
    content = {
        "magic": MAGIC,
        "version": FORMAT_VERSION,
        "vocab_size": vocab_size,
        "tokenizer_hash": None if tokenizer is None else tokenizer[1],
        "files": files.seal(folder),
    }
    files.write_atomically(folder / _MANIFEST, json.dumps(content, indent=1))


def _check_target(path: str | Path) -> Path:
    target = Path(path).resolve()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    raise ParameterError(
        "The path is taken.",
        given=str(target),
        expected="a new or empty folder",
        mend="choose another path, or move away what is there",
    )


# ---------------------------------------------------------------------- opening


def load_module(module: str) -> ModuleType:
    """A module of infini-gram, which is loaded when it is first needed."""
    try:
        return importlib.import_module(f"infini_gram.{module}")
    except ImportError as error:
        raise EngineError(
            "infini-gram is not installed.",
            given=f"{error} (Python {platform.python_version()}, {sys.platform} {platform.machine()})",
            expected="the package infini-gram; it exists for Python 3.11 to 3.13 on Linux x86-64 and macOS",
            mend="in the book's folder: pip install -e '.[scale]'; or use TraceIndex, which needs no more",
        ) from error


def _indexer() -> Path:
    return Path(str(load_module("engine").__file__)).with_name("rust_indexing")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Two bytes a token where they do, else four; the greatest value is the separator."""
    if vocab_size > 2**32 - 1:
        raise ParameterError(
            "The vocabulary is too large for infini-gram.",
            given=vocab_size,
            expected="ids of at most 32 bits, and one of them free for the separator",
            mend="choose another tokenizer",
        )
    return np.dtype("<u2" if vocab_size <= 2**16 - 1 else "<u4")


def _pointer_width(size: int) -> int:
    """Bytes of a pointer into a file of `size` bytes, as the indexer counts them."""
    return math.ceil(math.log2(size) / 8)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `build` has written; None for an index of infini-gram's own."""
    if not folder.is_dir():
        raise damaged(folder, "no such folder")
    if not (folder / _MANIFEST).exists():
        return None
    content = read_json(folder / _MANIFEST, folder)
    fields = {"vocab_size": int, "files": dict, "tokenizer_hash": str | None}
    if not isinstance(content, dict) or (content.get("magic"), content.get("version")) != (
        MAGIC,
        FORMAT_VERSION,
    ):
        raise damaged(folder, f"{_MANIFEST} is not one of {MAGIC}, version {FORMAT_VERSION}")
    for name, kind in fields.items():
        if name not in content or not isinstance(content[name], kind):
            raise damaged(folder, f"{_MANIFEST} does not say {name}")
    return content


def read_shards(folder: Path, dtype: np.dtype[Any]) -> list[Shard]:
    """The shards of an index in their order, after checking that their files fit together."""
    found = [match for entry in folder.iterdir() if (match := _SHARD_FILE.fullmatch(entry.name))]
    names = {match[0] for match in found}
    kinds = _NEEDED + (_OPTIONAL if any(match[1] in _OPTIONAL for match in found) else ())
    wanted = {f"{kind}.{number}" for kind in kinds for number in range(len({match[2] for match in found}))}
    if not found or names != wanted:
        raise damaged(folder, f"of its shards, these are missing: {sorted(wanted - names) or 'all'}")
    shards: list[Shard] = []
    for number in range(len(wanted) // len(kinds)):
        first = shards[-1].first + len(shards[-1].starts) if shards else 0
        shards.append(_read_shard(folder, number, dtype, first, kinds))
    return shards


def _read_shard(folder: Path, number: int, dtype: np.dtype[Any], first: int, kinds: tuple[str, ...]) -> Shard:
    sizes = {kind: (folder / f"{kind}.{number}").stat().st_size for kind in kinds}
    n_tokens = sizes["tokenized"] // dtype.itemsize
    width = sizes["table"] // max(n_tokens, 1)
    sound = (
        n_tokens > 0
        and sizes["tokenized"] == n_tokens * dtype.itemsize
        and sizes["table"] == n_tokens * width
        and _pointer_width(sizes["tokenized"]) <= width <= 8
        and 0 < sizes["offset"] <= 8 * n_tokens
        and sizes["offset"] % 8 == 0
        and sizes.get("metaoff", sizes["offset"]) == sizes["offset"]
    )
    if not sound:
        raise damaged(folder, f"the sizes of the files of shard {number} do not fit together: {sizes}")
    tokens = np.memmap(folder / f"tokenized.{number}", dtype, mode="r")
    table = np.memmap(folder / f"table.{number}", np.uint8, mode="r", shape=(n_tokens, width))
    starts = np.memmap(folder / f"offset.{number}", "<i8", mode="r")
    if starts[0] != 0 or tokens[0] != np.iinfo(dtype).max:
        raise damaged(folder, f"shard {number} does not begin with a separator of {dtype.itemsize} bytes")
    return Shard(tokens, table, starts, first)


def check_contents(folder: Path, shards: list[Shard], manifest: dict[str, Any] | None) -> None:
    """Read everything: hashes against the manifest, and that nothing points out of its shard."""
    if manifest is not None:
        found = {entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file()}
        if found - {_MANIFEST} != set(manifest["files"]):
            raise damaged(folder, f"its files are not those of {_MANIFEST}")
        for name, entry in manifest["files"].items():
            if not isinstance(entry, dict) or entry.get("sha256") != files.sha256(folder / name):
                raise damaged(folder, f"{name} is not the file that was written")
    for number, shard in enumerate(shards):
        _check_pointers(folder, number, shard)


def _check_pointers(folder: Path, number: int, shard: Shard) -> None:
    """Nothing points out of the shard, or out of the metadata of its documents."""
    if (np.diff(shard.starts) <= 0).any() or (shard.starts >= shard.tokens.nbytes).any():
        raise damaged(folder, f"offset.{number} does not rise within the shard")
    if (shard.starts % shard.tokens.itemsize).any():
        raise damaged(folder, f"offset.{number} points into a token")
    if (folder / f"metaoff.{number}").exists():
        before = np.fromfile(folder / f"metaoff.{number}", "<i8")
        size = (folder / f"metadata.{number}").stat().st_size
        if before[0] != 0 or (np.diff(before) < 0).any() or before[-1] > size:
            raise damaged(folder, f"metaoff.{number} does not rise within metadata.{number}")
    for low in range(0, len(shard.table), _POINTERS):
        pointers = shard.pointers(slice(low, low + _POINTERS))
        outside = (pointers < 0) | (pointers >= shard.tokens.nbytes) | (pointers % shard.tokens.itemsize > 0)
        if outside.any():
            raise damaged(folder, f"table.{number} points outside the shard")


@contextmanager
def linked(folder: Path, n_shards: int) -> Iterator[str]:
    """A folder with links to the files of an index, under names that the engine reads as they are meant.

    It tells kinds of files apart by words anywhere in their path, and takes shard 10 for the one after 1.
    """
    with tempfile.TemporaryDirectory(prefix="engine-") as name:
        if any(word in name for word in _WORDS):
            raise EngineError(
                "infini-gram's engine would confuse its files.",
                given=f"{name}, for temporary files",
                expected=f"a path with none of the words {', '.join(_WORDS)}",
                mend="set TMPDIR to another folder",
            )
        for entry in folder.resolve().iterdir():
            match = _SHARD_FILE.fullmatch(entry.name)
            if match and int(match[2]) < n_shards:
                (Path(name) / f"{match[1]}.{int(match[2]):09d}").symlink_to(entry)
        yield name


def read_json(path: Path, folder: Path) -> Any:
    """A JSON file of an index; `IndexFormatError` where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(folder, f"{path.name} cannot be read: {error}") from error


def damaged(folder: Path, problem: str) -> IndexFormatError:
    """The error for a folder that is no index, or not a whole one."""
    return IndexFormatError(
        "This is not a sound index of infini-gram.",
        given=f"{folder}: {problem}",
        expected="a complete index, of the vocabulary it was made with",
        mend="copy it again, or build it again with InfiniGramIndex.build",
    )
