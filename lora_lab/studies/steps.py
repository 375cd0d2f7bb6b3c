"""``lora-lab record memory`` and ``lora-lab record speed``: what a training step costs, predicted and measured.

Each setup's memory is measured in a process of its own; the times of setups are measured in turn in one process.
Weights are random, because the memory and time of a step do not depend on their values.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import nn
from tqdm.auto import tqdm

from lora_lab.costs.fake import batch_for, last_blocks
from lora_lab.costs.flops import flops
from lora_lab.costs.memory import measure, predict
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import CostModel, cost_model, step_time
from lora_lab.lean.step import Lean
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.models import shapes
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.studies.recorder import Recorder, Row
from lora_lab.system.device import peak_bytes, run_in_subprocess
from lora_lab.system.wording import count_noun, progress_bar
from lora_lab.variants import DoRA, LoRAFA, PiSSA

SMALL, SMOLLM2 = "small", "smollm2-135m"  # the first is a Llama for runs of seconds
_SMALL = LlamaConfig(16384, 384, 1024, 8, 6, 2, 64, tie_word_embeddings=True)
BF16 = torch.bfloat16
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def random_model(name: str) -> Llama:
    """Return a Llama of a known shape, or "small", with random weights."""
    return Llama(_SMALL if name == SMALL else shapes.config(name))


@dataclass(frozen=True)
class Case:
    """Setups, by their labels, that are measured on one batch of a model; the first is the baseline of the others."""

    model: str
    batch_size: int
    seq_len: int
    setups: Mapping[str, Setup]
    rounds: int = 1

    @property
    def key(self) -> Row:
        """The columns of a record that the setups share."""
        return {"model": self.model, "batch": self.batch_size, "length": self.seq_len}

    @property
    def setup(self) -> Setup:
        """The setup of a case that has one alone."""
        (setup,) = self.setups.values()
        return setup


def measure_cases(
    cases: Sequence[Case], models: Sequence[str] | None, measure: Callable[[Case], Iterable[Row]]
) -> Iterator[Row]:
    """Yield the rows of a record as they are measured.

    A case that does not fit into memory is skipped, and reported on stderr.

    Args:
        cases: what is measured.
        models: measure only these.
        measure: makes the rows of a case.

    Raises:
        ValueError: there are no cases of one of the models.
    """
    known = list(dict.fromkeys(case.model for case in cases))
    if unknown := [model for model in models or () if model not in known]:
        raise ValueError(f"There are no cases of {unknown[0]!r} on this device; there are of {', '.join(known)}.")
    cases = [case for case in cases if models is None or case.model in models]
    with progress_bar(len(cases), "record", None, "case") as bar:
        for case in cases:
            try:
                yield from measure(case)
            except (MemoryError, torch.OutOfMemoryError):
                what = f"{' and '.join(case.setups)} on {case.model}, {case.batch_size} x {case.seq_len}"
                tqdm.write(f"skipped, because it does not fit into memory: {what}", file=sys.stderr)
            gc.collect()
            bar.update()


# Memory

# The heap returns freed memory: otherwise its holes count as the process's memory, and differ from run to run.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_WAIT_POLICY": "passive"}
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
_REFERENCES = Path("/proc/self/clear_refs")


def memory_setups() -> dict[str, Setup]:
    """Return every setup on which the memory prediction is checked, by its label."""
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


def memory_cases(device: torch.device) -> list[Case]:
    """Return all setups on a small model, many on SmolLM2, the main ones over growing contexts; larger on a GPU."""
    setups = memory_setups()
    cases = [Case(SMALL, 4, 128, {label: setup}) for label, setup in setups.items()]
    cases += [Case(SMOLLM2, 2, 128, {label: setups[label]}) for label in _ON_SMOLLM2]
    for length in CONTEXTS:
        cases += [Case(SMOLLM2, 1, length, {label: setups[label]}) for label in MAIN]
    if device.type == "cuda":
        large = {label: setup for label, setup in setups.items() if setup.dtype == BF16}
        large["LoRA r=8, lean, bf16 base"] = setups["LoRA r=8, lean, bf16 base"]
        large["QLoRA r=8, bf16"] = replace(setups["LoRA r=8, NF4 base"], dtype=BF16)
        for model in ("llama-3.2-1b", "llama-3-8b"):
            cases += [Case(model, 1, 1024, {label: setup}) for label, setup in large.items()]
    return cases


def measure_case(case: Case, device: str) -> Row:
    """Return the row of a case with one setup: its peak as predicted, as the process has it, and as measured by part.

    The process takes its two steps unobserved, before the one that is measured.
    """
    (label,) = case.setups
    target = torch.device(device)
    factory = partial(random_model, case.model)
    predicted = predict(factory, case.setup, case.batch_size, case.seq_len, device=target)
    gc.collect()
    process = process_bytes(factory, case, target)
    gc.collect()
    batch = batch_for(nn.Linear(1, 1, device=target), case.batch_size, case.seq_len)
    measured = measure(factory, case.setup, batch, device=target)
    return {
        **case.key,
        "setup": label,
        "predicted_bytes": predicted.peak_bytes,
        "measured_bytes": measured.peak_bytes,
        "saved_bytes": measured.saved_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "process_bytes": process,
        **measured.parts,
    }


def process_bytes(factory: Callable[[], Llama], case: Case, device: torch.device) -> int | None:
    """Return the peak of the process in two steps, less its memory before the model was built.

    It is None on a GPU, and on other systems than Linux. The process grows by more than tensors: by holes in the heap,
    and by what libraries allocate for themselves.
    """
    if device.type != "cpu" or not os.access(_REFERENCES, os.W_OK):
        return None
    _load_code()
    before = psutil.Process().memory_info().rss
    model = factory()
    setup = case.setup
    step = setup.step(model if setup.dtype is None else model.to(setup.dtype))
    parts, weights = setup.batches(batch_for(model, case.batch_size, case.seq_len))
    gc.collect()
    _trim_heap()
    # Reset the kernel's peak, so that it does not include the cast.
    _REFERENCES.write_text("5", encoding="ascii")
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


def record_memory(device: torch.device, models: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a record of memory, each measured in a fresh process (:func:`measure_cases`)."""
    apart = partial(run_in_subprocess, measure_case, environment=HEAP)
    yield from measure_cases(memory_cases(device), models, lambda case: [apart(case, str(device))])


_ADAM = "AdamW, fused, gradients clipped to norm 1"
MEMORY = Recorder(lambda device: {"environment": HEAP, "optimizer": _ADAM, "weights": "random"}, record_memory)


# Speed

# (batch size, sequence length) -> rounds of the small model, and of SmolLM2
ROUNDS = {(1, 32): (9, 9), (1, 128): (9, 9), (4, 128): (9, 6), (8, 256): (6, 3), (8, 512): (6, 3)}


def speed_cases(device: torch.device) -> list[Case]:
    """Return 32 to 4,096 tokens a step, ranks 1 to 256, all blocks or the last ones, two models; more on a GPU."""
    small = list_setups(SMALL, (1, 8, 64, 256), (1, 4))
    many, few = list_setups(SMOLLM2, (1, 8, 64, 256), (1, 10)), list_setups(SMOLLM2, (8, 256), (1,))
    cases = [Case(SMALL, *size, small, rounds) for size, (rounds, _) in ROUNDS.items()]
    for (batch_size, seq_len), (_, rounds) in ROUNDS.items():
        setups = many if batch_size * seq_len <= 512 else few
        cases.append(Case(SMOLLM2, batch_size, seq_len, setups, rounds))
    if device.type == "cuda":
        for model in (SMOLLM2, "llama-3.2-1b", "llama-3-8b"):
            setups = list_setups(model, (8, 64), (1,))
            # All setups are in memory at once, and AdamW's state for 8B fills a GPU alone.
            if model == "llama-3-8b":
                del setups["full"]
            setups = {f"{label}, bf16": replace(setup, dtype=BF16) for label, setup in setups.items()}
            cases += [Case(model, *size, setups, 9) for size in ((1, 128), (4, 512), (8, 1024))]
    return cases


def list_setups(model: str, ranks: Sequence[int], last: Sequence[int]) -> dict[str, Setup]:
    """Return full fine-tuning, LoRA of these ranks in all blocks, and LoRA in so many of the last blocks."""
    with torch.device("meta"):
        llama = random_model(model)
    setups = {"full": Setup(FullFineTuning())} | {f"LoRA r={rank}": Setup(LoRA(rank, 2 * rank)) for rank in ranks}
    for count in last:
        label = f"LoRA r=8, last {count_noun(count, 'block')}"
        setups[label] = Setup(LoRA(8, 16, targets=last_blocks(llama, count)))
    return setups


def compare_times(case: Case, costs: CostModel, device: torch.device) -> Iterator[Row]:
    """Yield a row for each setup: they are predicted, then timed in turn."""
    factory, size = partial(random_model, case.model), (case.batch_size, case.seq_len)
    predicted = costs.predict(factory, case.setups, *size)
    times = step_time(factory, case.setups, *size, rounds=case.rounds, device=device, progress=False)
    for row in times.to_dict()["variants"]:
        label = row.pop("variant")
        yield {
            **case.key,
            "setup": label,
            "tokens": case.batch_size * case.seq_len,
            "rounds": case.rounds,
            **row,
            "verdict": row["verdict"] or "",
            "predicted_ratio": predicted.ratio(label),
            "flops": flops(factory, case.setups[label], *size).total,
        }


def record_speed(device: torch.device, models: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a record of times (:func:`measure_cases`)."""
    costs = cost_model(device)
    yield from measure_cases(speed_cases(device), models, lambda case: compare_times(case, costs, device))


SPEED = Recorder(
    lambda device: {"environment": {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "")}, "weights": "random"},
    record_speed,
)
