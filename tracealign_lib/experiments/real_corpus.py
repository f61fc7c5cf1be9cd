"""What chapter 11 measures on a real corpus: the text of the reader's own Python installation.

Passages of known origin, whole, edited and shuffled, are traced back to their files. Licence sentences stand
in many packages at once. Packages hold copies of each other. And a model that has never read any of it must
not be traced to it.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tracealign_lib.attribution import Bm25Ranker, CoverRanker, MaximalSpanRanker, Ranker
from tracealign_lib.build_cost import Build, measure_build
from tracealign_lib.documents import Document
from tracealign_lib.experiments import copies as copying
from tracealign_lib.experiments.common import PAPER_MAX_COUNT, Headlines, Prediction, short, verdict
from tracealign_lib.experiments.copies import Copies, explained_by_chance, explained_rate, find_copies
from tracealign_lib.experiments.foreign import (
    MIN_LENGTH,
    another_world,
    foreign_frame,
    foreign_table,
    traced_rate,
)
from tracealign_lib.index import TraceIndex
from tracealign_lib.installation import (
    BUILD_COST,
    Installation,
    index_stage,
    load_tokenizer,
    tokenizer_stage,
)
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.profiles import get_profile
from tracealign_lib.progress import progress
from tracealign_lib.results import write_results
from tracealign_lib.stages import Stage
from tracealign_lib.stats import Interval, Paired, clustered_bootstrap, clustered_rate, mcnemar


class Size(NamedTuple):
    """How much a profile takes of the installation; limits are bytes of text."""

    limit: int
    vocabulary: int
    tokenizer: int  # bytes that the tokenizer is trained on
    passages: int
    rival: int  # bytes that BM25 searches


SIZES = {
    "smoke": Size(1_000_000, 2_000, 500_000, 20, 200_000),
    "laptop": Size(20_000_000, 8_000, 5_000_000, 150, 4_000_000),
    "full": Size(250_000_000, 32_000, 20_000_000, 400, 4_000_000),
    "gpu": Size(250_000_000, 32_000, 20_000_000, 400, 4_000_000),
}
PASSAGE = 60  # tokens
PART, SHARDS = 6, 5
"""Which part of the corpus is built twice, and into how many shards it is cut, about."""
WHOLE, EDITED = "word for word", "one word in ten replaced"
SHUFFLED, SCRAMBLED = "words shuffled", "tokens shuffled"
VARIANTS = (WHOLE, EDITED, SHUFFLED, SCRAMBLED)
COVER, PAPER_FILTER, BM25 = "cover", "spans, count <= 3 (paper)", "BM25 on a sample"

LONG_WORD = f"words shuffled, some word of {MIN_LENGTH} tokens"
NO_LONG_WORD = "words shuffled, no such word"

_WORD = re.compile(r"\S+")
_Tried = tuple[int, str, str]  # number of a passage, variant, text


@dataclass(frozen=True)
class RealCorpus:
    """The installation at the size of a profile, with its tokenizer and index, which the cache keeps."""

    installation: Installation
    size: Size

    @classmethod
    def of(cls, profile: str, installation: Installation | None = None) -> RealCorpus:
        """The corpus of a profile; `installation` is this Python's by default."""
        size = SIZES[get_profile(profile).name]
        return cls((installation or Installation.find()).sample(size.limit), size)

    @cached_property
    def _tokenizer(self) -> Stage:
        return tokenizer_stage(self.installation, self.size.vocabulary, self.size.tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        """A BPE tokenizer that was trained on a part of the corpus."""
        return load_tokenizer(self._tokenizer)

    @cached_property
    def index(self) -> TraceIndex:
        """The whole corpus in one index."""
        return TraceIndex.open(self._index.path() / "index")

    @cached_property
    def build(self) -> Build:
        """What it took to build `index`, when it was built."""
        return Build.read(self._index.path() / BUILD_COST)

    @cached_property
    def _index(self) -> Stage:
        return index_stage(self.installation, self._tokenizer)

    @cached_property
    def package(self) -> dict[str, str]:
        """The package of each document."""
        return {file.id: file.package for file in self.installation.files}

    @cached_property
    def kind(self) -> dict[str, str]:
        """The kind of each document."""
        return {file.id: file.kind for file in self.installation.files}


def describe(corpus: RealCorpus) -> pd.DataFrame:
    """Files and megabytes of each kind, as they were listed."""
    files = pd.DataFrame(corpus.installation.files)
    table = files.groupby("kind")["size"].agg(["count", "sum"]).reset_index()
    table["sum"] /= 1e6
    return table.rename(columns={"count": "files", "sum": "megabytes"})


# --- passages of known origin --------------------------------------------------------------------


class Passage(NamedTuple):
    """A run of text from a document of the corpus."""

    origin: str
    text: str


def draw_passages(corpus: RealCorpus, seed: int, n: int | None = None) -> list[Passage]:
    """`n` windows of `PASSAGE` tokens: each from a file drawn at random, at a place drawn at random.

    Files that are shorter, and windows that cut through a character, are drawn again.
    """
    index, rng = corpus.index, Random(f"{seed}/passages")
    passages: list[Passage] = []
    while len(passages) < (n or corpus.size.passages):
        origin = rng.choice(index.document_ids)
        ids = index.document_tokens(origin)
        if len(ids) < PASSAGE:
            continue
        start = rng.randrange(len(ids) - PASSAGE + 1)
        text = index.tokenizer.decode(ids[start : start + PASSAGE].tolist()).strip()
        if text and "\ufffd" not in text:
            passages.append(Passage(origin, text))
    return passages


def replace_words(text: str, pool: Sequence[str], rng: Random, share: float = 0.1) -> str:
    """`text` with that share of its words, at least one, replaced by words of `pool`; white space stays."""
    places = [match.span() for match in _WORD.finditer(text)]
    chosen = sorted(rng.sample(places, max(1, round(share * len(places)))), reverse=True)
    for start, end in chosen:
        text = text[:start] + rng.choice(pool) + text[end:]
    return text


def shuffle_words(text: str, rng: Random) -> str:
    """`text` with its words in another order; white space stays where it is."""
    words = _WORD.findall(text)
    rng.shuffle(words)
    following = iter(words)
    return _WORD.sub(lambda _: next(following), text)


def shuffle_tokens(text: str, tokenizer: Any, rng: Random) -> str:
    """`text` with its tokens in another order."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    rng.shuffle(ids)
    return str(tokenizer.decode(ids))


def passage_frame(corpus: RealCorpus, seed: int, passages: Sequence[Passage] | None = None) -> pd.DataFrame:
    """Every method asked for the first source of every passage, in every variant.

    Returns
    -------
    DataFrame
        One row per method, variant and passage: `seed`, `method`, `variant`, `origin` and its `package`,
        `long_word` (some word of the passage has `MIN_LENGTH` tokens by itself), `found` (the first source
        holds the whole passage as it was, so it is the origin or has an exact copy), `answered`, and `shared`
        (a second document scores as much as the first).
    """
    passages = passages or draw_passages(corpus, seed)
    tried = _variants(corpus, seed, passages)
    long_words = [_has_long_word(corpus.index, passage.text) for passage in passages]
    rows = []
    for method, ranker in _rankers(corpus, seed, passages).items():
        for number, variant, text in progress(tried, description=f"Tracing, {method}", unit="text"):
            origin, whole = passages[number]
            best = ranker.rank(text)[:2]
            rows.append(
                {
                    "seed": seed,
                    "method": method,
                    "variant": variant,
                    "origin": origin,
                    "package": corpus.package[origin],
                    "long_word": long_words[number],
                    "found": bool(best) and whole in corpus.index.document(best[0][0]).text,
                    "answered": bool(best),
                    "shared": len(best) == 2 and math.isclose(best[0][1], best[1][1]),
                }
            )
    return pd.DataFrame(rows)


def _variants(corpus: RealCorpus, seed: int, passages: Sequence[Passage]) -> list[_Tried]:
    rng = Random(f"{seed}/variants")
    pool = [word for passage in passages for word in _WORD.findall(passage.text)]
    tried: list[_Tried] = []
    for number, passage in enumerate(passages):
        tried.append((number, WHOLE, passage.text))
        tried.append((number, EDITED, replace_words(passage.text, pool, rng)))
        tried.append((number, SHUFFLED, shuffle_words(passage.text, rng)))
        tried.append((number, SCRAMBLED, shuffle_tokens(passage.text, corpus.tokenizer, rng)))
    return tried


def _has_long_word(index: TraceIndex, text: str) -> bool:
    return any(len(index.encode(f" {word}")) >= MIN_LENGTH for word in _WORD.findall(text))


def _rankers(corpus: RealCorpus, seed: int, passages: Sequence[Passage]) -> dict[str, Ranker]:
    return {
        COVER: CoverRanker(corpus.index, MIN_LENGTH),
        PAPER_FILTER: MaximalSpanRanker(corpus.index, MIN_LENGTH, PAPER_MAX_COUNT),
        BM25: Bm25Ranker(rival_documents(corpus, seed, passages)),
    }


def rival_documents(corpus: RealCorpus, seed: int, passages: Sequence[Passage]) -> list[Document]:
    """What BM25 searches: the origins, and other documents at random up to `size.rival` bytes."""
    names = list(dict.fromkeys(passage.origin for passage in passages))
    others = [file for file in corpus.installation.files if file.id not in set(names)]
    left = corpus.size.rival
    for file in Random(f"{seed}/rival").sample(others, len(others)):
        if file.size <= left and file.id in corpus.index:
            left -= file.size
            names.append(file.id)
    return [corpus.index.document(name) for name in sorted(names)]


def found_rate(frame: pd.DataFrame, method: str, variant: str) -> Interval:
    """Share of passages whose first source holds them; the interval draws packages as wholes."""
    return _by_package(_rows(frame, method, variant), "found")


def _rows(frame: pd.DataFrame, method: str, variant: str) -> pd.DataFrame:
    return frame[(frame["method"] == method) & (frame["variant"] == variant)]


def _by_package(rows: pd.DataFrame, column: str) -> Interval:
    """Share of the rows in which a column is true; passages of one package resemble each other."""
    return clustered_rate(rows[column].to_numpy(dtype=float), list(rows["package"]))


def passage_table(frame: pd.DataFrame) -> pd.DataFrame:
    """What each method found of each variant, how often it answered at all, and how often two were first."""
    rows = []
    for (method, variant), group in frame.groupby(["method", "variant"], sort=False):
        right = group.loc[group["answered"], "found"].mean()
        rows.append(
            {
                "method": method,
                "passage": variant,
                "found": short(_by_package(group, "found")),
                "answered": f"{group['answered'].mean():.2f}",
                "right if answered": "" if math.isnan(right) else f"{right:.2f}",
                "first place shared": f"{group['shared'].mean():.2f}",
            }
        )
    return pd.DataFrame(rows)


def misses(frame: pd.DataFrame) -> pd.DataFrame:
    """The passages that the cover ranking does not find word for word."""
    rows = _rows(frame, COVER, WHOLE)
    return rows[~rows["found"].astype(bool)]


def beside_bm25(frame: pd.DataFrame, variant: str = WHOLE) -> tuple[Interval, Paired]:
    """How many more of the same passages the cover ranking finds than BM25, as a share, and a test of that.

    In the test (McNemar's) each package has one vote, for the method that finds more of its passages.
    """
    cover, bm25 = (_rows(frame, method, variant)["found"].to_numpy(dtype=float) for method in (COVER, BM25))
    packages = list(_rows(frame, COVER, variant)["package"])
    return clustered_bootstrap(cover - bm25, packages), mcnemar(cover, bm25, packages)


def long_word_rates(frame: pd.DataFrame) -> Headlines:
    """What the cover ranking finds of shuffled words, with a word of `MIN_LENGTH` tokens and without."""
    rows = _rows(frame, COVER, SHUFFLED)
    groups = {LONG_WORD: rows[rows["long_word"]], NO_LONG_WORD: rows[~rows["long_word"]]}
    return {name: _by_package(group, "found") for name, group in groups.items() if len(group)}


def _rate(method: str, variant: str) -> Any:
    return lambda frame: found_rate(frame, method, variant)


PREDICTIONS = (
    Prediction(
        "a passage leads to its file, or to an exact copy",
        f"{COVER}, {WHOLE}",
        0.97,
        1.0,
        _rate(COVER, WHOLE),
    ),
    Prediction("so does an edited one, mostly", f"{COVER}, {EDITED}", 0.8, 1.0, _rate(COVER, EDITED)),
    Prediction(
        "shuffled words lead nowhere: it is the order that matches",
        f"{COVER}, {SHUFFLED}",
        0.0,
        0.1,
        _rate(COVER, SHUFFLED),
    ),
    Prediction(
        "shuffled tokens lead nowhere",
        f"{COVER}, {SCRAMBLED}",
        0.0,
        0.1,
        _rate(COVER, SCRAMBLED),
    ),
    Prediction(
        "the paper's filter loses what many files share",
        f"{PAPER_FILTER}, {WHOLE}",
        0.5,
        0.95,
        _rate(PAPER_FILTER, WHOLE),
    ),
    Prediction(
        "BM25 finds fewer, though it searches a part only", f"{BM25}, {WHOLE}", 0.4, 0.95, _rate(BM25, WHOLE)
    ),
    Prediction("BM25 does not see the order", f"{BM25}, {SHUFFLED}", 0.4, 0.95, _rate(BM25, SHUFFLED)),
)

TOLERANCES = {
    f"{COVER}, {WHOLE}": 0.03,
    f"{COVER}, {EDITED}": 0.05,
    f"{COVER}, {SHUFFLED}": 0.1,
    f"{COVER}, {SCRAMBLED}": 0.03,
    f"{PAPER_FILTER}, {WHOLE}": 0.05,
    f"{BM25}, {WHOLE}": 0.05,
    f"{BM25}, {SHUFFLED}": 0.05,
}
"""How far a smaller part of an installation may lie from the published shares."""


# --- licence sentences ---------------------------------------------------------------------------

SENTENCES = {
    "MIT": "Permission is hereby granted, free of charge, to any person obtaining a copy",
    "MIT, warranty": 'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND',
    "BSD": "Redistributions of source code must retain the above copyright notice",
    "BSD, warranty": "THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS",
    "Apache 2.0": "you may not use this file except in compliance with the License",
    "Apache 2.0, warranty": "distributed under the License is distributed on an",
    "MPL 2.0": "This Source Code Form is subject to the terms of the Mozilla Public",
    "GPL": "under the terms of the GNU General Public License as published by",
}
"""Each stands on one line in the usual layout of its licence."""
_BREAK = re.compile(r"[\s#*/;|]+")


class Licence(NamedTuple):
    """A sentence of a licence in the corpus: where the index finds it, and what it scores."""

    sentence: str
    occurrences: int
    documents: int
    packages: int
    any_layout: int  # packages that hold it however its lines are broken
    tokens: int
    surprisal: float  # nats


def count_licences(corpus: RealCorpus) -> list[Licence]:
    """Every sentence counted; its first word is left out, which is another token at the start of a line."""
    anywhere = _in_any_layout(corpus)
    found = []
    for name, sentence in SENTENCES.items():
        ids, offsets = corpus.index.encode_with_offsets(sentence)
        ids = ids[offsets[:, 0] >= sentence.index(" ")]
        places = corpus.index.locate(ids, limit=None)
        documents = {place.document_id for place in places}
        packages = {corpus.package[document] for document in documents}
        nats = float(corpus.index.surprisal[ids].sum())
        found.append(
            Licence(name, len(places), len(documents), len(packages), anywhere[name], len(ids), nats)
        )
    return found


def _in_any_layout(corpus: RealCorpus) -> dict[str, int]:
    """Packages of which some document holds a sentence, comment marks and line breaks read as spaces."""
    plain = {name: sentence.partition(" ")[2] for name, sentence in SENTENCES.items()}
    last_words = {sentence.split()[-1] for sentence in plain.values()}
    holders: dict[str, set[str]] = {name: set() for name in SENTENCES}
    for document in corpus.installation.documents():
        if any(word in document.text for word in last_words):
            text = _BREAK.sub(" ", document.text)
            for name, sentence in plain.items():
                if sentence in text:
                    holders[name].add(document.meta["package"])
    return {name: len(packages) for name, packages in holders.items()}


def draw_windows(corpus: RealCorpus, licences: Sequence[Licence], seed: int, n: int = 500) -> pd.DataFrame:
    """Random windows as long as the average sentence that occurs: `nats` a token, and `package`."""
    index, rng = corpus.index, Random(f"{seed}/windows")
    length = round(float(np.mean([licence.tokens for licence in licences if licence.occurrences])))
    rows: list[tuple[float, str]] = []
    while len(rows) < n:
        name = rng.choice(index.document_ids)
        ids = index.document_tokens(name)
        if len(ids) >= length:
            start = rng.randrange(len(ids) - length + 1)
            nats = float(index.surprisal[ids[start : start + length]].mean())
            rows.append((nats, corpus.package[name]))
    return pd.DataFrame(rows, columns=["nats", "package"])


def windows_below(windows: pd.DataFrame, licences: Sequence[Licence]) -> Interval:
    """Share of windows that have less surprisal a token than these sentences have on average."""
    bar = np.mean([licence.surprisal / licence.tokens for licence in licences if licence.occurrences])
    return _by_package(windows.assign(below=windows["nats"] < bar), "below")


def licence_table(licences: Sequence[Licence], windows: pd.DataFrame) -> pd.DataFrame:
    """`count_licences` as a table, with the windows below each sentence and what the paper's filter keeps."""
    rows = [
        {
            "sentence": licence.sentence,
            "n": licence.occurrences,
            "docs": licence.documents,
            "packages": licence.packages,
            "any layout": licence.any_layout,
            "nats": f"{licence.surprisal:.0f}",
            "a token": licence.surprisal / licence.tokens,
            "windows below": short(windows_below(windows, [licence])) if licence.occurrences else "",
            "kept": ("yes" if licence.occurrences <= PAPER_MAX_COUNT else "no")
            if licence.occurrences
            else "",
        }
        for licence in licences
    ]
    return pd.DataFrame(rows)


# --- predictions and publishing ------------------------------------------------------------------

GAIN = f"{COVER} minus {BM25}, {WHOLE}"
VOTES = f"packages in which {COVER} or {BM25} finds more"
VENDOR_RATE = "pairs explained by a vendor folder"
NAMED_RATE = "pairs explained by a vendor folder or the same file name"
BELOW = "random windows with less surprisal a token than licences"
OWN, PYTHON = "completions traced to their own corpus", "completions traced to the Python corpus"
ANOTHER = "completions traced to the world of another seed"
OTHER_PREDICTIONS = {VENDOR_RATE: (0.5, 1.0), NAMED_RATE: (0.8, 1.0), BELOW: (0.5, 1.0)} | {
    OWN: (0.8, 1.0),
    PYTHON: (0.0, 0.2),
    ANOTHER: (0.0, 0.5),
}
PREDICTED = {p.quantity: (p.low, p.high) for p in PREDICTIONS} | OTHER_PREDICTIONS
"""Headline -> lowest and highest value that was predicted."""


def headlines(frame: pd.DataFrame) -> Headlines:
    """The share of passages that each method finds, in each variant, as "method, variant"."""
    return {
        f"{method}, {variant}": found_rate(frame, method, variant)
        for method in frame["method"].unique()
        for variant in VARIANTS
    }


def other_headlines(below: Interval, copies: Copies, foreign: pd.DataFrame) -> Headlines:
    """What `OTHER_PREDICTIONS` speak of."""
    return {
        VENDOR_RATE: explained_rate(copies, copying.VENDOR),
        NAMED_RATE: explained_rate(copies, copying.VENDOR, copying.SAME_NAME),
        BELOW: below,
        OWN: traced_rate(foreign, "own"),
        PYTHON: traced_rate(foreign, "python"),
        ANOTHER: traced_rate(foreign, "another"),
    }


def verdicts(measured: Mapping[str, Any]) -> pd.DataFrame:
    """Those of these headlines of which something was predicted, beside what it was."""
    rows = [
        (name, f"{low:g} to {high:g}", str(measured[name]), verdict(measured[name], low, high))
        for name, (low, high) in PREDICTED.items()
        if name in measured
    ]
    return pd.DataFrame(rows, columns=["quantity", "predicted", "measured", "verdict"])


def measure(corpus: RealCorpus, pipelines: Sequence[Pipeline]) -> dict[str, Any]:
    """What chapter 11 publishes of a corpus; each seed draws its own passages and has its own model."""
    frames = {pipeline.seed: passage_frame(corpus, pipeline.seed) for pipeline in pipelines}
    frame = pd.concat(frames.values())
    foreign = pd.concat(
        [foreign_frame(pipeline, another_world(pipeline), corpus.index) for pipeline in pipelines]
    )
    licences = count_licences(corpus)
    windows = draw_windows(corpus, licences, pipelines[0].seed)
    copies = find_copies(corpus.index, corpus.package, corpus.kind)
    gain, votes = beside_bm25(frame)
    return {
        **headlines(frame),
        **long_word_rates(frame),
        **other_headlines(windows_below(windows, licences), copies, foreign),
        GAIN: gain,
        VOTES: votes,
        "missed word for word": len(misses(frame)),
        "of these with a shared first place": int(misses(frame)["shared"].sum()),
        "packages that passages come from": int(frame["package"].nunique()),
        "found and shared": passage_table(frame).to_dict("records"),
        "longest matches": foreign_table(foreign).to_dict("records"),
        "per seed": {str(seed): headlines(frame) for seed, frame in frames.items()},
        "licences": [
            {**licence._asdict(), "windows below": windows_below(windows, [licence])}
            for licence in licences
            if licence.occurrences
        ],
        "copies": copies.pairs.head(copying.SHOWN).to_dict("records"),
        "pairs of packages that share passages": len(copies.pairs),
        "pairs of files explained by chance": explained_by_chance(corpus.package, corpus.kind),
    }


def publish_real_corpus(device: str = "auto") -> None:
    """Measure chapter 11 at size `full` on this installation and write data/results/real-corpus.json."""
    start, profile = time.monotonic(), get_profile("full")
    corpus = RealCorpus.of(profile.name)
    pipelines = [Pipeline(profile.name, seed, device) for seed in profile.seeds]
    values = measure(corpus, pipelines)
    write_results(
        "real-corpus",
        {**values, "builds": [build._asdict() for build in [corpus.build, *_builds(corpus)]]},
        profile=profile.name,
        seeds=profile.seeds,
        settings={**corpus.size._asdict(), "packages": len(corpus.installation.packages)},
        device=pipelines[0].device,
        seconds=time.monotonic() - start,
    )


def _builds(corpus: RealCorpus) -> list[Build]:
    """A part of the corpus in shards, and in one piece, each built in a fresh process."""
    part = corpus.installation.sample(corpus.size.limit // PART)
    alone = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as folder, alone:
        return [
            alone.submit(
                measure_build, part.documents, corpus.tokenizer, Path(folder) / str(most), shard_bytes=most
            ).result()
            for most in (part.size // SHARDS, None)
        ]
