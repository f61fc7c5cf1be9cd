"""Fuzzing guided by coverage, where atheris is installed (version 3.0.0, Apache-2.0, Linux)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_atheris_finds_no_folder_that_does_anything_else(tmp_path: Path, say: Any) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed")
    command = [
        sys.executable,
        HERE / "fuzz_index.py",
        "-runs=4000",
        "-seed=6",
        "-max_len=30000",
        "-timeout=60",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (runs,) = re.findall(r"Done (\d+) runs", done.stderr)
    say(f"atheris: {int(runs):,} inputs, each refused by name or answered as before")
    assert int(runs) >= 4000
