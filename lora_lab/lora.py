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
             |           |         trained: rank * (in + out) numbers in place of in * out
             '-----.-----'
                   x

Shapes in the comments follow one running example: a batch of 32, in = 64, out = 48, rank = 4.

Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoRALayer(nn.Module):
    """A frozen layer with the update ``scaling * B @ A`` beside it.

    A kind of layer says two things: :meth:`init_factors`, what A and B are at the start, and ``forward``, how they
    meet the input. :class:`LoRALinear` below is the one to read; ``lora_lab.layers`` has the others.

    Args:
        base: the layer to adapt. It is kept as ``base`` and frozen.
        rank: inner dimension r of the update B A, at least 1.
        alpha: strength; the update is multiplied by ``alpha / rank``.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1).
        generator: a CPU generator to draw from; the same one gives the same factors on every device.

    Raises:
        ValueError: rank, alpha or dropout is out of range, or this kind of layer cannot be adapted so. The base is
            then left as it was.
    """

    parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")  # the tensors that make up an adapter

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_numbers(rank, alpha, dropout)
        self.base, self.alpha = base, alpha
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        A, B = self.init_factors(rank, generator)
        self.lora_A = nn.Parameter(A.to(base.weight.device))  # (4, 64)
        self.lora_B = nn.Parameter(B.to(base.weight.device))  # (48, 4)
        base.requires_grad_(False)  # last, so that a refused layer is left as it was

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A and B at the start; the rank is the first dimension of A and the second of B."""
        raise NotImplementedError(f"{type(self).__name__} must say how its factors start, in init_factors.")

    @property
    def rank(self) -> int:
        """The inner dimension r of the update."""
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        """What the update B A is multiplied by."""
        return self.alpha / self.rank

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update of the weight, ``scaling * B @ A``, in the weight's shape: (out, in), without a graph.

        A kind of layer with another update overrides ``_delta``, which keeps the graph.
        """
        return self._delta()

    def _delta(self) -> Tensor:
        return self.scaling * (self.lora_B @ self.lora_A)  # (48, 4) @ (4, 64) -> (48, 64)

    @property
    def weight(self) -> Tensor:
        """W0 + update, with autograd's graph, for parent modules that read a layer's weight and never call the layer.

        ``nn.MultiheadAttention`` and the fast path of ``nn.TransformerEncoderLayer`` do.
        """
        return (self.base.weight + self._delta()).to(self.base.weight.dtype)  # (48, 64)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, which no adapter changes."""
        return self.base.bias  # (48,)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A new layer of the base's own class, frozen, that computes the same function; this layer stays as it is."""
        plain = copy.deepcopy(self.base, {id(self.base.weight): self.base.weight})  # shares W0
        plain.weight = nn.Parameter(self.weight)  # (48, 64)
        return plain.requires_grad_(False).train(self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"


class LoRALinear(LoRALayer):
    """A frozen ``nn.Linear`` with a trainable update ``scaling * B @ A`` beside it.

    A is drawn as ``nn.Linear`` draws its weight (kaiming-uniform with a = sqrt(5), which is uniform
    in +-1/sqrt(in); the paper says Gaussian, its released code does this), B is zero. A and B are
    kept in float32 under a half-precision base, because their updates are too small for it.

    Args: as for :class:`LoRALayer`.
    """

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A (rank, in), uniform, and B (out, rank), zero."""
        A = uniform(rank, self.base.in_features, self.base.weight.dtype, generator)  # (4, 64)
        return A, torch.zeros(self.base.out_features, rank, dtype=A.dtype)  # (48, 4)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (32, 64) -> (32, 48)
        narrow = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (32, 64) -> (32, 4)
        update = F.linear(narrow, self.lora_B) * self.scaling  # (32, 4) -> (32, 48)
        return frozen + update.to(frozen.dtype)  # (32, 48)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A new ``nn.Linear``, or of the base's class if that derives from it, frozen, that computes the same."""
        if isinstance(self.base, nn.Linear) and type(self.base) is not nn.Linear:
            return super().merged()
        plain = nn.Linear(self.base.in_features, self.base.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight)  # (48, 64)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone())  # (48,)
        return plain.requires_grad_(False).train(self.training)


def uniform(rank: int, width: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """A fresh A (rank, width), uniform in +-1/sqrt(width), in ``dtype``, but in float32 at least."""
    A = torch.empty(rank, width, dtype=torch.promote_types(dtype, torch.float32))  # (4, 64)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # (4, 64)


def check_numbers(rank: int, alpha: float = 1.0, dropout: float = 0.0) -> None:
    """Raise ValueError for a rank, alpha or dropout that makes no sense."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}, but it must be a whole number of at least 1, such as 8.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha!r}, but it must be a positive number, such as 16.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout!r}, but it must lie in [0, 1), such as 0.05.")
