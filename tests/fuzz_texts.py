"""Hostile texts, ids and metadata: what could run in a page, mislead a reader, or break a file."""

from __future__ import annotations

import random

from tracealign_lib.documents import Document

RUN = "window.ran=1;document.title='ran';fetch('file:///ran')"
PIECES = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</style><script>{RUN}</script><style>",
    f'"><img src=x onerror="{RUN}">',
    f"' onmouseover='{RUN}' autofocus onfocus='{RUN}",
    f"<svg/onload={RUN}>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'>",
    f"</title></textarea></noscript><body onload={RUN}>",
    f"<a href=javascript:{RUN}>x</a>",
    "<base href=file:///ran><link rel=stylesheet href=file:///ran>",
    "<meta http-equiv=refresh content='0;url=file:///ran'>",
    "}</style>*{background:url(file:///ran)}",
    "<!-- --!><![CDATA[ ]]> <?xml?> <!DOCTYPE html>",
    "&lt;b&gt; &#x3c;script&#x3e; &amp;amp; &",
    "{{ 7 * 7 }}{% raw %}{# #}${7*7}",
    "$$\\href{javascript:alert(1)}{x}$$ \\(x\\) `x`{=html}",
    "<|end|>", "<|start|>", "<|endoftext|>", "</s>", "[SEP]", "<pad>",
    "\0", "\x01\x1b[31m\x9b2J\x7f", "\r", "\n", "\r\n", "\t", "\v\f", "\x85", "\u2028\u2029",
    "\u202eevil\u202c", "\u2066\u2069\u200f\u061c", "\u200b\u2060\ufeff\u180e", "\ufffe\uffff\U0010ffff",
    "\U000e0041\U000e0042\U000e007f", "e" + "\u0301" * 40, "\U0001f469\u200d\U0001f4bb", "ﷺ", "İıſK",
    "]]>-->", "%s%n${jndi:x}`id`", "'; drop table documents; --", "Ａ", "\x1b[2J\x1b[31m", "javascript:x",
    " " * 300, "a" * 500, "../../../etc/passwd", "C:\\con\\nul", "file:///etc/passwd", '"', "'", "\\",
    "\\u0000", "hum twice then wait", "wake the orun compound", "",
]  # fmt: skip
SURROGATES = ["\ud800", "\udfff", "\udc80x", "\udfff\ud800"]


def hostile_text(rng: random.Random, *, surrogates: float = 0.0) -> str:
    pieces = [rng.choice(PIECES) for _ in range(rng.choice([0, 1, 2, 4, 9]))]
    if rng.random() < surrogates:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(SURROGATES))
    if rng.random() < 0.3:
        pieces.append("".join(map(chr, rng.choices(range(0xD800), k=rng.randrange(20)))))
    return rng.choice(["", " "]).join(pieces)


def hostile_documents(n: int, seed: int) -> list[Document]:
    """Documents with unique ids; one in twenty holds a lone surrogate somewhere, and cannot be stored."""
    rng = random.Random(seed)
    documents = []
    for i in range(n):
        parts = [hostile_text(rng, surrogates=0.02) for _ in range(3)]
        meta = {"file": parts[2], "collection": rng.choice(PIECES), "n": [i, None, {"a": 1e300}]}
        documents.append(Document(f"{parts[1]}{i}", parts[0], meta))
    return documents


def storable(document: Document) -> bool:
    """Whether all of a document can be written as UTF-8."""
    try:
        document.to_json().encode()
    except UnicodeEncodeError:
        return False
    return True
