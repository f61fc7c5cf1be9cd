"""What Prov-Decode costs: the time spent inside it, as a share of the time of `generate`.

How it is measured: `experiments.prov_decode_steps.self_time`; what is written are the median over repeats and
the two quartiles, which hold the middle half of them. Writes data/results/decoding.json.

    python benchmarks/decoding.py [PROFILE]
"""

from __future__ import annotations

import os
import sys
import time
from statistics import quantiles
from typing import Any

from tracealign_lib import adb, lexicon
from tracealign_lib.bci import RawBCI
from tracealign_lib.experiments.prov_decode_steps import TOKENS, self_time
from tracealign_lib.lm import LanguageModel
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.prov_decode import ProvDecode
from tracealign_lib.results import write_results

SETTINGS: dict[str, Any] = {"threshold": 20.0, "min_length": 8, "horizon": 0}
REPEATS = 9
VOCABULARIES = (32_000, 128_000)
METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy, 32 rows": (32, {}),
    "4 beams, 8 prompts": (8, {"num_beams": 4}),
}


def main(profile: str = "laptop") -> None:
    """Measure, print a table and write the results file."""
    start = time.monotonic()
    pipeline = Pipeline(profile, 0, "cpu")
    model = pipeline.model("dpo")
    values: dict[str, dict[str, Any]] = {}
    for kind, prompts in _prompts(pipeline).items():
        for method in METHODS:
            for redirect in (None, lexicon.REFUSAL):
                name = f"{'veto' if redirect is None else 'redirect'} | {kind} | {method}"
                values[name] = _measure(pipeline, model, prompts, redirect, method)
                _show(name, values[name])
    for columns in VOCABULARIES:
        model.model.resize_token_embeddings(columns, mean_resizing=False)
        model.model.get_output_embeddings().weight.data[len(model.tokenizer) :] = 0.0
        for redirect in (None, lexicon.REFUSAL):
            kind = f"attacked, {columns:,} scores a row"
            name = f"{'veto' if redirect is None else 'redirect'} | {kind} | greedy, 32 rows"
            values[name] = _measure(
                pipeline, model, _prompts(pipeline)["attacked"], redirect, "greedy, 32 rows"
            )
            _show(name, values[name])
    settings = {
        **SETTINGS,
        "tokens": TOKENS,
        "repeats": REPEATS,
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
    }
    seconds = time.monotonic() - start
    write_results(
        "decoding", values, profile=profile, seeds=[0], settings=settings, device="cpu", seconds=seconds
    )


def _prompts(pipeline: Pipeline) -> dict[str, list[adb.Prompt]]:
    """Prompts under which the model recites unsafe recipes, and others about harmless procedures."""
    benign = [p for p in adb.benign_prompts(pipeline.world) if p.group == "how_to"]
    return {"attacked": adb.attack_prompts(pipeline.world, "combined", templates=1), "benign": benign}


def _measure(
    pipeline: Pipeline, model: LanguageModel, prompts: list[adb.Prompt], redirect: str | None, method: str
) -> dict[str, Any]:
    """Each quantity of `self_time` of a guard in a decoding method: its median, and "..., quartiles"."""
    rows, arguments = METHODS[method]

    def make_guard() -> ProvDecode:
        return ProvDecode(
            pipeline.unsafe_index, RawBCI(), redirect=redirect, tokenizer=model.tokenizer, **SETTINGS
        )

    runs = [self_time(model, make_guard, prompts[:rows], repeats=1, **arguments) for _ in range(REPEATS)]
    measured: dict[str, Any] = {}
    for quantity in runs[0]:
        low, middle, high = quantiles([run[quantity] for run in runs], method="inclusive")
        measured |= {quantity: middle, f"{quantity}, quartiles": [low, high]}
    return measured


def _show(name: str, measured: dict[str, Any]) -> None:
    low, high = measured["share of generate, quartiles"]
    share, step = measured["share of generate"], measured["microseconds a step"]
    print(f"{name:62} {share:7.2%} ({low:.2%} to {high:.2%}) {step:8.0f} us a step", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
