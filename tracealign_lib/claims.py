"""Every claim of the paper beside what this book measured, and a verdict that follows from a stated rule.

`data/claims.yml` says what is claimed, what would count as holding, and *where* our value stands: a results
file and keys into it. Values themselves are never typed: they are read from `data/results/` when the page is
made, with their interval, profile, seeds and hardware. `tracealign claims --write` makes book/claims.md.

Each value says what was measured, and on which prompts. A claim may have more values beside the one that
decides: another configuration, or another yardstick, with the status that would follow from it.

How a status follows. A value whose whole interval lies where the claim says is *reproduced at small scale*;
no more can be said of a tiny model in an invented world. If all of it lies elsewhere, a claim about what
the method does in general is *contradicted*: one world where it fails is enough. A number that was measured
on the paper's models is then only *not reproduced*, since it may well hold for them. An interval that
straddles the limit decides nothing, and counts as *not reproduced*. Where no value can answer, the status
is stated, with its reason.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tracealign_lib.errors import ResultsError, TraceAlignError
from tracealign_lib.experiments.common import verdict
from tracealign_lib.files import write_atomically
from tracealign_lib.results import Results, load_results, results_folder
from tracealign_lib.run import book_root
from tracealign_lib.stats import Interval, SeedSpread

REPRODUCED, SMALL_SCALE = "reproduced", "reproduced at small scale"
NOT_REPRODUCED, CONTRADICTED = "not reproduced", "contradicted"
NOT_TESTABLE, PENDING = "not testable here", "not measured yet"
SIGNS = {
    REPRODUCED: "✔✔",
    SMALL_SCALE: "✔",
    NOT_REPRODUCED: "–",
    CONTRADICTED: "✘",
    NOT_TESTABLE: "○",
    PENDING: "…",
}
"""Status -> its sign, in the order of the summary."""

SOURCES = ("abstract", "reader")
SCOPES = ("method", "measurement")
UNITS = ("percent", "points", "milliseconds", "nats", "count", "number")

_HEADER = """\
% Made by `tracealign claims --write` from data/claims.yml and data/results/. Do not edit.

# What became of each claim

"""


class ClaimsError(TraceAlignError, ValueError):
    """The ledger of claims is malformed, or it points at a value that no results file holds."""


@dataclass(frozen=True, slots=True)
class Beside:
    """A value that stands in the remark on a claim and does not decide.

    Attributes
    ----------
    measures, results, keys, unit:
        As for `Claim`; without a unit, the claim's.
    low, high:
        As for `Claim`. Without any, nothing would follow from this value.
    """

    measures: str
    results: str
    keys: tuple[str, ...]
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a model was asked, or what else a value was measured on.

    Attributes
    ----------
    name, what:
        How claims name it, and what it is.
    results, keys:
        Where the drift without a defence on these prompts stands; empty where there is none.
    """

    name: str
    what: str
    results: str = ""
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the paper, as `data/claims.yml` states it.

    Attributes
    ----------
    id, part, claim, reported:
        A name, the part of the paper, the claim in our words, and what is reported of it.
    source:
        "abstract" or "reader": how sure it is that the paper says so.
    measures, note:
        What our value is, and what has to be known to read it.
    results, keys, unit:
        Where our value stands: a file of data/results/ and the path of keys in its values; one of `UNITS`.
        Rates are stored as shares and shown in percent ("points" for a difference of rates).
    low, high:
        The claim holds between these, in the unit of the results file; infinite where it says nothing.
    configuration, prompts:
        Which defence, with which filter, or which model our value is about; and the name of its `Prompts`.
    beside:
        More values, which do not decide.
    scope:
        "method" for what the method is said to do in general, "measurement" for a number of the paper's runs.
    pending:
        The results file that will hold our value: while it is not there, the claim is not measured yet.
    status, reason:
        Stated, where it does not follow from a value.
    chapter, section:
        The notebook and the heading under which it is measured; without a heading, the whole chapter.
    """

    id: str
    part: str
    claim: str
    reported: str
    source: str
    measures: str = ""
    note: str = ""
    results: str = ""
    keys: tuple[str, ...] = ()
    unit: str = "percent"
    low: float = -math.inf
    high: float = math.inf
    configuration: str = ""
    prompts: str = ""
    beside: tuple[Beside, ...] = ()
    scope: str = "measurement"
    pending: str = ""
    status: str = ""
    reason: str = ""
    chapter: str = ""
    section: str = ""


class Other(NamedTuple):
    """A value beside the one that decides, and the status that would follow from it ("" where none would)."""

    beside: Beside
    value: Interval | SeedSpread
    status: str


class Finding(NamedTuple):
    """A claim with our value, where there is one, the results that hold it, its status, and other values."""

    claim: Claim
    value: Interval | SeedSpread | None
    results: Results | None
    status: str
    others: tuple[Other, ...] = ()


# --- the ledger ----------------------------------------------------------------------------------


class Ledger(NamedTuple):
    """The claims, in the order of the page, and the sets of prompts that they name."""

    claims: tuple[Claim, ...]
    prompts: tuple[Prompts, ...]


def load_claims(path: str | Path | None = None) -> tuple[Claim, ...]:
    """The claims of `load_ledger`."""
    return load_ledger(path).claims


def load_ledger(path: str | Path | None = None) -> Ledger:
    """Read the ledger; `data/claims.yml` of the book by default.

    Raises
    ------
    ClaimsError
        It is missing or no YAML, or a claim has an unknown or missing field, an unknown word in one, a
        doubled id, prompts that are not described, no way to a status, or more than one.
    """
    file = Path(path) if path is not None else book_root() / "data" / "claims.yml"
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
        described = [dict(record) for record in read.get("prompts", [])]
        records = [{**record, "part": part["part"]} for part in read["parts"] for record in part["claims"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ClaimsError(
            "The ledger of claims cannot be read.",
            given=f"{file.name}: {type(error).__name__}: {error}",
            expected="YAML: a list `parts`, each with a `part` and a list `claims`; a list `prompts`",
            mend="restore the file",
        ) from error
    prompts = tuple(Prompts(**_checked(Prompts, record, record.get("name"))) for record in described)
    claims = tuple(_claim(record) for record in records)
    _check_names([prompt.name for prompt in prompts], "a name that other prompts have")
    _check_names([claim.id for claim in claims], "an id that another claim has")
    for claim in claims:
        if claim.prompts and claim.prompts not in {prompt.name for prompt in prompts}:
            raise _malformed(claim.id, f"prompts: {claim.prompts!r}", "a name of the list `prompts`")
    return Ledger(claims, prompts)


def _check_names(names: Sequence[str], wrong: str) -> None:
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise _malformed(doubled[0], wrong, "each once")


def _claim(record: Mapping[str, Any]) -> Claim:
    name = record.get("id")
    given = _checked(Claim, record, name)
    besides = tuple(Beside(**_checked(Beside, part, name)) for part in given.pop("beside", ()))
    claim = Claim(**given, beside=besides)
    _check_claim(claim)
    return claim


_TYPES: Mapping[str, tuple[type, ...]] = {
    "keys": (list,),
    "beside": (list,),
    "low": (int, float),
    "high": (int, float),
}


def _checked(kind: type[Claim | Beside | Prompts], record: Any, name: Any) -> dict[str, Any]:
    """The fields of one record of the ledger, each known, of its type, and none missing; keys as text."""
    if not isinstance(record, Mapping):
        raise _malformed(str(name), f"{str(record)[:80]!r}", "fields and their values")
    known = {field.name: field.default is MISSING for field in fields(kind)}
    unknown = sorted(map(str, set(record) - set(known)))
    missing = sorted(field for field, needed in known.items() if needed and field not in record)
    if unknown or missing:
        given = f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
        raise _malformed(str(name), given, f"fields of {', '.join(sorted(known))}")
    for field, value in record.items():
        if not isinstance(value, _TYPES.get(field, (str,))) or isinstance(value, bool):
            raise _malformed(str(name), f"{field}: {value!r}", f"another type for {field}")
    return {f: tuple(map(str, value)) if f == "keys" else value for f, value in record.items()}


def _check_claim(claim: Claim) -> None:
    wrong = _malformed
    for field, allowed in (("source", SOURCES), ("unit", UNITS), ("scope", SCOPES)):
        if getattr(claim, field) not in allowed:
            raise wrong(
                claim.id, f"{field}: {getattr(claim, field)!r}", f"{field} one of {', '.join(allowed)}"
            )
    if claim.status and claim.status not in SIGNS:
        raise wrong(claim.id, f"status: {claim.status!r}", f"status one of {', '.join(SIGNS)}")
    limited = _limited(claim)
    ruled, stated = bool(claim.results) and limited, bool(claim.status)
    if ruled == stated and (ruled or not claim.pending or claim.results or limited):
        raise wrong(
            claim.id,
            f"results: {claim.results!r}, pending: {claim.pending!r}, status: {claim.status!r}",
            "one of: results with low or high; a status with its reason; nothing but pending",
        )
    if claim.pending and claim.results not in ("", claim.pending):
        raise wrong(claim.id, f"pending: {claim.pending!r}, results: {claim.results!r}", "one file for both")
    if bool(claim.status) != bool(claim.reason):
        raise wrong(claim.id, f"status: {claim.status!r}, reason: {claim.reason!r}", "both or neither")
    if bool(claim.results) != bool(claim.keys) or bool(claim.results) != bool(claim.measures):
        raise wrong(claim.id, f"results: {claim.results!r}", "results, keys and measures together")
    if bool(claim.results) != bool(claim.configuration) or bool(claim.results) != bool(claim.prompts):
        raise wrong(claim.id, f"configuration: {claim.configuration!r}, prompts: {claim.prompts!r}", _BOTH)
    for beside in claim.beside:
        if beside.unit not in ("", *UNITS) or not (claim.results and beside.results and beside.keys):
            expected = "results that decide, and beside them a place and a known unit"
            raise wrong(claim.id, f"beside: {beside}", expected)
    values: list[Claim | Beside] = [claim, *claim.beside]
    for value in values:
        if value.low > value.high:
            raise wrong(claim.id, f"low: {value.low}, high: {value.high}", "low <= high")


_BOTH = "what was measured and on what, where there are results, and nowhere else"


def _malformed(name: str, given: str, expected: str) -> ClaimsError:
    return ClaimsError(
        f"The claim {name!r} is malformed.",
        given=given,
        expected=expected,
        mend="correct it in data/claims.yml",
    )


# --- findings ------------------------------------------------------------------------------------

Load = Callable[[str], Results]


def find(claims: Sequence[Claim], *, results: str | Path | None = None) -> list[Finding]:
    """Look up the value of each claim and derive its status.

    Parameters
    ----------
    results:
        Folder of results files; `data/results` of the book by default.

    Raises
    ------
    ClaimsError
        A results file that a claim needs is missing, or does not hold the value.
    """
    folder, load = _results_in(results)
    return [_find(claim, folder, load) for claim in claims]


def _results_in(results: str | Path | None) -> tuple[Path, Load]:
    folder = Path(results) if results is not None else results_folder()
    return folder, cache(partial(load_results, path=folder))


def _find(claim: Claim, folder: Path, load: Load) -> Finding:
    if claim.pending and not (folder / f"{claim.pending}.json").is_file():
        return Finding(claim, None, None, PENDING)
    if not claim.results:
        return Finding(claim, None, None, claim.status or PENDING)
    value = _value(claim.id, claim, load)
    others = tuple(_other(claim, beside, load) for beside in claim.beside)
    return Finding(claim, value, load(claim.results), claim.status or derive_status(claim, value), others)


def _other(claim: Claim, beside: Beside, load: Load) -> Other:
    value = _value(claim.id, beside, load)
    if not _limited(beside):
        return Other(beside, value, "")
    return Other(beside, value, derive_status(replace(claim, low=beside.low, high=beside.high), value))


def _limited(place: Claim | Beside) -> bool:
    return math.isfinite(place.low) or math.isfinite(place.high)


def derive_status(claim: Claim, value: Interval | SeedSpread) -> str:
    """The status that follows from our value; see the module's first lines for the rule."""
    bounds = value if isinstance(value, Interval) else Interval(*value)
    held = verdict(bounds, claim.low, claim.high)
    if held == "held":
        return SMALL_SCALE
    return CONTRADICTED if held == "failed" and claim.scope == "method" else NOT_REPRODUCED


def summary(findings: Sequence[Finding]) -> dict[str, int]:
    """How many claims have each status, in the order of `SIGNS`; those without any are left out."""
    counts = Counter(finding.status for finding in findings)
    return {status: counts[status] for status in SIGNS if counts[status]}


Place = Claim | Beside | Prompts


def _value(name: str, place: Place, load: Load) -> Interval | SeedSpread:
    try:
        value: Any = load(place.results).values
    except ResultsError as error:
        raise _no_value(name, place, str(error)) from error
    for key in place.keys:
        if not isinstance(value, Mapping) or key not in value:
            raise _no_value(name, place, f"{key!r} is not in it")
        value = value[key]
    if isinstance(value, Interval):
        found: Interval | SeedSpread = value
    elif isinstance(value, Mapping) and value.keys() == set(SeedSpread._fields):
        found = SeedSpread.from_json(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = Interval(float(value), math.nan, math.nan, 1)
    else:
        raise _no_value(name, place, f"{str(value)[:80]!r} is not a number")
    if math.isnan(found[0]):
        raise _no_value(name, place, "it is undefined")
    return found


def _no_value(name: str, place: Place, found: str) -> ClaimsError:
    return ClaimsError(
        f"The value of {name!r} cannot be read.",
        given=f"{place.results}.json, {' / '.join(place.keys)}: {found}",
        expected="an interval, a range over seeds, or a number",
        mend=f"correct the keys in data/claims.yml, or run `tracealign publish {place.results}`",
    )


# --- the page ------------------------------------------------------------------------------------


def render(ledger: Ledger | None = None, *, results: str | Path | None = None) -> str:
    """The page book/claims.md as Markdown: the rule, a summary, a table for each part, and all sources.

    Errors are those of `load_ledger` and `find`.
    """
    chosen, prompts = load_ledger() if ledger is None else ledger
    folder, load = _results_in(results)
    findings = [_find(claim, folder, load) for claim in chosen]
    drifts = [_value(part.name, part, load) if part.results else None for part in prompts]
    numbers = {claim.id: number for number, claim in enumerate(chosen, 1)}
    parts = [
        f"## {part}\n\n{_part_table([f for f in findings if f.claim.part == part], numbers)}\n"
        for part in dict.fromkeys(claim.part for claim in chosen)
    ]
    places = [*_places(findings, numbers), *((p.name, p) for p in prompts if p.results)]
    asked = _PROMPTS + _prompt_table(prompts, drifts, findings, numbers)
    files = _file_table([load(name) for name in sorted({place.results for _, place in places})])
    sections = [_INTRODUCTION, _summary_table(findings), _RULE, asked, *parts, _place_table(places), files]
    return _HEADER + "\n".join(sections)


def write_page(path: str | Path | None = None) -> Path:
    """Write `render()` to book/claims.md, or another file, and return its path."""
    file = Path(path) if path is not None else book_root() / "book" / "claims.md"
    write_atomically(file, render())
    return file


def check_page(path: str | Path | None = None) -> None:
    """See that book/claims.md, or another file, is what `render()` gives.

    Raises
    ------
    ClaimsError
        It is missing, or differs: it was edited, or ledger or results have changed since.
    """
    file = Path(path) if path is not None else book_root() / "book" / "claims.md"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    fresh = render().splitlines()
    for number, (written, wanted) in enumerate(zip_longest(lines, fresh), 1):
        if written != wanted:
            raise ClaimsError(
                "The page of claims is not what the results files give.",
                given=f"{file.name}, line {number}: {written}",
                expected=str(wanted),
                mend="run `tracealign claims --write`",
            )


_INTRODUCTION = """\
Every claim of *TraceAlign* {cite}`tracealign` that we know of stands here beside what this book measured.
What is marked *abstract* the paper says there; what is marked *reader* is reported by readers of the full
text, which is the authority. None of our numbers is typed on this page: each is read from a file of
published results, which a test checks.

Each value says what it is of, the configuration that was measured and the prompts. Where the rule in
question has the filter $M(q) \\le 3$, the configuration *with* it decides, as it is reported; what comes out
without it stands in the remark. One training with the CBD loss stands for that loss in every row that
decides. A value in a remark never decides, but where it has a limit, the status that it would lead to is
said.

The book's model is tiny, its world is invented, and its drift is engineered. So the most that a number of
ours can say is that a claim was *reproduced at small scale*.
"""

_RULE = """\
## How a status follows

| our interval | a claim about the method | a number of the paper's own runs |
|---|---|---|
| all of it where the claim says | ✔ reproduced at small scale | ✔ reproduced at small scale |
| all of it elsewhere | ✘ contradicted | – not reproduced |
| on both sides of the limit | – not reproduced | – not reproduced |

What the method is said to do in general fails if it fails in one world; a number from a large model may be
right there and not here. Every limit stands beside its value. Where there is no interval, the value itself
decides. Where no value of ours can answer, the status is stated and its reason given: ✔✔ where a proof or
the program itself settles it, ○ where this book has no means to test it. The limits were fixed from what is
reported, in the direction that is kindest to the paper: *at most* what it reports of a cost, *at least* what
it reports of a gain.
"""


_PROMPTS = """\
## Which prompts

How often the undefended model drifts depends on what it is asked: on the attack, on how its requests are
worded, on how often an item was planted, and on whether alignment was about that item. So there is not one
share of drift without a defence but one for each set of prompts, and values are only compared within a set.
Rows about a defence share the main sample, where a row can. These are the published worlds; a run of a
reader's own is another world with yet another share.

"""


def _prompt_table(
    prompts: Sequence[Prompts],
    drifts: Sequence[Interval | SeedSpread | None],
    findings: Sequence[Finding],
    numbers: Mapping[str, int],
) -> str:
    rows = ["| prompts | what they are | drift without a defence | rows |", "|---|---|---|---|"]
    for part, drift in zip(prompts, drifts, strict=True):
        known = f"**{shown(drift, 'percent')}**" if drift is not None else "does not apply"
        about = [str(numbers[f.claim.id]) for f in findings if f.claim.prompts == part.name]
        rows.append(_row(part.name, part.what, known, ", ".join(about)))
    return "\n".join([*rows, ""])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _summary_table(findings: Sequence[Finding]) -> str:
    rows = [f"| {SIGNS[status]} | {status} | {count} |" for status, count in summary(findings).items()]
    table = "\n".join(["| | status | claims |", "|---|---|---|", *rows])
    return f"% summary starts\n\n{table}\n\n% summary ends\n"


def _part_table(findings: Sequence[Finding], numbers: Mapping[str, int]) -> str:
    rows = []
    for finding in findings:
        claim = finding.claim
        said = f"{claim.reported} *({claim.source})*"
        beside = [f"Beside it: {_said(claim, other)}." for other in finding.others]
        remark = " ".join(text for text in (claim.reason, claim.note, *beside) if text)
        status = f"{SIGNS[finding.status]} {finding.status}"
        rows.append(_row(str(numbers[claim.id]), claim.claim, said, _ours(finding), status, remark))
    return "\n".join(
        ["| no. | claim | reported | here | status | remark |", "|---|---|---|---|---|---|", *rows]
    )


def _said(claim: Claim, other: Other) -> str:
    place = replace(claim, unit=other.beside.unit or claim.unit, low=other.beside.low, high=other.beside.high)
    limits = f"; would hold {_limits(place)}: {SIGNS[other.status]} {other.status}" if other.status else ""
    return f"**{shown(other.value, place.unit)}** {other.beside.measures}{limits}"


def _ours(finding: Finding) -> str:
    claim = finding.claim
    if finding.value is None:
        waits = f" (waits for `{claim.pending}.json`)" if claim.pending else ""
        return f"no value{waits}{'' if finding.status == PENDING else _linked(claim)}"
    limits = "" if claim.status else f"; holds {_limits(claim)}"
    measured = f" *Measured: {claim.configuration}; {claim.prompts}*"
    return f"**{shown(finding.value, claim.unit)}** {claim.measures}{limits}.{measured}{_linked(claim)}"


def _linked(claim: Claim) -> str:
    if not claim.chapter:
        return ""
    number = claim.chapter.partition("-")[0].lstrip("0") or "0"
    anchor = f"#{slug(claim.section)}" if claim.section else ""
    return f" ([chapter {number}](../notebooks/{claim.chapter}.ipynb{anchor}))"


def slug(heading: str) -> str:
    """The anchor that MyST gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower().replace(" ", "-"))


def _limits(claim: Claim) -> str:
    low, high = (_number(bound, claim.unit) for bound in (claim.low, claim.high))
    unit = _SUFFIX[claim.unit]
    if math.isinf(claim.high):
        return f"from {low}{unit} up"
    if math.isinf(claim.low):
        return f"up to {high}{unit}"
    return f"from {low} to {high}{unit}"


_SUFFIX = {
    "percent": " %",
    "points": " points",
    "milliseconds": " ms",
    "nats": " nats",
    "count": "",
    "number": "",
}


_DECIMALS = {"milliseconds": 2, "nats": 2, "count": 0, "number": 3}


def _number(value: float, unit: str) -> str:
    """A value as text: with more decimals where it would read as none or as all, and is not quite that."""
    share = unit in ("percent", "points")
    number = (100 if share else 1) * value + 0.0  # + 0.0: minus zero is zero
    first = _DECIMALS.get(unit, 1)
    texts = [f"{number:.{decimals}f}" for decimals in range(first, first + 3)]
    ends = (0.0, 100.0) if share else (0.0,)
    close = any(float(texts[0]) == end and abs(number - end) > 1e-9 for end in ends)
    return next((t for t in texts if float(t) not in ends), texts[-1]) if close else texts[0]


def shown(value: Interval | SeedSpread, unit: str) -> str:
    """Our value as it stands on the page, rounded, with its interval or range and its size."""
    estimate, low, high = (_number(bound, unit) for bound in value[:3])
    if isinstance(value, SeedSpread):
        return f"{estimate}{_SUFFIX[unit]} ({low} to {high} over {value.seeds} seeds)"
    if math.isnan(value.low):
        return f"{estimate}{_SUFFIX[unit]} (no interval)"
    return f"{estimate}{_SUFFIX[unit]} [{low}, {high}], n = {value.n:,}"


def _places(findings: Sequence[Finding], numbers: Mapping[str, int]) -> list[tuple[str, Place]]:
    """Every value of the page with the number of its claim; those beside it follow the one that decides."""
    found: list[tuple[str, Place]] = []
    for finding in findings:
        number = str(numbers[finding.claim.id])
        if finding.value is not None:
            found.append((number, finding.claim))
            found += [(f"{number}, remark", other.beside) for other in finding.others]
    return found


def _place_table(places: Sequence[tuple[str, Place]]) -> str:
    rows = [
        _row(label, f"`{place.results}.json`", " → ".join(f"`{key}`" for key in place.keys))
        for label, place in places
    ]
    lines = ["## Where each value stands", "", "| no. | file of `data/results/` | keys below `values` |"]
    return "\n".join([*lines, "|---|---|---|", *rows, ""])


def _file_table(files: Sequence[Results]) -> str:
    rows = []
    for held in files:
        made = held.provenance
        seeds = ", ".join(map(str, held.seeds))
        hardware = f"{made['cpu']}, {made['cores']} cores, {made['memory']} GiB, {made['device'] or 'cpu'}"
        versions = made["versions"]
        libraries = ", ".join(
            f"{lib} {versions[lib]}" for lib in ("torch", "transformers") if lib in versions
        )
        rows.append(_row(f"`{held.name}.json`", held.profile, seeds, made["date"], hardware, libraries))
    lines = [
        "## What the values were measured with",
        "",
        "| file | profile | seeds | day | hardware | libraries |",
    ]
    return "\n".join([*lines, "|---|---|---|---|---|---|", *rows, ""])
