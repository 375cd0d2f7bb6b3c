"""Write answers.md, commands.md and what pages quote from records and lessons between ``<!-- numbers: memory -->``.

    python docs/generate.py    # after a new record or option, or another title or other minutes of a lesson

A test asks that this changes nothing.
"""

import argparse
import inspect
import re
import textwrap
from collections import Counter
from itertools import count
from pathlib import Path
from textwrap import fill as wrap
from typing import NamedTuple

import nbformat

from lora_lab import records
from lora_lab.ablation.stats import best_rate, losses_by_rate, ratio_interval, sample_vertices
from lora_lab.cli import COMMANDS, add_options
from lora_lab.course.exercise import TIME
from lora_lab.studies import answers

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MIB = 2**20
SETUPS = {  # of the record of memory -> as people call them
    "full": "full fine-tuning",
    "full, checkpointing": "full fine-tuning, checkpointing",
    "LoRA r=8": "LoRA r=8",
    "LoRA-FA r=8": "LoRA-FA r=8",
    "LoRA r=8, NF4 base": "LoRA r=8, base in NF4",
    "LoRA r=8, bf16": "LoRA r=8, base in bfloat16",
    "LoRA r=8, checkpointing": "LoRA r=8, checkpointing",
    "LoRA r=8, lean, checkpointing": "LoRA r=8, lean and checkpointing",
}


def rewrite(page: str) -> str:
    """Return a page with its blocks written anew."""
    return BLOCK.sub(lambda block: f"{block[1]}{WRITERS[block[2]]()}\n{block[3]}", page)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def origin(record: records.Record) -> str:
    """Return the machine and day of a record in words."""
    cores, threads = re.search(r"(\d+) logical cores, (\d+) torch threads", record.facts["cpu"]).groups()
    name = record.device.replace("(R)", "").split(",")[0]
    return f"{name}, {cores} cores, {threads} threads, {record.date}"


def write_memory() -> str:
    """Return the bill of SmolLM2's step beside the measurement, and how far off all bills are."""
    (record,) = records.load_all("memory").values()
    frame = record.frame()
    steps = frame[(frame.model == "smollm2-135m") & (frame.batch == 2) & (frame.length == 128)].set_index("setup")
    columns = ["predicted_bytes", "measured_bytes", "process_bytes"]
    rows = [[SETUPS[name], *(f"{steps.loc[name, each] / MIB:,.0f}" for each in columns)] for name in SETUPS]
    bills = table(["one step of SmolLM2-135M, 2 x 128 tokens, MiB", "predicted", "measured", "whole process"], rows)
    off = 100 * (frame.predicted_bytes / frame.measured_bytes - 1).abs()
    process = 100 * (frame.process_bytes / frame.measured_bytes - 1).abs()[frame.model == "smollm2-135m"].max()
    said = (
        f"({origin(record)}; a heap that returns freed memory, `MALLOC_MMAP_THRESHOLD_=262144`.) "
        f"Of {len(frame)} setups on {frame.model.nunique()} sizes of model {(off < 0.04).sum()} bills are "
        f"within 0.04 %; the worst is {off.max():.1f} % off, where a bfloat16 product on the CPU takes scratch memory. "
        f"The whole process is within {process:.1f} % of the bill."
    )
    return f"{bills}\n\n{wrap(said, 120)}"


def write_speed() -> str:
    """Return predicted and measured ratios of SmolLM2's step, and how often the prediction is right."""
    (record,) = records.load_all("speed").values()
    frame = record.frame()
    steps = frame[(frame.model == "smollm2-135m") & (frame.setup == "LoRA r=8")]
    rows = []
    for step in steps.itertuples():
        interval = re.search(r"[\d.]+ to [\d.]+", step.verdict)
        ratios = [f"{step.predicted_ratio:.2f}", f"{step.ratio:.2f}"]
        rows.append([f"{step.batch} x {step.length} tokens", *ratios, interval[0] if interval else "too few rounds"])
    title = "LoRA r=8 on SmolLM2-135M: time of a step over full fine-tuning's"
    ratios = table([title, "predicted", "measured", "95 % interval"], rows)
    others = frame[frame.setup != "full"]
    off = 100 * (others.predicted_ratio / others.ratio - 1).abs()
    decided = others[others.verdict.str.match("faster|slower")]
    agrees = ((decided.predicted_ratio < 1) == (decided.ratio < 1)).sum()
    said = (
        f"({origin(record)}; a heap without settings.) {(off <= 15).sum()} of {len(others)} ratios are within 15 %, "
        f"the worst is {off.max():.0f} % off, at {others.tokens[off.idxmax()]} tokens. "
        f"In {len(decided)} the measurement decides which method is faster, and the prediction agrees in {agrees}."
    )
    return f"{ratios}\n\n{wrap(said, 120)}"


def write_rates() -> str:
    """Return how far LoRA's best rates on SmolLM2 are above full fine-tuning's."""
    (record,) = records.load_all("rates").values()
    frame = record.frame().query("data == 'docs'")
    losses = {setup: losses_by_rate(rows) for setup, rows in frame.groupby("setup")}
    full = best_rate(losses["full"]).vertex
    samples = sample_vertices(losses["full"])

    def times(rank: int, alpha: str) -> tuple[float, float, float]:
        rows = losses[f"r={rank}, alpha = {alpha}"]
        return best_rate(rows).vertex / full, *ratio_interval(sample_vertices(rows), samples)

    fixed = [times(rank, "32") for rank in (1, 2, 4, 8, 16, 32, 64)]
    lowest, highest = min(each[0] for each in fixed), max(each[0] for each in fixed)
    below, above = min(each[1] for each in fixed), max(each[2] for each in fixed)
    one, most = times(1, "2r"), times(64, "2r")
    said = (
        f"With alpha = 32, after 60 steps, the best rate was {lowest:.0f} to {highest:.0f} times full fine-tuning's "
        f"at all ranks from 1 to 64 (intervals from {below:.0f} to {above:.0f}). "
        f"With alpha = 2r it was {one[0]:.0f} times at rank 1 ({one[1]:.0f} to {one[2]:.0f}) "
        f"and {most[0]:.0f} times at rank 64 ({most[1]:.0f} to {most[2]:.0f}). These "
        "intervals rest on three seeds and a parabola, and are too narrow."
    )
    return wrap(said, 120)


def lessons() -> list[Path]:
    """Return the lessons in order."""
    return sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def read_start(path: Path) -> dict[str, str]:
    """Return what the first cell of a lesson states: its title, what it needs, and its minutes."""
    text = nbformat.read(path, as_version=4).cells[0].source
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)  # without links
    pattern = (
        r"# (?P<title>[^\n]+)\n.*\*\*Before\*\* (?:this lesson,? )?(?P<needs>.+) "
        r"\*\*Time\*\* about (?P<yours>\d+) minutes for you, about (?P<machines>[\d½¾]+)"
    )
    title, _, rest = text.partition("\n")
    return re.match(pattern, f"{title}\n{' '.join(rest.split())}").groupdict()


class Reading(NamedTuple):
    """What there is to read and to do in a lesson; ``Going deeper`` counts in ``all_words`` alone.

    Attributes:
        words: on the main path, of texts and of sentences that are computed, without exercises, tables and folds.
        all_words: the same with what goes deeper.
        exercise_words: of the statements of exercises.
        printed: words that cells print, all of them.
        figures: on the main path.
        exercises: their minutes, on the main path.
    """

    words: int
    all_words: int
    exercise_words: int
    printed: int
    figures: int
    exercises: int

    @property
    def minutes(self) -> int:
        """Minutes for a reader, to the nearest five: 150 words in each, half a one for a figure, and the exercises."""
        return 5 * max(1, round((self.words / 150 + self.figures / 2 + self.exercises) / 5))


FOLD = re.compile(r"<details>.*?</details>", re.DOTALL)
TABLE = re.compile(r"^\|.*$", re.MULTILINE)
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)


def read_lesson(path: Path) -> Reading:
    """Return what there is to read and to do in a lesson."""
    counts: Counter[str] = Counter()
    depth = 0  # of the heading that goes deeper, while below it
    for cell in nbformat.read(path, as_version=4).cells:
        outputs = cell.get("outputs", [])
        texts = [each.get("text") or each.get("data", {}).get("text/markdown", "") for each in outputs]
        printed = sum(len(text.split()) for text in texts)
        counts["printed"] += printed
        counts["all_words"] += printed
        counts["words"] += printed * (depth == 0)
        counts["figures"] += sum("image/png" in each.get("data", {}) for each in outputs) * (depth == 0)
        if cell.cell_type == "code":
            continue
        for text in re.split(r"^(?=#+ )", TABLE.sub("", FOLD.sub("", cell.source)), flags=re.MULTILINE):
            if heading := HEADING.match(text):
                level = len(heading[1])
                depth = level if heading[2].startswith("Going deeper") else depth if level > depth else 0
            words = len(text.split())
            if minutes := TIME.search(text):
                counts["exercise_words"] += words
                counts["exercises"] += int(minutes[1]) * (depth == 0)
            else:
                counts["all_words"] += words
                counts["words"] += words * (depth == 0)
    return Reading(**{name: counts[name] for name in Reading._fields})


def write_lessons() -> str:
    """Return each lesson with its question and minutes."""
    header = ["lesson", "question", "minutes for you", "minutes of computing, on 2 cores"]
    rows = []
    for path in lessons():
        start = read_start(path)
        rows.append([f"[{path.stem}](notebooks/{path.name})", start["title"], start["yours"], start["machines"]])
    return table(header, rows)


def write_plan() -> str:
    """Return each lesson with what it needs, its minutes, and what it does on a GPU."""
    header = ["lesson", "before", "minutes for a student", "minutes of computing, on 2 cores", "on a GPU"]
    rows = []
    for path in lessons():
        start = read_start(path)
        needs = start["needs"][0].upper() + start["needs"][1:].rstrip(".")
        further = "goes further" if "device.effort()" in path.read_text(encoding="utf-8") else "the same"
        rows.append([f"[{path.stem}](../notebooks/{path.name})", needs, start["yours"], start["machines"], further])
    return table(header, rows)


RECALL = re.compile(r"^## (?:What you take home|Recall)$.*", re.MULTILINE | re.DOTALL)
QUESTION = re.compile(r"<details>\s*<summary>([^<]+[?.])</summary>\s*(.+?)\s*</details>", re.DOTALL)


def write_quiz() -> str:
    """Return the questions at the ends of lessons, numbered through, and then the answers."""
    questions, answers, numbers = [], [], count(1)
    for path in lessons():
        cells = nbformat.read(path, as_version=4).cells
        end = RECALL.search("\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown"))
        if found := QUESTION.findall(end[0]) if end else []:
            heading = f"Lesson {path.stem.partition('_')[0]}: {read_start(path)['title']}"
            questions.append(f"## {heading}")
            answers.append(f"**{heading}**")
        for question, answer in found:
            number = next(numbers)
            questions.append(f"{number}. {' '.join(question.split())}")
            answers.append(f"{number}. {' '.join(answer.split())}")
    return "\n\n".join([*questions, "## Answers", *answers])


WRITERS = {
    "memory": write_memory,
    "speed": write_speed,
    "rates": write_rates,
    "lessons": write_lessons,
    "plan": write_plan,
    "quiz": write_quiz,
}


def write_commands() -> str:
    """Return the page of commands, from the functions behind them."""
    parts = [COMMANDS_INTRODUCTION]
    for name, function in COMMANDS.items():
        doc = inspect.getdoc(function)
        summary, *rest = re.split(r"^(Args|Returns):\n", doc, flags=re.MULTILINE)
        sentence, _, examples = summary.partition("\n\n")
        sections = dict(zip(rest[::2], rest[1::2], strict=True))
        parts.append(f"## {name}\n\n{sentence}\n\n```sh\n{textwrap.dedent(examples).strip()}\n```")
        parser = argparse.ArgumentParser(name, add_help=False)
        add_options(parser, function)
        options = [action for action in parser._actions if action.dest != "json"]
        if options:
            rows = [[f"`{(each.option_strings or [each.dest])[0]}`", each.help.replace("%%", "%")] for each in options]
            parts.append(table(["option", "meaning"], rows))
        if "Returns" in sections:
            parts.append(f"With `--json`: {' '.join(sections['Returns'].split()).replace('``', '`')}")
    return "\n\n".join(parts) + "\n"


COMMANDS_INTRODUCTION = """# How do I use LoRA from a terminal?

After an installation with `make`, `lora-lab` is in `.venv/bin`: run `. .venv/bin/activate` once in each new terminal.

With `--json` a command prints its result to standard output as one JSON document, and all else to standard error. Sizes
are in bytes, times in seconds, losses in nats or in the unit of the task's loss; `null` stands for what is unknown, not
asked for, or not a finite number. The exit status is 0, 1 after an error, 2 for wrong options, and 130 after Ctrl-C."""


def write_answers() -> str:
    """Return the page of answers.

    Raises:
        ValueError: a row of the ledger has another verdict than the one that an answer was written for.
    """
    parts = [ANSWERS_INTRODUCTION]
    for name, found in answers.load().items():
        if found.faults:
            raise ValueError(f"Read the answer {name!r} in answers.toml again: {'; '.join(found.faults)}.")
        answer, rows = found.answer, "; ".join(f"`{row}` {entry.verdict}" for row, entry in found.rows.items())
        path = Path(answer.link)
        shown = f"[lesson {path.stem.partition('_')[0]}](../{path})" if path.suffix == ".ipynb" else ""
        shown = shown or f"[{path.stem}]({answer.link.removeprefix('docs/')})"
        parts.append(f"## {answer.question}\n\n**{answer.answer}** {found.dots}".rstrip())
        lines = [found.number, f"{answer.do} More: {shown}.", *([f"({rows})"] if rows else [])]
        parts += [wrap(line, 120, break_on_hyphens=False, break_long_words=False) for line in lines]
    return "\n\n".join([*parts, ANSWERS_END])


ANSWERS_INTRODUCTION = """# Which rank, which rate, and is it worth it?

Each is one sentence, one number, what to do, and the rows of the ledger that carry it. `lora-lab answers rank` prints
one, `lora-lab claims ID` explains a row. "Here" is SmolLM2-135M on Python's manual, on two CPU cores, unless another
model is named.

| dots | where its rows were decided, for it or against it |
|---|---|
| ●○○ | small models, small matrices or a count; or published, and judged by that alone |
| ●●○ | SmolLM2-135M alone; or something smaller, and published at scale |
| ●●● | SmolLM2-135M, and published at scale |
| ○○○ | not settled here |

"Published at scale": published numbers decide a row, or one that stands is stated by a source that was read.

In brackets are bounds, each one-sided at 95 % or more; those of best learning rates are too narrow (three seeds). †: a
weaker rule decided ([which rules](claims.md))."""

ANSWERS_END = """## Why is LoRA not much faster with two threads of a CPU?

The frozen weights still take part in every step. Every token passes through them, and its gradient passes back through
them to the lowest adapter. LoRA skips the gradients of the frozen weights, up to a third of the arithmetic, and most of
the optimiser's work. [Lesson 05](../notebooks/05_speed.ipynb) counts and measures it.

## Why does LoRA not save more memory?

Gradients and AdamW's state belong to trained parameters, so at low ranks LoRA saves nearly all of both. The
weights stay, and so do the activations and logits of a step, since a frozen layer still keeps the input that its
adapter reads. [Lesson 04](../notebooks/04_memory.ipynb) breaks a step's memory down into its parts.

## Why does B start at zero, and A at random?

So that the adapted model starts as the pre-trained one and can still learn: in the first step only B has a gradient,
from the second on A has one too. If both were zero, neither would. [Lesson
03](../notebooks/03_lora_from_scratch.ipynb).

## Why is the update divided by the rank?

So that Adam's first step lowers the loss equally at every rank while alpha stays. [Lesson
03](../notebooks/03_lora_from_scratch.ipynb) derives it, and [lesson 12](../notebooks/12_which_rate.ipynb) measures how
the best rate moves with alpha.

## Can I take a merged adapter out again?

Not by subtracting it: because of rounding, the weights differ from those before. Keep the base, and switch adapters
instead; a switch leaves no trace. [Lesson 09](../notebooks/09_many_tasks.ipynb).

## My adapter does nothing. Why?

`ll.diagnose(model)` lists what is wrong with an adapted model. [Lesson 03](../notebooks/03_lora_from_scratch.ipynb) has
the usual mistakes as an exercise, and [the guide to the package](package.md) the rest.
"""


def rewritten() -> dict[Path, str]:
    """Return the text that each page should have."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {path: rewrite(path.read_text(encoding="utf-8")) for path in pages}
    return texts | {ROOT / "docs" / "commands.md": write_commands(), ROOT / "docs" / "answers.md": write_answers()}


if __name__ == "__main__":
    for path in lessons():
        reading = read_lesson(path)
        print(f"{path.stem:<22} {reading.minutes:>3} minutes", reading)
    for path, text in rewritten().items():
        path.write_text(text, encoding="utf-8")
