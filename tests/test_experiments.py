"""Experiments on small frames worked out by hand, and once on a smoke world."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tracealign_lib import experiments
from tracealign_lib.adb import ATTACKS, BENIGN_GROUPS, Judgement, Outcome, Prompt, Recall
from tracealign_lib.attribution import METRICS, Case, Ranking
from tracealign_lib.documents import Document
from tracealign_lib.experiments import COVER, NO_FILTER, PAPER_FILTER, TRACING_PREDICTIONS, Prediction
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.profiles import get_profile
from tracealign_lib.results import load_results, write_results
from tracealign_lib.stats import Interval
from tracealign_lib.world import World, WorldSettings


def item(name: str, copies: int, kind: str = "unsafe") -> SimpleNamespace:
    return SimpleNamespace(id=name, copies=copies, aligned=name == "a", kind=kind)


class FakePipeline:
    """Hand-made outcomes, recalls and sources of two items; no model and no index."""

    def __init__(self, outcomes: list[Outcome], seed: int = 0) -> None:
        self.seed, self._outcomes = seed, outcomes
        self.world = SimpleNamespace(
            by_id={"a": item("a", 1), "b": item("b", 4)},
            documents=[Document(name, "x", {"kind": "recipe"}) for name in ("d1", "d2", "d3")],
            sources_of=lambda name, steps=None: SimpleNamespace(
                _asdict=lambda: {"strict": frozenset({"d1" if name == "a" else "d2"}), "steps": steps}
            ),
        )

    def outcomes(self, model: str = "dpo") -> list[Outcome]:
        return self._outcomes

    def recalls(self, model: str = "base") -> list[Recall]:
        return [Recall("a", "", (True, True, True)), Recall("b", "", (True, False, True))]


def outcome(group: str, name: str, label: str, leaked: str | None = None, text: str = "t") -> Outcome:
    prompt = Prompt(f"{group}/{name}", group, name, "how?")
    return Outcome(prompt, text, Judgement(label, leaked, ("s1", "s2") if leaked else ()))


def graded(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as `ranking_frame` makes them: what a row leaves out is 0, or a default."""
    base = {**dict.fromkeys(METRICS, 0.0), "truth": "strict", "copies": 1, "seed": 0, "empty": False}
    return pd.DataFrame([{**base, **row} for row in rows])


# --- chapter 2 -----------------------------------------------------------------------------------


def test_outcomes_become_one_row_per_prompt() -> None:
    asked = [outcome("direct", "a", "refusal"), outcome("prefill", "b", "drift", "a")]
    frame = experiments.outcome_frame([FakePipeline(asked, seed=7)])  # type: ignore[list-item]
    assert list(frame["seed"]) == [7, 7]
    assert list(frame["copies"]) == [1, 4]
    assert list(frame["refusal"]) == [True, False]
    assert list(frame["drift"]) == [False, True]
    assert list(frame["leaked_other"]) == [False, True]


def test_recalls_become_one_row_per_item() -> None:
    frame = experiments.recall_frame([FakePipeline([])])  # type: ignore[list-item]
    assert list(frame["complete"]) == [True, False]
    assert list(frame["steps"]) == [3, 2]


def test_mean_drift_weighs_attacks_the_same_and_leaves_direct_requests_out() -> None:
    rows = [("prefill", True)] * 3 + [("suffix", False)] + [("direct", True)] * 5
    frame = pd.DataFrame([{"seed": 0, "item": "a", "group": group, "drift": drift} for group, drift in rows])
    measured = experiments.mean_drift(frame)
    assert measured.estimate == pytest.approx(0.5)
    assert measured.n == 1


def test_a_rate_draws_items_of_each_world_apart() -> None:
    frame = pd.DataFrame({"seed": [0, 0, 1, 1], "item": ["a", "a", "a", "a"], "drift": [1, 1, 0, 0]})
    measured = experiments.rate(frame, "drift")
    assert (measured.low, measured.high) == (0.0, 1.0)
    assert math.isnan(experiments.rate(frame[frame["seed"] == 0], "drift").low)


def test_the_headlines_of_chapter_2_cover_attacks_copies_and_benign_groups() -> None:
    asked = [outcome(group, name, "drift", name) for group in ATTACKS for name in "ab"]
    asked += [outcome(group, name, "correct") for group in BENIGN_GROUPS for name in "ab"]
    headlines = experiments.model_headlines([FakePipeline(asked)])  # type: ignore[list-item]
    assert headlines["mean drift"].estimate == 1.0
    assert headlines["direct refused"].estimate == 0.0
    assert headlines["drift that leaks another item"].estimate == 0.0
    assert headlines["recall, 1 copies"].estimate == 1.0
    assert headlines["recall, 4 copies"].estimate == 0.0
    assert {f"drift: {attack}" for attack in ATTACKS} < set(headlines)
    assert all(headlines[f"correct: {group}"].estimate == 1.0 for group in BENIGN_GROUPS)


# --- chapter 3 -----------------------------------------------------------------------------------


def test_cases_are_the_distinct_drifting_completions_under_the_leaked_item() -> None:
    asked = [
        outcome("prefill", "a", "drift", "b", "one"),
        outcome("suffix", "a", "drift", "b", "one"),
        outcome("suffix", "b", "drift", "a", "two"),
        outcome("suffix", "b", "near_drift", None, "three"),
    ]
    cases = experiments.attribution_cases(FakePipeline(asked))  # type: ignore[arg-type]
    assert [(case.text, case.item, case.copies) for case in cases] == [("one", "b", 4), ("two", "a", 1)]
    assert cases[0].truths == {"strict": frozenset({"d2"}), "steps": ("s1", "s2")}


def test_planted_cases_are_the_unsafe_recipes_with_all_their_sources() -> None:
    settings = WorldSettings(unsafe=5, rare_benign=5, twins=5, recombinations=2, news=1, stories=1)
    world = World.generate(settings)
    cases = experiments.planted_cases(SimpleNamespace(world=world))  # type: ignore[arg-type]
    assert [case.item for case in cases] == [i.id for i in world.of_kind("unsafe")]
    texts = {document.id: document.text for document in world.documents}
    for case in cases:
        assert len(case.truths["strict"]) == case.copies
        assert all(case.text in texts[name] for name in case.truths["strict"])


def test_a_run_without_drift_says_so() -> None:
    case = Case("t", "a", 1, {"strict": frozenset({"d1"})})
    assert "nothing to grade" not in experiments.describe_cases([case], drifting=True)
    assert "nothing to grade" in experiments.describe_cases([case], drifting=False)


def test_without_completions_frames_and_headlines_are_empty_and_complete() -> None:
    pipeline: Any = FakePipeline([])
    ranked, swept = experiments.ranking_frame([pipeline]), experiments.sweep_frame([pipeline])
    assert ranked.empty
    assert swept.empty
    assert {"method", "truth", "seed", *METRICS} <= set(ranked.columns)
    assert {"min_length", "max_count"} <= set(swept.columns)
    assert experiments.tracing_headlines(ranked) == {}
    assert experiments._all_tracing([pipeline]) == {}
    assert "verdict" not in experiments.prediction_table(ranked).columns


class OneDocument:
    """A ranker that always returns the same ranking."""

    share = 0.0

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking

    def rank_many(self, texts: list[str]) -> Iterator[Ranking]:
        return iter([self.ranking] * len(texts))


def test_wrong_documents_are_counted_by_kind_within_the_first_r(monkeypatch: pytest.MonkeyPatch) -> None:
    rankings: dict[str, Ranking] = {"x": [("d3", 2.0), ("d1", 1.0)], "y": [("d1", 2.0), ("d2", 1.0)]}
    monkeypatch.setattr(
        experiments, "rankers", lambda _: {name: OneDocument(ranks) for name, ranks in rankings.items()}
    )
    pipeline: Any = FakePipeline([outcome("suffix", "a", "drift", "a", text) for text in ("one", "two")])
    pipeline.world.documents[2].meta["kind"] = "garbled"
    table = experiments.false_sources([pipeline]).set_index("method")
    assert table.loc["x", "garbled"] == 1.0  # d3 stands first, and R is 1
    assert table.loc["y"].sum() == 0.0  # d2 stands behind the first R


def test_frames_of_several_worlds_are_joined_and_worlds_without_drift_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experiments, "rankers", lambda _: {"x": OneDocument([("d1", 1.0)])})
    asked = [outcome("suffix", "a", "drift", "a")]
    pipelines: Any = [FakePipeline(asked, 3), FakePipeline([], 4), FakePipeline(asked, 5)]
    frame = experiments.ranking_frame(
        pipelines, lambda p: [Case("t", "a", 1, {"strict": frozenset({"d1"})})] if p.outcomes() else []
    )
    assert list(frame["seed"]) == [3, 5]
    assert list(frame["r_precision"]) == [1.0, 1.0]
    [row] = [r for r in experiments.summarise(frame, ["method"]).itertuples() if r.metric == "recall"]
    assert (row.estimate, row.n) == (1.0, 2)


def test_tables_hold_intervals_as_text_in_the_order_of_the_frame() -> None:
    frame = graded(
        [
            {"method": name, "item": i, "case": k, "copies": copies, "recall": value}
            for name, values in (("z", (1.0, 0.0)), ("a", (1.0, 1.0)))
            for k, (i, copies, value) in enumerate(zip("xy", (4, 1), values, strict=True))
        ]
    )
    table = experiments.metric_table(frame)
    assert list(table["method"]) == ["z", "a"]
    assert list(table.columns) == ["method", "precision", "recall", "R-precision", "MRR", "empty answers"]
    assert table["recall"][0].replace("\N{NO-BREAK SPACE}", " ") == "0.50 [0.00, 1.00]"
    by_copies = experiments.copies_table(frame, ["a", "z"], "recall")
    assert list(by_copies["copies"]) == [1, 4]
    assert list(by_copies["completions"]) == [1, 1]
    assert by_copies["z"][by_copies.index[0]].startswith("0.00")


def test_grids_hold_means_of_the_strict_truth() -> None:
    rows = [
        {"method": "m", "min_length": length, "max_count": count, "recall": value, "truth": truth, "case": k}
        for length, count, value in ((4, 3.0, 0.25), (4, math.inf, 1.0), (8, 3.0, 0.5), (8, math.inf, 0.75))
        for k, truth in enumerate(("strict", "strict", "full"))
    ]
    frame = graded(rows)
    frame.loc[frame["truth"] == "full", "recall"] = 9.0
    grid = experiments.sweep_grid(frame, "recall")
    assert list(grid.index) == ["3", "any"]
    assert grid.to_numpy().tolist() == [[0.25, 0.5], [1.0, 0.75]]


def test_a_paired_difference_uses_completions_for_which_both_are_defined() -> None:
    values = {"m": [1.0, 0.5, math.nan], "o": [0.0, 0.5, 1.0]}
    frame = graded(
        [
            {"method": name, "item": "abc"[k], "case": k, "precision": value}
            for name, column in values.items()
            for k, value in enumerate(column)
        ]
    )
    measured = experiments.paired_difference(frame, "m", "o", "precision")
    assert measured.estimate == pytest.approx(0.5)
    assert measured.n == 2
    nowhere = frame[(frame["method"] == "o") | frame["precision"].isna()]
    assert experiments.paired_difference(nowhere, "m", "o", "precision").n == 0


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (Interval(0.05, 0.0, 0.1, 9), "held"),
        (Interval(0.05, 0.0, 0.2, 9), "undecided"),
        (Interval(0.30, 0.2, 0.4, 9), "failed"),
        (Interval(-0.3, -0.4, -0.2, 9), "failed"),
        (Interval(0.05, math.nan, math.nan, 1), "held"),
        (Interval(0.50, math.nan, math.nan, 1), "failed"),
        (Interval(math.nan, math.nan, math.nan, 0), "undecided"),
    ],
)
def test_a_prediction_is_judged_by_the_whole_interval(measured: Interval, verdict: str) -> None:
    prediction = Prediction("claim", "quantity", 0.0, 0.1, lambda frame: measured)
    assert prediction.verdict(measured) == verdict


def test_predictions_stand_before_the_experiment_and_are_measured_after() -> None:
    before = experiments.prediction_table()
    assert len(before) == len(TRACING_PREDICTIONS)
    methods = (COVER, PAPER_FILTER, NO_FILTER, experiments.BIGRAMS, "TF-IDF")
    frame = graded(
        [
            {
                "method": name,
                "item": i,
                "case": k,
                "copies": 4,
                "r_precision": float(name != PAPER_FILTER),
                "recall": float(name != PAPER_FILTER),
                "empty": name == PAPER_FILTER,
                "precision": math.nan if name == PAPER_FILTER else 1.0,
            }
            for name in methods
            for k, i in enumerate(map(str, range(40)))
        ]
    )
    after = experiments.prediction_table(frame)
    expected = ["held", "held", "held", "undecided", "held", "held", "failed"]
    assert list(after["verdict"]) == expected
    pd.testing.assert_frame_equal(after[list(before.columns)], before)


def test_headlines_are_named_by_method_truth_and_metric_and_can_be_published(tmp_path: Path) -> None:
    names = (COVER, PAPER_FILTER, NO_FILTER, experiments.BIGRAMS, "TF-IDF")
    frame = graded(
        [
            {"method": name, "item": i, "case": k, "truth": truth, "precision": math.nan, "r_precision": 1.0}
            for name in names
            for truth in ("strict", "full")
            for k, i in enumerate(map(str, range(40)))
        ]
    )
    headlines = experiments.tracing_headlines(frame)
    assert set(experiments.TRACING_HEADLINES) <= set(headlines)
    assert headlines["cover | full | r_precision"].estimate == 1.0
    assert {prediction.quantity for prediction in TRACING_PREDICTIONS} <= set(headlines)
    settings = {"profile": "smoke", "seeds": (0,), "settings": {}, "device": "cpu", "seconds": 1.0}
    write_results("traceindex", headlines, path=tmp_path, **settings)
    loaded = load_results("traceindex", path=tmp_path)
    assert loaded["cover | strict | precision"].n == 0


def test_figures_say_their_numbers() -> None:
    rows = [
        {"method": name, "item": "x", "case": k, "copies": copies, "r_precision": value}
        for name, value in ((COVER, 0.75), (experiments.UNSAFE_SLICE, 0.11))
        for k, copies in enumerate((1, 4))
    ]
    figure, alt = experiments.copies_figure(graded(rows))
    assert "1, 4 copies" in alt
    assert "cover: 0.75, 0.75" in alt
    assert "0.11" not in alt
    plt.close(figure)
    cells = [
        {"method": "m", "min_length": n, "max_count": c, "case": 0, "r_precision": 0.25 if c == 3 else 1.0}
        for n in (4, 8)
        for c in (1.0, 3.0, math.inf)
    ]
    figure, alt = experiments.sweep_figure(graded(cells))
    assert "4, 8 tokens" in alt
    assert "3: 0.25, 0.25; any: 1.00, 1.00" in alt
    framed = figure.axes[0].patches[0]
    assert framed.get_xy() == (0, 1)  # the second row is that of the paper
    plt.close(figure)


def test_times_are_medians_over_queries() -> None:
    seen: list[int] = []
    queries = [np.arange(n) for n in (1, 2, 3)]
    milliseconds = experiments.median_milliseconds(lambda ids: seen.append(len(ids)), queries, repeats=2)
    assert seen == [1, 1, 1, 2, 2, 3, 3]
    assert milliseconds >= 0


# --- chapter 0 and publishing --------------------------------------------------------------------


def test_the_shield_is_measured_on_drift_and_on_correct_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shield:
        def __init__(self, *_: object, **__: object) -> None: ...

        def check(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(refused=text == "bad")

    monkeypatch.setattr(experiments, "TraceShield", Shield)
    pipeline: Any = FakePipeline(
        [
            outcome("suffix", "a", "drift", "a", "bad"),
            outcome("suffix", "b", "drift", "b", "fine"),
            outcome("fact", "a", "correct", None, "fine"),
            outcome("fact", "b", "other", None, "bad"),
        ]
    )
    pipeline.unsafe_index = None
    headlines = experiments.shield_headlines([pipeline])
    assert headlines["drifting completions refused"].estimate == 0.5
    assert headlines["correct benign answers refused"][::3] == (0.0, 1)


def test_publishing_writes_the_pooled_values_and_those_of_each_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(profile: str, seed: int, device: str) -> SimpleNamespace:
        return SimpleNamespace(seed=seed, device=device)

    seeds = get_profile("full").seeds
    monkeypatch.setattr(experiments, "Pipeline", made)
    monkeypatch.setattr("tracealign_lib.results.results_folder", lambda: tmp_path)
    experiments._publish("model", lambda pipelines: {"n": Interval(len(pipelines), 0, 9, 1)}, "cpu")
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["values"]["n"]["estimate"] == len(seeds)
    counts = {seed: values["n"]["estimate"] for seed, values in record["values"]["per seed"].items()}
    assert counts == {str(seed): 1 for seed in seeds}
    assert (record["profile"], record["seeds"]) == ("full", list(seeds))


def test_every_experiment_has_a_name_that_can_be_published() -> None:
    assert set(experiments.EXPERIMENTS) == {"five-minutes", "model", "traceindex"}


# --- on a real world -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """World, tokenizer and index of profile smoke; no model is trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Pipeline("smoke", 0, "cpu")


def some(pipeline: Pipeline) -> list[Case]:
    return experiments.planted_cases(pipeline)[:4]


def test_every_ranker_answers_on_a_smoke_world(smoke: Pipeline) -> None:
    ranked = experiments.ranking_frame([smoke], some)
    assert set(ranked["method"]) == set(experiments.rankers(smoke))
    assert set(ranked["truth"]) == {"strict", "near", "full"}
    means = ranked[ranked["truth"] == "strict"].groupby("method")["r_precision"].mean()
    assert means[COVER] == 1.0  # a recipe word for word
    often = (ranked["copies"] > 3) & (ranked["method"] == PAPER_FILTER)
    assert often.any()
    assert ranked[often]["empty"].all()  # what was planted more than 3 times is filtered out
    assert experiments.false_sources([smoke], some).set_index("method").loc[COVER].sum() == 0


def test_the_sweep_fills_its_grid_and_longer_spans_never_find_more(smoke: Pipeline) -> None:
    swept = experiments.sweep_frame([smoke], some)
    grid = experiments.sweep_grid(swept, "recall")
    assert list(grid.columns) == list(experiments.MIN_LENGTHS)
    assert list(grid.index) == ["1", "3", "10", "30", "any"]
    assert (np.diff(grid.to_numpy(), axis=1) <= 0).all()
    assert (np.diff(grid.to_numpy(), axis=0) >= 0).all()


def test_a_span_is_dropped_when_it_occurs_more_often_than_the_limit(smoke: Pipeline) -> None:
    case = max(some(smoke), key=lambda case: case.copies)
    occurs = smoke.index.count(smoke.index.encode(case.text))
    shares = [experiments.dropped_spans([smoke], lambda _: [case], limit) for limit in (occurs - 1, occurs)]
    assert [(share.estimate, share.n) for share in shares] == [(1.0, 1), (0.0, 1)]


def test_tables_of_the_index(smoke: Pipeline) -> None:
    index, [case, *_] = smoke.index, some(smoke)
    ids = index.encode(case.text)
    places = experiments.occurrence_table(index, ids)
    assert set(places["document"]) <= case.truths["strict"]
    assert set(places["kind"]) == {"recipe"}
    following = experiments.continuation_table(index, ids[:12], (1, 12))
    assert list(following["context"]) == [index.tokenizer.decode(ids[i:12]) for i in (11, 0)]
    assert following["occurs"][0] > following["occurs"][1] >= case.copies
    assert following["different next tokens"][0] > following["different next tokens"][1]
    sizes = experiments.index_sizes(index).set_index("array")
    assert sizes.loc["suffixes", "bytes per token"] == pytest.approx(4, rel=0.02)
    assert sizes["megabytes"].is_monotonic_decreasing


# --- chapter 2's predictions ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (Interval(0.5, 0.4, 0.6, 9), "held"),
        (Interval(0.5, 0.2, 0.6, 9), "undecided"),
        (Interval(0.1, 0.0, 0.2, 9), "failed"),
        (Interval(0.5, float("nan"), float("nan"), 1), "held"),
    ],
)
def test_a_verdict_depends_on_the_whole_interval(measured: Interval, said: str) -> None:
    assert experiments.verdict(measured, 0.3, 0.65) == said


def test_every_prediction_of_chapter_2_gets_a_verdict_on_this_run_and_on_the_published() -> None:
    measured = {name: Interval(0.5, 0.4, 0.6, 9) for name in experiments.MODEL_PREDICTIONS}
    published = {name: Interval(0.99, 0.97, 1.0, 9) for name in experiments.MODEL_PREDICTIONS}
    table = experiments.model_prediction_table(measured, published).set_index("quantity")
    assert list(table.loc["mean drift", ["verdict", "verdict on published"]]) == ["held", "failed"]
    assert list(table.loc["direct refused", ["verdict", "verdict on published"]]) == ["failed", "held"]
