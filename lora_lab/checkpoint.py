"""Checkpoints: a run that was stopped at any moment continues, bit for bit, from one file with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lab.history import History, stop_if_diverged
from lora_lab.system.distributed import ProcessEndedError
from lora_lab.system.files import atomic_file
from lora_lab.system.wording import short_repr, shortened
from lora_lab.task import bytes_of

_CHECKPOINT = "checkpoint.safetensors"
_ADVICE = "delete it to restart the run"
_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


def save(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: History,
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Write all that a run needs to continue, into one file, so that weights and history are always of the same step.

    Args:
        folder: for this run alone.
        model, optimizer, history: of the run.
        hashes: of weights by which the run is known: "frozen" (:func:`frozen_hash`, the default) and "start"
            (:func:`parameters_hash` of the model before it was prepared).

    Raises:
        DivergedError: a trained parameter is NaN or infinite; the previous checkpoint stays.
        OSError: the file cannot be written.
    """
    device = next(model.parameters()).device
    tensors = trained(model)
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
    save_tensors(Path(folder) / _CHECKPOINT, tensors, hashes or {"frozen": frozen_hash(model)})


def resume(
    folder: str | Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: History,
    hashes: Mapping[str, str] | None = None,
) -> int:
    """Restore a run from its checkpoint, and return the number of steps done (0 without a checkpoint).

    The whole checkpoint is checked before anything is changed. The states of torch's global random generators are
    restored too, so call it within :func:`lora_lab.system.device.own_randomness`, as ``fit`` does.

    Args:
        folder, model, optimizer, history, hashes: as for :func:`save`; the history has no rows yet.

    Raises:
        ValueError: the file is damaged, or belongs to another run, to other frozen weights or to another start.
    """
    if (path := _path(folder)) is None:
        return 0
    tensors, note, stored = _read(path)
    _check_same_run(path, history, stored)
    for name, value in (hashes or {"frozen": frozen_hash(model)}).items():
        _check_hash(path, note, name, value)
    device = next(model.parameters()).device
    random_state, gpu_state = tensors.pop("random.cpu", None), tensors.pop("random.cuda", None)
    state = _state(model, optimizer, tensors)
    if difference := mismatch(tensors, state):
        raise ValueError(f"{path} does not fit this model: {difference}; use another folder, or delete it.")
    try:  # first, because these may raise; own_randomness restores the previous states
        torch.set_rng_state(random_state)
        if device.type == "cuda" and gpu_state is not None:  # a run may be resumed on a machine without a GPU
            torch.cuda.set_rng_state(gpu_state, device)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_ADVICE}.") from None
    for name, value in state.items():
        value.copy_(tensors[name])
    history.rows, history.optimizer_bytes = stored.rows, stored.optimizer_bytes
    return len(history.rows) - 1


def remove(folder: str | Path | None) -> None:
    """Remove the checkpoint of a run that has ended, and its folder if nothing else is in it."""
    if folder is not None:
        (Path(folder) / _CHECKPOINT).unlink(missing_ok=True)
        with suppress(OSError):
            Path(folder).rmdir()


def step_of(folder: str | Path | None) -> int | None:
    """Return the step of the checkpoint in a folder; None without a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    stored = stored_history(folder)
    return None if stored is None else len(stored.rows) - 1


def stored_history(folder: str | Path | None) -> History | None:
    """Return the history of the run whose checkpoint is in a folder; None without a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    return None if (path := _path(folder)) is None else _read(path)[2]


def holds(folder: str | Path | None, history: History, model: nn.Module) -> bool:
    """Return whether a folder holds a checkpoint of this run.

    Args:
        folder: of the checkpoint.
        history: of the run, without rows.
        model: as it was loaded, from whose weights the run started.

    Raises:
        ValueError: the file is damaged, or the checkpoint is of another run.
    """
    if (path := _path(folder)) is None:
        return False
    _, note, stored = _read(path)
    _check_same_run(path, history, stored)
    if "start" in note:
        _check_hash(path, note, "start", parameters_hash(model))
    return True


@contextmanager
def advice_if_a_process_ends(folder: str | Path | None) -> Iterator[None]:
    """Let a ProcessEndedError from the block say from which step the run can go on."""
    try:
        yield
    except ProcessEndedError as error:
        raise ProcessEndedError(error.reason, _advice(folder)) from None


@contextmanager
def advice_if_interrupted(folder: str | Path | None) -> Iterator[None]:
    """The same for a KeyboardInterrupt."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_advice(folder)) from None


def _advice(folder: str | Path | None) -> str:
    """How a run that has ended early can go on."""
    if folder is None:
        return "the run cannot be resumed, because it writes no checkpoints"
    if (step := step_of(folder)) is None:
        return f"{folder} holds no checkpoint yet, so start the same command again from the beginning"
    return f"the checkpoint in {folder} is whole, at step {step}: start the same command again to go on"


def _path(folder: str | Path | None) -> Path | None:
    """The checkpoint in a folder; None without one."""
    path = None if folder is None else Path(folder) / _CHECKPOINT
    return path if path and path.is_file() else None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], History]:
    """Return a checkpoint's tensors, the note in its header, and its history, if the checksum is right."""
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if note.pop("sha256", None) != _checksum(tensors, note) or "frozen" not in note:
            raise ValueError("its content does not match the checksum in its header")
        history = History.from_dict(json.loads(bytes(bytes_of(tensors.pop("history")))))
        if len(history.rows) < 2:
            raise ValueError("it has no step")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({shortened(str(error)).removesuffix('.')}); {_ADVICE}.") from None
    return tensors, note, history


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The run's own tensors that a checkpoint fills, by its names; the optimiser's are made where it has none yet."""
    state = trained(model)
    for name, parameter in model.named_parameters():
        # The optimiser has no state for a parameter that took no part in the loss.
        if parameter.requires_grad and any(f"optimizer.{name}.{key}" in tensors for key in _ADAMW_STATE):
            for key in _ADAMW_STATE:
                new = parameter.new_zeros((), dtype=torch.float32) if key == "step" else torch.zeros_like(parameter)
                state[f"optimizer.{name}.{key}"] = optimizer.state[parameter].setdefault(key, new.detach())
    return state


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors that training changes, trainable parameters and buffers, by their names in a checkpoint.

    Non-persistent buffers, those that are not in ``model.state_dict()``, are left out: the model computes them itself.
    """
    parameters = {f"parameter.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    persistent = model.state_dict().keys()
    return parameters | {f"buffer.{name}": buffer for name, buffer in model.named_buffers() if name in persistent}


def mismatch(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first difference from the expected tensors in names, shapes and dtypes, as text; None if there is none."""

    def form(tensor: Tensor) -> str:
        return f"shape {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"

    for name, value in expected.items():
        if name not in tensors:
            return f"{name} is missing"
        if form(tensors[name]) != form(value):
            return f"{name} has {form(tensors[name])}, not {form(value)}"
    if unknown := tensors.keys() - expected.keys():
        return f"the model has no {min(unknown)}"
    return None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> None:
    """Write tensors and a note as one safetensors file, with a SHA-256 checksum of both in its header."""
    # Copies, because safetensors refuses tensors that share memory.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    with atomic_file(path) as temporary:
        save_file(copies, temporary, metadata={**note, "sha256": _checksum(copies, note)})


def _checksum(tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> str:
    """SHA-256 of the note and of each tensor's name, dtype, shape and values."""
    forms = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}
    values = tensors_hash(dict(sorted(tensors.items())))
    return hashlib.sha256(json.dumps([note, forms, values], sort_keys=True).encode()).hexdigest()


def _check_same_run(path: Path, history: History, stored: History) -> None:
    for group in ("task", "method", "settings"):
        there = getattr(stored, group)
        here = json.loads(json.dumps(getattr(history, group)))  # tuples become lists, as in the file
        for name in here | there:  # some settings are stored only if they are in use
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{path} is from another run: its {group}.{name} is {short_repr(there.get(name))}, "
                    f"not {short_repr(here.get(name))}; use another folder, or delete it."
                )


def _check_hash(path: Path, note: Mapping[str, str], name: str, value: str) -> None:
    if note.get(name) != value:
        weights = "has other frozen weights" if name == "frozen" else "is of a run that started from other weights"
        raise ValueError(f"{path} {weights}; load the same model, or use another folder.")


def parameters_hash(model: nn.Module) -> str:
    """A hash of all parameters."""
    return tensors_hash(dict(model.named_parameters()))


def frozen_hash(model: nn.Module) -> str:
    """A hash of the frozen parameters: an adapter must be resumed on the base that it was trained on."""
    return tensors_hash({name: p for name, p in model.named_parameters() if not p.requires_grad})


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names and values, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
