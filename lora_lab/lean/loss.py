"""Cross-entropy of a language model whose logits never exist as a whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lab.lean.linear import add_product, is_trained, linear, multiply
from lora_lab.lora import LoRALayer
from lora_lab.models.llama import Llama
from lora_lab.models.quantize import BlockLinear
from lora_lab.task import IGNORE

# The loss


def cross_entropy(model: Llama, inputs: Tensor, targets: Tensor, rows: int = 256, every_target: bool = False) -> Tensor:
    """As ``lora_lab.tasks.cross_entropy``, without ever holding all logits: the mean in nats over targets that count.

    The gradient of a slice's logits is multiplied into the hidden state's as soon as it is there, so nothing
    of (tokens, vocabulary) is kept.

    Args:
        inputs, targets: token ids (batch, length); a target of -100 does not count.
        rows: tokens whose logits exist at one moment.
        every_target: say so if every target counts, and no number is looked at to find out.
    """
    hidden = model.model(inputs).flatten(0, 1)  # (512, 576)
    targets = targets.flatten()  # (512,)
    counts = targets != IGNORE  # (512,)
    if not every_target and not bool(counts.all()):
        hidden, targets = hidden[counts], targets[counts]  # (n, 576), (n,)
    head = model.lm_head
    if isinstance(head, LoRALayer) or is_trained(head):
        return F.cross_entropy(linear(head, hidden), targets)  # ()
    return token_losses(hidden, targets, head, rows).mean()  # ()


def token_losses(hidden: Tensor, targets: Tensor, head: nn.Module, rows: int = 256) -> Tensor:
    """Cross-entropy of softmax(hidden W^T), token by token, without ever holding all logits.

    Args:
        hidden: (tokens, hidden size).
        targets: token ids (tokens,), each of which counts.
        head: a frozen ``nn.Linear`` without bias, or a BlockLinear.
        rows: tokens whose logits exist at one moment.

    Returns:
        Losses in nats, (tokens,).
    """
    return _HeadLosses.apply(hidden, targets, head, rows)  # (512,)


class _HeadLosses(torch.autograd.Function):
    """The losses of tokens; keeps their gradients by the hidden state, made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: nn.Module, rows: int) -> Tensor:
        if isinstance(head, BlockLinear):
            losses, gradient = _by_vocabulary(hidden, targets, head, ctx.needs_input_grad[0])
        else:
            losses, gradient = _by_rows(hidden, targets, head, rows, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return losses  # (512,)

    @staticmethod
    @once_differentiable
    def backward(ctx, gs: Tensor):
        (gradient,) = ctx.saved_tensors  # (512, 576)
        return gradient * gs[:, None], None, None, None


def _by_rows(
    hidden: Tensor, targets: Tensor, head: nn.Module, rows: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Slices of tokens, all of the vocabulary at once."""
    weight = head.weight  # (49152, 576)
    losses = hidden.new_empty(len(hidden), 1)  # (512, 1)
    gradient = torch.empty_like(hidden) if with_gradient else None  # (512, 576)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        target = targets[part, None]  # (256, 1)
        logits = multiply(hidden[part], weight.T)  # (256, 576) @ (576, 49152) -> (256, 49152)
        own = logits.gather(1, target)  # (256, 1)
        top = logits.amax(1, keepdim=True)  # (256, 1)
        total = logits.sub_(top).exp_().sum(1, keepdim=True)  # (256, 1); logits hold exp(logit - top) now
        losses[part] = total.log() + top - own  # (256, 1)
        if gradient is not None:
            logits.div_(total)  # the probabilities
            logits.scatter_add_(1, target, torch.full_like(own, -1.0))  # minus 1 at the target
            gradient[part] = multiply(logits, weight)  # (256, 49152) @ (49152, 576) -> (256, 576)
        del logits  # before the next slice's are made
    return losses[:, 0], gradient


def _by_vocabulary(
    hidden: Tensor, targets: Tensor, head: BlockLinear, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Slices of the vocabulary, all tokens at once, so that no more than a slice of the weight is dequantised.

    Twice over the vocabulary: first for the sum of exponentials of each token, then for the gradient.
    """
    top = hidden.new_full((len(hidden), 1), -math.inf)  # (512, 1)
    total, own = torch.zeros_like(top), torch.zeros_like(top)  # (512, 1)
    for start, stop in head.slices():
        logits = multiply(hidden, head.rows(start, stop).T)  # (512, 576) @ (576, 3072) -> (512, 3072)
        here, place = _within(targets, start, stop)  # (512, 1), (512, 1)
        own = torch.where(here, logits.gather(1, place), own)  # (512, 1)
        higher = torch.maximum(top, logits.amax(1, keepdim=True))  # (512, 1)
        total.mul_((top - higher).exp()).add_(logits.sub_(higher).exp_().sum(1, keepdim=True))  # (512, 1)
        top = higher  # (512, 1)
    level = top + total.log()  # (512, 1)
    losses = (level - own)[:, 0]  # (512,)
    if not with_gradient:
        return losses, None
    gradient = torch.zeros_like(hidden)  # (512, 576)
    for start, stop in head.slices():
        weight = head.rows(start, stop)  # (3072, 576)
        chances = multiply(hidden, weight.T).sub_(level).exp_()  # (512, 3072)
        here, place = _within(targets, start, stop)  # (512, 1), (512, 1)
        chances.scatter_add_(1, place, -here.to(chances.dtype))  # minus 1 at the target
        add_product(gradient, chances, weight)  # (512, 576)
    return losses, gradient


def _within(targets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a slice of the vocabulary, and where in it (anywhere, if they do not): (512, 1) each.

    Without picking those tokens out: how many there are nobody knows before the numbers are there.
    """
    here = (targets >= start) & (targets < stop)  # (512,)
    return here[:, None], (targets - start).clamp(0, stop - start - 1)[:, None]  # (512, 1), (512, 1)
