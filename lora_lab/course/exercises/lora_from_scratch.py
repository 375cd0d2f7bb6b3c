"""Exercises of lesson 03: LoRA, line by line."""

import copy
import math
import re
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_lab import lora as ll  # noqa: F401  # what the last solution takes of the package
from lora_lab.analysis.diagnosis import diagnose
from lora_lab.course.exercise import Exercise, Reflection, are, close, normal, works
from lora_lab.inject import replace  # noqa: F401  # and this
from lora_lab.models.digits import DigitsMLP

# The forward line


def layer_case(rng):
    """x (n, in), W (out, in), A (r, in), B (out, r) and alpha; all sizes differ, and alpha is larger.

    The rank is none of the lesson's numbers, and half the time it is larger than the other sizes.
    """
    n, inp, out = rng.permutation([5, 6, 7]).tolist()
    rank, alpha = int(rng.choice([3, 9])), float(rng.choice([20, 29, 31, 40]))
    return normal(rng, n, inp), normal(rng, out, inp), normal(rng, rank, inp), normal(rng, out, rank), alpha


def shown_case(rng):
    """Such arguments; one in four is so small, and of whole numbers, that it can be redone by hand."""
    if rng.random() > 0.25:
        return layer_case(rng)
    x, W, A, B = (torch.from_numpy(rng.integers(-2, 4, size)).float() for size in ((1, 3), (2, 3), (2, 3), (2, 2)))
    return x, W, A, B, 6.0


def products(function):
    """How many multiplications and additions a function makes in products of matrices."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


FACTOR = "alpha / A.shape[0]"
forward = Exercise(
    "forward",
    inputs=shown_case,
    wrong={
        "The scaling is missing. Multiply the update by alpha / r.": (f"{FACTOR} * ", ""),
        "Your update is r times too large. Divide alpha by the rank, which is A.shape[0].": (FACTOR, "alpha"),
        "The update is scaled by alpha / sqrt(r), which is rsLoRA (lesson 10). LoRA divides by r.": (
            (FACTOR, "alpha / A.shape[0] ** 0.5")
        ),
        "The scaling is a fixed number. Compute it from alpha and the rank, which is A.shape[0].": [
            (FACTOR, "alpha / 4"),
            (FACTOR, "2"),
        ],
        "alpha // r drops what is behind the decimal point. Write alpha / r.": (FACTOR, "alpha // A.shape[0]"),
        "The update is divided by the number of outputs. The rank is A.shape[0].": (FACTOR, "alpha / len(B)"),
        "The update is divided by the number of inputs. The rank is A.shape[0], not A.shape[1].": (
            (FACTOR, "alpha / A.shape[1]")
        ),
        "The scaling is upside down. It is alpha / r, not r / alpha.": (FACTOR, "A.shape[0] / alpha"),
        "The frozen path is missing. Add what W makes of x.": ("F.linear(x, W) + ", ""),
        "The adapter does nothing. The update through A and B is never added.": "return x @ W.T",
        "W is scaled as well. The scaling belongs to the update alone.": (
            "return alpha / len(A) * (x @ W.T + x @ A.T @ B.T)"
        ),
        "The update is subtracted. It is added to the frozen path.": ("W) + ", "W) - "),
        "The shapes do not fit. x has its examples in rows, so multiply from the right: x @ W.T or F.linear(x, W).": [
            "return x @ W + alpha / len(A) * (x @ A @ B)",
            "return W @ x + alpha / len(A) * (B @ A @ x)",
            "return x @ W.T + alpha / len(A) * (x @ A @ B)",
            "return x @ W.T + alpha / len(A) * (B @ (A @ x))",
            "return x @ W.T + alpha / len(A) * x @ B @ A",
            "return x @ W.T + alpha / len(A) * (A @ x.T).T @ B",
        ],
        "The two paths have different shapes: one is (out, n), the other (n, out). Write x @ W.T, not W @ x.T.": (
            "return W @ x.T + alpha / len(A) * (x @ A.T @ B.T)"
        ),
        "Something stands between A and B. The path is linear: no activation.": [
            ("F.linear(x, A)", "torch.relu(F.linear(x, A))"),
        ],
        "A and B are exchanged. x goes through A first, (n, in) -> (n, r), and then through B, (n, r) -> (n, out).": [
            "return x @ W.T + alpha / len(A) * (x @ B.T @ A.T)",
            "return x @ W.T + alpha / len(A) * (x @ (A @ B).T)",
        ],
    },
    hints=[
        "Two paths are added: one through W, one through A and then B.",
        "x has one example in each row, so a layer computes x @ W.T, which is F.linear(x, W).",
        "The update is (x @ A.T) @ B.T times alpha / r, and r is A.shape[0].",
    ],
    praise="This line is all that LoRA adds to a layer, and the package's own layer computes the same.",
)


@forward.must()
def is_the_frozen_layer_without_an_update(forward, rng):
    """With B at zero the result is that of the frozen layer."""
    x, W, A, B, alpha = layer_case(rng)
    return close(forward(x, W, A, 0 * B, alpha), x @ W.T)


@forward.must()
def goes_through_A_and_then_B(forward, rng):
    """What A and B add to the frozen layer's result has the direction of x A^T B^T."""
    x, W, A, B, alpha = layer_case(rng)
    added, expected = forward(x, W, A, B, alpha) - x @ W.T, x @ A.T @ B.T
    return close(added / added.norm(), expected / expected.norm())


@forward.must()
def is_scaled_by_alpha_over_r(forward, rng):
    """It is x A^T B^T times alpha / r, at each of several ranks and alphas."""
    x, W, A, B, alpha = layer_case(rng)
    return close(forward(x, W, A, B, alpha) - x @ W.T, alpha / len(A) * (x @ A.T @ B.T))


@forward.must(
    "The result is right, but the gradient of x, of A or of B is not: a detach, no_grad or new Parameter cuts it.",
    ("F.linear(x, A)", "F.linear(x.detach(), A)"),
    (", B)", ", B.detach())"),
)
def passes_gradients_on(forward, rng):
    """The gradients of x, A and B are right, too."""
    x, W, A, B, alpha = layer_case(rng)
    leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
    right = torch.autograd.grad((x @ W.T + alpha / len(A) * (x @ A.T @ B.T)).square().sum(), leaves)
    yours = torch.autograd.grad(forward(x, W, A, B, alpha).square().sum(), leaves, allow_unused=True)
    return all(one is not None and close(one, other) for one, other in zip(yours, right, strict=True))


@forward.must(
    "x may have more axes, as (batch, tokens, in) in a language model. F.linear(x, W) takes them; x.T does not.",
    "return (W @ x.T + alpha / len(A) * (B @ (A @ x.T))).T",
)
def takes_more_axes_of_x(forward, rng):
    """An x of shape (batch, tokens, in) does, too."""
    x, W, A, B, alpha = layer_case(rng)
    expected = (x @ W.T + alpha / len(A) * (x @ A.T @ B.T))[:, None]
    return works(lambda: close(forward(x[:, None], W, A, B, alpha), expected), RuntimeError)


@forward.must(
    "The result is right, but you form B A, which is as large as W. Send x through A, and what comes out through B.",
    "return F.linear(x, W + alpha / len(A) * (B @ A))",
    "return F.linear(x, W) + alpha / len(A) * F.linear(x, B @ A)",
)
def never_forms_the_product(forward, rng):
    """The product B A is never formed."""
    x, W, A, B = (normal(rng, *shape) for shape in ((1, 40), (48, 40), (2, 40), (48, 2)))
    few = products(lambda: forward(x, W, A, B, 6.0)) < 1.5 * products(lambda: x @ W.T)
    return few and close(forward(x, W, A, B, 6.0), x @ W.T + 3 * (x @ A.T @ B.T))


# The initialisation

RANDOM_A, ZERO_A = "A = torch.empty(r, inp).uniform_(-bound, bound, generator=generator)", "A = torch.zeros(r, inp)"
BOUND, ZERO_B = "1 / math.sqrt(inp)", "torch.zeros(out, r)"
RANDOM_B = "torch.randn(out, r, generator=generator)"

start = Exercise(
    "start",
    hints=[
        "The update B A must be exactly zero, and yet one of the two factors must have a non-zero gradient.",
        "torch.zeros makes B. Its gradient is not zero as long as A is not.",
        "torch.empty(r, inp).uniform_(-bound, bound, generator=generator) draws A; the bound is 1 / sqrt(inp).",
    ],
    praise="The adapted model starts as the pre-trained one, bit for bit, and can still learn.",
)


def draw(start, rng, out=24, inp=32, rank=4):
    """A and B of a fresh generator."""
    return start(out, inp, rank, torch.Generator().manual_seed(int(rng.integers(2**31))))


def scaled(start, rng):
    """Such an A, times sqrt(inp), with so many entries that its range is seen sharply."""
    out, inp = rng.permutation([24, 40]).tolist()
    return draw(start, rng, out, inp, rank=24)[0] * math.sqrt(inp)


@start.must(
    "Return two tensors, A and B, in this order.",
    (f"(A, {ZERO_B})", "A"),
    (f"(A, {ZERO_B})", f"dict(A=A, B={ZERO_B})"),
)
def returns_two(start, rng):
    return are(draw(start, rng), 2, torch.Tensor)


@start.must(
    "The shapes are wrong. A is (r, inp) and B is (out, r); return them in this order.",
    (f"(A, {ZERO_B})", f"({ZERO_B}, A)"),
    (f"(A, {ZERO_B})", "(A.T, torch.zeros(r, out))"),
)
def has_the_shapes(start, rng):
    """A is (r, inp) and B is (out, r), for several sizes."""
    out, inp, r = rng.choice(range(2, 22), 3, replace=False).tolist()
    A, B = draw(start, rng, out, inp, r)
    return (A.shape, B.shape) == ((r, inp), (out, r))


@start.must("A and B are both zero. Each waits for the other, so nothing can learn.", (RANDOM_A, ZERO_A))
def is_no_dead_end(start, rng):
    """One of A and B is not zero, so that the other can learn."""
    A, B = draw(start, rng)
    return A.any() or B.any()


@start.must(
    "Training has not begun, and the layer already differs. B must be zero, so that B A is zero.",
    (ZERO_B, RANDOM_B),
)
def keeps_the_layer(start, rng):
    A, B = draw(start, rng)
    return not (B @ A).any()


@start.must(
    "A is zero and B is random. It would learn, but LoRA starts with A random and B zero.",
    (RANDOM_A, ZERO_A, ZERO_B, RANDOM_B),
)
def has_a_zero_B(start, rng):
    """It is B that is zero."""
    return not draw(start, rng)[1].any()


@start.must(
    "A matrix repeats one number in memory, so its entries cannot be trained. Make B with torch.zeros.",
    (ZERO_B, "torch.zeros(1, 1).expand(out, r)"),
)
def has_numbers_of_its_own(start, rng):
    """Each entry of A and B has memory of its own."""
    A, B = draw(start, rng)
    return 0 not in (*A.stride(), *B.stride())


@start.must(
    "The range of A depends on the rank or on the outputs. Its bound is 1 / sqrt(inp), from the inputs alone.",
    (BOUND, "1 / math.sqrt(r)"),
    (BOUND, "1 / math.sqrt(out)"),
)
def depends_on_the_inputs_alone(start, rng):
    """The entries of A are as large for many outputs as for few, and for a high rank as for a low one."""
    cases = ((24, 12), (96, 12), (24, 48))
    usual, *others = (float(draw(start, rng, out, 128, r)[0].square().mean().sqrt()) for out, r in cases)
    return all(0.7 * usual < other < 1.4 * usual for other in others)


@start.must(
    "A leaves the range from -1 / sqrt(inp) to 1 / sqrt(inp). Draw it uniformly; kaiming_uniform_ needs "
    "a=math.sqrt(5).",
    (RANDOM_A, "A = torch.randn(r, inp, generator=generator)"),
    (RANDOM_A, "A = torch.randn(r, inp, generator=generator) / math.sqrt(3 * inp)"),
    (BOUND, "math.sqrt(6 / inp)"),
)
def is_small(start, rng):
    """No entry of A is beyond 1 / sqrt(inp)."""
    return scaled(start, rng).abs().max() <= 1.001


@start.must(
    "The rows of A are not independent, so its rank is below r. Draw each of its entries by itself.",
    ("torch.empty(r, inp)", "torch.empty(1, inp)", "A, torch", "A.repeat(r, 1), torch"),
    (RANDOM_A, "A = torch.full((r, inp), bound)"),
)
def has_the_rank(start, rng):
    """The rank of A is r."""
    return torch.linalg.matrix_rank(draw(start, rng)[0].detach().double()) == 4


@start.must(
    "A does not fill the range. Draw its entries uniformly between -1 / sqrt(inp) and 1 / sqrt(inp).",
    (BOUND, "1 / inp"),
    ("A, torch", "A.abs(), torch"),
    ("A, torch", "A.sign() * bound, torch"),
)
def fills_its_range(start, rng):
    """The entries of A are uniform between -1 / sqrt(inp) and 1 / sqrt(inp)."""
    A = scaled(start, rng)
    return A.max() > 0.9 and A.min() < -0.9 and 0.5 < A.std() < 0.66


def decides(draw_A, rng):
    """Whether a generator alone decides the A that is drawn with it."""
    seed, other = rng.choice(10**6, 2, replace=False).tolist()
    draws = []
    for each in (seed, seed, other):
        torch.rand(1)  # a draw elsewhere must not matter
        draws.append(draw_A(torch.Generator().manual_seed(each)))
    return torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@start.must(
    "A does not follow the generator, so a draw elsewhere moves it. Pass generator=generator to the draw.",
    ("generator=generator)", "generator=None)"),
    ("generator=generator)", "generator=torch.Generator().manual_seed(0))"),
)
def follows_the_seed(start, rng):
    """The generator alone decides A."""
    return decides(lambda generator: start(24, 32, 4, generator)[0], rng)


@start.must(
    "Two layers would start alike. Draw with the generator itself, not with a new one that has its seed.",
    ("generator=generator)", "generator=torch.Generator().manual_seed(generator.initial_seed()))"),
)
def moves_the_generator(start, rng):
    """The generator moves on, so that the next layer starts with another A."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    return not torch.equal(start(24, 32, 4, generator)[0], start(24, 32, 4, generator)[0])


# The class

IN, OUT, RANK, ALPHA = 7, 5, 3, 8.0  # of the layers below
INITIAL, MERGED, UPDATE = "nn.Parameter(A)", "plain = copy.deepcopy(self.base)", "self.base(x) + update"
NEW = "plain = nn.Linear(self.base.in_features, self.base.out_features{}); plain.weight.copy_(self.base.weight)"

layer = Exercise(
    "MyLoRALinear",
    hints=[
        "__init__ freezes the base, stores the scaling and the dropout, and wraps what start returns in nn.Parameter.",
        "forward adds self.base(x) and the update. F.linear(v, M) is v @ M.T; only the update sees self.dropout(x).",
        "merged makes copy.deepcopy(self.base) and adds scaling * (B @ A) to its weight; the bias stays.",
    ],
    praise="You have written LoRA: your layer can replace any nn.Linear in float32, with or without a bias.",
    uses=["start"],
)


def made(answer, rng, dropout=0.0, bias=True, moved=True):
    """A layer, a copy of its base, an input (6, 7), the update B A, not scaled, and what the layer shall compute."""
    base = nn.Linear(IN, OUT, bias=bias)
    x, untouched = normal(rng, 6, IN), copy.deepcopy(base)
    layer = answer(base, RANK, ALPHA, dropout)
    shapes = (RANK, IN), (OUT, RANK)
    A, B = (next((p for p in layer.parameters() if p.shape == shape), torch.empty(0)) for shape in shapes)
    update = expected = None
    if moved:
        nn.init.normal_(B)
        update = (B.double() @ A.double()).detach()
        expected = untouched(x) + (ALPHA / RANK * (x.double() @ update.T)).float()
    return SimpleNamespace(layer=layer, base=untouched, x=x, A=A, B=B, update=update, expected=expected)


def is_right(m):
    """Whether a layer that was made computes what it shall, without dropout."""
    return near(m.layer.eval()(m.x), m.expected)


def near(actual, expected):
    """Whether two tensors agree up to 0.0001."""
    return actual.shape == expected.shape and torch.allclose(actual.double(), expected.double(), atol=1e-4)


@layer.must(
    "This class is no module. Derive it from nn.Module, and call super().__init__() first.",
    ("(nn.Module)", "", "super().__init__()\n", "pass\n"),
)
def is_a_module(MyLoRALinear, rng):
    return issubclass(MyLoRALinear, nn.Module)


@layer.must(
    "A or B has the wrong shape: lora_A is (rank, in), lora_B (out, rank). start takes out_features first.",
    ("start(base.out_features, base.in_features", "start(base.in_features, base.out_features"),
    ("Parameter(A)", "Parameter(A.T)"),
)
def has_no_transposed_factor(MyLoRALinear, rng):
    shapes = {tuple(p.shape) for p in made(MyLoRALinear, rng, moved=False).layer.parameters()}
    return not shapes & {(IN, RANK), (RANK, OUT)}


@layer.must(
    "A or B is not among the trained parameters. Wrap both in nn.Parameter.",
    (INITIAL, "A"),
    ("nn.Parameter(B)", "B"),
    (INITIAL, "nn.Parameter(A, requires_grad=False)"),
)
def trains_two_factors(MyLoRALinear, rng):
    """Its trained parameters are A (rank, in) and B (out, rank)."""
    m = made(MyLoRALinear, rng, moved=False)
    return m.A.requires_grad and m.B.requires_grad


@layer.must(
    "Later cells read self.base, self.lora_A and self.lora_B. Give the base and both factors these names.",
    ("self.lora_A", "self.A", "self.lora_B", "self.B"),
    ("self.base", "self.linear"),
)
def has_the_names(MyLoRALinear, rng):
    """They are called lora_A and lora_B, and the frozen layer is called base."""
    m = made(MyLoRALinear, rng, moved=False)
    names = [getattr(m.layer, name, None) for name in ("lora_A", "lora_B", "base")]
    return names[0] is m.A and names[1] is m.B and isinstance(names[2], nn.Linear)


@layer.must(
    "The shapes do not fit. x has its examples in rows: F.linear(v, M) is v @ M.T, and x goes through A, then B.",
    ("F.linear(self.dropout(x), self.lora_A)", "self.dropout(x) @ self.lora_A"),
    (UPDATE, "self.base(x) + self.scaling * (self.lora_B @ self.lora_A @ self.dropout(x))"),
    (", self.lora_A)", ", self.lora_C)", ", self.lora_B)", ", self.lora_A)", "lora_C", "lora_B"),
)
def fits_the_shapes(MyLoRALinear, rng):
    m = made(MyLoRALinear, rng, moved=False)
    try:
        m.layer(m.x)
    except NotImplementedError:
        return True
    except RuntimeError as error:
        return not re.search("shapes cannot be multiplied|must match", str(error))
    return True


@layer.must(
    "__init__ is right as far as it can be checked. forward is still open.",
    ("narrow = F.linear(self.dropout(x), self.lora_A)", "raise NotImplementedError"),
)
def has_forward(MyLoRALinear, rng):
    m = made(MyLoRALinear, rng, moved=False)
    return works(lambda: m.layer(m.x) is not ..., NotImplementedError)


@layer.must(
    "No gradient can reach A and B. Leave no_grad, detach and merged(), which is under no_grad, out of forward.",
    ("narrow = F.linear(self.dropout(x), self.lora_A)", "return self.merged()(x)"),
    (UPDATE, "self.base(x) + update.detach()"),
)
def has_a_graph_through_its_factors(MyLoRALinear, rng):
    m = made(MyLoRALinear, rng, moved=False)
    return m.layer(m.x).requires_grad


@layer.must(
    "The base moved in a training step. Freeze its weight and bias with requires_grad_(False).",
    ("base.requires_grad_(False)", "base"),
    ("base.requires_grad_(False)", "base; base.weight.requires_grad_(False)"),
)
def freezes_its_base(MyLoRALinear, rng):
    """A step of training leaves the base as it is."""
    m = made(MyLoRALinear, rng, moved=False)
    m.layer(m.x).square().sum().backward()
    torch.optim.SGD([p for p in m.layer.parameters() if p.requires_grad], lr=0.1).step()
    stored = {tuple(tensor.shape): tensor for tensor in m.layer.state_dict().values()}
    return torch.equal(stored[OUT, IN], m.base.weight) and torch.equal(stored.get((OUT,), m.base.bias), m.base.bias)


# Its start


@layer.must(
    "A fresh layer differs from its base already. B must start at zero.",
    ("nn.Parameter(B)", "nn.Parameter(torch.randn_like(B))"),
)
def begins_as_its_base(MyLoRALinear, rng):
    """A fresh layer computes what its base computes."""
    m = made(MyLoRALinear, rng, moved=False)
    return any(near(m.layer.eval()(m.x), expected) for expected in (m.base(m.x), m.base(m.x) - m.base.bias))


@layer.must(
    "A and B both start at zero, so neither can ever learn. Draw A at random.",
    (INITIAL, "nn.Parameter(torch.zeros_like(A))"),
)
def has_a_random_A(MyLoRALinear, rng):
    """A is not zero at the start, so that B can learn."""
    return made(MyLoRALinear, rng, moved=False).A.any()


@layer.must(
    "A does not follow the generator. Pass it on: start(base.out_features, base.in_features, rank, generator).",
    ("rank, generator)", "rank, None)"),
)
def follows_the_generator(MyLoRALinear, rng):
    """The generator alone decides A."""

    def draw_A(generator):
        layer = MyLoRALinear(nn.Linear(IN, OUT), RANK, ALPHA, 0.0, generator)
        return next(p for p in layer.parameters() if p.shape == (RANK, IN))

    return decides(draw_A, rng)


@layer.must(
    "A is not drawn as start draws it, between -1 / sqrt(in) and 1 / sqrt(in). Use your start.",
    (INITIAL, "nn.Parameter(torch.randn(A.shape, generator=generator))"),
)
def draws_A_in_its_range(MyLoRALinear, rng):
    """The largest entry of A is within 1 / sqrt(in), and not far from it."""
    return 0.5 < float(made(MyLoRALinear, rng, moved=False).A.abs().max()) * math.sqrt(IN) <= 1.001


# Its forward pass


@layer.must("The bias is lost. Call self.base(x), which adds it.", (UPDATE, f"{UPDATE} - self.base.bias"))
def keeps_the_bias(MyLoRALinear, rng):
    m = made(MyLoRALinear, rng, moved=False)
    return not near(m.layer.eval()(m.x), m.base(m.x) - m.base.bias)


@layer.must(
    "The update is not alpha / rank * B A x. Divide alpha by the rank, and multiply the update by the result.",
    ("alpha / rank", "1.0"),
    ("alpha / rank", "alpha"),
)
def adds_the_scaled_update(MyLoRALinear, rng):
    """With B filled, alpha / rank * B A x is added."""
    return is_right(made(MyLoRALinear, rng))


@layer.must(
    "A language model's input has the shape (batch, tokens, in), and your forward reads a matrix. Use F.linear(x, M).",
    ("F.linear(self.dropout(x), self.lora_A)", "(self.lora_A @ self.dropout(x).T).T"),
    (UPDATE, "self.base(x) + self.scaling * torch.mm(self.dropout(x), (self.lora_B @ self.lora_A).T)"),
)
def takes_more_axes(MyLoRALinear, rng):
    """An input of shape (batch, tokens, in) does, too."""
    m = made(MyLoRALinear, rng)
    return works(lambda: near(m.layer.eval()(m.x[:, None]), m.expected[:, None]), RuntimeError)


@layer.must(
    "forward ignores self.scaling. Multiply the update by it; the lesson sets it to 0 to switch adapters off.",
    ("self.lora_B) * self.scaling", "self.lora_B) * (ALPHA / RANK)"),
    ("self.scaling", "self.s"),
)
def is_switched_off_by_its_scaling(MyLoRALinear, rng):
    """With scaling set to zero the layer is its base."""
    m = made(MyLoRALinear, rng)
    if not hasattr(m.layer, "scaling"):
        return False
    m.layer.scaling *= 0
    return near(m.layer.eval()(m.x), m.base(m.x))


@layer.must(
    "The gradient does not reach the layers below. Freezing parameters is enough: no detach(), no no_grad().",
    (UPDATE, "self.base(x).detach() + update"),
    ("self.dropout(x)", "self.dropout(x.detach())"),
)
def passes_the_gradient_on(MyLoRALinear, rng):
    """The gradient of the input is that of W0 + alpha / rank * B A."""
    m = made(MyLoRALinear, rng)
    m.layer.eval()(m.x.requires_grad_()).sum().backward()
    expected = (m.base.weight + ALPHA / RANK * m.update).sum(dim=0).expand(m.x.shape)
    return m.x.grad is not None and near(m.x.grad, expected)


@layer.must(
    "Your layer needs a bias, and many models, such as SmolLM2, have layers without one. Call self.base(x).",
    (UPDATE, "x @ self.base.weight.T + self.base.bias + update"),
)
def needs_no_bias(MyLoRALinear, rng):
    """A base without a bias does, too."""
    return works(lambda: is_right(made(MyLoRALinear, rng, bias=False)), TypeError, AttributeError)


@layer.must(
    "Right, but forward forms B A, which is as large as W0. Send x through A, and what comes out through B.",
    (
        "narrow = F.linear(self.dropout(x), self.lora_A)",
        "narrow = self.dropout(x)",
        "(narrow, self.lora_B)",
        "(narrow, self.lora_B @ self.lora_A)",
    ),
)
def never_forms_the_update(MyLoRALinear, rng):
    """Its forward pass never forms the product B A."""
    base, x = nn.Linear(40, 48), normal(rng, 1, 40)
    layer = MyLoRALinear(base, 2, ALPHA, 0.0)
    return products(lambda: layer(x)) < 1.5 * products(lambda: base(x))


# Its dropout


@layer.must(
    "The frozen path was dropped too. Dropout belongs on the input of A only.",
    ("F.linear(self.dropout(x)", "F.linear((x := self.dropout(x))"),
)
def leaves_the_frozen_path_whole(MyLoRALinear, rng):
    """Dropout leaves the frozen path alone."""
    m = made(MyLoRALinear, rng, dropout=0.5, moved=False)
    return near(m.layer.train()(m.x), m.base(m.x))


@layer.must(
    "Dropout must act in training and not in evaluation. Make it a module with nn.Dropout, and call it on x.",
    ("nn.Dropout(dropout)", "nn.Identity()"),
    ("self.dropout(x)", "F.dropout(x, self.dropout.p)"),
)
def drops_in_training_only(MyLoRALinear, rng):
    """Dropout acts in training and not in evaluation."""
    m = made(MyLoRALinear, rng, dropout=0.5)
    return not torch.equal(m.layer.train()(m.x), m.layer(m.x)) and is_right(m)


def dropped(MyLoRALinear, rng):
    """By what factor dropout multiplied each output's update, (60, 5), for inputs with one entry that is not zero."""
    m = made(MyLoRALinear, rng, dropout=0.75)
    x = torch.zeros(60, IN)
    x[:, 0] = 1 + torch.rand(60)
    return (m.layer.train()(x).double() - m.base(x).double()) / (ALPHA / RANK * (x.double() @ m.update.T))


@layer.must(
    "All examples lose the same entries, because dropout acts on A. Call self.dropout on x.",
    ("self.dropout(x), self.lora_A", "x, self.dropout(self.lora_A)"),
)
def drops_each_example_by_itself(MyLoRALinear, rng):
    """Dropout draws anew for each example."""
    ratios = dropped(MyLoRALinear, rng)
    return not torch.allclose(ratios, ratios[:1].expand_as(ratios), atol=0.05)


@layer.must(
    "Dropout acts after A or after B. It belongs on the input of A: call self.dropout on x.",
    ("F.linear(self.dropout(x), self.lora_A)", "self.dropout(F.linear(x, self.lora_A))"),
    ("self.dropout(x)", "x", UPDATE, "self.base(x) + self.dropout(update)"),
)
def drops_the_input_of_A(MyLoRALinear, rng):
    """It acts on the input of A."""
    ratios = dropped(MyLoRALinear, rng)
    return torch.allclose(ratios, ratios.amax(dim=1, keepdim=True).expand_as(ratios), atol=0.05)


@layer.must(
    "Dropout must scale what remains by 1 / (1 - p), or the mean changes. nn.Dropout does so.",
    ("self.dropout(x)", "self.dropout(x) * (1 - self.dropout.p if self.training else 1)"),
)
def scales_what_remains(MyLoRALinear, rng):
    """What remains is scaled by 1 / (1 - p)."""
    largest = dropped(MyLoRALinear, rng).amax(dim=1)
    return ((largest - 4).abs().lt(0.1) | largest.abs().lt(0.1)).all()


# Its merge


@layer.must(
    "The shapes of the merge do not fit. The update of W0 is lora_B @ lora_A, in this order.",
    ("self.lora_B @ self.lora_A", "self.lora_A @ self.lora_B"),
)
def merges_in_the_right_order(MyLoRALinear, rng):
    try:
        made(MyLoRALinear, rng).layer.merged()
    except RuntimeError as error:
        return "shapes cannot be multiplied" not in str(error)
    return True


@layer.must("__init__ and forward are right. merged is still open.", (MERGED, "raise NotImplementedError"))
def has_merged(MyLoRALinear, rng):
    return works(lambda: made(MyLoRALinear, rng).layer.merged() is not ..., NotImplementedError)


@layer.must(
    "merged() does not return a plain nn.Linear. Make one, such as a deep copy of the base.",
    ("return plain", "return self"),
    ("return plain", "return plain.weight"),
)
def merges_to_a_linear(MyLoRALinear, rng):
    """merged() is a plain nn.Linear."""
    merged = made(MyLoRALinear, rng).layer.merged()
    return type(merged) is nn.Linear and isinstance(merged.weight, nn.Parameter)


@layer.must(
    "Merging changed W0. Add the update to a new layer, such as a deep copy of the base.",
    (MERGED, "plain = self.base"),
)
def leaves_the_base_as_it_is(MyLoRALinear, rng):
    """Merging leaves the base as it was."""
    m = made(MyLoRALinear, rng)
    m.layer.merged()
    return any(torch.equal(tensor, m.base.weight) for tensor in m.layer.state_dict().values())


@layer.must(
    "Two merges of one layer differ. Merge A and B themselves, without dropout.",
    ("self.lora_B @ self.lora_A", "self.lora_B @ self.dropout(self.lora_A)"),
)
def merges_without_dropout(MyLoRALinear, rng):
    """Dropout has no part in a merge."""
    layer = made(MyLoRALinear, rng, dropout=0.5).layer.train()
    return torch.equal(layer.merged().weight, layer.merged().weight)


@layer.must(
    "Merged and unmerged differ by the bias. Copy it into the new layer.",
    (MERGED, NEW.format(", bias=False")),
    (MERGED, NEW.format("")),
)
def merges_the_bias(MyLoRALinear, rng):
    """The merged layer has the base's bias."""
    m = made(MyLoRALinear, rng)
    bias = m.layer.merged().bias
    return bias is not None and torch.equal(bias, m.base.bias)


@layer.must(
    "The merged layer shares its bias with the base, so training one would change the other. Copy it.",
    (MERGED, f"{NEW.format('')}; plain.bias = self.base.bias"),
)
def shares_nothing(MyLoRALinear, rng):
    """The merged layer shares no memory with the layer."""
    m = made(MyLoRALinear, rng)
    before = m.layer.eval()(m.x)
    for parameter in m.layer.merged().parameters():
        parameter.data.zero_()
    return torch.equal(m.layer(m.x), before)


@layer.must(
    "merged() does not keep a layer without a bias as one. Copy the bias only if there is one.",
    (MERGED, f"{NEW.format('')}; plain.bias.copy_(self.base.bias)"),
)
def merges_without_a_bias(MyLoRALinear, rng):
    """A base without a bias merges into a layer without one."""
    layer = made(MyLoRALinear, rng, bias=False).layer
    return works(lambda: layer.merged().bias is None, TypeError, AttributeError)


@layer.must(
    "The merged weight is not W0 + alpha / rank * B A. The merge forgot the scaling or the update.",
    ("self.scaling * (self.lora_B @ self.lora_A)", "self.lora_B @ self.lora_A"),
    ("self.scaling * (self.lora_B @ self.lora_A)", "0"),
)
def merges_the_scaled_update(MyLoRALinear, rng):
    """The merged layer computes what the layer computes."""
    m = made(MyLoRALinear, rng)
    return near(m.layer.merged()(m.x), m.expected)


@layer.must(
    "With dropout the merged layer is another than the layer in eval(). Dropout makes up for what it drops: "
    "add scaling * B @ A in full.",
    ("self.scaling * (self.lora_B @ self.lora_A)", "(1 - self.dropout.p) * self.scaling * (self.lora_B @ self.lora_A)"),
)
def merges_in_full_with_dropout(MyLoRALinear, rng):
    """So it does in evaluation if there is dropout."""
    m = made(MyLoRALinear, rng, dropout=0.5)
    return near(m.layer.merged()(m.x), m.expected)


# The clinic

FACTORS, COPY = "('hidden1', 'hidden2')", "copy.deepcopy(pretrained).requires_grad_(False)"
MISSPELT, TRAINED = (FACTORS, "('hidden_1', 'hidden_2')"), "[p for p in model.parameters() if p.requires_grad]"
LOSS, OPTIMIZER, FREEZE = "loss = loss_of(model)", "torch.optim.Adam(trainable, lr=0.01)", "model.requires_grad_(False)"

repair = Exercise(
    "repair",
    hints=[
        "Read the script from top to bottom. After each line, ask which parameters exist now and which are trained.",
        "Print ll.diagnose(model, optimizer, base=pretrained) at the end: it names what the adapter lacks.",
        "The order that works: copy the model, freeze it, put in the adapters, create the optimiser, then train.",
    ],
    praise="Two of these faults raise no error: the early optimiser and the wrong base. "
    "The other three stop in loss.backward(), with one message for all.",
)


@lru_cache(maxsize=1)  # a check asks many questions about one run
def treated(repair, rng):
    """Run a script on a small net, and note what happened, and less if it stops early.

    The notes: pair, whether it returned two things; empty, whether the optimiser got nothing to train; adapted, the
    layers with adapters, the package's, the learner's own or PEFT's; trained, the names of what is trained; measured,
    whether a loss was that of a model with adapters; graph, whether it could go backward, and backward, whether it did;
    base_kept, whether the pre-trained model is unchanged; held, how many of the adapters' parameters the optimiser
    holds, and of how many; problems, what ``diagnose`` calls so; moved, whether the outputs are others than before, and
    fell, whether the loss is lower; wiped, whether no gradient is left; rates, the learning rates.
    """
    pretrained = DigitsMLP(width=8, seed=int(rng.integers(2**31)))
    original = copy.deepcopy(pretrained)
    inputs, targets = normal(rng, 16, 64), torch.from_numpy(rng.integers(10, size=16))
    notes = SimpleNamespace(pair=True, empty=False, adapted=set(), trained=[])
    notes.measured = notes.graph = notes.backward = False

    def look(model):
        notes.adapted = {name for name, layer in model.named_modules() if hasattr(layer, "lora_B")}
        notes.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def loss_of(model):
        loss = F.cross_entropy(model(inputs), targets)
        look(model)
        notes.measured = notes.measured or notes.adapted
        notes.graph = loss.requires_grad
        if loss.requires_grad:
            loss.register_hook(lambda gradient: setattr(notes, "backward", True))
        return loss

    try:
        result = repair(pretrained, loss_of)
    except (RuntimeError, ValueError) as error:
        notes.empty = "empty parameter list" in str(error)
        if not notes.empty and "does not require grad" not in str(error):
            raise
        return notes
    notes.pair = are(result, 2, object) and isinstance(result[0], nn.Module)
    if not notes.pair:
        return notes
    model, optimizer = result
    with torch.no_grad():
        after, before = model(inputs), original(inputs)
    look(model)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    old, new = original.state_dict(), pretrained.state_dict()
    notes.base_kept = old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    notes.held = sum(id(parameter) in held for parameter in adapters), len(adapters)
    notes.problems = {each.check for each in diagnose(model, optimizer, base=original).problems}
    notes.moved = not torch.equal(after, before)
    notes.fell = F.cross_entropy(after, targets) < F.cross_entropy(before, targets)
    notes.wiped = all(parameter.grad is None or not parameter.grad.any() for parameter in adapters)
    notes.rates = [group["lr"] for group in optimizer.param_groups]
    return notes


@repair.must(
    "Return the model and the optimiser, in this order.",
    ("(model, optimizer)", "model"),
    ("(model, optimizer)", "(optimizer, model)"),
)
def returns_a_pair(repair, rng):
    return treated(repair, rng).pair


@repair.must(
    "The optimiser got nothing to train: no layer has an adapter (replace puts one in), or all of them are frozen.",
    MISSPELT,
    ("trainable = ", f"{FREEZE}\n    trainable = "),
)
def gives_the_optimiser_something(repair, rng):
    return not treated(repair, rng).empty


@repair.must(
    "No layer has an adapter. A target is misspelt, so nothing matched and nothing was replaced.",
    (*MISSPELT, TRAINED, "list(model.parameters())"),
    (*MISSPELT, ".requires_grad_(False)", ""),
)
def adapts_something(repair, rng):
    return treated(repair, rng).adapted


@repair.must(
    "Only one hidden layer has an adapter. Look at the other's name: they are hidden1 and hidden2.",
    (FACTORS, "('hidden1',)"),
    (FACTORS, "('hidden2',)"),
)
def adapts_both(repair, rng):
    return {"hidden1", "hidden2"} <= treated(repair, rng).adapted


@repair.must(
    "The adapters are frozen as well. Freeze the model before the adapters are put in, not after.",
    (LOSS, f"{FREEZE}\n    {LOSS}"),
)
def trains_something(repair, rng):
    return treated(repair, rng).trained


@repair.must(
    "Half of each adapter is frozen. Both lora_A and lora_B have requires_grad = True.",
    ("trainable = ", "[p.requires_grad_('lora_A' in name) for name, p in model.named_parameters()]\n    trainable = "),
)
def trains_both_factors(repair, rng):
    ends = {name.rpartition(".")[2] for name in treated(repair, rng).trained}
    return "lora_A" not in ends or "lora_B" in ends


@repair.must(
    "Parameters outside the adapters are trainable. Freeze the model before the adapters are put in.",
    (".requires_grad_(False)", ""),
)
def trains_the_adapters_alone(repair, rng):
    """The adapters are trained, and nothing else."""
    trained = treated(repair, rng).trained
    return trained and all("lora_" in name for name in trained)


@repair.must(
    "A layer that is not hidden has an adapter too. Adapt hidden1 and hidden2 only.",
    (FACTORS, "('hidden1', 'hidden2', 'head')"),
)
def adapts_the_hidden_layers(repair, rng):
    """The layers hidden1 and hidden2 have adapters, and no other layer has."""
    return treated(repair, rng).adapted == {"hidden1", "hidden2"}


@repair.must(
    "The loss has no graph to go backward through. Move the forward pass out of torch.no_grad().",
    (LOSS, f"with torch.no_grad():\n        {LOSS}"),
)
def has_a_graph(repair, rng):
    return treated(repair, rng).graph


@repair.must(
    "The pre-trained model itself was changed. Work on a deep copy of it.", ("copy.deepcopy(pretrained)", "pretrained")
)
def keeps_the_base(repair, rng):
    return treated(repair, rng).base_kept


@repair.must(
    "This is the loss of a model without adapters, such as the pre-trained one. Call loss_of(model).",
    (LOSS, "loss = loss_of(pretrained)"),
)
def measures_the_adapted_model(repair, rng):
    return treated(repair, rng).measured


@repair.must(
    "The optimiser holds only a part of the adapters. Give it each lora_A and each lora_B.",
    (TRAINED, "[p for name, p in model.named_parameters() if 'lora_A' in name]"),
)
def holds_no_part_of_them(repair, rng):
    held, count = treated(repair, rng).held
    return held in (0, count)


@repair.must(
    "The optimiser does not hold the adapters. Create it after the adapters, because their parameters are new.",
    (
        COPY,
        f"copy.deepcopy(pretrained)\n    optimizer = torch.optim.Adam(model.parameters())\n    {FREEZE}",
        f"optimizer = {OPTIMIZER}",
        "",
    ),
)
def holds_the_adapters(repair, rng):
    """The optimiser holds all that is trained, and the pre-trained net is as it was."""
    notes = treated(repair, rng)
    return notes.base_kept and notes.held[0] > 0 and "optimizer" not in notes.problems


@repair.must(
    "The shapes agree, but the base does not. Start from a copy of the pre-trained model, not from a new one.",
    ("copy.deepcopy(pretrained)", "DigitsMLP(width=8)"),
)
def has_the_right_base(repair, rng):
    notes = treated(repair, rng)
    return notes.held[0] > 0 and "base" not in notes.problems


@repair.must("No gradient was computed. Call loss.backward() before optimizer.step().", ("loss.backward()", "pass"))
def goes_backward(repair, rng):
    return treated(repair, rng).backward


@repair.must(
    "The gradients were gone before the step. Call optimizer.zero_grad() before loss.backward(), not after it.",
    ("optimizer.step()", "optimizer.zero_grad()\n    optimizer.step()"),
)
def keeps_the_gradients(repair, rng):
    notes = treated(repair, rng)
    return notes.moved or not notes.wiped


@repair.must("The learning rate is zero, so a step has no length.", ("lr=0.01", "lr=0.0"))
def has_a_rate(repair, rng):
    return all(rate > 0 for rate in treated(repair, rng).rates)


@repair.must("The adapters have not moved. Call optimizer.step() after loss.backward().", ("optimizer.step()", "pass"))
def moves(repair, rng):
    notes = treated(repair, rng)
    return not notes.problems and notes.moved


@repair.must(
    "The adapters moved, but the loss rose. Go down its gradient, and in smaller steps.", ("loss.b", "(-loss).b")
)
def learns_on_its_base(repair, rng):
    """Its frozen weights are the pre-trained ones, a gradient was computed, and its loss is lower than theirs."""
    notes = treated(repair, rng)
    return notes.fell and notes.backward and not notes.problems


Reflection(
    "03_lora_from_scratch",
    question="You adapt a layer with your own class and train it; the loss does not fall at all. Describe in five "
    "to eight sentences how you would find the reason. Then: why does LoRA start with B at zero and A at "
    "random, and what would happen with both at zero?",
    rubric=(
        "At least two causes are named that raise no error.",
        "For each of them the answer says what to print or compare to see it.",
        "It says why B at zero leaves the model as it was.",
        "It says from the gradients why one factor at zero can learn and two cannot.",
    ),
    expected="Causes without an error: the optimiser was made before the adapters and holds none of them; a "
    "target's name is misspelt and nothing was replaced; the base has random weights; the adapters are "
    "frozen. To see them: the names of trained parameters, whether they are in optimizer.param_groups, "
    "whether they differ after a step, the base's loss before training. B at zero makes B A zero, so the "
    "first output is the base's. The gradient of B holds A x and that of A holds B: with B at zero B "
    "moves first, with both at zero neither ever does.",
)
