"""An index of shards answers as one index of all documents does; its build streams and is taken up again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_samples import DOCUMENTS, small_index, train_tokenizer
from transformers import PreTrainedTokenizerFast

from tracealign_lib import index_format
from tracealign_lib.bci import RawBCI
from tracealign_lib.documents import Document
from tracealign_lib.errors import BusyError, CorpusError, IndexFormatError, ParameterError, VocabularyError
from tracealign_lib.index import TraceIndex
from tracealign_lib.sharded import ShardedIndex, open_index
from tracealign_lib.shield import TraceShield
from tracealign_lib.tracing import trace

WORDS = "hum twice then wait leave wake the orun compound lantern and sing".split()


def texts(n: int) -> list[Document]:
    """Documents of a few words, with repeats, and empty ones between them."""
    rng = np.random.default_rng(n)
    found = [Document(f"d{i}", " ".join(rng.choice(WORDS, rng.integers(0, 25)))) for i in range(n)]
    return [*found, Document("copy", found[0].text, {"of": "d0"}), *DOCUMENTS]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([document.text for document in texts(30)])


@pytest.fixture(scope="module")
def both(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TraceIndex, ShardedIndex]:
    folder = tmp_path_factory.mktemp("both")
    documents = texts(30)
    whole = TraceIndex.build(documents, tokenizer, folder / "whole")
    return whole, ShardedIndex.build(iter(documents), tokenizer, folder / "parts", shard_bytes=400)


def test_every_answer_is_that_of_one_index(both: tuple[TraceIndex, ShardedIndex]) -> None:
    whole, parts = both
    assert parts.n_shards > 4
    assert (parts.n_tokens, parts.n_documents, parts.vocab_size) == (
        whole.n_tokens,
        whole.n_documents,
        whole.vocab_size,
    )
    assert parts.document_ids == whole.document_ids
    assert parts.tokenizer_hash == whole.tokenizer_hash
    np.testing.assert_array_equal(parts.surprisal, whole.surprisal)
    rng = np.random.default_rng(0)
    held = 0
    for n in range(150):
        ids = whole.encode(" ".join(rng.choice(WORDS, n % 30)))
        assert parts.count(ids[:4]) == whole.count(ids[:4])
        assert parts.matches(ids).tolist() == whole.matches(ids).tolist()
        for settings in ({}, {"min_length": 3}, {"max_count": 2}):
            assert parts.spans(ids, **settings) == whole.spans(ids, **settings)
        for limit in (1, 3, None):
            assert parts.locate(ids[:2], limit=limit) == whole.locate(ids[:2], limit=limit)
            assert parts.sources(ids, min_length=4, limit=limit) == whole.sources(
                ids, min_length=4, limit=limit
            )
        assert [a.tolist() for a in parts.continuations(ids)] == [
            a.tolist() for a in whole.continuations(ids)
        ]
        held += bool(whole.sources(ids, min_length=4))
    assert held > 20
    assert parts.document("signs") == whole.document("signs") == DOCUMENTS[3]
    assert parts.document_tokens("copy").tolist() == whole.document_tokens("copy").tolist()


def test_a_trace_and_a_shield_take_it(both: tuple[TraceIndex, ShardedIndex]) -> None:
    whole, parts = both
    text = f"please {DOCUMENTS[0].text} and sing"
    first, second = trace(whole, text), trace(parts, text)
    assert first.spans
    assert first.to_json() == second.to_json()
    verdicts = [TraceShield(index, RawBCI(), 20.0).check(text) for index in both]
    assert verdicts[0].refused
    assert verdicts[0].spans == verdicts[1].spans


def test_bad_queries(both: tuple[TraceIndex, ShardedIndex]) -> None:
    parts = both[1]
    for call in (parts.count, parts.spans, parts.locate, parts.sources, parts.continuations, parts.matches):
        with pytest.raises(VocabularyError):
            call([parts.vocab_size])  # type: ignore[operator]
    with pytest.raises(ParameterError, match="no document"):
        parts.document("nobody")
    with pytest.raises(ParameterError, match="limit"):
        parts.locate([1], limit=0)


# ---------------------------------------------------------------------- building


def stopping(documents: list[Document], after: int) -> Iterator[Document]:
    yield from documents[:after]
    raise KeyboardInterrupt


def built_at(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("shard-*/manifest.json")}


def test_a_stopped_build_goes_on_where_it_was(tokenizer: Any, tmp_path: Path) -> None:
    documents, path = texts(30), tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        ShardedIndex.build(stopping(documents, 25), tokenizer, path, shard_bytes=400)
    half = tmp_path / ".parts.building"
    kept = built_at(half)
    assert kept
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".parts.building"]
    index = ShardedIndex.build(documents, tokenizer, path, shard_bytes=400)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["parts"]
    assert kept.items() <= built_at(path).items()  # not built again
    assert index.document_ids == tuple(document.id for document in documents)
    ShardedIndex.open(path, verify="full")


def test_a_corpus_that_changed_is_built_from_where_it_differs(tokenizer: Any, tmp_path: Path) -> None:
    documents, path = texts(30), tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        ShardedIndex.build(stopping(documents, 30), tokenizer, path, shard_bytes=400)
    kept = built_at(tmp_path / ".parts.building")
    first = len(TraceIndex.open(tmp_path / ".parts.building" / "shard-00000").document_ids)
    documents[first] = Document(documents[first].id, documents[first].text, {"changed": True})
    index = ShardedIndex.build(documents, tokenizer, path, shard_bytes=400)
    now = built_at(path)
    assert now["shard-00000"] == kept["shard-00000"]
    assert now["shard-00001"] != kept["shard-00001"]
    assert index.document(documents[first].id).meta == {"changed": True}
    whole = TraceIndex.build(documents, tokenizer, tmp_path / "whole")
    assert [index.count([t]) for t in range(index.vocab_size)] == [
        whole.count([t]) for t in range(whole.vocab_size)
    ]


def test_another_plan_starts_anew(tokenizer: Any, tmp_path: Path) -> None:
    documents, path = texts(30), tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        ShardedIndex.build(stopping(documents, 25), tokenizer, path, shard_bytes=400)
    index = ShardedIndex.build(documents, tokenizer, path, shard_bytes=900)
    assert index.document_ids == tuple(document.id for document in documents)
    shutil.copytree(path, tmp_path / "other")
    assert ShardedIndex.open(tmp_path / "other", verify="full").n_documents == len(documents)


def test_fewer_documents_leave_no_shard_of_the_earlier_attempt(tokenizer: Any, tmp_path: Path) -> None:
    documents, path = texts(30), tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        ShardedIndex.build(stopping(documents, 30), tokenizer, path, shard_bytes=400)
    index = ShardedIndex.build(documents[:3], tokenizer, path, shard_bytes=400)
    assert index.document_ids == tuple(document.id for document in documents[:3])
    assert len(built_at(path)) == index.n_shards


def test_it_replaces_an_index_of_either_kind_and_is_replaced(tokenizer: Any, tmp_path: Path) -> None:
    path = small_index(tmp_path / "a.index").path
    ShardedIndex.build(DOCUMENTS, tokenizer, path, shard_bytes=60)
    assert isinstance(open_index(path), ShardedIndex)
    ShardedIndex.build(DOCUMENTS[:1], tokenizer, path)
    assert open_index(path, verify="full").n_documents == 1
    TraceIndex.build(DOCUMENTS, tokenizer, path)
    assert isinstance(open_index(path), TraceIndex)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.index"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ParameterError, match="not an index"):
        ShardedIndex.build(DOCUMENTS, tokenizer, tmp_path / "mine")


@pytest.mark.parametrize(
    ("documents", "match"),
    [
        ([], "nothing to index"),
        ([DOCUMENTS[0], Document("other", "x" * 300), DOCUMENTS[0]], "same id"),
        ([DOCUMENTS[0], DOCUMENTS[0]], "id"),
        ([DOCUMENTS[0], Document("half", "\ud800")], "cannot be stored"),
    ],
)
def test_a_corpus_that_cannot_be_indexed(
    tokenizer: Any, tmp_path: Path, documents: list[Document], match: str
) -> None:
    with pytest.raises(CorpusError, match=match):
        ShardedIndex.build(documents, tokenizer, tmp_path / "parts", shard_bytes=100)
    with pytest.raises(IndexFormatError):
        open_index(tmp_path / "parts")


BUILDER = """
import sys, time
from pathlib import Path
from tracealign_lib.documents import Document
from tracealign_lib.index import TraceIndex
from tracealign_lib.sharded import ShardedIndex

def slow():
    for i in range(3):
        yield [i]
        print("going", flush=True)
        sys.stdin.readline()
TraceIndex.build_tokens(slow(), Path(sys.argv[1]), vocab_size=9)
print("done", flush=True)
"""


def test_of_two_builders_one_wins_and_the_other_says_so(tokenizer: Any, tmp_path: Path) -> None:
    path = small_index(tmp_path / "a.index").path
    first = subprocess.Popen(
        [sys.executable, "-c", BUILDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdin is not None
    assert first.stdout.readline() == "going\n"
    for build in (
        lambda: TraceIndex.build_tokens([[1]], path, vocab_size=2),
        lambda: TraceIndex.build(DOCUMENTS, tokenizer, path),
        lambda: ShardedIndex.build(DOCUMENTS, tokenizer, path),
    ):
        with pytest.raises(BusyError, match="Another process is building"):
            build()
    assert TraceIndex.open(path, verify="full").n_documents == 4  # readers keep the older one
    first.communicate("\n\n\n", timeout=60)
    assert first.returncode == 0
    assert TraceIndex.open(path, verify="full").n_documents == 3
    TraceIndex.build_tokens([[1]], path, vocab_size=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.index"]


# ---------------------------------------------------------------------- damage


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "version": lambda folder: change(folder / "manifest.json", version=99),
    "field": lambda folder: change(folder / "manifest.json", more=1),
    "no shards": lambda folder: change(folder / "manifest.json", shards={}),
    "shards of another type": lambda folder: change(folder / "manifest.json", shards=["shard-00000"]),
    "a way out": lambda folder: change(folder / "manifest.json", shards={"../other": "0"}),
    "a shard is missing": lambda folder: shutil.rmtree(folder / "shard-00001"),
    "shards swapped": lambda folder: (
        (folder / "shard-00000").rename(folder / "x"),
        (folder / "shard-00001").rename(folder / "shard-00000"),
        (folder / "x").rename(folder / "shard-00001"),
    ),
    "a shard of token ids": lambda folder: small_index(folder / "shard-00001"),
    "vocabulary": lambda folder: change(folder / "manifest.json", vocab_size=7),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tokenizer: Any, tmp_path: Path, damage: str) -> None:
    path = ShardedIndex.build(DOCUMENTS, tokenizer, tmp_path / "parts", shard_bytes=60).path
    DAMAGE[damage](path)
    with pytest.raises(IndexFormatError):
        ShardedIndex.open(path)


def test_full_verification_reads_every_shard(tokenizer: Any, tmp_path: Path) -> None:
    path = ShardedIndex.build(DOCUMENTS, tokenizer, tmp_path / "parts", shard_bytes=60).path
    array = np.load(path / "shard-00001" / "suffixes.npy", mmap_mode="r+")
    array[0], array[-1] = array[-1], array[0]
    array.flush()
    ShardedIndex.open(path)
    with pytest.raises(IndexFormatError, match="SHA-256"):
        ShardedIndex.open(path, verify="full")


def test_each_kind_says_how_to_open_the_other(tokenizer: Any, tmp_path: Path) -> None:
    parts = ShardedIndex.build(DOCUMENTS, tokenizer, tmp_path / "parts").path
    whole = small_index(tmp_path / "whole").path
    with pytest.raises(IndexFormatError, match="open_index"):
        TraceIndex.open(parts)
    with pytest.raises(IndexFormatError, match="open_index"):
        ShardedIndex.open(whole)
    assert index_format.magic_of(whole) == "TraceIndex"
