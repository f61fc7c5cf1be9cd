"""The texts of chapter 6: edits that the judge still recognises, policy answers, independent draws."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bci_samples import answered_pipeline, outcomes
from shield_samples import text

from tracealign_lib import adb
from tracealign_lib.adb import Judgement, Outcome, Prompt
from tracealign_lib.experiments import shield_texts as chapter
from tracealign_lib.experiments.bci_texts import BENIGN, FIT, JUDGE, NEWS, STORY, UNSAFE, halves
from tracealign_lib.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with answered_pipeline(tmp_path_factory.mktemp("cache")) as smoke:
        yield smoke


def test_each_edit_changes_one_word_of_a_step_and_the_judge_calls_the_last_near_drift(
    pipeline: Pipeline,
) -> None:
    for item in pipeline.world.of_kind("unsafe"):
        leaked = text(UNSAFE, item.id, FIT, f"well: {item.recipe}\n")
        words = leaked.text.split()
        for number in (1, 2, 3):
            changed = chapter.edited(leaked, pipeline.world, number)
            differing = [
                i for i, (a, b) in enumerate(zip(words, changed.text.split(), strict=True)) if a != b
            ]
            assert len(differing) == number
            assert changed.group == chapter.EDITED[number - 1]
            assert changed == chapter.edited(leaked, pipeline.world, number)
        prompt = Prompt("p", "paraphrase", item.id, "how?")
        assert adb.judge(pipeline.world, prompt, changed.text).label == "near_drift"


def test_texts_are_those_of_chapter_4_and_what_a_shield_meets_besides(pipeline: Pipeline) -> None:
    texts = chapter.shield_texts(pipeline)
    groups = [t.group for t in texts]
    drift = groups.count(UNSAFE)
    assert drift == 2  # two of the three answers are the same text
    assert [groups.count(group) for group in chapter.EDITED] == [drift] * 3
    assert {t.group for t in texts} <= {*chapter.HARMFUL, *chapter.HARMLESS}
    assert {t.group for t in chapter.calibration_texts(pipeline)} <= {UNSAFE, *BENIGN}


def test_near_drift_belongs_to_the_leaked_item_and_counts_once(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pipeline.world.of_kind("unsafe")[:2]
    nearly = Judgement("near_drift", second.id, second.steps[:2])
    asked = [Outcome(Prompt(f"{n}", "suffix", first.id, "how?"), "almost", nearly) for n in range(2)]
    monkeypatch.setattr(pipeline, "outcomes", lambda model="dpo": [*outcomes(pipeline), *asked])
    near = [t for t in chapter.shield_texts(pipeline) if t.group == chapter.NEAR]
    assert [(t.item, t.text, t.half) for t in near] == [
        (second.id, "almost", halves(pipeline.world)[second.id])
    ]


def test_policy_answers_are_the_models_right_ones_or_what_would_be_right(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    [answer] = chapter.policy_answers(pipeline)
    assert (answer.text, answer.group) == ("the guild rule says", chapter.POLICY)
    wrong = Outcome(
        Prompt("p", "policy", answer.item, "how?", expected="nobody may"), "no", Judgement("other")
    )
    monkeypatch.setattr(pipeline, "outcomes", lambda model="dpo": [wrong])
    assert [t.text for t in chapter.policy_answers(pipeline)] == ["nobody may"]


def test_where_nothing_drifted_planted_texts_stand_in(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = [outcome for outcome in outcomes(pipeline) if not outcome.drifted]
    monkeypatch.setattr(pipeline, "outcomes", lambda model="dpo": calm)
    unsafe = [t.text for t in chapter.calibration_texts(pipeline) if t.group == UNSAFE]
    assert unsafe == [item.recipe for item in pipeline.world.of_kind("unsafe")]


def test_draws_hold_one_harmless_text_for_each_item_and_group_of_a_half() -> None:
    texts = [
        text(STORY, "a", FIT, "first"),
        text(STORY, "a", FIT, "again"),
        text(NEWS, "a", FIT, "other group"),
        text(chapter.POLICY, "a", FIT, "policy"),
        text(STORY, "b", JUDGE, "judged"),
        text(UNSAFE, "c", FIT, "drift"),
        text(chapter.NEAR, "c", FIT, "near"),
        text(STORY, "a", FIT, "other world")._replace(seed=1),
    ]
    assert [t.text for t in chapter.draws(texts)] == ["first", "other group", "policy", "other world"]
    assert [t.text for t in chapter.draws(texts, JUDGE)] == ["judged"]
