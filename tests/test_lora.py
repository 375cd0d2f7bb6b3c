"""LoRALinear, inject and merge against a case computed by hand, loralib's formula and the peft library."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab import Llama, LlamaConfig, LoRAConfig, LoRALinear, adapter_state, inject, lora_layers, merge
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from tests.helpers import randomise, relative_error

pytestmark = pytest.mark.usefixtures("seeded")


def linear(width_in, width_out, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width_in, width_out, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(width_in))
    return layer


# The layer


@pytest.mark.parametrize(
    ("A", "B", "scaling", "expected", "delta"),
    [
        ([[1, 2, -1]], [[2], [-3]], 3.0, [11.5, -9.0], [[6, 12, -6], [-9, -18, 9]]),
        ([[1, 2, -1], [0, 1, 1]], [[2, 1], [-3, 0]], 1.5, [13.0, -4.5], [[3, 7.5, -1.5], [-4.5, -9, 4.5]]),
    ],
    ids=["rank 1", "rank 2"],
)
def test_two_by_three_layer_equals_what_was_computed_by_hand(A, B, scaling, expected, delta):
    base = nn.Linear(3, 2)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, -1.0]]))
        base.bias.copy_(torch.tensor([0.5, -1.0]))
    layer = LoRALinear(base, rank=len(A), alpha=3.0)
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor(A, dtype=torch.float32))
        layer.lora_B.copy_(torch.tensor(B, dtype=torch.float32))
    x = torch.tensor([1.0, 1.0, 2.0])
    assert layer.scaling == scaling
    assert base(x).tolist() == [5.5, 0.0]
    assert layer(x).tolist() == expected
    assert layer.delta().tolist() == delta
    assert layer.merged()(x).tolist() == expected


def test_a_is_uniform_between_plus_and_minus_one_over_the_root_of_in():
    A = LoRALinear(linear(400, 5), rank=50, alpha=1, generator=torch.Generator().manual_seed(0)).lora_A
    bound = 1 / math.sqrt(400)
    assert 0.999 * bound < A.abs().max() <= bound
    assert float(A.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert abs(float(A.detach().mean())) < 0.02 * bound


# Against other implementations


class LoralibLinear(nn.Linear):
    """The formula of microsoft/LoRA's loralib.Linear, unmerged."""

    def __init__(self, width_in, width_out, r, lora_alpha, lora_dropout, dtype):
        super().__init__(width_in, width_out, dtype=dtype)
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.lora_A = nn.Parameter(torch.zeros(r, width_in, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(width_out, r, dtype=dtype))
        self.scaling = lora_alpha / r

    def forward(self, x):
        result = F.linear(x, self.weight, bias=self.bias)
        return result + (self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T) * self.scaling


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_gradients_equal_loralibs_formula(dropout):
    layer = randomise(LoRALinear(linear(64, 48, dtype=torch.float64), rank=4, alpha=7, dropout=dropout))
    reference = LoralibLinear(64, 48, 4, 7, dropout, torch.float64)
    reference.load_state_dict({name.removeprefix("base."): value for name, value in layer.state_dict().items()})
    x = torch.randn(32, 64, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (layer, reference):
        torch.manual_seed(5)  # the same entries are dropped
        out = module(x)
        (gradient,) = torch.autograd.grad(out.sin().sum(), x, retain_graph=True)
        out.sin().sum().backward()
        results.append((out, gradient, module.lora_A.grad, module.lora_B.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert theirs.abs().max() > 0.1
    assert relative_error(results[0][0], layer.base(x)) > 0.1


# inject


def test_injected_llama_computes_bitwise_what_it_did(tiny_config):
    model = Llama(tiny_config, seed=2).eval()
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    inject(model, LoRAConfig(rank=4, alpha=8, dropout=0.1))
    assert torch.equal(model(ids), before)
    assert not torch.equal(model.train()(ids), randomise(model)(ids))
    assert not torch.equal(model.eval()(ids), before)


def test_inject_returns_names_in_the_models_order_and_freezes_the_rest():
    model = DigitsTransformer()
    names = inject(model, LoRAConfig(rank=2, targets=["v_proj", "layers.1.up_proj", "q_proj"]))
    assert names == ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj", "layers.1.up_proj"]
    assert list(lora_layers(model)) == names
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{part}" for name in names for part in ("lora_A", "lora_B")}


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize(("targets", "per_rank"), [("all-linear", 305_280), (["q_proj", "v_proj"], 57_600)])
def test_trainable_count_of_the_135m_model_is_rank_times_in_plus_out(targets, per_rank, rank):
    with torch.device("meta"):
        model = Llama(LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True))
    sizes = {n: m.in_features + m.out_features for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = inject(model, LoRAConfig(rank=rank, targets=targets))
    assert len(names) == (210 if targets == "all-linear" else 60)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == rank * sum(sizes[name] for name in names) == rank * per_rank
    assert all(layer.lora_A.is_meta and layer.lora_B.is_meta for layer in lora_layers(model).values())


def test_all_linear_leaves_out_the_output_head_and_what_is_excluded(tiny_config):
    tied = tiny_config.tie_word_embeddings
    assert tied  # so adapting the head would raise
    model = Llama(tiny_config)
    every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    without = copy.deepcopy(model)
    assert set(inject(model, LoRAConfig())) == every - {"lm_head"}
    names = inject(without, LoRAConfig(exclude=["down_proj", "model.layers.0.self_attn.q_proj"]))
    expected = {name for name in every if not name.endswith("down_proj")}
    assert set(names) == expected - {"lm_head", "model.layers.0.self_attn.q_proj"}


def test_a_target_matches_whole_parts_of_a_name_only():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "my_proj": nn.Linear(2, 2), "in": nn.ModuleDict()})
    model["in"]["proj"] = nn.Linear(2, 2)
    assert inject(model, LoRAConfig(targets=["proj"])) == ["proj", "in.proj"]


REFUSED = {
    "rank": [0, -1, 2.5, True, 2**31],
    "alpha": [0, -1.0, math.nan, math.inf],
    "dropout": [-0.1, 1.0, math.nan],
    "targets": ["q_proj", [], 5, [1, 2]],
    "exclude": ["head", 5],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_config_names_the_value_that_it_refuses(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        LoRAConfig(**{name: value})
    if name in ("rank", "alpha", "dropout"):
        base = linear(6, 5)
        with pytest.raises(ValueError, match=f"^{name} is "):
            LoRALinear(base, **{"rank": 2, "alpha": 4.0} | {name: value})
        assert base.weight.requires_grad


def test_a_repeats_by_seed_and_differs_between_layers():
    def drawn(seed):
        model = DigitsTransformer()
        inject(model, LoRAConfig(rank=2), seed=seed)
        return adapter_state(model)

    first, again, other = drawn(3), drawn(3), drawn(4)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) is not name.endswith("lora_A")
    assert not torch.equal(first["layers.0.q_proj.lora_A"], first["layers.0.k_proj.lora_A"])


def test_adapters_are_where_the_wrapped_layer_is():
    model = DigitsMLP()
    model.hidden2.to("meta")
    inject(model, LoRAConfig())
    assert model.hidden2.lora_A.is_meta
    assert model.hidden2.lora_B.is_meta
    assert model.hidden1.lora_A.device.type == model.head.lora_B.device.type == "cpu"


# merge, adapter_state, copies


def test_merge_and_adapter_state_of_a_model_without_adapters_say_so():
    for function in (merge, adapter_state):
        with pytest.raises(ValueError, match="no adapters; call inject"):
            function(DigitsMLP())


def test_adapter_state_holds_copies_of_every_a_and_b_and_alpha_and_scaling():
    model = DigitsMLP()
    inject(model, LoRAConfig(rank=2, alpha=0.1, targets=["head", "hidden1"]))
    randomise(model)
    state = adapter_state(model)
    assert list(state) == [
        f"{layer}.{part}" for layer in ("hidden1", "head") for part in ("lora_A", "lora_B", "alpha", "scaling")
    ]
    for name in ("hidden1", "head"):
        alpha = state.pop(f"{name}.alpha")
        assert alpha.dtype == torch.float64
        assert alpha.shape == ()
        assert alpha.item() == 0.1  # float32 would have changed it
        assert state.pop(f"{name}.scaling").item() == 0.05
    for name, value in state.items():
        assert torch.equal(value, model.get_parameter(name))
        assert not value.requires_grad
        value.zero_()
        assert model.get_parameter(name).abs().max() > 0
