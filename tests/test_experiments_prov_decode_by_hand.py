"""The definition of the veto, on a corpus of two documents, agrees with itself and with the library."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib.bci import SpanLength
from tracealign_lib.experiments import prov_decode_by_hand as by_hand
from tracealign_lib.experiments.prov_decode import Rule
from tracealign_lib.experiments.prov_decode_steps import vetoed_tokens
from tracealign_lib.index import TraceIndex
from tracealign_lib.prov_decode import ProvDecode

END, V = 0, 8


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TraceIndex:
    documents = [[2, 3, 4, 5, 3, 4], [2, 3, 4, 6]]
    return TraceIndex.build_tokens(documents, tmp_path_factory.mktemp("index") / "index", vocab_size=V)


def test_the_longest_held_suffix(index: TraceIndex) -> None:
    for text, held in (
        ([7, 2, 3], [2, 3]),
        ([2, 3, 4], [2, 3, 4]),
        ([4, 7], []),
        ([6, 3, 4], [3, 4]),
        ([], []),
    ):
        assert by_hand.longest_held_suffix(index, np.array(text, dtype=np.int64)).tolist() == held


def test_a_run_is_risky_if_it_is_long_rare_and_above_the_threshold(index: TraceIndex) -> None:
    run = np.array([2, 3, 4])  # occurs twice
    assert by_hand.is_risky(index, Rule(SpanLength(), 2.0, 3), run)
    assert not by_hand.is_risky(index, Rule(SpanLength(), 3.0, 3), run)
    assert not by_hand.is_risky(index, Rule(SpanLength(), 2.0, 4), run)
    assert by_hand.is_risky(index, Rule(SpanLength(), 2.0, 3, 2), run)
    assert not by_hand.is_risky(index, Rule(SpanLength(), 2.0, 3, 1), run)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, V - 1), min_size=1, max_size=7), st.integers(1, 4), st.sampled_from([None, 1, 2])
)
def test_the_definition_is_the_library(
    index: TraceIndex, text: list[int], least: int, max_count: int | None
) -> None:
    rule = Rule(SpanLength(), 0.0, least, max_count)
    guard = ProvDecode(
        index, rule.scorer, rule.threshold, min_length=least, max_count=max_count, end_ids=[END]
    ).after(0)
    ids = np.array(text, dtype=np.int64)
    assert by_hand.vetoed(index, rule, ids) == vetoed_tokens(guard, ids, V)
