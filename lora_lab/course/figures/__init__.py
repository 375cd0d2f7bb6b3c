"""Figures that one lesson draws, for a point that it makes: one file for each lesson.

What can be drawn of a model, a table or a record of one's own is in ``lora_lab.plots``, with colours and styles.

low_rank           01 low rank
fine_tuning        02 why fine-tune
lora_from_scratch  03 LoRA from scratch
files_and_rounding 03b files and rounding
memory             04 memory
speed              05 speed
which_rank         06 which rank
overfitting        07 overfitting
forgetting         08 forgetting
did_it_learn       09b did it learn
variants           10 variants
training_wrote     11 what training wrote
which_rate         12 which rate
as_good_as_full    13 as good as full
"""
