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

from bisect import bisect
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydivsufsort import divsufsort

from tracealign_lib.compiled import HAS_NUMBA, compiled

Ids = NDArray[np.int64]


class CorpusArrays(NamedTuple):
    """A corpus of token ids and its sorted suffixes."""

    tokens: NDArray[Any]  # (n_tokens + n_documents,) with separators
    suffixes: NDArray[Any]  # (n_tokens,) positions in `tokens`, in suffix order
    keys: NDArray[np.uint64]  # (ceil(n_tokens / KEY_STEP),) see `sample_keys`
    starts: NDArray[Any]  # (n_documents + 1,) where each document starts in `tokens`
    unigrams: NDArray[Any]  # (vocab_size,) how often each id occurs


_COUNTED = 2**20

# --- sorting -------------------------------------------------------------------------------------


def sort_corpus(documents: Iterable[NDArray[Any]], vocab_size: int) -> CorpusArrays:
    """Lay documents of shape (length,) end to end, each with a separator, and sort the suffixes.

    The dtypes are little-endian and as small as the corpus allows: two or four bytes a token, four or
    eight a position. `documents` are taken one at a time; at the peak, some ten bytes a token are held.
    """
    return sort_stream(*lay_out(documents, vocab_size), vocab_size)


def lay_out(documents: Iterable[NDArray[Any]], vocab_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Documents end to end, each followed by a separator, and where each starts, (n_documents + 1,)."""
    stream = np.empty(0, dtype="<u2" if vocab_size < 2**16 else "<u4")
    starts = [0]
    for document in documents:
        ids = np.asarray(document)
        end = starts[-1] + len(ids)
        if end >= len(stream):  # in place: parts to be joined at the end would take as much memory again
            stream.resize(end + 1 + max(_COUNTED, end // 8), refcheck=False)
        stream[starts[-1] : end] = ids
        stream[end] = vocab_size
        starts.append(end + 1)
    stream.resize(starts[-1], refcheck=False)
    return stream, np.array(starts, dtype="<i8")


def sort_stream(stream: NDArray[Any], starts: NDArray[Any], vocab_size: int) -> CorpusArrays:
    """The arrays of documents that `lay_out` has laid end to end; see `sort_corpus`."""
    counts = np.zeros(vocab_size + 1, dtype="<i8")
    for first in range(0, len(stream), _COUNTED):  # bincount holds eight bytes for each token of its input
        counts += np.bincount(stream[first : first + _COUNTED], minlength=vocab_size + 1)
    suffixes = _sort_suffixes(stream, counts, n_tokens=len(stream) - len(starts) + 1)
    return CorpusArrays(stream, suffixes, sample_keys(stream, suffixes), starts, counts[:vocab_size])


def _sort_suffixes(stream: NDArray[Any], counts: Ids, n_tokens: int) -> NDArray[Any]:
    """The positions of all suffixes that start with a token, in order.

    divsufsort sorts bytes. Tokens are spelled in as few as keep their order (`byte_code`), all suffixes of
    the spelling are sorted, and those that start in the middle of a token are dropped. The separator is the
    greatest id: suffixes that start with it come last, and are left out.
    """
    if not HAS_NUMBA:
        wide: NDArray[Any] = divsufsort(stream)  # half as fast, with half as much memory again
        return wide[:n_tokens].astype(_place_dtype(stream))
    code = byte_code(counts)
    size = int((code.lengths.astype(np.int64) * counts).sum())
    spelled, marks = _spell(stream, size, *code)
    order: NDArray[Any] = divsufsort(spelled)  # int32, int64 from 2^31 bytes on
    _keep_token_starts(order, marks, _marks_before(marks), n_tokens)
    kept = order[:n_tokens]
    return kept if len(stream) < 2**31 and kept.dtype == np.int32 else kept.astype(_place_dtype(stream))


def _place_dtype(stream: NDArray[Any]) -> str:
    return "<i4" if len(stream) < 2**31 else "<i8"


class ByteCode(NamedTuple):
    """How each id is spelled in bytes; spellings are in the order of the ids, and none begins another."""

    values: NDArray[np.uint32]  # (ids,) the spelling, its first byte highest
    lengths: NDArray[np.uint8]  # (ids,) bytes


def byte_code(counts: Ids) -> ByteCode:
    """A short order-preserving byte code for ids that occur `counts` (ids,) times.

    The most frequent ids get one byte each. The ids between two of them share first bytes, each of which
    serves 256 ids with two bytes (or 256^2 with three, where there are too many ids). Single bytes are
    given out as long as 256 first bytes suffice.
    """
    n_ids = len(counts)
    extra = next(n for n in (1, 2, 3) if -(-n_ids // 256**n) <= 128)
    block = 256**extra
    singles = [-1, n_ids]  # sorted, with both ends
    used = -(-n_ids // block)
    for single in np.argsort(-counts, kind="stable").tolist():
        place = bisect(singles, single)
        left, right = single - singles[place - 1] - 1, singles[place] - single - 1
        cost = 1 + -(-left // block) - (-right // block) + (-(left + 1 + right) // block)
        if used + cost <= 256:
            used += cost
            singles.insert(place, single)
        if used == 256 or counts[single] == 0:
            break
    values, lengths = np.empty(n_ids, dtype=np.uint32), np.full(n_ids, 1 + extra, dtype=np.uint8)
    first = 0
    for left, right in pairwise(singles):
        inside = np.arange(right - left - 1, dtype=np.uint32)
        values[left + 1 : right] = first * block + inside
        first += -(-len(inside) // block)
        if right < n_ids:
            values[right], lengths[right] = first, 1
            first += 1
    return ByteCode(values, lengths)


@compiled
def _spell(
    stream: NDArray[Any], size: int, values: NDArray[np.uint32], lengths: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """The bytes of all tokens, and one bit for each byte that says whether a token starts there."""
    spelled = np.empty(size, dtype=np.uint8)
    marks = np.zeros(size // 64 + 1, dtype=np.uint64)
    place = np.int64(0)
    for token in stream:
        value, length = values[token], np.int64(lengths[token])
        marks[place >> 6] |= np.uint64(1) << np.uint64(place & 63)
        for k in range(length):
            spelled[place + k] = (value >> np.uint32(8 * (length - 1 - k))) & np.uint32(255)
        place += length
    return spelled, marks


@compiled
def _ones(word: np.uint64) -> int:
    """How many bits of a word are set."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def _marks_before(marks: NDArray[np.uint64]) -> Ids:
    """How many bits are set before each word."""
    before = np.empty(len(marks), dtype=np.int64)
    total = 0
    for i in range(len(marks)):
        before[i] = total
        total += _ones(marks[i])
    return before


@compiled
def _keep_token_starts(order: NDArray[Any], marks: NDArray[np.uint64], before: Ids, n_kept: int) -> None:
    """Put the first `n_kept` places at which a token starts to the front, as numbers of tokens, in place."""
    kept = 0
    for rank in range(len(order)):
        if kept == n_kept:
            break
        place = np.int64(order[rank])
        word, bit = marks[place >> 6], np.uint64(1) << np.uint64(place & 63)
        if word & bit:
            order[kept] = before[place >> 6] + _ones(word & (bit - np.uint64(1)))
            kept += 1


KEY_STEP = 64
"""Ranks from one sampled key to the next."""


def sample_keys(tokens: NDArray[Any], suffixes: NDArray[Any]) -> NDArray[np.uint64]:
    """The first 64 bits of tokens of every `KEY_STEP`-th suffix: four of 16 bits or two of 32.

    They rise with the rank and fit into a processor's cache, so a search among them finds out without a
    visit to the corpus between which two of them a query lies.
    """
    places = np.asarray(suffixes[::KEY_STEP], dtype=np.int64)
    keys = np.zeros(len(places), dtype=np.uint64)
    for k in range(8 // tokens.itemsize):
        inside = places + k < len(tokens)
        ids = np.where(inside, tokens[np.where(inside, places + k, 0)], 0).astype(np.uint64)
        keys = (keys << np.uint64(8 * tokens.itemsize)) | ids
    return keys


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


# --- searching -----------------------------------------------------------------------------------


@compiled
def _between_keys(keys: NDArray[np.uint64], width: int, query: Ids, start: int, end: int, after: bool) -> int:
    """How many keys `query[start:end]` surely passes: they are smaller, or with `after`, not greater."""
    wanted, filler = np.uint64(0), np.uint64(2**width - 1 if after else 0)
    for k in range(64 // width):
        part = np.uint64(query[start + k]) if start + k < end else filler
        wanted = (wanted << np.uint64(width)) | part
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high) // 2
        if keys[middle] < wanted or (after and keys[middle] == wanted):
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def search(
    tokens: NDArray[Any],
    suffixes: NDArray[Any],
    keys: NDArray[np.uint64],
    query: Ids,
    start: int,
    end: int,
    after: bool,
) -> tuple[int, int]:
    """Rank where `query[start:end]` belongs, and how much of it some suffix shares.

    With `after`, suffixes that begin with the whole of it are passed over. The two suffixes next to
    the result have been looked at, so the second value is the longest prefix that the corpus holds.
    """
    width = tokens.itemsize * 8
    # a key equals that of many ranks, and decides for a query only where it differs from the query's
    first = _between_keys(keys, width, query, start, end, False)
    last = _between_keys(keys, width, query, start, end, True)
    # the suffix of the last smaller key is passed, and that of the first greater one is not; both are
    # among those looked at all the same, for what they share
    low = max(0, (first - 1) * KEY_STEP)
    high = min(last * KEY_STEP + 1, len(suffixes))
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


@compiled
def find_interval(
    tokens: NDArray[Any], suffixes: NDArray[Any], keys: NDArray[np.uint64], query: Ids, start: int, end: int
) -> tuple[int, int]:
    """Ranks `[low, high)` of the suffixes that begin with `query[start:end]`; empty if none does."""
    low, shared = search(tokens, suffixes, keys, query, start, end, False)
    if shared < end - start:
        return low, low
    return low, search(tokens, suffixes, keys, query, start, end, True)[0]


@compiled
def _next_beyond(
    tokens: NDArray[Any], suffixes: NDArray[Any], keys: NDArray[np.uint64], query: Ids, start: int, reach: int
) -> tuple[int, int]:
    """The first start behind `start` whose longest match ends behind `reach < n`, and its length.

    Matches never end further left than those of earlier starts, so that start can be bisected. A text that
    copies `n` tokens takes `log n` searches, not `n`, each of which compares `n` tokens.
    """
    absent, present, length, step = start, reach + 1, -1, 1
    while present - absent > 1:
        at = min(absent + step, (absent + present) // 2)  # the next one is mostly near
        shared = search(tokens, suffixes, keys, query, at, len(query), False)[1]
        if at + shared > reach:
            present, length = at, shared
        else:
            absent, step = at, 2 * step
    if length < 0:
        length = search(tokens, suffixes, keys, query, present, len(query), False)[1]
    return present, length


@compiled
def find_matches(tokens: NDArray[Any], suffixes: NDArray[Any], keys: NDArray[np.uint64], query: Ids) -> Ids:
    """Length of the longest match that starts at each token of `query` (n,), shape (n,)."""
    lengths = np.empty(len(query), dtype=np.int64)
    start, reach = -1, -1
    while reach < len(query):
        following, length = _next_beyond(tokens, suffixes, keys, query, start, reach)
        for inside in range(start + 1, following):  # matches that end where the last one does
            lengths[inside] = reach - inside
        start, reach = following, following + length
        if start < len(query):
            lengths[start] = length
    for inside in range(start + 1, len(query)):
        lengths[inside] = reach - inside
    return lengths


@compiled
def find_maximal_spans(
    tokens: NDArray[Any], suffixes: NDArray[Any], keys: NDArray[np.uint64], query: Ids, min_length: int
) -> Ids:
    """Start, end and count of each maximal matching span of `min_length` or more, shape (spans, 3)."""
    found = np.empty((len(query), 3), dtype=np.int64)
    kept = 0
    start, reach = -1, -1
    while reach < len(query):
        # the longest match of a start; one that ends where an earlier one ends lies inside it
        start, length = _next_beyond(tokens, suffixes, keys, query, start, reach)
        reach = start + length
        if length >= min_length:
            low, high = find_interval(tokens, suffixes, keys, query, start, reach)
            found[kept, 0], found[kept, 1], found[kept, 2] = start, reach, high - low
            kept += 1
    return found[:kept]


@compiled
def find_intervals(
    tokens: NDArray[Any], suffixes: NDArray[Any], keys: NDArray[np.uint64], query: Ids, bounds: Ids
) -> Ids:
    """Ranks `[low, high)` of each `query[start:end]` of `bounds` (k, 2), shape (k, 2)."""
    intervals = np.empty((len(bounds), 2), dtype=np.int64)
    for k in range(len(bounds)):
        intervals[k] = find_interval(tokens, suffixes, keys, query, bounds[k, 0], bounds[k, 1])
    return intervals


@compiled
def find_longest_suffix(
    tokens: NDArray[Any], suffixes: NDArray[Any], keys: NDArray[np.uint64], query: Ids
) -> tuple[int, int, int]:
    """Ranks `[low, high)` and length of the longest suffix of `query` that the corpus holds."""
    # a suffix of an indexed suffix is indexed too, so the first indexed start can be bisected
    absent, present = -1, len(query)
    while present - absent > 1:
        middle = (absent + present) // 2
        low, high = find_interval(tokens, suffixes, keys, query, middle, len(query))
        if high > low:
            present = middle
        else:
            absent = middle
    low, high = find_interval(tokens, suffixes, keys, query, present, len(query))
    return low, high, len(query) - present


@compiled
def _rank_of(
    tokens: NDArray[Any], suffixes: NDArray[Any], low: int, high: int, depth: int, wanted: int
) -> int:
    """The first rank in `[low, high)` whose suffix has `wanted` or a greater id at `depth`; else `high`."""
    while low < high:
        middle = (low + high) // 2
        place = np.int64(suffixes[middle]) + depth
        # a damaged file must not make compiled code read outside the array
        if 0 <= place < len(tokens) and tokens[place] >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


@compiled
def find_extensions(tokens: NDArray[Any], suffixes: NDArray[Any], intervals: Ids, following: Ids) -> Ids:
    """Ranks `[low, high)` of spans (B,) each followed by each of `following` (B, K), shape (B, K, 2).

    `intervals` (B, 3) are the ranks of the spans and their lengths.
    """
    found = np.empty((*following.shape, 2), dtype=np.int64)
    for row in range(len(intervals)):
        begin, stop, depth = intervals[row]
        for column in range(following.shape[1]):
            token = following[row, column]
            low = _rank_of(tokens, suffixes, begin, stop, depth, token)
            found[row, column, 0] = low
            found[row, column, 1] = _rank_of(tokens, suffixes, low, stop, depth, token + 1)
    return found


def merge_windows(starts: Ids, length: int) -> tuple[tuple[int, int], ...]:
    """Intervals `(start, end)` that windows of `length` tokens at sorted `starts` (k >= 1,) cover.

    They are disjoint; windows that overlap or touch are joined.
    """
    gaps = np.flatnonzero(np.diff(starts) > length)
    begins = starts[np.concatenate([[0], gaps + 1])]
    ends = starts[np.concatenate([gaps, [len(starts) - 1]])] + length
    return tuple(zip(begins.tolist(), ends.tolist(), strict=True))
