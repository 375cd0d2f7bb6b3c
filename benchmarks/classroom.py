"""What does a lesson take of a server: how long alone, how long for several students at once, and how much memory?

    python benchmarks/classroom.py 03                  # alone: seconds and the peak memory
    python benchmarks/classroom.py 03 09 --students 2  # then two kernels at once

Each kernel runs the solved lesson from top to bottom on the CPU, with one thread in each process, as fast as it can.
Students read and write in between, so that a class asks for less than this at any moment. Lessons 02, 06, 07, 08, 10
and 12 compute in two worker processes of the kernel for part of the time; the memory is that of the kernel and its
workers together (pages that they share are counted in each). Times mean something only where nothing else runs.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import common
import nbformat
import psutil
from nbclient import NotebookClient
from traitlets.config import Config

from lora_lab.costs.memory import MIB
from lora_lab.course.copies import choose_lessons
from lora_lab.system.device import pick_device

ENVIRONMENT = {"LORA_LAB_DEVICE": "cpu", "LORA_LAB_EFFORT": "quick", "LORA_LAB_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
PEAK = "import torch\nfrom lora_lab.system.device import peak_bytes\npeak_bytes(torch.device('cpu'))"


def run(lesson: Path) -> int:
    """Execute a lesson in a kernel of its own; the largest resident memory of the kernel and its workers in bytes."""
    notebook = nbformat.read(lesson, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK))
    local = Config({"KernelManager": {"transport_encryption": "auto"}})  # or each kernel warns about plain TCP
    where = {"metadata": {"path": str(lesson.parent)}}
    done = threading.Event()
    with ThreadPoolExecutor(1) as watcher:
        together = watcher.submit(largest_below, done)
        try:
            NotebookClient(notebook, timeout=3600, resources=where, config=local).execute()
        finally:
            done.set()
    return max(int(notebook.cells[-1].outputs[-1].data["text/plain"]), together.result())


def largest_below(done: threading.Event) -> int:
    """The largest resident memory of all processes below this one together in bytes, read four times a second."""
    largest = 0
    while not done.wait(0.25):
        largest = max(largest, sum(map(resident, psutil.Process().children(recursive=True))))
    return largest


def resident(process: psutil.Process) -> int:
    """The resident memory of a process in bytes; 0 if it has ended."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def at_once(lesson: Path, students: int) -> tuple[float, int]:
    """Seconds until the last of so many kernels has run the lesson, and the largest memory of one student in bytes."""
    with ProcessPoolExecutor(students) as pool:
        started = time.perf_counter()
        peaks = list(pool.map(run, [lesson] * students))
        return time.perf_counter() - started, max(peaks)


def main() -> None:
    """Print a line for each lesson."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", nargs="+", help="beginnings of names, such as 03")
    parser.add_argument("--students", type=int, default=1, help="so many kernels at once (default: 1)")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    common.print_machine(pick_device("cpu")[0])
    print(f"{'':<24}{'alone, s':>10}{f'{options.students} at once, s':>14}{'ratio':>8}{'memory, MiB':>13}")
    for lesson in choose_lessons(options.lessons):
        alone, peak = at_once(lesson, 1)
        shared, _ = at_once(lesson, options.students) if options.students > 1 else (alone, 0)
        print(f"{lesson.stem:<24}{alone:>10.0f}{shared:>14.0f}{shared / alone:>8.2f}{peak / MIB:>13,.0f}", flush=True)


if __name__ == "__main__":
    main()
