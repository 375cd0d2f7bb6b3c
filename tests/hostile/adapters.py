"""PEFT's folders and adapters in memory, in which settings, patterns, weights or names are damaged."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lab import (
    DoRA,
    LoRA,
    RsLoRA,
    adapter_state,
    adapters,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
)
from lora_lab.adapters.merged import base_of, load_merged
from lora_lab.methods import Method
from tests.helpers import randomise
from tests.hostile.core import Case
from tests.hostile.damage import WHOLE, damaged_bytes, damaged_json, damaged_safetensors, nothing, replace_file
from tests.hostile.material import complaints, llama, model_folder
from tests.hostile.values import Values

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS: tuple[Method, ...] = (LoRA(4, 8.0), RsLoRA(4, 8.0, targets=["q_proj", "down_proj"]), DoRA(2, 4.0))


def prepare(folder: Path, values: Values) -> tuple[dict[str, Path], Values]:
    """Adapters of three methods on one model, and one of several ranks, each as we save it and as PEFT does."""
    base = model_folder(folder / "base")
    folders = {}
    for method in METHODS:
        model = llama()
        method.prepare(model, 0)
        save_adapter(randomise(model), folder / method.name, base=str(base))
        folders[method.name] = folder / method.name
    return folders, values


def case(rng: random.Random, folder: Path, material: tuple[dict[str, Path], Values]) -> Case:
    """A damaged folder or a damaged adapter in memory, on a model that an error must leave as it was."""
    folders, values = material
    adapter = shutil.copytree(folders[rng.choice(list(folders))], folder / "adapter")
    if rng.random() < 0.6:
        _as_peft_saves(adapter)
    if rng.random() < 0.1:
        return _in_memory(rng, adapter, values)
    damages = (_config, _config, _setting, _setting, _pattern, _pattern, _weights, _weights, _file)
    what = rng.choice((*2 * damages, nothing))(adapter, rng, values)
    call = rng.choice(("load", "load", "load", "load", "read", "config", "base", "merged", "gguf"))
    if call == "read":
        return Case(what, partial(adapters.read_adapter, adapter), _complaints_of_state)
    if call == "config":
        return Case(what, partial(adapters.read_config, adapter))
    if call == "base":
        return Case(what, partial(base_of, adapter))
    if call == "merged":
        return Case(what, partial(load_merged, adapter), lambda both: complaints(*both))
    if call == "gguf":
        return Case(what, partial(adapters.save_gguf, adapter, folder / "adapter.gguf"))
    return _on_a_model(what, adapter)


def _as_peft_saves(adapter: Path) -> None:
    """Without the note in the header of the weights by which we recognise our own."""
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, {"format": "pt"})


def _on_a_model(what: str, adapter: Any) -> Case:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [*model.modules()]

    def changed() -> Iterator[str]:
        after = model.state_dict()
        if [*model.modules()] != modules or after.keys() != before.keys():
            yield "the error left adapters on the model"
        elif not all(torch.equal(after[name], before[name]) for name in before):
            yield "the error left other weights in the model"
        elif not all(parameter.requires_grad for parameter in model.parameters()):
            yield "the error left the model frozen"

    def wrong(names: list[str]) -> Iterator[str]:
        if sorted(names) != sorted(lora_layers(model)):
            yield "other layers are adapted than it says"
        yield from complaints(model)
        merge(model)
        yield from complaints(model)

    return Case(what, partial(load_adapter, model, adapter), wrong, changed, good=what == WHOLE)


def _complaints_of_state(state: dict[str, torch.Tensor]) -> Iterator[str]:
    if not all(bool(torch.isfinite(value).all()) for value in state.values() if value.is_floating_point()):
        yield "numbers are not finite"


def _in_memory(rng: random.Random, folder: Path, values: Values) -> Case:
    """A state that was changed."""
    state: dict[Any, Any] = dict(adapters.read_adapter(folder))
    names = list(state)
    name, kind = (
        rng.choice(names),
        rng.choice(("gone", "renamed", "shape", "dtype", "value", "number", "nan", "object")),
    )
    if kind == "gone":
        del state[name]
    elif kind == "renamed":
        state[rng.choice((name + "x", "x", "", name.upper(), rng.choice(names), 5))] = state.pop(name)
    elif kind == "shape":
        state[name] = rng.choice(
            (state[name].flatten(), state[name][None], torch.zeros(0), state[name][..., None], torch.ones(3))
        )
    elif kind == "dtype":
        state[name] = state[name].to(
            rng.choice((torch.int64, torch.float16, torch.bool, torch.complex64, torch.float64))
        )
    elif kind == "nan":
        state[name] = state[name].clone().fill_(rng.choice((float("nan"), float("inf"), 1e30)))
    elif kind == "object":
        state[name] = rng.choice((None, 5, "x", [1.0], state[name].tolist(), nn.Parameter(state[name]), {}))
    else:
        name = rng.choice([each for each in names if each.endswith((".scaling", ".alpha"))])
        state[name] = torch.tensor(rng.choice((0.0, -1.0, 1e300, 1e-40, float("nan"), float("inf"))))
    what = f"in memory: {kind} {name}"
    if rng.random() < 0.3:
        weights = rng.choice(([1.0, 1.0], [0.5, -0.5], [0.0, 0.0]))
        whole = adapters.read_adapter(folder)
        return Case(what, partial(adapters.combine, [whole, state], weights), _complaints_of_state)
    if rng.random() < 0.3:
        model = llama()
        load_adapter(model, folder)
        before = adapter_state(model)

        def changed() -> Iterator[str]:
            if not all(torch.equal(value, before[key]) for key, value in adapter_state(model).items()):
                yield "the error left half of the adapter"

        return Case(what, partial(adapters.switch, model, state), lambda _: complaints(model), changed)
    return _on_a_model(what, state)


def _config(adapter: Path, rng: random.Random, values: Values) -> str:
    content, what = damaged_json((adapter / CONFIG).read_text(), rng, values)
    (adapter / CONFIG).write_bytes(content)
    return f"{CONFIG}: {what}"


def _setting(adapter: Path, rng: random.Random, values: Values) -> str:
    """Another value of what decides the result."""
    entries = json.loads((adapter / CONFIG).read_text())
    name, make = rng.choice([*_SETTINGS.items(), *3 * [("r", _SETTINGS["r"])]])
    entries[name] = make(rng, values)
    (adapter / CONFIG).write_text(json.dumps(entries))
    return f"{CONFIG}: {name} = {entries[name]!r:.100}"


_SETTINGS: dict[str, Callable[[random.Random, Values], Any]] = {
    "r": lambda rng, values: rng.choice((values.json_value, values.integer, values.number))(rng),
    "lora_alpha": lambda rng, values: rng.choice((values.json_value, values.number))(rng),
    "lora_dropout": lambda rng, values: rng.choice((values.json_value, values.number))(rng),
    "target_modules": lambda rng, values: rng.choice(
        (values.json_value(rng), values.pattern(rng), [5], ["q_proj", None])
    ),
    "peft_type": lambda rng, values: rng.choice(("LORA", "IA3", values.json_value(rng))),
    "bias": lambda rng, values: rng.choice(("none", "all", "lora_only", values.json_value(rng))),
    "use_rslora": lambda rng, values: rng.choice((True, False, values.json_value(rng))),
    "use_dora": lambda rng, values: rng.choice((True, False, values.json_value(rng))),
    "init_lora_weights": lambda rng, values: rng.choice((True, "pissa", "gaussian", values.json_value(rng))),
    "modules_to_save": lambda rng, values: values.json_value(rng),
    "layers_to_transform": lambda rng, values: values.json_value(rng),
    "fan_in_fan_out": lambda rng, values: values.json_value(rng),
    "base_model_name_or_path": lambda rng, values: rng.choice(
        (values.text(rng), values.json_value(rng), "/etc", "x.gguf")
    ),
    "rank_pattern": lambda rng, values: values.json_value(rng),
    "alpha_pattern": lambda rng, values: values.json_value(rng),
    "task_type": lambda rng, values: values.json_value(rng),
    "corda_config": lambda rng, values: values.json_value(rng),
}


def _pattern(adapter: Path, rng: random.Random, values: Values) -> str:
    """Regular expressions as keys, and what they stand for."""
    entries = json.loads((adapter / CONFIG).read_text())
    name = rng.choice(("rank_pattern", "alpha_pattern"))
    patterns = {}
    for _ in range(rng.choice((1, 1, 2, 30))):
        number: Any = rng.choice((4, 8, 16.0, values.json_value(rng), values.integer(rng), values.number(rng)))
        patterns[values.pattern(rng)] = number
    if rng.random() < 0.02:
        patterns = {f"q_proj{i}|(.*)*{i}": 4 for i in range(3000)}
    entries[name] = patterns
    (adapter / CONFIG).write_text(json.dumps(entries))
    return f"{CONFIG}: {name} = {patterns!r:.100}"


def _weights(adapter: Path, rng: random.Random, values: Values) -> str:
    path = adapter / WEIGHTS
    kind = rng.choice(("any", "any", "bytes", "name", "rank"))
    if kind == "any":
        content, what = damaged_safetensors(path.read_bytes(), rng, values)
        path.write_bytes(content)
        return what
    if kind == "bytes":
        content, what = damaged_bytes(path.read_bytes(), rng)
        path.write_bytes(content)
        return what
    tensors = load_file(path)
    name = rng.choice(list(tensors))
    if kind == "name":
        new = rng.choice(
            (
                name.replace("layers.0", "layers.7"),
                name.replace("lora_A", "lora_B"),
                name.replace("base_model.model.", ""),
                name.replace("q_proj", "x_proj"),
                "base_model.model.lm_head.lora_A.weight",
                "base_model.model.model.norm.lora_A.weight",
                "base_model.model.model.layers.0.lora_A.weight",
                "base_model.model..lora_A.weight",
                "base_model.model.model.embed_tokens.lora_embedding_A",
                values.text(rng).encode("utf-8", "replace").decode(),
            )
        )
        tensors[new] = tensors.pop(name)
        what = f"{name} is named {new!r:.60}"
    else:
        rank = rng.choice((0, 1, 3, 5, 100, 4000))
        what = f"{name} of rank {rank}"
        value = tensors[name]
        tensors[name] = torch.ones((rank, value.shape[-1]) if "lora_A" in name else (value.shape[0], rank))
    save_file(tensors, path, {"format": "pt"})
    return what


def _file(adapter: Path, rng: random.Random, values: Values) -> str:
    return replace_file(rng.choice((adapter / CONFIG, adapter / WEIGHTS, adapter / "README.md")), rng)
