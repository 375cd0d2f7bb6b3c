"""What `lora-lab record targets` plans."""

import torch

from lora_lab import Llama, inject
from lora_lab.models.shapes import config
from lora_lab.studies import targets


def test_targets_have_as_many_parameters_to_within_two_percent():
    counts = {}
    for name, trial in targets.plan(torch.device("cpu"))["docs"].study.setups.items():
        with torch.device("meta"):
            model = Llama(config("smollm2-135m"))
            inject(model, trial.method)
        counts[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert max(counts.values()) < 1.02 * min(counts.values())
    assert counts["q, v"] == 30 * 53 * (576 + 576 + 576 + 192)
