"""lora_lab: low-rank adaptation, put to the test on your own machine.

In reading order. A file imports only from what is listed before it: here, and inside a folder in its own docstring:

    system/      the machine: device, atomic writes, processes, progress, provenance

    lora         the heart: LoRALinear, h = W0 x + scaling * B A x
    layers       the same for embeddings, convolutions, GPT-2's Conv1D, attention's output
    inject       adapters on a model: LoRAConfig, inject, merge, adapter_state
    methods      full fine-tuning, LoRA, ...: what is trained
    variants     rsLoRA, LoRA-FA, LoRA+, PiSSA, DoRA: what each changes
    rank         singular values, ranks and subspaces, and their values under pure noise
    task         data in four parts, and the loss
    history      the record of a run, step by step
    checkpoint   stop a run at any moment, continue it bit for bit
    train        fit: one loop for all methods; TrainConfig; evaluate

    models/      which model?           a Llama written for reading, small nets, 4-bit weights, tokenizer, files
    tasks/       which data?            digits, planted ranks, Python's manual, prompts and answers, metrics
    adapters/    what can I do with one?   PEFT's files; switch between adapters, scale, extract, resize; two to try
    analysis/    what did training do?  spectra of updates; why an adapter does nothing
    lean/        the same step in less time and memory
    costs/       what does a step cost? memory, FLOPs, time: predicted and measured
    ablation/    which setting is enough?  grids, packed runs, results, verdicts

    plots        pictures of results
    finetune     fine-tune a model on a task or your own data
    demo         LoRA beside full fine-tuning, in five minutes

    studies/     for research: the runs behind the records, the records, and the ledger of claims
    course/      for teaching: what the notebooks show, exercises that name the mistake, sheets for a class

    commands     what each command of ``lora-lab`` does
    cli          the command line, made from their arguments
    __main__     the same, for ``torchrun -m lora_lab``

``__init__.pyi`` lists the public names and where each is defined. They are loaded at first use, so that
``import lora_lab`` is fast: it imports neither torch nor any module of the package.
"""

import copyreg
import importlib
import sys

import lazy_loader

__version__ = "0.3.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# lazy_loader changes this module's class, so that joblib could not send functions which use the package to other
# processes, such as those of a notebook.
copyreg.pickle(type(sys.modules[__name__]), lambda module: (importlib.import_module, (module.__name__,)))
