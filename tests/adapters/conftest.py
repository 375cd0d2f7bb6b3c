"""Adapters to talk with."""

import pytest

from lora_lab import Llama, LoRAConfig, inject, save_adapter
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
