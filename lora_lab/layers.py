"""LoRA for layers that are not ``nn.Linear``: embeddings, convolutions, GPT-2's Conv1D, attention's output.

Each class says what its factors are at the start and how they meet the input; all else is
``lora_lab.lora``'s. A layer of your own joins by ``register(its_class, your_lora_class)``.

Shapes in the comments: 1000 tokens of width 64; a convolution from 3 to 16 channels by windows of
5 x 5 on images of 32 x 32; rank = 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn import functional as F

from lora_lab.lora import LoRALayer, LoRALinear, uniform


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

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A (rank, tokens), zero, and B (width, rank), normal."""
        if self.base.max_norm is not None:
            raise ValueError(
                f"An embedding with max_norm={self.base.max_norm} rescales its frozen rows at every look-up, "
                "so it cannot be adapted; leave it out of targets."
            )
        dtype = torch.promote_types(self.base.weight.dtype, torch.float32)
        B = torch.randn(self.base.embedding_dim, rank, dtype=dtype, generator=generator)  # (64, 4)
        return torch.zeros(rank, self.base.num_embeddings, dtype=dtype), B  # (4, 1000)

    def forward(self, ids: Tensor) -> Tensor:
        frozen = self.base(ids)  # (32,) -> (32, 64)
        narrow = F.embedding(
            ids, self.lora_A.T, self.base.padding_idx, scale_grad_by_freq=self.base.scale_grad_by_freq
        )  # (32,) -> (32, 4)
        update = F.linear(narrow, self.lora_B) * self.scaling  # (32, 4) -> (32, 64)
        return frozen + update.to(frozen.dtype)  # (32, 64)

    def _delta(self) -> Tensor:
        return super()._delta().T  # (64, 1000) -> (1000, 64)


class LoRAConv2d(LoRALayer):
    """A frozen ``nn.Conv2d`` beside a narrow path: a convolution to ``rank`` channels, then one of 1 x 1.

    The weight (out, in, height, width) is a matrix (out, in * height * width) that multiplies each
    window; ``delta()`` is scaling * B A in that form.

    Args: as for :class:`lora_lab.LoRALinear`.

    Raises:
        ValueError: rank, alpha or dropout is out of range, or the convolution has several groups.
    """

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A (rank, in, height, width), uniform, and B (out, rank, 1, 1), zero."""
        if self.base.groups != 1:
            raise ValueError(
                f"A convolution with groups={self.base.groups} is {self.base.groups} separate ones, and only groups=1 "
                "can be adapted here; leave it out of targets."
            )
        window = self.base.weight.shape[1:]  # (3, 5, 5)
        A = uniform(rank, window.numel(), self.base.weight.dtype, generator).view(rank, *window)  # (4, 3, 5, 5)
        return A, torch.zeros(self.base.out_channels, rank, 1, 1, dtype=A.dtype)  # (16, 4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (8, 3, 32, 32) -> (8, 16, 28, 28)
        # By the base's own method, so that stride, padding and its mode are those of the base.
        narrow = self.base._conv_forward(self.dropout(x).to(self.lora_A.dtype), self.lora_A, None)  # (8, 4, 28, 28)
        update = F.conv2d(narrow, self.lora_B) * self.scaling  # (8, 16, 28, 28)
        return frozen + update.to(frozen.dtype)  # (8, 16, 28, 28)

    def _delta(self) -> Tensor:
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)  # (16, 4) @ (4, 75) -> (16, 75)
        return self.scaling * product.view(self.base.weight.shape)  # (16, 3, 5, 5)


class LoRAConv1D(LoRALinear):
    """The linear layer of GPT-2 in transformers, whose weight is stored as (in, out).

    Args: as for :class:`lora_lab.LoRALinear`.
    """

    merged = LoRALayer.merged  # of the base's own class, which is no nn.Linear

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A (rank, in), uniform, and B (out, rank), zero."""
        width_in, width_out = self.base.weight.shape
        A = uniform(rank, width_in, self.base.weight.dtype, generator)  # (4, 64)
        return A, torch.zeros(width_out, rank, dtype=A.dtype)  # (48, 4)

    def _delta(self) -> Tensor:
        return super()._delta().T  # (48, 64) -> (64, 48)


class LoRAOutProjection(LoRALinear):
    """The output projection of ``nn.MultiheadAttention``, which reads its weight and never calls it.

    What it reads is :attr:`lora_lab.LoRALayer.weight`, the adapted one, so the adapter acts and learns.

    Args: as for :class:`lora_lab.LoRALinear`.

    Raises:
        ValueError: dropout is above 0, for nothing would be dropped where only the weight is read.
    """

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """As for a linear layer."""
        if isinstance(self.dropout, nn.Dropout):
            raise ValueError(
                f"dropout is {self.dropout.p}, but nn.MultiheadAttention reads the weight of its out_proj and never "
                "calls it, so nothing would be dropped; use dropout=0 or exclude ['out_proj']."
            )
        return super().init_factors(rank, generator)


# Which class adapts which kind of layer


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Entry:
    lora_class: type[nn.Module]
    linear: bool


_REGISTERED: dict[str, _Entry] = {}


def register(base_class: type[nn.Module] | str, lora_class: type[nn.Module], linear: bool = False) -> None:
    """Let ``inject`` put ``lora_class`` on layers whose class is exactly ``base_class``.

    A class derived from ``nn.Linear`` counts as ``nn.Linear``, without being registered, if its layers keep one plain
    matrix W and compute x W^T + b, as Falcon's do. Others, such as routers and quantised layers, are refused.

    Args:
        base_class: a class, or its full name ("transformers.pytorch_utils.Conv1D"), so that its library
            need not be imported.
        lora_class: called with (base, rank, alpha, dropout, generator).
        linear: whether "all-linear" means such layers.
    """
    name = base_class if isinstance(base_class, str) else _full_name(base_class)
    _REGISTERED[name] = _Entry(lora_class, linear)


def lora_class(base: nn.Module, layer: type[nn.Module] | None = None) -> type[nn.Module] | None:
    """The class that adapts ``base``, or None.

    Args:
        layer: a variant, used where it derives from the class registered for the base; other bases then
            have none.
    """
    entry = _entry(base)
    if entry is None:
        return None
    if layer is None:
        return entry.lora_class
    return layer if issubclass(layer, entry.lora_class) else None


def _entry(module: nn.Module) -> _Entry | None:
    entry = _REGISTERED.get(_full_name(type(module)))
    if entry is None and isinstance(module, nn.Linear) and _multiplies(module):
        return _REGISTERED.get(_full_name(nn.Linear))
    return entry


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _multiplies(layer: nn.Linear) -> bool:
    """Whether a layer of a class derived from ``nn.Linear`` has one plain matrix W and computes x W^T + b with it.

    Quantised layers keep a matrix of a class or a dtype of their own, or scales beside it. What a class computes by a
    forward of its own is found by trying, with a small W, for a layer on the meta device has no numbers.
    """
    own = {name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]}
    weight = layer._parameters.get("weight")
    if not own <= {"weight", "bias"} or type(weight) not in (nn.Parameter, FakeTensor):
        return False
    if weight.dtype not in _DTYPES or weight.shape != (layer.out_features, layer.in_features):
        return False
    return type(layer).forward is nn.Linear.forward or _multiplies_small(layer)


@torch.no_grad()
def _multiplies_small(layer: nn.Linear) -> bool:
    with unset_fake_temporarily():
        # Numbers whose products and sums no order and no dtype rounds.
        weight = torch.tensor([[0.5, -2.0, 1.0], [1.5, 0.25, -1.0]], dtype=torch.float32, device="cpu")  # (2, 3)
        bias, x = None if layer.bias is None else weight[:, 0], weight.flip(0)[None]  # (2,), (1, 2, 3)
        small = object.__new__(type(layer))
        small.__dict__ |= vars(layer) | {"in_features": 3, "out_features": 2, "training": False}
        small.__dict__["_parameters"] = {"weight": weight, "bias": bias}
        try:
            found = type(layer).forward(small, x)  # (1, 2, 2)
        except Exception:  # it needs more than a W and a b
            return False
        return type(found) is Tensor and torch.equal(found, F.linear(x, weight, bias))


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means such a layer, if it can be adapted."""
    entry = _entry(module)
    return isinstance(module, nn.Linear) if entry is None else entry.linear


register(nn.Linear, LoRALinear, linear=True)
register(nn.Embedding, LoRAEmbedding)
register(nn.Conv2d, LoRAConv2d)
register("transformers.pytorch_utils.Conv1D", LoRAConv1D, linear=True)
register("torch.nn.modules.linear.NonDynamicallyQuantizableLinear", LoRAOutProjection, linear=True)
