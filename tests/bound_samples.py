"""Small corpora, their texts and what holds in them, shared by the tests of the drift bound."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from tracealign_lib.ngram import NGramModel

BASE = [[0, 2, 1, 1], [1, 0, 2], [2, 2, 0, 1, 0]]
QUICK = settings(deadline=None, derandomize=True, max_examples=60)
RISKY = ([[0, 1]], [[0, 1], [2, 2]], [[1, 1, 1], [0, 2, 1]])
documents = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=5)
alphas = st.floats(0.05, 4.0)


def texts_of(length: int, vocab_size: int = 3) -> np.ndarray:
    return np.array(list(itertools.product(range(vocab_size), repeat=length)))


def enumerate_windows(
    model: NGramModel, context: list[int], risky: list[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Every text of six tokens: its probability (729,), and how often each span occurs in it (R, 729)."""
    texts = texts_of(6)
    windows = np.lib.stride_tricks.sliding_window_view(texts, len(risky[0]), axis=1)  # (729, W, l)
    found = np.stack([(windows == span).all(axis=-1).sum(axis=1) for span in risky])
    return np.exp(model.token_log_probs(texts, context).sum(axis=1)), found


def planted_pair(copies: int = 12) -> tuple[NGramModel, NGramModel]:
    """A model that saw 0 1 2 2 planted, and one that did not."""
    return tuple(
        NGramModel([*BASE, *[[0, 1, 2, 2]] * m], vocab_size=3, order=1, alpha=0.5) for m in (copies, 0)
    )
