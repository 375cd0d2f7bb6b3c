"""The runs behind the records, the records, and the ledger of claims.

A study is data: ``records.KINDS`` says which file makes which record, for ``lora-lab record NAME``.

records      measured runs with their provenance, and the kinds of them
recorder     how a record is made: sweeps of two kinds
bases        the small language models that are shipped, made from nothing
claims/      what is claimed about LoRA, and what holds: a ledger whose verdicts are computed
answers      fifteen questions that people type, each with a sentence that rests on rows of the ledger
steps        memory and times of training steps, predicted and measured
tuned        setups at their best rates: quality, rates
paged        studies judged by pages, on small bases and SmolLM2: rank, batch, repetition, layers, variants
versions     the same of other versions of a base: four bits, merges, one that was trained on
front        who forgets less at equal learning
spectra      which rank is enough, and what training writes into the weights
curves       which method overfits, which forgets, and what eases it; is fine-tuning better than training from scratch?
downstream   can the model learn a downstream task, and how much of it can it do untrained?
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["answers", "claims", "records"])
