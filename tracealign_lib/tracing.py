"""What is known about one text against one index: its spans, their sources, and the passages, as data.

A `Trace` is the value that chapters, the command line and the shield pass around. It shows itself as HTML
(`tracealign_lib.viewer`), as plain text for a terminal, and as JSON with a versioned schema.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tracealign_lib.documents import Document
from tracealign_lib.engine import Surprisal
from tracealign_lib.errors import ParameterError

FORMAT = "tracealign.trace"
VERSION = 1
LOCATED = 100
"""Occurrences looked up for one span; a span with more reports its number of documents as "at least"."""
CONTEXT = 160
"""Characters of a document kept on each side of a match."""
LONGEST_TEXT = 200_000
"""Characters of a text that is traced at once: without numba, a copy of n tokens takes `n^2 / 2` steps."""
PASSAGES = 3
"""Passages kept for one source, the highest-scored first."""

_SURROGATE = re.compile("[\ud800-\udfff]")
# Bidirectional controls and invisible marks: they can make a text read differently from what it holds.
_HIDDEN = frozenset("\u061c\u180e\u200b\u200e\u200f\u2028\u2029\u2060\ufeff\ufffe\uffff") | frozenset(
    map(
        chr,
        [*range(0x202A, 0x202F), *range(0x2061, 0x2070), *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080)],
    )
)


class SpanLike(Protocol):
    """A maximal matching span: query tokens [start, end) and their number of occurrences."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def count(self) -> int: ...


class SearchableIndex(Protocol):
    """The part of `TraceIndex`, or of another `engine.Engine`, that tracing needs."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def surprisal(self) -> Surprisal: ...
    def encode_with_offsets(self, text: str, /) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]: ...
    def spans(self, ids: Any, /, *, min_length: int, max_count: int | None) -> Sequence[SpanLike]: ...
    def locate(self, ids: Any, /, *, limit: int) -> Sequence[Any]: ...
    def sources(self, ids: Any, /, *, min_length: int, limit: int) -> Sequence[Any]: ...
    def document(self, document_id: str, /) -> Document: ...


Scorer = Callable[[Any, npt.NDArray[Any], Any], float]


class TracedSpan(NamedTuple):
    """A maximal matching span of the text.

    `start` and `end` are characters [start, end), whole ones, without the white space around the span;
    `token_start` and `token_end` are tokens; `count` is the number of occurrences in the corpus; `score` is
    in nats; `source_ids` are documents that hold the whole span, and `complete` tells whether these are all.
    """

    start: int
    end: int
    token_start: int
    token_end: int
    count: int  # type: ignore[assignment]  # hides tuple.count, as in index.Span
    score: float
    source_ids: tuple[str, ...]
    complete: bool

    @property
    def length(self) -> int:
        """Length in tokens."""
        return self.token_end - self.token_start


class Passage(NamedTuple):
    """The longest run of tokens that a source shares with one covered interval of the text, with its context.

    `before`, `match` and `after` are text of the document; `cut_before` and `cut_after` tell whether the
    document goes on; `spans` are positions in `Trace.spans` of which the run holds all or part.
    """

    before: str
    match: str
    after: str
    cut_before: bool
    cut_after: bool
    spans: tuple[int, ...]


class TracedSource(NamedTuple):
    """A document that shares text with the traced text.

    `score` is the surprisal of the covered tokens in nats; `covered` are their intervals (tokens, disjoint);
    `covered_share` is their share of all tokens of the text.
    """

    document_id: str
    score: float
    meta: Mapping[str, Any]
    covered: tuple[tuple[int, int], ...]
    covered_share: float
    passages: tuple[Passage, ...]

    @property
    def passage(self) -> tuple[str, str, str]:
        """Text before the best match, the match, and the text after it."""
        best = self.passages[0]
        return best.before, best.match, best.after


class Segment(NamedTuple):
    """Characters [start, end) of the text that are covered by one and the same set of spans."""

    start: int
    end: int
    spans: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """One text, the spans of it that occur in the corpus, and the documents they come from.

    Attributes
    ----------
    text:
        The traced text, unchanged.
    spans:
        Maximal matching spans in the order of the text.
    sources:
        Documents, best first.
    n_tokens:
        Length of the text in tokens.
    min_length:
        The shortest span that was asked for, in tokens.
    max_count:
        The largest count that was kept; None: all.
    """

    text: str
    spans: tuple[TracedSpan, ...]
    sources: tuple[TracedSource, ...]
    n_tokens: int
    min_length: int
    max_count: int | None = None

    @property
    def n_traced(self) -> int:
        """Tokens that lie in at least one span."""
        covered: set[int] = set()
        for span in self.spans:
            covered.update(range(span.token_start, span.token_end))
        return len(covered)

    def segments(self) -> list[Segment]:
        """The text cut wherever a span starts or ends; the segments join up to the whole text."""
        edges = {0, len(self.text)}
        for span in self.spans:
            edges |= {span.start, span.end}
        cuts = sorted(edges)
        return [
            Segment(a, b, tuple(i for i, s in enumerate(self.spans) if s.start <= a and b <= s.end))
            for a, b in pairwise(cuts)
        ]

    def to_json(self) -> dict[str, Any]:
        """This trace as JSON-serialisable data; `version` changes when a field changes its meaning."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "text": self.text,
            "n_tokens": self.n_tokens,
            "n_traced": self.n_traced,
            "min_length": self.min_length,
            "max_count": self.max_count,
            "spans": [{**span._asdict(), "source_ids": list(span.source_ids)} for span in self.spans],
            "sources": [_source_record(source) for source in self.sources],
        }

    def to_text(self) -> str:
        """This trace for a terminal: spans stand in numbered brackets, `[1 like this 1]`; sources follow."""
        lines = [_bracketed(self), "", summary(self)]
        for number, span in enumerate(self.spans, start=1):
            lines.append(f"  [{number}] {span_label(span)}")
        if self.sources:
            lines += ["", "Sources, best first"]
        for rank, source in enumerate(self.sources, start=1):
            lines.append(f"  {rank}. {source_label(source)}")
            lines += [f"     {_quoted(passage)}" for passage in source.passages]
        return "\n".join(lines)

    def to_html(self, *, verdict: Any = None, prompt: str | None = None) -> str:
        """This trace as static HTML, see `tracealign_lib.viewer.to_html`."""
        from tracealign_lib import viewer

        return viewer.to_html(self, verdict=verdict, prompt=prompt)

    def _repr_html_(self) -> str:
        return self.to_html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.to_text())

    def __str__(self) -> str:
        return self.to_text()


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which no index holds and no encoding can represent."""
    return _SURROGATE.sub("\ufffd", text)


def trace(
    index: SearchableIndex,
    text: str,
    *,
    min_length: int = 8,
    max_count: int | None = None,
    limit: int = 5,
    scorer: Scorer | None = None,
) -> Trace:
    """Trace one text to the training documents that hold its spans.

    Parameters
    ----------
    index:
        A `TraceIndex` built from documents (it has a tokenizer and stored texts), an `InfiniGramIndex`, or
        an `InfiniGramAPI`, which makes requests (see there how many).
    text:
        For instance a completion. A lone surrogate matches nothing.
    min_length:
        Shortest span, in tokens.
    max_count:
        Drop spans that occur more often than this, and the sources that hold no remaining span. The paper
        keeps 3 (reported); `None` keeps all.
    limit:
        Number of sources at most.
    scorer:
        `scorer(index, ids, span) -> float`, nats. Default: the sum over the span's tokens of their surprisal,
        the paper's BCI (arXiv 2508.02063).

    Raises
    ------
    ParameterError
        An argument is of the wrong type or out of range, the text is longer than `LONGEST_TEXT`, the index
        holds no texts, or the scorer returned something that is not a finite number.
    """
    _check(index, text, min_length, max_count, limit)
    ids, offsets = index.encode_with_offsets(without_surrogates(text))
    spans: list[TracedSpan] = []
    if len(ids):
        found = index.spans(ids, min_length=min_length, max_count=max_count)
        traced = (_traced_span(index, text, ids, offsets, span, scorer or _surprisal) for span in found)
        spans = [span for span in traced if span.start < span.end]
    sources = _traced_sources(index, ids, spans, min_length, max_count, limit) if spans else ()
    return Trace(text, tuple(spans), sources, len(ids), min_length, max_count)


def visible(text: str) -> str:
    """`text` with every character that is invisible or could mislead shown by name, as `⟨U+202E⟩`.

    These are control characters other than tab and newline, bidirectional controls, lone surrogates and a few
    invisible marks. What remains is safe to print on a terminal.
    """
    return "".join(_placeholder(character) for character in text)


def summary(trace: Trace) -> str:
    """One sentence: how much of the text was found."""
    if not trace.spans:
        kept = "" if trace.max_count is None else f" that occurs at most {_times(trace.max_count)}"
        return f"No span of {trace.min_length} tokens or more{kept} was found in the corpus."
    spans = _plural(len(trace.spans), "span")
    return f"{spans} · {trace.n_traced} of {_plural(trace.n_tokens, 'token')} found in the corpus"


def span_label(span: TracedSpan) -> str:
    """For instance `14 tokens, 57.5 nats, found 4 times in 3 documents`."""
    documents = _plural(len(span.source_ids), "document")
    at_least = "" if span.complete else "at least "
    times = "" if span.count == len(span.source_ids) else f"{_times(span.count)} "
    return f"{_plural(span.length, 'token')}, {span.score:.1f} nats, found {times}in {at_least}{documents}"


def source_label(source: TracedSource) -> str:
    """Document id, provenance, score and covered share on one line."""
    origin = " · ".join(provenance(source))
    shown = f" ({origin})" if origin else ""
    return f"{visible(source.document_id)}{shown}, {source.score:.1f} nats, covers {source.covered_share:.0%}"


def provenance(source: TracedSource) -> list[str]:
    """Collection, kind and file of a source, those that its metadata names, in this order."""
    values = (source.meta.get(key) for key in ("collection", "kind", "file"))
    return [visible(str(value)) for value in values if value not in (None, "")]


def _check(index: Any, text: Any, min_length: Any, max_count: Any, limit: Any) -> None:
    if not isinstance(text, str):
        raise ParameterError(
            "The text to trace is not a string.",
            given=type(text).__name__,
            expected="str",
            mend="decode tokens first, for example tokenizer.decode(ids)",
        )
    if len(text) > LONGEST_TEXT:
        raise ParameterError(
            "The text is too long to be traced at once.",
            given=f"{len(text):,} characters",
            expected=f"at most {LONGEST_TEXT:,}",
            mend="trace it in pieces",
        )
    if getattr(index, "tokenizer", None) is None:
        raise ParameterError(
            "This index holds token ids only, so there is no text to show.",
            given=type(index).__name__,
            expected="an index made by TraceIndex.build(documents, tokenizer, path)",
            mend="build it from documents, or call index.spans and index.sources with token ids",
        )
    for name, value in (("min_length", min_length), ("max_count", max_count), ("limit", limit)):
        if name == "max_count" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ParameterError(
                f"{name} is not a positive whole number.",
                given=repr(value),
                expected="an int of at least 1" + (", or None" if name == "max_count" else ""),
                mend=f"for example {name}={8 if name == 'min_length' else 5}",
            )


def _surprisal(index: SearchableIndex, ids: npt.NDArray[Any], span: SpanLike) -> float:
    return float(np.sum(index.surprisal[ids[span.start : span.end]]))


def _traced_span(
    index: SearchableIndex,
    text: str,
    ids: npt.NDArray[Any],
    offsets: npt.NDArray[Any],
    span: SpanLike,
    scorer: Scorer,
) -> TracedSpan:
    start, end = _characters(text, offsets[span.start : span.end])
    score = float(scorer(index, ids, span))
    if not math.isfinite(score):
        raise ParameterError(
            "The scorer returned a value that is not finite.",
            given=f"{score} for tokens {span.start} to {span.end}",
            expected="nats, a finite float",
            mend="smooth the probabilities, so that none is zero",
        )
    occurrences = index.locate(ids[span.start : span.end], limit=LOCATED)
    documents = tuple(dict.fromkeys(str(occurrence.document_id) for occurrence in occurrences))
    return TracedSpan(
        start,
        end,
        int(span.start),
        int(span.end),
        int(span.count),
        score,
        documents,
        span.count <= len(occurrences),
    )


def _characters(text: str, offsets: npt.NDArray[Any]) -> tuple[int, int]:
    """Whole characters that tokens with these offsets (n, 2) touch, without surrounding white space."""
    start, end = int(offsets[:, 0].min()), int(offsets[:, 1].max())
    inner = text[start:end].strip()
    if inner:
        start += len(text[start:end]) - len(text[start:end].lstrip())
        end = start + len(inner)
    return start, end


def _traced_sources(
    index: SearchableIndex,
    ids: npt.NDArray[Any],
    spans: list[TracedSpan],
    min_length: int,
    max_count: int | None,
    limit: int,
) -> tuple[TracedSource, ...]:
    holders = {document_id for span in spans for document_id in span.source_ids}
    # With a filter on counts, a document may outrank all others by spans that were filtered out.
    wanted = limit if max_count is None else limit + LOCATED
    ranked = index.sources(ids, min_length=min_length, limit=wanted)
    kept = [source for source in ranked if max_count is None or source.document_id in holders]
    return tuple(_traced_source(index, ids, spans, min_length, source) for source in kept[:limit])


def _traced_source(
    index: SearchableIndex,
    ids: npt.NDArray[Any],
    spans: list[TracedSpan],
    min_length: int,
    source: Any,
) -> TracedSource:
    document = index.document(source.document_id)
    tokens, offsets = index.encode_with_offsets(without_surrogates(document.text))
    runs = [_longest_run(tokens.tolist(), ids.tolist(), start, end) for start, end in source.covered]
    runs = [run for run in runs if run.size]
    runs.sort(key=lambda run: -float(index.surprisal[ids[run.b : run.b + run.size]].sum()))
    passages = []
    for run in runs[:PASSAGES]:
        held = tuple(
            i
            for i, s in enumerate(spans)
            if min(s.token_end, run.b + run.size) - max(s.token_start, run.b) >= min_length
        )
        place = _characters(document.text, offsets[run.a : run.a + run.size])
        passages.append(_passage(document.text, *place, held))
    covered = tuple((int(start), int(end)) for start, end in source.covered)
    share = sum(end - start for start, end in covered) / len(ids)
    return TracedSource(
        document.id, float(source.score), dict(document.meta), covered, share, tuple(passages)
    )


class Run(NamedTuple):
    """`size` tokens that stand at `a` in a document and at `b` in a text."""

    a: int
    b: int
    size: int


def _longest_run(document: list[int], text: list[int], start: int, end: int) -> Run:
    """The longest run of tokens that a document shares with `text[start:end]`; of several, the first.

    Takes time in proportion to both, however often they repeat themselves: the document is read through
    the suffix automaton of the text (Blumer et al., 1985), whose states are sets of places where runs end.
    """
    follow: list[dict[int, int]] = [{}]  # state -> next token -> state
    link, length, first_end = [-1], [0], [start]  # the state of a shorter suffix; longest run; its first end
    last = 0
    for place in range(start, end):
        state, token = last, text[place]
        last = len(follow)
        follow.append({})
        link.append(0)
        length.append(length[state] + 1)
        first_end.append(place + 1)
        while state != -1 and token not in follow[state]:
            follow[state][token] = last
            state = link[state]
        if state == -1:
            continue
        target = follow[state][token]
        if length[target] != length[state] + 1:
            copy = len(follow)
            follow.append(dict(follow[target]))
            link.append(link[target])
            length.append(length[state] + 1)
            first_end.append(first_end[target])
            link[target] = copy
            while state != -1 and follow[state].get(token) == target:
                follow[state][token] = copy
                state = link[state]
            target = copy
        link[last] = target
    best, state, size = Run(0, start, 0), 0, 0
    for place, token in enumerate(document, start=1):
        while state and token not in follow[state]:
            state = link[state]
            size = length[state]
        if token in follow[state]:
            state, size = follow[state][token], size + 1
        if size > best.size:
            best = Run(place - size, first_end[state] - size, size)
    return best


def _passage(text: str, start: int, end: int, spans: tuple[int, ...]) -> Passage:
    """Cut `text` around [start, end), between words where there are any nearby."""
    first, last = max(0, start - CONTEXT), min(len(text), end + CONTEXT)
    before, after = text[first:start], text[end:last]
    if first and " " in before[:40]:
        before = before[before.index(" ") + 1 :]
    if last < len(text) and " " in after[-40:]:
        after = after[: after.rindex(" ")]
    return Passage(before, text[start:end], after, bool(first), last < len(text), spans)


def _source_record(source: TracedSource) -> dict[str, Any]:
    record = source._asdict()
    record["meta"] = dict(source.meta)
    record["covered"] = [list(interval) for interval in source.covered]
    record["passages"] = [{**p._asdict(), "spans": list(p.spans)} for p in source.passages]
    return record


def _bracketed(trace: Trace) -> str:
    """The text with `[1 ` where span 1 starts and ` 1]` where it ends."""
    pieces: list[str] = []
    for segment in trace.segments():
        opened = [i for i in segment.spans if trace.spans[i].start == segment.start]
        closed = [i for i in segment.spans if trace.spans[i].end == segment.end]
        pieces += [f"[{i + 1} " for i in sorted(opened, key=lambda i: -trace.spans[i].end)]
        pieces.append(visible(trace.text[segment.start : segment.end]))
        pieces += [f" {i + 1}]" for i in sorted(closed, key=lambda i: -trace.spans[i].start)]
    return "".join(pieces)


def _quoted(passage: Passage) -> str:
    before, after = passage.before[-60:], passage.after[:60]
    opening = "… " if passage.cut_before or before != passage.before else ""
    closing = " …" if passage.cut_after or after != passage.after else ""
    return visible(opening + " ".join(f"{before}>>{passage.match}<<{after}".split()) + closing)


def _placeholder(character: str) -> str:
    control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n"
    return f"⟨U+{ord(character):04X}⟩" if control or character in _HIDDEN else character


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count:,} times"
