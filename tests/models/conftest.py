"""An empty cache for the real model, and tiny ones."""

import dataclasses

import pytest

from lora_lab import Llama
from tests.helpers import randomise_all


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The folder in which models are kept, as long as the test runs; it does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LORA_LAB_CACHE", str(folder))
    return folder


@pytest.fixture
def tiny(tiny_config):
    """Makes a tiny random Llama of ours, with weights large enough that its attention matters."""

    def make(**changes):
        return randomise_all(Llama(dataclasses.replace(tiny_config, **changes)).eval())

    return make
