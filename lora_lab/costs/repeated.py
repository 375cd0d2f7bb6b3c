"""Rehearse a stack of identical blocks by a few of them.

A Llama of 80 equal blocks takes 80 times the same operations, and a rehearsal spends nearly all its time on them. The
recordings of the same model with two and with three blocks show what one more block adds to a step: a stretch of
operations in each forward and each backward pass, further entries in what is allocated at once for all weights, and
nothing else. :func:`extend_recording` adds it as often as blocks are missing, and checks what it can: the stretch that
the third block adds must be, byte for byte, the one before it. What is only counted, such as FLOPs, needs no more than
the counts of the two (:func:`extend_counts`).
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch
from torch import nn

from lora_lab.costs.bill import Part, RecordedOperation, Recording, Storage
from lora_lab.costs.fake import copy_sharing_weights, meta_copy
from lora_lab.costs.setup import Setup
from lora_lab.inject import match_layers
from lora_lab.system.device import own_randomness

Key = TypeVar("Key", bound=Hashable)
Rehearsed = TypeVar("Rehearsed")  # what a rehearsal records or counts
_FEWEST = 6  # blocks; below, two rehearsals of a shorter model would save little
_LIBRARIES = {"torch", "transformers", "peft", "lora_lab"}  # whose models treat blocks alike that look alike
_NAME = operator.attrgetter("phase", "name")
_BYTES = operator.attrgetter("name", "allocated", "released")
# What our Llama and transformers call a block's number.
_INDICES = {"layer", "layer_idx", "layer_id", "layer_index"}


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's stack of blocks by name, lowest first: the entries of its longest ``nn.ModuleList``."""
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=lambda pair: pair[0], default=(0, ""))[1]
    return {name: m for name, m in model.named_modules() if longest and name.rpartition(".")[0] == longest}


def last_blocks(model: nn.Module, count: int) -> list[str]:
    """Return the linear layers of the last ``count`` blocks, as ``targets``: no gradient is computed below them.

    Raises:
        ValueError: the model has fewer blocks, or none.
    """
    names = list(transformer_blocks(model))
    if not 1 <= count <= len(names):
        raise ValueError(f"count is {count}, but {type(model).__name__} is a stack of {len(names)} blocks.")
    prefixes = tuple(f"{name}." for name in names[len(names) - count :])
    return [layer for layer in match_layers(model, "all-linear", ()) if layer.startswith(prefixes)]


def blocks_are_alike(model: nn.Module) -> bool:
    """Return whether the blocks of a model's stack look alike, and are so many that a few of them save time.

    Blocks look alike if their modules have the same classes, the same settings (numbers, texts and truth values), and
    parameters and buffers of the same shapes, dtypes and need of a gradient. That decides only for models whose code is
    known: all modules must come from torch, transformers, peft or this package, and a list in the model's config with
    an entry for each block must have the same entry throughout.

    Args:
        model: ready to train.
    """
    blocks = transformer_blocks(model)
    if len(blocks) < _FEWEST or len(set(map(_look, blocks.values()))) > 1:
        return False
    if any(type(module).__module__.partition(".")[0] not in _LIBRARIES for module in model.modules()):
        return False
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for value in vars(part).values() if hasattr(part, "__dict__") else ():
            of_blocks = isinstance(value, list | tuple) and len(value) == len(blocks)
            if of_blocks and any(entry != value[0] for entry in value):
                return False
    return not any(part.isdigit() for part in next(iter(blocks)).split(".")[:-1])  # parts of one block, such as experts


def _look(block: nn.Module) -> Hashable:
    """Return all of a block that may decide which operations it takes."""
    modules = []
    for name, module in block.named_modules():
        settings = [
            (key, len(value) if isinstance(value, dict) else value)  # hooks are held in dictionaries
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | torch.dtype | dict | None) and key not in _INDICES
        ]
        tensors = [
            (key, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        ]
        modules.append((name, type(module), tuple(settings), tuple(tensors)))
    return tuple(modules)


def prepare_shapes(model: nn.Module, setup: Setup) -> nn.Module:
    """Return a copy of a model, ready to train, on the meta device: a tenth of the time that fake tensors take."""
    with torch.device("meta"), own_randomness(torch.device("cpu"), 0):
        return setup.step(meta_copy(model, setup.dtype)).model


def rehearse(
    model: nn.Module,
    alike: bool,
    record: Callable[[nn.Module], Rehearsed],
    extend: Callable[[Rehearsed, Rehearsed, int], Rehearsed],
) -> Rehearsed:
    """Return what a rehearsal of the whole model records; if possible, from those with two to four blocks.

    Args:
        model: as it is before it is prepared.
        alike: whether :func:`blocks_are_alike` in the prepared model.
        record: prepares a copy of a model, and records something of a step.
        extend: makes the record of a longer model from those of two shorter ones, of which the second has a block more,
            and from the number of blocks that the first lacks; raises ValueError if they do not determine it.
    """
    if alike:
        # Also where the method names blocks one by one, and some of them are left out.
        with suppress(ValueError):
            shorter = record(_keep_blocks(model, 2))
            for count in (3, 4):  # the first and the last block may differ from those between
                longer = record(_keep_blocks(model, count))
                with suppress(ValueError):
                    return extend(shorter, longer, len(transformer_blocks(model)) - count + 1)
                shorter = longer
    return record(model)


def _keep_blocks(model: nn.Module, count: int) -> nn.Module:
    """Return a copy of a model that shares its weights, with only the first ``count`` blocks."""
    blocks = transformer_blocks(model)
    short = copy_sharing_weights(model, list(blocks.values())[count:])
    del cast(nn.ModuleList, short.get_submodule(next(iter(blocks)).rpartition(".")[0]))[count:]
    return short


def extend_counts(shorter: Counter[Key], longer: Counter[Key], blocks: int) -> Counter[Key]:
    """Return the counts of a model with ``blocks`` more blocks than in ``shorter``; ``longer`` has one more."""
    return Counter({key: shorter[key] + blocks * (longer[key] - shorter[key]) for key in shorter | longer})


def extend_recording(shorter: Recording, longer: Recording, blocks: int) -> Recording:
    """Return the recording of a model with ``blocks`` more blocks than in ``shorter``; ``longer`` has one more.

    Raises:
        ValueError: the two differ in more than a regular block.
    """
    few, more = (
        [list(same) for _, same in itertools.groupby(recording.operations, key=operator.attrgetter("phase"))]
        for recording in (shorter, longer)
    )
    passes = [_extend_pass(*both, blocks) for both in zip(few, more, strict=True)]
    saved = _extrapolate(shorter.saved, longer.saved, blocks)
    return Recording(longer.setting, list(itertools.chain(*passes)), saved)


def _extend_pass(few: list[RecordedOperation], more: list[RecordedOperation], blocks: int) -> list[RecordedOperation]:
    """:func:`extend_recording` for one forward pass, one backward pass or one step of the optimiser."""
    length = len(more) - len(few)  # of the stretch that one block adds
    alike = itertools.takewhile(lambda pair: _NAME(pair[0]) == _NAME(pair[1]), zip(few, more, strict=False))
    # Where the stretch may begin: it can be moved forward by parts of a period.
    latest = sum(1 for _ in alike)
    for place in range(latest, length - 1, -1):
        before, stretch, after = more[place - length : place], more[place : place + length], more[place + length :]
        if length < 0 or [*map(_NAME, few[place:])] != [*map(_NAME, after)]:
            break
        if [*map(_BYTES, before)] == [*map(_BYTES, stretch)]:
            with suppress(ValueError):
                shared = [_interpolate(*pair, blocks) for pair in zip(few, [*more[:place], *after], strict=True)]
                return [*shared[:place], *(blocks * stretch), *shared[place:]]
    raise ValueError("No block is like the one before.")


def _interpolate(few: RecordedOperation, more: RecordedOperation, blocks: int) -> RecordedOperation:
    """Return an operation that both have: its sizes change by the same amount with each block."""
    allocated = _extrapolate(few.allocated, more.allocated, blocks)
    return more._replace(allocated=allocated, released=_extrapolate(few.released, more.released, blocks))


def _extrapolate(few: Sequence[Storage], more: Sequence[Storage], blocks: int) -> Sequence[Storage]:
    """Return storages that grow in size, or in number, by the same amount with each block."""
    if few == more:  # nearly always
        return few
    fewer, further = Counter(few), Counter(more)
    storages = list((fewer & further).elements())
    changed = [sorted(rest.elements(), reverse=True) for rest in (fewer - further, further - fewer)]
    for part in Part:
        old_sizes, new_sizes = ([size for of_part, size in rest if of_part == part] for rest in changed)
        for size, larger in itertools.zip_longest(old_sizes, new_sizes):
            if larger is None or (size or 0) > larger:
                raise ValueError("A storage becomes smaller.")
            storages += blocks * [(part, larger)] if size is None else [(part, size + blocks * (larger - size))]
    return storages
