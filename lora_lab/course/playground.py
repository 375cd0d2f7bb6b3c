"""The playground: LoRA trained live in a browser, as one page that needs nothing else.

Its sources are in docs/playground; scikit-learn's digits are written into the page, as a letter for each pixel.
"""

from __future__ import annotations

import re
from pathlib import Path

from lora_lab.system.provenance import shipped_folder

NAME = "playground.html"
_LETTERS = "0123456789abcdefg"  # of a pixel, from no ink to 16 sixteenths


def build() -> str:
    """Return the page, with its scripts and its style inside."""
    folder = shipped_folder("docs/playground")

    def read(name: str) -> str:
        return _digits() if name == "digits.js" else (folder / name).read_text(encoding="utf-8")

    page = read("index.html")
    page = re.sub(r'<link rel="stylesheet" href="(.+)">', lambda link: f"<style>\n{read(link[1])}</style>", page)
    return re.sub(r'<script src="(.+)"></script>', lambda link: f"<script>\n{read(link[1])}</script>", page)


def is_page(path: Path) -> bool:
    """Return whether a file is such a page, of this version or another."""
    return path.is_file() and b"<title>LoRA playground</title>" in path.read_bytes()


def _digits() -> str:
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16, (1797,)
    pixels = "".join(_LETTERS[int(ink)] for ink in pictures.flat)
    return f'const PIXELS = "{pixels}";\nconst LABELS = "{"".join(map(str, labels))}";\n'
