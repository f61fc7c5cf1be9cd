"""Without numba an index is built and searched with numpy, to the same answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tracealign_lib import compiled
from tracealign_lib.index import TraceIndex

SCRIPT = """
import sys
if sys.argv[2] == "without":
    sys.modules["numba"] = None  # an import of it now fails
import numpy as np
from tracealign_lib.compiled import HAS_NUMBA
from tracealign_lib.index import TraceIndex
rng = np.random.default_rng(0)
documents = [rng.integers(0, 5, n) for n in (300, 0, 50, 7)]
index = TraceIndex.build_tokens(documents, sys.argv[1], vocab_size=300)
query = np.concatenate([documents[0][20:60], [7], documents[2][5:40]])
interval = index.longest_suffix(query)
print(HAS_NUMBA)
print(index.spans(query), index.locate(query[:9]), index.count(query[3:8]))
print(index.sources(query, min_length=5))
print(interval, index.extend(interval, range(5)).tolist(), [a.tolist() for a in index.continuations(query)])
"""


def run(folder: Path, which: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder, which], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_same_index_and_answers_without_numba(tmp_path: Path) -> None:
    compiled_run, plain_run = run(tmp_path / "with", "with"), run(tmp_path / "without", "without")
    assert (compiled_run[0], plain_run[0]) == ("True", "False")
    assert compiled_run[1:] == plain_run[1:]
    for name in ("tokens.npy", "suffixes.npy", "keys.npy", "document_starts.npy", "unigram_counts.npy"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


def test_compiled_loops_let_other_threads_run() -> None:
    @compiled.compiled
    def double(value: int) -> int:
        return 2 * value

    assert double(4) == 8
    assert double.targetoptions["nogil"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_many_texts_are_searched_as_one_by_one(tmp_path: Path, threads: int) -> None:
    rng = np.random.default_rng(2)
    index = TraceIndex.build_tokens(rng.integers(0, 4, (9, 40)), tmp_path / "i", vocab_size=4)
    queries = [rng.integers(0, 4, n) for n in (0, 30, 1, 5, 80)]
    expected = [index.spans(query, min_length=2, max_count=9) for query in queries]
    assert index.spans_of(iter(queries), min_length=2, max_count=9, threads=threads) == expected
    assert index.spans_of([], threads=threads) == []
