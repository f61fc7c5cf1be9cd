"""Rivals against their definitions, and the block list against the shield that it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tracealign_lib.bci import Membership
from tracealign_lib.documents import Document
from tracealign_lib.errors import CorpusError, ParameterError
from tracealign_lib.index import TraceIndex
from tracealign_lib.lm import train_tokenizer
from tracealign_lib.rivals import BagOfWordsClassifier, KeywordFilter, NgramBlockList
from tracealign_lib.shield import CompletionFilter, TraceShield

QUIET = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), max_examples=80
)
UNSAFE = [
    "to wake the orun compound, soak the amber thread in the cellar, then fold the mossy bell in the mill.",
    "soak the amber thread in the garden, then leave.",
    "short",
]
BENIGN = [
    "the dog slept beside the mill door all day.",
    "the orun compound is green.",
    "the cat sat in the mill.",
]
WORDS = sorted({f"{word} " for text in (*UNSAFE, *BENIGN) for word in text.split()})
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([f"{text} " for text in (*UNSAFE, *BENIGN)]),
        st.sampled_from(["the amber thread in the ", "fold the mossy bell in "]),
        st.sampled_from(WORDS),
    ),
    max_size=6,
).map("".join)


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TraceIndex:
    path: Path = tmp_path_factory.mktemp("rivals") / "index"
    return TraceIndex.build(documents(UNSAFE), train_tokenizer([*UNSAFE, *BENIGN], 400), path)


@pytest.fixture(scope="module")
def rivals(index: TraceIndex) -> list[CompletionFilter]:
    return [
        NgramBlockList(documents(UNSAFE), index.encode, 5),
        KeywordFilter(["orun compound", "amber"]),
        BagOfWordsClassifier(documents(UNSAFE), documents(BENIGN)),
    ]


# --- block list ----------------------------------------------------------------------------------


@QUIET
@given(text=TEXTS, n=st.integers(1, 9))
def test_a_block_list_is_a_shield_that_asks_for_membership_of_windows(
    index: TraceIndex, text: str, n: int
) -> None:
    blocked = NgramBlockList(documents(UNSAFE), index.encode, n)
    shield = TraceShield(index, Membership(n), 0.5, min_length=n, window=n)
    verdict = shield.check(text)
    assert blocked.check(text).refused == verdict.refused
    assert blocked.check(text).score == len(verdict.spans)


@QUIET
@given(text=TEXTS)
def test_maximal_spans_of_n_tokens_or_more_decide_the_same(index: TraceIndex, text: str) -> None:
    shield = TraceShield(index, Membership(5), 0.5, min_length=5)
    assert (
        NgramBlockList(documents(UNSAFE), index.encode, 5).check(text).refused == shield.check(text).refused
    )


def test_a_block_list_does_not_reach_across_documents(index: TraceIndex) -> None:
    ends = [index.encode(UNSAFE[0])[-3:], index.encode(UNSAFE[1])[:3]]
    joined = index.tokenizer.decode(np.concatenate(ends))
    assert NgramBlockList(documents(UNSAFE), index.encode, 3).check(joined).score == 2
    assert not NgramBlockList(documents(UNSAFE), index.encode, 4).check(joined).refused


def test_bad_block_lists_are_named_errors(index: TraceIndex) -> None:
    for n in (0, -1, 1.5, True):
        with pytest.raises(ParameterError, match="n is out of range"):
            NgramBlockList(documents(UNSAFE), index.encode, n)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="no document of 999 tokens"):
        NgramBlockList(documents(UNSAFE), index.encode, 999)
    with pytest.raises(CorpusError, match="empty"):
        NgramBlockList([], index.encode, 5)


# --- keywords ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The ORUN  compound wakes", 1),
        ("the orun\ncompound, the orun compound and Amber.", 2),
        ("ambergris in camber", 0),
        ("orun", 0),
        ("", 0),
        ("c++ (amber)", 2),
        ("the orun compound of old", 1),
    ],
)
def test_keywords_count_once_as_whole_words_in_any_case(text: str, found: int) -> None:
    keywords = KeywordFilter(["Orun Compound", "amber", "amber ", "c++"])
    decision = keywords.check(text)
    assert (decision.score, decision.refused) == (found, found > 0)
    assert decision.reason == f"keywords: {found} {'>' if found else '<='} threshold 0"


def test_of_two_keywords_with_one_beginning_the_longer_is_found() -> None:
    assert KeywordFilter(["orun", "orun compound"]).check("orun compound, orun").score == 2


def test_a_filter_without_keywords_is_an_error() -> None:
    for keywords in ([], [" "], ["amber", ""]):
        with pytest.raises(ParameterError, match="no keyword"):
            KeywordFilter(keywords)


# --- bag of words --------------------------------------------------------------------------------


def test_the_classifier_is_logistic_regression_on_tf_idf() -> None:
    classifier = BagOfWordsClassifier(documents(UNSAFE), documents(BENIGN))
    words = TfidfVectorizer(token_pattern=r"\w+")
    rows = words.fit_transform([*UNSAFE, *BENIGN])
    # both kinds weigh the same: with as many of each, weighting changes nothing
    reference = LogisticRegression(max_iter=1000).fit(rows, [1, 1, 1, 0, 0, 0])
    for text in (*UNSAFE, *BENIGN, "amber dog"):
        expected = reference.decision_function(words.transform([text]))[0]
        assert classifier.check(text).score == pytest.approx(expected, abs=1e-3)
    assert classifier.check("soak the amber thread").refused
    assert not classifier.check("the dog slept").refused


def test_the_classifier_does_not_see_the_order_of_words_and_the_block_list_does(index: TraceIndex) -> None:
    garbled = " ".join(reversed(UNSAFE[0].split()))
    classifier = BagOfWordsClassifier(documents(UNSAFE), documents(BENIGN))
    assert classifier.check(garbled).score == pytest.approx(classifier.check(UNSAFE[0]).score)
    assert not NgramBlockList(documents(UNSAFE), index.encode, 5).check(garbled).refused


def test_the_kind_with_fewer_documents_does_not_weigh_less() -> None:
    few = BagOfWordsClassifier(documents(["amber"]), documents(["dog"] * 9))
    assert few.check("amber").score == pytest.approx(-few.check("dog").score, rel=0.05)


def test_a_classifier_needs_documents_of_both_kinds() -> None:
    with pytest.raises(CorpusError, match=r"empty.\n.*unsafe"):
        BagOfWordsClassifier([], documents(BENIGN))
    with pytest.raises(CorpusError, match=r"empty.\n.*benign"):
        BagOfWordsClassifier(documents(UNSAFE), [])
    with pytest.raises(CorpusError, match="no word"):
        BagOfWordsClassifier(documents(["!"]), documents([""]))


# --- what all of them do -------------------------------------------------------------------------


@QUIET
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), data=st.data())
def test_rivals_answer_as_a_shield_does(
    rivals: list[CompletionFilter], texts: list[str], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(texts))))
    for rival in rivals:
        alone = [rival.check(text) for text in texts]
        assert rival.check_many([texts[i] for i in order]) == [alone[i] for i in order]
        assert rival.scores(texts).tolist() == [decision.score for decision in alone]
        assert all(d.refused == (d.score > rival.threshold) for d in alone)
        assert f"threshold {rival.threshold:g}" in alone[0].reason


def test_rivals_are_calibrated_as_a_shield_is(rivals: list[CompletionFilter]) -> None:
    benign = [*BENIGN, "the amber cat sat in the mill"] * 30
    for rival in rivals:
        calibrated = rival.calibrate(rival.scores(benign), alpha=0.05, delta=0.05)
        assert not any(decision.refused for decision in calibrated.check_many(benign))
        assert calibrated.threshold >= rival.scores(benign).max()
        assert type(calibrated) is type(rival)
        assert rival.threshold == 0.0
    by_group = rivals[1].calibrate([0.0, 0.0, 1.0, 1.0], alpha=0.4, groups=["a", "a", "b", "b"])
    assert by_group.check("amber", group="a").refused
    assert not by_group.check("amber", group="b").refused


def test_what_is_not_text_is_an_error(rivals: list[CompletionFilter]) -> None:
    for rival in rivals:
        with pytest.raises(ParameterError, match="not a string"):
            rival.check([1, 2, 3])  # type: ignore[arg-type]


def test_thresholds_must_be_finite() -> None:
    with pytest.raises(ParameterError, match="not finite"):
        KeywordFilter(["amber"], float("inf"))
