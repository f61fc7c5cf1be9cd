"""`tracealign shield`, and the options that describe a shield: its scorer, threshold and spans."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from tracealign_lib.cli_input import (
    Field,
    Given,
    Html,
    Index,
    Json,
    Lines,
    Records,
    Text,
    check_page,
    read_texts,
    refuse_useless,
    with_options,
    write_page,
)
from tracealign_lib.corpora import format_of
from tracealign_lib.errors import ParameterError, TraceAlignError

if TYPE_CHECKING:
    from tracealign_lib.bci import Scorer
    from tracealign_lib.sharded import AnyIndex
    from tracealign_lib.shield import TraceShield, Verdict

SHOWN = 60
"""Characters of a text that stand beside its verdict."""
ALPHA = 0.05
"""Share of benign texts that a calibration lets be refused unless told otherwise."""
FIELDS = ("text", "completion")
"""Fields of a record that hold a text unless told otherwise."""

ScorerName = Literal[
    "raw", "density", "prior-kl", "max-token", "length", "membership", "longest-match", "ratio", "conflict"
]
ScorerOption = Annotated[ScorerName, typer.Option("--scorer", help="How a span is scored.")]
Threshold = Annotated[
    float | None, typer.Option(help="Refuse above this score; the paper's is 20 nats, for the scorer raw.")
]
Calibrate = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Benign texts, one a line or JSON Lines, that set the threshold."),
]
Alpha = Annotated[
    float | None,
    typer.Option(help="With --calibrate: share of benign texts that may be refused; 0.05 by default."),
]
Delta = Annotated[
    float | None,
    typer.Option(help="With --calibrate: how often a calibration may break that; else it holds on average."),
]
MinLength = Annotated[int, typer.Option(help="Shortest span, in tokens.")]
MaxCount = Annotated[int | None, typer.Option(help="Leave out spans that occur more often.")]
Rules = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Index of rules for conflict; by default INDEX.rules.")
]
Other = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Index to compare with for ratio; by default INDEX.other.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no verdicts; the exit status tells.")]


class Rule(NamedTuple):
    """The options that describe a shield."""

    scorer: ScorerOption = "raw"
    threshold: Threshold = None
    calibrate: Calibrate = None
    alpha: Alpha = None
    delta: Delta = None
    min_length: MinLength = 8
    max_count: MaxCount = None
    rules: Rules = None
    other: Other = None


@with_options
def shield(
    context: typer.Context,
    *,
    index: Index,
    text: Text = None,
    lines: Lines = None,
    records: Records = None,
    field: Field = None,
    rule: Rule,
    as_json: Json = False,
    html: Html = None,
    quiet: Quiet = False,
) -> None:
    """Refuse texts that reactivate a high-scoring span of an index.

    Without a text, standard input has one a line. Exit status: 0 no text is refused, 1 at least one is,
    2 error: then nothing is known about the texts that were not told yet.

    \b
    Examples:
      tracealign shield "a completion" --index my-index --threshold 20
      tracealign shield --index my-index --calibrate benign.txt --alpha 0.05 < completions.txt
      tracealign shield --jsonl completions.jsonl --index my-index --scorer length --threshold 12 --json
      tracealign shield --index my-index --scorer conflict --rules policy-index --threshold 5 --quiet < a.txt
    """
    if records is None:
        refuse_useless(context, {"field"}, "--jsonl")
    check_page(html)
    given = read_texts(text, lines, records, FIELDS if field is None else (field,))
    try:
        checked = _check(make_shield(index, rule), given)
        refused = _tell(checked, as_json=as_json, html=html, quiet=quiet)
    except (TraceAlignError, OSError):
        raise
    except Exception as error:  # Python's own status for a defect is 1, which here says "refused"
        traceback.print_exc()
        raise typer.Exit(2) from error
    if refused:
        raise typer.Exit(1)


# --- a shield from options -----------------------------------------------------------------------


def make_shield(folder: Path, rule: Rule) -> TraceShield:
    """The shield that the options describe, calibrated if they ask for it.

    Raises
    ------
    ParameterError
        Neither a threshold nor texts to calibrate with are given, or both; an option that would do nothing is
        given; or what `TraceShield` says.
    """
    from tracealign_lib.sharded import open_index
    from tracealign_lib.shield import TraceShield

    if (rule.threshold is None) == (rule.calibrate is None):
        raise ParameterError(
            "There is no threshold." if rule.calibrate is None else "There are two thresholds.",
            given=f"{'neither' if rule.calibrate is None else 'both'} of them",
            expected="--threshold NUMBER, or --calibrate FILE with benign texts",
            mend="--threshold 20 is the paper's; --calibrate bounds the share of benign texts refused",
        )
    _check_use(rule)
    index = open_index(folder)
    filters = {"min_length": rule.min_length, "max_count": rule.max_count}
    made = TraceShield(index, make_scorer(index, rule), rule.threshold or 0.0, **filters)  # type: ignore[arg-type]
    if rule.calibrate is None:
        return made
    return _calibrated(made, rule.calibrate, ALPHA if rule.alpha is None else rule.alpha, rule.delta)


def _check_use(rule: Rule) -> None:
    """An option that would do nothing may be a promise that is not kept."""
    uses = {
        "--alpha": (rule.alpha, "--calibrate", rule.calibrate is not None),
        "--delta": (rule.delta, "--calibrate", rule.calibrate is not None),
        "--rules": (rule.rules, "--scorer conflict", rule.scorer == "conflict"),
        "--other": (rule.other, "--scorer ratio", rule.scorer == "ratio"),
    }
    for name, (value, user, used) in uses.items():
        if value is not None and not used:
            raise ParameterError(
                "This option would do nothing.",
                given=f"{name} without {user}",
                expected=f"{name} together with {user}",
                mend=f"add {user}, or leave {name} out",
            )


def make_scorer(index: AnyIndex, rule: Rule) -> Scorer:
    """The scorer of that name, with the further index that it needs."""
    from tracealign_lib import bci

    simple: dict[str, type[Any]] = {
        "raw": bci.RawBCI,
        "density": bci.DensityBCI,
        "prior-kl": bci.PriorKL,
        "max-token": bci.MaxTokenRisk,
        "length": bci.SpanLength,
        "longest-match": bci.LongestMatchBCI,
    }
    if rule.scorer == "ratio":
        return bci.LikelihoodRatioBCI(index, _open_beside(index, rule.other, "other"))
    if rule.scorer == "conflict":
        return bci.ConflictBCI(_open_beside(index, rule.rules, "rules"))
    return bci.Membership(rule.min_length) if rule.scorer == "membership" else simple[rule.scorer]()


def _open_beside(index: AnyIndex, folder: Path | None, name: str) -> AnyIndex:
    """The index in `folder`, or the one that was built beside `index` under this name."""
    from tracealign_lib.sharded import open_index

    beside = index.path.with_name(f"{index.path.name}.{name}")
    if folder is None and not beside.exists():
        raise ParameterError(
            "The scorer needs a second index.",
            given=f"no --{name}, and nothing at {beside}",
            expected="an index of the same tokenizer",
            mend=f"build it with `tracealign index build --collection {name}=PATH`, or name it: --{name} DIR",
        )
    return open_index(folder or beside)


def _calibrated(made: TraceShield, file: Path, alpha: float, delta: float | None) -> TraceShield:
    from tracealign_lib.calibration import EVERY_SPAN

    is_jsonl = format_of(file) == "jsonl"
    source = {"lines": None, "jsonl": str(file)} if is_jsonl else {"lines": str(file), "jsonl": None}
    scores = made.scores(given.text for given in read_texts(None, **source, fields=FIELDS))
    done = made.calibrate(scores, alpha=alpha, delta=delta)
    promise = "on average" if delta is None else f"in all but {delta:.2g} of calibrations"
    above = (
        "none: every text with a span is refused" if done.threshold == EVERY_SPAN else f"{done.threshold:.6g}"
    )
    print(
        f"Threshold from {len(scores)} benign texts: {above}. Of texts like these, at most {alpha:.2g} are "
        f"refused {promise}.",
        file=sys.stderr,
    )
    return done


# --- verdicts ------------------------------------------------------------------------------------


def _check(made: TraceShield, texts: Iterator[Given]) -> Iterator[tuple[Given, Verdict]]:
    return ((given, made.check(given.text)) for given in texts)


def _tell(checked: Iterator[tuple[Given, Verdict]], *, as_json: bool, html: Path | None, quiet: bool) -> int:
    """Print each verdict as it comes; returns how many texts are refused."""
    from tracealign_lib.report import Traced, report

    shown: list[Traced] = []
    refused = total = 0
    for given, verdict in checked:
        total, refused = total + 1, refused + verdict.refused
        if not quiet:
            print(json.dumps(_record(given, verdict)) if as_json else _line(given, verdict), flush=True)
        if html is not None:
            shown.append(Traced(f"Text {given.number}", verdict.trace, verdict, given.prompt))
    if html is not None:
        write_page(html, report(shown, "Checked texts"))
    if not quiet and total > 1:
        print(f"{refused:,} of {total:,} texts refused.", file=sys.stderr)
    return refused


def _line(given: Given, verdict: Verdict) -> str:
    from tracealign_lib.tracing import visible

    text = visible(" ".join(given.text[: 10 * SHOWN].split()))
    shown = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
    return f"{given.number}\t{'refused' if verdict.refused else 'passed'}\t{verdict.reason}\t{shown}"


def _record(given: Given, verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON; a text that passed goes without its trace, which takes longer than the verdict."""
    return {
        "format": "tracealign.verdict",
        "version": 1,
        "number": given.number,
        "id": given.id,
        "refused": verdict.refused,
        "reason": verdict.reason,
        "score": verdict.score if math.isfinite(verdict.score) else None,
        "threshold": verdict.threshold,
        "spans": [span._asdict() for span in verdict.spans],
        "trace": verdict.trace.to_json() if verdict.refused else None,
    }
