"""The slides as a teacher shows them: what is stored, nothing from elsewhere, no solution, and nothing cut off.

Runs where the extra ``docs`` is installed, and in a browser where playwright and Chromium are too, which
LORA_LAB_BROWSER = "required" demands. Screenshots are left in the folder that LORA_LAB_SCREENSHOTS names.
"""

import base64
import os
import re
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

from lora_lab.course import copies
from tests import lab
from tests.helpers import ROOT, solutions, words

REQUIRED = os.environ.get("LORA_LAB_BROWSER") == "required"
if not REQUIRED and not all(map(find_spec, ("markdown_it", "mdit_py_plugins", "docutils", "sphinx"))):
    pytest.skip("the extra docs is not installed", allow_module_level=True)

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
missing = [name for name, there in (("playwright", sync_playwright), ("Chromium", lab.CHROMIUM)) if not there]
in_a_browser = pytest.mark.skipif(bool(missing) and not REQUIRED, reason=f"needs {' and '.join(missing)}")

sys.path.insert(0, str(ROOT / "docs" / "site"))
import slides  # noqa: E402

LESSONS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
LESSONS = {name: notebook for name, notebook in LESSONS.items() if any(map(slides.tagged, notebook.cells))}
FIRST_FIVE = ["00_first_look", "01_low_rank", "02_why_fine_tune", "03_lora_from_scratch", "04_memory"]
WIDTH, HEIGHT = 1280, 720
# What reaches beyond the space for it on a slide, the heights of its pictures, and that of its text.
LOOK = """slide => {
  const space = slide.querySelector("div"), {left, right, top, bottom} = space.getBoundingClientRect();
  const outside = [...space.querySelectorAll(":not(math *)")].filter(each => {
    const box = each.getBoundingClientRect();
    return box.left < left - 1 || box.right > right + 1 || box.top < top - 1 || box.bottom > bottom + 1;
  });
  return {
    outside: outside.map(each => each.outerHTML.slice(0, 80)),
    pictures: [...space.querySelectorAll("img")].map(each => each.getBoundingClientRect().height),
    text: parseFloat(getComputedStyle(space).fontSize),
  };
}"""

each_deck = pytest.mark.parametrize("name", LESSONS)


class Deck(HTMLParser):
    """The text of each slide, its pictures, and all that a page would load."""

    def __init__(self, html):
        super().__init__()
        self.slides, self.pictures, self.loaded = [], [], re.findall(r"(?:url\(|@import)\s*(\S+)", html)
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "section":
            self.slides.append("")
        if tag == "img":
            self.pictures.append((attributes["src"], attributes["alt"]))
        elif attributes.get("src") or attributes.get("href"):
            self.loaded.append(self.get_starttag_text())

    def handle_data(self, text):
        if self.slides and self.lasttag != "script":
            self.slides[-1] = words(f"{self.slides[-1]} {text}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    slides.main(folder)
    return folder


@pytest.fixture(scope="module")
def decks(folder):
    return {path.stem: Deck(path.read_text(encoding="utf-8")) for path in folder.iterdir()}


def test_the_first_five_lessons_have_slides(decks):
    assert set(FIRST_FIVE) <= set(LESSONS)
    assert set(decks) == set(LESSONS)


@each_deck
def test_a_deck_has_eight_to_fourteen_slides_one_for_each_tag(decks, name):
    texts, cells = decks[name].slides, LESSONS[name].cells
    lines = [line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    untagged = [line for line in lines if line.startswith(slides.ALWAYS)]
    assert 8 <= len(texts) <= 14
    assert len(texts) == len(untagged) + sum(map(slides.tagged, cells))


@each_deck
def test_every_picture_is_a_stored_figure_with_its_description(decks, name):
    outputs = [output for cell in LESSONS[name].cells if slides.tagged(cell) for output in cell.get("outputs", [])]
    stored = [
        (base64.b64decode(output.data["image/png"]), output.metadata["image/png"]["alt"])
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    prefix = "data:image/png;base64,"
    shown = [(base64.b64decode(src.removeprefix(prefix)), alt) for src, alt in decks[name].pictures]
    assert shown == stored
    assert shown
    assert all(alt for _, alt in shown)
    assert decks[name].loaded == []  # nothing else


@each_deck
def test_no_slide_has_a_line_of_a_solution_and_each_deck_has_an_exercise(decks, name):
    text = " ".join(decks[name].slides)
    lines = [line for exercise in solutions(LESSONS[name]) for line in exercise]
    assert lines
    assert [line for line in lines if line in text] == []
    assert not any(marker in text for marker in (copies.BEGIN, copies.END, copies.STUB))
    assert "check(" in text


@each_deck
def test_a_question_is_answered_on_a_later_slide(decks, name):
    texts = decks[name].slides
    asked = [
        (i, re.match(r"[^?]*[?]", text.split("Predict. ")[1])[0]) for i, text in enumerate(texts) if "Predict. " in text
    ]
    assert asked
    for i, question in asked:
        (answered,) = [j for j, text in enumerate(texts) if question in text and j != i]
        assert answered > i


def test_another_run_gives_other_slides():
    name, old, new = FIRST_FIVE[1], "Gaussian noise of this shape needs 410.", "Gaussian noise of this shape needs 987."
    rerun = nbformat.reads(nbformat.writes(LESSONS[name]).replace(old, new), as_version=4)
    before = slides.page(LESSONS[name], name)
    assert old in before
    assert slides.page(rerun, name) == before.replace(old, new)


def shown(**data):
    """A cell that has displayed something."""
    data = {f"text/{kind}" if kind != "png" else "image/png": text for kind, text in data.items()}
    output = nbformat.v4.new_output("display_data", data, metadata={"image/png": {"alt": "A figure."}})
    return nbformat.v4.new_code_cell(outputs=[output])


def test_a_figure_comes_with_what_is_concluded_before_the_next_one_or_a_heading():
    figure, table = shown(png=""), shown(html="<table>")
    figure.metadata.tags = table.metadata.tags = ["slide"]
    answer = shown(html="<details><summary>Open.</summary><b>2</b>. Yes.</details>", plain="1 + 1? 2. Yes.")
    sentence, heading = shown(markdown="**So it is.** And more."), nbformat.v4.new_markdown_cell("Text.\n\n## More")
    for following, expected in (
        ([answer, sentence, shown(markdown="**And not.**")], "1 + 1? 2. Yes.So it is."),
        ([shown(html="<table>"), sentence], "So it is."),
        ([answer, shown(png=""), sentence], "1 + 1? 2. Yes."),
        ([heading, answer, sentence], ""),
        ([table, sentence], ""),
    ):
        slide = next(slides.slides(nbformat.v4.new_notebook(cells=[figure, *following])))
        assert re.sub("<[^>]+>|\\n", "", slide) == expected


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=lab.CHROMIUM, args=lab.FLAGS)
        yield browser
        browser.close()


@in_a_browser
@each_deck
def test_nothing_is_cut_off_on_a_screen_and_each_slide_is_a_printed_page(browser, folder, name):
    screenshots = os.environ.get("LORA_LAB_SCREENSHOTS")
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    requests = []
    page.on("request", lambda request: requests.append(request.url[:40]))
    page.set_content((folder / f"{name}.html").read_text(encoding="utf-8"))
    looks = [slide.evaluate(LOOK) for slide in page.locator("section").all()]
    assert [(i, outside) for i, look in enumerate(looks, start=1) if (outside := look["outside"])] == []
    assert all(height > HEIGHT / 3 for look in looks for height in look["pictures"])
    assert min(look["text"] for look in looks) >= 14
    for i, slide in enumerate(page.locator("section").all(), start=1):
        box = slide.bounding_box()
        assert (box["x"], box["y"], box["width"], box["height"]) == (0, 0, WIDTH, HEIGHT)  # the keys have led here
        if screenshots:
            page.screenshot(path=Path(screenshots) / f"slides_{name.partition('_')[0]}_{i:02d}.png")
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    assert page.locator("section").first.bounding_box()["y"] == 0
    printed = page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == len(looks)
    assert [url for url in requests if not url.startswith("data:")] == []
    page.close()


@in_a_browser
def test_what_is_cut_off_would_be_noticed(browser, folder):
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.set_content((folder / f"{FIRST_FIVE[0]}.html").read_text(encoding="utf-8"))
    slide = page.locator("section").first
    assert slide.evaluate(LOOK)["outside"] == []
    slide.locator("p").last.evaluate("paragraph => paragraph.append('word '.repeat(2000))")
    assert slide.evaluate(LOOK)["outside"]
    page.close()
