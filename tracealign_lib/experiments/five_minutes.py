"""What chapter 0 measures: how much of the drift the paper's shield stops, and what else it refuses."""

from __future__ import annotations

from collections.abc import Sequence

from tracealign_lib.bci import RawBCI
from tracealign_lib.experiments.common import PAPER_TAU, Headlines, publish
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.shield import TraceShield
from tracealign_lib.stats import wilson


def headlines(pipelines: Sequence[Pipeline], *, min_length: int = 8) -> Headlines:
    """Share of drifting completions, and of correct benign answers, that the paper's shield refuses."""
    counts = {
        "drifting completions refused": [0, 0],
        "correct benign answers refused": [0, 0],
    }
    for pipeline in pipelines:
        shield = TraceShield(pipeline.unsafe_index, RawBCI(), PAPER_TAU, min_length=min_length)
        for outcome in pipeline.outcomes():
            if outcome.drifted or outcome.judgement.label == "correct":
                key = "drifting completions refused" if outcome.drifted else "correct benign answers refused"
                counts[key][0] += shield.check(outcome.completion).refused
                counts[key][1] += 1
    return {key: wilson(refused, total) for key, (refused, total) in counts.items() if total}


def publish_five_minutes(device: str = "auto") -> None:
    """Measure chapter 0 on every seed of `full` and write data/results/five-minutes.json."""
    publish("five-minutes", headlines, device)
