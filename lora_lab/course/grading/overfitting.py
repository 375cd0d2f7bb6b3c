"""Hidden tests of lesson 07: overfitting."""

from __future__ import annotations

import numpy as np

from lora_lab.course.grading.invariant import Reflection, close, invariant_of


@invariant_of("read_curve")
def stops_at_the_lowest(read_curve, rng):
    """The first number is the training step at which the validation loss is lowest."""
    for size in (7, 9, 12):
        steps, training, validation = 20 * np.arange(3, size + 3), rng.uniform(0, 1, size), rng.uniform(1, 2, size)
        validation[int(rng.integers(2, size - 1))] = 0.9
        if read_curve(steps, training, validation)[0] != steps[list(validation).index(0.9)]:
            return False
    return True


@invariant_of("read_curve")
def rises_from_there(read_curve, rng):
    """The second is how much higher the validation loss is at the last step than where it is lowest."""
    runs = [(20 * np.arange(1, 9), rng.uniform(0, 1, 8), rng.uniform(1, 2, 8)) for _ in range(6)]
    return close([read_curve(*run)[1] for run in runs], [run[2][7] - min(run[2]) for run in runs])


@invariant_of("read_curve")
def has_a_gap_at_the_end(read_curve, rng):
    """The third is how much higher the validation loss is than the training loss, at the last step."""
    runs = [(20 * np.arange(1, 9), rng.uniform(0, 1, 8), rng.uniform(1, 2, 8)) for _ in range(6)]
    return close([read_curve(*run)[2] for run in runs], [run[2][7] - run[1][7] for run in runs])


@invariant_of("rig")
def makes_it_smallest(rig, rng):
    """For the first pair of rates, LoRA's mean rise minus that of full fine-tuning is the smallest of all pairs."""
    for _ in range(8):
        rates, (full, lora) = rng.uniform(1e-3, 1e-1, 5), rng.lognormal(0, 1, (2, 5, 3))
        first, second = (list(rates).index(rate) for rate in rig(rates, full, lora)[0])
        smallest = min(lora[j].mean() - full[i].mean() for i in range(5) for j in range(5))
        if not close(lora[second].mean() - full[first].mean(), smallest):
            return False
    return True


@invariant_of("rig")
def makes_it_largest(rig, rng):
    """For the second pair it is the largest of all pairs."""
    for _ in range(8):
        rates, (full, lora) = rng.uniform(1e-3, 1e-1, 5), rng.lognormal(0, 1, (2, 5, 3))
        first, second = (list(rates).index(rate) for rate in rig(rates, full, lora)[1])
        largest = max(lora[j].mean() - full[i].mean() for i in range(5) for j in range(5))
        if not close(lora[second].mean() - full[first].mean(), largest):
            return False
    return True


@invariant_of("fair")
def compares_rises(fair, rng):
    """If all rises of LoRA grow by an amount, so does the result; if all rises of full do, the result falls by it."""
    full, lora = ({"lowest": rng.uniform(0, 1, (5, 8)), "rise": rng.uniform(0, 1, (5, 8))} for _ in range(2))
    result = fair(full, lora, [1, 4, 6], [0, 2, 3, 5, 7])
    more = fair(full, {"lowest": lora["lowest"], "rise": lora["rise"] + 0.3}, [1, 4, 6], [0, 2, 3, 5, 7])
    less = fair({"lowest": full["lowest"], "rise": full["rise"] + 0.3}, lora, [1, 4, 6], [0, 2, 3, 5, 7])
    return close([more - result, less - result], [0.3, -0.3])


@invariant_of("fair")
def lets_no_seed_choose_and_judge(fair, rng):
    """It does not change with the lowest losses of judging seeds or rises of choosing ones, but with the other two."""
    choosing, judging, results = [1, 4, 6], [0, 2, 3, 5, 7], []
    tables = rng.uniform(0, 1, (2, 2, 5, 8))  # method, lowest and rise, rate, seed
    for changed in (None, (0, judging), (1, choosing), (1, judging)):
        changed_tables = tables.copy()
        if changed:
            changed_tables[:, changed[0]][..., changed[1]] = rng.uniform(0, 1, (2, 5, len(changed[1])))
        results.append(fair(*({"lowest": lowest, "rise": rise} for lowest, rise in changed_tables), choosing, judging))
    return close(results[1:3], [results[0]] * 2) and not close(results[3], results[0])


@invariant_of("fair")
def has_a_rate_for_each_method(fair, rng):
    """Each method has the one rate whose mean lowest loss over the choosing seeds is best, for all judging seeds."""
    for _ in range(8):
        methods, means = (
            [{"lowest": rng.uniform(0, 1, (5, 6)), "rise": rng.uniform(0, 1, (5, 6))} for _ in range(2)],
            [],
        )
        for method in methods:
            losses = [sum(method["lowest"][rate, seed] for seed in (0, 3, 5)) for rate in range(5)]
            means.append(np.mean([method["rise"][losses.index(min(losses)), seed] for seed in (1, 2, 4)]))
        if not close(fair(*methods, [0, 3, 5], [1, 2, 4]), means[1] - means[0]):
            return False
    return True


Reflection(
    "07_overfitting",
    question="A headline says: *LoRA overfits less than full fine-tuning.* Write a comparison, in five to eight "
    "sentences, in which that is true, and one in which it is false, without inventing a number. Then "
    "say how a comparison must be made so that neither trick works.",
    rubric=(
        "Both comparisons choose learning rates, and the answer says which rate goes to which method.",
        "The answer says what is measured: the rise, the gap, or another number, and where it is read.",
        "In the fair comparison each method has a rate of its own, chosen by the lowest validation loss.",
        "The seeds, or the data, that choose the rates do not judge.",
    ),
    expected="The rise follows the rate. With a low rate for LoRA and a high one for full fine-tuning LoRA "
    "overfits less, and the other way round it overfits more. In a fair comparison each method has one "
    "rate, with the lowest validation loss over some seeds, and the rises of other seeds are compared. A "
    "difference that is smaller than what a choice between equally good rates makes says nothing.",
)
