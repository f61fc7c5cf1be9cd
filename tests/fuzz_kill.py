"""Kills builds at random moments, and looks at what stands there then.

`python fuzz_kill.py FOLDER KIND MOMENTS SEED` builds one of two corpora over an index of the other, in a
child that is killed after a random part of the time that a build takes. It prints a JSON line for each kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from fuzz_samples import answers, corpus, tokenizer

from tracealign_lib.errors import IndexFormatError
from tracealign_lib.index import TraceIndex
from tracealign_lib.sharded import ShardedIndex, open_index


class Bench:
    """One path, the two corpora that are built there in turn, and what their indexes answer."""

    def __init__(self, root: Path, kind: str) -> None:
        self.path, self.kind, self.coder = root / "a.index", kind, tokenizer()
        self.corpora = {number: corpus(number, n=150, length=120) for number in (1, 2)}
        self.sound = {}
        for number in self.corpora:
            self.build(number)
            self.sound[answers(open_index(self.path, verify="full"))] = number
        started = time.monotonic()
        os.waitpid(self.start(2), 0)
        self.duration = time.monotonic() - started

    def build(self, number: int) -> None:
        if self.kind == "texts":
            TraceIndex.build(self.corpora[number], self.coder, self.path)
        else:
            ShardedIndex.build(iter(self.corpora[number]), self.coder, self.path, shard_bytes=5000)

    def start(self, number: int) -> int:
        """The process of a build that was begun."""
        child = os.fork()
        if child == 0:
            try:
                self.build(number)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        return child

    def killed_build(self, number: int, moment: float) -> bool:
        """Whether a build was killed `moment` seconds after it began; False if it had ended by then."""
        child = self.start(number)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), "the build failed by itself"
        return status != 0

    def stands(self, path: Path) -> int:
        """Which corpus the whole index at `path` is of; anything else is a wrong answer."""
        return self.sound[answers(open_index(path, verify="full"))]

    def look(self) -> tuple[str, int]:
        """Whether an index stands at its place or was set aside by the kill, and which one it is."""
        try:
            return "stands", self.stands(self.path)
        except IndexFormatError as error:
            if error.problem != "A build was stopped while it replaced this index." or error.mend is None:
                raise
            return "aside", self.stands(self.path.parent / error.mend.split()[1])


def main(root: Path, kind: str, moments: int, seed: int) -> None:
    bench, rng = Bench(root, kind), random.Random(seed)
    before = 2
    for _ in range(moments):
        target = 3 - before
        kept = len(list(root.glob(".a.index.building/shard-*/manifest.json")))
        killed = bench.killed_build(target, 1.1 * rng.random() * bench.duration)
        where, number = bench.look()
        assert number in (
            (before, target) if killed and where == "stands" else (before,) if killed else (target,)
        )
        print(
            json.dumps({"killed": killed, "where": where, "new": number == target, "kept": kept}), flush=True
        )
        before = number
    bench.build(3 - before)
    assert bench.look() == ("stands", 3 - before)
    assert [entry.name for entry in root.iterdir()] == ["a.index"], "the last build leaves nothing behind"
    print(json.dumps({"duration": bench.duration}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
