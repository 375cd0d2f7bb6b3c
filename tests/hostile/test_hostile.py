"""A sample of the hostile cases ends as it should, and the harness would notice each bad end."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_lab import LoRAConfig
from lora_lab.models.llama import LlamaConfig
from lora_lab.system.files import read_json
from tests.helpers import ROOT

pytest.importorskip("resource", reason="Windows has neither its limits nor fork")
from tests.hostile import workers
from tests.hostile.core import BAD, OUTCOMES, Case
from tests.hostile.damage import damaged_bytes, damaged_json, safetensors_bytes, safetensors_parts
from tests.hostile.values import Values

CASES = 500


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """(target, outcome) -> the results of the sample, from a process that has no other threads."""
    path = tmp_path_factory.mktemp("hostile") / "results.jsonl"
    command = [sys.executable, "-m", "tests.hostile", "--cases", str(CASES), "--results", str(path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=600)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_sample_has_all_its_cases(sample):
    assert 0.98 * CASES < len(sample) < 1.02 * CASES
    assert {each["outcome"]["name"] for each in sample} >= {"accepted", "clean"}


@pytest.mark.parametrize("name", BAD)
def test_no_case_of_the_sample_ends_badly(sample, name):
    bad = [each for each in sample if each["outcome"]["name"] == name]
    assert not bad, "\n".join(
        f"python -m tests.hostile --target {each['target']} --case {each['number']}: {each['outcome']}" for each in bad
    )


# The harness itself

CONTENT = json.dumps({"hidden_size": 32, "rope_theta": 1e4, "names": ["a", {"b": None}], "tied": True})


@pytest.mark.parametrize("damage", [damaged_json, lambda content, rng, values: damaged_bytes(content.encode(), rng)])
def test_damage_is_the_same_for_a_seed_and_another_for_another(damage):
    values = Values(0)
    contents = [damage(CONTENT, random.Random(seed), values)[0] for seed in range(100)]
    assert contents == [damage(CONTENT, random.Random(seed), values)[0] for seed in range(100)]
    assert len(set(contents)) > 80
    assert sum(content == CONTENT.encode() for content in contents) < 5


def test_hypothesis_draws_other_values_for_another_seed():
    first, again, other = Values(0), Values(0), Values(1)
    assert (first.texts, repr(first.json)) == (again.texts, repr(again.json))
    assert first.texts != other.texts
    assert repr(first.json) != repr(other.json)


def test_an_undamaged_safetensors_header_is_put_together_again():
    content = safetensors_bytes({"__metadata__": {"a": "b"}, "x": {"shape": [2]}}, b"12345678")
    assert safetensors_parts(content) == ({"__metadata__": {"a": "b"}, "x": {"shape": [2]}}, b"12345678")


ENDS = {
    "accepted": Case("", int),
    "clean": Case("", lambda: LoRAConfig(rank=0)),
    "foreign": Case("", lambda: torch.ones(2, 3) @ torch.ones(2, 3)),
    "too long": Case("", lambda: read_json(Path("x" + 100 * ("/" + 15 * "y") + ".json"))),
    "wrong type": Case("", lambda: len(5), python=True),
    "crash": Case("", lambda: len(5)),
    "late": Case("", dict, lambda result: result["x"]),
    "hang": Case("", lambda: [None for _ in iter(int, 1)]),
    "memory": Case("", lambda: len(b"x" * (2**29 + 2**28))),
    "silent": Case("", int, lambda result: ["it is 0"]),
    "lost": Case("", int, lambda result: ["a file is gone"], complaint="lost"),
    "refused": Case("", lambda: LoRAConfig(rank=0), good=True),
}
OTHERS = {
    "a process that ends": ("memory", Case("", lambda: os._exit(3))),
    "more than there is": ("memory", Case("", lambda: torch.empty(2**40))),
    "an error that changes something": (
        "silent",
        Case("", lambda: LoRAConfig(0), after_error=lambda: ["other weights"]),
    ),
    "a sentence on first use": ("clean", Case("", int, lambda result: LoRAConfig(result))),
    "a foreign error on first use": ("late", Case("", int, lambda result: torch.ones(2) @ torch.ones(3))),
    "our sentence for a wrong type": ("clean", Case("", lambda: LlamaConfig(*7 * ["x"]), python=True)),
    "Python's limit of recursion": ("crash", Case("", lambda: json.loads(100_000 * "["))),
    "text that is not UTF-8": ("crash", Case("", lambda: b"\xff".decode())),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_each_end_of_a_case_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "CPU_SECONDS", 2)
    cases = [*ENDS.items(), *OTHERS.values()]
    monkeypatch.setitem(workers.PREPARED, "planted", None)

    def case(rng, folder, material):
        return cases[int(folder.name.removeprefix("planted-"))][1]

    target = workers.Target("planted", lambda folder, values: None, case, 1.0)
    results = workers.run_group(0, tmp_path, target, range(len(cases)))
    assert [result.outcome.name for result in results] == [name for name, _ in cases]
    assert ENDS.keys() == OUTCOMES.keys()
