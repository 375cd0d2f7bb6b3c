"""The front door: README's table of pages, and each name under ``ll.`` doing its one job."""

import re

import pytest
import torch
from torch import nn

import lora_lab as ll
from lora_lab.models.digits import DigitsMLP
from tests.acceptance import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = dict(re.findall(r"^\| \[\w+\]\((docs/\w+\.md)\) \| (.+\?) \|$", README, re.MULTILINE))
MODELS = ["load_pretrained", "save_model", "quantize_nf4", "Llama", "LlamaConfig", "reply", "chat"]
ADAPTERS = ["LoRAConfig", "LoRALinear", "inject", "merge", "lora_layers", "adapter_state", "save_adapter"]
ADAPTERS += ["load_adapter", "extract"]
METHODS = ["FullFineTuning", "PartialFineTuning", "LoRA", "RsLoRA", "LoRAFA", "LoRAPlus", "PiSSA", "DoRA"]
METHODS += ["ContinueLoRA"]
REST = ["fit", "evaluate", "Lean", "ablate", "Grid", "Trial", "diagnose"]
MODULES = ["tasks", "rank", "spectra", "memory", "speed", "adapters", "plots", "records", "lessons", "claims", "device"]
NAMES = MODELS + ADAPTERS + METHODS + REST + MODULES


def test_the_readme_lists_pages_that_exist_and_each_guide_is_among_them():
    assert len(PAGES) >= 11
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert len(text.split()) > 200, page
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name})" in README


def test_every_command_of_the_readme_is_a_target_or_a_command(main, capsys):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets
    main([])
    listed = capsys.readouterr().out
    for name in re.findall(r"`lora-lab ([a-z-]+)", README):
        assert re.search(rf"^ +{name}\b", listed, re.MULTILINE), name


def test_the_readmes_code_runs_on_a_small_model(stranger, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    code = code.replace('"smollm2-135m"', repr(str(stranger))).replace("steps=40", "steps=2")
    names = {}
    exec(code, names)
    assert names["history"].rows[-1]["step"] == 2
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_each_name_resolves_is_listed_and_is_documented(name):
    value = getattr(ll, name)
    assert name in ll.__all__
    assert name in dir(ll)
    assert value.__doc__


@pytest.fixture
def net():
    return DigitsMLP(width=16, seed=0)


PIXELS = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def adapted(net, rank=2):
    ll.inject(net, ll.LoRAConfig(rank=rank, alpha=4, targets=["hidden1"]), seed=0)
    nn.init.ones_(net.hidden1.lora_B)  # so the update has rank 1
    return net


def test_a_lora_layer_is_its_equation():
    base = nn.Linear(6, 4)
    layer = ll.LoRALinear(base, rank=2, alpha=6)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), base(x))  # B starts at zero
    nn.init.normal_(layer.lora_B)
    expected = base(x) + 6 / 2 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), base(x))


def test_inject_state_merge_and_extract(net):
    before = net(PIXELS)
    adapted(net)
    assert list(ll.lora_layers(net)) == ["hidden1"]
    assert {(2, 64), (16, 2)} <= {tuple(tensor.shape) for tensor in ll.adapter_state(net).values()}
    tuned = net(PIXELS)
    assert not torch.allclose(tuned, before)
    assert ll.merge(net) == ["hidden1"]
    torch.testing.assert_close(net(PIXELS), tuned)
    cut = DigitsMLP(width=16, seed=0)
    errors = ll.extract(cut, net, rank=2)
    assert max(errors.values()) < 1e-4
    torch.testing.assert_close(cut(PIXELS), tuned, rtol=1e-4, atol=1e-4)


def test_adapters_are_switched_off_turned_down_and_resized(net, tmp_path):
    before = net(PIXELS)
    adapted(net)
    tuned = net(PIXELS)
    with ll.adapters.off(net):
        assert torch.equal(net(PIXELS), before)
    with ll.adapters.strength(net, 0.5):
        assert not torch.allclose(net(PIXELS), tuned)
        assert not torch.allclose(net(PIXELS), before)
    assert torch.equal(net(PIXELS), tuned)
    ll.adapters.resize(net, 1)  # all columns of B are equal, so the update has rank 1
    assert net.hidden1.rank == 1
    torch.testing.assert_close(net(PIXELS), tuned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lighthouse-keeper", "sentiment"])
def test_two_adapters_are_shipped(name):
    folder = ll.adapters.shipped(name)
    assert (folder / "adapter_config.json").is_file()
    assert (folder / "adapter_model.safetensors").stat().st_size > 1e6


def test_rank_and_spectra_know_an_update_from_noise(net):
    matrix = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 4))
    assert ll.rank.energy_rank(ll.rank.singular_values(matrix), 0.9) == 1
    assert float(ll.rank.truncate(matrix, 1).error) < 1e-6
    assert float(ll.rank.truncate(torch.eye(5), 1).error) > 0.5
    report = ll.spectra.report(None, adapted(net))
    assert report["layer"].tolist() == ["hidden1"]
    assert report["stable_rank"].tolist() == pytest.approx([1.0], abs=1e-4)


def test_a_run_is_trained_diagnosed_and_drawn(net):
    task = ll.tasks.digits("adapt")
    before = ll.evaluate(net, task)
    history = ll.fit(net, task, ll.LoRA(rank=4, alpha=8), steps=20, lr=1e-2, batch_size=32)
    assert ll.evaluate(net, task) < before
    assert history.curve("train_loss")[0] == list(range(1, 21))
    assert ll.diagnose(net, base=DigitsMLP(width=16, seed=0)).ok
    assert not ll.diagnose(adapted(DigitsMLP(width=16, seed=1)), base=DigitsMLP(width=16, seed=0)).ok
    assert ll.plots.learning_and_forgetting


def test_a_small_sweep_is_a_grid_of_trials():
    grid = ll.Grid([1, 2], [1e-2], range(2), [ll.LoRA()], steps=3)
    assert {trial.method.rank for trial in grid} == {1, 2}
    frame = ll.ablate(lambda: DigitsMLP(width=8), ll.tasks.digits("adapt"), grid, progress=False)
    assert set(frame["rank"]) == {1, 2}
    assert frame["test_loss"].notna().any()
    assert ll.Trial(ll.LoRA(), 1e-2, steps=3).method == ll.LoRA()


def test_memory_is_predicted_as_it_is_measured(net):
    batch = torch.randn(8, 64), torch.zeros(8, dtype=torch.long)
    predicted = ll.memory.predict(net, ll.LoRA(rank=2), batch=batch)
    measured = ll.memory.measure(net, ll.LoRA(rank=2), batch)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)


def test_speed_is_measured_and_counted(net):
    batch = torch.randn(8, 64), torch.zeros(8, dtype=torch.long)
    full, lora = (ll.speed.flops(net, method, batch=batch) for method in (ll.FullFineTuning(), ll.LoRA(rank=2)))
    assert 0 < lora.total < full.total
    times = ll.speed.step_time(net, {"full": ll.FullFineTuning()}, batch=batch, rounds=1, progress=False)
    assert times.median_s("full") > 0


def test_a_llama_is_saved_loaded_quantized_and_asked(stranger, tmp_path):
    model, tokenizer = ll.load_pretrained(stranger, device="cpu")
    assert isinstance(model, ll.Llama)
    assert isinstance(model.config, ll.LlamaConfig)
    ids = torch.tensor([tokenizer.encode("1 plus one?")])
    ll.save_model(model, tmp_path / "copy", tokenizer)
    again, _ = ll.load_pretrained(tmp_path / "copy", device="cpu")
    assert torch.equal(again(ids), model(ids))
    assert isinstance(ll.reply(model, tokenizer, "1 plus one?", max_new_tokens=3), str)
    ll.quantize_nf4(again)
    assert not torch.equal(again(ids), model(ids))
    assert (again(ids) - model(ids)).norm() < 0.5 * model(ids).norm()


def test_the_device_is_chosen_with_a_reason(monkeypatch):
    device, why = ll.device.pick_device("cpu")
    assert device == torch.device("cpu")
    assert why
    monkeypatch.setenv("LORA_LAB_EFFORT", "full")
    assert ll.device.effort() == "full"


def test_a_wrong_value_is_refused_in_one_sentence(net, stranger):
    refused = [
        (lambda: ll.LoRAConfig(rank=0), "rank"),
        (lambda: ll.inject(net, ll.LoRAConfig(targets=["nowhere"])), "nowhere"),
        (lambda: ll.load_pretrained("nowhere-at-all"), "nowhere-at-all"),
        (lambda: ll.load_adapter(net, "nowhere-at-all"), "nowhere-at-all"),
        (lambda: ll.fit(net, ll.tasks.digits("adapt"), ll.LoRA(), steps=1, lr=float("nan")), "lr"),
        (lambda: ll.fit(net, ll.tasks.digits("adapt"), ll.LoRA(), steps=1, learning_rate=1), "learning_rate"),
    ]
    for call, names in refused:
        with pytest.raises((ValueError, OSError, TypeError), match=names):
            call()
    assert not ll.lora_layers(net)
