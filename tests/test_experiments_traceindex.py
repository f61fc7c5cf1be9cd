"""Chapter 3 on small frames worked out by hand, and once on a smoke world."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from experiment_samples import FakePipeline, outcome

from tracealign_lib.attribution import METRICS, Case, Ranking
from tracealign_lib.experiments import traceindex
from tracealign_lib.experiments.common import prediction_table
from tracealign_lib.experiments.traceindex import COVER, NO_FILTER, PAPER_FILTER, PREDICTIONS
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.results import load_results, write_results
from tracealign_lib.world import World, WorldSettings


def graded(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as `ranking_frame` makes them: what a row leaves out is 0, or a default."""
    base = {**dict.fromkeys(METRICS, 0.0), "truth": "strict", "copies": 1, "seed": 0, "empty": False}
    return pd.DataFrame([{**base, **row} for row in rows])


def test_cases_are_the_distinct_drifting_completions_under_the_leaked_item() -> None:
    asked = [
        outcome("prefill", "a", "drift", "b", "one"),
        outcome("suffix", "a", "drift", "b", "one"),
        outcome("suffix", "b", "drift", "a", "two"),
        outcome("suffix", "b", "near_drift", None, "three"),
    ]
    cases = traceindex.attribution_cases(FakePipeline(asked))  # type: ignore[arg-type]
    assert [(case.text, case.item, case.copies) for case in cases] == [("one", "b", 4), ("two", "a", 1)]
    assert cases[0].truths == {"strict": frozenset({"d2"}), "steps": ("s1", "s2")}


def test_planted_cases_are_the_unsafe_recipes_with_all_their_sources() -> None:
    settings = WorldSettings(unsafe=5, rare_benign=5, twins=5, recombinations=2, news=1, stories=1)
    world = World.generate(settings)
    cases = traceindex.planted_cases(SimpleNamespace(world=world))  # type: ignore[arg-type]
    assert [case.item for case in cases] == [i.id for i in world.of_kind("unsafe")]
    texts = {document.id: document.text for document in world.documents}
    for case in cases:
        assert len(case.truths["strict"]) == case.copies
        assert all(case.text in texts[name] for name in case.truths["strict"])


def test_a_run_without_drift_says_so() -> None:
    case = Case("t", "a", 1, {"strict": frozenset({"d1"})})
    assert "nothing to grade" not in traceindex.describe_cases([case], drifting=True)
    assert "nothing to grade" in traceindex.describe_cases([case], drifting=False)


def test_without_completions_frames_and_headlines_are_empty_and_complete() -> None:
    pipeline: Any = FakePipeline([])
    ranked, swept = traceindex.ranking_frame([pipeline]), traceindex.sweep_frame([pipeline])
    assert ranked.empty
    assert swept.empty
    assert {"method", "truth", "seed", *METRICS} <= set(ranked.columns)
    assert {"min_length", "max_count"} <= set(swept.columns)
    assert traceindex.headlines(ranked) == {}
    assert traceindex.published_values([pipeline]) == {}
    assert "verdict" not in prediction_table(PREDICTIONS, ranked).columns


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
        traceindex, "rankers", lambda _: {name: OneDocument(ranks) for name, ranks in rankings.items()}
    )
    pipeline: Any = FakePipeline([outcome("suffix", "a", "drift", "a", text) for text in ("one", "two")])
    pipeline.world.documents[2].meta["kind"] = "garbled"
    table = traceindex.false_sources([pipeline]).set_index("method")
    assert table.loc["x", "garbled"] == 1.0  # d3 stands first, and R is 1
    assert table.loc["y"].sum() == 0.0  # d2 stands behind the first R


def test_frames_of_several_worlds_are_joined_and_worlds_without_drift_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traceindex, "rankers", lambda _: {"x": OneDocument([("d1", 1.0)])})
    asked = [outcome("suffix", "a", "drift", "a")]
    pipelines: Any = [FakePipeline(asked, 3), FakePipeline([], 4), FakePipeline(asked, 5)]
    frame = traceindex.ranking_frame(
        pipelines, lambda p: [Case("t", "a", 1, {"strict": frozenset({"d1"})})] if p.outcomes() else []
    )
    assert list(frame["seed"]) == [3, 5]
    assert list(frame["r_precision"]) == [1.0, 1.0]
    [row] = [r for r in traceindex.summarise(frame, ["method"]).itertuples() if r.metric == "recall"]
    assert (row.estimate, row.n) == (1.0, 2)


def test_tables_hold_intervals_as_text_in_the_order_of_the_frame() -> None:
    frame = graded(
        [
            {"method": name, "item": i, "case": k, "copies": copies, "recall": value}
            for name, values in (("z", (1.0, 0.0)), ("a", (1.0, 1.0)))
            for k, (i, copies, value) in enumerate(zip("xy", (4, 1), values, strict=True))
        ]
    )
    table = traceindex.metric_table(frame)
    assert list(table["method"]) == ["z", "a"]
    assert list(table.columns) == ["method", "precision", "recall", "R-precision", "MRR", "empty answers"]
    assert table["recall"][0].replace("\N{NO-BREAK SPACE}", " ") == "0.50 [0.00, 1.00]"
    by_copies = traceindex.copies_table(frame, ["a", "z"], "recall")
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
    grid = traceindex.sweep_grid(frame, "recall")
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
    measured = traceindex.paired_difference(frame, "m", "o", "precision")
    assert measured.estimate == pytest.approx(0.5)
    assert measured.n == 2
    nowhere = frame[(frame["method"] == "o") | frame["precision"].isna()]
    assert traceindex.paired_difference(nowhere, "m", "o", "precision").n == 0


def test_predictions_stand_before_the_experiment_and_are_measured_after() -> None:
    before = prediction_table(PREDICTIONS)
    assert len(before) == len(PREDICTIONS)
    methods = (COVER, PAPER_FILTER, NO_FILTER, traceindex.BIGRAMS, "TF-IDF")
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
    after = prediction_table(PREDICTIONS, frame)
    expected = ["held", "held", "held", "undecided", "held", "held", "failed"]
    assert list(after["verdict"]) == expected
    pd.testing.assert_frame_equal(after[list(before.columns)], before)


def test_headlines_are_named_by_method_truth_and_metric_and_can_be_published(tmp_path: Path) -> None:
    names = (COVER, PAPER_FILTER, NO_FILTER, traceindex.BIGRAMS, "TF-IDF")
    frame = graded(
        [
            {"method": name, "item": i, "case": k, "truth": truth, "precision": math.nan, "r_precision": 1.0}
            for name in names
            for truth in ("strict", "full")
            for k, i in enumerate(map(str, range(40)))
        ]
    )
    headlines = traceindex.headlines(frame)
    assert set(traceindex.SHOWN_HEADLINES) <= set(headlines)
    assert headlines["cover | full | r_precision"].estimate == 1.0
    assert {prediction.quantity for prediction in PREDICTIONS} <= set(headlines)
    settings = {"profile": "smoke", "seeds": (0,), "settings": {}, "device": "cpu", "seconds": 1.0}
    write_results("traceindex", headlines, path=tmp_path, **settings)
    loaded = load_results("traceindex", path=tmp_path)
    assert loaded["cover | strict | precision"].n == 0


def test_figures_say_their_numbers() -> None:
    rows = [
        {"method": name, "item": "x", "case": k, "copies": copies, "r_precision": value}
        for name, value in ((COVER, 0.75), (traceindex.UNSAFE_SLICE, 0.11))
        for k, copies in enumerate((1, 4))
    ]
    figure, alt = traceindex.copies_figure(graded(rows))
    assert "1, 4 copies" in alt
    assert "cover: 0.75, 0.75" in alt
    assert "0.11" not in alt
    plt.close(figure)
    cells = [
        {"method": "m", "min_length": n, "max_count": c, "case": 0, "r_precision": 0.25 if c == 3 else 1.0}
        for n in (4, 8)
        for c in (1.0, 3.0, math.inf)
    ]
    figure, alt = traceindex.sweep_figure(graded(cells))
    assert "4, 8 tokens" in alt
    assert "3: 0.25, 0.25; any: 1.00, 1.00" in alt
    framed = figure.axes[0].patches[0]
    assert framed.get_xy() == (0, 1)  # the second row is that of the paper
    plt.close(figure)


def test_times_are_medians_over_queries() -> None:
    seen: list[int] = []
    queries = [np.arange(n) for n in (1, 2, 3)]
    milliseconds = traceindex.median_milliseconds(lambda ids: seen.append(len(ids)), queries, repeats=2)
    assert seen == [1, 1, 1, 2, 2, 3, 3]
    assert milliseconds >= 0


# --- on a real world -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """World, tokenizer and index of profile smoke; no model is trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Pipeline("smoke", 0, "cpu")


def some(pipeline: Pipeline) -> list[Case]:
    return traceindex.planted_cases(pipeline)[:4]


def test_every_ranker_answers_on_a_smoke_world(smoke: Pipeline) -> None:
    ranked = traceindex.ranking_frame([smoke], some)
    assert set(ranked["method"]) == set(traceindex.rankers(smoke))
    assert set(ranked["truth"]) == {"strict", "near", "full"}
    means = ranked[ranked["truth"] == "strict"].groupby("method")["r_precision"].mean()
    assert means[COVER] == 1.0  # a recipe word for word
    often = (ranked["copies"] > 3) & (ranked["method"] == PAPER_FILTER)
    assert often.any()
    assert ranked[often]["empty"].all()  # what was planted more than 3 times is filtered out
    assert traceindex.false_sources([smoke], some).set_index("method").loc[COVER].sum() == 0


def test_the_sweep_fills_its_grid_and_longer_spans_never_find_more(smoke: Pipeline) -> None:
    swept = traceindex.sweep_frame([smoke], some)
    grid = traceindex.sweep_grid(swept, "recall")
    assert list(grid.columns) == list(traceindex.MIN_LENGTHS)
    assert list(grid.index) == ["1", "3", "10", "30", "any"]
    assert (np.diff(grid.to_numpy(), axis=1) <= 0).all()
    assert (np.diff(grid.to_numpy(), axis=0) >= 0).all()


def test_a_span_is_dropped_when_it_occurs_more_often_than_the_limit(smoke: Pipeline) -> None:
    case = max(some(smoke), key=lambda case: case.copies)
    occurs = smoke.index.count(smoke.index.encode(case.text))
    shares = [traceindex.dropped_spans([smoke], lambda _: [case], limit) for limit in (occurs - 1, occurs)]
    assert [(share.estimate, share.n) for share in shares] == [(1.0, 1), (0.0, 1)]


def test_tables_of_the_index(smoke: Pipeline) -> None:
    index, [case, *_] = smoke.index, some(smoke)
    ids = index.encode(case.text)
    places = traceindex.occurrence_table(index, ids)
    assert set(places["document"]) <= case.truths["strict"]
    assert set(places["kind"]) == {"recipe"}
    following = traceindex.continuation_table(index, ids[:12], (1, 12))
    assert list(following["context"]) == [index.tokenizer.decode(ids[i:12]) for i in (11, 0)]
    assert following["occurs"][0] > following["occurs"][1] >= case.copies
    assert following["different next tokens"][0] > following["different next tokens"][1]
    sizes = traceindex.index_sizes(index).set_index("array")
    assert sizes.loc["suffixes", "bytes per token"] == pytest.approx(4, rel=0.02)
    assert sizes["megabytes"].is_monotonic_decreasing
