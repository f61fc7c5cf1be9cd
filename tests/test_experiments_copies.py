"""Copies between packages, found in a small corpus and by brute force."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib.experiments import copies
from tracealign_lib.index import TraceIndex
from tracealign_lib.installation import DATA, SOURCE


def build(path: Path, texts: dict[str, list[int]], vocab_size: int = 4) -> TraceIndex:
    return TraceIndex.build_tokens(
        list(texts.values()), path, vocab_size=vocab_size, document_ids=list(texts)
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=0, max_size=20), min_size=2, max_size=6), st.integers(1, 4)
)
def test_pairs_are_those_of_brute_force(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], length: int
) -> None:
    names = {f"p{number % 3}/{number}.py": text for number, text in enumerate(texts)}
    if not any(names.values()):
        return
    index = build(tmp_path_factory.mktemp("i") / "index", names)
    packages = {name: name.split("/")[0] for name in names}
    found = copies.find_copies(index, packages, dict.fromkeys(names, SOURCE), length=length)
    windows: dict[tuple[int, ...], set[str]] = {}
    for name, text in names.items():
        for start in range(len(text) - length + 1):
            windows.setdefault(tuple(text[start : start + length]), set()).add(packages[name])
    expected: dict[tuple[str, ...], int] = {}
    for held in windows.values():
        for pair in combinations(sorted(held), 2):
            expected[pair] = expected.get(pair, 0) + 1
    measured = {(row.package, row.other): row.passages for row in found.pairs.itertuples()}
    assert measured == expected
    assert found.passages == sum(len(held) > 1 for held in windows.values())


def test_only_source_files_count_and_the_example_is_named(tmp_path: Path) -> None:
    shared = Random(0).choices(range(4), k=80)
    texts = {
        "a/mill.py": shared,
        "a/other.py": [0, 1, 2],
        "b/_vendor/mill.py": [3, *shared],
        "c/mill.txt": shared,
    }
    index = build(tmp_path / "index", texts)
    packages = {name: name[0] for name in texts}
    kinds = {name: SOURCE if name.endswith(".py") else DATA for name in texts}
    found = copies.find_copies(index, packages, kinds)
    [row] = found.pairs.itertuples(index=False)
    assert tuple(row) == ("a", "b", 31, "a/mill.py", "b/_vendor/mill.py", copies.VENDOR)
    share, low, high, n = copies.explained_rate(found, copies.VENDOR)
    assert (share, n) == (1.0, 1)
    assert np.isnan([low, high]).all()  # all pairs were looked at: no interval
    assert copies.explained_rate(found, copies.SAME_NAME).estimate == 0.0
    [shown] = copies.pairs_table(found).itertuples(index=False)
    assert "package" not in shown._fields
    assert shown.file.replace("\N{ZERO WIDTH SPACE}", "") == "a/mill.py"


def test_what_many_packages_hold_is_common_property(tmp_path: Path) -> None:
    shared = Random(1).choices(range(4), k=60)
    texts = {f"{name}/a.py": shared for name in "abcdefg"}
    index = build(tmp_path / "index", texts)
    found = copies.find_copies(index, {n: n[0] for n in texts}, dict.fromkeys(texts, SOURCE))
    assert (len(found.pairs), found.passages, found.common) == (0, 0, 11)


def test_neighbours_do_not_cross_a_document() -> None:
    tokens = np.array([0, 1, 9, 0, 1, 9])
    places = np.array([0, 3, 1, 4])
    assert copies.neighbours(tokens, places, 2, separator=9).tolist() == [0]
    assert copies.neighbours(tokens, places, 3, separator=9).tolist() == []


@pytest.mark.parametrize(
    ("file", "other", "explanation"),
    [
        ("pip/_vendor/urllib3/x.py", "urllib3/x.py", copies.VENDOR),
        ("jedi/third_party/a.pyi", "mypy/b.pyi", copies.VENDOR),
        ("joblib/externals/loky/a.py", "loky/b.py", copies.VENDOR),
        ("a/queues.py", "b/queues.py", copies.SAME_NAME),
        ("a/vendors.py", "b/x.py", copies.UNEXPLAINED),
        ("a/internals/x.py", "b/y.py", copies.UNEXPLAINED),
        ("pip/_internal/x.py", "b/y.py", copies.UNEXPLAINED),
    ],
)
def test_what_paths_explain(file: str, other: str, explanation: str) -> None:
    assert copies.explain(file, other) == explanation


def test_chance_explains_what_all_pairs_of_files_show() -> None:
    names = ["a/x.py", "a/sub/x.py", "a/_vendor/y.py", "b/x.py", "b/y.py", "c/_vendor/x.py", "c/x.txt"]
    packages = {name: name[0] for name in names}
    kinds = {name: SOURCE if name.endswith(".py") else DATA for name in names}
    pairs = [
        copies.explain(one, two)
        for one, two in combinations([name for name in names if kinds[name] == SOURCE], 2)
        if packages[one] != packages[two]
    ]
    by_chance = copies.explained_by_chance(packages, kinds)
    expected = {how: pairs.count(how) / len(pairs) for how in (copies.VENDOR, copies.SAME_NAME)}
    assert by_chance == pytest.approx(expected)
    assert 0 < by_chance[copies.SAME_NAME] < by_chance[copies.VENDOR] < 1
