"""One interface for what searches a corpus: an index of this library, or an engine that others built.

Whatever finds exact matches can answer two small questions: which is the longest suffix of some tokens
that the corpus holds, and which documents hold a span. An `Engine` answers these; spans, sources and the
encoding of texts follow from them here, once for all engines. `infini_gram` puts infini-gram (arXiv
2401.17377) on this machine's disk behind the interface, `infini_gram_api` its public web service.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracealign_lib.documents import Document
from tracealign_lib.errors import CorpusError, ModelError, ParameterError, TraceAlignError, VocabularyError
from tracealign_lib.index_format import hash_tokenizer
from tracealign_lib.queries import check_ids, check_integer
from tracealign_lib.suffix_array import Ids, merge_windows

# Calls of a tokenizer: nothing added, nothing cut off, and no warning about a length.
PLAIN: dict[str, Any] = {
    "add_special_tokens": False,
    "truncation": False,
    "padding": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}


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


class EngineError(TraceAlignError):
    """An engine of others is not installed, cannot be reached, or did not answer as it promises."""


class Surprisal(Protocol):
    """Looks up `-log p(t)` in nats: ids of shape (n,) give values of shape (n,)."""

    def __getitem__(self, ids: Any, /) -> NDArray[np.float64]: ...


class Suffix(NamedTuple):
    """The longest suffix of some query tokens that the corpus holds: tokens from `start` on.

    It occurs `count` times, `following` times with the next query token behind it.
    """

    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, as in index.Span
    following: int


class Engine(ABC):
    """What is asked of a searchable corpus; the calls and their answers are those of `TraceIndex`.

    Attributes
    ----------
    vocab_size:
        Ids run from 0 to `vocab_size - 1`.
    n_tokens:
        Size of the corpus; separators are not counted.
    tokenizer:
        A fast tokenizer of transformers, or None where the corpus came as token ids.
    tokenizer_hash:
        See `hash_tokenizer`; None without a tokenizer.
    """

    vocab_size: int
    n_tokens: int
    tokenizer: Any
    tokenizer_hash: str | None

    @property
    @abstractmethod
    def surprisal(self) -> Surprisal:
        """`-log p(t)` of ids in nats, `p` smoothed as in `laplace_surprisal`."""

    @abstractmethod
    def count(self, ids: ArrayLike) -> int:
        """How often `ids` occur in the corpus, within one document each time."""

    @abstractmethod
    def spans(self, ids: ArrayLike, *, min_length: int = 1, max_count: int | None = None) -> list[Span]:
        """The maximal matching spans of a query, from left to right; see `TraceIndex.spans`."""

    @abstractmethod
    def locate(self, ids: ArrayLike, *, limit: int | None = 10) -> list[Occurrence]:
        """Where `ids` occur: the first `limit` occurrences, in the order of the corpus if the engine can."""

    @abstractmethod
    def continuations(self, ids: ArrayLike) -> tuple[Ids, Ids]:
        """What follows the longest suffix of `ids` that the corpus holds, and how often; frequent first."""

    @abstractmethod
    def document(self, document_id: str) -> Document:
        """A document by its id, with as much of its text as the engine gives."""

    @abstractmethod
    def document_tokens(self, document_id: str) -> Ids:
        """The token ids of a document, shape (n,)."""

    @abstractmethod
    def _holders(self, query: Ids, length: int) -> Iterable[tuple[int, Ids]]:
        """Numbers of documents, and the sorted starts of the query windows of `length` tokens they hold."""

    @abstractmethod
    def _name(self, number: int) -> str:
        """The id of a document."""

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
            The corpus came as token ids, without a tokenizer.
        ParameterError
            `text` is not a string, or holds lone surrogates, which no encoding can represent.
        """
        if self.tokenizer is None:
            raise ModelError(
                "The index holds no tokenizer.",
                given=repr(self),
                expected="an index of documents, or one that was opened with a tokenizer",
                mend="encode the text yourself and pass ids, or build the index from documents",
            )
        if not isinstance(text, str) or not is_utf8(text):
            raise ParameterError(
                "The text cannot be encoded.",
                given=repr(text)[:80],
                expected="a string that can be written as UTF-8",
                mend='replace lone surrogates: text.encode("utf-8", "replace").decode()',
            )
        encoding = self.tokenizer(text, return_offsets_mapping=True, **PLAIN)
        ids = np.array(encoding["input_ids"], dtype=np.int64)  # (n,)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)  # (n, 2)
        return ids, offsets

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
        query = check_ids(ids, self.vocab_size, "query")
        min_length = check_integer(min_length, "min_length")
        limit = None if limit is None else check_integer(limit, "limit")
        ranked: list[tuple[float, int, tuple[tuple[int, int], ...]]] = []
        for number, windows in self._holders(query, min_length):
            covered = merge_windows(windows, min_length)
            score = sum(float(self.surprisal[query[start:end]].sum()) for start, end in covered)
            # rounded, or the order of additions would decide between documents that tie
            ranked.append((-round(score, 9), number, covered))
        ranked.sort()
        return [Source(self._name(n), -negative, covered) for negative, n, covered in ranked[:limit]]


class Listed:
    """Looks documents up for an engine that lists the ids of all of them."""

    @property
    @abstractmethod
    def document_ids(self) -> tuple[str, ...]:
        """The ids of all documents, in corpus order."""

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.document_ids)}

    def __contains__(self, document_id: object) -> bool:
        """Whether the corpus holds a document of that id."""
        return isinstance(document_id, str) and document_id in self._numbers

    def _number(self, document_id: str) -> int:
        if document_id not in self:
            raise unknown_document(document_id, self.document_ids)
        return self._numbers[document_id]

    def _name(self, number: int) -> str:
        return self.document_ids[number]


class SuffixEngine(Engine):
    """An engine that answers one question about suffixes at a time; spans are put together from few of them.

    Attributes
    ----------
    reach:
        The longest query that the engine answers at once, in tokens.
    """

    reach: int

    @abstractmethod
    def _longest_suffix(self, query: Ids, start: int, end: int) -> Suffix:
        """The longest suffix of `query[start:end]` that the corpus holds; `start` counts from the query's."""

    def spans(self, ids: ArrayLike, *, min_length: int = 1, max_count: int | None = None) -> list[Span]:
        """The maximal matching spans of a query, from left to right; see `TraceIndex.spans`.

        Raises
        ------
        ParameterError
            A length or count is below 1, or a match is longer than `reach`.
        VocabularyError
            `ids` are not token ids of the vocabulary.
        """
        query = check_ids(ids, self.vocab_size, "query")
        min_length = check_integer(min_length, "min_length")
        most = math.inf if max_count is None else check_integer(max_count, "max_count")

        def longest_suffix(start: int, end: int) -> Suffix:
            return self._longest_suffix(query, start, end)

        found = find_spans(len(query), longest_suffix, min_length=min_length, reach=self.reach)
        return [span for span in found if span.count <= most]


def find_spans(
    length: int, longest_suffix: Callable[[int, int], Suffix], *, min_length: int, reach: int
) -> list[Span]:
    """The maximal matching spans of `length` query tokens, from few questions about suffixes.

    The longest suffix that ends at a place never starts before the one that ends further left. So where
    two ends share a start, nothing between them has to be asked; nor where every span between them would
    be shorter than `min_length`. Bisection asks for the rest: a text copied in one piece takes one
    question, a text without matches at most `2 * length / min_length`, and no text more than `length`.

    Parameters
    ----------
    length:
        Number of query tokens.
    longest_suffix:
        `longest_suffix(start, end)` answers for query tokens `[start, end)`.
    min_length:
        Shorter spans are left out (tokens).
    reach:
        `end - start` never exceeds this.

    Raises
    ------
    ParameterError
        A match is longer than `reach`.
    """
    known = {0: (0, 0)}  # end -> start and count of the longest suffix there

    def ask(left: int, end: int) -> None:
        if end not in known:
            suffix = longest_suffix(known[left][0], end)
            known[end] = suffix.start, suffix.count
            if suffix.following and end < length:
                known.setdefault(end + 1, (suffix.start, suffix.following))

    low = 0
    while low < length:
        high = min(length, known[low][0] + reach)
        if high <= low:
            raise _too_long(low, reach)
        ask(low, high)
        pending = [(low, high)]
        while pending:
            left, right = pending.pop()
            start = known[left][0]
            if right - left < 2 or start == known[right][0] or right - 1 - start < min_length:
                continue
            middle = (left + right) // 2
            ask(left, middle)
            pending += [(left, middle), (middle, right)]
        low = high
    spans = [Span(start, end, count) for end, (start, count) in sorted(known.items())]
    maximal = [span for span, after in zip(spans, [*spans[1:], None], strict=True) if not _grows(span, after)]
    return [span for span in maximal if span.end - span.start >= min_length]


def laplace_surprisal(counts: NDArray[Any] | float, n_tokens: int, vocab_size: int) -> NDArray[np.float64]:
    """`-log((count + 1) / (n_tokens + vocab_size))` in nats, the shape of `counts`; as in `TraceIndex`."""
    return np.asarray(np.log(n_tokens + vocab_size) - np.log(np.asarray(counts) + 1.0), dtype=np.float64)


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id of a tokenizer, added tokens included."""
    return 1 + int(max(tokenizer.get_vocab().values()))


def unknown_document(document_id: object, known: Sequence[str]) -> ParameterError:
    """The error to raise when none of the documents of an engine has that id."""
    return ParameterError(
        "The index holds no document of that id.",
        given=repr(document_id),
        expected=f"one of {len(known)} ids, such as {known[0]!r}",
        mend="look into index.document_ids",
    )


def no_texts(path: Path) -> CorpusError:
    """The error to raise when an index of token ids is asked for a text."""
    return CorpusError(
        "The index holds no texts.",
        given=str(path),
        expected="an index that was built from documents, with `build`",
        mend="use document_tokens, or build the index from documents",
    )


def _grows(span: Span, after: Span | None) -> bool:
    """Whether the span that ends next starts at the same token."""
    return after is not None and after.start == span.start


def _too_long(end: int, reach: int) -> ParameterError:
    return ParameterError(
        "A match is longer than the engine can look up at once.",
        given=f"the {reach} tokens before position {end} occur as a whole",
        expected=f"matches of fewer than {reach} tokens",
        mend="cut the text into pieces, or index the corpus on this machine",
    )


def is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
