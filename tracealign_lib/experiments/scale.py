"""What chapter 11 measures of scale and safety: builds in shards, what larger corpora need, and damage."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from tracealign_lib.build_cost import Build
from tracealign_lib.documents import Document, write_documents
from tracealign_lib.errors import ResultsError, TraceAlignError
from tracealign_lib.index import TraceIndex
from tracealign_lib.results import load_results
from tracealign_lib.sharded import Here, Promise, ShardedIndex, open_index

T = TypeVar("T")

SIZES = (10**6, 10**7, 10**8, 10**9, 3 * 10**9, 10**10, 10**11, 10**12)

# --- builds ---------------------------------------------------------------------------------------


def build_table(builds: Iterable[Build]) -> pd.DataFrame:
    """Builds side by side, per token where that can be compared."""
    rows = [
        {
            "shards": build.shards,
            "tokens": f"{build.tokens:,}",
            "seconds": build.seconds,
            "CPU seconds": build.cpu,
            "bytes a token on disk": build.disk / build.tokens,
            "of these text": build.text / build.tokens,
            "peak memory (MB)": build.peak / 1e6,
        }
        for build in builds
    ]
    return pd.DataFrame(rows)


# --- larger corpora ------------------------------------------------------------------------------


def published_builds(name: str = "real-corpus") -> list[Build]:
    """The builds that were published, largest last; none where nothing was."""
    try:
        rows = load_results(name)["builds"]
    except ResultsError:
        return []
    return sorted((Build(**row) for row in rows), key=lambda build: (build.tokens, build.shards))


def sizing_table(builds: Sequence[Build]) -> pd.DataFrame:
    """What corpora of 1M to 1T tokens need: the rows of `builds` as measured, the others computed.

    Computed rows are proportional to the largest build (that in most shards): its text, disk and CPU time a
    token, its tokens a shard. The memory of a shard is interpolated between builds in one piece, and no
    shard takes less than the smallest of them.
    """
    largest = max(builds, key=lambda build: (build.tokens, build.shards))
    whole = sorted((b for b in builds if b.shards == 1 or b is largest), key=lambda b: b.tokens / b.shards)
    known = [build.tokens / build.shards for build in whole], [build.peak for build in whole]
    per_shard = largest.tokens / largest.shards
    rows = [(build.tokens, "measured", build, build.shards, float(build.peak), build.cpu) for build in builds]
    for tokens in SIZES:
        shards = math.ceil(tokens / per_shard)
        peak = float(np.interp(min(tokens, per_shard), *known))
        rows.append((tokens, "computed", largest, shards, peak, largest.cpu * tokens / largest.tokens))
    return pd.DataFrame(_sizing_row(*row) for row in sorted(rows, key=lambda row: (row[0], row[3])))


def _sizing_row(tokens: int, how: str, like: Build, shards: int, peak: float, cpu: float) -> dict[str, str]:
    return {
        "tokens": f"{tokens:,}",
        "row": how,
        "text": magnitude(like.text / like.tokens * tokens, "B"),
        "index on disk": magnitude(like.disk / like.tokens * tokens, "B"),
        "shards": f"{shards:,}",
        "memory to build": magnitude(peak, "B"),
        "CPU time": duration(cpu),
        "on 100 cores": duration(cpu / min(100, shards)) if how == "computed" else "",
    }


def magnitude(value: float, unit: str) -> str:
    """A number with two digits and a decimal prefix: 12 MB."""
    power = min(4, max(0, int(math.log10(max(value, 1) * 1.0005) // 3)))
    digits = f"{value / 1000**power:.2g}" if value < 99.5 * 1000**power else f"{value / 1000**power:.0f}"
    return f"{digits} {('', 'k', 'M', 'G', 'T')[power]}{unit}"


def duration(seconds: float) -> str:
    """Seconds in the unit in which one would say them."""
    for limit, unit, size in ((100, "s", 1), (6000, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86_400:.0f} days"


# --- what a reader sees --------------------------------------------------------------------------


def attempt(call: Callable[[], T]) -> T | None:
    """The result of `call`; where it raises an error of the library, that is printed as a reader sees it."""
    try:
        return call()
    except TraceAlignError as error:
        print(f"{type(error).__name__}: {error}")
        return None


def same_answers(engines: Sequence[Any], texts: Iterable[str]) -> bool:
    """Whether engines give the same spans and the same sources for all texts."""
    for text in texts:
        ids = engines[0].encode(text)
        answers = [(engine.spans(ids), engine.sources(ids, limit=20)) for engine in engines]
        if any(answer != answers[0] for answer in answers[1:]):
            return False
    return True


# --- accidents -----------------------------------------------------------------------------------

_REBUILD = """
import sys
from pathlib import Path
from tracealign_lib.documents import read_documents
from tracealign_lib.index import TraceIndex
documents, folder = read_documents(sys.argv[1]), Path(sys.argv[2])
tokenizer = TraceIndex.open(folder).tokenizer
print("ready", flush=True)
while True:
    TraceIndex.build(documents, tokenizer, folder)
"""


def accidents(documents: Sequence[Document], tokenizer: Any, *, moments: int = 3) -> pd.DataFrame:
    """What happens to an index when its build is killed or stopped, and when its files are damaged.

    Each accident is made in a temporary folder: `moments` builds are killed (where the system can), one in
    shards is stopped halfway, a byte is flipped, a file is cut.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            ("build over an older index killed outright", _kill(documents, tokenizer, folder, moments)),
            ("build in shards stopped halfway, started again", _stop(documents, tokenizer, folder)),
            ("one bit flipped, opened with verify='full'", _damage(folder / "index", _flip, "full")),
            ("a file cut in half, opened", _damage(folder / "index", _cut, "manifest")),
        ]
    return pd.DataFrame(rows, columns=["accident", "what a reader finds"])


def _kill(documents: Sequence[Document], tokenizer: Any, folder: Path, moments: int) -> str:
    index = TraceIndex.build(documents, tokenizer, folder / "index")
    query = index.document_tokens(index.document_ids[0])[:4]
    expected = index.count(query)
    write_documents(documents, folder / "documents.jsonl")
    intact = 0
    for moment in range(moments):
        command = [sys.executable, "-c", _REBUILD, str(folder / "documents.jsonl"), str(folder / "index")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()  # it is building from here on
            time.sleep(0.05 + 0.15 * moment)
            process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        try:
            intact += open_index(folder / "index", verify="full").count(query) == expected
        except TraceAlignError as error:
            return error.problem
    return f"an intact index with the old answers, {intact} of {moments} times"


class _Stopped(Exception):
    pass


class _Counting(Here):
    """Counts the shards that are built."""

    built = 0

    def submit(self, work: Callable[..., None], /, *arguments: Any) -> Promise:
        self.built += 1
        return super().submit(work, *arguments)


def _stop(documents: Sequence[Document], tokenizer: Any, folder: Path) -> str:
    size = sum(len(document.text.encode("utf-8")) for document in documents)
    workers = _Counting()

    def stopping() -> Iterator[Document]:
        yield from islice(documents, len(documents) * 3 // 4)
        raise _Stopped

    def build(stream: Iterable[Document]) -> ShardedIndex:
        path, most = folder / "shards", size // 6 + 1
        return ShardedIndex.build(stream, tokenizer, path, shard_bytes=most, workers=workers)

    try:
        build(stopping())
    except _Stopped:
        first = workers.built
    index = build(documents)
    return f"the {first} finished shards kept, {workers.built - first} of {index.n_shards} built"


def _damage(index: Path, change: Callable[[bytearray], bytearray], verify: str) -> str:
    file = index / "suffixes.npy"
    sound = file.read_bytes()
    file.write_bytes(change(bytearray(sound)))
    try:
        open_index(index, verify=verify)
        return "nothing: the damage was not noticed"
    except TraceAlignError as error:
        told = str(error.given).replace(str(index.resolve()), "…").replace(str(index), "…")
        return f"{type(error).__name__}: {error.problem} {told}"
    finally:
        file.write_bytes(sound)


def _flip(raw: bytearray) -> bytearray:
    raw[len(raw) // 2] ^= 1
    return raw


def _cut(raw: bytearray) -> bytearray:
    return raw[: len(raw) // 2]
