"""Packed adapters: each against its own run of fit, and no trial may feel another, to the last bit."""

import copy
import functools
import math
import random
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab import (
    DoRA,
    FullFineTuning,
    Lean,
    Llama,
    LoRA,
    LoRAConfig,
    LoRAFA,
    LoRAPlus,
    PiSSA,
    RsLoRA,
    adapter_state,
    fit,
    inject,
    merge,
    quantize_nf4,
)
from lora_lab.ablation import Trial, packed
from lora_lab.ablation.packed import PackedLinear, PackingError, fit_packed, refusal
from lora_lab.ablation.run import share_work
from lora_lab.history import DivergedError
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.quantize import BlockLinear, nf4
from lora_lab.tasks import IGNORE, Examples, Task, cross_entropy, mean_squared_error, planted
from lora_lab.tasks.instruction import Padded

LOSSES = ("train_loss", "validation_loss", "off_domain_loss")
OPTIONS = {"steps": 6, "batch_size": 4, "eval_every": 3}


class Run(NamedTuple):
    """A method, its learning rate and its seed: what differs between the trials of a pack."""

    method: LoRA
    lr: float
    seed: int = 0


RUNS = [
    Run(LoRA(rank=2, alpha=4.0), lr=3e-3, seed=0),
    Run(LoRA(rank=5, alpha=16.0), lr=1e-2, seed=1),
    Run(LoRA(rank=1, alpha=8.0), lr=1e-3, seed=1),
    Run(LoRA(rank=3, alpha=3.0), lr=2e-2, seed=7),
]


def pack(model, task, runs=RUNS, **options):
    """The results of a pack of these runs, each with the same options."""
    return fit_packed(model, task, [Trial(*run, **options or OPTIONS) for run in runs])


def pictures(dtype=torch.float32, loss=cross_entropy):
    """Random numbers in the shape of the digits; 30 training examples, so that batches of 4 cross epochs."""

    def part(n, seed):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(n, 64, generator=generator, dtype=torch.float64).to(dtype)
        return Examples(inputs, torch.randint(0, 10, (n,), generator=generator))

    return Task("pictures", part(30, 0), part(9, 1), part(5, 2), part(6, 3), loss)


def sentences(vocabulary=260, length=6):
    """Random tokens, of which some do not count, so that batches of two trials count unequally."""

    def part(n, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocabulary, (n, length), generator=generator)
        targets = ids.roll(-1, dims=1)
        targets[torch.rand(n, length, generator=generator) < 0.4] = IGNORE
        targets[:, 0] = ids[:, 1]
        return Examples(ids, targets)

    return Task("sentences", part(14, 0), part(5, 1), part(3, 2), part(4, 3), unit="tokens")


def separate(model, task, run, **options):
    """The history and the adapter of one run of fit, on a copy of the model."""
    twin = copy.deepcopy(model)
    history = fit(twin, task, run.method, lr=run.lr, seed=run.seed, **options)
    return history, adapter_state(twin)


def column(result, name):
    return torch.tensor([row[name] for row in result.history.rows if row[name] is not None], dtype=torch.float64)


def same_bits(one, other):
    """Whether two results agree in every loss, norm and weight, to the last bit."""
    columns = [(column(one, name), column(other, name)) for name in (*LOSSES, "grad_norm")]
    return all(torch.equal(*pair) for pair in [*columns, *((one.adapter[k], other.adapter[k]) for k in one.adapter)])


def moved(result):
    """How far from zero the adapter's B has come."""
    return max(float(value.abs().max()) for name, value in result.adapter.items() if name.endswith("lora_B"))


# Equal to the separate runs


def assert_as_separate(result, history, adapter, rtol):
    for name in (*LOSSES, "grad_norm"):
        steps, values = result.history.curve(name)
        expected_steps, expected = history.curve(name)
        assert steps == expected_steps
        np.testing.assert_allclose(values, expected, rtol=rtol, atol=0, err_msg=name)
    assert list(result.adapter) == list(adapter)
    for name, value in adapter.items():
        assert result.adapter[name].dtype == value.dtype
        assert result.adapter[name].shape == value.shape
        apart = torch.linalg.vector_norm(result.adapter[name] - value)
        assert apart <= rtol * torch.linalg.vector_norm(value), name


def digits_net():
    return DigitsMLP(width=16).double(), pictures(torch.float64)


def digits_transformer():
    return DigitsTransformer(width=8, heads=2).double(), pictures(torch.float64)


def planted_net():
    net = DigitsMLP(width=16)
    task = planted(net, rank=2, n_train=30)
    parts = {name: Examples(part.inputs.double(), part.targets.double()) for name, part in task.parts.items()}
    return net.double(), Task("planted", **parts, loss=mean_squared_error)


def unequal_sentences():
    """Rows of 2 to 25 tokens, padded on the right; 14 of them, so that batches of 4 cross epochs."""
    parts = {}
    for seed, (part, count) in enumerate({"train": 14, "validation": 5, "test": 3, "off_domain": 4}.items()):
        inputs = torch.randint(0, 200, (count, 25), generator=torch.Generator().manual_seed(seed))
        targets = (inputs * 3 + 1) % 200
        for row in range(count):
            targets[row, 2 + (row * 7) % 24 :] = IGNORE
        parts[part] = Padded(inputs, targets)
    return Task("unequal", **parts, unit="tokens")


@pytest.mark.parametrize("batches", ["random", "by_length"])
def test_trials_of_unequal_lengths_are_independent_in_single_precision_too(tiny_config, batches):
    """The examples with which independence is tried have other lengths, which must not look like a dependence."""
    model, task = Llama(tiny_config, seed=3), unequal_sentences()
    for seed in range(4):
        runs = [Run(run.method, run.lr, run.seed + seed) for run in RUNS]
        results = pack(model, task, runs, steps=1, batch_size=2, batches=batches)
        assert all(result.error is None for result in results)


STEPS = {
    "lean": {"lean": Lean()},
    "lean, checkpointing": {"lean": Lean(checkpoint=True, loss_rows=5)},
    "lean, bfloat16 base": {"lean": Lean(torch.bfloat16)},
    "lean, bfloat16 base, three threads": {"lean": Lean(torch.bfloat16, threads=3)},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "down_proj"], ["q_proj", "lm_head"]], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_each_trial_equals_its_own_run_whatever_the_step(tiny_config, step, targets):
    config = replace(tiny_config, attention_bias=True, mlp_bias=True, tie_word_embeddings="lm_head" not in targets)
    model, task = Llama(config, seed=3), sentences()
    if "bfloat16" not in step:
        model.double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = [Run(LoRA(run.method.rank, run.method.alpha, targets=targets), run.lr, run.seed) for run in RUNS[:3]]
    options = {"steps": 8, "batch_size": 4, "weight_decay": 0.01, "eval_every": 4, "clip": 0.3}
    results = pack(model, task, runs, **options, **STEPS[step])
    plain = pack(model, task, runs, **options)
    for run, result, without in zip(runs, results, plain, strict=True):
        history, adapter = separate(model, task, run, **options | STEPS[step])
        # Rounding to bfloat16 turns differences of the last bit of float32 into some of the last bit of bfloat16.
        assert_as_separate(result, history, adapter, rtol=2e-2 if "bfloat16" in step else 1e-9)
        assert result.history.settings == history.settings
        assert moved(result) > 1e-3
        apart = (column(result, "validation_loss") - column(without, "validation_loss")).abs().max()
        assert (apart > 1e-5) == ("bfloat16" in step)
    assert not np.allclose(column(results[0], "train_loss"), column(results[1], "train_loss"), rtol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def in_four_bits(config):
    model = Llama(replace(config, hidden_size=64, intermediate_size=64, head_dim=16), seed=3)
    quantize_nf4(model)
    return model, sentences()


def in_units(unit, config):
    return Llama(config, seed=3), replace(sentences(), unit=unit)


def in_double(task, config):
    return Llama(config, seed=3).double(), task()


PACKS = {  # what makes the model and the task, the runs, options, and how near to the separate runs
    "llama": (functools.partial(in_double, sentences), RUNS[:3], {"weight_decay": 0.01}, 1e-9),
    "by length": (functools.partial(in_double, unequal_sentences), RUNS, {"batches": "by_length"}, 1e-9),
    "of one": (lambda _: digits_net(), RUNS[:1], {}, 1e-12),
    "decayed, clipped": (lambda _: digits_net(), RUNS, {"weight_decay": 0.1, "clip": 0.3, "eval_examples": 5}, 1e-9),
    "squared errors": (lambda _: planted_net(), RUNS, {"schedule": "constant", "warmup": 0, "clip": None}, 1e-9),
    "transformer": (lambda _: digits_transformer(), RUNS, {"steps": 50, "clip": 0.3}, 1e-9),
    "RsLoRA": (lambda _: digits_net(), [Run(RsLoRA(rank, 8), 1e-2, 1) for rank in (4, 2)], {}, 1e-9),
    "half precision": (lambda _: (DigitsMLP(width=16).bfloat16(), pictures(torch.bfloat16)), RUNS, {}, 0.02),
    "four bits": (in_four_bits, RUNS[:3], {}, 1e-3),
    "four bits, lean": (in_four_bits, RUNS[:3], {"lean": Lean()}, 1e-3),
    "four bits, bfloat16": (in_four_bits, RUNS[:3], {"lean": Lean(torch.bfloat16, checkpoint=True)}, 2e-2),
    "tokens": (functools.partial(in_units, "tokens"), RUNS[:2], {}, 1e-3),
    "examples": (functools.partial(in_units, "examples"), RUNS[:2], {}, 1e-3),
    "batch norm": (lambda _: (Net(nn.BatchNorm1d(12)).double(), pictures(torch.float64)), RUNS, {}, 1e-9),
}


@pytest.mark.parametrize("case", PACKS)
def test_each_trial_equals_its_own_run_in_every_pack(tiny_config, case):
    make, runs, options, rtol = PACKS[case]
    model, task = make(tiny_config)
    results = pack(model, task, runs, **OPTIONS | options)
    for run, result in zip(runs, results, strict=True):
        history, adapter = separate(model, task, run, **OPTIONS | options)
        assert_as_separate(result, history, adapter, rtol=rtol)
        assert [row["tokens"] for row in result.history.rows] == [row["tokens"] for row in history.rows]
        assert moved(result) > 1e-3
    if clip := options.get("clip"):
        assert any(column(result, "grad_norm").max() > clip for result in results)  # put to the test
    for other in results[1:]:
        assert not np.allclose(column(results[0], "train_loss"), column(other, "train_loss"), rtol=1e-3)


def test_rows_and_facts_are_those_of_a_separate_run():
    model, task = digits_net()
    results = pack(model, task)
    for run, result in zip(RUNS, results, strict=True):
        history, _ = separate(model, task, run, **OPTIONS)
        for row, expected in zip(result.history.rows, history.rows, strict=True):
            assert list(row) == list(expected)
            assert (row["step"], row["lr"], row["tokens"]) == (expected["step"], expected["lr"], expected["tokens"])
            assert row["seconds"] > 0 or row["step"] == 0
        assert result.history.settings == history.settings
        for fact in ("task", "method", "trainable_parameters", "total_parameters", "optimizer_bytes"):
            assert getattr(result.history, fact) == getattr(history, fact), fact
    assert len({result.history.optimizer_bytes for result in results}) == len(RUNS)  # padding is not counted
    assert list(results[0].history.frame()["step"]) == list(range(OPTIONS["steps"] + 1))


def test_a_second_derivative_through_a_packed_layer_is_refused():
    layer = PackedLinear(nn.Linear(6, 4), torch.ones(3, 2, 6), torch.ones(3, 4, 2), torch.ones(3))
    (once,) = torch.autograd.grad(layer(torch.ones(12, 6)).square().sum(), layer.lora_A, create_graph=True)
    assert bool(once.any())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.square().sum().backward()


def test_the_trained_adapter_can_be_put_back_and_gives_the_reported_loss():
    model, task = digits_net()
    result = pack(model, task)[1]
    inject(model, LoRAConfig(rank=5, alpha=16.0))
    model.load_state_dict({name: value for name, value in result.adapter.items() if "lora_" in name}, strict=False)
    merge(model)
    loss = F.cross_entropy(model(task.validation.inputs), task.validation.targets).item()
    assert loss == pytest.approx(result.history.rows[-1]["validation_loss"], rel=1e-12)
    assert loss != pytest.approx(result.history.rows[0]["validation_loss"], rel=1e-3)


@pytest.mark.parametrize("shape", [(12, 6), (12, 5, 6)], ids=["rows", "sequences"])
def test_a_packed_layer_gives_each_trial_its_own_update(shape):
    generator = np.random.default_rng(0)
    A, B, x = generator.normal(size=(3, 2, 6)), generator.normal(size=(3, 4, 2)), generator.normal(size=shape)
    scaling, base = np.array([0.5, 1.0, 4.0]), nn.Linear(6, 4).double()
    layer = PackedLinear(base, *(torch.from_numpy(value) for value in (A, B, scaling)))
    found = layer(torch.from_numpy(x)).detach().numpy()
    weight, bias = base.weight.detach().numpy(), base.bias.detach().numpy()
    for k in range(3):
        rows = slice(4 * k, 4 * k + 4)
        own = x[rows] @ weight.T + bias + scaling[k] * (x[rows] @ A[k].T @ B[k].T)
        np.testing.assert_allclose(found[rows], own, rtol=0, atol=1e-12)
        other = x[rows] @ weight.T + bias + scaling[k - 1] * (x[rows] @ A[k - 1].T @ B[k - 1].T)
        assert np.abs(found[rows] - other).max() > 0.1


# Trials do not touch


def nets(tiny_config):
    return {
        "mlp": (DigitsMLP(width=16), pictures()),
        "transformer": (DigitsTransformer(width=8, heads=2), pictures()),
        "llama": (Llama(tiny_config, seed=3), sentences()),
    }


@pytest.mark.parametrize("name", ["mlp", "transformer", "llama"])
@pytest.mark.parametrize(
    "changed",
    [
        Run(RUNS[1].method, lr=0.3, seed=RUNS[1].seed),
        Run(RUNS[1].method, lr=RUNS[1].lr, seed=99),
        Run(LoRA(rank=5, alpha=64.0), lr=RUNS[1].lr, seed=RUNS[1].seed),
    ],
    ids=["rate", "data and weights", "alpha"],
)
def test_a_change_of_one_trial_leaves_every_bit_of_the_others(tiny_config, name, changed):
    model, task = nets(tiny_config)[name]
    before = pack(model, task)
    after = pack(model, task, [RUNS[0], changed, *RUNS[2:]], **OPTIONS)
    assert [same_bits(one, other) for one, other in zip(before, after, strict=True)] == [True, False, True, True]
    assert not torch.equal(column(before[1], "train_loss"), column(after[1], "train_loss"))


def test_a_neighbours_spoilt_example_leaves_every_bit_of_the_others():
    model, task, options = DigitsMLP(width=16), pictures(), OPTIONS | {"steps": 2}
    spoilt = copy.deepcopy(task)
    seen = {seed: torch.randperm(30, generator=torch.Generator().manual_seed(seed))[:8] for seed in (0, 1, 7)}
    own = seen[7][~torch.isin(seen[7], torch.cat((seen[0], seen[1])))]  # what trial 3 alone learns from
    spoilt.train.inputs[own] = math.inf
    before, after = (pack(model, data, RUNS, **options) for data in (task, spoilt))
    assert len(own) > 0
    assert [same_bits(one, other) for one, other in zip(before[:3], after[:3], strict=True)] == [True] * 3
    assert before[3].error is None
    assert str(after[3].error) == message(model, spoilt, RUNS[3], **options)


@pytest.mark.parametrize("name", ["mlp", "transformer"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_padding_stays_exactly_zero(tiny_config, monkeypatch, name, weight_decay):
    layers = []

    class Recorded(PackedLinear):
        def __init__(self, *args):
            super().__init__(*args)
            layers.append(self)

    monkeypatch.setattr(packed, "PackedLinear", Recorded)
    model, task = nets(tiny_config)[name]
    pack(model, task, RUNS, weight_decay=weight_decay, **OPTIONS)
    assert len(layers) == len(adapter_names(model))
    for layer in layers:
        for k, run in enumerate(RUNS):
            rank = run.method.rank
            assert torch.count_nonzero(layer.lora_A[k, rank:]) == torch.count_nonzero(layer.lora_B[k, :, rank:]) == 0
            assert bool((layer.lora_A[k, :rank] != 0).any())
            assert bool((layer.lora_B[k, :, :rank] != 0).any())


def test_a_pack_multiplies_once_with_the_base_for_all_trials_and_is_evaluated_in_eval_mode():
    model, rows, modes = DigitsMLP(width=16).eval(), [], []
    model.hidden2.register_forward_hook(lambda layer, inputs, output: rows.append(len(inputs[0])))
    model.register_forward_hook(lambda net, *_: modes.append((net.hidden1.training, torch.is_grad_enabled())))
    pack(model, pictures(), RUNS, steps=2, batch_size=4, eval_every=1, eval_examples=4)
    step, evaluation = (True, True), [(False, False)] * 2  # an evaluation is of two parts
    assert modes == [*evaluation, *[step] * 3, step, *evaluation, step, *evaluation]  # the first three are trial runs
    assert rows == [4] * 2 + [4 * len(RUNS)] * (len(modes) - 2)  # before training all trials are the base


def adapter_names(model):
    return inject(copy.deepcopy(model), LoRAConfig())


# Trials that diverge


def message(model, task, run, **options):
    with pytest.raises(DivergedError) as error:
        separate(model, task, run, **options)
    return str(error.value)


@pytest.mark.parametrize("steps", [1, 6], ids=["at an evaluation", "at a step"])
@pytest.mark.parametrize("name", ["mlp", "transformer", "llama"])
def test_a_trial_that_diverges_ends_alone_with_the_error_of_fit(tiny_config, name, steps):
    model, task = nets(tiny_config)[name]
    options = {"steps": steps, "batch_size": 2, "warmup": 0, "eval_every": 3, "clip": None}
    wild = Run(RUNS[1].method, lr=1e30, seed=RUNS[1].seed)
    sane = pack(model, task, RUNS, **options)
    results = pack(model, task, [RUNS[0], wild, *RUNS[2:]], **options)
    assert len(results[1].history.rows) < steps + 1 or steps == 1
    assert results[1].adapter == {}
    assert str(results[1].error) == message(model, task, wild, **options)
    assert ("validation" in str(results[1].error)) is (steps == 1)
    for k in (0, 2, 3):
        assert results[k].error is None
        assert same_bits(results[k], sane[k])
    assert sane[1].error is None


def test_a_pack_ends_when_its_last_trial_has_diverged():
    model, calls = DigitsMLP(width=16), []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    wild = [Run(run.method, lr=1e30, seed=run.seed) for run in RUNS]
    results = pack(model, pictures(), wild, steps=500, batch_size=4, warmup=0, eval_every=500)
    assert all(isinstance(result.error, DivergedError) for result in results)
    assert sum(calls) <= 6  # three trial runs, and three steps


def test_a_batch_in_which_nothing_counts_is_refused_as_by_fit_before_anything_is_trained(tiny_config):
    task, options = sentences(), {"steps": 6, "batch_size": 2, "warmup": 0, "eval_every": 6, "clip": None}
    batches = [torch.randperm(14, generator=torch.Generator().manual_seed(seed))[:12].view(6, 2) for seed in (0, 1)]
    task.train.targets[batches[1][-1]] = IGNORE
    assert all(bool((task.train.targets[batch] != IGNORE).any()) for batch in batches[0])
    model, calls = Llama(tiny_config, seed=3), []
    model.register_forward_hook(lambda *_: calls.append(None))
    first, second = RUNS[0]._replace(seed=0), RUNS[1]._replace(seed=1)
    for train in (
        lambda: pack(model, task, [first, second], **options),
        lambda: separate(model, task, second, **options),
    ):
        with pytest.raises(ValueError, match=r"No target of the batch at step 6 \(seed 1\) counts in the loss"):
            train()
    assert calls == []
    assert pack(model, task, [first], **options)[0].error is None


def test_a_model_that_gives_nan_from_the_start_ends_every_trial_before_training():
    model = DigitsMLP(width=16)
    with torch.no_grad():
        model.head.bias[0] = math.nan
    results = pack(model, pictures())
    assert {str(result.error) for result in results} == {message(model, pictures(), RUNS[0], **OPTIONS)}
    assert "at step 0 " in str(results[0].error)


# What is left behind


def facts(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        dict(model.named_modules()),
        [module.training for module in model.modules()],
        [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()],
    )


def assert_untouched(model, before):
    (values, modules, modes, flags), (values_now, modules_now, modes_now, flags_now) = before, facts(model)
    assert list(modules_now) == list(modules)
    assert all(modules_now[name] is module for name, module in modules.items())
    assert modes_now == modes
    assert flags_now == flags
    assert all(torch.equal(values_now[name], value) for name, value in values.items())


def awkward_net():
    """In eval mode but for one layer, and with one frozen weight."""
    model = DigitsMLP(width=16).eval()
    model.hidden2.train()
    model.head.weight.requires_grad_(False)
    return model


def test_the_model_is_left_as_it_was_and_so_are_the_random_numbers():
    model = awkward_net()
    before = facts(model)
    torch.manual_seed(3)
    random = torch.get_rng_state()
    results = pack(model, pictures())
    assert all(moved(result) > 0 for result in results)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    again = pack(model, pictures())
    assert all(map(same_bits, results, again))
    fit(model, pictures(), LoRA(rank=2), steps=1, lr=1e-3)  # it bears no mark


# Refusals


class Net(nn.Module):
    """64 -> 12 -> 10 with something between."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(64, 12), middle, nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.middle(F.relu(self.first(x))))


class Attending(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, dropout=dropout)

    def forward(self, x):
        return self.attention(x[None], x[None], x[None])[0][0]


def own_loss(model, inputs, targets):
    return F.cross_entropy(model(inputs), targets, label_smoothing=0.1)


def ready_net():
    model = DigitsMLP(width=16)
    FullFineTuning().prepare(model, 0)
    return model


def adapted_net():
    model = DigitsMLP(width=16)
    inject(model, LoRAConfig(rank=2))
    return model


@pytest.mark.parametrize(
    ("runs", "options", "named"),
    [
        ([], {}, "number of trials is 0"),
        ([RUNS[0], Run(LoRA(targets=["head"]), 1e-3)], {}, "may differ in rank, alpha, learning rate and seed alone"),
        (RUNS, {"autocast": torch.bfloat16}, "without autocast"),
        (RUNS, {"accumulate": 2}, "accumulate is 2"),
        (RUNS, {"clip": 0}, "clip is 0"),
    ],
)
def test_what_is_no_pack_is_refused(runs, options, named):
    with pytest.raises(ValueError, match=named):
        pack(DigitsMLP(width=16), pictures(), runs, **OPTIONS | options)


@dataclass
class Scaled:
    """A loss that cannot be hashed, for it compares by its field."""

    factor: float

    def __call__(self, model, inputs, targets):
        return self.factor * own_loss(model, inputs, targets)


TWO, FIRST = LoRA(rank=2), LoRA(rank=2, targets=["first"])
NET = functools.partial(DigitsMLP, width=16)
METHODS = [
    (DoRA(rank=2), "'dora'"),
    (PiSSA(rank=2), "'pissa'"),
    (LoRAFA(rank=2), "'lora-fa'"),
    (LoRAPlus(rank=2), "'lora\\+'"),
    (FullFineTuning(), "'full'"),
    (LoRA(rank=2, dropout=0.1), "dropout is 0.1"),
]
LOSSES_OF_ITS_OWN = [
    (functools.partial(cross_entropy), r"loss 'partial\(\[cross_entropy\], \{\}\)' cannot be computed"),
    (Scaled(2.0), r"loss 'Scaled\(factor=2.0\)' cannot be computed"),
    (lambda model, inputs, targets: model(inputs).sum(), "loss '<lambda>' cannot be computed"),
]
REFUSED = [  # what makes the model, the method, the loss, and what must be named
    (lambda: Net(nn.Embedding(4, 12)), LoRA(targets=["first", "middle"]), cross_entropy, "'middle' is a Embedding"),
    (lambda: Net(nn.Conv2d(4, 12, 1)), LoRA(targets=["middle"]), cross_entropy, "'middle' is a Conv2d"),
    (lambda: Net(nn.Dropout(0.2)), FIRST, cross_entropy, "'middle' has dropout"),
    (lambda: Net(Attending(0.3)), FIRST, cross_entropy, "'middle.attention' has dropout"),
    (lambda: Net(nn.LSTM(12, 12, num_layers=2, dropout=0.1)), FIRST, cross_entropy, "'middle' has dropout"),
    *((NET, method, cross_entropy, named) for method, named in METHODS),
    *((NET, TWO, loss, named) for loss, named in LOSSES_OF_ITS_OWN),
]


@pytest.mark.parametrize(("make", "method", "loss", "named"), REFUSED)
def test_what_cannot_be_packed_is_refused_with_the_reason(make, method, loss, named):
    model, task = make(), pictures(loss=loss)
    before, sentence = facts(model), refusal(model, task, Trial(method, 1e-3, **OPTIONS))
    with pytest.raises(PackingError, match=named) as error:
        pack(model, task, [Run(method, lr=1e-3)])
    assert str(error.value) == sentence
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("make", "method", "named"),
    [
        (ready_net, TWO, "prepared for 'full'"),
        (adapted_net, TWO, "already has adapters"),
        (NET, LoRA(rank=2, targets=["q_proj"]), "'q_proj' matches no module"),
    ],
)
def test_what_fit_refuses_is_refused_alike(make, method, named):
    for train in (pack, lambda model, task, runs: separate(model, task, *runs, **OPTIONS)):
        with pytest.raises(ValueError, match=named):
            train(make(), pictures(), [Run(method, lr=1e-3)])


class ByFunction(nn.Module):
    """Between the layers of ``Net``: a function that no list of modules can know of."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("average", torch.zeros(12))

    def forward(self, x):
        return self.function(self, x)


def remembers(module, x):
    if module.training:
        module.average.lerp_(x.detach().mean(0), 0.1)
    return x


def remembers_anew(module, x):
    if module.training:
        module.average = module.average + x.detach().mean(0)
    return x


class PositionFirst(nn.Module):
    """Reads a picture as 8 rows of 8 pixels, and puts the position before the batch, as older models do."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 12), nn.Linear(12, 10)

    def forward(self, x):
        return self.head(F.relu(self.embed(x.view(-1, 8, 8).transpose(0, 1))).mean(0))


class Carries(nn.Module):
    """nn.LSTM as it comes, which takes the first dimension for time: its state goes on from trial to trial."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 12)

    def forward(self, x):
        return self.lstm(x)[0]


class LooksBack(nn.Module):
    """Causal attention over the batch."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)[0]


class Unused(Net):
    def forward(self, x):
        return F.relu(self.first(x))[:, :10]


class ReadsWeights(Net):
    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.first.weight)), self.head.weight)


# As where activations are quantised by one scale for all, which no gradient goes through.
SCALES = ByFunction(lambda module, x: x / x.detach().abs().amax())
MIXES = {  # what is done between the layers
    "random": lambda module, x: F.dropout(x, 0.5, module.training),
    "batch mean": lambda module, x: x - x.mean(0),
    "buffer": remembers,
    "new buffer": remembers_anew,
    "forward": lambda module, x: x.cumsum(0) / 4,
    "backward": lambda module, x: x.flip(0).cumsum(0).flip(0) / 4,
    "by the first": lambda module, x: x - (x - x[:1]).detach().round() / 8,
    "by the last": lambda module, x: x - (x - x[-1:]).detach().round() / 8,
}
FEW = {"forward": 2, "backward": 2, "by the first": 2, "by the last": 2}
TOUCHING = {name: (lambda mix=mix: Net(ByFunction(mix)), FEW.get(name, 4)) for name, mix in MIXES.items()} | {
    "lstm": (lambda: Net(Carries()), 3),
    "attention": (lambda: Net(LooksBack()), 4),
    "scale": (lambda: Net(SCALES), 4),
    "position first": (PositionFirst, 4),
    "unused": (lambda: Unused(nn.Identity()), 4),
    "odd rows": (PositionFirst, 3),
    "reads weights": (lambda: ReadsWeights(nn.Identity()), 4),
}
REASONS = {
    "odd rows": "given 8 rows, not the examples of 3 trials",
    "reads weights": "reads the weight",
    "unused": "Layer 'head' takes no part",
    **dict.fromkeys(("random", "buffer", "new buffer"), "draws at random or changes a buffer"),
    **dict.fromkeys(("by the first", "by the last", "scale"), "changes with the examples of the others"),
}


@pytest.mark.parametrize("case", TOUCHING)
def test_a_model_that_lets_trials_touch_is_found_out_before_training(case):
    make, trials = TOUCHING[case]
    model, task, runs = make(), pictures(), RUNS[:trials]
    before, random = facts(model), torch.get_rng_state()
    assert all(refusal(model, task, Trial(*run, **OPTIONS)) is None for run in runs)
    with pytest.raises(PackingError, match=REASONS.get(case, "In layer .* reach another's loss")):
        pack(model, task, runs, **OPTIONS)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_trials_of_one_order_that_share_a_scale_are_found_out_too():
    runs = [Run(LoRA(rank=2, targets=["first"]), lr=1e-3, seed=0) for _ in range(3)]
    with pytest.raises(PackingError, match="changes with the examples of the others"):
        pack(Net(SCALES), pictures(), runs, **OPTIONS)
    early = nn.Sequential(SCALES, DigitsMLP(width=16))  # below all adapters
    with pytest.raises(PackingError, match="changes with the examples of the others"):
        pack(early, pictures())


def test_trying_out_changes_no_number_of_the_run(monkeypatch):
    model, task = DigitsMLP(width=16), pictures()
    with_it = pack(model, task)
    monkeypatch.setattr(packed, "_check_independence", lambda *_: None)
    assert all(map(same_bits, with_it, pack(model, task)))


def test_a_harmless_function_is_not_found_fault_with():
    harmless = ByFunction(lambda module, x: x - x.mean(1, keepdim=True) + module.average)
    results = pack(Net(harmless), pictures())
    assert all(moved(result) > 1e-3 for result in results)


# Shares, and the loss in slices


@pytest.mark.parametrize("head", ["linear", "blocks", "half precision", "blocks in half precision", "adapted"])
def test_the_logits_of_a_pack_never_exist_whole_where_the_loss_can_be_sliced(tiny_config, monkeypatch, head):
    model, task, options = (
        Llama(replace(tiny_config, tie_word_embeddings=False), seed=3),
        sentences(),
        {"steps": 3, "batch_size": 4},
    )
    whole, slices, token_losses = [], [], packed.token_losses

    def sliced(hidden, targets, head, rows):
        slices.append(rows)
        return token_losses(hidden, targets, head, rows)

    monkeypatch.setattr(packed, "_LOSS_ROWS", 7)  # of 3 x 4 x 6 tokens
    monkeypatch.setattr(packed, "token_losses", sliced)
    method = LoRA(2, targets=["q_proj", "lm_head"] if head == "adapted" else ["q_proj"])
    if "blocks" in head:
        weight = model.lm_head.weight
        model.lm_head = BlockLinear(nf4(weight, double=False)[0], "NF4", weight.shape)
    if "half precision" in head:
        model.bfloat16()
    runs = [Run(method, 1e-2, seed) for seed in range(3)]
    alone = [separate(model, task, run, **options) for run in runs]
    model.lm_head.register_forward_hook(lambda module, inputs, output: whole.append(output.shape))
    results = pack(model, task, runs, **options)
    for result, expected in zip(results, alone, strict=True):
        assert_as_separate(result, *expected, rtol=0.02 if "half precision" in head else 1e-4)
    assert bool(whole) == (head not in ("linear", "blocks"))
    assert set(slices) == (set() if "half precision" in head else {7})  # an adapted head is plain before training


@pytest.mark.parametrize(("rank", "first"), [(8, [8, 1]), (9, [9])])
def test_shares_count_the_frozen_weight_twice_and_the_adapter_three_times(rank, first):
    """One layer of 8 x 8: a run costs 2 * 64 + 3 * rank * 16, so four of rank 1 cost 704 and the large one 128 + 48 r.

    The half of all is nearer to the end of the second run than to that of the first if 128 + 48 r < 3 * 176 = 528.
    """
    runs = [Run(LoRA(rank), 1e-2), *(Run(LoRA(1), 1e-2, seed) for seed in range(4))]
    found = share_work(nn.Sequential(nn.Linear(8, 8)), runs, 2, 20)
    assert [run.method.rank for run in found[0]] == first


def test_no_share_is_empty_or_too_large():
    draw, model = random.Random(0), DigitsMLP(width=16)
    for _ in range(300):
        n = draw.randint(1, 14)
        runs = [Run(LoRA(draw.choice([1, 1, 2, 8, 64])), 1e-2, seed) for seed in range(n)]
        count = draw.randint(1, n)
        most = draw.randint(-(-n // count), n)
        found = share_work(model, runs, count, most)
        assert len(found) == count
        assert all(1 <= len(share) <= most for share in found)
        assert sorted(run.seed for share in found for run in share) == list(range(n))
