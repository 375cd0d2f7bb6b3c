"""Numbers of numpy and torch, and tensors with numbers that are not finite."""

import math
from decimal import Decimal

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_lab.system.numbers import check_finite, plain

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_tensor_with_a_number_that_is_not_finite_is_named(dtype):
    good = torch.randn(3, 4).to(dtype)
    check_finite([("a", good), ("b", good)])
    for number in (math.nan, math.inf, -math.inf):
        bad = good.float().clone()
        bad[1, 2] = number
        bad = bad.to(dtype)
        if bad.float().isfinite().all():  # a type without infinity may have rounded to its largest number
            continue
        with pytest.raises(ValueError, match=r"^b holds numbers that are NaN or infinite, or above 1e\+09; "):
            check_finite([("a", good), ("b", bad), ("c", bad)])
        with pytest.raises(ValueError, match=r"^x\.safetensors: b holds numbers that are NaN"):
            check_finite([("b", bad)], "x.safetensors")


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_whose_products_are_infinite_is_not_taken_for_a_weight(sign):
    check_finite([("b", torch.tensor([0.5, sign * 1e9]))])
    with pytest.raises(ValueError, match=r"^b holds numbers .*, or above 1e\+09; "):
        check_finite([("b", torch.tensor([0.5, sign * 1.001e9]))])


def test_tensors_without_values_and_whole_numbers_pass():
    with FakeTensorMode():
        fake = torch.ones(2)
    check_finite([("i", torch.ones(2, dtype=torch.int32)), ("m", torch.ones(2, device="meta")), ("f", fake)])
    check_finite(
        [("empty", torch.ones(0, 3)), ("scalar", torch.tensor(1.0)), ("parameter", torch.nn.Parameter(torch.ones(2)))]
    )


def test_a_number_of_decimal_is_pythons():
    assert type(plain(Decimal("0.5"))) is float
    assert plain(Decimal("0.5")) == 0.5
