"""Models of transformers, of any architecture: from a folder, or from a config.json without weights.

Only this file imports transformers (``pip install "lora-lab[hf]"``), and only when it is asked for such a model. No
code that a folder may hold is run, and no weights are read but safetensors.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_lab.system.wording import shortened

ADAPTER_CONFIG = "adapter_config.json"  # of peft; where transformers finds it, it puts the adapter on the model
# In the order in which they are tried where a config names no architecture with a head.
_HEADS = (
    "MODEL_FOR_MASKED_LM_MAPPING",  # before the next, which makes decoders of encoders
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
)


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "This model needs transformers, which is not installed; run pip install 'lora-lab[hf]'."
        ) from None
    return transformers


def read_config(path: Path) -> Any:
    """Return the config of transformers in a folder's config.json, or in a JSON file of another name.

    Args:
        path: of which :func:`lora_lab.models.shapes.read_entries` has limited the sizes.

    Raises:
        ValueError: transformers does not know the architecture, or cannot read the file.
        ModuleNotFoundError: transformers is not installed.
    """
    transformers = _transformers()
    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the entries of the file lead to
        raise _not_possible(f"transformers {transformers.__version__} cannot read {path}", error) from None


def model_class(config: Any) -> Any:
    """Return the class of a config's model, with a head: the first architecture that it names, or the usual one.

    Raises:
        ValueError: transformers has no such class.
    """
    transformers = _transformers()
    bare = transformers.MODEL_MAPPING.get(type(config), None)
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    usual = [getattr(transformers, name).get(type(config), None) for name in _HEADS]
    for kind in (*named, *usual):
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind is not bare:
            return kind
    raise ValueError(
        f"transformers {transformers.__version__} has no model with a head for a config of type {config.model_type!r}."
    )


def build(config: Any) -> nn.Module:
    """Return a model with random weights, or without any on torch's meta device.

    Args:
        config: from :func:`read_config`; it is not changed.

    Raises:
        ValueError: transformers has no such class, or cannot build the model.
    """
    kind = model_class(config)
    try:
        return kind(copy.deepcopy(config))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError) as error:
        raise _not_possible(f"transformers cannot build a {kind.__name__} of this config", error) from None


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
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
    config = read_config(folder)
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"{folder} holds quantised weights ({method}); load the original ones, and quantize_nf4(model) afterwards."
        )
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds an adapter beside the model, which transformers would put on it; move it elsewhere."
        )
    try:
        model, report = model_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of safetensors, of transformers, and of what the config's entries lead to
        raise _not_possible(f"{folder} cannot be loaded by transformers", error) from None
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder} lacks the tensor {missing[0]}{more}, so it is incomplete; copy or make it anew.")
    return model.to(device).eval()


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
    if new == "model":
        held = "an adapter" if (folder / ADAPTER_CONFIG).is_file() else None
    else:
        weights = (*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin"))
        held = "a model" if weights and (folder / "config.json").is_file() else None
    if held is not None:
        raise ValueError(
            f"{folder} holds {held}, and transformers loads a model with the adapter that is in its folder; name "
            f"another folder for the {new}."
        )


def save(model: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
    """Write the files of a model: config.json, generation_config.json, and safetensors in one file.

    Args:
        state: the tensors to write in place of the model's.

    Raises:
        ValueError: it is not a model of transformers.
    """
    write = getattr(model, "save_pretrained", None)
    if write is None:
        raise ValueError(
            f"A {type(model).__name__} is neither a lora_lab.Llama nor a model of transformers; save its state_dict()."
        )
    write(folder, state_dict=state, max_shard_size="1TB")  # pyright: ignore[reportCallIssue]


def _not_possible(what: str, error: Exception) -> ValueError:
    return ValueError(f"{what}: {shortened(str(error)) or type(error).__name__}")
