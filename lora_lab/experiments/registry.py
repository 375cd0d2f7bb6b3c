"""All recorders. Their names are known without importing torch, for the command's help."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_lab.experiments.recorder import Recorder

NAMES = ("memory", "speed", "ablation", "spectra", "overfitting", "trades")


def recorders() -> dict[str, Recorder]:
    """Every recorder by its name, in the order of :data:`NAMES`."""
    from lora_lab.experiments import downstream, overfitting, ranks, spectra, step_memory, step_speed

    modules = (step_memory, step_speed, ranks, spectra, overfitting, downstream)
    return {module.RECORDER.name: module.RECORDER for module in modules}
