"""AdamW over one flat tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

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
            ValueError: the parameters of a group are at different steps.
        """
        for group in state_dict["param_groups"]:
            if len({float(state_dict["state"][index]["step"]) for index in group["params"]}) > 1:
                raise ValueError("The parameters of a group are at different steps, which a FlatAdamW counts once.")
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
