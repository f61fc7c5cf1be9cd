"""What rankings of passages find, on a hand-made world."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from cbd_samples import frame, rows

from tracealign_lib import alignment
from tracealign_lib.experiments import cbd, cbd_arms, cbd_passages
from tracealign_lib.experiments.cbd_passages import EVERY, PASSAGE_COLUMNS
from tracealign_lib.pipeline import Pipeline

ITEMS = [
    SimpleNamespace(id="a", aligned=True, steps=("soak it", "fold it", "hide it")),
    SimpleNamespace(id="b", aligned=False, steps=("burn it", "fold it", "sink it")),
]
TEXTS = ["soak it, then hide it", "burn it, then sink it", "soak it, then burn it", "hide it"]


@pytest.fixture
def passages(monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """One aligned item, so each ranking takes two passages."""
    orders = {"good": TEXTS, "bad": TEXTS[::-1]}
    monkeypatch.setattr(cbd_passages, "ranked_passages", lambda pipeline, how: orders[how])
    pipelines: Any = [
        SimpleNamespace(seed=seed, world=SimpleNamespace(of_kind=lambda kind: ITEMS)) for seed in (3, 4)
    ]
    return cbd_passages.passage_frame(pipelines, ("good", "bad"))


def test_a_passage_is_forbidden_if_it_holds_two_steps_of_one_item(passages: pd.DataFrame) -> None:
    assert passages.loc[passages["ranked by"] == "good", "tells of"].tolist() == [("a",), ("b",)] * 2
    table = cbd_passages.passage_table(passages[passages["seed"] == 3]).set_index("ranked by")
    assert table["forbidden"].to_dict() == {"good": 1.0, "bad": 0.0, EVERY: 0.5}
    assert table["held-out items"].to_dict() == {"good": 1, "bad": 0, EVERY: 1}


def test_the_share_of_texts_that_tell_of_an_item() -> None:
    pipeline: Any = SimpleNamespace(world=SimpleNamespace(of_kind=lambda kind: ITEMS))
    assert cbd_passages.forbidden_share(pipeline, TEXTS) == 0.5
    assert cbd_passages.forbidden_share(pipeline, TEXTS[2:]) == 0


def test_worlds_are_summed_up_as_a_spread(passages: pd.DataFrame) -> None:
    passages = passages[~((passages["seed"] == 4) & (passages["text"] == TEXTS[0]))]
    values = cbd_passages.passage_values(passages)
    assert values["good"]["forbidden"] == {"mean": 1.0, "minimum": 1.0, "maximum": 1.0, "seeds": 2}
    assert values[EVERY]["forbidden"]["minimum"] == pytest.approx(1 / 3)
    assert values[EVERY]["forbidden"]["maximum"] == 0.5


def test_drift_is_split_by_what_the_passages_of_the_same_world_tell_of() -> None:
    drift = pd.DataFrame(
        [
            (arm, seed, item, float(value))
            for arm, told in (("with", "0010"), ("without", "1011"))
            for (seed, item), value in zip(((0, "u"), (0, "v"), (1, "u"), (1, "v")), told, strict=True)
        ],
        columns=["arm", "seed", "item", "value"],
    )
    passages = pd.DataFrame(
        [
            (0, "how", "t", ("u", "x"), ("u",)),
            (1, "how", "t", ("v",), ("v",)),
            (1, "other", "t", ("u",), ("u",)),
        ],
        columns=PASSAGE_COLUMNS,
    )
    table = cbd_passages.told_table(drift, passages, {"how": "with"}, {"labelled": "without"})
    assert table["told of"].tolist() == ["yes", "no"]
    assert table["items"].tolist() == [2, 2]
    assert [value.estimate for value in table["with passages"]] == [0, 0.5]
    assert [value.estimate for value in table["labelled"]] == [1, 0.5]
    everything = passages.assign(**{"held out": [("u", "v")] * 3})
    assert cbd_passages.told_table(drift, everything, {"how": "with"}, {})["told of"].tolist() == ["yes"]


def test_drift_by_copies_is_of_held_out_items_and_weighs_items_alike() -> None:
    data = frame(
        rows("a", "prefill", "u", "ddd", aligned=False),
        rows("a", "prefill", "v", "o", aligned=False),
        rows("a", "prefill", "w", "d"),
        rows("a", "how_to", "x", "d", aligned=False),
    )
    data.loc[data["item"] == "w", "copies"] = 4
    table = cbd_passages.copies_table(data, ["a"], ["prefill"])
    assert table[["arm", "copies", "estimate", "n"]].to_numpy().tolist() == [["a", 1, 0.5, 2]]


def test_what_an_arm_sees_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEALIGN_CACHE", str(tmp_path))
    pipeline = Pipeline("smoke", seed=0, device="cpu")
    arms = [cbd.REFERENCE, cbd.TWICE, cbd.EXTRA, cbd.LABELLED, cbd.LABELLED_LONGER]
    table = cbd_passages.budget_table(pipeline, arms).set_index("arm")
    assert list(table.index) == [arm.name for arm in arms[1:]]
    aligned = sum(item.aligned for item in pipeline.world.of_kind("unsafe"))
    triples = len(alignment.dpo_triples(pipeline.world))
    assert table.loc[cbd.TWICE.name, ["epochs", "texts", "seen"]].tolist() == [2, triples, 2 * triples]
    labelled = table.loc[cbd.LABELLED.name]
    assert labelled["turn round"] == cbd_arms.CUTS * aligned
    turns = cbd_arms.recovery_turns(pipeline, cbd_arms.Recovery())
    assert labelled["texts"] == len(turns) + min(cbd_arms.REPLAY, len(pipeline.corpus))
    assert table.loc[cbd.EXTRA.name, "texts"] == labelled["texts"]
    assert table.loc[cbd.LABELLED_LONGER.name, "seen"] == 2 * labelled["seen"]
