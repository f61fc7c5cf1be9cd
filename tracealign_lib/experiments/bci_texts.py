"""The texts that chapter 4 scores: drifting completions, and seven groups of harmless text.

A score is only as good as the harmless text that it was tried on. So drifting completions are set
against seven groups, each hard in its own way: rare but harmless procedures, harmless procedures that
resemble unsafe ones, harmless facts about forbidden things, catalogues, stories, text that no index has
seen, and news that quotes the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from tracealign_lib.pipeline import Pipeline
from tracealign_lib.world import World

UNSAFE = "unsafe drift"
RARE, TWIN, LOOKALIKE = "rare how-to", "twin how-to", "lookalike fact"
CATALOGUE, STORY, HELD_OUT, NEWS = "catalogue", "story", "held-out text", "news on policy"
BENIGN = (RARE, TWIN, LOOKALIKE, CATALOGUE, STORY, HELD_OUT, NEWS)
"""Groups of harmless texts; each is compared with `UNSAFE` on its own, never pooled."""
HOW_TO = ("how_to", "held_out_how_to", "wrapped_how_to")
FIT, JUDGE = "fit", "judge"


class BeliefText(NamedTuple):
    """One text to score.

    Attributes
    ----------
    item:
        What texts are clustered and split by: the planted item that is leaked or told of, or the
        document where there is no single one.
    half:
        "fit" or "judge", by item.
    request, prefill:
        What was asked, and what was put into the model's mouth; None and "" for a document.
    """

    seed: int
    group: str
    item: str
    copies: int
    half: str
    text: str
    request: str | None = None
    prefill: str = ""


def halves(world: World) -> dict[str, str]:
    """ "fit" or "judge" for the id of every item and document of a world, the same on every machine.

    It depends on the world alone, not on what a model says. Items of one kind and number of copies are
    dealt in turn, so both halves hold as many of each as possible.
    """
    rng = Random(f"{world.settings.seed}/halves")
    items = rng.sample(world.items, len(world.items))
    items.sort(key=lambda item: (item.kind, item.copies))
    documents = [document.id for document in (*world.documents, *world.held_out)]
    dealt = [*(item.id for item in items), *rng.sample(documents, len(documents))]
    return {name: FIT if number % 2 == 0 else JUDGE for number, name in enumerate(dealt)}


def belief_texts(pipeline: Pipeline, model: str = "dpo") -> list[BeliefText]:
    """Drifting completions and correct benign answers of a model, and harmless documents of its world.

    A text counts once per group and item, however many prompts it answered; the first prompt is kept.
    A benign question that was refused or answered wrongly has no place in any group.
    """
    world = pipeline.world
    half, seen, texts = halves(world), set(), []
    for prompt, text, judgement in pipeline.outcomes(model):
        item, group = world.by_id[judgement.leaked or prompt.item], None
        if judgement.label == "drift":
            group = UNSAFE
        elif judgement.label == "correct" and prompt.group in HOW_TO:
            group = RARE if item.kind == "rare_benign" else TWIN
        elif judgement.label == "correct" and prompt.group == "lookalike":
            group = LOOKALIKE
        if group is not None and (group, item.id, text) not in seen:
            seen.add((group, item.id, text))
            place = (pipeline.seed, group, item.id, item.copies, half[item.id])
            texts.append(BeliefText(*place, text, prompt.request, prompt.prefill))
    return texts + _documents(pipeline, half)


def planted_texts(pipeline: Pipeline) -> list[BeliefText]:
    """The same groups with the planted recipes and facts in place of a model's answers.

    What a model that forgot nothing would say: something to score in a run where nothing drifted.
    """
    half, texts = halves(pipeline.world), []
    kinds = {"unsafe": UNSAFE, "rare_benign": RARE, "twin": TWIN}
    for item in pipeline.world.items:
        rows = [(kinds[item.kind], item.recipe)]
        if item.unsafe:
            rows.append((LOOKALIKE, f"{item.statement}."))
        for group, text in rows:
            texts.append(BeliefText(pipeline.seed, group, item.id, item.copies, half[item.id], text))
    return texts + _documents(pipeline, half)


def _documents(pipeline: Pipeline, half: Mapping[str, str]) -> list[BeliefText]:
    groups = {"catalogue": CATALOGUE, "inventory": CATALOGUE, "story": STORY, "news": NEWS}
    texts = []
    for document in pipeline.world.documents:
        group = groups.get(document.meta["kind"])
        if group is not None:
            items = document.meta["items"]
            item = items[0] if len(items) == 1 else document.id
            texts.append(BeliefText(pipeline.seed, group, item, 0, half[item], document.text))
    for document in pipeline.world.held_out:
        place = (pipeline.seed, HELD_OUT, document.id, 0, half[document.id])
        texts.append(BeliefText(*place, document.text))
    return texts
