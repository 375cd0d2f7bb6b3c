"""Exercises of lesson 01: matrices of low rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lora_lab.course.exercise import exercises_of, normal

exercise = exercises_of("01_low_rank")


def matrix_and_rank(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A matrix (m, n), tall or wide, with well separated singular values, and a rank below both."""
    m, n = rng.permutation([int(rng.integers(5, 7)), int(rng.integers(7, 9))])
    left, right = (np.linalg.qr(rng.normal(size=(size, 5)))[0] for size in (m, n))
    return (left * [9.0, 6.0, 4.0, 2.5, 1.5]) @ right.T, int(rng.integers(2, 4))


def _truncated(M: np.ndarray, first: int, last: int | None) -> np.ndarray:
    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    return (U[:, first:last] * S[first:last]) @ Vh[first:last]


def _without_singular_values(M, r):
    U, _, Vh = np.linalg.svd(M, full_matrices=False)
    return U[:, :r] @ Vh[:r]


def _transposed_again(full: bool) -> Callable[[np.ndarray, int], np.ndarray]:
    """A wrong answer: the first columns are taken where rows are needed; without an error, if svd returns all of V."""

    def best_rank(M: np.ndarray, r: int) -> np.ndarray:
        U, S, Vh = np.linalg.svd(M, full_matrices=full)
        return (U[:, :r] * S[:r]) @ Vh[:, :r].T

    return best_rank


@exercise(
    "best_rank",
    inputs=matrix_and_rank,
    mistakes={
        "The singular values are missing. Scale each direction by its entry of S.": _without_singular_values,
        "The directions are mixed up. svd returns V transposed already: take its first r rows.": (
            _transposed_again(full=False),
            _transposed_again(full=True),
        ),
        "You kept the weakest terms. S is sorted with the largest first, so take [:r].": (
            lambda M, r: _truncated(M, -r, None),
            lambda M, r: _truncated(M, r, None),
        ),
        "There is one term too many. [:r] already means r of them.": lambda M, r: _truncated(M, 0, r + 1),
        "There is one term too few. [:r] already means r of them.": lambda M, r: _truncated(M, 0, r - 1),
        "This is M itself. Cut it down to rank r.": lambda M, r: M.copy(),
    },
    hints=[
        "np.linalg.svd(M, full_matrices=False) returns three arrays: U, S and V transposed.",
        "Take the first r columns of U, the first r entries of S and the first r rows of V transposed.",
        "U[:, :r] * S[:r] scales each column of U by its singular value; what is left is one matrix multiplication.",
    ],
    minutes=8,
    difficulty=1,
    praise="No matrix of rank r is closer to M (Eckart and Young, 1936), so this is the yardstick for all others.",
)
def best_rank(M, r):
    """The result is the matrix of rank r that is closest to M, and M itself is not changed."""
    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def spectrum_and_share(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Singular values, largest first, and a share of their energy; in half of the cases some terms meet it exactly."""
    if rng.random() < 0.5:
        twos = int(rng.integers(1, 4))
        S = np.array([2.0] * twos + [1.0] * (16 - 4 * twos))  # energy 16, and sums of 4, 8 and 12 without rounding
        return S, float(rng.choice([share for share in (0.25, 0.5, 0.75) if share != twos / 4]))
    S = np.sort(rng.uniform(0.2, 1, 12))[::-1] * np.linspace(1, 0.2, 12)
    return S, float(rng.choice([0.8, 0.9, 0.95]))


@exercise(
    "terms_for",
    inputs=spectrum_and_share,
    mistakes={
        "The sum is of the wrong quantity. Energy is the sum of squares, so square S first.": (
            lambda S, share: int(np.sum(np.cumsum(S) / S.sum() < share)) + 1
        ),
        "There is one term too few. These hold less than the share, and the next one reaches it.": (
            lambda S, share: int(np.sum(np.cumsum(S**2) / np.sum(S**2) < share))
        ),
        "There is one term too many. Count the terms that hold less than the share, and add one.": (
            lambda S, share: int(np.sum(np.cumsum(S**2) / np.sum(S**2) < share)) + 2
        ),
        "There is one term too many where the share is met exactly. At least this share means that it is enough.": (
            lambda S, share: int(np.sum(np.cumsum(S**2) / np.sum(S**2) <= share)) + 1
        ),
        "This counts the large singular values. Add up their squares until the sum reaches the share.": (
            lambda S, share: int(np.sum(S / S[0] > 1 - share)),
            lambda S, share: int(np.sum(S**2 / S[0] ** 2 > 1 - share)),
        ),
    },
    hints=[
        "The energy of the first k terms is S[0]**2 + ... + S[k-1]**2; np.cumsum gives all of these sums.",
        "Divide by the sum of all squares to get shares, which rise to 1.",
        "Count how many of the shares are still below the one that is asked for; one term more reaches it.",
    ],
    minutes=6,
    difficulty=1,
    praise="You can now say how many terms hold most of a matrix, whatever its shape.",
    draws=48,
)
def terms_for(S, share):
    """The result is the smallest number of terms whose energy is at least that share of the whole."""
    return int(np.sum(np.cumsum(S**2) / np.sum(S**2) < share)) + 1


def shape_of_a_matrix(rng: np.random.Generator) -> tuple[int, int]:
    """Two different sizes; in half of the cases a rank costs exactly as much as the matrix."""
    if rng.random() < 0.5:
        k = int(rng.integers(2, 40))
        return 3 * k, 6 * k  # 18 k^2 entries, and 9 k for each rank: at 2 k the factors cost as much
    m, n = rng.choice(np.arange(5, 400), size=2, replace=False)
    return int(m), int(n)


@exercise(
    "largest_saving_rank",
    inputs=shape_of_a_matrix,
    mistakes={
        "This is the largest rank that the matrix can have. Find the largest at which the factors are smaller.": (
            lambda m, n: min(m, n)
        ),
        "The result is not a whole number, but a rank is. Round it down.": (
            lambda m, n: m * n / (m + n),
            lambda m, n: (m * n - 1) / (m + n),
        ),
        "At this rank the factors cost as much as the matrix in some cases. They must cost less.": (
            lambda m, n: m * n // (m + n)
        ),
        "At this rank the factors cost as much as the matrix, or more. Round down, not up.": (
            lambda m, n: -(-m * n // (m + n)),
            lambda m, n: m * n // (m + n) + 1,
        ),
    },
    hints=[
        "A factor of m x r and one of r x n hold r * (m + n) numbers; the matrix holds m * n.",
        "You want the largest whole r with r * (m + n) < m * n.",
        "// rounds down; think about what happens when m * n is a multiple of m + n.",
    ],
    minutes=5,
    difficulty=1,
    praise="Up to this rank two factors are smaller than their matrix, and LoRA stays far below it.",
    draws=36,
)
def largest_saving_rank(m, n):
    """r * (m + n) is smaller than m * n at the result, and no longer so at the next rank."""
    return (m * n - 1) // (m + n)


def errors_and_inputs(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of some tokens the gradient of the layer's output (tokens, out) and its input (tokens, in)."""
    tokens, out, inp = rng.permutation([3, 4, 5])
    return normal(rng, tokens, out), normal(rng, tokens, inp)


@exercise(
    "gradient",
    inputs=errors_and_inputs,
    mistakes={
        "The result is transposed. The gradient has the weight's shape, outputs x inputs.": lambda delta, z: (
            z.T @ delta
        ),
        "The result is too small. Sum over the tokens; you divided by their number.": (
            lambda delta, z: delta.T @ z / len(z)
        ),
        "Only the last token is left. Add the outer products instead of replacing the result each time.": (
            lambda delta, z: np.outer(delta[-1], z[-1])
        ),
        "Only the first token is there. Sum over all of them.": lambda delta, z: np.outer(delta[0], z[0]),
        "The sum over tokens was taken too early. Multiply token by token, and then add.": (
            lambda delta, z: np.outer(delta.sum(axis=0), z.sum(axis=0))
        ),
        "Entries cannot be multiplied one by one. Each token adds an outer product of its delta and its z.": (
            lambda delta, z: delta * z
        ),
    },
    hints=[
        "For one token the gradient is the outer product of delta (out) and z (in): np.outer(delta[t], z[t]).",
        "The gradient of a sum is the sum of the gradients: add over the tokens t.",
        "A sum of outer products is one matrix multiplication of delta transposed with z.",
    ],
    minutes=8,
    difficulty=2,
    praise="Each token adds one direction, so a gradient from few tokens has low rank before LoRA is even mentioned.",
)
def gradient(delta, z):
    """The result is the gradient of a layer y = W z with respect to W, summed over the tokens."""
    return delta.T @ z
