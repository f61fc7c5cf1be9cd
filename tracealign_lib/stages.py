"""Built once, kept by content: the cache of worlds, tokenizers, models and indexes.

A chapter asks for what it needs (`stage.path()`) and gets a complete folder, from the cache or
built then and there. The name of the folder carries a key that covers the settings, the source
code that makes the stage, the keys of its inputs and the versions of the libraries that decide
the result, so that a changed library never serves a stale model.

A stage is built in `<name>-<key>.partial/` under an operating-system lock. A process that is
killed leaves that folder for the next one, so a trainer can resume from the checkpoint that it
keeps in its `scratch/`. The manifest is written last, and a rename makes the folder complete.

Several processes of one launch (see `launch`) may ask for stages, too. What a trainer builds is built by
all of them together; of anything else the first to come builds it, and the others wait for its lock.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import platformdirs
from filelock import FileLock, Timeout

from tracealign_lib import launch
from tracealign_lib.errors import CacheError, ParameterError
from tracealign_lib.files import seal, sync, write_atomically

CACHE_VARIABLE = "TRACEALIGN_CACHE"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SCRATCH = "scratch"

_MAGIC = "tracealign-stage"
_LIBRARIES = ("numpy", "torch", "transformers", "trl", "tokenizers", "numba", "pydivsufsort")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_FOLDER = re.compile(rf"(?P<name>{_NAME.pattern})-(?P<key>[0-9a-f]{{16}})(?P<partial>\.partial)?")
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_SECONDS_BEFORE_MESSAGE = 3.0

_sources: dict[str, tuple[ModuleSpec, str]] = {}


@dataclass(frozen=True, eq=False)
class Stage:
    """A folder that is built once for given settings, code, inputs and library versions.

    Parameters
    ----------
    name:
        Lower-case letters, digits, `_` and `-`; the first part of the folder's name.
    settings:
        JSON-serialisable values that decide the result. The order of keys does not matter.
    build:
        Fills the folder that it is given. After an interrupted build it is given the same folder
        again, with what was left in it. What it keeps in the subfolder `scratch/` (checkpoints) is
        deleted when the stage is complete.
    modules:
        Modules, or their names, whose source code makes the result, the one of `build` included.
    inputs:
        Stages that `build` reads; they are built first.
    together:
        Whether all processes of a launch run `build`, as a trainer has to be run: in the same folder, where
        the main one writes. All of them must then ask for the stage.

    Raises
    ------
    ParameterError
        The name is malformed, or a setting is not JSON.
    """

    name: str
    settings: Mapping[str, Any]
    build: Callable[[Path], None]
    modules: tuple[ModuleType | str, ...]
    inputs: tuple[Stage, ...] = ()
    together: bool = False
    _recipe: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_name(self.name)
        # Serialised at once, so that a mapping which the caller changes later cannot change the key.
        object.__setattr__(self, "_recipe", _canonical(self.settings, stage=self.name))

    @cached_property
    def key(self) -> str:
        """SHA-256 (hexadecimal) over the settings, sources, inputs and library versions.

        It says what was asked for: a chapter asks for a profile, a seed and a device, whoever trained the
        model. How many processes shared the work is not in it. They take the same batches in the same order,
        and what differs is how sums are rounded and how a batch's mean over tokens is taken; the manifest
        tells how many there were.
        """
        recipe = {
            "format": FORMAT_VERSION,
            "name": self.name,
            "settings": json.loads(self._recipe),
            "sources": sorted(_source_hash(module) for module in self.modules),
            "inputs": [stage.key for stage in self.inputs],
            "versions": library_versions(),
        }
        return hashlib.sha256(_canonical(recipe, stage=self.name).encode()).hexdigest()

    def is_cached(self) -> bool:
        """Whether the complete folder exists, sound or not; `path()` checks it."""
        return self._folder.exists()

    def path(self) -> Path:
        """The complete folder; built first when it is missing, inputs before it.

        Two processes that ask for the same missing stage build it once: the second waits, says so
        on stderr after three seconds, and uses the result. The processes of one launch build a stage that
        is built `together` at the same time.

        Raises
        ------
        CacheError
            The folder is damaged, or the cache cannot be written.
        """
        with nullcontext() if self.together else launch.alone():
            if not launch.agreed(self._folder.exists()):
                for stage in self.inputs:
                    stage.path()
                with _storage_errors(), _locked(self._folder) if launch.is_main() else nullcontext():
                    if not launch.agreed(self._folder.exists()):
                        self._build_locked()
        return _check_folder(self._folder, self)

    @property
    def _folder(self) -> Path:
        return cache_root() / f"{self.name}-{self.key[:16]}"

    def _build_locked(self) -> None:
        partial = _with_suffix(self._folder, ".partial")
        launch.once(lambda: _open(partial))
        self.build(partial)
        launch.once(lambda: self._complete(partial))

    def _complete(self, partial: Path) -> None:
        shutil.rmtree(partial / SCRATCH, ignore_errors=True)
        if (partial / MANIFEST).exists():
            raise CacheError(
                f"Stage {self.name} wrote a file that belongs to the cache.",
                given=MANIFEST,
                expected="any other name at the top of the folder",
                mend="let the build write into a subfolder",
            )
        _write_manifest(partial, self)
        os.replace(partial, self._folder)
        sync(self._folder.parent)


class StageEntry(NamedTuple):
    """One folder of the cache, as `list_stages` finds it."""

    name: str
    key: str  # the first 16 hexadecimal digits
    complete: bool  # False: an interrupted build that the next one resumes
    size: int  # bytes
    path: Path


def cache_root() -> Path:
    """The folder of the cache: `TRACEALIGN_CACHE`, or the user's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("tracealign")).expanduser()


def list_stages() -> list[StageEntry]:
    """The stages in the cache, complete and interrupted, sorted by name and key."""
    root = cache_root()
    if not root.is_dir():
        return []
    entries = []
    for path in sorted(root.iterdir()):
        match = _FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            entries.append(StageEntry(match["name"], match["key"], not match["partial"], _size(path), path))
    return entries


def cache_size() -> int:
    """Bytes that all stages in the cache take."""
    return sum(entry.size for entry in list_stages())


def clear(name: str | None = None) -> list[StageEntry]:
    """Remove the stages called `name`, or all of them, and return what was removed.

    Other files in the folder are left alone, and so are the empty lock files: to remove a lock
    that another process waits for would let two processes build the same stage.

    Raises
    ------
    ParameterError
        No stage has that name.
    CacheError
        Another process is building one of them, or a folder cannot be removed.
    """
    entries = list_stages()
    chosen = [entry for entry in entries if name in (None, entry.name)]
    if name is not None and not chosen:
        names = ", ".join(sorted({entry.name for entry in entries}))
        raise ParameterError(
            "The cache holds no stage of that name.",
            given=name,
            expected=f"one of {names}" if names else "nothing: the cache is empty",
            mend="see `tracealign cache list`",
        )
    for entry in chosen:
        folder = entry.path.with_name(f"{entry.name}-{entry.key}")
        with _storage_errors(), _locked(folder, wait=False):
            shutil.rmtree(entry.path)
    return chosen


@lru_cache(maxsize=1)
def library_versions() -> dict[str, str]:
    """Versions of Python (minor) and of the libraries that decide what a stage holds."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": python, **{library: version(library) for library in _LIBRARIES}}


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ParameterError(
            "A stage's name is malformed.",
            given=repr(name),
            expected="1 to 64 lower-case letters, digits, '_' or '-', a letter or digit first",
            mend="rename the stage",
        )


def _canonical(value: object, *, stage: str) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_as_mapping)
    except (TypeError, ValueError) as error:
        raise ParameterError(
            f"The settings of stage {stage} are not JSON.",
            given=str(error),
            expected="strings, finite numbers, booleans, None, and lists or mappings of them",
            mend="convert them, for example float(x) for a NumPy number",
        ) from error


def _as_mapping(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} of type {type(value).__name__}")


def _source_hash(module: ModuleType | str) -> str:
    """SHA-256 of a module's name and code, without its comments and docstrings, which decide no result.

    The source of a loaded module is read once: a file that is edited while the old code still runs
    must not lend its key to what the old code builds. A reload brings a new spec, and a new hash.
    """
    name = module if isinstance(module, str) else module.__name__
    loaded = sys.modules.get(name) if isinstance(module, str) else module
    spec = loaded.__spec__ if loaded is not None else _find_spec(name)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ParameterError(
            "A module of a stage has no source file.",
            given=name,
            expected="an importable module with a file",
            mend="check the name in `modules`",
        )
    known = _sources.get(name)
    if known is not None and known[0] is spec:
        return known[1]
    digest = hashlib.sha256(f"{name}\0{_code(Path(spec.origin))}".encode()).hexdigest()
    if loaded is not None:
        _sources[name] = (spec, digest)
    return digest


def _code(path: Path) -> str:
    """The module's syntax tree with its docstrings removed, as text."""
    tree = ast.parse(path.read_bytes())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _find_spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the package that should hold it is missing
        return None


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a stage; the operating system releases it when the process dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_with_suffix(folder, ".lock"))
    try:
        lock.acquire(timeout=_SECONDS_BEFORE_MESSAGE if wait else 0)
    except Timeout:
        if not wait:
            raise CacheError(
                "Another process is building this stage.",
                given=folder.name,
                expected="a stage that nobody is using",
                mend="wait until that process has finished, or stop it",
            ) from None
        print(f"Another process is building {folder.name}; waiting for it ...", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Turn a read-only or full cache folder into a `CacheError` that says how to choose another."""
    try:
        yield
    except CacheError:
        raise
    except Exception as error:
        if not _is_storage_error(error):
            raise
        raise CacheError(
            "The cache folder cannot be written.",
            given=f"{cache_root()}: {error}",
            expected="a folder on a disk with free space, in which you may write",
            mend=f"make room (`tracealign cache clear`), or set {CACHE_VARIABLE} to another folder",
        ) from error


def _is_storage_error(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is the cache's disk and not the build's own fault."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in _NO_SPACE or _concerns_root(error)):
            return True
        # Writers outside Python (safetensors, tokenizers) tell of a full disk in words only.
        if "no space left on device" in str(error).lower():
            return True
        error = error.__cause__
    return False


def _concerns_root(error: OSError) -> bool:
    if not isinstance(error.filename, str | os.PathLike):
        return False
    root, culprit = cache_root().absolute(), Path(error.filename).absolute()
    above = root.is_relative_to(culprit)
    if isinstance(error, NotADirectoryError | FileExistsError):  # a file where the cache folder should be
        return above
    return isinstance(error, PermissionError) and (above or culprit.is_relative_to(root))


def _open(partial: Path) -> None:
    partial.mkdir(exist_ok=True)
    # A process killed between the manifest and the rename leaves a manifest that proves nothing.
    (partial / MANIFEST).unlink(missing_ok=True)


def _write_manifest(folder: Path, stage: Stage) -> None:
    manifest = {
        "magic": _MAGIC,
        "version": FORMAT_VERSION,
        "name": stage.name,
        "key": stage.key,
        "settings": json.loads(stage._recipe),
        "inputs": {entry.name: entry.key for entry in stage.inputs},
        "versions": library_versions(),
        "processes": launch.processes(),
        "files": [{"path": path, **entry} for path, entry in seal(folder).items()],
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))


def _check_folder(folder: Path, stage: Stage) -> Path:
    """Return `folder` if its manifest is that of `stage` and every file has its size."""
    manifest = _read_manifest(folder, stage)
    for entry in manifest["files"]:
        path = folder / entry["path"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            found = "missing" if size is None else f"{size} bytes"
            raise _damaged(stage, f"{path}: {found}", f"{entry['size']} bytes")
    return folder


def _read_manifest(folder: Path, stage: Stage) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(stage, f"{path}: {error}", "a JSON manifest") from error
    wanted = {"magic": _MAGIC, "version": FORMAT_VERSION, "name": stage.name, "key": stage.key}
    found = {name: manifest.get(name) for name in wanted} if isinstance(manifest, dict) else {}
    if found != wanted:
        raise _damaged(stage, f"{path}: {found}", str(wanted))
    entries = manifest.get("files")
    if not isinstance(entries, list) or not all(_is_file_entry(entry) for entry in entries):
        raise _damaged(stage, f"{path}: no list of files", "a list of paths and sizes")
    return dict(manifest)


def _is_file_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict) and isinstance(entry.get("path"), str) and isinstance(entry.get("size"), int)
    )


def _damaged(stage: Stage, given: str, expected: str) -> CacheError:
    return CacheError(
        f"The cached stage {stage.name} is damaged.",
        given=given,
        expected=expected,
        mend=f"run `tracealign cache clear {stage.name}`; it is built again when it is next needed",
    )


def _size(folder: Path) -> int:
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except FileNotFoundError:  # a build in another process removes its temporary files meanwhile
            continue
    return sum(sizes)


def _with_suffix(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)
