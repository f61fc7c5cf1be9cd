"""The `tracealign` command: run the book, trace a text, publish results, look after the cache.

Libraries that take seconds to import are imported by the command that needs them, so that
`tracealign --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tracealign_lib import (
    __version__,
    cli_evaluate,
    cli_generate,
    cli_index,
    cli_shield,
    cli_trace,
    cli_train,
)
from tracealign_lib.cli_input import Json
from tracealign_lib.cli_status import Commands
from tracealign_lib.errors import ParameterError
from tracealign_lib.experiments import EXPERIMENTS

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
cache = typer.Typer(
    cls=TyperGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show or empty the cache of trained models and indexes.",
)
app.add_typer(cli_index.app, name="index")
app.add_typer(cache, name="cache")
for command in (
    cli_trace.trace,
    cli_shield.shield,
    cli_generate.generate,
    cli_evaluate.evaluate,
    cli_train.train,
):
    app.command()(command)

Profile = Annotated[str, typer.Option(help="Size of world and model: smoke, laptop, full or gpu.")]
Seed = Annotated[int, typer.Option(help="Seed of the world and of all training.")]
Device = Annotated[str, typer.Option(help="Where models run: auto, cpu or cuda.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tracealign {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """TraceAlign, executed: trace, score and stop reactivated training spans."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack what a text holds


@app.command()
def run(
    chapters: Annotated[
        list[str] | None, typer.Argument(help="Chapters, by name or a unique beginning; all by default.")
    ] = None,
    profile: Profile = "laptop",
    seed: Seed = 0,
    device: Device = "auto",
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another parameter; repeatable.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the executed book.")] = Path("_build/source"),
    store: Annotated[bool, typer.Option("--store", help="Also store outputs in the notebooks.")] = False,
) -> None:
    """Execute the chapters of the book.

    \b
    Examples:
      tracealign run                          the whole book
      tracealign run --profile smoke          the same in minutes; its numbers mean nothing
      tracealign run 03 --set min_length=6    one chapter, with another parameter
    """
    from rich.console import Console

    from tracealign_lib.run import parse_parameters, run_book, run_table

    parameters = parse_parameters(assignments or [], chapters)
    runs = run_book(
        chapters,
        profile=profile,
        seed=seed,
        device=device,
        parameters=parameters,
        output=output,
        store=store,
    )
    Console().print(run_table(runs))
    print(f"The executed book is in {output}; jupyter-book build {output} --path-output . renders it.")
    if any(chapter.status == "failed" for chapter in runs):
        raise typer.Exit(1)


@app.command()
def publish(
    name: Annotated[str, typer.Argument(help="Name of the results, a file of data/results/.")],
    device: Device = "auto",
) -> None:
    """Measure published results again and write them to data/results/.

    \b
    Example:
      tracealign publish traceindex
    """
    if name not in EXPERIMENTS:
        raise ParameterError(
            "No results have this name.",
            given=name,
            expected="one of " + ", ".join(sorted(EXPERIMENTS)),
            mend="check the spelling",
        )
    resolve_name(EXPERIMENTS[name])(device)


@app.command()
def adb(
    folder: Annotated[Path, typer.Argument(help="A new folder, or one that holds an older benchmark.")],
    size: Annotated[int, typer.Option(help="Number of adversarial prompts.")] = 5200,
    seed: Seed = 0,
) -> None:
    """Write the Alignment Drift Benchmark, with its card.

    It asks about the world of the laptop profile.

    \b
    Examples:
      tracealign adb my-adb
      tracealign adb small-adb --size 520 --seed 1
    """
    from tracealign_lib.adb_card import write_adb

    benchmark = write_adb(folder, size=size, seed=seed)
    print(f"{len(benchmark):,} prompts are in {folder}; its README.md says how to load them.")


@app.command()
def claims(
    write: Annotated[bool, typer.Option("--write", help="Write book/claims.md first.")] = False,
) -> None:
    """Count the paper's claims by status, and check their page.

    \b
    Examples:
      tracealign claims
      tracealign claims --write
    """
    from tracealign_lib.claims import check_page, find, load_claims, summary, write_page

    for status, count in summary(find(load_claims())).items():
        print(f"{count:>4}  {status}")
    if write:
        write_page()
    check_page()


@app.command()
def info(as_json: Json = False) -> None:
    """Show versions, device, cache folder and profiles.

    With --json, the keys are tracealign, libraries, device, cache (path, bytes) and profiles.

    \b
    Examples:
      tracealign info
      tracealign info --json
    """
    from tracealign_lib.lm import resolve_device
    from tracealign_lib.profiles import PROFILES
    from tracealign_lib.stages import cache_root, cache_size, library_versions

    libraries, device, size = library_versions(), resolve_device("auto"), cache_size()
    profiles: dict[str, dict[str, Any]] = {
        name: {"unsafe": p.world.unsafe, "layers": p.model.layers, "hidden": p.model.hidden, "seeds": p.seeds}
        for name, p in PROFILES.items()
    }
    if as_json:
        cached = {"path": str(cache_root()), "bytes": size}
        found = {"libraries": libraries, "device": device, "cache": cached, "profiles": profiles}
        _print_json("info", {"tracealign": __version__, **found})
        return
    for library, version in {"tracealign": __version__, **libraries}.items():
        print(f"{library} {version}")
    print(f"device: {device}")
    print(f"cache: {cache_root()} ({_megabytes(size)})")
    print("profiles:")
    for name, profile in profiles.items():
        seeds = ", ".join(map(str, profile["seeds"]))
        model = f"model {profile['layers']} layers of {profile['hidden']}"
        print(f"  {name}: {profile['unsafe']} unsafe items, {model}, seeds {seeds}")


@cache.command("list")
def cache_list(as_json: Json = False) -> None:
    """List the stages in the cache.

    With --json, the keys are path, bytes, and stages: each with name, key, bytes and complete.

    \b
    Examples:
      tracealign cache list
      tracealign cache list --json
    """
    from tracealign_lib.stages import cache_root, list_stages

    entries = list_stages()
    size = sum(entry.size for entry in entries)
    if as_json:
        stages = [{"name": e.name, "key": e.key, "bytes": e.size, "complete": e.complete} for e in entries]
        _print_json("cache", {"path": str(cache_root()), "bytes": size, "stages": stages})
        return
    for entry in entries:
        state = "complete" if entry.complete else "unfinished"
        print(f"{entry.name:<24} {entry.key}  {_megabytes(entry.size):>12}  {state}")
    print(f"{_stages(len(entries))}, {_megabytes(size)}, in {cache_root()}")


@cache.command("clear")
def cache_clear(
    name: Annotated[str | None, typer.Argument(help="Only the stages of this name.")] = None,
) -> None:
    """Remove stages; they are built again when needed.

    \b
    Examples:
      tracealign cache clear
      tracealign cache clear index
    """
    from tracealign_lib.stages import clear

    removed = clear(name)
    print(f"Removed {_stages(len(removed))}, {_megabytes(sum(entry.size for entry in removed))}.")


@cache.command("path")
def cache_path() -> None:
    """Print the folder; TRACEALIGN_CACHE chooses another.

    \b
    Example:
      du -sh "$(tracealign cache path)"
    """
    from tracealign_lib.stages import cache_root

    print(cache_root())


def _print_json(kind: str, found: Mapping[str, Any]) -> None:
    print(json.dumps({"format": f"tracealign.{kind}", "version": 1, **found}))


def _stages(count: int) -> str:
    return "1 stage" if count == 1 else f"{count} stages"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
