"""Trials as data: one identity for one content, everywhere, and grids of them."""

import copy
import dataclasses
import itertools
import json
import os
import subprocess

import numpy as np
import pytest
import torch

from lora_lab import DoRA, FullFineTuning, Lean, LoRA, LoRAPlus, PartialFineTuning, PiSSA, RsLoRA, fit
from lora_lab.ablation.grid import Grid, Trial, hash_content
from lora_lab.methods import AsItIs
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import planted
from lora_lab.train import TrainConfig
from lora_lab.variants import LoRAFA
from tests.helpers import run_python

METHODS = [
    FullFineTuning(),
    PartialFineTuning(("head", "hidden1")),
    AsItIs(),
    LoRA(rank=4, alpha=8, dropout=0.1, targets=["q_proj", "v_proj"], exclude=("head",)),
    RsLoRA(rank=4),
    LoRAFA(rank=4),
    PiSSA(rank=4),
    DoRA(rank=4),
    LoRAPlus(rank=4, ratio=3.0),
]


def trial(method=None, lr=0.01, seed=0, **options):
    return Trial(method or LoRA(rank=4), lr, seed, **{"steps": 100} | options)


# Identity


def test_the_key_is_the_hash_of_this_text():
    # Written out, so that no change of the code can make the results of older folders strangers unnoticed.
    text = (
        '{"batch_size":8,"clip":1,"eval_every":10,"eval_examples":null,"lr":0.01,'
        '"method":{"alpha":16,"dropout":0,"exclude":[],"name":"lora","rank":4,"targets":"all-linear"},'
        '"model":null,"schedule":"cosine","seed":0,"steps":100,"task":null,"warmup":10,"weight_decay":0}'
    )
    hashed = subprocess.run(["sha256sum"], input=text, capture_output=True, text=True, check=True).stdout
    assert trial().key == hashed[:16]


def test_the_key_is_the_same_in_another_process_whatever_its_hash_seed():
    targets = list("qkvogudabc")  # so many that two seeds do not put them in one order by chance
    script = (
        "from lora_lab import LoRA; from lora_lab.ablation.grid import Trial\n"
        f"print(Trial(LoRA(rank=4, targets={targets}), 0.1 + 0.2, 3, steps=50, task='t', model='m').key)"
    )
    key = trial(LoRA(rank=4, targets=targets), 0.1 + 0.2, 3, steps=50, task="t", model="m").key
    other = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    assert run_python(script, PYTHONHASHSEED=other).stdout.strip() == key


@pytest.mark.parametrize(
    "twin",
    [
        trial(LoRA(rank=4, alpha=16)),
        trial(LoRA(rank=4, exclude=[])),
        trial(lr=np.float64(0.01), seed=np.int64(0), steps=np.int32(100)),
        trial(weight_decay=0),
        trial(weight_decay=-0.0),
        trial(clip=1),
        trial(warmup=10, eval_every=10),
        trial(batch_size=8, schedule="cosine", eval_examples=None),
    ],
    ids=["int alpha", "list", "numpy", "int", "minus zero", "int clip", "defaults of steps", "defaults"],
)
def test_equal_contents_have_equal_keys(twin):
    assert twin.key == trial().key
    assert twin == trial()
    assert len({twin, trial()}) == 1


def test_every_part_of_the_content_changes_the_key():
    changes = {
        "method": LoRA(rank=5),
        "lr": 0.02,
        "seed": 1,
        "steps": 101,
        "batch_size": 9,
        "schedule": "constant",
        "warmup": 11,
        "weight_decay": 0.1,
        "clip": None,
        "eval_every": 5,
        "eval_examples": 3,
        "task": "0123",
        "model": "4567",
    }
    assert set(changes) == set(trial().to_dict())
    changes["batches"] = "by_length"  # part of the content only if it is not the default
    keys = [trial().key, *(dataclasses.replace(trial(), **{name: value}).key for name, value in changes.items())]
    assert len(set(keys)) == len(keys)
    assert dataclasses.replace(trial(), lr=0.02) != trial()


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"gradient_checkpointing": True},
        {"lean": Lean()},
        {"lean": Lean(checkpoint=True, threads=2, loss_rows=64)},
    ],
    ids=str,
)
def test_how_a_step_is_computed_is_no_part_of_the_content(options):
    one = trial(**options)
    assert one.to_dict() == trial().to_dict()
    assert one == trial()
    bound = dataclasses.replace(one, task="t", model="m")
    for name, value in options.items():
        assert getattr(bound, name) == value != getattr(trial(), name)  # it is not lost on the way
    assert all(getattr(each, name) == value for each in Grid([1], [0.1], [0], steps=3, **options) for name in options)


BFLOAT16 = Lean(torch.bfloat16, checkpoint=True, threads=2)


@pytest.mark.parametrize(
    ("options", "content"),
    [
        ({"batches": "by_length"}, {"batches": "by_length"}),
        ({"autocast": torch.bfloat16}, {"autocast": "torch.bfloat16"}),
        ({"lean": BFLOAT16}, {"base_dtype": "torch.bfloat16"}),
    ],
)
def test_what_changes_a_result_is_in_the_content_where_it_is_not_the_default(options, content):
    one = trial(**options)
    assert one.to_dict() == trial().to_dict() | content
    assert one.key != trial().key
    assert dataclasses.replace(one, task="t", model="m").settings() == one.settings()


def test_methods_of_the_same_numbers_differ_in_key():
    kinds = (LoRA, RsLoRA, LoRAFA, PiSSA, DoRA, LoRAPlus)
    assert len({trial(kind(rank=4)).key for kind in kinds}) == len(kinds)
    assert trial(LoRA(rank=4)) != "a trial"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_content_has_the_same_key_when_it_comes_back_from_json(method):
    one = trial(method, lr=1 / 3, clip=None, task="t", model="m")
    back = json.loads(json.dumps(one.to_dict(), sort_keys=True))
    assert back == one.to_dict()
    assert hash_content(back) == one.key != hash_content(back | {"seed": 9})


# Values


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_a_trial_says_what_fit_would_have_done_and_is_a_config(steps):
    one, model = trial(LoRA(rank=2), seed=2, steps=steps), DigitsMLP(width=4)
    task = planted(model, rank=1, n_train=16)
    said, done = (
        fit(copy.deepcopy(model), task, one.method, **how)
        for how in ({"config": one}, {"steps": steps, "lr": 0.01, "seed": 2})
    )
    assert one.settings() == said.settings == done.settings
    assert [row["train_loss"] for row in said.rows] == [row["train_loss"] for row in done.rows]
    assert Trial(LoRA(rank=4), **vars(TrainConfig(lr=0.01, steps=100, clip=None))) == trial(clip=None) != trial()


def test_numpys_numbers_become_pythons():
    one = trial(lr=np.float32(0.5), seed=np.int64(3), steps=np.int32(100), clip=np.float64(0.25))
    assert [type(value) for value in (one.lr, one.seed, one.steps, one.clip)] == [float, int, int, float]
    assert one == trial(lr=0.5, seed=3, clip=0.25)
    json.dumps(one.settings())


# Grids


def test_a_grid_is_the_product():
    grid = Grid([1, 2, 4], [0.01, 0.1], range(3), steps=20, batch_size=4)
    expected = itertools.product([1, 2, 4], [0.01, 0.1], range(3))
    assert [(one.method.rank, one.lr, one.seed) for one in grid] == list(expected)
    assert len(grid) == 18
    assert {(one.steps, one.batch_size, type(one.method)) for one in grid} == {(20, 4, LoRA)}
    assert grid[5] == list(grid)[5]
    assert grid[5] in grid
    assert trial() not in grid
    assert repr(grid) == "Grid of 18 trials"


@pytest.mark.parametrize(
    ("rule", "alphas"),
    [({}, [5, 5, 5]), ({"alpha": 16}, [16, 16, 16]), ({"alpha_per_rank": 2}, [2, 4, 8])],
    ids=["the template's", "fixed", "per rank"],
)
def test_alpha_follows_the_rule(rule, alphas):
    grid = Grid([1, 2, 4], [0.01], [0], [LoRA(alpha=5)], steps=20, **rule)
    assert [one.method.alpha for one in grid] == alphas


def test_methods_keep_what_is_not_the_grids_and_those_without_a_rank_are_tried_once():
    templates = [LoRAPlus(ratio=3, targets=["a"]), FullFineTuning()]
    grid = Grid(np.array([1, 2]), [0.01], [0, 1], templates, steps=20, alpha_per_rank=2)
    found = [(one.method, one.seed) for one in grid]
    plus = [LoRAPlus(rank=rank, alpha=2 * rank, ratio=3, targets=["a"]) for rank in (1, 2)]
    assert found == [(method, seed) for method in (*plus, FullFineTuning()) for seed in (0, 1)]
    assert len(Grid([], [0.01], [0], [FullFineTuning()], steps=20)) == 1


def test_repeats_are_left_out():
    assert len(Grid([4, 4], [0.1, 0.1], [0, 0, 1], steps=20)) == 2


# What is refused


class Nameless(LoRA):
    """Its results would look like LoRA's."""


def changed(**changes):
    return lambda: dataclasses.replace(trial(), **changes)


def grid(**changes):
    return lambda: Grid(**{"ranks": [1], "lrs": [0.01], "seeds": [0], "steps": 2, **changes})


REFUSED = [  # the call, and what must be named
    (lambda: trial(Nameless(rank=4)), "class Nameless has no name of its own"),
    (changed(lr=-1.0), "lr is -1.0"),
    (changed(warmup=101), "warmup is 101, but it must be at most steps, 100"),
    (changed(seed=1.5), "seed is 1.5"),
    (grid(ranks=[1.5]), "rank is 1.5"),
    (grid(ranks=[10**20]), "rank is 100000000000000000000"),
    (grid(seeds=[10**20]), "seed is 100000000000000000000"),
    (grid(alpha=0), "alpha is 0"),
    (grid(alpha=16, alpha_per_rank=2), "alpha is 16 and alpha_per_rank 2"),
    *((grid(**{name: []}), f"{name} is empty") for name in ("ranks", "lrs", "seeds", "methods")),
]


@pytest.mark.parametrize(("call", "named"), REFUSED)
def test_what_is_no_trial_and_no_grid_is_refused_and_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
