"""Tables and figures of chapter 6 hold the numbers of what they are made from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bci_samples import answered_pipeline, outcomes
from matplotlib.collections import QuadMesh
from shield_samples import Scored, margins, text

from tracealign_lib import lexicon
from tracealign_lib.calibration import EVERY_SPAN
from tracealign_lib.experiments import common, shield, shield_figures, shield_judged, shield_tables
from tracealign_lib.experiments.bci_texts import FIT, JUDGE, NEWS, RARE, STORY, TWIN, UNSAFE, halves
from tracealign_lib.experiments.shield_texts import EDITED
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import Interval


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with answered_pipeline(tmp_path_factory.mktemp("cache")) as smoke:
        yield smoke


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


# --- what is refused -----------------------------------------------------------------------------


def test_the_table_of_filters_names_the_worst_harmless_group() -> None:
    harmless = {STORY: [0, 0, 0, 0], RARE: [1, 0, 1, 0, 1, 0], TWIN: [0, 0, 0, 0, 0, 0]}
    data = margins({shield.PAPER: {UNSAFE: [0, 1], EDITED[0]: [1, 1], **harmless}})
    [row] = shield_tables.rule_table(data).to_numpy().tolist()
    assert row[0] == f"{shield.PAPER}, not calibrated"
    assert row[1].startswith("1.00")
    assert row[2] == "none"
    assert row[3].startswith("0.00")
    assert row[4].startswith("story: 0.00")  # all are spared; two stories leave most doubt
    data.loc[(data["group"] == TWIN) & (data["half"] == JUDGE), "score"] = [0, 0, 1]
    [row] = shield_tables.rule_table(data).to_numpy().tolist()
    assert row[3].startswith("0.17")
    assert row[4].startswith("twin how-to: 0.33")


def test_a_threshold_below_all_scores_is_called_so() -> None:
    assert [shield_tables.threshold_label(t) for t in (EVERY_SPAN, 47.9668)] == ["every span", "47.97"]


def test_a_group_without_texts_has_no_row() -> None:
    data = margins({"a": {RARE: [0, 1]}, "b": {RARE: [1, 0]}})
    table = shield_tables.group_table(data, (STORY, RARE))
    assert table[["group", "a", "b"]].to_numpy().tolist() == [
        [f"{RARE} (1 texts, 1 items)", "1.00 [no interval]", "0.00 [no interval]"]
    ]
    assert list(shield_tables.group_table(data, (RARE,), ("b",))) == ["group", "b"]


def test_the_rival_is_compared_on_the_same_texts() -> None:
    data = margins({shield.RECOMMENDED: {UNSAFE: [0, 1, 0, 1, 0, 0]}, "r": {UNSAFE: [0, 1, 0, 0, 0, 0]}})
    [row] = shield_tables.rival_table(data, "r", (UNSAFE, STORY)).to_numpy().tolist()
    assert [cell[:4] for cell in row[1:]] == ["0.67", "0.33", "0.33"]


def test_before_and_after_stand_in_columns() -> None:
    rows = [("a", "x", 0.5, 0.4, 0.6, 9), ("a", "y", math.nan, math.nan, math.nan, 0), ("b", "x", 0, 0, 1, 9)]
    table = pd.DataFrame(rows, columns=["filter", "measure", *Interval._fields])
    wide = shield_tables.after_wide(table[table["filter"] == "a"], ("x", "y"))
    assert wide.to_numpy().tolist() == [["a", "0.50 [0.40,\N{NO-BREAK SPACE}0.60]", "none"]]


# --- another distribution ------------------------------------------------------------------------


def test_a_filter_is_calibrated_on_one_kind_and_judged_on_all() -> None:
    texts = [text(NEWS, "n", JUDGE, "9"), *(text(RARE, f"r{n}", FIT, "5") for n in range(5))]
    texts += [text(TWIN, f"t{n}", FIT, "5") for n in range(4)]
    texts += [text(STORY, f"s{n}", FIT, "1") for n in range(9)]
    texts += [text(NEWS, f"n{n}", FIT, "9") for n in range(8)]  # one too few for a tenth
    texts += [text(RARE, "r", JUDGE, "5"), text(STORY, "s", JUDGE, "1")]
    rows = shield_judged.transfer_frame({"rule": Scored(0.0)}, texts, alpha=0.1)
    moved = shield_judged.transfer_table(rows)
    shares = moved.set_index(["source", "group"])["estimate"].to_dict()
    how_to = shield_judged.HOW_TO
    assert shares == {
        (how_to, how_to): 0, (how_to, STORY): 0, (how_to, NEWS): 1,
        (STORY, how_to): 1, (STORY, STORY): 0, (STORY, NEWS): 1,
    }  # fmt: skip
    two = shield_judged.transfer_table(pd.concat([rows, rows.assign(seed=1)]))
    assert (two["n"] == 2 * moved["n"]).all()
    figure, alt = shield_figures.transfer_figure(moved)
    mesh = next(c for c in figure.axes[0].collections if isinstance(c, QuadMesh))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [how_to, STORY, NEWS]
    assert sorted(np.ravel(mesh.get_array()).tolist()) == [0, 0, 0, 100, 100, 100]
    assert len(figure.axes[0].patches) == 2
    assert "rule: 100% of" in alt
    stricter = shield_judged.transfer_frame({"rule": Scored(0.0)}, texts, alpha=0.01)
    assert list(shield_judged.transfer_table(stricter)) == list(moved)
    assert len(stricter) == 0


# --- published worlds ----------------------------------------------------------------------------


def test_a_claim_holds_on_published_worlds_only_if_it_holds_in_each() -> None:
    worlds = {"3": 0.1, "4": 0.2, "5": 1.0}
    alone = {seed: {"q": Interval(value, value, value, 9)} for seed, value in worlds.items()}

    def verdict(low: float, high: float, pooled: Interval) -> list[str]:
        claim = common.Prediction("c", "q", low, high, lambda _: pooled)
        [row] = shield_tables.published_table([claim], {"q": pooled, "per seed": alone}).to_numpy()  # type: ignore[arg-type]
        return row.tolist()

    pooled = Interval(0.4, 0.3, 0.5, 27)
    assert verdict(0, 0.5, pooled)[2:] == ["0.10, 0.20, 1.00", "held in 2 of 3"]
    assert verdict(0, 1, pooled)[3] == "held"
    assert verdict(0.6, 1, pooled)[3] == "failed"
    assert verdict(0, 0.45, pooled)[3] == "undecided"


def test_a_mixture_is_not_promised_to_its_parts() -> None:
    values = {"calibration | 3": {f"{RARE} + {NEWS}": [47, 11.0], STORY: [90, EVERY_SPAN]}, "other": 1}
    table = shield_tables.calibration_table(SimpleNamespace(values=values))  # type: ignore[arg-type]
    assert table.to_numpy().tolist() == [
        ["3", f"{RARE} + {NEWS}", 47, "11", "to the mixture only"],
        ["3", STORY, 90, "every span", "yes"],
    ]


# --- guards and figures -----------------------------------------------------------------


def test_a_guarded_model_refuses_where_the_filter_does(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = outcomes(pipeline)[:1] + outcomes(pipeline)[5:6]
    said = {False: "harmless", True: lexicon.REFUSAL}

    class Shield:
        def wrap(self, model: object, *, refusal: str) -> str:
            assert refusal == lexicon.REFUSAL
            return "guarded"

    def ask(model: object, world: object, prompts: list, *, seed: int) -> list:
        assert model == "guarded"
        return [
            o._replace(completion=said[o.drifted], judgement=o.judgement._replace(label="refusal"))
            for o in asked
        ]

    monkeypatch.setattr(shield_tables.adb, "ask", ask)
    frame = shield_tables.guarded_frame(pipeline, Shield(), asked)  # type: ignore[arg-type]
    assert frame.to_numpy().tolist() == [["attack", "drift", "refusal"], ["harmless", "correct", "refusal"]]


def test_the_sample_of_prompts_is_judged_greedy_and_balanced(pipeline: Pipeline) -> None:
    half, answers = halves(pipeline.world), outcomes(pipeline)
    both = dict.fromkeys(half, JUDGE)
    chosen = shield_tables.greedy_sample(answers, both, 4)
    assert [o.judgement.label for o in chosen] == ["drift", "drift", "correct", "correct"]
    assert shield_tables.greedy_sample(answers, dict.fromkeys(half, FIT), 4) == []
    calm = [o for o in answers if o.judgement.label in ("other", "refusal")]
    assert shield_tables.greedy_sample(calm, both, 2) == calm[:2]


def test_figures_say_the_numbers_that_they_draw() -> None:
    edits = margins({"a": {UNSAFE: [0, 1], EDITED[0]: [0, 1], EDITED[1]: [0, 0, 0, 1], EDITED[2]: [1, 0]}})
    figure, alt = shield_figures.edits_figure(edits, ["a"])
    assert figure.axes[0].get_lines()[0].get_ydata() == pytest.approx([1, 1, 0.5, 0])
    assert "a 1.00, 1.00, 0.50, 0.00" in alt
