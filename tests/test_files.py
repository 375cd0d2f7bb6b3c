"""Files and folders that appear whole or not at all: after errors, after SIGKILL, and with the usual permissions."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from lora_lab.files import atomic_file, atomic_folder, read_json, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run_until_killed(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def umask():
    """Sets the process's mask, and puts the old one back."""
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


def test_new_content_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "deep" / "down" / "a.txt"
    for content in ("old", "new"):
        with atomic_file(path) as temporary:
            assert temporary != path
            assert temporary.parent == path.parent  # so that the renaming stays within one file system
            assert temporary.suffix == path.suffix
            temporary.write_text(content)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == content
        assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with atomic_file(path) as temporary:
            temporary.write_text("half of the new")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_error_leaves_no_file_where_there_was_none(tmp_path):
    def write():
        with atomic_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write()
    assert names(tmp_path) == []


def test_a_kill_in_the_middle_of_writing_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    run_until_killed(
        """
import os, signal, sys
from lora_lab.files import atomic_file
with atomic_file(sys.argv[1]) as temporary, open(temporary, "wb") as file:
    file.write(b"new" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
""",
        path,
    )
    assert path.read_bytes() == b"old"
    with atomic_file(path) as temporary:  # what the kill left beside it is in nobody's way
        temporary.write_bytes(b"newer")
    assert path.read_bytes() == b"newer"


def test_a_kill_in_the_middle_of_a_folder_leaves_no_folder(tmp_path):
    path = tmp_path / "entry"
    run_until_killed(
        """
import os, signal, sys
from lora_lab.files import atomic_folder
with atomic_folder(sys.argv[1]) as temporary:
    (temporary / "one").write_text("1")
    os.kill(os.getpid(), signal.SIGKILL)
""",
        path,
    )
    assert not path.exists()
    with atomic_folder(path) as temporary:
        (temporary / "two").write_text("2")
    assert names(path) == ["two"]


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_follow_the_umask(tmp_path, umask, mask, file_mode, folder_mode):
    umask(mask)
    with atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    with atomic_folder(tmp_path / "entry") as temporary:
        pass
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == file_mode
    assert stat.S_IMODE((tmp_path / "entry").stat().st_mode) == folder_mode
    assert umask(mask) == mask  # nothing changed it on the way


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "deep" / "entry"
    with atomic_folder(path) as temporary:
        (temporary / "one").write_text("1")
        assert not path.exists()
    assert names(path) == ["one"]
    assert names(path.parent) == ["entry"]


def test_an_error_leaves_no_folder_and_nothing_beside_it(tmp_path):
    def write():
        with atomic_folder(tmp_path / "entry") as temporary:
            (temporary / "one").write_text("1")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write()
    assert names(tmp_path) == []


def test_a_folder_that_somebody_else_made_meanwhile_is_kept(tmp_path):
    path = tmp_path / "entry"
    with atomic_folder(path) as temporary:
        (temporary / "mine").write_text("2")
        path.mkdir()
        (path / "theirs").write_text("1")
    assert names(path) == ["theirs"]
    assert names(tmp_path) == ["entry"]


def test_a_file_in_the_folders_place_is_an_error_and_is_kept(tmp_path):
    path = tmp_path / "entry"
    path.write_text("a file")
    with pytest.raises(OSError, match="entry"), atomic_folder(path):
        pass
    assert path.read_text() == "a file"
    assert names(tmp_path) == ["entry"]


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"text": "Grüße, 世界 😀"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert read_json(tmp_path / "a.json") != {**value, "b": []}
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert text.index('"a"') < text.index('"b"')


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (None, FileNotFoundError, "lacks the file a.json"),
        (b'{"half": ', ValueError, "a.json is not JSON.*damaged.*make or copy it anew"),
        (b"\xff\xfe\x00", ValueError, "a.json is not JSON.*damaged.*make or copy it anew"),
        (b"", ValueError, "a.json is not JSON.*damaged.*make or copy it anew"),
    ],
    ids=["missing", "cut short", "not text", "empty"],
)
def test_unreadable_json_says_what_to_do(tmp_path, content, error, says):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(error, match=says):
        read_json(tmp_path / "a.json")
