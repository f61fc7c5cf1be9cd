"""Opens damaged folders one after the other in a process of its own, so that a crash or a hang is seen.

`python fuzz_damage.py FOLDER FIRST END` prints one JSON line for each seed before it is tried and one with
what came of it; the last line is the memory at the peak.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from fuzz_samples import KINDS, Damage, answers, build, outcome, read_folder, tokenizer, write_folder

ROOM = 2**29
"""Bytes that may be mapped on top of what the process holds before the first damaged folder."""
PATIENCE = 20
"""Seconds for one folder, after which the process is ended by an alarm."""


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    held = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))


def try_one(seed: int, root: Path, samples: dict[str, tuple]) -> dict[str, str]:
    kind = KINDS[seed % len(KINDS)]
    content, other, sound = samples[kind]
    folder, outside = root / "case", root / "outside"
    write_folder(folder, content)
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    done = Damage(folder, other, outside, root / "canary", seed).make()
    print(json.dumps({"seed": seed, "kind": kind, "done": done}), flush=True)
    signal.alarm(PATIENCE)
    try:
        found = {verify: outcome(folder, verify, sound) for verify in ("manifest", "full")}
        # whoever may write all hashes anew can write another index; anything less is found
        assert found["full"] != "other" or done.endswith("vouch"), "other answers were verified"
        # what is no file, leads out of the folder or is endless is never read, whatever it holds
        ways = [part.split()[0] for part in done.split(", ") if part != "vouch"]
        if ways in (["link"], ["special"], ["sparse"]):
            assert set(found.values()) == {"refused"}, found
        return found
    except Exception:
        return {"fault": traceback.format_exc()}
    finally:
        signal.alarm(0)


def main(first: int, end: int, root: Path) -> None:
    coder = tokenizer()
    samples = {}
    for kind in KINDS:
        mine, theirs = build(kind, 1, root / kind, coder), build(kind, 2, root / f"other-{kind}", coder)
        samples[kind] = read_folder(mine.path), read_folder(theirs.path), answers(mine)
        answers(theirs)
    limit_memory()
    for seed in range(first, end):
        found = try_one(seed, root, samples)
        print(json.dumps({"seed": seed, "found": found, "ran": (root / "canary").exists()}), flush=True)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as scratch:
        main(int(sys.argv[2]), int(sys.argv[3]), Path(scratch))
