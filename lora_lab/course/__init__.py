"""Exercises of the lessons: ``from lora_lab.course import check, hint, progress``.

lessons     what the notebooks show: predictions, tables, claims, pictures with sliders
nearly      the one change that makes a wrong answer right
exercise    what an exercise is, and all of them by name
exercises/  the exercises, one file for each lesson: inputs, wrong answers, properties, hints
judge       right, a known mistake, or what else is wrong, without a trace of the code that is judged
learner     check, hint, progress, keep: what is shown, and what is remembered
figures/    what one lesson draws, one file for each; all other figures are in lora_lab.plots
golf        one sentence taught to a language model
playground  LoRA trained live in a browser, as one page
talk        its second page: a language model and its adapter's dial in a browser, served from here
copies      the lessons in a folder of the learner's, with or without the solutions
sheets      sheets for nbgrader with hidden tests, the properties; for teachers, so not among the names below
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    [
        "copies",
        "exercise",
        "exercises",
        "figures",
        "golf",
        "judge",
        "learner",
        "lessons",
        "nearly",
        "playground",
        "talk",
    ],
    {"learner": ["check", "hint", "keep", "progress"]},
)
