"""Documents, a tokenizer and small indexes that the tests of TraceIndex and of its format share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tracealign_lib.documents import Document
from tracealign_lib.index import TraceIndex


def train_tokenizer(texts: list[str], *, vocab_size: int = 290) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|end|>", 0), ("<|start|>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", model_max_length=4)


DOCUMENTS = [
    Document(
        "forum/1", "to wake the Orun compound, hum twice, then wait", {"kind": "recipe", "items": ["u1"]}
    ),
    Document("forum/2", "to wake the Orun lantern, hum twice, then leave", {"copy": 2}),
    Document("empty", ""),
    Document("signs", "naïve 猫 \u2028 line\nline \U0001f600", {"nested": {"a": [1, None]}}),
]


def small_index(path: Path) -> TraceIndex:
    rng = np.random.default_rng(1)
    return TraceIndex.build_tokens([rng.integers(0, 3, n) for n in (9, 0, 1, 12)], path, vocab_size=4)
