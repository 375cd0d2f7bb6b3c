"""Conversations: what the model reads, which adapter answers, and what people type, in a terminal or in widgets."""

import html
import re
import threading
from contextlib import nullcontext

import IPython.display
import pytest
import torch

import lora_lab
from lora_lab import Llama, LoRAConfig, adapter_state, inject, load_adapter, lora_layers, save_adapter
from lora_lab.adapters import strength
from lora_lab.adapters.chat import BASE, HELP, Conversation, talk
from lora_lab.variants import DoRALinear
from tests.helpers import randomise, run_python, snapshot

PROMPT = "What is 2 + 2?"
USER = [{"role": "user", "content": PROMPT}]


@pytest.fixture
def folders(tiny_config, tmp_path):
    """Two adapters, "one" and "two"."""
    paths = {}
    for seed, name in enumerate(("one", "two"), start=1):
        model = Llama(tiny_config)
        inject(model, LoRAConfig(rank=2))
        paths[name] = save_adapter(randomise(model, seed), tmp_path / name)
    return paths


@pytest.fixture
def expected(tiny_config, chatter):
    """Gives the answer that the model with an adapter generates for messages."""

    def answer(messages, seed, folder=None, factor=1.0):
        model = Llama(tiny_config)
        if folder is not None:
            load_adapter(model, folder)
        ids = torch.tensor(chatter.encode(chatter.chat(messages)))
        options = {"temperature": 0.5, "repetition_penalty": 1.1, "seed": seed}
        with nullcontext() if folder is None else strength(model, factor):
            return chatter.decode(model.generate(ids, 12, chatter.eos_id, **options).tolist())

    return answer


def typed(lines):
    """A function that returns a line at each call, until the input ends."""
    lines = iter(lines)

    def read(*_):
        for line in lines:
            return line
        raise EOFError

    return read


# In a terminal


@pytest.fixture
def conversation(tiny_config, chatter, folders):
    return Conversation(Llama(tiny_config), chatter, folders, max_new_tokens=12, seed=5)


@pytest.fixture
def hear(conversation):
    """What the terminal shows for lines."""

    def hear(*lines):
        shown = []
        talk(conversation, typed(lines), shown.append)
        return "".join(shown)

    return hear


def test_an_answer_comes_in_parts_and_is_that_of_generate(conversation, folders, expected):
    parts = list(conversation.answer(PROMPT))
    answer = "".join(parts)
    assert len(parts) > 1
    assert answer == expected(USER, 5, folders["one"])
    history = [*USER, {"role": "assistant", "content": answer.strip()}, {"role": "user", "content": "And 3 + 3?"}]
    assert "".join(conversation.answer("And 3 + 3?")) == expected(history, 6, folders["one"])


def test_adapter_strength_and_off_decide_the_next_answer(conversation, folders, expected, hear):
    for seed, (line, folder, factor) in enumerate(
        [
            ("/adapter two", folders["two"], 1.0),
            ("/strength 0.25", folders["two"], 0.25),
            ("/strength 0", folders["two"], 0.0),
            ("/off", None, 1.0),
            ("/adapter one", folders["one"], 0.0),
        ],
        start=5,
    ):
        answer = expected(USER, seed, folder, factor)
        assert hear(line, "/new", PROMPT).endswith(f"A new conversation begins.\n{answer}\n"), line
    assert not lora_layers(conversation.model)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        *(("/adapter three", each) for each in ("'three'", "one, two")),
        *((f"/strength {each}", each) for each in ("much", "inf")),
        *((line, HELP) for line in ("/help", "/nonsense", "/adapter")),
        ("Is </s> a token?", "'</s>'"),
    ],
)
def test_a_line_that_cannot_be_carried_out_says_why(conversation, hear, line, named):
    assert named in hear("", line)
    assert (conversation.name, conversation.strength, conversation.messages) == ("one", 1.0, [])


def test_a_talk_goes_on_until_the_user_quits_and_an_interruption_ends_an_answer_only(conversation):
    shown = []

    def write(part):
        shown.append(part)
        if len(shown) == 1:
            raise KeyboardInterrupt

    read = typed([PROMPT, "/off", PROMPT, "/quit", "never read"])
    talk(conversation, read, write)
    assert read() == "never read"
    assert shown[1] == " [stopped]"
    assert conversation.messages[1]["content"] == shown[0].strip()
    assert "The next answer is that of the base model." in shown
    assert len(conversation.messages) == 4


def test_what_cannot_chat_is_refused_and_nothing_shown(tiny_config, chatter, tiny_tokenizer, tmp_path, shown):
    adapted = Llama(tiny_config)
    inject(adapted, LoRAConfig(rank=2))
    for make in (Conversation, lora_lab.chat):
        with pytest.raises(FileNotFoundError):
            make(Llama(tiny_config), chatter, {"none": tmp_path / "nowhere"})
        with pytest.raises(ValueError, match="already has adapters"):
            make(adapted, chatter)
        with pytest.raises(ValueError, match="has no chat template"):
            make(Llama(tiny_config), tiny_tokenizer)
    assert shown == []


# In a notebook: widgets, driven as a reader drives them


@pytest.fixture
def shown(monkeypatch):
    """The outputs displayed, each as a mapping from MIME type to content."""
    outputs = []
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: outputs.append(bundle))
    return outputs


@pytest.fixture
def chat(tiny_config, chatter, folders, shown, monkeypatch):
    monkeypatch.setattr("lora_lab.adapters.chat._TEXT_FOLLOWS_IN", 0.1)
    return lora_lab.chat(Llama(tiny_config), chatter, folders, max_new_tokens=12, seed=5)


def press_enter(chat, text=None, event="submit"):
    """What the browser sends when a reader types and presses Enter: first of the key, then the text if it is new."""
    chat.field._handle_msg({"content": {"data": {"method": "custom", "content": {"event": event}}}, "buffers": []})
    if text is not None:
        chat.field.value = text


def ask(chat, text=PROMPT):
    """Type and press Enter; the text of the answer."""
    press_enter(chat, text)
    chat.wait()
    return texts(chat)[-1]


def texts(chat):
    """Label and text of each message, without HTML."""
    return [html.unescape(re.sub("<[^>]*>", "", view.value)) for view in chat.messages.children]


def test_enter_and_a_click_send_a_message_and_the_answer_is_that_of_generate(chat, folders, expected):
    first = expected(USER, 5, folders["one"])
    assert ask(chat) == f"one\n{first}"
    assert (texts(chat)[0], chat.field.value) == (f"you\n{PROMPT}", "")
    history = [*USER, {"role": "assistant", "content": first.strip()}, {"role": "user", "content": "And 3 + 3?"}]
    chat.field.value = "And 3 + 3?"
    assert len(texts(chat)) == 2  # a value alone sends nothing
    chat.send.click()
    chat.wait()
    assert texts(chat)[2:] == ["you\nAnd 3 + 3?", f"one\n{expected(history, 6, folders['one'])}"]
    chat.field.value = "   "
    chat.send.click()
    chat.wait()
    assert len(texts(chat)) == 4


def test_adapter_and_strength_decide_the_next_answer_and_its_label(chat, folders, expected):
    assert chat.adapter.options == (("one", "one"), ("two", "two"), (BASE, None))
    for seed, (name, factor, label) in enumerate(
        [
            ("two", 1.0, "two"),
            ("two", 0.25, "two × 0.25"),  # noqa: RUF001
            ("two", 0.0, "two × 0"),  # noqa: RUF001
            (None, 0.5, BASE),
            ("one", 2.0, "one × 2"),  # noqa: RUF001
        ],
        start=5,
    ):
        chat.adapter.value, chat.strength.value = name, factor
        assert chat.strength.disabled == (name is None)
        chat.new.click()
        assert texts(chat) == chat.conversation.messages == []
        assert ask(chat) == f"{label}\n{expected(USER, seed, name and folders[name], factor)}"


class Slow:
    """Stands in for the conversation's answer: goes on when it may."""

    def __init__(self, chat, monkeypatch, parts=("a", "b", "c"), ready=0):
        self.go, self.at = threading.Semaphore(ready), threading.Semaphore(0)
        self.parts, self.closed = parts, False
        monkeypatch.setattr(chat.conversation, "answer", self.answer)

    def answer(self, text):
        try:
            for part in self.parts:
                self.at.release()
                assert self.go.acquire(timeout=20)
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            self.closed = True


def usable(chat):
    controls = ("adapter", "strength", "send", "new", "stop", "field")
    return {name for name in controls if not getattr(chat, name).disabled}


IDLE = {"adapter", "strength", "send", "new", "field"}


def test_controls_rest_while_an_answer_is_made_and_words_appear_as_they_are_made(chat, monkeypatch):
    slow = Slow(chat, monkeypatch)
    assert usable(chat) == IDLE
    press_enter(chat, PROMPT)
    assert slow.at.acquire(timeout=20)
    assert chat.busy
    assert usable(chat) == {"stop", "field"}
    seen = []
    for _ in slow.parts[:-1]:
        slow.go.release()
        assert slow.at.acquire(timeout=20)  # it asks for the next part when the last one is shown
        seen.append(texts(chat)[-1])
    assert seen == ["one\na", "one\nab"]
    press_enter(chat, "too early")  # the next message may be written, and is sent later
    assert len(texts(chat)) == 2
    assert chat.field.value == "too early"
    slow.go.release()
    chat.wait()
    assert texts(chat)[-1] == "one\nabc"
    assert not chat.busy
    assert usable(chat) == IDLE


def test_stop_ends_an_answer_and_what_was_made_stays(chat, monkeypatch):
    slow = Slow(chat, monkeypatch)
    press_enter(chat, PROMPT)
    assert slow.at.acquire(timeout=20)
    chat.stop.click()
    slow.go.release(3)
    chat.wait()
    assert texts(chat)[-1] == "one\na [stopped]"
    assert slow.closed
    assert usable(chat) == IDLE
    monkeypatch.undo()
    assert "[stopped]" not in ask(chat)  # the next one is not stopped
    assert chat.conversation.messages[-1]["role"] == "assistant"


def test_what_people_and_models_write_is_shown_as_text(chat, folders, monkeypatch):
    Slow(chat, monkeypatch, ["<img src=x ", "onerror=alert(1)>&amp;"], ready=2)
    chat.conversation.adapters["<i>"] = folders["one"]
    chat.adapter.options = ["<i>"]
    press_enter(chat, "<script>alert('1')</script> & <b>")
    chat.wait()
    user, answer = (view.value for view in chat.messages.children)
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; &amp; &lt;b&gt;</div>" in user
    assert "<b>&lt;i&gt;</b>" in answer
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;amp;</div>" in answer


def test_an_error_is_a_sentence_in_the_conversation_and_the_text_comes_back(chat):
    text = "Is </s> a token?"
    answer = ask(chat, text)
    assert answer.startswith("one\nA text holds '</s>'")
    assert (chat.field.value, chat.conversation.messages, usable(chat)) == (text, [], IDLE)
    assert not lora_layers(chat.conversation.model)
    press_enter(chat)  # as it is: the kernel has the text already
    chat.wait()
    assert texts(chat)[2:] == [f"you\n{text}", answer]


def test_other_messages_of_the_field_and_enter_on_an_empty_one_send_nothing(chat):
    press_enter(chat, PROMPT, event="other")  # as when the field is left for the slider
    chat.wait()
    press_enter(chat, "")
    chat.wait()
    chat.field.value = PROMPT
    assert not chat.busy
    assert texts(chat) == []


def test_an_error_in_the_middle_keeps_what_was_made_and_names_its_kind(chat, monkeypatch):
    Slow(chat, monkeypatch, ["It is", RuntimeError("out of memory")], ready=2)
    assert ask(chat) == "one\nIt is\nRuntimeError: out of memory"
    assert (chat.field.value, usable(chat)) == ("", IDLE)
    slow = Slow(chat, monkeypatch, [ValueError("No.")])
    press_enter(chat, PROMPT)
    assert slow.at.acquire(timeout=20)
    chat.field.value = "the next"
    slow.go.release()
    chat.wait()
    assert chat.field.value == "the next"  # what was written meanwhile is not overwritten
    Slow(chat, monkeypatch, [])
    assert ask(chat) == "one\n[The model ended its answer before the first word.]"


def test_between_answers_the_model_is_the_base_so_that_the_cell_can_be_run_again(chat, chatter, folders):
    model = chat.conversation.model
    before = snapshot(model)
    assert lora_layers(model) == {}
    ask(chat)
    assert snapshot(model) == before
    again = lora_lab.chat(model, chatter, folders, max_new_tokens=12, seed=5)
    assert ask(again) == texts(chat)[1]
    inject(model, LoRAConfig(rank=3))  # such as are trained meanwhile
    layers = lora_layers(model)
    assert ask(chat).startswith("one\nThe model already has adapters on 14 layers; merge them")
    assert lora_layers(model) == layers
    assert (len(chat.conversation.messages), usable(chat)) == (2, IDLE)


def test_without_adapters_the_base_answers(tiny_config, chatter, shown, expected):
    chat = lora_lab.chat(Llama(tiny_config), chatter, max_new_tokens=12, seed=5)
    assert chat.adapter.options == ((BASE, None),)
    assert chat.strength.disabled
    assert ask(chat) == f"{BASE}\n{expected(USER, 5)}"
    assert chat._ipython_display_() is None
    (bundle,) = shown
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == chat.panel.model_id
    assert bundle["text/plain"].startswith("A conversation: controls for the adapter")


def test_an_adapter_in_memory_and_one_of_dora_answer_too(tiny_config, chatter, folders, tmp_path, shown, expected):
    trained, dora = Llama(tiny_config), Llama(tiny_config)
    load_adapter(trained, folders["two"])
    inject(dora, LoRAConfig(rank=2), layer=DoRALinear)
    folder = save_adapter(randomise(dora), tmp_path / "dora")
    adapters = {"mine": adapter_state(trained), "dora": folder}
    chat = lora_lab.chat(Llama(tiny_config), chatter, adapters, max_new_tokens=12, seed=5)
    assert ask(chat) == f"mine\n{expected(USER, 5, folders['two'])}"
    chat.new.click()
    chat.adapter.value = "dora"
    assert ask(chat) == f"dora\n{expected(USER, 6, folder)}"
    chat.strength.value = 0.5
    assert "has an adapter of type DoRALinear" in ask(chat)


def test_widgets_are_imported_when_a_chat_is_made():
    code = 'import sys, lora_lab; lora_lab.chat; print(*({"ipywidgets", "IPython", "matplotlib"} & set(sys.modules)))'
    assert run_python(code).stdout.split() == []
