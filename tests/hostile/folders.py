"""Hugging Face folders, in which the config, the tokenizer, the template, the index or the weights are damaged."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_lab import load_pretrained
from lora_lab.models.pretrained import architecture, load_tokenizer, read_config
from lora_lab.models.quantize import dequantize
from tests.hostile.core import Case
from tests.hostile.damage import WHOLE, damaged_bytes, damaged_json, damaged_safetensors, nothing, replace_file
from tests.hostile.material import TEMPLATE, complaints, model_folder
from tests.hostile.templates import any_template
from tests.hostile.values import Values

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def prepare(folder: Path, values: Values) -> tuple[dict[str, Path], Values]:
    """The same model in one file, in two with an index, and with matrices in blocks."""
    whole = model_folder(folder / "whole")
    parts = shutil.copytree(whole, folder / "parts")
    tensors = load_file(parts / WEIGHTS)
    names = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, parts / file, {"format": "pt"})
    (parts / WEIGHTS).unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (parts / INDEX).write_text(json.dumps(index))
    other = shutil.copytree(whole, folder / "other")
    entries = json.loads((other / CONFIG).read_text()) | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
    }
    (other / CONFIG).write_text(json.dumps(entries))
    load_pretrained(other, device="cpu")  # by transformers, which takes seconds to import
    return {"whole": whole, "parts": parts, "blocks": _in_blocks(whole, folder / "blocks")}, values


def _in_blocks(whole: Path, folder: Path) -> Path:
    """As the cache holds SmolLM2: matrices in blocks of Q8_0, with their formats in the header."""
    from gguf import GGMLQuantizationType, quants

    shutil.copytree(whole, folder)
    tensors = load_file(folder / WEIGHTS)
    kinds = {name: "Q4_1" for name in tensors if "_proj" in name}
    for name, kind in kinds.items():
        tensors[name] = torch.from_numpy(quants.quantize(tensors[name].numpy(), GGMLQuantizationType[kind]))
        assert dequantize(tensors[name], kind).shape[1] == 32
    save_file(tensors, folder / WEIGHTS, {"lora_lab.block_kinds": json.dumps(kinds)})
    return folder


def case(rng: random.Random, folder: Path, material: tuple[dict[str, Path], Values]) -> Case:
    """A damaged folder, which is loaded as a model or read in part."""
    folders, values = material
    kind = rng.choice(("whole", "whole", "whole", "whole", "parts", "blocks"))
    model = shutil.copytree(folders[kind], folder / "model")
    damages = (
        _config,
        _config,
        _config,
        _config,
        _config,
        _tokenizer_config,
        _tokenizer,
        _template,
        _weights,
        _weights,
    )
    what = rng.choice((*damages, _file, _index if kind == "parts" else _config, _added, nothing))(model, rng, values)
    if rng.random() < 0.05:
        return Case(what, partial(read_config, model))
    if rng.random() < 0.05:
        return Case(what, lambda: sum(p.numel() for p in _on_meta(model).parameters()))
    if rng.random() < 0.05:
        return Case(what, partial(load_tokenizer, model))
    keep = kind == "blocks" and rng.random() < 0.5
    call = partial(load_pretrained, model, device="cpu", keep_blocks=keep)
    return Case(what, call, lambda both: complaints(*both), good=what == WHOLE)


def _on_meta(model: Path) -> torch.nn.Module:
    with torch.device("meta"):
        return architecture(model)()


def _config(model: Path, rng: random.Random, values: Values) -> str:
    path = model / CONFIG
    entries = json.loads(path.read_text())
    kind = rng.choice(("json", "json", "size", "size", "added"))
    if kind == "json":
        content, what = damaged_json(path.read_text(), rng, values)
        path.write_bytes(content)
        return f"config.json: {what}"
    if kind == "size":
        name = rng.choice([name for name, value in entries.items() if isinstance(value, int | float)])
        entries[name] = rng.choice((values.number, values.integer, values.json_value))(rng)
    else:
        name, entries_of = rng.choice(list(_ADDED.items()))
        entries[name] = entries_of(rng, values)
    path.write_text(json.dumps(entries))
    return f"config.json: {name} = {entries[name]!r:.100}"


def _scaling(rng: random.Random, values: Values) -> Any:
    scaling: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(scaling))
        scaling[name] = values.json_value(rng)
        if rng.random() < 0.2:
            del scaling[name]
    return rng.choice((scaling, scaling, scaling, [scaling], values.json_value(rng)))


_ADDED = {
    "rope_scaling": _scaling,
    "rope_parameters": _scaling,
    "rope_theta": lambda rng, values: values.number(rng),
    "head_dim": lambda rng, values: values.json_value(rng),
    "attention_bias": lambda rng, values: values.json_value(rng),
    "mlp_bias": lambda rng, values: values.json_value(rng),
    "hidden_act": lambda rng, values: rng.choice(("gelu", "SiLU", values.json_value(rng))),
    "model_type": lambda rng, values: rng.choice(("llama", "mistral", "gpt2", "bert", "../x", values.json_value(rng))),
    "architectures": lambda rng, values: rng.choice((["LlamaForCausalLM"], ["X"], [5], values.json_value(rng))),
    "auto_map": lambda rng, values: {"AutoModelForCausalLM": "evil.Model"},
    "quantization_config": lambda rng, values: values.json_value(rng),
    "partial_rotary_factor": lambda rng, values: values.number(rng),
    "sliding_window": lambda rng, values: values.json_value(rng),
    "torch_dtype": lambda rng, values: values.json_value(rng),
    "eos_token_id": lambda rng, values: values.json_value(rng),
}


def _tokenizer_config(model: Path, rng: random.Random, values: Values) -> str:
    path = model / "tokenizer_config.json"
    entries = json.loads(path.read_text())
    if rng.random() < 0.5:
        content, what = damaged_json(path.read_text(), rng, values)
        path.write_bytes(content)
        return f"tokenizer_config.json: {what}"
    name = rng.choice(("eos_token", "bos_token", "pad_token", "chat_template", "chat_template"))
    entries[name] = rng.choice(
        (
            values.json_value(rng),
            values.text(rng),
            {"content": values.json_value(rng)},
            [{"name": "default", "template": values.json_value(rng)}],
            [{"name": "default"}, 5],
            [{"name": "tool", "template": "x"}],
            {"default": TEMPLATE},
        )
    )
    path.write_text(json.dumps(entries))
    return f"tokenizer_config.json: {name} = {entries[name]!r:.100}"


def _tokenizer(model: Path, rng: random.Random, values: Values) -> str:
    path = model / "tokenizer.json"
    if rng.random() < 0.6:
        content, what = damaged_json(path.read_text(encoding="utf-8"), rng, values)
        path.write_bytes(content)
        return f"tokenizer.json: {what}"
    state = json.loads(path.read_text(encoding="utf-8"))
    part, content = rng.choice(_PARTS_OF_TOKENIZERS)
    state[part] = state[part] | content if part == "model" else content
    path.write_text(json.dumps(state), encoding="utf-8")
    return f"tokenizer.json: {part} {content!r:.80}"


# What the library accepts in a tokenizer.json, and what no tokenizer should have.
_PARTS_OF_TOKENIZERS: list[tuple[str, Any]] = [
    ("normalizer", {"type": "Replace", "pattern": {"String": "t"}, "content": 10**6 * "x"}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": ""}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
    ("normalizer", {"type": "Sequence", "normalizers": 50 * [{"type": "Prepend", "prepend": 99 * "x"}]}),
    ("normalizer", {"type": "Lowercase"}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(.*)*x"}, "behavior": "Removed", "invert": False}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "[t-a]"}, "behavior": "Isolated", "invert": False}),
    ("pre_tokenizer", {"type": "Whitespace"}),
    ("pre_tokenizer", None),
    ("decoder", None),
    ("decoder", {"type": "Strip", "content": "t", "start": 2**40, "stop": 1}),
    ("post_processor", {"type": "RobertaProcessing", "sep": ["x", 2**31], "cls": ["y", 5], "trim_offsets": True}),
    ("post_processor", {"type": "BertProcessing", "sep": ["x", 2**32 - 1], "cls": ["y", 999]}),
    ("padding", {"strategy": {"Fixed": 2**40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 9}),
    ("truncation", {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}),
    ("added_tokens", [{"id": 2**32 - 1, "content": "<x>", "special": True}]),
    ("added_tokens", []),
    ("model", {"type": "WordLevel", "unk_token": "[UNK]"}),
    ("model", {"type": "WordPiece", "unk_token": "[UNK]", "max_input_chars_per_word": 0}),
    ("model", {"type": "Unigram", "unk_id": 7, "vocab": [["x", -1.0]]}),
    ("model", {"unk_token": "missing", "merges": [], "vocab": {"a": 0}}),
    ("model", {"dropout": 1.0}),
    ("model", {"dropout": -5.0}),
    ("model", {"vocab": {}}),
    ("model", {"vocab": {"a": 2**32 - 1}}),
    ("model", {"continuing_subword_prefix": "##", "end_of_word_suffix": "</w>"}),
    ("model", {"byte_fallback": True, "fuse_unk": True}),
]


def _template(model: Path, rng: random.Random, values: Values) -> str:
    template = any_template(rng, TEMPLATE)
    if rng.random() < 0.5:
        path = model / "chat_template.jinja"
        path.write_bytes(template.encode("utf-8", "surrogatepass"))
        if rng.random() < 0.1:
            path.write_bytes(b"\xff\xfe{{ messages }}")
    else:
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return f"{path.name}: template {template!r:.100}"


def _weights(model: Path, rng: random.Random, values: Values) -> str:
    path = rng.choice(sorted(model.glob("*.safetensors")))
    content, what = damaged_safetensors(path.read_bytes(), rng, values)
    if rng.random() < 0.1:
        content, what = damaged_bytes(path.read_bytes(), rng)
    path.write_bytes(content)
    return f"{path.name}: {what}"


def _index(model: Path, rng: random.Random, values: Values) -> str:
    path = model / INDEX
    if rng.random() < 0.5:
        content, what = damaged_json(path.read_text(), rng, values)
        path.write_bytes(content)
        return f"index: {what}"
    index = json.loads(path.read_text())
    names = index["weight_map"]
    odd = rng.choice(
        ("../whole/model.safetensors", "/etc/passwd", "", ".", "\0", "x" * 300, 5, None, "model.bin", "a/b")
    )
    names[rng.choice(list(names))] = odd
    path.write_text(json.dumps(index))
    return f"index: a file {odd!r:.50}"


def _file(model: Path, rng: random.Random, values: Values) -> str:
    return replace_file(rng.choice(sorted(path for path in model.iterdir())), rng)


def _added(model: Path, rng: random.Random, values: Values) -> str:
    """Files that stand beside the others."""
    name, content = rng.choice(
        (
            ("pytorch_model.bin", b"\x80\x04K\x01."),
            ("adapter_config.json", b"{}"),
            ("generation_config.json", b"[]"),
            ("special_tokens_map.json", b"5"),
            (INDEX, b"{}"),
            ("model.py", b"raise SystemExit"),
            (".lora_lab-ready", b"x"),
            ("added_tokens.json", b"["),
        )
    )
    (model / name).write_bytes(content)
    return f"added {name}"
