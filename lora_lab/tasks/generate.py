"""The answers of a model: to one prompt, or to the prompts of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lab.models.reading import Reader, reader_of, stream
from lora_lab.task import IGNORE
from lora_lab.tasks.instruction import ChatTokenizer, Pair, PairTask, encode, stop_token


def reply(
    model: nn.Module,
    tokenizer: ChatTokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 80,
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> str:
    """The model's answer to one prompt, which is put into the model's chat template.

    Args:
        model: our Llama or a causal language model of transformers, with or without adapters.
        tokenizer: of the model.
        prompt: what the user writes.
        max_new_tokens: where the answer is cut if the model does not end it before.
        temperature, repetition_penalty, seed: as for :meth:`lora_lab.Llama.generate`.

    Returns:
        The answer, without the token that ends a turn and without white space around it.

    Raises:
        ValueError: the model is not a causal language model, its tokenizer has no chat template, or as for
            :meth:`lora_lab.Llama.generate`.
    """
    options = {"temperature": temperature, "seed": seed, "repetition_penalty": repetition_penalty}
    reader_of(model)  # refuses a model that cannot answer, before the template is asked
    text = tokenizer.chat([{"role": "user", "content": prompt}])
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.long, device=next(model.parameters()).device)  # (length,)
    return tokenizer.decode(list(stream(model, ids, max_new_tokens, stop_token(tokenizer), **options))).strip()


@torch.no_grad()
def answers(
    model: nn.Module,
    task: PairTask,
    part: str = "test",
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
) -> list[str]:
    """The model's answers to the prompts of a part, decoded greedily, many prompts at once.

    For a classification, the answer is the most likely of the task's classes.

    Args:
        model: as for :func:`reply`.
        task: gives the prompts.
        part: "train", "validation" or "test".
        limit: how many prompts to answer, from the first; None answers all.
        max_new_tokens: where an answer is cut; by default a quarter longer than the longest answer in training.
        batch_size: prompts at once.

    Returns:
        One text per prompt, without the token that ends a turn.

    Raises:
        ValueError: the model is not a causal language model.
    """
    pairs = list(task.pairs[part][:limit])
    if task.metric == "classification":
        return choices(model, task, pairs, classes(task), batch_size)
    if max_new_tokens is None:
        longest = int((task.train.targets != IGNORE).sum(1).max())
        max_new_tokens = longest + longest // 4
    prompts = [task.prompt_ids(pair) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]))  # similar lengths, little padding
    texts = [""] * len(pairs)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, ids in zip(batch, _continued(model, [prompts[i] for i in batch], max_new_tokens, task), strict=True):
            texts[i] = task.tokenizer.decode(ids).strip()
    return texts


def _read(model: nn.Module, prompts: Sequence[list[int]], stop: int | None) -> tuple[Tensor, Reader]:
    """Run the model on a batch of prompts: the logits after each of them, (batch, vocabulary), and what has read them.

    Prompts are padded on the left, so that all end in the same column.
    """
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.tensor([[stop or 0] * (longest - len(prompt)) + prompt for prompt in prompts])  # (16, length)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # (16, length)
    reader = reader_of(model, mask.to(device))
    return reader.read(ids.to(device)), reader


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the model's previous mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _continued(model: nn.Module, prompts: Sequence[list[int]], max_new_tokens: int, task: PairTask) -> list[list[int]]:
    """The most likely next tokens after each prompt, up to the end of the turn."""
    stop = stop_token(task.tokenizer)
    tokens: list[Tensor] = []
    with _evaluating(model):
        scores, reader = _read(model, prompts, stop)  # (16, vocabulary)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=scores.device)  # (16,)
        while True:
            token = scores.argmax(-1)  # (16,)
            done |= token == stop
            if bool(done.all()):
                break
            tokens.append(token.where(~done, -1))
            if len(tokens) == max_new_tokens:
                break
            scores = reader.read(token[:, None])  # (16, vocabulary)
    rows = torch.stack(tokens, 1).tolist() if tokens else [[]] * len(prompts)
    return [[token for token in row if token >= 0] for row in rows]


def classes(task: PairTask) -> list[str]:
    """The classes of a classification: the distinct training answers, in alphabetical order."""
    return sorted({pair.answer for pair in task.pairs["train"]})


@torch.no_grad()
def choices(
    model: nn.Module, task: PairTask, pairs: Sequence[Pair], labels: Sequence[str], batch_size: int
) -> list[str]:
    """The most likely label for each prompt, by the joint probability of its tokens; each prompt is read only once."""
    tokens = {}
    for label in labels:
        _, targets = encode(task.tokenizer, Pair(pairs[0].prompt, label))
        tokens[label] = [token for token in targets if token != IGNORE]
    prompts = [task.prompt_ids(pair) for pair in pairs]
    best: list[int] = []  # index into labels
    with _evaluating(model):
        for start in range(0, len(prompts), batch_size):
            first, reader = _read(model, prompts[start : start + batch_size], task.tokenizer.eos_id)
            scores = [_log_likelihood(reader, tokens[label], first) for label in labels]  # (16,) each
            best += torch.stack(scores, 1).argmax(1).tolist()  # (16,)
    return [labels[i] for i in best]


def _log_likelihood(reader: Reader, answer: list[int], first: Tensor) -> Tensor:
    """The log-likelihood of one answer after each prompt, in nats: (batch,).

    Args:
        reader: has read the prompts, and is left as it is.
        answer: the tokens, at least one.
        first: the logits after the prompts, (batch, vocabulary).
    """
    logits = first[:, None]  # (16, 1, vocabulary)
    if len(answer) > 1:
        inputs = torch.tensor(answer[:-1], device=first.device).expand(len(first), -1)  # (16, n - 1)
        logits = torch.cat([logits, reader.branch().read_each(inputs)], 1)  # (16, n, vocabulary)
    log_probabilities = logits.float().log_softmax(-1)  # (16, n, vocabulary)
    return log_probabilities[:, range(len(answer)), answer].sum(1)  # (16,)
