"""What a tracer sees of a step: phases, modules, each operation once; and the kinds of modules."""

import contextlib
import weakref
from collections import Counter

import pytest
import torch
from torch import nn

from lora_lab import FullFineTuning, Lean, Llama, LoRA, inject
from lora_lab.costs.fake import fake_copy, token_batch
from lora_lab.costs.setup import Setup
from lora_lab.costs.trace import StepTracer, module_kinds, output_width
from lora_lab.inject import LoRAConfig
from lora_lab.lean.step import apply_lean
from lora_lab.models.digits import DigitsMLP, DigitsTransformer

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
DIGITS = X, torch.arange(6)


# Kinds of modules


def kinds(model):
    found = module_kinds(model)
    return {name: found[id(module)] for name, module in model.named_modules()}


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
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

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
    sizes = {
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    bert = kinds(BertModel(BertConfig(**sizes)))
    assert bert["encoder.layer.0.attention.self.query"] == "attention"
    assert bert["encoder.layer.0.attention.output.LayerNorm"] == bert["embeddings.LayerNorm"] == "norms"
    assert output_width(BertModel(BertConfig(**sizes))) is None
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    found = kinds(gpt2)
    assert [found[f"transformer.h.0.{name}"] for name in ("attn.c_attn", "mlp.c_fc", "ln_1")] == [
        "attention",
        "MLP",
        "norms",
    ]
    assert (found["lm_head"], output_width(gpt2)) == ("logits and loss", 50)


def test_width_of_the_output_where_a_model_says_which_layer_makes_it(tiny_config):
    assert output_width(Llama(tiny_config)) == 260
    assert output_width(DigitsMLP()) is None
    model = Llama(tiny_config)
    inject(model, LoRAConfig(rank=2))
    apply_lean(model, Lean())
    assert output_width(model) == 260  # a lean head has a weight and no number of features


# Watching


class Notes(StepTracer):
    """Writes down every operation with its phase, the kind and name of its module, and whether it is done again."""

    def __init__(self, step):
        super().__init__(step)
        self.rows = []

    def on_operation(self, function, args, kwargs, out):
        if function.namespace != "prim":
            self.rows.append((self.phase, self.kind, self.module, self.recomputing, function._opname))


def watch(model, method=None, batch=DIGITS, **options):
    setup = Setup(method or FullFineTuning(), **options)
    notes = Notes(setup.step(model))
    notes.run(*setup.batches(batch))
    return notes


def hooks():
    module = nn.modules.module
    return {
        name: len(value)
        for name, value in vars(module).items()
        if name.startswith("_global_") and hasattr(value, "keys")
    }


def test_phases_come_in_order_and_each_micro_batch_has_its_own():
    def order(notes):
        phases = [row[0] for row in notes.rows]
        return [phase for i, phase in enumerate(phases) if i == 0 or phases[i - 1] != phase]

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
    from torch.utils._python_dispatch import TorchDispatchMode

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
    import gc

    gc.collect()
    assert reference() is None


def test_a_rehearsal_clips_as_a_real_step_does(tiny_config):
    """By itself torch takes another way for fake tensors: an operation for each tensor, where a real step has one."""

    class Clipping(StepTracer):
        def on_operation(self, function, args, kwargs, out):
            if self.phase == "clipping" and function.namespace == "aten":
                seen[-1].append(function)

    seen = []
    for make in (fake_copy, lambda factory: contextlib.nullcontext(factory())):
        with make(lambda: Llama(tiny_config)) as model:
            step = Setup(LoRA(2)).step(model)
            seen.append([])
            Clipping(step).run([token_batch(model, 1, 4)], [1.0])
    assert seen[0] == seen[1] != []
