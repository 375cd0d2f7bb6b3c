"""A conversation in a notebook: the answers as they are made, and controls for the adapter and its strength."""

from __future__ import annotations

import html
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_lab.adapters.chat import Conversation
from lora_lab.models.llama import Llama
from lora_lab.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import ipywidgets

BASE = "(base model)"
_WIDE: dict[str, Any] = {"width": "46em", "max_width": "100%"}
# Of the edges of messages: JupyterLab's colours, which follow its theme, and others for front ends without them.
_USER, _MODEL, _ERROR = "var(--jp-border-color1, #999999)", "var(--jp-success-color1, #009e73)", "#d55e00"


class Chat:
    """The widgets of a conversation, made by :func:`chat`. A program can drive them as a reader does.

    Attributes:
        conversation: what the model reads; between answers no adapter is in use in it.
        adapter, strength: a drop-down (name, or None for the base) and a slider; the next answer is given with them.
        field, send, stop, new: the field for a message, and the buttons.
        messages: a box with one HTML widget for each message, answer and error.
        panel: the box of all.
    """

    def __init__(self, conversation: Conversation) -> None:
        import ipywidgets

        self.conversation = conversation
        conversation.use(None)  # the model is as it was, so that the cell can be run again
        options = [(name, name) for name in conversation.adapters] + [(BASE, None)]
        beside = {"description_width": "initial"}
        self.adapter = ipywidgets.Dropdown(options=options, description="adapter", style=beside)
        self.strength = ipywidgets.FloatSlider(1.0, min=0.0, max=2.0, step=0.05, description="strength", style=beside)
        self.new = ipywidgets.Button(description="New conversation", layout={"width": "auto"})
        self.field = ipywidgets.Text(placeholder="Write a message; Enter sends it", layout={"flex": "1 1 auto"})
        self.send = ipywidgets.Button(description="Send", button_style="info", layout={"width": "6em"})
        self.stop = ipywidgets.Button(description="Stop", disabled=True, layout={"width": "6em"})
        self.messages = ipywidgets.VBox(layout={"width": "100%"})
        top = ipywidgets.HBox([self.adapter, self.strength, self.new], layout={"flex_flow": "row wrap"})
        # Reversed, a box is scrolled to its end, and stays there while an answer grows.
        window = ipywidgets.Box([self.messages], layout=_window_layout())
        bottom = ipywidgets.HBox([self.field, self.send, self.stop])
        self.panel = ipywidgets.VBox([top, window, bottom], layout=_WIDE)
        self._stopped, self._thread = threading.Event(), None
        self.adapter.observe(lambda _: self._enable(), names="value")
        self.field.on_msg(self._field_sent)
        self.send.on_click(lambda _: self._submit())
        self.stop.on_click(lambda _: self._stopped.set())
        self.new.on_click(lambda _: self._begin())
        self._enable()
        self._begin()

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        return self._thread is not None

    def wait(self) -> None:
        """Return when the answer that is being made, if any, has ended."""
        if (thread := self._thread) is not None:
            thread.join()

    def _ipython_display_(self) -> None:
        """Nothing: :func:`chat` has displayed it already."""

    def _field_sent(self, _: Any, content: dict[str, Any], __: Any) -> None:
        if content.get("event") == "submit":  # Enter; the field's value changes at every key
            self._submit()

    def _submit(self) -> None:
        """Answer what is in the field, in a thread, so that a click on Stop is noticed meanwhile."""
        text = self.field.value.strip()
        if self.busy or not text:
            return
        self.field.value = ""
        self._add(_message("you", text, _USER))
        self._stopped.clear()
        name, strength = self.adapter.value, self.strength.value
        view = self._add(_message(_label(name, strength), "", _MODEL))
        self._thread = threading.Thread(target=self._answer, args=(text, name, strength, view), daemon=True)
        self._enable()
        self._thread.start()

    def _answer(self, text: str, name: str | None, strength: float, view: ipywidgets.HTML) -> None:
        label, answer = _label(name, strength), ""
        try:
            self.conversation.use(name)
            self.conversation.strength = strength
            parts: Any = self.conversation.answer(text)
            with closing(parts):
                for part in parts:
                    answer += part
                    view.value = _message(label, answer, _MODEL)
                    if self._stopped.is_set():
                        view.value = _message(label, f"{answer} [stopped]", _MODEL)
                        break
            if not answer:
                view.value = _message(label, "[The model ended its answer before the first word.]", _MODEL)
        except Exception as error:  # in a thread nobody else would see it
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            view.value = _message(label, f"{answer}\n{kind}{error}".strip(), _ERROR)
            if not answer and not self.field.value:
                self.field.value = text  # to be corrected
        finally:
            self.conversation.use(None)
            self._thread = None
            self._enable()

    def _begin(self) -> None:
        """Begin a new conversation."""
        self.conversation.messages.clear()
        self.messages.children = ()

    def _add(self, page: str) -> ipywidgets.HTML:
        import ipywidgets

        view = ipywidgets.HTML(page)
        self.messages.children = (*self.messages.children, view)
        return view

    def _enable(self) -> None:
        """Disable what cannot be used now.

        Never the field: it would lose the focus, and JupyterLab would take the keys that follow for commands.
        """
        for control in (self.adapter, self.send, self.new):
            control.disabled = self.busy
        self.strength.disabled = self.busy or self.adapter.value is None
        self.stop.disabled = not self.busy


def chat(
    model: Llama,
    tokenizer: Tokenizer,
    adapters: Mapping[str, str | Path | Mapping[str, Tensor]] | None = None,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.5,
    repetition_penalty: float = 1.1,
    seed: int = 0,
) -> Chat:
    """Show a conversation with a model in a notebook, whose adapter and strength can be changed between two answers.

        ll.chat(model, tokenizer, {"keeper": ll.adapters.shipped("lighthouse-keeper")})

    Enter or a click sends a message. An answer appears as it is made, in a thread of its own: do not train or change
    the model until it has ended or was stopped. Between answers the model has no adapter; its weights are frozen, as by
    :func:`lora_lab.load_adapter`. A strength of 0 is the base, 1 the adapter as it was trained.

    Args:
        model, tokenizer, adapters, max_new_tokens, temperature, repetition_penalty, seed: as for
            :class:`lora_lab.adapters.chat.Conversation`. The first adapter is selected at the start.

    Returns:
        An object whose widgets a program can drive.

    Raises:
        ValueError: the model has adapters, or an adapter does not fit it.
        FileNotFoundError: an adapter's folder lacks a file.
    """
    from IPython.display import display

    sampling: dict[str, Any] = {"temperature": temperature, "repetition_penalty": repetition_penalty, "seed": seed}
    made = Chat(Conversation(model, tokenizer, adapters, max_new_tokens=max_new_tokens, **sampling))
    bundle = made.panel._repr_mimebundle_() or {}
    alt = "A conversation: controls for the adapter and its strength, the messages, and a field to write in."
    display({**bundle, "text/plain": alt}, raw=True)
    return made


def _label(name: str | None, strength: float) -> str:
    if name is None:
        return BASE
    return name if strength == 1 else f"{name} × {strength:g}"  # noqa: RUF001 - a sign of multiplication


def _message(label: str, text: str, colour: str) -> str:
    style = "padding: 2px 12px; margin: 6px 8px; line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere"
    return (
        f'<div style="border-left: 4px solid {colour}; {style}"><b>{html.escape(label)}</b>\n{html.escape(text)}</div>'
    )


def _window_layout() -> dict[str, Any]:
    edge = "1px solid var(--jp-border-color2, #cccccc)"
    return {"display": "flex", "flex_flow": "column-reverse", "height": "26em", "overflow": "auto", "border": edge}
