"""How long does the machine compute for each lesson?

    python benchmarks/lessons.py [LESSON ...]

Each lesson (such as 05; default: all, about 13 minutes) is executed from a fresh kernel to its end, one after another,
on the CPU at quick effort and with torch's own number of threads, as a learner's JupyterLab would. Nothing is stored.
The aims, on two quiet cores: 3 minutes for a lesson, 14 for all together.
"""

from __future__ import annotations

import os
import re
import sys
import time
from datetime import datetime
from pathlib import Path

import common
import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
LESSON_AIM, ALL_AIM = 3, 14  # minutes
SETTINGS = {"LORA_LAB_DEVICE": "cpu", "LORA_LAB_EFFORT": "quick", "LORA_LAB_PROGRESS": "0"}


def run(path: Path) -> tuple[float, list[tuple[float, int]]]:
    """Execute a copy of a lesson.

    Returns:
        Its seconds, with the start of the kernel, and (seconds, number in the notebook) of each code cell.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")} | SETTINGS
    started = time.perf_counter()
    config = Config({"KernelManager": {"transport_encryption": "auto"}})  # or each kernel warns about plain TCP
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}, config=config)
    client.execute(env=environment)
    seconds = time.perf_counter() - started
    cells = []
    for number, cell in enumerate(notebook.cells, start=1):
        times = cell.metadata.get("execution", {})
        if "iopub.status.idle" in times:
            begun, ended = (datetime.fromisoformat(times[f"iopub.status.{state}"]) for state in ("busy", "idle"))
            cells.append(((ended - begun).total_seconds(), number))
    return seconds, sorted(cells, reverse=True)


def main() -> None:
    """Run the lessons and print a table."""
    paths = [path for path in sorted(FOLDER.glob("[0-9]*.ipynb")) if path.name[:2] in sys.argv[1:] or not sys.argv[1:]]
    common.print_machine()
    print(f"\n{'':<26}{'seconds':>8}{'stated, min':>13}   slowest cells, s (number)")
    total = 0.0
    for path in paths:
        seconds, cells = run(path)
        total += seconds
        stated = re.search(r"about ([\d½¾]+) for the machine", path.read_text(encoding="utf-8"))
        slowest = ", ".join(f"{taken:.0f} ({number})" for taken, number in cells[:4])
        late = f"   over the aim of {LESSON_AIM} minutes" if seconds > 60 * LESSON_AIM else ""
        print(f"{path.stem:<26}{seconds:>8.1f}{stated[1] if stated else '':>13}   {slowest}{late}", flush=True)
    print(f"{'together':<26}{total:>8.1f}   {total / 60:.1f} minutes; the aim for all lessons is {ALL_AIM}")


if __name__ == "__main__":
    main()
