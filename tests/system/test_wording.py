"""Words for messages."""

from pathlib import Path

import torch
from torch import nn

from lora_lab.system.wording import short_repr


def test_a_value_of_many_lines_is_shown_on_one():
    assert short_repr("a") == "'a'"
    assert short_repr(8) == "8"
    assert short_repr(10**5000) == "a number of very many digits"
    assert short_repr(Path("a" * 60, "b")).endswith("/b')")
    for value in (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), torch.zeros(9, 9), "a\nb" * 99, [[1] * 99] * 99):
        assert 5 < len(short_repr(value)) <= 300
        assert "\n" not in short_repr(value)
