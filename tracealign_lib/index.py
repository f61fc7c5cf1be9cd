"""TraceIndex: exact matching of token spans against a training corpus.

From one operation, finding the interval of a sorted suffix array that begins with a span
(`suffix_array`), follow exact counts, the maximal spans of a completion that training text holds,
where they stand, what follows them, and which documents cover a completion. OLMoTrace (arXiv
2504.07096) traces outputs in this way; the quantities are those of TraceAlign (arXiv 2508.02063).
What an index looks like on disk is told in `index_format`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracealign_lib import index_format, index_writing, suffix_array, suffix_array_numpy
from tracealign_lib.compiled import HAS_NUMBA
from tracealign_lib.documents import Document, check_documents
from tracealign_lib.engine import (
    PLAIN,
    Engine,
    Listed,
    Occurrence,
    Source,
    Span,
    is_utf8,
    laplace_surprisal,
    no_texts,
)
from tracealign_lib.errors import CorpusError, ParameterError
from tracealign_lib.index_format import StoredIndex, hash_tokenizer
from tracealign_lib.progress import progress
from tracealign_lib.queries import check_ids, check_integer
from tracealign_lib.suffix_array import Ids

# `Ids` and `hash_tokenizer` are defined elsewhere, but belong to what a caller of an index needs.
__all__ = ["INDEX_CODE", "Ids", "Interval", "Occurrence", "Source", "Span", "TraceIndex", "hash_tokenizer"]

_search: ModuleType = suffix_array if HAS_NUMBA else suffix_array_numpy
_ENCODE_BATCH = 256

INDEX_CODE = tuple(
    f"tracealign_lib.{name}"
    for name in ("index", "engine", "suffix_array", "index_format", "index_writing", "index_place", "files")
)
"""The modules whose code decides what an index holds: for stages that keep one."""


class Interval(NamedTuple):
    """Where a span of `length` tokens stands in the sorted order: ranks `[low, high)`, empty if nowhere.

    It is what a decoder keeps of the text before the next token: `TraceIndex.extend` goes on from it
    without reading that text again.
    """

    low: int
    high: int
    length: int


class TraceIndex(Listed, Engine):
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
    n_tokens:
        Size of the corpus; separators are not counted.
    n_documents:
        How many documents it has.
    arrays:
        The memory-mapped `CorpusArrays`, for compiled code that searches by itself; read-only.

    Examples
    --------
    >>> index = TraceIndex.build_tokens([[0, 1, 2], [1, 2]], "a.index", vocab_size=3)
    >>> index.count([1, 2])
    2
    >>> index.spans([1, 2, 0, 1])
    [Span(start=0, end=2, count=2), Span(start=2, end=4, count=1)]
    """

    def __init__(self, path: Path, stored: StoredIndex) -> None:
        self.path = path
        self.vocab_size = stored.manifest.vocab_size
        self.n_tokens = stored.manifest.n_tokens
        self.n_documents = stored.manifest.n_documents
        self.tokenizer_hash = stored.manifest.tokenizer_hash
        self.arrays = stored.arrays
        self._names = stored.names
        self._texts = stored.texts
        self._stored_tokenizer = stored.tokenizer

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
        failed or interrupted build leaves nothing behind, and leaves an older index as it was. A build
        that is killed outright loses nothing either: what it leaves beside `path`, the next build
        tidies up, and if the older index has been moved aside, `open` says where it is.

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
        StorageError
            The disk is full, or cannot be written to.
        ParameterError
            `path` holds something that is not an index.
        BusyError
            Another process is building there.
        """
        checked = check_documents(documents)
        fingerprint = hash_tokenizer(tokenizer)
        with index_writing.building(path) as target:
            records = [index_writing.encode_record(document) for document in checked]
            encoded = _encode(tokenizer, checked)
            arrays = suffix_array.sort_corpus(encoded, vocab_size=1 + max(tokenizer.get_vocab().values()))
            names = [document.id for document in checked]
            texts = index_writing.Texts(records, tokenizer, fingerprint)
            index_writing.write_index(target, arrays, names, texts)
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
        StorageError
            The disk is full, or cannot be written to.
        BusyError
            Another process is building there.
        """
        vocab_size = check_integer(vocab_size, "vocab_size", at_most=2**32 - 1)
        checked = (check_ids(ids, vocab_size, f"document {i}", copy=False) for i, ids in enumerate(arrays))
        with index_writing.building(path) as target:
            stream, starts = suffix_array.lay_out(checked, vocab_size)
            names = _check_names(document_ids, len(starts) - 1)
            index_writing.write_index(target, suffix_array.sort_stream(stream, starts, vocab_size), names)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, *, verify: str = "manifest") -> TraceIndex:
        """Open an index; the arrays are memory-mapped, not read.

        The folder may come from anywhere: nothing in it is run, whatever `verify` is, and no question
        reads outside the arrays. What a reader has opened it keeps, even when a build replaces it.

        Parameters
        ----------
        verify:
            `"manifest"` checks the format, version, file sizes, dtypes, shapes, and the bounds of
            `document_starts`, `document_offsets` and `unigram_counts`. It does not notice changed bytes
            that keep these: other values in `tokens`, `suffixes` or `keys`, two unigram counts or
            bounds that were shifted against each other, another text in a document. Answers may then be
            wrong; where they contradict themselves, the question raises `IndexFormatError`.
            `"full"` also hashes every file again, checks that the suffix array is a sorted permutation
            of the corpus, reads every document, and compares the tokenizer with its hash: it finds
            every changed byte. It cannot tell who built the index: somebody who changes a document and
            writes a whole new index around it gives you a sound index of another corpus.

        Raises
        ------
        IndexFormatError
            The folder is missing, foreign, of another version, or damaged, or a build was killed while
            it replaced the index; the message then says how to bring the older one back.
        BusyError
            Builds replace the index faster than it can be opened.
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
        return index_format.unreplaced(Path(path), lambda: cls._open(Path(path), full=verify == "full"))

    @classmethod
    def _open(cls, folder: Path, *, full: bool) -> TraceIndex:
        index = cls(folder, index_format.read_index(folder, full=full))
        if full:
            index._check_stored()
        return index

    # ------------------------------------------------------------------ tokenizer and documents

    @cached_property
    def tokenizer(self) -> Any:
        """The stored tokenizer, or None for an index that was built from token ids."""
        if self.tokenizer_hash is None:
            return None
        return index_format.parse_tokenizer(self._stored_tokenizer, self.tokenizer_hash, self.path)

    @cached_property
    def document_ids(self) -> tuple[str, ...]:
        """The ids of all documents, in corpus order."""
        return index_format.parse_names(self._names, self.n_documents, self.path)

    def _check_stored(self) -> None:
        """Read every id, every document and the tokenizer, each of which checks itself."""
        document_ids = self.document_ids
        if self.tokenizer is not None:
            for document_id in document_ids:
                self.document(document_id)

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
            raise no_texts(self.path)
        texts, offsets = self._texts
        raw = texts[offsets[number] : offsets[number + 1]]
        return index_format.parse_document(raw, number, document_id, self.path)

    def document_tokens(self, document_id: str) -> Ids:
        """The token ids of a document, shape (n,); `ParameterError` for an unknown id."""
        number = self._number(document_id)
        start, end = self.arrays.starts[number], self.arrays.starts[number + 1] - 1
        tokens = self.arrays.tokens[start:end].astype(np.int64)
        index_format.check_ids_of(tokens, self.vocab_size - 1, self.path)
        return tokens

    # ------------------------------------------------------------------ queries

    def count(self, ids: ArrayLike) -> int:
        """How often `ids` occur in the corpus, within one document each time.

        The empty sequence occurs before every token: it counts `n_tokens`, as in infini-gram, which
        keeps `count(x) >= count(xy)` true for all x and y.
        """
        low, high = self._interval(check_ids(ids, self.vocab_size, "query"))
        return high - low

    def counts(self, ids: ArrayLike, bounds: ArrayLike) -> Ids:
        """How often each `ids[start:end]` of `bounds` (k, 2) occurs, shape (k,); see `count`.

        Raises
        ------
        ParameterError
            A part does not lie within the query.
        """
        query, parts = check_ids(ids, self.vocab_size, "query"), np.asarray(bounds, dtype=np.int64)
        starts, ends = parts.reshape(-1, 2).T
        if len(parts) and not (starts.min() >= 0 and (starts <= ends).all() and ends.max() <= len(query)):
            raise ParameterError(
                "A part does not lie within the query.",
                given=f"a query of {len(query)} tokens, and parts from {starts.min()} to {ends.max()}",
                expected="0 <= start <= end <= length",
                mend="count tokens of this query",
            )
        intervals = self._intervals(query, np.stack([starts, ends], axis=1))
        return np.asarray(intervals[:, 1] - intervals[:, 0])

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
        query = check_ids(ids, self.vocab_size, "query")
        min_length = check_integer(min_length, "min_length")
        most = self.n_tokens if max_count is None else check_integer(max_count, "max_count")
        found = _search.find_maximal_spans(*self.arrays[:3], query, min_length)  # (spans, 3)
        index_format.check_ranks(1, found[:, 2], self.path)  # what was found occurs
        return [Span(start, end, count) for start, end, count in found.tolist() if count <= most]

    def spans_of(
        self,
        texts: Iterable[ArrayLike],
        *,
        min_length: int = 1,
        max_count: int | None = None,
        threads: int | None = None,
    ) -> list[list[Span]]:
        """`spans` of many queries, on several cores at once (`threads`: as many as there are cores)."""
        texts = list(texts)
        threads = check_integer(threads or os.cpu_count() or 1, "threads")
        search = partial(self.spans, min_length=min_length, max_count=max_count)
        if threads == 1 or len(texts) < 2:
            return [search(ids) for ids in texts]
        shares = [texts[i * len(texts) // threads : (i + 1) * len(texts) // threads] for i in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            return [found for share in pool.map(lambda part: [*map(search, part)], shares) for found in share]

    def locate(self, ids: ArrayLike, *, limit: int | None = 10) -> list[Occurrence]:
        """The first `limit` occurrences of `ids` in corpus order; all of them when `limit` is None."""
        low, high = self._interval(check_ids(ids, self.vocab_size, "query"))
        limit = high - low if limit is None else check_integer(limit, "limit")
        places = self._places(low, high)
        if limit < len(places):
            places = np.partition(places, limit - 1)[:limit]
        places = np.sort(places)
        numbers = self._documents_at(places)
        offsets = places - self.arrays.starts[numbers]
        return [
            Occurrence(self.document_ids[number], offset)
            for number, offset in zip(numbers.tolist(), offsets.tolist(), strict=True)
        ]

    def matches(self, ids: ArrayLike) -> Ids:
        """Length of the longest match that starts at each token of `ids`, shape (n,)."""
        query = check_ids(ids, self.vocab_size, "query")
        return np.asarray(_search.find_matches(*self.arrays[:3], query))

    def longest_suffix(self, ids: ArrayLike) -> Interval:
        """The interval of the longest suffix of `ids` that the corpus holds; that of nothing may be it."""
        query = check_ids(ids, self.vocab_size, "query")
        low, high, length = map(int, _search.find_longest_suffix(*self.arrays[:3], query))
        index_format.check_ranks(low, high, self.path)
        return Interval(low, high, length)

    def extend(self, intervals: ArrayLike, tokens: ArrayLike) -> Ids:
        """The intervals of spans that are each followed by one of several tokens.

        Parameters
        ----------
        intervals:
            Intervals that this index gave, shape (..., 3).
        tokens:
            Token ids, shape (..., K): each interval is extended by the K tokens of its row.

        Returns
        -------
        array of shape (..., K, 3)
            Their counts are `[..., 1] - [..., 0]`: 0 where the corpus never goes on like that.

        Raises
        ------
        VocabularyError
            Ids outside the vocabulary, or not integers.
        ParameterError
            The intervals are not of this index, or their shape does not fit that of the tokens.
        """
        kept, following = np.asarray(intervals), np.asarray(tokens)
        ids = check_ids(following.ravel(), self.vocab_size, "continuation")
        if kept.shape != (*following.shape[:-1], 3) or not following.ndim or not self._are_mine(kept):
            raise ParameterError(
                "The intervals cannot be extended.",
                given=f"intervals of shape {kept.shape} and tokens of shape {following.shape}: {kept!r:.80}",
                expected="intervals (..., 3) that this index gave, and tokens (..., K)",
                mend="take the intervals from index.longest_suffix or index.extend",
            )
        rows = kept.reshape(-1, 3).astype(np.int64)
        found = _search.find_extensions(*self.arrays[:2], rows, ids.reshape(len(rows), following.shape[-1]))
        lengths = np.broadcast_to(rows[:, None, 2:] + 1, (*found.shape[:2], 1))
        return np.concatenate([found, lengths], axis=2).reshape(*following.shape, 3)

    def _are_mine(self, intervals: NDArray[Any]) -> bool:
        if intervals.dtype.kind not in "iu":
            return False
        low, high, length = np.moveaxis(intervals, -1, 0)
        return bool(((low >= 0) & (low <= high) & (high <= self.n_tokens) & (length >= 0)).all())

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
        low, high, length = self.longest_suffix(ids)
        if length == 0:
            counts = self.arrays.unigrams
        else:
            places = self._places(low, high) + length
            index_format.check_places(places - 1, len(self.arrays.tokens), self.path)
            following = self.arrays.tokens[places]
            index_format.check_ids_of(following, self.vocab_size, self.path)
            counts = np.bincount(following, minlength=self.vocab_size)[: self.vocab_size]
        tokens = np.flatnonzero(counts)
        order = np.argsort(-counts[tokens], kind="stable")
        return tokens[order], np.asarray(counts[tokens[order]], dtype=np.int64)

    @cached_property
    def surprisal(self) -> NDArray[np.float64]:
        """`-log p(t)` of each id, shape (vocab_size,), in nats.

        `p` is the unigram probability over the indexed tokens with one added to each count, so ids
        that never occur are finite: `(count + 1) / (n_tokens + vocab_size)`.
        """
        return laplace_surprisal(self.arrays.unigrams, self.n_tokens, self.vocab_size)

    # ------------------------------------------------------------------ parts of queries

    def _holders(self, query: Ids, length: int) -> list[tuple[int, Ids]]:
        return self.windows(query, length)

    def _intervals(self, query: Ids, bounds: Ids) -> Ids:
        found: Ids = _search.find_intervals(*self.arrays[:3], query, bounds)  # (k, 2)
        index_format.check_ranks(found[:, 0], found[:, 1], self.path)
        return found

    def _interval(self, query: Ids) -> tuple[int, int]:
        low, high = map(int, _search.find_interval(*self.arrays[:3], query, 0, len(query)))
        index_format.check_ranks(low, high, self.path)
        return low, high

    def _places(self, low: int, high: int) -> Ids:
        places = self.arrays.suffixes[low:high].astype(np.int64)
        index_format.check_places(places, len(self.arrays.tokens), self.path)
        return places

    def _documents_at(self, places: Ids) -> Ids:
        return np.searchsorted(self.arrays.starts, places, side="right").astype(np.int64) - 1

    def windows(self, ids: ArrayLike, length: int) -> list[tuple[int, Ids]]:
        """Number of each document that holds windows of `length` query tokens, and their sorted starts."""
        query = check_ids(ids, self.vocab_size, "query")
        if len(query) < length:
            return []
        starts = np.arange(len(query) - length + 1)
        intervals = self._intervals(query, np.stack([starts, starts + length], axis=1))  # (windows, 2)
        low, high = intervals[:, 0], intervals[:, 1]
        hits = np.flatnonzero(high > low)
        if len(hits) == 0:
            return []
        # the same window may recur without end, and so may its places: they are looked up once
        hits = hits[np.argsort(low[hits], kind="stable")]
        firsts = np.flatnonzero(np.diff(low[hits], prepend=-1))
        pairs = []
        for same in np.split(hits, firsts[1:]):
            numbers = np.unique(self._documents_at(self._places(low[same[0]], high[same[0]])))
            pairs.append(np.add.outer(numbers * len(query), same).ravel())
        holders, starts = np.divmod(np.sort(np.concatenate(pairs)), len(query))
        firsts = np.flatnonzero(np.diff(holders, prepend=-1))
        return list(zip(holders[firsts].tolist(), np.split(starts, firsts[1:]), strict=True))


# ---------------------------------------------------------------------- checks of input


def _check_names(document_ids: Sequence[str] | None, n_documents: int) -> list[str]:
    names = [str(i) for i in range(n_documents)] if document_ids is None else list(document_ids)
    if len(names) != n_documents or not all(isinstance(name, str) and is_utf8(name) for name in names):
        raise CorpusError(
            "The document ids do not fit the documents.",
            given=f"{len(names)} ids, such as {names[:3]}, for {n_documents} documents",
            expected="one string per document",
            mend="leave document_ids out to number the documents",
        )
    check_documents((Document(name, "") for name in names), origin="arrays")
    return names


def _encode(tokenizer: Any, documents: Sequence[Document]) -> Iterator[Ids]:
    """Token ids of each text; batches let the tokenizer use all cores and the bar move."""
    with progress(description="Encoding documents", total=len(documents), unit=" documents") as bar:
        for first in range(0, len(documents), _ENCODE_BATCH):
            texts = [document.text for document in documents[first : first + _ENCODE_BATCH]]
            for ids in tokenizer(texts, **PLAIN)["input_ids"]:
                yield np.array(ids, dtype=np.int64)
            bar.update(len(texts))
