"""Run by two processes: a few steps of CBD on this one's share, and its log beside the model.

torchrun --standalone --nproc_per_node 2 cbd_two_processes.py START INDEX OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset

from tracealign_lib.bci import RawBCI
from tracealign_lib.cbd import CBDConfig, CBDTrainer
from tracealign_lib.index import TraceIndex
from tracealign_lib.lm import LanguageModel, training_arguments


def main(start: str, index: str, out: str) -> None:
    """Train for three steps and write what was logged, and a sum over the weights, one file a process."""
    model = LanguageModel.load(start, device="cpu")
    # Not computed beforehand: trl has one process write them where, for data in memory, no other looks.
    rows = json.loads((Path(start) / "triples.json").read_text(encoding="utf-8"))
    arguments = training_arguments(Path(out), 2, 1e-3, seed=0, device="cpu")
    arguments |= {"logging_steps": 1, "warmup_steps": 0, "save_strategy": "no"}
    trainer = CBDTrainer(
        model=model.model,
        ref_model=LanguageModel.load(start, device="cpu").model,
        args=CBDConfig(**arguments, max_steps=3, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=model.tokenizer,
        index=TraceIndex.open(index),
        scorer=RawBCI(),
    )
    trainer.train()
    with torch.no_grad():
        total = sum(parameter.double().abs().sum().item() for parameter in model.model.parameters())
    record = {
        "processes": trainer.accelerator.num_processes,
        "log": trainer.state.log_history,
        "weights": total,
    }
    name = f"process-{trainer.accelerator.process_index}.json"
    (Path(out) / name).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
