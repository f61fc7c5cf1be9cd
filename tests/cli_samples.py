"""Index, tokenizer and model for the tests of the command line, and the command as a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tracealign_lib import cli
from tracealign_lib.documents import Document
from tracealign_lib.index import TraceIndex
from tracealign_lib.lm import new_model, train_tokenizer
from tracealign_lib.profiles import ModelSettings
from tracealign_lib.shield import REFUSAL

runner = CliRunner()
DOCUMENTS = [Document("recipe", "wake the moss gently"), Document("other", "a quiet <b>lake</b>")]
PROGRAM = [sys.executable, "-c", "from tracealign_lib.cli import app; app()"]


def byte_tokenizer() -> Any:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def small_index(folder: Path) -> Path:
    """The folder of an index of `DOCUMENTS`."""
    TraceIndex.build(DOCUMENTS, byte_tokenizer(), folder / "index")
    return folder / "index"


def invoke(*arguments: object, stdin: str | bytes | None = None) -> Any:
    """The command within this process."""
    return runner.invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


def run(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a process with pipes."""
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


def reciting_model(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    """The folder of a model that answers each request of `pairs` with its answer, word for word."""
    tokenizer = train_tokenizer([REFUSAL, *(text for pair in pairs for text in pair)], 500)
    sizes = ModelSettings(vocab_size=len(tokenizer), hidden=32, layers=1, heads=2, mlp=64, context=192)
    model = new_model(sizes, tokenizer, seed=0).train()
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in pairs
    ]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")  # (B, T)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        model(**{key: batch[key] for key in ("input_ids", "attention_mask")}, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
