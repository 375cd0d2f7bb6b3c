"""What a recorder is: it makes the rows of one kind of record. ``registry`` knows all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Recorder:
    """What ``lora-lab record NAME`` runs.

    Args:
        settings: how the rows are made on a device, as the record states it.
        rows: makes the rows on a device, and yields each as soon as it is measured. Those of
            :data:`lora_lab.experiments.registry.OF_MODELS` also take the names of models, and measure only these.
        line: a row as a line to print, or None to print nothing.
    """

    settings: Callable[[torch.device], dict[str, Any]]
    rows: Callable[..., Iterator[Row]]
    line: Callable[[Row], str | None]
