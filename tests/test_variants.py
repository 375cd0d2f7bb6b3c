"""rsLoRA, LoRA-FA, PiSSA, DoRA: against formulas written out by hand in float64, and against the peft library."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lora_lab import LoRAConfig, LoRALinear, adapter_state, finetune, inject, load_adapter, lora_layers, save_adapter
from lora_lab.adapters.edit import switch
from lora_lab.adapters.peft_format import WEIGHTS
from lora_lab.methods import LoRA
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear
from tests.helpers import randomise, relative_error, saved_bytes, snapshot

pytestmark = pytest.mark.usefixtures("seeded")


RANK, ALPHA = 3, 5.0
KINDS = {"lora": LoRALinear, "rslora": RsLoRALinear, "lora-fa": LoRAFALinear, "pissa": PiSSALinear, "dora": DoRALinear}
PEFT = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora-fa": {},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}
ALL = pytest.mark.parametrize("kind", KINDS)
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


class Net(nn.Module):
    """Two linear layers of four sizes."""

    def __init__(self, bias=True, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(12, 9, bias=bias), nn.Linear(9, 7, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def inputs(dtype=torch.float32, seed=7):
    return torch.randn(20, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)


def net(kind=None, bias=True, dtype=torch.float32, rank=RANK, alpha=ALPHA, dropout=0.0, seed=0):
    """The small net, with adapters of a kind."""
    model = Net(bias, seed).to(dtype)
    if kind is not None:
        inject(model, LoRAConfig(rank, alpha, dropout), layer=KINDS.get(kind))
    return model


def in_peft(kind, base, rank=RANK, alpha=ALPHA):
    """peft's model over a copy of ``base``, and its adapter's parameters under our names."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["first", "second"], **PEFT[kind])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    parameters = {
        name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    if kind == "lora-fa":
        for name, parameter in parameters.items():
            parameter.requires_grad_("lora_B" in name)
    return model, parameters


@torch.no_grad()
def copy_parameters(model, parameters):
    ours = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert ours.keys() == parameters.keys()
    for name, parameter in parameters.items():
        parameter.copy_(ours[name])


# Against peft


@ALL
@BIAS
def test_outputs_and_gradients_equal_those_under_peft(kind, bias):
    dtype = torch.float32 if kind == "pissa" else torch.float64  # peft's PiSSA has no float64
    exact = {"rtol": 1e-4, "atol": 1e-6} if kind == "pissa" else {"rtol": 1e-12, "atol": 1e-12}
    x, base = inputs(dtype), net(bias=bias, dtype=dtype)
    ours = randomise(net(kind, bias, dtype))
    theirs, parameters = in_peft(kind, base)
    copy_parameters(ours, parameters)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected, **exact)
    assert relative_error(out, base(x)) > 0.1
    out.sin().sum().backward()
    expected.sin().sum().backward()
    trained = 0
    for name, parameter in parameters.items():
        mine = ours.get_parameter(name)
        assert mine.requires_grad is parameter.requires_grad is (kind != "lora-fa" or "lora_B" in name)
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, parameter.grad, **exact)
            assert mine.grad.abs().max() > 0.05
            trained += mine.numel()
        else:
            assert mine.grad is None
    assert trained == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    if kind not in ("lora", "lora-fa"):  # which compute the same; the others with the same A and B do not
        plain = net("lora", bias, dtype)
        with torch.no_grad():
            for name in ("first.lora_A", "first.lora_B", "second.lora_A", "second.lora_B"):
                plain.get_parameter(name).copy_(ours.get_parameter(name))
        assert relative_error(plain(x), out) > 0.02


@pytest.mark.parametrize(("rank", "alpha"), [(3, 3.0), (3, 12.0), (7, 1.0)])
def test_pissa_starts_where_pefts_does_whatever_alpha_is(rank, alpha):
    ours = net("pissa", rank=rank, alpha=alpha)
    theirs, parameters = in_peft("pissa", net(), rank, alpha)
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=0, atol=1e-5)
    ours(inputs()).sin().sum().backward()
    theirs(inputs()).sin().sum().backward()
    for name, parameter in parameters.items():
        mine = ours.get_parameter(name)
        torch.testing.assert_close(mine, parameter, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-3, atol=1e-5)
        assert parameter.abs().max() > 0.05
    other = net("pissa", rank=rank, alpha=2 * alpha)
    assert relative_error(other.first.lora_A, ours.first.lora_A) > 0.1


# By hand


def random_layer(kind, bias, rank=3, alpha=7.0):
    """A layer (in = 6, out = 5) in float64 with random numbers, and what it is made of."""
    base = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    layer = randomise(KINDS[kind](base, rank, alpha))
    x = torch.randn(4, 6, dtype=torch.float64)
    return layer, base.weight.detach(), base.bias.detach() if bias else torch.zeros(5, dtype=torch.float64), x


@BIAS
def test_dora_and_its_gradients_equal_the_papers_equations_written_out(bias):
    layer, W, b, x = random_layer("dora", bias)
    A, B, m = (getattr(layer, part).detach() for part in layer.parts)
    s = 7.0 / 3
    V = W + s * B @ A
    C = V.square().sum(dim=1).sqrt()
    out = x @ (m[:, None] * V / C[:, None]).T + b  # equation 5
    torch.testing.assert_close(layer(x), out, rtol=1e-13, atol=1e-13)
    assert relative_error(out, x @ V.T + b) > 0.1
    layer(x).sin().sum().backward()
    G = out.cos().T @ x  # the gradient of the whole weight, for a loss of sum(sin(out))
    dV = (m / C)[:, None] * G  # equation 11
    torch.testing.assert_close(layer.lora_B.grad, s * dV @ A.T, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer.lora_A.grad, s * B.T @ dV, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer.lora_magnitude_vector.grad, (G * V).sum(1) / C, rtol=1e-12, atol=1e-13)
    moving = dV - ((G * V).sum(1) * m / C**3)[:, None] * V  # equation 6: the norm not held constant
    assert relative_error(s * moving @ A.T, layer.lora_B.grad) > 0.05
    assert layer.base.weight.grad is None


@BIAS
@pytest.mark.parametrize("alpha", [3.0, 7.0], ids=["alpha = rank", "alpha != rank"])
def test_pissa_and_its_gradients_equal_the_papers_equations_written_out(bias, alpha):
    torch.manual_seed(3)
    base = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    W, b = base.weight.detach(), base.bias.detach() if bias else torch.zeros(5, dtype=torch.float64)
    layer, x, s = PiSSALinear(base, 3, alpha), torch.randn(4, 6, dtype=torch.float64), alpha / 3
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    residual = U[:, 3:] @ torch.diag(S[3:]) @ Vh[3:]  # equation 4
    principal = layer.scaling * layer.lora_B @ layer.lora_A  # of equations 2 and 3
    torch.testing.assert_close(principal, W - residual, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.lora_A.square().sum(1) * s, S[:3], rtol=1e-12, atol=0)  # sqrt(S) on each side
    torch.testing.assert_close(layer.lora_B.square().sum(0) * s, S[:3], rtol=1e-12, atol=0)
    randomise(layer)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    out = x @ (residual + s * B @ A).T + b  # equation 5
    torch.testing.assert_close(layer(x), out, rtol=0, atol=1e-13)
    assert relative_error(out, x @ (W + s * B @ A).T + b) > 0.1
    layer(x).sin().sum().backward()
    G = out.cos().T @ x
    torch.testing.assert_close(layer.lora_B.grad, s * G @ A.T, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer.lora_A.grad, s * B.T @ G, rtol=1e-12, atol=1e-13)


# The start


@ALL
@BIAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_new_adapter_computes_bitwise_what_the_pre_trained_net_does(kind, bias, dtype):
    x, expected = inputs(dtype), net(bias=bias, dtype=dtype)(inputs(dtype))
    model = net(kind, bias, dtype, dropout=0.5)
    assert model.training
    assert torch.equal(model(x), expected)
    assert not torch.equal(randomise(model)(x), expected)


def test_a_row_of_zeros_stays_zero_under_dora_and_gives_no_nan():
    base = nn.Linear(6, 5)
    with torch.no_grad():
        base.weight[2] = 0
    layer, x, others = DoRALinear(base, 2, 4.0), torch.randn(3, 6), [0, 1, 3, 4]
    layer(x).sin().sum().backward()
    for trained in (layer.lora_B, layer.lora_magnitude_vector):
        assert trained.grad[2].abs().max() == 0
        assert trained.grad[others].abs().min() > 0
    out = randomise(layer)(x)
    torch.testing.assert_close(out[:, 2], base.bias[2].expand(3))
    assert (out - base(x))[:, others].abs().min() > 1e-3
    torch.testing.assert_close(layer.merged()(x), out, rtol=0, atol=1e-5)


def test_pissa_draws_nothing_and_lora_fas_a_is_the_one_of_lora():
    assert torch.equal(net("lora-fa").first.lora_A, net("lora").first.lora_A)
    one, other = (Net() for _ in range(2))
    for model, seed in ((one, 1), (other, 2)):
        inject(model, LoRAConfig(2), seed=seed, layer=PiSSALinear)
    assert torch.equal(one.first.lora_A, other.first.lora_A)


@pytest.mark.parametrize("numbers", [{"rank": 10}, {"rank": 8, "targets": ["second"]}])
def test_pissa_refuses_a_rank_above_the_weights_smaller_side_and_leaves_the_net_as_it_was(numbers):
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"rank is {numbers['rank']}"):
        inject(model, LoRAConfig(**numbers), layer=PiSSALinear)
    assert snapshot(model) == before
    assert inject(model, LoRAConfig(rank=7), layer=PiSSALinear) == ["first", "second"]


# Dropout


def test_dropout_acts_on_the_input_of_as_part_alone_under_dora():
    layer = randomise(DoRALinear(nn.Linear(6, 5, dtype=torch.float64), 2, 4.0, dropout=0.5))
    x, W, b = torch.randn(3, 6, dtype=torch.float64), layer.base.weight, layer.base.bias
    V = W + layer.scaling * layer.lora_B @ layer.lora_A
    stretch = layer.lora_magnitude_vector / V.norm(dim=1)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(5)
    expected = stretch * (x @ W.T + layer.scaling * dropped @ layer.lora_A.T @ layer.lora_B.T) + b
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)
    assert not torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer.eval()(x), x @ (stretch[:, None] * V).T + b, rtol=0, atol=1e-13)


def test_dropout_acts_on_the_whole_update_under_pissa():
    layer = randomise(PiSSALinear(nn.Linear(6, 5, dtype=torch.float64), 2, 4.0, dropout=0.5))
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    expected = layer.base(x) + F.dropout(x, 0.5) @ layer.delta().T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# PiSSA as a difference


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_the_difference_is_the_one_that_peft_converts_its_own_pissa_into(tmp_path):
    theirs, parameters = in_peft("pissa", net())
    theirs.peft_config["default"].init_lora_weights = True  # as peft's guide has it: the start is saved as it is
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    ours = randomise(net("pissa"))
    copy_parameters(ours, parameters)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "start")
    save_adapter(ours, tmp_path / "ours")
    mine, yours = (load_file(tmp_path / whose / WEIGHTS) for whose in ("ours", "theirs"))
    for name in ("first", "second"):
        A, B = (f"base_model.model.{name}.lora_{part}.weight" for part in "AB")
        assert mine[A].shape == yours[A].shape == (2 * RANK, ours.get_submodule(name).lora_A.shape[1])
        torch.testing.assert_close(mine[B] @ mine[A], yours[B] @ yours[A], rtol=0, atol=1e-5)
    back = net()
    load_adapter(back, tmp_path / "theirs")
    torch.testing.assert_close(back(inputs()), ours(inputs()), rtol=0, atol=1e-5)


# LoRA-FA's memory


def test_lora_fa_keeps_a_x_and_not_x():
    batch, width, rank = 32, 64, 4
    x = torch.randn(batch, width, requires_grad=True)
    kept = {}
    for kind in (LoRALinear, LoRAFALinear):
        layer = kind(nn.Linear(width, 48), rank, 8.0)
        kept[kind] = saved_bytes(lambda layer=layer: layer(x), layer)
    assert kept[LoRALinear] == 4 * batch * (width + rank)
    assert kept[LoRAFALinear] == 4 * batch * rank


# Switching


@pytest.mark.parametrize("kind", ["rslora", "dora", "lora-fa", "pissa"])
def test_a_switched_state_computes_what_the_net_that_it_is_of_did(kind):
    x, model = inputs(), net(kind)
    states, outputs = [], []
    for seed in (1, 2):
        states.append(adapter_state(randomise(model, seed)))
        outputs.append(model(x))
    for state, expected in zip(states, outputs, strict=True):
        switch(model, state)
        assert torch.equal(model(x), expected)
    assert relative_error(*outputs) > 0.1


def test_a_state_of_pissa_holds_its_start_so_that_it_means_the_same_update_on_another_base():
    other = randomise(net("pissa", seed=4))
    state = adapter_state(other)
    assert {name.rpartition(".")[2] for name in state} == {"lora_A", "lora_B", "start_A", "start_B", "alpha", "scaling"}
    model = net("pissa")
    assert not torch.equal(model.first.start_A, other.first.start_A)
    switch(model, state)
    for name in ("first", "second"):
        assert torch.equal(model.get_submodule(name).delta(), other.get_submodule(name).delta())
    x = inputs()
    assert relative_error(model(x), other(x)) > 0.1  # the base is this model's own


# One class adds a variant


def test_a_variant_that_somebody_defines_is_known_to_commands_and_trains(monkeypatch, tmp_path):
    monkeypatch.setattr(LoRA, "by_name", dict(LoRA.by_name))

    class LouderLinear(LoRALinear):
        @property
        def scaling(self):
            return 3 * super().scaling

    class Louder(LoRA):
        """LoRA three times as loud."""

        name = "louder"
        layer = LouderLinear

    assert LoRA.by_name["louder"] is Louder
    # The format of PEFT has no name for it: finetune says so before a model is loaded.
    with pytest.raises(ValueError, match=r"'louder' is a LouderLinear"):
        finetune.run("docs", Louder(rank=2), tmp_path / "loud", model="nowhere")
    assert Louder(rank=2).settings() == LoRA(rank=2).settings() | {"name": "louder"}
    model = Net()
    Louder(rank=2, alpha=4).prepare(model, seed=0)
    assert {(type(layer), layer.scaling) for layer in lora_layers(model).values()} == {(LouderLinear, 6.0)}
