"""What a training step keeps: bytes counted by hand, and the peak of a process that really allocates."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_lab import FullFineTuning, Llama, LoRA, LoRALinear, fit
from lora_lab.memory import parts, peak_bytes, saved_bytes
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import Examples, Task

BATCH, IN, OUT, RANK = 32, 64, 48, 4
X = torch.randn(BATCH, IN, generator=torch.Generator().manual_seed(0))


def saved(model, x=X):
    return saved_bytes(lambda: model(x).sum(), model)


def test_a_trained_layer_keeps_its_input_and_a_frozen_one_nothing():
    layer = nn.Linear(IN, OUT)
    assert saved(layer) == 4 * BATCH * IN
    layer.weight.requires_grad_(False)  # the bias' gradient needs no input
    assert saved(layer) == 0
    layer.requires_grad_(False)
    assert saved(layer, X.clone().requires_grad_()) == 0  # the weight is kept, but it is a parameter


def test_a_lora_layer_keeps_its_input_and_the_narrow_product():
    layer = LoRALinear(nn.Linear(IN, OUT), rank=RANK, alpha=8)
    assert saved(layer) == 4 * BATCH * IN + 4 * BATCH * RANK
    assert saved(layer, X.clone().requires_grad_()) == 4 * BATCH * IN + 4 * BATCH * RANK


def test_bytes_follow_the_dtype():
    assert saved(nn.Linear(IN, OUT, dtype=torch.float64), X.double()) == 8 * BATCH * IN
    assert saved(nn.Linear(IN, OUT, dtype=torch.bfloat16), X.bfloat16()) == 2 * BATCH * IN


def test_a_tensor_that_several_layers_keep_is_counted_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(IN, OUT), nn.Linear(IN, OUT)

        def forward(self, x):
            return self.q(x) + self.k(x.view(4, -1, IN)).view(BATCH, OUT)  # a view shares memory too

    assert saved(Twice()) == 4 * BATCH * IN
    net = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, 10))
    assert saved(net) == 4 * BATCH * (IN + OUT)  # the ReLU's output is the next layer's input


def test_tensors_of_equal_size_and_values_are_counted_each():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (x.clone() * self.scale).sum() + (x.clone() * self.scale).sum()

    assert saved(Squares()) == 2 * 4 * BATCH * IN


def test_buffers_are_left_out_and_nothing_is_kept_without_gradients():
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(IN, OUT)
            self.register_buffer("mask", torch.ones(BATCH, OUT))

        def forward(self, x):
            return super().forward(x) * self.mask

    assert saved(Masked()) == 4 * BATCH * IN
    with torch.no_grad():
        assert saved(Masked()) == 0


def test_counting_changes_no_gradient():
    model = DigitsMLP(width=16)
    model(X).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    outputs = []
    saved_bytes(lambda: outputs.append(model(X).square().sum()), model)
    outputs[0].backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize(
    ("method", "trainable"), [(FullFineTuning(), 16 * 65 + 16 * 17 + 10 * 17), (LoRA(rank=RANK), RANK * (80 + 32 + 26))]
)
def test_parts_are_weights_gradients_and_two_numbers_each_for_adamw(method, trainable):
    part = Examples(X, torch.zeros(BATCH, dtype=torch.long))
    model = DigitsMLP(width=16)
    frozen = 0 if method.name == "full" else sum(p.numel() for p in model.parameters())
    history = fit(model, Task("t", part, part, part, part), method, steps=1, lr=0.01, batch_size=4)
    assert parts(model, history.optimizer_bytes, 123) == {
        "frozen weights": 4 * frozen,
        "trained weights": 4 * trainable,
        "gradients": 4 * trainable,
        "optimiser state": 2 * 4 * trainable + 4 * 6,  # and a count of steps for each of six tensors
        "saved activations": 123,
    }


def test_parts_count_buffers_as_frozen_tied_weights_once_and_bytes_by_dtype(tiny_config):
    norm = nn.BatchNorm1d(10)
    assert parts(norm, 0, 0)["frozen weights"] == 4 * 20 + 8
    assert parts(norm, 0, 0)["trained weights"] == 4 * 20
    assert parts(norm, 0, 0)["gradients"] == 0
    model = Llama(tiny_config).bfloat16()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert parts(model, 0, 0)["trained weights"] == 2 * sum(p.numel() for p in model.parameters())


MIB = 2**20
GROW = """
import torch
from lora_lab.memory import peak_bytes

device = torch.device("cpu")
before = peak_bytes(device)
touched = torch.ones(96 * 2**20, dtype=torch.uint8)
grown = peak_bytes(device)
del touched
print(before, grown, peak_bytes(device))
"""


def test_the_peak_grows_by_what_is_touched_stays_and_leaves_the_parent_out():
    # More than any build of torch takes (the CUDA one 0.7 GiB); a started process must not report it as its own.
    ballast = torch.ones(1200 * MIB, dtype=torch.uint8)
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True)
    before, grown, after = map(int, done.stdout.split())
    assert grown - before >= 90 * MIB  # resident pages; a few may have been there before
    assert grown - before < 200 * MIB
    assert after >= 0.95 * grown  # Linux counts pages in batches, so a high-water mark may wobble
    assert before > 50 * MIB
    assert peak_bytes(torch.device("cpu")) > ballast.numel()
    if Path("/proc/self/status").is_file():
        assert before < ballast.numel()
