"""Files that are on the disk as a whole or not at all, and that a manifest can vouch for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file so that it is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def seal(folder: Path) -> dict[str, dict[str, Any]]:
    """Put everything inside `folder` onto the disk, and describe each file for a manifest.

    Returns
    -------
    dict
        Path relative to `folder`, with forward slashes -> `{"size": bytes, "sha256": hexadecimal}`,
        sorted by path.
    """
    entries = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            entries[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return entries


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal; the file is not held in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file, or a rename inside a folder, survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
