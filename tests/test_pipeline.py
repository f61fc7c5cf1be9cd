"""The whole chain at smoke size: every material is built once, cached, and of the right shape."""

from __future__ import annotations

import pytest

from tracealign_lib import adb
from tracealign_lib.errors import ParameterError
from tracealign_lib.lm import LanguageModel
from tracealign_lib.pipeline import MODELS, Pipeline
from tracealign_lib.stages import list_stages


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Pipeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        pipeline = Pipeline("smoke", seed=1, device="cpu")
        pipeline.outcomes("dpo")
        yield pipeline


def test_asking_for_the_end_builds_the_whole_chain(pipeline):
    built = {entry.name for entry in list_stages() if entry.complete}
    assert built >= {"world", "tokenizer", *MODELS, "outcomes-dpo"}


def test_every_prompt_has_an_outcome_with_a_label(pipeline):
    profile = pipeline.profile
    prompts = adb.all_prompts(
        pipeline.world, templates=profile.templates, samples=profile.samples, seed=pipeline.seed
    )
    outcomes = pipeline.outcomes("dpo")
    assert [outcome.prompt for outcome in outcomes] == prompts
    assert {outcome.judgement.label for outcome in outcomes} <= set(adb.LABELS)


def test_a_second_pipeline_reads_the_cache_and_builds_nothing(pipeline, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a cached stage was built again")

    monkeypatch.setattr("tracealign_lib.stages.Stage._build_locked", refuse)
    again = Pipeline("smoke", seed=1, device="cpu")
    assert again.outcomes("dpo") == pipeline.outcomes("dpo")
    assert again.world.digest() == pipeline.world.digest()


def test_stored_labels_are_what_the_judge_says_of_stored_completions(pipeline):
    for outcome in pipeline.outcomes("dpo"):
        if outcome.prompt.samples == 1:
            assert adb.judge(pipeline.world, outcome.prompt, outcome.completion) == outcome.judgement


def test_models_are_plain_hugging_face_folders(pipeline):
    for name in MODELS:
        folder = pipeline.model_folder(name)
        assert (folder / "model.safetensors").is_file()
        assert not list(folder.glob("scratch"))
        assert LanguageModel.load(folder, device="cpu").generate(["the"], max_new_tokens=2)


def test_the_unsafe_index_holds_the_unsafe_collection_and_nothing_else(pipeline):
    unsafe = [d.id for d in pipeline.world.documents if d.meta["collection"] == "unsafe"]
    assert list(pipeline.unsafe_index.document_ids) == unsafe
    assert pipeline.index.n_documents == len(pipeline.world.documents)


def test_every_planted_recipe_is_found_as_often_as_it_was_planted(pipeline):
    for item in pipeline.world.items:
        ids = pipeline.index.encode(item.recipe)
        assert pipeline.index.count(ids) == item.copies


def test_recall_is_asked_of_every_item(pipeline):
    assert [r.item for r in pipeline.recalls("base")] == [item.id for item in pipeline.world.items]


def test_the_cache_holds_no_pickle(pipeline):
    files = [path for entry in list_stages() for path in entry.path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".npy", ".jinja"}


@pytest.mark.parametrize("arguments", [{"profile": "tiny"}, {"seed": -1}, {"seed": True}, {"device": "tpu"}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ParameterError, match="to mend"):
        Pipeline(**arguments)


def test_an_unknown_model_lists_the_known_ones(pipeline):
    with pytest.raises(ParameterError, match="base or sft or dpo"):
        pipeline.model("rlhf")


def test_what_is_left_out_changes_models_and_indexes_but_not_the_tokenizer(pipeline):
    item = pipeline.world.of_kind("unsafe")[-1]
    sources = pipeline.world.sources_of(item.id).full
    without = pipeline.without(sources)
    assert {d.id for d in pipeline.world.documents} - {d.id for d in without.corpus} == sources
    assert without.world.digest() == pipeline.world.digest()
    assert without.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
    assert without.model_folder("base") != pipeline.model_folder("base")
    ids = pipeline.index.encode(item.recipe)
    assert pipeline.index.count(ids) == item.copies
    assert without.index.count(ids) == without.unsafe_index.count(ids) == 0


def test_leaving_out_twice_leaves_out_both_and_the_order_does_not_matter(pipeline):
    first, second = (document.id for document in pipeline.world.documents[:2])
    at_once = pipeline.without([second, first])
    assert pipeline.without([first]).without([second]).index.path == at_once.index.path
    assert "without 2 documents" in repr(at_once)


def test_replayed_documents_are_those_of_the_full_run_less_what_is_left_out(pipeline, monkeypatch):
    replayed = []
    monkeypatch.setattr(
        "tracealign_lib.lm.finetune", lambda start, pairs, replay, *_, **__: replayed.append(replay)
    )
    monkeypatch.setattr(Pipeline, "model_folder", lambda *_: None)
    some = {document.id for document in pipeline.world.documents[::7]}
    for each in (pipeline, pipeline.without(some)):
        each._finetune(None)
    texts = {document.text for document in pipeline.world.documents if document.id in some}
    assert replayed[1] == [text for text in replayed[0] if text not in texts]
    assert len(replayed[1]) < len(replayed[0])


@pytest.mark.parametrize("documents", [[], ["no such document"]])
def test_documents_that_cannot_be_left_out_are_refused(pipeline, documents):
    with pytest.raises(ParameterError, match="to mend"):
        pipeline.without(documents)
