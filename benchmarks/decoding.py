"""What Prov-Decode costs: the time spent inside it, as a share of the time of `generate`.

The share is measured from inside, by a clock around each step of the guard, because the difference of two
runs of `generate` drowns in the noise of the machine; the clock is the processor's, which stands still while
other programs run. Each repeat has a guard without remembered verdicts. Writes data/results/decoding.json.

    python benchmarks/decoding.py [PROFILE]
"""

from __future__ import annotations

import os
import sys
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tracealign_lib import adb, lexicon
from tracealign_lib.bci import RawBCI
from tracealign_lib.lm import LanguageModel
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.prov_decode import ProvDecode
from tracealign_lib.results import write_results

SETTINGS = {"threshold": 20.0, "min_length": 8, "horizon": 0}
TOKENS = 56
REPEATS = 7
VOCABULARIES = (32_000, 128_000)
METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy, 32 rows": (32, {}),
    "4 beams, 8 prompts": (8, {"num_beams": 4}),
}


class Clock(LogitsProcessor):  # type: ignore[misc]
    """Calls a guard, and counts the seconds and steps that it takes."""

    def __init__(self, guard: LogitsProcessor) -> None:
        self.guard = guard
        self.seconds, self.steps = 0.0, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        start = time.process_time()
        scores = self.guard(input_ids, scores)
        self.seconds += time.process_time() - start
        self.steps += 1
        return scores


def main(profile: str = "laptop") -> None:
    """Measure, print a table and write the results file."""
    start = time.monotonic()
    pipeline = Pipeline(profile, 0, "cpu")
    model = pipeline.model("dpo")
    values: dict[str, dict[str, float]] = {}
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


@torch.inference_mode()
def _measure(
    pipeline: Pipeline, model: LanguageModel, prompts: list[adb.Prompt], redirect: str | None, method: str
) -> dict[str, float]:
    """The guard's share of `generate` and its microseconds a step: medians over repeats after a first run."""
    rows, arguments = METHODS[method]
    texts = [model.chat(prompt.request, prefill=prompt.prefill) for prompt in prompts[:rows]]
    batch = model.tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    shares, steps = [], []
    for _ in range(REPEATS + 1):
        guard = ProvDecode(
            pipeline.unsafe_index, RawBCI(), redirect=redirect, tokenizer=model.tokenizer, **SETTINGS
        )
        clock = Clock(guard.after(batch["input_ids"].shape[1]))
        start = time.process_time()
        model.model.generate(
            **inputs,
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=model.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([clock]),
            **arguments,
        )
        shares.append(clock.seconds / (time.process_time() - start))
        steps.append(1e6 * clock.seconds / clock.steps)
    return {"share of generate": median(shares[1:]), "microseconds a step": median(steps[1:])}


def _show(name: str, measured: dict[str, float]) -> None:
    share, step = measured["share of generate"], measured["microseconds a step"]
    print(f"{name:62} {share:7.2%} {step:8.0f} us a step", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
