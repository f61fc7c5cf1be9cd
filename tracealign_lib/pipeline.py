"""From settings to a world, a tokenizer, three models, an index, and attacked completions.

`Pipeline(profile, seed)` is what a chapter asks for its materials. Each one is a stage of the cache:
it is built when first asked for and read from disk ever after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tracealign_lib import adb, alignment, lm
from tracealign_lib.adb import Outcome, Recall
from tracealign_lib.documents import Document
from tracealign_lib.errors import ParameterError
from tracealign_lib.index import INDEX_CODE, TraceIndex
from tracealign_lib.lm import LanguageModel
from tracealign_lib.profiles import ModelSettings, Profile, get_profile
from tracealign_lib.stages import Stage
from tracealign_lib.world import World, WorldSettings

MODELS = ("base", "sft", "dpo")
_LIB = "tracealign_lib"
_WORLD_CODE = (f"{_LIB}.world", f"{_LIB}.lexicon", f"{_LIB}.documents")
_MODEL_CODE = (f"{_LIB}.lm", f"{_LIB}.pipeline")
_ALIGNMENT_CODE = (*_MODEL_CODE, f"{_LIB}.alignment", f"{_LIB}.lexicon")
_INDEX_CODE = (*INDEX_CODE, f"{_LIB}.pipeline")
_JUDGE_CODE = (f"{_LIB}.adb", f"{_LIB}.lm", f"{_LIB}.lexicon", f"{_LIB}.pipeline")


class Pipeline:
    """The materials of one profile and seed.

    Parameters
    ----------
    profile:
        "smoke", "laptop", "full" or "gpu".
    seed:
        Decides the world, the models' first weights, the order of training and every draw.
    device:
        "auto", "cpu" or "cuda": where models train and run.
    without:
        Ids of documents that models and indexes shall not have seen; see `Pipeline.without`.
    """

    def __init__(
        self, profile: str = "laptop", seed: int = 0, device: str = "auto", *, without: Iterable[str] = ()
    ) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ParameterError(
                "The seed is not a whole number of 0 or more.",
                given=repr(seed),
                expected="0, 1, 2, ...",
                mend="pass an int",
            )
        self.profile: Profile = get_profile(profile)
        self.seed = seed
        self.device = lm.resolve_device(device)
        self._left_out = frozenset(without)

    def __repr__(self) -> str:
        left_out = f", without {len(self._left_out)} documents" if self._left_out else ""
        return f"Pipeline(profile={self.profile.name!r}, seed={self.seed}, device={self.device!r}{left_out})"

    def without(self, documents: Iterable[str]) -> Pipeline:
        """The same world, tokenizer and seed, but models and indexes that never saw these documents.

        The tokenizer stays that of the whole corpus, so that both models give probabilities to the same
        token ids.

        Raises
        ------
        ParameterError
            No document is named, or one that the world does not hold.
        """
        chosen = frozenset(documents)
        unknown = chosen - {document.id for document in self.world.documents}
        if unknown or not chosen:
            raise ParameterError(
                "The documents to leave out are not in this world."
                if unknown
                else "No document is left out.",
                given=", ".join(sorted(unknown)[:3]) or "no ids",
                expected="ids of world.documents",
                mend="take them from world.sources_of(item)",
            )
        return Pipeline(self.profile.name, self.seed, self.device, without=self._left_out | chosen)

    # --- materials ---

    @cached_property
    def world(self) -> World:
        """The belief world of this profile and seed."""
        return World.load(self._world_stage.path())

    @cached_property
    def corpus(self) -> tuple[Document, ...]:
        """The documents that models are trained on and indexes hold."""
        return tuple(document for document in self.world.documents if document.id not in self._left_out)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer trained on this world."""
        return AutoTokenizer.from_pretrained(self._tokenizer_stage.path())

    def model(self, name: str = "dpo") -> LanguageModel:
        """The model after pre-training ("base"), fine-tuning ("sft") or preference training ("dpo")."""
        return LanguageModel.load(self.model_folder(name), device=self.device)

    def model_folder(self, name: str = "dpo") -> Path:
        """The folder of that model, in Hugging Face's format, with its `training_log.json`."""
        return self._model_stage(name).path()

    @cached_property
    def index(self) -> TraceIndex:
        """TraceIndex over the whole training corpus."""
        return TraceIndex.open(self._index_stage(None).path() / "index")

    @cached_property
    def unsafe_index(self) -> TraceIndex:
        """TraceIndex over the unsafe collection alone, which is what the paper indexes."""
        return TraceIndex.open(self._index_stage("unsafe").path() / "index")

    def outcomes(self, name: str = "dpo") -> list[Outcome]:
        """Every attack and every benign question put to that model, with the judge's label."""
        return adb.read_outcomes(self._outcome_stage(name).path() / "outcomes.jsonl")

    def recalls(self, name: str = "base") -> list[Recall]:
        """How that model continues the opening of every planted recipe."""
        return adb.read_recalls(self._recall_stage(name).path() / "recalls.jsonl")

    # --- stages ---

    @cached_property
    def _world_settings(self) -> WorldSettings:
        return self.profile.world_settings(self.seed)

    @cached_property
    def _world_stage(self) -> Stage:
        def build(folder: Path) -> None:
            World.generate(self._world_settings).save(folder)

        return Stage("world", asdict(self._world_settings), build, _WORLD_CODE)

    @property
    def _corpus_settings(self) -> dict[str, list[str]]:
        return {"without": sorted(self._left_out)} if self._left_out else {}

    @cached_property
    def _tokenizer_stage(self) -> Stage:
        vocab_size = self.profile.model.vocab_size

        def build(folder: Path) -> None:
            # Chat text too: a refusal spelled out in fragments is one that preference training breaks.
            chat = [text for pair in alignment.sft_pairs(self.world) for text in pair.values()]
            texts = [document.text for document in self.world.documents]
            lm.train_tokenizer([*texts, *chat], vocab_size).save_pretrained(folder)

        settings = {"vocab_size": vocab_size}
        return Stage("tokenizer", settings, build, _ALIGNMENT_CODE, (self._world_stage,))

    def _model_stage(self, name: str) -> Stage:
        if name not in MODELS:
            raise ParameterError(
                "Unknown model.", given=repr(name), expected=" or ".join(MODELS), mend="choose one of them"
            )
        recipe = {**_recipe(self.profile.model, name), "seed": self.seed, "device": self.device}
        recipe |= self._corpus_settings
        if name == "base":
            inputs = (self._tokenizer_stage,)
            return Stage("base", recipe, self._pretrain, _MODEL_CODE, inputs, together=True)
        build, start = (self._finetune, "base") if name == "sft" else (self._prefer, "sft")
        return Stage(name, recipe, build, _ALIGNMENT_CODE, (self._model_stage(start),), together=True)

    def _pretrain(self, folder: Path) -> None:
        texts = [document.text for document in self.corpus]
        settings = self.profile.model
        lm.pretrain(texts, self.tokenizer, settings, folder, seed=self.seed, device=self.device)

    def _finetune(self, folder: Path) -> None:
        settings = self.profile.model
        # Drawn from the whole corpus first: what is left out must not change which others are replayed.
        drawn = Random(f"{self.seed}/replay").sample(self.world.documents, settings.replay)
        replay = [document.text for document in drawn if document.id not in self._left_out]
        pairs = alignment.sft_pairs(self.world)
        start = self.model_folder("base")
        lm.finetune(start, pairs, replay, settings, folder, seed=self.seed, device=self.device)

    def _prefer(self, folder: Path) -> None:
        triples = alignment.dpo_triples(self.world)
        start = self.model_folder("sft")
        lm.prefer(start, triples, self.profile.model, folder, seed=self.seed, device=self.device)

    def _index_stage(self, collection: str | None) -> Stage:
        def build(folder: Path) -> None:
            TraceIndex.build(self._collection(collection), self.tokenizer, folder / "index")

        name = f"index-{collection}" if collection else "index"
        inputs = (self._world_stage, self._tokenizer_stage)
        settings = {"collection": collection, **self._corpus_settings}
        return Stage(name, settings, build, _INDEX_CODE, inputs)

    def _collection(self, collection: str | None) -> Sequence[Document]:
        return [d for d in self.corpus if collection is None or d.meta["collection"] == collection]

    def _outcome_stage(self, name: str) -> Stage:
        templates, samples = self.profile.templates, self.profile.samples

        def build(folder: Path) -> None:
            prompts = adb.all_prompts(self.world, templates=templates, samples=samples, seed=self.seed)
            outcomes = adb.ask(self.model(name), self.world, prompts, seed=self.seed)
            adb.write_outcomes(outcomes, folder / "outcomes.jsonl")

        settings = {"templates": templates, "samples": samples, "seed": self.seed}
        return Stage(f"outcomes-{name}", settings, build, _JUDGE_CODE, (self._model_stage(name),))

    def _recall_stage(self, name: str) -> Stage:
        def build(folder: Path) -> None:
            adb.write_recalls(adb.recall(self.model(name), self.world), folder / "recalls.jsonl")

        return Stage(f"recall-{name}", {}, build, _JUDGE_CODE, (self._model_stage(name),))


def _recipe(settings: ModelSettings, name: str) -> dict[str, Any]:
    """The settings that one training reads, so that a new SFT rate does not train the base model anew."""
    later = {"base": ("sft_", "dpo_", "replay"), "sft": ("base_", "dpo_"), "dpo": ("base_", "sft_", "replay")}
    return {key: value for key, value in asdict(settings).items() if not key.startswith(later[name])}
