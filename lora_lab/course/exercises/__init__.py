"""The exercises, one file for each lesson, in their order. Importing this package registers all of them.

first_look         00 a first look
low_rank           01 matrices of low rank
fine_tuning        02 why one fine-tunes, and how to do it fairly
lora_from_scratch  03 LoRA, line by line
files_and_rounding 03b an adapter's file, and merging it
memory             04 the memory of a training step
speed              05 the time of a training step
which_rank         06 which rank is enough
overfitting        07 overfitting
forgetting         08 forgetting
many_tasks         09 one base, many tasks
did_it_learn       09b did it learn?
variants           10 variants of LoRA
training_wrote     11 what training wrote into the weights
which_rate         12 which learning rate
as_good_as_full    13 as good as full fine-tuning, which layers, how much data
"""

# ruff: noqa: F401, I001  # in the order of the lessons
from lora_lab.course.exercises import first_look, low_rank, fine_tuning, lora_from_scratch, files_and_rounding, memory
from lora_lab.course.exercises import speed, which_rank, overfitting, forgetting, many_tasks, did_it_learn, variants
from lora_lab.course.exercises import training_wrote, which_rate, as_good_as_full
