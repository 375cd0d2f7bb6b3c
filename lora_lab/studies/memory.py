"""``lora-lab record memory``: predicted and measured memory of many training setups, each in its own process.

Weights are random, because the memory and time of a step do not depend on their values.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lora_lab.costs.fake import token_batch
from lora_lab.costs.memory import MIB, Part, measure, predict
from lora_lab.costs.setup import Setup
from lora_lab.lean.step import Lean
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.models import shapes
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.studies.recorder import Recorder
from lora_lab.system.process import peak_bytes, run_in_subprocess
from lora_lab.system.wording import progress_bar
from lora_lab.variants import DoRA, LoRAFA, PiSSA

# The heap returns freed memory: otherwise its holes count as the process's memory, and differ from run to run.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_WAIT_POLICY": "passive"}
SMALL = "small"  # a Llama for runs of seconds
_SMALL = LlamaConfig(16384, 384, 1024, 8, 6, 2, 64, tie_word_embeddings=True)
# Compared over growing contexts.
MAIN = ("full", "LoRA r=8", "LoRA-FA r=8", "LoRA r=8, attention only", "LoRA r=8, checkpointing")
CONTEXTS = (64, 256, 1024)
_ON_SMOLLM2 = (
    *("full", "full, SGD", "full, bf16", "full, checkpointing"),
    *("LoRA r=1", "LoRA r=8", "LoRA r=64", "LoRA r=8, attention only", "LoRA-FA r=8", "DoRA r=8"),
    "LoRA r=8, NF4 base",
    *("LoRA r=8, bf16", "LoRA r=8, checkpointing", "LoRA r=8, bf16, checkpointing"),
    *("LoRA r=8, lean", "LoRA r=8, lean, bf16 base", "LoRA r=8, lean, checkpointing"),
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BF16 = torch.bfloat16
_REFERENCES = Path("/proc/self/clear_refs")


def random_model(name: str) -> Llama:
    """A Llama of a known shape, or "small", with random weights."""
    return Llama(_SMALL if name == SMALL else shapes.config(name))


@dataclass(frozen=True)
class Case:
    """One training step to measure: the model's name, the size of the batch, the setup and its label."""

    model: str
    batch_size: int
    seq_len: int
    label: str
    setup: Setup

    @property
    def key(self) -> dict[str, Any]:
        """The columns that identify the case in a record."""
        return {"model": self.model, "batch": self.batch_size, "length": self.seq_len, "setup": self.label}


def memory_setups() -> dict[str, Setup]:
    """Every setup on which the memory prediction is checked, by its label."""
    lora = Setup(LoRA(8, 16))
    setups = {
        "full": Setup(FullFineTuning()),
        "LoRA r=1": Setup(LoRA(1, 2)),
        "LoRA r=8": lora,
        "LoRA r=64": Setup(LoRA(64, 128)),
        "LoRA r=8, attention only": Setup(LoRA(8, 16, targets=ATTENTION)),
        "LoRA-FA r=8": Setup(LoRAFA(8, 16)),
        "PiSSA r=8": Setup(PiSSA(8, 8)),
        "DoRA r=8": Setup(DoRA(8, 16)),
        "LoRA r=8, NF4 base": replace(lora, nf4=True),
    }
    for label in ("full", "LoRA r=8", "LoRA r=64", "LoRA-FA r=8", "LoRA r=8, attention only"):
        setups[f"{label}, bf16"] = replace(setups[label], dtype=BF16)
    for label in ("full", "LoRA r=8", "LoRA-FA r=8", "LoRA r=8, NF4 base", "full, bf16", "LoRA r=8, bf16"):
        setups[f"{label}, checkpointing"] = replace(setups[label], gradient_checkpointing=True)
    return setups | {
        "full, SGD": Setup(FullFineTuning(), optimizer="sgd"),
        "LoRA r=8, 2 micro-batches": replace(lora, accumulate=2),
        "LoRA r=8, lean": replace(lora, lean=Lean()),
        "LoRA r=8, lean, bf16 base": replace(lora, lean=Lean(base_dtype=BF16)),
        "LoRA r=8, lean, checkpointing": replace(lora, lean=Lean(checkpoint=True, loss_rows=64)),
    }


def memory_cases(device: torch.device, models: Sequence[str] | None = None) -> list[Case]:
    """All setups on a small model, many on SmolLM2, the main ones over growing contexts; larger models on a GPU."""
    setups = memory_setups()
    cases = [Case(SMALL, 4, 128, label, setup) for label, setup in setups.items()]
    cases += [Case("smollm2-135m", 2, 128, label, setups[label]) for label in _ON_SMOLLM2]
    for length in CONTEXTS:
        cases += [Case("smollm2-135m", 1, length, label, setups[label]) for label in MAIN]
    if device.type == "cuda":
        large = {label: setup for label, setup in setups.items() if setup.dtype == BF16}
        large["LoRA r=8, lean, bf16 base"] = setups["LoRA r=8, lean, bf16 base"]
        large["QLoRA r=8, bf16"] = replace(setups["LoRA r=8, NF4 base"], dtype=BF16)
        for model in ("llama-3.2-1b", "llama-3-8b"):
            cases += [Case(model, 1, 1024, label, setup) for label, setup in large.items()]
    return select_models(cases, models)


def select_models(cases: Sequence[Any], models: Sequence[str] | None) -> list[Any]:
    """The cases whose ``model`` is one of these; None selects all.

    Raises:
        ValueError: there are no cases of one of them.
    """
    known = list(dict.fromkeys(case.model for case in cases))
    if unknown := [name for name in models or () if name not in known]:
        raise ValueError(f"There are no cases of {unknown[0]!r} on this device; there are of {', '.join(known)}.")
    return [case for case in cases if models is None or case.model in models]


def measure_case(case: Case, device: str) -> dict[str, Any]:
    """Predict, then take two steps unobserved for the memory of the whole process, then measure one step."""
    target = torch.device(device)
    factory = partial(random_model, case.model)
    predicted = predict(factory, case.setup, case.batch_size, case.seq_len, device=target)
    gc.collect()
    process = process_bytes(factory, case, target) if target.type == "cpu" else None
    gc.collect()
    batch = token_batch(nn.Linear(1, 1, device=target), case.batch_size, case.seq_len)
    measured = measure(factory, case.setup, batch, device=target)
    return {
        **case.key,
        "predicted_bytes": predicted.peak_bytes,
        "measured_bytes": measured.peak_bytes,
        "unexplained_bytes": measured.parts.get(Part.REST, 0),
        "saved_bytes": measured.saved_bytes,
        "static_bytes": measured.static_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "process_bytes": process,
        "moment": measured.moment,
        **{part: size for part, size in measured.parts.items() if part != Part.REST},
    }


def process_bytes(factory: Callable[[], Llama], case: Case, device: torch.device) -> int | None:
    """Peak memory of the process in two steps, minus its memory before the model was built; None if not on Linux.

    The process grows by more than tensors: by holes in the heap, and by what libraries allocate for themselves.
    """
    if platform.system() != "Linux" or not os.access(_REFERENCES, os.W_OK):
        return None
    _load_code()
    before = _resident("VmRSS")
    model = factory()
    step = case.setup.step(model if case.setup.dtype is None else model.to(case.setup.dtype))
    parts, weights = case.setup.batches(token_batch(model, case.batch_size, case.seq_len))
    gc.collect()
    _trim_heap()
    _REFERENCES.write_text(
        "5", encoding="ascii"
    )  # reset the kernel's high-water mark, so that it does not include the cast
    for _ in range(2):
        step(parts, weights)
    return peak_bytes(device) - before


def _load_code() -> None:
    """Take a first step of AdamW, on one number: torch then loads 60 MB of code that belong to no step."""
    number = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([number], fused=True)
    number.square().sum().backward()
    optimizer.step()
    _trim_heap()


def _trim_heap() -> None:
    """Return the freed memory in the heap to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """A field of the kernel's status of this process, in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def rows(device: torch.device, models: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a memory record, as they are measured, each case in a fresh process.

    A case that does not fit into memory is skipped and reported on stderr.

    Args:
        device: where to measure.
        models: measure only these.

    Raises:
        ValueError: there are no cases of one of the models.
    """
    cases = memory_cases(device, models)
    with progress_bar(len(cases), "record memory", None, "case") as bar:
        for case in cases:
            bar.set_postfix_str(describe(case.key))
            try:
                yield run_in_subprocess(measure_case, case, str(device), environment=HEAP)
            except (MemoryError, torch.OutOfMemoryError):
                report_skipped(describe(case.key))
            bar.update()


def report_skipped(what: str) -> None:
    """Report on stderr that a case was skipped."""
    tqdm.write(f"skipped, because it does not fit into memory: {what}", file=sys.stderr)


def settings(device: torch.device) -> dict[str, Any]:
    """How the rows are measured, as the record states it."""
    return {"environment": HEAP, "optimizer": "AdamW, fused, gradients clipped to norm 1", "weights": "random"}


def describe(row: Mapping[str, Any]) -> str:
    """The case of a row, such as "LoRA r=8 on small, 4 x 128"."""
    return f"{row['setup']} on {row['model']}, {row['batch']} x {row['length']}"


def line(row: dict[str, Any]) -> str:
    """A row as a line for people."""
    error = row["predicted_bytes"] / row["measured_bytes"] - 1
    process = "" if row["process_bytes"] is None else f"  process {row['process_bytes'] / MIB:9,.1f}"
    predicted, measured = row["predicted_bytes"] / MIB, row["measured_bytes"] / MIB
    return f"{case_columns(row)}predicted {predicted:9,.1f}  measured {measured:9,.1f} MiB ({error:+.2%}){process}"


def case_columns(row: dict[str, Any]) -> str:
    """The case of a row as the first columns of its line."""
    return f"{row['model']:<14}{row['batch']} x {row['length']:<6}{row['setup']:<38}"


RECORDER = Recorder(settings, rows, line)
