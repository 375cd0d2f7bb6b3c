"""Slides of the lessons: for each a file of HTML that needs nothing else, from the stored notebook. No cell is run.

    python docs/site/slides.py [FOLDER]    # build/slides if no folder is named

A cell with the tag ``slide`` makes one slide:

    text          the first formula, table or list, if there is one, below its heading and the first paragraph there
    prediction    the question and its options
    exercise      the task, and what a learner starts from
    other code    the figure or table, and of what follows, up to the next such cell, figure or heading, the answer to
                  a prediction and the first sentence of a paragraph that begins in bold

The lesson's title, its question and its takeaways need no tag.
"""

import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from conf import as_mathml
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat import NotebookNode

from lora_lab.course import copies

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TAG = "slide"
ALWAYS = ("# ", "## Question", "## Takeaways", "## What you take home")  # how the headings begin of what needs no tag
DISPLAYED = ("bullet_list_open", "math_block", "ordered_list_open", "table_open")
BOLD_SENTENCE = re.compile(r"\*\*(?:[^*]|\*(?!\*))+\*\*(?:(?<=[.?!]\*\*)|.*?[.?!](?=\s|$))", re.DOTALL)
ANSWER = re.compile(r"</summary>(.*)</details>", re.DOTALL)

markdown = MarkdownIt("commonmark").enable("table")
markdown.use(dollarmath_plugin, renderer=lambda text, options: as_mathml(text, options["display_mode"]))
markdown.add_render_rule("link_open", lambda *_: "")  # the files that lessons link to are not beside the slides
markdown.add_render_rule("link_close", lambda *_: "")


def main(folder: Path) -> None:
    """Write a file for each lesson in which cells have the tag."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if any(map(tagged, notebook.cells)):
            (folder / f"{path.stem}.html").write_text(page(notebook, path.stem), encoding="utf-8")
            print(folder / f"{path.stem}.html")


def page(notebook: NotebookNode, name: str) -> str:
    """The slides of a lesson as one page."""
    bodies = list(slides(notebook))
    title = html.escape(notebook.cells[0].source.split("\n", 1)[0].removeprefix("# "))
    style, script = ((HERE / f"slides.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    sections = (
        f"<section>\n<div>\n{body}\n</div>\n"
        f"<footer>lora_lab {name.partition('_')[0]}: {title}<span>{i} / {len(bodies)}</span></footer>\n</section>"
        for i, body in enumerate(bodies, start=1)
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{title}</title>\n<style>\n{style}</style>",
            *sections,
            f"<script>\n{script}</script>\n</html>\n",
        ]
    )


def slides(notebook: NotebookNode) -> Iterator[str]:
    """The slides of a lesson, each as HTML."""
    topic = exercise = quotation = paragraph = ""
    notebook = copies.drop_tests(notebook)
    for cell, learners in zip(notebook.cells, copies.student(notebook).cells, strict=True):
        if cell.cell_type == "markdown":
            wanted = tagged(cell)
            quotation = paragraph = ""
            for kind, text in blocks(cell.source):
                if text.startswith("### Exercise: "):
                    exercise = text
                    quotation = paragraph = ""
                elif kind == "heading_open":
                    topic = text
                    wanted = wanted or text.startswith(ALWAYS)
                    quotation = paragraph = ""
                elif kind == "blockquote_open":
                    quotation = f"{text}\n\n"
                elif kind == "paragraph_open":
                    paragraph = paragraph or quotation + text
                elif kind in DISPLAYED and wanted:
                    yield markdown.render(f"{topic}\n\n{paragraph}\n\n{text}")
                    wanted = False
            if wanted:
                yield markdown.render(f"{topic}\n\n{paragraph}")
        elif not tagged(cell):
            continue
        elif copies.BEGIN in cell.source:
            task = re.split(r"\s`check`\s", paragraph)[0]  # what follows is of running it, of hints and of solutions
            yield markdown.render(f"{exercise}\n\n{task}") + f"<pre>{html.escape(learners.source)}</pre>"
        else:
            shown = "".join(map(picture_or_table, cell.outputs))
            asks = "<b>Predict.</b>" in shown
            yield markdown.render(topic) + shown + ("" if asks else conclusion(notebook.cells, cell))


def tagged(cell: NotebookNode) -> bool:
    return TAG in cell.metadata.get("tags", [])


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The headings, paragraphs, lists, tables and formulas of a text of Markdown, each with its kind before it."""
    lines = text.splitlines()
    for token in markdown.parse(text):
        if token.level == 0 and token.map:
            first, last = token.map
            yield token.type, "\n".join(lines[first:last])


def picture_or_table(output: NotebookNode) -> str:
    """What an output shows, other than the answer to a prediction."""
    data = output.get("data", {})
    if "image/png" in data:
        alt = html.escape(output.metadata["image/png"]["alt"])
        return f'<img src="data:image/png;base64,{data["image/png"].strip()}" alt="{alt}">'
    shown = data.get("text/html", "")
    return "" if ANSWER.search(shown) else f"<div>{shown}</div>"


def conclusion(cells: list[NotebookNode], first: NotebookNode) -> str:
    """The answer to a prediction, and the first sentence in bold, of a cell and what follows it."""
    answer = sentence = ""
    for kind, text in following(cells, first):
        if kind == "answer":
            answer = answer or text
        elif match := BOLD_SENTENCE.match(text):
            sentence = sentence or markdown.render(match[0])
    return answer + sentence


def following(cells: list[NotebookNode], first: NotebookNode) -> Iterator[tuple[str, str]]:
    """The answers and the blocks of a cell and those after it, up to the next cell with the tag, figure or heading."""
    for cell in cells[cells.index(first) :]:
        outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
        if cell is not first and (tagged(cell) or any("image/png" in data for data in outputs)):
            return
        texts = [cell.source] if cell.cell_type == "markdown" else []
        for data in outputs:
            texts.append(data.get("text/markdown", ""))
            if match := ANSWER.search(data.get("text/html", "")):
                question = re.match("[^?]*[?]", data["text/plain"])[0]
                yield "answer", f"<p>{html.escape(question)} {match[1]}</p>"
        for kind, text in blocks("\n\n".join(texts)):
            if kind == "heading_open":
                return
            yield kind, text


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "slides").resolve())
