"""The claims as data, which function decides which, the rules of verdicts, the ledger, and which records are whole."""

import dataclasses
import json
import re
from collections import Counter

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lora_lab import claims, lessons, records
from lora_lab.studies.claims import deciding
from lora_lab.studies.claims.deciding import (
    DECIDERS,
    SHIPPED,
    Claim,
    Decider,
    Result,
    check_record,
    decide_cases,
    judge,
    read_claims,
)
from lora_lab.studies.records import KINDS
from tests.helpers import COMMIT, ROOT, command, error_line, printed_json

LESSON = "06_which_rank"
CLAIM = Claim("for-a-test", "LoRA is good.", "A paper", "full text", "mechanism", "yes", "it is", "nothing")


# The rules


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([True, True], "stands"),
        ([False, False], "falls"),
        ([True, False], "depends"),
        ([True, False, None], "depends"),
        ([False, None], "falls"),
        ([True, None], "open"),
        ([None], "open"),
        ([], "open"),
    ],
)
def test_cases_make_a_verdict(answers, verdict):
    cases = [(answer, f"case {i}") for i, answer in enumerate(answers)]
    result = decide_cases(cases, "the case")
    assert (result.verdict, result.on) == (verdict, "the case" if verdict == "depends" else "")
    assert all(words in result.measured for _, words in cases)
    assert decide_cases(cases, "the case", always=True).verdict == ("falls" if verdict == "depends" else verdict)


def test_an_answer_is_turned_by_what_alone_tells_two_cases_apart():
    def turned(*answers):
        cases = [(answer, "", rank, model) for answer, rank, model in answers]
        return deciding.find_turning_conditions(cases, ("the rank", "the model"))

    same_rank = (True, 1, "a"), (False, 1, "b")
    assert turned(*same_rank) == "the model"
    assert turned(*same_rank, (True, 8, "b")) == "the rank and the model"
    assert turned(*same_rank, (None, 8, "b")) == "the model"
    assert turned((True, 1, "a"), (False, 8, "b")) == "several conditions at once"
    cases = [(True, "one", 1), (False, "eight", 8)]
    assert str(decide_cases(cases, ("the rank",))) == "depends on the rank"


def test_intervals_and_numbers_beside_what_is_claimed():
    assert [deciding.above(1, 2, limit) for limit in (0, 1, 2, 3)] == [True, None, None, False]
    assert [deciding.below(1, 2, limit) for limit in (0, 1, 2, 3)] == [False, None, None, True]
    assert deciding.above(float("nan"), float("nan")) is None
    assert [deciding.within(1, 2, *ends) for ends in ((1, 2), (0, 1.5), (1.5, 3), (3, 4))] == [True, None, None, False]
    assert [deciding.near(value, 100) for value in (109, 111, -100)] == [True, False, False]
    assert deciding.near(111, 100, 0.2)


# Which function decides


@pytest.fixture
def register(monkeypatch):
    """Makes a function decide the claim of this file, until the test ends."""
    return lambda function, **options: monkeypatch.setitem(DECIDERS, CLAIM.id, Decider(function, **options))


def write(folder, score, device="CPU A", date="2026-11-01"):
    record = records.Record("ablation", device, {"cpu": "x"}, COMMIT, date, "a command", {}, [{"score": score}])
    records.write(record, folder)


def by_score(claim, record):
    score = record.rows[0]["score"]
    return None if score is None else score > 0, f"score {score}"


def test_a_function_that_counts_is_named_with_the_day(register):
    def counts(claim):
        return Result("stands", claim.sentence)

    register(counts)
    result = judge(CLAIM).result
    assert (result.verdict, result.measured, result.machine) == ("stands", "LoRA is good.", "any")
    assert result.shown_by == f"{__name__}.counts"
    assert len(result.date) == 10


def test_a_record_that_changes_turns_the_verdict_and_without_one_it_is_open(register, tmp_path):
    register(by_score, record="ablation")
    result = judge(CLAIM, tmp_path).result
    assert (result.verdict, result.date, result.machine) == ("open", None, None)
    assert "no record 'ablation'" in result.shown_by
    for score, verdict in ((1, "stands"), (-1, "falls"), (None, "open")):
        write(tmp_path, score)
        result = judge(CLAIM, tmp_path).result
        assert (result.verdict, result.measured) == (verdict, f"score {score}")
        assert (result.shown_by, result.date, result.machine) == ("record cpu-a-ablation", "2026-11-01", "CPU A")


def test_a_record_that_lacks_what_is_needed_decides_nothing_but_any_other_error_is_raised(register, tmp_path):
    write(tmp_path, 1)
    register(lambda claim, record: Result("stands", record.rows[0]["missing"]), record="ablation")
    result = judge(CLAIM, tmp_path).result
    assert (result.verdict, result.measured) == ("open", "this record lacks what is needed (KeyError: 'missing')")
    register(lambda claim, record: Result("stands", sorted([1, None])), record="ablation")
    with pytest.raises(TypeError, match="not supported between"):
        judge(CLAIM, tmp_path)


@pytest.mark.parametrize(
    ("scores", "verdict", "machine"),
    [
        ((1, 1), "stands", "CPU B"),  # the newest
        ((1, -1), "depends on the machine", "CPU B"),
        ((1, None), "stands", "CPU A"),
        ((None, None), "open", "CPU B"),
    ],
)
def test_machines_that_disagree_are_what_it_depends_on(register, tmp_path, scores, verdict, machine):
    register(by_score, record="ablation")
    write(tmp_path, scores[0])
    write(tmp_path, scores[1], "CPU B", "2026-11-02")
    result = judge(CLAIM, tmp_path).result
    assert (str(result), result.machine) == (verdict, machine)
    if result.on:
        assert "CPU A: stands, score 1; CPU B: falls, score -1" in result.measured


def test_what_nothing_decides_is_open_or_untestable_with_its_reason():
    waiting = judge(dataclasses.replace(CLAIM, open="a study"))
    assert (waiting.result, waiting.where) == (Result("open", "a study", shown_by="nothing yet"), "waits for a study")
    assert judge(dataclasses.replace(CLAIM, untestable="no GPU")).result.verdict == "untestable"


# The claims as data

GOOD = """
[[claim]]
id = "a-claim"
sentence = "LoRA is good."
number = "10,000 times"
values = [10000]
source = "A paper, section 1"
read = "full text"
kind = "mechanism"
fair = "yes"
why = "it is"
changes = "nothing"
"""


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "claims.toml"
        path.write_text(text, encoding="utf-8")
        return read_claims(path)

    return read


@pytest.mark.parametrize(
    ("reading", "mark"), [("full text", ""), ("second-hand", " [second-hand]"), ("from memory", " [from memory]")]
)
def test_what_was_not_read_in_the_source_is_marked(read, reading, mark):
    claim = read(GOOD.replace("full text", reading))["a-claim"]
    assert (claim.sentence, claim.stated, claim.interval, claim.lesson) == ("LoRA is good.", 10000, "none given", "")
    assert claim.cited == f"A paper, section 1{mark}"


REFUSED = [  # (what is replaced, by what, what must be named)
    ('id = "a-claim"', 'id = "A claim"', "id"),
    ('fair = "yes"', 'fair = "maybe"', "fair"),
    ('kind = "mechanism"', 'kind = "proof"', "kind"),
    ('read = "full text"', 'read = "skimmed"', "read"),
    ("good.", "good", "sentence"),
    ('why = "it is"', "", "why"),
    ('why = "it is"', 'why = " "', "why"),
    ("values = [10000]", 'colour = "red"', "colour"),
    ("values = [10000]", 'verdict = "stands"', "verdict"),
    ('id = "a-claim"', "id = ", "line 3"),
    ('id = "a-claim"', "", r"0\.id"),
    ("[[claim]]", "[[claims]]", "valid list"),
]


@pytest.mark.parametrize(("before", "after", "named"), REFUSED)
def test_what_does_not_conform_is_refused_and_named(read, before, after, named):
    assert before in GOOD
    with pytest.raises(ValueError, match=named):
        read(GOOD.replace(before, after))


def test_two_claims_with_one_id_are_refused(read):
    with pytest.raises(ValueError, match="two claims with the id 'a-claim'"):
        read(GOOD + GOOD)


def test_a_claim_without_a_number_states_none():
    with pytest.raises(ValueError, match="'for-a-test' has no values"):
        _ = CLAIM.stated


# From a lesson


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes a lesson whose last cell has shown outcomes, and returns its file."""

    def run(*outcomes):
        outputs = []

        def show(data, raw, metadata=None):
            outputs.append(new_output("display_data", data, metadata=metadata))

        monkeypatch.setattr(lessons, "display", show)
        lessons.claims(*outcomes)
        cells = [new_markdown_cell("## Claims"), new_code_cell("1"), new_code_cell("2", outputs=outputs)]
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{LESSON}.ipynb")
        return tmp_path / f"{LESSON}.ipynb"

    return run


def test_a_lessons_stored_output_decides_and_another_one_turns_the_verdict(run, monkeypatch):
    measured = dataclasses.replace(CLAIM, lesson=LESSON)
    monkeypatch.setattr(deciding, "read_claims", lambda: {CLAIM.id: measured})
    path = run(lessons.Outcome(CLAIM.id, "depends", "digits, 5 seeds", True, "the rank"))
    result = judge(measured, lessons=path.parent).result
    shown = (str(result), result.measured, result.shown_by)
    assert shown == ("depends on the rank", "digits, 5 seeds", f"lesson {LESSON}")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result.date)
    assert result.machine.endswith("cores")
    stored = path.read_text(encoding="utf-8")
    assert "This lesson decides" in stored
    assert stored.count('"verdict": "depends"') == stored.count('"on": "the rank"') == 1
    path.write_text(stored.replace('"depends"', '"falls"').replace('"on": "the rank"', '"on": ""'), encoding="utf-8")
    assert judge(measured, lessons=path.parent).result.verdict == "falls"


def test_what_a_lesson_has_not_shown_is_open(run):
    path = run(lessons.Outcome("two-real-knobs", "stands", "tried", True))
    result = judge(dataclasses.replace(CLAIM, lesson=LESSON), lessons=path.parent).result
    assert (result.verdict, result.date, result.shown_by) == ("open", None, f"lesson {LESSON}")


def test_a_damaged_lesson_is_told(tmp_path):
    (tmp_path / f"{LESSON}.ipynb").write_text("{}")
    with pytest.raises(ValueError, match=r"\.ipynb lacks the entry 'cells'"):
        judge(dataclasses.replace(CLAIM, lesson=LESSON), lessons=tmp_path)


def test_what_cases_differ_in_is_stated():
    cases = [(True, "small"), (False, "large")]
    assert decide_cases(cases, on="the size").on == "the size"
    assert decide_cases(cases, always=True).verdict == "falls"


# The ledger

KEYS = [
    *("id", "sentence", "number", "interval", "source", "own", "kind", "fair"),
    *("verdict", "on", "scale", "weaker", "shown_by", "date", "machine"),
]


def test_the_shipped_claims_are_many_of_every_kind_and_each_is_decided_in_one_way():
    every = read_claims()
    assert {claim.kind for claim in every.values()} == {"arithmetic", "mechanism", "small-scale", "at scale"}
    assert {claim.fair for claim in every.values()} == {"yes", "sign only", "no"}
    assert sum(claim.number != "none given" for claim in every.values()) > len(every) / 2
    assert all(len(name) <= 30 for name in every)  # the first column of the table
    assert len({claim.sentence for claim in every.values()}) == len(every)
    assert SHIPPED.read_text(encoding="utf-8").count("[[claim]]") == len(every)
    assert DECIDERS.keys() <= every.keys()
    for name, claim in every.items():
        assert (name in DECIDERS) + sum(map(bool, (claim.lesson, claim.open, claim.untestable))) == 1, name
        assert bool(claim.scale) == (not claim.untestable and judge(claim).where != "waits for a study"), name
        assert not claim.weaker or claim.scale, name
        assert all(f"{each:g}" in claim.number.replace(",", "") for each in claim.values), name


def test_no_two_functions_decide_one_claim():
    sources = "".join(path.read_text(encoding="utf-8") for path in SHIPPED.parent.glob("*.py"))
    lists = re.findall(r'^@decides\w*\(((?:"[\w-]+"(?:, )?)+)', sources, re.MULTILINE)
    assert sorted(re.findall(r"[\w-]+", " ".join(lists))) == sorted(DECIDERS)


@pytest.mark.slow
def test_each_record_is_read_once(monkeypatch):
    read, plain = [], records.load
    monkeypatch.setattr(records, "load", lambda path: read.append(path) or plain(path))
    claims.load()
    assert len(read) == len(set(read)) == len(records.load_all())


def test_no_claim_waits_for_a_record_that_is_there():
    """When a record arrives, what waited for it needs a function, or other words."""
    there = {record.what for record in records.load_all().values()}
    for claim in read_claims().values():
        named = set(re.findall(r"the record '(\w+)'(?! of another machine)", f"{claim.changes} {claim.open}"))
        assert not named & there, claim.id
        assert "the record" not in claim.changes.replace("the record '", "") or claim.id in DECIDERS, claim.id


def test_the_time_of_every_record_is_known_and_as_the_records_page_has_it(request):
    named = {each.record for each in DECIDERS.values()}
    assert named - {""} <= set(KINDS)
    page = (request.config.rootpath / "records/README.md").read_text(encoding="utf-8")
    hours = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^,|]*?)(?:, planned|, estimated)? \|$", page, re.MULTILINE))
    assert {name: kind.hours for name, kind in KINDS.items()} == {name: hours.get(name) for name in KINDS}


def test_the_table_fits_100_columns_and_counts(ledger):
    lines = claims.table(ledger).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 2 * len(ledger) + 5
    for first, second, entry in zip(lines[::2], lines[1::2], ledger.values(), strict=False):
        name, _, sentence = first.partition(" ")
        assert name == entry.claim.id
        assert entry.claim.sentence.startswith(sentence.strip().removesuffix(" ..."))
        assert second.split()[0].rstrip("†:") == entry.result.verdict
        assert ("†" in second) == bool(entry.claim.weaker and entry.result.verdict not in ("open", "untestable"))
    every, others, own, _ = lines[-4:]
    of_verdict = Counter((entry.result.verdict, entry.claim.own) for entry in ledger.values())
    waiting = sum("waits for a study" in line for line in lines)
    stand = of_verdict["stands", True] + of_verdict["stands", False]
    assert re.match(rf"{len(ledger)} claims: {stand} stands,.*; {waiting} open ones wait for a study", every)
    assert f"{of_verdict['falls', False]} falls" in others
    assert f"{of_verdict['falls', True]} falls" in own


@pytest.mark.parametrize(
    ("source", "reading", "whose"),
    [
        ("Chen, Villar and Hayou 2026, arXiv 1", "abstract", "Chen, Villar and Hayou 2026"),
        ("peft, issue 12, of 2024", "issue", "peft, issue 12"),
        ("The course (a copy), of 2024", "page", "The course"),
        ("A paper, section 1", "our own question", "our own question"),
    ],
)
def test_a_claim_says_whose_it_is(source, reading, whose):
    claim = dataclasses.replace(CLAIM, source=source, read=reading)
    assert (claim.whose, claim.own) == (whose, reading == "our own question")


def test_a_decided_claim_shows_its_scale_and_a_weaker_rule(register):
    register(lambda claim: (True, "so"))
    assert judge(dataclasses.replace(CLAIM, scale="digits")).verdict == "stands: digits"
    weaker = judge(dataclasses.replace(CLAIM, scale="digits", weaker="three seeds"))
    assert weaker.verdict == "stands†: digits"
    assert "three seeds" in weaker.explained()
    register(lambda claim: (None, "so"))
    assert judge(dataclasses.replace(CLAIM, scale="digits", weaker="three seeds")).verdict == "open"


@pytest.mark.parametrize(("columns", "width"), [(80, 100), (250, 250)])  # the table needs 100
def test_the_command_prints_the_table_and_wide_lines_cut_no_sentence(ledger, monkeypatch, capsys, columns, width):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(claims, "load", lambda *_: ledger)  # which takes seconds
    assert command("claims") == 0
    printed = capsys.readouterr().out
    assert printed == claims.table(ledger, width) + "\n"
    assert ("..." in printed) == (width == 100)
    assert width == 100 or all(entry.claim.sentence in printed for entry in ledger.values())


def test_json_has_exactly_these_keys(ledger, capsys):
    assert command("claims", "--json") == 0
    printed = printed_json(capsys)[0]
    assert [entry["id"] for entry in printed] == list(ledger)
    assert all(list(entry) == KEYS for entry in printed)
    assert all(bool(entry["on"]) == (entry["verdict"] == "depends") for entry in printed)
    assert printed == json.loads(json.dumps([entry.to_dict() for entry in ledger.values()]))
    assert command("claims", "two-real-knobs", "--json") == 0
    assert printed_json(capsys)[0] == [each for each in printed if each["id"] == "two-real-knobs"]


SHOWN = [  # claim, how it is run again
    ("two-real-knobs", "It was computed again just now, on this machine."),
    ("memory-a-third", "lora-lab record memory makes the record anew, in half an hour on two cores."),
    ("lora-forgets-more-at-defaults", "Nothing here measures it: a study of forgetting"),
    ("qlora-takes-more-time", "Its numbers are published ones"),
    ("more-training-higher-rank", "python notebooks/execute.py 06_which_rank.ipynb runs the lesson anew"),
    ("rank-one-enough-for-rl", "Nothing here measures it: it needs a model that reasons"),
]


@pytest.mark.parametrize(("name", "again"), SHOWN)
def test_the_command_explains_one(ledger, capsys, name, again):
    assert command("claims", name) == 0
    printed = capsys.readouterr().out
    *explained, empty, last = printed.splitlines()
    assert (empty, again in last) == ("", True)
    assert max(map(len, explained)) <= 100
    claim, result = ledger[name].claim, ledger[name].result
    stated = (claim.sentence, claim.source, claim.why, claim.changes, claim.number)
    for text in (*stated, result.verdict, result.shown_by, result.measured):
        assert " ".join(text.split()) in " ".join(printed.split())


def test_records_of_another_folder_decide(tmp_path, capsys):
    assert command("claims", "memory-a-third", "--records", tmp_path, "--json") == 0
    (entry,) = printed_json(capsys)[0]
    assert (entry["verdict"], entry["date"], entry["machine"]) == ("open", None, None)
    waiting = claims.verdict("memory-a-third", tmp_path)
    assert (claims.verdict("memory-a-third").where, waiting.where) == ("record memory", "waits for a study")
    assert "will make the record" in waiting.again
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


def save(folder, changes, name=MEMORY.name):
    """The file of the memory record with some ledger changed."""
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
NOT_WHOLE = [
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


@pytest.mark.parametrize(("changes", "named"), NOT_WHOLE)
def test_a_broken_record_is_refused_and_what_is_wrong_is_named(tmp_path, changes, named):
    path = save(tmp_path, changes)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} [^\n]*{named}[^\n]*; [^\n]*\\.$"):
        check_record(path)


def test_what_would_be_refused_is_not_if_nothing_is_changed(tmp_path):
    assert check_record(save(tmp_path, {})).what == "memory"
    facts = of_a_gpu(gpu="NVIDIA H100 80GB HBM3, 79 GiB, CUDA 12.8", driver="570.1")
    device = {"device": "NVIDIA H100 80GB HBM3"}
    assert check_record(save(tmp_path, facts | device, "nvidia-h100-80gb-hbm3-memory.json")).device == device["device"]
    assert check_record(save(tmp_path, {"settings": {"setups": ["full", "LoRA r=8"]}})).rows


def test_the_command_names_a_record_that_is_whole_and_what_another_lacks(tmp_path, capsys):
    assert command("record", MEMORY, "--check") == 0
    whole = f"{MEMORY} is whole: 'memory' on Intel(R) Xeon(R) Processor, 2 cores, 2026-11-25, 56 rows\n"
    assert capsys.readouterr().out == whole
    (tmp_path / "damaged.json").write_text(MEMORY.read_text(encoding="utf-8")[:-100], encoding="utf-8")
    for file, named in (
        (save(tmp_path, {"commit": "unknown"}), "'unknown'"),
        (tmp_path / "none.json", "none.json"),
        (tmp_path / "damaged.json", "damaged.json"),
    ):
        assert command("record", file, "--check") == 1
        assert named in error_line(capsys)
