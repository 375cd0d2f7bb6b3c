"""Install the build of torch that suits this machine: python lora_lab/system/torch_build.py

On Linux plain pip fetches the CUDA build, 3 GB that a machine without a GPU has no use for. The installer uv knows
where torch keeps its CPU build, and gets that one. Where pip's settings say where to find packages, pip decides.
``make`` runs this before anything else is installed, so it imports the standard library alone.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

PIP = [sys.executable, "-m", "pip"]
SOURCES = {"constraint", "extra-index-url", "find-links", "index-url", "no-index"}  # settings of pip that decide
QUESTION = "The CPU build of torch cannot be reached. Plain pip fetches about 3 GB. Go on? [y/N] "


def wants_cpu_build() -> bool:
    """Return whether plain pip would fetch a CUDA build here that nothing can use."""
    if importlib.util.find_spec("torch") or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        return False
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    return not SOURCES & {line.partition("=")[0].rpartition(".")[2] for line in listed.splitlines()}


def main() -> None:
    """Install torch's CPU build if it is wanted; if that fails, ask before pip fetches the other one.

    Where nobody can answer (the input is no terminal), nothing is asked and pip goes on.
    """
    if not wants_cpu_build():
        return
    commands = [
        [*PIP, "install", "--quiet", "uv"],
        [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend", "cpu", "torch"],
    ]
    if all(subprocess.run(command).returncode == 0 for command in commands):
        return
    if sys.stdin.isatty() and input(QUESTION).strip().lower() not in ("y", "yes"):
        sys.exit("Stopped. Pass the address of torch's CPU build: see docs/install.md, Without a GPU.")


if __name__ == "__main__":
    main()
