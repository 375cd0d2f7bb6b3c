"""Hidden tests of lesson 04: the memory of a training step."""

from __future__ import annotations

from lora_lab.course.grading.invariant import Reflection, invariant_of


@invariant_of("static_bytes")
def a_frozen_parameter_is_its_weight(static_bytes, rng):
    """Where nothing is trained, each parameter takes 4 bytes."""
    counts = rng.integers(10**3, 10**9, 8).tolist()
    return all(static_bytes(count, 0) == 4 * count for count in counts)


@invariant_of("static_bytes")
def a_trained_parameter_takes_four_numbers(static_bytes, rng):
    """Each trained parameter adds 16 bytes: weight, gradient, and the two averages of AdamW."""
    pairs = rng.integers(10**3, 10**8, (8, 2)).tolist()
    return all(static_bytes(frozen, trained) - static_bytes(frozen, 0) == 16 * trained for frozen, trained in pairs)


@invariant_of("peak")
def one_operation(peak, rng):
    """With a single operation the peak is what that allocates, whatever it releases afterwards."""
    sizes = rng.integers(10, 10**6, 6).tolist()
    return all(peak([(size, released)]) == size for size in sizes for released in (0, size // 3, size))


@invariant_of("peak")
def earlier_memory_is_still_there(peak, rng):
    """With many operations it is the largest of the levels, each taken before the operation's own release."""
    for _ in range(20):
        events = [(a, int(rng.integers(0, a + 1))) for a in rng.integers(1, 90, 9).tolist()]
        levels = [sum(a for a, _ in events[: i + 1]) - sum(r for _, r in events[:i]) for i in range(9)]
        if peak(list(events)) != max(levels):
            return False
    return True


@invariant_of("peak")
def is_not_at_the_end(peak, rng):
    """Nor is it the memory that is left at the end, or the largest allocation alone."""
    return all(peak([(a, 0), (b, a), (1, b)]) == a + b for a, b in rng.integers(5, 99, (9, 2)).tolist())


@invariant_of("saved_values")
def with_an_adapter_on_down(saved_values, rng):
    """With an adapter on down alone, what the activations need is stored, down's input, and A's output."""
    sizes = [(d, m, r) for d in (5, 9) for m in (11, 17) for r in (2, 4)]
    return all(saved_values(d, m, r, {"down"}) == 3 * m + m + r for d, m, r in sizes)


@invariant_of("saved_values")
def with_adapters_on_gate_and_up(saved_values, rng):
    """With one on gate, on up or on both, x is stored, once for both, and down's input is not."""
    sizes = [(d, m, r) for d in (5, 9) for m in (11, 17) for r in (2, 4)]
    targets = ({"gate"}, {"up"}, {"gate", "up"})
    return all(saved_values(d, m, r, set(t)) == d + 3 * m + len(t) * r for d, m, r in sizes for t in targets)


@invariant_of("saved_values")
def with_adapters_on_down_and_others(saved_values, rng):
    """With adapters on all three, or on down and one of the others, x and down's input are both stored."""
    sizes = [(d, m, r) for d in (5, 9) for m in (11, 17) for r in (2, 4)]
    targets = ({"gate", "down"}, {"up", "down"}, {"gate", "up", "down"})
    return all(saved_values(d, m, r, set(t)) == d + 4 * m + len(t) * r for d, m, r in sizes for t in targets)


@invariant_of("saved_values")
def grows_with_the_rank(saved_values, rng):
    """A rank that is higher by one adds one value for each adapter."""
    targets = ({"gate"}, {"down"}, {"gate", "up"}, {"gate", "up", "down"})
    grown = [[saved_values(7, 13, r + 1, set(t)) - saved_values(7, 13, r, set(t)) for r in (2, 3)] for t in targets]
    return grown == [[len(t)] * 2 for t in targets]


@invariant_of("longest")
def fits_and_one_more_does_not(longest, rng):
    """So many tokens fit into the budget, and one more does not."""
    cases = [
        (b, int(s * b * 2**30), p) for b, s, p in zip((4, 9, 24), (0.3, 0.7, 0.5), (10**5, 3333333, 999), strict=True)
    ]
    counts = [(longest(b, static, p), b * 2**30 - static, p) for b, static, p in cases]
    return all(count == int(count) and count * p <= room < (count + 1) * p for count, room, p in counts)


@invariant_of("longest")
def an_exact_fit_fits(longest, rng):
    """Where some number of tokens needs exactly the budget, that number fits."""
    cases = [
        (int(b), int(k), int(p)) for b, k, p in zip((4, 8, 16), rng.integers(9, 99, 3), (101, 4096, 777), strict=True)
    ]
    return all(longest(b, b * 2**30 - k * p, p) == k for b, k, p in cases)


@invariant_of("longest")
def nothing_fits_beside_too_much(longest, rng):
    """Where the static bytes alone exceed the budget, the result is 0, and with room for one token it is 1."""
    excess = rng.integers(1, 10**9, 5).tolist()
    return all(longest(4, 4 * 2**30 + x, 1000) == 0 for x in excess) and longest(4, 4 * 2**30 - 1500, 1000) == 1


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
