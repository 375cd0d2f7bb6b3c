"""What a model is trained on and judged by: data in four parts that do not leak into each other.

    train        what it learns from
    validation   the same kind of data, for choosing (rates, steps, ranks)
    test         the same kind of data, for the final verdict
    off_domain   another kind of data: does the model forget what it could do before?

All data is on the machine already: it comes with Python, scikit-learn or Babel, was written for this project, or is
generated. The modules in reading order:

    digits       handwritten digits, for small nets
    planted      a hidden update of known rank, for small nets
    python_docs  docs: next tokens of Python's manual
    instruction  questions and answers: your own, from_pairs, from_jsonl, from_text
    datasets     summarise, translate, sentiment, style; tweets, an optional extra
    generate     what a model answers
    metrics      what a person understands: scores, baselines
"""

import lazy_loader

from lora_lab.system.renamed import renamed
from lora_lab.task import IGNORE, Examples, Loss, Task, TextTokenizer, cross_entropy, mean_squared_error
from lora_lab.tasks.datasets import sentiment, style, summarise, translate, tweets
from lora_lab.tasks.digits import digits
from lora_lab.tasks.instruction import Pair, PairTask, from_jsonl, from_pairs, from_text
from lora_lab.tasks.planted import planted
from lora_lab.tasks.python_docs import docs

__all__ = [
    "IGNORE",
    "Examples",
    "Loss",
    "Pair",
    "PairTask",
    "Task",
    "TextTokenizer",
    "cross_entropy",
    "digits",
    "docs",
    "from_jsonl",
    "from_pairs",
    "from_text",
    "mean_squared_error",
    "planted",
    "sentiment",
    "style",
    "summarise",
    "translate",
    "tweets",
]

_lazy, _, _ = lazy_loader.attach(__name__, ["generate", "metrics"])  # the other files are loaded already
__getattr__ = renamed(__name__, {"Encoder": "TextTokenizer"}, _lazy)
