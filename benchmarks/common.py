"""What the benchmarks share. It is imported before torch, so that torch's waiting threads sleep and stall nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The heap keeps freed memory, because giving it back costs page faults at every step.
KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True) -> dict[str, list[float]]:
    """The seconds of each call in each round. All calls are made in turn, after a first round that does not count.

    Args:
        calls: name -> what to time. A call that returns a float has timed itself; on a GPU the others are timed from
            and to a moment at which the device is idle.
        rounds: that count.
        warm_up: whether there is a first round; not where a call takes minutes and starts processes of its own.
    """
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values() if warm_up else ():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            started = time.perf_counter()
            result = call()
            wait()
            seconds[name].append(result if isinstance(result, float) else time.perf_counter() - started)
    return seconds


def print_machine(device: torch.device | None = None) -> None:
    """Print what the machine and its software are; ``device`` is by default the best one."""
    import lora_lab as ll
    from lora_lab.system.provenance import machine_info

    for key, value in machine_info(ll.device.pick_device()[0] if device is None else device).items():
        print(f"{key}: {value}")
