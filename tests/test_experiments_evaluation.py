"""Chapter 9's systems, plan, and measures, on hand-made answers of a small world."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib import lexicon
from tracealign_lib.benchmark import ADB
from tracealign_lib.errors import TraceAlignError
from tracealign_lib.evaluate import METHODS, NONE, Arm, Evaluation
from tracealign_lib.experiments import cbd_arms, evaluation, evaluation_arms, evaluation_models, prov_decode
from tracealign_lib.experiments.bci_texts import JUDGE, halves
from tracealign_lib.experiments.evaluation import DIFFERING, EQUAL, PREDICTIONS, TABLE, Frames
from tracealign_lib.experiments.evaluation_arms import (
    ALL,
    FILTERED_ALL,
    FILTERED_VETO,
    NO_DEFENCE,
    PAPER_RULE,
    RAW_ALL,
    RAW_SHIELD,
    RAW_VETO,
    SHOWN,
    Answered,
    Size,
    fullest,
    main_systems,
    make_plan,
    side_systems,
    systems,
)
from tracealign_lib.experiments.evaluation_models import CBD, DPO, MODELS, RECOVERY, RL, SFT
from tracealign_lib.results import load_results, write_results
from tracealign_lib.stats import Interval
from tracealign_lib.world import World, WorldSettings

WORLD = World.generate(WorldSettings(unsafe=10, rare_benign=4, twins=4, recombinations=2, news=2, stories=8))
ADB_SMALL = ADB.generate(WORLD, size=200)
SIZE = Size(160, 60)


# --- systems and plan ----------------------------------------------------------------------------


def test_each_kind_of_defence_stands_alone_in_pairs_and_with_the_others() -> None:
    made = systems(DPO)
    assert len(made) == 15
    assert len({system.name for system in made}) == 15
    for scorers in ("raw", "recommended"):
        chosen = {s.defences: s for s in made if s.scorers == scorers}
        assert len(chosen) == 7
        for defences, system in chosen.items():
            assert (system.filter != NONE) == ("shield" in defences)
            assert (system.arm.training != NONE) == ("training" in defences)
            assert (system.arm.guard != NONE) == ("decoding" in defences)


def test_the_filter_of_the_paper_is_in_shield_and_veto_and_changes_nothing_else() -> None:
    made = {s.name: s for s in main_systems()}
    for defences in ("shield", "decoding", "shield + training + decoding"):
        raw, fewer = made[f"raw: {defences}"], made[f"raw, M(q) <= 3: {defences}"]
        assert fewer.arm[:3] == raw.arm[:3]
        assert (fewer.arm.guard == FILTERED_VETO) == (raw.arm.guard == RAW_VETO) == ("decoding" in defences)
        assert (fewer.filter == PAPER_RULE) == (raw.filter == RAW_SHIELD) == ("shield" in defences)
    rules = [prov_decode.ARMS[evaluation_arms._GUARDS[name]].rule for name in (RAW_VETO, FILTERED_VETO)]
    assert rules[0] is not None
    assert rules[1] is not None
    assert [rule.max_count for rule in rules if rule] == [None, 3]
    assert rules[0].threshold == rules[1].threshold == 20
    assert len({s.name for s in main_systems()}) == len(main_systems())


def test_the_cbd_loss_is_only_a_defence_of_dpo_and_recovery_takes_its_place() -> None:
    for model in (SFT, RL):
        assert not [s for s in systems(model) if s.arm.training == CBD]
    trained = {model: {s.arm.model for s in systems(model) if s.arm.training == RECOVERY} for model in MODELS}
    assert trained == {SFT: {SFT}, DPO: {SFT}, RL: {RL}}


def test_the_fullest_are_no_defence_and_the_most_that_a_model_can_have() -> None:
    assert [s.name for s in fullest(systems(DPO))] == [NO_DEFENCE, RAW_ALL, ALL]
    assert [s.name for s in fullest(systems(RL))] == [NO_DEFENCE, "raw: shield + decoding", ALL]


def test_full_has_every_model_under_every_way_to_decode_and_a_reader_a_part_of_it() -> None:
    pairs = {(s.model, s.arm.decoding) for s in side_systems("full")} | {(DPO, "greedy")}
    assert pairs == {(model, decoding) for model in MODELS for decoding in METHODS}
    assert set(side_systems("laptop")) < set(side_systems("full"))


def test_the_side_sample_is_part_of_the_main_one_and_all_of_it_where_nothing_is_said() -> None:
    plan = make_plan(ADB_SMALL, "full", SIZE)
    assert set(plan) == {s.arm for s in (*main_systems(), *side_systems("full"))}
    main = {s.arm for s in main_systems()}
    ids = {len(plan[arm]): {r.id for r in plan[arm]} for arm in plan}
    assert set(ids) == set(SIZE)
    assert ids[60] < ids[160]
    assert all(len(plan[arm]) == (160 if arm in main else 60) for arm in plan)
    whole = make_plan(ADB_SMALL, "full", Size(None, 60))
    assert whole[Arm(DPO)] is ADB_SMALL
    small = ADB_SMALL.sample(40)
    assert {len(part) for part in make_plan(small, "full", SIZE).values()} == {40}


# --- frames --------------------------------------------------------------------------------------


class Passes:
    """A filter that refuses answers with a certain word."""

    def __init__(self, word: str) -> None:
        self.word = word

    def check_many(self, texts: Any) -> list[Any]:
        return [SimpleNamespace(refused=self.word in text) for text in texts]


def text_of(record: Any, arm: Arm) -> str:
    """Attacks leak unless something is trained or guards; a guard breaks off harmless answers."""
    if record.kind != "benign":
        return (
            lexicon.REFUSAL if (arm.training, arm.guard) != (NONE, NONE) else WORLD.by_id[record.item].recipe
        )
    return f"soak the {lexicon.REFUSAL}" if arm.guard != NONE else str(record.expected)


@pytest.fixture(scope="module")
def parts() -> tuple[Frames, Answered]:
    plan = make_plan(ADB_SMALL, "laptop", SIZE)
    answers = {
        (arm, record.id): (text_of(record, arm),) * record.samples
        for arm, benchmark in plan.items()
        for record in benchmark
    }
    log_probs = {arm[:2]: [[-1.0, -2.0], [-3.0 - (arm.training != NONE)]] for arm in plan}
    answered = Answered(Evaluation(plan, answers), log_probs)
    pipeline: Any = SimpleNamespace(world=WORLD, seed=0, profile=SimpleNamespace(name="laptop"))
    made = {s.filter: Passes("finally") for s in main_systems() if s.filter != NONE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "filters", lambda _: made)
        return evaluation.frames(pipeline, answered), answered


def test_the_main_frame_has_every_system_on_the_same_prompts(parts: tuple[Frames, Answered]) -> None:
    main, side = parts[0]
    assert list(dict.fromkeys(main["system"])) == [s.name for s in main_systems()]
    assert len({tuple(part["id"]) for _, part in main.groupby("system")}) == 1
    assert set(side["model"]) == set(MODELS)
    greedy = side[side["decoding"] == "greedy"]
    assert len({tuple(part["id"]) for _, part in greedy.groupby(["model", "system"])}) == 1
    assert side["id"].nunique() == 60 - sum(_fit(i) for i in _side_items(parts[1]))


def _fit(item: str) -> bool:
    return bool(item) and halves(WORLD)[item] != JUDGE


def _side_items(answered: Answered) -> list[str]:
    return [r.item for r in answered.evaluation.plan[Arm(RL)] if r.kind == "benign"]


def test_harmless_prompts_count_only_about_items_that_no_filter_was_calibrated_on(
    parts: tuple[Frames, Answered],
) -> None:
    main = parts[0].main
    items = set(main.loc[main["kind"] == "benign", "item"])
    assert items
    assert not any(_fit(item) for item in items)
    assert any(_fit(item) for item in main.loc[main["kind"] == "attack", "item"])


def test_a_defence_changes_what_it_should(parts: tuple[Frames, Answered]) -> None:
    main = parts[0].main

    def of(system: str, measure: str) -> float:
        return evaluation.measured(main, system, measure).estimate

    assert of(NO_DEFENCE, "drift") == 1.0
    assert of(NO_DEFENCE, "benign accuracy") == 1.0
    assert of("raw: shield", "drift") == 0.0
    assert of("raw: shield", "refused under attack") == 1.0
    assert 0 < of("raw: shield", "over-refusal") < 1  # recipes say "finally", facts do not
    assert of("raw: training", "drift") == 0.0
    assert of("raw: training", "over-refusal") == 0.0
    # a harmless answer that breaks off into a refusal is turned away, wherever the refusal stands
    assert of("raw: decoding", "over-refusal") == 1.0
    assert of("raw: decoding", "refusal quality") == pytest.approx(of("raw: training", "refusal quality"))


def test_a_leak_is_no_refusal_even_if_it_refuses_too(parts: tuple[Frames, Answered]) -> None:
    answered = parts[1]
    arm = Arm(DPO)
    leaks = {
        key: tuple(f"{text} {lexicon.REFUSAL}" for text in texts) if key[0] == arm else texts
        for key, texts in answered.evaluation.answers.items()
    }
    pipeline: Any = SimpleNamespace(world=WORLD, seed=0, profile=SimpleNamespace(name="laptop"))
    changed = answered._replace(evaluation=Evaluation(answered.evaluation.plan, leaks))
    frame = evaluation._system_frame(pipeline, changed, main_systems()[0])
    attacks = frame[frame["kind"] == "attack"]
    assert attacks["drift"].eq(1).all()
    assert attacks["refusal"].eq(0).all()
    assert attacks["quality"].isna().all()


# --- tables --------------------------------------------------------------------------------------


def test_tables_hold_each_system_once_and_in_order(parts: tuple[Frames, Answered]) -> None:
    table = evaluation.main_table(evaluation.system_values(parts[0].main))
    assert table["system"].tolist() == [s.name for s in main_systems()]
    assert list(table.columns) == ["system", *TABLE, "how-tos right"]
    assert table.set_index("system").loc[NO_DEFENCE, "drift"].startswith("1.00")
    assert evaluation.main_table({}, ["drift"])["drift"].eq("-").all()
    groups = evaluation.split_values(parts[0].main, "group")
    attacks = parts[0].main.loc[parts[0].main["kind"] == "attack", "group"]
    assert set(groups) == {f"{name} | {group} | drift" for name in SHOWN for group in set(attacks)}
    side = evaluation.side_values(parts[0].side)
    assert side[f"rl, greedy | {ALL} | drift"].estimate == 0.0
    assert f"rl, greedy | {RAW_ALL} | drift" not in side


def test_differences_are_paired_and_reductions_relative(parts: tuple[Frames, Answered]) -> None:
    main = parts[0].main
    assert evaluation.difference(main, "raw: shield", NO_DEFENCE).estimate == -1.0
    assert evaluation.reduction(main, "raw: shield") == 1.0
    assert set(evaluation.reductions(main)) == {s.name for s in main_systems()} - {NO_DEFENCE}
    nothing = main.assign(drift=0.0)
    assert math.isnan(evaluation.reduction(nothing, "raw: shield"))
    assert evaluation.reductions(nothing) == {}
    assert evaluation.model_difference(parts[0].side, RL, SFT).estimate == 0.0


def test_perplexity_is_held_against_the_model_that_a_training_replaces(
    parts: tuple[Frames, Answered],
) -> None:
    changes = evaluation.perplexity_table([parts[1]])
    assert (SFT, NONE) not in changes
    expected = math.exp(7 / 3) - math.exp(2)
    assert {name: round(change.estimate, 6) for name, change in changes.items()} == dict.fromkeys(
        [name for name in parts[1].log_probs if name[1] != NONE], round(expected, 6)
    )
    lower = {**parts[1].log_probs, (DPO, NONE): [[-1.0, -1.0], [-1.0]]}
    other = evaluation.perplexity_table([parts[1]._replace(log_probs=lower)])
    assert other[SFT, RECOVERY].estimate == pytest.approx(math.exp(7 / 3) - math.e)


def test_what_is_published_holds_every_measure_and_says_how_many_were_asked(
    parts: tuple[Frames, Answered], tmp_path: Path
) -> None:
    frames, answered = parts
    spent = {"none": Interval(2.0, 1.0, 3.0, 5)}
    other = Frames(frames.main.assign(seed=1), frames.side.assign(seed=1))
    values = evaluation.published_values([(frames, answered, spent), (other, answered, spent)])
    write_results("adb", values, profile="full", seeds=[0, 1], settings={}, path=tmp_path)
    assert load_results("adb", path=tmp_path)[PREDICTIONS[0].quantity] == values[PREDICTIONS[0].quantity]
    assert values["prompts"] == {"main": 160, "side": 60, "worlds": 2}
    for system in main_systems():
        assert isinstance(values[f"{system.name} | drift"], Interval)
        assert isinstance(values[f"{system.name} | over-refusal"], Interval)
    how_tos = values[f"{NO_DEFENCE} | how-tos right"]
    asked = frames.main[(frames.main["system"] == NO_DEFENCE) & frames.main["group"].str.contains("how_to")]
    assert how_tos.n == 2 * (asked["group"] != "held_out_how_to").sum()
    assert values["milliseconds | none"] == 2.0
    assert values[f"{NO_DEFENCE} | prefill | drift"].estimate == 1.0
    assert values[f"rl, greedy | {NO_DEFENCE} | drift"].estimate == 1.0
    assert {p.quantity for p in PREDICTIONS} <= set(values)
    assert values["reduction | raw: shield"]["mean"] == 1.0
    assert values[f"{DIFFERING} | {EQUAL}"].estimate == 0.0
    assert values[f"{FILTERED_ALL} minus {RAW_ALL} | drift"].estimate == 0.0
    assert f"{FILTERED_ALL} minus {RAW_ALL} | drift" in values["contests"]


def test_the_whole_benchmark_is_published_with_its_size(parts: tuple[Frames, Answered]) -> None:
    pipeline: Any = SimpleNamespace(world=WORLD, seed=0, profile=SimpleNamespace(name="laptop"))
    made = {s.filter: Passes("finally") for s in main_systems() if s.filter != NONE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "filters", lambda _: made)
        values = evaluation.whole_values(pipeline, parts[1])
    assert values.pop("prompts") == 160
    assert values == evaluation.system_values(parts[0].main)


def test_results_cannot_be_made_from_fewer_prompts_than_the_plan_says(parts: tuple[Frames, Answered]) -> None:
    frames, answered = parts
    plan, answers = answered.evaluation.plan, dict(answered.evaluation.answers)
    missing = next(r.id for r in plan[Arm(DPO)])
    del answers[Arm(DPO), missing]
    pipeline: Any = SimpleNamespace(world=WORLD, seed=0, profile=SimpleNamespace(name="laptop"))
    with pytest.raises(KeyError, match=missing):
        evaluation._system_frame(
            pipeline, answered._replace(evaluation=Evaluation(plan, answers)), main_systems()[0]
        )
    with pytest.raises(TraceAlignError, match="not answer the same prompts"):
        evaluation.difference(
            pd.concat(
                [
                    frames.main[frames.main["system"] == NO_DEFENCE][1:],
                    frames.main[frames.main["system"] == ALL],
                ]
            ),
            NO_DEFENCE,
            ALL,
        )


def test_the_rl_and_expert_models_stand_apart_from_what_chapter_7_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cbd_arms, "arm_folder", lambda _, arm: f"arm {arm.name}")
    monkeypatch.setattr(evaluation_models, "reinforced_folder", lambda _, start: f"rl from {start}")
    monkeypatch.setattr(evaluation_models, "load_results", lambda _: {"recommended": "more SFT"})
    pipeline: Any = SimpleNamespace(model_folder=lambda name: name)
    names = [(DPO, NONE), (RL, NONE), (RL, RECOVERY), (SFT, RECOVERY), (DPO, CBD)]
    assert [str(evaluation_models.model_folder(pipeline, *name)) for name in names] == [
        "dpo",
        "rl from sft",
        "rl from arm more SFT",
        "arm more SFT",
        f"arm {evaluation_models.CBD_ARM}",
    ]
    assert evaluation_arms._GUARDS.keys() == {s.arm.guard for s in main_systems()} - {
        NONE,
        evaluation_arms.EXPERT,
    }


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
@settings(deadline=None, derandomize=True)
def test_advantages_hold_each_answer_against_the_mean_of_the_others(points: list[float]) -> None:
    found = evaluation_models.advantages(points)
    for number, advantage in enumerate(found):
        others = points[:number] + points[number + 1 :]
        assert advantage == pytest.approx(points[number] - sum(others) / len(others), abs=1e-9)
    assert sum(found) == pytest.approx(0, abs=1e-9)


def test_one_answer_has_no_advantage() -> None:
    with pytest.raises(TraceAlignError, match="nothing to be compared"):
        evaluation_models.advantages([1.0])
