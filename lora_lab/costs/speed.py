"""Will LoRA be faster here? The FLOPs of a step, its time, and a model that predicts its time.

flops(model, LoRA(rank=8), 1, 128)                     by part and pass
step_time(model, {"full": ..., "LoRA": ...}, 1, 128)   real steps, in turn
cost_model().predict(model, {...}, 1, 128)             before any training, with the reason
cards.cost_model("l40s").predict(model, {...}, 1, 128) the same for a card that is not here, from its datasheet
communication(model, LoRA(rank=8), processes=2)        bytes that each process of a run on several machines sends
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_lab.costs import cards
from lora_lab.costs.cost_model import CAUSES, MEMORY, UPDATE, cost_model
from lora_lab.costs.fake import Source, fake_copy
from lora_lab.costs.flops import ADAPTERS, WEIGHT, break_even_rank, flops
from lora_lab.costs.setup import Setup, as_setup
from lora_lab.costs.timing import step_time
from lora_lab.methods import Method
from lora_lab.system.device import own_randomness
from lora_lab.system.schema import Size, check

__all__ = [
    "ADAPTERS",
    "CAUSES",
    "MEMORY",
    "UPDATE",
    "WEIGHT",
    "break_even_rank",
    "cards",
    "communication",
    "cost_model",
    "flops",
    "step_time",
]


@dataclass(frozen=True)
class Communication:
    """The bytes of the all-reduce of one step of ``fit``.

    Args:
        gradient_bytes: the gradients of all trained parameters, in their dtypes.
        reduced_bytes: what is summed over the processes: the gradients, the loss, and for each parameter whether it has
            a gradient.
        sent_bytes: what each process sends, and receives, at the least: 2 (n - 1) / n of what is summed, without
            headers. A ring reaches that (Patarasu and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters
            of workstations, section 3): each process passes on 1/n of the data n - 1 times to be added, and n - 1 times
            to be copied.
        processes: how many train together.
        setting: the model and the setup.
    """

    gradient_bytes: int
    reduced_bytes: int
    sent_bytes: float
    processes: int
    setting: str


def communication(model: Source, method: Method | Setup, processes: int = 2, **options: Any) -> Communication:
    """Count what each process of a data-parallel run sends in a step of ``fit``; nothing is allocated or sent.

    Args:
        model, method, **options: as for :func:`lora_lab.costs.flops.flops`.
        processes: how many train together.

    Raises:
        ValueError: ``processes`` is below 1, an option is out of range, or the model cannot be made ready.
    """
    check(processes, Size, "processes")
    setup, cpu = as_setup(method, options), torch.device("cpu")
    with fake_copy(model, cpu, setup.dtype) as twin, own_randomness(cpu, 0):
        groups = setup.step(twin).optimizer.param_groups
    trained: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
    gradients = sum(parameter.nbytes for parameter in trained)
    reduced = gradients + torch.float64.itemsize * (1 + len(trained))
    sent = 2 * (processes - 1) / processes * reduced
    return Communication(gradients, reduced, sent, processes, f"{type(twin).__name__}, {setup.describe()}")
