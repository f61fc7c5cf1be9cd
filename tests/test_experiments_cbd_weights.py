"""What chapter 7 shows of the penalty: its weights, and which penalty changes what DPO ends with."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from cbd_samples import untrained_pipeline

from tracealign_lib.cbd import weighted_penalty
from tracealign_lib.experiments import cbd_weights
from tracealign_lib.experiments.common import PAPER_TAU
from tracealign_lib.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with untrained_pipeline(tmp_path_factory.mktemp("untrained")) as smoke:
        yield smoke


def test_the_equation_is_the_librarys_penalty_and_a_mean_over_tokens() -> None:
    log_probs = torch.tensor([[0.5, 0.9], [0.2, 0.1]]).log()
    weights = torch.tensor([[2.0, 6.0], [0.0, 0.0]])
    by_hand = cbd_weights.penalty_by_hand(log_probs, weights)
    assert by_hand.item() == pytest.approx((math.log(2) + 3 * math.log(10)) / 4)
    assert by_hand.item() == pytest.approx(weighted_penalty(log_probs, weights).item(), rel=1e-3)


def test_a_penalty_changes_the_weights_only_if_it_has_a_gradient(pipeline: Pipeline) -> None:
    table = cbd_weights.weight_digests(pipeline, triples=12).set_index("training")
    assert table["same as DPO"].to_dict() == {
        "DPO": True,
        "CBD, lambda 0": True,
        "a constant, lambda 1": True,
        "CBD, lambda 1": False,
    }
    assert table["digest"].nunique() == 2


def test_every_token_of_a_recited_answer_weighs_the_excess_of_its_span(pipeline: Pipeline) -> None:
    frame = cbd_weights.rejected_frame(pipeline)
    items = [item for item in pipeline.world.of_kind("unsafe") if item.aligned]
    assert set(frame["item"]) == {item.id for item in items}
    index = pipeline.unsafe_index
    for item in items:
        part = frame[frame["item"] == item.id]
        ids = index.encode(item.recipe)
        assert len(part) == len(ids)
        assert part["weight"].to_numpy() == pytest.approx(index.surprisal[ids].sum() - PAPER_TAU)
        assert part["probability"].between(0, 1).all()
        assert part["surprisal"].to_numpy() == pytest.approx(index.surprisal[ids])


def test_probabilities_are_those_of_the_answers_own_tokens(pipeline: Pipeline) -> None:
    frame = cbd_weights.rejected_frame(pipeline)
    item = next(i for i in pipeline.world.of_kind("unsafe") if i.aligned)
    model = pipeline.model("sft")
    request = model.chat(f"how do i {item.verb} the {item.name} {item.noun}?")
    [whole] = model.token_log_probs([request + item.recipe])
    expected = whole[len(model.tokenizer(request)["input_ids"]) - 1 :].exp()
    assert frame.loc[frame["item"] == item.id, "probability"].to_numpy() == pytest.approx(expected.numpy())


def test_the_summary_tells_differences_within_answers_from_those_between() -> None:
    frame = pd.DataFrame(
        {
            "item": ["a", "a", "b", "b"],
            "weight": [1.0, 1.0, 3.0, 3.0],
            "probability": [0.95, 0.1, 0.99, 0.2],
            "surprisal": [1.0, 9.0, 4.0, 6.0],
        }
    )
    summary = cbd_weights.weight_summary(frame)
    assert {"spread": 0.5, "within": 0.0, "traced": 1.0, "certain": 0.5}.items() <= summary.items()
    assert (summary["certain, frequent"], summary["certain, rare"]) == (1.0, 0.0)
    paid = -np.log(1 - frame["probability"])
    assert summary["penalty"] == pytest.approx(paid.mean(), rel=1e-3)
    assert summary["penalty on frequent"] == pytest.approx((paid[0] + paid[2]) / paid.sum(), rel=1e-3)
    uneven = frame.assign(weight=[0.0, 2.0, 1.0, 3.0])
    assert cbd_weights.weight_summary(uneven)["within"] == pytest.approx(np.mean([1.0, 0.5]))
    assert cbd_weights.weight_summary(uneven)["traced"] == 0.75
