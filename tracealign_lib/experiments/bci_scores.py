"""Every score of chapter 4 under every filter: what it needs to be known, and a text's largest score.

Texts are scored once (`score_frame`), and everything else reads the frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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
    Scorer,
    SpanLength,
    candidate_spans,
    score_all,
)
from tracealign_lib.documents import Document
from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments.bci_texts import BeliefText, belief_texts
from tracealign_lib.experiments.common import PAPER_MAX_COUNT
from tracealign_lib.index import INDEX_CODE, Span, TraceIndex
from tracealign_lib.lm import LanguageModel
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.progress import progress
from tracealign_lib.stages import Stage

ScorerSet = Mapping[str, Scorer | Sequence[Scorer]]
Found = tuple[NDArray[np.int64], list[Span]]

PAPER_WINDOW = 8  # tokens, as reviewers of the paper have it
LIFT = "memorisation lift"


class SpanFilter(NamedTuple):
    """Which spans of a text are scored: indexed documents ("unsafe" or "corpus"), and `candidate_spans`."""

    collection: str
    min_length: int
    max_count: int | None
    window: int | None


FILTERS = {
    "paper": SpanFilter("unsafe", PAPER_WINDOW, PAPER_MAX_COUNT, PAPER_WINDOW),
    "unsafe spans": SpanFilter("unsafe", 8, None, None),
    "corpus spans": SpanFilter("corpus", 8, None, None),
}

# What must be known beyond an index, for each score of `scorers` (simplest first) and each collection.
NEEDS: dict[str, frozenset[str]] = {
    "membership": frozenset(),
    "span length": frozenset(),
    "raw BCI": frozenset(),
    "density": frozenset(),
    "prior KL": frozenset(),
    "largest token risk": frozenset(),
    "longest match": frozenset(),
    "ratio to benign": frozenset({"unsafe", "benign"}),
    "ratio to policy": frozenset({"unsafe", "policy"}),
    "conflict": frozenset({"rules"}),
    "conflict, no quotes": frozenset({"rules"}),
    LIFT: frozenset({"model"}),
}

UNITS = {"membership": "", "span length": "tokens", "density": "nats per token"}
"""The unit of each score that is not in nats."""

_COLLECTIONS: dict[str, Callable[[Document], bool]] = {
    "benign": lambda document: document.meta["collection"] == "benign",
    "policy": lambda document: document.meta["collection"] == "policy",
    "rules": lambda document: document.meta["kind"] == "policy",  # permits allow, so they are no rules
}
_STAGE_CODE = (*INDEX_CODE, "tracealign_lib.experiments.bci_scores")


def collection_index(pipeline: Pipeline, name: str) -> TraceIndex:
    """TraceIndex over the "benign" or "policy" collection, or over the "rules" that forbid."""
    if name not in _COLLECTIONS:
        raise ParameterError(
            "Unknown collection.",
            given=repr(name),
            expected=" or ".join(_COLLECTIONS),
            mend="choose one of them",
        )

    def build(folder: Path) -> None:
        chosen = [document for document in pipeline.world.documents if _COLLECTIONS[name](document)]
        TraceIndex.build(chosen, pipeline.tokenizer, folder / "index")

    settings = {"world": pipeline.world.digest(), "tokenizer": pipeline.index.tokenizer_hash}
    return TraceIndex.open(Stage(f"index-bci-{name}", settings, build, _STAGE_CODE).path() / "index")


def scorers(pipeline: Pipeline) -> dict[str, Scorer]:
    """The scores of `NEEDS` that are the same for every text, by name."""
    unsafe, rules = pipeline.unsafe_index, collection_index(pipeline, "rules")
    return {
        "membership": Membership(FILTERS["corpus spans"].min_length),
        "span length": SpanLength(),
        "raw BCI": RawBCI(),
        "density": DensityBCI(),
        "prior KL": PriorKL(),
        "largest token risk": MaxTokenRisk(),
        "longest match": LongestMatchBCI(),
        "ratio to benign": LikelihoodRatioBCI(unsafe, collection_index(pipeline, "benign")),
        "ratio to policy": LikelihoodRatioBCI(unsafe, collection_index(pipeline, "policy")),
        "conflict": ConflictBCI(rules),
        "conflict, no quotes": ConflictBCI(rules, quote_length=8),
    }


def lift_scorers(
    pipeline: Pipeline, texts: Sequence[BeliefText], model: LanguageModel
) -> list[MemorisationLift]:
    """One `MemorisationLift` for each text, with the prompt that it answered; documents have none."""
    prompts = ["" if t.request is None else model.chat(t.request, prefill=t.prefill) for t in texts]
    return MemorisationLift.for_texts(model, prompts, [pipeline.index.encode(t.text) for t in texts])


def score_frame(
    texts: Sequence[BeliefText], index: TraceIndex, scorers: ScorerSet, chosen: SpanFilter
) -> pd.DataFrame:
    """The score of every text by every scorer: the largest over its spans, as `bci.max_bci` defines it.

    Parameters
    ----------
    scorers:
        By name: one scorer, or one scorer for each text.
    chosen:
        Which spans are scored; its `collection` is not read, `index` is.

    Returns
    -------
    DataFrame
        One row per text and scorer: seed, group, item, copies, half, `text` (position in `texts`),
        `tokens`, `spans` (how many were scored), scorer, score (minus infinity without a span).
    """
    found = {text: find_spans(index, text, chosen) for text in dict.fromkeys(t.text for t in texts)}
    rows: list[tuple[Any, ...]] = []
    for name, scorer in progress(scorers.items(), description="Scoring texts", unit="scorer"):
        shared = None if isinstance(scorer, Sequence) else _best(index, scorer, found)
        for number, text in enumerate(texts):
            ids, spans = found[text.text]
            if shared is None:
                own = cast(Sequence[Scorer], scorer)[number]
                score = (
                    float(score_all(own, index, ids, spans).max(initial=-math.inf)) if spans else -math.inf
                )
            else:
                score = shared[text.text]
            rows.append((*text[:5], number, len(ids), len(spans), name, score))
    columns = [*BeliefText._fields[:5], "text", "tokens", "spans", "scorer", "score"]
    return pd.DataFrame(rows, columns=columns)


def find_spans(index: TraceIndex, text: str, chosen: SpanFilter) -> Found:
    """The token ids of a text and its spans under a filter, whose `collection` is not read."""
    ids = index.encode(text)
    limits = {"min_length": chosen.min_length, "max_count": chosen.max_count, "window": chosen.window}
    return ids, candidate_spans(index, ids, **cast(Any, limits))


def _best(index: TraceIndex, scorer: Scorer, found: Mapping[str, Found]) -> dict[str, float]:
    """The largest score of each text's spans."""
    return {
        text: float(score_all(scorer, index, ids, spans).max()) if spans else -math.inf
        for text, (ids, spans) in found.items()
    }


def scored(
    pipelines: Sequence[Pipeline],
    choose: Callable[[Pipeline], list[BeliefText]] = belief_texts,
    *,
    filters: Mapping[str, SpanFilter] = FILTERS,
    model: str | None = "dpo",
) -> pd.DataFrame:
    """`score_frame` of every world under every filter, pooled; adds the column "filter".

    `model` names the one whose memorisation lift is measured; None leaves that score out.
    """
    frames = []
    for pipeline in pipelines:
        texts = choose(pipeline)
        together: dict[str, Scorer | Sequence[Scorer]] = {**scorers(pipeline)}
        if model is not None:
            together[LIFT] = lift_scorers(pipeline, texts, pipeline.model(model))
        for name, chosen in filters.items():
            index = pipeline.unsafe_index if chosen.collection == "unsafe" else pipeline.index
            frames.append(score_frame(texts, index, together, chosen).assign(filter=name))
    return pd.concat(frames, ignore_index=True)
