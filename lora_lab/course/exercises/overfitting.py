"""Exercises of lesson 07: overfitting."""

import copy

import numpy as np

from lora_lab.course.exercise import Exercise, Reflection, close


def training_run(rng):
    """Steps and two losses: of a run that turned, that still falls, whose training failed, or that diverged to nan.

    All losses of a kind differ and have one decimal. Single values stick out, as in any run.
    """
    count, kind = int(rng.integers(4, 7)), rng.choice(["turned", "turned", "falling", "failed", "diverged"])
    steps = int(rng.choice([5, 10, 20])) * np.arange(1, count + 1)
    training, falling = (np.sort(rng.choice(np.arange(5, 60), count, replace=False))[::-1] / 10 for _ in range(2))
    for losses in (training, falling):  # two neighbours change places, the first and the lowest excepted
        place = int(rng.integers(1, count - 2))
        losses[[place, place + 1]] = losses[[place + 1, place]]
    if rng.random() < 0.5:  # a run may begin by getting worse
        training[[0, 1]] = training[[1, 0]]
    training[-3:] = training[-3:][[[0, 1, 2], [0, 2, 1], [2, 0, 1]][rng.integers(3)]]
    lowest = int(rng.integers(1, count - 1))
    turned = np.concatenate([falling[: lowest + 1], rng.permutation(falling[lowest + 1 :])])
    turned[[lowest, turned.argmin()]] = turned[[turned.argmin(), lowest]]
    if lowest < count - 2 and rng.random() < 0.7:  # the last validation loss is lower than the one before
        turned[-2:] = sorted(turned[-2:], reverse=True)
    if rng.random() < 0.5:  # it ends higher than it began
        turned[[0, -1]] = turned[[-1, 0]]
    validation = turned if kind == "turned" or (kind != "falling" and rng.random() < 0.4) else falling
    if kind == "failed":
        training[[0, -1]] = training[[-1, 0]]
        if rng.random() < 0.5:  # it ends where it began
            training[-1] = training[0]
    if kind == "diverged":
        training[-1] = validation[-1] = np.nan
    return steps, training, validation


def expected(steps, training, validation):
    """The step to keep and what to do, in plain words."""
    losses = [(loss, step) for loss, step in zip(validation, steps, strict=True) if loss == loss]
    keep = min(losses)[1]
    failed = not training[-1] < training[0]
    return keep, "lower the rate" if failed else "train longer" if keep == max(steps) else "stop earlier"


BEST, LAST_IS_BEST, FELL = "np.nanargmin(validation)", "keep == steps[-1]", "training[-1] < training[0]"
NEXT = "'train longer' if keep == steps[-1] else 'stop earlier'"
IS_LAST = "np.nanargmin(validation) == len(steps) - 1"  # whatever step is kept
FIRST_RISE = "[*np.flatnonzero(np.diff(validation) > 0), np.nanargmin(validation)][0]"
read_curve = Exercise(
    "read_curve",
    inputs=training_run,
    draws=320,
    wrong={
        "You kept the step of the lowest training loss. That shows what was memorised: look at the validation loss.": [
            (BEST, "np.nanargmin(training)", LAST_IS_BEST, IS_LAST),
            (BEST, "np.nanargmin(training)"),
        ],
        "You kept the last step. That is where training ended, not where the model was best.": [
            (BEST, "-1", LAST_IS_BEST, IS_LAST),
            (BEST, "-1"),
        ],
        "What you keep is a position in the array. Return the training step that stands there.": (
            (f"steps[{BEST}]", BEST, LAST_IS_BEST, "keep == len(steps) - 1")
        ),
        "keep is a training step, and no position. Compare it with steps[-1].": (
            (LAST_IS_BEST, "keep == len(steps) - 1")
        ),
        "You kept the step before the first rise. Single values stick out: take the lowest of all.": [
            (BEST, FIRST_RISE, LAST_IS_BEST, IS_LAST),
            (BEST, FIRST_RISE),
        ],
        "argmin takes nan for the lowest loss. np.nanargmin leaves nan out.": [
            (BEST, "validation.argmin()"),
            (BEST, "validation.argmin()", f"not {FELL}", "training[-1] >= training[0]"),
        ],
        "A comparison with nan is False, so a run that diverged slips through. Ask whether it fell, then negate.": (
            (f"not {FELL}", "training[-1] >= training[0]")
        ),
        "A training loss that ends where it began is no lower either. That run has failed, too.": (
            (FELL, "training[-1] <= training[0]")
        ),
        "You looked for nan alone. A training loss that ends higher than it began has failed as well.": (
            (f"not {FELL}", "np.isnan(training[-1])")
        ),
        "You asked whether the validation loss ended lower. Whether training failed shows in the training loss.": (
            (FELL, "validation[-1] < validation[0]")
        ),
        "Single training losses stick out, before the last one and elsewhere. Compare the last with the first.": [
            (FELL, "training[-1] < training[-2]"),
            (FELL, "training[-1] == training.min()"),
            (FELL, "training.max() == training[0]"),
        ],
        "'train longer' and 'stop earlier' are exchanged. If the last step is the best so far, go on.": (
            (LAST_IS_BEST, "keep != steps[-1]")
        ),
        "If the training loss rose or is nan, no stopping point helps. That asks for a lower rate.": [
            f"keep = steps[{BEST}]\nreturn (keep, {NEXT})",
            f"keep = steps[validation.argmin()]\nreturn (keep, {NEXT})",
        ],
        "Training failed, and you go on because the last step was the best. Look at the training loss first.": (
            f"keep = steps[{BEST}]\nfailed = not {FELL}\n"
            f"return (keep, 'train longer' if {LAST_IS_BEST} else 'lower the rate' if failed else 'stop earlier')"
        ),
        "You decided by the gap. Every run has one: what counts is whether the validation loss has turned.": (
            (LAST_IS_BEST, "validation[-1] <= training[-1]")
        ),
        "You compared the last two validation losses. Ask whether the last is the lowest of all.": (
            (LAST_IS_BEST, "validation[-1] < validation[-2]")
        ),
    },
    hints=[
        "Two questions, in this order: has training failed, and if not, is the best checkpoint the last one?",
        "np.nanargmin(validation) is the position of the lowest validation loss, without nan; steps[...] is the step.",
        "A comparison with nan is False. So training has failed if training[-1] < training[0] is not true.",
    ],
    praise="A step to keep and a next move: that is all a loss curve is for.",
)


def compare_runs(read_curve, rng, agree):
    """Whether an answer and the expected one agree on each of some runs."""
    runs = [training_run(rng) for _ in range(8)]
    return all(agree(read_curve(*run), expected(*run)) for run in runs)


@read_curve.must()
def keeps_the_lowest_validation_loss(read_curve, rng):
    """The step is that of the lowest validation loss, whatever the training loss does; nan is never the lowest."""
    return compare_runs(read_curve, rng, lambda one, other: one[0] == other[0])


@read_curve.must()
def sees_whether_training_failed(read_curve, rng):
    """It says 'lower the rate' if the training loss ends no lower than it began, or as nan, and only then."""
    failed = "lower the rate"
    return compare_runs(read_curve, rng, lambda one, other: (one[1] == failed) == (other[1] == failed))


@read_curve.must()
def goes_on_only_while_the_last_step_is_the_best(read_curve, rng):
    """Of the other runs it says 'train longer' if the last step is the best, and else 'stop earlier'."""
    return compare_runs(read_curve, rng, lambda one, other: other[1] in (one[1], "lower the rate"))


def rises_by_rate(rng):
    """Three rates in no order, and the rises of two methods (rates, seeds), with one decimal; no means are equal."""
    rises = rng.choice(np.arange(40), (2, 3, 2), replace=False) / 10
    if any(len(set(sums)) < 3 for sums in rises.sum(axis=2).round(1).tolist()):
        return rises_by_rate(rng)
    return rng.permutation([0.001, 0.01, 0.1]), *rises


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
            "ends = [each(axis=1) for each in (full.max, lora.min, full.min, lora.max)]\n"
            "a, b, c, d = ends\nreturn (rates[a.argmax()], rates[b.argmin()]), (rates[c.argmin()], rates[d.argmax()])",
        ],
        "You averaged over the rates, the first axis. Average over the seeds: axis=1.": (
            (MEANS, "full.mean(axis=0), lora.mean(axis=0)")
        ),
        "mean() without an axis leaves one number, and no rate to choose. Average over the seeds: axis=1.": (
            (MEANS, "full.mean(), lora.mean()")
        ),
        "You took the place in the whole table, with its seeds. Average over them first: full.mean(axis=1).": (
            (MEANS, "full, lora")
        ),
        "max and min give rises. argmax and argmin give their positions, which pick the rates.": (
            ("argmax", "max", "argmin", "min")
        ),
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
    """For two methods the lowest loss and the rise (rates, seeds), one decimal; seeds that choose or judge."""
    seeds, names = rng.permutation(4).tolist(), ("lowest", "rise")
    numbers = rng.choice(np.arange(60), (2, 2, 3, 4), replace=False) / 10
    sums = numbers[:, 0][:, :, seeds[:2]].sum(axis=2).round(1)
    both = sums.sum(axis=0).round(1)
    if any(len(set(each)) < 3 for each in (*sums.tolist(), both.tolist())):  # no two rates are equally good
        return swept(rng)
    full, lora = (dict(zip(names, method, strict=True)) for method in numbers)
    return full, lora, seeds[:2], seeds[2:]


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
        "Each seed has its own best rate, which is cherry-picking. One rate for all seeds of a method.": [
            ("[:, choosing].mean(axis=1).argmin()", "[:, judging].argmin(axis=0)"),
            ("[:, choosing].mean(axis=1).argmin()", "[:, choosing].argmin(axis=0)"),
        ],
        "Each rate is judged by its luckiest seed. Take the mean over the choosing seeds, then argmin.": (
            (".mean(axis=1).argmin", ".min(axis=1).argmin")
        ),
        "Both methods have the same rate, which suits one of them. Choose a rate for each method.": [
            ("method['lowest']", "(full['lowest'] + lora['lowest'])"),
            ("method['lowest']", "full['lowest']"),
        ],
        "The difference has the wrong sign. It is LoRA's rise minus that of full fine-tuning.": (
            ("rises[1] - rises[0]", "rises[0] - rises[1]")
        ),
        "These are lowest losses. They choose the rates; what is compared is the rise.": ("'rise'", "'lowest'"),
        "argmax takes the rate with the highest loss. The best rate has the lowest: argmin.": ("argmin", "argmax"),
        "Seeds are columns, and you picked rows with them. Write [:, choosing].": (CHOSEN_BY, "[choosing]"),
        "Average over the seeds, which is axis=1, so that one number is left for each rate; then argmin.": [
            (".mean(axis=1)", ".mean(axis=0)"),
            (".mean(axis=1)", ".mean()"),
            (".mean(axis=1)", ""),
        ],
        "All seeds choose, and all judge. Let some choose and the others judge.": (CHOSEN_BY, "", JUDGED, "[best]"),
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
            method[name][:, seeds] = rng.uniform(0, 1, (3, len(seeds)))
        results.append(fair(*changed, choosing, judging))
    return close(results[1:3], [results[0]] * 2) and not close(results[3], results[0])


@fair.must()
def has_a_rate_for_each_method(fair, rng):
    """Each method has the one rate whose mean lowest loss over the choosing seeds is best, for all judging seeds."""
    (*methods, choosing, judging), means = swept(rng), []
    for method in methods:
        losses = [sum(method["lowest"][rate, seed] for seed in choosing) for rate in range(3)]
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
