"""Which trials may share one pass, and how many of them fit into memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import psutil
import torch
from torch import nn

from lora_lab.ablation.grid import Run, Trial
from lora_lab.ablation.packed_layer import TRIAL_LOSSES
from lora_lab.costs.fake import fake_copy
from lora_lab.costs.memory import Part, predict, saved_bytes
from lora_lab.inject import match_layers, require_no_adapters
from lora_lab.lean.step import Lean
from lora_lab.methods import LoRA, Method, require_unmarked
from lora_lab.models.quantize import BlockLinear
from lora_lab.system.device import own_randomness
from lora_lab.task import Examples, Task, described
from lora_lab.train import make_step, to_device
from lora_lab.variants import RsLoRA

AnyRun = TypeVar("AnyRun", bound=Run)
_MOST_PACKED = 32  # larger packs gain little, and a kill loses the whole pack
_MOST_STEPS = 3000  # of all trials of a pack on the CPU, unless the model is small: an hour or less for SmolLM2-135M


def refusal(model: nn.Module, task: Task, method: Method, autocast: torch.dtype | None = None) -> str | None:
    """Why a run cannot be packed, in a sentence, or None if it can.

    It looks at modules and settings only; ``packed.fit_packed`` also tries the model, before it trains.
    """
    if type(method) is not LoRA and type(method) is not RsLoRA:  # the two differ in scaling alone
        name = getattr(method, "name", method)
        return f"Method {name!r} cannot be packed, only LoRA and RsLoRA can; use fit."
    if autocast is not None:
        return "A pack multiplies in the dtypes of its weights, without autocast; use fit, or Lean(torch.bfloat16)."
    if method.dropout > 0:
        return f"The method's dropout is {method.dropout:g}, but trials in one pass must not draw at random; use fit."
    if not any(task.loss is loss for loss in TRIAL_LOSSES):  # a loss need not be hashable
        return (
            f"The loss {described(task.loss)!r} cannot be computed for each trial of a pack; use fit, or "
            f"{' or '.join(loss.__name__ for loss in TRIAL_LOSSES)} of lora_lab.tasks."
        )
    try:
        require_unmarked(model)
        require_no_adapters(model)
        names = match_layers(model, method.targets, method.exclude)
    except ValueError as error:  # fit would say the same
        return str(error)
    for name in names:
        if type(layer := model.get_submodule(name)) not in (nn.Linear, BlockLinear):
            return f"Layer {name!r} is a {type(layer).__name__}, but only adapters of nn.Linear can be packed; use fit."
    dtypes = {layer.dtype if isinstance(layer, BlockLinear) else layer.weight.dtype for layer in _layers(model, method)}
    if len({torch.promote_types(dtype, torch.float32) for dtype in dtypes}) > 1:
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"The layers to adapt are in {' and '.join(dtypes)}, but a pack needs adapters of one dtype; use fit."
    for name, module in model.named_modules():
        if reason := _mixing(module):
            return f"Module {name!r} ({type(module).__name__}) {reason}; use fit."
    return None


def lora_of(run: Run) -> LoRA:
    """The run's method, after :func:`refusal` has found that it is one of LoRA."""
    return cast(LoRA, run.method)


def _layers(model: nn.Module, method: LoRA) -> list[nn.Linear | BlockLinear]:
    names = match_layers(model, method.targets, method.exclude)
    return [cast(nn.Linear | BlockLinear, model.get_submodule(name)) for name in names]


def _mixing(module: nn.Module) -> str | None:
    """Why a module would mix the trials of a pack, or None."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "takes the statistics of the whole batch in training, so trials in one pass would mix"
    if getattr(module, "track_running_stats", False):
        return "keeps running statistics in training, which trials in one pass would share"
    # torch's own dropout keeps its probability as p; attention and recurrent layers, here and in other libraries,
    # keep it under a name with "drop" in it.
    dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    for name, value in vars(module).items():
        if ("drop" in name or (dropout and name == "p")) and isinstance(value, float) and value > 0:
            return f"has dropout {value:g}, but trials in one pass must not draw at random"
    return None


def shares(model: nn.Module, runs: Sequence[AnyRun], count: int, most: int) -> list[list[AnyRun]]:
    """Cut runs into packs that take about the same time.

    Runs of similar rank go together, for they pad each other least. What a run costs is counted in multiply-adds for
    one row of an adapted layer's input: twice in * out for the frozen weight, 3 rank (in + out) for the adapter.

    Args:
        model: what they are to be trained on.
        runs: at least one.
        count: how many packs, at most one for each run.
        most: the most runs of a pack; ``count`` packs must be able to hold all.
    """
    runs = sorted(runs, key=lambda run: lora_of(run).rank, reverse=True)
    shapes = [(layer.out_features, layer.in_features) for layer in _layers(model, lora_of(runs[0]))]
    frozen, sides = sum(2 * math.prod(shape) for shape in shapes), sum(map(sum, shapes))
    work = [0, *itertools.accumulate(frozen + 3 * lora_of(run).rank * sides for run in runs)]  # of the first 0, 1, ...
    cuts = [0]
    for left in range(count - 1, 0, -1):  # packs still to be cut off
        ideal = min(range(len(work)), key=lambda cut: abs(work[cut] - work[-1] * (count - left) / count))
        lowest, highest = max(cuts[-1] + 1, len(runs) - left * most), min(cuts[-1] + most, len(runs) - left)
        cuts.append(min(max(ideal, lowest), highest))
    return [runs[low:high] for low, high in itertools.pairwise([*cuts, len(runs)])]


def plan(
    model: nn.Module, task: Task, trials: Sequence[Trial], engine: str, budget_bytes: int | None, workers: int
) -> list[tuple[list[Trial], bool]]:
    """The trials in jobs, and whether each job is a pack.

    Raises:
        ValueError: ``engine`` is "packed" and a trial cannot be packed, no target counts in the examples of the test
            part, or as for :func:`_check_steps`.
    """
    _check_steps(model, task, trials)
    for limit in dict.fromkeys(trial.eval_examples for trial in trials):
        task.check_counted("test", limit)  # of which each trial's result is; fit checks the other parts
    if engine == "separate":
        return [([trial], False) for trial in trials]
    refusals: dict[tuple[str, torch.dtype | None], str | None] = {}
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    separate = []
    for trial in trials:
        kind = str(trial.method), trial.autocast
        if kind not in refusals:
            refusals[kind] = refusal(model, task, trial.method, trial.autocast)
        if refusals[kind] is None:
            groups.setdefault(_common_settings(trial), []).append(trial)
        elif engine == "auto":
            separate.append(([trial], False))
        else:
            raise ValueError(f"engine is 'packed', but {trial.method} cannot be packed: {refusals[kind]}")
    packs = []
    for group in groups.values():
        most = min(_fitting(model, task, group, budget_bytes, workers), _MOST_PACKED)
        packs += shares(model, group, max(min(workers, len(group)), math.ceil(len(group) / most)), most)
    return [(pack, engine == "packed" or len(pack) > 1) for pack in packs] + separate


def _check_steps(model: nn.Module, task: Task, trials: Sequence[Trial]) -> None:
    """Find out, before hours of training, whether each kind of trial has the step that it asks for.

    Raises:
        ValueError: the lean step or gradient checkpointing does not fit the model or a method.
    """
    kinds: dict[Any, Trial] = {}
    for trial in trials:
        kinds[type(trial.method), trial.gradient_checkpointing, trial.lean] = trial
    for trial in kinds.values():
        if trial.gradient_checkpointing or trial.lean is not None:
            with fake_copy(model, next(model.parameters()).device) as twin:
                make_step(twin, task.loss, trial.method, trial)


def _common_settings(trial: Trial) -> tuple[Any, ...]:
    """What the trials of a pack must have in common: all but rank, alpha, learning rate and seed."""
    content = replace(trial, method=replace(lora_of(trial), rank=1, alpha=1.0), lr=1.0, seed=0)
    return content, trial.accumulate, trial.gradient_checkpointing, trial.lean


def _fitting(model: nn.Module, task: Task, trials: Sequence[Trial], budget_bytes: int | None, workers: int) -> int:
    """How many trials fit into the budget, where the frozen weights count once, all else for each trial; and on the CPU
    into an hour or so, which is what an interrupted pack loses.
    """
    device = next(model.parameters()).device
    if budget_bytes is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        budget_bytes = int(free) // 2 // workers
    widest = max(trials, key=lambda trial: lora_of(trial).rank)
    if _is_small(model, task, widest, budget_bytes):
        return _MOST_PACKED
    rows = torch.arange(widest.batch_size) % len(task.train)  # (batch,)
    batch = task.train.inputs[rows], task.train.targets[rows]  # padded in full: no batch is longer
    lean = cast(Lean | None, widest.lean)
    bill = predict(
        model,
        widest.method,
        batch=batch,
        loss=task.loss,
        clip=widest.clip,
        accumulate=widest.accumulate,
        gradient_checkpointing=widest.gradient_checkpointing,
        lean=None if lean is None else replace(lean, threads=1),  # threads share the pack's trials, not a trial
    )
    shared = bill.parts.get(Part.FROZEN, 0)
    most = (budget_bytes - shared) // (bill.peak_bytes - shared)
    return max(1, min(most, _MOST_STEPS // widest.steps) if device.type == "cpu" else most)


def _is_small(model: nn.Module, task: Task, trial: Trial, budget_bytes: int) -> bool:
    """Whether the largest pack is so far below the budget that its bill, which takes a second, need not be made.

    For each trial it counts ten times what its adapter has in numbers and one forward pass of the model saves.
    """
    layers, most = _layers(model, lora_of(trial)), budget_bytes // (10 * _MOST_PACKED)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    sides = sum(layer.in_features + layer.out_features for layer in layers)
    fixed = weights + torch.float64.itemsize * lora_of(trial).rank * sides  # bytes
    if fixed > most:
        return False
    examples = Examples(task.train.inputs[: trial.batch_size], task.train.targets[: trial.batch_size])
    batch = to_device(examples, model)  # padded in full: no batch is longer
    with own_randomness(batch[0].device, 0):
        return fixed + saved_bytes(lambda: task.loss(model, *batch), model) < most
