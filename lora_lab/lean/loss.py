"""Cross-entropy of a language model whose logits never exist as a whole."""

# torch declares Function.backward(ctx, *grad_outputs), which the backward below narrows to its one output.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lab.lean.blocks import cast_addmm_, cast_matmul, is_trained, linear
from lora_lab.lora import LoRALayer
from lora_lab.models.llama import Llama
from lora_lab.models.quantize import BlockLinear
from lora_lab.task import IGNORE

# The loss


def cross_entropy(model: Llama, inputs: Tensor, targets: Tensor, rows: int = 256, every_target: bool = False) -> Tensor:
    """``lora_lab.tasks.cross_entropy`` without ever holding all logits: the mean in nats over the targets that count.

    The forward pass computes the gradient of each slice's logits and multiplies it by the head at once, so that no
    tensor of (tokens, vocabulary) is saved.

    Args:
        inputs, targets: token ids (batch, length); a target of -100 does not count.
        rows: tokens whose logits exist at the same time.
        every_target: whether the caller knows that every target counts. If not, the targets are read, which makes
            Python wait for a GPU. If True is wrong, a target of -100 raises an error, or makes the loss NaN if the
            head is in blocks.
    """
    hidden = model.model(inputs).flatten(0, 1)  # (4, 128) -> (512, 576)
    targets = targets.flatten()  # (512,)
    counts = targets != IGNORE  # (512,)
    if not every_target and not counts.all():
        hidden, targets = hidden[counts], targets[counts]  # (n, 576), (n,)
    head = model.lm_head
    if isinstance(head, LoRALayer) or is_trained(head):
        return F.cross_entropy(linear(head, hidden), targets)  # ()
    return token_losses(hidden, targets, head, rows).mean()  # ()


def token_losses(hidden: Tensor, targets: Tensor, head: nn.Module, rows: int = 256) -> Tensor:
    """Cross-entropy of softmax(hidden W^T) for each token, without ever holding all logits.

    Args:
        hidden: (tokens, hidden size).
        targets: token ids (tokens,), each of which counts.
        head: a frozen ``nn.Linear`` without bias, or a BlockLinear.
        rows: tokens whose logits exist at the same time.

    Returns:
        Losses in nats, (tokens,).
    """
    return _HeadLosses.apply(hidden, targets, head, rows)  # (512,)


class _HeadLosses(torch.autograd.Function):
    """The losses of tokens; saves their gradients by the hidden state, computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: nn.Module, rows: int) -> Tensor:
        if isinstance(head, BlockLinear):
            losses, gradient = _by_vocabulary(hidden, targets, head, ctx.needs_input_grad[0])
        else:
            losses, gradient = _by_rows(hidden, targets, head.get_parameter("weight"), rows, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return losses  # (512,)

    @staticmethod
    @once_differentiable
    def backward(ctx, gs: Tensor):
        (gradient,) = ctx.saved_tensors  # (512, 576)
        return gradient * gs[:, None], None, None, None


def _by_rows(
    hidden: Tensor, targets: Tensor, weight: Tensor, rows: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Slices of tokens, each over the whole vocabulary of the head's weight (49152, 576)."""
    losses = hidden.new_empty(len(hidden), 1)  # (512, 1)
    gradient = torch.empty_like(hidden) if with_gradient else None  # (512, 576)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        target = targets[part, None]  # (256, 1)
        logits = cast_matmul(hidden[part], weight.T)  # (256, 576) @ (576, 49152) -> (256, 49152)
        target_logit = logits.gather(1, target)  # (256, 1)
        top = logits.amax(1, keepdim=True)  # (256, 1)
        total = logits.sub_(top).exp_().sum(1, keepdim=True)  # (256, 1); logits hold exp(logit - top) now
        losses[part] = total.log() + top - target_logit  # (256, 1)
        if gradient is not None:
            logits.div_(total)  # the probabilities
            logits.scatter_add_(1, target, torch.full_like(target_logit, -1.0))  # minus 1 at the target
            gradient[part] = cast_matmul(logits, weight)  # (256, 49152) @ (49152, 576) -> (256, 576)
        del logits  # before the logits of the next slice are allocated
    return losses[:, 0], gradient


def _by_vocabulary(
    hidden: Tensor, targets: Tensor, head: BlockLinear, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Slices of the vocabulary, each for all tokens, so that only a slice of the weight is dequantised at a time.

    All sums are of exp(logit - top), with each token's largest logit so far, and shrink when a slice has a larger one.

    Reference: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv 1805.02867, algorithm 3.
    """
    top = hidden.new_full((len(hidden), 1), -math.inf)  # (512, 1)
    total = torch.zeros_like(top)  # (512, 1)
    target_logit = torch.full_like(top, math.nan)  # (512, 1); stays NaN for a target outside the vocabulary
    mean_row, target_row = torch.zeros_like(hidden), torch.zeros_like(hidden)  # (512, 576): rows of the weight
    for start, stop in head.slices():
        weight = head.rows(start, stop)  # (1820, 576)
        logits = cast_matmul(hidden, weight.T)  # (512, 576) @ (576, 1820) -> (512, 1820)
        # Masked, not indexed, so that shapes do not depend on the data, which fake tensors do not have.
        in_slice = ((targets >= start) & (targets < stop))[:, None]  # (512, 1)
        index = (targets - start).clamp(0, stop - start - 1)[:, None]  # (512, 1), any of the slice for the others
        target_logit = torch.where(in_slice, logits.gather(1, index), target_logit)  # (512, 1)
        higher = torch.maximum(top, logits.amax(1, keepdim=True))  # (512, 1)
        shrink, top = (top - higher).exp_(), higher  # (512, 1)
        exponentials = logits.sub_(higher).exp_()  # (512, 1820)
        total.mul_(shrink).add_(exponentials.sum(1, keepdim=True))  # (512, 1)
        if with_gradient:
            cast_addmm_(mean_row.mul_(shrink), exponentials, weight)  # (512, 1820) @ (1820, 576) -> (512, 576)
            target_row = torch.where(in_slice, weight[index[:, 0]].to(hidden.dtype), target_row)  # (512, 576)
        del weight, logits, exponentials  # before those of the next slice are allocated
    losses = (top + total.log() - target_logit)[:, 0]  # (512,)
    return losses, mean_row.div_(total).sub_(target_row) if with_gradient else None
