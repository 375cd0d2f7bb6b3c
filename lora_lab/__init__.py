"""lora_lab: low-rank adaptation, put to the test on your own machine.

The modules in reading order; each imports only from those above it:

    device      which device and dtype to use, and why
    targets     which layers a list of names means
    rank        singular values, ranks and subspaces, beside what chance gives
    lora        the heart: LoRALinear, inject, merge
    layers      LoRA for embeddings, convolutions, GPT-2's Conv1D
    variants    rsLoRA, LoRA-FA, PiSSA, DoRA: what each changes
    quantize    a frozen base in 4 bits: GGUF's blocks, NF4
    adapters    switch, off; save and load in PEFT's file format; extract, resize
    diagnosis   diagnose: why does my adapter do nothing?
    models      a Llama written from scratch, shapes of known ones, two small nets, real weights
    tasks       data with train, validation, test and off-domain parts
    lean        the same training step in less time and memory
    methods     how a model is made ready: full fine-tuning, LoRA
    train       fit: one loop for every method
    spectra     what training wrote into a model's weights
    rehearse    a step watched on a copy, or on tensors without numbers
    memory      the memory bill: predicted without allocating, measured
    flops       what a step multiplies, by layer and pass
    replay      operations timed one by one
    speed       step times, and a cost model that predicts them
    records     measured runs with their provenance: write, load
    ablation    many runs: packed, in processes, on a cluster; which rank is enough
    plots       pictures of results
    processes   a process of its own for each thing measured
    recording   what ``lora-lab record`` runs
    demo        the main job: LoRA beside full fine-tuning
    finetune    a trade, or your own data, taught and judged
    cli         the command ``lora-lab``
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it. Loaded at first use, so that `import lora_lab`
# costs nothing beyond Python itself.
_WHERE = {
    "pick_device": "device",
    "seed_everything": "device",
    "LoRAConfig": "lora",
    "LoRALayer": "lora",
    "LoRALinear": "lora",
    "inject": "lora",
    "merge": "lora",
    "adapter_state": "lora",
    "lora_layers": "lora",
    "quantize_nf4": "quantize",
    "save_adapter": "adapters",
    "load_adapter": "adapters",
    "extract": "adapters",
    "Llama": "models.llama",
    "LlamaConfig": "models.llama",
    "load_pretrained": "models.pretrained",
    "save_model": "models.pretrained",
    "Task": "tasks.base",
    "FullFineTuning": "methods",
    "PartialFineTuning": "methods",
    "LoRA": "methods",
    "LoRAFA": "methods",
    "LoRAPlus": "methods",
    "RsLoRA": "methods",
    "PiSSA": "methods",
    "DoRA": "methods",
    "Lean": "lean",
    "diagnose": "diagnosis",
    "Grid": "ablation.grid",
    "Trial": "ablation.grid",
    "ablate": "ablation.run",
    "History": "train",
    "evaluate": "train",
    "fit": "train",
}
_MODULES = (
    "ablation",
    "adapters",
    "cli",
    "device",
    "diagnosis",
    "layers",
    "lean",
    "lora",
    "memory",
    "methods",
    "models",
    "plots",
    "quantize",
    "rank",
    "records",
    "rehearse",
    "spectra",
    "speed",
    "tasks",
    "train",
    "variants",
)

__all__ = ["__version__", *_WHERE, *_MODULES]

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from lora_lab import (
        ablation,
        adapters,
        cli,
        device,
        diagnosis,
        layers,
        lean,
        lora,
        memory,
        methods,
        models,
        plots,
        quantize,
        rank,
        records,
        rehearse,
        spectra,
        speed,
        tasks,
        train,
        variants,
    )
    from lora_lab.ablation.grid import Grid, Trial
    from lora_lab.ablation.run import ablate
    from lora_lab.adapters import extract, load_adapter, save_adapter
    from lora_lab.device import pick_device, seed_everything
    from lora_lab.diagnosis import diagnose
    from lora_lab.lean import Lean
    from lora_lab.lora import LoRAConfig, LoRALayer, LoRALinear, adapter_state, inject, lora_layers, merge
    from lora_lab.methods import DoRA, FullFineTuning, LoRA, LoRAFA, LoRAPlus, PartialFineTuning, PiSSA, RsLoRA
    from lora_lab.models.llama import Llama, LlamaConfig
    from lora_lab.models.pretrained import load_pretrained, save_model
    from lora_lab.quantize import quantize_nf4
    from lora_lab.tasks.base import Task
    from lora_lab.train import History, evaluate, fit


def __getattr__(name: str):
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module 'lora_lab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
