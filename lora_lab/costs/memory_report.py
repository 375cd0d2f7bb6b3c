"""Which training setups fit on a card: the table behind ``lora-lab memory``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_lab.costs.fake import Source
from lora_lab.costs.memory import GIB, MIB, Bill, device_to_predict, largest, predict
from lora_lab.costs.setup import Setup
from lora_lab.lean.step import Lean
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.system.wording import progress_bar


def training_setups(rank: int = 8, dtype: torch.dtype | None = None, lean: bool = True) -> dict[str, Setup]:
    """Setups for training a language model, from the most memory to the least.

    Args:
        rank: LoRA's rank; alpha is twice the rank.
        dtype: of the weights; None leaves them as they are. The lean step saves its activations in float32.
        lean: with the lean step, which is for our Llama only.
    """
    full, lora = Setup(FullFineTuning(), dtype), Setup(LoRA(rank, 2 * rank), dtype)
    half = torch.bfloat16 if dtype == torch.bfloat16 else None
    setups = {
        "full fine-tuning": full,
        "full, checkpointing": replace(full, gradient_checkpointing=True),
        f"LoRA r={rank}": lora,
        f"LoRA r={rank}, checkpointing": replace(lora, gradient_checkpointing=True),
        f"LoRA r={rank}, lean, checkpointing": Setup(lora.method, lean=Lean(base_dtype=half, checkpoint=True)),
        f"QLoRA r={rank}, checkpointing": replace(lora, nf4=True, gradient_checkpointing=True),
    }
    return {label: setup for label, setup in setups.items() if lean or setup.lean is None}


@dataclass(frozen=True)
class SetupRow:
    """A row of the table: a training setup and what it needs.

    Args:
        setup: the label.
        bill: its memory.
        budget_bytes: the card's memory; None if no card was named.
        look_for: "batch" or "seq", if the largest that fits was searched for.
        largest: what was found, in sequences or in tokens per sequence.
    """

    setup: str
    bill: Bill
    budget_bytes: int | None = None
    look_for: str | None = None
    largest: int | None = None

    @property
    def free_bytes(self) -> int | None:
        """What the card has left at the peak: negative if the setup does not fit, None without a card."""
        return None if self.budget_bytes is None else self.budget_bytes - self.bill.peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the row and its bill, in values of JSON."""
        free = self.free_bytes
        return {
            "setup": self.setup,
            "fits": None if free is None else free >= 0,
            "free_bytes": free,
            "largest_batch_size": self.largest if self.look_for == "batch" else None,
            "largest_seq_len": self.largest if self.look_for == "seq" else None,
            **self.bill.to_dict(),
        }

    def __str__(self) -> str:
        row = f"{self.setup:<32}{self.bill.peak_bytes / GIB:>6.2f} GiB"
        if (free := self.free_bytes) is not None:
            row += f"  {'yes' if free >= 0 else 'no':<4}{f'({free / GIB:+.2f} GiB)':<14}"
        if self.largest is not None:
            row += f"{self.largest:>13,}"
        return row.rstrip()


def report(
    model: Source,
    name: str,
    setups: Mapping[str, Setup],
    batch_size: int,
    seq_len: int | None,
    device: torch.device | str | None = None,
    budget_bytes: int | None = None,
    look_for: str | None = None,
    with_bills: bool = False,
    on_row: Callable[[SetupRow], None] | None = None,
) -> dict[str, Bill]:
    """Print which training setups fit on a card, each row as soon as it is computed, and return the bills.

    A bar on standard error shows which bill is being made, and how many there are.

    Args:
        model, batch_size, seq_len, device: as for :func:`predict`; ``seq_len`` is None for a model that reads images.
        name: the model's name, for the heading.
        setups: label -> setup, such as those of :func:`training_setups`.
        budget_bytes: the card's memory; None leaves out the comparison.
        look_for: "batch" or "seq": also find the largest that fits, with the other unchanged.
        with_bills: print each bill, part by part, after the table.
        on_row: called with each row as soon as it is computed.

    Raises:
        ValueError: there is no setup, a size is to be found without a budget, or as for :func:`predict`.
    """
    if not setups:
        raise ValueError("setups is empty, so there is nothing to report; give some, such as training_setups(8).")
    if look_for and budget_bytes is None:
        raise ValueError(f"look_for is {look_for!r}, but budget_bytes is missing; give the memory to fit into.")
    bills: dict[str, Bill] = {}
    with progress_bar(len(setups), "memory", None, "setup") as bar:
        for label, setup in setups.items():
            bar.set_description(label)
            bill = bills[label] = predict(model, setup, batch_size, seq_len, device=device)
            if len(bills) == 1:  # not before predict has accepted the arguments
                with bar.external_write_mode():
                    print(_heading(name, bill, batch_size, seq_len, budget_bytes, look_for), flush=True)
            most = None
            if look_for and budget_bytes is not None:
                fixed = {"seq_len": seq_len} if look_for == "batch" else {"batch_size": batch_size}
                most = largest(model, setup, budget_bytes, device=device, **fixed)[0]
            row = SetupRow(label, bill, budget_bytes, look_for, most)
            with bar.external_write_mode():
                print(row, flush=True)
            if on_row is not None:
                on_row(row)
            bar.update()
    predicted_for, estimated = device_to_predict(model, device)
    if estimated or predicted_for.type == "cuda":
        print("In addition, CUDA's own context takes a few hundred MiB on the GPU, and the allocator leaves gaps.")
    for bill in bills.values() if with_bills else ():
        print(f"\n{bill}")
    return bills


def _heading(
    name: str, bill: Bill, batch_size: int, seq_len: int | None, budget_bytes: int | None, look_for: str | None
) -> str:
    size = f"{batch_size} pictures" if seq_len is None else f"{batch_size} x {seq_len} tokens"
    fits = "" if budget_bytes is None else f"  fits {budget_bytes / GIB:.4g} GiB?"
    columns = f"{'':<32}{'peak':>10}{fits:<20}{f'largest {look_for}' if look_for else ''}".rstrip()
    return f"{name}, batch {size}: peak of one step, {bill.source}\n{columns}"


def parse_bytes(text: str) -> int:
    """Return a size such as "24GiB", "512 MiB" or "80GB" in bytes.

    Raises:
        ValueError: the text is not a positive number with such a unit.
    """
    units = {"KIB": 2**10, "MIB": MIB, "GIB": GIB, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]i?B)\s*", text, flags=re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no size; write a number with its unit, such as 24GiB or 80GB.")
    return int(float(match[1]) * units[match[2].upper()])
