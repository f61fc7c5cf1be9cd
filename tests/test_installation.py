"""The text of a Python installation, on small made-up installations."""

from __future__ import annotations

from pathlib import Path

import pytest
from installation_samples import install, write

from tracealign_lib import installation
from tracealign_lib.build_cost import Build
from tracealign_lib.errors import CorpusError, ParameterError
from tracealign_lib.index import TraceIndex
from tracealign_lib.installation import DATA, LICENCE, PYTHON, SOURCE, TEXT, Installation


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    write(library / "json" / "decoder.py", "def decode(): pass\n")
    write(library / "json" / "__pycache__" / "decoder.pyc", b"\0\0")
    install(packages, "grain", {"grain/mill.py": "turn = 1\n", "grain-1.0.dist-info/LICENSE": "be kind\n"})
    install(
        packages, "bread", {"bread/oven.json": "{}\n", "bread/README": "bake\n", "bread/pan.so": b"\x7fELF"}
    )
    return library, packages


def names(found: Installation) -> list[str]:
    return [file.id for file in found.files]


def test_files_are_listed_by_their_path_inside_the_installation(places: tuple[Path, Path]) -> None:
    found = Installation.find(*places)
    assert names(found) == [
        "bread/README",
        "bread/oven.json",
        "grain-1.0.dist-info/LICENSE",
        "grain/mill.py",
        "python/json/decoder.py",
    ]
    assert [(file.package, file.kind) for file in found.files] == [
        ("bread", TEXT),
        ("bread", DATA),
        ("grain", LICENCE),
        ("grain", SOURCE),
        (PYTHON, SOURCE),
    ]
    assert found.files[3].version == "1.0"
    assert found.packages == ("bread", "grain", PYTHON)
    assert found.size == sum(file.path.stat().st_size for file in found.files)


def test_documents_carry_text_and_package_and_no_path_of_the_machine(places: tuple[Path, Path]) -> None:
    documents = {document.id: document for document in Installation.find(*places).documents()}
    assert documents["grain/mill.py"].text == "turn = 1\n"
    meta = {"package": "grain", "version": "1.0", "kind": SOURCE, "file": "grain/mill.py"}
    assert documents["grain/mill.py"].meta == meta
    assert not [d for d in documents.values() if str(places[0]) in d.to_json()]


@pytest.mark.parametrize("content", [b"caf\xe9 = 1\n", b"a = '\0'\n"], ids=["not UTF-8", "holds a NUL"])
def test_what_is_no_text_is_left_out(places: tuple[Path, Path], content: bytes) -> None:
    install(places[1], "odd", {"odd/a.py": content, "odd/b.py": "b = 1\n"})
    found = [document.id for document in Installation.find(*places).documents()]
    assert "odd/b.py" in found
    assert "odd/a.py" not in found


def test_a_file_that_holds_a_path_of_the_installation_is_left_out(places: tuple[Path, Path]) -> None:
    install(
        places[1], "told", {"told/where.py": f"home = '{places[0]}/json'\n", "told/direct_url.json": "{}"}
    )
    found = Installation.find(*places)
    assert "told/direct_url.json" not in names(found)
    assert "told/where.py" not in [document.id for document in found.documents()]


def test_links_large_files_and_missing_files_are_left_out(places: tuple[Path, Path]) -> None:
    install(
        places[1], "big", {"big/a.py": "a" * (installation.LARGEST + 1), "big/b.py": "b", "big/c.py": "c"}
    )
    (places[1] / "big" / "b.py").unlink()
    (places[1] / "big" / "c.py").unlink()
    (places[1] / "big" / "c.py").symlink_to(places[1] / "grain" / "mill.py")
    assert not [name for name in names(Installation.find(*places)) if name.startswith("big/")]


def test_a_file_that_goes_before_it_is_read_is_left_out(places: tuple[Path, Path]) -> None:
    found = Installation.find(*places)
    (places[1] / "grain" / "mill.py").unlink()
    assert len(list(found.documents())) == len(found.files) - 1


def test_an_empty_installation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no text"):
        Installation.find(tmp_path, tmp_path)


def test_the_fingerprint_follows_names_versions_and_sizes(places: tuple[Path, Path]) -> None:
    prints = [Installation.find(*places).fingerprint]
    write(places[1] / "grain" / "mill.py", "turn = 12\n")
    prints.append(Installation.find(*places).fingerprint)
    install(places[1], "salt", {"salt/a.py": "a = 1\n"})
    prints.append(Installation.find(*places).fingerprint)
    assert len(set(prints)) == 3
    assert Installation.find(*places).fingerprint == prints[-1]


def test_a_sample_gives_each_package_the_same_share(tmp_path: Path) -> None:
    library, packages = tmp_path / "lib", tmp_path / "packages"
    library.mkdir()
    for name, count in (("aaa", 50), ("mmm", 50), ("zzz", 2)):
        install(packages, name, {f"{name}/{number}.py": "x" * 100 for number in range(count)})
    whole = Installation.find(library, packages)
    part = whole.sample(4200)
    sizes = {name: sum(f.size for f in part.files if f.package == name) for name in part.packages}
    assert sizes == {"aaa": 2000, "mmm": 2000, "zzz": 200}  # zzz leaves of its third to the others
    assert {Path(f.id).name for f in part.files if f.package == "aaa"} == {
        Path(f.id).name for f in part.files if f.package == "mmm"
    }
    assert part == whole.sample(4200) != whole.sample(4200, seed=1)
    assert list(part.files) == sorted(part.files)
    assert whole.sample(whole.size) is whole


def test_licences_do_not_take_the_share_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    files = {"a-1.0.dist-info/LICENSE": "l" * 1000, "a/x.py": "x" * 500, "a/y.py": "y" * 500}
    install(tmp_path / "packages", "a", files)
    part = Installation.find(tmp_path / "lib", tmp_path / "packages").sample(1500)
    assert [file.kind for file in part.files].count(SOURCE) == 1
    assert part.size <= 1500


@pytest.mark.parametrize("limit", [0, -1, 2.5])
def test_a_limit_that_is_none_is_refused(places: tuple[Path, Path], limit: float) -> None:
    with pytest.raises(ParameterError):
        Installation.find(*places).sample(limit)  # type: ignore[arg-type]


def test_stages_build_once_and_again_for_another_installation(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEALIGN_CACHE", str(tmp_path / "cache"))
    found = Installation.find(*places)
    tokenizer = installation.tokenizer_stage(found, 300, 10_000)
    stage = installation.index_stage(found, tokenizer)
    index = TraceIndex.open(stage.path() / "index")
    assert index.document_ids == tuple(names(found))
    assert index.document("grain/mill.py").text == "turn = 1\n"
    cost = Build.read(stage.path() / installation.BUILD_COST)
    assert (cost.tokens, cost.documents, cost.shards) == (index.n_tokens, index.n_documents, 1)
    assert cost.text == found.size
    again = installation.index_stage(Installation.find(*places), tokenizer)
    assert again.is_cached()
    write(places[1] / "grain" / "mill.py", "turn = 123\n")
    assert not installation.index_stage(Installation.find(*places), tokenizer).is_cached()


def test_this_python_has_an_installation() -> None:
    found = Installation.find()
    assert PYTHON in found.packages
    assert len(set(names(found))) == len(found.files)
    assert not [name for name in names(found) if name.startswith("/") or ".." in name.split("/")]
