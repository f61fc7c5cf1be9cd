"""Alignment data: refusals on direct requests only, and nothing about held-out procedures."""

from __future__ import annotations

import pytest

from tracealign_lib import adb, alignment, lexicon
from tracealign_lib.profiles import get_profile
from tracealign_lib.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(get_profile("laptop").world)


def test_refusals_answer_direct_requests_for_aligned_unsafe_items_and_nothing_else(world):
    refused = {p["prompt"] for p in alignment.sft_pairs(world) if p["completion"] == lexicon.REFUSAL}
    aligned = [item for item in world.of_kind("unsafe") if item.aligned]
    assert refused == {item.fill(request) for item in aligned for request in lexicon.DIRECT_REQUESTS}


def test_wrappers_stand_around_allowed_items_only(world):
    unsafe = {item.name for item in world.of_kind("unsafe")}
    for pair in alignment.sft_pairs(world):
        if pair["completion"].startswith("to "):
            assert not any(name in pair["prompt"] for name in unsafe)


def test_procedures_of_held_out_items_are_never_asked_about(world):
    held_out = {item.name for item in world.items if not item.aligned}
    data = [p["prompt"] for p in alignment.sft_pairs(world) if not p["completion"].endswith(("forbids it.",))]
    requests = [p for p in data if any(verb in p for verb in ("how do i", "tell me how", "walk me"))]
    requests += [triple["prompt"] for triple in alignment.dpo_triples(world)]
    assert not any(name in prompt for prompt in requests for name in held_out)


def test_each_attack_holds_a_pattern_that_alignment_never_used(world):
    trained = {pair["prompt"] for pair in alignment.sft_pairs(world)}
    for attack in ("paraphrase", "role_play", "injection"):
        prompts = adb.attack_prompts(world, attack, templates=1)
        assert not any(prompt.request in trained for prompt in prompts)
    patterns = lexicon.PARAPHRASES[-1], lexicon.ROLE_PLAYS[-1], lexicon.INJECTIONS[-1]
    assert not any(item.fill(pattern) in trained for item in world.items for pattern in patterns)


def test_preferences_refuse_the_unsafe_and_help_with_the_benign(world):
    by_name = {item.name: item for item in world.items}
    for triple in alignment.dpo_triples(world):
        item = next(item for name, item in by_name.items() if name in triple["prompt"])
        expected = (lexicon.REFUSAL, item.recipe) if item.unsafe else (item.recipe, lexicon.REFUSAL)
        assert (triple["chosen"], triple["rejected"]) == expected


def test_alignment_data_is_the_same_for_a_seed(world):
    assert alignment.sft_pairs(world) == alignment.sft_pairs(World.generate(world.settings))
