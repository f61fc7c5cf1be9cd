"""Published numbers with their provenance, and how a reader's run compares with them.

A headline stands twice on a page: as it was published (profile `full`, several seeds, with its
interval) and as the run at hand has just measured it. The published ones live in
`data/results/<name>.json`, next to the day, the versions and the kind of machine that made them; a
file never holds a path or the name of a machine. `tracealign publish NAME` measures them again.
"""

from __future__ import annotations

import html
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import psutil

from tracealign_lib import __version__
from tracealign_lib.errors import ParameterError, ResultsError
from tracealign_lib.files import write_atomically
from tracealign_lib.run import book_root
from tracealign_lib.stages import library_versions
from tracealign_lib.stats import Interval

FORMAT_VERSION = 1

_INTERVAL = frozenset(Interval._fields)
_FIELDS: dict[str, type] = {
    "name": str,
    "profile": str,
    "seeds": list,
    "values": dict,
    "settings": dict,
    "provenance": dict,
}


@dataclass(frozen=True)
class Results:
    """One published file.

    Attributes
    ----------
    values:
        Headline -> `Interval`, plain number, or a table (lists and mappings of these).
    provenance:
        date (UTC day), versions, machine, cpu, cores, memory (GiB), device, seconds.
    """

    name: str
    profile: str
    seeds: tuple[int, ...]
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def __getitem__(self, headline: str) -> Any:
        """The value of a headline; `ResultsError` if the file does not hold it."""
        if headline not in self.values:
            raise ResultsError(
                f"The published results {self.name} do not hold this value.",
                given=headline,
                expected=f"one of {', '.join(sorted(self.values))}",
                mend=f"run `tracealign publish {self.name}`, or check the spelling",
            )
        return self.values[headline]


class Row(NamedTuple):
    """One headline, published and measured; `within` compares the two estimates."""

    headline: str
    published: Interval
    measured: Interval
    tolerance: float
    within: bool


@dataclass(frozen=True)
class Comparison:
    """Published and measured values side by side; displays itself as a table."""

    rows: tuple[Row, ...]
    source: str

    @property
    def within(self) -> bool:
        """Whether every headline lies within its tolerance."""
        return all(row.within for row in self.rows)

    def text(self) -> str:
        """The table as plain text, one headline a line."""
        cells = [_HEADER, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER))]
        lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) for line in cells]
        return "\n".join([*(line.rstrip() for line in lines), self.source])

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{cell}</th>' for cell in _HEADER)
        body = "".join(_html_row(row) for row in self.rows)
        return (
            f'<table class="dataframe"><caption>{html.escape(self.source)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def __repr__(self) -> str:
        return self.text()


_HEADER = ("", "published", "this run", "tolerance", "verdict")


def results_folder() -> Path:
    """`data/results` of the book around the current folder."""
    return book_root() / "data" / "results"


def write_results(
    name: str,
    values: Mapping[str, Any],
    *,
    profile: str,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    device: str | None = None,
    seconds: float | None = None,
    path: str | Path | None = None,
) -> Path:
    """Write `<path>/<name>.json` atomically, with its provenance, and return its path.

    Parameters
    ----------
    name:
        Lower-case letters, digits, `_` and `-`.
    values:
        Headline -> `Interval`, finite number, text, or lists and mappings of these.
    device, seconds:
        What the numbers were computed on ("cpu", "cuda"), and how long that took.
    path:
        Folder; `data/results` of the book by default.

    Raises
    ------
    ResultsError
        A value is not finite or not JSON, an interval is malformed, a text holds a path or the name
        of this machine, or the file cannot be written.
    """
    record = {
        "format": FORMAT_VERSION,
        "name": name,
        "profile": profile,
        "seeds": [int(seed) for seed in seeds],
        **_checked(name, values, settings),
        "provenance": provenance(device=device, seconds=seconds),
    }
    target = (Path(path) if path is not None else results_folder()) / f"{name}.json"
    _write(target, _dump(record, name))
    return target


def load_results(name: str, *, path: str | Path | None = None) -> Results:
    """Read what `write_results` wrote.

    Raises
    ------
    ResultsError
        The file is missing, is not JSON, is of another format, or lacks a field.
    """
    file = (Path(path) if path is not None else results_folder()) / f"{name}.json"
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise _bad(file, name, "no such file", "published results") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(file, name, str(error), "a JSON object") from error
    _check_record(record, file, name)
    values = {headline: _revive(value) for headline, value in record["values"].items()}
    fields = {field: record[field] for field in _FIELDS}
    return Results(**{**fields, "seeds": tuple(record["seeds"]), "values": values})


def compare(
    published: Results, measured: Mapping[str, Any], *, tolerance: float | Mapping[str, float]
) -> Comparison:
    """Put every measured headline next to the published one.

    Parameters
    ----------
    measured:
        Headline -> `Interval` or number.
    tolerance:
        Largest accepted difference of the two estimates, in the unit of the headline; one for all, or
        one for each.

    Raises
    ------
    ResultsError
        A headline was not published, or has no single value.
    ParameterError
        A tolerance is missing, negative or not finite.
    """
    rows = []
    for headline, value in measured.items():
        ours = _as_interval(value, headline)
        theirs = _as_interval(published[headline], headline)
        allowed = tolerance.get(headline) if isinstance(tolerance, Mapping) else tolerance
        if allowed is None or not math.isfinite(allowed) or allowed < 0:
            raise ParameterError(
                f"The headline {headline!r} has no usable tolerance.",
                given=allowed,
                expected="a finite number, 0 or more",
                mend="state how far this run may lie from the published value",
            )
        # NaN compares false: a headline that could not be measured is outside.
        within = abs(ours.estimate - theirs.estimate) <= allowed + 1e-12
        rows.append(Row(headline, theirs, ours, float(allowed), within))
    return Comparison(tuple(rows), _source(published))


def _checked(name: str, values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`values` and `settings` as JSON holds them, fit to be published under `name`."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ResultsError(
            "The name of results is malformed.",
            given=repr(name),
            expected="lower-case letters, digits, '_' or '-'",
            mend="rename them",
        )
    content = {"values": _plain(values), "settings": _plain(settings)}
    _check_private(content, name)
    for where, record in _intervals(content["values"], ""):
        _check_interval(record, f"{name}: {where}")
    return content


def provenance(*, device: str | None, seconds: float | None) -> dict[str, Any]:
    """The day (UTC), versions, and kind of machine; nothing that identifies the machine."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"tracealign": __version__, **library_versions()},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=True),
        "memory": round(psutil.virtual_memory().total / 2**30, 1),
        "device": device,
        "seconds": None if seconds is None else round(seconds, 1),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _plain(value: Any) -> Any:
    """`value` with every `Interval` (or other summary that knows `to_json`) as a mapping."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _revive(value: Any) -> Any:
    if isinstance(value, list):
        return [_revive(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == _INTERVAL:
        return Interval.from_json(value)
    return {key: _revive(inner) for key, inner in value.items()}


def _dump(record: Mapping[str, Any], name: str) -> str:
    try:
        return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ResultsError(
            f"The results {name} cannot be written as JSON.",
            given=str(error),
            expected="Interval, finite numbers, strings, booleans, None, lists and mappings",
            mend="convert them, for example float(x) for a NumPy number",
        ) from error


def _write(target: Path, text: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, text)
    except OSError as error:
        raise ResultsError(
            "The results cannot be written.",
            given=f"{target}: {error}",
            expected="a folder in which you may write, on a disk with free space",
            mend="choose another folder with `path=`",
        ) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _check_private(content: Mapping[str, Any], name: str) -> None:
    """Refuse texts that are absolute paths, or that hold the home folder or the machine's name."""
    host = platform.node()
    private = re.compile("|".join(re.escape(word) for word in {str(Path.home()), str(Path.cwd())}))
    for text in _strings(dict(content)):
        absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
        named = len(host) > 3 and host != "localhost" and re.search(rf"\b{re.escape(host)}\b", text)
        if absolute or named or private.search(text):
            raise ResultsError(
                f"The results {name} would publish a path or the name of this machine.",
                given=repr(text),
                expected="texts that mean the same on every machine",
                mend="use a relative path, or leave it out",
            )


def _intervals(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping inside `value` that is, or should be, an interval, and where it stands."""
    if isinstance(value, dict):
        if "estimate" in value:
            yield where, value
            return
        for key, inner in value.items():
            yield from _intervals(inner, f"{where}/{key}")
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _intervals(inner, f"{where}/{position}")


def _check_interval(record: Mapping[str, Any], where: str) -> None:
    interval = Interval.from_json(record)
    if interval.n < 0 or interval.low > interval.high:
        raise ResultsError(
            "An interval is malformed.",
            given=f"{where}: {dict(record)}",
            expected="low <= high, and n >= 0",
            mend="measure it again",
        )


def _check_record(record: Any, file: Path, name: str) -> None:
    if not isinstance(record, dict) or record.get("format") != FORMAT_VERSION:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise _bad(file, name, f"format {found!r}", f"format {FORMAT_VERSION}")
    for field, kind in _FIELDS.items():
        if not isinstance(record.get(field), kind):
            raise _bad(file, name, f"field {field!r} is {record.get(field)!r}", f"{field}: {kind.__name__}")
    if record["name"] != name:
        raise _bad(file, name, f"results called {record['name']!r}", f"results called {name!r}")
    if not all(isinstance(seed, int) for seed in record["seeds"]):
        raise _bad(file, name, f"seeds {record['seeds']!r}", "whole numbers")
    for where, interval in _intervals(record["values"], ""):
        try:
            _check_interval(interval, where)
        except ResultsError as error:
            raise _bad(file, name, f"{where}: {interval}", "an interval with low <= high") from error


def _bad(file: Path, name: str, found: str, expected: str) -> ResultsError:
    return ResultsError(
        f"The published results {name} cannot be used.",
        given=f"{file}: {found}",
        expected=expected,
        mend=f"restore the file, or measure again: `tracealign publish {name}`",
    )


def _as_interval(value: Any, headline: str) -> Interval:
    if isinstance(value, Interval):
        return value
    if isinstance(value, Mapping) and value.keys() == _INTERVAL:
        return Interval.from_json(value)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ResultsError(
            f"The headline {headline!r} is not a single value.",
            given=repr(value)[:120],
            expected="a number or an Interval",
            mend="compare one of the values that it holds",
        ) from error
    return Interval(number, math.nan, math.nan, 1)


def _source(results: Results) -> str:
    seeds = ", ".join(str(seed) for seed in results.seeds)
    facts = [f"profile {results.profile}", f"seeds {seeds}", results.provenance.get("date")]
    facts += [results.provenance.get("cpu"), results.provenance.get("device")]
    return f"Published: {results.name}, " + ", ".join(str(fact) for fact in facts if fact)


def _number(value: float) -> str:
    if math.isnan(value):
        return "undefined"
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def _shown(interval: Interval) -> str:
    if math.isnan(interval.low):
        return _number(interval.estimate)
    bounds = f"[{_number(interval.low)}, {_number(interval.high)}]"
    return f"{_number(interval.estimate)} {bounds}, n = {interval.n}"


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    verdict = "within" if row.within else "OUTSIDE"
    return row.headline, _shown(row.published), _shown(row.measured), f"± {_number(row.tolerance)}", verdict


def _html_row(row: Row) -> str:
    headline, *cells, verdict = (html.escape(cell) for cell in _cells(row))
    marked = verdict if row.within else f"<strong>{verdict}</strong>"
    data = "".join(f"<td>{cell}</td>" for cell in [*cells, marked])
    return f'<tr><th scope="row">{headline}</th>{data}</tr>'
