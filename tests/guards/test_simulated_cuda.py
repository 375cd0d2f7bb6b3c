"""What a GPU would refuse, wait for or count otherwise, found on a machine that has none."""

import ast
import contextlib
import copy
import gc
import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lora_lab as ll
import tests.simulated_cuda as simulation
from lora_lab import Lean, memory, rank, speed
from lora_lab.ablation import Grid, Trial, fit_packed, materials
from lora_lab.costs import fake, setup, timing
from lora_lab.costs.setup import Setup
from lora_lab.models import quantize, shapes
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.system.distributed import Processes
from lora_lab.task import IGNORE, Examples, Task
from tests.simulated_cuda import WORKSPACE, simulated_cuda

if simulation.missing() and not torch.__version__.startswith("2.13"):
    pytest.skip(f"torch {torch.__version__} has no {simulation.missing()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_heap")

SHAPE = LlamaConfig(300, 32, 64, 1, 4, 2, 8, tie_word_embeddings=True)
IDS = torch.randint(300, (56, 13), generator=torch.Generator().manual_seed(0))
PARTS = [Examples(ids[:, :-1], ids[:, 1:].clone()) for ids in IDS.split([32, 8, 8, 8])]
TASK = Task("tokens", *PARTS, unit="tokens")
OPTIONS = {"steps": 2, "lr": 1e-3, "batch_size": 8, "eval_every": 2, "progress": False}
BF16 = torch.bfloat16
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def gpu():
    with simulated_cuda() as found:
        yield found


@pytest.fixture
def rehearsals_on_the_cpu(gpu, monkeypatch):
    """Fake tensors cannot be on a device that is not there, so what is rehearsed for it is rehearsed on the CPU."""
    plain = fake.fake_copy

    @contextlib.contextmanager
    def pretend(model, device="cpu", dtype=None):
        if isinstance(model, torch.nn.Module) and fake.device_of(model).type == "cuda":
            model = copy.deepcopy(model).cpu()
        with plain(model, "cpu", dtype) as twin:
            yield twin

    for module in (fake, setup):
        monkeypatch.setattr(module, "fake_copy", pretend)


def in_blocks():
    """A Llama whose layers were put into 4 bits on the CPU."""
    model = Llama(SHAPE)
    ll.quantize_nf4(model)
    return model


def there(model=None):
    return (Llama(SHAPE) if model is None else model).to("cuda")


def losses(history):
    return [[row[name] for name in ("train_loss", "validation_loss", "grad_norm")] for row in history.rows]


def waits_of_a_step(gpu, model, method, lean=None, **options):
    """What the host waits for in the second step on a batch that is on the device."""
    step = ll.train.make_step(model, TASK.loss, method, ll.train.TrainConfig(steps=2, lr=1e-3, lean=lean, **options))
    step.read_targets([TASK.train.targets])  # as fit does
    batch = [(TASK.train.inputs[:4].to("cuda"), TASK.train.targets[:4].to("cuda"))]
    step(batch, [1.0])
    gpu.waits.clear()
    step(batch, [1.0])
    return dict(gpu.waits)


# The device itself


def test_this_torch_has_all_private_names_that_the_simulation_is_built_on(monkeypatch):
    assert simulation.missing() == []
    monkeypatch.delattr(torch.autograd, "_engine_run_backward")
    assert simulation.missing() == ["torch.autograd._engine_run_backward"]
    with pytest.raises(RuntimeError, match=r"has no torch\.autograd\._engine_run_backward, which the simulated GPU"):
        simulated_cuda().__enter__()


def test_the_device_is_there_in_the_block_alone():
    before = torch.cuda.is_available()
    with simulated_cuda():
        assert ll.device.pick_device()[0].type == "cpu"  # LORA_LAB_DEVICE asks for it in tests
        device, _ = ll.device.pick_device("cuda")
        assert (device.type, torch.cuda.is_available()) == ("cuda", True)
        assert torch.zeros(2, device="cuda").device == torch.device("cuda", 0)
        with torch.device("cuda"):
            assert torch.ones(3).is_cuda
    assert torch.cuda.is_available() == before


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: x + torch.ones(3), "Expected all tensors to be on the same device"),
        (lambda x: torch.nn.functional.linear(x, torch.ones(2, 3)), "Expected all tensors to be on the same device"),
        (lambda x: torch.cat([x, torch.ones(3)]), "Expected all tensors to be on the same device"),
        (lambda x: torch.ones(3)[x.long()], "Expected all tensors to be on the same device"),
        (lambda x: x.index_select(0, torch.tensor([0])), "Expected all tensors to be on the same device"),
        (lambda x: torch.randn(3, generator=torch.Generator(), device="cuda"), "Expected a 'cuda' device type for gen"),
        (lambda x: torch.randn(3, generator=torch.Generator("cuda")), "Expected a 'cpu' device type for generator but"),
        (lambda x: x.normal_(generator=torch.Generator()), "Expected a 'cuda' device type for generator but found"),
        (lambda x: x.numpy(), "can't convert cuda:0 device type tensor to numpy"),
        (np.asarray, "can't convert cuda:0 device type tensor to numpy"),
        (lambda x: torch.zeros(1, device="cuda:1"), "invalid device ordinal"),
        (lambda x: x.unsqueeze_(0), "changes a tensor's shape in place"),
        (lambda x: torch.ones(3, requires_grad=True).to("cuda"), "no gradient for a copy"),
        (lambda x: x.__reduce_ex__(2), "cannot be pickled"),
    ],
)  # fmt: skip
def test_it_refuses_what_cuda_refuses_and_what_it_cannot_do(gpu, call, says):
    with pytest.raises((RuntimeError, TypeError, NotImplementedError), match=says):
        call(torch.ones(3, device="cuda"))


def test_it_lets_pass_what_cuda_lets_pass(gpu):
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert (x + torch.tensor(2.0)).tolist() == [[2, 3, 4], [5, 6, 7]]  # a number of no dimension
    assert x[torch.tensor([1])].tolist() == [[3, 4, 5]]  # indices on the CPU
    assert torch.randn(3, generator=torch.Generator("cuda").manual_seed(1), device="cuda").is_cuda
    assert x.new_zeros(2).is_cuda
    assert x.cpu().device.type == "cpu"
    assert np.array_equal(x.cpu().numpy(), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda x: x.mul(2).add_(x).sum(), {}),
        (lambda x: torch.zeros(3, device="cuda"), {}),
        (lambda x: torch.where(x > 0, 1.0, x), {}),
        (lambda x: x.masked_fill(x > 0, 1.0), {}),
        (lambda x: x.__setitem__(x > 0, 1.0), {}),
        (lambda x: float(x.sum()), {"read": 1}),
        (lambda x: bool((x > 0).all()), {"read": 1}),
        (lambda x: x.cpu(), {"download": 1}),
        (lambda x: x.tolist(), {"download": 1}),
        (lambda x: torch.ones(3).copy_(x), {"download": 1}),
        (lambda x: x.copy_(torch.ones(3)), {"upload": 1}),
        (lambda x: torch.ones(3).to("cuda"), {"upload": 1}),
        (lambda x: torch.ones(3).cuda(), {"upload": 1}),
        (lambda x: torch.tensor([1.0], device="cuda"), {"upload": 1}),
        (lambda x: x.new_tensor([1.0]), {"upload": 1}),
        (lambda x: x[torch.tensor([0])], {"upload": 1}),
        (lambda x: x[x > 0], {"nonzero": 1}),
        (lambda x: x.nonzero(), {"nonzero": 1}),
        (lambda x: torch.equal(x, x), {"equal": 1}),
        (lambda x: torch.linalg.svdvals(x.outer(x)), {"_linalg_svd": 1}),
        (lambda x: torch.cuda.synchronize(), {"synchronize": 1}),
    ],
)  # fmt: skip
def test_it_counts_what_makes_the_host_wait(gpu, call, waits):
    x = torch.ones(3, device="cuda")
    gpu.waits.clear()
    call(x)
    assert dict(gpu.waits) == waits


def test_it_counts_storages_in_blocks_and_a_workspace_for_each_pass(gpu):
    gc.collect()
    before = torch.cuda.memory_allocated()
    x = torch.ones(100, 3, device="cuda", requires_grad=True)  # 1200 bytes
    y = x.view(300)
    assert torch.cuda.memory_allocated() - before == 1536
    product = x.T @ x
    assert torch.cuda.memory_allocated() - before == 1536 + 512 + WORKSPACE
    product.sum().backward()
    grad = 1536
    del product
    assert torch.cuda.memory_allocated() - before == 1536 + grad + 2 * WORKSPACE
    assert torch.cuda.max_memory_allocated() > torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
    assert torch.cuda.memory_stats()["requested_bytes.all.current"] == torch.cuda.memory_allocated() - 2 * (1536 - 1200)
    del x, y
    assert torch.cuda.memory_allocated() - before == 2 * WORKSPACE


# Training


METHODS = {
    "full": (ll.FullFineTuning(), {}),
    "partial": (ll.PartialFineTuning(["model.layers.0.mlp"]), {}),
    "LoRA": (ll.LoRA(4), {}),
    "rsLoRA": (ll.RsLoRA(4), {}),
    "LoRA+": (ll.LoRAPlus(4), {}),
    "LoRA-FA": (ll.LoRAFA(4), {}),
    "PiSSA": (ll.PiSSA(4), {}),
    "DoRA": (ll.DoRA(4), {}),
    "accumulate": (ll.LoRA(4), {"accumulate": 2}),
    "checkpointing": (ll.LoRA(4), {"gradient_checkpointing": True}),
    "lean": (ll.LoRA(4), {"lean": Lean()}),
    "lean, bfloat16": (ll.LoRA(4), {"lean": Lean(base_dtype=BF16)}),
    "lean, checkpointing": (ll.LoRA(4), {"lean": Lean(checkpoint=True)}),
}
IN_BLOCKS = ("LoRA", "DoRA", "checkpointing", "lean", "lean, checkpointing")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_fit_gives_the_cpus_numbers_to_the_bit(gpu, name):
    method, options = METHODS[name]
    expected = losses(ll.fit(Llama(SHAPE), TASK, method, **OPTIONS, **options))
    assert losses(ll.fit(there(), TASK, method, **OPTIONS, **options)) == expected


@pytest.mark.parametrize("name", ["full", "LoRA", "accumulate", "lean"])
def test_one_of_two_processes_sums_on_the_device_what_it_would_on_the_cpu(gpu, monkeypatch, name):
    method, options = METHODS[name]
    devices = []
    monkeypatch.setattr(ll.train, "current_processes", lambda: Processes(0, 2))
    monkeypatch.setattr(Processes, "check_same", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: devices.append(tensor.device.type))
    expected = losses(ll.fit(Llama(SHAPE), TASK, method, **OPTIONS, **options))
    assert set(devices) == {"cpu"}
    devices.clear()
    assert losses(ll.fit(there(), TASK, method, **OPTIONS, **options)) == expected
    assert set(devices) == {"cuda"}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_BLOCKS)
def test_fit_gives_the_cpus_numbers_on_a_base_in_blocks(gpu, name):
    method, options = METHODS[name]
    expected = losses(ll.fit(in_blocks(), TASK, method, **OPTIONS, **options))
    model = there()
    ll.quantize_nf4(model)  # on the device, and moved there once in blocks
    assert losses(ll.fit(model, TASK, method, **OPTIONS, **options)) == expected
    assert losses(ll.fit(there(in_blocks()), TASK, method, **OPTIONS, **options)) == expected


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_a_ggufs_blocks_are_multiplied_and_looked_up_there(gpu, kind):
    blocks = torch.randint(256, (64, quantize.BYTES_PER_BLOCK[kind]), generator=seeded(0), dtype=torch.uint8)
    blocks[:, :4] = torch.tensor([0.5, 0.25], dtype=torch.float16).view(torch.uint8)  # no scale that is no number
    layer = quantize.BlockLinear(blocks, kind, (64, 32))
    table = quantize.BlockEmbedding(blocks, kind, (64, 32))
    x, ids = torch.randn(5, 32, generator=seeded(0)), torch.tensor([[1, 63]])
    expected = layer(x), table(ids)
    found = layer.to("cuda")(x.to("cuda")), table.to("cuda")(ids.to("cuda"))
    assert all(torch.equal(here.cpu(), wanted) for here, wanted in zip(found, expected, strict=True))


def test_tied_weights_stay_tied_and_a_copy_has_weights_of_its_own(gpu):
    model = there()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    copied.lm_head.weight.data.zero_()
    assert float(model.lm_head.weight.abs().sum()) > 0


def test_a_step_waits_for_nothing(gpu):
    assert waits_of_a_step(gpu, there(), ll.LoRA(4)) == {}
    assert waits_of_a_step(gpu, there(), ll.FullFineTuning()) == {}
    assert waits_of_a_step(gpu, there(), ll.LoRA(4), gradient_checkpointing=True) == {}
    assert waits_of_a_step(gpu, there(), ll.LoRA(4), Lean()) == {}
    assert waits_of_a_step(gpu, there(in_blocks()), ll.LoRA(4)) == {}
    assert waits_of_a_step(gpu, there(in_blocks()), ll.LoRA(4), gradient_checkpointing=True) == {}
    assert waits_of_a_step(gpu, there(in_blocks()), ll.LoRA(4), Lean(checkpoint=True)) == {}


@pytest.mark.parametrize("lean", [None, Lean()], ids=["plain", "lean"])
def test_fit_waits_for_batches_and_for_the_numbers_in_its_rows_alone(gpu, lean):
    model = there()
    ll.fit(model, TASK, ll.LoRA(4), lean=lean, **OPTIONS)
    counted = []
    for steps in (2, 5):
        gpu.waits.clear()
        options = {**OPTIONS, "steps": steps, "eval_every": steps, "eval_examples": 1}
        ll.fit(there(), TASK, ll.LoRA(4), lean=lean, **options)
        counted.append(gpu.waits.copy())
    more = counted[1] - counted[0]
    assert more == {"upload": 3 * 2, "read": 3 * 2}  # a step's inputs and targets; its loss and norm


def test_a_lean_loss_of_targets_that_do_not_all_count_is_the_cpus(gpu):
    parts = [copy.deepcopy(part) for part in PARTS]
    for part in parts:
        part.targets[:, ::2] = IGNORE
    task = Task("some", *parts, unit="tokens")
    expected = losses(ll.fit(Llama(SHAPE), task, ll.LoRA(4), lean=Lean(), **OPTIONS))
    assert losses(ll.fit(there(), task, ll.LoRA(4), lean=Lean(), **OPTIONS)) == expected


def test_a_run_is_stopped_and_goes_on_with_the_same_numbers(gpu, tmp_path, monkeypatch):
    def run(folder, **more):
        method = ll.LoRA(4, dropout=0.3)  # drawn by the device's generator
        return ll.fit(there(), TASK, method, checkpoint_dir=folder, checkpoint_every=1, **{**OPTIONS, **more})

    whole = losses(run(tmp_path / "whole"))
    plain, done = ll.checkpoint.save, []

    def stopping(*args):
        plain(*args)
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ll.checkpoint, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    assert losses(run(tmp_path / "stopped")) == whole


@pytest.mark.parametrize("make", [Llama, DigitsTransformer, DigitsMLP])
def test_packed_trials_give_the_cpus_numbers(gpu, make):
    task, model = (TASK, Llama(SHAPE)) if make is Llama else (ll.tasks.digits(), make())
    options = {"steps": 2, "eval_every": 2, "eval_examples": 4}
    trials = [Trial(ll.RsLoRA(2), 1e-3, **options), Trial(ll.RsLoRA(4), 3e-3, 1, **options)]
    expected, found = (fit_packed(each, task, trials) for each in (model, there(model)))
    assert [losses(result.history) for result in found] == [losses(result.history) for result in expected]


@pytest.mark.parametrize("engine", ["separate", "packed"])
def test_ablate_gives_the_cpus_numbers(rehearsals_on_the_cpu, engine):
    trials = Grid([1, 2], [1e-2], [0], steps=2, batch_size=8, eval_every=2, eval_examples=8)
    options = {"engine": engine, "progress": False}
    frames = [ll.ablate(model, ll.tasks.digits(), trials, **options) for model in (DigitsMLP(), there(DigitsMLP()))]
    assert set(frames[1].outcome) == {"done"}
    columns = ["step", "train_loss", "validation_loss", "test_loss"]
    assert frames[1][columns].equals(frames[0][columns])


# What is done with a model


def test_evaluate_and_generate_give_the_cpus_answers(gpu):
    assert ll.evaluate(there(), TASK, "test") == ll.evaluate(Llama(SHAPE), TASK, "test")
    prompt = torch.tensor([1, 2, 3])
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.5}):
        expected = Llama(SHAPE).generate(prompt, 5, **options)
        assert torch.equal(there().generate(prompt.to("cuda"), 5, **options), expected)
    padded = torch.ones(2, 5, dtype=torch.long)
    padded[0, :2] = 0
    expected = Llama(SHAPE)(IDS[:2, :5], padded)
    assert torch.equal(there()(IDS[:2, :5].to("cuda"), padded.to("cuda")).cpu(), expected)


@pytest.fixture
def tuned(gpu):
    """A model there before and after LoRA, and the same on the CPU."""
    models = [there(), there(), Llama(SHAPE)]
    for model in models[1:]:
        ll.fit(model, TASK, ll.LoRA(4), **OPTIONS)
    return models


def test_adapters_are_switched_merged_resized_saved_and_loaded_there(tuned, tmp_path, tiny_tokenizer):
    base, model, here = tuned
    ids = IDS[:2, :12]
    expected = here(ids)
    assert torch.equal(model(ids.to("cuda")).cpu(), expected)
    with ll.adapters.off(model):
        assert torch.equal(model(ids.to("cuda")), base(ids.to("cuda")))
    ll.save_adapter(model, tmp_path / "adapter", base="none")
    ll.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(ids.to("cuda")).cpu(), expected)
    other = {name: value * 2 for name, value in ll.adapter_state(model).items()}
    for net in (model, here):
        ll.adapters.switch(net, {name: value.cpu() for name, value in other.items()})
    assert torch.equal(model(ids.to("cuda")).cpu(), here(ids))
    for net in (model, here):
        ll.adapters.resize(net, 2)
    torch.testing.assert_close(model(ids.to("cuda")).cpu(), here(ids))
    for net in (model, here):
        ll.merge(net)
    torch.testing.assert_close(model(ids.to("cuda")).cpu(), here(ids))
    ll.save_model(model, tmp_path / "model", tiny_tokenizer)
    again = ll.load_pretrained(tmp_path / "model", device="cuda")[0]
    assert torch.equal(again(ids.to("cuda")), model(ids.to("cuda")))


def test_an_update_is_extracted_and_diagnosed_there(tuned):
    base, model, here = tuned
    found, expected = ll.diagnose(model, base=base), ll.diagnose(here, base=Llama(SHAPE))
    assert str(found).replace("cuda:0", "cpu") == str(expected)
    full, full_here = there(), Llama(SHAPE)
    for net in (full, full_here):
        ll.fit(net, TASK, ll.FullFineTuning(), **OPTIONS)
    errors = [ll.extract(there(), full, 4), ll.extract(Llama(SHAPE), full_here, 4)]
    assert errors[0] == errors[1]


def test_spectra_are_the_cpus(tuned):
    base, model, here = tuned
    for before, after, at_home in ((None, model, (None, here)), (base, model, (Llama(SHAPE), here))):
        found, expected = (ll.spectra.report(*pair, progress=False) for pair in ((before, after), at_home))
        assert found.equals(expected)
    updates = (ll.spectra.updates(None, net, progress=False)[expected.layer[0]] for net in (model, here))
    found, expected = map(ll.spectra.count_intruders, updates)
    assert found == expected


def test_the_amplification_factor_is_the_cpus(gpu):
    W, delta = (torch.randn(24, 16, generator=seeded(seed)) for seed in (0, 1))
    found = rank.amplification(delta.to("cuda"), W.to("cuda"), 4)
    expected = rank.amplification(delta, W, 4)
    assert [float(number) for number in found if number.ndim == 0] == [float(n) for n in expected if n.ndim == 0]


# What is measured


def test_a_factory_makes_its_model_on_the_device(gpu):
    model = fake.build_model(partial(Llama, SHAPE), torch.device("cuda"))
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(model.parameters(), Llama(SHAPE).parameters(), strict=True))


def test_steps_are_timed_and_predicted_for_the_device(rehearsals_on_the_cpu, monkeypatch):
    monkeypatch.setattr(timing, "_TIMING_S", 0.0)
    monkeypatch.setattr(ll.lessons, "answer", lambda ask: None)  # it rests on the real shapes
    variants = {"full": ll.FullFineTuning(), "LoRA": ll.LoRA(4), "lean": Setup(ll.LoRA(4), lean=Lean())}
    for model in (there(), partial(Llama, SHAPE)):
        times = speed.step_time(model, variants, 2, 8, rounds=1, device="cuda", progress=False)
        assert times.setting.endswith("cuda:0" if isinstance(model, Llama) else "cuda")
        assert all(times.median_s(name) > 0 for name in variants)


def test_a_timed_lean_step_waits_before_and_after_it_alone(gpu):
    run = timing._Run(there(), Setup(ll.LoRA(4), lean=Lean()), torch.device("cuda"))
    run.warm_up(tuple(part.to("cuda") for part in (PARTS[0].inputs[:2], PARTS[0].targets[:2])))
    gpu.waits.clear()
    run.seconds()
    assert dict(gpu.waits) == {"synchronize": 2}


TEXT = (PARTS[0].inputs[:4], PARTS[0].targets[:4])


@pytest.mark.parametrize("method", [ll.FullFineTuning(), ll.LoRA(4)], ids=["full", "LoRA"])
def test_the_first_step_measured_in_a_process_needs_as_much_as_the_next_one(gpu, method):
    first, second = (memory.measure(partial(Llama, SHAPE), method, TEXT, device="cuda") for _ in range(2))
    assert first.parts == second.parts
    assert first.parts["cuBLAS workspace"] == 2 * WORKSPACE


@pytest.mark.parametrize("case", ["full", "LoRA", "checkpointing"])
def test_a_bill_predicted_for_the_device_is_the_one_measured_there(rehearsals_on_the_cpu, case):
    method, options = METHODS[case]
    rehearsed = memory.predict(partial(Llama, SHAPE), method, batch=TEXT, device="cuda", **options)
    real = memory.measure(partial(Llama, SHAPE), method, TEXT, device="cuda", **options)
    assert rehearsed.parts["cuBLAS workspace"] == real.parts["cuBLAS workspace"] == 2 * WORKSPACE
    own = real.peak_bytes - 2 * WORKSPACE
    assert rehearsed.peak_bytes - 2 * WORKSPACE == pytest.approx(own, rel=0.01)
    assert real.parts["unused ends of blocks"] > 0  # of the 512 bytes that the least tensor takes
    assert abs(real.parts.get("the rest, unexplained", 0)) < 0.02 * own


def test_a_measured_model_keeps_its_bits(gpu):
    model, same = there(), Llama(SHAPE)
    memory.measure(model, ll.FullFineTuning(), TEXT)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


# The lessons: their own cells, on models so small that nothing holds of what they find


class WithoutAssertions(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.copy_location(ast.Pass(), node)


@pytest.fixture
def lesson(rehearsals_on_the_cpu, monkeypatch):
    """Runs cells of a lesson as on a machine with a GPU: ``lesson("04", {"cell-02": {}, "cell-06": {"NAME": value}})``.

    What stands behind a cell is put into its names once it has run, in place of what would take too long.
    """
    monkeypatch.setenv("LORA_LAB_DEVICE", "cuda")
    monkeypatch.setattr(shapes, "config", lambda name: SHAPE)
    monkeypatch.setattr(timing, "_TIMING_S", 0.0)
    monkeypatch.setattr(ll.lessons, "answer", lambda ask: None)  # it rests on the real shapes

    def run(number, cells):
        (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
        sources = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]}
        names = {}
        for cell, stand_ins in cells.items():
            tree = ast.fix_missing_locations(WithoutAssertions().visit(ast.parse(sources[cell])))
            exec(compile(tree, f"{path.name}, {cell}", "exec"), names)
            names |= stand_ins
        return names

    return run


@pytest.mark.slow
def test_the_lesson_on_memory_measures_there(lesson):
    cells = ("cell-02", "cell-10", "cell-20")  # the others predict, or read records
    names = lesson("04", {cell: {} for cell in cells})
    assert names["real"]["LoRA r=8"].parts["cuBLAS workspace"] == 2 * WORKSPACE


@pytest.mark.slow
def test_the_lesson_on_speed_times_there_and_costs_are_measured_there(lesson, monkeypatch):
    timed = speed.step_time
    monkeypatch.setattr(speed, "step_time", lambda *args, **options: timed(*args, **{**options, "rounds": 1}))
    monkeypatch.setattr(timing, "_WEIGHTS", 64)
    monkeypatch.setattr(timing, "_SAMPLE_S", 1e-9)
    monkeypatch.setitem(timing._SIDE, "cuda", 64)
    names = lesson("05", {"cell-02": {}, "cell-03": {"LAST": ll.LoRA(8, targets=["mlp.down_proj"])}, "cell-25": {}})
    assert names["run"].setting.endswith(("cuda", "cuda:0"))
    assert speed.cost_model("cuda").seconds.overlaps


@pytest.mark.slow
def test_the_lesson_on_ranks_trains_there(lesson):
    few = {"steps": 2, "eval_every": 2}
    stand_ins = {"Grid": lambda ranks, lrs, seeds, **options: Grid(ranks[:2], lrs[:1], seeds, **{**options, **few})}
    names = lesson("06", {"cell-02": stand_ins, "cell-03": {}, "cell-38": {}})
    assert next(names["net"].parameters()).is_cuda
    assert next(materials.pretrained_digits().parameters()).device.type == "cpu"  # the lesson's reader is its own


class Clock:
    """A clock that notes how often the host has waited by each time it is read."""

    def __init__(self, gpu):
        self.gpu, self.waited = gpu, []

    def perf_counter(self):
        self.waited.append(self.gpu.waits["download"] + self.gpu.waits["synchronize"])
        return time.perf_counter()


def test_the_lesson_on_many_tasks_switches_there_and_its_clock_waits(lesson, gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(ll, "load_pretrained", lambda name: (there(), None), raising=False)
    monkeypatch.setattr(ll.adapters, "shipped", lambda name: folders[name])
    monkeypatch.setattr(ll.lessons, "say", lambda text, *holds: None)  # of the real adapters
    folders = {}
    for seed, name in enumerate(("lighthouse-keeper", "sentiment")):
        adapted = there()
        ll.inject(adapted, ll.LoRAConfig(rank=2), seed=seed)
        with torch.no_grad():
            for layer in ll.lora_layers(adapted).values():
                layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=seeded(seed)))
        folders[name] = ll.save_adapter(adapted, tmp_path / name)
    task = SimpleNamespace(prompt_ids=lambda pair: [1, 2, 3], pairs={"test": [SimpleNamespace(prompt="p", answer="a")]})
    task_names, clock = ("style", "sentiment", "summarise", "translate"), Clock(gpu)
    functions = SimpleNamespace(**dict.fromkeys(task_names, lambda tokenizer: task))
    functions.Pair = lambda prompt, answer: task.pairs["test"][0]
    hidden = {"trace": SimpleNamespace(reveal=print)}
    cells = {"cell-02": {"tasks": functions, "time": clock}, "cell-03": hidden}
    cells |= {"cell-05": {"TASKS": dict.fromkeys(task_names, TASK)}}
    cells |= {cell: {} for cell in ("cell-22", "cell-25", "cell-26", "cell-29", "cell-32")}
    names = lesson("09", cells)
    assert names["back"].is_cuda
    assert torch.equal(names["back"].cpu(), names["untouched"].cpu())
    first, other, again = names["logits"]
    assert torch.equal(first.cpu(), again.cpu())
    assert not torch.equal(first.cpu(), other.cpu())
    assert all(next(each.parameters()).is_cuda for each in names["ways"].values())
    assert np.isfinite(names["arrived"]).all()
    starts, stops = clock.waited[::2], clock.waited[1::2]
    assert len(starts) == 2 * 8 * 5  # of two ranks: a switch, and two passes with an adapter and without, eight times
    assert all(before < after for before, after in zip(starts, stops, strict=True))
