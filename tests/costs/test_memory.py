"""What a training step needs: bills against bytes counted by hand, and against the allocator's own account."""

import copy
import functools
import gc
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lora_lab import (
    DoRA,
    FullFineTuning,
    Lean,
    Llama,
    LlamaConfig,
    LoRA,
    LoRAFA,
    LoRAPlus,
    PartialFineTuning,
    PiSSA,
    RsLoRA,
    fit,
    memory,
    quantize_nf4,
    speed,
)
from lora_lab.costs.bill import MIB, Bill, Moment, Recording
from lora_lab.costs.memory import largest, measure, parse_bytes, predict, training_setups
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import CostModel
from lora_lab.methods import AsItIs
from lora_lab.models.digits import DigitsMLP
from lora_lab.system.device import peak_bytes
from lora_lab.tasks import Examples, Task, cross_entropy
from lora_lab.train import TrainingStep
from tests import tiny_models
from tests.helpers import command, llama_folder, printed_json, run_python

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_heap")

REST = "the rest, unexplained"
BATCH, IN, OUT, RANK = 32, 64, 48, 4
X = torch.randn(BATCH, IN, generator=torch.Generator().manual_seed(0))
DIGITS = X, torch.zeros(BATCH, dtype=torch.long)

# A small Llama, and what its sizes are called where bytes are counted by hand.
B, S, T = 4, 64, 4 * 64  # sequences, their length, tokens
V, D, INNER, LAYERS, HEADS, KV, HEAD = 1000, 64, 160, 2, 4, 2, 16
SHAPE = LlamaConfig(V, D, INNER, LAYERS, HEADS, KV, HEAD, tie_word_embeddings=True)
FEW = replace(SHAPE, vocab_size=100)  # so few tokens that logits do not hide the rest
ONE = replace(FEW, num_hidden_layers=1)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ANGLES = 2 * S * HEAD  # numbers: cosines and sines
LINEARS = [(D, D), (D, KV * HEAD), (D, KV * HEAD), (D, D), (D, INNER), (D, INNER), (INNER, D)]  # (in, out) in a block
NUMBERS = V * D + LAYERS * (sum(i * o for i, o in LINEARS) + 2 * D) + D
RNG_BYTES = 5056  # the CPU generator's state, which checkpointing keeps for each block

BF16 = torch.bfloat16
CKPT = {"gradient_checkpointing": True}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def text(config=SHAPE, batch=B, length=S):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(0, config.vocab_size, (batch, length), generator=generator) for _ in range(2))


def predicted(model, method, batch, **options):
    return predict(model, method, batch=batch, **options)


BOTH = pytest.mark.parametrize("ask", [predicted, measure], ids=["predict", "measure"])


@functools.cache
def llama(ask, method, config=SHAPE, batch=B, length=S, **options):
    """A bill of a Llama's step, found once for all tests that look at it."""
    return ask(Llama(config), method, text(config, batch, length), **options)


def adapter_numbers(rank, pairs):
    return LAYERS * sum(rank * (i + o) for i, o in pairs)


def factors(rank, pairs=LINEARS):
    """Bytes of adapters, of their gradients, and of AdamW's state, with a count of steps for each matrix."""
    size = 4 * adapter_numbers(rank, pairs)
    return size, size, 2 * size + 4 * 2 * LAYERS * len(pairs)


# Bills worked by hand


@BOTH
def test_every_byte_of_a_small_nets_step_is_accounted_for(ask):
    # 64 -> 128 -> 128 -> 10 in full. The peak is the last operation of the backward pass, the sum that makes the
    # first bias' gradient: all gradients are there, and what flowed back to the first hidden layer still is.
    numbers = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    bill = ask(DigitsMLP(), FullFineTuning(), DIGITS)
    assert bill.parts == {
        "trained weights": 4 * numbers,
        "gradients": 4 * numbers,
        "optimiser state": 2 * 4 * numbers + 4 * 6,  # and a count of steps for each of six tensors
        "temporaries": 4 * BATCH * 128 + 4 + 4,  # the loss, and the loss times its weight
    }
    assert bill.saved == {
        "saved: MLP": 2 * 4 * BATCH * 128,  # the outputs of both ReLUs; the first layer's input is the batch
        "logits and loss": 4 * BATCH * 10 + 4,  # the logarithms of the probabilities, and how many targets count
    }
    assert bill.static_bytes == 4 * 4 * numbers + 4 * 6
    assert bill.saved_bytes == 2 * 4 * BATCH * 128 + 4 * BATCH * 10 + 4
    assert bill.peak_bytes == sum(bill.parts.values()) == 4 * 4 * numbers + 4 * 6 + 4 * BATCH * 128 + 8
    assert bill.source == {"predicted": "predicted", "measure": "measured"}[ask.__name__]
    assert bill.setting == "DigitsMLP, full, batch 32 x 64"
    assert bill.reserved_bytes is None


@BOTH
def test_what_is_thrown_away_when_the_loss_is_found_is_not_kept(ask):
    def loss(model, inputs, targets):
        aside = model(inputs).exp()  # autograd keeps what it would need for this until the function returns
        result = F.cross_entropy(model(inputs), targets)
        assert aside.requires_grad
        return result

    plain, twice = ask(DigitsMLP(), FullFineTuning(), DIGITS), ask(DigitsMLP(), FullFineTuning(), DIGITS, loss=loss)
    assert twice.saved == plain.saved
    kept = [max(moment.parts.get("saved: MLP", 0) for moment in bill.timeline) for bill in (plain, twice)]
    assert kept[1] == 2 * kept[0]


class Pair(nn.Module):
    """Two layers, of which the second is adapted; what is between them may be kept by somebody else too."""

    def __init__(self, between=None):
        super().__init__()
        self.first, self.between, self.second = nn.Linear(IN, 40), between or nn.Identity(), nn.Linear(40, OUT)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


class Gate(nn.Module):
    """Multiplies by a number that is trained, and so keeps its input."""

    def __init__(self):
        super().__init__()
        self.lora_scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.lora_scale, x


class Shared(Pair):
    """The adapted layer's input is kept by a gate of another kind too."""

    def __init__(self, kind):
        super().__init__()
        setattr(self, kind, Gate())
        self.kind = kind

    def forward(self, x):
        gated, x = getattr(self, self.kind)(self.first(x))
        return self.second(x) + gated.sum()


@BOTH
def test_an_adapter_keeps_its_input_and_the_narrow_product_and_lora_fa_the_product_alone(ask):
    x, narrow = 4 * BATCH * 40, 4 * BATCH * RANK
    plain, frozen_a = (ask(Pair(), method(RANK, targets=["second"]), DIGITS) for method in (LoRA, LoRAFA))
    assert plain.saved["saved: adapters"] == x + narrow
    assert frozen_a.saved["saved: adapters"] == narrow
    assert set(plain.saved) == {"saved: adapters", "logits and loss"}  # the frozen layer below keeps nothing
    assert plain.parts["frozen weights"] == 4 * (IN * 40 + 40 + 40 * OUT + OUT)
    assert plain.parts["trained weights"] == 4 * RANK * (40 + OUT)
    assert frozen_a.parts["trained weights"] == 4 * RANK * OUT
    assert frozen_a.parts["frozen weights"] == plain.parts["frozen weights"] + 4 * RANK * 40
    assert frozen_a.parts["optimiser state"] == 2 * 4 * RANK * OUT + 4


@BOTH
@pytest.mark.parametrize(
    ("kind", "part"), [("mlp", "saved: MLP"), ("attention", "saved: attention"), ("norm", "saved: norms")]
)
def test_what_an_adapter_and_somebody_else_keep_is_somebody_elses(ask, kind, part):
    class OneMore(LoRA):
        """LoRA on the second layer, and a trained gate."""

        def _prepare(self, model, seed):
            super()._prepare(model, seed)
            getattr(model, kind).requires_grad_(True)

    bill = ask(Shared(kind), OneMore(RANK, targets=["second"]), DIGITS)
    assert bill.saved[part] == 4 * BATCH * 40
    assert bill.saved["saved: adapters"] == 4 * BATCH * RANK


@BOTH
def test_a_buffer_counts_as_frozen_and_what_a_norm_keeps_as_the_norms(ask):
    norm = nn.Sequential()
    norm.add_module("hidden", nn.Linear(IN, 16))
    norm.add_module("norm", nn.BatchNorm1d(16))
    norm.add_module("head", nn.Linear(16, 10))
    bill = ask(norm, FullFineTuning(), DIGITS)
    assert bill.parts["frozen weights"] == 2 * 4 * 16 + 8  # running mean and variance, and a count of batches
    assert bill.parts["trained weights"] == 4 * (IN * 16 + 16 + 2 * 16 + 16 * 10 + 10)
    assert bill.saved["saved: norms"] == 4 * BATCH * 16 + 2 * 4 * 16  # its input, and the batch's mean and variance
    assert bill.saved["saved: other layers"] == 4 * BATCH * 16  # the head's input


@BOTH
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_static_parts_of_a_llama_in_full_are_two_or_four_times_its_weights(ask, optimizer):
    bill = ask(Llama(SHAPE), FullFineTuning(), text(batch=2, length=8), accumulate=2, optimizer=optimizer)
    state = 2 * 4 * NUMBERS + 4 * (2 + 9 * LAYERS) if optimizer == "adamw" else 0
    assert bill.parts["trained weights"] == bill.parts["gradients"] == 4 * NUMBERS
    assert bill.parts.get("optimiser state", 0) == state
    assert bill.static_bytes == 2 * 4 * NUMBERS + state


NORM = 4 * T * (D + 1)  # a frozen norm keeps its input and one number a row; the first one's input needs no gradient
HEADS_KEPT = 2 * HEADS * HEAD + 2 * KV * HEAD  # numbers a token: queries, keys, values and what attention mixed
LOGITS = 4 * T * V + 4  # the logarithms of the probabilities, and how many targets count


@BOTH
def test_what_a_lora_step_of_a_llama_keeps(ask):
    bill = llama(ask, LoRA(8))
    assert bill.saved == {
        "saved: attention": 4 * (LAYERS * T * (HEADS_KEPT + HEADS) + ANGLES),  # and the sum of each row of scores
        "saved: MLP": 4 * LAYERS * T * 3 * INNER,  # gate, silu(gate), up
        "saved: norms": 2 * LAYERS * NORM,
        "saved: adapters": 4 * LAYERS * T * (2 * D + INNER + 7 * 8),  # three inputs that nobody else keeps, and A x
        "logits and loss": LOGITS,
    }
    assert bill.parts["frozen weights"] == 4 * NUMBERS
    assert (bill.parts["trained weights"], bill.parts["optimiser state"]) == factors(8)[::2]
    few = llama(ask, LoRA(8, targets=ATTENTION))  # o_proj's input is attention's own
    assert few.saved == bill.saved | {"saved: adapters": 4 * LAYERS * T * (D + 4 * 8)}
    assert (few.parts["trained weights"], few.parts["optimiser state"]) == factors(8, LINEARS[:4])[::2]


@BOTH
def test_bfloat16_halves_the_base_and_its_activations_and_nothing_else(ask):
    bill = llama(ask, LoRA(8), dtype=BF16)
    assert bill.saved == {
        "saved: attention": LAYERS * T * (2 * HEADS_KEPT + 4 * HEADS) + 2 * ANGLES,
        "saved: MLP": 2 * LAYERS * T * 3 * INNER,
        "saved: norms": 2 * LAYERS * NORM,  # norms are computed in float32
        "saved: adapters": 4 * LAYERS * T * (6 * D + INNER + 7 * 8),  # each adapter casts its input anew
        "logits and loss": LOGITS,
    }
    assert bill.parts["frozen weights"] == 2 * NUMBERS
    assert (bill.parts["trained weights"], bill.parts["optimiser state"]) == factors(8)[::2]
    full = llama(ask, FullFineTuning(), dtype=BF16)
    assert full.parts["trained weights"] == 2 * NUMBERS
    assert full.parts["optimiser state"] == 2 * 2 * NUMBERS + 4 * (2 + 9 * LAYERS)


@BOTH
def test_checkpointing_keeps_one_input_a_block(ask):
    plain, bill = (llama(ask, LoRA(8), **options) for options in ({}, CKPT))
    assert bill.saved == {
        "saved: norms": NORM,  # the last one, which is in no block
        "saved: other layers": 4 * (LAYERS * T * D + ANGLES),
        "logits and loss": LOGITS,
    }
    assert "recomputed activations" not in plain.parts
    assert all("recomputed activations" not in moment.parts for moment in plain.timeline)
    again = [moment for moment in bill.timeline if "recomputed activations" in moment.parts]
    assert {moment.phase for moment in again} == {"backward"}
    assert max(moment.parts["recomputed activations"] for moment in again) > plain.saved["saved: MLP"] / LAYERS


@BOTH
def test_a_base_in_nf4_takes_33_bytes_for_64_weights(ask):
    blocks = [math.ceil(i * o / 64) for i, o in LINEARS] * LAYERS
    packed = sum(33 * count + 4 * (1 + math.ceil(count / 256)) for count in blocks)
    expected = packed + 4 * (V * D + (2 * LAYERS + 1) * D)
    bill = llama(ask, LoRA(8), nf4=True)
    assert bill.parts["frozen weights"] == expected < 4 * NUMBERS * 0.6
    assert bill.saved == llama(predicted, LoRA(8)).saved
    half = llama(ask, LoRA(8), nf4=True, dtype=BF16)
    assert half.parts["frozen weights"] == packed + 2 * (V * D + (2 * LAYERS + 1) * D)


@BOTH
def test_two_micro_batches_halve_activations_and_keep_gradients_from_the_first_to_the_second(ask):
    whole, halves = (llama(ask, FullFineTuning(), accumulate=count) for count in (1, 2))
    for part in ("saved: MLP", "saved: norms"):
        assert 2 * halves.saved[part] == whole.saved[part]
    assert halves.saved["logits and loss"] == 4 * (T // 2) * V + 4 + 4 * (T // 2) * D  # with what the head keeps
    assert 2 * (halves.saved["saved: attention"] - 4 * ANGLES) == whole.saved["saved: attention"] - 4 * ANGLES
    assert whole.parts.get("gradients", 0) == 0  # at its peak, where the logits are
    held = [moment.parts.get("gradients", 0) for moment in halves.timeline if moment.phase == "forward"]
    assert set(held) == {0, 4 * NUMBERS}  # in the first forward pass, and in the second
    assert halves.peak_bytes < whole.peak_bytes


@BOTH
def test_logits_at_the_peak_are_three_times_batch_length_vocabulary(ask):
    # The logarithms of the probabilities, the gradient of those, and the gradient of the logits.
    bill = llama(ask, LoRA(8))
    assert bill.parts["logits and loss"] == 3 * 4 * T * V
    assert "_log_softmax_backward_data" in bill.moment


def test_a_lean_step_never_has_all_logits_and_keeps_the_gradient_of_the_hidden_state():
    bill = llama(predicted, LoRA(8), lean=Lean(loss_rows=32))
    assert bill.saved["logits and loss"] == 4 * T * D
    most = max(moment.parts.get("logits and loss", 0) for moment in bill.timeline)
    assert 4 * 32 * V < most < 4 * 32 * V + 4 * T * D + MIB / 4 < 4 * T * V


# The peak: in agreement with the allocator


def allocated(make_step, path):
    """The most that the CPU's allocator had given during the second call, by the account that it keeps itself.

    Args:
        make_step: returns a function that takes one step; what it allocates counts too.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = make_step()
        step()
        with torch.profiler.record_function("the second"):
            step()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if "name" in event]
    (second,) = (event for event in events if event["name"] == "the second")
    account = sorted(
        (e["ts"], e["args"]["Total Allocated"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"
    )
    before = account[0][1] - account[0][2]  # what earlier uses of the profiler have left
    return max(total for at, total, _ in account if second["ts"] <= at <= second["ts"] + second["dur"]) - before


def by_hand(make_model, batch, loss):
    """A training loop as anybody writes it."""

    def make_step():
        model = make_model().train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)

        def step():
            optimizer.zero_grad()
            loss(model, *batch).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

        return step

    return make_step


def causal(model, inputs, targets):
    return model(input_ids=inputs, labels=targets).loss


def with_peft(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))


@pytest.mark.parametrize("kind", ["digits", "transformers", "peft"])
def test_the_measured_peak_is_the_allocators_of_a_loop_written_by_hand(kind, tiny_hf, tmp_path):
    make, batch, method, loss = {
        "digits": (DigitsMLP, DIGITS, FullFineTuning(), lambda model, x, y: F.cross_entropy(model(x), y)),
        "transformers": (tiny_hf, text(replace(SHAPE, vocab_size=260)), FullFineTuning(), causal),
        "peft": (lambda: with_peft(tiny_hf()), text(replace(SHAPE, vocab_size=260)), AsItIs(), causal),
    }[kind]
    expected = allocated(by_hand(make, batch, loss), tmp_path / "trace.json")
    assert measure(make, method, batch, loss=loss).peak_bytes == pytest.approx(expected, abs=512)
    assert measure(make(), method, batch, loss=loss).peak_bytes == pytest.approx(expected, abs=512)
    assert predict(make(), method, batch=batch, loss=loss).peak_bytes == pytest.approx(expected, abs=512)


def test_the_measured_peak_includes_what_the_step_holds_for_a_moment_only():
    sizes = [2**20, 2**22]

    def loss(model, inputs, targets):
        torch.empty(sizes[0], dtype=torch.uint8)
        return F.cross_entropy(model(inputs), targets)

    small = measure(DigitsMLP(), FullFineTuning(), DIGITS, loss=loss)
    sizes.reverse()
    large = measure(DigitsMLP(), FullFineTuning(), DIGITS, loss=loss)
    assert large.peak_bytes - small.peak_bytes == 3 * 2**20
    assert large.parts["logits and loss"] - small.parts["logits and loss"] == 3 * 2**20


def test_what_is_allocated_outside_the_step_does_not_count():
    usual = measure(DigitsMLP(), FullFineTuning(), DIGITS).peak_bytes
    ballast = torch.ones(2**24)
    assert measure(DigitsMLP(), FullFineTuning(), DIGITS).peak_bytes == usual
    assert ballast.numel()
    calls = []

    def first_only(model, inputs, targets):
        calls.append(None)
        if len(calls) in (1, 3):  # not in the second step, which is the one that counts
            torch.empty(2**24, dtype=torch.uint8)
        return F.cross_entropy(model(inputs), targets)

    bill = measure(DigitsMLP(), FullFineTuning(), DIGITS, loss=first_only)
    assert len(calls) == 3
    assert bill.peak_bytes == usual


def test_garbage_of_before_that_is_freed_during_the_step_does_not_make_it_smaller():
    def collecting(model, inputs, targets):
        gc.collect()
        return F.cross_entropy(model(inputs), targets)

    usual = measure(DigitsMLP(), FullFineTuning(), DIGITS, loss=collecting).peak_bytes
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True):
            circle = [torch.ones(2**20)]  # the profiler knows it, and will notice its end
            circle.append(circle)
        del circle
        assert measure(DigitsMLP(), FullFineTuning(), DIGITS, loss=collecting).peak_bytes == usual
    finally:
        gc.enable()


ROWS = Lean(loss_rows=64)  # with more, products in bfloat16 are the peak, where oneDNN packs a weight anew
WAYS = {
    "plain": {},
    "bf16": {"dtype": BF16},
    "ckpt": CKPT,
    "bf16, ckpt": {"dtype": BF16, **CKPT},
    "accumulate": {"accumulate": 2},
    "sgd": {"optimizer": "sgd"},
    "no clipping": {"clip": None},
    "autocast": {"autocast": BF16},
    "autocast, ckpt": {"autocast": BF16, **CKPT},
    "NF4": {"nf4": True},
    "NF4, bf16": {"nf4": True, "dtype": BF16},
    "NF4, ckpt": {"nf4": True, **CKPT},
    "in blocks": {"quantised": True},
    "in blocks, bf16, ckpt": {"quantised": True, "dtype": BF16, **CKPT},
    "lean": {"lean": Lean()},
    "lean, ckpt": {"lean": Lean(checkpoint=True)},
    "lean, bf16 base": {"lean": replace(ROWS, base_dtype=BF16)},
    "lean, bf16 base, ckpt": {"lean": replace(ROWS, base_dtype=BF16, checkpoint=True)},
    "lean, NF4": {"lean": Lean(), "nf4": True},
    "lean, in blocks, accumulate": {"lean": Lean(), "quantised": True, "accumulate": 2},
}
TRIED = [
    (FullFineTuning(), ["plain", "bf16", "ckpt", "bf16, ckpt", "accumulate", "sgd", "autocast"]),
    (PartialFineTuning(("model.layers.1",)), ["plain"]),
    (LoRA(1), ["plain", "bf16"]),
    (LoRA(8), [way for way in WAYS if way not in ("bf16, ckpt", "sgd", "no clipping", "autocast, ckpt", "lean, NF4")]),
    (LoRA(64), ["plain", "bf16", "bf16, ckpt"]),
    (LoRA(8, targets=ATTENTION), ["plain", "bf16, ckpt"]),
    (LoRA(8, dropout=0.1), ["no clipping", "ckpt"]),
    (LoRAFA(8), ["plain", "bf16", "ckpt", "lean, NF4"]),
    (LoRAPlus(8), ["sgd"]),
    (RsLoRA(8), ["plain"]),
    (PiSSA(8), ["plain", "bf16"]),
    (DoRA(8), ["plain", "ckpt", "autocast, ckpt"]),
]
CASES = [(method, way) for method, ways in TRIED for way in ways]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "way"), CASES)
def test_the_predicted_peak_is_within_three_percent_of_the_measured_one(method, way):
    options = dict(WAYS[way])
    if options.pop("quantised", False):
        model = Llama(SHAPE)
        quantize_nf4(model)
        rehearsed, real = predict(model, method, B, S, **options), measure(model, method, text(), **options)
        if options == {}:
            assert rehearsed.parts == llama(predicted, method, nf4=True).parts
    else:
        rehearsed, real = (llama(ask, method, **options) for ask in (predicted, measure))
    assert rehearsed.peak_bytes == pytest.approx(real.peak_bytes, rel=0.03)
    # What is left are buffers inside operations: a few bytes, and checkpoint's copy of the generator's state.
    again = LAYERS * RNG_BYTES if "ckpt" in way else 0
    assert again <= real.peak_bytes - rehearsed.peak_bytes <= again + 4096
    parts = dict(real.parts)
    assert parts.pop(REST, 0) == real.peak_bytes - rehearsed.peak_bytes
    assert parts == rehearsed.parts
    assert real.saved == rehearsed.saved
    assert real.setting == rehearsed.setting
    assert max(moment.total_bytes for moment in rehearsed.timeline) == rehearsed.peak_bytes
    assert max(moment.total_bytes for moment in real.timeline) == rehearsed.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "way"),
    [
        *[(method, "plain") for method in (FullFineTuning(), LoRA(8), LoRA(64), DoRA(8))],
        *[(LoRA(8), way) for way in ("ckpt", "lean, ckpt")],
    ],
)
def test_so_it_is_where_logits_are_few_and_the_peak_is_elsewhere(method, way):
    deeper = replace(FEW, num_hidden_layers=3)  # of which one is neither the first nor the last
    rehearsed, real = (llama(ask, method, deeper, **WAYS[way]) for ask in (predicted, measure))
    assert rehearsed.peak_bytes == pytest.approx(real.peak_bytes, rel=0.03)
    assert rehearsed.parts == {part: size for part, size in real.parts.items() if part != REST}


# The two are independent


SMALL_STEP = (SHAPE, FullFineTuning(), (2, 16), {"accumulate": 2})
ADAPTED = (FEW, LoRA(8), (B, S), {})
MATTERS = {  # where each part is a good deal of the peak
    "gradients": SMALL_STEP,
    "saved: adapters": ADAPTED,
    "logits and loss": (SHAPE, FullFineTuning(), (B, S), {}),
    "recomputed activations": (FEW, LoRA(8), (B, S), CKPT),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", MATTERS)
def test_a_predictor_that_loses_a_part_misses_the_peak_that_is_measured_as_before(part, monkeypatch):
    config, method, size, options = MATTERS[part]
    rehearsed, real = (llama(ask, method, config, *size, **options) for ask in (predicted, measure))
    assert rehearsed.peak_bytes == pytest.approx(real.peak_bytes, rel=0.03)
    moments = Recording.moments
    without = lambda found: {name: size for name, size in found.items() if name != part}  # noqa: E731
    monkeypatch.setattr(Recording, "moments", lambda *args: map(without, moments(*args)))
    wrong = predict(Llama(config), method, *size, **options)
    assert wrong.peak_bytes < 0.97 * real.peak_bytes
    still = measure(Llama(config), method, text(config, *size), **options)
    assert still.peak_bytes == real.peak_bytes
    assert still.parts[REST] == real.peak_bytes - wrong.peak_bytes
    assert part not in still.parts


# predict: fit's own step, twice, on nothing


def test_predict_and_measure_take_the_step_that_fit_takes(monkeypatch):
    calls, plain = [], TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda *args: calls.append(args[1]) or plain(*args))
    part = Examples(*DIGITS)
    fit(DigitsMLP(), Task("t", part, part, part, part), LoRA(2), steps=3, lr=0.01)
    assert len(calls) == 3
    predict(DigitsMLP(), LoRA(2), batch=DIGITS)
    assert len(calls) == 3 + 1  # what the first step leaves behind is made without taking it
    assert all(type(tensor).__name__ == "FakeTensor" for batches in calls[3:] for batch in batches for tensor in batch)
    measure(DigitsMLP(), LoRA(2), DIGITS)
    assert len(calls) == 3 + 1 + 3
    assert all(type(tensor) is torch.Tensor for batches in calls[4:] for batch in batches for tensor in batch)


@BOTH
def test_the_second_step_is_reported_which_starts_with_the_state_and_gradients_of_the_first(ask):
    numbers = sum(parameter.numel() for parameter in DigitsMLP().parameters())
    first = ask(DigitsMLP(), FullFineTuning(), DIGITS).timeline[0]
    assert first == Moment("before", first.parts, 0)
    assert first.parts["optimiser state"] == 2 * 4 * numbers + 4 * 6
    assert first.parts["gradients"] == 4 * numbers
    assert set(first.parts) == {"trained weights", "optimiser state", "gradients"}


BIG = """
import torch
from lora_lab import FullFineTuning, Llama, LlamaConfig
from lora_lab.costs.memory import predict
from lora_lab.models.shapes import config
from lora_lab.system.device import peak_bytes

torch.set_num_threads(1)
device = torch.device("cpu")
predict(lambda: Llama(LlamaConfig(50, 16, 24, 1, 2, 1, 8)), FullFineTuning(), 1, 8)  # what is imported at first use
before = peak_bytes(device)
bill = predict(lambda: Llama(config("llama-3-8b")), FullFineTuning(), 1, 2048, dtype=torch.bfloat16)
print(peak_bytes(device) - before, bill.peak_bytes, bill.parts["trained weights"], bill.parts["optimiser state"])
"""


@pytest.mark.slow
def test_a_model_of_eight_billion_parameters_is_predicted_in_no_memory():
    done = run_python(BIG)
    grown, peak, trained, state = map(int, done.stdout.split())
    assert grown < 300 * MIB
    assert trained == 2 * 8_030_261_248
    assert state == 2 * 2 * 8_030_261_248 + 4 * (3 + 9 * 32)
    assert peak > trained + state


# Without harm


class Normed(nn.Module):
    """A net with buffers that change in training, and with dropout."""

    def __init__(self):
        super().__init__()
        self.hidden, self.norm = nn.Linear(IN, 16), nn.BatchNorm1d(16)
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.dropout(F.relu(self.norm(self.hidden(x)))))


HARMLESS = {
    "full": (lambda: Llama(ONE), FullFineTuning(), {}),
    "lora": (lambda: Llama(ONE), LoRA(8, dropout=0.1), {}),
    "checkpointing": (lambda: Llama(ONE), LoRA(8), CKPT),
    "lean": (lambda: Llama(ONE), LoRA(8), {"lean": Lean(base_dtype=BF16, checkpoint=True)}),
    "nf4": (lambda: Llama(ONE), LoRA(8), {"nf4": True}),
    "buffers, sgd": (Normed, FullFineTuning(), {"optimizer": "sgd", "accumulate": 2}),
}


def marked(make):
    """A model with mixed modes, a frozen weight and a gradient that somebody left."""
    model = make()
    first, *_, last = model.parameters()
    first.grad = torch.ones_like(first)
    last.requires_grad_(False)
    list(model.children())[-1].eval()
    model.note = ["somebody's"]
    return model


def facts(model):
    """All that training changes, in full: values, where they are, and what the modules are."""
    return {
        "tensors": {
            name: (id(t), t.data_ptr(), t.dtype, t.requires_grad, t.detach().reshape(-1).view(torch.uint8).tolist())
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        },
        "gradients": {name: None if p.grad is None else p.grad.sum().item() for name, p in model.named_parameters()},
        "modules": {
            name: (id(m), type(m), m.training, sorted(vars(m)), len(m._forward_hooks))
            for name, m in model.named_modules()
        },
        "note": list(model.note),
        "checkpointing": getattr(getattr(model, "model", None), "gradient_checkpointing", None),
    }


def global_state():
    """What a call could leave behind in torch: hooks, modes, a profiler; and the generator's state."""
    module = torch.nn.modules.module
    hooks = [name for name in vars(module) if name.startswith("_global_") and isinstance(vars(module)[name], dict)]
    assert "_global_forward_hooks" in hooks
    return {
        "hooks": {name: len(getattr(module, name)) for name in hooks},
        "modes": list(_get_current_dispatch_mode_stack()),
        "function modes": torch._C._len_torch_function_stack(),
        "saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "profiler": torch.autograd._profiler_enabled(),
        "optimizer": len(sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks),
        "gradients on": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
    }


ASKED = {
    "memory predicted": predicted,
    "memory measured": measure,
    "FLOPs": lambda model, setup, batch: speed.flops(model, setup, batch=batch),
    "time measured": lambda model, setup, batch: speed.step_time(model, {"one": setup}, batch=batch, rounds=1),
    "time predicted": lambda model, setup, batch: CostModel(lambda _: 0.0).predict(model, {"one": setup}, batch=batch),
}


@pytest.mark.slow
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("kind", HARMLESS)
def test_the_model_and_torch_are_left_as_they_were_bit_for_bit(asked, kind):
    make, method, options = HARMLESS[kind]
    model = marked(make)
    batch = text(ONE, 2, 16) if isinstance(model, Llama) else DIGITS
    torch.manual_seed(7)
    before, around = facts(model), global_state()
    ASKED[asked](model, Setup(method, **options), batch)
    assert facts(model) == before
    assert global_state() == around


def test_a_run_of_fit_does_change_what_is_compared_above():
    model = marked(Normed)
    before = facts(model)
    part = Examples(*DIGITS)
    fit(model, Task("t", part, part, part, part), FullFineTuning(), steps=1, lr=0.1)
    after = facts(model)
    for name in ("hidden.weight", "norm.running_mean"):
        assert before["tensors"][name][-1] != after["tensors"][name][-1]
    assert (before["tensors"]["head.bias"][3], after["tensors"]["head.bias"][3]) == (False, True)
    assert before["gradients"] != after["gradients"]
    assert before["modules"] != after["modules"]  # the mark of the method


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("planted in the backward pass")


@BOTH
@pytest.mark.parametrize("where", ["forward", "backward", "a block that is computed again"])
def test_a_step_that_fails_leaves_everything_as_it_was_too(ask, where):
    calls, last = [], 1 if ask is predicted else 2  # a first step is not rehearsed

    def loss(model, inputs, targets):
        calls.append(None)
        if where == "forward" and len(calls) == last:
            raise RuntimeError("planted in the forward pass")
        result = cross_entropy(model, inputs, targets)
        return Broken.apply(result) if where == "backward" and len(calls) == last else result

    model = marked(lambda: Llama(ONE))
    if where.startswith("a block"):

        class Fails(nn.Identity):
            def forward(self, x):
                if torch._C._current_graph_task_id() != -1:  # within a backward pass
                    raise RuntimeError("planted in a block")
                return x

        model.model.layers[0].mlp = nn.Sequential(Fails(), model.model.layers[0].mlp)
    torch.manual_seed(7)
    before, around = facts(model), global_state()
    with pytest.raises(RuntimeError, match="planted in"):
        ask(model, LoRA(8), text(ONE, 2, 16), loss=loss, **(CKPT if where.startswith("a block") else {}))
    assert facts(model) == before
    assert global_state() == around


# Transformers' models


@BOTH
def test_a_model_that_peft_made_ready_has_the_parts_of_ours(ask, tiny_hf):
    config = replace(SHAPE, vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    batch = text(config)
    ours = predict(Llama(config), LoRA(8), batch=batch)
    theirs = ask(with_peft(tiny_hf()), AsItIs(), batch, loss=causal)
    for part in ("saved: attention", "saved: MLP", "saved: norms", "saved: adapters"):
        assert theirs.saved[part] == ours.saved[part]
    for part in ("frozen weights", "trained weights", "optimiser state"):
        assert theirs.parts[part] - ours.parts[part] == (2 * 4 * 4 if part == "frozen weights" else 0)  # frequencies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "method", "options"),
    [
        *((lambda hf: with_peft(hf()), AsItIs(), options) for options in ({}, {"dtype": BF16}, CKPT)),
        (lambda hf: hf(), LoRA(8), {"nf4": True}),
        (lambda _: tiny_models.bert(), FullFineTuning(), {}),
        (lambda _: tiny_models.bert(), LoRA(8, targets=["query", "value"]), {}),
        (lambda _: tiny_models.gpt2(), FullFineTuning(), {"accumulate": 2}),
        (lambda _: tiny_models.gpt2(), LoRA(8, targets=["c_attn"]), {}),
    ],
)
def test_models_of_transformers_are_predicted_within_three_percent(make, method, options, tiny_hf):
    model, batch = make(tiny_hf), text(replace(SHAPE, vocab_size=40), length=16)
    if "Bert" in type(model).__name__:
        batch = batch[0], torch.zeros(B, dtype=torch.long)
    before = copy.deepcopy(model.state_dict())
    rehearsed, real = (ask(model, method, batch, loss=causal, **options) for ask in (predicted, measure))
    assert rehearsed.peak_bytes == pytest.approx(real.peak_bytes, rel=0.03)
    assert real.parts["trained weights"] == rehearsed.parts["trained weights"] > 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# CUDA, where there is none


NO_CUDA = """
import torch
from lora_lab import FullFineTuning, Llama, LoRA, LlamaConfig
from lora_lab.costs.fake import fake_copy
from lora_lab.costs.memory import measure, predict

model = Llama(LlamaConfig(50, 16, 24, 1, 2, 1, 8))

def copy(device):
    with fake_copy(model, device):
        torch.ones(1, device=device)

for ask in (copy, lambda device: print(predict(lambda: model, LoRA(2), 1, 4, device=device).source)):
    for device in ("cuda", "cuda:1", "mps", "xpu"):
        try:
            ask(device)
        except ValueError:
            print("refused")
measure(model, FullFineTuning(), (torch.zeros(1, 4, dtype=torch.long),) * 2)
print("alive")
"""


@pytest.mark.slow
@needs_no_gpu
def test_devices_that_are_not_there_cannot_abort_the_interpreter():
    done = run_python(NO_CUDA)
    assert done.stderr == ""  # and the profiler says nothing either
    estimated = ["estimated for CUDA, not measured"] * 2
    assert done.stdout.splitlines() == [*["refused"] * 4, *estimated, *["refused"] * 2, "alive"]


def on_cuda(model, method, batch, **options):
    return predict(model, method, batch=batch, device="cuda", **options)


@needs_no_gpu
def test_for_cuda_every_storage_takes_whole_blocks_of_512_bytes():
    tiny = nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))
    batch = torch.ones(1, 1), torch.ones(1, 1)

    def squares(model, inputs, targets):
        return (model(inputs) - targets).square().mean()

    here, there = (
        predict(tiny, FullFineTuning(), batch=batch, loss=squares, device=device) for device in ("cpu", "cuda")
    )
    assert here.parts["trained weights"] == 4 * 100
    assert there.parts["trained weights"] == 512 * 100
    assert there.parts["optimiser state"] == 512 * 300
    assert "cuBLAS workspace" not in here.parts
    assert there.parts["cuBLAS workspace"] == 2 * (2 * 4096 + 8 * 16) * 1024  # torch's ":4096:2:16:8", in KiB
    assert there.source == "estimated for CUDA, not measured"
    assert here.source == "predicted"
    more = nn.Linear(3, 43)  # 516 bytes and 172
    found = predict(more, FullFineTuning(), batch=(torch.ones(1, 3), torch.ones(1, 43)), loss=squares, device="cuda")
    assert found.parts["trained weights"] == 1024 + 512


@needs_no_gpu
@pytest.mark.parametrize("options", [{}, {"dtype": BF16}, {"accumulate": 2}])
def test_for_cuda_the_bill_is_the_cpus_and_named_corrections(options, monkeypatch):
    plain = SimpleNamespace(apply=lambda x, weight, dims: torch.rms_norm(x, x.shape[-dims:], weight))
    monkeypatch.setattr(memory, "_FusedNorm", plain)  # norms move the peak, and have a test of their own
    config = replace(ONE, num_key_value_heads=HEADS)  # heads that share nothing: the CPU's attention is like CUDA's
    here, there = (ask(Llama(config), LoRA(8), text(config), **options) for ask in (predicted, on_cuda))
    storages = 200  # more than there ever are
    parts = dict(there.parts)
    assert parts.pop("cuBLAS workspace") == 2 * 8_519_680
    assert parts.keys() == here.parts.keys()
    for part, size in parts.items():
        assert here.parts[part] <= size <= here.parts[part] + 512 * storages
        assert size % 512 == 0
    assert there.saved.keys() == here.saved.keys()


@pytest.mark.slow
@needs_no_gpu
def test_for_cuda_scores_are_made_whole_where_keys_are_shared_in_float32_and_nowhere_else():
    def kept(ask, config, length, **options):
        bill = llama(ask, LoRA(8), config, 2, length, **options)
        return bill.saved["saved: attention"] + bill.saved["saved: adapters"]

    for length in (128, 256):
        # The chances of all pairs, and keys and values once for each head that shares them; but no
        # sum for each row of scores. What attention mixed is o_proj's input alone.
        pairs, tokens = 2 * HEADS * length**2, 2 * length
        more = 4 * (pairs + tokens * (2 * (HEADS - KV) * HEAD - HEADS))
        assert kept(on_cuda, ONE, length) - kept(predicted, ONE, length) == pytest.approx(more, abs=512 * 10)
    assert kept(on_cuda, ONE, 256, dtype=BF16) == kept(predicted, ONE, 256, dtype=BF16)
    lone = replace(ONE, num_key_value_heads=HEADS)
    assert kept(on_cuda, lone, 256) == kept(predicted, lone, 256)  # enable_gqa is on, but nothing is shared


@pytest.mark.slow
@needs_no_gpu
@pytest.mark.parametrize("options", [CKPT, {"lean": Lean(checkpoint=True)}], ids=["checkpointed", "lean"])
def test_for_cuda_scores_are_made_whole_in_blocks_that_are_computed_again_too(options):
    def second_difference(ask, **more):
        """Of the peak, less what does not depend on the length; 0 if the peak grows in a line."""
        short, long = (llama(ask, LoRA(8), ONE, 2, length, **options, **more) for length in (256, 512))
        fixed = long.static_bytes + long.parts.get("cuBLAS workspace", 0)
        return long.peak_bytes - 2 * short.peak_bytes + fixed

    pairs = 4 * 2 * HEADS * (512**2 - 2 * 256**2)
    assert abs(second_difference(predicted)) < pairs / 10
    assert second_difference(on_cuda) > 2 * pairs  # the chances, and their gradient
    if options == CKPT:
        assert abs(second_difference(on_cuda, dtype=BF16)) < pairs / 10


@pytest.mark.slow
@needs_no_gpu
@pytest.mark.parametrize("options", [{}, {"dtype": BF16}], ids=["float32", "bfloat16"])
def test_for_cuda_a_norm_keeps_its_input_and_one_number_a_row(options):
    def norms(ask):
        three, two = (
            llama(ask, FullFineTuning(), replace(SHAPE, num_hidden_layers=layers), **options) for layers in (3, 2)
        )
        return three.saved["saved: norms"] - two.saved["saved: norms"]

    size = 2 if options else 4
    assert norms(on_cuda) == 2 * (size * T * D + 4 * T)  # the row's number is in float32
    assert norms(predicted) > 1.9 * 2 * size * T * D  # the CPU keeps what the weight is multiplied with, too


@needs_no_gpu
def test_for_cuda_a_norm_that_is_computed_again_keeps_as_little():
    config = replace(FEW, num_key_value_heads=HEADS)  # heads that share nothing: the CPU's attention is like CUDA's
    here, there = (
        llama(ask, FullFineTuning(), config, **CKPT).parts["recomputed activations"] for ask in (predicted, on_cuda)
    )
    assert here - there == pytest.approx(2 * 4 * T * D, abs=100 * 512)  # of the block's two norms


@needs_no_gpu
def test_for_cuda_a_norm_whose_weight_is_of_another_dtype_is_not_fused():
    class Normed(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.wide, self.weight = nn.Linear(IN, 512), nn.Parameter(torch.ones(512, dtype=dtype))

        def forward(self, x):
            return F.rms_norm(self.wide(x), (512,), self.weight)

    kept = {
        (dtype, ask): ask(Normed(dtype), FullFineTuning(), DIGITS).saved_bytes
        for dtype in (torch.float32, torch.float64)
        for ask in (predicted, on_cuda)
    }
    assert kept[torch.float32, predicted] - kept[torch.float32, on_cuda] > 0.9 * 4 * BATCH * 512
    assert kept[torch.float64, predicted] == pytest.approx(kept[torch.float64, on_cuda], abs=20 * 512)


@needs_no_gpu
def test_a_factorys_model_and_one_on_meta_are_predicted_where_they_would_be_trained(monkeypatch):
    usual = llama(predicted, LoRA(8), ONE)
    assert predict(lambda: Llama(ONE), LoRA(8), B, S).parts == usual.parts
    with torch.device("meta"):
        shapes = Llama(ONE)
    assert predict(shapes, LoRA(8), B, S).parts == usual.parts
    assert predict(Llama(ONE), LoRA(8), B, S, device="cpu:0").parts == usual.parts
    assert predict(Llama(ONE), LoRA(8), batch=text(ONE), device="cpu:0").parts == usual.parts
    monkeypatch.setattr(memory, "pick_device", lambda device=None: (torch.device(device or "cuda"), "planted"))
    assert predict(lambda: Llama(ONE), LoRA(8), 1, 8).source == "estimated for CUDA, not measured"
    assert predict(Llama(ONE), LoRA(8), 1, 8).source == "predicted"  # where the model is


@needs_gpu
@pytest.mark.parametrize(("method", "options"), [(LoRA(8), {}), (FullFineTuning(), {"dtype": BF16}), (LoRA(8), CKPT)])
def test_on_a_gpu_the_predicted_peak_is_near_the_allocators(method, options):
    config = replace(SHAPE, hidden_size=256, intermediate_size=768, head_dim=64, vocab_size=8000)
    model = Llama(config).cuda()
    rehearsed, real = predict(model, method, B, 256, **options), measure(model, method, text(config, B, 256), **options)
    assert real.reserved_bytes >= real.peak_bytes
    assert rehearsed.peak_bytes == pytest.approx(real.peak_bytes, rel=0.1)


def test_on_a_gpu_the_peak_is_the_allocators_mark_less_what_was_there_before(monkeypatch):
    calls, device = [], torch.device("cuda")
    marks = {"requested_bytes.all.current": 900, "requested_bytes.all.peak": 1480}
    monkeypatch.setattr(memory, "_take_workspaces", lambda device: calls.append("workspaces"))
    for name, value in {"max_memory_allocated": 1700, "max_memory_reserved": 4096, "memory_stats": marks}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: calls.append("before") or 1000)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    with memory._cuda_meter(device) as meter:
        assert calls == ["workspaces", "before"]
        with meter.second_step():
            assert calls[2:] == [device]
    assert (meter.peak_bytes, meter.reserved_bytes, meter.workspace_bytes) == (700, 4096, 64 * MIB)
    assert meter.ends_bytes == 700 - (1480 - 900)  # given, and not asked for
    marks.clear()  # an allocator that does not count what was asked for
    with memory._cuda_meter(device) as meter, meter.second_step():
        pass
    assert (meter.peak_bytes, meter.ends_bytes) == (700, 0)


def test_what_the_allocator_gave_and_nobody_asked_for_is_a_part_of_its_own_and_so_is_the_workspace(monkeypatch):
    plain, meter = measure(DigitsMLP(), FullFineTuning(), DIGITS), memory._Meter
    given = {"reserved_bytes": 123 * MIB, "ends_bytes": 512, "workspace_bytes": 3 * MIB}
    monkeypatch.setattr(memory, "_Meter", lambda second_step: meter(second_step, **given))
    found = measure(DigitsMLP(), FullFineTuning(), DIGITS)
    assert found.peak_bytes == plain.peak_bytes + 3 * MIB  # the ends are in the allocator's mark, the workspace is not
    assert (found.parts["unused ends of blocks"], found.parts["cuBLAS workspace"]) == (512, 3 * MIB)
    assert found.parts.get(REST, 0) == plain.parts.get(REST, 0) - 512
    assert (found.reserved_bytes, plain.reserved_bytes) == (123 * MIB, None)


@pytest.mark.parametrize(
    ("capability", "mib"),
    [((7, 5), 8.125), ((8, 6), 8.125), ((9, 0), 32), ((10, 0), 32), ((11, 0), 8.125), ((12, 0), 32)],
)
def test_cublas_keeps_a_workspace_for_each_of_two_threads_by_the_cards_capability(capability, mib, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    assert memory._workspace_bytes(torch.device("cuda:1")) == 2 * mib * MIB
    assert asked == [torch.device("cuda:1")]  # the device of the step, not the current one
    assert memory._workspace_bytes(None) == 2 * 8_519_680


# What is refused

EIGHT, GIBS = LoRA(8), 2**30
CUT = {"quantised blocks, which have no gradient": {"nf4": True}, "trains adapters only": {"lean": Lean()}}
REFUSED = [
    *[(DigitsMLP, LoRA(2), DIGITS, options, "DigitsMLP") for options in (CKPT, {"lean": Lean()})],
    *[(lambda: Llama(ONE), FullFineTuning(), text(ONE), options, says) for says, options in CUT.items()],
    (lambda: Llama(ONE), EIGHT, text(ONE), {"lean": Lean(threads=2)}, "lean.threads is 2"),
    (lambda: Llama(ONE), EIGHT, text(ONE), {"lean": Lean(), **CKPT}, "gradient_checkpointing"),
    (lambda: Llama(ONE), EIGHT, text(ONE), {"accumulate": 5}, "accumulate is 5, but the batch has 4 examples"),
    (lambda: DigitsMLP().requires_grad_(False), AsItIs(), DIGITS, {}, "no parameter"),
    (lambda: LoRA(2).prepare(model := DigitsMLP(), 0) or model, LoRA(2), DIGITS, {}, "already has adapters"),
]


@BOTH
@pytest.mark.parametrize(("model", "method", "batch", "options", "says"), REFUSED)
def test_what_cannot_be_rehearsed_is_refused(ask, model, method, batch, options, says):
    model, around = model(), global_state()
    with pytest.raises(ValueError, match=says):
        ask(model, method, batch, **options)
    assert global_state() == around


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: predict(Llama(ONE), EIGHT, 0, 8), "batch_size is 0"),
        (lambda: predict(Llama(ONE), EIGHT, 2, -1), "seq_len is -1"),
        (lambda: predict(Llama(ONE), EIGHT, 2), "seq_len is None"),
        (lambda: predict(Llama(ONE), EIGHT, 2, 8, device="banana"), "Device 'banana'"),
        (lambda: measure(DigitsMLP().to("meta"), FullFineTuning(), DIGITS), "on the meta device"),
        (lambda: largest(Llama(ONE), EIGHT, -1, seq_len=S), "budget_bytes is -1"),
        (lambda: largest(Llama(ONE), EIGHT, math.nan, seq_len=S), "budget_bytes is nan"),
        (lambda: largest(Llama(ONE), EIGHT, GIBS), "pass exactly one"),
        (lambda: largest(Llama(ONE), EIGHT, GIBS, batch_size=2, seq_len=8), "pass exactly one"),
        (lambda: largest(Llama(ONE), EIGHT, GIBS, batch_size=0), "batch_size is 0"),
        *[(lambda size=size: parse_bytes(size), "is no size") for size in ("24", "24G", "-3GB", "0.0 MiB", "1e3 MB")],
    ],
)
def test_wrong_values_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_sizes_are_read_with_their_units():
    sizes = {"24GiB": 24 * 2**30, " 1.5 tib ": 3 * 2**39, "0.5kb": 500, "3MB": 3_000_000, "512 MiB": 2**29}
    assert {text: parse_bytes(text) for text in sizes} == sizes


# Bills as objects


def test_bills_are_subtracted_and_extended_part_by_part():
    def bill(**parts):
        names = {"frozen": "frozen weights", "trained": "trained weights", "logits": "logits and loss"}
        return Bill({names[name]: size for name, size in parts.items()}, "backward", "predicted", "a model")

    first, second = bill(frozen=10 * MIB, trained=MIB), bill(trained=11 * MIB, logits=MIB)
    difference = first - second
    assert difference.parts == {"frozen weights": 10 * MIB, "trained weights": -10 * MIB, "logits and loss": -MIB}
    assert difference.peak_bytes == first.peak_bytes - second.peak_bytes == -MIB
    assert re.search(r"trained weights +-10\.0 MiB\n", str(difference))
    assert str(first - first).count("+0.0 MiB") == 3
    plain = bill(frozen=5, logits=7)
    more = plain.plus("optimiser state", 11).plus(REST, -2)
    assert list(more.parts.items()) == [
        ("frozen weights", 5), ("optimiser state", 11), ("logits and loss", 7), (REST, -2)
    ]  # fmt: skip
    assert (more.peak_bytes, more.static_bytes, plain.peak_bytes) == (21, 16, 12)
    assert plain.plus(REST, 0) == plain


@pytest.mark.slow
@BOTH
def test_a_timeline_holds_the_peak_and_all_around_it_and_nothing_above_it_with_the_phases_in_order(ask):
    def phases(bill):
        return [phase for phase, _ in itertools.groupby(moment.phase for moment in bill.timeline)]

    found = llama(ask, LoRA(8), FEW, **CKPT)
    known = {part: size for part, size in found.parts.items() if part != REST}
    totals = [moment.total_bytes for moment in found.timeline]
    operations = [moment.operation for moment in found.timeline]
    top = found.timeline[totals.index(max(totals))]
    assert (top.parts, top.phase) == (known, "backward")
    assert 375 < len(totals) <= 400
    assert operations == sorted(set(operations))
    around = {*range(top.operation - 25, top.operation + 26)} & {*range(operations[-1] + 1)}
    assert around <= {*operations}
    assert len(operations) < operations[-1]
    assert all(moment.total_bytes == sum(moment.parts.values()) for moment in found.timeline)
    assert all(size > 0 for moment in found.timeline for size in moment.parts.values())
    for part in ("frozen weights", "trained weights", "optimiser state"):
        assert {moment.parts[part] for moment in found.timeline} == {found.parts[part]}
    step = ["before", "forward", "backward", "clipping", "optimiser step"]
    assert phases(found) == step
    assert phases(llama(ask, LoRA(8), FEW, accumulate=2)) == [step[0], *step[1:3], *step[1:3], *step[3:]]


@BOTH
def test_the_moment_names_phase_operation_and_place(ask):
    # The gradient of the first layer's bias, which comes last.
    assert re.fullmatch(r"backward, operation \d+ of \d+: sum", ask(DigitsMLP(), FullFineTuning(), DIGITS).moment)
    # DoRA makes W + s B A whole for each layer: at its peak it is in a wide one.
    place = r"forward, operation \d+ of \d+: \w+ in model\.layers\.\*\.mlp\.down_proj"
    assert re.fullmatch(place, ask(Llama(FEW), DoRA(8), text(FEW, 1, 8)).moment)
    # A step with huge gradients and no activations: what is there at the end of the backward pass.
    assert ask(Llama(SHAPE), FullFineTuning(), text(SHAPE, 1, 8)).moment.startswith("backward, operation")


@BOTH
def test_the_gradient_of_a_head_that_is_also_the_embedding_has_a_name_while_it_waits(ask):
    size = 4 * SHAPE.vocab_size * SHAPE.hidden_size
    tied = ask(Llama(SHAPE), FullFineTuning(), text(SHAPE, 1, 8)).timeline
    waiting = [moment.parts.get("gradient of the head", 0) for moment in tied]
    assert {size, 2 * size} <= set(waiting)  # the head's alone, and at the end the embedding's too
    assert {phase.phase for phase, size in zip(tied, waiting, strict=True) if size} == {"backward"}
    untied = ask(Llama(replace(SHAPE, tie_word_embeddings=False)), FullFineTuning(), text(SHAPE, 1, 8)).timeline
    assert not any("gradient of the head" in moment.parts for moment in untied)
    lora = ask(Llama(SHAPE), LoRA(8), text(SHAPE, 1, 8)).timeline
    assert not any("gradient of the head" in moment.parts for moment in lora)


# How far a budget goes


class Tokens(nn.Module):
    """Few operations, so that many sizes can be tried; scores of all pairs make it quadratic in the length."""

    def __init__(self, quadratic):
        super().__init__()
        self.words, self.head, self.quadratic = nn.Embedding(17, 8), nn.Linear(8, 17), quadratic

    def forward(self, ids):
        x = self.words(ids)
        if self.quadratic:
            x = torch.softmax(x @ x.transpose(1, 2), dim=-1) @ x
        return self.head(x)


@pytest.mark.slow
@pytest.mark.parametrize(("quadratic", "fixed"), [(False, {"seq_len": 5}), (True, {"batch_size": 2})])
def test_the_largest_size_is_that_of_trying_them_all(quadratic, fixed, monkeypatch):
    model, method = Tokens(quadratic), FullFineTuning()
    (name,) = {"batch_size", "seq_len"} - fixed.keys()
    bills, plain, asked = memory._Bills(model, Setup(method), None), memory._Bills.predict, []
    known = functools.cache(lambda batch_size, seq_len: plain(bills, batch_size, seq_len))
    monkeypatch.setattr(memory._Bills, "predict", lambda _, *sizes: asked.append(sizes) or known(*sizes))

    def bill(size):
        sizes = {**fixed, name: size}
        return known(sizes["batch_size"], sizes["seq_len"])

    peaks = [bill(size).peak_bytes for size in range(1, 25)]
    assert peaks == sorted(peaks)
    budgets = [peaks[0] - 1, peaks[0], peaks[1] - 1, peaks[1], *peaks[5:23:5], peaks[20] - 1, peaks[20] + 1, peaks[22]]
    for budget in budgets:
        expected = sum(peak <= budget for peak in peaks)
        assert largest(model, method, budget, **fixed) == (expected, bill(max(expected, 1)))
    assert len(budgets) < len(asked) <= 6 * len(budgets)


def test_the_search_ends_at_a_million():
    size, found = largest(Tokens(quadratic=False), FullFineTuning(), 2**60, seq_len=1)
    assert size == 2**20
    assert "batch 1048576 x 1" in found.setting


def test_nothing_fits_a_budget_below_the_smallest_step_and_its_bill_is_returned():
    size, found = largest(Llama(ONE), LoRA(8), 1000, batch_size=2)
    assert size == 0
    assert found.parts == predict(Llama(ONE), LoRA(8), 2, 1).parts


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, pytest.param({"device": "cuda", **CKPT}, marks=needs_no_gpu)])
def test_the_largest_batch_of_a_llama_fits_and_one_more_does_not(options):
    size, found = largest(Llama(ONE), LoRA(8), 24 * MIB, seq_len=S, **options)
    peaks = [predict(Llama(ONE), LoRA(8), count, S, **options).peak_bytes for count in (size, size + 1)]
    assert found.peak_bytes == peaks[0] <= 24 * MIB < peaks[1]


# The process


GROW = """
import torch
from lora_lab.system.device import peak_bytes

device = torch.device("cpu")
before = peak_bytes(device)
touched = torch.ones(96 * 2**20, dtype=torch.uint8)
grown = peak_bytes(device)
del touched
print(before, grown, peak_bytes(device))
"""


@pytest.mark.slow
def test_the_peak_grows_by_what_is_touched_stays_and_leaves_the_parent_out():
    # More than any build of torch takes (the CUDA one 0.7 GiB); a started process must not report it as its own.
    ballast = torch.ones(1200 * MIB, dtype=torch.uint8)
    done = run_python(GROW)
    before, grown, after = map(int, done.stdout.split())
    assert grown - before >= 90 * MIB  # resident pages; a few may have been there before
    assert grown - before < 200 * MIB
    assert after >= 0.95 * grown  # Linux counts pages in batches, so a high-water mark may wobble
    assert before > 50 * MIB
    assert peak_bytes(torch.device("cpu")) > ballast.numel()
    if Path("/proc/self/status").is_file():
        assert before < ballast.numel()


# The command


@pytest.fixture
def one_way(monkeypatch):
    """Only one of the six ways, for time's sake."""
    every = memory.training_setups
    monkeypatch.setattr(
        memory, "training_setups", lambda rank, dtype, lean: {"LoRA r=8": every(rank, dtype)["LoRA r=8"]}
    )


@pytest.mark.slow
def test_memory_has_a_row_and_a_bill_for_each_way_and_says_what_fits(tmp_path, capsys, tiny_config):
    bills = {
        label: memory.predict(lambda: Llama(tiny_config), setup, 2, 16, device="cpu")
        for label, setup in training_setups(4, torch.float32).items()
    }
    folder = llama_folder(tmp_path, tiny_config)
    arguments = ["--model", folder, "--batch", 2, "--seq", 16, "--rank", 4, "--dtype", "float32", "--device", "cpu"]
    peaks = sorted(bill.peak_bytes for bill in bills.values())
    budget = 1024 * ((peaks[2] + peaks[3]) // 2048)
    assert command("memory", *arguments, "--budget", f"{budget // 1024}KiB", "--bills", "--json") == 0
    document, printed = printed_json(capsys)
    lines, setups = printed.splitlines(), document.pop("setups")
    sizes = {"batch_size": 2, "seq_len": 16, "budget_bytes": budget}
    assert document == {"model": str(folder), "dtype": "float32", "device": "cpu", **sizes}
    assert "CUDA" not in printed
    for (label, bill), entry in zip(bills.items(), setups, strict=True):
        fits = bill.peak_bytes <= budget
        assert {**entry, **bill.to_dict()} == entry
        assert (entry["setup"], entry["fits"], entry["free_bytes"]) == (label, fits, budget - bill.peak_bytes)
        (line,) = (line for line in lines if line.startswith(f"{label}  "))
        assert (" yes " in line) == fits
        assert str(bill) in printed


@pytest.mark.slow
def test_memory_as_json_has_the_largest_size_if_it_was_asked_for(one_way, tmp_path, capsys, tiny_config):
    arguments = ["--model", llama_folder(tmp_path, tiny_config), "--dtype", "float32", "--device", "cpu", "--json"]
    setup = training_setups(8, torch.float32)["LoRA r=8"]
    names = {"batch": "batch_size", "seq": "seq_len"}
    for look_for, size, number in (("batch", "seq", 16), ("seq", "batch", 2)):
        assert command("memory", *arguments, f"--{size}", number, "--budget", "1MiB", "--largest", look_for) == 0
        (entry,) = printed_json(capsys)[0]["setups"]
        expected, _ = memory.largest(lambda: Llama(tiny_config), setup, 2**20, device="cpu", **{names[size]: number})
        assert entry[f"largest_{names[look_for]}"] == expected > 1
        assert entry[f"largest_{names[size]}"] is None
    assert command("memory", *arguments, "--seq", 16) == 0
    document, _ = printed_json(capsys)
    assert document["budget_bytes"] is document["setups"][0]["fits"] is document["setups"][0]["free_bytes"] is None


@pytest.mark.slow
@needs_no_gpu
def test_without_a_gpu_a_card_is_estimated_and_said_to_be(one_way, tmp_path, capsys, tiny_config):
    assert command("memory", "--model", llama_folder(tmp_path, tiny_config), "--seq", 8) == 0
    printed = capsys.readouterr().out
    assert "estimated for CUDA, not measured" in printed
