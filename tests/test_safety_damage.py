"""A damaged index is refused by name or answers as before; nothing in its folder runs, hangs or crashes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_samples import build, lines_of, read_folder, tokenizer

from tracealign_lib.errors import IndexFormatError
from tracealign_lib.sharded import open_index

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does, and makes FIFOs")


# ---------------------------------------------------------------------- damaged folders


def damaged_folders(root: Path, end: int, **environment: str) -> tuple[Counter, int]:
    """What came of `end` damaged folders, opened quickly and in full; and the memory at the peak, bytes."""
    lines = lines_of("fuzz_damage.py", root, 0, end, **environment)
    made = {line["seed"]: line for line in lines if "done" in line}
    found = {line["seed"]: line for line in lines if "found" in line}
    assert found.keys() == made.keys() == set(range(end))
    faults = [(made[seed], line) for seed, line in found.items() if "fault" in line["found"] or line["ran"]]
    assert not faults, f"{len(faults)} faults, of which the first: {faults[0]}"
    counts = Counter((verify, what) for line in found.values() for verify, what in line["found"].items())
    return counts, lines[-1]["peak"]


def told(counts: Counter, n: int, peak: int) -> str:
    quick, full = ({w: counts[v, w] for w in ("refused", "same", "other")} for v in ("manifest", "full"))
    return (
        f"{n:,} damaged folders, opened in full: {full['refused']:,} refused by name, {full['same']:,} "
        f"identical answers, {full['other']} sound indexes of another corpus, all hashes written anew; "
        f"opened quickly: {quick['refused']:,} refused, {quick['same']:,} identical, {quick['other']:,} "
        f"other answers; 0 crashes, 0 hangs, nothing run, {peak / 2**20:.0f} MiB at the peak"
    )


@linux
def test_damaged_folders(tmp_path: Path, say: Any) -> None:
    counts, peak = damaged_folders(tmp_path, 500)
    say(told(counts, 500, peak))
    assert counts["full", "refused"] > 300
    assert counts["full", "same"] > 5
    assert counts["manifest", "other"] > 5  # the questions of a quickly opened one are asked


@linux
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("checked", [False, True], ids=["as installed", "with the bounds of arrays checked"])
def test_ten_thousand_damaged_folders(tmp_path: Path, say: Any, checked: bool) -> None:
    """`NUMBA_BOUNDSCHECK` makes compiled code raise where it would read outside an array."""
    bounds = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path / "numba")} if checked else {}
    counts, peak = damaged_folders(tmp_path, 10_000, **bounds)
    say(told(counts, 10_000, peak))
    assert counts["full", "same"] > 100


# ---------------------------------------------------------------------- single bytes


def flips(raw: bytes, patterns: tuple[int, ...]) -> Iterator[tuple[int, bytes]]:
    for position, byte in enumerate(raw):
        for pattern in patterns:
            yield position, raw[:position] + bytes([byte ^ pattern]) + raw[position + 1 :]


def missed_flips(folder: Path, names: list[str], patterns: tuple[int, ...]) -> tuple[int, list[str]]:
    """How many single bytes were changed, and those changes that a full verification did not find."""
    tried, missed = 0, []
    for name in names:
        raw = (folder / name).read_bytes()
        for position, changed in flips(raw, patterns):
            (folder / name).write_bytes(changed)
            tried += 1
            try:
                open_index(folder, verify="full")
                missed.append(f"{name}, byte {position}: {raw[position]:#x} to {changed[position]:#x}")
            except IndexFormatError:
                pass
        (folder / name).write_bytes(raw)
    open_index(folder, verify="full")
    return tried, missed


@pytest.mark.parametrize(
    "kind",
    ["ids", pytest.param("texts", marks=pytest.mark.slow), pytest.param("shards", marks=pytest.mark.slow)],
)
def test_full_verification_finds_every_changed_byte(kind: str, tmp_path: Path, say: Any) -> None:
    folder = build(kind, 1, tmp_path / "i", tokenizer()).path
    names = sorted(read_folder(folder))
    if kind == "shards":  # the files of a shard are those of `texts`
        names = [name for name in names if name.endswith("manifest.json")]
    tried, missed = missed_flips(folder, names, (0x01, 0xFF))
    say(f"{tried - len(missed):,} of {tried:,} changes of one byte were found ({kind}, {len(names)} files)")
    assert tried > 2000
    assert not missed


@pytest.mark.parametrize("kind", ["ids", "shards"])
def test_full_verification_finds_other_white_space(kind: str, tmp_path: Path, say: Any) -> None:
    """JSON says the same with a tab or a carriage return in place of a space or a line feed."""
    folder = build(kind, 1, tmp_path / "i", tokenizer()).path
    raw = (folder / "manifest.json").read_bytes()
    places = [i for i, byte in enumerate(raw) if byte in b" \n"][::3]
    missed = []
    for position in places:
        for other in b" \n\t\r".replace(raw[position : position + 1], b""):
            changed = raw[:position] + bytes([other]) + raw[position + 1 :]
            (folder / "manifest.json").write_bytes(changed)
            try:
                open_index(folder, verify="full")
                missed.append(position)
            except IndexFormatError:
                pass
    say(f"{3 * len(places) - len(missed)} of {3 * len(places)} changes of white space were found ({kind})")
    assert len(places) > 10
    assert not missed
