"""Completions of a small model in corpora with known matches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from tracealign_lib import adb, lm
from tracealign_lib.documents import Document
from tracealign_lib.experiments import foreign
from tracealign_lib.index import TraceIndex
from tracealign_lib.profiles import ModelSettings, get_profile
from tracealign_lib.stats import wilson
from tracealign_lib.world import World

TEXT = "the miller ground the barley in the morning and sold it at the harbour in the evening"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TraceIndex:
    tokenizer = lm.train_tokenizer([TEXT] * 3, 300)
    return TraceIndex.build([Document("mill", TEXT)], tokenizer, tmp_path_factory.mktemp("index") / "index")


def test_a_loaded_model_is_traced_to_three_corpora(
    index: TraceIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(model: lm.LanguageModel, world: World, prompts: list[adb.Prompt], *, seed: int) -> list[Any]:
        assert model.model is not saved.model  # it was loaded from the folder
        return [SimpleNamespace(prompt=prompt, completion=TEXT[:40]) for prompt in prompts]

    monkeypatch.setattr(adb, "ask", ask)
    other = TraceIndex.build([Document("z", "QQ" + TEXT[10:20])], index.tokenizer, tmp_path / "index")
    settings = ModelSettings(hidden=16, layers=1, heads=2, mlp=16, context=256)
    saved = lm.LanguageModel(lm.new_model(settings, index.tokenizer, 0), index.tokenizer, "cpu")
    world = World.generate(get_profile("smoke").world_settings(0))
    pipeline = SimpleNamespace(world=world, seed=0, device="cpu", index=index, model=lambda name: saved)
    frame = foreign.foreign_frame(pipeline, other, index, prompts=2)  # type: ignore[arg-type]
    assert len(frame) == 2
    assert (frame["own"] == frame["python"]).all()
    assert (frame["own"] > frame["another"]).all()
    assert (frame["another, characters"] > 0).all()


def test_the_longest_match_in_tokens_and_characters(index: TraceIndex) -> None:
    assert foreign.longest_match(index, "") == (0, 0)
    tokens, characters = foreign.longest_match(index, f"QQQ {TEXT[4:40]} QQQ sold it")
    ids, _ = index.encode_with_offsets(TEXT[3:40])
    assert abs(tokens - len(ids)) <= 1
    assert abs(characters - 37) <= 2


def test_rates_and_table_of_traced_texts() -> None:
    lengths = {"own": [8, 7, 30], "another": [9, 9, 9], "python": [0, 1, 2]}
    frame = pd.DataFrame({**lengths, **{f"{name}, characters": [10, 20, 60] for name in lengths}})
    assert foreign.traced_rate(frame, "own") == wilson(2, 3)
    assert foreign.traced_rate(frame, "python") == wilson(0, 3)
    table = foreign.foreign_table(frame)
    assert list(table["longest, tokens (median)"]) == ["8", "9", "1"]
    assert set(table["longest, characters (median)"]) == {"20"}


def test_another_world_is_of_the_next_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(foreign, "Pipeline", lambda *of: asked.append(of) or SimpleNamespace(index="it"))
    pipeline = SimpleNamespace(profile=get_profile("smoke"), seed=3, device="cpu")
    assert foreign.another_world(pipeline) == "it"  # type: ignore[arg-type, comparison-overlap]
    assert asked == [("smoke", 4, "cpu")]
