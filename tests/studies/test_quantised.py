"""What `lora-lab record quantised` runs, on a tiny model: the forms of an adapter against the package's merges."""

import copy
import json

import pandas
import pytest
import torch

from lora_lab import LoRA, fit, merge, quantize_nf4
from lora_lab.ablation import materials
from lora_lab.ablation.compare import compare_losses
from lora_lab.ablation.stats import BlockLosses
from lora_lab.adapters.edit import off
from lora_lab.models.llama import Llama
from lora_lab.models.quantize import FORMATS, BlockLinear, nf4
from lora_lab.studies import recorder, tuned
from lora_lab.studies.tuned import NF4, Q4_1, Merges, forms_of
from tests.studies.conftest import sentences

pytestmark = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def load(config, base):
    """A tiny model over a base; its NF4 is of so few blocks that the scales' own quantisation matters."""
    model = Llama(config, seed=3)
    if base == "NF4":
        quantize_nf4(model)
    return model


@pytest.fixture(scope="module")
def rows(small_world, tiny_config):
    task = sentences(tiny_config.vocab_size)
    small_world.setattr(materials, "language_model", lambda device, model=None: Llama(tiny_config, seed=3))
    small_world.setattr(materials, "docs_task", lambda seq_len: task)
    small_world.setattr(tuned, "load_base", lambda base, device: load(tiny_config, base))
    for module in (tuned, recorder):
        small_world.setattr(module, "ON_TEST", {"validation": 5, "test": 6})
    small_world.setattr(tuned, "ROUNDS", 2)
    real = tuned.plan_setups

    def plan_few(methods, steps, size, lean):
        return real({base: (method, 2e-2) for base, (method, _) in methods.items()}, 3, 4, lean=lean)

    small_world.setattr(tuned, "plan_setups", plan_few)
    return list(tuned.QUANTISED.rows(CPU))


def frame_of(rows, *data):
    return pandas.DataFrame([row for row in rows if row["data"] in data])


# The record


def test_four_bases_are_compared_on_the_same_seeds_and_blocks(rows):
    table = compare_losses(frame_of(rows, *tuned.BASES), "float32").set_index("setup")
    assert set(table.index) == {"float32", "bfloat16", "NF4", "Q4_1"}
    assert (table["seeds"] == 3).all()
    assert table.loc["NF4", "difference"] != 0
    assert table.loc["Q4_1", "difference"] == 0  # here its weights are those of float32, as on the real model
    assert "reference" in set(table["why"])


@pytest.mark.parametrize("base", ["float32", "NF4"])
def test_forms_are_compared_as_setups(rows, base):
    table = compare_losses(frame_of(rows, f"{base}, merged"), "unmerged", margin=1e-4).set_index("setup")
    assert [*table.index] == forms_of(base)
    assert table.loc["merged", "difference"] == pytest.approx(0, abs=1e-5)
    assert abs(table.loc[f"merged, then {Q4_1}", "difference"]) > 1e-4
    assert abs(table.loc["base", "difference"]) > 1e-4


def test_steps_are_timed_in_turn(rows):
    table = frame_of(rows, "time").set_index("setup")
    assert [*table.index] == ["float32", "bfloat16", "NF4", "Q4_1"]
    assert table.loc["float32", "ratio"] == 1
    assert (table["seconds"] > 0).all()
    assert (table["rounds"] == 2).all()


def test_each_base_has_its_own_step():
    plans = {device: {sweep.data: sweep for sweep in tuned.plan_quantised(device)} for device in (CPU, CUDA)}
    leans = {base: sweep.setups[base][0].lean for base, sweep in plans[CPU].items()}
    assert leans["bfloat16"].base_dtype == torch.bfloat16
    assert {leans[base].base_dtype for base in ("float32", "NF4", "Q4_1")} == {None}
    small, large = (plans[device]["NF4"] for device in (CPU, CUDA))
    assert not set(small.choosing) & set(small.judging)
    assert len(small.lrs["NF4"]) == 5
    assert len(large.judging) > len(small.judging) >= 3


# The forms


@pytest.fixture(scope="module")
def trained(small_world, tiny_config):
    """base -> a model with a trained adapter over it, and the task."""
    small_world.setattr(materials, "language_model", lambda device, model=None: Llama(tiny_config, seed=3))
    task, models = sentences(tiny_config.vocab_size), {}
    for base in ("float32", "NF4"):
        models[base] = load(tiny_config, base)
        fit(models[base], task, LoRA(4, 8), lr=0.05, steps=5, batch_size=4, progress=False)
    return models, task


@torch.no_grad()
def in_blocks(model, kind):
    """A copy whose linear layers are in blocks, by the package's layer and not by ``rounded``."""
    twin = copy.deepcopy(model)
    if kind == NF4:
        quantize_nf4(twin)
        return twin
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            packed, _ = FORMATS[Q4_1].encode(layer.weight)
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, BlockLinear(packed, Q4_1, layer.weight.shape))
    return twin


def test_forms_are_the_merges_of_the_package(trained, tiny_config):
    models, task = trained
    judge = BlockLosses({"test": 6}, 4)

    def losses(model):
        return json.loads(judge(model, task)["test"])

    full, model = Llama(tiny_config, seed=3), models["NF4"]
    merged = {form: copy.deepcopy(model) for form in ("dequantised", "blocks", "full-precision")}
    for form, twin in merged.items():
        merge(twin, into=form, base=full if form == "full-precision" else None)
    with off(copy.deepcopy(model)) as base:
        expected = {"base": losses(base)}
    expected |= {
        "unmerged": losses(model),
        "merged": losses(merged["dequantised"]),
        f"merged, then {NF4}": losses(merged["blocks"]),
        f"merged, then {Q4_1}": losses(in_blocks(merged["dequantised"], Q4_1)),
        "merged into float32": losses(merged["full-precision"]),
        f"merged into float32, then {NF4}": losses(in_blocks(merged["full-precision"], NF4)),
        f"merged into float32, then {Q4_1}": losses(in_blocks(merged["full-precision"], Q4_1)),
    }
    scores = {form: json.loads(text) for form, text in Merges("NF4", 6)(copy.deepcopy(model), task).items()}
    for form, values in expected.items():
        assert scores[form] == pytest.approx(values, abs=2e-5), form
        assert form in ("unmerged", "merged") or scores[form] != pytest.approx(scores["unmerged"], abs=2e-5)


def test_the_control_rounds_the_base_and_not_the_update(trained, tiny_config):
    models, task = trained
    judge = BlockLosses({"test": 6}, 4)
    scores = Merges("float32", 6)(copy.deepcopy(models["float32"]), task)
    model = copy.deepcopy(models["float32"])
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.base = quantised_layer(layer.base)
    assert json.loads(scores[f"unmerged, base in {NF4}"]) == pytest.approx(
        json.loads(judge(model, task)["test"]), abs=2e-5
    )
    assert scores[f"unmerged, base in {NF4}"] != scores[f"merged, then {NF4}"]
    assert [*scores] == [*forms_of("float32")]


def quantised_layer(layer):
    packed, steps = nf4(layer.weight)
    return BlockLinear(packed, NF4, layer.weight.shape, steps=steps)
