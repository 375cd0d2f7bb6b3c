"""The ledger: every claim has a verdict, and how it is shown; which records are whole, and what others lack."""

import json
import re

import pytest

from lora_lab import claims, records
from lora_lab.studies.claims.deciding import DECIDERS, check_record, read_claims
from lora_lab.studies.records import KINDS
from tests.helpers import COMMIT, ROOT, command, error_line, printed_json

KEYS = [
    *("id", "sentence", "number", "interval", "source", "kind", "fair"),
    *("verdict", "on", "shown_by", "date", "machine"),
]


@pytest.fixture(scope="module")
def entries():
    return claims.load()


def test_the_shipped_claims_are_many_of_every_kind_and_each_is_decided_in_one_way():
    every = read_claims()
    assert {claim.kind for claim in every.values()} == {"arithmetic", "mechanism", "small-scale", "at scale"}
    assert {claim.fair for claim in every.values()} == {"yes", "sign only", "no"}
    assert sum(claim.number != "none given" for claim in every.values()) > len(every) / 2
    assert all(len(name) <= 30 for name in every)  # the first column of the table
    assert len({claim.sentence for claim in every.values()}) == len(every)
    assert DECIDERS.keys() <= every.keys()
    for name, claim in every.items():
        assert (name in DECIDERS) != bool(claim.lesson or claim.open or claim.untestable), name


def test_no_claim_waits_for_a_record_that_is_there():
    """When a record arrives, what waited for it needs a function."""
    waiting = {claim.record for claim in read_claims().values() if claim.record}
    assert waiting
    assert waiting & {record.what for record in records.load_all().values()} == set()


def test_the_time_of_every_record_is_known_and_as_the_records_page_has_it(request):
    named = {claim.record for claim in read_claims().values()} | {each.record for each in DECIDERS.values()}
    assert named - {""} <= set(KINDS)
    page = (request.config.rootpath / "records/README.md").read_text(encoding="utf-8")
    hours = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^,|]*?)(?:, planned|, estimated)? \|$", page, re.MULTILINE))
    assert {name: kind.hours for name, kind in KINDS.items()} == {name: hours.get(name) for name in KINDS}


def test_the_table_fits_100_columns_and_counts(entries):
    lines = claims.table(entries).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == len(entries) + 4
    for line, entry in zip(lines[1:], entries.values(), strict=False):
        assert line.startswith(entry.claim.id + " ")
        assert entry.result.verdict in line
    stand = sum(entry.result.verdict == "stands" for entry in entries.values())
    waiting = sum(" waits: " in line for line in lines)
    assert re.match(rf"{len(entries)} claims: {stand} stands,.* open \({waiting} wait for a record\)", lines[-2])
    cited = sum(entry.result.verdict == "falls" and entry.claim.read != "lesson" for entry in entries.values())
    assert lines[-1].startswith(f"{cited} of those that fall have a source, ")


@pytest.mark.parametrize(("columns", "width"), [(80, 100), (250, 250)])  # the table needs 100
def test_the_command_prints_the_table_and_wide_lines_cut_no_sentence(entries, monkeypatch, capsys, columns, width):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert command("claims") == 0
    printed = capsys.readouterr().out
    assert printed == claims.table(entries, width) + "\n"
    assert ("..." in printed) == (width == 100)
    assert width == 100 or all(entry.claim.sentence in printed for entry in entries.values())


def test_json_has_exactly_these_keys(entries, capsys):
    assert command("claims", "--json") == 0
    printed = printed_json(capsys)[0]
    assert [entry["id"] for entry in printed] == list(entries)
    assert all(list(entry) == KEYS for entry in printed)
    assert all(bool(entry["on"]) == (entry["verdict"] == "depends") for entry in printed)
    assert printed == json.loads(json.dumps([entry.to_dict() for entry in entries.values()]))
    assert command("claims", "two-real-knobs", "--json") == 0
    assert printed_json(capsys)[0] == [each for each in printed if each["id"] == "two-real-knobs"]


SHOWN = [  # claim, how it is run again
    ("two-real-knobs", "It was computed again just now, on this machine."),
    ("memory-a-third", "lora-lab record memory makes the record anew, in half an hour on two cores."),
    ("all-linear-gains-little", "lora-lab record targets will make the record, in an hour on two cores."),
    ("qlora-takes-more-time", "Its numbers are published ones"),
    ("higher-rank-never-hurts", "python notebooks/execute.py 06_which_rank.ipynb runs the lesson anew"),
    ("rank-one-enough-for-rl", "Nothing here measures it: it needs a model that reasons"),
]


@pytest.mark.parametrize(("name", "again"), SHOWN)
def test_the_command_explains_one(entries, capsys, name, again):
    assert command("claims", name) == 0
    printed = capsys.readouterr().out
    *explained, empty, last = printed.splitlines()
    assert (empty, again in last) == ("", True)
    assert max(map(len, explained)) <= 100
    claim, result = entries[name].claim, entries[name].result
    stated = (claim.sentence, claim.source, claim.why, claim.changes, claim.number)
    for text in (*stated, result.verdict, result.shown_by, result.measured):
        assert " ".join(text.split()) in " ".join(printed.split())


def test_records_of_another_folder_decide(tmp_path, capsys):
    assert command("claims", "memory-a-third", "--records", tmp_path, "--json") == 0
    (entry,) = printed_json(capsys)[0]
    assert (entry["verdict"], entry["date"], entry["machine"]) == ("open", None, None)
    waiting = claims.verdict("memory-a-third", tmp_path)
    assert (claims.verdict("memory-a-third").where(), waiting.where()) == ("record memory", "waits: memory")
    assert "will make the record" in waiting.how_to_run()
    # What others published does not change with the machine.
    assert claims.verdict("qlora-takes-more-time", tmp_path).result.verdict == "stands"


# Whether a record is whole

RECORDS = sorted((ROOT / "records").glob("*.json"))
MEMORY = ROOT / "records" / "intel-xeon-processor-2-cores-memory.json"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_records_that_are_here_are_whole_and_as_a_command_wrote_them(path, tmp_path):
    record = check_record(path)
    assert record.name == path.stem
    assert records.write(record, tmp_path).read_bytes() == path.read_bytes()


def write(folder, changes, name=MEMORY.name):
    """The file of the memory record with some entries changed."""
    stored = json.loads(MEMORY.read_text(encoding="utf-8"))
    path = folder / name
    path.write_text(json.dumps(stored | changes), encoding="utf-8")
    return path


def of_a_gpu(**facts):
    stored = json.loads(MEMORY.read_text(encoding="utf-8"))["facts"]
    return {"facts": stored | {"device": "cuda"} | facts}


def without(column):
    rows = json.loads(MEMORY.read_text(encoding="utf-8"))["rows"]
    return {"rows": [{name: value for name, value in row.items() if name != column} for row in rows]}


# (what is changed, what is named)
REFUSED = [
    ({"what": "taste"}, "'taste'.* one of memory, speed"),
    ({"device": "A GPU"}, "not named a-gpu-memory.json"),
    ({"facts": {"cpu": "x"}}, "device, python, system, torch"),
    (of_a_gpu(), "driver, gpu"),
    ({"commit": "unknown"}, "'unknown'"),
    ({"commit": f"{COMMIT}+changes"}, f"'{COMMIT}.changes'"),
    ({"command": "lora-lab record memory --models small"}, "--models small'"),
    ({"settings": {"setups": {"full": {}, "IA3": {}}}}, "no row of IA3"),
    ({"settings": {"docs": {"setups": {"full": {}}}}}, "no row of full on docs"),
    (
        {"settings": {"cases": [{"about": {"batch": 3, "length": 5}, "setups": {"full": {}}}]}},
        "no row of full on 3, 5,",
    ),
    (without("model"), "the claim .*'model'"),
    ({"rows": []}, "rows.*at least 1 item"),
    ({"schema": 2}, "schema"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED)
def test_a_broken_record_is_refused_and_what_is_wrong_is_named(tmp_path, changes, named):
    path = write(tmp_path, changes)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} [^\n]*{named}[^\n]*; [^\n]*\\.$"):
        check_record(path)


def test_what_would_be_refused_is_not_if_nothing_is_changed(tmp_path):
    assert check_record(write(tmp_path, {})).what == "memory"
    facts = of_a_gpu(gpu="NVIDIA H100 80GB HBM3, 79 GiB, CUDA 12.8", driver="570.1")
    device = {"device": "NVIDIA H100 80GB HBM3"}
    assert check_record(write(tmp_path, facts | device, "nvidia-h100-80gb-hbm3-memory.json")).device == device["device"]
    assert check_record(write(tmp_path, {"settings": {"setups": ["full", "LoRA r=8"]}})).rows


def test_the_command_names_a_record_that_is_whole_and_what_another_lacks(tmp_path, capsys):
    assert command("record", MEMORY, "--check") == 0
    whole = f"{MEMORY} is whole: 'memory' on Intel(R) Xeon(R) Processor, 2 cores, 2026-11-25, 56 rows\n"
    assert capsys.readouterr().out == whole
    (tmp_path / "damaged.json").write_text(MEMORY.read_text(encoding="utf-8")[:-100], encoding="utf-8")
    for file, named in (
        (write(tmp_path, {"commit": "unknown"}), "'unknown'"),
        (tmp_path / "none.json", "none.json"),
        (tmp_path / "damaged.json", "damaged.json"),
    ):
        assert command("record", file, "--check") == 1
        assert named in error_line(capsys)
