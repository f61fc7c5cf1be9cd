"""Rankers against their definitions, grades against hand calculation and scikit-learn."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tracealign_lib.attribution import (
    METRICS,
    Bm25Ranker,
    Case,
    CoverRanker,
    MaximalSpanRanker,
    Ranker,
    Ranking,
    TfidfRanker,
    grade,
    grade_many,
    summarise,
    sweep,
)
from tracealign_lib.documents import Document
from tracealign_lib.errors import CorpusError, ParameterError
from tracealign_lib.index import TraceIndex
from tracealign_lib.stats import clustered_bootstrap

# Letters are the tokens. "abcdefgh" is planted three times, once in a wrapper that other documents share.
CORPUS = {
    "plain": "a b c d e f g h",
    "wrapped": "x y a b c d e f g h z",
    "again": "x y a b c d e f g h z",
    "near": "a b c d k f g h",
    "garbled": "h g f e d c b a",
    "half": "p q a b c d r s",
    "other": "x y m n o p q z",
    "one": "w",
    "empty": "",
}
DOCUMENTS = [Document(name, text) for name, text in CORPUS.items()]
QUERIES = [
    "a b c d e f g h",
    "x y a b c d e f g h z",
    "a b c d e f",
    "m n o p q a b c d",
    "w",
    "k k k",
    "h a",
    "v",
    "",
]


class BruteSpan(NamedTuple):
    start: int
    end: int
    count: int  # type: ignore[assignment]


class BruteOccurrence(NamedTuple):
    document_id: str
    offset: int


class BruteSource(NamedTuple):
    document_id: str
    score: float


class BruteIndex:
    """The index by its definitions alone: every interval of the query is looked up in every document."""

    def __init__(self, documents: Sequence[Document]) -> None:
        letters = sorted({letter for d in documents for letter in d.text.split()})
        self.vocabulary = {letter: number for number, letter in enumerate([*letters, "?"])}
        self.documents = {d.id: self.encode(d.text).tolist() for d in documents}
        self.n_documents = len(documents)
        seen = np.concatenate([self.encode(d.text) for d in documents])
        counts = np.bincount(seen, minlength=len(self.vocabulary)) + 1
        self.surprisal = -np.log(counts / counts.sum())

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(
            [self.vocabulary.get(w, len(self.vocabulary) - 1) for w in text.split()], dtype=np.int64
        )

    def locate(self, ids: np.ndarray, *, limit: int = 10) -> list[BruteOccurrence]:
        gram = list(ids)
        return [
            BruteOccurrence(name, i)
            for name, tokens in self.documents.items()
            for i in range(len(tokens) - len(gram) + 1)
            if tokens[i : i + len(gram)] == gram
        ][:limit]

    def spans(self, ids: np.ndarray, *, min_length: int, max_count: int | None) -> list[BruteSpan]:
        everywhere = self.n_documents * 100
        n = len(ids)
        held = {
            (s, e): len(self.locate(ids[s:e], limit=everywhere))
            for s in range(n)
            for e in range(s + 1, n + 1)
        }
        held = {interval: count for interval, count in held.items() if count}
        return [
            BruteSpan(s, e, count)
            for (s, e), count in held.items()
            if (s - 1, e) not in held and (s, e + 1) not in held
            if e - s >= min_length and count <= (max_count or everywhere)
        ]

    def sources(self, ids: np.ndarray, *, min_length: int, limit: int) -> list[BruteSource]:
        covered: dict[str, set[int]] = {name: set() for name in self.documents}
        for start in range(len(ids) - min_length + 1):
            for document_id, _ in self.locate(ids[start : start + min_length], limit=10_000):
                covered[document_id].update(range(start, start + min_length))
        scores = {name: sum(self.surprisal[ids[j]] for j in sorted(js)) for name, js in covered.items() if js}
        ordered = sorted(scores.items(), key=lambda pair: -pair[1])
        return [BruteSource(name, float(score)) for name, score in ordered][:limit]


def letter_tokenizer(documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(BruteIndex(documents).vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@pytest.fixture(scope="module")
def brute() -> BruteIndex:
    return BruteIndex(DOCUMENTS)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TraceIndex:
    folder: Path = tmp_path_factory.mktemp("index") / "letters"
    return TraceIndex.build(DOCUMENTS, letter_tokenizer(DOCUMENTS), folder)


class Fixed(Ranker):
    """Answers with what it was given."""

    def __init__(self, rankings: dict[str, Ranking], share: float = 0.0) -> None:
        self.rankings, self.share = rankings, share

    def rank(self, text: str) -> Ranking:
        return self.rankings[text]


def as_groups(ranking: Ranking) -> list[tuple[float, list[str]]]:
    """A ranking without the order inside ties."""
    rounded = [(round(score, 6), name) for name, score in ranking]
    assert [score for score, _ in rounded] == sorted((score for score, _ in rounded), reverse=True)
    return [
        (score, sorted(name for _, name in group))
        for score, group in itertools.groupby(rounded, lambda pair: pair[0])
    ]


# --- rankers on the index ------------------------------------------------------------------------


@pytest.mark.parametrize("min_length", [1, 3, 8])
@pytest.mark.parametrize("text", QUERIES)
def test_cover_is_its_definition(index: TraceIndex, brute: BruteIndex, text: str, min_length: int) -> None:
    expected = CoverRanker(brute, min_length).rank(text)  # type: ignore[arg-type]
    assert as_groups(CoverRanker(index, min_length).rank(text)) == as_groups(expected)


@pytest.mark.parametrize("max_count", [1, 2, 3, None])
@pytest.mark.parametrize("min_length", [1, 4, 8])
@pytest.mark.parametrize("text", QUERIES)
def test_maximal_spans_are_their_definition(
    index: TraceIndex, brute: BruteIndex, text: str, min_length: int, max_count: int | None
) -> None:
    """Summed surprisal of the maximal spans a document holds, from brute-force spans."""
    ids = brute.encode(text)
    scores = {
        name: sum(
            float(brute.surprisal[ids[s:e]].sum())
            for s, e, _ in brute.spans(ids, min_length=min_length, max_count=max_count)
            if " ".join(text.split()[s:e]) in document
        )
        for name, document in CORPUS.items()
    }
    expected = sorted(((n, s) for n, s in scores.items() if s > 0), key=lambda pair: -pair[1])
    assert as_groups(MaximalSpanRanker(index, min_length, max_count).rank(text)) == as_groups(expected)


def test_the_count_filter_is_blind_to_what_was_planted_often(index: TraceIndex) -> None:
    text = "a b c d e f g h"
    assert MaximalSpanRanker(index, 8, 2).rank(text) == []
    assert {name for name, _ in MaximalSpanRanker(index, 8, 3).rank(text)} == {"plain", "wrapped", "again"}
    assert {name for name, _ in CoverRanker(index, 8).rank(text)} == {"plain", "wrapped", "again"}
    # A wrapper that extends the match hides the plain copy from maximal spans, and not from the cover.
    assert "plain" not in dict(MaximalSpanRanker(index, 8, None).rank("x y a b c d e f g h z"))
    assert "plain" in dict(CoverRanker(index, 8).rank("x y a b c d e f g h z"))


def test_an_index_ranker_returns_every_document(tmp_path: Path) -> None:
    """More documents than any default limit of the index."""
    documents = [Document(f"d{i}", "a b c d") for i in range(60)] + [Document("end", "b c d a")]
    many = TraceIndex.build(documents, letter_tokenizer(documents), tmp_path / "many")
    assert len(CoverRanker(many, 3).rank("a b c d")) == 61
    assert len(MaximalSpanRanker(many, 3, None).rank("a b c d")) == 60


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None])
def test_index_rankers_refuse_a_length(index: TraceIndex, wrong: object) -> None:
    with pytest.raises(ParameterError, match="min_length"):
        CoverRanker(index, wrong)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="min_length"):
        MaximalSpanRanker(index, wrong)  # type: ignore[arg-type]


def test_index_rankers_refuse_a_count_or_share(index: TraceIndex) -> None:
    with pytest.raises(ParameterError, match="max_count"):
        MaximalSpanRanker(index, 8, 0)
    for make in (CoverRanker, MaximalSpanRanker):
        with pytest.raises(ParameterError, match="share"):
            make(index, share=80)


# --- rivals --------------------------------------------------------------------------------------

TEXTS = {
    "one": "The red fox wakes the Grey stone; the fox sleeps.",
    "two": "A grey fox sleeps. The stone is red",
    "three": "stone grey the wakes fox red the",
    "four": "Nothing of this, nothing at all!",
    "five": "fox",
    "six": "",
}
TALES = [Document(name, text) for name, text in TEXTS.items()]


def units(text: str, ngram: int) -> list[str]:
    words = re.findall(r"[a-z]+", text.lower())
    return [" ".join(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]


def bm25_directly(query: str, ngram: int) -> dict[str, float]:
    """Lucene's BM25, written out: k1 = 1.5, b = 0.75, idf = log(1 + (N - df + 1/2) / (df + 1/2))."""
    corpus = {name: units(text, ngram) for name, text in TEXTS.items()}
    mean_length = sum(map(len, corpus.values())) / len(corpus)
    scores = dict.fromkeys(corpus, 0.0)
    for unit in units(query, ngram):
        holding = sum(unit in document for document in corpus.values())
        idf = math.log(1 + (len(corpus) - holding + 0.5) / (holding + 0.5))
        for name, document in corpus.items():
            tf = document.count(unit)
            scores[name] += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean_length))
    return {name: score for name, score in scores.items() if score > 0}


@pytest.mark.parametrize("ngram", [1, 2])
@pytest.mark.parametrize(
    "query", ["the red fox wakes", "THE the fox FOX sleeps, unknown", "grey stone", "nothing of this"]
)
def test_bm25_is_the_direct_formula(query: str, ngram: int) -> None:
    ranking = Bm25Ranker(TALES, ngram).rank(query)  # type: ignore[arg-type]
    expected = bm25_directly(query, ngram)
    assert dict(ranking) == pytest.approx(expected, rel=1e-5)
    assert [name for name, _ in ranking] == sorted(expected, key=lambda name: -expected[name])


def test_tfidf_is_the_direct_formula() -> None:
    """Cosine of raw counts times log((1 + N) / (1 + df)) + 1, from a dense loop."""
    query = "The grey fox wakes the stone"
    words = sorted({w for text in TEXTS.values() for w in units(text, 1)})
    frequency = {w: sum(w in units(text, 1) for text in TEXTS.values()) for w in words}

    def vector(text: str) -> np.ndarray:
        weights = [
            units(text, 1).count(w) * (math.log((1 + len(TEXTS)) / (1 + frequency[w])) + 1) for w in words
        ]
        return np.asarray(weights) / (np.linalg.norm(weights) or 1)

    expected = {name: float(vector(query) @ vector(text)) for name, text in TEXTS.items()}
    ranking = TfidfRanker(TALES).rank(query)
    assert dict(ranking) == pytest.approx({n: s for n, s in expected.items() if s > 0})
    assert [score for _, score in ranking] == sorted((score for _, score in ranking), reverse=True)


def test_word_order_is_seen_by_bigrams_only() -> None:
    original, garbled = (
        "stir the pale sand then ring a small bell",
        "bell small a ring then sand pale the stir",
    )
    documents = [Document("original", original), Document("garbled", garbled), Document("else", "ring ring")]
    for bag in (TfidfRanker(documents), Bm25Ranker(documents, 1)):
        scores = dict(bag.rank(original))
        assert scores["original"] == pytest.approx(scores["garbled"])
    assert [name for name, _ in Bm25Ranker(documents, 2).rank(original)] == ["original"]


@pytest.mark.parametrize(
    "make", [TfidfRanker, Bm25Ranker, lambda documents: Bm25Ranker(documents, 2)], ids=["tfidf", "bm25", "2"]
)
def test_rivals_in_batch_and_at_the_edges(make: Callable[[list[Document]], Ranker]) -> None:
    ranker = make(TALES)
    assert ranker.rank("") == ranker.rank("unheard words") == ranker.rank("?!") == []
    texts = ["the red fox", "", *TEXTS.values()] * 10  # more than one batch
    assert [as_groups(r) for r in ranker.rank_many(texts)] == [as_groups(ranker.rank(t)) for t in texts]
    assert list(ranker.rank_many([])) == []
    with pytest.raises(CorpusError, match="empty"):
        make([])
    with pytest.raises(CorpusError, match="word"):
        make([Document("a", ""), Document("b", "...")])
    with pytest.raises(CorpusError, match="same id"):
        make([Document("a", "x y"), Document("a", "y z")])


def test_rivals_refuse_settings() -> None:
    with pytest.raises(ParameterError, match="n-gram"):
        Bm25Ranker(TALES, 3)  # type: ignore[arg-type]
    for make in (TfidfRanker, Bm25Ranker):
        with pytest.raises(ParameterError, match="share"):
            make(TALES, share=-0.1)


# --- grading -------------------------------------------------------------------------------------

RANKING = [("a", 10.0), ("b", 9.0), ("c", 8.0), ("d", 7.9), ("e", 1.0)]


def test_grade_by_hand() -> None:
    truth = frozenset({"b", "c", "e", "missing"})
    whole = grade(RANKING, truth, seed=0)
    assert whole == pytest.approx((3 / 5, 3 / 4, 2 / 4, 1 / 2, (1 / 2 + 2 / 3 + 3 / 5) / 4, 5))
    cut = grade(RANKING, truth, seed=0, share=0.8)  # a, b, c: 8.0 is 0.8 of the best
    assert cut == pytest.approx((2 / 3, 2 / 4, 2 / 4, 1 / 2, (1 / 2 + 2 / 3 + 3 / 5) / 4, 3))
    assert grade(RANKING, frozenset({"a"}), seed=0, share=1.0) == (1, 1, 1, 1, 1, 1)
    assert grade(RANKING, frozenset({"z"}), seed=0) == (0, 0, 0, 0, 0, 5)


def test_an_empty_ranking_claims_nothing() -> None:
    empty = grade([], frozenset({"a"}), seed=0)
    assert math.isnan(empty.precision)
    assert empty[1:] == (0, 0, 0, 0, 0)


@given(
    st.lists(st.integers(1, 1000), unique=True, min_size=1, max_size=30).flatmap(
        lambda scores: st.tuples(
            st.just(scores), st.sets(st.sampled_from(range(len(scores))), min_size=1), st.floats(0, 1)
        )
    )
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_grade_without_ties(drawn: tuple[list[int], set[int], float]) -> None:
    """Average precision as scikit-learn computes it, set measures from sets."""
    scores, true, share = drawn
    got = grade(
        [(f"d{i}", float(s)) for i, s in enumerate(scores)],
        frozenset(f"d{i}" for i in true),
        seed=3,
        share=share,
    )
    labels = [i in true for i in range(len(scores))]
    assert got.average_precision == pytest.approx(average_precision_score(labels, scores))
    answer = {i for i, s in enumerate(scores) if s >= share * max(scores) * (1 - 1e-9)}
    assert got.precision == pytest.approx(len(answer & true) / len(answer))
    assert got.recall == pytest.approx(len(answer & true) / len(true))
    assert got.returned == len(answer)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert got.r_precision == pytest.approx(len(set(best[: len(true)]) & true) / len(true))
    assert got.reciprocal_rank == pytest.approx(1 / (1 + min(best.index(i) for i in true)))


def test_ties_fall_without_bias() -> None:
    """One true source among ten that tie: R-precision 1/10, MRR the mean of 1/rank, wherever it stands."""
    ranking = [(f"d{i}", 1.0) for i in range(10)]
    harmonic = np.mean([1 / rank for rank in range(1, 11)])
    for place in (0, 4, 9):
        grades = [grade(ranking, frozenset({f"d{place}"}), seed=seed) for seed in range(2000)]
        # Standard errors: 0.007 and 0.006.
        assert np.mean([g.r_precision for g in grades]) == pytest.approx(0.1, abs=0.028)
        assert np.mean([g.reciprocal_rank for g in grades]) == pytest.approx(harmonic, abs=0.026)


def test_ties_do_not_depend_on_document_order() -> None:
    ranking = [(f"d{i}", 1.0 + (i % 2)) for i in range(12)]
    truth = frozenset({"d1", "d2", "d3"})
    assert grade(ranking, truth, seed=11) == grade(ranking[::-1], truth, seed=11)
    assert len({grade(ranking, truth, seed=seed) for seed in range(20)}) > 1


def test_ties_stay_below_better_documents_and_rounding_is_a_tie() -> None:
    ranking = [("a", 2.0), ("b", 1.0), ("c", 1.0), ("d", 0.5)]
    assert {grade(ranking, frozenset({"a"}), seed=s).reciprocal_rank for s in range(30)} == {1.0}
    assert {grade(ranking, frozenset({"d"}), seed=s).reciprocal_rank for s in range(30)} == {1 / 4}
    assert {grade(ranking, frozenset({"c"}), seed=s).reciprocal_rank for s in range(30)} == {1 / 2, 1 / 3}
    nearly = [("a", 0.1 + 0.2), ("b", 0.3)]
    assert {grade(nearly, frozenset({"b"}), seed=s).reciprocal_rank for s in range(30)} == {1, 1 / 2}
    assert grade(nearly, frozenset({"b"}), seed=0, share=1.0).returned == 2


@pytest.mark.parametrize(
    ("ranking", "truth", "share"),
    [
        (RANKING, frozenset(), 0.0),
        (RANKING, frozenset("a"), 1.5),
        (RANKING, frozenset("a"), math.nan),
        ([("a", 1.0), ("a", 1.0)], frozenset("a"), 0.0),
        ([("a", 0.0)], frozenset("a"), 0.0),
        ([("a", -1.0)], frozenset("a"), 0.0),
        ([("a", math.nan)], frozenset("a"), 0.0),
        ([("a", math.inf)], frozenset("a"), 0.0),
    ],
)
def test_grade_refuses(ranking: Ranking, truth: frozenset[str], share: float) -> None:
    with pytest.raises(ParameterError):
        grade(ranking, truth, seed=0, share=share)


# --- frames --------------------------------------------------------------------------------------

STRICT = frozenset({"plain", "wrapped", "again"})
CASES = [
    Case("a b c d e f g h", "alpha", 3, {"strict": STRICT, "near": STRICT | {"near"}}),
    Case("x y a b c d e f g h z", "alpha", 3, {"strict": STRICT, "near": STRICT | {"near"}}),
    Case("m n o p q", "beta", 1, {"strict": frozenset({"other"}), "near": frozenset({"other"})}),
    Case("k k k", "gamma", 1, {"strict": frozenset({"near"}), "near": frozenset({"near"})}),
]


def test_grade_many_has_a_row_for_everything(index: TraceIndex) -> None:
    rankers = {"cover": CoverRanker(index, 4), "tf-idf": TfidfRanker(DOCUMENTS)}
    frame = grade_many(rankers, CASES)
    assert list(frame.columns) == ["method", "case", "item", "copies", "truth", *METRICS]
    assert len(frame) == 2 * 4 * 2
    row = frame.query("method == 'cover' and case == 0 and truth == 'strict'").iloc[0]
    expected = grade(rankers["cover"].rank(CASES[0].text), STRICT, seed=(0, 0), share=0.8)
    assert tuple(row[list(expected._fields)]) == expected
    assert (row["item"], row["copies"], bool(row["empty"])) == ("alpha", 3, False)
    unfound = frame.query("method == 'cover' and item == 'gamma'")
    assert unfound["empty"].all()
    assert unfound["precision"].isna().all()
    assert (unfound["recall"] == 0).all()


def test_each_ranker_brings_its_own_cut() -> None:
    texts = {"t": [("a", 1.0), ("b", 0.9), ("c", 0.1)]}
    frame = grade_many(
        {"all": Fixed(texts), "cut": Fixed(texts, 0.8)}, [Case("t", "i", 1, {"strict": frozenset("a")})]
    )
    assert frame.set_index("method")["returned"].to_dict() == {"all": 3, "cut": 2}


def test_ties_fall_differently_from_case_to_case() -> None:
    ranker = Fixed({"t": [(f"d{i}", 1.0) for i in range(10)]})
    cases = [Case("t", "i", 1, {"strict": frozenset({"d3"})})] * 400
    frame = grade_many({"ties": ranker}, cases)
    assert frame["r_precision"].mean() == pytest.approx(0.1, abs=0.06)
    assert frame.equals(grade_many({"ties": ranker}, cases))
    assert not frame.equals(grade_many({"ties": ranker}, cases, seed=1))


def test_a_ranker_that_repeats_itself_is_refused() -> None:
    with pytest.raises(ParameterError, match="twice"):
        grade_many(
            {"bad": Fixed({"t": [("a", 1.0), ("a", 1.0)]})}, [Case("t", "i", 1, {"s": frozenset("a")})]
        )


def test_sweep_equals_one_ranker_per_cell(index: TraceIndex) -> None:
    lengths, counts = [4, 2, 8], [3, 1, None]
    frame = sweep(index, CASES, lengths, counts, seed=5)
    assert len(frame) == 3 * 3 * 4 * 2
    for length, count in itertools.product(lengths, counts):
        limit = math.inf if count is None else count
        cell = frame[(frame["min_length"] == length) & (frame["max_count"] == limit)]
        alone = grade_many({"maximal spans": MaximalSpanRanker(index, length, count)}, CASES, seed=5)
        cell = cell.drop(columns=["min_length", "max_count"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(cell, alone)


def test_sweep_asks_for_each_text_once(brute: BruteIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []
    spans = brute.spans

    def recorded(ids: np.ndarray, *, min_length: int, max_count: int | None) -> list[BruteSpan]:
        asked.append((min_length, max_count))
        return spans(ids, min_length=min_length, max_count=max_count)

    monkeypatch.setattr(brute, "spans", recorded)
    sweep(brute, CASES, [8, 4], [1, 3])  # type: ignore[arg-type]
    assert asked == [(4, 3)] * len(CASES)


@pytest.mark.parametrize(("lengths", "counts"), [([], [3]), ([8], []), ([0], [3]), ([8], [0]), ([8.0], [3])])
def test_sweep_refuses_a_grid(index: TraceIndex, lengths: list[int], counts: list[int]) -> None:
    with pytest.raises(ParameterError):
        sweep(index, CASES, lengths, counts)


@pytest.mark.parametrize(
    "cases",
    [[], [Case("t", "i", 1, {})], [Case("t", "i", 1, {"strict": frozenset("a"), "full": frozenset()})]],
)
def test_cases_without_truth_are_refused(index: TraceIndex, cases: list[Case]) -> None:
    with pytest.raises(ParameterError):
        grade_many({"cover": CoverRanker(index)}, cases)
    with pytest.raises(ParameterError):
        sweep(index, cases, [8], [3])


def synthetic_frame() -> Iterator[dict[str, object]]:
    rng = np.random.default_rng(6)
    for world, item, _ in itertools.product(range(2), range(8), range(3)):
        for method in ("x", "y"):
            empty = method == "y" and item == 0
            values = dict.fromkeys(METRICS, 0.0) | {"recall": rng.random(), "empty": empty}
            values["precision"] = math.nan if empty else rng.random()
            yield {"method": method, "world": world, "item": f"i{item}", "truth": "strict", **values}


def test_summarise_clusters_by_item_and_counts_what_is_missing() -> None:
    frame = pd.DataFrame(synthetic_frame())
    table = summarise(frame, ["method"]).set_index(["method", "metric"])
    assert len(table) == 2 * len(METRICS)
    group = frame[(frame["method"] == "x")]
    expected = clustered_bootstrap(group["recall"].to_numpy(), group["item"].tolist())
    assert tuple(table.loc[("x", "recall"), ["estimate", "low", "high", "n"]]) == pytest.approx(expected)
    assert table.loc[("x", "recall"), "text"] == str(expected)
    assert table.loc[("x", "precision"), "n"] == 48
    assert table.loc[("y", "precision"), "n"] == 42
    assert table.loc[("y", "precision"), "clusters"] == 7
    assert table.loc[("y", "empty"), "estimate"] == pytest.approx(6 / 48)
    both = summarise(frame, ["method"], clusters=["world", "item"]).set_index(["method", "metric"])
    assert both.loc[("x", "recall"), "clusters"] == 16


def test_summarise_where_nothing_is_defined() -> None:
    ranker = Fixed({"t": []})
    cases = [Case("t", name, 1, {"strict": frozenset("a")}) for name in "ij"]
    table = summarise(grade_many({"silent": ranker}, cases)).set_index("metric")
    assert table.loc["precision", "n"] == 0
    assert math.isnan(table.loc["precision", "estimate"])
    assert table.loc["precision", "text"] == "undefined (n = 0)"
    assert table.loc["recall", "text"] == "0.00 [0.00, 0.66] (n = 2)"  # two items, both silent
    assert table.loc["empty", "estimate"] == 1


def test_summarise_keeps_the_unfiltered_row(index: TraceIndex) -> None:
    frame = sweep(index, CASES, [4], [3, None])
    table = summarise(frame, ["min_length", "max_count", "truth"])
    assert set(table["max_count"]) == {3.0, math.inf}
    assert len(table) == 2 * 2 * len(METRICS)


def test_summarise_keeps_methods_without_a_grid(index: TraceIndex) -> None:
    """Rankers stand next to the grid in one table: their cells of the grid's columns are missing."""
    joined = pd.concat([sweep(index, CASES, [4], [3]), grade_many({"cover": CoverRanker(index, 4)}, CASES)])
    assert set(summarise(joined, ["method", "min_length"])["method"]) == {"maximal spans", "cover"}


def test_summarise_names_a_missing_column() -> None:
    with pytest.raises(ParameterError, match="colour"):
        summarise(pd.DataFrame(synthetic_frame()), ["colour"])
