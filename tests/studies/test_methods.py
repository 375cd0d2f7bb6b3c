"""What `lora-lab record quality`, `targets` and `variants` plan."""

import torch

from lora_lab import Llama, inject
from lora_lab.models.shapes import config
from lora_lab.studies import methods

CPU = torch.device("cpu")


def test_quality_compares_all_ranks_with_full_fine_tuning_after_each_number_of_steps():
    planned = methods.plan_quality(CPU)
    assert [len(each.study.choosing) for each in planned.values()] == [2, 1]
    assert [len(each.study.judging) for each in planned.values()] == [6, 3]
    setups = [each.study.setups for each in planned.values()]
    by_steps = {}
    for name, trial in {**setups[0], **setups[1]}.items():
        by_steps.setdefault(trial.steps, []).append(name.partition(",")[0])
    assert by_steps == {steps: ["full", "r=1", "r=8", "r=64"] for steps in (60, 240, 960)}


def test_targets_have_as_many_parameters_to_within_two_percent():
    counts = {}
    for name, trial in methods.plan_targets(CPU)["docs"].study.setups.items():
        with torch.device("meta"):
            model = Llama(config("smollm2-135m"))
            inject(model, trial.method)
        counts[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert max(counts.values()) < 1.02 * min(counts.values())
    assert counts["q, v"] == 30 * 53 * (576 + 576 + 576 + 192)


def test_variants_differ_in_their_method_alone_and_have_one_base():
    study = methods.plan_variants(CPU)["docs"].study
    assert {type(trial.method).name for trial in study.setups.values()} == {"lora", "rslora", "lora+", "pissa", "dora"}
    for trial in study.setups.values():
        assert trial.method.alpha == 2 * trial.method.rank
        assert trial.lean is None or trial.lean.base_dtype is None
