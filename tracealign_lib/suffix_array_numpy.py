"""The searches of `suffix_array` without compiled loops: every binary search of a query goes on at once.

Same arguments, same answers. The index uses these where numba is not installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracealign_lib.suffix_array import KEY_STEP, Ids

_CHUNK = 16
"""Tokens compared at once; what they do not decide is compared again, further on."""

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[np.uint64]]


def search(arrays: Arrays, query: Ids, starts: Ids, ends: Ids, *, after: bool) -> tuple[Ids, Ids]:
    """Where each `query[start:end]` (k,) belongs, and how much of it some suffix shares; shape (k,) each.

    As `suffix_array.search`, for many parts of a query.
    """
    tokens, suffixes, keys = arrays
    width = 8 * tokens.itemsize
    first = np.searchsorted(keys, _keys(query, starts, ends, width, filled=False), side="left")
    sided = _keys(query, starts, ends, width, filled=True)
    low: Ids = np.maximum(0, (first - 1) * KEY_STEP)
    high: Ids = np.minimum(np.searchsorted(keys, sided, side="right") * KEY_STEP + 1, len(suffixes))
    shared_low, shared_high, longest = np.zeros((3, len(starts)), dtype=np.int64)
    while (open_ := np.flatnonzero(low < high)).size:
        middle = (low[open_] + high[open_]) // 2
        places = suffixes[middle].astype(np.int64)
        # a damaged file must not make the comparison read outside the array
        places[(places < 0) | (places >= len(tokens))] = len(tokens)
        depth = np.minimum(shared_low[open_], shared_high[open_])
        depth = _share(tokens, query, places, starts[open_], ends[open_], depth)
        longest[open_] = np.maximum(longest[open_], depth)
        theirs, ours = places + depth, starts[open_] + depth
        passed = np.where(ours == ends[open_], after, theirs >= len(tokens))
        undecided = (ours < ends[open_]) & (theirs < len(tokens))
        passed[undecided] = tokens[theirs[undecided]] < query[ours[undecided]]
        below, above = open_[passed], open_[~passed]
        low[below], shared_low[below] = middle[passed] + 1, depth[passed]
        high[above], shared_high[above] = middle[~passed], depth[~passed]
    return low, longest


def _keys(query: Ids, starts: Ids, ends: Ids, width: int, *, filled: bool) -> NDArray[np.uint64]:
    """The first 64 bits of each part of a query, with zeros or, `filled`, with ones behind its end."""
    keys = np.zeros(len(starts), dtype=np.uint64)
    for k in range(64 // width):
        inside = starts + k < ends
        ids = np.full(len(starts), 2**width - 1 if filled else 0, dtype=np.uint64)
        ids[inside] = query[starts[inside] + k]
        keys = (keys << np.uint64(width)) | ids
    return keys


def _share(tokens: NDArray[Any], query: Ids, places: Ids, starts: Ids, ends: Ids, depth: Ids) -> Ids:
    """How many tokens each suffix shares with its part of the query, of which `depth` (k,) are known."""
    depth = depth.copy()
    steps = np.arange(_CHUNK)
    going = np.arange(len(depth))
    while going.size:
        theirs = (places[going] + depth[going])[:, None] + steps  # (k, _CHUNK)
        ours = (starts[going] + depth[going])[:, None] + steps
        inside = (theirs < len(tokens)) & (ours < ends[going, None])
        same = inside & (tokens[np.where(inside, theirs, 0)] == query[np.where(inside, ours, 0)])
        run = np.where(same.all(axis=1), _CHUNK, same.argmin(axis=1))
        depth[going] += run
        going = going[run == _CHUNK]
    return depth


def find_interval(*arguments: Any) -> tuple[int, int]:
    """Ranks `[low, high)` of the suffixes that begin with `query[start:end]`; empty if none does."""
    *arrays, query, start, end = arguments
    low, high = _intervals(tuple(arrays), query, np.array([start]), np.array([end]))[0].tolist()
    return low, high


def _intervals(arrays: Arrays, query: Ids, starts: Ids, ends: Ids) -> Ids:
    low, shared = search(arrays, query, starts, ends, after=False)
    high, _ = search(arrays, query, starts, ends, after=True)
    return np.stack([low, np.where(shared < ends - starts, low, high)], axis=1)


def find_matches(tokens: NDArray[Any], suffixes: NDArray[Any], keys: NDArray[np.uint64], query: Ids) -> Ids:
    """Length of the longest match that starts at each token of `query` (n,), shape (n,)."""
    starts = np.arange(len(query))
    ends = np.full(len(query), len(query))
    return search((tokens, suffixes, keys), query, starts, ends, after=False)[1]


def find_maximal_spans(
    tokens: NDArray[Any], suffixes: NDArray[Any], keys: NDArray[np.uint64], query: Ids, min_length: int
) -> Ids:
    """Start, end and count of each maximal matching span of `min_length` or more, shape (spans, 3)."""
    starts = np.arange(len(query))
    ends = starts + find_matches(tokens, suffixes, keys, query)
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(query) else ends
    kept = np.flatnonzero((ends > before) & (ends - starts >= min_length))
    ranks = _intervals((tokens, suffixes, keys), query, starts[kept], ends[kept])
    return np.stack([starts[kept], ends[kept], ranks[:, 1] - ranks[:, 0]], axis=1)


def find_intervals(
    tokens: NDArray[Any], suffixes: NDArray[Any], keys: NDArray[np.uint64], query: Ids, bounds: Ids
) -> Ids:
    """Ranks `[low, high)` of each `query[start:end]` of `bounds` (k, 2), shape (k, 2)."""
    return _intervals((tokens, suffixes, keys), query, bounds[:, 0], bounds[:, 1])


def find_longest_suffix(
    tokens: NDArray[Any], suffixes: NDArray[Any], keys: NDArray[np.uint64], query: Ids
) -> tuple[int, int, int]:
    """Ranks `[low, high)` and length of the longest suffix of `query` that the corpus holds."""
    reaches = np.arange(len(query)) + find_matches(tokens, suffixes, keys, query)
    start = int(np.argmax(np.append(reaches, len(query)) == len(query)))
    low, high = find_interval(tokens, suffixes, keys, query, start, len(query))
    return low, high, len(query) - start


def find_extensions(tokens: NDArray[Any], suffixes: NDArray[Any], intervals: Ids, following: Ids) -> Ids:
    """Ranks `[low, high)` of spans (B,) each followed by each of `following` (B, K), shape (B, K, 2)."""
    found = np.empty((*following.shape, 2), dtype=np.int64)
    begins, stops, depths = (np.broadcast_to(column[:, None], following.shape) for column in intervals.T)
    for after in (0, 1):
        low, high = begins.copy(), stops.copy()
        while (open_ := np.nonzero(low < high))[0].size:
            middle = (low[open_] + high[open_]) // 2
            places = suffixes[middle].astype(np.int64) + depths[open_]
            inside = (places >= 0) & (places < len(tokens))
            ids = np.where(inside, tokens[np.where(inside, places, 0)].astype(np.int64), -1)
            passed = ids < following[open_] + after
            low[open_] = np.where(passed, middle + 1, low[open_])
            high[open_] = np.where(passed, high[open_], middle)
        found[..., after] = low
    return found
