"""Where and how much to compute: device, effort, randomness; fresh processes, their memory, and cores that others use.

Two environment variables control every lesson and command:

    LORA_LAB_DEVICE   cpu, cuda, cuda:1, mps, ...   (default: cuda if there is a CUDA GPU, otherwise cpu)
    LORA_LAB_EFFORT   quick or full                 (default: full on a CUDA GPU, quick elsewhere)
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch

from lora_lab.system.wording import count_noun, shortened


def pick_device(device: str | torch.device | None = None) -> tuple[torch.device, str]:
    """Return the device to use, and the reason as text.

    Args:
        device: such as "cpu" or "cuda:0"; by default the value of LORA_LAB_DEVICE, or else the first CUDA GPU, or else
            the CPU.

    Raises:
        ValueError: torch does not know the device, this machine does not have it, or it stores no values, as "meta".
    """
    requested = device if device is not None else os.environ.get("LORA_LAB_DEVICE") or None
    reason = "it was asked for" if device is not None else "LORA_LAB_DEVICE asks for it"
    if requested is not None:
        try:
            available = torch.device(requested)
            torch.empty(1, device=available).item()  # on "meta" there is no value to read
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"Device {shortened(str(requested))!r} cannot be used here ({shortened(str(error).splitlines()[0])}); "
                "try 'cpu'."
            ) from None
        return available, f"{available} because {reason}"
    if torch.cuda.is_available():
        return torch.device("cuda"), f"cuda because a GPU is there: {torch.cuda.get_device_name()}"
    # Apple's mps is used on request only: it rounds differently, and nothing has been measured on it.
    return torch.device("cpu"), f"cpu because torch sees no CUDA GPU; {count_noun(torch.get_num_threads(), 'thread')}"


def effort() -> str:
    """Return how much work a lesson does: "quick" (minutes on two CPU cores) or "full" (for a GPU).

    Raises:
        ValueError: LORA_LAB_EFFORT has another value.
    """
    level = os.environ.get("LORA_LAB_EFFORT") or ("full" if pick_device()[0].type == "cuda" else "quick")
    if level not in ("quick", "full"):
        raise ValueError(f"LORA_LAB_EFFORT is {level!r}, but it must be 'quick' or 'full'.")
    return level


@contextmanager
def restore_randomness(device: torch.device) -> Iterator[None]:
    """Give torch's global generators, those of the CPU and of a CUDA device, their states back after a block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators, which dropout uses, for a block, and restore their states at its end."""
    with restore_randomness(device):
        seed_generators(device, seed)
        yield


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed torch's global generators, those of the CPU and of a CUDA device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


# Fresh processes, so that the memory of each measurement is counted separately; and cores that others keep busy.


def run_in_subprocess(function: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """Return ``function(*arguments)``, called in a fresh process.

    Args:
        function: importable by name, as are the classes of its arguments and its result.
        environment: variables to set in the process, in addition to those of this process.

    Raises:
        MemoryError: the system ended the process, most likely for lack of memory.
        Exception: raised by the function.
    """
    # A forked process would share memory and torch's threads with this.
    context = multiprocessing.get_context("spawn")
    try:
        with patch.dict(os.environ, environment or {}), ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise MemoryError(
            "The subprocess was ended by the system, most likely for lack of memory; free memory, or choose a smaller "
            "model or batch."
        ) from None


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process, in bytes: of torch's allocator on a CUDA device, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage would include the peak of the parent process
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


_TOLERATED_CORES = 0.25  # that other processes may use without disturbing a measurement
# The system counts CPU time in hundredths of a second, too coarse for shorter blocks.
_SHORTEST_BLOCK_S = 0.5


class BusyCores:
    """The number of cores that other processes used while a block ran: ``with BusyCores(2) as others: ...``.

    Args:
        threads: number of cores that this process needs in the block.
    """

    cores = 0.0

    def __init__(self, threads: int) -> None:
        self.threads, self._process = threads, psutil.Process()

    def __enter__(self) -> BusyCores:
        self._started = time.perf_counter()
        self._read_busy_cores()
        return self

    def __exit__(self, *_: Any) -> None:
        if time.perf_counter() - self._started >= _SHORTEST_BLOCK_S:
            self.cores = max(0.0, self._read_busy_cores())

    @property
    def disturbs(self) -> bool:
        """Whether other processes left this process fewer cores than it needs."""
        return self.cores + self.threads > (psutil.cpu_count() or 1) + _TOLERATED_CORES

    def _read_busy_cores(self) -> float:
        """Return how many cores other processes have used since the last call."""
        return (sum(psutil.cpu_percent(percpu=True)) - self._process.cpu_percent()) / 100
