"""Fresh processes, so that the memory of each measurement is counted separately; and cores that others keep busy."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch


def run_in_subprocess(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """Return ``function(*arguments)``, called in a fresh process.

    Args:
        function: importable by name, as are the classes of its arguments and its result.
        environment: variables to set in the process, in addition to those of this process.

    Raises:
        MemoryError: the system ended the process, most likely for lack of memory.
        Exception: raised by the function.
    """
    context = multiprocessing.get_context("spawn")  # a forked process would share memory and torch's threads with this
    try:
        with patch.dict(os.environ, environment or {}), ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise MemoryError(
            "The subprocess was ended by the system, most likely for lack of memory; free memory, or choose a smaller "
            "model or batch."
        ) from None


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process, in bytes: torch's on a CUDA device, resident memory elsewhere."""
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
_SHORTEST_BLOCK_S = 0.5  # the system counts CPU time in hundredths of a second, too coarse for shorter blocks


class BusyCores:
    """The number of cores that other processes used while a block ran: ``with BusyCores(2) as others: ...``.

    Args:
        threads: number of cores that this process needs in the block.
    """

    cores = 0.0

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> BusyCores:
        self._started, self._all_before, self._this_before = time.perf_counter(), *_cpu_seconds()
        return self

    def __exit__(self, *_: Any) -> None:
        all_after, this_after = _cpu_seconds()
        wall = time.perf_counter() - self._started
        if wall >= _SHORTEST_BLOCK_S:
            self.cores = max(0.0, (all_after - self._all_before - (this_after - self._this_before)) / wall)

    @property
    def disturbs(self) -> bool:
        """Whether other processes left this process fewer cores than it needs."""
        return self.cores + self.threads > (psutil.cpu_count() or 1) + _TOLERATED_CORES


def _cpu_seconds() -> tuple[float, float]:
    """Return CPU time in seconds, summed over all cores: of all processes, and of this process."""
    system, this = psutil.cpu_times(), psutil.Process().cpu_times()
    return sum(system) - system.idle - getattr(system, "iowait", 0.0), this.user + this.system
