"""The folder of an index: its files, its manifest, and what is checked on opening.

Layout. An index is a folder of little-endian `.npy` arrays (`suffix_array.CorpusArrays`) that are
memory-mapped, the ids of its documents as JSON, and a manifest that is written last and holds the
size and SHA-256 of every file. An index built from documents also keeps them as JSON Lines, with the
byte at which each starts, and their tokenizer. `index_writing` makes such a folder, and `index_place`
puts it in the place of an older one.

Reading. A folder may come from anywhere. Nothing in it is run or unpickled, no link is followed out of
it, and only plain files are opened; the header of an array is compared with the one that the manifest
promises, and never parsed. Everything of an open index is mapped when it is opened, so a reader keeps
its answers while the folder is replaced; an index that is replaced while it is opened is opened again.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracealign_lib import files
from tracealign_lib.documents import Document
from tracealign_lib.errors import (
    BusyError,
    IndexFormatError,
    ModelError,
)
from tracealign_lib.index_place import is_on_its_way, leftovers
from tracealign_lib.suffix_array import KEY_STEP, CorpusArrays, find_disorder, sample_keys

MAGIC = "TraceIndex"
SHARDED_MAGIC = "TraceIndex of shards"
FORMAT_VERSION = 2

MANIFEST = "manifest.json"
SHARD = re.compile(r"shard-\d{5}")
IDS = "document_ids.json"
TEXTS = "documents.jsonl"
TOKENIZER = "tokenizer"
# The dtypes that each array may have; a file of any other name or dtype is never read.
ARRAYS = {
    "tokens.npy": ("<u2", "<u4"),
    "suffixes.npy": ("<i4", "<i8"),
    "keys.npy": ("<u8",),
    "document_starts.npy": ("<i8",),
    "unigram_counts.npy": ("<i8",),
}
# A search jumps: reading ahead what stands beside each place would take megabytes for every few bytes.
_ADVICE = {"tokens.npy": "MADV_RANDOM", "suffixes.npy": "MADV_RANDOM", "keys.npy": "MADV_WILLNEED"}
_TEXT_ARRAYS = {"document_offsets.npy": ("<i8",)}
TOKENIZER_FILES = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
OPTIONAL_FILES = ("tokenizer/special_tokens_map.json", "tokenizer/chat_template.jinja")
CORE_FILES = (*ARRAYS, IDS)
TEXT_FILES = (TEXTS, *_TEXT_ARRAYS, *TOKENIZER_FILES)
_ALL_FILES = (*CORE_FILES, *TEXT_FILES, *OPTIONAL_FILES)
_REBUILD = "build the index again with TraceIndex.build, into the same path"
# Bytes of a manifest: a hundred thousand shards take nine million, one index some three thousand.
_LONGEST_MANIFEST = {MAGIC: 2**16, SHARDED_MAGIC: 2**24}
_LONGEST_TOKENIZER = 2**28
_REPLACED_AGAIN = 100  # how often an index is read again that is replaced meanwhile

T = TypeVar("T")
Raw = bytes | NDArray[np.uint8]


class Manifest(NamedTuple):
    """What `manifest.json` says, apart from the format itself."""

    vocab_size: int
    n_tokens: int
    n_documents: int
    tokenizer_hash: str | None  # None: built from token ids, without texts
    dtypes: dict[str, str]
    files: dict[str, dict[str, Any]]  # name -> size, sha256


class StoredIndex(NamedTuple):
    """An index on disk: everything but the manifest is memory-mapped."""

    manifest: Manifest
    arrays: CorpusArrays
    names: NDArray[np.uint8]  # the JSON of the document ids
    # the documents as JSON Lines, and the byte at which each starts, (n_documents + 1,)
    texts: tuple[NDArray[np.uint8], NDArray[Any]] | None
    tokenizer: dict[str, NDArray[np.uint8]]  # name -> content of its files, which there may be none of


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of the canonical JSON of a fast tokenizer.

    Truncation and padding are left out: they are settings of the last call, not of the vocabulary.

    Raises
    ------
    ModelError
        The tokenizer has no `backend_tokenizer`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "The tokenizer is not a fast one.",
            given=type(tokenizer).__name__,
            expected="a tokenizer of transformers with a backend_tokenizer (PreTrainedTokenizerFast)",
            mend="load it with AutoTokenizer, or wrap a tokenizers.Tokenizer in PreTrainedTokenizerFast",
        )
    state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    canonical = json.dumps(state, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def damaged(folder: Path, problem: str) -> IndexFormatError:
    """The error to raise when a part of the index in `folder` is not what was built."""
    return IndexFormatError(
        "The index is damaged.", given=f"{folder}: {problem}", expected="the files as built", mend=_REBUILD
    )


def unreplaced(folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of the index in `folder`, all of it from one index even while builds replace it.

    Raises
    ------
    IndexFormatError
        As `read` does, or the folder cannot be read.
    BusyError
        Builds replace the index faster than it can be read.
    """
    problem: Exception = BusyError(
        "The index is replaced while it is being opened, again and again.",
        given=str(folder),
        expected="an index that stands still for as long as it takes to open it",
        mend="open it again, or let the builds write into another path",
    )
    for _ in range(_REPLACED_AGAIN):
        before = _identity(folder)
        try:
            found = read()
        except (IndexFormatError, OSError, MemoryError) as error:
            problem = error if isinstance(error, IndexFormatError) else damaged(folder, repr(error))
            if _identity(folder) == before and not (before is None and is_on_its_way(folder)):
                break
        else:
            if _identity(folder) == before:
                return found
        time.sleep(0.01)
    raise problem


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What tells the folder at a path from one that replaces it; None if nothing can be told."""
    try:
        status = folder.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def read_index(folder: Path, *, full: bool) -> StoredIndex:
    """Map an index after checking its manifest, file sizes, dtypes, shapes and short arrays.

    With `full`, also hash every file again, and check that the suffix array is one.

    Raises
    ------
    IndexFormatError
        The folder is missing, set aside, foreign, of another version, or damaged.
    """
    manifest = read_manifest(folder)
    arrays = _load_arrays(folder, manifest)
    names, texts = _map_bytes(folder, IDS), _load_texts(folder, manifest)
    stored = StoredIndex(manifest, arrays, names, texts, map_tokenizer(folder, manifest))
    if full:
        check_spelling(folder)
        _check_hashes(folder, manifest)
        _check_order(folder, arrays, manifest.vocab_size)
    return stored


def parse_names(raw: Raw, n_documents: int, folder: Path) -> tuple[str, ...]:
    """The document ids from their JSON."""
    names = _parse(raw, folder, IDS)
    sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not sound or len(names) != n_documents:
        raise damaged(folder, f"{IDS} is not a list of {n_documents} ids")
    if len(set(names)) != n_documents:
        raise damaged(folder, f"{IDS} has duplicates")
    return tuple(names)


def parse_document(raw: Raw, number: int, document_id: str, folder: Path) -> Document:
    """The document from its record, which must be the one of `document_id`."""
    record = _parse(raw, folder, f"{TEXTS}, record {number}")
    fields = {"id": str, "text": str, "meta": dict}
    sound = isinstance(record, dict) and all(isinstance(record.get(f), t) for f, t in fields.items())
    if not sound or record["id"] != document_id:
        raise damaged(folder, f"{TEXTS}, record {number} is not document {document_id!r}")
    return Document(id=record["id"], text=record["text"], meta=record["meta"])


def check_places(places: NDArray[np.int64], n_stream: int, folder: Path) -> None:
    """Refuse positions (k,) that are not those of a token in a stream of `n_stream` with separators."""
    if len(places) and (places.min() < 0 or places.max() >= n_stream - 1):
        raise damaged(folder, "suffixes.npy points outside the corpus")


def check_ids_of(tokens: NDArray[Any], most: int, folder: Path) -> None:
    """Refuse stored token ids (k,) that are greater than `most`."""
    if len(tokens) and tokens.max() > most:
        raise damaged(folder, "tokens.npy holds ids outside the vocabulary")


def check_ranks(low: ArrayLike, high: ArrayLike, folder: Path) -> None:
    """Refuse intervals of ranks `[low, high)` that end before they begin: no sorted array has them."""
    if np.less(high, low).any():
        raise damaged(folder, "suffixes.npy is not sorted")


def map_tokenizer(folder: Path, manifest: Manifest) -> dict[str, NDArray[np.uint8]]:
    """Name and content of the tokenizer's files, for `parse_tokenizer`."""
    names = [name for name in (*TOKENIZER_FILES, *OPTIONAL_FILES) if name in manifest.files]
    for name in names:
        if manifest.files[name]["size"] > _LONGEST_TOKENIZER:
            raise damaged(folder, f"{name} has more than {_LONGEST_TOKENIZER:,} bytes")
    return {name: _map_bytes(folder, name) for name in names}


def parse_tokenizer(stored: dict[str, NDArray[np.uint8]], fingerprint: str, folder: Path) -> Any:
    """The tokenizer that `map_tokenizer` has mapped, after comparing it with its hash."""
    # transformers reads folders only; of a copy, it finds no file that the manifest does not list
    with tempfile.TemporaryDirectory(prefix="tracealign-") as copy:
        (Path(copy) / TOKENIZER).mkdir()
        for name, content in stored.items():
            (Path(copy) / name).write_bytes(content.tobytes())
        tokenizer = load_tokenizer(Path(copy), fingerprint, shown=folder)
    tokenizer.name_or_path = str(folder / TOKENIZER)
    return tokenizer


def load_tokenizer(folder: Path, fingerprint: str, *, shown: Path | None = None) -> Any:
    """The tokenizer of the index in `folder`, after comparing it with its hash; errors name `shown`."""
    shown = shown or folder
    try:
        tokenizer = open_tokenizer(folder / TOKENIZER)
        found = hash_tokenizer(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # tokenizers raises bare Exception for a malformed file, and a PanicException that is none
        raise damaged(shown, f"the tokenizer cannot be loaded: {error}") from error
    if found != fingerprint:
        raise damaged(shown, f"its tokenizer has hash {found}, the manifest {fingerprint}")
    return tokenizer


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer that was saved in a folder."""
    from transformers import PreTrainedTokenizerFast  # slow to import, and not needed to match ids

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _parse(raw: Raw, folder: Path, what: str) -> Any:
    try:
        return json.loads(bytes(raw))
    except (ValueError, RecursionError) as error:
        raise damaged(folder, f"{what} is not JSON: {error}") from error
    except MemoryError as error:
        raise damaged(folder, f"{what} does not fit into memory") from error


def _absent(folder: Path) -> IndexFormatError:
    """The error for a folder without a manifest, which a killed build may have set aside."""
    place = folder.resolve()
    aside = [
        path
        for path, *_ in leftovers(place)
        if path.suffix == ".old" and magic_of(path) in (MAGIC, SHARDED_MAGIC)
    ]
    if aside and not place.exists():
        return IndexFormatError(
            "A build was stopped while it replaced this index.",
            given=f"{folder}: no such folder, but the older index is whole in {aside[0]}",
            expected="an index that no build is replacing",
            mend=f"rename {aside[0].name} to {place.name}, or build the index again, into the same path",
        )
    return IndexFormatError(
        "There is no index here.",
        given=f"{folder}: {'no ' + MANIFEST if folder.is_dir() else 'no such folder'}",
        expected="a folder made by TraceIndex.build",
        mend="check the path, or build the index",
    )


def magic_of(folder: Path) -> object:
    """The kind of index in a folder, as its manifest tells; None where it has none."""
    try:
        content = json.loads(_read_plain(folder, MANIFEST, max(_LONGEST_MANIFEST.values())))
    except (IndexFormatError, OSError, ValueError, RecursionError):
        return None
    return content.get("magic") if isinstance(content, dict) else None


def read_content(folder: Path, magic: str) -> dict[str, Any]:
    """What the manifest of a folder holds beside its `magic`."""
    if not os.path.lexists(folder / MANIFEST):
        raise _absent(folder)
    content = _parse(_read_plain(folder, MANIFEST, _LONGEST_MANIFEST[magic]), folder, MANIFEST)
    found = content.pop("magic", None) if isinstance(content, dict) else None
    if found != magic:
        known = f"an index of another kind: {found}" if found in (MAGIC, SHARDED_MAGIC) else "something else"
        raise IndexFormatError(
            f"The folder is not a {magic}.",
            given=f"{folder}: {MANIFEST} of {known}",
            expected=f'"magic": "{magic}"',
            mend="open it with open_index"
            if found in (MAGIC, SHARDED_MAGIC)
            else "check the path; the folder belongs to another program",
        )
    return dict(content)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index, after checking it and the sizes of the files."""
    content = read_content(folder, MAGIC)
    version, order = content.pop("version", None), content.pop("byte_order", None)
    if version != FORMAT_VERSION or isinstance(version, bool) or order != "little":
        raise IndexFormatError(
            "The index has another format.",
            given=f"{folder}: version {version!r}, byte order {order!r}",
            expected=f"version {FORMAT_VERSION}, byte order 'little'",
            mend=_REBUILD,
        )
    manifest = _check_manifest(content, folder)
    _check_files(folder, manifest)
    return manifest


def _check_manifest(content: dict[str, Any], folder: Path) -> Manifest:
    """The manifest's fields, after checking that they are all there and of the right type."""
    if set(content) != set(Manifest._fields):
        raise damaged(folder, f"{MANIFEST} has fields {sorted(content)}")
    manifest = Manifest(**content)
    bounds = {"vocab_size": (1, 2**32), "n_tokens": (0, 2**62), "n_documents": (1, 2**62)}
    for field, (least, end) in bounds.items():
        if type(content[field]) is not int or not least <= content[field] < end:
            raise damaged(folder, f"{MANIFEST}: {field} is {content[field]!r}")
    fingerprint = manifest.tokenizer_hash
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise damaged(folder, f"{MANIFEST}: tokenizer_hash is {fingerprint!r}")
    dtypes = ARRAYS if fingerprint is None else {**ARRAYS, **_TEXT_ARRAYS}
    given = manifest.dtypes
    if not isinstance(given, dict) or set(given) != set(dtypes):
        raise damaged(folder, f"{MANIFEST}: dtypes is {given!r}")
    for name, allowed in dtypes.items():
        if given[name] not in allowed:
            raise damaged(folder, f"{MANIFEST}: {name} has dtype {given[name]!r}, not one of {allowed}")
    required = {*CORE_FILES} if fingerprint is None else {*CORE_FILES, *TEXT_FILES}
    optional = () if fingerprint is None else OPTIONAL_FILES
    if not isinstance(manifest.files, dict) or not required <= set(manifest.files) <= required.union(
        optional
    ):
        raise damaged(folder, f"{MANIFEST}: files are not {sorted(required)}")
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name in _ALL_FILES:
        if name not in manifest.files:
            continue
        entry = manifest.files[name]
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise damaged(folder, f"{MANIFEST}: the entry of {name} is {entry!r}")
        size = _plain_size(folder, name)
        if size != entry["size"]:
            raise damaged(folder, f"{name} has {size} bytes, not {entry['size']}")


def check_own(place: Path) -> os.stat_result:
    """The status of a part of an index, which must be there and must not be a link."""
    try:
        status = place.lstat()
    except OSError as error:
        raise damaged(place.parent, f"{place.name} is missing") from error
    if stat.S_ISLNK(status.st_mode):
        raise IndexFormatError(
            "The index holds a link.",
            given=f"{place} points to {place.readlink()}",
            expected="files and folders of its own",
            mend="copy the index with what its links point to (cp -rL), if you trust where they lead",
        )
    return status


def _plain_size(folder: Path, name: str) -> int:
    """Bytes of a file of an index, which must be a plain file in a folder of the index."""
    if (folder / name).parent != folder:
        check_own((folder / name).parent)
    status = check_own(folder / name)
    if not stat.S_ISREG(status.st_mode):
        raise damaged(folder, f"{name} is not a file")
    return status.st_size


def _read_plain(folder: Path, name: str, most: int) -> bytes:
    size = _plain_size(folder, name)
    if size > most:
        raise damaged(folder, f"{name} has {size:,} bytes, more than {most:,}")
    return (folder / name).read_bytes()


def check_spelling(folder: Path) -> None:
    """Refuse a manifest that says the same as the one that was built, but not in the same bytes."""
    raw = _read_plain(folder, MANIFEST, max(_LONGEST_MANIFEST.values()))
    if raw != _spell_manifest(_parse(raw, folder, MANIFEST)).encode():
        raise damaged(folder, f"{MANIFEST} is not spelled as it was built")


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of an index, or of an index of shards, as a whole or not at all."""
    files.write_atomically(folder / MANIFEST, _spell_manifest(content))


def _spell_manifest(content: Any) -> str:
    return json.dumps(content, indent=2)


def _check_hashes(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        if files.sha256(folder / name) != entry["sha256"]:
            raise damaged(folder, f"{name} does not have the SHA-256 that it was built with")


def _load_array(folder: Path, name: str, manifest: Manifest, length: int) -> NDArray[Any]:
    raw, dtype = _map_bytes(folder, name, _ADVICE.get(name)), np.dtype(manifest.dtypes[name])
    header = npy_header(dtype.str, length)
    if raw[: len(header)].tobytes() != header or len(raw) - len(header) != length * dtype.itemsize:
        raise damaged(folder, f"{name} is not a .npy array of shape ({length},) and dtype {dtype.str}")
    return raw[len(header) :].view(dtype)


def npy_header(dtype: str, length: int) -> bytes:
    """How numpy begins the file of a one-dimensional array (`.npy`, version 1.0)."""
    described = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({length},), }}"
    return b"\x93NUMPY\x01\x00v\x00" + described.ljust(117).encode() + b"\n"


def _load_arrays(folder: Path, manifest: Manifest) -> CorpusArrays:
    """Map the arrays after checking shapes and the bounds of those that are short."""
    lengths = (
        manifest.n_tokens + manifest.n_documents,
        manifest.n_tokens,
        -(-manifest.n_tokens // KEY_STEP),
        manifest.n_documents + 1,
        manifest.vocab_size,
    )
    loaded = (_load_array(folder, name, manifest, n) for name, n in zip(ARRAYS, lengths, strict=True))
    arrays = CorpusArrays(*loaded)
    starts = arrays.starts
    if starts[0] != 0 or starts[-1] != len(arrays.tokens) or (starts[1:] <= starts[:-1]).any():
        raise damaged(folder, "document_starts.npy does not divide the corpus into documents")
    if arrays.tokens[-1] != manifest.vocab_size:
        raise damaged(folder, "tokens.npy does not end with a separator")
    # neither count may be so great that their sum overflows
    within = arrays.unigrams.min() >= 0 and arrays.unigrams.max() <= manifest.n_tokens
    if not within or arrays.unigrams.sum() != manifest.n_tokens:
        raise damaged(folder, "unigram_counts.npy does not sum to the number of tokens")
    return arrays


def _load_texts(folder: Path, manifest: Manifest) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
    """Map the documents and the byte at which each starts; None when there are no texts."""
    if manifest.tokenizer_hash is None:
        return None
    offsets = _load_array(folder, "document_offsets.npy", manifest, manifest.n_documents + 1)
    size = manifest.files[TEXTS]["size"]
    if offsets[0] != 0 or offsets[-1] != size or (offsets[1:] <= offsets[:-1]).any():
        raise damaged(folder, "document_offsets.npy does not divide the documents")
    return _map_bytes(folder, TEXTS), offsets


def _map_bytes(folder: Path, name: str, advice: str | None = None) -> NDArray[np.uint8]:
    try:
        mapped = np.memmap(folder / name, dtype=np.uint8, mode="r")
        if advice is not None and hasattr(mmap, advice):  # not every system takes advice
            cast(mmap.mmap, mapped.base).madvise(getattr(mmap, advice))
        return np.asarray(mapped)
    except (OSError, ValueError) as error:
        raise damaged(folder, f"{name} cannot be read: {error}") from error


def _check_order(folder: Path, arrays: CorpusArrays, vocab_size: int) -> None:
    """Check in linear time that the arrays are what `sort_corpus` makes of some corpus."""
    tokens, suffixes, keys, starts, unigrams = arrays
    check_ids_of(tokens, vocab_size, folder)
    if not np.array_equal(np.flatnonzero(tokens >= vocab_size), starts[1:] - 1):
        raise damaged(folder, "tokens.npy and document_starts.npy disagree about the documents")
    if not np.array_equal(np.bincount(tokens, minlength=vocab_size)[:vocab_size], unigrams):
        raise damaged(folder, "unigram_counts.npy does not count tokens.npy")
    disorder = find_disorder(tokens, suffixes, vocab_size)
    if disorder is not None:
        raise damaged(folder, f"suffixes.npy {disorder}")
    if not np.array_equal(sample_keys(tokens, suffixes), keys):
        raise damaged(folder, "keys.npy does not sample suffixes.npy")
