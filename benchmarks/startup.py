"""How long from the start of a process until it is of use?

    python benchmarks/startup.py [ROUNDS]

Each round starts a fresh Python for each case, one after another, so that a slow moment of the machine
meets all of them; quoted are medians with their aims, and ratios to `import torch` pair by pair. Another aim:
`import lora_lab` with torch at most 1.15 times `import torch`. `--help` and `doctor` count until the process
has ended, `generate` until its first token is printed. The model must be in the cache (`lora-lab fetch`).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from functools import partial

import common

PROMPT = "The capital of France is"
COMMAND = (sys.executable, "-c", "from lora_lab.cli import main; main()")


def until_line(code: str) -> float:
    """Seconds from the start of the interpreter to the line after ``code``; Python's shutdown does not count."""
    started = time.time()
    script = f"{code}\nimport time; print(time.time())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout) - started


def until_end(*arguments: str) -> float:
    """Seconds that a command of lora-lab takes."""
    started = time.time()
    subprocess.run([*COMMAND, *arguments], capture_output=True, check=True)
    return time.time() - started


def until_token(*arguments: str) -> float:
    """Seconds until ``lora-lab chat --plain`` prints more than its prompt."""
    started = time.time()
    with subprocess.Popen([*COMMAND, "chat", PROMPT, "--plain", *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        printed = b""
        while len(printed) <= len(PROMPT):
            if not (part := os.read(process.stdout.fileno(), 1000)):
                raise RuntimeError(f"chat printed only {printed!r}.")
            printed += part
        seconds = time.time() - started
        process.kill()
    return seconds


# What is timed, and the aim in seconds.
CASES = {
    "import torch": (partial(until_line, "import torch"), None),
    "import torch, lora_lab": (partial(until_line, "import torch, lora_lab"), None),
    "model and tokenizer ready": (partial(until_line, "import lora_lab; lora_lab.load_pretrained(device='cpu')"), 2.0),
    "lora-lab --help": (partial(until_end, "--help"), 0.3),
    "lora-lab doctor": (partial(until_end, "doctor"), 2.0),
    "chat: first token": (until_token, 2.5),
}


def main() -> None:
    """Run the rounds and print a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    times = common.interleaved({case: call for case, (call, _) in CASES.items()}, rounds)
    first = times["import torch"]
    print(f"{'':<28}{'median, s':>10}{'min':>8}{'max':>8}{'ratio':>8}{'aim, s':>8}")
    for case, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, first, strict=True))
        aim = CASES[case][1]
        print(
            f"{case:<28}{statistics.median(taken):>10.2f}{min(taken):>8.2f}{max(taken):>8.2f}{ratio:>8.2f}"
            f"{'' if aim is None else aim:>8}"
        )


if __name__ == "__main__":
    main()
