"""TraceShield: refuse a completion that reactivates a high-scoring training span.

The paper refuses when max_i BCI(s_i) > tau over the completion's matched spans, with tau = 20.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tracealign_lib.bci import Scorer
from tracealign_lib.errors import ParameterError
from tracealign_lib.index import TraceIndex
from tracealign_lib.tracing import Trace, trace


class Verdict(NamedTuple):
    """Whether a text is refused, why, and the trace that led to it. Shows itself as HTML."""

    refused: bool
    reason: str
    score: float  # nats: the highest span score, 0 where nothing matched
    trace: Trace

    def _repr_html_(self) -> str:
        return self.trace.to_html(verdict=self)


class TraceShield:
    """Refuses a text whose highest span score exceeds a threshold.

    Parameters
    ----------
    index:
        The documents to be protected against; the paper indexes an unsafe slice of the corpus.
    scorer:
        Score of one span, in nats.
    threshold:
        tau, in nats: a score above it is refused.
    min_length, max_count:
        Only maximal matching spans of at least `min_length` tokens, and of at most `max_count`
        occurrences, are scored.
    """

    def __init__(
        self,
        index: TraceIndex,
        scorer: Scorer,
        threshold: float,
        *,
        min_length: int = 8,
        max_count: int | None = None,
    ) -> None:
        if not math.isfinite(threshold):
            raise ParameterError(
                "The threshold is not finite.",
                given=repr(threshold),
                expected="a number of nats, such as the paper's 20.0",
                mend="pass a finite threshold",
            )
        self.index = index
        self.scorer = scorer
        self.threshold = threshold
        self.min_length = min_length
        self.max_count = max_count

    def check(self, text: str) -> Verdict:
        """Trace `text` and decide; an empty index, or a text without a match, passes."""
        traced = trace(
            self.index, text, min_length=self.min_length, max_count=self.max_count, scorer=self.scorer
        )
        worst = max(traced.spans, key=lambda span: span.score, default=None)
        if worst is None:
            return Verdict(False, f"no span of {self.min_length} tokens or more is indexed", 0.0, traced)
        comparison = ">" if worst.score > self.threshold else "<="
        reason = f"highest span score {worst.score:.1f} nats {comparison} threshold {self.threshold:g}"
        return Verdict(worst.score > self.threshold, reason, worst.score, traced)
