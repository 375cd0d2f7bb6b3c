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

    Reference: Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2.
    """

    @property
    def scaling(self) -> float:
        """What the update B A is multiplied by: alpha / sqrt(rank)."""
        return self.alpha / math.sqrt(self.rank)


class LoRAFALinear(LoRALinear):
    """LoRA-FA: A is frozen as drawn, so the update stays in the span of its rows and the input need not be kept.

    Autograd keeps A x (rank numbers a token) in place of x (in numbers), and the mask of a dropout.

    Reference: Zhang et al. 2023, arXiv 2308.03303, section 3.1.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lora_A.requires_grad_(False)


class PiSSALinear(LoRALinear):
    """PiSSA: A and B start as the largest ``rank`` singular directions of W0, and the rest is frozen.

        W0 = U S V^T;   B0 = U[:, :r] S[:r]^(1/2),   A0 = S[:r]^(1/2) V[:, :r]^T;   h = (W0 - B0 A0) x + B A x

    With alpha other than rank, B0 A0 carries 1 / scaling, so that scaling * B0 A0 is the same part of W0.
    W0 is kept as it is, and B0 A0 is subtracted beside it: so the base stays the pre-trained model, a new
    layer computes what it does bit for bit, and the update scaling * (B A - B0 A0) has rank up to 2 r.
    Dropout acts on the input of the whole update. A direction in which W0 is zero starts as zero and stays so.

    A0 and B0 belong to the adapter's state, for without them A and B mean nothing. To be saved, the update is
    written as plain LoRA of rank 2 r: see :meth:`difference`.

    Reference: Meng et al. 2024, arXiv 2404.02948, section 3, equations 2 to 5; the difference: its appendix
    on converting PiSSA into LoRA.

    Raises:
        ValueError: as for LoRALinear, or the rank is above the smaller side of W0.
    """

    parts = (*LoRALinear.parts, "start_A", "start_B")

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
        """As for LoRALinear, and replaced by the singular directions once the scaling is known."""
        if rank > (most := min(self.base.in_features, self.base.out_features)):
            raise ValueError(
                f"rank is {rank}, but a layer from {self.base.in_features} to {self.base.out_features} has only {most} "
                "singular directions; choose a smaller rank, or leave the layer out of targets."
            )
        return super().init_factors(rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (32, 64) -> (32, 48)
        x = self.dropout(x).to(self.lora_A.dtype)  # (32, 64)
        now = F.linear(F.linear(x, self.lora_A), self.lora_B)  # (32, 64) -> (32, 48)
        start = F.linear(F.linear(x, self.start_A), self.start_B)  # (32, 64) -> (32, 48)
        return frozen + ((now - start) * self.scaling).to(frozen.dtype)  # (32, 48)

    def _delta(self) -> Tensor:
        return self.scaling * (self.lora_B @ self.lora_A - self.start_B @ self.start_A)  # (48, 64)

    @torch.no_grad()
    def difference(self) -> LoRALinear:
        """A plain LoRALinear over the same base that computes the same: its rank is 2 r, its scaling this one."""
        # A generator of its own, so that saving a model draws nothing from the global one.
        plain = LoRALinear(self.base, 2 * self.rank, 2 * self.alpha, getattr(self.dropout, "p", 0.0), torch.Generator())
        plain.lora_A.copy_(torch.cat((self.lora_A, self.start_A)))  # (8, 64)
        plain.lora_B.copy_(torch.cat((self.lora_B, -self.start_B), dim=1))  # (48, 8)
        return plain.train(self.training)


class DoRALinear(LoRALinear):
    """DoRA: the length of each row of the weight is trained apart from its direction.

        V = W0 + scaling * B A;   h = m * V / ||V|| x     (m and ||V|| one number for each output; m starts as ||W0||)

    ||V|| is treated as a constant in the backward pass, as the paper proposes. Dropout acts on the
    input of A alone (PEFT drops W0's part of the change too). A row of zeros has no direction and stays zero.

    Reference: Liu et al. 2024, arXiv 2402.09353, equation 5; the constant norm: section 4.3, equation 11.
    """

    parts = (*LoRALinear.parts, "lora_magnitude_vector")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        length = torch.linalg.vector_norm(self._direction().detach(), dim=1)  # (48,)
        self.lora_magnitude_vector = nn.Parameter(length)  # (48,)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (32, 64) -> (32, 48)
        turned = frozen if self.bias is None else frozen - self.bias  # (32, 48)
        narrow = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (32, 64) -> (32, 4)
        update = F.linear(narrow, self.lora_B) * self.scaling  # (32, 4) -> (32, 48)
        stretch = self._stretch(self._direction())  # (48,)
        # As a change of what the base gives: at the start the stretch is 1, and not a bit is changed.
        return frozen + ((stretch - 1) * turned + stretch * update).to(frozen.dtype)  # (32, 48)

    def _direction(self) -> Tensor:
        return self.base.weight + super()._delta()  # (48, 64)

    def _stretch(self, direction: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(direction.detach(), dim=1)  # (48,)
        tiny = torch.finfo(length.dtype).tiny  # so that a row of zeros gives 0 / tiny, not 0 / 0
        return self.lora_magnitude_vector / length.clamp(min=tiny)  # (48,)

    def _delta(self) -> Tensor:
        direction = self._direction()  # (48, 64)
        return self._stretch(direction)[:, None] * direction - self.base.weight  # (48, 64)
