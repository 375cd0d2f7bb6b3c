"""All recorders. Their names are known without importing torch, for the command's help."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lora_lab.system.renamed import warn_renamed

if TYPE_CHECKING:
    from lora_lab.experiments.recorder import Recorder

NAMES = (
    *("memory", "speed", "rates", "quality", "ablation", "targets", "variants", "quantised", "rank_advice"),
    *("spectra", "overfitting", "downstream", "elicitation"),
)
OF_MODELS = ("memory", "speed")  # measure several models; all others are about SmolLM2-135M


def current_name(name: str) -> str:
    """The name of a record today, from one that it may have had in an earlier version."""
    if name == "trades":
        warn_renamed("The record 'trades'", "'downstream'", FutureWarning)
        return "downstream"
    return name


def recorder(name: str) -> Recorder:
    """The recorder of a name in :data:`NAMES`; no other one is imported."""
    if name not in NAMES:
        raise ValueError(f"There is no record {name!r}; there are {', '.join(NAMES)}.")
    return import_module(f"lora_lab.experiments.{name}").RECORDER
