"""The `tracealign` command: run the book, trace a text, publish results, look after the cache.

Libraries that take seconds to import are imported by the command that needs them, so that
`tracealign --help` answers at once.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tracealign_lib import __version__, cli_generate, cli_index, cli_shield, cli_trace
from tracealign_lib.errors import ParameterError, TraceAlignError
from tracealign_lib.experiments import EXPERIMENTS

_KEPT = "stages that were finished stay in the cache, and an unfinished one goes on where it stopped"


class _Commands(TyperGroup):
    """Commands whose expected errors end in a message and an exit status, never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TraceAlignError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            kept = "; ".join([*map(str, error.args), _KEPT])
            print(f"Interrupted: {kept}.", file=sys.stderr)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Commands,
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
for command in (cli_trace.trace, cli_shield.shield, cli_generate.generate):
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
def evaluate(
    file: Annotated[Path, typer.Argument(help="Answers, one JSON line each; an unfinished file goes on.")],
    prompts: Annotated[
        int | None, typer.Option(help="Prompts for each system of the main table; the profile's by default.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes that share the work.")] = 1,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop damaged lines of the file and ask again.")
    ] = False,
    profile: Profile = "laptop",
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Put the benchmark to every combination of defences.

    A run that was killed goes on with the same file, and ends with the same bytes.

    \b
    Examples:
      tracealign evaluate answers.jsonl
      tracealign evaluate all.jsonl --prompts 7750 --processes 2
    """
    from tracealign_lib.experiments.evaluation import evaluate_book

    table = evaluate_book(profile, seed, device, file, prompts=prompts, processes=processes, repair=repair)
    print(table.to_string(index=False))
    print(f"Every answer is in {file}.")


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
    """Write the Alignment Drift Benchmark of a laptop world, with its card.

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
    """Count the paper's claims by status, and check the page about them.

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
def info() -> None:
    """Show versions, device, cache folder and profiles.

    \b
    Example:
      tracealign info
    """
    from tracealign_lib.lm import resolve_device
    from tracealign_lib.profiles import PROFILES
    from tracealign_lib.stages import cache_root, cache_size, library_versions

    print(f"tracealign {__version__}")
    for library, version in library_versions().items():
        print(f"{library} {version}")
    print(f"device: {resolve_device('auto')}")
    print(f"cache: {cache_root()} ({_megabytes(cache_size())})")
    print("profiles:")
    for profile in PROFILES.values():
        seeds = ", ".join(map(str, profile.seeds))
        model = f"model {profile.model.layers} layers of {profile.model.hidden}"
        print(f"  {profile.name}: {profile.world.unsafe} unsafe items, {model}, seeds {seeds}")


@cache.command("list")
def cache_list() -> None:
    """List the stages in the cache.

    \b
    Example:
      tracealign cache list
    """
    from tracealign_lib.stages import cache_root, list_stages

    entries = list_stages()
    for entry in entries:
        state = "complete" if entry.complete else "unfinished"
        print(f"{entry.name:<24} {entry.key}  {_megabytes(entry.size):>12}  {state}")
    total = _megabytes(sum(entry.size for entry in entries))
    print(f"{_stages(len(entries))}, {total}, in {cache_root()}")


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


def _stages(count: int) -> str:
    return "1 stage" if count == 1 else f"{count} stages"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
