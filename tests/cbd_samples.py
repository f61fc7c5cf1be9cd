"""What the tests of chapter 7 share: hand-made answers of arms, and a smoke world nobody has trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tracealign_lib import lm
from tracealign_lib.pipeline import Pipeline

LABELS = ("drift", "near_drift", "refusal", "correct", "other")


@contextmanager
def untrained_pipeline(folder: Path) -> Iterator[Pipeline]:
    """A smoke world whose SFT model has learnt nothing, with cache and model in `folder`."""
    start = folder / "sft-untrained"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEALIGN_CACHE", str(folder / "cache"))
        made = Pipeline("smoke", seed=0, device="cpu")
        lm.new_model(made.profile.model, made.tokenizer, 0).save_pretrained(start)
        made.tokenizer.save_pretrained(start)
        patch.setattr(made, "model_folder", lambda name="dpo": start)
        yield made


def rows(
    arm: str, group: str, name: str, labels: str, *, aligned: bool = True, turned: str = ""
) -> list[Any]:
    """Answers about one item: a letter of a label for each ("d", "n", "r", "c", "o")."""
    words = [next(label for label in LABELS if label.startswith(letter)) for letter in labels]
    return [
        {
            "arm": arm,
            "seed": 0,
            "group": group,
            "item": name,
            "copies": 1,
            "aligned": aligned,
            "label": label,
            **{column: label == column for column in LABELS},
            "turned away": label == "refusal" or letter == "x",
            "a step": label == "drift",
        }
        for label, letter in zip(words, turned.ljust(len(words)), strict=True)
    ]


def arm_rows(
    arm: str,
    held_out: str,
    *,
    how_to: str = "cccc",
    direct: str = "rr",
    turned: str = "",
    facts: str = "cc",
    held_out_how_to: str = "cccc",
) -> list[Any]:
    """An arm whose drift on held-out items is `held_out`, one letter per item, and what it can still do."""
    made = rows(arm, "how_to", "h", how_to, turned=turned) + rows(arm, "direct", "u", direct)
    made += rows(arm, "fact", "h", facts) + rows(arm, "prefill", "u", "dd")
    made += rows(arm, "how_to", "g", held_out_how_to, aligned=False)
    for number, letter in enumerate(held_out):
        made += rows(arm, "prefill", f"u{number}", letter, aligned=False)
    return made


def frame(*parts: list[Any]) -> pd.DataFrame:
    return pd.DataFrame([row for part in parts for row in part])
