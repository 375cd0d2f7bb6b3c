"""Blocks of 4 and 8 bits against the gguf library's arithmetic, NF4 against its definition, and LoRA over both."""

import copy
import dataclasses
import itertools
import math
import pickle

import gguf
import numpy as np
import pytest
import scipy.stats
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import lora_lab as ll
from lora_lab.adapters.edit import off
from lora_lab.inject import replace
from lora_lab.models import quantize
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.quantize import (
    BLOCK,
    BYTES_PER_BLOCK,
    FORMATS,
    LEVELS,
    BlockEmbedding,
    BlockLinear,
    dequantize,
    nf4,
    quantize_nf4,
    round_matrix,
)
from lora_lab.tasks import Examples, Task, cross_entropy
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear
from tests.helpers import Stopped, randomise, randomise_all, relative_error, saved_bytes, snapshot

KINDS = sorted(BYTES_PER_BLOCK)


def by_library(blocks, kind):
    with np.errstate(all="ignore"):  # random bytes hold infinities and NaNs too
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def assert_same_bits(ours, theirs):
    ours = ours.numpy()
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    number = ~np.isnan(ours)  # which NaN it is has no meaning
    np.testing.assert_array_equal(ours[number].view(np.uint32), theirs[number].view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 8), start=st.integers(0, 1), seed=st.integers(0, 2**32 - 1))
def test_random_bytes_mean_what_the_library_says_wherever_they_lie_in_memory(kind, rows, blocks, start, seed):
    size = rows * blocks * BYTES_PER_BLOCK[kind]
    raw = np.random.default_rng(seed).integers(0, 256, start + size, dtype=np.uint8)
    ours = dequantize(torch.from_numpy(raw.copy())[start:].view(rows, -1), kind)
    assert ours.shape == (rows, blocks * BLOCK)
    assert_same_bits(ours, by_library(raw[start:].reshape(rows, -1).copy(), kind))


def test_one_block_of_each_kind_by_hand():
    def half(value):
        return list(np.float16(value).tobytes())

    packed = [low | (15 - low) << 4 for low in range(16)]  # low halves 0..15, high halves 15..0
    block = torch.tensor([[*half(0.5), *half(-2.0), *packed]], dtype=torch.uint8)
    expected = [0.5 * q - 2.0 for q in [*range(16), *reversed(range(16))]]
    assert dequantize(block, "Q4_1").tolist() == [expected]
    numbers = [-128, -1, 0, 1, 127, *range(27)]
    block = torch.tensor([[*half(0.25), *(n % 256 for n in numbers)]], dtype=torch.uint8)
    assert dequantize(block, "Q8_0").tolist() == [[0.25 * n for n in numbers]]
    with pytest.raises(ValueError, match=r"33 bytes .*Q8_0 blocks of 34"):
        dequantize(block[:, :-1], "Q8_0")


# NF4


def by_definition(weight, block, levels):
    """NF4 in numpy, number by number: (codes, scales, the weights that they stand for)."""
    flat = np.asarray(weight, dtype=np.float32).ravel()
    codes, scales = [], []
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        scale = np.abs(part).max()
        scales.append(scale)
        codes += [int(np.abs(number / scale - levels).argmin()) if scale else 7 for number in part]
    values = np.array([levels[code] * scales[i // block] for i, code in enumerate(codes)], dtype=np.float32)
    return codes, np.array(scales, dtype=np.float32), values.reshape(weight.shape)


# Dettmers et al. 2023, appendix E.
PUBLISHED = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def normal(*shape, seed=0, size=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def test_the_levels_are_the_published_ones():
    np.testing.assert_allclose(LEVELS, PUBLISHED, rtol=0, atol=3e-7)  # they were computed in float32
    assert (LEVELS[0], LEVELS[7], LEVELS[15]) == (-1.0, 0.0, 1.0)
    assert all(low < high for low, high in itertools.pairwise(LEVELS))


def test_the_levels_are_steps_of_equal_probability_under_a_normal_curve():
    end = 1 - (1 / 30 + 1 / 32) / 2  # of the probability, as the paper has it
    steps = np.diff(scipy.stats.norm.cdf(np.array(LEVELS) * scipy.stats.norm.ppf(end)))
    np.testing.assert_allclose(steps, [(end - 0.5) / 7] * 7 + [(end - 0.5) / 8] * 8, rtol=1e-12)


def test_a_block_of_nf4_by_hand():
    # Divided by 2: 1, -0.5, 0, 0.25, whose nearest levels are number 15, 2 (-0.525), 7 and 10 (0.246).
    packed, steps = nf4(torch.tensor([[2.0, -1.0, 0.0, 0.5]]), double=False)
    assert packed.dtype == torch.uint8
    zeros = [7 << 4 | 7] * 30  # which fill up the block
    assert packed.tolist() == [[*np.float32(2.0).tobytes(), 15 << 4 | 2, 7 << 4 | 10, *zeros]]
    assert steps is None
    weight = BlockLinear(packed, "NF4", (1, 4)).weight
    assert weight.tolist() == [pytest.approx([2.0, 2 * PUBLISHED[2], 0.0, 2 * PUBLISHED[10]], abs=1e-6)]


@pytest.mark.parametrize("shape", [(48, 64), (6, 50), (1, 1), (7, 130), (64,)])
def test_nf4_is_what_its_definition_says_in_every_shape(shape):
    weight = normal(*shape, seed=len(shape))
    weight.flatten()[64:128] = 0.0  # a block of zeros, where there are so many numbers
    levels = np.array(LEVELS, dtype=np.float32)
    codes, scales, expected = by_definition(weight.numpy(), 64, levels)
    packed, _ = nf4(weight, double=False)
    assert packed.shape == (len(scales), 36)
    assert packed[:, :4].numpy().tobytes() == scales.tobytes()
    numbers = packed[:, 4:].numpy()
    unpacked = np.stack((numbers >> 4, numbers & 15), axis=-1).ravel()
    assert unpacked[: len(codes)].tolist() == codes
    assert set(unpacked[len(codes) :].tolist()) <= {7}  # what fills up the last block is zero
    matrix = weight if weight.ndim == 2 else weight[None]
    layer = BlockLinear(packed, "NF4", matrix.shape)
    assert np.array_equal(layer.weight.numpy(), expected.reshape(matrix.shape))
    assert weight.numel() <= 2 or not torch.equal(layer.weight, matrix)


@pytest.mark.parametrize(("kind", "rows"), [("NF4", [2]), ("NF4-double", [0, 1, 2, 3])])
def test_a_nan_makes_nan_of_its_block_and_with_a_common_mean_of_all(kind, rows):
    weight = normal(4, 64)
    weight[2, 5] = math.nan
    found = in_blocks(weight, kind).weight.isnan()
    assert found[rows].all()
    assert found.sum() == 64 * len(rows)


def e4m3():
    """The 253 finite numbers of the format: 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    low = [m / 8 * 2.0**-6 for m in range(8)]
    high = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
    return np.unique(np.array([*low, *high, *(-number for number in low + high)]))


@pytest.mark.parametrize("blocks", [3, 256, 700])
def test_double_quantisation_keeps_scales_as_the_mean_and_the_nearest_step_of_e4m3(blocks):
    weight = normal(blocks, 64, seed=blocks) * torch.linspace(0.5, 2.0, blocks)[:, None]
    packed, steps = nf4(weight)
    plain, _ = nf4(weight, double=False)
    assert torch.equal(packed[:, 1:], plain[:, 4:])  # the codes do not depend on it
    largest = weight.abs().amax(dim=1).double().numpy()
    mean, *found_steps = steps.view(torch.float32).flatten().tolist()
    assert mean == pytest.approx(largest.mean(), rel=1e-6)
    groups = [largest[start : start + 256] for start in range(0, blocks, 256)]
    assert found_steps == pytest.approx([np.abs(group - mean).max() / 448 for group in groups], rel=1e-5)
    layer = BlockLinear(packed, "NF4-double", weight.shape, steps=steps)
    scales = layer.weight.abs().amax(dim=1).double().numpy()  # the largest of each block stands on a level of 1
    for start, (group, step) in enumerate(zip(groups, found_steps, strict=True)):
        off = np.abs(scales[256 * start : 256 * start + 256] - group)
        nearest = np.abs((group - mean)[:, None] - step * e4m3()).min(axis=1)
        np.testing.assert_allclose(off, nearest, atol=2e-6)
        assert off.max() > 1e-3  # 8 bits do round


def test_a_scale_below_zero_is_taken_for_zero():
    weight = torch.ones(256, 64)
    weight[0] = 1e-6  # is below the mean by 117.4 steps, which e4m3 rounds to 120
    weight[1] = 4.87
    packed, steps = nf4(weight)
    found = BlockLinear(packed, "NF4-double", weight.shape, steps=steps).weight
    mean, step = steps.view(torch.float32).flatten().tolist()
    assert packed[:1, :1].clone().view(torch.float8_e4m3fn).item() == -120
    assert mean - 120 * step < -0.02
    assert torch.equal(found[0], torch.zeros(64))
    assert found[2:].allclose(torch.ones(254, 64), atol=1e-3)


@pytest.mark.parametrize("double", [False, True])
def test_blocks_that_are_all_alike_or_all_zero_come_back_as_they_are(double):
    for value in (0.0, 0.25, -0.25):
        weight = torch.full((4, 64), value)
        packed, steps = nf4(weight, double=double)
        layer = BlockLinear(packed, "NF4-double" if double else "NF4", weight.shape, steps=steps)
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_quantised(dtype):
    weight = normal(4, 64).to(dtype)
    assert torch.equal(nf4(weight)[0], nf4(weight.float())[0])


def test_quantising_a_trainable_weight_builds_no_graph():
    weight = nn.Parameter(normal(4, 64))
    assert saved_bytes(lambda: nf4(weight), nn.Module()) == 0
    assert saved_bytes(lambda: weight.abs(), nn.Module()) == 4 * 4 * 64  # so it would be seen


def test_a_default_of_double_precision_changes_nothing():
    weight = normal(4, 64)
    expected = BlockLinear(nf4(weight, double=False)[0], "NF4", (4, 64)).weight
    torch.set_default_dtype(torch.float64)
    try:
        packed, steps = nf4(weight)
        found = BlockLinear(nf4(weight, double=False)[0], "NF4", (4, 64)).weight
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(packed, nf4(weight)[0])
    assert torch.equal(steps, nf4(weight)[1])


# Layers


def in_blocks(weight, kind, bias=None, dtype=torch.float32):
    """``weight`` as a BlockLinear; GGUF's kinds are quantised by the gguf library."""
    if kind in BYTES_PER_BLOCK:
        raw = gguf.quants.quantize(weight.detach().numpy(), gguf.GGMLQuantizationType[kind])
        packed, steps = torch.from_numpy(raw.reshape(-1, BYTES_PER_BLOCK[kind]).copy()), None
    else:
        packed, steps = nf4(weight, double=kind == "NF4-double")
    return BlockLinear(packed, kind, weight.shape, bias, steps, dtype)


def dense_twin(layer):
    """A frozen nn.Linear with the dequantised weight."""
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.dtype)
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin.requires_grad_(False)


ALL = ["Q4_1", "Q8_0", "NF4", "NF4-double"]
ALL_KINDS = pytest.mark.parametrize("kind", ALL)
WEIGHT, BIAS = normal(48, 96, size=0.1), normal(48, seed=1)


@pytest.mark.parametrize(
    ("kind", "bits"), [("Q4_1", 5.0), ("Q8_0", 8.5), ("NF4", 4.5), ("NF4-double", 4 + 8 / 64 + 32 / (64 * 256))]
)
def test_the_bits_of_a_weight_are_those_of_its_storage(kind, bits):
    layer = in_blocks(normal(512, 512, size=0.1), kind)
    stored = sum(parameter.untyped_storage().nbytes() for parameter in layer.parameters())
    assert 8 * stored / 512**2 == pytest.approx(bits, abs=2e-4)  # the one mean is spread over all
    assert list(layer.buffers()) == []


@ALL_KINDS
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
def test_a_layer_computes_what_a_dense_one_of_its_weight_computes(kind, bias):
    layer = in_blocks(WEIGHT, kind, bias)
    twin = dense_twin(layer)
    original = nn.Linear(96, 48, bias=bias is not None)
    original.load_state_dict({"weight": WEIGHT} | ({} if bias is None else {"bias": bias}))
    for shape in ((96,), (5, 96), (2, 3, 96)):
        x = normal(*shape, seed=2).requires_grad_()
        g = normal(*shape[:-1], 48, seed=3)
        found, expected = layer(x), twin(x)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert not torch.equal(found, original(x))
        (found,) = torch.autograd.grad(found, x, g)
        (expected,) = torch.autograd.grad(expected, x, g)
        assert torch.equal(found, expected)
        assert not torch.equal(found, g @ WEIGHT)
    assert all(not parameter.requires_grad for parameter in layer.parameters())
    assert not layer(normal(5, 96)).requires_grad


@ALL_KINDS
def test_nothing_dense_is_kept_in_the_layer_or_for_the_backward_pass(kind):
    layer = in_blocks(WEIGHT, kind, BIAS)
    assert {name: p.dtype for name, p in layer.named_parameters() if name != "bias"} == dict.fromkeys(
        ["packed"] + ["steps"] * (kind == "NF4-double"), torch.uint8
    )
    x = normal(32, 96).requires_grad_()
    assert saved_bytes(lambda: layer(x), layer) == 0
    assert layer(x).grad_fn.saved_tensors == ()
    # The same product made with the dequantised weight keeps that weight.
    assert saved_bytes(lambda: F.linear(x, layer.weight), layer) == 4 * WEIGHT.numel()


@ALL_KINDS
def test_the_weight_is_made_anew_and_may_be_written_into(kind):
    layer = in_blocks(WEIGHT, kind)
    before = layer.weight
    layer.weight.add_(1.0)
    layer.rows(0, 4).zero_()
    assert torch.equal(layer.weight, before)
    assert not before.requires_grad
    assert 0 < float((before - WEIGHT).norm() / WEIGHT.norm()) < 0.12


@pytest.mark.parametrize(
    ("kind", "shape"),
    [*((kind, (31, 96)) for kind in ALL), ("NF4", (31, 50)), ("NF4-double", (31, 50)), ("NF4-double", (300, 256))],
)
def test_rows_are_those_of_the_weight_where_blocks_end_within_them_too(kind, shape):
    layer = in_blocks(normal(*shape) * torch.linspace(0.1, 5, shape[0])[:, None], kind)
    weight = layer.weight
    assert weight.shape == shape
    assert shape[0] == 31 or len(layer.steps) == 1 + 5  # each group of blocks has a step
    for start, stop in ((0, 31), (0, 1), (7, 20), (30, 31), (5, 5), (shape[0] // 2, shape[0])):
        assert torch.equal(layer.rows(start, stop), weight[start:stop])


def test_a_few_rows_are_read_from_a_few_blocks(monkeypatch):
    layer = in_blocks(WEIGHT, "NF4")
    read = []
    decode = BlockLinear._decode
    monkeypatch.setattr(BlockLinear, "_decode", lambda layer, *which: read.append(which) or decode(layer, *which))
    layer.rows(40, 42)
    assert read == [(60, 63)]  # weights 3840 to 4032, of 64 a block


@ALL_KINDS
@pytest.mark.parametrize("at_once", [1, 1000, 4600])
def test_a_large_matrix_is_dequantised_in_slices(kind, at_once, monkeypatch):
    layer = in_blocks(WEIGHT, kind, BIAS)
    twin = dense_twin(layer)
    x = normal(2, 3, 96, seed=2).requires_grad_()
    made = []
    rows = BlockLinear.rows
    monkeypatch.setattr(BlockLinear, "rows", lambda layer, *which: made.append(rows(layer, *which)) or made[-1])
    monkeypatch.setattr(quantize, "_AT_ONCE", at_once)
    monkeypatch.setattr(quantize, "_MOST_SLICES", 10**6)
    found = layer(x)
    assert len(made) > 1
    assert sum(len(part) for part in made) == 48
    torch.testing.assert_close(found, twin(x), rtol=0, atol=5e-6)
    g = normal(2, 3, 48, seed=3)
    (found,) = torch.autograd.grad(found, x, g)
    torch.testing.assert_close(found, torch.autograd.grad(twin(x), x, g)[0], rtol=0, atol=5e-6)
    assert sum(len(part) for part in made) == 96
    assert max(part.numel() for part in made) <= max(at_once, 96)


@pytest.mark.parametrize(("rows", "columns", "count"), [(49152, 576, None), (28672, 8192, 32), (57344, 8192, 32)])
def test_slices_cover_the_rows_in_few_pieces(rows, columns, count):
    blocks = torch.empty(rows * columns // 32, 34, dtype=torch.uint8, device="meta")
    starts, stops = zip(*(slices := BlockLinear(blocks, "Q8_0", (rows, columns)).slices()), strict=True)
    assert (starts[0], stops[-1]) == (0, rows)
    assert starts[1:] == stops[:-1]
    if count is None:  # of a few megabytes each
        assert max(stop - start for start, stop in slices) * columns * 4 <= 2**23
    else:
        assert len(slices) == count


@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_precision_changes_no_byte_and_rounds_the_weight(kind, dtype):
    layer = in_blocks(WEIGHT, kind, BIAS)
    other = nn.Sequential(copy.deepcopy(layer)).to(dtype)[0]
    assert other.weight.dtype == other.bias.dtype == other.dtype == dtype
    assert torch.equal(other.weight, layer.weight.to(dtype))
    assert torch.equal(other.packed, layer.packed)
    assert kind != "NF4-double" or torch.equal(other.steps, layer.steps)
    x = normal(5, 96, seed=2).to(dtype).requires_grad_()
    twin = dense_twin(other)
    assert torch.equal(other(x), twin(x))
    (found,) = torch.autograd.grad(other(x).sum(), x)
    assert found.dtype == dtype
    assert torch.equal(found, torch.autograd.grad(twin(x).sum(), x)[0])
    assert torch.equal(other.float().weight, layer.weight)  # and back, for nothing was lost
    assert torch.equal(in_blocks(WEIGHT, kind, dtype=dtype).weight, layer.weight.to(dtype))


def test_autocast_and_automatic_batching_find_the_same_as_in_a_dense_layer():
    layer = in_blocks(WEIGHT, "Q4_1", BIAS)
    twin = dense_twin(layer)
    x = normal(5, 96, seed=2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    with torch.autocast("cpu", torch.bfloat16):  # anew: torch 2.9 keeps the first cast of x, which has no graph
        expected = twin(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    g = normal(5, 48, seed=3).bfloat16()
    (found,) = torch.autograd.grad(found, x, g)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.autograd.grad(expected, x, g)[0])

    def per_example(layer):
        return torch.func.vmap(torch.func.grad(lambda one: layer(one).square().sum()))(x.detach())

    torch.testing.assert_close(per_example(layer), per_example(twin), rtol=1e-5, atol=1e-5)


def test_a_layer_works_without_numbers_too():
    layer = in_blocks(WEIGHT, "NF4-double", BIAS)
    with FakeTensorMode() as mode:
        fake = BlockLinear(
            *(mode.from_tensor(layer.packed), "NF4-double", (48, 96)),
            mode.from_tensor(layer.bias),
            mode.from_tensor(layer.steps),
        )
        x = torch.empty(5, 96, requires_grad=True)
        fake(x).sum().backward()
        assert x.grad.shape == (5, 96)
    net = DigitsMLP(width=16).to("meta")
    quantize_nf4(net)
    assert net(torch.empty(5, 64, device="meta")).shape == (5, 10)
    assert net.hidden1.packed.is_meta


@ALL_KINDS
def test_copies_pickles_and_states_keep_the_blocks(kind):
    layer = in_blocks(WEIGHT, kind, BIAS).half()
    other = in_blocks(normal(48, 96, seed=9), kind, normal(48, seed=9)).half()
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin.weight, layer.weight)
        assert (twin.kind, twin.dtype, twin.shape) == (kind, torch.float16, (48, 96))
        assert twin.packed.data_ptr() != layer.packed.data_ptr()
        x = normal(3, 96).half()
        assert torch.equal(twin(x), layer(x))
        assert not any(parameter.requires_grad for parameter in twin.parameters())
    with pytest.raises(RuntimeError, match="size mismatch"):
        in_blocks(normal(48, 64), kind, BIAS).load_state_dict(layer.state_dict())


# Embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_looks_up_the_rows_of_its_table(kind):
    packed = in_blocks(WEIGHT, kind).packed
    embedding = BlockEmbedding(packed, kind, (48, 96))
    assert embedding.packed is packed
    twin = nn.Embedding.from_pretrained(embedding.weight)
    for ids in (torch.tensor(3), torch.tensor([0, 47, 47]), torch.tensor([[5, 1], [2, 40]]), torch.empty(2, 0).long()):
        assert torch.equal(embedding(ids), twin(ids))
        assert embedding(ids.int()).shape == (*ids.shape, 96)
    assert not torch.equal(embedding(torch.tensor([3])), WEIGHT[[3]])
    assert not embedding(torch.tensor([3])).requires_grad
    half = copy.deepcopy(embedding).bfloat16()
    assert torch.equal(half(torch.tensor([3, 4])), embedding(torch.tensor([3, 4])).bfloat16())
    for wrong in (-1, 48):
        with pytest.raises(IndexError):
            embedding(torch.tensor([wrong]))


# Whole models


def test_quantising_a_model_replaces_its_linear_layers_and_nothing_else():
    net = DigitsTransformer(width=48).eval()
    before = copy.deepcopy(net)
    names = quantize_nf4(net)
    assert names == [name for name, module in before.named_modules() if type(module) is nn.Linear]
    for name, module in before.named_modules():
        found = net.get_submodule(name)
        assert type(found) is (BlockLinear if name in names else type(module))
        assert not found.training
        if name in names:
            packed, steps = nf4(module.weight)
            assert torch.equal(found.packed, packed)
            assert torch.equal(found.steps, steps)
            assert torch.equal(found.bias, module.bias)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        name for name, _ in before.named_parameters() if name.rpartition(".")[0] not in names
    ]
    pixels = normal(5, 64)
    error = (net(pixels) - before(pixels)).norm() / before(pixels).norm()
    assert 0 < error < 0.3
    for name in names:
        before.get_submodule(name).weight.data.copy_(net.get_submodule(name).weight)
    torch.testing.assert_close(net(pixels), before(pixels), rtol=0, atol=1e-6)


def test_the_head_of_a_language_model_and_what_is_excluded_stay_dense(tiny_config):
    model = ll.Llama(tiny_config).train()
    names = quantize_nf4(model, exclude=["q_proj", "layers.1.mlp.up_proj"])
    endings = ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [name.rpartition(".")[2] for name in names] == endings + [e for e in endings if e != "up_proj"]
    assert all(model.get_submodule(name).training for name in names)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_floating_point()


def test_a_parent_that_reads_the_weight_itself_finds_it():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    quantize_nf4(layer)
    assert type(layer.self_attn.out_proj) is not BlockLinear  # a class of its own, which the parent reads
    x = normal(2, 5, 32)
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x.requires_grad_()), rtol=0, atol=1e-5)


class Twins(nn.Module):
    """Two layers with one weight, and one without a partner."""

    def __init__(self, whole=False):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        if whole:
            self.two = self.one
        self.two.weight = self.one.weight


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (Twins, {}, "'one'"),
        (lambda: Twins(whole=True), {}, "'one'"),
        (lambda: DigitsMLP(width=16), {"exclude": ["hidden1", "hidden2", "head"]}, "DigitsMLP .*'head'"),
        (lambda: DigitsMLP(width=16), {"exclude": "head"}, "'head'"),
        (lambda: DigitsMLP(width=16), {"exclude": ["head", "heat"]}, "'heat'"),
        (lambda: nn.Linear(64, 64), {}, "Linear"),
        (lambda: adapted(DigitsMLP(width=16)), {}, "3 layers"),
    ],
)
def test_models_that_cannot_be_quantised_are_refused_and_left_as_they_were(make, options, named):
    net = make()
    before = snapshot(net)
    with pytest.raises(ValueError, match=named):
        quantize_nf4(net, **options)
    assert snapshot(net) == before


def test_shared_weights_that_are_excluded_stay_shared():
    net = Twins()
    assert quantize_nf4(net, exclude=["one", "two"]) == ["three"]
    assert net.two.weight is net.one.weight


# LoRA over blocks


def adapted(model, layer=None, **config):
    ll.inject(model, ll.LoRAConfig(**{"rank": 2, "alpha": 6.0, **config}), layer=layer)
    return randomise(model)


def to_blocks(model, kind):
    """Put the matrices of a Llama into blocks; GGUF's kinds with embedding and head, as load_pretrained does."""
    if kind not in BYTES_PER_BLOCK:
        quantize_nf4(model, double=kind == "NF4-double")
        return model
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.lm_head:
            replace(model, name, in_blocks(module.weight, kind, module.bias))
    head = in_blocks(model.lm_head.weight, kind)
    model.model.embed_tokens = BlockEmbedding(head.packed, kind, head.shape)
    model.lm_head = head
    return model


def to_dense(model):
    """A deep copy of a model with its blocks dequantised."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, BlockLinear):
            replace(dense, name, dense_twin(module))
        elif isinstance(module, BlockEmbedding):
            replace(dense, name, nn.Embedding.from_pretrained(module.weight))
    if isinstance(model.model.embed_tokens, BlockEmbedding):
        dense.tie()
    return dense


@pytest.fixture
def llama(tiny_config):
    """Makes a small Llama in blocks, with weights large enough that its attention matters."""

    def make(kind):
        return to_blocks(randomise_all(ll.Llama(dataclasses.replace(tiny_config, intermediate_size=64)).eval()), kind)

    return make


IDS = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(5))
VARIANTS = pytest.mark.parametrize("layer", [None, RsLoRALinear, LoRAFALinear, PiSSALinear, DoRALinear])


def loss_and_gradients(model):
    model.zero_grad()
    loss = cross_entropy(model, IDS[:, :-1], IDS[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@ALL_KINDS
@VARIANTS
def test_adapters_on_blocks_compute_learn_write_and_merge_as_on_the_dequantised_model(llama, kind, layer):
    model = llama(kind)
    dense = to_dense(model)
    base, without = model(IDS), model.generate(IDS[0], 16)
    for one in (model, dense):
        adapted(one, layer)
    assert model.lm_head is model.get_output_embeddings()
    assert list(ll.lora_layers(model)) == list(ll.lora_layers(dense))
    assert len(ll.lora_layers(model)) == 14
    torch.testing.assert_close(model(IDS), dense(IDS), rtol=1e-5, atol=1e-5)
    assert (model(IDS) - base).abs().max() > 0.1
    assert torch.equal(model.generate(IDS[0], 16), dense.generate(IDS[0], 16))
    with off(model):
        assert torch.equal(model(IDS), base)
        assert torch.equal(model.generate(IDS[0], 16), without)
    (loss, gradients), (expected, wanted) = loss_and_gradients(model), loss_and_gradients(dense)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 0
    with_adapters = model(IDS)
    for name in ll.merge(model):
        assert type(model.get_submodule(name)) is nn.Linear
    torch.testing.assert_close(model(IDS), with_adapters, rtol=1e-4, atol=1e-4)


@ALL_KINDS
@pytest.mark.parametrize("layer", [None, DoRALinear, PiSSALinear])
def test_an_adapter_saved_on_blocks_loads_on_the_dense_model_and_back(llama, kind, layer, tmp_path):
    model = llama(kind)
    dense, fresh = to_dense(model), copy.deepcopy(model)
    base = model(IDS)
    ll.save_adapter(adapted(model, layer), tmp_path)
    for other in (dense, fresh):
        ll.load_adapter(other, tmp_path)
        torch.testing.assert_close(other(IDS), model(IDS), rtol=1e-4, atol=1e-4)
        assert not other(IDS).allclose(base, atol=0.1)


def test_a_tied_head_shares_the_embeddings_blocks_and_is_not_adapted(llama):
    model = llama("Q8_0")
    bytes_of = {name: p.numel() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert "model.embed_tokens.packed" in bytes_of
    assert "lm_head.packed" not in bytes_of  # it is the same parameter, and counted once
    twin = pickle.loads(pickle.dumps(model))
    assert twin.lm_head.packed is twin.model.embed_tokens.packed
    norms = sum(4 * p.numel() for p in model.parameters() if p.dtype != torch.uint8)
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == sum(bytes_of.values()) + norms
    with pytest.raises(ValueError, match="'lm_head' is shared with another module"):
        ll.inject(model, ll.LoRAConfig(targets=["lm_head"]))
    with pytest.raises(ValueError, match=r"'embed_tokens' matches .*a BlockEmbedding, which cannot be adapted"):
        ll.inject(model, ll.LoRAConfig(targets=["embed_tokens"]))


def text_task():
    def part(rows, seed):
        ids = torch.randint(0, 260, (rows, 13), generator=torch.Generator().manual_seed(seed))
        return Examples(ids[:, :-1], ids[:, 1:])

    return Task("small", part(12, 0), part(4, 1), part(4, 2), part(4, 3))


@ALL_KINDS
def test_a_run_over_blocks_is_that_over_the_dense_model_and_goes_on_after_a_stop(llama, kind, tmp_path):
    options = {"steps": 6, "lr": 0.01, "batch_size": 4, "eval_every": 3}
    model = llama(kind)
    dense = to_dense(model)
    whole = ll.fit(model, text_task(), ll.LoRA(rank=2), **options)
    expected = ll.fit(dense, text_task(), ll.LoRA(rank=2), **options)
    losses = [row["train_loss"] for row in whole.rows[1:]]
    assert losses == pytest.approx([row["train_loss"] for row in expected.rows[1:]], rel=1e-4)
    assert len(set(losses)) == 6

    def stop(row):
        if row["step"] == 4:
            raise Stopped

    options |= {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Stopped):
        ll.fit(llama(kind), text_task(), ll.LoRA(rank=2), on_row=stop, **options)
    stored = load_file(tmp_path / "checkpoint.safetensors")
    assert not any("packed" in name or "steps" in name for name in stored)
    trained = sum(value.numel() for name, value in stored.items() if name not in ("random.cpu", "history"))
    assert trained < 3.1 * whole.trainable_parameters
    resumed = llama(kind)
    history = ll.fit(resumed, text_task(), ll.LoRA(rank=2), **options)
    assert [row["train_loss"] for row in history.rows[1:]] == losses
    assert torch.equal(resumed(IDS), model(IDS))
    other = llama(kind)
    other.model.layers[0].mlp.up_proj.packed[3, 9] ^= 1  # one bit of a frozen block
    with pytest.raises(ValueError, match=r"other .*weights"):
        ll.fit(other, text_task(), ll.LoRA(rank=2), **options)


# Quantising again, and merging


def numbers_of(weight, kind):
    """What the blocks of a matrix stand for, computed without the package: by gguf, or by NF4's definition."""
    if kind in BYTES_PER_BLOCK:
        kind = gguf.GGMLQuantizationType[kind]
        return torch.from_numpy(
            gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), kind), kind).copy()
        )
    return torch.from_numpy(by_definition(weight.detach().numpy(), 64, PUBLISHED.astype(np.float32))[2])


@ALL_KINDS
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
def test_a_requantised_layer_is_one_made_of_the_other_matrix(kind, bias):
    layer, other = in_blocks(WEIGHT, kind, bias, torch.bfloat16).eval(), normal(48, 96, seed=8)
    before = snapshot(layer)
    again = layer.requantize(other)
    assert snapshot(layer) == before
    expected = in_blocks(other, kind, bias, torch.bfloat16)
    assert vars(again).keys() == vars(layer).keys()
    assert (again.kind, again.shape, again.dtype, again.training) == (kind, (48, 96), torch.bfloat16, False)
    assert torch.equal(again.packed, expected.packed)
    assert kind != "NF4-double" or torch.equal(again.steps, expected.steps)
    assert again.bias is None if bias is None else torch.equal(again.bias, BIAS)
    assert bias is None or again.bias.data_ptr() != layer.bias.data_ptr()
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not torch.equal(again.weight, layer.weight)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_rounded_matrix_is_what_a_layer_in_blocks_holds(kind):
    weight = round_matrix(WEIGHT.bfloat16(), kind)
    assert torch.equal(weight, in_blocks(WEIGHT.bfloat16().float(), kind).weight)
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, WEIGHT.bfloat16().float())
    torch.testing.assert_close(round_matrix(weight, kind), weight, rtol=0.02, atol=0.02)  # it is on the grid already


def sum_by_hand(layer, weight):
    """The weight of an adapted layer over another frozen one, in float64, from the formulas of the papers."""
    scaling = layer.alpha / math.sqrt(layer.rank) if isinstance(layer, RsLoRALinear) else layer.alpha / layer.rank
    state = {name: value.detach().double() for name, value in layer.named_parameters()} | {
        name: value.double() for name, value in layer.named_buffers()
    }
    total = weight.double() + scaling * state["lora_B"] @ state["lora_A"]
    if isinstance(layer, PiSSALinear):
        total = total - scaling * state["start_B"] @ state["start_A"]
    if isinstance(layer, DoRALinear):
        total = state["lora_magnitude_vector"][:, None] * total / total.square().sum(dim=1, keepdim=True).sqrt()
    return total


def qlora(llama, kind, layer=None, **config):
    """A Llama before it is put into blocks, and the one in blocks with random adapters."""
    full = randomise_all(ll.Llama(llama("NF4").config).eval())
    return full, adapted(llama(kind), layer, **config)


@pytest.mark.slow
@ALL_KINDS
@VARIANTS
def test_the_three_merges_are_three_models_and_each_is_the_sum_that_its_name_says(llama, kind, layer):
    full, model = qlora(llama, kind, layer)
    layers = {name: copy.deepcopy(each) for name, each in ll.lora_layers(model).items()}
    assert len(layers) == 14
    trained, kinds_before = model(IDS), {type(each.base) for each in layers.values()}
    assert kinds_before == {BlockLinear}
    outputs = {}
    for into in ("dequantised", "blocks", "full-precision"):
        merged = copy.deepcopy(model)
        names = ll.merge(merged, into=into, base=full if into == "full-precision" else None)
        assert names == list(layers)
        assert ll.lora_layers(merged) == {}
        outputs[into] = merged(IDS)
        for name, each in layers.items():
            found, dense = merged.get_submodule(name), full.get_submodule(name).weight
            if into == "full-precision":
                assert relative_error(found.weight, sum_by_hand(each, dense)) < 1e-6
                continue
            total = sum_by_hand(each, each.base.weight)
            if into == "dequantised":
                assert type(found) is nn.Linear
                assert relative_error(found.weight, total) < 1e-6
                continue
            assert isinstance(found, BlockLinear)
            assert (found.kind, found.packed.shape) == (kind, each.base.packed.shape)
            assert 0.001 < relative_error(found.weight, total) < 0.12
            if kind != "NF4-double":  # a sum in another order may fall on the other side of a middle
                expected = numbers_of(total.float(), kind)
                differs = (found.weight - expected).abs() > 0.002 * expected.abs().max()
                assert differs.float().mean() < 0.002
    base = copy.deepcopy(model)
    with off(base):
        distance = relative_error(base(IDS), trained)
    assert relative_error(outputs["dequantised"], trained) < 1e-5
    for one, other in itertools.combinations(outputs, 2):
        assert relative_error(outputs[one], outputs[other]) > 1e-3, (one, other)
    assert relative_error(outputs["blocks"], trained) < distance


@pytest.mark.parametrize("double", [False, True])
def test_a_hand_made_merge_back_into_nf4(double):
    model = nn.Sequential(nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -2.0, 0.0, 0.0]]))
    quantize_nf4(model, double=double)
    ll.inject(model, ll.LoRAConfig(rank=1, alpha=3))
    with torch.no_grad():
        model[0].lora_A.copy_(torch.tensor([[1.0, 0.5, 0.5, -0.5]]))
        model[0].lora_B.fill_(2 / 3)  # so that the update is 2, 1, 1, -1 and the sum 4, -1, 1, -1
    assert ll.merge(model, into="blocks") == ["0"]
    # Divided by 4: the nearest levels of -0.25 and 0.25 are number 4 and 10.
    assert model[0].weight.tolist() == [
        pytest.approx([4.0, 4 * PUBLISHED[4], 4 * PUBLISHED[10], 4 * PUBLISHED[4]], abs=1e-6)
    ]
    assert not model.training or model[0].training


@ALL_KINDS
def test_full_precision_leaves_nothing_quantised_and_shares_nothing_with_the_base(llama, kind):
    full, model = qlora(llama, kind, targets=["q_proj", "layers.1.mlp.down_proj"])
    model.eval()
    before, embedding = snapshot(full), model.model.embed_tokens
    alone = copy.deepcopy(full)
    ll.load_adapter(alone, ll.adapter_state(model))
    expected = alone(IDS)
    assert ll.merge(model, into="full-precision", base=full) == list(ll.lora_layers(alone))
    assert not any(isinstance(module, BlockLinear | BlockEmbedding) for module in model.modules())
    assert (model.model.embed_tokens is embedding) == (kind not in BYTES_PER_BLOCK)
    assert relative_error(model(IDS), expected) < 1e-6
    assert relative_error(model(IDS), full(IDS)) > 0.01
    assert snapshot(full) == before
    replaced = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in replaced:
        assert not model.get_submodule(name).weight.requires_grad or name == "lm_head"
        assert model.get_submodule(name).weight.data_ptr() != full.get_submodule(name).weight.data_ptr()
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, as in the base
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("into", ["dequantised", "blocks", "full-precision"])
def test_a_merge_keeps_precision_and_mode_and_rounds_once(into):
    full = DigitsMLP(width=16)
    model = copy.deepcopy(full)
    quantize_nf4(model, exclude=["head"])
    ll.inject(model, ll.LoRAConfig(rank=2, targets=["hidden1", "hidden2", "head"]))
    randomise(model).bfloat16().train()
    for layer in ll.lora_layers(model).values():  # adapters stay in float32, as training has them
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    layers = {name: copy.deepcopy(each) for name, each in ll.lora_layers(model).items()}
    ll.merge(model, into, full if into == "full-precision" else None)
    for name, each in layers.items():
        found = model.get_submodule(name)
        assert found.training
        assert not any(parameter.requires_grad for parameter in found.parameters())
        assert found.weight.dtype == found.bias.dtype == torch.bfloat16
        assert isinstance(found, BlockLinear) == (into == "blocks" and name != "head")
        frozen = full.get_submodule(name).weight if into == "full-precision" else each.base.weight
        total = sum_by_hand(each, frozen)
        if not isinstance(found, BlockLinear):
            assert relative_error(found.weight, total) <= 1.001 * relative_error(total.bfloat16(), total)
        else:
            packed, _ = nf4(total.float())
            assert (found.packed != packed).float().mean() < 0.002
            assert (nf4(total.bfloat16())[0] != packed).float().mean() > 0.01  # so rounding before would be seen
    assert model(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change",
    [
        lambda model: quantize_nf4(model) and model,
        lambda model: replace(model, "hidden1", nn.Identity()) or model,
        lambda model: replace(model, "hidden1", nn.Linear(64, 16, bias=False)) or model,
        lambda model: replace(model, "hidden1", nn.Embedding(16, 64)) or model,
    ],
)
def test_a_base_that_does_not_fit_is_refused_and_nothing_is_merged(change):
    model = DigitsMLP(width=16)
    quantize_nf4(model)
    ll.inject(model, ll.LoRAConfig(rank=2, targets=["hidden2", "hidden1"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="'hidden1'"):
        ll.merge(model, into="full-precision", base=change(DigitsMLP(width=16)))
    assert snapshot(model) == before


def test_a_quantised_layer_without_an_adapter_is_checked_too():
    model, full = DigitsMLP(width=16), DigitsMLP(width=16)
    quantize_nf4(model, exclude=["head"])
    ll.inject(model, ll.LoRAConfig(rank=2, targets=["hidden1"]))
    full.hidden2 = nn.Linear(16, 17)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'hidden2'"):
        ll.merge(model, into="full-precision", base=full)
    assert snapshot(model) == before
    head = model.head  # neither adapted nor quantised
    ll.merge(model, into="full-precision", base=DigitsMLP(width=16, seed=1))
    assert model.head is head


@pytest.mark.parametrize("at_once", [2**20, 640])  # the whole matrix, or slices of 10 rows
@pytest.mark.parametrize(("start", "width"), [(0, 64), (1, 64), (4, 64), (0, 60)])  # in the last, blocks end in a row
def test_rows_are_multiplied_without_gradients_as_in_training(start, width, at_once, monkeypatch):
    monkeypatch.setattr(quantize, "_AT_ONCE", at_once)
    packed, _ = FORMATS["Q4_1"].encode(normal(48, width))
    file = torch.zeros(start + packed.numel(), dtype=torch.uint8)
    file[start:] = packed.flatten()
    there = file[start:].view(packed.shape)
    layer, x = BlockLinear(there, "Q4_1", (48, width), BIAS), normal(2, 3, width, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, BIAS), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x), layer.double()(x.double()).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(there, packed)  # what is in memory was only read
