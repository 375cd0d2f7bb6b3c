"""Exercises of lesson 07: overfitting."""

import numpy as np

from lora_lab.course.exercise import Exercise, Reflection, close

# The lesson's own sweep, 64 examples, mean of three seeds: the lowest validation loss, and the rise after it.
SWEPT_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)  # one step higher than there: messages print three decimals
LOWEST = {"full": (0.74, 0.69, 0.69, 0.83, 0.80), "lora": (1.10, 0.76, 0.77, 0.82, 0.97)}
RISE = {"full": (0.01, 0.02, 0.12, 0.52, 2.70), "lora": (0.01, 0.02, 0.13, 0.33, 0.97)}


def training_run(rng):
    """Steps, training losses and validation losses: the former fall almost to the end, the latter turn.

    Before they turn the validation losses rise once and fall again, and the last of them is not the highest.
    """
    count = int(rng.integers(9, 13))
    steps = int(rng.choice([5, 10, 20])) * np.arange(1, count + 1)
    training = 2.5 * np.exp(-rng.uniform(0.3, 0.5) * np.arange(count)) + 0.1
    training[-1] = training[-2] + 0.05  # so that the last step is not the lowest either
    turn = int(rng.integers(3, count - 3))
    distance = np.arange(count) - turn
    validation = 0.8 + np.where(distance < 0, 0.4, 0.1) * np.abs(distance) + rng.uniform(0, 0.03, count)
    validation[int(rng.integers(1, turn))] += 0.8
    validation[int(rng.integers(turn + 1, count - 1))] += 0.9
    return steps, training, validation


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
    for size in (7, 9, 12):
        steps, training, validation = 20 * np.arange(3, size + 3), rng.uniform(0, 1, size), rng.uniform(1, 2, size)
        validation[int(rng.integers(2, size - 1))] = 0.9
        if read_curve(steps, training, validation)[0] != steps[list(validation).index(0.9)]:
            return False
    return True


def runs(rng):
    """Six training runs without a shape."""
    return [(20 * np.arange(1, 9), rng.uniform(0, 1, 8), rng.uniform(1, 2, 8)) for _ in range(6)]


@read_curve.must()
def rises_from_there(read_curve, rng):
    """The second is how much higher the validation loss is at the last step than where it is lowest."""
    return all(close(read_curve(*run)[1], run[2][7] - min(run[2])) for run in runs(rng))


@read_curve.must()
def has_a_gap_at_the_end(read_curve, rng):
    """The third is how much higher the validation loss is than the training loss, at the last step."""
    return all(close(read_curve(*run)[2], run[2][7] - run[1][7]) for run in runs(rng))


def around(rng, means, seeds, scatter):
    """Measurements (rates, seeds) that scatter around their means by a factor, also for all seeds of a rate alike."""
    return means[:, None] * rng.lognormal(0, 0.4, (len(means), 1)) * rng.lognormal(0, scatter, (len(means), seeds))


def rises_by_rate(rng):
    """Rates in no order, and the rises of two methods (rates, seeds), which scatter widely."""
    order = rng.permutation(len(SWEPT_RATES))
    full, lora = (around(rng, np.array(RISE[method])[order], 3, 0.9) for method in ("full", "lora"))
    return np.array(SWEPT_RATES)[order], full, lora


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
    draws=28,
)


def gains(rig, rng, headline):
    """How much more LoRA rises than full fine-tuning: for eight tables at a pair of rates, and at all pairs."""
    for _ in range(8):
        rates, (full, lora) = rng.uniform(1e-3, 1e-1, 5), rng.lognormal(0, 1, (2, 5, 3))
        first, second = (list(rates).index(rate) for rate in rig(rates, full, lora)[headline])
        differences = lora.mean(axis=1) - full.mean(axis=1)[:, None]
        yield differences[first, second], differences


@rig.must()
def makes_it_smallest(rig, rng):
    """For the first pair of rates, LoRA's mean rise minus that of full fine-tuning is the smallest of all pairs."""
    return all(close(gain, every.min()) for gain, every in gains(rig, rng, 0))


@rig.must()
def makes_it_largest(rig, rng):
    """For the second pair it is the largest of all pairs."""
    return all(close(gain, every.max()) for gain, every in gains(rig, rng, 1))


def swept(rng):
    """For two methods the lowest loss and the rise (rates, seeds); the seeds that choose and those that judge."""
    order, seeds = rng.permutation(len(SWEPT_RATES)), 8
    tables = []
    for method in ("full", "lora"):
        lowest = np.array(LOWEST[method])[order][:, None] + rng.normal(0, 0.06, (len(order), seeds))
        tables.append({"lowest": lowest, "rise": around(rng, np.array(RISE[method])[order], seeds, 0.25)})
    shuffled = rng.permutation(seeds).tolist()
    return tables[0], tables[1], sorted(shuffled[:3]), sorted(shuffled[3:])


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
    draws=24,
)


def table(rng, seeds):
    """A sweep of one method over five rates, without a shape."""
    return {"lowest": rng.uniform(0, 1, (5, seeds)), "rise": rng.uniform(0, 1, (5, seeds))}


@fair.must()
def compares_rises(fair, rng):
    """If all rises of LoRA grow by an amount, so does the result; if all rises of full do, the result falls by it."""
    full, lora, seeds = table(rng, 8), table(rng, 8), ([1, 4, 6], [0, 2, 3, 5, 7])
    result = fair(full, lora, *seeds)
    more = fair(full, lora | {"rise": lora["rise"] + 0.3}, *seeds)
    less = fair(full | {"rise": full["rise"] + 0.3}, lora, *seeds)
    return close([more - result, less - result], [0.3, -0.3])


@fair.must()
def lets_no_seed_choose_and_judge(fair, rng):
    """It does not change with the lowest losses of judging seeds or rises of choosing ones, but with the other two."""
    choosing, judging, results = [1, 4, 6], [0, 2, 3, 5, 7], []
    full, lora = table(rng, 8), table(rng, 8)
    for name, seeds in (("lowest", []), ("lowest", judging), ("rise", choosing), ("rise", judging)):
        changed = [{key: values.copy() for key, values in method.items()} for method in (full, lora)]
        for method in changed:
            method[name][:, seeds] = rng.uniform(0, 1, (5, len(seeds)))
        results.append(fair(*changed, choosing, judging))
    return close(results[1:3], [results[0]] * 2) and not close(results[3], results[0])


@fair.must()
def has_a_rate_for_each_method(fair, rng):
    """Each method has the one rate whose mean lowest loss over the choosing seeds is best, for all judging seeds."""
    for _ in range(8):
        methods, means = [table(rng, 6), table(rng, 6)], []
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
