"""Measuring the drift bound against enumeration, hand calculation, and its own coverage."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch
from bound_samples import planted_pair, texts_of
from scipy.stats import binomtest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tracealign_lib import bound, bound_checks, lm
from tracealign_lib.bound import certify
from tracealign_lib.bound_checks import Control, PairCase
from tracealign_lib.errors import ParameterError, VocabularyError
from tracealign_lib.lm import LanguageModel
from tracealign_lib.profiles import get_profile
from tracealign_lib.world import World

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
    found = bound_checks.completion_log_probs(full, prompt, texts, temperature=temperature, batch_size=7)
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
    drawn = bound_checks.sample_completions(full, prompt, 4000, steps=3, temperature=temperature, seed=3)
    assert drawn.shape == (4000, 3)
    exact = np.exp(
        bound_checks.completion_log_probs(full, prompt, texts, temperature=temperature).sum(axis=1)
    )
    keys = texts @ [36, 6, 1]
    observed = np.bincount(drawn @ [36, 6, 1], minlength=216)
    assert observed.sum() == observed[keys].sum()  # nothing but padding follows an end mark
    likely = exact > 0.002
    error = np.abs(observed[keys] / 4000 - exact)[likely] / np.sqrt(exact[likely] / 4000)
    assert error.max() < 4.5
    again = bound_checks.sample_completions(full, prompt, 4000, steps=3, temperature=temperature, seed=3)
    assert (drawn == again).all()


def test_t2_by_enumeration_on_language_models(tiny_pair) -> None:
    full, without = tiny_pair
    texts, prompt = outcomes(), [2, 3]
    ratios = bound_checks.log_ratios(full, without, prompt, texts)  # (n, 3)
    top = np.exp(bound_checks.completion_log_probs(full, prompt, texts).sum(axis=1))
    bottom = np.exp(bound_checks.completion_log_probs(without, prompt, texts).sum(axis=1))
    assert ratios[:, -1] == pytest.approx(np.log(top) - np.log(bottom))
    events = np.random.default_rng(0).random((200, len(texts))) < 0.2
    for kappa in (0.0, 1.0, 3.0):
        tail = top[ratios[:, -1] > kappa].sum()
        assert (events @ top <= math.exp(kappa) * (events @ bottom) + tail + 1e-9).all()


def test_measure_pair(tiny_pair) -> None:
    full, without = tiny_pair
    cases = [PairCase(f"item{i}", 2**i, (2 + i, 3), (2, 4, 3 + i)) for i in range(3)]
    settings = {"lengths": (1, 3, 9), "samples": 400, "repeats": 2, "delta": 0.01}
    frame = bound_checks.measure_pair(full, without, cases, **settings)
    assert list(zip(frame["item"], frame["length"], frame["repeat"], strict=True)) == [
        (f"item{i}", length, repeat) for i in range(3) for length in (1, 3) for repeat in (0, 1)
    ]
    for row in frame.itertuples():
        case = cases[int(row.item[-1])]
        log_probs = bound_checks.completion_log_probs(full, case.prompt, [case.span[: row.length]])
        assert row.truth == pytest.approx(math.exp(log_probs.sum()))
        assert abs(row.hits / 400 - row.truth) < 4 * math.sqrt(row.truth / 400) + 1e-3
        seed = Random(f"0/{case.item}/{row.length}/{row.repeat}").getrandbits(31)
        drawn = bound_checks.sample_completions(full, case.prompt, 400, steps=row.length, seed=seed)
        ratios = bound_checks.log_ratios(full, without, case.prompt, drawn)[:, -1]
        certificate = certify(ratios, row.without, kappas=bound.kappas_for(row.without), delta=0.01)
        assert (row.bound, row.kappa) == pytest.approx((certificate.bound, certificate.kappa))
        assert row.hits == (drawn == case.span[: row.length]).all(axis=1).sum()
        assert row.covered
        assert row.tightness == pytest.approx(row.bound / row.truth)
    floor = bound.monte_carlo_floor(400, 0.01, limits=len(bound.FIRST_TERMS))
    assert frame["floor"].tolist() == pytest.approx([floor] * 12)
    table = bound_checks.tightness_map(frame)
    assert table.index.tolist() == [1, 2, 4]
    assert table.columns.tolist() == [1, 3]
    assert (table.to_numpy() >= 1).all()


def test_certificates_of_one_case_have_samples_of_their_own(tiny_pair) -> None:
    full, without = tiny_pair
    case = PairCase("item", 1, (2, 3), (2, 4, 3))
    frame = bound_checks.measure_pair(full, without, [case], lengths=(1, 2), samples=300, repeats=4)
    assert frame.groupby("length")["hits"].nunique().min() > 1
    seeded = [
        bound_checks.measure_pair(full, without, [case], lengths=(1,), samples=300, repeats=4, seed=seed)
        for seed in ("0/base", "0/dpo")
    ]
    assert seeded[0]["hits"].tolist() != seeded[1]["hits"].tolist()
    with pytest.raises(ParameterError, match="shorter than the length"):
        bound_checks.certify_case(full, without, case, 4, samples=10)


def test_span_probabilities_by_the_chain_rule(tiny_pair) -> None:
    case = PairCase("item", 1, (2, 3), (2, 4, 3))
    found = bound_checks.span_probabilities(tiny_pair[0], case, temperature=0.5)
    logits = tiny_pair[0].model(input_ids=torch.tensor([[2, 3, 2, 4, 3]])).logits[0].detach() / 0.5
    steps = [float(logits[1 + j].softmax(-1)[token]) for j, token in enumerate(case.span)]
    assert found == pytest.approx(np.cumprod(steps), rel=1e-4)


def test_pair_cases_are_opening_and_steps() -> None:
    world = World.generate(get_profile("smoke").world)
    tokenizer = lm.train_tokenizer([d.text for d in world.documents], 800)
    for item, case in zip(world.items, bound_checks.pair_cases(world.items, tokenizer), strict=True):
        assert (case.item, case.copies) == (item.id, item.copies)
        assert tokenizer.decode(case.prompt).strip() == item.opening
        assert tokenizer.decode([*case.prompt, *case.span]).strip() == item.recipe
    model = LanguageModel(lm.new_model(get_profile("smoke").model, tokenizer, 0), tokenizer, "cpu")
    item = world.items[0]
    attack = bound_checks.prefilled(model, "how to {verb} it?")
    [prefilled] = bound_checks.pair_cases([item], tokenizer, attack)
    asked = f"<|user|> how to {item.verb} it?<|assistant|> {item.opening}"
    assert tokenizer.decode(prefilled.prompt) == asked
    assert prefilled.span == bound_checks.pair_cases([item], tokenizer)[0].span
    with pytest.raises(VocabularyError, match="does not split"):
        bound_checks.pair_cases([item], tokenizer, lambda item: "tell me")


def test_models_of_two_vocabularies_are_refused(tiny_pair) -> None:
    with pytest.raises(VocabularyError, match="different vocabularies"):
        bound_checks.log_ratios(tiny_pair[0], tiny_model(0, "abce"), [2], [[3]])
    with pytest.raises(ParameterError, match="prompt is empty"):
        bound_checks.sample_completions(tiny_pair[0], [], 1, steps=1)
    with pytest.raises(VocabularyError, match="outside the vocabulary"):
        bound_checks.completion_log_probs(tiny_pair[0], [2], [[6]])


# --- coverage and tightness ----------------------------------------------------------------------


def test_coverage_and_tightness_by_hand() -> None:
    result = bound_checks.coverage([0.5] * 90 + [0.1] * 10, [0.3] * 100, delta=0.05)
    low, high = binomtest(90, 100).proportion_ci(method="exact")
    assert result.held == pytest.approx((0.9, low, high, 100))
    assert result.promised == 0.95
    assert result.consistent == (high >= 0.95)
    assert not bound_checks.coverage([0.5] * 80 + [0.1] * 20, [0.3] * 100, delta=0.05).consistent
    assert bound_checks.tightness([0.5, 0.2], [0.25, 0.0]).tolist() == [2.0, math.inf]


def test_certificates_cover_and_plugging_in_does_not() -> None:
    """The event L > kappa makes T2 an equality but for e^kappa P_-A(E), so coverage is put to the test."""
    full, without = planted_pair()
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
    kept = bound_checks.coverage(certified, [truth] * 400, delta=0.1)
    assert kept.consistent
    assert kept.held.estimate < 1.0  # tight enough to fail now and then, as delta allows
    assert not bound_checks.coverage(plugged, [truth] * 400, delta=0.1).consistent


# --- negative controls ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "control",
    [
        bound_checks.control_across_documents,
        bound_checks.control_other_sampler,
        bound_checks.control_several_queries,
    ],
)
def test_negative_controls_fail(control) -> None:
    result: Control = control()
    assert 0 < result.kept <= result.bound < result.broken <= 1
    assert result.fails_as_it_must


def test_controls_pass_where_nothing_is_broken() -> None:
    """A control that fails whatever is done would show nothing."""
    same = bound_checks.control_other_sampler(1.0)
    assert same.broken == same.kept <= same.bound
    once = bound_checks.control_several_queries(1)
    assert once.broken == pytest.approx(once.kept)
    assert not once.fails_as_it_must
    many = bound_checks.control_several_queries(20)
    assert many.broken <= 20 * many.bound


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 5, math.nan])
def test_delta_is_a_share(delta: float) -> None:
    with pytest.raises(ParameterError, match=r"not in \(0, 1\)"):
        bound_checks.coverage([0.1], [0.1], delta=delta)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bound_checks.coverage([], [], delta=0.1),
        lambda: bound_checks.coverage([0.1], [1.2], delta=0.1),
        lambda: bound_checks.tightness([math.nan], [0.1]),
        lambda: bound_checks.tightness([0.1, 0.2], [0.1]),
    ],
)
def test_other_bad_input(call) -> None:
    with pytest.raises(ParameterError):
        call()
