"""What lessons show: with a kernel, on a page without one, and in a terminal."""

import dataclasses
import html
import io

import matplotlib as mpl
import pandas
import pytest
from PIL import Image

mpl.use("Agg")

from lora_lab import lessons
from lora_lab.plots import plt
from lora_lab.studies import answers
from lora_lab.studies.claims.deciding import IN_OUTPUT

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def shown(monkeypatch):
    """The outputs displayed, each as a mapping from MIME type to content."""
    outputs = []
    monkeypatch.setattr(lessons, "display", lambda bundle, raw, metadata=None: outputs.append(bundle))
    return outputs


def test_a_sentence_is_markdown_with_its_numbers(shown):
    lessons.say(f"**{3 * 4}** parameters")
    assert shown == [{"text/markdown": "**12** parameters", "text/plain": "**12** parameters"}]


def test_a_figure_is_a_small_png_of_full_size_and_is_closed(shown):
    figure, ax = plt.subplots(figsize=(4, 3), dpi=150)
    ax.plot([1, 2])
    lessons.show(figure, "A line that rises.")
    assert shown[0]["text/plain"] == "A line that rises."
    image = Image.open(io.BytesIO(shown[0]["image/png"]))
    assert image.format == "PNG"
    assert image.size == (600, 450)
    assert not plt.fignum_exists(figure.number)


def test_a_table_has_a_caption_formats_and_empty_cells(shown):
    rows = [{"setup": "LoRA", "numbers": 4096, "loss": 0.12345}, {"setup": "<full>", "numbers": 8, "loss": None}]
    lessons.table(rows, "Losses <1>", {"loss": "{:.2f}"})
    page, text = shown[0]["text/html"], shown[0]["text/plain"]
    assert "Losses &lt;1&gt;" in page
    assert '<td style="text-align: right">0.12</td>' in page
    assert '<td style="text-align: left">&lt;full&gt;</td>' in page
    assert "nan" not in (page + text).lower()
    assert text.splitlines()[2].split() == ["LoRA", "4,096", "0.12"]
    lessons.table(pandas.DataFrame({"a": [0.123456]}, index=pandas.Index(["x"], name="row")))
    assert '<td style="text-align: left">x</td><td style="text-align: right">0.123</td>' in shown[1]["text/html"]


def test_what_a_lesson_decides_is_said_in_a_line_and_stored_for_the_ledger(shown, monkeypatch):
    stored = []
    monkeypatch.setattr(lessons, "display", lambda data, raw, metadata: stored.append((data, metadata)))
    lessons.claims(lessons.Outcome("b-zero-cannot-learn", "depends", "seen <here>", 2 < 3, on="the rate"))
    ((data, metadata),) = stored
    assert data["text/plain"].startswith("This lesson decides 1 claim of the ledger")
    assert metadata[IN_OUTPUT]["results"] == {
        "b-zero-cannot-learn": {"verdict": "depends", "measured": "seen <here>", "on": "the rate"}
    }


def test_an_answer_is_that_of_the_command_and_stops_where_a_verdict_has_changed(shown, monkeypatch):
    found = answers.load("rank")["rank"]
    lessons.answer("rank")
    for text in (shown[0]["text/plain"], html.unescape(shown[0]["text/html"])):
        assert found.answer.answer in text
        assert found.number in text
        assert "Measured on SmolLM2 and small models." in text
    assert "<code>lora-lab rank --ranks 16 64</code>" in shown[0]["text/html"]
    with pytest.raises(ValueError, match="no answer 'ranks'"):
        lessons.answer("ranks")
    monkeypatch.setattr(answers, "load", lambda ask: {ask: dataclasses.replace(found, number="")})
    with pytest.raises(AssertionError, match=r"Read the answer 'rank' .* its number is not where it was"):
        lessons.answer("rank")


def test_a_sentence_is_shown_only_if_what_it_says_holds(shown):
    lessons.say("Two is less than three.", 2 < 3, 3 > 2)
    assert shown[0]["text/plain"] == "Two is less than three."
    with pytest.raises(AssertionError, match=r"do not support this sentence: Three is less\."):
        lessons.say("Three is less.", 2 < 3, 3 < 2)
    assert len(shown) == 1


def test_an_outcome_that_the_numbers_do_not_support_is_not_shown(shown):
    good = lessons.Outcome("b-zero-cannot-learn", "falls", "trained", 2 < 3)
    with pytest.raises(
        AssertionError, match="'two-real-knobs' is 'stands', but the numbers of this run do not support"
    ):
        lessons.claims(good, lessons.Outcome("two-real-knobs", "stands", "tried", 3 < 2))
    with pytest.raises(ValueError, match="no claim 'two-knobs'; the nearest are two-real-knobs"):
        lessons.claims(lessons.Outcome("two-knobs", "stands", "tried", True))
    assert shown == []


def test_nothing_is_predicted_beforehand_and_the_answer_is_folded_until_then(shown):
    question = lessons.predict("How many?", "1", "10", "100")
    assert question.chosen is None
    assert WIDGET in shown[0]
    assert all(option in shown[0]["text/html"] for option in ("How many?", "10", "100"))
    question.reveal("10", "It was 9.7.")
    assert "<details>" in shown[1]["text/html"]
    assert "You have not predicted yet" in shown[1]["text/html"]
    question.choose("10")
    question.reveal("10", "It was 9.7.")
    assert "As you predicted" in shown[2]["text/html"]
    question.choose("1")
    question.reveal("10", "It was 9.7.")
    assert "You predicted <b>1</b>. It is <b>10</b>. It was 9.7." in shown[3]["text/html"]
    assert len({output["text/plain"] for output in shown[1:]}) == 1  # what is compared does not depend on the reader


def test_an_answer_that_is_no_option_is_refused(shown):
    with pytest.raises(ValueError, match="'C' is none of the options: A, B"):
        lessons.predict("Which?", "A", "B").reveal("C")


def test_a_click_on_a_button_is_the_prediction(shown, monkeypatch):
    import ipywidgets

    made = []
    buttons = ipywidgets.ToggleButtons
    monkeypatch.setattr(ipywidgets, "ToggleButtons", lambda **options: made.append(buttons(**options)) or made[-1])
    question = lessons.predict("Which?", "A", "B")
    assert (made[0].options, made[0].value) == (("A", "B"), None)
    for option in ("B", "A"):
        made[0].value = option  # what a click does
        assert question.chosen == option


def test_a_control_redraws_and_each_setting_is_drawn_once(shown):
    drawn = []

    def draw(rank, with_bias):
        drawn.append((rank, with_bias))
        figure, ax = plt.subplots()
        ax.bar([0], [rank])
        return figure

    view = lessons.explore(draw, "A bar.", start={"rank": 4}, rank=[2, 4, 8], with_bias=[True, False])
    assert drawn == [(4, True)]
    assert shown[0]["image/png"] == view.view.value
    assert WIDGET in shown[0]
    first = view.view.value
    view.controls["rank"].value = 8
    assert view.view.value != first
    view.controls["rank"].value = 4
    assert view.view.value == first
    view.controls["with_bias"].value = False
    assert drawn == [(4, True), (8, True), (4, False)]


def test_texts_can_be_explored_and_are_escaped(shown):
    view = lessons.explore(lambda strength: f"<{strength}>", "A story.", strength=[0.0, 0.5])
    assert "&lt;0.0&gt;" in shown[0]["text/html"]
    assert "&lt;0.5&gt;" in shown[0]["text/html"]  # without a kernel nothing can be moved, so all is there
    view.controls["strength"].value = 0.5
    assert "&lt;0.5&gt;" in view.view.value


def test_a_click_answers_the_prompt_in_the_box_by_the_entry_of_the_menu(shown):
    asked = []

    def answer(adapter, prompt):
        asked.append((adapter, prompt, made[-1].button.disabled if made else None))
        if not prompt:
            raise ValueError("The prompt is empty; write one.")
        return f"<{adapter}> {prompt}"

    made = []
    made.append(lessons.playground(answer, ["keeper", "base"], "A bucket & a hole?", "A box for prompts."))
    assert WIDGET in shown[0]
    for part in ("adapter</b> keeper", "A bucket &amp; a hole?", "&lt;keeper&gt; A bucket &amp; a hole?"):
        assert part in shown[0]["text/html"]
    playground = made[0]
    playground.menu.value, playground.prompt.value = "base", "An umbrella?"
    assert "umbrella" not in playground.view.value  # an answer takes seconds: not at each key
    playground.button.click()
    assert "&lt;base&gt; An umbrella?" in playground.view.value
    playground.prompt.value = ""
    playground.button.click()
    assert "The prompt is empty; write one." in playground.view.value
    assert asked[1:] == [("base", "An umbrella?", True), ("base", "", True)]
    assert not playground.button.disabled


def test_handles_show_nothing_when_a_cell_ends_with_them(shown):
    assert lessons.predict("Which?", "A", "B")._ipython_display_() is None
    assert lessons.explore(lambda s: "t", "x", s=[1])._ipython_display_() is None
    assert lessons.playground(lambda adapter, prompt: "t", ["a"], "x", "y")._ipython_display_() is None
    assert len(shown) == 3
