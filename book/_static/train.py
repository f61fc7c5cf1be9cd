"""Preference training with the CBD penalty, on your own model, index and triples.

accelerate launch --num_processes 4 train.py MODEL INDEX TRIPLES OUT

TRIPLES is a file with one JSON object a line, which has "prompt", "chosen" and "rejected".
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tracealign_lib.bci import RawBCI
from tracealign_lib.cbd import CBDConfig, CBDTrainer
from tracealign_lib.index import TraceIndex

model, index, triples, out = sys.argv[1:]
cuda = torch.cuda.is_available()
trainer = CBDTrainer(
    model=AutoModelForCausalLM.from_pretrained(model),
    ref_model=AutoModelForCausalLM.from_pretrained(model),
    args=CBDConfig(
        out,
        penalty_lambda=1.0,
        cbd_threshold=20.0,  # nats
        per_device_train_batch_size=4,  # times the number of processes
        precompute_ref_log_probs=False,  # several processes would not find them
        use_cpu=not cuda,
        bf16=cuda,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=triples, split="train"),
    processing_class=AutoTokenizer.from_pretrained(model),
    index=TraceIndex.open(index),
    scorer=RawBCI(),
)
result = trainer.train()
trainer.save_model(out)
if trainer.is_world_process_zero():
    print(f"{trainer.accelerator.num_processes} processes, mean loss {result.training_loss:.3f}")
