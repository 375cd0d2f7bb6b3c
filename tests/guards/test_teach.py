"""What the teacher's pages say of the lessons is what the lessons say of themselves."""

import html
import re

import nbformat

from lora_lab.studies import answers
from tests.helpers import ROOT

LESSONS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
TEACH = (ROOT / "docs" / "teach.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEACHERS = ROOT / "docs" / "teachers"
EXAM, HANDOUT, PLANS = ((TEACHERS / f"{name}.md").read_text(encoding="utf-8") for name in ("exam", "handout", "plans"))


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
    choices = re.findall(r"(?:Begin with\*\*|statistics class:|language processing:) ([\db, ]+)", words(README))
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
    assert 8 <= len(answers) <= 14
    for answer in answers:
        assert re.search(r"\*\*Answer\.\*\*", answer)
        quoted = re.findall(r"^> (.+) \(\[[\w ]+\]\((\S+)\)\)$", answer, re.MULTILINE)
        assert quoted, answer
        for sentence, target in quoted:
            path = (TEACHERS / target).resolve()
            said = texts(LESSONS[path.stem]) if path.suffix == ".ipynb" else words(path.read_text(encoding="utf-8"))
            assert words(sentence) in said, sentence


def test_a_plan_has_90_minutes_of_sections():
    """That each section is there, test_links.py checks."""
    plans = re.split(r"^## ", PLANS, flags=re.MULTILINE)[1:]
    assert len(plans) >= 2
    for plan in plans:
        rows = re.findall(r"^\| (\d+) to (\d+) \| \[(.+)\]\(\S+#(\S+)\) \|", plan, re.MULTILINE)
        assert len(rows) == len(re.findall(r"^\| \d", plan, re.MULTILINE)) > 5
        assert [int(begin) for begin, *_ in rows] + [90] == [0] + [int(end) for _, end, *_ in rows]
        assert [heading.replace(" ", "-") for *_, heading, _ in rows] == [anchor for *_, anchor in rows]


def test_the_plans_say_what_each_option_of_a_prediction_tells_and_which_is_right():
    for lesson in {*re.findall(r"notebooks/(\w+)\.ipynb", PLANS)}:
        outputs = [output for cell in LESSONS[lesson].cells for output in cell.get("outputs", [])]
        page = "\n".join(html.unescape(output.get("data", {}).get("text/html", "")) for output in outputs)
        asked = re.findall(r"<b>Predict\.</b> (.+)<br>○ (.+)</div>", page)
        for (question, options), right in zip(asked, re.findall(r"</summary><b>(.+?)</b>\. ", page), strict=True):
            notes = PLANS.partition(f"\n{question}\n\n")[2].partition("\n\n")[0].splitlines()
            for note, option in zip(notes, options.split(" \xa0○ "), strict=True):
                assert note.startswith(f"- **{option}**: " if option == right else f"- {option}: ")


def test_results_that_teachers_hand_out_are_answers():
    known = {each.answer.answer for each in answers.load().values()}
    said = [words(sentence) for sentence in re.findall(r"\*\*([A-Z][^*]+\.)\*\*", f"{HANDOUT}\n{PLANS}")]
    assert len(said) >= 9
    assert [sentence for sentence in said if sentence not in known] == []
    assert len(HANDOUT.split()) <= 400
