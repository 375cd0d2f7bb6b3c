"""A run that is stopped at any moment and started again ends, bit for bit, where one that was not stopped ends."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lora_lab import FullFineTuning, LoRA, PartialFineTuning, checkpoint, fit
from lora_lab.history import DivergedError
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.tasks import Examples, Task
from tests.helpers import Stopped, run_killed, snapshot

CHECKPOINT = "checkpoint.safetensors"
STEPS, EVERY = 9, 2  # batches of 4 from 10 examples: nine steps cross three ends of an epoch


class Normed(nn.Module):
    """A net with buffers that change in training, and with dropout."""

    def __init__(self, width=16):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.hidden, self.norm = nn.Linear(64, width), nn.BatchNorm1d(width)
            self.dropout, self.head = nn.Dropout(0.2), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.dropout(F.relu(self.norm(self.hidden(x)))))


KINDS = {
    "lora": (lambda: DigitsTransformer(width=16, layers=1, heads=2), LoRA(rank=2, alpha=6, dropout=0.2)),
    "full": (Normed, FullFineTuning()),
    "lora on batch norm": (Normed, LoRA(rank=2, dropout=0.2)),
    "partial": (Normed, PartialFineTuning(("head",))),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def task(loss=None, shift=0.0):
    def part(n, seed):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(n, 64, generator=generator) + shift
        return Examples(inputs, torch.randint(0, 10, (n,), generator=generator))

    return Task("small", part(10, 0), part(5, 1), part(5, 2), part(5, 3), **({"loss": loss} if loss else {}))


def stopping(step=None, calls=None):
    """A loss that ends the run in the forward pass of one training step, and notes each training step."""
    calls = calls if calls is not None else []

    def loss(model, inputs, targets):
        if torch.is_grad_enabled():
            calls.append(None)
            if len(calls) == step:
                raise Stopped
        return F.cross_entropy(model(inputs), targets)

    return loss


def run(kind, folder=None, loss=None, model=None, method=None, **options):
    make, usual = KINDS[kind]
    model = model if model is not None else make()
    options = {"steps": STEPS, "lr": 0.01, "batch_size": 4, "eval_every": 3} | options
    if folder is not None:
        options = {"checkpoint_every": EVERY} | options
    data = options.pop("task", None) or task(loss or stopping())
    return model, fit(model, data, method or usual, checkpoint_dir=folder, **options)


def interrupt(kind, folder, step, **options):
    with pytest.raises(Stopped):
        run(kind, folder, stopping(step), **options)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_end(one, other):
    (model, history), (twin, again) = one, other
    assert without_seconds(history.rows) == without_seconds(again.rows)
    assert (history.method, history.settings, history.task) == (again.method, again.settings, again.task)
    assert history.optimizer_bytes == again.optimizer_bytes > 0
    state, twins = model.state_dict(), twin.state_dict()
    assert state.keys() == twins.keys()
    assert [name for name in state if not torch.equal(state[name], twins[name])] == []


# Stopped by an exception, at every step


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_stopped_within_any_step_ends_bit_identical(tmp_path, kind, step):
    interrupt(kind, tmp_path, step)
    calls = []
    torch.manual_seed(step)  # what happened outside must not matter
    resumed = run(kind, tmp_path, stopping(calls=calls))
    assert len(calls) == STEPS - (step - 1) // EVERY * EVERY  # it went on, and did not begin anew
    assert_same_end(resumed, run(kind))


@ALL
def test_a_run_stopped_again_and_again_ends_bit_identical(tmp_path, kind):
    for step in (3, 3, 1, 4):  # counted from each start
        interrupt(kind, tmp_path, step)
    assert_same_end(run(kind, tmp_path), run(kind))


@ALL
def test_checkpoints_change_nothing_in_an_uninterrupted_run(tmp_path, kind):
    assert_same_end(run(kind, tmp_path, checkpoint_every=1), run(kind))


def test_ends_of_runs_differ_where_their_seeds_do():
    with pytest.raises(AssertionError):
        assert_same_end(run("lora"), run("lora", seed=1))


def test_dropout_and_batch_statistics_take_part(tmp_path):
    model, _ = run("full")
    assert model.norm.num_batches_tracked == STEPS
    interrupt("full", tmp_path, 6)
    assert load_file(tmp_path / CHECKPOINT)["buffer.norm.num_batches_tracked"] == 4
    assert (model.norm.running_mean - Normed().norm.running_mean).abs().min() > 1e-4
    plain = LoRA(rank=2, alpha=6)
    assert run("lora")[1].rows[2]["train_loss"] != run("lora", method=plain)[1].rows[2]["train_loss"]


@ALL
def test_a_finished_run_returns_at_once_with_the_same_history(tmp_path, kind):
    model, history = run(kind, tmp_path)
    calls = []
    again, same = run(kind, tmp_path, stopping(1, calls))  # one training step would raise
    assert calls == []
    assert same == history  # seconds too
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert again.training is model.training is True


def test_how_often_checkpoints_are_written_may_change(tmp_path):
    interrupt("lora", tmp_path, 6)
    assert_same_end(run("lora", tmp_path, checkpoint_every=5), run("lora"))


def test_a_diverged_run_leaves_the_last_good_checkpoint(tmp_path):
    interrupt("lora", tmp_path, 4)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def loss(model, inputs, targets):
        return model(inputs).sum() * float("nan")

    with pytest.raises(DivergedError, match="at step 3 "):
        run("lora", tmp_path, loss)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


# Killed


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_killed_at_one_moment_after_another_ends_bit_identical(tmp_path, kind):
    """Before a checkpoint takes its place, within a step, and again."""
    expected, steps = run(kind), []

    def die(row):
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    for moment, options, step in ((1, {}, None), (2, {}, 2), (9, {"on_row": die}, 4), (1, {}, 4), (0.05, {}, 4)):
        run_killed(lambda options=options: run(kind, tmp_path, **options), moment)
        history = checkpoint.read_history(tmp_path)
        assert (history and history.rows[-1]["step"]) == step or isinstance(moment, float)
    assert_same_end(run(kind, tmp_path, on_row=lambda row: steps.append(row["step"])), expected)
    assert not steps or (steps[0] > 4 and steps[-1] == STEPS)  # none if the last kill came too late


# What a checkpoint holds, and which ones are refused


def test_a_checkpoint_is_one_safetensors_file_with_json_and_no_pickle(tmp_path):
    run("lora", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    content = (tmp_path / CHECKPOINT).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    note = header.pop("__metadata__")
    assert note.keys() == {"start", "sha256"}
    assert content_of(tmp_path / CHECKPOINT)[2]["rows"][-1]["step"] == STEPS
    assert {name.split(".")[0] for name in header} == {"parameter", "optimizer", "random", "history"}
    assert all(entry["dtype"] in ("F32", "U8") for entry in header.values())
    trained = {name for name in header if name.startswith("parameter.")}
    assert len(trained) == 2 * 8
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)  # the frozen base is not stored


def test_targets_given_as_a_tuple_are_the_same_run(tmp_path):
    method = LoRA(rank=2, targets=("q_proj", "v_proj"))
    interrupt("lora", tmp_path, 6, method=method)
    assert_same_end(run("lora", tmp_path, method=method), run("lora", method=method))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_damaged_checkpoint_is_refused(tmp_path, keep):
    interrupt("lora", tmp_path, 6)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged .*delete it to restart the run"):
        run("lora", tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged .*delete it to restart the run"):
        checkpoint.read_history(tmp_path)
    (tmp_path / CHECKPOINT).unlink()
    assert checkpoint.read_history(tmp_path) is None
    _, history = run("lora", tmp_path)
    assert checkpoint.read_history(tmp_path).rows == history.rows


def content_of(path):
    """The texts and the tensors of a checkpoint, and its history."""
    with safe_open(path, framework="pt") as file:
        note, tensors = file.metadata(), load_file(path)
    return note, tensors, json.loads(bytes(tensors["history"].tolist()))


def assert_left_alone(kind, folder, says, model=None, **options):
    """A run on this checkpoint is refused, and neither it, the model nor torch's generator has changed."""
    model, content = model if model is not None else KINDS[kind][0](), (folder / CHECKPOINT).read_bytes()
    untouched = snapshot(model)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=says) as caught:
        run(kind, folder, model=model, **options)
    assert (folder / CHECKPOINT).read_bytes() == content
    assert type(caught.value) is ValueError
    assert str(caught.value).count("\n") == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert snapshot(model) == untouched


def test_a_bit_flipped_anywhere_in_a_checkpoint_is_noticed(tmp_path):
    interrupt("lora", tmp_path, 6)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    del header["__metadata__"]
    ends = [8 + (end - 8) * part // 16 for part in range(17)]
    spans = [(0, 8), *itertools.pairwise(ends)]  # the header's length, and the header in 16 pieces
    spans += [(end + low, end + high) for low, high in (entry["data_offsets"] for entry in header.values())]
    assert sum(high - low for low, high in spans) == len(whole)  # no byte lies outside
    assert len(spans) == 17 + 16 * 4 + 2
    generator = torch.Generator().manual_seed(0)
    for low, high in spans:
        place, bit = (int(torch.randint(a, b, (), generator=generator)) for a, b in ((low, high), (0, 8)))
        changed = bytearray(whole)
        changed[place] ^= 1 << bit
        (tmp_path / CHECKPOINT).write_bytes(changed)
        assert_left_alone("lora", tmp_path, r"checkpoint\.safetensors is damaged \(.+\); delete it to restart the run")


class Scaled(Normed):
    """A net with a frozen scalar."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))


@torch.no_grad()
def nudged(kind, name):
    """A model of which one number is another."""
    model = KINDS[kind][0]()
    model.get_parameter(name).view(-1)[0] += 1e-6
    return model


def transformer(layers=1, seed=0):
    return DigitsTransformer(width=16, layers=layers, heads=2, seed=seed)


OTHERS = "started from other weights"
OTHER_RUNS = [  # a run that was stopped, another one in its folder, and what must be named
    ("lora", {}, {"lr": 0.02}, r"settings\.lr is 0\.01, not 0\.02"),
    ("lora", {}, {"steps": 12}, r"settings\.steps is 9, not 12"),
    ("lora", {}, {"schedule": "constant"}, r"settings\.schedule is 'cosine', not 'constant'"),
    ("lora", {}, {"method": LoRA(rank=3, alpha=6, dropout=0.2)}, r"method\.rank is 2, not 3"),
    ("lora", {}, {"method": FullFineTuning()}, r"method\.name is 'lora', not 'full'"),
    ("lora", {}, {"task": task(stopping(), shift=0.5)}, r"task\.fingerprint is"),
    ("lora", {}, {"model": transformer(seed=1)}, OTHERS),
    ("lora", {}, {"model": nudged("lora", "norm.bias")}, OTHERS),
    ("lora on batch norm", {"model": Scaled()}, {"model": Scaled(2.0)}, OTHERS),
    ("full", {}, {"model": nudged("full", "hidden.weight")}, OTHERS),
    ("full", {"model": transformer(layers=2)}, {"model": transformer()}, OTHERS),
    *(
        ("full", {"model": Normed(stored)}, {"model": other}, r"checkpoint\.safetensors")
        for stored, other in ((16, Normed(24)), (16, Normed(1)), (1, Normed(16)), (16, DigitsMLP()))
    ),
]


@pytest.mark.parametrize(("kind", "first", "then", "named"), OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused_and_told_apart(tmp_path, kind, first, then, named):
    interrupt(kind, tmp_path, 6, **first)
    assert_left_alone(kind, tmp_path, named, **then)


def rewrite(path, change):
    """Change the note, the tensors or the rows of a checkpoint, under a checksum that is right."""
    note, tensors, history = content_of(path)
    change(note, tensors, history["rows"])
    tensors["history"] = torch.tensor(list(json.dumps(history).encode()), dtype=torch.uint8)
    del note["sha256"]
    checkpoint.save_tensors(path, tensors, note)


HEAD = "parameter.head.lora_B"
CHANGES = [
    lambda note, tensors, rows: note.pop("start"),
    lambda note, tensors, rows: rows.pop(2),
    lambda note, tensors, rows: rows[3].update(train_loss="2.3"),
    lambda note, tensors, rows: rows.__delitem__(slice(1, None)),
    lambda note, tensors, rows: tensors.pop(HEAD),
    lambda note, tensors, rows: tensors.update({HEAD: torch.zeros(10, 2, dtype=torch.int32)}),
    lambda note, tensors, rows: tensors.update(more=torch.zeros(2)),
    lambda note, tensors, rows: tensors.pop("optimizer.head.lora_A.exp_avg"),
    lambda note, tensors, rows: tensors.pop("random.cpu"),
    *(
        lambda note, tensors, rows, state=state: tensors.update({"random.cpu": state})
        for state in (torch.zeros(5056, dtype=torch.uint8), torch.zeros(7, dtype=torch.uint8), torch.zeros(5056))
    ),
]


def test_a_checkpoint_that_was_changed_under_a_right_checksum_is_refused(tmp_path):
    interrupt("lora", tmp_path, 6)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    for change in CHANGES:
        (tmp_path / CHECKPOINT).write_bytes(whole)
        rewrite(tmp_path / CHECKPOINT, change)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors"):
            run("lora", tmp_path)


def test_a_state_of_the_gpus_generator_is_no_hindrance_where_there_is_no_gpu(tmp_path):
    interrupt("lora", tmp_path, 6)
    state = torch.zeros(16, dtype=torch.uint8)
    rewrite(tmp_path / CHECKPOINT, lambda note, tensors, rows: tensors.update({"random.cuda": state}))
    assert_same_end(run("lora", tmp_path), run("lora"))


def test_a_run_with_a_layer_that_takes_no_part_goes_on_too(tmp_path):
    def make():
        model = Normed()
        model.spare = nn.Linear(3, 2, bias=False)  # its gradient is None, so the optimiser holds nothing of it
        with torch.no_grad():
            model.spare.weight.fill_(0.5)
        return model

    interrupt("full", tmp_path, 6, model=make())
    assert_same_end(run("full", tmp_path, model=make()), run("full", model=make()))


def test_a_history_of_any_length_is_stored(tmp_path):
    """The header of a safetensors file has at most 100 MB."""
    model, steps = nn.Linear(2, 2), 20_000
    history = checkpoint.History({}, {}, {"steps": steps}, 6, 6)
    history.add(0, seconds=0.0, tokens=0)
    for step in range(1, steps + 1):
        history.add(step, train_loss=1 / step, grad_norm=1.0, lr=0.1, tokens=8, seconds=0.5)
    checkpoint.save(tmp_path, model, torch.optim.AdamW(model.parameters()), history, "start")
    header = int.from_bytes((tmp_path / CHECKPOINT).read_bytes()[:8], "little")
    assert header < 1000
    assert checkpoint.read_history(tmp_path) == history


class Masked(nn.Module):
    """A net with a causal mask of -inf, and a table that is not persistent and grows in the forward pass."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 10)
        self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))
        self.register_buffer("table", torch.ones(1), persistent=False)

    def forward(self, x):
        if len(self.table) < 8:
            self.register_buffer("table", torch.linspace(0, 1, 8), persistent=False)
        x = self.hidden(x.view(-1, 8, 8)) * self.table
        return self.head((torch.softmax(x @ x.mT + self.mask, -1) @ x).mean(1))


@pytest.mark.parametrize("method", [LoRA(rank=2), FullFineTuning()], ids=lambda method: method.name)
def test_a_buffer_may_be_infinite_and_one_that_is_not_persistent_of_any_shape(tmp_path, method):
    interrupt("lora", tmp_path, 6, model=Masked(), method=method)
    tensors = content_of(tmp_path / CHECKPOINT)[1]
    assert [name for name in tensors if name.startswith("buffer.")] == ["buffer.mask"]
    whole = run("lora", model=Masked(), method=method)
    assert_same_end(run("lora", tmp_path / "again", model=Masked(), method=method), whole)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
@ALL
def test_a_resumed_run_keeps_no_part_of_the_file_which_windows_could_not_replace(tmp_path, kind):
    interrupt(kind, tmp_path, 6)
    file, mapped = str(tmp_path / CHECKPOINT), []
    run(kind, tmp_path, on_row=lambda row: mapped.append(file in Path("/proc/self/maps").read_text()))
    assert mapped == [False] * 5
