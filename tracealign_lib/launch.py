"""Several processes that train one model, as `accelerate launch` or `torchrun` starts them.

They run the same program, each on a GPU or on cores of its own. The launcher tells each one who it is in
environment variables; the one of rank 0 is the main one. It writes what is written once, and the others
wait for it. Where nobody launched anything, there is one process, it is the main one, and nothing waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

from tracealign_lib.errors import ParameterError

_WHO = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# The main process may wait for the lock of a stage for as long as another launch trains it.
_PATIENCE = timedelta(days=30)


def processes() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _WHO) else 1


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return processes() == 1 or int(os.environ["RANK"]) == 0


def share(batch: int, device: str) -> int:
    """The rows of a batch that each process takes, so that all together take `batch`.

    Parameters
    ----------
    device:
        "cpu" or "cuda", where they train.

    Raises
    ------
    ParameterError
        The batch cannot be divided by the number of processes, or there is not one GPU for each of them.
    """
    count = processes()
    if batch % count:
        fitting = [number for number in range(1, batch + 1) if batch % number == 0]
        raise ParameterError(
            "The processes cannot take equal shares of a batch.",
            given=f"{count} processes for a batch of {batch} rows",
            expected=" or ".join(map(str, fitting)) + " processes",
            mend="start another number, with --num_processes of accelerate launch",
        )
    if device == "cuda":
        _check_gpus()
    return batch // count


def _check_gpus() -> None:
    """transformers would give each GPU of one process a whole batch, and trl's DPO refuses to."""
    import torch

    number = torch.cuda.device_count()
    if processes() == 1 and number > 1:
        raise ParameterError(
            "One process cannot train on several GPUs.",
            given=f"{number} GPUs for one process",
            expected="one GPU for each process",
            mend="set CUDA_VISIBLE_DEVICES=0, or start several processes: "
            f"accelerate launch --num_processes {number} -m tracealign_lib train ...",
        )
    if processes() > 1 and int(os.environ["LOCAL_RANK"]) >= number:
        raise ParameterError(
            "There are more processes than GPUs.",
            given=f"{number} GPUs on this machine",
            expected="one GPU for each process",
            mend=f"start no more than {number} here, with --num_processes of accelerate launch",
        )


def agreed(value: bool) -> bool:
    """What the main process says, in every process: each may have looked at another moment."""
    if processes() == 1:
        return value
    import torch

    said = torch.tensor([int(value)])
    torch.distributed.broadcast(said, src=0, group=_group())
    return bool(said.item())


def once(action: Callable[[], None]) -> None:
    """Let the main process act when all have come here; all go on when it has."""
    _meet()
    if is_main():
        action()
    _meet()


@contextmanager
def alone() -> Iterator[None]:
    """Work as if this process were the only one: what it builds or trains waits for no other."""
    kept = {name: os.environ.pop(name) for name in _WHO if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def leave() -> None:
    """Part from the others, when there is nothing more to do together."""
    if processes() > 1:
        import torch

        _group.cache_clear()
        torch.distributed.destroy_process_group()


def _meet() -> None:
    if processes() > 1:
        import torch

        torch.distributed.barrier(group=_group())


@lru_cache(maxsize=1)
def _group() -> Any:
    """All processes, for messages that may take long to come; trainers keep their own, shorter patience."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # where "cuda" is, in this process
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
