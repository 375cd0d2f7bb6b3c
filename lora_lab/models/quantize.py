"""A frozen base in a few bits per weight: GGUF's blocks as they are shipped, and NF4 from scratch.

A matrix is split into blocks of neighbouring weights, each with a scale:

    Q4_1         20 bytes for 32: scale d and minimum m in float16, 32 codes q of 4 bits   w = d q + m        5 bits
    Q8_0         34 bytes for 32: scale d in float16, 32 codes q of 8 bits                 w = d q            8.5
    NF4          36 bytes for 64: scale s in float32, 64 codes c of 4 bits                 w = s LEVELS[c]    4.5
    NF4-double   33 bytes for 64: scale s in 8 bits, 64 codes c of 4 bits                  w = s LEVELS[c]    4.127

The bits per weight of NF4-double include what its scales are quantised with: see :func:`nf4`. The first two formats are
llama.cpp's. They are decoded here, and encoded by the ``gguf`` library.

LoRA over such a base is QLoRA: the weights stay in blocks, and each matrix multiplication dequantises its own, in the
forward pass and again in the backward pass. No dense weight is saved.

    model, tokenizer = load_pretrained(keep_blocks=True)   # SmolLM2 in 98 MB
    quantize_nf4(model)                                    # any model with nn.Linear layers
    inject(model, LoRAConfig(rank=8))                      # as on any other model

Shapes in the comments: a matrix of 1536 x 576, which is 27648 blocks of 32 or 13824 of 64; 512 rows of input.

Reference: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lora_lab.inject import check_names, check_own_weights, find_excluded, output_head, replace, require_no_adapters
from lora_lab.layers import QuantizedLayer, register
from lora_lab.lora import LoRALinear

BLOCK, _NF4_BLOCK = 32, 64  # weights in a block of GGUF's formats, and of NF4's
_GROUP = 256  # blocks of NF4-double that share a step
_E4M3_MAX = 448.0  # the largest number of torch.float8_e4m3fn
# Weights dequantised at a time: allocating 100 MB at once takes longer than computing the weights in it.
_AT_ONCE = 2**20
_MOST_SLICES = 32  # of a larger matrix: each slice takes a dozen operations, whatever its size


# Formats


@dataclass(frozen=True)
class BlockFormat:
    """How the bytes of a block encode its weights.

    Args:
        decode: uint8 (blocks, bytes) -> float32 (blocks, weights). Where scales are quantised, it also takes each
            block's step (blocks, 1) and the mean of all scales.
        encode: the reverse: a matrix of any floating-point dtype -> the blocks, and the steps, as :func:`nf4` returns
            them (None if scales are not quantised).
        scale_bytes: bytes at the start of a block that hold its scale (and minimum); the codes follow.
        weights: in a block.
    """

    decode: Callable[..., Tensor]
    encode: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    scale_bytes: int
    weights: int


def _q4_1(block: Tensor) -> Tensor:
    scale, minimum = _float16(block[:, 0:2]), _float16(block[:, 2:4])  # (27648, 1)
    packed = block[:, 4:].contiguous()  # (27648, 16), codes i and i + 16 in a byte
    codes = torch.cat((packed & 15, packed >> 4), dim=1)  # (27648, 32)
    return codes.float().mul_(scale).add_(minimum)  # (27648, 32)


def _q4_1_product(x: Tensor, block: Tensor) -> Tensor:
    """Return x W^T in half the time, with a kernel that torch has for embeddings in 4 bits on a CPU.

    Its blocks end with scale and minimum, and its neighbouring codes share a byte, so the columns of W come out in
    another order, which x is given too.
    """
    words = _reinterpret(block, torch.int32) if block.storage_offset() % 4 else block.view(torch.int32)  # (27648, 5)
    rows = torch.empty_like(words)  # (27648, 5)
    rows.view(-1)[:-1] = words.reshape(-1)[1:]  # one copy without strides, which is fast
    rows[:, 4] = words[:, 0]  # where that copy put the next block's
    weight = torch.ops.quantized.embedding_bag_4bit_unpack(rows.view(torch.uint8)).view(-1, x.shape[-1])  # (1536, 576)
    pairs = x.unflatten(-1, (-1, 2, BLOCK // 2)).transpose(-1, -2)  # (1, 576) -> (1, 18, 16, 2)
    return F.linear(pairs.flatten(-3), weight)  # (1, 1536)


def _q8_0(block: Tensor) -> Tensor:
    return block[:, 2:].view(torch.int8).float().mul_(_float16(block[:, 0:2]))  # (27648, 34) -> (27648, 32)


def _encode_by_gguf(weight: Tensor, kind: str) -> tuple[Tensor, None]:
    import gguf  # here, because it takes a tenth of a second

    # In one row, because gguf is slow with many.
    row = _split(weight, BLOCK).view(1, -1).cpu().numpy()  # (1, 884736)
    blocks = gguf.quants.quantize(row, gguf.GGMLQuantizationType[kind])  # (1, 552960) bytes
    return torch.from_numpy(blocks).to(weight.device).view(-1, BYTES_PER_BLOCK[kind]), None  # (27648, 20)


def _split(weight: Tensor, block: int) -> Tensor:
    """Return the weights in float32, a block in each row; the last one is padded with zeros."""
    weights = weight.detach().float().flatten()  # (884736,)
    return F.pad(weights, (0, -len(weights) % block)).view(-1, block)  # (27648, 32)


def _float16(pair: Tensor) -> Tensor:
    return _reinterpret(pair, torch.float16).float()  # (27648, 2) bytes -> (27648, 1)


def _reinterpret(column: Tensor, dtype: torch.dtype) -> Tensor:
    # A clone, because contiguous() does not move a single row, whose address need not be aligned for the dtype.
    return column.clone(memory_format=torch.contiguous_format).view(dtype)  # (27648, 4) bytes -> (27648, 1)


def _nf4(block: Tensor) -> Tensor:
    scale = _reinterpret(block[:, 0:4], torch.float32)  # (13824, 1)
    return _levels(block[:, 4:]).mul_(scale)  # (13824, 64)


def _nf4_double(block: Tensor, step: Tensor, mean: Tensor) -> Tensor:
    scale = _reinterpret(block[:, 0:1], torch.float8_e4m3fn).float().mul_(step).add_(mean)  # (13824, 1)
    return _levels(block[:, 1:]).mul_(scale.clamp_(min=0))  # (13824, 64); a scale below 0 would flip the signs


def _levels(packed: Tensor) -> Tensor:
    pairs = _byte_pairs(packed).index_select(0, packed.int().flatten())  # (13824, 32) -> (442368,)
    return pairs.view(torch.float32).view(len(packed), 2 * packed.shape[1])  # (884736,) -> (13824, 64)


def _byte_pairs(packed: Tensor) -> Tensor:
    """Return both levels of each byte (256,) on a device, copied once, for each copy makes Python wait for the GPU."""
    if isinstance(packed, FakeTensor):  # whose table must be fake too
        return packed.new_empty(256, dtype=torch.int64)  # (256,)
    if packed.device not in _PAIRS:
        _PAIRS[packed.device] = _PAIRS[torch.device("cpu")].to(packed.device)  # (256,)
    return _PAIRS[packed.device]  # (256,)


# NF4


def _normal_float() -> tuple[float, ...]:
    """Return NF4's 16 levels: quantiles of a normal distribution, dense where normally distributed weights are dense.

    From the middle, which is exactly zero, 8 equal steps in probability go up and 7 go down. Both end before
    probability 1, where the quantile is infinite, by half the mean of 1/15 and 1/16. All levels are divided by
    the largest.

    Reference: Dettmers et al. 2023, section 3, equation 4; the values: appendix E.
    """
    end = 1 - (1 / 30 + 1 / 32) / 2

    def positive(steps: int) -> list[float]:
        quantiles = [NormalDist().inv_cdf(0.5 + (end - 0.5) * i / steps) for i in range(1, steps + 1)]
        return [quantile / quantiles[-1] for quantile in quantiles]

    negative = [-level for level in reversed(positive(7))]
    return (*negative, 0.0, *positive(8))


LEVELS = _normal_float()
_LEVEL = torch.tensor(LEVELS, dtype=torch.float32, device="cpu")  # (16,)
# By device, the two levels of each of the 256 bytes, viewed as one integer of 8 bytes, so that one look-up reads both.
_PAIRS = {torch.device("cpu"): torch.cartesian_prod(_LEVEL, _LEVEL).view(torch.int64).flatten()}  # (256, 2) -> (256,)


def nf4(weight: Tensor, double: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return ``weight`` in NF4: each block divided by its largest magnitude, and rounded to the nearest of 16 levels.

    A block has 64 weights, and may cross the ends of rows; the last one is padded with zeros. Double quantisation
    stores the scales of the blocks as mean + step * (a number of 8 bits, e4m3), with one step per 256 blocks.

    Args:
        weight: a floating-point tensor of any shape.
        double: quantise the scales too.

    Returns:
        The blocks (blocks, bytes), uint8; and the bytes of float32 numbers (1 + groups, 4), uint8, the mean of
        the scales and the step of each group (None without double quantisation).

    Reference: Dettmers et al. 2023, section 3, "4-bit NormalFloat Quantization" and "Double Quantization".
    """
    weights = _split(weight, _NF4_BLOCK)  # (13824, 64)
    scale = weights.abs().amax(dim=1, keepdim=True)  # (13824, 1)
    level = weight.new_tensor(LEVELS, dtype=torch.float32)  # (16,), on the same device
    middle = (level[1:] + level[:-1]) / 2  # (15,)
    codes = torch.bucketize(weights / _not_zero(scale), middle, out_int32=True).byte()  # (13824, 64)
    packed = codes[:, 0::2] << 4 | codes[:, 1::2]  # (13824, 32)
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


# The four


FORMATS = {
    "Q4_1": BlockFormat(_q4_1, partial(_encode_by_gguf, kind="Q4_1"), scale_bytes=4, weights=BLOCK),
    "Q8_0": BlockFormat(_q8_0, partial(_encode_by_gguf, kind="Q8_0"), scale_bytes=2, weights=BLOCK),
    "NF4": BlockFormat(_nf4, partial(nf4, double=False), scale_bytes=4, weights=_NF4_BLOCK),
    "NF4-double": BlockFormat(_nf4_double, nf4, scale_bytes=1, weights=_NF4_BLOCK),
}
BYTES_PER_BLOCK = {"Q4_1": 20, "Q8_0": 34}


def dequantize(blocks: Tensor, kind: str) -> Tensor:
    """Return the float32 matrix (rows, columns) that rows of GGUF's blocks encode.

    Args:
        blocks: uint8, (rows, columns / 32 * bytes per block).
        kind: "Q4_1" or "Q8_0".

    Raises:
        KeyError: there is no such kind.
        ValueError: a row is not a whole number of blocks.
    """
    rows, row_bytes = blocks.shape
    size = BYTES_PER_BLOCK[kind]
    if row_bytes % size:
        raise ValueError(f"A row of {row_bytes} bytes is not a whole number of {kind} blocks of {size} bytes.")
    weights = FORMATS[kind].decode(blocks.reshape(-1, size))  # (27648, 20) -> (27648, 32)
    return weights.view(rows, row_bytes // size * BLOCK)  # (1536, 576)


def round_matrix(weight: Tensor, kind: str) -> Tensor:
    """Return a matrix as blocks of this kind hold it: quantised and dequantised, in float32.

    Args:
        weight: a floating-point matrix (rows, columns).
        kind: in :data:`FORMATS`.
    """
    packed, steps = FORMATS[kind].encode(weight)  # (13824, 33), (55, 4)
    return BlockWeight(packed, kind, weight.shape, steps=steps).weight  # (1536, 576)


# Layers


class BlockWeight(QuantizedLayer):
    """What a linear layer and an embedding in blocks share: frozen blocks, and how to dequantise them.

    The blocks are a parameter of bytes, which ``half()`` and ``to(dtype)`` do not change. ``dtype`` is that of the
    dequantised weights (which are computed in float32), and follows ``half()`` and ``to(dtype)``.

    Args:
        packed: the blocks, uint8 (blocks, bytes), row after row. A parameter is not copied, so that two layers can
            share it.
        kind: "Q4_1", "Q8_0", "NF4" or "NF4-double".
        shape: (rows, columns) of the matrix.
        bias: of a linear layer, (rows,), or None.
        steps: for NF4-double: what :func:`nf4` returned beside the blocks.
        dtype: a floating-point dtype.

    Raises:
        KeyError: there is no such kind.
    """

    packed: nn.Parameter
    steps: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        packed: Tensor,
        kind: str,
        shape: Sequence[int],
        bias: Tensor | None = None,
        steps: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        rows, columns = shape
        self.kind, self.format, self.shape, self.dtype = kind, FORMATS[kind], (rows, columns), dtype
        self.packed = _freeze(packed)  # (27648, 20)
        self.steps = None if steps is None else _freeze(steps)  # None, or (55, 4)
        self.bias = None if bias is None else _freeze(bias)  # None, or (1536,)

    @property
    def stands_for(self) -> dict[int, int]:
        """How many weights of the matrix each parameter holds, by the parameter's id."""
        return {id(self.steps): 0, id(self.packed): math.prod(self.shape)}

    @property
    def weight(self) -> Tensor:
        """The dequantised matrix, (1536, 576): a new tensor at each access, into which the caller may write."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows of the matrix from ``start`` to before ``stop``: (stop - start, 576)."""
        columns, block = self.shape[1], self.format.weights
        first, last = start * columns // block, math.ceil(stop * columns / block)
        # From the start of a block, which may lie in another row.
        weights = self._decode(first, last).flatten()
        skipped = start * columns - first * block
        return weights[skipped : skipped + (stop - start) * columns].view(stop - start, columns).to(self.dtype)

    def _decode(self, first: int, last: int) -> Tensor:
        """Return the weights of some blocks."""
        block = self.packed[first:last]  # (27648, 20)
        if self.steps is None:
            return self.format.decode(block)  # (27648, 32)
        mean, step = self.steps.view(torch.float32).split((1, len(self.steps) - 1))  # (1, 1), (54, 1)
        step = step.repeat_interleave(_GROUP, dim=0)[first:last]  # (13824, 1)
        return self.format.decode(block, step, mean)  # (13824, 64)

    def requantize(self, weight: Tensor) -> BlockWeight:
        """Return a new layer in blocks of the same kind, with another matrix; a bias is copied.

        Args:
            weight: of the shape of this layer's, in floating point. It is best in float32, so that it is rounded once.
        """
        packed, steps = self.format.encode(weight)  # (13824, 33), (55, 4)
        in_place_of = {id(self.packed): _freeze(packed)}
        if self.steps is not None and steps is not None:
            in_place_of[id(self.steps)] = _freeze(steps)
        return copy.deepcopy(self, in_place_of)

    def extra_repr(self) -> str:
        return f"{self.shape}, kind={self.kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], *args, **kwargs) -> BlockWeight:
        super()._apply(fn, *args, **kwargs)
        self.dtype = fn(torch.empty(1, dtype=self.dtype)).dtype  # what half(), to(dtype), ... make of a weight
        return self


class BlockLinear(BlockWeight):
    """A frozen ``nn.Linear`` whose weight stays in blocks.

    It computes what an ``nn.Linear`` with the dequantised weight computes. It saves neither a weight nor its input for
    the backward pass.

    Args: as for :class:`BlockWeight`, with shape (out, in).
    """

    @property
    def out_features(self) -> int:
        """As of an ``nn.Linear``."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """As of an ``nn.Linear``."""
        return self.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        # To generate a token is to multiply one row, in which dequantising takes nearly all the time.
        plain = type(x) is Tensor and x.is_cpu and x.dtype == self.dtype == torch.float32
        if plain and not torch.is_grad_enabled() and self.kind == "Q4_1" and self.in_features % BLOCK == 0:
            each = self.in_features // BLOCK  # blocks in a row of the matrix
            outputs = [_q4_1_product(x, self.packed[start * each : stop * each]) for start, stop in self.slices()]
            joined = torch.cat(outputs, dim=-1)  # (1, 1536)
            return joined if self.bias is None else joined + self.bias
        return _BlockMatmul.apply(x, self)  # (512, 576) -> (512, 1536)

    def slices(self) -> list[tuple[int, int]]:
        """Return ranges of rows to dequantise one after another, so that a large matrix never exists whole."""
        size = max(1, max(_AT_ONCE, self.in_features * self.out_features // _MOST_SLICES) // self.in_features)
        return [(start, min(start + size, self.out_features)) for start in range(0, self.out_features, size)]


class _BlockMatmul(torch.autograd.Function):
    """x W^T + b. The base is frozen, so the only gradient is that of x, g W, for which W is dequantised again."""

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
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] - one output
        # Under autocast g is in half precision, and the weight is not.
        parts = (
            g[..., start:stop] @ ctx.layer.rows(start, stop).to(g.dtype)  # (512, 1536) @ (1536, 576)
            for start, stop in ctx.layer.slices()
        )
        return reduce(torch.add, parts), None  # (512, 576)


class BlockEmbedding(BlockWeight):
    """A frozen ``nn.Embedding`` whose table stays in GGUF's blocks: only the rows that are looked up are dequantised.

    Args: as for :class:`BlockWeight`, with shape (tokens, width). No block may lie in two rows, so it is one of GGUF's.
    """

    @property
    def num_embeddings(self) -> int:
        """As of an ``nn.Embedding``."""
        return self.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        blocks = F.embedding(ids, self.packed.view(self.num_embeddings, -1))  # (4, 128) -> (4, 128, 612) bytes
        rows = dequantize(blocks.view(-1, blocks.shape[-1]), self.kind).to(self.dtype)  # (512, 576)
        return rows.view(*ids.shape, self.shape[1])  # (4, 128, 576)


def _freeze(tensor: Tensor) -> nn.Parameter:
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    parameter.requires_grad_(False)
    return parameter


register(BlockLinear, LoRALinear, linear=True)


def quantize_nf4(model: nn.Module, double: bool = True, exclude: Sequence[str] = ()) -> list[str]:
    """Replace the ``nn.Linear`` layers of ``model`` by frozen ones in NF4, in place.

    The output head (see :func:`lora_lab.inject.output_head`) stays dense, because it often shares its weight with the
    embedding. So do subclasses of ``nn.Linear``, because the modules around them may read their weights directly.

    Args:
        double: as in :func:`nf4`.
        exclude: names or endings of names of layers to leave dense.

    Returns:
        The names of the layers now in NF4.

    Raises:
        ValueError: the model has adapters, there is no such layer, a name in ``exclude`` matches nothing, or a weight
            belongs to two modules. The model is then left as it was.
    """
    exclude = check_names("exclude", exclude)
    require_no_adapters(model)
    head = output_head(model)
    modules = {name: module for name, module in model.named_modules() if name}
    left_out = find_excluded(modules, exclude)
    layers = {
        name: module
        for name, module in modules.items()
        if type(module) is nn.Linear and module is not head and name not in left_out
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to quantise, besides its output head and what is excluded "
            f"({list(exclude)})."
        )
    check_own_weights(model, layers)
    kind = "NF4-double" if double else "NF4"
    for name, layer in layers.items():
        packed, steps = nf4(layer.weight, double)
        quantized = BlockLinear(packed, kind, layer.weight.shape, layer.bias, steps, layer.weight.dtype)
        replace(model, name, quantized.train(layer.training))
    return list(layers)
