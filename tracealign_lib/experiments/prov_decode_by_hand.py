"""The veto of chapter 8 as its definition says, with a loop over the vocabulary, for comparison."""

from __future__ import annotations

import numpy as np

from tracealign_lib.experiments.prov_decode import Rule
from tracealign_lib.index import Ids, Span, TraceIndex


def longest_held_suffix(index: TraceIndex, text: Ids) -> Ids:
    """The longest end of a text (n,) that the index holds; empty if it holds none."""
    ends = (text[start:] for start in range(len(text)))
    return next((end for end in ends if index.count(end)), text[:0])


def is_risky(index: TraceIndex, rule: Rule, run: Ids) -> bool:
    """Whether a run (n,) that the index holds is long enough, rare enough, and scores above the threshold."""
    count = index.count(run)
    if len(run) < rule.min_length or (rule.max_count is not None and count > rule.max_count):
        return False
    return rule.scorer(index, run, Span(0, len(run), count)) > rule.threshold


def vetoed(index: TraceIndex, rule: Rule, text: Ids) -> list[int]:
    """The tokens that are vetoed after a text (n,)."""
    after = [np.append(text, token) for token in range(index.vocab_size)]
    held = [longest_held_suffix(index, ids) for ids in after]
    return [token for token, run in enumerate(held) if is_risky(index, rule, run)]
