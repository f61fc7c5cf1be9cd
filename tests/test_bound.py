"""The drift bound against exhaustive enumeration, hand calculation, scipy, and its own coverage."""

from __future__ import annotations

import itertools
import math
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tracealign_lib import bound, lm
from tracealign_lib.bound import Control, NGramModel, PairCase, certify, clopper_pearson_upper
from tracealign_lib.errors import ParameterError, VocabularyError
from tracealign_lib.index import TraceIndex
from tracealign_lib.lm import LanguageModel
from tracealign_lib.profiles import get_profile
from tracealign_lib.world import World

BASE = [[0, 2, 1, 1], [1, 0, 2], [2, 2, 0, 1, 0]]
QUICK = settings(deadline=None, derandomize=True, max_examples=60)
documents = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=5)
alphas = st.floats(0.05, 4.0)


def texts_of(length: int, vocab_size: int = 3) -> np.ndarray:
    return np.array(list(itertools.product(range(vocab_size), repeat=length)))


# --- the add-alpha model -------------------------------------------------------------------------


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


# --- T0 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("context", [[], [1], [2, 0]])
@pytest.mark.parametrize("risky", [[[0, 1]], [[0, 1], [2, 2]], [[1, 1, 1], [0, 2, 1]]])
def test_expected_windows_and_drift_by_enumeration(order, context, risky) -> None:
    model = NGramModel(BASE, vocab_size=3, order=order, alpha=0.4)
    texts, length = texts_of(6), len(risky[0])
    probability = np.exp(model.token_log_probs(texts, context).sum(axis=1))
    windows = np.lib.stride_tricks.sliding_window_view(texts, length, axis=1)  # (729, W, l)
    found = np.stack([(windows == span).all(axis=-1).sum(axis=1) for span in risky])  # (R, 729)
    expected = model.expected_windows(risky, 6, context)
    assert expected == pytest.approx(found @ probability)
    drift = probability[found.any(axis=0)].sum()
    assert drift <= bound.union_bound(expected) <= 1.0


def test_union_bound_is_capped_and_refuses_nonsense() -> None:
    assert bound.union_bound([0.1, 0.2]) == pytest.approx(0.3)
    assert bound.union_bound([0.9, 0.2]) == 1.0
    assert bound.union_bound([]) == 0.0
    for wrong in ([-0.1], [math.nan], [math.inf]):
        with pytest.raises(ParameterError, match="expected number"):
            bound.union_bound(wrong)


def test_risky_windows_are_matched_rare_windows(tmp_path) -> None:
    index = TraceIndex.build_tokens(
        [np.array([0, 1, 2, 3, 0, 1]), np.array([0, 1, 2, 3]), np.array([4, 4, 4])], tmp_path, vocab_size=6
    )
    texts = np.array([[5, 0, 1, 2, 3, 5], [4, 4, 3, 0, 1, 5]])
    for length, threshold, most in itertools.product((1, 2, 3), (0.0, 3.0, 4.5), (None, 1, 2)):
        expected = [
            [
                1 <= index.count(window) <= (most or 99) and index.surprisal[window].sum() > threshold
                for window in (row[s : s + length] for s in range(6 - length + 1))
            ]
            for row in texts
        ]
        found = bound.risky_windows(index, texts, length=length, threshold=threshold, max_count=most)
        assert found.tolist() == expected
    assert bound.risky_windows(index, texts, length=9, threshold=0.0).shape == (2, 0)
    with pytest.raises(ParameterError, match="finite"):
        bound.risky_windows(index, texts, length=2, threshold=math.nan)


# --- T1 ------------------------------------------------------------------------------------------


BASES = ([], [[0, 2]] * 10 + [[1, 2]] * 10, [[0, 1, 2, 0, 1, 1]])


@pytest.fixture(scope="module")
def cases() -> list[bound.Planting]:
    """Every span after every context on three letters: orders 0 to 2, lengths 1 to 4."""
    grid = itertools.product(BASES, (0.1, 1.0), (1, 5), ((0, 2), (0, 4), (1, 1), (1, 2), (1, 3), (2, 2)))
    return [
        case
        for base, alpha, copies, (order, length) in grid
        for case in bound.enumerate_planting(base, copies, length=length, order=order, alpha=alpha)
    ]


def test_t1_holds_in_every_case(cases) -> None:
    assert len(cases) >= 2000
    assert not any(case.corrected_fails for case in cases)


def test_the_short_form_fails_only_where_a_gram_repeats(cases) -> None:
    """(1 + m / alpha)^l is true without repeated grams, and false with them."""
    failures = [case for case in cases if case.stated_fails]
    assert failures
    assert all(case.repetition > 1 for case in failures)
    assert any(contexts_repeat(case) and case.repetition == 1 for case in cases)  # and none of them failed


def contexts_repeat(case: bound.Planting) -> bool:
    """Whether two tokens of the span stand in the same context, such as 1 and 2 in 0 1 0 2."""
    order, text = len(case.context), (*case.context, *case.span)
    contexts = [text[i : i + order] for i in range(len(case.span))]
    return order > 0 and len(set(contexts)) < len(contexts)


def test_the_smallest_counterexample_by_hand() -> None:
    """Planting 0000 once: 1/3 becomes 5/7 for each token, so growth is (15/7)^4 = 21.1, above 2^4."""
    case = bound.plant([], [0, 0, 0, 0], 1, [0, 0, 0, 0], vocab_size=3, order=0, alpha=1.0)
    assert math.exp(case.growth) == pytest.approx((15 / 7) ** 4)
    assert math.exp(case.stated) == pytest.approx(16)
    assert math.exp(case.corrected) == pytest.approx(5**4)
    assert case.stated_fails
    assert not case.corrected_fails


def test_two_tokens_suffice_once_the_context_is_frequent() -> None:
    """0 0 after 0 in a corpus with ten '0 2': (1 / 13)^2 becomes (3 / 15)^2, 6.76 times, above 4."""
    case = bound.plant([[0, 2]] * 10, [0, 0, 0], 1, [0, 0], [0], vocab_size=3, order=1, alpha=1.0)
    assert math.exp(case.growth) == pytest.approx((3 / 15 * 13) ** 2)
    assert case.stated == pytest.approx(math.log(4))
    assert case.stated_fails


@pytest.mark.parametrize("span", [[0, 1, 0], [0, 0, 0], [1, 1, 0]])
def test_the_corrected_constant_is_the_smallest(span) -> None:
    """With each context followed ever more often by a token outside the span, the bound is approached."""
    shares = []
    for times in (1, 100, 10_000):
        contexts = {tuple(([0, *span])[i : i + 1]) for i in range(3)}
        base = [[*context, 3] for context in sorted(contexts) for _ in range(times)]
        case = bound.plant(base, [0, *span], 2, span, [0], vocab_size=4, order=1, alpha=0.5)
        assert not case.corrected_fails
        shares.append(math.exp(case.growth - case.corrected))
    assert shares == sorted(shares)
    assert shares[-1] > 0.99


@given(documents, documents, st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(0, 2), alphas)
@QUICK
def test_t1_with_any_planted_documents(base, planted, span, order, alpha) -> None:
    """Whatever is planted, wrappers and repeated spans included, added grams bound the growth."""
    options = {"vocab_size": 3, "order": order}
    before = NGramModel(base, **options, alpha=alpha).span_log_prob(span)
    after = NGramModel([*base, *planted], **options, alpha=alpha).span_log_prob(span)
    added = bound.added_counts(planted, span, **options)
    assert after - before <= bound.gram_log_multiplier(added, alpha) + 1e-9
    if added.max() > 0:
        assert after - before <= bound.log_multiplier(int(added.max()), len(span), alpha) + 1e-9


@given(st.integers(0, 50), st.integers(1, 40), alphas, st.integers(1, 5))
@QUICK
def test_multiplier_is_monotone(copies, length, alpha, repetition) -> None:
    def value(m, tokens, r):
        return bound.log_multiplier(m, tokens, alpha, repetition=r)

    here = value(copies, length, repetition)
    assert 0 <= here < value(copies + 1, length, repetition)
    assert here <= value(copies, length + 1, repetition)
    assert here <= value(copies, length, repetition + 1)
    assert here == pytest.approx(length * math.log(1 + repetition * copies / alpha))


@given(st.integers(0, 50), st.integers(1, 40), st.floats(0, 200), alphas, st.integers(1, 1000))
@QUICK
def test_drift_bound_is_monotone(copies, length, threshold, alpha, windows) -> None:
    def value(m=copies, tokens=length, tau=threshold, n=windows):
        return bound.drift_bound(m, tokens, tau, alpha=alpha, windows=n)

    assert 0 <= value() <= 1
    assert value() <= min(value(m=copies + 1), value(tokens=length + 1), value(n=windows + 1))
    assert value(tau=threshold + 1.0) <= value()


def test_drift_bound_by_hand() -> None:
    value = bound.drift_bound(3, 4, 20.0, alpha=0.5, repetition=2, gain=1.5, windows=7)
    assert value == pytest.approx(7 * (1 + 2 * 3 / 0.5) ** 4 * math.exp(1.5 - 20.0))
    assert bound.drift_bound(3, 8, 20.0, alpha=0.5) == pytest.approx(7.0**8 * math.exp(-20.0))
    assert bound.drift_bound(16, 8, 20.0, alpha=0.5) == 1.0


def test_drift_bound_is_never_below_the_exact_probability() -> None:
    """T0, T1 and the corollary end to end: every set of one or two planted spans, enumerated."""
    steps, alpha, order = 5, 0.5, 1
    texts = texts_of(steps)
    base = [[0, 2, 1], [2, 1, 2], [1, 2]] * 3
    for span in itertools.permutations(range(3), 3):
        document = [0, *span]
        without = NGramModel(base, vocab_size=3, order=order, alpha=alpha)
        full = NGramModel([*base, document, document], vocab_size=3, order=order, alpha=alpha)
        counts = np.bincount(np.concatenate([*base, document, document]), minlength=3)
        bci = -np.log((counts + 1) / (counts.sum() + 3))[list(span)].sum()
        gain = max(
            bound.context_gain(without.span_log_prob(span, context), bci) for context in ([], [0], [1], [2])
        )
        once = bound.added_counts([document], document, vocab_size=3, order=order)
        limit = bound.drift_bound(
            2, 3, bci - 1e-9, alpha=alpha, repetition=int(once.max()), gain=gain, windows=steps - 2
        )
        windows = np.lib.stride_tricks.sliding_window_view(texts, 3, axis=1)
        drifts = (windows == span).all(axis=-1).any(axis=1)
        exact = np.exp(full.token_log_probs(texts).sum(axis=1))[drifts].sum()
        assert exact <= limit
        assert limit > 0


def test_counts_and_repetition_by_hand() -> None:
    added = bound.added_counts([[0, 0, 0, 1]] * 2, [0, 0, 1], [0], vocab_size=3, order=1)
    assert added.tolist() == [4, 4, 2]
    assert bound.gram_log_multiplier(added, 2.0) == pytest.approx(math.log(3 * 3 * 2))


# --- T2 ------------------------------------------------------------------------------------------


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.001, 0.5))
@QUICK
def test_clopper_pearson_is_scipys(counts, delta) -> None:
    hits, n = counts
    exact = binomtest(hits, n, alternative="less").proportion_ci(confidence_level=1 - delta, method="exact")
    assert float(clopper_pearson_upper(hits, n, delta)) == pytest.approx(exact.high, abs=1e-9)


def pair(copies: int = 12) -> tuple[NGramModel, NGramModel]:
    """A model that saw 0 1 2 2 planted, and one that did not."""
    return tuple(
        NGramModel([*BASE, *[[0, 1, 2, 2]] * m], vocab_size=3, order=1, alpha=0.5) for m in (copies, 0)
    )


@pytest.mark.parametrize("kappa", [-1.0, 0.0, 0.5, 1.0, 2.0, 4.0])
def test_t2_by_enumeration(kappa: float) -> None:
    """All texts of four tokens and 300 random events; under the other tail the claim would be false."""
    full, without = pair()
    top, bottom = (model.token_log_probs(texts_of(4)).sum(axis=1) for model in (full, without))
    tail = np.exp(top)[top - bottom > kappa].sum()
    events = np.random.default_rng(0).random((300, 81)) < 0.3
    assert (events @ np.exp(top) <= math.exp(kappa) * (events @ np.exp(bottom)) + tail + 1e-12).all()
    if kappa == 1.0:
        wrong_tail = np.exp(bottom)[top - bottom > kappa].sum()
        worst = top - bottom > kappa
        assert np.exp(top)[worst].sum() > math.exp(kappa) * np.exp(bottom)[worst].sum() + wrong_tail


def test_a_certificate_by_hand() -> None:
    ratios = np.array([0.0] * 90 + [1.5] * 8 + [math.inf] * 2)
    result = certify(ratios, 0.01, kappas=(1.0, 2.0), delta=0.1)
    tails = [
        binomtest(k, 100, alternative="less").proportion_ci(confidence_level=0.95, method="exact").high
        for k in (10, 2)
    ]
    assert result.tail_limits == pytest.approx(tails)
    assert result.bounds == pytest.approx([math.e * 0.01 + tails[0], math.e**2 * 0.01 + tails[1]])
    assert (result.kappa, result.bound) == (2.0, pytest.approx(result.bounds[1]))
    assert result.floor == pytest.approx(1 - 0.05 ** (1 / 100))
    counted = certify(ratios, (0, 50), kappas=(1.0, 2.0), delta=0.1)
    assert counted.event_limit == pytest.approx(1 - (0.1 / 3) ** (1 / 50))
    assert counted.bound > result.bound


def test_a_longer_grid_costs_and_a_bound_is_a_probability() -> None:
    ratios = np.zeros(50)
    short = certify(ratios, 0.0, kappas=(1.0,))
    assert short.bound == pytest.approx(short.floor)
    assert certify(ratios, 0.0, kappas=(1.0, 2.0, 3.0)).floor > short.floor
    assert certify(ratios, 1.0, kappas=(800.0,)).bound == 1.0


def test_certificates_cover_and_plugging_in_does_not() -> None:
    """The event L > kappa makes T2 an equality but for e^kappa P_-A(E), so coverage is put to the test."""
    full, without = pair()
    texts = texts_of(4)
    top, bottom = (model.token_log_probs(texts).sum(axis=1) for model in (full, without))
    kappa = 0.8
    event = top - bottom > kappa
    truth, base = np.exp(top)[event].sum(), np.exp(bottom)[event].sum()
    certified, plugged = [], []
    for seed in range(400):
        drawn = full.sample(200, 4, seed=seed)
        ratios = (top - bottom)[drawn @ [27, 9, 3, 1]]
        result = certify(ratios, 0.0, kappas=(kappa,), delta=0.1)
        certified.append(result.bound)
        plugged.append((ratios > kappa).mean())
    assert base > 0
    kept = bound.coverage(certified, [truth] * 400, delta=0.1)
    assert kept.consistent
    assert kept.held.estimate < 1.0  # tight enough to fail now and then, as delta allows
    assert not bound.coverage(plugged, [truth] * 400, delta=0.1).consistent


@pytest.mark.parametrize("limits", [1, 11])
def test_samples_needed_is_the_smallest_number(limits: int) -> None:
    needed = bound.samples_needed(0.02, 0.05, limits=limits)
    assert bound.monte_carlo_floor(needed, 0.05, limits=limits) <= 0.02
    assert bound.monte_carlo_floor(needed - 1, 0.05, limits=limits) > 0.02


def test_too_few_samples_say_how_many() -> None:
    needed = bound.samples_needed(0.02, 0.05, limits=11)
    with pytest.raises(ParameterError, match=f"at least {needed} samples"):
        certify(np.zeros(needed - 1), 0.0, precision=0.02)
    assert certify(np.zeros(needed), 0.0, precision=0.02).bound <= 0.02
    more = bound.samples_needed(0.02, 0.05, limits=12)  # the event's own limit is one more
    with pytest.raises(ParameterError, match=f"at least {more} samples"):
        certify(np.zeros(10_000), (0, more - 1), precision=0.02)


# --- T2 on language models -----------------------------------------------------------------------


def tiny_model(seed: int, words: str = "abcd") -> LanguageModel:
    """An untrained Llama on six tokens with sharp next-token distributions."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", *words])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LanguageModel(LlamaForCausalLM(config), tokenizer, device="cpu")


@pytest.fixture(scope="module")
def tiny_pair() -> tuple[LanguageModel, LanguageModel]:
    return tiny_model(0), tiny_model(1)


def outcomes() -> np.ndarray:
    """Every text of three tokens, with padding alone after an end mark."""
    texts = texts_of(3, vocab_size=6)
    ended = (np.cumsum(texts == 1, axis=1) - (texts == 1)) > 0
    return texts[(~ended | (texts == 0)).all(axis=1)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_completion_log_probs_are_the_models(tiny_pair, temperature) -> None:
    full, prompt, texts = tiny_pair[0], [2, 3], outcomes()
    found = bound.completion_log_probs(full, prompt, texts, temperature=temperature, batch_size=7)
    assert np.exp(found.sum(axis=1)).sum() == pytest.approx(1.0)
    for row in (5, 60, 150):
        ended = False
        for j, token in enumerate(texts[row]):
            inputs = torch.tensor([[*prompt, *texts[row, :j]]])
            logits = full.model(input_ids=inputs).logits[0, -1].detach() / temperature
            expected = 0.0 if ended else float(logits.log_softmax(-1)[token])
            assert found[row, j] == pytest.approx(expected, abs=1e-5)
            ended = ended or token == 1
    assert (found[texts[:, 0] == 1][:, 1:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_language_model_samples_follow_their_log_probs(tiny_pair, temperature) -> None:
    full, prompt, texts = tiny_pair[0], [2, 3], outcomes()
    drawn = bound.sample_completions(full, prompt, 4000, steps=3, temperature=temperature, seed=3)
    assert drawn.shape == (4000, 3)
    exact = np.exp(bound.completion_log_probs(full, prompt, texts, temperature=temperature).sum(axis=1))
    keys = texts @ [36, 6, 1]
    observed = np.bincount(drawn @ [36, 6, 1], minlength=216)
    assert observed.sum() == observed[keys].sum()  # nothing but padding follows an end mark
    likely = exact > 0.002
    error = np.abs(observed[keys] / 4000 - exact)[likely] / np.sqrt(exact[likely] / 4000)
    assert error.max() < 4.5
    again = bound.sample_completions(full, prompt, 4000, steps=3, temperature=temperature, seed=3)
    assert (drawn == again).all()


def test_t2_by_enumeration_on_language_models(tiny_pair) -> None:
    full, without = tiny_pair
    texts, prompt = outcomes(), [2, 3]
    ratios = bound.log_ratios(full, without, prompt, texts)  # (n, 3)
    top = np.exp(bound.completion_log_probs(full, prompt, texts).sum(axis=1))
    bottom = np.exp(bound.completion_log_probs(without, prompt, texts).sum(axis=1))
    assert ratios[:, -1] == pytest.approx(np.log(top) - np.log(bottom))
    events = np.random.default_rng(0).random((200, len(texts))) < 0.2
    for kappa in (0.0, 1.0, 3.0):
        tail = top[ratios[:, -1] > kappa].sum()
        assert (events @ top <= math.exp(kappa) * (events @ bottom) + tail + 1e-9).all()


def test_measure_pair(tiny_pair) -> None:
    full, without = tiny_pair
    cases = [PairCase(f"item{i}", 2**i, (2 + i, 3), (2, 4, 3 + i)) for i in range(3)]
    frame = bound.measure_pair(full, without, cases, lengths=(1, 3, 9), samples=400, delta=0.01)
    assert list(zip(frame["item"], frame["length"], strict=True)) == [
        (f"item{i}", length) for i in range(3) for length in (1, 3)
    ]
    for row in frame.itertuples():
        case = cases[int(row.item[-1])]
        log_probs = bound.completion_log_probs(full, case.prompt, [case.span[: row.length]])
        assert row.truth == pytest.approx(math.exp(log_probs.sum()))
        assert abs(row.hits / 400 - row.truth) < 4 * math.sqrt(row.truth / 400) + 1e-3
        seed = Random(f"0/{case.item}").getrandbits(31)
        drawn = bound.sample_completions(full, case.prompt, 400, steps=3, seed=seed)
        ratios = bound.log_ratios(full, without, case.prompt, drawn)[:, row.length - 1]
        certificate = certify(ratios, row.without, delta=0.01)
        assert (row.bound, row.kappa) == pytest.approx((certificate.bound, certificate.kappa))
        assert row.covered
        assert row.tightness == pytest.approx(row.bound / row.truth)
    assert (frame["floor"] == bound.monte_carlo_floor(400, 0.01, limits=len(bound.KAPPAS))).all()
    table = bound.tightness_map(frame)
    assert table.index.tolist() == [1, 2, 4]
    assert table.columns.tolist() == [1, 3]
    assert (table.to_numpy() >= 1).all()


def test_pair_cases_are_opening_and_steps() -> None:
    world = World.generate(get_profile("smoke").world)
    tokenizer = lm.train_tokenizer([d.text for d in world.documents], 800)
    for item, case in zip(world.items, bound.pair_cases(world.items, tokenizer), strict=True):
        assert (case.item, case.copies) == (item.id, item.copies)
        assert tokenizer.decode(case.prompt).strip() == item.opening
        assert tokenizer.decode([*case.prompt, *case.span]).strip() == item.recipe


def test_models_of_two_vocabularies_are_refused(tiny_pair) -> None:
    with pytest.raises(VocabularyError, match="different vocabularies"):
        bound.log_ratios(tiny_pair[0], tiny_model(0, "abce"), [2], [[3]])
    with pytest.raises(ParameterError, match="prompt is empty"):
        bound.sample_completions(tiny_pair[0], [], 1, steps=1)
    with pytest.raises(VocabularyError, match="outside the vocabulary"):
        bound.completion_log_probs(tiny_pair[0], [2], [[6]])


# --- checks of a bound ---------------------------------------------------------------------------


def test_coverage_and_tightness_by_hand() -> None:
    result = bound.coverage([0.5] * 90 + [0.1] * 10, [0.3] * 100, delta=0.05)
    low, high = binomtest(90, 100).proportion_ci(method="exact")
    assert result.held == pytest.approx((0.9, low, high, 100))
    assert result.promised == 0.95
    assert result.consistent == (high >= 0.95)
    assert not bound.coverage([0.5] * 80 + [0.1] * 20, [0.3] * 100, delta=0.05).consistent
    assert bound.tightness([0.5, 0.2], [0.25, 0.0]).tolist() == [2.0, math.inf]


@pytest.mark.parametrize(
    "control",
    [
        bound.control_across_documents,
        bound.control_other_sampler,
        bound.control_several_queries,
    ],
)
def test_negative_controls_fail(control) -> None:
    result: Control = control()
    assert 0 < result.kept <= result.bound < result.broken <= 1
    assert result.fails_as_it_must


def test_controls_pass_where_nothing_is_broken() -> None:
    """A control that fails whatever is done would show nothing."""
    same = bound.control_other_sampler(1.0)
    assert same.broken == same.kept <= same.bound
    once = bound.control_several_queries(1)
    assert once.broken == pytest.approx(once.kept)
    assert not once.fails_as_it_must
    many = bound.control_several_queries(20)
    assert many.broken <= 20 * many.bound


# --- T3 ------------------------------------------------------------------------------------------


def emissions(rng: np.random.Generator, items: int) -> pd.DataFrame:
    """Made-up items of three lengths each, with noise that an item's rows share."""
    copies = 2.0 ** rng.integers(0, 5, size=items)
    frame = pd.DataFrame({"item": range(items), "copies": copies, "shift": rng.normal(0, 0.1, items)})
    frame = frame.merge(pd.DataFrame({"length": [4, 8, 16]}), how="cross")
    frame["context"] = rng.choice([8, 16, 32], size=len(frame))
    mean = 0.2 + 0.1 * np.log2(frame["copies"]) - 0.05 * np.log2(frame["length"] / 4)
    frame["emission"] = np.clip(mean + frame["shift"], 0, 1)
    return frame


def fit(frame: pd.DataFrame, alpha: float = 0.2, seed: int = 0) -> bound.EmissionFit:
    columns = (frame[name] for name in ("copies", "length", "context", "emission", "item"))
    return bound.fit_emission(*columns, alpha=alpha, seed=seed)


def test_fit_recovers_a_line() -> None:
    rng = np.random.default_rng(0)
    copies, lengths, contexts = (2.0 ** rng.integers(0, 5, size=60) for _ in range(3))
    shares = 0.3 + 0.1 * np.log2(copies) - 0.05 * np.log2(lengths) + 0.02 * np.log2(contexts)
    result = bound.fit_emission(copies, lengths, contexts, shares, range(60))
    assert (result.intercept, *result.per_doubling) == pytest.approx((0.3, 0.1, -0.05, 0.02))
    assert result.margin == pytest.approx(0.0, abs=1e-9)
    assert result.line(copies, lengths, contexts) == pytest.approx(shares)
    assert (result.fitted, result.calibrated) == (30, 30)


def test_the_margin_is_the_conformal_quantile() -> None:
    """With a line fitted on the other half, the margin is that order statistic of the excesses."""
    frame = emissions(np.random.default_rng(1), 40)
    result = fit(frame)
    excess = frame["emission"] - result.line(frame["copies"], frame["length"], frame["context"])
    worst = excess.groupby(frame["item"]).max()
    assert np.isclose(worst, result.margin).sum() == 1
    held = np.random.default_rng(0).permutation(40)[:20]
    assert (worst[held] <= result.margin + 1e-12).sum() == math.ceil(21 * 0.8)


def test_conformal_coverage_by_simulation() -> None:
    """New items lie wholly below the limit in at least 80 % of 400 trials, and not in nearly all."""
    below = []
    for seed in range(400):
        frame = emissions(np.random.default_rng(seed), 41)
        old, new = frame[frame["item"] < 40], frame[frame["item"] == 40]
        limit = fit(old, seed=seed).upper(new["copies"], new["length"], new["context"])
        below.append(bool((new["emission"] <= limit + 1e-12).all()))
    interval = binomtest(sum(below), 400).proportion_ci(method="exact")
    assert interval.high >= 0.8
    assert interval.low <= 0.9


def test_too_few_items_say_how_many() -> None:
    frame = emissions(np.random.default_rng(2), 18)
    with pytest.raises(ParameterError, match="at least 38 clusters"):
        fit(frame, alpha=0.05)
    assert fit(frame, alpha=0.1).calibrated == 9
    with pytest.raises(ParameterError, match="at least 18 clusters"):
        fit(frame[frame["item"] < 17], alpha=0.1)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 5, math.nan])
def test_delta_and_alpha_are_shares(delta: float) -> None:
    frame = emissions(np.random.default_rng(3), 40)
    for call in (
        lambda: certify([0.0], 0.1, delta=delta),
        lambda: clopper_pearson_upper(1, 2, delta),
        lambda: bound.samples_needed(0.1, delta),
        lambda: bound.samples_needed(delta, 0.1),
        lambda: bound.monte_carlo_floor(10, delta),
        lambda: bound.coverage([0.1], [0.1], delta=delta),
        lambda: fit(frame, alpha=delta),
    ):
        with pytest.raises(ParameterError, match=r"not in \(0, 1\)"):
            call()


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_the_pseudo_count_is_positive(alpha: float) -> None:
    for call in (
        lambda: NGramModel(BASE, vocab_size=3, order=1, alpha=alpha),
        lambda: bound.log_multiplier(1, 2, alpha),
        lambda: bound.gram_log_multiplier([1, 2], alpha),
        lambda: bound.drift_bound(1, 2, 20.0, alpha=alpha),
    ):
        with pytest.raises(ParameterError, match="not positive"):
            call()


@pytest.mark.parametrize("kappas", [(), (math.inf,), (math.nan,), ((1.0, 2.0),)])
def test_the_grid_of_kappa_is_finite_and_not_empty(kappas) -> None:
    with pytest.raises(ParameterError, match="grid of kappa"):
        certify([0.0], 0.1, kappas=kappas)


@pytest.mark.parametrize("ratios", [[], [math.nan], [[0.0]]])
def test_log_ratios_are_numbers(ratios) -> None:
    with pytest.raises(ParameterError, match="log-ratios"):
        certify(ratios, 0.1)


@pytest.mark.parametrize("event", [-0.1, 1.1, math.nan])
def test_the_event_has_a_probability(event: float) -> None:
    with pytest.raises(ParameterError, match="event's probability"):
        certify([0.0], event)
    with pytest.raises(ParameterError, match="Hits are not counts"):
        certify([0.0], (3, 2))


MODEL = NGramModel(BASE, vocab_size=3, order=1, alpha=0.5)


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
        lambda: bound.log_multiplier(-1, 2, 0.5),
        lambda: bound.log_multiplier(1, 0, 0.5),
        lambda: bound.log_multiplier(1.5, 2, 0.5),
        lambda: bound.log_multiplier(1, 2, 0.5, repetition=0),
        lambda: bound.gram_log_multiplier([], 0.5),
        lambda: bound.gram_log_multiplier([-1], 0.5),
        lambda: bound.drift_bound(1, 2, math.nan, alpha=0.5),
        lambda: bound.drift_bound(1, 2, 3.0, alpha=0.5, gain=math.inf),
        lambda: bound.drift_bound(1, 2, 3.0, alpha=0.5, windows=0),
        lambda: bound.coverage([], [], delta=0.1),
        lambda: bound.coverage([0.1], [1.2], delta=0.1),
        lambda: bound.tightness([math.nan], [0.1]),
        lambda: bound.tightness([0.1, 0.2], [0.1]),
        lambda: bound.fit_emission([0], [1], [1], [0.5], ["a"]),
        lambda: bound.fit_emission([1], [1], [1], [1.5], ["a"]),
        lambda: bound.fit_emission([1], [1], [1], [0.5], ["a", "b"]),
        lambda: bound.fit_emission([1], [1], [1], [0.5], [None]),
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
