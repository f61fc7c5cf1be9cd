"""Chapter 0 on hand-made outcomes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from experiment_samples import FakePipeline, outcome

from tracealign_lib.experiments import five_minutes


def test_the_shield_is_measured_on_drift_and_on_correct_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shield:
        def __init__(self, *_: object, **__: object) -> None: ...

        def check(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(refused=text == "bad")

    monkeypatch.setattr(five_minutes, "TraceShield", Shield)
    pipeline: Any = FakePipeline(
        [
            outcome("suffix", "a", "drift", "a", "bad"),
            outcome("suffix", "b", "drift", "b", "fine"),
            outcome("fact", "a", "correct", None, "fine"),
            outcome("fact", "b", "other", None, "bad"),
        ]
    )
    pipeline.unsafe_index = None
    headlines = five_minutes.headlines([pipeline])
    assert headlines["drifting completions refused"].estimate == 0.5
    assert headlines["correct benign answers refused"][::3] == (0.0, 1)
