"""Atomic writes: files that appear whole or not at all.

Everything is first written to a hidden folder ``.lora_lab-new-...`` inside the target folder, and then renamed. A
process holds a lock on its hidden folder as long as it lives, so the next process that writes to the target folder can
remove the hidden folders of killed processes. A run that will save its results in a folder can hold a lock on the
folder itself (:func:`claimed`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from lora_lab.system.wording import short_repr, shortened

try:
    import fcntl
except ImportError:  # on Windows, where hidden folders of killed processes are not removed and no folder is claimed
    fcntl = None


T = TypeVar("T")
_NEW = ".lora_lab-new-"  # begins the name of a hidden folder
_ATTEMPTS = 20  # to claim a folder, with a hundredth of a second between two
_READY = ".lora_lab-ready"  # its name when all its files are written and about to be moved to the target folder
_LONGEST_NAME = 255  # for the usual file systems
_REMOVE = ".remove"  # a file in it with the names of files to remove from the target folder, one per line
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_EXISTS = (errno.ENOTEMPTY, errno.EEXIST)  # errors of renaming a folder to a name that exists


class _NotWritten(OSError):
    """An error whose message already says which path could not be written, and why."""

    sentence = ""

    def __str__(self) -> str:
        return self.sentence


class MixedSavesError(ValueError):
    """The files of a folder are of two different saves."""


class _NoPlace(_NotWritten):
    """The same, for a folder in which nothing can be created."""


class _NoPermission(_NoPlace, PermissionError):
    """The same, because this user may not."""


def as_path(path: Any, name: str) -> Path:
    """The path that an argument of that name gives.

    Raises:
        ValueError: it is neither a text nor a path, is empty, or no system has such a name.
    """
    if isinstance(path, str) and not path:
        raise ValueError(f"{name} is '', but it must be a path; write '.' for the current folder.")
    if not isinstance(path, str | os.PathLike) or not _can_be_named(str(path)):
        raise ValueError(f"{name} is {short_repr(path)}, but it must be a path.")
    if any(len(os.fsencode(part) if os.name == "posix" else part) > _LONGEST_NAME for part in Path(path).parts):
        raise ValueError(
            f"{name} is {short_repr(path)}, but a name in a path has at most {_LONGEST_NAME} bytes; give the path of a "
            "file or folder, not its text."
        )
    return Path(path)


def check_file(path: str | Path, what: str) -> None:
    """Check that a file exists.

    Args:
        path: of the file.
        what: it should be, such as "a table".

    Raises:
        FileNotFoundError: it does not; perhaps ``path`` is the text that should be in the file.
    """
    with suppress(OSError):  # the system refuses to look for a name that is too long
        if Path(path).is_file():
            return
    raise FileNotFoundError(f"There is no file {shortened(str(path))}; give the path of {what}.")


def _can_be_named(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # half a character
        return False


def check_readable(path: str | Path) -> None:
    """Check that this user may read a file, or look for it in its folder; a missing file passes.

    Raises:
        PermissionError: this user may not.
    """
    path = Path(path)
    try:
        if stat.S_ISREG(path.stat().st_mode):
            path.open("rb").close()
    except PermissionError as error:
        raise PermissionError(
            f"{shortened(str(path))} cannot be read ({error.strerror}); change its permissions, or make a copy that "
            "you may read."
        ) from None
    except OSError:  # such as that of a name that is too long
        return


def check_folder(folder: str | Path, what: str) -> None:
    """Check that a folder exists.

    Args:
        folder: its path.
        what: it should be, such as "a saved adapter".

    Raises:
        FileNotFoundError: it does not, or is a file.
        PermissionError: this user may not look for it.
    """
    is_file = False
    with suppress(OSError):  # as for check_file
        if Path(folder).is_dir():
            return
        is_file = Path(folder).is_file()
    check_readable(folder)  # a folder above it may be closed to this user
    named = shortened(str(folder))
    if is_file:
        raise FileNotFoundError(f"{named} is a file, but the path of a folder is expected, {what}.")
    raise FileNotFoundError(f"There is no folder {named}; give the path of {what} (names of a hub are not downloaded).")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without an error, the file there replaces ``path``.

    A crash at any moment leaves either the old file or the new one. If ``path`` is a symbolic link, the file replaces
    the link, and what it leads to stays as it is: a stranger's folder may hold a link to a file of the user's.

    Raises:
        OSError: the file cannot be written, or the path is that of a folder; the old file is unchanged. If the disk is
            full the message is one sentence, whatever error the writing library raised.
    """
    path = Path(path)
    _check_no_folder(path)
    with _full_disk_as_one_sentence(path), _workspace(path.parent) as folder:
        yield folder / path.name
        _flush(folder / path.name)
        (folder / path.name).replace(path)


@contextmanager
def atomic_files(folder: str | Path, remove: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends without an error, its files move to ``folder`` as one transaction.

    All other files in ``folder`` stay. After an error, a signal, a kill or a full disk at any moment, a reader that
    calls :func:`finish_interrupted_save` first finds either all old files or all new ones. The transaction is committed
    by one rename, of the temporary folder; if the moves that follow are interrupted, the next save or load finishes
    them. Only a reader that does not call ``finish_interrupted_save`` (PEFT, transformers) can see a mixture: after a
    kill during the moves, which take less than a millisecond, and before the next save or load by lora_lab.

    Args:
        remove: names of files in ``folder`` to remove in the same transaction.

    Raises:
        OSError: as for :func:`atomic_file`, or ``folder`` has a folder with the name of a new file.
    """
    folder = Path(folder)
    try:
        with _full_disk_as_one_sentence(folder), _workspace(folder) as temporary:
            yield temporary
            if names := list(remove):
                (temporary / _REMOVE).write_text("\n".join(names), encoding="utf-8")
            for file in temporary.iterdir():
                _check_no_folder(folder / file.name)
                _flush(file)
            _commit(temporary, folder)
    finally:
        try:
            finish_interrupted_save(folder)
        except KeyboardInterrupt:  # finish the moves first, because the new files are committed
            finish_interrupted_save(folder)
            raise


def finish_interrupted_save(folder: str | Path) -> None:
    """Finish an interrupted :func:`atomic_files`, if there is one, so that all files in ``folder`` are from one save.

    Raises:
        OSError: a save has to be finished, and ``folder`` cannot be written to.
    """
    folder = Path(folder)
    ready = folder / _READY
    reason = "it reappears"
    for _ in range(100):  # a limit, in case the folder cannot be emptied
        if not _is_own_folder(ready):
            return
        try:
            for file in sorted(ready.iterdir(), key=_in_order):
                if file.name == _REMOVE:
                    names = "" if file.is_symlink() or not file.is_file() else file.read_text(encoding="utf-8")
                    for name in names.replace("\0", "").splitlines():
                        (folder / Path(name).name).unlink(missing_ok=True)  # the last part: nothing outside the folder
                    file.unlink()
                else:
                    file.replace(folder / file.name)
            ready.rmdir()
        except OSError as error:
            reason = error.strerror
            if error.errno not in (errno.ENOENT, *_EXISTS):  # with these, another process is finishing the save too
                break
    raise OSError(
        f"{folder} holds a save that was interrupted, in {_READY}, and it cannot be finished ({reason}); make the "
        "folder writable, or copy it to a writable one."
    )


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``path``, unless another process has made ``path`` by then."""
    path = Path(path)
    with _workspace(path.parent) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON with sorted keys, whole or not at all; indented, or on one line where ``indent`` is None."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: the file does not exist, or is a folder or a device.
        PermissionError: this user may not read it.
        ValueError: the file is not JSON, or ``path`` is no path.
    """
    path = as_path(path, "path")
    check_readable(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise FileNotFoundError(f"{path} is {kind}, but it must be a file of JSON; give the path of one.")
    if not path.is_file():
        folder = "The current folder" if path.parent == Path() else path.parent
        raise FileNotFoundError(f"{folder} lacks the file {shortened(path.name)}; check the path.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError for deeply nested lists
        raise ValueError(f"{path} is not JSON ({error}); it may be damaged, so make or copy it anew.") from None


def read_whole(read: Callable[[Path], T], folder: Path) -> T:
    """``read(folder)``, and once more if it met files of two saves, as while another process saves to the folder.

    Raises:
        MixedSavesError: it met them again.
    """
    try:
        return read(folder)
    except MixedSavesError:
        time.sleep(0.1)  # in which the files of a save are moved to their places
        finish_interrupted_save(folder)
        return read(folder)


def check_writable(folder: str | Path, leave: bool = False) -> None:
    """Check that a folder can be written to, by writing a file and removing it, and the folder if it did not exist.

    For work that takes minutes and writes its results at the end, so that it fails at the beginning instead.

    Args:
        folder: its path.
        leave: whether the folder stays, because other processes may be about to write to it too.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    try:
        with nullcontext() if leave else _made(folder), _workspace(folder) as temporary:
            (temporary / "trial").write_bytes(bytes(4096))
    except OSError as error:
        raise _no_place(folder, error) from None


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Hold a folder for the duration of the block, so that no other process can claim it.

    The folder is made if it does not exist, and removed at the end if nothing is in it. A claim ends with its process,
    however that ends. Where the system or the file system has no locks, as on Windows, every claim succeeds.

    Raises:
        FileExistsError: another process, or another block of this one, holds the folder.
        OSError: the folder cannot be made.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _claim(folder)
    try:
        yield
    finally:
        _remove_empty(made)  # before the lock is given up, since the next holder may hold it from then on
        if lock is not None:
            os.close(lock)


def _claim(folder: Path) -> int | None:
    """Make a folder, and return a handle that holds its lock, as for :func:`_lock`.

    Raises:
        FileExistsError: the lock is held already.
        OSError: the folder cannot be made.
    """
    missing = None
    for _ in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder, wait=False)
            if lock is None or _is_open_at(lock, folder):
                return lock
            os.close(lock)
        except BlockingIOError:  # perhaps by is_claimed, for a moment
            missing = None
        except FileNotFoundError as error:  # its last holder has just removed it
            missing = error
        except OSError as error:
            raise _no_place(folder, error) from None
        time.sleep(0.01)
    if missing is not None:
        raise _no_place(folder, missing)
    raise FileExistsError(
        f"{shortened(str(folder))} is in use by another run, which has not ended; name another folder (--out), or wait "
        "for it."
    )


def _is_open_at(handle: int, path: Path) -> bool:
    """Whether the file or folder of a handle still has this path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def is_claimed(folder: str | Path) -> bool:
    """Whether a folder is held by :func:`claimed`."""
    try:
        lock = _lock(Path(folder), wait=False)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    if lock is not None:
        os.close(lock)
    return False


def check_replaceable(path: str | Path, names: Iterable[str]) -> None:
    """Check that a file which is about to be replaced does not exist yet, or is one that lora_lab wrote.

    Args:
        path: of a ``.json`` or ``.csv`` file.
        names: the keys, or the columns, by which our own file is known.

    Raises:
        ValueError: it is another file.
    """
    path = Path(path)
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""  # a device may never end
        content = json.loads(text) if path.suffix == ".json" else text.partition("\n")[0].split(",")
    except (ValueError, RecursionError, OSError):
        content = None
    if not isinstance(content, dict | list) or any(name not in content for name in names):
        raise ValueError(
            f"{path} was not written by this command, which would replace it; name another folder (--out), or move the "
            "file away."
        )


def rescued(save: Callable[[Path], Any], folder: str | Path) -> Any:
    """Return ``save(folder)``; if ``folder`` cannot be written to, save to a new temporary folder and raise.

    Raises:
        OSError: ``folder`` cannot be written to. The message names the temporary folder, if saving there succeeded.
    """
    try:
        return save(Path(folder))
    except OSError as error:
        fallback = Path(tempfile.mkdtemp(prefix="lora_lab-"))
        try:
            save(fallback)
        except OSError:
            shutil.rmtree(fallback, ignore_errors=True)
            raise error from None
        raise OSError(f"{str(error).rstrip('.')}. The files are in {fallback} instead.") from None


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it, for the duration of the block; of those, the empty ones are removed again."""
    made: list[Path] = []
    try:
        with _no_place_as_one_sentence(folder):
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        _remove_empty(made)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # something else is in it
            folder.rmdir()


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A hidden folder within ``folder`` for the duration of the block; those of dead processes are removed.

    After an error, ``folder`` is removed too if it did not exist before and is empty.
    """
    made: list[Path] = []
    temporary, lock = None, None
    try:
        with _no_place_as_one_sentence(folder):
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"{_NEW}*"):
                with suppress(BlockingIOError, FileNotFoundError):  # its process is alive, or has just removed it
                    if (old := _lock(leftover, wait=False)) is not None:
                        shutil.rmtree(leftover, ignore_errors=True)
                        os.close(old)
            while temporary is None or not temporary.exists():  # another process may remove it before it is locked
                temporary = Path(tempfile.mkdtemp(prefix=_NEW, dir=folder))
                with suppress(FileNotFoundError):
                    lock = _lock(temporary, wait=True)
        yield temporary
        made = []
    finally:
        try:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        finally:  # after a KeyboardInterrupt too, so that the next save can remove what is left
            if lock is not None:
                os.close(lock)
            _remove_empty(made)


def _is_own_folder(path: Path) -> bool:
    """Whether a folder is there, and no link, which could lead to files elsewhere."""
    try:
        return path.is_dir() and not path.is_symlink()
    except OSError:  # the system refuses to look for a name that is too long
        return False


def _check_no_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder, but a file is to be written there; choose another name, or move it away."
        )


def _lock(folder: Path, wait: bool) -> int | None:
    """A handle with which this process holds the folder's lock; None if it cannot be locked.

    Raises:
        BlockingIOError: the lock is held already, and ``wait`` is false.
        FileNotFoundError: there is no such folder.
    """
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if handle is not None:
            os.close(handle)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise
        return None
    return handle


def _flush(file: Path) -> None:
    """Flush a file to the disk, and set the usual permissions, since safetensors lets only the owner read a file."""
    with open(file, "rb+") as written:
        os.fsync(written.fileno())
    file.chmod(0o666 & ~_umask())


def _commit(temporary: Path, folder: Path) -> None:
    while True:
        finish_interrupted_save(folder)  # finish an earlier save
        if (folder / _READY).is_symlink():
            raise FileExistsError(f"{folder / _READY} is a link, which no save makes; remove it.")
        try:
            temporary.rename(folder / _READY)
        except OSError as error:
            if error.errno not in _EXISTS:  # with these, another process has just committed a save
                raise
        else:
            return


def _in_order(file: Path) -> tuple[bool, str]:
    """A sort key that puts tensors last, because their header names the other files of the save.

    The order is fixed here, because the process that finishes an interrupted save is not the one that began it.
    """
    return file.suffix == ".safetensors", file.name


@contextmanager
def _full_disk_as_one_sentence(path: Path) -> Iterator[None]:
    """Convert what Python, safetensors and tokenizers raise if the disk is full to one sentence with the path."""
    try:
        yield
    except Exception as error:
        # Libraries in Rust raise exceptions of various classes, with the system's error code in the text.
        code_in_text = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError):
            written = isinstance(error, _NotWritten) and not isinstance(error, _NoPlace)
            code = error.errno if written or error.errno in _FULL else None
            if re.search(r"\d+ requested and \d+ written", str(error)):  # numpy's
                code = errno.ENOSPC
        else:
            code = int(code_in_text[1]) if code_in_text else None
        if code is None:
            raise
        not_written = _NotWritten(code, os.strerror(code))
        not_written.sentence = (
            f"{path} could not be written ({os.strerror(code)}), and the previous content is unchanged; make room, or "
            "choose another folder."
        )
        raise not_written from None


@contextmanager
def _no_place_as_one_sentence(folder: Path) -> Iterator[None]:
    """Convert the system's error to a sentence, where a folder can neither be made nor written to."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise _no_place(folder, error) from None


def _no_place(folder: Path, error: OSError) -> _NoPlace:
    reason = error.strerror
    with suppress(OSError):  # the system refuses to look for a name that is too long
        reason = "it is a file" if folder.is_file() else reason
    no_place = (_NoPermission if isinstance(error, PermissionError) else _NoPlace)(error.errno, reason)
    no_place.sentence = (
        f"{shortened(str(folder))} cannot be written to ({no_place.strerror}); name another folder, or make "
        f"{'room' if error.errno in _FULL else 'this one writable'}."
    )
    return no_place


def _umask() -> int:
    # The mask can be read only by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
