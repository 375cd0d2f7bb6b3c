"""Gradient checkpointing: what a block saves for its backward pass is computed again when that pass asks for it.

It does what ``torch.utils.checkpoint`` does, which loads torch's compiler at its first call (60 MB, and a second).

Reference: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _AllSaved(Exception):
    """The forward pass has saved all it saved the first time; what is left to compute is not needed."""


def recomputed(function: Callable[..., Tensor], *arguments: Tensor | None, random: bool) -> Tensor:
    """``function(*arguments)``, of which only the arguments are saved, and the parameters that it reads.

    Args:
        function: of tensors; it computes the same at every call.
        *arguments: its tensors, or None.
        random: whether it draws from torch's random generators; the second time it draws the same.
    """
    random_states = _random_states(arguments) if random else None
    count = 0
    again: dict[int, Tensor] = {}  # by their order, the tensors saved in the second forward pass

    def number(_: Tensor) -> int:
        nonlocal count
        count += 1
        return count - 1

    def compute_again(index: int) -> Tensor:
        if not again:
            with nullcontext() if random_states is None else _restored(random_states):
                again.update(enumerate(_saved_tensors(function, arguments, count)))
        return again.pop(index)

    with saved_tensors_hooks(number, compute_again):
        return function(*arguments)


def _saved_tensors(function: Callable[..., Tensor], arguments: tuple[Tensor | None, ...], count: int) -> list[Tensor]:
    """Return the first ``count`` tensors that a forward pass saves; it is left as soon as it has saved them."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # detached, because an output would keep its own graph alive
        if len(saved) == count:
            raise _AllSaved
        return saved[-1]

    inputs = [None if each is None else each.detach().requires_grad_(each.requires_grad) for each in arguments]
    try:
        with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            function(*inputs)
    except _AllSaved:
        pass
    return saved


def _random_states(arguments: tuple[Tensor | None, ...]) -> dict[torch.device, Tensor]:
    """Return the states of torch's generators on the CPU and on the arguments' devices."""
    cuda = {argument.device for argument in arguments if argument is not None and argument.device.type == "cuda"}
    return {torch.device("cpu"): torch.get_rng_state()} | {device: torch.cuda.get_rng_state(device) for device in cuda}


@contextmanager
def _restored(states: dict[torch.device, Tensor]) -> Iterator[None]:
    """Let torch's generators draw from these states on, and put them back where they were at the end."""
    cuda = [device for device in states if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        torch.set_rng_state(states[torch.device("cpu")])
        for device in cuda:
            torch.cuda.set_rng_state(states[device], device)
        yield
