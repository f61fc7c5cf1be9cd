"""Suffix arrays over token ids: pure functions on arrays, compiled where they search.

A suffix array lists every position of a corpus in the order of the text that starts there, so all
occurrences of a span stand side by side, and a binary search finds them: `O(k log N)` token
comparisons for a span of `k` tokens in a corpus of `N`. The construction follows the line of
infini-gram (arXiv 2401.17377).

Documents are laid end to end, each followed by a separator whose id is `vocab_size`: one more than
any id that a query may hold, so no match crosses a document boundary. The separator is also the
greatest id, so the suffixes that start at one are the last of the sorted order and are cut off.

Every function takes the arrays of `CorpusArrays`, memory-mapped or not. A query is an int64 array of
shape (n,) whose ids lie within the vocabulary. A rank is a place in `suffixes`; the occurrences of a
span are an interval of ranks `[low, high)`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray
from pydivsufsort import divsufsort

Ids = NDArray[np.int64]


class CorpusArrays(NamedTuple):
    """A corpus of token ids and its sorted suffixes."""

    tokens: NDArray[Any]  # (n_tokens + n_documents,) with separators
    suffixes: NDArray[Any]  # (n_tokens,) positions in `tokens`, in suffix order
    starts: NDArray[Any]  # (n_documents + 1,) where each document starts in `tokens`
    unigrams: NDArray[Any]  # (vocab_size,) how often each id occurs


def sort_corpus(documents: list[Ids], vocab_size: int) -> CorpusArrays:
    """Lay documents of shape (length,) end to end, each with a separator, and sort the suffixes.

    The dtypes are little-endian and as small as the corpus allows: two or four bytes a token, four or
    eight a position.
    """
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
    return CorpusArrays(stream, suffixes, starts, unigrams)


def find_disorder(tokens: NDArray[Any], suffixes: NDArray[Any], vocab_size: int) -> str | None:
    """What keeps `suffixes` (n_tokens,) from being the suffix array of `tokens`; None if it is.

    Takes linear time and memory, and does not sort again.
    """
    n_tokens = len(suffixes)
    if n_tokens == 0:
        return None
    if suffixes.min() < 0 or suffixes.max() >= len(tokens):
        return "points outside the corpus"
    ranks = np.full(len(tokens), n_tokens, dtype=suffixes.dtype)  # separators rank last
    ranks[suffixes] = np.arange(n_tokens, dtype=suffixes.dtype)
    if not np.array_equal(ranks == n_tokens, tokens >= vocab_size):
        return "is not a permutation of the corpus"
    # two suffixes are in order if their first tokens are, or if these are equal and their rests are;
    # what follows a separator is never compared with a query, so it may stand in any order
    first, rest = tokens[suffixes], ranks[suffixes + 1]
    sound = (first[:-1] < first[1:]) | ((first[:-1] == first[1:]) & (rest[:-1] <= rest[1:]))
    return None if sound.all() else f"is not sorted at rank {np.flatnonzero(~sound)[0]}"


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def search(
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
def find_interval(
    tokens: NDArray[Any], suffixes: NDArray[Any], query: Ids, start: int, end: int
) -> tuple[int, int]:
    """Ranks `[low, high)` of the suffixes that begin with `query[start:end]`; empty if none does."""
    low, shared = search(tokens, suffixes, query, start, end, 0, False)
    if shared < end - start:
        return low, low
    return low, search(tokens, suffixes, query, start, end, low, True)[0]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def find_maximal_spans(tokens: NDArray[Any], suffixes: NDArray[Any], query: Ids, min_length: int) -> Ids:
    """Start, end and count of each maximal matching span of `min_length` or more, shape (spans, 3)."""
    found = np.empty((len(query), 3), dtype=np.int64)
    kept = 0
    reach = 0
    for start in range(len(query)):
        _, length = search(tokens, suffixes, query, start, len(query), 0, False)
        # the longest match of each start; one that ends where an earlier one ends lies inside it
        if start + length > reach:
            reach = start + length
            if length >= min_length:
                low, high = find_interval(tokens, suffixes, query, start, reach)
                found[kept, 0], found[kept, 1], found[kept, 2] = start, reach, high - low
                kept += 1
    return found[:kept]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def find_windows(tokens: NDArray[Any], suffixes: NDArray[Any], query: Ids, length: int) -> Ids:
    """Ranks `[low, high)` of each window of `length <= n` query tokens, shape (n - length + 1, 2)."""
    intervals = np.empty((len(query) - length + 1, 2), dtype=np.int64)
    for start in range(len(intervals)):
        low, high = find_interval(tokens, suffixes, query, start, start + length)
        intervals[start, 0], intervals[start, 1] = low, high
    return intervals


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def find_longest_suffix(tokens: NDArray[Any], suffixes: NDArray[Any], query: Ids) -> tuple[int, int, int]:
    """Ranks `[low, high)` and length of the longest suffix of `query` that the corpus holds."""
    # a suffix of an indexed suffix is indexed too, so the first indexed start can be bisected
    absent, present = -1, len(query)
    while present - absent > 1:
        middle = (absent + present) // 2
        low, high = find_interval(tokens, suffixes, query, middle, len(query))
        if high > low:
            present = middle
        else:
            absent = middle
    low, high = find_interval(tokens, suffixes, query, present, len(query))
    return low, high, len(query) - present


def merge_windows(starts: Ids, length: int) -> tuple[tuple[int, int], ...]:
    """Intervals `(start, end)` that windows of `length` tokens at sorted `starts` (k >= 1,) cover.

    They are disjoint; windows that overlap or touch are joined.
    """
    gaps = np.flatnonzero(np.diff(starts) > length)
    begins = starts[np.concatenate([[0], gaps + 1])]
    ends = starts[np.concatenate([gaps, [len(starts) - 1]])] + length
    return tuple(zip(begins.tolist(), ends.tolist(), strict=True))
