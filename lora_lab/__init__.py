"""lora_lab: low-rank adaptation, put to the test on your own machine.

In reading order. A file imports only from what is listed before it: here, and inside a folder in its own docstring:

    system/      the machine: device, files that appear whole or not at all, processes, progress, provenance

    lora         the heart: LoRALinear, h = W0 x + scaling * B A x
    layers       the same for embeddings, convolutions, GPT-2's Conv1D, attention's output
    variants     rsLoRA, LoRA-FA, PiSSA, DoRA: what each changes
    inject       onto a model and off it: LoRAConfig, inject, merge, adapter_state
    methods      full fine-tuning, LoRA, ...: one object for fit
    rank         singular values, ranks and subspaces, beside what chance gives
    task         data in four parts, and the loss that goes with it
    history      what a run did, step by step
    checkpoint   stop anywhere, continue bit for bit
    train        fit: one loop for every method; TrainConfig; evaluate

    models/      which model?           a Llama written for reading, small nets, 4-bit weights, tokenizer, files
    tasks/       which data?            digits, planted ranks, Python's manual, prompts and responses, metrics
    adapters/    what can I do with one?   PEFT's files; switch, take off, extract, resize
    analysis/    what did training do?  spectra of updates; why an adapter does nothing
    lean/        the same step in less time and memory
    costs/       what does a step cost? memory, FLOPs, time: predicted and measured
    ablation/    which setting is enough?  grids, packed runs, results, verdicts

    records      measured runs with their provenance
    plots        pictures of results
    experiments/ the runs behind the records; fine-tuning and the demo
    cli          the command ``lora-lab``

The public names and where each is defined stand in ``__init__.pyi``; they are loaded at first use, so that
``import lora_lab`` costs nothing beyond Python itself.
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
