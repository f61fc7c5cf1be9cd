"""Shards of an index on a Ray cluster: built by its tasks, searched by its actors.

The folder of the index must lie where every machine of the cluster can read it. Ray belongs to the extra
`scale`; `ray.init(address=...)` decides beforehand which cluster is used, else one of this machine is.

>>> with RayWorkers(4) as workers:
...     ShardedIndex.build(documents, tokenizer, "corpus.index", workers=workers)
>>> index = ShardedIndex.open("corpus.index", shards=RayShards)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from tracealign_lib.engine import EngineError
from tracealign_lib.queries import check_integer
from tracealign_lib.sharded import Shard


class RayShards:
    """One actor for each shard, which opens it and answers for it.

    Raises
    ------
    EngineError
        Ray is not installed.
    IndexFormatError
        A shard is damaged, or its folder does not lie on the machine of the actor.
    """

    def __init__(self, paths: Sequence[Path], verify: str = "manifest") -> None:
        self._ray = _ray()
        actor = self._ray.remote(_Worker)
        self._actors = [actor.remote(str(path.resolve()), verify) for path in paths]
        self.ask("sizes")  # a shard that cannot be opened is told at once

    def __len__(self) -> int:
        return len(self._actors)

    def ask(self, question: str, *arguments: Any) -> list[Any]:
        """The answers of all shards, in order; they are looked for at the same time."""
        shared = [self._ray.put(argument) for argument in arguments]
        found: list[Any] = self._call([actor.ask.remote(question, *shared) for actor in self._actors])
        return found

    def _call(self, promises: list[Any]) -> Any:
        try:
            return self._ray.get(promises)
        except self._ray.exceptions.RayActorError as error:
            cause = getattr(error, "cause", None)
            raise EngineError(
                "A worker of the Ray cluster has stopped.",
                given=str(cause or error).strip()[:300],
                expected=f"{len(self)} workers, each with its shard",
                mend="look into the state of the cluster (ray status), and open the index again",
            ) from error

    def close(self) -> None:
        """Let the actors go."""
        for actor in self._actors:
            self._ray.kill(actor)


class _Worker:
    """Opens its shard when it is first asked: an error there reaches who asks, one in `__init__` kills it."""

    def __init__(self, path: str, verify: str) -> None:
        self._place = path, verify

    @cached_property
    def _shard(self) -> Shard:
        return Shard(*self._place)

    def ask(self, question: str, *arguments: Any) -> Any:
        return getattr(self._shard, question)(*arguments)


class RayWorkers:
    """Builds shards in tasks of a Ray cluster: the `workers` of `ShardedIndex.build`.

    Parameters
    ----------
    in_flight:
        How many shards are built at the same time; each holds its texts in memory.
    """

    def __init__(self, in_flight: int = 2) -> None:
        self.in_flight = check_integer(in_flight, "in_flight")
        self._ray = _ray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Tasks end with the build; the cluster is left as it was."""

    def submit(self, build: Callable[..., None], /, *arguments: Any) -> _Promise:
        """Start `build(*arguments)` somewhere in the cluster."""
        return _Promise(self._ray, self._ray.remote(build).remote(*arguments))


class _Promise:
    def __init__(self, ray: ModuleType, promise: Any) -> None:
        self._ray, self._promise = ray, promise

    def result(self) -> Any:
        return self._ray.get(self._promise)


def _ray() -> ModuleType:
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise EngineError(
            "Ray is not installed.",
            given=str(error),
            expected="the package ray",
            mend="in the book's folder: pip install -e '.[scale]'",
        ) from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return ray
