"""fit: against an AdamW written out by hand, and what it promises on seeds, modes, schedules and errors."""

import copy
import dataclasses
import io
import itertools
import json
import math
import os
import random
import re
import sys
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab import (
    ContinueLoRA,
    DoRA,
    FullFineTuning,
    History,
    Lean,
    Llama,
    LoRA,
    LoRAConfig,
    LoRAPlus,
    PartialFineTuning,
    PiSSA,
    adapter_state,
    checkpoint,
    evaluate,
    fit,
    inject,
    load_adapter,
    merge,
    save_adapter,
    seed_everything,
    train,
)
from lora_lab.ablation import Grid
from lora_lab.adapters import switch
from lora_lab.history import COLUMNS, DivergedError
from lora_lab.methods import AsItIs
from lora_lab.models.digits import DigitsMLP
from lora_lab.task import mean_cross_entropy
from lora_lab.tasks import IGNORE, Examples, Task, cross_entropy, digits, mean_squared_error, planted
from lora_lab.tasks.instruction import Padded
from lora_lab.train import (
    DataOrder,
    LengthOrder,
    TrainConfig,
    TrainingStep,
    enable_checkpointing,
    make_step,
)
from tests.helpers import Stopped, small_task, snapshot


def examples(n, features, classes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, features, generator=generator, dtype=dtype)
    return Examples(inputs, torch.randint(0, classes, (n,), generator=generator))


def double_cross_entropy(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), ignore_index=IGNORE)


def losses(history):
    return [(row["train_loss"], row["validation_loss"], row["off_domain_loss"]) for row in history.rows]


def run(method=None, model=None, task=None, **options):
    model = DigitsMLP(width=16) if model is None else model
    options = {"steps": 6, "lr": 0.01, "batch_size": 4} | options
    return model, fit(model, task or small_task(), method or FullFineTuning(), **options)


# Repeatability


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(rank=2, dropout=0.3)], ids=["full", "lora"])
def test_same_seed_same_losses_bit_for_bit_and_another_seed_others(method):
    (first, history), (again, twin), (_, other) = (run(method, seed=seed) for seed in (5, 5, 6))
    assert losses(history) == losses(twin)
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert losses(history)[1:] != losses(other)[1:]
    assert losses(history)[0] == losses(other)[0]  # the same model before training


def test_result_does_not_depend_on_the_global_generators():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        results.append(losses(run(LoRA(rank=2, dropout=0.3))[1]))
    assert results[0] == results[1]


def test_fit_leaves_all_global_generators_as_they_were():
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    run(LoRA(rank=2, dropout=0.3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_generators_are_put_back_after_an_error_too():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(DivergedError):
        run(lr=1e30, warmup=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_really_drawn():
    plain, dropped = (losses(run(LoRA(rank=2, dropout=p))[1]) for p in (0.0, 0.5))
    assert plain[0] == dropped[0]
    assert plain[2:] != dropped[2:]


@pytest.mark.parametrize("training", [True, False])
def test_model_trains_in_train_mode_is_evaluated_in_eval_mode_and_ends_as_it_came(training):
    seen = []

    def loss(model, inputs, targets):
        seen.append((model.training, model.hidden1.training, torch.is_grad_enabled()))
        return F.cross_entropy(model(inputs), targets)

    model = DigitsMLP(width=16).train(training)
    fit(model, small_task(loss=loss), FullFineTuning(), steps=1, lr=0.01, batch_size=8)
    evaluation, step = (False, False, False), (True, True, True)
    assert seen == [evaluation, evaluation, step, evaluation, evaluation]
    assert model.training is model.hidden1.training is training


def test_model_ends_as_it_came_after_an_error_too():
    model = DigitsMLP(width=16).eval()
    with pytest.raises(DivergedError):
        run(model=model, lr=1e30, warmup=0)
    assert model.training is False


def test_every_epoch_sees_each_example_once_in_an_order_of_its_own():
    def orders(seed):
        seen = []

        def loss(model, inputs, targets):
            if torch.is_grad_enabled():
                seen.extend(inputs[:, 0].tolist())
            return F.cross_entropy(model(inputs), targets)

        run(task=small_task(n_train=10, loss=loss), steps=8, batch_size=4, seed=seed)  # 32 examples: 3 epochs and 2
        return [seen[i : i + 10] for i in range(0, 30, 10)]

    first = orders(0)
    everything = sorted(small_task(n_train=10).train.inputs[:, 0].tolist())
    assert all(sorted(epoch) == everything for epoch in first)
    assert len({tuple(epoch) for epoch in (*first, *orders(1))}) == 6
    assert orders(0) == first


# Batches by length


def unequal_task(n=27, loss=None):
    """Rows of 1 to 20 tokens, of which the last few count; the first token is the row's number."""
    parts = {}
    for seed, (part, count) in enumerate({"train": n, "validation": 9, "test": 7, "off_domain": 6}.items()):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 21, (count,), generator=generator)
        inputs = torch.randint(0, 11, (count, 20), generator=generator)
        targets = torch.randint(0, 11, (count, 20), generator=generator)
        for row, length in enumerate(lengths.tolist()):
            targets[row, length:] = IGNORE
            targets[row, : max(0, length - 3)] = IGNORE
        parts[part] = Padded(inputs, targets)
    return Task("unequal", **parts, loss=loss or double_cross_entropy, unit="tokens")


def spread_of(batches, lengths):
    """The mean over batches of the difference between the longest and the shortest example."""
    return sum(int(lengths[batch].max() - lengths[batch].min()) for batch in batches) / len(batches)


@pytest.mark.parametrize(("n", "batch_size"), [(1000, 8), (997, 8), (27, 4), (8, 8), (5, 8), (3, 10), (1, 1), (7, 1)])
def test_an_epoch_by_length_has_each_example_once_and_batches_of_similar_length(n, batch_size):
    lengths = torch.randint(1, 200, (n,), generator=torch.Generator().manual_seed(0))
    order = LengthOrder(lengths, 3, batch_size)
    epochs = order.rows(0, 6 * n).view(6, n)
    assert (epochs.sort(1).values == torch.arange(n)).all()
    if n > batch_size:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 6
    if n < 900:
        return
    batches = epochs.flatten().split(batch_size)  # as steps take them, over the ends of epochs
    at_random = DataOrder(n, 3).rows(0, 6 * n).split(batch_size)
    assert spread_of(batches, lengths) < 0.1 * spread_of(at_random, lengths)
    first = epochs[0].split(batch_size)
    means = torch.stack([lengths[batch].float().mean() for batch in first[: n // batch_size]])
    assert abs(float(torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1])) < 0.25  # in random order
    assert {tuple(sorted(batch.tolist())) for batch in first}.isdisjoint(
        tuple(sorted(batch.tolist())) for batch in epochs[1].split(batch_size)
    )  # other batches in each epoch, not only in another order


def test_the_batch_at_the_end_of_an_epoch_holds_examples_of_similar_length_too():
    n, batch_size = 205, 8  # 205 = 25 * 8 + 5
    lengths = torch.arange(1, n + 1)
    order = LengthOrder(lengths, 0, batch_size)
    over_the_end = order.rows(25 * batch_size, batch_size)
    assert int(lengths[over_the_end].min()) > 0.75 * n
    assert int(lengths[order.rows(0, 25 * batch_size)].min()) == 1


def test_the_order_by_length_depends_on_seed_and_position_alone():
    lengths = torch.randint(1, 200, (53,), generator=torch.Generator().manual_seed(0))
    whole = LengthOrder(lengths, 4, 8).rows(0, 300)
    for start, count in ((0, 8), (48, 8), (100, 120), (8, 8), (299, 1)):
        assert torch.equal(LengthOrder(lengths, 4, 8).rows(start, count), whole[start : start + count])
    jumping = LengthOrder(lengths, 4, 8)
    for start in (200, 0, 56, 120):
        assert torch.equal(jumping.rows(start, 8), whole[start : start + 8])
    assert not torch.equal(LengthOrder(lengths, 5, 8).rows(0, 300), whole)
    assert not torch.equal(DataOrder(53, 4).rows(0, 300), whole)


def by_length(folder=None, loss=None, **options):
    model = Tokens()
    options = {"steps": 9, "lr": 0.02, "batch_size": 4, "eval_every": 3, "batches": "by_length"} | options
    return model, fit(model, unequal_task(loss=loss), FullFineTuning(), checkpoint_dir=folder, **options)


def test_a_run_by_length_takes_the_batches_of_its_order_and_cuts_them():
    columns = {}
    for batches in ("random", "by_length"):
        shapes = []

        def loss(model, inputs, targets, shapes=shapes):
            if torch.is_grad_enabled():
                shapes.append(tuple(inputs.shape))
            return double_cross_entropy(model, inputs, targets)

        by_length(loss=loss, batches=batches, steps=27)  # four epochs
        columns[batches] = sum(rows * length for rows, length in shapes)
    task = unequal_task()
    order = LengthOrder(task.train.lengths, 0, 4)
    expected = [order.rows(4 * step, 4) for step in range(27)]
    assert columns["by_length"] == sum(4 * int(task.train.lengths[batch].max()) for batch in expected)
    assert columns["by_length"] < 0.8 * columns["random"]


@pytest.mark.parametrize("step", [1, 4, 7, 8])
def test_a_run_by_length_resumes_bit_for_bit(tmp_path, step):
    calls = []

    def stops(model, inputs, targets):
        calls.append(torch.is_grad_enabled())
        if calls.count(True) == step:
            raise Stopped
        return double_cross_entropy(model, inputs, targets)

    stops.__name__ = double_cross_entropy.__name__  # a task's fingerprint has the name in it
    whole, history = by_length()
    with pytest.raises(Stopped):
        by_length(tmp_path, stops, checkpoint_every=2)
    model, resumed = by_length(tmp_path, checkpoint_every=2)
    assert losses(resumed) == losses(history)
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))


def test_a_run_by_length_does_not_go_on_from_one_at_random(tmp_path):
    by_length(tmp_path, batches="random", steps=3)
    with pytest.raises(ValueError, match=r"its settings\.batches is None, not 'by_length'; use another folder"):
        by_length(tmp_path, steps=3)


def test_batches_are_recorded_only_if_they_are_not_random():
    (_, plain), (_, again), (_, other) = by_length(batches="random"), by_length(batches="random"), by_length()
    assert "batches" not in plain.settings
    assert other.settings == {**plain.settings, "batches": "by_length"}
    assert losses(plain) == losses(again)
    assert losses(other)[0] == (None, *(pytest.approx(loss, rel=1e-12) for loss in losses(plain)[0][1:]))
    assert losses(other)[1] != losses(plain)[1]


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulation_changes_no_result_by_length_either(accumulate):
    (model, history), (twin, again) = by_length(clip=0.5), by_length(clip=0.5, accumulate=accumulate)
    for name in ("train_loss", "grad_norm", "validation_loss", "tokens"):
        assert history.curve(name)[1] == pytest.approx(again.curve(name)[1], rel=1e-10)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("limit", [None, 5])
def test_an_evaluation_by_length_has_the_same_mean_on_fewer_columns(limit):
    means, columns = [], []
    for sorted_by_length in (False, True):
        shapes = []

        def loss(model, inputs, targets, shapes=shapes):
            shapes.append(inputs.numel())
            return double_cross_entropy(model, inputs, targets)

        task = unequal_task(loss=loss)
        means.append(evaluate(Tokens(), task, "train", 4, limit, by_length=sorted_by_length))
        columns.append(sum(shapes))
    assert means[0] == pytest.approx(means[1], rel=1e-12)
    assert columns[1] < columns[0]
    assert means[0] != pytest.approx(evaluate(Tokens(), unequal_task(), "test"), rel=1e-3)
    same_lengths = small_task()
    assert evaluate(DigitsMLP(), same_lengths) == evaluate(DigitsMLP(), same_lengths, by_length=True)


def test_batches_by_length_of_examples_of_one_length_are_refused_before_the_model_is_changed():
    model = DigitsMLP(width=16)
    before = snapshot(model)
    with pytest.raises(ValueError, match="all training examples of task 'small' have the same length; use batches="):
        run(LoRA(rank=2), model=model, batches="by_length")
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="batches is 'longest', but it must be 'random' or 'by_length'"):
        run(batches="longest")


# The numbers


def adamw_by_hand(model, task, steps, peak, warmup, schedule, decay, clip):
    """AdamW over the whole training part at once, as Loshchilov and Hutter write it, in plain tensors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    first, second = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    rows = []
    for t in range(1, steps + 1):
        if t <= warmup:
            lr = peak * t / warmup
        else:
            done = (t - 1 - warmup) / (steps - warmup)
            lr = peak * (1 if schedule == "constant" else (1 + math.cos(math.pi * done)) / 2)
        loss = task.loss(model, task.train.inputs, task.train.targets)
        gradients = torch.autograd.grad(loss, trained)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for p, g, m, v in zip(trained, gradients, first, second, strict=True):
                g = g * factor
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g * g)
                p -= lr * decay * p
                p -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        rows.append((loss.item(), norm, lr))
    return rows


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (FullFineTuning(), {"schedule": "cosine", "warmup": 3, "weight_decay": 0.0, "clip": 1.0}),
        (FullFineTuning(), {"schedule": "cosine", "warmup": 3, "weight_decay": 0.1, "clip": 0.2}),
        (LoRA(rank=2, alpha=6), {"schedule": "cosine", "warmup": 0, "weight_decay": 0.1, "clip": 0.05}),
        (LoRA(rank=2, alpha=6), {"schedule": "constant", "warmup": 4, "weight_decay": 0.0, "clip": None}),
        (PartialFineTuning(("head",)), {"schedule": "cosine", "warmup": 10, "weight_decay": 0.5, "clip": None}),
    ],
    ids=["full", "full, clipped and decayed", "lora, clipped and decayed", "lora, constant", "partial, warm-up only"],
)
def test_trajectory_equals_adamw_written_by_hand(method, options):
    task = small_task(dtype=torch.float64, loss=double_cross_entropy)
    ours, reference = DigitsMLP(width=16).double(), DigitsMLP(width=16).double()
    start = copy.deepcopy(ours.state_dict())
    history = fit(ours, task, method, steps=10, lr=0.02, batch_size=12, seed=4, **options)
    method.prepare(reference, seed=4)
    expected = adamw_by_hand(
        reference,
        task,
        10,
        0.02,
        options["warmup"],
        options["schedule"],
        options["weight_decay"],
        options["clip"],
    )
    found = [(row["train_loss"], row["grad_norm"], row["lr"]) for row in history.rows[1:]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=0, atol=1e-12)
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert all((ours.get_parameter(name) - start[name]).abs().max() > 1e-3 for name in trained & start.keys())
    if options["clip"]:
        assert (max(norm for _, norm, _ in expected) > options["clip"]) is (options["clip"] < 1)


def test_weight_decay_pulls_an_adapter_towards_the_pre_trained_weights():
    def update(decay):
        model, _ = run(LoRA(rank=2), steps=40, weight_decay=decay, schedule="constant")
        return float(model.hidden1.delta().norm())

    assert 0 < update(5.0) < 0.9 * update(0.0)


def linear_step(clip, weights=(1.0,), batches=None):
    """One step of plain gradient descent at rate 1, so that the weights move by the gradient."""
    model = nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(0.1)
    before = [p.detach().clone() for p in model.parameters()]
    inputs = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    targets = torch.zeros(2, 2, dtype=torch.float64)
    batches = batches or [(inputs, targets)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss, norm = TrainingStep(model, mean_squared_error, optimizer, clip)(batches, weights)
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    return loss.item(), norm.item(), float(moved.norm())


def test_a_step_clips_the_gradient_to_the_norm_and_none_leaves_it():
    # h = (3.1, 3.1) and (1.1, 1.1); the loss is the mean of their squares; dW = mean over 4 of 2 h x.
    expected_loss = (3.1**2 + 1.1**2) / 2
    row = [(3.1 * a + 1.1 * b) / 2 for a, b in [(1, 0), (2, 1), (3, 1), (1, 1)]]
    expected_norm = math.sqrt(2 * sum(value**2 for value in row))
    for clip, moves in ((None, expected_norm), (100.0, expected_norm), (0.5, 0.5), (0.01, 0.01)):
        loss, norm, moved = linear_step(clip)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert norm == pytest.approx(expected_norm, rel=1e-12)  # as it was before clipping
        assert moved == pytest.approx(moves, rel=1e-4 if clip == 0.01 else 1e-5)


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_whose_norm_overflows_stays_finite(clip):
    def large(*batch):
        return cross_entropy(*batch) * (1e25 if torch.is_grad_enabled() else 1.0)

    model, history = run(task=small_task(loss=large), clip=clip, steps=2)
    assert [row["grad_norm"] for row in history.rows[1:]] == [math.inf] * 2
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(rank=2)], ids=lambda method: method.name)
@pytest.mark.parametrize("error", [None, "first", "second"])
def test_no_gradient_stays_on_the_model(method, error):
    calls = []

    def failing(*batch):
        loss = cross_entropy(*batch)
        if torch.is_grad_enabled():
            calls.append(None)
            if error is not None and len(calls) == (1 if error == "first" else 2):
                loss.backward()
                raise torch.OutOfMemoryError
        return loss

    model = DigitsMLP(width=16)
    with nullcontext() if error is None else pytest.raises(torch.OutOfMemoryError):
        run(method, model, small_task(loss=failing))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_sums_the_gradients_of_its_micro_batches_by_weight():
    batches = [
        (torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)),
        (torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)),
    ]
    assert linear_step(None, (0.5, 0.5), batches) == pytest.approx(linear_step(None), rel=1e-12)
    assert linear_step(None, (0.9, 0.1), batches) != pytest.approx(linear_step(None), rel=1e-2)


class Tokens(nn.Module):
    """Predicts the next token from the present one, in float64."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        generator = torch.Generator().manual_seed(0)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, ids):
        return self.head(self.words(ids))


def token_task(empty_row=False, loss=double_cross_entropy):
    """Six rows of seven tokens, of which 1 to 6 count (in ``empty_row``, the first counts none)."""
    ids = torch.randint(0, 11, (6, 7), generator=torch.Generator().manual_seed(2))
    targets = ids.roll(-1, dims=1)
    for row in range(6):
        targets[row, row + 1 :] = IGNORE
    if empty_row:
        targets[0] = IGNORE
    part = Examples(ids, targets)
    return Task("tokens", part, part, part, part, loss, unit="tokens")


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(rank=2, alpha=3)], ids=["full", "lora"])
@pytest.mark.parametrize("accumulate", [2, 3, 5, 6])
def test_accumulation_changes_no_result_although_micro_batches_count_unequally(method, accumulate):
    results = []
    for k in (1, accumulate):
        model = Tokens()
        history = fit(model, token_task(), method, steps=6, lr=0.05, batch_size=6, accumulate=k, clip=0.5)
        results.append((model.state_dict(), [(row["train_loss"] or 0, row["tokens"]) for row in history.rows]))
    (state, rows), (accumulated, rows_accumulated) = results
    np.testing.assert_allclose(rows, rows_accumulated, rtol=0, atol=1e-10)
    assert rows[1][1] == 1 + 2 + 3 + 4 + 5 + 6
    for name, value in state.items():
        torch.testing.assert_close(value, accumulated[name], rtol=0, atol=1e-10)
    trained = "head.weight" if method.name == "full" else "head.lora_B"
    assert (state[trained] - Tokens().state_dict().get(trained, torch.zeros(()))).abs().max() > 1e-2


def test_accumulation_really_computes_in_micro_batches():
    sizes = []

    def loss(model, inputs, targets):
        if torch.is_grad_enabled():
            sizes.append(len(inputs))
        return double_cross_entropy(model, inputs, targets)

    fit(Tokens(), token_task(loss=loss), FullFineTuning(), steps=1, lr=0.05, batch_size=5, accumulate=2)
    assert sizes == [3, 2]


@pytest.mark.parametrize("accumulate", [2, 6])
def test_a_micro_batch_without_a_counted_target_changes_no_result(accumulate):
    results = []
    for k in (1, accumulate):
        model = Tokens()
        fit(model, token_task(empty_row=True), FullFineTuning(), steps=3, lr=0.05, batch_size=6, accumulate=k)
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-10)


def test_a_batch_without_any_counted_target_is_told_before_the_first_step():
    task, rows, model = token_task(), [], Tokens()
    options = {"lr": 0.05, "batch_size": 2, "on_row": rows.append}
    task.train.targets[DataOrder(len(task.train), 0).rows(2, 2)] = IGNORE
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"^No target of the batch at step 2 \(seed 0\) counts in the loss; remove the training examples in which "
        r"none counts, 2 of 6 in task 'tokens', or use larger batches\.$",
    ):
        fit(model, task, FullFineTuning(), steps=3, **options)
    assert (snapshot(model), rows) == (before, [])
    fit(model, task, FullFineTuning(), steps=1, **options)  # the second batch is not reached


def rates_of(steps, warmup, schedule):
    config = TrainConfig(steps=steps, lr=1.0, warmup=warmup, schedule=schedule)
    return [config.rate_factor(step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_rises_in_a_line_and_then_falls_or_stays(schedule):
    rates = rates_of(20, 4, schedule)
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    if schedule == "constant":
        assert rates[4:] == [1.0] * 16
    else:
        assert rates[12] == pytest.approx(0.5)  # half of the way down
        assert all(a > b for a, b in itertools.pairwise(rates[4:]))
        assert 0 < rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 0), (5, 5)])
def test_learning_rate_is_positive_and_at_most_the_peak_at_the_ends(schedule, steps, warmup):
    rates = rates_of(steps, warmup, schedule)
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1.0


def test_warm_up_is_a_tenth_of_the_steps_unless_told():
    _, history = run(steps=20, lr=0.01)
    assert [row["lr"] for row in history.rows[1:4]] == pytest.approx([0.005, 0.01, 0.01])
    assert history.settings["warmup"] == 2


# evaluate


@torch.no_grad()
def test_evaluation_weighs_batches_by_the_targets_that_count():
    model, task = Tokens(), token_task()
    logits = model(task.validation.inputs)
    flat = F.cross_entropy(logits.flatten(0, 1), task.validation.targets.flatten(), reduction="none")
    counted = task.validation.targets.flatten() != IGNORE
    expected = float(flat[counted].mean())
    for batch_size in (1, 2, 4, 6, 100):
        assert evaluate(model, task, "validation", batch_size) == pytest.approx(expected, rel=1e-12)
    rows = [float(flat.view(6, 7)[i][counted.view(6, 7)[i]].mean()) for i in range(6)]
    assert sum(rows) / 6 != pytest.approx(expected, rel=1e-3)


def test_evaluation_of_a_batch_without_counted_targets_does_not_spoil_the_mean():
    model, task = Tokens(), token_task(empty_row=True)
    assert evaluate(model, task, "train", 1) == pytest.approx(evaluate(model, task, "train", 6), rel=1e-12)
    with pytest.raises(ValueError, match=r"^No target of the first 1 example of the train part of task .* counts"):
        evaluate(model, task, "train", 1, limit=1)


def test_evaluation_takes_only_as_many_examples_as_asked():
    model, task = DigitsMLP(width=16), small_task()
    first = Examples(task.test.inputs[:3], task.test.targets[:3])
    expected = float(task.loss(model, first.inputs, first.targets))
    assert evaluate(model, task, "test", batch_size=2, limit=3) == pytest.approx(expected, rel=1e-6)
    assert evaluate(model, task, "test", batch_size=2) != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_ignores_dropout_and_keeps_mode_and_gradients(training):
    model = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10)).train(training)
    results = {evaluate(model, small_task(), "validation") for _ in range(3)}
    assert len(results) == 1
    assert model.training is model[1].training is training
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_names_the_parts_there_are():
    with pytest.raises(ValueError, match=r"part is 'valid'.*\['train', 'validation', 'test', 'off_domain'\]"):
        evaluate(DigitsMLP(), small_task(), "valid")


# History


def test_history_has_a_row_for_the_model_before_training_and_one_for_each_step():
    model = DigitsMLP(width=16)
    task = small_task()
    before = {part: evaluate(model, task, part) for part in ("validation", "off_domain")}
    _, history = run(model=model, task=task, steps=7, eval_every=3, batch_size=8)
    assert [row["step"] for row in history.rows] == list(range(8))
    assert all(set(row) == set(COLUMNS) for row in history.rows)
    first = history.rows[0]
    assert (first["validation_loss"], first["off_domain_loss"]) == (before["validation"], before["off_domain"])
    assert (first["train_loss"], first["lr"], first["grad_norm"], first["tokens"]) == (None, None, None, 0)
    evaluated = [row["step"] for row in history.rows if row["validation_loss"] is not None]
    assert evaluated == [row["step"] for row in history.rows if row["off_domain_loss"] is not None] == [0, 3, 6, 7]
    assert history.rows[-1]["validation_loss"] == evaluate(model, task, "validation")
    assert all(row["seconds"] > 0 and row["tokens"] == 8 for row in history.rows[1:])


def test_history_counts_tokens_that_count():
    history = fit(Tokens(), token_task(), FullFineTuning(), steps=2, lr=0.01, batch_size=6)
    assert [row["tokens"] for row in history.rows] == [0, 21, 21]
    assert history.task["unit"] == "tokens"


def test_evaluations_are_a_tenth_of_the_steps_apart_unless_told_and_take_as_many_examples_as_asked():
    model, task = DigitsMLP(width=16), small_task()
    _, history = run(model=model, task=task, steps=20, eval_examples=3, batch_size=8)
    assert [row["step"] for row in history.rows if row["validation_loss"] is not None] == list(range(0, 21, 2))
    assert history.rows[-1]["validation_loss"] == evaluate(model, task, "validation", limit=3)
    assert history.rows[-1]["validation_loss"] != evaluate(model, task, "validation")


@pytest.mark.parametrize(("method", "trainable"), [(FullFineTuning(), 1482), (LoRA(rank=2), 2 * (80 + 32 + 26))])
def test_history_counts_parameters_and_the_optimisers_bytes(method, trainable):
    model, history = run(method)
    tensors = len([p for p in model.parameters() if p.requires_grad])
    assert history.trainable_parameters == trainable
    assert history.total_parameters == 1482 + (0 if trainable == 1482 else trainable)
    assert history.optimizer_bytes == 2 * 4 * trainable + 4 * tensors


def test_history_names_task_method_and_settings():
    task = small_task()
    _, history = run(LoRA(rank=2, targets=["head"]), task=task, seed=9, schedule="constant", clip=None)
    assert history.task == {"name": "small", "fingerprint": task.fingerprint, "unit": "examples"}
    assert history.method["rank"] == 2
    assert history.method["targets"] == ["head"]
    expected = {"steps": 6, "lr": 0.01, "seed": 9, "schedule": "constant", "clip": None, "accumulate": 1}
    assert {name: history.settings[name] for name in expected} == expected


def test_each_row_is_passed_on_when_it_is_complete_and_not_again_after_a_checkpoint(tmp_path):
    def run(on_row, **options):
        return fit(
            DigitsMLP(), small_task(), LoRA(2), steps=4, eval_every=2, batch_size=4, lr=1e-2, on_row=on_row, **options
        )

    rows = []
    history = run(lambda row: rows.append(row) or row.clear())  # a copy, with which the callback does as it likes
    assert [bool(row) for row in history.rows] == [True] * 5
    seen = []

    def stop(row):
        seen.append(row)
        if row["step"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(stop, checkpoint_dir=tmp_path)
    history = run(seen.append, checkpoint_dir=tmp_path)
    assert seen == history.rows
    assert seen[2]["validation_loss"] is not None


@pytest.mark.parametrize("disturb", [lambda _: torch.rand(3), nn.Module.eval, nn.Module.train])
def test_a_logger_that_draws_or_changes_modes_changes_no_result(disturb):
    method, model = LoRA(rank=2, dropout=0.3), DigitsMLP(width=16)
    _, expected = run(method)
    _, history = run(method, model, on_row=lambda row: disturb(model))
    assert losses(history) == losses(expected)


def test_frame_has_one_row_a_step_and_numbers_in_every_column():
    _, history = run(steps=4, eval_every=2)
    frame = history.frame()
    assert list(frame.columns) == list(COLUMNS)
    assert frame["step"].tolist() == [0, 1, 2, 3, 4]
    kinds = {name: dtype.kind for name, dtype in frame.dtypes.items()}
    assert kinds == dict.fromkeys(COLUMNS, "f") | {"step": "i", "tokens": "i"}
    assert frame["validation_loss"].notna().tolist() == [True, False, True, False, True]
    assert frame["train_loss"].tolist()[1:] == [row["train_loss"] for row in history.rows[1:]]


def test_the_gap_of_a_run_is_that_of_its_table():
    _, history = run(steps=7, eval_every=3)
    frame = history.frame().set_index("step")
    steps, gaps = history.curve("gap")
    assert steps == [3, 6, 7]
    intervals = {3: [1, 2, 3], 6: [4, 5, 6], 7: [7]}
    expected = [frame.validation_loss[end] - frame.train_loss[own].mean() for end, own in intervals.items()]
    np.testing.assert_allclose(gaps, expected, rtol=1e-12)
    assert len(set(gaps)) == 3


def test_history_comes_back_from_its_file(tmp_path):
    _, history = run(LoRA(rank=2, targets=["head"], exclude=[]))
    history.save(tmp_path / "new" / "history.json")
    assert History.load(tmp_path / "new" / "history.json") == history
    assert json.loads((tmp_path / "new" / "history.json").read_text())["rows"] == history.rows


# Errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps is 0, .*at least 1"),
        ({"steps": 2.0}, r"steps is 2\.0, .*whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"accumulate": 5}, "accumulate is 5, .*at most batch_size, 4"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"eval_every": -1}, "eval_every is -1"),
        ({"eval_examples": 0}, "eval_examples is 0"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"steps": 10**20}, "steps is 100000000000000000000, .*at most"),
        ({"batch_size": 10**20}, "batch_size is 100000000000000000000, .*at most"),
        ({"seed": 99999999999999999999}, "seed is 99999999999999999999, .*at most"),
        ({"seed": None}, "seed is None, .*whole number"),
        ({"steps": None}, "steps is None, .*whole number"),
        ({"lr": "1e-3"}, "lr is '1e-3', .*a number"),
        ({"lr": None}, "lr is None, .*a number"),
        ({"weight_decay": None}, "weight_decay is None, .*a number"),
        ({"weight_decay": math.inf}, "weight_decay is inf, .*a finite number"),
        ({"clip": "1"}, "clip is '1', .*a number"),
        ({"lean": "yes"}, "lean is 'yes', .*LeanStepMaker"),
        ({"checkpoint_every": "2"}, "checkpoint_every is '2', .*whole number"),
        ({"lr": 0.0}, r"lr is 0\.0, .*greater than 0"),
        ({"lr": -1e-3}, r"lr is -0\.001"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"schedule": "linear"}, "schedule is 'linear', .*'cosine' or 'constant'"),
        ({"warmup": -1}, "warmup is -1"),
        ({"warmup": 7}, "warmup is 7, .*at most steps, 6"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"clip": 0.0}, r"clip is 0\.0, .*greater than 0"),
        ({"clip": -1.0}, r"clip is -1\.0"),
        ({"clip": math.nan}, "clip is nan"),
    ],
)
def test_fit_says_which_number_is_out_of_range_and_leaves_the_model_alone(options, says, tmp_path):
    model = DigitsMLP(width=16)
    model.head.requires_grad_(False)
    with pytest.raises(ValueError, match=says):
        run(LoRA(), model, checkpoint_dir=tmp_path / "new", **options)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight", "head.bias"]
    run(LoRA(), model)  # it is not marked either


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": None}, "model is None, but it must be an instance of Module"),
        ({"model": "runs/model"}, "model is 'runs/model', but it must be an instance of Module"),
        ({"model": (DigitsMLP(width=16), None)}, "model is .*, but it must be an instance of Module"),
        ({"task": "digits"}, "task is 'digits', but it must be an instance of Task"),
        ({"method": "lora"}, r"method is 'lora', but it must be an instance of Method, such as LoRA\(rank=8\)\.$"),
        ({"method": LoRA}, r"method is .*, but it must be an instance of Method, such as LoRA\(rank=8\)\.$"),
        ({"config": 40}, "config is 40, but it must be an instance of TrainConfig"),
    ],
)
def test_fit_and_evaluate_name_an_argument_of_another_type(changes, says):
    arguments = {"model": DigitsMLP(width=16), "task": small_task(), "method": LoRA(2)}
    with pytest.raises(ValueError, match=f"^{says}"):
        fit(**arguments | changes, steps=1, lr=0.1)
    if changes.keys() & {"model", "task"}:
        with pytest.raises(ValueError, match=f"^{says}"):
            evaluate(**{name: (arguments | changes)[name] for name in ("model", "task")})


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor, np.array])
def test_numbers_of_numpy_and_torch_train_as_pythons_do(kind, tmp_path):
    floats = (lambda value: kind(value, dtype=kind([1.0]).dtype)) if kind in (torch.tensor, np.array) else np.float32
    whole = {"steps": 6, "batch_size": 4, "seed": 3, "eval_every": 2, "eval_examples": 5, "warmup": 2, "accumulate": 2}
    numbers = {"lr": 0.25, "weight_decay": 0.5, "clip": 2.0}  # exact in float32
    _, history = run(
        LoRA(2, alpha=floats(4.0), dropout=floats(0.25)),
        checkpoint_every=kind(2),
        checkpoint_dir=tmp_path / "a",
        **{name: kind(value) for name, value in whole.items()},
        **{name: floats(value) for name, value in numbers.items()},
    )
    _, expected = run(LoRA(2, alpha=4.0, dropout=0.25), **whole, **numbers)
    assert losses(history) == losses(expected)
    assert (history.settings, history.method) == (expected.settings, expected.method)
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json").settings == expected.settings


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": -1}, "batch_size is -1, but it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0, but it must be at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5, but it must be a whole number"),
        ({"batch_size": None}, "batch_size is None, but it must be a whole number"),
        ({"limit": 0}, "limit is 0, but it must be at least 1"),
        ({"limit": -1}, "limit is -1, but it must be at least 1"),
        ({"limit": "5"}, "limit is '5', but it must be a whole number"),
        ({"part": None}, "part is None, but it must be a string"),
    ],
)
def test_evaluate_refuses_sizes_that_gave_nan_or_left_examples_out(options, says):
    with pytest.raises(ValueError, match=rf"^{says}\.$"):
        evaluate(DigitsMLP(width=16), small_task(), **options)


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_evaluate_takes_sizes_of_numpy_and_torch(kind):
    model = DigitsMLP(width=16)
    expected = evaluate(model, small_task(), "test", 2, 3)
    assert (
        evaluate(model, small_task(), "test", kind(2), kind(3)) == expected != evaluate(model, small_task(), "test", 2)
    )


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, None, "1"])
def test_a_seed_that_not_all_generators_take_is_refused_before_any_is_seeded(seed):
    random.seed(1)
    before = random.getstate()
    with pytest.raises(ValueError, match=r"^seed is .*, but it must be"):
        seed_everything(seed)
    assert random.getstate() == before


def test_fit_refuses_a_model_that_was_trained_before():
    model, _ = run()
    with pytest.raises(ValueError, match="already been prepared for 'full'"):
        run(model=model)


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(rank=2)], ids=["full", "lora"])
def test_a_diverging_run_stops_and_names_the_step(method):
    with pytest.raises(DivergedError, match=r"loss is (nan|inf) at step [123] \(learning rate 1e\+30\).*lower the"):
        run(method, lr=1e30, warmup=0, schedule="constant")


@pytest.mark.parametrize("bad_step", [1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_at_its_step(bad_step, value):
    calls = []

    def loss(model, inputs, targets):
        if torch.is_grad_enabled():
            calls.append(None)
        return F.cross_entropy(model(inputs), targets) * (value if len(calls) == bad_step else 1.0)

    with pytest.raises(DivergedError, match=f"loss is {value} at step {bad_step} "):
        run(task=small_task(loss=loss), eval_every=100)
    assert len(calls) == bad_step


def test_a_last_step_that_spoils_the_weights_is_not_reported_as_a_result():
    with pytest.raises(DivergedError, match="at step 1 "):
        run(steps=1, lr=1e38, warmup=0)


@pytest.mark.parametrize("spoilt", ["model", "task"])
def test_a_loss_that_is_no_number_before_training_is_not_put_down_to_the_learning_rate(spoilt):
    model, task = DigitsMLP(width=16), small_task()
    with torch.no_grad():
        (model.head.bias if spoilt == "model" else task.validation.inputs)[0] = math.nan
    with pytest.raises(
        DivergedError, match=r"^The validation loss is nan at step 0 \(before training\), so no learning rate .*weights"
    ):
        run(LoRA(rank=2), model, task)


def test_a_run_stores_no_checkpoint_of_weights_that_its_evaluation_found_spoilt(tmp_path):
    with pytest.raises(DivergedError):
        run(lr=1e38, warmup=0, eval_every=1, checkpoint_dir=tmp_path)
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_run_stores_no_checkpoint_of_weights_that_are_no_numbers(tmp_path):
    def loss(model, inputs, targets):  # finite itself, but its gradient is not
        return F.cross_entropy(model(inputs), targets) + (model.head.bias * 0).sqrt().sum()

    with pytest.raises(DivergedError, match=r"^The parameter 'hidden1\.weight' is nan at step 1 "):
        run(task=small_task(loss=loss), eval_every=100, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert not list(tmp_path.glob("checkpoint*"))


# A step reads no tensor's value


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(rank=3, dropout=0.1)], ids=["full", "lora"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_training_step_runs_on_tensors_that_have_no_values(tiny_config, method, fused):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    task_loss = token_task().loss
    with FakeTensorMode():
        model = Llama(tiny_config)
        method.prepare(model, seed=0)
        optimizer = torch.optim.AdamW(method.groups(model), lr=1e-3, fused=fused)
        ids = torch.zeros(2, 5, dtype=torch.long)
        loss, norm = TrainingStep(model, task_loss, optimizer, 1.0)([(ids, ids), (ids, ids)], [0.5, 0.5])
    assert isinstance(loss, FakeTensor)
    assert isinstance(norm, FakeTensor)
    assert loss.shape == norm.shape == ()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == (len(list(model.parameters())) if method.name == "full" else 2 * 14)
    for parameter in trainable:
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert isinstance(parameter.grad, FakeTensor)


def test_gradients_are_clipped_in_one_pass_where_there_are_numbers_and_where_they_are_rehearsed(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    asked, clip = [], nn.utils.clip_grad_norm_

    def noted(parameters, largest, foreach):
        asked.append(foreach)
        return clip(parameters, largest, foreach=foreach)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", noted)

    def step(device):
        model, pixels = DigitsMLP(width=16), torch.zeros(2, 64, device=device)
        if device == "meta":
            model.to(device)
        targets = torch.zeros(2, dtype=torch.long, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        TrainingStep(model, cross_entropy, optimizer, 1.0)([(pixels, targets)], [1.0])

    step("cpu")
    with FakeTensorMode():
        step("cpu")
    step("meta")
    assert asked == [True, True, None]


# Learning


def test_lora_finds_a_planted_update_if_its_rank_is_high_enough():
    model = DigitsMLP(width=32)
    task = planted(model, rank=4, noise=0.05)
    final = {}
    for rank in (1, 4):
        student = copy.deepcopy(model)
        history = fit(student, task, LoRA(rank=rank, alpha=2 * rank), steps=200, lr=0.01, batch_size=32, eval_every=200)
        final[rank] = history.rows[-1]["validation_loss"]
        assert final[rank] < history.rows[0]["validation_loss"]
    assert final[4] < 0.3 * final[1]


def test_full_fine_tuning_learns_the_digits():
    model, task = DigitsMLP(width=64), digits("pretrain")
    before = float((model(task.test.inputs).argmax(dim=1) == task.test.targets).float().mean())
    history = fit(model, task, FullFineTuning(), steps=250, lr=3e-3, batch_size=32, eval_every=250)
    accuracy = float((model(task.test.inputs).argmax(dim=1) == task.test.targets).float().mean())
    assert before < 0.4
    assert accuracy > 0.9
    assert history.best_step == 250


# The progress bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("progress", "watched", "variable", "shown"),
    [
        (True, False, "0", True),
        (True, True, "0", True),
        (False, True, None, False),
        (None, True, None, True),
        (None, True, "0", False),
        (None, False, None, False),
    ],
)
def test_a_bar_is_shown_on_request_or_to_somebody_who_looks(monkeypatch, progress, watched, variable, shown):
    stream = Terminal() if watched else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.delenv("LORA_LAB_PROGRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("LORA_LAB_PROGRESS", variable)
    run(LoRA(rank=1), steps=2, progress=progress)
    if shown:
        assert "lora" in stream.getvalue()
        assert "/2" in stream.getvalue()
        assert "loss " in stream.getvalue()
    else:
        assert stream.getvalue() == ""


# The step by itself


def test_fit_repeats_the_step_that_make_step_makes():
    task = small_task(n_train=4)
    fitted, history = run(LoRA(2, dropout=0.2), task=task, steps=3, schedule="constant", warmup=0, clip=0.1)
    model = DigitsMLP(width=16)
    step = make_step(model.train(), task.loss, LoRA(2, dropout=0.2), TrainConfig(steps=3, lr=0.01, clip=0.1))
    assert isinstance(step, TrainingStep)
    rows = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for at in range(3):
            order = torch.randperm(4, generator=torch.Generator().manual_seed(1_000_003 * at))
            rows.append(
                [float(number) for number in step([(task.train.inputs[order], task.train.targets[order])], [1.0])]
            )
    assert rows == [[row["train_loss"], row["grad_norm"]] for row in history.rows[1:]]
    assert all(map(torch.equal, model.parameters(), fitted.parameters()))


def test_make_step_hands_rates_and_decay_to_the_optimiser():
    config = TrainConfig(steps=1, lr=0.5, weight_decay=0.25, clip=None)
    step = make_step(DigitsMLP(), cross_entropy, LoRAPlus(2, ratio=4.0), config)
    assert [(group["lr"], group["weight_decay"]) for group in step.optimizer.param_groups] == [(0.5, 0.25), (2.0, 0.25)]
    assert (step.clip, step.threads, step.loss) == (None, 1, cross_entropy)
    configs = [TrainConfig(steps=1, lr=0.5, seed=seed) for seed in (0, 0, 1)]
    seeds = [make_step(DigitsMLP(), cross_entropy, LoRA(2), config).model for config in configs]
    assert torch.equal(seeds[0].head.lora_A, seeds[1].head.lora_A)
    assert not torch.equal(seeds[0].head.lora_A, seeds[2].head.lora_A)


def test_make_step_makes_a_lean_step(tiny_config):
    ids = torch.randint(0, 260, (2, 8), generator=torch.Generator().manual_seed(1))
    steps = [
        make_step(Llama(tiny_config), cross_entropy, LoRA(2), TrainConfig(steps=1, lr=0.1, lean=lean))
        for lean in (None, Lean(loss_rows=3), Lean(threads=2))
    ]
    assert [step.threads for step in steps] == [1, 1, 2]
    assert [step.loss.keywords for step in steps[1:]] == [{"rows": 3}, {"rows": 256}]
    halves = [(ids[:1], ids[:1]), (ids[1:], ids[1:])], [0.5, 0.5]
    found = [float(step(*halves)[0]) for step in steps]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


# Checkpointing


BF16 = torch.bfloat16


def llama_task(loss=cross_entropy):
    ids = torch.randint(0, 260, (9, 10), generator=torch.Generator().manual_seed(2))
    rows = Examples(ids[:, :-1], ids[:, 1:])
    return Task("text", rows[:6], rows[6:7], rows[7:8], rows[8:], loss=loss, unit="tokens")


def fit_llama(config, method, folder=None, dtype=torch.float32, **options):
    model = Llama(config).to(dtype)
    options = {"steps": 4, "lr": 0.01, "batch_size": 3, "eval_every": 2} | options
    loss = cross_entropy if dtype == torch.float32 else double_cross_entropy
    return model, fit(model, llama_task(loss), method, checkpoint_dir=folder, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [LoRA(2, dropout=0.3), FullFineTuning()], ids=["lora with dropout", "full"])
def test_checkpointing_changes_no_result(tiny_config, method, dtype):
    (plain, history), (model, again) = (
        fit_llama(tiny_config, method, dtype=dtype, accumulate=2, gradient_checkpointing=on) for on in (False, True)
    )
    assert losses(history) == losses(again)
    assert [row["grad_norm"] for row in history.rows] == [row["grad_norm"] for row in again.rows]
    assert all(map(torch.equal, plain.state_dict().values(), model.state_dict().values()))
    assert losses(history)[1] != losses(history)[2]
    assert history.optimizer_bytes == again.optimizer_bytes


def test_checkpointing_is_recorded_where_it_is_on_only(tiny_config):
    (_, plain), (_, again) = (
        fit_llama(tiny_config, LoRA(2), steps=1, gradient_checkpointing=on) for on in (False, True)
    )
    assert again.settings == {**plain.settings, "gradient_checkpointing": True}
    assert "gradient_checkpointing" not in plain.settings


def test_a_run_goes_on_from_a_checkpoint_of_before_there_was_checkpointing(tiny_config, tmp_path, monkeypatch):
    whole = fit_llama(tiny_config, LoRA(2))
    calls = []

    def stops(model, inputs, targets):
        calls.append(torch.is_grad_enabled())
        if calls.count(True) == 3:
            raise KeyboardInterrupt
        return cross_entropy(model, inputs, targets)

    stops.__name__ = cross_entropy.__name__  # a task's fingerprint has the name in it
    model = Llama(tiny_config)
    with pytest.raises(KeyboardInterrupt):
        fit(model, llama_task(stops), LoRA(2), steps=4, lr=0.01, batch_size=3, eval_every=2, checkpoint_dir=tmp_path)
    assert "gradient_checkpointing" not in checkpoint.stored_history(tmp_path).settings
    with pytest.raises(ValueError, match=r"its settings\.gradient_checkpointing is None, not True; use another folder"):
        fit_llama(tiny_config, LoRA(2), tmp_path, gradient_checkpointing=True)
    model, history = fit_llama(tiny_config, LoRA(2), tmp_path)
    assert losses(history) == losses(whole[1])
    assert all(map(torch.equal, model.state_dict().values(), whole[0].state_dict().values()))


@pytest.mark.parametrize("method", [LoRA(2), FullFineTuning()], ids=["lora", "full"])
def test_blocks_are_computed_again_in_steps_and_not_in_evaluation(tiny_config, method, monkeypatch):
    from lora_lab.models import llama

    calls, plain = [], llama.checkpoint
    monkeypatch.setattr(llama, "checkpoint", lambda *args, **more: calls.append(args[0]) or plain(*args, **more))
    model, _ = fit_llama(tiny_config, method, steps=3, eval_every=1, gradient_checkpointing=True)
    assert calls == list(model.model.layers) * 3  # one micro-batch a step; four evaluations of two parts
    evaluate(model.train(), llama_task())
    model.generate(torch.tensor([1, 2, 3]), 2)
    assert len(calls) == 2 * 3
    fit_llama(tiny_config, method, steps=3)
    assert len(calls) == 2 * 3


def checkpointing(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("make", ["ours", "transformers'"])
def test_checkpointing_is_switched_off_again_unless_it_was_on_before(tiny_config, tiny_hf, make, before, error):
    model, seen = Llama(tiny_config) if make == "ours" else tiny_hf(), set()
    if before:
        enable_checkpointing(model)

    def loss(model, inputs, targets):
        seen.add(checkpointing(model))
        if error and torch.is_grad_enabled():
            raise KeyboardInterrupt
        return cross_entropy(model, inputs, targets)

    with pytest.raises(KeyboardInterrupt) if error else nullcontext():
        fit(model, llama_task(loss), LoRA(2), steps=1, lr=0.1, batch_size=3, gradient_checkpointing=True)
    assert seen == {True}
    assert checkpointing(model) is before


def test_checkpointing_asks_transformers_models_in_their_own_way(tiny_hf):
    def loss(model, inputs, targets):
        seen.add(checkpointing(model))
        return model(input_ids=inputs, labels=targets).loss

    histories, seen = [], set()
    for on in (False, True):
        model = tiny_hf()
        histories.append(
            fit(model, llama_task(loss), LoRA(2), steps=2, lr=0.01, batch_size=3, gradient_checkpointing=on)
        )
        assert seen == {on}
        seen.clear()
        assert not checkpointing(model)
    found = [[loss for row in losses(history) for loss in row if loss is not None] for history in histories]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_checkpointing_is_refused_where_it_cannot_be_and_the_model_is_left_alone(tiny_config):
    model = DigitsMLP(width=16)
    with pytest.raises(
        ValueError, match=r"^A DigitsMLP has no method gradient_checkpointing_enable, as lora_lab's"
    ) as e:
        run(model=model, method=LoRA(2), gradient_checkpointing=True)
    assert str(e.value).endswith("; use gradient_checkpointing=False.")
    run(model=model, method=LoRA(2))  # it carries no mark and no adapters
    model = Llama(tiny_config)
    with pytest.raises(
        ValueError, match=r"^gradient_checkpointing cannot be combined with lean; use Lean\(checkpoint=True\)\.$"
    ):
        fit(model, llama_task(), LoRA(2), steps=1, lr=0.1, gradient_checkpointing=True, lean=Lean())
    assert not model.model.gradient_checkpointing
    fit(model, llama_task(), LoRA(2), steps=1, lr=0.1, lean=Lean(checkpoint=True))


# Autocast


def halved(model, inputs, targets):
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model, inputs, targets)


@pytest.mark.parametrize("method", [LoRA(2, dropout=0.3), DoRA(2), FullFineTuning()], ids=lambda method: method.name)
def test_autocast_is_torchs_around_the_loss_in_steps_and_evaluations(tiny_config, method):
    (_, plain), (model, found) = (fit_llama(tiny_config, method, autocast=on) for on in (None, BF16))
    by_hand = Llama(tiny_config)
    expected = fit(by_hand, llama_task(halved), method, steps=4, lr=0.01, batch_size=3, eval_every=2)
    assert losses(found) == losses(expected)
    assert all(map(torch.equal, model.state_dict().values(), by_hand.state_dict().values()))
    for ours, theirs in zip(losses(found), losses(plain), strict=True):
        assert ours != theirs  # the untrained model's too, on which it is evaluated
        assert [loss for loss in ours if loss] == pytest.approx([loss for loss in theirs if loss], abs=0.02)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert found.optimizer_bytes == plain.optimizer_bytes


def test_autocast_computes_in_half_precision(tiny_config):
    seen = []

    def loss(model, inputs, targets):
        scores = model(inputs)
        seen.append(scores.dtype)
        return mean_cross_entropy(scores, targets)

    for autocast in (None, BF16):
        fit(Llama(tiny_config), llama_task(loss), LoRA(2), steps=1, lr=0.01, batch_size=3, autocast=autocast)
    assert seen == [torch.float32] * 5 + [BF16] * 5  # two parts before and after a step


def test_autocast_is_recorded_where_it_is_on_only(tiny_config):
    (_, plain), (_, found) = (fit_llama(tiny_config, LoRA(2), steps=1, autocast=on) for on in (None, BF16))
    assert found.settings == {**plain.settings, "autocast": "torch.bfloat16"}
    assert "autocast" not in plain.settings


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "bfloat16", True])
def test_autocast_to_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=rf"autocast is {dtype!r}, but it must be torch\.bfloat16 or None\."):
        TrainConfig(steps=1, lr=0.1, autocast=dtype)


def test_autocast_is_not_for_the_lean_step():
    with pytest.raises(
        ValueError, match=r"^autocast cannot be combined with lean; use Lean\(base_dtype=torch\.bfloat16"
    ):
        TrainConfig(steps=1, lr=0.1, autocast=BF16, lean=Lean())


def test_defaults_of_a_config_follow_its_steps():
    config = TrainConfig(steps=100, lr=1e-3)
    assert (config.warmup_steps, config.evaluation_interval) == (10, 10)
    longer = dataclasses.replace(config, steps=1000)
    assert (longer.warmup_steps, longer.evaluation_interval) == (100, 100)
    assert longer.settings()["warmup"] == longer.settings()["eval_every"] == 100
    assert dataclasses.replace(config, steps=5).warmup_steps == 0


def test_keywords_override_a_config():
    model, task = DigitsMLP(), digits(n_train=64)
    config = TrainConfig(steps=100, lr=1e-2, batch_size=8)
    settings = fit(model, task, LoRA(2), config, steps=3, progress=False).settings
    assert (settings["steps"], settings["lr"], settings["batch_size"], settings["warmup"]) == (3, 1e-2, 8, 0)


# Weights of micro-batches, whatever the unit


@pytest.mark.parametrize("unit", ["tokens", "examples"])
def test_sizes_of_batches_change_no_loss_where_examples_count_unequally(tiny_config, unit):
    targets = llama_task().train.targets.clone()
    for row in range(len(targets)):
        targets[row, row + 1 :] = IGNORE
    task = dataclasses.replace(llama_task(), unit=unit, train=Examples(llama_task().train.inputs, targets))
    model = Llama(tiny_config)
    expected = evaluate(model, task, "train", batch_size=6)
    for batch_size in (1, 4):
        assert evaluate(model, task, "train", batch_size) == pytest.approx(expected, rel=1e-6)
    whole, split = (
        fit(Llama(tiny_config), task, LoRA(2), steps=2, lr=0.01, batch_size=6, accumulate=accumulate)
        for accumulate in (1, 3)
    )
    assert split.curve("train_loss")[1] == pytest.approx(whole.curve("train_loss")[1], rel=1e-5)
    assert whole.rows[1]["tokens"] == split.rows[1]["tokens"] == {"tokens": 21, "examples": 6}[unit]


# What an error leaves of a preparation


def of_other_run(folder):
    run(LoRA(rank=3), checkpoint_dir=folder)


def not_written(model, inputs, targets):
    raise NotImplementedError


def only_evaluated(model, inputs, targets):
    if torch.is_grad_enabled():
        raise torch.OutOfMemoryError
    return cross_entropy(model, inputs, targets)


EARLY_ERRORS = {
    "checkpoint of another run": (of_other_run, {}, ValueError),
    "the loss, at the first evaluation": (None, {"loss": not_written}, NotImplementedError),
    "memory, at the first step": (None, {"loss": only_evaluated}, torch.OutOfMemoryError),
    "on_row": (None, {"on_row": lambda row: 1 / 0}, ZeroDivisionError),
}


@pytest.mark.parametrize(("before", "options", "error"), EARLY_ERRORS.values(), ids=EARLY_ERRORS)
@pytest.mark.parametrize(
    "method", [LoRA(rank=2), PiSSA(rank=2), FullFineTuning(), PartialFineTuning(["head"]), ContinueLoRA()], ids=str
)
def test_an_error_before_the_first_step_leaves_the_model_as_it_was(method, before, options, error, tmp_path):
    def made():
        model = DigitsMLP(width=16)
        if isinstance(method, ContinueLoRA):
            inject(model, LoRAConfig(2))
        model.hidden1.requires_grad_(False)
        return model

    model, options, folder = made(), dict(options), None
    if before is not None:
        before(tmp_path / "one")
        folder = tmp_path / "one"
    state = snapshot(model)
    with pytest.raises(error):
        run(method, model, small_task(loss=options.pop("loss", None)), checkpoint_dir=folder, **options)
    assert snapshot(model) == state
    _, history = run(method, model, checkpoint_dir=tmp_path / "two")
    assert losses(history) == losses(run(method, made())[1])


@pytest.mark.parametrize("method", [FullFineTuning(), PartialFineTuning(["norm"])], ids=lambda method: method.name)
def test_an_error_in_the_first_step_gives_statistics_back_that_its_forward_pass_has_moved(method):
    def failing(*batch):
        loss = cross_entropy(*batch)
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError
        return loss

    model = Pictures()
    with pytest.raises(torch.OutOfMemoryError):
        run(method, model, small_task(loss=failing))
    assert all(map(torch.equal, model.state_dict().values(), Pictures().state_dict().values()))
    assert losses(run(method, model)[1]) == losses(run(method, Pictures())[1])


def test_a_model_that_an_early_error_leaves_rounded_does_not_pass_as_untouched(tiny_config):
    model, options = Llama(tiny_config), {"steps": 1, "lr": 0.01, "batch_size": 3}
    with pytest.raises(ZeroDivisionError):
        fit(model, llama_task(), LoRA(2), lean=Lean(torch.bfloat16), on_row=lambda row: 1 / 0, **options)
    for lean in (None, Lean()):
        with pytest.raises(ValueError, match=r"rounded by a lean step with base_dtype=torch\.bfloat16, .*; load"):
            fit(model, llama_task(), LoRA(2), lean=lean, **options)
    fit(model, llama_task(), LoRA(2), lean=Lean(torch.bfloat16), **options)
    merge(model)
    fit(model, llama_task(), LoRA(2), **options)  # as any merged model
    model = Llama(tiny_config)
    with pytest.raises(ZeroDivisionError):
        fit(model, llama_task(), LoRA(2), lean=Lean(), on_row=lambda row: 1 / 0, **options)
    fit(model, llama_task(), LoRA(2), **options)


@pytest.mark.parametrize(("method", "says"), [(LoRA(rank=2), "adapters"), (FullFineTuning(), "prepared for 'full'")])
def test_an_error_from_the_first_step_on_leaves_the_model_as_it_is(method, says):
    def diverging(*batch):
        return cross_entropy(*batch) * (math.nan if torch.is_grad_enabled() else 1.0)

    model = DigitsMLP(width=16)
    with pytest.raises(DivergedError, match="at step 1 "):
        run(method, model, small_task(loss=diverging))
    with pytest.raises(ValueError, match=f"already .*{says}"):
        run(method, model)


@pytest.mark.parametrize(
    "method", [LoRA(rank=2, dropout=0.1), DoRA(rank=2), FullFineTuning(), PartialFineTuning(["head"])], ids=str
)
def test_a_cell_that_was_interrupted_can_be_run_again_with_the_same_model(method, tmp_path):
    def stop(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    whole, expected = run(method)
    model = DigitsMLP(width=16)
    with pytest.raises(KeyboardInterrupt):
        run(method, model, checkpoint_dir=tmp_path, checkpoint_every=2, on_row=stop)
    _, history = run(method, model, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert losses(history) == losses(expected)
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))
    assert [*model.state_dict()] == [*whole.state_dict()]
    for other in ({"seed": 1, "checkpoint_dir": tmp_path / "other"}, {}):  # of another run, or without a checkpoint
        with pytest.raises(ValueError, match="already"):
            run(method, model, **other)


def stopped_at(step):
    """An ``on_row`` that ends the run after a step."""

    def stop(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    return stop


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_continuation_that_was_interrupted_can_be_run_again_with_the_same_model(tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    whole, expected = run(ContinueLoRA(), run(LoRA(rank=2))[0])
    model, _ = run(LoRA(rank=2))
    with pytest.raises(KeyboardInterrupt):
        run(ContinueLoRA(), model, on_row=stopped_at(3), **options)
    _, history = run(ContinueLoRA(), model, **options)
    assert (losses(history), history.method) == (losses(expected), expected.method)
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))
    (tmp_path / "checkpoint.safetensors").unlink()
    _, later = run(ContinueLoRA(), model, **options)  # nothing is left of the first run but where it has ended
    assert later.method["start"] != history.method["start"]
    assert losses(later)[0][1] == losses(history)[-1][1]


@pytest.mark.parametrize("method", [ContinueLoRA(), AsItIs()], ids=lambda method: method.name)
def test_a_continuation_that_was_stopped_before_its_first_checkpoint_does_not_start_from_half_trained_weights(
    method, tmp_path
):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 6}
    model, _ = run(LoRA(rank=2))
    with pytest.raises(KeyboardInterrupt):
        run(method, model, on_row=stopped_at(3), **options)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"stopped before its first checkpoint in .*; start again from a fresh"):
        run(method, model, **options)
    assert snapshot(model) == before
    switch(model, adapter_state(run(LoRA(rank=2), seed=1)[0]))  # a start of its own
    run(method, model, **options)


def test_an_adapter_that_was_put_on_since_is_another_start(tmp_path):
    """The model alone does not say what the run started from, once somebody has changed it."""
    states = [adapter_state(run(LoRA(rank=2), seed=seed)[0]) for seed in (1, 2)]
    model, _ = run(LoRA(rank=2))
    switch(model, states[0])
    _, history = run(ContinueLoRA(), model, checkpoint_dir=tmp_path)
    switch(model, states[1])
    with pytest.raises(ValueError, match=r"from another run: its method\.start is"):
        run(ContinueLoRA(), model, checkpoint_dir=tmp_path)
    _, other = run(ContinueLoRA(), model)
    assert losses(other)[0] != losses(history)[0]


def test_adapters_that_were_put_on_since_are_not_taken_off(tmp_path):
    model, _ = run(checkpoint_dir=tmp_path)
    inject(model, LoRAConfig(2))
    before = snapshot(model)
    with pytest.raises(ValueError, match="already been prepared for 'full'"):
        run(model=model, checkpoint_dir=tmp_path)
    assert snapshot(model) == before


def test_a_run_that_has_ended_outlives_the_failure_of_its_last_checkpoint(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("The disk is full.")

    _, expected = run()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", full)
        with pytest.raises(OSError, match="The disk is full"):
            run(checkpoint_dir=tmp_path, checkpoint_every=3)
        with pytest.warns(UserWarning, match=r"has ended, but its last checkpoint is missing: The disk is full"):
            _, history = run(checkpoint_dir=tmp_path, checkpoint_every=6)
    assert losses(history) == losses(expected)


@pytest.mark.parametrize("method", [FullFineTuning(), PartialFineTuning(["head"])], ids=lambda method: method.name)
def test_only_a_resumed_run_takes_half_trained_weights(method, tmp_path, monkeypatch):
    model, options = DigitsMLP(width=16), {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        run(method, model, on_row=stopped_at(3), **options)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_contents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(method, model, **options)
    says = f"already been prepared for '{method.name}'"
    with pytest.raises(ValueError, match=says):
        run(LoRA(rank=2), model)
    file = tmp_path / "checkpoint.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="delete it to restart the run"):
        run(method, model, **options)
    file.unlink()
    with pytest.raises(ValueError, match=says):
        run(method, model, **options)
    file.write_bytes(whole)
    assert losses(run(method, model, **options)[1]) == losses(run(method)[1])


def test_a_fresh_model_that_a_checkpoint_was_half_copied_to_is_not_taken_for_pre_trained(tmp_path, monkeypatch):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        run(on_row=stopped_at(3), **options)
    model, copy_ = DigitsMLP(width=16), torch.Tensor.copy_
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", lambda *both: interrupted(copy_(*both)))
        with pytest.raises(KeyboardInterrupt):
            run(model=model, **options)
    assert not torch.equal(model.hidden1.weight, DigitsMLP(width=16).hidden1.weight)
    with pytest.raises(ValueError, match="already been prepared for 'full'"):
        run(LoRA(rank=2), model)
    assert losses(run(model=model, **options)[1]) == losses(run()[1])


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(rank=2)], ids=lambda method: method.name)
def test_an_error_before_the_first_step_leaves_a_compiled_model_as_it_was(method):
    model = torch.compile(DigitsMLP(width=16), backend="eager")
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        run(method, model, on_row=lambda row: 1 / 0)
    assert snapshot(model) == before
    assert losses(run(method, model)[1]) == losses(run(method)[1])


@pytest.mark.parametrize("kind", ["a file", "read-only"])
def test_a_folder_for_checkpoints_that_cannot_be_written_to_is_told_before_the_model_is_prepared(kind, tmp_path):
    folder, model = tmp_path / "run", DigitsMLP(width=16)
    before = snapshot(model)
    if kind == "a file":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
    with pytest.raises(OSError, match=r"run cannot be written to .*name another folder"):
        run(LoRA(rank=2), model, checkpoint_dir=folder, on_row=lambda row: pytest.fail("it was trained"))
    assert snapshot(model) == before


def test_a_finished_run_is_read_from_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    _, history = run(checkpoint_dir=tmp_path)
    monkeypatch.setattr(train, "check_writable", lambda folder: pytest.fail("nothing is to be written"))
    assert run(checkpoint_dir=tmp_path)[1] == history


# Modes, and statistics of what is frozen


class Pictures(nn.Module):
    """A net with two norms that keep running statistics."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.norm = nn.Linear(64, 12), nn.BatchNorm1d(12)
            self.plain, self.head = nn.BatchNorm1d(12, affine=False), nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.plain(F.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        (LoRA(rank=2), []),
        (PartialFineTuning(["head"]), []),
        (PartialFineTuning(["norm"]), ["norm"]),
        (FullFineTuning(), ["norm", "plain"]),
    ],
    ids=str,
)
def test_the_statistics_of_a_batch_norm_change_only_where_it_is_trained(method, changed, tmp_path):
    model, fresh = Pictures(), Pictures()
    modes = []

    def loss(model, inputs, targets):
        if torch.is_grad_enabled():
            modes.append([name for name in ("norm", "plain") if getattr(model, name).training])
        return cross_entropy(model, inputs, targets)

    run(method, model, small_task(loss=loss), eval_every=1)
    assert modes == [changed] * 6  # after evaluations too
    found = [name for name in ("norm", "plain") if not torch.equal(getattr(model, name).running_mean, torch.zeros(12))]
    assert found == changed
    if isinstance(method, LoRA):
        save_adapter(model, tmp_path / "adapter")
        load_adapter(fresh, tmp_path / "adapter")
        assert evaluate(fresh, small_task()) == evaluate(model, small_task())


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(rank=2, dropout=0.1)], ids=lambda method: method.name)
@pytest.mark.parametrize("error", [False, True])
def test_each_module_gets_its_mode_back(tiny_config, method, error):
    model = Llama(tiny_config).eval()
    model.model.layers[0].train()
    model.model.layers[0].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {False, True}
    evaluate(model, llama_task())
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(ZeroDivisionError) if error else nullcontext():
        fit(model, llama_task(), method, steps=1, lr=0.1, on_row=(lambda row: 1 / 0) if error else None)
    found = {name: module.training for name, module in model.named_modules()}
    assert {name: found[name] for name in modes} == modes
    for name in found.keys() - modes.keys():  # of an adapter
        assert found[name] == modes[re.sub(r"\.(base|dropout)$", "", name)]


def test_a_checkpoint_takes_no_adapters_off_that_its_run_has_not_put_on(tmp_path):
    run(LoRA(rank=2), checkpoint_dir=tmp_path)
    model = DigitsMLP(width=16)
    inject(model, LoRAConfig(2))
    before = snapshot(model)
    with pytest.raises(ValueError, match="already has adapters"):
        run(LoRA(rank=2), model, checkpoint_dir=tmp_path)
    assert snapshot(model) == before


def test_an_interrupted_run_of_a_model_that_another_tool_prepared_goes_on_with_its_adapters(tmp_path):
    def adapted():
        model = DigitsMLP(width=16)
        inject(model, LoRAConfig(2))
        return model

    def stop(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    model, (whole, _) = adapted(), run(AsItIs(), adapted())
    with pytest.raises(KeyboardInterrupt):
        run(AsItIs(), model, checkpoint_dir=tmp_path, checkpoint_every=2, on_row=stop)
    run(AsItIs(), model, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))


@pytest.mark.parametrize("part", ["validation", "off_domain"])
def test_evaluations_in_which_no_target_counts_are_refused_before_anything_is_changed(part):
    model, task = DigitsMLP(width=16), small_task()
    task.parts[part].targets[:2] = IGNORE
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^No target of the first 2 examples of the {part} part of task .* counts"):
        run(LoRA(rank=2), model, task, eval_examples=2)
    assert snapshot(model) == before
    run(LoRA(rank=2), model, task, eval_examples=3)


# A task that does not fit


def words(largest, length=8, unit="tokens", last=None):
    """Next-token prediction on tokens up to ``largest``, which is the ``last`` target if that is given."""
    ids = torch.arange(length).expand(4, length).contiguous()
    inputs, targets = ids.clone(), ids.clone()
    (inputs if last is None else targets)[0, -1] = largest if last is None else last
    part = Examples(inputs, targets)
    return Task("words", part, part, part, part, unit=unit)


def test_a_task_of_another_tokenizer_is_told_before_anything_is_trained(tiny_config):
    model = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=False))
    size, before = tiny_config.vocab_size, snapshot(model)
    says = rf"train part of task 'words' has the token {size}, but the model knows {size} tokens, .*another tokenizer"
    for task in (words(size), words(size - 1, last=size)):
        for call in (lambda task: run(LoRA(2), model, task), lambda task: evaluate(model, task)):
            with pytest.raises(ValueError, match=says):
                call(task)
    assert snapshot(model) == before
    inject(model, LoRAConfig(2, targets=["embed_tokens"]))
    with pytest.raises(ValueError, match=says):
        evaluate(model, words(size))
    evaluate(model, words(size - 1))
    evaluate(DigitsMLP(width=16), small_task())  # has no embedding


def test_a_model_without_parameters_is_told():
    says = "The model, a ReLU, has no parameters; pass the one that is to learn"
    with pytest.raises(ValueError, match=says):
        evaluate(nn.ReLU(), small_task())
    with pytest.raises(ValueError, match=says):
        fit(nn.ReLU(), small_task(), FullFineTuning(), steps=1, lr=0.1)


def test_examples_longer_than_the_models_context_are_warned_of(tiny_config):
    model = Llama(dataclasses.replace(tiny_config, max_position_embeddings=8))
    with pytest.warns(UserWarning, match=r"up to 9 tokens, but the model is for at most 8 \(max_position_embeddings\)"):
        evaluate(model, words(1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, words(1, 8))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stepz": 3, "lr": 0.1, "steps": 3}, "^fit has no option 'stepz'; did you mean 'steps'\\?$"),
        ({"zzz": 3}, "^fit has no option 'zzz'; choose from lr, seed, .*autocast\\.$"),
        ({"lr": 0.1}, "^fit lacks the option 'steps'; write fit"),
        ({"steps": 3}, "^fit lacks the option 'lr'; write fit"),
    ],
)
def test_an_unknown_or_missing_option_is_one_sentence(options, says):
    with pytest.raises(TypeError, match=says):
        fit(DigitsMLP(width=16), small_task(), LoRA(), **options)
    with pytest.raises(TypeError, match=r"^Grid has no option 'stepz'; did you mean 'steps'\?$"):
        Grid([1], [0.1], [0], stepz=3)


def test_checkpoints_need_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint_every is 2, but there is no folder .*give checkpoint_dir too"):
        run(checkpoint_every=2)
    with pytest.raises(ValueError, match="checkpoint_dir is 5, but it must be a path"):
        run(checkpoint_dir=5)
