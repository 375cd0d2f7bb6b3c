"""Exercises of lesson 11: what training wrote into the weights."""

import math

import numpy as np  # noqa: F401
import torch
from torch.nn import functional as F  # noqa: F401
from torch.overrides import TorchFunctionMode

from lora_lab.course.exercise import Exercise, Reflection, are, close, normal, works

# The SVD of a product, from its factors

PARTS, CORE = "(Q_B @ U, S, Vh @ Q_A.T)", "R_B @ R_A.T"

svd_of_product = Exercise(
    "svd_of_product",
    hints=[
        "torch.linalg.qr(B) splits a tall matrix into Q, with orthonormal columns, and a small triangular R (r, r).",
        "With QR of B and of A transposed, B A is Q_B (R_B R_A^T) Q_A^T, and what stands in brackets is only (r, r).",
        "Decompose the small matrix with torch.linalg.svd, then multiply its U by Q_B from the left, and Vh by Q_A^T.",
    ],
    praise="So an adapter's spectrum costs almost nothing, however large the layer.",
)


def factors(rng):
    """B (out, r) and A (r, in), whose product is much larger than both."""
    out, inp, _ = rng.permutation([40, 50, 60]).tolist()
    rank = int(rng.integers(3, 6))
    return normal(rng, out, rank), normal(rng, rank, inp)


def largest_formed(answer, B, A):
    """The number of entries of the largest tensor that is formed; infinite if numbers leave torch, where none sees."""
    sizes = [0.0]

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            parts = result if isinstance(result, tuple) else (result,)
            sizes.extend(part.numel() for part in parts if isinstance(part, torch.Tensor))
            sizes.extend([math.inf] * (function.__name__ in ("numpy", "tolist", "__array__", "__dlpack__")))
            return result

    with Watch():
        answer(B, A)
    return max(sizes)


@svd_of_product.must(
    "The shapes do not fit. Take the QR of B and of A.T, both tall. U is Q_B @ (r, r), and Vh is (r, r) @ Q_A.T.",
    ("qr(A.T)", "qr(A)"),
    ("Vh @ Q_A.T", "Vh @ Q_A"),
    ("Q_B @ U", "U @ Q_B"),
)
def multiplies_what_fits(svd_of_product, rng):
    try:
        svd_of_product(*factors(rng))
    except RuntimeError as error:
        return "shapes cannot be multiplied" not in str(error)
    return True


@svd_of_product.must(
    "Return three tensors: U, S and Vh.",
    (PARTS, "S"),
    (PARTS, f"tuple(part.numpy() for part in {PARTS})"),
)
def has_three_tensors(svd_of_product, rng):
    return are(svd_of_product(*factors(rng)), 3, torch.Tensor)


@svd_of_product.must(
    "The last result is V. Return it transposed, as Vh (r, in), so that its rows are directions.",
    ("Vh @ Q_A.T", "Q_A @ Vh.T"),
)
def has_V_transposed(svd_of_product, rng):
    B, A = factors(rng)
    return svd_of_product(B, A)[2].shape != A.T.shape


DENSE = "U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)\n"
NUMPY = "U, S, Vh = map(torch.from_numpy, np.linalg.svd(B.numpy() @ A.numpy(), full_matrices=False))\n"
CUT = "return U[:, :len(A)], S[:len(A)], Vh[:len(A)]"


@svd_of_product.must(
    "B or A was converted to an array or a list, where no check sees what is formed. Compute with tensors.",
    NUMPY + CUT,
)
def stays_in_torch(svd_of_product, rng):
    return largest_formed(svd_of_product, *factors(rng)) < math.inf


@svd_of_product.must(
    "A matrix as large as B A was formed, by B @ A or by an svd without full_matrices=False. Work with (r, r) alone.",
    DENSE + CUT,
    DENSE + "return U, S, Vh",
)
def forms_no_product(svd_of_product, rng):
    B, A = factors(rng)
    return largest_formed(svd_of_product, B, A) < len(B) * A.shape[1]


@svd_of_product.must(
    "The shapes are wrong. B A has at most r singular values: U is (out, r), S is (r,) and Vh is (r, in).",
    (PARTS, "(Q_B @ U, torch.diag(S), Vh @ Q_A.T)"),
)
def forms_nothing_large(svd_of_product, rng):
    """No matrix as large as B A is formed, and nothing leaves torch."""
    B, A = factors(rng)
    U, S, Vh = svd_of_product(B, A)
    shapes = (U.shape, S.shape, Vh.shape) == (B.shape, (len(A),), A.shape)
    return shapes and forms_no_product(svd_of_product, rng)


def orthonormal(columns):
    """Whether the columns of a matrix are orthonormal."""
    return (abs(columns.T @ columns - torch.eye(columns.shape[1])) < 1e-4).all()


@svd_of_product.must(
    "The columns of U or the rows of Vh are not orthonormal. Take the QR of B and of A transposed, both tall.",
    ("qr(A.T)", "qr(A)", CORE, "R_B @ Q_A", "Vh @ Q_A.T", "Vh @ R_A"),
    """
    lengths = B.norm(dim=0), A.norm(dim=1)
    S, order = (lengths[0] * lengths[1]).sort(descending=True)
    return (B / lengths[0])[:, order], S, (A / lengths[1][:, None])[order]
    """,
)
def has_orthonormal_parts(svd_of_product, rng):
    U, _, Vh = svd_of_product(*factors(rng))
    return orthonormal(U) and orthonormal(Vh.T)


@svd_of_product.must(
    "The singular values of a product are not the products of those of its factors. Decompose R_B @ R_A.T.",
    """
    U, S_B, _ = torch.linalg.svd(B, full_matrices=False)
    _, S_A, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, S_B * S_A, Vh
    """,
)
def multiplies_no_singular_values(svd_of_product, rng):
    B, A = factors(rng)
    return not close(svd_of_product(B, A)[1], torch.linalg.svdvals(B) * torch.linalg.svdvals(A))


@svd_of_product.must(
    "The singular values ascend. By convention the largest comes first.",
    (PARTS, "((Q_B @ U).flip(1), S.flip(0), (Vh @ Q_A.T).flip(0))"),
)
def has_orthonormal_directions(svd_of_product, rng):
    """The columns of U and the rows of Vh are orthonormal, and S, positive, begins with the largest."""
    U, S, Vh = svd_of_product(*factors(rng))
    return (S[1:] <= S[:-1]).all() and (S > 0).all() and orthonormal(U) and orthonormal(Vh.T)


@svd_of_product.must(
    "U diag(S) Vh is not B A. The small matrix in the middle is R_B times R_A transposed.",
    (CORE, "R_B @ R_A"),
    (CORE, "R_B"),
    ("Vh @ Q_A.T", "-Vh @ Q_A.T"),
)
def gives_the_product(svd_of_product, rng):
    """U (out, r) times S (r) times Vh (r, in) is B A."""
    B, A = factors(rng)
    U, S, Vh = svd_of_product(B, A)
    return (U.shape, S.shape, Vh.shape) == (B.shape, (len(A),), A.shape) and close(U * S @ Vh, B @ A)


# A band of noise

START, TIMES, IF_NONE, BAND = "values = []", "range(39)", "if rank is None:", "(min(values), max(values))"
DRAW_B = "B = torch.randn(shape[0], rank, generator=generator)"

noise_band = Exercise(
    "noise_band",
    hints=[
        "Make an empty list, draw 39 times, and append the statistic of each draw.",
        "torch.randn(rows, columns, generator=generator) draws a Gaussian matrix.",
        "With a rank, one draw is a (out, r) Gaussian matrix times a (r, in) one. min and max give the band.",
    ],
    praise="Of all draws, 95 % lie between the extremes of 39. Now ask what this noise has in common with training.",
)


def watched(noise_band, rng, rank):
    """The shape of the noise, the matrices that the statistic was called with, its values, and the band."""
    shape, matrices, values = tuple(rng.permutation([8, 10, 12])[:2].tolist()), [], []

    def statistic(matrix):
        matrices.append(matrix.clone())
        values.append(float(matrix.double().norm()))  # in float32, two draws may have one value by rounding
        return values[-1]

    band = noise_band(shape, rank, statistic, torch.Generator().manual_seed(int(rng.integers(2**31))))
    return shape, matrices, values, band


def ranks_of(matrices):
    """The ranks of some matrices of one shape."""
    return {*torch.linalg.matrix_rank(torch.stack(matrices)).tolist()}


def band_of(noise_band, seed):
    """The lowest and the highest largest entry of noise (8, 10) from a generator with that seed."""
    generator = torch.Generator().manual_seed(seed)
    return [float(each) for each in noise_band((8, 10), None, lambda matrix: float(matrix.max()), generator)]


@noise_band.must(
    "The statistic was never called. Noise and update are compared by the same statistic: like with like.",
    "return 0.0, float(min(shape))",
)
def calls_the_statistic(noise_band, rng):
    return len(watched(noise_band, rng, 3)[1]) > 0


@noise_band.must(
    "Return two numbers, the lowest value and the highest, and not the values themselves.", (BAND, "values")
)
def returns_two_numbers(noise_band, rng):
    return works(lambda: len([*map(float, watched(noise_band, rng, 3)[3])]) == 2, TypeError, ValueError)


@noise_band.must(
    "The noise has another shape than the update. Its statistics depend on the shape.",
    (START, f"{START}\n    shape = (max(shape), max(shape))"),
    (START, f"{START}\n    shape = shape[::-1]"),
)
def draws_that_shape(noise_band, rng):
    runs = [watched(noise_band, rng, rank) for rank in (None, 3)]
    return all({*(matrix.shape for matrix in matrices)} <= {shape} for shape, matrices, _, _ in runs)


@noise_band.must(
    "An adapter's noise is a product of two Gaussian factors, so that it has the adapter's rank.",
    (IF_NONE, "if True:"),
)
def draws_that_rank(noise_band, rng):
    rank = int(rng.integers(2, 5))
    return ranks_of(watched(noise_band, rng, rank)[1]) == {rank}


@noise_band.must(
    "With rank None there is no adapter: the noise is one Gaussian matrix of full rank.",
    (START, f"{START}\n    rank = rank or 4"),
)
def draws_full_rank(noise_band, rng):
    shape, matrices, _, _ = watched(noise_band, rng, None)
    return len(matrices) > 0 and ranks_of(matrices) == {min(shape)}


@noise_band.must("One draw gives a point, and a band needs many. Take 39 draws.", (TIMES, "range(1)"))
def draws_more_than_once(noise_band, rng):
    return all(len(watched(noise_band, rng, rank)[1]) > 1 for rank in (None, 3))


@noise_band.must(
    "The number of draws is not 39. With more or fewer, the extremes hold another share than 95 % of draws.",
    (TIMES, "range(3)"),
    (TIMES, "range(40)"),
)
def draws_39_times(noise_band, rng):
    return all(len(watched(noise_band, rng, rank)[1]) == 39 for rank in (None, 3))


@noise_band.must(
    "Some draws are equal. Draw a new matrix each time, from the generator as it is.",
    (TIMES, "range(1)", "values.append(statistic(noise))", "values = [statistic(noise) for _ in range(39)]"),
    (IF_NONE, f"generator.manual_seed(0)\n        {IF_NONE}"),
)
def draws_39_matrices(noise_band, rng):
    """The statistic is called with 39 different matrices of the update's shape, of its rank or of full rank."""
    values = [watched(noise_band, rng, rank)[2] for rank in (None, 3)]
    parts = draws_that_shape, draws_that_rank, draws_full_rank, draws_39_times
    return all(len(set(each)) == 39 for each in values) and all(part(noise_band, rng) for part in parts)


@noise_band.must(
    "B or A is the same in every draw. Draw both anew.",
    (START, f"{START}\n    {DRAW_B.replace('rank', 'rank or 1')}", DRAW_B, "pass"),
)
def draws_both_factors_anew(noise_band, rng):
    first, second = watched(noise_band, rng, 3)[1][:2]
    return (
        torch.linalg.matrix_rank(torch.cat([first, second]))
        == torch.linalg.matrix_rank(torch.hstack([first, second]))
        == 6
    )


@noise_band.must(
    "This is a Gaussian matrix cut to the rank, whose spectrum is too flat. Multiply two Gaussian factors.",
    (
        DRAW_B,
        "U, S, Vh = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)",
        "B @ torch.randn(rank, shape[1], generator=generator)",
        "U[:, :rank] * S[:rank] @ Vh[:rank]",
    ),
)
def draws_a_product(noise_band, rng):
    S = torch.linalg.svdvals(torch.stack(watched(noise_band, rng, 3)[1]))
    return (S[:, 2] / S[:, 0]).mean() < 0.55


def normally_distributed(matrices):
    """Whether the entries are spread around 0, and some lie far out, and no two rows or columns lean the same way."""
    entries = torch.stack(matrices)
    products = [(each @ each.mT).mean(0) for each in (entries, entries.mT)]
    leaning = [(each.sum() - each.trace()) / (len(each) - 1) / each.trace() for each in products]
    return max(map(abs, leaning)) < 0.3 and abs(entries).max() > 2.5 * entries.std()


@noise_band.must(
    "The entries are not normally distributed around 0. Draw them with torch.randn.",
    ("torch.randn", "torch.rand"),
    (DRAW_B, DRAW_B.replace("randn", "rand")),
)
def draws_normal_entries(noise_band, rng):
    return all(normally_distributed(watched(noise_band, rng, rank)[1]) for rank in (None, 3))


@noise_band.must(
    "Two generators give one band. Draw from the generator that is passed, not from one of your own.",
    (START, f"{START}\n    generator = torch.Generator()"),
)
def has_no_generator_of_its_own(noise_band, rng):
    return not close(band_of(noise_band, 5), band_of(noise_band, 6))


@noise_band.must(
    "Two calls with equal generators give two bands. Pass generator=generator to each draw.",
    ("generator=generator", "generator=None"),
)
def draws_gaussian_noise(noise_band, rng):
    """The noise is Gaussian around 0, and the generator alone decides it."""
    bands = [band_of(noise_band, seed) for seed in (5, 5, 6)]
    parts = draws_both_factors_anew, draws_a_product, draws_normal_entries
    return all(part(noise_band, rng) for part in parts) and close(*bands[:2]) and not close(*bands[1:])


@noise_band.must(
    "Return the lowest and the highest value of the statistic, in this order.",
    (BAND, "(max(values), min(values))"),
    (BAND, "(np.mean(values) - 2 * np.std(values), np.mean(values) + 2 * np.std(values))"),
)
def ends_at_the_extremes(noise_band, rng):
    """The result is the lowest and the highest value of the statistic, in this order."""
    _, _, values, (low, high) = watched(noise_band, rng, 3)
    return len(values) > 5 and close([float(low), float(high)], [min(values), max(values)])


# Overlap


def two_subspaces(rng):
    """Two factors A, (i, n) and (j, n), which share some of their directions; i and j differ.

    A quarter of them are small enough for a calculation by hand: axes, and a row between two of them.
    """
    if rng.integers(4) == 0:
        axes = torch.eye(4)[rng.permutation(4)]
        sizes = torch.from_numpy(rng.permutation([2, 3, 4])).float()
        one, two = sizes[:2, None] * axes[:2], torch.stack([sizes[2] * axes[0], axes[1] + axes[2], 2 * axes[3]])
        return (one, two) if rng.integers(2) else (two, one)
    n = int(rng.integers(9, 13))
    i, j = rng.permutation([2, 3, 4, 5])[:2].tolist()
    first, second = normal(rng, i, n), normal(rng, j, n)
    second[0] = first[0] + 0.3 * second[0]  # so that they share more than chance gives
    return float(rng.uniform(2, 4)) * first, second


BASES, SMALLER = "(torch.linalg.qr(first.T)[0], torch.linalg.qr(second.T)[0])", "min(len(first), len(second))"

phi = Exercise(
    "phi",
    inputs=two_subspaces,
    wrong={
        "The shapes do not fit. Directions are rows: take the QR of first.T, (n, i), and multiply Q1.T @ Q2, (i, j).": [
            (BASES, "(torch.linalg.qr(first)[0], torch.linalg.qr(second)[0])"),
            ("Q1.T @ Q2", "Q1 @ Q2.T"),
            ("Q1.T @ Q2", "Q1 @ Q2"),
        ],
        "torch.linalg.qr returns Q and R. Take Q alone: [0].": (
            (BASES, "(torch.linalg.qr(first.T), torch.linalg.qr(second.T))")
        ),
        "The rows are not orthonormal yet. Take Q of the QR decomposition of each factor transposed first.": [
            (BASES, "(first.T, second.T)"),
            (BASES, "(F.normalize(first).T, F.normalize(second).T)"),
        ],
        "Vh is a basis of the whole space by default. Its first i rows span the factor's: full_matrices=False.": (
            (BASES, "(torch.linalg.svd(first)[2].T, torch.linalg.svd(second)[2].T)")
        ),
        "The norm is not squared. phi is the sum of the squared entries, divided.": (".square().sum()", ".norm()"),
        "You divided by the larger number of directions. Divide by the smaller, so that 1 means contained.": (
            ("min(", "max(")
        ),
        "You divided by both numbers of directions. Divide by the smaller alone.": [
            (SMALLER, "(len(first) * len(second))"),
            (SMALLER, "(len(first) + len(second))"),
        ],
        "You divided by n, the length of a row. Divide by the smaller number of directions.": (
            SMALLER,
            "first.shape[1]",
        ),
        "Nothing was divided. Divide by the smaller number of directions, so that phi lies between 0 and 1.": (
            (f" / {SMALLER}", "")
        ),
        "You summed absolute values. phi sums squares: they do not depend on the basis.": ("square", "abs"),
    },
    hints=[
        "A subspace is described by orthonormal columns: Q, _ = torch.linalg.qr(first.T) has the shape (n, i).",
        "The matrix of all cosines is Q1.T @ Q2, with the shape (i, j).",
        "Sum the squares of all cosines, and divide by the smaller of i and j.",
    ],
    praise="By chance phi is max(i, j) / n. Whether more than that means learning is for a control to say.",
)


@phi.must()
def knows_a_subspace_again(phi, rng):
    """It is 1 if one subspace contains the other, whatever the basis, and smaller than 1 for others."""
    rows = torch.from_numpy(rng.normal(size=(4, 11)))
    mixed, other = torch.from_numpy(rng.normal(size=(2, 4))) @ rows, torch.from_numpy(rng.normal(size=(2, 11)))
    return close([float(phi(rows, mixed)), float(phi(mixed, rows))], [1, 1]) and 0 < float(phi(rows, other)) < 0.99


@phi.must()
def is_zero_for_strangers(phi, rng):
    """It is 0 for perpendicular subspaces, and larger than 0 for others."""
    Q = torch.linalg.qr(torch.from_numpy(rng.normal(size=(11, 11))))[0]
    mixed = torch.from_numpy(rng.normal(size=(2, 2))) @ Q[:2]
    return abs(float(phi(mixed, Q[4:7]))) < 1e-6 and float(phi(mixed, Q[1:4])) > 0.1


@phi.must()
def is_the_share_of_the_smaller(phi, rng):
    """In between it is the sum of the squared cosines of the principal angles, over the smaller dimension."""
    first, second = (rows.double() for rows in two_subspaces(rng))
    projections = [rows.T @ torch.linalg.inv(rows @ rows.T) @ rows for rows in (first, second)]
    shared = float((projections[0] @ projections[1]).trace())
    return close(float(phi(first, second)), shared / min(len(first), len(second)))


# Intruders at equal size


def weight_and_update(rng):
    """W (out, in), an update of some norm, and the size that it is to get, relative to W's norm.

    The update writes four new directions, and strengthens four weak ones that W has. If W has one output more than
    inputs, the update also writes the one direction that no column of W has a part in.
    """
    out, inp = ((41, 40), (37, 36), (39, 38), (40, 44))[rng.integers(4)]
    W = normal(rng, out, inp)
    W = float(rng.choice([0.4, 2.5])) * W / W.norm()
    U, _, Vh = torch.linalg.svd(W)
    new = normal(rng, out, 4) @ normal(rng, 4, inp)
    update = new / new.norm() + 0.5 * U[:, 15:19] @ Vh[15:19]
    if out > inp:
        update = update + U[:, -1:] @ Vh[10:11]
    return W, float(rng.uniform(0.4, 0.6)) * W.norm() * update, float(rng.uniform(0.7, 1.3))


WEIGHTS = "(W, W + update)"

intruders = Exercise(
    "intruders",
    inputs=weight_and_update,
    wrong={
        "The update keeps its own size. Scale it first, so that its norm is size times W's.": [
            ("size * W.norm() / update.norm() * ", ""),
            (" * W.norm() / update.norm()", ""),
        ],
        "The update's norm is size, and should be size times W's norm.": (" * W.norm()", ""),
        "torch.linalg.norm(W, 2) is the largest singular value. The root of the sum of squares is W.norm().": (
            ("size * W.norm() / update.norm()", "size * torch.linalg.norm(W, 2) / torch.linalg.norm(update, 2)")
        ),
        "You decomposed the update. An intruder is a leading direction of the tuned weight, W + update.": [
            (WEIGHTS, "(W, update)"),
            (WEIGHTS, "(W, update)", "size * W.norm() / update.norm() * ", ""),
        ],
        "A direction has no sign: u and -u are one. Take the absolute value of the cosine.": (".abs()", ""),
        "You compared also with directions that W does not have. Decompose with full_matrices=False.": (
            (", full_matrices=False", "")
        ),
        "You compared with the ten leading directions of W. Compare with all of W's.": ("old.T", "old[:, :10].T"),
        "You counted all directions of the tuned weight. Only its ten leading ones count.": ("[:, :10]", ""),
        "You counted directions of W. Take the largest cosine of each new direction, with amax(0), and count these.": (
            ("amax(0)", "amax(1)")
        ),
        "These are ten rows of U. A direction is a column: take U[:, :10].": [
            ("[:, :10]", "[:10]"),
            ("old.T @ new[:, :10]", "old @ new[:10].T"),
            ("old.T @ new[:, :10]", "old @ new[:10]"),
        ],
        "Rows of U were multiplied with columns. Directions are columns of both: U_old.T @ U_new[:, :10].": (
            ("old.T @ new", "old @ new")
        ),
        "The first ten rows of the cosines are W's leading directions. The ten new ones are columns: U_new[:, :10].": [
            ("old.T @ new[:, :10]", "(old.T @ new)[:10]"),
            ("old.T @ new[:, :10]", "(old.T @ new)[:10]", "amax(0)", "amax(1)"),
        ],
        "An intruder is unlike all directions of W, not unlike one or unlike their mean: take the largest cosine.": [
            ("amax(0)", "amin(0)"),
            ("(old.T @ new[:, :10]).abs().amax(0)", "(old[:, :10] * new[:, :10]).sum(0).abs()"),
        ],
        "You counted cosines. Count directions: take the largest cosine of each new one first, with amax(0).": (
            (".amax(0)", "")
        ),
        "One largest cosine was taken for all. Take one for each new direction, with amax(0).": ("amax(0)", "amax()"),
        "max(0) returns the values and their places. Take amax(0), or max(0).values.": ("amax(0)", "max(0)"),
        "You counted the directions that W has. An intruder is similar to none: its largest cosine is below 0.5.": (
            ("< 0.5", ">= 0.5")
        ),
        "These are right-singular vectors, which the weight reads. Compare the left ones, U.": (
            [(WEIGHTS, "(W.T, (W + update).T)"), ("full_matrices=False)[0]", "full_matrices=False)[2]")]
        ),
    },
    hints=[
        "The factor that scales the update is size * W.norm() / update.norm().",
        "The first result of torch.linalg.svd is U. The leading directions of the tuned weight are its first columns.",
        "U_old.T @ U_new[:, :10] has all cosines. Count the columns whose largest absolute value is below 0.5.",
    ],
    praise="At equal size the count compares two methods, and no longer two learning rates.",
)


@intruders.must()
def depends_on_the_size_alone(intruders, rng):
    """The count depends on the size given, not on the update's norm: it is 0 at a tiny size, large at a large one."""
    W, update = torch.from_numpy(rng.normal(size=(2, 80, 84)))
    counts = [float(intruders(W, factor * update, 1.0)) for factor in (0.01, 1.0, 300.0)]
    return len(set(counts)) == 1 and intruders(W, update, 1e-4) == 0 and intruders(W, update, 50.0) > 5


@intruders.must()
def counts_leading_strangers(intruders, rng):
    """It counts which of the ten leading left directions of the sum have no cosine of 0.5 with any of W's."""
    W, update, size = weight_and_update(rng)
    W, update = W.double(), update.double()
    tuned = W + size * W.norm() / update.norm() * update
    left, old = (torch.linalg.eigh(each @ each.T)[1].flip(1) for each in (tuned, W))
    cosines = (old[:, : min(W.shape)].T @ left[:, :10]).abs()
    return intruders(W, update, size) == sum(bool(column.max() < 0.5) for column in cosines.T)


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
