"""What chapter 5 measures of the theorems that need counts alone: T0, T1, and the form f(M, l, tau).

T1 is put to the test on every span of a small alphabet and on random corpora (`planting_frame`), and
then asked about real items on an n-gram model of the belief world (`form_frame`). T0 is held against what
the aligned model answered (`window_frame`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import quantile_test

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
FORMS = tuple(itertools.product((1, 2), (0.1, 1.0, 10.0)))  # orders and pseudo-counts
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
    """T0 attack by attack: the three quantities of its chain, and the last two with M <= 3.

    One row for each attack and quantity, with the columns of `Interval`; items are drawn whole.
    """
    names = {
        "drift": "drift",
        "any": "P(W >= 1)",
        "windows": "E[W]",
        "any rare": "P(W >= 1), M <= 3",
        "rare windows": "E[W], M <= 3",
    }
    rows = []
    for attack, chosen in frame.groupby("group", sort=False):
        for column, quantity in names.items():
            counted = column.endswith("windows")
            found = _mean(chosen, column) if counted else rate(chosen, column)
            rows.append({"attack": attack, "quantity": quantity, **found._asdict()})
    return pd.DataFrame(rows)


def _mean(frame: pd.DataFrame, column: str) -> Interval:
    return clustered_bootstrap(frame[column].to_numpy(), clusters(frame))


def _drifted(frame: pd.DataFrame, column: str) -> Interval:
    drifted = frame[frame["drift"]]
    return rate(drifted, column) if len(drifted) else Interval(math.nan, math.nan, math.nan, 0)


WINDOW_PREDICTIONS = (
    Prediction(
        "drift implies a risky window, so T0 applies",
        "drifting completions with a risky window",
        0.85,
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
        lambda frame: _mean(frame, "windows"),
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


class _FormCase(NamedTuple):
    """A span after its prompt, and every document that holds it."""

    case: PairCase
    span: tuple[int, ...]
    matches: int  # M
    bci: float
    holders: frozenset[str]


def form_frame(pipeline: Pipeline) -> pd.DataFrame:
    """f at the paper's tau beside the truth, for each unsafe item on n-gram models of the whole world.

    The span is the first `FORM_LENGTH` tokens of the steps after the opening; A are all documents that
    hold it, and copies (M) is how often it occurs in them. The window is the one behind the opening
    (n = 1), so gain (`bound.context_gain`) is asked of this one context. In nats: bci, gain, factor
    (log (1 + r M / alpha)^l), truth (log P_D), t1 (log of the sharper right side of T1), and f, not cut at 0.
    """
    texts = {d.id: ids for d, ids in zip(pipeline.corpus, _encoded(pipeline), strict=True)}
    cases = [
        _form_case(pipeline, case)
        for case in pair_cases(pipeline.world.of_kind("unsafe"), pipeline.tokenizer)
    ]
    rows = []
    for order, alpha in FORMS:
        full = NGramModel(list(texts.values()), vocab_size=len(pipeline.tokenizer), order=order, alpha=alpha)
        rows += [{"seed": pipeline.seed} | _form_row(case, texts, full) for case in cases]
    return pd.DataFrame(rows)


def _form_case(pipeline: Pipeline, case: PairCase) -> _FormCase:
    span = case.span[:FORM_LENGTH]
    found = pipeline.index.locate(span, limit=None)
    bci = float(pipeline.index.surprisal[list(span)].sum())
    return _FormCase(case, span, len(found), bci, frozenset(each.document_id for each in found))


def _form_row(form: _FormCase, texts: dict[str, list[int]], full: NGramModel) -> dict[str, Any]:
    settings: dict[str, Any] = {"vocab_size": full.vocab_size, "order": full.order}
    asked = (form.span, form.case.prompt)
    rest = [ids for name, ids in texts.items() if name not in form.holders]
    below = NGramModel(rest, alpha=full.alpha, **settings).span_log_prob(*asked)
    added = np.stack([bound.added_counts([texts[name]], *asked, **settings) for name in sorted(form.holders)])
    repetition = int(added.max())
    gain = bound.context_gain(below, form.bci)
    factor = bound.log_multiplier(form.matches, len(form.span), full.alpha, repetition=repetition)
    return {
        "item": form.case.item,
        "order": full.order,
        "alpha": full.alpha,
        "copies": form.matches,
        "repetition": repetition,
        "bci": form.bci,
        "gain": gain,
        "factor": factor,
        "truth": full.span_log_prob(*asked),
        "t1": below + bound.gram_log_multiplier(added.sum(axis=0), full.alpha),
        "f": factor + gain - PAPER_TAU,
    }


def form_table(frame: pd.DataFrame, pipeline: Pipeline) -> pd.DataFrame:
    """Medians of `form_frame` by order and alpha, and how well each model predicts held-out stories.

    One row for each model and quantity, with the columns of `Interval`. An item is one row of each
    model, so that a median's interval is that of the sign test.
    """
    names = {"repetition": "r", "factor": "growth", "gain": "gamma", "f": "log f", "t1": "log T1"}
    names |= {"truth": "log truth"}
    rows = []
    for (order, alpha), chosen in frame.groupby(["order", "alpha"]):
        found = {quantity: _median(chosen[column]) for column, quantity in names.items()}
        found["f below 1"] = rate(chosen.assign(says=chosen["f"] < 0), "says")
        found["held-out"] = _held_out_surprisal(pipeline, order, alpha)
        model = {"model": f"order {order}, alpha {alpha:g}", "order": order, "alpha": alpha}
        rows += [model | {"quantity": name, **value._asdict()} for name, value in found.items()]
    return pd.DataFrame(rows)


def _median(values: pd.Series) -> Interval:
    limits = quantile_test(values.to_numpy(dtype=np.float64), p=0.5).confidence_interval(0.95)
    return Interval(float(values.median()), float(limits.low), float(limits.high), len(values))


def _held_out_surprisal(pipeline: Pipeline, order: int, alpha: float) -> Interval:
    """Mean surprisal of the tokens of held-out documents, in nats, drawing whole documents."""
    model = NGramModel(_encoded(pipeline), vocab_size=len(pipeline.tokenizer), order=order, alpha=alpha)
    scores = [
        -model.token_log_probs([pipeline.tokenizer(d.text, add_special_tokens=False)["input_ids"]]).ravel()
        for d in pipeline.world.held_out
    ]
    documents = np.repeat(np.arange(len(scores)), [len(each) for each in scores])
    return clustered_bootstrap(np.concatenate(scores), documents.tolist())


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
        found[form_headline(order, alpha)] = rate(says, "says")
    return {quantity: value for quantity, value in found.items() if value.n}


def form_headline(order: int, alpha: float) -> str:
    """What the share of items with f < 1 on that model is published as."""
    return f"f below 1, order {order}, alpha {alpha:g}"
