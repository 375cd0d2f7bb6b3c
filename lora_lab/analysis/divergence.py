r"""How far a model has moved from its base, on any text or on the base's own replies, and what holds it near.

    mean_divergence(base, tuned, task, "validation", 32)   # nats a token

The divergence is of the two models' next tokens, for each target that counts:

    KL(base || tuned) = sum over tokens v of p_base(v) (log p_base(v) - log p_tuned(v))

(Kullback and Leibler 1951, Annals of Mathematical Statistics 22, equation 2.4). On text that the base wrote it measures
what is forgotten; on the new task, what training changed there.

On text that the base wrote, no second model is needed. The loss on someone else's text may fall in training, because
the base may not know such text well, and then it says nothing about what was forgotten. On samples of the base, drawn
at temperature 1, it rises in expectation, by the divergence E log p_base(x) - E log p_tuned(x):

    task = on_base_text(task)
    history = fit(tuned, task, LoRA(rank=8), lr=1e-3, steps=60)     # its off-domain losses tell the divergence

What is shipped was written by SmolLM2-135M-Instruct, and is right for that base alone.

Two changes of a task hold a model near its base: a penalty, and replies of the base among the training examples.

    task = replace(task, loss=NearBase(0.3))               # cross-entropy + 0.3 * KL(base || tuned)
    task = with_replay(task, base_replies(), share=0.2)
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.adapters.edit import off
from lora_lab.system.files import read_json
from lora_lab.system.schema import NotNegative, check_fields
from lora_lab.task import IGNORE, Examples, Task, cross_entropy, logits, mean_cross_entropy, restore_modes
from lora_lab.tasks.instruction import Padded, pad
from lora_lab.train import evaluate

REPLIES = Path(__file__).parents[1] / "tasks" / "data" / "smollm2_replies.json"


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean KL divergence of the second distribution from the first, in nats.

    Args:
        before, after: logits (tokens, vocabulary).
    """
    first, second = (
        scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1) for scores in (before, after)
    )  # 2 x (tokens, vocabulary)
    return F.kl_div(second, first, log_target=True, reduction="batchmean")  # ()


@dataclass(frozen=True)
class NearBase:
    """A task's loss: cross-entropy plus a penalty on the divergence from the base, for a model with adapters.

    The base is the model with its adapters off, and reads the same batch; so no other text is needed (Li and Hoiem
    2016, "Learning without Forgetting", arXiv 1606.09282, section 3). In evaluations the loss is the cross-entropy
    alone, so that it compares with that of other runs.

    Args:
        weight: of the divergence, 0 or more.

    Raises:
        ValueError: the weight is negative.
    """

    weight: NotNegative

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        if not model.training:
            return cross_entropy(model, inputs, targets)  # ()
        counts = targets != IGNORE  # (batch, length)
        with torch.no_grad(), off(model):
            before = logits(model, inputs)[counts]  # (tokens, vocabulary)
        after = logits(model, inputs)[counts]  # (tokens, vocabulary)
        return mean_cross_entropy(after, targets[counts]) + self.weight * divergence(before, after)  # ()


def mean_divergence(
    base: nn.Module, tuned: nn.Module, task: Task, part: str = "validation", limit: int | None = None
) -> float:
    """Return KL(base || tuned) over the targets of one part that count, in nats a target, without dropout.

    Args:
        base, tuned: models of the same vocabulary, on the same device.
        task, part, limit: as for :func:`lora_lab.evaluate`.
    """

    def from_base(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        counts = targets != IGNORE  # (batch, length)
        return divergence(logits(base, inputs)[counts], logits(model, inputs)[counts])  # ()

    with restore_modes(base):
        base.eval()
        return evaluate(tuned, replace(task, loss=from_base), part, limit=limit)


def base_replies(prompts: slice = slice(None)) -> Padded:
    """Return the base's own replies as examples, whose targets are their tokens; those of the prompts do not count.

    Args:
        prompts: which of the prompts, in their order. Replies that are trained on and replies that judge must be to
            different ones.
    """
    replies = read_json(REPLIES)["replies"]
    chosen = list(dict.fromkeys(tuple(reply["prompt"]) for reply in replies))[prompts]
    inputs, targets = [], []
    for reply in replies:
        if tuple(reply["prompt"]) in chosen:
            ids = torch.tensor([*reply["prompt"], *reply["reply"]])  # (length + 1,)
            inputs.append(ids[:-1])
            targets.append(ids[1:].clone())  # (length,)
            targets[-1][: len(reply["prompt"]) - 1] = IGNORE
    return pad(inputs, targets)


def on_base_text(task: Task, prompts: slice = slice(None)) -> Task:
    """Return the task with :func:`base_replies` as its off-domain part.

    Args:
        task: of a language model, made with the tokenizer of the base.
        prompts: as for :func:`base_replies`.
    """
    return replace(task, off_domain=base_replies(prompts))


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
    plain = {field.name: getattr(task, field.name) for field in fields(Task)}
    return replace(Task(**plain), train=train)
