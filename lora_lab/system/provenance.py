"""Where a result comes from: commit, machine, device and versions; and what a hash of its data and loss is made of."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_lab.system.distributed import current_processes


def version() -> str:
    """Return the version of this lora_lab, which may be a checkout that is not installed."""
    return sys.modules["lora_lab"].__version__  # the package is loaded before any of its modules


def machine_info(device: torch.device) -> dict[str, str]:
    """Return descriptions of the machine and its software by name, for reports and records."""
    info = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads",
        "device": str(device),
    }
    if (processes := current_processes().world_size) > 1:
        info["processes"] = str(processes)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return info


@functools.cache
def _cpu_name() -> str:
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name of a device of this machine: that of the GPU, or that of the CPU and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = machine_info(device)["cpu"].partition(" logical cores")[0] + " cores"  # without the number of threads
    return cpu if device.type == "cpu" else f"{cpu}, {device.type}"


def slug(name: str) -> str:
    """Return a name for files, such as ``nvidia-h100-80gb-hbm3``: lower case, hyphens, without (R) and (TM)."""
    bare = re.sub(r"\((r|tm|c)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", bare).strip("-")


def commit() -> str:
    """Return the git commit of this lora_lab, with "+changes" if tracked files of the checkout differ from it.

    To be read when a run begins, before files change. Changed records do not count: they do not change the code.

    Returns:
        The full commit, or "unknown" if there is no checkout, no commit or no git.
    """
    folder = checkout()
    if not (folder / ".git").exists():  # the repository of a parent folder is not that of this code
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)records")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changes else commit


def checkout() -> Path:
    """Return the folder that contains the package: the checkout, if it is run from one."""
    return Path(__file__).parents[2]


def shipped_folder(name: str) -> Path:
    """Return a folder that comes with lora_lab, from the installed package or from the checkout."""
    packaged = Path(__file__).parents[1] / Path(name).name  # pyproject.toml copies the checkout's folder there
    return packaged if packaged.is_dir() else checkout() / name


def driver_version() -> str:
    """Return the version of NVIDIA's driver, which torch does not report; "unknown" without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError, IndexError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]  # of the first GPU
    return "unknown"


def describe_value(value: object) -> str:
    """Return a text that describes a loss, or an argument of one, and is the same in every process.

    For a function it is the name; for a partial the function's name and the arguments, with all values of tensors and
    arrays; for any other object its ``repr`` without addresses, which includes the fields of a dataclass but not the
    attributes of a plain object.
    """
    if name := getattr(value, "__name__", None):
        return name
    if isinstance(value, functools.partial):
        return f"partial({describe_value([value.func, *value.args])}, {describe_value(value.keywords)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{key!r}: {describe_value(entry)}' for key, entry in value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe_value, value))}]"
    if isinstance(value, np.ndarray | Tensor):  # the repr of a large one omits values
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bytes_of(torch.as_tensor(value))).hexdigest()}"
    if type(value).__repr__ is object.__repr__:
        return type(value).__qualname__
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values in row-major order, without a copy where that is possible."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
