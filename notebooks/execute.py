"""Run the lessons again, always on the CPU at quick effort, and store their outputs in place.

    python notebooks/execute.py                     all of them
    python notebooks/execute.py 01_low_rank.ipynb   one

A second run leaves source, ids, metadata and every checked output as they were, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

from lora_lab.system.files import atomic_file

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {
    "LORA_LAB_DEVICE": "cpu",
    "LORA_LAB_EFFORT": "quick",
    "LORA_LAB_PROGRESS": "0",
    "OMP_WAIT_POLICY": "passive",
}
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> None:
    """Run one notebook in a fresh kernel and write it back, whole or not at all."""
    notebook = nbformat.read(path, as_version=4)
    for number, cell in enumerate(notebook.cells, start=1):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata = {
            key: cell.metadata[key]
            for key in ("jupyter", "tags")
            if cell.metadata.get(key)
        }
    NotebookClient(
        notebook,
        timeout=600,
        coalesce_streams=True,  # or a slow cell's output is stored in pieces that depend on the clock
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        config=Config(
            {"KernelManager": {"transport_encryption": "auto"}}
        ),  # or each kernel warns about plain TCP
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise SystemExit(
                    f"{path.name}, {cell['id']}: writes to stderr, which a lesson must not:\n{output.text}"
                )
            output.get("data", {}).pop(
                WIDGET, None
            )  # a widget is dead without its kernel; its picture stays
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    with atomic_file(path) as temporary:
        nbformat.write(notebook, temporary)


def main() -> None:
    """Run the notebooks named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help="file names inside notebooks/ (default: all)"
    )
    names = parser.parse_args().names
    os.environ.update(ENVIRONMENT)
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        started = time.perf_counter()
        execute(path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
