"""lora-lab ablate and what it begins with: models, tasks and grids by name, a run that goes on, and what is refused."""

import json

import pandas
import pytest
import torch

from lora_lab import DoRA, LoRA, cli, evaluate, plots
from lora_lab.ablation import load, studies, summary
from lora_lab.tasks import Task


def command(*arguments):
    return cli.main(["ablate", *map(str, arguments)])


def test_the_reader_knows_the_digits_as_they_are_and_half_of_those_moved():
    model, task = studies.study("digits")
    assert isinstance(task, Task)
    pretrained, moved = (evaluate(model, task, part) for part in ("off_domain", "test"))
    assert pretrained < 0.3 < moved
    again, _ = studies.study("digits")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_planted_task_is_of_the_model_that_comes_with_it():
    model, task = studies.study("planted")
    assert task.name == "planted-rank4"
    with torch.no_grad():
        torch.testing.assert_close(model(task.off_domain.inputs), task.off_domain.targets)


def test_the_language_model_is_made_where_it_runs():
    make, task = studies.study("docs", 32)
    assert make.func is studies.language_model  # a function that can be imported, for workers
    assert (task.func, task.args) == (studies.manual, (32,))


def test_the_language_model_is_put_where_it_was_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(studies, "load_pretrained", lambda name, device: asked.append(device) or ("a model", None))
    for device in (torch.device("cpu"), torch.device("meta"), None):
        make, _ = studies.study("docs", 32, device)
        assert make() == "a model"
        assert asked.pop() == device


def test_a_grid_has_the_studys_own_numbers_unless_others_are_given():
    lrs, steps, batch, _ = studies.DEFAULTS["digits"]
    own = studies.grid("digits", "lora", [1, 2], None, range(2), alpha_per_rank=2)
    assert len(own) == 2 * len(lrs) * 2
    assert {trial.lr for trial in own} == set(lrs)
    assert {(trial.steps, trial.batch_size) for trial in own} == {(steps, batch)}
    assert {trial.method for trial in own} == {LoRA(1, 2), LoRA(2, 4)}
    other = studies.grid("docs", "dora", [4], [1e-3], [7], steps=9, batch_size=2, alpha=8)
    (trial,) = other
    assert (trial.method, trial.lr, trial.seed, trial.steps, trial.batch_size) == (DoRA(4, 8), 1e-3, 7, 9, 2)


def test_names_that_are_not_known_are_refused():
    for call in (lambda: studies.study("cats"), lambda: studies.grid("cats", "lora", [1], None, [0])):
        with pytest.raises(ValueError, match="no study 'cats'; there are planted, digits, docs"):
            call()
    with pytest.raises(ValueError, match="no method 'full' with ranks"):
        studies.grid("digits", "full", [1], None, [0])
    with pytest.raises(ValueError, match="seq_len is 1"):
        studies.study("docs", 1)


def test_ablate_runs_a_grid_prints_a_verdict_and_goes_on(tmp_path, capsys):
    arguments = ["--task", "planted", "--ranks", "1,4", "--lrs", "1e-2", "--steps", 20, "--out", tmp_path]
    assert command(*arguments, "--seeds", 1) == 0
    assert "undecided: more seeds needed" in capsys.readouterr().out
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "trials").glob("*.json")}
    assert len(first) == 2
    assert command(*arguments, "--seeds", 3) == 0
    printed = capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "trials").glob("*.json")}
    assert len(after) == 6
    assert {name: after[name] for name in first} == first  # they were not run again
    frame = load(tmp_path / "trials")
    assert str(summary(frame, studies.DEFAULTS["planted"].margin)) in printed
    assert len(pandas.read_csv(tmp_path / "table.csv")) == len(frame)
    for name in ("rates", "forgetting", "verdict"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_one_rank_has_no_verdict(tmp_path):
    assert (
        command("--task", "planted", "--ranks", "2", "--lrs", "1e-2", "--steps", 5, "--seeds", 2, "--out", tmp_path)
        == 0
    )
    assert not (tmp_path / "verdict.png").exists()


def test_one_alpha_for_all_ranks(tmp_path):
    arguments = ["--task", "planted", "--ranks", "1,2", "--lrs", "1e-2", "--steps", 5, "--seeds", 1, "--alpha", 8]
    assert command(*arguments, "--out", tmp_path) == 0
    trials = [json.loads(path.read_text())["trial"] for path in (tmp_path / "trials").glob("*.json")]
    assert {trial["method"]["alpha"] for trial in trials} == {8}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "cats"], "no study 'cats'"),
        (["--method", "full"], "no method 'full'"),
        (["--seeds", 0], "seeds is empty"),
        (["--engine", "fast"], "engine is 'fast'"),
        (["--ranks", "0,1"], "rank is 0"),
        (["--margin", "-1"], "margin is -1"),
    ],
)
def test_ablate_refuses_what_makes_no_sense_in_one_sentence(tmp_path, capsys, arguments, says):
    settings = ["--task", "planted", "--lrs", "1e-2", "--steps", 2, "--seeds", 2, "--ranks", "1,2", "--out", tmp_path]
    assert command(*settings, *arguments) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_a_list_that_is_none_is_argparses_to_refuse(capsys):
    with pytest.raises(SystemExit):
        command("--ranks", "1,two")
    assert "invalid list of int value: '1,two'" in capsys.readouterr().err


def test_the_pictures_of_an_ablation(tmp_path):
    command("--task", "planted", "--ranks", "1,2", "--lrs", "3e-3,1e-2", "--steps", 5, "--seeds", 3, "--out", tmp_path)
    frame = load(tmp_path / "trials")
    last = frame[frame.step == frame.steps]
    rates = plots.loss_by_rate(frame)
    for container, rank in zip(rates.containers, (1, 2), strict=True):
        expected = last[last["rank"] == rank].groupby("lr").validation_loss.mean()
        assert container.lines[0].get_xdata().tolist() == pytest.approx(expected.index.tolist())
        assert container.lines[0].get_ydata().tolist() == pytest.approx(expected.tolist())
    assert rates.get_xscale() == "log"
    forgetting = plots.learning_and_forgetting(frame)
    points = [line for line in forgetting.get_lines() if len(line.get_xdata())]
    assert sum(len(line.get_xdata()) for line in points) == len(last)
    verdict = summary(frame)
    picture = plots.rank_verdict(verdict)
    (judged,) = (one for one in verdict.ranks if one.upper is not None)
    (bars,) = picture.containers
    assert bars.lines[0].get_ydata().tolist() == pytest.approx([judged.difference])
    assert bars.get_label() == judged.standing
    assert f"margin {verdict.margin:g}" in [text.get_text() for text in picture.get_legend().get_texts()]
    assert [tick.get_text() for tick in picture.get_xticklabels()] == ["1", "2"]
    plots.plt.close("all")
