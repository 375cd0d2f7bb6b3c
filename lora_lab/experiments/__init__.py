"""The runs behind the records, fine-tuning on a task or your own data, and the demo; only the command imports them.

recorder     what a recorder is
step_memory  lora-lab record memory: bills, predicted and measured
step_speed   lora-lab record speed: step times, predicted and measured
ranks        lora-lab record ablation: which rank is enough
spectra      lora-lab record spectra: what training writes into the weights
overfitting  lora-lab record overfitting: who overfits, and who forgets
finetune     lora-lab finetune: a trade, or your own data
downstream   lora-lab record downstream: can the model learn one?
registry     all recorders, by name
demo         lora-lab demo: LoRA beside full fine-tuning
"""
