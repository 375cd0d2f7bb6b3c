"""The playground's second page: SmolLM2 with a shipped adapter and its dial, in a browser, served from this machine.

llama.cpp runs in the browser as WebAssembly, by the npm package ``@wllama/wllama``, which is installed apart. The page
reads the model's GGUF file and the adapter, exported to GGUF.
"""

from __future__ import annotations

import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lora_lab.adapters import save_gguf, shipped
from lora_lab.models.pretrained import fetch_smollm2
from lora_lab.system.provenance import shipped_folder

PACKAGE = "@wllama/wllama"
INSTALL = f"npm install --prefix somewhere {PACKAGE}@3.13.0"
_FILES = ("index.js", "wasm/wllama.wasm")  # in the package's folder esm


def gather(modules: str | Path, folder: Path) -> None:
    """Put all that the page needs into a folder: 110 MB, of which 98 are the model.

    Args:
        modules: the folder ``node_modules`` that npm has made.

    Raises:
        FileNotFoundError: wllama is not in it.
    """
    esm = Path(modules) / PACKAGE / "esm"
    if not all((esm / name).is_file() for name in _FILES):
        raise FileNotFoundError(f"There is no {PACKAGE} in {modules}: {INSTALL}, then --talk somewhere/node_modules.")
    for source in (shipped_folder("docs/playground") / "talk.html", *(esm / name for name in _FILES)):
        shutil.copy(source, folder / ("index.html" if source.suffix == ".html" else source.name))
    shutil.copy(fetch_smollm2(), folder / "model.gguf")
    save_gguf(shipped("lighthouse-keeper"), folder / "adapter.gguf")


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".wasm": "application/wasm", ".js": "text/javascript"}

    def end_headers(self) -> None:
        # Without these two a browser gives a page no memory that threads share, and one thread answers.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print no line for each request."""


def make_server(folder: Path, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """Return a server of a folder, at a free port."""
    return ThreadingHTTPServer((host, 0), partial(_Handler, directory=str(folder)))
