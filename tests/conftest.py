"""What test modules of several subjects share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a figure of a test beside its name, whether or not it passes."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}")

    return show


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A smoke world whose models were never trained, unless a module says otherwise."""
    from bci_samples import answered_pipeline

    with answered_pipeline(tmp_path_factory.mktemp("cache")) as made:
        yield made


@pytest.fixture(scope="module")
def model(pipeline: Any) -> Any:
    """A model that was never trained: enough for gradients and hidden states."""
    return pipeline.model("base")
