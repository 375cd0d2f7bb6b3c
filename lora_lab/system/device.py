"""Which device to compute on, how much work to do, and reproducible randomness.

Two environment variables control every lesson and command:

    LORA_LAB_DEVICE   cpu, cuda, cuda:1, mps, ...   (default: cuda if there is a CUDA GPU, otherwise cpu)
    LORA_LAB_EFFORT   quick or full                 (default: full on a CUDA GPU, quick elsewhere)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_lab.system.wording import count_noun, shortened


def pick_device(device: str | torch.device | None = None) -> tuple[torch.device, str]:
    """Return the device to use, and the reason as text.

    Args:
        device: such as "cpu" or "cuda:0"; by default the value of LORA_LAB_DEVICE, or else the first CUDA GPU, or else
            the CPU.

    Raises:
        ValueError: torch does not know the device, or this machine does not have it.
    """
    requested = device if device is not None else os.environ.get("LORA_LAB_DEVICE") or None
    reason = "it was asked for" if device is not None else "LORA_LAB_DEVICE asks for it"
    if requested is not None:
        try:
            available = torch.device(requested)
            torch.empty(1, device=available)
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"Device {shortened(str(requested))!r} cannot be used here ({shortened(str(error).splitlines()[0])}); "
                "try 'cpu'."
            ) from None
        if available.type == "meta":
            raise ValueError("Device 'meta' stores shapes but no values, so it cannot be trained on; try 'cpu'.")
        return available, f"{available} because {reason}"
    if torch.cuda.is_available():
        return torch.device("cuda"), f"cuda because a GPU is there: {torch.cuda.get_device_name()}"
    # Apple's mps is used on request only: it rounds differently, and nothing has been measured on it.
    return torch.device("cpu"), f"cpu because torch sees no CUDA GPU; {count_noun(torch.get_num_threads(), 'thread')}"


def effort() -> str:
    """Return how much work a lesson does: "quick" (minutes on two CPU cores) or "full" (for a GPU).

    Raises:
        ValueError: LORA_LAB_EFFORT has another value.
    """
    level = os.environ.get("LORA_LAB_EFFORT") or ("full" if pick_device()[0].type == "cuda" else "quick")
    if level not in ("quick", "full"):
        raise ValueError(f"LORA_LAB_EFFORT is {level!r}, but it must be 'quick' or 'full'.")
    return level


@contextmanager
def restore_randomness(device: torch.device) -> Iterator[None]:
    """Give torch's global generators, those of the CPU and of a CUDA device, their states back after a block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators, which dropout uses, for a block, and restore their states at its end."""
    with restore_randomness(device):
        seed_generators(device, seed)
        yield


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed torch's global generators, those of the CPU and of a CUDA device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
