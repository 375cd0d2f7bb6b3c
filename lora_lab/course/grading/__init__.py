"""Sheets for nbgrader: exercises with hidden tests, and a question that a person grades.

invariant          a hidden test: a property that every right answer has, a point each
sheets             the exercises of a lesson as a sheet, and a course of such sheets

Nothing that a learner imports imports this folder, and it is not among the names of ``lora_lab.course``: what is in
it reaches a learner's notebook only where a sheet has it, and nbgrader takes it out of what is handed out.
"""
