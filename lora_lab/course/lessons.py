"""What lessons show, and how: predictions, results, tables, claims, figures, and pictures that answer a slider.

Each function displays one output. It carries widgets for a notebook with a kernel, a static picture or text for a page
without one, and plain text for a terminal; a stored notebook keeps the last two.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from IPython.display import display
from PIL import Image

from lora_lab.plots import Figure, plt
from lora_lab.studies import answers
from lora_lab.studies.claims import verdict
from lora_lab.studies.claims.deciding import IN_OUTPUT
from lora_lab.system.device import pick_device
from lora_lab.system.provenance import device_name
from lora_lab.system.wording import count_noun

if TYPE_CHECKING:
    import ipywidgets
    from pandas import DataFrame

MEASURED, SURPRISE, OPEN = "#009e73", "#d55e00", "#999999"  # edges of boxes; the text says the same in words


def say(text: str, *holds: bool) -> None:
    """Show a text of Markdown: a sentence that a cell writes from its numbers.

    Args:
        text: the sentence.
        holds: what must be true for it to be right.

    Raises:
        AssertionError: the numbers of this run say something else.
    """
    assert all(holds), f"The numbers of this run do not support this sentence: {text}"
    display({"text/markdown": text, "text/plain": text}, raw=True)


def answer(ask: str) -> None:
    """Show the answer to a question, as ``lora-lab answers`` does: one sentence, one number, and what to do.

    Args:
        ask: the question in a word, such as "rank".

    Raises:
        ValueError: there is no such question.
        AssertionError: a verdict that the sentence rests on has changed since it was written.
    """
    found = answers.load(ask)[ask]
    assert not found.faults, f"Read the answer {ask!r} in answers.toml again: {'; '.join(found.faults)}."
    lines = [found.answer.answer, found.number, found.answer.do]
    texts = [re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(line, quote=False)) for line in lines]
    page = f"<b>{texts[0]}</b><br>{texts[1]} {found.scope}<br><b>Do:</b> {texts[2]}"
    plain = "\n".join([lines[0], f"{lines[1]} {found.scope}".rstrip(), lines[2]])
    display({"text/html": _box(page, MEASURED), "text/plain": plain}, raw=True)


def show(figure: Figure, alt: str) -> None:
    """Show a figure with a text for readers who cannot see it, and close it.

    Args:
        figure: of matplotlib.
        alt: what the figure shows, in a sentence or two. Stored pages are compared by it: no number in it may differ
            between machines.
    """
    bundle = {"image/png": _png(figure), "text/plain": alt}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


def table(
    rows: DataFrame | Iterable[Mapping[str, Any]],
    caption: str = "",
    formats: Mapping[str, str] | None = None,
) -> None:
    """Show a table, numbers to the right and words to the left.

    Args:
        rows: a frame (a named index is shown as columns), or one mapping from column to value for each row.
        caption: stands above the table.
        formats: column -> a format such as "{:.2f}"; otherwise whole numbers get commas, and other numbers three
            digits. Missing values are left empty.
    """
    import pandas

    frame = rows if isinstance(rows, pandas.DataFrame) else pandas.DataFrame(list(rows))
    if any(frame.index.names):
        frame = frame.reset_index()
    texts, sides = {}, []
    for name, column in frame.items():
        whole = pandas.api.types.is_integer_dtype(column)
        numeric = pandas.api.types.is_numeric_dtype(column) and not pandas.api.types.is_bool_dtype(column)
        form = (formats or {}).get(str(name), "{:,}" if whole else "{:.3g}" if numeric else "{}")
        texts[str(name)] = ["" if pandas.isna(value) else form.format(value) for value in column]
        sides.append("right" if numeric else "left")

    def row(tag: str, cells: Iterable[str]) -> str:
        styled = zip(sides, cells, strict=True)
        inner = (f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>' for side, cell in styled)
        return f"<tr>{''.join(inner)}</tr>"

    body = "".join(row("td", cells) for cells in zip(*texts.values(), strict=True))
    heading = f"<p><b>{html.escape(caption)}</b></p>" if caption else ""
    page = f"{heading}<table><thead>{row('th', texts)}</thead><tbody>{body}</tbody></table>"
    plain = pandas.DataFrame(texts).to_string(index=False)
    bundle = {"text/html": page, "text/plain": f"{caption}\n{plain}" if caption else plain}
    display(bundle, raw=True)


@dataclass(frozen=True)
class Outcome:
    """What became of a claim in a lesson.

    Args:
        claim: the claim's id in ``lora_lab/studies/claims/claims.toml``.
        verdict: a verdict of the ledger: "stands", "falls", "depends", "open" or "untestable".
        evidence: what was measured here, with seeds.
        holds: whether the numbers of this run support the verdict.
        on: what it depends on, if it depends.
    """

    claim: str
    verdict: str
    evidence: str
    holds: bool
    on: str = ""


def claims(*outcomes: Outcome) -> None:
    """Say in a line which claims this lesson decides.

    The output also stores the verdicts as data, from which the ledger takes them.

    Raises:
        ValueError: there is no such claim.
        AssertionError: the numbers of this run do not support a verdict.
    """
    results = {}
    for outcome in outcomes:
        verdict(outcome.claim)
        assert outcome.holds, (
            f"The verdict on {outcome.claim!r} is {outcome.verdict!r}, but the numbers of this run do not support it; "
            "run all cells above anew, or correct the verdict."
        )
        results[outcome.claim] = {"verdict": outcome.verdict, "measured": outcome.evidence, "on": outcome.on}
    today, machine = datetime.now(UTC).date().isoformat(), device_name(pick_device()[0])
    stored = {"date": today, "machine": machine, "results": results}
    count = count_noun(len(results), "claim")
    text = f"This lesson decides {count} of the ledger, which `lora-lab claims` lists with all others."
    display({"text/markdown": text, "text/plain": text}, raw=True, metadata={IN_OUTPUT: stored})


class Shown(SimpleNamespace):
    """What has been displayed already, so that a cell may end with it; its attributes can be read and driven."""

    def _ipython_display_(self) -> None:
        """Nothing."""


class Prediction(Shown):
    """A question with options, made by :func:`predict`."""

    question: str
    options: tuple[str, ...]
    chosen: str | None = None

    def choose(self, option: str) -> None:
        """Predict one of the options, as a click on its button does."""
        self.chosen = option

    def reveal(self, answer: str, measured: str = "") -> None:
        """Show the answer: beside the prediction, or folded if there is none yet.

        Args:
            answer: the option that was right.
            measured: a sentence with the numbers.

        Raises:
            ValueError: the answer is none of the options.
        """
        if answer not in self.options:
            raise ValueError(f"The answer {answer!r} is none of the options: {', '.join(self.options)}.")
        result = f"<b>{html.escape(answer)}</b>. {html.escape(measured)}"
        if self.chosen is None:
            fold = f"<details><summary>You have not predicted yet. Open to see the answer.</summary>{result}</details>"
            page = _box(fold, OPEN)
        elif self.chosen == answer:
            page = _box(f"✓ As you predicted: {result}", MEASURED)
        else:
            page = _box(f"✗ You predicted <b>{html.escape(self.chosen)}</b>. It is {result}", SURPRISE)
        display({"text/html": page, "text/plain": f"{self.question} {answer}. {measured}".strip()}, raw=True)


def predict(question: str, *options: str) -> Prediction:
    """Ask for a prediction, right before the cell that answers it.

    Args:
        question: ends in a question mark.
        options: two or more, one of which will turn out right. None is chosen beforehand.

    Returns:
        The prediction, whose ``reveal`` shows the answer.
    """
    import ipywidgets

    prediction = Prediction(question=question, options=options)
    buttons = ipywidgets.ToggleButtons(options=options, value=None, style={"button_width": "auto"})
    buttons.observe(lambda change: prediction.choose(change.new), names="value")
    asked = f"<b>Predict.</b> {html.escape(question)}"
    listed = " &nbsp;○ ".join(html.escape(option) for option in options)
    page = _box(f"{asked}<br>○ {listed}", OPEN)
    plain = f"{question} {' / '.join(options)}"
    _display(ipywidgets.VBox([ipywidgets.HTML(asked), buttons]), {"text/html": page}, plain)
    return prediction


def explore(
    draw: Callable[..., Figure | str], alt: str, start: Mapping[str, Any] | None = None, **controls: Sequence[Any]
) -> Shown:
    """Show what ``draw`` returns, with a control for each of its arguments.

    A page without a kernel shows the figure at the start, or all texts.

    Args:
        draw: takes a value of each control by name, and returns a figure; with a single control it may return a text.
            Drawn once for each setting.
        alt: what the picture shows at the start, as in :func:`show`.
        start: control -> value at the start, which a page without a kernel shows; the first value by default.
        controls: name -> its values. Numbers become a slider, anything else becomes buttons; an underscore in a name
            is shown as a space.

    Returns:
        An object whose ``controls`` (name -> widget) and ``view`` a test can drive.
    """
    import ipywidgets

    values = {name: choices[0] for name, choices in controls.items()} | dict(start or {})

    @cache
    def frame(*setting: Any) -> bytes | str:
        drawn = draw(**dict(zip(controls, setting, strict=True)))
        return _story(drawn) if isinstance(drawn, str) else _png(drawn)

    widgets = {}
    for name, choices in controls.items():
        kind = ipywidgets.ToggleButtons if isinstance(choices[0], str | bool) else ipywidgets.SelectionSlider
        options = [(_words(choice), choice) for choice in choices]
        label = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
        widgets[name] = kind(options=options, value=values[name], **label)
    first = frame(*values.values())
    if isinstance(first, str):
        ((name, choices),) = controls.items()
        stories = [f"<b>{name} {_words(choice)}</b>{frame(choice)}" for choice in choices]
        view, static = ipywidgets.HTML(first), {"text/html": "".join(stories)}
    else:
        layout = {"max_width": "100%", "object_fit": "contain"}
        view, static = ipywidgets.Image(value=first, format="png", layout=layout), {"image/png": first}

    def moved(_: Any) -> None:
        view.value = frame(*(widget.value for widget in widgets.values()))

    for widget in widgets.values():
        widget.observe(moved, names="value")
    _display(ipywidgets.VBox([*widgets.values(), view]), static, alt)
    return Shown(controls=widgets, view=view)


def playground(answer: Callable[[str, str], str], menu: Sequence[str], prompt: str, alt: str) -> Shown:
    """A menu and a box for prompts of the reader's; a click on the button shows the answer.

    Args:
        answer: takes an entry of the menu and a prompt, and returns a text. If it raises a ValueError, the error's
            sentence is shown as the answer.
        menu: its entries, the first of which is selected at the start.
        prompt: in the box at the start. A page without a kernel shows it with its answer.
        alt: what there is to see, as in :func:`show`.

    Returns:
        An object whose ``menu``, ``prompt``, ``button`` and ``view`` a test can drive.
    """
    import ipywidgets

    wide = {"width": "46em", "max_width": "100%"}
    drop_down = ipywidgets.Dropdown(options=list(menu), description="adapter")
    box = ipywidgets.Textarea(value=prompt, description="prompt", rows=3, layout=wide)
    button = ipywidgets.Button(description="Answer", button_style="info")
    view = ipywidgets.HTML(_story(answer(menu[0], prompt)))

    def clicked(_: ipywidgets.Button) -> None:
        button.disabled = True  # an answer takes seconds
        try:
            view.value = _story(answer(str(drop_down.value), box.value))
        except ValueError as error:
            view.value = _story(str(error))
        finally:
            button.disabled = False

    button.on_click(clicked)
    page = f"<p><b>adapter</b> {html.escape(menu[0])}<br><b>prompt</b> {html.escape(prompt)}</p>{view.value}"
    _display(ipywidgets.VBox([drop_down, box, button, view]), {"text/html": page}, alt)
    return Shown(menu=drop_down, prompt=box, button=button, view=view)


def _display(widget: ipywidgets.Widget, static: dict[str, Any], alt: str) -> None:
    """One output: the widget where there is a kernel and a front end for it, and what stands in for it elsewhere."""
    # The key of the widget's view, and a text that names its class.
    bundle = widget._repr_mimebundle_() or {}
    metadata = {"image/png": {"alt": alt}} if "image/png" in static else {}
    display({**bundle, **static, "text/plain": alt}, raw=True, metadata=metadata)


def _png(figure: Figure) -> bytes:
    """The figure in 256 colours, which makes the file three times smaller, and closed."""
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, facecolor="white")
    plt.close(figure)
    Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def _box(page: str, colour: str) -> str:
    return f'<div style="border-left: 4px solid {colour}; padding: 4px 12px; margin: 4px 0">{page}</div>'


def _story(text: str) -> str:
    return f'<div style="white-space: pre-wrap; line-height: 1.4; max-width: 46em">{html.escape(text)}</div>'


def _words(choice: Any) -> str:
    if isinstance(choice, bool):
        return "yes" if choice else "no"
    return choice if isinstance(choice, str) else f"{choice:,}"
