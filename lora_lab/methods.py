"""Training methods: full fine-tuning, LoRA, ... ``fit`` is the same for all; only the method differs.

A method is a frozen dataclass with a ``name``, ``prepare(model, seed)``, which decides what is trainable (a subclass
writes ``_prepare``), and ``groups(model)``, which returns the trainable parameters as groups for the optimiser.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from lora_lab.inject import LoRAConfig, check_names, inject, lora_layers, require_no_adapters

# Set on a model whose own weights are trained: the name of the method that does so.
MARK = "_lora_lab_method"


@dataclass(frozen=True)
class Method(ABC):
    """Base class of the methods. A subclass has a ``name``, a ``_prepare`` and, as a frozen dataclass, its options."""

    name: ClassVar[str]
    # False for what trains what is already there: AsItIs, ContinueLoRA.
    needs_fresh_model: ClassVar[bool] = True

    def prepare(self, model: nn.Module, seed: int) -> None:
        """Prepare ``model`` for training, in place.

        If the method trains the model's own weights, a private attribute records that, so that a second fit on the
        changed weights is refused. Adapters are their own evidence.

        Args:
            seed: of all that the method draws at random.

        Raises:
            ValueError: the model has adapters, has been prepared before, or would have no trainable parameter.
        """
        if self.needs_fresh_model:
            require_unmarked(model)
            require_no_adapters(model)
        self._prepare(model, seed)
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        if not trained:
            raise ValueError(f"Method {self.name!r} leaves no parameter of this model to train.")
        adapters = {parameter for layer in lora_layers(model).values() for parameter in layer.parameters(recurse=False)}
        if self.needs_fresh_model and trained - adapters:
            setattr(model, MARK, self.name)

    @abstractmethod
    def _prepare(self, model: nn.Module, seed: int) -> None:
        """Freeze what is not trained, and add adapters if the method has any."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups; by default one group of all trainable parameters.

        A group may have an entry ``lr_factor``, which multiplies the learning rate.
        """
        return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]

    def settings(self) -> dict[str, Any]:
        """Return the method as plain data, for a History or a record: as a file of JSON would give it back."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"name": self.name, **fields}


def require_unmarked(model: nn.Module) -> None:
    """Raise ValueError if a method has trained weights of the model's own, which are then not the pre-trained ones."""
    if mark := getattr(model, MARK, None):
        raise ValueError(
            f"The model has already been prepared for {mark!r}, which changes its weights; start from a freshly loaded "
            "model (to go on from these weights, run fresh.load_state_dict(model.state_dict()) on that)."
        )


class FullFineTuning(Method):
    """Train every parameter."""

    name = "full"

    def _prepare(self, model: nn.Module, seed: int) -> None:
        _check_trainable(model)
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
                raise ValueError(f"The model has no module {name!r}; its top level is {[*model._modules]}.")
        trained = nn.ModuleList(modules[name] for name in self.modules)
        _check_trainable(trained)
        _check_unshared(modules, self.modules)
        if not [*trained.parameters()]:
            raise ValueError(f"modules is {list(self.modules)}, which have no parameter to train.")
        model.requires_grad_(False)
        trained.requires_grad_(True)


class AsItIs(Method):
    """Train the parameters that already require gradients: for measuring models that another library has prepared."""

    name = "as it is"
    needs_fresh_model = False

    def _prepare(self, model: nn.Module, seed: int) -> None:
        """Leave the model as it is."""


class ContinueLoRA(Method):
    """Train the adapters that the model already has, of whatever kind they are, and freeze everything else.

    They may come from :func:`lora_lab.load_adapter`, from an earlier ``fit``, or from
    :func:`lora_lab.adapters.combine`. A of LoRA-FA stays frozen, unless a file lies between: files of PEFT know
    LoRA-FA as plain LoRA. The optimiser starts anew. For a run that was only interrupted, pass ``fit`` a
    ``checkpoint_dir`` instead: it then continues bit for bit.
    """

    name = "continue"
    needs_fresh_model = False

    def _prepare(self, model: nn.Module, seed: int) -> None:
        layers = lora_layers(model)
        if not layers:
            raise ValueError("The model has no adapters to continue; put them on by load_adapter, or use LoRA(...).")
        model.requires_grad_(False)
        for layer in layers.values():
            for name, parameter in layer.named_parameters(recurse=False):
                parameter.requires_grad_(name not in layer.fixed)


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


def _check_trainable(module: nn.Module) -> None:
    if not all(parameter.is_floating_point() for parameter in module.parameters()):
        raise ValueError("The weights to train are quantised blocks, which have no gradient; use a LoRA method.")


@dataclass(frozen=True)
class LoRA(LoRAConfig, Method):
    """Freeze the model and train low-rank updates of its layers (see ``lora_lab.lora``).

    A variant is a subclass with a ``name`` of its own, by which commands know it: see ``lora_lab.variants``.

    Args: as for :class:`lora_lab.LoRAConfig`.
    """

    name: ClassVar[str] = "lora"
    peft: ClassVar[str | None] = None  # PEFT's setting, such as "use_dora"; None: saved as plain LoRA, or refused
    by_name: ClassVar[dict[str, type[LoRA]]] = {}  # LoRA and its variants, which register themselves

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            LoRA.by_name[cls.name] = cls

    def _prepare(self, model: nn.Module, seed: int) -> None:
        inject(model, self, seed)  # it is a LoRAConfig too


LoRA.by_name[LoRA.name] = LoRA
