"""The base's own replies: what counts, that the loss on them is a divergence, and that they are the shipped model's."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from lora_lab import LoRA, evaluate, fit
from lora_lab.models.llama import Llama
from lora_lab.task import IGNORE
from lora_lab.tasks import base_text
from lora_lab.tasks.base_text import PROMPTS, SHIPPED, on_base_text, write_replies
from lora_lab.tasks.python_docs import docs


class Letters:
    """A chat tokenizer of bytes whose turns end with byte 3."""

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_text, "PROMPTS", PROMPTS[:20])
        write_replies(base, Letters(), path, each=4, tokens=24, progress=False)
    return path


def test_replies_are_what_the_base_samples_at_temperature_one(base, file):
    replies = json.loads(file.read_text())["replies"]
    assert len(replies) == 80
    for number in (0, 5):
        ids = torch.tensor(replies[number]["prompt"])
        assert replies[number]["prompt"] == Letters().encode(PROMPTS[number // 4] + "\x02")
        expected = base.generate(ids, 24, temperature=1.0, seed=number).tolist()
        assert replies[number]["reply"] == (expected[: expected.index(3) + 1] if 3 in expected else expected)
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


def test_training_on_other_text_moves_a_model_from_its_base(base, task, file):
    own, model = on_base_text(task, file), copy.deepcopy(base)
    history = fit(model, own, LoRA(4, 8), steps=20, lr=1e-2, batch_size=8, progress=False)
    first, last = history.rows[0], history.rows[-1]
    assert last["off_domain_loss"] > first["off_domain_loss"]


@torch.no_grad()
def test_the_shipped_replies_are_samples_of_the_model():
    from lora_lab import load_pretrained

    model, tokenizer = load_pretrained(device="cpu")
    replies = json.loads(SHIPPED.read_text())["replies"]
    assert len(replies) == 2 * len(PROMPTS)
    prompt = [{"role": "user", "content": PROMPTS[0]}]
    assert replies[0]["prompt"] == tokenizer.encode(tokenizer.chat(prompt))
    examples = on_base_text(docs(tokenizer, 64)).off_domain[:16]
    counted = examples.targets != IGNORE
    logs = F.log_softmax(model(examples.inputs)[counted], dim=-1)
    entropy = -(logs.exp() * logs).sum(-1).mean()
    loss = F.nll_loss(logs, examples.targets[counted])
    assert 1 < entropy < 4
    assert loss.item() == pytest.approx(entropy.item(), abs=0.25)  # samples at temperature 1: equal in expectation
    assert F.nll_loss(logs, logs.argmax(-1)) < entropy - 0.5  # and no greedy text
