r"""The same training step, with the same numbers, in less time and memory. Understanding LoRA does not need it.

    fit(model, task, LoRA(rank=8), ..., lean=Lean(checkpoint=True))

What it does to a LoRA step of our Llama, and what each is for:

    the loss in slices       logits (4 x 128 tokens x 49152, 100 MB) never exist whole, and only for targets that count
    backward by hand         the narrow products short side first, and once for all layers of one input; W + s B A
                             as one matrix where that is cheaper
    SwiGLU recomputed        silu(gate) * up is made again in the backward pass, not kept
    flat AdamW               one tensor in place of 420
    base in bfloat16         half the bytes, and twice the speed where the processor multiplies bfloat16
    checkpoint               of each block only the input is kept, and the block computed again
    threads=2                two halves of the batch on one core each, with no barrier at every product

Adapters, norms, an adapted head and all sums stay in float32. Where the base is in 4-bit blocks
(``lora_lab.quantize``), each matrix is dequantised where it is used, and the head's a slice at a time.

Shapes in the comments: SmolLM2-135M, 4 sequences of 128 tokens, so 512 rows; rank 8.

References: Hu et al. 2021, arXiv 2106.09685, equation 3; the orders of products: Cherniuk et al. 2023
(RunLoRA), arXiv 2312.03415; checkpointing: Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

import ctypes
import math
import platform
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.adamw import adamw
from torch.utils.checkpoint import checkpoint

from lora_lab.lora import LoRALayer, LoRALinear, lora_layers, replace
from lora_lab.models.llama import MLP, Attention, Block, KeyValueCache, Llama, RMSNorm
from lora_lab.quantize import BlockEmbedding, BlockLinear, BlockWeight
from lora_lab.tasks.base import IGNORE, Loss

_M_MMAP_THRESHOLD = -3  # the C library's number of the setting (malloc.h)


@dataclass(frozen=True)
class Lean:
    """How to make a step lean.

    Args:
        base_dtype: keep the frozen matrices in this dtype (``torch.bfloat16``), all but that of an adapted head;
            None leaves them as they are.
        checkpoint: keep of each block only its input, and compute the block again in the backward pass:
            about a third more time, a fraction of the activations. For the whole process, memory that
            is freed goes back to the system at once from then on (on Linux).
        threads: 2 computes each half of a batch in a Python thread of its own, on one core. For a CPU
            with two cores; without dropout.
        loss_rows: tokens whose logits exist at one moment.

    Raises:
        ValueError: a value is out of range.
    """

    base_dtype: torch.dtype | None = None
    checkpoint: bool = False
    threads: int = 1
    loss_rows: int = 256

    def __post_init__(self) -> None:
        if self.base_dtype not in (None, torch.bfloat16):
            raise ValueError(f"base_dtype is {self.base_dtype!r}, but it must be torch.bfloat16 or None.")
        for name in ("threads", "loss_rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but it must be a whole number of at least 1.")

    def settings(self) -> dict[str, Any]:
        """The options as plain data, for a History."""
        return asdict(self) | {"base_dtype": None if self.base_dtype is None else str(self.base_dtype)}


def rewire(model: nn.Module, lean: Lean) -> None:
    """Give an adapted Llama lean blocks, in place; names, parameters and what it computes stay.

    The blocks read the weights of adapted layers and norms, and do not call them, so forward hooks on modules
    inside a block do not fire; those on the new blocks do. Under ``torch.autocast`` a block raises RuntimeError.

    Raises:
        ValueError: the model is no Llama of ours, has no adapters or some of a variant with a forward of
            its own (PiSSA, DoRA), trains more than adapters, has hooks, or ``threads`` meets dropout or a GPU.
            The model is then left as it was.
    """
    _check(model, lean)
    if lean.checkpoint and not isinstance(next(model.parameters()), FakeTensor):  # a rehearsal frees nothing
        _return_memory_at_once()
    if lean.base_dtype is not None:
        _cast_base(model, lean.base_dtype)
    trunk, head = model.model, model.lm_head
    for index, block in enumerate(trunk.layers):
        replace(trunk, f"layers.{index}", _LeanBlock(block, lean.checkpoint))
    for module in trunk.modules():
        if isinstance(module, RMSNorm | BlockEmbedding):
            _raise_to_float32(module)
    if isinstance(trunk.embed_tokens, nn.Embedding):
        trunk.embed_tokens = _LeanEmbedding(trunk.embed_tokens)
    if isinstance(head, LoRALayer):  # called with float32, now and when it is merged
        _raise_to_float32(head.base)
    elif isinstance(head, nn.Linear | BlockLinear):
        model.lm_head = _LeanHead(head) if isinstance(head, nn.Linear) else _LeanBlockHead(head)


def _check(model: nn.Module, lean: Lean) -> None:
    if not isinstance(model, Llama):
        raise ValueError(f"The lean step is built for lora_lab's Llama, but the model is a {type(model).__name__}.")
    if isinstance(model.model.layers[0], _LeanBlock):
        raise ValueError("The model's blocks are lean already; start each run from a freshly loaded model.")
    layers = lora_layers(model)
    if not layers:
        raise ValueError("The lean step is one of LoRA, but the model has no adapters; use a LoRA method.")
    for name, layer in layers.items():
        if not _is_plain_lora(layer):
            raise ValueError(f"{name!r} is a {type(layer).__name__}, whose forward pass has no lean form.")
    own = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise ValueError(f"{name!r} is trained, but the lean step is for a frozen base; freeze it.")
    for name, module in model.named_modules():
        if any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")):
            raise ValueError(
                f"{name or 'the model'!r} has a hook, which the lean step would not call; remove it, or put it on a "
                "block once the model is lean."
            )
    if lean.threads > 1:
        if any(isinstance(layer.dropout, nn.Dropout) for layer in layers.values()):
            raise ValueError(
                f"threads is {lean.threads}, but the adapters have dropout, whose draws would depend on the threads' "
                "timing; use dropout=0 or threads=1."
            )
        if next(model.parameters()).device.type != "cpu":
            raise ValueError(f"threads is {lean.threads}, but it is for the CPU; use threads=1 on a GPU.")


def _cast_base(model: Llama, dtype: torch.dtype) -> None:
    kept = {id(parameter) for layer in lora_layers(model).values() for parameter in _own(layer)}
    if isinstance(model.lm_head, LoRALayer):
        kept |= {id(parameter) for parameter in model.lm_head.parameters()}
    seen = set()
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.is_floating_point() and id(parameter) not in kept | seen:
            parameter.data = parameter.data.to(dtype)
            seen.add(id(parameter))


def _raise_to_float32(module: nn.Module) -> None:
    """Let a module compute in float32, or in what is finer, in place."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(_at_least_float32(parameter.dtype))
    if isinstance(module, BlockWeight):
        module.dtype = _at_least_float32(module.dtype)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _return_memory_at_once() -> None:
    """Let Linux's C library give tensors of 256 KiB and more back to the system when they are freed.

    By itself it keeps them in a heap, where the inputs kept of each block stand between the holes that the
    block's own tensors leave: for SmolLM2 at 4 x 128 tokens more than all that is in use.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**18)


def _own(layer: LoRALayer) -> list[Tensor]:
    return [getattr(layer, part) for part in layer.parts]


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
    return [next(outputs) if layer in together else _apart(layer, x) for layer in layers]


def _is_plain_lora(layer: nn.Module) -> bool:
    return type(layer).forward is LoRALinear.forward


def _by_hand(layer: nn.Module) -> bool:
    """Whether the gradients written down below are a layer's: those of plain LoRA without dropout, the base frozen."""
    if not _is_plain_lora(layer) or (layer.training and isinstance(layer.dropout, nn.Dropout)):
        return False
    return not _is_trained(layer.base)


def _is_trained(layer: nn.Module) -> bool:
    # Asked some hundred times a step, and parameters() takes twice the time.
    return any(parameter is not None and parameter.requires_grad for parameter in layer._parameters.values())


def _apart(layer: nn.Module, x: Tensor) -> Tensor:
    if not _is_plain_lora(layer):
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


def _adds_up(rows: int, width: int, weight: Tensor) -> bool:
    """Whether to multiply ``rows`` vectors of ``width`` by W + s B A, or by W and by B A apart.

    B A x and B^T g are needed for the gradients in any case. What is left is one more pass: over the weight,
    to form the sum, or over the result, to add to it. Measured on a CPU they break even near rows = 2 width. A
    weight in half precision stays apart: the sum would round the update away.
    """
    return rows > 2 * width and weight.dtype in (torch.float32, torch.float64)


def _times(x: Tensor, weight: Tensor) -> Tensor:
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
        if _adds_up(len(x), x.shape[1], weight):
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
        if _adds_up(len(g), weight.shape[0], weight):
            weight = torch.addmm(weight, B, A, alpha=scaling)  # (1536, 576)
        else:
            apart.append((narrowed[-1], A))
        dx = _times(g, weight) if dx is None else _add_product(dx, g, weight)  # (512, 576)
    if apart:
        dx.addmm_(_stack([n for n, _ in apart]).T, _stack([A for _, A in apart]))  # (512, 24) @ (24, 576)
    if x is None:
        return dx, [gradient for dB in dBs for gradient in (None, dB)]
    dAs = (_stack(narrowed) @ x).split(ranks)  # (24, 512) @ (512, 576) -> 3 x (8, 576)
    return dx, [gradient for pair in zip(dAs, dBs, strict=True) for gradient in pair]


def _add_product(total: Tensor, g: Tensor, weight: Tensor) -> Tensor:
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


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight with a frozen weight; it keeps x and one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()  # (4, 128, 1)
        root = squares.div_(x.shape[-1]).add_(eps).rsqrt_()  # (4, 128, 1)
        ctx.save_for_backward(x, weight, root)
        return (x * root).mul_(weight)  # (4, 128, 576)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, weight, root = ctx.saved_tensors
        g = g * weight  # (4, 128, 576)
        along = (g * x).sum(dim=-1, keepdim=True).mul_(root.pow(3)).div_(x.shape[-1])  # (4, 128, 1)
        return g.mul_(root).addcmul_(x, along, value=-1), None, None  # (4, 128, 576)


class _Rotate(torch.autograd.Function):
    """``lora_lab.models.llama.rotate`` in four passes over half the numbers; it keeps the angles alone."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)  # (4, 9, 128, 64)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        cos, sin = ctx.saved_tensors
        return _turn(g, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]  # (128, 32): both halves of a head turn alike
    (first, second), turned = x.split(half, dim=-1), torch.empty_like(x)  # 2 x (4, 9, 128, 32)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)  # (4, 9, 128, 32)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)  # (4, 9, 128, 32)
    return turned  # (4, 9, 128, 64)


# The blocks


class _LeanBlock(Block):
    """A block whose parts are lean; its children are those of the block it stands for."""

    def __init__(self, block: Block, checkpoint: bool) -> None:
        nn.Module.__init__(self)
        self.self_attn = _LeanAttention(block.self_attn)
        self.mlp = _LeanMLP(block.mlp)
        self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm
        self.checkpoint = checkpoint
        self.train(block.training)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(
                "A lean block computes in the dtypes that its weights have, and was called under torch.autocast; "
                "leave autocast, and use Lean(base_dtype=torch.bfloat16) for products in half precision."
            )
        if not (self.checkpoint and torch.is_grad_enabled() and cache is None):
            return self._compute(x, cos, sin, mask, cache)  # (4, 128, 576)
        dropout = any(isinstance(module, nn.Dropout) for module in self.modules())
        return checkpoint(
            self._compute, x, cos, sin, mask, None, use_reentrant=False, preserve_rng_state=dropout
        )  # (4, 128, 576)

    def _compute(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        x = x + self.self_attn(_norm(self.input_layernorm, x), cos, sin, mask, cache)  # (4, 128, 576)
        return x + self.mlp(_norm(self.post_attention_layernorm, x))  # (4, 128, 576)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    if norm.weight.requires_grad:
        return norm(x)  # (4, 128, 576)
    return _RMSNorm.apply(x, norm.weight, norm.eps)  # (4, 128, 576)


class _LeanAttention(Attention):
    """Attention with lean projections."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.layer, self.head_dim = attention.layer, attention.head_dim
        for name, child in attention.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        batch, length, _ = x.shape
        by_head = (batch, length, -1, self.head_dim)
        query, key, value = (
            projected.view(by_head).transpose(1, 2)  # (4, 128, 576) -> (4, 9, 128, 64), and 2 x (4, 3, 128, 64)
            for projected in project([self.q_proj, self.k_proj, self.v_proj], x)
        )
        query, key = _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)  # (4, 9, 128, 64), (4, 3, 128, 64)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)  # (4, 3, past + 128, 64)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and length > 1, enable_gqa=True
        )  # (4, 9, 128, 64)
        return linear(self.o_proj, mixed.transpose(1, 2).reshape(batch, length, -1))  # (4, 128, 576)


class _LeanMLP(MLP):
    """SwiGLU that keeps gate and up alone."""

    def __init__(self, mlp: MLP) -> None:
        nn.Module.__init__(self)
        for name, child in mlp.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project([self.gate_proj, self.up_proj], x)  # 2 x (4, 128, 1536)
        down = self.down_proj
        if not _by_hand(down):
            return linear(down, F.silu(gate) * up)  # (4, 128, 576)
        return _GatedLoRALinear.apply(gate, up, down.lora_A, down.lora_B, down.base, down.scaling)  # (4, 128, 576)


class _LeanEmbedding(nn.Module):
    """An embedding whose rows come out in float32, in whatever they are kept."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight  # (49152, 576)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)  # (4, 128, 576)
        return rows.to(_at_least_float32(rows.dtype))  # (4, 128, 576)


class _LeanHead(nn.Module):
    """A head that multiplies in its own dtype."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias  # (49152, 576)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)  # (4, 128, 49152)


class _LeanBlockHead(BlockLinear):
    """The same for a head in blocks."""

    def __init__(self, head: BlockLinear) -> None:
        super().__init__(head.packed, head.kind, head.shape, head.bias, head.steps, head.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.dtype)).to(x.dtype)  # (4, 128, 49152)


# The loss


def cross_entropy(model: Llama, inputs: Tensor, targets: Tensor, rows: int = 256, every_target: bool = False) -> Tensor:
    """As ``lora_lab.tasks.cross_entropy``, without ever holding all logits: the mean in nats over targets that count.

    The gradient of a slice's logits is multiplied into the hidden state's as soon as it is there, so nothing
    of (tokens, vocabulary) is kept.

    Args:
        inputs, targets: token ids (batch, length); a target of -100 does not count.
        rows: tokens whose logits exist at one moment.
        every_target: say so if every target counts, and no number is looked at to find out.
    """
    hidden = model.model(inputs).flatten(0, 1)  # (512, 576)
    targets = targets.flatten()  # (512,)
    counts = targets != IGNORE  # (512,)
    if not every_target and not bool(counts.all()):
        hidden, targets = hidden[counts], targets[counts]  # (n, 576), (n,)
    head = model.lm_head
    if isinstance(head, LoRALayer) or _is_trained(head):
        return F.cross_entropy(linear(head, hidden), targets)  # ()
    return token_losses(hidden, targets, head, rows).mean()  # ()


def with_every_target(loss: Loss, targets: Sequence[Tensor]) -> Loss:
    """:func:`cross_entropy` with ``every_target`` set from a step's targets; any other loss as it is.

    To be called while the targets are still on the CPU: on a GPU, reading whether all of them count would make Python
    wait for the device.
    """
    if not isinstance(loss, partial) or loss.func is not cross_entropy:
        return loss
    return partial(loss, every_target=all(bool((part != IGNORE).all()) for part in targets))


def token_losses(hidden: Tensor, targets: Tensor, head: nn.Module, rows: int = 256) -> Tensor:
    """Cross-entropy of softmax(hidden W^T), token by token, without ever holding all logits.

    Args:
        hidden: (tokens, hidden size).
        targets: token ids (tokens,), each of which counts.
        head: a frozen ``nn.Linear`` without bias, or a BlockLinear.
        rows: tokens whose logits exist at one moment.

    Returns:
        Losses in nats, (tokens,).
    """
    return _HeadLosses.apply(hidden, targets, head, rows)  # (512,)


class _HeadLosses(torch.autograd.Function):
    """The losses of tokens; keeps their gradients by the hidden state, made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: nn.Module, rows: int) -> Tensor:
        if isinstance(head, BlockLinear):
            losses, gradient = _by_vocabulary(hidden, targets, head, ctx.needs_input_grad[0])
        else:
            losses, gradient = _by_rows(hidden, targets, head, rows, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return losses  # (512,)

    @staticmethod
    @once_differentiable
    def backward(ctx, gs: Tensor):
        (gradient,) = ctx.saved_tensors  # (512, 576)
        return gradient * gs[:, None], None, None, None


def _by_rows(
    hidden: Tensor, targets: Tensor, head: nn.Module, rows: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Slices of tokens, all of the vocabulary at once."""
    weight = head.weight  # (49152, 576)
    losses = hidden.new_empty(len(hidden), 1)  # (512, 1)
    gradient = torch.empty_like(hidden) if with_gradient else None  # (512, 576)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        target = targets[part, None]  # (256, 1)
        logits = _times(hidden[part], weight.T)  # (256, 576) @ (576, 49152) -> (256, 49152)
        own = logits.gather(1, target)  # (256, 1)
        top = logits.amax(1, keepdim=True)  # (256, 1)
        total = logits.sub_(top).exp_().sum(1, keepdim=True)  # (256, 1); logits hold exp(logit - top) now
        losses[part] = total.log() + top - own  # (256, 1)
        if gradient is not None:
            logits.div_(total)  # the probabilities
            logits.scatter_add_(1, target, torch.full_like(own, -1.0))  # minus 1 at the target
            gradient[part] = _times(logits, weight)  # (256, 49152) @ (49152, 576) -> (256, 576)
        del logits  # before the next slice's are made
    return losses[:, 0], gradient


def _by_vocabulary(
    hidden: Tensor, targets: Tensor, head: BlockLinear, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Slices of the vocabulary, all tokens at once, so that no more than a slice of the weight is dequantised.

    Twice over the vocabulary: first for the sum of exponentials of each token, then for the gradient.
    """
    top = hidden.new_full((len(hidden), 1), -math.inf)  # (512, 1)
    total, own = torch.zeros_like(top), torch.zeros_like(top)  # (512, 1)
    for start, stop in head.slices():
        logits = _times(hidden, head.rows(start, stop).T)  # (512, 576) @ (576, 3072) -> (512, 3072)
        here, place = _within(targets, start, stop)  # (512, 1), (512, 1)
        own = torch.where(here, logits.gather(1, place), own)  # (512, 1)
        higher = torch.maximum(top, logits.amax(1, keepdim=True))  # (512, 1)
        total.mul_((top - higher).exp()).add_(logits.sub_(higher).exp_().sum(1, keepdim=True))  # (512, 1)
        top = higher  # (512, 1)
    level = top + total.log()  # (512, 1)
    losses = (level - own)[:, 0]  # (512,)
    if not with_gradient:
        return losses, None
    gradient = torch.zeros_like(hidden)  # (512, 576)
    for start, stop in head.slices():
        weight = head.rows(start, stop)  # (3072, 576)
        chances = _times(hidden, weight.T).sub_(level).exp_()  # (512, 3072)
        here, place = _within(targets, start, stop)  # (512, 1), (512, 1)
        chances.scatter_add_(1, place, -here.to(chances.dtype))  # minus 1 at the target
        _add_product(gradient, chances, weight)  # (512, 576)
    return losses, gradient


def _within(targets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a slice of the vocabulary, and where in it (anywhere, if they do not): (512, 1) each.

    Without picking those tokens out: how many there are nobody knows before the numbers are there.
    """
    here = (targets >= start) & (targets < stop)  # (512,)
    return here[:, None], (targets - start).clamp(0, stop - start - 1)[:, None]  # (512, 1), (512, 1)


# The optimiser, and threads


class FlatAdamW(torch.optim.Optimizer):
    """AdamW over one tensor for each group: 420 adapter matrices cost one pass, not 420.

    Parameters become views of the flat tensor, and keep names, shapes and values. ``state`` holds each
    parameter's views, as ``torch.optim.AdamW`` would hold its tensors.

    Args: as for ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._gradients: dict[nn.Parameter, Tensor] = {}  # each parameter's view
        self._flat = [self._flatten(group["params"]) for group in self.param_groups]

    def _flatten(self, parameters: list[nn.Parameter]) -> dict[str, Tensor]:
        if len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
            raise ValueError("The parameters of a group are of several dtypes or devices, so they fit no one tensor.")
        values = torch.cat([parameter.detach().flatten() for parameter in parameters])  # (2442240,)
        flat = {"values": values} | {
            name: torch.zeros_like(values) for name in ("gradients", "exp_avg", "exp_avg_sq")
        }  # (2442240,) each
        flat["step"] = torch.zeros((), device=values.device)
        start = 0
        for parameter in parameters:
            part, start = slice(start, start + parameter.numel()), start + parameter.numel()
            parameter.data = values[part].view(parameter.shape)
            self.state[parameter] = {"step": flat["step"]} | {
                name: flat[name][part].view(parameter.shape) for name in ("exp_avg", "exp_avg_sq")
            }
            parameter.grad = self._gradients[parameter] = flat["gradients"][part].view(parameter.shape)
        return flat

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero; they stay views, whatever ``set_to_none`` says."""
        for parameter, view in self._gradients.items():
            parameter.grad = view
        for flat in self._flat:
            flat["gradients"].zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what ``state_dict()`` gave, or that of a ``torch.optim.AdamW`` with the same groups.

        Raises:
            ValueError: a parameter has no state, or those of a group are not at one step.
        """
        for group in state_dict["param_groups"]:
            states = [state_dict["state"].get(index, {}) for index in group["params"]]
            complete = all({"step", "exp_avg", "exp_avg_sq"} <= state.keys() for state in states)
            if not complete or len({float(state["step"]) for state in states}) > 1:
                raise ValueError(
                    "The parameters of a group need a state each, all at one step, for a FlatAdamW counts a group's "
                    "steps once; load what state_dict() gave after a step on all of them."
                )
        views = dict(self.state)
        super().load_state_dict(state_dict)  # which puts copies where the views were
        loaded, self.state = self.state, defaultdict(dict, views)
        for parameter, state in views.items():
            for name, view in state.items():
                view.copy_(loaded[parameter][name])

    @torch.no_grad()
    def step(self) -> None:
        """One step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""
        for parameter, view in self._gradients.items():
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:  # after the model's own zero_grad(), which drops the views
                view.copy_(parameter.grad)
        for group, flat in zip(self.param_groups, self._flat, strict=True):
            beta1, beta2 = group["betas"]
            adamw(
                [flat["values"]],
                [flat["gradients"]],
                [flat["exp_avg"]],
                [flat["exp_avg_sq"]],
                [],
                [flat["step"]],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


class InThreads:
    """Backward passes side by side: each micro-batch in a Python thread of its own, which computes on one core.

    With one product after another on all cores, each waits for the slowest core; here they meet once a step.
    Gradients are those of the micro-batches one after another, up to the order of the sum.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(
        self, model: nn.Module, loss: Loss, batches: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
    ) -> list[Tensor]:
        """Add the weighted losses' gradients to the parameters' ``grad``, and return the losses."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def one(batch: tuple[Tensor, Tensor], weight: float) -> tuple[Tensor, Sequence[Tensor]]:
            part = loss(model, *batch) * weight  # ()
            return part.detach(), torch.autograd.grad(part, parameters, allow_unused=True)

        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            parts = list(self.pool.map(one, batches, weights))
        finally:
            torch.set_num_threads(before)
        for _, gradients in parts:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return [part for part, _ in parts]
