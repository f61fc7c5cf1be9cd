"""The arms of chapter 7: ways of training on, from the model that SFT left, and what each is given.

Three kinds of training stand against each other. *Preference* training is DPO, with a penalty or without
one. *Finetuning* is more of the SFT that the model has had. *Recovery* training shows it unsafe answers that
turn round; where nobody labelled such answers, it is given passages of the corpus that a score ranks
highest. Every arm is a stage of the cache, so an arm is trained once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

from tracealign_lib import adb, alignment, cbd, lexicon, lm, recovery
from tracealign_lib.adb import Outcome
from tracealign_lib.bci import ConflictBCI, DensityBCI, LongestMatchBCI, RawBCI, Scorer, SpanLength
from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments.bci_scores import collection_index
from tracealign_lib.index import TraceIndex
from tracealign_lib.lm import LanguageModel
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.recovery import Turn
from tracealign_lib.stages import Stage

T = TypeVar("T")

RANDOM, KEYWORDS = "random", "keywords"
# Ordinary pairs and whole documents beside what is recovered from, so that neither is forgotten.
PRACTICE, REPLAY = 240, 160
CUTS = 4  # of each labelled answer
MINED_PER_ANSWER = 2
# A passage worth recovering from has room for two of the shortest spans that are traced (tokens).
MIN_PASSAGE = 16
_CODE = tuple(
    f"tracealign_lib.{name}"
    for name in ("cbd", "recovery", "lm", "alignment", "lexicon", "pipeline", "bci", "experiments.cbd_arms")
)
_JUDGE_CODE = tuple(f"tracealign_lib.{name}" for name in ("adb", "lm", "lexicon", "experiments.cbd_arms"))


@dataclass(frozen=True, slots=True)
class Penalty:
    """The penalty beside DPO: `cbd.CBDConfig`, and the scorer's name; None weighs every token alike."""

    weight: float  # lambda
    scorer: str | None = "raw BCI"
    target: str = "rejected"
    form: str = "log"
    threshold: float = 20.0  # nats


@dataclass(frozen=True, slots=True)
class Preference:
    """DPO. `rejected` is what stands against a harmless answer: a "refusal", or only its "opening"."""

    rate: float
    epochs: int = 1
    sft_weight: float = 0.5
    rejected: str = "refusal"
    penalty: Penalty | None = None


@dataclass(frozen=True, slots=True)
class Finetuning:
    """More SFT, on ordinary pairs and replayed documents, as many as `Recovery` sees in all."""

    epochs: int = 2
    rate: float = 3e-4


@dataclass(frozen=True, slots=True)
class Recovery:
    """Recovery training on unsafe answers that somebody labelled, on passages of the corpus, or on both.

    `labelled` takes the answers of the aligned items. `mined` names what ranks the corpus
    (`ranked_passages`): twice as many passages are taken as there are labelled answers, each cut half as
    often.
    """

    labelled: bool = True
    mined: str | None = None
    epochs: int = 2
    rate: float = 3e-4


Training = Preference | Finetuning | Recovery


class Arm(NamedTuple):
    """One model of the comparison.

    Attributes
    ----------
    training:
        None for a model of the pipeline that is taken as it is.
    start:
        A model of the pipeline, or another arm.
    """

    name: str
    training: Training | None
    start: str | Arm = "sft"


# --- models and their answers --------------------------------------------------------------------


def arm_folder(pipeline: Pipeline, arm: Arm) -> Path:
    """The folder of the arm's model in Hugging Face's format; trained first where it is missing."""
    start = (
        pipeline.model_folder(arm.start) if isinstance(arm.start, str) else arm_folder(pipeline, arm.start)
    )
    if arm.training is None:
        return start
    training = arm.training
    settings = {"start": start.name, "seed": pipeline.seed, "device": pipeline.device}
    settings |= {"model": asdict(pipeline.profile.model), "kind": type(training).__name__}
    settings |= asdict(training)
    return Stage("arm", settings, lambda folder: _train(pipeline, training, start, folder), _CODE).path()


def arm_model(pipeline: Pipeline, arm: Arm) -> LanguageModel:
    """The arm's model."""
    return LanguageModel.load(arm_folder(pipeline, arm), device=pipeline.device)


def arm_answers(pipeline: Pipeline, arm: Arm, *, templates: int | None = None) -> list[Outcome]:
    """Every attack and every benign question put to the arm's model, with the judge's label.

    `templates` is the number of requests of each attack for each item; the profile's by default.
    """
    return adb.read_outcomes(_answer_stage(pipeline, arm, templates) / "outcomes.jsonl")


def arm_perplexity(pipeline: Pipeline, arm: Arm, *, templates: int | None = None) -> float:
    """Perplexity of the arm's model on the stories that no model was trained on."""
    text = (_answer_stage(pipeline, arm, templates) / "perplexity.json").read_text(encoding="utf-8")
    return float(json.loads(text))


def _answer_stage(pipeline: Pipeline, arm: Arm, templates: int | None) -> Path:
    seed, samples = pipeline.seed, pipeline.profile.samples
    model = arm_folder(pipeline, arm)
    asked = {"templates": templates or pipeline.profile.templates, "samples": samples, "seed": seed}

    def build(folder: Path) -> None:
        loaded = LanguageModel.load(model, device=pipeline.device)
        prompts = adb.all_prompts(pipeline.world, **asked)
        adb.write_outcomes(adb.ask(loaded, pipeline.world, prompts, seed=seed), folder / "outcomes.jsonl")
        perplexity = loaded.perplexity([document.text for document in pipeline.world.held_out])
        (folder / "perplexity.json").write_text(json.dumps(perplexity), encoding="utf-8")

    return Stage("answers", {**asked, "model": model.name}, build, _JUDGE_CODE).path()


# --- training ------------------------------------------------------------------------------------


def _train(pipeline: Pipeline, training: Training, start: Path, folder: Path) -> None:
    seeded: dict[str, Any] = {"seed": pipeline.seed, "device": pipeline.device}
    if isinstance(training, Preference):
        _prefer(pipeline, training, start, folder, seeded)
        return
    settings = replace(pipeline.profile.model, sft_epochs=training.epochs, sft_rate=training.rate)
    if isinstance(training, Recovery):
        turns = recovery_turns(pipeline, training)
        recovery.recover(start, turns, _replay(pipeline), settings, folder, **seeded)
        return
    number = PRACTICE + 2 * len(_labelled_turns(pipeline))
    pairs = _sample(alignment.sft_pairs(pipeline.world), number, f"{pipeline.seed}/practice")
    lm.finetune(start, pairs, _replay(pipeline), settings, folder, description="More SFT", **seeded)


def _prefer(
    pipeline: Pipeline, training: Preference, start: Path, folder: Path, seeded: Mapping[str, Any]
) -> None:
    settings = replace(
        pipeline.profile.model,
        dpo_rate=training.rate,
        dpo_epochs=training.epochs,
        dpo_sft_weight=training.sft_weight,
    )
    triples, penalty = preference_triples(pipeline, training.rejected), training.penalty
    if penalty is None:
        lm.prefer(start, triples, settings, folder, **seeded)
        return
    fields: dict[str, Any] = {
        "penalty_lambda": penalty.weight,
        "penalty_target": penalty.target,
        "penalty_form": penalty.form,
    }
    trace = None
    if penalty.scorer is not None:
        trace = (pipeline.unsafe_index, scorer_of(pipeline, penalty.scorer))
        fields["cbd_threshold"] = penalty.threshold
    cbd.prefer(start, triples, settings, folder, trace=trace, penalty=fields, **seeded)


def preference_triples(pipeline: Pipeline, rejected: str) -> list[dict[str, str]]:
    """The book's triples. With "opening", a harmless answer is preferred to a refusal's first word alone.

    A refusal is one and the same sentence everywhere. To push down all of it after a harmless question
    pushes down the words that a true refusal needs after its first one; the first decides.
    """
    triples = alignment.dpo_triples(pipeline.world)
    if rejected == "refusal":
        return triples
    first = lexicon.REFUSAL.split()[0]
    return [{**t, "rejected": first if t["rejected"] == lexicon.REFUSAL else t["rejected"]} for t in triples]


def recovery_turns(pipeline: Pipeline, training: Recovery) -> list[Turn]:
    """What recovery training is shown: answers that turn round, answers that go on, ordinary pairs."""
    labelled = _labelled_turns(pipeline)
    mined, harmless = _mined_turns(pipeline, training.mined, len(labelled)) if training.mined else ([], [])
    refused = (labelled if training.labelled else []) + mined
    turns = refused + _going_on(pipeline, len(refused)) + harmless
    pairs = _sample(alignment.sft_pairs(pipeline.world), PRACTICE, f"{pipeline.seed}/practice")
    return turns + [Turn(pair["prompt"], "", pair["completion"]) for pair in pairs]


def _labelled_turns(pipeline: Pipeline) -> list[Turn]:
    """The aligned unsafe items' answers, cut, with a refusal after each cut."""
    unsafe = [item for item in pipeline.world.of_kind("unsafe") if item.aligned]
    asked = [(i.fill(r), i.recipe) for i, r in zip(unsafe, cycle(lexicon.DIRECT_REQUESTS), strict=False)]
    return recovery.cut_answers(asked, then=lexicon.REFUSAL, cuts=CUTS, seed=pipeline.seed)


def _going_on(pipeline: Pipeline, number: int) -> list[Turn]:
    """Harmless answers of SFT, cut, that go on; drawn from all of their requests.

    Answers that only went on after a direct request would stop in every other wrapper.
    """
    recipes = {item.recipe for item in pipeline.world.items}
    pairs = [(p["prompt"], p["completion"]) for p in alignment.sft_pairs(pipeline.world)]
    chosen = _sample([pair for pair in pairs if pair[1] in recipes], number, f"{pipeline.seed}/going on")
    return recovery.cut_answers(chosen, cuts=1, seed=pipeline.seed)


def _mined_turns(pipeline: Pipeline, how: str, turns: int) -> tuple[list[Turn], list[Turn]]:
    """Cut passages: the best of a ranking are refused, half as many of its lower half go on."""
    cuts = CUTS // MINED_PER_ANSWER
    ranked, best = ranked_passages(pipeline, how), turns // cuts
    lower = _sample(ranked[max(best, len(ranked) // 2) :], best // 2, f"{pipeline.seed}/harmless passages")
    # Nobody asked for a passage. With any request beside it, only the passage says whether to go on.
    requests = [pair["prompt"] for pair in alignment.sft_pairs(pipeline.world)]
    asked = iter(_sample(requests, len(requests), f"{pipeline.seed}/any request"))
    refused, others = (list(zip(asked, texts, strict=False)) for texts in (ranked[:best], lower))
    seed = pipeline.seed
    unsafe = recovery.cut_answers(refused, then=lexicon.REFUSAL, cuts=cuts, seed=seed)
    return unsafe, recovery.cut_answers(others, cuts=cuts, seed=seed)


def _replay(pipeline: Pipeline) -> list[str]:
    return [
        document.text for document in _sample(pipeline.corpus, REPLAY, f"{pipeline.seed}/recovery replay")
    ]


def _sample(values: Sequence[T], number: int, seed: str) -> list[T]:
    return Random(seed).sample(values, min(number, len(values)))


# --- passages without labels ---------------------------------------------------------------------


def ranked_passages(pipeline: Pipeline, how: str) -> list[str]:
    """The sentences of the corpus of at least `MIN_PASSAGE` tokens, those to recover from first.

    `how` is a scorer's name; "keywords" for sentences that name a forbidden thing, the longest first; or
    "random".
    """
    scorer = SpanLength() if how in (RANDOM, KEYWORDS) else scorer_of(pipeline, how)
    every = sum(len(document.text) for document in pipeline.corpus)  # more than there are sentences
    found = recovery.mine_passages(pipeline.index, scorer, limit=every, min_length=MIN_PASSAGE)
    texts = [passage.text for passage in found]
    if how == RANDOM:
        return _sample(texts, len(texts), f"{pipeline.seed}/passages")
    if how == KEYWORDS:
        # A list of forbidden things is the same knowledge that a conflict with the rules draws on.
        names = [f"{item.name} {item.noun}" for item in pipeline.world.of_kind("unsafe")]
        texts.sort(key=lambda text: not any(name in text for name in names))
    return texts


def scorer_of(pipeline: Pipeline, name: str) -> Scorer:
    """A scorer of chapter 4 by its name there."""
    made: dict[str, Callable[[], Scorer]] = {
        "raw BCI": RawBCI,
        "density": DensityBCI,
        "span length": SpanLength,
        "longest match": LongestMatchBCI,
        "conflict": lambda: ConflictBCI(_rules(pipeline)),
        "conflict, no quotes": lambda: ConflictBCI(_rules(pipeline), quote_length=8),
    }
    if name not in made:
        raise ParameterError(
            "Unknown scorer.", given=repr(name), expected=" or ".join(made), mend="choose one of them"
        )
    return made[name]()


def _rules(pipeline: Pipeline) -> TraceIndex:
    return collection_index(pipeline, "rules")
