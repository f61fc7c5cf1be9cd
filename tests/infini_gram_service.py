"""A web service that speaks the documented protocol of infini-gram over a small corpus, faults included."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

EOS = 0
SEPARATOR = 65_535
QUERY_TOKENS = 500


class Fault(NamedTuple):
    """What the service does instead of answering: a status and a body, after `delay` seconds."""

    status: int = 200
    body: str = ""
    delay: float = 0.0
    headers: tuple[tuple[str, str], ...] = ()
    hang_up: bool = False


class Corpus:
    """Every suffix of every document, sorted, in two shards that split the documents in half."""

    def __init__(self, documents: list[list[int]]) -> None:
        half = (len(documents) + 1) // 2
        self.documents = documents
        self.shards = [
            sorted(
                ((number, offset) for number in numbers for offset in range(-1, len(documents[number]))),
                key=lambda place: self.suffix(*place),
            )
            for numbers in (range(half), range(half, len(documents)))
        ]

    def suffix(self, number: int, offset: int) -> list[int]:
        """Tokens from `offset` on and what stands behind the document; -1 is the separator before it."""
        return [SEPARATOR, *self.documents[number], SEPARATOR][offset + 1 :]

    def segments(self, query: list[int]) -> list[list[int]]:
        found = []
        for shard in self.shards:
            ranks = [i for i, place in enumerate(shard) if self.suffix(*place)[: len(query)] == query]
            found.append([ranks[0], ranks[-1] + 1] if ranks else [0, 0])
        return found

    def count(self, query: list[int]) -> int:
        return sum(high - low for low, high in self.segments(query))

    def longest_suffix(self, query: list[int]) -> list[int]:
        return next(query[start:] for start in range(len(query) + 1) if self.count(query[start:]))

    # ------------------------------------------------------------------ query types

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        ids = query["query_ids"]
        if len(ids) > QUERY_TOKENS:
            return {"error": f"Please limit your input to <= {QUERY_TOKENS} tokens!"}
        answer = getattr(self, f"answer_{query['query_type']}")(ids, query)
        return {**answer, "token_ids": answer.get("token_ids", ids), "latency": 0.5}

    def answer_count(self, ids: list[int], _: dict[str, Any]) -> dict[str, Any]:
        return {"count": self.count(ids), "approx": False}

    def answer_find(self, ids: list[int], _: dict[str, Any]) -> dict[str, Any]:
        return {"cnt": self.count(ids), "segment_by_shard": self.segments(ids)}

    def answer_infgram_prob(self, ids: list[int], _: dict[str, Any]) -> dict[str, Any]:
        suffix = self.longest_suffix(ids[:-1])
        prompt, both = self.count(suffix), self.count([*suffix, ids[-1]])
        return {"prompt_cnt": prompt, "cont_cnt": both, "prob": both / prompt, "suffix_len": len(suffix)}

    def answer_infgram_ntd(self, ids: list[int], _: dict[str, Any]) -> dict[str, Any]:
        suffix = self.longest_suffix(ids)
        following = Counter(
            token if token != SEPARATOR else EOS
            for shard in self.shards
            for place in shard
            if self.suffix(*place)[: len(suffix)] == suffix
            for token in self.suffix(*place)[len(suffix) : len(suffix) + 1]
        )
        results = {str(token): {"cont_cnt": n, "prob": 0.5} for token, n in following.items()}
        return {"result_by_token_id": results, "approx": False, "suffix_len": len(suffix)}

    def answer_get_doc_by_rank(self, ids: list[int], query: dict[str, Any]) -> dict[str, Any]:
        number, offset = self.shards[query["s"]][query["rank"]]
        document, half = self.documents[number], query["max_disp_len"] // 2
        start = max(0, offset - half)
        shown = document[start : offset + half]
        size = {"doc_ix": number, "doc_len": len(document), "disp_len": len(shown), "blocked": False}
        meta = json.dumps({"path": "a.jsonl", "linenum": number}) + "\n"
        return {**size, "needle_offset": offset - start, "metadata": meta, "token_ids": shown, "spans": []}


class Service(ThreadingHTTPServer):
    """Answers from a corpus; `faults` are served first, one a request, and `asked` keeps what came in."""

    daemon_threads = True

    def __init__(self, documents: list[list[int]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.corpus = Corpus(documents)
        self.faults: list[Fault] = []
        self.asked: list[dict[str, Any]] = []

    def handle_error(self, *_: Any) -> None:
        """Clients that do not wait for an answer are part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Service

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(query)
        if self.server.faults:
            fault = self.server.faults.pop(0)
            time.sleep(fault.delay)
            if fault.hang_up:
                self.close_connection = True
                return
            self.reply(fault.status, fault.body, fault.headers)
        elif query["index"] != "toy":
            self.reply(400, json.dumps({"error": f"[Flask] Invalid index: {query['index']}"}))
        else:
            self.reply(200, json.dumps(self.server.corpus.answer(query)))

    def reply(self, status: int, body: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body.encode())))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        """Keep the output of the tests quiet."""


@contextmanager
def serving(documents: list[list[int]]) -> Iterator[Service]:
    service = Service(documents)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.shutdown()
        service.server_close()
        thread.join()
