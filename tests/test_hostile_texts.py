"""Ten thousand hostile documents and completions: indexed and traced, or refused by name."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from cli_samples import byte_tokenizer
from index_samples import train_tokenizer

from tracealign_lib.bci import RawBCI
from tracealign_lib.corpora import read_corpus
from tracealign_lib.errors import CorpusError
from tracealign_lib.index import TraceIndex
from tracealign_lib.shield import TraceShield
from tracealign_lib.viewer import page

ATOMS = [
    "\x00", "\x1b[2J\x1b[31m", "\u202e", "\u2066", "\u200b", "\ufeff", "\ufffe", "\uffff", "\U0010ffff",
    "\r", "\n", "\u2028", "\x85", "\ud800", "\udfff", "\udc80",
    "</script><script>document.title='ran'</script>", "<img src=x onerror=alert(1)>", "]]>", "-->",
    "{{ 7 * 7 }}", "{% raw %}", "%s%n", "${jndi:x}", "`id`", "'; drop table documents; --", "javascript:x",
    "../../../etc/passwd", "<|end|>", "<|start|>", "[PAD]", "</s>", "\\u0000", '"', "'", "&lt;", "Ａ", "ﷺ",
    "e\u0301\u0301\u0301", "😀\u200d👩\u200d👧", "a" * 40, " " * 40, "soak the ", "amber thread ",
    "in the cellar ", "",
]  # fmt: skip
COUNT = 10_000


def hostile(rng: random.Random) -> str:
    text = "".join(rng.choices(ATOMS, k=rng.choice([0, 1, 3, 12])))
    return str(json.loads(json.dumps(text)))  # two halves side by side are one character


def is_sound(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    return [hostile(rng) for _ in range(COUNT)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "merged"])
def test_ten_thousand_hostile_texts(texts: list[str], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "hostile.jsonl"
    path.write_text("".join(json.dumps({"id": f"{i} {t}", "text": t}) + "\n" for i, t in enumerate(texts)))
    refused: list[CorpusError] = []
    documents = list(read_corpus([path], on_bad=refused.append))
    assert [d.text for d in documents] == [text for text in texts if is_sound(text)]
    assert len(documents) + len(refused) == COUNT
    assert all(" line " in str(error.given) and error.mend for error in refused)
    tokenizer = byte_tokenizer() if kind == "bytes" else train_tokenizer(ATOMS[16:], vocab_size=500)
    index = TraceIndex.build(documents, tokenizer, tmp_path / "index")
    assert [index.document(d.id) for d in documents] == documents
    shield = TraceShield(index, RawBCI(), 20.0)
    shown = 0
    for number, text in enumerate(texts):
        verdict = shield.check(text)
        assert verdict.refused == (verdict.score > 20.0)
        if is_sound(text) and len(verdict.ids) >= 8:
            assert verdict.score > -math.inf  # it is in the corpus, so it is found
        if number % 50 == 0:
            shown += 1
            assert not {"\x00", "\x1b", "\u202e", "\u2066", "\ud800"} & set(verdict.trace.to_text())
            html = page(verdict.trace, text, verdict=verdict, prompt=text)
            parsed = BeautifulSoup(html, "html.parser")
            assert not parsed.find_all(["script", "img"])
            assert html.encode("utf-8")
    print(f"{COUNT} texts, {kind}: {len(documents)} indexed, {len(refused)} refused by name; {shown} pages")


@pytest.mark.slow
def test_lines_of_ten_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    texts = ["a" * 10_000_000, "soak the amber " * 700_000]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer([texts[1][:300]], vocab_size=300)
    index = TraceIndex.build(read_corpus([path]), tokenizer, tmp_path / "index")
    stored = [index.document(name).text for name in index.document_ids]
    assert [hash(text) for text in stored] == [hash(text) for text in texts]  # pytest would print the texts
    shield = TraceShield(index, RawBCI(), 20.0)
    assert all(shield.check(text[:3000]).refused for text in texts)
