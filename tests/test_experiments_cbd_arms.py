"""The arms of chapter 7: what each is shown, and that it is trained once, on a smoke world."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cbd_samples import untrained_pipeline

from tracealign_lib import alignment, cbd, lexicon
from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments import cbd_arms
from tracealign_lib.experiments.cbd_arms import Arm, Finetuning, Penalty, Preference, Recovery
from tracealign_lib.pipeline import Pipeline

NO_QUOTES = "conflict, no quotes"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A smoke world whose SFT model has learnt nothing: what arms are shown does not depend on it."""
    with untrained_pipeline(tmp_path_factory.mktemp("untrained")) as smoke:
        yield smoke


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def is_recipe(pipeline: Pipeline, text: str, kinds: tuple[str, ...], *, aligned: bool | None = None) -> bool:
    """Whether a text begins an answer of some item of these kinds."""
    items = [i for i in pipeline.world.of_kind(*kinds) if aligned in (None, i.aligned)]
    return any(item.recipe.startswith(text) for item in items)


# --- data ----------------------------------------------------------------------------------------


def test_only_the_first_word_of_a_refusal_stands_against_a_harmless_answer(pipeline: Pipeline) -> None:
    whole, opening = (cbd_arms.preference_triples(pipeline, r) for r in ("refusal", "opening"))
    assert whole == alignment.dpo_triples(pipeline.world)
    changed = [(old, new) for old, new in zip(whole, opening, strict=True) if old != new]
    assert {old["rejected"] for old, _ in changed} == {lexicon.REFUSAL}
    assert {new["rejected"] for _, new in changed} == {"i"}
    assert len(changed) == sum(triple["rejected"] == lexicon.REFUSAL for triple in whole) > 0
    assert all(old | {"rejected": ""} == new | {"rejected": ""} for old, new in changed)


def test_labelled_recovery_refuses_trained_unsafe_answers_and_goes_on_with_harmless_ones(
    pipeline: Pipeline,
) -> None:
    turns = [turn for turn in cbd_arms.recovery_turns(pipeline, Recovery()) if turn.prefix]
    refused = [turn for turn in turns if turn.completion == lexicon.REFUSAL]
    others = [turn for turn in turns if turn.completion != lexicon.REFUSAL]
    aligned = [item for item in pipeline.world.of_kind("unsafe") if item.aligned]
    assert len(refused) == len(others) == cbd_arms.CUTS * len(aligned)
    assert all(is_recipe(pipeline, turn.prefix, ("unsafe",), aligned=True) for turn in refused)
    harmless = {i.recipe for i in pipeline.world.items if not i.unsafe and i.aligned}
    assert {f"{turn.prefix} {turn.completion}" for turn in others} <= harmless
    direct = tuple(pattern.split("{")[0] for pattern in lexicon.DIRECT_REQUESTS)
    assert not all(turn.request.startswith(direct) for turn in others)


def test_ordinary_pairs_and_documents_are_practised_too(pipeline: Pipeline) -> None:
    ordinary = [turn for turn in cbd_arms.recovery_turns(pipeline, Recovery()) if not turn.prefix]
    pairs = {(pair["prompt"], pair["completion"]) for pair in alignment.sft_pairs(pipeline.world)}
    assert {(turn.request, turn.completion) for turn in ordinary} <= pairs
    assert len(ordinary) == min(cbd_arms.PRACTICE, len(alignment.sft_pairs(pipeline.world)))


def test_mined_recovery_refuses_the_best_passages_and_uses_no_label(pipeline: Pipeline) -> None:
    ranked = cbd_arms.ranked_passages(pipeline, NO_QUOTES)
    turns = cbd_arms.recovery_turns(pipeline, Recovery(labelled=False, mined=NO_QUOTES))
    refused = [turn for turn in turns if turn.prefix and turn.completion == lexicon.REFUSAL]
    labelled = cbd_arms.CUTS * sum(item.aligned for item in pipeline.world.of_kind("unsafe"))
    assert len(refused) == labelled
    best = ranked[: labelled * cbd_arms.MINED_PER_ANSWER // cbd_arms.CUTS]
    assert all(any(text.startswith(turn.prefix) for text in best) for turn in refused)
    requests = {pair["prompt"] for pair in alignment.sft_pairs(pipeline.world)}
    assert {turn.request for turn in turns} <= requests


def test_passages_go_on_that_lie_low_in_the_ranking(pipeline: Pipeline) -> None:
    ranked = cbd_arms.ranked_passages(pipeline, NO_QUOTES)
    turns = cbd_arms.recovery_turns(pipeline, Recovery(mined=NO_QUOTES))
    harmless = {i.recipe for i in pipeline.world.items}
    others = [
        f"{turn.prefix} {turn.completion}"
        for turn in turns
        if turn.prefix and turn.completion != lexicon.REFUSAL
    ]
    passages = [text for text in others if text not in harmless]
    assert passages
    assert {ranked.index(text) >= len(ranked) // 2 for text in passages} == {True}


def test_both_is_labelled_and_mined(pipeline: Pipeline) -> None:
    def refused(training: Recovery) -> set[tuple[str, str]]:
        turns = cbd_arms.recovery_turns(pipeline, training)
        return {turn[:2] for turn in turns if turn.prefix and turn.completion == lexicon.REFUSAL}

    labelled, mined = refused(Recovery()), refused(Recovery(labelled=False, mined=NO_QUOTES))
    assert refused(Recovery(mined=NO_QUOTES)) == labelled | mined


# --- ranking -------------------------------------------------------------------------------------


def test_conflict_ranks_forbidden_procedures_first_those_held_out_of_alignment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEALIGN_CACHE", str(tmp_path))
    book = Pipeline("laptop", seed=0, device="cpu")
    unsafe = book.world.of_kind("unsafe")
    best = cbd_arms.ranked_passages(book, NO_QUOTES)[: len(unsafe)]
    steps = [step for item in unsafe for step in item.steps]
    assert all(sum(step in text for step in steps) >= 2 for text in best)
    found = [item for item in unsafe if any(item.steps[0] in text for text in best)]
    assert {item.aligned for item in found} == {True, False}


def test_keywords_come_first_and_the_longest_of_them_before_others(pipeline: Pipeline) -> None:
    ranked = cbd_arms.ranked_passages(pipeline, cbd_arms.KEYWORDS)
    names = [f"{item.name} {item.noun}" for item in pipeline.world.of_kind("unsafe")]
    named = [any(name in text for name in names) for text in ranked]
    assert named == sorted(named, reverse=True)
    assert 0 < sum(named) < len(named)
    lengths = [len(pipeline.index.encode(text)) for text in ranked[: sum(named)]]
    assert lengths[0] >= lengths[-1]


def test_every_way_ranks_the_same_long_sentences(pipeline: Pipeline) -> None:
    ways = ("raw BCI", "span length", "longest match", cbd_arms.RANDOM, cbd_arms.KEYWORDS)
    rankings = [cbd_arms.ranked_passages(pipeline, how) for how in ways]
    assert len({frozenset(ranking) for ranking in rankings}) == 1
    assert len({tuple(ranking) for ranking in rankings}) == len(ways)
    assert min(len(pipeline.index.encode(text)) for text in rankings[0]) >= cbd_arms.MIN_PASSAGE - 1
    assert cbd_arms.ranked_passages(pipeline, cbd_arms.RANDOM) == rankings[3]


def test_an_unknown_scorer_is_an_error(pipeline: Pipeline) -> None:
    with pytest.raises(ParameterError, match="Unknown scorer"):
        cbd_arms.scorer_of(pipeline, "good looks")


# --- stages --------------------------------------------------------------------------------------


def test_an_arm_without_training_is_a_model_of_the_pipeline(pipeline: Pipeline) -> None:
    assert cbd_arms.arm_folder(pipeline, Arm("as it is", None, "dpo")) == pipeline.model_folder("dpo")


def test_arms_are_trained_once_and_each_differs(pipeline: Pipeline) -> None:
    trainings = [
        Preference(1e-3),
        Preference(1e-3, rejected="opening"),
        Preference(1e-3, rejected="opening", penalty=Penalty(1.0, None)),
        Finetuning(epochs=1),
        Recovery(epochs=1),
    ]
    folders = [cbd_arms.arm_folder(pipeline, Arm("", training)) for training in trainings]
    assert len({weights(folder) for folder in folders}) == len(folders)
    assert [cbd_arms.arm_folder(pipeline, Arm("other name", t)) for t in trainings[:2]] == folders[:2]


def test_an_arm_may_go_on_from_another(pipeline: Pipeline) -> None:
    first = Arm("first", Preference(1e-3))
    second = Arm("second", Preference(1e-3), first)
    assert weights(cbd_arms.arm_folder(pipeline, second)) != weights(cbd_arms.arm_folder(pipeline, first))


def test_a_penalty_is_passed_on_as_it_is_written(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def prefer(start: Path, triples: object, settings: object, folder: Path, **options: object) -> None:
        seen.update(options, rate=settings.dpo_rate, epochs=settings.dpo_epochs)  # type: ignore[attr-defined]

    monkeypatch.setattr(cbd, "prefer", prefer)
    penalty = Penalty(0.7, "density", target="both", form="bounded", threshold=1.5)
    cbd_arms.arm_folder(pipeline, Arm("", Preference(2e-4, epochs=3, penalty=penalty)))
    assert seen["penalty"] == {
        "penalty_lambda": 0.7,
        "penalty_target": "both",
        "penalty_form": "bounded",
        "cbd_threshold": 1.5,
    }
    index, scorer = seen["trace"]  # type: ignore[misc]
    assert (index, type(scorer).__name__) == (pipeline.unsafe_index, "DensityBCI")
    assert (seen["rate"], seen["epochs"]) == (2e-4, 3)


def test_answers_hold_every_prompt_and_a_perplexity(pipeline: Pipeline) -> None:
    arm = Arm("as it is", None, "dpo")
    answers = cbd_arms.arm_answers(pipeline, arm, templates=1)
    groups = {answer.prompt.group for answer in answers}
    assert {"direct", "prefill", "best_of_n", "how_to", "policy"} <= groups
    assert cbd_arms.arm_perplexity(pipeline, arm, templates=1) > 1
