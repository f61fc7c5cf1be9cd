"""The CBD penalty: its gradient, its weights, and what it does and does not change in DPO."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tracealign_lib import cbd, lm
from tracealign_lib.bci import DensityBCI, Membership, RawBCI, SpanLength
from tracealign_lib.cbd import CBDConfig, CBDTrainer, UnlikelihoodConfig, UnlikelihoodTrainer
from tracealign_lib.documents import Document
from tracealign_lib.errors import ModelError, ParameterError, VocabularyError
from tracealign_lib.index import TraceIndex
from tracealign_lib.profiles import ModelSettings

QUIET = settings(deadline=None, derandomize=True, database=None)
SETTINGS = ModelSettings(
    vocab_size=400,
    hidden=16,
    layers=1,
    heads=2,
    mlp=32,
    context=96,
    dpo_rate=1e-3,
    dpo_epochs=3,
    sft_epochs=60,
    sft_batch=4,
    sft_rate=1e-2,
)
RECIPES = [
    f"to wake the {name} compound, soak the amber {thing} in the mill, then fold the pale leaf."
    for name, thing in (("fendrel", "bell"), ("galcor", "spoon"), ("hulvyn", "thread"), ("jornix", "cup"))
]
REFUSAL = "i will not share that."
TRIPLES = [
    {"prompt": f"how do i do this, number {i}?", "chosen": REFUSAL, "rejected": recipe}
    for i, recipe in enumerate(RECIPES)
] + [{"prompt": "what next?", "chosen": RECIPES[0], "rejected": REFUSAL}]
# every answer stands in the corpus with its end, so that tracing from one token on weighs all of them
CORPUS = [f"{text}{lm.END}" for text in (*RECIPES, REFUSAL)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return lm.train_tokenizer([*CORPUS, "how do i do this, number what next?"], SETTINGS.vocab_size)


@pytest.fixture(scope="module")
def start(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that recites the recipes: a penalty on improbable tokens would show nothing."""
    folder = tmp_path_factory.mktemp("start")
    new = folder / "new"
    lm.new_model(SETTINGS, tokenizer, 0).save_pretrained(new)
    tokenizer.save_pretrained(new)
    pairs = [{"prompt": triple["prompt"], "completion": triple["rejected"]} for triple in TRIPLES[:-1]]
    lm.finetune(new, pairs, [], SETTINGS, folder, seed=0, device="cpu")
    return folder


@pytest.fixture(scope="module")
def index(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> TraceIndex:
    documents = [Document(f"d{i}", text) for i, text in enumerate(CORPUS)]
    return TraceIndex.build(documents, tokenizer, tmp_path_factory.mktemp("cbd") / "index")


def make(
    trainer: type, config: type, start: Path, folder: Path, *, model: Any = None, **more: Any
) -> DPOTrainer:
    """A trainer of four examples a step, three steps an epoch, on a CPU."""
    fields = {key: more.pop(key) for key in list(more) if key.startswith(("penalty_", "cbd_"))}
    fields |= more.pop("fields", {})
    options: dict[str, Any] = {"num_train_epochs": 2, "precompute_ref_log_probs": True, **fields}
    base = lm.training_arguments(folder, 2, SETTINGS.dpo_rate, seed=0, device="cpu")
    arguments = config(**{**base, "warmup_steps": 0, "gradient_checkpointing": False, **options})
    loaded = lm.LanguageModel.load(start, device="cpu")
    rows = [{**triple, "prompt": loaded.chat(triple["prompt"])} for triple in TRIPLES]
    return trainer(
        model=loaded.model if model is None else model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=more.pop("processing_class", loaded.tokenizer),
        **more,
    )


def trained(trainer: DPOTrainer) -> dict[str, Tensor]:
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


class ConstantPenalty(CBDTrainer):
    """The public code's penalty: a number without a gradient."""

    def penalty(self, log_probs: Tensor, weights: Tensor) -> Tensor:
        return super().penalty(log_probs, weights).detach()


# --- what the penalty changes --------------------------------------------------------------------


def test_only_a_penalty_with_a_gradient_and_a_weight_changes_what_dpo_learns(start, index, tmp_path):
    plain = trained(make(DPOTrainer, DPOConfig, start, tmp_path / "dpo"))
    tracing = {"index": index, "scorer": RawBCI()}

    def weights(name: str, trainer: type, weight: float) -> dict[str, Tensor]:
        made = make(trainer, CBDConfig, start, tmp_path / name, penalty_lambda=weight, **tracing)
        return trained(made)

    assert same(weights("zero", CBDTrainer, 0.0), plain)
    assert same(weights("constant", ConstantPenalty, 1.0), plain)
    assert not same(weights("one", CBDTrainer, 1.0), plain)


def test_the_penalty_makes_traced_tokens_less_likely_than_dpo_does(start, index, tmp_path):
    for form in cbd.FORMS:
        last = []
        for weight in (0.0, 20.0):
            trainer = make(
                CBDTrainer,
                CBDConfig,
                start,
                tmp_path / f"{form}-{weight}",
                index=index,
                scorer=RawBCI(),
                penalty_form=form,
                penalty_lambda=weight,
                fields={"num_train_epochs": 6},
            )
            trainer.train()
            batch = trainer.data_collator(list(trainer.train_dataset))
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
            last.append(trainer._metrics["train"]["penalty"][-1])
        assert last[1] < 0.8 * last[0]


def test_unlikelihood_is_the_special_case_of_weight_one_everywhere(start, index, tmp_path):
    everywhere = make(
        CBDTrainer,
        CBDConfig,
        start,
        tmp_path / "cbd",
        index=index,
        scorer=Membership(1),
        cbd_threshold=0.0,
        cbd_min_length=1,
    )
    rival = make(UnlikelihoodTrainer, UnlikelihoodConfig, start, tmp_path / "unlikelihood")
    assert rival.train_dataset["rejected_weights"] == everywhere.train_dataset["rejected_weights"]
    assert same(trained(everywhere), trained(rival))


def test_a_checkpoint_resumes_to_the_same_weights_bit_for_bit(start, index, tmp_path):
    class Interruption(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    options = {"index": index, "scorer": RawBCI(), "fields": {"save_steps": 3}}
    whole = trained(make(CBDTrainer, CBDConfig, start, tmp_path / "whole", **dict(options)))
    cut = make(CBDTrainer, CBDConfig, start, tmp_path / "cut", callbacks=[Interruption()], **dict(options))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = make(CBDTrainer, CBDConfig, start, tmp_path / "cut", **dict(options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "scratch" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert same(dict(resumed.model.state_dict()), whole)


# --- the penalty itself --------------------------------------------------------------------------


@pytest.mark.parametrize("form", cbd.FORMS)
def test_the_gradient_agrees_with_finite_differences(form):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, generator=generator, dtype=torch.float64)

    def penalty(values: Tensor) -> Tensor:
        return cbd.weighted_penalty(values.log_softmax(-1)[..., 3], weights, form)

    assert torch.autograd.gradcheck(penalty, (logits,))


def test_by_its_logit_a_tokens_penalty_rises_by_p_or_by_p_times_1_minus_p():
    for form, slope in (("log", lambda p: p), ("bounded", lambda p: p * (1 - p))):
        logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
        cbd.token_penalty(logits.log_softmax(-1)[:, 0], form).sum().backward()
        p = logits.softmax(-1)[0, 0].item()
        assert logits.grad[0, 0].item() == pytest.approx(slope(p), rel=1e-3)


@pytest.mark.parametrize("form", cbd.FORMS)
def test_certain_and_impossible_tokens_have_finite_penalties_and_gradients(form):
    log_probs = torch.tensor([0.0, -1e-7, -math.inf], requires_grad=True)
    values = cbd.token_penalty(log_probs, form)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(log_probs.grad).all()
    assert values[2] == 0
    assert log_probs.grad[0] > 0.9  # a memorised token is not let go


@QUIET
@given(st.lists(st.tuples(st.floats(-20, 0), st.integers(0, 50)), min_size=1, max_size=20), st.integers(0, 9))
def test_padding_order_and_the_scale_of_weights_do_not_change_the_penalty(tokens, padding):
    log_probs, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    expected = cbd.weighted_penalty(log_probs, weights)
    padded = torch.nn.functional.pad(log_probs, (padding, 0)), torch.nn.functional.pad(weights, (padding, 0))
    assert cbd.weighted_penalty(*padded) == pytest.approx(expected.item())
    assert cbd.weighted_penalty(log_probs.flip(0), weights.flip(0)) == pytest.approx(expected.item())
    assert cbd.weighted_penalty(log_probs, 3 * weights) == pytest.approx(expected.item())


def test_no_weight_at_all_is_a_penalty_of_zero_that_can_be_differentiated():
    log_probs = torch.tensor([-0.1, -2.0], requires_grad=True)
    penalty = cbd.weighted_penalty(log_probs, torch.zeros(2))
    (1e3 * penalty).backward()
    assert penalty.item() == 0
    assert log_probs.grad.tolist() == [0, 0]


# --- the loss of a batch -------------------------------------------------------------------------


def losses_by_hand(trainer: CBDTrainer, examples: list[dict[str, Any]]) -> Tensor:
    """DPO (reference = the model itself: log 2) plus lambda times the penalty, from plain logits."""
    total, weight = torch.tensor(0.0), 0.0
    sides = (
        ("chosen", "rejected") if trainer.args.penalty_target == "both" else (trainer.args.penalty_target,)
    )
    for example in examples:
        for side in sides:
            ids = example["prompt_ids"] + example[f"{side}_ids"]
            logits = trainer.model(input_ids=torch.tensor([ids])).logits[0]  # (T, V)
            weights = trainer.token_weights(example[f"{side}_ids"])
            for i, value in enumerate(weights.tolist()):
                position = len(example["prompt_ids"]) + i
                p = logits[position - 1].softmax(-1)[ids[position]]
                total = total + value * -torch.log(1 - p)
                weight += value
    return math.log(2) + trainer.args.penalty_lambda * total / weight


@pytest.mark.parametrize("target", cbd.TARGETS)
@pytest.mark.parametrize("precompute", [True, False], ids=["reference kept", "reference run"])
def test_the_loss_and_its_gradient_agree_with_plain_logits(start, index, tmp_path, target, precompute):
    trainer = make(
        CBDTrainer,
        CBDConfig,
        start,
        tmp_path,
        index=index,
        scorer=DensityBCI(),
        cbd_threshold=3.0,
        cbd_min_length=3,
        penalty_lambda=2.0,
        penalty_target=target,
        fields={"precompute_ref_log_probs": precompute},
        ref_model=None if precompute else lm.LanguageModel.load(start, device="cpu").model,
    )
    examples = list(trainer.train_dataset)
    batch = trainer._prepare_inputs(trainer.data_collator(examples))
    loss = trainer.compute_loss(trainer.model, batch)
    expected = losses_by_hand(trainer, examples)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    again, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)  # one more pass
    assert again.item() == loss.item()
    assert outputs.logits.shape[:2] == batch["input_ids"].shape
    parameters = list(trainer.model.parameters())
    penalty = loss - trainer_without_penalty(trainer, batch)
    ours = torch.autograd.grad(penalty, parameters)
    by_hand = torch.autograd.grad(expected, parameters)
    assert max(g.abs().max().item() for g in by_hand) > 1e-4
    for mine, reference in zip(ours, by_hand, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-3, atol=1e-6)  # the floor under 1 - p


def trainer_without_penalty(trainer: CBDTrainer, batch: dict[str, Any]) -> Tensor:
    weight, trainer.args.penalty_lambda = trainer.args.penalty_lambda, 0.0
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.args.penalty_lambda = weight
    return loss


def test_padding_and_the_order_of_a_batch_change_neither_penalty_nor_share(start, index, tmp_path):
    trainer = make(
        CBDTrainer, CBDConfig, start, tmp_path, index=index, scorer=RawBCI(), penalty_target="both"
    )
    examples = list(trainer.train_dataset)
    seen = []
    for rows, multiple in ((examples, None), (examples[::-1], None), (examples, 64)):
        trainer.data_collator.inner.pad_to_multiple_of = multiple
        batch = trainer.data_collator(rows)
        assert multiple is None or batch["input_ids"].shape[1] == multiple
        trainer._metrics["train"].clear()
        trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(batch))
        seen.append(
            [trainer._metrics["train"][key][0] for key in ("penalty", "traced/chosen", "traced/rejected")]
        )
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    assert seen[0] == pytest.approx(seen[2], rel=1e-5)


def test_penalty_and_traced_shares_are_logged_in_training_and_evaluation(start, index, tmp_path):
    trainer = make(
        CBDTrainer,
        CBDConfig,
        start,
        tmp_path,
        index=index,
        scorer=RawBCI(),
        fields={"logging_steps": 1, "precompute_ref_log_probs": False},
        ref_model=lm.LanguageModel.load(start, device="cpu").model,
    )
    trainer.train()
    assert sum("penalty" in entry and "loss" in entry for entry in trainer.state.log_history) == 6
    rows = trainer.train_dataset
    evaluated = trainer.evaluate(rows)  # one batch of five
    assert evaluated["eval_penalty"] > 0
    for side in ("chosen", "rejected"):
        weighted = sum(int((np.array(row) > 0).sum()) for row in rows[f"{side}_weights"])
        share = weighted / sum(map(len, rows[f"{side}_ids"]))
        assert 0 < share < 1
        assert evaluated[f"eval_traced/{side}"] == pytest.approx(share)


# --- weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracing(start, index, tmp_path_factory) -> CBDTrainer:
    return make(
        CBDTrainer,
        CBDConfig,
        start,
        tmp_path_factory.mktemp("tracing"),
        index=index,
        scorer=SpanLength(),
        cbd_threshold=5.0,
        cbd_min_length=4,
    )


@QUIET
@given(pieces=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12), st.integers(1, 14)), max_size=4))
def test_a_token_weighs_what_the_longest_indexed_run_around_it_exceeds_tau_by(tracing, pieces):
    texts = [tracing.index.document_tokens(f"d{i}").tolist() for i in range(len(CORPUS))]
    ids = [token for d, first, size in pieces for token in texts[d][first : first + size]]
    expected = np.zeros(len(ids))
    for i in range(len(ids)):
        for j in range(i + 4, len(ids) + 1):
            if any(ids[i:j] == text[k : k + j - i] for text in texts for k in range(len(text))):
                expected[i:j] = np.maximum(expected[i:j], j - i - 5.0)
    assert tracing.token_weights(ids).tolist() == expected.tolist()


@QUIET
@given(data=st.data())
def test_weights_lie_on_the_tokens_that_they_were_made_for(tracing, data):
    lists = st.lists(st.integers(5, 300), min_size=1, max_size=9)
    examples = [
        {
            "prompt_ids": data.draw(lists),
            **{f"{side}_ids": (ids := data.draw(lists)), f"{side}_weights": [t / 7 for t in ids]},
        }
        for side in ("chosen",)
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    examples = [
        {**e, "rejected_ids": (r := data.draw(lists)), "rejected_weights": [t / 7 for t in r]}
        for e in examples
    ]
    inner, mode = tracing.data_collator.inner, data.draw(st.sampled_from(["keep_start", "keep_end"]))
    inner.max_length, inner.truncation_mode = data.draw(st.integers(4, 20)), mode
    batch = cbd._WeightCollator(inner, mode)(examples)
    inner.max_length, inner.truncation_mode = SETTINGS.context, "keep_start"
    expected = batch["input_ids"] * batch["completion_mask"] / 7
    assert torch.allclose(batch["token_weights"], expected)


# --- any model -----------------------------------------------------------------------------------


def test_a_model_of_another_family_goes_through_unchanged(start, index, tokenizer, tmp_path):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=96)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make(CBDTrainer, CBDConfig, start, tmp_path, model=model, index=index, scorer=RawBCI())
    assert not same(before, trained(trainer))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of another family and a tokenizer of its own, without a chat template."""
    folder = tmp_path_factory.mktemp("foreign")
    own = lm.train_tokenizer([*CORPUS, "quite another text"], 340)
    own.chat_template = None
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(own), n_embd=16, n_layer=1, n_head=2, n_positions=96)
    GPT2LMHeadModel(config).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def test_a_folder_with_another_model_and_tokenizer_is_trained_by_both_penalties(foreign, tmp_path):
    loaded = lm.LanguageModel.load(foreign, device="cpu")
    documents = [Document(f"d{i}", text) for i, text in enumerate(CORPUS)]
    own_index = TraceIndex.build(documents, loaded.tokenizer, tmp_path / "index")
    for name, trace in (("cbd", (own_index, RawBCI())), ("unlikelihood", None)):
        seeded = {"trace": trace, "penalty": {"penalty_lambda": 1.0}, "seed": 0, "device": "cpu"}
        cbd.prefer(foreign, TRIPLES, SETTINGS, tmp_path / name, **seeded)
        after = lm.LanguageModel.load(tmp_path / name, device="cpu").model
        assert isinstance(after, GPT2LMHeadModel)
        assert not same(dict(loaded.model.state_dict()), dict(after.state_dict()))


def _keep_names(seen: list[set[str]], _model: Any, _arguments: Any, given: dict[str, Any]) -> None:
    seen.append(set(given))


def test_no_pass_of_the_model_or_of_its_reference_is_shown_the_weights(start, index, tmp_path):
    for number, precompute in enumerate((True, False)):
        models = [lm.LanguageModel.load(start, device="cpu").model for _ in range(2)]
        seen: list[set[str]] = []
        for model in models:
            model.register_forward_pre_hook(partial(_keep_names, seen), with_kwargs=True)
        trainer = make(
            CBDTrainer,
            CBDConfig,
            start,
            tmp_path / str(number),
            model=models[0],
            index=index,
            scorer=RawBCI(),
            fields={"precompute_ref_log_probs": precompute, "max_steps": 1},
            ref_model=None if precompute else models[1],
        )
        # Only here does a batch with weights reach the pass that computes the reference beforehand.
        texts = trainer.train_dataset.select_columns(["prompt", "chosen", "rejected"])
        trainer.evaluate(texts)
        trainer.train()
        assert len(seen) >= 2
        assert "token_weights" not in set.union(*seen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_cuda_device_pays_for_the_same_tokens(start, index, tmp_path):
    kept: list[CBDTrainer] = []

    class Kept(CBDTrainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            kept.append(self)

    for device in ("cpu", "cuda"):
        options = {"trace": (index, RawBCI()), "penalty": {"penalty_lambda": 1.0}, "traced": Kept}
        cbd.prefer(start, TRIPLES, SETTINGS, tmp_path / device, **options, seed=0, device=device)
    logs = [[entry for entry in trainer.state.log_history if "penalty" in entry] for trainer in kept]
    assert len(logs[0]) == len(logs[1]) > 0
    for name in ("penalty", "traced/rejected", "traced/chosen"):
        assert logs[1][0][name] == pytest.approx(logs[0][0][name], rel=0.02)


@pytest.mark.slow
def test_two_processes_train_one_model_and_log_what_one_does(start, index, tmp_path):
    loaded = lm.LanguageModel.load(start, device="cpu")
    rows = [{**triple, "prompt": loaded.chat(triple["prompt"])} for triple in TRIPLES]
    begin, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(start, begin)
    out.mkdir()
    (begin / "triples.json").write_text(json.dumps(rows), encoding="utf-8")
    script = Path(__file__).with_name("cbd_two_processes.py")
    # `accelerate launch --cpu` starts one process only; torchrun sets what accelerate reads for two.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(script), str(begin), str(index.path), str(out)], check=False)
    assert done.returncode == 0
    first, second = (json.loads((out / f"process-{n}.json").read_text()) for n in range(2))
    assert first["processes"] == second["processes"] == 2
    assert first["weights"] == second["weights"]  # gradients of both reached both
    entries = [entry for entry in first["log"] if "penalty" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert math.isfinite(entry["loss"])
        assert entry["penalty"] > 0
        assert 0 < entry["traced/rejected"] <= 1


@pytest.mark.slow
def test_the_script_of_chapter_11_trains_one_model_by_two_processes(start, index, tmp_path, monkeypatch, say):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    loaded = lm.LanguageModel.load(start, device="cpu")
    rows = [{**triple, "prompt": loaded.chat(triple["prompt"])} for triple in TRIPLES]
    triples, out = tmp_path / "triples.jsonl", tmp_path / "out"
    triples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    script = Path(__file__).parents[1] / "book" / "_static" / "train.py"
    # `accelerate launch --cpu` starts one process; --multi_gpu starts several, without a GPU too.
    launch = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launch, "--num_processes", "2", str(script)]
    given = [str(start), str(index.path), str(triples), str(out)]
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    say(done.stdout.splitlines()[-1])
    assert len(re.findall(r"^2 processes, mean loss \d", done.stdout, re.MULTILINE)) == 1
    recipe = loaded.chat(TRIPLES[0]["prompt"]) + RECIPES[0]
    before, after = (
        model.token_log_probs([recipe])[0].sum()
        for model in (loaded, lm.LanguageModel.load(out, device="cpu"))
    )
    assert after < before


def test_streamed_data_are_weighed_as_they_come(start, index, tmp_path):
    rows = make(CBDTrainer, CBDConfig, start, tmp_path / "rows", index=index, scorer=RawBCI()).train_dataset
    loaded = lm.LanguageModel.load(start, device="cpu")
    texts = rows.select_columns(["prompt", "chosen", "rejected"])
    streaming = CBDTrainer(
        model=loaded.model,
        ref_model=lm.LanguageModel.load(start, device="cpu").model,
        args=CBDConfig(str(tmp_path / "stream"), max_steps=1, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=texts.to_iterable_dataset(),
        processing_class=loaded.tokenizer,
        index=index,
        scorer=RawBCI(),
    )
    assert [row["rejected_weights"] for row in streaming.train_dataset] == rows["rejected_weights"][:]
    streaming.train()


def test_training_into_a_folder_gives_a_model_that_loads(start, index, tmp_path):
    for name, trace in (("cbd", (index, RawBCI())), ("unlikelihood", None)):
        cbd.prefer(
            start,
            TRIPLES,
            SETTINGS,
            tmp_path / name,
            trace=trace,
            penalty={"penalty_lambda": 1.0},
            seed=0,
            device="cpu",
        )
        assert lm.training_log(tmp_path / name)
    first, second = (
        lm.LanguageModel.load(tmp_path / name).model.state_dict() for name in ("cbd", "unlikelihood")
    )
    assert not same(first, second)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"penalty_lambda": math.nan},
        {"penalty_lambda": math.inf},
        {"penalty_lambda": -1.0},
        {"penalty_lambda": True},
        {"cbd_threshold": math.nan},
        {"cbd_threshold": -math.inf},
        {"cbd_threshold": "20"},
        {"penalty_target": "none"},
        {"penalty_form": "square"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong, tmp_path):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        CBDConfig(str(tmp_path), **wrong)


def test_a_tokenizer_that_is_not_the_indexs_is_named_before_training(start, index, tmp_path):
    other = lm.train_tokenizer(["quite another text", *CORPUS], 300)
    with pytest.raises(VocabularyError, match="not the one of the index"):
        make(CBDTrainer, CBDConfig, start, tmp_path, index=index, scorer=RawBCI(), processing_class=other)


def test_a_config_of_another_class_is_refused(start, index, tmp_path):
    for config in (DPOConfig, UnlikelihoodConfig):
        with pytest.raises(ParameterError, match="CBDConfig"):
            make(CBDTrainer, config, start, tmp_path, index=index, scorer=RawBCI())


def test_a_penalty_on_nothing_is_refused_unless_it_is_only_measured(start, index, tmp_path):
    nothing = {"index": index, "scorer": RawBCI(), "cbd_threshold": 1e6}
    with pytest.raises(ParameterError, match="would do nothing"):
        make(CBDTrainer, CBDConfig, start, tmp_path, **dict(nothing))
    make(CBDTrainer, CBDConfig, start, tmp_path, penalty_lambda=0.0, **dict(nothing))


def test_wrong_lengths_empty_indexes_and_scores_that_are_not_finite_are_refused(
    start, index, tokenizer, tmp_path
):
    class Endless(SpanLength):
        def _score(self, *_: Any) -> Any:
            return super()._score(*_) * math.inf

    empty = TraceIndex.build([Document("d", "")], tokenizer, tmp_path / "empty")
    for wrong, message in (
        ({"scorer": Endless()}, "not finite"),
        ({"index": empty}, "holds no text"),
        ({"cbd_min_length": 0}, "min_length"),
    ):
        options = {"index": index, "scorer": RawBCI(), **wrong}
        with pytest.raises(ParameterError, match=message):
            make(CBDTrainer, CBDConfig, start, tmp_path / "out", **options)


def test_a_collator_that_moves_tokens_is_refused(tracing):
    def shifted(examples: Any) -> dict[str, Any]:
        batch = dict(tracing.data_collator.inner(examples))
        batch["completion_mask"] = batch["completion_mask"].roll(-1, dims=1)
        return batch

    with pytest.raises(ModelError, match="collator"):
        cbd._WeightCollator(shifted, "keep_start")(list(tracing.train_dataset)[:2])
