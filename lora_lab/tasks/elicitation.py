"""What a model can do untrained, if it is asked well: baselines for the question "was it taught, or elicited?".

    task = few_shot(sentiment(tokenizer), k=8)                      # training examples in the prompt
    scores = log_likelihoods(model, task, pairs, labels)            # (n, labels)
    calibrate(scores, log_likelihoods(model, task, content_free(task), labels))
    probe = linear_probe(last_states(model, task, pairs), answers, ...)

None of them changes a weight of the model, and none reads the test part. What fine-tuning scores above the best of them
is what they cannot get out of the model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from lora_lab.tasks.instruction import Pair, PairTask
from lora_lab.tasks.metrics import text_of

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

CONTENT_FREE = ("N/A", "[MASK]", "")  # those of Zhao et al. 2021
# Inverse strengths of a probe's penalty, to choose from.
PENALTIES = tuple(10.0**power for power in range(-5, 3))


def few_shot(task: PairTask, k: int, seed: int = 0, *, random_answers: bool = False) -> PairTask:
    """Return the task with training examples before each prompt of validation and test, as turns of the conversation.

    Only what :mod:`lora_lab.tasks.generate` reads changes: losses are still those of the prompts alone.

    Args:
        task: none of its pairs has turns of its own before the prompt.
        k: how many examples; the same ones, in the same order, before each prompt.
        seed: of their drawing from the training part, at random.
        random_answers: a control: each example has the answer of another training example, drawn at random, so that the
            examples show prompts, answers and form, but not which answer belongs to which prompt.

    Raises:
        ValueError: the training part has too few examples, or a pair has turns before its prompt.

    References: Brown et al. 2020, "Language Models are Few-Shot Learners", section 2; for the control Min et al. 2022,
    "Rethinking the Role of Demonstrations", section 4.
    """
    if any(pair.before for pairs in task.pairs.values() for pair in pairs):
        raise ValueError(f"Task {task.name!r} has turns before its prompts, where examples would go; give one without.")
    examples = task.limited(k, seed).pairs["train"]
    others = task.limited(2 * k, seed).pairs["train"][k:] if random_answers else examples
    turns = []
    for example, other in zip(examples, others, strict=True):
        turns += [("user", example.prompt), ("assistant", other.answer)]
    before = tuple(turns)
    prompted = {part: [replace(pair, before=before) for pair in task.pairs[part]] for part in ("validation", "test")}
    return replace(task, pairs={**task.pairs, **prompted})


def content_free(task: PairTask) -> list[Pair]:
    """Return the task's prompt around each of :data:`CONTENT_FREE`, in which no label is more likely."""
    pair = task.pairs["validation"][0]
    instruction = pair.prompt.removesuffix(text_of(pair))
    return [replace(pair, prompt=instruction + text) for text in CONTENT_FREE]


def calibrate(scores: Tensor, reference: Tensor) -> Tensor:
    """Return scores of labels, less what each scores whatever the text says: the logarithm of its mean probability.

    With prompts without content as the reference this is contextual calibration (Zhao et al. 2021, "Calibrate Before
    Use", section 5). It needs no text; with ordinary texts, without their labels, as the reference it is batch
    calibration (Zhou et al. 2024, arXiv 2309.17249).

    Args:
        scores: log-likelihoods of the labels, (n, labels), as of :func:`lora_lab.tasks.generate.log_likelihoods`.
        reference: the same for prompts after which each label should be as likely as any other, (m, labels).

    Returns:
        (n, labels).
    """
    return scores - reference.softmax(1).mean(0).log()  # (n, labels)


def linear_probe(
    states: Tensor, labels: Sequence[str], validation_states: Tensor, validation_labels: Sequence[str]
) -> Pipeline:
    """Return a linear classifier of hidden states: standardised, then scikit-learn's logistic regression.

    Its penalty is the one of :data:`PENALTIES` with the lowest loss on the validation examples.

    Args:
        states: of training examples, (n, width), as of :func:`lora_lab.tasks.generate.last_states`.
        labels: of the training examples.
        validation_states: (m, width).
        validation_labels: of the validation examples, each of which occurs in training.

    Reference: Alain and Bengio 2017, "Understanding intermediate layers using linear classifier probes", section 3.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def loss(probe: Pipeline) -> float:
        probabilities = probe.predict_proba(validation_states.numpy())  # (m, labels)
        return float(log_loss(validation_labels, probabilities, labels=probe.classes_))

    probes = [make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000)) for C in PENALTIES]
    return min((probe.fit(states.numpy(), list(labels)) for probe in probes), key=loss)
