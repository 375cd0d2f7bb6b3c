"""The layer of a pack: one frozen weight with many adapters beside it; and the losses of each trial."""

# torch declares Function.backward(ctx, *grad_outputs), which each backward below narrows to its own outputs.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lab.lean.blocks import LeanBlockHead, LeanHead
from lora_lab.lean.linear import JointLinear, call_in_weight_dtype, cast_addmm_, cast_matmul
from lora_lab.lean.loss import token_losses
from lora_lab.models.llama import Llama
from lora_lab.models.quantize import BlockLinear
from lora_lab.task import IGNORE, Loss, cross_entropy, logits, mean_squared_error

_LOSS_ROWS = 128  # tokens whose logits exist at one moment: 25 MB for SmolLM2, memory that the C library keeps


class PackingError(ValueError):
    """These runs cannot share a pass: a ValueError of its own, so that a caller can run them separately."""


class PackedLinear(JointLinear):
    """A frozen linear layer with K updates beside it, each for one K-th of the rows.

    Args:
        base: the ``nn.Linear`` or BlockLinear that all trials share.
        A: (K, R, in), zero in the rows from each trial's rank on.
        B: (K, out, R), zero in those columns.
        scaling: (K,), alpha / rank of each trial.
    """

    scaling: Tensor

    def __init__(self, base: nn.Linear | BlockLinear, A: Tensor, B: Tensor, scaling: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(A)  # (20, 16, 64)
        self.lora_B = nn.Parameter(B)  # (20, 128, 16)
        self.register_buffer("scaling", scaling.view(-1, 1, 1), persistent=False)  # (20, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project([self], x)[0]  # (640, 64) -> (640, 128)

    def project(self, layers: Sequence[PackedLinear], x: Tensor) -> Sequence[Tensor]:
        """Return the outputs of several packed layers of one input."""
        return _multiply(layers, x)  # (640, 64) -> a tuple of (640, 128)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the output for ``silu(gate) * up``, which is not saved: the backward pass computes it again."""
        return _multiply([self], gate, up)[0]  # 2 x (8, 64, 1536) -> (8, 64, 576)

    @property
    def weight(self) -> Tensor:
        """There is none: K trials have K weights.

        Raises:
            PackingError: always; some modules read the weight of a layer inside them and never call the layer.
        """
        raise PackingError(
            "The model reads the weight of an adapted layer instead of calling the layer, and the trials of a pack "
            "have no common weight; run them separately, with fit."
        )


def _multiply(layers: Sequence[PackedLinear], x: Tensor, up: Tensor | None = None) -> Sequence[Tensor]:
    """Return the outputs of packed layers of one input: x, or silu(x) * up."""
    trials = len(layers[0].scaling)
    if len(x) % trials:
        raise PackingError(
            f"A layer was given {len(x)} rows, which are not the examples of {trials} trials, as where the first "
            "dimension of a tensor is not the batch; run the trials separately, with fit."
        )
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    return _PackedLinears.apply(x, up, layers, *factors)


def _forward(
    x: Tensor, layers: Sequence[PackedLinear], factors: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return W0 x_k + scaling_k * B_k A_k x_k of each layer, x trial by trial, and scaling_k * A_k x_k of all."""
    As, Bs = factors[::2], factors[1::2]
    per_trial = x.reshape(len(As[0]), -1, x.shape[-1]).to(As[0].dtype)  # (20, 32, 64): rows come trial by trial
    narrow = torch.bmm(_join(As), per_trial.mT)  # (20, 16, 64) @ (20, 64, 32) -> (20, 16, 32)
    outputs = []
    for layer, part, B in zip(layers, narrow.split([A.shape[1] for A in As], 1), Bs, strict=True):
        part.mul_(layer.scaling)  # (20, 16, 32)
        y = call_in_weight_dtype(layer.base, x).contiguous()  # (640, 64) -> (640, 128), one product for all trials
        _add_product(y.view(*per_trial.shape[:2], -1), part.mT, B.mT)  # (20, 32, 128)
        outputs.append(y)
    return outputs, per_trial, narrow


def _backward(
    gs: Sequence[Tensor],
    x: Tensor,
    narrow: Tensor,
    layers: Sequence[PackedLinear],
    factors: Sequence[Tensor],
    needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of the input, or None, and of A and B of each layer in turn.

    Autograd would give the same. By hand the narrow products have their short side first, which takes half the time,
    and updates are added in place.
    """
    As, Bs, ranks = factors[::2], factors[1::2], [A.shape[1] for A in factors[::2]]
    per_trial = [g.reshape(*x.shape[:2], -1).to(As[0].dtype) for g in gs]  # (640, 128) -> (20, 32, 128)
    narrowed = _join(
        [
            torch.bmm(B.mT, g.mT).mul_(layer.scaling)  # (20, 16, 128) @ (20, 128, 32) -> (20, 16, 32)
            for B, g, layer in zip(Bs, per_trial, layers, strict=True)
        ]
    )
    dBs = [
        torch.bmm(part, g).mT  # (20, 16, 32) @ (20, 32, 128) -> (20, 128, 16)
        for part, g in zip(narrow.split(ranks, 1), per_trial, strict=True)
    ]
    dAs = torch.bmm(narrowed, x).split(ranks, 1)  # (20, 16, 32) @ (20, 32, 64) -> (20, 16, 64)
    dx = None
    if needs_dx:
        for g, layer in zip(gs, layers, strict=True):  # (640, 128) @ (128, 64) -> (640, 64), one product again
            flat, weight = g.reshape(-1, g.shape[-1]), layer.base.weight
            dx = cast_matmul(flat, weight) if dx is None else cast_addmm_(dx, flat, weight)  # (640, 64)
        _add_product(cast(Tensor, dx).view(x.shape), narrowed.mT, _join(As))  # (20, 32, 64)
    return dx, [gradient for pair in zip(dAs, dBs, strict=True) for gradient in pair]


class _PackedLinears(torch.autograd.Function):
    """Several packed layers of one x, or of silu(x) * up, of which only x and up are saved; backward by hand."""

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor | None, layers: Sequence[PackedLinear], *factors: Tensor):
        outputs, per_trial, narrow = _forward(x if up is None else F.silu(x).mul_(up), layers, factors)
        ctx.save_for_backward(per_trial if up is None else x, up, narrow, *factors)
        ctx.layers, ctx.shape = layers, x.shape
        return tuple(outputs)  # (640, 128) each

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs: Tensor):
        x, up, narrow, *factors = ctx.saved_tensors
        if up is None:
            dx, gradients = _backward(gs, x, narrow, ctx.layers, factors, ctx.needs_input_grad[0])
            return None if dx is None else dx.view(ctx.shape), None, None, *gradients
        activated = F.silu(x)  # (8, 64, 1536)
        gated = (activated * up).view(len(narrow), -1, x.shape[-1])  # (8, 64, 1536), trial by trial
        dx, gradients = _backward(gs, gated, narrow, ctx.layers, factors, any(ctx.needs_input_grad[:2]))
        if dx is None:
            return None, None, None, *gradients
        dx = dx.view(ctx.shape)  # (8, 64, 1536)
        d_up = activated.mul_(dx)  # (8, 64, 1536)
        return torch.ops.aten.silu_backward(dx.mul_(up), x), d_up, None, *gradients  # (8, 64, 1536)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to total, in place; a base in half precision has adapters in float32."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))


def _cross_entropies(model: nn.Module, inputs: Tensor, targets: Tensor, trials: int) -> Tensor:
    counts = targets.flatten() != IGNORE  # (640,)
    if isinstance(model, Llama) and _sums_in_full_precision(model.lm_head):
        # In slices: the logits of a pack may take more memory than all else, and are needed only for a moment.
        hidden = model.model(inputs).flatten(0, -2)  # (512, 576)
        losses = token_losses(hidden, targets.flatten().clamp(min=0), model.lm_head, _LOSS_ROWS)  # (512,)
        losses = losses.where(counts, 0.0)  # (512,)
    else:
        outputs = logits(model, inputs, targets).flatten(0, -2)  # (640, 10)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # (640, 10)
        losses = F.cross_entropy(outputs, targets.flatten(), ignore_index=IGNORE, reduction="none")  # (640,)
    return losses.view(trials, -1).sum(1) / counts.view(trials, -1).sum(1).clamp(min=1)  # (20,)


def _sums_in_full_precision(head: nn.Module) -> bool:
    """Return whether a head has no adapter and its slices are summed in full precision, as losses must be."""
    dtype = head.dtype if isinstance(head, BlockLinear) else head.weight.dtype if type(head) is nn.Linear else None
    return isinstance(head, LeanHead | LeanBlockHead) or dtype in (torch.float32, torch.float64)


def _squared_errors(model: nn.Module, inputs: Tensor, targets: Tensor, trials: int) -> Tensor:
    return F.mse_loss(logits(model, inputs), targets, reduction="none").view(trials, -1).mean(1)  # (20,)


# The losses of lora_lab.tasks, and how to compute them for each trial of a joined batch.
TRIAL_LOSSES: dict[Loss, Callable[..., Tensor]] = {cross_entropy: _cross_entropies, mean_squared_error: _squared_errors}
