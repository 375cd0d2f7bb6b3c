"""Two real processes with gloo train as one process does, go on after a kill, and say in one sentence what is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn import functional as F

from lora_lab import FullFineTuning, Lean, Llama, LoRA, fit, save_model
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import LlamaConfig
from lora_lab.system import distributed
from lora_lab.system.distributed import ProcessEndedError, Processes, current_processes
from lora_lab.task import IGNORE
from lora_lab.tasks import Examples, Task
from tests.helpers import ROOT, Stopped, command, error_line, names, random_ids, small_task, sums

pytestmark = pytest.mark.slow

CHECKPOINT = "checkpoint.safetensors"
ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
CONFIG = LlamaConfig(260, 16, 24, 2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)


class Chooser(nn.Module):
    """Two matrices, of which an example meets one; a batch that needs only one gives the other no gradient."""

    def __init__(self):
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(64, 10, generator=torch.manual_seed(i)) for i in range(2))
        self.double()

    def forward(self, x):
        logits = x.new_zeros(len(x), 10)
        for index, chosen in enumerate((x[:, 0] < 1, x[:, 0] >= 1)):
            if chosen.any():
                logits[chosen] = x[chosen] @ self.matrices[index]
        return logits


class Normed(nn.Sequential):
    """A net with batch normalisation."""

    def __init__(self):
        super().__init__(nn.Linear(64, 10), nn.BatchNorm1d(10))
        self.double()


def digits():
    return DigitsMLP(width=8).double()


def llama():
    return Llama(CONFIG, seed=1).double()


def texts():
    """Texts of which unequal parts count, from no target to nine."""
    parts = {}
    for seed, (part, n) in enumerate({"train": 12, "validation": 7, "test": 5, "off_domain": 6}.items()):
        ids = random_ids(n, 10, seed=seed)
        targets = torch.where(torch.arange(9) < torch.arange(n)[:, None] % 10, ids[:, 1:], IGNORE)
        parts[part] = Examples(ids[:, :-1], targets)
    return Task("texts", **parts, unit="tokens")


numbers = partial(small_task, dtype=torch.float64)
OPTIONS = {"steps": 5, "lr": 0.01, "batch_size": 4, "eval_every": 2, "progress": False}
CASES = {  # model, task, method, options
    "full": (digits, numbers, FullFineTuning(), {"weight_decay": 0.1}),
    "batches of five": (digits, numbers, FullFineTuning(), {"batch_size": 5}),
    "one example a step": (digits, numbers, LoRA(rank=2), {"batch_size": 1}),
    "unequal targets": (llama, texts, LoRA(rank=2), {}),
    "micro-batches": (llama, texts, LoRA(rank=2), {"accumulate": 3, "clip": 0.1}),
    "lean": (llama, texts, LoRA(rank=2), {"lean": Lean(), "batch_size": 3}),
    "lean threads": (llama, texts, LoRA(rank=2), {"lean": Lean(threads=2, checkpoint=True)}),
    "checkpointing": (llama, texts, FullFineTuning(), {"gradient_checkpointing": True}),
    "chosen matrices": (Chooser, numbers, FullFineTuning(), {"weight_decay": 0.1, "batch_size": 2}),
}


def run(case, **options):
    make, task, method, more = CASES[case]
    model = make()
    history = fit(model, task(), method, **(OPTIONS | more | options))
    return without_seconds(history.rows), model.state_dict()


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def small_run(folder=None, dropout=0.0, **options):
    """As :func:`run`, with adapters of the digits net, checkpoints and dropout."""
    model, loss = digits(), options.pop("loss", F.cross_entropy)
    task = numbers(loss=lambda model, inputs, targets: loss(model(inputs), targets))
    options = ({"checkpoint_dir": folder, "checkpoint_every": 2} if folder else {}) | options
    history = fit(model, task, LoRA(rank=2, dropout=dropout), **(OPTIONS | options))
    return without_seconds(history.rows), model.state_dict()


class At:
    """A loss that calls a function in the forward pass of one training step."""

    def __init__(self, step, function):
        self.left, self.function = step, function

    def __call__(self, scores, targets):
        self.left -= torch.is_grad_enabled()
        if self.left == 0:
            self.function()
        return F.cross_entropy(scores, targets)


def stop():
    raise Stopped


# What the two processes do


def message(error, function, *arguments, **options):
    """What the error of a call says."""
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    return str(caught.value)


def work(rank, folder):
    """All that the tests below look at, computed in one of two processes. The second one ends by a kill."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {case: run(case) for case in CASES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "sum", lambda *_: None)
        results["without sums"] = run("unequal targets")
    results["mixed"] = [torch.ones(2, 3).T * rank, torch.full((3,), 0.1 + rank, dtype=torch.float64), torch.ones(())]
    current_processes().sum(results["mixed"])
    seen = []
    results["dropout"] = [small_run(dropout=0.5, on_row=seen.append), small_run(folder / "whole", dropout=0.5)]
    results["seen"] = without_seconds(seen)
    drawn, results["drawn"] = [], [None, None]
    small_run(loss=lambda *batch: drawn.append(torch.initial_seed()) or F.cross_entropy(*batch))
    dist.all_gather_object(results["drawn"], drawn)
    for dropout in (0.5, 0.0):
        message(Stopped, small_run, folder / f"stopped at {dropout}", dropout, loss=At(4, stop))
    results["resumed"] = small_run(folder / "stopped at 0.5", 0.5)
    results["seeds"] = message(ValueError, run, "full", seed=rank)
    other = Llama(CONFIG, seed=rank).double()
    results["weights"] = message(ValueError, fit, other, texts(), LoRA(rank=2), **OPTIONS)
    results["folders"] = message(ValueError, small_run, folder / ("empty" if rank else "stopped at 0.0"))
    results["batch norms"] = message(ValueError, fit, Normed(), numbers(), FullFineTuning(), **OPTIONS)
    kill = At(4, partial(os.kill, os.getpid(), signal.SIGKILL)) if rank else F.cross_entropy
    results["killed"] = message(ProcessEndedError, small_run, folder / "killed", loss=kill)
    torch.save(results, folder / "results")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes worked, and the results of the first."""
    folder = tmp_path_factory.mktemp("two")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    return folder, torch.load(folder / "results", weights_only=False)


# The same as one process


def largest_difference(one, other):
    """Over all losses, norms and weights of two runs, which have the same steps, rates and tokens."""
    (rows, state), (others, others_state) = one, other
    differences = [0.0]
    for row, twin in zip(rows, others, strict=True):
        assert {name: row[name] for name in ("step", "lr", "tokens")} == {
            name: twin[name] for name in ("step", "lr", "tokens")
        }
        for name in ("train_loss", "validation_loss", "off_domain_loss", "grad_norm"):
            assert (row[name] is None) == (twin[name] is None)
            differences.append(abs((row[name] or 0) - (twin[name] or 0)))
    assert state.keys() == others_state.keys()
    differences += [float((state[name] - others_state[name]).abs().max()) for name in state]
    return max(differences)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(two, case):
    _, results = two
    assert largest_difference(results[case], run(case)) < 1e-10


def test_without_the_sums_two_processes_differ_from_one(two):
    _, results = two
    assert largest_difference(results["without sums"], run("unequal targets")) > 1e-2


def test_sums_keep_dtypes_and_layouts_and_the_first_process_alone_calls_on_row(two):
    _, results = two
    matrix, vector, scalar = results["mixed"]
    assert (matrix.tolist(), matrix.stride()) == (torch.ones(3, 2).tolist(), (1, 3))
    assert vector.tolist() == [1.2000000000000002] * 3
    assert (matrix.dtype, vector.dtype, scalar.item()) == (torch.float32, torch.float64, 2.0)
    assert results["seen"] == results["dropout"][0][0]


def test_dropout_draws_other_numbers_in_each_process_and_step_and_the_same_in_the_same_run(two):
    _, results = two
    assert largest_difference(*results["dropout"]) == 0
    assert largest_difference(results["dropout"][0], small_run(dropout=0.5)) > 1e-3
    first, second = (set(seeds) - {0} for seeds in results["drawn"])  # 0 is the run's, before its first step
    assert len(first) == len(second) == OPTIONS["steps"]
    assert not first & second
    draws = []
    for processes, step in ((Processes(0, 2), 1), (Processes(1, 2), 1), (Processes(0, 2), 2), (Processes(0, 2), 1)):
        with torch.random.fork_rng():
            processes.seed(torch.device("cpu"), 0, step)
            draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[3]
    assert len({tuple(draw) for draw in draws}) == 3


# Stopped and started again


def test_a_stopped_run_ends_bit_identical(two):
    _, results = two
    assert largest_difference(results["resumed"], results["dropout"][1]) == 0


def test_one_process_goes_on_where_two_were_stopped(two, tmp_path):
    folder = shutil.copytree(two[0] / "stopped at 0.0", tmp_path / "copy")
    steps = []
    resumed = small_run(folder, on_row=lambda row: steps.append(row["step"]))
    assert steps == [3, 4, 5]
    assert largest_difference(resumed, small_run()) < 1e-10
    assert largest_difference(resumed, small_run(seed=1)) > 1e-3


def test_a_killed_process_ends_the_other_with_one_sentence_and_a_whole_checkpoint(two, tmp_path):
    folder, results = two
    expected = (
        r"Another process of this run ended, or the system ends them all; the checkpoint in "
        rf"{folder}/killed is whole, at step 2: start the same command again to go on\."
    )
    assert re.fullmatch(expected, results["killed"])
    assert names(folder / "killed") == [CHECKPOINT]
    resumed = small_run(shutil.copytree(folder / "killed", tmp_path / "copy"))
    assert largest_difference(resumed, small_run()) < 1e-10


# What is refused


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ("seeds", "The processes of this run differ: settings.seed is 0 in process 0, but 1 in process 1; give all"),
        ("weights", r"differ: the hash of the weights is '\w{64}' in process 0, but '\w{64}' in process 1; give all"),
        ("folders", "differ: the step of the checkpoint is 2 in process 0, but 0 in process 1; give all the same"),
        ("batch norms", "'1' is a BatchNorm1d, whose statistics would be those of one process's examples; use one"),
    ],
)
def test_what_would_train_something_else_is_refused(two, refused, says):
    _, results = two
    assert re.search(says, results[refused])


def test_one_process_needs_no_check_and_keeps_the_random_numbers_that_it_has():
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        distributed.ALONE.seed(torch.device("cpu"), 0, 1)
        assert torch.equal(torch.get_rng_state(), before)
    assert current_processes() == distributed.ALONE
    distributed.ALONE.check_same({"seed": 1})
    fit(Normed(), numbers(), FullFineTuning(), **OPTIONS)


# torchrun

# The command, which waits in its fifth step for the signal that ends it: the run cannot be over before that comes.
WAITING = """
import os, pathlib, sys, time
from lora_lab import train
from lora_lab.cli import main

def take_step(step, task, order, config, number):
    if number == 5:
        pathlib.Path(__file__).with_name("waits " + os.environ["RANK"]).touch()
        time.sleep(300)
    return plain(step, task, order, config, number)

plain, train.take_step = train.take_step, take_step
sys.exit(main())
"""


def torchrun(*arguments, program=("-m", "lora_lab"), **options):
    """A started torchrun of two processes of the command."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*call, *map(str, arguments)], cwd=ROOT, env=environment, **pipes, **options)


@pytest.fixture
def arguments(tmp_path, tiny_config, chatter):
    """Of a fine-tuning run of a tiny model on a file of sums."""
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(vars(pair)) for pair in sums()), encoding="utf-8")
    model = save_model(Llama(tiny_config, seed=3), tmp_path / "tiny", chatter)
    options = ["--steps", 30, "--eval-examples", 4, "--checkpoint-every", 2, "--device", "cpu"]
    return ["finetune", "--task", tmp_path / "sums.jsonl", "--model", model, "--out", tmp_path / "out", *options]


def waiting(arguments, folder, **options):
    """A started torchrun of a run that has written checkpoints, and of which both processes wait in the fifth step."""
    (folder / "waiting.py").write_text(WAITING, encoding="utf-8")
    started = torchrun(*arguments, program=[folder / "waiting.py"], **options)
    while not all((folder / f"waits {rank}").exists() for rank in range(2)):
        assert started.poll() is None, started.communicate()
        time.sleep(0.01)
    return started


def sentences(text):
    """What the command says on standard error, beside torchrun's own report."""
    return [line for line in text.splitlines() if line.startswith("lora-lab: ")]


def machine(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))["machine"]


def losses(folder):
    rows = json.loads((folder / "history.json").read_text(encoding="utf-8"))["rows"]
    return torch.tensor([[row[name] or 0.0 for name in ("train_loss", "validation_loss")] for row in rows])


def test_torchrun_goes_on_after_a_kill_and_ends_as_one_process_does(arguments, tmp_path, capsys):
    started = waiting(arguments, tmp_path)
    workers = psutil.Process(started.pid).children(recursive=True)
    victim = next(worker for worker in workers if worker.environ().get("RANK") == "1")  # not a process of its own
    victim.kill()
    _, report = started.communicate(timeout=250)
    assert started.returncode == 1
    (sentence,) = sentences(report)
    assert re.search(
        r"Another process of this run ended.*is whole, at step \d+: start the same command again", sentence
    )
    assert names(tmp_path / "out") == ["checkpoint"]
    again = torchrun(*arguments)
    printed, report = again.communicate(timeout=250)
    assert (again.returncode, sentences(report)) == (0, [])
    assert printed.count("2 processes, 1 thread each\n") == printed.count("Saved in") == 1
    (step,) = re.findall(r"at step (\d+)", sentence)
    assert re.findall(r"Going on from step (\d+)", printed) == [step]
    assert names(tmp_path / "out") == [*ADAPTER, "history.json", "result.json"]
    assert command(*arguments, "--out", tmp_path / "one") == 0
    capsys.readouterr()
    assert [machine(tmp_path / out).get("processes") for out in ("out", "one")] == ["2", None]
    torch.testing.assert_close(losses(tmp_path / "out"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-4)


def test_ctrl_c_ends_torchrun_with_one_sentence_that_names_the_checkpoint(arguments, tmp_path):
    started = waiting(arguments, tmp_path, start_new_session=True)  # as a terminal has it
    os.killpg(started.pid, signal.SIGINT)
    printed, report = started.communicate(timeout=250)
    assert started.returncode not in (0, None)
    (sentence,) = sentences(report)
    assert re.fullmatch(
        rf"lora-lab: stopped; the checkpoint in {tmp_path}/out/checkpoint is whole, at step \d+: start the same "
        r"command again to go on\.",
        sentence,
    )
    assert "Going on" not in printed


def test_torchrun_says_once_what_is_wrong(arguments, tmp_path):
    (tmp_path / "file").write_text("mine")
    started = torchrun(*arguments, "--out", tmp_path / "file" / "out")
    _, report = started.communicate(timeout=250)
    assert started.returncode == 1
    (sentence,) = sentences(report)
    assert sentence.endswith("name another folder, or make this one writable.")


def test_other_commands_are_not_for_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert command("doctor") == 1
    assert "torchrun is for lora-lab finetune" in error_line(capsys)


def test_more_processes_than_gpus_are_refused_and_each_process_gets_one(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for gpus, local_rank in ((0, 0), (0, 5), (2, 0), (2, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        distributed._take_gpu()
    assert taken == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="torchrun started 3 processes on this machine, which has 2 GPUs; use --nproc"):
        distributed._take_gpu()
