"""A conversation with a model, whose adapter can be changed, turned off and turned up and down between two answers.

:class:`Conversation` is what the model reads. People type to it in a terminal (:func:`talk`), or in a notebook's
widgets (:func:`chat`).
"""

from __future__ import annotations

import dataclasses
import html
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.edit import strength, take_off
from lora_lab.adapters.peft_format import load_adapter
from lora_lab.inject import require_no_adapters
from lora_lab.models.llama import reader_of
from lora_lab.models.reading import Sampling, stream
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.schema import Number, check
from lora_lab.tasks.instruction import stop_token

Adapters = Mapping[str, str | Path | Mapping[str, Tensor]]  # name -> a folder, or an adapter in memory


class Conversation:
    """The messages so far, and the adapter that the next answer is given with.

    Args:
        model: our Llama or a causal language model of transformers, without adapters, as it is between two answers.
        tokenizer: of the model, with a chat template.
        adapters: name -> a folder or an adapter in memory, as for :func:`lora_lab.load_adapter`; the first one answers
            at the start.
        max_new_tokens: where an answer is cut if the model does not end it before.
        temperature, repetition_penalty, seed: as for :meth:`lora_lab.Llama.generate`; the seed rises by 1 with each
            answer.

    Raises:
        ValueError: the model has adapters or is not a causal language model, its tokenizer has no chat template, or an
            adapter does not fit it.
        FileNotFoundError: an adapter's folder lacks a file.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        adapters: Adapters | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.5,
        repetition_penalty: float = 1.1,
        seed: int = 0,
    ) -> None:
        require_no_adapters(model)
        reader_of(model)
        if tokenizer.chat_template is None:
            raise ValueError("This tokenizer has no chat template, so the model cannot chat; use generate.")
        self.model, self.tokenizer, self.adapters = model, tokenizer, dict(adapters or {})
        self.messages: list[dict[str, str]] = []
        self.name = next(iter(self.adapters), None)  # of the adapter that answers; None is the base
        self.strength = 1.0
        self.max_new_tokens = max_new_tokens
        self.sampling = Sampling(temperature, seed, repetition_penalty)
        for source in self.adapters.values():  # tried now, so that an error comes before the first question
            load_adapter(model, source)
            take_off(model)

    def answer(self, text: str) -> Generator[str, None, None]:
        """Return the answer to what a user says, in parts, as they are made.

        The adapter is on the model meanwhile, and on it alone. If the caller stops early, what was made until then is
        the answer that the conversation goes on with.

        Raises:
            ValueError: as for :meth:`lora_lab.models.tokenizer.Tokenizer.chat` and :func:`lora_lab.load_adapter`.
        """
        require_no_adapters(self.model)  # such as were trained since the last answer: they would be lost
        self.messages.append({"role": "user", "content": text})
        said = ""
        try:
            if self.name is not None:
                load_adapter(self.model, self.adapters[self.name])
            ids, end = self.tokenizer.encode(self.tokenizer.chat(self.messages)), stop_token(self.tokenizer)
            with nullcontext() if self.name is None else strength(self.model, self.strength):
                for part in continue_ids(self.model, self.tokenizer, ids, self.max_new_tokens, end, self.sampling):
                    said += part
                    yield part
        finally:
            take_off(self.model)
            self.sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + 1)
            if said:
                self.messages.append({"role": "assistant", "content": said.strip() or "..."})
            else:
                self.messages.pop()


def continue_ids(
    model: nn.Module, tokenizer: Tokenizer, ids: list[int], most: int, end: int | None, sampling: Sampling
) -> Iterator[str]:
    """Return how a model continues these tokens, as parts of a text, until the token ``end`` or ``most`` new ones."""
    prompt = torch.tensor(ids, dtype=torch.long, device=next(model.parameters()).device)  # (length,)
    return tokenizer.decode_stream(stream(reader_of(model), prompt, most, end, sampling))


# In a terminal

HELP = """\
/adapter NAME     answer with this adapter
/off              answer as the base model
/strength NUMBER  multiply the adapter's update by NUMBER: 0 gives the base, 1 the adapter as it was trained
/new              begin a new conversation
/quit             end (so does the end of the input)"""


def talk(conversation: Conversation, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Answer line by line until the input ends or the user quits.

    Args:
        read: returns the next line, or raises EOFError.
        write: shows a part of a text.
    """
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                write(obey(conversation, line))
            else:
                for part in conversation.answer(line):
                    write(part)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            write(" [stopped]")
        except ValueError as error:
            write(str(error))
        write("\n")


def obey(conversation: Conversation, line: str) -> str:
    """Carry out a line that begins with a slash, and return what to tell the user.

    Raises:
        ValueError: there is no such adapter, or the strength is no number.
    """
    match line.split(maxsplit=1):
        case ["/adapter", name]:
            if name not in conversation.adapters:
                raise ValueError(
                    f"There is no adapter {name!r}; there are {', '.join(conversation.adapters) or 'none'}."
                )
            conversation.name = name
        case ["/off"]:
            conversation.name = None
        case ["/strength", number]:
            conversation.strength = check(float(number), Number, "The strength")
        case ["/new"]:
            conversation.messages.clear()
            return "A new conversation begins."
        case _:
            return HELP
    name, factor = conversation.name, conversation.strength
    return f"The next answer is that of {'the base model' if name is None else f'{name}, at strength {factor:g}'}."


# In a notebook

BASE = "(base model)"
_TEXT_FOLLOWS_IN = 0.3  # seconds from the message of Enter to that of the text, if it is new; they are sent together
# Of the edges of messages: JupyterLab's colours, which follow its theme, and others for front ends without them.
_USER, _MODEL, _ERROR = "var(--jp-border-color1, #999999)", "var(--jp-success-color1, #009e73)", "#d55e00"
_MESSAGE = (
    '<div style="border-left: 4px solid {colour}; padding: 2px 12px; margin: 6px 8px; line-height: 1.4; '
    'white-space: pre-wrap; overflow-wrap: anywhere"><b>{label}</b>\n{text}</div>'
)
_WRAPPED = {"flex_flow": "row wrap", "grid_gap": "0 8px"}
_WINDOW = {
    "display": "flex",
    "flex_flow": "column-reverse",  # so a box is scrolled to its end, and stays there while an answer grows
    "height": "26em",
    "overflow": "auto",
    "margin": "2px",
    "border": "1px solid var(--jp-border-color2, #cccccc)",
}


def chat(model: nn.Module, tokenizer: Tokenizer, adapters: Adapters | None = None, **options: Any) -> Chat:
    """Show a conversation with a model in a notebook, whose adapter and strength can be changed between two answers.

        ll.chat(model, tokenizer, {"keeper": ll.adapters.shipped("lighthouse-keeper")})

    Enter or a click sends a message. An answer appears as it is made, in a thread of its own: do not train or change
    the model until it has ended or was stopped. Between answers the model has no adapter; its weights are frozen, as by
    :func:`lora_lab.load_adapter`. A strength of 0 is the base, 1 the adapter as it was trained.

    Args:
        model, tokenizer, adapters, **options: as for :class:`Conversation`, such as ``max_new_tokens=100``. The first
            adapter is selected at the start.

    Returns:
        An object whose widgets a program can drive.

    Raises:
        ValueError: the model has adapters, or an adapter does not fit it.
        FileNotFoundError: an adapter's folder lacks a file.
    """
    from IPython.display import display

    made = Chat(Conversation(model, tokenizer, adapters, **options))
    bundle = made.panel._repr_mimebundle_() or {}
    alt = "A conversation: controls for the adapter and its strength, the messages, and a field to write in."
    display({**bundle, "text/plain": alt}, raw=True)
    return made


class Chat:
    """The widgets of a conversation, made by :func:`chat`. A program can drive them as a reader does.

    Attributes:
        conversation: what the model reads.
        adapter, strength: a drop-down (name, or None for the base) and a slider; the next answer is given with them.
        field, send, stop, new: the field for a message, and the buttons.
        messages: a box with one HTML widget for each message, answer and error.
        panel: the box of all.
    """

    def __init__(self, conversation: Conversation) -> None:
        import ipywidgets

        self.conversation = conversation
        options = [(name, name) for name in conversation.adapters] + [(BASE, None)]
        look = {"style": {"description_width": "initial"}, "layout": {"flex": "1 1 15em"}}
        self.adapter = ipywidgets.Dropdown(options=options, description="adapter", **look)
        self.strength = ipywidgets.FloatSlider(1.0, max=2.0, step=0.05, description="strength", **look)
        self.new = ipywidgets.Button(description="New conversation", layout={"width": "auto"})
        # At each key a browser would send the text so far, but keep some back while others are under way, and a message
        # of Enter would overtake them. So the text is sent as a whole: right after Enter, or when the field is left.
        self.field = ipywidgets.Text(placeholder="Write a message; Enter sends it", continuous_update=False, **look)
        self.send = ipywidgets.Button(description="Send", button_style="info", layout={"width": "6em"})
        self.stop = ipywidgets.Button(description="Stop", disabled=True, layout={"width": "6em"})
        self.messages = ipywidgets.VBox(layout={"flex": "0 0 auto", "overflow": "visible"})
        top = ipywidgets.HBox([self.adapter, self.strength, self.new], layout=_WRAPPED)
        window = ipywidgets.Box([self.messages], layout=_WINDOW)
        bottom = ipywidgets.HBox([self.field, self.send, self.stop], layout=_WRAPPED)
        self.panel = ipywidgets.VBox([top, window, bottom], layout={"width": "46em", "max_width": "100%"})
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None  # in which an answer is made
        self.adapter.observe(lambda _: self._enable(), names="value")
        self.field.on_msg(lambda _, content, __: content.get("event") == "submit" and self._submit(_TEXT_FOLLOWS_IN))
        self.send.on_click(lambda _: self._submit())
        self.stop.on_click(lambda _: self._stopped.set())
        self.new.on_click(lambda _: self._begin())
        self._enable()

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        return self._thread is not None

    def wait(self) -> None:
        """Return when the answer that is being made, if any, has ended."""
        if thread := self._thread:
            thread.join()

    def _ipython_display_(self) -> None:
        """Show nothing: :func:`chat` has shown it already."""

    def _submit(self, seconds: float = 0.0) -> None:
        """Answer what is in the field, in a thread, so that a click on Stop is noticed meanwhile.

        Args:
            seconds: until the text is in the field.
        """
        if not self.busy:
            self._stopped.clear()
            self._thread = threading.Timer(seconds, self._read_field)
            self._thread.daemon = True
            self._enable()
            self._thread.start()

    def _read_field(self) -> None:
        try:
            if text := self.field.value.strip():
                self.field.value = ""
                name, strength = self.adapter.value, self.strength.value
                label = BASE if name is None else name if strength == 1 else f"{name} × {strength:g}"  # noqa: RUF001 - a sign of multiplication
                self.conversation.name, self.conversation.strength = name, strength
                self._show_message("you", _USER)(text)
                self._show_answer(text, self._show_message(label))
        finally:
            self._thread = None
            self._enable()

    def _show_answer(self, text: str, show: Callable[..., None]) -> None:
        """Show the answer in parts, and at its end, or where it ended, why."""
        show("")
        answer = ""
        try:
            with closing(self.conversation.answer(text)) as parts:
                for part in parts:
                    answer += part
                    show(answer)
                    if self._stopped.is_set():
                        show(f"{answer} [stopped]")
                        break
            if not answer:
                show("[The model ended its answer before the first word.]")
        except Exception as error:  # in a thread nobody else would see it
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            show(f"{answer}\n{kind}{error}".strip(), _ERROR)
            if not answer and not self.field.value:
                self.field.value = text  # to be corrected

    def _begin(self) -> None:
        """Begin a new conversation."""
        self.conversation.messages.clear()
        self.messages.children = ()

    def _show_message(self, label: str, colour: str = _MODEL) -> Callable[..., None]:
        """Add a message, and return a function that shows a text in it."""
        import ipywidgets

        view = ipywidgets.HTML()
        self.messages.children = (*self.messages.children, view)

        def show(text: str, colour: str = colour) -> None:
            view.value = _MESSAGE.format(colour=colour, label=html.escape(label), text=html.escape(text))

        return show

    def _enable(self) -> None:
        """Disable what cannot be used now.

        Never the field: it would lose the focus, and JupyterLab would take the keys that follow for commands.
        """
        for control in (self.adapter, self.send, self.new):
            control.disabled = self.busy
        self.strength.disabled = self.busy or self.adapter.value is None
        self.stop.disabled = not self.busy
