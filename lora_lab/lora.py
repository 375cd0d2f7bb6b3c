r"""LoRA: a frozen linear layer plus a small trainable update of low rank.

    h = W0 x + scaling * B A x,    scaling = alpha / rank        (Hu et al. 2021, equation 3)

W0 (out, in) is frozen. Only A (rank, in) and B (out, rank) are trained, that is
rank * (in + out) numbers in place of in * out. B starts at zero, so the adapted model
starts as the pre-trained one, bit for bit.

Shapes in the comments follow one running example: a batch of 32, in = 64, out = 48, rank = 4.

Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.targets import find, register


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, and how strongly.

    Args:
        rank: inner dimension r of the update B A, at least 1.
        alpha: strength; the update is multiplied by ``alpha / rank``.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1).
        targets: "all-linear", or module names or endings of names, such as ``["q_proj", "v_proj"]``.
        exclude: names or endings of names that "all-linear" leaves alone.

    Raises:
        ValueError: a value is out of range, or a list of names is empty.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}, but it must be a whole number of at least 1, such as 8.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha!r}, but it must be a positive number, such as 16.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout!r}, but it must lie in [0, 1), such as 0.05.")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise ValueError(
                f"targets is {self.targets!r}, but it must be 'all-linear' or a list of names; "
                f"write [{self.targets!r}] for one name."
            )
        if isinstance(self.exclude, str):
            raise ValueError(f"exclude is {self.exclude!r}, but it must be a list of names; write [{self.exclude!r}].")
        if not self.targets:
            raise ValueError("targets is empty, so nothing would be adapted; name at least one layer or 'all-linear'.")


class LoRALayer(nn.Module):
    """What adapted layers of every kind share: a frozen base, the factors A and B, and their scaling.

    :class:`LoRALinear` below is the one to read; ``lora_lab.layers`` has embeddings and convolutions.

    Args:
        base: the layer to adapt. It is kept as ``base`` and frozen.
        A, B: the factors; the rank is the first dimension of A and the second of B.
        alpha, dropout: as in :class:`LoRAConfig`.
    """

    parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")  # the tensors that make up an adapter

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.alpha = alpha
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A = nn.Parameter(A.to(base.weight.device))  # (4, 64)
        self.lora_B = nn.Parameter(B.to(base.weight.device))  # (48, 4)

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
        """The update of the weight, ``scaling * B @ A``, in the weight's shape: (out, in)."""
        return self._delta()

    def _delta(self) -> Tensor:
        return self.scaling * (self.lora_B @ self.lora_A)  # (48, 4) @ (4, 64) -> (48, 64)

    @property
    def weight(self) -> Tensor:
        """The adapted weight, with its graph: some parents read it and never call the layer.

        ``nn.MultiheadAttention`` and the fast path of ``nn.TransformerEncoderLayer`` do.
        """
        return (self.base.weight + self._delta()).to(self.base.weight.dtype)  # (48, 64)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, which no adapter changes."""
        return self.base.bias  # (48,)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"


class LoRALinear(LoRALayer):
    """A frozen ``nn.Linear`` with a trainable update ``scaling * B @ A`` beside it.

    A is drawn as ``nn.Linear`` draws its weight (kaiming-uniform with a = sqrt(5), which is uniform
    in +-1/sqrt(in); the paper says Gaussian, its released code does this), B is zero. A and B are
    kept in float32 under a half-precision base, because their updates are too small for it.

    Args:
        base: the layer to adapt. It is kept as ``base`` and frozen.
        rank, alpha, dropout: as in :class:`LoRAConfig`.
        generator: a CPU generator to draw A from; the same one gives the same A on every device.

    Raises:
        ValueError: rank, alpha or dropout is out of range.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        LoRAConfig(rank, alpha, dropout)  # checks the numbers
        A = draw_A(rank, base.in_features, base.weight.dtype, generator)  # (4, 64)
        B = torch.zeros(base.out_features, rank, dtype=A.dtype)  # (48, 4)
        super().__init__(base, A, B, alpha, dropout)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (32, 64) -> (32, 48)
        narrow = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (32, 64) -> (32, 4)
        update = F.linear(narrow, self.lora_B) * self.scaling  # (32, 4) -> (32, 48)
        return frozen + update.to(frozen.dtype)  # (32, 48)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new ``nn.Linear``, frozen, that computes the same function; this layer stays as it is.

        It is of the base's own class if that is derived from ``nn.Linear``, for such a class may round in its own way.
        """
        if isinstance(self.base, nn.Linear) and type(self.base) is not nn.Linear:
            plain = copy.deepcopy(self.base, {id(tensor): tensor for tensor in self.base.parameters()})
        else:
            plain = nn.Linear(self.base.in_features, self.base.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight)  # (48, 64)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone())  # (48,)
        return plain.requires_grad_(False).train(self.training)


def draw_A(rank: int, width: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """A fresh A (rank, width), uniform in +-1/sqrt(width), in float32 or what is finer of ``dtype``."""
    A = torch.empty(rank, width, dtype=torch.promote_types(dtype, torch.float32))  # (4, 64)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # (4, 64)


register(nn.Linear, LoRALinear, linear=True)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of ``model`` by name, in the model's own order (empty if there are none)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def inject(model: nn.Module, config: LoRAConfig, seed: int = 0, layer: type[LoRALayer] | None = None) -> list[str]:
    """Freeze ``model`` and put an adapter on each layer that ``config`` names, in place.

    "all-linear" means every linear layer but the output head (what ``model.get_output_embeddings()``
    returns, if the model has that method) and the names in ``config.exclude``.

    Args:
        seed: seeds a generator of its own, from which every A is drawn in the model's order.
        layer: the class of the adapters, such as a variant of ``lora_lab.variants``; None takes the
            one registered for each kind of layer.

    Returns:
        The names of the layers now adapted.

    Raises:
        ValueError: the model has adapters already, nothing matches, a target matches nothing or
            something that cannot be adapted, or a matched weight belongs to two modules. The
            model is then left as it was.
    """
    check_unadapted(model)
    classes = find(model, config.targets, config.exclude, layer)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    adapted = {}
    try:
        for name, made in classes.items():
            base = model.get_submodule(name)
            adapter = made(base, config.rank, config.alpha, config.dropout, generator)
            adapted[name] = adapter.train(base.training)
    except BaseException:  # an interrupt by the keyboard too
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    model.requires_grad_(False)
    for name, adapter in adapted.items():
        replace(model, name, adapter)
    return list(adapted)


def check_unadapted(model: nn.Module) -> None:
    """Raise ValueError if the model has adapters, because a second set would train on top of the first."""
    if present := lora_layers(model):
        raise ValueError(
            f"The model already has adapters on {len(present)} layers; merge them with merge(model) "
            "or start from a freshly loaded model."
        )


def merge(model: nn.Module) -> list[str]:
    """Replace each adapted layer by its :meth:`LoRALinear.merged` twin, in place, and return their names.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        replace(model, name, layer.merged())
    return list(layers)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that makes up the adapters: ``<layer>.lora_A`` (rank, in), ``.lora_B`` (out, rank), and
    ``.alpha`` and ``.scaling`` ().

    Raises:
        ValueError: the model has no adapters.
    """
    state = {}
    for name, layer in adapted_layers(model).items():
        state |= {f"{name}.{part}": getattr(layer, part).detach().clone() for part in layer.parts}
        for number in ("alpha", "scaling"):  # a variant may make another scaling of the same alpha
            state[f"{name}.{number}"] = torch.tensor(getattr(layer, number), dtype=torch.float64)  # ()
    return state


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """As :func:`lora_layers`, for callers that need some: raises ValueError if there are none."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("The model has no adapters; call inject(model, LoRAConfig(...)) first.")
    return layers


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where the model has the one of that name."""
    if not name:
        raise ValueError(f"The model is itself a {type(model).__name__}; only layers inside a model can be replaced.")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
