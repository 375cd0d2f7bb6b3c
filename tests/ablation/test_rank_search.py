"""Which rank is enough, by a short sweep: what it plans, finds where the answer is known, and leaves open."""

import json

import numpy as np
import pandas
import pytest
import torch

from lora_lab import tasks
from lora_lab.ablation.compare import judge_ranks
from lora_lab.ablation.rank_search import count_runs, find_rank, plan_ranks, time_run
from lora_lab.models.digits import DigitsMLP
from tests.helpers import command


def frame(differences, noise=0.001, edge="", seeds=5, blocks=8):
    """A table as of compare_tuned: test losses by rank above those of the highest; ``edge`` is that of the first."""
    random, rows = np.random.default_rng(0), []
    pages = 2 + 0.3 * random.random(blocks)
    for rank, difference in differences.items():
        for seed in range(2, 2 + seeds):
            losses = (pages + difference + random.normal(0, noise, blocks)).tolist()
            row = {"setup": f"rank {rank}", "rank": rank, "method": "lora", "lr": 1e-3, "seed": seed, "step": 9}
            row |= {"steps": 9, "stage": "judging", "outcome": "done", "key": f"{rank}-{seed}"}
            row |= {"edge": edge if rank == min(differences) else "", "score_test": json.dumps(losses)}
            rows.append(row | {"test_loss": float(np.mean(losses)), "validation_loss": 2.0})
    return pandas.DataFrame(rows)


@pytest.mark.parametrize(
    ("differences", "rank", "statuses"),
    [
        ({1: 0.1, 4: 0.002, 16: 0.0}, 4, ["too small", "enough", "reference"]),
        ({1: 0.1, 4: 0.05, 16: 0.0}, 16, ["too small", "too small", "reference"]),
        ({1: 0.001, 4: 0.002, 16: 0.0}, 1, ["enough", "enough", "reference"]),
        ({1: -0.1, 4: 0.002, 16: 0.0}, 1, ["enough", "enough", "reference"]),
    ],
)
def test_the_smallest_rank_within_the_margin_is_enough(differences, rank, statuses):
    verdict = judge_ranks(frame(differences), 0.01)
    assert (verdict.rank, [one.status for one in verdict.ranks]) == (rank, statuses)
    assert [one.rank for one in verdict.ranks] == [*differences]


def test_what_the_seeds_and_examples_cannot_tell_is_open():
    assert judge_ranks(frame({1: 0.01, 16: 0.0}, noise=0.01), 0.01).rank is None
    assert judge_ranks(frame({1: 0.01, 16: 0.0}, noise=0.01), 0.1).rank == 1


def test_a_smaller_rank_that_may_be_enough_is_named():
    made = pandas.concat([frame({1: 0.01}, noise=0.01), frame({4: 0.0, 16: 0.0})])
    verdict = judge_ranks(made, 0.012)
    assert verdict.rank == 4
    assert verdict.notes == ("rank 1 may be enough, too; more seeds would tell.",)


def test_a_rank_without_a_result_for_each_seed_is_not_judged():
    made = frame({1: 0.0, 4: 0.0, 16: 0.0})
    made.loc[made["key"] == "1-3", "outcome"] = "failed"
    assert [one.status for one in judge_ranks(made, 0.01).ranks] == ["not judged", "enough", "reference"]


def test_a_rate_at_the_edge_of_its_grid_decides_nothing():
    verdict = judge_ranks(frame({1: 0.0, 16: 0.0}, edge="largest"), 0.01)
    assert (verdict.rank, verdict.ranks[0].status) == (None, "open")
    assert "at the edge of the rates tried" in str(verdict)


def test_each_rank_tries_three_rates_around_one_that_serves_all():
    setups = plan_ranks((16, 1, 4), 2e-3, 60, 4)
    assert {setup: lrs for setup, (_, lrs) in setups.items()} == {
        "rank 1": (5e-4, 1e-3, 2e-3),
        "rank 4": (1e-3, 2e-3, 4e-3),
        "rank 16": (1e-3, 2e-3, 4e-3),
    }
    assert {(trial.method.alpha, trial.steps, trial.batch_size) for trial, _ in setups.values()} == {(32, 60, 4)}
    assert count_runs((1, 4, 16), 5) == 3 * (3 * 2 + 5)


NET = {"lr": 8e-3, "steps": 600, "batch_size": 32, "margin": 0.005}


@pytest.mark.parametrize("rank", [1, 4])
def test_it_finds_the_rank_of_a_planted_update(rank, tmp_path):
    net = DigitsMLP(dtype=torch.float64)
    task = tasks.planted(net, rank, n_train=4096)
    assert find_rank(net, task, (1, 4, 16), folder=tmp_path, seeds=3, **NET).rank == rank


def test_a_run_is_timed_by_a_few_steps(tmp_path):
    net = DigitsMLP(width=16)
    task = tasks.planted(net, 1, n_train=64)
    before = [parameter.clone() for parameter in net.parameters()]
    short, long = (time_run(net, task, (1, 2), steps, 8) for steps in (10, 1000))
    assert 0 < short < long
    assert all((a == b).all() for a, b in zip(before, net.parameters(), strict=True))


def test_the_command_says_the_time_first_and_gives_the_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ("--ranks", "1", "2", "--steps", "5", "--batch", "8", "--seeds", "2", "--out", "sweep")
    assert command("rank", "digits", "--lr", "8e-3", *size) == 0
    printed = capsys.readouterr().out
    assert printed.index("16 runs of about") < printed.index("margin 0.01")
    assert (tmp_path / "sweep/verdict.png").is_file()
    assert command("rank", "digits", "--lr", "8e-3", *size[:-1], "planned", "--plan") == 0
    assert "16 runs of about" in capsys.readouterr().out
    assert not (tmp_path / "planned").exists()
    assert command("rank", "digits", "--ranks", "2", "--out", "other") == 1
    assert "it takes two ranks" in capsys.readouterr().err


def test_it_runs_on_a_folder_of_hugging_face_and_a_file_of_lines(tiny_hf, hf_folder, tmp_path, monkeypatch, capsys):
    folder = hf_folder(tiny_hf())
    rows = [{"text": f"Line {number} of a file of mine says {3 * number}."} for number in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    options = ("--ranks", "1", "2", "--steps", "4", "--batch", "2", "--seeds", "2", "--out", "sweep")
    assert command("rank", "mine.jsonl", "--model", folder, *options) == 0
    assert "16 runs of about" in capsys.readouterr().out
    assert (tmp_path / "sweep/verdict.png").is_file()
