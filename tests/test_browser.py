"""Viewer and slider in a real browser: what a reader does with them, and what must never run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from bci_samples import frame

from tracealign_lib import viewer
from tracealign_lib.documents import Document
from tracealign_lib.experiments.bci_texts import RARE, UNSAFE
from tracealign_lib.index import TraceIndex
from tracealign_lib.lm import train_tokenizer
from tracealign_lib.slider import threshold_slider
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


# --- the threshold slider ------------------------------------------------------------------------

SHARES = {  # by threshold, of UNSAFE and of RARE
    "raw BCI": {UNSAFE: [10.0, 30.0, 30.0, 50.0], RARE: [10.0, 10.0, 10.0, 30.0]},
    HOSTILE: {UNSAFE: [4.0, 4.0, 4.0, 4.0], RARE: [2.0, 2.0, 2.0, 2.0]},
}


@pytest.fixture(scope="module")
def slider_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with the same slider twice, as a chapter may hold it."""
    shifted = frame(SHARES, HOSTILE)
    data = pd.concat([frame(SHARES, "paper"), shifted.assign(score=shifted["score"] + 10)])
    shown = threshold_slider(
        data, start=("paper", "raw BCI"), units={HOSTILE: "tokens"}, marks={"raw BCI": 20.0}
    )
    head = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>slider</title>'
    head += '<meta name="viewport" content="width=device-width">'
    file = tmp_path_factory.mktemp("slider") / "page.html"
    file.write_text(head + 2 * shown._repr_html_(), encoding="utf-8")
    return file


def shares(box) -> list[str]:
    return [text.split(" [")[0] for text in box.locator(".ta-share").all_inner_texts()]


def announced(tab, box, text: str) -> None:
    box.locator(".ta-live").filter(has_text=text).wait_for(timeout=3000)


def test_the_slider_starts_at_the_mark_loads_nothing_and_runs_nothing_foreign(tab, slider_file: Path) -> None:
    asked, broken = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: broken.append(str(error)))
    tab.goto(slider_file.as_uri())
    box = tab.locator(".ta-slider").first
    announced(tab, box, "Above 20 nats, a shield refuses 75 %")
    assert shares(box) == ["75 %", "25 %"]
    assert box.locator(".ta-range").get_attribute("aria-valuetext") == "20 nats"
    assert box.locator(".ta-mark").inner_text() == "Back to the paper's τ = 20 nats"
    track, tick = (box.locator(name).bounding_box() for name in (".ta-range", ".ta-tick"))
    place = (tick["x"] + tick["width"] / 2 - track["x"]) / track["width"]
    assert place == pytest.approx(21 / 51, abs=0.03)  # thresholds from -1 to 50
    assert (tab.title(), asked, broken) == ("slider", [slider_file.as_uri()], [])
    assert tab.locator("img").count() == 0
    assert not box.locator(".ta-static").is_visible()


def test_arrow_keys_move_the_threshold_and_the_button_brings_it_back(tab, slider_file: Path) -> None:
    tab.goto(slider_file.as_uri())
    box = tab.locator(".ta-slider").first
    box.locator(".ta-range").focus()
    tab.keyboard.press("End")
    assert shares(box) == ["0 %", "0 %"]
    tab.keyboard.press("Home")
    assert shares(box) == ["100 %", "100 %"]
    announced(tab, box, "refuses 100 %")
    for _ in range(100):
        if shares(box)[1] != "100 %":
            break
        tab.keyboard.press("ArrowRight")
    assert box.locator(".ta-value").inner_text() == "10 nats"  # refused is what lies above
    assert shares(box) == ["75 %", "25 %"]
    tab.keyboard.press("End")
    box.locator(".ta-mark").click()
    assert box.locator(".ta-value").inner_text() == "20 nats"
    assert shares(box) == ["75 %", "25 %"]


def test_dragging_moves_the_bars(tab, slider_file: Path) -> None:
    tab.goto(slider_file.as_uri())
    box = tab.locator(".ta-slider").first
    track = box.locator(".ta-range").bounding_box()
    middle = track["y"] + track["height"] / 2
    tab.mouse.move(track["x"] + track["width"] / 2, middle)
    tab.mouse.down()
    tab.mouse.move(track["x"] + 0.8 * track["width"], middle, steps=4)
    tab.mouse.up()
    assert 35 < float(box.locator(".ta-value").inner_text().split()[0]) < 45
    assert shares(box) == ["25 %", "0 %"]
    bars = box.locator(".ta-bar").evaluate_all(
        "bars => bars.map(b => b.querySelector('i').offsetWidth / b.clientWidth)"
    )
    assert bars == pytest.approx([0.25, 0], abs=0.03)


def test_score_and_filter_are_chosen_and_the_other_slider_stands_still(tab, slider_file: Path) -> None:
    tab.goto(slider_file.as_uri())
    first, second = tab.locator(".ta-slider").all()
    first.locator(".ta-score").select_option(HOSTILE)
    assert first.locator(".ta-value").inner_text().endswith("tokens")
    assert first.locator(".ta-mark").is_hidden()  # the paper's threshold is one of raw BCI
    assert first.locator(".ta-shown-score").inner_text() == HOSTILE
    first.locator(".ta-score").select_option("raw BCI")
    first.locator(".ta-filter").select_option(HOSTILE)
    assert first.locator(".ta-mark").is_visible()
    assert shares(first) == ["75 %", "25 %"]  # scores 10 higher: 20 refuses what lay above 10
    first.locator(".ta-range").focus()
    tab.keyboard.press("End")
    assert shares(first) == ["0 %", "0 %"]
    assert shares(second) == ["75 %", "25 %"]


def test_without_script_the_table_remains(tab, slider_file: Path) -> None:
    plain = tab.context.browser.new_page(java_script_enabled=False)
    plain.goto(slider_file.as_uri())
    box = plain.locator(".ta-slider").first
    assert shares(box) == ["75 %", "25 %"]
    assert not box.locator(".ta-controls").is_visible()
    assert "20 nats" in box.locator(".ta-static").inner_text()
    plain.close()


@pytest.mark.parametrize("width", [390, 800])
def test_the_slider_never_makes_the_page_scroll_sideways(tab, slider_file: Path, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(slider_file.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
