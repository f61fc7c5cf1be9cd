"""Hostile documents and completions: indexed and traced, or refused by name; shown, and never run."""

from __future__ import annotations

import random
import re
from difflib import SequenceMatcher
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fuzz_texts import PIECES, SURROGATES, hostile_documents, hostile_text, storable
from hypothesis import given, settings
from hypothesis import strategies as st
from index_samples import train_tokenizer

from tracealign_lib import tracing, viewer
from tracealign_lib.documents import Document
from tracealign_lib.errors import CorpusError, ParameterError
from tracealign_lib.index import TraceIndex
from tracealign_lib.sharded import ShardedIndex
from tracealign_lib.tracing import trace, visible

TAGS = set("html head meta title style body main h1 div a sup span strong mark".split())
ATTRIBUTES = {
    "class": r"[a-z0-9 _-]*",
    "id": r"ta-[0-9a-f]{8}(-\d+|-sources)?",
    "href": r"#ta-[0-9a-f]{8}(-\d+)?",
    "role": "group|note|list|listitem",
    "tabindex": "-1",
    "aria-hidden": "true",
    "aria-label": "Traced text",
    "aria-labelledby": "ta-[0-9a-f]{8}-sources",
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


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}")

    return show


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([piece for piece in PIECES if piece.isprintable()], vocab_size=400)


class Structure(HTMLParser):
    """Refuses every element, attribute, comment and style that the templates do not write."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.style: str | None = None
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert re.fullmatch(ATTRIBUTES[name], value or ""), (tag, name, value)
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


def check_page(index: Any, completion: str, other: str) -> int:
    """Trace a completion and read its page; how many spans it had."""
    traced = trace(index, completion, min_length=4, limit=3)
    verdict = SimpleNamespace(refused=bool(traced.spans), reason=other)
    page = viewer.page(traced, other, verdict=verdict, prompt=other)
    shown = "".join(Structure(page).text)
    assert shown.count(visible(other)) >= 4  # title, heading, verdict, prompt
    if not traced.spans:
        assert visible(completion) in shown
    assert "\x1b" not in traced.to_text()
    return len(traced.spans)


def check_batch(documents: list[Document], tokenizer: Any, path: Path, rng: random.Random) -> tuple[int, int]:
    """How many documents were indexed, came back equal and were traced, and in how many pages spans stood."""
    kept = [document for document in documents if storable(document)]
    index = TraceIndex.build(kept, tokenizer, path)
    assert index.document_ids == tuple(document.id for document in kept)
    marked = 0
    for document in kept:
        assert index.document(document.id) == document
        completion = hostile_text(rng, surrogates=0.1) + document.text + rng.choice(PIECES)
        marked += check_page(index, completion, rng.choice([document.id, *PIECES, *SURROGATES])) > 0
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    for document in [document for document in documents if not storable(document)]:
        for build in (TraceIndex.build, ShardedIndex.build):
            with pytest.raises(CorpusError, match="cannot be stored"):
                build([kept[0], document], tokenizer, path.parent.parent / "refused")
    return len(kept), marked


def check_texts(n: int, tokenizer: Any, folder: Path, say: Any) -> None:
    rng, indexed, marked = random.Random(n), 0, 0
    for first in range(0, n, 250):
        documents = hostile_documents(min(250, n - first), first)
        got = check_batch(documents, tokenizer, folder / "sound" / "a.index", rng)
        indexed, marked = indexed + got[0], marked + got[1]
    say(
        f"{n:,} hostile documents: {indexed:,} indexed and equal when read again, {n - indexed:,} refused by "
        f"name; {indexed:,} hostile completions traced, {marked:,} with spans: no element and no attribute "
        "of a page came from them"
    )
    assert marked > indexed / 2
    assert n - indexed > n / 100


def test_hostile_texts(tokenizer: Any, tmp_path: Path, say: Any) -> None:
    check_texts(250, tokenizer, tmp_path, say)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_hostile_texts(tokenizer: Any, tmp_path: Path, say: Any) -> None:
    check_texts(10_000, tokenizer, tmp_path, say)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4, unique=True), st.text(max_size=60))
def test_any_text(texts: list[str], completion: str) -> None:
    import tempfile

    coder = train_tokenizer(["hum twice then wait"])
    with tempfile.TemporaryDirectory() as folder:
        kept = [Document(text, text[::-1], {"file": text, text: text}) for text in texts]
        index = TraceIndex.build(kept, coder, Path(folder) / "a.index")
        assert [index.document(text) for text in texts] == kept
        check_page(index, completion + texts[0][::-1], texts[0])


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


def check_long(piece: str, size: int, copied: int, tokenizer: Any, path: Path) -> None:
    text = (piece * (size // len(piece.encode()) + 1))[:size]
    documents = [Document("long", text), Document("short", text[:50])]
    index = TraceIndex.build(documents, tokenizer, path)
    assert index.document("long").text == text
    traced = trace(index, f"Sure: {text[:copied]} !", limit=2)
    assert traced.n_traced >= 8
    assert traced.sources[0].document_id == "long"
    Structure(viewer.page(traced, "long"))


@pytest.mark.parametrize("piece", LONG.values(), ids=LONG)
def test_a_long_line(piece: str, tokenizer: Any, tmp_path: Path) -> None:
    check_long(piece, 20_000, 2000, tokenizer, tmp_path / "a.index")


@pytest.mark.slow
@pytest.mark.parametrize("piece", LONG.values(), ids=LONG)
def test_a_line_of_ten_million_characters(piece: str, tokenizer: Any, tmp_path: Path) -> None:
    check_long(piece, 10_000_000, 2000, tokenizer, tmp_path / "a.index")


def test_a_completion_that_is_too_long_is_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    index = TraceIndex.build([Document("d", "hum twice")], tokenizer, tmp_path / "a.index")
    with pytest.raises(ParameterError, match="too long to be traced at once"):
        trace(index, "a" * (tracing.LONGEST_TEXT + 1))


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
