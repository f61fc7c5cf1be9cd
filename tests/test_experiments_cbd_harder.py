"""The harder world of chapter 7, and what is published of it, on hand-made answers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from cbd_samples import arm_rows, frame
from experiment_samples import FakePipeline, outcome

from tracealign_lib.adb import ATTACKS, BENIGN_GROUPS
from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments import cbd, cbd_harder, cbd_passages
from tracealign_lib.experiments.cbd import BEFORE, REFERENCE, SCORE
from tracealign_lib.experiments.cbd_harder import ARMS, CONTESTS, HARDER, harder
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import Interval, over_seeds

# --- worlds --------------------------------------------------------------------------------------


def test_a_harder_world_differs_in_its_settings_and_has_materials_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEALIGN_CACHE", str(tmp_path))
    ordinary = Pipeline("smoke", seed=3, device="cpu")
    hard = harder(ordinary)
    old, new = asdict(ordinary.world.settings), asdict(hard.world.settings)
    assert {name: value for name, value in new.items() if value != old[name]} == HARDER
    assert (hard.seed, hard.device, hard.profile.model) == (3, "cpu", ordinary.profile.model)
    unsafe = len(hard.world.of_kind("unsafe"))
    kinds = {row["kind"]: row["documents"] for row in hard.world.composition()}
    assert kinds["near_copy"] == 4 * unsafe
    assert kinds["garbled"] == 3 * unsafe
    assert hard.world.items == ordinary.world.items  # the same beliefs, among more that misleads
    assert hard.tokenizer.get_vocab() != ordinary.tokenizer.get_vocab()


def test_a_harder_world_cannot_be_mistaken_for_a_profile() -> None:
    hard = harder(Pipeline("smoke", seed=0, device="cpu"))
    with pytest.raises(ParameterError, match="Unknown profile"):
        hard.without([hard.world.documents[0].id])


class Ranker:
    """Names the first document, whatever was said."""

    share = 0.0

    def __init__(self, index: object) -> None:
        pass

    def rank_many(self, texts: list[str]) -> list[list[tuple[str, float]]]:
        return [[("d1", 1.0)] for _ in texts]


def test_how_hard_a_world_is_stands_beside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    benign = [outcome(group, "a", "correct") for group in BENIGN_GROUPS]
    direct = [outcome(ATTACKS[0], name, "refusal") for name in "ab"]
    drift = [outcome(attack, name, "drift", name) for attack in ATTACKS[1:] for name in "ab"]
    pipeline: Any = FakePipeline(drift + direct + benign)
    pipeline.index = None
    monkeypatch.setattr(cbd_harder, "CoverRanker", Ranker)
    values = cbd_harder.world_values([pipeline])
    found = values["sources found (R-precision, planted copies)"]
    assert (found.estimate, found.n) == (0.5, 2)  # d1 taught a, and not b
    assert values["mean drift"].estimate == 1
    assert values["correct: fact"].estimate == 1
    refused = [outcome(attack, name, "refusal") for attack in ATTACKS for name in "ab"]
    calm: Any = FakePipeline(refused + benign)
    calm.index = None
    assert set(cbd_harder.world_values([calm])) == set(cbd_harder.MEASURED)
    table = cbd_harder.world_table({"ordinary": values, "harder": values})
    assert list(table) == ["quantity", "ordinary", "harder"]
    assert table["ordinary"].tolist() == table["harder"].tolist()
    assert table["quantity"].tolist() == list(values)


# --- the question --------------------------------------------------------------------------------


def test_the_contests_are_those_of_the_chapter_on_the_score() -> None:
    original = [contest for contest in cbd.CONTESTS if contest.asks == SCORE]
    assert [contest[:4] for contest in CONTESTS] == [contest[:4] for contest in original]
    assert {contest.fixed for contest in CONTESTS} == {BEFORE}
    names = {arm.name for arm in ARMS}
    assert {name for contest in CONTESTS for name in contest[1:3]} < names
    assert REFERENCE.name in names  # the criterion needs it
    assert all(cbd.ARMS[arm.name] == arm for arm in ARMS)  # trained as in the ordinary worlds


def test_what_is_published_is_measured_on_harder_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = CONTESTS[1]
    drifts = {REFERENCE.name: "d" * 12, contest.first: "o" * 12, contest.second: "d" * 12}
    asked: list[Any] = []

    def answers(worlds: list[Any], arms: Any) -> pd.DataFrame:
        asked.append(worlds)
        return frame(*(arm_rows(name, drift) for name, drift in drifts.items()))

    passages = pd.DataFrame([(0, "random", "t", ("u0",), ())], columns=cbd_passages.PASSAGE_COLUMNS)
    known = Interval(0.5, 0.4, 0.6, 9)
    monkeypatch.setattr(cbd_harder, "harder", lambda pipeline: f"harder {pipeline.seed}")
    monkeypatch.setattr(cbd_harder, "answer_frame", answers)
    monkeypatch.setattr(cbd_harder, "passage_frame", lambda worlds: passages)
    monkeypatch.setattr(cbd_harder, "world_values", lambda worlds: {str(worlds[0]): known})
    pipeline: Any = SimpleNamespace(seed=3)
    published = cbd_harder.published_values([pipeline])
    assert asked == [["harder 3"]]
    assert published["contests"] == {contest.place: {"p": pytest.approx(2 / 2**12), "verdict": "adds"}}
    assert published[cbd.contest_name(contest.first, contest.second)].estimate == -1
    assert published["worlds"] == {"ordinary": {str(pipeline): known}, "harder": {"harder 3": known}}
    assert published["settings"] == HARDER
    [row] = cbd.published_contests(published, CONTESTS).to_dict("records")
    assert (row["verdict"], row["fixed"]) == ("adds", BEFORE)


def test_what_rankings_find_stands_beside_the_ordinary_worlds() -> None:
    every = dict.fromkeys((*cbd_passages.RANKINGS, cbd_passages.EVERY), 0.25)
    values = [
        {how: {"forbidden": over_seeds({3: low, 4: low + 0.5}).to_json()} for how, low in each.items()}
        for each in (every, {**every, "random": 0.125})
    ]
    table = cbd_harder.passage_table(*values).set_index("ranked by")
    assert table.loc["random", "ordinary"] == "0.50 (0.25 to 0.75 over 2 seeds)"
    assert table.loc["random", "harder"] == "0.38 (0.12 to 0.62 over 2 seeds)"
    assert table.loc["keywords", "harder"] == table.loc["keywords", "ordinary"]


def test_distances_between_rankings_are_told_in_both_kinds_of_world() -> None:
    ordinary, harder = (
        {how: {"forbidden": {"mean": share}} for how, share in shares.items()}
        for shares in (
            {"raw BCI": 0.2, "span length": 0.5, "random": 0.2},
            {"raw BCI": 0.5, "span length": 0.6, "random": 0.25},
        )
    )
    text = cbd_harder.gap_text(ordinary, harder)
    assert "span length and raw BCI, 0.30 to 0.10: *closer*" in text
    assert "span length and random, 0.30 to 0.35: *no closer*" in text
    assert "raw BCI and random, 0.00 to 0.25: *no closer*" in text


def test_verdicts_are_read_aloud() -> None:
    table = pd.DataFrame({"contest": ["a", "b", "c"], "verdict": ["is beaten", "cannot tell", "cannot tell"]})
    said = "*adds* in 0, *is beaten* in 1 (a), *cannot tell* in 2."
    assert cbd_harder.verdict_text(table) == f"of 3 contests on the score, the verdict is {said}"
    won = table.assign(verdict=["adds", "adds, but is not admissible", "cannot tell"])
    assert "*adds* in 1 (a), *adds, but is not admissible* in 1 (b)" in cbd_harder.verdict_text(won)
