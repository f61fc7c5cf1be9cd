"""The searches without compiled loops give the answers of those with them, also on damaged arrays."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib import suffix_array, suffix_array_numpy
from tracealign_lib.suffix_array import CorpusArrays, Ids, sort_corpus

QUIET = settings(deadline=None, derandomize=True, database=None, max_examples=120)


def corpus(seed: int, words: int, vocab_size: int, n: int) -> CorpusArrays:
    """Documents of a few words of a large vocabulary, with repeated passages, and an empty one."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(vocab_size, words, replace=False))
    documents = [ids[rng.integers(0, words, rng.integers(1, n))] for _ in range(6)]
    return sort_corpus([*documents, documents[0][:0], np.tile(documents[1], 3)], vocab_size)


def query_of(arrays: CorpusArrays, seed: int) -> Ids:
    """Passages of the corpus with foreign tokens between them."""
    rng = np.random.default_rng(seed)
    vocab_size = len(arrays.unigrams)
    parts = []
    for place in rng.integers(0, len(arrays.tokens), 3).tolist():
        parts += [arrays.tokens[place : place + rng.integers(0, 30)], rng.integers(0, vocab_size, 1)]
    query = np.concatenate(parts).astype(np.int64)
    return query[query < vocab_size]


@QUIET
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 3), (2, 3), (4, 300), (200, 20_000), (9, 70_000)]),
    st.sampled_from([5, 60, 400]),
)
def test_the_same_answers(seed: int, sizes: tuple[int, int], n: int) -> None:
    arrays = corpus(seed, *sizes, n)
    query = query_of(arrays, seed)
    searched: list[Any] = []
    for module in (suffix_array, suffix_array_numpy):
        three: Any = arrays[:3]
        rng = np.random.default_rng(seed)
        cuts = np.sort(rng.integers(0, len(query) + 1, (8, 2)))
        longest = module.find_longest_suffix(*three, query)
        kept = np.array([longest, (0, len(arrays.suffixes), 0)])
        following = rng.integers(0, sizes[1], (2, 5))
        searched.append(
            [
                [module.find_interval(*three, query, start, end) for start, end in cuts.tolist()],
                module.find_matches(*three, query).tolist(),
                [module.find_maximal_spans(*three, query, length).tolist() for length in (1, 4)],
                module.find_intervals(*three, query, cuts).tolist(),
                longest,
                module.find_extensions(*three[:2], kept, following).tolist(),
            ]
        )
    assert searched[0] == searched[1]


@st.composite
def copies(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Documents that repeat themselves and one another, and a text of long pieces of them."""
    blocks = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=3))
    several = st.lists(st.sampled_from(blocks), min_size=1, max_size=12)
    documents = [list(chain(*draw(several)))[:300] for _ in range(draw(st.integers(1, 4)))]
    query: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        document = draw(st.sampled_from(documents))
        start = draw(st.integers(0, len(document) - 1))
        query += document[start : start + draw(st.integers(1, 300))]
        query += draw(st.lists(st.integers(0, 3), max_size=2))  # the id 3 lies in no document
    return documents, query[:300]


@QUIET
@given(copies(), st.integers(1, 40))
def test_the_same_answers_on_long_copies_and_repeats(
    texts: tuple[list[list[int]], list[int]], min_length: int
) -> None:
    documents, ids = texts
    arrays: Any = sort_corpus([np.array(document) for document in documents], 4)[:3]
    query, within = np.array(ids, dtype=np.int64), ["".join(map(str, document)) for document in documents]
    part, ends = "".join(map(str, ids)), [0]
    for start in range(len(part)):
        end = max(start, ends[-1])
        while end < len(part) and any(part[start : end + 1] in text for text in within):
            end += 1
        ends.append(end)
    maximal = [[s, e] for s, (before, e) in enumerate(pairwise(ends)) if e > before and e - s >= min_length]
    for module in (suffix_array, suffix_array_numpy):
        assert module.find_matches(*arrays, query).tolist() == [e - s for s, e in enumerate(ends[1:])]
        spans = module.find_maximal_spans(*arrays, query, min_length).tolist()
        assert [span[:2] for span in spans] == maximal
        assert [span[2] for span in spans] == [
            sum(text.startswith(part[s:e], i) for text in within for i in range(len(text)))
            for s, e in maximal
        ]


@pytest.mark.parametrize("length", [0, 1, 40])
def test_the_longest_match_of_each_token(length: int) -> None:
    arrays = corpus(5, 3, 4, 60)
    query = query_of(arrays, 8)[:length]
    found = suffix_array_numpy.find_matches(*arrays[:3], query).tolist()
    text = "".join(map(chr, arrays.tokens))
    part = "".join(map(chr, query.tolist()))
    expected = [max(n for n in range(len(part) - s + 1) if part[s : s + n] in text) for s in range(len(part))]
    assert found == expected


@pytest.mark.parametrize("place", [-1, -(2**31), 2**31 - 1])
def test_damaged_places_are_never_followed(place: int) -> None:
    arrays = corpus(1, 3, 4, 60)
    broken = arrays.suffixes.copy()
    broken[::2] = place
    query = query_of(arrays, 1)
    kept = np.array([[0, len(broken), 1]])
    for module in (suffix_array, suffix_array_numpy):
        found = module.find_maximal_spans(arrays.tokens, broken, arrays.keys, query, 1)
        assert ((found >= 0) & (found <= len(broken))).all()
        ranks = module.find_extensions(arrays.tokens, broken, kept, np.array([[0, 1]]))
        assert ((ranks >= 0) & (ranks <= len(broken))).all()
