"""All recorders. Their names are known without importing torch, for the command's help."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_lab.studies.recorder import Recorder

HOURS = {  # name -> how long it takes on two cores, as records/README.md has it
    "memory": "half an hour",
    "speed": "half an hour",
    "rates": "three hours",
    "quality": "eleven hours",
    "ablation": "an hour",
    "targets": "an hour",
    "variants": "three hours",
    "taught": "at most five hours",
    "quantised": "an hour and a half",
    "rank_advice": "two hours",
    "spectra": "half an hour",
    "overfitting": "six hours",
    "remedies": "two hours",
    "head_start": "an hour",
    "downstream": "three hours",
    "elicitation": "half an hour",
    "translation": "three hours",
}
NAMES = tuple(HOURS)
OF_MODELS = ("memory", "speed")  # measure several models; all others are about SmolLM2-135M


def recorder(name: str) -> Recorder:
    """Return the recorder of a name in :data:`NAMES`; no other one is imported."""
    if name not in NAMES:
        raise ValueError(f"There is no record {name!r}; there are {', '.join(NAMES)}.")
    return import_module(f"lora_lab.studies.{name}").RECORDER
