"""How many FLOPs a training step has, counted on fake tensors: by part of the model, and by pass.

    print(flops(model, LoRA(rank=8), batch_size=4, seq_len=128))

LoRA spares the weight gradients, so it multiplies less than full fine-tuning: but never under two thirds of it, unless
its adapters stand in the last blocks only; and above some rank more. How long that takes is another question
(``lora_lab.costs.speed``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lora_lab.costs.fake import Batch, Factory, batch_for, fake_copy, storage_of
from lora_lab.costs.setup import Setup, as_setup, setting_of
from lora_lab.costs.trace import StepTracer
from lora_lab.inject import lora_layers, transformer_blocks
from lora_lab.lora import LoRALayer, LoRALinear
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models.quantize import BlockLinear
from lora_lab.system.device import own_randomness
from lora_lab.train import TrainingStep
from lora_lab.variants import LoRAFALinear, RsLoRALinear

LAYERS, HEAD, ATTENTION, ADAPTERS, OTHER = "layers", "head", "attention", "adapters", "other"
PARTS = (LAYERS, HEAD, ATTENTION, ADAPTERS, OTHER)
FORWARD, INPUT, WEIGHT, AGAIN = "forward", "input gradients", "weight gradients", "recomputed"
PASSES = (FORWARD, INPUT, WEIGHT, AGAIN)
GIGA = 10**9
_ATEN = torch.ops.aten
_SUMS = (_ATEN.addmm, _ATEN.addmm_, _ATEN.baddbmm, _ATEN.baddbmm_)
# torch's own formulas; it has none for sums in place, and so counts them as nothing.
_FORMULAS = {**flop_registry, _ATEN.addmm_: flop_registry[_ATEN.addmm], _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm]}


@dataclass(frozen=True)
class Flops:
    """What the products of one training step come to, in FLOPs: two for each multiplication and its addition.

    ``counts`` has them by part (layers, head, attention, adapters, other) and pass (forward, input gradients,
    weight gradients, recomputed). Attention is counted whole, as if nothing were masked: 2 s h L products a token
    forward and twice that backward. ``closed`` is what :func:`closed_form` says of the same step, or None where it
    says nothing. ``tokens`` is the batch's size, in tokens or examples.
    """

    counts: Mapping[tuple[str, str], int]
    tokens: int
    setting: str
    seq_len: int | None = None
    closed: Mapping[str, float] | None = None

    @property
    def total(self) -> int:
        """All of the step."""
        return sum(self.counts.values())

    def part(self, name: str) -> int:
        """All passes of one part: "layers", "head", "attention", "adapters" or "other"."""
        return sum(count for (part, _), count in self.counts.items() if part == name)

    def in_pass(self, name: str) -> int:
        """All parts of one pass: "forward", "input gradients", "weight gradients" or "recomputed"."""
        return sum(count for (_, pass_), count in self.counts.items() if pass_ == name)

    @property
    def causal(self) -> float | None:
        """The total if a causal kernel skips what the mask hides: (s - 1) / 2s of attention. None without s."""
        return (
            None if self.seq_len is None else self.total - self.part(ATTENTION) * (self.seq_len - 1) / 2 / self.seq_len
        )

    @property
    def fused(self) -> float | None:
        """As ``causal``, for a kernel that keeps no scores and makes them again in the backward pass.

        Backward is then 5 products for forward's 2 (Dao et al. 2022, arXiv 2205.14135, algorithm 4), and not 4.
        """
        if self.seq_len is None:
            return None
        again = self.counts.get((ATTENTION, INPUT), 0) / 4
        return self.causal + again * (self.seq_len + 1) / 2 / self.seq_len

    def __str__(self) -> str:
        passes = [name for name in PASSES if self.in_pass(name)]
        titles = [*passes, "all"] if self.closed is None else [*passes, "all", "closed form"]
        lines = [self.setting, "  GFLOP       " + "".join(f"{title:>18}" for title in titles)]
        for part in (part for part in PARTS if self.part(part)):
            numbers = [self.counts.get((part, name), 0) for name in passes] + [self.part(part)]
            lines.append(_row(part, numbers + ([] if self.closed is None else [self.closed.get(part, 0)])))
        numbers = [self.in_pass(name) for name in passes] + [self.total]
        closed = [] if self.closed is None else [sum(self.closed.values())]
        lines.append(_row("all", numbers + closed))
        lines.append(f"  {self.total / self.tokens / 1e6:,.1f} MFLOP for each of {self.tokens:,}")
        if self.seq_len is not None and self.part(ATTENTION):
            lines.append(f"  with a causal kernel that skips the masked half: {self.causal / GIGA:,.3f} GFLOP; with a")
            lines.append(f"  fused one, which makes the scores again in the backward pass: {self.fused / GIGA:,.3f}")
        return "\n".join(lines)


def _row(name: str, numbers: Sequence[float]) -> str:
    return f"  {name:<12}" + "".join(f"{number / GIGA:>18,.3f}" for number in numbers)


@dataclass(frozen=True)
class _Made:
    """What a tensor was made from: kinds of weights, the batch, and products whose numbers it still holds."""

    weights: frozenset[str] = frozenset()
    data: bool = False
    products: frozenset[int] = frozenset()


class FlopCounter(StepTracer):
    """Counts the products of a step, and says of each whose it is.

    It follows through all operations what every tensor was made from. A product with something made from weights
    alone (a weight, one out of 4-bit blocks, W + s B A) belongs to their layer. One of two tensors that hold data is
    attention's; but in the backward pass it is a weight gradient if a parameter's ``grad`` is made from it.
    """

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        self._owners = weight_owners(step.model)

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and count it, anew."""
        self.products: list[tuple[str, str, int]] = []  # part, pass, FLOPs
        self._of_data: set[int] = set()  # which of them multiply data with data in the backward pass
        tensors = [*self.step.model.parameters(), *self.step.model.buffers()]
        self._made = {storage_of(tensor): _Made(frozenset({self._owners[id(tensor)]})) for tensor in tensors}
        self._made |= {storage_of(tensor): _Made(data=True) for batch in batches for tensor in batch}
        super().run(batches, weights)
        for parameter in self.step.model.parameters():
            if parameter.grad is not None and parameter.ndim > 1:
                for index in self._made[storage_of(parameter.grad)].products & self._of_data:
                    self.products[index] = (self._owners[id(parameter)], WEIGHT, self.products[index][2])

    def counts(self) -> Counter[tuple[str, str]]:
        """FLOPs by part and pass."""
        found: Counter[tuple[str, str]] = Counter()
        for part, pass_, count in self.products:
            found[part, pass_] += count
        return found

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Count the operation if it multiplies, and note what its results are made from."""
        if function.namespace != "aten" or self.phase not in ("forward", "backward"):
            return  # there are no products there, and a gradient must stay known for what it was made from
        packet = getattr(function, "_overloadpacket", None)
        product = None
        if packet is _ATEN.convolution_backward:
            self._count_convolution(args, out)
        elif packet in _FORMULAS:
            product = self._count(packet, args, _FORMULAS[packet](*args, **kwargs, out_val=out))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._made[storage_of(tensor)] = self._combined(inputs, tensor, product)

    def _count(self, packet: Any, args: tuple, count: int) -> int:
        """Enter a product, and return its number."""
        start = 1 if packet in _SUMS else 0  # what the product is added to comes first
        sources = [self._source(tensor) for tensor in args[start : start + 2]]
        part = ATTENTION if all(made.data for made in sources) else _part(made for made in sources if not made.data)
        self.products.append((part, self._pass(INPUT), count))
        if part == ATTENTION and self._pass(INPUT) == INPUT:
            self._of_data.add(len(self.products) - 1)
        return len(self.products) - 1

    def _count_convolution(self, args: tuple, out: Any) -> None:
        """One operation with two products: the gradients of the input and of the weight."""
        part = _part([self._source(args[2])])
        for index, name in ((0, INPUT), (1, WEIGHT)):
            mask = [index == place and wanted for place, wanted in enumerate(args[10])]
            count = flop_registry[_ATEN.convolution_backward](*args[:10], mask, out_val=out)
            self.products.append((part, self._pass(name), count))

    def _pass(self, backward: str) -> str:
        return FORWARD if self.phase == "forward" else AGAIN if self.recomputing else backward

    def _source(self, tensor: Tensor) -> _Made:
        return self._made.get(storage_of(tensor), _Made())

    def _combined(self, inputs: Sequence[Tensor], out: Tensor, product: int | None) -> _Made:
        sources = [self._source(tensor) for tensor in inputs]
        if product is not None:
            products = frozenset({product})
        else:  # a sum over many numbers is no longer the product that they came from
            kept = [
                made.products
                for tensor, made in zip(inputs, sources, strict=True)
                if out.numel() >= tensor.numel() or storage_of(out) == storage_of(tensor)
            ]
            products = frozenset().union(*kept)
        weights = frozenset().union(*(made.weights for made in sources))
        return _Made(weights, any(made.data for made in sources), products)


def _part(sources: Iterable[_Made]) -> str:
    """Whose a product is: the adapters' if their weights alone are in it."""
    weights = frozenset().union(*(made.weights for made in sources))
    return next((part for part in (HEAD, LAYERS, ADAPTERS) if part in weights), OTHER)


def weight_owners(model: nn.Module) -> dict[int, str]:
    """id of each parameter and buffer -> "head" (the output layer's), "adapters" or "layers" (all others).

    The output layer is what ``get_output_embeddings()`` returns; a weight that it shares with the embedding is its.
    """
    owners = {id(tensor): LAYERS for tensor in [*model.parameters(), *model.buffers()]}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        owners |= {id(tensor): HEAD for tensor in [*head.parameters(), *head.buffers()]}
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) or "lora_" in name:  # peft keeps each factor in a module of its own
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            owners |= {id(tensor): ADAPTERS for tensor in own}
    return owners


def closed_form(model: nn.Module, tokens: int, seq_len: int | None = None) -> dict[str, int]:
    """FLOPs of a plain step from sizes alone, by part: what one writes down on paper.

    A token meets M weights in the layers, E in the head, P = sum of r (in + out) in the adapters, and T = 2 s h L
    products in attention. The forward pass takes each once; the backward pass takes M, E and P once for the gradients
    of inputs and T twice, and once more those weights that are trained. At two FLOPs each,

        full = 3 M + 3 E + 3 T,    LoRA = 2 M + 2 E + 3 T + 3 P

    No gradient goes below the first block with something to train: adapters in the top n of L blocks need
    (1 + n / L) M and (1 + 2 n / L) T.

    Reference: the rule of 6 FLOPs a weight and token is Kaplan et al. 2020, arXiv 2001.08361, section 2.1.

    Args:
        model: made ready to train. The sizes of attention are read from its ``config``, as our Llama and the models of
            transformers have it; without one T is 0.
        tokens: the batch's size.
        seq_len: s; None for a model without attention.

    Raises:
        ValueError: nothing in the model is trained.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("No parameter of the model requires a gradient, so it is not made ready to train.")
    owners, names = weight_owners(model), list(transformer_blocks(model))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    matrices, trained, depth = [], [], -1  # the depth is a block's number, -1 below the blocks, their count above
    for name, module in model.named_modules():
        inside = next((i for i, block in enumerate(names) if f"{name}.".startswith(f"{block}.")), None)
        depth = inside if inside is not None else depth if depth < 0 else len(names)
        trained += [depth for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        for weight, size in _matrices(module, head):
            matrices.append((depth, owners[id(weight)], size, weight.requires_grad))
    lowest, found = min(trained), Counter()
    for depth, part, size, own in matrices:
        upward = depth >= lowest or part == ADAPTERS
        found[part] += 2 * tokens * size * (1 + upward + own)
    if seq_len is not None and (sizes := _attention(model)) is not None:
        width, layers = sizes
        passed = sum(1 + 2 * (block >= lowest) for block in range(layers))
        found[ATTENTION] = 2 * tokens * 2 * seq_len * width * passed
    return dict(found)


def _attention(model: nn.Module) -> tuple[int, int] | None:
    """Width of all heads together, and number of layers, if the model has a config that says so."""
    config = getattr(model, "config", None)
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if heads is None or layers is None:
        return None
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads), layers


def _matrices(module: nn.Module, head: nn.Module | None) -> list[tuple[Tensor, int]]:
    """The tensors that hold a module's own matrices, and how many numbers each multiplies by."""
    if isinstance(module, LoRALayer):
        return [(factor, factor.numel()) for factor in (module.lora_A, module.lora_B)]
    if isinstance(module, BlockLinear):
        return [(module.packed, math.prod(module.shape))]
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or module is head:
        return [(module.weight, module.weight.numel())]
    return []


def flops(
    model: nn.Module | Factory,
    method: Method | Setup,
    batch_size: int | None = None,
    seq_len: int | None = None,
    *,
    batch: Batch | None = None,
    **options: Any,
) -> Flops:
    """Count the FLOPs of a training step by rehearsing it on fake tensors; nothing is allocated or changed.

    Counted as torch's ``FlopCounterMode`` counts: two for each multiplication and its addition in matrix products and
    convolutions, nothing for the rest. Attention is computed by its plain formula, for a CPU's fused kernel would
    count as nothing, and without regard to what a mask hides.

    Args:
        model: a freshly loaded model; or a function that makes one from its shape, of any size.
        method: how it is trained, or a whole :class:`lora_lab.costs.setup.Setup`.
        batch_size, seq_len: the batch, for models that read token ids.
        batch: inputs and targets, for others; only their shapes and dtypes matter.
        **options: as in :class:`lora_lab.costs.setup.Setup`.

    Raises:
        ValueError: the batch is not described, a value is out of range, the step cannot be made ready, or ``lean``
            has several threads.
    """
    setup = as_setup(method, options)
    setup.check_watchable()
    cpu = torch.device("cpu")
    with fake_copy(model, cpu, setup.dtype) as twin, own_randomness(cpu, 0), sdpa_kernel(SDPBackend.MATH):
        given = batch_for(twin, batch_size, seq_len, batch)
        parts, weights = setup.batches(given)
        counter = FlopCounter(setup.step(twin))
        counter.run(parts, weights)
        counts, (tokens, length) = counter.counts(), size_of(given)
        known = not counts[ATTENTION, FORWARD] or (length is not None and _attention(twin) is not None)
        plain = not any(name == AGAIN for _, name in counts) and _of_plain_blocks(twin)
        closed = closed_form(twin, tokens, length) if known and plain else None
        return Flops(counts, tokens, setting_of(setup, twin, given), length, closed)


def break_even_rank(
    model: nn.Module | Factory,
    batch_size: int | None = None,
    seq_len: int | None = None,
    *,
    batch: Batch | None = None,
    targets: str | Sequence[str] = "all-linear",
    **options: Any,
) -> int:
    """The highest rank at which a step of LoRA has no more FLOPs than one of full fine-tuning, found by counting.

    On paper it is where 3 P = M + E: the adapters' products are as many as the weight gradients that they replace.
    The count grows in a line with the rank, so two ranks tell where to look; then both sides of the place are counted.

    Args:
        targets: which layers LoRA adapts, as in :class:`lora_lab.LoRAConfig`.
        model, batch_size, seq_len, batch, **options: as for :func:`flops`, for both methods.

    Returns:
        The rank; 0 if LoRA has more FLOPs even at rank 1.
    """

    def count(method: Method) -> int:
        return flops(model, method, batch_size, seq_len, batch=batch, **options).total

    full, one, two = count(FullFineTuning()), *(count(LoRA(rank, targets=targets)) for rank in (1, 2))
    rank = max(0, 1 + (full - one) // (two - one))
    while rank and count(LoRA(rank, targets=targets)) > full:
        rank -= 1
    while count(LoRA(rank + 1, targets=targets)) <= full:
        rank += 1
    return rank


def size_of(batch: Batch) -> tuple[int, int | None]:
    """Tokens of a batch and their number in a sequence; or examples, and None."""
    inputs = batch[0]
    whole = inputs.ndim == 2 and not inputs.is_floating_point()
    return (inputs.numel(), inputs.shape[1]) if whole else (len(inputs), None)


def _of_plain_blocks(model: nn.Module) -> bool:
    """Whether it is a stack of blocks without convolutions, and its adapters, if any, are two plain factors each."""
    convolutions = any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    plain = all(type(layer) in (LoRALinear, RsLoRALinear, LoRAFALinear) for layer in lora_layers(model).values())
    return bool(transformer_blocks(model)) and plain and not convolutions
