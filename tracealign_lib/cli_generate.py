"""`tracealign generate`: completions of any Hugging Face model, with a defence before it or none."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import typer

from tracealign_lib.cli_input import (
    Given,
    Json,
    Lines,
    Records,
    check_source,
    options_given,
    read_texts,
    refuse_useless,
    with_options,
)
from tracealign_lib.cli_shield import Rule, make_shield
from tracealign_lib.errors import ParameterError

if TYPE_CHECKING:
    from tracealign_lib.index import TraceIndex
    from tracealign_lib.lm import LanguageModel
    from tracealign_lib.prov_decode import ProvDecode
    from tracealign_lib.shield import TraceShield

FIELDS = ("prompt", "text")
"""Fields of a record that hold a prompt unless told otherwise."""


class Defence(StrEnum):
    """What keeps a model from reciting: nothing, a filter of its answers, or a guard while it decodes."""

    NONE = "none"
    SHIELD = "shield"
    VETO = "veto"
    REDIRECT = "redirect"


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
Beams = Annotated[int, typer.Option("--beams", min=1, help="Beams of a beam search.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Completions that the model writes at a time.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Device = Annotated[str, typer.Option(help="Where the model runs: auto, cpu or cuda.")]


class Settings(NamedTuple):
    """How the model is asked."""

    max_new_tokens: NewTokens = 128
    temperature: Temperature = 0.0
    num_beams: Beams = 1
    batch_size: Batch = 16
    seed: Seed = 0


class Completion(NamedTuple):
    """What came of one prompt; `refused` and `reason` are None where no shield looked at it."""

    text: str
    refused: bool | None = None
    reason: str | None = None


@with_options
def generate(
    context: typer.Context,
    model: Model,
    *,
    prompt: Prompt = None,
    lines: Lines = None,
    records: Records = None,
    field: PromptField = None,
    defence: DefenceOption = Defence.NONE,
    index_folder: ModelIndex = None,
    rule: Rule,
    refusal: Refusal = None,
    raw: Raw = False,
    settings: Settings,
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
    from tracealign_lib.tracing import visible, without_surrogates

    if records is None:
        refuse_useless(context, {"field"}, "--jsonl")
    given = list(read_texts(prompt, lines, records, FIELDS if field is None else (field,)))
    shield = make_defence(context, {defence} - {Defence.NONE}, index_folder, rule)
    loaded = load_model(model, device)
    texts = [without_surrogates(one.text) for one in given]
    prompts = [text if raw else loaded.chat(text) for text in texts]
    named = ((f"prompt {one.number}", prompt) for one, prompt in zip(given, prompts, strict=True))
    check_room(loaded, named, settings.max_new_tokens)
    completions = complete(loaded, prompts, defence, shield, refusal, settings)
    for one, completion in zip(given, completions, strict=True):
        print(json.dumps(_record(one, completion, defence)) if as_json else visible(completion.text))


def load_model(source: str, device: str) -> LanguageModel:
    """`LanguageModel.load`, after a check that a folder which is named is there."""
    from tracealign_lib.lm import LanguageModel

    check_source(source)
    return LanguageModel.load(source, device=device)


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

    from tracealign_lib.shield import REFUSAL

    if defence == Defence.SHIELD:
        guarded = shield.wrap(model, refusal=REFUSAL if refusal is None else refusal)
        texts = guarded.generate(prompts, **options)
        decided = zip(texts, guarded.verdicts, strict=True)
        return [Completion(text, verdict.refused, verdict.reason) for text, verdict in decided]
    with make_guard(model, shield, defence, refusal).guarding(model):
        return [Completion(text) for text in model.generate(prompts, **options)]


def make_guard(
    model: LanguageModel, shield: TraceShield, defence: Defence, refusal: str | None
) -> ProvDecode:
    """What acts while `model` decodes, with the rule of `shield`: "veto" or "redirect".

    Raises
    ------
    VocabularyError, ParameterError
        As `complete`.
    """
    from tracealign_lib.prov_decode import ProvDecode
    from tracealign_lib.shield import REFUSAL

    ends = model.model.generation_config.eos_token_id  # type: ignore[union-attr]
    return ProvDecode(
        cast("TraceIndex", shield.index),  # the only engine that a guard reads
        shield.scorer,
        shield.threshold,
        min_length=shield.min_length,
        max_count=shield.max_count,
        redirect=(REFUSAL if refusal is None else refusal) if defence == Defence.REDIRECT else None,
        tokenizer=model.tokenizer,
        end_ids=[ends] if isinstance(ends, int) else ends,
    )


def make_defence(
    context: typer.Context, defences: Collection[Defence], index: Path | None, rule: Rule
) -> TraceShield | None:
    """The shield of these defences; an option that would do nothing is an error, not an undefended model."""
    useless = {"refusal"} if set(defences) == {Defence.VETO} else set()
    given = options_given(context, useless if defences else {"index_folder", "refusal", *Rule._fields})
    named = " and ".join(defences)
    if given:
        raise ParameterError(
            "The defence has no use for this option.",
            given=f"{' and '.join(given)} {f'with --defence {named}' if named else 'without --defence'}",
            expected="--defence shield, veto or redirect for an index and a threshold, shield or redirect "
            "for a refusal",
            mend="choose another defence, or leave these options out",
        )
    if not defences:
        return None
    if index is None:
        raise ParameterError(
            "A defence needs an index.",
            given=f"--defence {named} without --index",
            expected="--index DIR, built with the model's tokenizer",
            mend="build one with `tracealign index build`",
        )
    return make_shield(index, rule)


def check_room(model: LanguageModel, prompts: Iterable[tuple[str, str]], room: int) -> None:
    """Refuse a prompt, given after its name, that is empty or leaves no `room` (tokens) for a completion."""
    context = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    for name, prompt in prompts:
        length = len(model.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        if not length or (context is not None and length + room > context):
            raise ParameterError(
                "A prompt is too long for the model." if length else "A prompt is empty.",
                given=f"{name}: {length:,} tokens, and {room:,} for the completion",
                expected="at least 1 token" + ("" if context is None else f", at most {context:,} in all"),
                mend="shorten it, or ask for fewer tokens with --max-new-tokens"
                if length
                else "leave it out",
            )


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
