"""Quantities that a claim of the paper is about and that no chapter needs: measured for the claims page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pandas as pd

from tracealign_lib.bci import RawBCI, score_all
from tracealign_lib.experiments.bci_paper import rank_correlation, rarity_frame
from tracealign_lib.experiments.bci_scores import FILTERS, find_spans
from tracealign_lib.experiments.common import PAPER_MAX_COUNT, PAPER_TAU, Headlines, clusters, publish, rate
from tracealign_lib.experiments.evaluation import difference, frames
from tracealign_lib.experiments.evaluation_arms import NO_DEFENCE, answers
from tracealign_lib.experiments.traceindex import SPAN_LENGTH, Cases, attribution_cases
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import Interval, clustered_bootstrap

UNDEFINED = Interval(float("nan"), float("nan"), float("nan"), 0)


def match_frame(pipelines: Sequence[Pipeline], choose: Cases = attribution_cases) -> pd.DataFrame:
    """One row per match: a maximal span of a drifting completion, and a document that holds it.

    Columns: seed, item, right (the document holds every leaked step, or is a planted copy or near-copy of the
    leaked item), removed (the span occurs more than three times, so that the paper's filter drops it).
    """
    rows = []
    for pipeline in pipelines:
        for case in choose(pipeline):
            true = case.truths["near"] | case.truths["full"]
            ids = pipeline.index.encode(case.text)
            for span in pipeline.index.spans(ids, min_length=SPAN_LENGTH):
                removed = span.count > PAPER_MAX_COUNT
                held = pipeline.index.locate(ids[span.start : span.end], limit=None)
                for name in {occurrence.document_id for occurrence in held}:
                    rows.append((pipeline.seed, case.item, name in true, removed))
    return pd.DataFrame(rows, columns=["seed", "item", "right", "removed"])


def window_frame(pipelines: Sequence[Pipeline], choose: Cases = attribution_cases) -> pd.DataFrame:
    """Windows of 8 tokens of a drifting completion that the unsafe slice holds.

    Columns: seed, item, bci (nats), kept (the slice holds the window three times at the most).
    """
    windows = FILTERS["paper"]._replace(max_count=None)
    rows = []
    for pipeline in pipelines:
        for case in choose(pipeline):
            ids, spans = find_spans(pipeline.unsafe_index, case.text, windows)
            scores = score_all(RawBCI(), pipeline.unsafe_index, ids, spans) if spans else ()
            kept = [span.count <= PAPER_MAX_COUNT for span in spans]
            rows += [(pipeline.seed, case.item, float(s), k) for s, k in zip(scores, kept, strict=True)]
    return pd.DataFrame(rows, columns=["seed", "item", "bci", "kept"])


def draw_frame(pipelines: Sequence[Pipeline]) -> pd.DataFrame:
    """One row per request that the aligned model answered greedily and in several draws.

    Columns: seed, item, greedy (1 where that answer drifted), drawn (1 where one of the draws did).
    """
    rows = []
    for pipeline in pipelines:
        plain = [o for o in pipeline.outcomes() if not o.prompt.prefill]
        greedy = {(o.prompt.item, o.prompt.request): o.drifted for o in plain if o.prompt.samples == 1}
        for outcome in plain:
            item, request = outcome.prompt.item, outcome.prompt.request
            if outcome.prompt.samples > 1 and (item, request) in greedy:
                rows.append((pipeline.seed, item, float(greedy[item, request]), float(outcome.drifted)))
    return pd.DataFrame(rows, columns=["seed", "item", "greedy", "drawn"])


def harmless_losses(main: pd.DataFrame) -> Headlines:
    """What each defence of chapter 9 takes away from harmless prompts, however it does so.

    "right answers to harmless prompts | system minus no defence": the difference of two shares, paired by
    prompt. A refusal and a wrong answer count alike, since a filter refuses and a veto makes wrong.

    Parameters
    ----------
    main:
        `evaluation.Frames.main`, of one world or several.
    """
    systems = [name for name in dict.fromkeys(main["system"]) if name != NO_DEFENCE]
    return {
        f"right answers to harmless prompts | {name} minus {NO_DEFENCE}": difference(
            main, name, NO_DEFENCE, "benign accuracy"
        )
        for name in systems
    }


def headlines(pipelines: Sequence[Pipeline]) -> Headlines:
    """What the claims page reads from data/results/claims.json; undefined where nothing drifted."""
    matches, windows = match_frame(pipelines), window_frame(pipelines)
    items = rarity_frame(pipelines)
    noise, right = matches[~matches["right"]], matches[matches["right"]]
    kept = windows[windows["kept"].astype(bool)]
    above = windows.assign(above=windows["bci"] > PAPER_TAU)
    draws = draw_frame(pipelines)
    return {
        "noisy matches removed by M <= 3": rate(noise, "removed") if len(noise) else UNDEFINED,
        "right matches removed by M <= 3": rate(right, "removed") if len(right) else UNDEFINED,
        "BCI of windows of drifting completions": _mean(windows, windows["bci"]),
        "BCI of windows of drifting completions, M <= 3": _mean(kept, kept["bci"]),
        "windows of drifting completions above tau": rate(above, "above") if len(above) else UNDEFINED,
        "rank correlation of copies with leaks": rank_correlation(items, "copies", "drift"),
        "rank correlation of BCI with leaks": rank_correlation(items, "bci", "drift"),
        "drift, greedy, the requests that are drawn": rate(draws, "greedy") if len(draws) else UNDEFINED,
        "drift, one of the draws minus greedy": _mean(draws, draws["drawn"] - draws["greedy"]),
    }


def _mean(frame: pd.DataFrame, values: pd.Series) -> Interval:
    return clustered_bootstrap(values.to_numpy(), clusters(frame)) if len(frame) else UNDEFINED


def publish_claims(device: str = "auto") -> None:
    """Measure `headlines` and `harmless_losses` on every seed of `full`; write data/results/claims.json."""

    @cache  # pooled and alone, a world is judged once
    def asked(pipeline: Pipeline) -> pd.DataFrame:
        return frames(pipeline, answers(pipeline)).main

    def measure(pipelines: Sequence[Pipeline]) -> Headlines:
        losses = harmless_losses(pd.concat([asked(pipeline) for pipeline in pipelines]))
        return {**headlines(pipelines), **losses}

    publish("claims", measure, device)
