"""fit: against an AdamW written out by hand, and what it promises on seeds, modes, schedules and errors."""

import copy
import dataclasses
import math
import random
import re
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
    Lean,
    Llama,
    LlamaConfig,
    LoRA,
    LoRAConfig,
    LoRAFA,
    LoRAPlus,
    PartialFineTuning,
    PiSSA,
    RsLoRA,
    evaluate,
    fit,
    inject,
    load_adapter,
    save_adapter,
)
from lora_lab.history import COLUMNS, DivergedError, History
from lora_lab.methods import AsItIs
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import IGNORE, Examples, Task, cross_entropy, digits, planted
from lora_lab.tasks.instruction import Padded
from lora_lab.train import DataOrder, LengthOrder, TrainConfig, gradient_checkpointing_method, make_step
from tests.helpers import Stopped, small_task, snapshot


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


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_a_result_does_not_depend_on_the_global_generators_which_stay_as_they_were():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = generators()
        results.append(losses(run(LoRA(rank=2, dropout=0.3))[1]))
        assert generators() == before
    assert results[0] == results[1]


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


# The numbers


def adamw_by_hand(model, task, config):
    """AdamW over the whole training part at once, as Loshchilov and Hutter write it, in plain tensors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    first, second = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    for t in range(1, config.steps + 1):
        if t <= config.warmup:
            lr = config.lr * t / config.warmup
        else:
            done = (t - 1 - config.warmup) / (config.steps - config.warmup)
            lr = config.lr * (1 if config.schedule == "constant" else (1 + math.cos(math.pi * done)) / 2)
        loss = task.loss(model, task.train.inputs, task.train.targets)
        gradients = torch.autograd.grad(loss, trained)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        factor = min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0
        with torch.no_grad():
            for p, g, m, v in zip(trained, gradients, first, second, strict=True):
                m.copy_(0.9 * m + 0.1 * factor * g)
                v.copy_(0.999 * v + 0.001 * (factor * g) ** 2)
                p -= lr * config.weight_decay * p
                p -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        yield loss.item(), norm, lr


@pytest.mark.parametrize(
    ("method", "schedule", "warmup", "decay", "clip"),
    [
        (FullFineTuning(), "cosine", 3, 0.0, 1.0),
        (FullFineTuning(), "cosine", 3, 0.1, 0.2),
        (LoRA(rank=2, alpha=6), "cosine", 0, 0.1, 0.05),
        (LoRA(rank=2, alpha=6), "constant", 4, 0.0, None),
        (PartialFineTuning(("head",)), "cosine", 10, 0.5, None),
    ],
)
def test_trajectory_equals_adamw_written_by_hand(method, schedule, warmup, decay, clip):
    config = TrainConfig(
        steps=10, lr=0.02, batch_size=12, seed=4, schedule=schedule, warmup=warmup, weight_decay=decay, clip=clip
    )
    task = small_task(dtype=torch.float64, loss=double_cross_entropy)
    ours, reference = DigitsMLP(width=16).double(), DigitsMLP(width=16).double()
    start = copy.deepcopy(ours.state_dict())
    history = fit(ours, task, method, config)
    method.prepare(reference, seed=4)
    expected = list(adamw_by_hand(reference, task, config))
    found = [(row["train_loss"], row["grad_norm"], row["lr"]) for row in history.rows[1:]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.state_dict(), reference.state_dict(), rtol=0, atol=1e-12)
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert all((ours.get_parameter(name) - start[name]).abs().max() > 1e-3 for name in trained & start.keys())
    if clip:
        assert (max(norm for _, norm, _ in expected) > clip) is (clip < 1)


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
@pytest.mark.parametrize("empty_row", [False, True])  # then a micro-batch may have no target that counts
def test_accumulation_changes_no_result_although_micro_batches_count_unequally(method, accumulate, empty_row):
    results, task = [], token_task(empty_row)
    for k in (1, accumulate):
        model = Tokens()
        history = fit(model, task, method, steps=6, lr=0.05, batch_size=6, accumulate=k, clip=0.5)
        results.append((model.state_dict(), [(row["train_loss"] or 0, row["tokens"]) for row in history.rows]))
    (state, rows), (accumulated, rows_accumulated) = results
    np.testing.assert_allclose(rows, rows_accumulated, rtol=0, atol=1e-10)
    assert rows[1][1] == 1 + 2 + 3 + 4 + 5 + 6 - empty_row
    for name, value in state.items():
        torch.testing.assert_close(value, accumulated[name], rtol=0, atol=1e-10)
    trained = "head.weight" if method.name == "full" else "head.lora_B"
    assert (state[trained] - Tokens().state_dict().get(trained, torch.zeros(()))).abs().max() > 1e-2


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


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_ignores_dropout_and_keeps_mode_and_gradients(training):
    model = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10)).train(training)
    results = {evaluate(model, small_task(), "validation") for _ in range(3)}
    assert len(results) == 1
    assert model.training is model[1].training is training
    assert all(p.grad is None for p in model.parameters())


# History


def test_history_has_a_row_for_the_model_before_training_and_one_for_each_step():
    model = DigitsMLP(width=16)
    task = small_task()
    before = {part: evaluate(model, task, part, limit=3) for part in ("validation", "off_domain")}
    _, history = run(model=model, task=task, steps=7, eval_every=3, eval_examples=3, batch_size=8)
    assert [row["step"] for row in history.rows] == list(range(8))
    assert all(set(row) == set(COLUMNS) for row in history.rows)
    first = history.rows[0]
    assert (first["validation_loss"], first["off_domain_loss"]) == (before["validation"], before["off_domain"])
    assert (first["train_loss"], first["lr"], first["grad_norm"], first["tokens"]) == (None, None, None, 0)
    evaluated = [row["step"] for row in history.rows if row["validation_loss"] is not None]
    assert evaluated == [row["step"] for row in history.rows if row["off_domain_loss"] is not None] == [0, 3, 6, 7]
    assert history.rows[-1]["validation_loss"] == evaluate(model, task, "validation", limit=3)
    assert all(row["seconds"] > 0 and row["tokens"] == 8 for row in history.rows[1:])
    history = fit(Tokens(), token_task(), FullFineTuning(), steps=2, lr=0.01, batch_size=6)
    assert [row["tokens"] for row in history.rows] == [0, 21, 21]  # those that count


@pytest.mark.parametrize(("method", "trainable"), [(FullFineTuning(), 1482), (LoRA(rank=2), 2 * (80 + 32 + 26))])
def test_history_counts_parameters_and_the_optimisers_bytes(method, trainable):
    model, history = run(method)
    tensors = len([p for p in model.parameters() if p.requires_grad])
    assert history.trainable_parameters == trainable
    assert history.total_parameters == 1482 + (0 if trainable == 1482 else trainable)
    assert history.optimizer_bytes == 2 * 4 * trainable + 4 * tensors


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


# Errors


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_train_as_pythons_do(kind, tmp_path):
    numbers = {"steps": 6, "seed": 3, "eval_every": 2, "accumulate": 2, "lr": 0.25, "clip": 2.0}
    _, history = run(LoRA(2), **{name: kind(value) for name, value in numbers.items()})
    _, expected = run(LoRA(2), **numbers)
    assert (losses(history), history.settings) == (losses(expected), expected.settings)
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json").settings == expected.settings
    sizes = evaluate(DigitsMLP(), small_task(), "test", 2, 3)
    assert evaluate(DigitsMLP(), small_task(), "test", kind(2), kind(3)) == sizes


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


@pytest.mark.parametrize("spoilt", ["model", "task"])
def test_a_loss_that_is_no_number_before_training_is_not_put_down_to_the_learning_rate(spoilt):
    model, task = DigitsMLP(width=16), small_task()
    with torch.no_grad():
        (model.head.bias if spoilt == "model" else task.validation.inputs)[0] = math.nan
    with pytest.raises(DivergedError, match=r"nan at step 0 \(before training\), so no learning rate"):
        run(LoRA(rank=2), model, task)


def test_a_run_stores_no_checkpoint_of_weights_that_are_no_numbers(tmp_path):
    def loss(model, inputs, targets):  # finite itself, but its gradient is not
        return F.cross_entropy(model(inputs), targets) + (model.head.bias * 0).sqrt().sum()

    with pytest.raises(DivergedError, match=r"^The parameter 'hidden1\.weight' is nan at step 1 "):
        run(task=small_task(loss=loss), eval_every=100, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert not list(tmp_path.glob("checkpoint*"))


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


# The step by itself


def test_make_step_hands_rates_and_decay_to_the_optimiser():
    config = TrainConfig(steps=1, lr=0.5, weight_decay=0.25, clip=None)
    step = make_step(DigitsMLP(), cross_entropy, LoRAPlus(2, ratio=4.0), config)
    assert [(group["lr"], group["weight_decay"]) for group in step.optimizer.param_groups] == [(0.5, 0.25), (2.0, 0.25)]
    assert (step.clip, step.threads, step.loss) == (None, 1, cross_entropy)


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


def checkpointing(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_refused_step_leaves_the_model_as_it_was(tiny_config, tiny_hf):
    config = TrainConfig(lr=1e-3, steps=1, gradient_checkpointing=True)
    without = tiny_hf()
    without.supports_gradient_checkpointing = False  # as some models of transformers say of themselves
    for model, method, says in (
        (without, LoRA(rank=2), "no method gradient_checkpointing_enable"),
        (Llama(tiny_config), PartialFineTuning(["nowhere"]), "no module 'nowhere'"),
        (DigitsMLP(), LoRA(rank=2), "no method gradient_checkpointing_enable"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=says):
            make_step(model, cross_entropy, method, config)
        assert snapshot(model) == before
        assert not checkpointing(model)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("make", ["ours", "transformers'"])
def test_checkpointing_is_switched_off_again_unless_it_was_on_before(tiny_config, tiny_hf, make, before, error):
    model, seen = Llama(tiny_config) if make == "ours" else tiny_hf(), set()
    if before:
        gradient_checkpointing_method(model)()

    def loss(model, inputs, targets):
        seen.add(checkpointing(model))
        if error and torch.is_grad_enabled():
            raise KeyboardInterrupt
        return cross_entropy(model, inputs, targets)

    with pytest.raises(KeyboardInterrupt) if error else nullcontext():
        fit(model, llama_task(loss), LoRA(2), steps=1, lr=0.1, batch_size=3, gradient_checkpointing=True)
    assert seen == {True}
    assert checkpointing(model) is before


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


def test_defaults_of_a_config_follow_its_steps_and_unused_options_are_not_recorded():
    config = TrainConfig(steps=100, lr=1e-3)
    assert (config.warmup_steps, config.evaluation_interval) == (10, 10)
    longer = dataclasses.replace(config, steps=1000)
    assert longer.settings()["warmup"] == longer.settings()["eval_every"] == 100
    assert dataclasses.replace(config, steps=5).warmup_steps == 0
    used = {"batches": "by_length", "gradient_checkpointing": True, "autocast": BF16}
    found = dataclasses.replace(config, **used).settings()
    assert found == config.settings() | used | {"autocast": "torch.bfloat16"}
    assert not config.settings().keys() & used.keys()
    assert dataclasses.replace(config, lean=Lean()).settings() == config.settings() | {"lean": Lean().settings()}


def test_keywords_override_a_config():
    model, task = DigitsMLP(), digits(n_train=64)
    config = TrainConfig(steps=100, lr=1e-2, batch_size=8)
    settings = fit(model, task, LoRA(2), config, steps=3, progress=False).settings
    assert (settings["steps"], settings["lr"], settings["batch_size"], settings["warmup"]) == (3, 1e-2, 8, 0)


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
    before = generators()
    with pytest.raises(ZeroDivisionError) if error else nullcontext():
        fit(model, llama_task(), method, steps=1, lr=0.1, on_row=(lambda row: 1 / 0) if error else None)
    assert generators() == before
    found = {name: module.training for name, module in model.named_modules()}
    assert {name: found[name] for name in modes} == modes
    for name in found.keys() - modes.keys():  # of an adapter
        assert found[name] == modes[re.sub(r"\.(base|dropout)$", "", name)]


# A task that does not fit


def words(largest, length=8, unit="tokens", last=None):
    """Next-token prediction on tokens up to ``largest``, which is the ``last`` target if that is given."""
    ids = torch.arange(length).expand(4, length).contiguous()
    inputs, targets = ids.clone(), ids.clone()
    (inputs if last is None else targets)[0, -1] = largest if last is None else last
    part = Examples(inputs, targets)
    return Task("words", part, part, part, part, unit=unit)


def test_examples_longer_than_the_models_context_are_warned_of(tiny_config):
    model = Llama(dataclasses.replace(tiny_config, max_position_embeddings=8))
    with pytest.warns(UserWarning, match=r"up to 9 tokens, but the model is for at most 8 \(max_position_embeddings\)"):
        evaluate(model, words(1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, words(1, 8))


# Stopped, and gone on with


def adapted():
    model = DigitsMLP(width=16)
    inject(model, LoRAConfig(2))
    return model


VARIANTS = (RsLoRA(2), LoRAPlus(2), LoRAFA(2), PiSSA(2), DoRA(2))
FRESH = (LoRA(2, dropout=0.1), *VARIANTS, FullFineTuning(), PartialFineTuning(["head"]))
STOPPABLE = [(method, lambda: DigitsMLP(width=16), "started from other weights") for method in FRESH]
STOPPABLE += [(ContinueLoRA(), adapted, "is from another run: its method.start")]
STOPPABLE += [(AsItIs(), adapted, "started from other weights")]


@pytest.mark.parametrize(("method", "make", "says"), STOPPABLE, ids=lambda value: getattr(value, "name", ""))
def test_an_interrupted_run_goes_on_with_a_model_loaded_again_and_refuses_the_half_trained_one(
    method, make, says, tmp_path
):
    def stop(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    whole, expected = run(method, make())
    options, half = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}, make()
    with pytest.raises(KeyboardInterrupt):
        run(method, half, on_row=stop, **options)
    before = everything(half)
    with pytest.raises(ValueError, match=says):
        run(method, half, **options)
    assert everything(half) == before
    model, history = run(method, make(), **options)
    assert losses(history) == losses(expected)
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))


# Refused before the model is touched, so that a typo costs no reload


def everything(model):
    """What a refused call must leave alone: as ``snapshot``, and the attributes of every module."""
    simple = bool | int | float | str | None
    attributes = [
        {name: value if isinstance(value, simple) else id(value) for name, value in vars(module).items()}
        for module in model.modules()
    ]
    return snapshot(model), attributes


def net():
    model = DigitsMLP(width=16).eval()
    model.head.requires_grad_(False)
    return model


def small_llama():
    return Llama(LlamaConfig(20, 16, 24, 2, 4, 2, 4))


def hooked():
    model = small_llama()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return model


def prepared(method):
    def make():
        model = net()
        method.prepare(model, 0)
        return model

    return make


def uncounted(part, rows):
    task = small_task()
    task.parts[part].targets[rows] = IGNORE
    return task


FIRST_BATCH = DataOrder(12, 0).rows(0, 4)
NUMBERS = {
    "steps": [0, 10**20],
    "batch_size": [0, 10**20],
    "accumulate": [0, 5],
    "eval_every": [0, -1],
    "eval_examples": [0],
    "checkpoint_every": [0, -1],
    "seed": [10**20],
    "lr": [0.0, -1e-3, math.nan, math.inf],
    "schedule": ["linear"],
    "batches": ["longest", "by_length"],
    "warmup": [-1, 7],
    "weight_decay": [-0.1, math.nan],
    "clip": [0.0, math.nan],
    "autocast": [torch.float16],
    "gradient_checkpointing": [True],
    "lean": [Lean()],
}
REFUSED = [  # the model, the arguments, the exception, what must be named
    *[(net, {name: value}, ValueError, "DigitsMLP" if name in ("gradient_checkpointing", "lean") else name)
      for name, values in NUMBERS.items() for value in values],
    (net, {"stepz": 3}, TypeError, "'stepz'; did you mean 'steps'"),
    (net, {"method": "lora"}, ValueError, "method is 'lora'"),
    (net, {"method": LoRA}, ValueError, "method is "),
    (net, {"method": LoRA(2, targets=["q_proj"])}, ValueError, "'q_proj'"),
    (net, {"method": LoRA(2, exclude=["haed"])}, ValueError, "'haed'"),
    (net, {"method": LoRA(2000)}, ValueError, "rank is 2000"),
    (net, {"method": PiSSA(12)}, ValueError, "rank is 12"),
    (net, {"method": PartialFineTuning(["haed"])}, ValueError, "'haed'"),
    (net, {"method": PartialFineTuning([])}, ValueError, "modules"),
    (net, {"method": ContinueLoRA()}, ValueError, "no adapters"),
    (lambda: net().requires_grad_(False), {"method": AsItIs()}, ValueError, "'as it is'"),
    (prepared(LoRA(2)), {}, ValueError, "already has adapters"),
    (prepared(FullFineTuning()), {}, ValueError, "prepared for 'full'"),
    (net, {"task": uncounted("train", FIRST_BATCH)}, ValueError, "step 1"),
    (net, {"task": uncounted("validation", slice(2)), "eval_examples": 2}, ValueError, "validation"),
    (nn.ReLU, {}, ValueError, "ReLU"),
    (net, {"checkpoint_every": 2}, ValueError, "checkpoint_every is 2"),
    (net, {"checkpoint_dir": "a file"}, OSError, "a file"),
    (net, {"checkpoint_dir": "other"}, ValueError, "other"),
    (net, {"checkpoint_dir": "damaged"}, ValueError, "damaged"),
    (small_llama, {"lean": Lean(), "method": DoRA(2)}, ValueError, "DoRALinear"),
    (small_llama, {"lean": Lean(), "method": FullFineTuning()}, ValueError, "trains adapters only"),
    (small_llama, {"lean": Lean(threads=2), "method": LoRA(2, dropout=0.1)}, ValueError, "threads is 2"),
    (small_llama, {"lean": Lean(checkpoint=True), "gradient_checkpointing": True}, ValueError, "lean"),
    (small_llama, {"lean": Lean(), "autocast": BF16}, ValueError, "lean"),
    (hooked, {"lean": Lean()}, ValueError, "hook"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "arguments", "error", "named"), REFUSED)
def test_what_fit_refuses_leaves_the_model_as_it_was(make, arguments, error, named, tmp_path):
    (tmp_path / "a file").write_text("")
    run(LoRA(3), net(), checkpoint_dir=tmp_path / "other")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.safetensors").write_bytes(b"nothing")
    if "checkpoint_dir" in arguments:
        arguments = arguments | {"checkpoint_dir": tmp_path / arguments["checkpoint_dir"]}
    model = make()
    before = everything(model)
    arguments = {"method": LoRA(2), "model": model} | arguments
    if isinstance(model, Llama):
        arguments["task"] = words(19)
    with pytest.raises(error, match=named):
        run(**arguments)
    assert everything(model) == before


@pytest.mark.parametrize("largest", [20, 25])
def test_a_task_of_another_tokenizer_is_refused(largest):
    model = small_llama()
    before = everything(model)
    for task in (words(largest), words(0, last=largest)):
        for call in (lambda task: run(LoRA(2), model, task), lambda task: evaluate(model, task)):
            with pytest.raises(ValueError, match=f"token {largest}, but the model knows 20"):
                call(task)
    assert everything(model) == before
    evaluate(model, words(19))


@pytest.mark.parametrize(
    ("options", "named"), [({"batch_size": 0}, "batch_size"), ({"limit": 0}, "limit"), ({"part": "valid"}, "'valid'")]
)
def test_evaluate_refuses_what_gives_no_mean(options, named):
    with pytest.raises(ValueError, match=named):
        evaluate(DigitsMLP(width=16), small_task(), **options)
