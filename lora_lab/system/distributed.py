"""One run in several processes, through torch.distributed: gloo between CPUs, NCCL between CUDA GPUs.

torchrun starts the processes, and each has the whole model. It computes the gradients of its share of every batch, and
an all-reduce adds them to those of the others, so that all take the same step.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lora_lab.system.device import seed_generators


class ProcessEndedError(RuntimeError):
    """Another process of a run has ended, or the system ends them all.

    Args:
        advice: how to go on.
    """

    def __init__(self, advice: str = "start the same command again") -> None:
        super().__init__(f"Another process of this run ended, or the system ends them all; {advice}.")


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together.

    Args:
        rank: the number of this process, from 0 on. (The word is torch's; it has nothing to do with LoRA's rank.)
        world_size: how many processes there are.
    """

    rank: int = 0
    world_size: int = 1

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes: one all-reduce for each dtype.

        Raises:
            ProcessEndedError: another process has ended, or cannot be reached.
        """
        by_dtype = defaultdict(list)
        for tensor in tensors if self.world_size > 1 else ():
            by_dtype[tensor.dtype].append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.flatten() for tensor in group])  # (sum of sizes,)
            with _errors_in_one_sentence():
                dist.all_reduce(flat)
            for tensor, total in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Wait for all processes, and check that they call this with equal values, by name.

        Raises:
            ValueError: they differ.
            ProcessEndedError: as for :meth:`sum`.
        """
        if self.world_size == 1:
            return
        everyone: list[Any] = [None] * self.world_size
        with _errors_in_one_sentence():
            dist.all_gather_object(everyone, dict(values))
        for rank, theirs in enumerate(everyone):
            for name in everyone[0] | theirs:
                if theirs.get(name) != everyone[0].get(name):
                    raise ValueError(
                        f"The processes of this run differ: {name} is {everyone[0].get(name)!r} in process 0, but "
                        f"{theirs.get(name)!r} in process {rank}; give all the same options, files and folders."
                    )

    def seed(self, device: torch.device, seed: int, step: int) -> None:
        """Let the random numbers of a step, those of dropout, differ between processes; one process keeps its own.

        They depend on nothing else, so that a resumed run draws the same.
        """
        if self.world_size > 1:
            seed_generators(device, seed + 1_000_003 * (step * self.world_size + self.rank))


ALONE = Processes()


def current_processes() -> Processes:
    """Return the processes of torch's default process group; without one, this process alone."""
    grouped = dist.is_available() and dist.is_initialized()
    return Processes(dist.get_rank(), dist.get_world_size()) if grouped else ALONE


@contextmanager
def process_group() -> Iterator[None]:
    """Make the processes that torchrun has started torch's default process group, for a block in which rank 0 prints.

    The error of the process that fails first is raised there; in all others the block ends with SystemExit.

    Raises:
        ValueError: this machine has fewer GPUs than processes.
        ProcessEndedError: SIGTERM has come, which torchrun sends when another process has ended.
        KeyboardInterrupt: at the first Ctrl-C, which both the terminal and torchrun pass on.
    """
    from torch.distributed.rendezvous import rendezvous

    store = next(rendezvous("env://"))[0]
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.signal(signal.SIGINT, _on_sigint)
    try:
        _take_gpu()
        dist.init_process_group()
        with _silent() if dist.get_rank() else nullcontext():
            yield
        dist.destroy_process_group()
    except BaseException as error:
        _ignore_sigterm()  # what is left to do is to report the error
        if isinstance(error, SystemExit) or _is_first_error(store):
            raise
        raise SystemExit(1) from error


def _is_first_error(store: Any) -> bool:
    with suppress(RuntimeError):  # the store has ended with its process, so that nobody knows
        return store.add(f"errors after {os.environ['TORCHELASTIC_RESTART_COUNT']} restarts", 1) == 1
    return True


def _take_gpu() -> None:
    """Make one GPU of this machine the default of this process."""
    gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if 0 < gpus <= local_rank:
        raise ValueError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes on this machine, which has {gpus} GPUs; use "
            f"--nproc-per-node {gpus}, or set CUDA_VISIBLE_DEVICES to nothing for CPUs."
        )
    if gpus:
        torch.cuda.set_device(local_rank)


def _on_sigterm(*_: Any) -> None:
    _ignore_sigterm()
    raise ProcessEndedError


def _on_sigint(*_: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _ignore_sigterm()
    raise KeyboardInterrupt


def _ignore_sigterm() -> None:
    """Keep the SIGTERM that torchrun sends after a failure from cutting off the report of the error."""
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _silent() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def _errors_in_one_sentence() -> Iterator[None]:
    """Raise ProcessEndedError from an error of NCCL or gloo, which stays its cause: another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo's errors have no class of their own
            raise
        _ignore_sigterm()
        raise ProcessEndedError from error
