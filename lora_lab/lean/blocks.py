"""Norm, rotation, attention and SwiGLU that save fewer activations for the backward pass."""

# torch declares Function.backward(ctx, *grad_outputs), which each backward below narrows to its own outputs.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lab.lean.linear import gated_linear, linear, project
from lora_lab.lean.recompute import recomputed
from lora_lab.models.llama import MLP, Attention, Block, KeyValueCache, RMSNorm, attend, split_heads
from lora_lab.models.quantize import BlockLinear


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or float32 if that is more precise."""
    return torch.promote_types(dtype, torch.float32)


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


# The blocks


class LeanBlock(nn.Module):
    """A block with lean attention and MLP; it replaces a block, and shares its layers."""

    def __init__(self, block: Block, checkpoint: bool) -> None:
        super().__init__()
        self.self_attn = _LeanAttention(block.self_attn)
        self.mlp = _LeanMLP(block.mlp)
        self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm
        self.checkpoint = checkpoint
        self.train(block.training)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(
                "A lean block computes in the dtypes of its weights, and was called under torch.autocast; "
                "leave autocast, and use Lean(base_dtype=torch.bfloat16) to multiply in half precision."
            )
        if not (self.checkpoint and torch.is_grad_enabled() and cache is None):
            return self._compute(x, cos, sin, mask, cache)  # (4, 128, 576)
        has_dropout = any(isinstance(module, nn.Dropout) for module in self.modules())
        return recomputed(self._compute, x, cos, sin, mask, None, random=has_dropout)  # (4, 128, 576)

    def _compute(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        x = x + self.self_attn(_norm(self.input_layernorm, x), cos, sin, mask, cache)  # (4, 128, 576)
        return x + self.mlp(_norm(self.post_attention_layernorm, x))  # (4, 128, 576)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    if norm.weight.requires_grad:
        return norm(x)  # (4, 128, 576)
    return _RMSNorm.apply(x, norm.weight, norm.eps)  # (4, 128, 576)


class _LeanAttention(nn.Module):
    """Attention with lean projections and rotation."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.layer, self.head_dim = attention.layer, attention.head_dim
        for name, child in attention.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        query, key, value = (
            split_heads(projected, self.head_dim)  # (4, 128, 576) -> (4, 9, 128, 64), and 2 x (4, 3, 128, 64)
            for projected in project([self.q_proj, self.k_proj, self.v_proj], x)
        )
        query, key = _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)  # (4, 9, 128, 64), (4, 3, 128, 64)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)  # (4, 3, past + 128, 64)
        return linear(self.o_proj, attend(query, key, value, mask))  # (4, 128, 576)


class _LeanMLP(nn.Module):
    """SwiGLU that saves only gate and up."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project([self.gate_proj, self.up_proj], x)  # 2 x (4, 128, 1536)
        return gated_linear(self.down_proj, gate, up)  # (4, 128, 576)


class LeanEmbedding(nn.Module):
    """An embedding that returns its rows in float32, whatever the dtype of its table."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight  # (49152, 576)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)  # (4, 128, 576)
        return rows.to(at_least_float32(rows.dtype))  # (4, 128, 576)


class LeanHead(nn.Module):
    """A head that multiplies in the dtype of its weight, and returns logits in the dtype of its input."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias  # (49152, 576)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)  # (4, 128, 49152)


class LeanBlockHead(BlockLinear):
    """A :class:`LeanHead` for a head in blocks."""

    def __init__(self, head: BlockLinear) -> None:
        super().__init__(head.packed, head.kind, head.shape, head.bias, head.steps, head.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.dtype)).to(x.dtype)  # (4, 128, 49152)
