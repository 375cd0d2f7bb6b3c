"""The memory bill, predicted without allocating, against the allocator: how far it is off, and the worst case.

    python benchmarks/memory_bill.py [--models small smollm2-135m] [--device cpu]

Each case runs in a fresh process: ``predict`` on fake tensors, two steps unobserved for the size of the whole
process, then ``measure``, whose peak is the allocator's own (the profiler's allocation events on a CPU,
``max_memory_allocated`` on CUDA). The cases are those of `lora-lab record memory`. The process grows by more than
tensors: libraries' own buffers and the heap's holes are what is left over.
"""

from __future__ import annotations

import argparse
from typing import Any

import common

from lora_lab.studies import steps
from lora_lab.system.device import pick_device

GOAL = {"cpu": 0.03, "cuda": 0.05}


def describe(row: dict[str, Any]) -> str:
    """Return the case of a row, such as "LoRA r=8 on small, 4 x 128"."""
    return f"{row['setup']} on {row['model']}, {row['batch']} x {row['length']}"


def main() -> None:
    """Measure the chosen cases, and print how far the predictions are off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")
    options = parser.parse_args()
    device, _ = pick_device(options.device)
    common.print_machine(device)
    rows = []
    for row in steps.record_memory(device, options.models):
        rows.append(row)
        predicted, measured = row["predicted_bytes"] / 2**20, row["measured_bytes"] / 2**20
        error = predicted / measured - 1
        print(f"{describe(row)}: predicted {predicted:,.1f}, measured {measured:,.1f} MiB ({error:+.2%})", flush=True)
    off = {describe(row): row["predicted_bytes"] / row["measured_bytes"] - 1 for row in rows}
    worst = max(off, key=lambda name: abs(off[name]))
    within = sum(abs(value) <= GOAL[device.type] for value in off.values())
    print(f"\n{len(rows)} configurations, {within} within {GOAL[device.type]:.0%}; worst {off[worst]:+.2%}: {worst}")
    if all(row["process_bytes"] is not None for row in rows):
        over = {describe(row): row["process_bytes"] - row["measured_bytes"] for row in rows}
        most = max(over, key=over.__getitem__)
        near = sum(over[describe(row)] <= 0.1 * row["measured_bytes"] for row in rows)
        print(
            f"the process grew by at most 10 % more than that in {near} of {len(rows)}; "
            f"libraries and heap took {min(over.values()) / 2**20:.0f} to {over[most] / 2**20:.0f} MiB (most: {most})"
        )


if __name__ == "__main__":
    main()
