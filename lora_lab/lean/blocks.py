"""Blocks that save fewer activations for the backward pass: LoRA's matrix multiplications, norm, rotation, attention,
SwiGLU; and checkpointing.

Reference for checkpointing: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

# torch declares Function.backward(ctx, *grad_outputs), which each backward below narrows to its own outputs.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from lora_lab.lora import LoRALayer, LoRALinear
from lora_lab.models.llama import MLP, Attention, Block, KeyValueCache, RMSNorm, attend, split_heads
from lora_lab.models.quantize import BlockLinear
from lora_lab.system.device import restore_randomness


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or float32 if that is more precise."""
    return torch.promote_types(dtype, torch.float32)


# LoRA's matrix multiplications for several layers of one input, with a hand-written backward pass


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
    outputs = {}
    if joint := [layer for layer in layers if isinstance(layer, JointLinear)]:
        outputs |= zip(joint, joint[0].project(joint, x), strict=True)
    if fused:
        factors = [factor for layer in fused for factor in (layer.lora_A, layer.lora_B)]
        outputs |= zip(fused, _LoRALinears.apply(x, fused, *factors), strict=True)
    return [outputs[layer] if layer in outputs else _unfused(layer, x) for layer in layers]  # 3 x (4, 128, 1536)


def gated_linear(layer: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """``layer(silu(gate) * up)``, whose input the backward pass recomputes, so that it is not saved."""
    if isinstance(layer, JointLinear):
        return layer.gated(gate, up)  # (4, 128, 576)
    if not _is_fusible(layer):
        return linear(layer, F.silu(gate) * up)  # (4, 128, 576)
    return _GatedLoRALinear.apply(gate, up, layer, layer.lora_A, layer.lora_B)  # (4, 128, 576)


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
    base: Any = layer.base if isinstance(layer, LoRALayer) else layer
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
    return (x.to(weight.dtype) @ weight).to(x.dtype)


def cast_addmm_(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add x @ weight, computed in the weight's dtype, to ``total`` in place."""
    return total.addmm_(x, weight) if weight.dtype == x.dtype else total.add_(x.to(weight.dtype) @ weight)


def _forward(x: Tensor, layers: Sequence[LoRALinear]) -> tuple[list[Tensor], Tensor]:
    """Return outputs (rows, out) of adapted layers, and A x of all of them: (8 for each layer, rows)."""
    narrow = _stack([layer.lora_A for layer in layers]) @ x.T  # (24, 576) @ (576, 512) -> (24, 512)
    outputs, rounded = [], x
    for layer, Ax in zip(layers, narrow.split([layer.rank for layer in layers]), strict=True):
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
    ranks = [layer.rank for layer in layers]
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


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _LoRALinears(torch.autograd.Function):
    """h = W x + s B A x for several layers of one x; saves x, and A x of each layer."""

    @staticmethod
    def forward(ctx, x: Tensor, layers: Sequence[LoRALinear], *factors: Tensor):
        rows = x.reshape(-1, x.shape[-1])  # (4, 128, 576) -> (512, 576)
        outputs, narrow = _forward(rows, layers)
        a_is_trained = any(layer.lora_A.requires_grad for layer in layers)
        ctx.save_for_backward(rows if a_is_trained else None, narrow)
        ctx.layers, ctx.shape = layers, x.shape
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)  # 3 x (4, 128, 1536)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs: Tensor):
        rows, narrow = ctx.saved_tensors
        flat_gs = [g.reshape(-1, g.shape[-1]) for g in gs]  # 3 x (512, 1536)
        dx, factor_gradients = _backward(flat_gs, rows, narrow, ctx.layers, needs_dx=ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, *factor_gradients


class _GatedLoRALinear(torch.autograd.Function):
    """h = (W + s B A) z for z = silu(gate) * up; saves gate, up and A z, and computes z again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, layer: LoRALinear, A: Tensor, B: Tensor) -> Tensor:
        z = F.silu(gate).mul_(up).view(-1, gate.shape[-1])  # (4, 128, 1536) -> (512, 1536)
        (y,), narrow = _forward(z, [layer])
        ctx.save_for_backward(gate, up, narrow)
        ctx.layer = layer
        return y.view(*gate.shape[:-1], -1)  # (4, 128, 576)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        gate, up, narrow = ctx.saved_tensors
        flat_g = g.reshape(-1, g.shape[-1])  # (512, 576)
        activated = F.silu(gate)  # (4, 128, 1536)
        z = (activated * up).view(-1, gate.shape[-1]) if ctx.layer.lora_A.requires_grad else None  # (512, 1536)
        dz, (dA, dB) = _backward([flat_g], z, narrow, [ctx.layer], needs_dx=any(ctx.needs_input_grad[:2]))
        if dz is None:
            return None, None, None, dA, dB
        dz = dz.view(gate.shape)  # (4, 128, 1536)
        d_up = activated.mul_(dz)  # (4, 128, 1536)
        d_gate = torch.ops.aten.silu_backward(dz.mul_(up), gate)  # (4, 128, 1536)
        return d_gate, d_up, None, dA, dB


# Norm and rotation


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight with a frozen weight; saves x and one number per row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()  # (4, 128, 1)
        inverse_rms = squares.div_(x.shape[-1]).add_(eps).rsqrt_()  # (4, 128, 1)
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x * inverse_rms).mul_(weight)  # (4, 128, 576)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, weight, inverse_rms = ctx.saved_tensors
        g = g * weight  # (4, 128, 576)
        along_x = (g * x).sum(dim=-1, keepdim=True).mul_(inverse_rms.pow(3)).div_(x.shape[-1])  # (4, 128, 1)
        return g.mul_(inverse_rms).addcmul_(x, along_x, value=-1), None, None  # (4, 128, 576)


class _Rotate(torch.autograd.Function):
    """``lora_lab.models.llama.rotate`` in four passes over half the entries; saves only the angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_pairs(x, cos, sin)  # (4, 9, 128, 64)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate_pairs(g, cos, -sin), None, None


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]  # (128, 32): both halves of a head rotate by the same angles
    (first, second), rotated = x.split(half, dim=-1), torch.empty_like(x)  # 2 x (4, 9, 128, 32)
    torch.mul(first, cos, out=rotated[..., :half]).addcmul_(second, sin, value=-1)  # (4, 9, 128, 32)
    torch.mul(second, cos, out=rotated[..., half:]).addcmul_(first, sin)  # (4, 9, 128, 32)
    return rotated  # (4, 9, 128, 64)


# Checkpointing: what a block saves for its backward pass is computed again when that pass asks for it. It does what
# torch.utils.checkpoint does, which loads torch's compiler at its first call (60 MB, and a second).


def recompute(function: Callable[..., Tensor], x: Tensor, *arguments: Tensor | None) -> Tensor:
    """``function(x, *arguments)``, of which only the arguments are saved, and the parameters that it reads.

    Args:
        function: of tensors; it computes the same at every call that finds torch's random generators in one state.
        x, arguments: its tensors, or None.
    """
    state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(x.device) if x.device.type == "cuda" else None
    numbers = count()  # instead of the tensors that the first forward pass saves
    again = {}  # by these numbers, what the second forward pass saves

    def compute_again(number: int) -> Tensor:
        if not again:
            with restore_randomness(x.device):
                torch.set_rng_state(state)
                if cuda_state is not None:
                    torch.cuda.set_rng_state(cuda_state, x.device)
                again.update(enumerate(_saved_tensors(function, (x, *arguments))))
        return again.pop(number)

    with saved_tensors_hooks(lambda _: next(numbers), compute_again):
        return function(x, *arguments)


def _saved_tensors(function: Callable[..., Tensor], arguments: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Return the tensors that a forward pass saves, in order."""
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # detached, because an output would keep its own graph alive
        return saved[-1]

    inputs = [None if each is None else each.detach().requires_grad_(each.requires_grad) for each in arguments]
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*inputs)
    return saved


# The blocks


class LeanBlock(Block):
    """A block with lean attention and MLP."""

    checkpoint: bool

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(
                "A lean block computes in the dtypes of its weights, but was called under torch.autocast; leave it, "
                "and use Lean(base_dtype=torch.bfloat16)."
            )
        if not (self.checkpoint and torch.is_grad_enabled() and cache is None):
            return self._compute(x, cos, sin, mask, cache)  # (4, 128, 576)
        return recompute(self._compute, x, cos, sin, mask, None)  # (4, 128, 576)

    def _compute(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        x = x + self.self_attn(_norm(self.input_layernorm, x), cos, sin, mask, cache)  # (4, 128, 576)
        return x + self.mlp(_norm(self.post_attention_layernorm, x))  # (4, 128, 576)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    if norm.weight.requires_grad:
        return norm(x)  # (4, 128, 576)
    return _RMSNorm.apply(x, norm.weight, norm.eps)  # (4, 128, 576)


class LeanAttention(Attention):
    """Attention with lean projections and rotation."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        query, key, value = (
            split_heads(projected, self.head_dim)  # (4, 128, 576) -> (4, 9, 128, 64), and 2 x (4, 3, 128, 64)
            for projected in project([self.q_proj, self.k_proj, self.v_proj], x)
        )
        query, key = _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)  # (4, 9, 128, 64), (4, 3, 128, 64)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)  # (4, 3, past + 128, 64)
        return linear(self.o_proj, attend(query, key, value, mask))  # (4, 128, 576)


class LeanMLP(MLP):
    """SwiGLU that saves only gate and up."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project([self.gate_proj, self.up_proj], x)  # 2 x (4, 128, 1536)
        return gated_linear(self.down_proj, gate, up)  # (4, 128, 576)


class LeanEmbedding(nn.Embedding):
    """An embedding that returns its rows in float32, whatever the dtype of its table."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)  # (4, 128, 576)
        return rows.to(at_least_float32(rows.dtype))  # (4, 128, 576)


class LeanHead(nn.Module):
    """A head that multiplies in the dtype of its weight, and returns logits in the dtype of its input.

    It has been an ``nn.Linear``, and is none any more, so that nobody takes it for a layer to adapt.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)  # (4, 128, 49152)


class LeanBlockHead(BlockLinear):
    """A :class:`LeanHead` for a head in blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.dtype)).to(x.dtype)  # (4, 128, 49152)


_LEAN_CLASSES = {
    Block: LeanBlock,
    Attention: LeanAttention,
    MLP: LeanMLP,
    nn.Embedding: LeanEmbedding,
    nn.Linear: LeanHead,
    BlockLinear: LeanBlockHead,
}


def make_lean(*modules: Any) -> None:
    """Give each module the lean class of its kind, in place: it computes in another way, and keeps its parameters."""
    for module in modules:
        module.__class__ = _LEAN_CLASSES.get(type(module), type(module))
