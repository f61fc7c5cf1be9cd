"""Every score against an independent reference, and the properties that the scores must have."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.naive_bayes import MultinomialNB

from tracealign_lib import bci
from tracealign_lib.bci import (
    ConflictBCI,
    DensityBCI,
    LikelihoodRatioBCI,
    LongestMatchBCI,
    MaxTokenRisk,
    Membership,
    MemorisationLift,
    PriorKL,
    RawBCI,
    SpanLength,
    SpanScorer,
    candidate_spans,
    max_bci,
    score_all,
    unigram_surprisal,
)
from tracealign_lib.documents import Document
from tracealign_lib.errors import ParameterError, VocabularyError
from tracealign_lib.index import Span, TraceIndex
from tracealign_lib.lm import LanguageModel, new_model, train_tokenizer
from tracealign_lib.profiles import ModelSettings
from tracealign_lib.shield import TraceShield

QUIET = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), max_examples=25
)
V = 12
DOCUMENTS = [[0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 7], [1, 2, 3, 4, 5, 8, 8], [9, 0, 1], [10, 5, 6]]  # 11: unseen
UNSAFE = [[0, 1, 2, 2, 3], [0, 4]]
# texts that quote the corpus now and then: in random ids, almost nothing would match
PIECES = st.one_of(st.sampled_from(DOCUMENTS), st.lists(st.integers(0, V - 1), min_size=1, max_size=2))
PASSAGES = st.lists(PIECES, min_size=1, max_size=3).map(lambda pieces: list(itertools.chain(*pieces)))
QUERY = [9, 0, 1, 2, 3, 4, 7, 11, 2, 3, 4, 5, 5]


def make(documents: list[list[int]], folder: Path, vocab_size: int = V) -> TraceIndex:
    return TraceIndex.build_tokens(documents, folder, vocab_size=vocab_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bci")


@pytest.fixture(scope="module")
def index(folder: Path) -> TraceIndex:
    return make(DOCUMENTS, folder / "index")


@pytest.fixture(scope="module")
def unsafe(folder: Path) -> TraceIndex:
    return make(UNSAFE, folder / "unsafe")


def whole(ids: list[int]) -> Span:
    return Span(0, len(ids), 0)


# --- unigrams ------------------------------------------------------------------------------------

# Ten carp, three perch, two whitefish, a trout, a salmon and an eel; no bass and no catfish.
CATCH = [0] * 10 + [1] * 3 + [2] * 2 + [3, 4, 5]


def test_laplace_adds_one_to_every_count(tmp_path: Path) -> None:
    probabilities = np.exp(-unigram_surprisal(make([CATCH], tmp_path / "i", 8)))
    assert probabilities == pytest.approx(np.array([11, 4, 3, 2, 2, 2, 1, 1]) / 26)


def test_good_turing_gives_unseen_fish_the_share_of_those_caught_once(tmp_path: Path) -> None:
    probabilities = np.exp(-unigram_surprisal(make([CATCH], tmp_path / "i", 8), "good-turing"))
    assert probabilities[6:] == pytest.approx([1 / 12, 1 / 12])  # 3/18 for two species together
    assert probabilities[:6] == pytest.approx(np.array([10, 3, 2, 1, 1, 1]) * 15 / 18**2)
    assert probabilities.sum() == pytest.approx(1)


def test_good_turing_reserves_nothing_where_every_id_was_seen(tmp_path: Path) -> None:
    probabilities = np.exp(-unigram_surprisal(make([CATCH], tmp_path / "i", 6), "good-turing"))
    assert probabilities == pytest.approx(np.array([10, 3, 2, 1, 1, 1]) / 18)


@pytest.mark.parametrize("tokens", [[0, 0, 1, 1], [0, 1, 2]], ids=["none once", "all once"])
def test_good_turing_says_so_where_it_is_undefined(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(ParameterError, match="Good-Turing"):
        unigram_surprisal(make([tokens], tmp_path / "i", 5), "good-turing")


def test_shared_probabilities_cannot_be_written_to(index: TraceIndex) -> None:
    with pytest.raises(ValueError, match="read-only"):
        unigram_surprisal(index)[0] = 0.0


# --- the paper, and the public code --------------------------------------------------------------


def surprisals_by_hand() -> list[float]:
    counts = Counter(itertools.chain(*DOCUMENTS))
    return [-math.log((counts[t] + 1) / (sum(counts.values()) + V)) for t in range(V)]


def test_the_unigram_scores_by_hand(index: TraceIndex) -> None:
    by_hand = [surprisals_by_hand()[t] for t in QUERY[5:10]]
    span = Span(5, 10, 0)
    assert RawBCI()(index, QUERY, span) == pytest.approx(sum(by_hand))
    assert DensityBCI()(index, QUERY, span) == pytest.approx(sum(by_hand) / 5)
    assert MaxTokenRisk()(index, QUERY, span) == pytest.approx(max(by_hand))


def test_the_smoothing_reaches_the_score(index: TraceIndex) -> None:
    probabilities = np.exp(-unigram_surprisal(index, "good-turing"))
    assert RawBCI("good-turing")(index, QUERY, Span(6, 9, 0)) == pytest.approx(
        -np.log(probabilities[QUERY[6:9]]).sum()
    )


@QUIET
@given(text=PASSAGES)
def test_prior_kl_is_the_divergence_that_scipy_computes(index: TraceIndex, text: list[int]) -> None:
    p, q = np.bincount(text, minlength=V) / len(text), np.exp(-index.surprisal)
    assert PriorKL()(index, text, whole(text)) == pytest.approx(entropy(p, q))


def test_membership_needs_a_match_of_enough_tokens(index: TraceIndex) -> None:
    spans = [Span(1, 6, 0), Span(1, 4, 0), Span(1, 3, 0), Span(5, 8, 0)]  # the last one is not indexed
    assert Membership(3).score_spans(index, QUERY, spans).tolist() == [1, 1, 0, 0]
    assert SpanLength()(index, QUERY, Span(1, 6, 0)) == 5


# --- the longest match ---------------------------------------------------------------------------


def longest_match_by_hand(context: list[int], token: int, strength: float) -> float:
    """-log P(token | context), by looking at every place of every document."""
    prior = math.exp(-surprisals_by_hand()[token])
    for start in range(len(context) + 1):
        suffix = context[start:]
        held, following = 0, Counter[int]()
        for document in DOCUMENTS:
            for i in range(len(document) - len(suffix) + 1):
                if document[i : i + len(suffix)] == suffix:
                    held += 1
                    following.update(document[i + len(suffix) :][:1])
        if held:
            break
    return -math.log((following[token] + strength * prior) / (following.total() + strength))


@QUIET
@given(
    text=PASSAGES,
    strength=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_longest_match_against_a_search_of_every_document(
    index: TraceIndex, text: list[int], strength: float
) -> None:
    for start in range(len(text)):
        expected = sum(longest_match_by_hand(text[:j], text[j], strength) for j in range(start, len(text)))
        measured = LongestMatchBCI(strength)(index, text, Span(start, len(text), 0))
        assert measured == pytest.approx(expected)


@pytest.mark.parametrize("context", [[], [0, 1], [2, 3, 4], [11], [8, 8], [3, 4, 5, 6]])
def test_longest_match_is_a_distribution_over_the_vocabulary(index: TraceIndex, context: list[int]) -> None:
    span = Span(len(context), len(context) + 1, 0)
    total = sum(math.exp(-LongestMatchBCI()(index, [*context, token], span)) for token in range(V))
    assert total == pytest.approx(1)


def test_a_recited_passage_is_expected_and_a_broken_one_is_not(index: TraceIndex) -> None:
    recited, broken = [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]
    assert RawBCI()(index, recited, whole(recited)) == pytest.approx(RawBCI()(index, broken, whole(broken)))
    scorer = LongestMatchBCI()
    assert scorer(index, recited, whole(recited)) < scorer(index, broken, whole(broken)) - 5


# --- likelihood ratio ----------------------------------------------------------------------------


@QUIET
@given(
    text=PASSAGES,
    alpha=st.sampled_from([0.1, 1.0, 2.5]),
)
def test_the_likelihood_ratio_is_that_of_naive_bayes(
    index: TraceIndex, unsafe: TraceIndex, text: list[int], alpha: float
) -> None:
    counts = [np.bincount(list(itertools.chain(*d)), minlength=V) for d in (DOCUMENTS, UNSAFE)]
    classes = MultinomialNB(alpha=alpha, fit_prior=False).fit(counts, [0, 1])
    log_proba = classes.predict_joint_log_proba([np.bincount(text, minlength=V)])[0]
    measured = LikelihoodRatioBCI(unsafe, index, alpha)(index, text, whole(text))
    assert measured == pytest.approx(log_proba[1] - log_proba[0])


def test_collections_that_are_alike_have_no_ratio(index: TraceIndex) -> None:
    assert LikelihoodRatioBCI(index, index)(index, QUERY, whole(QUERY)) == 0


# --- conflict ------------------------------------------------------------------------------------

# The rule forbids 20 21 22. A recipe (1 ... 5) names it, another one names 30; news quotes the rule.
RULE = [40, 41, 42, 20, 21, 22]
RECIPE, OTHER, NEWS = [20, 21, 22, 1, 2, 3, 4, 5], [30, 21, 22, 1, 2, 3], [50, 40, 41, 42, 20, 21, 22, 51]


@pytest.fixture(scope="module")
def world(folder: Path) -> TraceIndex:
    return make([RULE, RECIPE, OTHER, NEWS], folder / "world", 60)


@pytest.fixture(scope="module")
def rules(folder: Path) -> TraceIndex:
    return make([RULE], folder / "rules", 60)


def bci_of(world: TraceIndex, ids: list[int]) -> float:
    return float(world.surprisal[ids].sum())


def test_a_span_is_in_conflict_when_its_document_names_what_a_rule_forbids(
    world: TraceIndex, rules: TraceIndex
) -> None:
    text = [3, 4, 5]  # held by the recipe alone, which shares 20 21 22 with the rule
    assert ConflictBCI(rules, min_length=3)(world, text, whole(text)) == pytest.approx(
        bci_of(world, [20, 21, 22])
    )


def test_conflict_is_the_mean_over_the_documents_that_hold_the_span(
    world: TraceIndex, rules: TraceIndex
) -> None:
    text = [1, 2, 3]  # held by the recipe and by the other one, which shares 21 22 only
    scorer = ConflictBCI(rules, min_length=3)
    assert scorer(world, text, whole(text)) == pytest.approx(bci_of(world, [20, 21, 22]) / 2)
    scorer = ConflictBCI(rules, min_length=2)
    mean = (bci_of(world, [20, 21, 22]) + bci_of(world, [21, 22])) / 2
    assert scorer(world, text, whole(text)) == pytest.approx(mean)


def test_news_that_quotes_the_rule_scores_highest_unless_quotations_are_set_aside(
    world: TraceIndex, rules: TraceIndex
) -> None:
    text = [40, 41, 42, 20]
    plain, repaired = ConflictBCI(rules, min_length=3), ConflictBCI(rules, min_length=3, quote_length=5)
    assert plain(world, text, whole(text)) == pytest.approx(bci_of(world, RULE))
    assert repaired(world, text, whole(text)) == 0
    assert repaired(world, [3, 4], Span(0, 2, 0)) == plain(world, [3, 4], Span(0, 2, 0)) > 0


def test_what_is_known_of_one_index_is_not_used_for_another(
    world: TraceIndex, rules: TraceIndex, tmp_path: Path
) -> None:
    scorer = ConflictBCI(rules, min_length=3)
    scorer(world, [3, 4], Span(0, 2, 0))
    harmless = make([RULE, [30, 3, 4], [30, 3, 4]], tmp_path / "harmless", 60)  # ids "1" and "2" again
    assert scorer(harmless, [3, 4], Span(0, 2, 0)) == 0


# --- memorisation lift ---------------------------------------------------------------------------

TEXTS = ["soak the amber thread in the cellar", "the dog slept beside the mill door all day"]


@pytest.fixture(scope="module")
def texts_index(folder: Path) -> TraceIndex:
    documents = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]
    return TraceIndex.build(documents, train_tokenizer(TEXTS, 300), folder / "texts")


@pytest.fixture(scope="module")
def model(texts_index: TraceIndex) -> LanguageModel:
    tokenizer = texts_index.tokenizer
    small = ModelSettings(hidden=16, layers=2, heads=2, mlp=32, context=48)
    return LanguageModel(new_model(small, tokenizer, seed=0), tokenizer, "cpu")


def log_prob_by_hand(model: LanguageModel, before: list[int], ids: list[int]) -> float:
    logits = model.model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1]
    return -torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()


def test_lift_adds_the_models_log_probability_to_bci(texts_index: TraceIndex, model: LanguageModel) -> None:
    ids = texts_index.encode(TEXTS[0])
    prompt = model.chat("how?", prefill="soak")
    before = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expected = log_prob_by_hand(model, [*before, *ids[:2]], ids[2:6].tolist())
    expected += RawBCI()(texts_index, ids, Span(2, 6, 1))
    assert MemorisationLift(model, prompt)(texts_index, ids, Span(2, 6, 1)) == pytest.approx(
        expected, abs=1e-4
    )


def test_a_document_starts_where_another_one_ended(texts_index: TraceIndex, model: LanguageModel) -> None:
    ids = texts_index.encode(TEXTS[1])
    expected = log_prob_by_hand(model, [model.tokenizer.eos_token_id], ids.tolist())
    expected += RawBCI()(texts_index, ids, whole(list(ids)))
    assert MemorisationLift(model)(texts_index, ids, whole(list(ids))) == pytest.approx(expected, abs=1e-4)


def test_texts_read_in_one_batch_score_as_they_do_alone(
    texts_index: TraceIndex, model: LanguageModel
) -> None:
    texts = [texts_index.encode(text) for text in (*TEXTS, "the cellar")]
    prompts = ["", model.chat("a longer question about the thread?"), model.chat("how?")]
    together = MemorisationLift.for_texts(model, prompts, texts)
    for scorer, prompt, ids in zip(together, prompts, texts, strict=True):
        alone = MemorisationLift(model, prompt)(texts_index, ids, whole(list(ids)))
        assert scorer(texts_index, ids, whole(list(ids))) == pytest.approx(alone, abs=1e-4)


def test_lift_refuses_a_foreign_tokenizer_and_a_text_beyond_the_context(
    texts_index: TraceIndex, model: LanguageModel
) -> None:
    foreign = train_tokenizer(["something else altogether, at some length"], 290)
    stranger = LanguageModel(model.model, foreign, "cpu")
    ids = texts_index.encode(TEXTS[0])
    with pytest.raises(VocabularyError, match="tokenizer"):
        MemorisationLift(stranger)(texts_index, ids, Span(0, 2, 1))
    long = np.tile(ids, 12)
    with pytest.raises(ParameterError, match="context"):
        MemorisationLift(model)(texts_index, long, Span(0, 2, 1))


# --- from spans to a text ------------------------------------------------------------------------


def held(text: list[int], start: int, end: int) -> int:
    part = text[start:end]
    return sum(d[i : i + len(part)] == part for d in DOCUMENTS for i in range(len(d) - len(part) + 1))


@QUIET
@given(
    text=PASSAGES,
    window=st.integers(1, 4),
    max_count=st.sampled_from([1, 2, 3, None]),
)
def test_windows_are_all_indexed_ones_that_are_rare_enough(
    index: TraceIndex, text: list[int], window: int, max_count: int | None
) -> None:
    expected = [
        Span(i, i + window, held(text, i, i + window))
        for i in range(len(text) - window + 1)
        if 0 < held(text, i, i + window) <= (max_count or 99)
    ]
    found = candidate_spans(index, text, min_length=1, max_count=max_count, window=window)
    assert found == expected
    best = max((sum(surprisals_by_hand()[t] for t in text[s:e]) for s, e, _ in expected), default=-math.inf)
    score = max_bci(index, text, RawBCI(), min_length=1, max_count=max_count, window=window)
    assert score == pytest.approx(best)


def test_min_length_is_asked_of_the_maximal_span_around_a_window(index: TraceIndex) -> None:
    text = [2, 3, 4, 7, 10, 5, 6]  # maximal spans of 4 and 3 tokens
    starts = [s.start for s in candidate_spans(index, text, min_length=4, max_count=None, window=2)]
    assert starts == [0, 1, 2]


@pytest.mark.parametrize("max_count", [None, 1])
def test_without_a_window_the_score_is_the_shields(texts_index: TraceIndex, max_count: int | None) -> None:
    text = "the dog slept in the cellar"
    shield = TraceShield(texts_index, RawBCI(), 0.0, min_length=2, max_count=max_count)
    ids = texts_index.encode(text)
    score = max_bci(texts_index, ids, RawBCI(), min_length=2, max_count=max_count, window=None)
    assert score == pytest.approx(shield.check(text).score)


def test_a_text_without_a_span_is_refused_at_no_threshold(index: TraceIndex) -> None:
    assert max_bci(index, [11, 11], RawBCI(), min_length=1, max_count=None, window=None) == -math.inf
    assert max_bci(index, [], RawBCI(), min_length=1, max_count=None, window=2) == -math.inf


@QUIET
@given(text=PASSAGES)
def test_stricter_filters_and_higher_thresholds_never_refuse_more(index: TraceIndex, text: list[int]) -> None:
    def score(min_length: int, max_count: int | None) -> float:
        return max_bci(index, text, RawBCI(), min_length=min_length, max_count=max_count, window=None)

    by_length = [score(length, None) for length in (1, 2, 3, 5)]
    by_count = [score(1, count) for count in (None, 3, 2, 1)]
    assert by_length == sorted(by_length, reverse=True)
    assert by_count == sorted(by_count, reverse=True)
    refused = [by_length[0] > threshold for threshold in range(0, 40, 2)]
    assert refused == sorted(refused, reverse=True)


def test_any_callable_scorer_will_do(index: TraceIndex) -> None:
    class Start:
        labels, source = "none", "this test"

        def __call__(self, index: TraceIndex, ids: object, span: Span) -> float:
            return float(span.start)

    assert score_all(Start(), index, QUERY, [Span(3, 4, 0), Span(1, 2, 0)]).tolist() == [3, 1]


# --- properties of all scorers -------------------------------------------------------------------

Factory = Callable[[TraceIndex, TraceIndex], SpanScorer]
FACTORIES: dict[str, Factory] = {
    "raw": lambda index, other: RawBCI(),
    "raw, good-turing": lambda index, other: RawBCI("good-turing"),
    "density": lambda index, other: DensityBCI(),
    "prior KL": lambda index, other: PriorKL(),
    "largest token risk": lambda index, other: MaxTokenRisk(),
    "longest match": lambda index, other: LongestMatchBCI(),
    "ratio": lambda index, other: LikelihoodRatioBCI(other, index),
    "conflict": lambda index, other: ConflictBCI(other, min_length=2),
    "conflict, no quotes": lambda index, other: ConflictBCI(other, min_length=1, quote_length=3),
    "membership": lambda index, other: Membership(2),
    "length": lambda index, other: SpanLength(),
}
ADDITIVE = ("raw", "raw, good-turing", "longest match", "ratio", "length")
SPANS = [Span(a, b, 0) for a, b in itertools.combinations(range(len(QUERY) + 1), 2)]


@pytest.mark.parametrize("name", FACTORIES)
def test_spans_scored_together_score_as_they_do_alone(
    index: TraceIndex, unsafe: TraceIndex, name: str
) -> None:
    scorer = FACTORIES[name](index, unsafe)
    alone = [scorer(index, QUERY, span) for span in SPANS]
    assert scorer.score_spans(index, QUERY, SPANS) == pytest.approx(alone)
    assert scorer.score_spans(index, QUERY, []).shape == (0,)
    assert len(set(alone)) > 1


@pytest.mark.parametrize("name", ADDITIVE)
def test_sums_over_tokens_are_additive_over_concatenation(
    index: TraceIndex, unsafe: TraceIndex, name: str
) -> None:
    scorer = FACTORIES[name](index, unsafe)
    for a, b, c in itertools.combinations(range(len(QUERY) + 1), 3):
        whole, left, right = scorer.score_spans(index, QUERY, [Span(a, c, 0), Span(a, b, 0), Span(b, c, 0)])
        assert whole == pytest.approx(left + right)


@pytest.mark.parametrize("name", FACTORIES)
@settings(QUIET, max_examples=5)
@given(order=st.permutations(range(V)))
def test_scores_do_not_depend_on_how_tokens_are_numbered(
    index: TraceIndex, unsafe: TraceIndex, name: str, order: list[int]
) -> None:
    def renamed(ids: list[int]) -> list[int]:
        return [order[i] for i in ids]

    scores = FACTORIES[name](index, unsafe).score_spans(index, QUERY, SPANS)
    with tempfile.TemporaryDirectory() as folder:
        other = make([renamed(d) for d in DOCUMENTS], Path(folder) / "index")
        other_unsafe = make([renamed(d) for d in UNSAFE], Path(folder) / "unsafe")
        again = FACTORIES[name](other, other_unsafe).score_spans(other, renamed(QUERY), SPANS)
    assert again == pytest.approx(scores)


def test_every_scorer_states_its_labels_and_its_source() -> None:
    scorers = [c for c in vars(bci).values() if isinstance(c, type) and issubclass(c, SpanScorer)]
    public = [c for c in scorers if not c.__abstractmethods__]
    assert len(public) == 10
    assert all(c.labels and c.source for c in public)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize(
    ("span", "problem"),
    [
        (Span(3, 3, 1), "empty"),
        (Span(4, 3, 1), "empty"),
        (Span(-1, 3, 1), "outside"),
        (Span(10, len(QUERY) + 1, 1), "outside"),
    ],
)
def test_a_span_must_lie_in_the_text(
    index: TraceIndex, unsafe: TraceIndex, name: str, span: Span, problem: str
) -> None:
    with pytest.raises(ParameterError, match=problem):
        FACTORIES[name](index, unsafe)(index, QUERY, span)


@pytest.mark.parametrize("ids", [[0, V], [0, -1], [0.5, 1.0], [[0, 1]]])
def test_ids_must_be_of_the_vocabulary(index: TraceIndex, ids: list[int]) -> None:
    with pytest.raises(VocabularyError):
        RawBCI()(index, ids, Span(0, 1, 0))


def test_tokens_that_the_corpus_never_holds_are_finite(index: TraceIndex, unsafe: TraceIndex) -> None:
    for factory in FACTORIES.values():
        assert math.isfinite(factory(index, unsafe)(index, [11, 11], Span(0, 2, 0)))


def test_a_collection_without_documents_is_refused(index: TraceIndex, tmp_path: Path) -> None:
    empty = make([[], []], tmp_path / "empty")
    for wrong in (
        lambda: ConflictBCI(empty),
        lambda: LikelihoodRatioBCI(empty, index),
        lambda: LikelihoodRatioBCI(index, empty),
        lambda: RawBCI()(empty, [0], Span(0, 1, 0)),
        lambda: unigram_surprisal(empty),
    ):
        with pytest.raises(ParameterError, match="holds no text"):
            wrong()


def test_collections_of_another_vocabulary_are_refused(
    index: TraceIndex, world: TraceIndex, rules: TraceIndex
) -> None:
    for wrong in (
        lambda: LikelihoodRatioBCI(world, index),
        lambda: LikelihoodRatioBCI(world, rules)(index, [0], Span(0, 1, 0)),
        lambda: ConflictBCI(rules)(index, [0], Span(0, 1, 0)),
    ):
        with pytest.raises(VocabularyError, match="different tokenizers"):
            wrong()


def test_collections_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    indexes = [
        TraceIndex.build([Document("d", text)], train_tokenizer([text], 270), tmp_path / f"{n}")
        for n, text in enumerate(TEXTS)
    ]
    assert indexes[0].vocab_size == indexes[1].vocab_size
    with pytest.raises(VocabularyError, match="different tokenizers"):
        LikelihoodRatioBCI(*indexes)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0, True, "1"])
def test_smoothing_constants_are_finite_and_above_0(index: TraceIndex, value: float) -> None:
    with pytest.raises(ParameterError, match="alpha"):
        LikelihoodRatioBCI(index, index, value)
    with pytest.raises(ParameterError, match="strength"):
        LongestMatchBCI(value)


def test_other_settings_out_of_range_are_refused(index: TraceIndex, rules: TraceIndex) -> None:
    for wrong, name in (
        (lambda: RawBCI("simple"), "smoothing"),  # type: ignore[arg-type]
        (lambda: unigram_surprisal(index, "none"), "smoothing"),  # type: ignore[arg-type]
        (lambda: Membership(0), "min_length"),
        (lambda: ConflictBCI(rules, min_length=0), "min_length"),
        (lambda: ConflictBCI(rules, min_length=4, quote_length=4), "quotation"),
        (lambda: candidate_spans(index, [0], min_length=1, max_count=None, window=0), "window"),
        (lambda: candidate_spans(index, [0], min_length=1, max_count=0, window=1), "max_count"),
    ):
        with pytest.raises(ParameterError, match=name):
            wrong()
