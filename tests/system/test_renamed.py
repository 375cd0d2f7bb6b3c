"""Old names of what has changed: still accepted, with a warning that gives the new name."""

import json
from dataclasses import asdict

import pytest
import torch

import lora_lab as ll
from lora_lab import records
from lora_lab.ablation import studies
from lora_lab.models.digits import DigitsMLP
from lora_lab.studies.registry import NAMES, current_name
from lora_lab.system.renamed import renamed

OLD = {
    "costs.memory_report.ways": "costs.memory_report.training_setups",
    "lean.InThreads": "lean.ThreadedStep",
    "lean.rewire": "lean.apply_lean",
    "models.shapes.shape": "models.shapes.config",
    "plots.after_cuts": "plots.after_truncation",
    "plots.looks": "plots.line_styles",
    "plots.undominated": "plots.pareto_front",
    "tasks.generate.choices": "tasks.generate.most_likely_labels",
    "tasks.Encoder": "tasks.TextTokenizer",
}


def get(name):
    found = ll
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("old", "new"), OLD.items())
def test_an_old_name_is_the_new_one_and_warns(old, new):
    with pytest.warns(DeprecationWarning, match=rf"lora_lab\.{old} is now called lora_lab\.{new}") as caught:
        value = get(old)
    assert value is get(new)
    assert len(caught) == 1
    assert caught[0].filename == __file__.replace(".pyc", ".py")  # whoever asked, not this package


def test_a_name_that_never_was_is_no_attribute():
    with pytest.raises(AttributeError, match=r"module 'lora_lab.models.shapes' has no attribute 'shapes'"):
        ll.models.shapes.shapes  # noqa: B018
    with pytest.raises(AttributeError):
        ll.ablation.summaries  # noqa: B018
    assert ll.ablation.overfitting.compare_over_rates  # the face still loads its other files when asked


def test_other_names_are_left_to_the_modules_own_getattr():
    assert renamed("somewhere", {}, str.upper)("name") == "NAME"


def test_a_style_was_told():
    tokenizer = ll.load_pretrained(ll.models.pretrained.SMOLLM2)[1]
    with pytest.warns(DeprecationWarning, match="told"):
        old = ll.tasks.style(tokenizer, told="plain")
    assert old.fingerprint == ll.tasks.style(tokenizer, "plain").fingerprint != ll.tasks.style(tokenizer).fingerprint


def test_the_record_was_called_trades():
    with pytest.warns(FutureWarning, match="'trades' is now called 'downstream'"):
        assert current_name("trades") == "downstream"
    assert [current_name(name) for name in NAMES] == list(NAMES)
    assert "trades" not in NAMES


def test_an_old_record_is_read_under_the_names_of_today(tmp_path):
    rows = [{"way": "full", "wanted": "good", "said": "bad", "seed": 0, "test_loss": 0.5}]
    written = asdict(records.new("downstream", rows, {"ways": {"full": {}}}, "a test", torch.device("cpu"), "unknown"))
    path = tmp_path / "cpu-trades.json"
    path.write_text(json.dumps(written | {"what": "trades"}), encoding="utf-8")
    record = records.load(path)
    assert record.what == "downstream"
    assert record.rows == [{"setup": "full", "reference": "good", "prediction": "bad", "seed": 0, "test_loss": 0.5}]
    assert record.settings == {"setups": {"full": {}}}
    assert records.load_all("downstream", tmp_path) == {"cpu-trades": record}
    assert records.load_all("trades", tmp_path) == {}


def test_the_words_of_other_records_are_their_own(tmp_path):
    record = records.new("memory", [{"way": "full"}], {"ways": 1}, "a test", torch.device("cpu"), "unknown")
    assert records.load(records.write(record, tmp_path)).rows == [{"way": "full"}]


def test_studies_by_their_new_names_are_of_use():
    assert isinstance(studies.pretrained_digits(), DigitsMLP)
