"""Weights kept in blocks of 32 with a shared scale, as GGUF files ship them.

    Q4_1   20 bytes: scale d and minimum m in float16, 32 numbers q of 4 bits    w = d q + m
    Q8_0   34 bytes: scale d in float16, 32 numbers q of 8 bits                  w = d q

The layouts are llama.cpp's; the ``gguf`` library defines them too, and the tests hold the two equal
bit for bit. This one runs on torch's threads, several times faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
BYTES_PER_BLOCK = {"Q4_1": 20, "Q8_0": 34}


def dequantize(blocks: Tensor, kind: str) -> Tensor:
    """The float32 matrix (rows, columns) that ``blocks`` (rows, bytes) stand for.

    Args:
        blocks: uint8, (rows, columns / 32 * bytes per block).
        kind: "Q4_1" or "Q8_0".

    Raises:
        ValueError: another kind, or rows that are no whole number of blocks.
    """
    if kind not in BYTES_PER_BLOCK:
        raise ValueError(f"Blocks of kind {kind!r} are not read here, only {list(BYTES_PER_BLOCK)}.")
    size = BYTES_PER_BLOCK[kind]
    rows, row_bytes = blocks.shape
    if row_bytes % size:
        raise ValueError(f"A row of {row_bytes} bytes is no whole number of {kind} blocks of {size} bytes.")
    block = blocks.view(rows, row_bytes // size, size)  # (576, 18, 20)
    scale = _float16(block[..., 0:2])  # (576, 18, 1)
    weight = torch.empty(rows, row_bytes // size, BLOCK)  # (576, 18, 32)
    if kind == "Q8_0":
        weight.copy_(block[..., 2:].view(torch.int8)).mul_(scale)  # (576, 18, 32)
    else:
        minimum = _float16(block[..., 2:4])  # (576, 18, 1)
        packed = block[..., 4:]  # (576, 18, 16), two numbers a byte
        weight[..., :16] = packed & 15  # (576, 18, 16)
        weight[..., 16:] = packed >> 4  # (576, 18, 16)
        weight.mul_(scale).add_(minimum)  # (576, 18, 32)
    return weight.view(rows, -1)  # (576, 576)


def _float16(pair: Tensor) -> Tensor:
    return pair.contiguous().view(torch.float16).float()  # (..., 2) bytes -> (..., 1)
