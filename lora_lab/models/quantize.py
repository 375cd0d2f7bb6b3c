"""A frozen base in a few bits a weight: GGUF's blocks as they are shipped, and NF4 from scratch.

A matrix is cut into blocks of neighbours in a row, and each block keeps a scale of its own:

    Q4_1         20 bytes for 32: scale d and minimum m in float16, 32 numbers q of 4 bits   w = d q + m        5 bits
    Q8_0         34 bytes for 32: scale d in float16, 32 numbers q of 8 bits                 w = d q            8.5
    NF4          36 bytes for 64: scale s in float32, 64 codes c of 4 bits                   w = s LEVELS[c]    4.5
    NF4-double   33 bytes for 64: scale s in 8 bits, 64 codes c of 4 bits                    w = s LEVELS[c]    4.127

(with the scales' own scales; see :func:`nf4`). The first two are llama.cpp's; the ``gguf`` library defines
them too, and the tests hold the two equal bit for bit.

LoRA over such a base is QLoRA: the weights stay in their blocks, and are dequantised where a product needs
them, in the forward pass and once more in the backward pass. Nothing dense is kept.

    model, tokenizer = load_pretrained(keep_blocks=True)   # SmolLM2 in 98 MB
    quantize_nf4(model)                                    # any model with nn.Linear layers
    inject(model, LoRAConfig(rank=8))                      # as on any other model

Shapes in the comments: a matrix of 1536 x 576, which is 27648 blocks of 32 or 13824 of 64; 512 rows of input.

Reference: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lora_lab.inject import name_matches, replace, require_no_adapters
from lora_lab.layers import register
from lora_lab.lora import LoRALinear

BLOCK = 32  # numbers in a block of GGUF's
BYTES_PER_BLOCK = {"Q4_1": 20, "Q8_0": 34}  # of the kinds that GGUF files ship
_SCALE_BYTES = {"NF4": 4, "NF4-double": 1}
_GROUP = 256  # blocks of NF4-double that share a step
_E4M3_MAX = 448.0  # the largest number of torch.float8_e4m3fn
# Weights dequantised at one moment: fresh memory in pieces of 100 MB costs more time than the numbers in it.
_AT_ONCE = 2**21


# What the blocks mean


def dequantize(blocks: Tensor, kind: str) -> Tensor:
    """The float32 matrix (rows, columns) that rows of GGUF's blocks stand for.

    Args:
        blocks: uint8, (rows, columns / 32 * bytes per block).
        kind: "Q4_1" or "Q8_0".

    Raises:
        ValueError: another kind, or rows that are no whole number of blocks.
    """
    shape = shape_of(blocks, kind)
    return _NUMBERS[kind](blocks.reshape(-1, BYTES_PER_BLOCK[kind])).view(shape)  # (27648, 20) -> (1536, 576)


def shape_of(blocks: Tensor, kind: str) -> tuple[int, int]:
    """(rows, columns) of the matrix that :func:`dequantize` makes; raises what it raises."""
    if kind not in BYTES_PER_BLOCK:
        raise ValueError(f"Blocks of kind {kind!r} are not read here, only {list(BYTES_PER_BLOCK)}.")
    rows, row_bytes = blocks.shape
    count, rest = divmod(row_bytes, BYTES_PER_BLOCK[kind])
    if rest:
        raise ValueError(
            f"A row of {row_bytes} bytes is no whole number of {kind} blocks of {BYTES_PER_BLOCK[kind]} bytes."
        )
    return rows, count * BLOCK


def _q4_1(block: Tensor) -> Tensor:
    scale, minimum = _float16(block[:, 0:2]), _float16(block[:, 2:4])  # (27648, 1)
    packed = block[:, 4:].contiguous()  # (27648, 16), number i and number i + 16 in a byte
    numbers = torch.cat((packed & 15, packed >> 4), dim=1)  # (27648, 32)
    return numbers.float().mul_(scale).add_(minimum)  # (27648, 32)


def _q8_0(block: Tensor) -> Tensor:
    return block[:, 2:].view(torch.int8).float().mul_(_float16(block[:, 0:2]))  # (27648, 34) -> (27648, 32)


def _float16(pair: Tensor) -> Tensor:
    return _as(pair, torch.float16).float()  # (27648, 2) bytes -> (27648, 1)


def _as(column: Tensor, dtype: torch.dtype) -> Tensor:
    # A clone, for contiguous() leaves a single row as it lies, which need not be where a number may lie.
    return column.clone(memory_format=torch.contiguous_format).view(dtype)  # (27648, 4) bytes -> (27648, 1)


def _nf4(block: Tensor) -> Tensor:
    scale = _as(block[:, 0:4], torch.float32)  # (13824, 1)
    return _levels(block[:, 4:]).mul_(scale)  # (13824, 64)


def _nf4_double(block: Tensor, step: Tensor, mean: Tensor) -> Tensor:
    scale = _as(block[:, 0:1], torch.float8_e4m3fn).float().mul_(step).add_(mean)  # (13824, 1)
    return _levels(block[:, 1:]).mul_(scale.clamp_(min=0))  # (13824, 64); a scale below 0 would turn signs round


def _levels(packed: Tensor) -> Tensor:
    found = _pairs_beside(packed).index_select(0, packed.int().flatten())  # (13824, 32) -> (442368,)
    return found.view(torch.float32).view(len(packed), 2 * packed.shape[1])  # (884736,) -> (13824, 64)


def _pairs_beside(packed: Tensor) -> Tensor:
    """The two numbers of each byte (256,) on a device: copied there once, for a copy makes Python wait for a GPU."""
    if isinstance(packed, FakeTensor):  # whose table has no numbers either
        return packed.new_empty(256, dtype=torch.int64)  # (256,)
    if packed.device not in _PAIRS:
        _PAIRS[packed.device] = _PAIRS[torch.device("cpu")].to(packed.device)  # (256,)
    return _PAIRS[packed.device]  # (256,)


_NUMBERS: dict[str, Callable[..., Tensor]] = {"Q4_1": _q4_1, "Q8_0": _q8_0, "NF4": _nf4, "NF4-double": _nf4_double}


# NF4


def _normal_float() -> tuple[float, ...]:
    """The 16 levels of NF4: quantiles of a normal distribution, dense where weights drawn from one are dense.

    From the middle, which is an exact zero, 8 equal steps in probability go up and 7 go down. Both end short
    of probability 1, where the quantile is infinite, by half the mean of 1/15 and 1/16. All are divided by
    the largest.

    Reference: Dettmers et al. 2023, section 3, equation 4; the values: appendix E.
    """
    end = 1 - (1 / 30 + 1 / 32) / 2

    def half(steps: int) -> list[float]:
        quantiles = [NormalDist().inv_cdf(0.5 + (end - 0.5) * i / steps) for i in range(1, steps + 1)]
        return [quantile / quantiles[-1] for quantile in quantiles]

    return (*(-level for level in reversed(half(7))), 0.0, *half(8))


LEVELS = _normal_float()
_LEVEL = torch.tensor(LEVELS, dtype=torch.float32, device="cpu")  # (16,)
# By device, the two numbers of each of the 256 bytes; seen as one number of 8 bytes, a look-up brings both at once.
_PAIRS = {torch.device("cpu"): torch.cartesian_prod(_LEVEL, _LEVEL).view(torch.int64).flatten()}  # (256, 2) -> (256,)


def nf4(weight: Tensor, block: int = 64, double: bool = True) -> tuple[Tensor, Tensor | None]:
    """``weight`` in NF4: each block is divided by its largest magnitude and rounded to the nearest of the 16 levels.

    Blocks run on over the ends of rows; the last one is filled up with zeros. With double quantisation the
    blocks' scales are kept as mean + step * (a number of 8 bits, e4m3), with one step for 256 blocks.

    Args:
        weight: a floating-point tensor of any shape.
        block: how many weights share a scale, an even number.
        double: quantise the scales too.

    Returns:
        The blocks (blocks, bytes), uint8; and the bytes of float32 numbers (1 + groups, 4), uint8, the mean of
        the scales and each group's step (None without double quantisation).

    Raises:
        ValueError: block is no even whole number of at least 2.

    Reference: Dettmers et al. 2023, section 3, "4-bit NormalFloat Quantization" and "Double Quantization".
    """
    if not isinstance(block, int) or block < 2 or block % 2:
        raise ValueError(f"block is {block!r}, but it must be an even whole number of at least 2, such as 64.")
    numbers = weight.detach().float().flatten()  # (884736,)
    numbers = F.pad(numbers, (0, -len(numbers) % block)).view(-1, block)  # (13824, 64)
    scale = numbers.abs().amax(dim=1, keepdim=True)  # (13824, 1)
    level = weight.new_tensor(LEVELS, dtype=torch.float32)  # (16,), on the same device
    middle = (level[1:] + level[:-1]) / 2  # (15,)
    code = torch.bucketize(numbers / _not_zero(scale), middle, out_int32=True).byte()  # (13824, 64)
    packed = code[:, 0::2] << 4 | code[:, 1::2]  # (13824, 32)
    if not double:
        return torch.cat((scale.view(torch.uint8), packed), dim=1), None  # (13824, 36)
    mean = scale.mean()  # ()
    centred = F.pad((scale - mean).flatten(), (0, -len(scale) % _GROUP)).view(-1, _GROUP)  # (54, 256)
    step = centred.abs().amax(dim=1, keepdim=True) / _E4M3_MAX  # (54, 1)
    short = (centred / _not_zero(step)).to(torch.float8_e4m3fn).view(torch.uint8)  # (54, 256)
    packed = torch.cat((short.view(-1, 1)[: len(scale)], packed), dim=1)  # (13824, 33)
    return packed, torch.cat((mean.view(1, 1), step)).view(torch.uint8)  # (55, 4)


def _not_zero(scale: Tensor) -> Tensor:
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)


# Layers


class BlockWeight(nn.Module):
    """What a linear layer and an embedding in blocks share: the blocks, frozen, and how to read them.

    The blocks are a parameter of bytes, which neither ``half()`` nor ``to(dtype)`` touches. ``dtype`` is what
    the weights are dequantised to (they are computed in float32), and follows ``half()`` and ``to(dtype)``.

    Args:
        packed: the blocks, uint8 (blocks, bytes), row after row. A parameter is taken as it is, so that two
            layers can share it.
        kind: "Q4_1", "Q8_0", "NF4" or "NF4-double".
        shape: (rows, columns) of the matrix.
        steps: for NF4-double: what :func:`nf4` returned beside the blocks.
        dtype: a floating-point dtype.

    Raises:
        ValueError: the kind is unknown, or the blocks or the steps are not those of such a matrix.
    """

    def __init__(
        self,
        packed: Tensor,
        kind: str,
        shape: tuple[int, int],
        steps: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if kind not in _NUMBERS:
            raise ValueError(f"Blocks of kind {kind!r} are not known here, only {list(_NUMBERS)}.")
        count, size = packed.shape
        self.block = 2 * (size - _SCALE_BYTES[kind]) if kind in _SCALE_BYTES else BLOCK
        fits = self.block > 0 and count == math.ceil(math.prod(shape) / self.block)
        if not fits or size != BYTES_PER_BLOCK.get(kind, size) or packed.dtype != torch.uint8:
            raise ValueError(
                f"A {packed.dtype} tensor of {(count, size)} is not the blocks of a matrix of {tuple(shape)} in {kind}."
            )
        wanted = (1 + math.ceil(count / _GROUP), 4) if kind == "NF4-double" else None
        if (found := None if steps is None else tuple(steps.shape)) != wanted:
            raise ValueError(f"steps is of shape {found}, but {count} blocks of {kind} need {wanted}.")
        self.packed = _frozen(packed)  # (27648, 20)
        self.steps = _frozen(steps)  # None, or (55, 4)
        self.kind, self.shape, self.dtype = kind, tuple(shape), dtype

    @property
    def stands_for(self) -> dict[int, int]:
        """How many numbers of the matrix each parameter holds, by the parameter's id."""
        return {id(self.steps): 0, id(self.packed): math.prod(self.shape)}

    @property
    def weight(self) -> Tensor:
        """The matrix, dequantised anew: (1536, 576). It is the caller's own, to write into as well."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the matrix, counted as slices count: (stop - start, 576)."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        stop, columns = max(start, stop), self.shape[1]
        first, last = start * columns // self.block, math.ceil(stop * columns / self.block)
        numbers = self._numbers(first, last).flatten()  # from the start of a block, which may lie in another row
        skipped = start * columns - first * self.block
        return numbers[skipped : skipped + (stop - start) * columns].view(stop - start, columns).to(self.dtype)

    def _numbers(self, first: int, last: int) -> Tensor:
        block = self.packed[first:last]  # (27648, 20)
        if self.steps is None:
            return _NUMBERS[self.kind](block)  # (27648, 32)
        mean, step = self.steps.view(torch.float32).split((1, len(self.steps) - 1))  # (1, 1), (54, 1)
        step = step.repeat_interleave(_GROUP, dim=0)[first:last]  # (13824, 1)
        return _NUMBERS[self.kind](block, step, mean)  # (13824, 64)

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage for each weight, scales included."""
        stored = self.packed.numel() + (0 if self.steps is None else self.steps.numel())
        return 8 * stored / math.prod(self.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args, **kwargs) -> BlockWeight:
        super()._apply(fn, *args, **kwargs)
        self.dtype = fn(torch.empty(1, dtype=self.dtype)).dtype  # what half(), to(dtype), ... make of a weight
        return self


class BlockLinear(BlockWeight):
    """A frozen ``nn.Linear`` whose weight stays in blocks.

    It computes what an ``nn.Linear`` with the dequantised weight computes. For the backward pass it keeps
    neither a weight nor its input.

    Args: as for :class:`BlockWeight`, with shape (out, in), and
        bias: (out,), or None.
    """

    def __init__(
        self,
        packed: Tensor,
        kind: str,
        shape: tuple[int, int],
        bias: Tensor | None = None,
        steps: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(packed, kind, shape, steps, dtype)
        self.out_features, self.in_features = self.shape
        self.bias = _frozen(bias)  # (1536,)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)  # (512, 576) -> (512, 1536)

    def slices(self) -> list[tuple[int, int]]:
        """Ranges of rows that are dequantised one after another, so that a large matrix never exists whole."""
        size = max(1, _AT_ONCE // self.in_features)
        return [(start, min(start + size, self.out_features)) for start in range(0, self.out_features, size)]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kind={self.kind}, bits_per_weight={self.bits_per_weight:.4g}"
        )


class _Product(torch.autograd.Function):
    """x W^T + b. The base is frozen, so the only gradient is that of x, g W, and W is made again for it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, layer: BlockLinear) -> Tensor:
        outputs = [
            F.linear(x, layer.rows(start, stop), None if layer.bias is None else layer.bias[start:stop])
            for start, stop in layer.slices()
        ]  # a list of (512, 1536)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)  # (512, 1536)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, BlockLinear], output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        # Under autocast g is in half precision, and the weight is not.
        parts = (
            g[..., start:stop] @ ctx.layer.rows(start, stop).to(g.dtype)  # (512, 1536) @ (1536, 576)
            for start, stop in ctx.layer.slices()
        )
        return reduce(torch.add, parts), None  # (512, 576)


class BlockEmbedding(BlockWeight):
    """A frozen ``nn.Embedding`` whose table stays in GGUF's blocks: only the rows looked up are dequantised.

    Args: as for :class:`BlockWeight`, with shape (tokens, width).

    Raises:
        ValueError: as for BlockWeight, or the kind is not one of GGUF's, or a block lies in two rows.
    """

    def __init__(self, packed: Tensor, kind: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(packed, kind, shape, dtype=dtype)
        self.num_embeddings, self.embedding_dim = self.shape
        if kind not in BYTES_PER_BLOCK or self.embedding_dim % self.block:
            raise ValueError(
                f"An embedding of {self.shape} in {kind} has blocks that lie in two rows; "
                f"use one of {list(BYTES_PER_BLOCK)} and a width that is a multiple of {BLOCK}."
            )

    def forward(self, ids: Tensor) -> Tensor:
        found = F.embedding(ids, self.packed.view(self.num_embeddings, -1))  # (4, 128) -> (4, 128, 612) bytes
        numbers = dequantize(found.view(-1, found.shape[-1]), self.kind).to(self.dtype)  # (512, 576)
        return numbers.view(*ids.shape, self.embedding_dim)  # (4, 128, 576)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, kind={self.kind}"


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None:
        return None
    return tensor.requires_grad_(False) if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)


register(BlockLinear, LoRALinear, linear=True)


def quantize_nf4(model: nn.Module, block: int = 64, double: bool = True, exclude: Sequence[str] = ()) -> list[str]:
    """Replace the ``nn.Linear`` layers of ``model`` by frozen ones in NF4, in place.

    All of them but the output head (what ``model.get_output_embeddings()`` returns, if the model has that
    method), which is often the embedding too. Subclasses of ``nn.Linear`` are left alone, for their parents
    read their weights in ways of their own.

    Args:
        block, double: as in :func:`nf4`.
        exclude: names or endings of names of layers to leave as they are.

    Returns:
        The names of the layers now in NF4.

    Raises:
        ValueError: the model has adapters, there is no such layer, a weight belongs to two modules, or block
            is no even whole number. The model is then left as it was.
    """
    if isinstance(exclude, str):
        raise ValueError(f"exclude is {exclude!r}, but it must be a list of names; write [{exclude!r}].")
    require_no_adapters(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = {
        name: module
        for name, module in model.named_modules()
        if name and type(module) is nn.Linear and module is not head and not any(name_matches(name, e) for e in exclude)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear inside it to quantise, "
            f"besides its output head and what exclude={list(exclude)} leaves out."
        )
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        if owners[id(layer.weight)] > 1:
            raise ValueError(
                f"The weight of {name!r} is shared with another module, which would keep it dense; exclude {[name]}."
            )
    kind = "NF4-double" if double else "NF4"
    for name, layer in layers.items():
        packed, steps = nf4(layer.weight, block, double)
        quantized = BlockLinear(packed, kind, layer.weight.shape, layer.bias, steps, layer.weight.dtype)
        replace(model, name, quantized.train(layer.training))
    return list(layers)
