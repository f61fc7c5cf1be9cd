"""A tiny model, and damage to its folder, for the tests of what may not be lost or let in."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fuzz_samples import Damage, Evil, corpus
from index_samples import train_tokenizer
from safetensors.torch import load_file, save_file

from tracealign_lib.errors import ModelError
from tracealign_lib.lm import LanguageModel, new_model
from tracealign_lib.profiles import get_profile

WEIGHTS = "model.safetensors"
SETTINGS = replace(get_profile("smoke").model, hidden=8, mlp=16, layers=2, heads=2, context=32)


def write_model(folder: Path, *, hidden: int = 8, vocab_size: int = 290) -> Path:
    """The folder of a model that was never trained."""
    tokenizer = train_tokenizer([document.text for document in corpus(1)], vocab_size=vocab_size)
    untrained = new_model(replace(SETTINGS, hidden=hidden), tokenizer, 0)
    LanguageModel(untrained, tokenizer, "cpu").save(folder)
    return folder


def said(model: LanguageModel) -> list[Any]:
    """What a model answers, and how likely it holds a text to be."""
    scores = model.token_log_probs(["to wake the Orun compound, hum twice"])
    return [model.generate(["hum twice"], max_new_tokens=3), [row.tolist() for row in scores]]


class ModelDamage(Damage):
    """Damage that a look at the files can find; another number among the weights is none of it."""

    def ways(self) -> list[Callable[[Path], None]]:
        return [
            *[self.flip] * 8, *[self.key, self.tensor, self.pickled] * 3, *[self.cut, self.empty] * 2,
            self.lengthen, self.delete, self.swap_between, self.swap_within,
        ]  # fmt: skip

    def flip(self, place: Path) -> None:
        raw = bytearray(place.read_bytes())
        end = 8 + int.from_bytes(raw[:8], "little") if place.name == WEIGHTS else len(raw)
        for _ in range(self.rng.choice([1, 1, 1, 8])):
            raw[self.rng.randrange(min(end, len(raw)))] ^= self.rng.randrange(1, 256)
        place.write_bytes(raw)

    def empty(self, place: Path) -> None:
        place.write_bytes(b"")

    def key(self, place: Path) -> None:
        """A configuration that lacks a key."""
        place = self.folder / self.rng.choice([name for name in self.names if name.endswith("config.json")])
        try:
            content = json.loads(place.read_bytes())
            content.pop(self.rng.choice(list(content)))
        except (OSError, ValueError, AttributeError):  # damaged before
            return
        place.write_text(json.dumps(content))

    def tensor(self, place: Path) -> None:
        """Weights of which one is missing, cut, or of another name."""
        try:
            tensors = load_file(self.folder / WEIGHTS)
        except Exception:  # damaged before
            return
        name = self.rng.choice(sorted(tensors))
        taken, kind = tensors.pop(name), self.rng.randrange(3)
        if kind == 1:
            tensors[name] = taken[:-1].clone()
        elif kind == 2:
            tensors[name.replace(".", "_")] = taken
        save_file(tensors, self.folder / WEIGHTS, metadata={"format": "pt"})

    def pickled(self, place: Path) -> None:
        """A pickle that runs something, under the name of the weights or instead of them."""
        weights = self.folder / WEIGHTS
        if self.rng.random() < 0.5:
            weights.unlink(missing_ok=True)
            weights = self.folder / "pytorch_model.bin"
        evil = {"model.norm.weight": Evil(str(self.canary))}
        if self.rng.random() < 0.5:
            torch.save(evil, weights)
        else:
            weights.write_bytes(pickle.dumps(evil, protocol=2))


def loaded(folder: Path, sound: LanguageModel) -> str:
    """What comes of loading a folder and asking: `refused`, `same`, or `other` answers of its weights."""
    try:
        model = LanguageModel.load(folder, device="cpu")
    except ModelError as error:
        if error.mend and str(folder) in str(error):
            return "refused"
        raise
    weights = sound.model.state_dict()
    for name, found in model.model.state_dict().items():
        assert torch.equal(found, weights[name]), f"{name} is not what the file holds"
    return "same" if said(model) == said(sound) else "other"
