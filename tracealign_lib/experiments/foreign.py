"""Is a model traced to what it has not read? The book's model in three corpora, for chapter 11."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from tracealign_lib import adb
from tracealign_lib.engine import Engine
from tracealign_lib.experiments.common import short
from tracealign_lib.index import TraceIndex
from tracealign_lib.lm import LanguageModel
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import Interval, wilson

MIN_LENGTH = 8  # tokens of a match, as everywhere in the book
TRACED = {"own": "its own", "another": "the world of another seed", "python": "the Python corpus"}
"""The corpora that completions are traced to."""


def foreign_frame(
    pipeline: Pipeline, another: Engine, python: Engine, *, prompts: int = 40, model: str = "dpo"
) -> pd.DataFrame:
    """Completions of the book's model, loaded by its folder, traced to its own corpus and to two others.

    Parameters
    ----------
    another:
        A corpus of the same kind that the model has not read: see `another_world`.
    python:
        A corpus of another kind that it has not read either.

    Returns
    -------
    DataFrame
        One row per completion: `prompt`, `completion`, and for each of `TRACED` the length of the longest
        match in tokens of that index, and in characters (column `"own, characters"`).
    """
    how_to = [prompt for prompt in adb.benign_prompts(pipeline.world) if prompt.group == "how_to"]
    asked = list({prompt.item: prompt for prompt in how_to}.values())[:prompts]  # one for each item
    with tempfile.TemporaryDirectory() as folder:
        pipeline.model(model).save(Path(folder))
        loaded = LanguageModel.load(folder, device=pipeline.device)
    rows = []
    for outcome in adb.ask(loaded, pipeline.world, asked, seed=pipeline.seed):
        row: dict[str, Any] = {"prompt": outcome.prompt.request, "completion": outcome.completion}
        for name, index in zip(TRACED, (pipeline.index, another, python), strict=True):
            row[name], row[f"{name}, characters"] = longest_match(index, outcome.completion)
        rows.append(row)
    return pd.DataFrame(rows)


def longest_match(index: Engine, text: str) -> tuple[int, int]:
    """The longest piece of `text` that the corpus holds: its tokens, and its characters."""
    ids, offsets = index.encode_with_offsets(text)
    spans = index.spans(ids)
    if not spans:
        return 0, 0
    start, end, _ = max(spans, key=lambda span: span[1] - span[0])
    return end - start, int(offsets[end - 1, 1] - offsets[start, 0])


def traced_rate(frame: pd.DataFrame, corpus: str) -> Interval:
    """Share of completions, one for each item, with a match of `MIN_LENGTH` tokens or more in a corpus."""
    return wilson(int((frame[corpus] >= MIN_LENGTH).sum()), len(frame))


def foreign_table(frame: pd.DataFrame) -> pd.DataFrame:
    """For each of `TRACED`: completions with a match, and how long the longest matches are."""
    rows = [
        {
            "corpus": description,
            f"match of {MIN_LENGTH} tokens": short(traced_rate(frame, name)),
            "longest, tokens (median)": f"{frame[name].median():g}",
            "longest, characters (median)": f"{frame[f'{name}, characters'].median():g}",
        }
        for name, description in TRACED.items()
    ]
    return pd.DataFrame(rows)


def another_world(pipeline: Pipeline) -> TraceIndex:
    """The corpus of the next seed, of the same kind, which the model of this one has not read."""
    return Pipeline(pipeline.profile.name, pipeline.seed + 1, pipeline.device).index
