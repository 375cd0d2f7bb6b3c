"""Links between pages and lessons lead to files and headings that exist. The site's own are checked in test_site.py."""

import json
import re

import pytest

from lora_lab.course import playground
from tests.helpers import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "records/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("notebooks/*.ipynb")),
]


def prose(path):
    """The text of a page without its code; of a lesson its text cells and the sentences that its cells print."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        parts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        text = "\n\n".join(parts + ["".join(data.get("text/markdown", "")) for data in outputs])
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """The anchors of a page's headings: GitHub's in Markdown, Jupyter's in a lesson."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(path), re.MULTILINE)
    if path.suffix == ".ipynb":
        return {heading.replace(" ", "-") for heading in headings}
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path, text):
    """The links of a text on that page that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if target == playground.NAME and path.parent.name == "notebooks":  # it is written beside a copy of the lessons
            target, anchor = "../docs/playground/scenarios.js", ""
        file = path.parent / target if target else path
        if "://" not in link and not (file.exists() and (not anchor or anchor in anchors(file))):
            yield link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_something(path):
    assert list(broken(path, prose(path))) == []


def test_links_are_there_and_broken_ones_are_found():
    links = [link for path in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", prose(path))]
    assert len(links) > 100
    assert {"claims.md#to-add-a-claim", "docs/claims.md#to-add-a-claim"} & set(links)
    text = "[a](docs/no.md) [b](docs/claims.md#no) [c](#to-add-a-claim) [d](docs/claims.md#to-add-a-claim) [e](docs)"
    assert list(broken(ROOT / "README.md", text)) == ["docs/no.md", "docs/claims.md#no", "#to-add-a-claim"]


def test_the_glossary_is_in_order_and_links_each_term_to_one_lesson():
    entries = re.findall(r"^## (.+)\n\n((?:.+\n)+)", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.M)
    terms = [term.lower() for term, _ in entries]
    assert len(terms) >= 40
    assert terms == sorted(set(terms))
    for term, text in entries:
        assert len(re.findall(r"\]\(\.\./notebooks/\d\db?_\w+\.ipynb\)", text)) == 1, term
