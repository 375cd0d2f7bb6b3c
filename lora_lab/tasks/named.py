"""A task for a language model by its name, or from a file: what the commands take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lora_lab.system.files import check_file
from lora_lab.task import Task
from lora_lab.tasks.datasets import LANGUAGES, sentiment, style, summarise, translate, tweets
from lora_lab.tasks.instruction import ChatTokenizer, from_jsonl, from_text
from lora_lab.tasks.python_docs import docs
from lora_lab.tasks.sentences import PROMPTS, sentences
from lora_lab.tasks.tables import TABLES, from_table

TASKS: dict[str, Callable[[ChatTokenizer], Task]] = {
    "docs": docs,
    "summarise": summarise,
    **{f"translate-{code}": partial(translate, language=code) for code in LANGUAGES},
    **{f"sentences-{target}": partial(sentences, target=target) for target in PROMPTS},
    "sentiment": sentiment,
    "tweets": tweets,
    "style": style,
    "style-plain": partial(style, variant="plain"),
}
READERS: dict[str, Callable[..., Task]] = {
    ".jsonl": from_jsonl,
    ".txt": from_text,
    **dict.fromkeys(TABLES, from_table),
}


def check_name(name: str) -> None:
    """Check that a name is in :data:`TASKS`, or is that of a file that may be read as a task, before a model is loaded.

    Raises:
        ValueError: it is neither.
        FileNotFoundError: there is no such file.
    """
    if name in TASKS:
        return
    if Path(name).suffix not in READERS:
        raise ValueError(
            f"task is {name!r}, but it must be one of {', '.join(TASKS)}, or a file whose name ends in one of "
            f"{', '.join(READERS)}."
        )
    check_file(name, "your examples")


def task_of(name: str, tokenizer: ChatTokenizer, allow_special: bool = False) -> Task:
    """A task by its name in :data:`TASKS`, or from a file of prompts and answers or of plain text.

    Args:
        name: of a task, or a path that ends in ``.jsonl``, ``.txt``, ``.csv``, ``.tsv`` or ``.parquet``.
        tokenizer: of the model.
        allow_special: as for :func:`lora_lab.tasks.from_text`, for a file of texts.

    Raises:
        ValueError: there is no such task, or the file cannot be read as one.
        FileNotFoundError: there is no such file.
    """
    check_name(name)
    if name in TASKS:
        return TASKS[name](tokenizer)
    reader = READERS[Path(name).suffix]
    return reader(tokenizer, name) if reader is from_table else reader(tokenizer, name, allow_special=allow_special)
