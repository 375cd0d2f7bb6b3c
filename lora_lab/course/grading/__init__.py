"""Sheets for nbgrader: exercises with hidden tests, and a question that a person grades. The import registers them.

invariant          a hidden test: a property that every right answer has, a point each
forgetting         those of lesson 08
many_tasks         those of lesson 09
training_wrote     those of lesson 11
which_rate         those of lesson 12
sheets             the exercises of a lesson as a sheet, and a course of such sheets

Nothing that a learner imports imports this folder, and it is not among the names of ``lora_lab.course``: what is in
it reaches a learner's notebook only where a sheet has it, and nbgrader takes it out of what is handed out.
"""

from lora_lab.course.grading import (  # noqa: F401  # in the order of the lessons
    forgetting,
    many_tasks,
    training_wrote,
    which_rate,
)
