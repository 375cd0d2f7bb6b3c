"""What the studies of small bases plan, and what a sweep of one makes."""

import itertools

import pytest
import torch

from lora_lab import Llama, inject, load_pretrained
from lora_lab.models.pretrained import TINY, load_tokenizer
from lora_lab.studies import tiny
from lora_lab.tasks.pages import corpora

CPU = torch.device("cpu")
PLANS = [tiny.plan_tiny_rank, tiny.plan_tiny_layers, tiny.plan_tiny_variants]


@pytest.mark.parametrize("plan", PLANS)
def test_eight_seeds_that_chose_nothing_judge_every_base_by_page(plan):
    sweeps = list(plan(CPU))
    assert [sweep.data for sweep in sweeps] == [f"{base}, numpy" for base in tiny.BASES]
    for sweep in sweeps:
        assert len(sweep.choosing) >= 2
        assert len(sweep.judging) >= 8
        assert not set(sweep.choosing) & set(sweep.judging)
        assert sweep.block == tiny.PER_PAGE
        assert sweep.judged_on["test"] >= 1000
        for lrs in sweep.lrs.values():
            assert len(lrs) >= 3
            assert all(1.9 < high / low < 2.1 for low, high in itertools.pairwise(lrs))


def test_the_bases_are_shipped_in_two_seeds_a_width():
    assert set(tiny.BASES) <= set(TINY)
    widths = [tiny.width_of(base) for base in tiny.BASES]
    assert {widths.count(width) for width in widths} == {2}


@pytest.mark.parametrize("base", tiny.BASES[::2])
def test_layers_are_compared_at_equal_numbers_of_trained_parameters(base):
    config = load_pretrained(base)[0].config
    counts = []
    (sweep,) = (sweep for sweep in tiny.plan_tiny_layers(CPU) if sweep.data.startswith(base))
    for trial, _ in sweep.setups.values():
        with torch.device("meta"):
            model = Llama(config)
            inject(model, trial.method)
        counts.append(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
    assert len(counts) == 4
    assert len(set(counts)) == 1


def test_no_step_of_the_longest_run_reads_what_an_earlier_one_read():
    task = tiny.make_task("numpy", "tiny-64-0")
    longest = max(trial.steps for sweep in tiny.plan_tiny_rank(CPU) for trial, _ in sweep.setups.values())
    assert len(task.train) >= longest * tiny.BATCH
    assert len(task.test) == 128 * tiny.PER_PAGE
    tokens = torch.bincount(task.test.targets.new_tensor(range(128)).repeat_interleave(tiny.PER_PAGE))
    assert tokens.max() / tokens.sum() <= 0.05  # of the text, one page


def test_a_page_of_the_test_part_is_a_block_and_in_no_other_part():
    tokenizer, task = load_tokenizer("tiny-64-0"), tiny.make_task("numpy", "tiny-64-0")
    pages = corpora()["numpy"]
    first = tokenizer.decode(task.test.inputs[: tiny.PER_PAGE].flatten().tolist())
    assert sum(page.text.startswith(first) for page in pages) == 1
    rows = {tuple(row) for row in task.train.inputs.tolist()}
    held = [tuple(row) for row in [*task.test.inputs.tolist(), *task.validation.inputs.tolist()]]
    assert sum(row in rows for row in held) <= len(held) / 1000
