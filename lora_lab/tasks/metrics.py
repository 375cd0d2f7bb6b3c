"""What a person understands of a task of questions and answers: what the model answers, and how good that is.

    said = answers(model, task)                  # the likeliest tokens, one after another
    print(score(task, said))                     # {"rouge_l": 0.31}, {"exact": 0.4, "chrf": 55.1}, ...
    print(score(task, trivial(task)))            # the same without a model: majority, first sentence, dictionary

Which numbers there are is the task's ``metric``: "summary" (ROUGE-L, Lin 2004), "translation" (exact matches, and chrF,
Popovic 2015), "classification" (accuracy, and the mean of the classes' F1), "style" (see :class:`StyleJudge`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from lora_lab.tasks.instruction import Pair, PairTask

# Judging


def score(task: PairTask, said: Sequence[str], part: str = "test") -> dict[str, float]:
    """How good answers are, by the task's metric.

    Args:
        task: whose answers are the wanted ones.
        said: answers to the first ``len(said)`` prompts of the part.
        part: of the task.

    Raises:
        ValueError: the task has no metric, or there are no answers, or more than prompts.
    """
    if task.metric not in METRICS:
        raise ValueError(f"Task {task.name!r} has the metric {task.metric!r}; scores are for {', '.join(METRICS)}.")
    if not 1 <= len(said) <= len(task.pairs[part]):
        raise ValueError(f"There are {len(said)} answers to the {len(task.pairs[part])} prompts of {part}.")
    return METRICS[task.metric](said, [pair.answer for pair in task.pairs[part][: len(said)]])


def rouge_l(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Mean F1 of the longest common subsequence of words (Lin 2004), by the package rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    judge = RougeScorer(["rougeL"], use_stemmer=False)
    found = [judge.score(right, own)["rougeL"].fmeasure for own, right in zip(said, wanted, strict=True)]
    return {"rouge_l": sum(found) / len(found)}


def translation(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Exact matches, capitals aside, and chrF from 0 to 100 (Popovic 2015), by the package sacrebleu."""
    from sacrebleu.metrics import CHRF

    same = sum(own.strip().casefold() == right.casefold() for own, right in zip(said, wanted, strict=True))
    return {"exact": same / len(wanted), "chrf": CHRF().corpus_score(list(said), [list(wanted)]).score}


def classification(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Accuracy, and the mean over the classes of F1; by scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score

    labels = sorted(set(wanted))
    return {
        "accuracy": float(accuracy_score(wanted, said)),
        "macro_f1": float(f1_score(wanted, said, labels=labels, average="macro", zero_division=0)),
    }


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {
    "summary": rouge_l,
    "translation": translation,
    "classification": classification,
}


# Without a model


def trivial(task: PairTask, part: str = "test") -> list[str]:
    """Answers that take no language model: the commonest class, the text's first sentence, a dictionary.

    The dictionary knows what the training pairs say word for word, and whole names first; what it does not know it
    leaves as it is.

    Raises:
        ValueError: the task's metric has no such baseline.
    """
    pairs = task.pairs[part]
    if task.metric == "classification":
        commonest = Counter(pair.answer for pair in task.pairs["train"]).most_common(1)[0][0]
        return [commonest] * len(pairs)
    if task.metric == "summary":
        return [re.split(r"(?<=[.!?])\s", _asked_about(pair))[0] for pair in pairs]
    if task.metric == "translation":
        known = _dictionary(task.pairs["train"])
        return [" ".join(known.get(w.casefold(), w) for w in _asked_about(pair).split()) for pair in pairs]
    raise ValueError(f"Task {task.name!r} has the metric {task.metric!r}, which has no trivial baseline.")


def _asked_about(pair: Pair) -> str:
    """The text that a prompt is about: what follows its instruction."""
    for mark in ("\n\n", ": "):
        if mark in pair.prompt:
            return pair.prompt.partition(mark)[2]
    return pair.prompt


def _dictionary(pairs: Sequence[Pair]) -> dict[str, str]:
    """Word by word where a training pair has as many words on both sides, the commonest translation of each."""
    seen: dict[str, Counter] = {}
    for pair in pairs:
        here, there = _asked_about(pair).split(), pair.answer.split()
        if len(here) == len(there):
            for one, other in zip(here, there, strict=True):
                seen.setdefault(one.casefold(), Counter())[other] += 1
    return {word: counts.most_common(1)[0][0] for word, counts in seen.items()}


class StyleJudge:
    """A small classifier that tells a style from plain text: n-grams of characters, logistic regression.

    It learns from the validation parts of the two tasks, which no model was trained on, and is itself judged on their
    test parts.

    Args:
        styled, plain: tasks of the same stories in the style and without it.

    Attributes:
        accuracy: on the test parts, from 0 to 1; chance is 0.5.
    """

    def __init__(self, styled: PairTask, plain: PairTask) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        def texts(part: str) -> tuple[list[str], list[int]]:
            both = [[pair.answer for pair in task.pairs[part]] for task in (plain, styled)]
            return [*both[0], *both[1]], [0] * len(both[0]) + [1] * len(both[1])

        features = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
        self.pipeline = make_pipeline(features, LogisticRegression(C=10.0, max_iter=1000))
        self.pipeline.fit(*texts("validation"))
        self.accuracy = float(self.pipeline.score(*texts("test")))

    def share(self, stories: Sequence[str]) -> float:
        """Which share of stories it takes for the style."""
        return float(self.pipeline.predict(list(stories)).mean())
