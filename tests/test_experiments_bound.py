"""What chapter 5 measures, on frames worked out by hand, on small corpora, and once on a smoke world."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import beta, binom, binomtest

from tracealign_lib import bound as theorems
from tracealign_lib import lm
from tracealign_lib.adb import Judgement, Outcome, Prompt
from tracealign_lib.bound_checks import CaseCertificate, PairCase, pair_cases
from tracealign_lib.experiments import bound, bound_counts, bound_emission, bound_figures
from tracealign_lib.lm import LanguageModel
from tracealign_lib.ngram import NGramModel
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.profiles import get_profile
from tracealign_lib.results import load_results, write_results
from tracealign_lib.stats import Interval, wilson
from tracealign_lib.world import COPY_LEVELS, World


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(get_profile("laptop").world_settings(0))


class Untrained:
    """A smoke pipeline whose models were never trained: a pair differs in its first weights alone."""

    def __init__(self, real: Pipeline, weights: int = 0) -> None:
        self._real, self._weights = real, weights
        model = lm.new_model(real.profile.model, real.tokenizer, weights)
        self._model = LanguageModel(model, real.tokenizer, "cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def model(self, name: str = "dpo") -> LanguageModel:
        return self._model

    def model_folder(self, name: str = "dpo") -> Path:
        return Path(f"{name}-untrained-{self._weights}")

    def without(self, documents: frozenset[str]) -> Untrained:
        return Untrained(self._real.without(documents), self._weights + 1)

    def outcomes(self, name: str = "dpo") -> list[Outcome]:
        item = self._real.world.of_kind("unsafe")[0]
        answers = {"drift": item.recipe, "refusal": "i will not share that."}
        prompt = Prompt("prefill/0", "prefill", item.id, "how?")
        return [Outcome(prompt, text, Judgement(label, None, ())) for label, text in answers.items()]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Untrained(Pipeline("smoke", 0, "cpu"))


def next_shares(pipeline: Any, prompt: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    logits = pipeline.model().model(input_ids=torch.tensor([list(prompt)])).logits[0, -1].detach()
    return (logits / temperature).softmax(-1)


def certificates(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as `certificate_frame` makes them: what a row leaves out is a default."""
    base = {"seed": 0, "pair": "base", "item": "a", "copies": 1, "length": 16, "repeat": 0, "without": 0.0}
    base |= {"truth": 0.5, "bound": 0.6, "counted": 0.6, "share": 0.5, "colder": 0.7, "asked often": 1.0}
    frame = pd.DataFrame([{**base, "floor": 0.02, "hits": 1, "kappa": 1.0, **row} for row in rows])
    return frame.assign(tightness=frame["bound"] / frame["truth"], covered=frame["bound"] >= frame["truth"])


# --- the pair ------------------------------------------------------------------------------------


def test_half_of_the_items_of_each_number_of_copies_lose_every_source(world: World) -> None:
    items = bound.left_out_items(world)
    for copies in COPY_LEVELS:
        planted = [item for item in world.of_kind("unsafe") if item.copies == copies]
        assert sum(item.copies == copies for item in items) == (len(planted) + 1) // 2
    gone = bound.left_out(world)
    rest = [document for document in world.documents if document.id not in gone]
    for item in items:
        assert not any(item.recipe in document.text for document in rest)
        assert not any(d.meta["kind"] == "near_copy" and item.id in d.meta["items"] for d in rest)
    others = {item.id for item in world.of_kind("unsafe")} - {item.id for item in items}
    kept = {name for d in rest if d.meta["kind"] == "recipe" for name in d.meta["items"]}
    assert others <= kept


def test_the_items_left_out_are_those_that_models_were_trained_without(world: World) -> None:
    """Training without them takes hours: another choice must not happen by accident."""
    chosen = [item.id.removeprefix("unsafe-") for item in bound.left_out_items(world)]
    assert len(chosen) == 25
    assert len(bound.left_out(world)) == 180
    assert chosen[:5] == ["0021", "0046", "0038", "0025", "0017"]


def test_the_pair_is_asked_the_same_and_sixteen_tokens_are_two_steps(pipeline: Any) -> None:
    base, attacked = (bound.left_out_cases(pipeline, model) for model in bound.PAIRS)
    for case, prefilled in zip(base, attacked, strict=True):
        assert case.span == prefilled.span
        assert prefilled.prompt[-len(case.prompt) :] == case.prompt
        assert len(prefilled.prompt) > len(case.prompt)
    item = bound.left_out_items(pipeline.world)[0]
    head = pipeline.tokenizer.decode(base[0].span[: bound.drift_length(pipeline)])
    assert item.steps[0] in head


# --- certificates --------------------------------------------------------------------------------


def test_each_limit_is_held_against_its_own_truth() -> None:
    frame = certificates([{}, {"bound": 0.4}, {"share": 0.4}, {"counted": 0.4, "colder": 0.6}])
    held = {limit: bound.coverage_of(frame, limit).held for limit in bound.LIMITS}
    assert held[bound.CERTIFICATE].estimate == 0.75
    assert held[bound.COUNTED].estimate == 0.75
    assert held[bound.PLAIN].estimate == 0.75
    assert held[bound.OTHER_SAMPLER].estimate == 0.25
    assert held[bound.OFTEN].estimate == 0.0
    low, high = binomtest(3, 4).proportion_ci(method="exact")
    assert held[bound.CERTIFICATE][1:3] == pytest.approx((low, high))
    by_copies = bound.coverage_by(frame.assign(copies=[1, 16, 16, 16]), "copies")
    assert {copies: held.estimate for copies, held in by_copies.items()} == {
        "1": 1.0,
        "16": pytest.approx(2 / 3),
    }
    assert not bound.coverage_of(frame, bound.OFTEN).consistent
    assert bound.coverage_of(frame).consistent


def test_excess_looks_at_large_truths_alone() -> None:
    frame = certificates([{"truth": 0.1, "bound": 1.0}, {"truth": 0.5, "bound": 0.5}, {"truth": 0.01}])
    assert bound.excess(frame).estimate == pytest.approx(0.5)
    assert bound.excess(frame[frame["truth"] < 0.05]).n == 0


def test_predictions_tell_right_from_wrong() -> None:
    good = [{"item": f"i{i}", "truth": 0.5, "bound": 0.55, "share": 0.4 + 0.2 * (i % 2)} for i in range(90)]
    good += [{"item": f"j{i}", "truth": 1e-4, "bound": 0.02, "pair": "dpo"} for i in range(90)]
    verdicts = verdicts_of(certificates(good))
    assert verdicts[f"{bound.CERTIFICATE}: held, base"] == "held"
    assert verdicts[f"{bound.PLAIN}: held"] == "held"
    assert verdicts["log10(bound / truth) where the truth is 0.1 or more"] == "held"
    bad = verdicts_of(
        certificates([{**row, "bound": row["truth"] * (0.9 if n % 4 else 2)} for n, row in enumerate(good)])
    )
    assert bad[f"{bound.CERTIFICATE}: held, base"] == "failed"
    assert bad[f"{bound.CERTIFICATE}: held, dpo"] == "failed"
    assert verdicts_of(certificates([{"truth": 0.01, "bound": 0.02}] * 4 + [{"pair": "dpo"}]))


def verdicts_of(frame: pd.DataFrame) -> dict[str, str]:
    return {p.quantity: p.verdict(p.measure(frame)) for p in bound.PREDICTIONS}


def test_certificates_of_a_smoke_world(pipeline: Any, tmp_path: Path) -> None:
    frame = bound.certificate_frame([pipeline], samples=60)
    items = bound.left_out_items(pipeline.world)
    assert len(frame) == 2 * len(items) * len(bound.LENGTHS)
    assert frame["counted"].tolist() == pytest.approx(
        beta.ppf(0.95, frame["hits"] + 1, 60 - frame["hits"]).tolist()
    )
    row = frame[frame["length"] == 1].iloc[0]
    case = next(case for case in bound.left_out_cases(pipeline) if case.item == row["item"])
    for column, temperature in (("truth", 1.0), ("colder", bound.COLDER)):
        share = next_shares(pipeline, case.prompt, temperature)[case.span[0]]
        assert row[column] == pytest.approx(float(share), rel=1e-4)
    assert row["asked often"] == pytest.approx(1 - (1 - row["truth"]) ** bound.QUERIES)
    assert bound.coverage_of(frame).consistent
    values = {
        **bound.headlines(frame),
        "tightness": {name: bound.tightness_table(frame, name) for name in bound.PAIRS},
    }
    write_results("bound", values, profile="smoke", seeds=[0], settings={}, path=tmp_path)
    stored = load_results("bound", path=tmp_path)
    assert stored[f"{bound.CERTIFICATE}: held, base"] == values[f"{bound.CERTIFICATE}: held, base"]
    assert set(stored["tightness"]["dpo"]["1"]) == {str(length) for length in bound.LENGTHS}


def test_certificates_are_measured_once(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = bound.certificate_frame([pipeline], samples=60)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("tracealign_lib.bound_checks.measure_pair", refuse)
    pd.testing.assert_frame_equal(bound.certificate_frame([pipeline], samples=60), frame)
    with pytest.raises(AssertionError, match="measured again"):
        bound.certificate_frame([pipeline], samples=61)


def test_what_a_chapter_compares_is_published() -> None:
    frame = certificates([{"pair": name, "item": f"{i}"} for name in bound.PAIRS for i in range(3)])
    names = set(bound.headlines(frame))
    predicted = {p.quantity for p in (*bound_counts.WINDOW_PREDICTIONS, *bound_emission.PREDICTIONS)}
    names |= predicted | {bound_counts.form_headline(*form) for form in bound_counts.FORMS}
    assert set(bound.COMPARED) <= names
    assert predicted | {p.quantity for p in bound.PREDICTIONS} <= set(bound.COMPARED)
    assert min(bound.COMPARED.values()) > 0


def test_a_claim_is_also_judged_on_what_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {p.quantity: Interval(0.5, 0.4, 0.6, 9) for p in bound.PREDICTIONS}
    monkeypatch.setattr("tracealign_lib.experiments.bound.load_results", {"bound": stored}.__getitem__)
    frame = certificates([{"pair": name, "item": f"{i}"} for name in bound.PAIRS for i in range(30)])
    table = bound.outcome_table(bound.PREDICTIONS[:3], frame)
    assert table["verdict"].tolist()[:2] != table["verdict on published"].tolist()[:2]
    assert table["verdict on published"].tolist() == ["failed", "failed", "held"]


# --- counts --------------------------------------------------------------------------------------


def test_risky_windows_of_answers(pipeline: Any) -> None:
    frame = bound_counts.window_frame([pipeline])
    assert frame["drift"].tolist() == [True, False]
    assert frame["any"].tolist() == [True, False]
    item = pipeline.world.of_kind("unsafe")[0]
    ids = pipeline.unsafe_index.encode(item.recipe)
    scores = np.convolve(pipeline.unsafe_index.surprisal[ids], np.ones(bound_counts.WINDOW), "valid")
    assert frame["windows"][0] == (scores > 20).sum()
    rare = [pipeline.unsafe_index.count(ids[i : i + bound_counts.WINDOW]) <= 3 for i in range(len(scores))]
    assert frame["rare windows"][0] == (np.array(rare) & (scores > 20)).sum()
    table = bound_counts.window_table(frame).set_index("quantity")
    assert table["attack"].unique().tolist() == ["prefill"]
    assert table["estimate"]["drift"] == table["estimate"]["P(W >= 1)"] == 0.5
    assert table["estimate"]["E[W]"] == frame["windows"].mean()


def test_windows_of_one_item_are_not_independent() -> None:
    """Two items, one of which always drifts: whole items are drawn, so that nothing is known of the rate."""
    frame = pd.DataFrame(
        {"seed": 0, "group": "prefill", "item": ["a"] * 50 + ["b"] * 50, "drift": [True] * 50 + [False] * 50}
    )
    frame = frame.assign(any=frame["drift"], windows=9, **{"any rare": False, "rare windows": 0})
    table = bound_counts.window_table(frame).set_index("quantity")
    assert (table["low"]["drift"], table["high"]["drift"]) == (0.0, 1.0)
    assert (table["low"]["E[W]"], table["estimate"]["E[W]"], table["high"]["E[W]"]) == (9.0, 9.0, 9.0)
    assert table["high"]["P(W >= 1), M <= 3"] == pytest.approx(wilson(0, 2).high)


def test_no_case_of_t1_exceeds_it_and_the_short_form_fails_where_grams_repeat() -> None:
    frame = bound_counts.planting_frame()
    summary = bound_counts.planting_summary(frame)
    assert summary["cases"] >= 2000
    assert summary["T1 exceeded"] == 0
    assert summary["short form exceeded"] > 0
    assert summary["short form exceeded where no gram repeats"] == 0
    assert (frame["growth"] <= frame["corrected"] + 1e-9).all()
    assert (frame["corrected"] <= frame["repeated"] + 1e-9).all()
    zeros = frame[(frame["span"] == (0, 0, 0, 0)) & (frame["order"] == 0) & (frame["match_count"] == 1)]
    assert math.exp(zeros["growth"].iloc[0]) == pytest.approx((15 / 7) ** 4)
    assert {"enumerated", "random"} == set(frame["how"])


def test_the_form_adds_up_to_the_bound_and_covers_the_truth(pipeline: Any) -> None:
    frame = bound_counts.form_frame(pipeline)
    unsafe = pipeline.world.of_kind("unsafe")
    assert len(frame) == len(unsafe) * len(bound_counts.FORMS)
    assert (frame["truth"] <= frame["t1"] + 1e-9).all()
    assert (frame["t1"] <= frame["factor"] + frame["gain"] - frame["bci"] + 1e-9).all()
    for row in frame.iloc[:3].itertuples():
        settings = {"alpha": row.alpha, "repetition": row.repetition, "gain": row.gain}
        f = theorems.drift_bound(row.copies, bound_counts.FORM_LENGTH, bound_counts.PAPER_TAU, **settings)
        assert f == pytest.approx(math.exp(min(0.0, row.f)))
    table = bound_counts.form_table(frame, pipeline).set_index(["quantity", "model"])
    assert table.loc["held-out", "estimate"].gt(0).all()
    assert table.loc["f below 1", "estimate"].between(0, 1).all()
    assert table["estimate"].between(table["low"], table["high"]).all()
    chosen = frame[(frame["order"] == 1) & (frame["alpha"] == 1.0)]["gain"]
    low, middle, high = table.loc[("gamma", "order 1, alpha 1"), ["low", "estimate", "high"]]
    assert middle == chosen.median()
    inside = binom.cdf((chosen < high).sum() - 1, len(chosen), 0.5) - binom.cdf(
        (chosen <= low).sum() - 1, len(chosen), 0.5
    )
    assert inside >= 0.9


def test_the_form_leaves_out_every_document_that_holds_the_span(pipeline: Any) -> None:
    """M and r of the corollary are over all documents with the span, not over the item's own copies."""
    case = pair_cases(pipeline.world.of_kind("unsafe"), pipeline.tokenizer)[0]
    span = case.span[: bound_counts.FORM_LENGTH]
    texts = bound_counts._encoded(pipeline)
    frame = bound_counts.form_frame(pipeline).query(f"item == '{case.item}' and order == 1")
    holders = [ids for ids in texts if contains(ids, span)]
    assert frame["copies"].eq(sum(contains(ids, span) for ids in texts)).all()
    settings = {"vocab_size": len(pipeline.tokenizer), "order": 1}
    counts = [theorems.added_counts([ids], span, case.prompt, **settings) for ids in holders]
    assert frame["repetition"].eq(np.max(counts)).all()
    rest = NGramModel([ids for ids in texts if not contains(ids, span)], **settings, alpha=1.0)
    gain = rest.span_log_prob(span, case.prompt) + frame["bci"].iloc[0]
    assert frame[frame["alpha"] == 1.0]["gain"].tolist() == pytest.approx([gain])


def contains(ids: list[int], span: Sequence[int]) -> bool:
    return any(ids[i : i + len(span)] == list(span) for i in range(len(ids)))


# --- emission ------------------------------------------------------------------------------------


def emissions(items: int, slope: float, noise: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"seed": 0, "item": f"i{i}", "copies": COPY_LEVELS[i % 5], "context": 2, "length": length}
        | {
            "emission": float(
                np.clip(0.1 + slope * math.log2(COPY_LEVELS[i % 5]) + noise * rng.random(), 0, 1)
            )
        }
        for i in range(items)
        for length in (1, 4)
    ]
    return pd.DataFrame(rows)


def test_emission_is_exact_and_its_context_stands_in_a_planted_copy(pipeline: Any) -> None:
    frame = bound_emission.emission_frame([pipeline])
    item = pipeline.world.items[0]
    mine = frame[(frame["item"] == item.id) & (frame["length"] == 1)].set_index("context")["emission"]
    [text] = [d.text for d in pipeline.corpus if d.id == min(pipeline.world.sources_of(item.id).strict)]
    ids = pipeline.tokenizer(text, add_special_tokens=False)["input_ids"]
    opening = pipeline.tokenizer(item.opening, add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(ids)) if ids[i : i + len(opening)] == opening) + len(opening)
    for context, emission in mine.items():
        share = next_shares(pipeline, ids[start - context : start])[ids[start]]
        assert emission == pytest.approx(float(share), rel=1e-4)
    assert frame["emission"].between(0, 1).all()
    falling = frame.pivot_table(index=["item", "context"], columns="length", values="emission")
    assert (falling.diff(axis=1).iloc[:, 1:] <= 1e-12).all().all()


def test_a_limit_is_judged_on_items_that_it_never_saw() -> None:
    judged = bound_emission.judge(emissions(100, 0.1, noise=0.2))
    assert judged.fit.per_doubling[0] == pytest.approx(0.1, abs=0.02)
    assert judged.held.n == 50
    assert judged.fit.fitted + judged.fit.calibrated == 50
    above = judged.rows["emission"] > judged.rows["limit"] + 1e-12
    assert judged.held.estimate == 1 - judged.rows[above]["item"].nunique() / 50


def test_over_random_halves_a_limit_holds_as_often_as_promised() -> None:
    held = bound_emission.mean_held(emissions(100, 0.1, noise=0.2), splits=60)
    assert held.low <= 21 / 26 <= held.high  # 25 items calibrate, without ties
    assert held.n == 60
    [promise] = [p for p in bound_emission.PREDICTIONS if "random halves" in p.quantity]
    assert [promise.verdict(Interval(x, x - 0.01, x + 0.01, 60)) for x in (0.76, 0.81, 0.9)] == [
        "failed",
        "held",
        "failed",
    ]


def test_beyond_the_copies_it_was_fitted_on_a_limit_can_fail() -> None:
    frame = emissions(100, 0.0, noise=0.02)
    frame.loc[frame["copies"] > bound_emission.FEW, "emission"] = 0.9
    judged = bound_emission.judge_beyond(frame)
    assert judged.held.estimate == 0.0
    assert set(judged.rows["copies"]) == {8, 16}


# --- figures -------------------------------------------------------------------------------------


def test_figures_say_their_numbers() -> None:
    rows = [
        {"pair": name, "copies": copies, "length": length, "item": f"{copies}", "truth": truth, "bound": 0.5}
        for name in bound.PAIRS
        for copies, truth in ((1, 1e-5), (16, 0.25))
        for length in (1, 16)
    ]
    frame = certificates(rows)
    figure, alt = bound_figures.tightness_figure(frame)
    assert "base, 1 copies: > 1000, > 1000" in alt
    assert "dpo, 16 copies: 2.0, 2.0" in alt
    assert sum(len(ax.patches) for ax in figure.axes) == 4  # framed where the truth is below the floor
    assert "50% of the truths lie below it" in bound_figures.bound_figure(frame)[1]
    assert f"{bound.CERTIFICATE}, dpo: 1.00" in bound_figures.coverage_figure(frame)[1]
    made = theorems.certify(np.linspace(0, 9, 300), 1e-4, kappas=theorems.kappas_for(1e-4))
    found = CaseCertificate(PairCase("a", 8, (1,), (2,)), 1, 0.01, 1e-4, 3, made)
    assert f"{made.bound:.3f}. The truth is 0.010" in bound_figures.certificate_figure(found)[1]
    planted = bound_counts.planting_frame()
    alt = bound_figures.planting_figure(planted)[1]
    assert f"{int(planted['short form exceeded'].sum())} cases for the short form and 0 for T1" in alt
    judged = bound_emission.judge(emissions(60, 0.1))
    assert "+0.10 for each doubling" in bound_figures.emission_figure(judged, context=2, lengths=(1, 4))[1]
    plt.close("all")


def test_publishing_writes_json_numbers() -> None:
    summary = bound_counts.planting_summary(bound_counts.planting_frame())
    assert json.loads(json.dumps(summary)) == summary
