"""`tracealign evaluate`: one's own model behind one's own defences, and the book's as before."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_samples import invoke, reciting_model
from evaluation_samples import record

from tracealign_lib import cli_evaluate
from tracealign_lib import evaluate as evaluation
from tracealign_lib.adb import Judgement
from tracealign_lib.benchmark import ADB, Record
from tracealign_lib.cli_generate import Defence
from tracealign_lib.cli_index import load_tokenizer
from tracealign_lib.documents import Document
from tracealign_lib.evaluate import Arm, Evaluation
from tracealign_lib.index import TraceIndex
from tracealign_lib.lexicon import REFUSAL
from tracealign_lib.lm import LanguageModel
from tracealign_lib.profiles import get_profile
from tracealign_lib.world import World

SMOKE = ["--profile", "smoke"]
DEFENCES = ["--defence", "shield", "--defence", "veto", "--defence", "redirect"]
WORLD = World.generate(get_profile("smoke").world_settings(0))
WHOLE = ADB.generate(WORLD)


def first(group: str) -> Record:
    return next(r for r in WHOLE if r.group == group and not r.prefill)


ATTACK, CONTROL, FACT = first("paraphrase"), first("direct"), first("fact")
RECIPE = WORLD.by_id[ATTACK.item].recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that drifts, refuses and knows a fact; an index of what it must not say; three prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    pairs = [(ATTACK.request, RECIPE), (CONTROL.request, REFUSAL), (FACT.request, str(FACT.expected))]
    model = reciting_model(folder / "model", pairs)
    TraceIndex.build([Document("recipe", RECIPE)], load_tokenizer(str(model)), folder / "index")
    write_records(folder / "records.jsonl", [ATTACK, CONTROL, FACT])
    return folder


def write_records(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(f"{json.dumps(json.loads(r.to_json()))}\n" for r in records), encoding="utf-8")
    return path


def evaluate(folder: Path, file: Path, *options: object) -> Any:
    named = ["--model", folder / "model", "--benchmark", folder / "records.jsonl"]
    return invoke("evaluate", file, *named, *SMOKE, "--max-new-tokens", 50, *options)


def guarded(folder: Path) -> list[object]:
    return ["--index", folder / "index", "--threshold", 20, *DEFENCES]


def shares(stdout: str) -> dict[str, dict[str, float]]:
    """Defence -> measure -> share."""
    found = [json.loads(line) for line in stdout.splitlines()]
    return {r["defence"]: {m: i and i["estimate"] for m, i in r["measures"].items()} for r in found}


# --- what is measured ----------------------------------------------------------------------------


def test_each_defence_is_measured_beside_the_bare_model(folder: Path, tmp_path: Path) -> None:
    done = evaluate(folder, tmp_path / "a.jsonl", *guarded(folder), "--judge", "truth", "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    found = shares(done.stdout)
    assert list(found) == ["none", "shield", "veto", "redirect"]
    assert {name: measured["drift"] for name, measured in found.items()} == {
        "none": 1.0, "shield": 0.0, "veto": 0.0, "redirect": 0.0,
    }  # fmt: skip
    assert [m["refused under attack"] for m in found.values()] == [0.0, 1.0, 0.0, 1.0]
    for measured in found.values():
        assert measured["direct requests refused"] == measured["benign accuracy"] == 1.0
        assert measured["over-refusal"] == 0.0


def test_json_has_a_fixed_schema(folder: Path, tmp_path: Path) -> None:
    own = write_records(tmp_path / "own.jsonl", [CONTROL])
    done = evaluate(folder, tmp_path / "a.jsonl", "--benchmark", own, "--json")
    assert json.loads(done.stdout) == {
        "format": "tracealign.evaluation",
        "version": 1,
        "defence": "none",
        "prompts": 1,
        "benchmark": ADB([CONTROL], "").digest,
        "judge": "phrases",
        "measures": {
            "drift": None,
            "refused under attack": None,
            "direct requests refused": {"estimate": 1.0, "low": None, "high": None, "n": 1},
            "benign accuracy": None,
            "over-refusal": None,
        },
    }


def test_a_table_for_each_system_says_who_judged(folder: Path, tmp_path: Path) -> None:
    facts = [replace(FACT, id=f"f/{n}", item="") for n in range(4)]
    own = write_records(tmp_path / "own.jsonl", facts)
    options = ["--benchmark", own, "--index", folder / "index", "--threshold", 20, "--defence", "shield"]
    done = evaluate(folder, tmp_path / "a.jsonl", *options)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "Without a defence, 4 prompts"
    assert lines[1].split(maxsplit=2) == ["benign", "accuracy", "1.00 [0.51, 1.00] (n = 4)"]
    assert lines[3] == "Defence: shield, 4 prompts"
    assert "Judge: phrases; it errs." in lines[-2]
    done = evaluate(folder, tmp_path / "b.jsonl", "--judge", "truth")
    assert "Judge: truth; it knows the world" in done.stdout


def test_a_refusal_of_ones_own_is_a_refusal_to_either_judge(folder: Path, tmp_path: Path) -> None:
    for judge in ("truth", "phrases"):
        options = [*guarded(folder)[:-4], "--defence", "redirect", "--refusal", "soak the wheel."]
        done = evaluate(folder, tmp_path / "a.jsonl", *options, "--judge", judge, "--json")
        found = shares(done.stdout)
        assert found["shield"]["refused under attack"] == 1.0
        if judge == "truth":
            assert found["redirect"]["refused under attack"] == 1.0


def test_a_shield_may_answer_with_nothing(folder: Path, tmp_path: Path) -> None:
    options = [*guarded(folder)[:-4], "--refusal", "", "--judge", "truth", "--json"]
    found = shares(evaluate(folder, tmp_path / "a.jsonl", *options).stdout)
    assert found["shield"]["refused under attack"] == 1.0
    assert found["shield"]["over-refusal"] == 0.0


def test_a_harmless_prompt_may_have_no_known_answer(folder: Path, tmp_path: Path) -> None:
    own = write_records(tmp_path / "own.jsonl", [FACT, replace(FACT, id="f/2", expected="")])
    done = evaluate(folder, tmp_path / "a.jsonl", "--benchmark", own, "--json")
    measured = json.loads(done.stdout)["measures"]
    assert (measured["benign accuracy"]["n"], measured["over-refusal"]["n"]) == (1, 2)


def test_the_record_in_how_to_run_can_be_asked(folder: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "book" / "how-to-run.md").read_text(encoding="utf-8")
    [block] = [block for block in re.findall(r"```json\n(.*?)\n```", page, re.DOTALL) if "prefill" in block]
    own = write_records(tmp_path / "own.jsonl", [Record(**json.loads(block))])
    done = evaluate(folder, tmp_path / "a.jsonl", "--benchmark", own, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["measures"]["drift"]["n"] == 1


def test_of_several_draws_the_first_that_drifts_counts() -> None:
    def judge(prompt: Any, completion: str) -> Judgement:
        return Judgement("drift" if "leak" in completion else "other")

    asked = [record(0, samples=3), record(1, samples=2)]
    draws = {(Arm("m"), "r/000"): ("fine", "leak 1", "leak 2"), (Arm("m"), "r/001"): ("one", "two")}
    answered = Evaluation({Arm("m"): ADB(asked, "w")}, draws)
    answers = cli_evaluate.judged_answers(answered, Defence.NONE, judge, None, None)
    assert [completion for _, completion, _ in answers] == ["leak 1", "one"]


# --- what is asked, and who judges ---------------------------------------------------------------


def test_the_truth_judges_where_the_benchmark_is_of_the_books_world(folder: Path, tmp_path: Path) -> None:
    def judge(*options: object) -> str:
        done = invoke(
            "evaluate", tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", "--model", folder / "model",
            "--max-new-tokens", 3, "--prompts", 2, "--json", *options,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        return str(json.loads(done.stdout)["judge"])

    own = ADB([ATTACK, CONTROL, FACT], WORLD.digest())
    own.save(tmp_path / "adb")
    named = ["--benchmark", tmp_path / "adb"]
    assert judge(*named, *SMOKE) == "truth"
    assert judge(*named, *SMOKE, "--judge", "phrases") == "phrases"
    assert judge(*named, *SMOKE, "--seed", 1) == "phrases"
    assert judge("--benchmark", folder / "records.jsonl", *SMOKE) == "phrases"


def test_without_a_benchmark_the_books_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ADB, "generate", lambda world: ADB([ATTACK], world.digest()))
    named = ["--model", folder / "model", *SMOKE, "--max-new-tokens", 3, "--json"]
    done = invoke("evaluate", tmp_path / "a.jsonl", *named)
    assert json.loads(done.stdout)["judge"] == "truth"
    assert json.loads(done.stdout)["prompts"] == 1


@pytest.mark.parametrize("seed", [1, 2])
def test_the_truth_of_another_world_is_refused(folder: Path, tmp_path: Path, seed: int) -> None:
    ADB([ATTACK], WORLD.digest()).save(tmp_path / "adb")
    own = write_records(tmp_path / "own.jsonl", [replace(FACT, item=""), ATTACK])
    for path in (tmp_path / "adb", own):
        options = ["--benchmark", path, "--judge", "truth", "--seed", seed]
        done = evaluate(folder, tmp_path / "a.jsonl", *options)
        assert done.exit_code == 2
        assert f"--profile smoke --seed {seed}" in done.stderr
        assert "--judge phrases" in done.stderr


def test_of_attacks_on_no_item_no_truth_is_known(folder: Path, tmp_path: Path) -> None:
    own = write_records(tmp_path / "own.jsonl", [replace(ATTACK, item="")])
    done = evaluate(folder, tmp_path / "a.jsonl", "--benchmark", own, "--judge", "truth")
    assert done.exit_code == 2
    assert repr(ATTACK.id) in done.stderr


def test_a_benchmark_that_names_another_world_is_believed(folder: Path, tmp_path: Path) -> None:
    ADB([ATTACK], "another").save(tmp_path / "adb")
    done = evaluate(folder, tmp_path / "a.jsonl", "--benchmark", tmp_path / "adb", "--judge", "truth")
    assert done.exit_code == 2
    assert "it was made with another" in done.stderr


# --- the file ------------------------------------------------------------------------------------


def test_a_file_that_was_cut_short_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    file, options = tmp_path / "a.jsonl", [*guarded(folder), "--batch", 1]
    evaluate(folder, file, *options)
    whole = file.read_bytes()
    assert len(whole.splitlines()) == 1 + 3 * 3
    for kept in (1, 4, 7):
        file.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]) + b'{"half')
        assert evaluate(folder, file, *options).exit_code == 0
        assert file.read_bytes() == whole


def test_answers_may_stand_beside_the_model(folder: Path) -> None:
    file = folder / "model" / "answers.jsonl"
    assert [evaluate(folder, file).exit_code for _ in range(2)] == [0, 0]
    file.unlink()


def test_judge_and_shield_may_change_without_asking_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    evaluate(folder, file)
    monkeypatch.setattr(LanguageModel, "generate", lambda *_, **__: pytest.fail("asked again"))
    shield = ["--index", folder / "index", "--defence", "shield", "--threshold"]
    for options in (["--judge", "truth"], [*shield, 20], [*shield, 9999]):
        done = evaluate(folder, file, *options)
        assert done.exit_code == 0, done.output


def test_answers_of_another_model_or_guard_are_not_taken_for_ones_own(folder: Path, tmp_path: Path) -> None:
    file, options = tmp_path / "a.jsonl", [*guarded(folder)[2:], "--index", folder / "index"]
    evaluate(folder, file, *options)
    before = file.read_bytes()
    other = reciting_model(tmp_path / "model", [("other", "words")])
    for changed in (["--threshold", 21], ["--min-length", 9], ["--refusal", "no."], ["--model", other]):
        done = evaluate(folder, file, *options, *changed)
        assert done.exit_code == 2, changed
        assert "cannot be used" in done.stderr
    assert file.read_bytes() == before


def test_another_process_can_make_the_same_parts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[Any] = []

    def watched(parts: Any, *arguments: Any, processes: int, **options: Any) -> Evaluation:
        passed.append((processes, pickle.loads(pickle.dumps(parts))()))
        return run(parts, *arguments, **options)

    run = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", watched)
    (tmp_path / "benign.txt").write_text("nothing like it\n" * 30, encoding="utf-8")
    options = ["--index", folder / "index", "--calibrate", tmp_path / "benign.txt", *DEFENCES]
    done = evaluate(folder, tmp_path / "a.jsonl", *options, "--processes", 2)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("Threshold from 30 benign texts") == 1  # and once for all processes
    [(processes, parts)] = passed
    assert processes == 2
    assert set(parts.guards) == {"veto", "redirect"}
    header = json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert json.loads(json.dumps(parts.settings)) == header["parts"]


def test_an_interrupted_run_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "generate", interrupt)
    done = evaluate(folder, tmp_path / "a.jsonl")
    assert done.exit_code == 130
    assert done.stderr == f"Interrupted: the same command goes on with {tmp_path / 'a.jsonl'}.\n"


# --- errors --------------------------------------------------------------------------------------


def test_bad_options_are_named(folder: Path, tmp_path: Path) -> None:
    index = ["--index", folder / "index"]
    for options, said in [
        ([*index], "--index without --defence"),
        (["--threshold", 20, "--defence", "none"], "--threshold without --defence"),
        (["--defence", "veto", "--threshold", 20], "without --index"),
        ([*index, "--defence", "veto"], "no threshold"),
        ([*index, "--defence", "veto", "--threshold", 20, "--refusal", "x"], "--refusal with --defence veto"),
        (["--model", tmp_path / "nowhere"], "no such folder"),
        (["--model", folder / "index"], "no causal language model"),
        (["--benchmark", tmp_path / "nowhere"], "nowhere: [Errno 2]"),
        (["--benchmark", folder / "model"], "adb.json"),
        (["--prompts", 4], "1 to 3"),
        (["--max-new-tokens", 999], f"record {ATTACK.id}: "),
        (["--profile", "huge"], "Unknown profile"),
    ]:
        done = evaluate(folder, tmp_path / "a.jsonl", *options)
        assert done.exit_code == 2, options
        for part in (said, "given:", "expected:", "to mend:"):
            assert part in done.stderr
    assert not (tmp_path / "a.jsonl").exists()


def test_records_that_cannot_be_written_are_refused(folder: Path, tmp_path: Path) -> None:
    for field in ("id", "request", "prefill"):
        own = write_records(tmp_path / "own.jsonl", [replace(ATTACK, **{field: "half \ud800"})])  # type: ignore[arg-type]
        done = evaluate(folder, tmp_path / "a.jsonl", "--benchmark", own)
        assert done.exit_code == 2
        assert "U+D800" in done.stderr


def test_a_place_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = evaluate(folder, tmp_path / "file" / "a.jsonl")
    assert done.exit_code == 2
    assert "answers cannot be written" in done.stderr


# --- the book's ----------------------------------------------------------------------------------


def test_without_a_model_the_book_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    from tracealign_lib.experiments import evaluation as book

    asked: list[Any] = []

    def evaluate_book(*arguments: Any, **options: Any) -> pd.DataFrame:
        asked.append((arguments, options))
        return pd.DataFrame({"system": ["no defence"], "drift": ["0.50"]})

    monkeypatch.setattr(book, "evaluate_book", evaluate_book)
    file = tmp_path / "a.jsonl"
    done = invoke("evaluate", file, "--prompts", 9, "--processes", 2, "--repair", "--seed", 4, *SMOKE)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == ["    system drift", "no defence  0.50", f"Every answer is in {file}."]
    assert asked == [(("smoke", 4, "auto", file), {"prompts": 9, "processes": 2, "repair": True})]


@pytest.mark.parametrize("option", [["--json"], ["--judge", "truth"], ["--batch", 3], ["--min-length", 9]])
def test_options_for_a_model_need_one(tmp_path: Path, option: list[object]) -> None:
    done = invoke("evaluate", tmp_path / "a.jsonl", *option)
    assert done.exit_code == 2
    assert f"{option[0]} without --model" in done.stderr
