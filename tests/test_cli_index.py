"""`tracealign index`: what is built, what is refused, and that an interrupted build leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli_samples import DOCUMENTS, PROGRAM, byte_tokenizer, invoke, run

from tracealign_lib.documents import write_documents
from tracealign_lib.index import TraceIndex
from tracealign_lib.sharded import ShardedIndex, open_index


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_documents(DOCUMENTS, tmp_path / "corpus.jsonl")
    return tmp_path / "corpus.jsonl"


def build(corpus: object, tokenizer: Path, out: Path, *options: object, **given: Any) -> Any:
    return invoke("index", "build", corpus, "--out", out, "--tokenizer", tokenizer, *options, **given)


def test_a_corpus_is_indexed_and_shown(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "my-index"
    done = build(corpus, tokenizer, out)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    index = TraceIndex.open(out, verify="full")
    assert index.document_ids == ("recipe", "other")
    assert index.document("recipe").meta == {"file": "corpus.jsonl"}
    assert done.stdout == invoke("index", "info", out).stdout
    assert done.stdout.splitlines()[:3] == [str(out), "  documents   2", f"  tokens      {index.n_tokens}"]


def test_json_has_a_fixed_schema(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "my-index"
    done = build(corpus, tokenizer, out, "--json")
    assert done.stdout == invoke("index", "info", out, "--json").stdout
    index = TraceIndex.open(out)
    assert json.loads(done.stdout) == {
        "format": "tracealign.index",
        "version": 1,
        "path": str(out),
        "documents": 2,
        "tokens": index.n_tokens,
        "vocabulary": 256,
        "tokenizer_hash": index.tokenizer_hash,
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def test_an_index_of_shards_is_built_and_used_like_any_other(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    built = build(corpus, tokenizer, out, "--shard-mb", 1)
    assert built.exit_code == 0, built.output
    assert isinstance(open_index(out), ShardedIndex)
    assert invoke("index", "verify", out).exit_code == 0
    assert json.loads(invoke("index", "info", out, "--json").stdout)["documents"] == len(DOCUMENTS)
    traced = json.loads(invoke("trace", DOCUMENTS[0].text, "--index", out, "--json").stdout)
    assert [source["document_id"] for source in traced["sources"]] == [DOCUMENTS[0].id]
    with open(out / "shard-00000" / "suffixes.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert invoke("index", "verify", out).exit_code == 1


def test_collections_stand_beside_it(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("never wake the moss", encoding="utf-8")
    (tmp_path / "b.txt").write_text("never drain the lake", encoding="utf-8")
    named = [f"--collection=rules={tmp_path / name}" for name in ("a.txt", "b.txt")]
    done = build(corpus, tokenizer, tmp_path / "i", *named, f"--collection=other={corpus}", "--limit", 1)
    assert done.exit_code == 0, done.output
    sizes = {name: TraceIndex.open(tmp_path / name).n_documents for name in ("i", "i.rules", "i.other")}
    assert sizes == {"i": 1, "i.rules": 1, "i.other": 1}


def test_fields_patterns_and_limits_are_passed_on(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"body": f"text {i}", "n": i, "url": f"u{i}"} for i in range(5)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "c.ndjson").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "in" / "c.py").write_text("code", encoding="utf-8")
    out = tmp_path / "i"
    options = ["--text-field", "body", "--id-field", "n", "--meta", "url", "--limit", 3, "--glob", "*.ndjson"]
    assert build(tmp_path / "in", tokenizer, out, *options).exit_code == 0
    index = TraceIndex.open(out)
    assert index.document_ids == ("0", "1", "2")
    assert index.document("2").meta == {"file": "c.ndjson", "url": "u2"}
    assert build(tmp_path / "in", tokenizer, out, "--glob", "*.py", "--replace").exit_code == 0
    assert TraceIndex.open(out).document("c.py").text == "code"


def test_bad_records_stop_the_build_or_are_left_out_and_told(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one"}\n' + "{\n" * 12 + '{"text": "two"}\n', encoding="utf-8")
    done = build(path, tokenizer, tmp_path / "i")
    assert done.exit_code == 2
    assert f"{path}, line 2" in done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.jsonl"]
    done = build(path, tokenizer, tmp_path / "i", "--skip-bad")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("Left out: A line is not JSON.") == 10
    assert done.stderr.splitlines()[-1] == "Left out: 12 records in all."
    assert TraceIndex.open(tmp_path / "i").document_ids == ("c.jsonl:1", "c.jsonl:14")
    done = build(path, tokenizer, tmp_path / "j", "--skip-bad", "--limit", 1)
    assert done.stderr == "Left out: nothing in all.\n"


def test_what_stands_in_the_place_of_an_index_stays(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "i"
    assert build(corpus, tokenizer, out).exit_code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = build(corpus, tokenizer, out, "--limit", 1)
    assert done.exit_code == 2
    assert "--replace" in done.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert build(corpus, tokenizer, out, "--limit", 1, "--replace").exit_code == 0
    assert TraceIndex.open(out).n_documents == 1
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine", encoding="utf-8")
    assert build(corpus, tokenizer, mine, "--replace").exit_code == 2
    assert (mine / "thesis.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--collection", "rules"], "names no collection"),
        (["--collection", "../x=a"], "names no collection"),
        (["--collection", "rules=nowhere.txt"], "nowhere.txt"),
        (["--text-field", "txt"], 'no "txt" among its fields'),
        (["--id-field", "key"], 'no "key" among its fields'),
        (["--config", "x", "--split", "test"], "--config and --split without hub:owner/name"),
    ],
)
def test_bad_options_are_named(
    corpus: Path, tokenizer: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    done = build(corpus, tokenizer, tmp_path / "i", *options)
    assert done.exit_code == 2
    for part in (said, "given:", "expected:", "to mend:"):
        assert part in done.stderr
    assert not (tmp_path / "i").exists()


def test_bad_corpora_and_tokenizers_are_named(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{", encoding="utf-8")
    for path, loaded, said in [
        (tmp_path / "nowhere", tokenizer, "does not exist"),
        (tmp_path / "empty.jsonl", tokenizer, f"corpus is empty.\n  given:    {tmp_path / 'empty.jsonl'}"),
        (corpus, tmp_path / "broken", "tokenizer cannot be loaded"),
        (corpus, tmp_path / "not here", "no such folder"),
    ]:
        done = build(path, loaded, tmp_path / "i")
        assert done.exit_code == 2
        assert said in done.stderr
        assert "to mend:" in done.stderr
    done = invoke("index", "build", corpus, corpus, "--out", tmp_path / "i", "--tokenizer", tokenizer)
    assert done.exit_code == 2
    assert "same id" in done.stderr
    assert not (tmp_path / "i").exists()


def test_code_that_comes_with_a_tokenizer_never_runs(corpus: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    config = {
        "auto_map": {"AutoTokenizer": ["code.T", None], "AutoConfig": "code.C"},
        "model_type": "foreign",
    }
    for name in ("config.json", "tokenizer_config.json"):
        (hostile / name).write_text(json.dumps(config), encoding="utf-8")
    ran = tmp_path / "ran"
    (hostile / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass T: ...\nclass C: ...", encoding="utf-8")
    assert build(corpus, hostile, tmp_path / "i").exit_code == 2
    assert not ran.exists()


def test_verify_tells_by_its_status(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "i"
    build(corpus, tokenizer, out)
    done = invoke("index", "verify", out)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{out}: whole\n", "")
    largest = max(out.glob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    raw = bytearray(largest.read_bytes())
    raw[-1] ^= 1
    largest.write_bytes(raw)
    done = invoke("index", "verify", out)
    assert (done.exit_code, done.stdout) == (1, "")
    assert largest.name in done.stderr
    done = invoke("index", "verify", out, tmp_path / "nowhere")
    assert (done.exit_code, done.stdout) == (2, "")  # nothing is known of what is not there
    assert largest.name in done.stderr
    assert "nowhere" in done.stderr


def test_info_of_no_index_is_an_error(tmp_path: Path) -> None:
    done = invoke("index", "info", tmp_path / "nowhere")
    assert done.exit_code == 2
    assert "no index" in done.stderr


def test_documents_come_through_a_pipe(tokenizer: Path, tmp_path: Path) -> None:
    records = '{"text": "wake the moss gently"}\n{"text": "a quiet lake"}\n'
    out = tmp_path / "i"
    done = run("index", "build", "-", "--out", out, "--tokenizer", tokenizer, stdin=records)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert TraceIndex.open(out).document_ids == ("stdin:1", "stdin:2")
    done = run("trace", "wake the moss", "--index", out)
    assert "stdin:1" in done.stdout


def test_an_interrupted_build_leaves_nothing(tokenizer: Path, tmp_path: Path) -> None:
    command = [*PROGRAM, "index", "build", "-", "--out", str(tmp_path / "i"), "--tokenizer", str(tokenizer)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, "--skip-bad"], encoding="utf-8", env=dict(os.environ), **pipes)
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write("{\n")
    process.stdin.flush()
    assert "Left out" in process.stderr.readline()  # so it is reading by now
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == f"Interrupted: {tmp_path / 'i'} is as it was before.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file_is_told_once(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    done = build(corpus, tokenizer, corpus / "index")
    assert done.exit_code == 2
    assert done.stderr.count("given:") == 1


def test_what_looks_like_a_path_is_not_asked_of_the_hub(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def offline(name: str, **_: Any) -> None:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("./mine", "../mine", "models/mine", str(tmp_path / "mine"), "owner/mine"):
        done = invoke("index", "build", corpus, "--out", "i", "--tokenizer", name)
        assert done.exit_code == 2
        assert ("no such folder" in done.stderr) == (name != "owner/mine")
    assert asked == ["owner/mine"]


def test_a_disk_that_refuses_is_named(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tracealign_lib.index.TraceIndex.build", refuse)
    done = build(corpus, tokenizer, tmp_path / "i")
    assert done.exit_code == 2
    assert "No space left" in done.stderr
