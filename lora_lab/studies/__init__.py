"""The runs behind the records, the records, and the ledger of claims.

A file is named after the record that it makes: ``lora-lab record NAME`` runs ``studies/NAME.py``.

records      measured runs with their provenance
recorder     what a recorder is
registry     all recorders, by name
claims/      what is claimed about LoRA, and what holds: a ledger whose verdicts are computed

memory       memory of training steps, predicted and measured
speed        times of training steps, predicted and measured
planning     how long a study takes, before it starts
tuned        recorders of studies that compare setups at their own best learning rates
rates        how the best learning rate depends on the rank
quality      is LoRA as good as full fine-tuning, after how many steps?
targets      which layers should have adapters
variants     do variants of LoRA learn more?
quantised    what a base in fewer bits costs, and what its merges lose
rank_advice  does one run at a high rank tell which rank is enough?
taught       what courses print, as taught and then tuned
ablation     which rank is enough
spectra      what training writes into the weights
overfitting  which method overfits, and which forgets
remedies     what eases forgetting, and what predicts it
head_start   is fine-tuning better than training from scratch?
downstream   can the model learn a downstream task?
elicitation  how much of that can it do untrained, if asked well?
translation  can the real model learn to translate?
submission   is a record that somebody hands in whole?
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["claims", "records"])
