"""What several test files share. Fixtures that several share are in the conftest.py of their folder."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import torch

from lora_lab import cli
from lora_lab.costs.bill import MIB, Bill, Moment
from lora_lab.lora import LoRALinear
from lora_lab.tasks import Examples, Pair, Task, from_pairs

ROOT = Path(__file__).parents[1]  # the repository
COMMIT = 20 * "5a"  # has the form of a git commit
PIXELS = torch.randn(5, 64, generator=torch.Generator().manual_seed(7))  # five inputs in the shape of the digits
WORDS = ("red", "tree", "house", "big", "sea", "old", "cat", "sun", "ship", "fox")
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins


# Models and adapters


class BetweenLinear(LoRALinear):
    """A variant of somebody else's: h = W0 x + scaling * B R A x, with a matrix R between the factors."""

    parts = (*LoRALinear.parts, "lora_R")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_R = torch.nn.Parameter(torch.eye(self.rank).flip(0))

    def forward(self, x):
        return self.base(x) + x @ self._delta().T

    def _delta(self):
        return self.scaling * (self.lora_B @ self.lora_R @ self.lora_A)


def saved_bytes(forward, model):
    """The bytes that autograd saves while ``forward()`` runs, without parameters and buffers, each storage once."""
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # held until the end, so that no address is used twice
    for tensor in [*model.parameters(), *model.buffers()]:
        sizes.pop(tensor.untyped_storage()._cdata, None)
    del result
    return sum(sizes.values())


@torch.no_grad()
def randomise(model, seed=1, size=0.3):
    """Give every adapter random numbers, ours or PEFT's, so that it does something; returns the model.

    A and B are drawn, DoRA's lengths multiplied by a factor from 0.5 to 1.5.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
        elif "lora_" in name:
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def randomise_all(model, seed=1, size=0.3):
    """Give every parameter random numbers, biases too, and those of norms numbers around 1; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.copy_(centre + size * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def enlarge(model, factor):
    """Multiply every matrix, so that attention matters and logits are far apart; returns the model."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(factor)
    return model


@torch.no_grad()
def perturbed(model, seed=1, size=0.1):
    """A copy with random numbers added to every parameter."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in twin.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return twin


def snapshot(model):
    """Everything that a refused call must leave alone: modules and their modes, tensors, trainability and values."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return modules, [(name, id(t), t.requires_grad, t._version, t.detach().clone().tolist()) for name, t in tensors]


@torch.no_grad()
def logits(model, *inputs, **options):
    """What a model returns, transformers' or ours, without a graph."""
    out = model(*inputs, **options)
    return out if isinstance(out, torch.Tensor) else out.logits


def relative_error(found, expected):
    """The norm of the difference over the norm of what is expected, in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


# Data


def random_ids(batch, length, vocabulary=260, seed=0):
    """Token ids (batch, length); the tiny Llama knows 260."""
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def small_task(loss=None, n_train=12, dtype=torch.float32):
    """Random numbers in the shape of the digits."""
    parts = {}
    for seed, (part, n) in enumerate({"train": n_train, "validation": 7, "test": 5, "off_domain": 6}.items()):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(n, 64, generator=generator, dtype=dtype)
        parts[part] = Examples(inputs, torch.randint(0, 10, (n,), generator=generator))
    return Task("small", **parts, **({"loss": loss} if loss else {}))


def sentiment(tokenizer):
    """Three classes, of which one is the majority."""
    pairs = [Pair(f"{i} apples?", ("good", "bad", "good", "so-so")[i % 4]) for i in range(40)]
    return from_pairs(
        tokenizer, pairs, name="sentiment", metric="classification", about="apples", licence="a licence of apples"
    )


def french(tokenizer):
    """Two words each, of which the second stays as it is; what becomes of the first no dictionary can know."""
    pairs = [
        Pair(f"Translate into French: {first} {second}", ("le ", "la ")[(i * j) % 3 % 2] + second, first + second)
        for i, first in enumerate(WORDS)
        for j, second in enumerate(WORDS[:4])
    ]
    return from_pairs(tokenizer, pairs, name="translate-fr", metric="translation", about="names", licence="theirs")


def sums(count=40):
    """Pairs of a question and its answer: "3 plus one?", "4"."""
    return [Pair(f"{i} plus one?", str(i + 1)) for i in range(count)]


class ByteTokenizer:
    """The simplest tokenizer: a token is a byte."""

    def encode(self, text):
        return list(text.encode())


HOSTILE = [None, True, "banana", -1.5, math.nan, math.inf, 10**400, [], {}, [[1]], {"a": {}}]


def places(content, path=()):
    """Every place in nested dicts and lists, as the names that lead there; of a list its last one."""
    if isinstance(content, list) and content:
        content = {-1: content[-1]}
    for name in content if isinstance(content, dict) else ():
        yield (*path, name)
        yield from places(content[name], (*path, name))


class Stopped(BaseException):
    """Stands for whatever ends a run."""


# Lessons


def words(text):
    """The text with single spaces."""
    return " ".join(text.split())


def solutions(notebook):
    """For each exercise the lines that a learner has to find: those of its solution that the learner's lesson lacks."""
    # Its libraries for notebooks take over a second to import, and workers that run tests' functions import this file.
    from lora_lab.course import copies

    shown = words("\n".join(cell.source for cell in copies.student(notebook).cells))
    source = "\n".join(cell.source for cell in notebook.cells)
    blocks = re.findall(rf"{copies.BEGIN}\n(.*?)\n *{copies.END}", source, re.DOTALL)
    lines = [map(words, block.splitlines()) for block in blocks]
    return [[line for line in block if len(line) > 12 and line not in shown] for block in lines]


# Files, commands, processes


def names(folder):
    """The names of a folder's files, in order."""
    return sorted(path.name for path in folder.iterdir())


def llama_folder(folder, config):
    """The folder, with a config.json of a Llama without weights in it."""
    heads = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    stored = {name: value for name, value in vars(config).items() if value is not None} | heads
    (folder / "config.json").write_text(json.dumps(stored | {"model_type": "llama"}))
    return folder


def command(*arguments):
    """The exit status of ``lora-lab`` with these arguments, run in this process."""
    return cli.main(list(map(str, arguments)))


def error_line(capsys):
    """The one line that a refused command printed to stderr; it must print nothing to stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("lora-lab: ")
    return captured.err


def printed_json(capsys):
    """The one JSON document that a command printed to stdout, without NaN or infinity, and what it wrote to stderr."""
    captured = capsys.readouterr()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(captured.out, parse_constant=refuse), captured.err


def run_python(code, *arguments, **environment):
    """Run code in a Python process of its own, which must end well, with environment variables by keyword."""
    call = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def run_killed(function, moment):
    """Call the function in a process that is killed at a moment: before one of its renames, or after seconds."""
    if (pid := os.fork()) == 0:
        renames = 0

        def hook(event, _):
            nonlocal renames
            if event == "os.rename" and isinstance(moment, int):
                renames += 1
                if renames == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        function()
        os._exit(0)
    if isinstance(moment, float):
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# Figures


def legend(ax):
    return said(ax.get_legend().get_texts())


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def by_label(ax):
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def said(artists):
    return [each.get_text() for each in artists]


def bounds(container):
    """The points of a line with bars: x, y, and both ends."""
    line, _, (bars,) = container.lines
    return [(*point, *segment[:, 1].tolist()) for point, segment in zip(points(line), bars.get_segments(), strict=True)]


def bill(timeline=(), **parts):
    names = {"frozen": "frozen weights", "state": "optimiser state", "mlp": "saved: MLP", "norms": "saved: norms"}
    return Bill(
        {names.get(part, part): size * MIB for part, size in parts.items()}, "backward", "predicted", "a", {}, timeline
    )


def moments(*rows):
    names = {"frozen": "frozen weights", "mlp": "saved: MLP", "loss": "logits and loss"}
    return [
        Moment(phase, {names[part]: size * MIB for part, size in parts.items()}, operation)
        for operation, (phase, parts) in enumerate(rows)
    ]


STEP = moments(
    ("before", {"frozen": 10}),
    ("forward", {"frozen": 10, "mlp": 2}),
    ("forward", {"frozen": 10, "mlp": 4, "loss": 1}),
    ("backward", {"frozen": 10, "mlp": 4, "loss": 3}),
    ("backward", {"frozen": 10, "mlp": 1}),
    ("optimiser step", {"frozen": 10}),
)
_EARLY = moments(*[("forward", {"frozen": 10})] * 40, *[("backward", {"frozen": 10})] * 40)
_HIGH = Moment("backward", {"frozen weights": 10 * MIB, "logits and loss": 7 * MIB}, 80)
_LATE = [Moment("backward", {"frozen weights": 10 * MIB}, operation) for operation in range(81, 121)]
PEAKED = bill([*_EARLY, _HIGH, *_LATE], frozen=10, loss=7)  # the peak is one operation, in the middle


def sweep(losses):
    """What ablate returns, in short: {method: {lr: [validation loss of each seed]}}."""
    rows = [
        {"method": method, "rank": 4, "lr": lr, "seed": seed, "steps": 9, "step": step, "outcome": "done"}
        | {"validation_loss": loss + (9 - step)}
        for method, by_rate in losses.items()
        for lr, values in by_rate.items()
        for seed, loss in enumerate(values)
        for step in (0, 9)
    ]
    return pandas.DataFrame(rows)


LOSSES = {
    "LoRA": {0.01: [0.8, 0.9], 0.02: [0.4, 0.6]},
    "DoRA": {0.01: [0.4, 0.5], 0.02: [0.7, 0.9]},
    "LoRA+": {0.02: [0.3, 0.35]},
}
