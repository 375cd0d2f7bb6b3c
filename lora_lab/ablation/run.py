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
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import joblib
import psutil
import torch
from joblib.externals.loky import BrokenProcessPool
from joblib.parallel import get_active_backend
from torch import nn

from lora_lab import checkpoint
from lora_lab.ablation import packed
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.halving import PAUSED, Halving, next_round
from lora_lab.ablation.packed import adapted_layers, common_settings, lora_of, refusal
from lora_lab.ablation.results import OUT_OF_MEMORY, STOPPED, Scores, read_results, table
from lora_lab.costs.fake import Factory, copy_sharing_weights, fake_copy
from lora_lab.costs.memory import Part, predict
from lora_lab.history import DivergedError, History
from lora_lab.system.files import as_path, check_writable, write_json
from lora_lab.system.provenance import bytes_of, commit, device_name, machine_info, version
from lora_lab.system.schema import Size, check, to_python
from lora_lab.system.wording import progress_bar
from lora_lab.task import Task
from lora_lab.train import evaluate, fit, in_autocast, make_step

Judge = Callable[[nn.Module, Task], Mapping[str, float | str]]
ModelOrFactory = nn.Module | Factory
TaskOrFactory = Task | Callable[[], Task]
_File = dict[str, Any]  # the content of a trial's file
_IN_THREADS = "in threads of one process, which share torch's random generators; use processes"
_BUSY = threading.Lock()  # held while this process runs a trial
_MOST_PACKED = 32  # larger packs gain little, and a kill loses the whole pack
# Of all trials of a pack on the CPU, unless the model is small: an hour or less for SmolLM2-135M.
_MOST_STEPS = 3000
_SMALL = 100_000  # numbers of a model of which the largest pack fits any machine, and takes minutes
_commit = functools.cache(commit)  # asked once: the code that runs does not change with the folder


def ablate(
    model_factory: ModelOrFactory,
    task: TaskOrFactory,
    trials: Sequence[Trial],
    folder: str | Path | None = None,
    *,
    n_jobs: int | None = None,
    engine: str = "auto",
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
        engine: "separate" runs each by :func:`lora_lab.fit`, "packed" many in one pass, "auto" packs what can be. Packs
            may take half of the memory that is free.
        judge: called with each trained model and the task. The numbers and texts by name that it returns are in the
            table as ``score_<name>``. Stored trials without scores are run anew. Give another judge another folder.
        progress: show a bar; default only where a person is looking.
        timeout_s: seconds without any trial ending after which to give up on the workers.
        halving: stops trials at learning rates that validation rules out (:mod:`lora_lab.ablation.halving`); a call
            without it runs them to the end. None is packed, and those that wait have checkpoints in ``folder/paused``.

    Raises:
        ValueError: a wrong value, a damaged file, a backend of threads, or trials that fit no model, pack or halving.
        RuntimeError: a worker makes another model or task, was ended by the system, or did not answer in time.
    """
    check(engine, Literal["auto", "separate", "packed"] if halving is None else Literal["auto", "separate"], "engine")
    engine = engine if halving is None else "separate"
    check(len(trials), Size, "The number of trials")
    folder = None if folder is None else as_path(folder, "folder")
    make = functools.partial(copy.deepcopy, model_factory) if isinstance(model_factory, nn.Module) else model_factory
    model, data = make(), _task(task)
    data.check_model(model)
    identity = {"task": data.fingerprint, "model": fingerprint(model)}
    requested = dict.fromkeys(replace(trial, **identity) for trial in trials)
    stored = read_results(folder, requested, judge is not None)
    results = {key: result for key, result in stored.items() if result["outcome"] != STOPPED}
    missing = [trial for trial in requested if trial.key not in results]
    if missing and folder is not None:
        check_writable(folder)
    workers = _count_workers(n_jobs) if missing else 1

    def run(model: nn.Module, trials: Sequence[Trial], *pause: Any) -> Generator[_File]:
        planned = plan(model, data, trials, engine, workers)
        jobs = [_Job(make, task, part, together, engine, _here(), judge, *pause) for part, together in planned]
        return _run_jobs(jobs, n_jobs, timeout_s if workers > 1 else None)

    ended = run(model, missing) if halving is None else _run_in_rounds(halving, requested, stored, folder, model, run)
    del model  # each process makes its own
    with progress_bar(len(requested), "trials", progress, unit="trial", done=len(results)) as bar, closing(ended):
        for result in ended:
            results[result["key"]] = result
            if folder is not None:  # on one line, because indenting takes ten times as long
                write_json(folder / f"{result['key']}.json", result, indent=None)
            bar.update()
    return table(results.values())


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model: its modules' classes and numbers, and its parameters and buffers, bit for bit."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        # Numbers such as a dropout's p; the mode is left out, because fit sets it.
        public = {key: value for key, value in vars(module).items() if key != "training" and key[0] != "_"}
        numbers = sorted(entry for entry in public.items() if isinstance(entry[1], int | float))
        digest.update(f"{name} {type(module).__name__} {numbers}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def _run_in_rounds(
    halving: Halving,
    trials: Iterable[Trial],
    stored: Mapping[str, _File],
    folder: Path | None,
    model: nn.Module,
    run: Callable[[nn.Module, Sequence[Trial], Path, int | None], Generator[_File]],
) -> Generator[_File]:
    """Yield the result of each trial of a sweep with halving as it ends, and last of those that were stopped.

    Decisions depend only on losses, so a sweep that is started again repeats them.
    """
    halving.check(trials)
    results = dict(stored)
    with nullcontext(folder) if folder is not None else TemporaryDirectory() as place:
        paused = Path(place).resolve() / PAUSED  # workers may run elsewhere
        due, stopped = next_round(halving, trials, results)
        while due:
            for until, waiting in due.items():
                with closing(run(model, waiting, paused, until)) as ended:
                    for result in ended:
                        results[result["key"]] = result
                        if result["outcome"] != PAUSED:
                            yield result  # the caller writes it
                            shutil.rmtree(paused / result["key"], ignore_errors=True)
            due, stopped = next_round(halving, trials, results)
        for trial, reason in stopped.items():
            yield (results.get(trial.key) or _file(trial, model, STOPPED)) | {"outcome": STOPPED, "reason": reason}
            shutil.rmtree(paused / trial.key, ignore_errors=True)
        with suppress(OSError):  # there is none, or trials of another sweep are still paused
            paused.rmdir()


# Which trials go together


def plan(
    model: nn.Module, task: Task, trials: Sequence[Trial], engine: str, workers: int
) -> list[tuple[list[Trial], bool]]:
    """Return the trials in jobs, and whether each job is a pack.

    Raises:
        ValueError: ``engine`` is "packed" and a trial cannot be packed, no target counts in the examples of the test
            part, or as for :func:`_check_steps`.
    """
    _check_steps(model, task, trials)
    for limit in {trial.eval_examples for trial in trials}:
        task.require_targets("test", limit)  # of which each trial's result is; fit checks the other parts
    if engine == "separate":
        return [([trial], False) for trial in trials]
    groups = {}
    for trial in trials:
        groups.setdefault(common_settings(trial), []).append(trial)
    jobs = []
    for group in groups.values():
        reason = refusal(model, task, group[0])
        if reason is None:
            most = min(_count_fitting(model, task, group, workers), _MOST_PACKED)
            packs = share_work(model, group, max(min(workers, len(group)), math.ceil(len(group) / most)), most)
            jobs += [(pack, engine == "packed" or len(pack) > 1) for pack in packs]
        elif engine == "packed":
            raise ValueError(f"engine is 'packed', but {group[0].method} cannot be packed: {reason}")
        else:
            jobs += [([trial], False) for trial in group]
    return jobs


def _check_steps(model: nn.Module, task: Task, trials: Sequence[Trial]) -> None:
    """Find out, before hours of training, whether each kind of trial has the step that it asks for.

    Raises:
        ValueError: the lean step or gradient checkpointing does not fit the model or a method.
    """
    kinds = {(type(trial.method), trial.gradient_checkpointing, trial.lean): trial for trial in trials}
    for trial in kinds.values():
        if trial.gradient_checkpointing or trial.lean is not None:
            with fake_copy(model, next(model.parameters()).device) as twin:
                make_step(twin, task.loss, trial.method, trial)


def share_work(model: nn.Module, trials: Sequence[Trial], count: int, most: int) -> list[list[Trial]]:
    """Cut trials into packs that take about the same time.

    Trials of similar rank go together, for they pad each other least. What a trial costs is counted in multiply-adds
    for one row of an adapted layer's input: twice in * out for the frozen weight, 3 rank (in + out) for the adapter.

    Args:
        model: what they are to be trained on.
        trials: at least one.
        count: how many packs, at most one for each trial.
        most: the most trials of a pack; ``count`` packs must be able to hold all.
    """
    trials = sorted(trials, key=lambda trial: lora_of(trial).rank, reverse=True)
    layers = adapted_layers(model, lora_of(trials[0])).values()
    frozen = sum(2 * layer.out_features * layer.in_features for layer in layers)
    sides = sum(layer.out_features + layer.in_features for layer in layers)
    work = [0, *itertools.accumulate(frozen + 3 * lora_of(trial).rank * sides for trial in trials)]  # of the first
    cuts = [0]
    for left in range(count - 1, 0, -1):  # packs still to be cut off
        ideal = min(range(len(work)), key=lambda cut: abs(work[cut] - work[-1] * (count - left) / count))
        lowest, highest = max(cuts[-1] + 1, len(trials) - left * most), min(cuts[-1] + most, len(trials) - left)
        cuts.append(min(max(ideal, lowest), highest))
    return [trials[low:high] for low, high in itertools.pairwise([*cuts, len(trials)])]


def _count_fitting(model: nn.Module, task: Task, trials: Sequence[Trial], workers: int) -> int:
    """Return how many trials fit into half of the free memory, shared among the workers.

    The frozen weights count once, all else for each trial. On the CPU the trials also fit into an hour or so, which is
    what an interrupted pack loses.
    """
    if sum(parameter.numel() for parameter in model.parameters()) <= _SMALL:
        return _MOST_PACKED
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    budget = int(free) // 2 // workers
    widest = max(trials, key=lambda trial: lora_of(trial).rank)
    rows = torch.arange(widest.batch_size) % len(task.train)  # (batch,)
    lean = widest.lean
    bill = predict(
        model,
        widest.method,
        batch=(task.train.inputs[rows], task.train.targets[rows]),  # padded in full: no batch is longer
        loss=task.loss,
        clip=widest.clip,
        gradient_checkpointing=widest.gradient_checkpointing,
        lean=None if lean is None else replace(lean, threads=1),  # as a pack computes
    )
    shared = bill.parts.get(Part.FROZEN, 0)
    most = (budget - shared) // (bill.peak_bytes - shared)
    return max(1, most if device.type != "cpu" else min(most, _MOST_STEPS // widest.steps))


# Where trials run


def _run_jobs(jobs: Sequence[_Job], n_jobs: int | None, timeout_s: float | None) -> Generator[_File]:
    """Yield the trials' results as they end."""
    # One job at a time: joblib would batch quick ones, and a killed worker would lose more than it is running.
    options = {"return_as": "generator_unordered", "batch_size": 1, "timeout": timeout_s}
    parallel: Any = joblib.Parallel(n_jobs, **options)
    try:
        with closing(parallel(joblib.delayed(_run)(job) for job in jobs)) as ended:
            for results in ended:
                yield from results
    except (TimeoutError, multiprocessing.TimeoutError, BrokenProcessPool) as error:
        if timeout_s is None:  # raised by a trial itself
            raise
        what = f"No trial ended for {timeout_s:g} s, so a worker may hang; look at the workers, or give more timeout_s"
        if isinstance(error, BrokenProcessPool):
            what = "The system ended a worker, most likely for lack of memory; use fewer n_jobs"
        raise RuntimeError(f"{what}. What has ended is kept: start the sweep again to go on.") from error


def _count_workers(n_jobs: int | None) -> int:
    """Return how many trials run at a time, after a check that they do not run in threads of one process."""
    backend, _ = get_active_backend()
    # On a Dask cluster it waits for the first worker. (Joblib has no annotations: checkers infer narrower ones.)
    workers = joblib.effective_n_jobs(n_jobs)  # pyright: ignore[reportArgumentType]
    if getattr(backend, "uses_threads", False) and workers > 1:
        raise ValueError(f"{type(backend).__name__} runs trials {_IN_THREADS}, such as backend='loky'.")
    return workers


def _here() -> tuple[str, int]:
    return platform.node(), os.getpid()


def _check_same(what: str, made: str, expected: str | None) -> None:
    """Raise RuntimeError if what was made here, of that fingerprint, is not the sweep's."""
    if made != expected:
        raise RuntimeError(
            f"The {what} made here ({':'.join(map(str, _here()))}) has the fingerprint {made}, not the sweep's, "
            f"{expected}; seed what is random in it, and use the same files and versions everywhere."
        )


@dataclass(frozen=True)
class _Job:
    """What is sent to a worker: a trial, or several as a pack, and what they need.

    It is one object on purpose: joblib's Dask backend sends large arguments ahead and keeps them on workers, where a
    kill can lose them, whereas the content of one small object is sent with each job.
    """

    make: Factory
    task: TaskOrFactory
    trials: Sequence[Trial]
    together: bool  # as a pack
    engine: str
    home: tuple[str, int]
    judge: Judge | None = None
    paused: Path | None = None  # of the checkpoints of trials that pause, in a folder for each
    until: int | None = None  # the step after which to pause


class _PausedError(Exception):
    """A trial has come to where it is to pause."""


@functools.lru_cache(maxsize=1)
def _call_factory(factory: Callable[[], Task]) -> Task:
    return factory()


def _task(task: TaskOrFactory) -> Task:
    return task if isinstance(task, Task) else _call_factory(task)


def _run(job: _Job) -> list[_File]:
    """Run a job in this process, with one thread of torch if it is a worker's, and return its results."""
    if not _BUSY.acquire(blocking=False):
        raise RuntimeError(f"Two trials were started at the same time {_IN_THREADS} with one trial at a time each.")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads if _here() == job.home else 1)
        task = _task(job.task)
        _check_same(f"task {task.name!r}", task.fingerprint, job.trials[0].task)
        return _attempt(job, task, job.trials, job.together)
    finally:
        torch.set_num_threads(threads)
        _BUSY.release()


# Running


def _file(trial: Trial, model: nn.Module, outcome: str, history: History | None = None, **what: Any) -> _File:
    """Return what the file of a trial holds: how it ended, and where."""
    device = next(model.parameters()).device
    here = {"device": device_name(device), "lora_lab": version(), "commit": _commit(), "engine": "not begun"}
    return {
        "key": trial.key,
        "trial": trial.to_dict(),
        "outcome": outcome,
        "reason": None,
        "history": history and dict(vars(history)),
        "test_loss": None,
        "scores": None,
        "provenance": machine_info(device) | here | {"date": datetime.now(UTC).isoformat(timespec="seconds")},
        **what,
    }


def _attempt(job: _Job, task: Task, trials: Sequence[Trial], together: bool) -> list[_File]:
    """Run the trials of a job.

    A pack that does not fit into memory is split in two; the trials of one that cannot be packed run one by one.
    """
    model = job.make()
    _check_same("model", fingerprint(model), trials[0].model)
    ended, parts = [], []
    try:
        ended = _train_pack(job, model, task, trials) if together else [_train_one(job, model, task, trials[0])]
    except packed.PackingError:  # only the attempt shows that they cannot be packed
        if job.engine == "packed":
            raise
        parts, together = [[trial] for trial in trials], False
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        if half := len(trials) // 2:
            parts = [trials[:half], trials[half:]]
        else:
            ended = [_file(trials[0], model, "failed", reason=f"{OUT_OF_MEMORY}: {error}")]
    if not parts:
        engine = f"pack of {len(trials)}" if together else "separate"
        return [result | {"provenance": result["provenance"] | {"engine": engine}} for result in ended]
    del model  # the error is gone too, with the tensors that its frames held
    return [result for part in parts for result in _attempt(job, task, part, together)]


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out; on the CPU torch raises a plain RuntimeError."""
    on_cpu = "DefaultCPUAllocator: can't allocate" in str(error)
    return on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _train_pack(job: _Job, model: nn.Module, task: Task, trials: Sequence[Trial]) -> list[_File]:
    """Train trials in one pass, and judge each on a model of its own, which shares the frozen weights."""
    ended = []
    for trial, result in zip(trials, packed.fit_packed(model, task, trials), strict=True):
        if result.error is not None:
            ended.append(_file(trial, model, "failed", reason=str(result.error)))
            continue
        student = copy_sharing_weights(model)
        make_step(student, task.loss, trial.method, trial)
        student.load_state_dict(result.adapter, strict=False)  # which has the frozen weights already
        ended.append(_judge(job, trial, student, task, result.history))
    return ended


def _train_one(job: _Job, model: nn.Module, task: Task, trial: Trial) -> _File:
    """Train a trial, from where it has paused if it has, to where it is to pause or to the end."""
    place, until, options = job.paused and job.paused / trial.key, job.until, {}

    def pause(row: Mapping[str, Any]) -> None:
        if row["step"] == until:  # its checkpoint has been written
            raise _PausedError

    if place is not None:
        options = {"checkpoint_dir": place, "checkpoint_every": until or trial.steps, "on_row": pause}
        stored = checkpoint.read_history(place)
        if until is not None and stored is not None and len(stored.rows) > until:  # before an interrupt
            return _file(trial, model, PAUSED, stored)
    try:
        history = fit(model, task, trial.method, config=trial, progress=False, **options)
    except _PausedError:
        return _file(trial, model, PAUSED, checkpoint.read_history(place))
    except DivergedError as error:
        return _file(trial, model, "failed", reason=str(error))
    return _judge(job, trial, model, task, history)


def _judge(job: _Job, trial: Trial, model: nn.Module, task: Task, history: History) -> _File:
    """Return the file of a trial that has been trained to the end, with its test loss and the judge's scores."""
    task = replace(task, loss=in_autocast(task.loss, trial.autocast))
    loss = evaluate(model, task, "test", trial.batch_size, trial.eval_examples, trial.by_length)
    if not math.isfinite(loss):
        return _file(trial, model, "failed", reason=f"The test loss is {loss} after the last step.")
    if job.judge is None:
        return _file(trial, model, "done", history, test_loss=loss)
    scores = {name: to_python(value) for name, value in job.judge(model, task).items()}  # JSON cannot hold numpy's
    scores = check(scores, Scores, "what the judge gave")
    return _file(trial, model, "done", history, test_loss=loss, scores=scores)
