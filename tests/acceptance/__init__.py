"""What a learner, a teacher or an experimenter can do: one acceptance test a capability, through public names only.

These tests import ``lora_lab as ll``, ``check``, ``hint`` and ``progress``; they call the command ``lora-lab``, read
the notebooks, the Makefile and files. So they hold however the package is written inside. The data beside them is
frozen: what is changed on purpose is changed there in the same commit, with the reason in its message.

    exercises.json  45 right answers and 495 wrong ones as source text, each with the sentence that it gets
"""
