"""One progress bar for the whole library: on stderr, with the time left, silent when piped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    items: Iterable[T] | None = None, *, description: str, total: int | None = None, unit: str = "it"
) -> tqdm[T]:
    """A tqdm bar with an estimate of the time left.

    It is shown on a terminal and in a notebook, and hidden when stderr is piped to a file or when
    `TRACEALIGN_PROGRESS=0`; `TRACEALIGN_PROGRESS=1` shows it everywhere. A bar that lives for less
    than half a second is never drawn.
    """
    return tqdm(
        items,
        desc=description,
        total=total,
        unit=unit,
        leave=False,
        delay=0.5,
        dynamic_ncols=True,
        disable=not _visible(),
    )


def _visible() -> bool:
    setting = os.environ.get("TRACEALIGN_PROGRESS")
    if setting is not None:
        return setting != "0"
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
