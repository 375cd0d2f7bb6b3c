"""Will LoRA be faster here? The FLOPs of a step, its time, and a model that predicts its time.

flops(model, LoRA(rank=8), 1, 128)                     by part and pass, beside the closed form
step_time(model, {"full": ..., "LoRA": ...}, 1, 128)   real steps, in turn
cost_model().predict(model, {...}, 1, 128)             before any training, with the reason
cards.cost_model("l40s").predict(model, {...}, 1, 128) the same for a card that is not here, from its datasheet
communication(model, LoRA(rank=8), processes=2)        bytes that each process of a run on several machines sends
"""

from lora_lab.costs import cards
from lora_lab.costs.communication import Communication, communication
from lora_lab.costs.cost_model import CAUSES, MEMORY, PYTHON, UPDATE, CostModel, Prediction, cost_model
from lora_lab.costs.flops import (
    ADAPTERS,
    AGAIN,
    ATTENTION,
    FORWARD,
    HEAD,
    INPUT,
    PASSES,
    WEIGHT,
    Flops,
    break_even_rank,
    flops,
)
from lora_lab.costs.timing import Times, step_time
from lora_lab.costs.trace import PHASES

__all__ = [
    "ADAPTERS",
    "AGAIN",
    "ATTENTION",
    "CAUSES",
    "FORWARD",
    "HEAD",
    "INPUT",
    "MEMORY",
    "PASSES",
    "PHASES",
    "PYTHON",
    "UPDATE",
    "WEIGHT",
    "Communication",
    "CostModel",
    "Flops",
    "Prediction",
    "Times",
    "break_even_rank",
    "cards",
    "communication",
    "cost_model",
    "flops",
    "step_time",
]
