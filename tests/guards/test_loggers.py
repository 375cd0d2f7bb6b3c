"""The recipe of docs/package.md for a logger writes every number of the history, as TensorBoard reads it."""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lora_lab
from lora_lab import fit
from lora_lab.history import COLUMNS
from lora_lab.models.digits import DigitsMLP
from tests.helpers import ROOT, small_task


def test_tensorboard_shows_every_number_of_the_history(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "package.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```python\n(from torch.utils.tensorboard.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    histories = []
    monkeypatch.setattr(lora_lab, "fit", lambda *a, **o: histories.append(fit(*a, **o)) or histories[-1])
    monkeypatch.chdir(tmp_path)
    exec(recipe, {"ll": lora_lab, "model": DigitsMLP(), "task": small_task()})
    (history,) = histories
    events = EventAccumulator(str(tmp_path / "runs" / "board")).Reload()
    logged = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert logged.keys() == set(COLUMNS) - {"step"}
    for name, values in logged.items():
        steps, expected = history.curve(name)
        assert list(values) == steps, name
        assert list(values.values()) == pytest.approx(expected, rel=1e-6), name  # TensorBoard stores float32
    assert logged["validation_loss"] != pytest.approx(logged["off_domain_loss"])
