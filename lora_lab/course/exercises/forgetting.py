"""Exercises of lesson 08: forgetting."""

import numpy as np
import torch
from torch.nn import functional as F

from lora_lab.ablation import overfitting as learning  # noqa: F401
from lora_lab.course.exercise import Exercise, Reflection, close, normal

# A temperature


def overconfident(rng):
    """Logits (pictures, classes) and labels to fit a temperature on, others to judge it on, and temperatures."""

    def part(count, confidence):
        labels = torch.from_numpy(rng.integers(0, 5, count))
        return confidence * (F.one_hot(labels, 5) + normal(rng, count, 5)), labels

    fitted, judged = part(30, rng.uniform(4, 6)), part(20, rng.uniform(9, 14))
    return *fitted, *judged, torch.from_numpy(rng.permutation([0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]))


FIT, RESULT = "F.cross_entropy(logits / T, labels)", "F.cross_entropy(judged / best, judged_labels)"

temperature = Exercise(
    "temperature",
    inputs=overconfident,
    wrong={
        "You multiply by T. A temperature above 1 must make the model less sure, so divide.": [
            ("judged / best", "judged * best"),
            ("judged / best", "judged * best", "logits / T", "logits * T"),
        ],
        "You divide probabilities. Divide the logits; cross_entropy does the rest.": [
            ("judged / best", "judged.softmax(1) / best"),
            ("judged / best", "judged.softmax(1) / best", "logits / T", "logits.softmax(1) / T"),
        ],
        "cross_entropy takes logits and applies the softmax itself. Here it is applied twice.": (
            ("logits / T", "(logits / T).softmax(1)", "judged / best", "(judged / best).softmax(1)")
        ),
        "You divide by the lowest loss. Divide by the temperature that has it: min(temperatures, key=...).": (
            f"best = min({FIT} for T in temperatures)\nreturn {RESULT}"
        ),
        "F.nll_loss takes log-probabilities, and these are logits. F.cross_entropy takes them as they are.": (
            ("F.cross_entropy", "F.nll_loss")
        ),
        "You chose T by accuracy, which is the same at every T. Choose the lowest loss.": (
            (FIT, "-((logits / T).argmax(1) == labels).sum()")
        ),
        "You fitted T on what judges it. Fit it on logits and labels, then judge on the others.": (
            (FIT, "F.cross_entropy(judged / T, judged_labels)")
        ),
        "This is the loss of the examples that T was fitted on. Judge it on the others.": (
            (RESULT, "F.cross_entropy(logits / best, labels)")
        ),
        "Nothing is scaled yet. Divide the judged logits by the temperature that you chose.": (
            ("judged / best", "judged")
        ),
        "This is the temperature itself. Return the loss of the judged logits after dividing by it.": (RESULT, "best"),
    },
    hints=[
        "F.cross_entropy(logits / T, labels) is the loss at a temperature T.",
        "min(temperatures, key=...) returns the temperature for which the function after key is smallest.",
        "Choose T with logits and labels; then return F.cross_entropy(judged / T, judged_labels).",
    ],
    praise="Dividing changes no answer. What is left cannot be mended by making all answers less sure by one factor.",
)


@temperature.must()
def divides_the_judged_logits(temperature, rng):
    """With a single temperature to choose from, the result is the loss of the judged logits divided by it."""
    *fitted, judged, judged_labels, temperatures = overconfident(rng)
    loss = temperature(*fitted, judged, judged_labels, temperatures[:1])
    return close(loss, F.cross_entropy(judged / temperatures[0], judged_labels))


@temperature.must()
def is_chosen_on_the_others(temperature, rng):
    """Of several temperatures it takes the one with the lowest loss on the other examples."""
    logits, labels, judged, judged_labels, temperatures = overconfident(rng)
    best = temperatures[int(np.argmin([F.cross_entropy(logits / T, labels) for T in temperatures]))]
    loss = temperature(logits, labels, judged, judged_labels, temperatures)
    return close(loss, F.cross_entropy(judged / best, judged_labels))


# What was forgotten at equal learning


def run_of(rng, *learned):
    """A run that has learned so much at each evaluation, and how much it has lost there."""
    lost = np.cumsum(np.r_[0, rng.uniform(0.1, 1, len(learned) - 1)])
    return {"validation": 9.0 - np.array(learned), "off_domain": rng.uniform(0.3, 0.7) + lost}, lost


def two_runs(rng):
    """For two methods the validation and the off-domain loss at each evaluation, from before training; and a share."""
    rising = [np.sort(rng.uniform(0.1, most, 9)) for most in rng.permutation([2.0, 3.0])]
    for learned in rising:  # each unlearns a little on its way
        learned[3:8] = learned[[7, 3, 6, 4, 5]]
    full, lora = (run_of(rng, 0, *learned, *learned[:-4:-1])[0] for learned in rising)  # and more at the end
    return full, lora, float(rng.choice([0.8, 0.9]))


BOTH = "(learning.interpolate_at(*first, amount), learning.interpolate_at(*second, amount))"
AT_PLACES = "tuple(lost[{}] for learned, lost in (first, second))"  # that is, at an evaluation of each run
FIRST = AT_PLACES.format("(learned >= amount).argmax()")

equal_learning = Exercise(
    "equal_learning",
    inputs=two_runs,
    wrong={
        "Each is read at its own best. The one that learned less has forgotten less, which proves nothing.": (
            (BOTH, AT_PLACES.format("learned.argmax()"))
        ),
        "Each is read at its last step. They have not learned the same amount there.": (BOTH, AT_PLACES.format("-1")),
        "Both are read at the same step. Equal steps are not equal learning.": [
            (BOTH, AT_PLACES.format("max((run >= amount).argmax() for run, _ in (first, second))")),
            (BOTH, AT_PLACES.format("(first[0] >= amount).argmax()")),
        ],
        "This is read at an evaluation, where more or less is learned. Follow the straight line to the amount.": [
            (BOTH, FIRST),
            (BOTH, AT_PLACES.format("(learned >= amount).argmax() - 1")),
            (BOTH, AT_PLACES.format("abs(learned - amount).argmin()")),
        ],
        "The amount is what a run has learned at the last step. Take what it has learned at its best.": (
            ("each.max()", "each[-1]")
        ),
        "Each has its own amount. Take a share of the smaller of the two amounts for both.": (
            (BOTH, "tuple(learning.interpolate_at(*run, share * run[0].max()) for run in (first, second))")
        ),
        "One of them never learned that much. Take the smaller of the two amounts.": [
            ("min(", "max("),
            ("min(", "max(", BOTH, FIRST),
            ("share * min(", "max(", BOTH, FIRST),
        ],
        "The whole amount is used. Multiply it by the share.": ("share * ", ""),
        "np.interp needs values that rise, and what is learned falls now and then. Use learning.interpolate_at.": [
            (BOTH, "tuple(np.interp(amount, *run) for run in (first, second))"),
            (
                BOTH,
                "tuple(np.interp(amount, run[: run.argmax() + 1], lost[: run.argmax() + 1]) "
                "for run, lost in (first, second))",
            ),
        ],
        "This is read after the minimum. Take the place at which the amount is first learned.": (
            (BOTH, AT_PLACES.format("np.flatnonzero(learned >= amount)[-1]"))
        ),
        "These are losses. Forgetting is how far the off-domain loss has risen since the start.": (
            (" - run['off_domain'][0]", "")
        ),
        "The two numbers are in the other order. Return that of full first.": ("first, second =", "second, first ="),
        "You divided by the loss before training. What is forgotten is a difference, in nats.": (
            (" - run['off_domain'][0]", " / run['off_domain'][0] - 1")
        ),
        "interpolate_at takes what is learned first, and then what is read there, the loss. Yours are exchanged.": (
            ("zip(learned, lost", "zip(lost, learned")
        ),
    },
    hints=[
        'What a run has learned at each evaluation is run["validation"][0] - run["validation"].',
        "The amount is share times the smaller of the two largest values of that, for both runs.",
        'What a run has lost at each evaluation is run["off_domain"] - run["off_domain"][0]; read it at the amount.',
    ],
    praise="Now a method that learns nothing can no longer win by forgetting nothing.",
)


@equal_learning.must()
def reads_at_equal_learning(equal_learning, rng):
    """The two numbers are the rise of the off-domain loss where each run has learned the amount, full first."""
    (slow, little), (fast, much) = run_of(rng, 0, 1, 2, 4), run_of(rng, 0, 2, 4, 8)
    half, whole = [little[2], much[1]], [little[3], much[2]]
    one_way = close(equal_learning(slow, fast, 0.5), half) and close(equal_learning(slow, fast, 1.0), whole)
    return one_way and close(equal_learning(fast, slow, 0.5), half[::-1])


@equal_learning.must()
def follows_the_line_between(equal_learning, rng):
    """Between two evaluations it follows the straight line."""
    (slow, little), (fast, much) = run_of(rng, 0, 1, 2, 3, 4), run_of(rng, 0, 2, 4, 6, 8)
    expected = [np.interp(3.4, [0, 1, 2, 3, 4], little), np.interp(3.4, [0, 2, 4, 6, 8], much)]
    return close(equal_learning(slow, fast, 0.85), expected)


@equal_learning.must()
def reads_where_it_was_first_learned(equal_learning, rng):
    """The amount is a share of what the weaker run learned at its best, and counts where it was first learned."""
    (turning, little), (lasting, much) = run_of(rng, 0, 2, 4, 3.6, 2), run_of(rng, 0, 3, 5, 7, 8)
    return close(equal_learning(turning, lasting, 0.75), [np.interp(3, [0, 2, 4], little[:3]), much[1]])


Reflection(
    "08_forgetting",
    question="*LoRA learns less and forgets less.* In five to eight sentences: how can both halves be true "
    "without one method being better than the other, at which point of two runs would you compare what "
    "was forgotten, and what would you measure to find out whether something was lost or only covered?",
    rubric=(
        "The answer says that forgetting goes along with learning, so that less of both can come from a lower rate.",
        "The runs are compared where they have learned equally much, or at equal validation loss.",
        "It says how the rates were chosen, or that the choice must not decide the result.",
        "It names a measurement that separates lost from covered, such as a temperature, or a few old examples.",
    ),
    expected="With a lower rate any method learns less and forgets less, so the two must be read where they have "
    "learned the same amount. A rate is chosen for each method by what it learns, and full fine-tuning "
    "compared with itself at rates that tie shows how much the choice alone makes. Old answers that come "
    "back after dividing the logits, or after a few old examples, were covered and not lost.",
)
