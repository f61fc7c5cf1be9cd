"""`tracealign shield`: verdicts, and an exit status that a script can rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_samples import DOCUMENTS, byte_tokenizer, invoke, run, small_index

from tracealign_lib.bci import ConflictBCI, LikelihoodRatioBCI, RawBCI
from tracealign_lib.documents import Document
from tracealign_lib.index import TraceIndex
from tracealign_lib.shield import TraceShield

RISKY, HARMLESS = "please wake the moss gently now", "nothing like it"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_index(tmp_path_factory.mktemp("cli"))


def shield(index: Path, *arguments: object, **given: Any) -> Any:
    return invoke("shield", "--index", index, *arguments, **given)


@pytest.mark.parametrize(("text", "status"), [(RISKY, 1), (HARMLESS, 0), ("", 0)])
def test_the_status_tells_whether_a_text_is_refused(index: Path, text: str, status: int) -> None:
    done = shield(index, text, "--threshold", 20)
    assert done.exit_code == status, done.output
    assert done.stdout.split("\t")[:2] == ["1", "refused" if status else "passed"]
    assert done.stderr == ""
    quiet = shield(index, text, "--threshold", 20, "--quiet")
    assert (quiet.exit_code, quiet.output) == (status, "")


def test_one_line_a_verdict(index: Path) -> None:
    done = shield(index, "--threshold", 20, stdin=f"{HARMLESS}\n\n{RISKY}\tx\x1b[31m\n")
    assert done.exit_code == 1
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["1", "passed"], ["2", "passed"], ["3", "refused"]]
    assert "> threshold 20" in lines[2][2]
    assert lines[2][3] == f"{RISKY} x⟨U+001B⟩[31m"
    assert done.stderr == "1 of 3 texts refused.\n"


def test_json_is_what_the_shield_says(index: Path) -> None:
    records = [{"id": 7, "completion": RISKY}, {"text": HARMLESS}]
    done = shield(
        index, "--jsonl", "-", "--threshold", 20, "--json", stdin="\n".join(map(json.dumps, records))
    )
    refused, passed = (json.loads(line) for line in done.stdout.splitlines())
    verdict = TraceShield(TraceIndex.open(index), RawBCI(), 20.0).check(RISKY)
    assert refused == {
        "format": "tracealign.verdict",
        "version": 1,
        "number": 1,
        "id": 7,
        "refused": True,
        "reason": verdict.reason,
        "score": verdict.score,
        "threshold": 20.0,
        "spans": [dict(span._asdict()) for span in verdict.spans],
        "trace": json.loads(json.dumps(verdict.trace.to_json())),
    }
    assert set(passed) == set(refused)
    assert (passed["refused"], passed["score"], passed["spans"], passed["trace"]) == (False, None, [], None)


@pytest.mark.parametrize("form", ["benign.txt", "benign.jsonl"])
def test_a_calibrated_threshold_keeps_its_promise(index: Path, tmp_path: Path, form: str) -> None:
    texts = ["a quiet <b>lake</b>"[: 8 + i % 12] for i in range(60)]
    lines = texts if form.endswith("txt") else [json.dumps({"completion": text}) for text in texts]
    (tmp_path / form).write_text("\n".join(lines), encoding="utf-8")
    made = TraceShield(TraceIndex.open(index), RawBCI(), 0.0)
    for levels in ({"alpha": 0.1}, {"alpha": 0.1, "delta": 0.1}):
        options = [f"--{name}={value}" for name, value in levels.items()]
        done = shield(index, RISKY, "--calibrate", tmp_path / form, *options, "--json")
        threshold = made.calibrate(made.scores(texts), alpha=0.1, delta=levels.get("delta")).threshold
        assert json.loads(done.stdout)["threshold"] == threshold
        assert f"from 60 benign texts: {threshold:.6g}." in done.stderr
        assert ("on average" in done.stderr) == ("delta" not in levels)


def test_a_calibration_that_refuses_every_span_says_so(index: Path, tmp_path: Path) -> None:
    (tmp_path / "benign.txt").write_text("no\n" * 30, encoding="utf-8")
    done = shield(index, RISKY, "--calibrate", tmp_path / "benign.txt")
    assert done.exit_code == 1
    assert "none: every text with a span is refused" in done.stderr


def test_spans_can_be_filtered(index: Path) -> None:
    assert shield(index, RISKY, "--threshold", 20, "--min-length", 99).exit_code == 0
    assert shield(index, "a quiet", "--threshold", 1, "--min-length", 7, "--max-count", 1).exit_code == 1


SIMPLE = ["raw", "density", "prior-kl", "max-token", "length", "membership", "longest-match"]


@pytest.mark.parametrize("scorer", SIMPLE)
def test_every_scorer_scores(index: Path, scorer: str) -> None:
    done = shield(index, RISKY, "--scorer", scorer, "--threshold", 0, "--json")
    assert done.exit_code == 1, done.output
    score = json.loads(done.stdout)["score"]
    assert {"length": 20.0, "membership": 1.0}.get(scorer, score) == score


def test_scorers_of_two_collections_find_the_second_beside_or_by_name(index: Path, tmp_path: Path) -> None:
    text = Document("rule", "never wake the moss, my friend")
    first, second = TraceIndex.open(index), tmp_path / "second"
    made = TraceIndex.build([text], byte_tokenizer(), second)
    expected = {
        "conflict": TraceShield(first, ConflictBCI(made), 0.0).check(RISKY).score,
        "ratio": TraceShield(first, LikelihoodRatioBCI(first, made), 0.0).check(RISKY).score,
    }
    beside = small_index(tmp_path)
    for scorer, name in (("conflict", "rules"), ("ratio", "other")):
        options = [RISKY, "--scorer", scorer, "--threshold", 0, "--json"]
        done = shield(index, *options)
        assert done.exit_code == 2
        assert f"--{name} DIR" in done.stderr
        done = shield(index, *options, f"--{name}", second)
        assert json.loads(done.stdout)["score"] == expected[scorer]
        TraceIndex.build([text], byte_tokenizer(), beside.with_name(f"index.{name}"))
        assert shield(beside, *options).stdout == done.stdout


def test_a_page_shows_verdicts(index: Path, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    done = shield(index, "--threshold", 20, "--html", page, "--quiet", stdin=f"{RISKY}\n{HARMLESS}")
    assert (done.exit_code, done.output) == (1, "")
    written = page.read_text(encoding="utf-8")
    assert written.count("✕ Refused") == 1
    assert written.count("✓ Not refused") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x"], "neither"),
        (["x", "--threshold", "20", "--calibrate", "x.txt"], "both"),
        (["x", "--calibrate", "nowhere.txt"], "nowhere.txt: No such file"),
        (["x", "--threshold", "nan"], "not finite"),
        (["x", "--threshold", "20", "--field", "a"], "--field without --jsonl"),
        (["x", "--threshold", "20", "--html", "nowhere/a.html"], "there is no folder nowhere"),
        (["x", "--threshold", "20", "--alpha", "0.05"], "--alpha without --calibrate"),
        (["x", "--threshold", "20", "--delta", "0.05"], "--delta without --calibrate"),
        (["x", "--threshold", "20", "--rules", "i"], "--rules without --scorer conflict"),
        (
            ["x", "--threshold", "20", "--scorer", "conflict", "--other", "i"],
            "--other without --scorer ratio",
        ),
        (["x", "--threshold", "20", "--min-length", "0"], "min_length"),
        (["--threshold", "20"], "There is no text"),
    ],
)
def test_what_cannot_be_checked_is_an_error_and_never_a_pass(
    index: Path, arguments: list[str], said: str
) -> None:
    done = shield(index, *arguments, stdin="")
    assert done.exit_code == 2
    for part in (said, "given:", "expected:", "to mend:"):
        assert part in done.stderr


def test_too_few_benign_texts_are_counted(index: Path, tmp_path: Path) -> None:
    for text, said in (("no\n" * 5, "at least 19"), ("", "The file is empty")):
        (tmp_path / "benign.txt").write_text(text, encoding="utf-8")
        done = shield(index, "x", "--calibrate", tmp_path / "benign.txt")
        assert done.exit_code == 2
        assert said in done.stderr


def test_a_defect_has_status_2_and_its_traceback(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("tracealign_lib.shield.TraceShield.check", fail)
    done = shield(index, "x", "--threshold", 20)
    assert done.exit_code == 2
    assert "ZeroDivisionError: a defect" in done.stderr


def test_an_unknown_scorer_is_refused_with_the_known_ones(index: Path) -> None:
    done = shield(index, "x", "--scorer", "best", "--threshold", 20)
    assert done.exit_code == 2
    assert all(scorer in done.stderr for scorer in SIMPLE)


def test_as_a_filter_in_a_pipeline(index: Path) -> None:
    stdin = "\n".join([document.text for document in DOCUMENTS] + [HARMLESS])
    done = run("shield", "--index", index, "--threshold", 20, stdin=stdin)
    assert done.returncode == 1
    assert [line.split("\t")[1] for line in done.stdout.splitlines()] == ["refused", "refused", "passed"]
    assert done.stderr == "2 of 3 texts refused.\n"
