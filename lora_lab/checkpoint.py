"""Stop a run at any moment and continue it, bit for bit, from one checked file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lab.history import History, stop_if_diverged
from lora_lab.system.files import atomic_file
from lora_lab.task import bytes_of

_CHECKPOINT = "checkpoint.safetensors"
_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


def save(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: History) -> None:
    """Write all that a run needs to continue: one file, so that weights and history can never be of two moments.

    Raises:
        DivergedError: a weight is no finite number; the older checkpoint stays.
        OSError: the file cannot be written.
    """
    device = next(model.parameters()).device
    tensors = trained(model)
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        stop_if_diverged("weight", math.nan, history.rows[-1])
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    note = {"history": json.dumps(asdict(history)), "frozen": frozen_hash(model)}
    save_tensors(Path(folder) / _CHECKPOINT, tensors, note)


def resume(folder: str | Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, history: History) -> int:
    """Put a run where its checkpoint stands, and return the steps done (0 without a checkpoint).

    All of the checkpoint is checked before anything is changed. torch's random generators become the checkpoint's, so
    it is to be called within :func:`lora_lab.system.device.own_randomness`, as ``fit`` does.

    Raises:
        ValueError: the file is damaged, or of another run or other frozen weights.
    """
    if folder is None or not (Path(folder) / _CHECKPOINT).is_file():
        return 0
    path, device = Path(folder) / _CHECKPOINT, next(model.parameters()).device
    advice = "delete it to start the run anew"
    try:
        tensors, note = load_tensors(path, {"history", "frozen"}, unsigned=True)
        stored = json.loads(note["history"])
        History.from_dict(stored)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({str(error).removesuffix('.')}); {advice}.") from None
    _same_run(path, asdict(history), stored)
    done, steps = len(stored["rows"]) - 1, history.settings["steps"]
    if not 1 <= done <= steps:
        raise ValueError(f"{path} is damaged (it is at step {done} of {steps}); {advice}.")
    if note["frozen"] != frozen_hash(model):
        raise ValueError(f"{path} was made with other frozen weights; load the same model, or use another folder.")
    if found := misfit(tensors, _wanted(model, optimizer, tensors)):
        raise ValueError(f"{path} does not fit this model: {found}; use another folder, or delete it.")
    try:  # first, for these may refuse; what they were before, own_randomness puts back
        torch.set_rng_state(tensors["random.cpu"])
        if device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is damaged (it holds no state of a random generator: {error}); {advice}.") from None
    with torch.no_grad():
        for name, value in trained(model).items():
            value.copy_(tensors[name])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f"optimizer.{name}.step" in tensors:
            for key in _ADAMW_STATE:
                value, state = tensors[f"optimizer.{name}.{key}"], optimizer.state[parameter]
                if key in state:  # a view of the flat optimiser's tensor
                    state[key].copy_(value)
                else:
                    state[key] = value.to(parameter.device)
    history.rows = stored["rows"]
    history.optimizer_bytes = stored["optimizer_bytes"]
    return done


def _wanted(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the checkpoint's tensors must look like."""
    wanted = trained(model)
    for name, parameter in model.named_parameters():
        state = {f"optimizer.{name}.{key}": parameter.detach() for key in _ADAMW_STATE}
        # The optimiser knows nothing of a parameter that took no part in the loss.
        if parameter.requires_grad and not tensors.keys().isdisjoint(state):
            step = optimizer.state.get(parameter, {}).get("step", torch.zeros((), dtype=torch.float32))
            wanted |= state | {f"optimizer.{name}.step": step}
    wanted["random.cpu"] = torch.get_rng_state()
    if "random.cuda" in tensors:  # the run may go on where there is no GPU
        wanted["random.cuda"] = tensors["random.cuda"]
    return wanted


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors that training changes, by the names they have in a checkpoint."""
    changing = {f"parameter.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return changing | {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}


def misfit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """How tensors differ from those that are wanted, in names, shapes and dtypes; None if they do not."""

    def looks(tensor: Tensor) -> str:
        return f"shape {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"

    for name, value in wanted.items():
        if name not in tensors:
            return f"{name} is missing"
        if looks(tensors[name]) != looks(value):
            return f"{name} has {looks(tensors[name])}, not {looks(value)}"
    if unknown := tensors.keys() - wanted.keys():
        return f"the model has no {min(unknown)}"
    return None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> None:
    """Write tensors and a note as one safetensors file, with a SHA-256 over both in its header."""
    # Copies: a tensor that shares memory with another cannot be stored.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    with atomic_file(path) as temporary:
        save_file(copies, temporary, metadata={**note, "sha256": _checksum(copies, note)})


def load_tensors(path: Path, names: set[str], unsigned: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`save_tensors` wrote: tensors on the CPU, and the note.

    Args:
        names: the note's entries.
        unsigned: a file without a checksum will do, as the first versions wrote it.

    Raises:
        ValueError: it is no safetensors file, has another note, or any bit of it has changed. The sentence does not
            name the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The file cannot be read: {error}.") from None
    expected = {"sha256", *names}
    if note.keys() != expected and not (unsigned and note.keys() == names):
        raise ValueError(f"The header has the entries {sorted(note)}, not {sorted(expected)}.")
    checksum = note.pop("sha256", None)
    if checksum is not None and checksum != _checksum(tensors, note):
        raise ValueError("The content does not have the checksum that was written with it.")
    return tensors, note


def _checksum(tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> str:
    """SHA-256 over the note and over each tensor's name, dtype, shape and numbers."""
    digest = hashlib.sha256(json.dumps(note, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _same_run(path: Path, ours: dict[str, Any], stored: dict[str, Any]) -> None:
    ours = json.loads(json.dumps(ours))  # as the file has it: tuples are lists there
    for group in ("task", "method", "settings"):
        for name in {**ours[group], **stored[group]}:  # some settings are there only where they are in use
            mine, theirs = ours[group].get(name), stored[group].get(name)
            if mine != theirs:
                raise ValueError(
                    f"{path} is of another run: its {group}'s {name} is {theirs!r}, "
                    f"not {mine!r}; use another folder, or delete it."
                )


def frozen_hash(model: nn.Module) -> str:
    """A hash of all that is not trained: a resumed adapter must meet the base it was trained on."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(bytes_of(parameter))
    return digest.hexdigest()
