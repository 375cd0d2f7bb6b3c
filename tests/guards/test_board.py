"""The board of results shows what the records show: other records, another page. The extra ``docs`` is not needed."""

import json
import re
import shutil
import sys

import numpy as np
import pandas
import pytest

from lora_lab import records
from lora_lab.plots import METHOD_COLOURS
from lora_lab.studies.claims.deciding import DECIDERS, judge, read_claims
from lora_lab.studies.records import KINDS
from tests.helpers import COMMIT, PNG, ROOT, legend, points, said

sys.path.insert(0, str(ROOT / "docs" / "site"))  # scripts, which are no package
import board
import pictures

MEMORY, SPEED = "intel-xeon-processor-2-cores-memory", "amd-epyc-2-cores-speed"
LESS = "LoRA needs less memory than full fine-tuning, in the same precision and without dropout on the adapters."


@pytest.fixture
def source(tmp_path):
    """A copy of the records."""
    return shutil.copytree(ROOT / "records", tmp_path / "records")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(the page from the records as they are, the folder of its pictures)."""
    source = shutil.copytree(ROOT / "records", tmp_path_factory.mktemp("stored") / "records")
    return page(source), source.parent / "page"


def page(source):
    """The page from a folder of records, without the claims that no record decides."""
    decided = {name for name, decider in DECIDERS.items() if decider.record or decider.published}
    every = {name: claim for name, claim in read_claims().items() if name in decided}
    stored = records.load_all(folder=source)
    entries = {name: judge(claim, source, every=stored) for name, claim in every.items()}
    return board.page(source, entries, source.parent / "page")


def change(path, row_of=lambda row: row, to=None, **entries):
    """Change rows and entries of a record; a row that becomes None is left out."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    rows = [new for row in stored["rows"] if (new := row_of(row)) is not None]
    (to or path).write_text(json.dumps(stored | {"rows": rows} | entries), encoding="utf-8")


def hungry(row):
    """LoRA needs ten times as much memory."""
    return row | {"measured_bytes": 10 * row["measured_bytes"]} if row["setup"].startswith("LoRA r=") else row


def cells(text, first):
    """The cells of the rows of tables that begin so."""
    return [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith(f"| {first}")]


@pytest.mark.slow
def test_a_changed_record_changes_the_verdict(source, stored):
    before, _ = stored
    assert [row[1].strip() for row in cells(before, f"[{LESS}]")] == ["stands"]
    ((_, stands, falls, *_),) = cells(before, "[memory](#study-memory)")
    change(source / f"{MEMORY}.json", hungry)
    after = page(source)
    assert [row[1].strip() for row in cells(after, f"[{LESS}]")] == ["falls"]
    ((_, fewer, more, *_),) = cells(after, "[memory](#study-memory)")
    assert int(fewer) <= int(stands)
    assert int(more) > int(falls)
    assert cells(before, "[speed](#study-speed)") == cells(after, "[speed](#study-speed)")


@pytest.mark.slow
def test_machines_stand_side_by_side(source, stored):
    assert "No record of a GPU has been made yet" in stored[0]
    gpu = source / "nvidia-h100-80gb-hbm3-memory.json"
    facts = records.load(source / f"{MEMORY}.json").facts | {"device": "cuda"}
    change(source / f"{MEMORY}.json", hungry, to=gpu, device="NVIDIA H100 80GB HBM3", facts=facts)
    text = page(source)
    assert "No record of a" not in text
    assert "| Claim | Intel(R) Xeon(R) Processor, 2 cores | NVIDIA H100 80GB HBM3 |" in text
    (verdicts,) = cells(text, f"[{LESS}]")
    assert [cell.strip() for cell in verdicts[1:]] == ["stands", "falls"]
    ratios = {row[0].strip(): float(row[6]) for row in cells(text, "") if row[3:6] == ["LoRA r=8", "1", "64"]}
    assert ratios["NVIDIA H100 80GB HBM3"] == pytest.approx(
        10 * ratios["Intel(R) Xeon(R) Processor, 2 cores"], rel=0.02
    )
    assert {row[1] for row in cells(text, "NVIDIA H100")} == {"GPU"}


@pytest.mark.slow
def test_a_study_appears_as_soon_as_it_has_a_record(source):
    (source / "amd-epyc-2-cores-tiny_batch.json").unlink()
    assert "`lora-lab record tiny_batch`, 40 minutes on two cores; one claim waits" in page(source)
    rows = [
        {"data": "docs", "stage": "judging", "setup": setup, "lr": 1e-3, "seed": seed, "test_loss": loss + seed / 100}
        for setup, loss in (("all", 3.0), ("MLP", 3.1))
        for seed in (2, 3, 4)
    ]
    records.write(records.Record("tiny_batch", "A CPU", {"cpu": "x"}, COMMIT, "2026-11-27", "x", {}, rows), source)
    after = page(source)
    assert cells(after, "[tiny_batch](#study-tiny_batch)")[0][5:7] == ["A CPU", "2026-11-27"]
    assert "`lora-lab record tiny_batch`, 40" not in after
    assert "![A CPU. Test losses, each setup at its rate; means: all on docs 3.030, MLP on docs 3.130]" in after


@pytest.mark.slow
def test_every_study_is_there_and_every_picture_is_a_file_with_a_description(stored):
    text, folder = stored
    for kind in KINDS:
        assert text.count(f"(study-{kind})=") == 1
        question = KINDS[kind].question
        assert f"**{kind}**: {question}" in text or f"### {kind}: {question}" in text
    assert pictures.OF_ALL.keys() | pictures.OF_EACH.keys() == set(KINDS)
    drawn = dict(re.findall(r"^!\[(.+)\]\(([\w-]+\.png)\)$", text, re.MULTILINE))
    assert len(drawn) == len(list(folder.glob("*.png"))) == 22
    for words, file in drawn.items():
        assert re.search(r"\d", words), words
        assert (folder / file).read_bytes().startswith(PNG)
    assert "No picture" not in text


def test_numbers_of_the_trade_off_are_those_of_the_records(stored):
    text, _ = stored
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells(text, "") if len(row) == 5}
    measured = json.loads((ROOT / "records" / f"{MEMORY}.json").read_text(encoding="utf-8"))["rows"]
    case = {"model": "smollm2-135m", "batch": 2, "length": 128}
    (peak,) = (r["measured_bytes"] for r in measured if r.items() >= case.items() and r["setup"] == "full")
    assert rows["full"][2] == f"{peak / 2**20:,.0f}"
    timed = json.loads((ROOT / "records" / f"{SPEED}.json").read_text(encoding="utf-8"))["rows"]
    case = {"model": "smollm2-135m", "setup": "LoRA r=8", "tokens": 128}
    (seconds,) = (row["seconds"] for row in timed if row.items() >= case.items())
    assert float(rows["LoRA r=8"][3]) == pytest.approx(seconds, rel=0.01)
    assert all(value for setup in ("full", "LoRA r=1", "LoRA r=8") for value in rows[setup])
    assert "Not in any record" not in text


def test_what_no_other_beats_is_the_pareto_front():
    points = {"a": (1, 5), "b": (2, 2), "c": (3, 3), "d": (5, 1), "twin of b": (2, 2), "e": (5, 2)}
    assert pictures.pareto_front(points) == ["a", "b", "d", "twin of b"]
    assert pictures.pareto_front({"a": (1, 2, 3), "b": (1, 2, 4), "c": (2, 1, 9)}) == ["a", "c"]


def test_a_trade_off_has_a_mark_for_each_seed_the_means_and_a_line_through_the_front():
    runs = {"full": [(4, 1), (6, 3)], "LoRA r=8": [(1, 4), (1, 2)], "head": [(7, 7)]}
    ax = pictures.trade_off({setup: np.array(values) for setup, values in runs.items()}, "memory (MiB)", "loss (nats)")
    front, *marks = ax.get_lines()
    assert points(front) == [(1.0, 3.0), (5.0, 2.0)]  # without the head
    seeds, means = marks[::2], marks[1::2]
    assert [len(line.get_xdata()) for line in seeds] == [2, 2, 1]
    assert [points(line) for line in means] == [[(5, 2)], [(1, 3)], [(7, 7)]]
    assert means[0].get_color() == METHOD_COLOURS["full"]
    assert (ax.get_xlabel(), ax.get_ylabel(), legend(ax)) == ("memory (MiB)", "loss (nats)", [*runs])


def test_losses_by_setup_have_a_panel_for_each_kind_of_data():
    rows = [("docs", "full, 60 steps", 3.0), ("docs", "full, 60 steps", 4.0)]
    rows += [("docs", "LoRA r=8", 3.25), ("digits", "full", 0.5)]
    figure = pictures.by_setup(pandas.DataFrame(rows, columns=["data", "setup", "value"]), "test loss (nats)")
    docs, digits = figure.axes
    assert [ax.get_title() for ax in (docs, digits)] == ["docs", "digits"]
    assert said(docs.get_yticklabels()) == ["full, 60 steps", "LoRA r=8"]
    assert [list(line.get_xdata()) for line in docs.get_lines()] == [[3.0, 4.0], [3.25]]
    assert [bar.get_segments()[0][0][0] for bar in docs.collections] == [3.5, 3.25]
    assert docs.get_lines()[0].get_color() == digits.get_lines()[0].get_color() == METHOD_COLOURS["full"]
    assert docs.get_ylim()[0] > docs.get_ylim()[1]  # the first setup on top
