"""How long a study takes, before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch

from lora_lab.ablation.grid import Trial
from lora_lab.costs.cost_model import cost_model
from lora_lab.costs.setup import Setup
from lora_lab.experiments.memory import random_model
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning

_FULL = "full, for evaluations"


def planned_hours(trials: Iterable[Trial], seq_len: int, device: torch.device, judged: int = 0) -> float:
    """Hours of training and evaluation on SmolLM2-135M by :mod:`lora_lab.costs.cost_model`, one trial after another.

    A forward pass is taken as a third of a step of full fine-tuning.

    Args:
        trials: all of one batch size.
        seq_len: tokens an example.
        device: where they train.
        judged: how many more examples each trial is evaluated on at its end.

    Raises:
        ValueError: the trials have different batch sizes.
    """
    trials = list(trials)
    sizes = {trial.batch_size for trial in trials}
    if len(sizes) != 1:
        raise ValueError(f"The trials have the batch sizes {sorted(sizes)}, but must have one.")
    (batch_size,) = sizes
    labels = {trial: f"{trial.method} {trial.lean}" for trial in trials}
    setups = {labels[trial]: Setup(trial.method, lean=cast(Lean | None, trial.lean)) for trial in trials} | {
        _FULL: Setup(FullFineTuning())
    }
    steps = cost_model(device).predict(partial(random_model, "smollm2-135m"), setups, batch_size, seq_len)
    forward_s = steps.total_s(_FULL) / 3 / batch_size  # of one example
    seconds = 0.0
    for trial in trials:
        evaluations = 1 + sum(trial.evaluates(step) for step in range(1, trial.steps + 1))  # one before training
        examples = (2 * evaluations + 1) * (trial.eval_examples or 0) + judged  # of two parts, and of the test part
        seconds += trial.steps * steps.total_s(labels[trial]) + examples * forward_s
    return round(seconds / 3600, 1)
