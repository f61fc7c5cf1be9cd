"""The viewer in a real browser: what a reader points at, tabs to and clicks, and what must never run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tracealign_lib import viewer
from tracealign_lib.documents import Document
from tracealign_lib.index import TraceIndex
from tracealign_lib.lm import train_tokenizer
from tracealign_lib.tracing import trace

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `dev` is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]

HOSTILE = '</style><script>document.title="ran"</script><img src=x onerror="document.title=\'ran\'">'
TEXTS = {
    "a": f"soak the amber thread in the cellar and wait. {HOSTILE}",
    "b": "the dog slept beside the mill door all day, then went home.",
}
COMPLETION = (
    f"he said: soak the amber thread in the cellar and wait. {HOSTILE} the dog slept beside the mill door"
)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    documents = [Document(name, text, {"file": HOSTILE}) for name, text in TEXTS.items()]
    index = TraceIndex.build(documents, train_tokenizer(list(TEXTS.values()), 400), folder / "index")
    traced = trace(index, COMPLETION, min_length=6)
    assert len(traced.spans) >= 2
    file = folder / "page.html"
    file.write_text(viewer.page(traced, HOSTILE, prompt=HOSTILE), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tab(page_file: Path) -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 800, "height": 900})
        browser.close()


def opacity(tab, number: int) -> float:
    return float(tab.locator(".ta-g .ta-tip").nth(number).evaluate("e => getComputedStyle(e).opacity"))


def test_nothing_of_a_hostile_corpus_or_completion_runs(tab, page_file: Path) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page_file.as_uri())
    tab.wait_for_timeout(300)
    assert tab.title() != "ran"
    assert asked == [page_file.as_uri()]
    assert tab.locator("script, img").count() == 0
    assert HOSTILE in tab.locator(".ta-body").inner_text()


def test_pointing_at_a_span_or_tabbing_to_it_shows_its_note(tab, page_file: Path) -> None:
    tab.goto(page_file.as_uri())
    assert opacity(tab, 0) == 0
    tab.locator(".ta-g").first.hover()
    tab.wait_for_function("getComputedStyle(document.querySelector('.ta-g .ta-tip')).opacity === '1'")
    tab.mouse.move(5, 5)
    tab.keyboard.press("Tab")
    focused = tab.evaluate("document.activeElement.className")
    assert "ta-g" in focused
    tab.wait_for_function("getComputedStyle(document.activeElement.querySelector('.ta-tip')).opacity === '1'")


def test_a_click_leaves_the_sources_of_that_span(tab, page_file: Path) -> None:
    tab.goto(page_file.as_uri())
    sources = tab.locator(".ta-source:visible")
    assert sources.count() == 2
    tab.locator("a.ta-g").last.click()
    assert [text.split()[1] for text in sources.locator(".ta-doc").all_inner_texts()] == ["b"]


@pytest.mark.parametrize("width", [360, 800])
def test_the_page_never_scrolls_sideways(tab, page_file: Path, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(page_file.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
