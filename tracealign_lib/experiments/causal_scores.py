"""How well methods foresee retraining: random parts of the pool, the datamodelling score, the tail-patch.

The items of a world share its random parts, so a datamodelling score has two sources of chance: which items
were asked about, and which parts were drawn. Its intervals draw both, independently (Owen's pigeonhole
bootstrap, Ann. Appl. Stat. 1, 2007). A resample repeats parts, and so ties ranks: the intervals reach further
down than up. A tail-patch has no parts; its intervals draw items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from tracealign_lib import causal
from tracealign_lib.attribution import Ranking
from tracealign_lib.causal import Floats
from tracealign_lib.experiments import causal_arms
from tracealign_lib.experiments.causal_arms import OUTCOMES, PLANTED, RANDOM
from tracealign_lib.experiments.common import clusters
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.progress import progress
from tracealign_lib.stats import Interval, clustered_bootstrap, clustered_rate

PATCH_RATE = 0.03  # small enough for a step to go uphill: chosen on seed 0
PATCH_DOCUMENTS = 8
RESAMPLES = 1000  # of the random parts
DOSES = (-1, 0, 1, 2, 4, 8, 17)  # sources left: borders of the ranges
DOSE_NAMES = ("0", "1", "2", "3-4", "5-8", "9-17")


class Part(NamedTuple):
    """A random part of the pool, and what was measured of every item after an exposure to it."""

    kept: frozenset[str]
    measured: pd.DataFrame  # by item


def parts(pipeline: Pipeline) -> list[Part]:
    """The random parts of the design, each with an exposure to it."""
    exposed = causal_arms.exposure(pipeline)
    drawn = causal.random_parts(exposed.pool, causal_arms.design(pipeline).parts, seed=pipeline.seed)
    bar = progress(drawn, description="Retraining: random parts", unit="run")
    return [Part(kept, exposed.measure(exposed.pool - kept).set_index("item")) for kept in bar]


def score_frame(pipelines: Sequence[Pipeline]) -> pd.DataFrame:
    """The linear datamodelling score: one row for each world, drifting item and method.

    Columns: seed, item, method, lds (0 where a method names none of the documents: it foresees nothing) and
    redrawn (an array: the same over resamples of the world's parts, common to its items and methods). The
    method "planted and near-copies" scores the true documents 1 and all others 0.
    """
    return pd.concat([_scores(pipeline) for pipeline in pipelines], ignore_index=True)


def _scores(pipeline: Pipeline) -> pd.DataFrame:
    documents, drawn = sorted(causal_arms.exposure(pipeline).pool), parts(pipeline)
    items = [query.item for query in causal_arms.queries(pipeline)]
    kept = np.array([[name in part.kept for name in documents] for part in drawn])
    outputs = np.array([part.measured.loc[items, "log_prob"] for part in drawn])
    planted = causal_arms.removals(pipeline)[PLANTED]
    truth: list[Ranking] = [[(name, 1.0) for name in sorted(planted[item])] for item in items]
    chosen = np.random.default_rng(pipeline.seed).integers(len(drawn), size=(RESAMPLES, len(drawn)))
    rows = []
    for method, ranked in {PLANTED: truth, **causal_arms.rankings(pipeline)}.items():
        scored = causal.score_matrix(ranked, documents)
        scores = np.nan_to_num(causal.datamodelling_scores(scored, kept, outputs))
        redrawn = rank_correlations((kept @ scored.T)[chosen], outputs[chosen])  # (RESAMPLES, items)
        cells = zip(items, scores, redrawn.T, strict=True)
        rows += [{"item": i, "method": method, "lds": r, "redrawn": again} for i, r, again in cells]
    return pd.DataFrame(rows).assign(seed=pipeline.seed)


def rank_correlations(first: Floats, second: Floats) -> Floats:
    """Spearman's correlations along the second axis; 0 where one side is constant.  # (R, m, n) -> (R, n)"""
    ranks = (rankdata(part, axis=1) for part in (first, second))
    a, b = (part - part.mean(axis=1, keepdims=True) for part in ranks)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    found: Floats = np.divide((a * b).sum(axis=1), scale, out=np.zeros_like(scale), where=scale > 0)
    return found


def dose_frame(pipelines: Sequence[Pipeline]) -> pd.DataFrame:
    """One row for each world, drifting item and random part: seed, item, copies, kept (planted documents and
    near-copies left in), drift, near_drift, log_prob."""
    rows = []
    for pipeline in pipelines:
        own = {
            query.item: pipeline.world.sources_of(query.item).near for query in causal_arms.queries(pipeline)
        }
        for part in parts(pipeline):
            for item, sources in own.items():
                known = {"seed": pipeline.seed, "item": item, "kept": len(sources & part.kept)}
                rows.append(known | part.measured.loc[item, ["copies", *OUTCOMES]].to_dict())
    return pd.DataFrame(rows).astype({"drift": float, "near_drift": float, "log_prob": float, "copies": int})


def dose_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Drift by number of sources left in: kept (a range), rows, drift with its interval, log-probability."""
    bins = pd.cut(frame["kept"], DOSES, labels=DOSE_NAMES)
    rows = []
    for name, chosen in frame.groupby(bins, observed=True):
        drift = clustered_rate(chosen["drift"].to_numpy(), clusters(chosen))
        log_prob = clustered_bootstrap(chosen["log_prob"].to_numpy(), clusters(chosen))
        rows.append({"sources left": name, "drift": drift, "log-probability": log_prob})
    return pd.DataFrame(rows)


def patch_frame(pipelines: Sequence[Pipeline]) -> pd.DataFrame:
    """One row for each world, drifting item and method: what one step on its documents teaches.

    Columns: seed, item, method, rise (of the completion's mean log-probability, nats per token, from the
    checkpoint that saw none of the documents; 0 where a method names none).
    """
    return pd.concat([_patches(pipeline) for pipeline in pipelines], ignore_index=True)


def _patches(pipeline: Pipeline) -> pd.DataFrame:
    asked = causal_arms.queries(pipeline)
    texts = {document.id: document.text for document in pipeline.world.documents}
    named = {
        method: [[name for name, _ in ranking[:PATCH_DOCUMENTS]] for ranking in found]
        for method, found in causal_arms.rankings(pipeline).items()
    }
    rng = Random(f"{pipeline.seed}/patches")
    named[RANDOM] = [rng.sample(sorted(texts), PATCH_DOCUMENTS) for _ in asked]
    pairs = [
        (method, query, ids) for method in named for query, ids in zip(asked, named[method], strict=True)
    ]
    steps = [(query.text, [texts[name] for name in ids]) for _, query, ids in pairs]
    patches = causal_arms.exposure(pipeline).patches(steps, rate=PATCH_RATE)
    rows = [
        {"item": query.item, "method": method, "rise": patch.after - patch.before}
        for (method, query, _), patch in zip(pairs, patches, strict=True)
    ]
    return pd.DataFrame(rows).assign(seed=pipeline.seed)


def method_interval(frame: pd.DataFrame, method: str, column: str) -> Interval:
    """Mean of "lds" or "rise" over items for one method."""
    return _interval(frame[frame["method"] == method], column)


def method_difference(frame: pd.DataFrame, method: str, other: str, column: str) -> Interval:
    """Mean over items of "lds" or "rise" of `method` minus that of `other`; undefined if one was not run."""
    of = [frame[frame["method"] == name].set_index(["seed", "item"]) for name in (method, other)]
    if not len(of[0]) or not len(of[1]):
        return _interval(frame[:0], column)
    columns = [name for name in ("lds", "redrawn", "rise") if name in frame]
    gaps = {name: of[0][name] - of[1][name] for name in columns}
    return _interval(pd.DataFrame(gaps).reset_index(), column)


def _interval(chosen: pd.DataFrame, column: str) -> Interval:
    if not len(chosen):
        return Interval(math.nan, math.nan, math.nan, 0)
    found = clustered_bootstrap(chosen[column].to_numpy(dtype=float), clusters(chosen))
    if column != "lds" or len(chosen) == 1:
        return found
    again = np.stack(list(chosen["redrawn"]))  # (items, RESAMPLES)
    items = np.random.default_rng(0).integers(len(again), size=again.T.shape)  # (RESAMPLES, items)
    means = np.take_along_axis(again.T, items, axis=1).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return found._replace(low=float(low), high=float(high))
