"""What the studies of tuned setups plan; what those of them that do more than tune make of small ones, and write."""

import itertools

import pytest
import torch

from lora_lab import FullFineTuning
from lora_lab.studies import tuned

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def sweeps(plan, device=CPU):
    return {sweep.data: sweep for sweep in plan(device)}


def trials_of(sweep):
    return {setup: trial for setup, (trial, _) in sweep.setups.items()}


# What is planned

PLANS = [tuned.plan_quality, tuned.plan_rates]


@pytest.mark.parametrize("plan", PLANS)
def test_seeds_that_judge_did_not_choose_and_a_gpu_does_more(plan):
    small, large = (sweeps(plan, device)["docs"] for device in (CPU, CUDA))
    assert small.setups.keys() == large.setups.keys()
    assert len(large.choosing) + len(large.judging) > len(small.choosing) + len(small.judging)
    assert len(small.choosing) >= 2
    assert len(small.judging) >= 3 or plan is tuned.plan_rates
    for sweep in (small, large):
        assert not set(sweep.choosing) & set(sweep.judging)
        factors = [high / low for lrs in sweep.lrs.values() for low, high in itertools.pairwise(lrs)]
        assert all(1.69 < factor < 2.01 for factor in factors)
        assert all(len(lrs) >= 3 for lrs in sweep.lrs.values())
        for trial in trials_of(sweep).values():
            assert trial.lean is None or trial.method != FullFineTuning()
