"""LoRA for layers that are not ``nn.Linear``: embeddings, convolutions, GPT-2's Conv1D, attention's output.

Each class says how its layer multiplies by a weight; A, B, scaling and the update are those of
``lora_lab.lora``. A layer of your own joins by ``register(its_class, your_lora_class)``.

Shapes in the comments: 1000 tokens of width 64; a convolution from 3 to 16 channels by windows of
5 x 5 on images of 32 x 32; rank = 4.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.lora import LoRAConfig, LoRALayer, LoRALinear, draw_A
from lora_lab.targets import register

__all__ = ["LoRAConv1D", "LoRAConv2d", "LoRAEmbedding", "LoRAOutProjection", "register"]


class LoRAEmbedding(LoRALayer):
    """A frozen ``nn.Embedding`` whose table gets the update ``scaling * (B @ A).T``.

    Looking a token up is multiplying by a one-hot vector, so A x is a column of A. Here A starts at
    zero and B is drawn from a normal distribution, as in PEFT and in Hu et al.'s code: with A random
    and B zero only the columns of tokens that occur would differ in their start. Dropout has nothing
    to act on, for the input is an index.

    Args: as for :class:`lora_lab.LoRALinear`.

    Raises:
        ValueError: rank, alpha or dropout is out of range, or the table has ``max_norm``, which
            rescales frozen rows at every look-up.
    """

    def __init__(
        self,
        base: nn.Embedding,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        LoRAConfig(rank, alpha, dropout)  # checks the numbers
        if base.max_norm is not None:
            raise ValueError(
                f"An embedding with max_norm={base.max_norm} rescales its frozen rows at every look-up, "
                "so it cannot be adapted; leave it out of targets."
            )
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        A = torch.zeros(rank, base.num_embeddings, dtype=dtype)  # (4, 1000)
        B = torch.randn(base.embedding_dim, rank, dtype=dtype, generator=generator)  # (64, 4)
        super().__init__(base, A, B, alpha, dropout)

    def forward(self, ids: Tensor) -> Tensor:
        frozen = self.base(ids)  # (32,) -> (32, 64)
        narrow = F.embedding(
            ids, self.lora_A.T, self.base.padding_idx, scale_grad_by_freq=self.base.scale_grad_by_freq
        )  # (32,) -> (32, 4)
        update = F.linear(narrow, self.lora_B) * self.scaling  # (32, 4) -> (32, 64)
        return frozen + update.to(frozen.dtype)  # (32, 64)

    def _delta(self) -> Tensor:
        return super()._delta().T  # (64, 1000) -> (1000, 64)

    def merged(self) -> nn.Embedding:
        """A new plain ``nn.Embedding``, frozen, that computes the same function."""
        return _like_base(self)


class LoRAConv2d(LoRALayer):
    """A frozen ``nn.Conv2d`` beside a narrow path: a convolution to ``rank`` channels, then one of 1 x 1.

    The weight (out, in, height, width) is a matrix (out, in * height * width) that multiplies each
    window; ``delta()`` is scaling * B A in that form.

    Args: as for :class:`lora_lab.LoRALinear`.

    Raises:
        ValueError: rank, alpha or dropout is out of range, or the convolution has several groups.
    """

    def __init__(
        self,
        base: nn.Conv2d,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        LoRAConfig(rank, alpha, dropout)  # checks the numbers
        if base.groups != 1:
            raise ValueError(
                f"A convolution with groups={base.groups} is {base.groups} separate ones, and only groups=1 can be "
                "adapted here; leave it out of targets."
            )
        window = base.weight.shape[1:]  # (3, 5, 5)
        A = draw_A(rank, window.numel(), base.weight.dtype, generator).view(rank, *window)  # (4, 3, 5, 5)
        B = torch.zeros(base.out_channels, rank, 1, 1, dtype=A.dtype)  # (16, 4, 1, 1)
        super().__init__(base, A, B, alpha, dropout)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (8, 3, 32, 32) -> (8, 16, 28, 28)
        # By the base's own method, so that stride, padding and its mode are those of the base.
        narrow = self.base._conv_forward(self.dropout(x).to(self.lora_A.dtype), self.lora_A, None)  # (8, 4, 28, 28)
        update = F.conv2d(narrow, self.lora_B) * self.scaling  # (8, 16, 28, 28)
        return frozen + update.to(frozen.dtype)  # (8, 16, 28, 28)

    def _delta(self) -> Tensor:
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)  # (16, 4) @ (4, 75) -> (16, 75)
        return self.scaling * product.view(self.base.weight.shape)  # (16, 3, 5, 5)

    def merged(self) -> nn.Conv2d:
        """A new plain ``nn.Conv2d``, frozen, that computes the same function."""
        return _like_base(self)


class LoRAConv1D(LoRALinear):
    """The linear layer of GPT-2 in transformers, whose weight is stored as (in, out).

    Args: as for :class:`lora_lab.LoRALinear`.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        LoRAConfig(rank, alpha, dropout)  # checks the numbers
        width_in, width_out = base.weight.shape
        A = draw_A(rank, width_in, base.weight.dtype, generator)  # (4, 64)
        B = torch.zeros(width_out, rank, dtype=A.dtype)  # (48, 4)
        LoRALayer.__init__(self, base, A, B, alpha, dropout)

    def _delta(self) -> Tensor:
        return super()._delta().T  # (48, 64) -> (64, 48)

    def merged(self) -> nn.Module:
        """A new plain Conv1D, frozen, that computes the same function."""
        return _like_base(self)


class LoRAOutProjection(LoRALinear):
    """The output projection of ``nn.MultiheadAttention``, which reads its weight and never calls it.

    What it reads is :attr:`lora_lab.LoRALayer.weight`, the adapted one, so the adapter acts and learns.

    Args: as for :class:`lora_lab.LoRALinear`.

    Raises:
        ValueError: dropout is above 0, for nothing would be dropped where only the weight is read.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if dropout > 0:
            raise ValueError(
                f"dropout is {dropout}, but nn.MultiheadAttention reads the weight of its out_proj and never calls "
                "it, so nothing would be dropped; use dropout=0 or exclude ['out_proj']."
            )
        super().__init__(base, rank, alpha, dropout, generator)

    def merged(self) -> nn.Linear:
        """A new plain output projection, frozen, that computes the same function."""
        return _like_base(self)  # of the base's own class, so that it can be adapted again


@torch.no_grad()
def _like_base(layer: LoRALayer) -> nn.Module:
    """A frozen copy of the base with the adapted weight."""
    plain = copy.deepcopy(layer.base)
    plain.weight = nn.Parameter(layer.weight, requires_grad=False)
    return plain


register(nn.Embedding, LoRAEmbedding)
register(nn.Conv2d, LoRAConv2d)
register("transformers.pytorch_utils.Conv1D", LoRAConv1D, linear=True)
register("torch.nn.modules.linear.NonDynamicallyQuantizableLinear", LoRAOutProjection, linear=True)
