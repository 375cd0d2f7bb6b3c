"""An adapter, or a model with its adapters merged, as a GGUF file for llama.cpp and Ollama.

llama.cpp adds ``scale * alpha / rank * B A`` to a weight: ``scale`` is what its user asks for (1 by default), ``alpha``
one number for the whole file, and ``rank`` that of B. Here every layer has its own scaling, so the file's alpha is the
most frequent ``scaling * rank``, and B is multiplied by the rest where a layer differs.

The format is that of llama.cpp's ``convert_lora_to_gguf.py``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.merged import base_of, load_merged
from lora_lab.adapters.peft_format import load_adapter, read_adapter
from lora_lab.inject import adapter_state, lora_layers, merge
from lora_lab.layers import lora_class
from lora_lab.models import pretrained
from lora_lab.models.gguf import Layout, check_target, gguf_name, in_gguf_order, layout_of, write_file
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.files import as_path
from lora_lab.system.schema import check_finite
from lora_lab.variants import PiSSALinear


@dataclass(frozen=True)
class _Update:
    """What a layer's adapter adds to its weight: scaling * B @ A."""

    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank)
    scaling: float

    @property
    def alpha(self) -> float:
        """The alpha from which llama.cpp computes this scaling, in float32 as a file holds it."""
        return float(torch.tensor(self.scaling * len(self.A), dtype=torch.float32))


def save_gguf(
    source: nn.Module | str | Path,
    path: str | Path,
    *,
    merged: bool = False,
    dtype: str = "f16",
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write an adapter to a GGUF file for llama.cpp and Ollama, and return the path; ``source`` does not change.

    Without ``merged`` the file holds A and B of each layer, to be used with a GGUF file of the base. Plain LoRA,
    rsLoRA, LoRA-FA and PiSSA (as a difference of twice the rank) can be written so, with a rank and alpha for each
    layer, also on the embedding and the head of a model that does not tie them. With ``merged`` the file holds the
    whole model.

    Args:
        source: a :class:`lora_lab.Llama` with adapters, or a Llama, Mistral, Qwen2 or Qwen3 of transformers; or the
            folder of an adapter, whose base is the model that its config names (SmolLM2-135M-Instruct if none).
        path: of the file, which must end in ".gguf".
        merged: write the base with the adapters merged into it, and the tokenizer.
        dtype: of matrices: "f32", "f16" or "q8_0" (8.5 bits per weight, where rows are whole blocks of 32; the B of a
            low rank is float16).
        tokenizer: for ``merged``; needed for a model, and for a folder by default that of the base.

    Raises:
        FileNotFoundError: the folder, a file in it or its base is not there.
        ValueError: the model is of another family or has no adapters; the adapter does not fit its base; a layer's
            update is more than scaling * B A (DoRA) and merged is false; a number of an adapter is NaN or infinite; or
            a number, or the tokenizer, cannot be written.
        OSError: the file cannot be written, or the disk is full.
    """
    path = as_path(path, "path")
    source = source if isinstance(source, nn.Module) else as_path(source, "source")
    check_target(path, dtype)
    if isinstance(source, nn.Module):
        layout_of(source)  # which raises for a model of another family, before any work is done
        lora_layers(source, required=True)
    if not merged:
        updates = _updates_of_model(source) if isinstance(source, nn.Module) else _updates_of_folder(source)
        _write_adapter(path, *updates, dtype)
        return path
    if not isinstance(source, nn.Module):
        _check_base(source, tokenizer)
        model, base_tokenizer = load_merged(source)
        tokenizer = tokenizer or base_tokenizer
    elif tokenizer is None:
        raise ValueError("The file of a merged model holds its tokenizer too; pass tokenizer=.")
    else:  # the copy's modules are new, and its tensors are the model's
        model = copy.deepcopy(source, {id(tensor): tensor for tensor in chain(source.parameters(), source.buffers())})
        merge(model)
    return pretrained.save_model(model, path, tokenizer, format="gguf", dtype=dtype)


def _check_base(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError if no file holds the base of an adapter, or its tokenizer, before the weights are read."""
    base = base_of(folder)
    if Path(base).is_dir():
        vocab_size = layout_of(_base_without_weights(folder)).config.vocab_size
        (tokenizer or pretrained.load_tokenizer(base)).to_gguf(vocab_size)


def _base_without_weights(folder: Path) -> nn.Module:
    """The base of an adapter on torch's meta device, where that is possible."""
    base = base_of(folder)
    if base != pretrained.SMOLLM2 and not Path(base).is_dir():
        return pretrained.load_pretrained(base, device="cpu")[0]  # a GGUF file
    with torch.device("meta"):
        return pretrained.architecture(base)()


def _updates_of_folder(folder: Path) -> tuple[Layout, dict[str, _Update]]:
    """The layout of an adapter's base, and the update of each layer, if they fit each other."""
    state = read_adapter(folder)
    updates: dict[str, _Update] = {}
    for name in [key.removesuffix(".scaling") for key in state if key.endswith(".scaling")]:
        if f"{name}.lora_magnitude_vector" in state:
            raise _more_than_a_product(name, "DoRA")
        updates[name] = _Update(state[f"{name}.lora_A"], state[f"{name}.lora_B"], float(state[f"{name}.scaling"]))
    model = _base_without_weights(folder)
    layout = layout_of(model)
    load_adapter(model, state)  # which raises if a name or a shape is not the base's
    return layout, updates


def _updates_of_model(model: nn.Module) -> tuple[Layout, dict[str, _Update]]:
    """The same of a model with adapters."""
    check_finite(adapter_state(model).items())
    updates: dict[str, _Update] = {}
    for name, layer in lora_layers(model).items():
        product: Any = layer.difference() if isinstance(layer, PiSSALinear) else layer
        plain = lora_class(layer.base)
        if any(getattr(type(product), method) is not getattr(plain, method) for method in ("forward", "_delta")):
            raise _more_than_a_product(name, type(layer).__name__)
        updates[name] = _Update(product.lora_A.detach(), product.lora_B.detach(), product.scaling)
    return layout_of(model), updates


def _more_than_a_product(name: str, kind: str) -> ValueError:
    return ValueError(
        f"{name!r} has an adapter of type {kind}, whose update is more than scaling * B A, so llama.cpp cannot add it "
        "to a base; write the whole model with merged=True."
    )


def _write_adapter(path: Path, layout: Layout, updates: Mapping[str, _Update], dtype: str) -> None:
    counts = Counter(update.alpha for update in updates.values())
    alpha = max(sorted(counts), key=lambda value: counts[value])  # of several the smallest, whatever the layers' order
    tensors: dict[str, Tensor] = {}
    for layer, update in updates.items():
        name, A, B = gguf_name(f"{layer}.weight"), update.A, update.B
        if update.alpha != alpha:
            B = B.float() * (update.alpha / alpha)  # (48, 4)
        if name == "token_embd.weight":
            A = A.T  # (4, 1000) -> (1000, 4), because llama.cpp looks up a row for each token
        tensors[f"{name}.lora_a"] = A  # (4, 64)
        tensors[f"{name}.lora_b"] = in_gguf_order(name, B, layout)  # (48, 4)
    header = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
    write_file(path, layout.architecture, header, tensors, dtype)
