"""What every chapter does: say, show a table, compare with the published value, tell its run time."""

from __future__ import annotations

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from tracealign_lib import chapter
from tracealign_lib.errors import ResultsError
from tracealign_lib.results import write_results
from tracealign_lib.stats import Interval


@pytest.fixture
def shown(monkeypatch) -> list:
    pages: list = []
    monkeypatch.setattr(chapter, "display", pages.append)
    return pages


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A book's results folder with one headline and the run times of one chapter."""
    monkeypatch.setattr("tracealign_lib.results.results_folder", lambda: tmp_path)
    write_results("demo", {"drift": Interval(0.5, 0.4, 0.6, 30)}, profile="full", seeds=[3], settings={})
    times = {"empty cache": {"02-model": 200.0}, "full cache": {"02-model": 12.0}}
    write_results("run-times", times, profile="laptop", seeds=[0], settings={})


def test_a_sentence_is_shown_as_markdown(shown):
    chapter.say("drift is **0.5**")
    assert shown[0].data == "drift is **0.5**"


def test_a_table_has_its_caption_its_cells_escaped_and_a_stable_id(shown):
    frame = pd.DataFrame({"text": ["<b>hi</b>"], "share": [0.123456]})
    for caption in ("one", "one", "two"):
        chapter.table(frame, caption)
    pages = [page.data for page in shown]
    soup = BeautifulSoup(pages[0], "html.parser")
    assert soup.caption.text == "one"
    assert [cell.text for cell in soup.find_all("td")] == ["<b>hi</b>", "0.12"]
    assert pages[0] == pages[1]
    assert soup.table["id"] != BeautifulSoup(pages[2], "html.parser").table["id"]


def test_a_run_is_held_against_the_published_value(published):
    near = chapter.against_published("demo", {"drift": Interval(0.55, 0.4, 0.7, 10)}, tolerance=0.1)
    far = chapter.against_published("demo", {"drift": Interval(0.75, 0.6, 0.9, 10)}, tolerance=0.1)
    assert near.within
    assert not far.within
    with pytest.raises(ResultsError, match="publish demo"):
        chapter.against_published("demo", {"drfit": Interval(0.5, 0.4, 0.6, 10)}, tolerance=0.1)


def test_a_run_time_names_profile_cores_and_both_caches(published, shown):
    chapter.run_time("02-model")
    assert all(part in shown[0].data for part in ("laptop", "cores", "12 s", "200 s"))


def test_a_run_time_that_was_never_measured_is_said_to_be_missing(tmp_path, monkeypatch, shown):
    monkeypatch.setattr("tracealign_lib.results.results_folder", lambda: tmp_path)
    chapter.run_time("02-model")
    assert "not measured yet" in shown[0].data


def test_a_chapter_that_the_last_measurement_did_not_run_is_said_to_be_missing(published, shown):
    chapter.run_time("99-new")
    assert "not measured yet" in shown[0].data
