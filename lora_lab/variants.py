r"""Variants of LoRA: each changes a few lines of LoRALinear, and has a method by which ``fit`` trains it.

    fit(model, task, DoRA(rank=8), steps=40, lr=2e-3)

    rsLoRA    scaling = alpha / sqrt(rank)                              Kalajdzievski 2023, arXiv 2312.03732
    LoRA-FA   A is frozen at its random start, only B is trained        Zhang et al. 2023, arXiv 2308.03303
    PiSSA     A and B start as the leading singular directions of W0    Meng et al. 2024, arXiv 2404.02948
    DoRA      length and direction of each row of W, separately         Liu et al. 2024, arXiv 2402.09353
    LoRA+     a higher learning rate for B than for A                   Hayou et al. 2024, arXiv 2402.12354
              (the same layer with other optimiser groups)

To add one, write two classes below:

    a layer, of LoRALinear   override ``scaling``, ``init_factors``, or ``forward`` with ``_delta``, which merging uses;
                             make further tensors after ``super().__init__``, on the base's device, a buffer if it is
                             not trained, and list them in ``parts``; of A and B list in ``fixed`` what is not trained
    a method, of LoRA        its ``layer``; its ``name``, for commands; ``groups`` for other rates; ``peft`` if PEFT has
                             a setting for it, whose further tensors ``adapters.peft_format`` must name

Without ``peft``, ``save_adapter`` and ``finetune`` refuse a layer whose ``forward``, ``_delta`` or ``scaling`` is its
own (PiSSA's becomes plain LoRA of twice the rank): store its ``adapter_state``, or merge it. ``diagnose`` looks at A
and B alone.

Shapes in the comments are those of ``lora_lab.lora``: a batch of 32, in = 64, out = 48, rank = 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.inject import lora_layers
from lora_lab.lora import LoRALinear
from lora_lab.methods import LoRA
from lora_lab.system.schema import Positive


class RsLoRALinear(LoRALinear):
    """rsLoRA: h = W0 x + alpha / sqrt(rank) B A x, so that the size of the update does not shrink as the rank grows.

    With alpha / rank, gradients shrink as the rank grows; therefore, the paper holds, high ranks bring no gain.

    Reference: Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2.
    """

    @property
    def scaling(self) -> float:
        """The factor of the update B A: alpha / sqrt(rank)."""
        return self.alpha / math.sqrt(self.rank)


class RsLoRA(LoRA):
    """LoRA scaled by alpha / sqrt(rank): see :class:`RsLoRALinear`."""

    name = "rslora"
    layer = RsLoRALinear
    peft = "use_rslora"


class LoRAFALinear(LoRALinear):
    """LoRA-FA: A is frozen at its random start, which confines the rows of the update to the span of A's rows.

    For the backward pass autograd saves A x (rank values a token) in place of x (in values), and dropout's mask if any.

    Reference: Zhang et al. 2023, arXiv 2308.03303, section 3.1.
    """

    fixed = ("lora_A",)


class LoRAFA(LoRA):
    """LoRA that trains only B: see :class:`LoRAFALinear`."""

    name = "lora-fa"
    layer = LoRAFALinear


class PiSSALinear(LoRALinear):
    """PiSSA: A and B start as the largest ``rank`` singular directions of W0, and the rest is frozen.

        W0 = U S V^T;   B0 = U[:, :r] S[:r]^(1/2),   A0 = S[:r]^(1/2) V[:, :r]^T;   h = (W0 - B0 A0) x + B A x

    The equations are for alpha = rank; otherwise B0 A0 is divided by the scaling, so that scaling * B0 A0 is the
    same part of W0. W0 is stored unchanged and B0 A0 is subtracted in the forward pass: so the base stays the
    pre-trained layer, a new adapter computes what the base does bit for bit, and the update
    scaling * (B A - B0 A0) has rank up to 2 r. Dropout acts on the input of the whole update. A singular direction
    whose singular value is zero starts at zero and stays there.

    A0 and B0 are part of the adapter's state, because A and B mean nothing without them. Adapter files hold the
    update as plain LoRA of rank 2 r: see :meth:`plain_factors`.

    Reference: Meng et al. 2024, arXiv 2404.02948, section 3, equations 2 to 5; the difference: its appendix
    on converting PiSSA into LoRA.

    Raises:
        ValueError: as for LoRALinear, or the rank is above the smaller side of W0.
    """

    parts = (*LoRALinear.parts, "start_A", "start_B")
    start_A: Tensor
    start_B: Tensor

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        weight, rank = self.base.weight.detach().to(self.lora_A.dtype), self.rank  # (48, 64)
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)  # (48, 48), (48,), (48, 64)
        root = (S[:rank] / self.scaling).sqrt()  # (4,)
        with torch.no_grad():
            self.lora_A.copy_(root[:, None] * Vh[:rank])  # (4, 64)
            self.lora_B.copy_(U[:, :rank] * root)  # (48, 4)
        self.register_buffer("start_A", self.lora_A.detach().clone())  # (4, 64)
        self.register_buffer("start_B", self.lora_B.detach().clone())  # (48, 4)

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the factors of LoRALinear; the constructor replaces them by the singular directions."""
        if rank > (largest := min(self.base.in_features, self.base.out_features)):
            raise ValueError(f"rank is {rank}, but this layer has only {largest} singular directions; lower the rank.")
        return super().init_factors(rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (32, 64) -> (32, 48)
        x = self.dropout(x).to(self.lora_A.dtype)  # (32, 64)
        trained = F.linear(F.linear(x, self.lora_A), self.lora_B)  # (32, 64) -> (32, 48)
        start = F.linear(F.linear(x, self.start_A), self.start_B)  # (32, 64) -> (32, 48)
        return frozen + ((trained - start) * self.scaling).to(frozen.dtype)  # (32, 48)

    def _delta(self) -> Tensor:
        return self.scaling * (self.lora_B @ self.lora_A - self.start_B @ self.start_A)  # (48, 64)

    @staticmethod
    def plain_factors(A: Tensor, B: Tensor, start_A: Tensor, start_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors (2 r, in) and (out, 2 r) whose product is B A - start_B start_A."""
        return torch.cat((A, start_A)), torch.cat((B, -start_B), dim=1)  # (8, 64), (48, 8)


class PiSSA(LoRA):
    """LoRA that starts from the leading singular directions: see :class:`PiSSALinear`.

    ``prepare`` computes the SVD of each layer: 0.15 s for a layer of 576 x 1536 on two CPU cores.
    """

    name = "pissa"
    layer = PiSSALinear


class DoRALinear(LoRALinear):
    """DoRA: the length and the direction of each row of the weight are trained separately.

        V = W0 + scaling * B A;   h = m * V / ||V|| x     (m and ||V|| have one value per output; m starts as ||W0||)

    ||V|| is treated as a constant in the backward pass, as the paper proposes. Dropout acts on the input of A only;
    PEFT applies it to the term (m / ||V|| - 1) W0 x as well. A row of zeros has no direction and stays zero.

    Reference: Liu et al. 2024, arXiv 2402.09353, equation 5; the constant norm: section 4.3, equation 11.
    """

    parts = (*LoRALinear.parts, "lora_magnitude_vector")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        length = torch.linalg.vector_norm(self._unnormalised().detach(), dim=1)  # (48,)
        self.lora_magnitude_vector = nn.Parameter(length)  # (48,)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (32, 64) -> (32, 48)
        without_bias = frozen if self.bias is None else frozen - self.bias  # (32, 48)
        narrow = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (32, 64) -> (32, 4)
        update = F.linear(narrow, self.lora_B) * self.scaling  # (32, 4) -> (32, 48)
        stretch = self._stretch(self._unnormalised())  # (48,)
        # As a change of the base's output: at the start the stretch is 1, and the output is the base's bit for bit.
        return frozen + ((stretch - 1) * without_bias + stretch * update).to(frozen.dtype)  # (32, 48)

    def _unnormalised(self) -> Tensor:
        return self.base.weight + super()._delta()  # (48, 64)

    def _stretch(self, direction: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(direction.detach(), dim=1)  # (48,)
        tiny = torch.finfo(length.dtype).tiny  # so that a row of zeros gives 0 / tiny, not 0 / 0
        return self.lora_magnitude_vector / length.clamp(min=tiny)  # (48,)

    def _delta(self) -> Tensor:
        direction = self._unnormalised()  # (48, 64)
        return self._stretch(direction)[:, None] * direction - self.base.weight  # (48, 64)


class DoRA(LoRA):
    """LoRA of each row's direction, with a trained length: see :class:`DoRALinear`."""

    name = "dora"
    layer = DoRALinear
    peft = "use_dora"


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA+: the learning rate of B is ``ratio`` times that of A.

    In the limit of wide layers, updates of A and of B change the layer's output by amounts of the same order only
    if lr_B / lr_A grows with the width. ``fit``'s ``lr`` is the rate of A. The ratio applies to an adapted
    embedding's B too, although the theory covers linear layers only.

    Reference: Hayou et al. 2024, arXiv 2402.12354, section 4, theorem 1; the ratio: section 5.3.

    Args:
        ratio: lr_B / lr_A, positive; to be tuned. The paper reports as best about 16 for RoBERTa if A starts at
            zero, 4 to 8 if B starts at zero, as here, and 2 to 4 for Llama.
    """

    ratio: Positive = 4.0
    name: ClassVar[str] = "lora+"

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return two groups: every A, and every B with ``ratio`` as its ``lr_factor``."""
        layers = lora_layers(model, required=True).values()
        return [
            {"params": [layer.lora_A for layer in layers]},
            {"params": [layer.lora_B for layer in layers], "lr_factor": self.ratio},
        ]


# Import it from here: by then all variants above have registered.
LORA_METHODS = LoRA.by_name
