"""Lessons in JupyterLab and a real browser, used as a learner uses them.

Needs playwright (`pip install -e '.[browser]'`) and Chromium. Without them these tests are skipped, unless
LORA_LAB_BROWSER is "required". Screenshots are left in the folder that LORA_LAB_SCREENSHOTS names.
"""

import os
from pathlib import Path

import pytest

from lora_lab import cli
from tests import lab

REQUIRED = os.environ.get("LORA_LAB_BROWSER") == "required"

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
missing = [name for name, there in (("playwright", sync_playwright), ("Chromium", lab.CHROMIUM)) if not there]
pytestmark = pytest.mark.skipif(bool(missing) and not REQUIRED, reason=f"needs {' and '.join(missing)}")


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The learner's version of the lessons."""
    folder = tmp_path_factory.mktemp("course")
    assert cli.main(["course", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("LORA_LAB_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def opened(course, tmp_path_factory):
    """Opens a lesson by its name."""
    with lab.jupyter_lab(course, tmp_path_factory.mktemp("lab")) as (address, token), sync_playwright() as player:
        browser = player.chromium.launch(executable_path=lab.CHROMIUM, args=lab.FLAGS)
        pages = []

        def open_lesson(name):
            page = browser.new_page(viewport={"width": 1280, "height": 1600})
            pages.append(lab.Page(page, address, token, f"{name}.ipynb"))
            return pages[-1]

        yield open_lesson
        browser.close()
        assert [page.errors for page in pages] == [[]] * len(pages)


def wrong_then_right(page, name, wrong, right, diagnosis):
    """Fail an exercise by typing, read what is wrong, take a hint, and pass."""
    cell = page.cell(f'check("{name}"')
    page.type_and_run(cell, wrong)
    assert "Not yet." in page.output(cell)
    assert diagnosis in page.output(cell)
    page.type_and_run(cell, f'hint("{name}")')
    assert "Hint 1 of" in page.output(cell)
    page.type_and_run(cell, right)
    assert "Correct." in page.output(cell)


def test_the_first_look(opened, course, screenshots):
    page = opened("00_first_look")
    page.screenshot(screenshots / "00_opened.png")
    page.run_all(240)
    page.screenshot(screenshots / "00_run.png")
    assert "letter by letter: True" in page.output(page.cell("letter by letter"))
    cell = page.cell("lessons.explore(")
    at_one = page.output(cell)
    page.move_slider(cell, "ArrowLeft", times=4)
    page.wait_for_output(cell, lambda text: text != at_one, seconds=60)
    page.screenshot(screenshots / "00_dial.png", scroll_to=cell)
    asked = page.cell("lessons.predict(")
    asked.get_by_role("button", name="1 MB").click()
    revealed = page.cell("size.reveal(")
    page.run(revealed)
    assert "As you predicted" in page.output(revealed)
    stub = 'def one_line(W, A, B, x, s):\n    return {}\n\ncheck("one_line", one_line)'
    wrong_then_right(
        page,
        "one_line",
        stub.format("W @ x + B @ (A @ x)"),
        stub.format("W @ x + s * (B @ (A @ x))"),
        "The dial does nothing. Multiply the update by s.",
    )
    page.hide_files()
    page.screenshot(screenshots / "00_narrow.png", width=480, height=1000, scroll_to=cell)
    assert (course / "progress.json").is_file()


def run_and_slide(page, number, screenshots):
    """Run a lesson, and move its first slider by one step: the picture changes. Returns the slider's cell."""
    page.run_all(300)
    page.screenshot(screenshots / f"{number}_run.png")
    cell = page.cell("lessons.explore(")
    before = page.picture(cell)
    page.move_slider(cell, "ArrowRight", times=1)
    page.wait_for(lambda: page.picture(cell) != before, seconds=30)
    page.screenshot(screenshots / f"{number}_slider.png", scroll_to=cell)
    return cell


def test_lora_from_scratch(opened, screenshots):
    page = opened("03_lora_from_scratch")
    cell = run_and_slide(page, "03", screenshots)
    line = 'def forward(x, W, A, B, alpha):\n    return {}\n\ncheck("forward", forward)'
    wrong_then_right(
        page,
        "forward",
        line.format("x @ W.T + alpha * (x @ A.T @ B.T)"),
        line.format("x @ W.T + alpha / len(A) * (x @ A.T @ B.T)"),
        "r times too large",
    )
    page.hide_files()
    page.screenshot(screenshots / "03_narrow.png", width=480, height=1000, scroll_to=cell)


def test_low_rank(opened, screenshots):
    page = opened("01_low_rank")
    cell = run_and_slide(page, "01", screenshots)
    page.hide_files()
    page.screenshot(screenshots / "01_narrow.png", width=480, height=1000, scroll_to=cell)
