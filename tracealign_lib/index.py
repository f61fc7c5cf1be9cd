"""TraceIndex: exact matching of token spans against a training corpus.

A suffix array lists every position of the corpus in the order of the text that starts there, so all
occurrences of a span stand side by side, and a binary search finds them: `O(k log N)` token
comparisons for a span of `k` tokens in a corpus of `N`. From that one operation follow exact counts,
the maximal spans of a completion that training text holds, where they stand, what follows them, and
which documents cover a completion. The construction follows the line of infini-gram (arXiv
2401.17377) and OLMoTrace (arXiv 2504.07096); the quantities are those of TraceAlign (arXiv
2508.02063).

Layout. Documents are laid end to end, each followed by a separator whose id is `vocab_size`: one more
than any id that a query may hold, so no match crosses a document boundary. The separator is also the
greatest id, so the suffixes that start at one are the last of the sorted order and are cut off. An
index is a folder of little-endian `.npy` arrays that are memory-mapped, the documents as JSON Lines,
the tokenizer, and a manifest that is written last.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydivsufsort import divsufsort

from tracealign_lib.documents import Document, check_documents
from tracealign_lib.errors import (
    CorpusError,
    IndexFormatError,
    ModelError,
    ParameterError,
    VocabularyError,
)
from tracealign_lib.progress import progress

MAGIC = "TraceIndex"
FORMAT_VERSION = 1

_MANIFEST = "manifest.json"
_IDS = "document_ids.json"
_TEXTS = "documents.jsonl"
_TOKENIZER = "tokenizer"
# The dtypes that each array may have; a file of any other name or dtype is never read.
_ARRAYS = {
    "tokens.npy": ("<u2", "<u4"),
    "suffixes.npy": ("<i4", "<i8"),
    "document_starts.npy": ("<i8",),
    "unigram_counts.npy": ("<i8",),
}
_TEXT_ARRAYS = {"document_offsets.npy": ("<i8",)}
_TOKENIZER_FILES = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
_OPTIONAL_FILES = ("tokenizer/special_tokens_map.json", "tokenizer/chat_template.jinja")
_CORE_FILES = (*_ARRAYS, _IDS)
_TEXT_FILES = (_TEXTS, *_TEXT_ARRAYS, *_TOKENIZER_FILES)
_ENCODE_BATCH = 256
_REBUILD = "build the index again with TraceIndex.build, into the same path"

Ids = NDArray[np.int64]


class Span(NamedTuple):
    """Query tokens `[start, end)` that the corpus holds `count` times."""

    start: int
    end: int
    count: int  # type: ignore[assignment]


class Occurrence(NamedTuple):
    """Where a span stands: a document, and its distance in tokens from the document's start."""

    document_id: str
    offset: int


class Source(NamedTuple):
    """A document that covers part of a query.

    `score` is the unigram surprisal of the covered query tokens, in nats; `covered` lists the
    covered query intervals `(start, end)`, sorted, disjoint, and as long as they can be.
    """

    document_id: str
    score: float
    covered: tuple[tuple[int, int], ...]


class _Arrays(NamedTuple):
    tokens: NDArray[Any]  # (n_tokens + n_documents,) with separators
    suffixes: NDArray[Any]  # (n_tokens,) positions in `tokens`, in suffix order
    starts: NDArray[Any]  # (n_documents + 1,) where each document starts in `tokens`
    unigrams: NDArray[Any]  # (vocab_size,) how often each id occurs


class _Manifest(NamedTuple):
    vocab_size: int
    n_tokens: int
    n_documents: int
    tokenizer_hash: str | None
    dtypes: dict[str, str]
    files: dict[str, dict[str, Any]]


class TraceIndex:
    """An exact, memory-mapped index over the tokens of a training corpus.

    Make one with `TraceIndex.build`, `TraceIndex.build_tokens` or `TraceIndex.open`. Queries are
    one-dimensional sequences of token ids; ids outside `[0, vocab_size)`, values that are not
    integers and other shapes raise `VocabularyError`. A span that crosses a document boundary never
    matches.

    Attributes
    ----------
    path:
        The folder of the index.
    vocab_size:
        Ids run from 0 to `vocab_size - 1`.
    n_tokens, n_documents:
        Size of the corpus; separators are not counted.
    tokenizer_hash:
        See `hash_tokenizer`; None when the index was built from token ids.

    Examples
    --------
    >>> index = TraceIndex.build_tokens([[0, 1, 2], [1, 2]], "a.index", vocab_size=3)
    >>> index.count([1, 2])
    2
    >>> index.spans([1, 2, 0, 1])
    [Span(start=0, end=2, count=2), Span(start=2, end=4, count=1)]
    """

    def __init__(
        self,
        path: Path,
        manifest: _Manifest,
        arrays: _Arrays,
        names: NDArray[np.uint8],
        texts: tuple[NDArray[np.uint8], NDArray[Any]] | None,
    ) -> None:
        self.path = path
        self.vocab_size = manifest.vocab_size
        self.n_tokens = manifest.n_tokens
        self.n_documents = manifest.n_documents
        self.tokenizer_hash = manifest.tokenizer_hash
        self._tokens, self._suffixes, self._starts, self._unigrams = arrays
        self._names = names
        self._texts = texts

    def __repr__(self) -> str:
        return (
            f"TraceIndex({str(self.path)!r}: {self.n_tokens:,} tokens, {self.n_documents:,} documents, "
            f"vocabulary {self.vocab_size:,})"
        )

    # ------------------------------------------------------------------ making and opening

    @classmethod
    def build(cls, documents: Iterable[Document], tokenizer: Any, path: str | Path) -> TraceIndex:
        """Index `documents`, and keep their texts, metadata and the tokenizer beside the arrays.

        The index is made in a temporary folder beside `path` and moved there once it is complete: a
        failed or interrupted build leaves nothing behind, and leaves an older index as it was.

        Parameters
        ----------
        documents:
            At least one, with unique ids; documents without text are allowed.
        tokenizer:
            A fast tokenizer of transformers (one with a `backend_tokenizer`).
        path:
            A new folder, or an index that is to be replaced. Any other folder is left alone.

        Raises
        ------
        CorpusError
            No document, duplicate ids, or a record that cannot be written as JSON in UTF-8.
        ModelError
            The tokenizer is not a fast one, or changes when it is saved and loaded.
        ParameterError
            `path` holds something that is not an index.
        """
        checked = check_documents(documents)
        fingerprint = hash_tokenizer(tokenizer)
        target = _check_target(path)
        records = [_record(document) for document in checked]
        encoded = _encode(tokenizer, [document.text for document in checked])
        arrays = _sort(encoded, vocab_size=1 + max(tokenizer.get_vocab().values()))

        def write(folder: Path) -> None:
            _write_arrays(folder, arrays, [document.id for document in checked])
            (folder / _TEXTS).write_bytes(b"".join(records))
            offsets = np.cumsum([0, *map(len, records)], dtype="<i8")
            np.save(folder / "document_offsets.npy", offsets, allow_pickle=False)
            _save_tokenizer(tokenizer, fingerprint, folder / _TOKENIZER)
            _write_manifest(folder, arrays, fingerprint)

        _replace_folder(target, write)
        return cls.open(path)

    @classmethod
    def build_tokens(
        cls,
        arrays: Iterable[ArrayLike],
        path: str | Path,
        *,
        vocab_size: int,
        document_ids: Sequence[str] | None = None,
    ) -> TraceIndex:
        """Index documents that are token ids already; no text and no tokenizer is stored.

        Parameters
        ----------
        arrays:
            One one-dimensional sequence of ids per document; it may be empty.
        vocab_size:
            Ids run from 0 to `vocab_size - 1`.
        document_ids:
            Unique names, one per document; `"0"`, `"1"`, ... by default.

        Raises
        ------
        CorpusError
            No document, or `document_ids` are not as many unique strings as there are documents.
        VocabularyError
            Ids outside the vocabulary, not integers, or not one-dimensional.
        ParameterError
            `vocab_size` is not between 1 and 2^32 - 1, or `path` holds something that is not an index.
        """
        vocab_size = _check_integer(vocab_size, "vocab_size", at_most=2**32 - 1)
        documents = [_check_ids(ids, vocab_size, f"document {i}") for i, ids in enumerate(arrays)]
        names = _check_names(document_ids, len(documents))
        target = _check_target(path)
        sorted_arrays = _sort(documents, vocab_size)

        def write(folder: Path) -> None:
            _write_arrays(folder, sorted_arrays, names)
            _write_manifest(folder, sorted_arrays, None)

        _replace_folder(target, write)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, *, verify: str = "manifest") -> TraceIndex:
        """Open an index; the arrays are memory-mapped, not read.

        Parameters
        ----------
        verify:
            `"manifest"` checks the format, version, file sizes, dtypes, shapes and the bounds of the
            small arrays. `"full"` also hashes every file again, checks that the suffix array is a
            sorted permutation of the corpus, and compares the stored tokenizer with its hash.

        Raises
        ------
        IndexFormatError
            The folder is missing, foreign, of another version, or damaged.
        ParameterError
            Unknown `verify`.
        """
        if verify not in ("manifest", "full"):
            raise ParameterError(
                "Unknown way to verify an index.",
                given=repr(verify),
                expected='"manifest" (quick) or "full" (reads everything)',
                mend="choose one of the two",
            )
        folder = Path(path)
        manifest = _read_manifest(folder)
        if verify == "full":
            _check_hashes(folder, manifest)
        arrays = _load_arrays(folder, manifest)
        index = cls(folder, manifest, arrays, _map_bytes(folder, _IDS), _load_texts(folder, manifest))
        if verify == "full":
            _check_order(folder, arrays, manifest.vocab_size)
            index._check_stored()
        return index

    # ------------------------------------------------------------------ tokenizer and documents

    @cached_property
    def tokenizer(self) -> Any:
        """The stored tokenizer, or None for an index that was built from token ids.

        It is read when it is first asked for; the arrays, ids and documents of an open index stay
        what they were even when the folder is replaced, a tokenizer that was not read yet does not.
        """
        if self.tokenizer_hash is None:
            return None
        try:
            tokenizer = _load_tokenizer(self.path / _TOKENIZER)
            found = hash_tokenizer(tokenizer)
        except Exception as error:
            # tokenizers raises bare Exception for a malformed file
            raise _damaged(self.path, f"the tokenizer cannot be loaded: {error}") from error
        if found != self.tokenizer_hash:
            raise _damaged(self.path, f"its tokenizer has hash {found}, the manifest {self.tokenizer_hash}")
        return tokenizer

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise `VocabularyError` unless `tokenizer` is the one that the corpus was encoded with."""
        found = hash_tokenizer(tokenizer)
        if found != self.tokenizer_hash:
            raise VocabularyError(
                "The tokenizer is not the one of the index.",
                given=f"a tokenizer with hash {found}",
                expected=f"hash {self.tokenizer_hash or '(none: the index was built from token ids)'}",
                mend="use index.tokenizer, or build the index again with this tokenizer",
            )

    def encode(self, text: str) -> Ids:
        """Token ids of `text`, shape (n,): no special tokens are added, nothing is cut off."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[Ids, Ids]:
        """Token ids of `text`, shape (n,), and the characters `[start, end)` of each, shape (n, 2).

        A character whose bytes fall into several tokens belongs to each of them.

        Raises
        ------
        ModelError
            The index was built from token ids and holds no tokenizer.
        ParameterError
            `text` is not a string, or holds lone surrogates, which no encoding can represent.
        """
        if self.tokenizer is None:
            raise ModelError(
                "The index holds no tokenizer.",
                given=str(self.path),
                expected="an index made by TraceIndex.build",
                mend="encode the text yourself and pass ids, or build the index from documents",
            )
        if not isinstance(text, str) or not _is_utf8(text):
            raise ParameterError(
                "The text cannot be encoded.",
                given=repr(text)[:80],
                expected="a string that can be written as UTF-8",
                mend='replace lone surrogates: text.encode("utf-8", "replace").decode()',
            )
        encoding = self.tokenizer(text, return_offsets_mapping=True, **_PLAIN)
        ids = np.array(encoding["input_ids"], dtype=np.int64)  # (n,)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)  # (n, 2)
        return ids, offsets

    @cached_property
    def document_ids(self) -> tuple[str, ...]:
        """The ids of all documents, in corpus order."""
        names = _parse(self._names.tobytes(), self.path, _IDS)
        sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not sound or len(names) != self.n_documents:
            raise _damaged(self.path, f"{_IDS} is not a list of {self.n_documents} ids")
        return tuple(names)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.document_ids)}

    def _check_stored(self) -> None:
        """Read every id, every document and the tokenizer, each of which checks itself."""
        if len(self._numbers) != self.n_documents:
            raise _damaged(self.path, f"{_IDS} has duplicates")
        if self.tokenizer is not None:
            for document_id in self.document_ids:
                self.document(document_id)

    def _number(self, document_id: str) -> int:
        number = self._numbers.get(document_id) if isinstance(document_id, str) else None
        if number is None:
            raise ParameterError(
                "The index holds no document of that id.",
                given=repr(document_id),
                expected=f"one of {self.n_documents} ids, such as {self.document_ids[0]!r}",
                mend="look into index.document_ids",
            )
        return number

    def document(self, document_id: str) -> Document:
        """The stored document: id, text and metadata.

        Raises
        ------
        ParameterError
            Unknown id.
        CorpusError
            The index was built from token ids and holds no texts.
        """
        number = self._number(document_id)
        if self._texts is None:
            raise CorpusError(
                "The index holds no texts.",
                given=str(self.path),
                expected="an index made by TraceIndex.build",
                mend="use document_tokens, or build the index from documents",
            )
        texts, offsets = self._texts
        raw = texts[offsets[number] : offsets[number + 1]].tobytes()
        record = _parse(raw, self.path, f"{_TEXTS}, record {number}")
        fields = {"id": str, "text": str, "meta": dict}
        sound = isinstance(record, dict) and all(isinstance(record.get(f), t) for f, t in fields.items())
        if not sound or record["id"] != document_id:
            raise _damaged(self.path, f"{_TEXTS}, record {number} is not document {document_id!r}")
        return Document(id=record["id"], text=record["text"], meta=record["meta"])

    def document_tokens(self, document_id: str) -> Ids:
        """The token ids of a document, shape (n,); `ParameterError` for an unknown id."""
        number = self._number(document_id)
        return self._tokens[self._starts[number] : self._starts[number + 1] - 1].astype(np.int64)

    # ------------------------------------------------------------------ queries

    def count(self, ids: ArrayLike) -> int:
        """How often `ids` occur in the corpus, within one document each time.

        The empty sequence occurs before every token: it counts `n_tokens`, as in infini-gram, which
        keeps `count(x) >= count(xy)` true for all x and y.
        """
        low, high = self._interval(_check_ids(ids, self.vocab_size, "query"))
        return high - low

    def spans(self, ids: ArrayLike, *, min_length: int = 1, max_count: int | None = None) -> list[Span]:
        """The maximal matching spans of a query, from left to right.

        A maximal matching span is an interval `[start, end)` that occurs in the corpus and that
        cannot be extended to either side within the query and still occur. Such spans may overlap;
        none contains another.

        Parameters
        ----------
        ids:
            Token ids, shape (n,).
        min_length:
            Shorter maximal spans are left out (tokens).
        max_count:
            Maximal spans that occur more often are left out; the paper keeps `M(q) <= 3`.
        """
        query = _check_ids(ids, self.vocab_size, "query")
        min_length = _check_integer(min_length, "min_length")
        most = self.n_tokens if max_count is None else _check_integer(max_count, "max_count")
        found = _maximal_spans(self._tokens, self._suffixes, query, min_length)  # (spans, 3)
        return [Span(start, end, count) for start, end, count in found.tolist() if count <= most]

    def locate(self, ids: ArrayLike, *, limit: int | None = 10) -> list[Occurrence]:
        """The first `limit` occurrences of `ids` in corpus order; all of them when `limit` is None."""
        low, high = self._interval(_check_ids(ids, self.vocab_size, "query"))
        limit = high - low if limit is None else _check_integer(limit, "limit")
        places = self._places(low, high)
        if limit < len(places):
            places = np.partition(places, limit - 1)[:limit]
        places = np.sort(places)
        numbers = self._documents_at(places)
        offsets = places - self._starts[numbers]
        return [
            Occurrence(self.document_ids[number], offset)
            for number, offset in zip(numbers.tolist(), offsets.tolist(), strict=True)
        ]

    def continuations(self, ids: ArrayLike) -> tuple[Ids, Ids]:
        """What follows the longest suffix of `ids` that the corpus holds.

        Returns
        -------
        tokens, counts:
            Shape (n,) each: the ids that follow, most frequent first (ties: smaller id first), and
            how often. Occurrences that end a document are followed by nothing, so `counts` may sum
            to less than the count of the suffix, and both are empty if all of them do. When not
            even the last id occurs, the longest suffix is empty and the unigram counts are returned.
        """
        query = _check_ids(ids, self.vocab_size, "query")
        low, high, length = self._longest_suffix(query)
        if length == 0:
            counts = self._unigrams
        else:
            following = self._tokens[self._places(low, high) + length]
            counts = np.bincount(following, minlength=self.vocab_size)[: self.vocab_size]
        tokens = np.flatnonzero(counts)
        order = np.argsort(-counts[tokens], kind="stable")
        return tokens[order], np.asarray(counts[tokens[order]], dtype=np.int64)

    def sources(self, ids: ArrayLike, *, min_length: int = 8, limit: int | None = 10) -> list[Source]:
        """Documents ranked by how much of the query they cover.

        A document covers query token `j` if some window of `min_length` consecutive query tokens that
        contains `j` occurs in the document. Its score is the sum of `surprisal` over the covered
        tokens (nats, to 9 decimals). Equal scores keep the order of the corpus.

        Parameters
        ----------
        ids:
            Token ids, shape (n,); fewer than `min_length` have no source.
        min_length:
            Length of the window (tokens).
        limit:
            How many documents to return; None for all that cover anything.
        """
        query = _check_ids(ids, self.vocab_size, "query")
        min_length = _check_integer(min_length, "min_length")
        limit = self.n_documents if limit is None else _check_integer(limit, "limit")
        total = np.concatenate([[0.0], np.cumsum(self.surprisal[query])])  # (n + 1,) nats up to each token
        ranked: list[tuple[float, int, tuple[tuple[int, int], ...]]] = []
        for number, windows in self._windows_by_document(query, min_length):
            covered = _merge(windows, min_length)
            score = sum(float(total[end] - total[start]) for start, end in covered)
            # rounded, or the order of additions would decide between documents that tie
            ranked.append((-round(score, 9), number, covered))
        ranked.sort()
        return [Source(self.document_ids[n], -negative, covered) for negative, n, covered in ranked[:limit]]

    @cached_property
    def surprisal(self) -> NDArray[np.float64]:
        """`-log p(t)` of each id, shape (vocab_size,), in nats.

        `p` is the unigram probability over the indexed tokens with one added to each count, so ids
        that never occur are finite: `(count + 1) / (n_tokens + vocab_size)`.
        """
        total = self.n_tokens + self.vocab_size
        return np.asarray(np.log(total) - np.log(self._unigrams + 1.0), dtype=np.float64)

    # ------------------------------------------------------------------ parts of queries

    def _interval(self, query: Ids, start: int = 0) -> tuple[int, int]:
        low, high = _interval(self._tokens, self._suffixes, query, start, len(query))
        return int(low), int(high)

    def _places(self, low: int, high: int) -> Ids:
        places = self._suffixes[low:high].astype(np.int64)
        if len(places) and (places.min() < 0 or places.max() >= len(self._tokens) - 1):
            raise _damaged(self.path, "suffixes.npy points outside the corpus")
        return places

    def _documents_at(self, places: Ids) -> Ids:
        return np.searchsorted(self._starts, places, side="right").astype(np.int64) - 1

    def _longest_suffix(self, query: Ids) -> tuple[int, int, int]:
        """Interval and length of the longest suffix of `query` that occurs."""
        # a suffix of an indexed suffix is indexed too, so the first indexed start can be bisected
        absent, present = -1, len(query)
        while present - absent > 1:
            middle = (absent + present) // 2
            low, high = self._interval(query, middle)
            absent, present = (absent, middle) if high > low else (middle, present)
        return *self._interval(query, present), len(query) - present

    def _windows_by_document(self, query: Ids, length: int) -> list[tuple[int, Ids]]:
        """Per document, the sorted starts of the query windows of `length` tokens that it holds."""
        if len(query) < length:
            return []
        intervals = _window_intervals(self._tokens, self._suffixes, query, length)  # (windows, 2)
        sizes = intervals[:, 1] - intervals[:, 0]
        hits = np.flatnonzero(sizes)
        if len(hits) == 0:
            return []
        places = np.concatenate([self._places(low, high) for low, high in intervals[hits].tolist()])
        starts = np.repeat(hits, sizes[hits])
        pairs = np.unique(self._documents_at(places) * len(query) + starts)
        numbers, starts = np.divmod(pairs, len(query))
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
        return list(zip(numbers[firsts].tolist(), np.split(starts, firsts[1:]), strict=True))


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


# ---------------------------------------------------------------------- search


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _search(
    tokens: NDArray[Any], suffixes: NDArray[Any], query: Ids, start: int, end: int, low: int, after: bool
) -> tuple[int, int]:
    """Rank at or above `low` where `query[start:end]` belongs, and how much of it some suffix shares.

    With `after`, suffixes that begin with the whole of it are passed over. The two suffixes next to
    the result have been looked at, so the second value is the longest prefix that the corpus holds.
    """
    high = len(suffixes)
    shared_low = shared_high = longest = 0
    while low < high:
        middle = (low + high) // 2
        place = np.int64(suffixes[middle])
        # a damaged file must not make compiled code read outside the array
        stop = len(tokens) - place if 0 <= place < len(tokens) else 0
        # everything between two suffixes shares what both of them share with the query
        depth = min(shared_low, shared_high)
        while start + depth < end and depth < stop and tokens[place + depth] == query[start + depth]:
            depth += 1
        longest = max(longest, depth)
        if start + depth == end:
            passed = after
        elif depth >= stop:
            passed = True
        else:
            passed = bool(tokens[place + depth] < query[start + depth])
        if passed:
            low, shared_low = middle + 1, depth
        else:
            high, shared_high = middle, depth
    return low, longest


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _interval(
    tokens: NDArray[Any], suffixes: NDArray[Any], query: Ids, start: int, end: int
) -> tuple[int, int]:
    """Ranks `[low, high)` of the suffixes that begin with `query[start:end]`."""
    low, shared = _search(tokens, suffixes, query, start, end, 0, False)
    if shared < end - start:
        return low, low
    return low, _search(tokens, suffixes, query, start, end, low, True)[0]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _maximal_spans(tokens: NDArray[Any], suffixes: NDArray[Any], query: Ids, min_length: int) -> Ids:
    """Start, end and count of each maximal matching span, shape (spans, 3)."""
    found = np.empty((len(query), 3), dtype=np.int64)
    kept = 0
    reach = 0
    for start in range(len(query)):
        _, length = _search(tokens, suffixes, query, start, len(query), 0, False)
        # the longest match of each start; one that ends where an earlier one ends lies inside it
        if start + length > reach:
            reach = start + length
            if length >= min_length:
                low, high = _interval(tokens, suffixes, query, start, reach)
                found[kept, 0], found[kept, 1], found[kept, 2] = start, reach, high - low
                kept += 1
    return found[:kept]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _window_intervals(tokens: NDArray[Any], suffixes: NDArray[Any], query: Ids, length: int) -> Ids:
    """Ranks of every window of `length` query tokens, shape (windows, 2)."""
    intervals = np.empty((len(query) - length + 1, 2), dtype=np.int64)
    for start in range(len(intervals)):
        low, high = _interval(tokens, suffixes, query, start, start + length)
        intervals[start, 0], intervals[start, 1] = low, high
    return intervals


def _merge(starts: Ids, length: int) -> tuple[tuple[int, int], ...]:
    """Intervals that windows of `length` tokens at sorted `starts` cover; touching ones are joined."""
    gaps = np.flatnonzero(np.diff(starts) > length)
    begins = starts[np.concatenate([[0], gaps + 1])]
    ends = starts[np.concatenate([gaps, [len(starts) - 1]])] + length
    return tuple(zip(begins.tolist(), ends.tolist(), strict=True))


# ---------------------------------------------------------------------- checks of input


def _check_ids(ids: ArrayLike, vocab_size: int, what: str) -> Ids:
    """`ids` as a fresh (n,) array after checking type, shape and range."""
    expected = f"a one-dimensional sequence of integers from 0 to {vocab_size - 1}"
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError, OverflowError) as error:
        raise VocabularyError(
            f"The {what} is not a sequence of token ids.",
            given=f"{repr(ids)[:80]} ({error})",
            expected=expected,
            mend="pass token ids, for example index.encode(text)",
        ) from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise VocabularyError(
            f"The {what} is not a sequence of token ids.",
            given=f"shape {array.shape}, dtype {array.dtype}: {repr(ids)[:80]}",
            expected=expected,
            mend="pass token ids, for example index.encode(text)",
        )
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        position = int(np.flatnonzero((array < 0) | (array >= vocab_size))[0])
        raise VocabularyError(
            f"The {what} has an id outside the vocabulary.",
            given=f"{array[position]} at position {position}",
            expected=expected,
            mend="encode with the tokenizer of the index (index.encode, index.check_tokenizer)",
        )
    return np.array(array, dtype=np.int64)  # one dtype and layout: the search compiles once


def _check_integer(value: Any, name: str, *, at_most: int | None = None) -> int:
    expected = "an integer of at least 1" if at_most is None else f"an integer from 1 to {at_most}"
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1 or (at_most is not None and number > at_most):
        raise ParameterError(
            f"{name} is out of range.", given=repr(value), expected=expected, mend=f"choose another {name}"
        )
    return number


def _check_names(document_ids: Sequence[str] | None, n_documents: int) -> list[str]:
    names = [str(i) for i in range(n_documents)] if document_ids is None else list(document_ids)
    if len(names) != n_documents or not all(isinstance(name, str) and _is_utf8(name) for name in names):
        raise CorpusError(
            "The document ids do not fit the documents.",
            given=f"{len(names)} ids, such as {names[:3]}, for {n_documents} documents",
            expected="one string per document",
            mend="leave document_ids out to number the documents",
        )
    check_documents((Document(name, "") for name in names), origin="arrays")
    return names


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _record(document: Document) -> bytes:
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


def _check_target(path: str | Path) -> Path:
    """Where to build; refuses a folder that holds anything but an index."""
    target = Path(path).resolve()
    if target.is_dir():
        entries = {entry.name for entry in target.iterdir()}
        known = {_MANIFEST, _TOKENIZER, *_CORE_FILES, *_TEXT_FILES}
        free = not entries or (entries <= known and _magic(target) == MAGIC)
    else:
        free = not target.exists()
    if not free:
        raise ParameterError(
            "The path holds something that is not an index.",
            given=str(target),
            expected="a new folder, or an index that may be replaced",
            mend="choose another path, or move away what is there",
        )
    return target


def _magic(folder: Path) -> object:
    try:
        content = json.loads((folder / _MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content.get("magic") if isinstance(content, dict) else None


# ---------------------------------------------------------------------- building


# Calls of a tokenizer: nothing added, nothing cut off, and no warning about a length.
_PLAIN: dict[str, Any] = {
    "add_special_tokens": False,
    "truncation": False,
    "padding": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}


def _encode(tokenizer: Any, texts: list[str]) -> list[Ids]:
    """Token ids of each text; batches let the tokenizer use all cores and the bar move."""
    encoded: list[Ids] = []
    with progress(description="Encoding documents", total=len(texts), unit=" documents") as bar:
        for first in range(0, len(texts), _ENCODE_BATCH):
            batch = tokenizer(texts[first : first + _ENCODE_BATCH], **_PLAIN)["input_ids"]
            encoded += [np.array(ids, dtype=np.int64) for ids in batch]
            bar.update(len(batch))
    return encoded


def _sort(documents: list[Ids], vocab_size: int) -> _Arrays:
    """Lay the documents end to end, each followed by a separator, and sort the suffixes."""
    separator = vocab_size
    lengths = [len(document) + 1 for document in documents]
    starts = np.cumsum([0, *lengths], dtype="<i8")
    stream = np.full(starts[-1], separator, dtype="<u2" if separator < 2**16 else "<u4")
    for document, start in zip(documents, starts.tolist(), strict=False):
        stream[start : start + len(document)] = document
    n_tokens = len(stream) - len(documents)
    # the separator is the greatest id: suffixes that start with it come last and are left out
    suffixes = divsufsort(stream)[:n_tokens].astype("<i4" if len(stream) < 2**31 else "<i8")
    unigrams = np.bincount(stream, minlength=vocab_size + 1)[:vocab_size].astype("<i8")
    return _Arrays(stream, suffixes, starts, unigrams)


def _write_arrays(folder: Path, arrays: _Arrays, names: list[str]) -> None:
    for name, array in zip(_ARRAYS, arrays, strict=True):
        np.save(folder / name, array, allow_pickle=False)
    (folder / _IDS).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


def _save_tokenizer(tokenizer: Any, fingerprint: str, folder: Path) -> None:
    tokenizer.save_pretrained(str(folder))
    known = {*_TOKENIZER_FILES, *_OPTIONAL_FILES}
    for entry in folder.iterdir():
        if f"{_TOKENIZER}/{entry.name}" not in known:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    found = hash_tokenizer(_load_tokenizer(folder))
    if found != fingerprint:
        raise ModelError(
            "The tokenizer changes when it is saved and loaded again.",
            given=f"{type(tokenizer).__name__}: hash {fingerprint} before, {found} after",
            expected="a tokenizer that its tokenizer.json describes fully",
            mend="wrap its backend: PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)",
        )


def _load_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast  # slow to import, and not needed to match ids

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _write_manifest(folder: Path, arrays: _Arrays, fingerprint: str | None) -> None:
    """Hash every file onto the disk, then write the manifest that vouches for them."""
    files: dict[str, dict[str, Any]] = {}
    for name in (*_CORE_FILES, *_TEXT_FILES, *_OPTIONAL_FILES):
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[name] = {"size": file.tell(), "sha256": digest}
    dtypes = {name: array.dtype.str for name, array in zip(_ARRAYS, arrays, strict=True)}
    content = {
        "magic": MAGIC,
        "version": FORMAT_VERSION,
        "byte_order": "little",
        "vocab_size": len(arrays.unigrams),
        "n_tokens": len(arrays.suffixes),
        "n_documents": len(arrays.starts) - 1,
        "tokenizer_hash": fingerprint,
        "dtypes": dtypes if fingerprint is None else {**dtypes, "document_offsets.npy": "<i8"},
        "files": files,
    }
    with open(folder / _MANIFEST, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `target`, then put it in the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{target.name}.{uuid.uuid4().hex}"
    partial, old = target.with_name(f"{stem}.partial"), target.with_name(f"{stem}.old")
    try:
        partial.mkdir()
        write(partial)
        _sync_folder(partial)
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
        _sync_folder(target.parent)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- opening


def _damaged(folder: Path, problem: str) -> IndexFormatError:
    return IndexFormatError(
        "The index is damaged.", given=f"{folder}: {problem}", expected="the files as built", mend=_REBUILD
    )


def _parse(raw: bytes, folder: Path, what: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"{what} is not JSON: {error}") from error


def _read_manifest(folder: Path) -> _Manifest:
    if not (folder / _MANIFEST).is_file():
        raise IndexFormatError(
            "There is no index here.",
            given=f"{folder}: {'no ' + _MANIFEST if folder.is_dir() else 'no such folder'}",
            expected="a folder made by TraceIndex.build",
            mend="check the path, or build the index",
        )
    content = _parse(_map_bytes(folder, _MANIFEST).tobytes(), folder, _MANIFEST)
    if not isinstance(content, dict) or content.pop("magic", None) != MAGIC:
        raise IndexFormatError(
            "The folder is not a TraceIndex.",
            given=f"{folder}: {_MANIFEST} of something else",
            expected=f'"magic": "{MAGIC}"',
            mend="check the path; the folder belongs to another program",
        )
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


def _check_manifest(content: dict[str, Any], folder: Path) -> _Manifest:
    """The manifest's fields, after checking that they are all there and of the right type."""
    if set(content) != set(_Manifest._fields):
        raise _damaged(folder, f"{_MANIFEST} has fields {sorted(content)}")
    manifest = _Manifest(**content)
    bounds = {"vocab_size": (1, 2**32), "n_tokens": (0, 2**62), "n_documents": (1, 2**62)}
    for field, (least, end) in bounds.items():
        if type(content[field]) is not int or not least <= content[field] < end:
            raise _damaged(folder, f"{_MANIFEST}: {field} is {content[field]!r}")
    fingerprint = manifest.tokenizer_hash
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise _damaged(folder, f"{_MANIFEST}: tokenizer_hash is {fingerprint!r}")
    dtypes = _ARRAYS if fingerprint is None else {**_ARRAYS, **_TEXT_ARRAYS}
    given = manifest.dtypes
    if not isinstance(given, dict) or set(given) != set(dtypes):
        raise _damaged(folder, f"{_MANIFEST}: dtypes is {given!r}")
    for name, allowed in dtypes.items():
        if given[name] not in allowed:
            raise _damaged(folder, f"{_MANIFEST}: {name} has dtype {given[name]!r}, not one of {allowed}")
    required = {*_CORE_FILES} if fingerprint is None else {*_CORE_FILES, *_TEXT_FILES}
    optional = () if fingerprint is None else _OPTIONAL_FILES
    if not isinstance(manifest.files, dict) or not required <= set(manifest.files) <= required.union(
        optional
    ):
        raise _damaged(folder, f"{_MANIFEST}: files are not {sorted(required)}")
    return manifest


def _check_files(folder: Path, manifest: _Manifest) -> None:
    for name in (*_CORE_FILES, *_TEXT_FILES, *_OPTIONAL_FILES):
        if name not in manifest.files:
            continue
        entry = manifest.files[name]
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise _damaged(folder, f"{_MANIFEST}: the entry of {name} is {entry!r}")
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise _damaged(folder, f"{name} is missing") from error
        if size != entry["size"]:
            raise _damaged(folder, f"{name} has {size} bytes, not {entry['size']}")


def _check_hashes(folder: Path, manifest: _Manifest) -> None:
    for name in (*_CORE_FILES, *_TEXT_FILES, *_OPTIONAL_FILES):
        if name in manifest.files:
            with open(folder / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != manifest.files[name]["sha256"]:
                raise _damaged(folder, f"{name} does not have the SHA-256 that it was built with")


def _load_array(folder: Path, name: str, manifest: _Manifest, length: int) -> NDArray[Any]:
    try:
        array = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(folder, f"{name} is not a .npy array: {error}") from error
    if array.shape != (length,) or array.dtype.str != manifest.dtypes[name]:
        found = f"shape {array.shape}, dtype {array.dtype.str}"
        raise _damaged(folder, f"{name} has {found}, not ({length},), {manifest.dtypes[name]}")
    return np.asarray(array)


def _load_arrays(folder: Path, manifest: _Manifest) -> _Arrays:
    """Map the arrays after checking shapes and the bounds of those that are short."""
    lengths = (
        manifest.n_tokens + manifest.n_documents,
        manifest.n_tokens,
        manifest.n_documents + 1,
        manifest.vocab_size,
    )
    loaded = (_load_array(folder, name, manifest, n) for name, n in zip(_ARRAYS, lengths, strict=True))
    arrays = _Arrays(*loaded)
    starts = arrays.starts
    if starts[0] != 0 or starts[-1] != len(arrays.tokens) or (np.diff(starts) < 1).any():
        raise _damaged(folder, "document_starts.npy does not divide the corpus into documents")
    if arrays.tokens[-1] != manifest.vocab_size:
        raise _damaged(folder, "tokens.npy does not end with a separator")
    if (arrays.unigrams < 0).any() or arrays.unigrams.sum() != manifest.n_tokens:
        raise _damaged(folder, "unigram_counts.npy does not sum to the number of tokens")
    return arrays


def _load_texts(folder: Path, manifest: _Manifest) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
    """Map the documents and the byte at which each starts; None when there are no texts."""
    if manifest.tokenizer_hash is None:
        return None
    offsets = _load_array(folder, "document_offsets.npy", manifest, manifest.n_documents + 1)
    if offsets[0] != 0 or offsets[-1] != manifest.files[_TEXTS]["size"] or (np.diff(offsets) < 1).any():
        raise _damaged(folder, "document_offsets.npy does not divide the documents")
    return _map_bytes(folder, _TEXTS), offsets


def _map_bytes(folder: Path, name: str) -> NDArray[np.uint8]:
    try:
        return np.asarray(np.memmap(folder / name, dtype=np.uint8, mode="r"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{name} cannot be read: {error}") from error


def _check_order(folder: Path, arrays: _Arrays, vocab_size: int) -> None:
    """Check in linear time that the arrays are what `_sort` makes of some corpus."""
    tokens, suffixes, starts, unigrams = arrays
    separators = tokens >= vocab_size
    if not np.array_equal(np.flatnonzero(separators), starts[1:] - 1):
        raise _damaged(folder, "tokens.npy and document_starts.npy disagree about the documents")
    if not np.array_equal(np.bincount(tokens, minlength=vocab_size)[:vocab_size], unigrams):
        raise _damaged(folder, "unigram_counts.npy does not count tokens.npy")
    n_tokens = len(suffixes)
    if n_tokens == 0:
        return
    if suffixes.min() < 0 or suffixes.max() >= len(tokens):
        raise _damaged(folder, "suffixes.npy points outside the corpus")
    ranks = np.full(len(tokens), n_tokens, dtype=suffixes.dtype)  # separators rank last
    ranks[suffixes] = np.arange(n_tokens, dtype=suffixes.dtype)
    if not np.array_equal(ranks == n_tokens, separators):
        raise _damaged(folder, "suffixes.npy is not a permutation of the corpus")
    # two suffixes are in order if their first tokens are, or if these are equal and their rests are;
    # what follows a separator is never compared with a query, so it may stand in any order
    first, rest = tokens[suffixes], ranks[suffixes + 1]
    sound = (first[:-1] < first[1:]) | ((first[:-1] == first[1:]) & (rest[:-1] <= rest[1:]))
    if not sound.all():
        rank = int(np.flatnonzero(~sound)[0])
        raise _damaged(folder, f"suffixes.npy is not sorted at rank {rank}")
