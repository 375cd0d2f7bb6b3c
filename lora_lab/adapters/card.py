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


def is_free(folder: str | Path) -> bool:
    """Whether a card may be written to a folder: it has none, or one that lora_lab wrote and nobody has claimed."""
    path = Path(folder) / CARD
    return not path.exists() or (path.is_file() and _MARK in path.read_text(encoding="utf-8", errors="replace"))


def yield_to(folder: str | Path, temporary: Path) -> None:
    """Remove the card from ``temporary``, whose files will move to ``folder``, if a user's README.md is there."""
    if not is_free(folder):
        (temporary / CARD).unlink()


def card(config: Mapping[str, Any], parameters: int, history: History | None = None) -> str:
    """The card's text.

    Args:
        config: the adapter's settings, with PEFT's names.
        parameters: the number of values in the adapter.
        history: of the training run; None leaves out how it was trained.
    """
    base = config["base_model_name_or_path"]
    kind = next((kind.__name__ for kind in LORA_METHODS.values() if config.get(str(kind.peft))), "LoRA")
    header = ["---", "library_name: peft", "tags:", "- lora", "- lora_lab"]
    if base and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) and not Path(base).exists():  # the Hub takes names alone
        header.insert(1, f"base_model: {base}")
    targets = ", ".join(f"`{name}`" for name in config["target_modules"])
    rows = {
        "base model": f"`{base}`" if base else "not recorded",
        "method": kind,
        "rank, alpha": f"{config['r']}, {config['lora_alpha']:g}"
        + (" (exceptions in adapter_config.json)" if config["rank_pattern"] or config["alpha_pattern"] else ""),
        "dropout": f"{config['lora_dropout']:g}",
        "adapted layers": targets if len(config["target_modules"]) <= 12 else f"{len(config['target_modules'])} layers",
        "parameters": f"{parameters:,}",
    }
    training = [] if history is None else ["", "## Training", "", *_table(_training(history))]
    versions = f"lora_lab {version()}, torch {torch.__version__}, Python {platform.python_version()}"
    return "\n".join(
        [
            *header,
            "---",
            _MARK,
            "",
            f"# {kind} adapter" + (f" for {base}" if base else ""),
            "",
            *_table(rows),
            *training,
            "",
            "## Use",
            "",
            "The folder is in PEFT's format. With lora_lab: `lora_lab.load_adapter(model, folder)`; with PEFT:",
            "`peft.PeftModel.from_pretrained(model, folder)`.",
            "",
            f"Saved with {versions}.",
            "",
        ]
    )


def _training(history: History) -> dict[str, str]:
    """What a run trained on and how, and its losses before and after, as rows of a table."""
    settings, rows = history.settings, history.rows
    result = {
        "task": f"{history.task['name']} (fingerprint `{history.task['fingerprint'][:12]}`)",
        "method": history.method["name"],
        "continued from": f"an adapter with the hash `{history.method['start'][:12]}`"
        if "start" in history.method
        else "",
        "steps, examples a step": f"{len(rows) - 1:,}, {settings['batch_size']}",
        "learning rate": f"{settings['lr']:g}, {settings['schedule']}",
        "seed": str(settings["seed"]),
    }
    for part, label in (("validation", "validation loss"), ("off_domain", "off-domain loss")):
        losses = [row[f"{part}_loss"] for row in rows if row[f"{part}_loss"] is not None]
        if losses:
            result[f"{label}, before and after"] = f"{losses[0]:.3f}, {losses[-1]:.3f}"
    return {name: text for name, text in result.items() if text}


def _table(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
