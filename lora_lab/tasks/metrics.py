"""Scores of a model's answers, and baselines that need no model.

    predictions = answers(model, task)           # greedy decoding
    print(score(task, predictions))              # {"rouge_l": 0.31}, {"exact": 0.4, "chrf": 55.1}, ...
    print(score(task, trivial(task)))            # a baseline: majority class, first sentence, or dictionary

The task's ``metric`` decides which scores these are: "summary" (ROUGE-L, Lin 2004), "translation" (exact matches, and
chrF, Popovic 2015), "classification" (accuracy and macro F1), "style" (see :class:`StyleJudge`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, mode

from lora_lab.tasks.instruction import Pair, PairTask

# Scores


def score(task: PairTask, predictions: Sequence[str], part: str = "test") -> dict[str, float]:
    """Score predictions by the task's metric.

    Args:
        task: its answers are the references.
        predictions: for the first ``len(predictions)`` prompts of the part.
        part: of the task.

    Raises:
        ValueError: the task has no metric or no such part, or there are no predictions, or more than prompts.
    """
    if task.metric not in METRICS:
        raise ValueError(f"metric is {task.metric!r}, but answers are scored by one of {', '.join(METRICS)}.")
    pairs = task.pairs_of(part)
    if isinstance(predictions, str) or not 1 <= len(predictions) <= len(pairs):
        raise ValueError(f"predictions has length {len(predictions)}, but must be a list of 1 to {len(pairs)} texts.")
    return METRICS[task.metric](predictions, [pair.answer for pair in pairs[: len(predictions)]])


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the mean F1 of the longest common subsequence of words (Lin 2004), by the package rouge-score.

    Raises:
        ValueError: as for :func:`translation`.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, predictions, strict=True)
    f1 = [scorer.score(reference, prediction)["rougeL"].fmeasure for reference, prediction in pairs]
    return {"rouge_l": fmean(f1)}


def translation(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return exact matches, ignoring case, and chrF from 0 to 100 (Popovic 2015), by the package sacrebleu.

    Raises:
        ValueError: there are no texts, or not as many predictions as references.
    """
    from sacrebleu.metrics.chrf import CHRF

    pairs = zip(predictions, references, strict=True)
    exact = fmean(prediction.strip().casefold() == reference.casefold() for prediction, reference in pairs)
    return {"exact": exact, "chrf": CHRF().corpus_score(predictions, [references]).score}


def classification(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return accuracy, and F1 averaged over the classes of the references, by scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score

    options = {"labels": sorted(set(references)), "average": "macro", "zero_division": 0}
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "macro_f1": float(f1_score(references, predictions, **options)),
    }


METRICS = {"summary": rouge_l, "translation": translation, "classification": classification}


# Baselines without a model


def trivial(task: PairTask, part: str = "test") -> list[str]:
    """Return the answers of a baseline without a model: majority class, the text's first sentence, or a dictionary.

    The dictionary translates word by word, as in the training pairs; words that it lacks stay as they are.

    Raises:
        ValueError: the task's metric has no such baseline, or it has no such part.
    """
    pairs = task.pairs_of(part)
    if task.metric == "classification":
        majority_class = mode(pair.answer for pair in task.pairs["train"])
        return [majority_class] * len(pairs)
    if task.metric == "summary":
        return [re.split(r"(?<=[.!?])\s", text_of(pair))[0] for pair in pairs]
    if task.metric == "translation":
        dictionary = _dictionary(task.pairs["train"])
        return [" ".join(dictionary.get(word.casefold(), word) for word in text_of(pair).split()) for pair in pairs]
    raise ValueError(
        f"Task {task.name!r} has the metric {task.metric!r}, but only {', '.join(METRICS)} have a baseline."
    )


def text_of(pair: Pair) -> str:
    """Return the text in a prompt, without the instruction before it."""
    for separator in ("\n\n", ": "):
        if separator in pair.prompt:
            return pair.prompt.partition(separator)[2]
    return pair.prompt


def _dictionary(pairs: Sequence[Pair]) -> dict[str, str]:
    """Return the most frequent translation of each word, from the pairs that have as many words in both languages."""
    translations = defaultdict(list)  # of each word, in every pair that has it
    for pair in pairs:
        source, target = text_of(pair).split(), pair.answer.split()
        if len(source) == len(target):
            for word, translated in zip(source, target, strict=True):
                translations[word.casefold()].append(translated)
    return {word: mode(found) for word, found in translations.items()}


class StyleJudge:
    """A small classifier that distinguishes a style from plain text: character n-grams and logistic regression.

    It is trained on the validation parts of the two tasks, on which no model was trained, and evaluated on their test
    parts.

    Args:
        styled, plain: tasks of the same stories with and without the style.

    Attributes:
        accuracy: on the test parts, from 0 to 1; chance is 0.5.
    """

    def __init__(self, styled: PairTask, plain: PairTask) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        def texts(part: str) -> tuple[list[str], list[int]]:
            plain_texts, styled_texts = ([pair.answer for pair in task.pairs[part]] for task in (plain, styled))
            return plain_texts + styled_texts, [0] * len(plain_texts) + [1] * len(styled_texts)

        features = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
        self.pipeline = make_pipeline(features, LogisticRegression(C=10.0, max_iter=1000))
        self.pipeline.fit(*texts("validation"))
        self.accuracy = float(self.pipeline.score(*texts("test")))

    def share(self, stories: Sequence[str]) -> float:
        """Return the share of stories that it classifies as in the style, from 0 to 1."""
        return float(self.pipeline.predict(list(stories)).mean())
