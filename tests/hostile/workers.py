"""Cases in processes of their own, with limits of time and memory.

The process that has imported everything forks a worker for a few dozen cases, which takes milliseconds. A worker that
hangs or dies is the outcome of the case that it was at, and another one goes on with the next.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch

from lora_lab.models.pretrained import SMOLLM2
from tests.hostile.core import BAD, PACKAGE, Case, Outcome, outcome_of
from tests.hostile.material import HERE, SECRET, model_folder
from tests.hostile.values import Values

CPU_SECONDS = 5  # of one case, which usually takes a hundredth of one, with its child processes
LONGEST_SECONDS = 5  # by the clock, twice in succession; more on a machine that is busy
WALL_SECONDS = 60  # by the clock, after which a case that waits for something is ended
ADDRESS_BYTES = 2 * 2**30  # beyond what a worker has from the start
RESIDENT_BYTES = 2**29  # the most by which one case may raise a worker's peak
LARGEST_FILE = 2**28
GROUP = 40  # cases of a worker
RAM = Path("/dev/shm")  # where files need not reach a disk


# Of the user, in the working folder, under names that odd arguments have.
_USERS_FILES = ("notes.txt", "x", "0", "con", "llama/README.md", "nowhere/README.md", "out/README.md", "out/notes.txt")

PREPARED: dict[str, Any] = {}  # what targets have prepared, by name; forked processes have it too


@dataclass(frozen=True)
class Target:
    """What is damaged.

    Args:
        name: as on the command line.
        prepare: makes the whole files in a folder once, and returns them with the odd values, as ``case`` needs them.
        case: makes a case from a random generator, in an empty folder, with what ``prepare`` returned.
        share: of all cases that are run.
    """

    name: str
    prepare: Callable[[Path, Values], Any]
    case: Callable[[random.Random, Path, Any], Case]
    share: float

    @classmethod
    def of(cls, module: ModuleType, share: float) -> Target:
        """The target that a module defines."""
        return cls(module.__name__.rpartition(".")[2], module.prepare, module.case, share)


@dataclass(frozen=True)
class Result:
    """A case that was run, and its outcome."""

    target: str
    seed: int
    number: int
    what: str
    outcome: Outcome
    seconds: float = 0.0

    @property
    def signature(self) -> tuple[str, str, str, str]:
        """What results of one cause have in common."""
        outcome = self.outcome
        kind = (
            re.sub(r"\d[\d.e+-]*|new-\w+", "#", outcome.message)[:70]
            if outcome.name in ("silent", "lost")
            else outcome.error
        )
        return self.target, outcome.name, kind, outcome.where

    @property
    def repeat(self) -> str:
        """The command that runs the case again."""
        return f"python -m tests.hostile --target {self.target} --seed {self.seed} --case {self.number}"


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder for all files of a run, and an environment that leads nowhere else."""
    with tempfile.TemporaryDirectory(prefix="hostile-", dir=RAM if RAM.is_dir() else None) as name:
        folder = Path(name)
        os.environ |= {"LORA_LAB_CACHE": str(folder / "cache"), "LORA_LAB_PROGRESS": "0", "LORA_LAB_DEVICE": "cpu"}
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        torch.set_num_threads(1)
        model_folder(folder / "cache" / f"{SMOLLM2}-v1")  # takes the place of SmolLM2, so that nothing is downloaded
        yield folder


def run(targets: Sequence[Target], cases: int, seed: int, jobs: int = 2) -> Iterator[Result]:
    """Run so many cases, shared out among the targets, and yield their results."""
    whole = sum(target.share for target in targets)
    with workplace() as folder:
        groups, material, values = [], {}, Values(seed)
        for target in targets:
            place = folder / "material" / target.name
            place.mkdir(parents=True)
            material[target.name] = target.prepare(place, values)
            numbers = range(max(1, round(cases * target.share / whole)))
            groups += [(target, numbers[start : start + GROUP]) for start in range(0, len(numbers), GROUP)]
        random.Random(0).shuffle(groups)  # so that the slow targets do not come last
        PREPARED.update(material)
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
            for results in pool.map(partial(run_group, seed, folder), *zip(*groups, strict=True)):
                yield from results


def make_case(target: Target, seed: int, number: int, folder: Path, material: Any) -> Case:
    """A case, whose files are in the folder; its working folder is one in it, where files of the user stand."""
    here = folder / HERE
    here.mkdir(parents=True)
    for name in _USERS_FILES:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(SECRET)
    os.chdir(here)
    return target.case(random.Random(f"{seed} {target.name} {number}"), folder, material)


def outcome_in(folder: Path, case: Case) -> Outcome:
    """Run a case that was made in the folder, and look after the files of the user."""
    users = [path for path in (folder / HERE).rglob("*") if _is_users(path)]
    outcome = outcome_of(case)
    changed = [str(path.relative_to(folder)) for path in users if not _is_users(path)]
    return Outcome("lost", message=f"changed: {changed}; {outcome.message}") if changed else outcome


def _is_users(path: Path) -> bool:
    return path.is_file() and path.read_bytes() == SECRET.encode()


def repeat(target: Target, seed: int, number: int) -> Outcome:
    """Run one case in this process, which prints its traceback if there is one."""
    with workplace() as folder:
        (folder / "material").mkdir()
        case = make_case(target, seed, number, folder / "case", target.prepare(folder / "material", Values(seed)))
        print(f"{case.what}\n", flush=True)

        def shown(function: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException:
                traceback.print_exc()
                raise

        _limit()
        faulthandler.dump_traceback_later(2 * CPU_SECONDS, exit=True)
        outcome = outcome_in(
            folder / "case", replace(case, call=partial(shown, case.call), use=partial(shown, case.use))
        )
        faulthandler.cancel_dump_traceback_later()
        os.chdir("/")
        return outcome


def run_group(seed: int, folder: Path, target: Target, numbers: Sequence[int]) -> list[Result]:
    """Run the cases of a prepared target, one after another, in as many workers as need be."""
    results: list[Result] = []
    while len(results) < len(numbers):
        results += _run_worker(seed, folder, target, numbers[len(results) :])
    return [
        _run_worker(seed, folder, target, [result.number])[0] if result.outcome.name == "slow" else result
        for result in results
    ]


def _run_worker(seed: int, folder: Path, target: Target, numbers: Sequence[int]) -> list[Result]:
    """Run cases in one worker, to the end or until one of them ends it or takes much memory."""
    reading, writing = os.pipe()
    trace = folder / f"trace-{os.getpid()}"
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            _work(seed, folder, target, numbers, writing, trace)
        finally:
            os._exit(0)
    os.close(writing)
    text = b""
    while True:
        if not select.select([reading], [], [], WALL_SECONDS)[0]:
            os.kill(pid, signal.SIGPROF)
        if not (more := os.read(reading, 2**16)):
            break
        text += more
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    results, begun = [], None
    for line in map(json.loads, text.splitlines()):
        begun = Result(target.name, seed, line["number"], line["what"], Outcome(""))
        if "outcome" in line:
            results.append(replace(begun, outcome=Outcome(**line["outcome"]), seconds=line["seconds"]))
            begun = None
    if begun is not None:
        places = re.findall(rf'"{re.escape(str(PACKAGE))}/(.+?)", line (\d+)', trace.read_text())
        where = ":".join(places[0]) if places else ""
        name = _ENDS.get(code, "crash" if code >= 0 else "segfault")
        results.append(replace(begun, outcome=Outcome(name, f"exit {code}", where), seconds=CPU_SECONDS))
        shutil.rmtree(_place(folder, target, begun.number), ignore_errors=True)
    return results


_ENDS = {-signal.SIGPROF: "hang", -signal.SIGKILL: "memory"}  # the first by us, the second by the system


def _place(folder: Path, target: Target, number: int) -> Path:
    return folder / f"{target.name}-{number}"


def _work(seed: int, folder: Path, target: Target, numbers: Sequence[int], writing: int, trace: Path) -> None:
    """What a worker does: run the cases, and write two lines for each, when it begins and when it ends."""
    faulthandler.disable()  # which would write to the terminal when a signal ends the process
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(0, 2)
    _limit()
    with open(writing, "w", buffering=1) as pipe, open(trace, "w") as places:
        faulthandler.register(signal.SIGPROF, places, all_threads=False, chain=True)  # then it ends the process
        for number in numbers:
            before, computed = _peak(), _computed()
            place = _place(folder, target, number)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            started = time.perf_counter()
            try:
                case = make_case(target, seed, number, place, PREPARED[target.name])
            except Exception as error:  # a fault of the harness, which must be seen and end nothing else
                case = Case("a case that could not be made", partial(_raise, error))
            begun = {"number": number, "what": case.what[:300]}
            pipe.write(json.dumps(begun) + "\n")
            outcome = outcome_in(place, case)
            signal.setitimer(signal.ITIMER_PROF, 0)
            seconds, growth, computed = time.perf_counter() - started, _peak() - before, _computed() - computed
            if growth > RESIDENT_BYTES and outcome.name not in BAD:
                outcome = replace(outcome, name="memory", message=f"{growth >> 20} MiB; {outcome.message}")
            if (seconds > LONGEST_SECONDS * _busy() or computed > CPU_SECONDS) and outcome.name not in BAD:
                message = f"{seconds:.1f} s, of which {computed:.1f} s computing; {outcome.message}"
                outcome = replace(outcome, name="slow", message=message)
            pipe.write(json.dumps(begun | {"outcome": asdict(outcome), "seconds": seconds}) + "\n")
            os.chdir("/")
            shutil.rmtree(place, ignore_errors=True)
            if growth > RESIDENT_BYTES:
                return  # another worker measures the next case from its own start


def _raise(error: Exception) -> None:
    raise AssertionError(f"the harness failed: {error!r}") from error


def _limit() -> None:
    """Let this process have little more memory than it has."""
    size = psutil.Process().memory_info().vms + ADDRESS_BYTES
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


def _computed() -> float:
    """Seconds of the processor of this process and of its children that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _busy() -> float:
    """How many times longer than alone this process has taken so far, because others had the processor."""
    try:
        computing, waiting = map(int, Path("/proc/self/schedstat").read_text().split()[:2])
    except OSError:  # macOS does not tell
        return 1.0
    return (computing + waiting) / computing


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
