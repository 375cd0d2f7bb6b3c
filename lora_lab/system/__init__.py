"""The machine: what all other modules may use, and what knows nothing of LoRA or models.

wording      words for messages, and the progress bar
schema       what a file may say, what an argument may be, and results as JSON
device       where and how much to compute, randomness; fresh processes, their memory, cores that others use
files        atomic writes: files that appear whole or not at all
distributed  one run in several processes, which torchrun starts
provenance   where a result comes from: commit, machine, device, versions; texts and bytes to hash
torch_build  the build of torch that suits this machine, installed before all else
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    ["device", "files", "provenance", "schema", "wording"],  # for ``ll.device`` and the commands
)
