"""The machine below everything else: it knows no LoRA and no model.

device      where to compute, how much to do, and how to make randomness repeat
files       files that appear whole or not at all
process     a fresh process for each thing measured; peak memory; are the cores busy?
progress    one progress bar
provenance  where a number comes from: commit, machine, device, versions
renamed     old names that are still accepted
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, ["device", "files", "process", "progress", "provenance", "renamed"]
)
