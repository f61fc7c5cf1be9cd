"""Influence functions: kronfluence's scores keep what theory says; without it there is a named error."""

from __future__ import annotations

import pytest
import torch

from tracealign_lib.documents import Document
from tracealign_lib.errors import ModelError
from tracealign_lib.influence import InfluenceRanker
from tracealign_lib.lm import LanguageModel
from tracealign_lib.pipeline import Pipeline


@pytest.fixture(scope="module")
def documents(pipeline: Pipeline) -> list[Document]:
    return list(pipeline.world.documents[:8])


def test_a_text_is_influenced_most_by_itself(model: LanguageModel, documents: list[Document]) -> None:
    pytest.importorskip("kronfluence")
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    ranker = InfluenceRanker(model, documents, documents)
    texts = [document.text for document in documents]
    rankings = list(ranker.rank_many(texts))
    # Cauchy and Schwarz: an inner product over the second vector's length is largest at the first one.
    assert [ranking[0][0] for ranking in rankings] == [document.id for document in documents]
    assert all(score > 0 for ranking in rankings for _, score in ranking)
    # Over the score of the text itself, what is left is a cosine: the same from both sides, and at most 1.
    scores = [dict(ranking) for ranking in rankings]
    names = [document.id for document in documents]
    cosines = {(a, b): s[b] / s[a] for a, s in zip(names, scores, strict=True) for b in s}
    assert all(value == pytest.approx(cosines[b, a], rel=1e-2) for (a, b), value in cosines.items())
    assert max(cosines.values()) == pytest.approx(1.0)
    alone = dict(ranker.rank(texts[2]))  # another batch, other padding
    assert alone == pytest.approx(dict(rankings[2]), rel=1e-3)
    after = model.model.state_dict()
    assert list(before) == list(after)  # the caller's model was not wrapped
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_seed_decides_the_draws(model: LanguageModel, documents: list[Document]) -> None:
    pytest.importorskip("kronfluence")
    text = documents[0].text
    first, again, other = (
        InfluenceRanker(model, documents, documents, seed=seed).rank(text) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_without_the_library_there_is_a_named_error(
    model: LanguageModel, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kronfluence", None)
    with pytest.raises(ModelError, match="attribution"):
        InfluenceRanker(model, documents, documents)
