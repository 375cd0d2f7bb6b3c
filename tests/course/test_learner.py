"""check, hint and progress: what is shown, and what is remembered."""

import json

import pytest
from IPython.core.interactiveshell import InteractiveShell

from lora_lab.course import check, hint, learner, progress
from lora_lab.course.exercise import EXERCISES
from lora_lab.course.learner import MANIFEST, PROGRESS, Box
from tests.helpers import run_python


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path):
    """Nothing is remembered, in a folder that is no learner's copy."""
    monkeypatch.chdir(tmp_path)
    for name in ("_states", "_hints_shown"):
        monkeypatch.setattr(learner, name, {})


RIGHT = EXERCISES["best_rank"].solution
WRONG, SENTENCE = EXERCISES["best_rank"].mistakes[0]


def stub(M, r):
    raise NotImplementedError


def test_a_wrong_answer_gets_its_sentence_and_an_offer_of_hints(capsys):
    assert not check("best_rank", WRONG)
    expected = f'✗ Not yet. {SENTENCE}\nhint("best_rank") gives the first of 3 hints.\n'
    assert capsys.readouterr().out == expected


def test_the_result_is_true_or_false_and_adds_no_line_to_a_cell():
    result = check("best_rank", RIGHT)
    assert (result == True, repr(result), bool(check("best_rank", stub))) == (True, "True", False)  # noqa: E712
    result._ipython_display_()


def test_a_stub_is_open_and_not_tried(capsys):
    assert not check("best_rank", stub)
    assert capsys.readouterr().out.startswith("○ Open. Not started yet.")
    progress("01")
    assert "tried" not in capsys.readouterr().out


def test_an_unknown_name_is_one_sentence(capsys):
    assert not check("best_rnk", RIGHT)
    assert "Did you mean 'best_rank'?" in capsys.readouterr().out
    for name in ("zzz", 7, None, RIGHT):
        assert not check(name, RIGHT)
        assert capsys.readouterr().out.endswith("progress() lists all exercises.\n")
    hint("best_rnk")
    assert "Did you mean" in capsys.readouterr().out


def test_what_was_printed_is_shown_with_a_wrong_answer(capsys):
    def answer(M, r):
        print(2000 * "1")
        return M + 1

    check("best_rank", answer)
    assert f"It printed:\n{1000 * '1'}\nhint" in capsys.readouterr().out


def lines(capsys, lesson="01"):
    progress(lesson)
    summary, _, *rows = capsys.readouterr().out.splitlines()
    return summary, {row.split()[1]: row.split()[3] for row in rows}


def test_progress_lists_what_is_done_tried_and_open(capsys):
    check("best_rank", RIGHT)
    check("terms_for", WRONG)
    capsys.readouterr()
    summary, states = lines(capsys)
    assert states == {"best_rank": "done", "terms_for": "tried", "largest_saving_rank": "open", "gradient": "open"}
    assert summary == "○ 1 of 4 exercises done. The others take about 19 minutes."
    assert not list(learner.Path().iterdir())  # nothing is written outside a learner's copy
    assert len(lines(capsys, "")[1]) == len(EXERCISES)
    check("best_rank", WRONG)  # what is done stays done
    capsys.readouterr()
    assert lines(capsys)[1]["best_rank"] == "done"


def test_a_learners_copy_remembers(capsys, tmp_path, monkeypatch):
    (tmp_path / MANIFEST).write_text("{}", encoding="utf-8")
    check("best_rank", RIGHT)
    check("terms_for", WRONG)
    monkeypatch.setattr(learner, "_states", {})  # another kernel
    check("best_rank", WRONG)
    check("gradient", EXERCISES["gradient"].solution)
    capsys.readouterr()
    states = {"best_rank": "done", "terms_for": "tried", "largest_saving_rank": "open", "gradient": "done"}
    assert lines(capsys)[1] == states


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"gradient": 3}', '{"gradient": "half"}'])
@pytest.mark.parametrize("first", ["check", "progress"])
def test_a_damaged_file_is_moved_aside_and_that_is_said_once(damage, first, capsys, tmp_path):
    (tmp_path / MANIFEST).write_text("{}", encoding="utf-8")
    for number in (1, 2):
        (tmp_path / PROGRESS).write_text(damage, encoding="utf-8")
        said = []
        for _ in range(2):
            if first == "progress":
                progress("01")
            assert check("best_rank", RIGHT)
            said.append(capsys.readouterr().out)
        assert said[0].count("progress.json was damaged and is now progress-damaged-") == 1
        assert "damaged" not in said[1]
        assert json.loads((tmp_path / PROGRESS).read_text(encoding="utf-8")) == {"best_rank": "done"}
        aside = list(tmp_path.glob("progress-damaged-*.json"))
        assert [path.read_text(encoding="utf-8") for path in aside] == number * [damage]
        assert any(path.name in said[0] for path in aside)


def test_a_folder_that_cannot_be_written_to_is_one_sentence(capsys, tmp_path):
    (tmp_path / MANIFEST).write_text("{}", encoding="utf-8")
    (tmp_path / PROGRESS).mkdir()
    assert check("best_rank", RIGHT)
    assert "progress.json could not be written (" in capsys.readouterr().out
    assert lines(capsys)[1]["best_rank"] == "done"


def test_boxes_are_html_with_an_icon_and_a_word_beside_the_colour():
    box = Box("Not yet.", "a < b", "x = 1\ny = 2", 'hint("x")', learner.AMBER)
    page = box._repr_html_()
    assert "<b>✗ Not yet.</b> a &lt; b" in page
    assert repr(box) == '✗ Not yet. a < b\nx = 1\ny = 2\nhint("x")'


def test_in_a_notebook_a_check_is_one_box(monkeypatch):
    """What IPython shows at the end of a cell: a box with both forms, and no line for the result."""
    shown = []
    monkeypatch.setattr(learner, "display", shown.append)
    shell = InteractiveShell.instance()
    try:
        bundles = [shell.display_formatter.format(check("best_rank", RIGHT))]
        progress()
        bundles += [shell.display_formatter.format(each) for each in shown]
    finally:
        InteractiveShell.clear_instance()
    (nothing, _), (box, _), (table, _) = bundles
    assert nothing == {}
    assert box.keys() == table.keys() == {"text/plain", "text/html"}
    assert table["text/html"].count(" open") == len(EXERCISES) - 1


@pytest.mark.slow
def test_the_names_of_a_lesson_are_imported_quickly_and_quietly():
    done = run_python(
        "from lora_lab.course import check, hint, progress; import sys; print('matplotlib' in sys.modules)"
    )
    assert (done.stdout, done.stderr) == ("False\n", "")
