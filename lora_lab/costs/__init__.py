"""What does a training step cost? The step that ``fit`` takes is traced on fake tensors, counted, measured and timed.

fake      models of fake tensors, and copies that share their weights
setup     Setup: how a model is trained, as far as its cost depends on it; its step, operation by operation
bill      the bytes at a step's peak by part, from a recording of its storages
repeated  rehearses a stack of identical blocks by a few of them
memory    the memory bill: predict, measure, largest; which setups fit on a card
flops     the FLOPs of a step, by part of the model and pass
timing    real steps timed in turn; a step's time predicted before any training, and the reason
cards     the prediction for cards that are not here, from their datasheets
speed     the face of ``ll.speed``; what the processes of a data-parallel run send each other in a step
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["memory", "speed"])
