"""The command: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tracealign_lib import __version__, cli
from tracealign_lib.experiments import EXPERIMENTS
from tracealign_lib.run import ChapterRun
from tracealign_lib.stages import Stage

runner = CliRunner()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACEALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def commands() -> dict[str, click.Command]:
    """Every command by its words, such as "cache list"."""
    found: dict[str, click.Command] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            found[" ".join((*words, name))] = inner
            walk(inner, (*words, name))

    walk(get_command(cli.app), ())
    return found


def test_all_commands_are_there() -> None:
    assert set(commands()) == {
        "run", "trace", "shield", "generate", "evaluate", "train", "publish", "adb", "claims", "info",
        "index", "index build", "index info", "index verify",
        "cache", "cache list", "cache clear", "cache path",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(commands()) - {"cache", "index"}))
def test_help_has_a_purpose_and_an_example(name: str) -> None:
    done = runner.invoke(cli.app, [*name.split(), "--help"])
    assert done.exit_code == 0
    purpose = done.stdout.split("\n\n")[1].strip()
    assert purpose.endswith(".")
    assert "\n" not in purpose
    assert "Example" in done.stdout
    assert f"tracealign {name}" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("group", [[], ["index"], ["cache"]])
def test_every_purpose_fits_the_list_of_commands(group: list[str]) -> None:
    listed = runner.invoke(cli.app, [*group, "--help"], env={"COLUMNS": "80"}).stdout
    assert "..." not in listed.split("Commands:")[1]


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from tracealign_lib.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'numpy', 'pandas', 'scipy', 'papermill', 'nbformat'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    assert runner.invoke(cli.app, ["--version"]).stdout == f"tracealign {__version__}\n"


# --- errors


def test_an_expected_error_is_a_message_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tracealign_lib.cli import app; app()", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("This is not a folder of the book.\n  given:")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache", "clear", "nothing"], "no stage of that name"),
        (["trace", "x", "--index", "no-such-folder"], "no-such-folder"),
        (["trace", "x", "--profile", "huge"], "Unknown profile"),
    ],
)
def test_errors_of_every_command_have_status_2(arguments: list[str], message: str) -> None:
    done = runner.invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "to mend:" in done.stderr
    assert done.stdout == ""


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("tracealign_lib.stages.cache_root", fail)
    assert isinstance(runner.invoke(cli.app, ["cache", "path"]).exception, ZeroDivisionError)


def test_interrupt_has_status_130_and_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("2 of 4 chapters were finished")

    monkeypatch.setattr("tracealign_lib.run.run_book", interrupt)
    monkeypatch.setattr("tracealign_lib.run.parse_parameters", lambda *_: {})
    done = runner.invoke(cli.app, ["run"])
    assert done.exit_code == 130
    assert done.stderr.startswith("Interrupted: 2 of 4 chapters were finished; ")
    assert "stay in the cache" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupt_promises_only_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tracealign_lib.stages.cache_root", interrupt)
    done = runner.invoke(cli.app, ["cache", "path"])
    assert (done.exit_code, done.stderr) == (130, "Interrupted.\n")


@pytest.fixture(params=["", "1"])
def buffering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)


@pytest.mark.usefixtures("buffering")
def test_a_pipe_that_closes_early_ends_the_command_in_silence() -> None:
    command = [sys.executable, "-c", "from tracealign_lib.cli import app; app()", "cache", "path"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


@pytest.mark.usefixtures("buffering")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_output_that_cannot_be_written_is_an_error() -> None:
    command = [sys.executable, "-c", "from tracealign_lib.cli import app; app()", "cache", "path"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "The system refused to read or write: [Errno 28] No space left on device\n"


# --- run


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("failed", 1)])
def test_run_passes_its_options_on_and_tells_of_failures(
    monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    calls: list[Any] = []

    def run_book(chapters: Any, **options: Any) -> list[ChapterRun]:
        calls.append((chapters, options))
        return [ChapterRun("00-first", 1.0, "done"), ChapterRun("03-traceindex", 2.0, status)]

    monkeypatch.setattr("tracealign_lib.run.run_book", run_book)
    monkeypatch.setattr("tracealign_lib.run.parse_parameters", lambda texts, _: {"parsed": texts})
    arguments = "run 00 03 --profile smoke --seed 4 --device cpu --set a=1 --set b=2 --output out --store"
    done = runner.invoke(cli.app, arguments.split())
    assert done.exit_code == code, done.output
    assert calls == [
        (
            ["00", "03"],
            {
                "profile": "smoke",
                "seed": 4,
                "device": "cpu",
                "parameters": {"parsed": ["a=1", "b=2"]},
                "output": Path("out"),
                "store": True,
            },
        )
    ]
    assert "03-traceindex" in done.stdout
    assert "3.0" in done.stdout
    assert "\x1b" not in done.stdout


# --- publish, cache, info


def test_publish_runs_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr("tracealign_lib.experiments.model.publish_model", ran.append)
    assert runner.invoke(cli.app, ["publish", "model", "--device", "cpu"]).exit_code == 0
    assert ran == ["cpu"]
    done = runner.invoke(cli.app, ["publish", "modle"])
    assert done.exit_code == 2
    assert f"one of {', '.join(sorted(EXPERIMENTS))}" in done.stderr


def test_adb_writes_a_benchmark_and_spares_other_folders(tmp_path: Path) -> None:
    done = runner.invoke(cli.app, ["adb", str(tmp_path / "adb"), "--size", "520"])
    assert done.exit_code == 0
    assert (tmp_path / "adb" / "README.md").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine", encoding="utf-8")
    done = runner.invoke(cli.app, ["adb", str(tmp_path / "mine"), "--size", "520"])
    assert done.exit_code == 2
    assert (tmp_path / "mine" / "README.md").read_text(encoding="utf-8") == "mine"


def test_cache_commands(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "x").write_bytes(b"0" * 3_000_000)

    assert runner.invoke(cli.app, ["cache", "path"]).stdout == f"{cache}\n"
    stage = Stage("world", {}, build, ("json",))
    stage.path()
    listed = runner.invoke(cli.app, ["cache", "list"]).stdout.splitlines()
    assert listed[0].split() == ["world", stage.key[:16], "3.0", "MB", "complete"]
    assert listed[1] == f"1 stage, 3.0 MB, in {cache}"
    assert runner.invoke(cli.app, ["cache", "clear", "world"]).stdout == "Removed 1 stage, 3.0 MB.\n"
    assert not stage.is_cached()
    assert runner.invoke(cli.app, ["cache", "clear"]).stdout == "Removed 0 stages, 0.0 MB.\n"


def test_json_of_cache_and_info_has_a_fixed_schema(cache: Path) -> None:
    stage = Stage(
        "world", {}, lambda folder: (folder / "x").write_bytes(b"0" * 3_000_000) and None, ("json",)
    )
    stage.path()
    listed = json.loads(runner.invoke(cli.app, ["cache", "list", "--json"]).stdout)
    size = listed["bytes"]
    assert size >= 3_000_000
    assert listed == {
        "format": "tracealign.cache",
        "version": 1,
        "path": str(cache),
        "bytes": size,
        "stages": [{"name": "world", "key": stage.key[:16], "bytes": size, "complete": True}],
    }
    info = json.loads(runner.invoke(cli.app, ["info", "--json"]).stdout)
    assert list(info) == ["format", "version", "tracealign", "libraries", "device", "cache", "profiles"]
    assert (info["format"], info["version"], info["tracealign"]) == ("tracealign.info", 1, __version__)
    assert info["cache"] == {"path": str(cache), "bytes": size}
    assert info["profiles"]["smoke"] == {"unsafe": 10, "layers": 2, "hidden": 32, "seeds": [0]}


def test_info_shows_versions_device_cache_and_profiles(cache: Path) -> None:
    done = runner.invoke(cli.app, ["info"])
    assert done.exit_code == 0, done.output
    for part in (
        f"tracealign {__version__}",
        "torch 2",
        "device: ",
        f"cache: {cache}",
        "  smoke: ",
        "  gpu: ",
    ):
        assert part in done.stdout


def test_the_console_command_is_this_one() -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="tracealign")
    assert entry.load() is cli.app
