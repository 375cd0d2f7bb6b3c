"""What ``docs/generate.py`` writes, and each message that a page quotes, is right; lessons agree with their records."""

import ast
import json
import re
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lora_lab import DoRA, LoRA, LoRAFA, LoRAPlus, PiSSA, RsLoRA, records
from lora_lab.ablation import overfitting
from lora_lab.models.digits import DigitsMLP
from lora_lab.studies.claims import verdict
from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "docs"))  # a script, which is no package
import generate


@pytest.fixture(scope="module")
def rewritten():
    return generate.rewritten()


def test_pages_quote_what_records_lessons_and_commands_say(rewritten):
    stale = [path.name for path, text in rewritten.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python docs/generate.py"


def test_each_writer_writes_somewhere_and_a_changed_number_is_noticed(rewritten):
    pages = "\n".join(rewritten.values())
    assert set(re.findall(r"<!-- numbers: (\w+) -->", pages)) == set(generate.WRITERS)
    (costs,) = (text for path, text in rewritten.items() if path.name == "costs.md")
    assert generate.rewrite(costs.replace("| 980 |", "| 990 |")) == costs


def test_minutes_count_words_figures_and_exercises_of_the_main_path(tmp_path):
    figure = new_output("display_data", {"image/png": "", "text/plain": "A line."})
    said = new_output("display_data", {"text/markdown": "word " * 50})
    fold, rows = f"<details><summary>Why?</summary>{'fold ' * 300}</details>", "| a | b |\n| --- | --- |\n"
    cells = [
        new_markdown_cell(f"# {'word ' * 398}\n\n{fold}\n\n{rows}"),  # 399 words, with the sign of the heading
        new_code_cell("1", outputs=[figure, said, figure]),
        new_markdown_cell(f"### Exercise: One\n\n**Core**, importance ●●●, about 9 minutes. {'task ' * 200}"),
        new_markdown_cell(f"## Going deeper\n\n{'deep ' * 700}"),
        new_code_cell("2", outputs=[figure]),
        new_markdown_cell("## What you take home"),  # 5 words, with the signs
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "lesson.ipynb")
    found = generate.read_lesson(tmp_path / "lesson.ipynb")
    assert (found.words, found.printed, found.figures, found.exercises) == (399 + 50 + 5, 50, 2, 9)
    assert found.all_words == found.words + 703
    assert found.minutes == 15  # 3 for the words, 1 for the figures, 9 for the exercise
    assert found._replace(exercises=29).minutes == 35


def texts_in(path):
    """The texts in a source file but its docstrings, with {} for each value that is filled in."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value


def test_the_messages_that_the_page_of_errors_quotes_are_the_packages():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `(.+?)` \|", page[page.index("## The errors that people meet") :], re.MULTILINE)
    said = "\n".join(text for path in (ROOT / "lora_lab").rglob("*.py") for text in texts_in(path))
    assert len(quoted) > 10
    assert [message for message in quoted if message not in said] == []


def cells_of(name):
    return json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_ledger_refutes_of_the_times_what_the_intervals_of_the_record_refute():
    (record,) = records.load_all("speed").values()
    frame = record.frame()
    steps = frame[(frame.model == "small") & (frame.tokens >= 512)].set_index(["setup", "tokens"])
    lora, full = steps.loc["LoRA r=8"], steps.loc["full"]
    lowest = lora.verdict.str.extract(r"([\d.]+) to")[0].astype(float)
    refuted = (lowest > lora.flops / full.flops).all()
    assert (verdict("time-ratio-is-flop-ratio").result.verdict in {"depends", "falls"}) == refuted


def test_the_ledger_decides_on_overfitting_only_what_every_stopping_point_and_training_loss_shows():
    (record,) = records.load_all("overfitting").values()
    frame = record.frame().query("stage == 'judging' and schedule == 'constant'")
    by_step, by_loss = overfitting.by_stopping_point(frame), overfitting.by_training_loss(frame, [3, 2, 1.5])
    risen = by_step[(by_step.lower != 0) | (by_step.upper != 0)]
    assert frame.edge.eq("").all()
    expected = "depends" if {"less", "more"} <= {*risen.verdict, *by_loss.verdict} else "open"
    assert verdict("lora-overfits-less").result.verdict == expected
    fit = "depends" if {"less", "more"} <= {*by_loss.verdict} else "falls" if "more" in {*by_loss.verdict} else "open"
    assert verdict("better-at-equal-fit").result.verdict == fit


def test_lesson_10_knows_the_effective_rates_of_B():
    """The factor in front of B A beside LoRA's, times the factor of B's learning rate: what methods are compared by."""
    code = "\n".join("".join(cell["source"]) for cell in cells_of("10_variants"))
    (stated,) = re.findall(r"^TIMES = (\{.*\})$", code, re.MULTILINE)
    methods = {"LoRA": LoRA(4, 8), "rsLoRA": RsLoRA(4, 8), "LoRA+": LoRAPlus(4, 8, ratio=4), "LoRA-FA": LoRAFA(4, 8)}
    methods |= {"PiSSA": PiSSA(4, 8), "DoRA": DoRA(4, 8)}
    times = {}
    for name, method in methods.items():
        method.prepare(net := DigitsMLP(width=16), seed=0)
        times[name] = net.hidden1.scaling / 2 * max(group.get("lr_factor", 1) for group in method.groups(net))
    assert json.loads(stated) == times
