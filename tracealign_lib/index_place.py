"""Where an index stands: how a new one takes the place of an older one, and what killed builds leave.

A new index is written into `.<name>.<process>-<time>.partial` beside its place. An older index is then
moved aside, to the same name with `.old`; the new one takes its place; the older one is deleted. Each
move is one rename, so whatever kills the process, `.old` is a whole index. While nothing stands in its
place, `index_format` names it and says how to bring it back, and the next build brings it back before it
writes anything. That build also deletes what processes that have ended left unfinished; a process of
another machine counts as ended, so two machines must not build one path at the same time.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tracealign_lib import files


def put_in_place(folder: Path, target: Path) -> None:
    """Move a complete index to `target`, whose older index is deleted once the new one stands there."""
    old = target.with_name(f".{target.name}.{os.getpid()}-{time.time_ns()}.old")
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(folder, target)
        files.sync(target.parent)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        if target.exists():
            _discard(old)


def clear_leftovers(target: Path) -> None:
    """Undo what killed builds of `target` left: bring the older index back, delete the rest."""
    for path, process, started in leftovers(target):
        if not _has_ended(process, started):
            continue
        if path.suffix == ".partial":
            shutil.rmtree(path, ignore_errors=True)
        elif target.exists():
            _discard(path)
        else:
            os.replace(path, target)


def leftovers(target: Path) -> list[tuple[Path, int, int]]:
    """Folders beside `target`, the process that made each, and when (ns since 1970); latest first."""
    if not target.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-(\d+)\.(partial|old)")
    matches = ((path, pattern.fullmatch(path.name)) for path in target.parent.iterdir())
    found = [(path, int(match[1]), int(match[2])) for path, match in matches if match]
    return sorted(found, key=lambda leftover: leftover[2], reverse=True)


def is_on_its_way(folder: Path) -> bool:
    """Whether a build at work has moved the older index aside, and not yet put the new one in its place."""
    left = leftovers(folder.resolve())
    return any(path.suffix == ".old" and not _has_ended(*made) for path, *made in left)


def _has_ended(process: int, started: int) -> bool:
    """Whether the process that began a build at `started` (ns) has ended."""
    try:
        # the system gives the number of a process that has ended to a later one
        return bool(psutil.Process(process).create_time() > started / 1e9)
    except psutil.NoSuchProcess:
        return True


def _discard(old: Path) -> None:
    """Delete an index that was replaced, if it is there; `.old` must never be the name of half of one."""
    rubbish = old.with_suffix(".partial")
    with suppress(OSError):  # the next build tries again
        os.replace(old, rubbish)
        shutil.rmtree(rubbish, ignore_errors=True)
