"""A sample of the hostile cases ends as it should, and the harness would notice each bad end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from safetensors.torch import save_file

from lora_lab import LoRAConfig
from lora_lab.models.llama import LlamaConfig
from lora_lab.system.files import read_json
from lora_lab.tasks import Pair
from lora_lab.tasks.base_text import base_replies
from tests.helpers import ROOT

pytest.importorskip("resource", reason="Windows has neither its limits nor fork")
from tests.hostile import __main__ as program
from tests.hostile import api, commands, runs, security, workers
from tests.hostile.commands import ended
from tests.hostile.core import BAD, OUTCOMES, PACKAGE, Case, outcome_of
from tests.hostile.damage import damaged_bytes, damaged_json, safetensors_bytes, safetensors_parts
from tests.hostile.values import Values

pytestmark = pytest.mark.slow

CASES = 500


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """(target, outcome) -> the results of the sample, from a process that has no other threads."""
    path, start = tmp_path_factory.mktemp("hostile") / "results.jsonl", tmp_path_factory.mktemp("start")
    (start / "notes.txt").write_text("the user's own")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.hostile", "--cases", str(CASES), "--results", str(path)]
    done = subprocess.run(command, cwd=start, env=environment, capture_output=True, text=True, timeout=600)
    assert path.exists(), done.stderr
    assert [(each.name, each.read_text()) for each in start.iterdir()] == [("notes.txt", "the user's own")]
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


@pytest.fixture(scope="module")
def values():
    """Those of seed 0, which hypothesis takes half a second to draw."""
    return Values(0)


CONTENT = json.dumps({"hidden_size": 32, "rope_theta": 1e4, "names": ["a", {"b": None}], "tied": True})


@pytest.mark.parametrize("damage", [damaged_json, lambda content, rng, values: damaged_bytes(content.encode(), rng)])
def test_damage_is_the_same_for_a_seed_and_another_for_another(damage, values):
    contents = [damage(CONTENT, random.Random(seed), values)[0] for seed in range(100)]
    assert contents == [damage(CONTENT, random.Random(seed), values)[0] for seed in range(100)]
    assert len(set(contents)) > 80
    assert sum(content == CONTENT.encode() for content in contents) < 5


def test_hypothesis_draws_other_values_for_another_seed(values):
    first, again, other = values, Values(0), Values(1)
    assert (first.texts, repr(first.json)) == (again.texts, repr(again.json))
    assert first.texts != other.texts
    assert repr(first.json) != repr(other.json)


def test_an_undamaged_safetensors_header_is_put_together_again():
    content = safetensors_bytes({"__metadata__": {"a": "b"}, "x": {"shape": [2]}}, b"12345678")
    assert safetensors_parts(content) == ({"__metadata__": {"a": "b"}, "x": {"shape": [2]}}, b"12345678")


def save_model_card():
    Path("out/README.md").unlink()
    Path("out/README.md").write_text("a model")


def checked(function, *arguments):
    """Call a function as a line of the package does: the stack ends as if the package's check were missing."""
    code = compile("function(*arguments)", str(PACKAGE / "missing.py"), "eval")
    return eval(code, {"function": function, "arguments": arguments})


def stopped():
    yield next(iter(()))


def killed(number):
    os.kill(os.getpid(), number)


def in_a_child(function):
    """Call the function in a child process, and wait for its end."""
    if (child := os.fork()) == 0:
        function()
        os._exit(0)
    os.waitpid(child, 0)


def computing(seconds):
    while time.process_time() < seconds:
        pass


def test_a_change_of_the_folder_that_a_run_begins_in_is_noticed(tmp_path):
    for name in ("same", "gone", "written"):
        (tmp_path / name).touch()
    before = program.contents(tmp_path)
    assert program.changes(before, tmp_path) == []
    (tmp_path / "gone").unlink()
    (tmp_path / "new").mkdir()
    os.utime(tmp_path / "written", (0, 0))
    assert program.changes(before, tmp_path) == ["gone", "new", "written"]


def test_what_is_let_through_is_printed_and_is_an_argument_of_a_call(tmp_path, values):
    printed, material = program.let_through(), api.prepare(tmp_path, values)
    for call, names in [*api.LET_THROUGH.items(), *api.RUN.items()]:
        assert names <= api._CALLS[call](material, tmp_path)[1].keys()
        assert f"{call}({', '.join(sorted(names))})" in printed


def test_a_watch_sees_reads_of_the_secret_and_what_leaves_the_folder(tmp_path, monkeypatch):
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    monkeypatch.setattr(security, "_TEMPORARY", "/nowhere")
    secret = tmp_path / "outside" / "secret.txt"
    secret.touch()
    Path("link").symlink_to(secret)

    def seen(event, *arguments):
        watch = security.Watch(tmp_path / "inside", secret.resolve(), active=True)
        watch.hook(event, arguments)
        return len(watch.seen)

    for path in ("../outside/secret.txt", str(secret), "link"):
        assert seen("open", path, "r", 0) == 1, path
    for path in ("../x", "../../x", "/etc/x", "../inside-too/x"):
        assert (seen("open", path, "w", 0), seen("open", path, "r", 0), seen("os.remove", path, -1)) == (1, 0, 1), path
    for path in ("x", "../inside/x", "folder/../x"):
        assert seen("open", path, "w", 0) + seen("os.remove", path, -1) + seen("os.rename", path, path, -1, -1) == 0
    assert seen("os.remove", "link", -1) == 0
    assert seen("subprocess.Popen", "sh", ["sh"], None, None) == 1


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("the user's own", 1),
        ("[<class 'os._wrap_close'>, <class 'int'>]", 1),
        ("<module 'os' (frozen)>", 1),
        ("<function render at 0x7f>", 1),
        ("<class 'range'> <function _environment.<locals>.refuse at 0x7f> x < y", 0),
    ],
)
def test_a_secret_in_the_text_of_a_template_is_noticed(text, complaints):
    assert len([*security._no_secret(text)]) == complaints


def test_the_process_for_templates_has_a_hook(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(security._CHILDS_HOOK)
    (tmp_path / "secret.txt").touch()

    def seen(code):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        subprocess.run([sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path.parent, check=True)
        log = tmp_path / f"sitecustomize.py-{os.getpid()}"
        return log.read_text()

    assert seen("import jinja2.sandbox, json, decimal; open(json.__file__).close()") == ""
    assert "passwd" in seen("open('/etc/passwd').close()")
    assert "os.system" in seen("import os; os.system('true')")


def test_numbers_that_a_command_should_not_print_or_write_are_noticed(tmp_path):
    def complaints(printed="", written="{}"):
        (tmp_path / "result.json").write_text(written)
        return len([*commands._wrong_numbers(tmp_path, printed)])

    assert complaints("loss 0.5, infinite patience, nan-x, information", '{"loss": 0.5, "name": "NaN"}') == 0
    assert complaints("loss nan") == complaints("| -inf |") == complaints(written='{"loss": NaN}') == 1
    save_file({"x": torch.tensor([float("inf")])}, tmp_path / "adapter_model.safetensors")
    assert complaints() == 1


@pytest.fixture(scope="module")
def run_material(tmp_path_factory, values):
    return runs.prepare(tmp_path_factory.mktemp("runs"), values)


def overwritten(folder, solved, only):
    for path in Path(folder).glob("*.ipynb"):
        path.write_text("another")


def other_tokens(path):
    examples = base_replies(path)
    return replace(examples, targets=examples.targets + 1)


@pytest.mark.parametrize(
    ("kind", "fault", "outcome"),
    [
        ("_lessons", overwritten, "lost"),
        ("_replies", other_tokens, "silent"),
        ("_published", lambda *args: SimpleNamespace(what="x"), "silent"),
        ("_record", lambda path: SimpleNamespace(rows=[1], frame=list), "silent"),
        ("_trial", lambda content: runs.Trial(runs.LoRA(7), 0.5, steps=1), "silent"),
    ],
)
def test_other_content_than_the_file_has_is_noticed(kind, fault, outcome, run_material, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "damaged_json", lambda text, rng, values: (text.encode(), "nothing"))
    monkeypatch.setattr(runs, "damaged_tree", lambda content, rng, values: (content, "nothing"))
    for number, expected in enumerate(("accepted", outcome)):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = getattr(runs, kind)(random.Random(2), folder, run_material)
        if number:
            case = replace(case, call=partial(fault, *case.call.args))
        assert outcome_of(case).name == expected


ENDS = {
    "accepted": Case("", int),
    "clean": Case("", lambda: LoRAConfig(rank=0)),
    "foreign": Case("", lambda: torch.ones(2, 3) @ torch.ones(2, 3), foreign=True),
    "wrong type": Case("", lambda: checked(len, 5), wrong_type=True),
    "too long": Case("", lambda: read_json(Path("x" + 100 * ("/" + 15 * "y") + ".json"))),
    "crash": Case("", lambda: len(5)),
    "late": Case("", dict, lambda result: result["x"]),
    "hang": Case("", lambda: [None for _ in iter(int, 1)]),
    "slow": Case("", lambda: in_a_child(lambda: time.sleep(2))),
    "memory": Case("", lambda: len(b"x" * (2**29 + 2**28))),
    "segfault": Case("", lambda: killed(signal.SIGSEGV)),
    "silent": Case("", int, lambda result: ["it is 0"]),
    "lost": Case("", lambda: Path("notes.txt").write_text("x")),
    "refused": Case("", lambda: LoRAConfig(rank=0), good=True),
}
OTHERS = {
    "a process that ends": ("crash", Case("", lambda: os._exit(3))),
    "a process that the system ends": ("memory", Case("", lambda: killed(signal.SIGKILL))),
    "more than there is": ("memory", Case("", lambda: torch.empty(2**40))),
    "a child that computes": ("slow", Case("", lambda: in_a_child(lambda: computing(1.2)))),
    "an error that changes something": (
        "silent",
        Case("", lambda: LoRAConfig(0), after_error=lambda: ["other weights"]),
    ),
    "an error that removes a file": ("lost", Case("", lambda: (Path("x").unlink(), LoRAConfig(0)))),
    "a file of the user in a folder": ("lost", Case("", save_model_card)),
    "a sentence on first use": ("clean", Case("", int, lambda result: LoRAConfig(result))),
    "a foreign error on first use": ("late", Case("", int, lambda result: torch.ones(2) @ torch.ones(3))),
    "our sentence for a wrong type": (
        "clean",
        Case("", lambda: LlamaConfig(*7 * ["x"]), python=True, wrong_type=True),
    ),
    "our TypeError": ("clean", Case("", lambda: Pair(5, "x"), python=True)),
    "our TypeError, for a file": ("crash", Case("", lambda: Pair(5, "x"))),
    "a wrong type that is not listed": ("crash", Case("", lambda: checked(len, 5), python=True)),
    "an odd number, for Python": ("crash", Case("", lambda: checked(int, "x"), python=True)),
    "an empty list, for Python": ("crash", Case("", lambda: checked(max, []), python=True)),
    "a key that is missing": ("crash", Case("", lambda: checked({}.__getitem__, "x"), python=True)),
    "a file that is missing": ("crash", Case("", lambda: checked(open, "no such file"), python=True)),
    "a missing file, through Python's library": ("crash", Case("", lambda: checked(Path("none").read_text))),
    "a library's own check": ("crash", Case("", lambda: pandas.DataFrame([[1]], columns=["a", "b"]))),
    "Python's own, for a model": ("crash", Case("", lambda: [*stopped()], foreign=True)),
    "shapes, for torch": ("crash", Case("", lambda: torch.ones(2, 3) @ torch.ones(2, 3))),
    "Python's limit of recursion": ("crash", Case("", lambda: json.loads(100_000 * "["))),
    "text that is not UTF-8": ("crash", Case("", lambda: b"\xff".decode())),
    "a command that fails": ("clean", Case("", lambda: ended(1, "", "lora-lab: No."))),
    "a command with a traceback": ("crash", Case("", lambda: ended(1, "", "Traceback (most ...\nKeyError: 1"))),
    "a traceback and a sentence": ("crash", Case("", lambda: ended(1, "", "Traceback (most ...\nlora-lab: No."))),
    "a traceback with status 0": ("crash", Case("", lambda: ended(0, "", "Traceback (most ..."))),
    "a command that a signal ends": ("crash", Case("", lambda: ended(139, "", "lora-lab: No."))),
    "a command with two sentences": ("too long", Case("", lambda: ended(1, "", "lora-lab: No.\nlora-lab: No."))),
    "a command that says nothing": ("too long", Case("", lambda: ended(1, "", ""))),
    "a command with wrong options": ("clean", Case("", lambda: ended(2, "", "usage: lora-lab\nlora-lab: error: x"))),
    "status 2 without a usage": ("crash", Case("", lambda: ended(2, "", "lora-lab: No."))),
    "the system's words": ("crash", Case("", lambda: ended(1, "", "lora-lab: [Errno 2] No such file"))),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_each_end_of_a_case_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "CPU_SECONDS", 1.0)
    monkeypatch.setattr(workers, "LONGEST_SECONDS", 0.2)  # times how busy the machine is
    cases = [*ENDS.items(), *OTHERS.values()]
    monkeypatch.setitem(workers.PREPARED, "planted", None)

    def case(rng, folder, material):
        return cases[int(folder.name.removeprefix("planted-"))][1]

    target = workers.Target("planted", lambda folder, values: None, case, 1.0)
    results = workers.run_group(0, tmp_path, target, range(len(cases)))
    assert dict(zip([*ENDS, *OTHERS], [result.outcome.name for result in results], strict=True)) == {
        name: cases[number][0] for number, name in enumerate([*ENDS, *OTHERS])
    }
    assert ENDS.keys() == OUTCOMES.keys()
