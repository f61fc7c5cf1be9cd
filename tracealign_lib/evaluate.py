"""Put a benchmark to many guarded models, and never lose an answer.

An evaluation is a list of *arms*: a model, perhaps trained with a defence, a way to decode, and perhaps a
guard that acts while it decodes. What filters do to finished answers costs no generation, so they are applied
afterwards (`judged`).

Answers go into one JSON Lines file: a header that says what was asked of whom, then a line for each answer,
appended batch by batch. A run that was killed goes on from there. Which records share a batch, and the seed
of its draws, follow from the plan alone, so an answer does not depend on what was answered before a kill; and
when all are there, the file is put into the order of the plan. So it ends with the same bytes, however often
it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout

from tracealign_lib import __version__, adb
from tracealign_lib.adb import Outcome
from tracealign_lib.benchmark import ADB, Record
from tracealign_lib.errors import ParameterError, ResultsError
from tracealign_lib.files import write_atomically
from tracealign_lib.lm import LanguageModel
from tracealign_lib.progress import progress
from tracealign_lib.shield import CompletionFilter
from tracealign_lib.stages import library_versions
from tracealign_lib.world import World

NONE = "none"
FORMAT, FORMAT_VERSION = "tracealign-answers", 1
METHODS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "sampling": {"temperature": adb.SAMPLING_TEMPERATURE},
    "beams": {"num_beams": 4},
}
"""Ways to decode: arguments of `LanguageModel.generate`."""


class Arm(NamedTuple):
    """One way of answering; all four are names.

    Attributes
    ----------
    model:
        How the model was aligned.
    training:
        Which defence it was trained with; with `model`, a key of `Parts.models`.
    decoding:
        A key of `METHODS`. A record that asks for the worst of several draws is always sampled, and asked of
        greedy arms only.
    guard:
        What acts while decoding: a key of `Parts.guards`, or "none".
    """

    model: str
    training: str = NONE
    decoding: str = "greedy"
    guard: str = NONE


class Guard(Protocol):
    """What acts while a model decodes, such as `ProvDecode` and `ExpertMixing`."""

    def guarding(self, model: LanguageModel) -> AbstractContextManager[LanguageModel]:
        """Whatever `model` generates within the block is guarded."""
        ...


@dataclass(frozen=True)
class Parts:
    """What the names of an `Arm` stand for.

    Parameters
    ----------
    models:
        (model, training) -> a function that loads it, so that only one has to be in memory.
    guards:
        Name -> a function that makes the guard.
    settings:
        Whatever tells these parts from others of the same names (JSON). It is written into the file's header,
        and a file with other settings is not gone on with.
    """

    models: Mapping[tuple[str, str], Callable[[], LanguageModel]]
    guards: Mapping[str, Callable[[], Guard]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


Plan = Mapping[Arm, ADB]
"""Which records are put to which arm. Arms may be asked samples of different sizes."""


@dataclass(frozen=True)
class Evaluation:
    """Every answer of a complete evaluation.

    Attributes
    ----------
    plan:
        What was asked.
    answers:
        Arm and record id -> the completions, one for each draw that the record asks for.
    """

    plan: Plan
    answers: Mapping[tuple[Arm, str], tuple[str, ...]]

    def judged(
        self, arm: Arm, world: World, filter: CompletionFilter[Any] | None = None, refusal: str = ""
    ) -> list[Outcome]:
        """The outcome of each record: of several draws the first that drifts, or else the first.

        Parameters
        ----------
        filter, refusal:
            A filter of completions, and what stands in the place of what it refuses.
        """
        records = asked(arm, self.plan[arm])
        texts = {text for record in records for text in self.answers[arm, record.id]}
        refused = _refused(filter, texts) if filter is not None else frozenset()
        outcomes = []
        for record in records:
            prompt = record.prompt()
            draws = [refusal if t in refused else t for t in self.answers[arm, record.id]]
            judged = [Outcome(prompt, text, adb.judge(world, prompt, text)) for text in draws]
            outcomes.append(next((outcome for outcome in judged if outcome.drifted), judged[0]))
        return outcomes


def _refused(rule: CompletionFilter[Any], texts: Iterable[str]) -> frozenset[str]:
    distinct = sorted(texts)
    return frozenset(t for t, v in zip(distinct, rule.check_many(distinct), strict=True) if v.refused)


# --- asking --------------------------------------------------------------------------------------


def evaluate(
    parts: Parts | Callable[[], Parts],
    plan: Plan,
    file: Path | str,
    *,
    seed: int = 0,
    batch_size: int = 128,
    max_new_tokens: int = 56,
    processes: int = 1,
    repair: bool = False,
) -> Evaluation:
    """Put every record of the plan to its arm, write the answers into `file`, and return them.

    Where `file` holds answers of the same evaluation, only the missing ones are generated.

    Parameters
    ----------
    parts:
        What the names in the plan stand for. With several processes, a function that makes it, which can be
        pickled (a module's function, or a partial of one): each process makes its own.
    seed:
        Decides every draw.
    batch_size:
        Rows that are generated together; a row is one draw.
    repair:
        Move lines that cannot be read into `<file>.rejected`, and ask again for what they held, instead of an
        error. A last line that was cut short by a kill is always dropped.

    Raises
    ------
    ParameterError
        The plan is empty, names an unknown part, mixes worlds, or a number is out of range.
    ResultsError
        `file` is of another version or evaluation, holds a malformed line, or is being written by another
        process. Nothing in it is changed then.
    """
    made = parts() if callable(parts) else parts
    _check_plan(plan, made)
    _check_numbers(batch_size=batch_size, max_new_tokens=max_new_tokens, processes=processes)
    if processes > 1 and not callable(parts):
        raise ParameterError(
            "Several processes cannot share these parts.",
            given=type(parts).__name__,
            expected="a function that makes Parts",
            mend="pass one, or processes=1",
        )
    path = Path(file)
    header = _header(plan, made, seed=seed, batch_size=batch_size, max_new_tokens=max_new_tokens)
    with _alone(path):
        known = _resume(path, header, plan, repair=repair)
        tasks = [task for task in _tasks(plan, batch_size) if not task.places() <= known.keys()]
        job = _Job(seed, max_new_tokens)
        run = _in_processes(parts, tasks, job, processes) if processes > 1 else _in_turn(made, tasks, job)
        _collect(path, run, known, total=sum(len(task.records) for task in tasks))
        _compact(path, header, plan, known)
    return Evaluation(plan, known)


def _collect(
    path: Path,
    run: Iterable[dict[tuple[Arm, str], tuple[str, ...]]],
    known: dict[tuple[Arm, str], tuple[str, ...]],
    *,
    total: int,
) -> None:
    """Append each batch of answers to the file as it comes in."""
    with progress(description="Evaluating", total=total, unit="prompt") as bar, open(path, "ab") as file:
        for answers in run:
            new = {key: texts for key, texts in answers.items() if key not in known}
            file.write("".join(_line(*key, texts) for key, texts in new.items()).encode())
            file.flush()
            known.update(new)
            bar.update(len(answers))
        os.fsync(file.fileno())


class _Task(NamedTuple):
    """A batch: records that one arm answers together."""

    arm: Arm
    number: int
    records: tuple[Record, ...]

    def places(self) -> set[tuple[Arm, str]]:
        return {(self.arm, record.id) for record in self.records}


class _Job(NamedTuple):
    """What holds for every batch."""

    seed: int
    max_new_tokens: int


def asked(arm: Arm, benchmark: ADB) -> list[Record]:
    """The records that are put to an arm: the worst of several draws is asked of greedy arms only."""
    return [record for record in benchmark.records if arm.decoding == "greedy" or record.samples == 1]


def _tasks(plan: Plan, batch_size: int) -> list[_Task]:
    """Batches of whole records, of one kind of decoding and of similar length, in the order of the plan."""
    tasks = []
    for arm, benchmark in plan.items():
        records = sorted(
            asked(arm, benchmark), key=lambda r: (r.samples > 1, len(r.request) + len(r.prefill), r.id)
        )
        batch: list[Record] = []
        batches = []
        for record in records:
            rows = sum(r.samples for r in batch)
            other = bool(batch) and (batch[0].samples > 1) != (record.samples > 1)
            if batch and (other or rows + record.samples > batch_size):
                batches.append(batch)
                batch = []
            batch.append(record)
        batches += [batch] if batch else []
        tasks += [_Task(arm, number, tuple(records)) for number, records in enumerate(batches)]
    return tasks


def _in_turn(parts: Parts, tasks: Sequence[_Task], job: _Job) -> Iterator[Any]:
    open_arm = lru_cache(maxsize=1)(lambda arm: _open(parts, arm))
    for task in tasks:
        yield _answer(task, job, *open_arm(task.arm))


def _in_processes(
    make: Any, tasks: Sequence[_Task], job: _Job, processes: int
) -> Iterator[dict[tuple[Arm, str], tuple[str, ...]]]:
    context = get_context("spawn")  # a forked copy of a process with threads may hang
    with ProcessPoolExecutor(processes, context, initializer=_prepare, initargs=(make,)) as pool:
        for future in as_completed([pool.submit(_work, task, job) for task in tasks]):
            yield future.result()


_PARTS: list[Parts] = []  # of a worker process


def _prepare(make: Callable[[], Parts]) -> None:
    os.environ["TRACEALIGN_PROGRESS"] = "0"  # the parent shows the bar
    Thread(target=_end_with_parent, daemon=True).start()
    _PARTS.append(make())


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(task: _Task, job: _Job) -> dict[tuple[Arm, str], tuple[str, ...]]:
    return _answer(task, job, *_opened(task.arm))


@lru_cache(maxsize=1)
def _opened(arm: Arm) -> tuple[LanguageModel, Guard | None]:
    return _open(_PARTS[0], arm)


def _open(parts: Parts, arm: Arm) -> tuple[LanguageModel, Guard | None]:
    guard = parts.guards[arm.guard]() if arm.guard != NONE else None
    return parts.models[arm.model, arm.training](), guard


def _answer(
    task: _Task, job: _Job, model: LanguageModel, guard: Guard | None
) -> dict[tuple[Arm, str], tuple[str, ...]]:
    rows = [record for record in task.records for _ in range(record.samples)]
    method = METHODS["sampling" if task.records[0].samples > 1 else task.arm.decoding]
    place = f"{job.seed}/{'/'.join(task.arm)}/{task.number}"
    with guard.guarding(model) if guard is not None else nullcontext():
        texts = model.generate(
            [model.chat(record.request, prefill=record.prefill) for record in rows],
            max_new_tokens=job.max_new_tokens,
            batch_size=len(rows),
            seed=int.from_bytes(hashlib.sha256(place.encode()).digest()[:4]),
            **method,
        )
    answers: dict[tuple[Arm, str], tuple[str, ...]] = {}
    for record, text in zip(rows, texts, strict=True):
        key = (task.arm, record.id)
        answers[key] = (*answers.get(key, ()), text)
    return answers


# --- the file ------------------------------------------------------------------------------------

_LINE = {**dict.fromkeys(Arm._fields, str), "record": str, "completions": list}


def read_answers(file: Path | str, plan: Plan) -> Evaluation:
    """The answers in a complete file of `evaluate`.

    Raises
    ------
    ResultsError
        The file is missing, of another version, was made with another world, benchmark or plan, holds a
        malformed line, or fewer answers than its header says.
    """
    path = Path(file)
    header, lines = _read(path)
    _check_header(path, {key: header.get(key) for key in ("world", "adb", "arms")}, _asked(plan))
    known = _parse(path, lines, plan, repair=False)
    _check_complete(path, plan, known)
    return Evaluation(plan, known)


def _header(plan: Plan, parts: Parts, **settings: int) -> dict[str, Any]:
    versions = {"tracealign": __version__, **library_versions()}
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **_asked(plan),
        **settings,
        "parts": dict(parts.settings),
        "versions": versions,
    }
    return dict(json.loads(json.dumps(record)))  # as it will be read: tuples become lists


def _asked(plan: Plan) -> dict[str, Any]:
    """What a header says of the plan: world, benchmarks, and for each arm how many records it is asked."""
    arms = []
    for arm, benchmark in plan.items():
        ids = [record.id for record in asked(arm, benchmark)]
        digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
        arms.append({**arm._asdict(), "records": len(ids), "digest": digest})
    first = next(iter(plan.values()))
    return {
        "world": first.world_digest,
        "adb": sorted({benchmark.digest for benchmark in plan.values()}),
        "arms": arms,
    }


def _line(arm: Arm, record: str, completions: Sequence[str]) -> str:
    line = {**arm._asdict(), "record": record, "completions": list(completions)}
    return json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep a second process from writing the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ResultsError(
            "Another process is writing these answers.",
            given=str(path),
            expected="a file that nobody else writes",
            mend="wait for it, or choose another file",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _resume(
    path: Path, header: Mapping[str, Any], plan: Plan, *, repair: bool
) -> dict[tuple[Arm, str], tuple[str, ...]]:
    """What `path` holds already; its header is written first where it holds nothing."""
    if not path.exists() or not path.stat().st_size:
        write_atomically(path, _dump(header))
        return {}
    found, lines = _read(path)
    _check_header(path, found, header)
    known = _parse(path, lines, plan, repair=repair)
    kept = sum(len(line) for line in (_first_line(path), *lines))
    if kept < path.stat().st_size:  # a last line that a kill cut short
        os.truncate(path, kept)
    return known


def _dump(header: Mapping[str, Any]) -> str:
    return json.dumps(header, ensure_ascii=False, sort_keys=True) + "\n"


def _first_line(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.readline()


def _read(path: Path) -> tuple[dict[str, Any], list[bytes]]:
    """The header, and every line behind it that was written to its end."""
    try:
        first, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    except OSError as error:
        raise _bad(path, f"{error.strerror}", "a file that evaluate has written") from error
    header = _json(first)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _bad(path, f"line 1: {first[:60]!r}", f"a header with format {FORMAT!r}")
    if header.get("version") != FORMAT_VERSION:
        raise _bad(path, f"line 1, field 'version': {header.get('version')!r}", f"version {FORMAT_VERSION}")
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    return header, lines


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _check_header(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if found.get(name) != value:
            theirs, ours = _first_difference(found.get(name), value)
            raise _bad(path, f"line 1, field {name!r}: {theirs}", f"{ours}, as in this evaluation")


def _first_difference(found: Any, expected: Any) -> tuple[str, str]:
    """Two values that differ, cut down to where they do."""
    if isinstance(found, dict) and isinstance(expected, dict):
        name = next(n for n in (*expected, *found) if found.get(n) != expected.get(n))
        return f"{name}: {found.get(name)}", f"{name}: {expected.get(name)}"
    if isinstance(found, list) and isinstance(expected, list):
        pairs = zip(found, expected, strict=False)
        theirs, ours = next((pair for pair in pairs if pair[0] != pair[1]), (len(found), len(expected)))
        return str(theirs), str(ours)
    return str(found), str(expected)


def _parse(
    path: Path, lines: Sequence[bytes], plan: Plan, *, repair: bool
) -> dict[tuple[Arm, str], tuple[str, ...]]:
    draws = {(arm, r.id): r.samples for arm, benchmark in plan.items() for r in asked(arm, benchmark)}
    known: dict[tuple[Arm, str], tuple[str, ...]] = {}
    rejected = []
    for number, line in enumerate(lines, start=2):
        key, texts, problem = _entry(line, draws)
        if not problem and known.get(key, texts) != texts:
            problem = "field 'completions': not what an earlier line says"
        if not problem:
            known[key] = texts
        elif repair:
            rejected.append(line)
        else:
            raise ResultsError(
                "A line of the answers cannot be used.",
                given=f"{path}, line {number}, {problem}",
                expected=f"an object with the fields {', '.join(_LINE)}, for a record that was asked",
                mend="run again with repair=True (--repair): the line is set aside, all others are kept",
            )
    if rejected:
        with open(path.with_name(path.name + ".rejected"), "ab") as file:
            file.writelines(rejected)
        _keep(path, known)
    return known


def _keep(path: Path, known: Mapping[tuple[Arm, str], tuple[str, ...]]) -> None:
    lines = (_line(*key, texts) for key, texts in known.items())
    write_atomically(path, _first_line(path).decode() + "".join(lines))


_NOBODY = (Arm("", ""), "")


def _entry(line: bytes, draws: Mapping[tuple[Arm, str], int]) -> tuple[tuple[Arm, str], tuple[str, ...], str]:
    """Arm and record, completions, and what is wrong with the line ("" for nothing)."""
    entry = _json(line)
    if not isinstance(entry, dict):
        return _NOBODY, (), f"not a JSON object: {line[:60]!r}"
    for name, kind in _LINE.items():
        if not isinstance(entry.get(name), kind):
            return _NOBODY, (), f"field {name!r}: {str(entry.get(name))[:60]!r}"
    if extra := sorted(entry.keys() - _LINE.keys()):
        return _NOBODY, (), f"field {extra[0]!r}: unknown"
    key = (Arm(*(entry[name] for name in Arm._fields)), entry["record"])
    texts = tuple(entry["completions"])
    if key not in draws:
        return _NOBODY, (), f"field 'record': {entry['record']!r} was not asked of {'/'.join(key[0])}"
    if len(texts) != draws[key] or not all(isinstance(text, str) for text in texts):
        return _NOBODY, (), f"field 'completions': {len(texts)} instead of {draws[key]} texts"
    return key, texts, ""


def _compact(
    path: Path, header: Mapping[str, Any], plan: Plan, known: Mapping[tuple[Arm, str], tuple[str, ...]]
) -> None:
    """Rewrite a complete file in the order of the plan."""
    _check_complete(path, plan, known)
    keys = [(arm, record.id) for arm, benchmark in plan.items() for record in asked(arm, benchmark)]
    text = _dump(header) + "".join(_line(*key, known[key]) for key in keys)
    if path.read_bytes() != text.encode():
        write_atomically(path, text)


def _check_complete(path: Path, plan: Plan, known: Mapping[tuple[Arm, str], Any]) -> None:
    for arm, benchmark in plan.items():
        records = asked(arm, benchmark)
        answered = sum((arm, record.id) in known for record in records)
        if answered < len(records):
            raise _bad(path, f"{answered} answers of {'/'.join(arm)}", f"{len(records)}, as its header says")


def _bad(path: Path, given: str, expected: str) -> ResultsError:
    return ResultsError(
        "The file of answers cannot be used.",
        given=f"{path}, {given}",
        expected=expected,
        mend="run the evaluation again, into this file to complete it, or into another",
    )


# --- checks --------------------------------------------------------------------------------------


def _check_plan(plan: Plan, parts: Parts) -> None:
    if not plan or not all(asked(arm, benchmark) for arm, benchmark in plan.items()):
        raise ParameterError(
            "There is nothing to evaluate.",
            given=f"{len(plan)} arms" if not plan else "an arm that is asked nothing",
            expected="at least one arm, and a record for each",
            mend="check what was selected from the benchmark",
        )
    if len({benchmark.world_digest for benchmark in plan.values()}) > 1:
        raise ParameterError(
            "The benchmarks of a plan were made with different worlds.",
            given=", ".join(sorted({benchmark.world_digest[:8] for benchmark in plan.values()})),
            expected="one world",
            mend="evaluate one world after the other",
        )
    for arm in plan:
        known = {
            "model": (arm.model, arm.training) in parts.models,
            "decoding": arm.decoding in METHODS,
            "guard": arm.guard == NONE or arm.guard in parts.guards,
        }
        if unknown := [name for name, fine in known.items() if not fine]:
            choices: dict[str, Iterable[Any]] = {
                "model": parts.models,
                "decoding": METHODS,
                "guard": parts.guards,
            }
            raise ParameterError(
                f"An arm names an unknown {unknown[0]}.",
                given=str(arm),
                expected=" or ".join(str(choice) for choice in choices[unknown[0]]) or "none",
                mend="correct the plan, or add the part",
            )


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ParameterError(
                f"{name} is out of range.",
                given=repr(value),
                expected="a whole number of at least 1",
                mend=f"choose another {name}",
            )
