"""Exercises of lesson 07: overfitting."""

from __future__ import annotations

import numpy as np

from lora_lab.course.exercise import exercises_of

exercise = exercises_of("07_overfitting")

# The lesson's own sweep, 64 examples, mean of three seeds: the lowest validation loss, and the rise after it.
SWEPT_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)  # one step higher than there: messages print three decimals
LOWEST = {"full": (0.74, 0.69, 0.69, 0.83, 0.80), "lora": (1.10, 0.76, 0.77, 0.82, 0.97)}
RISE = {"full": (0.01, 0.02, 0.12, 0.52, 2.70), "lora": (0.01, 0.02, 0.13, 0.33, 0.97)}


def training_run(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def _read(steps, training, validation, place=None, rise=None, gap=None):
    """The solution's result, or with another place, rise or gap."""
    place = validation.argmin() if place is None else place
    rise = validation[-1] - validation.min() if rise is None else rise
    return steps[place], rise, validation[-1] - training[-1] if gap is None else gap


def _at_the_first_rise(steps, training, validation):
    place = int(np.argmax(np.diff(validation) > 0))
    return _read(steps, training, validation, place, validation[-1] - validation[place])


@exercise(
    "read_curve",
    inputs=training_run,
    mistakes={
        "You stopped where the training loss is lowest. Early stopping looks at unseen data.": (
            lambda steps, training, validation: _read(steps, training, validation, training.argmin()),
            lambda steps, training, validation: _read(
                steps, training, validation, training.argmin(), validation[-1] - validation[training.argmin()]
            ),
        ),
        "You stopped at the last step. That is where training ended, not where the model was best.": (
            lambda steps, training, validation: _read(steps, training, validation, -1),
            lambda steps, training, validation: _read(steps, training, validation, -1, 0.0),
        ),
        "The stop is a position in the array. Return the training step that stands there.": (
            lambda steps, training, validation: (
                validation.argmin(),
                validation[-1] - validation.min(),
                validation[-1] - training[-1],
            )
        ),
        "The gap has the wrong sign. It is the validation loss minus the training loss.": (
            lambda steps, training, validation: _read(steps, training, validation, gap=training[-1] - validation[-1])
        ),
        "The rise is counted from the start. Overfitting counts from the lowest validation loss.": (
            lambda steps, training, validation: _read(steps, training, validation, rise=validation[-1] - validation[0])
        ),
        "The rise is counted to the highest loss after the lowest. It is asked for at the last step.": (
            lambda steps, training, validation: _read(
                steps, training, validation, rise=validation[validation.argmin() :].max() - validation.min()
            )
        ),
        "You stopped where the validation loss first rises. It falls again later: take its lowest value.": (
            _at_the_first_rise
        ),
        "The rise has the wrong sign. It is the last validation loss minus the lowest.": (
            lambda steps, training, validation: _read(
                steps, training, validation, rise=validation.min() - validation[-1]
            )
        ),
        "The gap is read at the lowest validation loss. It is asked for at the last step.": (
            lambda steps, training, validation: _read(
                steps, training, validation, gap=validation.min() - training[validation.argmin()]
            )
        ),
    },
    hints=[
        "Three numbers are asked for: a step, and two differences of losses.",
        "validation.argmin() is the position of the lowest validation loss; steps[...] is the step there.",
        "The rise is validation[-1] - validation.min(), and the gap validation[-1] - training[-1].",
    ],
    minutes=6,
    difficulty=1,
    praise="Three numbers now stand for a whole run, so runs can be compared.",
)
def read_curve(steps, training, validation):
    """The result is the step where early stopping stops, the rise after it, and the gap at the last step."""
    stop = steps[validation.argmin()]
    return stop, validation[-1] - validation.min(), validation[-1] - training[-1]


def _around(rng: np.random.Generator, means: np.ndarray, seeds: int, scatter: float) -> np.ndarray:
    """Measurements (rates, seeds) that scatter around their means by a factor, also for all seeds of a rate alike."""
    return means[:, None] * rng.lognormal(0, 0.4, (len(means), 1)) * rng.lognormal(0, scatter, (len(means), seeds))


def rises_by_rate(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rates in no order, and the rises of two methods (rates, seeds), which scatter widely."""
    order = rng.permutation(len(SWEPT_RATES))
    full, lora = (_around(rng, np.array(RISE[method])[order], 3, 0.9) for method in ("full", "lora"))
    return np.array(SWEPT_RATES)[order], full, lora


def _pairs(rates, full, lora):
    return (rates[full.argmax()], rates[lora.argmin()]), (rates[full.argmin()], rates[lora.argmax()])


def _one_rate_for_both(rates, full, lora):
    difference = lora.mean(axis=1) - full.mean(axis=1)
    less, more = rates[difference.argmin()], rates[difference.argmax()]
    return (less, less), (more, more)


def _lora_first(rates, full, lora):
    return tuple(pair[::-1] for pair in _pairs(rates, full.mean(axis=1), lora.mean(axis=1)))


@exercise(
    "rig",
    inputs=rises_by_rate,
    mistakes={
        "Both methods have the same rate. Nobody stops you: pick the two rates separately.": _one_rate_for_both,
        "The headlines are swapped. LoRA overfits less where its rise is small and that of full is large.": (
            lambda rates, full, lora: _pairs(rates, full.mean(axis=1), lora.mean(axis=1))[::-1]
        ),
        "The pairs are the wrong way round. The rate of full fine-tuning comes first, then LoRA's.": _lora_first,
        "One seed picked the rates. Take the mean over seeds, the second axis, first.": (
            lambda rates, full, lora: _pairs(rates, full[:, 0], lora[:, 0]),
            lambda rates, full, lora: _pairs(rates, full[:, -1], lora[:, -1]),
        ),
        "These are positions, but rates are asked for. Look the rates up: rates[position].": (
            lambda rates, full, lora: _pairs(np.arange(len(rates)), full.mean(axis=1), lora.mean(axis=1))
        ),
        "The largest rate does not always have the largest rise. Look at the rises, not at the rates.": (
            lambda rates, full, lora: ((rates.max(), rates.min()), (rates.min(), rates.max()))
        ),
        "Only LoRA's rate was rigged. Picking that of full fine-tuning takes you further.": (
            lambda rates, full, lora: (
                (rates[full.mean(axis=1).argmin()], rates[lora.mean(axis=1).argmin()]),
                (rates[full.mean(axis=1).argmin()], rates[lora.mean(axis=1).argmax()]),
            )
        ),
    },
    hints=[
        "full.mean(axis=1) is the mean rise of full fine-tuning at each rate.",
        "For 'less' you want LoRA's smallest mean rise beside the largest of full fine-tuning; for 'more' the reverse.",
        "less = (rates[full.mean(axis=1).argmax()], rates[lora.mean(axis=1).argmin()]), and more the other two.",
    ],
    minutes=5,
    difficulty=1,
    praise="One table, two opposite headlines, and no number was invented.",
    draws=28,
)
def rig(rates, full, lora):
    """Of all pairs of rates, the first makes LoRA's mean rise smallest beside that of full, the second largest."""
    full, lora = full.mean(axis=1), lora.mean(axis=1)
    less = rates[full.argmax()], rates[lora.argmin()]
    more = rates[full.argmin()], rates[lora.argmax()]
    return less, more


def swept(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[int], list[int]]:
    """For two methods the lowest loss and the rise (rates, seeds); the seeds that choose and those that judge."""
    order, seeds = rng.permutation(len(SWEPT_RATES)), 8
    tables = []
    for method in ("full", "lora"):
        lowest = np.array(LOWEST[method])[order][:, None] + rng.normal(0, 0.06, (len(order), seeds))
        tables.append({"lowest": lowest, "rise": _around(rng, np.array(RISE[method])[order], seeds, 0.25)})
    shuffled = rng.permutation(seeds).tolist()
    return tables[0], tables[1], sorted(shuffled[:3]), sorted(shuffled[3:])


def _fair(full, lora, choosing, judging, by="lowest"):
    chosen = [method[by][:, choosing].mean(axis=1).argmin() for method in (full, lora)]
    rises = [method["rise"][rate, judging].mean() for method, rate in zip((full, lora), chosen, strict=True)]
    return rises[1] - rises[0]


def _best_rate_for_each_seed(full, lora, choosing, judging):
    rises = [method["rise"][method["lowest"][:, judging].argmin(axis=0), judging].mean() for method in (full, lora)]
    return rises[1] - rises[0]


def _one_common_rate(full, lora, choosing, judging):
    means = [method["lowest"][:, choosing].mean(axis=1) for method in (full, lora)]
    rate = (means[0] + means[1]).argmin()
    return lora["rise"][rate, judging].mean() - full["rise"][rate, judging].mean()


def _rate_of_full_for_both(full, lora, choosing, judging):
    rate = full["lowest"][:, choosing].mean(axis=1).argmin()
    return lora["rise"][rate, judging].mean() - full["rise"][rate, judging].mean()


def _lowest_compared(full, lora, choosing, judging):
    chosen = [method["lowest"][:, choosing].mean(axis=1).argmin() for method in (full, lora)]
    lowest = [method["lowest"][rate, judging].mean() for method, rate in zip((full, lora), chosen, strict=True)]
    return lowest[1] - lowest[0]


@exercise(
    "fair",
    inputs=swept,
    mistakes={
        "You chose the rates by the rise, which is what you judge. Choose by the lowest validation loss.": (
            lambda full, lora, choosing, judging: _fair(full, lora, choosing, judging, by="rise")
        ),
        "The seeds that chose the rates also judge. Take the rises of the judging seeds.": (
            lambda full, lora, choosing, judging: _fair(full, lora, choosing, choosing)
        ),
        "The seeds that judge took part in the choice. Choose on the choosing seeds alone.": (
            lambda full, lora, choosing, judging: _fair(full, lora, judging, judging),
            lambda full, lora, choosing, judging: _fair(full, lora, [*choosing, *judging], judging),
        ),
        "The rises of all seeds are averaged. Those that chose the rates take no part in judging them.": (
            lambda full, lora, choosing, judging: _fair(full, lora, choosing, [*choosing, *judging])
        ),
        "Each seed has its own best rate, which is cherry-picking. One rate for all seeds of a method.": (
            _best_rate_for_each_seed
        ),
        "Both methods have the same rate, which suits one of them. Choose a rate for each method.": (
            _one_common_rate,
            _rate_of_full_for_both,
        ),
        "The difference has the wrong sign. It is LoRA's rise minus that of full fine-tuning.": (
            lambda full, lora, choosing, judging: -_fair(full, lora, choosing, judging)
        ),
        "These are lowest losses. They choose the rates; what is compared is the rise.": _lowest_compared,
    },
    hints=[
        'full["lowest"][:, choosing].mean(axis=1) is the mean lowest loss at each rate, over the choosing seeds.',
        ".argmin() of that is the position of the best rate; do the same for LoRA.",
        'full["rise"][best, judging].mean() is what full fine-tuning did on seeds that did not choose.',
    ],
    minutes=10,
    difficulty=2,
    praise="What chose does not judge: this rule alone would retract many a headline.",
    draws=24,
)
def fair(full, lora, choosing, judging):
    """The result is LoRA's mean rise minus full's on the judging seeds, at the rates that the choosing seeds chose."""
    rises = []
    for method in (full, lora):
        best = method["lowest"][:, choosing].mean(axis=1).argmin()
        rises.append(method["rise"][best, judging].mean())
    return rises[1] - rises[0]
