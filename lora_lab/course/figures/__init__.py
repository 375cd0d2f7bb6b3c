"""Figures that one lesson draws, for a point that it makes: one file for each lesson.

What can be drawn of a model, a table or a record of one's own is in ``lora_lab.plots``, with colours and styles.

low_rank           01 low rank
fine_tuning        02 why fine-tune
lora_from_scratch  03 LoRA from scratch
memory             04 memory
speed              05 speed
which_rank         06 which rank
overfitting        07 overfitting
forgetting         08 forgetting
many_tasks         09 many tasks
variants           10 variants
training_wrote     11 what training wrote
as_good_as_full    13 as good as full
"""

from lora_lab.course.figures.fine_tuning import by_rate, from_start_to_end, head_starts, right_answers
from lora_lab.course.figures.forgetting import weight_decay
from lora_lab.course.figures.lora_from_scratch import schematic
from lora_lab.course.figures.low_rank import numbers, shares_by_rank, write_entries
from lora_lab.course.figures.many_tasks import copies_and_adapters, effect_of_adapters
from lora_lab.course.figures.memory import memory_of_steps, saved_in_a_block
from lora_lab.course.figures.overfitting import lowest_and_rise, rigged, training_curve, two_views
from lora_lab.course.figures.speed import passes, published
from lora_lab.course.figures.training_wrote import agreement, energy_ranks
from lora_lab.course.figures.variants import at_common_rate, differences
from lora_lab.course.figures.which_rank import behind_full, seed_by_seed

__all__ = [
    "agreement",
    "at_common_rate",
    "behind_full",
    "by_rate",
    "copies_and_adapters",
    "differences",
    "effect_of_adapters",
    "energy_ranks",
    "from_start_to_end",
    "head_starts",
    "lowest_and_rise",
    "memory_of_steps",
    "numbers",
    "passes",
    "published",
    "rigged",
    "right_answers",
    "saved_in_a_block",
    "schematic",
    "seed_by_seed",
    "shares_by_rank",
    "training_curve",
    "two_views",
    "weight_decay",
    "write_entries",
]
