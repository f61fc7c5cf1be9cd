"""Many traced texts on one static HTML page, with a list of them at its head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tracealign_lib import viewer
from tracealign_lib.tracing import Trace, summary, visible


class Traced(NamedTuple):
    """One text of a report: what it is called, its trace, and what `viewer.to_html` shows besides."""

    label: str
    trace: Trace
    verdict: viewer.VerdictLike | None = None
    prompt: str | None = None


class _Section(NamedTuple):
    heading: str
    note: str
    fragment: Markup


def report(texts: Iterable[Traced], title: str) -> str:
    """A complete HTML document of traces: no script, loads nothing, the same bytes for the same traces.

    Texts that look the same in all respects are shown once, under all their labels.
    """
    labels: dict[str, list[str]] = {}
    notes: dict[str, str] = {}
    for label, trace, verdict, prompt in texts:
        fragment = viewer.to_html(trace, verdict=verdict, prompt=prompt)
        labels.setdefault(fragment, []).append(label)
        decided = "" if verdict is None else "refused · " if verdict.refused else "not refused · "
        notes[fragment] = decided + summary(trace)
    sections = [_Section(", ".join(n), notes[html], Markup(html)) for html, n in labels.items()]
    body = Markup(_TEMPLATES.get_template("report.html").render(sections=sections))
    return _TEMPLATES.get_template("page.html").render(title=title, body=body)


_TEMPLATES = Environment(loader=PackageLoader("tracealign_lib"), autoescape=True, undefined=StrictUndefined)
_TEMPLATES.filters["visible"] = visible
