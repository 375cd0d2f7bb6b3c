"""Hidden tests of lesson 03: LoRA, line by line."""

from __future__ import annotations

import copy
import math

import torch
from torch.nn import functional as F

from lora_lab.course.grading.invariant import Reflection, close, invariant_of


@invariant_of("forward")
def is_the_frozen_layer_without_an_update(forward, rng):
    """With B at zero the result is that of the frozen layer."""
    x, W, A = (torch.from_numpy(rng.normal(size=shape)).float() for shape in ((5, 7), (6, 7), (3, 7)))
    return close(forward(x, W, A, torch.zeros(6, 3), 20.0), x @ W.T)


@invariant_of("forward")
def goes_through_A_and_then_B(forward, rng):
    """What A and B add to the frozen layer's result has the direction of x A^T B^T."""
    x, W, A, B = (torch.from_numpy(rng.normal(size=shape)) for shape in ((5, 7), (6, 7), (3, 7), (6, 3)))
    added, expected = forward(x, W, A, B, 20.0) - x @ W.T, x @ A.T @ B.T
    return close(added / added.norm(), expected / expected.norm())


@invariant_of("forward")
def is_scaled_by_alpha_over_r(forward, rng):
    """It is x A^T B^T times alpha / r, at each of several ranks and alphas."""
    for r, alpha in ((2, 7.0), (3, 31.0), (9, 20.0)):
        x, W, A, B = (torch.from_numpy(rng.normal(size=shape)) for shape in ((5, 7), (6, 7), (r, 7), (6, r)))
        if not close(forward(x, W, A, B, alpha) - x @ W.T, alpha / r * (x @ A.T @ B.T)):
            return False
    return True


@invariant_of("forward")
def passes_gradients_on(forward, rng):
    """The gradients of x, A and B are right, too."""
    x, W, A, B = (torch.from_numpy(rng.normal(size=shape)) for shape in ((5, 7), (6, 7), (3, 7), (6, 3)))
    leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
    right = torch.autograd.grad((x @ W.T + 20.0 / 3 * (x @ A.T @ B.T)).square().sum(), leaves)
    yours = torch.autograd.grad(forward(x, W, A, B, 20.0).square().sum(), leaves)
    return all(close(one, other) for one, other in zip(yours, right, strict=True))


@invariant_of("start")
def has_the_shapes(start, rng):
    """A is (r, inp) and B is (out, r), for several sizes."""
    sizes = [tuple(row) for row in (rng.permutation(20)[:9].reshape(3, 3) + 2).tolist()]
    pairs = [start(out, inp, r, torch.Generator().manual_seed(1)) for out, inp, r in sizes]
    shapes = [(tuple(A.shape), tuple(B.shape)) for A, B in pairs]
    return shapes == [((r, inp), (out, r)) for out, inp, r in sizes]


@invariant_of("start")
def begins_at_zero_and_can_learn(start, rng):
    """B is zero, with a memory of its own, and A is not, so that B has a gradient at once."""
    A, B = start(24, 40, 4, torch.Generator().manual_seed(int(rng.integers(1000))))
    zero, moves = not B.any(), bool(A.any())
    B.detach()[0, 0] = 1  # the other entries stay
    return zero and moves and A.shape == (4, 40) and float(B.sum()) == 1


@invariant_of("start")
def fills_its_range(start, rng):
    """The entries of A are independent and uniform between -1 / sqrt(inp) and 1 / sqrt(inp)."""
    for out, inp in ((24, 40), (40, 24)):
        A = start(out, inp, 12, torch.Generator().manual_seed(int(rng.integers(1000))))[0] * math.sqrt(inp)
        even = abs(float(A.mean())) < 0.15 and abs(float(A.std()) - 3**-0.5) < 0.06
        if not (even and 0.97 < float(abs(A).max()) <= 1.001 and int(torch.linalg.matrix_rank(A)) == 12):
            return False
    return True


@invariant_of("start")
def follows_its_generator(start, rng):
    """The generator alone decides A, and it moves on."""
    seeds, draws = rng.choice(1000, 2, replace=False).tolist(), []
    for seed in (seeds[0], seeds[0], seeds[1]):
        torch.rand(1)  # a draw elsewhere does not matter
        generator = torch.Generator().manual_seed(seed)
        draws.append([start(24, 40, 4, generator)[0] for _ in range(2)])
    (one, after), (again, _), (other, _) = draws
    return torch.equal(one, again) and not torch.equal(one, after) and not torch.equal(one, other)


@invariant_of("repair")
def adapts_the_hidden_layers(repair, rng):
    """The result has adapters on hidden1 and hidden2 alone, and the pre-trained net is as it was."""
    from lora_lab.models.digits import DigitsMLP

    net, x = DigitsMLP(width=8, seed=int(rng.integers(999))), torch.from_numpy(rng.normal(size=(16, 64))).float()
    before = copy.deepcopy(net.state_dict())
    model, _ = repair(net, lambda model: F.cross_entropy(model(x), torch.arange(16) % 10))
    adapted = {name.split(".")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    return adapted == {"hidden1", "hidden2"} and all(
        torch.equal(net.state_dict()[name], before[name]) for name in before
    )


@invariant_of("repair")
def trains_the_adapters_alone(repair, rng):
    """The adapters are trained and nothing else, and the optimiser holds them."""
    from lora_lab.models.digits import DigitsMLP

    net, x = DigitsMLP(width=8, seed=int(rng.integers(999))), torch.from_numpy(rng.normal(size=(16, 64))).float()
    model, optimizer = repair(net, lambda model: F.cross_entropy(model(x), torch.arange(16) % 10))
    trained = {name: id(tensor) for name, tensor in model.named_parameters() if tensor.requires_grad}
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    return bool(trained) and all("lora_" in name for name in trained) and {*trained.values()} <= held


@invariant_of("repair")
def learns_on_its_base(repair, rng):
    """Its frozen weights are the pre-trained ones, a gradient was computed, and its loss is lower than theirs."""
    from lora_lab.models.digits import DigitsMLP

    net, x = DigitsMLP(width=8, seed=int(rng.integers(999))), torch.from_numpy(rng.normal(size=(16, 64))).float()
    before, labels, gradients = copy.deepcopy(net), torch.arange(16) % 10, []

    def loss_of(model):
        loss = F.cross_entropy(model(x), labels)
        loss.register_hook(gradients.append)
        return loss

    model, _ = repair(net, loss_of)
    weights = [tensor for name, tensor in model.state_dict().items() if "lora_" not in name]
    same = all(any(torch.equal(old, new) for new in weights) for old in before.state_dict().values())
    return same and len(gradients) > 0 and bool(loss_of(model) < F.cross_entropy(before(x), labels))


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
