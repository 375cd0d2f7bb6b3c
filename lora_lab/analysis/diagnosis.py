"""Why does my adapter do nothing? :func:`diagnose` looks for the faults that people meet again and again.

    print(diagnose(model, optimizer, base=pretrained))

An adapter that matched no layer, is frozen, was never reached by a gradient, is unknown to the optimiser or
was not filled from its file raises no error: the model trains, or loads, and computes what its base does.
Most of it can be read off the model at any moment, and here is, for our models and for those of the ``peft``
library, whose parameters are known by their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_lab.inject import lora_layers

_PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
# Ours: "<layer>.lora_A". PEFT's: "<layer>.lora_A.<adapter>.weight" and "<layer>.lora_embedding_A.<adapter>".
_FACTOR = re.compile(r"(?:(?P<layer>.+)\.)?lora_(?:embedding_)?(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?(?:\.weight)?")
_PEFT_PREFIX = "base_model.model."
# PEFT's ways of starting A and B by which a changed update is one that is not zero.
_ZERO_STARTS = (True, False, "gaussian", "eva")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        check: what was looked at, in a word.
        status: "not checked" where the check lacks an argument, or has nothing to look at.
        text: one sentence: what was found and, for a problem, what to do.
    """

    check: str
    status: Literal["ok", "problem", "not checked"]
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """The findings of all checks. As text, it has one line for each."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are problems."""
        return tuple(finding for finding in self.findings if finding.status == "problem")

    @property
    def ok(self) -> bool:
        """Whether there is no problem in what was checked."""
        return not self.problems

    def __str__(self) -> str:
        width = max(len(finding.check) for finding in self.findings)
        return "\n".join(f"{found.status:<11}  {found.check:<{width}}  {found.text}" for found in self.findings)


@dataclass(frozen=True)
class _Pair:
    """The factors of one layer's adapter; with PEFT a layer may have several, by name."""

    layer: str
    adapter: str | None
    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank)

    def __str__(self) -> str:
        name = repr(self.layer.removeprefix(_PEFT_PREFIX))
        return name if self.adapter in (None, "default") else f"{name}, adapter {self.adapter!r},"


def diagnose(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    load_report: Any = None,
) -> Diagnosis:
    """Look for what makes an adapter do nothing, or not what it should. Nothing is changed.

    The checks, in this order: adapters (are there any?), trainable (are they?), dtype (float16 among what is
    trained?), optimizer (does it hold the adapters, and nothing of another model?), update (is it still zero?),
    base (does what is frozen still have its pre-trained values?), loading (was every adapter tensor filled,
    and every stored one used?).

    Args:
        model: ours, or one of the ``peft`` library's.
        optimizer: the one that trains it. It also tells a model before its first step from one in which
            nothing was learned.
        base: the pre-trained model, or its state dict, loaded anew: not the one that is inside ``model``.
        load_report: what ``model.load_state_dict(..., strict=False)`` or peft's ``set_peft_model_state_dict``
            returned.

    Raises:
        TypeError: load_report has no ``missing_keys`` and ``unexpected_keys``.
    """
    ours = lora_layers(model)
    own = {f"{name}.{part}" for name, layer in ours.items() for part in layer.parts}
    parameters = dict(model.named_parameters())
    adapters = {name: p for name, p in parameters.items() if name in own or not _PARTS.isdisjoint(name.split("."))}
    pairs = _pairs(adapters)
    inner = {pair.layer: "base_layer." for pair in pairs} | dict.fromkeys(ours, "base.")
    return Diagnosis(
        (
            _adapters(model, pairs),
            _trainable(parameters, adapters),
            _dtype(parameters),
            _optimizer(parameters, adapters, optimizer),
            _update(model, pairs, optimizer),
            _base(model, inner, base),
            _loading(load_report),
        )
    )


def _pairs(adapters: dict[str, nn.Parameter]) -> list[_Pair]:
    found: dict[tuple[str, str | None], dict[str, Tensor]] = {}
    for name, parameter in adapters.items():
        if match := _FACTOR.fullmatch(name):
            found.setdefault((match["layer"] or "", match["adapter"]), {})[match["part"]] = parameter
    return [_Pair(*key, **parts) for key, parts in found.items() if parts.keys() == {"A", "B"}]


def _adapters(model: nn.Module, pairs: list[_Pair]) -> Finding:
    if pairs:
        count = len({pair.layer for pair in pairs})
        return Finding("adapters", "ok", f"{_count(count, 'layer')} of the model {_have(count)} adapters.")
    return Finding(
        "adapters",
        "problem",
        f"This {type(model).__name__} has no adapters: none were put on, or they were merged; call "
        "inject(model, LoRAConfig(...)), or peft's get_peft_model.",
    )


def _trainable(parameters: dict[str, nn.Parameter], adapters: dict[str, nn.Parameter]) -> Finding:
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    others = [name for name in trained if name not in adapters]
    example = f"such as {others[0]!r}" if others else ""
    if trained and (len(others) < len(trained) or not adapters):
        numbers = f"{sum(parameter.numel() for parameter in trained.values()):,} numbers"
        place = f", {len(others)} of them outside the adapters, {example}" if others else ", all of them in adapters"
        found = f"{_count(len(trained), 'parameter')} ({numbers}) can be trained{place if adapters else ''}."
        return Finding("trainable", "ok", found)
    found = f"Only {_count(len(others), 'parameter')} outside the adapters, {example}, can" if others else "Nothing can"
    remedy = "call requires_grad_(True) on what is to be trained."
    if adapters:
        remedy = (
            "call requires_grad_(True) on the adapters' parameters, or load them with is_trainable=True in peft "
            "(for use without training this is as it should be)."
        )
    return Finding("trainable", "problem", f"{found} be trained: {remedy}")


def _dtype(parameters: dict[str, nn.Parameter]) -> Finding:
    trained = {name: parameter.dtype for name, parameter in parameters.items() if parameter.requires_grad}
    if not trained:
        return Finding("dtype", "not checked", "Nothing is trained whose dtype could be looked at.")
    if half := [name for name, dtype in trained.items() if dtype == torch.float16]:
        return Finding(
            "dtype",
            "problem",
            f"{len(half)} of {_count(len(trained), 'trained parameter')} {_have(len(half), 'is', 'are')} in float16, "
            f"such as {half[0]!r}: a GradScaler refuses them and small steps are rounded away, so keep them in float32 "
            "(parameter.data = parameter.data.float()) and let autocast compute in float16.",
        )
    kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in trained.values()}))
    return Finding("dtype", "ok", f"What is trained is kept in {kinds}.")


def _optimizer(
    parameters: dict[str, nn.Parameter],
    adapters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
) -> Finding:
    if optimizer is None:
        return Finding("optimizer", "not checked", "Give optimizer= to see whether it holds the model's parameters.")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    stale = held - {id(parameter) for parameter in parameters.values()}
    needed = [name for name, parameter in adapters.items() if parameter.requires_grad]
    lacking = [name for name in needed if id(adapters[name]) not in held]
    if not stale and not lacking:
        count = _count(len(needed), "trained parameter")
        return Finding("optimizer", "ok", f"It holds the adapters' {count}, and none that the model does not have.")
    found = [f"holds {_count(len(stale), 'parameter')} that the model does not have"] if stale else []
    if lacking:
        found.append(f"lacks {len(lacking)} of the adapters' {len(needed)} trained ones, such as {lacking[0]!r}")
    return Finding(
        "optimizer",
        "problem",
        f"It {', and '.join(found)}: make the optimiser when the model is complete and in its place, after inject, "
        "load, switch and to().",
    )


def _update(model: nn.Module, pairs: list[_Pair], optimizer: torch.optim.Optimizer | None) -> Finding:
    if not pairs:
        return Finding("update", "not checked", "There is no adapter whose update could be looked at.")
    buffers = dict(model.named_buffers())
    zero = {str(pair): why for pair in pairs if (why := _why_zero(pair, buffers))}
    total = _count(len(pairs), "layer" if len(pairs) == len({pair.layer for pair in pairs}) else "adapter")
    if not zero:
        starts = {str(config.init_lora_weights) for config in _peft_configs(model) if _starts_elsewhere(config)}
        if starts:
            return Finding(
                "update",
                "not checked",
                f"Neither A nor B started as zeros (init_lora_weights is {', '.join(sorted(starts))}), so their values "
                "do not tell whether they were trained.",
            )
        return Finding("update", "ok", f"The update is zero in none of {total}.")
    first, why = next(iter(zero.items()))
    found = f"The update is zero in {len(zero)} of {total} (in {first} {why})"
    if optimizer is not None and not _has_stepped(optimizer):
        return Finding(
            "update",
            "not checked",
            f"{found}, as before training, and the optimiser has no step on record: look again after one.",
        )
    return Finding(
        "update",
        "problem",
        f"{found}, so there the model computes what its base does, which is right before training only: see that "
        "the loss's gradient comes to them (a checkpoint needs use_reentrant=False, or inputs with a gradient), "
        "or that the names in the loaded file are the model's.",
    )


def _why_zero(pair: _Pair, buffers: dict[str, Tensor]) -> str:
    """Why the update of a layer is zero, "" if it is not."""
    if pair.A.is_meta or pair.B.is_meta:
        return "A or B is on the meta device, where it has no values"
    start_A, start_B = (buffers.get(f"{pair.layer}.start_{part}") for part in "AB")  # of our PiSSA
    if start_A is not None and start_B is not None:
        same = torch.equal(pair.A, start_A) and torch.equal(pair.B, start_B)
        return "A and B are where they started" if same else ""
    if not bool(pair.B.any()):
        return "B is all zeros"
    return "" if bool(pair.A.any()) else "A is all zeros"


def _peft_configs(model: nn.Module) -> list[Any]:
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, Mapping) else []


def _starts_elsewhere(config: Any) -> bool:
    return getattr(config, "init_lora_weights", True) not in _ZERO_STARTS


def _has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    return any(state.get("step", 1) > 0 for state in optimizer.state.values() if state)


def _base(model: nn.Module, inner: dict[str, str], base: nn.Module | Mapping[str, Tensor] | None) -> Finding:
    if base is None:
        return Finding("base", "not checked", "Give base= to see whether what is frozen still has its values.")
    values = base.state_dict() if isinstance(base, nn.Module) else base
    changed, unknown, shared, equal = [], [], [], []
    for name, plain, tensor in _frozen(model, inner):
        keys = (plain, name, name.removeprefix(_PEFT_PREFIX))  # base may have been wrapped in place
        expected = next((values[key] for key in keys if key in values), None)
        if not isinstance(expected, Tensor) or expected.is_meta or tensor.is_meta:
            unknown.append(plain)
        elif expected.data_ptr() == tensor.data_ptr() and tensor.numel():
            shared.append(plain)
        elif not torch.equal(tensor, expected.to(tensor.device, tensor.dtype)):
            changed.append(plain)
        else:
            equal.append(plain)
    total = _count(len(changed) + len(unknown) + len(shared) + len(equal), "frozen tensor")
    if changed:
        return Finding(
            "base",
            "problem",
            f"{len(changed)} of {total} {_have(len(changed), 'differs', 'differ')} from base's, such as "
            f"{changed[0]!r}: a saved adapter would not give this model again, so start from the base loaded anew, and "
            "merge into new layers, never in place.",
        )
    if shared:
        text = (
            f"{len(shared)} of {total} {_have(len(shared), 'is', 'are')} base's very memory, such as {shared[0]!r}, so "
            "no change could show: give a model loaded anew, or a deep copy made before."
        )
    elif unknown:
        text = (
            f"{len(unknown)} of {total} {_have(len(unknown))} no counterpart in base, such as {unknown[0]!r}: give the "
            "model that the adapters were put on."
        )
    elif not equal:
        text = "There is no frozen tensor that could be compared."
    else:
        return Finding("base", "ok", f"{total} {_have(len(equal))} base's values.")
    return Finding("base", "not checked", text)


def _frozen(model: nn.Module, inner: dict[str, str]) -> Iterator[tuple[str, str, Tensor]]:
    """Name, name in the pre-trained model, and value of every tensor that is not trained and in no adapter."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.requires_grad or ".modules_to_save." in name:
            continue
        layer = next((layer for layer in inner if name.startswith(f"{layer}." if layer else "")), None)
        if layer is None:
            plain = name
        else:
            own = name.removeprefix(f"{layer}." if layer else "")
            if not own.startswith(inner[layer]):
                continue  # a part of the adapter
            plain = f"{layer}.{own.removeprefix(inner[layer])}".removeprefix(".")
        yield name, plain.removeprefix(_PEFT_PREFIX).replace(".original_module.", "."), tensor.detach()


def _loading(report: Any) -> Finding:
    if report is None:
        return Finding("loading", "not checked", "Give load_report= to see whether all keys fitted.")
    try:
        missing = [key for key in report.missing_keys if not _PARTS.isdisjoint(key.split("."))]
        unexpected = list(report.unexpected_keys)
    except AttributeError:
        raise TypeError(
            f"load_report is a {type(report).__name__}, but it must have missing_keys and unexpected_keys, as what "
            "load_state_dict(..., strict=False) returns."
        ) from None
    if not missing and not unexpected:
        return Finding("loading", "ok", "Every adapter tensor was filled, and every stored one used.")
    found = []
    if missing:
        found.append(f"{_count(len(missing), 'adapter tensor')} of the model not filled, such as {missing[0]!r}")
    if unexpected:
        found.append(f"{_count(len(unexpected), 'stored tensor')} not used, such as {unexpected[0]!r}")
    return Finding(
        "loading",
        "problem",
        f"{', and '.join(found)}: the stored names are not this model's, so rename them, or load onto the class of "
        "model that the adapter was trained on.",
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _have(number: int, one: str = "has", many: str = "have") -> str:
    return one if number == 1 else many
