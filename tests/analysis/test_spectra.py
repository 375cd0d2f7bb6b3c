"""Rows against numpy on the dense updates, every kind of source, the control with nothing to learn, what is refused."""

import copy
from collections import OrderedDict

import numpy as np
import pandas
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab import (
    FullFineTuning,
    LoRA,
    LoRAConfig,
    adapter_state,
    cli,
    evaluate,
    fit,
    inject,
    lora_layers,
    merge,
    plots,
    quantize_nf4,
    rank,
    save_adapter,
    save_model,
    spectra,
)
from lora_lab.ablation.materials import pretrained_digits
from lora_lab.analysis.spectra import DrawnLabels
from lora_lab.layers import LoRAConv2d, LoRAEmbedding
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.task import IGNORE
from lora_lab.tasks import digits
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear
from tests.helpers import PNG, BetweenLinear, perturbed, printed_json, randomise


def trained(model, kind=None, r=3):
    """The model with adapters that do something."""
    inject(model, LoRAConfig(r, 2 * r), layer=kind)
    return randomise(model, size=0.1)


def assert_row(row, delta, W):
    """The row holds what numpy finds in the whole matrices."""
    delta, W = delta.detach().double().numpy(), W.detach().double().numpy()
    U, S, Vh = np.linalg.svd(delta, full_matrices=False)
    energy = np.cumsum(S**2) / np.sum(S**2)
    share = S / S.sum()
    k = min(8, np.count_nonzero(S / S[0] > 1e-6))
    expected = {
        "out": delta.shape[0],
        "in": delta.shape[1],
        "norm": np.linalg.norm(delta),
        "spectral_norm": S[0],
        "effective_rank": np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()),
        "stable_rank": (S**2).sum() / S[0] ** 2,
        "energy_rank": np.argmax(energy >= 0.9) + 1,
        "relative_norm": np.linalg.norm(delta) / np.linalg.norm(W),
        "amplification": np.linalg.norm(delta) / np.linalg.norm(U[:, :k].T @ W @ Vh[:k].T),
    }
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("kind", [None, RsLoRALinear, LoRAFALinear, PiSSALinear])
def test_rows_are_those_of_the_dense_updates(tiny_config, kind):
    model = Llama(tiny_config)
    base = copy.deepcopy(model)
    trained(model, kind)
    merged = copy.deepcopy(model)
    names = merge(merged)
    frame = spectra.report(None, model).set_index("layer")
    assert list(frame.index) == names
    for name in names:
        W = base.get_submodule(name).weight
        assert_row(frame.loc[name], merged.get_submodule(name).weight - W, W)
        assert frame["rank"][name] == (6 if kind is PiSSALinear else 3)  # PiSSA's start is taken off
    assert set(frame.kind) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(frame.depth) == set(range(tiny_config.num_hidden_layers))


@pytest.mark.parametrize("kind", [None, RsLoRALinear, PiSSALinear])
def test_the_same_adapter_from_model_state_and_folder(tmp_path, kind):
    model = DigitsMLP()
    base = copy.deepcopy(model)
    save_adapter(trained(model, kind), tmp_path)
    sources = [(None, model), (base, adapter_state(model)), (base.state_dict(), tmp_path), (base, str(tmp_path))]
    first, *others = (spectra.report(*source) for source in sources)
    for other in others:
        assert list(other.columns) == list(first.columns)
        np.testing.assert_allclose(
            other.select_dtypes("number").astype(float), first.select_dtypes("number").astype(float), rtol=1e-4
        )
    alone = spectra.report(None, tmp_path)
    assert "amplification" not in alone
    np.testing.assert_allclose(alone.norm.sort_values(), first.norm.sort_values(), rtol=1e-5)


def test_layers_whose_names_hold_base_keep_their_names_and_their_weights():
    def net():
        inner = nn.Sequential(OrderedDict(baseline=nn.Linear(8, 8), base=nn.Linear(8, 8)))
        return nn.Sequential(OrderedDict(base=inner, head=nn.Linear(8, 2)))

    names = ["base.baseline", "base.base", "head"]
    base, adapted = net(), trained(net())
    assert list(spectra.report(base, perturbed(base)).layer) == names
    untrained = copy.deepcopy(base)
    inject(untrained, LoRAConfig(3, 6))
    for before in (base, base.state_dict(), untrained):
        frame = spectra.report(before, adapter_state(adapted))
        assert list(frame.layer) == names
        assert frame[["relative_norm", "amplification"]].notna().all(axis=None)


def test_two_models_are_compared_matrix_by_matrix():
    base = DigitsMLP()
    model = perturbed(base, size=1)
    frame = spectra.report(base, model).set_index("layer")
    assert list(frame.index) == ["hidden1", "hidden2", "head"]
    assert frame["rank"].isna().all()
    for name in frame.index:
        W = base.get_submodule(name).weight
        assert_row(frame.loc[name], model.get_submodule(name).weight - W, W)
    assert spectra.report(base.state_dict(), model.state_dict()).norm.tolist() == pytest.approx(frame.norm.tolist())


def test_a_change_without_signal_lies_within_its_band_and_one_with_signal_does_not():
    base = DigitsMLP()
    noise, signal = perturbed(base), copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in signal.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.outer(*(torch.randn(n, generator=generator) for n in parameter.shape)))
    inside, outside = spectra.report(base, noise), spectra.report(base, signal)
    for statistic in spectra.STATISTICS:
        low, high = (inside[f"{statistic}_{side}"] for side in ("low", "high"))
        assert (low <= high).all()
        assert (inside[statistic] >= 0.97 * low).all()
        assert (inside[statistic] <= 1.03 * high).all()
        assert (outside[statistic] < 0.7 * outside[f"{statistic}_low"]).all()


def test_a_random_adapter_lies_within_the_band_of_its_rank_and_is_grouped_by_kind_and_depth(tiny_config):
    frame, depth = spectra.report(None, trained(Llama(tiny_config), r=4)), tiny_config.num_hidden_layers
    inside = (frame.stable_rank >= frame.stable_rank_low) & (frame.stable_rank <= frame.stable_rank_high)
    assert inside.mean() > 0.6  # A is uniform, not Gaussian
    assert float(spectra.null_bands((32, 32))["stable_rank"].low) > frame.stable_rank_high.max()  # of a full matrix
    by_kind, by_depth = spectra.group(frame), spectra.group(frame, "depth")
    assert (by_kind.layers.tolist(), by_depth.layers.tolist()) == ([depth] * 7, [7] * depth)
    assert by_kind.stable_rank["q_proj"] == pytest.approx(frame[frame.kind == "q_proj"].stable_rank.median())
    _, columns, *rows = spectra.table(frame).splitlines()
    assert "stable_rank_low" not in columns
    (row,) = (row for row in rows if row.startswith("q_proj "))
    medians = by_kind.loc["q_proj"]
    assert f"{medians.stable_rank:.3g} [{medians.stable_rank_low:.3g}-{medians.stable_rank_high:.3g}]" in row
    assert len({len(line) for line in [columns, *rows]}) == 1
    assert len(spectra.table(frame, "depth").splitlines()) == 2 + depth


def test_the_band_of_amplification_is_that_of_random_directions():
    base = DigitsMLP()
    frame = spectra.report(None, trained(base))
    for row in frame.itertuples():
        assert row.amplification_low < row.amplification_high
        W = base.get_submodule(row.layer).base.weight.detach().double()
        generator = torch.Generator().manual_seed(99)
        others = []
        for _ in range(200):
            U, V = (rank.orthonormal(n, 3, generator=generator) for n in W.shape)
            others.append(row.norm / float((U.T @ W @ V).norm()))
        outside = np.mean([not row.amplification_low <= other <= row.amplification_high for other in others])
        assert outside < 0.15


@pytest.mark.parametrize("kind", [DoRALinear, BetweenLinear])
def test_a_variant_is_reported_with_all_that_it_changes(kind):
    model = trained(DigitsMLP(), kind)
    frame = spectra.report(None, model).set_index("layer")
    layer = model.hidden1
    expected = (layer.merged().weight - layer.base.weight).detach()
    assert float(frame.norm["hidden1"]) == pytest.approx(float(expected.norm()), rel=1e-4)
    assert frame["rank"].isna().all()


def test_embeddings_convolutions_and_a_base_in_4_bits(tiny_config):
    model = torch.nn.Sequential(torch.nn.Embedding(20, 12), torch.nn.Flatten(), torch.nn.Conv2d(3, 8, 3))
    model[0], model[2] = LoRAEmbedding(model[0], 2, 4), LoRAConv2d(model[2], 2, 4)
    frame = spectra.report(None, randomise(model)).set_index("layer")
    assert (frame["out"].tolist(), frame["in"].tolist()) == ([12, 8], [20, 27])
    for name, layer in lora_layers(model).items():
        W, delta = layer.base.weight.flatten(1), layer.delta().flatten(1)
        assert_row(frame.loc[name], *((delta.T, W.T) if name == "0" else (delta, W)))
    model = Llama(tiny_config)
    quantize_nf4(model)
    assert spectra.report(None, trained(model)).relative_norm.between(0, 10).all()


def test_intruders_beside_those_of_noise_as_large():
    base = DigitsMLP()
    model = copy.deepcopy(base)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        W = model.hidden2.weight
        W.add_(torch.outer(torch.randn(128, generator=g), torch.randn(128, generator=g)) / 5)  # one strong direction
    changed, same = (spectra.count_intruders(spectra.updates(base, model)[name]) for name in ("hidden2", "head"))
    old, new = (m.hidden2.weight.detach().double().numpy() for m in (base, model))
    X, Y = (np.linalg.svd(m)[0] for m in (old, new))
    assert changed["intruders"] == (np.abs(Y[:, :10].T @ X).max(1) < 0.5).sum()
    assert same["intruders"] == same["intruders_high"] == 0  # it did not change
    assert changed["intruders_low"] <= changed["intruders_high"] <= 10
    assert 0 < changed["floor"] < 0.5


def spoil(model):
    with torch.no_grad():
        model.head.lora_A[0, 0] = torch.nan
    return model


REFUSED = [
    (lambda: spectra.report(None, DigitsMLP()), ValueError, "after has no adapters"),
    (lambda: spectra.report(DigitsMLP(), DigitsMLP(32)), ValueError, "'hidden1' has shape"),
    (lambda: spectra.report(DigitsMLP(), nn.Linear(2, 2)), ValueError, "no matrix of the same name"),
    (lambda: spectra.table(spectra.report(None, trained(DigitsMLP())), "rank"), ValueError, "by is 'rank'"),
    (lambda: spectra.report(None, "no folder"), FileNotFoundError, "no folder"),
    (lambda: spectra.report(None, adapter_state(trained(DigitsMLP(), DoRALinear))), ValueError, "DoRA"),
    (lambda: spectra.report(None, spoil(trained(DigitsMLP()))), ValueError, "NaN"),
    (lambda: spectra.count_intruders(spectra.Update(rank.svd(torch.ones(2, 2)))), ValueError, "before training"),
]


@pytest.mark.parametrize(("call", "error", "says"), REFUSED)
def test_wrong_values_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_nothing_of_the_model_changes():
    model = trained(DigitsMLP())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    spectra.report(None, model)
    assert spectra.null_bands((20, 30), 2) is spectra.null_bands((20, 30), 2) != spectra.null_bands((20, 30), 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


# A training with nothing to learn


def test_nothing_is_learned_from_the_bases_own_labels(one_thread):
    def gain(task):
        """How far the loss on the digits' labels falls in a training on others."""
        model = pretrained_digits()
        before = evaluate(model, digits(), "validation")
        fit(model, task, FullFineTuning(), steps=150, lr=3e-3, batch_size=32, progress=False)
        return before - evaluate(model, digits(), "validation")

    own, control = gain(digits()), gain(spectra.null(digits(), pretrained_digits()))
    assert own > 1
    assert control < 0.1 * own


def test_no_model_predicts_the_labels_better_than_the_base():
    base, task = pretrained_digits(), digits()
    control = spectra.null(task, base)

    def loss(model):
        torch.manual_seed(0)
        return sum(control.loss(model, task.train.inputs, task.train.targets).item() for _ in range(20)) / 20

    entropy = torch.distributions.Categorical(logits=base(task.train.inputs)).entropy().mean().item()
    assert loss(base) == pytest.approx(entropy, rel=0.05)
    assert loss(perturbed(base)) > loss(base) + 0.01


def test_targets_that_do_not_count_stay_so(tiny_config):
    base = Llama(tiny_config, seed=3)
    ids = torch.randint(tiny_config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[:, :6] = IGNORE
    torch.manual_seed(1)
    loss = DrawnLabels(base)(base, ids[:, :-1], targets)
    torch.manual_seed(1)
    scores = base(ids[:, :-1])
    labels = torch.multinomial(scores.flatten(0, 1).softmax(-1), 1).view(2, 8)
    assert loss.item() == pytest.approx(F.cross_entropy(scores[:, 6:].flatten(0, 1), labels[:, 6:].flatten()).item())


def test_the_base_is_copied_and_a_run_is_repeatable():
    base = pretrained_digits()
    control, model = spectra.null(digits(), base), copy.deepcopy(base)
    losses = []
    for start in (model, base):  # the second run trains what the control was made of
        history = fit(start, control, LoRA(2, 4), steps=5, lr=1e-2, batch_size=8, seed=1, progress=False)
        losses.append([row["train_loss"] for row in history.rows[1:]])
    assert losses[0] == losses[1]
    assert not any(parameter.requires_grad for parameter in control.loss.base.parameters())


def test_an_evaluation_repeats_and_takes_nothing_from_what_training_draws():
    base, task = pretrained_digits(), digits()
    control, state = spectra.null(task, base), torch.get_rng_state()
    with torch.no_grad():
        first, again = (control.loss(base, task.train.inputs, task.train.targets).item() for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    training = [control.loss(base, task.train.inputs, task.train.targets).item() for _ in range(2)]
    assert training[0] != training[1]


# The command


@pytest.fixture
def saved(tiny_config, tiny_tokenizer, tmp_path):
    """A model with an adapter, and the arguments of the command for its files."""
    model = Llama(tiny_config)
    save_model(model, tmp_path / "base", tiny_tokenizer)
    save_adapter(trained(model), tmp_path / "adapter")
    return model, [
        "analyze", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")
    ]  # fmt: skip


def test_analyze_prints_tables_and_writes_layers_and_pictures_and_as_json_the_same(saved, tmp_path, capsys):
    model, arguments = saved
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    frame = spectra.report(None, model)
    assert all(spectra.table(frame, by) in printed for by in ("kind", "depth"))
    assert sorted(pandas.read_csv(tmp_path / "out" / "layers.csv").layer) == sorted(frame.layer)
    for statistic in plots.STATISTICS:
        assert (tmp_path / "out" / f"{statistic}.png").read_bytes().startswith(PNG)
        assert f"{statistic}.png" in printed
    assert cli.main([*arguments, "--json"]) == 0
    document, _ = printed_json(capsys)
    assert document["folder"] == str(tmp_path / "out")
    layers = pandas.DataFrame(document["layers"]).set_index("layer")
    frame = frame.set_index("layer").loc[layers.index].astype(layers.dtypes)
    pandas.testing.assert_frame_equal(layers, frame, rtol=1e-4)
    for by, count in (("kind", 7), ("depth", 2)):
        assert len(document[f"by_{by}"]) == count
        for row in document[f"by_{by}"]:
            same = frame.norm[frame[by] == row[by]]
            assert (row["layers"], row["norm"]) == (len(same), pytest.approx(same.median(), rel=1e-4))


def test_what_analyze_does_not_know_is_null_in_json(tmp_path, capsys):
    save_adapter(trained(DigitsMLP()), tmp_path / "adapter")
    assert cli.main(["analyze", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--json"]) == 0
    document, _ = printed_json(capsys)
    assert {row["depth"] for row in [*document["layers"], *document["by_depth"]]} == {None}
    assert "amplification" not in document["layers"][0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["layers.csv"]  # no depths to draw over


def test_analyze_compares_two_models(tiny_config, tiny_tokenizer, tmp_path, capsys):
    model = Llama(tiny_config)
    save_model(model, tmp_path / "base", tiny_tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    save_model(model, tmp_path / "tuned", tiny_tokenizer)
    arguments = ["analyze", str(tmp_path / "tuned"), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--base", str(tmp_path / "base")]) == 0
    frame = pandas.read_csv(tmp_path / "out" / "layers.csv").set_index("layer")
    assert frame.stable_rank["model.layers.0.mlp.up_proj"] == pytest.approx(1, rel=1e-3)
    assert frame.norm["model.layers.1.mlp.up_proj"] == 0
    capsys.readouterr()
    assert cli.main(arguments) == 1
    assert "is not an adapter" in capsys.readouterr().err
