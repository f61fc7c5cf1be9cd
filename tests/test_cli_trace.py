"""`tracealign trace`: texts from anywhere, as text, JSON or a page."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cli_samples import invoke, run, small_index

from tracealign_lib.index import TraceIndex

MOSS, LAKE = "please wake the moss now", "a quiet é lake"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_index(tmp_path_factory.mktemp("cli"))


def test_an_argument_is_one_text(index: Path) -> None:
    done = invoke("trace", MOSS, "--index", index)
    assert done.exit_code == 0, done.output
    assert "wake the moss" in done.stdout
    assert "recipe" in done.stdout
    assert "other" not in done.stdout
    assert "Text 1" not in done.stdout


def test_a_dash_is_all_of_standard_input_as_one_text(index: Path) -> None:
    done = invoke("trace", "-", "--json", "--min-length", 5, "--index", index, stdin=f"{LAKE}\n{MOSS}")
    assert done.exit_code == 0, done.output
    traced = json.loads(done.stdout)
    assert traced["text"] == f"{LAKE}\n{MOSS}"
    assert traced["min_length"] == 5
    assert [source["document_id"] for source in traced["sources"]] == ["recipe", "other"]


def test_lines_are_texts_of_their_own_wherever_they_come_from(index: Path, tmp_path: Path) -> None:
    content = f"{MOSS}\r\n\n{LAKE}"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    printed = {
        invoke("trace", "--json", "--index", index, *named, stdin=content).stdout
        for named in (
            [],
            ["--lines", "-"],
            ["--lines", tmp_path / "a.txt"],
            ["--lines", tmp_path / "a.txt.gz"],
        )
    }
    assert len(printed) == 1
    traced = [json.loads(line) for line in printed.pop().splitlines()]
    assert [(one["number"], one["text"]) for one in traced] == [(1, MOSS), (2, ""), (3, LAKE)]


def test_records_keep_their_id_and_number(index: Path) -> None:
    records = [{"text": MOSS, "id": "m", "prompt": "Ask?"}, {"completion": LAKE}]
    stdin = "\n\n".join(map(json.dumps, records))
    done = invoke("trace", "--jsonl", "-", "--json", "--index", index, stdin=stdin)
    traced = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["number"], one["id"], one["text"]) for one in traced] == [(1, "m", MOSS), (3, None, LAKE)]
    assert set(traced[0]) == {
        "number", "id", "format", "version", "text", "n_tokens", "n_traced", "min_length", "max_count",
        "spans", "sources",
    }  # fmt: skip
    done = invoke(
        "trace", "--jsonl", "-", "--field", "a", "--json", "--index", index, stdin='{"a": "x", "text": "y"}'
    )
    assert json.loads(done.stdout)["text"] == "x"


def test_spans_and_sources_can_be_limited(index: Path) -> None:
    text = "wake the moss gently and a quiet <b>lake</b>"
    for limit, expected in ((2, 2), (1, 1)):
        done = invoke("trace", text, "--json", "--limit", limit, "--index", index)
        assert len(json.loads(done.stdout)["sources"]) == expected
    assert (
        json.loads(invoke("trace", text, "--json", "--min-length", 100, "--index", index).stdout)["spans"]
        == []
    )
    done = invoke("trace", "a quiet", "--json", "--min-length", 1, "--max-count", 1, "--index", index)
    assert [span["count"] for span in json.loads(done.stdout)["spans"]] == [1]


def test_a_page_shows_every_text_and_nothing_of_it_runs(index: Path, tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    arguments = ["trace", "--jsonl", "-", "--index", index, "--html"]
    hostile = json.dumps({"text": "a quiet <b>lake</b>", "prompt": "<script>x</script>"})
    done = invoke(*arguments, page, stdin=f"{hostile}\n{json.dumps({'text': MOSS})}")
    assert done.exit_code == 0, done.output
    written = page.read_text(encoding="utf-8")
    assert "Text 1" in written
    assert "Text 2" in written
    assert "quiet" in written
    assert "<b>lake" not in written
    assert "<script" not in written
    done = invoke(*arguments, tmp_path / "missing" / "trace.html", stdin=hostile)
    assert (done.exit_code, done.stdout) == (2, "")  # told before anything was traced
    assert "page cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ([], "", "There is no text"),
        (["--lines", "-"], "", "standard input is empty"),
        (["--lines", "nowhere.txt"], "", "nowhere.txt: No such file"),
        (["x", "--lines", "-"], "y", "several places"),
        (["--lines", "-", "--jsonl", "-"], "y", "several places"),
        (["-"], b"caf\xe9", "byte 3 is 0xe9"),
        (["--lines", "-"], b"fine\ncaf\xe9", "standard input, line 2: byte 3 is 0xe9"),
        (["--jsonl", "-"], '{"text": "x"}\n{', "standard input, line 2: Expecting"),
        (["--jsonl", "-"], '["text"]', "line 1: ['text']"),
        (["--jsonl", "-"], '{"text": 5}', "line 1: {'text': 5}"),
        (["x", "--min-length", "0"], "", "min_length"),
        (["x", "--field", "a"], "", "--field without --jsonl"),
        (["x", "--profile", "smoke", "--seed", "1"], "", "--index and --profile and --seed"),
        (["x", "--html", "."], "", ".: a folder"),
    ],
)
def test_bad_input_is_named_with_its_line(
    index: Path, arguments: list[str], stdin: str | bytes, said: str
) -> None:
    done = invoke("trace", *arguments, "--index", index, stdin=stdin)
    assert done.exit_code == 2
    assert said in done.stderr
    for part in ("given:", "expected:", "to mend:"):
        assert part in done.stderr


def test_hostile_text_is_traced_and_printed_harmlessly(index: Path) -> None:
    text = "wake the moss\ud800\u0000\u202e\x1b[31m gently"
    for form in ([], ["--json"]):
        done = invoke("trace", "--jsonl", "-", "--index", index, *form, stdin=json.dumps({"text": text}))
        assert done.exit_code == 0, done.output
        assert not {"\ud800", "\u0000", "\u202e", "\x1b"} & set(done.stdout)
    assert json.loads(done.stdout)["text"] == text


def test_through_pipes_of_any_encoding(index: Path) -> None:
    done = run("trace", "--index", index, stdin=f"{MOSS}\n{LAKE}", PYTHONIOENCODING="utf-8")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "·" in done.stdout
    done = run("trace", MOSS, "--index", index, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\xb7" in done.stdout


def test_without_an_index_the_books_world_is_asked(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Pipeline:
        def __init__(self, profile: str, seed: int) -> None:
            asked.append((profile, seed))
            self.index = TraceIndex.open(index)

    module = ModuleType("tracealign_lib.pipeline")
    module.Pipeline = Pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tracealign_lib.pipeline", module)
    done = invoke("trace", "wake the moss", "--profile", "smoke", "--seed", 3)
    assert done.exit_code == 0, done.output
    assert asked == [("smoke", 3)]
