r"""Replies that the base model wrote itself: on them a loss tells how far a tuned model has moved from the base.

    task = on_base_text(task)
    before = evaluate(base, task, "off_domain")
    history = fit(tuned := copy.deepcopy(base), task, LoRA(rank=8), lr=1e-3, steps=60)
    print(evaluate(tuned, task, "off_domain") - before)    # KL(base || tuned), in nats a token; also in history.rows

The loss on someone else's text may fall in training, because the base may not know such text well, and then it says
nothing about what was forgotten. On samples of the base itself it rises in expectation, by the Kullback-Leibler
divergence:

    KL(base || tuned) = E log p_base(x) - E log p_tuned(x),    x ~ base

(Kullback and Leibler 1951, Annals of Mathematical Statistics 22, equation 2.4). Both means are over the same samples,
at temperature 1. What is shipped was written by SmolLM2-135M-Instruct, and is right for that base alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from typing_extensions import TypedDict

from lora_lab.models.llama import Llama
from lora_lab.system.files import read_json, write_json
from lora_lab.system.schema import Count, check
from lora_lab.task import IGNORE, Examples, Task
from lora_lab.tasks.instruction import ChatTokenizer, Padded, pad, stop_token

SHIPPED = Path(__file__).parent / "data" / "smollm2_replies.json"
_Tokens = Annotated[list[Count], Field(min_length=1)]


class _Reply(TypedDict):
    prompt: _Tokens
    reply: _Tokens


class _Content(TypedDict):
    replies: Annotated[list[_Reply], Field(min_length=1)]


def write_replies(
    model: Llama, tokenizer: ChatTokenizer, prompts: Sequence[str], path: str | Path, each: int = 2, tokens: int = 64
) -> None:
    """Sample replies of the base at temperature 1, and write their tokens: minutes on two cores.

    Args:
        model: the base.
        tokenizer: of the base.
        prompts: on many subjects, as those that the shipped file holds, in tokens of SmolLM2.
        path: of the file.
        each: replies to a prompt; each has a seed of its own.
        tokens: the most of a reply. A shorter one includes the token that ends it.
    """
    device, stop, replies = next(model.parameters()).device, stop_token(tokenizer), []
    for prompt in prompts:
        ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]))
        for _ in range(each):
            inputs, seed = torch.tensor(ids, device=device), len(replies)
            reply = model.generate(inputs, tokens, stop, temperature=1.0, seed=seed).tolist()
            replies.append({"prompt": ids, "reply": reply if len(reply) == tokens else [*reply, stop]})
    write_json(path, {"temperature": 1.0, "replies": replies}, indent=None)


def on_base_text(task: Task, path: str | Path = SHIPPED, prompts: slice = slice(None)) -> Task:
    """Return the task with the base's own replies as its off-domain part.

    Args:
        task: of a language model with the tokenizer of the base.
        path: of the file; default: the shipped one, of SmolLM2-135M-Instruct.
        prompts: as for :func:`base_replies`.
    """
    return replace(task, off_domain=base_replies(path, prompts))


def base_replies(path: str | Path = SHIPPED, prompts: slice = slice(None)) -> Padded:
    """Return the base's own replies as examples, whose targets are their tokens; those of the prompts do not count.

    Args:
        path: as for :func:`on_base_text`.
        prompts: which of the file's prompts, in their order. Replies that are trained on and replies that judge must be
            to different ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else.
    """
    content = read_json(path)
    check(content, _Content, str(path))
    replies = content["replies"]
    chosen = list(dict.fromkeys(tuple(reply["prompt"]) for reply in replies))[prompts]
    inputs, targets = [], []
    for reply in replies:
        if tuple(reply["prompt"]) in chosen:
            ids = torch.tensor([*reply["prompt"], *reply["reply"]])  # (length + 1,)
            inputs.append(ids[:-1])
            targets.append(ids[1:].clone())  # (length,)
            targets[-1][: len(reply["prompt"]) - 1] = IGNORE
    return pad(inputs, targets)


def with_replay(task: Task, samples: Examples, share: float) -> Task:
    """Return the task with a share of its training examples drawn from elsewhere, to be rehearsed while it is learned.

    Args:
        task: of a language model.
        samples: to rehearse, such as :func:`base_replies`. They are repeated until they make up the share.
        share: of the training examples, from 0 to below 1; batches have it on average.

    Returns:
        A plain Task: the samples come without the texts that a PairTask keeps of its examples.

    Raises:
        ValueError: the share is out of range.

    Reference: Robins 1995, "Catastrophic Forgetting, Rehearsal and Pseudorehearsal", Connection Science 7; of samples
    that the model itself generates it speaks as pseudorehearsal.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}, but it must be from 0 to below 1.")
    count = round(len(task.train) * share / (1 - share))
    samples = samples[torch.arange(count) % len(samples)]  # (count, length)
    train = pad([*task.train.inputs, *samples.inputs], [*task.train.targets, *samples.targets])
    plain = Task(**{entry.name: getattr(task, entry.name) for entry in fields(Task)})
    return replace(plain, train=train)
