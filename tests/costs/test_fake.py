"""Models of fake tensors, batches of a shape, and copies that share their weights."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lora_lab import Llama, quantize_nf4
from lora_lab.costs.fake import batch_for, build_model, copy_sharing_weights, device_of, fake_copy, unshare_trainable
from lora_lab.lean.step import copy_to_meta
from lora_lab.models.digits import DigitsMLP

CPU, META = torch.device("cpu"), torch.device("meta")
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
DIGITS = X, torch.arange(6)


def values(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors}


def same(one, other):
    return all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(one.values(), other.values(), strict=True))


# Batches


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
        tensors = dict([*twin.named_parameters(), *twin.named_buffers()])
        assert tensors.keys() == before.keys()
        for name, tensor in tensors.items():
            real, trains = before[name]
            assert isinstance(tensor, FakeTensor)
            assert (tensor.shape, tensor.stride(), tensor.dtype) == (real.shape, real.stride(), real.dtype)
            assert (tensor.device, tensor.requires_grad) == (CPU, trains)
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


def test_a_copy_on_the_meta_device_has_shapes_only():
    model = Odd()
    twin = copy_to_meta(model)
    assert twin.first.weight is twin.second.weight is not model.first.weight
    assert twin.second.bias.requires_grad is False
    for name, tensor in model.state_dict().items():
        made = twin.state_dict()[name]
        assert (made.device, made.shape, made.dtype) == (META, tensor.shape, tensor.dtype)
    assert model.first.weight.device == CPU


def test_a_model_made_from_another_shares_or_is_cast_and_one_from_a_factory_is_new():
    model, devices = DigitsMLP(), []
    before = values(model)
    shared, cast = build_model(model, CPU), build_model(model, CPU, torch.bfloat16)
    assert next(shared.parameters()).data_ptr() == next(model.parameters()).data_ptr()
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert same(values(model), before)
    assert build_model(lambda: model, CPU) is model
    fresh = build_model(lambda: devices.append(torch.empty(1).device) or nn.Linear(2, 2), META, torch.float64)
    assert (fresh.weight.dtype, fresh.weight.device) == (torch.float64, META)
    assert devices == [META]


def test_what_training_would_write_is_cloned_and_the_rest_stays_shared():
    model = Odd()
    twin = copy_sharing_weights(model)
    twin.second.bias.requires_grad_(False)
    twin.own = own = nn.Parameter(torch.ones(3))
    address = own.data_ptr()
    unshare_trainable(twin, model)
    assert twin.own.data_ptr() == address  # its own already
    assert twin.second.weight is twin.first.weight  # still tied
    for name in ("first.weight", "first.bias", "second.bias", "running", "count"):
        one, other = model.state_dict()[name], twin.state_dict()[name]
        assert torch.equal(one, other)
        assert (one.data_ptr() == other.data_ptr()) == (name == "second.bias")  # frozen
    assert twin.nothing is None


REFUSED = [
    (lambda: batch_for(DigitsMLP(), 0, 5), ValueError, "batch_size is 0"),
    (lambda: batch_for(DigitsMLP(), 3, None), ValueError, "seq_len is None"),
    (lambda: build_model("a name", CPU), ValueError, "There is no model 'a name'"),
    (lambda: device_of(nn.Identity()), ValueError, "Identity has no parameters"),
]


@pytest.mark.parametrize(("call", "error", "says"), REFUSED)
def test_wrong_values_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
