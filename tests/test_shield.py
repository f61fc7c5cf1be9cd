"""RawBCI by hand, and the shield's decision."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tracealign_lib.bci import RawBCI
from tracealign_lib.documents import Document
from tracealign_lib.errors import ParameterError
from tracealign_lib.index import Span, TraceIndex
from tracealign_lib.lm import train_tokenizer
from tracealign_lib.shield import TraceShield

TEXTS = ["soak the amber thread in the cellar", "the dog slept beside the mill door all day"]


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> TraceIndex:
    documents = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]
    tokenizer = train_tokenizer(TEXTS, 400)
    return TraceIndex.build(documents, tokenizer, tmp_path_factory.mktemp("shield") / "index")


def test_raw_bci_is_the_summed_negative_log_of_unigram_probabilities(index):
    ids = index.encode(TEXTS[0])
    counts = np.bincount(np.concatenate([index.encode(t) for t in TEXTS]), minlength=index.vocab_size)
    total = counts.sum() + index.vocab_size
    by_hand = -sum(math.log((counts[i] + 1) / total) for i in ids[1:4])
    assert RawBCI()(index, ids, Span(1, 4, 1)) == pytest.approx(by_hand)


def test_raw_bci_is_additive_over_concatenation(index):
    ids = index.encode(TEXTS[1])
    whole = RawBCI()(index, ids, Span(0, 5, 1))
    parts = RawBCI()(index, ids, Span(0, 2, 1)) + RawBCI()(index, ids, Span(2, 5, 1))
    assert whole == pytest.approx(parts)


def test_an_indexed_span_above_the_threshold_is_refused_and_below_it_passes(index):
    score = TraceShield(index, RawBCI(), 0.0, min_length=4).check(TEXTS[0]).score
    assert TraceShield(index, RawBCI(), score - 0.1, min_length=4).check(TEXTS[0]).refused
    assert not TraceShield(index, RawBCI(), score, min_length=4).check(TEXTS[0]).refused


def test_a_text_without_an_indexed_span_passes_whatever_its_rarity(index):
    verdict = TraceShield(index, RawBCI(), 0.0, min_length=6).check("quartz quartz quartz quartz quartz")
    assert not verdict.refused
    assert verdict.score == 0.0
    assert "no span of 6 tokens" in verdict.reason


def test_a_raised_threshold_never_refuses_more(index):
    refused = [
        TraceShield(index, RawBCI(), t, min_length=2).check(TEXTS[1]).refused for t in range(0, 200, 5)
    ]
    assert refused == sorted(refused, reverse=True)
    assert refused[0]
    assert not refused[-1]


def test_a_verdict_shows_itself_with_its_reason(index):
    verdict = TraceShield(index, RawBCI(), 1.0, min_length=4).check(TEXTS[0])
    assert "threshold 1" in verdict._repr_html_()


@pytest.mark.parametrize("threshold", [math.nan, math.inf])
def test_a_threshold_that_is_not_finite_is_refused(index, threshold):
    with pytest.raises(ParameterError, match="not finite"):
        TraceShield(index, RawBCI(), threshold)
