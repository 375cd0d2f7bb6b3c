"""Blocks of 4 and 8 bits against the gguf library's own arithmetic, bit for bit, and one by hand."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.quantize import BLOCK, BYTES_PER_BLOCK, dequantize

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
@given(rows=st.integers(1, 40), blocks=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_random_bytes_mean_what_the_library_says(kind, rows, blocks, seed):
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * BYTES_PER_BLOCK[kind]), dtype=np.uint8)
    ours = dequantize(torch.from_numpy(raw.copy()), kind)
    assert ours.shape == (rows, blocks * BLOCK)
    assert_same_bits(ours, by_library(raw, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_within_half_a_step_and_one_changed_byte_shows(kind):
    weight = np.random.default_rng(0).normal(size=(16, 96)).astype(np.float32)
    raw = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    ours = dequantize(torch.from_numpy(raw.copy()), kind)
    assert_same_bits(ours, by_library(raw, kind))
    largest_step = {"Q4_1": 8 / 15, "Q8_0": 4 / 127}[kind]
    assert 0 < np.abs(ours.numpy() - weight).max() < largest_step
    changed = torch.from_numpy(raw.copy())
    changed[3, -1] ^= 0x55
    where = (dequantize(changed, kind) != ours).nonzero().tolist()
    # The last byte of a row: the last number, and in Q4_1 also the one 16 before it.
    assert where == ([[3, 79], [3, 95]] if kind == "Q4_1" else [[3, 95]])


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


def test_the_blocks_are_left_as_they_were():
    blocks = torch.randint(0, 256, (4, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = blocks.clone()
    dequantize(blocks, "Q4_1").zero_()
    assert torch.equal(blocks, before)


@pytest.mark.parametrize(
    ("kind", "row_bytes", "says"),
    [
        ("Q4_0", 18, r"'Q4_0' are not read here.*Q4_1.*Q8_0"),
        ("q8_0", 34, r"'q8_0' are not read here.*Q4_1.*Q8_0"),
        ("Q4_1", 34, "row of 34 bytes is no whole number of Q4_1 blocks of 20 bytes"),
        ("Q8_0", 20, "row of 20 bytes is no whole number of Q8_0 blocks of 34 bytes"),
    ],
)
def test_other_kinds_and_broken_rows_are_refused(kind, row_bytes, says):
    with pytest.raises(ValueError, match=says):
        dequantize(torch.zeros(2, row_bytes, dtype=torch.uint8), kind)
