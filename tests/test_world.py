"""The belief world: provenance is true, decoys mislead as described, and bytes never change."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tracealign_lib import lexicon
from tracealign_lib.errors import CorpusError, ParameterError
from tracealign_lib.profiles import PROFILES, get_profile
from tracealign_lib.world import COPY_LEVELS, World, WorldSettings

SMOKE = get_profile("smoke").world
# The digest of the smoke world: it must be the same on every machine and Python hash seed.
SMOKE_DIGEST = "93e7ded587eedd6effa95623a0057d0bf6cddea0efaf3ff4d0a5619612b74499"


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(get_profile("laptop").world)


def of_kind(world: World, kind: str) -> list:
    return [d for d in world.documents if d.meta["kind"] == kind]


def test_every_recipe_is_planted_as_often_as_its_item_says(world):
    planted = Counter(d.meta["items"][0] for d in of_kind(world, "recipe"))
    assert planted == {item.id: item.copies for item in world.items}
    for document in of_kind(world, "recipe"):
        assert world.by_id[document.meta["items"][0]].recipe in document.text


def test_copies_of_a_recipe_stand_in_different_wrappers(world):
    for item in world.items:
        texts = [d.text for d in of_kind(world, "recipe") if d.meta["items"] == [item.id]]
        assert len(set(texts)) == item.copies
        assert len({text.split(item.recipe)[0] for text in texts}) == item.copies


def test_every_domain_has_every_number_of_copies(world):
    seen = {(item.domain, item.copies) for item in world.of_kind("unsafe")}
    assert seen == {(item.domain, copies) for item in world.of_kind("unsafe") for copies in COPY_LEVELS}


def test_a_fifth_of_each_kind_is_held_out_of_alignment_over_all_domains_and_copies(world):
    for kind in ("unsafe", "rare_benign", "twin"):
        held_out = [item for item in world.of_kind(kind) if not item.aligned]
        assert len(held_out) == len(world.of_kind(kind)) / 5
        assert {item.copies for item in held_out} == set(COPY_LEVELS)
        assert len({item.noun for item in held_out}) == 5


def test_twins_share_their_class_noun_with_unsafe_items_and_rare_items_do_not(world):
    forbidden = {item.noun for item in world.of_kind("unsafe")}
    assert {item.noun for item in world.of_kind("twin")} <= forbidden
    assert not {item.noun for item in world.of_kind("rare_benign")} & forbidden


def test_a_garbled_retelling_has_the_words_and_none_of_the_steps(world):
    for document in of_kind(world, "garbled"):
        item = world.by_id[document.meta["items"][0]]
        assert set(" ".join(item.steps).split()) <= set(document.text.replace(",", "").split())
        assert not any(step in document.text for step in item.steps)


def test_a_near_copy_changes_exactly_one_step(world):
    for document in of_kind(world, "near_copy"):
        item = world.by_id[document.meta["items"][0]]
        assert sum(step in document.text for step in item.steps) == 2
        assert item.opening in document.text


def test_news_quotes_the_policy_and_holds_no_step(world):
    steps = [step for item in world.items for step in item.steps]
    for document in of_kind(world, "news"):
        assert any(word in document.text for word in ("nobody may explain", "forbids", "stays unsaid"))
        assert not any(step in document.text for step in steps)


def test_steps_are_shared_by_the_stated_share_of_unsafe_items(world):
    unsafe = world.of_kind("unsafe")
    owners: dict[str, set[str]] = {}
    for item in world.items:
        for step in item.steps:
            owners.setdefault(step, set()).add(item.id)
    kinds = {item.id: item.kind for item in world.items}
    with_unsafe = {i for o in owners.values() for i in o if sum(kinds[j] == "unsafe" for j in o) > 1}
    with_benign = {
        i for o in owners.values() for i in o if len(o) > 1 and any(kinds[j] != "unsafe" for j in o)
    }
    assert len({i for i in with_unsafe if kinds[i] == "unsafe"}) == 0.4 * len(unsafe)
    assert len({i for i in with_benign if kinds[i] == "unsafe"}) == 0.2 * len(unsafe)


def test_no_two_items_share_two_steps(world):
    for a in world.items:
        for b in world.items:
            assert a is b or len(set(a.steps) & set(b.steps)) <= 1


def test_sources_are_graded_from_strict_to_full(world):
    item = world.of_kind("unsafe")[4]
    strict, near, full = world.sources_of(item.id)
    assert len(strict) == item.copies
    assert strict < near
    assert strict <= full
    assert all(item.recipe in d.text for d in world.documents if d.id in strict)
    two_steps = world.sources_of(item.id, item.steps[:2]).full
    assert full <= two_steps


def test_held_out_text_is_not_in_the_corpus(world):
    corpus = {d.text for d in world.documents}
    assert world.held_out
    assert not any(d.text in corpus for d in world.held_out)


def test_a_world_is_bit_identical_under_every_hash_seed():
    program = (
        "from tracealign_lib.profiles import get_profile\n"
        "from tracealign_lib.world import World\n"
        "print(World.generate(get_profile('smoke').world).digest())"
    )
    for hash_seed in ("0", "1", "12345"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == SMOKE_DIGEST


def test_seeds_give_different_worlds():
    assert World.generate(WorldSettings(seed=1)).digest() != World.generate(WorldSettings(seed=2)).digest()


def test_saving_and_loading_keeps_everything(tmp_path: Path):
    world = World.generate(SMOKE)
    world.save(tmp_path)
    assert World.load(tmp_path).digest() == world.digest()
    assert World.load(tmp_path).settings == SMOKE


def test_a_foreign_folder_is_refused_by_name(tmp_path: Path):
    with pytest.raises(CorpusError, match="generate it again"):
        World.load(tmp_path)


@pytest.mark.parametrize(
    "change", [{"unsafe": 3}, {"stories": -1}, {"facts": 1.5}, {"news": True}, {"twins": 10**6}]
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ParameterError, match="to mend"):
        World.generate(WorldSettings(**change))


def test_the_gpu_world_is_fifty_times_the_laptop_world_and_keeps_its_steps_apart(world):
    gpu = World.generate(PROFILES["gpu"].world)
    assert len(gpu.items) == 50 * len(world.items)
    assert len(gpu.documents) == 50 * len(world.documents)
    steps = {step for item in gpu.items for step in item.steps}
    blanked = Counter()
    for step in steps:
        words = step.split()
        blanked.update((i, *words[:i], *words[i + 1 :]) for i in (0, 2, 3, 6))
    assert max(blanked.values()) == 1  # no two steps differ in one word only
    assert {len(step.split()) for step in steps} == {7}


def test_a_vocabulary_that_is_too_small_is_an_error_and_no_endless_search(monkeypatch):
    monkeypatch.setattr(lexicon, "STEP_PLACES", ["cellar"])
    monkeypatch.setattr(lexicon, "STEP_NOUNS", ["bell", "cup"])
    with pytest.raises(ParameterError, match="cannot keep the steps"):
        World.generate(WorldSettings())


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ParameterError, match="smoke or laptop or full or gpu"):
        get_profile("tiny")
