"""Compiling the loops that search: with numba where it is installed, and not at all where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    from numba import njit
except ImportError:  # no wheel for this platform, or left out on purpose
    njit = None

HAS_NUMBA = njit is not None
"""Whether loops are compiled. `TraceIndex` then searches in compiled loops, and otherwise with numpy."""

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """`function` compiled when it is first called and kept on disk; unchanged without numba.

    Compiled code lets other threads of Python run.
    """
    return function if njit is None else njit(cache=True, nogil=True)(function)
