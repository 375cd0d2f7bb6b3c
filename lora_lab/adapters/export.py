"""Take an adapter to other programs: a whole model in a Hugging Face folder, or a GGUF file for llama.cpp and Ollama.

llama.cpp adds ``scale * alpha / rank * B A`` to a weight: ``scale`` is what its user asks for (1 by default), ``alpha``
one number for the whole file, and ``rank`` that of B. Here every layer has its own scaling, so the file's alpha is the
most frequent ``scaling * rank``, and B is multiplied by the rest where a layer differs. The format is that of
llama.cpp's ``convert_lora_to_gguf.py``.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from statistics import mode

import torch
from torch import nn

from lora_lab.adapters.edit import Factors, check_plain
from lora_lab.adapters.peft_format import CONFIG, find_variant, load_adapter, read, read_adapter, read_config
from lora_lab.inject import adapter_state, lora_layers, merge
from lora_lab.models import pretrained
from lora_lab.models.gguf import check_target, gguf_name, layout_of, reorder_for_gguf, write_file
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.files import as_path, atomic_file, finish_save

# Of the folder that is written, and of torch.
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# The tokenizer in a second format, which llama.cpp's converter asks for where a model has it.
SENTENCEPIECE = "tokenizer.model"


def find_base(folder: str | Path) -> str:
    """Return the model that an adapter's config names: SmolLM2-135M-Instruct if it names none.

    Raises:
        FileNotFoundError: the folder is not there, or its base is neither a folder nor a .gguf file here.
    """
    base = read_config(folder).get("base_model_name_or_path") or pretrained.SMOLLM2
    if base not in pretrained.NAMES and not Path(base).exists():
        raise FileNotFoundError(
            f"{folder} adapts {base!r} (base_model_name_or_path in its {CONFIG}), which is neither a folder nor a "
            ".gguf file here; write its path there, or pass a loaded model."
        )
    return base


def load_whole_model(source: str | Path) -> tuple[nn.Module, Tokenizer]:
    """Return a model, in float32 on the CPU, with its adapter merged into it if it has one, and its tokenizer.

    Args:
        source: the folder of an adapter, which is merged into the model that its config names (SmolLM2-135M-Instruct if
            none); or a model, as for :func:`lora_lab.load_pretrained`.

    Raises:
        FileNotFoundError: the adapter, its base, or the model is not there.
        ValueError: the adapter does not fit its base.
    """
    adapted = is_adapter(source)
    model, tokenizer = pretrained.load_pretrained(find_base(source) if adapted else str(source), device="cpu")
    if adapted:
        load_adapter(model, source)
        merge(model)
    return model, tokenizer


def is_adapter(source: str | Path) -> bool:
    """Return whether there is a folder with an adapter; a save that was killed is completed first."""
    finish_save(source)
    return (Path(source) / CONFIG).is_file()


def save_merged(source: str | Path, folder: str | Path, dtype: str = "f32") -> Path:
    """Write a whole model with its tokenizer to a Hugging Face folder, and return the folder.

    ``transformers.AutoModelForCausalLM.from_pretrained(folder)`` reads it, and llama.cpp's ``convert_hf_to_gguf.py``.

    Args:
        source: as for :func:`load_whole_model`.
        folder: must be neither that of the adapter nor that of its base.
        dtype: of the weights: "f32" (exact), "f16" or "bf16".

    Raises:
        FileNotFoundError: the adapter, its base, or the model is not there.
        ValueError: the adapter does not fit its base, the dtype is unknown or too small for a number of the model, or
            the folder is one that is read, or holds an adapter.
        OSError: the folder cannot be written to, or the disk is full.
    """
    source, folder = Path(source), Path(folder)
    base = Path(find_base(source)) if is_adapter(source) else source
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, but a folder is written in one of {', '.join(DTYPES)}.")
    if any(folder.exists() and read.exists() and folder.samefile(read) for read in (source, base)):
        raise ValueError(f"{folder} holds what is read, which would be lost; choose another folder for the model.")
    model, tokenizer = load_whole_model(source)
    model.to(DTYPES[dtype])
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds a number that {dtype} does not; choose dtype='f32' or 'bf16'.")
    pretrained.save_model(model, folder, tokenizer)
    if (base / SENTENCEPIECE).is_file():
        with atomic_file(folder / SENTENCEPIECE) as temporary:
            shutil.copyfile(base / SENTENCEPIECE, temporary)
    return folder


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
            folder of an adapter, whose base is the model that its config names (SmolLM2-135M-Instruct if none); with
            ``merged`` also as for :func:`load_whole_model`.
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
    check_target(path, dtype)
    if not merged:
        model, factors = _read_plain(source)
        _write_adapter(path, model, factors, dtype)
        return path
    if isinstance(source, nn.Module):  # the copy's modules are new, and its tensors are the model's
        model = copy.deepcopy(source, {id(tensor): tensor for tensor in [*source.parameters(), *source.buffers()]})
        merge(model)
    else:
        model, base_tokenizer = load_whole_model(source)
        tokenizer = tokenizer or base_tokenizer
    return pretrained.save_model(model, path, tokenizer, format="gguf", dtype=dtype)


def _read_plain(source: nn.Module | str | Path) -> tuple[nn.Module, dict[str, Factors]]:
    """Return a model with adapters, and the factors of each layer, as those of plain LoRA.

    Raises:
        ValueError: a layer's update is more than scaling * B A, or the adapter of a folder does not fit its base.
    """
    if isinstance(source, nn.Module):
        model, state = source, adapter_state(source)
    else:
        model, state = _load_base_without_weights(source), read_adapter(source)
        load_adapter(model, state)  # which raises if a name or a shape is not the base's
    for name, layer in lora_layers(model).items():
        find_variant(name, layer)  # which refuses a layer that computes something else from A and B
    factors = read(state).factors
    check_plain(factors)
    return model, factors


def _write_adapter(path: Path, model: nn.Module, factors: dict[str, Factors], dtype: str) -> None:
    """Write the factors of each layer with one alpha for all; the B of a layer that has another one is multiplied."""
    architecture, config = layout_of(model)
    # In float32, as the file holds them.
    alphas = {name: float(torch.tensor(each.alpha, dtype=torch.float32)) for name, each in factors.items()}
    alpha = mode(sorted(alphas.values()))  # of several that are equally frequent, the smallest
    tensors = {}
    for layer, each in factors.items():
        name, A, B = gguf_name(f"{layer}.weight"), each.tensors["lora_A"], each.tensors["lora_B"]
        if alphas[layer] != alpha:
            B = B.float() * (alphas[layer] / alpha)  # (48, 4)
        if name == "token_embd.weight":
            A = A.T  # (4, 1000) -> (1000, 4), because llama.cpp looks up a row for each token
        tensors[f"{name}.lora_a"] = A  # (4, 64)
        tensors[f"{name}.lora_b"] = reorder_for_gguf(name, B, architecture, config)  # (48, 4)
    header = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
    write_file(path, architecture, header, tensors, dtype)


def _load_base_without_weights(folder: str | Path) -> nn.Module:
    """Return the base of an adapter on torch's meta device, where that is possible."""
    base = find_base(folder)
    if base != pretrained.SMOLLM2 and not Path(base).is_dir():
        return pretrained.load_pretrained(base, device="cpu")[0]  # a GGUF file, as the small models are
    with torch.device("meta"):
        return pretrained.architecture(base)()
