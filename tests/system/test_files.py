"""Files that appear whole or not at all, folders that one run holds, and repairs by the tensors' header."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lab.system.files import (
    as_path,
    atomic_file,
    atomic_files,
    atomic_folder,
    check_file,
    check_replaceable,
    check_writable,
    finish_save,
    hold_folder,
    read_json,
    save_or_rescue,
    write_json,
)
from tests.helpers import names


def save(folder, text, remove=()):
    """A save of tensors with their config, whose numbers and text tell which it is."""
    with atomic_files(folder, remove) as temporary:
        (temporary / "config.json").write_text(text)
        (temporary / "notes.txt").write_text(text)
        save_file({"x": torch.full((3,), float(len(text)))}, temporary / "a.safetensors", {"mine": text})


WAYS = {
    "file": lambda path: atomic_file(path),
    "files": lambda path: atomic_files(path.parent),
    "folder": lambda path: atomic_folder(path.parent),
}


@pytest.fixture(params=WAYS)
def write(request):
    """A function that writes a text by one of the three ways, and stops halfway with an error if there is one."""

    def write(path, text, error=None):
        with WAYS[request.param](path) as temporary:
            (temporary if request.param == "file" else temporary / path.name).write_text(text)
            assert not path.exists() or path.read_text() != text
            if error:
                raise error

    return write


def test_what_is_written_appears_whole(tmp_path, write):
    path = tmp_path / "deep" / "down" / "a.txt"
    write(path, "new")
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]
    assert names(tmp_path / "deep") == ["down"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_leaves_nothing_of_the_new(tmp_path, write, error):
    with pytest.raises(error):
        write(tmp_path / "deep" / "a.txt", "half", error)
    assert not [path for path in tmp_path.rglob("*") if path != tmp_path / "deep"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_files(tmp_path, error):
    save(tmp_path, "old")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def write():
        with atomic_files(tmp_path, ["notes.txt"]) as temporary:
            (temporary / "config.json").write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_take_their_places_others_stay_and_some_are_removed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "chat_template.jinja").write_text("old")
    save(tmp_path, "new", remove=["chat_template.jinja", "missing"])
    assert names(tmp_path) == ["a.safetensors", "config.json", "mine.txt", "notes.txt"]


def test_what_does_not_reach_the_disk_takes_no_place(tmp_path, monkeypatch):
    save(tmp_path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, "new")
    assert (tmp_path / "config.json").read_text() == "old"
    assert names(tmp_path) == ["a.safetensors", "config.json", "notes.txt"]


@pytest.mark.parametrize("target", ["file", "nothing", "itself"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path, target):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    link = tmp_path / "folder" / "a.txt"
    link.parent.mkdir()
    link.symlink_to(link if target == "itself" else tmp_path / "outside" / target)
    with atomic_file(link) as temporary:
        temporary.write_text("new")
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert (tmp_path / "outside" / "file").read_text() == "mine"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        save(tmp_path, "text")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path):
    code = """
import os, signal, sys
from lora_lab.system.files import atomic_file
with atomic_file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "a.txt"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = (each for each in tmp_path.iterdir() if each != path)
    for age, expected in ((3600, 2), (100_000, 1)):  # it may be of a process that is writing
        os.utime(left, times=(time.time() - age,) * 2)
        write_json(path, "new")
        assert len(names(tmp_path)) == expected


def test_a_folder_that_somebody_else_made_meanwhile_is_kept(tmp_path):
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "mine").write_text("mine")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").write_text("theirs")
    assert names(tmp_path / "a") == ["theirs"]
    assert names(tmp_path) == ["a"]


# Repairs


def test_the_header_carries_the_small_files_and_the_numbers_stay(tmp_path):
    save(tmp_path, "text")
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [4, 4, 4]
    (tmp_path / "config.json").unlink()
    finish_save(tmp_path)
    assert (tmp_path / "config.json").read_text() == "text"


def test_a_file_that_a_save_was_to_replace_is_replaced_and_one_that_somebody_changed_is_not(tmp_path):
    save(tmp_path, "old")
    save(tmp_path, "newer")
    for found, expected in (("old", "newer"), ("edited", "edited"), ("newer", "newer")):
        (tmp_path / "config.json").write_text(found)
        finish_save(tmp_path)
        assert (tmp_path / "config.json").read_text() == expected


def test_a_file_that_a_save_was_to_remove_is_removed_unless_somebody_wrote_another(tmp_path):
    template = tmp_path / "chat_template.jinja"
    for found, stays in (("old", False), ("mine", True)):
        template.write_text("old")
        save(tmp_path, "new", remove=[template.name])
        template.write_text(found)
        finish_save(tmp_path)
        assert template.exists() == stays


def test_a_save_within_a_save_is_one_save(tmp_path):
    save(tmp_path, "old")
    with atomic_files(tmp_path) as temporary:
        save(temporary, "newer")
    (tmp_path / "config.json").write_text("old")
    finish_save(tmp_path)
    assert (tmp_path / "config.json").read_text() == "newer"


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8])
def test_damaged_tensors_repair_nothing(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    finish_save(tmp_path)
    assert names(tmp_path) == ["a.safetensors"]


# One run holds a folder


def test_a_claimed_folder_is_refused_to_others_until_its_block_ends(tmp_path):
    folder = tmp_path / "deep" / "out"
    with hold_folder(folder):
        for _ in range(2):
            with pytest.raises(FileExistsError, match="out is in use"), hold_folder(folder):
                pytest.fail("claimed twice")
        (folder / "result").write_text("mine")
    assert names(folder) == ["result"]
    with hold_folder(folder), hold_folder(tmp_path / "deep" / "another"):
        pass


def test_the_claim_of_a_killed_process_ends_with_it(tmp_path):
    code = """
import sys
from lora_lab.system.files import hold_folder
with hold_folder(sys.argv[1]):
    print("claimed", flush=True)
    input()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(FileExistsError), hold_folder(tmp_path):
            pytest.fail("claimed twice")
        other.kill()
    with hold_folder(tmp_path):
        pass


# Before and after work


def test_a_folder_that_can_be_written_to_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "deep" / "down")
    assert names(tmp_path / "deep" / "down") == []


def test_a_result_that_cannot_be_saved_in_its_place_is_saved_in_another(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="The files are in") as error:
        save_or_rescue(lambda folder: write_json(folder / "a.json", 1), tmp_path / "file" / "deep")
    (spare,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert str(spare) in str(error.value)
    assert read_json(spare / "a.json") == 1


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"b": [1, None, "\u00e9"], "a": {"x": 0.1}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == value


def put(folder, content):
    (folder / "a.json").write_text(content)
    return folder / "a.json"


REFUSED = [
    (lambda folder: as_path("", "path"), ValueError, "''"),
    (lambda folder: as_path("a\0b", "path"), ValueError, "path"),
    (lambda folder: as_path("a\nb", "path"), ValueError, "path"),
    (lambda folder: as_path("x" * 300, "path"), ValueError, "path is 'xxx"),
    (lambda folder: check_file(folder / "none", "a table"), FileNotFoundError, "none"),
    (lambda folder: read_json(folder / "none.json"), FileNotFoundError, "none.json"),
    (lambda folder: read_json(folder), FileNotFoundError, "lacks"),
    (lambda folder: read_json("/dev/zero"), FileNotFoundError, "zero"),
    (lambda folder: read_json(put(folder, "{")), ValueError, "a.json"),
    (lambda folder: read_json(put(folder, "[" * 100_000)), ValueError, "a.json"),
    (lambda folder: check_replaceable(put(folder, "[1]"), ["rows"]), ValueError, "a.json"),
    (lambda folder: check_replaceable(put(folder, "{"), ["rows"]), ValueError, "a.json"),
    (lambda folder: check_writable(put(folder, "")), OSError, "a.json cannot be written to"),
    (lambda folder: write_json(put(folder, "") / "b.json", 1), OSError, "a.json cannot be written to"),
    (lambda folder: write_json(folder, 1), OSError, "is a folder"),
    (lambda folder: check_writable("/proc/none"), OSError, "/proc/none"),
    (lambda folder: hold_folder("/proc/none").__enter__(), OSError, "/proc/none"),
]


@pytest.mark.parametrize(("call", "error", "named"), REFUSED)
def test_what_cannot_be_read_or_written_is_named(tmp_path, call, error, named):
    with pytest.raises(error, match=named):
        call(tmp_path)


STRANGERS = ["layers,kinds,depths\n", "layer,kind\n1,depth\n", "my layer,kind,depth\n", "layer kind depth\n", "\xff"]


@pytest.mark.parametrize("text", STRANGERS)
def test_a_table_that_only_resembles_ours_is_not_replaced(tmp_path, text):
    (tmp_path / "layers.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"layers\.csv was not written by this command"):
        check_replaceable(tmp_path / "layers.csv", ["layer", "kind", "depth"])


def test_a_file_of_ours_may_be_replaced(tmp_path):
    check_replaceable(put(tmp_path, json.dumps({"rows": 1})), ["rows"])
    check_replaceable(tmp_path / "none.json", ["rows"])
    (tmp_path / "layers.csv").write_text("layer,shape,kind,depth\n", encoding="utf-8")
    check_replaceable(tmp_path / "layers.csv", ["layer", "kind", "depth"])
