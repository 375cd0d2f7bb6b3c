"""Hidden tests of lesson 10: variants of LoRA."""

from __future__ import annotations

import math

import torch
from torch import nn

from lora_lab.course.grading.invariant import Reflection, close, invariant_of


@invariant_of("RsLoRA")
def divides_by_the_root_of_the_rank(RsLoRA, rng):
    """The property scaling is alpha / sqrt(rank), for several ranks and alphas."""
    cases = [(rank, alpha) for rank in (2, 3, 5) for alpha in (5.0, 11.0)]
    layers = [RsLoRA(nn.Linear(8, 6), rank, alpha) for rank, alpha in cases]
    return close([layer.scaling for layer in layers], [alpha / math.sqrt(rank) for rank, alpha in cases])


@invariant_of("RsLoRA")
def follows_its_rank(RsLoRA, rng):
    """It follows the rank, if the adapter is resized."""
    layer = RsLoRA(nn.Linear(8, 6), 2, 5.0)
    layer.lora_A, layer.lora_B = nn.Parameter(torch.randn(7, 8)), nn.Parameter(torch.randn(6, 7))
    return close(layer.scaling, 5 / math.sqrt(7))


@invariant_of("RsLoRA")
def scales_its_update_once(RsLoRA, rng):
    """The layer computes its base plus alpha / sqrt(rank) * B A x."""
    layer, x = RsLoRA(nn.Linear(8, 6), 3, 5.0), torch.from_numpy(rng.normal(size=(4, 8))).float()
    nn.init.normal_(layer.lora_B)
    return close(layer(x) - layer.base(x), 5 / math.sqrt(3) * x @ layer.lora_A.T @ layer.lora_B.T)


@invariant_of("LoRAFA")
def leaves_A_as_it_is(LoRAFA, rng):
    """A is random, does not count as trained, and gets no gradient."""
    layer = LoRAFA(nn.Linear(8, 6), 3, 5.0)
    layer(torch.from_numpy(rng.normal(size=(4, 8))).float()).square().sum().backward()
    varied = len(layer.lora_A.detach().unique()) == 24
    return varied and not layer.lora_A.requires_grad and layer.lora_A.grad is None


@invariant_of("LoRAFA")
def learns_with_B(LoRAFA, rng):
    """B starts at zero, is trained, and has a gradient at once."""
    layer = LoRAFA(nn.Linear(8, 6), 3, 5.0)
    zero = not layer.lora_B.any()
    layer(torch.from_numpy(rng.normal(size=(4, 8))).float()).square().sum().backward()
    return zero and layer.lora_B.requires_grad and bool(layer.lora_B.grad.any())


@invariant_of("one_number")
def of_both_limits(ratios, rng):
    """For LoRA the ratio is 1 and for LoRA-FA infinite, at every rank, and for rsLoRA it grows with the rank."""
    rows = [ratios(rank) for rank in (2, 7, 64)]
    grows = rows[0]["rsLoRA"] < rows[1]["rsLoRA"] < rows[2]["rsLoRA"]
    return grows and all((row["LoRA"], row["LoRA-FA"]) == (1, math.inf) for row in rows)


@invariant_of("one_number")
def of_rslora(ratios, rng):
    """For rsLoRA it is its factor divided by that of LoRA, at every rank."""
    ranks = rng.integers(2, 200, 6).tolist()
    return close([ratios(rank)["rsLoRA"] for rank in ranks], [(7 / math.sqrt(rank)) / (7 / rank) for rank in ranks])


@invariant_of("pissa_start")
def adds_up_to_W(pissa, rng):
    """What is left plus scaling * B A is W, B is (out, r) and A is (r, in), and something was taken from W."""
    W = torch.from_numpy(rng.normal(size=(8, 6))).float()
    results = [(pissa(W.clone(), r, s), r, s) for r in (2, 3) for s in (0.5, 3.0)]
    shapes = all(B.shape == (8, r) and A.shape == (r, 6) for (_, B, A), r, _ in results)
    return shapes and all(close(rest + s * B @ A, W) and not close(rest, W) for (rest, B, A), _, s in results)


@invariant_of("pissa_start")
def takes_the_largest_part(pissa, rng):
    """scaling * B A is as close to W as a matrix of that rank can be."""
    W = torch.from_numpy(rng.normal(size=(8, 6))).float()
    results = [(pissa(W.clone(), r, s)[1:], r, s) for r in (2, 3) for s in (0.5, 3.0)]
    S = torch.linalg.svdvals(W)
    return all(close((W - s * B @ A).norm(), S[r:].norm()) for (B, A), r, s in results)


@invariant_of("pissa_start")
def shares_it_evenly(pissa, rng):
    """Each column of B is as long as the row of A that it multiplies, and none is zero."""
    W = torch.from_numpy(rng.normal(size=(8, 6))).float()
    pairs = [pissa(W.clone(), r, s)[1:] for r in (2, 3) for s in (0.5, 3.0)]
    return all(close(B.norm(dim=0), A.norm(dim=1)) and bool(A.norm(dim=1).min() > 0.01) for B, A in pairs)


@invariant_of("dora_length")
def has_the_length(dora, rng):
    """Each row of the weight has the length that m says."""
    W, A, B = (torch.from_numpy(rng.normal(size=shape)).float() for shape in ((5, 7), (3, 7), (5, 3)))
    m = torch.from_numpy(rng.uniform(2, 4, 5)).float()
    return close(dora(torch.eye(7), W, A, B, 2.0, m).norm(dim=0), m)


@invariant_of("dora_length")
def has_the_direction(dora, rng):
    """The result is x times a weight whose rows have the directions of those of W + scaling * B A."""
    W, A, B, x = (torch.from_numpy(rng.normal(size=shape)).float() for shape in ((5, 7), (3, 7), (5, 3), (4, 7)))
    m, V = torch.arange(2.0, 7.0), W + 2 * B @ A
    weight = dora(torch.eye(7), W, A, B, 2.0, m).T
    right = close(weight / weight.norm(dim=1)[:, None], V / V.norm(dim=1)[:, None])
    return right and close(dora(x, W, A, B, 2.0, m), x @ weight.T)


Reflection(
    "10_variants",
    question="Choose one of the variants of this lesson. In five to eight sentences: what does it change, what "
    "does its paper say that it is good for, and which comparison with LoRA would you accept as "
    "evidence?",
    rubric=(
        "The answer says exactly what differs from LoRA: the start, the scaling, what is trained, or the forward pass.",
        "It names the paper's claim and its conditions.",
        "In the comparison both methods have their rates tuned, on data that do not judge.",
        "It says what the variant costs, in memory or in time, or that it costs nothing.",
    ),
    expected="rsLoRA: the factor alpha / sqrt(r), for large ranks. LoRA-FA: A is frozen, which saves stored "
    "inputs. PiSSA: the start from the largest singular vectors. DoRA: length and direction of each row "
    "are separate, which stores more activations. Each is compared with LoRA at its own best rate, over "
    "several seeds, at the rank that the claim is about.",
)
