"""Scores of chapter 4 on a smoke world against `max_bci`, text by text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from bci_samples import answered_pipeline

from tracealign_lib.bci import Membership, RawBCI, SpanLength, max_bci
from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments import bci_detection, bci_scores, bci_texts
from tracealign_lib.experiments.bci_scores import FILTERS, LIFT, NEEDS, SpanFilter
from tracealign_lib.experiments.bci_texts import BENIGN, UNSAFE
from tracealign_lib.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with answered_pipeline(tmp_path_factory.mktemp("cache")) as pipeline:
        yield pipeline


def test_collections_hold_what_their_names_say(pipeline: Pipeline) -> None:
    kinds = {
        name: {index.document(d).meta["kind"] for d in index.document_ids}
        for name in ("benign", "policy", "rules")
        for index in [bci_scores.collection_index(pipeline, name)]
    }
    assert kinds["rules"] == {"policy"}
    assert kinds["policy"] == {"policy", "permit"}
    assert "recipe" in kinds["benign"]
    with pytest.raises(ParameterError, match="Unknown collection"):
        bci_scores.collection_index(pipeline, "secret")


@pytest.mark.parametrize("name", FILTERS)
def test_the_score_of_a_text_is_its_largest(pipeline: Pipeline, name: str) -> None:
    texts = bci_texts.planted_texts(pipeline)[::7]
    chosen = FILTERS[name]
    index = pipeline.unsafe_index if chosen.collection == "unsafe" else pipeline.index
    rows = bci_scores.score_frame(texts, index, {"raw BCI": RawBCI()}, chosen)
    limits = {"min_length": chosen.min_length, "max_count": chosen.max_count, "window": chosen.window}
    expected = [max_bci(index, index.encode(t.text), RawBCI(), **limits) for t in texts]
    assert rows["score"].tolist() == pytest.approx(expected)
    assert len(set(expected)) > 2
    assert ((rows["spans"] == 0) == np.isneginf(rows["score"])).all()


def test_one_scorer_for_each_text_is_used_for_its_text(pipeline: Pipeline) -> None:
    texts = [text for text in bci_texts.planted_texts(pipeline) if text.group == UNSAFE][:3]
    own = [RawBCI(), SpanLength(), Membership(1)]
    rows = bci_scores.score_frame(texts, pipeline.index, {"own": own}, FILTERS["corpus spans"])
    length = len(pipeline.index.encode(texts[1].text))
    assert rows["score"].tolist()[1:] == [length, 1]


def test_every_score_is_measured_under_every_filter(pipeline: Pipeline) -> None:
    frame = bci_scores.scored([pipeline])
    assert set(frame["scorer"]) == set(NEEDS)
    assert set(frame["filter"]) == set(FILTERS)
    assert frame["score"].notna().all()
    table = bci_detection.auroc_table(frame)
    assert len(table) == len(NEEDS) * len(FILTERS) * len(BENIGN)
    unlifted = bci_scores.scored([pipeline], bci_texts.planted_texts, model=None)
    assert LIFT not in set(unlifted["scorer"])


def test_the_papers_filter_is_written_down() -> None:
    assert SpanFilter("unsafe", 8, 3, 8) == FILTERS["paper"]
