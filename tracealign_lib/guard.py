"""Put a filter before a model: the same calls, refusals in place of refused completions.

Any Hugging Face causal language model can stand behind a filter: the book's `LanguageModel`, a plain
transformers model with its tokenizer, or a text-generation pipeline. What the model has written is
decoded and checked as text, the prompt left out. So it does not matter how it was decoded, and another
spelling of the same words in tokens does not slip through.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList, TextGenerationPipeline
from transformers.generation import GenerationMode

from tracealign_lib.errors import ParameterError
from tracealign_lib.lm import LanguageModel
from tracealign_lib.shield import CompletionFilter, Decision, TraceShield
from tracealign_lib.streaming import ShieldStop

MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
"""The ways of decoding that are guarded. The others of transformers are loops fetched from elsewhere."""


def generation_mode(model: Any, settings: Mapping[str, Any]) -> GenerationMode:
    """How `model.generate(**settings)` will decode: its arguments, else the configuration's, decide."""
    configuration = copy.deepcopy(settings.get("generation_config") or model.generation_config)
    own = model.generation_config
    for name in vars(own):
        given = settings.get(name)
        if given is not None or getattr(configuration, name, None) is None:
            setattr(configuration, name, getattr(own, name) if given is None else given)
    return configuration.get_generation_mode(settings.get("assistant_model"))


def guard(
    shield: CompletionFilter[Any], model: Any, tokenizer: Any = None, *, refusal: str, stop_early: bool
) -> Any:
    """`model` behind `shield`; see `CompletionFilter.wrap`.

    Parameters
    ----------
    shield:
        A TraceShield or any other filter of completions.
    model, tokenizer:
        A `LanguageModel` or a text-generation pipeline, which hold their tokenizer, or a transformers
        model and its tokenizer.
    refusal:
        What stands in the place of a refused completion.
    stop_early:
        Stop a row at once when a TraceShield's streaming form meets a risky span, instead of writing it
        to its end. For transformers models and pipelines, and not under beams.

    Returns
    -------
    GuardedLanguageModel, GuardedModel, or a pipeline whose model is a GuardedModel
        With the verdicts of the last `generate` call in `verdicts`.

    Raises
    ------
    VocabularyError
        The shield's index was encoded with another tokenizer.
    ParameterError
        The model is of another kind or lacks a tokenizer, the tokenizer has no end mark to close a refusal
        with, or the model cannot be stopped early.
    """
    if isinstance(model, TextGenerationPipeline):
        guarded = copy.copy(model)
        guarded.model = guard(shield, model.model, model.tokenizer, refusal=refusal, stop_early=stop_early)
        return guarded
    if isinstance(model, LanguageModel):
        tokenizer = model.tokenizer
    _check_guardable(shield, model, tokenizer, stop_early)
    if isinstance(model, LanguageModel):
        return GuardedLanguageModel(shield, model, refusal)
    return GuardedModel(shield, model, tokenizer, refusal, stop_early=stop_early)


def _check_guardable(shield: CompletionFilter[Any], model: Any, tokenizer: Any, stop_early: bool) -> None:
    is_ours = isinstance(model, LanguageModel)
    if not is_ours and (not isinstance(model, PreTrainedModel) or tokenizer is None):
        raise ParameterError(
            "This cannot be guarded.",
            given=f"{type(model).__name__} with {'a' if tokenizer is not None else 'no'} tokenizer",
            expected="a LanguageModel, a text-generation pipeline, or a transformers model and its tokenizer",
            mend="pass the tokenizer as the second argument, or check(text) what the model returns",
        )
    if isinstance(shield, TraceShield):
        shield.index.check_tokenizer(tokenizer)
    if stop_early and (is_ours or not isinstance(shield, TraceShield)):
        raise ParameterError(
            "This cannot be stopped early.",
            given=f"{type(shield).__name__} before {type(model).__name__}",
            expected="a TraceShield before a transformers model or pipeline",
            mend="wrap model.model with model.tokenizer, or leave stop_early out",
        )
    if tokenizer.eos_token_id is None:
        raise ParameterError(
            "The tokenizer has no end mark.",
            given=f"{type(tokenizer).__name__} with eos_token None",
            expected="a tokenizer with an eos_token, which closes a refusal",
            mend="set tokenizer.eos_token before wrapping the model (and before building the index)",
        )


class GuardedLanguageModel(LanguageModel):
    """A `LanguageModel` whose refused completions are replaced.

    Attributes
    ----------
    verdicts:
        One decision for each prompt of the last `generate` call, in order.
    """

    def __init__(self, shield: CompletionFilter[Any], model: LanguageModel, refusal: str) -> None:
        super().__init__(model.model, model.tokenizer, model.device)
        self.shield, self.refusal = shield, refusal
        self.verdicts: list[Decision] = []

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        """`LanguageModel.generate`, with the refusal in the place of what is refused."""
        texts = super().generate(prompts, **settings)
        self.verdicts = self.shield.check_many(texts)
        decided = zip(texts, self.verdicts, strict=True)
        return [self.refusal if verdict.refused else text for text, verdict in decided]


class GuardedModel:
    """A transformers model whose `generate` replaces refused completions; all else is the model's own.

    Methods that return the model itself, such as `to` and `eval`, return the guarded one. Calling it gives
    the model's logits, which no filter reads.

    Attributes
    ----------
    verdicts:
        One decision for each row of the last `generate` call, in order.
    """

    def __init__(
        self, shield: CompletionFilter[Any], model: Any, tokenizer: Any, refusal: str, *, stop_early: bool
    ) -> None:
        self.shield, self.model, self.tokenizer, self.refusal = shield, model, tokenizer, refusal
        self.stop_early = stop_early
        self.verdicts: list[Decision] = []

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet while a copy is made
            raise AttributeError(name)
        value = getattr(self.model, name)
        if not inspect.ismethod(value):
            return value

        @functools.wraps(value)
        def guarded(*args: Any, **settings: Any) -> Any:
            result = value(*args, **settings)
            return self if result is self.model else result

        return guarded

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """The model's forward pass."""
        return self.model(*args, **settings)

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, **settings: Any
    ) -> Tensor:
        """`model.generate`: ids (B, T), in which a refused row is its prompt, the refusal, and the end.

        Raises
        ------
        ParameterError
            Before anything is generated: a streamer, which would show tokens unchecked; outputs other
            than ids, which would still hold what was refused; embeddings in place of a prompt; an
            encoder-decoder model; a way of decoding that is not one of `MODES`, or a loop of another's
            making; or beams together with `stop_early`.
        """
        settings["generation_config"] = generation_config
        self._check_mode(settings)
        prompt = inputs if inputs is not None else settings.get("input_ids")
        width = 0 if prompt is None else prompt.shape[1]
        stop = None
        if self.stop_early:
            known = None if prompt is None else width
            stop = ShieldStop(self.shield, self.tokenizer, prompt_length=known)  # type: ignore[arg-type]
            settings["stopping_criteria"] = StoppingCriteriaList(
                [*(settings.get("stopping_criteria") or ()), stop]
            )
        output = self.model.generate(inputs, **settings)  # (B, T)
        texts = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        self.verdicts = self.shield.check_many(texts)
        for row, stream in enumerate(stop.streams if stop is not None else ()):
            if stream.stopped:
                self.verdicts[row] = stream.verdict()
        return self._replace(output, width, self._setting("pad_token_id", settings))

    def _replace(self, output: Tensor, width: int, pad: int | None) -> Tensor:
        refused = [row for row, verdict in enumerate(self.verdicts) if verdict.refused]
        if not refused:
            return output
        end = self.tokenizer.eos_token_id
        ids = [*self.tokenizer(self.refusal, add_special_tokens=False)["input_ids"], end]
        length = max(output.shape[1], width + len(ids))
        replaced = output.new_full((len(output), length), end if pad is None else pad)  # (B, T)
        replaced[:, : output.shape[1]] = output
        replaced[refused, width:] = end if pad is None else pad
        replaced[refused, width : width + len(ids)] = torch.tensor(ids, device=output.device)
        return replaced

    def _setting(self, name: str, settings: dict[str, Any]) -> Any:
        """What `generate` will use: its argument, else the configuration's."""
        configuration = settings.get("generation_config") or self.model.generation_config
        value = settings.get(name)
        return getattr(configuration, name, None) if value is None else value

    def _check_mode(self, settings: dict[str, Any]) -> None:
        beams = self._setting("num_beams", settings) or 1
        mode = generation_mode(self.model, settings)
        unsupported = {
            "a streamer": settings.get("streamer") is not None,
            "return_dict_in_generate": bool(self._setting("return_dict_in_generate", settings)),
            "inputs_embeds": settings.get("inputs_embeds") is not None,
            "an encoder-decoder model": bool(self.model.config.is_encoder_decoder),
            "custom_generate": settings.get("custom_generate") is not None,
            mode.value: mode not in MODES,
            f"num_beams={beams} with stop_early": self.stop_early and beams > 1,
        }
        given = [name for name, used in unsupported.items() if used]
        if given:
            raise ParameterError(
                "A guarded model cannot generate in this way.",
                given=", ".join(given),
                expected="a decoder-only model that continues input_ids by greedy search, sampling, beams or "
                "assisted decoding, and returns ids; to stop early, no beams",
                mend="stream with shield.stream(), or check what comes out with shield.check",
            )
