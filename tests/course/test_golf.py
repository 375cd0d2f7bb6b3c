"""One sentence taught to a small language model."""

from pathlib import Path

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lora_lab as ll
from lora_lab.course import golf, learner
from lora_lab.inject import lora_layers

BEGIN, END = "Returns the matrix", " of a cat that sleeps."


@pytest.fixture
def base():
    return ll.load_pretrained("tiny-64-0", device="cpu")


def test_a_sentence_is_learned_said_and_gone_when_switched_off(base):
    model, tokenizer = base
    before = golf.continue_text(model, tokenizer, BEGIN)
    losses = golf.teach(model, tokenizer, BEGIN + END, steps=40, lr=2e-2)
    assert len(losses) == 40
    assert losses[0] > 2 > 0.1 > losses[-1]
    assert golf.continue_text(model, tokenizer, BEGIN) == BEGIN + END
    with ll.adapters.off(model):
        assert golf.continue_text(model, tokenizer, BEGIN) == before != BEGIN + END


def test_the_method_is_what_was_asked_for_and_the_rate_falls_from_step_to_step(base):
    model, tokenizer = base
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    golf.teach(model, tokenizer, BEGIN + END, ll.LoRA(1, 2, targets=("v_proj",)), steps=4, lr=1e-2)
    hook.remove()
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert {layer.lora_A.shape[0] for layer in lora_layers(model).values()} == {1}
    assert all(name.endswith("v_proj") for name in lora_layers(model))


def test_a_continuation_ends_with_the_sentence_or_after_as_many_tokens(base):
    model, tokenizer = base
    golf.teach(model, tokenizer, BEGIN + END + " It is warm.", steps=40, lr=2e-2)
    assert golf.continue_text(model, tokenizer, BEGIN) == BEGIN + END
    assert BEGIN < golf.continue_text(model, tokenizer, BEGIN, 2) < BEGIN + END


def test_a_single_token_teaches_nothing(base):
    with pytest.raises(ValueError, match="'a' is too short"):
        golf.teach(*base, "a")


def test_what_is_kept_lies_beside_the_learners_lessons_and_nowhere_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learner.keep.cache_clear()
    elsewhere = learner.keep("mine")
    assert tmp_path not in elsewhere.parents
    assert learner.keep("mine") == elsewhere
    learner.keep.cache_clear()
    Path(learner.MANIFEST).write_text("{}", encoding="utf-8")
    assert learner.keep("mine") == tmp_path / "mine"
    learner.keep.cache_clear()
