"""Exercises of lesson 07: overfitting."""

import copy

import numpy as np

from lora_lab.course.exercise import Exercise, Reflection, close


def training_run(rng):
    """Steps, training losses and validation losses, in no order."""
    first, count = rng.integers([1, 8], [4, 13]).tolist()
    steps = int(rng.choice([5, 10, 20])) * np.arange(first, first + count)
    return steps, rng.uniform(0, 1, count), rng.uniform(1, 2, count)


PLACE, LOW, LAST = "validation.argmin()", "validation.min()", "validation[-1]"
GAP, FIRST_RISE = f"{LAST} - training[-1]", "np.argmax(np.diff(validation) > 0)"
read_curve = Exercise(
    "read_curve",
    inputs=training_run,
    wrong={
        "You stopped where the training loss is lowest. Early stopping looks at unseen data.": [
            (PLACE, "training.argmin()"),
            (PLACE, "training.argmin()", LOW, "validation[training.argmin()]"),
        ],
        "You stopped at the last step. That is where training ended, not where the model was best.": [
            (PLACE, "-1"),
            (PLACE, "-1", LOW, LAST),
        ],
        "The stop is a position in the array. Return the training step that stands there.": (
            (f"steps[{PLACE}]", PLACE)
        ),
        "The gap has the wrong sign. It is the validation loss minus the training loss.": (
            (GAP, f"training[-1] - {LAST}")
        ),
        "The rise is counted from the start. Overfitting counts from the lowest validation loss.": (
            (LOW, "validation[0]")
        ),
        "The rise is counted to the highest loss after the lowest. It is asked for at the last step.": (
            (f"{LAST} - {LOW}", f"validation[{PLACE}:].max() - {LOW}")
        ),
        "You stopped where the validation loss first rises. It falls again later: take its lowest value.": (
            (PLACE, FIRST_RISE, LOW, f"validation[{FIRST_RISE}]")
        ),
        "The rise has the wrong sign. It is the last validation loss minus the lowest.": (
            (f"{LAST} - {LOW}", f"{LOW} - {LAST}")
        ),
        "The gap is read at the lowest validation loss. It is asked for at the last step.": (
            (GAP, f"{LOW} - training[{PLACE}]")
        ),
    },
    hints=[
        "Three numbers are asked for: a step, and two differences of losses.",
        "validation.argmin() is the position of the lowest validation loss; steps[...] is the step there.",
        "The rise is validation[-1] - validation.min(), and the gap validation[-1] - training[-1].",
    ],
    praise="Three numbers now stand for a whole run, so runs can be compared.",
)


@read_curve.must()
def stops_at_the_lowest(read_curve, rng):
    """The first number is the training step at which the validation loss is lowest."""
    steps, training, validation = training_run(rng)
    return read_curve(steps, training, validation)[0] == steps[list(validation).index(min(validation))]


@read_curve.must()
def rises_from_there(read_curve, rng):
    """The second is how much higher the validation loss is at the last step than where it is lowest."""
    steps, training, validation = training_run(rng)
    return close(read_curve(steps, training, validation)[1], validation[-1] - min(validation))


@read_curve.must()
def has_a_gap_at_the_end(read_curve, rng):
    """The third is how much higher the validation loss is than the training loss, at the last step."""
    steps, training, validation = training_run(rng)
    return close(read_curve(steps, training, validation)[2], validation[-1] - training[-1])


def rises_by_rate(rng):
    """Rates in no order, and the rises of two methods (rates, seeds), which scatter widely."""
    return rng.permutation([0.001, 0.003, 0.01, 0.03, 0.1]), *rng.lognormal(0, 1, (2, 5, 3))


MEANS = "full.mean(axis=1), lora.mean(axis=1)"
rig = Exercise(
    "rig",
    inputs=rises_by_rate,
    wrong={
        "Both methods have the same rate. Nobody stops you: pick the two rates separately.": (
            ("full.arg", "(full - lora).arg", "lora.arg", "(lora - full).arg")
        ),
        "The headlines are swapped. LoRA overfits less where its rise is small and that of full is large.": (
            ("less, more", "more, less")
        ),
        "The pairs are the wrong way round. The rate of full fine-tuning comes first, then LoRA's.": (
            ("less, more", "less[::-1], more[::-1]")
        ),
        "One seed picked the rates. Take the mean over seeds, the second axis, first.": [
            (MEANS, "full[:, 0], lora[:, 0]"),
            (MEANS, "full[:, -1], lora[:, -1]"),
        ],
        "These are positions, but rates are asked for. Look the rates up: rates[position].": (
            ("less = ", "rates = np.arange(len(rates))\n    less = ")
        ),
        "The largest rate does not always have the largest rise. Look at the rises, not at the rates.": (
            ("less, more", "(rates.max(), rates.min()), (rates.min(), rates.max())")
        ),
        "Only LoRA's rate was rigged. Picking that of full fine-tuning takes you further.": (
            ("full.argmax()", "full.argmin()")
        ),
    },
    hints=[
        "full.mean(axis=1) is the mean rise of full fine-tuning at each rate.",
        "For 'less' you want LoRA's smallest mean rise beside the largest of full fine-tuning; for 'more' the reverse.",
        "less = (rates[full.mean(axis=1).argmax()], rates[lora.mean(axis=1).argmin()]), and more the other two.",
    ],
    praise="One table, two opposite headlines, and no number was invented.",
)


def is_extreme(rig, rng, headline, extreme):
    """Whether LoRA's mean rise minus that of full fine-tuning is at a pair of rates the extreme one of all pairs."""
    rates, full, lora = rises_by_rate(rng)
    first, second = (list(rates).index(rate) for rate in rig(rates, full, lora)[headline])
    differences = lora.mean(axis=1) - full.mean(axis=1)[:, None]
    return close(differences[first, second], extreme(differences))


@rig.must()
def makes_it_smallest(rig, rng):
    """For the first pair of rates, LoRA's mean rise minus that of full fine-tuning is the smallest of all pairs."""
    return is_extreme(rig, rng, 0, np.min)


@rig.must()
def makes_it_largest(rig, rng):
    """For the second pair it is the largest of all pairs."""
    return is_extreme(rig, rng, 1, np.max)


def swept(rng):
    """For two methods the lowest loss and the rise (rates, seeds); the seeds that choose and those that judge."""
    full, lora = ({"lowest": rng.uniform(0.6, 1, (5, 8)), "rise": rng.lognormal(0, 1, (5, 8))} for _ in range(2))
    seeds = rng.permutation(8).tolist()
    return full, lora, seeds[:3], seeds[3:]


CHOSEN_BY, JUDGED, ALL = "[:, choosing]", "[best, judging]", "[*choosing, *judging]"
fair = Exercise(
    "fair",
    inputs=swept,
    wrong={
        "You chose the rates by the rise, which is what you judge. Choose by the lowest validation loss.": (
            ("'lowest'", "'rise'")
        ),
        "The seeds that chose the rates also judge. Take the rises of the judging seeds.": (JUDGED, "[best, choosing]"),
        "The seeds that judge took part in the choice. Choose on the choosing seeds alone.": [
            (CHOSEN_BY, "[:, judging]"),
            (CHOSEN_BY, f"[:, {ALL}]"),
        ],
        "The rises of all seeds are averaged. Those that chose the rates take no part in judging them.": (
            (JUDGED, f"[best, {ALL}]")
        ),
        "Each seed has its own best rate, which is cherry-picking. One rate for all seeds of a method.": (
            ("[:, choosing].mean(axis=1).argmin()", "[:, judging].argmin(axis=0)")
        ),
        "Both methods have the same rate, which suits one of them. Choose a rate for each method.": [
            ("method['lowest']", "(full['lowest'] + lora['lowest'])"),
            ("method['lowest']", "full['lowest']"),
        ],
        "The difference has the wrong sign. It is LoRA's rise minus that of full fine-tuning.": (
            ("rises[1] - rises[0]", "rises[0] - rises[1]")
        ),
        "These are lowest losses. They choose the rates; what is compared is the rise.": ("'rise'", "'lowest'"),
    },
    hints=[
        'full["lowest"][:, choosing].mean(axis=1) is the mean lowest loss at each rate, over the choosing seeds.',
        ".argmin() of that is the position of the best rate; do the same for LoRA.",
        'full["rise"][best, judging].mean() is what full fine-tuning did on seeds that did not choose.',
    ],
    praise="What chose does not judge: this rule alone would retract many a headline.",
)


@fair.must()
def compares_rises(fair, rng):
    """If all rises of LoRA grow by an amount, so does the result; if all rises of full do, the result falls by it."""
    full, lora, *seeds = swept(rng)
    result = fair(full, lora, *seeds)
    more = fair(full, lora | {"rise": lora["rise"] + 0.3}, *seeds)
    less = fair(full | {"rise": full["rise"] + 0.3}, lora, *seeds)
    return close([more - result, less - result], [0.3, -0.3])


@fair.must()
def lets_no_seed_choose_and_judge(fair, rng):
    """It does not change with the lowest losses of judging seeds or rises of choosing ones, but with the other two."""
    *methods, choosing, judging = swept(rng)
    results = [fair(*methods, choosing, judging)]
    for name, seeds in (("lowest", judging), ("rise", choosing), ("rise", judging)):
        changed = copy.deepcopy(methods)
        for method in changed:
            method[name][:, seeds] = rng.uniform(0, 1, (5, len(seeds)))
        results.append(fair(*changed, choosing, judging))
    return close(results[1:3], [results[0]] * 2) and not close(results[3], results[0])


@fair.must()
def has_a_rate_for_each_method(fair, rng):
    """Each method has the one rate whose mean lowest loss over the choosing seeds is best, for all judging seeds."""
    (*methods, choosing, judging), means = swept(rng), []
    for method in methods:
        losses = [sum(method["lowest"][rate, seed] for seed in choosing) for rate in range(5)]
        means.append(np.mean([method["rise"][losses.index(min(losses)), seed] for seed in judging]))
    return close(fair(*methods, choosing, judging), means[1] - means[0])


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
