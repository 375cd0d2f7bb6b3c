"""Run many trials: in this process, in joblib's workers, or on a Dask cluster, packed or one by one.

    frame = ablate(DigitsMLP, task, Grid(ranks=[1, 2, 4], lrs=[1e-2], seeds=range(5), steps=200), "runs/ranks")

A trial that has ended is one file, ``<key>.json``, which appears whole or not at all. What is there is not run again,
so a sweep can be stopped at any moment and goes on when it is called once more, with more trials if need be; folders
of several machines are merged by copying their files into one. Where the trials run is the caller's choice: inside
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
import reprlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import joblib
import psutil
import torch
from joblib.externals.loky import BrokenProcessPool
from joblib.parallel import get_active_backend
from torch import Tensor, nn

import lora_lab
from lora_lab.ablation import packed
from lora_lab.ablation.grid import Trial
from lora_lab.device import facts
from lora_lab.files import check_writable, read_json, write_json
from lora_lab.lora import adapted_layers
from lora_lab.memory import predict
from lora_lab.records import commit, device_name
from lora_lab.rehearse import Factory, copied
from lora_lab.tasks.base import Task, bytes_of
from lora_lab.train import (
    DivergedError,
    History,
    evaluate,
    fit,
    frozen_hash,
    is_number,
    load_tensors,
    misfit,
    progress_bar,
    save_tensors,
    trained,
)

SCHEMA = 1
# Columns of the table: losses, how a trial went, and where it ran; all others say what it was.
LOSSES = ("train_loss", "validation_loss", "off_domain_loss", "gap", "test_loss")
OUTCOME = ("outcome", "reason", "step", *LOSSES, "seconds", "trainable_parameters")
SCORE = "score_"  # what a column begins with that the caller's judge gave
PROVENANCE = ("engine", "device", "python", "torch", "lora_lab", "commit", "date")
Judge = Callable[[nn.Module, Task], Mapping[str, float | str]]
_MOST_PACKED = 32  # the gain of a pack flattens long before, and a kill loses the whole pack
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
):
    """Run the trials that the folder does not hold yet, and return all of them as a table.

    A trial that diverges or runs out of memory is stored as "failed", with the reason, and the others go on; delete
    its file to try it again. Any other error stops the sweep, and so does Ctrl-C: what has ended by then is kept.

    An error of the caller's judge comes after a training that may have taken hours, so no training is lost by it: the
    trial's losses are stored, with the error as their reason; what was trained goes into ``<key>.safetensors`` beside
    them; the other trials go on; and in the end the first error is raised. The next call with a judge has it judge
    these weights, in this process and without training, and removes the file. (An adapter's is small; that of full
    fine-tuning is as large as the model.)

    Args:
        model_factory: makes the model that every trial starts from, the same each time, on the device where it is
            to be trained; or such a model, which is copied for each trial and left as it is. To workers the model
            travels with every trial; a function that can be imported there travels as its name.
        task: data and loss; or a function that makes it, which is called once in each process.
        trials: a :class:`~lora_lab.ablation.grid.Grid` or a list of trials. Repeats are run once.
        folder: where results are kept, one file a trial; None keeps none, so that nothing outlives an interrupt.
        n_jobs: processes; None is one, this one, or what the caller's ``joblib.parallel_config`` says. Each worker
            computes with one torch thread.
        engine: "apart" runs each trial with :func:`lora_lab.fit`, "packed" many in one pass
            (:mod:`lora_lab.ablation.packed`), "auto" packs what can be packed and runs the rest apart.
        budget_bytes: memory for one pack, by :func:`lora_lab.memory.predict`; default half of what is free on this
            machine, shared among the workers.
        judge: called with each trained model and the task; what it returns (numbers and texts by name) is kept with
            the trial's result, and is in the table as ``score_<name>``. Stored trials with neither scores nor
            weights are run anew; whose scores they are is not asked, so give another judge another folder.
        progress: show a bar; default only where a person is looking.
        timeout_s: how long to wait for workers while no trial ends, in seconds, before it is an error; default a
            day. It ends the wait for a worker that joined a cluster later and cannot answer.

    Returns:
        The DataFrame that :func:`load` describes, of these trials alone.

    Raises:
        ValueError: no trials, a value that is not known, a model_factory that makes no model, a trial of another
            task or model, a damaged file, a backend of threads, or ``engine="packed"`` and a trial that cannot be
            packed.
        RuntimeError: a worker cannot import lora_lab, has another version of it, makes another model or task, was
            ended by the system, or kept silent for ``timeout_s``; or the judge failed, or gave something else than
            numbers and texts by name (the traceback is in the error's notes; without a folder it is raised at once).
    """
    if engine not in ("auto", "apart", "packed"):
        raise ValueError(f"engine is {engine!r}, but it must be 'auto', 'apart' or 'packed'.")
    if len(trials) == 0:
        raise ValueError("There are no trials to run; give a Grid or a list with at least one Trial.")
    folder = None if folder is None else Path(folder)
    make = functools.partial(copy.deepcopy, model_factory) if isinstance(model_factory, nn.Module) else model_factory
    model, own_task = make() if callable(make) else make, _task(task)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model_factory gave a {type(model).__name__}, but it must be a torch.nn.Module, or a function that makes "
            "one anew at every call."
        )
    identity = {"task": own_task.fingerprint, "model": fingerprint(model)}
    wanted = dict.fromkeys(trial.bound(**identity) for trial in trials)
    results, unjudged = _stored(folder, wanted, judge is not None)
    left = [trial for trial in wanted if trial.key not in results and trial.key not in unjudged]
    works, timeout = [], None
    if left:
        if folder is not None:
            check_writable(folder)
        workers, timeout = _workers(n_jobs, timeout_s)
        plan = _plan(model, own_task, left, engine, budget_bytes, workers)
        works = [_Work(make, task, parcel, together, engine, _here(), judge) for parcel, together in plan]
    del model  # each process makes its own
    again = (
        _judge_again(_Work(make, task, [trial], False, engine, _here(), judge), unjudged[trial.key], folder)
        for trial in wanted
        if trial.key in unjudged
    )
    failures = []
    bar = progress_bar(len(wanted), "trials", progress, unit="trial", done=len(results))
    with bar, closing(_results(works, n_jobs, timeout)) as arriving:
        for arrival in itertools.chain(again, arriving):
            results[arrival.result["key"]] = arrival.result
            if arrival.failure is not None:
                failures.append(arrival)
            if folder is not None:
                _keep(folder, arrival)
            elif failures:
                raise _judge_error(failures, "mend it, and give a folder, so that no training is lost by it")
            bar.update()
    if failures:
        raise _judge_error(failures, f"mend it and start the sweep again: what was trained is kept in {folder}")
    return _frame(results.values())


def load(folder: str | Path):
    """The table of all results in a folder, without running anything.

    Returns:
        A pandas DataFrame with one row for each trial and evaluation step, sorted by method, rank, learning rate,
        seed and step. Columns: ``key``; ``method``, ``rank``, ``alpha`` and what else the method sets; the trial's
        options; ``outcome`` ("done" or "failed") and, if failed or not judged, the ``reason``; ``step``;
        ``train_loss``, ``validation_loss``, ``off_domain_loss`` and ``gap`` (see
        :meth:`lora_lab.train.History.curve`) at that step, and after the last one ``test_loss`` and what the caller's
        judge gave; ``seconds``, the time of training up to that step; ``trainable_parameters``; and where and when it
        ran (``engine``, ``device``, versions, ``commit``, ``date``). A failed trial has one row, without step and
        losses.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no result.
        ValueError: a file is damaged or no result.
    """
    # A killed write leaves a hidden file.
    paths = sorted(path for path in Path(folder).glob("*.json") if not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no results (files <key>.json); run ablate with this folder first.")
    return _frame([_read(path) for path in paths])


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


# Where trials run


def _workers(n_jobs: int | None, timeout_s: float) -> tuple[int, float | None]:
    """How many trials run at a time, and how long to wait for one (None in this process, where there is no waiting).

    First it makes sure that trials can run there at all.
    """
    backend, _ = get_active_backend()
    workers = joblib.effective_n_jobs(n_jobs)  # on a Dask cluster it waits for the first worker
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
    """Ask every worker of a Dask cluster for its lora_lab: without it, joblib would wait for results for ever."""

    def version() -> str:
        # Not one of this module's functions by name: a worker without lora_lab could not even load it.
        import importlib

        importlib.import_module("lora_lab.ablation.run")
        return importlib.import_module("lora_lab").__version__

    try:
        found = client.run(version)
    except Exception as error:
        raise RuntimeError(
            f"A worker of the Dask cluster cannot import lora_lab ({type(error).__name__}: {error}); install the same "
            "lora_lab on every worker, and start the sweep again."
        ) from error
    for worker, theirs in found.items():
        if theirs != lora_lab.__version__:
            raise RuntimeError(
                f"Worker {worker} has lora_lab {theirs}, but this process has {lora_lab.__version__}; install the same."
            )
    for worker, threads in client.nthreads().items():
        if threads > 1:
            raise ValueError(
                f"Worker {worker} runs {threads} trials at a time in threads of one process, which share torch's "
                "random generators, so the numbers would be wrong; start workers with --nthreads 1."
            )


def _results(works: Sequence[_Work], n_jobs: int | None, timeout_s: float | None) -> Iterator[_Arrival]:
    """The trials' results as they end."""
    # One parcel at a time: joblib would put quick ones together, and a killed worker would lose more than it runs.
    parallel = joblib.Parallel(n_jobs, return_as="generator_unordered", batch_size=1, timeout=timeout_s)
    try:
        with closing(parallel(joblib.delayed(_run)(work) for work in works)) as parcels:
            for parcel in parcels:
                yield from parcel
    except (TimeoutError, multiprocessing.TimeoutError):
        if timeout_s is None:  # it is a trial's own
            raise
        raise RuntimeError(
            f"No trial ended for {timeout_s:g} s, so a worker may have lost its way; look at the workers, or give a "
            "longer timeout_s. What has ended is kept: start the sweep again to go on."
        ) from None
    except BrokenProcessPool as error:
        raise RuntimeError(
            "The system ended a worker, most likely for lack of memory; use fewer n_jobs or a smaller budget_bytes. "
            "What has ended is kept: start the sweep again to go on."
        ) from error


def _here() -> tuple[str, int]:
    return platform.node(), os.getpid()


@dataclass(frozen=True)
class _Work:
    """What travels to a worker: a parcel of trials, and what they need.

    It is one object on purpose: joblib's Dask backend sends large arguments ahead and keeps them on workers, where a
    kill can lose them, while what is inside a small object travels with each trial.
    """

    make: Factory
    task: Task | Callable[[], Task]
    trials: Sequence[Trial]
    together: bool  # as a pack
    engine: str
    home: tuple[str, int]
    judge: Judge | None = None

    def model(self) -> nn.Module:
        """A fresh model, and it is the sweep's.

        Raises:
            RuntimeError: it is another one.
        """
        model = self.make()
        if (found := fingerprint(model)) != self.trials[0].model:
            raise RuntimeError(
                f"The model made here ({':'.join(map(str, _here()))}) has the fingerprint {found}, not the sweep's, "
                f"{self.trials[0].model}; seed its weights, and use the same files and versions everywhere."
            )
        return model


@functools.lru_cache(maxsize=1)
def _made(factory: Callable[[], Task]) -> Task:
    return factory()


def _task(task: Task | Callable[[], Task]) -> Task:
    return task if isinstance(task, Task) else _made(task)


def _run(work: _Work) -> list[_Arrival]:
    """Run a parcel of trials in this process, and return their results."""
    with _alone(), _threads(None if _here() == work.home else 1):
        task = _task(work.task)
        if (found := task.fingerprint) != work.trials[0].task:
            raise RuntimeError(
                f"The task {task.name!r} made here ({':'.join(map(str, _here()))}) has the fingerprint {found}, "
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
    """What went wrong when a trial was judged, and all that is needed to judge it once more."""

    words: str
    trace: str
    weights: dict[str, Tensor] | None = None  # None: they are in the folder already
    frozen: str = ""  # the hash of all that was not trained

    @property
    def reason(self) -> str:
        return f"The judge failed ({self.words})."


@dataclass
class _Arrival:
    """What comes back from where a trial ran: its file's content, and what is for the caller alone."""

    result: dict[str, Any]
    failure: _Failure | None = None


@dataclass
class _Ended:
    """How a trial ended: with a history and a test loss, or for a reason."""

    trial: Trial
    device: torch.device
    history: History | None = None
    test_loss: float | None = None
    scores: Mapping[str, float | str] | None = None
    reason: str | None = None
    failure: _Failure | None = None  # of its judge

    def result(self, engine: str, seconds: float) -> dict[str, Any]:
        """What its file holds."""
        described = facts(self.device)
        return {
            "schema": SCHEMA,
            "key": self.trial.key,
            "trial": self.trial.to_dict(),
            "outcome": "done" if self.reason is None else "failed",
            "reason": self.reason if self.failure is None else self.failure.reason,
            "history": None if self.history is None else asdict(self.history),
            "test_loss": self.test_loss,
            "scores": self.scores,
            "provenance": {
                **described,
                "device": device_name(self.device),
                "lora_lab": lora_lab.__version__,
                "commit": _commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "engine": engine,
                "seconds": seconds,
            },
        }


_commit = functools.cache(commit)  # asked once: the code that runs does not change with the folder


def _attempt(work: _Work, task: Task, trials: Sequence[Trial], together: bool) -> list[_Arrival]:
    """Run trials as one parcel; a pack that turns out too large for the memory, or no pack at all, is parted."""
    started = time.perf_counter()
    model = work.model()
    device = next(model.parameters()).device
    try:
        ended = _packed(work, model, task, trials) if together else [_apart(work, model, task, *trials)]
    except packed.PackingError:  # it takes the attempt to show that they cannot be packed
        if work.engine == "packed":
            raise
        ended, parts, together = None, [[trial] for trial in trials], False
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        half = len(trials) // 2
        ended, parts = None, [trials[:half], trials[half:]]
        if half == 0:
            ended = [_Ended(*trials, device, reason=f"out of memory: {error}")]
    if ended is not None:
        engine = f"pack of {len(trials)}" if together else "apart"
        share = (time.perf_counter() - started) / len(trials)
        return [_Arrival(one.result(engine, share), one.failure) for one in ended]
    del model  # and the error, with the tensors that its frames held, is gone too
    return [arrival for part in parts for arrival in _attempt(work, task, part, together)]


def _apart(work: _Work, model: nn.Module, task: Task, trial: Trial) -> _Ended:
    device = next(model.parameters()).device
    try:
        history = fit(model, task, trial.method, **trial.options, progress=False)
    except DivergedError as error:
        return _Ended(trial, device, reason=str(error))
    return _judged(work, trial, model, task, history)


def _packed(work: _Work, model: nn.Module, task: Task, trials: Sequence[Trial]) -> list[_Ended]:
    runs = [packed.Run(trial.method, trial.lr, trial.seed) for trial in trials]
    options = {name: value for name, value in trials[0].options.items() if name not in ("lr", "seed")}
    ended = []
    for trial, result in zip(trials, packed.fit_packed(model, task, runs, **options, progress=False), strict=True):
        if result.error is not None:
            ended.append(_Ended(trial, next(model.parameters()).device, reason=str(result.error)))
            continue
        student = copied(model)  # shares the frozen weights
        trial.method.prepare(student, trial.seed)
        with torch.no_grad():
            for name, layer in adapted_layers(student).items():
                for part in layer.parts:
                    getattr(layer, part).copy_(result.adapter[f"{name}.{part}"])  # (rank, in) or (out, rank)
        ended.append(_judged(work, trial, student, task, result.history))
    return ended


def _judged(work: _Work, trial: Trial, model: nn.Module, task: Task, history: History) -> _Ended:
    device = next(model.parameters()).device
    loss = evaluate(model, task, "test", trial.batch_size, trial.eval_examples)
    if not math.isfinite(loss):
        return _Ended(trial, device, reason=f"The test loss is {loss} after the last step.")
    if work.judge is None:
        return _Ended(trial, device, history, loss)
    # Before it is judged: a judge may change the model, as by merging its adapters.
    weights = {name: value.detach().cpu().clone() for name, value in trained(model).items()}
    frozen = frozen_hash(model)
    scores, failure = _scores(work.judge, model, task)
    if failure is not None:
        failure = replace(failure, weights=weights, frozen=frozen)
    return _Ended(trial, device, history, loss, scores, failure=failure)


def _scores(judge: Judge, model: nn.Module, task: Task) -> tuple[dict[str, Any] | None, _Failure | None]:
    """What the judge says, in values of JSON, or what went wrong."""
    try:
        said = judge(model, task)
        if not isinstance(said, Mapping):
            raise TypeError(f"it gave a {type(said).__name__}, but it must give numbers and texts by name")
        return {name: _score(name, value) for name, value in said.items()}, None
    except Exception as error:
        return None, _Failure(f"{type(error).__name__}: {' '.join(str(error).split())}", traceback.format_exc())


def _score(name: Any, value: Any) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"it gave the name {name!r}, but names must be texts")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Real):  # numpy's are no values of JSON
        return int(value) if isinstance(value, Integral) else float(value)
    raise TypeError(
        f"it gave {reprlib.repr(value)}, a {type(value).__name__}, as {name!r}, but it must be a number or a text, "
        "such as float(...) of it"
    )


def _judge_again(work: _Work, stored: dict[str, Any], folder: Path) -> _Arrival:
    """The stored result of a trial with what the judge says of the weights that were kept.

    Raises:
        ValueError: the file of the weights is damaged, or they are not those of this trial.
    """
    (trial,) = work.trials
    path = _weights(folder, trial.key)
    with _alone():
        model = work.model()
        trial.method.prepare(model, trial.seed)
        try:
            weights, note = load_tensors(path, {"key", "frozen"})
            if note != {"key": trial.key, "frozen": frozen_hash(model)}:
                raise ValueError("It is of another trial, or what is frozen comes out differently here.")
            if found := misfit(weights, trained(model)):
                raise ValueError(f"It does not fit the model: {found}.")
        except ValueError as error:
            reason = str(error).removesuffix(".")
            raise ValueError(f"{path} cannot be judged ({reason}); delete it to train its trial again.") from None
        with torch.no_grad():
            for name, value in trained(model).items():
                value.copy_(weights[name])
        scores, failure = _scores(work.judge, model, _task(work.task))
    return _Arrival(stored | {"scores": scores, "reason": failure and failure.reason}, failure)


def _judge_error(failures: Sequence[_Arrival], what_to_do: str) -> RuntimeError:
    """The error that says what the judge did."""
    first = failures[0]
    many = f"{len(failures)} trials, first on " if len(failures) > 1 else ""
    error = RuntimeError(f"The judge failed on {many}{first.result['key']} ({first.failure.words}); {what_to_do}.")
    error.add_note(first.failure.trace)
    return error


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(
        error
    )


# Packing


def _plan(
    model: nn.Module, task: Task, trials: Sequence[Trial], engine: str, budget_bytes: int | None, workers: int
) -> list[tuple[list[Trial], bool]]:
    """The trials in parcels, and for each whether it is packed."""
    if engine == "apart":
        return [([trial], False) for trial in trials]
    refusals: dict[str, str | None] = {}
    groups: dict[str, list[Trial]] = {}
    alone = []
    for trial in trials:
        method = str(trial.method)
        if method not in refusals:
            refusals[method] = packed.refusal(model, task, trial.method)
        if refusals[method] is None:
            groups.setdefault(_agreement(trial), []).append(trial)
        elif engine == "auto":
            alone.append(([trial], False))
        else:
            raise ValueError(f"engine is 'packed', but {method} cannot be packed: {refusals[method]}")
    parcels = []
    for group in groups.values():
        most = min(_fitting(model, task, group, budget_bytes, workers), _MOST_PACKED)
        parcels += packed.shares(model, group, max(min(workers, len(group)), math.ceil(len(group) / most)), most)
    return [(parcel, engine == "packed" or len(parcel) > 1) for parcel in parcels] + alone


def _agreement(trial: Trial) -> str:
    """What trials of one pack have in common: all but rank, alpha, learning rate and seed."""
    content = trial.to_dict()
    method = {name: value for name, value in content["method"].items() if name not in ("rank", "alpha")}
    return str(sorted({**content, "method": sorted(method.items()), "lr": None, "seed": None}.items()))


def _fitting(model: nn.Module, task: Task, trials: Sequence[Trial], budget_bytes: int | None, workers: int) -> int:
    """How many trials fit into the budget: the frozen weights count once, the rest for each trial."""
    device = next(model.parameters()).device
    if budget_bytes is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        budget_bytes = free // 2 // workers
    widest = max(trials, key=lambda trial: trial.method.rank)
    rows = torch.arange(widest.batch_size) % len(task.train)  # (batch,)
    batch = task.train.inputs[rows], task.train.targets[rows]  # with all padding: no batch is longer
    bill = predict(model, widest.method, batch=batch, loss=task.loss, clip=widest.clip)
    shared = bill.parts.get("frozen weights", 0)
    return max(1, (budget_bytes - shared) // (bill.peak_bytes - shared))


# Files and the table


def _stored(
    folder: Path | None, trials: Sequence[Trial], judged: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The results that the folder holds already, by key, and those that wait to be judged, with their weights.

    If scores are asked for, a result that has neither scores nor weights is passed over.
    """
    if folder is None:
        return {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {trial.key: folder / f"{trial.key}.json" for trial in trials}
    found = {key: _read(path) for key, path in paths.items() if path.is_file()}
    if not judged:
        return found, {}
    whole = {key: one for key, one in found.items() if one["scores"] is not None or one["outcome"] == "failed"}
    waiting = {key: one for key, one in found.items() if key not in whole and _weights(folder, key).is_file()}
    return whole, waiting


def _keep(folder: Path, arrival: _Arrival) -> None:
    """Write a result; and what was trained too, as long as it waits to be judged."""
    key, failure = arrival.result["key"], arrival.failure
    write_json(folder / f"{key}.json", arrival.result)  # first: the losses are worth more than the scores
    if failure is None:
        _weights(folder, key).unlink(missing_ok=True)
    elif failure.weights is not None:
        save_tensors(_weights(folder, key), failure.weights, {"key": key, "frozen": failure.frozen})


def _weights(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _read(path: Path) -> dict[str, Any]:
    """One result.

    Raises:
        ValueError: the file is damaged, of another schema, or not the result of the trial that it is named after.
    """
    advice = "delete it to run its trial again, or move it away if it is no result of ablate"
    try:
        result = read_json(path)
    except ValueError:
        raise ValueError(f"{path} is damaged: it is not JSON; {advice}.") from None
    expected = {"schema", "key", "trial", "outcome", "reason", "history", "test_loss", "scores", "provenance"}
    if isinstance(result, dict):
        result.setdefault("scores", None)  # of before there were any
    if not isinstance(result, dict) or set(result) != expected or result["schema"] != SCHEMA:
        raise ValueError(f"{path} is not a result in this version's format (schema {SCHEMA}); {advice}.")
    try:
        trial = Trial.from_dict(result["trial"])
        key = trial.key
    except ValueError as error:
        reason = str(error).removesuffix(".")
        raise ValueError(f"{path} cannot be read: {reason}; if that is no help, {advice}.") from None
    if not path.stem == result["key"] == key:
        raise ValueError(f"{path} holds trial {key}, which is not what its name and key say; {advice}.")
    try:
        _check(result, trial)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {str(error).removesuffix('.')}; {advice}.") from None
    return result


def _check(result: dict[str, Any], trial: Trial) -> None:
    """Check all of a result but its trial.

    Raises:
        ValueError: it is not what a trial's end looks like.
    """
    if not isinstance(result["provenance"], dict):
        raise ValueError(f"provenance is {reprlib.repr(result['provenance'])}, but it must be an object")
    reason, scores = result["reason"], result["scores"]
    if result["outcome"] == "failed":
        if not isinstance(reason, str) or any(result[name] is not None for name in ("history", "test_loss", "scores")):
            raise ValueError("a trial that failed must have a reason, and neither history, test_loss nor scores")
        return
    if result["outcome"] != "done":
        raise ValueError(f"outcome is {reprlib.repr(result['outcome'])}, but it must be 'done' or 'failed'")
    if reason is not None and not isinstance(reason, str):
        raise ValueError(f"reason is {reprlib.repr(reason)}, but it must be a text or nothing")
    if not is_number(result["test_loss"]):
        raise ValueError(f"test_loss is {reprlib.repr(result['test_loss'])}, but it must be a finite number")
    if scores is not None and not (isinstance(scores, dict) and all(map(_is_score, scores.values()))):
        raise ValueError(f"scores are {reprlib.repr(scores)}, but they must be numbers and texts by name, or nothing")
    rows = History.from_dict(result["history"]).rows
    if len(rows) != trial.steps + 1:
        raise ValueError(f"the history has {len(rows)} rows, but {trial.steps} steps make {trial.steps + 1}")
    if rows[-1]["validation_loss"] is None:
        raise ValueError("the last row of the history has no validation_loss")


def _is_score(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _frame(results: Sequence[dict[str, Any]]):
    """The table that :func:`load` describes."""
    import pandas

    rows = [row for result in results for row in _rows(result)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    scores = sorted(name for name in names if name.startswith(SCORE))
    first, last = ["key", "method", "rank", "alpha"], [*OUTCOME, *scores, *PROVENANCE]
    between = [name for name in names if name not in (*first, *last)]
    frame = pandas.DataFrame(rows, columns=[*first, *between, *last])
    numbers = ("rank", "alpha", "lr", "weight_decay", "clip", "eval_examples", *OUTCOME[2:])
    frame = frame.astype(dict.fromkeys(numbers, float))  # whatever the trials: what one lacks is NaN
    return frame.sort_values(["method", "rank", "lr", "seed", "key", "step"], ignore_index=True)


def _rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    trial = Trial.from_dict(result["trial"]).to_dict()  # in its own order, which a file does not keep
    method = dict(trial.pop("method"))
    method["method"] = method.pop("name")
    texts = {name: ", ".join(value) for name, value in method.items() if isinstance(value, list)}
    provenance = {name: result["provenance"].get(name) for name in PROVENANCE}
    fixed = {"key": result["key"], **method, **texts, **trial, **provenance}
    fixed |= {"outcome": result["outcome"], "reason": result["reason"] or ""}
    if result["outcome"] == "failed":
        yield fixed
        return
    history, seconds = History(**result["history"]), 0.0
    gaps = dict(zip(*history.curve("gap"), strict=True))
    last = {"test_loss": result["test_loss"]} | {f"{SCORE}{k}": v for k, v in (result["scores"] or {}).items()}
    for row in history.rows:
        seconds += row["seconds"]
        if row["validation_loss"] is not None:
            losses = {name: row[name] for name in LOSSES[:3]} | {"gap": gaps.get(row["step"])}
            at_end = last if row is history.rows[-1] else {}
            yield {**fixed, "step": row["step"], **losses, "seconds": seconds, **at_end} | {
                "trainable_parameters": history.trainable_parameters,
            }
