"""Figures that one lesson draws, for a point that it makes: one file for each lesson.

What can be drawn of a model, a table or a record of one's own is in ``lora_lab.plots``, with colours and styles.

low_rank           01 low rank
lora_from_scratch  03 LoRA from scratch
memory             04 memory
speed              05 speed
which_rank         06 which rank
overfitting        07 overfitting
forgetting         08 forgetting
many_tasks         09 many tasks
did_it_learn       09b did it learn?
variants           10 variants
training_wrote     11 what training wrote
"""

from lora_lab.course.figures.forgetting import weight_decay
from lora_lab.course.figures.lora_from_scratch import schematic
from lora_lab.course.figures.low_rank import numbers, shares_by_rank
from lora_lab.course.figures.many_tasks import effect_of_adapters
from lora_lab.course.figures.memory import memory_of_steps, saved_in_a_block
from lora_lab.course.figures.overfitting import (
    equal_training_loss,
    lowest_and_rise,
    rigged,
    stopping_points,
    training_curve,
)
from lora_lab.course.figures.speed import passes, published
from lora_lab.course.figures.training_wrote import intruders_by_size, overlaps
from lora_lab.course.figures.variants import at_common_rate, differences
from lora_lab.course.figures.which_rank import behind_full, seed_by_seed

__all__ = [
    "at_common_rate",
    "behind_full",
    "differences",
    "effect_of_adapters",
    "equal_training_loss",
    "intruders_by_size",
    "lowest_and_rise",
    "memory_of_steps",
    "numbers",
    "overlaps",
    "passes",
    "published",
    "rigged",
    "saved_in_a_block",
    "schematic",
    "seed_by_seed",
    "shares_by_rank",
    "stopping_points",
    "training_curve",
    "weight_decay",
]
