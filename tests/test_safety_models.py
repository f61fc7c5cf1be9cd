"""A damaged model folder is refused by name or answers as before; nothing in it runs, no weight is drawn."""

from __future__ import annotations

import builtins
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fuzz_models import ModelDamage, loaded, write_model
from fuzz_samples import read_folder, write_folder

from tracealign_lib.errors import ModelError
from tracealign_lib.lm import LanguageModel

FOLDERS = 200


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is asked whether code may run says yes; and no file that is missing is looked for elsewhere."""
    monkeypatch.setattr(builtins, "input", lambda *question: "y")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_damaged_model_folders(tmp_path: Path, say: Any) -> None:
    sound = LanguageModel.load(write_model(tmp_path / "sound"), device="cpu")
    content = read_folder(tmp_path / "sound")
    other = read_folder(write_model(tmp_path / "other", hidden=16, vocab_size=270))
    folder, canary, found = tmp_path / "case", tmp_path / "canary", Counter[str]()
    for seed in range(FOLDERS):
        write_folder(folder, content)
        done = ModelDamage(folder, other, tmp_path, canary, seed).make()
        try:
            what = loaded(folder, sound)
        except BaseException as error:  # a panic of compiled code is no Exception
            raise AssertionError(f"{seed}: {done}") from error
        assert not canary.exists(), f"{seed}: {done}"
        # a whole tokenizer or configuration of another model cannot be told from the model's own
        assert what != "other" or "swap" in done or "key" in done, f"{seed}: {done}"
        found[what] += 1
    say(
        f"{FOLDERS} damaged model folders: {found['refused']} refused by name, {found['same']} identical "
        f"answers, {found['other']} answers of the same weights with another tokenizer or configuration; "
        "nothing run, no weight drawn at random"
    )
    assert found["refused"] > FOLDERS / 2
    assert found["same"] > FOLDERS / 20


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_that_a_model_folder_brings_is_not_run(name: str, tmp_path: Path) -> None:
    """transformers would ask on standard input, where prompts are read from, and run it after a `y`."""
    folder, canary = write_model(tmp_path / "model"), tmp_path / "canary"
    (folder / "mine.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    config = json.loads((folder / name).read_text())
    if name == "config.json":
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
        }
    else:
        config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Tokenizer"]}}
    (folder / name).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="contains custom code"):
        LanguageModel.load(folder, device="cpu")
    assert not canary.exists()
