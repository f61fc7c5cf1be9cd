"""Checks of what callers pass: token ids and whole numbers."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracealign_lib.errors import ParameterError, VocabularyError


def check_ids(ids: ArrayLike, vocab_size: int, what: str, *, copy: bool = True) -> NDArray[Any]:
    """`ids` as a fresh (n,) int64 array, or without `copy` as it is, after checking type, shape and range."""
    expected = f"a one-dimensional sequence of integers from 0 to {vocab_size - 1}"
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError, OverflowError) as error:
        raise VocabularyError(
            f"The {what} is not a sequence of token ids.",
            given=f"{repr(ids)[:80]} ({error})",
            expected=expected,
            mend="pass token ids, for example index.encode(text)",
        ) from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise VocabularyError(
            f"The {what} is not a sequence of token ids.",
            given=f"shape {array.shape}, dtype {array.dtype}: {repr(ids)[:80]}",
            expected=expected,
            mend="pass token ids, for example index.encode(text)",
        )
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        position = int(np.flatnonzero((array < 0) | (array >= vocab_size))[0])
        raise VocabularyError(
            f"The {what} has an id outside the vocabulary.",
            given=f"{array[position]} at position {position}",
            expected=expected,
            mend="encode with the tokenizer of this index or model (index.encode, index.check_tokenizer)",
        )
    # one dtype and layout: the search compiles once
    return np.array(array, dtype=np.int64) if copy else array


def check_integer(value: Any, name: str, *, at_least: int = 1, at_most: int | None = None) -> int:
    """`value` as an integer; `ParameterError` with its `name` if it is none or out of range."""
    expected = (
        f"an integer of at least {at_least}"
        if at_most is None
        else f"an integer from {at_least} to {at_most}"
    )
    try:
        number = operator.index(value)
    except TypeError:
        number = at_least - 1
    if isinstance(value, bool) or number < at_least or (at_most is not None and number > at_most):
        raise ParameterError(
            f"{name} is out of range.", given=repr(value), expected=expected, mend=f"choose another {name}"
        )
    return number
