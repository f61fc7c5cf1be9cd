"""Maximal spans from questions about suffixes, against a reference and within the promised number."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_samples import DOCUMENTS, train_tokenizer
from numpy.typing import ArrayLike

from tracealign_lib.documents import Document
from tracealign_lib.engine import Suffix, SuffixEngine, find_spans, laplace_surprisal, vocabulary_size
from tracealign_lib.errors import ModelError, ParameterError, VocabularyError
from tracealign_lib.index import Ids, Occurrence, Span, hash_tokenizer


class Corpus:
    """Answers about suffixes by plain search, and how often it was asked."""

    def __init__(self, documents: list[str], query: str) -> None:
        self.documents, self.query = documents, query
        self.asked: list[tuple[int, int]] = []

    def count(self, span: str) -> int:
        starts = range(max(map(len, self.documents)))
        return sum(document.startswith(span, i) for document in self.documents for i in starts)

    def longest_suffix(self, start: int, end: int) -> Suffix:
        self.asked.append((start, end))
        while start < end and not self.count(self.query[start:end]):
            start += 1
        following = self.count(self.query[start : end + 1]) if end < len(self.query) else 0
        return Suffix(start, self.count(self.query[start:end]), following)

    def spans(self, min_length: int) -> list[Span]:
        """Every interval that occurs, and cannot be extended to either side."""
        n = len(self.query)
        held = {(i, j) for i in range(n) for j in range(i + 1, n + 1) if self.count(self.query[i:j])}
        return [
            Span(i, j, self.count(self.query[i:j]))
            for i, j in sorted(held)
            if (i - 1, j) not in held and (i, j + 1) not in held and j - i >= min_length
        ]

    def find(self, min_length: int, reach: int) -> list[Span]:
        return find_spans(len(self.query), self.longest_suffix, min_length=min_length, reach=reach)


WORDS = st.text(alphabet="abc", max_size=25)


@settings(deadline=None, derandomize=True, max_examples=600)
@given(st.lists(WORDS.filter(bool), min_size=1, max_size=4), WORDS, st.integers(1, 6), st.integers(26, 40))
def test_the_spans_of_the_reference_and_no_more_questions_than_tokens(
    documents: list[str], query: str, min_length: int, reach: int
) -> None:
    corpus = Corpus(documents, query)
    assert corpus.find(min_length, reach) == corpus.spans(min_length)
    assert len(corpus.asked) == len(set(corpus.asked)) <= len(query)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(WORDS.filter(bool), min_size=1, max_size=4), WORDS, st.integers(1, 30))
def test_no_question_is_longer_than_the_reach(documents: list[str], query: str, reach: int) -> None:
    corpus = Corpus(documents, query)
    longest = max((span.end - span.start for span in corpus.spans(1)), default=0)
    if longest > reach:
        with pytest.raises(ParameterError, match="longer than the engine"):
            corpus.find(1, reach)
    elif longest < reach:
        assert corpus.find(1, reach) == corpus.spans(1)
    assert all(end - start <= reach for start, end in corpus.asked)


def test_few_questions_for_a_copied_text_and_for_one_without_matches() -> None:
    rng = random.Random(0)
    text = "".join(rng.choice("abcdefgh") for _ in range(120))
    copied = Corpus(["xyz" + text + "xyz", "abc"], text)
    assert copied.find(8, 500) == [Span(0, 120, 1)]
    strange = Corpus(["xyz"], text)
    assert strange.find(8, 500) == []
    print(f"of 120 tokens: {len(copied.asked)} questions if copied, {len(strange.asked)} if strange")
    assert len(copied.asked) == 1
    assert len(strange.asked) <= 2 * math.ceil(120 / 8)


def test_surprisal_is_that_of_the_smoothed_unigram() -> None:
    assert laplace_surprisal(np.array([3, 0]), 8, 4).tolist() == pytest.approx([math.log(3), math.log(12)])


# ---------------------------------------------------------------------- what engines inherit


class Strange(SuffixEngine):
    """An engine over a corpus that holds nothing of what is asked."""

    vocab_size, reach = 290, 50
    surprisal = np.ones(290)

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self.tokenizer_hash = None if tokenizer is None else hash_tokenizer(tokenizer)

    def count(self, ids: ArrayLike) -> int:
        return 0

    def locate(self, ids: ArrayLike, *, limit: int | None = 10) -> list[Occurrence]:
        return []

    def continuations(self, ids: ArrayLike) -> tuple[Ids, Ids]:
        return np.arange(0), np.arange(0)

    def document_tokens(self, document_id: str) -> Ids:
        raise NotImplementedError

    def document(self, document_id: str) -> Document:
        return Document(document_id, "")

    def _longest_suffix(self, query: Ids, start: int, end: int) -> Suffix:
        return Suffix(end, 0, 0)

    def _holders(self, query: Ids, length: int) -> Iterable[tuple[int, Ids]]:
        return [(0, np.array([0, 1, 5])), (1, np.array([2])), (2, np.array([0, 1, 4, 5]))]

    def _name(self, number: int) -> str:
        return f"d{number}"


def test_sources_are_ranked_by_what_they_cover() -> None:
    sources = Strange().sources(range(8), min_length=3)
    assert [(source.document_id, source.score) for source in sources] == [("d2", 8), ("d0", 7), ("d1", 3)]
    assert [source.covered for source in sources] == [((0, 8),), ((0, 4), (5, 8)), ((2, 5),)]
    assert len(Strange().sources(range(8), min_length=3, limit=1)) == 1


def test_an_engine_encodes_with_its_tokenizer() -> None:
    tokenizer = train_tokenizer([document.text for document in DOCUMENTS])
    engine = Strange(tokenizer)
    text = DOCUMENTS[0].text
    ids, offsets = engine.encode_with_offsets(text)
    assert tokenizer.decode(ids) == text
    assert "".join(text[a:b] for a, b in offsets) == text
    assert engine.encode("").tolist() == []
    assert vocabulary_size(tokenizer) == 1 + max(tokenizer.get_vocab().values())
    engine.check_tokenizer(tokenizer)
    with pytest.raises(VocabularyError, match="not the one of the index"):
        engine.check_tokenizer(train_tokenizer(["other words, other tokens"] * 3))
    with pytest.raises(ParameterError, match="UTF-8"):
        engine.encode("lone \ud800")


def test_an_engine_without_a_tokenizer() -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        Strange().encode("text")
    with pytest.raises(VocabularyError, match="built from token ids"):
        Strange().check_tokenizer(train_tokenizer(["some words"] * 3))


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3"])
def test_limits_are_positive_integers(bad: Any) -> None:
    for call in (
        lambda: Strange().spans([0], min_length=bad),
        lambda: Strange().spans([0], max_count=bad),
        lambda: Strange().sources([0], min_length=bad),
        lambda: Strange().sources([0], limit=bad),
    ):
        with pytest.raises(ParameterError, match="out of range"):
            call()
    with pytest.raises(VocabularyError):
        Strange().spans([290])
