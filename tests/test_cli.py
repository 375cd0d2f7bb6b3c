"""The main job on a tiny model in this process, and the command line: what it prints, writes and refuses."""

import errno
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import lora_lab
from lora_lab import (
    History,
    Llama,
    LoRAConfig,
    cli,
    evaluate,
    inject,
    load_adapter,
    load_pretrained,
    lora_layers,
    save_adapter,
    save_model,
)
from lora_lab.experiments import demo
from lora_lab.history import COLUMNS
from lora_lab.models import pretrained
from lora_lab.tasks import docs
from tests.helpers import PNG, ROOT, command, randomise


@pytest.fixture
def tiny(tmp_path, monkeypatch, tiny_config, tiny_tokenizer):
    """A folder with a tiny random Llama, which takes the place of SmolLM2 wherever that is asked for."""
    folder = save_model(Llama(tiny_config, seed=1).eval(), tmp_path / "tiny", tiny_tokenizer)
    real = pretrained.load_pretrained

    def load(source=pretrained.SMOLLM2, dtype=torch.float32, device=None):
        return real(folder if source == pretrained.SMOLLM2 else source, dtype, device)

    monkeypatch.setattr(pretrained, "load_pretrained", load)
    return folder


@pytest.fixture
def small_demo(tiny, monkeypatch):
    """The demo with little to do, in this process."""
    load = pretrained.load_pretrained

    def on_the_asked_device(device):
        assert device == "cpu:0"
        return load(device=device)

    monkeypatch.setattr(demo, "load_pretrained", on_the_asked_device)
    monkeypatch.setattr(demo, "SEQ_LEN", 16)
    monkeypatch.setattr(demo, "BATCH_SIZE", 2)
    monkeypatch.setattr(demo, "EVAL_EXAMPLES", 4)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 5)
    monkeypatch.setattr(demo, "run_in_subprocess", lambda function, *arguments: function(*arguments))
    return tiny


def one_line(capsys):
    """The only line on stderr; nothing may be on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("lora-lab: ")
    return captured.err


# demo


def table_rows(printed):
    """Cells of the printed table by the name of their row."""
    lines = printed.partition("Side by side\n\n")[2].partition("\n\n")[0].splitlines()
    assert set(lines.pop(1)) == {"-"}
    return {line[:20].strip(): [cell.strip() for cell in re.split(r" {2,}", line[20:].strip())] for line in lines}


def test_demo_fine_tunes_both_ways_and_keeps_what_it_says(small_demo, tmp_path, capsys):
    out = tmp_path / "results"
    arguments = ("--steps", 4, "--seed", 3, "--rank", 2, "--device", "cpu:0", "--out", out)
    assert command("demo", *arguments) == 0
    printed = capsys.readouterr().out
    for part in (
        "Device: cpu:0 because it was asked for",
        "[1/4] SmolLM2-135M-Instruct, before any training",
        "[2/4] LoRA r=2: 4 steps of 2 x 16 tokens at learning rate ",
        "[3/4] full fine-tuning: 4 steps of 2 x 16 tokens at learning rate ",
        "[4/4] Side by side",
        "One seed is an illustration, not a comparison",
        *(str(out / name) for name in ("demo.png", "lora", "full", "demo.json")),
        "01_low_rank.ipynb",
    ):
        assert part in printed
    assert printed.count(f"    | {demo.PROMPT}") == 3  # a sample before, and one after each training

    base = load_pretrained(small_demo, device="cpu")[0]
    total = sum(p.numel() for p in base.parameters())
    trained = sum(2 * (m.in_features + m.out_features) for n, m in base.named_modules() if n.endswith("_proj"))
    rows = table_rows(printed)
    assert rows[""] == ["LoRA r=2", "full fine-tuning"]
    assert rows["trained parameters"] == [f"{trained:,}", f"{total:,}"]
    files = [out / "lora" / "adapter_model.safetensors", out / "full" / "model.safetensors"]
    assert rows["file to keep, MB"] == [f"{path.stat().st_size / 1e6:.1f}" for path in files]
    assert list(rows)[3:] == [
        "peak memory, MiB",
        "median step, s",
        "tokens a second",
        "training loss",
        "validation loss",
        "off-domain loss",
    ]

    assert (out / "demo.png").read_bytes().startswith(PNG)
    histories = [History.load(out / name / "history.json") for name in ("lora", "full")]
    for history, method in zip(histories, ("lora", "full"), strict=True):
        assert history.method["name"] == method
        assert (history.settings["seed"], history.settings["steps"], len(history.rows)) == (3, 4, 5)
        assert history.task["name"] == "docs"
    assert histories[0].method["rank"] == 2
    assert histories[0].method["alpha"] == 4
    assert histories[0].rows[0]["validation_loss"] == histories[1].rows[0]["validation_loss"]  # the same start
    assert histories[0].rows[1]["train_loss"] == histories[1].rows[1]["train_loss"]  # the same first batch
    assert histories[0].task == histories[1].task
    ends = [f"{h.rows[0]['validation_loss']:.3f} -> {h.rows[-1]['validation_loss']:.3f}" for h in histories]
    assert rows["validation loss"] == ends
    assert histories[0].rows[-1]["validation_loss"] != histories[1].rows[-1]["validation_loss"]

    record = json.loads((out / "demo.json").read_text())
    assert record["machine"]["device"] == "cpu:0"
    assert [result["label"] for result in record["results"]] == ["LoRA r=2", "full fine-tuning"]
    for result, history in zip(record["results"], histories, strict=True):
        assert result["history"]["rows"] == history.rows
        memory = result["memory"]
        assert memory["optimiser state"] == history.optimizer_bytes > 0
        assert memory["trained weights"] == 4 * history.trainable_parameters
        assert memory["saved: MLP"] > 0
        assert memory["the rest: torch, Python, the heap"] > 0
        assert sum(memory.values()) == result["peak_bytes"]

    assert json.loads((out / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2-135m"
    load_adapter(base, out / "lora")
    assert len(lora_layers(base)) == 14
    assert all(layer.lora_B.abs().max() > 0 for layer in lora_layers(base).values())
    full, _ = load_pretrained(out / "full", device="cpu")
    start = load_pretrained(small_demo, device="cpu")[0].state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in full.state_dict().items())
    task = docs(load_pretrained(small_demo, device="cpu")[1], seq_len=16)
    for model, result in zip((base, full), record["results"], strict=True):
        assert result["train_after"] == pytest.approx(evaluate(model, task, "train", 2, 4), rel=1e-5)
        assert result["train_after"] != pytest.approx(result["train_before"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steps", 0), "steps is 0, but at least 1 is needed"),
        (("--rank", 0), "rank is 0"),
        (("--device", "banana"), "Device 'banana' cannot be used here"),
    ],
)
def test_demo_refuses_bad_numbers_before_it_starts(small_demo, tmp_path, capsys, arguments, says):
    assert command("demo", "--out", tmp_path / "results", *arguments) == 1
    assert says in one_line(capsys)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("work", "arguments"),
    [
        ("lora_lab.experiments.demo.run_in_subprocess", ["demo"]),
        ("lora_lab.experiments.step_memory.run_in_subprocess", ["record", "memory", "--device", "cpu"]),
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


def test_what_the_demo_cannot_keep_in_its_place_is_kept_in_another(small_demo, tmp_path, capsys, monkeypatch):
    def full(model, folder, base):
        if "results" in folder.parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_adapter(model, folder, base)

    monkeypatch.setattr(demo, "save_adapter", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert command("demo", "--steps", 1, "--device", "cpu:0", "--out", tmp_path / "results") == 1
    (spare,) = tmp_path.glob("lora_lab-*")
    said = capsys.readouterr().err
    assert f"{tmp_path / 'results' / 'lora'} could not be written (No space left on device)" in said
    assert said.endswith(f"What was to be kept is in {spare} instead.\n")
    assert sorted(path.name for path in spare.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "history.json",
    ]


def result(label, trained, before, after, seconds, peak, size):
    rows = [
        {**dict.fromkeys(COLUMNS), "step": 0, "validation_loss": before, "off_domain_loss": before + 1, "tokens": 0},
        *({**dict.fromkeys(COLUMNS), "step": i, "seconds": s, "tokens": 256} for i, s in enumerate(seconds, 1)),
    ]
    rows[-1] |= {"validation_loss": after, "off_domain_loss": after + 1}
    history = History({"name": "docs"}, {"name": label}, {}, trained, 134_515_008, rows=rows)
    return demo.Result(label, history, before - 0.1, after - 0.1, {"weights": peak - 5, "rest": 5}, peak, size, "text")


RESULTS = [
    result("LoRA r=8", 2_442_240, 3.25, 2.75, [1.0, 0.5, 2.0], 1900 * 2**20, 9_790_000),
    result("full fine-tuning", 134_515_008, 3.25, 2.5, [1.25, 1.5, 1.0], 3700 * 2**20 + 2**19 + 1, 538_090_408),
]


def test_table_of_two_results():
    expected = """
                            LoRA r=8  full fine-tuning
------------------------------------------------------
trained parameters         2,442,240       134,515,008
file to keep, MB                 9.8             538.1
peak memory, MiB               1,900             3,701
median step, s                  1.00              1.25
tokens a second                  256               205
training loss         3.150 -> 2.650    3.150 -> 2.400
validation loss       3.250 -> 2.750    3.250 -> 2.500
off-domain loss       4.250 -> 3.750    4.250 -> 3.500
"""
    assert demo.table(RESULTS) == expected.strip("\n")


def test_picture_of_two_results(tmp_path, monkeypatch):
    from lora_lab import plots

    drawn = []
    original = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure) or original(figure, path))
    assert demo.draw(RESULTS, tmp_path / "demo.png") == tmp_path / "demo.png"
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    left, right = drawn[0].axes
    assert [line.get_ydata().tolist() for line in left.get_lines()] == [[3.25, 2.75], [3.25, 2.5]]
    assert left.get_ylabel() == "validation loss (nats per token)"
    assert right.get_ylabel() == "memory at the peak (MiB)"
    assert [text.get_text() for text in right.get_xticklabels()] == ["LoRA r=8", "full fine-tuning"]
    assert [text.get_text() for text in right.texts] == ["1,900", "3,701"]


# generate


@pytest.fixture
def tuned(tiny, tmp_path):
    """An adapter that changes what the tiny model writes."""
    model, _ = load_pretrained(tiny, device="cpu")
    inject(model, LoRAConfig(rank=2, alpha=4), seed=1)
    return model, save_adapter(randomise(model, size=1), tmp_path / "adapter", base=str(tiny))


def written(capsys, *arguments):
    assert command("generate", *arguments, "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def continuation(model, tokenizer, prompt, n, temperature=0.0, seed=0):
    ids = torch.tensor(tokenizer.encode(prompt))
    return tokenizer.decode(model.generate(ids, n, tokenizer.eos_id, temperature, seed).tolist())


def test_generate_continues_the_prompt_with_the_default_model_a_folder_or_an_adapter(tiny, tuned, capsys):
    model, tokenizer = load_pretrained(tiny, device="cpu")
    default = written(capsys, "the dog", "--tokens", 12)
    assert default == "the dog" + continuation(model, tokenizer, "the dog", 12) + "\n"
    assert written(capsys, "the dog", "--tokens", 12, "--model", tiny) == default
    adapted, folder = tuned
    with_adapter = written(capsys, "the dog", "--tokens", 12, "--adapter", folder)
    assert with_adapter == "the dog" + continuation(adapted, tokenizer, "the dog", 12) + "\n"
    assert with_adapter != default


def test_generate_puts_an_adapter_on_the_model_that_it_was_trained_on(tiny, tuned, tmp_path, capsys, tiny_config):
    from lora_lab.models.pretrained import SMOLLM2

    model, folder = tuned
    other = save_model(Llama(tiny_config, seed=9).eval(), tmp_path / "other", load_pretrained(tiny)[1])
    outputs = []
    for base in (str(other), SMOLLM2, None):
        save_adapter(model, folder, base=base)
        outputs.append(written(capsys, "the dog", "--adapter", folder))
    assert outputs[0] != outputs[1] == outputs[2]


def test_generate_takes_length_temperature_and_seed(tiny, capsys):
    model, tokenizer = load_pretrained(tiny, device="cpu")
    draws = [written(capsys, "a", "--temperature", 1.5, "--seed", seed, "--tokens", 9) for seed in (4, 4, 5)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == "a" + continuation(model, tokenizer, "a", 9, 1.5, 4) + "\n"
    assert written(capsys, "a", "--tokens", 3) == "a" + continuation(model, tokenizer, "a", 3) + "\n"


def test_generate_answers_in_the_models_chat_format(tiny, capsys):
    model, tokenizer = load_pretrained(tiny, device="cpu")
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    answer = continuation(model, tokenizer, "<user>the dog<answer>", 8)
    assert written(capsys, "the dog", "--tokens", 8, "--chat") == answer + "\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a", "--tokens", 0), "--tokens is 0"),
        (("a", "--temperature", -1), "temperature is -1.0"),
        (("",), "non-empty"),
        (("a", "--model", "no-such-model"), "no model 'no-such-model'"),
        (("a", "--adapter", "no-such-folder"), "no-such-folder lacks the file adapter_config.json"),
        (("a", "--device", "banana"), "Device 'banana'"),
        (("a", "--chat"), "no chat template"),
    ],
)
def test_generate_says_in_one_line_what_is_wrong(tiny, capsys, arguments, says):
    assert command("generate", *arguments) == 1
    assert says in one_line(capsys)


def test_generate_refuses_a_damaged_adapter(tuned, capsys):
    _, folder = tuned
    (folder / "adapter_config.json").write_text("[1]")
    assert command("generate", "a", "--adapter", folder) == 1
    assert "adapter_config.json" in one_line(capsys)


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
    assert found["model"].startswith("not there yet")
    (tmp_path / pretrained._CACHE_ENTRY).mkdir()
    assert command("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model            there" in lines
    assert "why this device  cpu because LORA_LAB_DEVICE asks for it" in lines


@pytest.mark.parametrize(("variable", "value"), [("LORA_LAB_DEVICE", "banana"), ("LORA_LAB_EFFORT", "some")])
def test_doctor_says_in_one_line_which_variable_is_wrong(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    assert command("doctor") == 1
    assert value in one_line(capsys)


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
    [["dmeo"], ["demo", "--steps", "many"], ["generate"], ["generate", "a", "--adapter", "x", "--model", "y"]],
)
def test_a_command_line_that_makes_no_sense_shows_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    assert done.value.code == 2
    assert "usage: lora-lab" in capsys.readouterr().err


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


def test_every_command_in_the_readme_can_be_parsed():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    commands = [line[1 : line.index("&&") if "&&" in line else None] for line in lines if line[:1] == ["lora-lab"]]
    named = "demo finetune generate memory speed ablate analyze record doctor fetch"
    assert {line[0] for line in commands} == set(named.split())
    for line in commands:
        cli._parser().parse_args(line)


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
