"""Tasks for small nets: digits whose parts share no picture, a hidden update of known rank, arrays of a user's own."""

import copy

import numpy as np
import pandas
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits, load_iris
from torch import nn
from torch.nn import functional as F

from lora_lab import LoRA, fit
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import Examples, Task, cross_entropy, digits, from_arrays, mean_squared_error, planted

PARTS = ("train", "validation", "test", "off_domain")


# Digits


@pytest.fixture(scope="module")
def pictures():
    """Each upright picture's 64 pixels -> its place in scikit-learn's data."""
    found = {tuple(picture): i for i, picture in enumerate((load_digits().data / 16).tolist())}
    assert len(found) == 1797  # no two are equal
    return found


def upright(inputs):
    """Moved pictures back up: all but the last row, which is lost."""
    return [tuple(picture[8:]) for picture in inputs.tolist()]


def split_by_hand(part, seed=0):
    """The task of 500 moved pictures, by hand."""
    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    as_is = torch.tensor(data.images, dtype=torch.float32)[order] / 16  # (1797, 8, 8)
    moved = torch.cat([torch.zeros(1797, 1, 8), as_is[:, :-1]], dim=1)
    labels = torch.tensor(data.target)[order]

    def cut(pictures, first, last):
        return Examples(pictures[first:last].flatten(1), labels[first:last])

    if part == "pretrain":
        rows = {"train": (as_is, 0, 700), "validation": (as_is, 700, 800), "test": (as_is, 800, 900)}
        rows["off_domain"] = (moved, 1400, 1600)
    else:
        rows = {"train": (moved, 900, 1400), "validation": (moved, 1400, 1600), "test": (moved, 1600, 1797)}
        rows["off_domain"] = (as_is, 700, 800)
    return Task(f"digits-{part}", **{name: cut(*own) for name, own in rows.items()})


@pytest.mark.parametrize("part", ["pretrain", "adapt"])
def test_digits_are_split_by_the_seed_alone(part):
    for seed in (0, 3):
        expected = split_by_hand(part, seed).fingerprint
        torch.manual_seed(seed)
        assert digits(part, seed).fingerprint == digits(part, np.int64(seed), n_train=500).fingerprint == expected
        assert digits(part, seed, n_train=501).fingerprint != expected
    assert split_by_hand(part, 0).fingerprint != split_by_hand(part, 3).fingerprint


@pytest.mark.parametrize(
    ("n_train", "as_is"),
    [(1, (1199, 100, 100)), (500, (700, 100, 100)), (1024, (188, 94, 94)), (1200, (100, 50, 50))],
)
def test_more_digits_to_train_on_leave_fewer_as_they_are_and_no_picture_is_in_two_parts(pictures, n_train, as_is):
    before, after = digits("pretrain", n_train=n_train), digits("adapt", n_train=n_train)
    cut = {picture[:56]: i for picture, i in pictures.items()}
    labels = load_digits().target
    places = [[pictures[tuple(row)] for row in before.parts[part].inputs.tolist()] for part in PARTS[:3]]
    places += [[cut[row] for row in upright(after.parts[part].inputs)] for part in PARTS[:3]]
    assert [len(part) for part in places] == [*as_is, n_train, 200, 197]
    assert sorted(place for part in places for place in part) == list(range(1797))
    for rows, examples in zip(places, [*before.parts.values()][:3] + [*after.parts.values()][:3], strict=True):
        assert examples.targets.tolist() == labels[rows].tolist()
    assert torch.equal(after.off_domain.inputs, before.validation.inputs)
    assert torch.equal(before.off_domain.inputs, after.validation.inputs)
    assert not after.train.inputs[:, :8].any()
    assert after.train.inputs[:, 8:].any()


def test_inverted_digits_are_split_as_moved_ones_and_have_black_and_white_swapped(pictures):
    moved, inverted = digits("adapt"), digits("adapt", change="inverted")
    for part in PARTS[:3]:
        swapped = [tuple(picture) for picture in (1 - inverted.parts[part].inputs).tolist()]
        assert [picture[:56] for picture in swapped] == upright(moved.parts[part].inputs)
        assert set(swapped) <= pictures.keys()
        assert torch.equal(inverted.parts[part].targets, moved.parts[part].targets)
        as_they_are = (digits("pretrain", change=change).parts[part].inputs for change in ("moved", "inverted"))
        assert torch.equal(*as_they_are)
    assert torch.equal(inverted.off_domain.inputs, moved.off_domain.inputs)


def test_other_digits_are_five_to_nine_after_zero_to_four(pictures):
    before, after = digits("pretrain", 2, change="other digits"), digits("adapt", 2, change="other digits")
    labels, places = load_digits().target, []
    for task, allowed in ((before, range(5)), (after, range(5, 10))):
        for part in PARTS[:3]:
            rows = [pictures[tuple(picture)] for picture in task.parts[part].inputs.tolist()]
            assert task.parts[part].targets.tolist() == labels[rows].tolist()
            assert set(labels[rows]) == set(allowed)
            places += rows
    assert sorted(places) == list(range(1797))
    assert [len(after.parts[part]) for part in PARTS] == [500, 200, 196, 100]
    assert torch.equal(after.off_domain.inputs, before.validation.inputs)
    assert len(digits(n_train=600, change="other digits").test) == 96


# Planted


def one_layer():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 12))


def least_squares(examples):
    """The weight (12, 20) and bias (12,) that explain the answers best, and what they leave unexplained."""
    inputs = F.pad(examples.inputs.double(), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(inputs, examples.targets.double()).solution
    return solution[:-1].T, solution[-1], examples.targets.double() - inputs @ solution


@pytest.mark.parametrize("rank", [1, 4])
def test_the_hidden_update_has_exactly_the_rank_and_the_size_of_the_weight(rank):
    model = one_layer()
    task = planted(model, rank=rank, noise=0.1)
    weight, bias, rest = least_squares(task.validation)
    sizes = torch.linalg.svdvals(weight - model[0].weight.detach().double())
    assert sizes[rank - 1] > 0.05 * sizes[0]
    assert sizes[rank:].max() < 1e-5 * sizes[0]
    assert float(sizes.norm()) == pytest.approx(float(model[0].weight.detach().norm()), rel=1e-4)
    torch.testing.assert_close(bias, model[0].bias.double(), rtol=0, atol=1e-5)
    assert rest.abs().max() < 1e-4


def test_noise_is_in_the_training_answers_only():
    model = one_layer()
    task, clean = planted(model, rank=2, noise=0.3), planted(model, rank=2, noise=0.0)
    for part in PARTS[1:]:
        assert torch.equal(task.parts[part].targets, clean.parts[part].targets)
    assert torch.equal(task.train.inputs, clean.train.inputs)
    noise = task.train.targets - clean.train.targets
    everything = torch.cat([clean.parts[part].targets for part in PARTS[:3]])
    assert float(noise.std()) == pytest.approx(0.3 * float(everything.std()), rel=0.05)
    assert abs(float(noise.mean())) < 0.02 * float(everything.std())
    assert least_squares(clean.train)[2].abs().max() < 1e-4
    assert least_squares(task.train)[2].std() > 0.2 * float(everything.std())


def test_off_domain_answers_are_the_models_own_three_times_as_far_out():
    model = one_layer()
    task = planted(model, rank=2)
    with torch.no_grad():
        assert torch.equal(task.off_domain.targets, model(task.off_domain.inputs))
        assert not torch.allclose(task.validation.targets, model(task.validation.inputs), atol=0.1)
    assert float(task.off_domain.inputs.std()) == pytest.approx(3.0, rel=0.05)
    assert float(task.train.inputs.std()) == pytest.approx(1.0, rel=0.05)
    rows = [tuple(row) for part in task.parts.values() for row in part.inputs.tolist()]
    assert len(set(rows)) == len(rows) == 512 + 3 * 256  # parts share no input


def test_planted_touches_the_target_layers_only_and_leaves_the_model_alone():
    model = DigitsMLP(width=16).train()
    before = copy.deepcopy(model.state_dict())
    task = planted(model, rank=3, noise=0.0, targets=["head"])
    assert model.training is True
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = task.validation.inputs
    with torch.no_grad():
        hidden = F.relu(model.hidden2(F.relu(model.hidden1(inputs))))
        assert not torch.allclose(model(inputs), task.validation.targets, atol=1e-2)
    assert least_squares(Examples(hidden, task.validation.targets))[2].abs().max() < 1e-4
    everywhere = planted(model, rank=3, noise=0.0)
    assert least_squares(Examples(hidden, everywhere.validation.targets))[2].abs().max() > 1e-2


def test_planted_repeats_by_seed_and_leaves_the_global_generator_alone():
    model = one_layer()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = planted(model, seed=4).fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert planted(model, seed=4).fingerprint == first
    assert planted(model, seed=5).fingerprint != first


def test_a_planted_task_is_made_on_the_cpu_wherever_the_model_is_and_of_its_type(monkeypatch):
    model, moved = one_layer(), []
    monkeypatch.setattr(nn.Module, "cpu", lambda self: moved.append(self) or self)
    task = planted(model.double())
    assert len(moved) == 1  # a copy:
    assert moved[0] is not model
    tensors = [tensor for part in task.parts.values() for tensor in (part.inputs, part.targets)]
    assert all(tensor.dtype == torch.float64 and not tensor.requires_grad for tensor in tensors)


# Arrays


def test_classes_become_numbers_and_each_part_has_them_all():
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    task = from_arrays(X, names)
    assert task.loss is cross_entropy
    assert [len(task.parts[part]) for part in ("train", "validation", "test")] == [120, 15, 15]
    for part in ("train", "validation", "test"):
        assert task.parts[part].targets.bincount().tolist() == [len(task.parts[part]) // 3] * 3
    rows = {tuple(row): name for row, name in zip(np.float32(X).tolist(), y.tolist(), strict=True)}
    for inputs, targets in ((task.parts[part].inputs, task.parts[part].targets) for part in ("train", "test")):
        assert [rows[tuple(row)] for row in inputs.tolist()] == targets.tolist()
    assert torch.equal(task.off_domain.inputs, task.test.inputs)
    assert "off-domain: the test part" in task.about
    assert from_arrays(X, names).fingerprint == task.fingerprint != from_arrays(X, names, seed=1).fingerprint


def test_numbers_are_predicted_in_columns():
    X, y = load_diabetes(return_X_y=True)
    task = from_arrays(X, y + 0.5)
    assert task.loss is mean_squared_error
    assert task.train.targets.shape == (442 - 2 * 44, 1)
    assert from_arrays(X, np.stack([y, -y], 1), kind="regression").test.targets.shape == (44, 2)
    assert from_arrays(X, y).loss is cross_entropy  # its numbers are whole
    tensors = [torch.tensor(each, requires_grad=True) for each in (X, y + 0.5)]
    assert from_arrays(*tensors).fingerprint == task.fingerprint
    assert from_arrays(X, y > 100).train.targets.unique().tolist() == [0, 1]


def test_a_task_of_arrays_trains():
    X, y = load_digits(return_X_y=True)
    task = from_arrays(X / 16, y)
    history = fit(DigitsMLP(), task, LoRA(8), steps=60, lr=2e-2, batch_size=32)
    assert history.rows[-1]["validation_loss"] < 0.7 * history.rows[0]["validation_loss"]


# What is refused

NAN, X = float("nan"), np.ones((20, 2))
REFUSED = [  # what is asked for, and what must be named
    *((lambda n=n, p=p: digits(p, n_train=n), f"n_train is {n}") for n in (0, 1201) for p in ("pretrain", "adapt")),
    (lambda: digits(n_train=601, change="other digits"), "n_train is 601"),
    (lambda: digits(change="mirrored"), "change is 'mirrored'"),
    (lambda: digits(part="train"), "part is 'train'"),
    (lambda: digits(seed=10**400), "seed is "),
    (lambda: planted(one_layer(), noise=-0.1), "noise is -0.1"),
    (lambda: planted(one_layer(), noise=10**400), "noise is 1"),
    (lambda: planted(one_layer(), rank=0), "rank is 0"),
    (lambda: planted(one_layer(), targets=["head"]), "'head' matches no module"),
    (lambda: planted(one_layer(), n_train=0), "n_train is 0"),
    (lambda: planted(nn.Flatten()), "A Flatten has no linear layer"),
    (lambda: from_arrays(X, np.arange(19)), "19"),
    (lambda: from_arrays(np.ones((9, 2)), np.arange(9)), "at least 10"),
    (lambda: from_arrays(X, 5), "y has"),
    (lambda: from_arrays(np.ones(20), np.arange(20)), "X has shape .20,"),
    (lambda: from_arrays(X * NAN, np.arange(20)), "X must"),
    (lambda: from_arrays(X, np.zeros(20)), "class 0.0"),
    (lambda: from_arrays(X, np.zeros((20, 2))), r"y has shape \(20, 2\)"),
    (lambda: from_arrays(X, np.full(20, np.inf), kind="regression"), "y must"),
    (lambda: from_arrays(X, np.array(["a", "b"] * 10), kind="regression"), "y must"),
    (lambda: from_arrays(X, pandas.Series([1, None] * 10, dtype="Int64"), kind="regression"), "y must"),
    (lambda: from_arrays(X, ["a", None] * 10), "missing"),
    (lambda: from_arrays(X, ["a", "b", NAN, "c"] * 5), "missing"),
    (lambda: from_arrays(X, pandas.Series(["a", None] * 10, dtype="string")), "missing"),
    (lambda: from_arrays(X, [0.0, 1.0, NAN, 1.0] * 5, kind="classification"), "missing"),
    (lambda: from_arrays(X, np.arange(20), kind="ranking"), "kind is 'ranking'"),
    (lambda: from_arrays(X, np.arange(20), seed=-1), "seed is -1"),
]


@pytest.mark.parametrize(("call", "named"), REFUSED)
def test_what_makes_no_task_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()
