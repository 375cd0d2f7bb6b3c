"""Exercises of lesson 01: matrices of low rank."""

import numpy as np
import torch

from lora_lab.course.exercise import Exercise, Reflection, close, normal


def matrix_and_rank(rng):
    """A matrix (m, n), tall or wide, with well separated singular values, and a rank below both."""
    m, n = rng.permutation([int(rng.integers(5, 7)), int(rng.integers(7, 9))])
    left, right = (np.linalg.qr(rng.normal(size=(size, 5)))[0] for size in (m, n))
    return (left * [9.0, 6.0, 4.0, 2.5, 1.5]) @ right.T, int(rng.integers(2, 4))


def small_or_not(rng):
    """Such a matrix; or one of 2 x 3 whole numbers, with that of rank 1 that is closest to it in whole numbers, too."""
    if rng.random() < 0.6:
        return matrix_and_rank(rng)
    large, small = rng.choice([4.0, 5.0, 6.0]), rng.choice([1.0, 2.0, 3.0])
    M = np.array([[large + small, large - small, 0], [large - small, large + small, 0]])  # closest: large in all four
    return M[:, rng.permutation(3)] * rng.choice([-1, 1], 3), 1


best_rank = Exercise(
    "best_rank",
    inputs=small_or_not,
    wrong={
        "The singular values are missing. Scale each direction by its entry of S.": (" * S[:r]", ""),
        "S is a list of numbers, not a matrix. Scale the columns with U[:, :r] * S[:r], or write np.diag(S[:r]).": (
            (" * S[:r]", " @ S[:r]")
        ),
        "The directions are mixed up. svd returns V transposed already: take its first r rows.": [
            ("Vh[:r]", "Vh[:, :r].T"),
            ("Vh[:r]", "Vh[:, :r].T", "full_matrices=False", "full_matrices=True"),
        ],
        "QR takes the columns of M in their order, not the strongest directions. Keep the first r terms of the SVD.": (
            "Q, R = np.linalg.qr(M)\nreturn Q[:, :r] @ R[:r]"
        ),
        "You kept the weakest terms. S is sorted with the largest first, so take [:r].": (":r]", "-r:]"),
        "eigh sorts in ascending order, so these are the weakest directions. Take the last r columns.": (
            "_, Q = np.linalg.eigh(M @ M.T)\nreturn Q[:, :r] @ (Q[:, :r].T @ M)"
        ),
        "With the mean added back the rank is r + 1. Decompose M itself.": """
            mean = M.mean(axis=0)
            U, S, Vh = np.linalg.svd(M - mean, full_matrices=False)
            return (U[:, :r] * S[:r]) @ Vh[:r] + mean
        """,
        "This is what is left of M without its r largest terms. Keep these terms themselves: take [:r].": (
            (":r]", "r:]")
        ),
        "There is one term too many. [:r] already means r of them.": (":r]", ":r + 1]"),
        "There is one term too few. [:r] already means r of them.": (":r]", ":r - 1]"),
        "This is M itself. Cut it down to rank r.": "return M.copy()",
        "The shapes do not fit. Keep r of everything: the columns U[:, :r], the values S[:r] and the rows Vh[:r].": [
            ("U[:, :r]", "U[:r]"),
            ("S[:r]", "S"),
            (" * S[:r]", " @ np.diag(S)"),
            ("Vh[:r]", "Vh[:r].T"),
            "U, S, Vh = np.linalg.svd(M)\nreturn U[:r] * S[:r] @ Vh[:r]",
        ],
        "The shapes do not fit. svd(M) returns square U and Vh, one of them too large: write full_matrices=False.": [
            f"U, S, Vh = np.linalg.svd(M)\nreturn {product} @ Vh" for product in ("U @ np.diag(S)", "(U * S)")
        ],
    },
    hints=[
        "np.linalg.svd(M, full_matrices=False) returns three arrays: U, S and V transposed.",
        "Take the first r columns of U, the first r entries of S and the first r rows of V transposed.",
        "U[:, :r] * S[:r] scales each column of U by its singular value; what is left is one matrix multiplication.",
    ],
    praise="No matrix of rank r is closer to M (Eckart and Young, 1936), so this is the yardstick for all others.",
)


@best_rank.must()
def has_the_rank(best_rank, rng):
    """The result has the shape of M, whether that is tall or wide, and rank r."""
    M, r = matrix_and_rank(rng)
    N = np.asarray(best_rank(M + rng.normal(size=M.shape), r))  # of full rank
    return N.shape == M.shape and np.linalg.matrix_rank(N) == r


@best_rank.must()
def drops_what_is_perpendicular(best_rank, rng):
    """Something is dropped, and it is perpendicular to the result: the sum of the products of their entries is 0."""
    M, r = matrix_and_rank(rng)
    kept = np.asarray(best_rank(M.copy(), r))
    dropped = M - kept
    sizes = np.linalg.norm(kept), np.linalg.norm(dropped)
    return min(sizes) > 1e-3 and abs(np.sum(kept * dropped)) < 1e-5 * sizes[0] * sizes[1]


@best_rank.must()
def has_the_smallest_error(best_rank, rng):
    """Its error is the root of the dropped squares, which is the smallest, and M is as it was."""
    M, r = matrix_and_rank(rng)
    before, S = M.copy(), np.linalg.svd(M, compute_uv=False)
    error = np.linalg.norm(M - np.asarray(best_rank(M, r)))
    return close(error, np.linalg.norm(S[r:])) and np.array_equal(M, before)


def spectrum_and_share(rng):
    """Four singular values or more, largest first, and a share of their energy, which some terms may meet exactly."""
    if rng.random() < 0.4:
        return np.full(4, 2.0), int(rng.integers(1, 4)) / 4  # sums of 4, 8 and 12, without rounding
    if rng.random() < 0.5:  # to be redone by hand: no sum of squares is so many hundredths of all
        return np.sort(rng.integers(1, 10, 4))[::-1].astype(float), float(rng.choice([0.83, 0.91, 0.97]))
    return np.sort(rng.uniform(0.2, 1, 12))[::-1] * np.linspace(1, 0.2, 12), float(rng.choice([0.8, 0.9, 0.95]))


terms_for = Exercise(
    "terms_for",
    inputs=spectrum_and_share,
    wrong={
        "The sum is of the wrong quantity. Energy is the sum of squares, so square S first.": ("S ** 2", "S"),
        "You compare norms, the roots of energies. The share is of the energy: the sum of squares.": (
            ("energy / energy[-1]", "np.sqrt(energy / energy[-1])")
        ),
        "The running sum is not a share yet. Divide it by the sum of all squares.": (
            "return int(np.sum(np.cumsum(S**2) < share)) + 1"
        ),
        "There is one term too few. These hold less than the share, and the next one reaches it.": (" + 1", ""),
        "There is one term too many. Count the terms that hold less than the share, and add one.": ("+ 1", "+ 2"),
        "There is one term too many where the share is met exactly. At least this share means that it is enough.": (
            ("< share", "<= share")
        ),
        "This counts the large singular values. Add up their squares until the sum reaches the share.": [
            "return int(np.sum(S / S[0] > 1 - share))",
            "return int(np.sum(S**2 / S[0] ** 2 > 1 - share))",
        ],
    },
    hints=[
        "The energy of the first k terms is S[0]**2 + ... + S[k-1]**2; np.cumsum gives all of these sums.",
        "Divide by the sum of all squares to get shares, which rise to 1.",
        "Count how many of the shares are still below the one that is asked for; one term more reaches it.",
    ],
    praise="You can now say how many terms hold most of a matrix, whatever its shape.",
)


@terms_for.must()
def reaches_the_share(terms_for, rng):
    """The result is a whole number of terms which hold at least the share, and one term less holds less."""
    S, share = np.sort(rng.uniform(0.1, 1, 14))[::-1] ** 2, rng.choice([0.5, 0.8, 0.9, 0.95, 0.99])
    k = terms_for(S.copy(), share)
    less, more = (np.sum(S[:terms] ** 2) / np.sum(S**2) for terms in (k - 1, k))
    return k == int(k) and less < share <= more


@terms_for.must(
    "Right below a share of 1. At 1, rounding can leave the last of your shares just below 1, so that none reaches it: "
    "divide by the last sum.",
    ("energy[-1]", "np.sum(S**2)"),
)
def an_exact_share_is_enough(terms_for, rng):
    """Where some terms hold exactly the share, these are enough; for a share of 1 these are all."""
    S = rng.choice([2.0, 4.0, 0.5]) * np.ones(16)
    # 16 equal terms: no formula for the shares rounds, whether it takes squares or divides by the norm first.
    exact = all(terms_for(S, k / 16) == k for k in (3, 8, 12))
    return exact and all(terms_for(np.sort(rng.uniform(0.5, 1, 12))[::-1], 1.0) == 12 for _ in range(20))


def shape_of_a_matrix(rng):
    """Two sizes. In a quarter of cases a rank costs exactly as much as the matrix, and in a quarter no rank saves."""
    k, m, n = rng.integers(2, 400, 3).tolist()
    # 3 k by 6 k has 18 k^2 entries, and its factors 9 k numbers for each rank: at rank 2 k they cost as much. In the
    # last three a rank costs one number less than the matrix.
    least = ((2, 3), (3, 7), (5, 8))[rng.integers(3)]
    return ((3 * k, 6 * k), rng.permutation([1, k]).tolist(), (m, n), least)[rng.integers(4)]


largest_saving_rank = Exercise(
    "largest_saving_rank",
    inputs=shape_of_a_matrix,
    wrong={
        "This is the largest rank that the matrix can have. Find the largest at which the factors are smaller.": (
            "return min(m, n)"
        ),
        "Below full rank is not enough. The factors hold r * (m + n) numbers, which must be less than m * n.": (
            "return min(m, n) - 1"
        ),
        "The result is not a whole number, but a rank is. Round it down.": [
            "return m * n / (m + n)",
            "return (m * n - 1) / (m + n)",
        ],
        "At this rank the factors cost as much as the matrix in some cases. They must cost less.": (
            "return m * n // (m + n)"
        ),
        "One rank too few, unless m + n divides m n. Subtract 1 before you divide: (m * n - 1) // (m + n).": (
            "return m * n // (m + n) - 1"
        ),
        "At this rank the factors cost as much as the matrix, or more. Round down, not up.": [
            "return -(-m * n // (m + n))",
            "return m * n // (m + n) + 1",
        ],
        "In a matrix of one row or column not even rank 1 saves numbers. Return 0 there.": [
            "return max(1, (m * n - 1) // (m + n))",
            "return max(r for r in range(1, m + n) if r * (m + n) < m * n)",
        ],
        "B and A alone are stored: a rank costs m + n numbers, without a number for a singular value.": [
            "return (m * n - 1) // (m + n + 1)",
            "return (m * n - 2) // (m + n)",
        ],
    },
    hints=[
        "A factor of m x r and one of r x n hold r * (m + n) numbers; the matrix holds m * n.",
        "You want the largest whole r with r * (m + n) < m * n.",
        "// rounds down; think about what happens when m * n is a multiple of m + n.",
    ],
    praise="Up to this rank two factors are smaller than their matrix, and LoRA stays far below it.",
    draws=80,
)


@largest_saving_rank.must()
def saves_and_the_next_rank_does_not(largest_saving_rank, rng):
    """At the result the two factors are smaller than the matrix, and at the next rank they are not."""
    m, n = rng.integers(3, 900, 2).tolist()
    ranks = [(largest_saving_rank(*shape), *shape) for shape in ((m, n), (1, n), (m, 1), (2, 3), (5, 8))]
    # Where m + n divides m * n the next property decides.
    return all(r == int(r) and r * (m + n) < m * n <= (r + 1) * (m + n) for r, m, n in ranks if m * n % (m + n))


@largest_saving_rank.must()
def a_tie_saves_nothing(largest_saving_rank, rng):
    """Where some rank costs exactly as much as the matrix, the result is the rank below it."""
    k = int(rng.integers(2, 200))
    return largest_saving_rank(3 * k, 6 * k) == 2 * k - 1 and largest_saving_rank(2, 2) == 0


def errors_and_inputs(rng):
    """For each of some tokens the gradient of the layer's output (tokens, out) and its input (tokens, in)."""
    tokens, out, inp = rng.permutation([3, 4, 5])
    return normal(rng, tokens, out), normal(rng, tokens, inp)


def few_or_not(rng):
    """Such errors and inputs; or those of two tokens, in whole numbers."""
    if rng.random() < 0.6:
        return errors_and_inputs(rng)
    return tuple(torch.from_numpy(rng.integers(-3, 4, (2, size))).float() for size in rng.permutation([3, 4]))


gradient = Exercise(
    "gradient",
    inputs=few_or_not,
    wrong={
        "The result is transposed. The gradient has the weight's shape, outputs x inputs.": "return z.T @ delta",
        "The shapes do not fit. Both have a row for each token, and the sum is over tokens: transpose delta, not z.": [
            f"return {product}" for product in ("delta @ z.T", "z @ delta.T", "delta @ z", "delta.T @ z.T")
        ],
        "The outer product is one of two lists of numbers. Take it token by token, of delta[t] and z[t], and add.": [
            "return torch.outer(delta, z)",
            "return np.outer(delta, z)",
        ],
        "The result is too small. Sum over the tokens; you divided by their number.": "return delta.T @ z / len(z)",
        "Only the last token is left. Add the outer products instead of replacing the result each time.": (
            "return np.outer(delta[-1], z[-1])"
        ),
        "Only the first token is there. Sum over all of them.": "return np.outer(delta[0], z[0])",
        "The sum over tokens was taken too early. Multiply token by token, and then add.": (
            "return np.outer(delta.sum(axis=0), z.sum(axis=0))"
        ),
        "Entries cannot be multiplied one by one. Each token adds an outer product of its delta and its z.": [
            "return delta * z",
            "return delta.T * z",
        ],
    },
    hints=[
        "For one token the gradient is the outer product of delta (out) and z (in): np.outer(delta[t], z[t]).",
        "The gradient of a sum is the sum of the gradients: add over the tokens t.",
        "A sum of outer products is one matrix multiplication of delta transposed with z.",
    ],
    praise="Each token adds one direction, so a gradient from few tokens has low rank before LoRA is even mentioned.",
)


@gradient.must()
def of_one_token(gradient, rng):
    """From a single token the gradient is the outer product of its delta and its z."""
    delta, z = errors_and_inputs(rng)
    return close(gradient(delta[:1], z[:1]), torch.outer(delta[0], z[0]))


@gradient.must()
def adds_up(gradient, rng):
    """The gradient from all tokens is the sum of those from each part of them."""
    delta, z = errors_and_inputs(rng)
    whole, parts = gradient(delta, z), gradient(delta[:2], z[:2]) + gradient(delta[2:], z[2:])
    return close(whole, parts) and abs(whole).max() > 0


@gradient.must()
def is_that_of_autograd(gradient, rng):
    """The result is what autograd computes for W."""
    delta, z = errors_and_inputs(rng)
    W = torch.zeros(delta.shape[1], z.shape[1], requires_grad=True)
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
