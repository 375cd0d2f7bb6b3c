"""What `lora-lab record quality` plans."""

import torch

from lora_lab.studies import quality


def test_quality_compares_all_ranks_with_full_fine_tuning_after_each_number_of_steps():
    planned = quality.plan(torch.device("cpu"))
    assert [len(each.study.choosing) for each in planned.values()] == [2, 1]
    assert [len(each.study.judging) for each in planned.values()] == [6, 3]
    setups = [each.study.setups for each in planned.values()]
    by_steps = {}
    for name, trial in {**setups[0], **setups[1]}.items():
        by_steps.setdefault(trial.steps, []).append(name.partition(",")[0])
    assert by_steps == {steps: ["full", "r=1", "r=8", "r=64"] for steps in (60, 240, 960)}
