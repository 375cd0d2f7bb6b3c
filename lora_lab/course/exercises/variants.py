"""Exercises of lesson 10: variants of LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lab.course.exercise import Probe, exercises_of, normal
from lora_lab.lora import LoRALinear

exercise = exercises_of("10_variants")


# rsLoRA and LoRA-FA, derived from LoRA


def _layer(answer: type, rng: np.random.Generator) -> Any:
    """An adapted layer whose sizes all differ, with an alpha that is not its rank."""
    inp, out = (int(size) for size in rng.permutation([6, 7, 8])[:2])
    rank, alpha = int(rng.integers(2, 5)), float(rng.choice([5.0, 7.0, 11.0]))
    return answer(nn.Linear(inp, out), rank, alpha)


def _close(value: Any, expected: Any) -> bool:
    return torch.allclose(torch.as_tensor(value), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def _is_lora(answer: type, rng: np.random.Generator) -> bool:
    return issubclass(answer, LoRALinear)


def _of_each_rank(answer: type) -> list[Any]:
    """One layer of each rank, because at a single rank a constant may be right by chance."""
    return [answer(nn.Linear(8, 6), rank, 5.0) for rank in (2, 3, 4)]


def _scaling_is_a_number(answer: type, rng: np.random.Generator) -> bool:
    return isinstance(_layer(answer, rng).scaling, int | float | np.number | Tensor)


def _has_another_scaling(answer: type, rng: np.random.Generator) -> bool:
    return not all(math.isclose(layer.scaling, layer.alpha / layer.rank) for layer in _of_each_rank(answer))


def _scales_by_the_root(answer: type, rng: np.random.Generator) -> bool:
    layers = _of_each_rank(answer)
    return all(math.isclose(layer.scaling, layer.alpha / math.sqrt(layer.rank), rel_tol=1e-6) for layer in layers)


def _follows_the_rank(answer: type, rng: np.random.Generator) -> bool:
    layer = _layer(answer, rng)
    rank = layer.rank + 3  # as after resize
    layer.lora_A = nn.Parameter(normal(rng, rank, layer.base.in_features))
    layer.lora_B = nn.Parameter(normal(rng, layer.base.out_features, rank))
    return math.isclose(layer.scaling, layer.alpha / math.sqrt(rank), rel_tol=1e-6)


def _scales_once(answer: type, rng: np.random.Generator) -> bool:
    layer = _layer(answer, rng)
    layer.lora_B.data.copy_(normal(rng, *layer.lora_B.shape))
    x = normal(rng, 5, layer.base.in_features)
    update = layer.alpha / math.sqrt(layer.rank) * (x @ layer.lora_A.T @ layer.lora_B.T)
    return _close(layer(x), layer.base(x) + update)


class _NoLoRA(nn.Linear):
    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features)


class _ScalesByAMethod(LoRALinear):
    def scaling(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride] - the planted mistake
        return self.alpha / math.sqrt(self.rank)


class _ScalesByNothing(LoRALinear):
    @property
    def scaling(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - the planted mistake
        pass


class _ScalesByTheRank(LoRALinear):
    pass


class _ScalesByAlpha(LoRALinear):
    @property
    def scaling(self) -> float:
        return self.alpha


class _ScalesByHalfOfAlpha(LoRALinear):
    @property
    def scaling(self) -> float:
        return self.alpha / 2


class _ScalesByTheRootOfBoth(LoRALinear):
    @property
    def scaling(self) -> float:
        return math.sqrt(self.alpha / self.rank)


class _MultipliesByTheRoot(LoRALinear):
    @property
    def scaling(self) -> float:
        return self.alpha * math.sqrt(self.rank)


class _ScalesByTheFirstRank(LoRALinear):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.first_scaling = self.alpha / math.sqrt(self.rank)

    @property
    def scaling(self) -> float:
        return self.first_scaling


class _ScalesTwice(LoRALinear):
    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.rank)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)
        return frozen + (super().forward(x) - frozen) * self.scaling


@exercise(
    "RsLoRA",
    probes=[
        Probe(_is_lora, "The class is no LoRALinear. Derive it: class RsLoRA(LoRALinear).", (_NoLoRA,)),
        Probe(
            _scaling_is_a_number,
            "self.scaling is not a number. Keep @property above the method, and return one.",
            (_ScalesByAMethod, _ScalesByNothing),
        ),
        Probe(_has_another_scaling, "The scaling is still alpha / rank, which is LoRA's.", (_ScalesByTheRank,)),
        Probe(
            _scales_by_the_root,
            "The scaling is not alpha / sqrt(rank). The root is of the rank alone, and it divides.",
            (_ScalesByAlpha, _ScalesByHalfOfAlpha, _ScalesByTheRootOfBoth, _MultipliesByTheRoot),
        ),
        Probe(
            _follows_the_rank,
            "The scaling was computed once. An adapter can be resized, so compute it from self.rank at each use.",
            (_ScalesByTheFirstRank,),
        ),
        Probe(
            _scales_once,
            "The update is scaled twice. LoRALinear's forward uses self.scaling already, so leave it as it is.",
            (_ScalesTwice,),
        ),
    ],
    hints=[
        "One property differs from LoRA's. The forward pass stays the same.",
        "LoRALinear has self.alpha and self.rank.",
        "The root of a number is number**0.5.",
    ],
    minutes=5,
    difficulty=2,
    praise="At any one rank it is LoRA with a larger alpha. Its claim is about what happens when the rank grows.",
)
class RsLoRA(LoRALinear):
    """Base and update are LoRA's, and the update is scaled by alpha / sqrt(rank), whatever rank it has now."""

    @property
    def scaling(self) -> float:
        """The factor of the update."""
        return self.alpha / self.rank**0.5


def _after_a_backward_pass(answer: type, rng: np.random.Generator) -> Any:
    layer = _layer(answer, rng)
    layer(normal(rng, 5, layer.base.in_features)).square().sum().backward()
    return layer


def _trains_B(answer: type, rng: np.random.Generator) -> bool:
    return _layer(answer, rng).lora_B.requires_grad


def _A_is_random(answer: type, rng: np.random.Generator) -> bool:
    return bool(_layer(answer, rng).lora_A.any())


def _A_varies(answer: type, rng: np.random.Generator) -> bool:
    A = _layer(answer, rng).lora_A
    return len(A.unique()) == A.numel()


def _B_starts_at_zero(answer: type, rng: np.random.Generator) -> bool:
    return not _layer(answer, rng).lora_B.any()


def _A_has_no_gradient(answer: type, rng: np.random.Generator) -> bool:
    return _after_a_backward_pass(answer, rng).lora_A.grad is None


def _A_is_frozen(answer: type, rng: np.random.Generator) -> bool:
    return not _layer(answer, rng).lora_A.requires_grad


def _still_learns(answer: type, rng: np.random.Generator) -> bool:
    gradient = _after_a_backward_pass(answer, rng).lora_B.grad
    return gradient is not None and bool(gradient.any())


class _FreezesB(LoRALinear):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lora_B.requires_grad_(False)


class _FreezesAll(LoRALinear):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.requires_grad_(False)


class _ZerosA(LoRALinear):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        nn.init.zeros_(self.lora_A).requires_grad_(False)


class _OnesA(LoRALinear):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        nn.init.ones_(self.lora_A).requires_grad_(False)


class _DrawsB(LoRALinear):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lora_A.requires_grad_(False)
        nn.init.normal_(self.lora_B)


class _FreezesNothing(LoRALinear):
    pass


class _DetachesA(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * (x @ self.lora_A.detach().T @ self.lora_B.T)


class _DetachesTheUpdate(LoRALinear):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lora_A.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.requires_grad_()) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T).detach()


@exercise(
    "LoRAFA",
    probes=[
        Probe(_is_lora, "The class is no LoRALinear. Derive it: class LoRAFA(LoRALinear).", (_NoLoRA,)),
        Probe(
            _trains_B,
            "B is frozen. It starts at zero, so the update stays zero and nothing can learn.",
            (_FreezesB, _FreezesAll),
        ),
        Probe(_A_is_random, "A is zero, so B never gets a gradient. Keep A's random start.", (_ZerosA,)),
        Probe(_A_varies, "A has equal entries, so it is not random. Keep it as LoRALinear draws it.", (_OnesA,)),
        Probe(
            _B_starts_at_zero,
            "B does not start at zero, so the layer differs from the base before training. Leave B as it is.",
            (_DrawsB,),
        ),
        Probe(_A_has_no_gradient, "A still learns, as in LoRA. LoRA-FA freezes it.", (_FreezesNothing, RsLoRA)),
        Probe(
            _A_is_frozen,
            "A has no gradient, but it still counts as trained, with an optimiser state. Freeze the parameter itself.",
            (_DetachesA,),
        ),
        Probe(_still_learns, "B has no gradient. Leave the forward pass as LoRALinear has it.", (_DetachesTheUpdate,)),
    ],
    hints=[
        "The constructor of LoRALinear has made A and B by then. One of them must stop learning.",
        "A parameter learns as long as its requires_grad is True.",
        "A parameter's method requires_grad_ takes True or False. The parameter is self.lora_A.",
    ],
    minutes=5,
    difficulty=2,
    praise="One line freezes A. The backward pass now needs A x, r numbers a token, in place of x.",
)
class LoRAFA(LoRALinear):
    """A stays at its random start and is not trained, and B learns as in LoRA."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_A.requires_grad_(False)


# PiSSA's start

Parts = tuple[Tensor, Tensor, Tensor]


def _split(answer: Callable[..., Parts], rng: np.random.Generator) -> tuple[Tensor, float, Tensor, Parts]:
    """W (out, in), the scaling, the best approximation of W of that rank, and the answer's parts."""
    out, inp = (int(size) for size in rng.permutation([6, 7, 8])[:2])
    rank, scaling = int(rng.integers(2, 4)), float(rng.choice([0.5, 2.0, 3.0]))
    left, right = (torch.linalg.qr(normal(rng, size, 6))[0] for size in (out, inp))  # (out, 6), (in, 6)
    values = torch.tensor([9.0, 6.0, 4.0, 2.5, 1.5, 1.0]) * rng.uniform(0.8, 1.2)  # (6,), well separated
    W = left * values @ right.T  # (out, in)
    best = left[:, :rank] * values[:rank] @ right[:, :rank].T  # (out, in)
    residual, B, A = answer(W.clone(), rank, scaling)
    if not all(isinstance(part, Tensor) for part in (residual, B, A)):
        raise TypeError
    if residual.shape != W.shape or B.shape != (out, rank) or A.shape != (rank, inp):
        raise _WrongShapes
    return W, scaling, best, (residual, B, A)


class _WrongShapes(Exception):
    pass


def _has_three_parts(answer: Callable[..., Parts], rng: np.random.Generator) -> bool:
    try:
        _split(answer, rng)
    except NotImplementedError:
        raise
    except (_WrongShapes, TypeError, ValueError, AttributeError):
        return False
    return True


def _subtracts(answer: Callable[..., Parts], rng: np.random.Generator) -> bool:
    W, _, _, (residual, _, _) = _split(answer, rng)
    return not _close(residual, W)


def _is_the_largest_part(answer: Callable[..., Parts], rng: np.random.Generator) -> bool:
    _, _, best, (_, B, A) = _split(answer, rng)
    part = B @ A
    return _close(part / part.norm(), best / best.norm())


def _undoes_the_scaling(answer: Callable[..., Parts], rng: np.random.Generator) -> bool:
    _, scaling, best, (_, B, A) = _split(answer, rng)
    return _close(scaling * B @ A, best)


def _adds_up(answer: Callable[..., Parts], rng: np.random.Generator) -> bool:
    W, scaling, _, (residual, B, A) = _split(answer, rng)
    return _close(residual + scaling * B @ A, W)


def _divides_both_by_the_scaling(answer: Callable[..., Parts], rng: np.random.Generator) -> bool:
    _, scaling, _, (_, B, A) = _split(answer, rng)
    ratio = B.norm(dim=0) / A.norm(dim=1)  # (rank,)
    return not any(_close(ratio, torch.full_like(ratio, factor)) for factor in (scaling, 1 / scaling))


def _is_balanced(answer: Callable[..., Parts], rng: np.random.Generator) -> bool:
    _, _, _, (_, B, A) = _split(answer, rng)
    return _close(B.norm(dim=0), A.norm(dim=1))


def _pissa(W: Tensor, rank: int, scaling: float) -> Parts:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return W - scaling * B @ A, B, A


def _weakest(W: Tensor, rank: int, scaling: float) -> Parts:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[-rank:] / scaling).sqrt()
    B, A = U[:, -rank:] * root, root[:, None] * Vh[-rank:]
    return W - scaling * B @ A, B, A


def _without_values(W: Tensor, rank: int, scaling: float) -> Parts:
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    B, A = U[:, :rank], Vh[:rank]
    return W - scaling * B @ A, B, A


def _unbalanced(W: Tensor, rank: int, scaling: float) -> Parts:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    B, A = U[:, :rank] * S[:rank] / scaling, Vh[:rank]
    return W - scaling * B @ A, B, A


def _scales_B_alone(W: Tensor, rank: int, scaling: float) -> Parts:
    residual, B, A = _pissa(W, rank, scaling)
    return residual, B / math.sqrt(scaling), A * math.sqrt(scaling)


def _scales_A_alone(W: Tensor, rank: int, scaling: float) -> Parts:
    residual, B, A = _pissa(W, rank, scaling)
    return residual, B * math.sqrt(scaling), A / math.sqrt(scaling)


def _ignores_the_scaling(W: Tensor, rank: int, scaling: float) -> Parts:
    return _pissa(W, rank, 1.0)


def _ignores_half_of_the_scaling(W: Tensor, rank: int, scaling: float) -> Parts:
    _, B, A = _pissa(W, rank, 1.0)
    return W - scaling * B @ A, B, A


def _divides_twice(W: Tensor, rank: int, scaling: float) -> Parts:
    _, B, A = _pissa(W, rank, scaling**2)
    return W - scaling * B @ A, B, A


@exercise(
    "pissa_start",
    probes=[
        Probe(
            _has_three_parts,
            "Return three tensors, in this order: residual (out, in), B (out, r) and A (r, in).",
            (
                lambda W, rank, scaling: _pissa(W, rank, scaling)[1:],
                lambda W, rank, scaling: (_pissa(W, rank, scaling)[1], _pissa(W, rank, scaling)[2], W),
                lambda W, rank, scaling: tuple(part.T for part in _pissa(W, rank, scaling)),
                lambda W, rank, scaling: tuple(part.numpy() for part in _pissa(W, rank, scaling)),
            ),
        ),
        Probe(
            _subtracts,
            "The largest part is there twice, in W and in B A. Subtract it from the frozen weight.",
            (lambda W, rank, scaling: (W, *_pissa(W, rank, scaling)[1:]),),
        ),
        Probe(
            _is_the_largest_part,
            "B A is not the best approximation of rank r. It takes the r largest singular values with their vectors.",
            (_weakest, _without_values),
        ),
        Probe(
            _undoes_the_scaling,
            "The layer multiplies B A by the scaling, so divide the singular values by it before you take the root.",
            (_ignores_the_scaling, _ignores_half_of_the_scaling, _divides_twice),
        ),
        Probe(
            _adds_up,
            "The parts do not add up to W. What is frozen lacks scaling * B A, with the scaling.",
            (
                lambda W, rank, scaling: (
                    W - _pissa(W, rank, scaling)[1] @ _pissa(W, rank, scaling)[2],
                    *_pissa(W, rank, scaling)[1:],
                ),
                lambda W, rank, scaling: (2 * W - _pissa(W, rank, scaling)[0], *_pissa(W, rank, scaling)[1:]),
            ),
        ),
        Probe(
            _divides_both_by_the_scaling,
            "B A is right, but only one factor was divided by the scaling. "
            "Divide the singular values by it before you take the root, so that both factors are divided alike.",
            (_scales_B_alone, _scales_A_alone),
        ),
        Probe(
            _is_balanced,
            "One factor holds all of the singular values. Give each factor their square root.",
            (_unbalanced,),
        ),
    ],
    hints=[
        "torch.linalg.svd(W, full_matrices=False) returns U, S and Vh, the largest value first.",
        "B takes the first r columns of U, and A the first r rows of Vh, each times the root of S[:r] / scaling.",
        "The residual is what is left of W after scaling times B times A is taken away.",
    ],
    minutes=10,
    difficulty=2,
    praise="The adapted layer starts as the pre-trained one, although neither factor is zero.",
)
def pissa(W, rank, scaling):
    """W = residual + scaling * B A, where scaling * B A is W's best approximation of that rank, shared evenly."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return W - scaling * B @ A, B, A


# DoRA's length


def dora_case(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor]:
    """x (n, in), W (out, in), A (r, in), B (out, r), the scaling, and m (out); all sizes differ."""
    n, inp, out = (int(size) for size in rng.permutation([4, 5, 6, 7])[:3])
    rank, scaling = int(rng.integers(2, 4)), float(rng.choice([0.5, 2.0, 3.0]))
    m = torch.from_numpy(rng.uniform(2, 4, out)).float()
    return normal(rng, n, inp), normal(rng, out, inp), normal(rng, rank, inp), normal(rng, out, rank), scaling, m


def _dora(V: Tensor, length: Tensor, x: Tensor, m: Tensor) -> Tensor:
    return x @ (m[:, None] * V / length).T


@exercise(
    "dora_length",
    inputs=dora_case,
    mistakes={
        "You took the length of V's columns. Each output has one length, taken along the inputs: dim=1.": (
            lambda x, W, A, B, scaling, m: _dora(W + scaling * B @ A, (W + scaling * B @ A).norm(dim=0), x, m)
        ),
        "You divided by the length of the whole matrix. Each row of V has a length of its own.": (
            lambda x, W, A, B, scaling, m: _dora(W + scaling * B @ A, (W + scaling * B @ A).norm(), x, m)
        ),
        "m is missing. Without it each output has length 1, and the layer differs from W0 before training.": (
            lambda x, W, A, B, scaling, m: _dora(
                W + scaling * B @ A, (W + scaling * B @ A).norm(dim=1, keepdim=True), x, torch.ones_like(m)
            )
        ),
        "You divided by the length of W's rows. It is the length of V's rows, which move as B A learns.": (
            lambda x, W, A, B, scaling, m: _dora(W + scaling * B @ A, W.norm(dim=1, keepdim=True), x, m)
        ),
        "You divided by the squared length. The length is the root of the sum of squares.": (
            lambda x, W, A, B, scaling, m: _dora(
                W + scaling * B @ A, (W + scaling * B @ A).square().sum(1, keepdim=True), x, m
            )
        ),
        "Nothing was divided, so m stretches rows that have a length already. Divide each row of V by its length.": (
            lambda x, W, A, B, scaling, m: _dora(W + scaling * B @ A, torch.ones(()), x, m)
        ),
        "The scaling is missing. V is W + scaling * B A.": (
            lambda x, W, A, B, scaling, m: _dora(W + B @ A, (W + B @ A).norm(dim=1, keepdim=True), x, m)
        ),
        "W is added once more. V holds it already.": lambda x, W, A, B, scaling, m: (
            x @ W.T + _dora(W + scaling * B @ A, (W + scaling * B @ A).norm(dim=1, keepdim=True), x, m)
        ),
        "The update is outside. In DoRA, B A changes the direction, so add it to W before you divide by the length.": (
            lambda x, W, A, B, scaling, m: _dora(W, W.norm(dim=1, keepdim=True), x, m) + scaling * x @ A.T @ B.T
        ),
    },
    hints=[
        "V is a matrix of W's shape, (out, in). Compute it first.",
        "V.norm(dim=1) has one length for each row. With keepdim=True its shape is (out, 1), which divides V.",
        "m[:, None] has the shape (out, 1) as well. x has one example in each row, so multiply by the transpose.",
    ],
    minutes=8,
    difficulty=2,
    praise="B A turns each row of the weight, and m alone sets its length.",
)
def dora(x, W, A, B, scaling, m):
    """The result is x times the transpose of m V / ||V||, with V = W + scaling * B A and a length for each output."""
    V = W + scaling * B @ A
    return x @ (m[:, None] * V / V.norm(dim=1, keepdim=True)).T


# One number


def rank_case(rng: np.random.Generator) -> tuple[int]:
    """A rank above 1."""
    return (int(rng.integers(2, 65)),)


def _ratios(rslora: float, lora: float = 1.0, lora_fa: float = math.inf) -> dict[str, float]:
    return {"LoRA": lora, "rsLoRA": rslora, "LoRA-FA": lora_fa}


@exercise(
    "one_number",
    inputs=rank_case,
    mistakes={
        "rsLoRA's ratio is not r. Its factor alpha / sqrt(r) is divided by LoRA's factor alpha / r.": (
            lambda rank: _ratios(float(rank))
        ),
        "rsLoRA's ratio is upside down. Its factor is larger than LoRA's, so B is faster.": (
            lambda rank: _ratios(rank**-0.5),
            lambda rank: _ratios(1 / rank),
        ),
        "rsLoRA is not LoRA: its factor is another one. Divide it by LoRA's.": lambda rank: _ratios(1.0),
        "In LoRA, A and B have one learning rate, so its ratio is 1.": (
            lambda rank: _ratios(rank**0.5, lora=0.0),
            lambda rank: _ratios(rank**0.5, lora=1 / rank),
        ),
        "LoRA-FA's ratio is upside down. A stands still, so B is infinitely faster.": (
            lambda rank: _ratios(rank**0.5, lora_fa=0.0)
        ),
        "In LoRA-FA, A does not learn at all. So B's rate over A's is neither 1 nor large: it is infinite.": (
            lambda rank: _ratios(rank**0.5, lora_fa=1.0),
            lambda rank: _ratios(rank**0.5, lora_fa=1e9),
        ),
    },
    hints=[
        "LoRA+ with the ratio 1 gives A and B the same rate.",
        "A factor c in front of B acts like c times B's rate. Find the c that turns alpha / r into alpha / sqrt(r).",
        "Python's infinity is float('inf').",
    ],
    minutes=5,
    difficulty=1,
    praise="Three methods, one number. So compare them at rates that take this ratio into account.",
)
def ratios(rank):
    """B's learning rate over A's is 1 for LoRA, sqrt(r) for rsLoRA and infinite for LoRA-FA, at every rank."""
    return {"LoRA": 1.0, "rsLoRA": rank**0.5, "LoRA-FA": float("inf")}
