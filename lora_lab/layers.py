"""LoRA for layers that are not ``nn.Linear``: embeddings, convolutions, GPT-2's Conv1D, attention's output.

Each class defines the initial factors, the forward pass, and ``_delta`` if its weight is not (out, in); all else is
inherited from ``lora_lab.lora``. ``register(layer_class, lora_class)`` adds a kind of layer. A kind whose weight is
stored in fewer bits derives from :class:`QuantizedLayer`, so that ``merge`` can quantise its merged weight again.

Shapes in the comments: a vocabulary of 1000 tokens, width 64; a convolution from 3 to 16 channels
with a 5 x 5 kernel on 8 images of 32 x 32; rank = 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lora_lab.lora import LoRALayer, LoRALinear, uniform


class LoRAEmbedding(LoRALayer):
    """A frozen ``nn.Embedding`` plus the update ``scaling * (B @ A).T`` of its table.

    Looking up a token multiplies by a one-hot vector, so A x is a column of A. Here A starts at zero
    and B is drawn from a normal distribution, as in PEFT and in Hu et al.'s code, so that training changes
    only the tokens that it sees: with a random A, B's first step would move every token, each by its own
    random column. Dropout has no effect, because the input is an index.

    Args: as for :class:`lora_lab.LoRALinear`.

    Raises:
        ValueError: rank, alpha or dropout is out of range, or the table has ``max_norm``, which
            rescales frozen rows at every look-up.
    """

    base: nn.Embedding

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the factors A (rank, tokens), zero, and B (width, rank), normal."""
        if self.base.max_norm is not None:
            raise ValueError(
                f"An embedding with max_norm={self.base.max_norm} cannot be adapted, because it rescales frozen rows "
                "at every look-up; leave it out of targets."
            )
        dtype = torch.promote_types(self.base.weight.dtype, torch.float32)
        A = torch.zeros(rank, self.base.num_embeddings, dtype=dtype)  # (4, 1000)
        B = torch.randn(self.base.embedding_dim, rank, dtype=dtype, generator=generator)  # (64, 4)
        return A, B

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
    """A frozen ``nn.Conv2d`` plus a low-rank path: a convolution to ``rank`` channels, then a 1 x 1 convolution.

    A convolution multiplies each window of its input by the weight (out, in, height, width) as a matrix
    (out, in * height * width); ``delta()`` is scaling * B A in the shape of the weight.

    Args: as for :class:`lora_lab.LoRALinear`.

    Raises:
        ValueError: rank, alpha or dropout is out of range, or the convolution has several groups.
    """

    base: nn.Conv2d

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the factors A (rank, in, height, width), uniform, and B (out, rank, 1, 1), zero."""
        if self.base.groups != 1:
            raise ValueError(
                f"A convolution with groups={self.base.groups} cannot be adapted, only one with groups=1, because A "
                "reads every input channel; leave it out of targets."
            )
        window = self.base.weight.shape[1:]  # (3, 5, 5)
        A = uniform(rank, window.numel(), self.base.weight.dtype, generator)  # (4, 75)
        B = torch.zeros(self.base.out_channels, rank, 1, 1, dtype=A.dtype)  # (16, 4, 1, 1)
        return A.view(rank, *window), B  # (4, 3, 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (8, 3, 32, 32) -> (8, 16, 28, 28)
        # The base's method, so that stride, padding and padding mode are the base's.
        narrow = self.base._conv_forward(self.dropout(x).to(self.lora_A.dtype), self.lora_A, None)  # (8, 4, 28, 28)
        update = F.conv2d(narrow, self.lora_B) * self.scaling  # (8, 16, 28, 28)
        return frozen + update.to(frozen.dtype)  # (8, 16, 28, 28)

    def _delta(self) -> Tensor:
        update = self.lora_B.flatten(1) @ self.lora_A.flatten(1)  # (16, 4) @ (4, 75) -> (16, 75)
        return self.scaling * update.view(self.base.weight.shape)  # (16, 3, 5, 5)


class LoRAConv1D(LoRALinear):
    """The linear layer of GPT-2 in transformers, whose weight is stored as (in, out).

    Args: as for :class:`lora_lab.LoRALinear`.
    """

    merged = LoRALayer.merged  # a layer of the base's class, which is not derived from nn.Linear

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the factors A (rank, in), uniform, and B (out, rank), zero."""
        width_in, width_out = self.base.weight.shape
        A = uniform(rank, width_in, self.base.weight.dtype, generator)  # (4, 64)
        return A, torch.zeros(width_out, rank, dtype=A.dtype)  # (48, 4)

    def _delta(self) -> Tensor:
        return super()._delta().T  # (48, 64) -> (64, 48)


class LoRAOutProjection(LoRALinear):
    """The output projection of ``nn.MultiheadAttention``, which reads the projection's weight and never calls it.

    It reads :attr:`lora_lab.LoRALayer.weight`, W0 plus the update, so the adapter takes effect and is trained.

    Args: as for :class:`lora_lab.LoRALinear`.

    Raises:
        ValueError: dropout is above 0, which has no effect where only the weight is read.
    """

    def init_factors(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the factors of a linear layer."""
        if isinstance(self.dropout, nn.Dropout):
            raise ValueError(
                f"dropout is {self.dropout.p}, but nn.MultiheadAttention never calls its out_proj, so nothing would "
                "be dropped; use dropout=0 or exclude ['out_proj']."
            )
        return super().init_factors(rank, generator)


class QuantizedLayer(nn.Module):
    """A frozen layer whose weight is stored in fewer bits, and dequantised where it is used.

    A subclass has the ``shape`` (out, in) and the ``dtype`` of the dequantised matrix as attributes, and defines
    ``weight``, that matrix, and :meth:`requantize`: see ``lora_lab.models.quantize.BlockWeight``.
    """

    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The dequantised matrix, (48, 64)."""
        raise NotImplementedError(f"{type(self).__name__} must define weight, the dequantised matrix.")

    def requantize(self, weight: Tensor) -> QuantizedLayer:
        """Return a new frozen layer like this one, in the same format, with another matrix; this layer does not change.

        Args:
            weight: (48, 64), in floating point.
        """
        raise NotImplementedError(f"{type(self).__name__} must define requantize, which stores another matrix.")


# Which class adapts which kind of layer


class _Entry(NamedTuple):
    lora_class: type[LoRALayer]
    linear: bool


_REGISTERED: dict[str, _Entry] = {}  # by the full name of the class that is adapted


def register(base_class: type[nn.Module] | str, lora_class: type[LoRALayer], linear: bool = False) -> None:
    """Let ``inject`` put ``lora_class`` on layers whose class is exactly ``base_class``.

    A subclass of ``nn.Linear`` counts as ``nn.Linear`` if it inherits the forward pass and holds one plain matrix.
    Others, such as routers and quantised layers, are refused until they are registered.

    Args:
        base_class: a class, or its full name ("transformers.pytorch_utils.Conv1D"), so that its library
            need not be imported.
        lora_class: called with (base, rank, alpha, dropout, generator).
        linear: whether "all-linear" includes such layers.
    """
    name = base_class if isinstance(base_class, str) else _full_name(base_class)
    _REGISTERED[name] = _Entry(lora_class, linear)


def lora_class(base: nn.Module, variant: type[LoRALayer] | None = None) -> type[LoRALayer] | None:
    """Return the class that adapts ``base``, or None if no class does.

    Args:
        variant: a class that replaces the registered one, where it derives from that: DoRALinear adapts ``nn.Linear``
            in place of LoRALinear, and no embedding.
    """
    entry = _entry(base)
    if entry is None:
        return None
    if variant is None:
        return entry.lora_class
    return variant if issubclass(variant, entry.lora_class) else None


def _entry(module: nn.Module) -> _Entry | None:
    entry = _REGISTERED.get(_full_name(type(module)))
    if entry is None and isinstance(module, nn.Linear) and _is_plain_linear(module):
        return _REGISTERED[_full_name(nn.Linear)]
    return entry


def _full_name(layer_class: type) -> str:
    return f"{layer_class.__module__}.{layer_class.__qualname__}"


def _is_plain_linear(layer: nn.Linear) -> bool:
    """Return whether a layer of a subclass of ``nn.Linear`` inherits its forward pass and holds one plain matrix.

    Only then are W0 x its output and W0 + update its merged weight. Other libraries' quantised layers are subclasses
    too, but hold a matrix of a special class or dtype, or scales in addition to it.
    """
    names = {name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]}
    weight: Any = layer._parameters.get("weight")
    return (
        type(layer).forward is nn.Linear.forward
        and names <= {"weight", "bias"}
        and type(weight) in (nn.Parameter, FakeTensor)
        and weight.is_floating_point()
        and weight.itemsize > 1  # numbers of one byte have scales elsewhere
        and weight.shape == (layer.out_features, layer.in_features)
    )


def is_linear(module: nn.Module) -> bool:
    """Return whether "all-linear" includes this layer, provided that it can be adapted."""
    entry = _entry(module)
    return isinstance(module, nn.Linear) if entry is None else entry.linear


register(nn.Linear, LoRALinear, linear=True)
register(nn.Embedding, LoRAEmbedding)
register(nn.Conv2d, LoRAConv2d)
register("transformers.pytorch_utils.Conv1D", LoRAConv1D, linear=True)
register("transformers.models.falcon.modeling_falcon.FalconLinear", LoRALinear, linear=True)
register("torch.nn.modules.linear.NonDynamicallyQuantizableLinear", LoRAOutProjection, linear=True)
