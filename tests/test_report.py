"""Many traces on one page: each is there once, under its labels, and nothing of it runs."""

from __future__ import annotations

from bs4 import BeautifulSoup

from tracealign_lib.report import Traced, report
from tracealign_lib.shield import Decision
from tracealign_lib.tracing import Trace

HOSTILE = "</section><script>x</script>"


def traced(label: str, text: str, **shown: object) -> Traced:
    return Traced(label, Trace(text, (), (), 2, 8), **shown)  # type: ignore[arg-type]


def test_every_text_is_listed_and_linked() -> None:
    verdict = Decision(True, "too long", 9.0)
    page = BeautifulSoup(
        report([traced("Text 1", "first"), traced("Text 2", "second", verdict=verdict)], "Both"),
        "html.parser",
    )
    assert [a["href"] for a in page.nav.find_all("a")] == ["#text-1", "#text-2"]
    assert [h.text for h in page.find_all("h2")] == ["Text 1", "Text 2"]
    assert [h["id"] for h in page.find_all("h2")] == ["text-1", "text-2"]
    assert page.h1.text == "Both"
    assert "refused" in page.nav.find_all("li")[1].text
    assert "refused" not in page.nav.find_all("li")[0].text


def test_texts_that_look_the_same_share_a_section_so_that_ids_stay_unique() -> None:
    page = BeautifulSoup(
        report([traced(f"Text {i}", text) for i, text in enumerate("aba", start=1)], "T"), "html.parser"
    )
    assert [h.text for h in page.find_all("h2")] == ["Text 1, Text 3", "Text 2"]
    ids = [element["id"] for element in page.find_all(id=True)]
    assert len(ids) == len(set(ids))


def test_one_text_needs_no_list() -> None:
    page = report([traced("Text 1", "only")], "One")
    assert "<nav" not in page
    assert "<h2" not in page
    assert "only" in page


def test_nothing_of_a_text_runs_and_nothing_is_loaded() -> None:
    page = report([traced(HOSTILE, HOSTILE, prompt=HOSTILE), traced("b", "c")], HOSTILE)
    parsed = BeautifulSoup(page, "html.parser")
    assert not parsed.find_all("script")
    assert len(parsed.find_all("section")) == 2
    assert "default-src 'none'" in page
    assert not parsed.find_all(src=True)
