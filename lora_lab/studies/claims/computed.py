"""Verdicts without a record: by counting parameters, bytes and FLOPs, and by computing with small layers.

What is counted comes out the same on every machine: on a model without weights (torch's "meta" device), or by the
arithmetic that the source describes. What is computed is exact, takes two seconds at most on one core, and draws its
random numbers from its own seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lora_lab.costs import flops
from lora_lab.costs.bill import GIB
from lora_lab.inject import LoRAConfig, inject, lora_layers
from lora_lab.lora import LoRALinear
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models import shapes
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.models.quantize import FORMATS, nf4
from lora_lab.studies.claims.deciding import Answer, Cases, Claim, decides, near

QV, ATTENTION = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = (*ATTENTION, *MLP)
# Touvron et al. 2023, arXiv 2307.09288, and the model's config.json; Llama 1's 7B has the same matrices.
# (vocabulary, width, the MLP's width, layers, heads, heads of keys and values, a head's width)
LLAMA_2_7B = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128)
# Touvron et al. 2023, arXiv 2302.13971, table 2; the feed-forward's width is in its config.json.
LLAMA_65B = LlamaConfig(32000, 8192, 22016, 80, 64, 64, 128)
# GPT-3's parameters: Hu et al. 2021, table 4; its width and layers: Brown et al. 2020, arXiv 2005.14165, table 2.1.
GPT3_PARAMETERS, GPT3_WIDTH, GPT3_LAYERS = 175_255_800_000, 12288, 96
# Of rank 4 on its query and value matrices, which are square.
GPT3_ADAPTER = 2 * GPT3_LAYERS * 4 * 2 * GPT3_WIDTH
HALF, FLOAT32 = 2, 4  # bytes of a weight in 16 bits and in 32
ADAM = 16  # bytes of a trained weight in float32, with its gradient and Adam's two averages
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # with double quantisation: Dettmers et al. 2023, section 3


def rank_of_equal_memory(config: LlamaConfig, gradients: bool) -> int:
    """The lowest rank at which LoRA's weights, Adam moments and gradients (float32) exceed full fine-tuning's.

    Where they are held, at the end of the backward pass, full fine-tuning also holds two copies of the gradient of a
    head that is the embedding, while they are added.
    """
    trained_bytes, copies = (ADAM, 2 * config.tie_word_embeddings) if gradients else (ADAM - FLOAT32, 0)
    saved = (trained_bytes - FLOAT32) * parameters(config) + copies * FLOAT32 * config.vocab_size * config.hidden_size
    return saved // (trained_bytes * adapter_size(config, ALL)) + 1


@cache
def adapter_size(config: LlamaConfig, targets: Sequence[str]) -> int:
    """Trained parameters for each rank of LoRA, counted on a model of that shape."""
    with torch.device("meta"):
        model = Llama(config)
        inject(model, LoRAConfig(rank=1, targets=list(targets)))
    return sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in lora_layers(model).values())


@cache
def parameters(config: LlamaConfig, named: str = "") -> int:
    """All parameters of a model of that shape, or those with a text in their names; a tied head is counted once."""
    with torch.device("meta"):
        every = Llama(config).named_parameters()
    return sum(parameter.numel() for name, parameter in every if named in name)


@cache
def step_flops(name: str, method: Method, tokens: int = 512) -> Mapping[str, int]:
    """FLOPs of a training step by part of a known model: one sequence of so many tokens."""
    with torch.device("meta"):
        model = Llama(shapes.config(name))
        method.prepare(model, 0)
    return flops.closed_form(model, tokens, tokens)


def flop_ratio(name: str, rank: int, tokens: int = 512) -> float:
    """FLOPs of a step of LoRA on all linear layers, in units of full fine-tuning's."""
    lora, full = (step_flops(name, method, tokens) for method in (LoRA(rank), FullFineTuning()))
    return sum(lora.values()) / sum(full.values())


# Parameters


@decides("attention-256-mlp-128", on="whether the output layer is adapted too, which the text does not say")
def parameters_of_targets(claim: Claim) -> Cases:
    """Llama 3.1 8B: the paper's four counts, without and with an adapter on the output layer."""
    config = shapes.config("llama-3-8b")
    head = config.hidden_size + config.vocab_size
    setups = ((ATTENTION, 256), (MLP, 128), (MLP, 256), (ALL, 256))
    for words, extra in (("blocks alone", 0), ("with the output layer", head)):
        sizes = [rank * (adapter_size(config, targets) + extra) / 1e9 for targets, rank in setups]
        same = all(near(size, printed, 0.03) for size, printed in zip(sizes, claim.values, strict=True))
        yield same, f"{words} {', '.join(f'{size:.3f}' for size in sizes)} billion"


# Bytes


@decides("checkpoint-10000-times-smaller")
def checkpoint_size(claim: Claim) -> Answer:
    """The ratio of two files in one precision is that of their parameters."""
    ratio = GPT3_PARAMETERS / GPT3_ADAPTER
    text = f"{ratio:,.0f} times: {GPT3_ADAPTER:,} parameters of {GPT3_PARAMETERS:,}; it holds for GPT-3's width only"
    return near(ratio, claim.stated), text


@decides("quiz-8b-in-6-gb")
def quiz_8b(claim: Claim) -> Answer:
    """The frozen weights alone, before adapters, gradients and activations."""
    base = HALF * parameters(shapes.config("llama-3-8b")) / 1e9
    text = f"the frozen weights alone take {base:.1f} GB in 16 bits; 6 GB needs 4 bits, which is QLoRA"
    return base <= claim.stated, text


@decides("qlora-65b-in-48-gb", on="the adapters, at 16 bytes a number")
def qlora_65b(claim: Claim) -> Cases:
    """LLaMA 65B in NF4, and 16 bytes for each number of an adapter: small as in their example, and of rank 64.

    A GPU of "48 GB" has 48 GiB.
    Activations are one sequence of 512 tokens: the inputs of all blocks in 16 bits, as with checkpointing; the logits
    in float32 three times (they, their logarithms and their gradients); of the block that is computed again ten tensors
    of the model's width and four of the MLP's; and its largest matrix in 16 bits.
    """
    stated_qlora, stated_full = claim.values
    example, rank_64 = round(0.002 * parameters(LLAMA_65B)), 64 * adapter_size(LLAMA_65B, ALL)
    width, inner = LLAMA_65B.hidden_size, LLAMA_65B.intermediate_size
    of_blocks = HALF * (LLAMA_65B.num_hidden_layers * width + 10 * width + 4 * inner)
    activations = 512 * (of_blocks + 3 * FLOAT32 * LLAMA_65B.vocab_size) + HALF * width * inner
    for count, words in ((example, "0.2 % of the weights, as in their example"), (rank_64, "rank 64 on all layers")):
        total = (_nf4_bytes(LLAMA_65B) + ADAM * count + activations) / GIB
        yield total < stated_qlora, f"adapters of {words}: {total:.1f} GiB with 512 tokens"
    full = ADAM * parameters(LLAMA_65B) / GIB
    yield full > stated_full, f"full fine-tuning: {full:,.0f} GiB before activations"


@decides("qlora-4-times-less-than-lora")
def qlora_against_lora(claim: Claim) -> Answer:
    """Weights and adapters alone: activations are the same in both and only make the ratio less.

    "Up to" a number is near the largest ratio.
    """
    ratios = []
    for name, rank in product(("llama-3.2-1b", "llama-3-8b", "llama-3-70b", "llama-65b"), (1, 16)):
        config = LLAMA_65B if name == "llama-65b" else shapes.config(name)
        adapters = ADAM * rank * adapter_size(config, ALL)
        ratio = (HALF * parameters(config) + adapters) / (_nf4_bytes(config) + adapters)
        ratios.append((ratio, f"{name} rank {rank} {ratio:.2f} times"))
    largest, _ = max(ratios)
    return near(largest, claim.stated), f"largest first: {'; '.join(words for _, words in sorted(ratios)[::-1])}"


def _nf4_bytes(config: LlamaConfig) -> float:
    """Bytes of the weights under QLoRA: all linear layers but the output layer in NF4, all else in 16 bits."""
    linear = parameters(config, "_proj")
    return HALF * (parameters(config) - linear) + NF4_BITS / 8 * linear


# FLOPs


@decides("two-thirds-of-the-flops", on=("the rank", "the model's shape", "the length of the text"))
def two_thirds() -> Cases:
    """By rank and tokens in a sequence, on a narrow and a wide model."""
    for name, tokens, rank in product(("smollm2-135m", "llama-3-8b"), (512, 2048), (1, 16, 64, 256)):
        ratio = flop_ratio(name, rank, tokens)
        yield 2 / 3 <= ratio < 0.75, f"{name} rank {rank}, {tokens:,} tokens {ratio:.2f}", rank, name, tokens


_CHECKPOINTING = "method and width: LoRA has no weight gradients that the second pass would be small beside"


@decides("checkpointing-costs-a-third", on=_CHECKPOINTING)
def checkpointing(claim: Claim) -> Cases:
    """The second forward pass of the blocks, as a share of the step without it."""
    for name in ("smollm2-135m", "llama-3-8b"):
        for label, method, passes in (("full", FullFineTuning(), 3), ("LoRA r=8", LoRA(8), 2)):
            counts = step_flops(name, method)
            others = counts.get(flops.ATTENTION, 0) + counts.get(flops.ADAPTERS, 0)
            again = counts[flops.LAYERS] / passes + others / 3
            more = 100 * again / sum(counts.values())
            yield near(more, claim.stated, 0.2), f"{name}, {label} +{more:.0f} %"


# Small layers


def random_matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, of a generator with this seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adapted_linear(width: int, r: int, alpha: float, seed: int = 0) -> LoRALinear:
    """A layer of ``width`` inputs and outputs, with a fresh adapter."""
    base = nn.Linear(width, width, bias=False, dtype=torch.float64)
    base.weight.data = random_matrix(width, width, seed=seed) / math.sqrt(width)
    return LoRALinear(base, r, alpha, generator=torch.Generator().manual_seed(seed))


# At the start, and merged


@decides("b-zero-cannot-learn")
def b_zero() -> Answer:
    """Gradients of A and B at the first step and after it, and the loss after ten steps."""
    layer = adapted_linear(16, 4, 8.0)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.5)
    first, second, *_, last = _descend(layer, optimizer, steps=10)
    text = f"first step: gradient of A {first.grad_A:g}, of B {first.grad_B:.2g}; second step: A {second.grad_A:.2g}"
    learned = first.grad_A == 0 and first.grad_B > 0 and last.loss < first.loss
    return not learned, f"{text}; the loss falls from {first.loss:.3f} to {last.loss:.3f} in ten steps"


class _Step(NamedTuple):
    loss: float
    grad_A: float  # the magnitude of its largest entry
    grad_B: float


def _descend(layer: LoRALinear, optimizer: Optimizer, steps: int) -> Iterator[_Step]:
    """Yield each step on 64 random examples: the loss before it, and how large the gradients of A and B are."""
    x, y = random_matrix(64, 16, seed=1), random_matrix(64, 16, seed=2)
    for _ in range(steps):
        loss = F.mse_loss(layer(x), y)
        a, b = torch.autograd.grad(loss, [layer.lora_A, layer.lora_B])
        layer.lora_A.grad, layer.lora_B.grad = a, b
        optimizer.step()
        yield _Step(loss.item(), float(a.abs().max()), float(b.abs().max()))


# What the numbers alpha, rank and rate do


def adam_losses(factor: float, lr_a: float, lr_b: float, alpha: float) -> np.ndarray:
    """Return 20 losses of a small layer under Adam whose epsilon is too small to count.

    A starts ``factor`` times as large as usual. Its first gradient is exactly zero, so epsilon cannot be.
    """
    layer = adapted_linear(16, 4, alpha)
    layer.lora_A.data *= factor
    groups = [{"params": [layer.lora_A], "lr": lr_a}, {"params": [layer.lora_B], "lr": lr_b}]
    return np.array([step.loss for step in _descend(layer, torch.optim.Adam(groups, eps=1e-30), steps=20)])


@decides("two-real-knobs")
def two_knobs() -> Answer:
    """alpha / (p q), p A, p lr_A and q lr_B for powers of two, beside a change of alpha alone."""
    plain = adam_losses(1, 0.01, 0.01, 8)
    scaled, alone = adam_losses(4, 0.04, 0.02, 1), adam_losses(1, 0.01, 0.01, 1)
    different, same = np.abs(plain - alone).max(), np.array_equal(scaled, plain)
    alike = "equal bit for bit" if same else "differ"
    return same and different > 1e-4, f"p = 4, q = 2: 20 losses {alike}; alpha alone {different:.1g}"


@decides("alpha-over-r-same-first-step")
def same_first_step() -> Answer:
    """How much Adam's first step on B lowers the loss at each rank, under alpha / r and alpha / sqrt(r)."""
    falls = {}  # rule -> at ranks 8 and 32, in units of rank 2's
    for rule, power in (("alpha / r", 1.0), ("alpha / sqrt(r)", 0.5)):
        two, eight, thirty_two = (_mean_first_fall(r, r ** (1 - power)) for r in (2, 8, 32))
        falls[rule] = eight / two, thirty_two / two
    alike = all(near(fall, 1, 0.05) for fall in falls["alpha / r"])
    differ = not any(near(fall, 1, 0.05) for fall in falls["alpha / sqrt(r)"])
    text = "; ".join(f"{rule} {at_8:.2f} and {at_32:.2f}" for rule, (at_8, at_32) in falls.items())
    return alike and differ, f"fall of the loss at ranks 8 and 32, in units of rank 2's, 20 draws: {text}"


def _mean_first_fall(r: int, alpha: float) -> float:
    """Return by how much Adam's first step on B lowers the loss, in the mean over 20 draws of layer and examples."""
    falls = []
    for seed in range(20):
        layer = adapted_linear(64, r, alpha, seed)
        x, y = random_matrix(256, 64, seed=100 + seed), random_matrix(256, 64, seed=200 + seed)
        before = F.mse_loss(layer(x), y)
        (gradient,) = torch.autograd.grad(before, [layer.lora_B])
        with torch.no_grad():
            layer.lora_B.sub_(1e-4 * gradient.sign())  # Adam's first step; A does not move
            falls.append(float(before - F.mse_loss(layer(x), y)))
    return statistics.fmean(falls)


# Ranks, and what chance gives


SIZES = (0.01, 0.05, 0.2)  # of an update, in units of the weight's norm


_NF4 = ("which norm is meant", "the size of the update beside the weight", "whether the base lies on the grid already")


@decides("nf4-merge-loses-90-percent", on=_NF4)
def merged_into_nf4(claim: Claim) -> Cases:
    """The share of weights whose level in NF4 an update does not change, and the norm of that change.

    Beside weights of any value, what rounding adds makes the change longer than the update, and along the update it is
    as long. Weights that lie on NF4's levels already, as those of a quantised base do, are rounded back to them.
    """
    W = random_matrix(256, 512, dtype=torch.float32)
    BA = random_matrix(256, 8, seed=1, dtype=torch.float32) @ random_matrix(8, 512, seed=2, dtype=torch.float32)
    before, _ = nf4(W, double=False)
    levels = FORMATS["NF4"].decode(before)
    for (base, weights), size in product({"any weights": W, "weights on the grid": levels.view_as(W)}.items(), SIZES):
        update = BA * (size * W.norm() / BA.norm())
        after, _ = nf4(weights + update, double=False)
        share = 100 * float((_codes(before) == _codes(after)).float().mean())
        change = FORMATS["NF4"].decode(after) - levels
        along = (change * update.view_as(change)).sum() / update.norm() ** 2
        for which, norm in (("whole change", change.norm() / update.norm()), ("change along the update", along)):
            words = f"{base}, {100 * size:.0f} % of the weight's norm: {share:.0f} % of the codes stay, "
            words += f"the {which} is {norm:.2f} times the update"
            yield near(share, claim.stated) and near(float(norm), 1), words, which, size, base


def _codes(blocks: Tensor) -> Tensor:
    """The codes of 4 bits of blocks in NF4: (blocks, 64)."""
    packed = blocks[:, FORMATS["NF4"].scale_bytes :]
    return torch.cat((packed >> 4, packed & 15), dim=1)
