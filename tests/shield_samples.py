"""Texts, a filter and frames that the tests of chapter 6's experiments share."""

from __future__ import annotations

from collections.abc import Hashable

import pandas as pd
from bci_samples import frame

from tracealign_lib.experiments.bci_texts import BeliefText
from tracealign_lib.shield import CompletionFilter, Decision

KEEPERS = "anna walked to ashford with a copper bell"


class Scored(CompletionFilter[Decision]):
    """A filter whose score of a text is the number that the text spells."""

    def check(self, text: str, *, group: Hashable = None) -> Decision:
        return Decision(float(text) > self.threshold_of(group), "", float(text))


def text(group: str, item: str, half: str, spelled: str) -> BeliefText:
    return BeliefText(0, group, item, 1, half, spelled)


def margins(refused: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """A margin frame by filter and group; even places are the fit half, odd ones are judged."""
    return pd.concat([frame({"margin": groups}, name) for name, groups in refused.items()], ignore_index=True)
