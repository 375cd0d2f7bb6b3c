"""Exercises of lesson 11: what training wrote into the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_lab.course.exercise import Probe, exercises_of, normal
from lora_lab.rank import product_svd

exercise = exercises_of("11_what_training_wrote")


# The SVD of a product, from its factors

Decomposition = tuple[Tensor, Tensor, Tensor]


class _LargestTensor(TorchFunctionMode):
    """Remembers the number of entries of the largest tensor that any function returns, and whether one left torch."""

    entries = 0
    left_torch = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left_torch |= func.__name__ in ("numpy", "tolist", "__array__", "__dlpack__")
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple) else (result,)
        self.entries = max([self.entries, *(part.numel() for part in parts if isinstance(part, Tensor))])
        return result


def _factors(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in), whose product is much larger than both."""
    out, inp = (int(size) for size in rng.permutation([40, 50, 60])[:2])
    rank = int(rng.integers(3, 6))
    return normal(rng, out, rank), normal(rng, rank, inp)


def _returns_three(answer: Callable[..., Decomposition], rng: np.random.Generator) -> bool:
    result = answer(*_factors(rng))
    return isinstance(result, tuple | list) and len(result) == 3 and all(isinstance(part, Tensor) for part in result)


def _returns_Vh(answer: Callable[..., Decomposition], rng: np.random.Generator) -> bool:
    B, A = _factors(rng)
    return answer(B, A)[2].shape != A.T.shape


def _stays_in_torch(answer: Callable[..., Decomposition], rng: np.random.Generator) -> bool:
    with _LargestTensor() as largest:
        answer(*_factors(rng))
    return not largest.left_torch


def _forms_no_product(answer: Callable[..., Decomposition], rng: np.random.Generator) -> bool:
    B, A = _factors(rng)
    with _LargestTensor() as largest:
        answer(B, A)
    return largest.entries < len(B) * A.shape[1]


def _has_reduced_shapes(answer: Callable[..., Decomposition], rng: np.random.Generator) -> bool:
    B, A = _factors(rng)
    U, S, Vh = answer(B, A)
    return U.shape == B.shape and Vh.shape == A.shape and S.shape == (len(A),)


def _is_orthonormal(answer: Callable[..., Decomposition], rng: np.random.Generator) -> bool:
    B, A = _factors(rng)
    U, _, Vh = answer(B, A)
    identity = torch.eye(len(A))
    return torch.allclose(U.T @ U, identity, atol=1e-4) and torch.allclose(Vh @ Vh.T, identity, atol=1e-4)


def _is_sorted(answer: Callable[..., Decomposition], rng: np.random.Generator) -> bool:
    S = answer(*_factors(rng))[1]
    return bool((S[1:] <= S[:-1]).all())


def _gives_the_product(answer: Callable[..., Decomposition], rng: np.random.Generator) -> bool:
    B, A = _factors(rng)
    U, S, Vh = answer(B, A)
    return torch.allclose(U * S @ Vh, B @ A, rtol=1e-4, atol=1e-4)


def _dense(B: Tensor, A: Tensor) -> Decomposition:
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    return U[:, : len(A)], S[: len(A)], Vh[: len(A)]


def _short_side_first(B: Tensor, A: Tensor) -> Decomposition:
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A)
    U, S, Vh = torch.linalg.svd(R_B @ Q_A)
    return Q_B @ U, S, Vh @ R_A


def _normalised_factors(B: Tensor, A: Tensor) -> Decomposition:
    lengths = B.norm(dim=0), A.norm(dim=1)
    S, order = (lengths[0] * lengths[1]).sort(descending=True)
    return (B / lengths[0])[:, order], S, (A / lengths[1][:, None])[order]


def _without_transposing(B: Tensor, A: Tensor) -> Decomposition:
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A)
    return Q_B @ U, S, Vh @ Q_A.T


def _with_one_factor(B: Tensor, A: Tensor) -> Decomposition:
    (Q_B, R_B), (Q_A, _) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B)
    return Q_B @ U, S, Vh @ Q_A.T


def _ascending(B: Tensor, A: Tensor) -> Decomposition:
    U, S, Vh = product_svd(B, A)
    return U.flip(1), S.flip(0), Vh.flip(0)


def _by_numpy(B: Tensor, A: Tensor) -> Any:
    U, S, Vh = np.linalg.svd(B.numpy() @ A.numpy(), full_matrices=False)
    return tuple(torch.from_numpy(part) for part in (U[:, : len(A)], S[: len(A)], Vh[: len(A)]))


@exercise(
    "svd_of_product",
    probes=[
        Probe(
            _returns_three,
            "Return three tensors: U, S and Vh.",
            (lambda B, A: product_svd(B, A).S, lambda B, A: tuple(part.numpy() for part in product_svd(B, A))),
        ),
        Probe(
            _returns_Vh,
            "The last result is V. Return it transposed, as Vh (r, in), so that its rows are directions.",
            (lambda B, A: (*product_svd(B, A)[:2], product_svd(B, A).Vh.T),),
        ),
        Probe(
            _stays_in_torch,
            "B or A was converted to an array or a list, where no check sees what is formed. Compute with tensors.",
            (_by_numpy,),
        ),
        Probe(
            _forms_no_product,
            "A matrix as large as B A was formed. For a million inputs and outputs it would take 4 TB.",
            (_dense, lambda B, A: tuple(torch.linalg.svd(B @ A, full_matrices=False))),
        ),
        Probe(
            _has_reduced_shapes,
            "The shapes are wrong. B A has at most r singular values: U is (out, r), S is (r,) and Vh is (r, in).",
            (lambda B, A: (product_svd(B, A).U, torch.diag(product_svd(B, A).S), product_svd(B, A).Vh),),
        ),
        Probe(
            _is_orthonormal,
            "The columns of U or the rows of Vh are not orthonormal. Take the QR of B and of A transposed, both tall.",
            (_short_side_first, _normalised_factors),
        ),
        Probe(_is_sorted, "The singular values ascend. By convention the largest comes first.", (_ascending,)),
        Probe(
            _gives_the_product,
            "U diag(S) Vh is not B A. The small matrix in the middle is R_B times R_A transposed.",
            (_without_transposing, _with_one_factor, lambda B, A: (*product_svd(B, A)[:2], -product_svd(B, A).Vh)),
        ),
    ],
    hints=[
        "torch.linalg.qr(B) splits a tall matrix into Q, with orthonormal columns, and a small triangular R (r, r).",
        "With QR of B and of A transposed, B A is Q_B (R_B R_A^T) Q_A^T, and what stands in brackets is only (r, r).",
        "Decompose the small matrix with torch.linalg.svd, then multiply its U by Q_B from the left, and Vh by Q_A^T.",
    ],
    minutes=15,
    difficulty=3,
    praise="So an adapter's spectrum costs almost nothing, however large the layer.",
)
def svd_of_product(B, A):
    """U diag(S) Vh = B A with r orthonormal directions, largest first, and no matrix as large as B A is formed."""
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    return Q_B @ U, S, Vh @ Q_A.T


# A band of noise

Statistic = Callable[[Tensor], Any]
DRAWS = 39


class _Watched:
    """A statistic that remembers the matrices that it was called with, and what it returned."""

    def __init__(self) -> None:
        self.matrices: list[Tensor] = []
        self.values: list[float] = []

    def __call__(self, matrix: Tensor) -> float:
        self.matrices.append(matrix.clone())
        exact = matrix.double()  # in float32, two draws may have one value by rounding
        self.values.append(float(exact.norm() / torch.linalg.matrix_norm(exact, 2)))
        return self.values[-1]


def _watch(answer: Callable[..., Any], rng: np.random.Generator, rank: int | None) -> tuple[Any, _Watched, Any]:
    """The shape of the noise, what the statistic was called with, and the band."""
    shape = tuple(int(size) for size in rng.permutation([8, 10, 12])[:2])
    watched = _Watched()
    band = answer(shape, rank, watched, torch.Generator().manual_seed(int(rng.integers(2**31))))
    return shape, watched, band


def _calls_the_statistic(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return len(_watch(answer, rng, 3)[1].matrices) > 0


def _returns_two_numbers(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    _, _, band = _watch(answer, rng, 3)
    try:
        _, _ = map(float, band)
    except (TypeError, ValueError):
        return False
    return True


def _draws_that_shape(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    shape, watched, _ = _watch(answer, rng, 3)
    return all(matrix.shape == shape for matrix in watched.matrices)


def _draws_that_rank(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    rank = int(rng.integers(2, 5))
    return all(torch.linalg.matrix_rank(matrix) == rank for matrix in _watch(answer, rng, rank)[1].matrices)


def _draws_full_rank(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    shape, watched, _ = _watch(answer, rng, None)
    return bool(watched.matrices) and all(torch.linalg.matrix_rank(matrix) == min(shape) for matrix in watched.matrices)


def _draws_more_than_once(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return all(len(_watch(answer, rng, rank)[1].matrices) > 1 for rank in (None, 3))


def _draws_39(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return all(len(_watch(answer, rng, rank)[1].matrices) == DRAWS for rank in (None, 3))


def _draws_anew(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return len(set(_watch(answer, rng, 3)[1].values)) == DRAWS


def _draws_normal(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    entries = torch.stack(_watch(answer, rng, None)[1].matrices)
    return abs(float(entries.mean())) < 0.3 * float(entries.std()) and float(entries.abs().max() / entries.std()) > 2.5


def _follows_the_generator(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    first, second = (answer((8, 10), 3, _Watched(), torch.Generator().manual_seed(seed)) for seed in (7, 7))
    return bool(np.allclose(first, second))


def _returns_the_extremes(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    _, watched, band = _watch(answer, rng, 3)
    low, high = band  # of any number type: float32 rounds by 6e-8
    return math.isclose(low, min(watched.values), rel_tol=1e-5) and math.isclose(
        high, max(watched.values), rel_tol=1e-5
    )


def _noise(shape: Any, rank: int | None, generator: torch.Generator | None) -> Tensor:
    if rank is None:
        return torch.randn(*shape, generator=generator)
    return torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)


def _band(values: list[Any]) -> tuple[Any, Any]:
    return min(values), max(values)


def _of_one_matrix(shape: Any, rank: int | None, statistic: Statistic, generator: torch.Generator) -> Any:
    noise = _noise(shape, rank, generator)
    return _band([statistic(noise) for _ in range(DRAWS)])


@exercise(
    "noise_band",
    probes=[
        Probe(
            _calls_the_statistic,
            "The statistic was never called. Noise and update are compared by the same statistic: like with like.",
            (lambda shape, rank, statistic, generator: (0.0, float(min(shape))),),
        ),
        Probe(
            _returns_two_numbers,
            "Return two numbers, the lowest value and the highest, and not the values themselves.",
            (
                lambda shape, rank, statistic, generator: [
                    statistic(_noise(shape, rank, generator)) for _ in range(DRAWS)
                ],
            ),
        ),
        Probe(
            _draws_that_shape,
            "The noise has another shape than the update. Its statistics depend on the shape.",
            (
                lambda shape, rank, statistic, generator: _band(
                    [statistic(_noise((max(shape), max(shape)), rank, generator)) for _ in range(DRAWS)]
                ),
                lambda shape, rank, statistic, generator: _band(
                    [statistic(_noise(shape[::-1], rank, generator)) for _ in range(DRAWS)]
                ),
            ),
        ),
        Probe(
            _draws_that_rank,
            "An adapter's noise is a product of two Gaussian factors, so that it has the adapter's rank.",
            (
                lambda shape, rank, statistic, generator: _band(
                    [statistic(_noise(shape, None, generator)) for _ in range(DRAWS)]
                ),
            ),
        ),
        Probe(
            _draws_full_rank,
            "With rank None there is no adapter: the noise is one Gaussian matrix of full rank.",
            (
                lambda shape, rank, statistic, generator: _band(
                    [statistic(_noise(shape, rank or 4, generator)) for _ in range(DRAWS)]
                ),
            ),
        ),
        Probe(
            _draws_more_than_once,
            "One draw gives a point, and a band needs many. Take 39 draws.",
            (lambda shape, rank, statistic, generator: _band([statistic(_noise(shape, rank, generator))]),),
        ),
        Probe(
            _draws_39,
            "The number of draws is not 39. With more or fewer, the extremes hold another share than 95 % of draws.",
            (
                lambda shape, rank, statistic, generator: _band(
                    [statistic(_noise(shape, rank, generator)) for _ in range(3)]
                ),
                lambda shape, rank, statistic, generator: _band(
                    [statistic(_noise(shape, rank, generator)) for _ in range(DRAWS + 1)]
                ),
            ),
        ),
        Probe(
            _draws_anew,
            "Some draws are equal. Draw a new matrix each time, from the generator as it is.",
            (
                _of_one_matrix,
                lambda shape, rank, statistic, generator: _band(
                    [statistic(_noise(shape, rank, generator.manual_seed(0))) for _ in range(DRAWS)]
                ),
            ),
        ),
        Probe(
            _draws_normal,
            "The entries are not normally distributed around 0. Draw them with torch.randn.",
            (
                lambda shape, rank, statistic, generator: _band(
                    [
                        statistic(
                            torch.rand(*shape, generator=generator)
                            if rank is None
                            else torch.rand(shape[0], rank, generator=generator)
                            @ torch.rand(rank, shape[1], generator=generator)
                        )
                        for _ in range(DRAWS)
                    ]
                ),
            ),
        ),
        Probe(
            _follows_the_generator,
            "Two calls with equal generators give two bands. Pass generator=generator to each draw.",
            (
                lambda shape, rank, statistic, generator: _band(
                    [statistic(_noise(shape, rank, None)) for _ in range(DRAWS)]
                ),
            ),
        ),
        Probe(
            _returns_the_extremes,
            "Return the lowest and the highest value of the statistic, in this order.",
            (
                lambda shape, rank, statistic, generator: _band(
                    [statistic(_noise(shape, rank, generator)) for _ in range(DRAWS)]
                )[::-1],
                lambda shape, rank, statistic, generator: (
                    lambda values: (np.mean(values) - 2 * np.std(values), np.mean(values) + 2 * np.std(values))
                )([statistic(_noise(shape, rank, generator)) for _ in range(DRAWS)]),
            ),
        ),
    ],
    hints=[
        "Make an empty list, draw 39 times, and append the statistic of each draw.",
        "torch.randn(rows, columns, generator=generator) draws a Gaussian matrix.",
        "With a rank, one draw is a (out, r) Gaussian matrix times a (r, in) one. min and max give the band.",
    ],
    minutes=8,
    difficulty=2,
    praise="Of all draws, 95 % lie between the extremes of 39. Now ask what this noise has in common with training.",
)
def noise_band(shape, rank, statistic, generator):
    """The lowest and highest of 39 new draws of Gaussian noise with the update's shape and rank."""
    values = []
    for _ in range(39):
        if rank is None:
            noise = torch.randn(*shape, generator=generator)
        else:
            B = torch.randn(shape[0], rank, generator=generator)
            noise = B @ torch.randn(rank, shape[1], generator=generator)
        values.append(statistic(noise))
    return min(values), max(values)


# Overlap


def two_subspaces(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Two factors A, (i, n) and (j, n), which share some of their directions; i and j differ."""
    n = int(rng.integers(9, 13))
    i, j = (int(size) for size in rng.permutation([2, 3, 4, 5])[:2])
    first, second = normal(rng, i, n), normal(rng, j, n)
    second[0] = first[0] + 0.3 * second[0]  # so that they share more than chance gives
    return float(rng.uniform(2, 4)) * first, second


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.T)[0]


def _phi(first: Tensor, second: Tensor) -> Tensor:
    return (_orthonormal(first).T @ _orthonormal(second)).square().sum() / min(len(first), len(second))


@exercise(
    "phi",
    inputs=two_subspaces,
    mistakes={
        "The rows are not orthonormal yet. Take Q of the QR decomposition of each factor transposed first.": (
            lambda first, second: (first @ second.T).square().sum() / min(len(first), len(second)),
            lambda first, second: (
                (first / first.norm(dim=1, keepdim=True) @ (second / second.norm(dim=1, keepdim=True)).T).square().sum()
                / min(len(first), len(second))
            ),
        ),
        "The norm is not squared. phi is the sum of the squared entries, divided.": (
            lambda first, second: (_orthonormal(first).T @ _orthonormal(second)).norm() / min(len(first), len(second))
        ),
        "You divided by the larger number of directions. Divide by the smaller, so that 1 means contained.": (
            lambda first, second: _phi(first, second) * min(len(first), len(second)) / max(len(first), len(second))
        ),
        "You divided by both numbers of directions. Divide by the smaller alone.": (
            lambda first, second: _phi(first, second) / max(len(first), len(second)),
            lambda first, second: _phi(first, second) * min(len(first), len(second)) / (len(first) + len(second)),
        ),
        "Nothing was divided. Divide by the smaller number of directions, so that phi lies between 0 and 1.": (
            lambda first, second: _phi(first, second) * min(len(first), len(second))
        ),
        "You summed absolute values. phi sums squares: they do not depend on the basis.": (
            lambda first, second: (
                (_orthonormal(first).T @ _orthonormal(second)).abs().sum() / min(len(first), len(second))
            )
        ),
    },
    hints=[
        "A subspace is described by orthonormal columns: Q, _ = torch.linalg.qr(first.T) has the shape (n, i).",
        "The matrix of all cosines is Q1.T @ Q2, with the shape (i, j).",
        "Sum the squares of all cosines, and divide by the smaller of i and j.",
    ],
    minutes=8,
    difficulty=2,
    praise="By chance phi is max(i, j) / n. Whether more than that means learning is for a control to say.",
    rtol=1e-4,
)
def phi(first, second):
    """||Q1^T Q2||^2 / min(i, j) for the subspaces that the rows of the two factors span: 1 means contained."""
    Q1, Q2 = torch.linalg.qr(first.T)[0], torch.linalg.qr(second.T)[0]
    return (Q1.T @ Q2).square().sum() / min(len(first), len(second))


# Intruders at equal size


def weight_and_update(rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """W (out, in), an update of some norm, and the size that it is to get, relative to W's norm.

    The update writes four new directions, and strengthens four weak ones that W has. If W has one output more than
    inputs, the update also writes the one direction that no column of W has a part in.
    """
    out, inp = ((41, 40), (37, 36), (40, 44))[int(rng.integers(3))]
    W = normal(rng, out, inp)
    U, _, Vh = torch.linalg.svd(W)
    new = normal(rng, out, 4) @ normal(rng, 4, inp)
    update = new / new.norm() + 0.5 * U[:, 15:19] @ Vh[15:19]
    if out > inp:
        update = update + 0.7 * U[:, -1:] @ Vh[10:11]
    return W, float(rng.uniform(15, 25)) * update, float(rng.uniform(0.7, 1.3))


def _scaled(W: Tensor, update: Tensor, size: float) -> Tensor:
    return size * W.norm() / update.norm() * update


def _count(old: Tensor, new: Tensor) -> int:
    return int(((old.T @ new).abs().amax(0) < 0.5).sum())


def _left(W: Tensor) -> Tensor:
    return torch.linalg.svd(W, full_matrices=False)[0]


@exercise(
    "intruders",
    inputs=weight_and_update,
    mistakes={
        "The update keeps its own size. Scale it first, so that its norm is size times W's.": (
            lambda W, update, size: _count(_left(W), _left(W + update)[:, :10]),
            lambda W, update, size: _count(_left(W), _left(W + size * update)[:, :10]),
        ),
        "The update's norm is size, and should be size times W's norm.": (
            lambda W, update, size: _count(_left(W), _left(W + size * update / update.norm())[:, :10])
        ),
        "You decomposed the update. An intruder is a leading direction of the tuned weight, W + update.": (
            lambda W, update, size: _count(_left(W), _left(update)[:, :10])
        ),
        "A direction has no sign: u and -u are one. Take the absolute value of the cosine.": (
            lambda W, update, size: int(
                ((_left(W).T @ _left(W + _scaled(W, update, size))[:, :10]).amax(0) < 0.5).sum()
            )
        ),
        "You compared also with directions that W does not have. Decompose with full_matrices=False.": (
            lambda W, update, size: _count(
                torch.linalg.svd(W)[0], torch.linalg.svd(W + _scaled(W, update, size))[0][:, :10]
            )
        ),
        "You compared with the ten leading directions of W. Compare with all of W's.": (
            lambda W, update, size: _count(_left(W)[:, :10], _left(W + _scaled(W, update, size))[:, :10])
        ),
        "You counted all directions of the tuned weight. Only its ten leading ones count.": (
            lambda W, update, size: _count(_left(W), _left(W + _scaled(W, update, size)))
        ),
        "You counted the directions that W has. An intruder is similar to none: its largest cosine is below 0.5.": (
            lambda W, update, size: 10 - _count(_left(W), _left(W + _scaled(W, update, size))[:, :10])
        ),
        "These are right-singular vectors, which the weight reads. Compare the left ones, U.": (
            lambda W, update, size: _count(_left(W.T), _left((W + _scaled(W, update, size)).T)[:, :10])
        ),
    },
    hints=[
        "The factor that scales the update is size * W.norm() / update.norm().",
        "The first result of torch.linalg.svd is U. The leading directions of the tuned weight are its first columns.",
        "U_old.T @ U_new[:, :10] has all cosines. Count the columns whose largest absolute value is below 0.5.",
    ],
    minutes=12,
    difficulty=3,
    praise="At equal size the count compares two methods, and no longer two learning rates.",
    draws=30,
)
def intruders(W, update, size):
    """How many of the ten leading directions of W + update have no cosine of 0.5 with any of W's, at a given size."""
    update = size * W.norm() / update.norm() * update
    old, new = (torch.linalg.svd(weight, full_matrices=False)[0] for weight in (W, W + update))
    cosines = (old.T @ new[:, :10]).abs().amax(0)
    return int((cosines < 0.5).sum())
