"""How long a study takes, before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch

from lora_lab.ablation import studies
from lora_lab.ablation.grid import Trial
from lora_lab.costs.cost_model import cost_model
from lora_lab.costs.setup import Setup
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.studies.memory import random_model

_FULL = "full, for evaluations"


def planned_hours(
    trials: Iterable[Trial], seq_len: int, device: torch.device, judged: int = 0, off_domain: int | None = None
) -> float:
    """Hours of training and evaluation on SmolLM2-135M by :mod:`lora_lab.costs.cost_model`.

    As many trials run at a time as :func:`lora_lab.ablation.studies.processes` allows, on one thread each if there are
    several; packs would take less. A forward pass is taken as half of a step with LoRA, which has no weight gradients,
    and as a third of one of full fine-tuning.

    Args:
        trials: all of one batch size.
        seq_len: tokens an example.
        device: where they train.
        judged: how many more examples each trial is evaluated on at its end.
        off_domain: the length of that part, in examples of ``seq_len`` tokens; None means as many as are evaluated.

    Raises:
        ValueError: the trials have different batch sizes.
    """
    trials = list(trials)
    sizes = {trial.batch_size for trial in trials}
    if len(sizes) != 1:
        raise ValueError(f"The trials have the batch sizes {sorted(sizes)}, but must have one.")
    (batch_size,) = sizes
    labels = {trial: f"{trial.method} {trial.lean} {trial.autocast}" for trial in trials}
    setups = {_FULL: Setup(FullFineTuning())}
    for trial in trials:
        setups[labels[trial]] = Setup(trial.method, lean=cast(Lean | None, trial.lean), autocast=trial.autocast)
    at_a_time, threads = studies.processes(device), torch.get_num_threads()
    torch.set_num_threads(1 if at_a_time > 1 else threads)
    try:
        steps = cost_model(device).predict(partial(random_model, "smollm2-135m"), setups, batch_size, seq_len)
    finally:
        torch.set_num_threads(threads)
    seconds = 0.0
    for trial in trials:
        step_s = steps.total_s(labels[trial])
        forward_s = step_s / 2 if isinstance(trial.method, LoRA) else steps.total_s(_FULL) / 3
        evaluations = 1 + sum(trial.evaluates(step) for step in range(1, trial.steps + 1))  # one before training
        limit = trial.eval_examples or 0
        examples = evaluations * (limit + min(limit, limit if off_domain is None else off_domain))
        examples += limit + judged  # of the test part, and of the judge
        seconds += trial.steps * step_s + examples * forward_s / batch_size
    return round(seconds / 3600 / at_a_time, 1)
