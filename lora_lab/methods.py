"""Training methods: full fine-tuning, LoRA and its variants. ``fit`` is the same for all; only the method differs.

A method is a frozen dataclass with a ``name``, ``prepare(model, seed)``, which decides what is trainable,
and ``groups(model)``, which returns the trainable parameters as groups for the optimiser.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from lora_lab.inject import LoRAConfig, check_names, inject, lora_layers, require_no_adapters
from lora_lab.lora import LoRALayer
from lora_lab.system.schema import Positive, check
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear

MARK = "_lora_lab_method"  # the attribute of a model whose own weights a method trains: that method's name


@dataclass(frozen=True)
class Method(ABC):
    """Base class of the methods. A subclass is a frozen dataclass with a ``name`` and a ``_prepare``."""

    name: ClassVar[str]

    def prepare(self, model: nn.Module, seed: int) -> None:
        """Prepare ``model`` for training, in place.

        It is marked if weights of its own are trained. Adapters need no mark: they are there until they are merged.

        Args:
            seed: of all that the method draws at random.

        Raises:
            ValueError: the model has adapters, has been prepared before, or would have no trainable parameter.
        """
        require_unmarked(model)
        require_no_adapters(model)
        self._prepare(model, seed)
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        if not trained:
            raise ValueError(f"Method {self.name!r} leaves no parameter of this model to train.")
        if trained - {parameter for layer in lora_layers(model).values() for parameter in layer.parameters(False)}:
            setattr(model, MARK, self.name)

    @abstractmethod
    def _prepare(self, model: nn.Module, seed: int) -> None:
        """Freeze what is not trained, and add adapters if the method has any."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The optimiser's parameter groups; by default one group of all trainable parameters.

        A group may have an entry ``lr_factor``, which multiplies the learning rate.
        """
        return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]

    def settings(self) -> dict[str, Any]:
        """The method as plain data, for a History or a record: as a file of JSON would give it back."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"name": self.name, **fields}


def require_unmarked(model: nn.Module) -> None:
    """Raise ValueError if a method has trained weights of the model's own, which are then not the pre-trained ones."""
    if mark := getattr(model, MARK, None):
        raise ValueError(
            f"The model has already been prepared for {mark!r}, which changes its weights; start each run from a "
            "freshly loaded model, and to train these weights further, load them into one: "
            "fresh.load_state_dict(model.state_dict())."
        )


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Train every parameter."""

    name: ClassVar[str] = "full"

    def _prepare(self, model: nn.Module, seed: int) -> None:
        _check_trainable([model])
        model.requires_grad_(True)


@dataclass(frozen=True)
class PartialFineTuning(Method):
    """Train only the named modules, such as a new head or the last blocks, and freeze all others.

    Args:
        modules: exact names, as in ``model.named_modules()``. Of modules that share a weight, such as a tied head and
            embedding, all must be named, or none.
    """

    modules: Sequence[str] = ("head",)
    name: ClassVar[str] = "partial"

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", check_names("modules", self.modules))

    def _prepare(self, model: nn.Module, seed: int) -> None:
        modules = dict(model.named_modules())
        for name in self.modules:
            if name not in modules or not name:
                raise ValueError(
                    f"The model has no module {name!r}; choose names from model.named_modules(), whose top level is "
                    f"{[*model._modules]}."
                )
        _check_trainable([modules[name] for name in self.modules])
        _check_unshared(modules, self.modules)
        model.requires_grad_(False)
        for name in self.modules:
            modules[name].requires_grad_(True)


@dataclass(frozen=True)
class AsItIs(Method):
    """Train the parameters that already require gradients: for measuring models that another library has prepared."""

    name: ClassVar[str] = "as it is"

    def prepare(self, model: nn.Module, seed: int) -> None:
        """Check that a parameter is trainable, and leave the model unchanged and unmarked.

        Raises:
            ValueError: no parameter requires a gradient.
        """
        self._prepare(model, seed)

    def _prepare(self, model: nn.Module, seed: int) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("No parameter of the model requires a gradient, so nothing would be trained.")


@dataclass(frozen=True)
class ContinueLoRA(Method):
    """Train the adapters that the model already has, of whatever kind they are, and freeze everything else.

    They may come from :func:`lora_lab.load_adapter`, from an earlier ``fit``, or from
    :func:`lora_lab.adapters.combine`. The optimiser starts anew. For a run that was only interrupted, pass ``fit`` a
    ``checkpoint_dir`` instead: it then continues bit for bit.
    """

    name: ClassVar[str] = "continue"

    def prepare(self, model: nn.Module, seed: int) -> None:
        """Freeze everything but the adapters, in place; A of LoRA-FA stays frozen, because it is that method's point.

        Raises:
            ValueError: the model has no adapters.
        """
        self._prepare(model, seed)

    def _prepare(self, model: nn.Module, seed: int) -> None:
        layers = lora_layers(model)
        if not layers:
            raise ValueError(
                "The model has no adapters to continue; put some on it with load_adapter(model, folder), or start new "
                "ones with LoRA(...)."
            )
        model.requires_grad_(False)
        for layer in layers.values():
            for name, parameter in layer.named_parameters(recurse=False):
                parameter.requires_grad_(not (isinstance(layer, LoRAFALinear) and name == "lora_A"))


def _check_unshared(modules: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    """Raise ValueError if a module outside the named ones has one of their parameters, and so would be trained too."""
    named = {module for name in names for module in modules[name].modules()}
    owners = {parameter: name for name in names for parameter in modules[name].parameters()}
    for other, module in modules.items():
        if module not in named and (shared := owners.keys() & set(module.parameters(recurse=False))):
            raise ValueError(
                f"{owners[shared.pop()]!r} shares a weight with {other!r}, so training one trains the other; name both "
                "in modules, or neither."
            )


def _check_trainable(modules: Sequence[nn.Module]) -> None:
    if any(not parameter.is_floating_point() for module in modules for parameter in module.parameters()):
        raise ValueError(
            "The weights to train are quantised blocks, which have no gradient; "
            "use a LoRA method, or load the model without keep_blocks."
        )


@dataclass(frozen=True)
class LoRA(LoRAConfig, Method):
    """Freeze the model and train low-rank updates of its layers (see ``lora_lab.lora``).

    Args: as for :class:`lora_lab.LoRAConfig`.
    """

    name: ClassVar[str] = "lora"

    def _prepare(self, model: nn.Module, seed: int) -> None:
        inject(model, self, seed)


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA scaled by alpha / sqrt(rank): see :class:`lora_lab.variants.RsLoRALinear`."""

    name: ClassVar[str] = "rslora"
    layer: ClassVar[type[LoRALayer] | None] = RsLoRALinear


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA that trains only B: see :class:`lora_lab.variants.LoRAFALinear`."""

    name: ClassVar[str] = "lora-fa"
    layer: ClassVar[type[LoRALayer] | None] = LoRAFALinear


@dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA that starts from the leading singular directions: see :class:`lora_lab.variants.PiSSALinear`.

    ``prepare`` computes the SVD of each layer: 0.15 s for a layer of 576 x 1536 on two CPU cores.
    """

    name: ClassVar[str] = "pissa"
    layer: ClassVar[type[LoRALayer] | None] = PiSSALinear


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA of each row's direction, with a trained length: see :class:`lora_lab.variants.DoRALinear`."""

    name: ClassVar[str] = "dora"
    layer: ClassVar[type[LoRALayer] | None] = DoRALinear


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA+: the learning rate of B is ``ratio`` times that of A.

    In the limit of wide layers, updates of A and of B change the layer's output by amounts of the same order only
    if lr_B / lr_A grows with the width. ``fit``'s ``lr`` is the rate of A. The ratio applies to an adapted
    embedding's B too, although the theory covers linear layers only.

    Reference: Hayou et al. 2024, arXiv 2402.12354, section 4, theorem 1; the ratio: section 5.3.

    Args:
        ratio: lr_B / lr_A, positive; to be tuned. The paper reports as best about 16 for RoBERTa if A starts at
            zero, 4 to 8 if B starts at zero, as here, and 2 to 4 for Llama.
    """

    ratio: float = 4.0
    name: ClassVar[str] = "lora+"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ratio", check(self.ratio, Positive, "ratio"))

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Two groups: every A, and every B with ``ratio`` as its ``lr_factor``."""
        layers = lora_layers(model, required=True).values()
        return [
            {"params": [layer.lora_A for layer in layers]},
            {"params": [layer.lora_B for layer in layers], "lr_factor": self.ratio},
        ]


# The LoRA methods that commands know by name.
LORA_METHODS: dict[str, type[LoRA]] = {kind.name: kind for kind in (LoRA, RsLoRA, LoRAFA, LoRAPlus, PiSSA, DoRA)}
