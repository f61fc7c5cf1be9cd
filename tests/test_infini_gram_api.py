"""InfiniGramAPI against a local service that speaks the protocol: right answers, faults, cache, manners."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_samples import DOCUMENTS, train_tokenizer
from infini_gram_service import EOS, Fault, Service, serving
from transformers import PreTrainedTokenizerFast

from tracealign_lib.engine import EngineError
from tracealign_lib.errors import ModelError, ParameterError, VocabularyError
from tracealign_lib.index import TraceIndex
from tracealign_lib.infini_gram_api import OLMO_2, URL, InfiniGramAPI
from tracealign_lib.tracing import trace

TEXTS = [document.text for document in DOCUMENTS if document.text]
TOKENIZER = train_tokenizer(TEXTS)
LISTS = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
ORUN = LISTS[0][:4]  # which two documents begin with


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(LISTS) as running:
        yield running


def connect(service: Service, cache: Path, **options: Any) -> InfiniGramAPI:
    quick = {"timeout": 0.5, "backoff": 0.001, "requests_per_second": 10_000.0, "retries": 3}
    return InfiniGramAPI("toy", tokenizer=TOKENIZER, url=service.url, cache=cache, **{**quick, **options})


# ---------------------------------------------------------------------- right answers


@settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    max_examples=25,
)
@given(
    st.lists(st.lists(st.integers(1, 3), max_size=12), min_size=1, max_size=6),
    st.lists(st.lists(st.integers(1, 4), max_size=14), min_size=4, max_size=4),
    st.integers(1, 4),
)
def test_equals_traceindex_on_random_corpora(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    queries: list[list[int]],
    length: int,
) -> None:
    folder = tmp_path_factory.mktemp("api")
    ours = TraceIndex.build_tokens(documents, folder / "ours", vocab_size=290)
    with serving(documents) as service:
        api = connect(service, folder / "cache", max_occurrences=100)
        for query in queries:
            if query:
                assert api.count(query) == ours.count(query)
            assert api.spans(query) == ours.spans(query)
            assert api.spans(query, min_length=length, max_count=2) == ours.spans(
                query, min_length=length, max_count=2
            )
            if any(ours.count([token]) for token in query[-1:]):
                found, expected = api.continuations(query), ours.continuations(query)
                assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
            expected_places = ours.locate(query, limit=None) if query else []
            assert sorted(api.locate(query, limit=None)) == expected_places
            for source in api.sources(query, min_length=length, limit=None):
                whole = {s.document_id: s for s in ours.sources(query, min_length=length, limit=None)}
                covered = {j for start, end in source.covered for j in range(start, end)}
                ours_covered = {j for a, b in whole[source.document_id].covered for j in range(a, b)}
                assert covered <= ours_covered  # the service is asked for holders of whole spans
            best = {d for d, _ in ours.locate(query, limit=None)} if len(query) >= length else set()
            assert best <= {
                source.document_id for source in api.sources(query, min_length=length, limit=None)
            }


def test_a_text_is_traced_as_by_an_index_on_this_machine(service: Service, tmp_path: Path) -> None:
    kept = [document for document in DOCUMENTS if document.text]
    ours = TraceIndex.build(kept, TOKENIZER, tmp_path / "ours")
    api = connect(service, tmp_path / "cache")
    text = "They said: to wake the Orun lantern, hum twice, then go."
    theirs, expected = trace(api, text), trace(ours, text)  # type: ignore[arg-type]
    assert [(s.start, s.end, s.count) for s in theirs.spans] == [
        (s.start, s.end, s.count) for s in expected.spans
    ]
    assert [int(s.document_id) for s in theirs.sources] == [
        [document.id for document in kept].index(source.document_id) for source in expected.sources
    ]
    assert theirs.sources[0].passage == expected.sources[0].passage
    document = api.document("1")
    assert document.text == kept[1].text
    assert document.meta == {
        "path": "a.jsonl",
        "linenum": 1,
        "n_tokens": len(LISTS[1]),
        "shown": len(LISTS[1]),
    }
    print(f"{api.n_requests} requests for a text of {theirs.n_tokens} tokens")


def test_surprisal_asks_for_each_id_once(service: Service, tmp_path: Path) -> None:
    api = connect(service, tmp_path)
    ids = np.array([ORUN[0], ORUN[1], ORUN[0]])
    values = api.surprisal[ids]
    counts = [sum(tokens.count(int(token)) for tokens in LISTS) for token in ids]
    size = sum(map(len, LISTS)) + len(LISTS)
    assert values.tolist() == pytest.approx([np.log((size + api.vocab_size) / (n + 1)) for n in counts])
    assert api.n_requests == 3  # two ids, and the size of the corpus
    assert api.surprisal[ids[:2]].tolist() == values[:2].tolist()
    assert api.n_requests == 3


def test_ends_of_documents_are_no_continuation(service: Service, tmp_path: Path) -> None:
    api = connect(service, tmp_path)
    assert api.tokenizer.eos_token_id == EOS
    assert api.continuations(LISTS[2][-3:])[0].tolist() == []


def test_no_more_occurrences_than_allowed_are_looked_at(tmp_path: Path) -> None:
    with serving([[1, 2, 3]] * 30) as service:
        api = connect(service, tmp_path, max_occurrences=4)
        assert len(api.locate([1, 2], limit=None)) == 4
        assert len(api.locate([1, 2], limit=2)) == 2
        assert api.n_requests == 5
        assert len(api.sources([1, 2, 3], min_length=2)) == 4


def test_a_match_longer_than_the_service_can_look_up(tmp_path: Path) -> None:
    document = [1 + i % 200 for i in range(520)]
    with serving([document]) as service:
        api = connect(service, tmp_path)
        assert api.spans(document[:450], min_length=8) == [(0, 450, 1)]
        with pytest.raises(ParameterError, match="longer than the engine"):
            api.spans(document, min_length=8)
        with pytest.raises(EngineError, match="limit your input"):
            api.count(document)
        assert max(len(query["query_ids"]) for query in service.asked[:-1]) <= 500


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([Fault(500, '{"error": "[Flask] Internal server error"}')], id="500"),
        pytest.param([Fault(503, "<html>busy</html>"), Fault(502, "")], id="503 and 502"),
        pytest.param([Fault(429, '{"error": "slow down"}')], id="429"),
        pytest.param([Fault(429, "{}", headers=(("Retry-After", "0"),))], id="429 with a pause"),
        pytest.param([Fault(delay=1.5)], id="timeout"),
        pytest.param([Fault(hang_up=True)], id="hung up"),
        pytest.param([Fault(500), Fault(hang_up=True), Fault(504)], id="three faults"),
    ],
)
def test_a_passing_fault_is_repeated(service: Service, tmp_path: Path, faults: list[Fault]) -> None:
    service.faults += faults
    api = connect(service, tmp_path)
    assert api.count(ORUN) == 2
    assert len(service.asked) == len(faults) + 1
    assert api.n_requests == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(Fault(500, '{"error": "broken"}'), "did not answer", id="500"),
        pytest.param(Fault(429, "later"), "did not answer", id="429"),
        pytest.param(Fault(delay=0.5), "cannot be reached", id="timeout"),
        pytest.param(Fault(hang_up=True), "cannot be reached", id="hung up"),
    ],
)
def test_a_lasting_fault_is_told(service: Service, tmp_path: Path, fault: Fault, message: str) -> None:
    service.faults += [fault] * 9
    api = connect(service, tmp_path / "cache", retries=2, timeout=0.2)
    with pytest.raises(EngineError, match=message):
        api.count(ORUN)
    assert len(service.asked) == 3
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(Fault(200, '{"error": "Some item(s) are out-of-range!"}'), "out-of-range", id="error"),
        pytest.param(Fault(400, '{"error": "[Flask] Invalid query_type"}'), "Invalid query_type", id="400"),
        pytest.param(Fault(404, "{}"), "status 404", id="404"),
        pytest.param(Fault(200, '{"count": '), "did not answer", id="cut JSON"),
        pytest.param(Fault(200, "<html>"), "did not answer", id="no JSON"),
        pytest.param(Fault(200, "[" * 100_000), "did not answer", id="deep JSON"),
        pytest.param(Fault(200, "[1]"), "did not answer", id="no object"),
        pytest.param(Fault(302, "", headers=(("Location", "http://127.0.0.1:1/"),)), "302", id="redirect"),
        pytest.param(Fault(200, "{}"), "count is None", id="nothing"),
        pytest.param(Fault(200, '{"count": "3"}'), "count is '3'", id="text"),
        pytest.param(Fault(200, '{"count": true}'), "count is True", id="bool"),
        pytest.param(Fault(200, '{"count": -1}'), "count is -1", id="negative"),
    ],
)
def test_what_is_no_answer_is_told_at_once(
    service: Service, tmp_path: Path, fault: Fault, message: str
) -> None:
    service.faults += [fault]
    api = connect(service, tmp_path)
    with pytest.raises(EngineError, match=message.replace("(", r"\(")):
        api.count(ORUN)
    assert len(service.asked) == 1
    assert api.count(ORUN) == 2  # nothing broken was kept


@pytest.mark.parametrize(
    "body",
    [
        {"segment_by_shard": [[0]]},
        {"segment_by_shard": [3]},
        {"segment_by_shard": [["0", "1"]]},
        {"segment_by_shard": {}},
    ],
)
def test_segments_that_are_none(service: Service, tmp_path: Path, body: dict[str, Any]) -> None:
    service.faults += [Fault(200, json.dumps(body))]
    with pytest.raises(EngineError, match="something else"):
        connect(service, tmp_path).locate(ORUN)


def test_documents_that_do_not_hold_the_query(service: Service, tmp_path: Path) -> None:
    found = json.dumps({"segment_by_shard": [[0, 10**12]]})
    whole = {"doc_ix": 7, "doc_len": 9, "token_ids": [5, *ORUN, 6, *ORUN]}
    for change, place in (({}, 1), ({"needle_offset": 6}, 6), ({"needle_offset": 3}, 1)):
        service.faults += [Fault(200, found), Fault(200, json.dumps({**whole, **change}))]
        api = connect(service, tmp_path / str(place) / str(len(change)) / str(change), max_occurrences=1)
        assert api.locate(ORUN) == [("7", place)]
    for change in ({"token_ids": [5]}, {"token_ids": "5"}, {"doc_ix": None}, {"doc_len": "9"}):
        service.faults += [Fault(200, found), Fault(200, json.dumps({**whole, **change}))]
        with pytest.raises(EngineError, match="something else"):
            connect(service, tmp_path / str(change), max_occurrences=1).locate(ORUN)
    service.faults += [Fault(200, found), Fault(200, json.dumps({**whole, "token_ids": [10**6]}))]
    with pytest.raises(VocabularyError):
        connect(service, tmp_path / "vocabulary", max_occurrences=1).locate(ORUN)
    service.faults += [Fault(200, '{"suffix_len": 9, "prompt_cnt": 1, "cont_cnt": 0}')]
    with pytest.raises(EngineError, match="suffix_len is 9"):
        connect(service, tmp_path / "suffix").spans(ORUN)
    service.faults += [Fault(200, '{"result_by_token_id": {"<s>": {"cont_cnt": 1}}}')]
    with pytest.raises(EngineError, match="<s>"):
        connect(service, tmp_path / "tokens").continuations(ORUN)


def test_without_a_connection(tmp_path: Path) -> None:
    with socket.socket() as taken:  # a port that nothing listens on
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        api = InfiniGramAPI(tokenizer=TOKENIZER, url=url, cache=tmp_path, backoff=0.001)
        with pytest.raises(EngineError, match="cannot be reached") as caught:
            api.count(ORUN)
    assert str(tmp_path) in str(caught.value)
    assert "InfiniGramIndex" in str(caught.value)


# ---------------------------------------------------------------------- cache and manners


def test_what_was_asked_before_needs_no_connection(tmp_path: Path) -> None:
    with serving(LISTS) as service:
        api = connect(service, tmp_path)
        first = trace(api, TEXTS[0])  # type: ignore[arg-type]
        n_requests = len(service.asked)
        assert api.n_requests == n_requests > 0
        assert connect(service, tmp_path).count(ORUN) == 2
        assert len(service.asked) == n_requests + 1
        again = connect(service, tmp_path)
    assert trace(again, TEXTS[0]).to_json() == first.to_json()  # type: ignore[arg-type]
    assert again.n_requests == 0
    with pytest.raises(EngineError, match="cannot be reached"):
        again.count(LISTS[2][:2])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, '{"query": {}, "answer": {"count": 7}}', "\xff"]
)
def test_a_damaged_cache_is_asked_again(service: Service, tmp_path: Path, content: str) -> None:
    api = connect(service, tmp_path)
    assert api.count(ORUN) == 2
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(content.encode("latin-1"))
    assert api.count(ORUN) == 2
    file.write_bytes(whole.replace(b'"count": 2', b'"count": "2"'))
    assert api.count(ORUN) == 2
    assert file.read_bytes() == whole
    assert len(service.asked) == 3


def test_other_services_and_corpora_have_their_own_answers(service: Service, tmp_path: Path) -> None:
    assert connect(service, tmp_path).count(ORUN) == 2
    with serving([[5]]) as other:
        assert connect(other, tmp_path).count(ORUN) == 0
    api = connect(service, tmp_path)
    api.index = "unknown"
    with pytest.raises(EngineError, match="Invalid index: unknown"):
        api.count(ORUN)
    assert len(list(tmp_path.iterdir())) == 2


class Clock:
    """Stands still but for those who sleep, and notes how long."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


def test_requests_keep_their_distance(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("tracealign_lib.infini_gram_api.time", clock)
    api = connect(service, tmp_path, requests_per_second=20)
    for token in ORUN[:3]:
        api.count([token])
    clock.now += 0.04
    api.count([ORUN[3]])
    clock.now += 1.0
    api.count(ORUN)
    api.count(ORUN)  # from the cache, at once
    assert clock.slept == pytest.approx([0.0, 0.05, 0.05, 0.01, 0.0])


def test_the_default_is_the_public_service_and_olmo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRACEALIGN_CACHE", str(tmp_path))
    api = InfiniGramAPI(tokenizer=TOKENIZER)
    assert repr(api) == f"InfiniGramAPI({OLMO_2!r} at {URL})"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "option",
    [
        {"max_occurrences": 0},
        {"shown_tokens": 999},
        {"timeout": 0},
        {"retries": -1},
        {"retries": 1.5},
        {"backoff": -1.0},
        {"requests_per_second": 0},
    ],
)
def test_options_out_of_range(service: Service, tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        connect(service, tmp_path, **option)


def test_what_a_query_refuses(service: Service, tmp_path: Path) -> None:
    api = connect(service, tmp_path)
    for query in (api.count, api.spans, api.locate, api.continuations, api.sources):
        for bad in ([-1], [10**6], [1.5], "12", [[1]]):
            with pytest.raises(VocabularyError):
                query(bad)
    with pytest.raises(ParameterError, match="out of range"):
        api.locate(ORUN, limit=0)
    for unknown in ("99", None, 0):
        with pytest.raises(ParameterError, match="not located yet"):
            api.document(unknown)  # type: ignore[arg-type]
    assert service.asked == []
    with pytest.raises(ModelError, match="not a fast one"):
        InfiniGramAPI(tokenizer=object())
    assert isinstance(TOKENIZER, PreTrainedTokenizerFast)
