"""lora-lab ablate and what it begins with: models, tasks and grids by name, a run that goes on, and what is refused."""

import json
import os
import subprocess
import sys

import pandas
import pytest
import torch

from lora_lab import DoRA, LoRA, evaluate, fit, plots
from lora_lab.ablation import load, materials, smallest_sufficient_rank
from lora_lab.models.llama import Llama
from lora_lab.tasks import Task, digits, docs
from tests.helpers import ByteTokenizer, command, printed_json


def ablate(*arguments):
    return command("ablate", *arguments)


def test_the_reader_knows_the_digits_as_they_are_and_half_of_those_moved():
    model, task = materials.get("digits")
    assert isinstance(task, Task)
    pretrained, moved = (evaluate(model, task, part) for part in ("off_domain", "test"))
    assert pretrained < 0.3 < moved
    again, _ = materials.get("digits")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    again.to(torch.bfloat16)  # in place, as a move to a GPU is
    assert next(materials.pretrained_digits().parameters()).dtype == torch.float64


# Prints two losses after training at a high rate, in full precision.
_AT_A_HIGH_RATE = """
from lora_lab.ablation import materials
from lora_lab.methods import LoRA
from lora_lab.train import evaluate, fit
for name in ("digits", "planted"):
    model, task = materials.get(name)
    fit(model, task, LoRA(8, 16), steps=60, lr=0.06, batch_size=32, progress=False)
    print(evaluate(model, task, "validation").hex())
"""
_OLDEST = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}


@pytest.mark.slow
def test_results_of_the_small_nets_do_not_depend_on_the_processors_instructions():
    def losses(**settings):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
        run = subprocess.run(
            [sys.executable, "-c", _AT_A_HIGH_RATE], env=environment, capture_output=True, text=True, check=True
        )
        return [float.fromhex(line) for line in run.stdout.split()]

    assert losses(**_OLDEST) == pytest.approx(losses(), rel=1e-9)


def test_a_reader_of_another_split_has_learned_that_splits_pictures_as_they_are():
    net, again, other = (materials.pretrained_digits(n) for n in (1024, 1024, 500))
    task = digits("adapt", n_train=1024)
    pretrained, moved = (evaluate(net, task, part) for part in ("off_domain", "test"))
    assert pretrained < 0.6 < moved
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not torch.equal(net.head.weight, other.head.weight)
    fit(net, task, LoRA(2, 4), steps=1, lr=1e-3, progress=False)  # it bears no mark of its training


def test_the_manual_is_whole_unless_so_many_examples_are_drawn_by_a_seed(monkeypatch):
    monkeypatch.setattr(materials, "load_tokenizer", lambda name: ByteTokenizer())
    whole = docs(ByteTokenizer(), 64)
    assert materials.docs_task(64).fingerprint == whole.fingerprint
    drawn = materials.docs_task(64, 16, 3)
    rows = torch.randperm(len(whole.train), generator=torch.Generator().manual_seed(3))[:16]
    assert torch.equal(drawn.train.inputs, whole.train.inputs[rows])
    assert torch.equal(drawn.train.targets, whole.train.targets[rows])
    assert all(torch.equal(drawn.parts[part].inputs, whole.parts[part].inputs) for part in ("validation", "test"))
    prints = {
        task.fingerprint for task in (whole, drawn, materials.docs_task(64, 16, 4), materials.docs_task(64, 17, 3))
    }
    assert len(prints) == 4
    assert materials.docs_task(64, 16, 3).fingerprint == drawn.fingerprint
    assert torch.equal(materials.docs_task(64, 16).train.inputs, whole.train.inputs[:16])


def test_the_planted_task_is_of_the_model_that_comes_with_it():
    model, task = materials.get("planted")
    assert task.name == "planted-rank4"
    with torch.no_grad():
        torch.testing.assert_close(model(task.off_domain.inputs), task.off_domain.targets)


def test_the_language_model_is_put_where_it_was_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(materials, "load_pretrained", lambda name, device: asked.append(device) or ("a model", None))
    for device in (torch.device("cpu"), torch.device("meta"), None):
        make, _ = materials.get("docs", 32, device)
        assert make() == "a model"
        assert asked.pop() == device


def test_a_newborn_model_has_the_language_models_shape_and_learned_nothing(monkeypatch, tiny_config):
    learned, untrained = Llama(tiny_config, seed=3), Llama(tiny_config, seed=0).state_dict()
    monkeypatch.setattr(materials, "load_pretrained", lambda name, device: (learned, None))
    for name, value in materials.random_init().state_dict().items():
        assert torch.equal(value, untrained[name])
        assert torch.equal(value, learned.state_dict()[name]) == ("norm" in name)


def test_a_grid_has_the_studys_own_numbers_unless_others_are_given():
    lrs, steps, batch, _ = materials.DEFAULTS["digits"]
    own = materials.grid("digits", "lora", [1, 2], None, range(2), alpha_per_rank=2)
    assert len(own) == 2 * len(lrs) * 2
    assert {trial.lr for trial in own} == set(lrs)
    assert {(trial.steps, trial.batch_size) for trial in own} == {(steps, batch)}
    assert {trial.method for trial in own} == {LoRA(1, 2), LoRA(2, 4)}
    other = materials.grid("docs", "dora", [4], [1e-3], [7], steps=9, batch_size=2, alpha=8)
    (trial,) = other
    assert (trial.method, trial.lr, trial.seed, trial.steps, trial.batch_size) == (DoRA(4, 8), 1e-3, 7, 9, 2)


def test_names_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="task is 'cats', but it must be one of planted, digits, docs"):
        materials.get("cats")
    with pytest.raises(ValueError, match="seq_len is 1"):
        materials.get("docs", 1)
    with pytest.raises(FileNotFoundError, match=r"mine\.csv"):
        materials.get("mine.csv")
    with pytest.raises(ValueError, match="no method 'full' with ranks"):
        materials.grid("digits", "full", [1], None, [0])


def test_ablate_as_json_has_the_verdict_and_every_evaluation(tmp_path, capsys):
    arguments = ["--task", "planted", "--lrs", "1e-2", "1e99", "--steps", 20, "--out", tmp_path, "--json"]
    assert ablate(*arguments, "--ranks", 1, 4, "--seeds", 2) == 0
    document, rest = printed_json(capsys)
    assert "8 trials; results in" in rest
    frame = load(tmp_path / "trials")
    assert (document["trials"], len(document["evaluations"])) == (8, len(frame))
    assert {row["outcome"] for row in document["evaluations"]} == {"done", "failed"}
    done = {(r["rank"], r["lr"], r["seed"], r["step"]): r for r in document["evaluations"] if r["outcome"] == "done"}
    rows = frame[frame.outcome == "done"]
    assert len(done) == len(rows)
    for row in rows.itertuples():
        entry = done[row.rank, row.lr, row.seed, row.step]
        assert entry["validation_loss"] == row.validation_loss
        assert entry["test_loss"] == (row.test_loss if row.step == 20 else None)  # judged at the last step alone
    verdict = smallest_sufficient_rank(frame, materials.DEFAULTS["planted"].margin)
    stated = document["verdict"]
    for name in ("rank", "reason", "method", "margin", "answer"):
        assert stated[name] == getattr(verdict, name)
    assert (stated["seeds"], stated["notes"]) == ([0, 1], list(verdict.notes))
    for entry, rank in zip(stated["ranks"], verdict.ranks, strict=True):
        assert entry == vars(rank)
    assert {entry["rank"] for entry in stated["ranks"]} == {1, 4}
    assert ablate(*arguments, "--ranks", "4", "--seeds", 1) == 0
    assert printed_json(capsys)[0]["verdict"] is None  # of one rank


def test_one_alpha_for_all_ranks(tmp_path):
    arguments = ["--task", "planted", "--ranks", 1, 2, "--lrs", "1e-2", "--steps", 5, "--seeds", 1, "--alpha", 8]
    assert ablate(*arguments, "--out", tmp_path) == 0
    trials = [json.loads(path.read_text())["trial"] for path in (tmp_path / "trials").glob("*.json")]
    assert {trial["method"]["alpha"] for trial in trials} == {8}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "cats"], "task is 'cats'"),
        (["--method", "full"], "no method 'full'"),
        (["--seeds", 0], "seeds is empty"),
        (["--ranks", 0, 1], "rank is 0"),
        (["--margin", "-1"], "margin is -1"),
    ],
)
def test_ablate_refuses_what_makes_no_sense_in_one_sentence(tmp_path, capsys, arguments, says):
    settings = ["--task", "planted", "--lrs", "1e-2", "--steps", 2, "--seeds", 2, "--ranks", 1, 2, "--out", tmp_path]
    assert ablate(*settings, *arguments) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_the_pictures_of_an_ablation(tmp_path):
    ablate("--task", "planted", "--ranks", 1, 2, "--lrs", 3e-3, 1e-2, "--steps", 5, "--seeds", 3, "--out", tmp_path)
    frame = load(tmp_path / "trials")
    assert len(pandas.read_csv(tmp_path / "table.csv")) == len(frame)
    for name in ("rates", "forgetting", "verdict"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    last = frame[frame.step == frame.steps]
    rates = plots.loss_by_rate(frame)
    for container, rank, shift in zip(rates.containers, (1, 2), (-0.5, 0.5), strict=True):
        expected = last[last["rank"] == rank].groupby("lr").validation_loss.mean()
        assert container.lines[0].get_xdata().tolist() == pytest.approx((expected.index * 1.04**shift).tolist())
        assert container.lines[0].get_ydata().tolist() == pytest.approx(expected.tolist())
    assert rates.get_xscale() == "log"
    forgetting = plots.learning_and_forgetting(frame)
    points = [line for line in forgetting.get_lines() if len(line.get_xdata())]
    assert sum(len(line.get_xdata()) for line in points) == len(last)
    verdict = smallest_sufficient_rank(frame)
    picture = plots.rank_verdict(verdict)
    (judged,) = (one for one in verdict.ranks if one.upper is not None)
    (bars,) = picture.containers
    assert bars.lines[0].get_ydata().tolist() == pytest.approx([judged.difference])
    assert bars.get_label() == judged.status
    (reference,) = (line for line in picture.get_lines() if line.get_label() == "reference")
    assert (list(reference.get_xdata()), list(reference.get_ydata())) == ([2], [0])
    assert f"margin {verdict.margin:g}" in [text.get_text() for text in picture.get_legend().get_texts()]
    assert [tick.get_text() for tick in picture.get_xticklabels()] == ["1", "2"]
