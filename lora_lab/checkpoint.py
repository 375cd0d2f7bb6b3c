"""Checkpoints: a run that was stopped at any moment continues, bit for bit, from one file with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lab.history import History, stop_if_diverged
from lora_lab.system.distributed import ProcessEndedError
from lora_lab.system.files import atomic_file
from lora_lab.system.wording import short_repr
from lora_lab.task import bytes_of

_CHECKPOINT = "checkpoint.safetensors"
_ADVICE = "delete it to restart the run"
_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
_OF_EARLIER_VERSIONS = ("history", "sha256")  # entries of the header: it was there, and there was no checksum at first


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
    before_change: Callable[[], None] = lambda: None,
    hashes: Mapping[str, str] | None = None,
) -> int:
    """Restore a run from its checkpoint, and return the number of steps done (0 without a checkpoint).

    The whole checkpoint is checked before anything is changed. The states of torch's global random generators are
    restored too, so call it within :func:`lora_lab.system.device.own_randomness`, as ``fit`` does.

    Args:
        folder, model, optimizer, history, hashes: as for :func:`save`; the history has no rows yet.
        before_change: called once the checkpoint has been checked, just before the model's weights change.

    Raises:
        ValueError: the file is damaged, or belongs to another run, to other frozen weights or to another start.
    """
    if folder is None or not (Path(folder) / _CHECKPOINT).is_file():
        return 0
    path, device = Path(folder) / _CHECKPOINT, next(model.parameters()).device
    tensors, note, stored = _contents(path)
    tensors = without_nonpersistent(tensors, model)
    _check_same_run(path, asdict(history), stored)
    done, steps = len(stored["rows"]) - 1, history.settings["steps"]
    if not 1 <= done <= steps:
        raise ValueError(f"{path} is damaged (it is at step {done} of {steps}); {_ADVICE}.")
    hashes = hashes or {"frozen": frozen_hash(model)}
    if note["frozen"] != hashes["frozen"]:
        raise ValueError(f"{path} was made with other frozen weights; load the same model, or use another folder.")
    if difference := mismatch(tensors, _expected_tensors(model, optimizer, tensors)):
        raise ValueError(f"{path} does not fit this model: {difference}; use another folder, or delete it.")
    _check_start(path, note, hashes.get("start"))
    try:  # first, because these may raise; own_randomness restores the previous states
        torch.set_rng_state(tensors["random.cpu"])
        if device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is damaged (it holds no state of a random generator: {error}); {_ADVICE}.") from None
    before_change()
    with torch.no_grad():
        for name, value in trained(model).items():
            value.copy_(tensors[name])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f"optimizer.{name}.step" in tensors:
            for key in _ADAMW_STATE:
                value, state = tensors[f"optimizer.{name}.{key}"], optimizer.state[parameter]
                if key in state:  # a view of the lean optimiser's flat tensor
                    state[key].copy_(value)
                else:  # a copy: on the CPU ``value`` is a part of the file, which Windows could then not replace
                    state[key] = value.to(parameter.device, copy=True)
    history.rows = stored["rows"]
    history.optimizer_bytes = stored["optimizer_bytes"]
    return done


def remove(folder: str | Path | None) -> None:
    """Remove the checkpoint of a run that has ended, and its folder if nothing else is in it."""
    if folder is not None:
        (Path(folder) / _CHECKPOINT).unlink(missing_ok=True)
        with suppress(OSError):
            Path(folder).rmdir()


def step_of(folder: str | Path | None) -> int | None:
    """The step of the checkpoint in a folder, of which only the history is read; None if there is none.

    Raises:
        ValueError: the history is damaged.
    """
    stored = _stored(folder)
    return None if stored is None else len(stored["rows"]) - 1


def holds(folder: str | Path | None, history: History, model: nn.Module | None = None) -> bool:
    """Whether a folder holds a checkpoint of this run, by its history.

    Args:
        model: as it was loaded, to check the whole file, and that its run started from these weights.

    Raises:
        ValueError: the file is damaged, or the checkpoint is of another run.
    """
    stored = _stored(folder)
    if folder is None or stored is None:
        return False
    path = Path(folder) / _CHECKPOINT
    try:
        _check_same_run(path, asdict(history), stored)
    except ValueError:
        _contents(path)  # a damaged file may look like that of another run
        raise
    if model is not None:
        _check_start(path, _contents(path)[1], parameters_hash(model))
    return True


def _stored(folder: str | Path | None) -> dict[str, Any] | None:
    """The content of the history in a folder's checkpoint, of which nothing else is read; None if there is none."""
    if folder is None or not (path := Path(folder) / _CHECKPOINT).is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = _history_in(file.metadata(), file.get_tensor)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({str(error).removesuffix('.')}); {_ADVICE}.") from None
    return stored


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


def stored_history(folder: str | Path) -> History | None:
    """The history of the run whose checkpoint is in a folder; None without a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    path = Path(folder) / _CHECKPOINT
    return History.from_dict(_contents(path)[2]) if path.is_file() else None


def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """A checkpoint's tensors, its note, and the content of its history."""
    try:
        tensors, note = load_tensors(path, {"frozen"}, {"start", *_OF_EARLIER_VERSIONS})
        stored = _history_in(note, tensors.pop)
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({str(error).removesuffix('.')}); {_ADVICE}.") from None
    return tensors, note, stored


def _history_in(note: Mapping[str, str], tensor: Callable[[str], Tensor]) -> dict[str, Any]:
    """The content of a checkpoint's history, of which earlier versions had the text in the note."""
    stored = json.loads(note["history"] if "history" in note else bytes(bytes_of(tensor("history"))))
    History.from_dict(stored)
    return stored


def _expected_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors with the names, shapes and dtypes that those of the checkpoint must have."""
    expected = trained(model)
    for name, parameter in model.named_parameters():
        state = {f"optimizer.{name}.{key}": parameter.detach() for key in _ADAMW_STATE}
        # The optimiser has no state for a parameter that took no part in the loss.
        if parameter.requires_grad and not tensors.keys().isdisjoint(state):
            step = optimizer.state.get(parameter, {}).get("step", torch.zeros((), dtype=torch.float32))
            expected |= state | {f"optimizer.{name}.step": step}
    expected["random.cpu"] = torch.get_rng_state()
    if "random.cuda" in tensors:  # a run may be resumed on a machine without a GPU
        expected["random.cuda"] = tensors["random.cuda"]
    return expected


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors that training changes, trainable parameters and buffers, by their names in a checkpoint.

    Non-persistent buffers, those that are not in ``model.state_dict()``, are left out: the model computes them itself.
    """
    parameters = {f"parameter.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    persistent = model.state_dict().keys()
    return parameters | {f"buffer.{name}": buffer for name, buffer in model.named_buffers() if name in persistent}


def without_nonpersistent(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A file's tensors without the model's non-persistent buffers, which earlier versions stored too."""
    left_out = {f"buffer.{name}" for name, _ in model.named_buffers()} - trained(model).keys()
    return {name: value for name, value in tensors.items() if name not in left_out}


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


def load_tensors(
    path: Path, names: Set[str], optional: Set[str] = frozenset()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file that :func:`save_tensors` wrote: tensors on the CPU, and the note.

    Args:
        names: of the note's entries.
        optional: names of entries that may be missing, "sha256" too if the file need not have a checksum.

    Raises:
        ValueError: the file is no safetensors file, its note has other entries, or its content has changed. The
            message does not name the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The file cannot be read: {error}.") from None
    expected = {"sha256", *names}
    if not expected - optional <= note.keys() <= expected | optional:
        raise ValueError(f"The header has the entries {short_repr(sorted(note))}, not {sorted(expected)}.")
    checksum = note.pop("sha256", None)
    if checksum is not None and checksum != _checksum(tensors, note):
        raise ValueError("The content does not match the checksum in the header.")
    return tensors, note


def _checksum(tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> str:
    """SHA-256 of the note and of each tensor's name, dtype, shape and values."""
    digest = hashlib.sha256(json.dumps(note, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _check_same_run(path: Path, expected: dict[str, Any], stored: dict[str, Any]) -> None:
    expected = json.loads(json.dumps(expected))  # tuples become lists, as in the file
    for group in ("task", "method", "settings"):
        for name in {**expected[group], **stored[group]}:  # some settings are stored only if they are in use
            if stored[group].get(name) != expected[group].get(name):
                raise ValueError(
                    f"{path} is from another run: its {group}.{name} is {short_repr(stored[group].get(name))}, "
                    f"not {short_repr(expected[group].get(name))}; use another folder, or delete it."
                )


def _check_start(path: Path, note: Mapping[str, str], start: str | None) -> None:
    """Raise ValueError if a checkpoint's run started from other weights; earlier versions did not store which."""
    if start is not None and note.get("start", start) != start:
        raise ValueError(
            f"{path} is of a run that started from other weights; load the same model, or use another folder."
        )


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
