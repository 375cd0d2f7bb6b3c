"""The runs behind the records, the records, and the ledger of claims.

A study is data: ``records.KINDS`` says which file makes which record, for ``lora-lab record NAME``.

records      measured runs with their provenance, and the kinds of them
recorder     how a record is made: sweeps of two kinds
bases        the small language models that are shipped, made from nothing
claims/      what is claimed about LoRA, and what holds: a ledger whose verdicts are computed
answers      fifteen questions that people type, each with a sentence that rests on rows of the ledger
steps        memory and times of training steps, predicted and measured
tuned        setups at their best rates: quality, targets, variants, rates, rank advice, bits
tiny         studies on small bases: many seeds, several bases, seconds a run
spectra      which rank is enough, and what training writes into the weights
curves       which method overfits, which forgets, and what eases it; is fine-tuning better than training from scratch?
downstream   can the model learn a downstream task, and how much of it can it do untrained?
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["answers", "claims", "records"])
