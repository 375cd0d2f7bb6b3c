"""The runs behind the records, the records, and the ledger of claims.

A study is data: ``records.KINDS`` says which file makes which record, for ``lora-lab record NAME``.

records      measured runs with their provenance, and the kinds of them
recorder     how a record is made: cases and tuned studies, and how long they take
claims/      what is claimed about LoRA, and what holds: a ledger whose verdicts are computed
steps        memory and times of training steps, predicted and measured
methods      records of tuned methods: quality, targets, variants
rates        how the best learning rate depends on the rank; does one run tell which rank is enough?
quantised    what a base in fewer bits costs, and what its merges lose
taught       what courses print, as taught and then tuned
spectra      which rank is enough, and what training writes into the weights
forgetting   which method overfits, which forgets, and what eases it
head_start   is fine-tuning better than training from scratch?
downstream   can the model learn a downstream task, and how much of it can it do untrained?
translation  can the real model learn to translate?
submission   is a record that somebody hands in whole?
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["claims", "records"])
