"""The commit of the code that computes, and the name of the machine on which it does."""

import os
import re
import shutil
import subprocess
from unittest.mock import patch

import pytest
import torch

from lora_lab.system import provenance
from lora_lab.system.provenance import machine_info
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
CPU = torch.device("cpu")


def test_this_machines_cpu_has_a_name_whatever_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        name = provenance.device_name(CPU)
        torch.set_num_threads(2)
        assert provenance.device_name(CPU) == name
    finally:
        torch.set_num_threads(threads)
    assert name.endswith(f", {os.cpu_count()} cores")
    assert machine_info(CPU)["cpu"].startswith(provenance.device_name(CPU).rpartition(", ")[0])


def test_the_lessons_of_the_wheel_come_first(tmp_path, monkeypatch):
    assert provenance.shipped_folder("notebooks") == ROOT / "notebooks"
    package = tmp_path / "lora_lab"
    (package / "notebooks").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "system" / "provenance.py"))
    assert provenance.shipped_folder("notebooks") == package / "notebooks"


def git(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def commit(folder):
    """Return the commit of a package whose checkout is this folder."""
    with patch.object(provenance, "checkout", lambda: folder):
        return provenance.commit()


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one commit of two files, one of them a record."""
    folder = tmp_path / "checkout"
    (folder / "records").mkdir(parents=True)
    (folder / "code.py").write_text("1\n")
    (folder / "records" / "gpu-memory.json").write_text("{}\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_a_clean_checkout_gives_its_commit_and_a_changed_one_says_so(checkout):
    first = commit(checkout)
    assert first == git(checkout, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", first)
    (checkout / "notes.txt").write_text("neither untracked files nor records are changes of the code\n")
    (checkout / "records" / "gpu-memory.json").write_text('{"measured": "again"}\n')
    assert git(checkout, "status", "--porcelain") != ""
    assert commit(checkout) == first
    (checkout / "code.py").unlink()
    assert commit(checkout) == f"{first}+changes"
    (checkout / "code.py").write_text("2\n")
    assert commit(checkout) == f"{first}+changes"
    git(checkout, "add", ".")
    assert commit(checkout) == f"{first}+changes"
    git(checkout, "commit", "--quiet", "--all", "--message", "second")
    assert commit(checkout) == git(checkout, "rev-parse", "HEAD") != first


def test_where_there_is_no_commit_none_is_named(checkout, tmp_path, monkeypatch):
    assert commit(tmp_path) == "unknown"
    assert commit(tmp_path / "none") == "unknown"
    (checkout / "venv" / "site-packages").mkdir(parents=True)
    assert commit(checkout / "venv" / "site-packages") == "unknown"  # the commit of other code
    git(tmp_path, "init", "--quiet", "empty")
    assert commit(tmp_path / "empty") == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert commit(checkout) == "unknown"
