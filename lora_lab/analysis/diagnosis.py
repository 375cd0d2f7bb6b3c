"""Why does my adapter do nothing? :func:`diagnose` checks for the usual mistakes.

    print(diagnose(model, optimizer, base=pretrained))

An adapter that matched no layer, is frozen, received no gradient, is missing from the optimizer or was not filled from
its file raises no error: the model trains, or loads, and computes what its base computes. Most of these mistakes can be
read off the model at any time, both for models adapted by this package and for those of the ``peft`` library, whose
adapter parameters are recognized by their names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lab.inject import lora_layers
from lora_lab.system.wording import short_repr

_PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
# Ours: "<layer>.lora_A". PEFT's: "<layer>.lora_A.<adapter>.weight" and "<layer>.lora_embedding_A.<adapter>".
_FACTOR = re.compile(r"(?:(?P<layer>.+)\.)?lora_(?:embedding_)?(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?(?:\.weight)?")
_PEFT_PREFIX = "base_model.model."
# Values of PEFT's init_lora_weights with which A or B starts at zero, so that an update of zero means an untrained one.
_ZERO_STARTS = (True, False, "gaussian", "eva")

Status = Literal["ok", "problem", "not checked"]
Result = tuple[Status, str]  # of a check: the last two fields of a Finding
Parameters = Mapping[str, nn.Parameter]  # by name


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        check: what was checked, in one word.
        status: "not checked" if an argument that the check needs is missing, there is nothing to check, or what
            there is does not decide.
        text: one sentence: the result and, for a problem, what to do about it.
    """

    check: str
    status: Status
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """The findings of all checks. As text, one line for each."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are problems."""
        return tuple(finding for finding in self.findings if finding.status == "problem")

    @property
    def ok(self) -> bool:
        """Whether the checks that ran found no problem."""
        return not self.problems

    def __str__(self) -> str:
        width = max(len(finding.check) for finding in self.findings)
        return "\n".join(f"{finding.status:<11}  {finding.check:<{width}}  {finding.text}" for finding in self.findings)


@dataclass(frozen=True)
class _Adapter:
    """The factors of one layer's adapter; in PEFT a layer may have several adapters, by name."""

    layer: str
    name: str | None
    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank)

    def __str__(self) -> str:
        layer = repr(self.layer.removeprefix(_PEFT_PREFIX))
        return layer if self.name in (None, "default") else f"{layer}, adapter {self.name!r},"


def diagnose(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    load_report: Any = None,
) -> Diagnosis:
    """Find out why an adapter does nothing, or not what it should. Nothing is changed.

    The checks, in this order: adapters (does the model have any?), trainable (can they be trained?), dtype (is anything
    trained in float16?), optimizer (does it hold the adapters, and nothing of another model?), update (is it still
    zero?), base (do the frozen tensors still have their pre-trained values?), loading (was every adapter tensor filled,
    and every stored tensor used?).

    Args:
        model: a model adapted by this package or by the ``peft`` library.
        optimizer: the optimizer that trains it. Its state also distinguishes a model before its first step from a
            model that has learned nothing.
        base: the pre-trained model, or its state dict, loaded separately: not the one inside ``model``.
        load_report: what ``model.load_state_dict(..., strict=False)`` or peft's ``set_peft_model_state_dict``
            returned.

    Raises:
        ValueError: the optimizer or the base is something else, such as a path.
        TypeError: load_report has no ``missing_keys``.
    """
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise ValueError(f"optimizer is {short_repr(optimizer)}, but it must be the optimizer that trains the model.")
    if not isinstance(base, nn.Module | Mapping | None):
        raise ValueError(f"base is {short_repr(base)}, but it must be the pre-trained model or its state dict.")
    layers = lora_layers(model)
    our_names = {f"{name}.{part}" for name, layer in layers.items() for part in layer.parts}
    parameters = dict(model.named_parameters())
    adapter_parameters = {
        name: parameter
        for name, parameter in parameters.items()
        if name in our_names or not _PARTS.isdisjoint(name.split("."))
    }
    adapters = _pair_factors(adapter_parameters)
    base_prefix = {adapter.layer: "base_layer." for adapter in adapters} | dict.fromkeys(layers, "base.")
    results = {
        "adapters": _check_adapters(model, adapters),
        "trainable": _check_trainable(parameters, adapter_parameters),
        "dtype": _check_dtype(parameters),
        "optimizer": _check_optimizer(parameters, adapter_parameters, optimizer),
        "update": _check_update(model, adapters, optimizer),
        "base": _check_base(model, base_prefix, base),
        "loading": _check_loading(load_report),
    }
    return Diagnosis(tuple(Finding(check, *result) for check, result in results.items()))


def _pair_factors(adapter_parameters: Parameters) -> list[_Adapter]:
    """Return the adapters of which both factors are among these parameters."""
    factors = defaultdict(dict)  # A and B, by layer and name
    for name, parameter in adapter_parameters.items():
        if match := _FACTOR.fullmatch(name):
            factors[match["layer"] or "", match["adapter"]][match["part"]] = parameter
    return [_Adapter(*key, **parts) for key, parts in factors.items() if parts.keys() == {"A", "B"}]


def _count(names: list[str], total: int | None = None) -> str:
    """Return how many names there are, of how many, and the first of them: "2 of 9, such as 'first.weight'"."""
    count = str(len(names)) if total is None else f"{len(names)} of {total}"
    return f"{count}, such as {names[0]!r}" if names else count


def _check_adapters(model: nn.Module, adapters: list[_Adapter]) -> Result:
    if adapters:
        return "ok", f"Layers with adapters: {len({adapter.layer for adapter in adapters})}."
    return "problem", (
        f"This {type(model).__name__} has no adapters: either none were injected, or they were merged; call "
        "inject(model, LoRAConfig(...)), or peft's get_peft_model."
    )


def _check_trainable(parameters: Parameters, adapter_parameters: Parameters) -> Result:
    trainable = {name: parameter.numel() for name, parameter in parameters.items() if parameter.requires_grad}
    outside = [name for name in trainable if name not in adapter_parameters]
    inside = len(trainable) - len(outside)
    counts = (
        f"Trainable tensors in adapters: {inside} of {len(adapter_parameters)}; outside the adapters: "
        f"{_count(outside)}; trainable parameters: {sum(trainable.values()):,}"
    )
    if adapter_parameters and not inside:
        return "problem", (
            f"{counts}; call requires_grad_(True) on the adapters' parameters, or load them with is_trainable=True in "
            "peft (for inference, frozen adapters are fine)."
        )
    if not trainable:
        return "problem", f"{counts}; call requires_grad_(True) on the parameters to train."
    return "ok", f"{counts}."


def _check_dtype(parameters: Parameters) -> Result:
    dtypes = {name: parameter.dtype for name, parameter in parameters.items() if parameter.requires_grad}
    if not dtypes:
        return "not checked", "Nothing is trainable, so there is no dtype to check."
    if half := [name for name, dtype in dtypes.items() if dtype == torch.float16]:
        return "problem", (
            f"Trainable tensors in float16: {_count(half, len(dtypes))}; a GradScaler refuses them and small updates "
            "are lost to rounding, so store them in float32 (parameter.data = parameter.data.float()) and let autocast "
            "compute in float16."
        )
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
    return "ok", f"Trainable tensors are stored in {', '.join(names)}."


def _check_optimizer(parameters: Parameters, adapter_parameters: Parameters, optimizer: Optimizer | None) -> Result:
    if optimizer is None:
        return "not checked", "Pass optimizer= to check that it holds the model's parameters."
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    foreign = held - {id(parameter) for parameter in parameters.values()}
    trainable = [name for name, parameter in adapter_parameters.items() if parameter.requires_grad]
    missing = [name for name in trainable if id(adapter_parameters[name]) not in held]
    counts = (
        f"Adapter tensors that the optimizer lacks: {_count(missing, len(trainable))}; "
        f"tensors that it holds and the model does not: {len(foreign)}"
    )
    if foreign or missing:
        advice = "create the optimizer after inject, load, switch and to(), all of which may replace parameters"
        return "problem", f"{counts}; {advice}."
    return "ok", f"{counts}."


def _check_update(model: nn.Module, adapters: list[_Adapter], optimizer: Optimizer | None) -> Result:
    if not adapters:
        return "not checked", "There is no adapter whose update could be checked."
    buffers = dict(model.named_buffers())
    zero = {str(adapter): reason for adapter in adapters if (reason := _why_zero(adapter, buffers))}
    count = f"Adapters with an update of zero: {len(zero)} of {len(adapters)}"
    if not zero and (starts := _other_starts(model)):
        return "not checked", (
            f"Neither A nor B started at zero (init_lora_weights is {', '.join(starts)}), so their values do not show "
            "whether they were trained."
        )
    if not zero:
        return "ok", f"{count}."
    layer, reason = next(iter(zero.items()))
    count += f" (in {layer} {reason})"
    if optimizer is not None and not any(state.get("step", 1) > 0 for state in optimizer.state.values() if state):
        return "not checked", (
            f"{count}, as expected before training: the optimizer has not taken a step yet; check again after one."
        )
    return "problem", (
        f"{count}, so the model computes what its base computes, which is right only before training; check that "
        "gradients reach the adapters (a checkpoint needs use_reentrant=False, or inputs that require gradients), or "
        "that the names in the loaded file match the model's."
    )


def _why_zero(adapter: _Adapter, buffers: dict[str, Tensor]) -> str:
    """Return why the update of a layer is zero, or "" if it is not."""
    A, B = adapter.A, adapter.B
    if A.is_meta or B.is_meta:
        return "A or B is on the meta device, where it has no values"
    if f"{adapter.layer}.start_A" in buffers:  # our PiSSA, of which neither factor starts at zero
        start_A, start_B = buffers[f"{adapter.layer}.start_A"], buffers[f"{adapter.layer}.start_B"]
        return "A and B are equal to their start" if torch.equal(A, start_A) and torch.equal(B, start_B) else ""
    if not B.any():
        return "B is all zeros"
    if not A.any():
        return "A is all zeros"
    return ""


def _other_starts(model: nn.Module) -> list[str]:
    """Return the ``init_lora_weights`` of PEFT's configs with which neither A nor B starts at zero."""
    starts = [getattr(config, "init_lora_weights", True) for config in getattr(model, "peft_config", {}).values()]
    return sorted({str(start) for start in starts if start not in _ZERO_STARTS})


# What a frozen tensor may be beside the base's: the status of the check, and the text after the count.
_BESIDE_BASE: dict[str, Result] = {
    "differ from base": (
        "problem",
        "a saved adapter would not reproduce this model, so start again from a freshly loaded base, and merge into "
        "new layers, never in place.",
    ),
    "share base's memory": (
        "not checked",
        "a change would not show, so pass a freshly loaded model, or a deep copy made before training.",
    ),
    "have no counterpart in base": ("not checked", "pass the model that the adapters were injected into."),
}


def _check_base(model: nn.Module, base_prefix: dict[str, str], base: nn.Module | Mapping[str, Tensor] | None) -> Result:
    if base is None:
        return "not checked", "Pass base= to check that the frozen tensors have its values."
    expected = base.state_dict() if isinstance(base, nn.Module) else base
    found = defaultdict(list)
    for name, base_name, tensor in _frozen_tensors(model, base_prefix):
        keys = (base_name, name, name.removeprefix(_PEFT_PREFIX))  # base may have been wrapped in place
        value = next((expected[key] for key in keys if key in expected), None)
        found[_compare_with_base(tensor, value)].append(base_name)
    total = sum(map(len, found.values()))
    for state, (status, advice) in _BESIDE_BASE.items():
        if names := found[state]:
            return status, f"Frozen tensors that {state}: {_count(names, total)}; {advice}"
    if not total:
        return "not checked", "There is no frozen tensor to compare."
    return "ok", f"Frozen tensors equal to base's: {total} of {total}."


def _compare_with_base(tensor: Tensor, value: Tensor | None) -> str:
    """Return a key of :data:`_BESIDE_BASE`, or "equal"."""
    if value is None or value.is_meta or tensor.is_meta:
        return "have no counterpart in base"
    if value.data_ptr() == tensor.data_ptr() and tensor.numel():
        return "share base's memory"
    return "equal" if torch.equal(tensor, value.to(tensor.device, tensor.dtype)) else "differ from base"


def _frozen_tensors(model: nn.Module, base_prefix: dict[str, str]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield name, name in the pre-trained model, and value of every tensor that is neither trained nor an adapter's.

    ``base_prefix`` maps the name of an adapted layer to the name by which it holds the pre-trained one.
    """
    prefixes = {f"{layer}." if layer else "": name for layer, name in base_prefix.items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.requires_grad or ".modules_to_save." in name:
            continue
        base_name, prefix = name, next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None:
            within = prefix + prefixes[prefix]  # where an adapted layer holds the pre-trained one
            if not name.startswith(within):
                continue  # a tensor of the adapter
            base_name = prefix + name.removeprefix(within)
        yield name, base_name.removeprefix(_PEFT_PREFIX).replace(".original_module.", "."), tensor.detach()


def _check_loading(report: Any) -> Result:
    if report is None:
        return "not checked", "Pass load_report= to check that all names matched."
    if not hasattr(report, "missing_keys"):
        raise TypeError(f"load_report is {short_repr(report)}, but it must be what load_state_dict returned.")
    missing = [key for key in report.missing_keys if _PARTS & {*key.split(".")}]
    unexpected = list(report.unexpected_keys)
    counts = f"Adapter tensors not filled: {_count(missing)}; stored tensors not used: {_count(unexpected)}"
    if missing or unexpected:
        return "problem", (
            f"{counts}; the stored names are not this model's, so rename them, or load into the class of model that "
            "the adapter was trained on."
        )
    return "ok", f"{counts}."
