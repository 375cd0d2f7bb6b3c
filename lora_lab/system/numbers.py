"""Numbers: those of numpy and torch as Python's, and tensors whose numbers must be finite."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def plain(value: Any) -> Any:
    """A number of numpy, torch, fractions or decimal as Python's, which JSON can hold; anything else as it is."""
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        return value.item()
    return float(value) if isinstance(value, Fraction | Decimal) else value


# Trained weights are far below it, and products of a few numbers beyond it are infinite in float32.
_LARGEST = 1e9


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str = "") -> None:
    """Check that no number is NaN, infinite or so large that products are, which spreads to all that is computed.

    Args:
        tensors: each with its name. Integers pass, and so do tensors without values: fake, on the meta device, empty.
        where: what holds them, such as a path, for the beginning of the message.

    Raises:
        ValueError: a number is NaN or infinite, or its magnitude is above 1e9. The message names the first tensor that
            holds one.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.numel() == 0:
            continue
        # One pass, in which NaN propagates; numbers of one byte have no order in torch.
        smallest, largest = (tensor.detach() if tensor.itemsize > 1 else tensor.detach().float()).aminmax()
        if not (float(smallest) >= -_LARGEST and float(largest) <= _LARGEST):
            named = f"{where}: {name}" if where else name
            raise ValueError(
                f"{named} holds numbers that are NaN or infinite, or above {_LARGEST:g}; training has diverged, or the "
                "file is damaged, so train or copy it anew."
            )
