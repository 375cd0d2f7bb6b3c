"""Adapters edited in memory: switched, off, extracted, resized, combined; and adapters read without their model."""

import copy
import re
from contextlib import ExitStack
from functools import partial

import numpy as np
import peft
import pytest
import torch
from torch import nn

from lora_lab import LoRAConfig, LoRALinear, adapter_state, extract, inject, load_adapter, lora_layers, save_adapter
from lora_lab.adapters.edit import off, resize, strength, switch
from lora_lab.adapters.peft_format import combine, read_adapter
from lora_lab.layers import LoRAConv2d, LoRAEmbedding
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear
from tests.helpers import PIXELS, BetweenLinear, logits, randomise, snapshot
from tests.tiny_models import Pictures, pictures


def tuned(base, seed=1, rank=None):
    """A copy whose every parameter has changed; its linear layers by matrices of that rank, or of full rank."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) / 10
            if parameter.ndim == 2 and rank is not None:
                U, S, Vh = np.linalg.svd(noise.numpy(), full_matrices=False)
                noise = torch.from_numpy(U[:, :rank] * S[:rank] @ Vh[:rank])
            parameter.add_(noise)
    return model


def change(name, base, model):
    return (model.get_submodule(name).weight - base.get_submodule(name).weight).detach().numpy()


# Extract


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_an_extracted_adapter_is_the_nearest_of_its_rank(rank):
    base = DigitsMLP()
    model = tuned(base)
    original = copy.deepcopy(base)
    errors = extract(base, model, rank)
    assert list(errors) == list(lora_layers(base))
    for name, layer in lora_layers(base).items():
        delta = change(name, original, model)
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        assert layer.rank == min(rank, len(S))
        np.testing.assert_allclose(layer.delta(), U[:, :rank] * S[:rank] @ Vh[:rank], atol=1e-5)
        assert errors[name] == pytest.approx(np.linalg.norm(S[rank:]) / np.linalg.norm(S), abs=1e-5)
        torch.testing.assert_close(layer.base.weight, original.get_submodule(name).weight, rtol=0, atol=0)
        assert layer.lora_A.requires_grad
        assert not layer.base.weight.requires_grad


def test_a_change_of_low_rank_is_kept_whole_and_the_model_computes_it():
    base = DigitsMLP()
    model = tuned(base, rank=2)
    with torch.no_grad():  # what is no linear layer's weight is not in an adapter
        for parameter, original in zip(model.parameters(), base.parameters(), strict=True):
            if parameter.ndim == 1:
                parameter.copy_(original)
        last = [name for name, _ in base.named_modules()][-1]
        assert change(last, base, model).any()
    errors = extract(base, model.state_dict(), 2)
    assert max(errors.values()) < 1e-5
    torch.testing.assert_close(base(PIXELS), model(PIXELS), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base(PIXELS), DigitsMLP()(PIXELS), atol=1e-2)


def test_an_extracted_adapter_is_saved_and_read_like_any_other(tiny_config, tmp_path):
    base = Llama(tiny_config)
    original, ids = copy.deepcopy(base), torch.arange(12)[None]
    extract(base, tuned(base), 4)
    layer = next(iter(lora_layers(base).values()))
    layer.lora_A.data = layer.lora_A.data.T.contiguous().T  # numbers in another order in memory
    save_adapter(base, tmp_path)
    load_adapter(original, tmp_path)
    torch.testing.assert_close(original(ids), base(ids))
    assert {layer.scaling for layer in lora_layers(original).values()} == {1.0}


def test_layers_that_did_not_change_get_no_adapter():
    base = DigitsMLP()
    model, names = copy.deepcopy(base), [name for name, module in base.named_modules() if hasattr(module, "weight")]
    with torch.no_grad():
        model.get_submodule(names[1]).weight.add_(torch.eye(*base.get_submodule(names[1]).weight.shape))
    assert list(extract(base, model, 4)) == [names[1]]


def test_a_change_that_the_precision_of_the_base_does_not_hold_is_extracted():
    base = DigitsMLP().bfloat16()
    model = copy.deepcopy(base).float()
    with torch.no_grad():
        model.hidden1.weight.mul_(1 + 2**-12)  # bfloat16 has 8 bits
    full = copy.deepcopy(base).float()
    assert extract(base, model, 4) == extract(full, model, 4)
    assert list(lora_layers(base)) == ["hidden1"]
    torch.testing.assert_close(base.hidden1.delta().float(), full.hidden1.delta(), rtol=0.02, atol=1e-6)


def test_compiled_models_are_edited_by_the_names_of_their_own_layers():
    base = DigitsMLP()
    model, plain, compiled = tuned(base), copy.deepcopy(base), copy.deepcopy(base)
    errors = extract(torch.compile(compiled, backend="eager"), torch.compile(model, backend="eager"), 2)
    assert errors == extract(plain, model, 2)
    state = adapter_state(torch.compile(compiled, backend="eager"))
    assert state.keys() == adapter_state(plain).keys()
    load_adapter(base, state)
    torch.testing.assert_close(base(PIXELS), plain(PIXELS))
    other = {name: 2 * value if name.endswith("lora_A") else value for name, value in state.items()}
    switch(torch.compile(plain, backend="eager"), other)
    assert torch.equal(plain.hidden1.lora_A, 2 * base.hidden1.lora_A)


# Resize


@pytest.mark.parametrize("kind", [None, RsLoRALinear, LoRAFALinear])
def test_a_resized_adapter_is_the_nearest_of_its_rank(kind):
    model = DigitsMLP()
    inject(model, LoRAConfig(8, 24), layer=kind)
    randomise(model)
    before = {name: (layer.delta().numpy(), layer.scaling) for name, layer in lora_layers(model).items()}
    errors = resize(model, 3)
    for name, layer in lora_layers(model).items():
        delta, scaling = before[name]
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        assert layer.rank == 3
        assert layer.scaling == pytest.approx(scaling)
        np.testing.assert_allclose(layer.delta(), U[:, :3] * S[:3] @ Vh[:3], atol=1e-4 * S[0])
        assert errors[name] == pytest.approx(np.linalg.norm(S[3:]) / np.linalg.norm(S), rel=1e-3)
        assert 0.05 < errors[name] < 1


def test_embeddings_and_convolutions_are_resized():
    model = torch.nn.Sequential(torch.nn.Embedding(20, 12), torch.nn.Flatten(), torch.nn.Conv2d(3, 8, 3))
    model[0], model[2] = LoRAEmbedding(model[0], 6, 6), LoRAConv2d(model[2], 6, 6)
    randomise(model)
    for name, error in resize(model, 2).items():
        assert 0 < error < 1
        assert lora_layers(model)[name].rank == 2
    assert set(resize(model, 2).values()) == {0.0}  # they are as low already
    assert model[2](torch.randn(1, 3, 8, 8)).shape == (1, 8, 6, 6)
    assert model[0](torch.arange(5)).shape == (5, 12)


def test_a_layer_smaller_than_the_rank_gets_all_it_can_hold():
    model = DigitsMLP()
    inject(model, LoRAConfig(64, 128))
    before = randomise(model).head.delta()
    errors = resize(model, 32)
    assert {name: layer.rank for name, layer in lora_layers(model).items()} == {
        "hidden1": 32,
        "hidden2": 32,
        "head": 10,
    }
    assert errors["head"] == 0
    torch.testing.assert_close(model.head.delta(), before, rtol=1e-4, atol=1e-4)


# Combine

WEIGHTS = (0.7, -0.4)


def digits(seed, rank=3, alpha=6.0, targets="all-linear", layer=None, width=128):
    model = DigitsMLP(width)
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


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_a_combined_adapter_is_that_of_peft_and_resized_the_nearest_of_that_rank(how, tmp_path):
    ours = [digits(1), digits(2, 5, alpha=2.0)]
    folders = [save_adapter(model, tmp_path / name) for model, name in zip(ours, "ab", strict=True)]
    theirs = peft.PeftModel.from_pretrained(DigitsMLP(), folders[0], adapter_name="a")
    theirs.load_adapter(folders[1], adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], list(WEIGHTS), "both", combination_type=how, svd_rank=4)
    together = DigitsMLP()
    load_adapter(together, combine(folders, WEIGHTS))
    if how == "svd":
        resize(together, 4)
    for name, update in updates(together).items():
        expected = theirs.base_model.model.get_submodule(name).get_delta_weight("both")
        assert expected.norm() > 0.1
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [None, RsLoRALinear])
def test_adapters_side_by_side_are_their_sum_and_run_as_a_model(layer):
    models = [digits(1, layer=layer), digits(2, 5, targets=["hidden1", "head"], layer=layer)]
    total = weighted_sum(models, WEIGHTS)
    together, plain = DigitsMLP(), DigitsMLP()
    assert load_adapter(together, combine([adapter_state(model) for model in models], WEIGHTS)) == list(total)
    for name, update in updates(together).items():
        torch.testing.assert_close(update, total[name], rtol=0, atol=1e-6)
        plain.get_submodule(name).weight.data += total[name]
    assert [layer.rank for layer in lora_layers(together).values()] == [8, 3, 8]
    torch.testing.assert_close(logits(together, PIXELS), logits(plain, PIXELS), rtol=0, atol=1e-4)


def test_convolutions_and_embeddings_add_up_and_half_precision_is_added_in_float32(tmp_path):
    models = [pictures(seed=1, rank=2), pictures(seed=2, rank=3)]
    total, together = weighted_sum(models, (1.0, 1.0)), Pictures()
    load_adapter(together, combine([adapter_state(model) for model in models]))
    for name, update in updates(together).items():
        torch.testing.assert_close(update, total[name], rtol=0, atol=1e-5)
    folders = [save_adapter(model, tmp_path / str(len(model.head.lora_A)), dtype=torch.float16) for model in models]
    assert combine(folders)["head.lora_A"].dtype == torch.float32


LAYERS = adapter_state(digits(1))
TERMS = [
    (([],), "0 adapters and 0 weights"),
    (([LAYERS], [1.0, 2.0]), "1 adapters and 2 weights"),
    (([LAYERS], [float("nan")]), "must be a finite number"),
    (([adapter_state(digits(1, width=width)) for width in (16, 8)],), "layers of different shapes"),
    (([LAYERS, adapter_state(digits(1, layer=DoRALinear))],), "of DoRA"),
    (([{**LAYERS, "head.lora_A": LAYERS["head.lora_A"] * torch.nan}],), "head.lora_A holds numbers that are NaN"),
    (([{key: value for key, value in LAYERS.items() if key != "head.lora_B"}],), "head.lora_B"),
]


@pytest.mark.parametrize(("arguments", "named"), TERMS)
def test_what_cannot_be_combined_is_refused(arguments, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        combine(*arguments)


# Read


@pytest.mark.parametrize("kind", [None, RsLoRALinear])
def test_a_saved_adapter_is_read_without_its_model(tmp_path, kind):
    model = DigitsMLP()
    inject(model, LoRAConfig(4, 12), layer=kind)
    save_adapter(randomise(model), tmp_path)
    expected, found = adapter_state(model), read_adapter(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_layers_are_read_in_the_order_of_their_numbers(tmp_path):
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(12))})
    inject(model, LoRAConfig(2))
    save_adapter(model, tmp_path)
    names = [name.removesuffix(".lora_A") for name in read_adapter(tmp_path) if name.endswith(".lora_A")]
    assert names == [f"layers.{number}" for number in range(12)]


# switch


def test_a_switched_adapter_is_the_other_one_bit_for_bit_and_the_base_and_the_parameters_stay():
    model, first, other = (pictures(seed, alpha=alpha) for seed, alpha in [(1, 3.0), (1, 3.0), (2, 0.7)])
    parameters = dict(model.named_parameters())
    switch(model, adapter_state(other))
    assert torch.equal(logits(model, PIXELS), logits(other, PIXELS))
    assert not torch.equal(logits(model, PIXELS), logits(first, PIXELS))
    assert (model.head.alpha, model.head.scaling) == (0.7, 0.35)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    switch(model, adapter_state(first))
    assert torch.equal(logits(model, PIXELS), logits(first, PIXELS))


def test_a_switched_adapter_of_another_rank_is_the_other_one_in_new_parameters():
    model, other = pictures(1, rank=2), pictures(2, rank=5, alpha=0.7)
    parameters = dict(model.named_parameters())
    base_ids = {name: id(p) for name, p in parameters.items() if ".base." in name}
    switch(model, adapter_state(other))
    assert torch.equal(logits(model, PIXELS), logits(other, PIXELS))
    assert {layer.rank for layer in lora_layers(model).values()} == {5}
    assert model.patches.lora_A.shape == (5, 1, 4, 4)
    assert model.places.lora_A.shape == (5, 4)
    for name, parameter in model.named_parameters():
        assert (parameter is parameters[name]) is (name in base_ids)
        assert parameter.requires_grad is (name not in base_ids)
    switch(model, adapter_state(pictures(1, rank=2)))
    assert torch.equal(logits(model, PIXELS), logits(pictures(1, rank=2), PIXELS))


@pytest.mark.parametrize("rank", [2, 4])
def test_a_switched_adapter_shares_no_memory_with_the_state(rank):
    model = pictures(1)
    state = adapter_state(pictures(2, rank=rank))
    kept = {name: value.clone() for name, value in state.items()}
    switch(model, state)
    before = logits(model, PIXELS)
    randomise(model, 7)
    assert all(torch.equal(value, kept[name]) for name, value in state.items())
    switch(model, state)
    for value in state.values():
        value.zero_()
    assert torch.equal(logits(model, PIXELS), before)


def test_layers_may_be_switched_to_several_ranks_and_keep_their_dtype():
    model = pictures(1)
    state = adapter_state(pictures(2)) | {
        name: value
        for name, value in adapter_state(pictures(3, rank=1, alpha=9.0)).items()
        if name.startswith("hidden")
    }
    switch(model, {name: value.double() for name, value in state.items()})
    assert [layer.rank for layer in lora_layers(model).values()] == [2, 2, 1, 2]
    assert [layer.scaling for layer in lora_layers(model).values()] == [1.5, 1.5, 9.0, 1.5]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(model).items())


@pytest.mark.parametrize("rank", [2, 3])
def test_what_was_frozen_or_added_by_a_variant_is_so_after_a_switch(rank):
    model, other = (pictures(seed, r, targets=["head"], layer=LoRAFALinear) for seed, r in [(1, 2), (2, rank)])
    switch(model, adapter_state(other))
    assert not model.head.lora_A.requires_grad
    assert model.head.lora_B.requires_grad
    assert torch.equal(logits(model, PIXELS), logits(other, PIXELS))
    for kind, its_rank in ((DoRALinear, rank), (PiSSALinear, 2)):
        model, other = (pictures(seed, r, targets=["head"], layer=kind) for seed, r in [(1, 2), (2, its_rank)])
        switch(model, adapter_state(other))
        assert all(torch.equal(getattr(model.head, part), getattr(other.head, part)) for part in model.head.parts)
        assert torch.equal(logits(model, PIXELS), logits(other, PIXELS))


@pytest.mark.parametrize("rank", [2, 3], ids=["same rank", "other rank"])
@pytest.mark.parametrize("kinds", [(RsLoRALinear, LoRALinear), (LoRALinear, RsLoRALinear)], ids=["from rs", "to rs"])
def test_a_state_keeps_its_scaling_in_layers_that_make_another_of_the_same_alpha(kinds, rank):
    targets = ["hidden", "head"]
    other = pictures(2, rank, 3.0, targets=targets, layer=kinds[0])
    model = pictures(1, 2, 3.0, targets=targets, layer=kinds[1])
    switch(model, adapter_state(other))
    assert model.head.scaling == pytest.approx(other.head.scaling, rel=1e-15)
    assert model.head.alpha != pytest.approx(other.head.alpha)  # with the same alpha it would be another function
    torch.testing.assert_close(logits(model, PIXELS), logits(other, PIXELS), rtol=1e-6, atol=1e-6)


# off


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_off_is_bitwise_the_base_and_then_the_adapter_again(training):
    model, base = pictures().train(training), Pictures().requires_grad_(False)
    before = snapshot(model)
    adapted_out, base_out = model(PIXELS), base(PIXELS)
    with off(model) as same:
        assert same is model
        assert torch.equal(model(PIXELS), base_out)
        assert not model(PIXELS).requires_grad
        assert lora_layers(model) == {}
    with pytest.raises(KeyError, match="inside"), off(model):
        raise KeyError("inside")
    assert torch.equal(model(PIXELS), adapted_out)
    assert not torch.equal(adapted_out, base_out)
    assert snapshot(model) == before


def test_off_and_strength_reach_weights_that_are_read_and_never_called():
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 1).eval()
    model = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="in_proj_weight"):
        assert len(inject(model, LoRAConfig(rank=2))) == 3
    randomise(model)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        adapted_out = model(x)
        with off(model):
            assert torch.equal(model(x), base(x))
        layer = model.layers[0].self_attn.out_proj
        with strength(model, 0.5):
            torch.testing.assert_close(layer.weight, layer.base.weight + layer.delta())
            assert not torch.equal(model(x), adapted_out)
        assert torch.equal(model(x), adapted_out)
        assert not torch.equal(adapted_out, base(x))


@pytest.mark.parametrize("training", [True, False], ids=["to train", "to eval"])
def test_a_mode_that_is_changed_while_adapters_are_off_holds_for_them_too(training):
    model = DigitsMLP(width=16)
    inject(model, LoRAConfig(dropout=0.5))
    model.train(not training)
    with off(model):
        model.train(training)
    assert {module.training for module in model.modules()} == {training}
    with off(model):
        model.head.train(not training)
    assert [layer.dropout.training for layer in lora_layers(model).values()] == [training, training, not training]


# strength


def scaled(model, factor):
    """A plain copy whose weights hold the update times the factor, so that no adapter's forward is in it."""
    plain = copy.deepcopy(model)
    for name, layer in lora_layers(model).items():
        base = copy.deepcopy(layer.base)
        base.weight.data += factor * layer.delta()
        setattr(plain, name, base)
    return plain


def alphas(model):
    return {name: layer.alpha for name, layer in lora_layers(model).items()}


@pytest.mark.parametrize("factor", [0.25, 1.5, -1.0])
@pytest.mark.parametrize("kind", [None, RsLoRALinear, LoRAFALinear, PiSSALinear])
def test_the_update_counts_as_often_as_the_factor_says_in_every_kind_of_layer(kind, factor):
    model = pictures() if kind is None else pictures(targets=["hidden", "head"], layer=kind)
    before, outside = snapshot(model), logits(model, PIXELS)
    alphas_before, deltas = alphas(model), {name: layer.delta() for name, layer in lora_layers(model).items()}
    expected = logits(scaled(model, factor), PIXELS)
    with strength(model, factor) as same:
        assert same is model
        torch.testing.assert_close(logits(model, PIXELS), expected, rtol=1e-4, atol=1e-4)
        for name, layer in lora_layers(model).items():
            torch.testing.assert_close(layer.delta(), factor * deltas[name])
    assert (expected - outside).abs().max() > 0.1
    assert torch.equal(logits(model, PIXELS), outside)
    assert (snapshot(model), alphas(model)) == (before, alphas_before)


@pytest.mark.parametrize("kind", [None, RsLoRALinear, PiSSALinear, DoRALinear])
def test_strength_0_is_the_base_and_1_the_adapter_bit_for_bit(kind):
    model, base = pictures(targets=["hidden", "head"], layer=kind), Pictures().requires_grad_(False)
    outside = logits(model, PIXELS)
    with strength(model, 1):
        assert torch.equal(logits(model, PIXELS), outside)
    if kind is DoRALinear:  # which has no other strength
        return
    with strength(model, 0):
        assert torch.equal(logits(model, PIXELS), logits(base, PIXELS))
    with strength(model, 1 + 1e-3):
        assert not torch.equal(logits(model, PIXELS), outside)
    assert not torch.equal(outside, logits(base, PIXELS))


def test_strengths_within_one_another_multiply_and_end_one_by_one_and_after_an_error():
    model = pictures()
    start = alphas(model)
    with strength(model, 0.5):
        with pytest.raises(KeyError, match=re.escape(str(3 * 0.5 * 0.1))), strength(model, 0.1):
            raise KeyError(model.head.alpha)  # 3 * 0.1 / 0.1 is not 3
        assert alphas(model) == {name: alpha / 2 for name, alpha in start.items()}
    assert alphas(model) == start


# What is refused, and leaves the model as it was


def enter(*contexts):
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)


def inside_off(model):
    with off(model):
        enter(off(model))


def of(kind, rank=2):
    return pictures(5, rank, targets=["head"], layer=kind)


def adapted():
    return pictures(5)


STATE = adapter_state(pictures())
STATES = [
    ({name: value for name, value in STATE.items() if name != "head.lora_B"}, "head.lora_B"),
    ({name: value for name, value in STATE.items() if name != "head.alpha"}, "head.alpha"),
    ({}, "head"),
    (adapter_state(pictures(targets=["head"])), "'hidden'"),
    (STATE | {name: value for name, value in adapter_state(of(DoRALinear)).items()}, "'lora_magnitude_vector'"),
    (STATE | {"tail.lora_A": torch.ones(2, 8)}, "tail."),
    (STATE | {"head.lora_A": torch.ones(2, 7)}, "lora_A of 'head'"),
    (STATE | {"head.lora_A": torch.ones(16)}, "head.lora_A"),
    (STATE | {"head.lora_B": torch.ones(3, 1)}, "head.lora_B"),
    (STATE | {"patches.lora_A": torch.ones(2, 16)}, "lora_A of 'patches'"),
    (STATE | {"head.lora_A": torch.ones(0, 8), "head.lora_B": torch.ones(3, 0)}, "rank 0"),
    (STATE | {"head.lora_A": torch.full((2, 8), torch.inf)}, "head.lora_A"),
    *((STATE | {"head.alpha": torch.tensor(alpha)}, "head.alpha") for alpha in (torch.nan, -1.0)),
    *((STATE | {"head.scaling": scaling}, "head.scaling") for scaling in (torch.ones(2), torch.zeros(()))),
]
MORE_THAN_BA = PiSSALinear, DoRALinear, BetweenLinear
REFUSED = [  # a model, what is done with it, and what must be named
    (DigitsMLP, lambda base: extract(base, tuned(base), 0), "rank is 0"),
    (DigitsMLP, lambda base: extract(base, copy.deepcopy(base), 4), "nothing to extract"),
    (DigitsMLP, lambda base: extract(base, DigitsMLP(32), 4), "hidden1.weight"),
    (DigitsMLP, lambda base: extract(base, {}, 4), "hidden1.weight"),
    (adapted, lambda base: extract(base, pictures(), 4), "already has adapters"),
    *(
        (partial(of, kind), lambda model: resize(model, 1), kind.__name__)
        for kind in (PiSSALinear, DoRALinear, BetweenLinear)
    ),
    (DigitsMLP, lambda model: resize(model, 2), "no adapters"),
    (adapted, lambda model: resize(model, 0), "rank is 0"),
    *((adapted, partial(switch, state=state), named) for state, named in STATES),
    (partial(of, PiSSALinear), partial(switch, state=adapter_state(of(PiSSALinear, 1))), "start_A of 'head'"),
    (Pictures, partial(switch, state=STATE), "no adapters"),
    (Pictures, lambda model: enter(off(model)), "no adapters"),
    (adapted, inside_off, "no adapters"),
    *((adapted, lambda model, x=x: enter(strength(model, x)), f"factor is {x}") for x in (torch.nan, -torch.inf)),
    (Pictures, lambda model: enter(strength(model, 0.5)), "no adapters"),
    *((partial(of, DoRALinear), lambda model, x=x: enter(strength(model, x)), "DoRALinear") for x in (0, 0.5)),
]


@pytest.mark.parametrize(("make", "call", "named"), REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(make, call, named):
    model = make()
    before = snapshot(model), alphas(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=re.escape(named)):
        call(model)
    after = snapshot(model), alphas(model), [parameter.requires_grad for parameter in model.parameters()]
    assert after == before
