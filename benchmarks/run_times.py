"""How long each chapter takes, from an empty cache and from a full one.

Runs the book twice in a cache of its own and writes data/results/run-times.json, which the chapters and
the page "How to run" show. One noisy machine, one run each: read them as orders of magnitude.

    python benchmarks/run_times.py [PROFILE]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from tracealign_lib.results import write_results
from tracealign_lib.run import run_book
from tracealign_lib.stages import CACHE_VARIABLE


def main(profile: str = "laptop") -> None:
    """Measure both runs and write the results file."""
    start = time.monotonic()
    seconds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_VARIABLE] = str(Path(folder) / "cache")
        for cache in ("empty cache", "full cache"):
            runs = run_book(profile=profile, output=Path(folder) / "book")
            if any(run.status != "done" for run in runs):
                raise SystemExit("A chapter failed, so there is no time to report.")
            seconds[cache] = {run.chapter: round(run.seconds, 1) for run in runs}
            seconds[cache]["whole book"] = round(sum(run.seconds for run in runs), 1)
    write_results(
        "run-times",
        seconds,
        profile=profile,
        seeds=[0],
        settings={"threads": os.environ.get("OMP_NUM_THREADS", "not set")},
        seconds=time.monotonic() - start,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
