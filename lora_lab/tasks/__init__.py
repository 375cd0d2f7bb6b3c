"""What a model is trained on and judged by: data in four parts that do not leak into each other.

    train        what it learns from
    validation   the same kind of data, for choosing (rates, steps, ranks)
    test         the same kind of data, for the final verdict
    off_domain   another kind of data: does the model forget what it could do before?

All data is on the machine already: it comes with Python, scikit-learn or Babel, was written for this project, or is
generated. The modules in reading order:

    base      Task, Examples, losses
    nets      digits, planted: for small nets
    manual    docs: next tokens of Python's manual
    pairs     questions and answers: your own, from_pairs, from_jsonl, from_text
    trades    summarise, translate, sentiment, style; tweets, an optional extra
    scores    what a person understands: answers, metrics, baselines
"""

from lora_lab.tasks.base import IGNORE, Encoder, Examples, Loss, Task, cross_entropy, mean_squared_error
from lora_lab.tasks.manual import docs
from lora_lab.tasks.nets import digits, planted
from lora_lab.tasks.pairs import Pair, PairTask, from_jsonl, from_pairs, from_text
from lora_lab.tasks.trades import sentiment, style, summarise, translate, tweets

__all__ = [
    "IGNORE",
    "Encoder",
    "Examples",
    "Loss",
    "Pair",
    "PairTask",
    "Task",
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
