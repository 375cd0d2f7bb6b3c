"""Hostile input: thousands of damaged files and odd arguments, each of which must end in one sentence, quickly.

The sentence must be one that the package wrote, in one line; whether it says what to do is for ``tests/guards/
test_errors.py``. What is let through is listed by argument in ``api``: Python's words for an object of the wrong type
(``LET_THROUGH``), and torch's for a model and data that do not go together (``RUN``).

    make hostile                                                    # all targets, seed 0 and today's date as a seed
    python -m tests.hostile --target gguf --cases 300 --seed 7      # other cases of one target
    python -m tests.hostile --target gguf --seed 7 --case 123       # one of them again, with its traceback

The files in reading order:

    core         what a case is, and which name its outcome has
    workers      cases in processes of their own, with limits of time and memory
    values       odd numbers, texts, JSON values, patterns and Python objects to damage things with
    damage       what is done to bytes, to JSON, and to the header of a safetensors file
    templates    chat templates: broken, endless, and looking for a door
    material     the tiny model and tokenizer that are damaged

and one file for each target. It makes a case from a random generator, so a target, a seed and a number are a case:

    gguf         GGUF files of models
    folders      Hugging Face folders: config, tokenizer, template, index, weights
    adapters     PEFT's folders, adapters in memory, patterns
    data         files of examples: JSON Lines, text, tables
    runs         what we have written: checkpoints, histories, records, results of sweeps, lessons, replies
    api          odd arguments to the public functions
    commands     odd arguments to ``lora-lab``
    interrupted  signals, a full disk, and two processes in one folder
    security     what a stranger's file must not be able to do

A new target is a file with ``prepare`` and ``case``, and a line in ``targets``.
"""
