"""Exercises of lesson 03: LoRA, line by line."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.analysis.diagnosis import diagnose
from lora_lab.course.exercise import Exercise, Probe, exercises_of, normal
from lora_lab.inject import LoRAConfig, inject
from lora_lab.lora import LoRALinear
from lora_lab.models.digits import DigitsMLP

LESSON = "03_lora_from_scratch"
exercise = exercises_of(LESSON)


# The forward line


def layer_case(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """x (n, in), W (out, in), A (r, in), B (out, r) and alpha; all sizes differ, and alpha is larger.

    W is frozen; x, A and B need gradients. The rank is none of the lesson's numbers, and half the time it is larger
    than the other sizes.
    """
    n, inp, out = (int(size) for size in rng.permutation([5, 6, 7]))
    rank, alpha = int(rng.choice([3, 9])), float(rng.choice([20, 29, 31, 40]))
    A, B = normal(rng, rank, inp).requires_grad_(), normal(rng, out, rank).requires_grad_()
    return normal(rng, n, inp).requires_grad_(), normal(rng, out, inp), A, B, alpha


@exercise(
    "forward",
    inputs=layer_case,
    mistakes={
        "The scaling is missing. Multiply the update by alpha / r.": lambda x, W, A, B, alpha: x @ W.T + x @ A.T @ B.T,
        "Your update is r times too large. Divide alpha by the rank, which is A.shape[0].": (
            lambda x, W, A, B, alpha: x @ W.T + alpha * (x @ A.T @ B.T)
        ),
        "The update is scaled by alpha / sqrt(r), which is rsLoRA (lesson 10). LoRA divides by r.": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) ** 0.5 * (x @ A.T @ B.T)
        ),
        "The scaling is a fixed number. Compute it from alpha and the rank, which is A.shape[0].": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / 4 * (x @ A.T @ B.T),
            lambda x, W, A, B, alpha: x @ W.T + 2 * (x @ A.T @ B.T),
        ),
        "alpha // r drops what is behind the decimal point. Write alpha / r.": (
            lambda x, W, A, B, alpha: x @ W.T + alpha // len(A) * (x @ A.T @ B.T)
        ),
        "The update is divided by the number of outputs. The rank is A.shape[0].": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(B) * (x @ A.T @ B.T)
        ),
        "The update is divided by the number of inputs. The rank is A.shape[0], not A.shape[1].": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / A.shape[1] * (x @ A.T @ B.T)
        ),
        "The scaling is upside down. It is alpha / r, not r / alpha.": (
            lambda x, W, A, B, alpha: x @ W.T + len(A) / alpha * (x @ A.T @ B.T)
        ),
        "The frozen path is missing. Add what W makes of x.": (
            lambda x, W, A, B, alpha: alpha / len(A) * (x @ A.T @ B.T)
        ),
        "The adapter does nothing. The update through A and B is never added.": lambda x, W, A, B, alpha: x @ W.T,
        "W is scaled as well. The scaling belongs to the update alone.": (
            lambda x, W, A, B, alpha: alpha / len(A) * (x @ W.T + x @ A.T @ B.T)
        ),
        "The update is subtracted. It is added to the frozen path.": (
            lambda x, W, A, B, alpha: x @ W.T - alpha / len(A) * (x @ A.T @ B.T)
        ),
        "The shapes do not fit. x has its examples in rows, so multiply from the right: x @ W.T or F.linear(x, W).": (
            lambda x, W, A, B, alpha: x @ W + alpha / len(A) * (x @ A @ B),
            lambda x, W, A, B, alpha: W @ x + alpha / len(A) * (B @ A @ x),
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x @ A @ B),
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (B @ (A @ x)),
        ),
        "A and B are exchanged. x goes through A first, (n, in) -> (n, r), and then through B, (n, r) -> (n, out).": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x @ B.T @ A.T),
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x @ (A @ B).T),
        ),
    },
    hints=[
        "Two paths are added: one through W, one through A and then B.",
        "x has one example in each row, so a layer computes x @ W.T, which is F.linear(x, W).",
        "The update is (x @ A.T) @ B.T times alpha / r, and r is A.shape[0].",
    ],
    minutes=6,
    difficulty=1,
    praise="This line is all that LoRA adds to a layer, and the package's own layer computes the same.",
    draws=10,
)
def forward(x, W, A, B, alpha):
    """The result is x W^T + alpha / r * x A^T B^T, with its gradients, for several shapes, ranks and alphas."""
    return x @ W.T + alpha / A.shape[0] * (x @ A.T @ B.T)


# The initialisation

SIZES = [(24, 40), (40, 24)]  # outputs and inputs; of them, and of this rank, the range of A is seen sharply
MANY = 12


def _draw(answer: Callable[..., Any], rng: np.random.Generator, out: int, inp: int, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a fresh generator."""
    return answer(out, inp, rank, torch.Generator().manual_seed(int(rng.integers(2**31))))


def _start(answer: Callable[..., Any], rng: np.random.Generator) -> tuple[Tensor, Tensor, int, int, int]:
    """A, B, out, in and rank of one start."""
    out, inp = (int(size) for size in rng.permutation([24, 32, 40])[:2])
    rank = int(rng.integers(3, 6))
    return *_draw(answer, rng, out, inp, rank), out, inp, rank


def _start_returns_two(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    result: Any = _draw(answer, rng, 24, 32, 4)
    return isinstance(result, tuple | list) and len(result) == 2 and all(isinstance(each, Tensor) for each in result)


def _start_has_shapes(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    A, B, out, inp, rank = _start(answer, rng)
    return A.shape == (rank, inp) and B.shape == (out, rank)


def _start_is_no_dead_end(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    A, B, *_ = _start(answer, rng)
    return bool(A.any() or B.any())


def _start_keeps_the_layer(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    A, B, *_ = _start(answer, rng)
    return not bool((B @ A).any())


def _start_has_zero_B(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return not bool(_start(answer, rng)[1].any())


def _start_has_numbers_of_its_own(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return all(0 not in factor.stride() for factor in _start(answer, rng)[:2])


def _start_depends_on_the_inputs_alone(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    """The entries of A for 128 inputs are as large for many outputs as for few, and for a high rank as for a low."""
    usual, *others = (
        _draw(answer, rng, out, 128, rank)[0].square().mean().sqrt().item()
        for out, rank in ((24, MANY), (96, MANY), (24, 4 * MANY))
    )
    return all(0.7 * usual < other < 1.4 * usual for other in others)


def _start_is_small(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return all(_draw(answer, rng, out, n, MANY)[0].abs().max().item() <= 1.001 / math.sqrt(n) for out, n in SIZES)


def _start_fills_the_range(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return all(
        A.max().item() > 0.9 * bound and A.min().item() < -0.9 * bound and 0.5 < A.std().item() / bound < 0.66
        for A, bound in ((_draw(answer, rng, out, inp, MANY)[0], 1 / math.sqrt(inp)) for out, inp in SIZES)
    )


def _start_has_its_rank(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    A, _, _, _, rank = _start(answer, rng)
    return int(torch.linalg.matrix_rank(A.detach().double())) == rank


def _start_uses_the_generator(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    seeds = [int(seed) for seed in rng.choice(10**6, 2, replace=False)]

    def draw(seed: int) -> Tensor:
        torch.rand(1)  # a draw elsewhere must not matter
        return answer(24, 32, 4, torch.Generator().manual_seed(seed))[0]

    return torch.equal(draw(seeds[0]), draw(seeds[0])) and not torch.equal(draw(seeds[0]), draw(seeds[1]))


def _start_moves_the_generator(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    return not torch.equal(answer(24, 32, 4, generator)[0], answer(24, 32, 4, generator)[0])


def _uniform(rank: int, inp: int, bound: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty(rank, inp).uniform_(-bound, bound, generator=generator)


def _again(generator: torch.Generator) -> torch.Generator:
    """A generator that begins where the other began."""
    return torch.Generator().manual_seed(generator.initial_seed())


@exercise(
    "start",
    probes=[
        Probe(
            _start_returns_two,
            "Return two tensors, A and B, in this order.",
            (
                lambda out, inp, r, generator: _uniform(r, inp, inp**-0.5, generator),
                lambda out, inp, r, generator: {"A": _uniform(r, inp, inp**-0.5, generator), "B": torch.zeros(out, r)},
            ),
        ),
        Probe(
            _start_has_shapes,
            "The shapes are wrong. A is (r, inp) and B is (out, r); return them in this order.",
            (
                lambda out, inp, r, generator: (torch.zeros(out, r), _uniform(r, inp, inp**-0.5, generator)),
                lambda out, inp, r, generator: (_uniform(inp, r, inp**-0.5, generator), torch.zeros(r, out)),
            ),
        ),
        Probe(
            _start_is_no_dead_end,
            "A and B are both zero. Each waits for the other, so nothing can learn.",
            (lambda out, inp, r, generator: (torch.zeros(r, inp), torch.zeros(out, r)),),
        ),
        Probe(
            _start_keeps_the_layer,
            "Training has not begun, and the layer already differs. B must be zero, so that B A is zero.",
            (lambda out, inp, r, generator: (_uniform(r, inp, inp**-0.5, generator), _uniform(out, r, 1, generator)),),
        ),
        Probe(
            _start_has_zero_B,
            "A is zero and B is random. It would learn, but LoRA starts with A random and B zero.",
            (lambda out, inp, r, generator: (torch.zeros(r, inp), _uniform(out, r, 1, generator)),),
        ),
        Probe(
            _start_has_numbers_of_its_own,
            "A matrix repeats one number in memory, so its entries cannot be trained. Make B with torch.zeros.",
            (
                lambda out, inp, r, generator: (
                    _uniform(r, inp, inp**-0.5, generator),
                    torch.zeros(1, 1).expand(out, r),
                ),
            ),
        ),
        Probe(
            _start_depends_on_the_inputs_alone,
            "The range of A depends on the rank or on the outputs. Its bound is 1 / sqrt(inp), from the inputs alone.",
            (
                lambda out, inp, r, generator: (_uniform(r, inp, r**-0.5, generator), torch.zeros(out, r)),
                lambda out, inp, r, generator: (_uniform(r, inp, out**-0.5, generator), torch.zeros(out, r)),
            ),
        ),
        Probe(
            _start_is_small,
            "A leaves the range from -1 / sqrt(inp) to 1 / sqrt(inp). Draw it uniformly; kaiming_uniform_ needs "
            "a=math.sqrt(5).",
            (
                lambda out, inp, r, generator: (torch.randn(r, inp, generator=generator), torch.zeros(out, r)),
                lambda out, inp, r, generator: (
                    torch.randn(r, inp, generator=generator) / math.sqrt(3 * inp),
                    torch.zeros(out, r),
                ),
                lambda out, inp, r, generator: (_uniform(r, inp, (6 / inp) ** 0.5, generator), torch.zeros(out, r)),
            ),
        ),
        Probe(
            _start_has_its_rank,
            "The rows of A are not independent, so its rank is below r. Draw each of its entries by itself.",
            (
                lambda out, inp, r, generator: (
                    _uniform(1, inp, inp**-0.5, generator).repeat(r, 1),
                    torch.zeros(out, r),
                ),
                lambda out, inp, r, generator: (torch.full((r, inp), inp**-0.5), torch.zeros(out, r)),
            ),
        ),
        Probe(
            _start_fills_the_range,
            "A does not fill the range. Draw its entries uniformly between -1 / sqrt(inp) and 1 / sqrt(inp).",
            (
                lambda out, inp, r, generator: (_uniform(r, inp, 1 / inp, generator), torch.zeros(out, r)),
                lambda out, inp, r, generator: (_uniform(r, inp, inp**-0.5, generator).abs(), torch.zeros(out, r)),
                lambda out, inp, r, generator: (
                    _uniform(r, inp, 1, generator).sign() / math.sqrt(inp),
                    torch.zeros(out, r),
                ),
            ),
        ),
        Probe(
            _start_uses_the_generator,
            "A does not follow the generator, so a draw elsewhere moves it. Pass generator=generator to the draw.",
            (
                lambda out, inp, r, generator: (_uniform(r, inp, inp**-0.5, None), torch.zeros(out, r)),
                lambda out, inp, r, generator: (
                    _uniform(r, inp, inp**-0.5, torch.Generator().manual_seed(0)),
                    torch.zeros(out, r),
                ),
            ),
        ),
        Probe(
            _start_moves_the_generator,
            "Two layers would start alike. Draw with the generator itself, not with a new one that has its seed.",
            (
                lambda out, inp, r, generator: (
                    _uniform(r, inp, inp**-0.5, _again(generator)),
                    torch.zeros(out, r),
                ),
            ),
        ),
    ],
    hints=[
        "The update B A must be exactly zero, and yet one of the two factors must have a non-zero gradient.",
        "torch.zeros makes B. Its gradient is not zero as long as A is not.",
        "torch.empty(r, inp).uniform_(-bound, bound, generator=generator) draws A; the bound is 1 / sqrt(inp).",
    ],
    minutes=8,
    difficulty=1,
    praise="The adapted model starts as the pre-trained one, bit for bit, and can still learn.",
    draws=2,
)
def start(out, inp, r, generator):
    """B A is exactly zero, B has a gradient, A is uniform on +-1 / sqrt(inp), and the generator determines it."""
    bound = 1 / math.sqrt(inp)
    A = torch.empty(r, inp).uniform_(-bound, bound, generator=generator)
    B = torch.zeros(out, r)
    return A, B


# The class

IN, OUT, RANK, ALPHA = 7, 5, 3, 8.0  # of the layers below
INITIAL, MERGED, UPDATE = "nn.Parameter(A)", "plain = copy.deepcopy(self.base)", "self.base(x) + update"
NEW = "plain = nn.Linear(self.base.in_features, self.base.out_features{}); plain.weight.copy_(self.base.weight)"

layer = Exercise(
    "MyLoRALinear",
    LESSON,
    hints=[
        "__init__ freezes the base, stores the scaling and the dropout, and wraps what start returns in nn.Parameter.",
        "forward adds self.base(x) and the update. F.linear(v, M) is v @ M.T; only the update sees self.dropout(x).",
        "merged makes copy.deepcopy(self.base) and adds scaling * (B @ A) to its weight; the bias stays.",
    ],
    minutes=20,
    praise="You have written LoRA: your layer can replace any nn.Linear in float32, with or without a bias.",
    draws=1,
    uses=["start"],
)


def made(answer, rng, dropout=0.0, bias=True, moved=True):
    """A layer, a copy of its base, an input (6, 7), the update B A, not scaled, and what the layer shall compute."""
    base = nn.Linear(IN, OUT, bias=bias)
    x, untouched = normal(rng, 6, IN), copy.deepcopy(base)
    layer = answer(base, RANK, ALPHA, dropout)
    A, B = (next((p for p in layer.parameters() if p.shape == shape), None) for shape in ((RANK, IN), (OUT, RANK)))
    update = expected = None
    if moved:
        nn.init.normal_(B)
        update = (B.double() @ A.double()).detach()
        expected = untouched(x) + (ALPHA / RANK * (x.double() @ update.T)).float()
    return SimpleNamespace(layer=layer, base=untouched, x=x, A=A, B=B, update=update, expected=expected)


def near(actual, expected):
    """Whether two tensors agree up to 0.0001."""
    return actual.shape == expected.shape and torch.allclose(actual.double(), expected.double(), atol=1e-4)


def works(function, *errors):
    """Whether a call raises none of these errors, and returns something true."""
    try:
        return bool(function())
    except errors:
        return False


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
    return all(factor is not None and factor.requires_grad for factor in (m.A, m.B))


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
    "__init__ is right as far as it can be checked. forward is still open.",
    ("narrow = F.linear(self.dropout(x), self.lora_A)", "raise NotImplementedError"),
)
def has_forward(MyLoRALinear, rng):
    m = made(MyLoRALinear, rng, moved=False)
    return works(lambda: m.layer(m.x) is not ..., NotImplementedError)


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
    return bool(made(MyLoRALinear, rng, moved=False).A.any())


@layer.must(
    "A does not follow the generator. Pass it on: start(base.out_features, base.in_features, rank, generator).",
    ("rank, generator)", "rank, None)"),
)
def follows_the_generator(MyLoRALinear, rng):
    """The generator alone decides A."""
    seeds, draws = rng.choice(10**6, 2, replace=False).tolist(), []
    for seed in (seeds[0], seeds[0], seeds[1]):
        torch.rand(1)  # a draw elsewhere must not matter
        layer = MyLoRALinear(nn.Linear(IN, OUT), RANK, ALPHA, 0.0, torch.Generator().manual_seed(seed))
        draws.append(next(p for p in layer.parameters() if p.shape == (RANK, IN)))
    return torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


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
    m = made(MyLoRALinear, rng)
    return near(m.layer.eval()(m.x), m.expected)


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
    return works(
        lambda: near((m := made(MyLoRALinear, rng, bias=False)).layer.eval()(m.x), m.expected),
        TypeError,
        AttributeError,
    )


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
    return not torch.equal(m.layer.train()(m.x), m.layer(m.x)) and near(m.layer.eval()(m.x), m.expected)


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
    return bool(((largest - 4).abs().lt(0.1) | largest.abs().lt(0.1)).all())


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
    except NotImplementedError:
        pass
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


# The clinic

HIDDEN = ("hidden1", "hidden2")  # the layers to adapt


def _adapted(model: nn.Module) -> tuple[str, ...]:
    """The layers with an adapter: the package's, the learner's own or PEFT's, which all call its factors so."""
    return tuple(name for name, layer in model.named_modules() if hasattr(layer, "lora_A") and hasattr(layer, "lora_B"))


@lru_cache(maxsize=1)  # a check asks a dozen questions about one run
def _treated(answer: Callable[..., Any], rng: np.random.Generator) -> dict[str, Any]:
    """Run a script on a small net and note what happened.

    Returns:
        problems: what ``diagnose`` calls problems, by name of the check; empty: whether the optimiser got nothing to
        train; adapted: the layers with adapters; trainable, outside, graph: whether the model that was measured had
        something to train, something outside the adapters to train, and a graph; backward: whether a gradient was
        computed; base_kept: whether the pre-trained model is unchanged; moved, fell: whether the outputs are others
        afterwards, and the loss lower.
    """
    pretrained = DigitsMLP(width=8, seed=int(rng.integers(2**31)))
    original = copy.deepcopy(pretrained)
    inputs, targets = normal(rng, 16, 64), torch.from_numpy(rng.integers(10, size=16))
    notes: dict[str, Any] = {"empty": False, "adapted": (), "trainable": False, "outside": False, "graph": False}
    notes |= {"backward": False, "base_kept": True, "problems": set(), "moved": False, "fell": False}

    def look(model: nn.Module) -> None:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        notes["adapted"] = _adapted(model)
        notes["trainable"] = bool(trained)
        notes["outside"] = any("lora_" not in name for name in trained)

    def loss_of(model: nn.Module) -> Tensor:
        loss = F.cross_entropy(model(inputs), targets)
        look(model)
        notes["graph"] = loss.requires_grad
        if loss.requires_grad:
            loss.register_hook(lambda gradient: notes.update(backward=True))
        return loss

    try:
        model, optimizer = answer(pretrained, loss_of)
    except (RuntimeError, ValueError) as error:
        if "empty parameter list" in str(error):
            return notes | {"empty": True}
        if "does not require grad" not in str(error):
            raise
        return notes
    with torch.no_grad():
        outputs, originals = model(inputs), original(inputs)
        moved = not torch.equal(outputs, originals)
        fell = bool(F.cross_entropy(outputs, targets) < F.cross_entropy(originals, targets))
    look(model)
    problems = {each.check for each in diagnose(model, optimizer, base=original).problems}
    old, new = original.state_dict(), pretrained.state_dict()
    base_kept = old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    return notes | {"base_kept": base_kept, "problems": problems, "moved": moved, "fell": fell}


def repair(pretrained, loss_of):
    """A copy of the pre-trained model has two adapters, they alone are trained, and ``diagnose`` finds no problem."""
    model = copy.deepcopy(pretrained).requires_grad_(False)
    inject(model, LoRAConfig(rank=4, alpha=8, targets=["hidden1", "hidden2"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, optimizer


def _faulty(
    targets: tuple[str, ...] = HIDDEN,
    frozen: bool = False,
    unfrozen: bool = False,
    no_graph: bool = False,
    early: bool = False,
    stranger: bool = False,
    in_place: bool = False,
    backward: bool = True,
    step: bool = True,
    sign: int = 1,
    trained_only: bool = False,
) -> Callable[..., Any]:
    """The script with some faults."""

    def script(
        pretrained: nn.Module, loss_of: Callable[[nn.Module], Tensor]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = DigitsMLP(width=8) if stranger else pretrained if in_place else copy.deepcopy(pretrained)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        model.requires_grad_(unfrozen)
        for name in targets:
            setattr(model, name, LoRALinear(getattr(model, name), rank=4, alpha=8))
        if frozen:
            model.requires_grad_(False)
        if not early:
            optimizer = torch.optim.Adam(
                [each for each in model.parameters() if each.requires_grad or not trained_only], lr=1e-2
            )
        for _ in range(3):
            with torch.set_grad_enabled(not no_graph):
                loss = loss_of(model)
            optimizer.zero_grad()
            if backward:
                (sign * loss).backward()
            elif targets:
                nn.init.normal_(model.get_submodule(targets[0]).lora_B, std=1e-3)  # pyright: ignore[reportArgumentType]
            if step:
                optimizer.step()
        return model, optimizer

    return script


exercise(
    "repair",
    probes=[
        Probe(
            lambda answer, rng: not _treated(answer, rng)["empty"],
            "The optimiser got nothing to train. Either no layer has an adapter, or the adapters are frozen as well.",
            (_faulty(targets=(), trained_only=True), _faulty(frozen=True, trained_only=True)),
        ),
        Probe(
            lambda answer, rng: bool(_treated(answer, rng)["adapted"]),
            "No layer has an adapter. A target is misspelt, so nothing matched and nothing was replaced.",
            (_faulty(targets=()), _faulty(targets=(), unfrozen=True)),
        ),
        Probe(
            lambda answer, rng: set(HIDDEN) <= set(_treated(answer, rng)["adapted"]),
            "Only one hidden layer has an adapter. Look at the other's name: they are hidden1 and hidden2.",
            (_faulty(targets=("hidden1",)), _faulty(targets=("hidden2",))),
        ),
        Probe(
            lambda answer, rng: _treated(answer, rng)["trainable"],
            "The adapters are frozen as well. Freeze the model before the adapters are put in, not after.",
            (_faulty(frozen=True),),
        ),
        Probe(
            lambda answer, rng: not _treated(answer, rng)["outside"],
            "Parameters outside the adapters are trainable. Freeze the model before the adapters are put in.",
            (_faulty(unfrozen=True),),
        ),
        Probe(
            lambda answer, rng: set(_treated(answer, rng)["adapted"]) == set(HIDDEN),
            "A layer that is not hidden has an adapter too. Adapt hidden1 and hidden2 only.",
            (_faulty(targets=(*HIDDEN, "head")),),
        ),
        Probe(
            lambda answer, rng: _treated(answer, rng)["graph"],
            "The loss has no graph to go backward through. Move the forward pass out of torch.no_grad().",
            (_faulty(no_graph=True),),
        ),
        Probe(
            lambda answer, rng: _treated(answer, rng)["base_kept"],
            "The pre-trained model itself was changed. Work on a deep copy of it.",
            (_faulty(in_place=True),),
        ),
        Probe(
            lambda answer, rng: "optimizer" not in _treated(answer, rng)["problems"],
            "The optimiser does not hold the adapters. Create it after the adapters, because their parameters are new.",
            (_faulty(early=True),),
        ),
        Probe(
            lambda answer, rng: "base" not in _treated(answer, rng)["problems"],
            "The shapes agree, but the base does not. Start from a copy of the pre-trained model, not from a new one.",
            (_faulty(stranger=True),),
        ),
        Probe(
            lambda answer, rng: _treated(answer, rng)["backward"],
            "No gradient was computed. Call loss.backward() before optimizer.step().",
            (_faulty(backward=False),),
        ),
        Probe(
            lambda answer, rng: not _treated(answer, rng)["problems"] and _treated(answer, rng)["moved"],
            "The adapters have not moved. Call optimizer.step() after loss.backward().",
            (_faulty(step=False),),
        ),
        Probe(
            lambda answer, rng: _treated(answer, rng)["fell"],
            "The adapters moved, but the loss rose. Go down its gradient, and in smaller steps.",
            (_faulty(sign=-1),),
        ),
    ],
    hints=[
        "Read the script from top to bottom. After each line, ask which parameters exist now and which are trained.",
        "Print ll.diagnose(model, optimizer, base=pretrained) at the end: it names what the adapter lacks.",
        "The order that works: copy the model, freeze it, put in the adapters, create the optimiser, then train.",
    ],
    minutes=15,
    difficulty=2,
    praise="Two of these faults raise no error: the early optimiser and the wrong base. "
    "The other three stop in loss.backward(), with one message for all.",
    draws=1,
)(repair)
