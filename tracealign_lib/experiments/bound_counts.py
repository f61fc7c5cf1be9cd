"""What chapter 5 measures of the theorems that need counts alone: T0, T1, and the form f(M, l, tau).

T1 is put to the test on every span of a small alphabet and on random corpora (`planting_frame`), and
then asked about real items on an n-gram model of the belief world (`form_frame`). T0 is held against what
the aligned model answered (`window_frame`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from tracealign_lib import bound
from tracealign_lib.bound import Planting
from tracealign_lib.bound_checks import PairCase, pair_cases
from tracealign_lib.experiments.common import (
    DRIFT_ATTACKS,
    PAPER_MAX_COUNT,
    PAPER_TAU,
    Headlines,
    Prediction,
    clusters,
    rate,
)
from tracealign_lib.ngram import NGramModel
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import Interval, clustered_bootstrap

WINDOW = 8  # tokens, as in the paper's public code
FORM_LENGTH = 16  # tokens
ORDERS, ALPHAS = (1, 2), (0.1, 1.0, 10.0)
ENUMERATED_LENGTH = 4  # tokens
_CORPORA: tuple[list[list[int]], ...] = ([], [[0, 2, 1, 1], [1, 0, 2], [2, 2, 0, 1, 0]])


# --- T0 on what the aligned model answered -------------------------------------------------------


def window_frame(pipelines: Sequence[Pipeline], model: str = "dpo") -> pd.DataFrame:
    """One row per attacked prompt: seed, group, item, drift, and its completion's risky windows.

    `windows` counts windows of `WINDOW` tokens that occur in the unsafe collection with BCI above the
    paper's threshold, `rare windows` those among them with M <= 3; `any` and `any rare` say whether
    there is one.
    """
    rows = []
    for pipeline in pipelines:
        for outcome in pipeline.outcomes(model):
            if outcome.prompt.group in DRIFT_ATTACKS:
                every, rare = (_risky(pipeline, outcome.completion, m) for m in (None, PAPER_MAX_COUNT))
                rows.append(
                    {"seed": pipeline.seed, "group": outcome.prompt.group, "item": outcome.prompt.item}
                    | {"drift": outcome.drifted, "windows": every, "any": every > 0}
                    | {"rare windows": rare, "any rare": rare > 0}
                )
    return pd.DataFrame(rows)


def _risky(pipeline: Pipeline, text: str, max_count: int | None) -> int:
    index = pipeline.unsafe_index
    ids = index.encode(text)
    if not len(ids):
        return 0
    found = bound.risky_windows(index, ids[None], length=WINDOW, threshold=PAPER_TAU, max_count=max_count)
    return int(found.sum())


def window_table(frame: pd.DataFrame) -> pd.DataFrame:
    """T0 attack by attack: the three quantities of its chain, and the last two with M <= 3."""
    names = {
        "drift": "drift",
        "any": "P(W >= 1)",
        "windows": "E[W]",
        "any rare": "P(W >= 1), M <= 3",
        "rare windows": "E[W], M <= 3",
    }
    means = frame.groupby("group", sort=False)[list(names)].mean()
    return means.rename(columns=names).reset_index().rename(columns={"group": "attack"})


def _drifted(frame: pd.DataFrame, column: str) -> Interval:
    drifted = frame[frame["drift"]]
    return rate(drifted, column) if len(drifted) else Interval(math.nan, math.nan, math.nan, 0)


WINDOW_PREDICTIONS = (
    Prediction(
        "drift implies a risky window, so T0 applies",
        "drifting completions with a risky window",
        0.98,
        1.0,
        lambda frame: _drifted(frame, "any"),
    ),
    Prediction(
        "with M <= 3 it does not, and T0 says nothing",
        "drifting completions with a risky window, M <= 3",
        0.0,
        0.8,
        lambda frame: _drifted(frame, "any rare"),
    ),
    Prediction(
        "the union bound is vacuous here",
        "E[W] over attacked prompts",
        1.0,
        math.inf,
        lambda frame: clustered_bootstrap(frame["windows"].to_numpy(), clusters(frame)),
    ),
)


# --- T1 put to the test --------------------------------------------------------------------------


@cache
def planting_frame(random_cases: int = 500, seed: int = 0) -> pd.DataFrame:
    """Cases of T1 with an exact truth: every span of `ENUMERATED_LENGTH` on three letters, and random ones.

    Enumerated after every context, for orders 0, 1 and 2, over an empty and a small corpus, with 1 and 3
    planted copies. Columns are those of `bound.Planting`, and order, alpha, how, growth, repeated (log
    of the factor with r), and whether each factor is exceeded.
    """
    rows = []
    for order in (0, 1, 2):
        for base in _CORPORA:
            for copies in (1, 3):
                settings: dict[str, Any] = {"order": order, "alpha": 1.0}
                for case in bound.enumerate_planting(base, copies, length=ENUMERATED_LENGTH, **settings):
                    rows.append(_planting_row(case, "enumerated", **settings))
    rng = np.random.default_rng(seed)
    rows += [_random_planting(rng) for _ in range(random_cases)]
    return pd.DataFrame(rows)


def _planting_row(case: Planting, how: str, *, order: int, alpha: float) -> dict[str, Any]:
    length, repetition = len(case.span), max(case.repetition, 1)
    return case._asdict() | {
        "how": how,
        "order": order,
        "alpha": alpha,
        "growth": case.growth,
        "repeated": bound.log_multiplier(case.match_count, length, alpha, repetition=repetition),
        "short form exceeded": case.stated_fails,
        "T1 exceeded": case.corrected_fails,
    }


def _random_planting(rng: np.random.Generator) -> dict[str, Any]:
    """A random corpus, and a random document with a span in it, planted a few times."""
    vocab_size, order = int(rng.integers(2, 9)), int(rng.integers(0, 4))
    base = [rng.integers(vocab_size, size=rng.integers(1, 13)) for _ in range(rng.integers(0, 30))]
    document = rng.integers(vocab_size, size=rng.integers(2, 15))
    start = int(rng.integers(0, len(document) - 1))
    end = int(rng.integers(start + 1, len(document) + 1))
    alpha = float(rng.choice([0.1, 0.5, 1.0, 4.0]))
    case = bound.plant(
        base,
        document,
        int(rng.integers(1, 17)),
        document[start:end],
        document[:start],
        vocab_size=vocab_size,
        order=order,
        alpha=alpha,
    )
    return _planting_row(case, "random", order=order, alpha=alpha)


def planting_summary(frame: pd.DataFrame) -> dict[str, int]:
    """Cases of `planting_frame`, and in how many each factor was exceeded."""
    counts = {name: int(frame[name].sum()) for name in ("T1 exceeded", "short form exceeded")}
    repeated = frame["repetition"] > 1
    return {
        "cases": len(frame),
        **counts,
        "short form exceeded where no gram repeats": int(frame.loc[~repeated, "short form exceeded"].sum()),
    }


# --- f(M, l, tau) on the belief world ------------------------------------------------------------


def form_frame(pipeline: Pipeline) -> pd.DataFrame:
    """f at the paper's tau beside the truth, for each unsafe item on n-gram models of the whole world.

    The span is the first `FORM_LENGTH` tokens of the steps after the opening; its sources are the item's
    planted copies. In nats: bci, gain (`bound.context_gain`), factor (log (1 + r M / alpha)^l), truth
    (log P_D), t1 (log of the sharper right side of T1), and f, not cut at 0, with one window.
    """
    texts = {d.id: ids for d, ids in zip(pipeline.corpus, _encoded(pipeline), strict=True)}
    cases = pair_cases(pipeline.world.of_kind("unsafe"), pipeline.tokenizer)
    rows = []
    for order in ORDERS:
        for alpha in ALPHAS:
            full = NGramModel(
                list(texts.values()), vocab_size=len(pipeline.tokenizer), order=order, alpha=alpha
            )
            rows += [_form_row(pipeline, case, texts, full) for case in cases]
    return pd.DataFrame(rows)


def _form_row(
    pipeline: Pipeline, case: PairCase, texts: dict[str, list[int]], full: NGramModel
) -> dict[str, Any]:
    sources = pipeline.world.sources_of(case.item).strict
    planted = [texts[name] for name in sorted(sources)]
    settings: dict[str, Any] = {"vocab_size": full.vocab_size, "order": full.order}
    rest = [ids for name, ids in texts.items() if name not in sources]
    without = NGramModel(rest, alpha=full.alpha, **settings)
    span = np.asarray(case.span[:FORM_LENGTH])
    below = without.span_log_prob(span, case.prompt)
    bci = float(pipeline.index.surprisal[span].sum())
    added = bound.added_counts(planted, span, case.prompt, **settings)
    once = bound.added_counts(planted[:1], span, case.prompt, **settings)
    gain = bound.context_gain(below, bci)
    factor = bound.log_multiplier(case.copies, len(span), full.alpha, repetition=int(once.max()))
    return {
        "item": case.item,
        "seed": pipeline.seed,
        "order": full.order,
        "alpha": full.alpha,
        "copies": case.copies,
        "repetition": int(once.max()),
        "bci": bci,
        "gain": gain,
        "factor": factor,
        "truth": full.span_log_prob(span, case.prompt),
        "t1": below + bound.gram_log_multiplier(added, full.alpha),
        "f": factor + gain - PAPER_TAU,
    }


def form_table(frame: pd.DataFrame, pipeline: Pipeline) -> pd.DataFrame:
    """Medians of `form_frame` by order and alpha, and how well each model predicts held-out stories."""
    names = {"repetition": "r", "factor": "growth", "gain": "gamma", "f": "log f", "t1": "log T1"}
    names |= {"truth": "log truth"}
    table = frame.groupby(["order", "alpha"])[list(names)].median().rename(columns=names)
    table["f below 1"] = frame.assign(says=frame["f"] < 0).groupby(["order", "alpha"])["says"].mean()
    table["held-out"] = [_held_out_surprisal(pipeline, order, alpha) for order, alpha in table.index]
    return table.reset_index()


def _held_out_surprisal(pipeline: Pipeline, order: int, alpha: float) -> float:
    """Mean surprisal of the tokens of held-out documents, in nats."""
    model = NGramModel(_encoded(pipeline), vocab_size=len(pipeline.tokenizer), order=order, alpha=alpha)
    texts = [
        pipeline.tokenizer(d.text, add_special_tokens=False)["input_ids"] for d in pipeline.world.held_out
    ]
    scores = [model.token_log_probs([ids]).ravel() for ids in texts]
    return -float(np.concatenate(scores).mean())


def _encoded(pipeline: Pipeline) -> list[list[int]]:
    texts = [document.text for document in pipeline.corpus]
    return list(pipeline.tokenizer(texts, add_special_tokens=False)["input_ids"])


def headlines(pipelines: Sequence[Pipeline]) -> Headlines:
    """The numbers of T0, and those of f at the orders and pseudo-counts of `form_frame`."""
    windows = window_frame(pipelines)
    found = {p.quantity: p.measure(windows) for p in WINDOW_PREDICTIONS}
    forms = pd.concat([form_frame(pipeline) for pipeline in pipelines], ignore_index=True)
    for (order, alpha), chosen in forms.groupby(["order", "alpha"]):
        says = chosen.assign(says=chosen["f"] < 0)
        found[f"f below 1, order {order}, alpha {alpha:g}"] = rate(says, "says")
    return {quantity: value for quantity, value in found.items() if value.n}
