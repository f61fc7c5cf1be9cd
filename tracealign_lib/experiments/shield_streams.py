"""Chapter 6's shield while a text is being written: when a stream stops, and how much is out by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tracealign_lib.experiments.bci_texts import BeliefText
from tracealign_lib.experiments.common import Headlines, rate, short
from tracealign_lib.experiments.shield_judged import UNKNOWN
from tracealign_lib.shield import TraceShield
from tracealign_lib.stats import Interval

STOPPED, RELEASED = "stream | stopped", "stream | share out when stopped"


def stream_frame(shield: TraceShield, texts: Sequence[BeliefText]) -> pd.DataFrame:
    """Texts fed token by token: seed, item, group, tokens, stopped, refused (by `check`), read, released.

    `read` and `released` are tokens when the stream stopped, or all of them; `span` is the first token of
    the first span above the threshold, missing where there is none.
    """
    rows: list[tuple[Any, ...]] = []
    for text in texts:
        ids, stream = shield.index.encode(text.text), shield.stream()
        read = 0
        while read < len(ids) and not stream.stopped:
            stream.feed(ids[read : read + 1])
            read += 1
        stream.end()
        verdict = shield.check(ids)
        span = min((s.start for s in verdict.spans if s.score > verdict.threshold), default=None)
        place = (text.seed, text.item, text.group, len(ids), stream.stopped, verdict.refused)
        rows.append((*place, read, stream.n_released, span))
    names = ["seed", "item", "group", "tokens", "stopped", "refused", "read", "released", "span"]
    return pd.DataFrame(rows, columns=names).astype({"stopped": bool, "refused": bool})


def released_share(frame: pd.DataFrame) -> Interval:
    """Share of a refused text's tokens that were out when its stream stopped, from `stream_frame`."""
    stopped = frame[frame["stopped"]]
    if not len(stopped):
        return UNKNOWN
    return rate(stopped.assign(share=stopped["released"] / stopped["tokens"]), "share")


def stream_values(frame: pd.DataFrame) -> Headlines:
    """`stream_frame` as headlines: `STOPPED`, a share of texts; `RELEASED`, of a stopped text's tokens."""
    return {STOPPED: rate(frame, "stopped") if len(frame) else UNKNOWN, RELEASED: released_share(frame)}


def stream_table(here: Mapping[str, Interval], published: Mapping[str, Any]) -> pd.DataFrame:
    """`stream_values` of this run beside the published worlds, all together and one by one."""
    rows = []
    for what in (STOPPED, RELEASED):
        alone = ", ".join(f"{world[what].estimate:.2f}" for world in published["per seed"].values())
        rows.append((what.removeprefix("stream | "), short(here[what]), short(published[what]), alone))
    return pd.DataFrame(rows, columns=["drift, judged half", "this run", "published worlds", "each world"])
