"""Ready-made material for ablations: a model to start from, and a task.

    model, task = get("digits")
    frame = ablate(model, task, grid("digits", "lora", [1, 2, 4], None, range(5), alpha_per_rank=2), "runs/ranks")

"planted" is a small net that imitates itself plus a hidden update of rank 4, so that the answer is known; "digits" is
one that reads digits and learns to read them moved down by a pixel; in "docs" SmolLM2-135M learns Python's manual.
Seconds for the small nets; hours for the language model on a CPU. The small nets are in float64, so that a result does
not depend on the processor: in float32 the order in which it sums decides, at high learning rates, which rate is best.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lora_lab import tasks
from lora_lab.ablation.grid import Grid
from lora_lab.ablation.run import ModelOrFactory, TaskOrFactory
from lora_lab.methods import FullFineTuning
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.models.pretrained import SMOLLM2, load_pretrained, load_tokenizer
from lora_lab.task import Task
from lora_lab.tasks.named import TASKS, check_name
from lora_lab.train import fit
from lora_lab.variants import LORA_METHODS

_small_net = partial(DigitsMLP, dtype=torch.float64)


class Defaults(NamedTuple):
    """Rates to try, steps, batch, and a difference of losses that does not matter (in the task's unit)."""

    lrs: tuple[float, ...]
    steps: int
    batch_size: int
    margin: float


DEFAULTS = {
    "planted": Defaults((3e-3, 1e-2, 3e-2, 1e-1), 300, 32, 0.001),
    "digits": Defaults((3e-3, 1e-2, 3e-2, 1e-1), 200, 32, 0.03),
    "docs": Defaults((2e-4, 5e-4, 1e-3), 60, 4, 0.01),
}


def get(
    name: str, seq_len: int = 64, device: torch.device | None = None, model: str = SMOLLM2
) -> tuple[ModelOrFactory, TaskOrFactory]:
    """Return a model (or what makes it) and a task (or what makes it), by name.

    Args:
        name: "planted", "digits" or "docs"; or a task for a language model, by name or from a file, as for
            :func:`lora_lab.tasks.task_of`.
        seq_len: tokens an example, for "docs".
        device: where the language model is put; None takes the best there is. The small nets stay on the CPU.
        model: the language model, as for :func:`lora_lab.load_pretrained`.

    Raises:
        ValueError: another name, seq_len is below 2, or a model for a small net's task.
        FileNotFoundError: there is no such file.
    """
    if name in ("planted", "digits"):
        if model != SMOLLM2:
            raise ValueError(f"{name!r} trains a small net of its own, not {model!r}; leave the model out.")
        if name == "digits":
            return pretrained_digits(), tasks.digits()
        return _small_net(), tasks.planted(_small_net())
    check_known(name)
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}, but an example needs at least 2 tokens.")
    task = partial(docs_task, seq_len, model=model) if name == "docs" else partial(_named_task, name, model)
    return partial(language_model, device, model), task


def check_known(name: str) -> None:
    """Raise ValueError or FileNotFoundError if :func:`get` has nothing of that name."""
    check_name(name, DEFAULTS | TASKS)


def defaults_of(name: str) -> Defaults:
    """Return the defaults for a name of :func:`get`; those of "docs" for all tasks of language models."""
    return DEFAULTS.get(name, DEFAULTS["docs"])


def grid(
    name: str,
    method: str,
    ranks: Sequence[int],
    lrs: Sequence[float] | None,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> Grid:
    """Return trials; rates, steps and batch size are the defaults of the name where they are None.

    Args:
        name: as for :func:`get`.
        method: a LoRA method's name, such as "lora" or "dora".
        ranks, lrs, seeds, steps, batch_size, **options: as for :class:`lora_lab.ablation.grid.Grid`.

    Raises:
        ValueError: the name or the method is unknown, or as for Grid.
        FileNotFoundError: the name is that of a file that is not there.
    """
    check_known(name)
    if method not in LORA_METHODS:
        raise ValueError(f"There is no method {method!r} with ranks; there are {', '.join(LORA_METHODS)}.")
    defaults = defaults_of(name)
    lrs = defaults.lrs if lrs is None else lrs
    steps = defaults.steps if steps is None else steps
    batch_size = defaults.batch_size if batch_size is None else batch_size
    return Grid(ranks, lrs, seeds, [LORA_METHODS[method]()], steps=steps, batch_size=batch_size, **options)


def pretrained_digits(n_train: int = 500) -> nn.Module:
    """Return a small net in float64 that has learned the digits as they are: the caller's own each time.

    Args:
        n_train: as for :func:`lora_lab.tasks.digits`: which digits those are.
    """
    return copy.deepcopy(_pretrained_digits(n_train))


@cache
def _pretrained_digits(n_train: int) -> nn.Module:
    model, task = _small_net(), tasks.digits("pretrain", n_train=n_train)
    fit(model, task, FullFineTuning(), steps=300, lr=3e-3, batch_size=32, progress=False)
    fresh = _small_net()
    fresh.load_state_dict(model.state_dict())  # without the mark of the method that trained it
    return fresh


def language_model(device: torch.device | None = None, source: str = SMOLLM2) -> nn.Module:
    """Return SmolLM2-135M-Instruct or another model, loaded anew, on the best device there is if none is given."""
    return load_pretrained(source, device=device)[0]


def random_init(device: torch.device | None = None, seed: int = 0) -> nn.Module:
    """Return a model of the same shape that has learned nothing: random weights, the same for the same seed."""
    model = cast(Llama, language_model(device))
    return Llama(model.config, seed=seed).to(next(model.parameters()).device)


def docs_task(seq_len: int, n_train: int | None = None, seed: int | None = None, model: str = SMOLLM2) -> Task:
    """Return the task "docs" for that model; with ``n_train`` only so many training examples, drawn by the seed."""
    task = tasks.docs(load_tokenizer(model), seq_len)
    return task if n_train is None else task.limited(n_train, seed)


def _named_task(name: str, model: str) -> Task:
    return tasks.task_of(name, load_tokenizer(model))


def processes(device: torch.device) -> int:
    """Return how many trials of the language model run at a time: two on a CPU, each with one thread; one on a GPU."""
    return 1 if device.type == "cuda" else 2
