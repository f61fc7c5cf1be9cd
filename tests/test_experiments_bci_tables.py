"""Tables of chapter 4 on a small index and on hand-made frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bci_samples import frame

from tracealign_lib.bci import LongestMatchBCI, RawBCI, SpanLength
from tracealign_lib.documents import Document
from tracealign_lib.experiments import bci as conclusions
from tracealign_lib.experiments import bci_tables
from tracealign_lib.experiments.bci_detection import fit_thresholds
from tracealign_lib.experiments.bci_texts import FIT, JUDGE, NEWS, RARE, STORY, UNSAFE, BeliefText
from tracealign_lib.index import Span, TraceIndex
from tracealign_lib.lm import train_tokenizer

TEXTS = ["wake the gate then wake the loaf", "wake the gate", "the loaf is once here"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TraceIndex:
    documents = [Document(str(n), text) for n, text in enumerate(TEXTS)]
    return TraceIndex.build(documents, train_tokenizer(TEXTS, 300), tmp_path_factory.mktemp("t") / "index")


def test_a_span_token_by_token_adds_up_in_its_context(index: TraceIndex) -> None:
    ids = index.encode("then wake the gate")
    span = Span(1, len(ids) - 1, 1)
    scorers = {"raw": RawBCI(), "match": LongestMatchBCI()}
    table = bci_tables.token_table(index, ids, span, scorers)
    assert len(table) == len(ids) - 2
    for name, scorer in scorers.items():
        assert table[name].sum() == pytest.approx(scorer(index, ids, span))
    assert table["count"].tolist() == [index.count([token]) for token in ids[1:-1]]
    assert "".join(table["token"]) == index.tokenizer.decode(ids[1:-1]).replace(" ", "")


def test_what_unseen_tokens_cost(index: TraceIndex, tmp_path: Path) -> None:
    tokens = {"some once": [[0, 0, 0, 1]], "none once": [[0, 0, 1, 1]], "all seen": [[0, 1, 2, 3, 0]]}
    made = {name: TraceIndex.build_tokens(ids, tmp_path / name, vocab_size=4) for name, ids in tokens.items()}
    table = bci_tables.smoothing_table(made).set_index("collection")
    assert table.loc["some once"].tolist() == ["50%", f"{-np.log(1 / 8):.1f}", f"{-np.log(0.25 / 2):.1f}"]
    assert table.loc["none once", "good-turing"].startswith("no estimate")
    assert set(table.loc["all seen"]) == {"0%", "none unseen"}


def test_texts_are_counted_by_group_half_and_item() -> None:
    rows = [(UNSAFE, "a", FIT), (UNSAFE, "a", FIT), (UNSAFE, "b", JUDGE), (STORY, "s", JUDGE)]
    texts = [BeliefText(0, group, item, 1, half, "x") for group, item, half in reversed(rows)]
    table = bci_tables.text_table(texts)
    assert table.to_numpy().tolist() == [[UNSAFE, 3, 2, 2, 1], [STORY, 1, 1, 0, 1]]
    assert "3 distinct drifting completions, which leak 2 items, and 1 harmless" in bci_tables.describe_texts(
        texts, drifting=True
    )
    assert "says nothing about the model" in bci_tables.describe_texts(texts, drifting=False)


def test_scorers_state_their_source_and_labels() -> None:
    table = bci_tables.scorer_table({"raw BCI": RawBCI(), "span length": SpanLength()})
    assert table.loc[0, "source"] == RawBCI.source
    assert table.loc[1, "labels needed"] == SpanLength.labels


def test_the_texts_that_break_a_score_are_quoted() -> None:
    texts = [BeliefText(0, STORY, str(n), 0, FIT, f"text {n} " + "long " * 90) for n in range(4)]
    data = frame({"raw BCI": {STORY: [1, 9, 3, 7]}, "density": {STORY: [9, 1, 1, 1]}})
    table = bci_tables.top_texts(data, texts, "corpus spans", "raw BCI", STORY)
    assert table["score"].tolist() == [9, 7]
    assert [text[:6] for text in table["text"]] == ["text 1", "text 3"]
    assert all(len(text) <= bci_tables.EXCERPT + 2 for text in table["text"])


def test_the_best_cells_of_a_sweep() -> None:
    rows = [(3.0, 8, 10, 0.4, 0.3, STORY), (3.0, 8, 20, 0.3, 0.1, RARE), (np.inf, 4, 20, 0.9, 0.2, STORY)]
    columns = ["max_count", "min_length", "threshold", "caught", "worst", "worst_group"]
    table = bci_tables.best_cells(pd.DataFrame(rows, columns=columns))
    assert table.to_numpy().tolist() == [
        ["any threshold", "20", "4", "any", "0.90", f"0.20 ({STORY})"],
        ["length and count alone", "10", "8", "3", "0.40", f"0.30 ({STORY})"],
        ["the paper's cell", "20", "8", "3", "0.30", f"0.10 ({RARE})"],
    ]


def test_the_recommendation_stands_above_its_rivals_and_the_papers_rule() -> None:
    better, poorer = [9, 9, 9, 9, 9, 9], [9, 9, 1, 1, 9, 1]
    harmless = {RARE: [2, 2, 2, 2], STORY: [2] * 20}
    scores = {"raw BCI": {UNSAFE: poorer, **harmless}, "span length": {UNSAFE: better, **harmless}}
    data = pd.concat(
        [frame(scores, "unsafe spans"), frame({"raw BCI": {UNSAFE: [21, 25], **harmless}}, "paper")]
    )
    table = bci_tables.decision_table(data).set_index("score")
    assert list(table.index) == ["span length (recommended)", "raw BCI", "the paper's rule"]
    assert table.loc["raw BCI", "drift refused"].startswith("0.33")
    assert table.iloc[1, -1].startswith("-0.67")
    # of two groups that are never refused, the smaller one leaves more doubt
    assert table.iloc[0]["worst harmless group"].startswith(f"{RARE}: 0.00")
    assert table.loc["the paper's rule", "threshold"] == 20
    said = bci_tables.describe_choice(data, conclusions.recommend(data))
    assert "recommends **span length** over **unsafe spans**, refusing above 5.5 tokens" in said
    assert "catches **1.00" in said
    fitted = fit_thresholds(data, conclusions.RECOMMENDATION.max_false_alarm)
    rules = [("unsafe spans", "raw BCI"), ("unsafe spans", "span length")]
    first, second = bci_tables.refused_by(data, fitted, rules).split(", s")
    assert first.startswith("raw BCI 0.33 [")
    assert second.startswith("pan length 1.00 [")


def test_nothing_to_recommend_is_said() -> None:
    data = frame({"raw BCI": {UNSAFE: [5, 5, 0, 0, 0, 0], RARE: [1, 1]}}, "paper")
    assert "Nothing is recommended" in bci_tables.describe_choice(data, conclusions.recommend(data))
    assert bci_tables.decision_table(data).loc[0, "score"] == "raw BCI (best, not recommended)"


def test_rules_stand_side_by_side() -> None:
    rows = [
        (group, measure, 0.5, 0.4, 0.6, 9) for group in (UNSAFE, STORY) for measure in ("refused", "other")
    ]
    table = pd.DataFrame(rows, columns=["group", "measure", "estimate", "low", "high", "n"])
    wide = bci_tables.refused_table([table.assign(rule="M <= 3"), table.assign(rule="any M")])
    assert list(wide.columns) == ["group", "M <= 3", "any M"]
    assert wide.loc[0, "any M"] == "0.50 [0.40,\N{NO-BREAK SPACE}0.60]"


def test_each_score_breaks_at_the_group_that_it_tells_least_from_drift() -> None:
    rows = [
        ("corpus spans", "raw BCI", STORY, 0.1),
        ("corpus spans", "raw BCI", NEWS, 0.4),
        ("corpus spans", "span length", STORY, 0.7),
        ("corpus spans", "span length", NEWS, 0.6),
    ]
    areas = pd.DataFrame(rows, columns=["filter", "scorer", "group", "estimate"])
    areas = areas.assign(low=areas["estimate"] - 0.1, high=areas["estimate"] + 0.1, n=9)
    table = bci_tables.breaks_table(areas)
    assert list(table.columns) == ["scorer", "corpus spans"]
    assert [tuple(row) for row in table.to_numpy()] == [
        ("span length", f"0.60 [0.50,\N{NO-BREAK SPACE}0.70] {NEWS}"),
        ("raw BCI", f"0.10 [0.00,\N{NO-BREAK SPACE}0.20] {STORY}"),
    ]
