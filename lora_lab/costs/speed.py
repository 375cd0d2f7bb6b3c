"""Will LoRA be faster here? The FLOPs of a step, its time, and a model that predicts its time.

flops(model, LoRA(rank=8), 1, 128)                     by part and pass
step_time(model, {"full": ..., "LoRA": ...}, 1, 128)   real steps, in turn
cost_model().predict(model, {...}, 1, 128)             before any training, with the reason
cards.cost_model("l40s").predict(model, {...}, 1, 128) the same for a card that is not here, from its datasheet
communication(model, LoRA(rank=8), processes=2)        bytes that each of several processes sends in a step
"""

from __future__ import annotations

from typing import Any

import torch

from lora_lab.costs import cards
from lora_lab.costs.fake import Source, build_on_meta
from lora_lab.costs.flops import ADAPTERS, WEIGHT, break_even_rank, flops
from lora_lab.costs.repeated import prepare_shapes
from lora_lab.costs.setup import Setup, as_setup
from lora_lab.costs.timing import CAUSES, MEMORY, UPDATE, cost_model, step_time
from lora_lab.methods import Method
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


def communication(model: Source, method: Method | Setup, processes: int = 2, **options: Any) -> float:
    """Return the bytes that each process of a data-parallel run sends in a step of ``fit``; nothing is allocated.

    It sends, and receives, 2 (n - 1) / n of what is summed over n processes, without headers: the gradients of all
    trained parameters, the loss, and for each parameter whether it has a gradient. That is the least, and a ring
    reaches it (Patarasu and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations,
    section 3): each process passes on 1/n of the data n - 1 times to be added, and n - 1 times to be copied.

    Args:
        model, method, **options: as for :func:`lora_lab.costs.flops.flops`.
        processes: how many train together.

    Raises:
        ValueError: ``processes`` is below 1, an option is out of range, or the model cannot be made ready.
    """
    check(processes, Size, "processes")
    setup = as_setup(method, options)
    trained = [each for each in prepare_shapes(build_on_meta(model), setup).parameters() if each.requires_grad]
    reduced = sum(parameter.nbytes for parameter in trained) + torch.float64.itemsize * (1 + len(trained))
    return 2 * (processes - 1) / processes * reduced
