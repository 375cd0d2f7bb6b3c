"""The lessons: which there are, and a learner's copy, which is never overwritten and keeps its progress.

``make test`` runs every cell of them.
"""

import os
import re
import subprocess
import sys

import nbformat
import pytest

from lora_lab.course import hint
from tests.acceptance import ROOT

LESSONS = {
    "00_first_look": "What does an adapter do?",
    "01_low_rank": "What is a low-rank matrix, and what does it cost to keep?",
    "02_why_fine_tune": "Why fine-tune a pre-trained model instead of training from scratch?",
    "03_lora_from_scratch": "What is LoRA, line by line?",
    "03b_files_and_rounding": "What is in an adapter's file, and what does merging cost?",
    "04_memory": "Does LoRA save memory, and which memory?",
    "05_speed": "Is LoRA faster than full fine-tuning?",
    "06_which_rank": "Which rank do I need?",
    "07_overfitting": "Does LoRA overfit less?",
    "08_forgetting": "Does LoRA forget less?",
    "09_many_tasks": "Can one base model learn many tasks?",
    "09b_did_it_learn": "Did my model learn the task?",
    "10_variants": "Is DoRA, PiSSA, rsLoRA or LoRA+ better than LoRA?",
    "11_what_training_wrote": "What did training write into the weights?",
    "12_which_rate": "Which learning rate?",
    "13_as_good_as_full": "Is LoRA as good as full fine-tuning?",
}
each_lesson = pytest.mark.parametrize("name", LESSONS)


def read(path):
    return nbformat.read(path, as_version=4)


def lesson(name):
    return read(ROOT / "notebooks" / f"{name}.ipynb")


def test_these_lessons_exist_and_answer_the_readmes_questions():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == list(LESSONS)
    rows = re.findall(r"^\| \[(\w+)\]\(notebooks/\w+\.ipynb\) \| (.+?) \|", (ROOT / "README.md").read_text(), re.M)
    assert dict(rows) == LESSONS


@pytest.fixture(scope="module")
def copies(main, tmp_path_factory):
    """Return the folders of a learner's copy and of the solved one."""
    folder = tmp_path_factory.mktemp("copies")
    assert main(["course", str(folder / "mine")]) == main(["course", str(folder / "solved"), "--solved"]) == 0
    return folder / "mine", folder / "solved"


@each_lesson
def test_the_learners_copy_has_holes_for_solutions_and_no_outputs(copies, name):
    original, opened = lesson(name), read(copies[0] / f"{name}.ipynb")
    assert not any(cell.get("outputs") for cell in opened.cells)
    original.cells = [cell for cell in original.cells if "test" not in cell.metadata.get("tags", [])]
    for before, after in zip(original.cells, opened.cells, strict=True):
        if "### BEGIN SOLUTION" in before.source:
            assert "BEGIN SOLUTION" not in after.source
            assert "NotImplementedError" in after.source or "____" in after.source
        elif before.cell_type == "code":
            assert after.source == before.source
    asked = [re.findall(r'\bcheck\("(\w+)"', cell.source) for cell in original.cells]
    assert any(asked)
    assert asked == [re.findall(r'\bcheck\("(\w+)"', cell.source) for cell in opened.cells]
    assert (copies[1] / f"{name}.ipynb").read_bytes() == (ROOT / "notebooks" / f"{name}.ipynb").read_bytes()


def test_what_a_learner_changed_is_never_overwritten(main, lora_lab, tmp_path):
    lora_lab("course", tmp_path, "--only", "00", "01")
    mine = tmp_path / "01_low_rank.ipynb"
    notebook = read(mine)
    notebook.cells[0].source += "\nMine."
    nbformat.write(notebook, mine)
    work = mine.read_bytes()
    lora_lab("course", tmp_path)
    assert mine.read_bytes() == work
    assert (tmp_path / "12_which_rate.ipynb").is_file()
    assert main(["course", str(tmp_path), "--solved"]) == 1  # solutions are never put over a learner's copy
    assert mine.read_bytes() == work


def test_a_file_of_the_class_is_copied_beside_the_lessons_once(lora_lab, sums, tmp_path):
    lora_lab("course", tmp_path, "--only", "01", "--add", sums)
    (tmp_path / sums.name).write_text("mine")
    lora_lab("course", tmp_path, "--only", "01", "--add", sums)
    assert (tmp_path / sums.name).read_text() == "mine"


def in_a_new_kernel(code, folder):
    """Return what Python prints that runs a learner's code in a folder."""
    call = [sys.executable, "-c", f"from lora_lab.course import check, progress\n{code}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_progress_is_kept_from_kernel_to_kernel(lora_lab, tmp_path):
    lora_lab("course", tmp_path, "--only", "01")
    checks = "check('gradient', lambda delta, z: delta.T @ z)\ncheck('best_rank', lambda M, r: M)"
    printed = in_a_new_kernel(checks, tmp_path)
    assert "Correct." in printed
    assert "Not yet." in printed
    lora_lab("course", tmp_path, "--only", "01")
    damage = "open('progress.json', 'w').write('{')"
    shown, damaged = in_a_new_kernel(f"progress('01')\n{damage}\nprogress('01')", tmp_path).split("Damaged.")
    assert "1 of 4 exercises done" in shown
    assert re.search(r"gradient +✓ done", shown)
    assert re.search(r"best_rank +✗ tried", shown)
    assert "0 of 4 exercises done" in damaged
    assert list(tmp_path.glob("progress-damaged-*.json"))


def test_hints_come_one_at_a_time(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        hint("phi")
        assert f"Hint {number} of 3." in capsys.readouterr().out
    hint("phi")
    assert "That was the last hint." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
