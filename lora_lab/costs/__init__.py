"""What does a training step cost? The step that ``fit`` takes is traced on fake tensors, counted, measured and timed.

fake      models of fake tensors, copies that share their weights, and copies with a few of many identical blocks
setup     Setup: how a model is trained, as far as its cost depends on it; its step, operation by operation, rehearsed
bill      the bytes at a step's peak by part, from a recording of its storages
memory    the memory bill: predict, measure, largest; which setups fit on a card
flops     the FLOPs of a step, by part of the model and pass; what the processes of a data-parallel run send each other
timing    real steps timed in turn; a step's time predicted before any training, and the reason
cards     the prediction for cards that are not here, from their datasheets
speed     the face of ``ll.speed``
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["memory", "speed"])
