"""Shards built and searched by two workers of a Ray cluster answer as those of this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from index_samples import DOCUMENTS, small_index, train_tokenizer

from tracealign_lib.documents import Document
from tracealign_lib.engine import EngineError
from tracealign_lib.errors import CorpusError, IndexFormatError
from tracealign_lib.ray_shards import RayShards, RayWorkers
from tracealign_lib.sharded import ShardedIndex
from tracealign_lib.tracing import trace


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match="scale"):
        RayShards([])
    with pytest.raises(EngineError, match="scale"):
        RayWorkers()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="the extra scale is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_workers_build_and_search_as_one_process(cluster: Any, tmp_path: Path) -> None:
    documents = [*DOCUMENTS, *(Document(f"c{i}", f"{DOCUMENTS[i % 2].text}, {i} times") for i in range(6))]
    tokenizer = train_tokenizer([document.text for document in documents])
    here = ShardedIndex.build(documents, tokenizer, tmp_path / "here", shard_bytes=120)
    with RayWorkers(2) as workers:
        ShardedIndex.build(documents, tokenizer, tmp_path / "there", shard_bytes=120, workers=workers)
    for path in (tmp_path / "here").rglob("*.npy"):
        there = tmp_path / "there" / path.relative_to(tmp_path / "here")
        assert there.read_bytes() == path.read_bytes(), path.name
    index = ShardedIndex.open(tmp_path / "there", shards=RayShards)
    assert index.n_shards > 2
    for text in (DOCUMENTS[0].text, f"so {DOCUMENTS[1].text} 3 times", "unknown"):
        ids = here.encode(text)
        assert index.spans(ids) == here.spans(ids)
        assert index.sources(ids, min_length=3, limit=None) == here.sources(ids, min_length=3, limit=None)
        assert index.locate(ids[:3], limit=None) == here.locate(ids[:3], limit=None)
        assert [a.tolist() for a in index.continuations(ids)] == [a.tolist() for a in here.continuations(ids)]
        assert trace(index, text).to_json() == trace(here, text).to_json()


@pytest.mark.slow
def test_errors_of_workers_keep_their_names(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(IndexFormatError):
        RayShards([tmp_path / "nowhere"])
    tokenizer = train_tokenizer([document.text for document in DOCUMENTS])
    with pytest.raises(CorpusError, match="cannot be stored"), RayWorkers(1) as workers:
        ShardedIndex.build([Document("half", "\ud800")], tokenizer, tmp_path / "parts", workers=workers)


@pytest.mark.slow
def test_a_worker_that_died_is_named(cluster: Any, tmp_path: Path) -> None:
    shards = RayShards([small_index(tmp_path / "a").path])
    shards.ask("sizes")
    shards.close()
    asked = (shards.ask("sizes") for _ in range(1000))  # the cluster ends an actor a moment later
    with pytest.raises(EngineError, match="worker"):
        list(asked)
