"""Exercises of lesson 04: the memory of a training step."""

import numpy as np

from lora_lab.course.exercise import Exercise, Reflection

# Static memory


def frozen_and_trained(rng):
    """Numbers of frozen parameters and of trained ones."""
    return int(rng.integers(10**6, 10**9)), int(rng.integers(10**4, 10**6))


FOUR_NUMBERS = "4 + 4 + 8"  # a weight, a gradient and two averages
static_bytes = Exercise(
    "static_bytes",
    inputs=frozen_and_trained,
    wrong={
        "The frozen weights are missing. They take 4 bytes each.": ("4 * frozen + ", ""),
        "Frozen parameters cost too much. They have no gradient and no AdamW state, so 4 bytes each.": (
            ("4 * frozen", "16 * frozen")
        ),
        "4 bytes are missing for each trained parameter: weight 4, gradient 4, two averages of 4 each.": (
            (FOUR_NUMBERS, "4 + 8")
        ),
        "8 bytes are missing for each trained parameter. AdamW keeps two averages of 4 bytes.": (FOUR_NUMBERS, "4 + 4"),
        "These are the weights alone. Trained parameters have a gradient and two averages as well.": (
            (FOUR_NUMBERS, "4")
        ),
        "A trained parameter's weight is counted twice. Its 16 bytes hold it already.": (FOUR_NUMBERS, "4 + 4 + 4 + 8"),
        "A frozen parameter has no gradient. It costs the 4 bytes of its weight.": ("4 * frozen", "8 * frozen"),
        "These are half of the bytes. A number in float32 has 4 bytes, not 2.": "return 2 * frozen + 8 * trained",
    },
    hints=[
        "A number in float32 has 4 bytes.",
        "A frozen parameter is only its weight. A trained one has a weight, a gradient and AdamW's two averages.",
        "That is 4 bytes for each frozen parameter, and four numbers of 4 bytes for each trained one.",
    ],
    praise="This is the part of a step that does not depend on the batch, and the part that LoRA shrinks.",
)


@static_bytes.must()
def a_frozen_parameter_is_its_weight(static_bytes, rng):
    """Where nothing is trained, each parameter takes 4 bytes."""
    frozen, _ = frozen_and_trained(rng)
    return static_bytes(frozen, 0) == 4 * frozen


@static_bytes.must()
def a_trained_parameter_takes_four_numbers(static_bytes, rng):
    """Each trained parameter adds 16 bytes: weight, gradient, and the two averages of AdamW."""
    frozen, trained = frozen_and_trained(rng)
    return static_bytes(frozen, trained) - static_bytes(frozen, 0) == 16 * trained


# The peak


def allocations_and_releases(rng):
    """Eight operations; each releases some of what is allocated, and the first allocates most."""
    events, now = [], 0
    for low, high in [(60, 90), *[(5, 50)] * 7]:
        now += (allocated := int(rng.integers(low, high)))
        now -= (released := int(rng.integers(1, now // 2)))
        events.append((allocated, released))
    return (events,)


peak = Exercise(
    "peak",
    inputs=allocations_and_releases,
    wrong={
        "This is the memory at the end. The peak is the highest level on the way there.": (
            "return highest",
            "return now",
        ),
        "Nothing was ever released. Subtract what each operation releases.": ("now -= released", ""),
        "This is the largest single allocation. What was allocated earlier exists at the same time.": (
            ("max(highest, now)", "max(highest, allocated)")
        ),
        "The release comes too early. While an operation runs, what it will release is still there.": (
            ("now -= released", "", "now += allocated", "now += allocated - released")
        ),
        "This is the mean level. The peak is the highest one.": (
            "return float(np.mean(np.cumsum([allocated - released for allocated, released in events])))"
        ),
    },
    hints=[
        "Go through the operations one by one, and keep two numbers: what is allocated now, and the most so far.",
        "Each operation first adds what it allocates. That is the moment to compare with the most so far.",
        "Only after that comparison, subtract what the operation releases.",
    ],
    praise="A step that needs 1 byte more than the card at a single moment fails, however little it needs elsewhere.",
)


@peak.must()
def one_operation(peak, rng):
    """With a single operation the peak is what that allocates, whatever it releases afterwards."""
    size = int(rng.integers(10, 10**6))
    return all(peak([(size, released)]) == size for released in (0, size // 3, size))


@peak.must()
def earlier_memory_is_still_there(peak, rng):
    """With many operations it is the largest of the levels, each taken before the operation's own release."""
    (events,) = allocations_and_releases(rng)
    allocated, released = np.cumsum(events, axis=0).T
    return peak(list(events)) == max(allocated[0], *(allocated[1:] - released[:-1]))


@peak.must()
def is_not_at_the_end(peak, rng):
    """Nor is it the memory that is left at the end, or the largest allocation alone."""
    a, b = rng.integers(5, 99, 2).tolist()
    return peak([(a, 0), (b, a), (1, b)]) == a + b


# What is saved

TARGETS = [("gate",), ("up",), ("down",), ("gate", "up"), ("gate", "down"), ("up", "down"), ("gate", "up", "down")]


def mlp_and_targets(rng):
    """Width, inner width and rank, all different, and the layers with adapters."""
    d, m, r = (int(rng.choice(sizes)) for sizes in ((5, 7), (11, 13), (2, 3)))
    return d, m, r, set(TARGETS[int(rng.integers(len(TARGETS)))])


READS_X, DOWN, A_OUT = "{'gate', 'up'} & set(targets)", " if 'down' in targets else 0", " + r * len(targets)"
saved_values = Exercise(
    "saved_values",
    inputs=mlp_and_targets,
    wrong={
        "The input x is missing. The weights are frozen, but A reads x too, and A's gradient needs it.": ("x + 3", "3"),
        "x is counted once for each adapter. gate and up read one tensor, which is stored once.": (
            (f"d if {READS_X} else 0", "d * len({'gate', 'up'} & targets)")
        ),
        "x is counted although neither gate nor up has an adapter. A frozen weight does not need its input.": (
            (READS_X, "True")
        ),
        "x is stored as soon as one of gate and up has an adapter, whichever of the two.": [
            (READS_X, "{'gate', 'up'} <= targets"),
            (READS_X, "'gate' in targets"),
            (READS_X, "'up' in targets"),
        ],
        "m values are missing. silu's own backward pass needs its input, and the product needs both factors.": (
            ("3 * m", "2 * m")
        ),
        "The activations inside are missing. silu and the product of two activations store what they multiply.": (
            (" + 3 * m", "")
        ),
        "The outputs of A are missing. B's gradient needs them: r values for each adapter.": (A_OUT, ""),
        "down's input is counted although down has no adapter. A frozen weight does not need it.": (DOWN, ""),
        "down's input is missing where down has an adapter. Its A reads it.": (" + product", ""),
        "The weights are counted. They are in memory in any case, and autograd stores no copy of them.": [
            (A_OUT, f"{A_OUT} + 3 * d * m"),
            (A_OUT, " + r * (1 + d + m) * len(targets)"),
        ],
    },
    hints=[
        "Ask of each operation: which values does its gradient need? A frozen matrix needs its weight alone.",
        "silu stores its input, a product of two activations stores both, A's gradient needs A's input, B's needs A x.",
        "gate, silu(gate) and up have m values each. Add d once if gate or up has an adapter, and so on for down.",
    ],
    praise="You have counted what autograd counts. Most of it does not depend on the rank at all.",
    draws=128,
)


@saved_values.must()
def with_an_adapter_on_down(saved_values, rng):
    """With an adapter on down alone, what the activations need is stored, down's input, and A's output."""
    d, m, r, _ = mlp_and_targets(rng)
    return saved_values(d, m, r, {"down"}) == 3 * m + m + r


@saved_values.must()
def with_adapters_on_gate_and_up(saved_values, rng):
    """With one on gate, on up or on both, x is stored, once for both, and down's input is not."""
    d, m, r, _ = mlp_and_targets(rng)
    return all(saved_values(d, m, r, {*t}) == d + 3 * m + len(t) * r for t in (["gate"], ["up"], ["gate", "up"]))


@saved_values.must()
def with_adapters_on_down_and_others(saved_values, rng):
    """With adapters on all three, or on down and one of the others, x and down's input are both stored."""
    d, m, r, _ = mlp_and_targets(rng)
    return all(saved_values(d, m, r, {"down", *t}) == d + 4 * m + (1 + len(t)) * r for t in TARGETS if "down" not in t)


@saved_values.must()
def grows_with_the_rank(saved_values, rng):
    """A rank that is higher by one adds one value for each adapter."""
    d, m, r, _ = mlp_and_targets(rng)
    return all(saved_values(d, m, r + 1, {*t}) - saved_values(d, m, r, {*t}) == len(t) for t in TARGETS)


# Does it fit?


def budget_and_costs(rng):
    """A budget in GiB, static bytes, and bytes for each token.

    In a third of the cases the static bytes do not fit, and in another third a whole number of tokens fits exactly.
    """
    budget_gib, per_token, tokens = rng.integers([4, 10**5, 9], [25, 10**7, 99]).tolist()
    room = (-int(rng.integers(1, 10**9)), tokens * per_token, int(rng.integers(10**9, 4 * 10**9)))[rng.integers(3)]
    return budget_gib, budget_gib * 2**30 - room, per_token


longest = Exercise(
    "longest",
    inputs=budget_and_costs,
    wrong={
        "A GiB is too small. It has 2**30 bytes, not 10**9.": ("2 ** 30", "10 ** 9"),
        "The static bytes are left out. Weights and AdamW's state come first.": (" - static", ""),
        "There is one token too many. Round down, because a part of a token does not fit.": [
            ("static)", "static + per_token - 1)"),
            ("// per_token", "// per_token + 1"),
        ],
        "There is one token too few where a step needs exactly the budget. It fits then.": ("static)", "static - 1)"),
        "The result is not a whole number of tokens. Round it down.": ("//", "/"),
        "The result is negative where the static bytes do not fit. Then no token fits, so return 0.": (
            "return (budget_gib * 2**30 - static) // per_token"
        ),
    },
    hints=[
        "A GiB has 2**30 bytes.",
        "First subtract what is static. What remains is shared out among the tokens.",
        "// rounds down, and max(0, ...) takes care of a model that does not fit at all.",
    ],
    praise="That is the question before every run, and you can answer it without a card.",
)


@longest.must()
def fits_and_one_more_does_not(longest, rng):
    """So many tokens fit into the budget, and one more does not."""
    budget, per_token = rng.integers([4, 999], [25, 10**7]).tolist()
    room = int(rng.integers(2**30, budget * 2**30))
    count = longest(budget, budget * 2**30 - room, per_token)
    return count == int(count) and count * per_token <= room < (count + 1) * per_token


@longest.must()
def an_exact_fit_fits(longest, rng):
    """Where some number of tokens needs exactly the budget, that number fits."""
    budget, tokens, per_token = rng.integers([4, 9, 101], [25, 99, 4096]).tolist()
    return longest(budget, budget * 2**30 - tokens * per_token, per_token) == tokens


@longest.must()
def nothing_fits_beside_too_much(longest, rng):
    """Where the static bytes alone exceed the budget, the result is 0, and with room for one token it is 1."""
    excess = int(rng.integers(1, 10**9))
    return longest(4, 4 * 2**30 + excess, 1000) == 0 and longest(4, 4 * 2**30 - 1500, 1000) == 1


Reflection(
    "04_memory",
    question="A model does not fit onto your card with full fine-tuning. A friend says: *Take LoRA with a small "
    "rank, it needs ten times less memory.* In five to eight sentences: which parts of the memory does "
    "LoRA shrink, which not, and what would you measure or change next if it still does not fit?",
    rubric=(
        "The answer names gradients and the optimiser's state as what shrinks, and the frozen weights as what stays.",
        "It says that activations stay too, and gives a reason why a frozen layer's input is stored.",
        "It says why a smaller rank hardly helps.",
        "It names a next step that fits the part of the memory which is largest.",
    ),
    expected="LoRA takes away the gradients and AdamW's averages of the frozen weights; the weights stay, 4 of 16 "
    "bytes in float32. Activations stay: A's gradient needs the input that the frozen layer reads. A "
    "smaller rank only shrinks the adapters, which are small. Next: weights in 4 bits if they are "
    "largest, checkpointing or shorter sequences if activations are, sliced logits if these are.",
)
