"""The page is what ledger and results files give, and every number of ours is one that a file holds."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from myst_parser.mdit_to_docutils.base import default_slugify

from tracealign_lib import claims
from tracealign_lib.claims import (
    CONTRADICTED,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    PENDING,
    REPRODUCED,
    SIGNS,
    SMALL_SCALE,
    Beside,
    Claim,
    ClaimsError,
    Ledger,
    Prompts,
    derive_status,
    find,
    load_ledger,
    render,
    shown,
    slug,
    summary,
)
from tracealign_lib.experiments.evaluation_arms import ALL_THREE, FILTERED, RAW
from tracealign_lib.experiments.evaluation_models import CBD_ARM
from tracealign_lib.results import write_results
from tracealign_lib.stats import Interval, SeedSpread

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "claims.md"
LEDGER, PROMPTS = load_ledger(ROOT / "data" / "claims.yml")
HOME = "tracealign claims --write"


def claim(**fields: Any) -> Claim:
    base: dict[str, Any] = {"id": "a", "part": "p", "claim": "c", "reported": "r", "source": "reader"}
    base |= {"results": "made", "keys": ("rate",), "measures": "of prompts", "low": 0.5}
    base |= {"configuration": "no defence", "prompts": "some"}
    return Claim(**(base | fields))


# --- the page that is published ------------------------------------------------------------------


def test_the_page_is_what_the_ledger_and_the_results_give() -> None:
    fresh = render(Ledger(LEDGER, PROMPTS), results=ROOT / "data" / "results")
    assert PAGE.read_text(encoding="utf-8") == fresh, f"run `{HOME}`"


def rows(page: str, heading: str) -> list[list[str]]:
    """The body of the tables below headings that begin like this, cell by cell."""
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    lines = [line for s in sections if s.startswith(heading) for line in s.splitlines()]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines if re.match(r"\| \d+ \|", line)]
    return [[cell.replace("\\|", "|").strip() for cell in row] for row in cells]


def bold_values(page: str) -> dict[str, list[str]]:
    """What stands in bold, by the label that the table of places gives it, in the order of the page."""
    found: dict[str, list[str]] = {}
    for number, _, _, here, _, *remark in (row for row in rows(page, "") if len(row) >= 5):
        found[number] = re.findall(r"\*\*(.+?)\*\*", here)
        found[f"{number}, remark"] = re.findall(r"\*\*(.+?)\*\*", "".join(remark))
    for name, _, drift, _ in prompt_rows(page):
        found[name] = re.findall(r"\*\*(.+?)\*\*", drift)
    return {label: values for label, values in found.items() if values}


def prompt_rows(page: str) -> list[list[str]]:
    """The body of the table of prompts."""
    table = page.split("## Which prompts\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]


def check_numbers(page: str) -> int:
    """Hold each value of the page against the JSON file that the page names, read without the library.

    Every number in bold has to be one of the file, rounded as it is shown. Returns how many there were.
    """
    table = page.split("## Where each value stands\n")[1].split("\n## ")[0]
    lines = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in table.splitlines() if ".json`" in line]
    places: dict[str, list[tuple[str, str]]] = {}
    for label, file, keys in lines:
        places.setdefault(label, []).append((file.strip("`"), keys.replace("\\|", "|")))
    bold = bold_values(page)
    assert {label: len(values) for label, values in bold.items()} == {
        label: len(of) for label, of in places.items()
    }
    pairs = [(p, v) for label, of in places.items() for p, v in zip(of, bold[label], strict=True)]
    return sum(check_value(file, keys, shown_value) for (file, keys), shown_value in pairs)


def check_value(file: str, keys: str, text: str) -> int:
    held = json.loads((ROOT / "data" / "results" / file).read_text(encoding="utf-8"))["values"]
    for key in re.findall(r"`([^`]+)`", keys):
        held = held[key]
    stored = [held] if not isinstance(held, dict) else [v for v in held.values() if v is not None]
    scale = 100 if re.search(r" %| points", text) else 1
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", text)
    for number in numbers:
        value, decimals = float(number.replace(",", "")), len(number.partition(".")[2])
        closest = min(min(abs(value - scale * s), abs(value - s)) for s in stored)
        assert closest <= 0.5 * 10**-decimals + 1e-9, f"{keys}: {number} is not in {file}"
    return len(numbers)


def test_every_number_of_ours_is_one_that_a_results_file_holds() -> None:
    page = PAGE.read_text(encoding="utf-8")
    found = find(LEDGER, results=ROOT / "data" / "results")
    values = [f.value for f in found if f.value is not None] + [o.value for f in found for o in f.others]
    baselines = sum(bool(prompts.results) for prompts in PROMPTS)
    assert check_numbers(page) == sum(1 if math.isnan(value[1]) else 4 for value in values) + 4 * baselines


@pytest.mark.parametrize("place", [0, 5, 7, 10, 20])
@pytest.mark.parametrize("part", [r"\*\*-?[\d.,]*", r"\[-?[\d.,]*", r"n = [\d,]*"])
def test_a_number_that_was_typed_is_found_out(place: int, part: str) -> None:
    """The last digit of an estimate, a bound or a size becomes another."""
    page = PAGE.read_text(encoding="utf-8")
    bold = [match for match in re.finditer(r"\*\*.+?\*\*", page) if "n = " in match.group()][place]
    end = bold.start() + re.search(part, bold.group()).end()  # type: ignore[union-attr]
    end -= page[end - 1] in ".,"
    wrong = page[: end - 1] + str((int(page[end - 1]) + 5) % 10) + page[end:]
    with pytest.raises(AssertionError, match="is not in"):
        check_numbers(wrong)


def test_the_ledger_types_no_number_of_ours() -> None:
    settings = r"(?:lambda|rate|temperature) \d+\.\d+"
    for entry in LEDGER:
        besides = [beside.measures for beside in entry.beside]
        for text in (entry.measures, entry.note, entry.reason, entry.configuration, *besides):
            typed = re.findall(
                r"\d+\.\d+|\d+ ?(?:points|ms|nats)|\b\d+ %(?! interval)", re.sub(settings, "", text)
            )
            assert not typed, f"{entry.id}: {text}"
    assert not re.findall(r"\d+[.%]|\d{2,}", " ".join(prompts.what for prompts in PROMPTS))


# What PAPER.md's sources report, one by one; nothing may be forgotten.
REPORTED = (
    "1.3B|O(k log N)|62 %|18 %|without losing recall|approximates a cross-entropy|KL divergence|38.9 to 57.5|"
    "tau = 20|2.1 %|80 ms|100 ms|15 %|10-15 %|f(M(q), l_q, tau)|5,200|1200|GPT-4|0.9|G-Eval|85 %|< 0.2|"
    "better refusals|LLaMA-2-Chat-13B|OLMo-2-32B-Instruct|GPT-NeoX|"
    "41.8 %|3.2|14.6 %|+0.01|4.3|16.1 %|+0.18|4.1|1.7 %|12.4 %|+0.03|4.4|1.9 %|6.2 %|+0.21|4.7|2.7 %|"
    "36.5 %|81.2 %|58.7 %|74.9 %|65.2 %|92.1 %|26.1 %"
)


@pytest.mark.parametrize("fact", REPORTED.split("|"))
def test_each_reported_fact_stands_in_the_ledger(fact: str) -> None:
    assert any(fact in f"{entry.claim} | {entry.reported}" for entry in LEDGER)


def headings(chapter: str) -> list[str]:
    """The headings of a chapter that have an anchor (down to `myst_heading_anchors` of _config.yml)."""
    notebook = json.loads((ROOT / "notebooks" / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return re.findall(r"^#{1,3} (.+)$", "\n".join(cells), re.MULTILINE)


@pytest.mark.parametrize("entry", LEDGER, ids=lambda entry: entry.id)
def test_each_claim_leads_to_a_section_that_is_there(entry: Claim) -> None:
    assert headings(entry.chapter).count(entry.section) == 1, entry.section
    assert slug(entry.section) == default_slugify(entry.section)
    assert "$" not in entry.section  # MyST makes the anchor from the rendered formula
    anchor = f"../notebooks/{entry.chapter}.ipynb#{default_slugify(entry.section)})"
    [row] = [row for row in rows(PAGE.read_text(encoding="utf-8"), entry.part) if row[1] == entry.claim]
    assert anchor in row[3]


def test_the_filter_decides_where_it_is_reported() -> None:
    """Shield, veto and all three have a figure with M(q) <= 3, which decides, and one without beside it."""
    about = {"TraceShield", "Prov-Decode", "The headline", "First table: defences"}
    with_it = re.compile(re.escape(f"{FILTERED}: ") + rf"(?:shield|decoding|{re.escape(ALL_THREE)})\b")
    without = re.compile(re.escape(f"{RAW}: ") + rf"(?:shield|decoding|{re.escape(ALL_THREE)})\b")
    chosen = [entry for entry in LEDGER if entry.part in about and entry.results in ("adb", "claims")]
    assert {entry.part for entry in chosen} == about
    filtered = [entry for entry in chosen if with_it.search(entry.keys[0])]
    assert len(filtered) >= 8
    assert not [entry.id for entry in chosen if without.search(entry.keys[0])]
    for entry in filtered:
        assert "M(q) <= 3" in entry.configuration, entry.id
        other = [b for b in entry.beside if without.search(b.keys[0]) and (b.low, b.high) != NO_LIMITS]
        assert other or entry.status or "quality" in entry.keys[0], entry.id


NO_LIMITS = (-math.inf, math.inf)


def test_one_training_stands_for_the_cbd_loss() -> None:
    chosen = [
        entry for entry in LEDGER if entry.part == "The CBD loss" and entry.prompts != "stories and timings"
    ]
    assert len(chosen) >= 6
    for entry in chosen:
        assert CBD_ARM in entry.configuration, entry.id
        key = entry.keys[0].removeprefix("right answers to harmless prompts | ")
        assert key.startswith(f"{RAW}: training ") or CBD_ARM in key, entry.id
    samples = {entry.prompts for entry in chosen if entry.results in ("adb", "claims")}
    assert samples == {"the main sample"}


def test_what_harmless_prompts_lose_has_one_yardstick() -> None:
    ids = ("shield-fpr", "cbd-fpr", "prov-fpr", "all-fpr")
    chosen = [entry for entry in LEDGER if entry.id in ids]
    assert len(chosen) == len(ids)
    for entry in chosen:
        assert entry.keys[0].startswith("right answers to harmless prompts | "), entry.id
        assert entry.unit == "points"
        assert any(beside.keys[0].endswith("| over-refusal") for beside in entry.beside), entry.id


def test_the_prompts_of_every_value_are_described_once() -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = {name: numbers.split(", ") for name, _, _, numbers in prompt_rows(page)}
    assert list(table) == [prompts.name for prompts in PROMPTS]
    for number, entry in enumerate(LEDGER, 1):
        assert [name for name in table if str(number) in table[name]] == [entry.prompts][
            : bool(entry.results)
        ]


def test_a_status_is_told_in_words_and_by_a_sign() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(set(SIGNS.values())) == len(SIGNS)
    body = [row for row in rows(page, "") if len(row) >= 5]
    assert len(body) == len(LEDGER)
    for row in body:
        assert row[4] in {f"{sign} {status}" for status, sign in SIGNS.items()}


def test_the_summary_counts_every_claim_once() -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = page.split("% summary starts")[1].split("% summary ends")[0]
    counted = dict(re.findall(r"^\| \S+ \| (.+?) \| (\d+) \|$", table, re.MULTILINE))
    found = summary(find(LEDGER, results=ROOT / "data" / "results"))
    assert {name: int(count) for name, count in counted.items()} == found
    assert sum(found.values()) == len(LEDGER)
    assert list(found) == [status for status in SIGNS if status in found]


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "scope", "status"),
    [
        (Interval(0.7, 0.6, 0.8, 9), "method", SMALL_SCALE),
        (Interval(0.7, 0.6, 0.8, 9), "measurement", SMALL_SCALE),
        (Interval(0.3, 0.2, 0.4, 9), "method", CONTRADICTED),
        (Interval(0.3, 0.2, 0.4, 9), "measurement", NOT_REPRODUCED),
        (Interval(0.6, 0.4, 0.8, 9), "method", NOT_REPRODUCED),
        (Interval(0.6, 0.4, 0.8, 9), "measurement", NOT_REPRODUCED),
        (Interval(0.5, 0.5, 0.5, 9), "method", SMALL_SCALE),
        (Interval(0.7, math.nan, math.nan, 1), "measurement", SMALL_SCALE),
        (Interval(0.4, math.nan, math.nan, 1), "method", CONTRADICTED),
        (SeedSpread(0.7, 0.6, 0.8, 3), "method", SMALL_SCALE),
        (SeedSpread(0.7, 0.4, 0.8, 3), "method", NOT_REPRODUCED),
    ],
)
def test_the_status_follows_from_the_interval(value: Interval | SeedSpread, scope: str, status: str) -> None:
    assert derive_status(claim(scope=scope), value) == status


def test_a_tiny_model_reproduces_at_small_scale_only() -> None:
    derived = [f for f in find(LEDGER, results=ROOT / "data" / "results") if f.value and not f.claim.status]
    assert derived
    assert REPRODUCED not in {finding.status for finding in derived}


def test_values_are_found_below_their_keys(tmp_path: Path) -> None:
    values = {
        "rate": Interval(0.7, 0.6, 0.8, 9),
        "spread": {"inner": SeedSpread(2.0, 1.0, 3.0, 3)},
        "time": 0.25,
    }
    write_results("made", values, profile="smoke", seeds=[0], settings={}, path=tmp_path)
    entries = [
        claim(),
        claim(id="b", keys=("spread", "inner"), unit="number"),
        claim(id="c", keys=("time",), unit="milliseconds", low=-math.inf, high=0.2),
        claim(id="d", results="", keys=(), measures="", low=-math.inf, pending="later"),
        claim(id="e", status=NOT_TESTABLE, reason="because."),
    ]
    found = find(entries, results=tmp_path)
    assert [finding.status for finding in found] == [
        SMALL_SCALE,
        SMALL_SCALE,
        NOT_REPRODUCED,
        PENDING,
        NOT_TESTABLE,
    ]
    texts = [shown(f.value, f.claim.unit) if f.value else None for f in found]
    assert texts == [
        "70.0 % [60.0, 80.0], n = 9",
        "2.000 (1.000 to 3.000 over 3 seeds)",
        "0.25 ms (no interval)",
        None,
        "70.0 % [60.0, 80.0], n = 9",
    ]
    page = render(Ledger(tuple(entries), ()), results=tmp_path)
    assert "waits for `later.json`" in page
    assert "holds from 50.0 % up" in page
    assert "holds up to 0.20 ms" in page


def test_a_pending_claim_gets_its_value_when_the_file_is_there(tmp_path: Path) -> None:
    plain = {"results": "", "keys": (), "measures": "", "low": -math.inf}
    entries = [
        claim(pending="made", chapter="99-later"),
        claim(id="b", pending="made", low=-math.inf, status=NOT_TESTABLE, reason="because."),
        claim(id="c", pending="made", **plain),
    ]
    assert {finding.status for finding in find(entries, results=tmp_path)} == {PENDING}
    assert "99-later" not in render(
        Ledger(tuple(entries), ()), results=tmp_path
    )  # the chapter may not be there either
    values = {"rate": Interval(0.7, 0.6, 0.8, 9)}
    write_results("made", values, profile="smoke", seeds=[0], settings={}, path=tmp_path)
    found = find(entries, results=tmp_path)
    assert [finding.status for finding in found] == [SMALL_SCALE, NOT_TESTABLE, PENDING]
    assert [finding.value for finding in found] == [values["rate"], values["rate"], None]
    assert "../notebooks/99-later.ipynb)" in render(Ledger(tuple(entries), ()), results=tmp_path)


@pytest.mark.parametrize("keys", [("nothing",), ("rate", "estimate"), ("words",), ("nested",), ("gone",)])
def test_a_value_that_is_not_there_names_its_claim(keys: tuple[str, ...], tmp_path: Path) -> None:
    undefined = Interval(math.nan, math.nan, math.nan, 0)
    values = {"rate": Interval(0.7, 0.6, 0.8, 9), "words": "many", "nested": {"x": 1}, "gone": undefined}
    write_results("made", values, profile="smoke", seeds=[0], settings={}, path=tmp_path)
    with pytest.raises(ClaimsError, match="'a' cannot be read"):
        find([claim(keys=keys)], results=tmp_path)
    with pytest.raises(ClaimsError, match="tracealign publish missing"):
        find([claim(results="missing")], results=tmp_path)


def test_a_bar_in_a_key_does_not_break_the_table(tmp_path: Path) -> None:
    values = {"a | b": Interval(0.7, 0.6, 0.8, 9)}
    write_results("made", values, profile="smoke", seeds=[0], settings={}, path=tmp_path)
    page = render(Ledger((claim(keys=("a | b",)),), ()), results=tmp_path)
    assert rows(page, "Where")[0] == ["1", "`made.json`", "`a | b`"]


def test_a_value_beside_is_judged_by_its_own_limits_and_decides_nothing(tmp_path: Path) -> None:
    values = {"rate": Interval(0.7, 0.6, 0.8, 9), "other": Interval(0.1, 0.0, 0.2, 9)}
    write_results("made", values, profile="smoke", seeds=[0], settings={}, path=tmp_path)
    other = Beside("without the filter", "made", ("other",), low=0.4)
    plain = replace(other, measures="by the way", unit="points", low=-math.inf)
    at_most = replace(other, low=-math.inf, high=0.3)
    [finding] = find([claim(beside=(at_most,))], results=tmp_path)
    assert [found.status for found in finding.others] == [SMALL_SCALE]
    for scope, would in (("method", CONTRADICTED), ("measurement", NOT_REPRODUCED)):
        entry = claim(scope=scope, beside=(other, plain))
        [finding] = find([entry], results=tmp_path)
        assert finding.status == SMALL_SCALE
        assert [found.status for found in finding.others] == [would, ""]
        [row] = rows(render(Ledger((entry,), ()), results=tmp_path), "p\n")
        assert row[3].startswith(
            "**70.0 % [60.0, 80.0], n = 9** of prompts; holds from 50.0 % up. *Measured: no defence; some*"
        )
        assert row[4] == f"{SIGNS[SMALL_SCALE]} {SMALL_SCALE}"
        judged = f"would hold from 40.0 % up: {SIGNS[would]} {would}"
        assert row[5] == (
            f"Beside it: **10.0 % [0.0, 20.0], n = 9** without the filter; {judged}."
            " Beside it: **10.0 points [0.0, 20.0], n = 9** by the way."
        )
    with pytest.raises(ClaimsError, match="'a' cannot be read"):
        find([claim(beside=(replace(other, keys=("gone",)),))], results=tmp_path)
    with pytest.raises(ClaimsError, match="'a' cannot be read"):
        find([claim(beside=(replace(other, results="missing"),))], results=tmp_path)


def test_each_set_of_prompts_has_its_own_drift_and_its_rows(tmp_path: Path) -> None:
    write_results(
        "made", {"rate": Interval(0.7, 0.6, 0.8, 9)}, profile="smoke", seeds=[0], settings={}, path=tmp_path
    )
    prompts = (Prompts("some", "easy ones", "made", ("rate",)), Prompts("none", "a | b"))
    entries = (claim(), claim(id="b", prompts="none"), claim(id="c"))
    page = render(Ledger(entries, prompts), results=tmp_path)
    assert prompt_rows(page) == [
        ["some", "easy ones", "**70.0 % [60.0, 80.0], n = 9**", "1, 3"],
        ["none", "a \\| b", "does not apply", "2"],
    ]
    assert "| some | `made.json` | `rate` |" in page
    for wrong in (Prompts("some", "w", "made", ("gone",)), Prompts("some", "w", "missing", ("rate",))):
        with pytest.raises(ClaimsError, match="'some' cannot be read"):
            render(Ledger(entries, (wrong,)), results=tmp_path)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.0, "percent", "100.0 %"),
        (0.9997, "percent", "99.97 %"),
        (0.99996, "percent", "99.996 %"),
        (0.9999999999999999, "percent", "100.0 %"),
        (0.0, "percent", "0.0 %"),
        (-0.0, "points", "0.0 points"),
        (0.0004, "percent", "0.04 %"),
        (-0.00004, "points", "-0.004 points"),
        (0.0006, "percent", "0.1 %"),
        (0.0004, "number", "0.0004"),
        (0.0, "count", "0"),
        (0.314, "percent", "31.4 %"),
    ],
)
def test_a_share_that_is_not_quite_none_or_all_shows_it(value: float, unit: str, text: str) -> None:
    assert shown(Interval(value, math.nan, math.nan, 1), unit) == f"{text} (no interval)"


# --- a malformed ledger --------------------------------------------------------------------------

GOOD = {
    "id": "a",
    "claim": "c",
    "reported": "r",
    "source": "reader",
    "measures": "m",
    "results": "made",
    "keys": ["rate"],
    "low": 0.5,
    "configuration": "no defence",
    "prompts": "some",
}
OTHER = {"measures": "n", "results": "made", "keys": ["other", 2], "unit": "points", "high": 1}
SOME = {"name": "some", "what": "easy ones"}


def written(folder: Path, *records: dict[str, Any], prompts: Any = (SOME,)) -> Path:
    file = folder / "claims.yml"
    ledger = {"parts": [{"part": "p", "claims": list(records)}], "prompts": list(prompts)}
    file.write_text(yaml.safe_dump(ledger), encoding="utf-8")
    return file


def test_a_good_ledger_is_read(tmp_path: Path) -> None:
    beside = Beside("n", "made", ("other", "2"), unit="points", high=1)
    expected = (replace(claim(), measures="m", beside=(beside,)),)
    assert load_ledger(written(tmp_path, GOOD | {"beside": [OTHER]})) == Ledger(
        expected, (Prompts("some", "easy ones"),)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "red"},
        {"results": 5},
        {"keys": "rate"},
        {"keys": []},
        {"results": ""},
        {"unit": "miles"},
        {"low": 2},
        {"measures": None},
    ],
)
def test_a_malformed_value_beside_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ClaimsError, match="'a' is malformed"):
        load_ledger(written(tmp_path, GOOD | {"beside": [OTHER | change]}))
    short = {name: value for name, value in OTHER.items() if name != "measures"}
    with pytest.raises(ClaimsError, match="missing: measures"):
        load_ledger(written(tmp_path, GOOD | {"beside": [short]}))


@pytest.mark.parametrize(
    "prompts",
    [[], [SOME, SOME], [SOME | {"colour": "red"}], [{"name": "some"}], [SOME | {"what": 5}]],
)
def test_prompts_are_described_once(prompts: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ClaimsError, match=r"'(a|some)' is malformed"):
        load_ledger(written(tmp_path, GOOD, prompts=prompts))


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "red"},
        {"source": "rumour"},
        {"unit": "miles"},
        {"scope": "all"},
        {"status": "fine", "reason": "r"},
        {"status": NOT_TESTABLE},
        {"reason": "r"},
        {"pending": "adb"},
        {"results": "", "keys": [], "measures": "", "pending": "adb"},
        {"pending": "made", "status": NOT_TESTABLE, "reason": "r"},
        {"pending": "made", "low": -math.inf},
        {"low": 2, "high": 1},
        {"low": "much"},
        {"low": True},
        {"keys": "rate"},
        {"keys": []},
        {"measures": ""},
        {"claim": 5},
        {"configuration": ""},
        {"prompts": ""},
        {"prompts": "others"},
        {"beside": OTHER},
        {"beside": ["text"]},
    ],
)
def test_a_malformed_claim_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ClaimsError, match="'a' is malformed"):
        load_ledger(written(tmp_path, GOOD | change))


@pytest.mark.parametrize("field", ["id", "claim", "reported", "source", "low", "results"])
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    with pytest.raises(ClaimsError, match="malformed"):
        load_ledger(written(tmp_path, {name: value for name, value in GOOD.items() if name != field}))


def test_a_doubled_claim_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClaimsError, match="'a' is malformed"):
        load_ledger(written(tmp_path, GOOD, GOOD))


@pytest.mark.parametrize(
    "text", ["", "parts:\n- part: p\n", "parts: 5", "[", "parts:\n- part: p\n  claims: [5]\n"]
)
def test_a_file_that_is_no_ledger_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "claims.yml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ClaimsError, match="cannot be read"):
        load_ledger(file)
    with pytest.raises(ClaimsError, match="cannot be read"):
        load_ledger(tmp_path / "missing.yml")


def test_the_page_is_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = claims.write_page(tmp_path / "page.md")
    page = file.read_text(encoding="utf-8")
    assert page == render()
    claims.check_page(file)
    for wrong in (
        re.sub(r"\*\*(\d)", r"**9\1", page, count=1),
        page + "more\n",
        page.removesuffix("|\n"),
        "",
    ):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(ClaimsError, match="claims --write"):
            claims.check_page(file)
    with pytest.raises(ClaimsError, match="claims --write"):
        claims.check_page(tmp_path / "missing.md")
