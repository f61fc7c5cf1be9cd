"""Pages of hostile documents and completions in a real browser: nothing of them runs, loads or opens."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzz_texts import PIECES, hostile_documents, storable
from index_samples import train_tokenizer

from tracealign_lib import viewer
from tracealign_lib.index import TraceIndex
from tracealign_lib.report import Traced, report
from tracealign_lib.tracing import trace

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `dev` is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
PAGES = 60
PROOF = "<script>window.ran=1;document.title='ran'</script>"


def make_pages(folder: Path) -> list[Path]:
    tokenizer = train_tokenizer([piece for piece in PIECES if piece.isprintable()], vocab_size=400)
    documents = [document for document in hostile_documents(2 * PAGES, 1) if storable(document)]
    index = TraceIndex.build(documents, tokenizer, folder / "index")
    rng, texts = random.Random(2), []
    for document in documents[:PAGES]:
        completion = "".join(rng.choices(PIECES, k=12)) + document.text
        other = rng.choice([document.id, *PIECES])
        texts.append(Traced(other, trace(index, completion, min_length=4), prompt=other))
    pages = [viewer.page(text.trace, text.label, prompt=text.prompt) for text in texts]
    made = [folder / f"{number}.html" for number in range(PAGES + 1)]
    for file, page in zip(made, [*pages, report(texts, PROOF)], strict=True):
        file.write_text(page, encoding="utf-8")
    return made


def strange(tab: Any, page: Path) -> list[str]:
    """What a page did beside being shown: what it asked for, said, opened or changed."""
    seen: list[str] = []
    tab.on("request", lambda request: seen.append(request.url))
    tab.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
    tab.on("pageerror", lambda error: seen.append(str(error)))
    tab.on("console", lambda message: seen.append(message.text))
    tab.goto(page.as_uri())
    tab.mouse.move(200, 200)
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    if tab.evaluate("window.ran === 1 || document.title === 'ran'"):
        seen.append("a script ran")
    if tab.evaluate("document.querySelectorAll('script,img,iframe,svg,link,base,form,object,embed').length"):
        seen.append("an element of the text stands in the page")
    return [what for what in seen if not what.startswith(page.as_uri())]


def test_nothing_of_hostile_texts_runs(tmp_path: Path, say: Any) -> None:
    pages = make_pages(tmp_path)
    control = tmp_path / "control.html"  # the same with one text that was not escaped
    control.write_text(pages[0].read_text(encoding="utf-8").replace("</main>", f"{PROOF}</main>"))
    unguarded = tmp_path / "unguarded.html"
    unguarded.write_text(f"<!DOCTYPE html><title>x</title>{PROOF}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = {}
        for page in [*pages, control, unguarded]:
            tab = browser.new_page(viewport={"width": 800, "height": 900})
            found[page] = strange(tab, page)
            tab.close()
        browser.close()
    assert "a script ran" in found.pop(unguarded)  # it would be seen
    stopped = found.pop(control)
    assert "an element of the text stands in the page" in stopped
    assert "a script ran" not in stopped  # the page's own policy stops it
    strange_ones = sum(map(bool, found.values()))
    say(f"{strange_ones} of {len(found)} pages of hostile texts ran, loaded or opened anything")
    assert len(found) == PAGES + 1
    assert not any(found.values()), [seen for seen in found.values() if seen][:3]
