"""Where a number comes from: commit, machine, device and versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch


def version() -> str:
    """The version of this lora_lab, which may be a checkout that is not installed."""
    return sys.modules["lora_lab"].__version__  # there before any of its files


def machine_info(device: torch.device) -> dict[str, str]:
    """What the machine and its software are, for reports and records."""
    described = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads",
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return described


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this lora_lab, to be asked for when a run begins."""
    return commit_of(checkout())


def device_name(device: torch.device) -> str:
    """What people call a device of this machine: the GPU's name, or the CPU's and how many cores it has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = machine_info(device)["cpu"].partition(" logical cores")[0] + " cores"  # without the threads of this moment
    return cpu if device.type == "cpu" else f"{cpu}, {device.type}"


def name_of(device: torch.device) -> str:
    """A device of this machine as its records' names begin: ``nvidia-h100-80gb-hbm3``."""
    return slug(device_name(device))


def slug(name: str) -> str:
    """A name for files: lower-case letters and digits, hyphens between; trade marks are left out."""
    bare = re.sub(r"\((r|tm|c)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", bare).strip("-")


def commit_of(folder: str | Path) -> str:
    """The git commit of the checkout at ``folder``, with "+changes" if its tracked files differ from it.

    Records themselves do not count as changes: measuring again does not change the code.

    Returns:
        The full commit, or "unknown": no checkout, no commit yet, or no git.
    """
    if not (Path(folder) / ".git").exists():  # a parent folder's repository says nothing of this code
        return "unknown"
    # Set inside git's hooks, these would lead to another repository.
    misleading = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {name: value for name, value in os.environ.items() if name not in misleading}

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)records")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changes else commit


def checkout() -> Path:
    """The checkout, if there is one."""
    return Path(__file__).parents[2]


def driver_version() -> str:
    """The version of NVIDIA's driver, which torch does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        said = []
    return said[0] if said else "unknown"
