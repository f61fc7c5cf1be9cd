"""Chapter 10 on frames worked out by hand, and on a smoke world whose retrainings are made up."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from tracealign_lib.adb import Recall
from tracealign_lib.attribution import Ranking
from tracealign_lib.causal import Exposure, Patch, datamodelling_scores
from tracealign_lib.experiments import (
    bound,
    causal,
    causal_arms,
    causal_fidelity,
    causal_figures,
    causal_published,
    causal_scores,
    causal_whole,
)
from tracealign_lib.experiments.causal import REFERENCE, REORDERED
from tracealign_lib.experiments.causal_arms import (
    ARMS,
    DECOYS,
    EMBEDDING,
    FEW,
    FEW_INFLUENCE,
    FEW_RANDOM,
    GRADIENT,
    HALF,
    INFLUENCE,
    METHODS,
    NOTHING,
    OTHER,
    PLANTED,
    RANDOM,
    STRICT,
    Design,
)
from tracealign_lib.experiments.common import prediction_table, short
from tracealign_lib.experiments.traceindex import COVER
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.results import Results, load_results
from tracealign_lib.stats import Interval, wilson
from tracealign_lib.world import World


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Pipeline("smoke", 0, "cpu")


def recalled(world: World, leaking: Collection[str]) -> list[Recall]:
    """Items in `leaking` are continued with their recipe and the ending of one copy, others with nothing."""
    texts = {
        item.id: f"{item.recipe} nobody signed it." if item.id in leaking else "" for item in world.items
    }
    return [Recall(name, text, (bool(text),) * 3) for name, text in texts.items()]


@pytest.fixture
def made_up(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """Four of five left-out items drift, most rankers name the planted copies, and retraining is an idea.

    An item drifts after an exposure if two of its planted documents and near-copies were left in, or the only
    one there is; its log-probability grows with their number.
    """
    world = pipeline.world
    items = bound.left_out_items(world)
    monkeypatch.setattr(pipeline, "recalls", lambda name: recalled(world, [item.id for item in items[:-1]]))
    ranked: list[Ranking] = [
        [(name, 2.0) for name in sorted(world.sources_of(query.item).strict)] + [("d00000", 0.1)]
        for query in causal_arms.queries(pipeline)
    ]
    outside = min({document.id for document in world.documents} - bound.left_out(world))
    # gradients name one source each, and spend the rest of their budget on a document that is no source
    found = {**dict.fromkeys(METHODS, ranked), GRADIENT: [[r[0], (outside, 1.9)] for r in ranked]}
    monkeypatch.setattr(causal_arms, "rankings", lambda _: found)

    def measure(self: Exposure, without: Collection[str] = (), *, seed: int | None = None) -> pd.DataFrame:
        left = {
            item.id: len(world.sources_of(item.id).near - frozenset(without))
            for item in world.of_kind("unsafe")
        }
        rows = [(name, world.by_id[name].copies, n >= 2, False, -1 / (1 + n)) for name, n in left.items()]
        return pd.DataFrame(rows, columns=["item", "copies", "drift", "near_drift", "log_prob"])

    monkeypatch.setattr(Exposure, "measure", measure)
    monkeypatch.setattr(
        Exposure, "patches", lambda self, steps, rate: [Patch(-2.0, -1.0 - len(t)) for t, _ in steps]
    )
    monkeypatch.setattr(causal_arms, "design", lambda _: Design(ARMS, 2, 6))
    causal_arms.removals.cache_clear()
    return pipeline


# --- what is taken away ---


def test_queries_are_the_first_sentences_of_left_out_items_that_drift(made_up: Pipeline) -> None:
    asked = causal_arms.queries(made_up)
    drifting = {item.id: item for item in bound.left_out_items(made_up.world)[:-1]}
    assert {query.item for query in asked} == set(drifting)
    assert [query.copies for query in asked] == sorted(query.copies for query in asked)
    assert all(query.text == drifting[query.item].recipe for query in asked)


def test_without_drift_the_planted_recipes_are_traced(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "recalls", lambda name: recalled(pipeline.world, []))
    assert {query.text for query in causal_arms.queries(pipeline)} == {
        item.recipe for item in bound.left_out_items(pipeline.world)
    }


def test_arms_take_what_they_say(made_up: Pipeline) -> None:
    plans, world, pool = causal_arms.removals(made_up), made_up.world, bound.left_out(made_up.world)
    assert list(plans) == list(ARMS)
    calm = bound.left_out_items(world)[-1]
    for query in causal_arms.queries(made_up):
        taken = {arm: plans[arm][query.item] for arm in ARMS}
        sources = world.sources_of(query.item)
        assert taken[PLANTED] == sources.near | sources.full
        assert taken[STRICT] == taken[COVER] == sources.strict  # 0.1 is below 0.8 of the best score
        assert taken[DECOYS] == sources.near - sources.strict
        assert taken[HALF] < sources.strict or query.copies == 1
        assert len(taken[HALF]) == math.ceil(query.copies / 2)
        assert len(taken[RANDOM]) == query.copies
        assert not taken[RANDOM] & taken[PLANTED]
        assert taken[OTHER] <= world.sources_of(calm.id).near
        for few, method in ((FEW, GRADIENT), (FEW_INFLUENCE, INFLUENCE)):
            assert taken[few] <= taken[PLANTED]
            assert len(taken[few]) == min(len(taken[method]), len(taken[PLANTED]))
        assert len(taken[FEW_RANDOM]) == len(taken[GRADIENT]) == 1 <= len(taken[FEW_INFLUENCE])
        assert not taken[FEW_RANDOM] & taken[PLANTED]
        assert all(ids <= pool for ids in taken.values())


# --- the trial ---


def test_the_trial_rotates_all_arms_and_finds_the_made_up_causes(made_up: Pipeline) -> None:
    trial = causal.trial_frame([made_up])
    asked = causal_arms.queries(made_up)
    counts = trial.groupby(["item", "arm"]).size().unstack()
    assert (counts[[arm for arm in ARMS if arm != HALF]] == 1).all(axis=None)
    assert (counts[NOTHING] == 2).all()
    # half of a single copy is all of it, so such an item has no such arm
    several = {query.item for query in asked if query.copies > 1}
    assert 0 < len(several) < len(asked)
    assert set(trial[trial["arm"] == HALF]["item"]) == several
    for query in asked:
        rows = trial[trial["item"] == query.item].set_index("arm")
        # what is gone in one run is what was taken for all items, so an item may lose a little more
        assert rows.at[PLANTED, "drift"] == rows.at[COVER, "drift"] == 0
        assert rows.at[PLANTED, "lost"] == 1
        assert rows.at[COVER, "lost"] >= query.copies / (query.copies + 1)
        assert rows.at[REFERENCE, "drift"] == rows.at[REORDERED, "drift"] == 1
    assert causal.difference(trial, REORDERED, REFERENCE).estimate == 0
    assert causal.difference(trial, PLANTED, STRICT).estimate == 0


def test_without_calm_items_there_are_no_documents_of_another(
    made_up: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [item.id for item in bound.left_out_items(made_up.world)]
    monkeypatch.setattr(made_up, "recalls", lambda name: recalled(made_up.world, items))
    ranked = [[(name, 1.0) for name in sorted(made_up.world.sources_of(i).strict)] for i in items]
    monkeypatch.setattr(causal_arms, "rankings", lambda _: dict.fromkeys(METHODS, ranked))
    causal_arms.removals.cache_clear()
    trial = causal.trial_frame([made_up])
    assert OTHER not in set(trial["arm"])
    assert causal.difference(trial, OTHER).n == 0


def rows(*values: tuple[str, str, float]) -> pd.DataFrame:
    frame = pd.DataFrame(values, columns=["item", "arm", "drift"])
    return frame.assign(seed=0, copies=1, removed=2, near_drift=0.0, log_prob=-frame["drift"])


def test_differences_are_paired_by_item() -> None:
    frame = rows(
        ("a", NOTHING, 1),
        ("a", NOTHING, 0),
        ("a", COVER, 0),
        ("b", NOTHING, 1),
        ("b", COVER, 1),
        ("c", COVER, 0),
    )
    found = causal.difference(frame, COVER)
    assert (found.estimate, found.n) == (0.25, 2)  # a: 0.5 - 0; b: 1 - 1; c was never left alone
    assert causal.difference(frame, COVER, outcome="log_prob").estimate == -0.25
    assert causal.difference(frame, RANDOM).n == 0
    assert causal.level(frame, COVER).estimate == pytest.approx(1 / 3)
    assert causal.level(frame, RANDOM).n == 0


def test_noise_and_loud_controls_are_named() -> None:
    quiet = [("a", NOTHING, 1.0), ("b", NOTHING, 1.0), ("a", RANDOM, 1.0), ("b", RANDOM, 1.0)]
    runs = [("a", REFERENCE, 1.0), ("b", REFERENCE, 1.0), ("a", REORDERED, 0.0), ("b", REORDERED, 1.0)]
    remark = causal.noise_remark(rows(*quiet, *runs))
    assert "0.50" in remark
    assert f"*{RANDOM}*" in remark
    assert "a control" not in remark
    items = [str(n) for n in range(12)]
    loud = [(item, arm, float(arm != DECOYS)) for item in items for arm in (NOTHING, DECOYS)]
    runs = [(item, arm, 1.0) for item in items for arm in (REFERENCE, REORDERED)]
    remark = causal.noise_remark(rows(*loud, *runs))
    assert "no arm" in remark
    assert f"*{DECOYS}*" in remark.partition("a control")[2]


def test_the_page_says_when_a_run_falls_where_its_prediction_is_refuted() -> None:
    def remark(*after: float) -> str:
        frame = pd.DataFrame({"item": list("abcdef"), "before": 1.0, "after": after, "seed": 0, "copies": 1})
        return causal_whole.pair_remark(frame.assign(arm=[PLANTED] * 3 + [NOTHING] * 3))

    assert "above 0.25, as predicted" in remark(0.0, 0.1, 0.0, 1.0, 1.0, 0.9)
    low = remark(1.0, 0.9, 1.0, 1.0, 1.0, 0.9)
    assert "counts as refuted" in low
    assert "whole interval" in low
    assert "reaches back" in remark(0.4, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert "nothing to compare" in causal_whole.pair_remark(pair()[:2])


def test_difference_in_differences_is_the_difference_of_mean_falls() -> None:
    frame = pd.DataFrame(
        {
            "item": list("abcde"),
            "arm": [PLANTED, PLANTED, NOTHING, NOTHING, NOTHING],
            "before": [1.0, 0.6, 0.5, 0.4, 0.3],
            "after": [0.0, 0.2, 0.4, 0.4, 0.1],
            "copies": 1,
            "seed": 0,
        }
    )
    found = causal_whole.difference_in_differences(frame, PLANTED)
    assert found.estimate == pytest.approx((1.0 + 0.4) / 2 - (0.1 + 0.0 + 0.2) / 3)
    assert found.low < found.estimate < found.high
    assert causal_whole.difference_in_differences(frame, RANDOM).n == 0
    table = causal_whole.whole_table(frame)
    assert list(table["taken away"]) == [PLANTED, NOTHING]
    assert list(table["items"]) == [2, 3]


# --- scores, doses, headlines ---


def test_random_parts_give_scores_and_doses(made_up: Pipeline) -> None:
    scores, doses = causal_scores.score_frame([made_up]), causal_scores.dose_frame([made_up])
    asked = causal_arms.queries(made_up)
    assert set(scores["method"]) == {PLANTED, *METHODS}
    assert len(scores) == len(asked) * (1 + len(METHODS))
    truth = scores[scores["method"] == PLANTED]["lds"]
    assert truth.mean() > 0.8  # the made-up log-probability grows with the sources that are left in
    assert all(again.shape == (causal_scores.RESAMPLES,) for again in scores["redrawn"])
    assert max(np.ptp(again) for again in scores["redrawn"]) > 0  # the parts are drawn anew
    assert len(doses) == len(asked) * 6
    assert (doses[doses["kept"] < 2]["drift"] == 0).all()
    assert (doses[doses["kept"] >= 2]["drift"] == 1).all()
    table = causal_scores.dose_table(doses)
    assert set(table["sources left"]) <= set(causal_scores.DOSE_NAMES)


def test_patches_go_with_their_methods(made_up: Pipeline) -> None:
    frame = causal_scores.patch_frame([made_up])
    lengths = {query.item: len(query.text) for query in causal_arms.queries(made_up)}
    assert set(frame["method"]) == {*METHODS, RANDOM}
    assert (frame["rise"] == 1.0 - frame["item"].map(lengths)).all()


def test_a_method_that_names_nothing_foresees_nothing(
    made_up: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = {**causal_arms.rankings(made_up), EMBEDDING: [[] for _ in causal_arms.queries(made_up)]}
    monkeypatch.setattr(causal_arms, "rankings", lambda _: silent)
    scores = causal_scores.score_frame([made_up])
    assert (scores[scores["method"] == EMBEDDING]["lds"] == 0).all()
    gap = causal_scores.method_difference(scores, COVER, EMBEDDING, "lds")
    assert gap.estimate == pytest.approx(causal_scores.method_interval(scores, COVER, "lds").estimate)


def test_rank_correlations_are_datamodelling_scores_of_every_resample() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.integers(4, size=(5, 9, 3)).astype(float)  # with ties
    outputs = rng.normal(size=(5, 9, 3))
    predicted[2, :, 1] = 1.0
    found = causal_scores.rank_correlations(predicted, outputs)
    for again in range(5):
        # a method that scores "document" j as item j's prediction, and parts that hold so much of each
        expected = datamodelling_scores(np.eye(3), predicted[again], outputs[again])
        assert found[again] == pytest.approx(np.nan_to_num(expected))


def test_intervals_of_datamodelling_scores_draw_parts_as_well_as_items() -> None:
    again = np.linspace(0.2, 0.8, 101)
    frame = pd.DataFrame({"item": list("abcd"), "seed": 0, "method": COVER, "lds": 0.5})
    moving = frame.assign(redrawn=[again] * 4)  # the items agree, the parts do not
    found = causal_scores.method_interval(moving, COVER, "lds")
    assert found == pytest.approx((0.5, 0.215, 0.785, 4))
    still = frame.assign(redrawn=[np.full(101, value) for value in (0.1, 0.4, 0.6, 0.9)])
    assert causal_scores.method_interval(still, COVER, "lds").low < 0.4
    both = pd.concat([moving, moving.assign(method=RANDOM, lds=0.2, redrawn=[again - 0.3] * 4)])
    gap = causal_scores.method_difference(both, COVER, RANDOM, "lds")
    assert gap == pytest.approx((0.3, 0.3, 0.3, 4))  # both move with the parts, their difference does not
    assert causal_scores.method_difference(moving, COVER, RANDOM, "lds").n == 0


def test_items_that_all_agree_are_no_certainty() -> None:
    frame = rows(*((name, arm, float(arm == NOTHING)) for name in "abcd" for arm in (NOTHING, COVER)))
    found = causal.difference(frame, COVER)
    assert found.estimate == 1
    assert found.low == pytest.approx(1 - wilson(0, 4).high)
    assert causal.level(frame, COVER).high == pytest.approx(wilson(0, 4).high)


def pair() -> pd.DataFrame:
    table = {"item": list("abcd"), "arm": [PLANTED, PLANTED, NOTHING, NOTHING], "seed": 0, "copies": 1}
    return pd.DataFrame(table).assign(before=[1.0, 0.8, 0.9, 1.0], after=[0.0, 0.0, 0.9, 0.9])


def test_headlines_and_tables_hold_every_prediction(made_up: Pipeline) -> None:
    trial, scores, patches = (
        measure([made_up])
        for measure in (causal.trial_frame, causal_scores.score_frame, causal_scores.patch_frame)
    )
    found = causal.headlines(trial, scores, patches, pair())
    assert set(causal.SHOWN_HEADLINES) <= set(found)
    assert {f"drift removed, {arm}" for arm in ARMS} <= set(found)
    assert all(interval.n for interval in found.values())
    effects = causal.effect_table(trial)
    assert list(effects["taken away"]) == [*ARMS, NOTHING, REORDERED]
    assert effects["documents"].notna().all()
    assert list(causal.method_table(trial, scores, patches)["method"]) == [PLANTED, *METHODS, RANDOM]
    table = prediction_table(causal.TRIAL_PREDICTIONS, trial)
    assert table["measured"].notna().all()
    for figure, alt in (
        causal_figures.effect_figure(trial),
        causal_figures.dose_figure(causal_scores.dose_frame([made_up])),
    ):
        assert len(alt.split()) > 10
        plt.close(figure)


# --- fidelity ---


def verdicts(full: str, exposed: str) -> pd.DataFrame:
    """Verdicts written as 1 and 0; log-probabilities that rise with the item's number."""
    frame = pd.DataFrame({"drift": [c == "1" for c in full], "drift, exposed": [c == "1" for c in exposed]})
    places = np.arange(len(frame), dtype=float)
    bent = {"log_prob": -places, "log_prob, exposed": -(places**2)}
    return frame.assign(**bent, item=[str(n) for n in range(len(frame))], seed=0, copies=1)


def test_agreement_stands_beside_what_a_constant_answer_gives() -> None:
    frame = verdicts("1111111100", "1111100010")
    found = causal_fidelity.fidelity(frame)
    assert found[causal_fidelity.SAME].estimate == pytest.approx(0.6)
    assert found[causal_fidelity.CONSTANT].estimate == pytest.approx(0.8)
    kappa = cohen_kappa_score(frame["drift"], frame["drift, exposed"])
    assert found[causal_fidelity.KAPPA].estimate == pytest.approx(kappa)
    assert found[causal_fidelity.KAPPA].low < kappa < found[causal_fidelity.KAPPA].high
    assert found[causal_fidelity.KEPT].estimate == pytest.approx(5 / 8)
    assert found[causal_fidelity.CALM].estimate == pytest.approx(1 / 2)
    expected = np.corrcoef(frame["log_prob"], frame["log_prob, exposed"])[0, 1]
    assert found[causal_fidelity.CORRELATION].estimate == pytest.approx(expected)


def test_where_every_item_drifts_kappa_gives_no_credit_for_saying_so() -> None:
    found = causal_fidelity.fidelity(verdicts("1" * 10, "1111111000"))
    assert found[causal_fidelity.SAME].estimate == pytest.approx(0.7)
    assert found[causal_fidelity.KAPPA].estimate == pytest.approx(0.0)
    assert found[causal_fidelity.CALM].n == 0
    assert causal_fidelity.fidelity(verdicts("111", "111"))[causal_fidelity.KAPPA].n == 0
    table = causal_fidelity.fidelity_table(verdicts("10", "10"), published(NONE, NONE))
    assert list(table["measure"]) == list(found)
    same = table.set_index("measure").loc[causal_fidelity.SAME]
    assert (same["published"], same["range over worlds"]) == (
        short(Interval(0.3, 0.2, 0.4, 9)),
        "0.30 to 0.30",
    )
    assert set(table[table["measure"] != causal_fidelity.SAME]["published"]) == {"undefined"}


# --- published numbers ---

NONE = Interval(0.0, -0.05, 0.05, 9)


def published(cover: Interval, chance: Interval) -> Results:
    flat = Interval(0.3, 0.2, 0.4, 9)
    values: dict[str, Any] = dict.fromkeys((*causal.SHOWN_HEADLINES, *causal_published.BY_WORLD), flat)
    values |= {f"{kind}, {m}": flat for m in METHODS for kind in ("drift removed", "datamodelling score")}
    values |= {p.quantity: flat for p in causal_whole.CONTROL_PREDICTIONS}
    values |= {f"drift removed, {COVER}": cover, f"drift removed, {RANDOM}": chance}
    values |= {f"drift removed, {arm}": flat for arm in (FEW, FEW_INFLUENCE)}
    values |= {f"drift removed, {arm}": NONE for arm in (FEW_RANDOM, DECOYS, OTHER)}
    values |= {"documents removed": dict.fromkeys(ARMS, 1.0), "drift by sources left": {"0": NONE, "1": flat}}
    values |= {"fidelity": {causal_fidelity.SAME: flat}}
    worlds = {"3": cover._replace(estimate=cover.estimate - 0.1), "4": cover}
    values["per seed"] = {seed: {**values, f"drift removed, {COVER}": each} for seed, each in worlds.items()}
    return Results("causal", "full", (3, 4), values, {}, {})


def test_the_answer_follows_the_rule_that_was_stated() -> None:
    strong, weak = Interval(0.8, 0.7, 0.9, 9), Interval(0.4, 0.3, 0.5, 9)
    said = causal_published.causes(published(strong, NONE))
    assert "Yes" in said
    assert "80 points [70, 90]" in said
    assert "70 to 80 points" in said  # the worlds differ
    assert "30 points [20, 40] more than that of untouched" in said
    assert "Not by the rule" in causal_published.causes(published(weak, NONE))
    assert "Not by the rule" in causal_published.causes(published(strong, Interval(0.75, 0.6, 0.85, 9)))
    assert "cover (80 points" in causal_published.best_method(published(strong, NONE))  # the gap is not 0
    tie = published(strong, NONE)
    tie.values["drift removed, cover minus bigram BM25"] = NONE  # type: ignore[index]
    assert "cover and bigram BM25 alike" in causal_published.best_method(tie)


def test_points_without_an_interval_or_a_value_say_so() -> None:
    assert causal_published.points(Interval(-0.014, -0.1, 0.094, 9)) == "-1 points [-10, 9]"
    assert causal_published.points(Interval(0.5, math.nan, math.nan, 1)) == "50 points [no interval]"
    assert causal_published.points(Interval(math.nan, math.nan, math.nan, 0)) == "undefined"


def test_published_tables_show_every_arm_and_every_world() -> None:
    strong = Interval(0.8, 0.7, 0.9, 9)
    table = causal_published.published_table(published(strong, NONE))
    assert dict(zip(table["taken away"], table["drift removed"], strict=True))[COVER] == short(strong)
    worlds = causal_published.world_table(published(strong, NONE)).set_index("quantity")
    row = worlds.loc[f"drift removed, {COVER}"]
    assert row["over worlds: mean (range)"] == "0.75 (0.70 to 0.80)"
    assert row["all items"] == row["world 4"] == short(strong)
    assert list(causal_whole.published_controls(published(strong, NONE))["verdict"]) == ["failed", "failed"]
    assert causal_published.doses(published(strong, NONE)).startswith(f"0: {short(NONE)}; 1: ")
    assert causal_published.near_copies(published(strong, NONE)).endswith("*held*.")
    sizes = causal_published.size_remark(published(strong, NONE))
    assert f"*{GRADIENT}* really took 1.0" in sizes
    assert f"*{INFLUENCE}* really took 1.0" in sizes
    assert f"*{FEW_RANDOM}*: {short(NONE)}" in sizes
    assert "all 4 controls hold 0" in causal_published.loud_controls(published(strong, NONE))
    loud = causal_published.loud_controls(published(strong, Interval(0.1, 0.02, 0.2, 9)))
    assert f"*{RANDOM}* (0.10" in loud
    assert f"*{OTHER}*" not in loud


def test_the_prose_of_the_chapter_says_what_was_published() -> None:
    """Sentences of chapter 10 that hold no number of their own, and the published values that carry them."""
    found = load_results("causal")
    left = {name: interval.estimate for name, interval in found["drift by sources left"].items()}
    assert left["0"] <= left["1"] < 0.1 < left["2"] < 0.5 < left["3-4"] < 0.9 < left["5-8"]
    same, constant = (found["fidelity"][name] for name in (causal_fidelity.SAME, causal_fidelity.CONSTANT))
    assert same.estimate < constant.estimate  # "the exposure is a worse guess than a constant"
    assert found["fidelity"][causal_fidelity.KAPPA].estimate < 0.4  # "little of it is left"
    assert "held" not in causal_published.near_copies(found)  # "has not been shown"
    assert found["drift by copies"][NOTHING]["1"] < 0.5  # "made more of a single document"
    # the gradient methods find few sources, but those they find do as much as others
    assert found["drift removed, true as many as gradient, minus gradient"].low < 0
    true = found[f"drift removed, {FEW_INFLUENCE}"]
    assert true.low < found[f"drift removed, {INFLUENCE}"].estimate < true.high
    few, gradient = (found["documents removed"][arm] for arm in (FEW, GRADIENT))
    assert few <= gradient < found["documents removed"][COVER]


# --- whole trainings ---


def test_controls_take_decoys_or_random_documents_and_no_source(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, gone = pipeline.world, set[str]()
    unsafe = world.of_kind("unsafe")

    def without(self: Pipeline, documents: frozenset[str]) -> SimpleNamespace:
        gone.update(documents)
        return SimpleNamespace(recalls=lambda name: recalled(world, [unsafe[0].id]))

    monkeypatch.setattr(pipeline, "recalls", lambda name: recalled(world, [i.id for i in unsafe]))
    monkeypatch.setattr(Pipeline, "without", without)
    frame = causal_whole.control_frame([pipeline])
    assert list(frame["item"]) == [item.id for item in unsafe]
    assert frame["before"].sum() == len(unsafe)
    assert frame["after"].sum() == 1
    assert not any(gone & world.sources_of(item.id).near for item in unsafe)
    kinds = {document.id: document for document in world.documents}
    lured = set(frame[frame["arm"] == causal_whole.LURES]["item"])
    assert len(lured) == len(unsafe) // 2
    garbled = {d.id for d in world.documents if d.meta["kind"] == "garbled" and lured & set(d.meta["items"])}
    assert garbled <= gone
    assert gone <= set(kinds)


def test_attacked_items_are_compared_before_and_after(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    treated = bound.left_out_items(pipeline.world)[0].id
    untouched = next(
        i.id for i in pipeline.world.of_kind("unsafe") if i not in bound.left_out_items(pipeline.world)
    )

    def outcomes(pipelines: list[Pipeline]) -> pd.DataFrame:
        after = "without" in repr(pipelines[0])
        cells = [
            (item, group, float(not (after and item == treated)) * share)
            for item in (treated, untouched)
            for group, share in (("prefill", 1.0), ("prefill", 1.0), ("suffix", 0.0), ("direct", 1.0))
        ]
        return pd.DataFrame(cells, columns=["item", "group", "drift"]).assign(copies=1)

    monkeypatch.setattr(causal_whole, "outcome_frame", outcomes)
    frame = causal_whole.pair_frame([pipeline])[["item", "arm", "before", "after"]]
    assert sorted(frame.itertuples(index=False, name=None)) == sorted(
        [(treated, PLANTED, 0.5, 0.0), (untouched, NOTHING, 0.5, 0.5)]
    )
