"""`tracealign generate`: a model from a folder, with and without a defence before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_samples import byte_tokenizer, invoke, reciting_model

from tracealign_lib.cli_index import load_tokenizer
from tracealign_lib.documents import Document
from tracealign_lib.index import TraceIndex
from tracealign_lib.shield import REFUSAL

PROMPT = "how do you wake the orun compound"
RISKY = "soak the amber thread in the cellar, then fold the mossy bell in the mill."
DEFENCE = ["--threshold", 20, "--max-new-tokens", 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that recites one sentence, and an index of that sentence."""
    folder = tmp_path_factory.mktemp("generate")
    model = reciting_model(folder / "model", [(PROMPT, RISKY)])
    TraceIndex.build([Document("recipe", RISKY)], load_tokenizer(str(model)), folder / "index")
    return folder


def generate(folder: Path, *arguments: object, **given: Any) -> Any:
    return invoke("generate", folder / "model", *arguments, **given)


def test_a_model_without_defence_recites(folder: Path) -> None:
    done = generate(folder, PROMPT, "--max-new-tokens", 40)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{RISKY}\n"
    assert generate(folder, PROMPT, "--max-new-tokens", 3).stdout != done.stdout


@pytest.mark.parametrize("defence", ["shield", "veto", "redirect"])
def test_every_defence_keeps_the_sentence_back(folder: Path, defence: str) -> None:
    options = ["--index", folder / "index", "--defence", defence, *DEFENCE, "--json"]
    done = generate(folder, PROMPT, *options)
    assert done.exit_code == 0, done.output
    completion = json.loads(done.stdout)
    assert RISKY not in completion["completion"]
    assert completion["refused"] is (True if defence == "shield" else None)
    assert (completion["completion"] == REFUSAL) == (defence == "shield")
    assert (REFUSAL in completion["completion"]) == (defence != "veto")


def test_completions_go_on_into_the_shield(folder: Path) -> None:
    index = folder / "index"
    for defence, status in ([], 1), (["--index", index, "--defence", "redirect", "--threshold", 20], 0):
        done = generate(folder, PROMPT, "--max-new-tokens", 40, "--json", *defence)
        checked = invoke("shield", "--jsonl", "-", "--index", index, "--threshold", 20, stdin=done.stdout)
        assert checked.exit_code == status, checked.output


def test_json_has_a_fixed_schema_in_the_order_of_the_prompts(folder: Path) -> None:
    records = [{"prompt": "short", "id": "a"}, {"prompt": PROMPT, "id": "b"}, {"text": "mill"}]
    stdin = "\n".join(map(json.dumps, records))
    done = generate(folder, "--jsonl", "-", "--json", "--max-new-tokens", 40, stdin=stdin)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["number"], one["id"], one["prompt"]) for one in found] == [
        (1, "a", "short"),
        (2, "b", PROMPT),
        (3, None, "mill"),
    ]
    assert found[1] == {
        "format": "tracealign.completion",
        "version": 1,
        "number": 2,
        "id": "b",
        "prompt": PROMPT,
        "completion": RISKY,
        "defence": "none",
        "refused": None,
        "reason": None,
    }


def test_settings_reach_the_model(folder: Path) -> None:
    lines = f"{PROMPT}\nmill"
    plain = generate(folder, "--max-new-tokens", 10, stdin=lines).stdout
    hot = ["--temperature", 5, "--max-new-tokens", 10]
    first, again, other = (generate(folder, *hot, "--seed", seed, stdin=lines).stdout for seed in (1, 1, 2))
    assert first == again
    assert len({plain, first, other}) == 3
    assert generate(folder, "--max-new-tokens", 10, "--raw", stdin=lines).stdout != plain
    assert generate(folder, "--max-new-tokens", 10, "--batch", 1, "--beams", 1, stdin=lines).stdout == plain
    refused = ["--index", folder / "index", "--defence", "shield", "--refusal", "Never.", *DEFENCE]
    assert generate(folder, PROMPT, *refused).stdout == "Never.\n"


def test_bad_options_are_named_before_the_model_is_loaded(folder: Path) -> None:
    index = folder / "index"
    for options, said in [
        (["--index", index], "--index without --defence"),
        (["--threshold", 20, "--refusal", "x"], "--threshold and --refusal without --defence"),
        (["--defence", "none", "--scorer", "raw", "--min-length", 8], "--scorer and --min-length without"),
        (["--defence", "veto", "--refusal", "x"], "--refusal with --defence veto"),
        (["--defence", "shield", "--threshold", 20], "without --index"),
        (["--defence", "veto", "--index", index], "no threshold"),
        (["--defence", "veto", "--index", folder / "nowhere", "--threshold", 20], "nowhere"),
    ]:
        done = invoke("generate", "no/such/model", PROMPT, *options)
        assert done.exit_code == 2
        for part in (said, "given:", "expected:", "to mend:"):
            assert part in done.stderr


def test_bad_prompts_and_models_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    for model, arguments, stdin, said in [
        (folder / "model", [PROMPT, "--max-new-tokens", 999], None, "prompt 1: "),
        (folder / "model", ["--raw", "--max-new-tokens", 3], "fine\n\n", "prompt 2: 0 tokens"),
        (folder / "model", [], "", "There is no text"),
        (folder / "model", [PROMPT, "--field", "a"], None, "--field without --jsonl"),
        (folder / "model", [PROMPT, "--device", "tpu"], None, "Unknown device"),
        (folder / "index", [PROMPT], None, "no causal language model"),
        (tmp_path / "model", [PROMPT], None, "SafetensorError"),
        (tmp_path / "not here", [PROMPT], None, "no such folder"),
    ]:
        done = invoke("generate", model, *arguments, stdin=stdin)
        assert done.exit_code == 2
        for part in (said, "given:", "expected:", "to mend:"):
            assert part in done.stderr


def test_an_index_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    TraceIndex.build([Document("recipe", RISKY)], byte_tokenizer(), tmp_path / "index")
    for defence in ("shield", "veto"):
        done = generate(folder, PROMPT, "--index", tmp_path / "index", "--defence", defence, *DEFENCE)
        assert done.exit_code == 2
        assert "not the one of the index" in done.stderr


def test_a_prompt_may_hold_anything(folder: Path) -> None:
    stdin = json.dumps({"prompt": "mill \ud800 \u0000 \u202e"})
    done = generate(folder, "--jsonl", "-", "--json", "--max-new-tokens", 3, stdin=stdin)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["prompt"] == "mill \ud800 \u0000 \u202e"
