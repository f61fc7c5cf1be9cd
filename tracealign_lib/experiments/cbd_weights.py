"""What the CBD penalty is made of: the weights of tokens, their probabilities, and what training changes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tracealign_lib import cbd, lexicon, lm
from tracealign_lib.cbd import CBDTrainer, span_weights, token_penalty
from tracealign_lib.experiments.cbd_arms import preference_triples, scorer_of
from tracealign_lib.experiments.common import PAPER_TAU
from tracealign_lib.pipeline import Pipeline

FREQUENT = 5.0
"""Surprisal (nats) below which a token counts as a word of the grammar: at least one in 150 of the index."""
MIN_LENGTH = 8
"""Shortest span that is traced (tokens); `cbd.CBDConfig`'s default."""


def penalty_by_hand(log_probs: Tensor, weights: Tensor) -> Tensor:
    """The penalty of chapter 7's equation for answers of one batch, both (B, T): a weighted mean, in nats."""
    paid = -torch.log(1 - log_probs.exp())  # (B, T)
    return (weights * paid).sum() / weights.sum()


class ConstantPenalty(CBDTrainer):
    """The CBD penalty as a number without a gradient, which is what the public code adds to DPO's loss."""

    def penalty(self, log_probs: Tensor, weights: Tensor) -> Tensor:
        """The value of `CBDTrainer`'s penalty, detached from the model."""
        return super().penalty(log_probs, weights).detach()


def weight_digests(pipeline: Pipeline, *, triples: int = 24) -> pd.DataFrame:
    """The first digits of the SHA-256 of all weights after a few steps of DPO, with four penalties.

    Columns: training, digest, `same as DPO`. Each training starts from the SFT model and sees the same
    `triples` in the same order.
    """
    start, settings = pipeline.model_folder("sft"), pipeline.profile.model
    chosen = preference_triples(pipeline, "refusal")[:triples]
    trace = (pipeline.unsafe_index, scorer_of(pipeline, "raw BCI"))
    seeded: dict[str, Any] = {"seed": pipeline.seed, "device": pipeline.device}
    trainings: dict[str, tuple[float, type[CBDTrainer]] | None] = {
        "DPO": None,
        "CBD, lambda 0": (0.0, CBDTrainer),
        "a constant, lambda 1": (1.0, ConstantPenalty),
        "CBD, lambda 1": (1.0, CBDTrainer),
    }
    digests = {}
    for name, training in trainings.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if training is None:
                lm.prefer(start, chosen, settings, folder, **seeded)
            else:
                penalty = {"penalty_lambda": training[0]}
                seeded |= {"traced": training[1]}
                cbd.prefer(start, chosen, settings, folder, trace=trace, penalty=penalty, **seeded)
            digests[name] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    same = [digest == digests["DPO"] for digest in digests.values()]
    return pd.DataFrame({"training": list(digests), "digest": list(digests.values()), "same as DPO": same})


def rejected_frame(pipeline: Pipeline, model: str = "sft", scorer: str = "raw BCI") -> pd.DataFrame:
    """One row per token of the unsafe answers that DPO rejects: how likely it is, and what it weighs.

    Columns: item, token (its place), probability under the model after the request, weight (nats above
    the paper's threshold), surprisal (nats, from the index).
    """
    loaded, index = pipeline.model(model), pipeline.unsafe_index
    items = [item for item in pipeline.world.of_kind("unsafe") if item.aligned]
    requests = [loaded.chat(item.fill(lexicon.DIRECT_REQUESTS[0])) for item in items]
    texts = [request + item.recipe for request, item in zip(requests, items, strict=True)]
    made, frames = scorer_of(pipeline, scorer), []
    for item, row in zip(items, loaded.token_log_probs(texts), strict=True):
        ids = index.encode(item.recipe).tolist()
        frame = {
            "item": item.id,
            "token": np.arange(len(ids)),
            "probability": row[-len(ids) :].exp().numpy(),
            "weight": span_weights(index, made, ids, threshold=PAPER_TAU, min_length=MIN_LENGTH),
            "surprisal": index.surprisal[ids],
        }
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True)


def weight_summary(frame: pd.DataFrame) -> Mapping[str, float]:
    """How much the weights of `rejected_frame` differ, and how sure the model is of what they stand on.

    "spread": standard deviation over mean of all weights; "within": the same inside an answer, averaged;
    "traced": share of tokens with a weight; "certain": share of tokens with a probability above 0.9;
    "certain, frequent" and "certain, rare": the same on both sides of `FREQUENT`; "penalty": its mean per
    token (nats); "penalty on frequent": the share of it that stands on frequent tokens.
    """
    weights, certain, frequent = frame["weight"], frame["probability"] > 0.9, frame["surprisal"] < FREQUENT
    penalty = token_penalty(torch.tensor(np.log(frame["probability"].to_numpy()))).numpy()
    answers = frame.groupby("item")["weight"]
    return {
        "spread": float(weights.std(ddof=0) / weights.mean()),
        "within": float((answers.std(ddof=0) / answers.mean()).mean()),
        "traced": float((weights > 0).mean()),
        "certain": float(certain.mean()),
        "certain, frequent": float(certain[frequent].mean()),
        "certain, rare": float(certain[~frequent].mean()),
        "penalty": float(penalty.mean()),
        "penalty on frequent": float(penalty[frequent.to_numpy()].sum() / penalty.sum()),
    }
