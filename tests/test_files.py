"""Atomic writes, and what a manifest says about a folder."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tracealign_lib import files


def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Device and inode of everything that is put onto the disk from now on."""
    seen = []

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        seen.append((status.st_dev, status.st_ino))

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


def test_a_text_is_written_as_utf_8_with_plain_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("older and longer")
    files.write_atomically(path, "naïve\n猫\r\n")
    assert path.read_bytes() == "naïve\n猫\r\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(error):
        files.write_atomically(path, "new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_a_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(path, "new \ud800")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_the_file_reaches_the_disk_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    events: list[str] = []
    replace = os.replace

    def fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    files.write_atomically(path, "new")
    assert events == ["file", "rename", "folder"]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    for content in (b"", b"abc", bytes(range(256)) * 5_000):
        (tmp_path / "a").write_bytes(content)
        assert files.sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_seal_describes_and_syncs_everything_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {"b.txt": b"two", "a/x/deep.bin": b"\0\1", "a/empty": b"", ".hidden": b"h"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "no files").mkdir()
    seen = synced(monkeypatch)
    entries = files.seal(tmp_path)
    assert list(entries) == [".hidden", "a/empty", "a/x/deep.bin", "b.txt"]
    assert entries["b.txt"] == {"size": 3, "sha256": hashlib.sha256(b"two").hexdigest()}
    assert [entry["size"] for entry in entries.values()] == [1, 0, 2, 3]
    assert set(seen) == {identity(path) for path in tmp_path.rglob("*")}


def test_sync_works_on_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()
    files.sync(tmp_path)
    files.sync(tmp_path / "a")
    seen = synced(monkeypatch)
    files.sync(tmp_path)
    files.sync(tmp_path / "a")
    assert seen == [identity(tmp_path), identity(tmp_path / "a")]
    with pytest.raises(FileNotFoundError):
        files.sync(tmp_path / "b")
