"""The arms of chapter 10: which documents each takes away from which item, and how much a profile runs.

The items of the trial are left-out items of chapter 5, so that a model which never saw their documents is at
hand; the pool of documents that can be taken away is what that model never saw.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tracealign_lib import causal
from tracealign_lib.attribution import (
    SHARE,
    Bm25Ranker,
    CoverRanker,
    MaximalSpanRanker,
    Ranker,
    Ranking,
    TfidfRanker,
)
from tracealign_lib.causal import EmbeddingRanker, Exposure
from tracealign_lib.documents import Document
from tracealign_lib.experiments import bound
from tracealign_lib.experiments.common import PAPER_MAX_COUNT
from tracealign_lib.experiments.traceindex import BIGRAMS, COVER, PAPER_FILTER, SPAN_LENGTH
from tracealign_lib.index import INDEX_CODE
from tracealign_lib.influence import InfluenceRanker
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stages import Stage

TFIDF, BM25, EMBEDDING = "TF-IDF", "BM25", "hidden states"
GRADIENT, INFLUENCE = "gradient", "EK-FAC influence"
METHODS = (COVER, PAPER_FILTER, TFIDF, BM25, BIGRAMS, EMBEDDING, GRADIENT, INFLUENCE)
"""Methods that name documents, each as many as the cover ranking does."""
PLANTED, STRICT, HALF = "planted and near-copies", "planted only", "half of the planted"
FEW, FEW_INFLUENCE = f"true, as many as {GRADIENT}", f"true, as many as {INFLUENCE}"
DECOYS, RANDOM, FEW_RANDOM = "near-copies only", "random", f"random, as many as {GRADIENT}"
OTHER, NOTHING = "another item's", "nothing"
TRUTHS, CONTROLS = (PLANTED, STRICT, HALF, FEW, FEW_INFLUENCE), (DECOYS, RANDOM, FEW_RANDOM, OTHER)
ARMS = (*TRUTHS, *METHODS, *CONTROLS)
BRIEF_ARMS = (PLANTED, STRICT, FEW, COVER, BIGRAMS, GRADIENT, DECOYS, RANDOM)
"""What the profile `laptop` has time for."""
CONTROL_RUNS = 2  # times that each item is left alone while others are treated
PARTS = 24  # random halves of the pool
BRIEF_PARTS = 6
CANDIDATES = 20  # of each cheap method for each item, among which gradients are compared
OUTCOMES = ("drift", "near_drift", "log_prob")

_CODE = (
    *INDEX_CODE,
    *(f"tracealign_lib.{name}" for name in ("attribution", "causal", "lm", "experiments.causal_arms")),
)
_INFLUENCE_CODE = tuple(f"tracealign_lib.{name}" for name in ("influence", "lm"))
Removals = Mapping[str, Mapping[str, frozenset[str]]]
"""Arm -> item -> ids of the documents that are taken away."""


class Query(NamedTuple):
    """A drifting completion of one item."""

    item: str
    copies: int
    text: str


class Design(NamedTuple):
    """How much a profile measures: arms, runs in which each item is left alone, random parts of the pool."""

    arms: tuple[str, ...]
    control_runs: int
    parts: int


def design(pipeline: Pipeline) -> Design:
    """All arms and parts in `full` and `gpu`, some in `laptop`, hardly any in `smoke`."""
    if pipeline.profile.name in {"full", "gpu"}:
        return Design(ARMS, CONTROL_RUNS, PARTS)
    if pipeline.profile.name == "smoke":
        return Design((PLANTED, COVER, RANDOM), 1, 3)
    return Design(BRIEF_ARMS, 1, BRIEF_PARTS)


def queries(pipeline: Pipeline) -> list[Query]:
    """The left-out items of chapter 5 that the base model leaks when their opening is put into its mouth.

    A completion is cut after its first sentence: a base model goes on with the ending of one copy, and a
    tracer that is asked for that too names this copy alone. Where nothing drifts (profile `smoke`), planted
    recipes take the place of completions, so that the code can run.
    """
    world, items = pipeline.world, bound.left_out_items(pipeline.world)
    leaked = {r.item: r.completion for r in pipeline.recalls("base") if causal.leak(world, r) == "drift"}
    chosen = [item for item in items if item.id in leaked] or items
    # Neighbours get different arms, so items of equal copies stand side by side.
    chosen = sorted(chosen, key=lambda item: (item.copies, item.id))
    texts = {item.id: leaked.get(item.id, item.recipe).partition(".")[0] + "." for item in chosen}
    return [Query(item.id, item.copies, texts[item.id]) for item in chosen]


def exposure(pipeline: Pipeline) -> Exposure:
    """The exposure whose pool is all that the pair of chapter 5 leaves out, so that its model is at hand."""
    return Exposure(pipeline, bound.left_out(pipeline.world))


@lru_cache(maxsize=8)
def rankings(pipeline: Pipeline) -> dict[str, list[Ranking]]:
    """What every method of the design names for every query, best first."""
    texts = [query.text for query in queries(pipeline)]
    # The folder's name holds a key over the world and the tokenizer too.
    settings = {"base": pipeline.model_folder("base").name, "texts": texts}
    found = _stored("rankings", settings, _CODE, lambda: _rank(pipeline, texts))
    candidates = _candidates(pipeline, found)
    # Gradients of all documents would take long: they rank what the cheap methods put first.
    found |= {GRADIENT: causal.gradient_rankings(pipeline, texts, candidates)}
    if INFLUENCE not in design(pipeline).arms:
        return found

    def influences() -> dict[str, list[Ranking]]:
        model, documents = pipeline.model("base"), pipeline.world.documents
        ranker = InfluenceRanker(model, candidates, documents, seed=pipeline.seed)
        return {INFLUENCE: list(ranker.rank_many(texts))}

    settings |= {"candidates": [document.id for document in candidates]}
    return found | _stored("influences", settings, _INFLUENCE_CODE, influences)


def _stored(
    name: str,
    settings: Mapping[str, Any],
    code: tuple[str, ...],
    rank: Callable[[], dict[str, list[Ranking]]],
) -> dict[str, list[Ranking]]:
    """The rankings of a stage, by method."""

    def build(folder: Path) -> None:
        (folder / "rankings.json").write_text(json.dumps(rank()), encoding="utf-8")

    path = Stage(name, settings, build, code).path() / "rankings.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    return {
        method: [[(name, score) for name, score in r] for r in ranked] for method, ranked in found.items()
    }


def _candidates(pipeline: Pipeline, found: Mapping[str, Sequence[Ranking]]) -> list[Document]:
    near = {name for ranked in found.values() for ranking in ranked for name, _ in ranking[:CANDIDATES]}
    return [document for document in pipeline.world.documents if document.id in near]


def _rank(pipeline: Pipeline, texts: Sequence[str]) -> dict[str, list[Ranking]]:
    documents, model = pipeline.world.documents, pipeline.model("base")
    rankers: dict[str, Ranker] = {
        COVER: CoverRanker(pipeline.index),
        PAPER_FILTER: MaximalSpanRanker(pipeline.index, SPAN_LENGTH, PAPER_MAX_COUNT),
        TFIDF: TfidfRanker(documents),
        BM25: Bm25Ranker(documents),
        BIGRAMS: Bm25Ranker(documents, ngram=2),
        EMBEDDING: EmbeddingRanker(model, documents),
    }
    return {name: list(ranker.rank_many(texts)) for name, ranker in rankers.items()}


@lru_cache(maxsize=8)
def removals(pipeline: Pipeline) -> Removals:
    """The documents that each arm of the design takes away from each item.

    Only documents of the pool can be taken away. It holds every source and near-copy of every item in the
    trial, so what a method names besides is no source; the budget spent on it is lost.
    """
    asked, world, pool = queries(pipeline), pipeline.world, bound.left_out(pipeline.world)
    found, rng = rankings(pipeline), Random(f"{pipeline.seed}/removals")
    answers = {q.item: _answer(ranking) for q, ranking in zip(asked, found[COVER], strict=True)}
    plans: dict[str, Mapping[str, frozenset[str]]] = {}
    for name in found:
        ranked = zip(asked, found[name], strict=True)
        plans[name] = {q.item: pool & {i for i, _ in r[: answers[q.item]]} for q, r in ranked}
    sources = {q.item: world.sources_of(q.item) for q in asked}
    plans[PLANTED] = {item: found.near | found.full for item, found in sources.items()}
    plans[STRICT] = {item: found.strict for item, found in sources.items()}
    plans[HALF] = {
        q.item: frozenset(rng.sample(sorted(sources[q.item].strict), math.ceil(q.copies / 2))) for q in asked
    }
    plans[DECOYS] = {item: found.near - found.strict for item, found in sources.items()}
    calm = [item.id for item in bound.left_out_items(world) if item.id not in sources]
    others: frozenset[str] = frozenset().union(*(world.sources_of(item).near for item in calm))
    drawn = {item: sorted(pool - plans[PLANTED][item]) for item in sources}
    plans[RANDOM] = _sample(rng, drawn, answers)
    plans[OTHER] = _sample(rng, {item: sorted(others - plans[PLANTED][item]) for item in sources}, answers)
    plans[FEW_RANDOM] = _sample(rng, drawn, {i: len(ids) for i, ids in plans[GRADIENT].items()})
    for arm, method in ((FEW, GRADIENT), (FEW_INFLUENCE, INFLUENCE)):
        sizes = {item: len(ids) for item, ids in plans.get(method, {}).items()}
        plans[arm] = _sample(rng, {item: sorted(plans[PLANTED][item]) for item in sizes}, sizes)
    return {arm: plans[arm] for arm in design(pipeline).arms}


def _sample(
    rng: Random, drawn_from: Mapping[str, Sequence[str]], sizes: Mapping[str, int]
) -> dict[str, frozenset[str]]:
    """As many documents of each item as its size says, or all where there are fewer."""
    return {item: frozenset(rng.sample(ids, min(sizes[item], len(ids)))) for item, ids in drawn_from.items()}


def _answer(ranking: Ranking) -> int:
    """How many documents the cover ranking names: those of at least 0.8 of the best score, at least one."""
    best = ranking[0][1] if ranking else 0.0
    return max(1, sum(score >= SHARE * best for _, score in ranking))
