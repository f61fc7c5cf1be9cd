"""Corpora are read from what people have, and a bad one is refused with the file and line."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib.documents import Document, check_documents, read_documents, write_documents
from tracealign_lib.errors import CorpusError, TraceAlignError
from tracealign_lib.progress import progress

LINE = json.dumps({"id": "a", "text": "soak the amber thread", "meta": {"collection": "benign"}})


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.integers()), min_size=1))
def test_any_text_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]
) -> None:
    documents = [Document(f"d{i}", text, {"n": n}) for i, (text, n) in enumerate(rows)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_documents(documents, path)
    assert read_documents(path) == documents


def test_a_gzipped_file_reads_like_a_plain_one(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(f"{LINE}\n\n", encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(LINE.encode()))
    assert read_documents(tmp_path / "c.jsonl") == read_documents(tmp_path / "c.jsonl.gz")


def test_a_folder_gives_its_texts_in_order_with_relative_ids(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/two.txt", "a.md", "ignored.bin"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert [(d.id, d.text) for d in read_documents(tmp_path)] == [
        ("a.md", "a.md"),
        ("b/two.txt", "b/two.txt"),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "corpus is empty"),
        (b"\n \n", "corpus is empty"),
        (LINE.encode() + b"\n" + LINE.encode(), "same id"),
        (LINE.encode() + b"\n{", "line 2"),
        (b'{"id": 1, "text": "x"}', "lacks a field"),
        (b'{"id": "a"}', "lacks a field"),
        (b'{"id": "a", "text": "x", "meta": []}', "lacks a field"),
        (b"[1, 2]", "lacks a field"),
        (b"[" * 100_000, "not JSON"),
        ("caf\xe9".encode("latin1"), "byte 3 is 0xe9"),
    ],
)
def test_a_bad_file_is_refused_with_what_to_mend(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(CorpusError, match=said) as caught:
        read_documents(tmp_path / "c.jsonl")
    assert "to mend" in str(caught.value)


def test_a_cut_gzip_file_a_missing_path_and_a_non_utf8_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(LINE.encode() * 50)[:-9])
    with pytest.raises(CorpusError, match="decompressed"):
        read_documents(tmp_path / "c.jsonl.gz")
    with pytest.raises(CorpusError, match="does not exist"):
        read_documents(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match=r"x\.txt"):
        read_documents(tmp_path / "folder")


def test_the_position_of_a_duplicate_is_named() -> None:
    with pytest.raises(CorpusError, match="'a', again at position 1"):
        check_documents([Document("a", "x"), Document("a", "y")])


def test_an_error_carries_its_parts() -> None:
    error = TraceAlignError("It broke.", given=3, expected="a word", mend="pass a word")
    assert str(error).splitlines() == [
        "It broke.",
        "  given:    3",
        "  expected: a word",
        "  to mend:  pass a word",
    ]
    assert str(TraceAlignError("It broke.")) == "It broke."


def test_progress_is_silent_when_piped_and_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACEALIGN_PROGRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # that somebody has imported it makes no notebook
    assert progress([1], description="x").disable
    notebook = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", notebook())
        assert not progress([1], description="x").disable
    monkeypatch.setenv("TRACEALIGN_PROGRESS", "1")
    assert not progress([1], description="x").disable
    monkeypatch.setenv("TRACEALIGN_PROGRESS", "0")
    assert list(progress([1, 2], description="x")) == [1, 2]
