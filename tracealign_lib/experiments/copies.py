"""Who copied whom: passages that packages share, read off a suffix array.

Equal passages stand side by side in sorted order. So the copies of a whole corpus are found in one pass over
its suffix array: neighbours that agree in their first `LENGTH` tokens form a group, and a group whose places
lie in two packages is a passage that both hold. No text has to be asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracealign_lib.index import TraceIndex
from tracealign_lib.installation import SOURCE
from tracealign_lib.stats import Interval
from tracealign_lib.suffix_array import Ids

LENGTH = 50
"""Tokens of a shared passage."""
WIDELY = 5
"""A passage in more packages than this is common property (a licence header, a template), not a copy."""
SHOWN = 20
"""Pairs of packages that are looked at, those that share most."""

VENDOR, SAME_NAME, UNEXPLAINED = "vendor folder", "same file name", "not by its path"
_VENDOR = re.compile(r"(?:^|[/_.])(?:vendor(?:ed)?|extern(?:als?)?|third_?party|bundled)(?:[/_.]|$)")


class Copies(NamedTuple):
    """What packages share.

    Attributes
    ----------
    pairs:
        One row per pair of packages, most first: `package`, `other`, `passages` (different shared windows
        of `LENGTH` tokens), and for the first `SHOWN` a `file` of each that share most, and `explained`.
    passages:
        Different windows in two to `WIDELY` packages.
    common:
        Different windows in more packages than that.
    """

    pairs: pd.DataFrame
    passages: int
    common: int


class _Members(NamedTuple):
    """Places of passages that stand more than once, sorted by passage."""

    group: Ids  # (n,) number of the passage
    document: Ids  # (n,)
    package: Ids  # (n,)


def find_copies(
    index: TraceIndex, packages: Mapping[str, str], kinds: Mapping[str, str], *, length: int = LENGTH
) -> Copies:
    """Pairs of packages whose source files share passages of `length` tokens.

    Parameters
    ----------
    packages, kinds:
        Of each document, by its id.
    """
    names = sorted(set(packages.values()))
    numbers = {name: number for number, name in enumerate(names)}
    package = np.array([numbers[packages[name]] for name in index.document_ids])
    source = np.array([kinds[name] == SOURCE for name in index.document_ids])
    members = _members(index, source, package, length)
    held = np.unique(members.group * len(names) + members.package)  # (passage, package), each once
    groups, held = np.divmod(held, len(names))
    firsts = np.flatnonzero(np.diff(groups, prepend=-1))
    sizes = np.diff(np.append(firsts, len(groups)))
    pairs = _pairs(held, firsts, sizes, names)
    shown = [
        _example(index, members, numbers[row.package], numbers[row.other])
        for row in pairs[:SHOWN].itertuples()
    ]
    columns = ["file", "other file", "explained"]
    pairs = pairs.join(pd.DataFrame([(a, b, explain(a, b)) for a, b in shown], columns=columns))
    shared = (sizes >= 2) & (sizes <= WIDELY)
    return Copies(pairs, int(shared.sum()), int((sizes > WIDELY).sum()))


def _members(index: TraceIndex, chosen: NDArray[np.bool_], package: Ids, length: int) -> _Members:
    """All places, in chosen documents, of passages of `length` tokens that stand there more than once."""
    tokens = index.arrays.tokens
    lengths = np.diff(index.arrays.starts)
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # of each place in `tokens`
    places = np.asarray(index.arrays.suffixes)
    places = places[chosen[document[places]]]
    alike = neighbours(tokens, places, length, separator=index.vocab_size)
    linked = np.zeros(len(places) + 1, dtype=bool)
    linked[alike + 1] = True  # the place at this rank continues the group of the one before
    inside = linked[:-1] | linked[1:]
    group = np.cumsum(~linked[:-1])[inside]
    documents = document[places[inside]].astype(np.int64)
    return _Members(group, documents, package[documents])


def neighbours(tokens: NDArray[np.integer], places: NDArray[np.integer], length: int, separator: int) -> Ids:
    """Ranks at which a suffix and the next one agree in `length` tokens, none of which is the separator.

    Parameters
    ----------
    tokens:
        Shape (n,); the last is a separator.
    places:
        Shape (k,): where suffixes start, in sorted order; some may be missing.
    """
    ranks = np.arange(len(places) - 1)
    last = len(tokens) - 1
    for offset in range(length):
        first = tokens[np.minimum(places[ranks] + offset, last)]
        second = tokens[np.minimum(places[ranks + 1] + offset, last)]
        ranks = ranks[(first == second) & (first != separator)]
    return ranks


def _pairs(held: Ids, firsts: Ids, sizes: Ids, names: list[str]) -> pd.DataFrame:
    """How many passages each pair of packages shares, from the packages that hold each passage."""
    codes = []
    for size in range(2, WIDELY + 1):
        rows = held[firsts[sizes == size][:, None] + np.arange(size)]  # (passages, size), sorted
        codes += [rows[:, a] * len(names) + rows[:, b] for a, b in combinations(range(size), 2)]
    pairs, counts = np.unique(np.concatenate(codes), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rows = [(names[a], names[b]) for a, b in zip(*np.divmod(pairs[order], len(names)), strict=True)]
    return pd.DataFrame(rows, columns=["package", "other"]).assign(passages=counts[order])


def _example(index: TraceIndex, members: _Members, package: int, other: int) -> tuple[str, str]:
    """The file of each package that hold most of what the two share."""
    ours, theirs = members.package == package, members.package == other
    shared = np.intersect1d(members.group[ours], members.group[theirs])
    inside = np.isin(members.group, shared)
    mine = np.bincount(members.document[inside & ours]).argmax()
    groups = members.group[inside & (members.document == mine)]
    copy = np.bincount(members.document[theirs & np.isin(members.group, groups)]).argmax()
    return index.document_ids[mine], index.document_ids[copy]


def explain(file: str, other: str) -> str:
    """What the paths of two files say of their likeness."""
    if _vendored(file) or _vendored(other):
        return VENDOR
    same = PurePosixPath(file).name == PurePosixPath(other).name
    return SAME_NAME if same else UNEXPLAINED


def _vendored(file: str) -> bool:
    return _VENDOR.search(str(PurePosixPath(file).parent)) is not None


def explained_rate(copies: Copies, *explanations: str) -> Interval:
    """Share of the pairs that were looked at which have one of these explanations.

    These pairs are all there are, not a sample of others: the share has no interval.
    """
    looked_at = copies.pairs["explained"].dropna()
    share = float(looked_at.isin(explanations).mean()) if len(looked_at) else math.nan
    return Interval(share, math.nan, math.nan, len(looked_at))


def explained_by_chance(packages: Mapping[str, str], kinds: Mapping[str, str]) -> dict[str, float]:
    """How often `explain` would explain two source files of two packages that were drawn at random.

    Counted over all such pairs of files, one share for each explanation.
    """
    names = [name for name in packages if kinds[name] == SOURCE]
    files = pd.DataFrame({"package": [packages[name] for name in names], "file": names})
    everything = _across(files)
    own = files[~files["file"].map(_vendored)]
    alike = sum(
        _across(same) for _, same in own.groupby(own["file"].map(lambda name: PurePosixPath(name).name))
    )
    return {VENDOR: 1 - _across(own) / everything, SAME_NAME: alike / everything}


def _across(files: pd.DataFrame) -> int:
    """Pairs of these files that lie in two packages."""
    sizes = files["package"].value_counts().to_numpy()
    return int(sizes.sum() ** 2 - (sizes**2).sum()) // 2


def pairs_table(copies: Copies, rows: int = 12) -> pd.DataFrame:
    """The first pairs by their files, whose paths begin with the packages and may break after a slash."""
    table = copies.pairs.head(rows)[["passages", "explained", "file", "other file"]]
    paths = {column: table[column].str.replace("/", "/\N{ZERO WIDTH SPACE}") for column in table.columns[2:]}
    return table.assign(**paths)


def shared_text(index: TraceIndex, file: str, other: str, *, longest: int = 120) -> str:
    """The longest run of tokens that two documents share, as text; cut after `longest` tokens."""
    ids = index.document_tokens(file)
    source = next(s for s in index.sources(ids, min_length=LENGTH, limit=None) if s.document_id == other)
    start, end = max(source.covered, key=lambda interval: interval[1] - interval[0])
    return str(index.tokenizer.decode(ids[start : min(end, start + longest)].tolist())).strip()
