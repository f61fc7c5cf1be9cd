"""Builds on a disk that fills up, and looks at what stands there then.

`python fuzz_disk.py FOLDER KIND TIMES SEED` limits the size of files (RLIMIT_FSIZE). With a fifth argument, a
file system of that many bytes is mounted on the folder, which needs a mount namespace of its own, and filled.
It prints one JSON line for each build.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuzz_samples import answers, corpus, tokenizer

from tracealign_lib.errors import StorageError
from tracealign_lib.index import TraceIndex
from tracealign_lib.sharded import ShardedIndex, open_index


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextmanager
def free_space(root: Path, size: int) -> Iterator[None]:
    ballast = root / "ballast"
    free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - size))
    try:
        yield
    finally:
        ballast.unlink()


def size_of(folder: Path) -> tuple[int, int]:
    """Bytes of the largest file, and of all files."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return max(sizes), sum(sizes)


def main(root: Path, kind: str, times: int, seed: int, mounted: bool) -> None:
    path, coder, rng = root / "a.index", tokenizer(), random.Random(seed)
    corpora = {number: corpus(number, n=60, length=120) for number in (1, 2)}

    def build(number: int) -> None:
        if kind == "texts":
            TraceIndex.build(corpora[number], coder, path)
        else:
            ShardedIndex.build(corpora[number], coder, path, shard_bytes=5000)

    sound = {}
    for number in corpora:
        build(number)
        sound[number] = answers(open_index(path, verify="full"))
    largest, total = size_of(path)
    before = 2
    for _ in range(times):
        target = 3 - before
        share = (3 if mounted else 1.3) * rng.random()  # a build beside the older index wants twice as much
        limit = free_space(root, int(share * total)) if mounted else largest_file(int(share * largest))
        said = None
        try:
            with limit:
                build(target)
            before = target
        except StorageError as error:
            said = str(error)
        assert said is None or (str(root) in said and "to mend" in said), said
        assert answers(open_index(path, verify="full")) == sound[before]
        left = sorted(entry.name for entry in root.iterdir() if entry.name != "ballast")
        assert left in (["a.index"], [".a.index.building", "a.index"][kind == "texts" :]), left
        print(json.dumps({"share": share, "said": said}), flush=True)
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        try:
            build(1)
        except StorageError as error:
            print(json.dumps({"share": 0, "said": str(error)}), flush=True)
        subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
    build(3 - before)
    assert answers(open_index(path, verify="full")) == sound[3 - before]
    assert [entry.name for entry in root.iterdir()] == ["a.index"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if len(sys.argv) > 5:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={sys.argv[5]}", "tmpfs", str(folder)], check=True
        )
    main(folder, sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), mounted=len(sys.argv) > 5)
