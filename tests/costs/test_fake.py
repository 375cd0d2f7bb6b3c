"""A step rehearsed: setups, models without memory or copied, and what a watch sees of a step."""

import contextlib
import subprocess
import sys
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lora_lab import FullFineTuning, Lean, Llama, LoRA, LoRAFA, LoRAPlus, PartialFineTuning, inject, quantize_nf4
from lora_lab.costs.fake import (
    batch_for,
    build_model,
    copy_sharing_weights,
    device_of,
    fake_copy,
    token_batch,
    unshare_trainable,
)
from lora_lab.costs.setup import Setup, as_setup
from lora_lab.costs.trace import StepTracer, module_kinds, output_width
from lora_lab.inject import LoRAConfig
from lora_lab.lean.optim import FlatAdamW
from lora_lab.lean.step import apply_lean
from lora_lab.methods import AsItIs
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.quantize import BlockLinear
from lora_lab.tasks import cross_entropy
from lora_lab.train import TrainingStep

CPU = torch.device("cpu")
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
DIGITS = X, torch.arange(6)


def values(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name][0], other[name][0]) and one[name][1] == other[name][1] for name in one
    )


# Setups


def test_a_setup_says_in_a_few_words_how_a_model_is_trained():
    described = {
        "full": Setup(FullFineTuning()),
        "lora r=4": Setup(LoRA(4)),
        "lora-fa r=8, q_proj+v_proj": Setup(LoRAFA(8, targets=["q_proj", "v_proj"])),
        "partial": Setup(PartialFineTuning(["head"])),
        "as it is": Setup(AsItIs()),
        "lora r=8, NF4 base, bfloat16, checkpointing": Setup(
            LoRA(8), torch.bfloat16, nf4=True, gradient_checkpointing=True
        ),
        "full, SGD": Setup(optimizer="sgd"),
        "lora r=8, lean": Setup(LoRA(8), lean=Lean()),
        "lora r=8, lean bf16 base, checkpointing": Setup(
            LoRA(8), lean=Lean(base_dtype=torch.bfloat16, checkpoint=True)
        ),
    }
    assert {setup.describe() for setup in described.values()} == described.keys()
    for words, setup in described.items():
        assert setup.describe() == words


def test_keywords_make_a_setup_of_a_method_and_change_one_of_a_setup():
    assert as_setup(LoRA(4), {}) == Setup(LoRA(4))
    assert as_setup(LoRA(4), {"nf4": True, "clip": None}) == Setup(LoRA(4), nf4=True, clip=None)
    given = Setup(LoRA(4), torch.bfloat16, accumulate=3)
    assert as_setup(given, {}) == given
    assert as_setup(given, {"accumulate": 2}) == Setup(LoRA(4), torch.bfloat16, accumulate=2)
    assert given.accumulate == 3
    with pytest.raises(TypeError, match="optimiser"):
        as_setup(LoRA(4), {"optimiser": "sgd"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "lora"}, r"method is 'lora', but it must be one such as LoRA\(rank=8\) or FullFineTuning\(\)"),
        ({"optimizer": "adam"}, "optimizer is 'adam', but it must be 'adamw' or 'sgd'"),
        ({"optimizer": "sgd", "lean": Lean()}, "the lean step has an AdamW of its own; use lean=None"),
        ({"accumulate": 0}, "accumulate is 0, but it must be at least 1"),
    ],
)
def test_what_no_setup_can_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Setup(**options)


def test_threads_cannot_be_watched():
    Setup(LoRA(4), lean=Lean(threads=1)).check_watchable()
    Setup(LoRA(4)).check_watchable()
    with pytest.raises(
        ValueError, match=r"lean.threads is 3, but.*hold for one thread only; use Lean\(threads=1\) here"
    ):
        Setup(LoRA(4), lean=Lean(threads=3)).check_watchable()


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
    with pytest.raises(ValueError, match="accumulate is 6, but the batch has only 5 examples"):
        Setup(accumulate=6).batches(batch)


def test_micro_batches_sum_to_the_gradient_of_the_whole():
    gradients = []
    for setup in (Setup(), Setup(accumulate=4)):
        model = DigitsMLP(width=8).double()
        step = setup.step(model)
        step(*setup.batches((X.double(), DIGITS[1])))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert float(gradients[0].norm()) > 0


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


def test_a_step_of_a_lean_setup_takes_every_target_and_gives_the_plain_loss(tiny_config):
    ids = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for lean in (None, Lean(loss_rows=5)):
        setup = Setup(LoRA(4), lean=lean)
        losses.append(float(setup.step(Llama(tiny_config))(*setup.batches((ids, ids)))[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Batches


def test_a_batch_of_tokens_has_the_shape_that_was_asked_for():
    batch = token_batch(DigitsMLP(), 3, 5)
    assert [(tuple(t.shape), t.dtype, t.device) for t in batch] == [((3, 5), torch.long, CPU)] * 2
    assert batch[0] is not batch[1]
    assert token_batch(DigitsMLP().to("meta"), 3, 5)[0].device.type == "meta"


@pytest.mark.parametrize("sizes", [(0, 5), (3, 0), (3, -2), (True, 5), (3, 5.0), (3, None), ("3", 5)])
def test_a_size_that_is_no_whole_number_above_zero_is_named(sizes):
    name, size = next(
        (name, size)
        for name, size in zip(("batch_size", "seq_len"), sizes, strict=True)
        if type(size) is not int or size < 1
    )
    with pytest.raises(ValueError, match=f"{name} is {size!r}, but it must be a whole number of at least 1"):
        token_batch(DigitsMLP(), *sizes)


def test_a_batch_like_another_has_its_shapes_and_dtypes():
    given = torch.ones(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.int32)
    made = batch_for(DigitsMLP().to("meta"), None, None, given)
    assert [(t.shape, t.dtype, t.device.type) for t in made] == [(t.shape, t.dtype, "meta") for t in given]


# Pretending


class Odd(nn.Module):
    """What a model may hold besides matrices: tied weights, buffers, numbers, a plain tensor, a shared buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 10), nn.Linear(64, 10)
        self.second.weight = self.first.weight
        self.register_buffer("running", torch.ones(10))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("nothing", None)
        self.plain, self.kept = torch.full((10,), 2.0), self.first.weight
        self.second.bias.requires_grad_(False)

    def forward(self, x):
        return self.first(x) + self.second(x) * self.plain + self.running


def test_in_a_pretence_all_tensors_are_fake_with_the_shapes_of_the_real_ones():
    model = Odd()
    before = values(model)
    with fake_copy(model) as twin:
        assert twin is not model
        tensors = dict([*twin.named_parameters(), *twin.named_buffers()])
        assert tensors.keys() == before.keys()
        for name, tensor in tensors.items():
            assert isinstance(tensor, FakeTensor)
            real = before[name][0]
            assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) == (
                real.shape, real.stride(), real.dtype, CPU,
            )  # fmt: skip
            assert tensor.requires_grad == before[name][1]
        assert twin.second.weight is twin.first.weight is twin.kept
        assert isinstance(twin.first.weight, nn.Parameter)
        assert twin.nothing is None
        result = twin(batch_for(twin, None, None, DIGITS)[0])
        assert isinstance(result, FakeTensor)
        assert result.shape == (6, 10)
        assert isinstance(torch.ones(3), FakeTensor)
        twin.first.bias.requires_grad_(False)
        twin.running = torch.zeros(10)
        del twin.second
    assert type(torch.ones(3)) is torch.Tensor
    assert same(values(model), before)
    assert model(X).shape == (6, 10)


def test_a_pretence_ends_after_an_error_too():
    with pytest.raises(RuntimeError, match="planted"), fake_copy(Odd()):
        raise RuntimeError("planted")
    assert type(torch.ones(3)) is torch.Tensor


def test_a_pretence_casts_what_is_floating_point_and_what_blocks_are_dequantised_to(tiny_config):
    with fake_copy(Odd(), dtype=torch.bfloat16) as twin:
        assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
        assert (twin.running.dtype, twin.count.dtype) == (torch.bfloat16, torch.long)
        assert [p.requires_grad for p in twin.parameters()] == [True, True, False]
    model = Llama(tiny_config)
    quantize_nf4(model)
    with fake_copy(model, dtype=torch.bfloat16) as twin:
        layer = twin.model.layers[0].mlp.up_proj
        assert layer.packed.dtype == torch.uint8
        assert layer.dtype == layer.weight.dtype == torch.bfloat16
        dtypes = {name: p.dtype for name, p in twin.named_parameters()}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert dtypes == {name: p.dtype for name, p in model.to(torch.bfloat16).named_parameters()}


def test_a_factory_is_called_on_meta_and_disturbs_no_generator():
    seen = []

    def factory():
        torch.rand(3, device="cpu")
        seen.append(torch.empty(1).device.type)
        return nn.Linear(10**6, 10**6)  # 4 TB

    torch.manual_seed(1)
    before = torch.get_rng_state()
    with fake_copy(factory) as twin:
        assert isinstance(twin.weight, FakeTensor)
        assert twin.weight.device == CPU
        assert twin.weight.untyped_storage().nbytes() == 4 * 10**12
    assert torch.equal(torch.get_rng_state(), before)
    build_model(lambda: nn.Linear(2, 2), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert seen == ["meta"]


@pytest.mark.parametrize("wrong", ["a name", None, 3, lambda: "no module"])
def test_what_is_neither_module_nor_factory_is_refused(wrong):
    says = "The factory made a str, but" if callable(wrong) else f"model is a {type(wrong).__name__}, but it must be"
    with pytest.raises(ValueError, match=says), fake_copy(wrong):
        pass
    with pytest.raises(ValueError, match=says):
        build_model(wrong, CPU)


DEVICES = """
import torch
from torch import nn
from lora_lab.costs.fake import fake_copy

for device in ("cuda", "cuda:3", "mps", "xpu"):
    try:
        with fake_copy(nn.Linear(2, 2), device) as twin:
            twin(torch.ones(1, 2)).sum().backward()
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_a_device_that_is_not_there_is_refused_before_a_fake_tensor_can_abort_the_interpreter():
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        f"Device '{device}' cannot be used here" for device in ("cuda", "cuda:3", "mps", "xpu")
    ]


def test_a_pretence_on_the_cpu_by_any_of_its_names_is_on_the_cpu():
    for name in ("cpu", "cpu:0", CPU, torch.device("cpu", 0)):
        with fake_copy(DigitsMLP(), name) as twin:
            assert next(twin.parameters()).device == CPU
            F.cross_entropy(twin(torch.ones(2, 64)), torch.zeros(2, dtype=torch.long)).backward()


def test_what_comes_from_a_count_alone_has_numbers_and_what_a_model_or_a_batch_is_in_has_none():
    with fake_copy(nn.Linear(4, 3)) as model:
        positions = torch.arange(5)[None]
        assert positions.tolist() == [[0, 1, 2, 3, 4]]
        assert bool((positions.diff() == 1).all())
        assert (positions >= 3).nonzero().tolist() == [[0, 3], [0, 4]]
        for made in (torch.zeros(5), torch.rand(5), positions + torch.zeros(5), model.weight[:, :1] * positions):
            assert isinstance(made, FakeTensor)


def test_a_count_too_long_to_be_held_or_on_the_meta_device_has_no_numbers():
    with fake_copy(nn.Linear(4, 3)):
        few, many = torch.arange(2**20), torch.arange(2**20 + 1)
        assert few[-1].item() == 2**20 - 1
        assert isinstance(many, FakeTensor)
        assert isinstance(few[:, None] >= few, FakeTensor)  # 128 GiB
    with fake_copy(nn.Linear(4, 3), "meta"):
        assert isinstance(torch.arange(5, device="meta"), FakeTensor)


# Copies


def test_a_copy_has_modules_of_its_own_and_the_models_memory():
    model = Odd().eval()
    model.first.weight.grad = torch.ones(10, 64)
    before = values(model)
    twin = copy_sharing_weights(model)
    assert same(values(twin), before)
    for (name, tensor), own in zip(
        [*model.named_parameters(), *model.named_buffers()], [*twin.parameters(), *twin.buffers()], strict=True
    ):
        assert tensor.data_ptr() == own.data_ptr(), name
        assert tensor is not own
    assert twin.second.weight is twin.first.weight is twin.kept
    assert twin.first.weight.grad is None
    assert not twin.training
    twin.train()
    twin.requires_grad_(False)
    twin.mark = 1
    twin.first = nn.Identity()
    assert same(values(model), before)
    assert type(model.first) is nn.Linear
    assert not model.training
    assert not hasattr(model, "mark")
    twin.second.bias.data.add_(1)  # memory is shared, so that a write is seen
    assert not same(values(model), before)


def test_a_model_made_from_another_shares_or_is_cast_and_one_from_a_factory_is_new():
    model = DigitsMLP()
    before = values(model)
    shared, cast = build_model(model, CPU), build_model(model, CPU, torch.bfloat16)
    assert next(shared.parameters()).data_ptr() == next(model.parameters()).data_ptr()
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert same(values(model), before)
    assert build_model(lambda: model, CPU) is model
    devices = []

    def factory():
        devices.append(torch.empty(1).device)
        return nn.Linear(2, 2)

    fresh = build_model(factory, torch.device("meta"), torch.float64)
    assert (fresh.weight.dtype, fresh.weight.device.type) == (torch.float64, "meta")
    assert [device.type for device in devices] == ["meta"]


def test_what_training_would_write_is_cloned_and_the_rest_stays_shared():
    model = Odd()
    twin = copy_sharing_weights(model)
    twin.second.bias.requires_grad_(False)
    shared = {t.untyped_storage()._cdata for t in [*twin.parameters(), *twin.buffers()]}
    own = nn.Parameter(torch.ones(3))
    twin.own = own
    address = own.data_ptr()
    unshare_trainable(twin, shared)
    assert twin.first.weight.data_ptr() != model.first.weight.data_ptr()
    assert twin.first.bias.data_ptr() != model.first.bias.data_ptr()
    assert twin.second.weight is twin.first.weight  # still tied
    assert twin.second.bias.data_ptr() == model.second.bias.data_ptr()  # frozen
    assert twin.own.data_ptr() == address  # its own already
    assert twin.running.data_ptr() != model.running.data_ptr()
    assert twin.count.data_ptr() != model.count.data_ptr()
    assert twin.nothing is None
    assert torch.equal(twin.first.weight, model.first.weight)
    assert torch.equal(twin.running, model.running)


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


def test_a_tracer_without_on_operation_is_a_programming_error():
    with pytest.raises(TypeError, match=r"abstract class StepTracer .*on_operation"):
        StepTracer(Setup().step(DigitsMLP()))


# Faults that were found by reading


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="Identity has no parameters"):
        device_of(nn.Identity())
    assert device_of(DigitsMLP()) == CPU


def test_a_lean_step_on_a_real_batch_leaves_out_targets_that_do_not_count(tiny_config):
    ids = torch.arange(8).view(1, 8)
    targets = ids.clone()
    targets[0, 3:] = -100
    losses = []
    for setup in (Setup(LoRA(2), lean=Lean()), Setup(LoRA(2))):
        torch.manual_seed(0)
        step = setup.step(Llama(tiny_config))
        losses.append(step([(ids, targets)], [1.0])[0])
    torch.testing.assert_close(*losses)


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


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_rehearsal_leaves_the_heap_alone(monkeypatch, tiny_config):
    asked = []
    monkeypatch.setattr(sys.modules[Lean.__module__], "_return_memory_at_once", lambda: asked.append(1))
    setup = Setup(LoRA(2), lean=Lean(checkpoint=True))
    with fake_copy(lambda: Llama(tiny_config)) as twin:
        setup.step(twin)
    assert asked == []
    setup.step(Llama(tiny_config))
    assert asked == [1]


def test_a_setup_says_how_it_differs():
    assert Setup(LoRA(2), accumulate=2).describe() != Setup(LoRA(2)).describe()
    assert "2 micro-batches" in Setup(LoRA(2), accumulate=2).describe()
    assert "no clipping" in Setup(LoRA(2), clip=None).describe()
