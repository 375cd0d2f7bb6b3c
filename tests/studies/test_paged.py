"""What the studies that are judged by pages plan, and what their tasks are made of."""

import itertools

import pytest
import torch

from lora_lab import Llama, inject, load_pretrained
from lora_lab.models.pretrained import TINY, load_tokenizer
from lora_lab.models.shapes import config
from lora_lab.studies import paged, versions
from lora_lab.tasks.pages import corpora

CPU = torch.device("cpu")
SMALL = [paged.plan_tiny_rank, paged.plan_tiny_readmes, paged.plan_tiny_batch, paged.plan_tiny_repeats]
SMALL += [paged.plan_tiny_layers, paged.plan_tiny_variants, versions.plan_tiny_quantised, versions.plan_tiny_upgrade]
SMOL = [paged.plan_smol_rank, paged.plan_smol_layers, paged.plan_smol_variants, versions.plan_smol_quantised]


@pytest.mark.parametrize("plan", [*SMALL, *SMOL])
def test_eight_seeds_that_chose_nothing_judge_every_base_by_page(plan):
    sweeps = list(plan(CPU))
    bases = paged.BASES if plan in SMALL else ["smollm2-135m"]
    bases = bases[::2] if plan is paged.plan_tiny_readmes else bases  # one of each width
    assert [*dict.fromkeys(sweep.data.partition(",")[0] for sweep in sweeps)] == [*bases]
    assert len({sweep.data for sweep in sweeps}) == len(sweeps)
    for sweep in sweeps:
        assert len(sweep.choosing) >= 2
        assert len(sweep.judging) >= 8
        assert not set(sweep.choosing) & set(sweep.judging)
        pages = paged.README_PAGES if plan is paged.plan_tiny_readmes else paged.PAGES
        assert sweep.judged_on["test"] == pages * sweep.block
        assert sweep.block == (8 if plan in SMALL else 1)
        for lrs in sweep.lrs.values():
            assert len(lrs) >= 3
            assert all(1.9 < high / low < 2.1 for low, high in itertools.pairwise(lrs))


def test_the_bases_are_shipped_in_two_seeds_a_width():
    assert set(paged.BASES) <= set(TINY)
    widths = [base.split("-")[1] for base in paged.BASES]
    assert {widths.count(width) for width in widths} == {2}


def count_trained(shape, method):
    with torch.device("meta"):
        model = Llama(shape)
        inject(model, method)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("plan", [paged.plan_tiny_layers, paged.plan_smol_layers])
def test_layers_are_compared_at_equal_numbers_of_trained_parameters(plan):
    for sweep in plan(CPU):
        base = sweep.data.partition(",")[0]
        shape = config(base) if base not in TINY else load_pretrained(base)[0].config
        counts = [count_trained(shape, trial.method) for trial, _ in sweep.setups.values()]
        assert len(counts) == 4
        assert max(counts) <= (1.02 if base not in TINY else 1) * min(counts)


def test_repeated_text_is_read_by_sixty_steps_and_drawn_from_the_same_pages():
    few, every = (paged.make_task("tiny-64-0", rows) for rows in (paged.REPEATED, None))
    assert len(few.train) == 60 * paged.BATCH
    assert {tuple(row) for row in few.train.inputs.tolist()} <= {tuple(row) for row in every.train.inputs.tolist()}
    assert torch.equal(few.test.inputs, every.test.inputs)


@pytest.mark.parametrize(("corpus", "plan"), [("numpy", paged.plan_tiny_rank), ("readmes", paged.plan_tiny_readmes)])
def test_no_step_of_the_longest_run_reads_what_an_earlier_one_read(corpus, plan):
    task = paged.make_task("tiny-64-0", corpus=corpus)
    longest = max(trial.steps for sweep in plan(CPU) for trial, _ in sweep.setups.values())
    assert len(task.train) >= longest * paged.BATCH
    assert len(task.test) >= 40 * paged.PER_PAGE  # no page is more than a fortieth of the text


def test_readmes_are_learned_and_judged_where_the_plan_says_so():
    sweep = next(paged.plan_tiny_readmes(CPU))
    _, make = sweep.source(CPU)
    task = make()
    assert task.name == "readmes"
    assert len(task.test) == sweep.judged_on["test"]
    assert torch.equal(task.test.inputs, paged.make_task(paged.BASES[0], corpus="readmes").test.inputs)


def test_a_page_of_the_test_part_is_a_block_and_in_no_other_part():
    tokenizer, task = load_tokenizer("tiny-64-0"), paged.make_task("tiny-64-0")
    pages = corpora()["numpy"]
    first = tokenizer.decode(task.test.inputs[: paged.PER_PAGE].flatten().tolist())
    assert sum(page.text.startswith(first) for page in pages) == 1
    rows = {tuple(row) for row in task.train.inputs.tolist()}
    held = [tuple(row) for row in [*task.test.inputs.tolist(), *task.validation.inputs.tolist()]]
    assert sum(row in rows for row in held) <= len(held) / 1000
