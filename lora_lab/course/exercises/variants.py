"""Exercises of lesson 10: variants of LoRA."""

import math
from functools import cached_property  # noqa: F401  # for an edit

import numpy as np
import torch
from torch import nn

from lora_lab.course.exercise import Exercise, Reflection, close, normal, works
from lora_lab.lora import LoRALinear


def layer_of(answer, rng):
    """An adapted layer whose sizes all differ, with an alpha that is not its rank."""
    inp, out, _ = rng.permutation([6, 7, 8]).tolist()
    rank, alpha = int(rng.integers(2, 5)), float(rng.choice([5.0, 7.0, 11.0]))
    return answer(nn.Linear(inp, out), rank, alpha)


# rsLoRA

SCALING = "self.alpha / self.rank ** 0.5"
TWICE = """

    def forward(self, x):
        frozen = self.base(x)
        return frozen + (super().forward(x) - frozen) * self.scaling"""

rslora = Exercise(
    "RsLoRA",
    hints=[
        "One property differs from LoRA's. The forward pass stays the same.",
        "LoRALinear has self.alpha and self.rank.",
        "The root of a number is number**0.5.",
    ],
    praise="At any one rank it is LoRA with a larger alpha. Its claim is about what happens when the rank grows.",
)


@rslora.must("The class is no LoRALinear. Derive it: class RsLoRA(LoRALinear).", ("(LoRALinear)", "(nn.Linear)"))
def is_lora(RsLoRA, rng):
    return issubclass(RsLoRA, LoRALinear)


@rslora.must(
    "self.scaling is not a number. Keep @property above the method, and return one.",
    ("@property", ""),
    (f"return {SCALING}", "pass"),
)
def scales_by_a_number(RsLoRA, rng):
    return isinstance(layer_of(RsLoRA, rng).scaling, int | float | np.number | torch.Tensor)


def of_each_rank(answer):
    """One layer of each rank, because at a single rank a constant may be right by chance."""
    return [answer(nn.Linear(8, 6), rank, alpha) for rank, alpha in ((2, 5.0), (3, 5.0), (4, 5.0), (5, 11.0))]


@rslora.must("The scaling is still alpha / rank, which is LoRA's.", (" ** 0.5", ""))
def is_not_lora(RsLoRA, rng):
    return not all(math.isclose(layer.scaling, layer.alpha / layer.rank) for layer in of_each_rank(RsLoRA))


@rslora.must(
    "You divide twice: super().scaling is alpha / rank already. Start from self.alpha.",
    (SCALING, "super().scaling / self.rank ** 0.5"),
)
def divides_once(RsLoRA, rng):
    return not all(math.isclose(layer.scaling, layer.alpha / layer.rank**1.5) for layer in of_each_rank(RsLoRA))


@rslora.must(
    "The scaling is not alpha / sqrt(rank). The root is of the rank alone, and it divides.",
    (SCALING, "self.alpha"),
    (SCALING, "self.alpha / 2"),
    (SCALING, "(self.alpha / self.rank) ** 0.5"),
    (SCALING, "self.alpha * self.rank ** 0.5"),
)
def divides_by_the_root_of_the_rank(RsLoRA, rng):
    """The property scaling is alpha / sqrt(rank), for several ranks and alphas."""
    layers = of_each_rank(RsLoRA)
    return all(math.isclose(layer.scaling, layer.alpha / math.sqrt(layer.rank), rel_tol=1e-6) for layer in layers)


@rslora.must(
    "The scaling was computed once. An adapter can be resized, so compute it from self.rank at each use.",
    ("@property", "@cached_property"),
)
def follows_its_rank(RsLoRA, rng):
    """It follows the rank, if the adapter is resized."""
    layer = layer_of(RsLoRA, rng)
    before, rank = layer.scaling, layer.rank + 3
    layer.lora_A = nn.Parameter(normal(rng, rank, layer.base.in_features))
    layer.lora_B = nn.Parameter(normal(rng, layer.base.out_features, rank))
    return layer.scaling < before and math.isclose(layer.scaling, layer.alpha / math.sqrt(rank), rel_tol=1e-6)


@rslora.must(
    "The update is scaled twice. LoRALinear's forward uses self.scaling already, so leave it as it is.",
    (SCALING, SCALING + TWICE),
)
def scales_its_update_once(RsLoRA, rng):
    """The layer computes its base plus alpha / sqrt(rank) * B A x."""
    layer = layer_of(RsLoRA, rng)
    layer.lora_B.data.copy_(normal(rng, *layer.lora_B.shape))
    x = normal(rng, 5, layer.base.in_features)
    return close(layer(x) - layer.base(x), layer.alpha / math.sqrt(layer.rank) * (x @ layer.lora_A.T @ layer.lora_B.T))


# LoRA-FA

FROZEN = "self.lora_A.requires_grad_(False)"
FORWARD = "\n\n    def forward(self, x):\n        return "
lora_fa = Exercise(
    "LoRAFA",
    hints=[
        "The constructor of LoRALinear has made A and B by then. One of them must stop learning.",
        "A parameter learns as long as its requires_grad is True.",
        "A parameter's method requires_grad_ takes True or False. The parameter is self.lora_A.",
    ],
    praise="One line freezes A. The backward pass now needs A x, r numbers a token, in place of x.",
)


def after_backward(answer, rng):
    """An adapted layer after a backward pass."""
    layer = layer_of(answer, rng)
    layer(normal(rng, 5, layer.base.in_features)).square().sum().backward()
    return layer


@lora_fa.must("The class is no LoRALinear. Derive it: class LoRAFA(LoRALinear).", ("(LoRALinear)", "(nn.Linear)"))
def is_lora_too(LoRAFA, rng):
    return issubclass(LoRAFA, LoRALinear)


@lora_fa.must(
    "B is frozen. It starts at zero, so the update stays zero and nothing can learn.",
    ("self.lora_A", "self.lora_B"),
    ("self.lora_A", "self"),
)
def trains_B(LoRAFA, rng):
    return layer_of(LoRAFA, rng).lora_B.requires_grad


@lora_fa.must("A is zero, so B never gets a gradient. Keep A's random start.", (FROZEN, f"nn.init.zeros_({FROZEN})"))
def has_an_A(LoRAFA, rng):
    return layer_of(LoRAFA, rng).lora_A.any()


@lora_fa.must(
    "A has equal entries, so it is not random. Keep it as LoRALinear draws it.",
    (FROZEN, f"nn.init.ones_({FROZEN})"),
)
def has_a_random_A(LoRAFA, rng):
    A = layer_of(LoRAFA, rng).lora_A
    return len(A.unique()) == A.numel()


@lora_fa.must(
    "B does not start at zero, so the layer differs from the base before training. Leave B as it is.",
    (FROZEN, f"{FROZEN}\n        nn.init.normal_(self.lora_B)"),
)
def begins_at_zero(LoRAFA, rng):
    return not layer_of(LoRAFA, rng).lora_B.any()


@lora_fa.must(
    "A still learns, as in LoRA. Freeze it: self.lora_A.requires_grad_(False).",
    (FROZEN, "pass"),
)
def gives_A_no_gradient(LoRAFA, rng):
    return after_backward(LoRAFA, rng).lora_A.grad is None


@lora_fa.must(
    "A has no gradient, but it still counts as trained, with an optimiser state. Freeze the parameter itself.",
    (FROZEN, f"pass{FORWARD}self.base(x) + self.scaling * (x @ self.lora_A.detach().T @ self.lora_B.T)"),
)
def leaves_A_as_it_is(LoRAFA, rng):
    """A is random, does not count as trained, and gets no gradient."""
    A = after_backward(LoRAFA, rng).lora_A
    return not A.requires_grad and A.grad is None and len(A.unique()) == A.numel()


@lora_fa.must(
    "B has no gradient. Leave the forward pass as LoRALinear has it.",
    (FROZEN, f"{FROZEN}{FORWARD}self.base(x.requires_grad_()) + 0 * (x @ self.lora_A.T @ self.lora_B.T).detach()"),
)
def learns_with_B(LoRAFA, rng):
    """B starts at zero, is trained, and has a gradient at once."""
    layer = after_backward(LoRAFA, rng)
    return not layer.lora_B.any() and layer.lora_B.grad is not None and layer.lora_B.grad.any()


# PiSSA's start

PARTS, REST, ROOT = "(W - scaling * B @ A, B, A)", "W - scaling * B @ A", "(S[:rank] / scaling)"
pissa = Exercise(
    "pissa_start",
    hints=[
        "torch.linalg.svd(W, full_matrices=False) returns U, S and Vh, the largest value first.",
        "B takes the first r columns of U, and A the first r rows of Vh, each times the root of S[:r] / scaling.",
        "The residual is what is left of W after scaling times B times A is taken away.",
    ],
    praise="The adapted layer starts as the pre-trained one, although neither factor is zero.",
)


def parted(pissa, rng):
    """W (out, in), the scaling, the best approximation of W of some rank, and the three parts of an answer.

    Raises:
        TypeError, ValueError, AttributeError: the answer is something else.
    """
    out, inp, _ = rng.permutation([6, 7, 8]).tolist()
    rank, scaling = int(rng.integers(2, 4)), float(rng.choice([0.5, 2.0, 3.0]))
    left, right = (torch.linalg.qr(normal(rng, size, 6))[0] for size in (out, inp))  # (out, 6), (in, 6)
    values = torch.tensor([9.0, 6.0, 4.0, 2.5, 1.5, 1.0]) * rng.uniform(0.8, 1.2)  # (6,), well separated
    W = left * values @ right.T  # (out, in)
    best = left[:, :rank] * values[:rank] @ right[:, :rank].T  # (out, in)
    rest, B, A = pissa(W.clone(), rank, scaling)
    if [tuple(part.detach().shape) for part in (rest, B, A)] != [(out, inp), (out, rank), (rank, inp)]:
        raise ValueError
    return W, scaling, best, rest, B, A


@pissa.must(
    "Return three tensors, in this order: residual (out, in), B (out, r) and A (r, in), whose rows are those of Vh.",
    (PARTS, "(B, A)"),
    (PARTS, "(B, A, W)"),
    (PARTS, f"tuple(part.T for part in {PARTS})"),
    (PARTS, f"tuple(part.numpy() for part in {PARTS})"),
)
def has_three_parts(pissa, rng):
    return works(lambda: parted(pissa, rng), TypeError, ValueError, AttributeError)


@pissa.must("The largest part is there twice, in W and in B A. Subtract it from the frozen weight.", (REST, "W"))
def subtracts(pissa, rng):
    W, _, _, rest, _, _ = parted(pissa, rng)
    return not close(rest, W)


@pissa.must(
    "B A is not the best approximation of rank r. It takes the r largest singular values with their vectors.",
    (":rank]", "-rank:]"),
    (f"{ROOT}.sqrt()", "torch.ones(rank)"),
)
def has_its_direction(pissa, rng):
    _, _, best, _, B, A = parted(pissa, rng)
    return close(B @ A / (B @ A).norm(), best / best.norm())


@pissa.must(
    "The layer multiplies B A by the scaling, so divide the singular values by it before you take the root.",
    (ROOT, "S[:rank]"),
    (ROOT, "S[:rank]", REST, "W - B @ A"),
    (ROOT, "(S[:rank] / scaling ** 2)"),
)
def takes_the_largest_part(pissa, rng):
    """scaling * B @ A is as close to W as a matrix of that rank can be."""
    _, scaling, best, _, B, A = parted(pissa, rng)
    return close(scaling * B @ A, best)


@pissa.must(
    "The parts do not add up to W. What is frozen lacks scaling * B A, with the scaling.",
    (REST, "W - B @ A"),
    (REST, "W + scaling * B @ A"),
)
def adds_up_to_W(pissa, rng):
    """What is left plus scaling * B A is W, B is (out, r) and A is (r, in), and something was taken from W."""
    W, scaling, _, rest, B, A = parted(pissa, rng)
    return close(rest + scaling * B @ A, W) and not close(rest, W)


@pissa.must(
    "B A is right, but only one factor was divided by the scaling. "
    "Divide the singular values by it before you take the root, so that both factors are divided alike.",
    (PARTS, f"({REST}, B / scaling ** 0.5, A * scaling ** 0.5)"),
    (PARTS, f"({REST}, B * scaling ** 0.5, A / scaling ** 0.5)"),
)
def divides_both_alike(pissa, rng):
    _, scaling, _, _, B, A = parted(pissa, rng)
    ratio = B.norm(dim=0) / A.norm(dim=1)
    return not any(close(ratio, torch.full_like(ratio, factor)) for factor in (scaling, 1 / scaling))


@pissa.must(
    "One factor holds all of the singular values. Give each factor their square root.",
    ("U[:, :rank] * root, root[:, None] * Vh", "U[:, :rank] * S[:rank] / scaling, Vh"),
)
def shares_it_evenly(pissa, rng):
    """Each column of B is as long as the row of A that it multiplies, and none is zero."""
    *_, B, A = parted(pissa, rng)
    return close(B.norm(dim=0), A.norm(dim=1)) and A.norm(dim=1).min() > 0.01


@pissa.must(
    "Your function overwrites W. Return W - scaling * B @ A as a new tensor.",
    (PARTS, "(W.sub_(scaling * B @ A), B, A)"),
)
def leaves_W(pissa, rng):
    """W is as it was, and what is left of it is another tensor."""
    before, *_, rest, _, _ = parted(pissa, rng)
    pissa(W := before.clone(), 2, 2.0)
    return torch.equal(W, before) and not close(rest, W)


# DoRA's length


def dora_case(rng):
    """x (n, in), W (out, in), A (r, in), B (out, r), the scaling, and m (out); all sizes differ."""
    n, inp, out, _ = rng.permutation([4, 5, 6, 7]).tolist()
    rank, scaling = int(rng.integers(2, 4)), float(rng.choice([0.5, 2.0, 3.0]))
    m = torch.from_numpy(rng.uniform(2, 4, out)).float()
    return normal(rng, n, inp), normal(rng, out, inp), normal(rng, rank, inp), normal(rng, out, rank), scaling, m


LENGTH = "V.norm(dim=1, keepdim=True)"
dora = Exercise(
    "dora_length",
    inputs=dora_case,
    wrong={
        "The shapes do not fit. m and the lengths of the rows are columns, m[:, None] and keepdim=True. "
        "x has its examples in rows, so multiply by the transpose.": [
            ("m[:, None]", "m"),
            (", keepdim=True", ""),
            (").T", ")"),
        ],
        "You took the length of V's columns. Each output has one length, taken along the inputs: dim=1.": (
            (LENGTH, "V.norm(dim=0)")
        ),
        "You divided the outputs by their length. DoRA divides each row of V, before it meets x.": [
            "V = W + scaling * B @ A\ny = x @ V.T\nreturn m * y / y.norm(dim=1, keepdim=True)",
            "y = x @ (W + scaling * B @ A).T\nreturn m * y / y.norm(dim=0)",
        ],
        "You divided by the length of the whole matrix. Each row of V has a length of its own.": (LENGTH, "V.norm()"),
        "m is missing. Without it each output has length 1, and the layer differs from W0 before training.": (
            ("m[:, None] * ", "")
        ),
        "You divided by the length of W's rows. It is the length of V's rows, which move as B A learns.": (
            ("V.norm", "W.norm")
        ),
        "You divided by the squared length. The length is the root of the sum of squares.": (
            (LENGTH, f"{LENGTH} ** 2")
        ),
        "Nothing was divided, so m stretches rows that have a length already. Divide each row of V by its length.": (
            (f" / {LENGTH}", "")
        ),
        "The scaling is missing. V is W + scaling * B A.": ("scaling * ", ""),
        "You divided the update alone by its length. DoRA divides each row of the sum, V = W + s B A.": (
            "update = scaling * (B @ A)\nreturn x @ (W + m[:, None] * update / update.norm(dim=1, keepdim=True)).T"
        ),
        "W is added once more. V holds it already.": ("x @ (m", "x @ W.T + x @ (m"),
        "The update is outside. In DoRA, B A changes the direction, so add it to W before you divide by the length.": (
            ("W + scaling * B @ A", "W", ".T", ".T + scaling * x @ A.T @ B.T")
        ),
    },
    hints=[
        "V is a matrix of W's shape, (out, in). Compute it first.",
        "V.norm(dim=1) has one length for each row. With keepdim=True its shape is (out, 1), which divides V.",
        "m[:, None] has the shape (out, 1) as well. x has one example in each row, so multiply by the transpose.",
    ],
    praise="B A turns each row of the weight, and m alone sets its length.",
)


@dora.must()
def has_the_length(dora, rng):
    """Each row of the weight has the length that m says."""
    _, W, *others, m = dora_case(rng)
    return close(dora(torch.eye(W.shape[1]), W, *others, m).norm(dim=0), m)


@dora.must()
def has_the_direction(dora, rng):
    """The result is x times a weight whose rows have the directions of those of W + scaling * B A."""
    x, W, A, B, scaling, m = dora_case(rng)
    V, weight = W + scaling * B @ A, dora(torch.eye(W.shape[1]), W, A, B, scaling, m).T
    right = close(weight / weight.norm(dim=1)[:, None], V / V.norm(dim=1)[:, None])
    return right and close(dora(x, W, A, B, scaling, m), x @ weight.T)


# One number


RATIO, INFINITE = "rank ** 0.5", "float('inf')"
one_number = Exercise(
    "one_number",
    inputs=lambda rng: (int(rng.integers(2, 65)),),
    wrong={
        "These are the scalings, without alpha. A ratio compares with LoRA: divide each by LoRA's alpha / r.": (
            "return {'LoRA': 1 / rank, 'rsLoRA': 1 / rank ** 0.5, 'LoRA-FA': float('inf')}"
        ),
        "rsLoRA's ratio is not r. Its factor alpha / sqrt(r) is divided by LoRA's factor alpha / r.": (
            (RATIO, "float(rank)")
        ),
        "rsLoRA's ratio is upside down. Its factor is larger than LoRA's, so B is faster.": [
            (RATIO, "rank ** -0.5"),
            (RATIO, "1 / rank"),
        ],
        "rsLoRA is not LoRA: its factor is another one. Divide it by LoRA's.": (RATIO, "1.0"),
        "In LoRA, A and B have one learning rate, so its ratio is 1.": [("1.0", "0.0"), ("1.0", "1 / rank")],
        "LoRA-FA's ratio is upside down. A stands still, so B is infinitely faster.": (INFINITE, "0.0"),
        "In LoRA-FA, A does not learn at all. So B's rate over A's is neither 1 nor large: it is infinite.": [
            (INFINITE, "1.0"),
            (INFINITE, "1e9"),
        ],
    },
    hints=[
        "LoRA+ with the ratio 1 gives A and B the same rate.",
        "A factor c in front of B acts like c times B's rate. Find the c that turns alpha / r into alpha / sqrt(r).",
        "Python's infinity is float('inf').",
    ],
    praise="Three methods, one number. So compare them at rates that take this ratio into account.",
)


@one_number.must()
def of_both_limits(ratios, rng):
    """For LoRA the ratio is 1 and for LoRA-FA infinite, at every rank, and for rsLoRA it grows with the rank."""
    rows = [ratios(rank) for rank in (2, 7, 64)]
    grows = rows[0]["rsLoRA"] < rows[1]["rsLoRA"] < rows[2]["rsLoRA"]
    return grows and all((row["LoRA"], row["LoRA-FA"]) == (1, math.inf) for row in rows)


@one_number.must()
def of_rslora(ratios, rng):
    """For rsLoRA it is its factor divided by that of LoRA, at every rank."""
    rank = int(rng.integers(2, 200))
    return close(ratios(rank)["rsLoRA"], (7 / math.sqrt(rank)) / (7 / rank))


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
