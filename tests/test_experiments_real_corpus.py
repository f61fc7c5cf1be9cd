"""Chapter 11's experiments on a small made-up installation, with answers worked out by hand."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import pandas as pd
import pytest
from installation_samples import install

from tracealign_lib import lm
from tracealign_lib.experiments import copies
from tracealign_lib.experiments import real_corpus as real
from tracealign_lib.experiments.common import prediction_table
from tracealign_lib.installation import Installation
from tracealign_lib.profiles import ModelSettings, get_profile
from tracealign_lib.stats import Interval, wilson
from tracealign_lib.world import World

SIZE = real.Size(limit=10**6, vocabulary=600, tokenizer=10**6, passages=6, rival=10**5)
MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy\nof this software.\n"
WRAPPED = MIT.replace("free of charge, ", "free of\n# charge, ")


def words(seed: int, n: int = 300) -> str:
    """Text that shares no run of words with that of another seed."""
    rng = Random(seed)
    names = ["".join(rng.choices("abcdefgh", k=3)) for _ in range(60)]
    return " ".join(rng.choices(names, k=n)) + "\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> real.RealCorpus:
    folder = tmp_path_factory.mktemp("installation")
    (folder / "lib").mkdir()
    for number, licence in enumerate((MIT, MIT, MIT, MIT, WRAPPED, "none\n")):
        name = f"p{number}"
        files: dict[str, str | bytes] = {f"{name}-1.0.dist-info/LICENSE": licence}
        files[f"{name}/a.py"] = words(number)
        install(folder / "packages", name, files)
    install(folder / "packages", "q", {"q/_vendor/a.py": words(0)})
    found = Installation.find(folder / "lib", folder / "packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEALIGN_CACHE", str(folder / "cache"))
        made = real.RealCorpus(found, SIZE)
        assert made.build.tokens == made.index.n_tokens
        return made


def test_the_size_follows_the_profile() -> None:
    installation = Installation.find()
    sizes = [real.RealCorpus.of(name, installation) for name in ("smoke", "laptop")]
    assert [corpus.size for corpus in sizes] == [real.SIZES["smoke"], real.SIZES["laptop"]]
    assert all(corpus.installation.size <= corpus.size.limit for corpus in sizes)


def test_described_sizes_add_up(corpus: real.RealCorpus) -> None:
    table = real.describe(corpus)
    assert table["files"].sum() == len(corpus.installation.files)
    assert table["megabytes"].sum() * 1e6 == pytest.approx(corpus.installation.size)


def test_passages_stand_in_their_origin_and_depend_on_the_seed(corpus: real.RealCorpus) -> None:
    passages = real.draw_passages(corpus, 0)
    assert len(passages) == SIZE.passages
    for origin, text in passages:
        assert text in corpus.index.document(origin).text
        assert abs(len(corpus.index.encode(text)) - real.PASSAGE) <= 2
    assert passages == real.draw_passages(corpus, 0)
    assert passages != real.draw_passages(corpus, 1)


def test_a_tenth_of_the_words_is_replaced() -> None:
    text = "\n".join("abcdefghij klmnopqrst" for _ in range(10))
    changed = real.replace_words(text, ["new"], Random(0))
    assert changed.split().count("new") == 2
    assert len(changed.split()) == len(text.split())
    assert changed.count("\n") == 9
    assert real.replace_words("one", ["new"], Random(0)) == "new"


def test_shuffling_keeps_words_and_white_space() -> None:
    text = "a bb\n  ccc\tdddd e ff"
    shuffled = real.shuffle_words(text, Random(3))
    assert shuffled != text
    assert sorted(shuffled.split()) == sorted(text.split())
    assert [c for c in shuffled if c.isspace()] == [c for c in text if c.isspace()]


def test_shuffled_tokens_are_the_same_tokens(corpus: real.RealCorpus) -> None:
    text = corpus.index.document("p1/a.py").text[:80]
    shuffled = real.shuffle_tokens(text, corpus.tokenizer, Random(0))
    assert shuffled != text
    assert sorted(shuffled.replace(" ", "")) == sorted(text.replace(" ", ""))


def test_whole_passages_are_found_and_shuffled_tokens_are_not(corpus: real.RealCorpus) -> None:
    frame = real.passage_frame(corpus, 0)
    assert len(frame) == 3 * len(real.VARIANTS) * SIZE.passages
    assert real.found_rate(frame, real.COVER, real.WHOLE) == wilson(6, 6)
    assert real.found_rate(frame, real.COVER, real.SCRAMBLED) == wilson(0, 6)
    table = real.passage_table(frame)
    assert list(table.columns) == ["method", *real.VARIANTS]
    assert real.headlines(frame)[f"{real.COVER}, {real.WHOLE}"].estimate == 1.0
    assert len(prediction_table(real.PREDICTIONS, frame)) == len(real.PREDICTIONS)


def test_a_copy_counts_as_found_and_another_file_does_not(corpus: real.RealCorpus) -> None:
    def shown(origin: str, text: str) -> bool:
        frame = real.passage_frame(corpus, 0, [real.Passage(origin, text)])
        return bool(frame[(frame["method"] == real.COVER) & (frame["variant"] == real.WHOLE)]["found"].all())

    copied = corpus.index.document("p0/a.py").text[:200].strip()
    assert shown("q/_vendor/a.py", copied)
    assert not shown("p0/a.py", "nothing of this stands anywhere")
    assert not shown("p0/a.py", copied + " and something that stands nowhere")


def test_bm25_searches_the_origins_and_no_more_than_its_share(corpus: real.RealCorpus) -> None:
    passages = [real.Passage("p3/a.py", "x")]
    small = real.RealCorpus(corpus.installation, SIZE._replace(rival=1500))
    small.__dict__["index"] = corpus.index
    documents = real.rival_documents(small, 0, passages)
    assert "p3/a.py" in [document.id for document in documents]
    others = [document for document in documents if document.id != "p3/a.py"]
    assert 0 < sum(len(document.text) for document in others) <= 1500


def test_licences_are_counted_by_line_and_in_any_layout(corpus: real.RealCorpus) -> None:
    [mit, *others] = real.count_licences(corpus)
    assert (mit.occurrences, mit.documents, mit.packages, mit.any_layout) == (4, 4, 4, 5)
    assert not any(licence.occurrences for licence in others)
    ids = corpus.index.encode(real.SENTENCES["MIT"])
    assert 0 < mit.surprisal < corpus.index.surprisal[ids].sum()
    table = real.licence_table([mit, *others])
    assert list(table["kept by M <= 3"])[:2] == ["no", "absent"]
    below = real.windows_below(corpus, [mit, *others], 0, n=50)
    assert below.n == 50


def test_a_model_is_traced_to_two_corpora(corpus: real.RealCorpus) -> None:
    world = World.generate(get_profile("smoke").world_settings(0))
    settings = ModelSettings(hidden=16, layers=1, heads=2, mlp=16, context=256)
    model = lm.LanguageModel(lm.new_model(settings, corpus.tokenizer, 0), corpus.tokenizer, "cpu")
    pipeline = SimpleNamespace(
        world=world, seed=0, device="cpu", index=corpus.index, model=lambda name: model
    )
    frame = real.foreign_frame(pipeline, corpus, prompts=2)  # type: ignore[arg-type]
    assert len(frame) == 2
    assert (frame["own"] == frame["python"]).all()
    assert frame["own"][0] == real.longest_match(corpus.index, frame["completion"][0])


def test_the_longest_match_and_the_rate_of_traced_texts(corpus: real.RealCorpus) -> None:
    assert real.longest_match(corpus.index, "") == 0
    text = corpus.index.document("p2/a.py").text.strip()
    assert real.longest_match(corpus.index, text) >= len(corpus.index.encode(text)) - 1
    frame = pd.DataFrame({"own": [8, 7, 30], "python": [0, 1, 2]})
    assert real.traced_rate(frame, "own") == wilson(2, 3)
    assert real.traced_rate(frame, "python") == wilson(0, 3)


def test_verdicts_of_the_other_predictions(corpus: real.RealCorpus) -> None:
    found = copies.find_copies(corpus.index, corpus.package, corpus.kind)
    assert [(row.package, row.other) for row in found.pairs.itertuples()] == [("p0", "q")]
    assert copies.shared_text(corpus.index, "p0/a.py", "q/_vendor/a.py", longest=30) in words(0)
    frame = pd.DataFrame({"own": [30] * 50, "python": [2] * 50})
    measured = real.other_headlines(Interval(0.9, 0.8, 1.0, 9), found, frame)
    assert measured.keys() == real.OTHER_PREDICTIONS.keys()
    verdicts = real.verdicts(measured).set_index("quantity")["verdict"]
    assert verdicts[real.OWN] == verdicts[real.PYTHON] == verdicts[real.BELOW] == "held"


@pytest.mark.slow
def test_builds_are_measured_in_processes_of_their_own(corpus: real.RealCorpus) -> None:
    small = real.RealCorpus(corpus.installation, SIZE._replace(limit=corpus.installation.size * real.PART))
    small.__dict__["tokenizer"] = corpus.tokenizer
    shards, one = real._builds(small)
    assert (shards.tokens, one.shards) == (one.tokens, 1)
    assert shards.shards > 1
