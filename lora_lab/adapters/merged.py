"""An adapter's folder as a whole model: its base with the adapter merged into it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from lora_lab.adapters.peft_format import CONFIG, load_adapter, read_config
from lora_lab.inject import merge
from lora_lab.models import pretrained
from lora_lab.models.pretrained import check_separate
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.files import atomic_file, repair

# Of the folder that is written, and of torch.
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# The tokenizer in a second format, which llama.cpp's converter asks for where a model has it.
SENTENCEPIECE = "tokenizer.model"


def base_of(folder: str | Path) -> str:
    """The model that an adapter's config names: SmolLM2-135M-Instruct if it names none.

    Raises:
        FileNotFoundError: the folder is not there, or its base is neither a folder nor a .gguf file here.
    """
    base = read_config(folder).get("base_model_name_or_path") or pretrained.SMOLLM2
    if base != pretrained.SMOLLM2 and not Path(base).exists():
        raise FileNotFoundError(
            f"{folder} adapts the model {base!r} (base_model_name_or_path in its {CONFIG}), which is neither a folder "
            "nor a .gguf file here; write its path there, or load both yourself, and pass the model."
        )
    return base


def load_merged(folder: str | Path) -> tuple[nn.Module, Tokenizer]:
    """The base of an adapter, in float32 on the CPU, with the adapter merged into it, and the base's tokenizer.

    Args:
        folder: of the adapter, whose base is the model that its config names (SmolLM2-135M-Instruct if none).

    Raises:
        FileNotFoundError: the folder, a file in it or its base is not there.
        ValueError: the adapter does not fit its base.
    """
    model, tokenizer = pretrained.load_pretrained(base_of(folder), device="cpu")
    load_adapter(model, folder)
    merge(model)
    return model, tokenizer


def save_merged(source: str | Path, folder: str | Path, dtype: str = "f32") -> Path:
    """Write a whole model with its tokenizer to a Hugging Face folder, and return the folder.

    ``transformers.AutoModelForCausalLM.from_pretrained(folder)`` reads it, and llama.cpp's ``convert_hf_to_gguf.py``.

    Args:
        source: the folder of an adapter, which is merged into its base; or a model, as for
            :func:`lora_lab.load_pretrained`.
        folder: must be neither that of the adapter nor that of its base.
        dtype: of the weights: "f32" (exact), "f16" or "bf16".

    Raises:
        FileNotFoundError: the adapter, its base, or the model is not there.
        ValueError: the adapter does not fit its base, the dtype is unknown or too small for a number of the model, or
            the folder is one that is read, or holds an adapter.
        OSError: the folder cannot be written to, or the disk is full.
    """
    source, folder = Path(source), Path(folder)
    repair(source)
    is_adapter = (source / CONFIG).is_file()
    base = Path(base_of(source)) if is_adapter else source
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, but a folder is written in one of {', '.join(DTYPES)}.")
    for read in (source, base):
        if folder.exists() and read.exists() and folder.samefile(read):
            raise ValueError(f"{folder} holds what is read, which would be lost; choose another folder for the model.")
    check_separate(folder, "model")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, but a folder is to be written there; choose another name.")
    model, tokenizer = load_merged(source) if is_adapter else pretrained.load_pretrained(str(source), device="cpu")
    model.to(DTYPES[dtype])
    for name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds a number that {dtype} does not; choose dtype='f32' or 'bf16'.")
    pretrained.save_model(model, folder, tokenizer)
    if (base / SENTENCEPIECE).is_file():
        with atomic_file(folder / SENTENCEPIECE) as temporary:
            shutil.copyfile(base / SENTENCEPIECE, temporary)
    return folder
