"""Checkpoints: a run that was stopped at any moment continues, bit for bit, from one file with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lab.history import History, stop_if_diverged
from lora_lab.system.distributed import ProcessEndedError
from lora_lab.system.files import atomic_file
from lora_lab.system.provenance import bytes_of
from lora_lab.system.wording import short_repr, shortened

Folder = str | Path | None
_CHECKPOINT = "checkpoint.safetensors"


class _Saved(NamedTuple):
    """What a checkpoint holds: its tensors, the hash of the weights before training, and the history so far."""

    path: Path
    tensors: dict[str, Tensor]
    start: str
    history: History


def save(folder: str | Path, model: nn.Module, optimizer: Optimizer, history: History, start: str) -> None:
    """Write all that a run needs to continue, into one file, so that weights and history are always of the same step.

    Args:
        folder: for this run alone.
        model, optimizer, history: of the run.
        start: the hash of the loaded model, from which the run started (:func:`hash_parameters`).

    Raises:
        DivergedError: a trained parameter is NaN or infinite; the previous checkpoint stays.
        OSError: the file cannot be written.
    """
    device, tensors = next(model.parameters()).device, _find_trained(model)
    for name, parameter in model.named_parameters():  # a buffer may be infinite, such as a causal mask
        if parameter.requires_grad and not bool((finite := torch.isfinite(parameter.detach())).all()):
            stop_if_diverged(f"parameter {name!r}", parameter.detach()[~finite][0].item(), history.rows[-1])
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    # A tensor, because a header of safetensors holds at most 100 MB. vars, because asdict copies every row.
    tensors["history"] = torch.frombuffer(bytearray(json.dumps(vars(history)).encode()), dtype=torch.uint8)
    save_tensors(Path(folder) / _CHECKPOINT, tensors, {"start": start})


def resume(folder: Folder, model: nn.Module, optimizer: Optimizer, history: History) -> int:
    """Restore a run from its checkpoint, and return the number of steps done (0 without a checkpoint).

    That it is of this run is checked by :func:`check_belongs`, before the model is prepared. The states of torch's
    global random generators are restored too, so call it within :func:`lora_lab.system.device.own_randomness`, as
    ``fit`` does.

    Args:
        folder, model, optimizer, history: as for :func:`save`; the history has no rows yet.

    Raises:
        ValueError: the file is damaged, or does not fit the prepared model. No weight is changed then.
    """
    if (saved := _read(folder)) is None:
        return 0
    device, tensors = next(model.parameters()).device, saved.tensors
    cpu_state, gpu_state = tensors.pop("random.cpu", torch.empty(0)), tensors.pop("random.cuda", None)
    state = _find_trained(model)
    for name, parameter in model.named_parameters():
        # AdamW makes its state at its first step; it is made here so that names and shapes can be compared, and then
        # filled. There is none for a parameter that took no part in the loss.
        if parameter.requires_grad and f"optimizer.{name}.step" in tensors:
            for key in ("step", "exp_avg", "exp_avg_sq"):
                new = torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
                state[f"optimizer.{name}.{key}"] = optimizer.state[parameter].setdefault(key, new)
    if different := _describe(tensors).items() ^ _describe(state).items():
        raise ValueError(f"{saved.path} does not fit this model: they differ in {min(different)}; use another folder.")
    try:  # first, because these may raise; own_randomness restores the previous states
        torch.set_rng_state(cpu_state)
        if device.type == "cuda" and gpu_state is not None:  # a run may be resumed on a machine without a GPU
            torch.cuda.set_rng_state(gpu_state, device)
    except (RuntimeError, TypeError) as error:
        raise _report_damage(saved.path, error) from None
    for name, value in state.items():
        value.copy_(tensors[name])
    history.rows, history.optimizer_bytes = saved.history.rows, saved.history.optimizer_bytes
    return len(history.rows) - 1


def check_belongs(folder: Folder, history: History, model: nn.Module) -> None:
    """Check that a checkpoint in the folder, if there is one, belongs to this run.

    Args:
        folder: of the checkpoint.
        history: of the run, without rows.
        model: as it was loaded, from whose weights the run started.

    Raises:
        ValueError: the file is damaged, or the checkpoint is of another run.
    """
    if (saved := _read(folder)) is None:
        return
    for group in ("task", "method", "settings"):
        there = getattr(saved.history, group)
        here = json.loads(json.dumps(getattr(history, group)))  # tuples become lists, as in the file
        for name in here | there:  # some settings are stored only if they are in use
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{saved.path} is from another run: its {group}.{name} is {short_repr(there.get(name))}, "
                    f"not {short_repr(here.get(name))}; use another folder, or delete it."
                )
    if saved.start != hash_parameters(model):
        raise ValueError(
            f"{saved.path} is of a run that started from other weights; load the same model, or use another folder."
        )


def read_history(folder: Folder) -> History | None:
    """Return the history of the run whose checkpoint is in a folder; None without a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    saved = _read(folder)
    return saved and saved.history


def remove(folder: Folder) -> None:
    """Remove the checkpoint of a run that has ended, and its folder if nothing else is in it."""
    if folder is not None:
        (Path(folder) / _CHECKPOINT).unlink(missing_ok=True)
        with suppress(OSError):
            Path(folder).rmdir()


@contextmanager
def advise(folder: Folder) -> Iterator[None]:
    """Let a Ctrl-C in the block, or the end of another process, say from which step the run can go on."""
    try:
        yield
    except (KeyboardInterrupt, ProcessEndedError) as error:
        if folder is None:
            advice = "the run cannot be resumed, because it writes no checkpoints"
        elif (history := read_history(folder)) is None:
            advice = f"{folder} holds no checkpoint yet, so start the same command again from the beginning"
        else:
            step = history.rows[-1]["step"]
            advice = f"the checkpoint in {folder} is whole, at step {step}: start the same command again to go on"
        if isinstance(error, ProcessEndedError):
            raise ProcessEndedError(advice) from None
        raise KeyboardInterrupt(advice) from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> None:
    """Write tensors and a note as one safetensors file, with a SHA-256 checksum of both in its header."""
    # Copies, because safetensors refuses tensors that share memory.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    with atomic_file(path) as temporary:
        save_file(copies, temporary, metadata={**note, "sha256": _checksum(copies, note)})


def hash_parameters(model: nn.Module) -> str:
    """Return a hash of all parameters."""
    return hash_tensors(dict(model.named_parameters()))


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and values, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _read(folder: Folder) -> _Saved | None:
    """Return what the checkpoint in a folder holds, if its checksum is right; None without a checkpoint."""
    path = None if folder is None else Path(folder) / _CHECKPOINT
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if note.pop("sha256", None) != _checksum(tensors, note):
            raise ValueError("its content does not match the checksum in its header")
        history = History.from_dict(json.loads(bytes(bytes_of(tensors.pop("history")))))
        if len(history.rows) < 2:
            raise ValueError("it has no step")
        return _Saved(path, tensors, note["start"], history)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _report_damage(path, error) from None


def _report_damage(path: Path, error: Exception) -> ValueError:
    reason = shortened(str(error)).removesuffix(".")
    return ValueError(f"{path} is damaged ({reason}); delete it to restart the run.")


def _find_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes, trainable parameters and buffers, by their names in a checkpoint.

    Non-persistent buffers, those that are not in ``model.state_dict()``, are left out: the model computes them itself.
    """
    parameters = {f"parameter.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    persistent = model.state_dict().keys()
    return parameters | {f"buffer.{name}": buffer for name, buffer in model.named_buffers() if name in persistent}


def _describe(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}


def _checksum(tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> str:
    """Return the SHA-256 of the note and of each tensor's name, dtype, shape and values."""
    values = hash_tensors(dict(sorted(tensors.items())))
    return hashlib.sha256(json.dumps([note, _describe(tensors), values], sort_keys=True).encode()).hexdigest()
