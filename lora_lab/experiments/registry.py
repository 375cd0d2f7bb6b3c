"""All recorders. Their names are known without importing torch, for the command's help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lab.system.renamed import warn_renamed

if TYPE_CHECKING:
    from lora_lab.experiments.recorder import Recorder

NAMES = ("memory", "speed", "ablation", "spectra", "overfitting", "downstream")


def current_name(name: str) -> str:
    """What a record is called now, by a name that it may have had in an earlier version."""
    if name == "trades":
        warn_renamed("The record 'trades'", "'downstream'", FutureWarning)
        return "downstream"
    return name


def recorders() -> dict[str, Recorder]:
    """Every recorder by its name, in the order of :data:`NAMES`."""
    from lora_lab.experiments import downstream, overfitting, ranks, spectra, step_memory, step_speed

    modules = (step_memory, step_speed, ranks, spectra, overfitting, downstream)
    return {module.RECORDER.name: module.RECORDER for module in modules}
