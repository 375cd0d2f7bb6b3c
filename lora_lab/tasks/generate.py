"""What a model answers to the prompts of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lab.models.llama import KeyValueCache, Llama
from lora_lab.task import IGNORE
from lora_lab.tasks.instruction import Pair, PairTask, encode


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
