"""Fuzzing with atheris: opens folders that it makes up, guided by the lines of code that they reach.

`python fuzz_index.py -runs=N -max_len=L` takes the options of libFuzzer. Each input is the content of one
file of a small index, named by its first byte; the second says whether the manifest vouches for it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

from tracealign_lib import suffix_array  # noqa: F401  # compiled code cannot be instrumented

with atheris.instrument_imports(
    include=["tracealign_lib.index_format", "tracealign_lib.index_place", "tracealign_lib.index"]
):
    from tracealign_lib import index  # noqa: F401

from fuzz_damage import limit_memory
from fuzz_samples import answers, build, outcome, read_folder, tokenizer, vouch, write_folder


class Target:
    """One small index whose files are replaced by inputs."""

    def __init__(self, root: Path) -> None:
        index = build("texts", 1, root / "sound", tokenizer())
        self.content, self.sound, self.folder = read_folder(index.path), answers(index), root / "case"
        self.names = sorted(self.content)

    def seeds(self, folder: Path) -> None:
        for number, name in enumerate(self.names):
            for vouched in (0, 1):
                (folder / f"{number}-{vouched}").write_bytes(bytes([number, vouched]) + self.content[name])

    def __call__(self, given: bytes) -> None:
        if len(given) < 2:
            return
        name = self.names[given[0] % len(self.names)]
        write_folder(self.folder, self.content | {name: given[2:]})
        if given[1] % 2:
            vouch(self.folder)
        for verify in ("manifest", "full"):
            found = outcome(self.folder, verify, self.sound)
            if verify == "full" and found == "other" and not given[1] % 2:
                raise AssertionError("other answers were verified")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        target = Target(root)
        seeds = root / "seeds"
        seeds.mkdir()
        target.seeds(seeds)
        limit_memory()
        atheris.Setup([*sys.argv, str(seeds)], target)
        atheris.Fuzz()
