r"""LoRA: a frozen layer plus a small trainable update of low rank.

             h                     h = W0 x + scaling * B A x        (Hu et al. 2021, equation 3)
             |
             +<----------.         scaling = alpha / rank
             |           |
    .--------'----.   .--'--.
    |             |   |  B  |      (out, rank)   starts at zero, so the adapted model starts as the
    | W0, frozen  |   '--.--'                    pre-trained one, bit for bit
    |  (out, in)  |   .--'--.
    |             |   |  A  |      (rank, in)    starts random
    '--------.----'   '--.--'
             |           |         trained: rank * (in + out) parameters in place of in * out
             '-----.-----'
                   x

Shapes in the comments follow one running example: a batch of 32, in = 64, out = 48, rank = 4.

Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Size: an integer from 1 on. Positive: a number above 0.
from lora_lab.system.schema import Dropout, Positive, Size, check


class LoRALayer(nn.Module):
    """A frozen layer plus the trainable update ``scaling * B @ A``.

    A subclass for a kind of layer defines :meth:`init_factors`, which makes the initial A and B, ``forward``, which
    applies them to the input, and ``_delta`` if its weight is not (out, in). Start with :class:`LoRALinear` below;
    ``lora_lab.layers`` has the other kinds of layer.

    Args:
        base: the layer to adapt. It is stored as ``base`` and frozen.
        rank: inner dimension r of the update B A, at least 1.
        alpha: the update is multiplied by ``alpha / rank``.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1).
        generator: a CPU generator for the random factor; with the same seed it gives the same factor on every device.

    Raises:
        ValueError: rank, alpha or dropout is out of range, or this class cannot adapt ``base``. The base is then
            left unchanged.
    """

    parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")  # names of the tensors that make up an adapter
    fixed: ClassVar[tuple[str, ...]] = ()  # parameters that are not trained; checkpoints leave them out
    base: Any  # a module with a weight; its class depends on the kind of layer

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        rank = check(rank, Size, "rank")
        dropout = check(dropout, Dropout, "dropout")
        self.alpha = check(alpha, Positive, "alpha")
        self.base = base
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        A, B = self.init_factors(rank, generator)
        device = next(base.parameters()).device
        self.lora_A = nn.Parameter(A.to(device))  # (4, 64)
        self.lora_B = nn.Parameter(B.to(device))  # (48, 4)
        for part in self.fixed:
            self.get_parameter(part).requires_grad_(False)
        base.requires_grad_(False)  # last, so that an error above leaves the base unchanged

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the initial A and B; the rank is the first dimension of A and the second of B."""
        raise NotImplementedError(f"{type(self).__name__} must define init_factors, which returns the initial A and B.")

    @property
    def rank(self) -> int:
        """The inner dimension r of the update."""
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        """The factor of the update B A: alpha / rank."""
        return self.alpha / self.rank

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the update of the weight, ``scaling * B @ A``, (out, in), outside autograd's graph.

        A subclass with a different update overrides ``_delta``, which is part of the graph.
        """
        return self._delta()

    def _delta(self) -> Tensor:
        return self.scaling * (self.lora_B @ self.lora_A)  # (48, 4) @ (4, 64) -> (48, 64)

    @property
    def weight(self) -> Tensor:
        """W0 + update, in autograd's graph, for parent modules that read a layer's weight without calling the layer.

        ``nn.MultiheadAttention`` and the fast path of ``nn.TransformerEncoderLayer`` do this.
        """
        return (self.base.weight + self._delta()).to(self.base.weight.dtype)  # (48, 64)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, which adapters leave unchanged."""
        return self.base.bias  # (48,)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a new frozen layer of the base's class that computes the same function; this layer does not change."""
        plain = copy.deepcopy(self.base, {id(self.base.weight): self.base.weight})  # shares W0
        plain.weight = nn.Parameter(self.weight)  # (48, 64)
        return plain.requires_grad_(False).train(self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"


class LoRALinear(LoRALayer):
    """A frozen ``nn.Linear`` plus the trainable update ``scaling * B @ A``.

    A starts like the weight of an ``nn.Linear``: Kaiming-uniform with a = sqrt(5), which is uniform in
    +-1/sqrt(in). The paper describes a Gaussian; its released code uses this. B starts at zero. Over a
    half-precision base, A and B are float32, because half precision would round an optimiser's small steps away.

    Args: as for :class:`LoRALayer`.
    """

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the factors A (rank, in), uniform, and B (out, rank), zero."""
        dtype = getattr(self.base, "dtype", None) or self.base.weight.dtype  # a quantised base need not be dequantised
        A = uniform(rank, self.base.in_features, dtype, generator)  # (4, 64)
        return A, torch.zeros(self.base.out_features, rank, dtype=A.dtype)  # (48, 4)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (32, 64) -> (32, 48)
        narrow = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (32, 64) -> (32, 4)
        update = F.linear(narrow, self.lora_B) * self.scaling  # (32, 4) -> (32, 48)
        return frozen + update.to(frozen.dtype)  # (32, 48)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a new frozen ``nn.Linear``, or subclass of it if the base is one, that computes the same function."""
        if isinstance(self.base, nn.Linear) and type(self.base) is not nn.Linear:
            return super().merged()
        plain = nn.Linear(self.base.in_features, self.base.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight)  # (48, 64)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone())  # (48,)
        return plain.requires_grad_(False).train(self.training)


def uniform(rank: int, width: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Return a new A (rank, width), uniform in +-1/sqrt(width), in ``dtype`` or float32, whichever is more precise."""
    A = torch.empty(rank, width, dtype=torch.promote_types(dtype, torch.float32))  # (4, 64)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # (4, 64)
