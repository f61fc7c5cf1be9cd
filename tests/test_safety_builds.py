"""What stands at a path when builds are killed, run out of disk, or replace it under its readers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fuzz_samples import answers, build, corpus, lines_of
from index_samples import train_tokenizer

from tracealign_lib.errors import IndexFormatError
from tracealign_lib.sharded import open_index

HERE = Path(__file__).parent
KINDS = pytest.mark.parametrize("kind", ["texts", "shards"])
posix = pytest.mark.skipif(os.name != "posix", reason="forks")


# ---------------------------------------------------------------------- kill -9


def check_kills(root: Path, kind: str, moments: int, say: Any) -> None:
    *kills, end = lines_of("fuzz_kill.py", root, kind, moments, 6)
    assert len(kills) == moments
    found = Counter("set aside" if k["where"] == "aside" else "newer" if k["new"] else "older" for k in kills)
    resumed = sum(k["kept"] > 0 for k in kills)
    killed = sum(k["killed"] for k in kills)
    say(
        f"{killed} of {moments} builds ({kind}, {end['duration']:.2f} s each, seed 6) were killed at random "
        f"moments: the older index stood {found['older']} times, the newer {found['newer']}, the older was "
        f"set aside and named {found['set aside']} times; {resumed} builds went on from finished shards; "
        "0 wrong answers"
    )
    assert killed >= moments / 5
    assert found["older"] >= 1


@posix
@KINDS
def test_builds_killed_at_random_moments(kind: str, tmp_path: Path, say: Any) -> None:
    check_kills(tmp_path, kind, 10, say)


@posix
@pytest.mark.slow
@KINDS
def test_fifty_builds_killed_at_random_moments(kind: str, tmp_path: Path, say: Any) -> None:
    check_kills(tmp_path, kind, 50, say)


# ---------------------------------------------------------------------- a full disk


def check_refusals(tried: list[dict[str, Any]], kind: str, where: str, say: Any) -> None:
    refused = [line["said"] for line in tried if line["said"]]
    say(
        f"{where}: {len(refused)} of {len(tried)} builds ({kind}) were refused by name; each time the older "
        f"index stood and answered as before; {len(tried) - len(refused)} had room"
    )
    assert len(tried) / 3 <= len(refused) < len(tried)
    for said in refused:
        assert "The index cannot be written." in said
        assert "bytes are free" in said
        assert "to mend:  free some space" in said
    assert any("are needed" in said for said in refused)


@posix
@KINDS
def test_files_that_may_not_grow(kind: str, tmp_path: Path, say: Any) -> None:
    tried = lines_of("fuzz_disk.py", tmp_path, kind, 12, 6)
    check_refusals(tried, kind, "Files limited in size", say)


def can_mount() -> bool:
    try:
        command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
@KINDS
def test_a_disk_that_is_full(kind: str, tmp_path: Path, say: Any) -> None:
    tried = lines_of("fuzz_disk.py", tmp_path, kind, 40, 6, "8m", before=("unshare", "-m"))
    check_refusals(tried, kind, "A small file system, nearly full or read-only", say)
    assert any("No space left on device" in line["said"] for line in tried if line["said"])
    assert "Read-only file system" in tried[-1]["said"]


# ---------------------------------------------------------------------- readers


@posix
@KINDS
def test_readers_keep_their_answers_while_the_index_is_replaced(kind: str, tmp_path: Path, say: Any) -> None:
    coders = [train_tokenizer([d.text for d in corpus(s)], vocab_size=280 + 10 * s) for s in (1, 2)]
    sound = [answers(build(kind, s, tmp_path / f"{s}.index", coders[s - 1])) for s in (1, 2)]
    path, stop = tmp_path / "a.index", tmp_path / "stop"
    (tmp_path / "sound.json").write_text(json.dumps(sound))
    build(kind, 2, path, coders[1])
    reader = subprocess.Popen(
        [sys.executable, str(HERE / "fuzz_reader.py"), path, tmp_path / "sound.json", stop],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "reading\n"
    replaced = 0
    while replaced < 20 or (not stop.with_suffix(".enough").exists() and replaced < 2000):  # a slow reader
        build(kind, 1 + replaced % 2, path, coders[replaced % 2])
        replaced += 1
    stop.touch()
    out, err = reader.communicate(timeout=120)
    assert reader.returncode == 0, err[-2000:]
    seen = Counter(json.loads(out))
    say(
        f"{replaced} replacements ({kind}): {seen['0']} + {seen['1']} answers of one whole index or the "
        f"other, {seen['wrong']} others; an index kept open answered as at first {seen['kept']} of "
        f"{seen['kept'] + seen['forgotten']} times"
    )
    assert seen["0"] > 1
    assert seen["1"] > 1
    assert seen["wrong"] == seen["forgotten"] == 0


def test_an_index_that_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both corpora have the same sizes, so a mixture of their files would open."""
    from tracealign_lib import index_format
    from tracealign_lib.index import TraceIndex

    corpora = [[[0, 1, 2, 3]], [[3, 2, 1, 0]]]
    path = TraceIndex.build_tokens(corpora[0], tmp_path / "a.index", vocab_size=4).path
    load, left = index_format._load_array, [1]

    def load_late(folder: Path, name: str, *rest: Any) -> Any:
        if name == "suffixes.npy" and left:
            left.pop()
            TraceIndex.build_tokens(corpora[1], path, vocab_size=4)
        return load(folder, name, *rest)

    monkeypatch.setattr(index_format, "_load_array", load_late)
    index = TraceIndex.open(path)
    assert index.document_tokens("0").tolist() == corpora[1][0]
    assert index.spans(corpora[1][0]) == [(0, 4, 1)]


@KINDS
def test_a_tokenizer_that_was_not_read_yet_stays_what_it_was(kind: str, tmp_path: Path) -> None:
    coders = [train_tokenizer([d.text for d in corpus(s)], vocab_size=280 + 10 * s) for s in (1, 2)]
    path = build(kind, 1, tmp_path / "a.index", coders[0]).path
    index = open_index(path)
    build(kind, 2, path, coders[1])
    assert index.encode("wake the orun").tolist() == coders[0].encode(
        "wake the orun", add_special_tokens=False
    )
    assert index.document("1/0") == corpus(1)[0]


# ---------------------------------------------------------------------- what a kill leaves of shards


def test_half_a_shard_that_was_being_deleted_does_not_keep_a_build_from_going_on(tmp_path: Path) -> None:
    coder = train_tokenizer([d.text for d in corpus(1)])
    path, half = tmp_path / "a.index", tmp_path / ".a.index.building"
    build("shards", 1, path, coder)
    plan = {"tokenizer_hash": open_index(path).tokenizer_hash, "shard_bytes": 600}
    path.rename(half)
    (half / "manifest.json").unlink()
    (half / "shard-00001" / "manifest.json").unlink()
    (half / ".shard-00009.1-2.partial").mkdir()  # of an attempt with more documents
    (half / ".shard-00009.lock").touch()
    from tracealign_lib import index_format, sharded

    plan = {"version": sharded.FORMAT_VERSION, "index_version": index_format.FORMAT_VERSION, **plan}
    (half / "plan.json").write_text(json.dumps(plan))
    kept = (half / "shard-00000").stat().st_ino
    build("shards", 1, path, coder)
    assert (path / "shard-00000").stat().st_ino == kept
    build("shards", 2, path, coder)  # it holds nothing that keeps it from being replaced
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.index"]
    assert open_index(path, verify="full").document_ids == tuple(d.id for d in corpus(2))


def test_a_manifest_that_names_fewer_shards_than_there_are(tmp_path: Path) -> None:
    path = build("shards", 1, tmp_path / "a.index", train_tokenizer([d.text for d in corpus(1)])).path
    content = json.loads((path / "manifest.json").read_text())
    content["shards"].popitem()
    (path / "manifest.json").write_text(json.dumps(content, indent=2))
    with pytest.raises(IndexFormatError, match="does not name all shards"):
        open_index(path)
