"""The runs behind the records, fine-tuning on a task or your own data, and the demo; only the command imports them.

A file is named after the record that it makes: ``lora-lab record NAME`` runs ``experiments/NAME.py``.

recorder     what a recorder is
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
registry     all recorders, by name
submission   is a record that somebody hands in whole?
finetune     lora-lab finetune: a task, or your own data
demo         lora-lab demo: LoRA beside full fine-tuning
"""
