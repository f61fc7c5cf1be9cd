"""Builds measured, corpora sized, and accidents that leave an index whole or say what is wrong."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest

from tracealign_lib import build_cost, lm
from tracealign_lib.build_cost import Build, measure_build, peak_memory
from tracealign_lib.documents import Document
from tracealign_lib.errors import ModelError, ParameterError
from tracealign_lib.experiments import scale
from tracealign_lib.results import write_results
from tracealign_lib.sharded import open_index

DOCUMENTS = [Document(f"d{number}", f"grain {number} for the mill " * 20) for number in range(24)]
MILLION = Build(1, 10, 10**6, 4 * 10**6, 10 * 10**6, 50 * 10**6, 4.0, 2.0)
SHARDS = Build(4, 80, 8 * 10**6, 32 * 10**6, 81 * 10**6, 60 * 10**6, 40.0, 16.0)


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return lm.train_tokenizer([document.text for document in DOCUMENTS], 300)


def test_a_build_is_measured(tmp_path: Path, tokenizer: object) -> None:
    one = measure_build(lambda: iter(DOCUMENTS), tokenizer, tmp_path / "one")
    cut = measure_build(lambda: iter(DOCUMENTS), tokenizer, tmp_path / "cut", shard_bytes=4000)
    index = open_index(tmp_path / "one")
    text = sum(len(document.text) for document in DOCUMENTS)
    assert (one.shards, one.documents, one.tokens, one.text) == (1, 24, index.n_tokens, text)
    assert (cut.documents, cut.tokens, cut.text) == (24, index.n_tokens, text)
    assert cut.shards == 3
    assert one.disk == sum(f.stat().st_size for f in (tmp_path / "one").rglob("*") if f.is_file())
    assert cut.disk > one.disk
    engines = [index, open_index(tmp_path / "cut")]
    assert scale.same_answers(engines, [DOCUMENTS[3].text, "no mill at all"])
    assert not scale.same_answers([engines[0], Without(engines[0])], [DOCUMENTS[3].text])
    one.write(tmp_path / "build.json")
    assert Build.read(tmp_path / "build.json") == one


class Without:
    """An index that says it found nothing."""

    def __init__(self, index: object) -> None:
        self.index = index

    def spans(self, ids: object) -> list[object]:
        return []

    def sources(self, ids: object, *, limit: int) -> list[object]:
        return []


def test_memory_is_watched() -> None:
    size = 100_000_000
    with peak_memory() as peak:
        held = mmap.mmap(-1, size)  # an array might be put where memory was freed
        held.write(bytes(size))
        time.sleep(20 * build_cost._SAMPLING)
        held.close()
    assert peak.bytes > size / 2


def test_the_table_of_builds() -> None:
    table = scale.build_table([MILLION, SHARDS])
    assert list(table["bytes a token on disk"]) == [10.0, 81 / 8]
    assert list(table["of these text"]) == [4.0, 4.0]
    assert list(table["peak memory (MB)"]) == [50.0, 60.0]


def test_larger_corpora_are_computed_from_the_largest_build() -> None:
    table = scale.sizing_table([MILLION, SHARDS])
    assert len(table) == 2 + len(scale.SIZES)
    assert (table["row"] == "measured").sum() == 2
    by_size = table[table["row"] == "computed"].set_index("tokens")
    billion = by_size.loc["1,000,000,000"]
    assert billion["text"] == "4 GB"
    assert billion["index on disk"] == "10 GB"
    assert billion["shards"] == "500"  # of two million tokens
    assert billion["memory to build"] == "60 MB"  # of two million tokens too
    assert billion["CPU time"] == "33 min"
    assert billion["on 100 cores"] == "20 s"
    assert by_size.loc["1,000,000", "memory to build"] == "50 MB"
    third = Build(1, 80, 2 * 10**6 - 10**6 // 2, 4, 4, 54 * 10**6, 4.0, 2.0)
    with_third = scale.sizing_table([MILLION, third]).set_index("tokens")
    assert with_third.loc["10,000,000", "memory to build"] == "54 MB"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_500_000, "1.5 MB"), (999_600, "1 MB"), (2e15, "2000 TB")],
)
def test_magnitudes(value: float, text: str) -> None:
    assert scale.magnitude(value, "B") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (99, "99 s"), (120, "2 min"), (7200, "2 h"), (864_000, "10 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert scale.duration(seconds) == text


def test_published_builds_where_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracealign_lib.results.results_folder", lambda: tmp_path)
    assert scale.published_builds() == []
    rest = {"profile": "full", "seeds": [3], "settings": {}, "path": tmp_path}
    write_results("real-corpus", {"builds": [SHARDS._asdict(), MILLION._asdict()]}, **rest)
    assert scale.published_builds() == [MILLION, SHARDS]


def test_an_error_of_the_library_is_shown_and_others_are_not_hidden(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing() -> int:
        raise ModelError("No model.", mend="name one")

    assert scale.attempt(missing) is None
    assert capsys.readouterr().out == "ModelError: No model.\n  to mend:  name one\n"
    assert scale.attempt(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        scale.attempt(lambda: 1 // 0)


def test_accidents_leave_an_index_whole_or_say_what_is_wrong(tokenizer: object) -> None:
    table = scale.accidents(DOCUMENTS, tokenizer, moments=1).set_index("accident")["what a reader finds"]
    killed, stopped, flipped, cut = table
    assert killed == "an intact index with the old answers, 1 of 1 times"
    assert stopped == "the 4 finished shards kept, 3 of 7 built"
    assert flipped.startswith("IndexFormatError: The index is damaged. …: suffixes.npy")
    assert cut.startswith("IndexFormatError: The index is damaged. …: suffixes.npy has")


def test_damage_that_is_not_noticed_is_told(tmp_path: Path, tokenizer: object) -> None:
    measure_build(lambda: iter(DOCUMENTS), tokenizer, tmp_path / "index")
    sound = (tmp_path / "index" / "suffixes.npy").read_bytes()
    assert scale._damage(tmp_path / "index", lambda raw: raw, "full").startswith("nothing")
    assert (tmp_path / "index" / "suffixes.npy").read_bytes() == sound
    with pytest.raises(ParameterError):
        open_index(tmp_path / "index", verify="half")
