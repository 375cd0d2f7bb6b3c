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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lab.models.llama import KeyValueCache, Llama
from lora_lab.tasks.base import IGNORE
from lora_lab.tasks.pairs import Pair, PairTask, encode


@torch.no_grad()
def answers(
    model: Llama,
    task: PairTask,
    part: str = "test",
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
) -> list[str]:
    """What the model says to the prompts of a part: the likeliest token each time, many prompts at once.

    A classification is not written but chosen: the likeliest of the task's classes as an answer.

    Args:
        model: with or without adapters.
        task: whose prompts.
        part: "train", "validation" or "test".
        limit: only the first so many.
        max_new_tokens: where an answer is cut; default a quarter more than the longest in training.
        batch_size: prompts at once.

    Returns:
        The answers, without the token that ends a turn.

    Raises:
        ValueError: the model is no Llama of ours.
    """
    pairs = list(task.pairs[part][:limit])
    if task.metric == "classification":
        return choices(model, task, pairs, classes(task), batch_size)
    if max_new_tokens is None:
        longest = int((task.train.targets != IGNORE).sum(1).max())
        max_new_tokens = longest + longest // 4
    prompts = [task.prompt_ids(pair) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]))  # prompts of like length pad each other little
    said = [""] * len(pairs)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, ids in zip(batch, _continued(model, [prompts[i] for i in batch], max_new_tokens, task), strict=True):
            said[i] = task.tokenizer.decode(ids).strip()
    return said


def _read(model: Llama, prompts: Sequence[list[int]], stop: int | None) -> tuple[Tensor, Tensor, KeyValueCache]:
    """Read prompts side by side: the hidden state after each, which tokens are real, and what the model remembers."""
    if not isinstance(model, Llama):
        raise ValueError(
            f"Answers are those of lora_lab's Llama, but the model is a {type(model).__name__}; load its folder with "
            "load_pretrained, or let it write by its own generate and give the texts to score."
        )
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    # Padded on the left, so that all prompts end at the same place; turns of an angle there do not matter, for rotary
    # positions count differences only.
    rows = [[stop or 0] * (longest - len(ids)) + ids for ids in prompts]
    real = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    seen, cache = torch.tensor(real, device=device), KeyValueCache()  # (16, length)
    hidden = model.model(torch.tensor(rows, device=device), seen, cache)[:, -1]  # (16, 576)
    return hidden, seen, cache


@contextmanager
def _evaluating(model: Llama) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _continued(model: Llama, prompts: Sequence[list[int]], max_new_tokens: int, task: PairTask) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to the end of the turn."""
    stop = task.tokenizer.eos_id
    written: list[Tensor] = []
    with _evaluating(model):
        hidden, seen, cache = _read(model, prompts, stop)  # (16, 576), (16, length)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=hidden.device)  # (16,)
        while True:
            token = model.lm_head(hidden).argmax(-1)  # (16,)
            done |= token == stop
            if bool(done.all()):
                break
            written.append(token.where(~done, -1))
            if len(written) == max_new_tokens:
                break
            seen = F.pad(seen, (0, 1), value=1)  # (16, length + 1)
            hidden = model.model(token[:, None], seen, cache)[:, -1]  # (16, 576)
    columns = torch.stack(written, 1).tolist() if written else [[]] * len(prompts)
    return [[token for token in row if token >= 0] for row in columns]


def classes(task: PairTask) -> list[str]:
    """The answers of a classification, in alphabetical order."""
    return sorted({pair.answer for pair in task.pairs["train"]})


@torch.no_grad()
def choices(model: Llama, task: PairTask, pairs: Sequence[Pair], labels: Sequence[str], batch_size: int) -> list[str]:
    """For each prompt the label that the model holds likeliest, all of its tokens together; prompts are read once."""
    tokens = {}
    for label in labels:
        _, targets = encode(task.tokenizer, Pair(pairs[0].prompt, label))
        tokens[label] = [token for token in targets if token != IGNORE]
    prompts, found = [task.prompt_ids(pair) for pair in pairs], []
    with _evaluating(model):
        for start in range(0, len(prompts), batch_size):
            hidden, seen, cache = _read(model, prompts[start : start + batch_size], task.tokenizer.eos_id)
            scores = [_log_likelihood(model, tokens[label], hidden, seen, cache) for label in labels]  # (16,) each
            found += torch.stack(scores, 1).argmax(1).tolist()  # (16,)
    return [labels[i] for i in found]


def _log_likelihood(model: Llama, answer: list[int], hidden: Tensor, seen: Tensor, cache: KeyValueCache) -> Tensor:
    """Of one answer after each prompt, in nats; the cache is left as it is."""
    states = hidden[:, None]  # (16, 1, 576)
    if len(answer) > 1:
        own = KeyValueCache()
        own.layers = dict(cache.layers)
        inputs = torch.tensor(answer[:-1], device=hidden.device).expand(len(hidden), -1)  # (16, n - 1)
        later = model.model(inputs, F.pad(seen, (0, len(answer) - 1), value=1), own)  # (16, n - 1, 576)
        states = torch.cat([states, later], 1)  # (16, n, 576)
    found = model.lm_head(states).float().log_softmax(-1)  # (16, n, vocabulary)
    return found[:, range(len(answer)), answer].sum(1)  # (16,)


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
