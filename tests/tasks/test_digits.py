"""The task digits: parts that share no picture, moved or as they are."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lora_lab.inject import LoRAConfig, inject
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.tasks import Examples, Task, digits

PARTS = ("train", "validation", "test", "off_domain")


@pytest.fixture(scope="module")
def pictures():
    """Each upright picture's 64 pixels -> its place in scikit-learn's data."""
    found = {tuple(picture): i for i, picture in enumerate((load_digits().data / 16).tolist())}
    assert len(found) == 1797  # no two are equal
    return found


def upright(inputs):
    """Moved pictures back up: all but the last row, which is lost."""
    return [tuple(picture[8:]) for picture in inputs.tolist()]


def test_parts_of_digits_share_no_picture_and_use_every_one(pictures):
    before, after = digits("pretrain"), digits("adapt")
    cut = {picture[:56]: i for picture, i in pictures.items()}
    assert len(cut) == 1797
    labels = load_digits().target
    places = {}
    for part in PARTS[:3]:
        places["pretrain", part] = [pictures[tuple(picture)] for picture in before.parts[part].inputs.tolist()]
        places["adapt", part] = [cut[picture] for picture in upright(after.parts[part].inputs)]
    used = [place for part in places.values() for place in part]
    assert sorted(used) == list(range(1797))
    assert [len(part) for part in places.values()] == [700, 500, 100, 200, 100, 197]
    for (name, part), rows in places.items():
        task = before if name == "pretrain" else after
        assert task.parts[part].targets.tolist() == labels[rows].tolist()


def test_pictures_to_adapt_to_are_moved_down_by_exactly_one_row():
    train = digits("adapt").train.inputs.view(-1, 8, 8)
    assert torch.equal(train[:, 0], torch.zeros(500, 8))
    assert train[:, 1].abs().sum() > 0
    assert 0 <= train.min() < train.max() == 1
    assert digits("pretrain").train.inputs.view(-1, 8, 8)[:, 0].abs().sum() > 0


def test_off_domain_digits_are_those_of_the_other_kind_and_not_trained_on(pictures):
    before, after = digits("pretrain"), digits("adapt")
    known = {tuple(picture) for picture in after.off_domain.inputs.tolist()}
    assert known <= pictures.keys()
    assert not known & {tuple(picture) for picture in before.train.inputs.tolist()}
    assert torch.equal(before.off_domain.inputs, after.validation.inputs)
    trained = {tuple(picture) for picture in after.train.inputs.tolist()}
    assert not trained & {tuple(picture) for picture in before.off_domain.inputs.tolist()}


def test_digits_are_split_by_seed_and_not_by_the_global_generator():
    torch.manual_seed(1)
    first = digits("adapt", seed=5).fingerprint
    torch.manual_seed(2)
    assert digits("adapt", seed=5).fingerprint == first
    assert digits("adapt", seed=6).fingerprint != first
    assert digits("pretrain", seed=5).fingerprint != first


def split_as_before(part, seed=0):
    """The task of 500 moved pictures, with the split that it has always had."""
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
def test_digits_are_split_as_before_unless_another_size_is_asked_for(part):
    for seed in (0, 3):
        assert digits(part, seed).fingerprint == split_as_before(part, seed).fingerprint
        assert digits(part, seed, n_train=500).fingerprint == split_as_before(part, seed).fingerprint
        assert digits(part, seed, n_train=501).fingerprint != split_as_before(part, seed).fingerprint
    assert split_as_before(part, 0).fingerprint != split_as_before(part, 3).fingerprint


@pytest.mark.parametrize(
    ("n_train", "as_is"),
    [(1, (1199, 100, 100)), (1000, (200, 100, 100)), (1024, (188, 94, 94)), (1200, (100, 50, 50))],
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


REFUSED = [
    *({"n_train": n_train, "part": part} for n_train in (0, -3, 1201) for part in ("pretrain", "adapt")),
    {"n_train": 601, "change": "other digits"},
    {"change": "mirrored"},
    {"part": "train"},
    {"seed": 10**400},
]


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_be_asked_for_is_named(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is "):
        digits(**options)


def test_the_most_digits_and_a_seed_of_numpy_are_taken():
    assert len(digits("adapt", n_train=1200).train) == 1200
    assert digits(seed=np.int64(3)).fingerprint == digits(seed=3).fingerprint != digits(seed=4).fingerprint


def test_inverted_digits_are_split_as_moved_ones_and_have_black_and_white_swapped(pictures):
    moved, inverted = digits("adapt"), digits("adapt", change="inverted")
    for part in PARTS[:3]:
        swapped = [tuple(picture) for picture in (1 - inverted.parts[part].inputs).tolist()]
        assert [picture[:56] for picture in swapped] == upright(moved.parts[part].inputs)
        assert set(swapped) <= pictures.keys()
        assert torch.equal(inverted.parts[part].targets, moved.parts[part].targets)
    assert torch.equal(inverted.off_domain.inputs, moved.off_domain.inputs)
    for part in PARTS[:3]:
        assert torch.equal(
            digits("pretrain", change="inverted").parts[part].inputs, digits("pretrain").parts[part].inputs
        )


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


@pytest.mark.parametrize("net", [DigitsMLP, DigitsTransformer])
def test_nets_in_float64_read_pictures_in_float32(net):
    pictures = digits().train.inputs[:4]
    double = net(dtype=torch.float64)
    assert torch.equal(double(pictures), double(pictures.double()))
    inject(double, LoRAConfig(2))
    assert double(pictures).dtype == torch.float64
    assert net()(pictures).dtype == pictures.dtype == torch.float32
