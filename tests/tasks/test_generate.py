"""What a model answers: many prompts at once as each alone, and classes by their likelihood."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from lora_lab import Llama
from lora_lab.tasks import IGNORE, Pair, from_pairs, generate
from lora_lab.tasks.generate import answers, classes, log_likelihoods, reply
from tests.helpers import enlarge, sums
from tests.tiny_models import bert, fresh, llama, t5

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def talker(tiny_config):
    """A model with something to say: large weights, so that its logits are far apart."""
    return enlarge(Llama(dataclasses.replace(tiny_config, tie_word_embeddings=False), seed=4), 20)


def test_answers_of_many_prompts_at_once_are_those_of_each_alone(chatter, talker):
    task = from_pairs(chatter, [Pair("x" * (1 + 7 * i % 30), "abc") for i in range(30)])
    said = answers(talker, task, "train", max_new_tokens=12)
    assert len(said) == len(task.pairs["train"])
    for pair, own in zip(task.pairs["train"], said, strict=True):
        alone = talker.generate(torch.tensor(task.prompt_ids(pair)), 12, stop=chatter.eos_id)
        assert own == chatter.decode(alone.tolist()).strip()
    assert len(set(said)) > 1
    with pytest.raises(ValueError, match="max_new_tokens is 999999999, but the model reads at most"):
        answers(talker, task, max_new_tokens=999_999_999)


@pytest.mark.parametrize("kind", ["Llama", "GPT-2"])
def test_answers_end_where_the_context_ends_and_longer_prompts_are_refused(chatter, tiny_config, kind):
    task = from_pairs(chatter, [Pair("x" * 20, "y" * 60) for _ in range(3)] + [Pair(f"{i}?", "z") for i in range(9)])
    longest = max(len(task.prompt_ids(pair)) for pair in task.pairs["test"])

    def model(context):
        if kind == "Llama":
            return Llama(dataclasses.replace(tiny_config, max_position_embeddings=context))
        config = GPT2Config(vocab_size=260, n_positions=context, n_embd=16, n_layer=1, n_head=2)
        return GPT2LMHeadModel(config).eval()

    roomy, full = model(longest + 5), model(longest)
    assert answers(roomy, task) == answers(roomy, task, max_new_tokens=5)
    for call in (answers, lambda model, task: log_likelihoods(model, task, task.pairs["test"], ["z"])):
        with pytest.raises(ValueError, match=rf"has {longest} tokens .*, but the model reads at most {longest} "):
            call(full, task)


def test_a_reply_is_the_answer_to_one_prompt_in_the_chat_template(chatter, talker):
    ids = torch.tensor(chatter.encode("<s>user: How are you?\n<s>assistant: "))
    assert reply(talker, chatter, "How are you?") == written(chatter, talker.generate(ids, 80, stop=259))
    options = {"temperature": 1.5, "repetition_penalty": 1.2, "seed": 3}
    expected = written(chatter, talker.generate(ids, 20, stop=259, **options))
    assert reply(talker, chatter, "How are you?", max_new_tokens=20, **options) == expected
    for name, value in {"temperature": 0.5, "repetition_penalty": 2.0, "seed": 4}.items():
        other = reply(talker, chatter, "How are you?", max_new_tokens=20, **(options | {name: value}))
        assert other != expected, name
    assert reply(talker, chatter, "And you?", max_new_tokens=20, **options) != expected


def written(tokenizer, ids):
    return tokenizer.decode(ids.tolist()).strip()


def test_a_reply_has_no_white_space_around_it(chatter, talker, monkeypatch):
    monkeypatch.setattr(generate, "stream", lambda *_, **__: chatter.encode(" yes, no \n"))
    assert reply(talker, chatter, "?") == "yes, no"


def test_only_a_causal_language_model_replies_and_only_with_a_chat_template(chatter, talker, tiny_tokenizer):
    for model in (torch.nn.Linear(2, 2), fresh(bert), fresh(t5), fresh(llama).model):
        name = type(model).__name__
        with pytest.raises(ValueError, match=f"^Only a causal language model .*, but this is a {name};"):
            reply(model, chatter, "?")
    with pytest.raises(ValueError, match="no chat template"):
        reply(talker, tiny_tokenizer, "?")


def test_an_answer_ends_with_its_turn(chatter, talker):
    class Ends(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], 260)
            logits[..., 259] = 1.0
            return logits

    ending = copy.deepcopy(talker)
    ending.lm_head = Ends()
    task = from_pairs(chatter, sums())
    assert answers(ending, task, "test") == [""] * len(task.pairs["test"])


@pytest.mark.slow
def test_a_class_is_chosen_by_the_likelihood_of_the_whole_answer(chatter, talker):
    labels = ["no", "perhaps it is so", "yes indeed"]
    task = from_pairs(chatter, [Pair(f"Is {i} even?", labels[i % 3]) for i in range(90)], metric="classification")
    assert classes(task) == labels

    def losses(prompt, label):
        filler = {"validation": [Pair("x", "y")], "test": [Pair("z", "y")]}
        one = from_pairs(chatter, {"train": [Pair(prompt, label)], **filler}).train
        counted = one.targets[one.targets != IGNORE]
        with torch.no_grad():
            return F.cross_entropy(talker(one.inputs)[0, -len(counted) :], counted, reduction="none")

    otherwise = 0
    for pair, scores in zip(
        task.pairs["train"], log_likelihoods(talker, task, task.pairs["train"], labels), strict=True
    ):
        each = [losses(pair.prompt, label) for label in labels]
        assert scores.tolist() == pytest.approx([-float(loss.sum()) for loss in each], rel=1e-3)
        otherwise += int(scores.argmax()) != min(range(3), key=lambda i: float(each[i].max()))
    assert otherwise  # the worst token alone would have chosen another
    best = log_likelihoods(talker, task, task.pairs["test"], labels).argmax(1)
    assert answers(talker, task, "test") == [labels[i] for i in best]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"limit": -1}, "limit is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),  # once it never ended
        ({"part": "tests"}, "part is 'tests'"),
        ({"model": torch.nn.Linear(2, 2)}, "Only a causal language model"),
    ],
)
def test_arguments_that_cannot_be_are_named(chatter, talker, options, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        answers(**{"model": talker, "task": from_pairs(chatter, sums()), **options})
