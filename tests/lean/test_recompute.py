"""Checkpointing against torch's own."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lab.lean.blocks import recompute
from tests.helpers import run_python


class Block(nn.Module):
    """A function of two tensors, one of which may be missing, that saves both its inputs and outputs."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.second = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x, mask):
        self.calls += 1
        hidden = self.dropout(self.first(x).exp()).tanh()
        hidden = hidden if mask is None else hidden * mask
        return self.second(hidden)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(run, block, x, mask):
    """The output, and the gradients of the input and the parameters, from a seed of torch's global generator."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = run(block, x, mask)
    torch.manual_seed(5)  # what is drawn later must not matter
    wanted = [x, *block.parameters()]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


def by_torch(block, x, mask):
    return checkpoint(block, x, mask, use_reentrant=False)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mask", [None, draw(4, 6, seed=1)])
def test_gradients_are_those_of_torchs_checkpoint_and_of_none(dropout, mask):
    block, x = Block(dropout), draw(4, 6)
    for run in (by_torch, lambda block, x, mask: block(x, mask)):
        for ours, other in zip(gradients(recompute, block, x, mask), gradients(run, block, x, mask), strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=0)


def test_an_error_of_the_function_is_raised_and_a_pass_without_gradients_is_computed_once():
    block = Block()
    with torch.no_grad():
        assert torch.equal(recompute(block, draw(4, 6), None), block(draw(4, 6), None))
    assert block.calls == 2
    with pytest.raises(RuntimeError, match="shape"):
        recompute(block, draw(4, 7), None)


def test_nothing_is_alive_after_the_backward_pass():
    alive = []

    def function(x):
        y = x.exp().tanh()
        alive.append(weakref.ref(y))
        return y.sin()

    gc.disable()
    try:
        for _ in range(2):
            recompute(function, draw(3).requires_grad_()).sum().backward()
        assert len(alive) == 4
        assert [each() for each in alive] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_lean_step_does_not_load_torchs_compiler_and_a_plain_one_does():
    code = """
import sys, torch
from lora_lab import LoRA, Llama
from lora_lab.lean import Lean
from lora_lab.models.llama import LlamaConfig
from lora_lab.task import cross_entropy
from lora_lab.train import TrainConfig, make_step
config = LlamaConfig(64, 16, 32, 2, 2, 1, 8)
ids = torch.zeros(2, 5, dtype=torch.long)
for lean in (Lean(checkpoint=True), None):
    step = make_step(Llama(config), cross_entropy, LoRA(2, 4), TrainConfig(lr=1e-3, steps=2, lean=lean))
    step([(ids, ids)], [1.0])
    print("torch._dynamo" in sys.modules)
"""
    assert run_python(code).stdout.split() == ["False", "True"]
