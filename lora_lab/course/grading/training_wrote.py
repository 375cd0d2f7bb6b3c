"""Hidden tests of lesson 11: what training wrote into the weights."""

from __future__ import annotations

import math

import torch

from lora_lab.course.grading.invariant import Reflection, close, invariant_of


@invariant_of("noise_band")
def draws_39_matrices(noise_band, rng):
    """The statistic is called with 39 different matrices of the update's shape, of its rank or of full rank."""
    for shape, rank in (((8, 12), 3), ((10, 7), None), ((7, 9), 2)):
        seen = []
        noise_band(shape, rank, lambda matrix: float(seen.append(matrix.clone()) or matrix.norm()), torch.Generator())  # noqa: B023
        ranks = {int(torch.linalg.matrix_rank(matrix)) for matrix in seen}
        different = len({float(matrix[0, 0]) for matrix in seen})
        if {tuple(matrix.shape) for matrix in seen} != {shape} or ranks != {rank or min(shape)} or different != 39:
            return False
        if len(seen) != 39:
            return False
    return True


@invariant_of("noise_band")
def draws_gaussian_noise(noise_band, rng):
    """The noise is Gaussian around 0, and the generator alone decides it."""
    seen, bands = [], []
    for seed in (5, 5, 6):
        torch.rand(1)  # a draw elsewhere does not matter
        watch = lambda matrix: float(seen.append(matrix.clone()) or matrix.norm())  # noqa: E731
        bands.append([float(each) for each in noise_band((8, 10), None, watch, torch.Generator().manual_seed(seed))])
    entries = torch.stack(seen)
    even = abs(float(entries.mean())) < 0.1 * float(entries.std()) and float(abs(entries).max() / entries.std()) > 2.5
    return even and close(bands[0], bands[1]) and not close(bands[0], bands[2])


@invariant_of("noise_band")
def ends_at_the_extremes(noise_band, rng):
    """The result is the lowest and the highest value of the statistic, in this order."""
    values = []
    low, high = noise_band(
        (6, 9), 2, lambda matrix: values.append(float(matrix.norm())) or values[-1], torch.Generator()
    )
    return len(values) > 5 and close([float(low), float(high)], [min(values), max(values)])


@invariant_of("phi")
def knows_a_subspace_again(phi, rng):
    """It is 1 if one subspace contains the other, whatever the basis, and smaller than 1 for others."""
    rows = torch.from_numpy(rng.normal(size=(4, 11)))
    mixed, other = torch.from_numpy(rng.normal(size=(2, 4))) @ rows, torch.from_numpy(rng.normal(size=(2, 11)))
    return close([float(phi(rows, mixed)), float(phi(mixed, rows))], [1, 1]) and 0 < float(phi(rows, other)) < 0.99


@invariant_of("phi")
def is_zero_for_strangers(phi, rng):
    """It is 0 for perpendicular subspaces, and larger than 0 for others."""
    Q = torch.linalg.qr(torch.from_numpy(rng.normal(size=(11, 11))))[0]
    mixed = torch.from_numpy(rng.normal(size=(2, 2))) @ Q[:2]
    return abs(float(phi(mixed, Q[4:7]))) < 1e-6 and float(phi(mixed, Q[1:4])) > 0.1


@invariant_of("phi")
def is_the_share_of_the_smaller(phi, rng):
    """In between it is the sum of the squared cosines of the principal angles, over the smaller dimension."""
    for sizes in ((2, 4), (5, 3)):
        first, second = (torch.from_numpy(rng.normal(size=(size, 9))) for size in sizes)
        projections = [rows.T @ torch.linalg.inv(rows @ rows.T) @ rows for rows in (first, second)]
        if not close(float(phi(first, second)), float((projections[0] @ projections[1]).trace()) / min(sizes)):
            return False
    return True


@invariant_of("svd_of_product")
def gives_the_product(svd_of_product, rng):
    """U (out, r) times S (r) times Vh (r, in) is B A."""
    B, A = (torch.from_numpy(rng.normal(size=shape)).float() for shape in ((40, 4), (4, 50)))
    U, S, Vh = svd_of_product(B, A)
    shapes = (tuple(U.shape), tuple(S.shape), tuple(Vh.shape))
    return shapes == ((40, 4), (4,), (4, 50)) and close(U * S @ Vh, B @ A)


@invariant_of("svd_of_product")
def has_orthonormal_directions(svd_of_product, rng):
    """The columns of U and the rows of Vh are orthonormal, and S, positive, begins with the largest."""
    B, A = (torch.from_numpy(rng.normal(size=shape)).float() for shape in ((40, 4), (4, 50)))
    U, S, Vh = svd_of_product(B, A)
    sorted_ = bool((S[1:] <= S[:-1]).all()) and bool((S > 0).all())
    return (
        sorted_
        and bool((abs(U.T @ U - torch.eye(4)) < 1e-4).all())
        and bool((abs(Vh @ Vh.T - torch.eye(4)) < 1e-4).all())
    )


@invariant_of("svd_of_product")
def forms_nothing_large(svd_of_product, rng):
    """No matrix as large as B A is formed, and nothing leaves torch."""
    from torch.overrides import TorchFunctionMode

    sizes = [0.0]

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            parts = result if isinstance(result, tuple) else (result,)
            sizes.extend(part.numel() for part in parts if isinstance(part, torch.Tensor))
            sizes.extend([math.inf] * (function.__name__ in ("numpy", "tolist", "__array__", "__dlpack__")))
            return result

    B, A = (torch.from_numpy(rng.normal(size=shape)).float() for shape in ((40, 4), (4, 50)))
    with Watch():
        U, _, Vh = svd_of_product(B, A)
    return U.shape == (40, 4) and Vh.shape == (4, 50) and max(sizes) < 40 * 50


@invariant_of("intruders")
def depends_on_the_size_alone(intruders, rng):
    """The count depends on the size given, not on the update's norm: it is 0 at a tiny size, large at a large one."""
    W, update = (torch.from_numpy(rng.normal(size=(30, 34))).float() for _ in range(2))
    counts = [float(intruders(W, factor * update, 1.0)) for factor in (0.01, 1.0, 300.0)]
    return len(set(counts)) == 1 and intruders(W, update, 1e-4) == 0 and intruders(W, update, 50.0) > 5


@invariant_of("intruders")
def counts_leading_strangers(intruders, rng):
    """It counts which of the ten leading left directions of the sum have no cosine of 0.5 with any of W's."""
    for out, inp in [(36, 44), *[(41, 40), (37, 36)] * 8]:
        W, new = (torch.from_numpy(rng.normal(size=size)) for size in ((out, inp), (out, 4)))
        U, _, Vh = torch.linalg.svd(W)
        new = new @ torch.from_numpy(rng.normal(size=(4, inp)))
        update = new / new.norm() + 0.5 * U[:, 15:19] @ Vh[15:19] + 0.7 * U[:, -1:] @ Vh[10:11]
        tuned = W + 0.9 * W.norm() / update.norm() * update
        left, old = (torch.linalg.eigh(each @ each.T)[1].flip(1) for each in (tuned, W))
        cosines = (old[:, : min(out, inp)].T @ left[:, :10]).abs()
        if intruders(W, 7 * update, 0.9) != sum(bool(column.max() < 0.5) for column in cosines.T):
            return False
    return True


Reflection(
    "11_what_training_wrote",
    question="A paper decomposes the weights after fine-tuning, shows that LoRA's change has directions that the "
    "pre-trained weight has not, and concludes that *LoRA has learned something else than full "
    "fine-tuning*. In five to eight sentences: which controls would you ask for, and which of the "
    "paper's numbers could be noise, or the optimiser?",
    rubric=(
        "The answer asks for a control that goes through the same optimiser and has nothing to learn.",
        "It says what noise of the same shape and rank gives for the same statistic.",
        "It says that size, or the learning rate, has to be equal, or why it matters.",
        "It names a measurement of the loss that would show that the directions matter.",
    ),
    expected="A run with the same data path, optimiser and rate but labels drawn from the base's own predictions "
    "has nothing to learn, and what it writes is no sign of learning. Noise of the same shape and rank "
    "has a band of values. New directions come with size, and size comes with the rate, so updates are "
    "compared at equal norm. If cutting the new directions leaves the loss as it is, they do not matter.",
)
