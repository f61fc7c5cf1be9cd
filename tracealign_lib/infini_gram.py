"""InfiniGramIndex: the calls of TraceIndex on an index of infini-gram, on this machine's disk.

infini-gram (arXiv 2401.17377) searches corpora of trillions of tokens from disk. Searching is left to its
engine, in C++, and sorting to its indexer, in Rust; what stands at a rank is read from the files
(`infini_gram_format`), in the order of the corpus. The package `infini-gram` belongs to the extra `scale`.

What its engine, version 2.6, gets wrong is gone around here, and tested:

- `creativity` and `attribute` miss a match where the rest of the text sorts before a whole shard; spans
  come from `infgram_prob` instead.
- `ntd` takes all occurrences for one continuation if the first and the last of them end a document;
  continuations are counted in the files instead.
- It tells the kinds of its files apart by looking for words like `table` anywhere in their path, and sorts
  shard 10 before shard 2; it is shown links with names of their own instead.
- It aborts the process where files do not fit together; they are checked before it sees them.
- Its indexer asks for 34 GB of memory for any shard whose ids need four bytes; such shards are sorted here.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracealign_lib import infini_gram_format
from tracealign_lib.documents import Document
from tracealign_lib.engine import (
    PLAIN,
    EngineError,
    Listed,
    Occurrence,
    Suffix,
    SuffixEngine,
    laplace_surprisal,
    no_texts,
    vocabulary_size,
)
from tracealign_lib.errors import CorpusError, ParameterError
from tracealign_lib.index_format import hash_tokenizer, load_tokenizer, parse_document
from tracealign_lib.index_writing import encode_record
from tracealign_lib.infini_gram_format import Row, Shard
from tracealign_lib.queries import check_ids, check_integer
from tracealign_lib.suffix_array import Ids

_BATCH = 256  # documents encoded at a time


class InfiniGramIndex(Listed, SuffixEngine):
    """An index of infini-gram on disk, with the calls and answers of `TraceIndex`.

    Make one with `build` or `build_tokens`, or `open` one that infini-gram has made. Documents keep the
    order of the corpus. A folder of unknown origin is opened with `verify="full"`: the engine trusts the
    pointers in its files.

    Attributes
    ----------
    path:
        The folder of the index.
    n_tokens:
        Size of the corpus; separators are not counted.
    n_documents:
        How many documents it has.
    n_shards:
        Into how many shards it is cut.
    engine:
        infini-gram's own engine, for what it offers beyond these calls.
    """

    reach = sys.maxsize

    def __init__(
        self, path: Path, shards: list[Shard], engine: Any, manifest: dict[str, Any] | None, tokenizer: Any
    ) -> None:
        self.path = path
        self.n_shards = len(shards)
        self.n_documents = sum(len(shard.starts) for shard in shards)
        self.n_tokens = sum(len(shard.tokens) for shard in shards) - self.n_documents
        self._shards, self.engine, self._manifest, self._tokenizer = shards, engine, manifest, tokenizer
        if manifest is None:
            self.vocab_size, self.tokenizer_hash = vocabulary_size(tokenizer), hash_tokenizer(tokenizer)
        else:
            self.vocab_size, self.tokenizer_hash = manifest["vocab_size"], manifest["tokenizer_hash"]

    def __repr__(self) -> str:
        return (
            f"InfiniGramIndex({str(self.path)!r}: {self.n_tokens:,} tokens, {self.n_documents:,} documents, "
            f"{self.n_shards} shards, vocabulary {self.vocab_size:,})"
        )

    # ------------------------------------------------------------------ making and opening

    @classmethod
    def build(
        cls,
        documents: Iterable[Document],
        tokenizer: Any,
        path: str | Path,
        *,
        shard_tokens: int = 10**8,
        jobs: int = 1,
    ) -> InfiniGramIndex:
        """Index `documents` with any fast tokenizer, and keep texts, metadata and tokenizer with them.

        Documents are read as they come, and a shard is written and sorted before the next one is read.
        The index is made in a folder beside `path` that takes its name once it is complete. A build that
        is killed outright leaves that folder, `.<name>.<process>-<time>.partial`, to be deleted.

        Parameters
        ----------
        documents:
            At least one, with unique ids; documents without text are allowed.
        tokenizer:
            A fast tokenizer of transformers.
        path:
            A new or empty folder.
        shard_tokens:
            A shard is closed before it would hold more tokens than this, separators included, or with
            its first document. Sorting takes 50 to 100 bytes of memory for each of them.
        jobs:
            Into how many parts a shard is cut that are sorted at the same time, where ids fit two bytes.

        Raises
        ------
        CorpusError
            No document, duplicate ids, or a record that cannot be written as JSON in UTF-8.
        EngineError
            infini-gram is not installed, or its indexer has failed.
        ModelError
            The tokenizer is not a fast one.
        ParameterError
            `path` is taken, or a number is below 1.
        """
        fingerprint = hash_tokenizer(tokenizer)
        rows = _encode(documents, tokenizer)
        target = infini_gram_format.build(
            rows, path, vocabulary_size(tokenizer), shard_tokens, jobs, (tokenizer, fingerprint)
        )
        return cls.open(target)

    @classmethod
    def build_tokens(
        cls,
        arrays: Iterable[ArrayLike],
        path: str | Path,
        *,
        vocab_size: int,
        document_ids: Sequence[str] | None = None,
        shard_tokens: int = 10**8,
        jobs: int = 1,
    ) -> InfiniGramIndex:
        """Index documents that are token ids already; no text and no tokenizer is stored.

        `document_ids` are unique names, one per document; `"0"`, `"1"`, ... by default. For the other
        parameters, and what is raised, see `build`; ids outside the vocabulary raise `VocabularyError`.
        """
        vocab_size = check_integer(vocab_size, "vocab_size", at_least=1)
        rows = _name_rows(arrays, document_ids, vocab_size)
        return cls.open(infini_gram_format.build(rows, path, vocab_size, shard_tokens, jobs, None))

    @classmethod
    def open(
        cls, path: str | Path, *, tokenizer: Any = None, verify: str = "manifest", load_to_ram: bool = False
    ) -> InfiniGramIndex:
        """Open an index; its files are memory-mapped, not read.

        Parameters
        ----------
        tokenizer:
            Needed for an index that infini-gram itself has made: the tokenizer it was made with.
            One that `build` has made brings its own.
        verify:
            `"manifest"` checks that the files are there and fit together. `"full"` also reads them: every
            pointer must lie within its shard, and files that the manifest knows must have its hashes.
        load_to_ram:
            Whether the engine holds its files in memory.

        Raises
        ------
        EngineError
            infini-gram is not installed.
        IndexFormatError
            The folder is missing, foreign, of another version, or damaged.
        ParameterError
            Unknown `verify`, or an index without a tokenizer of its own was opened without one.
        VocabularyError
            `tokenizer` is not the one of the index.
        """
        if verify not in ("manifest", "full"):
            raise ParameterError(
                "Unknown way to verify an index.",
                given=repr(verify),
                expected='"manifest" (quick) or "full" (reads everything)',
                mend="choose one of the two",
            )
        engine_class = infini_gram_format.load_module("engine").InfiniGramEngine
        folder = Path(path)
        manifest = infini_gram_format.read_manifest(folder)
        vocab_size = _vocabulary(manifest, tokenizer, folder)
        shards = infini_gram_format.read_shards(folder, infini_gram_format.token_dtype(vocab_size))
        if verify == "full":
            infini_gram_format.check_contents(folder, shards, manifest)
        with infini_gram_format.linked(folder, len(shards)) as links:
            engine = engine_class(
                links,
                eos_token_id=0,
                vocab_size=vocab_size,
                token_dtype=f"u{8 * shards[0].tokens.itemsize}",
                load_to_ram=load_to_ram,
            )
        index = cls(folder, shards, engine, manifest, tokenizer)
        if manifest is not None and tokenizer is not None:
            index.check_tokenizer(tokenizer)
        return index

    # ------------------------------------------------------------------ tokenizer and documents

    @cached_property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The stored tokenizer, the one that was given, or None for an index built from token ids."""
        if self._tokenizer is not None or self.tokenizer_hash is None:
            return self._tokenizer
        return load_tokenizer(self.path, self.tokenizer_hash)

    @cached_property
    def document_ids(self) -> tuple[str, ...]:
        """The ids of all documents, in corpus order; their numbers if infini-gram has made the index."""
        if self._manifest is None:
            return tuple(map(str, range(self.n_documents)))
        names = infini_gram_format.read_json(self.path / infini_gram_format.IDS, self.path)
        sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not sound or len(names) != self.n_documents:
            raise infini_gram_format.damaged(
                self.path, f"{infini_gram_format.IDS} does not list {self.n_documents} documents"
            )
        return tuple(names)

    def document(self, document_id: str) -> Document:
        """The stored document. Of an index of infini-gram's own: its decoded tokens, and its metadata.

        Raises
        ------
        CorpusError
            The index was built from token ids and holds no texts.
        ParameterError
            Unknown id.
        """
        number = self._number(document_id)
        if self.tokenizer_hash is None:
            raise no_texts(self.path)
        kept = self._ask("get_doc_by_ix", doc_ix=number, max_disp_len=1)["metadata"]
        if self._manifest is not None:
            return parse_document(kept.encode(), number, document_id, self.path)
        text = self.tokenizer.decode(self.document_tokens(document_id))
        return Document(document_id, text, parse_metadata(kept))

    def document_tokens(self, document_id: str) -> Ids:
        """The token ids of a document, shape (n,); `ParameterError` for an unknown id."""
        number = self._number(document_id)
        shard = next(shard for shard in reversed(self._shards) if shard.first <= number)
        return np.asarray(shard.document(number - shard.first), dtype=np.int64)

    # ------------------------------------------------------------------ queries

    @cached_property
    def surprisal(self) -> NDArray[np.float64]:
        """`-log p(t)` of each id, shape (vocab_size,), in nats; see `TraceIndex.surprisal`."""
        return laplace_surprisal(self._unigrams, self.n_tokens, self.vocab_size)

    def count(self, ids: ArrayLike) -> int:
        """How often `ids` occur, within one document each time; `n_tokens` for the empty sequence."""
        query = check_ids(ids, self.vocab_size, "query")
        return sum(high - low for _, low, high in self._segments(query)) if len(query) else self.n_tokens

    def locate(self, ids: ArrayLike, *, limit: int | None = 10) -> list[Occurrence]:
        """The first `limit` occurrences of `ids` in corpus order; all of them when `limit` is None."""
        query = check_ids(ids, self.vocab_size, "query")
        limit = self.n_tokens if limit is None else check_integer(limit, "limit", at_least=1)
        found: list[Occurrence] = []
        for shard, low, high in self._segments(query):
            places = shard.places(low, high)
            if not len(query):  # separators are no tokens of the corpus
                places = places[shard.tokens[places] < self.vocab_size]
            places = places[: limit - len(found)]
            numbers = shard.documents_at(places)
            offsets = places - shard.starts[numbers] // shard.tokens.itemsize - 1
            pairs = zip(numbers.tolist(), offsets.tolist(), strict=True)
            found += [Occurrence(self._name(shard.first + number), offset) for number, offset in pairs]
        return found

    def continuations(self, ids: ArrayLike) -> tuple[Ids, Ids]:
        """What follows the longest suffix of `ids` that the corpus holds; see `TraceIndex.continuations`."""
        query = check_ids(ids, self.vocab_size, "query")
        suffix = query[self._longest_suffix(query, 0, len(query)).start :]
        counts = self._unigrams if not len(suffix) else self._count_following(suffix)
        tokens = np.flatnonzero(counts)
        order = np.argsort(-counts[tokens], kind="stable")
        return tokens[order], counts[tokens[order]]

    @cached_property
    def _unigrams(self) -> Ids:
        """How often each id occurs, shape (vocab_size,)."""
        counts = [shard.unigrams(self.vocab_size) for shard in self._shards]
        return np.asarray(np.sum(counts, axis=0), dtype=np.int64)

    def _count_following(self, suffix: Ids) -> Ids:
        """How often each id follows `suffix`, shape (vocab_size,)."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for shard, low, high in self._segments(suffix):
            after = shard.places(low, high) + len(suffix)
            following = shard.tokens[after[after < len(shard.tokens)]]
            inside = following[following < self.vocab_size]  # a separator is no continuation
            counts += np.bincount(inside, minlength=self.vocab_size)
        return counts

    def _longest_suffix(self, query: Ids, start: int, end: int) -> Suffix:
        following = int(query[end]) if end < len(query) else 0
        found = self._ask("infgram_prob", prompt_ids=query[start:end].tolist(), cont_id=following)
        return Suffix(end - found["suffix_len"], found["prompt_cnt"], found["cont_cnt"])

    def _holders(self, query: Ids, length: int) -> Iterable[tuple[int, Ids]]:
        holders: dict[int, list[int]] = {}
        for start in range(len(query) - length + 1):
            for shard, low, high in self._segments(query[start : start + length]):
                numbers = np.unique(shard.documents_at(shard.places(low, high))) + shard.first
                for number in numbers.tolist():
                    holders.setdefault(number, []).append(start)
        return ((number, np.array(starts, dtype=np.int64)) for number, starts in holders.items())

    def _segments(self, query: Ids) -> list[tuple[Shard, int, int]]:
        """The shards that hold `query`, and the ranks `[low, high)` where they do."""
        found = self._ask("find", input_ids=query.tolist())["segment_by_shard"]
        pairs = zip(self._shards, found, strict=True)
        return [(shard, low, high) for shard, (low, high) in pairs if low < high]

    def _ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """An answer of the engine, which reports errors as answers."""
        answer: dict[str, Any] = getattr(self.engine, call)(**arguments)
        if "error" in answer:
            raise EngineError(
                "infini-gram refused a query.",
                given=f"{call}: {answer['error']}",
                expected="an answer",
                mend="report it to us: the query was checked before",
            )
        return answer


def parse_metadata(text: str | None) -> dict[str, Any]:
    """What infini-gram keeps of a document beside its tokens, as far as it is a JSON object."""
    try:
        content = json.loads(text or "{}")
    except (TypeError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _encode(documents: Iterable[Document], tokenizer: Any) -> Iterator[Row]:
    """Documents with their token ids; batches let the tokenizer use all cores."""
    source = iter(documents)
    while batch := list(itertools.islice(source, _BATCH)):
        records = [encode_record(document) for document in batch]  # before the tokenizer meets what it cannot
        encoded = tokenizer([document.text for document in batch], **PLAIN)["input_ids"]
        for document, record, ids in zip(batch, records, encoded, strict=True):
            yield Row(document.id, np.array(ids, dtype=np.int64), record)


def _name_rows(arrays: Iterable[ArrayLike], names: Sequence[str] | None, vocab_size: int) -> Iterator[Row]:
    given = map(str, itertools.count()) if names is None else iter(names)
    for number, ids in enumerate(arrays):
        name = next(given, None)
        if not isinstance(name, str):
            raise _unfit(f"no string for document {number}")
        yield Row(name, check_ids(ids, vocab_size, f"document {number}"), None)
    if names is not None and next(given, None) is not None:
        raise _unfit(f"{len(names)} ids for fewer documents")


def _unfit(problem: str) -> CorpusError:
    return CorpusError(
        "The document ids do not fit the documents.",
        given=problem,
        expected="one string per document",
        mend="leave document_ids out to number the documents",
    )


def _vocabulary(manifest: dict[str, Any] | None, tokenizer: Any, folder: Path) -> int:
    if manifest is not None:
        return check_integer(manifest["vocab_size"], "vocab_size", at_least=1)
    if tokenizer is None:
        raise ParameterError(
            "The index does not say what its token ids mean.",
            given=f"{folder}, which infini-gram itself has made",
            expected="the tokenizer it was made with",
            mend="InfiniGramIndex.open(path, tokenizer=...)",
        )
    hash_tokenizer(tokenizer)
    return vocabulary_size(tokenizer)
