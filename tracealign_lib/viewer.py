"""A traced text as static HTML: no script, no network, the same bytes for the same trace.

A reader sees the spans in the text; hover or keyboard focus shows what is known about a span; a click, or
Enter, narrows the list of sources to the documents that hold it. All of this is CSS (`:hover`, `:focus`,
`:target`), so it works in a notebook, in a rendered book without a kernel, and from a file. The layout
follows the idea of OLMoTrace (arXiv 2504.07096): spans in the text, source documents beside it.

All text comes from a corpus or a model. It is escaped by Jinja, after `visible` has replaced characters that
could mislead a reader; none of it reaches an attribute, a URL or the style sheet.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tracealign_lib.tracing import (
    Passage,
    Segment,
    Trace,
    TracedSource,
    provenance,
    span_label,
    summary,
    visible,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

LINKED = 40
"""Spans that highlight their sources on hover; each costs two CSS rules."""
LONGEST_MATCH = 600
"""Characters of a match that are shown; the middle of a longer one is left out."""
LONGEST_ID = 80
"""Characters of a document id or file name that are shown."""


class VerdictLike(Protocol):
    """What a shield decided."""

    @property
    def refused(self) -> bool: ...
    @property
    def reason(self) -> str: ...


def to_html(trace: Trace, *, verdict: VerdictLike | None = None, prompt: str | None = None) -> str:
    """Render a trace as an HTML fragment with its own style.

    Parameters
    ----------
    trace:
        What to show.
    verdict:
        Shown as a banner: an object with `refused` (bool) and `reason` (str).
    prompt:
        The question that led to the text, shown above it.

    Returns
    -------
    str
        HTML without scripts or links to other pages. Its ids come from a hash of the content, so a stored
        notebook output does not change when nothing else did.
    """
    return _TEMPLATES.get_template("trace.html").render(
        style=_STYLE,
        trace=trace,
        verdict=verdict,
        prompt=prompt,
        key=_key(trace, verdict, prompt),
        linked=range(1, min(len(trace.spans), LINKED) + 1),
        segments=[_segment(trace, segment) for segment in trace.segments()],
        levels=_levels(trace),
    )


def page(trace: Trace, title: str, *, verdict: VerdictLike | None = None, prompt: str | None = None) -> str:
    """A complete HTML document that shows one trace and loads nothing."""
    body = Markup(to_html(trace, verdict=verdict, prompt=prompt))
    return _TEMPLATES.get_template("page.html").render(title=title, body=body)


def _key(trace: Trace, verdict: VerdictLike | None, prompt: str | None) -> str:
    decided = None if verdict is None else [bool(verdict.refused), str(verdict.reason)]
    shown = [trace.to_json(), prompt, decided]
    return hashlib.sha256(json.dumps(shown, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _segment(trace: Trace, segment: Segment) -> dict[str, Any]:
    """One stretch of text: the span that a click on it opens, the other spans that start here, its ends."""
    # The span that starts last owns the segment, so that each span owns the one with its number.
    ranked = sorted(segment.spans, key=lambda i: (trace.spans[i].start, -trace.spans[i].end))
    starting = [i for i in ranked if trace.spans[i].start == segment.start]
    owner = ranked[-1] if ranked else None
    return {
        "text": trace.text[segment.start : segment.end],
        "spans": segment.spans,
        "owner": owner,
        "first": owner in starting,
        "others": [i for i in starting if i != owner],
        "ends": any(trace.spans[i].end == segment.end for i in segment.spans),
    }


def _levels(trace: Trace) -> list[int]:
    """1 to 3 for each span, by its share of the highest score in this text: the weight of its underline."""
    highest = max((span.score for span in trace.spans), default=0.0)
    return [1 + min(2, int(3 * max(span.score, 0.0) / highest)) if highest > 0 else 1 for span in trace.spans]


def _classes(spans: Iterable[int]) -> str:
    return " ".join(f"ta-k{i + 1}" for i in spans)


def _held(source: TracedSource) -> list[int]:
    """Positions of the spans that a source's passages hold, all or in part."""
    return sorted({i for passage in source.passages for i in passage.spans})


def _match(passage: Passage) -> str:
    return _shorten(passage.match, LONGEST_MATCH)


def _shorten(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return text[: longest // 2] + " […] " + text[-(longest // 2) :]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tracealign_lib"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "visible": visible,
        "label": span_label,
        "summary": summary,
        "provenance": provenance,
        "classes": _classes,
        "held": _held,
        "match": _match,
        "short": lambda text: _shorten(text, LONGEST_ID),
    }
    return environment


def _one_line(style: str) -> str:
    """A style sheet without optional white space: every trace carries it."""
    return re.sub(r"\s*([{};,])\s*|(?<=:) ", r"\1", style).replace(";}", "}").strip()


_TEMPLATES = _environment()
_STYLE = Markup(_one_line(_TEMPLATES.get_template("trace.css").render()))
