"""InfiniGramAPI: the calls of TraceIndex on the corpora that the public web service of infini-gram serves.

So a completion of OLMo 2 is traced to what the model was really trained on. The service
(https://api.infini-gram.io, documented at https://infini-gram.readthedocs.io) takes one small query a
request; what is asked here is chosen so that few are needed, and every answer is kept on disk. Requests
are spaced, wait at most a given time, and are repeated after a failure, with growing random pauses.

How many requests a call makes, before the cache saves any:

- `count`: one. `continuations`: one, an estimate where the suffix occurs more than 1,000 times.
- `spans`: one for a text that the corpus holds as a whole, at most 2 n / min_length for n tokens without a
  match, and never more than n; the counts come with them.
- `locate`: one, and one for each occurrence, of which at most `max_occurrences` are looked at.
- `sources`: those of `spans`, those of `locate` for each span, and one for each id within the spans.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import requests
from numpy.typing import ArrayLike, NDArray
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from tracealign_lib import stages
from tracealign_lib.documents import Document
from tracealign_lib.engine import (
    EngineError,
    Occurrence,
    Suffix,
    SuffixEngine,
    laplace_surprisal,
    vocabulary_size,
)
from tracealign_lib.errors import ParameterError
from tracealign_lib.files import write_atomically
from tracealign_lib.index_format import hash_tokenizer
from tracealign_lib.infini_gram import parse_metadata
from tracealign_lib.ngram import check_positive
from tracealign_lib.queries import check_ids, check_integer
from tracealign_lib.suffix_array import Ids

URL = "https://api.infini-gram.io/"
OLMO_2 = "v4_olmo-2-0325-32b-instruct_llama"
"""The training data of OLMo 2 32B Instruct, 4.6 trillion tokens of the Llama 2 tokenizer."""

T = TypeVar("T")

_QUERY_TOKENS = 500  # what the service takes at once
_SUPPORT = 1000  # occurrences it looks at for continuations
_LONGEST_PAUSE = 60  # seconds, also when the service asks for more
_BUSY = (429, 500, 502, 503, 504)


class Client:
    """Asks one web service, politely, and remembers what it said.

    Parameters
    ----------
    url:
        Where queries are posted, as JSON.
    cache:
        Folder of the answers: a JSON file each, named by the SHA-256 of address and query.
    timeout:
        Seconds to wait for a connection, and between two pieces of an answer.
    retries:
        How often a query is repeated when the service is busy, fails or falls silent. A connection that
        cannot be made at all is tried twice only.
    backoff:
        Seconds; the second repetition waits twice as long, each further one twice as long again, and up
        to `backoff` longer at random. A pause that the service asks for is kept, up to a minute.
    requests_per_second:
        Requests start at least the inverse of this apart.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        *,
        timeout: float,
        retries: int,
        backoff: float,
        requests_per_second: float,
    ) -> None:
        self.url = url
        self.cache = cache
        self.n_requests = 0
        self._timeout = check_positive(timeout, "timeout")
        self._interval = 1 / check_positive(requests_per_second, "requests_per_second")
        self._next = 0.0  # when the next request may start, on the monotonic clock
        repeat = Retry(
            total=check_integer(retries, "retries", at_least=0),
            connect=min(retries, 1),
            redirect=0,
            status_forcelist=_BUSY,
            allowed_methods=None,
            raise_on_status=False,
            backoff_factor=check_positive(backoff, "backoff"),
            backoff_jitter=backoff,
            backoff_max=_LONGEST_PAUSE,
            retry_after_max=_LONGEST_PAUSE,
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=repeat))

    def ask(self, query: Mapping[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """What `read` makes of the answer to a query, from the cache or from the service.

        An answer is kept once `read`, which raises `EngineError` for a broken one, has accepted it.

        Raises
        ------
        EngineError
            The service cannot be reached, refuses the query, or answers with something else than JSON.
        """
        asked = json.dumps(query, sort_keys=True)
        path = self.cache / f"{hashlib.sha256(f'{self.url} {asked}'.encode()).hexdigest()}.json"
        kept = _read_kept(path, query)
        if kept is not None:
            with suppress(EngineError):
                return read(kept)
        answer = self._post(query)
        result = read(answer)
        self.cache.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"url": self.url, "query": query, "answer": answer}))
        return result

    def _post(self, query: Mapping[str, Any]) -> dict[str, Any]:
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + self._interval
        self.n_requests += 1
        try:
            reply = self._session.post(self.url, json=query, timeout=self._timeout, allow_redirects=False)
        except requests.RequestException as error:
            raise self._unreachable(error) from error
        try:
            answer = reply.json()
        except (requests.JSONDecodeError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or reply.status_code in _BUSY:
            raise self._unusable(f"status {reply.status_code}: {reply.text[:200]}")
        if "error" in answer or reply.status_code != 200:
            raise EngineError(
                "The web service refused the query.",
                given=f"{answer.get('error', f'status {reply.status_code}')}, to {json.dumps(query)[:200]}",
                expected="an answer",
                mend="check the name of the index, and that the text is short enough",
            )
        return answer

    def _unreachable(self, error: Exception) -> EngineError:
        return EngineError(
            "The web service cannot be reached.",
            given=f"{self.url}: {error}",
            expected="a connection to the internet, and a service that is up",
            mend="connect, or try again later. Queries that were answered before are answered from "
            f"the folder '{self.cache}'; TraceIndex and InfiniGramIndex need no connection",
        )

    def _unusable(self, problem: str) -> EngineError:
        return EngineError(
            "The web service did not answer.",
            given=f"{self.url}: {problem}",
            expected="a JSON object",
            mend="try again later, or with more retries",
        )


class InfiniGramAPI(SuffixEngine):
    """A corpus behind the web service of infini-gram, with the calls of `TraceIndex`.

    Three answers differ from those of an index on this machine. `locate` and `sources` look at the first
    occurrences that the service lists, which for a frequent span are a few of many. A document is the
    text around the match that was found first: all of it if it is short, else `shown_tokens` tokens,
    and offsets count from where that text starts. Sources of a span hold it as a whole.

    Parameters
    ----------
    index:
        A name from the list of the service, https://infini-gram.readthedocs.io/en/latest/api.html.
    tokenizer:
        The tokenizer of that index, which its name ends with: the one of Llama 2 for `llama`.
    url:
        Another service that speaks the same protocol.
    cache:
        Folder of the answers; by default inside the cache of the library.
    max_occurrences:
        How many occurrences of a span are looked at.
    shown_tokens:
        How much of a document is asked for, from 1,000 to 10,000 tokens: half of it around the start of the
        match on each side.
    timeout, retries, backoff, requests_per_second:
        See `Client`.

    Attributes
    ----------
    n_requests:
        How many requests were made so far, repetitions not counted.

    Raises
    ------
    ModelError
        The tokenizer is not a fast one.
    ParameterError
        A number is out of range.

    Examples
    --------
    >>> tokenizer = AutoTokenizer.from_pretrained("meta-llama/Llama-2-7b-hf")
    >>> olmo = InfiniGramAPI(tokenizer=tokenizer)
    >>> olmo.spans(olmo.encode("to wake the Orun compound, hum twice"), min_length=4)
    """

    reach = _QUERY_TOKENS - 1  # one token more stands behind what is looked up

    def __init__(
        self,
        index: str = OLMO_2,
        *,
        tokenizer: Any,
        url: str = URL,
        cache: str | Path | None = None,
        max_occurrences: int = 10,
        shown_tokens: int = 1000,
        timeout: float = 30.0,
        retries: int = 5,
        backoff: float = 0.5,
        requests_per_second: float = 10.0,
    ) -> None:
        self.index = index
        self.tokenizer, self.tokenizer_hash = tokenizer, hash_tokenizer(tokenizer)
        self.vocab_size = vocabulary_size(tokenizer)
        self.max_occurrences = check_integer(max_occurrences, "max_occurrences", at_least=1)
        self._shown_tokens = check_integer(shown_tokens, "shown_tokens", at_least=2 * _QUERY_TOKENS)
        self._documents: dict[str, tuple[Document, Ids]] = {}
        self._client = Client(
            url,
            stages.cache_root() / "infini-gram-api" if cache is None else Path(cache),
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            requests_per_second=requests_per_second,
        )

    def __repr__(self) -> str:
        return f"InfiniGramAPI({self.index!r} at {self._client.url})"

    @property
    def n_requests(self) -> int:
        """How many requests were made so far, repetitions not counted."""
        return self._client.n_requests

    @cached_property
    def n_tokens(self) -> int:  # type: ignore[override]  # asked for when it is needed
        """What the service counts: the tokens of the corpus, with one separator a document."""
        return self.count([])

    @cached_property
    def surprisal(self) -> UnigramSurprisal:
        """`-log p(t)` of ids in nats; one request for each id that was not asked for before."""
        return UnigramSurprisal(self)

    def count(self, ids: ArrayLike) -> int:
        """How often `ids` occur in the corpus, within one document each time."""
        query = check_ids(ids, self.vocab_size, "query")
        return self._ask("count", query, lambda answer: _integer(answer, "count"))

    def locate(self, ids: ArrayLike, *, limit: int | None = 10) -> list[Occurrence]:
        """The first `limit` occurrences that the service lists, and `max_occurrences` at most.

        Their documents are kept, so that `document` has them. The empty sequence is located nowhere.
        """
        query = check_ids(ids, self.vocab_size, "query")
        limit = None if limit is None else check_integer(limit, "limit", at_least=1)
        return [Occurrence(str(number), offset) for number, offset in self._locate(query)[:limit]]

    def continuations(self, ids: ArrayLike) -> tuple[Ids, Ids]:
        """Ids that follow the longest suffix of `ids` that the corpus holds, and how often, shape (n,) each.

        The most frequent come first, the smaller id among equals. Where the suffix occurs more than 1,000
        times, the service estimates how often from a sample.
        """
        query = check_ids(ids, self.vocab_size, "query")
        counts = self._ask("infgram_ntd", query[-self.reach :], _read_counts, max_support=_SUPPORT)
        # the service counts the end of a document as this token
        counts.pop(self.tokenizer.eos_token_id, None)
        tokens = np.array(sorted(counts, key=lambda token: (-counts[token], token)), dtype=np.int64)
        return tokens, np.array([counts[token] for token in tokens.tolist()], dtype=np.int64)

    def document(self, document_id: str) -> Document:
        """What is known of a document that `locate` or `sources` has named.

        Its `meta` is what the corpus says of it, with `n_tokens`, the length of the whole document, and
        `shown`, how many of these tokens the text is.
        """
        return self._known(document_id)[0]

    def document_tokens(self, document_id: str) -> Ids:
        """The token ids of what is known of a document, see `document`; shape (n,)."""
        return self._known(document_id)[1]

    def _known(self, document_id: str) -> tuple[Document, Ids]:
        known = self._documents.get(document_id) if isinstance(document_id, str) else None
        if known is None:
            raise ParameterError(
                "This document was not located yet.",
                given=repr(document_id),
                expected="an id from locate or sources; the service finds documents by a span they hold",
                mend="locate a span of it first",
            )
        return known

    # ------------------------------------------------------------------ parts of queries

    def _longest_suffix(self, query: Ids, start: int, end: int) -> Suffix:
        def read(answer: dict[str, Any]) -> Suffix:
            length = _integer(answer, "suffix_len")
            if length > end - start:
                raise _broken(f"suffix_len is {length}", f"at most {end - start}")
            return Suffix(end - length, _integer(answer, "prompt_cnt"), _integer(answer, "cont_cnt"))

        following = query[end] if end < len(query) else 0
        return self._ask("infgram_prob", np.append(query[start:end], following), read)

    def _locate(self, query: Ids) -> list[tuple[int, int]]:
        """The first `max_occurrences` occurrences: number of the document, and offset within its text."""

        def read(answer: dict[str, Any]) -> tuple[int, int]:
            shown = check_ids(_field(answer, "token_ids", list), self.vocab_size, "text of a document")
            number = _integer(answer, "doc_ix")
            place = _place(query, shown, answer.get("needle_offset"))
            self._documents.setdefault(str(number), (self._document(number, shown, answer), shown))
            return number, place

        if not len(query):
            return []
        segments = self._ask("find", query, _read_segments)
        ranks = ((shard, rank) for shard, (low, high) in enumerate(segments) for rank in range(low, high))
        return [
            self._ask("get_doc_by_rank", query, read, s=shard, rank=rank, max_disp_len=self._shown_tokens)
            for shard, rank in itertools.islice(ranks, self.max_occurrences)
        ]

    def _document(self, number: int, shown: Ids, answer: dict[str, Any]) -> Document:
        text = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        size = {"n_tokens": _integer(answer, "doc_len"), "shown": len(shown)}
        return Document(str(number), text, {**parse_metadata(answer.get("metadata")), **size})

    def _holders(self, query: Ids, length: int) -> Iterable[tuple[int, Ids]]:
        holders: dict[int, set[int]] = {}
        for span in self.spans(query, min_length=length):
            windows = range(span.start, span.end - length + 1)
            for number, _ in self._locate(query[span.start : span.end]):
                holders.setdefault(number, set()).update(windows)
        return ((number, np.array(sorted(starts), dtype=np.int64)) for number, starts in holders.items())

    def _name(self, number: int) -> str:
        return str(number)

    def _ask(self, query_type: str, query: Ids, read: Callable[[dict[str, Any]], T], **options: int) -> T:
        asked = {"index": self.index, "query_type": query_type, "query_ids": query.tolist(), **options}
        return self._client.ask(asked, read)


class UnigramSurprisal:
    """Looks up `-log p(t)` of ids in nats, asking for the count of each id once."""

    def __init__(self, api: InfiniGramAPI) -> None:
        self._api = api
        self._known: dict[int, float] = {}

    def __getitem__(self, ids: Any) -> NDArray[np.float64]:
        wanted = check_ids(ids, self._api.vocab_size, "list of ids")
        for token in set(wanted.tolist()) - set(self._known):
            count = self._api.count([token])
            self._known[token] = float(laplace_surprisal(count, self._api.n_tokens, self._api.vocab_size))
        return np.array([self._known[token] for token in wanted.tolist()], dtype=np.float64)


# ---------------------------------------------------------------------- reading answers


def _read_kept(path: Path, query: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answer that a file keeps; None where there is none, not a whole one, or one to another query."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("query") != query:
        return None
    answer = content.get("answer")
    return answer if isinstance(answer, dict) else None


def _read_segments(answer: dict[str, Any]) -> list[tuple[int, int]]:
    """The ranks `[low, high)` of each shard."""
    segments = _field(answer, "segment_by_shard", list)
    for segment in segments:
        if not isinstance(segment, list) or [type(end) for end in segment] != [int, int]:
            raise _broken(f"a segment is {segment!r:.80}", "two ranks a segment")
    return [(low, high) for low, high in segments]


def _read_counts(answer: dict[str, Any]) -> dict[int, int]:
    """How often each token follows."""
    found = _field(answer, "result_by_token_id", dict)
    if not all(name.isdecimal() for name in found):
        raise _broken(f"tokens are named {list(found)!r:.80}", "ids of tokens")
    return {int(name): _integer(entry, "cont_cnt") for name, entry in found.items()}


def _place(query: Ids, shown: Ids, offset: object) -> int:
    """Where `query` stands in the text that the service shows; at `offset`, if it says so rightly."""
    starts = range(len(shown) - len(query) + 1)
    places = [start for start in starts if np.array_equal(shown[start : start + len(query)], query)]
    if not places:
        raise _broken("token_ids do not hold the query", "a text that holds the query")
    return offset if isinstance(offset, int) and offset in places else places[0]


def _field(answer: Any, name: str, kind: type) -> Any:
    """A field of an answer, which the protocol promises."""
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _broken(f"{name} is {value!r:.80}", f"{name} as {kind.__name__}")
    return value


def _integer(answer: Any, name: str) -> int:
    number: int = _field(answer, name, int)
    if number < 0:
        raise _broken(f"{name} is {number}", f"{name} of at least 0")
    return number


def _broken(problem: str, expected: str) -> EngineError:
    return EngineError(
        "The web service answered with something else than it promises.",
        given=problem,
        expected=expected,
        mend="check that the address is one of an infini-gram service",
    )
