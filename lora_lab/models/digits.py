"""Two small nets for experiments that take seconds, on scikit-learn's 8 x 8 pictures of digits.

The lessons make them in float64: in float32 rounding, which differs from processor to processor, grows in training at a
high learning rate until another rate is best.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS, CLASSES = 64, 10


def _match_precision(net: nn.Module, pixels: Tensor) -> Tensor:
    """Return the pixels in the precision of a net's weights; data sets hold them in float32."""
    return pixels.double() if next(net.parameters()).dtype == torch.float64 else pixels


class DigitsMLP(nn.Module):
    """64 pixels -> two hidden layers -> 10 classes.

    Args:
        width: size of both hidden layers.
        seed: of the weights; the global random generator is not used.
        dtype: of the weights and of all that is computed with them; those of another type are other draws.
    """

    def __init__(self, width: int = 128, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.hidden1 = nn.Linear(PIXELS, width, dtype=dtype)
            self.hidden2 = nn.Linear(width, width, dtype=dtype)
            self.head = nn.Linear(width, CLASSES, dtype=dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.hidden1(_match_precision(self, pixels)))  # (32, 64) -> (32, 128)
        x = F.relu(self.hidden2(x))  # (32, 128)
        return self.head(x)  # (32, 10)


class DigitsTransformer(nn.Module):
    """A transformer that reads a digit as 8 tokens, its rows of 8 pixels, with layer names as in a Llama.

    Args:
        width: size of the residual stream; a multiple of ``heads``.
        layers, heads: number of blocks, and of attention heads in each.
        seed, dtype: as for :class:`DigitsMLP`.
    """

    def __init__(
        self, width: int = 48, layers: int = 2, heads: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, but it must be a multiple of heads, {heads}.")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.embed = nn.Linear(8, width, dtype=dtype)
            self.position = nn.Parameter(torch.randn(8, width, dtype=dtype) * 0.02)  # (8, 48)
            self.layers = nn.ModuleList(_Block(width, heads, dtype) for _ in range(layers))
            self.norm = nn.LayerNorm(width, dtype=dtype)
            self.head = nn.Linear(width, CLASSES, dtype=dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = _match_precision(self, pixels).unflatten(-1, (8, 8))  # (32, 64) -> (32, 8, 8)
        x = self.embed(rows) + self.position  # (32, 8, 48)
        for layer in self.layers:
            x = layer(x)  # (32, 8, 48)
        return self.head(self.norm(x).mean(dim=1))  # (32, 10)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, dtype=dtype) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, dtype=dtype) for _ in range(4))
        self.up_proj = nn.Linear(width, 4 * width, dtype=dtype)
        self.down_proj = nn.Linear(4 * width, width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)  # (32, 8, 48)
        query, key, value = (
            projection(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (32, 8, 48) -> (32, 4, 8, 12)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)  # (32, 4, 8, 12)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(-2))  # (32, 8, 48)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm2(x))))  # (32, 8, 48)
