"""Rehearse a stack of identical blocks by a few of them.

A Llama of 80 equal blocks takes 80 times the same operations, and a rehearsal spends nearly all its time on them. The
recordings of the same model with two and with three blocks show what one more block adds to a step: a stretch of
operations in each forward and each backward pass, further entries in what is allocated at once for all weights, and
nothing else. :func:`extend` adds it as often as blocks are missing, and checks what it can: the stretch that the third
block adds must be, byte for byte, the one before it. What is only counted, such as FLOPs, needs no more than the counts
of the two (:func:`count_short`).
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
Rehearse = Callable[[nn.Module], tuple[nn.Module, Rehearsed]]  # also returns the model that it has prepared
_FEWEST = 6  # blocks; below, two rehearsals of a shorter model would save little
_LIBRARIES = {"torch", "transformers", "peft", "lora_lab"}  # whose models treat blocks alike that look alike
_INDICES = {"layer", "layer_idx", "layer_id", "layer_index"}  # what our Llama and transformers call a block's number


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


@dataclass(frozen=True)
class BlockRun:
    """Consecutive blocks of a model that differ in nothing but their number.

    Args:
        stack: the name of the ``nn.ModuleList`` that holds all blocks.
        first: the index of the run's first block.
        count: the number of blocks in the run.
        groups: (what a block looks like, how many such blocks follow each other), for the whole stack.
    """

    stack: str
    first: int
    count: int
    groups: Sequence[tuple[Hashable, int]]

    def shorten(self, model: nn.Module, count: int) -> nn.Module:
        """Return a copy of a model that shares its weights, with only ``count`` blocks of the run."""
        rest = slice(self.first + count, self.first + self.count)
        left_out = cast(nn.ModuleList, model.get_submodule(self.stack))[rest]
        short = copy_sharing_weights(model, left_out)
        del cast(nn.ModuleList, short.get_submodule(self.stack))[rest]
        return short

    def fits(self, short: nn.Module, count: int) -> bool:
        """Return whether the prepared shortened model has the blocks of the whole one, except those left out."""
        return _group_blocks(short) == [(look, count if size == self.count else size) for look, size in self.groups]


def longest_run(model: nn.Module) -> BlockRun | None:
    """Return the longest run of blocks that look alike; None if it is too short to matter, or looks may deceive.

    Blocks look alike if their modules have the same classes, the same settings (numbers, texts and truth values), and
    parameters and buffers of the same shapes, dtypes and need of a gradient. That decides only for models whose code is
    known: all modules must come from torch, transformers, peft or this package, and a list in the model's config with
    an entry for each block must have the same entry throughout.

    Args:
        model: ready to train.
    """
    blocks, groups = transformer_blocks(model), _group_blocks(model)
    place = max(range(len(groups)), key=lambda i: groups[i][1], default=0)
    if not groups or groups[place][1] < _FEWEST:
        return None
    if any(type(module).__module__.partition(".")[0] not in _LIBRARIES for module in model.modules()):
        return None
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for value in vars(part).values() if hasattr(part, "__dict__") else ():
            of_blocks = isinstance(value, list | tuple) and len(value) == len(blocks)
            if of_blocks and any(entry != value[0] for entry in value):
                return None
    stack = next(iter(blocks)).rpartition(".")[0]
    if any(part.isdigit() for part in stack.split(".")):  # parts of one block, such as experts
        return None
    return BlockRun(stack, sum(size for _, size in groups[:place]), groups[place][1], groups)


def _group_blocks(model: nn.Module) -> list[tuple[Hashable, int]]:
    looks = map(_look, transformer_blocks(model).values())
    return [(look, len(list(same))) for look, same in itertools.groupby(looks)]


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


def _rehearse_short(model: nn.Module, run: BlockRun, rehearse: Rehearse[Rehearsed]) -> Iterator[Rehearsed]:
    """Rehearse the model with 2, 3 and 4 blocks of a run; end early if the method does not fit a shortened model."""
    for blocks in (2, 3, 4):
        try:
            short, rehearsed = rehearse(run.shorten(model, blocks))
        except ValueError:  # the method names blocks one by one, and some of them are left out
            return
        if not run.fits(short, blocks):
            return
        yield rehearsed


def count_short(model: nn.Module, run: BlockRun, count: Rehearse[Counter[Key]]) -> Counter[Key] | None:
    """Return what counting a step of the whole model would give, if each further block adds what the third one adds.

    Args:
        model: as it is before it is prepared.
        run: what :func:`longest_run` found in the prepared model.
        count: prepares a copy of a model and counts something in a step.

    Returns:
        The counts; None if the method does not fit a shortened model.
    """
    counts = list(itertools.islice(_rehearse_short(model, run, count), 2))
    if len(counts) < 2:
        return None
    few, more = counts
    return Counter({key: few[key] + (run.count - 2) * (more[key] - few[key]) for key in few | more})


def record_short(model: nn.Module, run: BlockRun, record: Rehearse[Recording]) -> Recording | None:
    """Return what recording the whole model would give, from recordings of it with two to four blocks of a run.

    Args:
        model, run: as for :func:`count_short`.
        record: prepares a copy of a model and records a step.

    Returns:
        The recording; None if the shortened models do not determine it.
    """
    pairs = itertools.pairwise(_rehearse_short(model, run, record))
    longest = (extend(*pair, run.count - few) for few, pair in enumerate(pairs, start=2))
    return next((recording for recording in longest if recording is not None), None)


def extend(shorter: Recording, longer: Recording, blocks: int) -> Recording | None:
    """Return the recording of a model with ``blocks`` more blocks than in ``shorter``; ``longer`` has one more.

    Returns:
        The recording; None if the two differ in more than a regular block.
    """
    few, more = (
        [list(same) for _, same in itertools.groupby(recording.operations, key=lambda operation: operation.phase)]
        for recording in (shorter, longer)
    )
    saved = _extrapolate(shorter.saved, longer.saved, blocks)
    if saved is None or len(few) != len(more):
        return None
    operations: list[RecordedOperation] = []
    for passes in zip(few, more, strict=True):
        if (longest := _extend_pass(*passes, blocks)) is None:
            return None
        operations += longest
    return Recording(longer.setting, operations, saved)


def _extend_pass(
    few: Sequence[RecordedOperation], more: Sequence[RecordedOperation], blocks: int
) -> list[RecordedOperation] | None:
    """:func:`extend` for one forward pass, one backward pass or one step of the optimiser."""
    length = len(more) - len(few)  # of the stretch that one block adds
    alike = itertools.takewhile(lambda pair: _same_name(*pair), zip(few, more, strict=False))
    latest = sum(1 for _ in alike)  # where the stretch may begin: it can be moved forward by parts of a period
    for place in range(latest, length - 1, -1):
        before, stretch, after = more[place - length : place], more[place : place + length], more[place + length :]
        if length < 0 or not all(map(_same_name, few[place:], after)):
            return None
        if all(map(_same_bytes, before, stretch)):
            shared = [_interpolate(*pair, blocks) for pair in zip(few, [*more[:place], *after], strict=True)]
            known = [operation for operation in shared if operation is not None]
            if len(known) == len(few):
                copies = _copy_stretch(few[place - length : place], before, stretch, blocks)
                return [*known[:place], *copies, *known[place:]]
    return None


def _copy_stretch(
    before_in_few: Sequence[RecordedOperation],
    before: Sequence[RecordedOperation],
    stretch: Sequence[RecordedOperation],
    blocks: int,
) -> Iterator[RecordedOperation]:
    """Yield the stretch once for each of the further blocks, with the numbers of these blocks in the modules' names."""
    for copy in range(1, blocks + 1):
        for few, earlier, last in zip(before_in_few, before, stretch, strict=True):
            if not last.module:
                yield last
                continue
            names, weights = (few.module, earlier.module, last.module), (1 - blocks, blocks - copy, copy)
            module = _renumber(names, weights)
            yield RecordedOperation(last.phase, last.name, module, last.allocated, last.released)


def _same_name(one: RecordedOperation, other: RecordedOperation) -> bool:
    return (one.phase, one.name) == (other.phase, other.name)


def _same_bytes(one: RecordedOperation, other: RecordedOperation) -> bool:
    return (one.name, one.allocated, one.released) == (other.name, other.allocated, other.released)


def _interpolate(few: RecordedOperation, more: RecordedOperation, blocks: int) -> RecordedOperation | None:
    """Return an operation that both have: its sizes and numbers change by the same amount with each block."""
    allocated = _extrapolate(few.allocated, more.allocated, blocks)
    released = _extrapolate(few.released, more.released, blocks)
    if allocated is None or released is None:
        return None
    module = _renumber((few.module, more.module), (1 - blocks, blocks))
    return RecordedOperation(few.phase, few.name, module, allocated, released)


def _extrapolate(few: Sequence[Storage], more: Sequence[Storage], blocks: int) -> Sequence[Storage] | None:
    """Return storages that grow in size, or in number, by the same amount with each block; None if any shrinks."""
    if few == more:  # nearly always
        return few
    fewer, further = Counter(few), Counter(more)
    storages = list((fewer & further).elements())
    old, new = sorted((fewer - further).elements()), sorted((further - fewer).elements())
    for part in Part:
        of_old, of_new = ([size for of_part, size in rest if of_part == part] for rest in (old, new))
        added = len(of_new) - len(of_old)
        if added < 0 or any(map(operator.gt, of_old, of_new[added:])):
            return None
        storages += blocks * [(part, size) for size in of_new[:added]]
        pairs = zip(of_old, of_new[added:], strict=True)
        storages += [(part, size + blocks * (larger - size)) for size, larger in pairs]
    return storages


@lru_cache(maxsize=2**14)
def _renumber(names: tuple[str, ...], weights: tuple[int, ...]) -> str:
    """Return the last name, with each number in it replaced by the weighted sum of those at its place in all names."""
    texts = [re.split(r"(\d+)", name) for name in names]
    if len(set(map(len, texts))) > 1:
        return names[-1]
    numbers = [[int(part) for part in text[1::2]] for text in texts]
    sums = (sum(map(operator.mul, weights, places)) for places in zip(*numbers, strict=True))
    return re.sub(r"\d+", lambda _: str(next(sums)), names[-1])
