"""Markdown for the pages that are written here."""

import re
from collections.abc import Iterable, Sequence


def escaped(text: str) -> str:
    """The text with every character escaped that Markdown would take for markup."""
    return re.sub(r"([\\`*_{}\[\]<>$|#~])", r"\\\1", text)


def toctree(names: Sequence[str], *options: str) -> str:
    return "\n".join(["```{toctree}", ":hidden:", ":maxdepth: 1", *options, "", *names, "```"])


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], sortable: bool = False) -> str:
    """A table of cells in Markdown; sort.js lets readers sort one by its columns."""
    lines = [columns, ["---"] * len(columns), *rows]
    text = "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
    return f":::{{table}}\n:class: sortable\n\n{text}\n:::" if sortable else text
