"""Influence functions with curvature (EK-FAC): which documents would the model miss?

A plain gradient asks whether one step on a document is a step towards a text. An influence function asks what
the trained weights would be without the document, and so weighs directions by the curvature of the loss: to
first order, a step along a direction that many documents have already fixed changes little. EK-FAC is an
approximation of that curvature which fits into memory, layer by layer (Grosse et al., arXiv 2308.03296). The
work is kronfluence's, an optional library (extra `attribution`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BatchEncoding

from tracealign_lib.attribution import SHARE, Ranker, Ranking
from tracealign_lib.documents import Document, check_documents
from tracealign_lib.errors import ModelError
from tracealign_lib.lm import LanguageModel

_BATCH = 32
_FACTORS, _PAIRS, _SELF, _ALL = "factors", "pairs", "self", "all_modules"


class InfluenceRanker(Ranker):
    """Documents ranked by their influence on a text's loss, over the root of their influence on their own.

    The scaling is RelatIF's: without it, documents that were never learned, and have long gradients, come
    first for every text. The linear layers inside the blocks take part; embeddings, norms and the output
    layer, whose weights are the embeddings', do not. Damping is kronfluence's default.

    Parameters
    ----------
    model:
        The trained model; it is copied.
    documents:
        What is ranked.
    corpus:
        What the curvature is measured on, with next tokens drawn from the model: the training corpus.
    seed:
        Decides those draws.

    Raises
    ------
    ModelError
        kronfluence is not installed.
    CorpusError
        Documents are malformed.

    References
    ----------
    Grosse et al., arXiv 2308.03296; for the scaling, Barshan et al., arXiv 2003.11630.
    """

    def __init__(
        self,
        model: LanguageModel,
        documents: Sequence[Document],
        corpus: Sequence[Document],
        *,
        seed: int = 0,
        share: float = SHARE,
    ) -> None:
        self.share, self._seed = share, seed
        self._documents, self._corpus = check_documents(documents), check_documents(corpus)
        self._tokenizer, self._device = model.tokenizer, model.device
        self._library = _kronfluence()
        self._model = copy.deepcopy(model.model)  # it is wrapped, layer by layer

    def rank(self, text: str) -> Ranking:
        """See `Ranker.rank`; scores without a unit."""
        [ranking] = self.rank_many([text])
        return ranking

    def rank_many(self, texts: Sequence[str]) -> Iterator[Ranking]:
        """See `Ranker.rank_many`; negative influences are left out."""
        documents = self._tokens([document.text for document in self._documents])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the library uses an old name of torch's
            self._analyzer.compute_pairwise_scores(
                _PAIRS,
                _FACTORS,
                query_dataset=self._tokens(texts),
                train_dataset=documents,
                per_device_query_batch_size=_BATCH,
                per_device_train_batch_size=_BATCH,
                overwrite_output_dir=True,
            )
        scores = self._analyzer.load_pairwise_scores(_PAIRS)[_ALL] / self._lengths  # (texts, documents)
        for row in scores.tolist():
            ranked = sorted(zip(self._documents, row, strict=True), key=lambda pair: -pair[1])
            yield [(document.id, score) for document, score in ranked if score > 0]

    @cached_property
    def _lengths(self) -> Tensor:
        """Root of each document's influence on itself.  # (documents,)"""
        documents = self._tokens([document.text for document in self._documents])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self._analyzer.compute_self_scores(
                _SELF, _FACTORS, train_dataset=documents, per_device_train_batch_size=_BATCH
            )
        own: Tensor = self._analyzer.load_self_scores(_SELF)[_ALL]
        return own.clamp_min(torch.finfo(own.dtype).tiny).sqrt()

    @cached_property
    def _analyzer(self) -> Any:
        """kronfluence's analyzer with the factors of the curvature, kept in a folder that goes with it."""
        library = self._library
        task = _task(library, self._model)
        self._folder = TemporaryDirectory(prefix="influence-")
        analyzer = library.Analyzer(
            "influence",
            library.prepare_model(self._model, task),
            task,
            cpu=self._device == "cpu",
            disable_tqdm=True,
            output_dir=str(Path(self._folder.name)),
        )
        tokenizer = self._tokenizer

        def pad(rows: list[dict[str, list[int]]]) -> BatchEncoding:
            return tokenizer.pad(rows, return_tensors="pt", padding_side="right")

        analyzer.set_dataloader_kwargs(library.utils.dataset.DataLoaderKwargs(collate_fn=pad))
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.manual_seed(self._seed)
            analyzer.fit_all_factors(
                _FACTORS,
                self._tokens([document.text for document in self._corpus]),
                per_device_batch_size=_BATCH,
            )
        return analyzer

    def _tokens(self, texts: Sequence[str]) -> list[dict[str, list[int]]]:
        encoded = self._tokenizer(list(texts), add_special_tokens=False)
        return [{"input_ids": ids} for ids in encoded["input_ids"]]


def _kronfluence() -> Any:
    try:
        import kronfluence  # type: ignore[import-not-found]
        import kronfluence.utils.dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise ModelError(
            "Influence functions need kronfluence.",
            given="no module kronfluence",
            expected="the extra `attribution`",
            mend="in the book's folder: pip install -e '.[attribution]'; "
            "or use causal.GradientRanker(model, documents)",
        ) from error
    return kronfluence


def _task(library: Any, model: nn.Module) -> Any:
    """What kronfluence asks of a task: the loss, summed over tokens, and which layers take part."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [
        name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not output
    ]

    class NextTokens(library.Task):  # type: ignore[misc,name-defined]
        def compute_train_loss(self, batch: BatchEncoding, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(**batch).logits[:, :-1]  # (B, T - 1, V)
            targets = batch["input_ids"][:, 1:]  # (B, T - 1)
            if sample:  # the Fisher information is an expectation over what the model would say
                drawn = torch.distributions.Categorical(logits=logits.detach())
                targets = drawn.sample()  # type: ignore[no-untyped-call]
            targets = targets.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
            return cross_entropy(logits.transpose(1, 2), targets, reduction="sum")

        def compute_measurement(self, batch: BatchEncoding, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

        def get_attention_mask(self, batch: BatchEncoding) -> Tensor:
            mask: Tensor = batch["attention_mask"]
            return mask

    return NextTokens()
