"""What two processes of a data-parallel run send each other in a step: predicted, reduced, and on the loopback device.

    python benchmarks/communication.py [--rounds 3]

The model is SmolLM2-135M's shape with random weights, the step one of `fit` on 1 x 16 tokens in each process, with gloo
on the CPU. Predicted is `speed.communication`; reduced are the bytes of the tensors that torch.distributed sums; sent
is half of what the loopback device counts in a step, headers included. What else uses that device is counted too, so
the machine must be quiet. Medians are printed, also of the seconds of a step and of its all-reduce.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common
import psutil
import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

import lora_lab as ll
from lora_lab.costs.setup import Setup
from lora_lab.models.pretrained import architecture
from lora_lab.system.distributed import Processes

MODEL, PROCESSES = "smollm2-135m", 2
METHODS = {"full": ll.FullFineTuning(), "LoRA r=8": ll.LoRA(rank=8), "LoRA-FA r=8": ll.LoRAFA(rank=8)}


measured: dict[str, float] = {}


class MeasuredProcesses(Processes):
    """Processes that measure the bytes and the seconds of what they sum."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """As the parent's."""
        started = time.perf_counter()
        super().sum(tensors)
        measured["seconds"] = time.perf_counter() - started
        measured["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def loopback_bytes() -> int:
    """What the processes of this machine have sent to each other."""
    counters = psutil.net_io_counters(pernic=True)
    return next(counters[name].bytes_sent for name in ("lo", "lo0") if name in counters)


def work(rank: int, meeting: str, rounds: int) -> None:
    """Take steps with each method, and print what rank 0 measures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    batch = torch.randint(0, 1000, (1, 16)), torch.randint(0, 1000, (1, 16))
    for name, method in METHODS.items():
        predicted = ll.speed.communication(MODEL, method, PROCESSES)
        step = Setup(method).step(architecture(MODEL)())
        step.processes = MeasuredProcesses(rank, PROCESSES)
        rows = []
        for _ in range(1 + rounds):
            dist.barrier()
            time.sleep(0.2)  # until what the barrier sends has arrived
            before, started = loopback_bytes(), time.perf_counter()
            step([batch], [1 / PROCESSES])
            seconds = time.perf_counter() - started
            dist.barrier()
            rows.append(((loopback_bytes() - before) / PROCESSES, seconds, measured["seconds"]))
        sent, seconds, reducing = (statistics.median(values) for values in zip(*rows[1:], strict=True))
        if rank == 0:
            numbers = f"{predicted:>15,.0f}{measured['bytes']:>15,}{sent:>15,.0f}"
            print(f"{name:<12}{numbers}{sent / predicted:>9.3f}{seconds:>9.2f}{reducing:>12.3f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    common.print_machine(torch.device("cpu"))
    titles = f"{'predicted':>15}{'reduced':>15}{'sent':>15}{'ratio':>9}{'step, s':>9}{'all-reduce':>12}"
    print(f"\n{'bytes':<12}{titles}")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (str(Path(folder) / "meeting"), options.rounds), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
