"""Published numbers: what is written, what is refused, and how a comparison reads."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib import results
from tracealign_lib.errors import ParameterError, ResultsError
from tracealign_lib.results import Results, compare, load_results, write_results
from tracealign_lib.stats import Interval, wilson

DRIFT = Interval(0.54, 0.48, 0.6, 377)


def write(folder: Path, **values: Any) -> Path:
    return write_results(
        "model",
        values or {"drift": DRIFT, "items": 100},
        profile="full",
        seeds=(0, 1, 2),
        settings={"world": {"unsafe": 50}},
        device="cpu",
        seconds=12.34,
        path=folder,
    )


def test_written_results_come_back(tmp_path: Path) -> None:
    table = [{"copies": 1, "recall": wilson(3, 10)}, {"copies": 2, "recall": wilson(7, 10)}]
    path = write(tmp_path, drift=DRIFT, items=100, table=table, note="greedy")
    assert path == tmp_path / "model.json"
    loaded = load_results("model", path=tmp_path)
    assert loaded["drift"] == DRIFT
    assert isinstance(loaded["drift"], Interval)
    assert loaded["table"] == table
    assert (loaded["items"], loaded["note"]) == (100, "greedy")
    assert (loaded.profile, loaded.seeds, loaded.settings) == ("full", (0, 1, 2), {"world": {"unsafe": 50}})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.json"]


def test_provenance_says_when_with_what_and_on_what(tmp_path: Path) -> None:
    record = json.loads(write(tmp_path).read_text())
    assert set(record) == {"format", "name", "profile", "seeds", "values", "settings", "provenance"}
    found = record["provenance"]
    assert {"torch", "transformers", "trl", "tracealign"} <= set(found["versions"])
    assert found["python"] == platform.python_version()
    assert len(found["date"]) == len("2026-01-31")
    assert (found["device"], found["seconds"]) == ("cpu", 12.3)
    assert found["cores"] >= 1
    assert found["memory"] > 0


def test_the_file_holds_no_path_and_no_name_of_the_machine(tmp_path: Path) -> None:
    text = write(tmp_path).read_text()
    for private in (platform.node(), str(Path.home()), str(Path.cwd()), str(tmp_path)):
        assert private not in text


@pytest.mark.parametrize(
    "private",
    ["/data/model", r"C:\models\x", f"loaded from {Path.home()}/x", f"in {Path.cwd()}/x", "on workstation-7"],
)
def test_a_private_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: str) -> None:
    monkeypatch.setattr(platform, "node", lambda: "workstation-7")
    for values in ({"note": private}, {private: 1}, {"rows": [{"model": private}]}):
        with pytest.raises(ResultsError, match="path or the name of this machine"):
            write(tmp_path, **values)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("harmless", ["news/0031.txt", "a / b", "EleutherAI/pythia-70m", "workstation-77"])
def test_relative_names_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harmless: str) -> None:
    monkeypatch.setattr(platform, "node", lambda: "workstation-7")
    write(tmp_path, note=harmless)
    assert load_results("model", path=tmp_path)["note"] == harmless


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        object(),
        {"estimate": 0.5},
        {"estimate": 0.5, "low": 0.7, "high": 0.6, "n": 3},
        {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": -1},
        {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": "many"},
        [{"deep": {"estimate": "high", "low": 0.4, "high": 0.6, "n": 3}}],
    ],
)
def test_values_that_are_no_results_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ResultsError):
        write(tmp_path, bad=value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../x", "A", "a.b"])
def test_malformed_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ResultsError, match="name of results"):
        write_results(name, {}, profile="full", seeds=(0,), settings={}, path=tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(tmp_path).read_text()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ResultsError, match="No space left"):
        write(tmp_path, drift=Interval(0.1, 0.0, 0.2, 10))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.json"]
    assert (tmp_path / "model.json").read_text() == before


def set_field(**change: Any) -> Callable[[dict[str, Any]], object]:
    return lambda record: record.update(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field(format=2), "format 2"),
        (lambda record: record.pop("format"), "format None"),
        (lambda record: record.pop("values"), "'values'"),
        (set_field(provenance=None), "'provenance'"),
        (set_field(profile=3), "'profile'"),
        (set_field(seeds="012"), "'seeds'"),
        (set_field(seeds=["0"]), "seeds"),
        (set_field(name="other"), "'other'"),
        (set_field(values={"drift": {"estimate": 1}}), "drift"),
        (set_field(values={"drift": {"estimate": 1, "low": 3, "high": 2, "n": 4}}), "drift"),
    ],
)
def test_a_malformed_file_is_named_with_its_fault_and_its_mend(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = write(tmp_path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ResultsError) as caught:
        load_results("model", path=tmp_path)
    for part in (str(path), message, "`tracealign publish model`"):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_missing_or_broken_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultsError) as caught:
        load_results("model", path=tmp_path)
    assert str(path) in str(caught.value)
    assert "`tracealign publish model`" in str(caught.value)


def test_the_default_folder_is_that_of_the_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_toc.yml").write_text("root: a\n")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    path = write_results("model", {"x": 1}, profile="full", seeds=(0,), settings={})
    assert path == tmp_path / "data" / "results" / "model.json"
    assert load_results("model")["x"] == 1


# --- comparison


def published(**values: Any) -> Results:
    provenance = {"date": "2026-01-31", "cpu": "A <CPU>", "device": "cpu"}
    return Results("model", "full", (0, 1), values, {}, provenance)


def test_a_comparison_marks_what_lies_outside_by_a_word() -> None:
    table = compare(
        published(drift=DRIFT, refused=0.99, other=1),
        {"drift": Interval(0.6, 0.4, 0.8, 40), "refused": 0.8},
        tolerance={"drift": 0.1, "refused": 0.05},
    )
    assert [(row.headline, row.within) for row in table.rows] == [("drift", True), ("refused", False)]
    assert not table.within
    lines = table.text().splitlines()
    assert (
        lines[1].split()
        == "drift 0.540 [0.480, 0.600], n = 377 0.600 [0.400, 0.800], n = 40 ± 0.100 within".split()
    )
    assert lines[2].split() == "refused 0.990 0.800 ± 0.050 OUTSIDE".split()
    assert "profile full, seeds 0, 1, 2026-01-31" in lines[-1]


def test_the_html_of_a_comparison_is_escaped_and_complete() -> None:
    page = BeautifulSoup(
        compare(published(**{"<b>": DRIFT}), {"<b>": 0.9}, tolerance=0.1)._repr_html_(), "html.parser"
    )
    assert [cell.text for cell in page.find_all("th")][-1] == "<b>"
    cells = [cell.text for cell in page.find_all("td")]
    assert cells == ["0.540 [0.480, 0.600], n = 377", "0.900", "± 0.100", "OUTSIDE"]
    assert [caption.text.count("A <CPU>") for caption in page.find_all("caption")] == [1]
    assert page.find("b") is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    theirs=st.floats(-1e3, 1e3), ours=st.floats(-1e3, 1e3), tolerance=st.floats(0, 1e3, allow_subnormal=False)
)
def test_within_is_about_the_distance_of_the_estimates(theirs: float, ours: float, tolerance: float) -> None:
    row = compare(published(x=theirs), {"x": ours}, tolerance=tolerance).rows[0]
    mirrored = compare(published(x=ours), {"x": theirs}, tolerance=tolerance).rows[0]
    assert row.within == mirrored.within
    if abs(abs(ours - theirs) - tolerance) > 1e-9:
        assert row.within == (abs(ours - theirs) < tolerance)
    assert compare(published(x=theirs), {"x": theirs}, tolerance=0).within


def test_the_edge_of_the_tolerance_is_within_in_spite_of_rounding() -> None:
    assert compare(published(x=0.3), {"x": 0.1 + 0.3}, tolerance=0.1).within


def test_a_headline_that_could_not_be_measured_is_outside() -> None:
    undefined = Interval(math.nan, math.nan, math.nan, 0)
    table = compare(published(drift=DRIFT), {"drift": undefined}, tolerance=10)
    assert not table.within
    assert "undefined" in table.text()


def test_wrong_comparisons_are_named() -> None:
    with pytest.raises(ResultsError, match="tracealign publish model"):
        compare(published(drift=DRIFT), {"drfit": 0.5}, tolerance=0.1)
    with pytest.raises(ResultsError, match="not a single value"):
        compare(published(table=[1, 2]), {"table": 0.5}, tolerance=0.1)
    unusable: list[float | dict[str, float]] = [{}, -0.1, math.nan]
    for tolerance in unusable:
        with pytest.raises(ParameterError, match="no usable tolerance"):
            compare(published(drift=DRIFT), {"drift": 0.5}, tolerance=tolerance)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.12345, "0.123"), (123.456, "123.5"), (12345.6, "12,346"), (math.nan, "undefined")]
)
def test_numbers_are_rounded_for_reading(value: float, shown: str) -> None:
    assert results._number(value) == shown
