"""What a learner, a teacher or an experimenter can do: one acceptance test a capability, through public names only.

These tests use ``import lora_lab as ll``, ``check``, ``hint`` and ``progress`` of ``lora_lab.course``, what notebooks
import, the command ``lora-lab``, the notebooks, the Makefile and files. So they hold however the package is written
inside. The data beside them is frozen: what is changed on purpose is changed there in the same commit, with the reason
in its message.

    exercises.json  right and wrong answers to each exercise, as source text, each with the sentence that it gets
    claims.json     114 claims, each with its verdict and what shows it
    losses.json     the losses of fixed-seed runs of each method
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # the repository
