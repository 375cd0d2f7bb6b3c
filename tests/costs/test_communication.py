"""What the processes of a run send each other, against numbers by hand and against what is really reduced."""

import pytest
import torch
from torch import distributed as dist

from lora_lab import FullFineTuning, Lean, Llama, LoRA, LoRAFA, PartialFineTuning, speed
from lora_lab.costs.setup import Setup
from lora_lab.models import shapes
from lora_lab.system.distributed import Processes
from tests.helpers import random_ids

SETUPS = {
    "full": Setup(FullFineTuning()),
    "full in bfloat16": Setup(FullFineTuning(), dtype=torch.bfloat16),
    "LoRA": Setup(LoRA(rank=2)),
    "LoRA-FA": Setup(LoRAFA(rank=2)),
    "LoRA on a bfloat16 base": Setup(LoRA(rank=2), dtype=torch.bfloat16),
    "lean": Setup(LoRA(rank=2), lean=Lean()),
    "partial": Setup(PartialFineTuning(("model.norm",))),
}


@pytest.mark.parametrize("name", SETUPS)
def test_as_many_bytes_are_reduced_as_are_predicted(tiny_config, monkeypatch, name):
    reduced = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: reduced.append(tensor.numel() * tensor.element_size()))
    model, setup = Llama(tiny_config, seed=1), SETUPS[name]
    predicted = speed.communication(model, setup)
    step = setup.step(model if setup.dtype is None else model.to(setup.dtype))
    step.processes = Processes(0, 2)
    ids = random_ids(2, 6)
    step([(ids, ids)], [0.5])
    assert sum(reduced) == predicted.reduced_bytes == predicted.sent_bytes


def test_of_smollm2_lora_sends_a_fiftieth():
    """2 (n - 1) / n of the gradients of four bytes, and eight bytes for each trained tensor and the loss."""
    config = shapes.config("smollm2-135m")
    hidden, inner, cached = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    ends = [(hidden, hidden)] * 2 + [(hidden, cached)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    tensors = {"LoRA": 420, "LoRA-FA": 210, "full": 272}
    numbers = {
        "LoRA": 30 * 8 * sum(a + b for a, b in ends),
        "LoRA-FA": 30 * 8 * sum(b for _, b in ends),
        "full": 134_515_008,
    }
    for name, method in {"LoRA": LoRA(rank=8), "LoRA-FA": LoRAFA(rank=8), "full": FullFineTuning()}.items():
        counted = speed.communication("smollm2-135m", method)
        assert counted.gradient_bytes == 4 * numbers[name]
        assert counted.sent_bytes == 4 * numbers[name] + 8 * (1 + tensors[name])
        of_four = speed.communication("smollm2-135m", method, processes=4)
        assert of_four.sent_bytes == 1.5 * counted.sent_bytes
        assert speed.communication("smollm2-135m", method, processes=1).sent_bytes == 0
    assert round(4 * numbers["full"] / 1e6) == 538
    assert 4 * numbers["LoRA"] / 1e6 == pytest.approx(9.8, abs=0.05)


def test_there_is_at_least_one_process(tiny_config):
    with pytest.raises(ValueError, match="processes is 0, but it must be at least 1"):
        speed.communication(Llama(tiny_config), LoRA(rank=2), processes=0)
