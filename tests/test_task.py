"""A task: its parts, fingerprints that tell data apart, and its loss."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch.nn import functional as F

from lora_lab import LoRA, fit
from lora_lab.models.digits import DigitsMLP
from lora_lab.task import accepts
from lora_lab.tasks import IGNORE, Examples, Task, cross_entropy, digits, mean_squared_error
from tests.helpers import ROOT, run_python, small_task

PARTS = ("train", "validation", "test", "off_domain")


def tiny(**changes):
    def part(n):
        return Examples(torch.arange(3.0 * n).view(n, 3), torch.arange(n))

    return Task(**({"name": "tiny", **{name: part(i + 2) for i, name in enumerate(PARTS)}} | changes))


# Task


def test_each_class_of_models_is_asked_for_its_own_arguments():
    class Masked(torch.nn.Module):
        def forward(self, x, attention_mask): ...

    asked = Masked(), torch.nn.Linear(2, 2), Masked()  # in turn, because the last answer is kept
    assert [accepts(model, "attention_mask") for model in asked] == [True, False, True]


def test_examples_are_indexed_by_rows():
    part = tiny().off_domain
    assert len(part) == 5
    chosen = part[torch.tensor([3, 0])]
    assert chosen.inputs.tolist() == [[9.0, 10.0, 11.0], [0.0, 1.0, 2.0]]
    assert chosen.targets.tolist() == [3, 0]
    assert part[1:3].targets.tolist() == [1, 2]


def other_loss(model, inputs, targets):
    return F.cross_entropy(model(inputs), targets)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("field", ["inputs", "targets"])
def test_fingerprint_differs_when_any_one_value_does(part, field):
    task = tiny()
    changed = copy.deepcopy(task)
    getattr(changed.parts[part], field).view(-1)[-1] += 1
    assert changed.fingerprint != task.fingerprint
    getattr(changed.parts[part], field).view(-1)[-1] -= 1
    assert changed.fingerprint == task.fingerprint


def test_fingerprint_differs_with_order_part_shape_dtype_name_and_loss():
    task = tiny()
    part = task.train
    others = [
        tiny(train=part[torch.tensor([1, 0])]),
        tiny(train=task.validation, validation=part),
        tiny(train=Examples(part.inputs.reshape(2, 1, 3), part.targets)),
        tiny(train=Examples(part.inputs.view(torch.int32), part.targets)),
        tiny(train=part[:1]),
        tiny(name="other"),
        tiny(loss=other_loss),
    ]
    assert len({each.fingerprint for each in (task, *others)}) == 8
    assert tiny().fingerprint == task.fingerprint


def test_fingerprint_is_that_of_the_values_not_of_their_layout_in_memory():
    inputs = torch.arange(12.0).view(3, 4).T
    assert not inputs.is_contiguous()
    one, other = (
        tiny(test=Examples(each, torch.arange(4)))
        for each in (inputs, inputs.clone(memory_format=torch.contiguous_format))
    )
    assert one.fingerprint == other.fingerprint


def test_targets_count_unless_they_are_ignored_whatever_the_unit():
    part = Examples(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 0]]))
    tokens, examples = tiny(unit="tokens"), tiny()
    assert (tokens.count_targets(part), tokens.size(part)) == (3, 3)
    assert (examples.count_targets(part), examples.size(part)) == (3, 2)
    classes = Examples(torch.zeros(3, 1), torch.tensor([4, IGNORE, 0]))
    assert (examples.count_targets(classes), examples.size(classes)) == (2, 3)
    assert part.target_counts.tolist() == [2, 1]
    assert classes.target_counts.tolist() == [1, 0, 1]


def test_targets_in_floating_point_all_count():
    part = Examples(torch.zeros(2, 3), torch.tensor([[1.0, IGNORE], [IGNORE, IGNORE]]))  # temperatures, say
    assert (tiny().count_targets(part), tiny().size(part)) == (2, 2)


def test_limited_keeps_the_first_examples_and_all_other_parts():
    task = tiny(train=tiny().off_domain)
    fewer = task.limited(2)
    assert torch.equal(fewer.train.inputs, task.train.inputs[:2])
    assert torch.equal(fewer.train.targets, task.train.targets[:2])
    assert all(fewer.parts[name] is task.parts[name] for name in PARTS[1:])
    assert (fewer.name, fewer.loss, fewer.unit) == (task.name, task.loss, task.unit)
    assert fewer.fingerprint != task.fingerprint
    assert task.limited(5).fingerprint == task.fingerprint


def test_limited_draws_by_seed():
    task = digits("adapt")
    first, again, other = (task.limited(20, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, task.limited(20).fingerprint}) == 3
    rows = {(tuple(x.tolist()), int(y)) for x, y in zip(task.train.inputs, task.train.targets, strict=True)}
    drawn = {(tuple(x.tolist()), int(y)) for x, y in zip(first.train.inputs, first.train.targets, strict=True)}
    assert len(drawn) == 20
    assert drawn <= rows


# Losses


def test_cross_entropy_is_the_mean_over_counted_targets_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5).bfloat16()
    targets = torch.tensor([[1, IGNORE, 4], [IGNORE, 0, 2]])
    log_chances = torch.log_softmax(logits.double(), dim=-1)
    places = [(0, 0, 1), (0, 2, 4), (1, 1, 0), (1, 2, 2)]
    expected = -sum(float(log_chances[place]) for place in places) / 4
    found = cross_entropy(lambda inputs: logits, None, targets)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-6)
    classes = cross_entropy(lambda inputs: logits[:, 0], None, torch.tensor([1, 3]))
    assert float(classes) == pytest.approx(-float(log_chances[0, 0, 1] + log_chances[1, 0, 3]) / 2, rel=1e-6)


def test_mean_squared_error_is_the_mean_over_all_numbers():
    found = mean_squared_error(lambda x: 2 * x, torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]))
    assert float(found) == (4 + 9) / 2


# Losses that are no plain function


def focal(model, inputs, targets, gamma=0.0, weights=None):
    losses = F.cross_entropy(model(inputs), targets, reduction="none", weight=weights)  # (batch,)
    return (losses * (1 - (-losses).exp()) ** gamma).mean()  # ()


@dataclasses.dataclass
class Focal:
    """It can be called, compares by its field, and so cannot be hashed."""

    gamma: float

    def __call__(self, model, inputs, targets):
        return focal(model, inputs, targets, self.gamma)


class Held:
    """It says nothing of what it holds."""

    def __init__(self, gamma):
        self.gamma = gamma

    def __call__(self, model, inputs, targets):
        return focal(model, inputs, targets, self.gamma)


UNUSUAL = {
    "partial": functools.partial(focal, gamma=2.0),
    "partial of a partial": functools.partial(functools.partial(focal), weights=torch.ones(10)),
    "lambda": lambda model, inputs, targets: focal(model, inputs, targets, 2.0),
    "dataclass": Focal(2.0),
    "object": Held(2.0),
    "method": Held(2.0).__call__,
}


EACH = pytest.mark.parametrize("loss", UNUSUAL.values(), ids=UNUSUAL)


def test_a_partials_arguments_are_part_of_the_fingerprint():
    long = torch.zeros(5000)  # torch prints only the ends of it
    longer = long.clone()
    longer[2500] = 1
    losses = [
        focal,
        functools.partial(focal),
        functools.partial(other_loss),
        functools.partial(focal, gamma=1.0),
        functools.partial(focal, gamma=2.0),
        functools.partial(focal, weights=long),
        functools.partial(focal, weights=longer),
        functools.partial(focal, weights=[long]),
        functools.partial(focal, weights={"a": longer}),
        functools.partial(focal, weights=long.numpy()),
        functools.partial(focal, weights=longer.numpy()),
        functools.partial(focal, weights=focal),
        functools.partial(focal, weights=Held(1.0)),
        functools.partial(focal, weights=Focal(1.0)),
        functools.partial(focal, weights=Focal(2.0)),
        Focal(1.0),
        Focal(2.0),
        Held(1.0),
    ]
    assert len({tiny(loss=loss).fingerprint for loss in losses}) == len(losses)
    one, other = functools.partial(focal, gamma=1, weights=None), functools.partial(focal, weights=None, gamma=1)
    assert tiny(loss=one).fingerprint == tiny(loss=other).fingerprint


def test_what_a_plain_object_holds_and_what_a_lambda_does_are_no_part_of_it():
    def lambdas():
        return [lambda model, inputs, targets: model(inputs).sum(), lambda model, inputs, targets: model(inputs).mean()]

    for one, other in (lambdas(), (Held(1.0), Held(2.0))):
        assert tiny(loss=one).fingerprint == tiny(loss=other).fingerprint


@pytest.mark.slow
def test_the_fingerprint_of_an_unusual_loss_is_the_same_in_another_process():
    # Addresses differ between processes.
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.test_task import *\n"
        "print(*(tiny(loss=loss).fingerprint for loss in UNUSUAL.values()))"
    )
    done = run_python(script, ROOT)
    assert done.stdout.split() == [tiny(loss=loss).fingerprint for loss in UNUSUAL.values()]


@EACH
def test_any_callable_trains_as_a_loss(loss, tmp_path):
    def run(loss, **options):
        model = DigitsMLP(width=8)
        return model, fit(model, small_task(loss), LoRA(rank=2), steps=3, lr=0.05, batch_size=4, **options)

    def plain(model, inputs, targets):  # the same in a function
        return loss(model, inputs, targets)

    (model, history), (twin, expected) = run(loss, checkpoint_dir=tmp_path), run(plain)
    assert history.curve("train_loss") == expected.curve("train_loss")
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    assert run(loss, checkpoint_dir=tmp_path)[1] == history  # it knows its checkpoint again
    assert f"fingerprint {history.task['fingerprint']}" in small_task(loss).describe()


# What is refused

EMPTY = Examples(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
SILENT = Examples(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), IGNORE))
REFUSED = [  # the call, what must be named
    *[(lambda part=part: tiny(**{part: EMPTY}), f"the {part} part") for part in PARTS],
    *[(lambda part=part: tiny(**{part: SILENT}), f"the {part} part") for part in PARTS],
    (lambda: Examples(torch.zeros(3, 1), torch.zeros(2)), "3 inputs .* 2 targets"),
    (lambda: tiny(unit="token"), "unit is 'token'"),
    *[(lambda n=n: tiny().limited(n), f"n_train is {n}") for n in (0, -1, 3)],
    (lambda: tiny().part("valid"), "part is 'valid'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "named"), REFUSED)
def test_what_is_refused_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
