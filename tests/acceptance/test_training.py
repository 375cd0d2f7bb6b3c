"""Training: each method's losses are those of a loop in plain torch, and those of before; a stopped run goes on.

A run is held against a loop that shares no code with the package but the models and torch's own AdamW. Where it takes
the operations in the same order, losses and norms must be equal to the last bit; else it computes in float64.
``losses.json`` holds the losses of fixed-seed runs of each method in float64.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_lab as ll
from lora_lab import (
    DoRA,
    FullFineTuning,
    Lean,
    Llama,
    LlamaConfig,
    LoRA,
    LoRAFA,
    LoRAPlus,
    PartialFineTuning,
    PiSSA,
    RsLoRA,
    Trial,
    ablate,
    fit,
    quantize_nf4,
)
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import IGNORE, Examples, Task

LOSSES = json.loads(Path(__file__).with_name("losses.json").read_text(encoding="utf-8"))
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


def llama(width=16, dtype=torch.float32):
    """Two layers of four heads of 4 numbers that share two keys and values; it knows 20 tokens."""
    return settled(Llama(LlamaConfig(20, width, 24, 2, 4, 2, 4))).to(dtype)


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


RUN = {"steps": 4, "lr": 0.02, "batch_size": 5, "seed": 3, "warmup": 1, "eval_every": 1}


# A loop in plain torch, to hold runs against


def by_hand(model, task, groups, accumulate=1, weight_decay=0.0, clip=1.0, **changes):
    """Return the rows that ``fit`` should write, without their seconds.

    Args:
        groups: the optimiser's; "factor" multiplies the learning rate.
        accumulate: micro-batches.
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
        rows = [evaluated(step=0, train_loss=None, lr=None, grad_norm=None, tokens=0)]
        for step in range(1, steps + 1):
            batch = task.train[order[(step - 1) * size : step * size]]
            whole, length = counted(batch), math.ceil(len(batch) / accumulate)
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


def adapt(model, method, seed):
    """Put adapters on all linear layers but a Llama's head, or on the targets, and return them."""
    generator = torch.Generator().manual_seed(seed)
    kind = {PiSSA: Principal, DoRA: Decomposed}.get(type(method), Adapted)
    layers = []
    for name, module in list(model.named_modules()):
        chosen = name != "lm_head" if method.targets == "all-linear" else name.endswith(tuple(method.targets))
        if isinstance(module, nn.Linear) and chosen:
            layers.append(kind(module, method, generator))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[-1])
    return layers


def prepare(model, method, seed=3):
    """Make a model ready for a method, and return the optimiser's groups."""
    model.requires_grad_(isinstance(method, FullFineTuning))
    for part in getattr(method, "modules", ()):
        model.get_submodule(part).requires_grad_(True)
    layers = adapt(model, method, seed) if isinstance(method, LoRA) else []
    if isinstance(method, LoRAPlus):
        As, Bs = [layer.A for layer in layers], [layer.B for layer in layers]
        return [{"params": As}, {"params": Bs, "factor": method.ratio}]
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
ON_BOTH = {
    "lora": (LoRA(rank=2), {}),
    "rslora": (RsLoRA(rank=3), {}),
    "lora+": (LoRAPlus(rank=2, ratio=5.0), {}),
    "lora-fa": (LoRAFA(rank=2), {}),
    "dropout": (LoRA(rank=2, dropout=0.25), {}),
    "in two parts": (LoRA(rank=2), {"accumulate": 2}),
    "full": (FullFineTuning(), {"weight_decay": 0.1, "clip": None}),
}
EXACT = {f"{name}, llama": (*LLAMA, *row) for name, row in ON_BOTH.items()}
EXACT |= {f"{name}, net": (*NET, *row) for name, row in ON_BOTH.items()}
EXACT |= {"partial, llama": (*LLAMA, PartialFineTuning(("lm_head",)), {})}
EXACT |= {"partial, net": (*NET, PartialFineTuning(("head",)), {})}
EXACT |= {"checkpointing": (*LLAMA, LoRA(rank=2), {"gradient_checkpointing": True})}


@pytest.mark.parametrize("name", EXACT)
def test_a_run_equals_the_loop_to_the_last_bit(name):
    make, task, method, options = EXACT[name]
    model = make()
    expected = by_hand(model, task, prepare(model, method), **options)
    assert without_seconds(fit(make(), task, method, **RUN, **options)) == expected
    assert expected[-1]["validation_loss"] != expected[0]["validation_loss"]


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
    expected = by_hand(model, task, prepare(model, method))
    assert_near(without_seconds(fit(make(), task, method, **RUN)), expected, 1e-9)


LEANS = [Lean(), Lean(checkpoint=True), Lean(threads=2)]


@pytest.mark.parametrize("lean", LEANS, ids=["lean", "checkpoint", "threads"])
def test_a_lean_run_is_the_loops(lean):
    model, method = llama64(), LoRA(rank=2)
    expected = by_hand(model, sentences(), prepare(model, method))
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
    groups = prepare(model, method)
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
    expected = by_hand(model, sentences(), prepare(model, method))
    quantized = base()
    quantize_nf4(quantized, double=False)
    assert_near(without_seconds(fit(quantized, sentences(), method, **RUN)), expected, 1e-6)


@BOTH64
def test_each_trial_of_a_pack_is_the_loops(make, task):
    options = {name: value for name, value in RUN.items() if name not in ("lr", "seed")}
    runs = [(1, 0.02, 3), (2, 0.01, 4), (4, 0.03, 3)]
    trials = [Trial(LoRA(rank, alpha=6.0), lr, seed, **options) for rank, lr, seed in runs]
    frame = ablate(make, task, trials, engine="packed", progress=False)
    for rank, lr, seed in runs:
        model = make()
        expected = by_hand(model, task, prepare(model, LoRA(rank, alpha=6.0), seed), lr=lr, seed=seed)
        rows = frame[frame["rank"] == rank]
        for column in ("validation_loss", "off_domain_loss"):
            assert rows[column].tolist() == pytest.approx([row[column] for row in expected], rel=1e-9)


# What each method's losses were

METHODS = {
    "full": FullFineTuning(),
    "partial": PartialFineTuning(("head",)),
    "lora": LoRA(rank=2, dropout=0.0),
    "rslora": RsLoRA(rank=3),
    "lora-fa": LoRAFA(rank=2),
    "lora+": LoRAPlus(rank=2, ratio=4.0),
    "pissa": PiSSA(rank=2),
    "dora": DoRA(rank=2),
}


def losses(make, task, method, **options):
    rows = fit(make(), task, method, **RUN | {"lr": 0.005, "eval_every": 2} | options).rows
    return [[row["train_loss"] for row in rows[1:]], [rows[-1]["validation_loss"], rows[-1]["off_domain_loss"]]]


@pytest.mark.parametrize("name", METHODS)
def test_losses_of_a_fixed_seed_are_those_of_before(name):
    found = {"net": losses(net64, pictures(torch.float64), METHODS[name])}
    if name != "partial":
        found["llama"] = losses(llama64, sentences(), METHODS[name])
    assert found.keys() == LOSSES[name].keys()
    for model, expected in LOSSES[name].items():
        for values, others in zip(found[model], expected, strict=True):
            assert values == pytest.approx(others, rel=1e-6)
    assert all(LOSSES[name] != other for method, other in LOSSES.items() if method != name)


def test_another_seed_gives_other_losses():
    first, second = (losses(net64, pictures(torch.float64), LoRA(rank=2), seed=seed) for seed in (3, 4))
    assert first != second


# Stopped and started again


class Stopped(Exception):
    """Ends a run."""


STOPPED = {
    "LoRA with dropout": (LoRA(rank=2, dropout=0.25), {}),
    "full fine-tuning": (FullFineTuning(), {}),
    "DoRA in micro-batches": (DoRA(rank=2), {"accumulate": 2}),
    "lean": (LoRA(rank=2), {"lean": Lean()}),
}


@pytest.mark.parametrize("name", STOPPED)
@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, name, step):
    method, more = STOPPED[name]
    options = RUN | more

    def stop(row):
        if row["step"] == step:
            raise Stopped

    straight = llama()
    expected = fit(straight, sentences(), method, **options)
    with pytest.raises(Stopped):
        fit(llama(), sentences(), method, **options, checkpoint_dir=tmp_path, checkpoint_every=1, on_row=stop)
    resumed, seen = llama(), []
    found = fit(resumed, sentences(), method, **options, checkpoint_dir=tmp_path, on_row=seen.append)
    assert [row["step"] for row in seen] == list(range(5))[-len(seen) :]
    assert 0 < len(seen) < 5  # it went on, and did not begin again
    assert without_seconds(found) == without_seconds(expected)
    assert all(map(torch.equal, resumed.state_dict().values(), straight.state_dict().values()))


def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path):
    fit(llama(), sentences(), LoRA(rank=2), **RUN, checkpoint_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for method, changes in ((LoRA(rank=3), {}), (LoRA(rank=2), {"lr": 0.5}), (LoRA(rank=2), {"seed": 9})):
        with pytest.raises(ValueError, match="checkpoint"):
            fit(llama(), sentences(), method, **RUN | changes, checkpoint_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_history_is_saved_and_loaded(tmp_path):
    history = fit(llama(), sentences(), LoRA(rank=2), **RUN)
    history.save(tmp_path / "history.json")
    again = type(history).load(tmp_path / "history.json")
    assert again.rows == history.rows
    assert again.curve("validation_loss") == history.curve("validation_loss")


def test_learning_goes_on_with_an_adapter_that_was_trained_before(tmp_path):
    model = llama()
    fit(model, sentences(), LoRA(rank=2), **RUN)
    before = ll.evaluate(model, sentences())
    fit(model, sentences(), ll.ContinueLoRA(), **RUN)
    assert ll.evaluate(model, sentences()) < before
