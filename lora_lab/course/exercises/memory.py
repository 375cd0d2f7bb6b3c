"""Exercises of lesson 04: the memory of a training step."""

from lora_lab.course.exercise import Exercise, Reflection

# Static memory


def frozen_and_trained(rng):
    """Numbers of frozen parameters and of trained ones, small enough to redo by hand."""
    return int(rng.integers(20, 100)), int(rng.integers(2, 10))


FOUR_NUMBERS = "4 + 4 + 8"  # a weight, a gradient and two averages
static_bytes = Exercise(
    "static_bytes",
    inputs=frozen_and_trained,
    wrong={
        "The frozen weights are missing. They take 4 bytes each.": ("4 * frozen + ", ""),
        "Frozen parameters cost too much. They have no gradient and no AdamW state, so 4 bytes each.": (
            ("4 * frozen", "16 * frozen")
        ),
        "Each trained parameter takes 16 bytes: weight 4, gradient 4, two averages. It is not among the frozen.": (
            (FOUR_NUMBERS, "4 + 8")
        ),
        "8 bytes are missing for each trained parameter. AdamW keeps two averages of 4 bytes.": (FOUR_NUMBERS, "4 + 4"),
        "These are the weights alone. Trained parameters have a gradient and two averages as well.": (
            (FOUR_NUMBERS, "4")
        ),
        "A trained parameter's weight is counted twice. Its 16 bytes hold it already.": (FOUR_NUMBERS, "4 + 4 + 4 + 8"),
        "A frozen parameter has no gradient. It costs the 4 bytes of its weight.": ("4 * frozen", "8 * frozen"),
        "The two are swapped. A trained parameter costs 16 bytes, and a frozen one 4.": (
            "return 16 * frozen + 4 * trained"
        ),
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


# Does it fit?


def budget_and_costs(rng):
    """A budget in GiB, fixed bytes, and bytes for each token.

    In a third of the cases the fixed bytes do not fit, and in another third a whole number of tokens fits exactly.
    """
    budget_gib, per_token, tokens = rng.integers([4, 10**5, 9], [25, 10**7, 99]).tolist()
    room = (-int(rng.integers(1, 10**9)), tokens * per_token, int(rng.integers(10**9, 4 * 10**9)))[rng.integers(3)]
    return budget_gib, budget_gib * 2**30 - room, per_token


longest = Exercise(
    "longest",
    inputs=budget_and_costs,
    wrong={
        "A GiB is too small. It has 2**30 bytes, not 10**9.": ("2 ** 30", "10 ** 9"),
        "The budget has another unit. It is in GiB, and a GiB has 2**30 bytes.": ("2 ** 30", "2 ** 20"),
        "The fixed bytes are left out. Weights and AdamW's state come first.": (" - fixed", ""),
        "The fixed bytes are there once, not for each token. Take them off the budget, and divide the rest.": (
            "return int(budget_gib * 2**30 // (fixed + per_token))"
        ),
        "There is one token too many. Round down, because a part of a token does not fit.": [
            ("fixed)", "fixed + per_token - 1)"),
            ("// per_token", "// per_token + 1"),
            "return max(0, budget_gib * 2**30 // per_token - fixed // per_token)",
            "return max(0, round((budget_gib * 2**30 - fixed) / per_token))",
        ],
        "There is one token too few where a step needs exactly the budget. It fits then.": ("fixed)", "fixed - 1)"),
        "The result is not a whole number of tokens. Round it down.": ("//", "/"),
        "The result is negative where the fixed bytes do not fit. Then no token fits, so return 0.": (
            "return (budget_gib * 2**30 - fixed) // per_token"
        ),
    },
    hints=[
        "A GiB has 2**30 bytes.",
        "First subtract what is fixed. What remains is shared out among the tokens.",
        "// rounds down, and max(0, ...) takes care of a model that does not fit at all.",
    ],
    praise="That is the question before every run, and you can answer it without a GPU.",
    draws=128,
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
    """Where the fixed bytes alone exceed the budget, the result is 0, and with room for one token it is 1."""
    excess = int(rng.integers(1, 10**9))
    return longest(4, 4 * 2**30 + excess, 1000) == 0 and longest(4, 4 * 2**30 - 1500, 1000) == 1


# The best setup that fits


def bill_and_budget(rng):
    """Three setups of each of two adapters, what a rank trains, and a budget: the size of one, or too small."""
    per_rank = {"attention": int(rng.integers(2, 5)), "all": int(rng.integers(5, 9))}
    adapters = [(targets, rank) for targets in per_rank for rank in (2, 4, 8, 16)]
    ways = [(checkpointing, bits) for checkpointing in (False, True) for bits in (4, 16)]
    chosen = [adapters[i] for i in rng.choice(len(adapters), 2, replace=False)]
    setups = [(*adapter, *ways[i]) for adapter in chosen for i in rng.choice(len(ways), 3, replace=False)]
    sizes = (rng.permutation(20)[:6] + 5).tolist()
    bill = [(*setups[i], size) for i, size in zip(rng.permutation(6), sizes, strict=True)]
    return bill, per_rank, 4 if rng.integers(6) == 0 else sorted(sizes)[rng.integers(1, 6)]


def trained(row, per_rank):
    """How many numbers a setup trains."""
    return row[1] * per_rank[row[0]]


QUALITY, EQUALS = "rank * per_rank[targets]", ", bits, not checkpointing"
best_setup = Exercise(
    "best_setup",
    inputs=bill_and_budget,
    wrong={
        "This setup needs more than the budget. First leave out the rows that do not fit.": (
            (" if row[-1] <= budget_gib", "")
        ),
        "A setup that needs exactly the budget fits.": ("<=", "<"),
        "The highest rank need not train most. Multiply the rank by what one rank trains on these targets.": (
            (QUALITY, "rank")
        ),
        "You compare rank and per_rank one after the other. What counts is their product, the numbers trained.": [
            (QUALITY, "rank, per_rank[targets]"),
            (QUALITY, "per_rank[targets], rank"),
        ],
        "The rank is missing. A setup trains rank times per_rank[targets] numbers.": (QUALITY, "per_rank[targets]"),
        "This is the row that fills the budget best. Compare how many numbers the rows train.": (
            (f"({QUALITY}{EQUALS})", "row[-1]")
        ),
        "This is the row that needs least memory. Of those that fit take the one that trains most.": (
            (f"({QUALITY}{EQUALS})", "-row[-1]")
        ),
        "Of rows that train equally many numbers this is the wrong one. Compare their bits, and then checkpointing.": [
            (EQUALS, ""),
            (EQUALS, ", bits"),
            (EQUALS, ", not checkpointing"),
        ],
        "Of rows that train equally many numbers compare the bits first, and checkpointing only if these are equal.": (
            (EQUALS, ", not checkpointing, bits")
        ),
        "Of rows that train equally many numbers you take 4 bits or checkpointing, although the other one fits, too.": [
            (EQUALS, ", -bits, checkpointing"),
            (EQUALS, ", -bits, not checkpointing"),
            (EQUALS, ", bits, checkpointing"),
            (EQUALS, ", -row[-1]"),
        ],
        "You drop the rows of 4 bits where one of 16 fits. Numbers come first; bits count only between equal rows.": """
            fits = [row for row in bill if row[-1] <= budget_gib]
            fits = [row for row in fits if row[3] == 16] or fits
            return max(fits, key=lambda row: (row[1] * per_rank[row[0]], not row[2]), default=None)
        """,
        "Return the row itself, not its number or how many numbers it trains.": [
            ("max(fits, key=quality, default=None)", "max((quality(row)[0] for row in fits), default=None)"),
            ("max(fits, key=quality, default=None)", "bill.index(max(fits, key=quality)) if fits else None"),
        ],
        "Where nothing fits there is no largest row. Return None there.": [
            (", default=None", ""),
            ("max(fits, key=quality, default=None)", "sorted(fits, key=quality)[-1]"),
        ],
    },
    hints=[
        "First keep the rows that fit: those whose last entry is at most the budget.",
        "A row trains rank times per_rank[targets] numbers. max takes a key, a function of a row.",
        "The key may be a tuple: numbers trained, bits, not checkpointing. max also takes a default for an empty list.",
    ],
    praise="With a bill of your own model you can choose before you rent a GPU.",
    draws=320,
)


@best_setup.must()
def fits_if_any_does(best_setup, rng):
    """The result is a row of the bill that fits the budget, or None where none does."""
    bill, per_rank, budget = bill_and_budget(rng)
    row, nothing = best_setup(bill, per_rank, budget), best_setup(bill, per_rank, 4)
    fits = budget == 4 if row is None else tuple(row) in bill and row[-1] <= budget
    return nothing is None and fits


@best_setup.must()
def trains_the_most(best_setup, rng):
    """No other row that fits trains more numbers; one that needs exactly the budget fits."""
    bill, per_rank, _ = bill_and_budget(rng)
    most = [max(trained(row, per_rank) for row in bill if row[-1] <= budget[-1]) for budget in bill]
    higher, more = ("attention", 4, False, 16, 9), ("all", 2, False, 16, 9)  # the higher rank trains less
    found = tuple(best_setup([higher, more], {"attention": 2, "all": 7}, 9))
    return found == more and [trained(best_setup(bill, per_rank, budget[-1]), per_rank) for budget in bill] == most


@best_setup.must()
def prefers_what_costs_least(best_setup, rng):
    """Of rows that train equally many numbers it is one of 16 bits, if there is one, and then without checkpointing."""
    ways = [(False, 16, 9), (True, 16, 8), (False, 4, 7), (True, 4, 6)]  # from the best to the worst
    first, rank = int(rng.integers(4)), int(rng.integers(2, 9))
    bill = [("all", rank, *ways[i]) for i in rng.permutation(4)]
    return tuple(best_setup(bill, {"all": 3}, ways[first][-1])) == ("all", rank, *ways[first])


Reflection(
    "04_memory",
    question="A model does not fit on your GPU with full fine-tuning. A friend says: *Take LoRA with a small "
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
