"""Singular values and what they say: ranks, subspaces, and how much of it chance alone would show.

    U, S, Vh = product_svd(B, A, scaling)          # of scaling * B @ A, from the factors
    effective_rank(S), stable_rank(S), energy_rank(S)
    subspace_similarity(Vh_8.mT, Vh_64.mT)         # Hu et al. 2021, equation 4
    intruder_dimensions(before, after)             # Shuttleworth et al. 2024
    by_chance(lambda g: stable_rank(singular_values(gaussian((192, 576), generator=g))))

Tensors come in, tensors go out; matrices of one shape may be stacked, (..., out, in), and are then worked on together.
Half precision is computed in float32, everything else as it is given. A matrix may be replaced by its decomposition
(U, S, Vh), as ``torch.linalg.svd(W, full_matrices=False)`` names it, which saves doing it again.

No statistic means anything by itself. A rank-8 product of Gaussian factors has 90 % of its energy in 7 directions
and a Gaussian matrix of 576 x 576 has it in 294, with nothing learned in either: :func:`by_chance` says what numbers
come from no signal at all.

Shapes in the comments: an update of a weight from 576 to 192 (W is 192 x 576, k = 192) by an adapter of rank 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class SVD(NamedTuple):
    """A = U diag(S) Vh with orthonormal columns of U and rows of Vh, S falling."""

    U: Tensor
    S: Tensor
    Vh: Tensor


Matrix = Tensor | tuple[Tensor, Tensor, Tensor]


# Decompositions


def product_svd(B: Tensor, A: Tensor, scaling: float | Tensor = 1.0) -> SVD:
    r"""The exact SVD of scaling * B A, from the factors; the product itself is never made.

    With B = Q_B R_B and A^T = Q_A R_A, all that is left to decompose is the small R_B R_A^T.

    Args:
        B: (..., out, rank).
        A: (..., rank, in).
        scaling: of the adapter; positive. For a stack it may be a tensor (...), one for each.

    Returns:
        U (..., out, k), S (..., k), Vh (..., k, in), where k is the smallest of out, rank and in.

    Raises:
        ValueError: the shapes do not fit, or a factor has entries that are not finite.
    """
    _check(B, "B"), _check(A, "A")
    if B.shape[:-2] != A.shape[:-2] or B.shape[-1] != A.shape[-2]:
        raise ValueError(
            f"B has shape {tuple(B.shape)} and A {tuple(A.shape)}, but B must be (out, rank) and A (rank, in)."
        )
    scaling = torch.as_tensor(scaling, dtype=torch.float64)  # ()
    if not (scaling.isfinite() & (scaling > 0)).all():
        raise ValueError(f"scaling is {scaling.tolist()}, but it must be a positive number.")
    dtype = torch.promote_types(_work_dtype(B), _work_dtype(A))
    Q_B, R_B = torch.linalg.qr(B.to(dtype))  # (192, 8), (8, 8)
    Q_A, R_A = torch.linalg.qr(A.mT.to(dtype))  # (576, 8), (8, 8)
    small = R_B @ R_A.mT  # (8, 8)
    small = small * scaling[..., None, None].to(small)  # (8, 8)
    U, S, Vh = torch.linalg.svd(small, full_matrices=False)  # (8, 8), (8,), (8, 8)
    return SVD(Q_B @ U, S, Vh @ Q_A.mT)  # (192, 8), (8,), (8, 576)


def svd(W: Matrix) -> SVD:
    """The exact SVD of a matrix (..., out, in), or the one that was given.

    Raises:
        ValueError: not a matrix, not of floating-point numbers, on the meta device, or not finite; or a tuple of other
            tensors than U, S and Vh.
    """
    if isinstance(W, tuple):
        return _given(W)
    _check(W, "W")
    return SVD(*torch.linalg.svd(W.to(_work_dtype(W)), full_matrices=False))  # (192, 192), (192,), (192, 576)


def singular_values(W: Matrix) -> Tensor:
    r"""Only the singular values (..., k), in float64, through the eigenvalues of the smaller of W W^T and W^T W.

    Several times as fast as :func:`svd`. Squaring halves the digits: values below about 1e-8 of the largest are
    noise. That is why product and eigenvalues are in float64 (float32 would lose all below 3e-4).

    Raises:
        ValueError: as for :func:`svd`.
    """
    if isinstance(W, tuple):
        return _given(W).S
    _check(W, "W")
    wide = W.double()  # (192, 576)
    if wide.shape[-2] > wide.shape[-1]:
        wide = wide.mT
    scale = wide.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)  # (1, 1)
    wide = wide / scale  # so that squares neither overflow nor vanish
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.mT)  # (192,) rising
    return eigenvalues.flip(-1).clamp_min(0).sqrt() * scale[..., 0]  # (192,)


class Approximation(NamedTuple):
    """W is about B @ A, of rank r; ``error`` is the Frobenius norm of what is missing over that of W."""

    B: Tensor
    A: Tensor
    error: Tensor


def truncate(
    W: Matrix, rank: int, *, randomized: bool = False, generator: torch.Generator | None = None
) -> Approximation:
    """The best approximation of a rank, as factors of like size: B = U sqrt(S), A = sqrt(S) Vh.

    No matrix of that rank is nearer to W, in Frobenius and in spectral norm (Eckart and Young 1936).

    Args:
        W: (..., out, in), or its SVD.
        rank: r, from 1 to the smaller of out and in.
        randomized: look for the leading directions with random vectors (Halko et al. 2011, algorithm 4.4, 6 power
            iterations). Worth it for large matrices with quickly falling spectra; see ``error``, which is always exact.
        generator: of the random vectors; default one of its own, seeded with 0.

    Returns:
        B (..., out, r), A (..., r, in), error (...).

    Raises:
        ValueError: the rank is out of range, or as for :func:`svd`.
    """
    if randomized and isinstance(W, Tensor):
        _check(W, "W")
        _check_rank(rank, min(W.shape[-2:]))
        U, S, Vh = _randomized_svd(W.to(_work_dtype(W)), rank, generator)
        missing = torch.linalg.matrix_norm(W.to(S.dtype) - U * S[..., None, :] @ Vh)  # ()
        whole = torch.linalg.matrix_norm(W.to(S.dtype))  # ()
    else:
        U, S, Vh = svd(W)
        _check_rank(rank, S.shape[-1])
        missing, whole = S[..., rank:].norm(dim=-1), S.norm(dim=-1)  # (), ()
        U, S, Vh = U[..., :rank], S[..., :rank], Vh[..., :rank, :]  # (192, 8), (8,), (8, 576)
    root = S.sqrt()  # (8,)
    B, A = U * root[..., None, :], root[..., None] * Vh  # (192, 8), (8, 576)
    return Approximation(B.contiguous(), A.contiguous(), _ratio(missing, whole))


def _randomized_svd(W: Tensor, rank: int, generator: torch.Generator | None) -> SVD:
    """The leading part of the SVD, from what W does to random vectors, sharpened by six passes forth and back."""
    generator = generator or torch.Generator(W.device).manual_seed(0)
    more = min(rank + 20, *W.shape[-2:])  # vectors; the surplus makes it likely that none is missed
    shape = (*W.shape[:-2], W.shape[-1], more)
    X = torch.randn(shape, generator=generator, device=W.device, dtype=W.dtype)  # (576, 28)
    Q = torch.linalg.qr(W @ X).Q  # (192, 28)
    for _ in range(6):
        Q = torch.linalg.qr(W.mT @ Q).Q  # (576, 28)
        Q = torch.linalg.qr(W @ Q).Q  # (192, 28)
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)  # (28, 28), (28,), (28, 576)
    return SVD((Q @ U)[..., :rank], S[..., :rank], Vh[..., :rank, :])  # (192, 8), (8,), (8, 576)


# What singular values say. All take S (..., k), in any order, and give (...); all are 0 for a matrix of zeros.


def effective_rank(S: Tensor) -> Tensor:
    """exp(entropy) of S / sum(S): k equal values give k (Roy and Vetterli 2007, definition 1)."""
    S = _spectrum(S)  # (192,)
    share = _ratio(S, S.sum(-1, keepdim=True))  # (192,)
    some = S.sum(-1) > 0  # ()
    return torch.special.entr(share).sum(-1).exp() * some


def stable_rank(S: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm: never above the rank, and hardly moved by small values."""
    S = _spectrum(S)  # (192,)
    return _ratio(S, S.amax(-1, keepdim=True)).square().sum(-1)


def energy_rank(S: Tensor, share: float = 0.9) -> Tensor:
    """How many directions hold that share of the energy, the sum of squared singular values; a whole number.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, but it must be above 0 and at most 1.")
    S = _spectrum(S).sort(-1, descending=True).values  # (192,)
    energy = _ratio(S, S[..., :1]).square().cumsum(-1)  # (192,), in units of the largest
    total = energy[..., -1:]  # (1,)
    # What rounding leaves out of the last sums is no direction of its own.
    enough = share * total * (1 - S.shape[-1] * torch.finfo(S.dtype).eps)  # (1,)
    return (energy < enough).sum(-1) + (total[..., 0] > 0)


class Norms(NamedTuple):
    """Of a matrix, from its singular values: root of the sum of squares, the largest, the sum."""

    frobenius: Tensor
    spectral: Tensor
    nuclear: Tensor


def norms(S: Tensor) -> Norms:
    """Frobenius, spectral and nuclear norm."""
    S = _spectrum(S)  # (192,)
    return Norms(S.norm(dim=-1), S.amax(-1), S.sum(-1))


# Subspaces. V (..., n, i) has i orthonormal columns, as U[..., :i] and Vh[..., :i, :].mT of an SVD.


def subspace_similarity(V1: Tensor, V2: Tensor) -> Tensor:
    r"""phi(i, j) = ||V1[:, :i]^T V2[:, :j]||_F^2 / min(i, j) for all i and j at once (Hu et al. 2021, equation 4).

    1 where the smaller subspace lies within the larger, 0 where they are orthogonal. Subspaces by chance have
    max(i, j) / n on average.

    Args:
        V1: (..., n, i), orthonormal columns, the most important first.
        V2: (..., n, j), the same.

    Returns:
        (..., i, j).

    Raises:
        ValueError: other shapes, or columns that are not orthonormal.
    """
    _check_bases(V1, V2)
    shared = (V1.mT @ V2).square().cumsum(-1).cumsum(-2)  # (8, 64)
    i = torch.arange(1, V1.shape[-1] + 1, device=V1.device)  # (8,)
    j = torch.arange(1, V2.shape[-1] + 1, device=V1.device)  # (64,)
    return (shared / torch.minimum(i[:, None], j)).clamp_max(1)  # (8, 64)


def principal_angles(V1: Tensor, V2: Tensor) -> Tensor:
    """Angles between two subspaces in radians, the smallest first: (..., min(i, j)).

    Small ones come from sines and large ones from cosines, so that each keeps its digits (Knyazev and Argentati 2002,
    algorithm 3.1).

    Raises:
        ValueError: as for :func:`subspace_similarity`.
    """
    _check_bases(V1, V2)
    if V1.shape[-1] < V2.shape[-1]:
        V1, V2 = V2, V1
    cross = V1.mT @ V2  # (64, 8)
    cosines = torch.linalg.svdvals(cross).clamp(0, 1)  # (8,) falling
    sines = torch.linalg.svdvals(V2 - V1 @ cross).clamp(0, 1).flip(-1)  # (8,) rising
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())  # (8,)


class Amplification(NamedTuple):
    """How much an update strengthens what the weight does in the update's own directions (Hu et al. 2021, table 7).

    ``factor`` is ||delta||_F over ``projected``, the norm of U^T W V with the update's leading directions U and V.
    Beside it the norms with W's own leading directions (no others have more) and with random ones (no signal).
    """

    factor: Tensor
    delta: Tensor
    projected: Tensor
    largest: Tensor
    random: Tensor


def amplification(delta: Matrix, W: Matrix, rank: int, *, generator: torch.Generator | None = None) -> Amplification:
    """Whether an update amplifies directions that the weight has, but does not stress (Hu et al. 2021, section 7.3).

    Args:
        delta: the update (..., out, in), or its SVD.
        W: the weight before (..., out, in), or its SVD.
        rank: how many leading directions.
        generator: of the random directions, which are drawn on the CPU; default one of its own, seeded with 0.

    Raises:
        ValueError: the shapes differ, the rank is out of range, or as for :func:`svd`.
    """
    U, S, Vh = svd(delta)
    _check_rank(rank, S.shape[-1])
    own = singular_values(W)  # (192,)
    if isinstance(W, tuple):
        W = (W[0] * W[1][..., None, :]) @ W[2]  # (192, 576)
    W = W.to(torch.promote_types(_work_dtype(W), S.dtype))
    if W.shape != (*U.shape[:-1], Vh.shape[-1]):
        raise ValueError(
            f"The weight has shape {tuple(W.shape)} and the update {(*U.shape[:-1], Vh.shape[-1])}; they must be alike."
        )
    U, Vh = U[..., :rank].to(W.dtype), Vh[..., :rank, :].to(W.dtype)  # (192, 8), (8, 576)
    generator = generator or torch.Generator().manual_seed(0)
    left, right = (orthonormal(n, rank, generator=generator).to(W) for n in W.shape[-2:])  # (192, 8), (576, 8)
    norm = torch.linalg.matrix_norm
    projected, size = norm(U.mT @ W @ Vh.mT), S.to(W.dtype).norm(dim=-1)  # (), ()
    return Amplification(
        _ratio(size, projected), size, projected, own[..., :rank].norm(dim=-1).to(W.dtype), norm(left.T @ W @ right)
    )


class Intruders(NamedTuple):
    """Which leading directions of a tuned weight the weight before does not have.

    ``count`` of the ``cosines`` (one for each leading direction of the tuned weight, the strongest first: how much it
    resembles the direction of the old weight that it resembles most) are below epsilon. ``energy_share`` is the part
    of the tuned weight's energy in them. ``floor`` is the cosine that a random direction has on average: where
    epsilon is not well above it, the count says nothing, and every direction that is spread out evenly is "intruding",
    though it lies in the old weight's span like any other.
    """

    count: Tensor
    energy_share: Tensor
    cosines: Tensor
    floor: float


def intruder_dimensions(before: Matrix, after: Matrix, top: int = 10, epsilon: float = 0.5) -> Intruders:
    """Leading left singular vectors of the tuned weight that resemble none of the old one (Shuttleworth et al. 2024).

    Args:
        before: the weight (..., out, in) before training, or its SVD, whole.
        after: the weight after it, update included, or its SVD.
        top: how many leading directions are looked at.
        epsilon: a direction whose every cosine is below intrudes.

    Raises:
        ValueError: the shapes differ, ``top`` or ``epsilon`` is out of range, or as for :func:`svd`.
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}, but it must be above 0 and at most 1.")
    old, new = svd(before), svd(after)
    if old.U.shape[:-1] != new.U.shape[:-1] or old.Vh.shape[-1] != new.Vh.shape[-1]:
        raise ValueError(
            f"The weights have {tuple(old.U.shape[:-1])} and {tuple(new.U.shape[:-1])} rows and {old.Vh.shape[-1]} and "
            f"{new.Vh.shape[-1]} columns; they must be alike."
        )
    _check_rank(top, new.S.shape[-1], "top")
    dtype = torch.promote_types(old.U.dtype, new.U.dtype)
    cosines = (new.U[..., :top].mT.to(dtype) @ old.U.to(dtype)).abs().amax(-1)  # (10, 192) -> (10,)
    foreign = cosines < epsilon  # (10,)
    energy = new.S.square()  # (192,)
    share = _ratio((energy[..., :top] * foreign).sum(-1), energy.sum(-1))  # ()
    return Intruders(foreign.sum(-1), share, cosines, random_cosine(old.U.shape[-2], old.U.shape[-1]))


def random_cosine(width: int, directions: int | None = None, *, draws: int = 200) -> float:
    """The largest cosine between a random direction and the axes of an orthonormal basis, on average.

    About sqrt(2 ln(n) / n) for n directions of a space as wide: 0.137 of 576, 0.328 of 64.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(draws, width, generator=generator, dtype=torch.float64)  # (200, 192)
    # The basis may as well be the first axes: a random direction looks the same from everywhere.
    return float((drawn[:, : directions or width].abs().amax(-1) / drawn.norm(dim=-1)).mean())


# Chance


def gaussian(shape: tuple[int, ...], *, norm: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """A matrix (or a stack of them) without signal: independent normal entries, scaled to a Frobenius norm."""
    W = torch.randn(shape, generator=generator, dtype=torch.float64)  # (192, 576)
    return W * (norm / torch.linalg.matrix_norm(W, keepdim=True))


def gaussian_factors(
    shape: tuple[int, int], rank: int, *, norm: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) without signal, whose product has a Frobenius norm: the null of an adapter."""
    B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)  # (192, 8)
    A = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)  # (8, 576)
    size = product_svd(B, A).S.norm()  # ()
    return B * (norm / size), A


def orthonormal(n: int, k: int, *, generator: torch.Generator | None = None) -> Tensor:
    """A random subspace of n dimensions: (n, k), orthonormal columns, every direction as likely as any other."""
    _check_rank(k, n, "k")
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q  # (576, 8)


class Band(NamedTuple):
    """What chance gives: 95 of 100 draws lie between low and high; ``mean`` of the draws."""

    low: Tensor
    mean: Tensor
    high: Tensor

    def __contains__(self, value: object) -> bool:
        return bool(((self.low <= value) & (value <= self.high)).all())


def by_chance(draw: Callable[[torch.Generator], Tensor], draws: int = 39, seed: int = 0) -> Band:
    """The band in which a statistic lies with 95 % when there is no signal, from draws of it.

    A next draw is below all of n or above all of n with a probability of 2 / (n + 1), whatever the distribution. So
    the k-th lowest and k-th highest of 40 k - 1 draws bound 95 % exactly, and 39 are the fewest that do.

    Args:
        draw: computes the statistic of something random, drawn with the generator it is given.
        draws: 39 or more.
        seed: of the generator.

    Raises:
        ValueError: too few draws.
    """
    if draws < 39:
        raise ValueError(f"draws is {draws}, but a band of 95 % needs 39 at least.")
    generator = torch.Generator().manual_seed(seed)
    found = torch.stack([torch.as_tensor(draw(generator)) for _ in range(draws)]).double()  # (39, ...)
    ordered, k = found.sort(0).values, (draws + 1) // 40
    return Band(ordered[k - 1], found.mean(0), ordered[-k])


# Checks


def _work_dtype(W: Tensor) -> torch.dtype:
    return torch.promote_types(W.dtype, torch.float32)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where the whole is 0."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1), 0)


def _check(W: Tensor, name: str) -> None:
    if not isinstance(W, Tensor) or not W.dtype.is_floating_point or W.ndim < 2 or 0 in W.shape:
        given = f"{tuple(W.shape)} of {W.dtype}" if isinstance(W, Tensor) else type(W).__name__
        raise ValueError(f"{name} is {given}, but it must be a matrix (..., out, in) of floating-point numbers.")
    if W.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, where there are no numbers; give a matrix that has some.")
    least, most = W.aminmax()  # one pass, and NaN comes through
    if not (least.isfinite() and most.isfinite()):
        raise ValueError(
            f"{name} has {int((~W.isfinite()).sum())} entries that are NaN or infinite; training diverged?"
        )


def _given(decomposed: tuple) -> SVD:
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else part for part in decomposed]
    try:
        (*several, _, k), spectrum, (*others, rows, _) = shapes
        fits = several == others and (*several, k) == spectrum and rows == k
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"A tuple of {shapes} was given, but a decomposition is U (..., out, k), S (..., k), Vh (..., k, in)."
        )
    return SVD(*decomposed)


def _spectrum(S: Tensor) -> Tensor:
    if not isinstance(S, Tensor) or not S.dtype.is_floating_point or S.ndim < 1 or S.shape[-1] == 0:
        given = f"{tuple(S.shape)} of {S.dtype}" if isinstance(S, Tensor) else type(S).__name__
        raise ValueError(f"S is {given}, but it must be singular values (..., k), as svd(W).S gives them.")
    if S.device.type == "meta":
        raise ValueError("S is on the meta device, where there are no numbers; give singular values that are some.")
    if not (S.isfinite() & (S >= 0)).all():
        raise ValueError("S has entries that are negative, NaN or infinite, so it holds no singular values.")
    return S.to(_work_dtype(S))


def _check_rank(rank: int, most: int, name: str = "rank") -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(f"{name} is {rank!r}, but this matrix allows whole numbers from 1 to {most}.")


def _check_bases(V1: Tensor, V2: Tensor) -> None:
    for V, name in ((V1, "V1"), (V2, "V2")):
        _check(V, name)
        far = (V.mT @ V - torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)).abs().max()
        if far > 1e3 * torch.finfo(V.dtype).eps:
            raise ValueError(
                f"The columns of {name} {tuple(V.shape)} are not orthonormal (off by {float(far):.1e}); give U or "
                "Vh.mT of an SVD, or the Q of torch.linalg.qr."
            )
    if V1.shape[-2] != V2.shape[-2]:
        raise ValueError(f"V1 has columns of {V1.shape[-2]} numbers and V2 of {V2.shape[-2]}; they must be alike.")
