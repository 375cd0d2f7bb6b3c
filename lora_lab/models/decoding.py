"""Token after token: how a text is continued by whatever model reads it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_lab.system.schema import Count, NotNegative, Seed, check, check_fields
from lora_lab.system.wording import shortened
from lora_lab.task import context_length, restore_modes

_LOWEST_TEMPERATURE = 1e-6  # far below it logits / temperature overflows


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Args:
        temperature: 0 always takes the most probable token (greedy); from 0.000001 on tokens are sampled from
            softmax(logits / temperature).
        seed: of the samples.
        repetition_penalty: divides the positive logits of the tokens that the text holds already, prompt included, and
            multiplies their negative ones (Keskar et al. 2019, "CTRL", arXiv 1909.05858, section 4.1): above 1 the
            text repeats itself less; 1 changes nothing. From 0.001 to 1000.

    Raises:
        ValueError: the temperature or the penalty is out of range, or one of the three is no such number.
    """

    temperature: NotNegative = 0.0
    seed: Seed = 0
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if 0 < self.temperature < _LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature}, but it must be 0, or at least {_LOWEST_TEMPERATURE:f}."
            )

    def choose(self, logits: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
        """Return the next token, a scalar.

        Args:
            logits: (vocabulary,), changed in place if there is a penalty.
            text: the tokens so far, (length,).
            generator: of the samples.
        """
        if self.repetition_penalty != 1:
            repeated, penalty = logits[text], float(self.repetition_penalty)  # (length,)
            lower, higher = repeated * penalty, repeated / penalty  # (length,) each
            logits[text] = torch.where(repeated < 0, lower, higher)  # (length,)
        if self.temperature == 0:
            return logits.argmax()  # ()
        probabilities = torch.softmax(logits.float().cpu() / float(self.temperature), dim=-1)  # (49152,)
        return torch.multinomial(probabilities, 1, generator=generator)[0]  # ()


def check_context(model: nn.Module, length: int, max_new_tokens: int) -> None:
    """Check that a prompt of ``length`` tokens and the new ones fit into the model's context, if its config names one.

    Raises:
        ValueError: they do not.
    """
    context = context_length(model)
    if context is not None and length + max_new_tokens > context:
        raise ValueError(
            f"The prompt has {length} tokens and max_new_tokens is {max_new_tokens}, but the model reads at most "
            f"{context} (max_position_embeddings); shorten the prompt, or ask for fewer tokens."
        )


@torch.no_grad()
def continue_text(
    model: nn.Module,
    read: Callable[[Tensor], Tensor],
    ids: Tensor,
    max_new_tokens: int,
    stop: int | None,
    sampling: Sampling,
) -> Iterator[int]:
    """Return the tokens that follow a prompt, one by one, as they are made.

    Args:
        model: is in evaluation mode meanwhile.
        read: takes tokens (1, new), which continue those that it took before; returns the logits of the token that
            follows them, (1, vocabulary).
        ids: the prompt, (length,), at least one token.
        max_new_tokens: maximum number of new tokens.
        stop: a token that ends the text (it is not returned).
        sampling: how tokens are chosen.

    Raises:
        ValueError: the prompt is empty, not one-dimensional or holds a token that the model does not know; or prompt
            and new tokens together may exceed the model's context.
    """
    max_new_tokens = check(max_new_tokens, Count, "max_new_tokens")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", sys.maxsize)
    if ids.ndim != 1 or len(ids) == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"The prompt is {shortened(str(ids.tolist()), 80)}, but it must be a row of at least one token id, each "
            f"below {vocabulary}; encode at least one word with the model's own tokenizer."
        )
    check_context(model, len(ids), max_new_tokens)
    generator = torch.Generator().manual_seed(sampling.seed)
    new, text = ids[None], ids  # (1, length), then (1, 1); (length,), then longer
    with restore_modes(model):
        model.eval()
        for _ in range(max_new_tokens):
            token = sampling.choose(read(new)[0], text, generator)  # ()
            if int(token) == stop:
                break
            yield int(token)
            new = token.to(ids.device).view(1, 1)  # (1, 1)
            text = torch.cat([text, new[0]])  # (length + new,)
