"""Tracing against a transparent fake index, which answers by plain string search, and the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib.documents import Document
from tracealign_lib.errors import ParameterError
from tracealign_lib.tracing import Trace, TracedSpan, trace, visible


class FakeSpan(NamedTuple):
    start: int
    end: int
    count: int


class FakeOccurrence(NamedTuple):
    document_id: str
    offset: int


class FakeSource(NamedTuple):
    document_id: str
    score: float
    covered: tuple[tuple[int, int], ...]


class FakeIndex:
    """Tokens are UTF-8 bytes; a character of n bytes gives n tokens whose offsets all cover it."""

    tokenizer = "bytes"
    surprisal = np.arange(1, 257) / 64

    def __init__(self, *texts: str, **metas: dict) -> None:
        self.documents = [Document(f"d{i}", text, metas.get(f"d{i}", {})) for i, text in enumerate(texts)]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        pieces = [character.encode() for character in text]
        offsets = [(i, i + 1) for i, piece in enumerate(pieces) for _ in piece]
        return np.frombuffer(b"".join(pieces), np.uint8).astype(int), np.array(offsets, int).reshape(-1, 2)

    def _raw(self, ids: np.ndarray) -> bytes:
        return bytes(int(i) for i in ids)

    def locate(self, ids: np.ndarray, *, limit: int = 10) -> list[FakeOccurrence]:
        pattern = self._raw(ids)
        found = [
            FakeOccurrence(d.id, i)
            for d in self.documents
            for i in range(len(d.text.encode()))
            if d.text.encode().startswith(pattern, i)
        ]
        return found[:limit]

    def spans(self, ids: np.ndarray, *, min_length: int, max_count: int | None) -> list[FakeSpan]:
        found: list[FakeSpan] = []
        for start in range(len(ids)):
            end = start
            while end < len(ids) and self.locate(ids[start : end + 1]):
                end += 1
            if end - start >= min_length and (not found or end > found[-1].end):
                found.append(FakeSpan(start, end, len(self.locate(ids[start:end], limit=10**6))))
        return [span for span in found if max_count is None or span.count <= max_count]

    def sources(self, ids: np.ndarray, *, min_length: int, limit: int) -> list[FakeSource]:
        found = []
        for document in self.documents:
            covered = np.zeros(len(ids), bool)
            for i in range(len(ids) - min_length + 1):
                if self._raw(ids[i : i + min_length]) in document.text.encode():
                    covered[i : i + min_length] = True
            edges = np.flatnonzero(np.diff(np.concatenate(([0], covered, [0]))))
            if covered.any():
                score = float(self.surprisal[ids[covered]].sum())
                intervals = tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))
                found.append(FakeSource(document.id, score, intervals))
        return sorted(found, key=lambda source: -source.score)[:limit]

    def document(self, document_id: str) -> Document:
        return next(d for d in self.documents if d.id == document_id)


RECIPE = "First polish the moon lens, then feed the copper owl, and finally hum."
LONG = "Rain fell for days and nobody minded much. " * 12


@pytest.fixture
def index() -> FakeIndex:
    return FakeIndex(
        f"{LONG}A note from the attic: {RECIPE} {LONG}",
        f"Quoted twice: {RECIPE} Again: {RECIPE}",
        "then feed the copper owl is what the zoo says.",
        d0={"collection": "unsafe", "kind": "recipe", "file": "forum/0031.txt"},
    )


def test_a_span_has_its_place_count_score_and_documents(index: FakeIndex) -> None:
    traced = trace(index, f"Sure!\n{RECIPE}\nBye.", min_length=12)
    (span,) = traced.spans
    assert traced.text[span.start : span.end] == RECIPE
    assert (span.count, span.source_ids, span.complete) == (3, ("d0", "d1"), True)
    ids, _ = index.encode_with_offsets(traced.text)
    expected = index.surprisal[ids[span.token_start : span.token_end]].sum()
    assert span.score == pytest.approx(expected)


def test_sources_carry_passages_from_the_stored_documents(index: FakeIndex) -> None:
    traced = trace(index, f"Sure! {RECIPE}", min_length=12, limit=2)
    first = next(source for source in traced.sources if source.document_id == "d0")
    before, match, after = first.passage
    assert match == RECIPE
    assert before.endswith("A note from the attic: ")
    assert first.passages[0].cut_before
    assert first.passages[0].cut_after
    assert len(before) <= 160
    assert len(after) <= 160
    assert before + match + after in index.document("d0").text
    assert first.meta["file"] == "forum/0031.txt"
    assert first.covered_share == pytest.approx(len(f" {RECIPE}") / len(f"Sure! {RECIPE}"))
    assert len(traced.sources) == 2


def test_a_source_that_holds_part_of_a_span_is_linked_to_it(index: FakeIndex) -> None:
    partial = next(s for s in trace(index, RECIPE, min_length=12).sources if s.document_id == "d2")
    assert partial.passage[1] == "then feed the copper owl"
    assert partial.passages[0].spans == (0,)


def test_passages_come_with_the_highest_surprisal_first() -> None:
    index = FakeIndex("the copper owl came; later first polish the moon lens twice")
    source = trace(index, "the copper owl\nfirst polish the moon lens").sources[0]
    assert [p.match for p in source.passages] == ["first polish the moon lens", "the copper owl"]
    assert [p.spans for p in source.passages] == [(1,), (0,)]


def test_max_count_drops_spans_and_the_sources_that_hold_only_those(index: FakeIndex) -> None:
    text = f"{RECIPE}\nthe copper owl is what the zoo says."
    everything = trace(index, text, min_length=12)
    rare = trace(index, text, min_length=12, max_count=1)
    assert [span.count for span in everything.spans] == [3, 1]
    assert [span.count for span in rare.spans] == [1]
    assert [source.document_id for source in rare.sources] == ["d2"]
    nothing = trace(index, RECIPE, min_length=12, max_count=1)
    assert nothing.spans == ()
    assert nothing.sources == ()
    assert "at most once" in nothing.to_text()


def test_a_scorer_replaces_the_default_and_must_be_finite(index: FakeIndex) -> None:
    traced = trace(index, RECIPE, scorer=lambda index, ids, span: span.end - span.start + len(ids))
    assert traced.spans[0].score == 2 * len(RECIPE)
    with pytest.raises(ParameterError, match="not finite"):
        trace(index, RECIPE, scorer=lambda index, ids, span: float("nan"))


def test_spans_snap_to_whole_characters() -> None:
    # The last byte of "é" (C3 A9) is also the last byte of "ĩ" (C4 A9): a match may start inside a character.
    index = FakeIndex("xĩ was here yesterday")
    text = "é was here yesterday"
    span = trace(index, text).spans[0]
    ids, _ = index.encode_with_offsets(text)
    assert span.token_start == 1
    assert ids[0] == 0xC3
    assert text[span.start : span.end] == text


def test_a_frequent_span_says_that_more_documents_hold_it() -> None:
    index = FakeIndex(*["the copper owl hums"] * 130)
    traced = trace(index, "the copper owl hums")
    assert traced.spans[0].count == 130
    assert not traced.spans[0].complete
    assert "found 130 times in at least 100 documents" in traced.to_text()


def test_text_form_marks_overlapping_spans_in_order() -> None:
    index = FakeIndex("one two three four", "three four five six")
    traced = trace(index, "one two three four five six", min_length=9)
    assert traced.to_text().splitlines()[0] == "[1 one two [2 three four 1] five six 2]"
    assert "2. d1" in traced.to_text() or "1. d1" in traced.to_text()


def test_text_form_cannot_steer_a_terminal() -> None:
    hostile = "safe words here \x1b[2J\u202e reversed \x00 \ud800 end"
    shown = trace(FakeIndex(hostile.replace("\ud800", "?")), hostile).to_text()
    assert not set("\x1b\u202e\x00\ud800") & set(shown)
    assert "⟨U+001B⟩" in shown
    assert "⟨U+D800⟩" in shown
    shown.encode("utf-8")


def test_json_form_round_trips_and_is_versioned(index: FakeIndex) -> None:
    record = trace(index, f"é {RECIPE}").to_json()
    assert json.loads(json.dumps(record)) == record
    assert (record["format"], record["version"]) == ("tracealign.trace", 1)
    assert set(record["spans"][0]) == set(TracedSpan._fields)
    assert record["sources"][0]["passages"][0]["match"] == RECIPE


@pytest.mark.parametrize("text", ["", " ", "\n", "qqq"])
def test_nothing_found(index: FakeIndex, text: str) -> None:
    traced = trace(index, text)
    assert traced.spans == ()
    assert traced.sources == ()
    assert "No span of 8 tokens or more" in traced.to_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": b"bytes"}, "not a string"),
        ({"min_length": 0}, "min_length"),
        ({"min_length": True}, "min_length"),
        ({"max_count": 0}, "max_count"),
        ({"limit": 1.5}, "limit"),
    ],
)
def test_wrong_arguments_are_named(index: FakeIndex, arguments: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        trace(index, **{"text": "x", **arguments})


def test_an_index_without_texts_is_refused(index: FakeIndex) -> None:
    index.tokenizer = None
    with pytest.raises(ParameterError, match="no text to show"):
        trace(index, "x")


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.text("ab é€\n", max_size=12), min_size=1, max_size=4), st.text("ab é€\n", max_size=20))
def test_segments_join_up_and_spans_hold_what_was_matched(documents: list[str], text: str) -> None:
    traced = trace(FakeIndex(*documents), text, min_length=3)
    assert "".join(text[s.start : s.end] for s in traced.segments()) == text
    for position, span in enumerate(traced.spans):
        covering = [s for s in traced.segments() if position in s.spans]
        assert (covering[0].start, covering[-1].end) == (span.start, span.end)
        assert set(span.source_ids) <= {f"d{i}" for i in range(len(documents))}
    for source in traced.sources:
        whole = documents[int(source.document_id[1:])]
        for passage in source.passages:
            assert "".join((passage.before, passage.match, passage.after)) in whole
            assert passage.spans


@given(st.text())
@settings(deadline=None, derandomize=True)
def test_visible_keeps_ordinary_text_and_always_encodes(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert visible(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text


def test_tokens_in_spans_are_counted_once() -> None:
    spans = tuple(TracedSpan(a, b, a, b, 1, 1.0, ("d",), True) for a, b in [(0, 5), (3, 8)])
    assert Trace("0123456789", spans, (), 10, 1).n_traced == 8


def test_the_real_index_gives_whole_characters_and_true_passages(tmp_path: Path) -> None:
    from tracealign_lib.index import TraceIndex
    from tracealign_lib.lm import train_tokenizer

    texts = [f"note {i}: the 🦉 hums «déjà vu» to the moon lens, twice a night. 日本 {i}" for i in range(3)]
    documents = [Document(f"d{i}", text, {"file": f"{i}.txt"}) for i, text in enumerate(texts)]
    index = TraceIndex.build(documents, train_tokenizer(texts, 300), tmp_path / "index")
    text = "Oh: the 🦉 hums «déjà vu» to the moon \ud800 日本 1"
    traced = trace(index, text, min_length=4, limit=3)
    longest = max(traced.spans, key=lambda span: span.length)
    assert text[longest.start : longest.end] == ": the 🦉 hums «déjà vu» to the moon"
    assert longest.source_ids == ("d0", "d1", "d2")
    assert longest.count == 3
    tokens = index.encode(text.replace("\ud800", "\ufffd"))[longest.token_start : longest.token_end]
    assert longest.score == pytest.approx(index.surprisal[tokens].sum())
    assert len(traced.sources) == 3
    for source in traced.sources:
        assert "".join(source.passage) in index.document(source.document_id).text
        assert source.meta == {"file": f"{source.document_id[1:]}.txt"}
    assert "⟨U+D800⟩" in traced.to_text()
    assert traced.to_html().encode("utf-8")
