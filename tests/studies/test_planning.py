"""Hours that are planned, against sums worked by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lora_lab import FullFineTuning, LoRA
from lora_lab.ablation import Trial, studies
from lora_lab.studies import planning
from lora_lab.studies.planning import planned_hours

CPU = torch.device("cpu")
OPTIONS = {"steps": 4, "batch_size": 2, "eval_every": 2, "eval_examples": 6}
FULL, ADAPTER = Trial(FullFineTuning(), 1e-3, **OPTIONS), Trial(LoRA(1, 2), 1e-3, **OPTIONS)


@pytest.fixture
def threads(monkeypatch):
    """Full fine-tuning takes 9 hours a step, LoRA 2; the threads for which costs were asked."""
    asked = []

    def predict(factory, setups, batch_size, seq_len):
        asked.append(torch.get_num_threads())
        hours = {label: 9 if setup.method == FullFineTuning() else 2 for label, setup in setups.items()}
        hours |= {label: 5 for label, setup in setups.items() if setup.autocast}
        return SimpleNamespace(total_s=lambda label: 3600 * hours[label])

    monkeypatch.setattr(planning, "cost_model", lambda device: SimpleNamespace(predict=predict))
    monkeypatch.setattr(studies, "processes", lambda device: 1)
    return asked


def test_a_forward_pass_is_a_third_of_a_full_step_and_half_of_one_with_an_adapter(threads):
    examples = 3 * 2 * 6 + 6  # two parts before, in the middle and after; the test part
    assert planned_hours([FULL], 8, CPU) == pytest.approx(4 * 9 + examples / 2 * 9 / 3, abs=0.1)
    assert planned_hours([ADAPTER], 8, CPU) == pytest.approx(4 * 2 + examples / 2 * 2 / 2, abs=0.1)
    both = planned_hours([FULL, ADAPTER], 8, CPU)
    assert both == pytest.approx(planned_hours([FULL], 8, CPU) + planned_hours([ADAPTER], 8, CPU), abs=0.1)


def test_a_step_under_autocast_has_its_own_time(threads):
    halved = replace(FULL, autocast=torch.bfloat16)
    saved = planned_hours([FULL, FULL], 8, CPU) - planned_hours([FULL, halved], 8, CPU)
    assert saved == pytest.approx(4 * (9 - 5), abs=0.1)


def test_what_is_judged_and_a_short_off_domain_part_are_counted(threads):
    plain = planned_hours([ADAPTER], 8, CPU)
    assert planned_hours([ADAPTER], 8, CPU, judged=10) == pytest.approx(plain + 10 / 2, abs=0.1)
    assert planned_hours([ADAPTER], 8, CPU, off_domain=2) == pytest.approx(plain - 3 * 4 / 2, abs=0.1)
    assert planned_hours([ADAPTER], 8, CPU, off_domain=100) == plain


def test_two_processes_with_a_thread_each_take_half_of_what_one_thread_takes(threads, monkeypatch):
    before = torch.get_num_threads()
    alone = planned_hours([FULL, FULL], 8, CPU)
    monkeypatch.setattr(studies, "processes", lambda device: 2)
    assert planned_hours([FULL, FULL], 8, CPU) == pytest.approx(alone / 2, abs=0.1)
    assert threads == [before, 1]
    assert torch.get_num_threads() == before
