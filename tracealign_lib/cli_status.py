"""How commands end: what errors and interruptions become, and the exit status that a script can rely on."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from tracealign_lib.errors import TraceAlignError

_KEPT = "stages that were finished stay in the cache, and an unfinished one goes on where it stopped"
_STAGED = ("run", "train", "trace", "evaluate", "publish")
"""Commands that may build stages."""


class Commands(TyperGroup):
    """Commands whose expected errors end in a message and an exit status, never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except TraceAlignError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(2) from error
        except BrokenPipeError as error:  # whoever read the output has seen enough
            _drop_output()
            raise typer.Exit(128 + signal.SIGPIPE) from error
        except OSError as error:  # Python's own status for it is 1, which means something else here
            _drop_output()
            print(f"The system refused to read or write: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            kept = [*map(str, error.args), *([_KEPT] if ctx.invoked_subcommand in _STAGED else [])]
            raise interrupted("; ".join(kept)) from error
        return result


def _drop_output() -> None:
    """Give up output that cannot be written: Python would try once more at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def interrupted(left: str) -> typer.Exit:
    """Says what an interrupted command leaves; to be raised, for exit status 130."""
    print(f"Interrupted: {left}." if left else "Interrupted.", file=sys.stderr)
    return typer.Exit(130)
