"""The answers of a model: to one prompt, or to the prompts of a task."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lab.models.llama import Llama, LlamaReader, reader_of
from lora_lab.models.reading import Reader, Sampling, check_context, stream
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.schema import Size, check
from lora_lab.task import IGNORE, context_length, restore_modes
from lora_lab.tasks.instruction import Pair, PairTask, encode, stop_token

BATCH = 16  # prompts that are read at once


def reply(model: nn.Module, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int = 80, **sampling: Any) -> str:
    """Return the model's answer to one prompt, which is put into the model's chat template.

    Args:
        model: our Llama or a causal language model of transformers, with or without adapters.
        tokenizer: of the model.
        prompt: what the user writes.
        max_new_tokens: where the answer is cut if the model does not end it before.
        **sampling: temperature, seed and repetition_penalty, as for :meth:`lora_lab.Llama.generate`.

    Returns:
        The answer, without the token that ends a turn and without white space around it.

    Raises:
        ValueError: the model is not a causal language model, its tokenizer has no chat template, or as for
            :meth:`lora_lab.Llama.generate`.
    """
    text = tokenizer.chat([{"role": "user", "content": prompt}])
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.long, device=next(model.parameters()).device)  # (length,)
    tokens = stream(reader_of(model), ids, max_new_tokens, stop_token(tokenizer), Sampling(**sampling))
    return tokenizer.decode(list(tokens)).strip()


@torch.no_grad()
def answers(
    model: nn.Module, task: PairTask, part: str = "test", *, limit: int | None = None, max_new_tokens: int | None = None
) -> list[str]:
    """Return the model's answers to the prompts of a part, decoded greedily, many prompts at once.

    For a classification, the answer is the most likely of the task's classes.

    Args:
        model: as for :func:`reply`.
        task: gives the prompts.
        part: "train", "validation" or "test".
        limit: how many prompts to answer, from the first; None answers all.
        max_new_tokens: where an answer is cut; by default a quarter longer than the longest answer in training, as far
            as the model's context allows.

    Returns:
        One text per prompt, without the token that ends a turn.

    Raises:
        ValueError: the model is not a causal language model, the task has no such part, a number is below 1, or
            prompts and ``max_new_tokens`` exceed the model's context.
    """
    check(limit, Size | None, "limit")
    check(max_new_tokens, Size | None, "max_new_tokens")
    pairs = task.pairs_of(part)[:limit]
    lengths = [len(task.prompt_ids(pair)) for pair in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)  # similar lengths, little padding
    ordered = [pairs[i] for i in order]
    if task.metric == "classification":
        labels = classes(task)
        best = log_likelihoods(model, task, ordered, labels).argmax(1)  # (n,)
        said = [labels[i] for i in best.tolist()]
    else:
        said = _continue(model, task, ordered, max_new_tokens)
    texts = dict(zip(order, said, strict=True))
    return [texts[i] for i in range(len(pairs))]


def _continue(model: nn.Module, task: PairTask, pairs: Sequence[Pair], max_new_tokens: int | None) -> list[str]:
    """Return the model's answers, word by word, to pairs in the order of their prompts' lengths."""
    if max_new_tokens is None:
        longest = int((task.train.targets != IGNORE).sum(1).max())
        room = (context_length(model) or sys.maxsize) - len(task.prompt_ids(pairs[-1]))
        max_new_tokens = max(1, min(longest + longest // 4, room))
    rows = []
    with restore_modes(model):
        model.eval()
        for scores, reader in _read_batches(model, task, pairs, max_new_tokens):
            rows += _greedy_continuations(scores, reader, max_new_tokens, stop_token(task.tokenizer))
    return [task.tokenizer.decode(ids).strip() for ids in rows]


def _read_batches(model: nn.Module, task: PairTask, pairs: Sequence[Pair], new: int) -> Iterator[tuple[Tensor, Reader]]:
    """Run the model on the prompts of pairs: for each batch the logits, (batch, vocabulary), and what has read them.

    Prompts are padded on the left, so that all end in the same column. What all begin with, such as an instruction or
    examples, our Llama reads once.

    Args:
        new: how many tokens may follow a prompt.

    Raises:
        ValueError: a prompt and these tokens exceed the model's context.
    """
    prompts = [task.prompt_ids(pair) for pair in pairs]
    check_context(model, max(map(len, prompts)), new)
    device, pad = next(model.parameters()).device, stop_token(task.tokenizer) or 0
    same = [len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False)]  # for each token of the shortest prompt
    begin = min([*same, False].index(False), len(same) - 1)  # at least a token of each prompt remains
    shared = LlamaReader(model) if isinstance(model, Llama) and begin > 0 else None
    if shared:
        shared.read(torch.tensor([prompts[0][:begin]], device=device))
        prompts = [prompt[begin:] for prompt in prompts]
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in batch])  # (16, length)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])  # (16, length)
        reader = shared.repeat(mask.to(device)) if shared else reader_of(model, mask.to(device))
        yield reader.read(ids.to(device))[:, 0], reader


def _greedy_continuations(scores: Tensor, reader: Reader, max_new_tokens: int, stop: int | None) -> list[list[int]]:
    """Return the most likely next tokens after each prompt, up to the end of the turn.

    Args:
        scores: the logits after the prompts, (batch, vocabulary).
        reader: has read the prompts.
        max_new_tokens, stop: as for :meth:`lora_lab.Llama.generate`.
    """
    stop = -1 if stop is None else stop  # which is no token
    token = scores.argmax(-1)  # (16,)
    done = token == stop  # (16,)
    tokens = [token.where(~done, -1)]  # of each step, -1 where the turn has ended
    while len(tokens) < max_new_tokens and not done.all():
        logits = reader.read(token[:, None])  # (16, 1, vocabulary)
        token = logits[:, 0].argmax(-1)  # (16,)
        done |= token == stop
        tokens.append(token.where(~done, -1))
    rows = torch.stack(tokens, 1).tolist()
    return [[token for token in row if token >= 0] for row in rows]


def classes(task: PairTask) -> list[str]:
    """Return the classes of a classification: the distinct training answers, in alphabetical order."""
    return sorted({pair.answer for pair in task.pairs["train"]})


@torch.no_grad()
def log_likelihoods(model: nn.Module, task: PairTask, pairs: Sequence[Pair], labels: Sequence[str]) -> Tensor:
    """Return the log-likelihood of each label as the answer to each prompt, which is read once, in nats: (n, labels).

    Raises:
        ValueError: as for :func:`answers`.
    """
    tokens = {}  # of each label, at least one
    for label in labels:
        _, targets = encode(task.tokenizer, Pair(pairs[0].prompt, label))
        tokens[label] = [token for token in targets if token != IGNORE]
    rows = []
    with restore_modes(model):
        model.eval()
        for first, reader in _read_batches(model, task, pairs, max(map(len, tokens.values()))):
            scores = [_log_likelihood(tokens[label], first, reader) for label in labels]  # (16,) each
            rows.append(torch.stack(scores, 1).cpu())  # (16, labels)
    return torch.cat(rows)


def _log_likelihood(answer: Sequence[int], first: Tensor, reader: Reader) -> Tensor:
    """Return the log-likelihood of one answer, n tokens, after each prompt of a batch, in nats: (batch,).

    Args:
        answer: its tokens, at least one.
        first: the logits after the prompts, (batch, vocabulary), which score the first token.
        reader: has read the prompts; what it has read stays the same.
    """
    logits = first[:, None]  # (16, 1, vocabulary)
    if len(answer) > 1:
        inputs = torch.tensor(answer[:-1], device=first.device).expand(len(first), -1)  # (16, n - 1)
        logits = torch.cat([logits, reader.branch().read(inputs, each=True)], 1)  # (16, n, vocabulary)
    log_probabilities = logits.float().log_softmax(-1)  # (16, n, vocabulary)
    return log_probabilities[:, range(len(answer)), answer].sum(1)  # (16,)


@torch.no_grad()
def last_states(model: nn.Module, task: PairTask, pairs: Sequence[Pair]) -> Tensor:
    """Return the last hidden state at the last token of each prompt, which the head turns into logits: (n, 576).

    Args:
        model: as for :func:`reply`.
        task: of the pairs.
        pairs: whose prompts are read.
    """
    read = {}  # what the head got last
    head = cast(Any, model).get_output_embeddings()  # of our Llama, and of the models of transformers
    hook = head.register_forward_pre_hook(lambda _, inputs: read.update(hidden=inputs[0][:, -1]))
    try:
        with restore_modes(model):
            model.eval()
            batches = _read_batches(model, task, pairs, 0)
            return torch.cat([read["hidden"].float().cpu() for _ in batches])
    finally:
        hook.remove()
