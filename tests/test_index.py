"""TraceIndex against a brute-force reference, its documents and tokenizer, and bad input."""

from __future__ import annotations

import logging
import math
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_samples import DOCUMENTS, train_tokenizer
from transformers import PreTrainedTokenizerFast

from tracealign_lib.documents import Document
from tracealign_lib.errors import (
    CorpusError,
    ModelError,
    ParameterError,
    VocabularyError,
)
from tracealign_lib.index import Interval, Occurrence, Source, Span, TraceIndex, hash_tokenizer

QUIET = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), max_examples=30
)


# ---------------------------------------------------------------------- the reference


class Reference:
    """What TraceIndex should answer, by looking at every place of every document."""

    def __init__(self, documents: list[list[int]], vocab_size: int) -> None:
        self.documents = documents
        self.unigrams = Counter(token for document in documents for token in document)
        total = sum(self.unigrams.values()) + vocab_size
        self.surprisal = [-math.log((self.unigrams[t] + 1) / total) for t in range(vocab_size)]

    def places(self, query: list[int]) -> list[tuple[int, int]]:
        n = len(query)
        return [
            (number, offset)
            for number, document in enumerate(self.documents)
            for offset in range(len(document) - n + 1 if n else len(document))
            if document[offset : offset + n] == query
        ]

    def spans(self, query: list[int], min_length: int, max_count: int | None) -> list[Span]:
        counts = {
            (start, end): len(self.places(query[start:end]))
            for start in range(len(query))
            for end in range(start + 1, len(query) + 1)
        }
        return [
            Span(start, end, count)
            for (start, end), count in counts.items()
            if count
            and not counts.get((start - 1, end))
            and not counts.get((start, end + 1))
            and end - start >= min_length
            and (max_count is None or count <= max_count)
        ]

    def continuations(self, query: list[int]) -> list[tuple[int, int]]:
        for start in range(len(query) + 1):
            suffix = query[start:]
            places = self.places(suffix)
            if places or not suffix:
                following = Counter(
                    self.documents[number][offset + len(suffix)]
                    for number, offset in places
                    if offset + len(suffix) < len(self.documents[number])
                )
                return sorted(following.items(), key=lambda pair: (-pair[1], pair[0]))
        raise AssertionError("the empty suffix always answers")

    def sources(self, query: list[int], min_length: int, limit: int) -> list[Source]:
        covered: dict[int, set[int]] = {}
        for start in range(len(query) - min_length + 1):
            for number, _ in self.places(query[start : start + min_length]):
                covered.setdefault(number, set()).update(range(start, start + min_length))
        ranked = []
        for number, tokens in covered.items():
            score = round(sum(self.surprisal[query[j]] for j in sorted(tokens)), 9)
            begins = [j for j in sorted(tokens) if j - 1 not in tokens]
            ends = [j + 1 for j in sorted(tokens) if j + 1 not in tokens]
            ranked.append((-score, number, tuple(zip(begins, ends, strict=True))))
        return [Source(str(number), -score, runs) for score, number, runs in sorted(ranked)[:limit]]


class Question(NamedTuple):
    ids: list[int]
    min_length: int
    max_count: int | None
    limit: int


class Case(NamedTuple):
    documents: list[list[int]]
    vocab_size: int
    questions: list[Question]


@st.composite
def cases(draw: st.DrawFn, n_questions: int) -> Case:
    """A corpus of few words, so that repeats abound, and questions cut from it, mixed or made up."""
    alphabet = draw(st.integers(1, 4))
    vocab_size = alphabet + draw(st.integers(0, 2))  # ids that the corpus never holds
    word = st.integers(0, alphabet - 1)
    document = st.one_of(
        st.lists(word, max_size=14),
        st.lists(word, min_size=1, max_size=1),
        st.builds(lambda token, times: [token] * times, word, st.integers(0, 10)),
        st.just([]),
    )
    documents = draw(st.lists(document, min_size=1, max_size=7))
    stream = [token for document in documents for token in document]
    # drawn from a seed: hypothesis repeats what it has drawn, and a repeated question checks nothing
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    questions = [
        Question(
            make_query(rng, stream, vocab_size),
            rng.randint(1, 4),
            rng.choice([None, 1, 2, 3]),
            rng.randint(1, 5),
        )
        for _ in range(n_questions)
    ]
    return Case(documents, vocab_size, questions)


def make_query(rng: random.Random, stream: list[int], vocab_size: int) -> list[int]:
    """Up to 18 ids: a piece of the documents laid end to end, made up, or of both."""

    def piece() -> list[int]:
        start = rng.randint(0, len(stream))
        return stream[start : start + rng.randint(0, 9)]

    def made_up(most: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(0, most))]

    return rng.choice([piece, lambda: made_up(10), lambda: piece() + made_up(2) + piece()])()


def check_question(index: TraceIndex, reference: Reference, question: Question) -> None:
    ids, min_length, max_count, limit = question
    places = reference.places(ids)
    occurrences = [Occurrence(str(number), offset) for number, offset in places]
    assert index.count(ids) == len(places)
    assert index.locate(ids, limit=None) == occurrences
    assert index.locate(ids, limit=limit) == occurrences[:limit]
    assert index.spans(ids) == reference.spans(ids, 1, None)
    found = index.spans(ids, min_length=min_length, max_count=max_count)
    assert found == reference.spans(ids, min_length, max_count)
    tokens, counts = index.continuations(ids)
    assert list(zip(tokens.tolist(), counts.tolist(), strict=True)) == reference.continuations(ids)
    sources = index.sources(ids, min_length=min_length, limit=limit)
    expected = reference.sources(ids, min_length, limit)
    assert [(s.document_id, s.covered) for s in sources] == [(s.document_id, s.covered) for s in expected]
    assert [s.score for s in sources] == pytest.approx([s.score for s in expected], abs=1e-8)


def test_equals_the_reference_on_10_000_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a power cut is not what is tested, and waiting for the disk 4,000 times is slow
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    seen: Counter[str] = Counter()
    distinct: set[str] = set()

    @settings(QUIET, max_examples=800)
    @given(cases(n_questions=30))
    def check(case: Case) -> None:
        path = tmp_path / "generated"
        index = TraceIndex.build_tokens(case.documents, path, vocab_size=case.vocab_size)
        reference = Reference(case.documents, case.vocab_size)
        assert index.surprisal == pytest.approx(reference.surprisal)
        assert index.n_tokens == sum(map(len, case.documents))
        for number, document in enumerate(case.documents):
            assert index.document_tokens(str(number)).tolist() == document
        stream = [token for document in case.documents for token in document]
        text = "".join(map(chr, stream))
        for question in case.questions:
            key = repr((case.documents, case.vocab_size, question.ids))
            if key in distinct:
                continue
            distinct.add(key)
            check_question(index, reference, question)
            absent = not reference.places(question.ids)
            seen["crosses a boundary"] += absent and "".join(map(chr, question.ids)) in text
            seen["unknown id"] += not set(question.ids) <= set(stream)
        seen["empty documents"] += [] in case.documents
        seen["one-token documents"] += any(len(document) == 1 for document in case.documents)
        seen["empty corpora"] += not stream

    check()
    print(f"{len(distinct):,} distinct generated cases, of them {dict(seen)}")
    assert len(distinct) >= 10_000
    assert min(seen.values()) >= 5, seen
    assert min(seen[kind] for kind in ("crosses a boundary", "unknown id")) >= 500, seen


@pytest.mark.parametrize("vocab_size", [65_535, 65_536, 70_000])
def test_ids_at_the_end_of_each_dtype(tmp_path: Path, vocab_size: int) -> None:
    @settings(QUIET, max_examples=8)
    @given(cases(n_questions=10))
    def check(case: Case) -> None:
        shift = vocab_size - case.vocab_size

        def up(ids: list[int]) -> list[int]:
            return [token + shift for token in ids]

        documents = [up(document) for document in case.documents]
        index = TraceIndex.build_tokens(documents, tmp_path / "wide", vocab_size=vocab_size)
        reference = Reference(documents, vocab_size)
        for question in case.questions:
            check_question(index, reference, question._replace(ids=up(question.ids)))
        TraceIndex.open(tmp_path / "wide", verify="full")

    check()


# ---------------------------------------------------------------------- what is documented


@pytest.mark.parametrize("bounds", [[[-1, 1]], [[2, 1]], [[0, 4]]])
def test_parts_of_a_query_are_counted_at_once(tmp_path: Path, bounds: list[list[int]]) -> None:
    index = TraceIndex.build_tokens([[0, 1, 0], [1, 0]], tmp_path / "a.index", vocab_size=3)
    query = [1, 0, 2]
    parts = [(start, end) for start in range(4) for end in range(start, 4)]
    assert index.counts(query, parts).tolist() == [index.count(query[start:end]) for start, end in parts]
    assert index.counts(query, []).tolist() == []
    with pytest.raises(ParameterError, match="does not lie within"):
        index.counts(query, bounds)


def test_the_empty_query(tmp_path: Path) -> None:
    index = TraceIndex.build_tokens([[2, 0], [], [2]], tmp_path / "i", vocab_size=4)
    assert index.count([]) == index.n_tokens == 3
    assert index.spans([]) == []
    assert index.sources([]) == []
    assert index.locate([], limit=2) == [("0", 0), ("0", 1)]
    tokens, counts = index.continuations([])
    assert (tokens.tolist(), counts.tolist()) == ([2, 0], [2, 1])


def test_a_corpus_of_empty_documents(tmp_path: Path) -> None:
    TraceIndex.build_tokens([[], []], tmp_path / "i", vocab_size=2)
    index = TraceIndex.open(tmp_path / "i", verify="full")
    assert (index.n_tokens, index.n_documents, index.count([]), index.count([1])) == (0, 2, 0, 0)
    assert index.spans([0, 1]) == index.locate([0]) == index.sources([0] * 9) == []
    assert index.continuations([0])[0].tolist() == []
    assert index.document_tokens("1").tolist() == []
    assert index.surprisal.tolist() == pytest.approx([math.log(2)] * 2)


def test_a_suffix_that_ends_its_documents_is_followed_by_nothing(tmp_path: Path) -> None:
    index = TraceIndex.build_tokens([[0, 1], [1, 0, 1], [0]], tmp_path / "i", vocab_size=2)
    assert index.continuations([0, 0, 1])[0].tolist() == []


def test_an_interval_is_extended_token_by_token(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    index = TraceIndex.build_tokens([rng.integers(0, 3, n) for n in (40, 0, 9)], tmp_path / "i", vocab_size=4)
    for length in range(6):
        query = rng.integers(0, 3, length).tolist()
        interval = index.longest_suffix(query)
        kept = query[length - interval.length :]
        assert interval.high - interval.low == index.count(kept)
        assert interval.length == length or index.count(query[length - interval.length - 1 :]) == 0
        extended = index.extend(interval, [0, 1, 2, 3])  # (4, 3)
        assert (extended[:, 1] - extended[:, 0]).tolist() == [
            index.count([*kept, token]) for token in range(4)
        ]
        assert (extended[:, 2] == interval.length + 1).all()
        again = index.extend(extended, np.tile([1, 2], (4, 1)))  # (4, 2, 3)
        for first, row in enumerate((again[..., 1] - again[..., 0]).tolist()):
            assert row == [index.count([*kept, first, second]) for second in (1, 2)]
    assert index.longest_suffix([]) == Interval(0, index.n_tokens, 0)
    assert index.extend(np.empty((0, 3), dtype=int), np.empty((0, 5), dtype=int)).shape == (0, 5, 3)


@pytest.mark.parametrize(
    ("interval", "tokens", "error"),
    [
        ((0, 1, 1), [4], VocabularyError),
        ((0, 1, 1), [0.5], VocabularyError),
        ((0, 10, 1), [0], ParameterError),
        ((2, 1, 1), [0], ParameterError),
        ((-1, 1, 1), [0], ParameterError),
        ((0, 1, -1), [0], ParameterError),
        ((0.0, 1.0, 1.0), [0], ParameterError),
        ((0, 1), [0], ParameterError),
        ((0, 1, 1), 0, ParameterError),
        ([(0, 1, 1)] * 2, [[0], [1], [2]], ParameterError),
    ],
)
def test_an_interval_that_cannot_be_extended(tmp_path: Path, interval: Any, tokens: Any, error: Any) -> None:
    index = TraceIndex.build_tokens([[0, 1, 2, 0]], tmp_path / "i", vocab_size=4)
    with pytest.raises(error):
        index.extend(interval, tokens)


def test_separators_never_match(tmp_path: Path) -> None:
    index = TraceIndex.build_tokens([[0], [0], [0]], tmp_path / "i", vocab_size=1)
    assert index.count([0]) == 3
    assert index.count([0, 0]) == 0
    with pytest.raises(VocabularyError, match="1 at position 1"):
        index.count([0, 1])


def test_sources_join_touching_windows_and_keep_corpus_order_in_ties(tmp_path: Path) -> None:
    documents = [[0, 1, 2], [3, 3], [0, 1, 9, 2, 4], [2, 4, 0, 1]]
    names = ["b", "x", "c", "a"]
    index = TraceIndex.build_tokens(documents, tmp_path / "i", vocab_size=10, document_ids=names)
    sources = index.sources([0, 1, 2, 4, 7, 0, 1], min_length=2)
    assert [source.document_id for source in sources] == ["c", "a", "b"]
    assert [source.covered for source in sources] == [((0, 4), (5, 7)), ((0, 4), (5, 7)), ((0, 3), (5, 7))]
    assert sources[0].score == sources[1].score
    assert [source.document_id for source in index.sources([0, 1], min_length=2, limit=2)] == ["b", "c"]


def test_a_sequence_of_any_integer_type_is_a_query(tmp_path: Path) -> None:
    documents = [np.array([3, 1, 2], dtype=np.uint16), (1, 2), np.array([], dtype=np.uint16)]
    documents[0].setflags(write=False)  # type: ignore[union-attr]
    index = TraceIndex.build_tokens(documents, tmp_path / "i", vocab_size=5)
    for dtype in (np.uint8, np.int8, np.uint16, np.int32, np.uint64, ">i4"):
        query = np.array([9, 1, 2], dtype=dtype)[1:]
        query.setflags(write=False)
        assert index.count(query) == 2
        assert index.count(query[::-1]) == 0


# ---------------------------------------------------------------------- texts and tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([document.text for document in DOCUMENTS])


@pytest.fixture
def built(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TraceIndex:
    return TraceIndex.build(DOCUMENTS, tokenizer, tmp_path / "a.index")


def test_build_stores_documents_and_tokenizer(built: TraceIndex, tokenizer: PreTrainedTokenizerFast) -> None:
    for index in (built, TraceIndex.open(built.path), TraceIndex.open(str(built.path), verify="full")):
        assert index.document_ids == tuple(document.id for document in DOCUMENTS)
        assert [index.document(document.id) for document in DOCUMENTS] == DOCUMENTS
        assert index.tokenizer_hash == hash_tokenizer(tokenizer)
        index.check_tokenizer(tokenizer)
        index.check_tokenizer(index.tokenizer)
        for document in DOCUMENTS:
            ids = index.document_tokens(document.id)
            assert index.tokenizer.decode(ids) == document.text
            assert ids.tolist() == index.encode(document.text).tolist()
        ids = index.encode(" hum twice, then")  # after a space, as in the text
        assert [found.document_id for found in index.locate(ids)] == ["forum/1", "forum/2"]
        assert index.sources(index.encode(DOCUMENTS[1].text), min_length=4)[0].document_id == "forum/2"
    assert index.encode("").tolist() == []


def test_encode_adds_nothing_cuts_nothing_and_is_silent(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that caplog sees it
    worn = train_tokenizer([document.text for document in DOCUMENTS])
    worn("to wake the Orun", truncation=True, max_length=3)
    assert hash_tokenizer(worn) == hash_tokenizer(tokenizer)
    index = TraceIndex.build(DOCUMENTS, worn, tmp_path / "worn")
    text = " ".join(["to wake the Orun compound"] * 20)
    ids, offsets = index.encode_with_offsets(text)
    assert index.tokenizer.decode(ids) == text
    assert len(ids) > 4
    assert not set(ids.tolist()) & {0, 1}
    assert offsets.shape == (len(ids), 2)
    assert "".join(text[start:end] for start, end in offsets) == text
    assert index.tokenizer.decode(index.document_tokens("forum/1")) == DOCUMENTS[0].text
    assert caplog.text == ""


@QUIET
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    documents = [Document(f"{number}/ä", text, {"n": number}) for number, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        index = TraceIndex.build(documents, tokenizer, Path(folder) / "i")
        for document in documents:
            assert index.document(document.id) == document
            ids, offsets = index.encode_with_offsets(document.text)
            assert index.document_tokens(document.id).tolist() == ids.tolist()
            assert (offsets[:, 0] <= offsets[:, 1]).all()
            assert not len(ids) or (offsets[0, 0], offsets[-1, 1]) == (0, len(document.text))
            assert not len(ids) or index.count(ids) >= 1


def test_an_index_keeps_working_after_it_is_replaced(built: TraceIndex, tokenizer: Any) -> None:
    ids = built.encode(" the Orun")
    TraceIndex.build([Document("new", "nothing of it")], tokenizer, built.path)
    assert built.count(ids) == 2
    assert built.document("signs") == DOCUMENTS[3]
    assert TraceIndex.open(built.path).document_ids == ("new",)


# ---------------------------------------------------------------------- bad input


BAD_IDS = [
    pytest.param([-1], id="negative"),
    pytest.param([3], id="separator"),
    pytest.param([0, 10**6], id="too large"),
    pytest.param([2**63], id="beyond int64"),
    pytest.param([2**70], id="beyond uint64"),
    pytest.param([1.0], id="float"),
    pytest.param([True, False], id="bool"),
    pytest.param(["1"], id="text"),
    pytest.param("12", id="bare text"),
    pytest.param(1, id="scalar"),
    pytest.param([[1, 2]], id="two-dimensional"),
    pytest.param([[1], [1, 2]], id="ragged"),
    pytest.param([None], id="none"),
    pytest.param(np.array([3], dtype=np.uint64), id="uint64"),
]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_ids_outside_the_vocabulary(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(VocabularyError, match="from 0 to 2") as caught:
        TraceIndex.build_tokens([[0], bad], tmp_path / "bad", vocab_size=3)
    assert "document 1" in caught.value.problem
    assert list(tmp_path.iterdir()) == []
    index = TraceIndex.build_tokens([[0, 1, 2]], tmp_path / "good", vocab_size=3)
    for query in (index.count, index.spans, index.locate, index.continuations, index.sources):
        with pytest.raises(VocabularyError, match="from 0 to 2"):
            query(bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3"])
def test_limits_are_positive_integers(tmp_path: Path, bad: Any) -> None:
    index = TraceIndex.build_tokens([[0, 1, 2]], tmp_path / "i", vocab_size=3)
    calls: list[Callable[[], Any]] = [
        lambda: index.spans([0], min_length=bad),
        lambda: index.spans([0], max_count=bad),
        lambda: index.locate([0], limit=bad),
        lambda: index.sources([0], min_length=bad),
        lambda: index.sources([0], limit=bad),
        lambda: TraceIndex.build_tokens([[0]], tmp_path / "j", vocab_size=bad),
    ]
    for call in calls:
        with pytest.raises(ParameterError, match="out of range"):
            call()


@pytest.mark.parametrize(
    "documents",
    [
        pytest.param([], id="empty"),
        pytest.param([Document("a", "x"), Document("a", "y")], id="duplicate ids"),
        pytest.param([Document("a", "lone \ud800")], id="lone surrogate"),
        pytest.param([Document("a", "x", {"k": {1, 2}})], id="metadata that is not JSON"),
        pytest.param([Document("a", 5)], id="text that is not text"),  # type: ignore[arg-type]
    ],
)
def test_a_corpus_that_cannot_be_indexed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> None:
    with pytest.raises(CorpusError):
        TraceIndex.build(documents, tokenizer, tmp_path / "i")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arrays", "names"), [([], None), ([], []), ([[0]], ["a", "b"]), ([[0], [0]], ["a", "a"]), ([[0]], [7])]
)
def test_arrays_and_names_that_do_not_fit(tmp_path: Path, arrays: Any, names: Any) -> None:
    with pytest.raises(CorpusError):
        TraceIndex.build_tokens(arrays, tmp_path / "i", vocab_size=1, document_ids=names)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_differs(built: TraceIndex, tmp_path: Path) -> None:
    other = train_tokenizer(["entirely other words, other words"] * 3)
    with pytest.raises(VocabularyError, match="not the one of the index"):
        built.check_tokenizer(other)
    tokens_only = TraceIndex.build_tokens([[0]], tmp_path / "t", vocab_size=1)
    assert tokens_only.tokenizer is None
    assert tokens_only.tokenizer_hash is None
    with pytest.raises(VocabularyError, match="built from token ids"):
        tokens_only.check_tokenizer(other)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        tokens_only.encode("text")
    with pytest.raises(CorpusError, match="holds no texts"):
        tokens_only.document("0")


def test_a_tokenizer_that_is_not_a_fast_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a fast one"):
        TraceIndex.build(DOCUMENTS, object(), tmp_path / "i")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["forum/3", None, 0, ["forum/1"]])
def test_an_unknown_document(built: TraceIndex, bad: Any) -> None:
    for call in (built.document, built.document_tokens):
        with pytest.raises(ParameterError, match="such as 'forum/1'"):
            call(bad)


@pytest.mark.parametrize("bad", [None, 5, b"text", "lone \ud800"])
def test_a_text_that_cannot_be_encoded(built: TraceIndex, bad: Any) -> None:
    with pytest.raises(ParameterError, match="UTF-8"):
        built.encode(bad)


def test_an_unknown_way_to_verify(built: TraceIndex) -> None:
    with pytest.raises(ParameterError, match="'maybe'"):
        TraceIndex.open(built.path, verify="maybe")
