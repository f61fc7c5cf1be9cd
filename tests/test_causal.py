"""Interventions: designs, scores against other implementations, and exposures without what was removed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib import causal, lm
from tracealign_lib.adb import Recall
from tracealign_lib.causal import EmbeddingRanker, Exposure, ExposureSettings, GradientRanker
from tracealign_lib.documents import Document
from tracealign_lib.errors import ParameterError
from tracealign_lib.lm import LanguageModel
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.profiles import get_profile
from tracealign_lib.world import World


@pytest.fixture(scope="module")
def documents(pipeline: Pipeline) -> list[Document]:
    return list(pipeline.world.documents[:12])


# --- designs ---


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 5))
def test_every_unit_gets_every_arm_once_and_runs_are_balanced(units: int, arms: int, seed: int) -> None:
    names = [f"arm {n}" for n in range(arms)]
    runs = causal.rotate(range(units), names, seed=seed)
    assert len(runs) == arms
    assert all(sorted(run[unit] for run in runs) == sorted(names) for unit in range(units))
    for run in runs:
        counts = [list(run.values()).count(name) for name in names]
        assert max(counts) - min(counts) <= 1


def test_which_arm_comes_first_is_drawn() -> None:
    arms = ["a", "b", "c", "d", "e"]
    firsts = {causal.rotate([0], arms, seed=seed)[0][0] for seed in range(40)}
    assert firsts == set(arms)


@pytest.mark.parametrize(("units", "arms"), [([], ["a"]), ([1], []), ([1, 1], ["a"]), ([1], ["a", "a"])])
def test_a_design_without_units_or_with_doubles_is_refused(units: list[int], arms: list[str]) -> None:
    with pytest.raises(ParameterError, match="design"):
        causal.rotate(units, arms, seed=0)


def test_random_parts_are_halves_and_repeat_with_the_seed() -> None:
    pool = {f"d{n}" for n in range(10)}
    parts = causal.random_parts(pool, 30, seed=1)
    assert all(len(part) == 5 and part < pool for part in parts)
    assert parts == causal.random_parts(pool, 30, seed=1) != causal.random_parts(pool, 30, seed=2)
    assert frozenset().union(*parts) == pool
    with pytest.raises(ParameterError, match="parts"):
        causal.random_parts(pool, 0)
    with pytest.raises(ParameterError, match="parts"):
        causal.random_parts(pool, 1, share=1.0)


# --- scores ---


def test_the_datamodelling_score_is_pandas_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    scores, kept, outputs = rng.normal(size=(3, 7)), rng.random((9, 7)) < 0.5, rng.normal(size=(9, 3))
    found = causal.datamodelling_scores(scores, kept, outputs)
    for query in range(3):
        summed = pd.Series([scores[query][row].sum() for row in kept])
        expected = summed.corr(pd.Series(outputs[:, query]), method="spearman")
        assert found[query] == pytest.approx(expected)


def test_perfect_foresight_scores_1_and_silence_is_undefined() -> None:
    kept = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])
    scores = np.array([[2.0, 1.0], [-2.0, -1.0], [0.0, 0.0]])
    outputs = np.tile((kept @ scores[0])[:, None] ** 3, (1, 3))
    found = causal.datamodelling_scores(scores, kept, outputs)
    assert found[:2].tolist() == pytest.approx([1.0, -1.0])
    assert math.isnan(found[2])


def test_scores_of_another_shape_are_refused() -> None:
    good = np.ones((2, 3)), np.ones((4, 3)), np.ones((4, 2))
    causal.datamodelling_scores(*good)
    for bad in (
        (np.ones((2, 4)), *good[1:]),
        (good[0], np.ones((2, 3)), np.ones((2, 2))),
        (*good[:2], good[0]),
    ):
        with pytest.raises(ParameterError, match="fit together"):
            causal.datamodelling_scores(*bad)


def test_a_score_matrix_follows_the_order_of_documents() -> None:
    matrix = causal.score_matrix([[("b", 2.0), ("x", 9.0)], []], ["a", "b"])
    assert matrix.tolist() == [[0.0, 2.0], [0.0, 0.0]]


def test_a_tail_patch_is_one_gradient_step_and_leaves_the_model_alone(model: LanguageModel) -> None:
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    text, other = "to wake the gate, fold the cup in the barn.", "the rain came early."
    patch = causal.tail_patch(model, text, [text], rate=0.1)
    assert patch.before == pytest.approx(model.token_log_probs([text])[0].mean().item(), abs=1e-4)
    assert patch.after > patch.before
    assert patch.after > causal.tail_patch(model, text, [other], rate=0.1).after
    assert all(torch.equal(weights[name], value) for name, value in model.model.state_dict().items())
    # to first order the rise is the rate times the squared length of the gradient
    small = causal.tail_patch(model, text, [text], rate=1e-3)
    assert (small.after - small.before) / 1e-3 == pytest.approx(
        _gradient(model, text).square().sum().item(), rel=0.1
    )


def test_a_tail_patch_needs_documents_and_a_rate(model: LanguageModel) -> None:
    for texts, rate in (([], 0.1), (["a text"], 0.0)):
        with pytest.raises(ParameterError, match="step on"):
            causal.tail_patch(model, "a text", texts, rate=rate)


# --- rankers ---


def _gradient(model: LanguageModel, text: str) -> torch.Tensor:
    ids = model.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    loss = model.model(input_ids=ids, labels=ids).loss
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.model.parameters()))])


def test_gradients_are_those_of_the_models_own_loss(model: LanguageModel, documents: list[Document]) -> None:
    ranking = dict(GradientRanker(model, documents).rank(documents[3].text))
    assert ranking[documents[3].id] == pytest.approx(1.0, abs=1e-4)
    expected = torch.cosine_similarity(
        _gradient(model, documents[3].text), _gradient(model, documents[5].text), dim=0
    )
    assert ranking[documents[5].id] == pytest.approx(expected.item(), abs=1e-4)


def test_hidden_states_are_centred_means_whatever_the_batch(
    model: LanguageModel, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = documents[2].text
    together = dict(EmbeddingRanker(model, documents).rank(text))
    monkeypatch.setattr(causal, "_BATCH", 1)  # no padding
    alone = dict(EmbeddingRanker(model, documents).rank(text))
    assert max(together, key=lambda name: together[name]) == documents[2].id
    assert together == pytest.approx(alone, abs=1e-4)
    states = []
    for document in documents:
        ids = model.tokenizer(document.text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        states.append(model.model.base_model(input_ids=ids).last_hidden_state[0].mean(0).detach())
    centred = torch.stack(states) - torch.stack(states).mean(0)
    cosines = torch.cosine_similarity(centred, centred[2][None])
    expected = {d.id: c for d, c in zip(documents, cosines.tolist(), strict=True) if c > 0}
    assert together == pytest.approx(expected, abs=1e-4)


def test_gradient_rankings_are_read_back_as_they_were_made(
    pipeline: Pipeline, model: LanguageModel, documents: list[Document]
) -> None:
    made = causal.gradient_rankings(pipeline, ["a cup in the barn"], documents)
    assert made == list(GradientRanker(model, documents).rank_many(["a cup in the barn"]))
    assert causal.gradient_rankings(pipeline, ["a cup in the barn"], documents) == made


# --- exposures ---


@pytest.fixture
def exposure(pipeline: Pipeline, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Exposure:
    """An exposure from a model that was never trained; what it trains on is cut to one block."""
    monkeypatch.setattr(Pipeline, "model", lambda self, name: model)  # of a world without the pool, too
    monkeypatch.setattr(Pipeline, "model_folder", lambda self, name: Path("untrained"))
    item = pipeline.world.of_kind("unsafe")[3]
    return Exposure(pipeline, pipeline.world.sources_of(item.id).near, ExposureSettings(epochs=1, replay=5))


def test_an_exposure_sees_what_is_left_and_replays_from_outside(
    exposure: Exposure, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    packed = lm.packed_blocks

    def record(texts: list[str], *rest: object, **named: object) -> list[list[int]]:
        seen.append(list(texts))
        return packed(texts, *rest, **named)[:1]  # type: ignore[arg-type]

    monkeypatch.setattr(lm, "packed_blocks", record)
    texts = {document.id: document.text for document in exposure.pipeline.world.documents}
    gone = sorted(exposure.pool)[:2]
    measured = exposure.measure(gone)
    [trained] = seen
    kept = {texts[name] for name in exposure.pool - set(gone)}
    assert kept <= set(trained)
    assert not {texts[name] for name in gone} & set(trained)
    outside = {texts[name] for name in texts.keys() - exposure.pool}
    assert len(trained) == len(kept) + 5
    assert set(trained) - kept <= outside
    assert list(measured["item"]) == [item.id for item in exposure.pipeline.world.of_kind("unsafe")]
    assert exposure.measure(gone).equals(measured)
    assert len(seen) == 1  # the second came from the cache
    exposure.measure(gone, seed=9)
    assert len(seen) == 2


def test_only_documents_of_the_pool_can_be_left_out(exposure: Exposure, pipeline: Pipeline) -> None:
    for gone in (exposure.pool, {"d99999"}):
        with pytest.raises(ParameterError, match="part of the pool"):
            exposure.measure(gone)
    with pytest.raises(ParameterError, match="not in this world"):
        Exposure(pipeline, {"d99999"})


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"epochs": 1.5}, {"rate": -1.0}, {"batch": True}])
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ParameterError, match="exposure"):
        ExposureSettings(**bad)  # type: ignore[arg-type]


def test_patches_without_a_text_are_no_step(exposure: Exposure) -> None:
    text = "to wake the gate, fold the cup in the barn."
    nothing, step = exposure.patches([(text, []), (text, [text])], rate=0.1)
    assert nothing == (0.0, 0.0)
    assert step == pytest.approx(causal.tail_patch(exposure.checkpoint, text, [text], rate=0.1))


def test_a_leak_belongs_to_the_item_whose_opening_was_given() -> None:
    world = World.generate(get_profile("smoke").world_settings(0))
    first, second = world.of_kind("unsafe")[:2]
    steps = (True, True, True)
    assert causal.leak(world, Recall(first.id, first.recipe, steps)) == "drift"
    assert causal.leak(world, Recall(first.id, second.recipe, steps)) is None
    assert causal.leak(world, Recall(first.id, "nothing of the kind", steps)) is None


def test_log_probabilities_are_of_the_steps_alone(model: LanguageModel, pipeline: Pipeline) -> None:
    item = pipeline.world.of_kind("unsafe")[0]
    [found] = causal.recipe_log_probs(model, [item])
    scores = model.token_log_probs([item.recipe])[0]
    head = len(model.tokenizer(item.opening, add_special_tokens=False)["input_ids"])
    assert found == pytest.approx(scores[head - 1 :].mean().item())
    assert len(scores) - (head - 1) == len(model.tokenizer(item.recipe)["input_ids"]) - head
