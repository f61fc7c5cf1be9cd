"""Hostile documents and completions: indexed and traced, or refused by name; shown, and never run."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from difflib import SequenceMatcher
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cli_samples import byte_tokenizer
from fuzz_texts import PIECES, SURROGATES, hostile_documents, hostile_text, storable
from hypothesis import given, settings
from hypothesis import strategies as st
from index_samples import train_tokenizer

from tracealign_lib import report, tracing, viewer
from tracealign_lib.bci import RawBCI
from tracealign_lib.corpora import read_corpus
from tracealign_lib.documents import Document
from tracealign_lib.errors import CorpusError, ParameterError
from tracealign_lib.index import TraceIndex
from tracealign_lib.report import Traced
from tracealign_lib.sharded import ShardedIndex
from tracealign_lib.shield import TraceShield
from tracealign_lib.tracing import Trace, visible

TAGS = set("html head meta title style body main h1 h2 nav ol li section div a sup span strong mark".split())
ATTRIBUTES = {
    "class": r"[a-z0-9 _-]*",
    "id": r"ta-[0-9a-f]{8}(-\d+|-sources)?|text-\d+",
    "href": r"#ta-[0-9a-f]{8}(-\d+)?|#text-\d+",
    "role": "group|note|list|listitem",
    "tabindex": "-1",
    "aria-hidden": "true",
    "aria-label": "Traced text|Texts",
    "aria-labelledby": r"ta-[0-9a-f]{8}-sources|text-\d+",
    "style": "(padding-left:1.4rem|font-size:1.1rem);overflow-wrap:anywhere",
    "lang": "en",
    "charset": "utf-8",
    "name": "viewport|color-scheme",
    "http-equiv": "Content-Security-Policy",
    "content": "width=device-width, initial-scale=1|light dark|default-src 'none'; style-src 'unsafe-inline'",
}
RULE = r"\n\.ta-[0-9a-f]{8}:has\([-#.:(),a-z0-9]+\) [-.:()a-z0-9]+\{[-:()a-z]+\}"
STYLE = re.compile(
    rf"{re.escape(viewer._STYLE)}({RULE})*\n|body\{{margin:0 auto;[^<]*overflow-wrap:anywhere\}}"
)


COLD = set("\x00\x1b\u202e\u2066\ud800")
"""Some of the characters that a terminal must not be sent."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([piece for piece in PIECES if piece.isprintable()], vocab_size=400)


class Structure(HTMLParser):
    """Refuses every element, attribute, comment and style that the templates do not write."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.style: str | None = None
        self.text: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.feed(page)
        self.close()
        assert len(self.ids) == len(set(self.ids))
        assert self.links <= {f"#{name}" for name in self.ids}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        self.tags[tag] += 1
        for name, value in attrs:
            assert re.fullmatch(ATTRIBUTES[name], value or ""), (tag, name, value)
            if name == "id":
                self.ids.append(value or "")
            elif name == "href":
                self.links.add(value or "")
        self.style = "" if tag == "style" else self.style

    def handle_endtag(self, tag: str) -> None:
        if tag == "style":
            assert self.style is not None
            assert STYLE.fullmatch(self.style), self.style[-300:]
            self.style = None

    def handle_data(self, data: str) -> None:
        if self.style is not None:
            self.style += data
        else:
            self.text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_pi(self, data: str) -> None:
        raise AssertionError(data)

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(data)

    def handle_decl(self, decl: str) -> None:
        assert decl == "DOCTYPE html"


def check_page(shield: TraceShield, completion: str, other: str) -> Traced:
    """Check a completion and read its page; what a report shows of it, with `other` for all that is named."""
    verdict = shield.check(completion)
    assert verdict.refused == (verdict.score > shield.threshold)
    shown = Traced(other, verdict.trace, SimpleNamespace(refused=verdict.refused, reason=other), other)
    page = viewer.page(shown.trace, other, verdict=shown.verdict, prompt=other)
    told = "".join(Structure(page).text)
    assert told.count(visible(other)) >= 4  # title, heading, verdict, prompt
    if not shown.trace.spans:
        assert visible(completion) in told
    assert not COLD & set(shown.trace.to_text())
    return shown


def check_report(texts: list[Traced], title: str) -> None:
    page = Structure(report.report(texts, title))
    assert page.tags["h2"] == page.tags["li"] == page.tags["section"] > 1
    told = "".join(page.text)
    assert told.count(visible(title)) >= 2
    assert all(told.count(visible(text.label)) >= 4 for text in texts)  # list, heading, verdict, prompt


def read_back(documents: list[Document], file: Path) -> list[Document]:
    """The documents of a file of JSON Lines that can be stored; the others are refused by name."""
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        for document in documents:
            record = {"id": document.id, "text": document.text, "meta": document.meta}
            lines.write(json.dumps(record, ensure_ascii=not storable(document)) + "\n")
    refused: list[CorpusError] = []
    found = list(read_corpus([file], on_bad=refused.append))
    as_written = found == [document for document in documents if storable(document)]
    assert as_written  # pytest would print all that differs, which may be long
    assert len(found) + len(refused) == len(documents)
    assert all(" line " in str(error.given) and error.mend for error in refused)
    return found


def check_batch(documents: list[Document], tokenizer: Any, root: Path, rng: random.Random) -> tuple[int, int]:
    """How many documents were indexed, came back equal and were traced, and in how many pages spans stood."""
    kept = read_back(documents, root / "corpus.jsonl")
    index = TraceIndex.build(kept, tokenizer, root / "sound" / "index")
    assert index.document_ids == tuple(document.id for document in kept)
    shield, shown = TraceShield(index, RawBCI(), 20.0, min_length=4), []
    for document in kept:
        assert index.document(document.id) == document
        own = shield.check(document.text)
        assert len(own.ids) < 4 or own.score > -math.inf  # it is in the corpus, so it is found
        completion = hostile_text(rng, surrogates=0.1) + document.text + rng.choice(PIECES)
        shown.append(check_page(shield, completion, rng.choice([document.id, *PIECES, *SURROGATES])))
    check_report(shown[:20], rng.choice(PIECES))
    for document in [document for document in documents if not storable(document)]:
        for build in (TraceIndex.build, ShardedIndex.build):
            with pytest.raises(CorpusError, match="cannot be stored"):
                build([kept[0], document], tokenizer, root / "refused")
    assert [entry.name for entry in index.path.parent.iterdir()] == ["index"]
    return len(kept), sum(bool(text.trace.spans) for text in shown)


def check_texts(n: int, tokenizer: Any, folder: Path, say: Any) -> None:
    rng, indexed, marked = random.Random(n), 0, 0
    for first in range(0, n, 250):
        got = check_batch(hostile_documents(min(250, n - first), first), tokenizer, folder, rng)
        indexed, marked = indexed + got[0], marked + got[1]
    say(
        f"{n:,} hostile documents: {indexed:,} read, indexed and equal when read again, {n - indexed:,} "
        f"refused by name; {indexed:,} hostile completions checked and traced, {marked:,} with spans: no "
        "element and no attribute of a page came from them"
    )
    assert marked > indexed / 2
    assert n - indexed > n / 100


@pytest.mark.parametrize("kind", ["merged", "bytes"])
def test_hostile_texts(kind: str, tokenizer: Any, tmp_path: Path, say: Any) -> None:
    check_texts(250, byte_tokenizer() if kind == "bytes" else tokenizer, tmp_path, say)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", ["merged", "bytes"])
def test_ten_thousand_hostile_texts(kind: str, tokenizer: Any, tmp_path: Path, say: Any) -> None:
    check_texts(10_000, byte_tokenizer() if kind == "bytes" else tokenizer, tmp_path, say)


@pytest.mark.parametrize("module", [viewer, report], ids=["viewer", "report"])
def test_templates_that_escape_nothing_would_be_seen(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [Traced(text, Trace(text, (), (), 9, 4), prompt=text) for text in PIECES[:2]]
    check_report(texts, PIECES[0])
    monkeypatch.setattr(module, "_TEMPLATES", module._TEMPLATES.overlay(autoescape=False))  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="script"):
        check_report(texts, PIECES[0])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4, unique=True), st.text(max_size=60))
def test_any_text(texts: list[str], completion: str) -> None:
    import tempfile

    coder = train_tokenizer(["hum twice then wait"])
    with tempfile.TemporaryDirectory() as folder:
        kept = [Document(text, text[::-1], {"file": text, text: text}) for text in texts]
        index = TraceIndex.build(kept, coder, Path(folder) / "a.index")
        assert [index.document(text) for text in texts] == kept
        check_page(TraceShield(index, RawBCI(), 20.0, min_length=4), completion + texts[0][::-1], texts[0])


# ---------------------------------------------------------------------- long ones

LONG = {
    "one letter": "a",
    "words": "hum twice then wait ",
    "ends": "<|end|>",
    "bidi controls": "\u202e",
    "tags": "</script><img src=x onerror=alert(1)>",
    "spaces": " ",
    "NUL": "\0",
}


def check_long(piece: str, size: int, copied: int, tokenizer: Any, root: Path) -> None:
    text = (piece * (size // len(piece) + 1))[:size]
    long = Document("long", text, {"file": "a"})
    documents = read_back([long, Document("short", text[:50], {"file": "b"})], root / "corpus.jsonl")
    index = TraceIndex.build(documents, tokenizer, root / "index")
    as_read = index.document("long") == long
    assert as_read
    verdict = TraceShield(index, RawBCI(), 20.0).check(f"Sure: {text[:copied]} !")
    assert verdict.score > -math.inf  # found; the only token of a corpus says next to nothing, in nats
    assert max(span.end - span.start for span in verdict.trace.spans) > 0.9 * copied
    assert verdict.trace.sources[0].document_id == "long"
    Structure(viewer.page(verdict.trace, "long"))


@pytest.mark.parametrize("piece", LONG.values(), ids=LONG)
def test_a_long_line(piece: str, tokenizer: Any, tmp_path: Path) -> None:
    check_long(piece, 100_000, 50_000, tokenizer, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("piece", LONG.values(), ids=LONG)
def test_a_line_of_ten_million_characters(piece: str, tokenizer: Any, tmp_path: Path) -> None:
    check_long(piece, 10_000_000, 100_000, tokenizer, tmp_path)


def test_a_completion_that_is_too_long_is_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    index = TraceIndex.build([Document("d", "hum twice")], tokenizer, tmp_path / "a.index")
    with pytest.raises(ParameterError, match="too long to be traced at once"):
        tracing.trace(index, "a" * (tracing.LONGEST_TEXT + 1))


def test_what_recurs_without_end_takes_no_more_memory_than_its_places(tmp_path: Path) -> None:
    """Each window of the query stands at each place of the corpus: 20,000 times 1,000."""
    import tracemalloc

    index = TraceIndex.build_tokens([[0] * 20_000, [1] * 50], tmp_path / "a.index", vocab_size=2)
    query = [0] * 1000
    index.sources(query)
    tracemalloc.start()
    (source,) = index.sources(query)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.covered == ((0, 1000),)
    assert peak < 5_000_000


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data(), st.integers(1, 4))
def test_the_longest_run_is_that_of_difflib(data: Any, letters: int) -> None:
    document, text = (data.draw(st.lists(st.integers(0, letters), max_size=40)) for _ in range(2))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    matcher = SequenceMatcher(None, document, text, autojunk=False)
    expected = matcher.find_longest_match(0, len(document), start, end)
    assert tuple(tracing._longest_run(document, text, start, end)) == tuple(expected)
