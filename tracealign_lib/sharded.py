"""An index of several shards, each a whole TraceIndex, for corpora that are larger than memory.

Documents stream in. As soon as enough of them for one shard have come, they are indexed and let go of, so
memory is bounded by the shard and not by the corpus. A build that is stopped keeps the shards that it has
finished, and goes on behind them when it is started again with the same documents.

A question goes to every shard, and the answers are put together: counts are added, the longest match is
the longest of any shard, documents are numbered through. Who asks the shards is a `Shards`: this process
(`LocalShards`), or actors of a Ray cluster (`tracealign_lib.ray_shards`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracealign_lib import files, index_format, index_place, index_writing
from tracealign_lib.documents import Document
from tracealign_lib.engine import Engine, laplace_surprisal, unknown_document
from tracealign_lib.errors import CorpusError, IndexFormatError
from tracealign_lib.index import Ids, Occurrence, Span, TraceIndex, hash_tokenizer
from tracealign_lib.index_format import MANIFEST, SHARDED_MAGIC, damaged
from tracealign_lib.progress import progress
from tracealign_lib.queries import check_ids, check_integer

FORMAT_VERSION = 1
SHARD_BYTES = 200_000_000
"""Bytes of text in a shard unless told otherwise: some 50 million tokens, built in about a gigabyte."""

_PLAN = "plan.json"
_FIELDS = {"version", "vocab_size", "tokenizer_hash", "shards"}


class Shard:
    """What a `ShardedIndex` asks of a shard; arguments and answers travel well between processes."""

    def __init__(self, path: str | Path, verify: str = "manifest") -> None:
        self.index = TraceIndex.open(path, verify=verify)

    def sizes(self) -> tuple[int, int]:
        """Tokens and documents."""
        return self.index.n_tokens, self.index.n_documents

    def unigrams(self) -> Ids:
        """How often each id occurs, shape (vocab_size,)."""
        return np.asarray(self.index.arrays.unigrams, dtype=np.int64)

    def counts(self, query: Ids, bounds: Ids) -> Ids:
        """How often each `query[start:end]` of `bounds` (k, 2) occurs, shape (k,)."""
        return self.index.counts(query, bounds)

    def matches(self, query: Ids) -> Ids:
        """Length of the longest match that starts at each token, shape (n,)."""
        return self.index.matches(query)

    def locate(self, query: Ids, limit: int) -> list[Occurrence]:
        """The first `limit` occurrences."""
        return self.index.locate(query, limit=limit)

    def following(self, query: Ids) -> Ids:
        """How often each id follows `query`, shape (vocab_size,)."""
        if len(query) == 0:
            return self.unigrams()
        counts = np.zeros(self.index.vocab_size, dtype=np.int64)
        if self.index.count(query):
            tokens, found = self.index.continuations(query)
            counts[tokens] = found
        return counts

    def windows(self, query: Ids, length: int) -> list[tuple[int, Ids]]:
        """Number of each document that holds windows of `length` query tokens, and where they start."""
        return self.index.windows(query, length)

    def document_ids(self) -> tuple[str, ...]:
        """The ids of its documents."""
        return self.index.document_ids

    def document(self, document_id: str) -> tuple[Document | None, Ids] | None:
        """A document, where texts are stored, and its tokens; None if it is not in this shard."""
        if document_id not in self.index:
            return None
        stored = None if self.index.tokenizer_hash is None else self.index.document(document_id)
        return stored, self.index.document_tokens(document_id)


class Shards(Protocol):
    """Asks every shard the same question."""

    def __len__(self) -> int: ...

    def ask(self, question: str, *arguments: Any) -> list[Any]:
        """`getattr(shard, question)(*arguments)` of each `Shard`, in order."""


class LocalShards:
    """Shards that this process has opened."""

    def __init__(self, paths: Sequence[Path], verify: str = "manifest") -> None:
        self._shards = [Shard(path, verify) for path in paths]

    def __len__(self) -> int:
        return len(self._shards)

    def ask(self, question: str, *arguments: Any) -> list[Any]:
        """The answer of each shard, in order."""
        return [getattr(shard, question)(*arguments) for shard in self._shards]


class ShardedIndex(Engine):
    """An index of several shards. Its calls and answers are those of one `TraceIndex` of all documents.

    Make one with `ShardedIndex.build` or `ShardedIndex.open`.

    Attributes
    ----------
    path:
        The folder of the index.
    n_shards:
        How many shards it has; `vocab_size`, `n_tokens`, `n_documents` and `tokenizer_hash` are as for
        `TraceIndex`.
    """

    def __init__(self, path: Path, manifest: Manifest, shards: Shards) -> None:
        self.path, self._shards = path, shards
        self.vocab_size = manifest.vocab_size
        self.tokenizer_hash = manifest.tokenizer_hash
        first = path / "shard-00000"
        self._stored_tokenizer = index_format.map_tokenizer(first, index_format.read_manifest(first))
        sizes = shards.ask("sizes")
        self.n_tokens, self.n_documents = (sum(column) for column in zip(*sizes, strict=True))
        self._firsts = [0, *accumulate(n for _, n in sizes)]  # number of each shard's first document
        self.n_shards = len(shards)

    def __repr__(self) -> str:
        return (
            f"ShardedIndex({str(self.path)!r}: {self.n_shards} shards, {self.n_tokens:,} tokens, "
            f"{self.n_documents:,} documents, vocabulary {self.vocab_size:,})"
        )

    # ------------------------------------------------------------------ making and opening

    @classmethod
    def build(
        cls,
        documents: Iterable[Document],
        tokenizer: Any,
        path: str | Path,
        *,
        shard_bytes: int = SHARD_BYTES,
        total: int | None = None,
        workers: Workers | None = None,
    ) -> Self:
        """Index a stream of documents, of which no more than a shard is held at a time.

        A build that was stopped, by an error, Ctrl-C or `kill`, is taken up again by the same call: the
        documents of finished shards are read once more, compared with what was stored, and passed over.
        If they differ, the build goes on from the first shard that does.

        Parameters
        ----------
        documents:
            At least one, with unique ids. The iterable is read once.
        tokenizer, path:
            As for `TraceIndex.build`.
        shard_bytes:
            Text of one shard at the most, in bytes of UTF-8; a longer document is a shard of its own.
        total:
            Number of documents, if it is known: the progress bar then tells the time left.
        workers:
            Build shards elsewhere, several at a time; in this process, one by one, by default.

        Raises
        ------
        CorpusError, ModelError, ParameterError, BusyError, StorageError
            As for `TraceIndex.build`. Shards that were finished before a disk was full are kept.
        """
        shard_bytes = check_integer(shard_bytes, "shard_bytes")
        fingerprint = hash_tokenizer(tokenizer)
        with index_writing.building(path) as target:
            index_place.clear_leftovers(target)
            with index_writing.writing(target):
                half = _resume(target, {"tokenizer_hash": fingerprint, "shard_bytes": shard_bytes})
            batches = _batches(documents, shard_bytes)
            n_shards = _build_shards(half, batches, tokenizer, total=total, workers=workers or Here())
            with index_writing.writing(target):
                _write_manifest(half, n_shards, fingerprint)
                (half / _PLAN).unlink()
                index_place.put_in_place(half, target)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, *, verify: str = "manifest", shards: OpenShards | None = None) -> Self:
        """Open an index of shards.

        Parameters
        ----------
        verify:
            As for `TraceIndex.open`, for each shard.
        shards:
            Opens the shards in these folders; `LocalShards` by default.

        Raises
        ------
        IndexFormatError
            The folder is missing, foreign, of another version, or damaged.
        BusyError
            Builds replace the index faster than it can be opened.
        """
        folder = Path(path)
        return index_format.unreplaced(folder, lambda: cls._open(folder, verify, shards or LocalShards))

    @classmethod
    def _open(cls, folder: Path, verify: str, shards: OpenShards) -> Self:
        manifest = _read_manifest(folder)
        places = [folder / name for name in manifest.shards]
        index = cls(folder, manifest, shards(places, verify))
        if verify == "full":
            index_format.check_spelling(folder)
            _check_unique(index, folder)
        return index

    @cached_property
    def tokenizer(self) -> Any:
        """The stored tokenizer; parsed when it is first asked for."""
        assert self.tokenizer_hash is not None
        return index_format.parse_tokenizer(self._stored_tokenizer, self.tokenizer_hash, self.path)

    # ------------------------------------------------------------------ documents

    @cached_property
    def document_ids(self) -> tuple[str, ...]:
        """The ids of all documents, in corpus order."""
        return tuple(name for names in self._shards.ask("document_ids") for name in names)

    def document(self, document_id: str) -> Document:
        """The stored document; `ParameterError` for an unknown id."""
        stored: Document = self._find(document_id)[0]
        return stored

    def document_tokens(self, document_id: str) -> Ids:
        """The token ids of a document, shape (n,); `ParameterError` for an unknown id."""
        tokens: Ids = self._find(document_id)[1]
        return tokens

    def _find(self, document_id: str) -> Any:
        found = next((answer for answer in self._shards.ask("document", document_id) if answer), None)
        if found is None:
            raise unknown_document(document_id, self.document_ids)
        return found

    # ------------------------------------------------------------------ queries

    def count(self, ids: ArrayLike) -> int:
        """How often `ids` occur, within one document each time; see `TraceIndex.count`."""
        query = check_ids(ids, self.vocab_size, "query")
        return int(self._counts(query, np.array([[0, len(query)]]))[0])

    def _counts(self, query: Ids, bounds: Ids) -> Ids:
        return np.asarray(np.sum(self._shards.ask("counts", query, bounds), axis=0))

    def matches(self, ids: ArrayLike) -> Ids:
        """Length of the longest match that starts at each token of `ids`, shape (n,)."""
        query = check_ids(ids, self.vocab_size, "query")
        return np.asarray(np.max(self._shards.ask("matches", query), axis=0))

    def spans(self, ids: ArrayLike, *, min_length: int = 1, max_count: int | None = None) -> list[Span]:
        """The maximal matching spans of a query, from left to right; see `TraceIndex.spans`."""
        query = check_ids(ids, self.vocab_size, "query")
        min_length = check_integer(min_length, "min_length")
        most = self.n_tokens if max_count is None else check_integer(max_count, "max_count")
        ends = np.arange(len(query)) + self.matches(query)
        # a longest match that ends where an earlier one ends lies inside it
        starts = np.flatnonzero(np.diff(np.maximum.accumulate(ends), prepend=0))
        bounds = np.stack([starts, ends[starts]], axis=1)
        bounds = bounds[bounds[:, 1] - bounds[:, 0] >= min_length]
        if len(bounds) == 0:
            return []
        found = zip(bounds.tolist(), self._counts(query, bounds).tolist(), strict=True)
        return [Span(start, end, count) for (start, end), count in found if count <= most]

    def locate(self, ids: ArrayLike, *, limit: int | None = 10) -> list[Occurrence]:
        """The first `limit` occurrences of `ids` in corpus order; all of them when `limit` is None."""
        query = check_ids(ids, self.vocab_size, "query")
        limit = self.n_tokens + 1 if limit is None else check_integer(limit, "limit")
        return [place for places in self._shards.ask("locate", query, limit) for place in places][:limit]

    def continuations(self, ids: ArrayLike) -> tuple[Ids, Ids]:
        """What follows the longest suffix of `ids` that any shard holds; see `TraceIndex.continuations`."""
        query = check_ids(ids, self.vocab_size, "query")
        reaches = np.arange(len(query)) + self.matches(query)
        start = int(np.argmax(np.append(reaches, len(query)) == len(query)))
        counts = np.sum(self._shards.ask("following", query[start:]), axis=0)
        tokens = np.flatnonzero(counts)
        order = np.argsort(-counts[tokens], kind="stable")
        return tokens[order], counts[tokens[order]]

    @cached_property
    def surprisal(self) -> NDArray[np.float64]:
        """`-log p(t)` of each id over all shards, shape (vocab_size,), in nats."""
        counts = np.sum(self._shards.ask("unigrams"), axis=0)
        return laplace_surprisal(counts, self.n_tokens, self.vocab_size)

    # ------------------------------------------------------------------ parts of queries

    def _holders(self, query: Ids, length: int) -> Iterable[tuple[int, Ids]]:
        answers = zip(self._firsts, self._shards.ask("windows", query, length), strict=False)
        return [(first + number, starts) for first, held in answers for number, starts in held]

    def _name(self, number: int) -> str:
        return self.document_ids[number]


class Manifest(NamedTuple):
    """What `manifest.json` says, apart from the format itself."""

    vocab_size: int
    tokenizer_hash: str
    shards: dict[str, str]  # name -> SHA-256 of its own manifest


OpenShards = Callable[[Sequence[Path], str], Shards]


# ---------------------------------------------------------------------- building


def _build_shard(documents: list[Document], tokenizer: Any, path: Path) -> None:
    TraceIndex.build(documents, tokenizer, path)


def _build_shards(
    half: Path, batches: Iterable[list[Document]], tokenizer: Any, *, total: int | None, workers: Workers
) -> int:
    """Build the shards in `half` that are not there yet; returns how many there are in all."""
    names, queue = _Names(), _Queue(workers)
    with progress(description="Indexing documents", total=total, unit=" documents") as bar:
        for number, batch in enumerate(batches):
            names.add([document.id for document in batch])
            place = half / f"shard-{number:05d}"
            if not _holds(place, batch):
                _drop_from(place)
                queue.submit(_build_shard, batch, tokenizer, place)
            bar.update(len(batch))
        queue.finish()
    if not names.seen:
        raise CorpusError(
            "There is nothing to index.",
            given="no document",
            expected="at least one document",
            mend="check where the documents come from",
        )
    return len(names.batches)


class Promise(Protocol):
    """Work that was begun."""

    def result(self) -> Any:
        """Wait for it; raises what it raised."""


class Workers(Protocol):
    """Does work elsewhere, `in_flight` pieces of it at the same time."""

    in_flight: int

    def submit(self, work: Callable[..., None], /, *arguments: Any) -> Promise:
        """Begin `work(*arguments)`."""


class Here:
    """The workers that do their work at once, in this process."""

    in_flight = 1

    def submit(self, work: Callable[..., None], /, *arguments: Any) -> Promise:
        """Do it."""
        work(*arguments)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _Queue:
    """Holds no more pieces of work open than the workers take."""

    def __init__(self, workers: Workers) -> None:
        self._workers, self._open = workers, deque[Promise]()

    def submit(self, work: Callable[..., None], /, *arguments: Any) -> None:
        if len(self._open) >= self._workers.in_flight:
            self._open.popleft().result()
        self._open.append(self._workers.submit(work, *arguments))

    def finish(self) -> None:
        while self._open:
            self._open.popleft().result()


def _batches(documents: Iterable[Document], most: int) -> Iterator[list[Document]]:
    """Consecutive documents of `most` bytes of text together, or one that is longer alone."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        length = len(document.text.encode("utf-8", "surrogatepass")) if isinstance(document.text, str) else 0
        if batch and size + length > most:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += length
    if batch:
        yield batch


def _resume(target: Path, plan: dict[str, Any]) -> Path:
    """The folder in which `target` is being built, with the shards of an earlier attempt at the same plan."""
    half = target.with_name(f".{target.name}.building")
    plan = {"version": FORMAT_VERSION, "index_version": index_format.FORMAT_VERSION, **plan}
    try:
        same = json.loads((half / _PLAN).read_bytes()) == plan
    except (OSError, ValueError, RecursionError):
        same = False
    if not same:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        files.write_atomically(half / _PLAN, json.dumps(plan))
    return half


def _drop_from(first: Path) -> None:
    """Delete what an earlier attempt left from this shard on, half-deleted shards too: nothing there fits."""
    for shard in first.parent.glob("shard-*"):
        if shard.name >= first.name:
            shutil.rmtree(shard)


def _holds(path: Path, batch: list[Document]) -> bool:
    digest = hashlib.sha256()
    for document in batch:
        digest.update(index_writing.encode_record(document))
    try:
        return bool(
            index_format.read_manifest(path).files[index_format.TEXTS]["sha256"] == digest.hexdigest()
        )
    except IndexFormatError:
        return False


class _Names:
    """Refuses a document id that an earlier shard holds; keeps eight bytes for each id."""

    def __init__(self) -> None:
        self.batches: list[Ids] = []

    @property
    def seen(self) -> bool:
        """Whether there was any document."""
        return bool(self.batches)

    def add(self, names: list[str]) -> None:
        """Remember the ids of one more shard."""
        hashes = np.array([_hash(name) for name in names], dtype=np.int64)
        for earlier in self.batches:
            same = np.flatnonzero(np.isin(hashes, earlier))
            if same.size:
                raise CorpusError(
                    "Two documents have the same id.",
                    given=repr(names[same[0]]),
                    expected="unique ids",
                    mend="number the documents, or take the name of the file into the id",
                )
        self.batches.append(hashes)


def _hash(name: str) -> int:
    raw = hashlib.blake2b(str(name).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "little", signed=True)


def _write_manifest(folder: Path, n_shards: int, fingerprint: str) -> None:
    names = [f"shard-{number:05d}" for number in range(n_shards)]
    for extra in folder.iterdir():  # of an earlier attempt with more documents, which may have been killed
        if extra.name not in (*names, _PLAN):
            shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    content = {
        "magic": SHARDED_MAGIC,
        "version": FORMAT_VERSION,
        "vocab_size": index_format.read_manifest(folder / names[0]).vocab_size,
        "tokenizer_hash": fingerprint,
        "shards": {name: files.sha256(folder / name / MANIFEST) for name in names},
    }
    index_format.write_manifest(folder, content)


# ---------------------------------------------------------------------- opening


def _read_manifest(folder: Path) -> Manifest:
    content = index_format.read_content(folder, SHARDED_MAGIC)
    if set(content) != _FIELDS or content["version"] != FORMAT_VERSION:
        raise damaged(folder, f"{MANIFEST} has version {content.get('version')!r}, fields {sorted(content)}")
    del content["version"]
    manifest = Manifest(**content)
    if not isinstance(manifest.tokenizer_hash, str):
        raise damaged(folder, f"{MANIFEST}: tokenizer_hash is {manifest.tokenizer_hash!r:.80}")
    found = list(manifest.shards) if isinstance(manifest.shards, dict) else []
    if not found or found != [f"shard-{number:05d}" for number in range(len(found))]:
        raise damaged(folder, f"{MANIFEST} names the shards {manifest.shards!r:.80}")
    if any(place.name not in manifest.shards for place in folder.glob("shard-*")):
        raise damaged(folder, f"{MANIFEST} does not name all shards that are there")
    for name, digest in manifest.shards.items():
        _check_shard(folder, name, digest, manifest)
    return manifest


def _check_shard(folder: Path, name: str, digest: str, manifest: Manifest) -> None:
    index_format.check_own(folder / name)
    found = index_format.read_manifest(folder / name)
    if files.sha256(folder / name / MANIFEST) != digest:
        raise damaged(folder, f"the manifest of {name} does not have the SHA-256 that it was built with")
    if (found.vocab_size, found.tokenizer_hash) != (manifest.vocab_size, manifest.tokenizer_hash):
        raise damaged(folder, f"{name} has another vocabulary")


def _check_unique(index: ShardedIndex, folder: Path) -> None:
    if len(set(index.document_ids)) != index.n_documents:
        raise damaged(folder, "two shards hold documents of the same id")


AnyIndex = TraceIndex | ShardedIndex
"""An index in a folder of this machine."""


def open_index(path: str | Path, *, verify: str = "manifest") -> AnyIndex:
    """Open whatever kind of index is in a folder; see `TraceIndex.open` and `ShardedIndex.open`."""
    folder = Path(path)

    def read() -> AnyIndex:
        kind = ShardedIndex if index_format.magic_of(folder) == SHARDED_MAGIC else TraceIndex
        return kind.open(folder, verify=verify)

    return index_format.unreplaced(folder, read)
