"""The site as a reader gets it: every link leads somewhere, nothing is loaded from elsewhere, solutions are folded.

Runs where the extra ``docs`` is installed. ``LORA_LAB_SITE=DIR`` demands that it is, and leaves the site there.
"""

import os
import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from lora_lab.course import copies, playground
from lora_lab.studies.claims.deciding import read_claims
from tests import lab
from tests.helpers import ROOT, solutions, words

KEEP = os.environ.get("LORA_LAB_SITE")
if not KEEP and not all(map(find_spec, ("sphinx", "myst_nb", "furo"))):
    pytest.skip("the extra docs is not installed", allow_module_level=True)

BUILD = ROOT / "docs" / "site" / "build.py"
LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
LOADING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}


class Page(HTMLParser):
    """What a page links to, what it loads, its anchors, and its text outside and inside of folds."""

    def __init__(self, html):
        super().__init__()
        self.links, self.loaded, self.anchors, self.pictures = [], [], set(), []
        self.open, self.folded, self.titles = [], [], []
        self.stack = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag == "img":
            self.pictures.append(attributes.get("alt", ""))
        if attributes.get(LOADING.get(tag)):
            self.loaded.append(attributes[LOADING[tag]])
        self.loaded += re.findall(r"url\(([^)]+)\)", attributes.get("style") or "")
        if tag in ("details", "summary", "script", "style", "title"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_data(self, text):
        where = self.stack[-1] if self.stack else ""
        if where == "title":
            self.titles.append(text)
        elif where not in ("script", "style"):
            # The summary of a fold is seen while it is closed, unless it lies in another one.
            hidden = self.stack.count("details") > (where == "summary")
            (self.folded if hidden else self.open).append(text)


def read(lesson):
    return nbformat.read(ROOT / "notebooks" / f"{lesson}.ipynb", as_version=4)


def test_text_in_a_closed_fold_is_distinguished_from_text_that_is_seen():
    inner = "<details><summary>d</summary>e</details>"
    page = Page(f"<p>a</p><details><summary>b</summary>c{inner}</details><script>s</script><p>f</p>")
    assert (page.open, page.folded) == (["a", "b", "f"], ["c", "d", "e"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = Path(KEEP).resolve() if KEEP else tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, BUILD, folder], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_internal_link_leads_to_a_file_and_to_an_anchor(site, pages):
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    checked, broken = 0, []
    for name, page in pages.items():
        for link in {*page.links, *page.loaded}:
            parts = urlsplit(link)
            if not parts.scheme:
                checked += 1
                path = posixpath.join(posixpath.dirname(name), unquote(parts.path)) if parts.path else name
                file = posixpath.normpath(path)
                anchor = "" if file == playground.NAME else unquote(parts.fragment)  # there it is a setting
                if file not in files or (anchor and (file not in pages or anchor not in pages[file].anchors)):
                    broken.append((name, link))
    assert broken == []
    assert len(pages) > 50
    assert checked > 3000


def test_no_page_loads_anything_from_elsewhere(site, pages):
    loaded = [(name, address) for name, page in pages.items() for address in page.loaded]
    assert len(loaded) > len(pages)
    assert [each for each in loaded if urlsplit(each[1]).netloc] == []
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_every_lesson_guide_claim_and_record_has_a_page_or_a_place(pages):
    assert {f"notebooks/{name}.html" for name in LESSONS} < pages.keys()
    assert {f"docs/{path.stem}.html" for path in ROOT.glob("docs/*.md")} < pages.keys()
    for path in (ROOT / "records").rglob("*.json"):
        assert path.relative_to(ROOT).with_suffix(".html").as_posix() in pages
    assert {f"claim-{name}" for name in read_claims()} <= pages["ledger.html"].anchors
    assert {"lora_lab.lora.LoRALinear", "lora_lab.train.fit"} <= {
        anchor for name, page in pages.items() if name.startswith("reference/") for anchor in page.anchors
    }


@pytest.mark.parametrize("lesson", LESSONS)
def test_solutions_are_folded_and_what_the_learner_starts_from_is_not(pages, lesson):
    page, notebook = pages[f"notebooks/{lesson}.html"], read(lesson)
    shown, folded = words("".join(page.open)), words("".join(page.folded))
    exercises = solutions(notebook)
    assert exercises
    for lines in exercises:
        assert lines
        assert [line for line in lines if line in shown] == []
        assert [line for line in lines if line not in folded] == []
    starts = zip(copies.drop_tests(notebook).cells, copies.student(notebook).cells, strict=True)
    stubs = [start.source for cell, start in starts if cell.source != start.source]
    assert [stub for stub in stubs if words(stub) not in shown] == []
    assert shown.count("Show a solution") == len(stubs)


def test_no_other_page_and_no_file_has_a_solution(site, pages):
    lines = {line for lesson in LESSONS for exercise in solutions(read(lesson)) for line in exercise}
    texts = {name: words("".join(page.open)) for name, page in pages.items() if not name.startswith("notebooks/")}
    texts |= {path.name: words(path.read_text(encoding="utf-8")) for path in site.rglob("*.js")}
    assert {name: shown for name, text in texts.items() if (shown := [line for line in lines if line in text])} == {}
    downloads = {path.stem: path.read_text(encoding="utf-8") for path in site.rglob("*.ipynb")}
    assert sorted(downloads) == LESSONS
    for name, text in downloads.items():
        assert nbformat.reads(text, as_version=4) == copies.student(read(name))
    others = [path for path in site.rglob("*") if path.suffix in (".json", ".txt", ".html")]
    assert [path.name for path in others if copies.BEGIN in path.read_text(encoding="utf-8")] == []


def test_formulas_are_drawn_without_a_script(site, pages):
    html = (site / "notebooks" / "05_speed.html").read_text(encoding="utf-8")
    assert html.count("<math ") >= 20
    assert "<mfrac>" in html
    assert not re.search(r"<script[^>]*(mathjax|katex)", html, re.IGNORECASE)
    text = "".join(pages["notebooks/05_speed.html"].open)
    assert not re.search(r"\\frac|\$[A-Z]", text)


@pytest.mark.skipif(not (find_spec("playwright") and lab.CHROMIUM), reason="needs playwright and Chromium")
def test_the_boards_tables_sort_by_mouse_and_by_keys_and_no_page_of_it_is_too_wide(site):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=lab.CHROMIUM, args=lab.FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto((site / "records" / "index.html").as_uri())
        table = page.locator("table.sortable").first
        rows = table.locator("tbody tr td:nth-child(8)")
        before = rows.all_inner_texts()
        heading = table.locator("th", has_text="Rows")
        heading.locator("button").click()
        numbers = [text.replace(",", "") for text in rows.all_inner_texts()]
        filled = [int(text) for text in numbers if text]
        assert filled == sorted(int(text.replace(",", "")) for text in before if text)
        assert numbers[len(filled) :] == [""] * (len(before) - len(filled))
        assert heading.get_attribute("aria-sort") == "ascending"
        page.keyboard.press("Enter")
        assert rows.first.inner_text().replace(",", "") == str(filled[-1])
        assert heading.get_attribute("aria-sort") == "descending"
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Space")
        dates = [text for text in table.locator("tbody tr td:nth-child(7)").all_inner_texts() if text]
        assert dates == sorted(dates)
        assert heading.get_attribute("aria-sort") is None
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    file = tmp_path / "thesis.txt"
    file.write_text("mine")
    for path in (tmp_path, file):
        result = subprocess.run([sys.executable, BUILD, path], capture_output=True, text=True)
        assert result.returncode == 1
        assert "name a new folder" in result.stderr
        assert "Traceback" not in result.stderr
    assert file.read_text() == "mine"
