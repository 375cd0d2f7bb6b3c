"""Large files of texts: seconds and memory to read and tokenise them.

    python benchmarks/large_texts.py [--sizes 1 5 50]

The texts are pages of Python's manual in random order: plain (`from_text`), on lines of `{"text": ...}`, and as prompts
and answers of 20 and 30 words (both `from_jsonl`). Each file is read in a fresh process, with SmolLM2's tokenizer,
which must be in the cache (`lora-lab fetch`). Quoted is by how much the process's peak of memory rises, and how much of
it are the task's own tensors; both should grow with the file no faster than it does.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import torch

from lora_lab.models.pretrained import SMOLLM2, load_tokenizer
from lora_lab.system.device import peak_bytes, run_in_subprocess
from lora_lab.tasks import from_jsonl, from_text

KINDS = ("text", "lines of texts", "prompts and answers")


def entries(kind: str) -> Iterator[str]:
    """Parts of a file of that kind, without end."""
    from pydoc_data.topics import topics

    draw, pages = random.Random(0), [page.strip() for page in topics.values()]
    words, number = " ".join(pages).split(), 0
    while True:
        page, start = draw.choice(pages), draw.randrange(len(words) - 50)
        chosen, number = words[start : start + 50], number + 1
        pair = {"prompt": f"{number}: {' '.join(chosen[:20])}", "answer": " ".join(chosen[20:])}
        yield {
            "text": f"{page}\n\n",
            "lines of texts": json.dumps({"text": page}) + "\n",
            "prompts and answers": json.dumps(pair) + "\n",
        }[kind]


def measure(path: Path) -> tuple[float, int, int]:
    """CPU seconds, the rise of the peak in bytes, and the bytes of the task's tensors."""
    tokenizer, cpu = load_tokenizer(SMOLLM2), torch.device("cpu")
    tokenizer.encode("The first text takes longer.")
    before, started = peak_bytes(cpu), time.process_time()
    task = from_text(tokenizer, path) if path.suffix == ".txt" else from_jsonl(tokenizer, path)
    seconds, rise = time.process_time() - started, peak_bytes(cpu) - before
    return seconds, rise, sum(8 * (part.inputs.numel() + part.targets.numel()) for part in task.parts.values())


def main() -> None:
    """Write the files, read each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 5, 50], help="of the files, in MB")
    options = parser.parse_args()
    common.print_machine(torch.device("cpu"))
    print(f"{'':<22}{'MB':>6}{'CPU s':>8}{'peak, MiB':>11}{'tensors, MiB':>14}{'s/MB':>7}{'bytes/byte':>12}")
    for kind in KINDS:
        for size in options.sizes:
            with tempfile.TemporaryDirectory() as folder:
                path, written = Path(folder) / ("large.txt" if kind == "text" else "large.jsonl"), 0
                with path.open("w", encoding="utf-8") as file:
                    for entry in entries(kind):
                        if written >= size * 1e6:
                            break
                        written += file.write(entry)
                seconds, rise, tensors = run_in_subprocess(measure, path)
            megabytes = written / 1e6
            print(
                f"{kind:<22}{megabytes:>6.1f}{seconds:>8.1f}{rise / 2**20:>11.0f}{tensors / 2**20:>14.0f}"
                f"{seconds / megabytes:>7.2f}{rise / written:>12.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
