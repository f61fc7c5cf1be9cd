"""How fast a TraceIndex is built and searched, beside infini-gram on the same tokens and machine.

The corpus is the text of every package that this Python has installed, in 32,000 BPE ids learnt from it;
beyond its end, copies follow whose ids are shuffled, so that frequencies stay and passages do not repeat.
Every build runs in a process of its own; at the size of the comparison, the two engines take turns and the
median of several rounds counts. Writes data/results/index-speed.json.

    python benchmarks/index_speed.py [MILLIONS OF TOKENS] [GREATEST SIZE OF THE GROWTH CURVE]

Without infini-gram (extra `scale`) its rows are left out.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tracealign_lib import index as index_module
from tracealign_lib import suffix_array, suffix_array_numpy
from tracealign_lib.build_cost import peak_memory
from tracealign_lib.index import TraceIndex
from tracealign_lib.installation import Installation
from tracealign_lib.results import write_results
from tracealign_lib.sharded import LocalShards, Manifest, ShardedIndex

VOCABULARY = 32_000
WIDE = 100_000
GROWTH = (1, 2, 5, 10, 20, 50, 100, 200)  # million tokens
QUERY = 100  # tokens
QUERIES = 100
ROUNDS = 3  # of each part at the size of the comparison
SHARDS = (1, 4, 16, 64)  # of a tenth of the tokens
MILLION = 10**6


def main(millions: int = 50, greatest: int = 200) -> None:
    """Measure, print as it goes, and write the results file."""
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="index-speed-"))
    try:
        own = _prepare(folder, max(millions, greatest))
        sizes = sorted({n for n in GROWTH if n <= greatest} | {millions})
        rival = ("rival_build", "rival_query") if find_spec("infini_gram") is not None else ()
        growth = [_summary(_rounds(folder, size, ROUNDS if size <= millions else 1)) for size in sizes]
        compared = _summary(_rounds(folder, millions, ROUNDS, *rival, "places", "wide", "shards"))
        values = {"compared": compared, "growth": growth}
        settings = {
            "vocabulary": VOCABULARY,
            "tokens_of_text": own,
            "query_tokens": QUERY,
            "queries": QUERIES,
            "rounds": ROUNDS,
            "infini-gram": version("infini-gram") if rival else "not installed",
            "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        }
        seconds = time.monotonic() - start
        write_results(
            "index-speed", values, profile="full", seeds=[0], settings=settings, device="cpu", seconds=seconds
        )
    finally:
        shutil.rmtree(folder)


def _prepare(folder: Path, millions: int) -> int:
    """Write `tokens.npy` and `lengths.npy` of the text, `millions` of tokens at most; returns how many."""
    texts = [document.text for document in Installation.find().documents()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts[::20], trainer)
    parts: list[np.ndarray] = []
    held = 0
    random.Random(0).shuffle(texts)  # or the small sizes would be the first packages of the alphabet
    for first in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch(texts[first : first + 256]):
            parts.append(np.array(encoding.ids, dtype=np.uint16))
            held += len(parts[-1])
        if held >= millions * MILLION:
            break
    np.save(folder / "tokens.npy", np.concatenate(parts))
    np.save(folder / "lengths.npy", [len(part) for part in parts])
    return held


def _documents(folder: Path, millions: int) -> list[np.ndarray]:
    """The first so many tokens, as documents; behind the end of the text, shuffled copies of it."""
    tokens, lengths = np.load(folder / "tokens.npy")[: millions * MILLION], np.load(folder / "lengths.npy")
    ends = np.cumsum(lengths)
    whole = np.split(tokens, ends[ends < len(tokens)])
    documents: list[np.ndarray] = []
    left, copy = millions * MILLION, 0
    while left > 0:
        shuffled = np.random.default_rng(copy).permutation(VOCABULARY).astype(np.uint16)
        for document in whole:
            part = document[:left]
            documents.append(part if copy == 0 else shuffled[part])
            left -= len(part)
            if left <= 0:
                break
        copy += 1
    return documents


def _rounds(folder: Path, millions: int, rounds: int, *parts: str) -> list[dict[str, Any]]:
    """What the parts measure of an index of so many million tokens, in every round anew."""
    found = []
    for _ in range(rounds):
        found.append({})
        for part in ("build", "query", "open", *parts):  # warm before cold
            found[-1] |= _apart(part, folder, millions)
        shutil.rmtree(folder / "index")
        shutil.rmtree(folder / "rival", ignore_errors=True)
        print(json.dumps(found[-1]), flush=True)
    return found


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each measure over rounds, and the least and the greatest."""
    columns = {key: [row[key] for row in rounds] for key in rounds[0]}
    return {key: [float(f(column)) for f in (np.median, min, max)] for key, column in columns.items()}


def _apart(part: str, folder: Path, millions: int) -> dict[str, Any]:
    """What a part measures in a process of its own."""
    command = [sys.executable, __file__, "--part", part, str(folder), str(millions)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part} of {millions} million tokens failed:\n{done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _cpu(who: int = resource.RUSAGE_SELF) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def build(folder: Path, millions: int) -> dict[str, Any]:
    """Seconds, CPU seconds, bytes on disk and peak memory of a build."""
    TraceIndex.build_tokens([[0, 1]], folder / "warm", vocab_size=VOCABULARY)  # compiled loops are loaded
    documents = _documents(folder, millions)
    start, cpu = time.perf_counter(), _cpu()
    with peak_memory() as peak:  # above what the process holds, its input included
        TraceIndex.build_tokens(documents, folder / "index", vocab_size=VOCABULARY)
    return {
        "tokens": millions * MILLION,
        "documents": len(documents),
        "build, seconds": time.perf_counter() - start,
        "build, CPU seconds": _cpu() - cpu,
        "build, peak bytes a token": peak.bytes / (millions * MILLION),
        "size, bytes a token": _bytes(folder / "index") / (millions * MILLION),
    }


def wide(folder: Path, millions: int) -> dict[str, Any]:
    """The same build for a vocabulary that needs ids of 32 bits."""
    documents = _documents(folder, millions)
    start = time.perf_counter()
    TraceIndex.build_tokens(documents, folder / "wide", vocab_size=WIDE)
    seconds, size = time.perf_counter() - start, _bytes(folder / "wide")
    shutil.rmtree(folder / "wide")
    return {"32 bits: build, seconds": seconds, "32 bits: size, bytes a token": size / (millions * MILLION)}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def open_(folder: Path, millions: int) -> dict[str, Any]:
    """Milliseconds to open the index, and to the first answer when nothing of it is in memory."""
    for path in (folder / "index").rglob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    warm = TraceIndex.open(folder / "warm")
    warm.spans([0, 1])
    query = _queries(folder)[0]
    start = time.perf_counter()
    index = TraceIndex.open(folder / "index")
    opened = time.perf_counter()
    index.spans(query)
    answered = time.perf_counter()
    again = [_timed(lambda: TraceIndex.open(folder / "index")) for _ in range(20)]
    return {
        "open, ms": 1e3 * float(np.median(again)),
        "open when cold, ms": 1e3 * (opened - start),
        "first query when cold, ms": 1e3 * (answered - opened),
    }


def query(folder: Path, millions: int) -> dict[str, Any]:
    """Milliseconds of the searches, with compiled loops and with numpy."""
    index, queries = TraceIndex.open(folder / "index"), _queries(folder)
    found: dict[str, Any] = {}
    for name, module in (("numba", suffix_array), ("numpy", suffix_array_numpy)):
        index_module._search = module
        found |= _texts(f"spans, {name}", index.spans, queries)
    index_module._search = suffix_array
    wall = _timed(lambda: index.spans_of(queries * 5))
    found["spans of many texts, ms a text"] = 1e3 * wall / (5 * len(queries))
    return found | _steps(index, queries)


def places(folder: Path, millions: int) -> dict[str, Any]:
    """Milliseconds for the spans of a text and every place of each."""
    index = TraceIndex.open(folder / "index")
    return _texts("spans and all places", partial(_placed, index), _queries(folder))


def _placed(index: TraceIndex, ids: np.ndarray) -> list[Any]:
    """Every place of every span, as infini-gram's `attribute` lists them."""
    return [index.locate(ids[span.start : span.end], limit=None) for span in index.spans(ids)]


def _texts(name: str, search: Callable[[Any], Any], queries: list[Any]) -> dict[str, float]:
    """Time of a search over texts that it has seen once before: what it needs of the index is in memory."""
    for ids in queries:
        search(ids)
    cpu = _cpu()
    times = [_timed(partial(search, ids)) for ids in queries]
    return {
        f"{name}, CPU ms": 1e3 * (_cpu() - cpu) / len(queries),
        f"{name}, ms": 1e3 * float(np.median(times)),
        f"{name}, ms, 95th percentile": 1e3 * float(np.quantile(times, 0.95)),
    }


def _steps(index: TraceIndex, queries: list[np.ndarray]) -> dict[str, Any]:
    """A step of decoding with 4 beams and 50 candidates each, from intervals that were kept or found anew."""
    rng = np.random.default_rng(1)
    beams = [[ids[: QUERY // 2] for ids in queries[n : n + 4]] for n in range(0, len(queries) - 3, 4)]
    candidates = rng.integers(0, VOCABULARY, (len(beams), 4, 50))
    intervals = [[index.longest_suffix(ids) for ids in four] for four in beams]
    steps = [partial(index.extend, *pair) for pair in zip(intervals, candidates, strict=True)]
    anew = [lambda four=four: [index.longest_suffix(ids) for ids in four] for four in beams]
    for call in steps + anew:
        call()
    return {
        "step from kept intervals, ms": 1e3 * float(np.median([_timed(call) for call in steps])),
        "longest suffix of 4 beams, ms": 1e3 * float(np.median([_timed(call) for call in anew])),
    }


def shards(folder: Path, millions: int) -> dict[str, Any]:
    """Milliseconds for the spans of a text, and to open the index, by the number of shards."""
    found: dict[str, Any] = {}
    documents, queries = _documents(folder, millions // 10), _queries(folder)
    for number in SHARDS:
        place = folder / f"shards-{number}"
        ends = np.cumsum([len(document) for document in documents])
        cuts = np.searchsorted(ends, ends[-1] / number * np.arange(1, number))
        parts = [part for part in np.split(np.arange(len(documents)), cuts) if len(part)]
        paths = [place / f"shard-{k:05}" for k in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            TraceIndex.build_tokens([documents[n] for n in part], path, vocab_size=VOCABULARY)
        found[f"{number} shards: open, ms"] = 1e3 * _timed(partial(LocalShards, paths))
        index = ShardedIndex(place, Manifest(VOCABULARY, "", {}), LocalShards(paths))
        found |= _texts(f"{number} shards: spans", index.spans, queries)
        shutil.rmtree(place)
    return found


def rival_build(folder: Path, millions: int) -> dict[str, Any]:
    """The same build by infini-gram: seconds and CPU seconds, its own processes included."""
    from tracealign_lib.infini_gram import InfiniGramIndex

    documents = _documents(folder, millions)
    start, cpu = time.perf_counter(), _cpu() + _cpu(resource.RUSAGE_CHILDREN)
    InfiniGramIndex.build_tokens(documents, folder / "rival", vocab_size=VOCABULARY, jobs=2)
    return {
        "infini-gram: build, seconds": time.perf_counter() - start,
        "infini-gram: build, CPU seconds": _cpu() + _cpu(resource.RUSAGE_CHILDREN) - cpu,
        "infini-gram: size, bytes a token": _bytes(folder / "rival") / (millions * MILLION),
    }


def rival_query(folder: Path, millions: int) -> dict[str, Any]:
    """infini-gram's `attribute` of the same texts, its index held in memory; and whether spans agree.

    It has no call for spans alone: `attribute` also lists every place of every span that is not more frequent
    than `max_cnt`. With 1 it searches as much and lists nearly nothing.
    """
    from infini_gram.engine import InfiniGramEngine

    from tracealign_lib.infini_gram import InfiniGramIndex

    engine = InfiniGramEngine([str(folder / "rival")], eos_token_id=0, load_to_ram=True)
    queries = _queries(folder)
    found: dict[str, Any] = {}
    for name, most in (("no places", 1), ("all places", 10**9)):
        settings = {"delim_ids": [], "min_len": 1, "max_cnt": most, "enforce_bow": False}
        search = partial(engine.attribute, **settings)
        found |= _texts(f"infini-gram: {name}", search, [ids.tolist() for ids in queries])
    ours, theirs = TraceIndex.open(folder / "index"), InfiniGramIndex.open(folder / "rival")
    agree = sum(ours.spans(ids) == theirs.spans(ids) for ids in queries)
    return found | {"spans agree, texts": agree, "spans compared, texts": len(queries)}


def _queries(folder: Path) -> list[np.ndarray]:
    """Texts of `QUERY` tokens: passages of the smallest corpus in which one id in ten is another."""
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    rng = np.random.default_rng(0)
    found = []
    for place in rng.integers(0, MILLION // 2, QUERIES).tolist():
        ids = tokens[place : place + QUERY].astype(np.int64)
        changed = rng.random(QUERY) < 0.1
        ids[changed] = rng.integers(0, VOCABULARY, int(changed.sum()))
        found.append(ids)
    return found


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


PARTS = {
    "build": build,
    "open": open_,
    "query": query,
    "wide": wide,
    "shards": shards,
    "places": places,
    "rival_build": rival_build,
    "rival_query": rival_query,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        print(json.dumps(PARTS[sys.argv[2]](Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main(*map(int, sys.argv[1:]))
