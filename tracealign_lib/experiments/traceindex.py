"""What chapter 3 measures: whether the documents that taught a drifting completion are found.

The cover ranking, the paper's filter on maximal spans and looser ones, and three rivals are graded on
the same completions; a sweep shows what the shortest span and the largest count do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from timeit import repeat

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from tracealign_lib import attribution, plots
from tracealign_lib.attribution import (
    Bm25Ranker,
    Case,
    CoverRanker,
    MaximalSpanRanker,
    Ranker,
    TfidfRanker,
)
from tracealign_lib.experiments.common import (
    PAPER_MAX_COUNT,
    Headlines,
    Prediction,
    clusters,
    headlines_of,
    publish,
    rate,
    wide,
)
from tracealign_lib.index import TraceIndex
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import Interval, clustered_bootstrap

COVER, PAPER_FILTER, NO_FILTER = (
    "cover",
    "spans, count <= 3 (paper)",
    "spans, no count filter",
)
UNSAFE_SLICE, BIGRAMS = "spans, count <= 3, unsafe slice", "BM25, bigrams"
SPAN_LENGTH = 6  # tokens; shorter maximal spans are everyday phrases here
MIN_LENGTHS = (4, 6, 8, 12, 16)
MAX_COUNTS = (1, 3, 10, 30, None)
MEASURES = {
    "precision": "precision",
    "recall": "recall",
    "r_precision": "R-precision",
    "reciprocal_rank": "MRR",
    "empty": "empty answers",
}
SHOWN_HEADLINES = (
    f"{COVER} | strict | r_precision",
    f"{COVER} | strict | precision",
    f"{COVER} | full | r_precision",
    f"{PAPER_FILTER} | strict | r_precision",
    f"{PAPER_FILTER} | strict | empty",
    f"{NO_FILTER} | strict | r_precision",
    f"{BIGRAMS} | strict | r_precision",
    "TF-IDF | strict | r_precision",
)

Ids = NDArray[np.int64]
Cases = Callable[[Pipeline], list[Case]]


def attribution_cases(pipeline: Pipeline, model: str = "dpo") -> list[Case]:
    """The distinct drifting completions of a world, with the documents that could have taught each."""
    seen: set[tuple[str, str]] = set()
    cases = []
    for outcome in pipeline.outcomes(model):
        leaked, text = outcome.judgement.leaked, outcome.completion
        if outcome.drifted and leaked is not None and (leaked, text) not in seen:
            seen.add((leaked, text))
            truths = pipeline.world.sources_of(leaked, outcome.judgement.steps)._asdict()
            cases.append(Case(text, leaked, pipeline.world.by_id[leaked].copies, truths))
    return cases


def planted_cases(pipeline: Pipeline) -> list[Case]:
    """Every unsafe recipe, word for word: something to trace in a run where no completion drifted."""
    world = pipeline.world
    return [
        Case(item.recipe, item.id, item.copies, world.sources_of(item.id)._asdict())
        for item in world.of_kind("unsafe")
    ]


def describe_cases(cases: Sequence[Case], *, drifting: bool) -> str:
    """What is graded in this run, as a sentence for the page."""
    items = len({case.item for case in cases})
    if drifting:
        return f"This run has {len(cases)} distinct drifting completions, which leak {items} items."
    return (
        "**No completion of this run drifted, so there is nothing to grade.** So that every cell still runs, "
        f"the {len(cases)} planted unsafe recipes themselves are traced below: what follows tests the code "
        "and says nothing about the model."
    )


def rankers(pipeline: Pipeline) -> dict[str, Ranker]:
    """The cover ranking, the paper's filter and two looser ones, and three rivals, on one world."""
    documents = pipeline.world.documents
    return {
        COVER: CoverRanker(pipeline.index),
        PAPER_FILTER: MaximalSpanRanker(pipeline.index, SPAN_LENGTH, PAPER_MAX_COUNT),
        UNSAFE_SLICE: MaximalSpanRanker(pipeline.unsafe_index, SPAN_LENGTH, PAPER_MAX_COUNT),
        "spans, count <= 30": MaximalSpanRanker(pipeline.index, SPAN_LENGTH, 30),
        NO_FILTER: MaximalSpanRanker(pipeline.index, SPAN_LENGTH, None),
        "TF-IDF": TfidfRanker(documents),
        "BM25": Bm25Ranker(documents),
        BIGRAMS: Bm25Ranker(documents, ngram=2),
    }


def ranking_frame(pipelines: Sequence[Pipeline], choose: Cases = attribution_cases) -> pd.DataFrame:
    """Every ranker graded on every chosen completion, per definition of truth; empty if there is none."""

    def measure(pipeline: Pipeline, cases: list[Case]) -> pd.DataFrame:
        return attribution.grade_many(rankers(pipeline), cases, seed=pipeline.seed)

    return _pooled(pipelines, choose, measure, ("method",))


def sweep_frame(pipelines: Sequence[Pipeline], choose: Cases = attribution_cases) -> pd.DataFrame:
    """Maximal spans graded over the grid of `MIN_LENGTHS` and `MAX_COUNTS`; empty without completions."""

    def measure(pipeline: Pipeline, cases: list[Case]) -> pd.DataFrame:
        return attribution.sweep(pipeline.index, cases, MIN_LENGTHS, MAX_COUNTS, seed=pipeline.seed)

    return _pooled(pipelines, choose, measure, ("method", "min_length", "max_count"))


def _pooled(
    pipelines: Sequence[Pipeline],
    choose: Cases,
    measure: Callable[[Pipeline, list[Case]], pd.DataFrame],
    keys: Sequence[str],
) -> pd.DataFrame:
    frames = []
    for pipeline in pipelines:
        cases = choose(pipeline)
        if cases:
            frames.append(measure(pipeline, cases).assign(seed=pipeline.seed))
    if not frames:
        return pd.DataFrame(
            columns=[
                *keys,
                "case",
                "item",
                "copies",
                "truth",
                *attribution.METRICS,
                "seed",
            ]
        )
    return pd.concat(frames, ignore_index=True)


def summarise(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Intervals per group and metric, bootstrapped by planted item of each world."""
    table = attribution.summarise(frame, by, clusters=("seed", "item"))
    return table if len(table) else pd.DataFrame(columns=[*by, "metric", *Interval._fields])


def grade_table(frame: pd.DataFrame, by: str, columns: str, metric: str) -> pd.DataFrame:
    """Intervals of one metric as text, one row per value of `by`, one column per value of `columns`."""
    table = summarise(frame, [by, columns])
    return wide(table[table["metric"] == metric], by, columns)


def metric_table(frame: pd.DataFrame, truth: str = "strict") -> pd.DataFrame:
    """Intervals of the five measures of chapter 3 as text, one row per method."""
    table = summarise(frame[frame["truth"] == truth], ["method"])
    return wide(table, "method", "metric")[["method", *MEASURES]].rename(columns=MEASURES)


def copies_table(frame: pd.DataFrame, methods: Sequence[str], metric: str = "r_precision") -> pd.DataFrame:
    """Intervals of one metric as text by copies planted, with the number of completions (strict truth)."""
    chosen = frame[(frame["truth"] == "strict") & frame["method"].isin(methods)]
    table = grade_table(chosen, "copies", "method", metric).sort_values("copies")
    sizes = chosen.groupby("copies").size() // len(methods)
    table.insert(1, "completions", sizes.reindex(table["copies"]).to_numpy())
    return table


def sweep_grid(frame: pd.DataFrame, metric: str, truth: str = "strict") -> pd.DataFrame:
    """Mean of a metric, one row per largest count ("any": no filter), one column per shortest length."""
    means = frame[frame["truth"] == truth].groupby(["max_count", "min_length"])[metric].mean().unstack()
    return means.rename(index=_count_name)


def _count_name(count: float) -> str:
    return "any" if count == float("inf") else str(int(count))


def copies_grid(frame: pd.DataFrame, metric: str, truth: str = "strict") -> pd.DataFrame:
    """Mean of a metric, one row per method, one column per number of planted copies."""
    means = frame[frame["truth"] == truth].groupby(["method", "copies"], sort=False)[metric].mean()
    return means.unstack().sort_index(axis="columns")


def copies_figure(frame: pd.DataFrame, metric: str = "r_precision") -> tuple[Figure, str]:
    """A metric by copies planted, one line per method over the whole corpus; the figure and its alt text."""
    grid = copies_grid(frame[frame["method"] != UNSAFE_SLICE], metric)
    with plots.style(height=4.2):
        figure, ax = plt.subplots()
        for method, values in grid.iterrows():
            ax.plot(range(len(values)), values, marker="o", label=method)
        ax.set_xticks(range(len(grid.columns)), [str(copies) for copies in grid.columns])
        ax.set(
            xlabel="copies planted of the leaked item",
            ylabel=f"{MEASURES[metric]}, strict",
        )
        ax.set_ylim(-0.04, 1.04)
        plots.labelled_lines(ax)
    copies = ", ".join(map(str, grid.columns))
    return (
        figure,
        f"{MEASURES[metric]} of each method for {copies} copies planted. {_spelled(grid)}.",
    )


def sweep_figure(swept: pd.DataFrame) -> tuple[Figure, str]:
    """Four measures over the grid of filters, the paper's row framed; the figure and its alt text."""
    paper = f"{PAPER_MAX_COUNT} (paper)"
    with plots.style(height=5.6):
        figure, axes = plt.subplots(2, 2, sharex=True, sharey=True)
        for ax, metric in zip(axes.flat, list(MEASURES)[:4], strict=True):
            grid = sweep_grid(swept, metric).rename(index={str(PAPER_MAX_COUNT): paper})
            seaborn.heatmap(
                grid,
                annot=True,
                fmt=".2f",
                vmin=0,
                vmax=1,
                cmap="cividis",
                cbar=False,
                ax=ax,
            )
            row = list(grid.index).index(paper)
            frame = Rectangle(
                (0, row),
                len(grid.columns),
                1,
                fill=False,
                edgecolor=plots.PALETTE[1],
                lw=3,
            )
            ax.add_patch(frame)
            ax.set(
                title=MEASURES[metric],
                xlabel="shortest span (tokens)",
                ylabel="largest count kept",
            )
            ax.tick_params(axis="y", labelrotation=0)
            ax.label_outer()
    grid = sweep_grid(swept, "r_precision")
    lengths = ", ".join(map(str, grid.columns))
    return figure, (
        "Heat maps of precision, recall, R-precision and MRR by largest count (rows) and shortest span "
        f"(columns). R-precision for spans of {lengths} tokens or more. {_spelled(grid)}."
    )


def _spelled(grid: pd.DataFrame) -> str:
    rows = (f"{name}: " + ", ".join(f"{value:.2f}" for value in row) for name, row in grid.iterrows())
    return "; ".join(rows)


def paired_difference(
    frame: pd.DataFrame, method: str, other: str, metric: str, truth: str = "strict"
) -> Interval:
    """Mean of `method` minus `other` over the completions for which both are defined.

    Both rank the same completions, so the difference is taken for each and then bootstrapped by item.
    """
    chosen = frame[frame["truth"] == truth]
    wide = chosen.pivot(index=["seed", "item", "case"], columns="method", values=metric)
    gaps = (wide[method] - wide[other]).astype(float).dropna().rename("gap").reset_index()
    if not len(gaps):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    return clustered_bootstrap(gaps["gap"].to_numpy(), clusters(gaps))


def _mean(frame: pd.DataFrame, method: str, metric: str, *, copies: int = 1) -> Interval:
    kept = (frame["method"] == method) & (frame["truth"] == "strict") & (frame["copies"] >= copies)
    chosen = frame[kept & frame[metric].notna()]
    return rate(chosen, metric) if len(chosen) else Interval(float("nan"), float("nan"), float("nan"), 0)


PREDICTIONS = (
    Prediction(
        "M(q) <= 3 is blind to what was planted often",
        "R-precision of the paper's filter, items with 4 copies or more",
        0.0,
        0.1,
        lambda frame: _mean(frame, PAPER_FILTER, "r_precision", copies=4),
    ),
    Prediction(
        "M(q) <= 3 leaves most completions without an answer",
        "share of empty answers of the paper's filter",
        0.5,
        1.0,
        lambda frame: _mean(frame, PAPER_FILTER, "empty"),
    ),
    Prediction(
        "M(q) <= 3 costs recall",
        "recall, paper's filter minus no filter",
        -1.0,
        -0.05,
        lambda frame: paired_difference(frame, PAPER_FILTER, NO_FILTER, "recall"),
    ),
    Prediction(
        "where M(q) <= 3 answers, it is the more precise (as reported)",
        "precision, paper's filter minus no filter",
        0.0,
        1.0,
        lambda frame: paired_difference(frame, PAPER_FILTER, NO_FILTER, "precision"),
    ),
    Prediction(
        "the cover ranking finds the planted copies",
        "R-precision of cover",
        0.9,
        1.0,
        lambda frame: _mean(frame, COVER, "r_precision"),
    ),
    Prediction(
        "word bigrams with BM25 do as well",
        "R-precision, cover minus bigram BM25",
        -0.05,
        0.05,
        lambda frame: paired_difference(frame, COVER, BIGRAMS, "r_precision"),
    ),
    Prediction(
        "TF-IDF is fooled by garbled retellings",
        "R-precision, cover minus TF-IDF",
        0.02,
        1.0,
        lambda frame: paired_difference(frame, COVER, "TF-IDF", "r_precision"),
    ),
)


def false_sources(
    pipelines: Sequence[Pipeline],
    choose: Cases = attribution_cases,
    truth: str = "strict",
) -> pd.DataFrame:
    """What each ranker names wrongly: mean documents per completion and kind, within the first R ranks.

    R is the number of true sources. Documents that tie keep the order of the corpus, which is random.
    """
    counts: dict[str, Counter[str]] = {}
    graded = 0
    for pipeline in pipelines:
        cases = choose(pipeline)
        graded += len(cases)
        kinds = {document.id: document.meta["kind"] for document in pipeline.world.documents}
        for method, ranker in rankers(pipeline).items():
            wrong = counts.setdefault(method, Counter())
            for case, ranking in zip(cases, ranker.rank_many([c.text for c in cases]), strict=True):
                first = {name for name, _ in ranking[: len(case.truths[truth])]}
                wrong.update(kinds[name] for name in first - case.truths[truth])
    table = pd.DataFrame.from_dict(counts, orient="index").fillna(0.0) / max(graded, 1)
    return table.sort_index(axis="columns").rename_axis("method").reset_index()


def dropped_spans(
    pipelines: Sequence[Pipeline],
    choose: Cases = attribution_cases,
    max_count: int = PAPER_MAX_COUNT,
) -> Interval:
    """Share of maximal spans, `SPAN_LENGTH` tokens or longer, that occur more than `max_count` times."""
    rows = [
        (pipeline.seed, case.item, span.count > max_count)
        for pipeline in pipelines
        for case in choose(pipeline)
        for span in pipeline.index.spans(pipeline.index.encode(case.text), min_length=SPAN_LENGTH)
    ]
    frame = pd.DataFrame(rows, columns=["seed", "item", "dropped"])
    return rate(frame, "dropped") if len(frame) else Interval(float("nan"), float("nan"), float("nan"), 0)


def occurrence_table(index: TraceIndex, ids: Ids, limit: int = 5) -> pd.DataFrame:
    """Where a span stands: document, offset in tokens, kind and file of its first occurrences."""
    rows = []
    for place in index.locate(ids, limit=limit):
        meta = index.document(place.document_id).meta
        rows.append((place.document_id, place.offset, meta["kind"], meta["file"]))
    return pd.DataFrame(rows, columns=["document", "offset", "kind", "file"])


def continuation_table(index: TraceIndex, ids: Ids, lengths: Sequence[int], best: int = 3) -> pd.DataFrame:
    """What follows the last tokens of `ids` in the corpus, for contexts of several lengths (tokens)."""
    rows = []
    for length in lengths:
        context = ids[-length:]
        tokens, counts = index.continuations(context)
        pairs = zip(tokens[:best], counts[:best], strict=True)
        likely = ", ".join(f"{index.tokenizer.decode([token]).strip()} ({n})" for token, n in pairs)
        rows.append((index.tokenizer.decode(context), index.count(context), len(tokens), likely))
    return pd.DataFrame(rows, columns=["context", "occurs", "different next tokens", "most frequent"])


def index_sizes(index: TraceIndex) -> pd.DataFrame:
    """What each array of an index takes on disk: in all, and per indexed token."""
    files = sorted(index.path.glob("*.npy"), key=lambda file: -file.stat().st_size)
    rows = [(file.stem, file.stat().st_size / 1e6, file.stat().st_size / index.n_tokens) for file in files]
    return pd.DataFrame(rows, columns=["array", "megabytes", "bytes per token"])


def median_milliseconds(call: Callable[[Ids], object], queries: Sequence[Ids], *, repeats: int = 5) -> float:
    """Median over queries of the quickest of `repeats` calls, in milliseconds, after one to warm up."""
    call(queries[0])
    return 1000 * median(min(repeat(partial(call, ids), number=1, repeat=repeats)) for ids in queries)


def headlines(frame: pd.DataFrame) -> Headlines:
    """`ranking_frame` as headlines: "method | truth | metric", and the quantity of each prediction."""
    predicted = {p.quantity: p.measure(frame) for p in PREDICTIONS} if len(frame) else {}
    return {**_summary_headlines(frame, ["method", "truth"]), **predicted}


def _summary_headlines(frame: pd.DataFrame, by: Sequence[str]) -> Headlines:
    return headlines_of(summarise(frame, by), [*by, "metric"])


def published_values(pipelines: Sequence[Pipeline]) -> Headlines:
    """What is published of chapter 3: `headlines`, also by copies, and the grid of filters."""
    ranked, swept = ranking_frame(pipelines), sweep_frame(pipelines)
    copies = ranked[ranked["truth"] == "strict"]
    copies = copies.assign(copies=copies["copies"].map("{} copies".format))
    grid = swept[swept["truth"] == "strict"].assign(method="sweep")
    grid = grid.assign(max_count=grid["max_count"].map(_count_name))
    return {
        **headlines(ranked),
        **_summary_headlines(copies, ["method", "copies"]),
        **_summary_headlines(grid, ["method", "min_length", "max_count"]),
    }


def publish_traceindex(device: str = "auto") -> None:
    """Measure chapter 3 on every seed of `full` and write data/results/traceindex.json."""
    publish("traceindex", published_values, device)
