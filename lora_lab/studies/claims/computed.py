"""Verdicts by computing with small layers and random matrices: exact statements, which need no training of a model.

Each takes two seconds at most on one core, and draws its random numbers from its own seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lora_lab import rank
from lora_lab.inject import LoRAConfig, inject, merge
from lora_lab.lora import LoRALinear
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.models.quantize import FORMATS, nf4
from lora_lab.studies.claims.deciding import Answer, Cases, Claim, decides, near

IDS = torch.arange(32).view(2, 16)  # two sequences of 16 tokens
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def tiny_llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A Llama of two blocks, with random weights."""
    return Llama(LlamaConfig(64, 32, 48, 2, 2, 1, 16)).to(dtype).eval()


def random_matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, of a generator with this seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adapted_linear(width: int, r: int, alpha: float, dtype: torch.dtype = torch.float64, seed: int = 0) -> LoRALinear:
    """A layer of ``width`` inputs and outputs, with a fresh adapter."""
    base = nn.Linear(width, width, bias=False, dtype=dtype)
    base.weight.data = random_matrix(width, width, seed=seed, dtype=dtype) / math.sqrt(width)
    return LoRALinear(base, r, alpha, generator=torch.Generator().manual_seed(seed))


# At the start, and merged


@decides("fresh-adapter-changes-nothing")
def fresh_adapter(claim: Claim) -> Answer:
    """Logits before and after the injection."""
    model = tiny_llama(torch.float32)
    before = model(IDS)
    names = inject(model, LoRAConfig(rank=4))
    changed = int((model(IDS) != before).sum())
    return changed == 0, f"{changed} of {before.numel():,} logits changed, with {len(names)} fresh adapters"


@decides("b-zero-cannot-learn")
def b_zero(claim: Claim) -> Answer:
    """Gradients of A and B at the first step and after it, and the loss after ten steps."""
    layer, x, y = adapted_linear(16, 4, 8.0), random_matrix(64, 16, seed=1), random_matrix(64, 16, seed=2)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.5)
    losses, gradients = zip(*_descend(layer, x, y, optimizer, steps=10), strict=True)
    (a_first, b_first), (a_second, _), *_ = [[float(each.abs().max()) for each in of_step] for of_step in gradients]
    text = f"first step: gradient of A {a_first:g}, of B {b_first:.2g}; second step: A {a_second:.2g}"
    learned = a_first == 0 < b_first and losses[-1] < losses[0]
    return not learned, f"{text}; the loss falls from {losses[0]:.3f} to {losses[-1]:.3f} in ten steps"


def _descend(
    layer: LoRALinear, x: Tensor, y: Tensor, optimizer: Optimizer, steps: int
) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
    """Yield the loss before each step, and the gradients of A and B."""
    for _ in range(steps):
        loss = F.mse_loss(layer(x), y)
        gradients = torch.autograd.grad(loss, [layer.lora_A, layer.lora_B])
        layer.lora_A.grad, layer.lora_B.grad = gradients
        optimizer.step()
        yield loss.item(), gradients


@decides("subtracting-recovers-w0", on="the precision")
def subtracting(claim: Claim) -> Cases:
    """Entries of W0 that differ after W0 + BA - BA, by precision."""
    for name, dtype in PRECISIONS.items():
        W = random_matrix(96, 64, dtype=dtype) / 8
        update = (random_matrix(96, 4, seed=1) @ random_matrix(4, 64, seed=2) / 100).to(dtype)
        lost = int(((W + update) - update != W).sum())
        yield lost == 0, f"{name} {lost:,} of {W.numel():,} entries differ"


@decides("merged-computes-the-same", on="the precision")
def merged_outputs(claim: Claim) -> Cases:
    """The largest change of a logit by merging, against 16 units of rounding of the largest logit."""
    for name, dtype in PRECISIONS.items():
        model = tiny_llama(dtype)
        inject(model, LoRAConfig(rank=4))
        with torch.no_grad():
            for seed, (key, parameter) in enumerate(model.named_parameters()):
                if "lora_B" in key:
                    parameter.copy_(0.1 * random_matrix(*parameter.shape, seed=seed))
            before = model(IDS).double()
            merge(model)
            error = float((model(IDS).double() - before).abs().max() / before.abs().max())
        yield error <= 16 * torch.finfo(dtype).eps, f"{name} {error:.0e} of the largest logit"


@decides("merged-adds-no-latency")
def merged_structure(claim: Claim) -> Answer:
    """A merged model has the base's modules and shapes, so that it does the same operations."""
    base, model = tiny_llama(), tiny_llama()
    inject(model, LoRAConfig(rank=4))
    adapted = _structure(model)
    merge(model)
    same, before = _structure(model) == _structure(base), adapted == _structure(base)
    words = "the same classes and shapes, so the same operations" if same else "other modules than the base"
    return same and not before, f"{words}, and with separate adapters others; no time was measured"


def _structure(model: nn.Module) -> tuple[dict[str, type], dict[str, torch.Size]]:
    """Return the class of each module, and the shape of each parameter."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: type(module) for name, module in model.named_modules()}, shapes


# What the numbers alpha, rank and rate do


def adam_losses(factor: float, lr_a: float, lr_b: float, alpha: float, steps: int = 20) -> list[float]:
    """Return losses of a small layer under Adam whose epsilon is too small to count.

    A starts ``factor`` times as large as usual. Its first gradient is exactly zero, so epsilon cannot be.
    """
    layer, x, y = adapted_linear(16, 4, alpha), random_matrix(64, 16, seed=1), random_matrix(64, 16, seed=2)
    layer.lora_A.data *= factor
    groups = [{"params": [layer.lora_A], "lr": lr_a}, {"params": [layer.lora_B], "lr": lr_b}]
    return [loss for loss, _ in _descend(layer, x, y, torch.optim.Adam(groups, eps=1e-30), steps)]


@decides("two-real-knobs")
def two_knobs(claim: Claim) -> Answer:
    """alpha / (p q), p A, p lr_A and q lr_B for powers of two, beside a change of alpha alone."""
    plain = adam_losses(1, 0.01, 0.01, 8)
    scaled, alone = adam_losses(4, 0.04, 0.02, 1), adam_losses(1, 0.01, 0.01, 1)
    different = max(abs(a - b) for a, b in zip(plain, alone, strict=True))
    alike = "equal bit for bit" if scaled == plain else "differ"
    return scaled == plain and different > 1e-4, f"p = 4, q = 2: 20 losses {alike}; alpha alone {different:.1g}"


@decides("alpha-is-a-learning-rate")
def alpha_is_a_rate(claim: Claim) -> Answer:
    """alpha / 4 against twice the rate, if A starts twice as large; and how far off it is if A starts as usual."""
    plain = adam_losses(1, 0.01, 0.01, 8)
    others = [adam_losses(factor, 0.02, 0.02, 2) for factor in (2, 1)]
    scaled, usual = (max(abs(a / b - 1) for a, b in zip(plain, other, strict=True)) for other in others)
    text = f"losses differ by {100 * scaled:.2g} % if A starts twice as large, and by {100 * usual:.2g} % if as usual"
    return scaled < 0.01, text


@decides("alpha-over-r-same-first-step")
def same_first_step(claim: Claim) -> Answer:
    """How much Adam's first step on B lowers the loss at each rank, under alpha / r and alpha / sqrt(r)."""
    falls: dict[str, dict[int, float]] = {}
    for rule, power in (("alpha / r", 1.0), ("alpha / sqrt(r)", 0.5)):
        falls[rule] = {r: statistics.fmean(_first_fall(r, r ** (1 - power), s) for s in range(20)) for r in (2, 8, 32)}
    ratios = {rule: {r: each[r] / each[2] for r in (8, 32)} for rule, each in falls.items()}
    alike = all(near(ratio, 1, 0.05) for ratio in ratios["alpha / r"].values())
    differ = not any(near(ratio, 1, 0.05) for ratio in ratios["alpha / sqrt(r)"].values())
    text = "; ".join(f"{rule} {each[8]:.2f} and {each[32]:.2f}" for rule, each in ratios.items())
    return alike and differ, f"fall of the loss at ranks 8 and 32, in units of rank 2's, 20 draws: {text}"


def _first_fall(r: int, alpha: float, seed: int, width: int = 64) -> float:
    layer = adapted_linear(width, r, alpha, seed=seed)
    x, y = random_matrix(256, width, seed=100 + seed), random_matrix(256, width, seed=200 + seed)
    before = F.mse_loss(layer(x), y)
    (gradient,) = torch.autograd.grad(before, [layer.lora_B])
    with torch.no_grad():
        layer.lora_B.sub_(1e-4 * gradient.sign())  # Adam's first step; A does not move
        return float(before - F.mse_loss(layer(x), y))


# Ranks, and what chance gives


@decides("updates-have-low-rank", on="the number of tokens and the optimiser: Adam's first step is the gradient's sign")
def first_update(claim: Claim) -> Cases:
    """The rank and the energy rank of the first update of a square weight, by tokens, under SGD and under Adam."""
    for tokens in (8, 1024):
        gradient = random_matrix(128, tokens, seed=1) @ random_matrix(tokens, 128, seed=2)
        for name, update in (("SGD", gradient), ("Adam", gradient.sign())):
            full, energy = int(torch.linalg.matrix_rank(update)), int(rank.energy_rank(rank.singular_values(update)))
            words = f"{name}, {tokens:,} tokens: rank {full} of 128, 90 % of the energy in {energy}"
            yield full <= 8, words


@decides("many-terms-mean-structure")
def noise_needs_many_terms(claim: Claim) -> Answer:
    """Terms for 90 % of the energy of Gaussian noise and of a matrix with structure, both 192 x 192."""
    noise = rank.by_chance(lambda g: rank.energy_rank(rank.singular_values(rank.gaussian((192, 192), generator=g))))
    decaying = rank.singular_values(random_matrix(192, 192) @ torch.diag(0.9 ** torch.arange(192.0).double()))
    low, high, structured = int(noise.low), int(noise.high), int(rank.energy_rank(decaying))
    text = f"192 x 192: noise needs {low} to {high} of 192 terms; decaying columns {structured}"
    return structured > high, text


@decides("any-direction-is-an-intruder")
def random_intruders(claim: Claim) -> Answer:
    """The largest cosine of a random direction with the directions of a weight, by width."""
    cosine = rank.random_cosine(4096)
    others = ", ".join(f"{rank.random_cosine(width):.3f} at {width}" for width in (64, 576))
    return near(cosine, claim.stated) and cosine < 0.5, f"{cosine:.3f} at 4,096 wide; {others}: below 0.5"


SIZES = (0.01, 0.05, 0.2)  # of an update, in units of the weight's norm


@decides("nf4-merge-loses-90-percent")
def merged_into_nf4(claim: Claim) -> Cases:
    """The share of weights whose level in NF4 an update does not change, and the norm of that change.

    Beside weights of any value, what rounding adds makes the change longer than the update, and along the update it is
    as long. Weights that lie on NF4's levels already, as those of a quantised base do, are rounded back to them.
    """
    W = random_matrix(256, 512, dtype=torch.float32)
    B, A = random_matrix(256, 8, seed=1, dtype=torch.float32), random_matrix(8, 512, seed=2, dtype=torch.float32)
    before, _ = nf4(W, double=False)
    levels = FORMATS["NF4"].decode(before)
    for (base, weights), size in product({"any weights": W, "weights on the grid": levels.view_as(W)}.items(), SIZES):
        update = B @ A * (size * W.norm() / (B @ A).norm())
        after, _ = nf4(weights + update, double=False)
        share = 100 * float((_codes(before) == _codes(after)).float().mean())
        change = FORMATS["NF4"].decode(after) - levels
        norms = {"the whole change is": float(change.norm() / update.norm())}
        norms["the change along the update is"] = float((change * update.view_as(change)).sum() / update.norm() ** 2)
        for which, norm in norms.items():
            words = f"{base}, {100 * size:.0f} % of the weight's norm: {share:.0f} % of the codes stay, "
            words += f"{which} {norm:.2f} times the update"
            case = {"which norm is meant": which, "the size of the update beside the weight": size}
            case |= {"whether the base lies on the grid already": base}
            yield near(share, claim.stated) and near(norm, 1), words, case


def _codes(blocks: Tensor) -> Tensor:
    """The codes of 4 bits of blocks in NF4: (blocks, 64)."""
    packed = blocks[:, FORMATS["NF4"].scale_bytes :]
    return torch.cat((packed >> 4, packed & 15), dim=1)


# Losses


@decides("lower-loss-better-answers")
def lower_loss(claim: Claim) -> Answer:
    """Right answers of overconfident logits before and after the temperature that lowers their loss most."""
    targets = torch.randint(10, (2000,), generator=torch.Generator().manual_seed(0))  # (2000,)
    logits = 3 * random_matrix(2000, 10)  # (2000, 10)
    logits[:1000] += 6 * F.one_hot(targets[:1000], 10)  # the first half is mostly right
    losses = {temperature: float(F.cross_entropy(logits / temperature, targets)) for temperature in (1, 2, 4, 8)}
    best = min(losses, key=losses.__getitem__)
    before, after = (float((each.argmax(-1) == targets).double().mean()) for each in (logits, logits / best))
    text = f"temperature {best}: loss {losses[1]:.2f} to {losses[best]:.2f}, right answers {before:.1%} and {after:.1%}"
    return losses[best] >= losses[1] or after > before, text
