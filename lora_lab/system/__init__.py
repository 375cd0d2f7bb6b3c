"""The machine: what all other modules may use, and what knows nothing of LoRA or models.

wording      words for messages: a count with its noun, a long text in short
numbers      numbers of numpy and torch as Python's; tensors whose numbers must all be finite
schema       what a file may say, and what an argument may be, checked against annotated types
device       which device to compute on, how much work to do, and reproducible randomness
files        atomic writes: files that appear whole or not at all
json_text    results as JSON text for other programs
process      fresh processes for measurements; peak memory; cores used by other processes
progress     the progress bar
distributed  one run in several processes, which torchrun starts
provenance   where a result comes from: commit, machine, device, versions
torch_build  the build of torch that suits this machine, installed before all else
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    [
        "device",
        "distributed",
        "files",
        "json_text",
        "numbers",
        "process",
        "progress",
        "provenance",
        "schema",
        "torch_build",
        "wording",
    ],
)
