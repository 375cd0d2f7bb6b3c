"""Exercises of lesson 03: LoRA, line by line."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.analysis.diagnosis import diagnose
from lora_lab.classroom.exercise import Probe, exercises_of, normal
from lora_lab.inject import LoRAConfig, inject, lora_layers
from lora_lab.models.digits import DigitsMLP

exercise = exercises_of("03_lora_from_scratch")


# The forward line


def layer_case(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """x (n, in), W (out, in), A (r, in), B (out, r) and alpha; all sizes differ, and alpha is not r."""
    n, inp, out = (int(size) for size in rng.permutation([3, 4, 5]))
    rank, alpha = 2, float(rng.choice([5.0, 8.0, 11.0]))
    return normal(rng, n, inp), normal(rng, out, inp), normal(rng, rank, inp), normal(rng, out, rank), alpha


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
    """The result is x W^T + alpha / r * x A^T B^T, for several shapes, ranks and alphas."""
    return x @ W.T + alpha / A.shape[0] * (x @ A.T @ B.T)


# The start


def _start(answer: Callable[..., Any], rng: np.random.Generator) -> tuple[Tensor, Tensor, int, int, int]:
    """A, B, out, in and rank of one start; sizes are large enough to tell how A is drawn."""
    out, inp = (int(size) for size in rng.permutation([24, 32, 40])[:2])
    rank = int(rng.integers(3, 6))
    A, B = answer(out, inp, rank, torch.Generator().manual_seed(int(rng.integers(2**31))))
    return A, B, out, inp, rank


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


def _start_is_small(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    A, _, _, inp, _ = _start(answer, rng)
    return A.abs().max().item() <= 1.001 / math.sqrt(inp)


def _start_is_large_enough(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    A, _, _, inp, _ = _start(answer, rng)
    return A.std().item() > 0.4 / math.sqrt(inp) and A.mean().abs().item() < 0.4 / math.sqrt(inp)


def _start_uses_the_generator(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    seeds = [int(seed) for seed in rng.choice(10**6, 2, replace=False)]

    def draw(seed: int) -> Tensor:
        torch.rand(1)  # a draw elsewhere must not matter
        return answer(24, 32, 4, torch.Generator().manual_seed(seed))[0]

    return torch.equal(draw(seeds[0]), draw(seeds[0])) and not torch.equal(draw(seeds[0]), draw(seeds[1]))


def _uniform(rank: int, inp: int, bound: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty(rank, inp).uniform_(-bound, bound, generator=generator)


@exercise(
    "start",
    probes=[
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
            _start_is_small,
            "A is too large. Its entries lie between -1 / sqrt(inp) and 1 / sqrt(inp), not as randn draws them.",
            (
                lambda out, inp, r, generator: (torch.randn(r, inp, generator=generator), torch.zeros(out, r)),
                lambda out, inp, r, generator: (_uniform(r, inp, r**-0.5, generator), torch.zeros(out, r)),
            ),
        ),
        Probe(
            _start_is_large_enough,
            "A is too small, or its entries have one sign. Draw it uniformly between -1 / sqrt(inp) and 1 / sqrt(inp).",
            (
                lambda out, inp, r, generator: (_uniform(r, inp, 1 / inp, generator), torch.zeros(out, r)),
                lambda out, inp, r, generator: (_uniform(r, inp, inp**-0.5, generator).abs(), torch.zeros(out, r)),
                lambda out, inp, r, generator: (torch.full((r, inp), inp**-0.5), torch.zeros(out, r)),
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
    ],
    hints=[
        "The update B A must be exactly zero, and yet one of the two factors must have a gradient.",
        "torch.zeros makes B. Its gradient is not zero as long as A is not.",
        "torch.empty(r, inp).uniform_(-bound, bound, generator=generator) draws A; the bound is 1 / sqrt(inp).",
    ],
    minutes=8,
    difficulty=2,
    praise="The adapted model starts as the pre-trained one, bit for bit, and can still learn.",
    draws=2,
)
def start(out, inp, r, generator):
    """B A is exactly zero, B has a gradient, |A| <= 1 / sqrt(inp), and the same generator gives the same A."""
    bound = 1 / math.sqrt(inp)
    A = torch.empty(r, inp).uniform_(-bound, bound, generator=generator)
    B = torch.zeros(out, r)
    return A, B


# The class

IN, OUT, RANK, ALPHA = 7, 5, 3, 8.0  # of the layers below


def _layer(answer: type, rng: np.random.Generator, dropout: float = 0.0) -> tuple[Any, nn.Linear, Tensor]:
    """A fresh layer of the learner's class, a copy of its base, and an input (6, 7)."""
    base = nn.Linear(IN, OUT)
    base.weight.data, base.bias.data = normal(rng, OUT, IN), normal(rng, OUT)
    untouched = copy.deepcopy(base)
    return answer(base, RANK, ALPHA, dropout), untouched, normal(rng, 6, IN)


def _factor(layer: nn.Module, shape: tuple[int, int]) -> nn.Parameter | None:
    """The parameter of that shape: A is (3, 7) and B is (5, 3)."""
    return next((parameter for parameter in layer.parameters() if parameter.shape == shape), None)


def _moved(answer: type, rng: np.random.Generator, dropout: float = 0.0) -> tuple[Any, nn.Linear, Tensor, Tensor]:
    """A layer whose B is no longer zero, a copy of its base, an input, and the update B A of the input, not scaled."""
    layer, base, x = _layer(answer, rng, dropout)
    A, B = _factor(layer, (RANK, IN)), _factor(layer, (OUT, RANK))
    assert A is not None
    assert B is not None
    with torch.no_grad():
        B.copy_(normal(rng, OUT, RANK))
        return layer, base, x, x @ A.T @ B.T


def _close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-4)


def _is_a_module(answer: type, rng: np.random.Generator) -> bool:
    return issubclass(answer, nn.Module)


def _factors_are_parameters(answer: type, rng: np.random.Generator) -> bool:
    layer, _, _ = _layer(answer, rng)
    factors = _factor(layer, (RANK, IN)), _factor(layer, (OUT, RANK))
    return all(factor is not None and factor.requires_grad for factor in factors)


def _base_is_frozen(answer: type, rng: np.random.Generator) -> bool:
    layer, base, x = _layer(answer, rng)
    optimizer = torch.optim.SGD([each for each in layer.parameters() if each.requires_grad], lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    stored = {tuple(tensor.shape): tensor for tensor in layer.state_dict().values()}
    return torch.equal(stored[OUT, IN], base.weight) and torch.equal(stored.get((OUT,), base.bias), base.bias)


def _starts_as_its_base(answer: type, rng: np.random.Generator) -> bool:
    layer, base, x = _layer(answer, rng)
    return _close(layer.eval()(x), base(x)) or _close(layer(x), base(x) - base.bias)


def _A_is_random(answer: type, rng: np.random.Generator) -> bool:
    A = _factor(_layer(answer, rng)[0], (RANK, IN))
    return A is not None and bool(A.any())


def _has_its_bias(answer: type, rng: np.random.Generator) -> bool:
    layer, base, x = _layer(answer, rng)
    return not _close(layer.eval()(x), base(x) - base.bias)


def _update_is_scaled(answer: type, rng: np.random.Generator) -> bool:
    layer, base, x, update = _moved(answer, rng)
    return _close(layer.eval()(x), base(x) + ALPHA / RANK * update)


def _frozen_path_is_whole(answer: type, rng: np.random.Generator) -> bool:
    layer, base, x = _layer(answer, rng, dropout=0.5)
    return _close(layer.train()(x), base(x))


def _drops_in_training_only(answer: type, rng: np.random.Generator) -> bool:
    layer, _, x, _ = _moved(answer, rng, dropout=0.5)
    return not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def _merges_to_linear(answer: type, rng: np.random.Generator) -> bool:
    return type(_moved(answer, rng)[0].merged()) is nn.Linear


def _merging_leaves_the_base(answer: type, rng: np.random.Generator) -> bool:
    layer, base, _, _ = _moved(answer, rng)
    layer.merged()
    return any(torch.equal(tensor, base.weight) for tensor in layer.state_dict().values())


def _merges_without_dropout(answer: type, rng: np.random.Generator) -> bool:
    layer, *_ = _moved(answer, rng, dropout=0.5)
    layer.train()
    return torch.equal(layer.merged().weight, layer.merged().weight)


def _merge_has_the_bias(answer: type, rng: np.random.Generator) -> bool:
    layer, base, _, _ = _moved(answer, rng)
    bias = layer.merged().bias
    return bias is not None and torch.equal(bias, base.bias)


def _merge_is_scaled(answer: type, rng: np.random.Generator) -> bool:
    layer, base, x, update = _moved(answer, rng)
    return _close(layer.merged()(x), base(x) + ALPHA / RANK * update)


class MyLoRALinear(nn.Module):
    """Base frozen, A and B trained, equal to the base at the start, and merged() is the same function."""

    def __init__(self, base, rank, alpha, dropout=0.0, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)  # W0 (48, 64) and b (48,)
        self.scaling = alpha / rank  # 8 / 4 = 2
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))  # (4, 64)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))  # (48, 4)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)  # (4, 64)

    def forward(self, x):
        narrow = F.linear(self.dropout(x), self.lora_A)  # (32, 64) -> (32, 4)
        update = F.linear(narrow, self.lora_B) * self.scaling  # (32, 4) -> (32, 48)
        return self.base(x) + update  # (32, 48)

    @torch.no_grad()
    def merged(self):
        """A new nn.Linear that computes the same."""
        plain = copy.deepcopy(self.base)  # (48, 64) and (48,)
        plain.weight += self.scaling * (self.lora_B @ self.lora_A)  # (48, 4) @ (4, 64) -> (48, 64)
        return plain


class _NoModule:
    def __init__(self, base, rank, alpha, dropout=0.0):
        self.base = base


class _TrainableBase(MyLoRALinear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.base.requires_grad_(True)


class _TrainableBias(MyLoRALinear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.base.bias.requires_grad_(True)


class _PlainA(MyLoRALinear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        A = self.lora_A.detach()
        del self.lora_A
        self.lora_A = A


class _PlainB(MyLoRALinear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        B = self.lora_B.detach()
        del self.lora_B
        self.lora_B = B


class _FrozenA(MyLoRALinear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lora_A.requires_grad_(False)


class _RandomB(MyLoRALinear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.normal_(self.lora_B)


class _ZeroA(MyLoRALinear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.lora_A)


class _NoBias(MyLoRALinear):
    def forward(self, x):
        return super().forward(x) - self.base.bias


class _NoScaling(MyLoRALinear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scaling = 1.0


class _AlphaAlone(MyLoRALinear):
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.scaling = alpha


class _OneDropout(MyLoRALinear):
    def forward(self, x):
        x = self.dropout(x)
        return self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


class _NoDropout(MyLoRALinear):
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha)


class _DropsAlways(MyLoRALinear):
    def forward(self, x):
        dropped = F.dropout(x, self.dropout.p)
        return self.base(x) + self.scaling * (dropped @ self.lora_A.T @ self.lora_B.T)


class _MergesToItself(MyLoRALinear):
    def merged(self):
        return self


class _MergesToATensor(MyLoRALinear):
    def merged(self):
        return super().merged().weight


class _MergesInPlace(MyLoRALinear):
    @torch.no_grad()
    def merged(self):
        self.base.weight += self.scaling * (self.lora_B @ self.lora_A)
        return self.base


class _MergesWithDropout(MyLoRALinear):
    @torch.no_grad()
    def merged(self):
        plain = copy.deepcopy(self.base)
        plain.weight += self.scaling * (self.lora_B @ self.dropout(self.lora_A))
        return plain


class _MergesWithoutBias(MyLoRALinear):
    @torch.no_grad()
    def merged(self):
        plain = nn.Linear(self.base.in_features, self.base.out_features, bias=False)
        plain.weight.copy_(self.base.weight + self.scaling * (self.lora_B @ self.lora_A))
        return plain


class _MergesWithAnotherBias(MyLoRALinear):
    @torch.no_grad()
    def merged(self):
        plain = nn.Linear(self.base.in_features, self.base.out_features)
        plain.weight.copy_(self.base.weight + self.scaling * (self.lora_B @ self.lora_A))
        return plain


class _MergesWithoutScaling(MyLoRALinear):
    @torch.no_grad()
    def merged(self):
        plain = copy.deepcopy(self.base)
        plain.weight += self.lora_B @ self.lora_A
        return plain


class _MergesNothing(MyLoRALinear):
    def merged(self):
        return copy.deepcopy(self.base)


exercise(
    "MyLoRALinear",
    probes=[
        Probe(
            _is_a_module,
            "This class is no module. Derive it from nn.Module, and call super().__init__() first.",
            (_NoModule,),
        ),
        Probe(
            _factors_are_parameters,
            "A or B is not among the trained parameters. Wrap both in nn.Parameter.",
            (_PlainA, _PlainB, _FrozenA),
        ),
        Probe(
            _base_is_frozen,
            "The base moved in a training step. Freeze its weight and bias with requires_grad_(False).",
            (_TrainableBase, _TrainableBias),
        ),
        Probe(
            _starts_as_its_base,
            "A fresh layer differs from its base already. B must start at zero.",
            (_RandomB,),
        ),
        Probe(
            _A_is_random,
            "A and B both start at zero, so neither can ever learn. Draw A at random.",
            (_ZeroA,),
        ),
        Probe(
            _has_its_bias,
            "The bias is lost. Call self.base(x), which adds it.",
            (_NoBias,),
        ),
        Probe(
            _update_is_scaled,
            "The update is not alpha / rank * B A x. Divide alpha by the rank, and multiply the update by the result.",
            (_NoScaling, _AlphaAlone),
        ),
        Probe(
            _frozen_path_is_whole,
            "The frozen path was dropped too. Dropout belongs on the input of A only.",
            (_OneDropout,),
        ),
        Probe(
            _drops_in_training_only,
            "Dropout must act in training and not in evaluation. Make it a module with nn.Dropout, and call it on x.",
            (_NoDropout, _DropsAlways),
        ),
        Probe(
            _merges_to_linear,
            "merged() does not return a plain nn.Linear. Make one, such as a deep copy of the base.",
            (_MergesToItself, _MergesToATensor),
        ),
        Probe(
            _merging_leaves_the_base,
            "Merging changed W0. Add the update to a new layer, such as a deep copy of the base.",
            (_MergesInPlace,),
        ),
        Probe(
            _merges_without_dropout,
            "Two merges of one layer differ. Merge A and B themselves, without dropout.",
            (_MergesWithDropout,),
        ),
        Probe(
            _merge_has_the_bias,
            "Merged and unmerged differ by the bias. Copy it into the new layer.",
            (_MergesWithoutBias, _MergesWithAnotherBias),
        ),
        Probe(
            _merge_is_scaled,
            "The merged weight is not W0 + alpha / rank * B A. The merge forgot the scaling or the update.",
            (_MergesWithoutScaling, _MergesNothing),
        ),
    ],
    hints=[
        "__init__ freezes the base, makes A (random) and B (zero) with nn.Parameter, and stores alpha / rank.",
        "forward adds self.base(x) and the update; the update alone sees self.dropout(x).",
        "merged() changes a copy of the base: its weight becomes W0 + scaling * B A, its bias stays.",
    ],
    minutes=20,
    difficulty=2,
    praise="You have written LoRA: your layer can replace any nn.Linear of a model.",
    draws=1,
)(MyLoRALinear)


# The clinic


def _treated(answer: Callable[..., Any], rng: np.random.Generator) -> dict[str, Any]:
    """Run a script on a small net and note what happened.

    Returns:
        problems: what ``diagnose`` calls problems, by name of the check; adapted, trainable, graph: whether the model
        that was measured had adapters, something to train, and a graph; base_kept: whether the pre-trained model is
        unchanged; fell: whether the loss is lower afterwards.
    """
    pretrained = DigitsMLP(width=8, seed=int(rng.integers(2**31)))
    original = copy.deepcopy(pretrained)
    inputs, targets = normal(rng, 16, 64), torch.from_numpy(rng.integers(10, size=16))
    notes: dict[str, Any] = {"adapted": False, "trainable": False, "graph": False}

    def loss_of(model: nn.Module) -> Tensor:
        loss = F.cross_entropy(model(inputs), targets)
        notes["adapted"] = bool(lora_layers(model))
        notes["trainable"] = any(parameter.requires_grad for parameter in model.parameters())
        notes["graph"] = loss.requires_grad
        return loss

    try:
        model, optimizer = answer(pretrained, loss_of)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        return notes | {"base_kept": True, "problems": set(), "fell": False}
    with torch.no_grad():
        fell = bool(loss_of(model) < loss_of(original))
        notes |= {"adapted": bool(lora_layers(model)), "graph": True}
        notes["trainable"] = any(parameter.requires_grad for parameter in model.parameters())
    diagnosis = diagnose(model, optimizer, base=original)
    before, after = original.state_dict(), pretrained.state_dict()
    base_kept = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return notes | {"base_kept": base_kept, "problems": {each.check for each in diagnosis.problems}, "fell": fell}


def repair(pretrained, loss_of):
    """A copy of the pre-trained model has adapters, they are trained, and ``diagnose`` finds no problem."""
    model = copy.deepcopy(pretrained)
    inject(model, LoRAConfig(rank=4, alpha=8, targets=["hidden1", "hidden2"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, optimizer


def _faulty(
    misspelt: bool = False,
    frozen: bool = False,
    no_graph: bool = False,
    early: bool = False,
    stranger: bool = False,
    in_place: bool = False,
    no_step: bool = False,
) -> Callable[..., Any]:
    """The script with some faults."""

    def script(
        pretrained: nn.Module, loss_of: Callable[[nn.Module], Tensor]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = DigitsMLP(width=8) if stranger else pretrained if in_place else copy.deepcopy(pretrained)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if not misspelt:
            inject(model, LoRAConfig(rank=4, alpha=8, targets=["hidden1", "hidden2"]))
        if frozen:
            model.requires_grad_(False)
        if not early and not frozen:
            optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        for _ in range(3):
            with torch.set_grad_enabled(not no_graph):
                loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            if not no_step:
                optimizer.step()
        return model, optimizer

    return script


exercise(
    "repair",
    probes=[
        Probe(
            lambda answer, rng: _treated(answer, rng)["adapted"],
            "No layer has an adapter. A target is misspelt, so nothing matched and nothing was replaced.",
            (_faulty(misspelt=True),),
        ),
        Probe(
            lambda answer, rng: _treated(answer, rng)["trainable"],
            "The adapters are frozen as well. Freeze the model before the adapters are put in, not after.",
            (_faulty(frozen=True),),
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
            lambda answer, rng: not _treated(answer, rng)["problems"] and _treated(answer, rng)["fell"],
            "The adapters have not moved. Call optimizer.step() after loss.backward().",
            (_faulty(no_step=True),),
        ),
    ],
    hints=[
        "Read the script from top to bottom. After each line, ask which parameters exist now and which are trained.",
        "Print ll.diagnose(model, optimizer, base=pretrained) at the end: it names what the adapter lacks.",
        "The order that works: copy the model, inject, create the optimiser, then train with gradients recorded.",
    ],
    minutes=15,
    difficulty=3,
    praise="Each of these five faults raises no error and has cost people days; now you know where to look.",
    draws=1,
)(repair)
