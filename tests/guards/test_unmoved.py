"""What a run computes and what it stores, held where they were when the package's modules were put into folders.

Literals and the files in ``tests/data`` are from lora_lab 0.1.0 as it was before that (commit 16b8680, where ``fit``,
``History`` and checkpoints were one file, ``lora_lab/train.py``): they were made by the functions of this file, run
with that package. ``sweep`` is a folder of ``ablate`` with two trials.

A loss depends, in its last bits, on the processor: so none is compared to the bit with a literal. Runs are held against
a loop in plain torch instead, below, which shares no code with the package but the models and torch's own
AdamW. Where it takes the operations in the same order, losses and norms must be equal to the last bit; else
it computes in float64.
"""

import hashlib
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import lora_lab
from lora_lab import (
    DoRA,
    FullFineTuning,
    Grid,
    History,
    Lean,
    Llama,
    LlamaConfig,
    LoRA,
    LoRAFA,
    LoRAPlus,
    PartialFineTuning,
    PiSSA,
    RsLoRA,
    Task,
    Trial,
    ablate,
    fit,
    load_adapter,
    lora_layers,
    quantize_nf4,
    save_adapter,
)
from lora_lab.ablation import load
from lora_lab.ablation.packed import Run, fit_packed
from lora_lab.methods import AsItIs
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import IGNORE, Examples, mean_squared_error

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT = "checkpoint.safetensors"
BF16 = torch.bfloat16

pytestmark = pytest.mark.usefixtures("one_thread")


# Models and tasks whose numbers are the same on every machine


def spread(*shape, seed=0):
    """Odd multiples of 1/64 from -41/64 to 39/64, without a pattern that a small model would notice."""
    places = torch.arange(math.prod(shape)) + 100 * seed
    return ((places * places + 7 * places) % 41 * 2 - 41).view(shape) / 64


@torch.no_grad()
def settled(model):
    """The model with such numbers as weights, and norms of ones."""
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        parameter.copy_(torch.ones_like(parameter) if "norm" in name else spread(*parameter.shape, seed=seed))
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 4)
        settled(self)

    def forward(self, x):
        return self.head(F.relu(self.hidden(x)))


def llama(width=16, dtype=torch.float32):
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    return settled(Llama(config)).to(dtype)


def shapes():
    def part(n, seed):
        return Examples(spread(n, 8, seed=seed), (torch.arange(n) + seed) % 4)

    return Task("shapes", part(14, 1), part(5, 2), part(4, 3), part(6, 4))


def sentences():
    """Tokens, of which some do not count; batches of 5 from 14 examples cross the end of an epoch."""

    def part(n, seed):
        ids = ((spread(n, 9, seed=seed) * 64 + 41) / 2).long() % 20
        targets = ids[:, 1:].masked_fill(spread(n, 8, seed=seed + 9) > 0.3, IGNORE)
        targets[:, 0] = ids[:, 1]
        return Examples(ids[:, :-1], targets)

    return Task("sentences", part(14, 1), part(5, 2), part(4, 3), part(6, 4), unit="tokens")


def pictures(dtype=torch.float32):
    def part(n, seed):
        return Examples(spread(n, 64, seed=seed).to(dtype), (torch.arange(n) * 3 + seed) % 10)

    return Task("pictures", part(14, 1), part(5, 2), part(4, 3), part(6, 4))


# Trials are named as before

ALL = {
    "lr": 0.02,
    "seed": 7,
    "steps": 30,
    "batch_size": 4,
    "schedule": "constant",
    "warmup": 2,
    "weight_decay": 0.1,
    "clip": None,
    "eval_every": 6,
    "eval_examples": 50,
}
KEYS = {
    "lora": "99e76749e6917e66",
    "full": "21b5a10ed4e19c51",
    "partial": "53b8e93e715b7685",
    "as it is": "682eff89814b78c3",
    "lora, all set": "69cf084579945611",
    "rslora": "60bf739cecd08728",
    "lora-fa": "30e799907b8ca282",
    "pissa": "a79e2c77f07aea87",
    "dora": "4adbde06d55b3222",
    "lora+": "b7f14dd7bbad2dd4",
    "options": "58acb77b62e38907",
    "few steps": "f850850f47298f84",
    "bound": "1c7b8b0472ed80ca",
}
GRID = [
    "79b2cb6921e79e56",
    "0129e78517c2bdb0",
    "40fb2b5ae31f2500",
    "4441de0f20ad334c",
    "dd736a0e970aadf6",
    "b6bcebf0f4b4388f",
    "9a0e1e334409956e",
    "41200cf0dc0a9c9b",
    "57279d45f4bac2c2",
    "c8e0a0700499dc5f",
    "5f2dc11eb3f09f8c",
    "90de398675f93004",
    "59f0431ffcfc5f72",
    "a9933b6e74fee434",
    "54c55f97d3f0769a",
    "83476df7e6f74b13",
    "9bc9f6679ae6dd7f",
    "14331142e994f100",
    "260b21a9d1527c07",
    "db21bafe105f8f25",
]


def trials():
    usual = {"lr": 1e-3, "steps": 100}
    names = ["q_proj", "v_proj"]
    return {
        "lora": Trial(LoRA(), **usual),
        "full": Trial(FullFineTuning(), **usual),
        "partial": Trial(PartialFineTuning(("head", "norm")), **usual),
        "as it is": Trial(AsItIs(), **usual),
        "lora, all set": Trial(LoRA(rank=4, alpha=2.5, dropout=0.1, targets=names, exclude=("k_proj",)), **usual),
        "rslora": Trial(RsLoRA(rank=16), **usual),
        "lora-fa": Trial(LoRAFA(rank=2, alpha=4), **usual),
        "pissa": Trial(PiSSA(rank=2, targets=names), **usual),
        "dora": Trial(DoRA(dropout=0.05), **usual),
        "lora+": Trial(LoRAPlus(rank=1, ratio=16), **usual),
        "options": Trial(LoRA(), **ALL),
        "few steps": Trial(LoRA(), 1, steps=3),
        "bound": Trial(LoRA(), **usual).bound("0123456789abcdef", "fedcba9876543210"),
    }


def grid():
    options = {"steps": 20, "alpha_per_rank": 2, "schedule": "constant"}
    return Grid([1, 3], [1e-2, 0.1], range(2), [LoRA(), FullFineTuning(), RsLoRA(targets=["head"])], **options)


@pytest.mark.parametrize("name", trials())
def test_a_trial_has_the_key_that_it_had(name):
    assert trials()[name].key == KEYS[name]


def test_a_grid_makes_the_trials_that_it_made_in_their_order():
    assert [trial.key for trial in grid()] == GRID


# What a run says of itself

RUN = {"steps": 4, "lr": 0.02, "batch_size": 5, "seed": 3, "warmup": 1, "eval_every": 1}
HEAD = (
    '{{"task": {}, "method": {}, "settings": {{{}}}, '
    '"trainable_parameters": {}, "total_parameters": {}, "optimizer_bytes": {}}}'
)
TASK = '{"name": "sentences", "fingerprint": "bc25463d402100ce", "unit": "tokens"}'
METHOD = '{"name": "lora", "rank": 2, "alpha": 16.0, "dropout": 0.0, "targets": ["v_proj"], "exclude": []}'
NUMBERS = (96, 4656, 784)
SETTINGS = {
    "default": (
        '"lr": 0.001, "seed": 0, "weight_decay": 0.0, "clip": 1.0, "steps": 3, "batch_size": 8, '
        '"schedule": "cosine", "warmup": 0, "accumulate": 1, "eval_every": 1, "eval_examples": null'
    ),
    "all": (
        '"lr": 0.02, "seed": 7, "weight_decay": 0.1, "clip": null, "steps": 4, "batch_size": 4, '
        '"schedule": "constant", "warmup": 2, "accumulate": 2, "eval_every": 3, "eval_examples": 50'
    ),
    "gradient_checkpointing": (
        '"lr": 0.02, "seed": 3, "weight_decay": 0.0, "clip": 1.0, "steps": 4, "batch_size": 5, '
        '"schedule": "cosine", "warmup": 1, "accumulate": 1, "eval_every": 1, "eval_examples": null, '
        '"gradient_checkpointing": true'
    ),
    "lean": (
        '"lr": 0.02, "seed": 3, "weight_decay": 0.0, "clip": 1.0, "steps": 4, "batch_size": 5, '
        '"schedule": "cosine", "warmup": 1, "accumulate": 1, "eval_every": 1, "eval_examples": null, '
        '"lean": {"base_dtype": null, "checkpoint": false, "threads": 1, "loss_rows": 256}'
    ),
    "lean, all set": (
        '"lr": 0.02, "seed": 3, "weight_decay": 0.0, "clip": 1.0, "steps": 4, "batch_size": 5, '
        '"schedule": "cosine", "warmup": 1, "accumulate": 1, "eval_every": 1, "eval_examples": null, '
        '"lean": {"base_dtype": "torch.bfloat16", "checkpoint": true, "threads": 2, "loss_rows": 5}'
    ),
}
SPECIAL = {
    "default": {"steps": 3, "lr": 1e-3},
    "all": ALL | {"steps": 4, "eval_every": 3, "accumulate": 2},
    "gradient_checkpointing": RUN | {"gradient_checkpointing": True},
    "lean": RUN | {"lean": Lean()},
    "lean, all set": RUN | {"lean": Lean(base_dtype=BF16, checkpoint=True, threads=2, loss_rows=5)},
}


PACKED_TASK = '{"name": "shapes", "fingerprint": "a77d7750073073c7", "unit": "examples"}'
PACKED_METHOD = '{"name": "lora", "rank": RANK, "alpha": 6.0, "dropout": 0.0, "targets": "all-linear", "exclude": []}'
PACKED_SETTINGS = (
    '"lr": LR, "seed": SEED, "weight_decay": 0.0, "clip": 1.0, "steps": 4, "batch_size": 5, '
    '"schedule": "cosine", "warmup": 1, "accumulate": 1, "eval_every": 1, "eval_examples": null, "packed": 3'
)


def head(history):
    """All of a history but its rows, as the text that a checkpoint and a file have."""
    return json.dumps({name: value for name, value in asdict(history).items() if name != "rows"})


@pytest.mark.parametrize("name", SPECIAL)
def test_fit_writes_the_settings_that_it_wrote_in_their_order(name):
    assert head(fit(llama(), sentences(), LoRA(rank=2, targets=["v_proj"]), **SPECIAL[name])) == HEAD.format(
        TASK, METHOD, SETTINGS[name], *NUMBERS
    )


def packed(model, task):
    """Runs of three ranks, and their results in one pack."""
    runs = [Run(LoRA(rank=rank, alpha=6.0), lr, seed) for rank, lr, seed in ((1, 0.02, 3), (2, 0.01, 4), (4, 0.03, 3))]
    options = {name: value for name, value in RUN.items() if name not in ("lr", "seed")}
    return runs, fit_packed(model, task, runs, **options)


def test_fit_packed_writes_the_settings_that_it_wrote_in_their_order():
    runs, results = packed(Net(), shapes())
    numbers = [(24, 106, 208), (48, 130, 400), (96, 178, 784)]
    for run, result, own in zip(runs, results, numbers, strict=True):
        method = PACKED_METHOD.replace("RANK", str(run.method.rank))
        settings = PACKED_SETTINGS.replace("LR", str(run.lr)).replace("SEED", str(run.seed))
        assert head(result.history) == HEAD.format(PACKED_TASK, method, settings, *own)


# What a run stores, where all its numbers are exact

HISTORY = "a143b073a594ddaba2d37f950d82270e6598be94433530e77816fedef425de7a"
FROZEN = "9fe0129842dc45d2f5fca8f03bf549f6d9174a8f77233fd2269a3be8f637e577"
NOTE = "d99ac20f25f3f0d4dedc9d4126c13ee0ca47a6a1ac142a4de4ec661d22219a26"


class Exact(nn.Module):
    """With inputs of 1 and -1 all its sums are of small integers, which no order and no processor rounds."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(4))
            self.hidden.bias.zero_()
            self.head.weight.copy_(3 * torch.eye(4))

    def forward(self, x):
        return self.head(self.hidden(x))


def run_exactly(folder, monkeypatch):
    """One step, too short to change a weight, whose gradient is 2 on the diagonal."""
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float32)
    unseen = [Examples(factor * signs[:n], signs[:n]) for factor, n in ((2, 3), (3, 2), (4, 1))]
    task = Task("exact", Examples(signs, -signs), *unseen, loss=mean_squared_error)
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    model, method = Exact(), PartialFineTuning(("head",))
    options = {"steps": 1, "lr": 1e-30, "batch_size": 4, "clip": 8.0, "seed": 5}
    return model, fit(model, task, method, **options, checkpoint_dir=folder, progress=False)


def test_a_history_is_written_as_it_was(tmp_path, monkeypatch):
    _, history = run_exactly(None, monkeypatch)
    history.save(tmp_path / "history.json")
    assert hashlib.sha256((tmp_path / "history.json").read_bytes()).hexdigest() == HISTORY
    assert History.load(tmp_path / "history.json").rows == history.rows
    assert [row["train_loss"] for row in history.rows] == [None, 16.0]
    assert [row["validation_loss"] for row in history.rows] == [25.0, 25.0]


def read(path):
    """The tensors of a safetensors file, and its note."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - it is no dict


def raw(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_a_checkpoint_is_written_as_it_was(tmp_path, monkeypatch):
    model, history = run_exactly(tmp_path, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    tensors, note = read(tmp_path / CHECKPOINT)
    assert {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in sorted(tensors.items())} == {
        "history": ("torch.uint8", (len(json.dumps(asdict(history))),)),
        "optimizer.head.weight.exp_avg": ("torch.float32", (4, 4)),
        "optimizer.head.weight.exp_avg_sq": ("torch.float32", (4, 4)),
        "optimizer.head.weight.step": ("torch.float32", ()),
        "parameter.head.weight": ("torch.float32", (4, 4)),
        "random.cpu": ("torch.uint8", tuple(torch.get_rng_state().shape)),
    }
    assert torch.equal(tensors["parameter.head.weight"], 3 * torch.eye(4))
    assert torch.allclose(tensors["optimizer.head.weight.exp_avg"], 0.2 * torch.eye(4))
    assert torch.allclose(tensors["optimizer.head.weight.exp_avg_sq"], 0.004 * torch.eye(4))
    assert tensors["optimizer.head.weight.step"] == 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert torch.equal(tensors["random.cpu"], torch.get_rng_state())
    frozen = b"".join(name.encode() + raw(getattr(model.hidden, name[7:])) for name in ("hidden.weight", "hidden.bias"))
    assert hashlib.sha256(frozen).hexdigest() == FROZEN
    start = b"".join(name.encode() + raw(parameter) for name, parameter in Exact().named_parameters())
    assert note.pop("sha256") == checksum(tensors, note)
    assert note == {"frozen": FROZEN, "start": hashlib.sha256(start).hexdigest()}
    assert raw(tensors["history"]) == json.dumps(asdict(history)).encode()
    assert hashlib.sha256(raw(tensors["history"])).hexdigest() == NOTE


def checksum(tensors, note):
    digest = hashlib.sha256(json.dumps(note, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw(tensor))
    return digest.hexdigest()


# A loop in plain torch, to hold runs against


def by_hand(model, task, groups, done=0, stored=None, parts=1, weight_decay=0.0, clip=1.0, **changes):
    """The rows that ``fit`` should write for steps after ``done``, without their seconds.

    Args:
        groups: the optimiser's; "factor" multiplies the learning rate.
        stored: a checkpoint's tensors, whose optimiser and random numbers to go on with.
        parts: micro-batches.
    """
    options = RUN | changes
    steps, size, seed = options["steps"], options["batch_size"], options["seed"]
    peaks = [options["lr"] * group.pop("factor", 1.0) for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    epochs = [torch.Generator().manual_seed(seed + 1_000_003 * epoch) for epoch in range(8)]
    order = torch.cat([torch.randperm(len(task.train), generator=generator) for generator in epochs])

    def error(batch):
        return F.cross_entropy(model(batch.inputs).flatten(0, -2), batch.targets.flatten(), ignore_index=IGNORE)

    def counted(batch):
        return int((batch.targets != IGNORE).sum()) if task.unit == "tokens" else len(batch)

    @torch.no_grad()
    def mean(examples):
        model.eval()
        batches = [examples[slice(start, start + size)] for start in range(0, len(examples), size)]
        total = sum(float(error(batch)) * counted(batch) for batch in batches)
        model.train()
        return total / counted(examples)

    def evaluated(**row):
        return row | {"validation_loss": mean(task.validation), "off_domain_loss": mean(task.off_domain)}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if stored is not None:
            torch.set_rng_state(stored["random.cpu"])
            names = {id(parameter): place(name) for name, parameter in model.named_parameters()}
            for parameter in trained:
                parameter.data.copy_(stored[f"parameter.{names[id(parameter)]}"])
                kept = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {key: stored[f"optimizer.{names[id(parameter)]}.{key}"] for key in kept}
        rows = [] if done else [evaluated(step=0, train_loss=None, lr=None, grad_norm=None, tokens=0)]
        for step in range(done + 1, steps + 1):
            batch = task.train[order[(step - 1) * size : step * size]]
            whole, length = counted(batch), math.ceil(len(batch) / parts)
            optimizer.zero_grad()
            losses = []
            for start in range(0, len(batch), length):
                part = batch[slice(start, start + length)]
                losses.append(error(part) * (counted(part) / whole))
                losses[-1].backward()
            norm = nn.utils.clip_grad_norm_(trained, math.inf if clip is None else clip)
            factor = 0.5 * (1 + math.cos(math.pi * (step - options["warmup"] - 1) / (steps - options["warmup"])))
            factor = step / options["warmup"] if step <= options["warmup"] else factor
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            loss = float(torch.stack([loss.detach() for loss in losses]).sum())
            row = {"step": step, "train_loss": loss, "lr": options["lr"] * factor, "grad_norm": float(norm)}
            rows.append(evaluated(**row, tokens=whole))
    return rows


def place(name):
    """What a parameter of :class:`Adapted` is called in the package."""
    for own, theirs in ((".A", ".lora_A"), (".B", ".lora_B")):
        name = name.removesuffix(own) + theirs if name.endswith(own) else name
    return name


class Adapted(nn.Module):
    """h = W0 x + scaling * B A x."""

    def __init__(self, base, method, generator):
        super().__init__()
        rank, (out, width), dtype = method.rank, base.weight.shape, base.weight.dtype
        self.base = base.requires_grad_(False)
        self.scaling = method.alpha / (math.sqrt(rank) if isinstance(method, RsLoRA) else rank)
        self.dropout = nn.Dropout(method.dropout) if method.dropout else nn.Identity()
        A = nn.init.kaiming_uniform_(torch.empty(rank, width, dtype=dtype), a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(A, requires_grad=not isinstance(method, LoRAFA))
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=dtype))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(self.dropout(x), self.A), self.B) * self.scaling


class Principal(Adapted):
    """PiSSA: A and B begin as the largest singular directions of W0, and what they leave of it is frozen."""

    def __init__(self, base, method, generator):
        super().__init__(base, method, generator)
        U, S, V = torch.linalg.svd(base.weight, full_matrices=False)
        root, rank = (S / self.scaling).sqrt(), method.rank
        self.A.data, self.B.data = torch.diag(root[:rank]) @ V[:rank], U[:, :rank] @ torch.diag(root[:rank])
        self.rest = base.weight - self.scaling * (self.B @ self.A).detach()

    def forward(self, x):
        return F.linear(x, self.rest + self.scaling * self.B @ self.A, self.base.bias)


class Decomposed(Adapted):
    """DoRA: each row of the weight has a trained length, and its direction has an update."""

    def __init__(self, base, method, generator):
        super().__init__(base, method, generator)
        self.length = nn.Parameter(base.weight.norm(dim=1))

    def forward(self, x):
        direction = self.base.weight + self.scaling * self.B @ self.A
        unit = direction / direction.norm(dim=1, keepdim=True).detach()
        return F.linear(x, self.length[:, None] * unit, self.base.bias)


def adapt(model, method, seed=3):
    """Adapters on all linear layers but a Llama's head, or on the targets; and the optimiser's groups."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    kind = {PiSSA: Principal, DoRA: Decomposed}.get(type(method), Adapted)
    layers = []
    for name, module in list(model.named_modules()):
        chosen = name != "lm_head" if method.targets == "all-linear" else name.endswith(tuple(method.targets))
        if isinstance(module, nn.Linear) and chosen:
            layers.append(kind(module, method, generator))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[-1])
    if isinstance(method, LoRAPlus):
        As, Bs = [layer.A for layer in layers], [layer.B for layer in layers]
        return [{"params": As}, {"params": Bs, "factor": method.ratio}]
    return trainable(model)


def trainable(model):
    return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history.rows]


def assert_near(rows, expected, tolerance):
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == (value if value is None else pytest.approx(value, rel=tolerance, abs=0)), name


# Runs that take the loop's operations in its order: equal to the last bit, in float32

LLAMA, NET = (llama, sentences()), (lambda: DigitsMLP(width=16), pictures())
BOTH = pytest.mark.parametrize(("make", "task"), [LLAMA, NET], ids=["llama", "net"])
EXACT = [LoRA(rank=2), RsLoRA(rank=3), LoRAPlus(rank=2, ratio=5.0), LoRAFA(rank=2), LoRA(rank=2, dropout=0.25)]


@BOTH
@pytest.mark.parametrize("method", EXACT, ids=["lora", "rslora", "lora+", "lora-fa", "dropout"])
def test_lora_and_its_kin_equal_the_loop_to_the_last_bit(make, task, method):
    model = make()
    expected = by_hand(model, task, adapt(model, method))
    assert without_seconds(fit(make(), task, method, **RUN)) == expected
    assert expected[-1]["validation_loss"] != expected[0]["validation_loss"]


@BOTH
def test_full_fine_tuning_equals_the_loop_to_the_last_bit(make, task):
    model = make()
    expected = by_hand(model, task, trainable(model), weight_decay=0.1, clip=None)
    assert without_seconds(fit(make(), task, FullFineTuning(), **RUN, weight_decay=0.1, clip=None)) == expected


@pytest.mark.parametrize(("make", "task", "part"), [(*LLAMA, "lm_head"), (*NET, "head")], ids=["llama", "net"])
def test_partial_fine_tuning_equals_the_loop_to_the_last_bit(make, task, part):
    model = make().requires_grad_(False)
    model.get_submodule(part).requires_grad_(True)
    expected = by_hand(model, task, trainable(model))
    assert without_seconds(fit(make(), task, PartialFineTuning((part,)), **RUN)) == expected


@BOTH
def test_a_batch_in_two_parts_equals_the_loop_to_the_last_bit(make, task):
    model, method = make(), LoRA(rank=2)
    expected = by_hand(model, task, adapt(model, method), parts=2)
    assert without_seconds(fit(make(), task, method, **RUN, accumulate=2)) == expected


def test_gradient_checkpointing_equals_the_loop_to_the_last_bit():
    model, method = llama(), LoRA(rank=2)
    expected = by_hand(model, sentences(), adapt(model, method))
    assert without_seconds(fit(llama(), sentences(), method, **RUN, gradient_checkpointing=True)) == expected


# Runs whose sums are in another order: in float64


def net64():
    return DigitsMLP(width=16).double()


def llama64(width=16):
    return llama(width, torch.float64)


BOTH64 = pytest.mark.parametrize(
    ("make", "task"), [(llama64, sentences()), (net64, pictures(torch.float64))], ids=["llama", "net"]
)


@BOTH64
@pytest.mark.parametrize("method", [PiSSA(rank=2), DoRA(rank=2)], ids=["pissa", "dora"])
def test_pissa_and_dora_are_what_the_loop_makes_of_their_equations(make, task, method):
    model = make()
    expected = by_hand(model, task, adapt(model, method))
    assert_near(without_seconds(fit(make(), task, method, **RUN)), expected, 1e-9)


LEANS = [Lean(), Lean(checkpoint=True), Lean(threads=2)]


@pytest.mark.parametrize("lean", LEANS, ids=["lean", "checkpoint", "threads"])
def test_a_lean_run_is_the_loops(lean):
    model, method = llama64(), LoRA(rank=2)
    expected = by_hand(model, sentences(), adapt(model, method))
    assert_near(without_seconds(fit(llama64(), sentences(), method, **RUN, lean=lean)), expected, 1e-9)


class Rounded(nn.Module):
    """A linear layer in bfloat16 for what is in float32."""

    def __init__(self, layer):
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().to(BF16), requires_grad=False)

    def forward(self, x):
        return F.linear(x.to(BF16), self.weight).to(x.dtype)


def test_a_lean_run_on_a_base_in_bfloat16_is_that_of_its_rounded_layers():
    model, method = llama(), LoRA(rank=2)
    groups = adapt(model, method)
    for module in [*model.modules()]:
        if isinstance(module, Adapted):
            module.base = Rounded(module.base)
    model.lm_head = Rounded(model.lm_head)
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.to(BF16).float()
    expected = by_hand(model, sentences(), groups, lr=1e-3)
    found = without_seconds(fit(llama(), sentences(), method, **RUN | {"lr": 1e-3}, lean=Lean(base_dtype=BF16)))
    assert_near(found[:1], expected[:1], 3e-4)  # a float32 base is 1e-3 away
    assert_near(found, expected, 1e-2)  # AdamW makes whole steps of gradients that are mostly rounding


# Dettmers et al. 2023, appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_a_run_on_a_base_in_nf4_is_that_of_its_levels():
    def base():
        model = llama64(64)  # each row of most matrices is one block
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.25)
        return model

    model, method, levels = base(), LoRA(rank=2), torch.tensor(NF4, dtype=torch.float64)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            blocks = module.weight.data.view(-1, 64)
            scale = blocks.abs().amax(1, keepdim=True)
            nearest = ((blocks / scale)[..., None] - levels).abs().argmin(-1)
            module.weight.data = (levels[nearest] * scale).view_as(module.weight)
    expected = by_hand(model, sentences(), adapt(model, method))
    quantized = base()
    quantize_nf4(quantized, double=False)
    assert_near(without_seconds(fit(quantized, sentences(), method, **RUN)), expected, 1e-6)


@BOTH64
def test_each_run_of_a_pack_is_the_loops(make, task):
    runs, results = packed(make(), task)
    for run, result in zip(runs, results, strict=True):
        model = make()
        groups = adapt(model, run.method, run.seed)
        expected = by_hand(model, task, groups, lr=run.lr, seed=run.seed)
        assert_near(without_seconds(result.history), expected, 1e-9)


# Adapters and sweeps

# SHA-256 of the config's file, and over the weights.
SAVED = {
    "lora": (
        "be53ca78a6b31e49354661d3a2bef731c6ebd13d00b226dd360d4159e616b1c0",
        "d4cba507b8b05ba7abf8caaa18a01cb31eb1b5290521000da2368399e4cfe683",
    ),
    "embedding": (
        "20fdfb0f3f1555795c04df4d12e7ddef6b093364ec7f28aa520317dd01ab07a4",
        "b5accb03dabf362eeeb569453869609786ff53988facf542c72cc42e51ce68e3",
    ),
    "rslora": (
        "6a0d3feba78230f1d67e914a585dff38a7646a9b7d80379a27be68109ffa6256",
        "dad797c23d3c46613108f7a5f62d75537d442dcdd202eb1067a7720dc3def0de",
    ),
    "dora": (
        "5832e80b555203597a920d11d2332a3570fcc710f4cfca70af6c7a8bc76b1d89",
        "c0fb7cdd1efa24f62262be9e1a5efcc31523a768438d3a381dcd0849b832dbd1",
    ),
    "pissa": (
        "f02111f0575a254c5e22712bbf416dad2911e4a11026544bc94979848fe53ac6",
        "314efe3617d96d9697163a54d935a327933988da138da1bdd1f479c0b4194d58",
    ),
    "lora+": (
        "6df3e4326ce9079027f4f90f4896495e1270120d102479da9df58e979d7c53e8",
        "dbcd8f866c46edba735ef869284bb5c5f23e456a499afa9d35a90ee4e29f5901",
    ),
    "lora-fa": (
        "6df3e4326ce9079027f4f90f4896495e1270120d102479da9df58e979d7c53e8",
        "dbcd8f866c46edba735ef869284bb5c5f23e456a499afa9d35a90ee4e29f5901",
    ),
}
KINDS = {
    "lora": LoRA(rank=2, alpha=3.0, dropout=0.25, targets=["q_proj", "down_proj"]),
    "embedding": LoRA(rank=2, alpha=3.0, targets=["embed_tokens", "v_proj"]),
    "rslora": RsLoRA(rank=3, alpha=8.0),
    "dora": DoRA(rank=2, targets=["q_proj", "up_proj"]),
    "pissa": PiSSA(rank=2, targets=["k_proj"]),
    "lora+": LoRAPlus(rank=1),
    "lora-fa": LoRAFA(rank=1),
}


def whole(model, method):
    """The model with an adapter of whole numbers, so that no arithmetic is in what is saved."""
    method.prepare(model, 0)
    with torch.no_grad():
        for seed, layer in enumerate(lora_layers(model).values()):
            for part in layer.parts:
                getattr(layer, part).copy_(64 * spread(*getattr(layer, part).shape, seed=seed))
    return model


def digests(folder):
    tensors, _ = read(folder / "adapter_model.safetensors")
    config = (folder / "adapter_config.json").read_bytes()
    return hashlib.sha256(config).hexdigest(), checksum(tensors, {})


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_is_saved_as_it_was(name, tmp_path):
    model = whole(llama(), KINDS[name])
    save_adapter(model, tmp_path, base="a/model")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}  # with a card since 0.2
    assert digests(tmp_path) == SAVED[name]
    twin = llama()
    load_adapter(twin, tmp_path)
    assert list(lora_layers(twin)) == list(lora_layers(model))
    for layer, other in zip(lora_layers(twin).values(), lora_layers(model).values(), strict=True):
        assert torch.equal(layer.delta(), other.delta())


SWEEP = [Trial(LoRA(rank=2), 0.02, 3, steps=2, batch_size=5), Trial(FullFineTuning(), 0.01, 4, steps=2, batch_size=5)]


def test_a_sweep_of_before_is_read_and_not_run_again(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(DATA / "sweep", tmp_path / "sweep"))
    stored = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(stored) == 2
    monkeypatch.setattr("lora_lab.ablation.run.fit", None)
    frame = ablate(Net, shapes(), SWEEP, folder, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == stored
    assert frame.equals(load(folder)[list(frame.columns)])
    assert set(frame["key"]) == {name.removesuffix(".json") for name in stored}
    results = {result["key"]: result for result in map(json.loads, stored.values())}
    for key, row in frame[frame["step"] == 2].set_index("key").iterrows():
        last = results[key]["history"]["rows"][-1]
        assert (row["test_loss"], row["train_loss"]) == (results[key]["test_loss"], last["train_loss"])
    monkeypatch.undo()
    again = ablate(Net, shapes(), SWEEP, progress=False)
    assert list(again["key"]) == list(frame["key"])
    for name in ("train_loss", "validation_loss", "off_domain_loss", "gap", "test_loss"):
        assert list(again[name]) == pytest.approx(list(frame[name]), rel=1e-4, abs=1e-6, nan_ok=True)
    assert set(again["lora_lab"]) == {lora_lab.__version__}


def test_a_new_result_has_the_entries_of_one_of_before(tmp_path):
    ablate(Net, shapes(), SWEEP, tmp_path, progress=False)
    for path in (DATA / "sweep").iterdir():
        assert layout(json.loads((tmp_path / path.name).read_text())) == layout(json.loads(path.read_text()))


def layout(value):
    """A value of JSON with its keys in their order, and kinds in place of values."""
    if isinstance(value, dict):
        return [(name, layout(entry)) for name, entry in value.items()]
    return [layout(entry) for entry in value] if isinstance(value, list) else type(value).__name__
