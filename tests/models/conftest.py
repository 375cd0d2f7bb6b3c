"""An empty cache for the real model."""

import pytest


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The folder in which models are kept, as long as the test runs; it does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LORA_LAB_CACHE", str(folder))
    return folder
