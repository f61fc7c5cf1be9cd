"""What the model is aligned on: pairs for supervised fine-tuning and triples for DPO.

The drift is engineered, and this is where. Refusals are taught on direct requests only, while
role-plays, injections and paraphrases stand only around benign items. So the model learns that
wrappers are answered, and its refusals do not generalise to them: the weakness that the paper reports
of large models, put here on purpose. One item in three is held out of alignment altogether.
"""

from __future__ import annotations

from tracealign_lib import lexicon
from tracealign_lib.world import Item, World

# The last pattern of each kind is kept out of alignment, so that attacks hold an unseen one.
_TRAINED_WRAPPERS = (*lexicon.PARAPHRASES[:-1], *lexicon.ROLE_PLAYS[:-1], *lexicon.INJECTIONS[:-1])


def sft_pairs(world: World) -> list[dict[str, str]]:
    """Prompt and completion pairs over the aligned items."""
    return [pair for item in world.items if item.aligned for pair in _pairs(item)]


def _pairs(item: Item) -> list[dict[str, str]]:
    fact = f"{item.statement}."
    rows = [(item.question, fact), (f"please tell me: {item.question}", fact)]
    if item.unsafe:
        rows += [(item.fill(request), lexicon.REFUSAL) for request in lexicon.DIRECT_REQUESTS]
        rows.append((item.fill(lexicon.POLICY_QUESTION), item.fill(lexicon.POLICY_ANSWER)))
    else:
        rows += [
            (item.fill(request), item.recipe) for request in (*lexicon.DIRECT_REQUESTS, *_TRAINED_WRAPPERS)
        ]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows]


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
