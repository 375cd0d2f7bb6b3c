"""Adapters to talk with."""

from contextlib import nullcontext

import pytest
import torch

from lora_lab import Llama, LoRAConfig, inject, load_adapter, save_adapter
from lora_lab.adapters import strength
from tests.helpers import randomise


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
