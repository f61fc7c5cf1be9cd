"""Tables of chapter 4: one span token by token, what is scored by what, and the rules side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from tracealign_lib.bci import Smoothing, SpanScorer, unigram_surprisal
from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments.bci import RECOMMENDATION, Criterion, Recommendation, recommend
from tracealign_lib.experiments.bci_detection import (
    fit_thresholds,
    flag_table,
    interval_of,
    paired_refusals,
    worst_groups,
)
from tracealign_lib.experiments.bci_scores import NEEDS, PAPER_WINDOW, UNITS
from tracealign_lib.experiments.bci_texts import BENIGN, FIT, JUDGE, UNSAFE, BeliefText
from tracealign_lib.experiments.common import PAPER_MAX_COUNT, PAPER_TAU, short, wide
from tracealign_lib.index import Span, TraceIndex
from tracealign_lib.stats import Interval
from tracealign_lib.tracing import visible

EXCERPT = 240
"""Characters of a text that a table shows."""


def token_table(
    index: TraceIndex, ids: ArrayLike, span: Span, scorers: Mapping[str, SpanScorer]
) -> pd.DataFrame:
    """One row per token of a span: the token, how often the index holds it, and its score by each scorer.

    A token is scored as a span of length 1 where it stands, so scorers that read the context before it see
    that context.
    """
    singles = [Span(i, i + 1, 0) for i in range(span.start, span.end)]
    tokens = np.asarray(ids)[span.start : span.end].tolist()
    table = {
        "token": [visible(index.tokenizer.decode([token]).strip()) for token in tokens],
        "count": [index.count([token]) for token in tokens],
    }
    return pd.DataFrame(table | {name: s.score_spans(index, ids, singles) for name, s in scorers.items()})


def smoothing_table(collections: Mapping[str, TraceIndex]) -> pd.DataFrame:
    """What a token that a collection never holds costs under each smoothing, in nats.

    Columns: collection, `unseen` (share of the vocabulary), and one per smoothing: as text, since
    Good-Turing has no estimate where no token occurs once.
    """
    rows = []
    for name, index in collections.items():
        tokens, _ = index.continuations([])
        unseen = np.setdiff1d(np.arange(index.vocab_size), tokens)
        costs = [_cost_of_unseen(index, smoothing, unseen) for smoothing in get_args(Smoothing)]
        rows.append((name, f"{len(unseen) / index.vocab_size:.0%}", *costs))
    return pd.DataFrame(rows, columns=["collection", "vocabulary unseen", *get_args(Smoothing)])


def _cost_of_unseen(index: TraceIndex, smoothing: Smoothing, unseen: NDArray[np.int64]) -> str:
    if not len(unseen):
        return "none unseen"
    try:
        return f"{unigram_surprisal(index, smoothing)[unseen[0]]:.1f}"
    except ParameterError:
        return "no estimate: no token occurs once"


def text_table(texts: Sequence[BeliefText]) -> pd.DataFrame:
    """How many texts and items each group holds, and how many of the texts fall into each half."""
    frame = pd.DataFrame(texts)
    grouped = frame.assign(fit=frame["half"] == FIT, judge=frame["half"] == JUDGE).groupby("group")
    table = grouped.agg(
        texts=("text", "size"), items=("item", "nunique"), fit=("fit", "sum"), judge=("judge", "sum")
    )
    return table.reindex([g for g in (UNSAFE, *BENIGN) if g in table.index]).reset_index()


def describe_texts(texts: Sequence[BeliefText], *, drifting: bool) -> str:
    """What is scored in this run, as a sentence for the page."""
    unsafe = [text for text in texts if text.group == UNSAFE]
    items = len({text.item for text in unsafe})
    if drifting:
        return (
            f"This run has {len(unsafe)} distinct drifting completions, which leak {items} items, and "
            f"{len(texts) - len(unsafe)} harmless texts. The number of items is what limits the intervals."
        )
    return (
        "**No completion of this run drifted, so there is nothing to tell apart.** So that every cell still "
        f"runs, the {len(unsafe)} planted unsafe recipes stand in for drift, and harmless recipes and facts "
        "for the model's answers: what follows tests the code and says nothing about the model."
    )


def scorer_table(scorers: Mapping[str, SpanScorer]) -> pd.DataFrame:
    """Name, source and needed labels of each scorer, in its own words."""
    rows = [(name, scorer.source, scorer.labels) for name, scorer in scorers.items()]
    return pd.DataFrame(rows, columns=["score", "source", "labels needed"])


def top_texts(
    frame: pd.DataFrame,
    texts: Sequence[BeliefText],
    filter_name: str,
    scorer: str,
    group: str,
    limit: int = 2,
) -> pd.DataFrame:
    """The texts of a group that score highest, with their scores and beginnings."""
    kept = (frame["filter"] == filter_name) & (frame["scorer"] == scorer) & (frame["group"] == group)
    best = frame[kept].nlargest(limit, "score")
    excerpts = [visible(" ".join(texts[number].text.split())) for number in best["text"]]
    cut = [text if len(text) <= EXCERPT else text[:EXCERPT].rstrip() + " …" for text in excerpts]
    return pd.DataFrame({"score": best["score"].to_numpy(), "text": cut})


def best_cells(summary: pd.DataFrame) -> pd.DataFrame:
    """The cell of `bci_paper.sweep_summary` with the largest gap between drift and the worst group.

    Once with all thresholds, once with the lowest alone (length and count do the work), and the paper's.
    """
    paper = (summary["threshold"] == PAPER_TAU) & (summary["max_count"] == PAPER_MAX_COUNT)
    choices = {
        "any threshold": summary,
        "length and count alone": summary[summary["threshold"] == summary["threshold"].min()],
        "the paper's cell": summary[paper & (summary["min_length"] == PAPER_WINDOW)],
    }
    rows = []
    for name, cells in choices.items():
        gaps = cells.assign(gap=cells["caught"] - cells["worst"])
        for cell in gaps.nlargest(1, "gap").itertuples():
            count = f"{cell.max_count:g}" if np.isfinite(cell.max_count) else "any"
            place = (f"{cell.threshold:g}", str(cell.min_length), count)
            rows.append((name, *place, f"{cell.caught:.2f}", f"{cell.worst:.2f} ({cell.worst_group})"))
    columns = [
        "choice",
        "threshold",
        "shortest span",
        "largest count",
        "drift refused",
        "worst harmless group",
    ]
    return pd.DataFrame(rows, columns=columns)


def breaks_table(areas: pd.DataFrame) -> pd.DataFrame:
    """Where each score breaks: its smallest AUROC and the group that it is against, for each choice of spans.

    `areas` is `bci_detection.auroc_table`; one row per score, one column per filter.
    """
    worst = worst_groups(areas)
    cells = [f"{short(interval_of(row))} {row['group']}" for _, row in worst.iterrows()]
    table = worst.assign(cell=cells).pivot(index="scorer", columns="filter", values="cell")
    order = [name for name in NEEDS if name in table.index]
    return table.loc[order, list(dict.fromkeys(worst["filter"]))].rename_axis(columns=None).reset_index()


def refused_by(frame: pd.DataFrame, thresholds: pd.DataFrame, rules: Sequence[tuple[str, str]]) -> str:
    """The share of drift that each rule, a filter and a scorer, refuses on the judged half, as words."""
    judged = flag_table(frame, thresholds, half=JUDGE)
    return ", ".join(f"{scorer} {_shares(judged, (spans, scorer))[1]}" for spans, scorer in rules)


def describe_choice(frame: pd.DataFrame, chosen: Recommendation | None) -> str:
    """What was recommended, and how it does on the judged half, as sentences for the page."""
    if chosen is None:
        return "**Nothing is recommended**: no score catches enough drift at the allowed false alarms."
    unit = UNITS.get(chosen.scorer, "nats")
    part = frame[(frame["filter"] == chosen.filter) & (frame["scorer"] == chosen.scorer)]
    judged = flag_table(part, chosen.threshold, half=JUDGE)
    _, caught, worst = _shares(judged, (chosen.filter, chosen.scorer))
    return (
        f"The fit half recommends **{chosen.scorer}** over **{chosen.filter}**, refusing above "
        f"{chosen.threshold:.1f} {unit}: there it catches {chosen.caught:.0%} of drift and refuses at most "
        f"{chosen.worst_false_alarm:.0%} of a harmless group, and both numbers flatter. On the judged half "
        f"it catches **{caught}**; the harmless group hit hardest is {worst}."
    )


def decision_table(frame: pd.DataFrame, criterion: Criterion = RECOMMENDATION) -> pd.DataFrame:
    """The recommended rule, its rivals and the paper's rule on the judged half.

    Columns: score (over the spans of the first), threshold, drift refused, the worst harmless group with
    its share, and what is refused of drift beyond what the first row refuses (paired). Without a
    recommendation, the first row is the score that catches most on the half it was fitted on.
    """
    fitted = fit_thresholds(frame, criterion.max_false_alarm)
    chosen = recommend(frame, criterion)
    best = fitted.loc[fitted["caught"].idxmax()]
    first = (best["filter"], best["scorer"]) if chosen is None else (chosen.filter, chosen.scorer)
    rivals = [(first[0], scorer) for scorer in NEEDS if (frame["scorer"] == scorer).any()]
    judged = flag_table(frame, fitted, half=JUDGE)
    rows = []
    for rule in dict.fromkeys([first, *rivals]):
        difference = "" if rule == first else short(paired_refusals(frame, fitted, rule, first))
        rows.append((rule[1], *_shares(judged, rule), difference))
    paper = flag_table(frame, PAPER_TAU, half=JUDGE)
    rows.append(("the paper's rule", *_shares(paper, ("paper", "raw BCI")), ""))
    lead = "recommended" if chosen is not None else "best, not recommended"
    rows[0] = (f"{rows[0][0]} ({lead})", *rows[0][1:])
    columns = [
        "score",
        "threshold",
        "drift refused",
        "worst harmless group",
        "drift refused, minus the first row",
    ]
    return pd.DataFrame(rows, columns=columns)


def _shares(table: pd.DataFrame, rule: tuple[str, str]) -> tuple[float, str, str]:
    rows = table[(table["filter"] == rule[0]) & (table["scorer"] == rule[1])].set_index("group")
    said = {name: short(Interval(*row[list(Interval._fields)])) for name, row in rows.iterrows()}
    # Of groups that are hit alike, the one that leaves most doubt.
    worst = rows.drop(index=UNSAFE, errors="ignore").sort_values(["estimate", "high"]).index[-1]
    return float(rows["threshold"].iloc[0]), said.get(UNSAFE, ""), f"{worst}: {said[worst]}"


def refused_table(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows of `bci_paper.tau_frame`, each table with a column `rule`: what each rule refuses, by group."""
    joined = pd.concat(tables)
    return wide(joined[joined["measure"] == "refused"], "group", "rule")
