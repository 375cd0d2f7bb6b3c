"""A conversation in a notebook: the answers as they are made, and controls for the adapter and its strength."""

from __future__ import annotations

import html
import threading
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_lab.adapters.chat import Conversation
from lora_lab.inject import require_no_adapters
from lora_lab.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import ipywidgets

BASE = "(base model)"
_TEXT_FOLLOWS_IN = 0.3  # seconds from the message of Enter to that of the text; they are sent together
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
        look: dict[str, Any] = {"style": {"description_width": "initial"}, "layout": {"flex": "1 1 15em"}}
        self.adapter = ipywidgets.Dropdown(options=options, description="adapter", **look)
        self.strength = ipywidgets.FloatSlider(1.0, min=0.0, max=2.0, step=0.05, description="strength", **look)
        self.new = ipywidgets.Button(description="New conversation", layout={"width": "auto"})
        # At each key a browser sends the text so far, but keeps some back while others are under way, and a message of
        # Enter would overtake them. So the text is sent as a whole: right after Enter, or when the field is left.
        self.field = ipywidgets.Text(
            placeholder="Write a message; Enter sends it", continuous_update=False, layout={"flex": "1 1 15em"}
        )
        self.send = ipywidgets.Button(description="Send", button_style="info", layout={"width": "6em"})
        self.stop = ipywidgets.Button(description="Stop", disabled=True, layout={"width": "6em"})
        self.messages = ipywidgets.VBox(layout={"flex": "0 0 auto", "overflow": "visible"})
        wraps: dict[str, Any] = {"flex_flow": "row wrap", "grid_gap": "0 8px"}
        top = ipywidgets.HBox([self.adapter, self.strength, self.new], layout=wraps)
        # Reversed, a box is scrolled to its end, and stays there while an answer grows.
        window = ipywidgets.Box([self.messages], layout=_window_layout())
        bottom = ipywidgets.HBox([self.field, self.send, self.stop], layout={"flex_flow": "row wrap"})
        self.panel = ipywidgets.VBox([top, window, bottom], layout=_WIDE)
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._entered: threading.Timer | None = None
        self.adapter.observe(lambda _: self._enable(), names="value")
        self.field.on_msg(self._enter)
        self.field.observe(lambda _: self._field_changed(), names="value")
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
        if (timer := self._entered) is not None:
            timer.join()
        if (thread := self._thread) is not None:
            thread.join()

    def _ipython_display_(self) -> None:
        """Nothing: :func:`chat` has displayed it already."""

    def _enter(self, _: Any, content: dict[str, Any], __: Any) -> None:
        """Enter was pressed: the text follows at once if it has changed, and does not if the kernel has it already."""
        if content.get("event") == "submit":
            self._entered = threading.Timer(_TEXT_FOLLOWS_IN, self._submit)
            self._entered.daemon = True
            self._entered.start()

    def _field_changed(self) -> None:
        if self._entered is not None:
            self._submit()

    def _submit(self) -> None:
        """Answer what is in the field, in a thread, so that a click on Stop is noticed meanwhile."""
        with self._lock:
            if self._entered is not None:
                self._entered.cancel()
                self._entered = None
            text = self.field.value.strip()
            if self.busy or not text:
                return
            self.field.value = ""
            self._stopped.clear()
            name, strength = self.adapter.value, self.strength.value
            self._add(_message("you", text, _USER))
            view = self._add(_message(_label(name, strength), "", _MODEL))
            self._thread = threading.Thread(target=self._answer, args=(text, name, strength, view), daemon=True)
            self._enable()
            self._thread.start()

    def _answer(self, text: str, name: str | None, strength: float, view: ipywidgets.HTML) -> None:
        label, answer = _label(name, strength), ""
        try:
            with closing(self._parts(text, name, strength)) as parts:
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
            self._thread = None
            self._enable()

    def _parts(self, text: str, name: str | None, strength: float) -> Generator[str, None, None]:
        """The answer in parts, during which the adapter is on the model."""
        require_no_adapters(self.conversation.model)  # such as were trained since the last answer: they would be lost
        try:
            self.conversation.use(name)
            self.conversation.strength = strength
            yield from self.conversation.answer(text)
        finally:
            self.conversation.use(None)

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
    model: nn.Module,
    tokenizer: Tokenizer,
    adapters: Mapping[str, str | Path | Mapping[str, Tensor]] | None = None,
    *,
    max_new_tokens: int = 200,
    **sampling: Any,
) -> Chat:
    """Show a conversation with a model in a notebook, whose adapter and strength can be changed between two answers.

        ll.chat(model, tokenizer, {"keeper": ll.adapters.shipped("lighthouse-keeper")})

    Enter or a click sends a message. An answer appears as it is made, in a thread of its own: do not train or change
    the model until it has ended or was stopped. Between answers the model has no adapter; its weights are frozen, as by
    :func:`lora_lab.load_adapter`. A strength of 0 is the base, 1 the adapter as it was trained.

    Args:
        model, tokenizer, adapters, max_new_tokens, **sampling: as for
            :class:`lora_lab.adapters.chat.Conversation`. The first adapter is selected at the start.

    Returns:
        An object whose widgets a program can drive.

    Raises:
        ValueError: the model has adapters, or an adapter does not fit it.
        FileNotFoundError: an adapter's folder lacks a file.
    """
    from IPython.display import display

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
    shape = {"display": "flex", "flex_flow": "column-reverse", "height": "26em", "overflow": "auto", "margin": "2px"}
    return shape | {"border": edge}
