"""What a model is trained and evaluated on: data in four parts that do not leak into each other.

    train        the examples to learn from
    validation   the same kind of data, to choose learning rates, steps and ranks
    test         the same kind of data, for the final verdict
    off_domain   another kind of data: a rise of the loss on it is a sign of forgetting

No data is downloaded: it comes with Python, scikit-learn or Babel, was written for this project, or is generated. The
modules in reading order:

    arrays       for small nets: digits, planted ranks, from_arrays for numbers of your own
    python_docs  docs: next tokens of Python's manual
    pages        next tokens of docstrings and READMEs, with pages as what a result must hold for
    instruction  prompts and answers: from_pairs
    datasets     prompts and answers that exist already: summarise, translate, sentiment, style
    sentences    sentences to translate, from a grammar, with combinations and words that training lacks
    named        a task by its name, or from a file of yours: from_jsonl, from_table, from_text
    generate     what a model answers
    metrics      scores of answers, and baselines that need no model
    elicitation  baselines that need no training: examples in the prompt, calibration, a linear probe

A new data set of prompts and answers goes into ``datasets``, any other into a file of its own; if it needs a tokenizer,
its name in :data:`TASKS` (in ``named``) makes it a task of ``lora-lab finetune``.
"""

import lazy_loader

from lora_lab.task import IGNORE, Examples, Task, cross_entropy, mean_squared_error
from lora_lab.tasks.arrays import digits, from_arrays, planted
from lora_lab.tasks.datasets import sentiment, style, summarise, translate
from lora_lab.tasks.instruction import Pair, PairTask, from_pairs
from lora_lab.tasks.named import TASKS, from_jsonl, from_table, from_text, task_of
from lora_lab.tasks.python_docs import docs
from lora_lab.tasks.sentences import sentences

__all__ = [
    "IGNORE",
    "TASKS",
    "Examples",
    "Pair",
    "PairTask",
    "Task",
    "cross_entropy",
    "digits",
    "docs",
    "from_arrays",
    "from_jsonl",
    "from_pairs",
    "from_table",
    "from_text",
    "mean_squared_error",
    "planted",
    "sentences",
    "sentiment",
    "style",
    "summarise",
    "task_of",
    "translate",
]

__getattr__, _, _ = lazy_loader.attach(
    __name__, ["elicitation", "generate", "metrics", "pages"]
)  # the other files are loaded already
