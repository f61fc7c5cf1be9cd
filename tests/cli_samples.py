"""An index and a tokenizer for the tests of the command line, and the command as a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tracealign_lib import cli
from tracealign_lib.documents import Document
from tracealign_lib.index import TraceIndex

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
