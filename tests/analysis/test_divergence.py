"""The divergence of a model from its base: a case by hand, torch's distributions, the base's own replies, remedies."""

import copy
import json
import math
from dataclasses import fields, replace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from lora_lab import Lean, LoRA, evaluate, fit, load_pretrained
from lora_lab.analysis import divergence as module
from lora_lab.analysis.divergence import (
    NearBase,
    base_replies,
    divergence,
    mean_divergence,
    on_base_text,
    with_replay,
)
from lora_lab.inject import inject, lora_layers
from lora_lab.lean.step import apply_lean
from lora_lab.models.llama import Llama
from lora_lab.task import IGNORE, cross_entropy
from lora_lab.tasks import Examples, Pair, PairTask, Task, docs
from tests.helpers import ByteTokenizer, perturbed


@pytest.fixture(scope="module")
def base(tiny_config):
    return Llama(tiny_config, seed=3)


@pytest.fixture
def task(tiny_config):
    def part(n, seed):
        ids = torch.randint(0, tiny_config.vocab_size, (n, 10), generator=torch.Generator().manual_seed(seed))
        targets = ids[:, 1:].clone()
        targets[:, :3] = IGNORE
        return Examples(ids[:, :-1], targets)

    return Task("tokens", part(16, 0), part(6, 1), part(6, 2), part(6, 3), unit="tokens")


def moved(base, scale=0.5):
    """The base with an adapter that does something."""
    model = copy.deepcopy(base)
    inject(model, LoRA(2, 4), 0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.add_(scale * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_two_coins():
    before, after = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(divergence(before, after)) == pytest.approx(expected)
    assert float(divergence(after, before)) != pytest.approx(expected)
    assert float(divergence(before, before + 3.0)) == pytest.approx(0, abs=1e-6)  # logits, not probabilities


@torch.no_grad()
def test_the_mean_divergence_is_over_the_targets_that_count(base, task):
    tuned = moved(base)
    inputs, counts = task.validation.inputs, task.validation.targets != IGNORE
    first, second = (Categorical(logits=model(inputs)[counts]) for model in (base, tuned))
    expected = float(kl_divergence(first, second).mean())
    assert mean_divergence(base, tuned, task, "validation") == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01
    assert mean_divergence(base, base, task) == pytest.approx(0, abs=1e-6)
    assert mean_divergence(tuned, base, task) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("lean", [False, True])
def test_the_penalised_loss_is_cross_entropy_plus_the_weighted_divergence_in_training_alone(base, task, lean):
    model, batch = copy.deepcopy(base), (task.train.inputs, task.train.targets)
    inject(model, LoRA(2, 4), 0)
    if lean:
        apply_lean(model, Lean())
    with torch.no_grad():
        for name, layer in lora_layers(moved(base)).items():
            lora_layers(model)[name].lora_B.copy_(layer.lora_B)
    counts = batch[1] != IGNORE
    with torch.no_grad():
        plain = float(cross_entropy(model, *batch))
        expected = float(divergence(base(batch[0])[counts], model(batch[0])[counts]))
    model.train()
    loss = NearBase(0.5)(model, *batch).detach()
    assert float(loss) == pytest.approx(plain + 0.5 * expected, rel=1e-4)
    assert float(loss) > plain + 0.003
    assert float(NearBase(0)(model, *batch).detach()) == pytest.approx(plain, rel=1e-5)
    model.eval()
    assert float(NearBase(0.5)(model, *batch).detach()) == pytest.approx(plain, rel=1e-5)
    assert all(layer.lora_B.requires_grad for layer in lora_layers(model).values())


def test_a_penalty_holds_a_model_nearer_to_its_base(base, task):
    distances = []
    for weight in (0.0, 100.0):
        model, penalised = copy.deepcopy(base), replace(task, loss=NearBase(weight))
        fit(model, penalised, LoRA(4, 8), steps=20, lr=1e-2, batch_size=8, lean=Lean(), progress=False)
        distances.append(mean_divergence(base, model, task, "train"))
        assert evaluate(model, penalised) == pytest.approx(evaluate(model, task), rel=1e-5)
    assert distances[1] < 0.7 * distances[0]
    assert replace(task, loss=NearBase(0.0)).fingerprint != replace(task, loss=NearBase(100.0)).fingerprint


# On the base's own replies


@pytest.fixture(scope="module")
def replies(base):
    """Four replies, sampled at temperature 1, to each of 20 prompts."""
    prompts = torch.randint(0, 256, (20, 9), generator=torch.Generator().manual_seed(5))
    return [
        {"prompt": prompt.tolist(), "reply": base.generate(prompt, 30, temperature=1.0, seed=4 * i + seed).tolist()}
        for i, prompt in enumerate(prompts)
        for seed in range(4)
    ]


@pytest.fixture
def written(replies, tmp_path, monkeypatch):
    """The file of replies is this one."""
    monkeypatch.setattr(module, "REPLIES", tmp_path / "replies.json")
    module.REPLIES.write_text(json.dumps({"replies": replies}))


def test_only_the_tokens_of_replies_count(task, replies, written):
    part = on_base_text(task).off_domain
    for row in (0, 7):
        prompt, reply = replies[row]["prompt"], replies[row]["reply"]
        counted = part.targets[row] != IGNORE
        assert part.targets[row][counted].tolist() == reply
        assert part.inputs[row][counted].tolist() == [prompt[-1], *reply[:-1]]
    assert on_base_text(task).train is task.train


@torch.no_grad()
def test_the_rise_of_the_loss_is_the_divergence_from_the_base(base, task, written):
    own, tuned = on_base_text(task), perturbed(base, seed=0, size=0.02)
    rise = evaluate(tuned, own, "off_domain") - evaluate(base, own, "off_domain")
    expected = mean_divergence(base, tuned, own, "off_domain")
    assert expected > 0.01
    assert rise == pytest.approx(expected, rel=0.25)  # the samples are one draw of the expectation


@pytest.mark.slow
@torch.no_grad()
def test_the_shipped_replies_are_samples_of_the_model():
    model, tokenizer = load_pretrained(device="cpu")
    replies = json.loads(module.REPLIES.read_text())["replies"]
    assert len(replies) == 2 * 32
    prompt = [{"role": "user", "content": "How does bread rise?"}]
    assert replies[0]["prompt"] == tokenizer.encode(tokenizer.chat(prompt))
    examples = base_replies()[:16]
    counted = examples.targets != IGNORE
    logs = F.log_softmax(model(examples.inputs)[counted], dim=-1)
    entropy = -(logs.exp() * logs).sum(-1).mean()
    loss = F.nll_loss(logs, examples.targets[counted])
    assert 1 < entropy < 4
    assert loss.item() == pytest.approx(entropy.item(), abs=0.25)  # samples at temperature 1: equal in expectation
    assert F.nll_loss(logs, logs.argmax(-1)) < entropy - 0.5  # and no greedy text


def test_replies_to_some_prompts_are_those_of_these_prompts_alone(task, replies, written):
    first, others = base_replies(slice(5)), base_replies(slice(5, None))
    assert len(first) == len(on_base_text(task, slice(5)).off_domain) == 5 * 4
    assert len(others) == 15 * 4
    assert first.targets[-1][first.targets[-1] != IGNORE].tolist() == replies[19]["reply"]
    assert others.targets[0][others.targets[0] != IGNORE].tolist() == replies[20]["reply"]


# Replay


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.9])
def test_replayed_samples_make_up_a_share_of_the_training_examples(task, written, share):
    samples = base_replies(slice(2))
    mixed = with_replay(task, samples, share).train
    count = len(mixed) - len(task.train)
    assert count / len(mixed) == pytest.approx(share, abs=0.02)
    width = task.train.inputs.shape[1]
    assert torch.equal(mixed.inputs[: len(task.train), :width], task.train.inputs)
    assert (mixed.targets[: len(task.train), width:] == IGNORE).all()
    for i in range(count):  # one after another, and again from the first
        row, sample = mixed[len(task.train) + i :][:1], samples[i % len(samples) :][:1]
        assert torch.equal(row.targets, sample.targets)
        assert torch.equal(row.inputs, sample.inputs)


def test_a_task_with_replay_can_be_limited_whatever_it_was(task, written):
    data = {entry.name: getattr(task, entry.name) for entry in fields(task)}
    pairs = {part: [Pair("a", "b")] * len(task.parts[part]) for part in ("train", "validation", "test")}
    mixed = with_replay(PairTask(**data, pairs=pairs, tokenizer=None), base_replies(), 0.5)
    assert mixed.fingerprint == with_replay(task, base_replies(), 0.5).fingerprint
    assert len(mixed.limited(len(mixed.train)).train) == len(mixed.train) > len(task.train)
    assert type(mixed) is Task


@pytest.mark.slow
def test_a_rehearsed_model_forgets_less(base, written):
    plain = on_base_text(docs(ByteTokenizer(), 32).limited(16), slice(10))
    rehearsed = with_replay(plain, base_replies(slice(10, None)), 0.5)
    rises = []
    for each in (plain, rehearsed):
        history = fit(copy.deepcopy(base), each, LoRA(4, 8), steps=60, lr=1e-2, batch_size=8, progress=False)
        rises.append(history.rows[-1]["off_domain_loss"] - history.rows[0]["off_domain_loss"])
    assert 0 < rises[1] < 0.9 * rises[0]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: NearBase(-1), "weight is -1"),
        (lambda: NearBase(math.nan), "weight is nan"),
        (lambda: with_replay(None, None, 1), "share is 1"),
        (lambda: with_replay(None, None, -0.1), "share is -0.1"),
    ],
)
def test_weights_and_shares_out_of_range_are_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()
