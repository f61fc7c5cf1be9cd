"""The folder of an index: damage that is found, and builds that fail, are interrupted or are killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_samples import DOCUMENTS, small_index, train_tokenizer
from transformers import PreTrainedTokenizerFast

from tracealign_lib import files, index_writing, suffix_array
from tracealign_lib.documents import Document
from tracealign_lib.errors import IndexFormatError, ParameterError
from tracealign_lib.index import TraceIndex


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([document.text for document in DOCUMENTS])


@pytest.fixture
def built(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TraceIndex:
    return TraceIndex.build(DOCUMENTS, tokenizer, tmp_path / "a.index")


# ---------------------------------------------------------------------- damage


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def rehash(folder: Path, name: str) -> None:
    """Make the manifest vouch for a changed file, as somebody hostile would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    raw = (folder / name).read_bytes()
    manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def test_full_verification_finds_a_flipped_byte_in_every_file(built: TraceIndex) -> None:
    TraceIndex.open(built.path, verify="full")
    files = files_of(built.path)
    assert len(files) >= 10
    for path in files:
        raw = path.read_bytes()
        for position in {0, len(raw) // 3, len(raw) // 2, len(raw) - 1}:
            path.write_bytes(raw[:position] + bytes([raw[position] ^ 0x01]) + raw[position + 1 :])
            with pytest.raises(IndexFormatError) as caught:
                TraceIndex.open(built.path, verify="full")
            assert str(built.path) in str(caught.value)
            assert caught.value.mend
        path.write_bytes(raw)
    TraceIndex.open(built.path, verify="full")


def test_full_verification_finds_a_flip_of_any_byte_of_the_manifest(tmp_path: Path) -> None:
    folder = small_index(tmp_path / "i").path
    raw = (folder / "manifest.json").read_bytes()
    for position in range(len(raw)):
        (folder / "manifest.json").write_bytes(
            raw[:position] + bytes([raw[position] ^ 0x01]) + raw[position + 1 :]
        )
        with pytest.raises(IndexFormatError):
            TraceIndex.open(folder, verify="full")


def test_a_truncated_longer_or_missing_file_is_found_at_once(built: TraceIndex) -> None:
    for path in files_of(built.path):
        raw = path.read_bytes()
        for damaged in (b"", raw[:-1], raw[: len(raw) // 2], raw + b"\0"):
            path.write_bytes(damaged)
            with pytest.raises(IndexFormatError):
                TraceIndex.open(built.path)
        path.unlink()
        with pytest.raises(IndexFormatError):
            TraceIndex.open(built.path)
        path.write_bytes(raw)
    TraceIndex.open(built.path)


MANIFEST_CHANGES = [
    pytest.param({"magic": "OtherIndex"}, "not a TraceIndex", id="foreign"),
    pytest.param({"version": 3}, "version 3", id="newer version"),
    pytest.param({"version": True}, "version True", id="version of another type"),
    pytest.param({"byte_order": "big"}, "byte order 'big'", id="byte order"),
    pytest.param({"vocab_size": 5}, "unigram_counts", id="vocabulary"),
    pytest.param({"vocab_size": "4"}, "vocab_size is '4'", id="vocabulary of another type"),
    pytest.param({"vocab_size": 2**40}, "vocab_size is", id="vocabulary out of range"),
    pytest.param({"n_tokens": 21}, "tokens.npy is not", id="tokens"),
    pytest.param({"n_documents": 0}, "n_documents is 0", id="no documents"),
    pytest.param({"tokenizer_hash": 5}, "tokenizer_hash is 5", id="hash of another type"),
    pytest.param({"tokenizer_hash": "ab"}, "dtypes is", id="texts that are not there"),
    pytest.param({"dtypes": None}, "dtypes is None", id="no dtypes"),
    pytest.param({"files": {}}, "files are not", id="no files"),
    pytest.param({"files": {"../../etc/passwd": {}}}, "files are not", id="a path"),
    pytest.param({"extra": 1}, "has fields", id="an unknown field"),
]


@pytest.mark.parametrize(("change", "message"), MANIFEST_CHANGES)
def test_a_manifest_of_something_else(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = small_index(tmp_path / "i").path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(IndexFormatError, match=message):
        TraceIndex.open(tmp_path / "i")


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_not_one(tmp_path: Path, raw: bytes) -> None:
    path = small_index(tmp_path / "i").path / "manifest.json"
    path.write_bytes(raw)
    with pytest.raises(IndexFormatError):
        TraceIndex.open(tmp_path / "i")


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(IndexFormatError, match="no such folder"):
        TraceIndex.open(tmp_path / "nowhere")
    with pytest.raises(IndexFormatError, match=r"no manifest\.json"):
        TraceIndex.open(tmp_path)


def test_arrays_of_another_kind_are_not_read(tmp_path: Path) -> None:
    folder = small_index(tmp_path / "i").path
    path = folder / "unigram_counts.npy"
    sound = np.load(path)
    for array in (sound.astype(">i8"), sound.astype(np.float64), sound[:, None], sound[:-1], sound + 1):
        np.save(path, array)
        rehash(folder, path.name)
        with pytest.raises(IndexFormatError, match="unigram_counts"):
            TraceIndex.open(folder)
    np.save(path, np.array([{}, {}, {}, {}], dtype=object), allow_pickle=True)
    rehash(folder, path.name)
    with pytest.raises(IndexFormatError, match=r"not a \.npy array"):
        TraceIndex.open(folder)


def test_full_verification_checks_the_order_itself(tmp_path: Path) -> None:
    folder = small_index(tmp_path / "i").path
    tokens, starts = np.load(folder / "tokens.npy"), np.load(folder / "document_starts.npy")
    suffixes = np.load(folder / "suffixes.npy")

    def rest(place: int) -> list[int]:
        end = starts[np.searchsorted(starts, place, side="right")] - 1
        return tokens[place:end].tolist()  # type: ignore[no-any-return]

    found = 0
    for rank in range(len(suffixes) - 1):
        swapped = suffixes.copy()
        swapped[[rank, rank + 1]] = swapped[[rank + 1, rank]]
        np.save(folder / "suffixes.npy", swapped)
        rehash(folder, "suffixes.npy")
        if rest(suffixes[rank]) == rest(suffixes[rank + 1]):
            TraceIndex.open(folder, verify="full")
        else:
            found += 1
            with pytest.raises(IndexFormatError, match="not sorted"):
                TraceIndex.open(folder, verify="full")
    assert found > 10


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("suffixes.npy", lambda a: np.where(np.arange(len(a)) == 3, a[4], a)),
        ("suffixes.npy", lambda a: a - 1),
        ("suffixes.npy", lambda a: a + 1000),
        ("tokens.npy", lambda a: np.where(np.arange(len(a)) == 1, 4, a)),
        ("document_starts.npy", lambda a: a + np.array([0, 1, 0, 0, 0])),
        ("unigram_counts.npy", lambda a: a[[1, 0, 2, 3]]),
    ],
)
def test_full_verification_checks_what_the_arrays_say(tmp_path: Path, name: str, change: Any) -> None:
    folder = small_index(tmp_path / "i").path
    array = np.load(folder / name)
    np.save(folder / name, change(array).astype(array.dtype))
    rehash(folder, name)
    with pytest.raises(IndexFormatError, match=name):
        TraceIndex.open(folder, verify="full")


def test_a_tokenizer_that_was_exchanged_is_found(built: TraceIndex) -> None:
    other = train_tokenizer(["entirely other words, other words"] * 3)
    other.backend_tokenizer.save(str(built.path / "tokenizer" / "tokenizer.json"))
    rehash(built.path, "tokenizer/tokenizer.json")
    with pytest.raises(IndexFormatError, match="its tokenizer has hash"):
        TraceIndex.open(built.path).encode("other words")
    with pytest.raises(IndexFormatError, match="its tokenizer has hash"):
        TraceIndex.open(built.path, verify="full")


def test_damaged_suffixes_never_read_outside_the_corpus(tmp_path: Path) -> None:
    folder = small_index(tmp_path / "i").path
    sound = np.load(folder / "suffixes.npy")
    rng = np.random.default_rng(2)
    for scale in (10, 100, 2**31 - 1):
        for _ in range(30):
            garbage = rng.integers(-scale, scale, len(sound), endpoint=True).astype(sound.dtype)
            np.save(folder / "suffixes.npy", garbage)
            rehash(folder, "suffixes.npy")
            index = TraceIndex.open(folder)
            for query in (index.count, index.spans, index.locate, index.continuations, index.sources):
                try:
                    query([0, 1, 2, 0, 0, 1, 2, 2, 1])
                except IndexFormatError as error:
                    assert "suffixes.npy" in str(error)  # noqa: PT017


# ---------------------------------------------------------------------- interruption


def fail_on_call(function: Callable[..., Any], number: int, error: type[BaseException]) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return function(*args, **kwargs)

    return wrapped


STEPS = [
    (suffix_array, "divsufsort", 1),
    (np, "save", 1),
    (np, "save", 5),
    (index_writing, "_save_tokenizer", 1),
    (index_writing, "_write_manifest", 1),
    (files, "seal", 1),
    (files, "write_atomically", 1),
    (os, "fsync", 1),
    (os, "fsync", 9),
    (os, "replace", 1),  # the manifest into its name
    (os, "replace", 2),  # the older index aside
    (os, "replace", 3),  # the new one into its place
]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize(("module", "name", "number"), STEPS)
def test_an_interrupted_build_leaves_the_old_index_and_nothing_else(
    built: TraceIndex,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    number: int,
    error: type[BaseException],
) -> None:
    folder = built.path.parent
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail_on_call(getattr(module, name), number, error))
        with pytest.raises(error):
            TraceIndex.build([Document("new", "other text")], tokenizer, built.path)
    assert names_in(folder) == ["a.index"]
    assert TraceIndex.open(built.path, verify="full").document("signs") == DOCUMENTS[3]

    if name != "replace":
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail_on_call(getattr(module, name), number, error))
            with pytest.raises(error):
                TraceIndex.build([Document("new", "other text")], tokenizer, folder / "first.index")
        assert names_in(folder) == ["a.index"]


def test_a_build_replaces_an_index_whole(built: TraceIndex, tokenizer: PreTrainedTokenizerFast) -> None:
    TraceIndex.build_tokens([[0]], built.path, vocab_size=1)
    assert names_in(built.path.parent) == ["a.index"]
    assert not (built.path / "documents.jsonl").exists()
    assert TraceIndex.open(built.path, verify="full").n_tokens == 1
    (built.path / "manifest.json").write_text('{"magic": "TraceIndex", "version": 0}')
    TraceIndex.build(DOCUMENTS, tokenizer, built.path)
    assert TraceIndex.open(built.path, verify="full").n_documents == 4


def test_a_build_never_replaces_anything_but_an_index(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    TraceIndex.build_tokens([[0]], thesis, vocab_size=1)  # an empty folder may be filled
    shutil.copytree(thesis, tmp_path / "mixed")
    (tmp_path / "mixed" / "notes.txt").write_text("mine")
    shutil.copytree(thesis, tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").write_text('{"magic": "other"}')
    (tmp_path / "file").write_text("mine")
    for name in ("mixed", "foreign", "file"):
        with pytest.raises(ParameterError, match="not an index"):
            TraceIndex.build_tokens([[0, 0]], tmp_path / name, vocab_size=1)
    assert (tmp_path / "mixed" / "notes.txt").read_text() == "mine"
    assert names_in(tmp_path) == ["file", "foreign", "mixed", "thesis"]


# ---------------------------------------------------------------------- kill -9


# One process forks a child per moment, because the imports take longer than all the builds.
KILLED_BUILDS = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from tracealign_lib.index import TraceIndex

modules = {"os": os, "np": np}

def die_before(module, name, number):
    function, calls = getattr(module, name), 0
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(module, name, wrapped)

for moment in sys.argv[2:]:
    module, name, number = moment.split(".")
    child = os.fork()
    if child == 0:
        die_before(modules[module], name, int(number))
        TraceIndex.build_tokens([[3, 3]], Path(sys.argv[1]) / moment / "a.index", vocab_size=4)
        os._exit(0)
    print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

# Where a build is killed (before that call), and which index stands in its place then.
MOMENTS = {
    "np.save.1": "older",
    "np.save.4": "older",
    "os.fsync.3": "older",
    "os.replace.1": "older",  # without a manifest
    "os.replace.2": "older",  # complete
    "os.replace.3": "none",  # the older one aside, the new one not yet in its place
    "os.replace.4": "newer",  # the older one whole
    "os.unlink.1": "newer",  # the older one about to be deleted
    "os.unlink.3": "newer",  # the older one deleted in part
}


@pytest.fixture(scope="module")
def killed_builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    for moment in MOMENTS:
        small_index(root / moment / "a.index")
    command = [sys.executable, "-c", KILLED_BUILDS, str(root), *MOMENTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == [f"{moment} {-signal.SIGKILL}" for moment in MOMENTS], done.stderr
    return root


@pytest.fixture
def killed(killed_builds: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The index whose build was killed at `request.param`, and what that left, in a copy."""
    return Path(shutil.copytree(killed_builds / request.param, tmp_path / "killed")) / "a.index"


def which(path: Path) -> str:
    """The index at `path`, after checking every byte of it and its answers."""
    index = TraceIndex.open(path, verify="full")
    if index.n_documents == 1:
        assert (index.count([3]), index.count([0]), index.document_tokens("0").tolist()) == (2, 0, [3, 3])
        return "newer"
    documents = [index.document_tokens(name).tolist() for name in index.document_ids]
    assert [len(document) for document in documents] == [9, 0, 1, 12]
    assert [index.count([t]) for t in range(4)] == [sum(d.count(t) for d in documents) for t in range(4)]
    assert index.locate(documents[3]) == [("3", 0)]
    return "older"


@pytest.mark.parametrize(("killed", "expected"), MOMENTS.items(), indirect=["killed"])
def test_a_killed_build_loses_nothing(killed: Path, expected: str) -> None:
    left = [name for name in names_in(killed.parent) if name not in ("a.index", ".a.index.lock")]
    assert len(left) == (2 if expected == "none" else 1)
    for name in left:
        assert name.endswith(".partial") or which(killed.parent / name) == "older"  # never half of it
    if expected != "none":
        assert which(killed) == expected
        return
    with pytest.raises(IndexFormatError, match="stopped while it replaced") as caught:
        TraceIndex.open(killed)
    found = re.match(r"rename (\S+) to a\.index, or build", caught.value.mend or "")
    assert found
    assert found[1] in str(caught.value.given)
    (killed.parent / found[1]).rename(killed)
    assert which(killed) == "older"


@pytest.mark.parametrize("killed", MOMENTS, indirect=True)
def test_the_next_build_tidies_up_after_a_killed_one(killed: Path) -> None:
    TraceIndex.build_tokens([[3, 3]], killed, vocab_size=4)
    assert names_in(killed.parent) == ["a.index"]
    assert which(killed) == "newer"


@pytest.mark.parametrize(("killed", "expected"), MOMENTS.items(), indirect=["killed"])
def test_the_next_build_brings_the_older_index_back_before_it_can_fail(
    killed: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fail_on_call(np.save, 1, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            TraceIndex.build_tokens([[1]], killed, vocab_size=4)
    assert names_in(killed.parent) == ["a.index"]
    assert which(killed) == ("older" if expected == "none" else expected)


def leave(path: Path, process: int, started: int, suffix: str, content: list[list[int]]) -> Path:
    """What a build of `path` by that process would have left, had it been killed."""
    folder = path.with_name(f".{path.name}.{process}-{started}.{suffix}")
    TraceIndex.build_tokens(content, folder, vocab_size=4)
    return folder


def test_folders_of_a_build_at_work_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    now = time.time_ns()
    at_work = [leave(path, os.getpid(), now, suffix, [[0]]).name for suffix in ("old", "partial")]
    # the number of this process, but from before it started
    leave(path, os.getpid(), 10**9, "partial", [[0]])
    others = [
        "a.index.old",
        ".a.index.old",
        ".b.index.1-2.old",
        ".a.index.1-2.partial.txt",
        ".aXindex.1-2.old",
    ]
    for name in others:
        (tmp_path / name).touch()
    TraceIndex.build_tokens([[3, 3]], path, vocab_size=4)
    assert names_in(tmp_path) == sorted(["a.index", *at_work, *others])


def test_of_several_indexes_that_were_set_aside_the_latest_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.index"
    for started in (9, 11, 10):
        leave(path, os.getpid(), started, "old", [[started % 4] * started])
    with pytest.raises(IndexFormatError, match=rf"{os.getpid()}-11\.old"):
        TraceIndex.open(path)
    monkeypatch.setattr(np, "save", fail_on_call(np.save, 1, OSError))
    with pytest.raises(OSError):  # noqa: PT011
        TraceIndex.build_tokens([[1]], path, vocab_size=4)
    assert names_in(tmp_path) == ["a.index"]
    assert TraceIndex.open(path).n_tokens == 11


def test_an_older_index_that_cannot_be_moved_back_is_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_index(tmp_path / "a.index").path
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if target == path:
            raise OSError("the disk has gone")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="the disk has gone"):
            TraceIndex.build_tokens([[3, 3]], path, vocab_size=4)
    (left,) = names_in(tmp_path)
    with pytest.raises(IndexFormatError, match=re.escape(f"rename {left} to a.index")):
        TraceIndex.open(path)
    assert which(tmp_path / left) == "older"


def test_a_failed_deletion_of_the_older_index_is_made_good_by_the_next_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_index(tmp_path / "a.index").path
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_on_call(os.replace, 4, PermissionError))
        TraceIndex.build_tokens([[3, 3]], path, vocab_size=4)
    assert which(path) == "newer"
    left = [name for name in names_in(tmp_path) if name.endswith(".old")]
    assert len(left) == 1
    (tmp_path / left[0]).rename(tmp_path / re.sub(r"-\d+", "-1", left[0]))  # as if by an earlier process
    TraceIndex.build_tokens([[3, 3]], path, vocab_size=4)
    assert names_in(tmp_path) == ["a.index"]
