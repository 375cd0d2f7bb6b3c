"""Setups: what they say, refuse and make; and what a tracer sees of a step: phases, modules, each operation once."""

import contextlib
import gc
import itertools
import sys
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab import FullFineTuning, Lean, Llama, LlamaConfig, LoRA, LoRAPlus, inject
from lora_lab.costs.fake import batch_for, fake_copy, output_width
from lora_lab.costs.setup import Setup, StepTracer, as_setup, module_kinds
from lora_lab.costs.timing import UPDATE, trace_work
from lora_lab.inject import LoRAConfig
from lora_lab.lean import FlatAdamW
from lora_lab.lean.step import apply_lean
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.quantize import BlockLinear
from lora_lab.tasks import cross_entropy
from lora_lab.train import TrainingStep
from tests import tiny_models


def test_keywords_make_a_setup_of_a_method_and_change_one_of_a_setup():
    given = Setup(LoRA(4), torch.bfloat16, accumulate=3)
    assert as_setup(LoRA(4), {"dtype": torch.bfloat16, "accumulate": 3}) == as_setup(given, {}) == given
    assert as_setup(given, {"accumulate": 2}) == Setup(LoRA(4), torch.bfloat16, accumulate=2)


def test_a_batch_is_cut_into_micro_batches_weighted_by_their_examples():
    batch = torch.arange(10).view(5, 2), torch.arange(5)
    parts, weights = Setup(accumulate=2).batches(batch)
    assert [[tensor.tolist() for tensor in part] for part in parts] == [
        [[[0, 1], [2, 3], [4, 5]], [0, 1, 2]],
        [[[6, 7], [8, 9]], [3, 4]],
    ]
    assert weights == [3 / 5, 2 / 5]
    whole, weight = Setup().batches(batch)
    assert weight == [1.0]
    assert torch.equal(whole[0][0], batch[0])
    assert len(Setup(accumulate=5).batches(batch)[0]) == 5
    with pytest.raises(ValueError, match="accumulate is 6, but the batch has 5 examples"):
        Setup(accumulate=6).batches(batch)


def test_a_step_is_made_by_its_setup(tiny_config):
    step = Setup(LoRA(4), clip=0.25, gradient_checkpointing=True).step(Llama(tiny_config).eval())
    assert isinstance(step, TrainingStep)
    assert isinstance(step.optimizer, torch.optim.AdamW)
    assert (step.clip, step.loss, step.threads) == (0.25, cross_entropy, 1)
    assert step.model.training
    assert step.model.model.gradient_checkpointing
    assert not Setup(LoRA(4)).step(Llama(tiny_config)).model.model.gradient_checkpointing
    assert Setup(LoRA(4), clip=None).step(Llama(tiny_config)).clip is None
    quantised = Setup(LoRA(4), nf4=True).step(Llama(tiny_config)).model
    assert isinstance(quantised.model.layers[0].mlp.up_proj.base, BlockLinear)
    lean = Setup(LoRA(4), lean=Lean(loss_rows=7)).step(Llama(tiny_config))
    assert isinstance(lean.optimizer, FlatAdamW)
    assert lean.every_target is False
    with fake_copy(lambda: Llama(tiny_config)) as twin:
        fake = Setup(LoRA(4), lean=Lean(loss_rows=7)).step(twin)
    assert (fake.loss.keywords, fake.every_target) == ({"rows": 7}, True)

    def own(model, inputs, targets):
        return model(inputs).mean()

    assert Setup(LoRA(4), lean=Lean(), loss=own).step(Llama(tiny_config)).loss is own


@pytest.mark.parametrize("method", [LoRA(4), LoRAPlus(4)], ids=["one group", "two groups"])
def test_plain_gradient_descent_holds_all_that_is_trained(method):
    model = DigitsMLP()
    optimizer = Setup(method, optimizer="sgd").step(model).optimizer
    assert type(optimizer) is torch.optim.SGD
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(held) == 6


def test_adamw_by_foreach_is_torchs_own_and_passes_over_the_weights_many_times():
    optimizer = Setup(LoRAPlus(4), optimizer="adamw-foreach").step(DigitsMLP()).optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert [(group["foreach"], group["fused"]) for group in optimizer.param_groups] == [(True, None)]
    numbers = sum(parameter.numel() for parameter in DigitsMLP().parameters())
    for name, passes in (("adamw", 7), ("adamw-foreach", 21)):  # and one for the norm of the gradient
        with fake_copy(DigitsMLP) as twin:
            setup = Setup(optimizer=name, clip=None)
            work = trace_work(setup, setup.step(twin), (torch.zeros(4, 64), torch.zeros(4).long()))
        moved = work.seconds(lambda call: float(call.moved_bytes))[UPDATE]
        assert moved == pytest.approx(4 * numbers * (passes + 1), rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_rehearsal_leaves_the_heap_alone(monkeypatch, tiny_config):
    asked = []
    monkeypatch.setattr(sys.modules[Lean.__module__], "_return_memory_at_once", lambda: asked.append(1))
    setup = Setup(LoRA(2), lean=Lean(checkpoint=True))
    with fake_copy(lambda: Llama(tiny_config)) as twin:
        setup.step(twin)
    setup.step(Llama(tiny_config).to("meta"))
    assert asked == []
    setup.step(Llama(tiny_config))
    assert asked == [1]


TINY = LlamaConfig(260, 32, 48, 2, 4, 2, 8)
REFUSED = [
    (lambda: Setup(optimizer="adam"), "optimizer is 'adam'"),
    (lambda: Setup(optimizer="sgd", lean=Lean()), "optimizer is 'sgd'"),
    (lambda: Setup(accumulate=0), "accumulate is 0"),
    (lambda: Notes(Setup(LoRA(4), lean=Lean(threads=3)).step(Llama(TINY))), "lean.threads is 3"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_wrong_values_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# Kinds of modules


def kinds(model):
    found = module_kinds(model)
    return {name: found[id(module)].removeprefix("saved: ") for name, module in model.named_modules()}


def test_kinds_of_a_llamas_modules(tiny_config):
    model = Llama(tiny_config)
    inject(model, LoRAConfig(rank=2, dropout=0.1))
    found = kinds(model)
    assert {name.removeprefix("model.layers.1"): kind for name, kind in found.items() if "layers.1" in name} == {
        "": "other layers",
        ".self_attn": "attention",
        **{f".self_attn.{p}_proj": "adapters" for p in "qkvo"},
        **{f".self_attn.{p}_proj.{part}": "attention" for p in "qkvo" for part in ("base", "dropout")},
        ".mlp": "MLP",
        **{f".mlp.{p}_proj": "adapters" for p in ("gate", "up", "down")},
        **{f".mlp.{p}_proj.{part}": "MLP" for p in ("gate", "up", "down") for part in ("base", "dropout")},
        ".input_layernorm": "norms",
        ".post_attention_layernorm": "norms",
    }
    assert found["lm_head"] == "logits and loss"
    assert found["model.norm"] == "norms"
    assert found[""] == found["model"] == found["model.embed_tokens"] == found["model.layers"] == "other layers"
    apply_lean(model, Lean())
    assert kinds(model)["model.layers.0.mlp"] == "MLP"
    assert kinds(model)["lm_head"] == "logits and loss"


def test_an_adapted_head_is_an_adapter_over_a_head(tiny_config):
    model = Llama(tiny_config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    inject(model, LoRAConfig(rank=2, targets=["lm_head"]))
    assert kinds(model)["lm_head"] == "adapters"
    assert kinds(model)["lm_head.base"] == "logits and loss"
    assert output_width(model) == 260


def test_kinds_of_transformers_modules_and_of_pefts_adapters(tiny_hf):
    import peft

    model = peft.get_peft_model(tiny_hf(), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.1))
    found = {name.partition("layers.0.")[2]: kind for name, kind in kinds(model).items() if "layers.0." in name}
    for layer, kind in (("self_attn.q_proj", "attention"), ("mlp.up_proj", "MLP")):
        assert found[layer] == found[f"{layer}.base_layer"] == kind
        for part in ("lora_A", "lora_B", "lora_dropout"):
            assert found[f"{layer}.{part}"] == found[f"{layer}.{part}.default"] == "adapters"
    assert found["self_attn.k_proj"] == "attention"
    assert found["input_layernorm"] == "norms"
    assert kinds(model)["base_model.model.lm_head"] == "logits and loss"
    assert output_width(model) == 260
    bert = tiny_models.bert().bert
    found = kinds(bert)
    assert found["encoder.layer.0.attention.self.query"] == "attention"
    assert found["encoder.layer.0.attention.output.LayerNorm"] == found["embeddings.LayerNorm"] == "norms"
    assert output_width(bert) is None
    gpt2 = tiny_models.gpt2()
    found = kinds(gpt2)
    parts = [found[f"transformer.h.0.{name}"] for name in ("attn.c_attn", "mlp.c_fc", "ln_1")]
    assert parts == ["attention", "MLP", "norms"]
    assert (found["lm_head"], output_width(gpt2)) == ("logits and loss", 40)


def test_width_of_the_output_where_a_model_says_which_layer_makes_it(tiny_config):
    assert output_width(Llama(tiny_config)) == 260
    assert output_width(DigitsMLP()) is None
    model = Llama(tiny_config)
    inject(model, LoRAConfig(rank=2))
    apply_lean(model, Lean())
    assert output_width(model) == 260  # a lean head has a weight and no number of features


DIGITS = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), torch.arange(6)


# Watching


class Notes(StepTracer):
    """Writes down every operation with its phase, the kind and name of its module, and whether it is done again."""

    def __init__(self, step):
        super().__init__(step)
        self.rows = []

    def on_operation(self, function, args, kwargs, out):
        if function.namespace != "prim":
            kind = self.kind.removeprefix("saved: ")
            self.rows.append((self.phase, kind, self.module, self.recomputing, function._opname))


def watch(model, method=None, batch=DIGITS, **options):
    setup = Setup(method or FullFineTuning(), **options)
    notes = Notes(setup.step(model))
    notes.run(*setup.batches(batch))
    return notes


def hooks():
    held = {name: value for name, value in vars(nn.modules.module).items() if name.startswith("_global_")}
    return {name: len(value) for name, value in held.items() if isinstance(value, dict)}


def test_phases_come_in_order_and_each_micro_batch_has_its_own():
    def order(notes):
        return [phase for phase, _ in itertools.groupby(row[0] for row in notes.rows)]

    before = hooks()
    assert order(watch(DigitsMLP())) == ["before", "forward", "backward", "clipping", "optimiser step"]
    twice = ["before", *["forward", "backward"] * 2, "clipping", "optimiser step"]
    assert order(watch(DigitsMLP(), accumulate=2)) == twice
    assert watch(DigitsMLP()).phase == "after"
    assert hooks() == before


def test_operations_belong_to_the_innermost_module_and_those_of_none_to_the_loss():
    notes = watch(DigitsTransformer())
    forward = [row for row in notes.rows if row[0] == "forward"]
    of = Counter((kind, module) for _, kind, module, _, _ in forward)
    assert of["norms", "layers.1.norm2"] > 0
    assert of["other layers", "layers.0.q_proj"] > 0
    assert of["other layers", "layers.0"] > 0  # attention's scores, which no module of its own computes
    assert {module for kind, module in of if kind == "logits and loss"} == {""}
    computed = [row[-1] for row in forward if row[1] == "logits and loss"]
    assert [name for name in computed if "loss" in name or "softmax" in name] == ["_log_softmax", "nll_loss_forward"]
    backward = [row for row in notes.rows if row[0] != "forward"]
    assert {row[1:4] for row in backward} == {("other layers", "", False)}
    names = {row[2] for row in forward}
    assert names - {""} <= {name for name, _ in DigitsTransformer().named_modules()}
    assert len(names) > 15


def test_each_operation_of_a_step_is_seen_once():
    class Counts(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            type(self).seen += 1
            return func(*args, **(kwargs or {}))

    setup = Setup()
    step, parts = setup.step(DigitsMLP()), setup.batches(DIGITS)
    with Counts():
        step(*parts)
    assert len(watch(DigitsMLP()).rows) == Counts.seen > 60


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"lean": Lean(checkpoint=True)}])
def test_a_block_computed_again_is_told_from_the_backward_pass(tiny_config, options):
    ids = torch.zeros(2, 5, dtype=torch.long)
    notes = watch(Llama(tiny_config), LoRA(2), (ids, ids), **options)
    again = [row for row in notes.rows if row[3]]
    assert {row[0] for row in again} == {"backward"}
    modules = [row[2] for row in again]
    assert {module.partition("layers.")[2][:1] for module in modules} == {"0", "1"}
    assert modules.index("model.layers.1.self_attn") < modules.index("model.layers.0.self_attn")  # from above
    assert "attention" in {row[1] for row in again}
    # A block is left by an error once it has all it needs; what follows belongs to no module.
    assert any(row[0] == "backward" and not row[3] for row in notes.rows[notes.rows.index(again[-1]) :])
    assert not any(row[3] for row in watch(Llama(tiny_config), LoRA(2), (ids, ids)).rows)


def test_a_watched_step_does_what_an_unwatched_one_does():
    models = DigitsMLP(), DigitsMLP()
    setup = Setup(LoRA(2))
    results = []
    for model, watched in zip(models, (True, False), strict=True):
        step = setup.step(model)
        (Notes(step).run if watched else step)(*setup.batches(DIGITS))
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))
    assert not all(map(torch.equal, results[0], DigitsMLP().parameters()))


def test_a_step_that_fails_leaves_no_hook_and_no_watch_holds_the_model():
    before = hooks()

    def fails(model, inputs, targets):
        model(inputs)
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        watch(DigitsMLP(), loss=fails)
    assert hooks() == before
    notes = watch(DigitsMLP())
    assert len(notes.step.optimizer._optimizer_step_pre_hooks) == 0
    reference = weakref.ref(notes.step.model)
    del notes
    gc.collect()
    assert reference() is None


def test_a_rehearsal_clips_as_a_real_step_does(tiny_config):
    """By itself torch takes another way for fake tensors: an operation for each tensor, where a real step has one."""

    seen = []
    for make in (fake_copy, lambda factory: contextlib.nullcontext(factory())):
        with make(lambda: Llama(tiny_config)) as model:
            rows = watch(model, LoRA(2), batch_for(model, 1, 4)).rows
            seen.append([row[-1] for row in rows if row[0] == "clipping"])
    assert seen[0] == seen[1] != []
