"""Rehearsing a stack of identical blocks by a few of them.

A Llama of 80 equal blocks takes 80 times the same operations, and a rehearsal spends nearly all its time on them. The
recordings of the same model with two and with three blocks show what one more block adds to a step: a stretch of
operations in each forward and each backward pass, further entries in what is allocated at once for all weights, and
nothing else. :func:`extended` adds it as often as blocks are missing, and checks what it can: the stretch that the
third block adds must be, byte for byte, the one that precedes it. What is only counted, such as FLOPs, needs no more
than the counts of the two (:func:`count_short`).
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

from lora_lab.costs.bill import Part
from lora_lab.costs.fake import copy_sharing_weights, meta_copy
from lora_lab.costs.recording import Operation, Recording, Storage
from lora_lab.costs.setup import Setup
from lora_lab.inject import transformer_blocks
from lora_lab.system.device import own_randomness

Key = TypeVar("Key", bound=Hashable)
Rehearsed = TypeVar("Rehearsed")  # what a rehearsal records or counts
_FEWEST = 6  # blocks; below, two rehearsals of a shorter model would save little
_LIBRARIES = {"torch", "transformers", "peft", "lora_lab"}  # whose models treat blocks alike that look alike
_INDICES = {"layer", "layer_idx", "layer_id", "layer_index"}  # what our Llama and transformers call a block's number


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
    groups: tuple[tuple[Hashable, int], ...]

    def shortened(self, model: nn.Module, count: int) -> nn.Module:
        """A copy of a model that shares its weights, with only ``count`` blocks of the run."""
        rest = slice(self.first + count, self.first + self.count)
        left_out = cast(nn.ModuleList, model.get_submodule(self.stack))[rest]
        short = copy_sharing_weights(model, left_out)
        del cast(nn.ModuleList, short.get_submodule(self.stack))[rest]
        return short

    def fits(self, short: nn.Module, count: int) -> bool:
        """Whether the prepared shortened model has the blocks of the whole one, except those left out."""
        expected = [(look, count if size == self.count else size) for look, size in self.groups]
        return list(_groups(short)) == expected


def longest_run(model: nn.Module) -> BlockRun | None:
    """The longest run of blocks that look alike; None if it is too short to matter, or looks may deceive.

    Blocks look alike if their modules have the same classes, the same settings (numbers, texts and truth values), and
    parameters and buffers of the same shapes, dtypes and need of a gradient. That decides only for models whose code is
    known: all modules must come from torch, transformers, peft or this package, and a list in the model's config with
    an entry for each block must have the same entry throughout.

    Args:
        model: ready to train.
    """
    blocks = transformer_blocks(model)
    if any(type(module).__module__.partition(".")[0] not in _LIBRARIES for module in model.modules()):
        return None
    config: Any = getattr(model, "config", None)
    settings = [vars(part) for part in (config, getattr(config, "text_config", None)) if hasattr(part, "__dict__")]
    for value in itertools.chain.from_iterable(setting.values() for setting in settings):
        if isinstance(value, list | tuple) and len(value) == len(blocks) and any(entry != value[0] for entry in value):
            return None
    groups = _groups(model)
    place = max(range(len(groups)), key=lambda i: groups[i][1], default=None)
    if place is None or groups[place][1] < _FEWEST:
        return None
    stack = next(iter(blocks)).rpartition(".")[0]
    if any(part.isdigit() for part in stack.split(".")):  # parts of one block, such as experts
        return None
    return BlockRun(stack, sum(size for _, size in groups[:place]), groups[place][1], groups)


def _groups(model: nn.Module) -> tuple[tuple[Hashable, int], ...]:
    looks = map(_look, transformer_blocks(model).values())
    return tuple((look, len(list(same))) for look, same in itertools.groupby(looks))


def _look(block: nn.Module) -> Hashable:
    """All of a block that may decide which operations it takes."""
    modules = []
    for name, module in block.named_modules():
        attributes = {key: value for key, value in vars(module).items() if key not in _INDICES}
        settings = [
            (key, len(value) if isinstance(value, dict) else value)  # hooks are held in dictionaries
            for key, value in attributes.items()
            if isinstance(value, bool | int | float | str | torch.dtype | dict | None)
        ]
        tensors = [
            (key, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)
            for key, tensor in itertools.chain(
                module.named_parameters(recurse=False), module.named_buffers(recurse=False)
            )
        ]
        modules.append((name, type(module), tuple(settings), tuple(tensors)))
    return tuple(modules)


def prepared_shapes(model: nn.Module, setup: Setup) -> nn.Module:
    """A copy of a model that is ready to train, on the meta device: a tenth of the time that fake tensors take."""
    with torch.device("meta"), own_randomness(torch.device("cpu"), 0):
        return setup.step(meta_copy(model, setup.dtype)).model


def _of_shortened(
    model: nn.Module, run: BlockRun, blocks: int, rehearse: Callable[[nn.Module], tuple[nn.Module, Rehearsed]]
) -> Rehearsed | None:
    """What rehearsing a model with so many blocks of a run gives; None if the method does not fit it."""
    try:
        short, rehearsed = rehearse(run.shortened(model, blocks))
    except ValueError:  # the method names blocks one by one, and some of them are left out
        return None
    return rehearsed if run.fits(short, blocks) else None


def count_short(
    model: nn.Module, run: BlockRun, count: Callable[[nn.Module], tuple[nn.Module, Counter[Key]]]
) -> Counter[Key] | None:
    """What counting a step of the whole model would give, if each further block adds what the third one adds.

    Args:
        model: as it is before it is prepared.
        run: what :func:`longest_run` found in the prepared model.
        count: prepares a copy of a model and counts something in a step; returns the copy and the counts.

    Returns:
        The counts; None if the method does not fit a shortened model.
    """
    counts = []
    for blocks in (2, 3):
        if (counted := _of_shortened(model, run, blocks, count)) is None:
            return None
        counts.append(counted)
    few, more = counts
    return Counter({key: few[key] + (run.count - 2) * (more[key] - few[key]) for key in few | more})


def record_short(
    model: nn.Module, run: BlockRun, record: Callable[[nn.Module], tuple[nn.Module, Recording]]
) -> Recording | None:
    """What recording the whole model would give, from recordings of it with two to four blocks of a run.

    Args:
        model: as it is before it is prepared.
        run: what :func:`longest_run` found in the prepared model.
        record: prepares a copy of a model and records a step; returns the copy and the recording.

    Returns:
        The recording; None if the shortened models do not determine it.
    """
    shorter = None
    for count in (2, 3, 4):
        if (longer := _of_shortened(model, run, count, record)) is None:
            return None
        whole = None if shorter is None else extended(shorter, longer, run.count - count + 1)
        if whole is not None:
            return whole
        shorter = longer
    return None


def extended(shorter: Recording, longer: Recording, blocks: int) -> Recording | None:
    """The recording of a model with ``blocks`` more blocks than in ``shorter``, where ``longer`` has one more.

    Returns:
        The recording; None if the two differ in more than a regular block.
    """
    passes = [
        [list(operations) for _, operations in itertools.groupby(recording.operations, key=lambda o: o.phase)]
        for recording in (shorter, longer)
    ]
    if len(passes[0]) != len(passes[1]):
        return None
    operations: list[Operation] = []
    for few, more in zip(*passes, strict=True):
        if few[0].phase != more[0].phase or (longest := _extended_pass(few, more, blocks)) is None:
            return None
        operations += longest
    saved = _extrapolated(shorter.saved, longer.saved, blocks)
    return None if saved is None else Recording(longer.setting, operations, saved)


def _extended_pass(few: Sequence[Operation], more: Sequence[Operation], blocks: int) -> list[Operation] | None:
    """:func:`extended` for one forward pass, one backward pass or one step of the optimiser."""
    length = len(more) - len(few)  # of the stretch that one block adds
    alike = itertools.takewhile(lambda pair: pair[0].name == pair[1].name, zip(few, more, strict=False))
    latest = sum(1 for _ in alike)  # where the stretch may begin: it can be moved forward by parts of a period
    for place in range(latest, length - 1, -1):
        before, stretch, after = more[place - length : place], more[place : place + length], more[place + length :]
        if length < 0 or [o.name for o in few[place:]] != [o.name for o in after]:
            return None
        if all(map(_same_bytes, before, stretch)):
            pairs = zip(few, [*more[:place], *after], strict=True)
            shared = [operation for pair in pairs if (operation := _between(*pair, blocks)) is not None]
            if len(shared) == len(few):
                copies = _copies(few[place - length : place], before, stretch, blocks)
                return [*shared[:place], *copies, *shared[place:]]
    return None


def _copies(
    before_in_few: Sequence[Operation], before: Sequence[Operation], stretch: Sequence[Operation], blocks: int
) -> Iterator[Operation]:
    """The stretch once for each of the further blocks, with the numbers of these blocks in the modules' names."""
    for copy in range(1, blocks + 1):
        for few, earlier, last in zip(before_in_few, before, stretch, strict=True):
            module = _number_copy(few.module, earlier.module, last.module, blocks, copy) if last.module else ""
            yield Operation(last.phase, last.name, module, last.allocated, last.released)


@lru_cache(maxsize=2**14)
def _number_copy(few: str, earlier: str, last: str, blocks: int, copy: int) -> str:
    return _renumbered((few, earlier, last), lambda a, b, c: a + blocks * (b - a) + copy * (c - b))


def _same_bytes(one: Operation, other: Operation) -> bool:
    return (one.name, Counter(one.allocated), Counter(one.released)) == (
        other.name,
        Counter(other.allocated),
        Counter(other.released),
    )


def _between(few: Operation, more: Operation, blocks: int) -> Operation | None:
    """An operation that both recordings have: its sizes and numbers change by the same amount with each block."""
    allocated = _extrapolated(few.allocated, more.allocated, blocks)
    released = _extrapolated(few.released, more.released, blocks)
    if allocated is None or released is None:
        return None
    module = _renumbered((few.module, more.module), lambda a, b: a + blocks * (b - a))
    return Operation(few.phase, few.name, module, allocated, released)


def _extrapolated(few: Sequence[Storage], more: Sequence[Storage], blocks: int) -> Sequence[Storage] | None:
    """Storages that grow in size, or in number, by the same amount with each block; None if any of them shrinks."""
    if few == more:  # nearly always
        return few
    fewer, further = Counter(few), Counter(more)
    storages = list((fewer & further).elements())
    for part in Part:
        old, new = (
            sorted(size for of_part, size in rest.elements() if of_part == part)
            for rest in (fewer - further, further - fewer)
        )
        added = len(new) - len(old)
        if added < 0 or any(map(operator.gt, old, new[added:])):
            return None
        storages += [(part, size) for size in new[:added] for _ in range(blocks)]
        storages += [(part, size + blocks * (larger - size)) for size, larger in zip(old, new[added:], strict=True)]
    return storages


def _renumbered(names: Sequence[str], number: Callable[..., int]) -> str:
    """A name whose numbers follow from those in several names that differ in nothing else."""
    texts = [re.split(r"(\d+)", name) for name in names]
    if len({len(text) for text in texts}) > 1:
        return names[-1]
    return "".join(
        str(number(*map(int, parts))) if i % 2 else parts[-1] for i, parts in enumerate(zip(*texts, strict=True))
    )
