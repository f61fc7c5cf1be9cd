"""The functions on arrays against what sorting and looking at every place gives."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from math import log2
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib import suffix_array
from tracealign_lib.suffix_array import (
    CorpusArrays,
    byte_code,
    find_disorder,
    find_interval,
    find_intervals,
    find_longest_suffix,
    find_maximal_spans,
    merge_windows,
    search,
    sort_corpus,
)

QUIET = settings(deadline=None, derandomize=True, database=None, max_examples=150)
WORDS = 3

documents_of_few_words = st.lists(st.lists(st.integers(0, WORDS - 1), max_size=12), min_size=1, max_size=5)
queries = st.lists(st.integers(0, WORDS), max_size=10)  # the id WORDS lies in no document


def sort(documents: list[list[int]], vocab_size: int = WORDS + 1) -> CorpusArrays:
    return sort_corpus([np.array(document, dtype=np.int64) for document in documents], vocab_size)


def as_query(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


class Reference(NamedTuple):
    documents: list[list[int]]

    def count(self, span: list[int]) -> int:
        starts = ((d, i) for d in self.documents for i in range(len(d)))
        return sum(d[i : i + len(span)] == span for d, i in starts)

    def maximal(self, query: list[int], min_length: int) -> list[list[int]]:
        n = len(query)
        counts = {(s, e): self.count(query[s:e]) for s in range(n) for e in range(s + 1, n + 1)}
        return [
            [s, e, count]
            for (s, e), count in counts.items()
            if count and not counts.get((s - 1, e)) and not counts.get((s, e + 1)) and e - s >= min_length
        ]


# --- sorting


@QUIET
@given(documents_of_few_words)
def test_the_corpus_is_laid_out_and_sorted(documents: list[list[int]]) -> None:
    arrays = sort(documents)
    separator = WORDS + 1
    stream = [token for document in documents for token in (*document, separator)]
    assert arrays.tokens.tolist() == stream
    assert [arrays.tokens[s:e].tolist() for s, e in pairwise(arrays.starts)] == [
        [*document, separator] for document in documents
    ]
    places = [place for place, token in enumerate(stream) if token != separator]
    assert arrays.suffixes.tolist() == sorted(places, key=lambda place: stream[place:])
    assert arrays.unigrams.tolist() == [stream.count(token) for token in range(WORDS + 1)]
    assert find_disorder(arrays.tokens, arrays.suffixes, WORDS + 1) is None


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16 - 1, "<u2"), (2**16, "<u4")])
def test_tokens_are_as_small_as_the_separator_allows(vocab_size: int, dtype: str) -> None:
    arrays = sort([[vocab_size - 1, 0]], vocab_size)
    assert arrays.tokens.dtype.str == dtype
    assert arrays.tokens.tolist() == [vocab_size - 1, 0, vocab_size]
    assert [a.dtype.str for a in arrays[1:]] == ["<i4", "<u8", "<i8", "<i8"]


@pytest.mark.parametrize(
    ("suffixes", "fault"),
    [
        ([0, 5, 4, 1, 7], "points outside the corpus"),
        ([0, 5, 4, 1, -1], "points outside the corpus"),
        ([0, 0, 4, 1, 2], "is not a permutation of the corpus"),
        ([0, 5, 4, 1, 3], "is not a permutation of the corpus"),  # a separator instead of a token
        ([0, 5, 4, 1, 2], None),
        ([5, 0, 4, 1, 2], "is not sorted at rank 0"),
        ([0, 5, 1, 4, 2], "is not sorted at rank 2"),
        ([2, 0, 5, 4, 1], "is not sorted at rank 0"),
    ],
)
def test_disorder_is_named(suffixes: list[int], fault: str | None) -> None:
    tokens = sort([[0, 1, 2], [1, 0]]).tokens
    assert find_disorder(tokens, np.array(suffixes, dtype="<i4"), WORDS + 1) == fault


def test_what_follows_a_separator_may_stand_in_any_order() -> None:
    tokens = sort([[0], [0, 1], [0]]).tokens
    for suffixes in ([2, 0, 5, 3], [2, 5, 0, 3]):
        assert find_disorder(tokens, np.array(suffixes), WORDS + 1) is None
    assert find_disorder(tokens, np.array([0, 2, 5, 3]), WORDS + 1) == "is not sorted at rank 0"


def test_an_empty_corpus_is_in_order() -> None:
    tokens, suffixes, *_ = sort([[], []])
    assert find_disorder(tokens, suffixes, WORDS + 1) is None


@QUIET
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=300),
    st.sampled_from([1, 200, 256, 300, 20_000, 40_000, 70_000]),
)
def test_a_byte_code_keeps_the_order_and_is_unambiguous(counts: list[int], n_ids: int) -> None:
    places = np.random.default_rng(len(counts)).choice(n_ids, min(n_ids, len(counts)), replace=False)
    every = np.zeros(n_ids, dtype=np.int64)
    every[places] = np.array(counts[: len(places)]) * 1000
    values, lengths = byte_code(every)
    spelled = [int(v).to_bytes(int(n), "big") for v, n in zip(values, lengths, strict=True)]
    assert all(a < b and not b.startswith(a) for a, b in pairwise(spelled))


def test_a_byte_code_is_short_for_frequent_ids() -> None:
    counts = np.zeros(30_000, dtype=np.int64)
    often = np.random.default_rng(0).choice(30_000, 60, replace=False)
    counts[often] = 10
    assert (byte_code(counts).lengths[often] == 1).all()
    assert byte_code(counts).lengths.max() == 2
    assert byte_code(np.ones(100_000, dtype=np.int64)).lengths.max() == 3
    assert byte_code(np.ones(128, dtype=np.int64)).lengths.max() == 1


@pytest.mark.parametrize(("words", "vocab_size"), [(2, 2), (5, 300), (300, 20_000), (9, 70_000)])
def test_a_corpus_with_many_sampled_keys(words: int, vocab_size: int) -> None:
    """Few tokens are one key; here are dozens, equal and different, with queries around each."""
    rng = np.random.default_rng(words)
    ids = np.sort(rng.choice(vocab_size, words, replace=False))
    documents = [ids[rng.integers(0, words, n)].tolist() for n in rng.integers(1, 400, 12)]
    arrays = sort(documents, vocab_size)
    tokens, suffixes, keys, *_ = arrays
    assert len(keys) > 20
    assert (np.diff(keys.astype(object)) >= 0).all()
    texts = [tokens[place:].tolist() for place in suffixes]
    assert texts == sorted(texts)
    for place in rng.integers(0, len(tokens) - 8, 150).tolist():
        query = tokens[place : place + rng.integers(1, 8)].astype(np.int64)
        query = np.where(query == vocab_size, ids[0], query)
        query[-1] = ids[rng.integers(0, words)] if place % 3 else rng.integers(0, vocab_size)
        part = query.tolist()
        low = bisect_left(texts, part)
        high = bisect_left(texts, [*part, vocab_size + 1])
        assert find_interval(tokens, suffixes, keys, query, 0, len(part)) == (low, high)
        rank, longest = search(tokens, suffixes, keys, query, 0, len(part), False)
        near = [texts[r] for r in (low - 1, low) if 0 <= r < len(texts)]
        shared = [
            next((i for i, (a, b) in enumerate(zip(t, part, strict=False)) if a != b), min(len(t), len(part)))
            for t in near
        ]
        assert (rank, longest) == (low, max(shared))


# --- searching


@QUIET
@given(documents_of_few_words, queries)
def test_search_finds_rank_and_longest_prefix(documents: list[list[int]], ids: list[int]) -> None:
    tokens, suffixes, keys, *_ = sort(documents)
    texts = [tokens[place:].tolist() for place in suffixes]
    for start in range(len(ids) + 1):
        part = ids[start:]
        rank, longest = search(tokens, suffixes, keys, as_query(ids), start, len(ids), False)
        assert rank == sum(text < part for text in texts)
        past, _ = search(tokens, suffixes, keys, as_query(ids), start, len(ids), True)
        assert past == sum(text < part or text[: len(part)] == part for text in texts)
        assert longest == max(
            (n for n in range(len(part) + 1) if Reference(documents).count(part[:n])), default=0
        )


@QUIET
@given(documents_of_few_words, queries, st.integers(1, 4))
def test_intervals_windows_spans_and_suffixes(
    documents: list[list[int]], ids: list[int], length: int
) -> None:
    tokens, suffixes, keys, *_ = sort(documents)
    reference, query = Reference(documents), as_query(ids)
    for start in range(len(ids)):
        low, high = find_interval(tokens, suffixes, keys, query, start, len(ids))
        assert high - low == reference.count(ids[start:])
        assert all(
            tokens[place : place + len(ids) - start].tolist() == ids[start:] for place in suffixes[low:high]
        )
    if length <= len(ids):
        starts = np.arange(len(query) - length + 1)
        windows = find_intervals(tokens, suffixes, keys, query, np.stack([starts, starts + length], axis=1))
        expected = [reference.count(ids[s : s + length]) for s in range(len(ids) - length + 1)]
        assert (windows[:, 1] - windows[:, 0]).tolist() == expected
    spans = find_maximal_spans(tokens, suffixes, keys, query, length)
    assert spans.shape == (len(spans), 3)
    assert spans.tolist() == reference.maximal(ids, length)
    low, high, found = find_longest_suffix(tokens, suffixes, keys, query)
    assert found == max(n for n in range(len(ids) + 1) if n == 0 or reference.count(ids[len(ids) - n :]))
    assert high - low == (reference.count(ids[len(ids) - found :]) if found else len(suffixes))


@QUIET
@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 6))
def test_merged_windows_cover_the_same_tokens(starts: set[int], length: int) -> None:
    merged = merge_windows(as_query(sorted(starts)), length)
    covered = {token for start, end in merged for token in range(start, end)}
    assert covered == {start + i for start in starts for i in range(length)}
    assert all(end < start for (_, end), (start, _) in pairwise(merged))


def test_a_long_repetitive_corpus() -> None:
    """Long shared prefixes, where a search that skips what it has compared could skip too much."""
    rng = np.random.default_rng(0)
    block = rng.integers(0, 2, 200).tolist()
    documents = [block * 2, [0] * 300, [*block[50:], 1, *block], [1] * 3, rng.integers(0, 2, 500).tolist()]
    tokens, suffixes, keys, *_ = sort(documents, 2)
    texts = ["".join(map(str, document)) for document in documents]
    for start in range(0, 400, 7):
        query = [*(block * 2)[start : start + 90], 1, *block[:start]]
        text = "".join(map(str, query))
        ends: list[int] = []
        for begin in range(len(text)):
            end = max(ends[-1] if ends else 0, begin)
            while end < len(text) and any(text[begin : end + 1] in t for t in texts):
                end += 1
            ends.append(end)
        expected = [[b, e] for b, e in enumerate(ends) if e > (ends[b - 1] if b else 0)]
        assert find_maximal_spans(tokens, suffixes, keys, as_query(query), 1)[:, :2].tolist() == expected


@pytest.mark.parametrize("name", ["find_matches", "find_maximal_spans"])
def test_a_long_copy_takes_few_searches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search from every token of a copy would compare all that is left of it, each time."""
    copies, length, searches = 8, 500, []
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 40, length + 100) for _ in range(copies)]
    tokens, suffixes, keys, *_ = sort_corpus(documents, 41)
    foreign = [40]
    query = np.concatenate([part for document in documents for part in (document[50:][:length], foreign)])

    def counted(*given: Any) -> tuple[int, int]:
        searches.append(given)
        return search(*given)

    def plain(function: Any) -> Any:
        return getattr(function, "py_func", function)  # compiled code keeps the functions that it calls

    monkeypatch.setattr(suffix_array, "search", counted)
    for calls in ("_next_beyond", "find_interval"):
        monkeypatch.setattr(suffix_array, calls, plain(getattr(suffix_array, calls)))
    more = [1] if name == "find_maximal_spans" else []
    found = plain(getattr(suffix_array, name))(tokens, suffixes, keys, query, *more)
    if more:
        assert found[:, 1].tolist() == [(length + 1) * n + length for n in range(copies)]
    assert len(searches) <= copies * (2 * log2(length) + 5)
