"""The recipes of docs/loggers.md: TensorBoard's runs for real, as it stands; the others without their packages.

In place of a package that is not installed stands a mock, which records what the recipe calls it with; what the recipe
calls of lora_lab is held against lora_lab itself.
"""

import ast
import inspect
import re
import sys
from dataclasses import fields
from unittest.mock import MagicMock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lora_lab
from lora_lab import LoRA, TrainConfig, fit
from lora_lab.history import COLUMNS
from lora_lab.models.digits import DigitsMLP
from tests.helpers import ROOT, small_task

PAGE = (ROOT / "docs" / "loggers.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)$.*?^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE))


def execute(title):
    exec(compile(RECIPES[title], f"docs/loggers.md: {title}", "exec"), {"__name__": "__main__"})


def test_there_are_four_recipes_of_at_most_ten_lines():
    assert list(RECIPES) == ["TensorBoard", "MLflow", "Weights & Biases", "Trackio"]
    assert PAGE.count("```python") == len(RECIPES)
    for title, code in RECIPES.items():
        assert 5 < sum(bool(line.strip()) for line in code.splitlines()) <= 10, title
        assert max(map(len, code.splitlines())) <= 120, title


@pytest.mark.usefixtures("tiny_smollm2")
def test_tensorboard_shows_every_number_of_the_history(tmp_path, monkeypatch):
    histories = []
    monkeypatch.setattr(lora_lab, "fit", lambda *a, **o: histories.append(fit(*a, **o)) or histories[-1])
    monkeypatch.chdir(tmp_path)
    execute("TensorBoard")
    (history,) = histories
    events = EventAccumulator(str(tmp_path / "runs" / "board")).Reload()
    logged = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert logged.keys() == set(COLUMNS) - {"step"}
    for name, values in logged.items():
        steps, expected = history.curve(name)
        assert list(values) == steps, name
        assert list(values.values()) == pytest.approx(expected, rel=1e-6), name  # TensorBoard stores float32
    assert list(logged["train_loss"]) == list(range(1, 41))
    assert len(logged["validation_loss"]) == 11
    assert len({*logged["train_loss"].values()}) > 30
    assert logged["validation_loss"] != pytest.approx(logged["off_domain_loss"])


OTHERS = {
    "MLflow": ("mlflow", lambda package: package.log_metrics, "metrics"),
    "Weights & Biases": ("wandb", lambda package: package.init.return_value.__enter__.return_value.log, 0),
    "Trackio": ("trackio", lambda package: package.log, 0),
}


@pytest.mark.parametrize("title", OTHERS)
def test_another_recipe_passes_each_row_on_without_what_is_none(title, monkeypatch):
    rows = []

    def short_fit(model, task, method, *, on_row, **options):
        def both(row):
            rows.append(dict(row))
            on_row(row)

        return fit(DigitsMLP(), small_task(), LoRA(2), steps=3, eval_every=2, batch_size=4, lr=1e-2, on_row=both)

    name, call, metrics = OTHERS[title]
    package = MagicMock()
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(lora_lab, "fit", short_fit)
    monkeypatch.setattr(lora_lab, "load_pretrained", lambda: (None, None))
    monkeypatch.setattr(lora_lab.tasks, "docs", lambda *_, **__: None)
    execute(title)
    calls = call(package).call_args_list
    assert [each.kwargs["step"] for each in calls] == [0, 1, 2, 3]
    for each, row in zip(calls, rows, strict=True):
        passed = each.args[metrics] if metrics == 0 else each.kwargs[metrics]
        assert passed == {key: value for key, value in row.items() if key != "step" and value is not None}
    assert "train_loss" not in (calls[0].args[metrics] if metrics == 0 else calls[0].kwargs[metrics])


def resolved(node):
    """What an expression such as ll.tasks.docs refers to, or None if it begins with another name than ll."""
    if isinstance(node, ast.Name):
        return lora_lab if node.id == "ll" else None
    return None if (value := resolved(node.value)) is None else getattr(value, node.attr)


@pytest.mark.parametrize("title", RECIPES)
def test_what_a_recipe_calls_of_lora_lab_exists_and_takes_these_arguments(title):
    options = {field.name for field in fields(TrainConfig)}
    names = []
    for node in ast.walk(ast.parse(RECIPES[title])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            root = ast.unparse(node.func).partition(".")[0]
            if root == "ll" and (function := resolved(node.func)) is not None:
                keywords = dict.fromkeys(keyword.arg for keyword in node.keywords)
                signature = inspect.signature(function)
                signature.bind(*node.args, **keywords)
                assert keywords.keys() <= options | signature.parameters.keys(), ast.unparse(node)
                names.append(node.func.attr)
    assert sorted(names) == ["LoRA", "docs", "fit", "load_pretrained"]
