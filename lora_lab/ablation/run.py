"""Run many trials: in this process, in joblib's workers, or on a Dask cluster, packed or one by one.

    frame = ablate(DigitsMLP, task, Grid(ranks=[1, 2, 4], lrs=[1e-2], seeds=range(5), steps=200), "runs/ranks")

A trial that has ended is one file, ``<key>.json``, which appears whole or not at all. What is there is not run again,
so a sweep can be stopped at any moment and continues when it is called again, with more trials if need be. Folders
from several machines are merged by copying their files into one. Where the trials run is the caller's choice: inside
``joblib.parallel_config(backend="dask")`` they run on that Dask cluster.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import multiprocessing
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import joblib
import torch
from joblib.externals.loky import BrokenProcessPool
from joblib.parallel import get_active_backend
from pydantic import Field
from torch import nn

from lora_lab import checkpoint
from lora_lab.ablation import packed
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.halving import PAUSED, Halving, next_round
from lora_lab.ablation.packing import plan
from lora_lab.ablation.results import OUT_OF_MEMORY, SCHEMA, STOPPED, Scores, stored_results, table
from lora_lab.costs.fake import Factory, copy_sharing_weights
from lora_lab.history import DivergedError, History
from lora_lab.inject import adapter_state, lora_layers
from lora_lab.system.device import own_randomness
from lora_lab.system.files import as_path, check_writable, write_json
from lora_lab.system.provenance import commit, device_name, machine_info, version
from lora_lab.system.schema import NotNegative, as_number, check
from lora_lab.system.wording import progress_bar, short_repr
from lora_lab.task import Task, bytes_of
from lora_lab.train import evaluate, fit, make_step

Judge = Callable[[nn.Module, Task], Mapping[str, float | str]]
_Jobs = Annotated[int, Field(ge=-1000, le=1000)]  # below 0, joblib counts down from the number of cores
_BUSY = threading.Lock()  # held while this process runs a trial


def ablate(
    model_factory: nn.Module | Factory,
    task: Task | Callable[[], Task],
    trials: Sequence[Trial],
    folder: str | Path | None = None,
    *,
    n_jobs: int | None = None,
    engine: str = "auto",
    budget_bytes: int | None = None,
    judge: Judge | None = None,
    progress: bool | None = None,
    timeout_s: float = 24 * 3600,
    halving: Halving | None = None,
):
    """Run the trials that the folder does not hold yet, and return all of them as :func:`~lora_lab.ablation.load` does.

    A trial that diverges or runs out of memory is stored as "failed", with the reason; delete its file to try it again.
    Any other error, and Ctrl-C, stops the sweep; trials that have ended by then are kept.

    Args:
        model_factory: the model, which is copied for each trial and sent to workers; or a function that makes it anew,
            the same each time, on the device where it is to be trained.
        task: data and loss; or a function that makes it, which is called once in each process.
        trials: a :class:`~lora_lab.ablation.grid.Grid` or a list of trials. Repeats are run once.
        folder: where results are kept, one file a trial; None keeps none, and an interrupt then loses all.
        n_jobs: number of processes, each with one torch thread; None means this process alone, or what the caller's
            ``joblib.parallel_config`` says.
        engine: "separate" runs each trial with :func:`lora_lab.fit`, "packed" many in one pass
            (:mod:`lora_lab.ablation.packed`), "auto" packs what can be packed.
        budget_bytes: memory for one pack; default half of what is free on this machine, shared among the workers.
        judge: called with each trained model and the task. The numbers and texts by name that it returns are in the
            table as ``score_<name>``. Stored trials without scores are run anew. Give another judge another folder.
        progress: show a bar; default only where a person is looking.
        timeout_s: seconds without any trial ending after which to give up on the workers.
        halving: stops trials at learning rates that validation rules out (:mod:`lora_lab.ablation.halving`); a call
            without it runs them to the end. Paused trials have checkpoints in ``folder/paused``, for all workers.

    Raises:
        ValueError: an unknown or empty value, a task or trials that do not fit the model, a damaged file, a backend of
            threads, a trial that cannot be packed or halved though it must be.
        RuntimeError: a worker makes another model or task, was ended by the system, or did not answer in time.
    """
    _check_values(trials, engine, n_jobs, budget_bytes, timeout_s)
    folder = None if folder is None else as_path(folder, "folder")
    make = functools.partial(copy.deepcopy, model_factory) if isinstance(model_factory, nn.Module) else model_factory
    model, data = _module(make()), _task(task)
    data.check_model(model)
    identity = {"task": data.fingerprint, "model": fingerprint(model)}
    requested = dict.fromkeys(trial.bound(**identity) for trial in trials)
    stored = stored_results(folder, requested, judge is not None)
    results = {key: result for key, result in stored.items() if result["outcome"] != STOPPED}
    missing = [trial for trial in requested if trial.key not in results]
    if missing and folder is not None:
        check_writable(folder, leave=True)
    workers = _workers(n_jobs) if missing else 1

    def run(model: nn.Module, trials: Sequence[Trial], pause: _Pause | None = None) -> Generator[_File]:
        planned = plan(model, data, trials, engine, budget_bytes, workers) if trials else []
        jobs = [_Job(make, task, part, together, engine, _here(), judge, pause) for part, together in planned]
        return _run_jobs(jobs, n_jobs, timeout_s if workers > 1 else None)

    ended = run(model, missing) if halving is None else _in_rounds(halving, requested, stored, folder, model, run)
    del model  # each process makes its own
    with progress_bar(len(requested), "trials", progress, unit="trial", done=len(results)) as bar, closing(ended):
        for result in ended:
            results[result["key"]] = result
            if folder is not None:  # on one line, because indenting takes ten times as long
                write_json(folder / f"{result['key']}.json", result, indent=None)
            bar.update()
    return table(results.values())


def _module(model: Any) -> nn.Module:
    """Return what a factory gave, after a check that it is a model."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model_factory gave a {type(model).__name__}, but it must give a torch.nn.Module.")
    return model


def _check_values(trials: Sequence[Trial], engine: str, n_jobs: Any, budget_bytes: Any, timeout_s: Any) -> None:
    """Raise ValueError if an argument of :func:`ablate` is out of its range."""
    if engine not in ("auto", "separate", "packed"):
        raise ValueError(f"engine is {short_repr(engine)}, but it must be 'auto', 'separate' or 'packed'.")
    if len(trials) == 0:
        raise ValueError("There are no trials to run; give a Grid or a list with at least one Trial.")
    check(n_jobs, _Jobs | None, "n_jobs")
    check(budget_bytes, NotNegative | None, "budget_bytes")
    check(timeout_s, NotNegative, "timeout_s")


def fingerprint(model: nn.Module) -> str:
    """A hash of a model: its modules' classes and numbers, and its parameters and buffers, bit for bit."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        # Numbers such as a dropout's p; the mode is left out, because fit sets it.
        numbers = {key: value for key, value in vars(module).items() if isinstance(value, int | float)}
        numbers = sorted((key, value) for key, value in numbers.items() if key != "training" and key[0] != "_")
        digest.update(f"{name} {type(module).__name__} {numbers}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


_File = dict[str, Any]  # the content of a trial's file


def _in_rounds(
    halving: Halving,
    trials: Iterable[Trial],
    stored: Mapping[str, _File],
    folder: Path | None,
    model: nn.Module,
    run: Callable[[nn.Module, Sequence[Trial], _Pause], Generator[_File]],
) -> Generator[_File]:
    """Yield the result of each trial of a sweep with halving as it ends, and last of those that were stopped.

    Decisions depend only on losses, so a sweep that is started again repeats them.
    """
    halving.check(trials)
    results = dict(stored)
    with nullcontext(folder) if folder is not None else TemporaryDirectory() as place:
        paused = Path(place).resolve() / PAUSED  # workers may run elsewhere

        def forget(key: str) -> None:
            shutil.rmtree(paused / key, ignore_errors=True)
            with suppress(OSError):  # others are still paused
                paused.rmdir()

        while True:
            due, stopped = next_round(halving, trials, results)
            if not due:
                break
            for until, waiting in due.items():
                with closing(run(model, waiting, _Pause(paused, until))) as ended:
                    for result in ended:
                        results[result["key"]] = result
                        if result["outcome"] != PAUSED:
                            yield result  # the caller writes it
                            forget(result["key"])
        for trial, reason in stopped.items():
            so_far = results.get(trial.key) or _Ended(trial, _device(model)).file("not begun", 0.0)
            yield so_far | {"outcome": STOPPED, "reason": reason}
            forget(trial.key)


# Where trials run


def _workers(n_jobs: int | None) -> int:
    """Return how many trials run at a time.

    Raises:
        ValueError: trials would run in threads of one process.
    """
    backend, _ = get_active_backend()
    # On a Dask cluster it waits for the first worker. (Joblib has no annotations: checkers infer narrower ones.)
    workers: int = joblib.effective_n_jobs(n_jobs)  # pyright: ignore[reportArgumentType]
    if getattr(backend, "uses_threads", False) and workers > 1:
        raise ValueError(
            f"joblib's backend {type(backend).__name__} runs trials in threads of one process, which share torch's "
            "random generators, so the numbers would be wrong; use processes, such as backend='loky'."
        )
    return workers


def _run_jobs(jobs: Sequence[_Job], n_jobs: int | None, timeout_s: float | None) -> Generator[_File]:
    """Yield the trials' results as they end."""
    # One job at a time: joblib would batch quick ones, and a killed worker would lose more than it is running.
    options: dict[str, Any] = {"return_as": "generator_unordered", "batch_size": 1, "timeout": timeout_s}
    parallel: Any = joblib.Parallel(n_jobs, **options)
    kept = "What has ended is kept: start the sweep again to go on."
    try:
        with closing(parallel(joblib.delayed(_run)(job) for job in jobs)) as ended:
            for results in ended:
                yield from results
    except (TimeoutError, multiprocessing.TimeoutError):
        if timeout_s is None:  # raised by a trial itself
            raise
        raise RuntimeError(
            f"No trial ended for {timeout_s:g} s, so a worker may hang; look at the workers, or give a longer "
            f"timeout_s. {kept}"
        ) from None
    except BrokenProcessPool as error:
        raise RuntimeError(
            "The system ended a worker, most likely for lack of memory; use fewer n_jobs or a smaller budget_bytes. "
            f"{kept}"
        ) from error


def _here() -> tuple[str, int]:
    return platform.node(), os.getpid()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@dataclass(frozen=True)
class _Job:
    """What is sent to a worker: one or more trials, and what they need.

    It is one object on purpose: joblib's Dask backend sends large arguments ahead and keeps them on workers, where a
    kill can lose them, whereas the content of one small object is sent with each job.
    """

    make: Factory
    task: Task | Callable[[], Task]
    trials: Sequence[Trial]
    together: bool  # as a pack
    engine: str
    home: tuple[str, int]
    judge: Judge | None = None
    pause: _Pause | None = None

    def model(self) -> nn.Module:
        """Return a fresh model.

        Raises:
            RuntimeError: it is not the sweep's.
        """
        model = self.make()
        if (made := fingerprint(model)) != self.trials[0].model:
            raise RuntimeError(
                f"The model made here ({':'.join(map(str, _here()))}) has the fingerprint {made}, not the sweep's, "
                f"{self.trials[0].model}; seed its weights, and use the same files and versions everywhere."
            )
        return model


@dataclass(frozen=True)
class _Pause:
    """Where trials pause, and where their checkpoints are.

    Args:
        folder: of the checkpoints, a folder for each trial.
        until: the step after which to pause; None is not to.
    """

    folder: Path
    until: int | None

    def checkpoint_dir(self, trial: Trial) -> Path:
        """The folder of a trial's checkpoint."""
        return self.folder / trial.key

    def stored(self, trial: Trial) -> History | None:
        """The history of a trial as far as its checkpoint."""
        return checkpoint.stored_history(self.checkpoint_dir(trial))

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Raise :class:`_PausedError` after the step; its checkpoint has been written by then."""
        if row["step"] == self.until:
            raise _PausedError


class _PausedError(Exception):
    """A trial has come to where it is to pause."""


@functools.lru_cache(maxsize=1)
def _call_factory(factory: Callable[[], Task]) -> Task:
    return factory()


def _task(task: Task | Callable[[], Task]) -> Task:
    return task if isinstance(task, Task) else _call_factory(task)


def _run(job: _Job) -> list[_File]:
    """Run a job in this process, and return its results."""
    with _alone(None if _here() == job.home else 1):
        task = _task(job.task)
        if task.fingerprint != job.trials[0].task:
            raise RuntimeError(
                f"The task {task.name!r} made here ({':'.join(map(str, _here()))}) has the fingerprint "
                f"{task.fingerprint}, not the sweep's, {job.trials[0].task}; use the same versions of Python and "
                "packages everywhere."
            )
        return _attempt(job, task, job.trials, job.together)


@contextmanager
def _alone(threads: int | None) -> Iterator[None]:
    """Let the block run a trial, the only one of this process, with so many threads of torch, or as many as there are.

    Raises:
        RuntimeError: another one runs already.
    """
    if not _BUSY.acquire(blocking=False):
        raise RuntimeError(
            "Two trials were started in one process at the same time, in threads that share torch's random "
            "generators, so the numbers would be wrong; use processes with one trial at a time each."
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _BUSY.release()


# Running


@dataclass
class _Ended:
    """How a trial ended: with a history and a test loss, or early, for a reason; or where it paused."""

    trial: Trial
    device: torch.device
    history: History | None = None
    test_loss: float | None = None
    scores: Scores | None = None
    reason: str | None = None
    paused: bool = False

    def file(self, engine: str, seconds: float) -> _File:
        """Return what its file holds."""
        return {
            "schema": SCHEMA,
            "key": self.trial.key,
            "trial": self.trial.to_dict(),
            "outcome": PAUSED if self.paused else "done" if self.reason is None else "failed",
            "reason": self.reason,
            "history": None if self.history is None else dict(vars(self.history)),
            "test_loss": self.test_loss,
            "scores": self.scores,
            "provenance": {
                **machine_info(self.device),
                "device": device_name(self.device),
                "lora_lab": version(),
                "commit": _commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "engine": engine,
                "seconds": seconds,
            },
        }


_commit = functools.cache(commit)  # asked once: the code that runs does not change with the folder


def _attempt(job: _Job, task: Task, trials: Sequence[Trial], together: bool) -> list[_File]:
    """Run the trials of a job.

    A pack that does not fit into memory is split in two; the trials of one that cannot be packed run one by one.
    """
    started = time.perf_counter()
    model = job.model()
    ended, parts = [], []
    try:
        ended = _run_pack(job, model, task, trials) if together else [_run_one(job, model, task, trials[0])]
    except packed.PackingError:  # only the attempt shows that they cannot be packed
        if job.engine == "packed":
            raise
        parts, together = [[trial] for trial in trials], False
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        ended = [_Ended(trials[0], _device(model), reason=f"{OUT_OF_MEMORY}: {error}")]
        if half := len(trials) // 2:
            parts = [trials[:half], trials[half:]]
    if not parts:
        engine = f"pack of {len(trials)}" if together else "separate"
        share = (time.perf_counter() - started) / len(trials)
        return [each.file(engine, share) for each in ended]
    del model  # the error is gone too, with the tensors that its frames held
    return [result for part in parts for result in _attempt(job, task, part, together)]


def _run_one(job: _Job, model: nn.Module, task: Task, trial: Trial) -> _Ended:
    device, pause, options = _device(model), job.pause, {}
    if pause is not None:
        stored = pause.stored(trial)
        if pause.until is not None and stored is not None and len(stored.rows) > pause.until:
            return _Ended(trial, device, stored, paused=True)
        options = {"checkpoint_dir": pause.checkpoint_dir(trial), "checkpoint_every": pause.until or trial.steps}
        options["on_row"] = pause.on_row
        pause.folder.mkdir(parents=True, exist_ok=True)  # for all trials: fit removes what it makes to try the folder
    try:
        history = fit(model, task, trial.method, config=trial, progress=False, **options)
    except _PausedError:
        return _Ended(trial, device, pause and pause.stored(trial), paused=True)
    except DivergedError as error:
        return _Ended(trial, device, reason=str(error))
    return _tested(job, trial, model, task, history)


def _run_pack(job: _Job, model: nn.Module, task: Task, trials: Sequence[Trial]) -> list[_Ended]:
    pause, until = job.pause, None if job.pause is None else job.pause.until
    parts: dict[int, list[Trial]] = {}
    for trial in trials:  # after an interrupt some are further than others
        stored = None if pause is None else pause.stored(trial)
        parts.setdefault(0 if stored is None else len(stored.rows) - 1, []).append(trial)
    ended = []
    for done, part in parts.items():
        results = [_paused_result(pause, model, task, trial) for trial in part] if pause and done else None
        if results is None or until is None or done < until:
            options = {"paused": results, "until": until} if pause else {}
            results = packed.fit_packed(model, task, part, config=part[0], progress=False, **options)
        ended += [_of_pack(job, model, task, *each) for each in zip(part, results, strict=True)]
    return ended


def _of_pack(job: _Job, model: nn.Module, task: Task, trial: Trial, result: packed.PackedResult) -> _Ended:
    if result.history is None:
        return _Ended(trial, _device(model), reason=str(result.error))
    student, optimizer = _student(model, task, trial)
    with torch.no_grad():
        for name, layer in lora_layers(student, required=True).items():
            for part in layer.parts:
                getattr(layer, part).copy_(result.adapter[f"{name}.{part}"])  # (rank, in) or (out, rank)
    if job.pause is None or job.pause.until is None:
        return _tested(job, trial, student, task, result.history)
    for name, parameter in _trainable(student):
        moments = {moment: parts[name] for moment, parts in result.moments.items()}
        optimizer.state[parameter] = {"step": torch.tensor(float(len(result.rows) - 1)), **moments}
    # Without "packed", which fit does not know, so that it can go on from there too.
    settings = {name: value for name, value in result.history.settings.items() if name != "packed"}
    checkpoint.save(job.pause.checkpoint_dir(trial), student, optimizer, replace(result.history, settings=settings))
    return _Ended(trial, _device(model), result.history, paused=True)


def _paused_result(pause: _Pause, model: nn.Module, task: Task, trial: Trial) -> packed.PackedResult:
    """Return what a pack, or fit, had reached with a trial."""
    history = cast(History, pause.stored(trial))
    student, optimizer = _student(model, task, trial)
    with own_randomness(_device(model), trial.seed):
        checkpoint.resume(pause.checkpoint_dir(trial), student, optimizer, history)
    parameters = _trainable(student)
    moments = {m: {name: optimizer.state[parameter][m] for name, parameter in parameters} for m in packed.MOMENTS}
    return packed.PackedResult(history, adapter_state(student), moments=moments)


def _student(model: nn.Module, task: Task, trial: Trial) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model with the trial's adapters over the same frozen weights, and its optimiser, as fit makes them."""
    student = copy_sharing_weights(model)
    return student, make_step(student, task.loss, trial.method, trial).optimizer


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tested(job: _Job, trial: Trial, model: nn.Module, task: Task, history: History) -> _Ended:
    device, task = _device(model), replace(task, loss=trial.computed(task.loss))
    loss = evaluate(model, task, "test", trial.batch_size, trial.eval_examples, trial.by_length)
    if not math.isfinite(loss):
        return _Ended(trial, device, reason=f"The test loss is {loss} after the last step.")
    if job.judge is None:
        return _Ended(trial, device, history, loss)
    scores = {name: as_number(value) for name, value in job.judge(model, task).items()}  # JSON cannot hold numpy's
    return _Ended(trial, device, history, loss, check(scores, Scores, "what the judge gave"))


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    on_cpu = "DefaultCPUAllocator: can't allocate" in str(error)
    return on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)
