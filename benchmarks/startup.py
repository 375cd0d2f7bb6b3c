"""How long from the start of a process until the model can be used?

    python benchmarks/startup.py [ROUNDS]

Each round starts a fresh Python for each case, one after another, so that a slow moment of the machine
meets all of them; quoted are medians, and ratios to `import torch` pair by pair. Aims: `import lora_lab`
with torch at most 1.15 times `import torch`; model and tokenizer ready within 2 s. The model must be in
the cache (`lora-lab fetch`).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from functools import partial

import common

CASES = {
    "import torch": "import torch",
    "import torch, lora_lab": "import torch, lora_lab",
    "model and tokenizer ready": "import lora_lab; lora_lab.load_pretrained(device='cpu')",
}


def seconds(code: str) -> float:
    """From the start of the interpreter to the line after ``code``; Python's shutdown does not count."""
    started = time.time()
    script = f"{code}\nimport time; print(time.time())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout) - started


def main() -> None:
    """Run the rounds and print a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    times = common.interleaved({case: partial(seconds, code) for case, code in CASES.items()}, rounds)
    first = times["import torch"]
    print(f"{'':<28}{'median, s':>10}{'min':>8}{'max':>8}{'ratio':>8}")
    for case, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, first, strict=True))
        print(f"{case:<28}{statistics.median(taken):>10.2f}{min(taken):>8.2f}{max(taken):>8.2f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
