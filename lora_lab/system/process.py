"""A process of its own for each thing measured, so that one's memory is not counted with another's."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch


def run_in_subprocess(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """What ``function(*arguments)`` returns, called in a fresh process.

    Args:
        function: importable by name, as are the classes of arguments and result.
        environment: variables that the process has besides this one's.

    Raises:
        MemoryError: the system ended the process, most likely for lack of memory.
        Exception: whatever the function raises.
    """
    context = multiprocessing.get_context("spawn")  # a forked one would share this one's memory, and torch's threads
    try:
        with _with_variables(environment or {}), ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise MemoryError(
            "The process that trains was ended by the system, most likely for lack of memory: "
            "full fine-tuning of SmolLM2-135M needs about 4 GiB free."
        ) from None


@contextmanager
def _with_variables(environment: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def peak_bytes(device: torch.device) -> int:
    """The most memory ever held: torch's allocator on a CUDA device, the whole process (resident) elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; getrusage would count the parent's memory in a process that it started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


_SPARE_CORES = 0.25  # that others may use before they disturb
_SHORTEST_CROWD_S = 0.5  # the system counts cores in hundredths of a second: of shorter times it tells nothing


class BusyCores:
    """Whether other processes worked while a block ran, and on how many cores: ``with BusyCores(2) as others: ...``.

    Args:
        threads: how many cores this process needs meanwhile.
    """

    cores = 0.0

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> BusyCores:
        self._started, self._busy, self._own = time.perf_counter(), *_cpu_seconds()
        return self

    def __exit__(self, *_: Any) -> None:
        busy, own = _cpu_seconds()
        wall = time.perf_counter() - self._started
        if wall >= _SHORTEST_CROWD_S:
            self.cores = max(0.0, (busy - self._busy - (own - self._own)) / wall)

    @property
    def disturbs(self) -> bool:
        """Whether they and this process together had too few cores."""
        return self.cores + self.threads > (psutil.cpu_count() or 1) + _SPARE_CORES


def _cpu_seconds() -> tuple[float, float]:
    """Seconds that all processes, and this one, have used of all cores."""
    everything, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return sum(everything) - everything.idle - getattr(everything, "iowait", 0.0), own.user + own.system
