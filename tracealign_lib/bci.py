"""The Belief Conflict Index: how surprising a reactivated span is.

The paper scores a span s = t_1 ... t_k that occurs in the training corpus by

    BCI(s) = - sum_j log P_train(t_j),

with unigram probabilities of the training corpus (as reported by readers of the full text). A scorer
is anything that maps an index, the ids of a text and a span of it to a number of nats.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tracealign_lib.index import Span, TraceIndex


class Scorer(Protocol):
    """Scores one span of a text in nats; higher is more conflicting."""

    def __call__(self, index: TraceIndex, ids: NDArray[Any], span: Span) -> float:
        """The score of `ids[span.start:span.end]`."""
        ...


class RawBCI:
    """The paper's BCI: the summed unigram surprisal of the span's tokens, add-one smoothed.

    It needs no labels, only the indexed corpus. It grows with length, and with rare words whether
    they are harmful or not.
    """

    def __call__(self, index: TraceIndex, ids: NDArray[Any], span: Span) -> float:
        """BCI(s) in nats."""
        return float(np.sum(index.surprisal[ids[span.start : span.end]]))
