"""Exercises of lesson 04: the memory of a training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from lora_lab.costs.memory import saved_bytes
from lora_lab.course.exercise import exercises_of
from lora_lab.inject import LoRAConfig, inject
from lora_lab.models.llama import MLP, LlamaConfig

exercise = exercises_of("04_memory")


# Static memory


def frozen_and_trained(rng: np.random.Generator) -> tuple[int, int]:
    """Numbers of frozen parameters and of trained ones."""
    return int(rng.integers(10**6, 10**9)), int(rng.integers(10**4, 10**6))


@exercise(
    "static_bytes",
    inputs=frozen_and_trained,
    mistakes={
        "The frozen weights are missing. They take 4 bytes each.": lambda frozen, trained: 16 * trained,
        "Frozen parameters cost too much. They have no gradient and no AdamW state, so 4 bytes each.": (
            lambda frozen, trained: 16 * (frozen + trained)
        ),
        "4 bytes are missing for each trained parameter: weight 4, gradient 4, two averages of 4 each.": (
            lambda frozen, trained: 4 * frozen + 12 * trained
        ),
        "8 bytes are missing for each trained parameter. AdamW keeps two averages of 4 bytes.": (
            lambda frozen, trained: 4 * frozen + 8 * trained
        ),
        "These are the weights alone. Trained parameters have a gradient and two averages as well.": (
            lambda frozen, trained: 4 * (frozen + trained)
        ),
        "A trained parameter's weight is counted twice. Its 16 bytes hold it already.": (
            lambda frozen, trained: 4 * (frozen + trained) + 16 * trained
        ),
        "A frozen parameter has no gradient. It costs the 4 bytes of its weight.": (
            lambda frozen, trained: 8 * frozen + 16 * trained
        ),
        "These are half of the bytes. A number in float32 has 4 bytes, not 2.": (
            lambda frozen, trained: 2 * frozen + 8 * trained
        ),
    },
    hints=[
        "A number in float32 has 4 bytes.",
        "A frozen parameter is only its weight. A trained one has a weight, a gradient and AdamW's two averages.",
        "That is 4 bytes for each frozen parameter, and four numbers of 4 bytes for each trained one.",
    ],
    minutes=5,
    difficulty=1,
    praise="This is the part of a step that does not depend on the batch, and the part that LoRA shrinks.",
)
def static_bytes(frozen, trained):
    """The result is 4 bytes for each frozen parameter and 16 for each trained one."""
    return 4 * frozen + 16 * trained


# The peak


def allocations_and_releases(rng: np.random.Generator) -> tuple[list[tuple[int, int]]]:
    """Eight operations; each releases some of what is allocated, and the first allocates most."""
    events, now = [], 0
    for low, high in [(60, 90), *[(5, 50)] * 7]:
        now += (allocated := int(rng.integers(low, high)))
        now -= (released := int(rng.integers(1, now // 2)))
        events.append((allocated, released))
    return (events,)


def _levels(events):
    return np.cumsum([allocated - released for allocated, released in events])


@exercise(
    "peak",
    inputs=allocations_and_releases,
    mistakes={
        "This is the memory at the end. The peak is the highest level on the way there.": (
            lambda events: int(_levels(events)[-1])
        ),
        "Nothing was ever released. Subtract what each operation releases.": (
            lambda events: sum(allocated for allocated, _ in events)
        ),
        "This is the largest single allocation. What was allocated earlier exists at the same time.": (
            lambda events: max(allocated for allocated, _ in events)
        ),
        "The release comes too early. While an operation runs, what it will release is still there.": (
            lambda events: int(_levels(events).max())
        ),
        "This is the mean level. The peak is the highest one.": lambda events: float(_levels(events).mean()),
    },
    hints=[
        "Go through the operations one by one, and keep two numbers: what is allocated now, and the most so far.",
        "Each operation first adds what it allocates. That is the moment to compare with the most so far.",
        "Only after that comparison, subtract what the operation releases.",
    ],
    minutes=6,
    difficulty=1,
    praise="A step that needs 1 byte more than the card at a single moment fails, however little it needs elsewhere.",
    draws=14,
)
def peak(events):
    """The result is the highest level of memory, with each operation's release after its allocation."""
    now = highest = 0
    for allocated, released in events:
        highest = max(highest, now + allocated)
        now += allocated - released
    return highest


# What is saved


TARGETS = ({"gate"}, {"up"}, {"down"}, {"gate", "up"}, {"gate", "down"}, {"up", "down"}, {"gate", "up", "down"})


def mlp_and_targets(rng: np.random.Generator) -> tuple[int, int, int, set[str]]:
    """Width, inner width and rank, all different, and the layers with adapters."""
    d, m, r = (int(rng.choice(sizes)) for sizes in ((5, 7), (11, 13), (2, 3)))
    return d, m, r, set(TARGETS[int(rng.integers(len(TARGETS)))])


@cache
def _count(d: int, m: int, r: int, targets: frozenset[str]) -> int:
    """What autograd saves in such an MLP, by its own account: values for each of three tokens."""
    mlp = MLP(LlamaConfig(8, d, m, 1, 1, 1, 2))
    inject(mlp, LoRAConfig(r, 2 * r, targets=[f"{name}_proj" for name in sorted(targets)]))
    x = torch.ones(3, d, requires_grad=True)
    return saved_bytes(lambda: mlp(x), mlp) // (4 * 3)


def _by_formula(
    inputs: int | None = None, silu: int = 3, product: bool | None = None, narrow: bool = True
) -> Callable[[int, int, int, set[str]], int]:
    """The count by hand, in which each argument changes one term."""

    def count(d: int, m: int, r: int, targets: set[str]) -> int:
        reads = bool({"gate", "up"} & targets) if inputs is None else inputs
        down = "down" in targets if product is None else product
        return d * reads + silu * m + m * down + r * len(targets) * narrow

    return count


@exercise(
    "saved_values",
    inputs=mlp_and_targets,
    mistakes={
        "The input x is missing. The weights are frozen, but A reads x too, and A's gradient needs it.": (
            _by_formula(inputs=0)
        ),
        "x is counted once for each adapter. gate and up read one tensor, which is stored once.": (
            lambda d, m, r, targets: (
                d * len({"gate", "up"} & targets) + 3 * m + m * ("down" in targets) + r * len(targets)
            )
        ),
        "x is counted although neither gate nor up has an adapter. A frozen weight does not need its input.": (
            _by_formula(inputs=1)
        ),
        "x is stored as soon as one of gate and up has an adapter, whichever of the two.": (
            lambda d, m, r, targets: _by_formula(inputs={"gate", "up"} <= targets)(d, m, r, targets),
            lambda d, m, r, targets: _by_formula(inputs="gate" in targets)(d, m, r, targets),
        ),
        "m values are missing. silu's own backward pass needs its input, and the product needs both factors.": (
            _by_formula(silu=2)
        ),
        "The activations inside are missing. silu and the product of two activations store what they multiply.": (
            _by_formula(silu=0)
        ),
        "The outputs of A are missing. B's gradient needs them: r values for each adapter.": _by_formula(narrow=False),
        "down's input is counted although down has no adapter. A frozen weight does not need it.": (
            _by_formula(product=True)
        ),
        "down's input is missing where down has an adapter. Its A reads it.": _by_formula(product=False),
        "The weights are counted. They are in memory in any case, and autograd stores no copy of them.": (
            lambda d, m, r, targets: _by_formula()(d, m, r, targets) + 3 * d * m,
            lambda d, m, r, targets: _by_formula()(d, m, r, targets) + r * (d + m) * len(targets),
        ),
    },
    hints=[
        "Ask of each operation: which values does its gradient need? A frozen matrix needs its weight alone.",
        "silu stores its input, a product of two activations stores both, A's gradient needs A's input, B's needs A x.",
        "gate, silu(gate) and up have m values each. Add d once if gate or up has an adapter, and so on for down.",
    ],
    minutes=12,
    difficulty=3,
    praise="You have counted what autograd counts. Most of it does not depend on the rank at all.",
    draws=128,
)
def saved_values(d, m, r, targets):
    """The result is the number of values for each token that autograd saves when such an MLP runs."""
    return _count(d, m, r, frozenset(targets))


# Does it fit?


def budget_and_costs(rng: np.random.Generator) -> tuple[int, int, int]:
    """A budget in GiB, static bytes, and bytes for each token.

    One time in four the static bytes do not fit, and another one in four a whole number of tokens fits exactly.
    """
    budget_gib, per_token = int(rng.integers(4, 25)), int(rng.integers(10**5, 10**7))
    kind = rng.integers(4)
    share = rng.uniform(1.1, 1.5) if kind == 0 else rng.uniform(0.2, 0.8)
    static = int(share * budget_gib * 2**30)
    if kind == 1:
        static += (budget_gib * 2**30 - static) % per_token
    return budget_gib, static, per_token


@exercise(
    "longest",
    inputs=budget_and_costs,
    mistakes={
        "A GiB is too small. It has 2**30 bytes, not 10**9.": (
            lambda budget_gib, static, per_token: max(0, (budget_gib * 10**9 - static) // per_token)
        ),
        "The static bytes are left out. Weights and AdamW's state come first.": (
            lambda budget_gib, static, per_token: budget_gib * 2**30 // per_token
        ),
        "There is one token too many. Round down, because a part of a token does not fit.": (
            lambda budget_gib, static, per_token: max(0, -(-(budget_gib * 2**30 - static) // per_token)),
        ),
        "There is one token too few where a step needs exactly the budget. It fits then.": (
            lambda budget_gib, static, per_token: max(0, (budget_gib * 2**30 - static - 1) // per_token)
        ),
        "The result is not a whole number of tokens. Round it down.": (
            lambda budget_gib, static, per_token: max(0, (budget_gib * 2**30 - static) / per_token)
        ),
        "The result is negative where the static bytes do not fit. Then no token fits, so return 0.": (
            lambda budget_gib, static, per_token: (budget_gib * 2**30 - static) // per_token
        ),
    },
    hints=[
        "A GiB has 2**30 bytes.",
        "First subtract what is static. What remains is shared out among the tokens.",
        "// rounds down, and max(0, ...) takes care of a model that does not fit at all.",
    ],
    minutes=5,
    difficulty=1,
    praise="That is the question before every run, and you can answer it without a card.",
    draws=80,
)
def longest(budget_gib, static, per_token):
    """static + tokens * per_token fits the budget at the result, and no longer so with one token more."""
    return max(0, (budget_gib * 2**30 - static) // per_token)
