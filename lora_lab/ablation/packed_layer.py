"""The layer of a pack: one frozen weight with many adapters beside it; and the losses of each trial."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lab.lean.loss import token_losses
from lora_lab.models.llama import Llama
from lora_lab.models.quantize import BlockLinear
from lora_lab.task import IGNORE, Loss, cross_entropy, logits, mean_squared_error

_LOSS_ROWS = 128  # tokens whose logits exist at one moment: 25 MB for SmolLM2, memory that the C library keeps


class PackingError(ValueError):
    """These runs cannot share a pass: a ValueError of its own, so that a caller can run them separately."""


class PackedLinear(nn.Module):
    """A frozen ``nn.Linear`` with K updates beside it, each for one K-th of the rows.

    Args:
        base: the layer that all trials share.
        A: (K, R, in), zero in the rows from each trial's rank on.
        B: (K, out, R), zero in those columns.
        scaling: (K,), alpha / rank of each trial.
    """

    scaling: Tensor

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scaling: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(A)  # (20, 16, 64)
        self.lora_B = nn.Parameter(B)  # (20, 128, 16)
        self.register_buffer("scaling", scaling.view(-1, 1, 1), persistent=False)  # (20, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        trials = len(self.scaling)
        if len(x) % trials:
            raise PackingError(
                f"A layer was given {len(x)} rows, which are not the examples of {trials} trials, as where the first "
                "dimension of a tensor is not the batch; run the trials separately, with fit."
            )
        return _AddUpdates.apply(x, self.lora_A, self.lora_B, self.scaling, self.base)  # (640, 64) -> (640, 128)

    @property
    def weight(self) -> Tensor:
        """There is none: K trials have K weights.

        Raises:
            PackingError: always; some modules read the weight of a layer inside them and never call the layer.
        """
        raise PackingError(
            "The model reads the weight of an adapted layer instead of calling the layer, and the trials of a pack "
            "have no common weight; run them separately, with fit."
        )

    def extra_repr(self) -> str:
        trials, rank, _ = self.lora_A.shape
        return f"trials={trials}, largest rank={rank}"


class _AddUpdates(torch.autograd.Function):
    """h_k = W0 x_k + scaling_k * B_k A_k x_k, backward by hand.

    Autograd would give the same. By hand the narrow products have their short side first, which takes half the time,
    and updates are added in place.
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, scaling: Tensor, base: nn.Linear) -> Tensor:
        outputs = base(x).contiguous()  # (640, 64) -> (640, 128), one product for all trials
        per_trial = x.reshape(len(A), -1, x.shape[-1]).to(A.dtype)  # (20, 32, 64): rows come trial by trial
        narrow = torch.bmm(A, per_trial.mT).mul_(scaling)  # (20, 16, 64) @ (20, 64, 32) -> (20, 16, 32)
        _add_product(outputs.view(*per_trial.shape[:2], -1), narrow.mT, B.mT)  # (20, 32, 128)
        ctx.save_for_backward(per_trial, narrow, A, B)
        ctx.scaling, ctx.base = scaling, base
        return outputs  # (640, 128)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] - one output
        x, narrow, A, B = ctx.saved_tensors
        per_trial = g.reshape(*x.shape[:2], -1).to(A.dtype)  # (640, 128) -> (20, 32, 128)
        narrowed = torch.bmm(B.mT, per_trial.mT).mul_(ctx.scaling)  # (20, 16, 128) @ (20, 128, 32) -> (20, 16, 32)
        dB = torch.bmm(narrow, per_trial).mT  # (20, 16, 32) @ (20, 32, 128) -> (20, 128, 16)
        dA = torch.bmm(narrowed, x)  # (20, 16, 32) @ (20, 32, 64) -> (20, 16, 64)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ ctx.base.weight  # (640, 128) @ (128, 64) -> (640, 64), one product again
            _add_product(dx.view(x.shape), narrowed.mT, A)  # (20, 32, 64)
        return dx, dA, dB, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to total, in place; a base in half precision has adapters in float32."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))


def _cross_entropies(model: nn.Module, inputs: Tensor, targets: Tensor, trials: int) -> Tensor:
    counts = targets.flatten() != IGNORE  # (640,)
    if isinstance(model, Llama) and _has_full_precision(model.lm_head):
        # In slices: the logits of a pack may take more memory than all else, and are needed only for a moment.
        hidden = model.model(inputs).flatten(0, -2)  # (512, 576)
        rows = token_losses(hidden, targets.flatten().clamp(min=0), model.lm_head, _LOSS_ROWS)  # (512,)
        rows = rows.where(counts, 0.0)  # (512,)
    else:
        outputs = logits(model, inputs, targets).flatten(0, -2)  # (640, 10)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # (640, 10)
        rows = F.cross_entropy(outputs, targets.flatten(), ignore_index=IGNORE, reduction="none")  # (640,)
    return rows.view(trials, -1).sum(1) / counts.view(trials, -1).sum(1)  # (20,)


def _has_full_precision(head: nn.Module) -> bool:
    """Whether a head has no adapter and computes in full precision, in which losses must be summed."""
    full = (torch.float32, torch.float64)
    if isinstance(head, BlockLinear):
        return head.dtype in full
    return type(head) is nn.Linear and head.weight.dtype in full


def _squared_errors(model: nn.Module, inputs: Tensor, targets: Tensor, trials: int) -> Tensor:
    return F.mse_loss(logits(model, inputs), targets, reduction="none").view(trials, -1).mean(1)  # (20,)


# The losses of lora_lab.tasks, and how to compute them for each trial of a joined batch.
TRIAL_LOSSES: dict[Loss, Callable[..., Tensor]] = {cross_entropy: _cross_entropies, mean_squared_error: _squared_errors}
