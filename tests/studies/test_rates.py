"""What `lora-lab record rates` plans."""

import pytest
import torch

from lora_lab import FullFineTuning, LoRA
from lora_lab.studies import rates

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_full_fine_tuning_and_seven_ranks_under_two_rules_are_tuned(device):
    for planned in rates.plan(device).values():
        study = planned.study
        assert len(study.setups) == 1 + 2 * 7
        assert study.setups["full"].method == FullFineTuning()
        assert study.setups["r=64, alpha = 2r"].method == LoRA(64, 128)
        assert study.setups["r=64, alpha = 32"].method == LoRA(64, 32)
        assert study.setups["r=16, alpha = 2r"] == study.setups["r=16, alpha = 32"]
        assert len(study.choosing) >= 3
        assert all(len(grid) == 5 for grid in study.lrs.values())


def test_the_base_is_in_half_precision_for_lora_on_the_language_model_alone():
    plan = rates.plan(CPU)
    assert plan["docs"].study.setups["r=1, alpha = 2r"].lean.base_dtype == torch.bfloat16
    assert plan["docs"].study.setups["full"].lean is None
    assert plan["digits"].study.setups["r=1, alpha = 2r"].lean is None
