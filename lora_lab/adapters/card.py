"""The model card of an adapter: a README.md that the Hugging Face Hub reads, and people too."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_lab.history import History
from lora_lab.system.provenance import version
from lora_lab.variants import LORA_METHODS

CARD = "README.md"
_MARK = (
    "<!-- This card is written by lora_lab, and again when the adapter is saved. Remove this line to keep yours. -->"
)
_TEXT = """---
{base_line}library_name: peft
tags:
- lora
- lora_lab
---
{mark}

# {title}

{settings}
{training}
## Use

The folder is in PEFT's format. With lora_lab: `lora_lab.load_adapter(model, folder)`; with PEFT:
`peft.PeftModel.from_pretrained(model, folder)`.

Saved with lora_lab {version}, torch {torch}, Python {python}.
"""


def is_free(folder: str | Path) -> bool:
    """Return whether a card may be written to a folder: it has none, or one by lora_lab that nobody has claimed."""
    path = Path(folder) / CARD
    return not path.exists() or (path.is_file() and _MARK in path.read_text(encoding="utf-8", errors="replace"))


def yield_to(folder: str | Path, temporary: Path) -> None:
    """Remove the card from ``temporary``, whose files will move to ``folder``, if a user's README.md is there."""
    if not is_free(folder):
        (temporary / CARD).unlink()


def card(config: Mapping[str, Any], parameters: int, history: History | None = None) -> str:
    """Return the card's text.

    Args:
        config: the adapter's settings, with PEFT's names.
        parameters: the number of values in the adapter.
        history: of the training run; None leaves out how it was trained.
    """
    base, targets = config["base_model_name_or_path"], config["target_modules"]
    kind = next((kind.__name__ for kind in LORA_METHODS.values() if config.get(str(kind.peft))), "LoRA")
    on_hub = base and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) and not Path(base).exists()  # which takes names alone
    exceptions = " (exceptions in adapter_config.json)" if config["rank_pattern"] or config["alpha_pattern"] else ""
    settings = {
        "base model": f"`{base}`" if base else "not recorded",
        "method": kind,
        "rank, alpha": f"{config['r']}, {config['lora_alpha']:g}{exceptions}",
        "dropout": f"{config['lora_dropout']:g}",
        "adapted layers": f"{len(targets)} layers" if len(targets) > 12 else ", ".join(f"`{name}`" for name in targets),
        "parameters": f"{parameters:,}",
    }
    return _TEXT.format(
        base_line=f"base_model: {base}\n" if on_hub else "",
        mark=_MARK,
        title=f"{kind} adapter" + (f" for {base}" if base else ""),
        settings=_table(settings),
        training="" if history is None else f"\n## Training\n\n{_table(_describe(history))}\n",
        version=version(),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def _describe(history: History) -> dict[str, str]:
    """Return what a run trained on and how, and its losses before and after, as rows of a table."""
    settings, rows, method = history.settings, history.rows, history.method
    result = {
        "task": f"{history.task['name']} (fingerprint `{history.task['fingerprint'][:12]}`)",
        "method": method["name"],
        "steps, examples a step": f"{len(rows) - 1:,}, {settings['batch_size']}",
        "learning rate": f"{settings['lr']:g}, {settings['schedule']}",
        "seed": str(settings["seed"]),
    }
    if "start" in method:
        result["continued from"] = f"an adapter with the hash `{method['start'][:12]}`"
    for part, label in (("validation", "validation loss"), ("off_domain", "off-domain loss")):
        losses = [row[f"{part}_loss"] for row in rows if row[f"{part}_loss"] is not None]
        if losses:
            result[f"{label}, before and after"] = f"{losses[0]:.3f}, {losses[-1]:.3f}"
    return result


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])
