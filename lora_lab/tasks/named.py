"""A task for a language model by its name, or from a file of yours: what the commands take.

An example in JSON has one of these forms, and is recognised by its keys:

    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}
    {"conversations": [{"from": "system" | "human" | "gpt", "value": "..."}, ...]}      (ShareGPT)
    {"instruction": "...", "input": "...", "output": "..."}       (Alpaca; input may be missing or empty)
    {"prompt": "...", "answer" | "completion" | "response": "..."}
    {"question": "...", "answer": "..."}
    {"text": "..."}                                               (next-token prediction)

Beside them it may have "group" and "part".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.files import check_file
from lora_lab.system.schema import check
from lora_lab.system.wording import count_noun, short_repr, shortened
from lora_lab.task import Task
from lora_lab.tasks.datasets import LANGUAGES, sentiment, style, summarise, translate
from lora_lab.tasks.instruction import PARTS, Pair, PairTask, Turn, from_pairs
from lora_lab.tasks.python_docs import docs, text_task
from lora_lab.tasks.sentences import PROMPTS, sentences

if TYPE_CHECKING:
    from pandas import DataFrame

# Examples in JSON


def _require_content(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("empty", "it must not be empty")
    return text


# The keys of each; an entry has the first form whose keys it has.
_FORMS = (
    "messages; conversations; instruction and output; prompt and answer; prompt and completion; prompt and response; "
    "question and answer; text"
)
_KEYS = [form.split(" and ") for form in _FORMS.split("; ")]
_Text = Annotated[str, AfterValidator(_require_content)]
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's names


class _Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: _Text


_Said = TypedDict("_Said", {"from": Literal["system", "user", "assistant", "human", "gpt", "chatgpt"], "value": _Text})
_SCHEMAS = {  # of the keys whose value is no text
    "messages": list[_Message],
    "conversations": list[_Said],
    "input": str | None,
    "group": str | None,
    "part": Literal["", "train", "validation", "test"] | None,
}


class StoredExample(NamedTuple):
    """One example as a file has it.

    Args:
        content: a prompt and its answer, or a text for next-token prediction.
        part: "" if the entry does not name it.
        ignored: keys of the entry that are not part of its form.
    """

    content: Pair | str
    part: str = ""
    ignored: frozenset[str] = frozenset()


def parse(entry: Any) -> StoredExample:
    """Return the example in an entry of any of the forms: a line of JSON, or what it says.

    Raises:
        ValueError: what is wrong with it, in a few words.
    """
    if isinstance(entry, str):
        entry = _from_json(entry)
    check(entry, dict, "the line")
    form = _find_form(entry)
    known = _select_entries(form, entry)
    part = known.get("part") or ""
    ignored = frozenset(entry.keys() - known.keys())
    if form == ["text"]:
        return StoredExample(known["text"], part, ignored)
    *before, (_, prompt), (_, answer) = _turns(form, known)
    return StoredExample(Pair(prompt, answer, known.get("group") or "", tuple(before)), part, ignored)


def _from_json(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None


def _find_form(entry: dict[str, Any]) -> Sequence[str]:
    """Return the keys of the first form of which an entry has all keys."""
    for form in _KEYS:
        if entry.keys() >= {*form}:
            return form
    raise ValueError(f"has the keys {shortened(str(sorted(entry)), 80)}, but must have those of a form: {_FORMS}")


def _select_entries(form: Sequence[str], entry: dict[str, Any]) -> dict[str, Any]:
    """Return what an entry has of its form and of the keys that may stand beside it, if their values are right."""
    beside = ("input", "group", "part") if "instruction" in form else ("group", "part")
    keys = [key for key in (*form, *beside) if key in entry]
    return {key: check(entry[key], _SCHEMAS.get(key, _Text), key) for key in keys}


def _turns(form: Sequence[str], entry: dict[str, Any]) -> tuple[Turn, ...]:
    """Return the turns of an entry: perhaps a system turn, then user and assistant in turn, the assistant last."""
    match form:
        case ["messages"]:
            turns: list[Turn] = [(turn["role"], turn["content"]) for turn in entry["messages"]]
        case ["conversations"]:
            turns = [(_ROLES.get(turn["from"]) or turn["from"], turn["value"]) for turn in entry["conversations"]]
        case _:
            question, answer = (entry[key] for key in form)
            context = entry.get("input") or ""
            prompt = f"{question}\n\n{context}" if context.strip() else question
            turns = [("user", prompt), ("assistant", answer)]
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        said = f"the turns are of {shortened(', '.join(roles) or 'nobody', 80)}"
        raise ValueError(f"{said}, but must be of user and assistant in turn; only the first may be of the system")
    return tuple(turns)


# Files


def from_jsonl(tokenizer: Tokenizer, path: str | Path, *, allow_special: bool = False, **options: Any) -> Task:
    """Return a task from a file of JSON Lines, one example on each line, in any of the forms above.

    The task of texts is to predict the next token; all others are a :class:`PairTask`. Keys that are not part of a
    line's form are ignored, and named in ``about``.

    To decide the split yourself, give every line a "part" as well: "train", "validation" or "test". Lines of one
    "group" go to the same part.

    Args:
        tokenizer: of the model that will be trained.
        path: of the file; empty lines are skipped.
        allow_special: for a file of texts, as for :func:`from_text`.
        **options: name and about, which by default name the file; and of a file of texts seq_len, as for
            :func:`from_text`, of any other the options of :func:`from_pairs`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: lines are malformed (the first five are named, each with its reason), some are texts and others
            not, or as for :func:`from_pairs`.
        TypeError: an option does not apply to the form of the lines.
    """
    check_file(path, "a JSON Lines file")
    lines = [(number, line) for number, line in enumerate(_read_lines(path), start=1) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("["):
        raise ValueError(f"{path} holds a JSON array; write one example per line, without brackets and commas.")
    return _make_task(tokenizer, str(path), "line", lines, options, allow_special)


def from_table(
    tokenizer: Tokenizer, table: Any, *, prompt: str = "prompt", answer: str = "answer", **options: Any
) -> PairTask:
    """Return a task of prompts and answers from two columns of a table.

    Columns "group" and "part" mean what these entries mean in :func:`from_jsonl`; others are ignored.

    Args:
        tokenizer, **options: as for :func:`lora_lab.tasks.from_pairs`; the name defaults to that of the file.
        table: the path of a CSV, TSV or Parquet file (UTF-8; the first line names the columns), a pandas DataFrame, or
            a ``datasets.Dataset``.
        prompt, answer: names of the columns. Numbers in them become text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind or cannot be read, a column is missing, rows are malformed (the first
            five are named, each with its reason), or as for :func:`lora_lab.tasks.from_pairs`.
    """
    frame, name = _read_frame(table)
    columns = {"prompt": prompt, "answer": answer}
    for role, column in columns.items():
        if column not in frame.columns:
            names = shortened(str([*map(str, frame.columns)]))
            raise ValueError(f"{name} has no column {short_repr(column)}, but {names}; name the right one: {role}=...")
    columns |= {own: own for own in ("group", "part") if own in frame.columns}
    cells = frame[list(columns.values())].astype(object)
    cells = cells.where(cells.notna(), "")
    rows = (dict(zip(columns, map(str, row), strict=True)) for row in cells.itertuples(index=False))
    return cast(PairTask, _make_task(tokenizer, name, "row", enumerate(rows, start=1), options))


def from_text(tokenizer: Tokenizer, path: str | Path, *, seq_len: int = 128, allow_special: bool = False) -> Task:
    """Return the task of predicting the next token of a text file of your own.

    Paragraphs (separated by an empty line) stay whole: of every ten, the ninth goes to validation, the tenth to test.

    Args:
        tokenizer: of the model.
        path: of the file.
        seq_len: tokens per example.
        allow_special: whether the text may contain the special tokens that structure conversations or end a text, such
            as ``<|im_end|>``. They are then encoded as these tokens.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, holds a special token that is not allowed, or is too short for ``seq_len``.
    """
    check_file(path, "a text file")
    paragraphs = [text for text in "\n".join(_read_lines(path)).split("\n\n") if text.strip()]
    entries = enumerate(({"text": paragraph} for paragraph in paragraphs), start=1)
    return _make_task(tokenizer, str(path), "paragraph", entries, {"seq_len": seq_len}, allow_special)


def _read_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file. Unlike those of ``str.splitlines`` none ends at U+2028, which JSON may hold."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); unpack it, or save it as UTF-8.") from None
    if "\0" in text:
        raise ValueError(f"{path} is no text, because it holds zero bytes; save it as UTF-8.")
    return text.split("\n")


def _read_frame(table: Any) -> tuple[DataFrame, str]:
    """Return a DataFrame, and what to call it."""
    import pandas

    if isinstance(table, pandas.DataFrame):
        return table, "table"
    if hasattr(table, "to_pandas"):  # as a Dataset of the datasets library has
        return table.to_pandas(), "dataset"
    path = Path(table)
    if path.suffix not in TABLES:
        raise ValueError(f"{shortened(str(path))} is no table; its name must end in one of {', '.join(TABLES)}.")
    check_file(path, "a table")
    try:
        if path.suffix == ".parquet":
            return pandas.read_parquet(path), path.name
        separator = "," if path.suffix == ".csv" else "\t"
        return pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig"), path.name
    except (ImportError, ValueError, OSError) as error:  # without pyarrow, or of its format and pandas'
        raise ValueError(f"{path} cannot be read as a table: {shortened(str(error))}") from None


def _make_task(
    tokenizer: Tokenizer,
    name: str,
    unit: str,
    entries: Iterable[tuple[int, Any]],
    options: dict[str, Any],
    allow_special: bool = False,
) -> Task:
    """Return the task of what stands in a file or table: of its texts, or of its prompts and answers.

    Texts stay whole: of every ten, the ninth goes to validation, the tenth to test.

    Args:
        name: the path of the file, or "table".
        unit: "line", "row" or "paragraph".
        entries: the number of each, and what stands there.
        options: of the task; name and about have defaults.
        allow_special: whether texts may hold special tokens.
    """
    stored = _read(tokenizer, name, unit, entries, allow_special)
    about = f"from {Path(name).name}"
    if ignored := sorted(set().union(*(example.ignored for example in stored))):
        about += f", without its entries {shortened(', '.join(map(repr, ignored)))}"
    options = {"name": Path(name).stem, "about": about} | options
    texts = [example.content for example in stored if isinstance(example.content, str)]
    if 0 < len(texts) < len(stored):
        raise ValueError(f"{name} has {len(texts)} texts and {len(stored) - len(texts)} conversations; split them.")
    if texts:
        train = [text for i, text in enumerate(texts) if i % 10 < 8]
        try:
            return text_task(tokenizer, {"train": train, "validation": texts[8::10], "test": texts[9::10]}, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    pairs: Any = [example.content for example in stored]
    parts = [example.part for example in stored]
    if named := len(parts) - parts.count(""):
        if named < len(parts):
            raise ValueError(f'{name} has "part" on {named} of {len(parts)} examples; give it on all.')
        pairs = {part: [pair for pair, own in zip(pairs, parts, strict=True) if own == part] for part in PARTS}
    return from_pairs(tokenizer, pairs, **options)


def _read(
    tokenizer: Tokenizer, name: str, unit: str, entries: Iterable[tuple[int, Any]], allow_special: bool
) -> list[StoredExample]:
    """Return the examples, whose texts hold no special tokens; the arguments are those of :func:`_make_task`.

    Raises:
        ValueError: there are no entries, or some are malformed, of which the first five are named.
    """
    stored, problems = [], []
    for number, entry in entries:
        try:
            example = parse(entry)
            content = example.content
            texts = [content] if isinstance(content, str) else [content.context, content.answer]
            for text in texts:
                tokenizer.check_text(text, allow_special=allow_special and isinstance(content, str))
            stored.append(example)
        except ValueError as error:
            problems.append(f"{unit} {number}: {shortened(str(error), 250).removesuffix('.')}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{name} has {count_noun(len(problems), f'malformed {unit}')}: {shown}.")
    if not stored:
        raise ValueError(f"{name} is empty; write one example per {unit}.")
    return stored


# Names

TASKS = {
    "docs": docs,
    "summarise": summarise,
    **{f"translate-{code}": partial(translate, language=code) for code in LANGUAGES},
    **{f"sentences-{target}": partial(sentences, target=target) for target in PROMPTS},
    "sentiment": sentiment,
    "style": style,
    "style-plain": partial(style, variant="plain"),
}
TABLES = (".csv", ".tsv", ".parquet")  # files that from_table reads
READERS = {".jsonl": from_jsonl, ".txt": from_text, **dict.fromkeys(TABLES, from_table)}


def check_name(name: str, names: Iterable[str] = TASKS) -> None:
    """Check that a name is one of ``names``, or that of a file to read as a task, before a model is loaded.

    Raises:
        ValueError: it is neither.
        FileNotFoundError: there is no such file.
    """
    if name in names:
        return
    if Path(name).suffix not in READERS:
        raise ValueError(
            f"task is {name!r}, but it must be one of {', '.join(names)}, or a file whose name ends in one of "
            f"{', '.join(READERS)}."
        )
    check_file(name, "your examples")


def task_of(name: str, tokenizer: Tokenizer, allow_special: bool = False) -> Task:
    """Return a task by its name in :data:`TASKS`, or from a file of prompts and answers or of plain text.

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
