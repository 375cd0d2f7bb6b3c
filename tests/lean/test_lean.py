"""The lean step against the plain one: losses, gradients, what it keeps, and what it refuses."""

import copy
import dataclasses
import threading
from contextlib import nullcontext
from functools import partial

import gguf
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_lab as ll
from lora_lab.adapters.edit import take_off
from lora_lab.inject import replace
from lora_lab.lean.blocks import _fuse_is_cheaper, _RMSNorm, _Rotate, gated_linear, linear
from lora_lab.lean.loss import cross_entropy, token_losses
from lora_lab.lean.step import FlatAdamW, LeanStep, apply_lean
from lora_lab.models import quantize
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.models.quantize import BlockEmbedding, BlockLinear, quantize_nf4
from lora_lab.tasks import IGNORE, Examples, Task
from lora_lab.tasks import cross_entropy as plain_cross_entropy
from lora_lab.tasks.instruction import Padded
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear
from tests.helpers import randomise, saved_bytes

pytestmark = pytest.mark.usefixtures("seeded")


SHAPE = LlamaConfig(260, 32, 48, 3, 4, 2, 8, 128, tie_word_embeddings=True)
BIASED = dataclasses.replace(SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
WIDE = dataclasses.replace(SHAPE, hidden_size=64, intermediate_size=128, head_dim=16)  # rows of whole blocks
OPTIONS = pytest.mark.parametrize(
    "lean", [ll.Lean(), ll.Lean(checkpoint=True), ll.Lean(loss_rows=7)], ids=["plain", "checkpoint", "small slices"]
)


def adapted(config=SHAPE, dtype=torch.float64, layer=None, seed=0, **settings):
    """A Llama with adapters that do something, in training mode."""
    model = Llama(config, seed=seed).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    ll.inject(model, ll.LoRAConfig(**({"rank": 4, "alpha": 6} | settings)), layer=layer)
    with torch.no_grad():
        for adapter in ll.lora_layers(model).values():
            adapter.lora_B.copy_(torch.randn_like(adapter.lora_B) * 0.2)
    return model.train()


def text(sequences=3, length=20, ignored=True, seed=1):
    """Token ids and targets, some of which do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 260, (sequences, length), generator=generator)
    targets = torch.randint(0, 260, (sequences, length), generator=generator)
    if ignored:
        targets[0, :5], targets[-1, 3] = IGNORE, IGNORE
    return ids, targets


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def far_apart(found, expected):
    """The largest relative distance between tensors of equal names."""
    assert found.keys() == expected.keys()
    assert len(found) > 1
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def compare(model, lean, batch):
    """Relative distances of loss and gradients between a plain step and its lean twin."""
    twin = copy.deepcopy(model)
    apply_lean(twin, lean)
    plain = plain_cross_entropy(model, *batch)
    plain.backward()
    leaner = cross_entropy(twin, *batch, rows=lean.loss_rows)
    leaner.backward()
    assert all(float(gradient.norm()) > 0 for gradient in gradients(model).values())
    return abs(float(leaner.detach() / plain.detach()) - 1), far_apart(gradients(twin), gradients(model))


# The same numbers


@OPTIONS
@pytest.mark.parametrize("config", [SHAPE, BIASED], ids=["tied", "biased and untied"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_loss_and_every_gradient_equal_the_plain_steps(lean, config, dtype, tolerance):
    assert max(compare(adapted(config, dtype), lean, text())) < tolerance


@pytest.mark.parametrize("length", [2, 100], ids=["products apart", "products added up"])
def test_both_orders_of_products_give_the_same(length):
    for width in (32, 48):
        assert _fuse_is_cheaper(3 * length, width, torch.empty(48, 32)) is (length == 100)
        assert not _fuse_is_cheaper(3 * length, width, torch.empty(48, 32, dtype=torch.bfloat16))
    assert max(compare(adapted(), ll.Lean(), text(length=length, ignored=False))) < 1e-10


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["down_proj"], ["gate_proj"], ["o_proj", "up_proj"]], ids=lambda names: names[0]
)
def test_layers_without_an_adapter_stay_frozen_and_right(targets):
    model = adapted(targets=targets)
    assert max(compare(model, ll.Lean(), text())) < 1e-10
    assert len(gradients(model)) == 2 * 3 * len(targets)


@pytest.mark.parametrize("layer", [RsLoRALinear, LoRAFALinear])
def test_variants_that_share_the_forward_pass_are_lean_too(layer):
    model = adapted(layer=layer)
    assert max(compare(model, ll.Lean(checkpoint=True), text())) < 1e-10
    assert ("model.layers.0.self_attn.q_proj.lora_A" in gradients(model)) is (layer is RsLoRALinear)


@OPTIONS
def test_dropout_draws_what_the_plain_step_draws(lean):
    model = adapted(dropout=0.3)
    twin = copy.deepcopy(model)
    apply_lean(twin, lean)
    found = []
    for one, loss in ((model, plain_cross_entropy), (twin, cross_entropy)):
        torch.manual_seed(5)
        loss(one, *text()).backward()
        found.append(gradients(one))
    assert far_apart(found[1], found[0]) < 1e-10
    torch.manual_seed(6)
    other = copy.deepcopy(model)
    other.zero_grad()
    plain_cross_entropy(other, *text()).backward()
    assert far_apart(gradients(other), found[0]) > 1e-3


def test_a_rewired_model_computes_generates_is_named_saved_and_merged_as_before(tmp_path):
    model, ids = adapted(dtype=torch.float32).eval(), text()[0]
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    apply_lean(twin, ll.Lean(checkpoint=True))
    expected = model(ids).detach()
    torch.testing.assert_close(twin(ids), expected, rtol=1e-5, atol=1e-5)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert torch.equal(twin.generate(ids[0], 8), model.generate(ids[0], 8))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    torch.testing.assert_close(twin(ids, mask), model(ids, mask), rtol=1e-5, atol=1e-5)
    assert twin.get_output_embeddings() is twin.lm_head
    ll.save_adapter(twin, tmp_path)
    take_off(plain)
    assert not torch.allclose(plain(ids), expected, atol=1e-3)
    ll.load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(ids), expected, rtol=1e-5, atol=1e-5)
    assert len(ll.merge(twin)) == 21
    torch.testing.assert_close(twin(ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_step_on_other_targets_than_it_has_read_makes_no_loss_that_looks_right(in_blocks):
    model = adapted(dtype=torch.float32)
    if in_blocks:
        quantize_head(model)
    apply_lean(model, ll.Lean())
    trained = [p for p in model.parameters() if p.requires_grad]
    step = LeanStep(model, partial(cross_entropy, rows=7), torch.optim.AdamW(trained, lr=0.01))
    full, padded = text(ignored=False), text(ignored=True)
    expected = plain_cross_entropy(copy.deepcopy(model), *padded)
    torch.testing.assert_close(step([padded], [1.0])[0], expected.detach(), rtol=1e-5, atol=0)  # nothing was read
    step.read_targets([full[1]])
    expected = plain_cross_entropy(copy.deepcopy(model), *full)
    torch.testing.assert_close(step([full], [1.0])[0], expected.detach(), rtol=1e-5, atol=0)
    if in_blocks:
        assert step([padded], [1.0])[0].isnan()
    else:
        with pytest.raises((RuntimeError, IndexError)):
            step([padded], [1.0])
    step.read_targets([padded[1]])
    step.model = adapted(dtype=torch.float32)  # the steps above have changed the other one
    torch.testing.assert_close(step.batch_loss(*padded), plain_cross_entropy(step.model, *padded), rtol=1e-5, atol=0)


def test_said_so_no_number_is_looked_at():
    from torch._subclasses.fake_tensor import DataDependentOutputException as LookedAt
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

    for in_blocks in (False, True):
        with FakeTensorMode():
            model = Llama(SHAPE)
            ll.inject(model, ll.LoRAConfig(rank=4))
            apply_lean(model, ll.Lean())
            if in_blocks:
                quantize_head(model)
            ids = torch.zeros(2, 9, dtype=torch.long)
            loss = cross_entropy(model, ids, ids, every_target=True)
            loss.backward()
            assert loss.shape == ()
            with pytest.raises((LookedAt, DynamicOutputShapeException)):
                cross_entropy(model, ids, ids)


def quantize_head(model):
    """Put the head into blocks, as a GGUF file's is."""
    weight = model.lm_head.weight
    packed, _ = quantize.nf4(weight, double=False)
    model.lm_head = BlockLinear(packed, "NF4", weight.shape, dtype=weight.dtype)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1), (torch.float64, 1), (torch.float64, 100)])
@pytest.mark.parametrize("size", [100, 130, 260, 1], ids=["uneven", "two", "one", "a row each"])
def test_the_loss_over_slices_of_the_vocabulary_is_the_plain_one_wherever_targets_lie(size, dtype, scale, monkeypatch):
    width, vocabulary = 32, 260
    monkeypatch.setattr(quantize, "_AT_ONCE", size * width)
    monkeypatch.setattr(quantize, "_MOST_SLICES", 10**6)
    packed, _ = quantize.nf4(torch.randn(vocabulary, width), double=False)
    head = BlockLinear(packed, "NF4", (vocabulary, width), dtype=dtype)
    starts = [start for start, _ in head.slices()]
    assert starts == list(range(0, vocabulary, size))
    assert head.slices()[-1][1] == vocabulary
    edges = sorted({at for start in [*starts, vocabulary] for at in (start - 1, start) if 0 <= at < vocabulary})
    targets = torch.tensor([*edges, 0, 0, 259, 259, 131])  # first and last of each slice, and some twice
    hidden = scale * torch.randn(len(targets), width, dtype=dtype)  # exponentials of 100 of these are infinite
    hidden.requires_grad_()
    loss = token_losses(hidden, targets, head).mean()
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ head.weight.double().T, targets)
    expected.backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert float((hidden.grad - exact.grad).norm() / exact.grad.norm()) < tolerance
    elsewhere = token_losses(hidden, (targets + 1) % vocabulary, head).mean().detach()
    assert abs(float(elsewhere) / expected.item() - 1) > 1e-4


def test_an_adapted_head_learns_too():
    model = adapted(BIASED, targets=["lm_head", "q_proj"])
    assert max(compare(model, ll.Lean(), text())) < 1e-10
    assert "lm_head.lora_A" in gradients(model)


ANGLES = torch.ones(4, 6, dtype=torch.float64)
BY_HAND = {  # the functions with a hand-written backward pass
    "layer": lambda x, layer: linear(layer, x),
    "gate": lambda x, layer: gated_linear(layer, x, x.flip(1)),
    "norm": lambda x, _: _RMSNorm.apply(x, ANGLES[0], 1e-5),
    "rotation": lambda x, _: _Rotate.apply(x, ANGLES, ANGLES),
    "losses": lambda x, layer: token_losses(x, torch.tensor([0, 3, 1, 2]), layer.base),
}


@pytest.mark.parametrize("function", BY_HAND.values(), ids=BY_HAND)
def test_gradients_by_hand_are_right_and_a_second_derivative_is_refused(function):
    layer = ll.LoRALinear(nn.Linear(6, 5, bias=False, dtype=torch.float64), rank=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, layer), (x,))
    (once,) = torch.autograd.grad(function(x, layer).square().sum(), x, create_graph=True)
    assert bool(once.any())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.square().sum().backward()


@pytest.mark.parametrize("rows", [1, 50])
def test_one_adapted_layer_equals_its_own_forward_pass(rows):
    layer = randomise(ll.LoRALinear(nn.Linear(6, 5, dtype=torch.float64), rank=2, alpha=3))
    x = torch.randn(rows, 6, dtype=torch.float64)
    torch.testing.assert_close(linear(layer, x), layer(x), rtol=1e-12, atol=1e-12)


def test_without_gradients_the_loss_is_the_same_and_nothing_is_kept():
    model = adapted()
    apply_lean(model, ll.Lean())
    with torch.no_grad():
        loss = cross_entropy(model, *text())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, cross_entropy(model, *text()).detach(), rtol=0, atol=0)


# A base in half precision


def rounded(model):
    """The model with frozen matrices that bfloat16 holds exactly, still in float32."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.ndim == 2 and "lora_" not in name:
                parameter.copy_(parameter.bfloat16())
    return twin


def assert_as_exact(model, exact, tolerance=0.1):
    """A lean model against a float32 one of the same numbers: gradients, and before and after merging loss and logits.

    Gradients may be apart by the tolerance, logits by a fifth of it, and the loss by a tenth.
    """
    for one, loss in ((model, cross_entropy), (exact, plain_cross_entropy)):
        torch.manual_seed(5)  # for dropout
        loss(one, *text()).backward()
    assert far_apart(gradients(model), gradients(exact)) < tolerance
    ids = text()[0]
    for change in (nn.Module.eval, ll.merge):
        change(model)
        change(exact)
        with torch.no_grad():
            logits, expected = model(ids), exact(ids)
            loss, by_exact = cross_entropy(model, *text()), plain_cross_entropy(exact, *text())
        assert logits.dtype == torch.float32
        assert float((logits - expected).norm() / expected.norm()) < tolerance / 5
        assert loss.item() == pytest.approx(by_exact.item(), rel=tolerance / 10)
        assert model.generate(ids[0], 3).shape == (3,)


@pytest.mark.parametrize("config", [SHAPE, BIASED], ids=["tied", "biased and untied"])
@pytest.mark.parametrize(
    "settings", [{}, {"targets": ["q_proj"]}, {"targets": ["layers.1.mlp.up_proj"]}, {"dropout": 0.3}], ids=str
)
def test_a_bfloat16_base_takes_biases_dropout_and_layers_without_an_adapter(config, settings):
    model = adapted(config, dtype=torch.float32, **settings)
    exact = rounded(model)
    biases = {name: p.clone() for name, p in model.named_parameters() if name.endswith("bias")}
    apply_lean(model, ll.Lean(base_dtype=torch.bfloat16))
    for name, parameter in model.named_parameters():
        assert (parameter.dtype == torch.bfloat16) is (parameter.ndim == 2 and "lora_" not in name)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (config is SHAPE)
    assert_as_exact(model, exact)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())
    after_merging = dict(model.named_parameters())
    assert (config is BIASED) is bool(biases)
    for name, bias in biases.items():
        assert torch.equal(after_merging[name.replace("base.", "")], bias)


@pytest.mark.parametrize("lean", [ll.Lean(), ll.Lean(base_dtype=torch.bfloat16)], ids=["as it is", "cast"])
def test_a_model_loaded_in_bfloat16_is_lean_as_it_is(lean):
    model = Llama(BIASED).bfloat16()
    ll.inject(model, ll.LoRAConfig(rank=4, alpha=6, targets=["q_proj", "down_proj"]))
    randomise(model)
    exact = copy.deepcopy(model.train()).float()
    apply_lean(model, lean)
    assert_as_exact(model, exact)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for name, parameter in model.named_parameters() if "norm" in name} == {torch.float32}


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "blocks", "blocks in bfloat16"])
def test_an_adapted_head_over_a_bfloat16_base_computes_logits_and_is_merged(kept):
    model = Llama(BIASED)
    if "blocks" in kept:
        quantize_head(model)
    if "bfloat16" in kept:
        model.bfloat16()
    ll.inject(model, ll.LoRAConfig(rank=4, alpha=6, targets=["lm_head", "q_proj"]))
    randomise(model)
    exact = dense_twin(model.train())
    if kept == "float32":  # an adapted head is not cast, or the merged one would be
        head = exact.lm_head.base.weight.detach().clone()
        exact = rounded(exact)
        exact.lm_head.base.weight.data = head
    apply_lean(model, ll.Lean(base_dtype=torch.bfloat16))
    assert_as_exact(model, exact)
    torch.testing.assert_close(model.lm_head.weight, exact.lm_head.weight, rtol=1e-6, atol=1e-8)


def test_a_variant_put_on_a_merged_lean_model_computes_what_it_is():
    start = adapted()
    for layer in (DoRALinear, PiSSALinear, ll.LoRALinear):
        plain, leaner = copy.deepcopy(start), copy.deepcopy(start)
        apply_lean(leaner, ll.Lean(checkpoint=True))
        for model in (plain, leaner):
            ll.merge(model)
            ll.inject(model, ll.LoRAConfig(rank=4, alpha=6), seed=1, layer=layer)
            randomise(model)
        plain_cross_entropy(plain, *text()).backward()
        cross_entropy(leaner, *text()).backward()
        assert far_apart(gradients(leaner), gradients(plain)) < 1e-10
        ids = text()[0]
        torch.testing.assert_close(leaner(ids), plain(ids), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "with adapters"])
@pytest.mark.parametrize("config", [SHAPE, BIASED], ids=["tied", "biased and untied"])
def test_all_that_is_unfrozen_in_a_lean_model_gets_its_gradient(merged, config):
    model = adapted(config)
    leaner = copy.deepcopy(model)
    apply_lean(leaner, ll.Lean(checkpoint=True))
    for one in (model, leaner):
        if merged:
            ll.merge(one)
        one.requires_grad_(True)
    plain_cross_entropy(model, *text()).backward()
    cross_entropy(leaner, *text()).backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert far_apart(gradients(leaner), gradients(model)) < 1e-10


# A base in blocks


@pytest.fixture
def in_blocks():
    """A model whose linear layers are in NF4, and the same with those weights dense."""
    model = Llama(WIDE)
    quantize_nf4(model)
    dense = dense_twin(model)
    for one in (model, dense):
        ll.inject(one, ll.LoRAConfig(rank=4, alpha=6))
        randomise(one)
        one.train()
    return model, dense


def dense_twin(model):
    """The same weights in float32, with nothing in blocks."""
    twin = copy.deepcopy(model).float()
    for name, module in list(twin.named_modules()):
        if isinstance(module, BlockLinear | BlockEmbedding):
            weight = nn.Parameter(module.weight.clone(), requires_grad=False)
            rows, columns = weight.shape
            dense = nn.Linear(columns, rows, False) if isinstance(module, BlockLinear) else nn.Embedding(rows, columns)
            dense.weight = weight
            replace(twin, name, dense)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_a_model_all_in_blocks_computes_trains_and_writes_in_either_precision(dtype, targets, monkeypatch):
    model = Llama(WIDE)
    quantize_nf4(model)
    table = gguf.quantize(model.model.embed_tokens.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
    blocks = nn.Parameter(torch.from_numpy(table).view(-1, 34), requires_grad=False)
    model.model.embed_tokens = BlockEmbedding(blocks, "Q8_0", (260, 64))
    model.lm_head = BlockLinear(blocks, "Q8_0", (260, 64))
    model.to(dtype)
    monkeypatch.setattr(quantize, "_AT_ONCE", 100 * 64)  # the head is read in three slices
    monkeypatch.setattr(quantize, "_MOST_SLICES", 10**6)
    ll.inject(model, ll.LoRAConfig(rank=4, alpha=6, targets=targets))
    randomise(model, size=0.15)
    exact = dense_twin(model.train())
    names = list(model.state_dict())
    apply_lean(model, ll.Lean(checkpoint=True))
    assert list(model.state_dict()) == names
    assert model.model.embed_tokens.packed is model.lm_head.packed
    assert model.model(text()[0]).dtype == torch.float32
    assert_as_exact(model, exact, 1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("length", [4, 60], ids=["products apart", "products added up"])
def test_a_base_in_blocks_gives_the_gradients_of_its_dense_twin(in_blocks, length):
    model, dense = in_blocks
    apply_lean(model, ll.Lean(checkpoint=True))
    packed = {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    batch = text(length=length, ignored=length == 60)
    found = cross_entropy(model, *batch)
    found.backward()
    expected = plain_cross_entropy(dense, *batch)
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert far_apart(gradients(model), gradients(dense)) < 1e-4
    assert packed
    for name, value in packed.items():
        assert torch.equal(model.get_parameter(name), value)


@pytest.mark.slow
def test_the_real_model_in_its_blocks_gives_the_gradients_of_the_float32_one(smollm2):
    text = "Low-rank adaptation changes a model by a product of two thin matrices. " * 3
    ids = torch.tensor([smollm2[1].encode(text)])
    batch, models = (ids[:, :-1], ids[:, 1:]), (ll.load_pretrained(keep_blocks=True, device="cpu")[0], smollm2[0])
    blocks, dense = models[0], copy.deepcopy(models[1])
    for model in (blocks, dense):
        ll.inject(model, ll.LoRAConfig(rank=8))
        randomise(model, size=0.05)
    apply_lean(blocks, ll.Lean(checkpoint=True))
    losses = cross_entropy(blocks, *batch), plain_cross_entropy(dense, *batch)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    ours, theirs = (torch.cat([g.flatten() for g in gradients(model).values()]) for model in (blocks, dense))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_a_run_on_blocks_counts_the_weights_they_stand_for():
    dense, blocks = Llama(WIDE), Llama(WIDE)
    quantize_nf4(blocks)
    settings = {"steps": 1, "lr": 0.01, "batch_size": 2}
    counted = [ll.fit(model, toy_task(), ll.LoRA(rank=4), **settings).total_parameters for model in (dense, blocks)]
    assert counted[0] == counted[1]
    assert counted[0] > sum(parameter.numel() for parameter in blocks.parameters())


# What it keeps


def kept(model, loss, batch):
    return saved_bytes(lambda: loss(model, *batch), model)


def test_activations_kept_are_those_the_backward_pass_needs():
    batch = text(sequences=4, length=32, ignored=False)
    tokens = 4 * 32
    plain, leaner, checkpointed = (adapted(dtype=torch.float32) for _ in range(3))
    apply_lean(leaner, ll.Lean())
    apply_lean(checkpointed, ll.Lean(checkpoint=True))
    by_plain = kept(plain, plain_cross_entropy, batch)
    by_lean = kept(leaner, cross_entropy, batch)
    by_checkpoint = kept(checkpointed, cross_entropy, batch)
    # Of logits (260 a token) and of silu(gate), silu(gate) * up in three blocks nothing is kept any more; what the
    # loss keeps instead is the gradient of its input (32).
    assert by_plain - by_lean >= 4 * tokens * (260 + 3 * 2 * 48 - 32)
    # A checkpointed block keeps its input (32 numbers); beside them stand the last norm and the loss's gradient.
    assert by_checkpoint <= 4 * tokens * (3 * 32 + 3 * 32 + 64)
    assert by_checkpoint < by_lean / 3


def kept_by(layer=None, **settings):
    """The bytes that a lean step of 4 x 32 tokens keeps."""
    model = adapted(dtype=torch.float32, layer=layer, **settings)
    apply_lean(model, ll.Lean())
    return kept(model, cross_entropy, text(sequences=4, length=32, ignored=False))


def test_the_input_of_query_key_and_value_is_kept_once_and_where_a_is_frozen_not_at_all():
    narrowed = 4 * 32 * 4  # tokens times rank: what an A makes of the input
    both = kept_by(targets=["q_proj", "k_proj", "v_proj"])
    assert both == kept_by(targets=["q_proj"]) + 4 * narrowed * 2 * 3  # bytes, two layers, three blocks
    # The input of q_proj; o_proj's is attention's output, which is kept there.
    pair = {"targets": ["q_proj", "o_proj"]}
    assert kept_by(**pair) - kept_by(LoRAFALinear, **pair) >= 4 * 32 * 4 * 3 * 32


def test_below_the_lowest_adapter_nothing_is_kept_and_no_gradient_computed():
    top, needed = adapted(targets=["layers.2.mlp.down_proj"]), []
    apply_lean(top, ll.Lean())
    for block in top.model.layers:
        block.register_forward_hook(lambda module, inputs, output: needed.append(output.requires_grad))
    cross_entropy(top, *text()).backward()
    assert needed == [False, False, True]
    assert set(gradients(top)) == {"model.layers.2.mlp.down_proj.lora_A", "model.layers.2.mlp.down_proj.lora_B"}
    assert kept_by(targets=["layers.2.mlp.down_proj"]) < kept_by() / 2


# Optimiser


def test_flat_adamw_takes_the_steps_of_torchs_adamw():
    model = adapted(dtype=torch.float64)
    twin = copy.deepcopy(model)
    groups = [
        [[getattr(layer, part) for layer in ll.lora_layers(one).values()] for part in ("lora_A", "lora_B")]
        for one in (model, twin)
    ]
    own = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
    reference, flat = (
        optimizer([{"params": A}, {"params": B, **own}], lr=0.01, weight_decay=0.1)
        for optimizer, (A, B) in zip((torch.optim.AdamW, FlatAdamW), groups, strict=True)
    )
    before = ll.adapter_state(model)
    assert far_apart(ll.adapter_state(twin), before) == 0
    for step in range(4):
        for one, optimizer in ((model, reference), (twin, flat)):
            optimizer.zero_grad()
            plain_cross_entropy(one, *text(seed=step)).backward()
            optimizer.step()
    assert far_apart(ll.adapter_state(twin), ll.adapter_state(model)) < 1e-12
    assert far_apart(ll.adapter_state(twin), before | {k: v + 1e-9 for k, v in before.items()}) > 1e-3
    for one, other in zip(*([*A, *B] for A, B in groups), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(flat.state[other][key].double(), reference.state[one][key].double())


def test_parameters_and_gradients_stay_views_of_one_tensor():
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = FlatAdamW([{"params": trained}])
    plain_cross_entropy(model, *text()).backward()
    optimizer.zero_grad(set_to_none=True)
    assert len({p.untyped_storage().data_ptr() for p in trained}) == 1
    assert len({p.grad.untyped_storage().data_ptr() for p in trained}) == 1
    assert all(float(p.grad.abs().max()) == 0 for p in trained)


def quadratic(parameters):
    return sum(parameter.square().sum() for parameter in parameters)


def two_groups():
    """Three parameters in two groups, and the groups as an optimiser takes them."""
    parameters = [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((3, 4), (5,), (2, 2))]
    return parameters, [{"params": parameters[:2], "lr": 0.05}, {"params": parameters[2:], "weight_decay": 0.1}]


def steps_of(parameters, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        quadratic(parameters).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("other", [FlatAdamW, torch.optim.AdamW])
def test_a_stored_state_is_taken_up_and_the_steps_go_on(other):
    parameters, groups = two_groups()
    stored = other(groups, lr=0.01)
    kept = steps_of(parameters, stored, 3)
    state = copy.deepcopy(stored.state_dict())
    expected = steps_of(parameters, stored, 2)
    fresh, groups = two_groups()
    with torch.no_grad():
        for parameter, value in zip(fresh, kept, strict=True):
            parameter.copy_(value)
    optimizer = FlatAdamW([group | {"lr": 1.0} for group in groups])
    optimizer.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]
    assert len({optimizer.state[p]["exp_avg"].untyped_storage().data_ptr() for p in fresh[:2]}) == 1
    torch.testing.assert_close(steps_of(fresh, optimizer, 2), expected, rtol=1e-12, atol=1e-12)
    unloaded = FlatAdamW([{"params": two_groups()[0]}])
    assert all(float(state["step"]) == 5 for state in optimizer.state_dict()["state"].values())
    assert all(float(state["step"]) == 0 for state in unloaded.state_dict()["state"].values())


def test_the_flat_optimiser_takes_each_parameter_once_and_a_state_at_one_step_only():
    parameters, groups = two_groups()
    with pytest.raises(ValueError, match="2 parameters are in two groups"):
        FlatAdamW([*groups, {"params": parameters[1:]}])
    plain = torch.optim.AdamW(groups)
    optimizer = FlatAdamW(two_groups()[1])
    for trained in ([], parameters[1:], parameters):  # no state, none of one parameter, and two different steps
        if trained:
            steps_of(trained, plain, 1)
        with pytest.raises(ValueError, match="at the steps"):
            optimizer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("way", ["by the model", "by both", "one has none"])
def test_gradients_that_are_no_views_any_more_are_stepped_along_all_the_same(way):
    ends = []
    for kind in (torch.optim.AdamW, FlatAdamW):
        torch.manual_seed(0)
        parameters, groups = two_groups()
        optimizer = kind(groups, lr=0.01)
        for step in range(3):
            lacking = way == "one has none" and step > 0  # after a step in which it had one
            for parameter in parameters:  # as model.zero_grad() does
                parameter.grad = None
            if way == "by both":
                quadratic(parameters).backward()
                optimizer.zero_grad()
            quadratic(parameters[lacking:]).backward()
            if lacking and kind is torch.optim.AdamW:  # which would leave it out
                parameters[0].grad = torch.zeros_like(parameters[0])
            optimizer.step()
        ends.append([parameter.detach() for parameter in parameters])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


# Threads


def in_threads(model, loss):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return LeanStep(model, loss, torch.optim.AdamW(trained), threads=2)


def test_two_threads_give_the_gradients_of_one_weighted_by_targets():
    model = adapted()
    apply_lean(model, ll.Lean())
    ids, targets = text(sequences=4)
    targets[1] = IGNORE
    targets[2, 6:] = IGNORE  # the halves differ in targets
    cross_entropy(model, ids, targets).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    halves = [(ids[:2], targets[:2]), (ids[2:], targets[2:])]
    counts = [int((half != IGNORE).sum()) for _, half in halves]
    assert counts[0] != counts[1]
    model.zero_grad()
    step = in_threads(model, cross_entropy)
    losses = step.backward(halves, [count / sum(counts) for count in counts])
    assert far_apart(gradients(model), expected) < 1e-12
    torch.testing.assert_close(sum(losses), cross_entropy(model, ids, targets).detach(), rtol=1e-12, atol=0)
    model.zero_grad()
    step.backward(halves, [0.5, 0.5])
    assert far_apart(gradients(model), expected) > 1e-3


@pytest.mark.parametrize("fails", [False, True])
def test_threads_work_side_by_side_on_one_core_each_and_leave_the_count_as_it_was(fails):
    meeting = threading.Barrier(2, timeout=20)
    seen = []

    def loss(model, inputs, targets):
        meeting.wait()  # passes only if both are here at once
        seen.append((threading.get_ident(), torch.get_num_threads()))
        if fails:
            raise RuntimeError("planted")
        return plain_cross_entropy(model, inputs, targets)

    before = torch.get_num_threads()
    ids, targets = text(sequences=4)
    with pytest.raises(RuntimeError, match="planted") if fails else nullcontext():
        in_threads(adapted(), loss).backward([(ids[:2], targets[:2]), (ids[2:], targets[2:])], [0.5, 0.5])
    assert torch.get_num_threads() == before
    assert len({thread for thread, _ in seen}) == 2
    assert {count for _, count in seen} == {1}


# In fit


def toy_task(loss=plain_cross_entropy, n=24):
    """Eight tokens, each followed by one and the same other."""
    ids = torch.randint(0, 8, (n, 12), generator=torch.Generator().manual_seed(1))
    rows = Examples(ids, (ids * 3 + 1) % 8)
    parts = {"train": rows, "validation": rows[:6], "test": rows[6:9], "off_domain": rows[9:12]}
    return Task(name="toy", **parts, loss=loss, unit="tokens", about="made up")


def train(lean=None, method=None, **settings):
    model, settings = Llama(SHAPE), {"steps": 6, "lr": 0.01, "batch_size": 4, "eval_every": 3, **settings}
    return model, ll.fit(model, toy_task(), method or ll.LoRA(rank=4), lean=lean, **settings)


METHODS = (ll.LoRAPlus(rank=4, ratio=4.0), ll.RsLoRA(rank=4), ll.LoRAFA(rank=4))
RUNS = [*((ll.Lean(), {"method": method}) for method in METHODS), (ll.Lean(threads=2), {"accumulate": 2})]


@pytest.mark.parametrize(("lean", "options"), RUNS, ids=str)
def test_fit_learns_the_same_with_a_lean_step(lean, options):
    _, plain = train(**options)
    model, history = train(lean, **options)
    for column in ("train_loss", "validation_loss", "grad_norm"):
        assert history.curve(column)[1] == pytest.approx(plain.curve(column)[1], rel=1e-3)
    assert history.curve("train_loss")[1][-1] < history.curve("train_loss")[1][0]
    assert history.settings["lean"] == lean.settings()
    assert "lean" not in plain.settings
    assert history.optimizer_bytes == plain.optimizer_bytes
    assert ll.evaluate(model, toy_task()) == pytest.approx(history.curve("validation_loss")[1][-1], rel=1e-4)


def test_batches_by_length_learn_the_same_with_a_lean_step():
    task = toy_task()
    for row, targets in enumerate(task.train.targets):
        targets[1 + row % 12 :] = IGNORE
    task = dataclasses.replace(task, train=Padded(task.train.inputs, task.train.targets))
    plain, leaner, at_random = (
        ll.fit(Llama(SHAPE), task, ll.LoRA(rank=4), **SHORT | {"batches": "by_length"} | extra)
        for extra in ({}, {"lean": ll.Lean(threads=2)}, {"batches": "random"})
    )
    for column in ("train_loss", "validation_loss", "tokens"):
        assert leaner.curve(column)[1] == pytest.approx(plain.curve(column)[1], rel=1e-3)
    assert plain.curve("tokens")[1] != at_random.curve("tokens")[1]


def test_a_loss_of_the_tasks_own_is_left_to_it():
    called = []

    def loss(model, inputs, targets):
        called.append(1)
        return plain_cross_entropy(model, inputs, targets)

    ll.fit(Llama(SHAPE), toy_task(loss), ll.LoRA(rank=2), steps=1, lr=0.01, batch_size=2, lean=ll.Lean())
    assert called


# What it refuses


WRONG = [
    (lambda: ll.Lean(base_dtype=torch.float16), r"base_dtype is torch\.float16"),
    (lambda: ll.Lean(threads=0), "threads is 0"),
    (lambda: ll.Lean(loss_rows=0), "loss_rows is 0"),
]


@pytest.mark.parametrize(("call", "says"), WRONG)
def test_wrong_values_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def unlock(model):
    model.model.norm.weight.requires_grad_(True)
    return model


def hooked(name, kind):
    model = adapted()
    getattr(model.get_submodule(name), f"register_{kind}_hook")(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "lean", "says"),
    [
        (lambda: DigitsMLP(width=8), ll.Lean(), "lora_lab's Llama, but the model is a DigitsMLP; leave lean out"),
        (lambda: Llama(SHAPE), ll.Lean(), "is trained, but the lean step trains adapters only"),
        (lambda: adapted(layer=DoRALinear), ll.Lean(), "is a DoRALinear, whose forward pass has no lean form"),
        (lambda: adapted(layer=PiSSALinear), ll.Lean(), "is a PiSSALinear, whose forward pass has no lean form"),
        (lambda: unlock(adapted()), ll.Lean(), "'model.norm.weight' is trained"),
        (lambda: hooked("model.layers.1", "forward"), ll.Lean(), "'model.layers.1' has a hook"),
        (lambda: hooked("model.layers.0.mlp.up_proj", "forward_pre"), ll.Lean(), "'model.layers.0.mlp.up_proj' has a"),
        (lambda: hooked("model.layers.0.self_attn", "full_backward"), ll.Lean(), "'model.layers.0.self_attn' has a"),
        (lambda: hooked("lm_head", "full_backward_pre"), ll.Lean(), "'lm_head' has a hook"),
        (lambda: hooked("", "forward"), ll.Lean(torch.bfloat16), "'the model' has a hook"),
        (lambda: adapted(dropout=0.1), ll.Lean(threads=2), "threads is 2, but the adapters have dropout"),
    ],
)
def test_what_cannot_be_lean_is_refused_and_left_as_it_was(make, lean, says):
    model = make()
    before = [(name, id(module)) for name, module in model.named_modules()]
    dtypes = [p.dtype for p in model.parameters()]
    with pytest.raises(ValueError, match=says):
        apply_lean(model, lean)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert [p.dtype for p in model.parameters()] == dtypes


SHORT = {"steps": 3, "lr": 0.01, "batch_size": 4}


@pytest.mark.parametrize("lean", [ll.Lean(), ll.Lean(torch.bfloat16, checkpoint=True)], ids=["float32", "bfloat16"])
def test_adapters_are_trained_further_in_the_lean_blocks_that_are_there(lean):
    model, other = Llama(SHAPE), Llama(SHAPE)
    ll.fit(model, toy_task(), ll.LoRA(rank=4), lean=lean, **SHORT)
    ll.load_adapter(other, ll.adapter_state(model))
    histories = [ll.fit(each, toy_task(), ll.ContinueLoRA(), lean=lean, **SHORT) for each in (model, other)]
    assert histories[0].curve("train_loss") == histories[1].curve("train_loss")
    for name, value in ll.adapter_state(other).items():
        assert torch.equal(ll.adapter_state(model)[name], value)


def test_lean_blocks_take_new_options_and_may_have_hooks():
    model, seen = adapted(dtype=torch.float32), []
    apply_lean(model, ll.Lean())
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    blocks = [*model.model.layers]
    apply_lean(model, ll.Lean(torch.bfloat16, checkpoint=True))
    assert all(map(lambda one, other: one is other, model.model.layers, blocks))
    assert all(block.checkpoint for block in blocks)
    assert model.model.layers[0].mlp.up_proj.base.weight.dtype == torch.bfloat16
    cross_entropy(model, *text()).backward()
    assert len(seen) == 1


def test_a_lean_model_is_trained_again_once_it_is_merged():
    model, _ = train(ll.Lean())
    ll.merge(model)
    plain, lean = (
        ll.fit(copy.deepcopy(model), toy_task(), ll.LoRA(rank=4), lean=lean, **SHORT) for lean in (None, ll.Lean())
    )
    assert lean.curve("train_loss")[1] == pytest.approx(plain.curve("train_loss")[1], rel=1e-3)


def test_a_call_that_the_lean_step_refused_can_be_corrected():
    model, options = Llama(SHAPE), {"lean": ll.Lean(threads=2), **SHORT}
    with pytest.raises(ValueError, match="threads is 2, but the adapters have dropout"):
        ll.fit(model, toy_task(), ll.LoRA(rank=4, dropout=0.1), **options)
    corrected, expected = (ll.fit(each, toy_task(), ll.LoRA(rank=4), **options) for each in (model, Llama(SHAPE)))
    assert corrected.curve("validation_loss") == expected.curve("validation_loss")


def test_a_lean_model_under_autocast_says_that_it_has_a_half_precision_of_its_own():
    model = adapted(dtype=torch.float32)
    apply_lean(model, ll.Lean())
    expected = cross_entropy(model, *text())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in (lambda: cross_entropy(model, *text()), lambda: model(text()[0])):
            with pytest.raises(RuntimeError, match=r"under torch\.autocast.*Lean\(base_dtype="):
                call()
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(cross_entropy(model, *text()), expected)


def test_the_defaults_of_the_flat_optimiser_are_those_of_adamw():
    weight = nn.Parameter(torch.ones(2))
    flat, plain = FlatAdamW([{"params": [weight]}]), torch.optim.AdamW([weight])
    assert flat.defaults == {name: plain.defaults[name] for name in flat.defaults}
    assert {"lr", "betas", "eps", "weight_decay"} <= flat.defaults.keys()
