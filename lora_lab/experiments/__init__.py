"""The runs behind the records, fine-tuning on a task or your own data, and the demo; only the command imports them.

A file is named after the record that it makes: ``lora-lab record NAME`` runs ``experiments/NAME.py``.

recorder     what a recorder is
memory       memory of training steps, predicted and measured
speed        times of training steps, predicted and measured
ablation     which rank is enough
spectra      what training writes into the weights
overfitting  which method overfits, and which forgets
downstream   can the model learn a downstream task?
registry     all recorders, by name
finetune     lora-lab finetune: a task, or your own data
demo         lora-lab demo: LoRA beside full fine-tuning
"""
