"""What studies of other versions of a base measure, on a tiny model: the forms of an adapter, and its copies."""

import copy
import json

import pandas
import pytest
import torch
from torch.nn import functional as F

from lora_lab import LoRA, adapter_state, fit, inject, load_pretrained, merge, quantize_nf4
from lora_lab.ablation import materials
from lora_lab.ablation.compare import compare_losses
from lora_lab.ablation.stats import BlockLosses
from lora_lab.adapters.edit import off, switch
from lora_lab.models.llama import Llama
from lora_lab.models.quantize import BlockLinear, nf4
from lora_lab.studies import paged, recorder, versions
from lora_lab.studies.versions import NF4, Copies, Merges, forms_of
from tests.studies.conftest import sentences

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def load(config, form):
    """A tiny model over a base; its NF4 is of so few blocks that the scales' own quantisation matters."""
    model = Llama(config, seed=3)
    if form == "NF4":
        quantize_nf4(model)
    return model


@pytest.fixture(scope="module")
def trained(small_world, tiny_config):
    """form -> a model with a trained adapter over it, and the task; the judges take the tiny model for their base."""
    small_world.setattr(materials, "language_model", lambda device, base=None: Llama(tiny_config, seed=3))
    small_world.setattr(versions, "ADAPTER", LoRA(4, 8))
    task, models = sentences(tiny_config.vocab_size), {}
    for form in ("float32", "NF4"):
        models[form] = load(tiny_config, form)
        fit(models[form], task, LoRA(4, 8), lr=0.05, steps=5, batch_size=4, progress=False)
    return models, task


def losses(model, task):
    return json.loads(BlockLosses({"test": 6}, 1)(model, task)["test"])


def in_blocks(model):
    twin = copy.deepcopy(model)
    quantize_nf4(twin)
    return twin


def test_forms_are_the_merges_of_the_package(trained, tiny_config):
    models, task = trained
    full, model = Llama(tiny_config, seed=3), models["NF4"]
    merged = {form: copy.deepcopy(model) for form in ("dequantised", "blocks", "full-precision")}
    for form, twin in merged.items():
        merge(twin, into=form, base=full if form == "full-precision" else None)
    with off(copy.deepcopy(model)) as base:
        expected = {"base": losses(base, task)}
    expected |= {
        "unmerged": losses(model, task),
        "merged": losses(merged["dequantised"], task),
        "merged, then NF4": losses(merged["blocks"], task),
        "merged into float32": losses(merged["full-precision"], task),
        "merged into float32, then NF4": losses(in_blocks(merged["full-precision"]), task),
    }
    found = Merges("smollm2-135m", "NF4", pages=6)(copy.deepcopy(model), task)
    scores = {form: json.loads(text) for form, text in found.items()}
    assert [*scores] == forms_of("NF4")
    for form, values in expected.items():
        assert scores[form] == pytest.approx(values, abs=2e-5), form
        assert form in ("unmerged", "merged") or scores[form] != pytest.approx(scores["unmerged"], abs=2e-5)


def test_the_control_rounds_the_base_and_not_the_update(trained):
    models, task = trained
    scores = Merges("smollm2-135m", "float32", pages=6)(copy.deepcopy(models["float32"]), task)
    model = copy.deepcopy(models["float32"])
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            packed, steps = nf4(layer.base.weight)
            layer.base = BlockLinear(packed, NF4, layer.base.weight.shape, steps=steps)
    assert json.loads(scores["unmerged, base in NF4"]) == pytest.approx(losses(model, task), abs=2e-5)
    assert scores["unmerged, base in NF4"] != scores["merged, then NF4"]
    assert [*scores] == forms_of("float32")


# Whole sweeps of a small base, in few steps


@pytest.fixture(scope="module")
def few_steps(small_world):
    """Sweeps of small bases take three steps, at two rates, with a seed that chooses and two that judge."""
    real = recorder.plan_setups

    def plan_few(methods, steps, size, count, **options):
        return real({name: (method, (1e-3, 2e-3)) for name, (method, _) in methods.items()}, 3, size, count, **options)

    def few(setups, choosing, judging, **options):
        options |= {"chosen_on": 8, "judged_on": {"validation": 8, "test": 16}, "widen": 0}
        return recorder.BlockSweep(setups, range(1), range(1, 3), **options)

    small_world.setattr(paged, "plan_setups", plan_few)
    small_world.setattr(paged, "BlockSweep", few)
    small_world.setattr(versions, "UPGRADES", {"known": 3, "readmes": 3})
    small_world.setattr(versions, "PAGES", 2)
    return small_world


def rows_of(plan, count, folder):
    sweeps = [sweep for sweep, _ in zip(plan(CPU), range(count), strict=False)]
    return [row for sweep in sweeps for row in sweep.rows(CPU, folder)]


def test_forms_are_compared_as_setups(few_steps, tmp_path):
    few_steps.setattr(materials, "language_model", lambda device, base: load_pretrained(base)[0])
    few_steps.setattr(versions, "ADAPTER", LoRA(8, 32))
    rows = rows_of(versions.plan_tiny_quantised, 2, tmp_path)
    for form in ("float32", "NF4"):
        frame = pandas.DataFrame([row for row in rows if row["data"] == f"tiny-64-0, {form}, merged"])
        table = compare_losses(frame, "unmerged", margin=1e-4).set_index("setup")
        assert [*table.index] == forms_of(form)
        assert (table["seeds"] == 2).all()
        assert table.loc["merged", "difference"] == pytest.approx(0, abs=1e-5)
        assert abs(table.loc["base", "difference"]) > 1e-4
        assert abs(table.loc["unmerged, base in NF4", "difference"]) > 1e-3 or form == "NF4"


def test_a_copied_adapter_is_the_one_that_was_trained_on_the_earlier_base(few_steps, tmp_path):
    few_steps.setattr(materials, "language_model", lambda device, base: load_pretrained(base)[0])
    few_steps.setattr(versions, "ADAPTER", LoRA(8, 32))
    rows = rows_of(versions.plan_tiny_upgrade, 3, tmp_path)
    of = {(row["data"], row["setup"]) for row in rows if row["stage"] == "judging"}
    assert of == {
        ("tiny-64-0, as it is", "as it is, 240 steps"),
        *(("tiny-64-0, as it is, on others", copies) for copies in versions.COPIES),
        *((f"tiny-64-0, {corpus}", f"{corpus}, 240 steps") for corpus in ("known", "readmes")),
    }
    task, model = paged.make_task("tiny-64-0"), load_pretrained("tiny-64-0")[0]
    fit(model, task, LoRA(8, 32), lr=2e-3, steps=3, batch_size=8, eval_every=3, eval_examples=8, progress=False)
    scores = Copies("tiny-64-0")(model, task)
    later = versions.upgrade("tiny-64-0", "known", CPU)
    weights, earlier = later.state_dict(), load_pretrained("tiny-64-0")[0].state_dict()
    assert not F.mse_loss(weights["lm_head.weight"], earlier["lm_head.weight"]).isclose(torch.tensor(0.0))
    expected = {"alone": BlockLosses({"test": 16}, 8)(later, task)["test"]}
    inject(later, LoRA(8, 32))
    switch(later, adapter_state(model))
    expected["copied"] = BlockLosses({"test": 16}, 8)(later, task)["test"]
    for setup, text in expected.items():
        assert json.loads(scores[f"known, {setup}"]) == pytest.approx(json.loads(text), abs=1e-5)
    assert expected["alone"] != expected["copied"]
    assert len({scores[form] for form in versions.COPIES}) == 4
