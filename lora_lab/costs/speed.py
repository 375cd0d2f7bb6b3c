"""Will LoRA be faster here? The FLOPs of a step, its time, and a model that predicts its time.

flops(model, LoRA(rank=8), 1, 128)                     by part and pass
step_time(model, {"full": ..., "LoRA": ...}, 1, 128)   real steps, in turn
cost_model().predict(model, {...}, 1, 128)             before any training, with the reason
cards.cost_model("l40s").predict(model, {...}, 1, 128) the same for a card that is not here, from its datasheet
communication(model, LoRA(rank=8), processes=2)        bytes that each of several processes sends in a step
"""

from lora_lab.costs import cards
from lora_lab.costs.flops import ADAPTERS, WEIGHT, break_even_rank, communication, flops
from lora_lab.costs.timing import CAUSES, MEMORY, UPDATE, cost_model, step_time

__all__ = [
    "ADAPTERS",
    "CAUSES",
    "MEMORY",
    "UPDATE",
    "WEIGHT",
    "break_even_rank",
    "cards",
    "communication",
    "cost_model",
    "flops",
    "step_time",
]
