"""The command line: what it prints, writes and refuses."""

import dataclasses
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from typing import Literal

import psutil
import pytest
import torch

from lora_lab import Llama, LoRAConfig, cli, inject, load_pretrained, save_adapter, save_model
from lora_lab.models import pretrained
from lora_lab.models.reading import Sampling
from tests.helpers import ROOT, command, error_line, printed_json, randomise


@pytest.mark.parametrize(
    ("work", "arguments"),
    [
        ("lora_lab.demo.run_in_subprocess", ["demo"]),
        ("lora_lab.studies.steps.run_in_subprocess", ["record", "memory", "--device", "cpu"]),
        ("lora_lab.ablation.ablate", ["ablate", "--task", "planted"]),
        ("lora_lab.analysis.spectra.report", ["analyze", "adapter"]),
        ("lora_lab.adapters.save_merged", ["export", "adapter", "--merged"]),
    ],
    ids=["demo", "record", "ablate", "analyze", "export"],
)
def test_what_takes_minutes_says_before_it_starts_that_its_folder_cannot_be_written_to(
    tuned, tmp_path, capsys, monkeypatch, work, arguments
):
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("started"))
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    assert command(*[tuned[1] if argument == "adapter" else argument for argument in arguments], "--out", out) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        f"lora-lab: {out} cannot be written to (it is a file); name another folder, or make this one writable.\n"
    )
    assert "[1/4]" not in captured.out


@pytest.mark.parametrize(
    ("work", "file", "own", "arguments"),
    [
        ("lora_lab.demo.run_in_subprocess", "demo.json", '{"machine": {}, "results": []}', ["demo"]),
        ("lora_lab.ablation.ablate", "table.csv", "key,method,lr,outcome\n", ["ablate", "--task", "planted"]),
        ("lora_lab.analysis.spectra.report", "layers.csv", "layer,kind,depth\n", ["analyze", "adapter"]),
        (
            "lora_lab.finetune.load_pretrained",
            "result.json",
            (ROOT / "lora_lab/adapters/data/sentiment/result.json").read_text(encoding="utf-8"),
            ["finetune", "--task", "docs", "--overwrite"],
        ),
    ],
    ids=["demo", "ablate", "analyze", "finetune"],
)
def test_a_result_of_another_program_is_refused_before_any_work_and_stays(
    tuned, tmp_path, capsys, monkeypatch, work, file, own, arguments
):
    def start(*_, **__):
        raise RuntimeError("started")

    monkeypatch.setattr(work, start)
    arguments = [tuned[1] if argument == "adapter" else argument for argument in arguments]
    path = tmp_path / "out" / file
    path.parent.mkdir()
    for foreign in ('{"mine": 1}', "mine,yours\n1,2\n", "[1]", "5", ""):
        path.write_text(foreign)
        assert command(*arguments, "--out", path.parent) == 1
        assert f"{file} was not written by this command, which would replace it; name another" in error_line(capsys)
        assert path.read_text() == foreign
    path.write_text(own, encoding="utf-8")
    assert command(*arguments, "--out", path.parent) == 1
    assert capsys.readouterr().err.endswith("lora-lab: started\n")


# chat with one prompt


@pytest.fixture
def tuned(tiny_smollm2, tmp_path):
    """An adapter that changes what the tiny model writes."""
    model, _ = load_pretrained(tiny_smollm2, device="cpu")
    inject(model, LoRAConfig(rank=2, alpha=4), seed=1)
    return model, save_adapter(randomise(model, size=1), tmp_path / "adapter", base=str(tiny_smollm2))


def written(capsys, prompt, *options, plain=True):
    """The continuation of a prompt, or the answer to it; greedy, and without a penalty, unless the options say so."""
    kind = ("--plain",) if plain else ()
    assert command("chat", prompt, *kind, *DETERMINISTIC, *options, "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert all(line.endswith("a lora_lab.Llama.") for line in captured.err.splitlines())
    return captured.out


DETERMINISTIC = ("--temperature", 0, "--repetition-penalty", 1, "--tokens", 60)


def continuation(model, tokenizer, prompt, n, temperature=0.0, seed=0, penalty=1.0):
    ids, sampling = torch.tensor(tokenizer.encode(prompt)), Sampling(temperature, seed, penalty)
    return tokenizer.decode(model.generate(ids, n, tokenizer.eos_id, **vars(sampling)).tolist())


def test_chat_takes_length_temperature_seed_and_penalty(tiny_smollm2, capsys):
    model, tokenizer = load_pretrained(tiny_smollm2, device="cpu")
    draws = [written(capsys, "a", "--temperature", 1.5, "--seed", seed, "--tokens", 9) for seed in (4, 4, 5)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == "a" + continuation(model, tokenizer, "a", 9, 1.5, 4) + "\n"
    penalised = written(capsys, "a", "--tokens", 30, "--repetition-penalty", 50)
    assert penalised == "a" + continuation(model, tokenizer, "a", 30, penalty=50) + "\n"
    assert penalised != written(capsys, "a", "--tokens", 30)
    assert written(capsys, "a", "--tokens", 3) == "a" + continuation(model, tokenizer, "a", 3) + "\n"


def test_chat_answers_in_the_models_chat_format(tiny_smollm2, capsys):
    model, tokenizer = load_pretrained(tiny_smollm2, device="cpu")
    config = json.loads((tiny_smollm2 / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    (tiny_smollm2 / "tokenizer_config.json").write_text(json.dumps(config))
    answer = continuation(model, tokenizer, "<user>the dog<answer>", 8)
    assert written(capsys, "the dog", "--tokens", 8, plain=False) == answer.strip() + "\n"
    sampled = continuation(model, tokenizer, "<user>the dog<answer>", 8, 1.5, 2, 1.3)
    options = ("--temperature", 1.5, "--seed", 2, "--repetition-penalty", 1.3)
    assert written(capsys, "the dog", "--tokens", 8, *options, plain=False) == sampled.strip() + "\n"
    assert sampled != answer


HUGE = 99999999999999999999


REFUSED = [  # arguments, and what the one line of the error names
    (("chat", "a", "--plain", "--tokens", 0), "--tokens"),
    (("chat", "a", "--tokens", HUGE), "--tokens"),
    (("chat", "a", "--temperature", "nan"), "temperature"),
    (("chat", "a", "--repetition-penalty", 0), "repetition_penalty"),
    (("chat", "a", "--seed", HUGE), "seed"),
    (("chat", "--plain"), "--plain"),
    (("chat", "--adapter", "a", "--adapter", "b/a"), "same name"),
    (("chat", "a", "--adapter", "no-such-folder"), "no-such-folder"),
    (("demo", "--seed", HUGE), "seed"),
    (("demo", "--rank", HUGE), "rank"),
    (("demo", "--steps", HUGE), "steps"),
    (("finetune", "--task", "no-such-task"), "no-such-task"),
    (("finetune", "--task", "style", "--method", "no-such-method"), "no-such-method"),
    (("finetune", "--task", "style", "--batch", HUGE), "batch_size"),
    (("finetune", "--task", "style", "--seed", HUGE), "seed"),
    (("finetune", "--task", "style", "--rank", HUGE), "rank"),
    (("finetune", "--task", "style", "--alpha", "nan"), "alpha"),
    (("finetune", "--task", "style", "--lr", "inf"), "lr"),
    (("finetune", "--task", "style", "--eval-examples", 0), "eval_examples"),
    (("finetune", "--task", "style", "--checkpoint-every", 0), "checkpoint_every"),
    (("ablate", "--alpha", 0), "alpha"),
    (("ablate", "--ranks", 1, HUGE), "rank"),
    (("ablate", "--lrs", "nan"), "lr"),
    (("ablate", "--seeds", 0), "seeds"),
    (("ablate", "--seeds", 10**9), "trials"),
    (("ablate", "--margin", -1), "--margin"),
    (("speed", "--measure", -1), "--measure"),
    (("speed", "--rank", HUGE), "rank"),
    (("speed", "--card", "no-such-card"), "no-such-card"),
    (("speed", "--card", "l40s", "--measure", 1), "--card"),
    (("memory", "--rank", HUGE), "rank"),
    (("memory", "--budget", "9" * 400 + "GB"), "unit"),
    (("memory", "--batch", HUGE), "batch_size"),
    (("memory", "--largest", "batch"), "--budget"),
    (("analyze", "no-such-folder"), "no-such-folder"),
    (("export", "no-such-folder", "--out", "folder"), ".gguf"),
    (("record", "taste"), "taste"),
    (("record", "spectra", "--models", "smollm2-135m"), "--models"),
    (("claims", "rank-one-sufices"), "rank-one-suffices"),
    (("claims", "--records", "no-such-folder"), "no-such-folder"),
    (("course", "here", "--grading", "--add", "x"), "--add"),
]


@pytest.mark.parametrize(("arguments", "named"), REFUSED, ids=lambda value: " ".join(map(str, value))[:40])
def test_what_cannot_be_is_told_in_a_line_before_any_work(monkeypatch, tmp_path, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("lora_lab.costs.speed.cost_model", lambda *_: pytest.fail("something was measured"))
    assert command(*arguments) == 1
    assert named in error_line(capsys)
    assert not any(tmp_path.iterdir())


def test_a_model_of_another_number_of_layers_is_not_analysed(tmp_path, capsys, tiny_config, tiny_tokenizer):
    folders = []
    for layers in (1, 2):
        model = Llama(dataclasses.replace(tiny_config, num_hidden_layers=layers)).eval()
        folders.append(save_model(model, tmp_path / str(layers), tiny_tokenizer))
    for tuned, base in (folders, folders[::-1]):
        assert command("analyze", tuned, "--base", base, "--out", tmp_path / "out") == 1
        *_, last = capsys.readouterr().err.splitlines()  # after the lines that say how the models are loaded
        assert last.startswith(f"lora-lab: Only one of {tuned} and {base} has model.layers.1.")


# The other commands


def test_doctor_says_what_there_is_in_words_and_as_json_with_sizes_in_bytes(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LORA_LAB_DEVICE", "cpu")
    monkeypatch.setenv("LORA_LAB_EFFORT", "full")
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    assert command("doctor", "--json") == 0
    document, rest = printed_json(capsys)
    found = {line[:16].rstrip(): line[17:] for line in rest.splitlines()}
    assert (document["device"], document["effort"], document["cache_folder"]) == ("cpu", "full", str(tmp_path))
    assert "LORA_LAB_DEVICE" in found["device reason"]
    assert found["effort"].startswith("full ")
    assert document["memory_total_bytes"] == psutil.virtual_memory().total > document["memory_available_bytes"] > 2**20
    assert document["model_is_cached"] is False
    (tmp_path / pretrained._CACHE_ENTRY).mkdir()
    assert command("doctor", "--json") == 0
    assert printed_json(capsys)[0]["model_is_cached"] is True


@pytest.mark.parametrize(("variable", "value"), [("LORA_LAB_DEVICE", "banana"), ("LORA_LAB_EFFORT", "some")])
def test_doctor_says_in_one_line_which_variable_is_wrong(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    for options in ((), ("--json",)):
        assert command("doctor", *options) == 1
        assert value in error_line(capsys)


def test_an_error_of_the_system_is_one_line_and_an_interruption_a_status_of_its_own(monkeypatch, capsys):
    for error, status, says in (
        (RuntimeError("no network"), 1, "lora-lab: no network\n"),
        (MemoryError("too little"), 1, "lora-lab: too little\n"),
        (OSError("disk full"), 1, "lora-lab: disk full\n"),
        (KeyboardInterrupt(), 130, "lora-lab: stopped.\n"),
    ):

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(pretrained, "load_pretrained", fail)
        assert command("fetch") == status
        assert capsys.readouterr().err == says


@pytest.fixture(params=[-1, 0], ids=["buffered", "unbuffered"])
def printed_to(request, monkeypatch):
    """Runs ``lora-lab fetch``, which here prints a line, with a file in place of standard output."""
    monkeypatch.setattr(pretrained, "load_pretrained", lambda **_: print("a line"))

    def run(file):
        with (
            open(file, "wb", request.param) as opened,
            io.TextIOWrapper(opened, write_through=request.param == 0) as stdout,
        ):
            monkeypatch.setattr(sys, "stdout", stdout)
            return command("fetch")

    return run


def test_a_reader_that_stops_reading_ends_a_command_quietly(printed_to, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    assert printed_to(writing) == 141
    assert capsys.readouterr().err == ""


def test_a_reader_that_stops_reading_does_not_hide_an_error(monkeypatch, printed_to, capsys):
    def fail(**_):
        with suppress(OSError):
            print("something")
        raise ValueError("the real reason")

    monkeypatch.setattr(pretrained, "load_pretrained", fail)
    reading, writing = os.pipe()
    os.close(reading)
    with suppress(BrokenPipeError):  # of this test's own file, which still holds the text
        assert printed_to(writing) == 1
    assert capsys.readouterr().err == "lora-lab: the real reason\n"


# The parser


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, "--help"])
    assert done.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_an_argument_of_a_function_is_an_option_with_its_help_and_its_default(capsys, name):
    assert f" {name} " in help_of(capsys)
    shown = help_of(capsys, name)
    for argument in inspect.signature(cli.COMMANDS[name]).parameters.values():
        positional = argument.kind is argument.POSITIONAL_ONLY
        assert (f" {argument.name} " if positional else f"--{argument.name.replace('_', '-')} ") in shown
        if isinstance(argument.default, int | float) and not isinstance(argument.default, bool):
            assert f"(default: {argument.default})" in shown
    assert ("--json" in shown) == ("Returns:" in cli.COMMANDS[name].__doc__)


def test_arguments_arrive_as_they_are_declared(monkeypatch):
    arrived = []

    def command(
        first: str,
        /,
        *,
        needed: int,
        several: tuple[float, ...] = (1.0,),
        either: Literal["a", "b"] = "a",
        flag: bool = False,
    ) -> None:
        """Do nothing.

        Args:
            first: a word
            needed: a number
            several: numbers
            either: a letter
            flag: yes or no
        """
        arrived.append((first, needed, several, either, flag))

    monkeypatch.setitem(cli.COMMANDS, "try", command)
    assert cli.main(["try", "x", "--needed", "3"]) == 0
    assert cli.main(["try", "x", "--needed", "3", "--several", "1", "2.5", "--either", "b", "--flag"]) == 0
    assert cli.main(["try", "x", "--needed", "3", "--several", "1", "--several", "2"]) == 0
    assert arrived == [("x", 3, (1.0,), "a", False), ("x", 3, [1.0, 2.5], "b", True), ("x", 3, [1.0, 2.0], "a", False)]
    for wrong in (["try", "x"], ["try", "--needed", "3"], ["try", "x", "--needed", "3", "--either", "c"]):
        with pytest.raises(SystemExit) as done:
            cli.main(wrong)
        assert done.value.code == 2


def test_every_command_in_the_readme_and_its_pages_can_be_parsed():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    blocks = re.findall(r"```sh\n(.*?)```", pages.replace("\\\n", ""), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    commands = [line[1 : line.index("&&") if "&&" in line else None] for line in lines if line[:1] == ["lora-lab"]]
    assert {line[0] for line in commands} == set(cli.COMMANDS)
    for line in commands:
        cli.make_parser(line).parse_args(line)


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_are_told_to_give_their_cores_back_before_torch_starts(given, expected):
    script = "import os, sys, lora_lab.cli; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "False"]


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["memory", "--help"]])
def test_help_loads_no_library_that_takes_long(arguments):
    script = f"import sys\nfrom lora_lab.cli import main\ntry: main({arguments})\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "lora_lab.cli" in done.stdout.split()
    assert not {"torch", "numpy", "pandas", "matplotlib"} & set(done.stdout.split())
