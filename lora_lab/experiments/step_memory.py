"""``lora-lab record memory``: predicted and measured bills of many ways to train, each in a process of its own.

Weights are random: how much memory and time a step takes does not depend on what the weights say.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
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
from lora_lab.experiments.recorder import Recorder, with_bar
from lora_lab.lean.step import Lean
from lora_lab.methods import DoRA, FullFineTuning, LoRA, LoRAFA, PiSSA
from lora_lab.models import shapes
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.system.process import peak_bytes, run_in_subprocess

# The heap gives back what is freed: else its holes count as the process's memory, and differ from run to run.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_WAIT_POLICY": "passive"}
SMALL = "small"  # a Llama for seconds
_SMALL = LlamaConfig(16384, 384, 1024, 8, 6, 2, 64, tie_word_embeddings=True)
# The lessons compare these over growing contexts.
MAIN = ("full", "LoRA r=8", "LoRA-FA r=8", "LoRA r=8, attention only", "LoRA r=8, checkpointing")
CONTEXTS = (64, 256, 1024)
_ON_SMOLLM2 = (
    *("full", "full, SGD", "full, bf16", "full, checkpointing"),
    *("LoRA r=1", "LoRA r=8", "LoRA r=64", "LoRA r=8, attention only", "LoRA-FA r=8", "LoRA r=8, NF4 base"),
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
    """One step to be measured: a model's name, a batch, a label, and how it is trained."""

    model: str
    batch_size: int
    seq_len: int
    label: str
    setup: Setup

    @property
    def key(self) -> dict[str, Any]:
        """What names the case in a record's row."""
        return {"model": self.model, "batch": self.batch_size, "length": self.seq_len, "setup": self.label}


def memory_setups() -> dict[str, Setup]:
    """Every way to train that the memory bill is checked on."""
    lora = Setup(LoRA(8, 16))
    plain = {
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
    found = dict(plain)
    for label in ("full", "LoRA r=8", "LoRA r=64", "LoRA-FA r=8", "LoRA r=8, attention only"):
        found[f"{label}, bf16"] = replace(plain[label], dtype=BF16)
    for label in ("full", "LoRA r=8", "LoRA-FA r=8", "LoRA r=8, NF4 base", "full, bf16", "LoRA r=8, bf16"):
        found[f"{label}, checkpointing"] = replace(found[label], gradient_checkpointing=True)
    found["full, SGD"] = Setup(FullFineTuning(), optimizer="sgd")
    found["LoRA r=8, 2 micro-batches"] = replace(lora, accumulate=2)
    found["LoRA r=8, lean"] = replace(lora, lean=Lean())
    found["LoRA r=8, lean, bf16 base"] = replace(lora, lean=Lean(base_dtype=BF16))
    found["LoRA r=8, lean, checkpointing"] = replace(lora, lean=Lean(checkpoint=True, loss_rows=64))
    return found


def memory_cases(device: torch.device, models: list[str] | None = None) -> list[Case]:
    """Every setup on a small model, many on SmolLM2, the main ones over growing contexts; larger models on a GPU."""
    setups = memory_setups()
    cases = [Case(SMALL, 4, 128, label, setup) for label, setup in setups.items()]
    cases += [Case("smollm2-135m", 2, 128, label, setups[label]) for label in _ON_SMOLLM2]
    for length in CONTEXTS:
        cases += [Case("smollm2-135m", 1, length, label, setups[label]) for label in MAIN]
    if device.type == "cuda":
        large = [label for label in setups if "bf16" in label and "lean" not in label] + ["LoRA r=8, lean, bf16 base"]
        for model in ("llama-3.2-1b", "llama-3-8b"):
            cases += [Case(model, 1, 1024, label, setups[label]) for label in large]
            cases.append(Case(model, 1, 1024, "QLoRA r=8, bf16", replace(setups["LoRA r=8, NF4 base"], dtype=BF16)))
    return chosen(cases, models)


def chosen(cases: list[Any], models: list[str] | None) -> list[Any]:
    """The cases of the given models, or all.

    Raises:
        ValueError: there are none of one.
    """
    known = list(dict.fromkeys(case.model for case in cases))
    if unknown := [name for name in models or () if name not in known]:
        raise ValueError(f"There are no cases of {unknown[0]!r} on this device; there are of {', '.join(known)}.")
    return [case for case in cases if models is None or case.model in models]


def memory_row(case: Case, device: str) -> dict[str, Any]:
    """Predict, then measure, then take two steps unobserved to see what the whole process needs for them."""
    place = torch.device(device)
    factory = partial(random_model, case.model)
    predicted = predict(factory, case.setup, case.batch_size, case.seq_len, device=place)
    gc.collect()
    process = process_bytes(factory, case, place) if place.type == "cpu" else None
    gc.collect()
    batch = token_batch(nn.Linear(1, 1, device=place), case.batch_size, case.seq_len)
    measured = measure(factory, case.setup, batch, device=place)
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
    """How much larger the process is in two steps, at its highest, than without the model; None where nobody tells.

    It grows by more than tensors: the heap's holes, and what libraries allocate for themselves.
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
    _REFERENCES.write_text("5")  # the kernel's high-water mark starts anew: casting is no step
    for _ in range(2):
        step(parts, weights)
    return peak_bytes(device) - before


def _load_code() -> None:
    """Take a step of AdamW on one number: the code that torch loads for its first one is 60 MB, and no step's."""
    number = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([number], fused=True)
    number.square().sum().backward()
    optimizer.step()
    _trim_heap()


def _trim_heap() -> None:
    """Give what the heap holds of freed memory back to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory(device: torch.device, models: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a memory record, as they are measured, each case in a fresh process.

    A case that does not fit into memory is left out, and said to be on stderr.

    Args:
        models: only cases of these.

    Raises:
        ValueError: there are no cases of one.
    """
    for case in with_bar(memory_cases(device, models)):
        try:
            yield run_in_subprocess(memory_row, case, str(device), environment=HEAP)
        except (MemoryError, torch.OutOfMemoryError):
            leave_out(f"{case.label} on {case.model}, {case.batch_size} x {case.seq_len}")


def leave_out(what: str) -> None:
    """Say on stderr that a case is left out."""
    tqdm.write(f"left out, for it does not fit into memory: {what}", file=sys.stderr)


def settings(device: torch.device) -> dict[str, Any]:
    """What a record says of how its rows were measured."""
    return {"environment": HEAP, "optimizer": "AdamW, fused, gradients clipped to norm 1", "weights": "random"}


def name(row: dict[str, Any]) -> str:
    """What a row is about, in a few words."""
    return f"{row['setup']} on {row['model']}, {row['batch']} x {row['length']}"


def line(row: dict[str, Any]) -> str:
    """A row for a person to read."""
    off = row["predicted_bytes"] / row["measured_bytes"] - 1
    process = "" if row["process_bytes"] is None else f"  process {row['process_bytes'] / MIB:9,.1f}"
    predicted, measured = row["predicted_bytes"] / MIB, row["measured_bytes"] / MIB
    return f"{case_columns(row)}predicted {predicted:9,.1f}  measured {measured:9,.1f} MiB ({off:+.2%}){process}"


def case_columns(row: dict[str, Any]) -> str:
    """What a row is about, as the first columns of its line."""
    return f"{row['model']:<14}{row['batch']} x {row['length']:<6}{row['setup']:<38}"


RECORDER = Recorder("memory", settings, memory, line, of_models=True)
