"""The base's own replies: what counts, that the loss on them is a divergence, and that they are the shipped model's."""

import copy
import json
from dataclasses import fields

import pytest
import torch
from torch.nn import functional as F

from lora_lab import LoRA, evaluate, fit
from lora_lab.models.llama import Llama
from lora_lab.task import IGNORE, Task
from lora_lab.tasks import base_text
from lora_lab.tasks.base_text import SHIPPED, on_base_text, write_replies
from lora_lab.tasks.instruction import Pair, PairTask
from lora_lab.tasks.python_docs import docs

PROMPTS = [
    f"{what} {subject}?"
    for what in ("What is", "How do I get", "Why", "Who")
    for subject in ("rain", "a promise", "snow", "bread", "a key")
]


class Letters:
    """A chat tokenizer of bytes whose turns end with byte 2."""

    eos_id, pad_id = 3, None

    def encode(self, text):
        return [*text.encode()]

    def decode(self, ids):
        return bytes(ids).decode()

    def chat(self, messages, add_generation_prompt=True):
        return "\x02".join(message["content"] for message in messages) + "\x02"


@pytest.fixture(scope="module")
def base(tiny_config):
    return Llama(tiny_config, seed=3)


@pytest.fixture(scope="module")
def task(tiny_config):
    return docs(Letters(), 32)


@pytest.fixture(scope="module")
def file(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("replies") / "replies.json"
    write_replies(base, Letters(), PROMPTS, path, each=4, tokens=80)
    return path


def test_replies_are_what_the_base_samples_at_temperature_one(base, file):
    replies = json.loads(file.read_text())["replies"]
    assert len(replies) == 80
    for number in (0, 5):
        ids = torch.tensor(replies[number]["prompt"])
        assert replies[number]["prompt"] == Letters().encode(PROMPTS[number // 4] + "\x02")
        expected = base.generate(ids, 80, temperature=1.0, seed=number).tolist()
        assert replies[number]["reply"] == (expected[: expected.index(2) + 1] if 2 in expected else expected)
    assert replies[0]["reply"] != replies[1]["reply"]


def test_only_the_tokens_of_replies_count(task, file):
    part = on_base_text(task, file).off_domain
    replies = json.loads(file.read_text())["replies"]
    for row in (0, 7):
        prompt, reply = replies[row]["prompt"], replies[row]["reply"]
        counted = part.targets[row] != IGNORE
        assert part.targets[row][counted].tolist() == reply
        assert part.inputs[row][counted].tolist() == [prompt[-1], *reply[:-1]]
    assert on_base_text(task, file).train is task.train


@torch.no_grad()
def test_the_rise_of_the_loss_is_the_divergence_from_the_base(base, task, file):
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    own = on_base_text(task, file)
    rise = evaluate(tuned, own, "off_domain") - evaluate(base, own, "off_domain")
    total = count = 0.0
    for inputs, targets in zip(own.off_domain.inputs, own.off_domain.targets, strict=True):
        here = targets != IGNORE
        p, q = (F.log_softmax(model(inputs[None])[0, here], dim=-1) for model in (base, tuned))
        total += float((p.exp() * (p - q)).sum())
        count += int(here.sum())
    divergence = total / count
    assert divergence > 0.01
    assert rise == pytest.approx(divergence, rel=0.25)  # the samples are one draw of the expectation


@pytest.mark.slow
@torch.no_grad()
def test_the_shipped_replies_are_samples_of_the_model():
    from lora_lab import load_pretrained

    model, tokenizer = load_pretrained(device="cpu")
    replies = json.loads(SHIPPED.read_text())["replies"]
    assert len(replies) == 2 * 32
    prompt = [{"role": "user", "content": "How does bread rise?"}]
    assert replies[0]["prompt"] == tokenizer.encode(tokenizer.chat(prompt))
    examples = on_base_text(docs(tokenizer, 64)).off_domain[:16]
    counted = examples.targets != IGNORE
    logs = F.log_softmax(model(examples.inputs)[counted], dim=-1)
    entropy = -(logs.exp() * logs).sum(-1).mean()
    loss = F.nll_loss(logs, examples.targets[counted])
    assert 1 < entropy < 4
    assert loss.item() == pytest.approx(entropy.item(), abs=0.25)  # samples at temperature 1: equal in expectation
    assert F.nll_loss(logs, logs.argmax(-1)) < entropy - 0.5  # and no greedy text


# Replies to train on


def test_replies_to_some_prompts_are_those_of_these_prompts_alone(task, file):
    replies = json.loads(file.read_text())["replies"]
    first, others = base_text.base_replies(file, slice(5)), base_text.base_replies(file, slice(5, None))
    assert len(first) == 5 * 4
    assert len(others) == 15 * 4
    assert first.targets[-1][first.targets[-1] != IGNORE].tolist() == replies[19]["reply"]
    assert others.targets[0][others.targets[0] != IGNORE].tolist() == replies[20]["reply"]
    assert len(on_base_text(task, file, slice(5)).off_domain) == 20


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_replayed_samples_make_up_a_share_of_the_training_examples(task, file, share):
    samples = base_text.base_replies(file)
    mixed = base_text.with_replay(task, samples, share).train
    count = len(mixed) - len(task.train)
    assert count / len(mixed) == pytest.approx(share, abs=0.01)
    width = task.train.inputs.shape[1]
    assert torch.equal(mixed.inputs[: len(task.train), :width], task.train.inputs)
    assert (mixed.targets[: len(task.train), width:] == IGNORE).all()
    for i in (0, 3, len(samples)):  # one after another, and again from the first
        row, sample = mixed[len(task.train) + i :][:1], samples[i % len(samples) :][:1]
        assert torch.equal(row.targets, sample.targets)
        assert torch.equal(row.inputs, sample.inputs)


def test_no_share_is_no_replay_and_all_is_refused(task, file):
    samples = base_text.base_replies(file)
    assert len(base_text.with_replay(task, samples, 0).train) == len(task.train)
    with pytest.raises(ValueError, match="share is 1, but it must be from 0 to below 1"):
        base_text.with_replay(task, samples, 1)


def test_a_task_with_replay_can_be_limited_whatever_it_was(task, file):
    data = {entry.name: getattr(task, entry.name) for entry in fields(task)}
    pairs = {part: [Pair("a", "b")] * len(task.parts[part]) for part in ("train", "validation", "test")}
    paired = PairTask(**data, pairs=pairs, tokenizer=Letters())
    mixed = base_text.with_replay(paired, base_text.base_replies(file), 0.5)
    assert mixed.fingerprint == base_text.with_replay(task, base_text.base_replies(file), 0.5).fingerprint
    assert len(mixed.limited(len(mixed.train)).train) == len(mixed.train) > len(task.train)
    assert type(mixed) is Task


@pytest.mark.slow
def test_a_rehearsed_model_forgets_less(base, task, file):
    few = task.limited(16)
    plain = on_base_text(few, file, slice(10))
    rehearsed = base_text.with_replay(plain, base_text.base_replies(file, slice(10, None)), 0.5)
    rises = []
    for each in (plain, rehearsed):
        history = fit(copy.deepcopy(base), each, LoRA(4, 8), steps=60, lr=1e-2, batch_size=8, progress=False)
        rises.append(history.rows[-1]["off_domain_loss"] - history.rows[0]["off_domain_loss"])
    assert 0 < rises[1] < 0.9 * rises[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "lacks the entry 'replies'"),
        ({"replies": []}, "replies is"),
        ({"replies": [{"prompt": [1]}]}, "replies.0.reply"),
        ({"replies": [{"prompt": [1], "reply": ["a"]}]}, "replies.0.reply.0 is 'a'"),
    ],
)
def test_a_file_of_other_content_is_refused(tmp_path, content, says):
    path = tmp_path / "replies.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"replies\.json.*{says}"):
        base_text.base_replies(path)
