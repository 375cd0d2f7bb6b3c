"""A conversation with a model, whose adapter can be changed, turned off and turned up and down between two answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.edit import strength
from lora_lab.adapters.peft_format import load_adapter
from lora_lab.inject import lora_layers, replace, require_no_adapters
from lora_lab.models.decoding import Sampling
from lora_lab.models.reading import reader_of, stream
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.tasks.instruction import stop_token

HELP = """\
/adapter NAME     answer with this adapter
/off              answer as the base model
/strength NUMBER  multiply the adapter's update by NUMBER: 0 gives the base, 1 the adapter as it was trained
/new              begin a new conversation
/quit             end (so does the end of the input)"""

SAMPLING: dict[str, Any] = {"temperature": 0.5, "repetition_penalty": 1.1}  # of a chat, unless others are given


class Conversation:
    """The messages so far, and the adapter that the next answer is given with.

    Args:
        model: our Llama or a causal language model of transformers, without adapters. It stays so when no adapter is in
            use.
        tokenizer: of the model, with a chat template.
        adapters: name -> a folder or an adapter in memory, as for :func:`lora_lab.load_adapter`; the first is in use at
            the start.
        max_new_tokens: where an answer is cut if the model does not end it before.
        **sampling: as for :meth:`lora_lab.Llama.generate`, on top of :data:`SAMPLING`; the seed rises by 1 with each
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
        adapters: Mapping[str, str | Path | Mapping[str, Tensor]] | None = None,
        *,
        max_new_tokens: int = 200,
        **sampling: Any,
    ) -> None:
        require_no_adapters(model)
        reader_of(model)
        if tokenizer.chat_template is None:
            raise ValueError("This tokenizer has no chat template, so the model cannot chat; use stream or generate.")
        self.model, self.tokenizer, self.adapters = model, tokenizer, dict(adapters or {})
        self.messages: list[dict[str, str]] = []
        self.name: str | None = None  # of the adapter in use
        self.strength = 1.0
        self.max_new_tokens = max_new_tokens
        self.sampling = Sampling(**SAMPLING | sampling)
        for name in reversed(self.adapters):  # all are tried now, so that an error comes before the first question
            self.use(name)

    def use(self, name: str | None) -> None:
        """Put another adapter on the model; None takes it off.

        Raises:
            ValueError: there is no adapter of that name, or as for :func:`lora_lab.load_adapter`.
        """
        if name is not None and name not in self.adapters:
            raise ValueError(f"There is no adapter {name!r}; there are {', '.join(self.adapters) or 'none'}.")
        for layer_name, layer in lora_layers(self.model).items():
            replace(self.model, layer_name, layer.base)
        self.name = None
        if name is not None:
            load_adapter(self.model, self.adapters[name])
            self.name = name

    def answer(self, text: str) -> Iterator[str]:
        """The answer to what a user says, in parts, as they are made.

        If the caller stops early, what was made until then is the answer that the conversation goes on with.

        Raises:
            ValueError: as for :meth:`lora_lab.models.tokenizer.Tokenizer.chat`.
        """
        self.messages.append({"role": "user", "content": text})
        made: list[int] = []

        def noted(tokens: Iterator[int]) -> Iterator[int]:
            for token in tokens:
                made.append(token)
                yield token

        try:
            ids = torch.tensor(self.tokenizer.encode(self.tokenizer.chat(self.messages)))  # (length,)
            ids = ids.to(next(self.model.parameters()).device)
            changed = nullcontext() if self.name is None else strength(self.model, self.strength)
            with changed:
                tokens = stream(self.model, ids, self.max_new_tokens, stop_token(self.tokenizer), **vars(self.sampling))
                yield from self.tokenizer.decode_stream(noted(tokens))
        finally:
            self.sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + 1)
            if made:
                self.messages.append({"role": "assistant", "content": self.tokenizer.decode(made).strip() or "..."})
            else:
                self.messages.pop()

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with a slash.

        Returns:
            What to tell the user; None to end the conversation.
        """
        word, _, value = line.strip().partition(" ")
        try:
            if word == "/quit":
                return None
            if word == "/adapter":
                self.use(value.strip())
                return f"The next answer is given with {self.name}, at strength {self.strength:g}."
            if word == "/off":
                self.use(None)
                return "From the next answer on it is the base model that answers."
            if word == "/strength":
                self.strength = _number(value)
                waits = "" if self.name else ", once /adapter NAME has chosen an adapter"
                return f"The adapter's update is multiplied by {self.strength:g} from now on{waits}."
            if word == "/new":
                self.messages.clear()
                return "A new conversation begins."
        except ValueError as error:
            return str(error)
        return HELP


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise ValueError(f"The strength is {text.strip()!r}, but it must be a number, such as 0.5.")
    return number


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
        if line.startswith("/"):
            reply = conversation.command(line)
            if reply is None:
                return
            write(f"{reply}\n")
        elif line:
            try:
                for part in conversation.answer(line):
                    write(part)
            except KeyboardInterrupt:  # ends the answer, not the conversation
                write(" [stopped]")
            except ValueError as error:
                write(str(error))
            write("\n")
