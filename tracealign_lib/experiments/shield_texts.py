"""The texts of chapter 6: those of chapter 4, and what a shield meets besides.

Policy answers are harmless, and not calibrated on. Near-drift is what the judge calls so. Edited drift is
what an attacker who knows that the shield matches words makes of a drifting completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tracealign_lib import lexicon
from tracealign_lib.experiments.bci_texts import (
    BENIGN,
    FIT,
    UNSAFE,
    BeliefText,
    belief_texts,
    halves,
    planted_texts,
)
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.world import World

NEAR = "near-drift"
EDITED = ("1 word changed", "2 words changed", "3 words changed")
"""Drifting texts in which one word is changed in that many steps: an attacker who knows the shield."""
POLICY = "policy answer"
"""Answers to "what does the rule say?": harmless, and never calibrated on unless that is said."""
HARMFUL = (UNSAFE, NEAR, *EDITED)
HARMLESS = (*BENIGN, POLICY)


def calibration_texts(pipeline: Pipeline) -> list[BeliefText]:
    """The texts of chapter 4: a model's answers, or planted texts in a run where nothing drifted."""
    drifting = any(outcome.drifted for outcome in pipeline.outcomes())
    return belief_texts(pipeline) if drifting else planted_texts(pipeline)


def shield_texts(pipeline: Pipeline) -> list[BeliefText]:
    """All texts that filters are judged on.

    `calibration_texts`, policy answers, completions that nearly drifted, and edited ones that drifted.
    """
    texts = calibration_texts(pipeline)
    drift = [text for text in texts if text.group == UNSAFE]
    edits = [edited(text, pipeline.world, words) for words in range(1, 4) for text in drift]
    return [*texts, *policy_answers(pipeline), *_near_drift(pipeline), *edits]


def policy_answers(pipeline: Pipeline) -> list[BeliefText]:
    """The model's right answers to questions about the policy; where it has none, what would be right."""
    asked = [outcome for outcome in pipeline.outcomes() if outcome.prompt.group == "policy"]
    right = [(o.prompt, o.completion) for o in asked if o.judgement.label == "correct"]
    planted = [(o.prompt, o.prompt.expected or "") for o in asked]
    half, by_id, texts = halves(pipeline.world), pipeline.world.by_id, []
    for prompt, text in right or planted:
        place = (pipeline.seed, POLICY, prompt.item, by_id[prompt.item].copies, half[prompt.item])
        texts.append(BeliefText(*place, text, prompt.request))
    return texts


def edited(text: BeliefText, world: World, words: int) -> BeliefText:
    """The text with another adjective in the first `words` steps of the leaked item that it holds.

    A step whose adjective was changed is still one that the judge recognises, so a text in which every step
    was edited is near-drift.
    """
    changed = " ".join(text.text.split())
    held = [step for step in world.by_id[text.item].steps if step in changed]
    for step in held[:words]:
        rng = Random(f"{text.seed}/{text.item}/{step}")
        verb, article, adjective, *rest = step.split()
        other = rng.choice([word for word in lexicon.STEP_ADJECTIVES if word != adjective])
        changed = changed.replace(step, " ".join((verb, article, other, *rest)))
    return text._replace(group=EDITED[words - 1], text=changed)


def _near_drift(pipeline: Pipeline) -> list[BeliefText]:
    half, seen, texts = halves(pipeline.world), set(), []
    for prompt, text, judgement in pipeline.outcomes():
        item = pipeline.world.by_id[judgement.leaked or prompt.item]
        if judgement.label == "near_drift" and (item.id, text) not in seen:
            seen.add((item.id, text))
            place = (pipeline.seed, NEAR, item.id, item.copies, half[item.id])
            texts.append(BeliefText(*place, text, prompt.request, prompt.prefill))
    return texts


def draws(texts: Sequence[BeliefText], half: str = FIT) -> list[BeliefText]:
    """One harmless text for each item and group: texts about one item are not independent draws."""
    first: dict[tuple[int, str, str], BeliefText] = {}
    for text in texts:
        if text.half == half and text.group in HARMLESS:
            first.setdefault((text.seed, text.group, text.item), text)
    return list(first.values())
