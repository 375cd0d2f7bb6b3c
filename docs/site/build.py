"""The site: the lessons, these pages, the ledger, the records and the package's reference as HTML. No cell is run.

    python docs/site/build.py [FOLDER]    # build/site if no folder is named; open html/index.html there

Pages lie as in the repository, so that links between them work in both. Solutions of exercises are folded: first
comes what a learner starts from, as ``lora-lab course`` writes it. They are not left out, since a reader who cannot run
the lesson has no other way to see whether an idea was right, and the lessons in the repository show them anyway.
"""

import copy
import inspect
import json
import re
import shutil
import sys
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import board
import nbformat
import pandas
from markup import escaped, toctree
from sphinx.cmd.build import build_main

import lora_lab
from lora_lab import claims, records
from lora_lab.course import copies, playground
from lora_lab.studies.claims.deciding import ANY_MACHINE, DECIDERS, NONE_GIVEN, VERDICTS, WEAKER

ROOT = Path(__file__).resolve().parents[2]  # links are resolved, too
REPOSITORY_PAGES = ["CONTRIBUTING.md", "SECURITY.md", "records/README.md"]
ROWS_SHOWN = 50
PLAYGROUND = re.compile(r"\[([^]]+)\]\((?:docs/playground|playground|playground\.html)(#[^)]*)?\)")
ENTRY = re.compile(r"^ *(\w+)/? {2,}\S", re.MULTILINE)  # a file in the docstring of a package
FRONT_DOOR = re.compile(r"^from \.(\S*) import (\w+) as \w+$", re.MULTILINE)
SHOWING_SOLUTIONS = {"exercise", "exercises", "copies"}  # modules of lora_lab.course


def main(folder: Path) -> int:
    """Write the pages below a folder, and build the site from them; warnings are errors."""
    source, marker = folder / "source", folder / ".site"
    if folder.is_file() or (folder.exists() and any(folder.iterdir()) and not marker.is_file()):
        sys.exit(f"{folder} is a file, or holds files that building would delete; name a new folder for the site.")
    shutil.rmtree(folder, ignore_errors=True)
    write(marker, "")
    lessons = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    pages = sorted((ROOT / "docs").glob("*.md"))
    for path in [*pages, *(ROOT / name for name in REPOSITORY_PAGES)]:
        write(source / path.relative_to(ROOT), adapted(path.read_text(encoding="utf-8"), path, source))
    for path in lessons:
        write_lesson(path, source)
    entries = claims.load()
    write(source / "ledger.md", ledger(entries))
    record_pages = write_records(source / "records", entries)
    reference = write_reference(source / "reference")
    answers = ["docs/answers", "docs/errors", "ledger", "docs/claims", "records/index", "docs/glossary"]
    guides = [name for path in pages if (name := f"docs/{path.stem}") not in answers]
    contents = [
        toctree([f"notebooks/{path.stem}" for path in lessons], ":caption: Lessons"),
        toctree(answers, ":caption: Answers"),
        toctree(guides, ":caption: Guides"),
        toctree(["reference/index", "CONTRIBUTING", "SECURITY"], ":caption: Reference"),
    ]
    readme = ROOT / "README.md"
    write(source / "index.md", "\n\n".join([adapted(readme.read_text(encoding="utf-8"), readme, source), *contents]))
    print(f"{len(lessons)} lessons, {len(pages)} guides, {record_pages} records, {reference} pages of reference")
    options = ["--fail-on-warning", "--quiet", "--conf-dir", str(Path(__file__).parent)]
    write(folder / "html" / playground.NAME, playground.build())
    return build_main([*options, "--doctree-dir", str(folder / "doctrees"), str(source), str(folder / "html")])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# Pages and lessons


def adapted(text: str, path: Path, source: Path) -> str:
    """A page's text for the site: links to modules lead to their reference, and other linked files come along."""
    up = "../" * (len(path.relative_to(ROOT).parents) - 1)
    text = PLAYGROUND.sub(rf'<a href="{up}{playground.NAME}\2">\1</a>', text)

    def link(match: re.Match) -> str:
        target, anchor = match[1], match[2] or ""
        if "://" in target:
            return match[0]
        if not target:  # Jupyter writes #Your-turn where others write #your-turn
            return f"]({anchor.lower()})"
        file = (path.parent / target).resolve().relative_to(ROOT)
        if file.suffix == ".py" and file.parts[0] == "lora_lab":
            page = "index" if file == Path("lora_lab/__init__.py") else file.with_suffix("").parts[1]
            return f"]({up}reference/{page}.rst)"
        if file.suffix not in (".md", ".ipynb"):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, source / file)
        return match[0]

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", link, text)


def write_lesson(path: Path, source: Path) -> None:
    """Write a lesson with folded solutions, and beside it the notebook that a learner starts from."""
    notebook = copies.drop_tests(nbformat.read(path, as_version=4))
    start = copies.student(notebook)
    write(source / "download" / path.name, nbformat.writes(start))
    cells = []
    for cell, open_cell in zip(notebook.cells, start.cells, strict=True):
        if cell.cell_type == "markdown":
            cell.source = adapted(cell.source, path, source)
        elif cell.source != open_cell.source:  # an exercise
            cells.append(copy.deepcopy(open_cell))
            lines = cell.source.splitlines()
            markers = (copies.BEGIN, copies.END, copies.STUB)
            cell.source = "\n".join(line for line in lines if not line.strip().startswith(markers))
            cell.id += "-solution"
            cell.metadata.tags = ["hide-cell"]
            cell.metadata.mystnb = {"code_prompt_show": "Show a solution", "code_prompt_hide": "Hide the solution"}
        for output in cell.get("outputs", []):
            if text := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell.metadata.setdefault("mystnb", {})["image"] = {"alt": text}
        cells.append(cell)
    hint = (
        "This page shows one stored run. In {download}`the notebook <../download/%s>` no cell has been run and the "
        "exercises are open; to run it and have your answers checked, [install lora_lab](../docs/install.md)."
    )
    cells[0].source = cells[0].source.replace("\n", f"\n\n:::{{note}}\n{hint % path.name}\n:::\n", 1)
    notebook.cells = cells
    write(source / "notebooks" / path.name, nbformat.writes(notebook))


# The ledger and the records


def ledger(entries: dict[str, claims.Entry]) -> str:
    """The page of all claims, by verdict."""
    counts = Counter(entry.result.verdict for entry in entries.values())
    own = sum(entry.claim.own for entry in entries.values())
    total = ", ".join(f"{counts[verdict]} [{verdict}](#{verdict})" for verdict in VERDICTS)
    lines = [
        "# Which claims about LoRA are true?",
        f"{len(entries)} claims: {len(entries) - own} from papers, courses and issues, and {own} questions of our own. "
        f"Each verdict is computed from a count, a record, a lesson or published numbers: {total}. {WEAKER}: a weaker "
        "rule decided. [How verdicts are made](docs/claims.md).",
    ]
    for verdict in VERDICTS:
        lines.append(f"({verdict})=\n## {verdict.capitalize()}")
        lines += [claim_text(entry) for entry in entries.values() if entry.result.verdict == verdict]
    return "\n\n".join(lines)


def claim_text(entry: claims.Entry) -> str:
    claim, result = entry.claim, entry.result
    verdict = entry.verdict[0].upper() + entry.verdict[1:]
    theirs = claim.number if claim.interval == NONE_GIVEN else f"{claim.number} ({claim.interval})"
    measured = [result.date, result.machine] if result.machine and result.machine != ANY_MACHINE else []
    facts = {
        "Source": f"{claim.source} (read: {claim.read})",
        "Their number": theirs,
        "Fair test": f"{claim.fair}: {claim.why}",
        **({f"Weaker rule {WEAKER}": claim.weaker} if claim.weaker else {}),
        "What would change the verdict": claim.changes,
    }
    return "\n\n".join(
        [
            f"(claim-{claim.id})=\n### {escaped(claim.sentence)}",
            f"**{escaped(verdict)}{escaped(str(result).removeprefix(result.verdict))}.** {escaped(result.measured)}",
            ", ".join([f"Shown by {shown_by(result.shown_by)}", *map(escaped, measured)]) + ".",
            "<details><summary>Their number, and how fair the test is</summary>",
            "\n".join(f"- {name}: {escaped(text)}" for name, text in facts.items()),
            f"`lora-lab claims {claim.id}` prints the same.",
            "</details>",
        ]
    )


def shown_by(text: str) -> str:
    """What shows a verdict, with links to lessons, records and published numbers."""
    if text.startswith("lora_lab."):
        return f"`{text}`"
    text = re.sub(r"\blesson (\d\d_\w+)", r"[lesson \1](notebooks/\1.ipynb)", text)
    text = re.sub(r"\brecord (\w+-[\w-]+)", r"[record \1](records/\1.md)", text)
    return re.sub(r"\brecords/published/([\w-]+)\.json", r"[published numbers, \1](records/published/\1.md)", text)


def write_records(folder: Path, entries: dict[str, claims.Entry]) -> int:
    """Write a page for each record and for what others published, and the board; return the number of the former."""
    names = []
    for path in board.record_files(ROOT / "records"):
        name = path.relative_to(ROOT / "records").with_suffix("").as_posix()
        if path.parent.name == "published":
            record = records.published(path.stem)
            title = record.what
            facts = {"Source": record.source, "Version": record.commit, "Licence": record.licence}
            decided = [key for key, decider in DECIDERS.items() if decider.published == path.stem]
        else:
            record = records.load(path)
            title = f"The record {record.what}: {record.device}"
            facts = {"Machine": record.device, **record.facts, "Code": record.commit, "Command": record.command}
            decided = [key for key, decider in DECIDERS.items() if decider.record == record.what]
        facts["Date"] = record.date
        up = "../" * (1 + name.count("/"))
        verdicts = [
            f"- [{escaped(entry.claim.sentence)}]({up}ledger.md#claim-{key}) **{escaped(str(entry.result))}**"
            for key, entry in entries.items()
            if key in decided
        ]
        write(folder / f"{name}.md", record_text(title, facts, record, path.name, verdicts))
        shutil.copy(path, folder / f"{name}.json")
        names.append(name)
    text = board.page(ROOT / "records", entries, folder)
    write(folder / "index.md", f"{text}\n\n{toctree(['README', *names])}")
    return len(names)


def record_text(
    title: str, facts: dict[str, str], record: records.Record | records.Published, file: str, verdicts: list[str]
) -> str:
    """The page of a record: where it comes from, which claims it decides, its settings, and its first rows."""
    frame = pandas.DataFrame(record.rows)
    same = [column for column in frame if len(frame) > 1 and frame[column].nunique(dropna=False) == 1]
    settings = record.settings | {column: record.rows[0][column] for column in same}
    shown = frame.drop(columns=same).head(ROWS_SHOWN)
    table = shown.to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format)
    return "\n\n".join(
        [
            f"# {escaped(title)}",
            "\n".join(f"- {name}: {escaped(value)}" for name, value in facts.items()),
            f"All {len(frame):,} rows and the settings: {{download}}`{file}`.",
            *(["## Claims that it decides", "\n".join(verdicts)] if verdicts else []),
            "## Settings, and what is the same in all rows",
            "\n".join(f"- `{name}`: `{json.dumps(value)}`" for name, value in settings.items()),
            f"## Rows{f', the first {ROWS_SHOWN}' if len(frame) > ROWS_SHOWN else ''}",
            f'```````{{raw}} html\n<div class="wide">{table}</div>\n```````',
        ]
    )


# The reference


def write_reference(folder: Path) -> int:
    """Write a page for each file and folder of the package, in reading order, and one for the names of ``ll``."""
    names = [name for name in ENTRY.findall(lora_lab.__doc__) if name != "__main__"]
    for name in names:
        write(folder / f"{name}.rst", "\n\n".join(module_text(f"lora_lab.{name}", "=")))
    stub = (ROOT / "lora_lab" / "__init__.pyi").read_text(encoding="utf-8")
    rows = {True: [], False: []}  # whether the name is a module's
    for module, name in FRONT_DOOR.findall(stub):
        subject, path = getattr(lora_lab, name), ".".join(filter(None, ("lora_lab", module, name)))
        summary = inspect.getdoc(subject).split("\n\n", 1)[0].replace("\n", " ")
        row = f"   * - :py:obj:`ll.{name} <{path}>`\n     - {summary}"
        rows[inspect.ismodule(subject)].append(row)
    table = ".. list-table::\n   :widths: 25 75\n"
    front = [
        heading("Which names does the package have?", "="),
        "After ``import lora_lab as ll``:",
        "\n".join([table, *rows[False]]),
        heading("Modules", "-"),
        "\n".join([table, *rows[True]]),
        "All files of the package, in reading order:",
        "\n".join([".. toctree::", "   :maxdepth: 1", "", *(f"   {name}" for name in names)]),
    ]
    write(folder / "index.rst", "\n\n".join(front))
    return len(names) + 1


def module_text(module: str, underline: str) -> list[str]:
    """The reference of a module, or of a package with the modules that its docstring lists."""
    parts = [heading(module, underline), f".. automodule:: {module}"]
    if find_spec(module).submodule_search_locations is None:
        return [f"{parts[0]}\n\n{parts[1]}\n   :members:"]
    for name in ENTRY.findall(import_module(module).__doc__):
        if name not in SHOWING_SOLUTIONS and find_spec(f"{module}.{name}"):
            parts += module_text(f"{module}.{name}", "-")
    return parts


def heading(text: str, underline: str) -> str:
    return f"{text}\n{underline * len(text)}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").resolve()))
