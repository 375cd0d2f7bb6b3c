"""Singular values, ranks and subspaces of matrices, and their values under pure noise.

    U, S, Vh = product_svd(B, A, scaling)          # of scaling * B @ A, from the factors
    effective_rank(S), stable_rank(S), energy_rank(S)
    subspace_similarity(Vh_8.mT, Vh_64.mT)         # Hu et al. 2021, equation 4
    intruder_dimensions(before, after)             # Shuttleworth et al. 2024
    by_chance(lambda g: stable_rank(singular_values(gaussian((192, 576), generator=g))))

Matrices of one shape may be stacked, (..., out, in), and are then processed as a batch. Half precision is computed in
float32, other dtypes in their own precision, :func:`singular_values` in float64. In place of a matrix its
decomposition (U, S, Vh) may be passed, as ``torch.linalg.svd(W, full_matrices=False)`` returns it, to avoid computing
it again.

The energy of a matrix is the sum of its squared singular values.

No statistic means anything without a baseline. A Gaussian matrix of 576 x 576 has 90 % of its energy in 294 directions,
the product of Gaussian factors of rank 8 in 7, and neither contains any signal: :func:`by_chance` returns the range of
a statistic without signal. That sets the scale, but a value outside the range does not show learning: for that, compare
with a training run of the same number of steps that has nothing to learn (lesson 11).

Shapes in the comments: an update of a weight from 576 to 192 (W is 192 x 576, k = 192) by an adapter of rank 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lab.system.schema import Share, check


class SVD(NamedTuple):
    """U diag(S) Vh, where the columns of U and the rows of Vh are orthonormal and S is in descending order."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the matrix: (..., out, in)."""
        return self.U.shape[:-1] + self.Vh.shape[-1:]


Matrix = Tensor | tuple[Tensor, Tensor, Tensor]


# Decompositions


def product_svd(B: Tensor, A: Tensor, scaling: float | Tensor = 1.0) -> SVD:
    r"""Return the exact SVD of scaling * B A, computed from the factors without forming their product.

    With the QR decompositions B = Q_B R_B and A^T = Q_A R_A, only the small matrix R_B R_A^T remains to be decomposed.

    Args:
        B: (..., out, rank).
        A: (..., rank, in).
        scaling: the adapter's, positive; for a stack also a tensor (...) with one value per matrix.

    Returns:
        U (..., out, k), S (..., k), Vh (..., k, in), where k is the smallest of out, rank and in.

    Raises:
        ValueError: the shapes do not match, a factor has entries that are not finite, or the scaling is not positive.
    """
    _check_matrix(B, "B")
    _check_matrix(A, "A")
    if B.mT.shape[:-1] != A.shape[:-1]:  # (..., rank) of both
        raise ValueError(f"B is {tuple(B.shape)}, A {tuple(A.shape)}; they must be (..., out, rank), (..., rank, in).")
    scaling = torch.as_tensor(scaling, dtype=torch.float64)  # ()
    if not (scaling.isfinite() & (scaling > 0)).all():
        raise ValueError(f"scaling is {scaling.tolist()}, but it must be a positive number.")
    dtype = torch.promote_types(_work_dtype(B), _work_dtype(A))
    Q_B, R_B = torch.linalg.qr(B.to(dtype))  # (192, 8), (8, 8)
    Q_A, R_A = torch.linalg.qr(A.mT.to(dtype))  # (576, 8), (8, 8)
    small = R_B @ R_A.mT * scaling[..., None, None].to(R_B)  # (8, 8)
    _check_matrix(small, "scaling * B A")
    U, S, Vh = torch.linalg.svd(small, full_matrices=False)  # (8, 8), (8,), (8, 8)
    # Q_B U, transposed: with its short side first the product takes less time.
    return SVD((U.mT @ Q_B.mT).mT, S, Vh @ Q_A.mT)  # (192, 8), (8,), (8, 576)


def svd(W: Matrix) -> SVD:
    """Return the exact SVD of a matrix (..., out, in); a decomposition is checked and returned.

    Raises:
        ValueError: W is no matrix of floating-point numbers, is on the meta device, or has entries that are not
            finite; or it is a tuple other than (U, S, Vh).
    """
    if isinstance(W, tuple):
        return _check_decomposition(W)
    _check_matrix(W, "W")
    return SVD(*torch.linalg.svd(W.to(_work_dtype(W)), full_matrices=False))  # (192, 192), (192,), (192, 576)


def singular_values(W: Matrix) -> Tensor:
    r"""Return the singular values (..., k) alone, from the eigenvalues of the smaller of W W^T and W^T W, in float64.

    Several times as fast as :func:`svd`. Squaring halves the number of correct digits: values below about 1e-8 of the
    largest are noise (in float32 it would be 3e-4). Those of a decomposition are its S as it is.

    Raises:
        ValueError: as for :func:`svd`.
    """
    if isinstance(W, tuple):
        return _check_decomposition(W).S
    _check_matrix(W, "W")
    wide = W.double()  # (192, 576)
    if wide.shape[-2] > wide.shape[-1]:
        wide = wide.mT
    scale = wide.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)  # (1, 1)
    wide = wide / scale  # so that squares neither overflow nor vanish
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.mT)  # (192,) ascending
    return eigenvalues.flip(-1).clamp_min(0).sqrt() * scale[..., 0]  # (192,)


class Approximation(NamedTuple):
    """Factors B (..., out, r) and A (..., r, in) of an approximation of W, and ``error``, ||W - B A||_F / ||W||_F."""

    B: Tensor
    A: Tensor
    error: Tensor


def truncate(W: Matrix, rank: int) -> Approximation:
    """Return the best approximation of rank r, as factors of the same scale: B = U sqrt(S), A = sqrt(S) Vh.

    No matrix of rank r is closer to W, in the Frobenius or the spectral norm (Eckart and Young 1936).

    Args:
        W: (..., out, in), or its SVD.
        rank: r, from 1 to the smaller of out and in.

    Returns:
        B (..., out, r), A (..., r, in), error (...).

    Raises:
        ValueError: the rank is out of range, or as for :func:`svd`.
    """
    U, S, Vh = svd(W)
    _check_rank(rank, S.shape[-1])
    error = _ratio(S[..., rank:].norm(dim=-1), S.norm(dim=-1))  # ()
    U, S, Vh = U[..., :rank], S[..., :rank], Vh[..., :rank, :]  # (192, 8), (8,), (8, 576)
    root = S.sqrt()  # (8,)
    B, A = U * root[..., None, :], root[..., None] * Vh  # (192, 8), (8, 576)
    return Approximation(B.contiguous(), A.contiguous(), error)


# Statistics of singular values. Each takes S (..., k), in any order, returns (...), and is 0 for a matrix of zeros.


def effective_rank(S: Tensor) -> Tensor:
    """Return exp(entropy) of S / sum(S): k equal values give k (Roy and Vetterli 2007, definition 1)."""
    S = _spectrum(S)  # (192,)
    share = _ratio(S, S.sum(-1, keepdim=True))  # (192,)
    nonzero = S.sum(-1) > 0  # ()
    return torch.special.entr(share).sum(-1).exp() * nonzero


def stable_rank(S: Tensor) -> Tensor:
    """Return ||W||_F^2 over ||W||_2^2: at most the rank, and hardly affected by small values."""
    S = _spectrum(S)  # (192,)
    return _ratio(S, S.amax(-1, keepdim=True)).square().sum(-1)


def energy_rank(S: Tensor, share: float = 0.9) -> Tensor:
    """Return the smallest number of directions that hold the given share of the energy.

    The energy is the sum of the squared singular values.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """
    share = check(share, Share, "share")
    S = _spectrum(S).sort(-1, descending=True).values  # (192,)
    energy = _ratio(S, S[..., :1]).square().cumsum(-1)  # (192,), in units of the largest
    total = energy[..., -1:]  # (1,)
    # With a tolerance, so that rounding in the last sums does not add directions.
    enough = share * total * (1 - S.shape[-1] * torch.finfo(S.dtype).eps)  # (1,)
    return (energy < enough).sum(-1) + (total[..., 0] > 0)


# Subspaces. V (..., n, i) has i orthonormal columns, as U[..., :i] and Vh[..., :i, :].mT of an SVD.


def subspace_similarity(V1: Tensor, V2: Tensor) -> Tensor:
    r"""Return phi(i, j) = ||V1[:, :i]^T V2[:, :j]||_F^2 / min(i, j), for all i and j (Hu et al. 2021, equation 4).

    1 if the smaller subspace lies within the larger one, 0 if they are orthogonal, and max(i, j) / n on average for
    random subspaces.

    Args:
        V1: (..., n, i), orthonormal columns, the most important first.
        V2: (..., n, j), the same.

    Returns:
        (..., i, j).

    Raises:
        ValueError: the shapes do not match, or the columns are not orthonormal.
    """
    V1, V2 = _checked_bases(V1, V2)
    shared = (V1.mT @ V2).square().cumsum(-1).cumsum(-2)  # (8, 64)
    i = torch.arange(1, V1.shape[-1] + 1, device=V1.device)  # (8,)
    j = torch.arange(1, V2.shape[-1] + 1, device=V1.device)  # (64,)
    return (shared / torch.minimum(i[:, None], j)).clamp_max(1)  # (8, 64)


class Amplification(NamedTuple):
    """How much an update amplifies the weight along the update's leading directions (Hu et al. 2021, table 7).

    ``factor`` is ||delta||_F over ``projected``, the norm of U^T W V with the update's leading directions U and V.
    For comparison, ``largest`` is this norm with W's leading directions, the maximum over all directions, and
    ``random`` the norm with random directions, which carry no signal.
    """

    factor: Tensor
    delta: Tensor
    projected: Tensor
    largest: Tensor
    random: Tensor


def amplification(delta: Matrix, W: Matrix, rank: int) -> Amplification:
    """Return how much an update amplifies directions that the weight does not emphasise (Hu et al. 2021, section 7.3).

    Args:
        delta: the update (..., out, in), or its SVD.
        W: the weight before the update (..., out, in), or its SVD.
        rank: number of leading directions.

    Raises:
        ValueError: the shapes differ, the rank is out of range, or as for :func:`svd`.
    """
    size, projected, weight = _size_and_projection(delta, W, rank)
    generator = torch.Generator().manual_seed(0)
    left, right = (orthonormal(n, rank, generator=generator).to(weight) for n in weight.shape[-2:])  # 2 x (n, 8)
    largest = singular_values(W)[..., :rank].norm(dim=-1).to(weight.dtype)  # ()
    random = torch.linalg.matrix_norm(left.T @ weight @ right)  # ()
    return Amplification(_ratio(size, projected), size, projected, largest, random)


def amplification_factor(delta: Matrix, W: Matrix, rank: int) -> Tensor:
    """Return the factor of :func:`amplification` alone, for which the weight need not be decomposed.

    Args:
        delta, W, rank: as there.

    Raises:
        ValueError: as there.
    """
    size, projected, _ = _size_and_projection(delta, W, rank)
    return _ratio(size, projected)


def _size_and_projection(delta: Matrix, W: Matrix, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the update's norm, that of the weight in the update's leading directions, and the weight as a tensor.

    Raises:
        ValueError: as for :func:`amplification`.
    """
    update = svd(delta)
    _check_rank(rank, update.S.shape[-1])
    if isinstance(W, tuple):
        U_of_W, S_of_W, Vh_of_W = _check_decomposition(W)
        W = (U_of_W * S_of_W[..., None, :]) @ Vh_of_W  # (192, 576)
    _check_matrix(W, "W")
    if W.shape != update.shape:
        raise ValueError(f"The weight is {tuple(W.shape)}, but the update {tuple(update.shape)}; they must be equal.")
    W = W.to(torch.promote_types(_work_dtype(W), update.S.dtype))
    U, Vh = update.U[..., :rank].to(W.dtype), update.Vh[..., :rank, :].to(W.dtype)  # (192, 8), (8, 576)
    projected = torch.linalg.matrix_norm(U.mT @ W @ Vh.mT)  # ()
    return update.S.to(W.dtype).norm(dim=-1), projected, W  # (), (), (192, 576)


class Intruders(NamedTuple):
    """Leading directions of a tuned weight that the weight before training does not have.

    ``cosines`` has one entry for each leading direction of the tuned weight, the strongest first: its cosine with the
    most similar direction of the old weight. ``count`` of them are below epsilon, and ``energy_share`` is the share of
    the tuned weight's energy in those directions. ``floor`` is that cosine of a random direction, on average: unless
    epsilon is well above it, the count means nothing. A direction that is spread evenly over the old ones counts as an
    intruder, although it lies in their span.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride] - hides tuple.count, which has no use here
    energy_share: Tensor
    cosines: Tensor
    floor: float


def intruder_dimensions(before: Matrix, after: Matrix, top: int = 10, epsilon: float = 0.5) -> Intruders:
    """Return which leading left singular vectors are similar to none of the old weight (Shuttleworth et al. 2024).

    Args:
        before: the weight (..., out, in) before training, or its SVD, not truncated.
        after: the weight after training, update included, or its SVD.
        top: number of leading directions to examine.
        epsilon: a direction is an intruder if all its cosines are below this.

    Raises:
        ValueError: the shapes differ, ``top`` or ``epsilon`` is out of range, or as for :func:`svd`.
    """
    epsilon = check(epsilon, Share, "epsilon")
    old, new = svd(before), svd(after)
    if old.shape != new.shape:
        raise ValueError(f"The weights have the shapes {tuple(old.shape)} and {tuple(new.shape)}; they must be equal.")
    _check_rank(top, new.S.shape[-1], "top")
    dtype = torch.promote_types(old.U.dtype, new.U.dtype)
    cosines = (new.U[..., :top].mT.to(dtype) @ old.U.to(dtype)).abs().amax(-1)  # (10, 192) -> (10,)
    intrudes = cosines < epsilon  # (10,)
    energy = new.S.square()  # (192,)
    share = _ratio((energy[..., :top] * intrudes).sum(-1), energy.sum(-1))  # ()
    return Intruders(intrudes.sum(-1), share, cosines, random_cosine(*old.U.shape[-2:]))


def random_cosine(width: int, directions: int | None = None) -> float:
    """Return the largest cosine between a random direction and the vectors of an orthonormal basis, on average.

    A little less than sqrt(2 ln(n) / n) for a basis of n vectors in n dimensions: 0.137 for n = 576, 0.328 for n = 64.

    Args:
        width: dimensions of the space.
        directions: vectors of the basis; default: ``width``.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, width, generator=generator, dtype=torch.float64)  # (200, 192)
    # The basis is the first axes, which loses nothing: all bases are alike to a random direction.
    return float((vectors[:, : directions or width].abs().amax(-1) / vectors.norm(dim=-1)).mean())


# Random matrices, and the range of a statistic under pure noise


def gaussian(shape: tuple[int, ...], *, norm: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Return a matrix or a stack of matrices without signal: independent normal entries, scaled to a Frobenius norm."""
    W = torch.randn(shape, generator=generator, dtype=torch.float64)  # (192, 576)
    return W * (norm / torch.linalg.matrix_norm(W, keepdim=True))


def gaussian_factors(
    shape: tuple[int, ...], rank: int, *, norm: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return noise in the form of an adapter: Gaussian B (out, r) and A (r, in), scaled so that ||B A||_F is ``norm``.

    Raises:
        ValueError: the rank is 0, for which there are no factors.
    """
    B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)  # (192, 8)
    A = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)  # (8, 576)
    size = product_svd(B, A).S.norm()  # ()
    return B * (norm / size), A


def orthonormal(n: int, k: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Return a random k-dimensional subspace of n dimensions, uniform over all of them: (n, k), orthonormal columns."""
    _check_rank(k, n, "k")
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q  # (576, 8)


DRAWS = 39  # of noise, for a band


class Band(NamedTuple):
    """The range under pure noise: 95 % of draws lie between ``low`` and ``high``; ``mean`` is the mean of the draws."""

    low: Tensor
    mean: Tensor
    high: Tensor

    def __contains__(self, value: Any) -> bool:
        return bool(((self.low <= value) & (value <= self.high)).all())


def by_chance(draw: Callable[[torch.Generator], Tensor]) -> Band:
    """Return the band that holds a statistic of pure noise with 95 % probability, from 39 draws of it.

    Another draw lies below or above all of n draws with probability 2 / (n + 1), whatever the distribution: of 39 the
    lowest and the highest bound exactly 95 %.

    Args:
        draw: computes the statistic of a random matrix, drawn with the generator passed to it.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([torch.as_tensor(draw(generator)) for _ in range(DRAWS)]).double()  # (39, ...)
    return Band(values.amin(0), values.mean(0), values.amax(0))


# Checks


def _work_dtype(W: Tensor) -> torch.dtype:
    return torch.promote_types(W.dtype, torch.float32)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, or 0 where the whole is 0."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1), 0)


def _check_matrix(W: Tensor, name: str) -> None:
    if not W.is_floating_point() or W.ndim < 2 or W.numel() == 0 or W.is_meta:
        raise ValueError(f"{name} is {tuple(W.shape)} of {W.dtype} on {W.device}; it must hold floats (..., out, in).")
    if not all(bound.isfinite() for bound in W.aminmax()):  # one pass; NaN propagates
        raise ValueError(f"{name} has entries that are NaN or infinite; check whether training diverged.")


def _check_decomposition(decomposition: tuple[Tensor, Tensor, Tensor]) -> SVD:
    U, S, Vh = decomposition
    if not S.shape == Vh.shape[:-1] == U.mT.shape[:-1]:  # (..., k) of each
        shapes = [tuple(part.shape) for part in decomposition]
        raise ValueError(f"The shapes {shapes} are not those of U (..., out, k), S (..., k), Vh (..., k, in).")
    return SVD(U, S, Vh)


def _spectrum(S: Tensor) -> Tensor:
    """Return S in the dtype to compute in.

    Raises:
        ValueError: S holds no floating-point numbers (..., k), or one of them is no singular value.
    """
    if S.is_meta or not (S.is_floating_point() and S.ndim and S.numel()):
        raise ValueError(f"S is {tuple(S.shape)} of {S.dtype} on {S.device}; it must be singular values, as svd(W).S.")
    if not (S.isfinite() & (S >= 0)).all():
        raise ValueError("S has entries that are negative, NaN or infinite, so they are no singular values.")
    return S.to(_work_dtype(S))


def _check_rank(rank: int, largest: int, name: str = "rank") -> None:
    if not 1 <= rank <= largest:
        raise ValueError(f"{name} is {rank}, but for this matrix it must be from 1 to {largest}.")


def _checked_bases(V1: Tensor, V2: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the dtype to compute in, after checks."""
    for V, name in ((V1, "V1"), (V2, "V2")):
        _check_matrix(V, name)
        wide = V.to(_work_dtype(V))  # (576, 8)
        deviation = (wide.mT @ wide - torch.eye(V.shape[-1], dtype=wide.dtype, device=V.device)).abs().max()
        # Rounding unit columns to half precision changes their products by eps at most.
        if deviation > max(1e3 * torch.finfo(wide.dtype).eps, 2 * torch.finfo(V.dtype).eps):
            raise ValueError(f"The columns of {name} are not orthonormal; pass U or Vh.mT of an SVD, or a Q of qr.")
    dtype = torch.promote_types(_work_dtype(V1), _work_dtype(V2))
    return V1.to(dtype), V2.to(dtype)
