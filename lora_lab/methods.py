"""How a model is made ready to train. ``fit`` is the same for all; only this object differs.

A method is a frozen record with a ``name``, ``prepare(model, seed)``, which decides what is trainable,
and ``groups(model)``, which hands the trainable parameters to the optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from lora_lab.inject import LoRAConfig, inject, lora_layers, require_no_adapters
from lora_lab.lora import LoRALayer
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear

MARK = "_lora_lab_method"  # the attribute of a model that says which method made it ready


class Method:
    """What every method shares: the mark that says a model has been made ready, and the optimiser's groups."""

    name: ClassVar[str]

    def prepare(self, model: nn.Module, seed: int) -> None:
        """Make ``model`` ready, in place, and mark it.

        Args:
            seed: for whatever the method draws at random.

        Raises:
            ValueError: the model carries adapters or another method's mark, or nothing would be trained.
        """
        if mark := getattr(model, MARK, None):
            raise ValueError(
                f"The model has already been made ready for {mark!r}; start each run from a freshly loaded model."
            )
        require_no_adapters(model)
        self._prepare(model, seed)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"Method {self.name!r} leaves no parameter of this model to train.")
        setattr(model, MARK, self.name)

    def _prepare(self, model: nn.Module, seed: int) -> None:
        raise TypeError(f"{type(self).__name__} must say how it makes a model ready, in a method _prepare.")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The optimiser's parameter groups: here one, with all that is trainable.

        A group may carry ``lr_factor``, which multiplies the learning rate.
        """
        return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]

    def settings(self) -> dict[str, Any]:
        """The method as plain data, for a History or a record."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Train every parameter."""

    name: ClassVar[str] = "full"

    def _prepare(self, model: nn.Module, seed: int) -> None:
        _check_trainable([model])
        model.requires_grad_(True)


@dataclass(frozen=True)
class PartialFineTuning(Method):
    """Train only the named modules (such as a new head, or the last blocks), and freeze the rest.

    Args:
        modules: exact names, as ``model.named_modules()`` gives them.
    """

    modules: Sequence[str] = ("head",)
    name: ClassVar[str] = "partial"

    def _prepare(self, model: nn.Module, seed: int) -> None:
        known = dict(model.named_modules())
        for name in self.modules:
            if name not in known or not name:
                raise ValueError(f"There is no module {name!r} in this model; the top ones are {[*model._modules]}.")
        _check_trainable([known[name] for name in self.modules])
        model.requires_grad_(False)
        for name in self.modules:
            known[name].requires_grad_(True)


@dataclass(frozen=True)
class AsItIs(Method):
    """Train what already requires gradients: for measuring models that another library has made ready."""

    name: ClassVar[str] = "as it is"

    def prepare(self, model: nn.Module, seed: int) -> None:
        """Change nothing, and check that there is something to train.

        Raises:
            ValueError: no parameter requires a gradient.
        """
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("No parameter of the model requires a gradient, so nothing would be trained.")


def _check_trainable(modules: Sequence[nn.Module]) -> None:
    if any(not parameter.is_floating_point() for module in modules for parameter in module.parameters()):
        raise ValueError(
            "The weights to train are in blocks of bytes, which have no gradient; "
            "use a LoRA method, or load the model without keep_blocks."
        )


@dataclass(frozen=True)
class LoRA(Method):
    """Freeze the model and train low-rank updates of its layers (see ``lora_lab.lora``).

    Args: as for :class:`lora_lab.LoRAConfig`.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()
    name: ClassVar[str] = "lora"
    layer: ClassVar[type[LoRALayer] | None] = None

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> LoRAConfig:
        """The adapter's settings."""
        return LoRAConfig(self.rank, self.alpha, self.dropout, self.targets, self.exclude)

    def _prepare(self, model: nn.Module, seed: int) -> None:
        inject(model, self.config(), seed, layer=self.layer)


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA scaled by alpha / sqrt(rank): see :class:`lora_lab.variants.RsLoRALinear`."""

    name: ClassVar[str] = "rslora"
    layer: ClassVar[type[LoRALayer] | None] = RsLoRALinear


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA that trains B alone: see :class:`lora_lab.variants.LoRAFALinear`."""

    name: ClassVar[str] = "lora-fa"
    layer: ClassVar[type[LoRALayer] | None] = LoRAFALinear


@dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA that starts from the largest singular directions: see :class:`lora_lab.variants.PiSSALinear`.

    ``prepare`` takes an SVD of each layer: 0.15 s for one of 576 x 1536 on two CPU cores.
    """

    name: ClassVar[str] = "pissa"
    layer: ClassVar[type[LoRALayer] | None] = PiSSALinear


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA of the direction, with trained lengths: see :class:`lora_lab.variants.DoRALinear`."""

    name: ClassVar[str] = "dora"
    layer: ClassVar[type[LoRALayer] | None] = DoRALinear


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA+: B learns ``ratio`` times as fast as A.

    In the limit of wide layers one rate for both cannot make A and B each change what the layer gives by as
    much as the other; lr_B / lr_A growing with the width can. ``fit``'s ``lr`` is A's. An adapted embedding's B
    takes the ratio too, though the theory is of linear layers.

    Reference: Hayou et al. 2024, arXiv 2402.12354, section 4, theorem 1; the ratio: section 5.3.

    Args:
        ratio: lr_B / lr_A, positive. The paper found about 16 best for RoBERTa where A starts at zero, 4 to 8
            where B does, as here, and 2 to 4 for Llama: a number to tune.
    """

    ratio: float = 4.0
    name: ClassVar[str] = "lora+"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            raise ValueError(f"ratio is {self.ratio!r}, but it must be a positive number, such as 4.")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Two groups: every A, and every B with the ratio as its ``lr_factor``."""
        layers = lora_layers(model, required=True).values()
        return [
            {"params": [layer.lora_A for layer in layers]},
            {"params": [layer.lora_B for layer in layers], "lr_factor": self.ratio},
        ]
