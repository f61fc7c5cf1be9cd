"""The text of this Python installation as a corpus: real, large, and on every reader's disk.

The standard library and all installed packages hold source code, documentation, licences and data: tens of
millions of tokens, with duplicates and copies as real corpora have them. Every document knows its package,
so an answer of an index can be checked. Nothing is downloaded, and no id names a folder of the machine.

What belongs to an installed package is what its `RECORD` lists (the packaging standard for installed
projects); of that, and of the standard library, files of known kinds are taken.
"""

from __future__ import annotations

import csv
import hashlib
import os
import platform
import stat
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tracealign_lib import lm
from tracealign_lib.build_cost import measure_build
from tracealign_lib.documents import Document
from tracealign_lib.errors import CorpusError
from tracealign_lib.index import INDEX_CODE
from tracealign_lib.queries import check_integer
from tracealign_lib.stages import Stage

LARGEST = 3_000_000
"""Bytes: larger files are left out, which are tables and bundles rather than texts."""
BUILD_COST = "build.json"
SOURCE, LICENCE, DATA, TEXT = "source", "licence", "data", "text"
PYTHON = "python"
"""The package of the standard library, and what its ids begin with."""

_SUFFIXES = {
    SOURCE: ".py .pyi .pyx .pxd .pxi .c .h .cc .cpp .hpp .cu .cuh .rs .f .f90 .js .ts .css .sh .cmake",
    DATA: ".json .csv .tsv .xml .yaml .yml .toml .ini .cfg .po .svg",
    TEXT: ".txt .md .rst .html",
}
_KINDS = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_LICENCES = ("license", "licence", "copying", "notice")
_TEXTS = ("METADATA", "README")
_PRIVATE = "direct_url.json"  # names the folder from which a package was installed
_INDEX_CODE = (*INDEX_CODE, "tracealign_lib.installation", "tracealign_lib.build_cost")


class InstalledFile(NamedTuple):
    """A file that may become a document; `id` is its path relative to the installation, `size` in bytes."""

    id: str
    path: Path
    size: int
    package: str
    version: str
    kind: str


@dataclass(frozen=True)
class Installation:
    """The texts of a Python installation; a sequence of files that are read when documents are asked for.

    Attributes
    ----------
    files:
        Sorted by id; ids are unique.
    private:
        Texts that hold one of these are left out: they would carry paths of this machine.
    """

    files: tuple[InstalledFile, ...]
    private: tuple[bytes, ...] = ()

    @classmethod
    def find(cls, library: Path | None = None, packages: Path | None = None) -> Installation:
        """List the files of an installation, without reading them.

        Links, files above `LARGEST`, empty files and files of unknown kind are left out.

        Parameters
        ----------
        library, packages:
            Folders of the standard library and of installed packages; those of this interpreter by default.

        Raises
        ------
        CorpusError
            There is no such file.
        """
        library = library or Path(sysconfig.get_paths()["stdlib"])
        packages = packages or Path(sysconfig.get_paths()["purelib"])
        found: dict[str, InstalledFile] = {}
        for file in chain(_standard_library(library), _installed(packages)):
            found.setdefault(file.id, file)
        if not found:
            raise CorpusError(
                "The Python installation holds no text.",
                given=f"{library} and {packages}",
                expected="a standard library, or packages with a RECORD",
                mend="use the Python that the book was installed with",
            )
        private = (os.fsencode(library.absolute()), os.fsencode(packages.absolute()))
        return cls(tuple(found[name] for name in sorted(found)), private)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def packages(self) -> tuple[str, ...]:
        """Names of the packages, sorted."""
        return tuple(sorted({file.package for file in self.files}))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over names, versions and sizes: another installation has another one."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.id}\0{file.version}\0{file.size}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def sample(self, limit: int, *, seed: int = 0) -> Installation:
        """A part of at most `limit` bytes in which every package has the same share, if it has that much.

        What a small package leaves of its share is divided among the others. Licences have a share of their
        own beside the other files of a package. Files are drawn by a hash of their *name*, so that files of
        one name, which may be copies, are drawn together; one that is larger than what is left is passed
        over.
        """
        limit = check_integer(limit, "limit")
        if self.size <= limit:
            return self
        cells: dict[tuple[str, bool], list[InstalledFile]] = defaultdict(list)
        for file in self.files:
            cells[file.package, file.kind == LICENCE].append(file)
        share = _equal_share([sum(file.size for file in cell) for cell in cells.values()], limit)
        taken = (file for cell in cells.values() for file in _draw(cell, share, seed))
        return Installation(tuple(sorted(taken)), self.private)

    def documents(self) -> Iterator[Document]:
        """The texts, one at a time, in the order of their ids.

        Left out are files that are not UTF-8, hold a NUL, have gone, or hold a path of this installation.
        `meta` has "package", "version", "kind", and "file", which is the id.
        """
        for file in self.files:
            text = _read(file.path, self.private)
            if text is not None:
                meta = {"package": file.package, "version": file.version, "kind": file.kind, "file": file.id}
                yield Document(file.id, text, meta)


# --- stages --------------------------------------------------------------------------------------


def tokenizer_stage(installation: Installation, vocab_size: int, limit: int) -> Stage:
    """A byte-level BPE tokenizer, trained on a sample of `limit` bytes; see `load_tokenizer`."""

    def build(folder: Path) -> None:
        texts = (document.text for document in installation.sample(limit).documents())
        lm.train_tokenizer(texts, vocab_size).save_pretrained(folder)

    settings = {"files": installation.fingerprint, "vocab_size": vocab_size, "limit": limit}
    code = ("tracealign_lib.installation", "tracealign_lib.lm")
    return Stage("python-tokenizer", settings, build, code)


def index_stage(installation: Installation, tokenizer: Stage) -> Stage:
    """A `TraceIndex` of all texts in its folder `index`; beside it, in `BUILD_COST`, what making it took."""

    def build(folder: Path) -> None:
        texts, path = installation.documents, folder / "index"
        measure_build(texts, load_tokenizer(tokenizer), path).write(folder / BUILD_COST)

    settings = {"files": installation.fingerprint}
    return Stage("python-index", settings, build, _INDEX_CODE, (tokenizer,))


def load_tokenizer(stage: Stage) -> PreTrainedTokenizerBase:
    """The tokenizer of a `tokenizer_stage`, which is trained if it was not yet."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(stage.path())
    return tokenizer


# --- files ---------------------------------------------------------------------------------------


def _standard_library(folder: Path) -> Iterator[InstalledFile]:
    version = platform.python_version()
    for parent, folders, names in os.walk(folder):
        kept = {"site-packages", "dist-packages", "__pycache__"}
        folders[:] = sorted(name for name in folders if name not in kept)
        for name in names:
            path = Path(parent, name)
            file_id = f"{PYTHON}/{path.relative_to(folder).as_posix()}"
            yield from _listed(file_id, path, PYTHON, version)


def _installed(folder: Path) -> Iterator[InstalledFile]:
    for record in sorted(folder.glob("*.dist-info/RECORD")):
        package, _, version = record.parent.name.removesuffix(".dist-info").rpartition("-")
        with record.open(encoding="utf-8", errors="replace", newline="") as lines:
            for row in csv.reader(lines):
                if row and ".." not in row[0].split("/"):
                    yield from _listed(row[0], folder / row[0], package, version)


def _listed(file_id: str, path: Path, package: str, version: str) -> Iterator[InstalledFile]:
    """The file, if it is one that can be read as text."""
    kind = _kind(file_id)
    if kind is None:
        return
    try:
        status = path.lstat()
    except OSError:
        return
    if stat.S_ISREG(status.st_mode) and 0 < status.st_size <= LARGEST:
        yield InstalledFile(file_id, path, status.st_size, package, version, kind)


def _kind(file_id: str) -> str | None:
    name, kind = PurePosixPath(file_id).name, _KINDS.get(PurePosixPath(file_id).suffix.lower())
    if name == _PRIVATE:
        return None
    if kind in (TEXT, None) and name.lower().startswith(_LICENCES) and not name.endswith((".pyc", ".so")):
        return LICENCE
    return TEXT if name in _TEXTS else kind


def _read(path: Path, private: Iterable[bytes]) -> str | None:
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text or any(place in raw for place in private) else text


def _equal_share(sizes: list[int], limit: int) -> float:
    """The share with which `limit` is used up when everyone takes it, or what they have if that is less."""
    left = float(limit)
    for taken, size in enumerate(sorted(sizes)):
        share = left / (len(sizes) - taken)
        if size > share:
            return share
        left -= size
    return float(max(sizes))


def _draw(files: list[InstalledFile], share: float, seed: int) -> Iterator[InstalledFile]:
    def rank(file: InstalledFile) -> tuple[bytes, str]:
        name = PurePosixPath(file.id).name
        return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest(), file.id

    for file in sorted(files, key=rank):
        if file.size <= share:
            share -= file.size
            yield file
