"""Files and folders that appear whole or not at all: after errors, after SIGKILL, and with the usual permissions."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_lab.system import files
from lora_lab.system.files import (
    MixedSavesError,
    as_path,
    atomic_file,
    atomic_files,
    atomic_folder,
    check_folder,
    check_readable,
    check_writable,
    claimed,
    finish_interrupted_save,
    is_claimed,
    read_json,
    read_whole,
    rescued,
    write_json,
)
from tests.helpers import as_ordinary_user, let_all_users_in, names


def run_until_killed(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def umask():
    """Sets the process's mask, and puts the old one back."""
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


def test_a_name_that_is_too_long_for_a_file_system_is_one_sentence(tmp_path):
    assert as_path(tmp_path / (255 * "x"), "folder").exists() is False
    with pytest.raises(ValueError, match=r"folder is .*, but a name in a path has at most 255 bytes"):
        as_path(f"{tmp_path}/{256 * 'x'}/y", "folder")
    if os.name == "posix":
        with pytest.raises(ValueError, match="at most 255 bytes"):
            as_path(200 * "\u00e9", "folder")


def test_new_content_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "deep" / "down" / "a.txt"
    for content in ("old", "new"):
        with atomic_file(path) as temporary:
            assert temporary != path
            assert temporary.parent.parent == path.parent  # so that the renaming stays within one file system
            assert temporary.name == path.name
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
    assert names(tmp_path / "outside") == ["file"]
    assert (tmp_path / "outside" / "file").read_text() == "mine"


def test_a_kill_in_the_middle_of_writing_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    run_until_killed(
        """
import os, signal, sys
from lora_lab.system.files import atomic_file
with atomic_file(sys.argv[1]) as temporary, open(temporary, "wb") as file:
    file.write(b"new" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
""",
        path,
    )
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"newer")
    assert path.read_bytes() == b"newer"
    assert names(tmp_path) == ["a.bin"]  # what the kill left beside it is cleared away


def test_a_kill_in_the_middle_of_a_folder_leaves_no_folder(tmp_path):
    path = tmp_path / "entry"
    run_until_killed(
        """
import os, signal, sys
from lora_lab.system.files import atomic_folder
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
    assert names(tmp_path) == ["entry"]  # what the kill left is cleared away


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


# Several files at once


def write_files(folder, content, remove=()):
    with atomic_files(folder, remove) as temporary:
        for name in ("a.txt", "b.txt", "c.txt"):
            (temporary / name).write_text(content)


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def all_of(content, **others):
    return dict.fromkeys(("a.txt", "b.txt", "c.txt"), content) | {f"{name}.txt": text for name, text in others.items()}


@pytest.fixture
def interrupted(tmp_path):
    """Stops a save of "new" over "old" when so many files are at their places."""
    folder = tmp_path / "folder"

    def stop(moves):
        write_files(folder, "old")
        (folder / "keep.txt").write_text("kept")
        (folder / "extra.txt").write_text("extra")
        move, moved = Path.replace, []

        def replace(path, target):
            if len(moved) == moves:
                raise PermissionError(errno.EACCES, "Permission denied")
            moved.append(path)
            return move(path, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            with pytest.raises(OSError, match="cannot be finished"):
                write_files(folder, "new", remove=["extra.txt"])
        return folder

    return stop


def test_several_files_take_their_places_together_and_others_stay(tmp_path):
    folder = tmp_path / "deep" / "folder"
    write_files(folder, "old")
    (folder / "keep.txt").write_text("kept")
    (folder / "extra.txt").write_text("extra")
    with atomic_files(folder, remove=["extra.txt", "none.txt"]) as temporary:
        (temporary / "a.txt").write_text("new")
        assert texts(temporary) == {"a.txt": "new"}
        assert (folder / "a.txt").read_text() == "old"
    assert texts(folder) == {"a.txt": "new", "b.txt": "old", "c.txt": "old", "keep.txt": "kept"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_before_the_end_leaves_all_the_old_files(tmp_path, error):
    write_files(tmp_path, "old")

    def write():
        with atomic_files(tmp_path, remove=["a.txt"]) as temporary:
            (temporary / "b.txt").write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert texts(tmp_path) == all_of("old")


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_save_that_is_stopped_within_its_moves_is_finished_by_the_next_reader(interrupted, moves):
    folder = interrupted(moves)
    found = [path.read_text() for path in sorted(folder.glob("?.txt"))]
    assert found == ["new"] * moves + ["old"] * (3 - moves)
    finish_interrupted_save(folder)
    assert texts(folder) == all_of("new", keep="kept")
    finish_interrupted_save(folder)  # nothing is left to do
    assert texts(folder) == all_of("new", keep="kept")


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_save_that_is_stopped_within_its_moves_is_finished_before_the_next_save(interrupted, moves):
    folder = interrupted(moves)
    with atomic_files(folder) as temporary:
        (temporary / "b.txt").write_text("newer")
    assert texts(folder) == all_of("new", keep="kept") | {"b.txt": "newer"}


def test_ctrl_c_within_the_moves_waits_for_the_rest_of_them(tmp_path, monkeypatch):
    write_files(tmp_path, "old")
    move, calls = Path.replace, []

    def replace(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return move(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, "new")
    assert texts(tmp_path) == all_of("new")


def test_where_a_save_cannot_be_finished_one_sentence_says_so(interrupted, monkeypatch):
    folder = interrupted(1)

    def refuse(path, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    says = r"folder holds a save that was interrupted, in .*, and it cannot be finished \(Permission denied\); make"
    with pytest.raises(OSError, match=says):
        finish_interrupted_save(folder)


def test_two_that_finish_a_save_at_once_are_not_in_each_others_way(interrupted, monkeypatch):
    folder = interrupted(1)
    move, others = Path.replace, []

    def replace(path, target):
        if not others:
            others.append(move(path, target))  # the other was quicker, and so the file is gone
        return move(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    finish_interrupted_save(folder)
    assert others
    assert texts(folder) == all_of("new", keep="kept")


def test_a_save_by_somebody_else_in_between_is_finished_first(tmp_path, monkeypatch):
    write_files(tmp_path, "old")
    rename, others = Path.rename, []

    def late(path, target):
        if not others:
            others.append(target)
            Path(target).mkdir()
            (Path(target) / "b.txt").write_text("theirs")
            (Path(target) / "d.txt").write_text("theirs")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    write_files(tmp_path, "new")
    assert texts(tmp_path) == all_of("new", d="theirs")


def test_a_foreign_folder_cannot_reach_out_of_itself(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for each in (folder, outside, folder / ".lora_lab-ready"):
        each.mkdir()
    (outside / "a.txt").write_text("theirs")
    (folder / ".lora_lab-ready" / ".remove").write_text(f"../outside/a.txt\n{outside}/a.txt\na.txt")
    finish_interrupted_save(folder)
    assert names(folder) == []
    for name in ("inner", ".lora_lab-ready/inner"):
        (folder / name / "full").mkdir(parents=True)
    with pytest.raises(OSError, match=r"interrupted, in \.lora_lab-ready, and it cannot be finished \(Directory not"):
        finish_interrupted_save(folder)  # and does not try for ever
    shutil.rmtree(folder / ".lora_lab-ready")
    (folder / ".lora_lab-ready").symlink_to(outside)
    finish_interrupted_save(folder)
    assert texts(outside) == {"a.txt": "theirs"}


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_changed(tmp_path):
    write_files(tmp_path, "old")
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(IsADirectoryError, match=r"b\.txt is a folder, .* move it away"):
        write_files(tmp_path, "new")
    (tmp_path / "b.txt").rmdir()
    assert texts(tmp_path) == {"a.txt": "old", "c.txt": "old"}


def test_several_files_have_the_usual_permissions(tmp_path, umask):
    umask(0o027)
    with atomic_files(tmp_path) as temporary:
        save_file({"x": np.zeros(3)}, temporary / "x.safetensors")  # which makes it for its owner alone
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o640


def test_weights_move_last(tmp_path, monkeypatch):
    moved, move = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: moved.append(path.name) or move(path, target))
    with atomic_files(tmp_path) as temporary:
        for name in ("b.safetensors", "c.txt", "a.safetensors", "d.txt"):
            (temporary / name).write_text("new")
    assert moved == ["c.txt", "d.txt", "a.safetensors", "b.safetensors"]


def test_what_does_not_reach_the_disk_takes_no_place(tmp_path, monkeypatch):
    write_files(tmp_path, "old")
    synced, sync = [], os.fsync

    def fail_at_the_third(handle):
        synced.append(handle)
        if len(synced) == 3:
            raise full(errno.ENOSPC)
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail_at_the_third)
    with pytest.raises(OSError, match="could not be written"):
        write_files(tmp_path, "new")
    assert texts(tmp_path) == all_of("old")


def test_a_temporary_folder_that_is_cleared_away_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    make, made = tempfile.mkdtemp, []

    def cleared(**options):
        made.append(make(**options))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", cleared)
    write_files(tmp_path, "new")
    assert len(made) == 2
    assert texts(tmp_path) == all_of("new")


def test_what_a_living_process_is_writing_is_left_alone(tmp_path):
    code = """
import sys
from lora_lab.system.files import atomic_files
with atomic_files(sys.argv[1]) as temporary:
    (temporary / "a.txt").write_text("slow")
    print("begun", flush=True)
    input()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as slow:
        assert slow.stdout.readline() == "begun\n"
        write_files(tmp_path, "quick")
        assert len(names(tmp_path)) == 4
        slow.communicate("\n")
    assert slow.returncode == 0
    assert texts(tmp_path) == all_of("quick") | {"a.txt": "slow"}


# A full disk


def full(number):
    """An error as the system raises it in the middle of a write, which names no file."""
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error",
    [
        full(errno.ENOSPC),
        full(errno.EDQUOT),
        Exception(f"No space left on device (os error {errno.ENOSPC})"),
        OSError("8320 requested and 980 written"),
        RuntimeError(f"Error while serializing: I/O error: whatever (os error {errno.EIO})"),
    ],
    ids=["python", "quota", "rust", "numpy", "rust, another error"],
)
@pytest.mark.parametrize("several", [False, True], ids=["one file", "several"])
def test_a_full_disk_is_one_sentence_with_the_path(tmp_path, error, several):
    path = tmp_path / "folder" / "a.txt"
    place = path.parent if several else path
    outer, inner = atomic_files(place) if several else atomic_file(place), atomic_file(path.parent / "inner")
    with pytest.raises(OSError, match="could not be written") as caught, outer, inner:
        raise error
    number = (
        errno.ENOSPC
        if "requested" in str(error)
        else getattr(error, "errno", None) or int(str(error).rpartition(" ")[2].rstrip(")"))
    )
    assert caught.value.errno == number
    assert str(caught.value) == (
        f"{place} could not be written ({os.strerror(number)}), and the previous content is unchanged; make room, or "
        "choose another folder."
    )


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_file(tmp_path / "a.txt"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(RuntimeError, match=r"^stop$"), atomic_file(tmp_path / "a.txt"):
        raise RuntimeError("stop")


def test_files_of_two_saves_are_read_again_because_another_process_may_be_saving(tmp_path):
    reads = []

    def read(folder):
        reads.append(folder)
        if len(reads) < 2:
            raise MixedSavesError("mixed")
        return "whole"

    assert read_whole(read, tmp_path) == "whole"
    assert reads == [tmp_path, tmp_path]

    def mixed(folder):
        raise MixedSavesError("they stay mixed")

    with pytest.raises(ValueError, match="they stay mixed"):
        read_whole(mixed, tmp_path)


# Before and after work that takes long


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "deep" / "down")
    assert names(tmp_path) == []
    (tmp_path / "a.txt").write_text("mine")
    check_writable(tmp_path)
    assert texts(tmp_path) == {"a.txt": "mine"}


def test_a_folder_that_others_write_to_at_the_same_time_stays_there(tmp_path):
    check_writable(tmp_path / "deep" / "down", leave=True)
    assert (tmp_path / "deep" / "down").is_dir()


def test_a_claimed_folder_is_refused_to_others_until_its_block_ends(tmp_path):
    folder = tmp_path / "deep" / "down"
    assert not is_claimed(folder)
    with claimed(folder):
        assert is_claimed(folder)
        with (
            pytest.raises(FileExistsError, match=r"down is in use by another run.*; name another folder"),
            claimed(folder),
        ):
            pytest.fail("claimed twice")
        write_json(folder / "a.json", 1)
        check_writable(folder)
    assert not is_claimed(folder)
    with claimed(folder):
        pass
    assert names(folder) == ["a.json"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_claimed_folder_with_nothing_in_it_is_removed(tmp_path, error):
    with pytest.raises(error) if error else nullcontext(), claimed(tmp_path / "deep" / "down"):
        if error:
            raise error
    assert names(tmp_path) == []
    with claimed(tmp_path):
        pass
    assert tmp_path.is_dir()


def test_the_claim_of_a_killed_process_ends_with_it(tmp_path):
    code = """
import sys
from lora_lab.system.files import claimed
with claimed(sys.argv[1]):
    print("claimed", flush=True)
    input()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        assert is_claimed(tmp_path)
        other.kill()
    with claimed(tmp_path):
        pass


def test_two_processes_that_start_together_do_not_both_hold_a_folder(tmp_path, monkeypatch):
    """The first claims the folder after the second has seen that it does not exist, and before it makes it."""
    folder, mkdir, held = tmp_path / "deep" / "down", Path.mkdir, ExitStack()

    def late(path, *arguments, **options):
        monkeypatch.undo()
        held.enter_context(claimed(folder))
        return mkdir(path, *arguments, **options)

    with held:
        monkeypatch.setattr(Path, "mkdir", late)
        with pytest.raises(FileExistsError, match="is in use by another run"), claimed(folder):
            pytest.fail("claimed twice")
        assert folder.is_dir()
        with pytest.raises(FileExistsError, match="is in use by another run"), claimed(folder):
            pytest.fail("claimed twice")


def test_a_folder_that_its_last_holder_removes_meanwhile_is_claimed_anew(tmp_path, monkeypatch):
    folder, lock = tmp_path / "out", files._lock

    def removed_before(path, wait):
        monkeypatch.undo()
        path.rmdir()
        return lock(path, wait)

    def removed_after(path, wait):
        monkeypatch.undo()
        handle = lock(path, wait)
        path.rmdir()
        return handle

    for removed in (removed_before, removed_after):
        monkeypatch.setattr(files, "_lock", removed)
        with claimed(folder):
            assert is_claimed(folder)
        assert not folder.exists()


def test_a_look_whether_a_folder_is_claimed_does_not_refuse_a_claim(tmp_path):
    handle = files._lock(tmp_path, wait=False)  # as is_claimed does
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (time.sleep(0.03), os.close(handle)))
        with claimed(tmp_path):
            pass


def test_without_locks_every_claim_succeeds(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_lab.system.files.fcntl", None)
    with claimed(tmp_path), claimed(tmp_path):
        assert not is_claimed(tmp_path)


def test_a_folder_that_cannot_be_made_cannot_be_claimed(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="deep cannot be written to"), claimed(tmp_path / "file" / "deep"):
        pytest.fail("claimed")


def test_a_table_is_no_path():
    with pytest.raises(ValueError, match=r"source is .*, but it must be a path"):
        as_path(np.zeros((2, 2)), "source")


def test_an_empty_text_is_no_path():
    with pytest.raises(ValueError, match=r"folder is '', but it must be a path; write '\.' for the current folder"):
        as_path("", "folder")
    assert as_path(".", "folder") == Path()


@pytest.mark.parametrize("name", ["\ud83d", "a\0b"])
def test_what_no_file_can_be_called_is_no_path(name):
    with pytest.raises(ValueError, match=r"folder is .*, but it must be a path"):
        as_path(name, "folder")


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "deep" / "down"):
        says = rf"^{folder} cannot be written to \((Not a directory|it is a file)\); name another folder"
        with pytest.raises(OSError, match=says):
            check_writable(folder)
    assert texts(tmp_path) == {"file": "mine"}

    def refuse(path, content):
        raise full(errno.ENOSPC)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match=r"to \(No space left on device\); name another folder, or make room\.$"):
        check_writable(tmp_path / "deep" / "down")
    assert texts(tmp_path) == {"file": "mine"}


def test_what_cannot_be_saved_in_its_place_is_saved_in_another_that_the_error_names(tmp_path, monkeypatch):
    spares = tmp_path / "spares"
    spares.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spares))
    (tmp_path / "file").write_text("mine")

    def save(folder):
        write_json(folder / "a.json", {"a": 1})
        return folder

    assert rescued(save, tmp_path / "folder") == tmp_path / "folder"
    assert names(spares) == []
    with pytest.raises(OSError, match="file") as caught:
        rescued(save, tmp_path / "file")
    (spare,) = spares.iterdir()
    assert str(caught.value).endswith(f"make this one writable. The files are in {spare} instead.")
    assert read_json(spare / "a.json") == {"a": 1}

    def fail(folder):
        raise OSError(f"{folder} is no good")

    with pytest.raises(OSError, match=rf"^{tmp_path / 'file'} is no good$"):
        rescued(fail, tmp_path / "file")
    assert names(spares) == [spare.name]


@pytest.fixture
def closed(tmp_path_factory):
    """A folder whose files this test's user may not read, and one in which the user may not even look for them."""
    top = tmp_path_factory.mktemp("open")
    let_all_users_in(top)
    for name in ("files", "hidden"):
        (top / name).mkdir()
        (top / name / "a.json").write_text("{}")
    (top / "files" / "a.json").chmod(0)
    (top / "hidden").chmod(0)
    yield top
    (top / "hidden").chmod(0o755)


@pytest.mark.parametrize("name", ["files/a.json", "hidden/a.json", "hidden/missing.json"])
def test_a_file_that_this_user_may_not_read_is_one_sentence(closed, name):
    says = rf"^{closed / name} cannot be read \(Permission denied\); change its permissions, or make a copy"
    with as_ordinary_user():
        for check in (check_readable, read_json):
            with pytest.raises(PermissionError, match=says):
                check(closed / name)
        if name.startswith("hidden"):
            with pytest.raises(PermissionError, match=says):
                check_folder(closed / name, "a saved adapter")
    check_readable(closed / "files")
    check_readable(closed / "missing")


# JSON


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
        (None, FileNotFoundError, "lacks the file a.json; check the path"),
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


def test_what_is_no_file_of_json_is_named_as_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^The current folder lacks the file none\.json; check the path\.$"):
        read_json("none.json")
    for folder in (".", tmp_path):
        with pytest.raises(FileNotFoundError, match=r" is a folder, but it must be a file of JSON; give the path of"):
            read_json(folder)
    if Path("/dev/zero").exists():
        with pytest.raises(FileNotFoundError, match=r"^/dev/zero is a device or a pipe, but it must be a file of"):
            read_json("/dev/zero")


# Places


def test_a_place_where_nothing_can_be_made_is_one_sentence_and_nothing_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for folder, reason in {"file": "it is a file", "file/deep": "Not a directory"}.items():
        for write in (atomic_files, lambda path: atomic_file(path / "a.txt")):
            says = rf"^{tmp_path / folder} cannot be written to \({reason}\); name another folder, .* writable\.$"
            with pytest.raises(OSError, match=says) as caught, write(tmp_path / folder):
                pass
            assert caught.value.__suppress_context__
    with pytest.raises(IsADirectoryError, match=rf"^{tmp_path / 'folder'} is a folder, but a file is to be written"):
        write_json(tmp_path / "folder", 1)
    with pytest.raises(RuntimeError, match=r"^stop$"), atomic_files(tmp_path / "new" / "deep"):
        raise RuntimeError("stop")
    assert names(tmp_path) == ["file", "folder"]


def test_what_another_has_put_where_a_save_is_prepared_is_not_followed(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for each in (folder, outside, folder / ".lora_lab-ready"):
        each.mkdir()
    (folder / "a.txt").write_text("mine")
    (folder / ".lora_lab-ready" / ".remove").write_text("b\0c\n")
    finish_interrupted_save(folder)
    (folder / ".lora_lab-ready").mkdir()
    (outside / "names").write_text("a.txt")
    (folder / ".lora_lab-ready" / ".remove").symlink_to(outside / "names")
    finish_interrupted_save(folder)
    assert texts(folder) == {"a.txt": "mine"}
    (folder / ".lora_lab-ready").symlink_to(outside)
    with pytest.raises(FileExistsError, match=r"\.lora_lab-ready is a link, which no save makes; remove it"):
        write_files(folder, "new")
    assert texts(outside) == {"names": "a.txt"}


def test_a_name_that_is_too_long_is_one_sentence():
    with (
        pytest.raises(OSError, match=r"^x+ ?\.\.\. cannot be written to \(File name too long\)"),
        atomic_files("x" * 400),
    ):
        pass
