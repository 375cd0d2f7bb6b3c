"""Hidden tests of lesson 05: the time of a training step."""

from __future__ import annotations

from lora_lab.course.grading.invariant import Reflection, invariant_of


@invariant_of("multiply_adds")
def of_full_fine_tuning(multiply_adds, rng):
    """Full fine-tuning multiplies M, E and T three times: once forward and twice backward."""
    cases = rng.integers(10**5, 10**9, (8, 4)).tolist()
    return all(multiply_adds(M, E, T, P, "full") == 3 * (M + E + T) for M, E, T, P in cases)


@invariant_of("multiply_adds")
def of_frozen_weights(multiply_adds, rng):
    """With LoRA and adapters of no size, only the weight gradients of M and E are missing."""
    cases = rng.integers(10**5, 10**9, (8, 3)).tolist()
    return all(multiply_adds(M, E, T, 0, "LoRA") == 2 * M + 2 * E + 3 * T for M, E, T in cases)


@invariant_of("multiply_adds")
def of_the_adapters(multiply_adds, rng):
    """With LoRA the adapters add 3 P, and with full fine-tuning nothing."""
    added = [
        [multiply_adds(M, E, T, P, method) - multiply_adds(M, E, T, 0, method) for method in ("LoRA", "full")] + [P]
        for M, E, T, P in rng.integers(10**5, 10**9, (8, 4)).tolist()
    ]
    return all(lora == 3 * P and full == 0 for lora, full, P in added)


@invariant_of("break_even")
def no_more_and_at_the_next_rank_more(break_even, rng):
    """At the result LoRA needs no more multiplications than full fine-tuning, and at the next rank it does."""
    cases = [
        (int(M), int(E), int(p))
        for M, E, p in zip(*rng.integers(10**6, 10**8, (2, 9)), range(999, 9999, 1000), strict=True)
    ]
    ranks = [(break_even(M, E, p), M + E, p) for M, E, p in cases if (M + E) % (3 * p)]
    return all(r == int(r) and 3 * r * p <= skipped < 3 * (r + 1) * p for r, skipped, p in ranks)


@invariant_of("break_even")
def a_tie_counts(break_even, rng):
    """Where both need equally many at some rank, that rank is the result."""
    cases = [(int(r), int(p)) for r, p in rng.integers(20, 900, (8, 2))]
    return all(break_even(3 * r * p - 1000, 1000, p) == r for r, p in cases)


@invariant_of("fair_ratio")
def waits_for_the_work(fair_ratio, rng):
    """On a steady device the ratio is right, so the work was timed and not its launch."""
    from lora_lab.course.exercises.speed import Device

    true = [0.5, 0.8, 1.4, 2.2]
    measured = [fair_ratio(Device({"full": 0.2, "LoRA": 0.2 * ratio}, rng)) for ratio in true]
    return all(abs(one / other - 1) < 0.02 for one, other in zip(measured, true, strict=True))


@invariant_of("fair_ratio")
def warms_up(fair_ratio, rng):
    """It is right where the first step of each kind takes long."""
    from lora_lab.course.exercises.speed import Device

    true = [0.5, 0.8, 1.4, 2.2]
    measured = [fair_ratio(Device({"full": 0.2, "LoRA": 0.2 * ratio}, rng, first=4.0)) for ratio in true]
    return all(abs(one / other - 1) < 0.02 for one, other in zip(measured, true, strict=True))


@invariant_of("fair_ratio")
def takes_turns_and_the_median(fair_ratio, rng):
    """It is right where the device becomes slower, and another program interrupts it now and then."""
    from lora_lab.course.exercises.speed import Device

    true = [*[0.5, 0.8, 1.4, 2.2] * 5]
    trouble = {"first": 4.0, "drift": 0.01, "interruption": 8.0}
    measured = [fair_ratio(Device({"full": 0.2, "LoRA": 0.2 * ratio}, rng, **trouble)) for ratio in true]
    return all(abs(one / other - 1) < 0.02 for one, other in zip(measured, true, strict=True))


Reflection(
    "05_speed",
    question="A blog says: *LoRA trains three times as fast as full fine-tuning.* In five to eight sentences: "
    "which conditions must be stated before this can be checked, how would you time the two, and which "
    "result would surprise you after this lesson?",
    rubric=(
        "The answer names at least three of: model, rank, tokens per step, device, threads, optimiser.",
        "The timing waits for the device and warms up.",
        "The timing takes turns, and the answer says why.",
        "The surprising result is compared with the share of multiplications that LoRA skips.",
    ),
    expected="A ratio belongs to a model, a rank, tokens per step, a device and its threads. One runs each step "
    "once, synchronises before reading the clock, takes turns so that drift meets both, and takes the "
    "median of the ratios. By multiplications alone LoRA skips a third, so a factor above 1.5 needs "
    "another reason, such as the optimiser's work, a baseline that swaps memory, or another batch.",
)
