"""Which build of torch is installed where: what would be run, without running it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from lora_lab.system import torch_build


@pytest.fixture
def machine(monkeypatch):
    """A Linux machine without a GPU, torch or settings of pip; the commands run on it, and what may be changed."""
    state = SimpleNamespace(commands=[], config="global.timeout='60'\n", fails=False, terminal=False, answer="")

    def run(command, **_):
        if command[-2:] == ["config", "list"]:
            return SimpleNamespace(stdout=state.config, returncode=0)
        state.commands.append(command)
        return SimpleNamespace(returncode=int(state.fails))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch_build.platform, "system", lambda: "Linux")
    monkeypatch.setattr(torch_build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch_build.shutil, "which", lambda _: None)
    monkeypatch.setattr(torch_build.Path, "exists", lambda _: False)
    monkeypatch.setattr(torch_build.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: state.terminal))
    monkeypatch.setattr("builtins.input", lambda _: state.answer)
    return state


def test_without_a_gpu_the_cpu_build_is_installed(machine):
    torch_build.main()
    first, second = machine.commands
    assert first[-2:] == ["--quiet", "uv"]
    assert second[1:4] == ["-m", "uv", "pip"]
    assert second[second.index("--torch-backend") + 1] == "cpu"
    assert second[-1] == "torch"
    assert second[second.index("--python") + 1] == sys.executable


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("platform.system", lambda: "Darwin"),
        ("platform.machine", lambda: "aarch64"),
        ("shutil.which", lambda name: f"/usr/bin/{name}"),
        ("Path.exists", lambda _: True),
        ("importlib.util.find_spec", lambda _: object()),
    ],
)
def test_pip_is_left_alone_where_its_build_is_right_or_torch_is_there(machine, monkeypatch, where, value):
    monkeypatch.setattr(f"lora_lab.system.torch_build.{where}", value)
    torch_build.main()
    assert machine.commands == []


@pytest.mark.parametrize("line", ["global.index-url='x'", ":env:.find-links='y'", "install.constraint='z'"])
def test_pip_decides_where_it_was_told_where_to_find_packages(machine, line):
    machine.config += line + "\n"
    torch_build.main()
    assert machine.commands == []


def test_if_the_build_cannot_be_reached_it_asks_on_a_terminal_alone(machine):
    machine.fails = True
    torch_build.main()  # nobody can answer: pip goes on
    assert len(machine.commands) == 1
    machine.terminal = True
    with pytest.raises(SystemExit, match="Without a GPU"):
        torch_build.main()
    machine.answer = "y"
    torch_build.main()
