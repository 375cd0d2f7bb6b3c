"""The card of an adapter: what the Hub reads in it, what people read in it, and whose README.md stays."""

import pytest
from huggingface_hub import ModelCard

from lora_lab import ContinueLoRA, LoRA, LoRAConfig, RsLoRA, fit, inject, load_adapter, save_adapter
from lora_lab.adapters.card import CARD, is_free
from lora_lab.models.digits import DigitsMLP
from tests.helpers import small_task

OPTIONS = {"steps": 4, "eval_every": 2, "batch_size": 4, "lr": 1e-2, "seed": 3}


def trained(method):
    model = DigitsMLP()
    return model, fit(model, small_task(), method, **OPTIONS)


def rows(text):
    """The cards' tables as a dictionary."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ") and line.count("|") == 3]
    return {name.strip(): value.strip() for name, value in cells}


def test_the_hub_reads_base_and_library_and_people_the_settings(tmp_path):
    model, history = trained(RsLoRA(rank=3, alpha=5, targets=["hidden1", "head"]))
    save_adapter(model, tmp_path, base="some-lab/some-model", history=history)
    card = ModelCard.load(tmp_path / CARD)
    assert (card.data.base_model, card.data.library_name) == ("some-lab/some-model", "peft")
    assert card.data.tags == ["lora", "lora_lab"]
    found = rows(card.content)
    assert found["base model"] == "`some-lab/some-model`"
    assert (found["rank, alpha"], found["adapted layers"]) == ("3, 5", "`head`, `hidden1`")
    assert found["parameters"] == f"{3 * (64 + 128 + 128 + 10):,}"
    assert found["method"] == "rslora"  # of the run; the first table says RsLoRA
    assert "| method | RsLoRA |" in card.content
    assert found["task"].startswith(f"small (fingerprint `{small_task().fingerprint[:12]}`)")
    assert (found["steps, examples a step"], found["seed"]) == ("4, 4", "3")
    first, last = history.rows[0]["validation_loss"], history.rows[-1]["validation_loss"]
    assert found["validation loss, before and after"] == f"{first:.3f}, {last:.3f}"
    assert "continued from" not in found


@pytest.mark.parametrize("base", [None, "smollm2-135m", "a folder/with a model", "../model"])
def test_a_base_that_is_no_name_on_the_hub_is_not_given_to_it(base, tmp_path):
    model, _ = trained(LoRA(2))
    save_adapter(model, tmp_path, base=base)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.base_model is None
    assert rows(card.content)["base model"] == ("not recorded" if base is None else f"`{base}`")
    assert "## Training" not in card.content


def test_a_folder_that_exists_is_no_name_on_the_hub_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    save_adapter(trained(LoRA(2))[0], tmp_path, base="runs/model")
    assert ModelCard.load(tmp_path / CARD).data.base_model is None


def test_a_continued_adapter_names_what_it_was_continued_from(tmp_path):
    model, _ = trained(LoRA(2))
    save_adapter(model, tmp_path / "first")
    again = DigitsMLP()
    load_adapter(again, tmp_path / "first")
    history = fit(again, small_task(), ContinueLoRA(), **OPTIONS)
    save_adapter(again, tmp_path / "second", history=history)
    found = rows((tmp_path / "second" / CARD).read_text())
    assert found["continued from"] == f"an adapter with the hash `{history.method['start'][:12]}`"
    assert found["method"] == "continue"


def test_ranks_that_differ_are_mentioned(tmp_path):
    model = DigitsMLP()
    inject(model, LoRAConfig(rank=4))
    load_adapter(plain := DigitsMLP(), save_adapter(model, tmp_path))
    plain.head.alpha *= 2
    save_adapter(plain, tmp_path)
    assert rows((tmp_path / CARD).read_text())["rank, alpha"] == "4, 16 (exceptions in adapter_config.json)"


def test_the_lab_renews_its_own_card_and_leaves_yours(tmp_path):
    model, history = trained(LoRA(2))
    assert is_free(tmp_path)
    save_adapter(model, tmp_path)
    assert is_free(tmp_path)
    save_adapter(model, tmp_path, history=history)
    renewed = (tmp_path / CARD).read_text()
    assert "## Training" in renewed
    mine = "".join(line for line in renewed.splitlines(True) if not line.startswith("<!--")) + "\nMy words.\n"
    (tmp_path / CARD).write_text(mine)
    assert not is_free(tmp_path)
    save_adapter(model, tmp_path)
    assert (tmp_path / CARD).read_text() == mine
