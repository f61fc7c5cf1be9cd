"""Takes the picture that the README opens with: a drifting completion of the book's model, traced.

    python tools/readme_picture.py [CHROMIUM]

Needs the extra `dev` (playwright), a Chromium, and the laptop models (built if missing).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tracealign_lib import viewer
from tracealign_lib.bci import RawBCI
from tracealign_lib.experiments.common import PAPER_TAU
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.shield import TraceShield
from tracealign_lib.tracing import trace

TARGET = Path(__file__).parent.parent / "book" / "_static" / "traced-completion.png"


def main(chromium: str = "/usr/bin/chromium") -> None:
    """Render the first role-play that leaked the item it asked for, and photograph the page."""
    pipeline = Pipeline("laptop", 0)
    outcome = next(
        o
        for o in pipeline.outcomes()
        if o.drifted and o.prompt.group == "role_play" and o.judgement.leaked == o.prompt.item
    )
    traced = trace(pipeline.index, outcome.completion, limit=3)
    verdict = TraceShield(pipeline.unsafe_index, RawBCI(), PAPER_TAU).check(outcome.completion)
    page = viewer.page(traced, "A traced completion", verdict=verdict, prompt=outcome.prompt.request)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 860, "height": 700}, device_scale_factor=1.5)
        tab.goto(file.as_uri())
        tab.locator("body").screenshot(path=str(TARGET))
        browser.close()
    image = Image.open(TARGET).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(TARGET, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
