"""Files that appear whole or not at all: a save is written aside, flushed to the disk, and renamed.

Where small files belong to tensors, as an adapter's config does, the tensors are renamed first, and their header
carries the small files. A save that was killed between two renames is finished by the next load (:func:`finish_save`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from lora_lab.system.wording import short_repr, shortened

_NEW = ".lora_lab-new-"  # begins the name of the hidden folder in which a save is written
_DAY = 86_400  # seconds, after which a hidden folder is one that a killed process left
_LOCK = ".lora_lab.lock"
# Small files that say what tensors mean.
_CARRIED = (
    *("adapter_config.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
# Their texts in the header; hashes of those before.
_FILE, _REPLACED = "lora_lab.file.", "lora_lab.replaced."


def as_path(path: str | Path, name: str) -> Path:
    """Return the path that an argument of this name gives.

    Raises:
        ValueError: it is empty, has several lines or a zero, or is longer than a name can be: perhaps it is the text of
            a file.
    """
    if not str(path) or {"\0", "\n"} & set(str(path)) or len(Path(path).name) > 255:
        raise ValueError(f"{name} is {short_repr(path)}, but it must be a path, such as '.', not the text of a file.")
    return Path(path)


def check_file(path: str | Path, what: str) -> None:
    """Check that a file exists.

    Args:
        path: of the file.
        what: it should be, such as "a table".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file can have this path: perhaps it is the text that should be in the file.
    """
    if not as_path(path, "path").is_file():
        raise FileNotFoundError(f"There is no file {shortened(str(path))}; give the path of {what}.")


@contextmanager
def atomic_files(folder: str | Path, remove: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends without an error, its files move to ``folder`` as one save.

    After an error nothing in ``folder`` has changed. A kill between two of the renames leaves new tensors beside old
    small files. So the tensors move first and carry the new small files in their header, from which the next load
    completes the save (:func:`repair`). A link in ``folder`` is replaced, and what it leads to stays.

    Args:
        remove: names of files in ``folder`` that are removed by the same save.

    Raises:
        OSError: the folder cannot be written to, or has a folder with the name of a new file.
    """
    folder, remove = Path(folder), tuple(remove)
    with _make_workspace(folder) as temporary:
        try:
            yield temporary
            files = sorted(temporary.iterdir(), key=lambda file: file.suffix != ".safetensors")  # tensors first
            for file in files:
                if (folder / file.name).is_dir():
                    raise IsADirectoryError(f"{folder / file.name} is a folder, but a file is to be written there.")
                if file.suffix == ".safetensors":
                    _carry_files(file, folder, remove)
                _flush(file)
        except SafetensorError as error:  # as its save_file says that the disk is full
            raise OSError(f"{folder} could not be written ({error}); make room, or name another folder.") from None
        for file in files:
            file.replace(folder / file.name)
        for name in remove:
            (folder / name).unlink(missing_ok=True)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without an error, the file there replaces ``path``.

    A crash at any moment leaves the old file or the new one.
    """
    with atomic_files(Path(path).parent) as temporary:
        yield temporary / Path(path).name


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``path``, unless another process has made ``path`` by then."""
    path = Path(path)
    with _make_workspace(path.parent) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise


def finish_save(folder: str | Path) -> None:
    """Finish a save that was killed between two renames, by the files that the tensors' header carries.

    A file is written anew where it is missing, or is still the one that the save was to replace. One that somebody has
    changed since then is left alone.

    Raises:
        OSError: a file has to be written, and the folder cannot be written to.
    """
    for tensors in Path(folder).glob("*.safetensors"):
        header = _read_header(tensors)
        for name in _CARRIED:
            path, text = Path(folder) / name, header.get(_FILE + name)
            found, replaced = _hash(path), header.get(_REPLACED + name)
            if text is not None and found in ("", replaced) and not (found and path.read_bytes() == text.encode()):
                with atomic_file(path) as temporary:
                    temporary.write_bytes(text.encode())
            elif text is None and found and found == replaced:
                path.unlink()


def _read_header(tensors: Path) -> dict[str, str]:
    """Return the texts in a safetensors file's header; none if it cannot be read, as its reader will say."""
    with suppress(SafetensorError, OSError), safe_open(tensors, framework="numpy") as file:
        return file.metadata() or {}
    return {}


def read_carried_json(tensors: Path, name: str) -> Any:
    """Return the content of a JSON file that a safetensors file's header carries; None if it carries none."""
    with suppress(KeyError, ValueError, RecursionError):
        return json.loads(_read_header(tensors)[_FILE + name])
    return None


def _carry_files(tensors: Path, folder: Path, remove: tuple[str, ...]) -> None:
    """Put the small files beside a safetensors file, and hashes of those in ``folder``, into its header."""
    entries = {}
    for name in _CARRIED:
        small = tensors.parent / name
        if name in remove or small.is_file():
            entries[_REPLACED + name] = _hash(folder / name)
        if small.is_file():
            entries[_FILE + name] = small.read_text(encoding="utf-8")
    if entries:
        from safetensors.torch import load_file, save_file  # which imports torch

        new = tensors.with_suffix(".new")  # the numbers are read from the old file while it is written
        save_file(load_file(tensors), new, _read_header(tensors) | entries)
        new.replace(tensors)


def _hash(path: Path) -> str:
    """Return the SHA-256 of a file; "" if it is missing."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON with sorted keys, whole or not at all; indented, or on one line where ``indent`` is None."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: it does not exist, or is no file.
        ValueError: it is not JSON.
    """
    path = as_path(path, "path")
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} lacks the file {path.name}; check the path.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError for deeply nested lists
        raise ValueError(f"{path} is not JSON ({error}); it may be damaged, so make or copy it anew.") from None


def check_writable(folder: str | Path) -> None:
    """Make a folder, and raise OSError now, and not after minutes of work, if it cannot be written to."""
    with _make_workspace(Path(folder)) as temporary:
        (temporary / "trial").write_bytes(bytes(4096))


@contextmanager
def hold_folder(folder: str | Path) -> Iterator[None]:
    """Hold a folder for the block, so that no other run saves its results there; without any, it is made.

    Raises:
        FileExistsError: another process, or another block of this one, holds the folder.
        OSError: the folder cannot be written to.
    """
    check_writable(folder)
    lock = Path(folder) / _LOCK
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows removes no open file
                    lock.unlink()
    except Timeout:
        in_use = f"{folder} is in use by another run, which has not ended"
        raise FileExistsError(f"{in_use}; name another folder (--out), or wait for it.") from None


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
        found = set(json.loads(text)) if path.suffix == ".json" else set(text.partition("\n")[0].split(","))
    except (ValueError, TypeError, RecursionError, OSError):
        found = set()
    if not found.issuperset(names):
        raise ValueError(f"{path} was not written by this command, which would replace it; name another (--out).")


def save_or_rescue(save: Callable[[Path], Any], folder: str | Path) -> Any:
    """Return ``save(folder)``; if that fails, save to a new temporary folder and raise.

    Raises:
        OSError: ``folder`` cannot be written to. The message names the temporary folder.
    """
    try:
        return save(Path(folder))
    except OSError as error:
        fallback = Path(tempfile.mkdtemp(prefix="lora_lab-"))
        save(fallback)
        raise OSError(f"{str(error).rstrip('.')}. The files are in {fallback} instead.") from None


@contextmanager
def _make_workspace(folder: Path) -> Iterator[Path]:
    """Make a folder, and yield a hidden one within it; remove what a process killed days ago has left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=_NEW, dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise OSError(
            f"{shortened(str(folder))} cannot be written to ({reason}); name another folder, or make this one writable."
        ) from None
    with temporary:
        for leftover in folder.glob(f"{_NEW}*"):
            with suppress(OSError):  # another process may have just removed it
                if time.time() - leftover.stat().st_mtime > _DAY:
                    shutil.rmtree(leftover)
        yield Path(temporary.name)


def _flush(file: Path) -> None:
    """Flush a file to the disk, and set the usual permissions, since safetensors lets only the owner read a file."""
    with file.open("rb+") as written:
        os.fsync(written.fileno())
    mask = os.umask(0o022)  # it can be read only by setting it
    os.umask(mask)
    file.chmod(0o666 & ~mask)
