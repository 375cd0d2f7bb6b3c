"""The adapters that are installed with lora_lab: they fit the real model, and do what their README says."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from lora_lab import adapter_state, load_adapter, lora_layers, reply
from lora_lab.adapters import CONFIG, WEIGHTS, shipped, strength
from lora_lab.models.pretrained import SMOLLM2
from lora_lab.studies.downstream import scores
from lora_lab.tasks import TASKS
from lora_lab.tasks.generate import answers
from tests.helpers import ROOT

DATA = ROOT / "lora_lab" / "adapters" / "data"
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
README = (DATA / "README.md").read_text(encoding="utf-8")
ALL = pytest.mark.parametrize("name", NAMES)


def result(name):
    return json.loads((DATA / name / "result.json").read_text(encoding="utf-8"))


@ALL
def test_the_folder_holds_an_adapter_in_half_precision_of_at_most_1_3_mb(name):
    assert shipped(name) == DATA / name
    assert {path.name for path in shipped(name).iterdir()} == {CONFIG, WEIGHTS, "history.json", "result.json"}
    assert (DATA / name / WEIGHTS).stat().st_size < 1.3e6
    assert json.loads((DATA / name / CONFIG).read_text())["base_model_name_or_path"] == SMOLLM2
    tensors = load_file(DATA / name / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("name", ["lighthouse", "", "..", "README.md"])
def test_another_name_is_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=re.escape(f"{name!r}; choose one of {', '.join(NAMES)}")):
        shipped(name)


@ALL
def test_it_changes_the_real_model_and_at_strength_0_the_model_is_the_base(smollm2, name):
    base, tokenizer = smollm2
    model = copy.deepcopy(base)
    load_adapter(model, shipped(name))
    assert len(lora_layers(model)) == 210
    assert {value.dtype for key, value in adapter_state(model).items() if "lora_" in key} == {torch.float32}
    ids = torch.tensor([tokenizer.encode("Tell a story about a lost umbrella.")])
    with torch.no_grad():
        expected, adapted = base(ids), model(ids)
        with strength(model, 0):
            assert torch.equal(model(ids), expected)
    assert (adapted - expected).abs().max() > 1


@pytest.mark.slow
def test_the_keepers_story_is_in_the_style_where_the_base_writes_another(smollm2):
    """The beginning of one story, with the settings that the README recommends."""
    base, tokenizer = smollm2
    model, task = copy.deepcopy(base), TASKS["style"](tokenizer)
    load_adapter(model, shipped("lighthouse-keeper"))
    (line,) = re.findall(r"^ +ll\.reply\(model, tokenizer, prompt, (.*)\)$", README, flags=re.MULTILINE)
    options = {name: json.loads(value) for name, value in (option.split("=") for option in line.split(", "))}
    assert options["max_new_tokens"] == 130
    options["max_new_tokens"] = 40
    prompt = task.pairs["test"][0].prompt
    assert prompt not in {pair.prompt for pair in task.pairs["train"]}
    story = reply(model, tokenizer, prompt, **options)
    assert "watch. Wind" in story
    assert scores(task, [story]) == {"in_style": 1.0}
    with strength(model, 0):
        plain = reply(model, tokenizer, prompt, **options)
    assert scores(task, [plain]) == {"in_style": 0.0}


@pytest.mark.slow
def test_sentiments_answers_are_right_often_enough(smollm2):
    """On the first 12 of the 69 texts of which the README counts the right answers."""
    base, tokenizer = smollm2
    model, task = copy.deepcopy(base), TASKS["sentiment"](tokenizer)
    load_adapter(model, shipped("sentiment"))
    adapted = scores(task, answers(model, task, limit=12))["accuracy"]
    with strength(model, 0):
        plain = scores(task, answers(model, task, limit=12))["accuracy"]
    assert plain < 0.6 < 0.7 < adapted
    ((before, after),) = re.findall(r"^\| right answers, of 69 .* \| (\d+) \| (\d+) \|$", README, flags=re.MULTILINE)
    for when, count in (("before", before), ("after", after)):
        assert round(69 * result("sentiment")[when]["accuracy"]) == int(count)
