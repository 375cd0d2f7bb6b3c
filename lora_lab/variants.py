r"""Variants of LoRA: what each changes, in a few lines over LoRALinear.

    inject(model, LoRAConfig(rank=8), layer=DoRALinear)

    rsLoRA    scaling = alpha / sqrt(rank)                  Kalajdzievski 2023, arXiv 2312.03732
    LoRA-FA   A stays as drawn, only B is trained           Zhang et al. 2023, arXiv 2308.03303
    PiSSA     A and B start as the largest part of W0       Meng et al. 2024, arXiv 2404.02948
    DoRA      length and direction of each row of W apart   Liu et al. 2024, arXiv 2402.09353
    LoRA+     B learns faster than A                        Hayou et al. 2024, arXiv 2402.12354
              (no other layer, but other groups of the optimiser: ``lora_lab.methods.LoRAPlus``)

Shapes in the comments are those of ``lora_lab.lora``: a batch of 32, in = 64, out = 48, rank = 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.lora import LoRALinear


class RsLoRALinear(LoRALinear):
    """rsLoRA: h = W0 x + alpha / sqrt(rank) B A x, so that the update keeps its size as the rank grows.

    With alpha / rank, gradients shrink as the rank grows, and high ranks stop paying.

    Reference: Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2 and section 3.
    """

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.rank)


class LoRAFALinear(LoRALinear):
    """LoRA-FA: A is frozen as drawn, so the update stays in the span of its rows and the input need not be kept.

    Autograd keeps A x (rank numbers a token) in place of x (in numbers).

    Reference: Zhang et al. 2023, arXiv 2308.03303, section 3.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lora_A.requires_grad_(False)


class PiSSALinear(LoRALinear):
    """PiSSA: A and B start as the largest ``rank`` singular directions of W0, and the rest is frozen.

        W0 = U S V^T;   B0 = U[:, :r] S[:r]^(1/2),   A0 = S[:r]^(1/2) V[:, :r]^T;   h = (W0 - B0 A0) x + B A x

    (with alpha other than rank, B0 A0 carries 1 / scaling, so that it is the same part of W0). W0 is kept
    as it is, and B0 A0 is subtracted beside it: so the base stays the pre-trained model, and the update
    scaling * (B A - B0 A0) has rank up to 2 r. That is how it is saved: see :meth:`difference`.

    Reference: Meng et al. 2024, arXiv 2404.02948, section 3, equations 2 to 4.

    Raises:
        ValueError: as for LoRALinear, or the rank is above the smaller side of W0.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank, alpha, dropout, generator)
        weight = base.weight.detach().to(self.lora_A.dtype)  # (48, 64)
        if rank > min(weight.shape):
            raise ValueError(
                f"rank is {rank}, but a weight of {tuple(weight.shape)} has only {min(weight.shape)} directions."
            )
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)  # (48, 48), (48,), (48, 64)
        root = (S[:rank] / self.scaling).sqrt()  # (4,)
        with torch.no_grad():
            self.lora_A.copy_(root[:, None] * Vh[:rank])  # (4, 64)
            self.lora_B.copy_(U[:, :rank] * root)  # (48, 4)
        self.register_buffer("start_A", self.lora_A.detach().clone())  # (4, 64)
        self.register_buffer("start_B", self.lora_B.detach().clone())  # (48, 4)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (32, 64) -> (32, 48)
        A, B = self._factors()
        narrow = F.linear(self.dropout(x).to(A.dtype), A)  # (32, 64) -> (32, 8)
        update = F.linear(narrow, B) * self.scaling  # (32, 8) -> (32, 48)
        return frozen + update.to(frozen.dtype)  # (32, 48)

    def _factors(self) -> tuple[Tensor, Tensor]:
        A = torch.cat((self.lora_A, self.start_A))  # (8, 64)
        B = torch.cat((self.lora_B, -self.start_B), dim=1)  # (48, 8)
        return A, B

    def _delta(self) -> Tensor:
        A, B = self._factors()
        return self.scaling * (B @ A)  # (48, 64)

    @torch.no_grad()
    def difference(self) -> LoRALinear:
        """A plain LoRALinear over the same base that computes the same: its rank is 2 r, its scaling this one."""
        plain = LoRALinear(self.base, 2 * self.rank, 2 * self.alpha, getattr(self.dropout, "p", 0.0))
        A, B = self._factors()
        plain.lora_A.copy_(A)  # (8, 64)
        plain.lora_B.copy_(B)  # (48, 8)
        return plain.train(self.training)


class DoRALinear(LoRALinear):
    """DoRA: the length of each row of the weight is trained apart from its direction.

        V = W0 + scaling * B A;   h = m * V / ||V|| x     (m and ||V|| one number for each output; m starts as ||W0||)

    ||V|| is treated as a constant in the backward pass, as the paper proposes. Dropout acts on the
    input of A alone.

    Reference: Liu et al. 2024, arXiv 2402.09353, equation 5; the constant norm: section 4.3, equation 11.
    """

    parts = (*LoRALinear.parts, "lora_magnitude_vector")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        length = torch.linalg.vector_norm(self._direction().detach(), dim=1)  # (48,)
        self.lora_magnitude_vector = nn.Parameter(length)  # (48,)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (32, 64) -> (32, 48)
        narrow = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (32, 64) -> (32, 4)
        update = F.linear(narrow, self.lora_B) * self.scaling  # (32, 4) -> (32, 48)
        if self.bias is None:
            return ((frozen + update) * self._stretch()).to(frozen.dtype)  # (32, 48)
        return ((frozen - self.bias + update) * self._stretch() + self.bias).to(frozen.dtype)  # (32, 48)

    def _direction(self) -> Tensor:
        return self.base.weight + super()._delta()  # (48, 64)

    def _stretch(self) -> Tensor:
        length = torch.linalg.vector_norm(self._direction().detach(), dim=1)  # (48,)
        return self.lora_magnitude_vector / length  # (48,)

    def _delta(self) -> Tensor:
        return self._stretch()[:, None] * self._direction() - self.base.weight  # (48, 64)
