"""LoRA on embeddings, convolutions, GPT-2's Conv1D and attention, against torch's own functions and cases by hand."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lora_lab import LoRAConfig, LoRALinear, adapter_state, inject
from lora_lab.adapters.edit import off, switch
from lora_lab.layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRAOutProjection
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear
from tests.helpers import randomise, relative_error

pytestmark = pytest.mark.usefixtures("seeded")


HALF = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def copies(layer):
    """Leaves with the values of A and B, for a formula written out here."""
    return layer.lora_A.detach().clone().requires_grad_(), layer.lora_B.detach().clone().requires_grad_()


def same_gradients(layer, out, expected, A, B, tolerance=1e-12):
    """Output and gradients of a layer are those of a formula in A and B."""
    assert relative_error(out, expected) < tolerance
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    assert relative_error(layer.lora_A.grad, A.grad) < tolerance
    assert relative_error(layer.lora_B.grad, B.grad) < tolerance
    assert A.grad.abs().max() > 1e-3
    assert B.grad.abs().max() > 1e-3


# Conv2d


def test_a_convolution_of_two_by_two_equals_what_was_computed_by_hand():
    base = nn.Conv2d(1, 2, 2)
    layer = LoRAConv2d(base, rank=1, alpha=3.0)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]], [[[0.0, 2.0], [0.0, 0.0]]]]))
        base.bias.copy_(torch.tensor([0.5, -1.0]))
        layer.lora_A.copy_(torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]]))
        layer.lora_B.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
    x = torch.tensor([[[[1.0, 2.0, 0.0], [3.0, 1.0, 4.0]]]])
    # Windows (1 2 / 3 1) and (2 0 / 1 4): the base gives 2.5, 6.5 and 3, -1; A gives 4 and -2; scaling is 3.
    assert base(x).flatten().tolist() == [2.5, 6.5, 3.0, -1.0]
    assert layer.delta().flatten(1).tolist() == [[6.0, 12.0, 0.0, -6.0], [-3.0, -6.0, 0.0, 3.0]]
    for adapted in (layer, layer.merged()):
        assert adapted(x).flatten().tolist() == [26.5, -5.5, -9.0, 5.0]


def padded(x, height, width, mode):
    """What padding of a mode of nn.Conv2d means, by torch's function for the mode."""
    if mode == "zeros":
        return F.pad(x, (width, width, height, height))
    return F.pad(x, (width, width, height, height), mode=mode)


@pytest.mark.parametrize(
    ("options", "pads"),
    [
        ({}, (0, 0)),
        ({"bias": False}, (0, 0)),
        ({"stride": (2, 3)}, (0, 0)),
        ({"padding": (1, 2)}, (1, 2)),
        ({"padding": "same", "dilation": (1, 2)}, (1, 4)),
        ({"padding": 2, "dilation": (2, 1), "stride": 2}, (2, 2)),
        ({"padding": (2, 1), "padding_mode": "reflect"}, (2, 1)),
        ({"padding": (1, 2), "padding_mode": "circular", "stride": (1, 2)}, (1, 2)),
        ({"padding": 1, "padding_mode": "replicate", "dilation": 2}, (1, 1)),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "one"])
def test_a_convolution_is_torchs_with_the_merged_weight(options, pads, batched):
    layer = randomise(LoRAConv2d(nn.Conv2d(3, 6, (3, 5), **options, dtype=torch.float64), rank=2, alpha=5))
    base = layer.base
    x = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    x = x if batched else x[0]
    A, B = copies(layer)
    weight = base.weight + 2.5 * torch.einsum("or,rihw->oihw", B[:, :, 0, 0], A)
    wide = padded(x if batched else x[None], *pads, options.get("padding_mode", "zeros"))
    expected = F.conv2d(wide, weight, base.bias, base.stride, 0, base.dilation)
    expected = expected if batched else expected[0]
    out = layer(x)
    assert out.shape == base(x).shape
    assert relative_error(out, base(x)) > 0.1
    torch.testing.assert_close(layer.delta(), (weight - base.weight).detach(), rtol=0, atol=1e-14)
    assert relative_error(layer.merged()(x), out) < 1e-14
    same_gradients(layer, out, expected, A, B)
    assert base.weight.grad is None


# Embedding


def test_a_row_of_an_embedding_equals_what_was_computed_by_hand():
    base = nn.Embedding(3, 2)
    layer = LoRAEmbedding(base, rank=2, alpha=1.0)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0], [4.0, 0.5]]))
        layer.lora_A.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]]))
        layer.lora_B.copy_(torch.tensor([[2.0, 1.0], [0.0, -2.0]]))
    # Token 2: A's column (2, 1), B times it is (5, -2), half of that is (2.5, -1).
    assert layer.delta().tolist() == [[1.0, 0.0], [1.5, -3.0], [2.5, -1.0]]
    for adapted in (layer, layer.merged()):
        assert adapted(torch.tensor([2, 0])).tolist() == [[6.5, -0.5], [2.0, 2.0]]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_an_embedding_is_torchs_with_the_merged_table(shape):
    layer = randomise(LoRAEmbedding(nn.Embedding(9, 6, dtype=torch.float64), rank=3, alpha=6))
    ids = torch.randint(0, 9, shape)
    A, B = copies(layer)
    table = layer.base.weight + 2 * torch.einsum("wr,rt->tw", B, A)
    out = layer(ids)
    assert out.shape == (*shape, 6)
    assert relative_error(out, layer.base(ids)) > 0.1
    torch.testing.assert_close(layer.delta(), (table - layer.base.weight).detach(), rtol=0, atol=1e-14)
    same_gradients(layer, out, F.embedding(ids, table), A, B)
    assert layer.base.weight.grad is None


def test_an_embedding_starts_with_a_at_zero_and_b_normal_so_that_a_learns_first():
    layer = LoRAEmbedding(nn.Embedding(50, 400), rank=20, alpha=8)
    assert layer.lora_A.shape == (20, 50)
    assert layer.lora_B.shape == (400, 20)
    assert not layer.lora_A.any()
    assert float(layer.lora_B.detach().std()) == pytest.approx(1, rel=0.03)
    assert abs(float(layer.lora_B.detach().mean())) < 0.03
    ids = torch.arange(7)
    assert torch.equal(layer(ids), layer.base(ids))
    layer(ids).square().sum().backward()
    assert layer.lora_A.grad[:, :7].abs().min() > 0
    assert not layer.lora_A.grad[:, 7:].any()
    assert not layer.lora_B.grad.any()


def test_the_padding_token_learns_nothing():
    layer = LoRAEmbedding(nn.Embedding(6, 4, padding_idx=2), rank=3, alpha=3)
    ids = torch.tensor([2, 1, 2, 0])
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(ids).sub(1).square().sum().backward()
        assert not layer.lora_A.grad[:, 2].any()
        assert layer.lora_A.grad[:, [0, 1]].abs().min() > 0
        optimizer.step()
    assert not layer(torch.tensor(2)).any()
    assert layer.merged().padding_idx == 2
    assert not layer.merged().weight[2].any()
    assert layer.merged().weight[1].sub(layer.base.weight[1]).abs().min() > 0


def test_gradients_by_frequency_are_torchs():
    base = nn.Embedding(6, 4, scale_grad_by_freq=True, dtype=torch.float64)
    layer = randomise(LoRAEmbedding(base, rank=3, alpha=3))
    ids = torch.tensor([1, 1, 1, 4])
    layer(ids).sum().backward()
    A, B = copies(layer)
    (F.embedding(ids, A.T, scale_grad_by_freq=True) @ B.T).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, A.grad, rtol=1e-13, atol=0)
    torch.testing.assert_close(layer.lora_A.grad[:, 1], layer.lora_A.grad[:, 4], rtol=1e-13, atol=0)  # 3 of 3, 1 of 1


# GPT-2's Conv1D


def test_gpt2s_layer_is_a_linear_one_with_the_weight_turned():
    turned = hf.pytorch_utils.Conv1D(5, 7).double()
    nn.init.normal_(turned.bias)
    layer = randomise(LoRAConv1D(turned, rank=3, alpha=6))
    assert turned.weight.shape == layer.delta().shape == (7, 5)
    assert layer.lora_A.shape == (3, 7)
    assert layer.lora_B.shape == (5, 3)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    A, B = copies(layer)
    expected = F.linear(x, turned.weight.T + 2 * B @ A, turned.bias)
    out = layer(x)
    assert relative_error(out, turned(x)) > 0.1
    merged = layer.merged()
    assert (type(merged), merged.nf, merged.weight.shape) == (type(turned), 5, (7, 5))
    assert relative_error(merged(x), out) < 1e-14
    same_gradients(layer, out, expected, A, B)


# Attention, whose parent reads the weight


def attention(dtype=torch.float64, **options):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, dtype=dtype, batch_first=True, **options)})
    base = copy.deepcopy(model["attention"])
    inject(model, LoRAConfig(rank=3, alpha=6, targets=["out_proj"]))
    return model["attention"], base


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bias", [True, False])
def test_attentions_output_projection_acts_and_learns_though_it_is_only_read(need_weights, training, bias):
    model, base = attention(bias=bias)
    model.train(training)
    base.train(training)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    call = {"need_weights": need_weights}
    assert relative_error(model(x, x, x, **call)[0], base(x, x, x, **call)[0]) < 1e-14
    layer = randomise(model).out_proj
    assert type(layer) is LoRAOutProjection
    A, B = copies(layer)
    expected = functional_call(base, {"out_proj.weight": base.out_proj.weight + 2 * B @ A}, (x, x, x), call)[0]
    out = model(x, x, x, **call)[0]
    assert relative_error(out, base(x, x, x, **call)[0]) > 0.1
    with torch.no_grad():  # torch's native path
        assert relative_error(model(x, x, x, **call)[0], expected) < 1e-14
    same_gradients(layer, out, expected, A, B)


# What holds for every kind


def noise(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IDS = torch.tensor([[3, 1, 4], [1, 5, 0]])
KINDS = {
    "linear": (LoRALinear, lambda: nn.Linear(7, 5), noise(4, 7)),
    "embedding": (LoRAEmbedding, lambda: nn.Embedding(6, 5), IDS),
    "convolution": (LoRAConv2d, lambda: nn.Conv2d(3, 5, 3, padding=1), noise(2, 3, 6, 6)),
    "gpt2": (LoRAConv1D, lambda: hf.pytorch_utils.Conv1D(5, 7), noise(4, 7)),
    "out_proj": (LoRAOutProjection, lambda: nn.MultiheadAttention(6, 2).out_proj, noise(4, 6)),
}
VARIANTS = (RsLoRALinear, LoRAFALinear, PiSSALinear, DoRALinear)
WITH_VARIANTS = KINDS | {kind.__name__: (kind, *KINDS["linear"][1:]) for kind in VARIANTS}
EVERY = pytest.mark.parametrize(("kind", "make", "x"), KINDS.values(), ids=KINDS)


def as_input(x, dtype):
    return x.to(dtype) if x.is_floating_point() else x


@torch.no_grad()
def layer_of(kind, make, dtype=torch.float32, **options):
    base = make().to(dtype)
    for parameter in base.parameters():
        parameter.normal_(std=0.5)
    return kind(base, rank=3, alpha=4.5, **options)


@pytest.mark.parametrize(("kind", "make", "x"), WITH_VARIANTS.values(), ids=WITH_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_new_layer_is_its_base_bit_for_bit_and_keeps_its_dtype_and_merges(kind, make, x, dtype):
    layer, x = layer_of(kind, make, dtype), as_input(x, dtype)
    assert {layer.lora_A.dtype, layer.lora_B.dtype} == {dtype if dtype == torch.float64 else torch.float32}
    assert torch.equal(layer(x), layer.base(x))
    state = {name: value.clone() for name, value in randomise(layer).state_dict().items()}
    out, merged = layer(x), layer.merged()
    assert out.dtype == merged.weight.dtype == layer.weight.dtype == dtype
    assert type(merged) is type(layer.base)
    assert relative_error(out, layer.base(x)) > 0.1
    assert relative_error(merged(x), out) < HALF.get(dtype, 1e-6 if dtype == torch.float32 else 1e-14)
    exact = layer.base.weight.double() + layer.delta().double()
    assert relative_error(merged.weight, exact) <= 1.001 * relative_error(exact.to(dtype), exact) + 1e-7
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


@EVERY
def test_the_weight_that_a_parent_reads_is_the_adapted_one_with_its_graph(kind, make, x):
    layer = randomise(layer_of(kind, make, torch.float64))
    assert torch.equal(layer.weight, layer.base.weight + layer.delta())
    assert not layer.delta().requires_grad
    assert kind is LoRAEmbedding or layer.bias is layer.base.bias
    A, B = copies(layer)
    product = torch.einsum("or,ri->oi", B.flatten(1), A.flatten(1)) * 1.5
    product = product.T if kind in (LoRAEmbedding, LoRAConv1D) else product
    same_gradients(layer, layer.weight, layer.base.weight + product.reshape(layer.base.weight.shape), A, B)


@EVERY
def test_mode_freezing_and_generator_of_every_kind(kind, make, x):
    base = make().eval()
    before = torch.get_rng_state()
    first, again, other = (
        kind(copy.deepcopy(base), 3, 4.5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    drawn = "lora_B" if kind is LoRAEmbedding else "lora_A"
    assert torch.equal(getattr(first, drawn), getattr(again, drawn))
    assert not torch.equal(getattr(first, drawn), getattr(other, drawn))
    assert [name for name, p in first.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert "rank=3, alpha=4.5, scaling=1.5" in repr(first)
    for training in (True, False):
        assert first.train(training).merged().training is training


@pytest.mark.parametrize("name", ["linear", "convolution", "gpt2"])
def test_dropout_acts_on_the_adapter_in_train_mode_only(name):
    kind, make, x = KINDS[name]
    layer = randomise(layer_of(kind, make, dropout=0.5))
    assert relative_error(layer.eval()(x), layer.merged()(x)) < 1e-6
    layer.train()
    assert relative_error(layer(x), layer(x)) > 0.01
    torch.manual_seed(2)
    out = layer(x)
    torch.manual_seed(2)
    dropped = F.dropout(x, 0.5)
    assert relative_error(out, layer.base(x) + layer.merged()(dropped) - layer.base(dropped)) < 1e-6
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base(x))


@EVERY
def test_autocast_gives_the_dtype_that_the_base_gives_and_the_adapter_acts(kind, make, x):
    layer = randomise(layer_of(kind, make))
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, base = layer(x), layer.base(x)
    assert out.dtype == base.dtype
    assert relative_error(out, exact) < 0.02
    out.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    assert layer.lora_A.grad.abs().max() > 0


# Whole models: copies, other processes, compilers


class Mixed(nn.Module):
    """A model with a layer of every kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.image = nn.Conv2d(1, 8, 2, stride=2)
        self.words = nn.Embedding(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gpt = hf.pytorch_utils.Conv1D(12, 8)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        seen = self.image(x).flatten(2).mT.contiguous() + self.words(torch.arange(4, device=x.device))
        seen = seen + self.attention(seen, seen, seen, need_weights=False)[0]
        return self.head(torch.tanh(self.gpt(seen))).mean(1)


NAMES = ["image", "words", "attention.out_proj", "gpt", "head"]
IMAGES = noise(5, 1, 4, 4, seed=8)


def mixed(seed=1, rank=2, alpha=3.0):
    model = Mixed()
    assert inject(model, LoRAConfig(rank, alpha, targets=NAMES)) == NAMES
    return randomise(model, seed)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_computes_and_learns_the_same_and_follows_switch_and_off(backend):
    torch._dynamo.reset()
    model = mixed()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(compiled(IMAGES), plain(IMAGES), **close)
    compiled(IMAGES).sin().sum().backward()
    plain(IMAGES).sin().sum().backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, **close)
        assert gradient.abs().max() > 0
    for other in (mixed(2), mixed(3, alpha=0.5), mixed(4, rank=5)):
        before = compiled(IMAGES)
        switch(model, adapter_state(other))
        torch.testing.assert_close(compiled(IMAGES), other(IMAGES), **close)
        assert (compiled(IMAGES) - before).abs().max() > 0.01
    with off(model):
        torch.testing.assert_close(compiled(IMAGES), Mixed()(IMAGES), **close)
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES), **close)
