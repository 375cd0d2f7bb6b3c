"""All recorders. Their names are known without importing torch, for the command's help."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_lab.studies.recorder import Recorder

NAMES = (
    *("memory", "speed", "rates", "quality", "ablation", "targets", "variants", "taught", "quantised", "rank_advice"),
    *("spectra", "overfitting", "remedies", "head_start", "downstream", "elicitation", "translation"),
)
OF_MODELS = ("memory", "speed")  # measure several models; all others are about SmolLM2-135M


def recorder(name: str) -> Recorder:
    """The recorder of a name in :data:`NAMES`; no other one is imported."""
    if name == "memory":
        from lora_lab.studies.memory import RECORDER
    elif name == "speed":
        from lora_lab.studies.speed import RECORDER
    elif name == "rates":
        from lora_lab.studies.rates import RECORDER
    elif name == "quality":
        from lora_lab.studies.quality import RECORDER
    elif name == "ablation":
        from lora_lab.studies.ablation import RECORDER
    elif name == "targets":
        from lora_lab.studies.targets import RECORDER
    elif name == "variants":
        from lora_lab.studies.variants import RECORDER
    elif name == "taught":
        from lora_lab.studies.taught import RECORDER
    elif name == "quantised":
        from lora_lab.studies.quantised import RECORDER
    elif name == "rank_advice":
        from lora_lab.studies.rank_advice import RECORDER
    elif name == "spectra":
        from lora_lab.studies.spectra import RECORDER
    elif name == "overfitting":
        from lora_lab.studies.overfitting import RECORDER
    elif name == "remedies":
        from lora_lab.studies.remedies import RECORDER
    elif name == "head_start":
        from lora_lab.studies.head_start import RECORDER
    elif name == "downstream":
        from lora_lab.studies.downstream import RECORDER
    elif name == "elicitation":
        from lora_lab.studies.elicitation import RECORDER
    elif name == "translation":
        from lora_lab.studies.translation import RECORDER
    else:
        raise ValueError(f"There is no record {name!r}; there are {', '.join(NAMES)}.")
    return RECORDER
