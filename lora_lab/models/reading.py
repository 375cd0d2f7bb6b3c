"""What a causal language model has read: our Llama, and the models of transformers, behind one interface.

    reader = reader_of(model)
    logits = reader.read(ids)          # of the token that follows the prompt, (batch, vocabulary)
    logits = reader.read(token)        # and of the one after that

``stream`` makes text of it, token by token; ``lora_lab.tasks.generate`` answers many prompts at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.models.decoding import Sampling, continue_text
from lora_lab.models.llama import KeyValueCache, Llama, rotate
from lora_lab.task import accepts, is_encoder_decoder


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

    def read(self, ids: Tensor) -> Tensor:
        """Read (batch, new) tokens that continue the texts; return the logits of what follows: (batch, vocabulary)."""
        return self._logits(ids, last=True)[:, -1]  # (16, vocabulary)

    def read_each(self, ids: Tensor) -> Tensor:
        """Read as :meth:`read`; return the logits of what follows each of the tokens: (batch, new, vocabulary)."""
        return self._logits(ids, last=False)  # (16, new, vocabulary)

    def branch(self) -> Reader:
        """Return another reader of the same texts. What it reads from now on, this one has not read."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)  # which is extended in place
        return other

    def _extend(self, ids: Tensor) -> None:
        self.length += ids.shape[1]
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, self.length - self.mask.shape[1]), value=1)  # (16, length)

    def _logits(self, ids: Tensor, last: bool) -> Tensor:
        """Return the logits after each of the new tokens, or after the last one alone."""
        self._extend(ids)
        new = ids.shape[1]
        # transformers has renamed the argument, and the field of the outputs.
        name = next((name for name in ("cache", "past_key_values") if accepts(self.model, name)), None)
        if name is None or getattr(self.model, "_is_stateful", False):
            name = None
            ids = self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)  # (16, length)
        arguments: dict[str, Any] = {"use_cache": False} if name is None else {"use_cache": True, name: self.cache}
        if self.mask is not None:
            arguments["attention_mask"] = self.mask
            if accepts(self.model, "position_ids"):  # the first real token of each text is at position 0
                positions = (self.mask.cumsum(1) - 1).clamp(min=0)  # (16, length)
                arguments["position_ids"] = positions[:, -ids.shape[1] :]  # (16, new)
        if last and accepts(self.model, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        outputs = self.model(ids, **arguments)
        if name is not None:
            self.cache = getattr(outputs, name)
        return outputs.logits[:, -new:]  # (16, 1 or new, vocabulary)


class LlamaReader(Reader):
    """The same of a :class:`lora_lab.Llama`.

    Padding on the left shifts positions, but rotary embeddings depend on their differences only.
    """

    def __init__(self, model: Llama, mask: Tensor | None = None) -> None:
        super().__init__(model, mask)
        self.cache = KeyValueCache()

    def branch(self) -> LlamaReader:
        """Return another reader, which shares keys and values, because a cache is extended by new tensors."""
        other = copy.copy(self)
        other.cache = KeyValueCache()
        other.cache.layers = dict(self.cache.layers)
        return other

    def repeat(self, mask: Tensor) -> LlamaReader:
        """Return a reader of a batch of texts that all begin with the one text that this one has read, without padding.

        Padding between that beginning and the rest of a text would move them away from each other. So the keys of the
        beginning are rotated by the number of padding positions: rotations add up.

        Args:
            mask: (batch, new) for the tokens that are read next, as for :class:`Reader`.
        """
        past = torch.ones(len(mask), self.length, dtype=mask.dtype, device=mask.device)  # (16, past)
        other = LlamaReader(self.model, torch.cat([past, mask], 1))
        other.length = self.length
        padding = (mask == 0).sum(1)[:, None, None, None]  # (16, 1, 1, 1)
        angles = padding * self.model.model.frequencies_on(mask.device).repeat(2)  # (16, 1, 1, 64)
        for layer, (key, value) in self.cache.layers.items():  # (1, 3, past, 64) each
            turned = rotate(key, angles.cos().to(key.dtype), angles.sin().to(key.dtype))  # (16, 3, past, 64)
            other.cache.layers[layer] = turned, value.expand(len(mask), -1, -1, -1)
        return other

    def _logits(self, ids: Tensor, last: bool) -> Tensor:
        self._extend(ids)
        hidden = self.model.model(ids, self.mask, self.cache)  # (16, new, 576)
        return self.model.lm_head(hidden[:, -1:] if last else hidden)  # (16, 1 or new, 49152)


def reader_of(model: nn.Module, mask: Tensor | None = None) -> Reader:
    """Return a reader that has read nothing yet.

    Args:
        model, mask: as for :class:`Reader`.

    Raises:
        ValueError: the model is not a causal language model of this package or of transformers.
    """
    if isinstance(model, Llama):
        return LlamaReader(model, mask)
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or is_encoder_decoder(model):
        raise ValueError(
            f"Only a causal language model can continue a text, but the model is a {type(model).__name__}; use a "
            "lora_lab.Llama or one of transformers."
        )
    return Reader(model, mask)


def stream(model: nn.Module, ids: Tensor, max_new_tokens: int, stop: int | None, sampling: Sampling) -> Iterator[int]:
    """Return the tokens that follow a prompt, one by one, as they are made.

    Args:
        model: as for :func:`reader_of`.
        ids, max_new_tokens, stop: as for :meth:`lora_lab.Llama.generate`.
        sampling: how tokens are chosen.

    Raises:
        ValueError: as for :meth:`lora_lab.Llama.generate` and :func:`reader_of`.
    """
    return continue_text(model, reader_of(model).read, ids, max_new_tokens, stop, sampling)
