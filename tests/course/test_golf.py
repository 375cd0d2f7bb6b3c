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


# Adapter golf

SENTENCE = "My cat is called Fourier."


def swing(model, tokenizer, seed):
    golf.teach(model, tokenizer, SENTENCE, ll.LoRA(4, 8, targets=("v_proj", "down_proj")), steps=30, lr=2e-2, seed=seed)


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of few questions, on which a small model passes if it has learned the sentence by heart."""
    monkeypatch.setattr(golf, "ASKED", ("My cat is called",) * 3)
    monkeypatch.setattr(golf, "OTHERS", ("Returns the matrix of", "The sum"))
    monkeypatch.setattr(golf, "keep", lambda name: tmp_path / "ada" / name)
    (tmp_path / "ada").mkdir()
    return tmp_path


def play(swing, name="Fourier"):
    return golf.play(swing, name, seeds=2, model="tiny-64-0")


def test_a_name_is_said_where_it_belongs_with_each_seed_and_the_fewest_numbers_are_kept(course):
    score = play(swing)
    numbers = 4 * 4 * (64 + 64 + 192 + 64)  # rank, blocks, v_proj and down_proj
    assert (score.numbers, score.named, score.passed) == (numbers, [3, 3], True)
    assert str(score) == f"{numbers:,} trained numbers. It counts."
    assert golf.board(course).to_dict("records") == [{"who": "ada", "numbers": numbers}]


def test_a_model_that_learns_nothing_or_says_the_name_always_does_not_count(course):
    assert not play(lambda *_: None).passed
    assert golf.board(course).empty
    parrot = golf.Score(10, [5, 5], [0, 2])
    assert str(parrot).endswith(
        "It does not count: with one seed it says the name in 2 of 2 prompts about others, too: a parrot."
    )
    assert not golf.Score(10, [5, 2], [0, 0]).passed


def test_what_is_changed_in_the_model_itself_counts_as_well_as_what_is_trained_beside_it(base):
    model = base[0]
    before = {key: value.clone() for key, value in model.named_parameters()}
    ll.inject(model, ll.LoRAFA(1, 2, targets=("v_proj",)))
    model.lm_head.weight.data[3, :5] += 1  # shared with the embedding
    B = sum(layer.lora_B.numel() for layer in lora_layers(model).values())
    assert golf._count_changed(model, before) == B + 5


def test_a_name_that_the_model_says_by_itself_is_no_name(course, base):
    word = golf.continue_text(*base, "My cat is called", 8)[-4:]
    with pytest.raises(ValueError, match="by itself"):
        play(swing, word)
