"""The add-alpha model against its definition, exhaustive enumeration, and its own samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bound_samples import BASE, QUICK, RISKY, alphas, documents, enumerate_windows, texts_of
from hypothesis import given
from hypothesis import strategies as st

from tracealign_lib.errors import ParameterError, VocabularyError
from tracealign_lib.ngram import NGramModel

MODEL = NGramModel(BASE, vocab_size=3, order=1, alpha=0.5)


def literal_log_prob(base, span, context, order, alpha, vocab_size=3) -> float:
    """The definition, one token at a time: lists, no keys, no logarithms until the end."""
    probability = 1.0
    text = [None] * order + list(context) + list(span)
    for j in range(len(text) - len(span), len(text)):
        before, token = text[j - order : j], text[j]
        grams = contexts = 0
        for document in base:
            padded = [None] * order + list(document)
            for i in range(order, len(padded)):
                contexts += padded[i - order : i] == before
                grams += padded[i - order : i] == before and padded[i] == token
        probability *= (grams + alpha) / (contexts + alpha * vocab_size)
    return math.log(probability)


@given(
    documents,
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
    st.lists(st.integers(0, 2), max_size=4),
    st.integers(0, 3),
    alphas,
)
@QUICK
def test_span_probability_is_the_definition(base, span, context, order, alpha) -> None:
    model = NGramModel(base, vocab_size=3, order=order, alpha=alpha)
    expected = literal_log_prob(base, span, context, order, alpha)
    assert model.span_log_prob(span, context) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_probabilities_of_all_texts_sum_to_one(order: int, temperature: float) -> None:
    model = NGramModel(BASE, vocab_size=3, order=order, alpha=0.3)
    log_probs = model.token_log_probs(texts_of(4), [1], temperature=temperature)  # (81, 4)
    assert np.exp(log_probs.sum(axis=1)).sum() == pytest.approx(1.0)


def test_temperature_is_the_power_of_the_probabilities() -> None:
    model = NGramModel(BASE, vocab_size=3, order=1, alpha=0.3)
    plain = np.exp([model.span_log_prob([token], [0]) for token in range(3)])
    cold = np.exp([model.span_log_prob([token], [0], temperature=0.5) for token in range(3)])
    assert cold == pytest.approx(plain**2 / (plain**2).sum())


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("context", [[], [2], [0, 1]])
def test_samples_follow_the_exact_probabilities(order: int, context: list[int]) -> None:
    model = NGramModel(BASE, vocab_size=3, order=order, alpha=0.4)
    drawn = model.sample(40_000, 3, context, seed=1)
    observed = np.bincount(drawn @ [9, 3, 1], minlength=27)
    exact = np.exp(model.token_log_probs(texts_of(3), context).sum(axis=1))
    deviation = (observed - 40_000 * exact) ** 2 / (40_000 * exact)
    assert deviation.sum() < 56  # chi-squared with 26 degrees of freedom: 56 is its 99.94 % quantile
    assert (drawn == model.sample(40_000, 3, context, seed=1)).all()
    assert (drawn != model.sample(40_000, 3, context, seed=2)).any()


def test_a_model_of_nothing_is_uniform() -> None:
    model = NGramModel([], vocab_size=5, order=2, alpha=0.1)
    assert model.span_log_prob([0, 4, 4]) == pytest.approx(-3 * math.log(5))
    assert len(np.unique(model.sample(500, 1))) == 5


def test_grams_cross_documents_only_when_asked() -> None:
    apart = NGramModel([[0], [1]], vocab_size=3, order=1, alpha=1.0)
    packed = NGramModel([[0], [1]], vocab_size=3, order=1, alpha=1.0, across_documents=True)
    assert apart.gram_counts([1], [0]).tolist() == [0]
    assert packed.gram_counts([1], [0]).tolist() == [1]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("context", [[], [1], [2, 0]])
@pytest.mark.parametrize("risky", RISKY)
def test_expected_windows_by_enumeration(order, context, risky) -> None:
    model = NGramModel(BASE, vocab_size=3, order=order, alpha=0.4)
    probability, found = enumerate_windows(model, context, risky)
    assert model.expected_windows(risky, 6, context) == pytest.approx(found @ probability)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_the_pseudo_count_is_positive(alpha: float) -> None:
    with pytest.raises(ParameterError, match="not positive"):
        NGramModel(BASE, vocab_size=3, order=1, alpha=alpha)


@pytest.mark.parametrize(
    "call",
    [
        lambda: MODEL.span_log_prob([]),
        lambda: MODEL.gram_counts([]),
        lambda: MODEL.token_log_probs([[0.5]]),
        lambda: MODEL.sample(0, 3),
        lambda: MODEL.sample(3, 0),
        lambda: MODEL.expected_windows([[0, 1, 2]], 2),
        lambda: NGramModel(BASE, vocab_size=3, order=2, alpha=0.5).expected_windows([[0]], 2),
        lambda: NGramModel([], vocab_size=5000, order=2, alpha=0.5).expected_windows([[0, 1]], 2),
        lambda: NGramModel([], vocab_size=50_000, order=5, alpha=0.5),
        lambda: NGramModel([], vocab_size=1, order=1, alpha=0.5),
        lambda: NGramModel([], vocab_size=3, order=-1, alpha=0.5),
    ],
)
def test_other_bad_input(call) -> None:
    with pytest.raises(ParameterError):
        call()


def test_unknown_tokens_are_named() -> None:
    with pytest.raises(VocabularyError, match="document has an id outside"):
        NGramModel([[0, 3]], vocab_size=3, order=1, alpha=0.5)
    with pytest.raises(VocabularyError, match="context has an id outside"):
        MODEL.span_log_prob([0], [-1])
    with pytest.raises(VocabularyError, match="span is not a sequence"):
        MODEL.span_log_prob([[0]])
