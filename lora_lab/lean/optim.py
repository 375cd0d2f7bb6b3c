"""AdamW over one flat tensor, and micro-batches in parallel threads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lora_lab.task import Loss

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdamW(torch.optim.Optimizer):
    """AdamW over one flat tensor per group: 420 adapter matrices take one pass instead of 420.

    Parameters become views of the flat tensor; their names, shapes and values do not change. ``state`` holds views
    for each parameter where ``torch.optim.AdamW`` holds tensors.

    Args: as for ``torch.optim.AdamW``.

    Raises:
        ValueError: the parameters of a group are of several dtypes or devices.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self._gradients: dict[nn.Parameter, Tensor] = {}  # each parameter's view
        self._flat: list[dict[str, Tensor]] = []  # of each group
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, which become views of a flat tensor of their own.

        It does not call torch's method, which loads torch's compiler at its first call (60 MB, and a second).
        """
        group = {**self.defaults, **param_group, "params": list(param_group["params"])}
        if any(parameter in self._gradients for parameter in group["params"]):
            raise ValueError("A parameter is in more than one group, so it would be updated twice; give it once.")
        self._flat.append(self._flatten(group["params"]))
        self.param_groups.append(group)

    def _flatten(self, parameters: list[nn.Parameter]) -> dict[str, Tensor]:
        if len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
            raise ValueError(
                "The parameters of a group are of several dtypes or devices, so they do not fit into one tensor; "
                "put them into several groups."
            )
        values = torch.cat([parameter.detach().flatten() for parameter in parameters])  # (2442240,)
        zeros = {name: torch.zeros_like(values) for name in ("gradients", *_MOMENTS)}  # (2442240,) each
        flat = {"values": values, **zeros, "step": torch.zeros((), device=values.device)}
        start = 0
        for parameter in parameters:
            part, start = slice(start, start + parameter.numel()), start + parameter.numel()
            parameter.data = values[part].view(parameter.shape)
            moments = {name: flat[name][part].view(parameter.shape) for name in _MOMENTS}
            self.state[parameter] = {"step": flat["step"], **moments}
            parameter.grad = self._gradients[parameter] = flat["gradients"][part].view(parameter.shape)
        return flat

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero; they remain views, whatever ``set_to_none`` is."""
        for parameter, view in self._gradients.items():
            parameter.grad = view
        for flat in self._flat:
            flat["gradients"].zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, here or for a ``torch.optim.AdamW`` with the same groups.

        Raises:
            ValueError: a parameter has no state, or the parameters of a group are at different steps.
        """
        for group in state_dict["param_groups"]:
            states = [state_dict["state"].get(index, {}) for index in group["params"]]
            complete = all({"step", *_MOMENTS} <= state.keys() for state in states)
            if not complete or len({float(state["step"]) for state in states}) > 1:
                raise ValueError(
                    "The parameters of a group need a state each, all at one step, because a FlatAdamW counts the "
                    "steps of a group once; load what state_dict() returned after a step on all of them."
                )
        views = dict(self.state)
        super().load_state_dict(state_dict)  # which replaces the views by copies
        loaded, self.state = self.state, defaultdict(dict, views)
        for parameter, state in views.items():
            for name, view in state.items():
                view.copy_(loaded[parameter][name])

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - the closure is optional in torch too
        """One step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""
        for parameter, view in self._gradients.items():
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:  # after the zero_grad() of the model, which drops the views
                view.copy_(parameter.grad)
        for group, flat in zip(self.param_groups, self._flat, strict=True):
            options = {name: group[name] for name in ("lr", "weight_decay", "eps")}
            options |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
            options |= {"fused": True, "amsgrad": False, "maximize": False}
            first, second = ([flat[name]] for name in _MOMENTS)
            adamw([flat["values"]], [flat["gradients"]], first, second, [], [flat["step"]], **options)


class ThreadedStep:
    """Forward and backward passes in parallel: each micro-batch in a Python thread, which computes on one core.

    When every operation runs on all cores, each one waits for the slowest core; here the cores wait once per step.
    Gradients are those of the micro-batches in sequence, up to the order of the sum.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(
        self, model: nn.Module, loss: Loss, batches: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
    ) -> list[Tensor]:
        """Add the gradients of the weighted losses to the parameters' ``grad``, and return the losses."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def loss_and_gradients(batch: tuple[Tensor, Tensor], weight: float) -> tuple[Tensor, Sequence[Tensor]]:
            weighted = loss(model, *batch) * weight  # ()
            return weighted.detach(), torch.autograd.grad(weighted, parameters, allow_unused=True)

        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            results = list(self.pool.map(loss_and_gradients, batches, weights))
        finally:
            torch.set_num_threads(before)
        for _, gradients in results:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return [weighted for weighted, _ in results]
