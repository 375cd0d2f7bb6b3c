"""What a causal language model has read, and what follows, token after token: our Llama, and those of transformers.

    reader = lora_lab.models.llama.reader_of(model)
    logits = reader.read(ids)          # of the token that follows the prompt, (batch, 1, vocabulary)
    logits = reader.read(token)        # and of the one after that

:func:`stream` makes text of it, token by token; ``lora_lab.tasks.generate`` answers many prompts at once.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.system.schema import Count, NotNegative, Seed, check, check_fields
from lora_lab.system.wording import shortened
from lora_lab.task import accepts, context_length, restore_modes

# A single token of a model up to this size is read by one thread: as fast as by two on two idle cores (SmolLM2-135M,
# float32), and ten times faster where other processes keep the cores busy and threads wait for one another.
SMALL_BYTES = 2**30
_LOWEST_TEMPERATURE = 1e-6  # far below it logits / temperature overflows


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Reader:
    """A causal language model of transformers, and the batch of texts that it has read so far.

    A model without a cache of keys and values reads all again, such as a state-space model, whose state is continued by
    one token at a time only.

    Args:
        model: in evaluation mode, with or without adapters.
        mask: (batch, length) for the first tokens that are read, 1 for tokens and 0 for the padding on their left;
            None if there is no padding.
    """

    cache: Any = None
    ids: Tensor | None = None  # all that was read, for a model without a cache

    def __init__(self, model: Any, mask: Tensor | None = None) -> None:
        self.model, self.mask = model, mask
        self.length = 0  # tokens read so far, padding included
        weights = list(model.parameters())
        self.is_small = sum(each.numel() * each.element_size() for each in weights) <= SMALL_BYTES
        self.is_small &= all(each.device.type == "cpu" for each in weights)
        self.is_stateful = getattr(model, "_is_stateful", False)  # as transformers said it before 5.25

    def read(self, ids: Tensor, each: bool = False) -> Tensor:
        """Read tokens that continue the texts, and return the logits of what follows them.

        Args:
            ids: the tokens, (batch, new).
            each: return what follows each of these tokens, (batch, new, vocabulary); else what follows the last alone,
                (batch, 1, vocabulary).
        """
        self.length += ids.shape[1]
        if self.mask is not None:  # padding stands before the first tokens alone
            self.mask = F.pad(self.mask, (0, self.length - self.mask.shape[1]), value=1)  # (16, length)
        with one_thread() if self.is_small and ids.numel() == 1 else nullcontext():
            return self._compute_logits(ids, each)  # (16, new or 1, vocabulary)

    def _compute_logits(self, ids: Tensor, each: bool) -> Tensor:
        new = ids.shape[1]
        # transformers has renamed the argument, and the field of the outputs.
        name = next((name for name in ("cache", "past_key_values") if accepts(self.model, name)), None)
        if name is None or self.is_stateful:
            name = None
            ids = self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)  # (16, length)
        arguments: dict[str, Any] = {"use_cache": False} if name is None else {"use_cache": True, name: self.cache}
        if self.mask is not None:
            arguments["attention_mask"] = self.mask
            if accepts(self.model, "position_ids"):  # the first real token of each text is at position 0
                positions = (self.mask.cumsum(1) - 1).clamp(min=0)  # (16, length)
                arguments["position_ids"] = positions[:, -ids.shape[1] :]  # (16, new)
        if not each and accepts(self.model, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        outputs = self.model(ids, **arguments)
        if name is not None:
            self.cache = getattr(outputs, name)
            if any(hasattr(layer, "recurrent_states") for layer in getattr(self.cache, "layers", ())):
                self.is_stateful, self.ids, self.cache = True, ids, None  # from now on all is read again
        return outputs.logits[:, -new if each else -1 :]  # (16, 1 or new, vocabulary)

    def branch(self) -> Reader:
        """Return another reader of the same texts. What it reads from now on, this one has not read."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)  # which is extended in place
        return other


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Args:
        temperature: tokens are sampled from softmax(logits / temperature); 0, and what is below a millionth, always
            takes the most probable token (greedy).
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

    def choose(self, logits: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
        """Return the next token, a scalar.

        Args:
            logits: (vocabulary,), changed in place if there is a penalty.
            text: the tokens so far, (length,).
            generator: of the samples.
        """
        if self.repetition_penalty != 1:
            repeated = logits[text]  # (length,)
            lower, higher = repeated * self.repetition_penalty, repeated / self.repetition_penalty  # (length,) each
            logits[text] = torch.where(repeated < 0, lower, higher)  # (length,)
        if self.temperature < _LOWEST_TEMPERATURE:
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
def stream(reader: Reader, ids: Tensor, max_new_tokens: int, stop: int | None, sampling: Sampling) -> Iterator[int]:
    """Yield the tokens that follow a prompt, one by one, as they are made.

    Args:
        reader: has read nothing yet; its model is in evaluation mode meanwhile.
        ids: the prompt, (length,), at least one token.
        max_new_tokens: maximum number of new tokens.
        stop: a token that ends the text (it is not returned).
        sampling: how tokens are chosen.

    Raises:
        ValueError: the prompt is empty, not one-dimensional or holds a token that the model does not know; or prompt
            and new tokens together may exceed the model's context.
    """
    model = reader.model
    max_new_tokens = check(max_new_tokens, Count, "max_new_tokens")
    vocabulary = getattr(model.config, "vocab_size", sys.maxsize)
    if ids.ndim != 1 or len(ids) == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"The prompt is {shortened(str(ids.tolist()), 80)}, but it must be a row of token ids below "
            f"{vocabulary}; encode at least one word with the model's own tokenizer."
        )
    check_context(model, len(ids), max_new_tokens)
    generator = torch.Generator().manual_seed(sampling.seed)
    new, text = ids[None], ids  # (1, length), then (1, 1); (length,), then longer
    with restore_modes(model):
        model.eval()
        for _ in range(max_new_tokens):
            token = sampling.choose(reader.read(new)[0, 0], text, generator)  # ()
            if int(token) == stop:
                break
            yield int(token)
            new = token.to(ids.device).view(1, 1)  # (1, 1)
            text = torch.cat([text, new[0]])  # (length + new,)
