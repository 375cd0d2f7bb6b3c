"""The command line: what it prints, writes and refuses."""

import dataclasses
import errno
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

import lora_lab
from lora_lab import Llama, LoRAConfig, cli, inject, load_pretrained, save_adapter, save_model
from lora_lab.ablation.compare import RankResult, RankVerdict
from lora_lab.ablation.studies import STUDIES
from lora_lab.costs import memory_report
from lora_lab.costs.memory import Bill, Part
from lora_lab.costs.speed import Flops, Prediction, Times
from lora_lab.methods import LORA_METHODS
from lora_lab.models import pretrained
from lora_lab.studies.recorder import Recorder
from lora_lab.studies.registry import NAMES, recorder
from lora_lab.tasks import TASKS
from tests.helpers import ROOT, command, error_line, printed_json, randomise


@pytest.mark.parametrize(
    ("work", "arguments"),
    [
        ("lora_lab.demo.run_in_subprocess", ["demo"]),
        ("lora_lab.studies.memory.run_in_subprocess", ["record", "memory", "--device", "cpu"]),
        ("lora_lab.ablation.ablate", ["ablate", "--task", "planted"]),
        ("lora_lab.analysis.spectra.report", ["analyze", "adapter"]),
    ],
    ids=["demo", "record", "ablate", "analyze"],
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
        f"lora-lab: {out} cannot be written to (Not a directory); name another folder, or make this one writable.\n"
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


# generate


@pytest.fixture
def tuned(tiny_smollm2, tmp_path):
    """An adapter that changes what the tiny model writes."""
    model, _ = load_pretrained(tiny_smollm2, device="cpu")
    inject(model, LoRAConfig(rank=2, alpha=4), seed=1)
    return model, save_adapter(randomise(model, size=1), tmp_path / "adapter", base=str(tiny_smollm2))


def written(capsys, *arguments):
    assert command("generate", *arguments, "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert all(line.endswith("a lora_lab.Llama, because its type is 'llama'.") for line in captured.err.splitlines())
    return captured.out


def continuation(model, tokenizer, prompt, n, temperature=0.0, seed=0, penalty=1.0):
    ids = torch.tensor(tokenizer.encode(prompt))
    return tokenizer.decode(model.generate(ids, n, tokenizer.eos_id, temperature, seed, penalty).tolist())


def test_generate_continues_the_prompt_with_the_default_model_a_folder_or_an_adapter(tiny_smollm2, tuned, capsys):
    model, tokenizer = load_pretrained(tiny_smollm2, device="cpu")
    default = written(capsys, "the dog", "--tokens", 12)
    assert default == "the dog" + continuation(model, tokenizer, "the dog", 12) + "\n"
    assert written(capsys, "the dog", "--tokens", 12, "--model", tiny_smollm2) == default
    adapted, folder = tuned
    with_adapter = written(capsys, "the dog", "--tokens", 12, "--adapter", folder)
    assert with_adapter == "the dog" + continuation(adapted, tokenizer, "the dog", 12) + "\n"
    assert with_adapter != default


def test_generate_puts_an_adapter_on_the_model_that_it_was_trained_on(
    tiny_smollm2, tuned, tmp_path, capsys, tiny_config
):
    from lora_lab.models.pretrained import SMOLLM2

    model, folder = tuned
    other = save_model(Llama(tiny_config, seed=9).eval(), tmp_path / "other", load_pretrained(tiny_smollm2)[1])
    outputs = []
    for base in (str(other), SMOLLM2, None):
        save_adapter(model, folder, base=base)
        outputs.append(written(capsys, "the dog", "--adapter", folder))
    assert outputs[0] != outputs[1] == outputs[2]


def test_generate_takes_length_temperature_seed_and_penalty(tiny_smollm2, capsys):
    model, tokenizer = load_pretrained(tiny_smollm2, device="cpu")
    draws = [written(capsys, "a", "--temperature", 1.5, "--seed", seed, "--tokens", 9) for seed in (4, 4, 5)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == "a" + continuation(model, tokenizer, "a", 9, 1.5, 4) + "\n"
    penalised = written(capsys, "a", "--tokens", 30, "--repetition-penalty", 50)
    assert penalised == "a" + continuation(model, tokenizer, "a", 30, penalty=50) + "\n"
    assert penalised != written(capsys, "a", "--tokens", 30)
    assert written(capsys, "a", "--tokens", 3) == "a" + continuation(model, tokenizer, "a", 3) + "\n"


def test_generate_answers_in_the_models_chat_format(tiny_smollm2, capsys):
    model, tokenizer = load_pretrained(tiny_smollm2, device="cpu")
    config = json.loads((tiny_smollm2 / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    (tiny_smollm2 / "tokenizer_config.json").write_text(json.dumps(config))
    answer = continuation(model, tokenizer, "<user>the dog<answer>", 8)
    assert written(capsys, "the dog", "--tokens", 8, "--chat") == answer.strip() + "\n"
    sampled = continuation(model, tokenizer, "<user>the dog<answer>", 8, 1.5, 2, 1.3)
    options = ("--temperature", 1.5, "--seed", 2, "--repetition-penalty", 1.3)
    assert written(capsys, "the dog", "--tokens", 8, "--chat", *options) == sampled.strip() + "\n"
    assert sampled != answer


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a", "--tokens", 0), "--tokens is 0"),
        (("a", "--tokens", 128), "The prompt has 1 tokens and max_new_tokens is 128, but the model reads at most 128"),
        (("a", "--temperature", -1), "temperature is -1.0"),
        (("a", "--repetition-penalty", 0), "repetition_penalty is 0.0"),
        (("",), "non-empty"),
        (("a", "--model", "no-such-model"), "no model 'no-such-model'"),
        (("a", "--adapter", "no-such-folder"), "There is no folder no-such-folder"),
        (("a", "--device", "banana"), "Device 'banana'"),
        (("a", "--chat"), "no chat template"),
    ],
)
def test_generate_says_in_one_line_what_is_wrong(tiny_smollm2, capsys, arguments, says):
    assert command("generate", *arguments) == 1
    assert says in error_line(capsys)


HUGE = 99999999999999999999


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", "a", "--temperature", "nan"), "temperature is nan, but it must be"),
        (("generate", "a", "--seed", HUGE), f"seed is {HUGE}, but it must be at most"),
        (("generate", "a", "--tokens", HUGE), f"--tokens is {HUGE}, but it must be at most"),
        (("chat", "--temperature", "inf"), "temperature is inf, but it must be a finite number"),
        (("chat", "--tokens", -1), "--tokens is -1, but it must be at least 1"),
        (("demo", "--seed", HUGE), f"seed is {HUGE}, but it must be at most"),
        (("demo", "--rank", HUGE), f"rank is {HUGE}, but it must be "),
        (("demo", "--steps", HUGE), f"steps is {HUGE}, but it must be at most"),
        (("finetune", "--task", "style", "--batch", 10**20), "batch_size is 100000000000000000000, but it must be"),
        (("finetune", "--task", "style", "--seed", HUGE), f"seed is {HUGE}, but it must be at most"),
        (("finetune", "--task", "style", "--rank", HUGE), f"rank is {HUGE}, but it must be "),
        (("finetune", "--task", "style", "--alpha", "nan"), "alpha is nan, but it must be"),
        (("finetune", "--task", "style", "--lr", "inf"), "lr is inf, but it must be a finite number"),
        (("finetune", "--task", "style", "--eval-examples", 0), "eval_examples is 0, but it must be at least 1"),
        (("finetune", "--task", "style", "--checkpoint-every", 0), "checkpoint_every is 0, but it must be at least 1"),
        (("ablate", "--alpha", 0), "alpha is 0.0, but it must be a positive number"),
        (("ablate", "--alpha", "nan"), "alpha is nan, but it must be"),
        (("ablate", "--ranks", f"1,{HUGE}"), f"rank is {HUGE}, but it must be "),
        (("ablate", "--lrs", "nan"), "lr is nan, but it must be"),
        (("ablate", "--seeds", HUGE), f"--seeds is {HUGE}, but it must be at most"),
        (("ablate", "--seeds", 0), "--seeds is 0, but it must be at least 1"),
        (("ablate", "--seeds", 10**9), "trials, but a grid has at most 1000000"),
        (("speed", "--measure", -1), "--measure is -1, but it must be at least 1"),
        (("speed", "--rank", HUGE), f"rank is {HUGE}, but it must be "),
        (("memory", "--rank", HUGE), f"rank is {HUGE}, but it must be "),
        (("memory", "--budget", "9" * 400 + "GB"), "is no size; write a number with its unit"),
        (("memory", "--batch", HUGE), f"batch_size is {HUGE}, but it must be"),
        (("memory", "--seq", HUGE), f"seq_len is {HUGE}, but it must be"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_a_number_that_cannot_be_is_told_before_any_work(monkeypatch, tmp_path, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("lora_lab.costs.speed.cost_model", lambda *_: pytest.fail("something was measured"))
    assert command(*arguments) == 1
    assert says in error_line(capsys)


def test_a_rank_given_twice_is_tried_once_and_gives_no_verdict(tmp_path, capsys):
    options = ("--task", "planted", "--ranks", "1,1", "--lrs", "0.01", "--seeds", 1, "--steps", 1, "--eval-examples", 4)
    assert command("ablate", *options, "--out", tmp_path, "--json") == 0
    document, _ = printed_json(capsys)
    assert (document["trials"], document["verdict"]) == (1, None)


def test_a_model_of_another_number_of_layers_is_not_analysed(tmp_path, capsys, tiny_config, tiny_tokenizer):
    folders = []
    for layers in (1, 2):
        model = Llama(dataclasses.replace(tiny_config, num_hidden_layers=layers)).eval()
        folders.append(save_model(model, tmp_path / str(layers), tiny_tokenizer))
    for tuned, base in (folders, folders[::-1]):
        assert command("analyze", tuned, "--base", base, "--out", tmp_path / "out") == 1
        *_, last = capsys.readouterr().err.splitlines()  # after the lines that say how the models are loaded
        assert last.startswith(f"lora-lab: Only one of {tuned} and {base} has model.layers.1.")


def test_generate_refuses_a_damaged_adapter(tuned, capsys):
    _, folder = tuned
    (folder / "adapter_config.json").write_text("[1]")
    assert command("generate", "a", "--adapter", folder) == 1
    assert "adapter_config.json" in error_line(capsys)


# The other commands


def test_doctor_says_what_there_is_and_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LORA_LAB_DEVICE", "cpu")
    monkeypatch.setenv("LORA_LAB_EFFORT", "full")
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    assert command("doctor") == 0
    found = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[0] != "w")
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["effort"].startswith("full ")
    assert found["cache"].startswith(str(tmp_path))
    assert found["model"].startswith("not cached yet")
    (tmp_path / pretrained._CACHE_ENTRY).mkdir()
    assert command("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model            cached" in lines
    assert "why this device  cpu because LORA_LAB_DEVICE asks for it" in lines


def test_doctor_as_json_has_sizes_in_bytes_and_yes_or_no(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("LORA_LAB_EFFORT", "full")
    assert command("doctor", "--json") == 0
    document, rest = printed_json(capsys)
    assert "why this device" in rest
    assert (document["lora_lab"], document["torch"]) == (lora_lab.__version__, torch.__version__)
    assert (document["effort"], document["cache_folder"]) == ("full", str(tmp_path))
    assert document["memory_total_bytes"] == psutil.virtual_memory().total > document["memory_available_bytes"] > 2**20
    assert document["model_is_cached"] is False
    assert document["has_pip"] is (importlib.util.find_spec("pip") is not None)
    (tmp_path / pretrained._CACHE_ENTRY).mkdir()
    assert command("doctor", "--json") == 0
    assert printed_json(capsys)[0]["model_is_cached"] is True


def test_a_refused_command_prints_no_json(monkeypatch, capsys):
    monkeypatch.setenv("LORA_LAB_DEVICE", "banana")
    assert command("doctor", "--json") == 1
    assert "banana" in error_line(capsys)


def test_each_command_with_a_table_has_json_and_no_other_has():
    (commands,) = (action for action in cli._parser()._actions if action.choices)
    with_json = {name for name, parser in commands.choices.items() if "--json" in parser._option_string_actions}
    assert with_json == {"finetune", "memory", "speed", "ablate", "analyze", "record", "claims", "doctor"}


def test_keys_that_json_may_have_are_documented():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(\w+)`", page[page.index("## JSON") :]))
    for keys in (
        memory_report.Row("LoRA", Bill({Part.FROZEN: 5}, "forward pass", "predicted", "a model")).to_dict(),
        Flops({("layers", "forward"): 4}, 2, "a model").to_dict(),
        Prediction({"full": {"Python": 1.0}}, {}, 2).to_dict(),
        Times({"full": [1.0, 2.0]}, 2).to_dict(),
        RankVerdict(1, "enough", "lora", 0.1, (0,), (RankResult(1, "enough"),)).to_dict(),
    ):
        nested = [entry for value in keys.values() if isinstance(value, list | tuple) for entry in value]
        for name in {*keys, *(name for entry in nested if isinstance(entry, dict) for name in entry)}:
            assert name in documented, name


@pytest.mark.parametrize(("variable", "value"), [("LORA_LAB_DEVICE", "banana"), ("LORA_LAB_EFFORT", "some")])
def test_doctor_says_in_one_line_which_variable_is_wrong(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    assert command("doctor") == 1
    assert value in error_line(capsys)


def test_fetch_loads_the_model_once(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *arguments, **options: calls.append((arguments, options)))
    assert command("fetch") == 0
    assert calls == [((), {"device": "cpu"})]


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
    def fail(*_):
        with suppress(OSError):
            print("something")
        raise ValueError("the real reason")

    monkeypatch.setattr(cli, "_run", fail)
    reading, writing = os.pipe()
    os.close(reading)
    assert printed_to(writing) == 1
    assert capsys.readouterr().err == "lora-lab: the real reason\n"


def test_a_broken_pipe_that_is_not_that_of_the_output_is_told(monkeypatch, capfd):
    def fail(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "_run", fail)
    assert command("fetch") == 1
    assert "Broken pipe" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_device_is_told_in_a_sentence(printed_to, capsys):
    assert printed_to("/dev/full") == 1
    says = "The output cannot be written (No space left on device); make room, or send it elsewhere."
    assert capsys.readouterr().err == f"lora-lab: {says}\n"


def test_only_what_has_a_recorder_can_be_recorded(capsys):
    recorders = {name: recorder(name) for name in NAMES}
    assert all(isinstance(each, Recorder) for each in recorders.values())
    assert len({each.rows for each in recorders.values()}) == len(NAMES)
    with pytest.raises(ValueError, match="There is no record 'taste'; there are memory, speed"):
        recorder("taste")
    with pytest.raises(SystemExit):
        command("record", "taste")
    assert "invalid choice: 'taste'" in capsys.readouterr().err


# The parser


def test_defaults_are_those_that_the_help_names():
    parse = cli._parser().parse_args
    demo_options = vars(parse(["demo"]))
    demo_options.pop("run")
    assert demo_options == {"steps": 40, "seed": 0, "rank": 8, "device": None, "out": "runs/demo"}
    options = vars(parse(["generate", "a text"]))
    options.pop("run")
    assert options == {
        "prompt": "a text",
        "adapter": None,
        "model": None,
        "tokens": 60,
        "temperature": 0.0,
        "seed": 0,
        "repetition_penalty": 1.0,
        "chat": False,
        "device": None,
    }


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (["--help"], ["demo", "generate", "doctor", "fetch"]),
        (["demo", "--help"], ["--steps", "--seed", "--rank", "--device", "--out", "(default: 40)"]),
        (["generate", "--help"], ["prompt", "--adapter", "--model", "--tokens", "--temperature", "--seed", "--chat"]),
        (["ablate", "--help"], ["(default: 1,2,4,8,16)"]),
        (["doctor", "--help"], ["usage: lora-lab doctor"]),
        (["fetch", "--help"], ["usage: lora-lab fetch"]),
    ],
)
def test_help_shows_every_command_and_option(capsys, arguments, shows):
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in shows)


@pytest.mark.parametrize(
    "arguments",
    [["dmeo"], ["demo", "--steps", "many"], ["generate"]],
)
def test_a_command_line_that_makes_no_sense_shows_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    assert done.value.code == 2
    assert "usage: lora-lab" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "says"), [("--ranks", "whole numbers"), ("--lrs", "numbers")])
def test_a_list_that_is_none_of_numbers_is_told_with_what_it_must_be(capsys, option, says):
    with pytest.raises(SystemExit):
        command("ablate", option, "2,x")
    assert f"argument {option}: must be {says} separated by commas, not '2,x'" in capsys.readouterr().err


def test_no_default_is_written_into_a_help_text_by_hand():
    (commands,) = (action for action in cli._parser()._actions if action.choices)
    for name, parser in commands.choices.items():
        for action in parser._actions:
            if action.default is not None and action.option_strings and "help" not in action.dest:
                assert "default" not in action.help, f"{name} {action.dest}"


def test_the_command_alone_prints_the_help(capsys):
    assert cli.main([]) == 0
    alone = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert alone == capsys.readouterr().out
    assert "ablate" in alone


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"lora-lab {lora_lab.__version__}\n"


def test_every_command_in_the_readme_and_its_pages_can_be_parsed():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    blocks = re.findall(r"```sh\n(.*?)```", pages.replace("\\\n", ""), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    commands = [line[1 : line.index("&&") if "&&" in line else None] for line in lines if line[:1] == ["lora-lab"]]
    named = "demo finetune generate chat export memory speed ablate analyze record claims course lessons doctor fetch"
    assert {line[0] for line in commands} == {*named.split(), "check-record"}
    for line in commands:
        cli._parser().parse_args(line)


def test_the_help_lists_all_tasks_and_methods(capsys):
    for name in ("finetune", "ablate"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        text = capsys.readouterr().out.replace(" (-de, -es)", ", translate-de, translate-es")
        expected = {*LORA_METHODS, *(TASKS if name == "finetune" else STUDIES)}
        assert expected <= set(re.findall(r"[\w+-]+", text)), name


def test_the_help_shows_no_empty_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["chat", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "may be given repeatedly --model" in text
    assert "(default: 0)" in text  # a number that is 0 is none


def test_the_command_is_installed():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="lora-lab")
    assert entry.load() is cli.main


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


@pytest.mark.parametrize(("name", "merged"), [("x.gguf", False), ("whole", True)])
def test_an_export_says_before_it_loads_a_model_that_its_place_cannot_be_written_to(
    tuned, tmp_path, capsys, monkeypatch, name, merged
):
    monkeypatch.setattr("lora_lab.adapters.gguf.save_gguf", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr("lora_lab.adapters.merged.save_merged", lambda *_, **__: pytest.fail("started"))
    (tmp_path / "file").write_text("mine")
    options = ["--merged"] if merged else []
    assert command("export", tuned[1], "--out", tmp_path / "file" / name, *options) == 1
    assert "cannot be written to (" in error_line(capsys)
