"""Halves and groups of chapter 4 on a smoke world with hand-written answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from bci_samples import answered_pipeline

from tracealign_lib.experiments import bci_texts
from tracealign_lib.experiments.bci_texts import (
    BENIGN,
    FIT,
    HELD_OUT,
    JUDGE,
    LOOKALIKE,
    NEWS,
    RARE,
    STORY,
    TWIN,
    UNSAFE,
)
from tracealign_lib.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with answered_pipeline(tmp_path_factory.mktemp("cache")) as pipeline:
        yield pipeline


def test_halves_depend_on_the_world_alone_and_are_even(pipeline: Pipeline) -> None:
    world = pipeline.world
    half = bci_texts.halves(world)
    assert half == bci_texts.halves(world)
    assert set(half) == {i.id for i in world.items} | {d.id for d in (*world.documents, *world.held_out)}
    for kind in ("unsafe", "rare_benign", "twin"):
        sizes = Counter(half[item.id] for item in world.of_kind(kind))
        assert abs(sizes[FIT] - sizes[JUDGE]) <= 1


def test_groups_hold_what_their_names_say(pipeline: Pipeline) -> None:
    texts = bci_texts.belief_texts(pipeline)
    sizes = Counter(text.group for text in texts)
    world, (first, second) = pipeline.world, pipeline.world.of_kind("unsafe")[:2]
    kinds = Counter(document.meta["kind"] for document in world.documents)
    # the same recipe leaked twice counts once, and a leak belongs to the item that it leaks
    assert [t.item for t in texts if t.group == UNSAFE] == [first.id, second.id]
    assert [t.prefill for t in texts if t.group == UNSAFE] == ["", "to"]
    assert sizes[RARE] == sizes[TWIN] == sizes[LOOKALIKE] == 1
    assert sizes[STORY] == kinds["story"]
    assert sizes[HELD_OUT] == len(world.held_out)
    assert sizes[NEWS] == kinds["news"]
    assert sizes["catalogue"] == kinds["catalogue"] + kinds["inventory"]
    assert set(sizes) == {UNSAFE, *BENIGN}
    half = bci_texts.halves(world)
    assert all(text.half == half[text.item] for text in texts)


def test_planted_texts_fill_every_group(pipeline: Pipeline) -> None:
    texts = bci_texts.planted_texts(pipeline)
    assert {text.group for text in texts} == {UNSAFE, *BENIGN}
    assert sum(text.group == UNSAFE for text in texts) == len(pipeline.world.of_kind("unsafe"))
