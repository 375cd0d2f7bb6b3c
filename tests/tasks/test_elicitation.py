"""Examples in the prompt, calibrated labels and linear probes, against cases by hand and scikit-learn itself."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn import functional as F

from lora_lab import Llama
from lora_lab.models.llama import LlamaReader
from lora_lab.tasks import Pair, from_pairs, generate
from lora_lab.tasks.elicitation import PENALTIES, calibrate, content_free, few_shot, linear_probe
from lora_lab.tasks.generate import answers, last_states, log_likelihoods
from tests.helpers import enlarge
from tests.tiny_models import SHAPE

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = ("bad", "good")


@pytest.fixture(scope="module")
def talker(tiny_config):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=False, max_position_embeddings=512)
    return enlarge(Llama(config, seed=4), 20)


@pytest.fixture(scope="module")
def task(chatter):
    """Each training answer is another one, so that it shows whose it is."""
    pairs = {
        part: [
            Pair(f"Good or bad?\n\n{part} {i}", LABELS[i % 2] if part != "train" else f"answer {i}") for i in range(n)
        ]
        for part, n in (("train", 12), ("validation", 4), ("test", 5))
    }
    return from_pairs(chatter, pairs, metric="classification")


# Few-shot


def test_examples_are_earlier_turns_of_the_conversation(chatter, task):
    asked = few_shot(task, 2, seed=3)
    for part in ("validation", "test"):
        assert len(asked.pairs[part]) == len(task.pairs[part])
        for pair, plain in zip(asked.pairs[part], task.pairs[part], strict=True):
            turns = [content for _, content in pair.before]
            text = "".join(
                f"<s>user: {prompt}\n<s>assistant: {answer}</s>\n"
                for prompt, answer in zip(turns[::2], turns[1::2], strict=True)
            )
            assert asked.prompt_ids(pair) == chatter.encode(f"{text}<s>user: {plain.prompt}\n<s>assistant: ")
            assert pair.answer == plain.answer
    assert {pair.before for part in ("validation", "test") for pair in asked.pairs[part]} == {
        asked.pairs["test"][0].before
    }


def shown(asked):
    """(prompt, answer) of each example."""
    turns = asked.pairs["test"][0].before
    assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
    return [(prompt, answer) for (_, prompt), (_, answer) in zip(turns[::2], turns[1::2], strict=True)]


def test_examples_are_training_pairs_that_the_seed_draws_and_the_control_has_answers_of_others(task):
    answer_of = {pair.prompt: pair.answer for pair in task.pairs["train"]}
    draws = [shown(few_shot(task, 5, seed)) for seed in range(4)]
    assert draws[0] == shown(few_shot(task, 5, 0))
    assert len({tuple(examples) for examples in draws}) == 4
    for seed, plain in enumerate(draws):
        control = shown(few_shot(task, 5, seed, random_answers=True))
        assert len(set(plain)) == 5
        assert all(answer == answer_of[prompt] for prompt, answer in plain)
        assert [prompt for prompt, _ in control] == [prompt for prompt, _ in plain]
        assert not any(answer == answer_of[prompt] for prompt, answer in control)
        assert len({answer for _, answer in control} & set(answer_of.values())) == 5


def test_examples_change_what_the_model_answers_but_neither_the_data_nor_the_losses(task, talker):
    asked = few_shot(task, 3)
    assert asked.fingerprint == task.fingerprint
    assert asked.pairs["train"] == task.pairs["train"]
    plain, after = (log_likelihoods(talker, each, each.pairs["test"], LABELS) for each in (task, asked))
    assert not torch.allclose(plain, after)
    assert len(answers(talker, asked)) == 5


@torch.no_grad()
def test_what_all_prompts_begin_with_is_read_once_and_changes_no_answer(chatter, talker, monkeypatch):
    """Of prompts of many lengths, which are padded between the examples and themselves."""
    pairs = [Pair("x" * (1 + 7 * i % 30), LABELS[i % 2]) for i in range(30)]
    asked = few_shot(from_pairs(chatter, pairs), 3)
    tests = [Pair("x" * n, "?", before=asked.pairs["test"][0].before) for n in (3, 17, 9, 1, 12)]
    many = dataclasses.replace(asked, pairs={**asked.pairs, "test": tests})
    read, whole = [], LlamaReader.read

    def counted(self, ids, **each):
        read.append(ids.shape[-1])
        return whole(self, ids, **each)

    monkeypatch.setattr(talker, "config", dataclasses.replace(talker.config, max_position_embeddings=256))
    monkeypatch.setattr(generate, "BATCH", 3)
    monkeypatch.setattr(LlamaReader, "read", counted)
    written = answers(talker, many, max_new_tokens=6)
    scores = log_likelihoods(talker, many, tests, LABELS)
    states = last_states(talker, many, tests)
    assert max(read) > 100 > 40 > sorted(read)[-4]  # three calls read the examples once each
    for pair, own, label_scores, state in zip(tests, written, scores, states, strict=True):
        ids = many.prompt_ids(pair)
        alone = talker.generate(torch.tensor(ids), 6, stop=chatter.eos_id)
        assert own == chatter.decode(alone.tolist()).strip()
        assert torch.allclose(state, talker.model(torch.tensor([ids]))[0, -1], atol=1e-3)
        for label, score in zip(LABELS, label_scores.tolist(), strict=True):
            answer = [*chatter.encode(label), chatter.eos_id]
            logits = talker(torch.tensor([[*ids, *answer[:-1]]]))[0, len(ids) - 1 :]  # (answer, 260)
            assert score == pytest.approx(
                -float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum")), rel=1e-3
            )
    assert len(set(written)) > 1


def test_too_few_examples_and_conversations_are_refused(chatter, task):
    with pytest.raises(ValueError, match="n_train is 13, but it must be from 1 to 12"):
        few_shot(task, 13)
    with pytest.raises(ValueError, match="n_train is 14, but it must be from 1 to 12"):
        few_shot(task, 7, random_answers=True)
    pairs = [Pair(f"{i}?", "yes", before=(("system", "Be brief."),)) for i in range(5)]
    with pytest.raises(ValueError, match="'pairs' has turns before its prompts"):
        few_shot(from_pairs(chatter, pairs), 1)


# Calibration


def test_a_prompt_without_content_has_the_instruction_and_the_examples_of_all_others(task):
    prompts = [pair.prompt for pair in content_free(task)]
    assert prompts == ["Good or bad?\n\nN/A", "Good or bad?\n\n[MASK]", "Good or bad?\n\n"]
    asked = few_shot(task, 2)
    assert {pair.before for pair in content_free(asked)} == {asked.pairs["test"][0].before} != {()}


def test_calibration_divides_by_the_mean_probability_of_each_label():
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.75, 0.25]])
    reference = np.array([[0.9, 0.1], [0.7, 0.3]])  # means 0.8 and 0.2
    # The logits of a label may be low in sum: only their differences count.
    scores = calibrate(torch.tensor(np.log(probabilities)), torch.tensor(np.log(reference)) - 7)
    assert scores.exp().numpy() == pytest.approx(probabilities / [0.8, 0.2])
    assert scores.argmax(1).tolist() == [1, 0, 1] != probabilities.argmax(1).tolist()


# Probe


@pytest.mark.parametrize("kind", ["ours", "transformers'"])
@torch.no_grad()
def test_the_last_state_of_a_prompt_is_what_the_head_reads_alone_and_in_a_batch(task, talker, kind):
    shape = SHAPE | {"vocab_size": 260, "max_position_embeddings": 128, "tie_word_embeddings": False}
    model = talker if kind == "ours" else transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    pairs = [Pair("x" * (1 + 7 * i % 30), "good") for i in range(19)]
    states = last_states(model, task, pairs)
    for pair, state in zip(pairs, states, strict=True):
        alone = model.model(torch.tensor([task.prompt_ids(pair)]))  # (1, length, width)
        assert torch.allclose(state, alone[0][-1] if kind == "ours" else alone[0][0, -1], atol=1e-4)
    assert not torch.allclose(states[0], states[1], atol=1e-2)
    assert not model.lm_head._forward_pre_hooks


def planted(n, seed, noise=0.5):
    """States of which one direction holds the label, between others that hold nothing."""
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(n, generator=generator) < 0.5  # (n,)
    states = torch.randn(n, 12, generator=generator)
    states[:, 3] = positive * 2.0 - 1 + noise * torch.randn(n, generator=generator)
    return 10 * states + 5, ["yes" if each else "no" for each in positive]


def test_a_probe_finds_a_planted_direction_and_nothing_in_shuffled_labels():
    states, labels = planted(200, 0)
    validation, test = planted(100, 1), planted(400, 2)
    probe = linear_probe(states, labels, *validation)
    assert probe.score(test[0].numpy(), test[1]) > 0.93
    scores = []
    for seed in range(5):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        shuffled = [labels[i] for i in order.tolist()]
        scores.append(linear_probe(states, shuffled, *validation).score(test[0].numpy(), test[1]))
    assert sum(scores) / 5 == pytest.approx(0.5, abs=0.12)


def test_a_probes_penalty_has_the_lowest_loss_on_validation():
    states, labels = planted(40, 0, noise=2.0)
    validation = planted(100, 1, noise=2.0)
    mean, deviation = states.mean(0), states.std(0, correction=0)

    def loss(penalty):
        model = LogisticRegression(C=penalty, max_iter=5000).fit(((states - mean) / deviation).numpy(), labels)
        return log_loss(validation[1], model.predict_proba(((validation[0] - mean) / deviation).numpy()))

    losses = {penalty: loss(penalty) for penalty in PENALTIES}
    best = min(losses, key=losses.get)
    chosen = linear_probe(states, labels, *validation)[-1].C
    assert chosen == best
    assert PENALTIES[0] < best < PENALTIES[-1]
    by_heart = linear_probe(states, labels, states, labels)[-1].C
    assert by_heart > best  # what it learned by heart needs no penalty
