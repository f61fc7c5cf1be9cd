"""Tables of chapter 9 say what the headlines say that they are made from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tracealign_lib.errors import TraceAlignError
from tracealign_lib.experiments import evaluation_tables
from tracealign_lib.experiments.common import Prediction
from tracealign_lib.experiments.evaluation import DIFFERING, HOW_TO_RIGHT, TABLE
from tracealign_lib.experiments.evaluation_arms import FILTERED, NO_DEFENCE, RAW, main_systems
from tracealign_lib.experiments.evaluation_tables import (
    BASELINES,
    baseline_table,
    beside_paper,
    cuts,
    front,
    models_beside_paper,
    outcome_table,
    quote,
    sample_table,
    side_table,
    single_defences,
    split_table,
)
from tracealign_lib.results import Results, load_results
from tracealign_lib.stats import Interval


def at(estimate: float, half: float = 0.1) -> Interval:
    return Interval(estimate, estimate - half, estimate + half, 9)


def results(**values: object) -> Results:
    return Results("made", "full", (3, 4), values, {}, {})


def test_a_headline_is_quoted_by_its_parts() -> None:
    made = results(**{"a | b": at(0.5)})
    assert quote(made, "a", "b").startswith("0.50 [0.40,")
    with pytest.raises(TraceAlignError, match="do not hold this value"):
        quote(made, "a", "c")


def test_cells_stand_where_they_belong_and_unasked_rows_are_left_out() -> None:
    values = {"x | prefill | drift": at(0.3), "y | suffix | drift": at(0.4), "y | prefill | other": at(0.9)}
    table = split_table(values, ["x", "y"], ["suffix", "prefill", "combined"])
    assert table[""].tolist() == ["suffix", "prefill"]
    assert table["x"].tolist()[0] == "-"
    assert table["y"].tolist()[0].startswith("0.40")
    side = side_table({"rl, beams | x | drift": at(0.2), "sft, greedy | y | drift": at(0.7)}, ["x", "y"])
    assert side[["model", "decoding"]].values.tolist() == [
        ["SFT", "greedy"],
        ["reinforcement learning", "beams"],
    ]
    assert side["x"].tolist()[0] == "-"
    assert side["x"].tolist()[1].startswith("0.20")


# --- predictions ---------------------------------------------------------------------------------


def test_equal_rows_are_not_undecided() -> None:
    nothing = Interval(0.0, -0.02, 0.02, 9)
    predictions = [Prediction(n, n, -0.01, 0.01, lambda _: at(0.5)) for n in ("equal", "unknown", "changed")]
    made = results(
        equal=nothing,
        unknown=nothing,
        changed=nothing,
        **{f"{DIFFERING} | equal": Interval(0.0, 0.0, 0.1, 9), f"{DIFFERING} | changed": at(0.2)},
    )
    table = outcome_table(predictions, made)
    assert table["verdict"].tolist() == ["held: equal, answer by answer", "undecided", "undecided"]
    assert "this run" not in table
    assert outcome_table(predictions, made, pd.DataFrame({"x": [1]}))["this run"][0].startswith("0.50")
    assert "this run" not in outcome_table(predictions, made, pd.DataFrame())


def test_the_front_is_of_drift_and_a_cost_or_of_what_a_cost_leaves() -> None:
    values = {f"{s.name} | {m}": at(0.5) for s in main_systems() for m in ("drift", "cost")}
    best = main_systems()[4].name
    values[f"{best} | cost"] = at(0.4)
    assert front(values, "cost") == [best]
    assert best not in front(values, "cost", complement=True)


# --- samples and baselines -----------------------------------------------------------------------


def test_a_sample_is_held_against_the_whole_in_every_measure() -> None:
    names = [f"{s.name} | {m}" for s in main_systems() for m in (*TABLE, HOW_TO_RIGHT)]
    whole = results(**{name: at(0.5, 0.05) for name in names})
    furthest = main_systems()[3].name
    sample = {name: at(0.6 if name == f"{furthest} | drift" else 0.51, 0.2) for name in names}
    table = sample_table(whole, sample).set_index("measure")
    assert table.index.tolist() == [*TABLE, HOW_TO_RIGHT]
    assert table.loc["drift", ["largest gap", "for"]].tolist() == ["0.100", furthest]
    assert table.loc["over-refusal", "largest gap"] == "0.010"
    assert table.loc["drift", ["width, sample", "width, whole"]].tolist() == ["0.400", "0.100"]


def test_every_baseline_is_read_from_the_file_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        b.file: {o.headline: at(0.1 * n) for n, o in enumerate(BASELINES) if o.file == b.file}
        for b in BASELINES
    }
    monkeypatch.setattr(evaluation_tables, "load_results", lambda name: results(**files[name]))
    table = baseline_table()
    assert table["where"].tolist() == [baseline.where for baseline in BASELINES]
    assert [text[:4] for text in table["drift without a defence"]] == [
        f"{0.1 * n:.2f}" for n in range(len(BASELINES))
    ]
    assert set(table["seeds of worlds"]) == {"3, 4"}


def test_every_baseline_is_published() -> None:
    root = Path(__file__).parents[1] / "data" / "results"
    for baseline in BASELINES:
        found = load_results(baseline.file, path=root)[baseline.headline]
        assert isinstance(found, Interval)


# --- the paper -----------------------------------------------------------------------------------


def test_the_paper_stands_beside_the_configuration_that_is_named() -> None:
    shares = {"shield": 0.1, "training": 0.2, "decoding": 0.3, "shield + training + decoding": 0.4}
    values = {f"{NO_DEFENCE} | drift": at(0.9)}
    values |= {f"{RAW}: {name} | drift": at(share) for name, share in shares.items()}
    values |= {f"{FILTERED}: {n} | drift": at(s + 0.5) for n, s in shares.items() if n != "training"}
    found = {
        scorers: beside_paper(values, scorers).set_index("defence")["drift, here"].str[:4].to_dict()
        for scorers in (RAW, FILTERED)
    }
    assert found[RAW] == {NO_DEFENCE: "0.90", **{n: f"{s:.2f}" for n, s in shares.items()}}
    assert found[FILTERED] == {
        NO_DEFENCE: "0.90",
        **{n: f"{s + 0.5 * (n != 'training'):.2f}" for n, s in shares.items()},
    }
    table = beside_paper(values, RAW).set_index("defence")
    assert table.loc["shield", "drift, reported"] == "14.6%"
    assert table.loc["shield", "false refusals, here"] == "-"
    trained = models_beside_paper({f"dpo, greedy | {RAW}: training | refused under attack": at(0.2)})
    assert trained.set_index("training").loc["DPO with the CBD loss", "refused, here"].startswith("0.20")
    assert trained.set_index("training").loc["DPO", "refused, reported"] == "74.9%"


def test_cuts_are_not_rounded_up_to_everything() -> None:
    made = results(**{"reduction | x": {"mean": 0.9986, "minimum": 0.9957, "maximum": 1.0, "seeds": 3}})
    assert cuts(made, ["x"]) == "**x** cuts it by 99.9% (99.6% to 100.0% over 3 worlds)"


def test_single_defences_are_listed_with_what_they_are_made_of() -> None:
    table = single_defences(main_systems()).set_index("system")
    assert not table.index.str.contains(" \\+ ").any()
    assert table.loc["raw, M(q) <= 3: decoding", "guard"] == "filtered veto"
    assert table.loc["raw: shield", "model + training"] == "dpo + none"
