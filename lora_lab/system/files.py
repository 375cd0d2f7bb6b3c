"""Files that appear whole or not at all: written beside their place, then renamed into it.

Everything is first written to a hidden folder ``.lora_lab-new-...`` inside the target folder. A process holds a lock on
its hidden folder while it lives, so the next process that writes there can remove what killed ones left behind.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none, so nothing is cleared there
    fcntl = None


_NEW = ".lora_lab-new-"
_READY = ".lora_lab-ready"  # a folder of files that are all written, and on their way to their places
_REMOVE = ".remove"  # among them: names of files that go as these come, one a line
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # said of a folder's new name


class _NotWritten(OSError):
    """Says in one sentence which path could not be written, and why."""


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without an error, the file there takes the place of ``path``.

    A crash at any moment leaves either the old file or the new one.

    Raises:
        OSError: it cannot be written. Where the disk is full it says so in one sentence, whatever the library
            that writes raised; the old file is still there.
    """
    path = Path(path)
    with _full_disk_as_one_sentence(path), _workspace(path.parent) as folder:
        yield folder / path.name
        _flush(folder / path.name)
        (folder / path.name).replace(path)


@contextmanager
def atomic_files(folder: str | Path, remove: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends without an error, its files take their places in ``folder``.

    They do so together, and all other files in ``folder`` stay. After an error, a signal, a kill or a full disk at any
    moment, a reader that calls :func:`settle` first finds either all the old files or all the new ones. The commit
    point is one rename, of the temporary folder: from then on the new files count, and if the moves to their places
    are interrupted, the next save or load finishes them. Only a reader that does not call ``settle`` (PEFT,
    transformers) can see a mixture: after a kill during the moves, which take less than a millisecond, and before the
    next save or load by lora_lab.

    Args:
        remove: names of files in ``folder`` that are removed as the new ones come.

    Raises:
        OSError: as :func:`atomic_file`, or a folder is in the place of a file.
    """
    folder = Path(folder)
    try:
        with _full_disk_as_one_sentence(folder), _workspace(folder) as temporary:
            yield temporary
            if names := list(remove):
                (temporary / _REMOVE).write_text("\n".join(names), encoding="utf-8")
            for file in temporary.iterdir():
                if (folder / file.name).is_dir():
                    raise IsADirectoryError(
                        f"{folder / file.name} is a folder, but a file is to be written there; move it away."
                    )
                _flush(file)
            _commit(temporary, folder)
    finally:
        try:
            settle(folder)
        except KeyboardInterrupt:  # the new files count already, so the interruption can wait for the rest of them
            settle(folder)
            raise


def settle(folder: str | Path) -> None:
    """Finish an interrupted :func:`atomic_files`, if there is one, so that all files in ``folder`` are of one save.

    Raises:
        OSError: there is something to finish, and ``folder`` cannot be written to.
    """
    folder = Path(folder)
    ready = folder / _READY
    reason = "it comes back"
    for _ in range(100):  # not for ever, whatever somebody may have put there
        if ready.is_symlink() or not ready.is_dir():  # a link could lead to files that are none of this folder's
            return
        try:
            for file in sorted(ready.iterdir(), key=_in_order):
                if file.name == _REMOVE and file.is_file():
                    for name in file.read_text(encoding="utf-8").splitlines():
                        (folder / Path(name).name).unlink(missing_ok=True)  # its last part: nothing outside the folder
                    file.unlink()
                else:
                    file.replace(folder / file.name)
            ready.rmdir()
        except OSError as error:
            reason = error.strerror
            if error.errno not in (errno.ENOENT, *_TAKEN):  # by these, another process is at it too
                break
    raise OSError(
        f"{folder} holds a save that was interrupted, in {_READY}, and it cannot be finished ({reason}); make the "
        "folder writable, or copy it to where it can be written to."
    )


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path``, unless somebody else has made ``path`` by then."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write readable JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} lacks the file {path.name}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # lists too deep, numbers of thousands of digits
        raise ValueError(f"{path} is not JSON ({error}); it may be damaged, so make or copy it anew.") from None


def check_writable(folder: str | Path) -> None:
    """Write a file into the folder and remove it again, and the folder too if it was not there.

    For work that takes minutes and writes at its end: an unwritable folder should stop it at the beginning.

    Raises:
        OSError: it cannot be done.
    """
    folder = Path(folder)
    missing: list[Path] = []
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        with _workspace(folder) as temporary:
            (temporary / "trial").write_bytes(bytes(4096))
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({error.strerror}); name another folder, or make this one writable."
        ) from None
    finally:
        for each in missing:
            with suppress(OSError):
                each.rmdir()


def rescued(save: Callable[[Path], Any], folder: str | Path) -> Any:
    """Return ``save(folder)``; if that folder cannot be written to, save to a new temporary folder and say where.

    Raises:
        OSError: it cannot be written to ``folder``; the error names the other folder, if it could be written there.
    """
    try:
        return save(Path(folder))
    except OSError as error:
        spare = Path(tempfile.mkdtemp(prefix="lora_lab-"))
        try:
            save(spare)
        except OSError:
            shutil.rmtree(spare, ignore_errors=True)
            raise error from None
        raise OSError(f"{str(error).rstrip('.')}. What was to be kept is in {spare} instead.") from None


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A hidden folder within ``folder`` for the time of the block; those that dead processes have left are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_NEW}*"):
        if (lock := _lock(left, wait=False)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    temporary, lock = None, None
    try:
        while temporary is None or not temporary.exists():  # it may be cleared away before it is locked
            temporary = Path(tempfile.mkdtemp(prefix=_NEW, dir=folder))
            lock = _lock(temporary, wait=True)
        yield temporary
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, wait: bool) -> int | None:
    """A handle by which this process holds the folder's lock as long as it lives; None if it is not to be had."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _flush(file: Path) -> None:
    """To the disk; and with the usual permissions, for safetensors makes files that only their owner may read."""
    with open(file, "rb+") as written:
        os.fsync(written.fileno())
    file.chmod(0o666 & ~_umask())


def _commit(temporary: Path, folder: Path) -> None:
    while True:
        settle(folder)  # of an earlier save
        try:
            temporary.rename(folder / _READY)
        except OSError as error:
            if error.errno not in _TAKEN:  # by these, another process has just committed its own
                raise
        else:
            return


def _in_order(file: Path) -> tuple[bool, str]:
    """Weights last, for they say which config they belong to."""
    return file.suffix == ".safetensors", file.name


@contextmanager
def _full_disk_as_one_sentence(path: Path) -> Iterator[None]:
    """Turn what Python, safetensors and tokenizers raise when the disk is full into one sentence with the path."""
    try:
        yield
    except Exception as error:
        # Libraries in Rust raise errors of their own, or a plain Exception, with the system's number in the text.
        in_text = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError):
            number = error.errno if isinstance(error, _NotWritten) or error.errno in _FULL else None
        else:
            number = int(in_text[1]) if in_text else None
        if number is None:
            raise
        sentence = _NotWritten(
            f"{path} could not be written ({os.strerror(number)}), and what was there before is unchanged; make room, "
            "or choose another place."
        )
        sentence.errno = number
        raise sentence from None


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
