"""InfiniGramIndex against TraceIndex on the same tokens, its files, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_samples import DOCUMENTS, train_tokenizer
from transformers import PreTrainedTokenizerFast

from tracealign_lib import infini_gram_format
from tracealign_lib.documents import Document
from tracealign_lib.engine import EngineError
from tracealign_lib.errors import (
    CorpusError,
    IndexFormatError,
    ModelError,
    ParameterError,
    TraceAlignError,
    VocabularyError,
)
from tracealign_lib.index import TraceIndex
from tracealign_lib.infini_gram import InfiniGramIndex, parse_metadata
from tracealign_lib.profiles import get_profile
from tracealign_lib.tracing import trace
from tracealign_lib.world import World

needs_engine = pytest.mark.skipif(
    find_spec("infini_gram") is None, reason="the package infini-gram (extra scale) is not installed"
)
QUIET = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), max_examples=40
)
WORD = st.integers(0, 2)
CORPORA = st.lists(
    st.one_of(
        st.lists(WORD, max_size=14),
        st.builds(lambda token, times: [token] * times, WORD, st.integers(0, 10)),
    ),
    min_size=1,
    max_size=7,
)
Call = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # a power cut is not what is tested, and waiting for the disk is slow
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ---------------------------------------------------------------------- the same answers


def questions(rng: random.Random, documents: list[list[int]], vocab_size: int, n: int) -> list[list[int]]:
    """Pieces of the corpus, joined, cut and mixed with chance."""
    stream = [token for document in documents for token in document] or [0]
    made = []
    for _ in range(n):
        query: list[int] = []
        for _ in range(rng.randrange(4)):
            start = rng.randrange(len(stream))
            query += stream[start : start + rng.randrange(8)]
            query += [rng.randrange(vocab_size) for _ in range(rng.randrange(2))]
        made.append(query)
    return made


def check_same(ours: TraceIndex, theirs: InfiniGramIndex, query: list[int], min_length: int) -> None:
    """Every call answers as TraceIndex does."""
    assert theirs.count(query) == ours.count(query)
    assert theirs.spans(query) == ours.spans(query)
    filtered = {"min_length": min_length, "max_count": 2}
    assert theirs.spans(query, **filtered) == ours.spans(query, **filtered)  # type: ignore[arg-type]
    for limit in (1, 3, None):
        assert theirs.locate(query, limit=limit) == ours.locate(query, limit=limit)
    for found, expected in zip(theirs.continuations(query), ours.continuations(query), strict=True):
        assert found.tolist() == expected.tolist()
    for limit in (2, None):
        found_sources = theirs.sources(query, min_length=min_length, limit=limit)
        expected_sources = ours.sources(query, min_length=min_length, limit=limit)
        assert [s[::2] for s in found_sources] == [s[::2] for s in expected_sources]
        scores = [source.score for source in found_sources]
        assert scores == pytest.approx([source.score for source in expected_sources], abs=1e-8)


def check_corpora(folder: Path, n_corpora: int, shift: int = 0) -> int:
    """Random corpora of three letters, cut into shards of random size; how many questions were compared."""
    seen: set[str] = set()

    @settings(QUIET, max_examples=n_corpora)
    @given(CORPORA, st.integers(0, 2**32 - 1), st.integers(1, 30))
    def check(documents: list[list[int]], seed: int, shard_tokens: int) -> None:
        documents = [[token + shift for token in document] for document in documents]
        vocab_size = shift + 4
        ours = TraceIndex.build_tokens(documents, folder / "ours", vocab_size=vocab_size)
        shutil.rmtree(folder / "theirs", ignore_errors=True)
        sizes = {"vocab_size": vocab_size, "shard_tokens": shard_tokens}
        theirs = InfiniGramIndex.build_tokens(documents, folder / "theirs", **sizes)
        assert (theirs.n_tokens, theirs.n_documents) == (ours.n_tokens, ours.n_documents)
        assert theirs.document_ids == ours.document_ids
        assert theirs.surprisal.tolist() == ours.surprisal.tolist()
        for number, document in enumerate(documents):
            assert theirs.document_tokens(str(number)).tolist() == document
        rng = random.Random(seed)
        for query in questions(rng, documents, vocab_size, 20):
            seen.add(repr((documents, query)))
            check_same(ours, theirs, query, rng.randrange(1, 5))

    check()
    return len(seen)


@needs_engine
def test_equals_traceindex_on_random_corpora(tmp_path: Path) -> None:
    compared = check_corpora(tmp_path, 25)
    print(f"{compared:,} distinct questions, all answered alike")
    assert compared >= 250


@needs_engine
@pytest.mark.slow
def test_equals_traceindex_on_many_random_corpora(tmp_path: Path) -> None:
    compared = check_corpora(tmp_path, 600)
    print(f"{compared:,} distinct questions, all answered alike")
    assert compared >= 6_000


@needs_engine
@pytest.mark.parametrize("vocab_size", [65_535, 65_536, 65_538])
def test_ids_of_two_and_four_bytes(tmp_path: Path, vocab_size: int) -> None:
    check_corpora(tmp_path, 3, shift=vocab_size - 4)
    index = InfiniGramIndex.open(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenized.0").stat().st_size % (2 if vocab_size == 65_535 else 4) == 0
    assert index.vocab_size == vocab_size


@pytest.fixture(scope="module")
def book() -> tuple[list[Document], PreTrainedTokenizerFast]:
    documents = World.generate(get_profile("smoke").world_settings(0)).documents
    return documents, train_tokenizer([document.text for document in documents], vocab_size=600)


@needs_engine
def test_equals_traceindex_on_the_corpus_of_the_book(
    tmp_path: Path, book: tuple[list[Document], PreTrainedTokenizerFast]
) -> None:
    documents, tokenizer = book
    ours = TraceIndex.build(documents, tokenizer, tmp_path / "ours")
    theirs = InfiniGramIndex.build(documents, tokenizer, tmp_path / "theirs", shard_tokens=5000)
    assert 1 < theirs.n_shards < len(documents)
    texts = [
        document.text[20:400] + " " + other.text[:200]
        for document, other in zip(documents[::9], documents[5::9], strict=False)
    ]
    for text in texts[:12]:
        assert theirs.encode(text).tolist() == ours.encode(text).tolist()
        check_same(ours, theirs, ours.encode(text).tolist(), 8)
        assert trace(theirs, text).to_json() == trace(ours, text).to_json()  # type: ignore[arg-type]
    for document in documents[::50]:
        assert theirs.document(document.id) == document


# ---------------------------------------------------------------------- faults of the engine


@needs_engine
def test_what_the_engine_gets_wrong_is_gone_around(tmp_path: Path) -> None:
    documents = [[1], [1, 2], [1, 2], [1, 2], [1]]
    index = InfiniGramIndex.build_tokens(documents, tmp_path / "i", vocab_size=4)
    engine = index.engine
    # all of five occurrences are said to end their document; three are followed by 2
    assert engine.ntd(prompt_ids=[1])["result_by_token_id"] == {0: {"cont_cnt": 5, "prob": 1.0}}
    assert [ids.tolist() for ids in index.continuations([1])] == [[2], [3]]
    # 1 occurs; but [1, 0] would stand before every suffix of the corpus
    index = InfiniGramIndex.build_tokens([[1, 2]], tmp_path / "j", vocab_size=4)
    assert index.engine.creativity(input_ids=[1, 0])["rs"] == [0, 1]
    assert index.spans([1, 0]) == [(0, 1, 1)]


@needs_engine
@pytest.mark.parametrize("name", ["table", "tokenized offset", "metadata [x]; ls", "a.metaoff", "unigram"])
def test_names_of_folders_that_the_engine_would_stumble_over(tmp_path: Path, name: str) -> None:
    documents = [[0] * i + [2, 1] for i in range(12)]
    index = InfiniGramIndex.build_tokens(documents, tmp_path / name, vocab_size=3, shard_tokens=1)
    assert index.n_shards == 12
    assert index.count([2, 1]) == 12
    assert [index.document_tokens(str(i)).tolist() for i in range(12)] == documents
    assert index.locate([2, 1], limit=None) == [(str(i), i) for i in range(12)]


@needs_engine
def test_parts_that_are_sorted_at_the_same_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, size) for size in rng.integers(1, 4000, 200)]
    ours = TraceIndex.build_tokens(documents, tmp_path / "ours", vocab_size=50)
    one = InfiniGramIndex.build_tokens(documents, tmp_path / "one", vocab_size=50)
    two = InfiniGramIndex.build_tokens(documents, tmp_path / "two", vocab_size=50, jobs=2)
    assert (tmp_path / "one/table.0").read_bytes() == (tmp_path / "two/table.0").read_bytes()
    for query in (documents[3][:60], rng.integers(0, 50, 60)):
        check_same(ours, two, query.tolist(), 3)
    assert one.n_tokens == two.n_tokens == ours.n_tokens


# ---------------------------------------------------------------------- texts and tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([document.text for document in DOCUMENTS])


@pytest.fixture
def built(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> InfiniGramIndex:
    return InfiniGramIndex.build(iter(DOCUMENTS), tokenizer, tmp_path / "a.index", shard_tokens=30)


@needs_engine
def test_build_keeps_documents_and_tokenizer(
    built: InfiniGramIndex, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert built.n_shards > 1
    for index in (built, InfiniGramIndex.open(built.path, tokenizer=tokenizer, verify="full")):
        assert index.document_ids == tuple(document.id for document in DOCUMENTS)
        assert [index.document(document.id) for document in DOCUMENTS] == DOCUMENTS
        index.check_tokenizer(tokenizer)
        for document in DOCUMENTS:
            assert index.document_tokens(document.id).tolist() == index.encode(document.text).tolist()
    with pytest.raises(VocabularyError, match="not the one of the index"):
        InfiniGramIndex.open(built.path, tokenizer=train_tokenizer(["other words, other words"] * 3))


@needs_engine
def test_an_index_that_infini_gram_itself_has_made(
    built: InfiniGramIndex, tokenizer: PreTrainedTokenizerFast
) -> None:
    for name in ("manifest.json", "document_ids.json"):
        (built.path / name).unlink()
    for entry in built.path.glob("metadata.*"):
        entry.write_bytes(entry.read_bytes().replace(b'"meta"', b'"etam"'))
    with pytest.raises(ParameterError, match="tokenizer"):
        InfiniGramIndex.open(built.path)
    index = InfiniGramIndex.open(built.path, tokenizer=tokenizer, verify="full", load_to_ram=True)
    assert index.document_ids == ("0", "1", "2", "3")
    document = index.document("3")
    assert document.text == DOCUMENTS[3].text
    assert document.meta["etam"] == DOCUMENTS[3].meta
    assert index.spans(index.encode("wake the Orun lantern"))[0].count >= 1


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", None, "[" * 10**6])
def test_metadata_that_is_no_object(text: str | None) -> None:
    assert parse_metadata(text) == {}


@needs_engine
def test_an_index_of_tokens_holds_no_texts(tmp_path: Path) -> None:
    index = InfiniGramIndex.build_tokens(
        [[0], [], [1]], tmp_path / "i", vocab_size=2, document_ids=["a", "b", "c"]
    )
    assert index.document_ids == ("a", "b", "c")
    assert index.locate([1]) == [("c", 0)]
    with pytest.raises(CorpusError, match="holds no texts"):
        index.document("a")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        index.encode("text")
    for bad in ("z", None, 0):
        with pytest.raises(ParameterError, match="such as 'a'"):
            index.document_tokens(bad)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- what is refused


@needs_engine
@pytest.mark.parametrize("bad", [[-1], [3], [10**6], [1.0], [True], "12", 1, [[1, 2]], [None], [2**70]])
def test_ids_outside_the_vocabulary(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(VocabularyError):
        InfiniGramIndex.build_tokens([[0], bad], tmp_path / "bad", vocab_size=3)
    assert list(tmp_path.iterdir()) == []
    index = InfiniGramIndex.build_tokens([[0, 1, 2]], tmp_path / "good", vocab_size=3)
    for query in (index.count, index.spans, index.locate, index.continuations, index.sources):
        with pytest.raises(VocabularyError):
            query(bad)


@needs_engine
@pytest.mark.parametrize(
    ("arrays", "names"), [([], None), ([], []), ([[0]], ["a", "b"]), ([[0], [0]], ["a", "a"]), ([[0]], [7])]
)
def test_a_corpus_that_cannot_be_indexed(tmp_path: Path, arrays: Any, names: Any) -> None:
    with pytest.raises(CorpusError):
        InfiniGramIndex.build_tokens(arrays, tmp_path / "i", vocab_size=1, document_ids=names)
    assert list(tmp_path.iterdir()) == []


@needs_engine
def test_what_a_build_refuses(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").touch()
    with pytest.raises(ParameterError, match="taken"):
        InfiniGramIndex.build(DOCUMENTS, tokenizer, tmp_path / "taken")
    with pytest.raises(ModelError, match="not a fast one"):
        InfiniGramIndex.build(DOCUMENTS, object(), tmp_path / "i")
    with pytest.raises(CorpusError, match="same id"):
        InfiniGramIndex.build([*DOCUMENTS, DOCUMENTS[0]], tokenizer, tmp_path / "i")
    with pytest.raises(CorpusError, match="cannot be stored"):
        InfiniGramIndex.build([Document("a", "lone \ud800")], tokenizer, tmp_path / "i")
    for sizes in ({"vocab_size": 2**32}, {"vocab_size": 0}, {"vocab_size": 2, "jobs": 0}):
        with pytest.raises(ParameterError):
            InfiniGramIndex.build_tokens([[0]], tmp_path / "i", **sizes)
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


@needs_engine
def test_an_indexer_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infini_gram_format, "_pointer_width", lambda size: 99)
    with pytest.raises(EngineError, match="indexer has failed"):
        InfiniGramIndex.build_tokens([[0, 1]], tmp_path / "i", vocab_size=2)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "infini_gram.engine", None)
    with pytest.raises(EngineError, match=r"pip install -e .*\[scale\]"):
        InfiniGramIndex.build_tokens([[0]], tmp_path / "i", vocab_size=1)
    with pytest.raises(EngineError, match="not installed"):
        InfiniGramIndex.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- damage


def damage(rng: random.Random, folder: Path) -> str:
    """Cut, lengthen, remove, swap or change one file."""
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file())
    entry, kind = rng.choice(entries), rng.choice(["cut", "lengthen", "remove", "swap", "flip", "fill"])
    content = bytearray(entry.read_bytes())
    if kind == "remove":
        entry.unlink()
    elif kind == "swap":
        other = rng.choice(entries)
        content, changed = bytearray(other.read_bytes()), content
        other.write_bytes(changed)
        entry.write_bytes(content)
    else:
        place = rng.randrange(len(content))
        if kind == "cut":
            content = content[:place]
        elif kind == "lengthen":
            content += content[:place]
        elif kind == "flip":
            content[place] ^= 1 << rng.randrange(8)
        else:
            content[place:] = b"\xff" * (len(content) - place)
        entry.write_bytes(content)
    return f"{kind} {entry.name}"


@needs_engine
def test_damage_is_found(built: InfiniGramIndex, tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = {entry.name: entry.read_bytes() for entry in built.path.iterdir() if entry.is_file()}
    refused = 0
    for number in range(100):
        folder = tmp_path / f"damaged-{number}"
        shutil.copytree(built.path, folder)
        what = damage(rng, folder)
        same = whole == {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
        try:
            index = InfiniGramIndex.open(folder, verify="full")
            assert index.document_ids == built.document_ids
        except IndexFormatError:
            refused += 1
        except ParameterError:  # without a manifest, the tokenizer is asked for
            refused += what == "remove manifest.json"
        else:
            assert same or what.endswith("manifest.json"), what
        shutil.rmtree(folder)
    print(f"{refused} of 100 damaged folders refused")
    assert refused >= 65


@needs_engine
def test_pointers_out_of_the_shard_are_found_without_a_manifest(
    built: InfiniGramIndex, tokenizer: PreTrainedTokenizerFast
) -> None:
    (built.path / "manifest.json").unlink()
    table = built.path / "table.1"
    content = table.read_bytes()
    for bad in (b"\xfe", b"\x03"):  # behind the end; into a token
        table.write_bytes(content[:-1] + bad)
        with pytest.raises(IndexFormatError, match="points outside"):
            InfiniGramIndex.open(built.path, tokenizer=tokenizer, verify="full")


@needs_engine
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [("metaoff.0", 0, 5), ("metaoff.0", 8, 10**6), ("offset.0", 8, 10**6), ("offset.0", 8, 3)],
)
def test_offsets_that_do_not_rise(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, place: int, value: int
) -> None:
    built = InfiniGramIndex.build(DOCUMENTS, tokenizer, tmp_path / "a")
    (built.path / "manifest.json").unlink()
    file = built.path / name
    content = bytearray(file.read_bytes())
    content[place : place + 8] = value.to_bytes(8, "little")
    file.write_bytes(content)
    with pytest.raises(IndexFormatError, match=file.name):
        InfiniGramIndex.open(built.path, tokenizer=tokenizer, verify="full")


@needs_engine
def test_folders_that_are_no_index(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(IndexFormatError, match="no such folder"):
        InfiniGramIndex.open(tmp_path / "nothing")
    with pytest.raises(IndexFormatError, match="shards"):
        InfiniGramIndex.open(tmp_path, tokenizer=tokenizer)
    with pytest.raises(ParameterError, match="'maybe'"):
        InfiniGramIndex.open(tmp_path, verify="maybe")
    index = TraceIndex.build(DOCUMENTS, tokenizer, tmp_path / "ours")
    with pytest.raises(IndexFormatError, match=r"manifest\.json is not one"):
        InfiniGramIndex.open(index.path)
    for content in ("[]", "{", json.dumps({"magic": infini_gram_format.MAGIC, "version": 1})):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(TraceAlignError):
            InfiniGramIndex.open(tmp_path)
