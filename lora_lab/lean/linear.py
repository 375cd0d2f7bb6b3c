"""LoRA's products for several layers of one input, with the backward pass written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lab.lora import LoRALayer, LoRALinear
from lora_lab.models.quantize import BlockLinear

# Linear layers


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """What ``layer(x)`` is, for a linear layer with or without an adapter, whatever keeps its weight."""
    return project([layer], x)[0]  # (4, 128, 1536)


def project(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The outputs of several linear layers of one input, which is kept and narrowed once for all of them."""
    together = [layer for layer in layers if _by_hand(layer)]
    outputs: Iterator[Tensor] = iter(())
    if together:
        factors = [factor for layer in together for factor in (layer.lora_A, layer.lora_B)]
        outputs = iter(_LoRALinears.apply(x, [(layer.base, layer.scaling) for layer in together], *factors))
    return [next(outputs) if layer in together else _unfused(layer, x) for layer in layers]


def gated_linear(layer: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """``layer(silu(gate) * up)``; the product is made again in the backward pass, not kept."""
    if not _by_hand(layer):
        return linear(layer, F.silu(gate) * up)  # (4, 128, 576)
    return _GatedLoRALinear.apply(gate, up, layer.lora_A, layer.lora_B, layer.base, layer.scaling)  # (4, 128, 576)


def is_plain_lora(layer: nn.Module) -> bool:
    """Whether a layer is an adapted one whose forward pass is that of plain LoRA."""
    return type(layer).forward is LoRALinear.forward


def _by_hand(layer: nn.Module) -> bool:
    """Whether the gradients written down below are a layer's: those of plain LoRA without dropout, the base frozen."""
    if not is_plain_lora(layer) or (layer.training and isinstance(layer.dropout, nn.Dropout)):
        return False
    return not is_trained(layer.base)


def is_trained(layer: nn.Module) -> bool:
    """Whether a parameter of the layer itself requires a gradient."""
    # Asked some hundred times a step, and parameters() takes twice the time.
    return any(parameter is not None and parameter.requires_grad for parameter in layer._parameters.values())


def _unfused(layer: nn.Module, x: Tensor) -> Tensor:
    if not is_plain_lora(layer):
        return _called(layer, x)  # (4, 128, 1536)
    narrow = F.linear(layer.dropout(x), layer.lora_A)  # (4, 128, 8); dropout gives the adapter an input of its own
    return _called(layer.base, x) + F.linear(narrow, layer.lora_B) * layer.scaling  # (4, 128, 1536)


def _called(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), in the dtype of the layer's weight, as x's."""
    dtype = _dtype(layer.base if isinstance(layer, LoRALayer) else layer)
    if isinstance(layer, nn.Linear) and dtype != x.dtype:
        y = F.linear(x.to(dtype), layer.weight).to(x.dtype)  # (4, 128, 1536)
        return y if layer.bias is None else y + layer.bias  # (4, 128, 1536); the bias may be in float32
    return layer(x.to(dtype)).to(x.dtype)  # (4, 128, 1536)


def _dtype(layer: nn.Module) -> torch.dtype:
    return layer.dtype if isinstance(layer, BlockLinear) else layer.weight.dtype


def _fuse_is_cheaper(rows: int, width: int, weight: Tensor) -> bool:
    """Whether to multiply ``rows`` vectors of ``width`` by W + s B A, or by W and by B A apart.

    B A x and B^T g are needed for the gradients in any case. What is left is one more pass: over the weight,
    to form the sum, or over the result, to add to it. Measured on a CPU they break even near rows = 2 width. A
    weight in half precision stays apart: the sum would round the update away.
    """
    return rows > 2 * width and weight.dtype in (torch.float32, torch.float64)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, in the weight's dtype, as x's."""
    if weight.dtype == x.dtype:
        return x @ weight
    return (x.to(weight.dtype) @ weight).to(x.dtype)


# A base layer, its scaling, A and B.
_Adapted = tuple[nn.Module, float, Tensor, Tensor]


def _forward(x: Tensor, group: Sequence[_Adapted]) -> tuple[list[Tensor], Tensor]:
    """Outputs (rows, out) of adapted layers, and A x of all of them: (8 for each layer, rows)."""
    narrow = _stack([A for _, _, A, _ in group]) @ x.T  # (24, 576) @ (576, 512) -> (24, 512)
    outputs, rounded = [], x
    for (base, scaling, A, B), own in zip(group, narrow.split([A.shape[0] for _, _, A, _ in group]), strict=True):
        weight = base.weight  # (1536, 576)
        if _fuse_is_cheaper(len(x), x.shape[1], weight):
            y = x @ torch.addmm(weight, B, A, alpha=scaling).T  # (512, 1536)
        else:
            if rounded.dtype != weight.dtype:
                rounded = x.to(weight.dtype)  # (512, 576), once for the whole group
            y = (rounded @ weight.T).to(x.dtype).addmm_(own.T, B.T, alpha=scaling)  # (512, 1536)
        outputs.append(y if base.bias is None else y.add_(base.bias))  # (512, 1536)
    return outputs, narrow


def _backward(
    gs: Sequence[Tensor], x: Tensor | None, narrow: Tensor, group: Sequence[_Adapted], needs_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of the input (rows, in), and those of A and B of each layer in turn.

    Args:
        x: the input, or None if no A is trained.
    """
    ranks = [A.shape[0] for _, _, A, _ in group]
    dx, dBs, narrowed, apart = None, [], [], []
    for g, own, (base, scaling, A, B) in zip(gs, narrow.split(ranks), group, strict=True):
        # With the short side first, these products take half the time they take the other way round.
        narrowed.append((B.T @ g.T).mul_(scaling))  # (8, 1536) @ (1536, 512) -> (8, 512)
        dBs.append((own @ g).mul_(scaling).T if B.requires_grad else None)  # (8, 512) @ (512, 1536) -> (1536, 8)
        if not needs_x:
            continue
        weight = base.weight  # (1536, 576)
        if _fuse_is_cheaper(len(g), weight.shape[0], weight):
            weight = torch.addmm(weight, B, A, alpha=scaling)  # (1536, 576)
        else:
            apart.append((narrowed[-1], A))
        dx = multiply(g, weight) if dx is None else add_product(dx, g, weight)  # (512, 576)
    if apart:
        dx.addmm_(_stack([n for n, _ in apart]).T, _stack([A for _, A in apart]))  # (512, 24) @ (24, 576)
    if x is None:
        return dx, [gradient for dB in dBs for gradient in (None, dB)]
    dAs = (_stack(narrowed) @ x).split(ranks)  # (24, 512) @ (512, 576) -> 3 x (8, 576)
    return dx, [gradient for pair in zip(dAs, dBs, strict=True) for gradient in pair]


def add_product(total: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """Add g @ weight to ``total``, in place; the product is computed in the weight's dtype."""
    return total.addmm_(g, weight) if weight.dtype == g.dtype else total.add_(g.to(weight.dtype) @ weight)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _LoRALinears(torch.autograd.Function):
    """h = W x + s B A x for several layers of one x; it keeps x, and A x of each."""

    @staticmethod
    def forward(ctx, x: Tensor, bases: Sequence[tuple[nn.Module, float]], *factors: Tensor):
        rows = x.reshape(-1, x.shape[-1])  # (4, 128, 576) -> (512, 576)
        outputs, narrow = _forward(rows, _group(bases, factors))
        kept = rows if any(ctx.needs_input_grad[2::2]) else None
        ctx.save_for_backward(kept, narrow, *factors)
        ctx.bases, ctx.shape = bases, x.shape
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)  # 3 x (4, 128, 1536)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs: Tensor):
        rows, narrow, *factors = ctx.saved_tensors
        gs = [g.reshape(-1, g.shape[-1]) for g in gs]  # 3 x (512, 1536)
        dx, rest = _backward(gs, rows, narrow, _group(ctx.bases, factors), ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, *rest


def _group(bases: Sequence[tuple[nn.Module, float]], factors: Sequence[Tensor]) -> list[_Adapted]:
    return [(*base, A, B) for base, A, B in zip(bases, factors[::2], factors[1::2], strict=True)]


class _GatedLoRALinear(torch.autograd.Function):
    """h = (W + s B A) (silu(gate) * up); it keeps gate and up, and makes their product again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, A: Tensor, B: Tensor, base: nn.Module, scaling: float) -> Tensor:
        inner = F.silu(gate).mul_(up).view(-1, gate.shape[-1])  # (4, 128, 1536) -> (512, 1536)
        (y,), narrow = _forward(inner, [(base, scaling, A, B)])
        ctx.save_for_backward(gate, up, narrow, A, B)
        ctx.base, ctx.scaling = base, scaling
        return y.view(*gate.shape[:-1], -1)  # (4, 128, 576)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        gate, up, narrow, A, B = ctx.saved_tensors
        opened = F.silu(gate)  # (4, 128, 1536)
        inner = opened * up if ctx.needs_input_grad[2] else None  # (4, 128, 1536)
        d_inner, (dA, dB) = _backward(
            [g.reshape(-1, g.shape[-1])],
            None if inner is None else inner.view(-1, inner.shape[-1]),
            narrow,
            [(ctx.base, ctx.scaling, A, B)],
            needs_x=any(ctx.needs_input_grad[:2]),
        )
        if d_inner is None:
            return None, None, dA, dB, None, None
        d_inner = d_inner.view(gate.shape)  # (4, 128, 1536)
        d_up = opened.mul_(d_inner)  # (4, 128, 1536)
        d_gate = torch.ops.aten.silu_backward(d_inner.mul_(up), gate)  # (4, 128, 1536)
        return d_gate, d_up, dA, dB, None, None
