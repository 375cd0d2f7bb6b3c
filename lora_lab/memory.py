"""What a training step keeps in memory, by cause, and how much the process took at its peak.

A model being trained holds its weights, a gradient for each trainable one, the optimiser's state (AdamW:
two numbers for each), and the activations that autograd keeps from forward to backward. LoRA cuts the
second and the third; it leaves the first and most of the last.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps when ``forward()`` is run, parameters and buffers left out.

    Tensors that share memory are counted once (Hugging Face's and torchtune's ways of counting by tensor
    count them again).

    Args:
        forward: runs the model and its loss, and returns what it likes.
        model: whose parameters do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held until the count is done, so that no address is used twice
    total = sum(kept.values())
    del result
    return total


def parts(model: nn.Module, optimizer_bytes: int, activation_bytes: int) -> dict[str, int]:
    """Bytes by cause after a step, when gradients are still there.

    Args:
        optimizer_bytes: size of the optimiser's state, as ``History.optimizer_bytes``.
        activation_bytes: as :func:`saved_bytes` counts them.
    """

    def size(tensors: list[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    parameters = list(model.parameters())
    return {
        "frozen weights": size([p for p in parameters if not p.requires_grad]) + size(list(model.buffers())),
        "trained weights": size([p for p in parameters if p.requires_grad]),
        "gradients": size([p.grad for p in parameters if p.grad is not None]),
        "optimiser state": optimizer_bytes,
        "saved activations": activation_bytes,
    }


def peak_bytes(device: torch.device) -> int:
    """The most memory ever held: torch's allocator on a CUDA device, the whole process (resident) elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; getrusage would count the parent's memory in a process that it started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
