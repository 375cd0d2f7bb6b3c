"""The small language models that are shipped: they know their kind of text, and one command makes them again."""

import itertools
import json

import pytest
import torch

import lora_lab as ll
from lora_lab.adapters.export import find_base
from lora_lab.models.pretrained import NAMES, TINY, load_tokenizer
from lora_lab.studies import bases
from lora_lab.tasks.pages import Page, corpora, cut_pages
from tests.helpers import command

SENTENCE = "Return the {} of an array along the axis that is given, as a new array of the same type and shape."


@torch.no_grad()
def loss(model, ids, targets):
    return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()


@pytest.fixture(scope="module")
def losses():
    """Of each small model, in nats a token: on text of its kind, on the same tokens out of order, and on READMEs."""
    pages, found = corpora(), {}
    for name in TINY:
        model, tokenizer = ll.load_pretrained(name)
        known, far = (cut_pages(tokenizer, pages[kind], 128, 2, 16) for kind in ("known", "readmes"))
        order = torch.randperm(known.inputs.numel(), generator=torch.Generator().manual_seed(0))
        mixed = known.inputs.flatten()[order].view_as(known.inputs)
        found[name] = [loss(model, each, t) for each, t in ((known.inputs, known.targets), (mixed, known.targets))]
        found[name].append(loss(model, far.inputs, far.targets))
    return found


@pytest.mark.parametrize("name", TINY)
def test_a_small_model_reads_docstrings_better_than_chance_and_than_other_text(losses, name):
    known, mixed, far = losses[name]
    assert known < 3.4 < mixed
    assert known + 0.2 < far


def test_the_wider_a_small_model_the_better_it_reads(losses):
    by_width = {}
    for name, (known, *_) in losses.items():
        by_width.setdefault(int(name.split("-")[1]), []).append(known)
    widths = sorted(by_width)
    assert len(widths) >= 2
    for narrow, wide in itertools.pairwise(widths):
        assert max(by_width[wide]) + 0.2 < min(by_width[narrow])


@pytest.mark.parametrize("name", TINY)
def test_its_name_says_its_width_and_seeds_differ(name):
    model, tokenizer = ll.load_pretrained(name)
    _, width, seed = name.split("-")
    assert model.config.hidden_size == int(width)
    assert model.config.num_hidden_layers == 4
    text = "    Return 12 arrays.\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert load_tokenizer(name).encode(text) == tokenizer.encode(text)
    other = f"tiny-{width}-{1 - int(seed)}"
    if other in TINY:
        assert not torch.equal(ll.load_pretrained(other)[0].model.norm.weight, model.model.norm.weight)


def test_together_they_are_at_most_8_megabytes():
    assert 0 < sum(path.stat().st_size for path in TINY.values()) < 8e6


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=f"'tiny-65-0'; use {', '.join(NAMES)}, a .gguf file"):
        ll.load_pretrained("tiny-65-0")


def test_an_adapter_names_its_small_base_and_finds_it_again(tmp_path):
    data = tmp_path / "notes.txt"
    data.write_text("\n\n".join(SENTENCE.format(f"part {i}") for i in range(400)))
    size = ("--steps", "2", "--eval-examples", "4", "--rank", "1")
    folder = tmp_path / "adapter"
    assert command("finetune", "--task", str(data), "--model", "tiny-64-0", "--out", str(folder), *size) == 0
    assert find_base(folder) == "tiny-64-0"
    assert command("export", str(folder), "--out", str(tmp_path / "adapter.gguf")) == 0


# How they are made


@pytest.fixture
def small(monkeypatch):
    pages = [Page(f"p: {i}", "\n\n".join(SENTENCE.format(f"{i}th part {k}") for k in range(40))) for i in range(30)]
    monkeypatch.setattr(bases, "read_pages", lambda: pages[:20])
    monkeypatch.setattr(bases, "corpora", lambda: dict.fromkeys(("known", "numpy", "manual"), pages[20:]))
    monkeypatch.setattr(bases, "TOKENS", bases.BATCH * bases.SEQ_LEN * 101)


@pytest.mark.slow
def test_a_base_is_made_from_nothing_and_goes_on_where_it_was_stopped(small, monkeypatch, tmp_path):
    whole = bases.make_base("tiny-64-1", tmp_path / "whole")
    model, tokenizer = ll.load_pretrained(whole)
    ids = torch.tensor([tokenizer.encode(SENTENCE.format("7th part 7"))])
    stated = json.loads((tmp_path / "whole/tiny-64-1.json").read_text())
    assert stated["steps"] == 101
    assert stated["validation"] < 1
    assert loss(model, ids[:, :-1], ids[:, 1:]) < 1 < loss(ll.Llama(model.config, seed=1), ids[:, :-1], ids[:, 1:])

    fit = bases.fit

    def stop(*arguments, **options):
        def row(made):
            if made["step"] == 60:
                raise KeyboardInterrupt

        return fit(*arguments, **options | {"checkpoint_every": 25}, on_row=row)

    monkeypatch.setattr(bases, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        bases.make_base("tiny-64-1", tmp_path / "stopped")
    monkeypatch.setattr(bases, "fit", fit)
    assert bases.make_base("tiny-64-1", tmp_path / "stopped").read_bytes() == whole.read_bytes()


def test_another_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no base 'tiny-512-0'; there are tiny-64-0, "):
        bases.make_base("tiny-512-0", tmp_path)
