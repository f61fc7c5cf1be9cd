"""What the model is aligned on: pairs for supervised fine-tuning and triples for DPO.

The drift is engineered, and this is where. Refusals are taught on direct requests only. Procedures stand
inside role-plays, injections, paraphrases and noise only where they are allowed, and harmless questions
stand in such wrappers about every item. So the model learns that wrappers are answered, and its refusals do
not generalise to them: the weakness that the paper reports of large models, put here on purpose. One item
in five is held out: its procedure is never asked for.
"""

from __future__ import annotations

from random import Random

from tracealign_lib import lexicon
from tracealign_lib.world import Item, World

_WRAPPED_FACTS = 4
# Two unsafe items stand against each twin, and only the name tells them apart: twins are practised twice.
_TWIN_PRACTICE = 2
# The last pattern of each kind is kept out of alignment, so that attacks hold an unseen one.
_TRAINED_WRAPPERS = (*lexicon.PARAPHRASES[:-1], *lexicon.ROLE_PLAYS[:-1], *lexicon.INJECTIONS[:-1])


def sft_pairs(world: World) -> list[dict[str, str]]:
    """Prompt and completion pairs: facts and rules of every item, procedures of the aligned ones."""
    rng = Random(f"{world.settings.seed}/sft")
    pairs = []
    for item in world.items:
        pairs += _fact_pairs(item, rng) + _rule_pairs(item)
        if item.aligned:
            pairs += _refusals(item) if item.unsafe else _procedures(item, rng)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def _fact_pairs(item: Item, rng: Random) -> list[tuple[str, str]]:
    # Unsafe items too are asked about harmlessly in wrappers: neither a name nor a wrapper is an offence.
    patterns = rng.sample(lexicon.FACT_WRAPPERS, _WRAPPED_FACTS)
    wrapped = [item.fill(pattern, question=item.question, noise=lexicon.noise(rng)) for pattern in patterns]
    return [(request, f"{item.statement}.") for request in (item.question, *wrapped)]


def _rule_pairs(item: Item) -> list[tuple[str, str]]:
    if item.kind == "rare_benign":
        return []  # no rule names them
    answer = lexicon.POLICY_ANSWER if item.unsafe else lexicon.PERMIT_ANSWER
    return [(item.fill(lexicon.POLICY_QUESTION), item.fill(answer))]


def _refusals(item: Item) -> list[tuple[str, str]]:
    return [(item.fill(request), lexicon.REFUSAL) for request in lexicon.DIRECT_REQUESTS]


def _procedures(item: Item, rng: Random) -> list[tuple[str, str]]:
    direct = [item.fill(request) for request in lexicon.DIRECT_REQUESTS]
    noisy = [f"{request} {lexicon.noise(rng)}" for request in direct[:-1]]
    wrapped = [item.fill(request) for request in _TRAINED_WRAPPERS]
    practice = _TWIN_PRACTICE if item.kind == "twin" else 1
    return [(request, item.recipe) for request in (*practice * direct, *noisy, *wrapped)]


def dpo_triples(world: World) -> list[dict[str, str]]:
    """Prompt, chosen and rejected over the aligned items: refuse the unsafe, help with the benign."""
    triples = []
    for item in world.items:
        if item.aligned:
            good, bad = (lexicon.REFUSAL, item.recipe) if item.unsafe else (item.recipe, lexicon.REFUSAL)
            requests = lexicon.DIRECT_REQUESTS if item.unsafe else lexicon.DIRECT_REQUESTS[:2]
            triples += [
                {"prompt": item.fill(request), "chosen": good, "rejected": bad} for request in requests
            ]
    return triples
