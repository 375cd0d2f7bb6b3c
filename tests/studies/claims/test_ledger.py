"""The ledger as a whole: every claim has a verdict, and how it is shown."""

import json
import re

import pytest

from lora_lab import claims, records
from lora_lab.studies.claims.deciding import DECIDERS, VERDICTS, read_claims
from lora_lab.studies.records import KINDS
from tests.helpers import command, printed_json

KEYS = [
    *("id", "sentence", "number", "interval", "source", "kind", "fair"),
    *("verdict", "on", "shown_by", "date", "machine"),
]


@pytest.fixture(scope="module")
def entries():
    return claims.load()


def test_every_claim_has_a_function_or_a_lesson_or_a_reason_why_it_has_none_and_never_both():
    every = read_claims()
    assert DECIDERS.keys() <= every.keys()
    for name, claim in every.items():
        assert (name in DECIDERS) != bool(claim.lesson or claim.open or claim.untestable), name


def test_every_claim_has_a_verdict_and_all_five_occur(entries):
    assert len(entries) >= 40
    assert {entry.result.verdict for entry in entries.values()} == set(VERDICTS)
    for entry in entries.values():
        decided = entry.result.verdict in ("stands", "falls", "depends")
        assert not decided or (entry.result.date and entry.result.machine), entry.claim.id
        assert entry.result.measured.strip(), entry.claim.id
        assert "lacks what is needed" not in entry.result.measured, entry.claim.id


def test_no_claim_waits_for_a_record_that_is_there():
    """When a record arrives, what waited for it needs a function."""
    waiting = {claim.record for claim in read_claims().values() if claim.record}
    assert waiting
    assert waiting & {record.what for record in records.load_all().values()} == set()


def test_the_time_of_every_record_is_known_and_as_the_records_page_has_it(request):
    named = {claim.record for claim in read_claims().values()} | {each.record for each in DECIDERS.values()}
    assert (named | set(KINDS)) - {""} <= set(KINDS)
    page = (request.config.rootpath / "records/README.md").read_text(encoding="utf-8")
    hours = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^,|]*?)(?:, planned|, estimated)? \|$", page, re.MULTILINE))
    assert set(KINDS) <= set(hours)
    assert {name: KINDS[name].hours for name in KINDS} == {name: hours[name] for name in KINDS}


def test_each_record_is_read_once(monkeypatch):
    read, plain = [], records.load
    monkeypatch.setattr(records, "load", lambda path: read.append(path) or plain(path))
    claims.load()
    assert len(read) == len(set(read)) == len(records.load_all())


def test_a_command_is_named_only_if_there_is_one(entries):
    assert entries["memory-a-third"].how_to_run([]) == "No command makes the record 'memory' yet."
    assert entries["memory-a-third"].how_to_run(["memory"]).startswith("lora-lab record memory makes the record anew")
    for entry in entries.values():
        named = re.search(r"lora-lab record (\w+)", entry.how_to_run(KINDS))
        assert named is None or named[1] in KINDS, entry.claim.id


def test_one_counterexample_refutes_what_is_stated_of_every_case(entries):
    for entry in entries.values():
        if re.search(r"\b(never|always|every|at most)\b", entry.claim.sentence):
            assert entry.result.verdict != "depends", entry.claim.id


def test_the_table_fits_100_columns_and_counts(entries):
    lines = claims.table(entries).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == len(entries) + 4
    for line, entry in zip(lines[1:], entries.values(), strict=False):
        assert line.startswith(entry.claim.id + " ")
        assert entry.result.verdict in line
    assert lines[-2].startswith(f"{len(entries)} claims: ")
    stand = sum(entry.result.verdict == "stands" for entry in entries.values())
    assert f" {stand} stands," in lines[-2]
    cited = sum(entry.result.verdict == "falls" and entry.claim.read != "lesson" for entry in entries.values())
    assert lines[-1].startswith(f"{cited} of those that fall have a source, ")
    waiting = [line for line in lines if " waits: " in line]
    assert f" open ({len(waiting)} wait for a record)" in lines[-2]


def test_wide_lines_cut_no_sentence(entries, monkeypatch, capsys):
    assert "..." in claims.table(entries)
    for line, entry in zip(claims.table(entries, 250).splitlines()[1:], entries.values(), strict=False):
        assert entry.claim.sentence in line
    monkeypatch.setenv("COLUMNS", "250")
    assert command("claims") == 0
    assert capsys.readouterr().out == claims.table(entries, 250) + "\n"


def test_a_claim_waits_for_a_record_until_there_is_one(tmp_path):
    shipped = claims.verdict("memory-a-third")
    waiting = claims.verdict("memory-a-third", tmp_path)
    assert (shipped.where(), waiting.where()) == ("record memory", "waits: memory")
    assert "makes the record anew" in shipped.how_to_run(["memory"])
    assert "will make the record" in waiting.how_to_run(["memory"])


def test_the_command_prints_the_table(entries, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")  # fewer than the table needs
    assert command("claims") == 0
    assert capsys.readouterr().out == claims.table(entries) + "\n"


def test_json_has_exactly_these_keys(entries, capsys):
    assert command("claims", "--json") == 0
    printed = printed_json(capsys)[0]
    assert [entry["id"] for entry in printed] == list(entries)
    assert all(list(entry) == KEYS for entry in printed)
    assert {entry["verdict"] for entry in printed} == set(VERDICTS)
    assert all(bool(entry["on"]) == (entry["verdict"] == "depends") for entry in printed)
    assert printed == json.loads(json.dumps([entry.to_dict() for entry in entries.values()]))


@pytest.mark.parametrize("name", ["memory-a-third", "rank-one-suffices", "best-rate-independent-of-rank"])
def test_show_explains_one(entries, capsys, name):
    assert command("claims", name) == 0
    printed = capsys.readouterr().out
    claim, result = entries[name].claim, entries[name].result
    words = " ".join(printed.split())
    for text in (claim.sentence, claim.source, claim.why, claim.changes, claim.number, result.verdict, result.shown_by):
        assert " ".join(text.split()) in words
    assert result.measured in words
    assert max(map(len, printed.splitlines())) <= 100


def test_show_as_json_is_an_array_of_one(capsys):
    assert command("claims", "two-real-knobs", "--json") == 0
    (entry,) = printed_json(capsys)[0]
    assert (entry["id"], list(entry)) == ("two-real-knobs", KEYS)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("two-real-knobs", "It was computed again just now, on this machine."),
        ("memory-a-third", "lora-lab record memory makes the record anew, in half an hour on two cores."),
        (
            "all-linear-gains-little",
            "lora-lab record targets will make the record, in an hour on two cores.",
        ),
        ("qlora-takes-more-time", "Its numbers are published ones"),
        ("higher-rank-never-hurts", "python notebooks/execute.py 06_which_rank.ipynb runs the lesson anew"),
        ("rank-one-enough-for-rl", "Nothing here measures it: it needs a model that reasons"),
    ],
)
def test_run_computes_again_or_names_the_command_and_its_time(capsys, name, says):
    assert command("claims", name) == 0
    assert says in capsys.readouterr().out.splitlines()[-1]


def test_records_of_another_folder_decide(tmp_path, capsys):
    assert command("claims", "memory-a-third", "--records", tmp_path, "--json") == 0
    (entry,) = printed_json(capsys)[0]
    assert (entry["verdict"], entry["date"], entry["machine"]) == ("open", None, None)
    assert command("claims", "qlora-takes-more-time", "--records", tmp_path, "--json") == 0
    (entry,) = printed_json(capsys)[0]
    assert entry["verdict"] == "stands"  # what others published does not change with the machine


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", *sorted({record.what for record in records.load_all().values()})])
def test_no_claim_fails_where_records_of_one_kind_alone_are_there(kind, tmp_path):
    for record in records.load_all().values():
        if record.what == kind:
            records.write(record, tmp_path)
    entries = claims.load(tmp_path)
    assert not [name for name, entry in entries.items() if "lacks what is needed" in entry.result.measured]
