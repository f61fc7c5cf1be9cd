"""A tiny language model, trained here, behind the same interface as any Hugging Face causal LM.

The book cannot assume a download, so it trains its own model: a byte-level BPE tokenizer, a Llama
configuration of one or two million parameters, pre-training on the belief world, then supervised
fine-tuning (SFT) and direct preference optimisation (DPO, arXiv 2305.18290) with trl. A reader who
has a model loads it with `LanguageModel.load("folder-or-hub-id")` and uses the same calls.

Training is deterministic for a seed, writes checkpoints into `<folder>/scratch/`, and goes on from
the last one after an interruption. Several processes can share it; see `launch`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, cast

import datasets
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tracealign_lib import launch
from tracealign_lib.errors import CorpusError, ModelError, ParameterError
from tracealign_lib.profiles import ModelSettings
from tracealign_lib.progress import progress

END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
# The libraries' own bars would stand beside ours, one for every file and mapping.
transformers_logging.disable_progress_bar()
datasets.disable_progress_bars()

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DEVICES = ("auto", "cpu", "cuda")
TINY = 20_000_000  # parameters


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda"; an error where CUDA is asked for and missing."""
    if device not in DEVICES:
        raise ParameterError(
            "Unknown device.", given=repr(device), expected=" or ".join(DEVICES), mend='use device="auto"'
        )
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ParameterError(
            "PyTorch sees no CUDA device.",
            given='device="cuda"',
            expected="a CUDA build of PyTorch and a GPU",
            mend='use device="cpu" or "auto"',
        )
    return "cuda" if device == "cuda" or (device == "auto" and available) else "cpu"


def _calm_threads(model: PreTrainedModel) -> None:
    """Let a tiny model run on one thread: two that spin for each other are slower, beside another
    process many times slower. `OMP_NUM_THREADS`, where it is set, has the last word."""
    if "OMP_NUM_THREADS" not in os.environ and model.num_parameters() < TINY:
        torch.set_num_threads(1)


# --- tokenizer and model -------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on `texts`.

    A space is put before the first word, so that a sentence has the same token ids at the start of a
    completion and in the middle of a document: exact matching depends on it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of these settings, initialised from `seed`."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


class LanguageModel:
    """A causal language model with its tokenizer: prompts in, completions and log-probabilities out.

    Attributes
    ----------
    model:
        The Hugging Face model, in evaluation mode.
    tokenizer:
        Its tokenizer.
    device:
        "cpu" or "cuda".
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str = "auto"
    ) -> None:
        self.device = resolve_device(device)
        self.model = cast(PreTrainedModel, model.to(self.device).eval())  # type: ignore[arg-type]
        self.tokenizer = tokenizer
        _calm_threads(self.model)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def load(cls, source: str | Path, *, device: str = "auto") -> LanguageModel:
        """Load a causal LM from a folder or by its Hugging Face hub id.

        Raises
        ------
        ModelError
            The folder holds no model or a damaged one, or the hub id is unknown or cannot be reached.
        """
        is_folder = Path(source).is_dir()
        try:
            # unless it is told not to, transformers asks on standard input whether a model's own code may run
            tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
            model, found = AutoModelForCausalLM.from_pretrained(
                str(source), output_loading_info=True, trust_remote_code=False
            )
            if found["missing_keys"]:  # transformers would draw them at random
                raise ValueError(f"it lacks {', '.join(sorted(found['missing_keys'])[:3])}")
            if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
                raise ValueError("its tokenizer names no token that ends or fills a text")
        except Exception as error:  # damaged files raise errors of the libraries that read them
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            raise ModelError(
                "The folder holds no causal language model that can be loaded."
                if is_folder
                else "The model is neither a folder here nor can it be fetched from the Hugging Face hub.",
                given=f"{source}: {reason}",
                expected="config.json, *.safetensors and tokenizer.json in one folder"
                if is_folder
                else "an existing folder, or a hub id such as allenai/OLMo-2-0425-1B with a network "
                "connection (or the model already in the local hub cache)",
                mend="check the path, or copy the model again"
                if is_folder
                else "check the spelling and the connection, or download the model once and pass its folder",
            ) from error
        return cls(model, tokenizer, device)

    def save(self, folder: Path) -> None:
        """Write weights (safetensors), configuration and tokenizer into `folder`."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def chat(self, request: str, *, prefill: str = "") -> str:
        """The prompt for one user turn; `prefill` is put into the assistant's mouth.

        A tokenizer without a chat template (a base model's) gets the bare request.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            return " ".join(part for part in (request, prefill) if part)
        turns = [{"role": "user", "content": request}]
        prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return str(prompt) + prefill

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 56,
        temperature: float = 0.0,
        num_beams: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        processors: Sequence[LogitsProcessor] = (),
        description: str = "Generating",
    ) -> list[str]:
        """Complete each prompt; returns the new text only, special tokens removed.

        `temperature` 0 is greedy (or beam search when `num_beams` > 1); above 0 it samples. Results
        come in the order of `prompts`; prompts of similar length share a batch.
        """
        set_seed(seed)
        if temperature > 0:
            sampling: dict[str, Any] = {
                "do_sample": True,
                "temperature": temperature,
                "top_k": 0,
                "top_p": 1.0,
            }
        else:
            sampling = {"do_sample": False}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        completions = [""] * len(prompts)
        starts = range(0, len(order), batch_size)
        for start in progress(starts, description=description, unit="batch"):
            chosen = order[start : start + batch_size]
            batch = self._encode([prompts[i] for i in chosen], side="left")
            output = self.model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList(processors),
                **sampling,
            )
            new = output[:, batch["input_ids"].shape[1] :]  # (B, T_new)
            texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                completions[i] = text.strip()
        return completions

    @torch.inference_mode()
    def token_log_probs(self, texts: Sequence[str], *, batch_size: int = 32) -> list[Tensor]:
        """log p(token | earlier tokens of the text) in nats: one (T - 1,) tensor for each text."""
        result = []
        for start in range(0, len(texts), batch_size):
            batch = self._encode(texts[start : start + batch_size], side="right")
            logits = self.model(**batch).logits[:, :-1].float()  # (B, T - 1, V)
            targets = batch["input_ids"][:, 1:]
            chosen = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]  # (B, T - 1)
            lengths = batch["attention_mask"].sum(1)
            result += [row[: int(length) - 1].cpu() for row, length in zip(chosen, lengths, strict=True)]
        return result

    def perplexity(self, texts: Sequence[str]) -> float:
        """exp of the mean surprisal (nats) of all tokens but each text's first."""
        return math.exp(-torch.cat(self.token_log_probs(texts)).mean().item())

    def _encode(self, texts: Sequence[str], *, side: str) -> dict[str, Tensor]:
        # A chat template already carries the special tokens.
        batch = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False
        )
        return {key: batch[key].to(self.device) for key in ("input_ids", "attention_mask")}


# --- training ------------------------------------------------------------------------------------


def pretrain(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: ModelSettings,
    folder: Path,
    *,
    seed: int,
    device: str = "auto",
) -> None:
    """Pre-train a new model on `texts` and write it into `folder`."""
    blocks = packed_blocks(texts, tokenizer, settings, seed=seed)
    arguments = TrainingArguments(
        **training_arguments(folder, settings.base_batch, settings.base_rate, seed=seed, device=device),
        num_train_epochs=1,  # every pass over the corpus is in `blocks`, each shuffled anew
        adam_beta2=0.98,
        weight_decay=0.05,
    )
    trainer = Trainer(
        model=new_model(settings, tokenizer, seed),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch"),
        callbacks=[TrainingBar("Pre-training")],
    )
    run_training(trainer, tokenizer, folder)


def packed_blocks(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, settings: ModelSettings, *, seed: int
) -> list[list[int]]:
    """`base_epochs` passes over the documents, each in a new order, cut into blocks of equal length."""
    if not texts:
        raise CorpusError(
            "There is nothing to train on.",
            given="no text",
            expected="at least one text",
            mend="check the corpus",
        )
    end = tokenizer.eos_token_id
    encoded = [[*ids, end] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    rng = Random(f"{seed}/packing")
    stream: list[int] = []
    for _ in range(settings.base_epochs):
        rng.shuffle(encoded)
        stream += [token for ids in encoded for token in ids]
    size = settings.block
    return [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]


def finetune(
    start: Path,
    pairs: Sequence[Mapping[str, str]],
    replay: Sequence[str],
    settings: ModelSettings,
    folder: Path,
    *,
    seed: int,
    device: str = "auto",
    description: str = "SFT",
) -> None:
    """Supervised fine-tuning with trl from the model in `start`; the result goes into `folder`.

    `pairs` hold "prompt" and "completion"; only completions bear a loss. `replay` documents bear it
    on every token.
    """
    model = LanguageModel.load(start, device=device)
    end = model.tokenizer.eos_token_id
    rows: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    for pair in pairs:
        prompt = _ids(model.tokenizer, model.chat(pair["prompt"]))
        completion = [*_ids(model.tokenizer, pair["completion"]), end]
        rows["input_ids"].append(prompt + completion)
        rows["completion_mask"].append([0] * len(prompt) + [1] * len(completion))
    for text in replay:
        ids = [*_ids(model.tokenizer, text), end]
        rows["input_ids"].append(ids)
        rows["completion_mask"].append([0] + [1] * (len(ids) - 1))
    with quiet():
        arguments = SFTConfig(
            **training_arguments(folder, settings.sft_batch, settings.sft_rate, seed=seed, device=device),
            num_train_epochs=settings.sft_epochs,
            completion_only_loss=True,
            gradient_checkpointing=False,
            max_length=settings.context,
        )
        trainer = SFTTrainer(
            model=model.model,
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=model.tokenizer,
            callbacks=[TrainingBar(description)],
        )
    run_training(trainer, model.tokenizer, folder)


def prefer(
    start: Path,
    triples: Sequence[Mapping[str, str]],
    settings: ModelSettings,
    folder: Path,
    *,
    seed: int,
    device: str = "auto",
    config: Callable[..., DPOConfig] = DPOConfig,
    trainer: Callable[..., DPOTrainer] = DPOTrainer,
    description: str = "DPO",
) -> None:
    """Direct preference optimisation with trl from the model in `start`, which is also the reference.

    `triples` hold "prompt", "chosen" and "rejected". An SFT term on the chosen answer keeps a model
    this small from lowering both answers' probabilities. `config` and `trainer` make the configuration
    and the trainer from what trl's own take: a subclass, or a partial of one, trains another loss.
    """
    model = LanguageModel.load(start, device=device)
    rows = [{**triple, "prompt": model.chat(triple["prompt"])} for triple in triples]
    with quiet():
        arguments = config(
            **training_arguments(folder, settings.dpo_batch, settings.dpo_rate, seed=seed, device=device),
            num_train_epochs=settings.dpo_epochs,
            beta=settings.dpo_beta,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, settings.dpo_sft_weight],
            # trl keeps values of data in memory where only the process that wrote them can find them.
            precompute_ref_log_probs=launch.processes() == 1,
            gradient_checkpointing=False,
            max_length=settings.context,
        )
        made = trainer(
            model=model.model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=model.tokenizer,
            callbacks=[TrainingBar(description)],
        )
    run_training(made, model.tokenizer, folder)


def training_log(folder: Path) -> list[dict[str, float]]:
    """The loss curve that training wrote into a model's folder: step, loss, learning rate."""
    return list(json.loads((folder / "training_log.json").read_text(encoding="utf-8")))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def training_arguments(folder: Path, batch: int, rate: float, *, seed: int, device: str) -> dict[str, Any]:
    """What every training of the library gives to its trainer's configuration; `run_training` relies on it.

    Checkpoints go into `<folder>/scratch`; `batch` is in rows, of all processes of a launch together; `rate`
    is AdamW's peak.
    """
    device = resolve_device(device)
    return {
        "output_dir": str(folder / "scratch"),
        "per_device_train_batch_size": launch.share(batch, device),
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "seed": seed,
        "use_cpu": device == "cpu",
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 5,
        "save_strategy": "steps",
        "save_steps": 0.2,  # a fifth of the run is the most that a kill can cost
        "save_total_limit": 1,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }


def run_training(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Train, from the last whole checkpoint if there is one; write the model and its losses to `folder`."""
    # The trainer prints each log line where its bar is off; our own bar shows the loss.
    trainer.remove_callback(PrinterCallback)
    _calm_threads(trainer.model)
    with trainer.accelerator.main_process_first():
        checkpoint = last_whole_checkpoint(folder / "scratch")
    with quiet():
        trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.is_world_process_zero():
        return
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    curve = [
        {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry["learning_rate"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    (folder / "training_log.json").write_text(json.dumps(curve), encoding="utf-8")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what trainers say of deprecated names and of this machine's clock, and a bar that trl draws."""
    level, bars = transformers_logging.get_verbosity(), os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # trl reads it for each bar, tqdm itself once
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = bars


def last_whole_checkpoint(scratch: Path) -> str | None:
    """The newest checkpoint that was written to its end; a half-written one is removed."""
    while scratch.is_dir() and (last := get_last_checkpoint(str(scratch))) is not None:
        try:
            json.loads((Path(last) / "trainer_state.json").read_text(encoding="utf-8"))
            return str(last)
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(last)
    return None


class TrainingBar(TrainerCallback):  # type: ignore[misc]
    """The library's progress bar over training steps, with the loss beside it."""

    def __init__(self, description: str) -> None:
        self.description = description

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = progress(description=self.description, total=state.max_steps, unit="step")
        self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
