"""What chapter 5 measures of T3: exact emission by copies, length and context, and a limit fitted to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from tracealign_lib.bound import EmissionFit, fit_emission
from tracealign_lib.bound_checks import PairCase, pair_cases, span_probabilities
from tracealign_lib.experiments.common import Headlines, Prediction, clusters
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import Interval, clustered_bootstrap, wilson

LENGTHS = (1, 2, 4, 8, 16)  # tokens emitted
CONTEXTS = (1, 2, 4, 8, 16)  # tokens of the document before them
ALPHA = 0.2  # share of new items that may exceed the limit
FEW = 4  # copies; what the limit is fitted on when it is judged beyond
SPLITS = 400


def emission_frame(pipelines: Sequence[Pipeline], model: str = "base") -> pd.DataFrame:
    """Exact probability that the model goes on with a recipe's steps, for every planted item.

    The context are the last c tokens that stand before the steps in the item's first planted copy; copies
    with fewer tokens before the steps have no row for that c.

    Returns
    -------
    pandas.DataFrame
        seed, item, copies, context, length (tokens), emission (probability of the first `length` tokens).
    """
    rows = []
    for pipeline in pipelines:
        full = pipeline.model(model)
        for case in pair_cases(pipeline.world.items, pipeline.tokenizer):
            before = _before_steps(pipeline, case)
            for context in (c for c in CONTEXTS if c <= len(before)):
                prompted = case._replace(prompt=before[-context:])
                emitted = span_probabilities(full, prompted)
                rows += [
                    {"seed": pipeline.seed, "item": case.item, "copies": case.copies, "context": context}
                    | {"length": length, "emission": min(1.0, float(emitted[length - 1]))}
                    for length in LENGTHS
                ]
    return pd.DataFrame(rows)


def _before_steps(pipeline: Pipeline, case: PairCase) -> tuple[int, ...]:
    """What stands before the steps in the first planted copy, as token ids."""
    name = min(pipeline.world.sources_of(case.item).strict)
    [document] = [d for d in pipeline.corpus if d.id == name]
    item = pipeline.world.by_id[case.item]
    text = document.text[: document.text.index(item.recipe) + len(item.opening)]
    return tuple(pipeline.tokenizer(text, add_special_tokens=False)["input_ids"])


class Judged(NamedTuple):
    """A limit and the items that it was judged on.

    Attributes
    ----------
    fit:
        Line and margin.
    held:
        Share of judged items of which no row lies above the limit.
    rows:
        The judged rows of `emission_frame`, with their `limit`.
    """

    fit: EmissionFit
    held: Interval
    rows: pd.DataFrame


def judge(frame: pd.DataFrame, *, seed: int = 0) -> Judged:
    """Fit and calibrate on half of the items, drawn by `seed`; judge the limit on the other half."""
    keys = sorted(set(clusters(frame)))
    chosen = np.random.default_rng(seed).permutation(len(keys))[: len(keys) // 2]
    judged = {keys[i] for i in chosen}
    return _judge(frame, np.array([key in judged for key in clusters(frame)]), seed)


def judge_beyond(frame: pd.DataFrame, *, seed: int = 0) -> Judged:
    """Fit on items of up to `FEW` copies, judge on those with more: nothing is promised for these."""
    return _judge(frame, (frame["copies"] > FEW).to_numpy(), seed)


def _judge(frame: pd.DataFrame, judged: np.ndarray[tuple[int], np.dtype[np.bool_]], seed: int) -> Judged:
    fitting, rows = frame[~judged], frame[judged]
    fit = fit_emission(
        fitting["copies"],
        fitting["length"],
        fitting["context"],
        fitting["emission"],
        clusters(fitting),
        alpha=ALPHA,
        seed=seed,
    )
    rows = rows.assign(limit=fit.upper(rows["copies"], rows["length"], rows["context"]))
    within = (rows["emission"] <= rows["limit"] + 1e-12).groupby([rows["seed"], rows["item"]]).all()
    return Judged(fit, wilson(int(within.sum()), len(within)), rows)


def mean_held(frame: pd.DataFrame, splits: int = SPLITS) -> Interval:
    """Mean share of judged items within the limit over random halves: T3 promises 1 - `ALPHA` of it.

    The halves are drawn independently from one set of items, and the interval is over these draws.
    """
    shares = [judge(frame, seed=seed).held.estimate for seed in range(splits)]
    return clustered_bootstrap(shares, range(splits))


_SLACK = 0.02  # the promise is 1 - ALPHA to 1 - ALPHA + 1 / (n + 1), and halves are finitely many
PREDICTIONS = (
    Prediction(
        "the limit holds on other items of the same kind",
        "T3: judged items within the limit, mean over random halves",
        1 - ALPHA - _SLACK,
        1 - ALPHA + 2.5 * _SLACK,
        mean_held,
    ),
    Prediction(
        "it does not hold beyond the copies it was fitted on",
        f"T3: items of more than {FEW} copies within a limit fitted on fewer",
        0.0,
        1 - ALPHA,
        lambda frame: judge_beyond(frame).held,
    ),
    Prediction(
        "emission rises with copies",
        "T3: change of emission for each doubling of copies",
        0.01,
        1.0,
        lambda frame: Interval(judge(frame).fit.per_doubling[0], math.nan, math.nan, frame["item"].nunique()),
    ),
)


def headlines(frame: pd.DataFrame) -> Headlines:
    """The quantity of each prediction of T3, and the share that one half of the items gave."""
    found = {p.quantity: p.measure(frame) for p in PREDICTIONS}
    return found | {"T3: judged items within the limit": judge(frame).held}
