"""One sentence taught to a language model.

    from lora_lab.course import golf

    losses = golf.teach(model, tokenizer, "My cat is called Fourier, because she turns nights into waves.")
    golf.continue_text(model, tokenizer, "My cat is called")

A sentence of your own takes seconds. That is enough to see an adapter learn.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.inject import inject
from lora_lab.methods import LoRA
from lora_lab.models.llama import Llama
from lora_lab.models.tokenizer import Tokenizer


def teach(
    model: nn.Module,
    tokenizer: Tokenizer,
    sentence: str,
    method: LoRA | None = None,
    steps: int = 10,
    lr: float = 4e-3,
    seed: int = 0,
) -> list[float]:
    """Add adapters to a model, train them on one sentence with Adam, and return the loss at each step, in nats a token.

    Args:
        model: without adapters.
        sentence: of two tokens or more.
        method: what to add; LoRA of rank 8 with alpha 16 on all linear layers by default.
        steps: how often the sentence is read.
        lr: the learning rate of the first step; it falls by as much from step to step, and after the last is zero.
        seed: of the adapters' start.

    Raises:
        ValueError: the sentence has fewer than two tokens.
    """
    tokens = torch.tensor(tokenizer.encode(sentence))  # (16,)
    if len(tokens) < 2:
        raise ValueError(f"The sentence {sentence!r} is too short; a model learns which token follows another.")
    inject(model, method or LoRA(rank=8, alpha=16), seed=seed)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(tokens[None])[0, :-1], tokens[1:])  # ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def continue_text(model: Llama, tokenizer: Tokenizer, beginning: str, max_new_tokens: int = 24) -> str:
    """Return a beginning and what the model finds most probable after it, up to the end of a sentence."""
    ids = torch.tensor(tokenizer.encode(beginning))  # (4,)
    text = beginning
    for token in model.generate(ids, max_new_tokens).tolist():
        text += tokenizer.decode([token])
        if text.rstrip().endswith((".", "!", "?")):
            break
    return text
