"""Hidden tests of lesson 01: matrices of low rank."""

from __future__ import annotations

import numpy as np
import torch

from lora_lab.course.grading.invariant import Reflection, close, invariant_of


@invariant_of("largest_saving_rank")
def saves_and_the_next_rank_does_not(largest_saving_rank, rng):
    """At the result the two factors are smaller than the matrix, and at the next rank they are not."""
    shapes = [(m, n) for m, n in rng.integers(3, 900, (40, 2)).tolist() if m * n % (m + n)]
    ranks = [largest_saving_rank(m, n) for m, n in shapes]
    whole = all(r == int(r) for r in ranks)
    return whole and all(r * (m + n) < m * n <= (r + 1) * (m + n) for r, (m, n) in zip(ranks, shapes, strict=True))


@invariant_of("largest_saving_rank")
def a_tie_saves_nothing(largest_saving_rank, rng):
    """Where some rank costs exactly as much as the matrix, the result is the rank below it."""
    sizes = rng.choice(np.arange(2, 200), 8, replace=False).tolist()
    return all(largest_saving_rank(3 * k, 6 * k) == 2 * k - 1 for k in sizes)


@invariant_of("best_rank")
def has_the_rank(best_rank, rng):
    """The result has the shape of M, whether that is tall or wide, and rank r."""
    cases = [(rng.normal(size=shape), r) for shape in ((5, 8), (9, 6)) for r in (2, 3)]
    results = [(np.asarray(best_rank(M.copy(), r)), M, r) for M, r in cases]
    return all(N.shape == M.shape and np.linalg.matrix_rank(N) == r for N, M, r in results)


@invariant_of("best_rank")
def drops_what_is_perpendicular(best_rank, rng):
    """Something is dropped, and it is perpendicular to the result: the sum of the products of their entries is 0."""
    matrices = [rng.normal(size=shape) for shape in ((5, 8), (9, 6))]
    pairs = [(np.asarray(best_rank(M.copy(), 3)), M) for M in matrices]
    norms = [(np.linalg.norm(N), np.linalg.norm(M - N), np.sum(N * (M - N))) for N, M in pairs]
    return all(saved > 1e-3 and lost > 1e-3 and abs(product) < 1e-5 * saved * lost for saved, lost, product in norms)


@invariant_of("best_rank")
def has_the_smallest_error(best_rank, rng):
    """Its error is the root of the dropped squares, which is the smallest, and M is as it was."""
    M = rng.normal(size=(9, 6))
    before, S = M.copy(), np.linalg.svd(M, compute_uv=False)
    errors = [np.linalg.norm(M - np.asarray(best_rank(M, r))) for r in (2, 4)]
    return close(errors, [np.sqrt(np.sum(S[r:] ** 2)) for r in (2, 4)]) and np.array_equal(M, before)


@invariant_of("terms_for")
def reaches_the_share(terms_for, rng):
    """The result is a whole number of terms which hold at least the share, and one term less holds less."""
    cases = [(np.sort(rng.uniform(0.1, 1, 14))[::-1] ** 2, share) for share in (0.5, 0.8, 0.9, 0.95, 0.99) * 3]
    counts = [terms_for(S.copy(), share) for S, share in cases]
    held = [[np.sum(S[: k - d] ** 2) / np.sum(S**2) for d in (0, 1)] for k, (S, _) in zip(counts, cases, strict=True)]
    enough = all(less < share <= more for (more, less), (_, share) in zip(held, cases, strict=True))
    return enough and all(k == int(k) for k in counts)


@invariant_of("terms_for")
def an_exact_share_is_enough(terms_for, rng):
    """Where some terms hold exactly the share, these are enough."""
    sizes = rng.choice([2.0, 4.0, 0.5], 3, replace=False).tolist()
    # 16 equal terms: no formula for the shares rounds, whether it takes squares or divides by the norm first.
    return all(terms_for(size * np.ones(16), k / 16) == k for size in sizes for k in (3, 8, 12))


@invariant_of("gradient")
def of_one_token(gradient, rng):
    """From a single token the gradient is the outer product of its delta and its z."""
    delta, z = (torch.from_numpy(rng.normal(size=(1, size))).float() for size in (3, 5))
    return close(gradient(delta, z), torch.outer(delta[0], z[0]))


@invariant_of("gradient")
def adds_up(gradient, rng):
    """The gradient from all tokens is the sum of those from each part of them."""
    delta, z = (torch.from_numpy(rng.normal(size=(6, size))).float() for size in (3, 5))
    whole, parts = gradient(delta, z), gradient(delta[:2], z[:2]) + gradient(delta[2:], z[2:])
    return close(whole, parts) and float(abs(whole).max()) > 0


@invariant_of("gradient")
def is_that_of_autograd(gradient, rng):
    """The result is what autograd computes for W."""
    delta, z = (torch.from_numpy(rng.normal(size=(4, size))).float() for size in (3, 5))
    W = torch.zeros(3, 5, requires_grad=True)
    (expected,) = torch.autograd.grad((delta * (z @ W.T)).sum(), W)
    return close(gradient(delta, z), expected)


Reflection(
    "01_low_rank",
    question="A colleague has looked at the singular values of a language model's weights and says: *These "
    "matrices have full rank, and many terms are needed for 90 % of their energy. So LoRA, which insists "
    "on low rank, cannot work.* Answer in five to eight sentences.",
    rubric=(
        "The answer says which matrix LoRA wants to be of low rank, and which it leaves as it is.",
        "It says what the weight was compared with in the lesson, and why a number of terms needs such a comparison.",
        "It names a measurement that would show that LoRA's bet is lost for some task.",
        "It says of at least one result of the lesson how far it goes: which matrices, which model, how many tokens.",
    ),
    expected="LoRA asks low rank of the change, and W stays. The lesson compares the weight with noise of its "
    "shape and norm: many or few terms mean something only beside that. The bet is lost where full "
    "fine-tuning, with its rate tuned, is better than every rank that was tried by more than the seeds "
    "scatter, or where the change's best approximation of low rank has a clearly higher loss than the "
    "change. The lesson looked at one small chat model and a few of its matrices, and a gradient of few "
    "tokens has low rank whatever the task is.",
)
