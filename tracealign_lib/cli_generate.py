"""`tracealign generate`: completions of any Hugging Face model, with a defence before it or none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

import typer

from tracealign_lib.cli_input import Given, Json, Lines, Records, read_texts
from tracealign_lib.cli_shield import (
    Alpha,
    Calibrate,
    Delta,
    MaxCount,
    MinLength,
    Other,
    Rule,
    Rules,
    ScorerOption,
    Threshold,
    make_shield,
)
from tracealign_lib.errors import ModelError, ParameterError, TraceAlignError

if TYPE_CHECKING:
    from tracealign_lib.index import TraceIndex
    from tracealign_lib.lm import LanguageModel
    from tracealign_lib.shield import TraceShield

FIELDS = ("prompt", "text")
"""Fields of a record that hold a prompt unless told otherwise."""

Defence = Literal["none", "shield", "veto", "redirect"]


Model = Annotated[str, typer.Argument(help="A causal language model: a folder, or an id of the hub.")]
Prompt = Annotated[str | None, typer.Argument(help='The prompt; "-" reads one from standard input.')]
PromptField = Annotated[
    str | None,
    typer.Option("--field", help='Field of --jsonl that holds the prompt; by default "prompt", else "text".'),
]
DefenceOption = Annotated[
    Defence,
    typer.Option(
        "--defence",
        help="shield replaces risky completions, veto keeps risky spans from being completed, redirect turns "
        "to a refusal instead; each needs --index and a threshold.",
    ),
]
ModelIndex = Annotated[
    Path | None, typer.Option("--index", help="Folder of an index built with the model's tokenizer.")
]
Refusal = Annotated[str | None, typer.Option(help="What a refused completion is replaced with.")]
Raw = Annotated[bool, typer.Option("--raw", help="Use prompts as they are, without chat template.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Length of a completion at most, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
Beams = Annotated[int, typer.Option(min=1, help="Beams of a beam search.")]
Batch = Annotated[int, typer.Option(min=1, help="Prompts that the model reads at a time.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Device = Annotated[str, typer.Option(help="Where the model runs: auto, cpu or cuda.")]


class Settings(NamedTuple):
    """How the model is asked."""

    max_new_tokens: int
    temperature: float
    num_beams: int
    seed: int
    batch_size: int


class Completion(NamedTuple):
    """What came of one prompt; `refused` and `reason` are None where no shield looked at it."""

    text: str
    refused: bool | None = None
    reason: str | None = None


def generate(
    model: Model,
    prompt: Prompt = None,
    lines: Lines = None,
    records: Records = None,
    field: PromptField = None,
    defence: DefenceOption = "none",
    index: ModelIndex = None,
    scorer: ScorerOption = "raw",
    threshold: Threshold = None,
    calibrate: Calibrate = None,
    alpha: Alpha = 0.05,
    delta: Delta = None,
    min_length: MinLength = 8,
    max_count: MaxCount = None,
    rules: Rules = None,
    other: Other = None,
    refusal: Refusal = None,
    raw: Raw = False,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    beams: Beams = 1,
    batch: Batch = 16,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Complete prompts with a model, with or without a defence.

    Without a prompt, standard input has one a line. Exit status: 0 done, 2 error, 130 interrupted.

    \b
    Examples:
      tracealign generate allenai/OLMo-2-0425-1B-Instruct "Tell me a story."
      tracealign generate ./my-model --index my-index --defence shield --threshold 40 < prompts.txt
      tracealign generate ./my-model --index i --defence redirect --threshold 40 --jsonl prompts.jsonl --json
      tracealign generate ./my-model --json < prompts.txt > answers.jsonl
    """
    from tracealign_lib.tracing import visible

    rule = Rule(scorer, threshold, calibrate, alpha, delta, min_length, max_count, rules, other)
    settings = Settings(max_new_tokens, temperature, beams, seed, batch)
    given = list(read_texts(prompt, lines, records, FIELDS if field is None else (field,)))
    shield = _shield(defence, index, rule, refusal)
    loaded = load_model(model, device)
    prompts = _prompts(loaded, given, raw=raw, room=max_new_tokens)
    completions = complete(loaded, prompts, defence, shield, refusal, settings)
    for one, completion in zip(given, completions, strict=True):
        print(json.dumps(_record(one, completion, defence)) if as_json else visible(completion.text))


def load_model(source: str, device: str) -> LanguageModel:
    """`LanguageModel.load`; every fault of the files is a `ModelError`."""
    from tracealign_lib.lm import LanguageModel

    try:
        model = LanguageModel.load(source, device=device)
    except TraceAlignError:
        raise
    except Exception as error:  # damaged weights raise errors of the libraries that read them
        raise ModelError(
            "The model cannot be loaded.",
            given=f"{source}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="config.json, *.safetensors and tokenizer.json as they were saved",
            mend="copy or download the model again",
        ) from error
    if model.tokenizer.pad_token_id is None:
        raise ModelError(
            "The tokenizer has neither an end mark nor padding.",
            given=f"{source}: {type(model.tokenizer).__name__} with eos_token None",
            expected="a tokenizer with an eos_token",
            mend="set tokenizer.eos_token, and save it anew",
        )
    return model


def complete(
    model: LanguageModel,
    prompts: Sequence[str],
    defence: Defence,
    shield: TraceShield | None,
    refusal: str | None,
    settings: Settings,
) -> list[Completion]:
    """Completions of `prompts` by a model behind a defence; `shield` is needed for all but "none".

    Raises
    ------
    VocabularyError
        The index was not built with the model's tokenizer.
    ParameterError
        The refusal would itself be refused, or the model has no end mark that the guard can use.
    """
    options = settings._asdict()
    if shield is None:
        return [Completion(text) for text in model.generate(prompts, **options)]

    from tracealign_lib.prov_decode import ProvDecode
    from tracealign_lib.shield import REFUSAL

    refusal = REFUSAL if refusal is None else refusal
    if defence == "shield":
        guarded = shield.wrap(model, refusal=refusal)
        texts = guarded.generate(prompts, **options)
        decided = zip(texts, guarded.verdicts, strict=True)
        return [Completion(text, verdict.refused, verdict.reason) for text, verdict in decided]
    ends = model.model.generation_config.eos_token_id  # type: ignore[union-attr]
    guard = ProvDecode(
        cast("TraceIndex", shield.index),  # the only engine that a guard reads
        shield.scorer,
        shield.threshold,
        min_length=shield.min_length,
        max_count=shield.max_count,
        redirect=refusal if defence == "redirect" else None,
        tokenizer=model.tokenizer,
        end_ids=[ends] if isinstance(ends, int) else ends,
    )
    with guard.guarding(model):
        return [Completion(text) for text in model.generate(prompts, **options)]


def _shield(defence: Defence, index: Path | None, rule: Rule, refusal: str | None) -> TraceShield | None:
    """The shield of a defence; an option that would do nothing is an error, not an undefended model."""
    needed = {"--index": index, "--threshold": rule.threshold, "--calibrate": rule.calibrate}
    useless: dict[str, dict[str, object]] = {
        "none": {**needed, "--refusal": refusal},
        "veto": {"--refusal": refusal},
    }
    given = [name for name, value in useless.get(defence, {}).items() if value is not None]
    if given:
        raise ParameterError(
            "The defence has no use for this option.",
            given=f"{' and '.join(given)} with --defence {defence}",
            expected="--defence shield, veto or redirect for an index and a threshold, shield or redirect "
            "for a refusal",
            mend="choose another defence, or leave these options out",
        )
    if defence == "none":
        return None
    if index is None:
        raise ParameterError(
            "A defence needs an index.",
            given=f"--defence {defence} without --index",
            expected="--index DIR, built with the model's tokenizer",
            mend="build one with `tracealign index build`",
        )
    return make_shield(index, rule)


def _prompts(model: LanguageModel, given: Sequence[Given], *, raw: bool, room: int) -> list[str]:
    """What the model reads for each text; refuses what is empty or leaves no room for a completion."""
    from tracealign_lib.tracing import without_surrogates

    texts = [without_surrogates(one.text) for one in given]
    prompts = [text if raw else model.chat(text) for text in texts]
    context = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    for one, prompt in zip(given, prompts, strict=True):
        length = len(model.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        if not length or (context is not None and length + room > context):
            raise ParameterError(
                "A prompt is too long for the model." if length else "A prompt is empty.",
                given=f"prompt {one.number}: {length:,} tokens, and {room:,} for the completion",
                expected="at least 1 token" + ("" if context is None else f", at most {context:,} in all"),
                mend="shorten it, or ask for fewer tokens with --max-new-tokens"
                if length
                else "leave it out",
            )
    return prompts


def _record(given: Given, completion: Completion, defence: Defence) -> dict[str, Any]:
    return {
        "format": "tracealign.completion",
        "version": 1,
        "number": given.number,
        "id": given.id,
        "prompt": given.text,
        "completion": completion.text,
        "defence": defence,
        "refused": completion.refused,
        "reason": completion.reason,
    }
