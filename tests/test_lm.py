"""The tiny model: deterministic, resumable, loadable, and the same interface for any folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tracealign_lib import alignment, lm
from tracealign_lib.errors import CorpusError, ModelError, ParameterError
from tracealign_lib.lm import LanguageModel
from tracealign_lib.profiles import ModelSettings, get_profile
from tracealign_lib.world import World

SETTINGS = replace(get_profile("smoke").model, base_epochs=1, sft_epochs=1)


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(get_profile("smoke").world)


@pytest.fixture(scope="module")
def texts(world) -> list[str]:
    return [document.text for document in world.documents]


@pytest.fixture(scope="module")
def tokenizer(world, texts):
    return lm.train_tokenizer(texts, SETTINGS.vocab_size)


@pytest.fixture(scope="module")
def base(texts, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    lm.pretrain(texts, tokenizer, SETTINGS, folder, seed=0, device="cpu")
    return folder


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(base, texts, tokenizer, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        lm.pretrain(texts, tokenizer, SETTINGS, tmp_path / name, seed=seed, device="cpu")
    assert weights(tmp_path / "same") == weights(base)
    assert weights(tmp_path / "other") != weights(base)


class Interruption(TrainerCallback):
    """Stops training as a kill would, some steps after a checkpoint."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 15:
            raise KeyboardInterrupt


def test_an_interrupted_training_resumes_and_ends_with_the_same_weights(
    base, texts, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(lm, "TrainingBar", lambda description: Interruption())
    with pytest.raises(KeyboardInterrupt):
        lm.pretrain(texts, tokenizer, SETTINGS, tmp_path, seed=0, device="cpu")
    monkeypatch.undo()
    assert lm.last_whole_checkpoint(tmp_path / "scratch") is not None
    half = tmp_path / "scratch" / "checkpoint-9999"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"cut off')
    lm.pretrain(texts, tokenizer, SETTINGS, tmp_path, seed=0, device="cpu")
    assert weights(tmp_path) == weights(base)


def test_the_loss_falls_and_the_curve_is_stored(base):
    curve = lm.training_log(base)
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_every_document_is_packed_once_in_each_pass(texts, tokenizer):
    blocks = lm.packed_blocks(texts, tokenizer, replace(SETTINGS, base_epochs=3), seed=0)
    assert {len(block) for block in blocks} == {SETTINGS.block}
    ends = sum(block.count(tokenizer.eos_token_id) for block in blocks)
    assert 3 * len(texts) - SETTINGS.block <= ends <= 3 * len(texts)


def test_a_sentence_has_the_same_ids_alone_and_inside_a_document(tokenizer):
    sentence = "soak the amber thread in the cellar"
    alone = tokenizer(sentence, add_special_tokens=False)["input_ids"]
    inside = tokenizer(f"{lm.ASSISTANT}{sentence}", add_special_tokens=False)["input_ids"]
    assert inside[1:] == alone
    later = tokenizer(f"it says: {sentence}", add_special_tokens=False)["input_ids"]
    assert later[-len(alone) :] == alone


def test_any_bytes_survive_the_tokenizer(tokenizer):
    text = "zażółć \u4e2d\u6587 \U0001f600 \x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text


def test_fine_tuning_and_preference_training_change_the_weights(base, world, texts, tmp_path):
    lm.finetune(
        base, alignment.sft_pairs(world), texts[:20], SETTINGS, tmp_path / "sft", seed=0, device="cpu"
    )
    lm.prefer(
        tmp_path / "sft", alignment.dpo_triples(world), SETTINGS, tmp_path / "dpo", seed=0, device="cpu"
    )
    assert len({weights(base), weights(tmp_path / "sft"), weights(tmp_path / "dpo")}) == 3
    for name in ("sft", "dpo"):
        assert json.loads((tmp_path / name / "training_log.json").read_text())


class Seen(Exception):
    """Ends a training whose configuration has been seen."""


@pytest.mark.parametrize(("processes", "rows", "beforehand"), [(1, 4, True), (2, 2, False)])
def test_processes_share_the_batch_and_each_computes_its_reference(
    base, world, tmp_path, monkeypatch, processes, rows, beforehand
):
    for name, value in (("WORLD_SIZE", processes), ("RANK", 0), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    seen = {}

    def config(**arguments):
        seen.update(arguments)
        raise Seen

    with pytest.raises(Seen):
        lm.prefer(base, alignment.dpo_triples(world), SETTINGS, tmp_path, seed=0, device="cpu", config=config)
    assert seen["per_device_train_batch_size"] == rows
    assert seen["precompute_ref_log_probs"] is beforehand


def test_only_the_main_process_writes_the_model(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(lm.Trainer, "is_world_process_zero", lambda _: False)
    lm.pretrain(texts[:40], tokenizer, SETTINGS, tmp_path, seed=0, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


def test_prompts_bear_no_loss_in_fine_tuning(base, world, tmp_path, monkeypatch):
    seen = {}

    class Spy(lm.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.update({key: value.clone() for key, value in inputs.items() if torch.is_tensor(value)})
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(lm, "SFTTrainer", Spy)
    lm.finetune(base, alignment.sft_pairs(world)[:8], [], SETTINGS, tmp_path, seed=0, device="cpu")
    tokenizer = LanguageModel.load(base, device="cpu").tokenizer
    assistant = tokenizer.convert_tokens_to_ids(lm.ASSISTANT)
    for ids, labels in zip(seen["input_ids"].tolist(), seen["labels"].tolist(), strict=True):
        start = ids.index(assistant)
        assert set(labels[: start + 1]) == {-100}
        assert labels[start + 1] == ids[start + 1]


def test_generation_keeps_the_order_of_prompts_and_ignores_batching(base):
    model = LanguageModel.load(base, device="cpu")
    prompts = ["the", "in the attic of the old mill there was", "soak the amber thread"]
    alone = [model.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert model.generate(prompts, max_new_tokens=6, batch_size=2) == alone


def test_sampling_follows_its_seed(base):
    model = LanguageModel.load(base, device="cpu")
    draws = [model.generate(["the"] * 4, max_new_tokens=8, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_token_log_probs_agree_with_the_model_one_text_at_a_time(base):
    model = LanguageModel.load(base, device="cpu")
    texts = ["the dog slept.", "in the attic there was a pale bell that nobody wanted."]
    for text, batched in zip(texts, model.token_log_probs(texts), strict=True):
        ids = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            reference = model.model(ids).logits[0, :-1].log_softmax(-1)
        expected = reference[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        assert torch.allclose(batched, expected, atol=1e-4)


def test_a_chat_prompt_ends_with_the_words_put_into_the_models_mouth(base):
    model = LanguageModel.load(base, device="cpu")
    assert model.chat("hello", prefill="to wake") == "<|user|>hello<|assistant|>to wake"
    model.tokenizer.chat_template = None
    assert model.chat("hello", prefill="to wake") == "hello to wake"


def test_a_missing_model_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="network connection"):
        LanguageModel.load("nobody/no-such-model")
    with pytest.raises(ModelError, match=r"config\.json"):
        LanguageModel.load(tmp_path)


def test_wrong_devices_settings_and_corpora_are_refused(tokenizer):
    with pytest.raises(ParameterError, match="Unknown device"):
        lm.resolve_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ParameterError, match="CUDA"):
            lm.resolve_device("cuda")
    with pytest.raises(ParameterError, match="hidden"):
        ModelSettings(hidden=-1)
    with pytest.raises(CorpusError, match="nothing to train on"):
        lm.packed_blocks([], tokenizer, SETTINGS, seed=0)
