"""Real weights: SmolLM2-135M, a GGUF file, or a Hugging Face folder; and back to files.

What is of the Llama family becomes a :class:`lora_lab.Llama`; any other folder is loaded by transformers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, cast, overload

import torch
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from lora_lab.inject import lora_layers, replace
from lora_lab.models import huggingface, shapes
from lora_lab.models.configs import config_from_hf, config_to_hf, misfit, read_entries
from lora_lab.models.download import cache_folder, cache_lock, fetch_smollm2
from lora_lab.models.gguf_header import read_header
from lora_lab.models.gguf_reader import StoredModel, read_gguf
from lora_lab.models.gguf_writer import layout_of, write_gguf
from lora_lab.models.llama import Llama
from lora_lab.models.quantize import (
    BYTES_PER_BLOCK,
    FORMATS,
    BlockEmbedding,
    BlockLinear,
    BlockWeight,
    dequantize,
    shape_of,
)
from lora_lab.models.tokenizer import TEMPLATE, Tokenizer
from lora_lab.system.device import pick_device
from lora_lab.system.files import (
    as_path,
    atomic_files,
    atomic_folder,
    carried_json,
    read_json,
    repair,
    write_json,
)
from lora_lab.system.schema import check, check_finite

SMOLLM2 = "smollm2-135m"
# Raise the number when what is written to the cache changes, so that old entries are not read.
_CACHE_ENTRY = f"{SMOLLM2}-v1"
_KINDS = "lora_lab.block_kinds"  # in the safetensors header: the kind of each tensor in blocks
# What save_model writes with a tokenizer.
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
GENERATION = "generation_config.json"  # of transformers
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@overload
def load_pretrained(source: Literal["smollm2-135m"] = ..., *args: Any, **options: Any) -> tuple[Llama, Tokenizer]: ...
@overload
def load_pretrained(source: str | Path, *args: Any, **options: Any) -> tuple[nn.Module, Tokenizer]: ...


def load_pretrained(
    source: str | Path = SMOLLM2,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    keep_blocks: bool = False,
) -> tuple[nn.Module, Tokenizer]:
    """A pre-trained model and its tokenizer, ready to use or to train.

    A model of the Llama family is built as a :class:`lora_lab.Llama`. A folder with a model of another architecture is
    loaded by transformers (``pip install "lora-lab[hf]"``), as the class that its config names. For a folder, a line on
    stderr says which of the two it is, and why.

    Args:
        source: "smollm2-135m" (SmolLM2-135M-Instruct; downloaded once, 98 MB, and cached in its 4-bit blocks);
            or the path of a ``.gguf`` file of the Llama family; or of a Hugging Face folder (config.json,
            \\*.safetensors, tokenizer.json).
        dtype: a floating-point dtype for the weights.
        device: as in :func:`lora_lab.system.device.pick_device`.
        keep_blocks: leave matrices in the blocks of the source (SmolLM2: 98 MB instead of 538), frozen; they are
            dequantised to ``dtype`` where they are used, see ``lora_lab.models.quantize``. Other matrices are loaded
            as usual.

    Raises:
        FileNotFoundError: the path, or a file of the folder, is not there.
        ValueError: the source is unknown, damaged, of an architecture that transformers does not know either, or has
            no blocks to keep; a weight of a Llama is NaN or infinite; or dtype is not a floating-point one.
        ModuleNotFoundError: the folder's model needs transformers, which is not installed.
        RuntimeError: the model cannot be downloaded.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, but weights need a floating-point one, such as torch.float32.")
    device = pick_device(device)[0]
    path = _smollm2_folder() if str(source) == SMOLLM2 else as_path(source, "source")
    if path.is_dir():
        entries = _config_entries(path)
        reason = misfit(entries)
        if str(source) != SMOLLM2:
            which = f"a model of transformers, because {reason}" if reason else "a lora_lab.Llama"
            print(f"{path}: {which}.", file=sys.stderr)
        if reason is not None:
            return _load_by_transformers(path, dtype, device, keep_blocks)
        stored = _read_folder(path, entries)
    elif path.suffix == ".gguf":
        stored = read_gguf(path)
    elif path.exists():
        raise ValueError(f"{path} is neither a folder nor a .gguf file.")
    else:
        raise FileNotFoundError(
            f"There is no model {str(source)!r}; use {SMOLLM2!r}, the path of a .gguf file, or a Hugging Face folder."
        )
    _check_first_tokens(stored, path)
    return _build(stored, path, dtype, device, keep_blocks), stored.tokenizer


def load_tokenizer(source: str | Path = SMOLLM2) -> Tokenizer:
    """The tokenizer of a model alone.

    Args:
        source: as for :func:`load_pretrained`.

    Raises:
        FileNotFoundError: the path, or tokenizer.json in the folder, is not there.
        ValueError: the file is damaged.
        RuntimeError: the model cannot be downloaded.
    """
    path = _smollm2_folder() if str(source) == SMOLLM2 else Path(source)
    if path.is_dir():
        return Tokenizer.load(path)
    if path.suffix == ".gguf" and path.is_file():
        return Tokenizer.from_gguf(read_header(path)[0])
    return load_pretrained(source, device="cpu")[1]  # which says what is wrong with the source


def _no_blocks(origin: Path) -> ValueError:
    return ValueError(
        f"{origin} holds no matrix in blocks of {' or '.join(BYTES_PER_BLOCK)}, so there are none to keep; "
        "load it without keep_blocks and then call lora_lab.quantize_nf4(model)."
    )


def _load_by_transformers(
    path: Path, dtype: torch.dtype, device: torch.device, keep_blocks: bool
) -> tuple[nn.Module, Tokenizer]:
    if keep_blocks:
        raise _no_blocks(path)
    _weight_files(path)  # transformers would follow an index out of the folder
    tokenizer = Tokenizer.load(path)  # before the weights: it takes no time, and may be what is missing
    return huggingface.load(path, dtype, device), tokenizer


def architecture(source: str | Path) -> Callable[[], nn.Module]:
    """A function that builds a model without weights of its own, for questions about its size, memory and speed.

    Args:
        source: a name in :data:`lora_lab.models.shapes.TABLE`, such as "llama-3-8b"; or a folder with a config.json, or
            the path of such a file. What our Llama cannot be is built by transformers, with the class that the config
            names.

    Raises:
        FileNotFoundError: there is no such name and no such file.
        ValueError: the config is damaged, or of an architecture that transformers does not know either.
        ModuleNotFoundError: the config needs transformers, which is not installed.
    """
    if str(source) in shapes.TABLE:
        return partial(Llama, shapes.config(str(source)))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no model {str(source)!r}; use a folder with a config.json, the path of one, or one of: "
            f"{', '.join(shapes.TABLE)}."
        )
    entries = _config_entries(path)
    if misfit(entries) is None:
        return partial(Llama, config_from_hf(entries, path))
    return partial(huggingface.build, huggingface.read_config(path))


def _config_entries(path: Path) -> dict[str, Any]:
    """The entries of a folder's config.json, or of a file of another name."""
    if path.is_dir() or not path.suffix:
        repair(path)
        path = path / "config.json"
    return read_entries(path)


def save_model(
    model: nn.Module,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    format: str = "safetensors",
    dtype: str | None = None,
) -> Path:
    """Write a model to a Hugging Face folder, or to a GGUF file for llama.cpp and Ollama, and return the path.

    A folder holds config.json, model.safetensors, and the tokenizer if there is one.
    ``transformers.AutoModelForCausalLM.from_pretrained(folder)`` reads it with equal logits. An older model in the
    folder stays complete until the new one is: see :func:`lora_lab.system.files.atomic_files`. A GGUF file is whole or
    not there. :func:`load_pretrained` reads both, if a tokenizer is in it. Matrices in blocks are written dequantised.

    Args:
        model: a :class:`lora_lab.Llama`, or a model of transformers, which writes the files of a folder itself.
        path: of the folder; for GGUF, of the file, which must end in ".gguf".
        tokenizer: of the model; a GGUF file needs one.
        format: "safetensors" (a folder) or "gguf" (a file; of the models of transformers, for Llama, Mistral, Qwen2 and
            Qwen3 with the default settings of their positions).
        dtype: of a GGUF file's matrices: "f32", "f16" (None means this) or "q8_0" (8.5 bits per weight, where rows are
            whole blocks of 32). A folder keeps the model's own.

    Raises:
        ValueError: the model has adapters that are not merged, or is of another library; the folder holds an adapter;
            a weight is NaN or infinite; the format or its dtype is unknown; or a GGUF file cannot hold the model, the
            tokenizer, or a number of the model.
        OSError: the path cannot be written to, or the disk is full.
    """
    if lora_layers(model):
        raise ValueError(
            "The model has adapters; merge(model) first, or save the adapters alone with save_adapter(model, folder)."
        )
    path = as_path(path, "path")
    if format == "gguf":
        if tokenizer is None:
            raise ValueError(
                "A GGUF file holds the tokenizer too; pass it: save_model(model, path, tokenizer, 'gguf')."
            )
        write_gguf(path, layout_of(model), _dense_state(model), tokenizer, dtype or "f16")
    elif format != "safetensors":
        raise ValueError(f"format is {format!r}, but it must be 'safetensors' (a folder) or 'gguf' (a file).")
    elif dtype is not None:
        raise ValueError(
            f"dtype is {dtype!r}, but it is for format='gguf'; a folder holds the model in its own dtype, so convert "
            "the model with model.to(...) first."
        )
    else:
        huggingface.check_separate(path, "model")
        _save_folder(model, path, tokenizer)
    return path


def _save_folder(model: nn.Module, folder: Path, tokenizer: Tokenizer | None) -> None:
    # Of what older models may have left: a template would be read first, settings of generation belong to the old one.
    outdated = [GENERATION, *([] if tokenizer is None else [TEMPLATE])]
    with atomic_files(folder, remove=outdated) as temporary:
        if tokenizer is not None:
            tokenizer.save(temporary)
        if isinstance(model, Llama):
            _write_llama(model, temporary, tokenizer)
        else:
            huggingface.save(model, temporary, _without_blocks(model, model.state_dict()))


def _write_llama(model: Llama, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write config.json and model.safetensors."""
    state = _dense_state(model)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    known = {name: token for name, token in ids.items() if token is not None}
    write_json(folder / "config.json", config_to_hf(model.config, next(iter(state.values())).dtype) | known)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _dense_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a Llama, or of a relative, by Hugging Face's names, as :func:`_without_blocks` leaves them."""
    tied = model.config.tie_word_embeddings  # the head is the embedding's matrix, which is written once
    state = {name: value for name, value in model.state_dict().items() if not (tied and name.startswith("lm_head."))}
    return _without_blocks(model, state)


def _without_blocks(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state, with matrices in blocks dequantised under their usual names; the state is changed."""
    for name, module in model.named_modules():
        if isinstance(module, BlockWeight) and f"{name}.packed" in state:
            del state[f"{name}.packed"]
            state.pop(f"{name}.steps", None)
            state[f"{name}.weight"] = module.weight
    check_finite(state.items())
    return state


def is_cached() -> bool:
    """Whether SmolLM2 can be loaded without a network."""
    return (cache_folder() / _CACHE_ENTRY).is_dir()


def _smollm2_folder() -> Path:
    """The folder of SmolLM2 in the cache, written at first use: raw blocks, config and tokenizer."""
    folder = cache_folder() / _CACHE_ENTRY
    if folder.is_dir():
        if lacking := [name for name in FILES if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{folder} lacks the file {lacking[0]}; delete the folder, and it is made anew.")
        return folder
    with cache_lock(_CACHE_ENTRY):
        if not folder.is_dir():  # no other process has made it while this one waited
            stored = read_gguf(fetch_smollm2())
            with atomic_folder(folder) as temporary:
                _write_blocks(stored, temporary)
    return folder


def _write_blocks(stored: StoredModel, folder: Path) -> None:
    stored.tokenizer.save(folder)
    write_json(folder / "config.json", config_to_hf(stored.config, torch.float32))
    save_file(stored.tensors, folder / "model.safetensors", metadata={_KINDS: json.dumps(stored.kinds)})


def _read_folder(folder: Path, entries: dict[str, Any]) -> StoredModel:
    config = config_from_hf(entries, folder / "config.json")
    saved = carried_json(folder / "model.safetensors", "config.json")  # None if another program wrote the folder
    if saved is not None and config_from_hf(saved, folder / "model.safetensors") != config:
        raise ValueError(f"{folder}: its config.json is not the one that its weights were saved with; copy both again.")
    stored = StoredModel(config, {}, {}, Tokenizer.load(folder))
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                kinds = from_json((file.metadata() or {}).get(_KINDS, "{}"))
                stored.kinds.update(check(kinds, dict[str, str], _KINDS))
                for name in file.keys():  # noqa: SIM118 - it is not a dict
                    if not name.endswith("rotary_emb.inv_freq"):  # in old folders, and computed from the config here
                        stored.tensors[name] = file.get_tensor(name)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); make or copy it anew.") from None
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """Return the paths of a folder's weights, which are all in it.

    Raises:
        FileNotFoundError: the folder holds no safetensors, or not all that its index names.
        ValueError: the index is damaged, or names files elsewhere.
    """
    # As in transformers, a single file has precedence over an index of several.
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        names = sorted({*check(read_json(index), _Index, str(index))["weight_map"].values()})
    for name in names:
        if PureWindowsPath(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r:.80}, but weights must be files *.safetensors beside it.")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} holds no file *.safetensors, the only format of weights that is read; where you trust the "
            "others, such as *.bin, which can run code, convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)."
        )
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks the file {name}, so it is incomplete; copy the folder again.")
    return [folder / name for name in names]


class _Index(TypedDict):
    weight_map: dict[str, str]  # from a tensor to its file


def _build(stored: StoredModel, origin: Path, dtype: torch.dtype, device: torch.device, keep_blocks: bool) -> Llama:
    """A model with the stored tensors; copying one removes it from ``stored``, so that no weight is held twice."""
    tensors, kinds = stored.tensors, stored.kinds
    if keep_blocks and not kinds:
        raise _no_blocks(origin)
    with torch.device("meta"):
        model = Llama(stored.config)
    if stored.config.tie_word_embeddings:
        tensors.pop(_HEAD, None)  # it is the embedding's matrix
    _check_shapes(stored, model, origin)
    dense: dict[str, Tensor] = {}
    while tensors:
        name, value = tensors.popitem()
        in_blocks = keep_blocks and name in kinds
        # A tensor read from a file is a view of the mapped file: it would change with the file, and it is not aligned
        # in memory, which changes the rounding of a matrix-vector product. So it is copied.
        if in_blocks:
            packed = value.to(device, copy=True).view(-1, BYTES_PER_BLOCK[kinds[name]])
            weight = nn.Parameter(packed, requires_grad=False)
            numbers = packed[:, : FORMATS[kinds[name]].scale_bytes].contiguous().view(torch.float16)  # (27648, 2)
        elif name in kinds:
            weight = numbers = nn.Parameter(dequantize(value, kinds[name]).to(device, dtype))
        else:
            weight = numbers = nn.Parameter(value.to(device, dtype, copy=True))
        check_finite([(name, numbers)], f"{origin} in {dtype}")
        tied = stored.config.tie_word_embeddings and name == _EMBEDDING
        for target in (name, _HEAD) if tied else (name,):
            if in_blocks:
                _put_blocks(model, target.removesuffix(".weight"), weight, kinds[name], dtype)
            else:
                dense[target] = weight
    model.load_state_dict(dense, assign=True, strict=False)  # the blocks are in the model already
    return model.eval()


def _check_first_tokens(stored: StoredModel, origin: Path) -> None:
    """Raise ValueError if the tokenizer puts tokens around every text that the model does not know."""
    largest = max(stored.tokenizer.encode("", add_special_tokens=True), default=0)
    if largest >= stored.config.vocab_size:
        raise ValueError(
            f"{origin}: the tokenizer adds token {largest} to every text, but the model has {stored.config.vocab_size} "
            "tokens; copy both of the same model."
        )


def _check_shapes(stored: StoredModel, model: Llama, origin: Path) -> None:
    """Raise ValueError if the stored tensors are not those of the model, by name and shape."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if stored.config.tie_word_embeddings:
        del expected[_HEAD]
    for name in expected.keys() | stored.tensors.keys():
        if name not in stored.tensors:
            raise ValueError(f"{origin} lacks the tensor {name}, so it is incomplete; copy or make it anew.")
        if name not in expected:
            raise ValueError(f"{origin} holds a tensor {name:.80} that its config does not have; copy or make it anew.")
        value, kind = stored.tensors[name], stored.kinds.get(name)
        is_weight = (value.dtype == torch.uint8 and value.ndim == 2) if kind else value.is_floating_point()
        shape = shape_of(value, kind) if kind and is_weight else tuple(value.shape)
        if shape != expected[name] or not is_weight:
            raise ValueError(
                f"{origin}: tensor {name} has shape {shape} of {value.dtype}, but its config requires "
                f"{expected[name]} of floating-point numbers; copy the config and the weights of the same model."
            )


def _put_blocks(model: Llama, name: str, packed: nn.Parameter, kind: str, dtype: torch.dtype) -> None:
    """Replace the layer of that name by one in blocks; its bias, if it has one, must still be loaded."""
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Embedding):
        in_blocks = BlockEmbedding(packed, kind, layer.weight.shape, dtype=dtype)
    else:
        linear = cast(nn.Linear, layer)
        in_blocks = BlockLinear(packed, kind, linear.weight.shape, linear.bias, dtype=dtype)
    replace(model, name, in_blocks)
