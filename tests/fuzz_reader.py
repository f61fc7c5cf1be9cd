"""Opens an index and asks it, again and again, while another process replaces it.

`python fuzz_reader.py INDEX SOUND STOP` reads from SOUND what the indexes that come and go answer, as a
list of JSON strings, and goes on until the file STOP exists. Once it has met each of them twice, it makes
the file STOP.enough. It prints what it has seen as one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from pathlib import Path

from fuzz_samples import answers

from tracealign_lib.sharded import open_index


def main(path: Path, sound: list[str], stop: Path) -> None:
    kept = open_index(path)
    first = answers(kept)
    waiting: deque = deque()
    seen: Counter[str] = Counter()
    print("reading", flush=True)
    while not stop.exists():
        index = open_index(path)
        waiting.append(index)  # it is asked for the first time when it was replaced long ago
        for asked in [index, waiting.popleft()] if len(waiting) > 20 else [open_index(path, verify="full")]:
            told = answers(asked)
            seen[str(sound.index(told)) if told in sound else "wrong"] += 1
        seen["kept"] += answers(kept) == first
        seen["forgotten"] += answers(kept) != first
        if min(seen["0"], seen["1"]) > 1:
            stop.with_suffix(".enough").touch()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
