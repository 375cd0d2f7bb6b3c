r"""How far a model has moved from its base, on any text, and a loss that holds it near.

    task = replace(task, loss=NearBase(0.3))               # cross-entropy + 0.3 * KL(base || tuned)
    mean_divergence(base, tuned, task, "validation", 32)   # nats a token

The divergence is of the two models' next tokens, for each target that counts:

    KL(base || tuned) = sum over tokens v of p_base(v) (log p_base(v) - log p_tuned(v))

(Kullback and Leibler 1951, Annals of Mathematical Statistics 22, equation 2.4). On text that the base wrote it measures
what is forgotten (:mod:`lora_lab.tasks.base_text` needs no second model for that); on the new task, what training
changed there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.adapters.edit import off
from lora_lab.task import IGNORE, Task, cross_entropy, logits, mean_cross_entropy, restore_modes
from lora_lab.train import evaluate


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

    weight: float

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight is {self.weight!r}, but it must be 0 or a positive number, such as 0.3.")

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        if not model.training:
            return cross_entropy(model, inputs, targets)  # ()
        counts = targets != IGNORE  # (batch, length)
        with torch.no_grad(), off(model):
            before = logits(model, inputs)[counts]  # (tokens, vocabulary)
        after = logits(model, inputs)[counts]  # (tokens, vocabulary)
        return mean_cross_entropy(after, targets[counts]) + self.weight * divergence(before, after)  # ()


def mean_divergence(
    base: nn.Module,
    tuned: nn.Module,
    task: Task,
    part: str = "validation",
    batch_size: int = 8,
    limit: int | None = None,
) -> float:
    """KL(base || tuned) over the targets of one part that count, in nats a target, without dropout.

    Args:
        base, tuned: models of the same vocabulary, on the same device.
        task, part, batch_size, limit: as for :func:`lora_lab.evaluate`.
    """

    def from_base(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        counts = targets != IGNORE  # (batch, length)
        return divergence(logits(base, inputs)[counts], logits(model, inputs)[counts])  # ()

    with restore_modes(base):
        base.eval()
        return evaluate(tuned, replace(task, loss=from_base), part, batch_size, limit)
