"""Norm, rotation, attention and SwiGLU that save fewer activations for the backward pass, and checkpointing.

Reference for checkpointing: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

# torch declares Function.backward(ctx, *grad_outputs), which each backward below narrows to its own outputs.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from lora_lab.lean.linear import gated_linear, linear, project
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


# Checkpointing: what a block saves for its backward pass is computed again when that pass asks for it. It does what
# torch.utils.checkpoint does, which loads torch's compiler at its first call (60 MB, and a second).


def recompute(function: Callable[..., Tensor], *arguments: Tensor | None, random: bool) -> Tensor:
    """``function(*arguments)``, of which only the arguments are saved, and the parameters that it reads.

    Args:
        function: of tensors; it computes the same at every call.
        *arguments: its tensors, or None.
        random: whether it draws from torch's random generators; the second time it draws the same.
    """
    redraw = _remember_random_states(arguments) if random else nullcontext
    numbers = count()  # instead of the tensors that the first forward pass saves
    again: dict[int, Tensor] = {}  # by these numbers, what the second forward pass saves

    def compute_again(number: int) -> Tensor:
        if not again:
            with redraw():
                again.update(enumerate(_saved_tensors(function, arguments)))
        return again.pop(number)

    with saved_tensors_hooks(lambda _: next(numbers), compute_again):
        return function(*arguments)


def _saved_tensors(function: Callable[..., Tensor], arguments: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Return the tensors that a forward pass saves, in order."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # detached, because an output would keep its own graph alive
        return saved[-1]

    inputs = [None if each is None else each.detach().requires_grad_(each.requires_grad) for each in arguments]
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*inputs)
    return saved


def _remember_random_states(arguments: tuple[Tensor | None, ...]) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which torch's generators, on the arguments' devices too, draw what they will draw now."""
    devices = {argument.device for argument in arguments if argument is not None and argument.device.type == "cuda"}
    cpu, cuda = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}

    @contextmanager
    def redraw() -> Iterator[None]:
        with torch.random.fork_rng(devices=list(cuda)):
            torch.set_rng_state(cpu)
            for device, state in cuda.items():
                torch.cuda.set_rng_state(state, device)
            yield

    return redraw


# The blocks


class LeanBlock(Block):
    """A block with lean attention and MLP."""

    checkpoint: bool

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(
                "A lean block was called under torch.autocast; leave it, and use Lean(base_dtype=torch.bfloat16)."
            )
        if not (self.checkpoint and torch.is_grad_enabled() and cache is None):
            return self._compute(x, cos, sin, mask, cache)  # (4, 128, 576)
        has_dropout = any(isinstance(module, nn.Dropout) for module in self.modules())
        return recompute(self._compute, x, cos, sin, mask, None, random=has_dropout)  # (4, 128, 576)

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


def make_lean(block: Any, checkpoint: bool) -> None:
    """Let a block compute as a lean one, in place: only its class changes, and the classes inside it."""
    block.__class__, block.self_attn.__class__, block.mlp.__class__ = LeanBlock, LeanAttention, LeanMLP
    block.checkpoint = checkpoint


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
