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

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class LoRALinear(nn.Module):
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
        super().__init__()
        LoRAConfig(rank, alpha, dropout)  # checks the numbers
        self.base = base.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        A = torch.empty(rank, base.in_features, dtype=dtype)  # (4, 64)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        B = torch.zeros(base.out_features, rank, dtype=dtype)  # (48, 4)
        self.lora_A = nn.Parameter(A.to(base.weight.device))  # (4, 64)
        self.lora_B = nn.Parameter(B.to(base.weight.device))  # (48, 4)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # (32, 64) -> (32, 48)
        narrow = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (32, 64) -> (32, 4)
        update = F.linear(narrow, self.lora_B) * self.scaling  # (32, 4) -> (32, 48)
        return frozen + update.to(frozen.dtype)  # (32, 48)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update of the weight, ``scaling * B @ A``, of shape (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)  # (48, 4) @ (4, 64) -> (48, 64)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new plain ``nn.Linear``, frozen, that computes the same function; this layer stays as it is."""
        weight = self.base.weight  # (48, 64)
        plain = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None, device="meta")
        plain.weight = nn.Parameter((weight + self.delta()).to(weight.dtype))  # (48, 64)
        if self.base.bias is not None:
            plain.bias = nn.Parameter(self.base.bias.clone())  # (48,)
        return plain.requires_grad_(False).train(self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of ``model`` by name, in the model's own order (empty if there are none)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def inject(model: nn.Module, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Freeze ``model`` and put an adapter on each layer that ``config`` names, in place.

    "all-linear" means every ``nn.Linear`` but the output head (what ``model.get_output_embeddings()``
    returns, if the model has that method) and the names in ``config.exclude``.

    Args:
        seed: seeds a generator of its own, from which every A is drawn in the model's order.

    Returns:
        The names of the layers now adapted.

    Raises:
        ValueError: the model has adapters already, nothing matches, a target matches nothing or
            something that is no ``nn.Linear``, or a matched weight belongs to two modules. The
            model is then left as it was.
    """
    check_unadapted(model)
    names = _find(model, config)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        _replace(
            model, name, LoRALinear(base, config.rank, config.alpha, config.dropout, generator).train(base.training)
        )
    return names


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
    layers = _layers_or_raise(model)
    for name, layer in layers.items():
        _replace(model, name, layer.merged())
    return list(layers)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all adapter tensors: ``<layer>.lora_A`` (rank, in) and ``<layer>.lora_B`` (out, rank).

    Raises:
        ValueError: the model has no adapters.
    """
    return {
        f"{name}.{part}": getattr(layer, part).detach().clone()
        for name, layer in _layers_or_raise(model).items()
        for part in ("lora_A", "lora_B")
    }


def _layers_or_raise(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("The model has no adapters; call inject(model, LoRAConfig(...)) first.")
    return layers


def _find(model: nn.Module, config: LoRAConfig) -> list[str]:
    def matches(name: str, ending: str) -> bool:
        return name == ending or name.endswith("." + ending)

    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if type(module) is nn.Linear]
    if config.targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        names = [
            name
            for name in linear
            if modules[name] is not head and not any(matches(name, ending) for ending in config.exclude)
        ]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no nn.Linear inside it to adapt, "
                f"besides its output head and what exclude={list(config.exclude)} leaves out."
            )
    else:
        for target in config.targets:
            hits = [name for name in modules if matches(name, target)]
            if not hits:
                endings = sorted({name.rpartition(".")[2] for name in linear})
                raise ValueError(f"Target {target!r} matches no module; the linear layers here end in {endings}.")
            if other := [name for name in hits if name not in linear]:
                kind = type(modules[other[0]]).__name__
                raise ValueError(
                    f"Target {target!r} matches {other[0]!r}, a {kind}, but only nn.Linear can be adapted."
                )
        names = [name for name in linear if any(matches(name, target) for target in config.targets)]
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in names:
        if owners[id(modules[name].weight)] > 1:
            raise ValueError(
                f"The weight of {name!r} is shared with another module, so an adapter on one side would "
                "silently leave the other as it was; leave it out of targets."
            )
    return names


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
