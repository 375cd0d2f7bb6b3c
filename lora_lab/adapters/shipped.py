"""Adapters that are installed with lora_lab, to try at once; data/README.md has their training and their scores."""

from __future__ import annotations

from pathlib import Path

from lora_lab.adapters.peft_format import CONFIG

_DATA = Path(__file__).parent / "data"


def shipped(name: str) -> Path:
    """The folder of an adapter that is installed with lora_lab: ``load_adapter(model, shipped("lighthouse-keeper"))``.

    All are adapters of SmolLM2-135M-Instruct, which :func:`lora_lab.load_pretrained` loads by default.

    Raises:
        ValueError: there is no adapter of that name.
    """
    names = sorted(path.parent.name for path in _DATA.glob(f"*/{CONFIG}"))
    if name not in names:
        raise ValueError(f"There is no shipped adapter {name!r}; choose one of {', '.join(names)}.")
    return _DATA / name
