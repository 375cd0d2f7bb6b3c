"""The lessons in a folder of the learner's, with or without the solutions.

A lesson marks its solutions as nbgrader does. What the learner starts from instead may follow, line by line:

    def one_line(W, A, B, x, s):
        ### BEGIN SOLUTION
        return W @ x + s * (B @ (A @ x))
        ### END SOLUTION
        ### STUB return W @ x + s * ____

Without such lines the solution becomes ``raise NotImplementedError("your code here")``.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from typing_extensions import TypedDict

from lora_lab.course import playground
from lora_lab.course.learner import MANIFEST
from lora_lab.system.files import as_path, atomic_file, atomic_files, atomic_folder, read_json, write_json
from lora_lab.system.provenance import shipped_folder
from lora_lab.system.schema import check
from lora_lab.system.wording import count_noun

CONFIG = "nbgrader_config.py"  # a folder with this file is a course to grade
BEGIN, END, STUB = "### BEGIN SOLUTION", "### END SOLUTION", "### STUB "
SOLUTION = re.compile(
    rf"^(?P<indent> *){BEGIN}\n(?P<lines>.*?)^ *{END}\n(?P<stub>(?: *{STUB}[^\n]*\n)*)", re.DOTALL | re.MULTILINE
)
NOTEBOOK_METADATA, CELL_METADATA = ("kernelspec", "language_info"), ("jupyter", "tags")  # what the learner gets of it
BESIDE = "Newer than the lesson that you have changed, so written beside it"
TEST = "test"  # the tag of a cell that only asserts, which no learner needs
RAISE = 'raise NotImplementedError("your code here")'


class _Manifest(TypedDict):
    solved: bool
    written: dict[str, str]  # the SHA-256 of each file that was written, by its name
    # The SHA-256 of each lesson that was written or offered, with all its links.
    versions: dict[str, str]


def drop_tests(notebook: NotebookNode) -> NotebookNode:
    """Return a lesson without the cells that only assert."""
    result = copy.deepcopy(notebook)
    result.cells = [cell for cell in result.cells if TEST not in cell.metadata.get("tags", [])]
    return result


def student(notebook: NotebookNode) -> NotebookNode:
    """The learner's version of a lesson: solutions are replaced by stubs, no cell has been run, and none only asserts.

    Outputs go, all of them: a prediction is none if its answer is already on the page. So does metadata
    that the learner does not need, such as the state of sliders.

    Raises:
        ValueError: a marker of a solution has no partner, so that the solution would stay.
    """
    result = drop_tests(notebook)
    _reduce(result.metadata, NOTEBOOK_METADATA)
    for number, cell in enumerate(result.cells, start=1):
        _reduce(cell.metadata, CELL_METADATA)
        if cell.cell_type == "code":
            cell.source = SOLUTION.sub(_stub, f"{cell.source}\n").removesuffix("\n")
            if BEGIN in cell.source or END in cell.source:
                raise ValueError(f"Cell {number} needs {BEGIN!r} and {END!r} in pairs, each on a line of its own.")
            cell.outputs, cell.execution_count = [], None
    return result


def _reduce(metadata: NotebookNode, names: Sequence[str]) -> None:
    for name in set(metadata) - set(names):
        del metadata[name]


def _stub(solution: re.Match[str]) -> str:
    """Return what the learner starts from in place of a solution."""
    return solution["stub"].replace(STUB, "") or f"{solution['indent']}{RAISE}\n"


def choose_lessons(only: Sequence[str] = ()) -> list[Path]:
    """The files of the lessons, in order.

    Args:
        only: beginnings of names, such as "03" or "03_lora"; all lessons by default.

    Raises:
        ValueError: no lesson's name begins so.
    """
    lessons = sorted(shipped_folder("notebooks").glob("[0-9]*.ipynb"))
    for beginning in only:
        if not any(lesson.stem.startswith(beginning) for lesson in lessons):
            names = ", ".join(lesson.stem for lesson in lessons)
            raise ValueError(f"There is no lesson {beginning!r}; choose from {names}, or by their numbers.")
    return [lesson for lesson in lessons if not only or lesson.stem.startswith(tuple(only))]


def copy_lessons(folder: str | Path, solved: bool = False, only: Sequence[str] = ()) -> list[str]:
    """Copy lessons into a folder, without ever overwriting a file that was changed since it was written.

    A lesson that was not changed is replaced by a newer version. If it was changed, the newer version is written once
    to a file beside it, ``NAME.new.ipynb``. A link to a lesson that is not in the folder becomes plain text. The page
    of the playground, to which lessons link, is written too. The folder's file :data:`MANIFEST` holds what was written.

    Args:
        folder: is made if it does not exist.
        solved: with the solutions and all outputs.
        only: beginnings of lessons' names, such as "03"; all lessons by default.

    Returns:
        What was done, in lines to print.

    Raises:
        ValueError: the folder is a course to grade, or has the other version, solved or not; a lesson is unknown; or
            the manifest is damaged.
        OSError: the folder cannot be written to.
    """
    folder = as_path(folder, "folder")
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder} is a course to grade (it holds {CONFIG}); name another folder for the lessons.")
    manifest, before = folder / MANIFEST, _Manifest(solved=solved, written={}, versions={})
    if manifest.is_file():
        try:
            before = check(read_json(manifest), _Manifest, str(manifest))
        except ValueError as error:
            raise ValueError(f"{error} Delete it; lessons that you changed stay.") from None
    if before["solved"] != solved:
        which = "without" if solved else "with"
        raise ValueError(f"{folder} has the lessons {which} solutions; name another folder.")
    hashes, versions = before["written"], before["versions"]
    done = []
    lessons = choose_lessons(only)
    there = {lesson.name for lesson in lessons} | {path.name for path in folder.glob("*.ipynb")}
    missing = {lesson.name for lesson in choose_lessons()} - there
    with atomic_files(folder) as temporary:
        for lesson in lessons:
            whole = lesson.read_bytes() if solved else _student_bytes(lesson)
            content = _strip_links(whole, missing)
            digest, version = (hashlib.sha256(each).hexdigest() for each in (content, whole))
            untouched = _digest(folder / lesson.name) in (None, digest, hashes.get(lesson.name))
            if untouched or versions.get(lesson.name) != version:  # else it was offered before
                name = lesson.name if untouched else _free_name(folder, lesson.stem, digest, hashes)
                if _digest(folder / name) != digest:
                    (temporary / name).write_bytes(content)
                    done.append(f"{'Written' if untouched else BESIDE}: {name}")
                hashes[name], versions[lesson.name] = digest, version
        there = _digest(folder / playground.NAME)
        if there in (None, hashes.get(playground.NAME)):
            page = playground.build().encode()
            (temporary / playground.NAME).write_bytes(page)
            hashes[playground.NAME] = hashlib.sha256(page).hexdigest()
        write_json(temporary / MANIFEST, {"solved": solved, "written": hashes, "versions": versions})
    unchanged = len(lessons) - len(done)
    return done + [f"Already there: {count_noun(unchanged, 'lesson')}"] * (unchanged > 0)


def _strip_links(notebook: bytes, missing: Collection[str]) -> bytes:
    """A notebook's file in which links to these files have become plain text."""
    link = re.compile(r"\[([^\[\]]*)\]\((\w+\.ipynb)\)")
    return link.sub(lambda found: found[1] if found[2] in missing else found[0], notebook.decode()).encode()


def check_files(paths: Sequence[str | Path]) -> None:
    """Check that :func:`add_files` can copy these.

    Raises:
        FileNotFoundError: one of them does not exist.
        ValueError: a folder holds a link, which could hand out something that nobody chose.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"There is no {path} to add; give the paths of files or folders.")
        if links := [*filter(Path.is_symlink, path.rglob("*"))]:
            raise ValueError(f"{links[0]} is a link; put a copy of what you hand out in its place, or delete it.")


def add_files(folder: str | Path, paths: Sequence[str | Path]) -> list[tuple[str, bool]]:
    """Copy files and folders of a class, such as its data or a model, to the lessons; what is there already stays.

    Returns:
        Each name, and whether it was added; False if there was something of that name already.

    Raises:
        OSError: one of them does not exist, or the folder cannot be written to.
        ValueError: as for :func:`check_files`.
    """
    check_files(paths)
    names = []
    for path in map(Path, paths):
        target = Path(folder) / path.resolve().name
        if target.exists():
            names.append((target.name, False))
            continue
        if path.is_dir():
            with atomic_folder(target) as temporary:
                shutil.copytree(path, temporary, dirs_exist_ok=True)
        else:
            with atomic_file(target) as temporary:
                shutil.copyfile(path, temporary)
        names.append((target.name, True))
    return names


def _student_bytes(lesson: Path) -> bytes:
    notebook = student(nbformat.read(lesson, as_version=4))
    return (nbformat.writes(notebook).rstrip("\n") + "\n").encode()


def _free_name(folder: Path, stem: str, digest: str, hashes: dict[str, str]) -> str:
    """The first of NAME.new.ipynb, NAME.new2.ipynb, ... that is not there or was not changed."""
    names = (f"{stem}.new{number if number > 1 else ''}.ipynb" for number in itertools.count(1))
    return next(name for name in names if _digest(folder / name) in (None, digest, hashes.get(name)))


def _digest(path: Path) -> str | None:
    """The SHA-256 of a file; None if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
