"""What chapter 9 shows of its measures: beside the paper, by attack and by model, and against each other.

All of it is made from headlines, the ones of this run (`evaluation.headlines`) or published ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from tracealign_lib.evaluate import METHODS
from tracealign_lib.experiments.common import Prediction, short
from tracealign_lib.experiments.evaluation import DIFFERING, HOW_TO_RIGHT, TABLE, cell
from tracealign_lib.experiments.evaluation_arms import (
    ALL_THREE,
    KINDS,
    NO_DEFENCE,
    RAW,
    System,
    main_systems,
)
from tracealign_lib.experiments.evaluation_figures import pareto_front
from tracealign_lib.experiments.evaluation_models import DPO, MODELS, RL
from tracealign_lib.results import Results, load_results
from tracealign_lib.stats import Interval


def quote(results: Results, *parts: str) -> str:
    """A published headline, given by its parts, as it stands in a sentence: `0.95 [0.93, 0.97]`.

    Raises
    ------
    ResultsError
        The file does not hold it.
    """
    return short(results[" | ".join(parts)])


# --- cells of the main table ---------------------------------------------------------------------


def split_table(
    values: Mapping[str, Any], names: Sequence[str], rows: Sequence[str], measure: str = "drift"
) -> pd.DataFrame:
    """A measure by attack, domain or group: a row for each of `rows`, a column for each system.

    Rows that no system was asked about are left out.
    """
    cells = [(row, *(cell(values, f"{name} | {row} | {measure}") for name in names)) for row in rows]
    asked = [line for line in cells if set(line[1:]) != {"-"}]
    return pd.DataFrame(asked, columns=["", *names])


def side_table(values: Mapping[str, Any], names: Sequence[str], measure: str = "drift") -> pd.DataFrame:
    """A measure for each model and way to decode: a row for each pair, a column for each system.

    "-" where a system is not defined or was not asked; pairs that were not asked at all are left out.
    """
    rows = []
    for model, title in MODELS.items():
        for decoding in METHODS:
            shown = [cell(values, f"{model}, {decoding} | {name} | {measure}") for name in names]
            if set(shown) != {"-"}:
                rows.append((title, decoding, *shown))
    return pd.DataFrame(rows, columns=["model", "decoding", *names])


def outcome_table(
    predictions: Sequence[Prediction], published: Results, here: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Predictions, what was published of them and the verdicts; with a frame of rows, what this run measured.

    Two systems that never answered differently are "equal", whatever an interval would leave open.
    """
    rows = []
    for prediction in predictions:
        measured = published[prediction.quantity]
        row = {
            "prediction": prediction.claim,
            "quantity": prediction.quantity,
            "holds between": f"{prediction.low:g} and {prediction.high:g}",
        }
        if here is not None and len(here):
            row["this run"] = short(prediction.measure(here))
        changed = published.values.get(f"{DIFFERING} | {prediction.quantity}")
        equal = changed is not None and changed.estimate == 0
        verdict = "held: equal, answer by answer" if equal else prediction.verdict(measured)
        rows.append({**row, "published": short(measured), "verdict": verdict})
    return pd.DataFrame(rows)


def front(values: Mapping[str, Any], cost: str, *, complement: bool = False) -> list[str]:
    """The systems that no other beats in drift and in a cost: a measure, or 1 minus it."""
    points = {}
    for system in main_systems():
        price = values[f"{system.name} | {cost}"].estimate
        points[system.name] = (1 - price if complement else price, values[f"{system.name} | drift"].estimate)
    return pareto_front(points)


# --- is a sample enough, and where do baselines come from ----------------------------------------


def sample_table(whole: Results, sample: Mapping[str, Any]) -> pd.DataFrame:
    """The whole benchmark against a sample of it, on one world and every measure.

    Returns
    -------
    DataFrame
        measure; the system for which the two differ most, and by how much; and how wide the interval of no
        defence is in the sample and in the whole.
    """
    rows = []
    for measure in (*TABLE, HOW_TO_RIGHT):
        gaps = {
            system.name: abs(whole[name].estimate - sample[name].estimate)
            for system in main_systems()
            for name in [f"{system.name} | {measure}"]
        }
        furthest = max(gaps, key=gaps.__getitem__)
        widths = [f"{_width(part[f'{NO_DEFENCE} | {measure}']):.3f}" for part in (sample, whole)]
        rows.append((measure, f"{gaps[furthest]:.3f}", furthest, *widths))
    columns = ["measure", "largest gap", "for", "width, sample", "width, whole"]
    return pd.DataFrame(rows, columns=columns)


def _width(interval: Interval) -> float:
    return interval.high - interval.low


class Baseline(NamedTuple):
    """A published rate of drift without any defence: of which prompts, and where it stands."""

    where: str
    prompts: str
    file: str
    headline: str


BASELINES = (
    Baseline("the main table", "800 records of the benchmark, every item", "adb", f"{NO_DEFENCE} | drift"),
    Baseline(
        "other models and ways to decode",
        "130 of these",
        "adb",
        f"{DPO}, greedy | {NO_DEFENCE} | drift",
    ),
    Baseline(
        "chapter 2", "its own wordings, every item, each attack weighing the same", "model", "mean drift"
    ),
    Baseline("the whole benchmark", "all of it, one world", "adb-whole", f"{NO_DEFENCE} | drift"),
    Baseline(
        "chapter 6",
        "wordings of chapter 2, items of the judged half",
        "shield",
        "after | no filter | drift left",
    ),
    Baseline(
        "chapter 8",
        "one wording of chapter 2 for each attack, items of the judged half",
        "prov-decode",
        "drift | no guard",
    ),
    Baseline(
        "section 9",
        "four of these attacks, items of the judged half",
        "coverage",
        "drift under Prov-Decode | nothing indexed",
    ),
)
"""Where the book says how much drifts without a defence, of the DPO model decoding greedily."""


def baseline_table() -> pd.DataFrame:
    """`BASELINES` as published, with their numbers of prompts and the seeds of their worlds.

    Raises
    ------
    ResultsError
        One of the files, or its headline, is missing.
    """
    rows = []
    for where, prompts, file, headline in BASELINES:
        results = load_results(file)
        seeds = ", ".join(map(str, results.seeds))
        rows.append((where, prompts, seeds, str(results[headline])))
    return pd.DataFrame(rows, columns=["where", "attacks", "seeds of worlds", "drift without a defence"])


# --- the paper's tables --------------------------------------------------------------------------

REPORTED = {
    NO_DEFENCE: (0.418, 3.2, None),
    "shield": (0.146, 4.3, 0.021),
    "training": (0.161, 4.1, 0.017),
    "decoding": (0.124, 4.4, 0.019),
    ALL_THREE: (0.062, 4.7, 0.027),
}
"""Drift, refusal quality and false positive rate of OLMo-2 as readers report them of arXiv 2508.02063."""
REPORTED_MODELS = {RL: (0.365, 0.812, 0.587), DPO: (0.418, 0.749, 0.652), "dpo, cbd": (0.161, 0.921, 0.261)}
"""Drift, refusal and attack success of RLHF, DPO, and DPO with the CBD loss, as readers report them."""


def beside_paper(values: Mapping[str, Any], scorers: str) -> pd.DataFrame:
    """The paper's table of defences, and ours.

    Parameters
    ----------
    values:
        Headlines, or published ones.
    scorers:
        "raw" or "raw, M(q) <= 3". Training knows no filter of spans, so both have the same row for it.
    """
    rows = []
    for defence, (drift, quality, positives) in REPORTED.items():
        system = _named(defence, scorers)
        ours = [cell(values, f"{system} | {m}") for m in ("drift", "refusal quality", "over-refusal")]
        theirs = [f"{drift:.1%}", f"{quality:.1f}", "-" if positives is None else f"{positives:.1%}"]
        rows.append((defence, *_alternating(theirs, ours)))
    names = ("drift", "refusal quality", "false refusals")
    return pd.DataFrame(
        rows, columns=["defence", *_alternating(*[[f"{n}, {who}" for n in names] for who in _WHO])]
    )


def _named(defence: str, scorers: str) -> str:
    if defence == NO_DEFENCE:
        return NO_DEFENCE
    return f"{RAW if defence == KINDS[1] else scorers}: {defence}"


_WHO = ("reported", "here")


def _alternating(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    return [value for pair in zip(first, second, strict=True) for value in pair]


def models_beside_paper(values: Mapping[str, Any]) -> pd.DataFrame:
    """The paper's table of trainings, and ours on the side sample; `values` as for `beside_paper`."""
    systems_of = {RL: (RL, NO_DEFENCE), DPO: (DPO, NO_DEFENCE), "dpo, cbd": (DPO, f"{RAW}: training")}
    labels = {RL: "RLHF (here: RLOO with the judge)", DPO: "DPO", "dpo, cbd": "DPO with the CBD loss"}
    rows = []
    for name, reported in REPORTED_MODELS.items():
        model, system = systems_of[name]
        ours = [cell(values, f"{model}, greedy | {system} | {m}") for m in _MODEL_MEASURES]
        rows.append((labels[name], *_alternating([f"{value:.1%}" for value in reported], ours)))
    names = ("drift", "refused", "attack success")
    columns = _alternating(*[[f"{n}, {who}" for n in names] for who in _WHO])
    return pd.DataFrame(rows, columns=["training", *columns])


_MODEL_MEASURES = ("drift", "refused under attack", "attack success")


def cuts(published: Results, names: Sequence[str]) -> str:
    """By how much systems cut drift, in words: mean and range over worlds, to a tenth of a per cent."""
    said = []
    for name in names:
        cut = published[f"reduction | {name}"]
        least, most = (f"{cut[end]:.1%}" for end in ("minimum", "maximum"))
        said.append(f"**{name}** cuts it by {cut['mean']:.1%} ({least} to {most} over {cut['seeds']} worlds)")
    return "; ".join(said)


def single_defences(systems: Iterable[System]) -> pd.DataFrame:
    """What the single defences and the rivals are made of: model and training, guard, filter."""
    rows = [
        (s.name, " + ".join(s.arm[:2]), s.arm.guard, s.filter) for s in systems if " + " not in s.defences
    ]
    return pd.DataFrame(rows, columns=["system", "model + training", "guard", "filter"])
