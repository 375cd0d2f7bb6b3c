"""Lessons and a conversation in JupyterLab and a real browser, used as a learner uses them.

Needs playwright (`pip install -e '.[browser]'`) and Chromium. Without them these tests are skipped, unless
LORA_LAB_BROWSER is "required". Screenshots are left in the folder that LORA_LAB_SCREENSHOTS names.
"""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import lora_lab as ll
from tests import lab
from tests.acceptance.conftest import randomise

REQUIRED = os.environ.get("LORA_LAB_BROWSER") == "required"

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
missing = [name for name, there in (("playwright", sync_playwright), ("Chromium", lab.CHROMIUM)) if not there]
pytestmark = pytest.mark.skipif(bool(missing) and not REQUIRED, reason=f"needs {' and '.join(missing)}")


@pytest.fixture(scope="module")
def course(main, tmp_path_factory):
    """The learner's version of the lessons."""
    folder = tmp_path_factory.mktemp("course")
    assert main(["course", str(folder)]) == 0
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


CHAT = """import time
import lora_lab as ll

model, tokenizer = ll.load_pretrained("talker")
model.model.register_forward_hook(lambda *_: time.sleep(0.1))  # as slow as a larger one
ll.chat(model, tokenizer, {"one": "one", "two": "two"}, max_new_tokens=15)"""


@pytest.fixture(scope="module")
def talker(course, stranger):
    """A notebook with a chat, beside a tiny model and two adapters for it."""
    shutil.copytree(stranger, course / "talker")
    for seed, name in enumerate(("one", "two"), start=1):
        model, _ = ll.load_pretrained(stranger, device="cpu")
        ll.inject(model, ll.LoRAConfig(rank=2))
        ll.save_adapter(randomise(model, seed), course / name)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(CHAT)], metadata=kernel), course / "chat.ipynb")


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
    assert "letter for letter" in page.output(page.cell("letter for letter"))
    cell = page.cell("lessons.explore(")
    at_one = page.output(cell)
    page.move_slider(cell, "ArrowLeft", times=4)
    page.wait_for_output(cell, lambda text: text != at_one, seconds=120)
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


def test_lora_from_scratch(opened, screenshots):
    page = opened("03_lora_from_scratch")
    page.run_all(300)
    page.screenshot(screenshots / "03_run.png")
    cell = page.cell("lessons.explore(")
    before = page.picture(cell)
    page.move_slider(cell, "ArrowRight", times=1)
    page.wait_for(lambda: page.picture(cell) != before, seconds=60)
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


def test_a_conversation(opened, talker, screenshots):
    page = opened("chat")
    page.run_all(120)
    cell = page.cell("ll.chat(")
    field, stop = cell.get_by_role("textbox").last, cell.get_by_role("button", name="Stop")
    menu, send = cell.get_by_role("combobox"), cell.get_by_role("button", name="Send")

    def messages():
        return cell.locator(".widget-html-content").all_inner_texts()

    def ended():
        page.wait_for(stop.is_disabled, seconds=120)
        return messages()[-1]

    field.click()
    page.page.keyboard.type("What is <b>2</b> + 2?")  # without a pause, so that Enter comes before the kernel has it
    page.page.keyboard.press("Enter")
    page.wait_for(lambda: len(messages()) == 2 and messages()[1] != "one", seconds=120)
    first = messages()
    assert first[0] == "you\nWhat is <b>2</b> + 2?"
    assert send.is_disabled() and menu.is_disabled() and not stop.is_disabled()  # noqa: PT018
    page.page.keyboard.type("Written ")
    page.wait_for(lambda: messages()[1] != first[1], seconds=120)
    page.page.keyboard.type("meanwhile")
    answer = ended()
    assert answer.startswith("one\n")
    assert len(answer) > len(first[1])
    assert field.input_value() == "Written meanwhile"

    menu.select_option("two")
    page.move_slider(cell, "ArrowLeft", times=10)
    page.wait_for_output(cell, lambda text: "0.50" in text, seconds=60)
    send.click()
    page.wait_for(lambda: len(messages()) == 4 and not stop.is_disabled(), seconds=120)
    stop.click()
    answer = ended()
    assert answer.startswith("two × 0.5\n")  # noqa: RUF001
    assert answer.endswith("[stopped]")
    assert messages()[2] == "you\nWritten meanwhile"

    field.fill("Is </s> a token?")
    field.press("Enter")
    page.wait_for(lambda: "A text holds '</s>'" in messages()[-1], seconds=120)
    ended()
    assert field.input_value() == "Is </s> a token?"
    page.screenshot(screenshots / "chat.png", height=900)
    window = cell.locator(".widget-html-content").last.bounding_box()
    assert window["y"] + window["height"] <= field.bounding_box()["y"]  # the last message is in sight

    cell.get_by_role("button", name="New conversation").click()
    page.wait_for(lambda: messages() == [], seconds=60)
    menu.select_option("(base model)")
    field.fill("Hello")
    send.click()
    page.wait_for(lambda: len(messages()) == 2, seconds=120)
    assert ended().startswith("(base model)\n")
