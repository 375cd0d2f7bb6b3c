"""The FLOPs of a training step, counted on fake tensors: by part of the model, and by pass.

    print(flops(model, LoRA(rank=8), batch_size=4, seq_len=128))

LoRA skips the weight gradients of the frozen layers, so that it needs fewer FLOPs than full fine-tuning: but never
less than two thirds, unless only the last blocks have adapters, and more above some rank. How long these FLOPs take is
another question (``lora_lab.costs.speed``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from lora_lab.costs.fake import Source, build_on_meta, nested_tensors, storage_of, tensors_of
from lora_lab.costs.setup import Rehearsal, Setup, StepTracer, adapter_modules, as_setup, prepare_shapes, setting_of
from lora_lab.inject import output_head
from lora_lab.lora import LoRALayer
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models.llama import Llama
from lora_lab.system.schema import Size, check
from lora_lab.train import Batch, TrainingStep

LAYERS, HEAD, ATTENTION, ADAPTERS, OTHER = "layers", "head", "attention", "adapters", "other"
PARTS = (LAYERS, HEAD, ATTENTION, ADAPTERS, OTHER)
FORWARD, INPUT, WEIGHT, AGAIN = "forward", "input gradients", "weight gradients", "recomputed"
PASSES = (FORWARD, INPUT, WEIGHT, AGAIN)
GIGA = 10**9
_ATEN = torch.ops.aten
_DATA = "data"  # what is computed from the batch
_NOTHING = frozenset()
_SUMS = (_ATEN.addmm, _ATEN.addmm_, _ATEN.baddbmm, _ATEN.baddbmm_)


def _grouped_flops(tokens: Tensor, experts: Tensor, *_: Any, **__: Any) -> int:
    """Of a product in which each row of tokens meets one expert's matrix: (n, in) and (experts, in, out)."""
    return 2 * tokens.shape[-2] * tokens.shape[-1] * experts.shape[-1]


# torch's own formulas, which lack the in-place variants and the product of a mixture of experts.
_FORMULAS = {
    **flop_registry,
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
    _ATEN._grouped_mm: _grouped_flops,
}


@dataclass(frozen=True)
class Flops:
    """The FLOPs of the matrix multiplications and convolutions of one step: two for each multiply-add.

    Args:
        counts: FLOPs by part (layers, head, attention, adapters, other) and pass (forward, input gradients, weight
            gradients, recomputed). Attention counts in full, as if nothing were masked: 2 s h L multiply-adds a token
            in the forward pass and twice that in the backward pass.
        tokens: the batch's size, in tokens or examples.
        setting: the model, the setup and the batch.
    """

    counts: Mapping[tuple[str, str], int]
    tokens: int
    setting: str

    @property
    def total(self) -> int:
        """The FLOPs of the whole step."""
        return sum(self.counts.values())

    def part(self, name: str) -> int:
        """Return all passes of one part: "layers", "head", "attention", "adapters" or "other"."""
        return sum(count for (part, _), count in self.counts.items() if part == name)

    def in_pass(self, name: str) -> int:
        """Return all parts of one pass: "forward", "input gradients", "weight gradients" or "recomputed"."""
        return sum(count for (_, pass_), count in self.counts.items() if pass_ == name)

    def to_dict(self) -> dict[str, Any]:
        """Return all counts and totals, in values of JSON."""
        return {
            "setting": self.setting,
            "tokens": self.tokens,
            "flops": self.total,
            "flops_per_token": self.total / self.tokens,
            "flops_by_part_and_pass": {
                part: {name: self.counts[part, name] for name in PASSES if (part, name) in self.counts}
                for part in PARTS
                if self.part(part)
            },
        }

    def __str__(self) -> str:
        import pandas

        table = pandas.Series(self.counts).unstack() / GIGA  # parts by passes
        table = table.reindex(index=PARTS, columns=PASSES).dropna(how="all").dropna(how="all", axis=1).fillna(0.0)
        table.loc["all"] = table.sum()
        table["all"] = table.sum(axis=1)
        numbers = table.to_string(float_format="{:,.3f}".format)
        each = f"{self.total / self.tokens / 1e6:,.1f} MFLOP for each of {self.tokens:,} tokens or examples"
        return f"{self.setting}, GFLOP:\n{numbers}\n{each}"


class FlopCounter(StepTracer):
    """Counts the products (matrix multiplications and convolutions) of a step, and assigns each to a part and a pass.

    It tracks through all operations what every tensor was computed from. A product with a factor computed from weights
    alone (a weight, one dequantised from 4 bits, W + s B A) belongs to their layer. A product of two factors computed
    from data belongs to attention; in the backward pass it is a weight gradient, unless the product whose gradients the
    running node of autograd's graph computes is attention's.
    """

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        self._owners = weight_owners(step.model)

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and count it; the counts of an earlier step are dropped."""
        self.products: list[tuple[str, str, int]] = []  # part, pass, FLOPs
        self._parts: defaultdict[int | None, set[str]] = defaultdict(set)  # of the products of each node
        tensors = tensors_of(self.step.model)
        self._sources = {storage_of(tensor): frozenset({self._owners[id(tensor)]}) for tensor in tensors}
        self._sources |= {storage_of(tensor): frozenset({_DATA}) for batch in batches for tensor in batch}
        super().run(batches, weights)

    def counts(self) -> Counter[tuple[str, str]]:
        """Return FLOPs by part and pass."""
        counts: Counter[tuple[str, str]] = Counter()
        for part, pass_, count in self.products:
            counts[part, pass_] += count
        return counts

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Count the operation if it is a product, and record what its results are computed from."""
        if function.namespace != "aten" or self.phase not in ("forward", "backward"):
            return  # there are no products elsewhere
        packet = getattr(function, "_overloadpacket", None)
        if packet is _ATEN.convolution_backward:
            self._count_convolution(args, out)
        elif packet in _FORMULAS:
            self._count(packet, args, _FORMULAS[packet](*args, **kwargs, out_val=out))
        sources = _NOTHING.union(*map(self._sources_of, nested_tensors((args, kwargs))))
        for tensor in nested_tensors(out):
            self._sources[storage_of(tensor)] = sources

    def _count(self, packet: Any, args: tuple, count: int) -> None:
        """Add a product: with weights, to their part; of data alone, as a gradient of weights or else to attention."""
        start = 1 if packet in _SUMS else 0  # the first argument is what the product is added to
        factors = [self._sources_of(tensor) for tensor in args[start : start + 2]]
        weights = [sources for sources in factors if _DATA not in sources]
        trained = self._trained_part()
        if weights:
            part, pass_ = _part(weights), self._pass(INPUT)
        elif trained is not None:
            part, pass_ = trained, WEIGHT
        else:
            part, pass_ = ATTENTION, self._pass(INPUT)
        self.products.append((part, pass_, count))
        if self.phase == "forward":
            self._parts[self.newest_node].add(part)

    def _trained_part(self) -> str | None:
        """Return the part whose weights get gradients from the running node of the backward pass, or None."""
        parts = _NOTHING if self.recomputing else self._parts[self.running_node]
        # A lean layer's node has products with frozen weights and with adapters.
        return next((part for part in (ADAPTERS, HEAD, LAYERS, OTHER) if part in parts), None)

    def _count_convolution(self, args: tuple, out: Any) -> None:
        """One operation with two products: the gradients of the input and of the weight."""
        part = _part([self._sources_of(args[2])])
        for index, name in ((0, INPUT), (1, WEIGHT)):
            mask = [i == index and needed for i, needed in enumerate(args[10])]
            count = flop_registry[_ATEN.convolution_backward](*args[:10], mask, out_val=out)
            self.products.append((part, self._pass(name), count))

    def _pass(self, backward: str) -> str:
        return FORWARD if self.phase == "forward" else AGAIN if self.recomputing else backward

    def _sources_of(self, tensor: Tensor) -> frozenset[str]:
        """Return what a tensor was computed from: parts of the model, and the batch."""
        return self._sources.get(storage_of(tensor), _NOTHING)


def _part(factors: Iterable[frozenset[str]]) -> str:
    """Return the part that a product belongs to; to the adapters only if no other weights are in it."""
    weights = _NOTHING.union(*factors)
    return next((part for part in (HEAD, LAYERS, ADAPTERS) if part in weights), OTHER)


def weight_owners(model: nn.Module) -> dict[int, str]:
    """Return the owner of each parameter and buffer, by its id: "layers", or the output layer's "head", or "adapters".

    A weight that the output layer shares with the embedding belongs to the head.
    """
    owners = {id(tensor): LAYERS for tensor in tensors_of(model)}
    head = output_head(model)
    if head is not None:
        owners |= {id(tensor): HEAD for tensor in tensors_of(head)}
    for module in adapter_modules(model):
        owners |= {id(tensor): ADAPTERS for tensor in tensors_of(module, recurse=False)}
    return owners


def closed_form(model: Llama, tokens: int, seq_len: int) -> dict[str, int]:
    """Return FLOPs of a plain step from sizes alone, by part: the calculation on paper.

    Each token is multiplied by M weights in the layers, E in the head, P = sum of r (in + out) in the adapters, and
    takes T = 2 s h L multiply-adds in attention. The forward pass takes each of them once. The backward pass takes M,
    E and P once and T twice for the gradients of inputs, and all trained weights once more for their own gradients.
    At two FLOPs each,

        full = 3 M + 3 E + 3 T,    LoRA = 2 M + 2 E + 3 T + 3 P

    The backward pass ends at the first block with trained weights: adapters in the top n of L blocks need
    (1 + n / L) M and (1 + 2 n / L) T. :func:`flops` also sees that the first trained block passes nothing on.

    Reference: the rule of 6 FLOPs a weight and token is Kaplan et al. 2020, arXiv 2001.08361, section 2.1.

    Args:
        model: ready to train.
        tokens: the batch's size.
        seq_len: s.

    Raises:
        ValueError: no block has trained weights.
    """
    blocks = list(enumerate(model.model.layers))
    lowest = min(depth for depth, block in blocks if any(each.requires_grad for each in block.parameters()))
    # And whether the backward pass reaches them.
    matrices: list[tuple[str, Tensor, bool]] = [(HEAD, model.lm_head.get_parameter("weight"), True)]
    for depth, block in blocks:
        for module in block.modules():
            if isinstance(module, LoRALayer):
                matrices += [(ADAPTERS, factor, True) for factor in (module.lora_A, module.lora_B)]
            elif isinstance(module, nn.Linear):
                matrices.append((LAYERS, module.weight, depth >= lowest))
    counts = Counter[str]()
    for part, matrix, reached in matrices:
        counts[part] += 2 * tokens * matrix.numel() * (1 + reached + matrix.requires_grad)
    width, passes = model.config.num_attention_heads * model.config.head_dim, len(blocks) + 2 * (len(blocks) - lowest)
    counts[ATTENTION] = 2 * tokens * 2 * seq_len * width * passes
    return dict(counts)


def flops(
    model: Source,
    method: Method | Setup,
    batch_size: int | None = None,
    seq_len: int | None = None,
    *,
    batch: Batch | None = None,
    **options: Any,
) -> Flops:
    """Count the FLOPs of a training step by rehearsing it on fake tensors; nothing is allocated or changed.

    Of a stack of identical blocks a few are rehearsed, and each of the others adds as much.

    They are counted as torch's ``FlopCounterMode`` counts: two for each multiply-add in matrix multiplications and
    convolutions, none for other operations. Attention is computed by its plain formula, because a fused kernel on the
    CPU would count as nothing, and a mask is ignored.

    Args:
        model: a freshly loaded model; or a function that builds one, of any size; or what names one, as for
            :func:`lora_lab.memory.predict`.
        method: how it is trained, or a complete :class:`lora_lab.costs.setup.Setup`.
        batch_size, seq_len: the batch; ``batch_size`` alone for a model of transformers that reads images.
        batch: inputs and targets, for other models; only their shapes and dtypes matter.
        **options: as in :class:`lora_lab.costs.setup.Setup`.

    Raises:
        ValueError: the batch is not described, a value is out of range, the model cannot be made ready, or ``lean``
            has several threads.
    """
    setup = as_setup(method, options)

    def count(step: TrainingStep, fake_batch: Batch) -> Flops:
        counter = FlopCounter(step)
        with sdpa_kernel(SDPBackend.MATH):
            counter.run(*setup.batches(fake_batch))
        return Flops(counter.counts(), size_of(fake_batch), setting_of(setup, step.model, fake_batch))

    rehearsal = Rehearsal(model, setup, torch.device("cpu"))
    return rehearsal.follow(count, _extend, batch_size, seq_len, batch)


def _extend(shorter: Flops, longer: Flops, blocks: int) -> Flops:
    """Return the FLOPs of a model with ``blocks`` more blocks than in ``shorter``; ``longer`` has one more."""
    few, more = Counter(shorter.counts), Counter(longer.counts)
    return replace(longer, counts={key: few[key] + blocks * (more[key] - few[key]) for key in few | more})


def communication(model: Source, method: Method | Setup, processes: int = 2, **options: Any) -> float:
    """Return the bytes that each process of a data-parallel run sends in a step of ``fit``; nothing is allocated.

    It sends, and receives, 2 (n - 1) / n of what is summed over n processes, without headers: the gradients of all
    trained parameters, the loss, and for each parameter whether it has a gradient. That is the least, and a ring
    reaches it (Patarasu and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations,
    section 3): each process passes on 1/n of the data n - 1 times to be added, and n - 1 times to be copied.

    Args:
        model, method, **options: as for :func:`flops`.
        processes: how many train together.

    Raises:
        ValueError: ``processes`` is below 1, an option is out of range, or the model cannot be made ready.
    """
    check(processes, Size, "processes")
    setup = as_setup(method, options)
    trained = [each for each in prepare_shapes(build_on_meta(model), setup).parameters() if each.requires_grad]
    reduced = sum(parameter.nbytes for parameter in trained) + torch.float64.itemsize * (1 + len(trained))
    return 2 * (processes - 1) / processes * reduced


def break_even_rank(model: Source, batch_size: int, seq_len: int) -> int:
    """Return the highest rank at which a step of LoRA has no more FLOPs than one of full fine-tuning; 0 if none has.

    On paper it is where 3 P = M + E: the adapters take as many FLOPs as the weight gradients that they replace. The
    count is linear in the rank, so that those of two ranks give it.
    """
    methods = FullFineTuning(), LoRA(1), LoRA(2)
    full, one, two = (flops(model, method, batch_size, seq_len).total for method in methods)
    return max(0, 1 + (full - one) // (two - one))


def size_of(batch: Batch) -> int:
    """Return the number of tokens in a batch, or of examples that are no sequences of tokens."""
    inputs = batch[0]
    return inputs.numel() if inputs.ndim == 2 and not inputs.is_floating_point() else len(inputs)
