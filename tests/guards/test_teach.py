"""What the teacher's pages say of the lessons is what the lessons say of themselves."""

import re

import nbformat

from tests.helpers import ROOT

LESSONS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
TEACH = (ROOT / "docs" / "teach.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAM = (ROOT / "docs" / "teachers" / "exam.md").read_text(encoding="utf-8")


def words(text):
    return " ".join(text.split())


def source(notebook, kind):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == kind)


def start(notebook):
    """(prerequisites, minutes for a person, minutes for the machine), as the first cell states them."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", words(notebook.cells[0].source))
    before, time = re.search(r"\*\*Before\*\* (.+) \*\*Time\*\* (.+)", text).groups()
    before = re.sub(r"^this lesson,? ", "", before).rstrip(".")
    minutes = re.match(r"about (\d+) minutes for you, about ([\d½¾]+) for the machine", time).groups()
    return before[0].upper() + before[1:], *minutes


def required(notebook):
    """The numbers of the lessons that must come before; not of those that help or are not required."""
    sentences = [each for each in start(notebook)[0].split(". ") if not re.search("helps|not required", each)]
    return set(re.findall(r"\b\d\db?\b", ". ".join(sentences)))


def in_order(numbers):
    """Whether each lesson comes after those that it requires."""
    notebooks = {name.partition("_")[0]: notebook for name, notebook in LESSONS.items()}
    return all(required(notebooks[number]) <= {*numbers[:place]} for place, number in enumerate(numbers))


def test_what_a_lesson_requires_is_read_from_its_beginning():
    assert required(LESSONS["03_lora_from_scratch"]) == {"00"}
    assert required(LESSONS["02_why_fine_tune"]) == set()
    assert required(LESSONS["09_many_tasks"]) == {"03"}
    assert in_order(["00", "03", "06"])
    assert not in_order(["00", "06", "03"])


def test_the_readmes_choices_of_lessons_come_after_what_they_require():
    choices = re.findall(r"(?:afternoon|statistics class|language processing): ([\db, ]+)", words(README))
    assert len(choices) == 3
    for choice in choices:
        assert in_order(re.findall(r"\d\db?", choice)), choice


def test_the_weeks_add_up_and_come_after_what_they_require():
    weeks = re.findall(r"^\| \d \| ([\db, ]+) \| (\d+) \|", TEACH, re.MULTILINE)
    minutes = {name.partition("_")[0]: int(start(notebook)[1]) for name, notebook in LESSONS.items()}
    assert len(weeks) == 4
    for lessons, total in weeks:
        assert sum(minutes[number] for number in lessons.split(", ")) == int(total) <= 180
    assert in_order([number for lessons, _ in weeks for number in lessons.split(", ")])


def texts(notebook):
    """What a lesson says: its text, and what its cells have printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return words("\n".join([source(notebook, "markdown"), *shown]))


def test_the_model_answers_quote_the_lessons():
    """So a lesson that is run anew with other numbers fails here."""
    assert "Training 1.8 % of the parameters takes 69 %" in texts(LESSONS["05_speed"])
    assert "Training 1.8 % of the parameters takes 70 %" not in texts(LESSONS["05_speed"])
    answers = re.findall(r"^## \d+\. .*?(?=^## |\Z)", EXAM, re.MULTILINE | re.DOTALL)
    assert 8 <= len(answers) <= 12
    for answer in answers:
        assert re.search(r"\*\*Answer\.\*\*", answer)
        quoted = re.findall(r"^> (.+) \(\[lesson \d\db?\]\(\.\./\.\./notebooks/(\w+)\.ipynb\)\)$", answer, re.MULTILINE)
        assert quoted, answer
        for sentence, lesson in quoted:
            assert words(sentence) in texts(LESSONS[lesson]), sentence
