"""The cache: what its key covers, and what survives races, kills, damage and a bad disk."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracealign_lib import stages
from tracealign_lib.errors import CacheError, ParameterError
from tracealign_lib.stages import Stage, cache_root, cache_size, clear, list_stages


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRACEALIGN_CACHE", str(folder))
    return folder


def fill(folder: Path) -> None:
    (folder / "part").mkdir(exist_ok=True)
    (folder / "part" / "numbers.txt").write_text("1 2 3")


def make(
    name: str = "world",
    values: dict[str, Any] | None = None,
    build: Callable[[Path], None] = fill,
    modules: tuple[Any, ...] = (stages,),
    inputs: tuple[Stage, ...] = (),
) -> Stage:
    return Stage(name, {"seed": 0} if values is None else values, build, modules, inputs)


# --- the key


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.dictionaries(st.text(), JSON, max_size=5), order=st.randoms(use_true_random=False))
def test_key_ignores_the_order_of_settings(values: dict[str, Any], order: random.Random) -> None:
    items = list(values.items())
    order.shuffle(items)
    assert make(values=values).key == make(values=dict(items)).key


def test_key_covers_name_settings_and_inputs() -> None:
    one, two = make(values={"seed": 1}), make(values={"seed": 2})
    keys = {
        make().key,
        one.key,
        two.key,
        make("other").key,
        make(values={"seed": True}).key,
        make(inputs=(one,)).key,
        make(inputs=(two,)).key,
        make(inputs=(one, two)).key,
        make(modules=(stages, json)).key,
    }
    assert len(keys) == 9


def test_key_of_a_deep_input_reaches_the_last_stage() -> None:
    def chain(seed: int) -> Stage:
        return make("index", inputs=(make("tokenizer", inputs=(make(values={"seed": seed}),)),))

    assert chain(0).key == chain(0).key != chain(1).key


def test_key_covers_library_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make().key
    monkeypatch.setattr(stages, "library_versions", lambda: {"python": "3.11", "torch": "0.0"})
    assert make().key != before
    assert set(stages._LIBRARIES) >= {"numpy", "torch", "transformers", "trl", "tokenizers", "numba"}


def test_key_covers_the_source_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "stage_source_one.py"
    source.write_text("x = 1\n")
    importlib.invalidate_caches()
    by_name = make(modules=("stage_source_one",)).key
    source.write_text("x = 22\n")
    assert make(modules=("stage_source_one",)).key != by_name
    source.write_text('"""About x."""\n\nx = 1  # one\n')
    assert make(modules=("stage_source_one",)).key == by_name


def test_an_edit_counts_only_once_the_module_is_reloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "stage_source_two.py"
    source.write_text("x = 1\n")
    importlib.invalidate_caches()
    module = importlib.import_module("stage_source_two")
    before = make(modules=(module,)).key
    source.write_text("x = 22\n")
    assert make(modules=(module,)).key == before, "the old code still runs, so the old key must stand"
    importlib.reload(module)
    assert module.x == 22
    assert make(modules=(module,)).key != before


def test_key_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from tracealign_lib.stages import Stage;"
        "print(Stage('w', {k: 1 for k in {'a', 'b', 'c', 'd'}}, print, ('json', 'ast')).key)"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "7")
    }
    assert len(keys) == 1


def test_settings_changed_after_construction_change_nothing() -> None:
    values = {"seed": 0}
    stage = make(values=values)
    values["seed"] = 9
    assert stage.key == make().key
    assert json.loads((stage.path() / "manifest.json").read_text())["settings"] == {"seed": 0}


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object(), b"raw"])
def test_settings_that_are_not_json_are_named(value: object) -> None:
    with pytest.raises(ParameterError, match="settings of stage world are not JSON"):
        make(values={"bad": value})


@pytest.mark.parametrize("name", ["", "Upper", "../up", "a b", "-a", "x" * 65])
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(ParameterError, match="name is malformed"):
        make(name)


@pytest.mark.parametrize("module", ["no_such_module_here", "no_such_package.module", "sys"])
def test_a_module_without_source_is_named(module: str) -> None:
    with pytest.raises(ParameterError, match=module):
        _ = make(modules=(module,)).key


# --- building


def test_path_builds_once_inputs_first_and_removes_scratch() -> None:
    order = []

    def build(name: str) -> Callable[[Path], None]:
        def inner(folder: Path) -> None:
            order.append(name)
            (folder / "scratch").mkdir()
            (folder / "scratch" / "checkpoint").write_text("x")
            fill(folder)

        return inner

    first = make("first", build=build("first"))
    second = make("second", build=build("second"), inputs=(first,))
    assert not second.is_cached()
    path = second.path()
    assert second.is_cached()
    assert order == ["first", "second"]
    assert (path / "part" / "numbers.txt").read_text() == "1 2 3"
    assert not (path / "scratch").exists()
    make("second", build=build("again"), inputs=(first,)).path()
    assert order == ["first", "second"]


def test_manifest_lists_every_file_with_size_and_hash() -> None:
    stage = make()
    manifest = json.loads((stage.path() / "manifest.json").read_text())
    sha256 = hashlib.sha256(b"1 2 3").hexdigest()
    assert manifest["files"] == [{"path": "part/numbers.txt", "size": 5, "sha256": sha256}]
    assert (manifest["name"], manifest["key"]) == ("world", stage.key)
    assert {"python", "torch"} <= set(manifest["versions"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_build_is_resumed_in_its_own_folder(error: type[BaseException]) -> None:
    seen = []

    def build(folder: Path) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        if len(seen) == 1:
            (folder / "scratch").mkdir()
            raise error("stop")
        fill(folder)

    stage = make(build=build)
    with pytest.raises(error):
        stage.path()
    assert not stage.is_cached()
    assert [entry.complete for entry in list_stages()] == [False]
    stage.path()
    assert seen == [[], ["scratch"]]
    assert [entry.complete for entry in list_stages()] == [True]


def write_own_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def test_a_build_may_not_write_the_manifest() -> None:
    with pytest.raises(CacheError, match=r"manifest\.json"):
        make(build=write_own_manifest).path()


RACE = """
import time
from pathlib import Path
from tracealign_lib.stages import Stage

def build(folder):
    with open({log!r}, "a") as file:
        file.write("built\\n")
    end = time.monotonic() + 30  # so that no process outlives a failed test for long
    while not Path({log!r} + ".go").exists() and time.monotonic() < end:
        time.sleep(0.02)
    (folder / "model.bin").write_bytes(b"0" * 1000)

print((Stage("model", {{"seed": 0}}, build, ("json",)).path() / "model.bin").stat().st_size)
"""


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} never appeared"
        time.sleep(0.02)


def test_processes_that_race_build_once_and_the_others_wait(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = RACE.format(log=str(log))
    builder = start(code)
    wait_for(log)
    others = [start(code), start(code)]
    for process in others:
        assert process.stderr is not None
        assert "waiting for it" in process.stderr.readline()
    Path(f"{log}.go").touch()
    for process in (builder, *others):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "1000\n"), err
    assert log.read_text() == "built\n"


def test_a_killed_build_frees_its_lock_and_leaves_its_files(tmp_path: Path) -> None:
    code = """
import time
from pathlib import Path
from tracealign_lib.stages import Stage

def build(folder):
    (folder / "scratch").mkdir(exist_ok=True)
    checkpoint = folder / "scratch" / "step"
    if checkpoint.exists():
        (folder / "model").write_text("resumed at " + checkpoint.read_text())
        return
    checkpoint.write_text("7")
    Path({started!r}).touch()
    time.sleep(600)

print((Stage("model", {{}}, build, ("json",)).path() / "model").read_text())
""".format(started=str(tmp_path / "started"))
    first = start(code)
    wait_for(tmp_path / "started")
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=30)
    assert [entry.complete for entry in list_stages()] == [False]
    second = start(code)
    out, err = second.communicate(timeout=60)
    assert out == "resumed at 7\n", err
    assert "waiting" not in err
    assert [(entry.name, entry.complete) for entry in list_stages()] == [("model", True)]


def test_a_manifest_left_by_a_kill_before_the_rename_proves_nothing(root: Path) -> None:
    stage = make()
    partial = root / f"world-{stage.key[:16]}.partial"
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text("{}")
    assert json.loads((stage.path() / "manifest.json").read_text())["key"] == stage.key


# --- damage and bad disks


def truncate(path: Path) -> None:
    (path / "part" / "numbers.txt").write_text("1")


def remove(path: Path) -> None:
    (path / "part" / "numbers.txt").unlink()


def break_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"magic": ')


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def edit_manifest(**change: object) -> Callable[[Path], None]:
    def inner(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | change))

    return inner


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        (truncate, "numbers.txt: 1 bytes"),
        (remove, "numbers.txt: missing"),
        (break_manifest, "manifest.json"),
        (no_manifest, "manifest.json"),
        (edit_manifest(key="0" * 64), "manifest.json"),
        (edit_manifest(version=99), "manifest.json"),
        (edit_manifest(files=[{"path": 3}]), "no list of files"),
        (edit_manifest(files=None), "no list of files"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json"),
    ],
)
def test_damage_names_the_file_and_the_mend(damage: Callable[[Path], object], culprit: str) -> None:
    damage(make().path())
    with pytest.raises(CacheError) as caught:
        make().path()
    assert culprit in str(caught.value)
    assert "`tracealign cache clear world`" in str(caught.value)
    clear("world")
    make().path()


def test_a_file_in_place_of_the_cache_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("TRACEALIGN_CACHE", str(place))
        with pytest.raises(CacheError, match="TRACEALIGN_CACHE"):
            make().path()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_root_serves_what_it_holds_and_names_the_variable(root: Path) -> None:
    make().path()
    root.chmod(0o555)
    try:
        make().path()
        with pytest.raises(CacheError, match="TRACEALIGN_CACHE"):
            make("new").path()
    finally:
        root.chmod(0o755)


def test_a_read_only_root_is_named_for_every_user(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    held = make()
    held.path()
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert held.path().is_dir(), "a stage that is there needs no write"
    with pytest.raises(CacheError, match="TRACEALIGN_CACHE"):
        make("new").path()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_names_the_variable() -> None:
    def build(folder: Path) -> None:
        Path("/dev/full").write_text("x")

    with pytest.raises(CacheError, match="TRACEALIGN_CACHE"):
        make(build=build).path()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_every_refusal_of_the_disk_names_the_variable(number: int) -> None:
    def build(folder: Path) -> None:
        raise OSError(number, "refused")

    with pytest.raises(CacheError, match="TRACEALIGN_CACHE"):
        make(build=build).path()


def test_a_full_disk_told_in_words_only_names_the_variable() -> None:
    def build(folder: Path) -> None:
        try:
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        except RuntimeError as error:
            raise ValueError("cannot save") from error

    with pytest.raises(CacheError, match="TRACEALIGN_CACHE"):
        make(build=build).path()


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "missing", "corpus.txt"), PermissionError(13, "no", "/elsewhere/x")]
)
def test_an_error_of_the_build_itself_is_not_blamed_on_the_cache(error: OSError) -> None:
    def build(folder: Path) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        make(build=build).path()
    assert caught.value is error


# --- housekeeping


def test_list_size_and_clear(root: Path) -> None:
    assert list_stages() == []
    make().path()
    make("index").path()
    make("index", values={"seed": 1}).path()
    (root / "notes.txt").write_text("mine")
    assert [entry.name for entry in list_stages()] == ["index", "index", "world"]
    assert cache_size() == sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) - len("mine")
    assert len(clear("index")) == 2
    assert [entry.name for entry in list_stages()] == ["world"]
    assert [entry.name for entry in clear()] == ["world"]
    assert cache_size() == 0
    assert (root / "notes.txt").exists()


def test_clear_of_an_unknown_name_lists_the_known_ones() -> None:
    make().path()
    with pytest.raises(ParameterError, match="one of world"):
        clear("wrold")


def test_clear_leaves_a_stage_that_is_being_built(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(RACE.format(log=str(log)))
    wait_for(log)
    try:
        with pytest.raises(CacheError, match="Another process is building"):
            clear()
        assert [entry.complete for entry in list_stages()] == [False]
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_cache_root_defaults_to_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACEALIGN_CACHE")
    assert cache_root().name == "tracealign"
