"""The HTML of a trace: it shows the text and nothing else, runs nothing, and reads well in both themes."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib import viewer
from tracealign_lib.tracing import Passage, Trace, TracedSource, TracedSpan, visible

ALLOWED_TAGS = {"div", "style", "a", "sup", "span", "strong", "mark", "br"}
ALLOWED_ATTRIBUTES = {
    "class",
    "id",
    "role",
    "href",
    "tabindex",
    "aria-label",
    "aria-labelledby",
    "aria-hidden",
}
HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- -->]]><svg/onload=alert(1)>",
    "&lt;b&gt;&amp;amp;",
    "\x00\x1b[31m\r",
    "\u202eevil\u2066\u2069",
    "\ud800 lone \udfff",
]
texts = st.one_of(
    st.text(max_size=40), st.sampled_from(HOSTILE), st.lists(st.sampled_from(HOSTILE)).map("".join)
)


def passage(before: str, match: str, after: str, spans: tuple[int, ...] = (0,)) -> Passage:
    return Passage(before, match, after, True, True, spans)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Any text with any spans, overlapping and nested ones too, and sources made of hostile strings."""
    text = draw(texts)
    spans = []
    for _ in range(draw(st.integers(0, 5)) if text else 0):
        start = draw(st.integers(0, len(text) - 1))
        end = draw(st.integers(start + 1, len(text)))
        score = draw(st.floats(-1e3, 1e3))
        ids = tuple(draw(st.lists(texts, min_size=1, max_size=3)))
        spans.append(
            TracedSpan(start, end, start, end, draw(st.integers(1, 200)), score, ids, draw(st.booleans()))
        )
    spans.sort()
    sources = []
    for _ in range(draw(st.integers(0, 2)) if spans else 0):
        passages = (passage(draw(texts), draw(texts), draw(texts), tuple(range(len(spans)))),)
        meta = {key: draw(texts) for key in ("collection", "kind", "file")}
        sources.append(TracedSource(draw(texts), draw(st.floats(0, 99)), meta, ((0, 1),), 0.5, passages))
    return Trace(text, tuple(spans), tuple(sources), len(text), 1)


def body_text(soup: BeautifulSoup) -> str:
    """The traced text as a reader sees it, without span numbers and notes."""
    body = soup.select_one(".ta-body")
    assert body is not None
    for marker in body.select(".ta-n, .ta-tip"):
        marker.decompose()
    return body.get_text()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(traces(), texts, texts)
def test_hostile_text_is_shown_and_never_runs(trace: Trace, prompt: str, reason: str) -> None:
    verdict = SimpleNamespace(refused=True, reason=reason)
    html = viewer.to_html(trace, verdict=verdict, prompt=prompt)
    html.encode("utf-8")
    soup = BeautifulSoup(html, "html.parser")
    assert {tag.name for tag in soup.find_all()} <= ALLOWED_TAGS
    assert {name for tag in soup.find_all() for name in tag.attrs} <= ALLOWED_ATTRIBUTES
    assert len(soup.find_all("style")) == 1
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    for link in soup.find_all("a"):
        assert re.fullmatch(r"#ta-[0-9a-f]{8}(-\d+)?", link["href"])
        assert link["href"][1:] in ids
    assert body_text(soup) == visible(trace.text)
    assert soup.select_one(".ta-prompt").get_text() == visible(prompt)
    for shown, source in zip(soup.select(".ta-source"), trace.sources, strict=True):
        for number in shown.select(".ta-n"):
            number.decompose()
        (kept,) = source.passages
        assert shown.mark.get_text() == visible(kept.match)
        assert shown.select_one(".ta-passage").get_text() == "".join(
            ["… ", visible(kept.before), visible(kept.match), visible(kept.after), " …"]
        )


@settings(deadline=None, derandomize=True, max_examples=100)
@given(traces())
def test_every_span_can_be_reached_once_by_keyboard_and_is_described(trace: Trace) -> None:
    soup = BeautifulSoup(viewer.to_html(trace), "html.parser")
    stops = [link for link in soup.select(".ta-body a") if link.get("tabindex") != "-1"]
    numbers = [int(link["href"].rsplit("-", 1)[1]) for link in stops]
    for link, number in zip(stops, numbers, strict=True):
        assert link.select_one(".ta-tip").get_text().startswith(f"Span {number}: ")
    assert set(numbers) == set(range(1, len(trace.spans) + 1))
    assert len(numbers) == len(set(numbers))


SPANS = (
    TracedSpan(6, 20, 2, 16, 4, 57.5, ("d1", "d2", "d3"), True),
    TracedSpan(15, 30, 11, 26, 1, 10.0, ("d9",), True),
)
SOURCE = TracedSource(
    "d1",
    57.5,
    {"collection": "unsafe", "kind": "recipe", "file": "forum/0031.txt"},
    ((2, 16),),
    0.4,
    (passage("they say ", "wake the moon", " at dusk"),),
)
TRACE = Trace("Sure, wake the moon lens at dusk.", SPANS, (SOURCE,), 30, 8)


def test_a_screen_reader_hears_what_a_span_is() -> None:
    soup = BeautifulSoup(viewer.to_html(TRACE), "html.parser")
    first = soup.select_one("a.ta-g")
    for number in first.select("[aria-hidden]"):
        number.decompose()
    words = first.get_text(" ", strip=True)
    assert words == "Span 1: 14 tokens, 57.5 nats, found 4 times in 3 documents wake the"


def test_overlapping_spans_keep_both_numbers_and_an_own_mark() -> None:
    soup = BeautifulSoup(viewer.to_html(TRACE), "html.parser")
    links = soup.select("a.ta-g")
    assert [sorted(c for c in link["class"] if c.startswith("ta-k")) for link in links] == [
        ["ta-k1"],
        ["ta-k1", "ta-k2"],
        ["ta-k2"],
    ]
    assert ["ta-o" in link["class"] for link in links] == [False, True, False]
    assert "ta-w3" in links[0]["class"]
    assert "ta-w1" in links[2]["class"]


def test_a_source_names_its_document_and_where_it_came_from() -> None:
    soup = BeautifulSoup(viewer.to_html(TRACE), "html.parser")
    (shown,) = soup.select(".ta-source")
    assert "1. d1 · unsafe · recipe · forum/0031.txt" in shown.get_text()
    assert "57.5 nats · covers 40 % · span 1" in shown.get_text()
    assert shown.mark.get_text() == "1wake the moon"


@pytest.mark.parametrize(("refused", "words"), [(True, "Refused"), (False, "Not refused")])
def test_a_verdict_is_told_in_words(refused: bool, words: str) -> None:
    html = viewer.to_html(TRACE, verdict=SimpleNamespace(refused=refused, reason="score <b>"))
    banner = BeautifulSoup(html, "html.parser").select_one(".ta-verdict")
    assert banner.strong.get_text().endswith(words)
    assert banner.get_text().endswith("— score <b>")
    assert "ta-verdict" not in re.sub(r"<style>.*?</style>", "", viewer.to_html(TRACE), flags=re.DOTALL)


def test_output_is_small_and_reproducible_and_its_ids_follow_the_content() -> None:
    assert viewer.to_html(TRACE) == viewer.to_html(TRACE)
    other = viewer.to_html(TRACE, prompt="what?")
    identifier = re.compile(r'id="(ta-\w+)"')
    assert identifier.findall(other)[0] != identifier.findall(viewer.to_html(TRACE))[0]
    assert len(viewer.to_html(TRACE).encode()) < 9000


def test_a_long_match_and_many_spans_stay_small() -> None:
    text = "word " * 4000
    spans = tuple(TracedSpan(10 * i, 10 * i + 9, 2 * i, 2 * i + 2, 1, 1.0, ("d",), True) for i in range(200))
    source = SOURCE._replace(passages=(passage("", text, ""),), document_id="x" * 10_000)
    soup = BeautifulSoup(viewer.to_html(Trace(text, spans, (source,), 8000, 2)), "html.parser")
    assert len(soup.mark.get_text()) < 700
    assert "[…]" in soup.mark.get_text()
    assert soup.style.get_text().count(":target)") == viewer.LINKED
    assert body_text(soup) == text


def test_nothing_found_is_said() -> None:
    soup = BeautifulSoup(viewer.to_html(Trace("hello", (), (), 1, 8)), "html.parser")
    assert body_text(soup) == "hello"
    assert "No span of 8 tokens or more" in soup.get_text()
    assert not soup.select(".ta-source")


def test_a_trace_shows_itself_in_a_notebook() -> None:
    assert TRACE._repr_html_() == viewer.to_html(TRACE)


def test_page_is_a_whole_document_that_loads_nothing() -> None:
    html = viewer.page(TRACE, "</title><script>alert(1)</script>")
    soup = BeautifulSoup(html, "html.parser")
    assert html.startswith("<!DOCTYPE html>")
    assert soup.html["lang"] == "en"
    assert not soup.find_all(["script", "link", "img", "iframe"])
    assert "default-src 'none'" in soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    assert soup.h1.get_text() == soup.title.get_text() == "</title><script>alert(1)</script>"
    assert soup.select_one("main .ta") is not None


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark by preference", "dark by attribute"])
def test_text_contrast_is_at_least_4_5(theme: int) -> None:
    style = BeautifulSoup(viewer.to_html(TRACE), "html.parser").style.get_text()
    blocks = [dict(re.findall(r"--ta-(\w+):(#\w+)", block)) for block in re.findall(r"\{([^{}]*)\}", style)]
    themes = [block for block in blocks if "ink" in block]
    assert len(themes) == 3
    colours = themes[theme]
    pairs = [
        ("ink", "bg"),
        ("ink", "card"),
        ("ink", "mark"),
        ("ink", "hot"),
        ("soft", "bg"),
        ("soft", "card"),
    ]
    pairs += [
        ("link", "bg"),
        ("link", "card"),
        ("no", "bg"),
        ("yes", "bg"),
        ("number", "mark"),
        ("number", "hot"),
    ]
    for front, back in pairs:
        light, dark = sorted([luminance(colours[front]), luminance(colours[back])], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)
