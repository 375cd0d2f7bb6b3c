"""Where to compute, how much to do, and how to make randomness repeat.

Two environment variables steer every lesson and command:

    LORA_LAB_DEVICE   cpu, cuda, cuda:1, mps, ...   (default: the best there is)
    LORA_LAB_EFFORT   quick or full                 (default: full on a CUDA GPU, quick elsewhere)
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def pick_device(device: str | torch.device | None = None) -> tuple[torch.device, str]:
    """The device to use and one sentence that says why.

    Args:
        device: a wish, such as "cpu" or "cuda:0"; None asks LORA_LAB_DEVICE, then the machine.

    Raises:
        ValueError: the wish names no device that torch knows, or one that is not there.
    """
    asked = device if device is not None else os.environ.get("LORA_LAB_DEVICE") or None
    who = "it was asked for" if device is not None else "LORA_LAB_DEVICE asks for it"
    if asked is not None:
        try:
            found = torch.device(asked)
            torch.empty(1, device=found)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"Device {str(asked)!r} cannot be used here ({str(error).splitlines()[0]}); try 'cpu'."
            ) from None
        if found.type == "meta":
            raise ValueError("Device 'meta' holds shapes but no numbers, so nothing can be trained on it; try 'cpu'.")
        return found, f"{found} because {who}"
    if torch.cuda.is_available():
        return torch.device("cuda"), f"cuda because a GPU is there: {torch.cuda.get_device_name()}"
    # Apple's mps is left to those who ask for it: it computes in float32 with other roundings,
    # and nothing here has been measured on it.
    return torch.device("cpu"), f"cpu because torch sees no CUDA GPU; {torch.get_num_threads()} threads"


def effort() -> str:
    """How much a lesson does: "quick" (minutes on two CPU cores) or "full" (for a GPU).

    Raises:
        ValueError: LORA_LAB_EFFORT is set to something else.
    """
    asked = os.environ.get("LORA_LAB_EFFORT") or ("full" if pick_device()[0].type == "cuda" else "quick")
    if asked not in ("quick", "full"):
        raise ValueError(f"LORA_LAB_EFFORT is {asked!r}, but it must be 'quick' or 'full'.")
    return asked


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's (if it is in use) and torch's global generators.

    ``fit`` and ``inject`` need no call of this: they draw from generators of their own.
    """
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - the global generator is the point
    torch.manual_seed(seed)


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators for the block (dropout draws from them), and put them back after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
