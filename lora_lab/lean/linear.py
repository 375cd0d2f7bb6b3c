"""LoRA's matrix multiplications for several layers of one input, with a hand-written backward pass."""

# torch declares Function.backward(ctx, *grad_outputs), which each backward below narrows to its own outputs.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lab.lora import LoRALayer, LoRALinear
from lora_lab.models.quantize import BlockLinear

# Linear layers


class JointLinear(nn.Module):
    """A linear layer that defines how several layers of its class multiply one input, such as the layers of a pack."""

    def project(self, layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
        """As the function :func:`project`, of layers of this class."""
        raise NotImplementedError

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """As :func:`gated_linear`."""
        raise NotImplementedError


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` for a linear layer with or without an adapter, in ``x``'s dtype whatever that of its weight."""
    return project([layer], x)[0]  # (4, 128, 1536)


def project(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Return the outputs of several linear layers of one input, which is saved and rounded once for all of them."""
    fused = [layer for layer in layers if _is_fusible(layer)]
    outputs: dict[nn.Module, Tensor] = {}
    if joint := [layer for layer in layers if isinstance(layer, JointLinear)]:
        outputs |= zip(joint, joint[0].project(joint, x), strict=True)
    if fused:
        outputs |= zip(fused, _fuse(fused, x), strict=True)
    return [outputs[layer] if layer in outputs else _unfused(layer, x) for layer in layers]  # 3 x (4, 128, 1536)


def gated_linear(layer: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """``layer(silu(gate) * up)``, whose input the backward pass recomputes, so that it is not saved."""
    if isinstance(layer, JointLinear):
        return layer.gated(gate, up)  # (4, 128, 576)
    if not _is_fusible(layer):
        return linear(layer, F.silu(gate) * up)  # (4, 128, 576)
    return _fuse([layer], gate, up)[0]  # (4, 128, 576)


def _fuse(layers: Sequence[LoRALinear], x: Tensor, up: Tensor | None = None) -> Sequence[Tensor]:
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    return _LoRALinears.apply(x, up, layers, *factors)  # 3 x (4, 128, 1536)


def is_plain_lora(layer: nn.Module) -> TypeGuard[LoRALinear]:
    """Return whether a layer is an adapted one whose forward pass is that of plain LoRA."""
    return type(layer).forward is LoRALinear.forward


def _is_fusible(layer: nn.Module) -> TypeGuard[LoRALinear]:
    """Return whether the hand-written gradients are right for a layer: plain LoRA, no dropout, over a frozen base."""
    if not is_plain_lora(layer) or (layer.training and isinstance(layer.dropout, nn.Dropout)):
        return False
    return not is_trained(layer.base)


def is_trained(layer: nn.Module) -> bool:
    """Return whether a parameter of the layer itself requires a gradient."""
    # Called some hundred times per step, and parameters() takes twice the time.
    return any(parameter is not None and parameter.requires_grad for parameter in layer._parameters.values())


def _unfused(layer: nn.Module, x: Tensor) -> Tensor:
    if not is_plain_lora(layer):
        return call_in_weight_dtype(layer, x)  # (4, 128, 1536)
    narrow = F.linear(layer.dropout(x), layer.lora_A)  # (4, 128, 8); only the adapter's input is dropped out
    return call_in_weight_dtype(layer.base, x) + F.linear(narrow, layer.lora_B) * layer.scaling  # (4, 128, 1536)


def call_in_weight_dtype(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), computed in the dtype of the layer's weight and returned in x's."""
    base = cast(nn.Linear | BlockLinear, layer.base if isinstance(layer, LoRALayer) else layer)
    dtype = base.dtype if isinstance(base, BlockLinear) else base.weight.dtype
    if isinstance(layer, nn.Linear) and dtype != x.dtype:
        y = F.linear(x.to(dtype), layer.weight).to(x.dtype)  # (4, 128, 1536)
        return y if layer.bias is None else y + layer.bias  # (4, 128, 1536); the bias may be in float32
    return layer(x.to(dtype)).to(x.dtype)  # (4, 128, 1536)


def _fuse_is_cheaper(rows: int, width: int, weight: Tensor) -> bool:
    """Return whether to multiply ``rows`` vectors of ``width`` by W + s B A, rather than by W and by B A separately.

    B A x and B^T g are needed for the gradients in any case. The choice is between one more pass over the weight,
    to form the sum, and one over the result, to add to it. Measured on a CPU they break even near
    rows = 2 width. A weight in half precision is never summed, because the sum would round the update away.
    """
    return rows > 2 * width and weight.dtype in (torch.float32, torch.float64)


def cast_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, computed in the weight's dtype and returned in x's."""
    if weight.dtype == x.dtype:
        return x @ weight
    return (x.to(weight.dtype) @ weight).to(x.dtype)


def cast_addmm_(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add x @ weight, computed in the weight's dtype, to ``total`` in place."""
    return total.addmm_(x, weight) if weight.dtype == x.dtype else total.add_(x.to(weight.dtype) @ weight)


def _forward(x: Tensor, layers: Sequence[LoRALinear]) -> tuple[list[Tensor], Tensor]:
    """Return outputs (rows, out) of adapted layers, and A x of all of them: (8 for each layer, rows)."""
    narrow = _stack([layer.lora_A for layer in layers]) @ x.T  # (24, 576) @ (576, 512) -> (24, 512)
    outputs, rounded = [], x
    for layer, Ax in zip(layers, narrow.split(_ranks(layers)), strict=True):
        weight, B, scaling = layer.base.weight, layer.lora_B, layer.scaling  # (1536, 576), (1536, 8)
        if _fuse_is_cheaper(len(x), x.shape[1], weight):
            y = x @ torch.addmm(weight, B, layer.lora_A, alpha=scaling).T  # (512, 1536)
        else:
            if rounded.dtype != weight.dtype:
                rounded = x.to(weight.dtype)  # (512, 576), once for all layers
            y = (rounded @ weight.T).to(x.dtype).addmm_(Ax.T, B.T, alpha=scaling)  # (512, 1536)
        outputs.append(y if layer.bias is None else y.add_(layer.bias))  # (512, 1536)
    return outputs, narrow


def _backward(
    gs: Sequence[Tensor], x: Tensor | None, narrow: Tensor, layers: Sequence[LoRALinear], needs_dx: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of the input, (rows, in) or None, and the gradients of A and B of each layer in turn.

    Args:
        gs: gradients of the outputs, (rows, out) each.
        x: the input, or None if no A is trained.
        narrow: A x of all layers.
        needs_dx: whether to compute the gradient of the input.
    """
    ranks = _ranks(layers)
    # With the short side first, these matrix multiplications take half the time.
    narrow_gs = [
        (layer.lora_B.T @ g.T).mul_(layer.scaling)  # (8, 1536) @ (1536, 512) -> (8, 512)
        for layer, g in zip(layers, gs, strict=True)
    ]
    dBs = [
        (Ax @ g).mul_(layer.scaling).T if layer.lora_B.requires_grad else None  # (8, 512) @ (512, 1536) -> (1536, 8)
        for layer, Ax, g in zip(layers, narrow.split(ranks), gs, strict=True)
    ]
    dx = _input_gradient(gs, narrow_gs, layers) if needs_dx else None  # (512, 576)
    dAs = [None] * len(layers)
    if x is not None:
        dAs = (_stack(narrow_gs) @ x).split(ranks)  # (24, 512) @ (512, 576) -> 3 x (8, 576)
    return dx, [gradient for pair in zip(dAs, dBs, strict=True) for gradient in pair]


def _input_gradient(gs: Sequence[Tensor], narrow_gs: Sequence[Tensor], layers: Sequence[LoRALinear]) -> Tensor | None:
    """Return the sum of (W + s B A)^T g over the layers: (rows, in)."""
    dx, separate = None, []
    for g, narrow_g, layer in zip(gs, narrow_gs, layers, strict=True):
        weight = layer.base.weight  # (1536, 576)
        if _fuse_is_cheaper(len(g), weight.shape[0], weight):
            weight = torch.addmm(weight, layer.lora_B, layer.lora_A, alpha=layer.scaling)  # (1536, 576)
        else:
            separate.append((narrow_g, layer.lora_A))
        dx = cast_matmul(g, weight) if dx is None else cast_addmm_(dx, g, weight)  # (512, 576)
    if dx is not None and separate:
        narrow_gs, As = zip(*separate, strict=True)
        dx.addmm_(_stack(narrow_gs).T, _stack(As))  # (512, 24) @ (24, 576)
    return dx


def _ranks(layers: Sequence[LoRALinear]) -> list[int]:
    return [layer.rank for layer in layers]


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _LoRALinears(torch.autograd.Function):
    """h = W x + s B A x for several layers of one x, or of x = silu(gate) * up; saves A x of each layer beside them.

    Of silu(gate) * up only gate and up are saved, from which the backward pass computes it again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor | None, layers: Sequence[LoRALinear], *factors: Tensor):
        inputs = x if up is None else F.silu(x).mul_(up)  # (4, 128, 1536)
        rows = inputs.reshape(-1, x.shape[-1])  # (4, 128, 576) -> (512, 576)
        outputs, narrow = _forward(rows, layers)
        a_is_trained = any(ctx.needs_input_grad[3::2])
        ctx.save_for_backward(x if up is not None else rows if a_is_trained else None, up, narrow)
        ctx.layers, ctx.shape, ctx.a_is_trained = layers, x.shape, a_is_trained
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)  # 3 x (4, 128, 1536)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs: Tensor):
        x, up, narrow = ctx.saved_tensors
        flat_gs = [g.reshape(-1, g.shape[-1]) for g in gs]  # 3 x (512, 1536)
        if up is None:
            dx, factor_gradients = _backward(flat_gs, x, narrow, ctx.layers, ctx.needs_input_grad[0])
            return None if dx is None else dx.view(ctx.shape), None, None, *factor_gradients
        activated = F.silu(x)  # (4, 128, 1536)
        rows = (activated * up).view(-1, x.shape[-1]) if ctx.a_is_trained else None  # (512, 1536)
        dx, factor_gradients = _backward(flat_gs, rows, narrow, ctx.layers, any(ctx.needs_input_grad[:2]))
        if dx is None:
            return None, None, None, *factor_gradients
        dx = dx.view(ctx.shape)  # (4, 128, 1536)
        d_up = activated.mul_(dx)  # (4, 128, 1536)
        d_gate = torch.ops.aten.silu_backward(dx.mul_(up), x)  # (4, 128, 1536)
        return d_gate, d_up, None, *factor_gradients
