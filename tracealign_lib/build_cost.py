"""What building an index takes: time, disk and memory, measured on the build itself."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tracealign_lib.documents import Document
from tracealign_lib.files import write_atomically
from tracealign_lib.index import TraceIndex
from tracealign_lib.sharded import ShardedIndex

_SAMPLING = 0.005  # seconds between two looks at the memory


class Build(NamedTuple):
    """What it took to turn texts into an index.

    `text`, `disk` and `peak` are bytes: of the texts, of the index, and of memory above what the process
    held before. `seconds` are wall-clock, `cpu` the process's own; reading and tokenising are part of both.
    """

    shards: int
    documents: int
    tokens: int
    text: int
    disk: int
    peak: int
    seconds: float
    cpu: float

    def write(self, path: Path) -> None:
        """Keep this measurement as a JSON file."""
        write_atomically(path, json.dumps(self._asdict()))

    @classmethod
    def read(cls, path: Path) -> Build:
        """What `write` has kept."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Peak:
    """Set when `peak_memory` ends: bytes above the start."""

    bytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch the resident memory of this process; the highest value is there when the context ends."""
    process, peak, ended = psutil.Process(), Peak(), threading.Event()
    start = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(_SAMPLING):
            peak.bytes = max(peak.bytes, process.memory_info().rss - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def measure_build(
    documents: Callable[[], Iterable[Document]], tokenizer: Any, path: Path, *, shard_bytes: int | None = None
) -> Build:
    """Build an index at `path` from a stream, as one or in shards of `shard_bytes`, and measure it."""
    text = sum(len(document.text.encode("utf-8")) for document in documents())
    start, cpu = time.perf_counter(), time.process_time()
    index: TraceIndex | ShardedIndex
    with peak_memory() as peak:
        if shard_bytes is None:
            index = TraceIndex.build(documents(), tokenizer, path)
        else:
            index = ShardedIndex.build(documents(), tokenizer, path, shard_bytes=shard_bytes)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shards = index.n_shards if isinstance(index, ShardedIndex) else 1
    return Build(shards, index.n_documents, index.n_tokens, text, disk, peak.bytes, seconds, cpu)
