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
import itertools
import math
import multiprocessing
import os
import platform
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import joblib
import torch
from joblib.externals.loky import BrokenProcessPool
from joblib.parallel import get_active_backend
from pydantic import Field
from torch import Tensor, nn

from lora_lab import checkpoint
from lora_lab.ablation import packed
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.halving import PAUSED, Halving, next_round
from lora_lab.ablation.packing import plan
from lora_lab.ablation.results import OUT_OF_MEMORY, SCHEMA, STOPPED, stored_results, table, weights_path
from lora_lab.checkpoint import frozen_hash, load_tensors, mismatch, save_tensors, trained
from lora_lab.costs.fake import Factory, copy_sharing_weights
from lora_lab.history import DivergedError, History, is_number
from lora_lab.inject import adapter_state, lora_layers
from lora_lab.system.device import own_randomness
from lora_lab.system.files import as_path, check_writable, write_json
from lora_lab.system.numbers import is_list
from lora_lab.system.progress import progress_bar
from lora_lab.system.provenance import commit, device_name, machine_info, version
from lora_lab.system.schema import NotNegative, check, instance_of
from lora_lab.system.wording import short_repr, shortened
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
    """Run the trials that the folder does not hold yet, and return all of them as a table.

    A trial that diverges or runs out of memory is stored as "failed", with the reason, and the others go on; delete
    its file to try it again. Any other error stops the sweep, as does Ctrl-C; trials that have ended by then are kept.

    If the judge raises an error, no training is lost, which may have taken hours. The trial's losses are stored with
    the error as their reason, and what was trained in ``<key>.safetensors`` beside them (small for an adapter, as
    large as the model for full fine-tuning). The other trials go on, and the first error is raised at the end. The
    next call with a judge scores the stored weights, in this process and without training, and removes the file.

    Args:
        model_factory: makes the model that every trial starts from, the same each time, on the device where it is
            to be trained; or such a model, which is copied for each trial and left as it is. A model is sent to
            workers with every trial; of a function that they can import, only the name is sent.
        task: data and loss; or a function that makes it, which is called once in each process.
        trials: a :class:`~lora_lab.ablation.grid.Grid` or a list of trials. Repeats are run once.
        folder: where results are kept, one file a trial; None keeps none, and an interrupt then loses all.
        n_jobs: number of processes; None means this process alone, or what the caller's ``joblib.parallel_config``
            says. Each worker computes with one torch thread.
        engine: "separate" runs each trial with :func:`lora_lab.fit`, "packed" many in one pass
            (:mod:`lora_lab.ablation.packed`), "auto" packs what can be packed and runs the rest one by one.
        budget_bytes: memory for one pack, by :func:`lora_lab.costs.memory.predict`; default half of what is free on
            this machine, shared among the workers.
        judge: called with each trained model and the task; what it returns (numbers and texts by name) is kept with
            the trial's result, and is in the table as ``score_<name>``. Stored trials with neither scores nor
            weights are run anew. Results do not record which judge scored them: give another judge another folder.
        progress: show a bar; default only where a person is looking.
        timeout_s: seconds without any trial ending after which to give up on the workers; default a day. It ends
            the wait for a worker that joined a cluster later and cannot answer.
        halving: stops trials at learning rates that validation rules out
            (:mod:`lora_lab.ablation.halving`). They are stored as "stopped", with the reason, and without test loss; a
            call without ``halving`` runs them to the end, from their start. Trials that pause keep a checkpoint in
            ``folder/paused``, which all workers must reach.

    Returns:
        The DataFrame that :func:`lora_lab.ablation.load` describes, of these trials alone.

    Raises:
        ValueError: no trials, a value that is not known or of another type, a model_factory that makes no model, a task
            that does not fit the model, a trial of another task or model, a damaged file, a backend of threads,
            ``engine="packed"`` and a trial that cannot be packed, or ``halving`` and trials that are not evaluated at
            any rung.
        RuntimeError: a worker cannot import lora_lab, has another version of it, makes another model or task, was
            ended by the system, or did not answer for ``timeout_s``; or the judge failed, or returned anything but
            numbers and texts by name (the traceback is in the error's notes; without a folder it is raised at once).
    """
    engine = check(engine, str, "engine")
    if engine not in ("auto", "separate", "packed"):
        raise ValueError(f"engine is {short_repr(engine)}, but it must be 'auto', 'separate' or 'packed'.")
    _check_types(task, trials, n_jobs, budget_bytes, timeout_s, halving)
    folder = None if folder is None else as_path(folder, "folder")
    make = functools.partial(copy.deepcopy, model_factory) if isinstance(model_factory, nn.Module) else model_factory
    model, data = make() if callable(make) else make, _task(task)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model_factory gave a {type(model).__name__}, but it must be a torch.nn.Module, or a function that makes "
            "one anew at every call."
        )
    data.check_model(model)
    identity = {"task": data.fingerprint, "model": fingerprint(model)}
    requested = dict.fromkeys(trial.bound(**identity) for trial in trials)
    results, unjudged = stored_results(folder, requested, judge is not None)
    stopped = {key: results.pop(key) for key in [*results] if results[key]["outcome"] == STOPPED}
    missing = [trial for trial in requested if trial.key not in results and trial.key not in unjudged]
    workers, timeout = 1, None
    if missing:
        if folder is not None:
            check_writable(folder, leave=True)
        workers, timeout = _workers(n_jobs, timeout_s)

    def jobs_of(model: nn.Module, trials: Sequence[Trial], pause: _Pause | None = None) -> list[_Work]:
        planned = plan(model, data, trials, engine, budget_bytes, workers) if trials else []
        return [_Work(make, task, part, together, engine, _here(), judge, pause) for part, together in planned]

    if halving is None:
        arriving = _results(jobs_of(model, missing), n_jobs, timeout)
    else:
        halving.check(requested)

        def train(trials: Sequence[Trial], pause: _Pause) -> Generator[_Arrival]:
            return _results(jobs_of(make(), trials, pause), n_jobs, timeout)

        device, known = next(model.parameters()).device, {**results, **unjudged, **stopped}
        arriving = _in_rounds(halving, requested, known, folder, device, train)
    del model  # each process makes its own
    rescored = (
        _judge_again(_Work(make, task, [trial], False, engine, _here()), judge, unjudged[trial.key], folder)
        for trial in requested
        if folder is not None and judge is not None and trial.key in unjudged
    )
    failures: dict[str, _Failure] = {}
    bar = progress_bar(len(requested), "trials", progress, unit="trial", done=len(results))
    with bar, closing(arriving):
        for arrival in itertools.chain(rescored, arriving):
            key = arrival.result["key"]
            results[key] = arrival.result
            if arrival.failure is not None:
                failures[key] = arrival.failure
            if folder is not None:
                _keep(folder, arrival)
            elif failures:
                raise _judge_error(failures, "fix the judge, and pass a folder, so that no training is lost")
            bar.update()
    if failures:
        raise _judge_error(failures, f"fix the judge and start the sweep again: the trained weights are in {folder}")
    return table(results.values())


def _check_types(task: Any, trials: Any, n_jobs: Any, budget_bytes: Any, timeout_s: Any, halving: Any) -> None:
    """Raise ValueError if an argument of :func:`ablate` is of another type, or there are no trials."""
    if not (isinstance(task, Task) or callable(task)) or isinstance(task, nn.Module):
        raise ValueError(f"task is {short_repr(task)}, but it must be a Task, or a function that makes one.")
    if not is_list(trials) or not all(isinstance(trial, Trial) for trial in trials):
        raise ValueError(f"trials is {short_repr(trials)}, but it must be a Grid or a list of Trials.")
    if len(trials) == 0:
        raise ValueError("There are no trials to run; give a Grid or a list with at least one Trial.")
    check(n_jobs, _Jobs | None, "n_jobs")
    check(budget_bytes, NotNegative | None, "budget_bytes")
    check(timeout_s, NotNegative, "timeout_s")
    check(halving, instance_of(Halving) | None, "halving")


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


def _in_rounds(
    halving: Halving,
    trials: Iterable[Trial],
    results: dict[str, dict[str, Any]],
    folder: Path | None,
    device: torch.device,
    train: Callable[[Sequence[Trial], _Pause], Generator[_Arrival]],
) -> Generator[_Arrival]:
    """The results of a sweep with halving: of each trial as it ends, and last of those that were stopped.

    What is decided depends on losses alone, so a sweep that is started again decides the same.

    Args:
        halving: the rule.
        trials: all trials of the sweep.
        results: what is stored of them, by key.
        folder: of the sweep.
        device: where the trials train.
        train: trains trials to where they pause, or to the end.
    """
    results = dict(results)
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
                with closing(train(waiting, _Pause(paused, until))) as arriving:
                    for arrival in arriving:
                        results[arrival.result["key"]] = arrival.result
                        if arrival.result["outcome"] != PAUSED:
                            yield arrival  # the caller writes it
                            forget(arrival.result["key"])
        for trial, reason in stopped.items():
            so_far = results.get(trial.key) or _Outcome(trial, device).result("not begun", 0.0)
            yield _Arrival(so_far | {"outcome": STOPPED, "reason": reason})
            forget(trial.key)


# Where trials run


def _workers(n_jobs: int | None, timeout_s: float) -> tuple[int, float | None]:
    """How many trials run at a time, and how long to wait for one (None in this process, where there is no waiting).

    Raises:
        ValueError: trials would run in threads of one process.
        RuntimeError: a worker of a Dask cluster cannot run trials.
    """
    backend, _ = get_active_backend()
    # On a Dask cluster it waits for the first worker. (Joblib has no annotations: checkers infer narrower ones.)
    workers: int = joblib.effective_n_jobs(n_jobs)  # pyright: ignore[reportArgumentType]
    if getattr(backend, "uses_threads", False) and workers > 1:
        raise ValueError(
            f"joblib's backend {type(backend).__name__} runs trials in threads of one process, which share torch's "
            "random generators, so the numbers would be wrong; use processes, such as backend='loky'."
        )
    client = getattr(backend, "client", None)
    if client is not None:
        _preflight(client)
    return workers, None if client is None and workers == 1 else timeout_s


def _preflight(client: Any) -> None:
    """Ask every worker of a Dask cluster for its lora_lab: without it, joblib would wait for results forever."""

    def their_version() -> str:
        # Not one of this module's functions by name: a worker without lora_lab could not even load it.
        import lora_lab.ablation.run

        return lora_lab.__version__

    try:
        versions = client.run(their_version)
    except Exception as error:
        raise RuntimeError(
            f"A worker of the Dask cluster cannot import lora_lab ({type(error).__name__}: {error}); install the same "
            "lora_lab on every worker, and start the sweep again."
        ) from error
    for worker, installed in versions.items():
        if installed != version():
            raise RuntimeError(
                f"Worker {worker} has lora_lab {installed}, but this process has {version()}; install the same."
            )
    for worker, threads in client.nthreads().items():
        if threads > 1:
            raise ValueError(
                f"Worker {worker} runs {threads} trials at a time in threads of one process, which share torch's "
                "random generators, so the numbers would be wrong; start workers with --nthreads 1."
            )


def _results(works: Sequence[_Work], n_jobs: int | None, timeout_s: float | None) -> Generator[_Arrival]:
    """The trials' results as they end."""
    # One job at a time: joblib would batch quick ones, and a killed worker would lose more than it is running.
    options: dict[str, Any] = {"return_as": "generator_unordered", "batch_size": 1, "timeout": timeout_s}
    backend, _ = get_active_backend()
    if getattr(backend, "client", None) is not None:
        options["backend"] = _reporting(backend)
    parallel: Any = joblib.Parallel(n_jobs, **options)
    try:
        with closing(parallel(joblib.delayed(_run)(work) for work in works)) as jobs:
            for results in jobs:
                yield from results
    except (TimeoutError, multiprocessing.TimeoutError):
        if timeout_s is None:  # raised by a trial itself
            raise
        raise RuntimeError(
            f"No trial ended for {timeout_s:g} s, so a worker may hang; look at the workers, or give a longer "
            "timeout_s. What has ended is kept: start the sweep again to go on."
        ) from None
    except BrokenProcessPool as error:
        raise RuntimeError(
            "The system ended a worker, most likely for lack of memory; use fewer n_jobs or a smaller budget_bytes. "
            "What has ended is kept: start the sweep again to go on."
        ) from error


def _reporting(backend: Any) -> Any:
    """joblib's Dask backend, extended to report Dask's own errors, such as KilledWorker after four lost workers.

    joblib's own reports only the errors of functions, and would wait for such a trial forever.
    """

    class Reporting(type(backend)):
        def submit(self, func: Any, callback: Any = None) -> Any:
            future = super().submit(func, callback)
            future.add_done_callback(lambda ended: ended.exception() and callback(ended.exception()))
            return future

        def retrieve_result_callback(self, out: Any) -> Any:
            if isinstance(out, BaseException):
                raise RuntimeError(
                    f"Dask gave up a trial ({type(out).__name__}), most likely because the system ended its workers, "
                    "for lack of memory; look at their logs. What has ended is kept: start the sweep again to go on."
                ) from out
            return super().retrieve_result_callback(out)

    return Reporting(client=backend.client, **backend.submit_kwargs)


def _here() -> tuple[str, int]:
    return platform.node(), os.getpid()


@dataclass(frozen=True)
class _Work:
    """What is sent to a worker: a job of one or more trials, and what they need.

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
        """A fresh model.

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
    return check(task if isinstance(task, Task) else _call_factory(task), instance_of(Task), "task")


def _run(work: _Work) -> list[_Arrival]:
    """Run a job in this process, and return their results."""
    with _alone(), _threads(None if _here() == work.home else 1):
        task = _task(work.task)
        if task.fingerprint != work.trials[0].task:
            raise RuntimeError(
                f"The task {task.name!r} made here ({':'.join(map(str, _here()))}) has the fingerprint "
                f"{task.fingerprint}, "
                f"not the sweep's, {work.trials[0].task}; use the same versions of Python and packages everywhere."
            )
        return _attempt(work, task, work.trials, work.together)


@contextmanager
def _alone() -> Iterator[None]:
    if not _BUSY.acquire(blocking=False):
        raise RuntimeError(
            "Two trials were started in one process at the same time, in threads that share torch's random "
            "generators, so the numbers would be wrong; use processes with one trial at a time each."
        )
    try:
        yield
    finally:
        _BUSY.release()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Running


@dataclass
class _Failure:
    """What went wrong when a trial was judged, and all that is needed to judge it again."""

    words: str
    trace: str
    weights: dict[str, Tensor] | None = None  # None: they are in the folder already
    frozen: str = ""  # the hash of what was not trained

    @property
    def reason(self) -> str:
        return f"The judge failed ({self.words})."


@dataclass
class _Arrival:
    """What comes back from where a trial ran: the content of its file, and what only the caller is to know."""

    result: dict[str, Any]
    failure: _Failure | None = None


@dataclass
class _Outcome:
    """How a trial ended: with a history and a test loss, or early, for a reason."""

    trial: Trial
    device: torch.device
    history: History | None = None
    test_loss: float | None = None
    scores: Mapping[str, float | str] | None = None
    reason: str | None = None
    failure: _Failure | None = None  # of its judge
    paused: bool = False

    def result(self, engine: str, seconds: float) -> dict[str, Any]:
        """What its file holds."""
        described = machine_info(self.device)
        return {
            "schema": SCHEMA,
            "key": self.trial.key,
            "trial": self.trial.to_dict(),
            "outcome": PAUSED if self.paused else "done" if self.reason is None else "failed",
            "reason": self.reason if self.failure is None else self.failure.reason,
            "history": None if self.history is None else dict(vars(self.history)),
            "test_loss": self.test_loss,
            "scores": self.scores,
            "provenance": {
                **described,
                "device": device_name(self.device),
                "lora_lab": version(),
                "commit": _commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "engine": engine,
                "seconds": seconds,
            },
        }


_commit = functools.cache(commit)  # asked once: the code that runs does not change with the folder


def _attempt(work: _Work, task: Task, trials: Sequence[Trial], together: bool) -> list[_Arrival]:
    """Run the trials of a job.

    A pack that does not fit into memory is split in two; the trials of one that cannot be packed run one by one.
    """
    started = time.perf_counter()
    model = work.model()
    device = next(model.parameters()).device
    outcomes, parts = [], []
    try:
        outcomes = _run_pack(work, model, task, trials) if together else [_run_one(work, model, task, trials[0])]
    except packed.PackingError:  # only the attempt shows that they cannot be packed
        if work.engine == "packed":
            raise
        parts, together = [[trial] for trial in trials], False
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        half = len(trials) // 2
        if half:
            parts = [trials[:half], trials[half:]]
        else:
            outcomes = [_Outcome(trials[0], device, reason=f"{OUT_OF_MEMORY}: {error}")]
    if not parts:
        engine = f"pack of {len(trials)}" if together else "separate"
        share = (time.perf_counter() - started) / len(trials)
        return [_Arrival(outcome.result(engine, share), outcome.failure) for outcome in outcomes]
    del model  # the error is gone too, with the tensors that its frames held
    return [arrival for part in parts for arrival in _attempt(work, task, part, together)]


def _run_one(work: _Work, model: nn.Module, task: Task, trial: Trial) -> _Outcome:
    device, pause, options = next(model.parameters()).device, work.pause, {}
    if pause is not None:
        stored = pause.stored(trial)
        if pause.until is not None and stored is not None and len(stored.rows) > pause.until:
            return _Outcome(trial, device, stored, paused=True)
        options = {"checkpoint_dir": pause.checkpoint_dir(trial), "checkpoint_every": pause.until or trial.steps}
        options["on_row"] = pause.on_row
        pause.folder.mkdir(parents=True, exist_ok=True)  # for all trials: fit removes what it makes to try the folder
    try:
        history = fit(model, task, trial.method, config=trial, progress=False, **options)
    except _PausedError:
        return _Outcome(trial, device, pause and pause.stored(trial), paused=True)
    except DivergedError as error:
        return _Outcome(trial, device, reason=str(error))
    return _judged(work, trial, model, task, history)


def _run_pack(work: _Work, model: nn.Module, task: Task, trials: Sequence[Trial]) -> list[_Outcome]:
    pause, until = work.pause, None if work.pause is None else work.pause.until
    parts: dict[int, list[Trial]] = {}
    for trial in trials:  # after an interrupt some are further than others
        stored = None if pause is None else pause.stored(trial)
        parts.setdefault(0 if stored is None else len(stored.rows) - 1, []).append(trial)
    outcomes = []
    for done, part in parts.items():
        paused = [_paused_result(pause, model, task, trial) for trial in part] if pause and done else None
        if paused is None or until is None or done < until:
            options = {"paused": paused, "until": until} if pause else {}
            results = packed.fit_packed(model, task, part, config=part[0], progress=False, **options)
        else:
            results = paused
        outcomes += [_of_pack(work, model, task, *each) for each in zip(part, results, strict=True)]
    return outcomes


def _of_pack(work: _Work, model: nn.Module, task: Task, trial: Trial, result: packed.Result) -> _Outcome:
    if result.history is None:
        return _Outcome(trial, next(model.parameters()).device, reason=str(result.error))
    student = copy_sharing_weights(model)  # shares the frozen weights
    optimizer = make_step(student, task.loss, trial.method, trial).optimizer  # as fit would have left it
    with torch.no_grad():
        for name, layer in lora_layers(student, required=True).items():
            for part in layer.parts:
                getattr(layer, part).copy_(result.adapter[f"{name}.{part}"])  # (rank, in) or (out, rank)
    if work.pause is None or work.pause.until is None:
        return _judged(work, trial, student, task, result.history)
    for name, parameter in _trainable(student):
        moments = {moment: parts[name] for moment, parts in result.moments.items()}
        optimizer.state[parameter] = {"step": torch.tensor(float(len(result.rows) - 1)), **moments}
    # Without "packed", which fit does not know, so that it can go on from there too.
    settings = {name: value for name, value in result.history.settings.items() if name != "packed"}
    history = replace(result.history, settings=settings)
    checkpoint.save(work.pause.checkpoint_dir(trial), student, optimizer, history)
    return _Outcome(trial, next(model.parameters()).device, result.history, paused=True)


def _paused_result(pause: _Pause, model: nn.Module, task: Task, trial: Trial) -> packed.Result:
    """What a pack, or fit, had reached with a trial."""
    student, history = copy_sharing_weights(model), cast(History, pause.stored(trial))
    optimizer = make_step(student, task.loss, trial.method, trial).optimizer
    with own_randomness(next(model.parameters()).device, trial.seed):
        checkpoint.resume(pause.checkpoint_dir(trial), student, optimizer, history)
    parameters = _trainable(student)
    moments = {m: {name: optimizer.state[parameter][m] for name, parameter in parameters} for m in packed.MOMENTS}
    return packed.Result(history, adapter_state(student), moments=moments)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _judged(work: _Work, trial: Trial, model: nn.Module, task: Task, history: History) -> _Outcome:
    device, task = next(model.parameters()).device, replace(task, loss=trial.computed(task.loss))
    loss = evaluate(model, task, "test", trial.batch_size, trial.eval_examples, trial.by_length)
    if not math.isfinite(loss):
        return _Outcome(trial, device, reason=f"The test loss is {loss} after the last step.")
    if work.judge is None:
        return _Outcome(trial, device, history, loss)
    # Copied first: a judge may change the model, as by merging its adapters.
    weights = {name: value.detach().cpu().clone() for name, value in trained(model).items()}
    frozen = frozen_hash(model)
    scores, failure = _scores(work.judge, model, task)
    if failure is not None:
        failure = replace(failure, weights=weights, frozen=frozen)
    return _Outcome(trial, device, history, loss, scores, failure=failure)


def _scores(judge: Judge, model: nn.Module, task: Task) -> tuple[dict[str, Any] | None, _Failure | None]:
    """The judge's scores, in values of JSON, or what went wrong."""
    try:
        scores = judge(model, task)
        if not isinstance(scores, Mapping):
            raise TypeError(f"it gave a {type(scores).__name__}, but it must give numbers and texts by name")
        return {name: _score(name, value) for name, value in scores.items()}, None
    except Exception as error:
        return None, _Failure(f"{type(error).__name__}: {' '.join(str(error).split())}", traceback.format_exc())


def _score(name: Any, value: Any) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"it gave the name {name!r}, but names must be texts")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral) and is_number(int(value)):  # JSON cannot hold numpy's
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral):
        return float(value)
    raise TypeError(
        f"it gave {short_repr(value)}, a {type(value).__name__}, as {name!r}, but it must be a number within a "
        "float's range or a text, such as float(...) of it"
    )


def _judge_again(work: _Work, judge: Judge, stored: dict[str, Any], folder: Path) -> _Arrival:
    """The stored result of a trial with the judge's scores of the weights that were kept.

    Raises:
        ValueError: the file of the weights is damaged, or they are not those of this trial.
    """
    (trial,) = work.trials
    path = weights_path(folder, trial.key)
    with _alone():
        model = work.model()
        make_step(model, _task(work.task).loss, trial.method, trial)  # as it was when it was trained
        try:
            weights, note = load_tensors(path, {"key", "frozen"})
            if note != {"key": trial.key, "frozen": frozen_hash(model)}:
                raise ValueError("It is of another trial, or what is frozen comes out differently here.")
            if difference := mismatch(weights, trained(model)):
                raise ValueError(f"It does not fit the model: {difference}.")
        except ValueError as error:
            reason = str(error).removesuffix(".")
            raise ValueError(f"{path} cannot be judged ({reason}); delete it to train its trial again.") from None
        with torch.no_grad():
            for name, value in trained(model).items():
                value.copy_(weights[name])
        task = _task(work.task)
        scores, failure = _scores(judge, model, replace(task, loss=trial.computed(task.loss)))
    return _Arrival(stored | {"scores": scores, "reason": failure and failure.reason}, failure)


def _judge_error(failures: Mapping[str, _Failure], what_to_do: str) -> RuntimeError:
    """The error to raise when the judge has failed on some trials, whose keys are given."""
    key, first = next(iter(failures.items()))
    count = f"{len(failures)} trials, first on " if len(failures) > 1 else ""
    error = RuntimeError(f"The judge failed on {count}{key} ({first.words}); {shortened(what_to_do)}.")
    error.add_note(first.trace)
    return error


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(
        error
    )


def _keep(folder: Path, arrival: _Arrival) -> None:
    """Write a result; and what was trained too, while it waits to be judged."""
    key, failure = arrival.result["key"], arrival.failure
    # First, because losses are worth more than scores. On one line, because indenting takes ten times as long.
    write_json(folder / f"{key}.json", arrival.result, indent=None)
    if failure is None:
        weights_path(folder, key).unlink(missing_ok=True)
    elif failure.weights is not None:
        save_tensors(weights_path(folder, key), failure.weights, {"key": key, "frozen": failure.frozen})
