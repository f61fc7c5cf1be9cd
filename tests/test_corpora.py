"""Corpora are read as streams from what people have; what cannot be read is refused with file and line."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib import corpora
from tracealign_lib.corpora import Columns, HubPart, read_corpus
from tracealign_lib.documents import Document
from tracealign_lib.errors import CorpusError, ParameterError, TraceAlignError

RECORDS = [{"id": "a", "text": "soak the thread", "meta": {"collection": "web"}}, {"text": "x", "url": "u"}]
DOCUMENTS = [
    Document("a", "soak the thread", {"file": "c.jsonl", "collection": "web"}),
    Document("c.jsonl:2", "x", {"file": "c.jsonl"}),
]


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def zstd(raw: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(raw, asbytes=True))


def refused(path: str | Path, **options: Any) -> CorpusError:
    with pytest.raises(CorpusError) as caught:
        list(read_corpus([path], **options))
    assert caught.value.given
    assert caught.value.expected
    assert caught.value.mend
    return caught.value


# --- formats


@pytest.mark.parametrize(
    ("name", "pack"), [("c.jsonl", bytes), ("c.jsonl.gz", gzip.compress), ("c.jsonl.zst", zstd)]
)
def test_json_lines_read_alike_packed_or_not(tmp_path: Path, name: str, pack: Any) -> None:
    (tmp_path / name).write_bytes(pack(lines(RECORDS)))
    expected = [Document(d.id.replace("c.jsonl", name), d.text, {**d.meta, "file": name}) for d in DOCUMENTS]
    assert list(read_corpus([tmp_path / name])) == expected


def test_members_of_a_packed_file_follow_each_other(tmp_path: Path) -> None:
    for name, pack in (("c.jsonl.gz", gzip.compress), ("c.jsonl.zst", zstd)):
        (tmp_path / name).write_bytes(b"".join(pack(lines([record])) for record in RECORDS))
        assert [d.text for d in read_corpus([tmp_path / name])] == ["soak the thread", "x"]


def test_parquet_gives_rows_and_leaves_other_columns_alone(tmp_path: Path) -> None:
    broken = pyarrow.array([b"\xff", b"\xff"], pyarrow.binary()).view(pyarrow.string())  # must not be read
    table = pyarrow.table({"n": [7, 8], "body": ["one", "two"], "licence": ["mit", None], "other": broken})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    columns = Columns(text="body", id="n", meta=("licence",))
    assert list(read_corpus([tmp_path / "c.parquet"], columns=columns)) == [
        Document("7", "one", {"file": "c.parquet", "licence": "mit"}),
        Document("8", "two", {"file": "c.parquet", "licence": None}),
    ]
    assert [d.id for d in read_corpus([tmp_path / "c.parquet"], columns=Columns(text="body"))] == [
        "c.parquet:1",
        "c.parquet:2",
    ]


def make_folder(folder: Path) -> Path:
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "two.txt").write_text("two", encoding="utf-8")
    (folder / "one.md").write_bytes("\ufeffone".encode())
    (folder / "code.py").write_text("code", encoding="utf-8")
    (folder / "more.jsonl").write_bytes(lines([{"text": "line"}]))
    (folder / "three.txt.gz").write_bytes(gzip.compress(b"three"))
    return folder


def test_a_folder_gives_its_files_in_order(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "docs")
    read = [(d.id, d.text) for d in read_corpus([folder])]
    assert read == [
        ("b/two.txt", "two"),
        ("more.jsonl:1", "line"),
        ("one.md", "one"),
        ("three.txt.gz", "three"),
    ]


def test_patterns_choose_files_and_make_them_text(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "docs")
    assert [d.id for d in read_corpus([folder], patterns=["*.py", "b/*"])] == ["b/two.txt", "code.py"]
    assert [d.text for d in read_corpus([folder / "code.py"], patterns=["*.py"])] == ["code"]


def test_names_of_several_folders_are_told_apart(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / name) for name in ("x", "y")]
    ids = [d.id for d in read_corpus(folders, patterns=["*.py"])]
    assert ids == ["x/code.py", "y/code.py"]


def test_a_data_set_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*path: Any, **options: Any) -> Iterator[Any]:
        asked.append((path, options))
        return iter([{"content": "first"}, {"content": "second", "id": 9}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = list(read_corpus(["hub:owner/set"], columns=Columns("content"), part=HubPart("en", "test")))
    assert asked == [(("owner/set", "en"), {"split": "test", "streaming": True})]
    assert [(d.id, d.text) for d in found] == [("owner/set:1", "first"), ("9", "second")]
    assert found[0].meta == {"file": "hub:owner/set"}


def test_a_local_data_set_goes_through_the_same_library(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines([{"text": "a"}, {"text": "b"}]))
    assert [d.text for d in read_corpus([f"hub:{tmp_path}"])] == ["a", "b"]


def test_a_data_set_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    error = refused("hub:owner/set")
    assert error.given == "hub:owner/set, train: ConnectionError: no network"


# --- laziness


def test_nothing_is_read_before_it_is_asked_for_and_nothing_is_held(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with open(path, "wb") as file:
        for _ in range(2000):
            file.write(lines([{"text": "x" * 10_000}]))
    tracemalloc.start()
    read = read_corpus([path])
    first = next(read)
    rest = sum(len(document.text) for document in read)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(first.text) + rest == 20_000_000
    assert peak < 2_000_000


def test_paths_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(RECORDS))
    with pytest.raises(CorpusError, match=r"nothing\.jsonl"):
        read_corpus([tmp_path / "c.jsonl", tmp_path / "nothing.jsonl"])
    with pytest.raises(ParameterError, match="No corpus"):
        read_corpus([])


@pytest.mark.parametrize("name", ["picture.png", "empty"])
def test_what_has_no_known_format_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    assert "known format" in refused(tmp_path / name).problem


# --- bad input


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names of files")
def test_a_file_whose_name_is_not_utf_8_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "fine.txt").write_text("fine", encoding="utf-8")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("text", encoding="utf-8")
    bad: list[CorpusError] = []
    assert [document.id for document in read_corpus([tmp_path], on_bad=bad.append)] == ["fine.txt"]
    assert ["U+DCFF" in str(error.given) for error in bad] == [True]


BAD_LINES = [
    (b"{", "line 2", "not JSON"),
    (b"[" * 100_000, "line 2", "not JSON"),
    (b"1" * 5_000, "line 2", "not JSON"),
    (b"[1]", "line 2: list", "cannot be used"),
    (b'{"txt": "x"}', 'no "text" among its fields: txt', "cannot be used"),
    (b'{"text": 5}', '"text" is 5', "cannot be used"),
    (b'{"text": "x", "id": true}', '"id" is True', "cannot be used"),
    (b'{"text": "a\\ud800"}', "U+D800", "cannot be used"),
    (b'{"text": "a", "id": "\\udfff"}', "U+DFFF", "cannot be used"),
    (b'{"text": "a", "meta": {"m": "\\ud801"}}', "U+D801", "cannot be used"),
    (b'{"text": "caf\xe9"}', "byte 13 is 0xe9", "not UTF-8"),
    (b'{"text": "' + b"x" * 200 + b'"}', "line 2", "too long"),
]


@pytest.mark.parametrize(("bad", "given", "problem"), BAD_LINES)
def test_a_bad_line_is_named_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes, given: str, problem: str
) -> None:
    if problem == "too long":
        monkeypatch.setattr(corpora, "LONGEST", 100)
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + bad + b'\n\n{"text": "last"}')
    error = refused(path)
    assert problem in error.problem
    assert given in str(error.given)
    assert str(path) in str(error.given)
    told: list[CorpusError] = []
    assert [d.text for d in read_corpus([path], on_bad=told.append)] == ["first", "last"]
    assert [str(one) for one in told] == [str(error)]


def test_a_line_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "LONGEST", 100_000)
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 50_000_000))
    tracemalloc.start()
    assert "too long" in refused(path).problem
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_bad_text_files_and_rows_are_left_out_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "LONGEST", 100)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("long " * 50, encoding="utf-8")
    (tmp_path / "c.txt").write_text("kept", encoding="utf-8")
    raw = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw, "at": [1, 2]}), tmp_path / "d.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["x"], "meta": [{"at": b"bytes"}]}), tmp_path / "e.parquet"
    )
    told: list[CorpusError] = []
    kept = [d.text for d in read_corpus([tmp_path], on_bad=told.append)]
    assert kept == ["kept", "fine"]
    assert [str(error.given).split(str(tmp_path))[1][:15] for error in told] == [
        "/a.txt: byte 3 ",
        "/b.txt",
        "/d.parquet, row",
        "/e.parquet, row",
    ]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "c.parquet")
    error = refused(tmp_path / "c.parquet", columns=Columns(meta=("url",)), on_bad=print)
    assert str(error.given).endswith("c.parquet with body")
    assert error.expected == "text, url"


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst", "c.parquet"])
@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_a_damaged_file_is_a_named_error_or_documents(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / name
    texts = [f"document {i} of a corpus" for i in range(20)]
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_bytes({"gz": gzip.compress, "zst": zstd}[name[8:]](lines([{"text": t} for t in texts])))
    raw = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw = raw[:place]
    else:
        raw[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        read = [document.text for document in read_corpus([path])]
    except TraceAlignError:
        return
    assert all(isinstance(text, str) for text in read)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.text(st.characters(codec=None)).map(lambda text: json.loads(json.dumps(text))), max_size=6)
)
def test_every_text_is_read_unchanged_or_refused(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("any") / "c.jsonl"
    path.write_bytes(lines([{"text": text} for text in texts]))
    told: list[CorpusError] = []
    kept = [document.text for document in read_corpus([path], on_bad=told.append)]
    sound = [text for text in texts if not any("\ud800" <= letter <= "\udfff" for letter in text)]
    assert kept == sound
    assert len(told) == len(texts) - len(sound)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_documents_or_named_errors(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    for name in ("c.jsonl", "c.txt"):
        path = tmp_path_factory.mktemp("bytes") / name
        path.write_bytes(raw)
        told: list[CorpusError] = []
        assert all(isinstance(d, Document) for d in read_corpus([path], on_bad=told.append))
        assert all(str(path) in str(error.given) for error in told)
