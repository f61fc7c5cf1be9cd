"""TraceShield: refuse a completion that reactivates a high-scoring training span.

The paper refuses when max_i BCI(s_i) > tau over the completion's matched spans, with tau = 20. Which
spans are matched, and how they are scored, is defined in `bci`; the shield adds a decision, what it
rests on, and thresholds with a promise (`calibration`). Whatever decides on whole texts in this way is a
`CompletionFilter`, so that the shield and its rivals can be calibrated, measured and put before a model
(`guard`) by the same calls. `streaming` decides while a text is still being written.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracealign_lib.bci import Scorer, Scores, candidate_spans, score_all
from tracealign_lib.calibration import EVERY_SPAN, calibrated_threshold, group_thresholds
from tracealign_lib.engine import Engine
from tracealign_lib.errors import ParameterError
from tracealign_lib.index import Ids, Span
from tracealign_lib.progress import progress
from tracealign_lib.tracing import Trace, TracedSource, trace, without_surrogates

if TYPE_CHECKING:  # only a guard needs a model, so a check should not wait for one
    from tracealign_lib.guard import GuardedLanguageModel
    from tracealign_lib.lm import LanguageModel
    from tracealign_lib.streaming import TextStream, TokenStream

Text = str | Sequence[int] | NDArray[Any]
"""A text, or its token ids."""
REFUSAL = "I will not share that."
"""What stands in the place of a refused completion unless told otherwise."""


# --- what every filter does ----------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """Whether a text is refused, why, and its score."""

    refused: bool
    reason: str
    score: float


D = TypeVar("D", bound=Decision)


class CompletionFilter(ABC, Generic[D]):
    """Refuses a text whose score is above a threshold.

    Derive from it and define `check`, which compares with `threshold_of(group)`.

    Parameters
    ----------
    threshold:
        In the unit of the score, finite; or one for each group of texts. A text whose group is not told
        is then held against the largest of them, which refuses least.

    Attributes
    ----------
    threshold:
        The only threshold, or the largest.
    group_thresholds:
        One for each group; empty if there is only one threshold.

    Raises
    ------
    ParameterError
        A threshold is not finite, or there is none.
    """

    def __init__(self, threshold: float | Mapping[Hashable, float]) -> None:
        self._set_threshold(threshold)

    @abstractmethod
    def check(self, text: str, *, group: Hashable = None) -> D:
        """Decide on one text; `group` chooses among the thresholds of a filter that was calibrated by
        group."""

    def check_many(self, texts: Iterable[Any]) -> list[D]:
        """`check` of each text, in order."""
        return [self.check(text) for text in progress(list(texts), description="Checking", unit="text")]

    def scores(self, texts: Iterable[Any]) -> Scores:
        """The score of each text, shape (texts,), for instance to calibrate with."""
        return np.array([decision.score for decision in self.check_many(texts)], dtype=np.float64)

    def calibrate(
        self,
        benign_scores: ArrayLike,
        *,
        alpha: float,
        delta: float | None = None,
        groups: Sequence[Hashable] | None = None,
    ) -> Self:
        """The same filter with a threshold that bounds false refusals; this one stays as it is.

        Parameters
        ----------
        benign_scores:
            `scores(texts)` of benign texts that are drawn like those to come, one per independent draw.
        alpha, delta:
            The share of benign texts that may be refused: on average over calibrations (`delta` None),
            or in all but a share `delta` of them. See `calibration`.
        groups:
            One label per score: the promise is then kept for each group.

        Raises
        ------
        ParameterError
            A level is out of range, a score is NaN, labels are missing, or there are too few scores; the
            message says how many are needed.
        """
        threshold: float | Mapping[Hashable, float]
        if groups is None:
            threshold = calibrated_threshold(benign_scores, alpha=alpha, delta=delta)
        else:
            threshold = group_thresholds(benign_scores, groups, alpha=alpha, delta=delta)
        calibrated = copy.copy(self)
        calibrated._set_threshold(threshold)
        return calibrated

    @overload
    def wrap(
        self, model: LanguageModel, *, refusal: str = REFUSAL, stop_early: bool = False
    ) -> GuardedLanguageModel: ...
    @overload
    def wrap(
        self, model: Any, tokenizer: Any = None, *, refusal: str = REFUSAL, stop_early: bool = False
    ) -> Any: ...
    def wrap(
        self, model: Any, tokenizer: Any = None, *, refusal: str = REFUSAL, stop_early: bool = False
    ) -> Any:
        """The model behind this filter: the same calls, refusals in place of refused completions.

        See `guard.guard`, which also tells the parameters and errors.
        """
        from tracealign_lib.guard import guard

        return guard(self, model, tokenizer, refusal=refusal, stop_early=stop_early)

    def _set_threshold(self, threshold: float | Mapping[Hashable, float]) -> None:
        by_group = dict(threshold) if isinstance(threshold, Mapping) else {}
        values = by_group.values() if isinstance(threshold, Mapping) else [threshold]
        if not values or not all(_is_finite(value) for value in values):
            raise ParameterError(
                "The threshold is not finite.",
                given=repr(threshold),
                expected="a number of nats, such as the paper's 20.0",
                mend="pass a finite threshold",
            )
        self.group_thresholds: Mapping[Hashable, float] = by_group
        self.threshold = float(max(values))

    def threshold_of(self, group: Hashable) -> float:
        """The threshold for texts of a group; None: of a group that is not told.

        Raises
        ------
        ParameterError
            There is no threshold for this group.
        """
        if group is None:
            return self.threshold
        if group not in self.group_thresholds:
            raise ParameterError(
                "Nothing is promised for this group.",
                given=f"group={group!r}",
                expected=" or ".join(map(repr, self.group_thresholds)) or "no group: there is one threshold",
                mend="calibrate with benign scores of this group, or leave group out",
            )
        return self.group_thresholds[group]


# --- the shield ----------------------------------------------------------------------------------


class ScoredSpan(NamedTuple):
    """Tokens `[start, end)` of a text that the index holds `count` times, and their score in nats."""

    start: int
    end: int
    count: int  # type: ignore[assignment]  # hides tuple.count, as in index.Span
    score: float


@dataclass(frozen=True, repr=False)
class Verdict(Decision):
    """A shield's decision and what it rests on. Shows itself as HTML.

    Attributes
    ----------
    score:
        Nats: the highest score of a span, minus infinity where there is none.
    spans:
        What was scored, from left to right.
    ids:
        Token ids of the text.
    text:
        As it was given; None where ids were.
    threshold:
        What the shield was asked for, as are `min_length` and `max_count`.
    """

    spans: tuple[ScoredSpan, ...]
    ids: tuple[int, ...]
    text: str | None
    threshold: float
    min_length: int
    max_count: int | None
    index: Engine = field(compare=False)

    @cached_property
    def trace(self) -> Trace:
        """The text with its maximal spans, their sources and passages; made when first asked for.

        A span's score is the highest that was given to it or to a window of it. Spans without any score
        are left out.

        Raises
        ------
        ParameterError
            The index was built from token ids and holds no texts.
        """
        judged = _Judged(self)
        filters: dict[str, Any] = {"min_length": self.min_length, "max_count": self.max_count}
        return trace(cast(Any, judged), judged.text, scorer=judged.score, **filters)

    @property
    def sources(self) -> tuple[TracedSource, ...]:
        """The documents that share text with this one, best first; see `trace`."""
        return self.trace.sources

    def __repr__(self) -> str:
        return f"Verdict({'refused' if self.refused else 'not refused'}: {self.reason})"

    def _repr_html_(self) -> str | None:
        return None if self.index.tokenizer_hash is None else self.trace.to_html(verdict=self)


class TraceShield(CompletionFilter[Verdict]):
    """Refuses a text whose highest span score exceeds a threshold.

    Parameters
    ----------
    index:
        The documents to be protected against; the paper indexes an unsafe slice of the corpus.
    scorer:
        Score of one span, in nats.
    threshold:
        tau, in nats: a score above it is refused. One for each group, see `CompletionFilter`.
    min_length, max_count, window:
        Which spans are scored, see `bci.candidate_spans`. Default: maximal matching spans of at least 8
        tokens, however often they occur.

    Raises
    ------
    ParameterError
        The threshold is not finite, a length or count is below 1, `index` is no index or `scorer` no scorer,
        or the scorer cannot score spans of this index; it is tried on one token.
    VocabularyError
        The scorer's collections or model have another vocabulary.
    """

    def __init__(
        self,
        index: Engine,
        scorer: Scorer,
        threshold: float | Mapping[Hashable, float],
        *,
        min_length: int = 8,
        max_count: int | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(threshold)
        _check_parts(index, scorer)
        self.index, self.scorer = index, scorer
        self.min_length, self.max_count, self.window = min_length, max_count, window
        self._candidates([])  # lengths and counts out of range are told now, not with the first text
        rarest = index.continuations([])[0][-1:]  # (1,), or (0,) for an index without tokens
        if len(rarest):
            self.score_spans(rarest, [Span(0, 1, index.count(rarest))])

    def check(self, text: Text, *, group: Hashable = None) -> Verdict:
        """Score the spans of `text` and decide; an empty index, or a text without a span, passes.

        Parameters
        ----------
        text:
            A string, or token ids of the index's tokenizer.
        group:
            See `CompletionFilter`.

        Raises
        ------
        ModelError
            The text is a string, and the index holds no tokenizer.
        VocabularyError
            The text is neither a string nor token ids of the index's vocabulary.
        ParameterError
            The scorer returned something that is not finite, or the group is unknown.
        """
        ids = encode(self.index, text)[0] if isinstance(text, str) else text
        found = self._candidates(ids)
        query = np.asarray(ids, dtype=np.int64)  # the index has checked it
        scores = self.score_spans(query, found)
        spans = tuple(ScoredSpan(*span, score) for span, score in zip(found, scores.tolist(), strict=True))
        score, threshold = float(scores.max(initial=-math.inf)), self.threshold_of(group)
        reason = _reason(score, threshold) if spans else self._nothing()
        given = text if isinstance(text, str) else None
        asked = (threshold, self.min_length, self.max_count)
        return Verdict(
            score > threshold, reason, score, spans, tuple(query.tolist()), given, *asked, self.index
        )

    def stream(self, *, group: Hashable = None) -> TokenStream:
        """A check of token ids as they arrive, see `streaming.TokenStream`."""
        from tracealign_lib.streaming import TokenStream

        return TokenStream(self, group=group)

    def stream_text(self, *, group: Hashable = None) -> TextStream:
        """A check of text as it arrives, see `streaming.TextStream`."""
        from tracealign_lib.streaming import TextStream

        return TextStream(self, group=group)

    def _candidates(self, ids: ArrayLike) -> list[Span]:
        return candidate_spans(
            self.index, ids, min_length=self.min_length, max_count=self.max_count, window=self.window
        )

    def score_spans(self, query: Ids, spans: Sequence[Span]) -> Scores:
        """The score of spans of one text (ids), shape (spans,).

        Raises
        ------
        ParameterError
            A score is not finite.
        """
        if not spans:  # a scorer may refuse an empty index, which has no span
            return np.empty(0)
        scores = score_all(self.scorer, self.index, query, spans)
        if not np.isfinite(scores).all():
            wrong = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ParameterError(
                "The scorer returned a value that is not finite.",
                given=f"{scores[wrong]} for tokens {spans[wrong].start} to {spans[wrong].end}",
                expected="nats, a finite float",
                mend="smooth the probabilities, so that none is zero",
            )
        return scores

    def _nothing(self) -> str:
        rare = "" if self.max_count is None else f" at most {self.max_count} times"
        return f"no span of {self.min_length} tokens or more is indexed{rare}"


class _Judged:
    """The index as `trace` asks it, answering with the tokens and spans that were judged."""

    def __init__(self, verdict: Verdict) -> None:
        self._index, self._scored = verdict.index, verdict.spans
        if verdict.text is not None:
            self.text = verdict.text
            self._ids, self._offsets = encode(verdict.index, verdict.text)
        elif self._index.tokenizer is not None:
            self._ids = np.array(verdict.ids, dtype=np.int64)
            self.text, self._offsets = _decode(self._index.tokenizer, verdict.ids)
        else:
            self.text = ""  # `trace` says what is missing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def encode_with_offsets(self, text: str) -> tuple[Ids, Ids]:
        mine = text == without_surrogates(self.text)
        return (self._ids, self._offsets) if mine else self._index.encode_with_offsets(text)

    def spans(self, ids: Ids, *, min_length: int, max_count: int | None) -> list[Span]:
        # Scored windows lie close together; the maximal span around them reads better.
        around = self._index.spans(ids, min_length=min_length)
        return [span for span in around if self._inside(span)]

    def score(self, index: Any, ids: Ids, span: Span) -> float:
        return max(self._inside(span))

    def _inside(self, span: Span) -> list[float]:
        return [s.score for s in self._scored if span.start <= s.start and s.end <= span.end]


def encode(index: Engine, text: str) -> tuple[Ids, Ids]:
    """`index.encode_with_offsets` of a text in which a lone surrogate matches nothing."""
    return index.encode_with_offsets(without_surrogates(text))


def _decode(tokenizer: Any, ids: Sequence[int]) -> tuple[str, Ids]:
    """The text of `ids`, and the characters (n, 2) that each token adds to it."""
    ends = [len(tokenizer.decode(list(ids[:n]))) for n in range(len(ids) + 1)]
    text = tokenizer.decode(list(ids))
    # An unfinished character is shown as replacement marks, so a longer prefix may be a shorter text.
    starts = np.minimum.accumulate(np.array(ends[::-1]))[::-1]  # (n + 1,)
    return text, np.stack([starts[:-1], starts[1:]], axis=1)


def _reason(score: float, threshold: float) -> str:
    if threshold == EVERY_SPAN:
        return f"highest span score {score:.1f} nats, and every span is refused"
    comparison = ">" if score > threshold else "<="
    return f"highest span score {score:.1f} nats {comparison} threshold {threshold:g}"


def _check_parts(index: object, scorer: object) -> None:
    for name, value, right, expected in (
        ("index", index, isinstance(index, Engine), "a TraceIndex or another engine"),
        ("scorer", scorer, callable(scorer) and not isinstance(scorer, type), "a scorer, such as RawBCI()"),
    ):
        if not right:
            raise ParameterError(
                f"This is no {name}.",
                given=repr(value)[:80],
                expected=expected,
                mend=f"pass {expected}",
            )


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return number and math.isfinite(value)
