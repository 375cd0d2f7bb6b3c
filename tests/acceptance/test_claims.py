"""The ledger and the records: each of the 116 claims has its verdict and what shows it, each record loads."""

import json
import re
from pathlib import Path

import pytest

import lora_lab as ll
from tests.acceptance import ROOT

CLAIMS = json.loads(Path(__file__).with_name("claims.json").read_text(encoding="utf-8"))
RECORDS = sorted(path.stem for path in (ROOT / "records").glob("*.json"))
KINDS = ["ablation", "downstream", "elicitation", "head_start", "memory", "overfitting", "quality", "rates"]
KINDS += ["smol_layers", "spectra", "speed", "tiny_batch", "tiny_front", "tiny_layers", "tiny_quantised", "tiny_rank"]
KINDS += ["tiny_readmes", "tiny_repeats", "tiny_upgrade", "tiny_variants"]
PUBLISHED = sorted(path.stem for path in (ROOT / "records" / "published").glob("*.json"))


def frozen(row):
    """Return what is frozen of a claim: not the module of the function that shows it, nor how a processor rounds."""
    shown_by = re.sub(r"^lora_lab[\w.]*\.(\w+):", r"\1:", row["shown_by"])
    if shown_by.startswith(("subtracting:", "merged_outputs:")):
        shown_by = re.sub(r"(float\d+) \S+", r"\1", shown_by)
    return {name: row[name] for name in ("sentence", "verdict", "on")} | {"shown_by": shown_by}


def test_the_ledger_has_the_116_claims(ledger):
    assert list(ledger) == list(CLAIMS)
    assert len(CLAIMS) == 116


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_has_its_verdict_and_what_shows_it(ledger, claim):
    assert frozen(ledger[claim].to_dict()) == frozen(CLAIMS[claim])


def test_a_claim_is_explained_alone(ledger):
    entry = ll.claims.verdict("attention-256-mlp-128")
    assert frozen(entry.to_dict()) == frozen(CLAIMS["attention-256-mlp-128"])
    for text in ("attention alone at rank 256", "depends", "0.252"):
        assert text in entry.explained().lower()
    table = ll.claims.table(ledger)
    assert all(claim in table for claim in CLAIMS)
    assert "25 open" in table
    with pytest.raises(ValueError, match="attention-256-mlp-12"):
        ll.claims.verdict("attention-256-mlp-12")


@pytest.fixture(scope="module")
def records():
    return ll.records.load_all()


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_loads_and_states_where_it_comes_from(records, name):
    record = records[name]
    stored = json.loads((ROOT / "records" / f"{name}.json").read_text(encoding="utf-8"))
    assert [len(row) for row in record.rows] == [len(row) for row in stored["rows"]]
    assert len(record.frame()) == len(stored["rows"])
    assert (record.device, record.commit, record.date) == (stored["device"], stored["commit"], stored["date"])
    assert record.command.startswith("lora-lab record ")


def test_there_is_one_record_of_each_of_these_kinds(records):
    assert sorted(record.what for record in records.values()) == KINDS
    assert list(ll.records.load_all("memory")) == ["intel-xeon-processor-2-cores-memory"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_others_published_loads_with_its_source(name):
    published = ll.records.published(name)
    assert published.source
    assert published.rows


def test_a_damaged_record_is_refused_by_name(tmp_path):
    (tmp_path / "a-card-memory.json").write_text('{"what": "memory"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a-card-memory\.json"):
        ll.records.load_all(folder=tmp_path)
