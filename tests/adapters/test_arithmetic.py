"""Adapters added to one: beside PEFT's add_weighted_adapter, and beside sums of matrices."""

import math
import re

import peft
import pytest
import torch

from lora_lab import DoRA, LoRAConfig, adapter_state, adapters, inject, load_adapter, lora_layers, save_adapter
from lora_lab.adapters import combine
from lora_lab.models.digits import DigitsMLP
from lora_lab.variants import RsLoRALinear
from tests.helpers import PIXELS, logits, randomise
from tests.tiny_models import Pictures, pictures

WEIGHTS = (0.7, -0.4)


def adapted(seed, rank=3, alpha=6.0, targets="all-linear", layer=None, base=DigitsMLP):
    model = base()
    inject(model, LoRAConfig(rank, alpha, targets=targets), layer=layer)
    return randomise(model, seed)


def updates(model):
    return {name: layer.delta() for name, layer in lora_layers(model).items()}


def weighted_sum(models, weights):
    total = {}
    for model, weight in zip(models, weights, strict=True):
        for name, update in updates(model).items():
            total[name] = total.get(name, 0) + weight * update
    return total


@pytest.mark.parametrize(("how", "ranks"), [("cat", (3, 5)), ("svd", (3, 5)), ("linear", (3, 3))])
def test_each_rule_is_that_of_peft(how, ranks, tmp_path):
    ours = [adapted(1, ranks[0]), adapted(2, ranks[1], alpha=2.0)]
    folders = [save_adapter(model, tmp_path / name) for model, name in zip(ours, "ab", strict=True)]
    theirs = peft.PeftModel.from_pretrained(DigitsMLP(), folders[0], adapter_name="a")
    theirs.load_adapter(folders[1], adapter_name="b")
    rank = 4 if how == "svd" else None
    theirs.add_weighted_adapter(["a", "b"], list(WEIGHTS), "both", combination_type=how, svd_rank=rank)
    state = combine(folders, WEIGHTS, how, rank)
    names = list(lora_layers(ours[0]))
    assert {key for key in state if key.endswith("lora_A")} == {f"{name}.lora_A" for name in names}
    for name in names:
        expected = theirs.base_model.model.get_submodule(name).get_delta_weight("both")
        found = state[f"{name}.scaling"] * (state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]).double()
        assert expected.norm() > 0.1
        torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [None, RsLoRALinear])
def test_side_by_side_is_the_sum_to_rounding_and_runs_as_a_model(layer):
    models = [adapted(1, layer=layer), adapted(2, 5, targets=["hidden1", "head"], layer=layer)]
    state = combine([adapter_state(model) for model in models], WEIGHTS)
    total = weighted_sum(models, WEIGHTS)
    together = DigitsMLP()
    assert load_adapter(together, state) == list(total)
    for name, update in updates(together).items():
        torch.testing.assert_close(update, total[name], rtol=0, atol=1e-6)
    assert {name: layer.rank for name, layer in lora_layers(together).items()} == {
        "hidden1": 8,
        "hidden2": 3,
        "head": 8,
    }
    assert set(state.errors.values()) == {0.0}
    plain = DigitsMLP()
    with torch.no_grad():
        for name, update in total.items():
            plain.get_submodule(name).weight += update
    torch.testing.assert_close(logits(together, PIXELS), logits(plain, PIXELS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ["linear", "svd"])
def test_the_error_is_stated_where_the_sum_is_not_met(how):
    models = [adapted(1), adapted(2)]
    state = combine([adapter_state(model) for model in models], WEIGHTS, how, 4 if how == "svd" else None)
    for name, total in weighted_sum(models, WEIGHTS).items():
        found = state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        error = float((total - found).norm() / total.norm())
        assert state.errors[name] == pytest.approx(error, rel=1e-4)
        assert error > 0.05
        if how == "svd":  # no matrix of rank 4 is nearer
            assert error == pytest.approx(float(torch.linalg.svdvals(total)[4:].norm() / total.norm()), rel=1e-4)


def test_linear_counts_the_products_of_different_adapters_too():
    state, once = adapter_state(adapted(1)), updates(adapted(1))
    halves = combine([state, state], [0.5, 0.5], "linear")  # (A + A) / 2^0.5 and (B + B) / 2^0.5
    for name, update in once.items():
        torch.testing.assert_close(halves[f"{name}.lora_B"] @ halves[f"{name}.lora_A"], 2 * update, rtol=0, atol=1e-5)
        assert halves.errors[name] == pytest.approx(1, rel=1e-4)
    nothing = combine([state, state], [1, -1])
    assert all(float((nothing[f"{name}.lora_B"] @ nothing[f"{name}.lora_A"]).norm()) < 1e-4 for name in once)


def test_convolutions_and_embeddings_add_up_too():
    models = [pictures(seed=1, rank=2), pictures(seed=2, rank=3)]
    total = weighted_sum(models, (1.0, 1.0))
    for how, rank in (("cat", None), ("svd", 50)):
        together = Pictures()
        load_adapter(together, combine([adapter_state(model) for model in models], how=how, rank=rank))
        for name, update in updates(together).items():
            torch.testing.assert_close(update, total[name], rtol=0, atol=1e-5)


def test_a_combined_adapter_can_be_switched_to_saved_and_read(tmp_path):
    model = adapted(3, rank=2)
    state = combine([adapter_state(adapted(1)), adapter_state(adapted(2))], how="svd", rank=2)
    adapters.switch(model, dict(state))
    before = logits(model, PIXELS)
    again = combine([save_adapter(model, tmp_path)])
    assert all(torch.equal(again[key], state[key]) for key in state if key.endswith(("lora_B", "scaling")))
    read = DigitsMLP()
    load_adapter(read, tmp_path)
    torch.testing.assert_close(logits(read, PIXELS), before, rtol=0, atol=1e-6)


def test_half_precision_is_added_in_float32(tmp_path):
    folders = [save_adapter(adapted(seed), tmp_path / str(seed), dtype=torch.float16) for seed in (1, 2)]
    assert combine(folders)["hidden1.lora_A"].dtype == torch.float32


STATE = adapter_state(adapted(1))
WIDE = adapter_state(adapted(1, base=lambda: DigitsMLP(width=16)))
NARROW = adapter_state(adapted(1, base=lambda: DigitsMLP(width=8)))


def lengths():
    model = DigitsMLP()
    DoRA(3).prepare(model, 0)
    return adapter_state(model)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([],), "0 adapters and 0 weights"),
        (([STATE], [1.0, 2.0]), "1 adapters and 2 weights"),
        (([STATE], [float("nan")]), "must be a finite number"),
        (([STATE], None, "ties"), "how is 'ties', but it must be one of"),
        (([STATE], None, "svd"), "a rank is for 'svd', which needs one"),
        (([STATE], None, "cat", 4), "a rank is for 'svd'"),
        (([STATE], None, "svd", 0), "rank is 0"),
        (([WIDE, NARROW],), "layers of different shapes"),
        (([STATE, adapter_state(adapted(1, rank=2))], None, "linear"), "ranks [3, 2], but 'linear' needs equal ones"),
        (([STATE, lengths()],), "does not add up with others"),
        (([{**STATE, "head.lora_A": STATE["head.lora_A"] * math.nan}],), "head.lora_A holds numbers that are NaN"),
        (([{key: value for key, value in STATE.items() if key != "head.lora_B"}],), "head.lora_B"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_a_sentence(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        combine(*arguments)
