"""Conversations: what the model reads, which adapter answers, and what a person types."""

import pytest

from lora_lab import Llama, LoRAConfig, inject, lora_layers, save_model
from lora_lab.adapters.chat import HELP, Conversation, talk
from tests.helpers import command, error_line

PROMPT = "What is 2 + 2?"


@pytest.fixture
def conversation(tiny_config, chatter, folders):
    return Conversation(Llama(tiny_config), chatter, folders, max_new_tokens=12, seed=5)


def said(conversation, text=PROMPT):
    return "".join(conversation.answer(text))


def test_an_answer_comes_in_parts_and_is_that_of_generate(conversation, folders, expected):
    parts = list(conversation.answer(PROMPT))
    user = {"role": "user", "content": PROMPT}
    assert len(parts) > 1
    answer = "".join(parts)
    assert answer == expected([user], 5, folders["one"])
    assert conversation.messages[0] == user
    assert conversation.messages[1]["role"] == "assistant"
    second = said(conversation, "And 3 + 3?")
    history = [user, conversation.messages[1], {"role": "user", "content": "And 3 + 3?"}]
    assert second == expected(history, 6, folders["one"])


def test_adapter_strength_and_off_decide_the_next_answer(conversation, folders, expected):
    user = [{"role": "user", "content": PROMPT}]
    for line, folder, factor in (
        ("/adapter two", folders["two"], 1.0),
        ("/strength 0.25", folders["two"], 0.25),
        ("/strength 0", folders["two"], 0.0),
        ("/off", None, 1.0),
        ("/adapter one", folders["one"], 0.0),
    ):
        assert conversation.command(line)
        conversation.command("/new")
        seed = conversation.sampling.seed
        assert said(conversation) == expected(user, seed, folder, factor), line
    conversation.use(None)
    assert not lora_layers(conversation.model)


def test_an_answer_that_is_stopped_is_what_was_shown_of_it(conversation):
    answer = conversation.answer(PROMPT)
    first = next(answer)
    answer.close()
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[1]["content"].startswith(first.strip())
    said(conversation)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/adapter three", "There is no adapter 'three'; there are one, two."),
        ("/strength much", "The strength is 'much', but it must be a number, such as 0.5."),
        ("/strength inf", "it must be a number"),
        ("/help", HELP),
        ("/nonsense", HELP),
    ],
)
def test_a_line_that_cannot_be_carried_out_says_why(conversation, line, says):
    assert says in conversation.command(line)
    assert conversation.name == "one"


def test_a_model_with_adapters_and_a_folder_without_one_are_refused(tiny_config, chatter, tmp_path):
    model = Llama(tiny_config)
    with pytest.raises(FileNotFoundError):
        Conversation(model, chatter, {"none": tmp_path / "nowhere"})
    inject(model, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="already has adapters"):
        Conversation(model, chatter)


def test_a_talk_goes_on_until_the_input_ends(conversation):
    lines, shown = iter(["", PROMPT, "/off", "</s>", PROMPT, "/quit", "never read"]), []

    def read():
        for line in lines:
            return line
        raise EOFError

    talk(conversation, read, shown.append)
    assert next(lines) == "never read"
    text = "".join(shown)
    assert "From the next answer on it is the base model that answers." in text
    assert "A text holds '</s>'" in text
    assert len(conversation.messages) == 4  # the refused text is not part of it
    talk(conversation, read, shown.append)  # the input is at its end


def test_an_interruption_ends_an_answer_and_not_the_talk(conversation, monkeypatch):
    lines, shown = iter([PROMPT, PROMPT]), []

    def write(part):
        shown.append(part)
        if len(shown) == 1:
            raise KeyboardInterrupt

    def read():
        for line in lines:
            return line
        raise EOFError

    talk(conversation, read, write)
    assert " [stopped]" in shown
    assert len(conversation.messages) == 4


def test_the_command_talks(tiny_config, chatter, folders, tmp_path, capsys, monkeypatch):
    save_model(Llama(tiny_config), tmp_path / "talker", chatter)
    lines = iter([PROMPT, "/adapter two", PROMPT])
    prompts = []

    def typed(prompt):
        prompts.append(prompt)
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    arguments = [part for folder in folders.values() for part in ("--adapter", folder)]
    assert command("chat", *arguments, "--model", tmp_path / "talker", "--tokens", 5) == 0
    assert prompts == ["one> ", "one> ", "two> ", "two> "]
    assert "The next answer is given with two, at strength 1." in capsys.readouterr().out
    assert command("chat", "--tokens", 0) == 1
    assert "--tokens is 0" in error_line(capsys)
    assert command("chat", "--adapter", folders["one"], "--adapter", folders["one"]) == 1
    assert "have the same name" in error_line(capsys)


def test_without_a_chat_template_no_conversation_begins(tiny_config, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"^This tokenizer has no chat template, so the model cannot chat"):
        Conversation(Llama(tiny_config), tiny_tokenizer)
