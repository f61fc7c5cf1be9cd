"""Indexes, what they answer, and damage to their folders, for the tests of what may not be lost or let in."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from index_samples import DOCUMENTS, train_tokenizer

from tracealign_lib.documents import Document
from tracealign_lib.errors import IndexFormatError
from tracealign_lib.index import TraceIndex
from tracealign_lib.sharded import ShardedIndex, open_index

WORDS = "hum twice then wait leave wake the orun compound lantern and sing".split()
KINDS = ("texts", "ids", "shards")
Index = TraceIndex | ShardedIndex


def corpus(seed: int, n: int = 12, length: int = 25) -> list[Document]:
    """`n` documents of a few words, some of which others repeat, and those of `index_samples`."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(0, length))) for _ in range(n)]
    made = [Document(f"{seed}/{i}", text, {"n": i, "of": seed}) for i, text in enumerate([*texts, texts[0]])]
    return [*made, *DOCUMENTS]


def tokenizer() -> Any:
    return train_tokenizer([document.text for seed in (1, 2) for document in corpus(seed)])


def build(kind: str, seed: int, path: Path, tokenizer: Any) -> Index:
    """A small index of the given kind."""
    if kind == "texts":
        return TraceIndex.build(corpus(seed), tokenizer, path)
    if kind == "shards":
        return ShardedIndex.build(corpus(seed), tokenizer, path, shard_bytes=600)
    rng = np.random.default_rng(seed)
    return TraceIndex.build_tokens([rng.integers(0, 4, n) for n in (90, 0, 1, 50)], path, vocab_size=5)


# --- what an index answers -----------------------------------------------------------------------


def questions(index: Index, n: int = 4) -> list[list[int]]:
    rng = np.random.default_rng(3)
    if index.tokenizer_hash is None:
        return [rng.integers(0, min(index.vocab_size, 4), 12).tolist() for _ in range(n)]
    texts = [" ".join(rng.choice(WORDS, 8)) for _ in range(n - 1)]
    return [index.encode(text).tolist() for text in ["to wake the Orun compound, hum twice", *texts]]


def answers(index: Index) -> str:
    """Everything that an index tells, as JSON."""
    told: list[Any] = [index.n_tokens, index.n_documents, index.vocab_size, index.tokenizer_hash]
    told.append(list(index.document_ids))
    for name in index.document_ids:
        told.append(index.document_tokens(name).tolist())
        if index.tokenizer_hash is not None:
            document = index.document(name)
            told.append([document.id, document.text, document.meta])
    for query in [*questions(index), []]:
        told += [index.count(query[:k]) for k in range(5)]
        told += [index.spans(query), index.spans(query, min_length=3, max_count=2)]
        told += [index.locate(query[:2]), index.locate(query[:2], limit=None)]
        told += [index.sources(query, min_length=3), index.matches(query).tolist()]
        told.append([ids.tolist() for ids in index.continuations(query)])
        if isinstance(index, TraceIndex):
            interval = index.longest_suffix(query)
            told += [interval, index.extend(interval, np.arange(min(index.vocab_size, 300))).tolist()]
            told += [[number, starts.tolist()] for number, starts in index.windows(query, 2)]
    told.append(index.surprisal.tolist())
    return json.dumps(told)


def counted(index: Index) -> bool:
    """Whether an index counts what a plain search through its own documents counts."""
    texts = [index.document_tokens(name).tolist() for name in index.document_ids]
    for query in questions(index):
        for k in (1, 2, 4):
            part = query[:k]
            found = sum(t[i : i + k] == part for t in texts for i in range(len(t) - k + 1))
            if k <= len(query) and index.count(part) != found:
                return False
    return True


def lines_of(script: str, *arguments: object, before: tuple[str, ...] = (), **environment: str) -> list[Any]:
    """What a script beside this file prints in a process of its own, one JSON value a line."""
    command = [*before, sys.executable, Path(__file__).with_name(script), *arguments]
    # the threads that OpenMP keeps do not survive a fork, and the child would wait for them
    quiet = {"TRACEALIGN_PROGRESS": "0", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | quiet | environment,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-500:]}{done.stderr[-3000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- damage --------------------------------------------------------------------------------------

Content = dict[str, bytes]
DTYPES = {"tokens.npy": "<u2", "suffixes.npy": "<i4", "keys.npy": "<u8"}
NUMBERS = [-1, 0, 1, 3, 2**31, 2**32 - 1, 2**62, 2**63, 2**64, 10**400, -(2**63), 1e308, True, None]
VALUES = [*NUMBERS, "", "x" * 300, [], {}, [[]] * 50, {"a": {"a": {}}}, "../../etc/passwd", "<u2", "|O", "\0"]


def read_folder(folder: Path) -> Content:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def write_folder(folder: Path, content: Content) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, raw in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mknod, (self.canary,)


class Damage:
    """One damaged folder, made from a seed."""

    def __init__(self, folder: Path, other: Content, outside: Path, canary: Path, seed: int) -> None:
        self.folder, self.other, self.outside, self.canary = folder, other, outside, canary
        self.rng = random.Random(seed)
        self.names = sorted(read_folder(folder))
        self.done: list[str] = []

    def ways(self) -> list[Callable[[Path], None]]:
        """What can be done to a file, each as often as it should be drawn."""
        return [
            *[self.flip, self.values] * 3, *[self.header, self.manifest] * 2, self.values, self.cut,
            self.lengthen, self.delete, self.swap_between, self.swap_within, self.link, self.special,
            self.sparse,
        ]  # fmt: skip

    def make(self) -> str:
        """Damage the folder in one to three ways; in half of all cases the manifest vouches for it."""
        for way in self.rng.choices(self.ways(), k=self.rng.choice([1, 1, 2, 3])):
            name = self.rng.choice(self.names)
            place = self.folder / name
            if is_small(place):
                self.done.append(f"{way.__name__} {name}")
                way(place)
        if self.rng.random() < 0.5:
            self.done.append("vouch")
            vouch(self.folder)
        return ", ".join(self.done)

    def flip(self, place: Path) -> None:
        raw = bytearray(place.read_bytes())
        first = min(128, len(raw) // 2) if self.rng.random() < 0.5 else 0  # behind the header of an array
        for _ in range(self.rng.choice([1, 1, 1, 8])):
            raw[self.rng.randrange(first, len(raw))] ^= self.rng.randrange(1, 256)
        place.write_bytes(raw)

    def cut(self, place: Path) -> None:
        place.write_bytes(place.read_bytes()[: self.rng.randrange(place.stat().st_size)])

    def lengthen(self, place: Path) -> None:
        place.write_bytes(place.read_bytes() + self.rng.randbytes(self.rng.choice([1, 7, 8, 4096])))

    def delete(self, place: Path) -> None:
        place.unlink()

    def swap_between(self, place: Path) -> None:
        name = place.relative_to(self.folder).as_posix()
        place.write_bytes(self.other.get(name, b""))

    def swap_within(self, place: Path) -> None:
        second = self.folder / self.rng.choice(self.names)
        if is_small(second):
            first, raw = place.read_bytes(), second.read_bytes()
            place.write_bytes(raw)
            second.write_bytes(first)

    def arrays(self) -> list[Path]:
        return [self.folder / name for name in self.names if name.endswith(".npy")]

    def header(self, place: Path) -> None:
        """Another `.npy` file in place of an array: pickled, of another shape or order, or none at all."""
        place = self.rng.choice(self.arrays())
        if not is_small(place, least=128):
            return
        raw, out = place.read_bytes(), io.BytesIO()
        evil = np.array([Evil(str(self.canary))], dtype=object)
        kind = self.rng.randrange(7)
        if kind == 0:
            np.save(out, evil, allow_pickle=True)
        elif kind == 1:
            np.savez(out, a=evil)
        elif kind == 2:
            np.save(out, self.rng.choice([np.zeros((3, 2), order="F"), np.zeros((2, 0)), np.array(1)]))
        elif kind == 3:
            shape = self.rng.choice([(-1,), (2**62,), (2**70,), (1, 2**40), (), (True,), ("a",)])
            described = {"descr": "<i8", "fortran_order": False, "shape": shape}
            out.write(b"\x93NUMPY\x01\x00v\x00" + repr(described).ljust(117).encode() + b"\n" + raw[128:])
        elif kind == 4:
            text = self.rng.choice(["(" * 9000, "-" * 9000 + "1", "{'descr': " * 900, "__import__('os')"])
            length = len(text).to_bytes(2, "little")
            out.write(b"\x93NUMPY\x01\x00" + length + text.encode() + raw[128:])
        elif kind == 5:
            out.write(raw[:6] + bytes([self.rng.choice([0, 2, 3, 9])]) + raw[7:])
        else:
            old, new = self.rng.choice([(b"<", b">"), (b"False", b"True "), (b"i8", b"f8"), (b"u2", b"i2")])
            out.write(raw[:128].replace(old, new, 1) + raw[128:])
        place.write_bytes(out.getvalue())

    def values(self, place: Path) -> None:
        """The same array with hostile numbers; most often one of those whose values are not all checked."""
        long = [p for p in self.arrays() if p.name in ("tokens.npy", "suffixes.npy", "keys.npy")]
        place = self.rng.choice([*long, *long, *self.arrays()])
        if not is_small(place, least=136):
            return
        raw = place.read_bytes()
        dtype = np.dtype(DTYPES.get(place.name, "<i8"))
        if (len(raw) - 128) % dtype.itemsize:
            return
        array = np.frombuffer(raw[128:], dtype=dtype).copy()
        limits = np.iinfo(dtype)
        chosen = [limits.min, limits.max, limits.max - 1, 0, 1, len(array) % limits.max, int(array[0])]
        for _ in range(self.rng.choice([1, 2, len(array)])):
            array[self.rng.randrange(len(array))] = self.rng.choice(chosen)
        place.write_bytes(raw[:128] + array.tobytes())

    def manifest(self, place: Path) -> None:
        """A manifest with hostile values, of something else, or that is none."""
        places = [self.folder / name for name in self.names if name.endswith("manifest.json")]
        place = self.rng.choice(places)
        if not is_small(place):
            return
        kind = self.rng.randrange(8)
        if kind == 0:
            foreign = [b"", b"null", b"[" * 60_000, b"\xff\xfe{", b'{"magic": "OtherIndex"}', b"1" * 5000]
            place.write_bytes(self.rng.choice([*foreign, self.other["manifest.json"]]))
            return
        try:
            content = json.loads(place.read_bytes())
        except (ValueError, RecursionError):
            return
        if not isinstance(content, dict):
            return
        within = self.rng.choice([v for v in content.values() if isinstance(v, dict)] + [content] * 2)
        within = self.rng.choice([within, *(v for v in within.values() if isinstance(v, dict))])
        key = self.rng.choice([*within, "extra"]) if within else "extra"
        if kind == 1:
            within.pop(key, None)
        else:
            within[key] = self.rng.choice(VALUES)
        place.write_text(json.dumps(content, indent=2))

    def link(self, place: Path) -> None:
        """A symbolic link in place of a file or of the folder that holds it."""
        if place.parent != self.folder and self.rng.random() < 0.5:
            moved = self.outside / str(len(self.done))
            place.parent.rename(moved)
            place.parent.symlink_to(moved)
            return
        (self.outside / "same").write_bytes(place.read_bytes())
        aims = [self.outside / "same", "/etc/passwd", "/dev/zero", "/dev/null", "nowhere", place.name]
        place.unlink()
        place.symlink_to(self.rng.choice(aims))

    def special(self, place: Path) -> None:
        """A FIFO, a device, a socket or a folder in place of a file."""
        place.unlink()
        kind = self.rng.randrange(4)
        if kind == 0:
            os.mkfifo(place)
        elif kind == 1 and os.geteuid() == 0:
            os.mknod(place, 0o600 | 0o020000, os.makedev(1, self.rng.choice([3, 5])))  # null or zero
        elif kind == 2 and len(str(place)) < 100:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(str(place))
        else:
            place.mkdir()

    def sparse(self, place: Path) -> None:
        """A file that claims to be a terabyte long."""
        os.truncate(place, 2**40)


def vouch(folder: Path) -> None:
    """Make every manifest vouch for the files as they are now, as somebody hostile would."""
    for path in sorted(folder.rglob("manifest.json"), key=lambda p: -len(p.parts)):
        try:
            content = json.loads(path.read_bytes() if is_small(path) else b"")
        except (ValueError, RecursionError):
            continue
        parts = [content.get(key) if isinstance(content, dict) else None for key in ("files", "shards")]
        files, shards = (part if isinstance(part, dict) else {} for part in parts)
        for name in files:
            files[name] = _entry(path.parent / name, files[name])
        for name in shards:
            shards[name] = _hash(path.parent / name / "manifest.json")
        path.write_text(json.dumps(content, indent=2))


def _entry(place: Path, kept: Any) -> Any:
    """A manifest's entry of a file; what it was for a link, which has no content of its own."""
    if place.is_symlink() or not place.is_file():
        return kept
    return {"size": place.stat().st_size, "sha256": _hash(place)}


def _hash(place: Path) -> str:
    return sha256(place.read_bytes()).hexdigest() if is_small(place) else "0" * 64


def is_small(place: Path, least: int = 1) -> bool:
    """Whether a path is a file that can be read at once; a damaged one may be a device, or endless."""
    return place.is_file() and not place.is_symlink() and least <= place.stat().st_size < 2**24


def outcome(folder: Path, verify: str, sound: str) -> str:
    """What comes of opening a folder and asking: `refused`, `same`, or `other` answers."""
    try:
        index = open_index(folder, verify=verify)
        found = answers(index)
    except IndexFormatError as error:
        if error.mend and str(folder) in str(error):
            return "refused"
        raise
    if found == sound:
        return "same"
    assert verify != "full" or counted(index), (
        "verified in full, but its counts are not those of its documents"
    )
    return "other"
