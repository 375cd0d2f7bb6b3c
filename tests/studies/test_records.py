"""Records: what is let in, what is written and read back, where they are kept, and how they are named."""

import dataclasses
import json
import math
import re
from datetime import UTC, datetime

import pandas
import pytest
import torch

from lora_lab import records
from lora_lab.studies.records import Record, load, load_all, write
from lora_lab.system import provenance
from lora_lab.system.provenance import machine_info
from tests.helpers import COMMIT, ROOT, names

CPU = torch.device("cpu")


def a_record(**changes):
    usual = {
        "what": "memory",
        "device": "NVIDIA H100 80GB HBM3",
        "facts": {"python": "3.12.1", "torch": "2.9.0", "driver": "570.1"},
        "commit": COMMIT,
        "date": "2026-11-24",
        "command": "lora-lab record memory --seed 0",
        "settings": {"batch": [4, 128], "lean": {"bf16": True, "halves": None}, "rate": 5e-4},
        "rows": [
            {"method": "LoRA", "peak_bytes": 123456789, "ratio": 0.1, "measured": True},
            {"method": "full", "peak_bytes": None, "ratio": 1.0, "measured": False},
        ],
    }
    return Record(**(usual | changes))


# What is let in


def test_a_whole_record_is_let_in():
    assert a_record().schema == 1
    for commit in ("unknown", COMMIT, f"{COMMIT}+changes", COMMIT + "0" * 24):
        assert a_record(commit=commit).commit == commit
    assert a_record(settings={}).settings == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_record().what = "speed"


# (field, what it may not hold)
REFUSED = [
    *(("what", value) for value in ("", "Memory", "mem-ory", "mem ory", "1st", "memory\n", None)),
    *(("device", value) for value in ("", "()", "one\ntwo", None)),
    *(("facts", value) for value in (None, [], {"python": ""}, {"python": 3}, {3: "python"})),
    *(("commit", value) for value in ("", "main", COMMIT[:-1], COMMIT.upper(), f"{COMMIT}+", f"unknown{COMMIT}", None)),
    *(("date", value) for value in ("", "24.11.2026", "20261124", "2026-11-24T10:00", "2026-11-31", "٢٠٢٦-11-24")),
    *(("command", value) for value in ("", " ", "one\ntwo", None)),
    *(("settings", value) for value in (None, [], {"a": (1, 2)}, {"a": float("nan")}, {"a": [object()]}, {3: 1})),
    *(("rows", value) for value in (None, [], {}, [None], [{}], [{3: 1}])),
    *(("rows", [{"loss": 1.0}, {"loss": value}]) for value in (float("nan"), -float("inf"), [1], {"a": 1})),
    *(("schema", value) for value in (0, 2, "1", None)),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_what_does_not_conform_is_refused_and_named(field, value):
    with pytest.raises(ValueError, match=rf"for Record\n{field}"):
        a_record(**{field: value})


def test_the_frame_has_a_row_a_case_and_a_column_a_value():
    frame = a_record().frame()
    assert list(frame.columns) == ["measured", "method", "peak_bytes", "ratio"]
    assert frame["method"].tolist() == ["LoRA", "full"]
    assert frame["peak_bytes"].isna().tolist() == [False, True]
    assert frame.loc[0, "ratio"] == 0.1


# Files


def test_what_was_written_comes_back(tmp_path):
    record = a_record()
    path = write(record, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "nvidia-h100-80gb-hbm3-memory.json"
    assert load(path) == record
    assert load(str(path)) == record
    assert load(path) != a_record(rows=[{"method": "LoRA"}])
    pandas.testing.assert_frame_equal(load(path).frame(), record.frame())
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored == dataclasses.asdict(record)
    assert stored["schema"] == 1


def test_a_new_measurement_takes_the_place_of_the_old_one(tmp_path):
    write(a_record(), tmp_path)
    newer = a_record(date="2026-12-01")
    assert load(write(newer, tmp_path)) == newer
    write(a_record(what="speed"), tmp_path)
    assert names(tmp_path) == ["nvidia-h100-80gb-hbm3-memory.json", "nvidia-h100-80gb-hbm3-speed.json"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks the file gpu-memory\.json"):
        load(tmp_path / "gpu-memory.json")
    with pytest.raises(FileNotFoundError, match=r"yours\.json"):
        records.published("yours", tmp_path)


def without(name):
    return {key: value for key, value in dataclasses.asdict(a_record()).items() if key != name}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "JSON"),
        ("[]", "list"),
        (without("commit"), "commit"),
        (without("") | {"note": "by hand"}, "note"),
        (without("") | {"rows": [{"loss": float("nan")}]}, "rows.0.loss"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, content, named):
    path = tmp_path / "gpu-memory.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    for read in (lambda: load(path), lambda: load_all(folder=tmp_path)):
        with pytest.raises(ValueError, match=rf"gpu-memory\.json [^\n]*{named}[^\n]* anew\.$"):
            read()


def test_all_records_of_a_folder_are_read_by_name_in_order(tmp_path):
    assert load_all(folder=tmp_path) == load_all(folder=tmp_path / "none") == {}
    made = [a_record(what=what, device=device) for what in ("speed", "memory") for device in ("Z1", "A2", "M3")]
    for record in made:
        write(record, tmp_path)
    (tmp_path / "README.md").write_text("not a record")
    (tmp_path / ".a2-memory.json").write_text("what a killed write leaves")
    found = load_all(folder=tmp_path)
    assert list(found) == ["a2-memory", "a2-speed", "m3-memory", "m3-speed", "z1-memory", "z1-speed"]
    assert all(record in made and record.name == name for name, record in found.items())
    assert list(load_all("speed", tmp_path)) == ["a2-speed", "m3-speed", "z1-speed"]
    assert load_all("quality", tmp_path) == {}


# Where they are kept


def test_a_checkout_keeps_them_in_its_own_folder(tmp_path, monkeypatch):
    assert records.shipped() == ROOT / "records"
    monkeypatch.setattr(records, "__file__", str(tmp_path / "lora_lab" / "studies" / "records.py"))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "lora_lab" / "system" / "provenance.py"))
    assert load_all() == {}
    assert write(a_record(), records.destination()) == tmp_path / "records" / "nvidia-h100-80gb-hbm3-memory.json"
    assert list(load_all()) == ["nvidia-h100-80gb-hbm3-memory"]


def test_an_installed_package_brings_them_along_and_is_not_written_into(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "lora_lab"
    write(a_record(), package / "recorded")
    write(a_record(what="foreign"), tmp_path / "site-packages" / "records")  # another package may be called so
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(records, "__file__", str(package / "studies" / "records.py"))
    assert records.shipped() == package / "recorded"
    assert list(load_all()) == ["nvidia-h100-80gb-hbm3-memory"]
    path = write(a_record(what="speed"), records.destination())
    assert path.resolve() == tmp_path / "work" / "records" / "nvidia-h100-80gb-hbm3-speed.json"
    assert list(load_all()) == ["nvidia-h100-80gb-hbm3-memory"]


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Intel(R) Xeon(R) Processor, 2 cores", "intel-xeon-processor-2-cores"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("Apple M2, 8 cores, mps", "apple-m2-8-cores-mps"),
        ("  x86_64 / ../Ω ", "x86-64"),
    ],
)
def test_names_of_devices_become_names_of_files(name, expected):
    assert provenance.slug(name) == expected
    assert a_record(device=name).name == f"{expected}-memory"


@pytest.fixture
def pretend(monkeypatch):
    """Gives the machine a CPU of the given name with the given cores, and a GPU."""

    def machine(cpu, cores):
        def told(device):
            return {"cpu": f"{cpu}, {cores} logical cores, 3 torch threads", "device": str(device)}

        for module in (provenance, records):
            monkeypatch.setattr(module, "machine_info", told)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 {device.index}")

    return machine


def test_a_cpu_is_named_with_its_cores_and_a_gpu_as_its_maker_does(pretend):
    pretend("Intel(R) Xeon(R) Processor", 2)
    assert provenance.device_name(CPU) == "Intel(R) Xeon(R) Processor, 2 cores"
    assert provenance.device_name(torch.device("cuda:1")) == "NVIDIA H100 1"
    pretend("Apple M2", 8)
    assert provenance.device_name(torch.device("mps")) == "Apple M2, 8 cores, mps"


# Provenance


def test_a_new_record_says_where_when_and_by_which_code():
    before = datetime.now(UTC).date()
    record = records.new("speed", [{"step_s": 0.5}], {"steps": 3}, "lora-lab record speed", CPU, COMMIT)
    assert before <= datetime.fromisoformat(record.date).date() <= datetime.now(UTC).date()
    assert record == Record(
        what="speed",
        device=provenance.device_name(CPU),
        facts=machine_info(CPU),
        commit=COMMIT,
        date=record.date,
        command="lora-lab record speed",
        settings={"steps": 3},
        rows=[{"step_s": 0.5}],
    )
    assert "driver" not in record.facts


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 570.86.15; echo 570.86.15", "570.86.15"), ("echo failed >&2; exit 9", "unknown"), (None, "unknown")],
)
def test_on_cuda_the_driver_is_noted(pretend, monkeypatch, tmp_path, script, expected):
    pretend("Intel(R) Xeon(R) Processor", 2)
    if script:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    record = records.new("memory", [{"a": 1}], {}, "lora-lab record memory", torch.device("cuda:0"), COMMIT)
    assert record.facts["driver"] == expected
    assert record.name == "nvidia-h100-0-memory"


# What others measured


def test_published_numbers_have_a_source_a_version_a_day_and_a_licence():
    licences = {name: records.published(name).licence for name in ("peft-metamathqa", "torchtune", "litgpt")}
    assert licences == {"peft-metamathqa": "Apache-2.0", "torchtune": "BSD-3-Clause", "litgpt": "Apache-2.0"}
    for path in (ROOT / "records" / "published").iterdir():
        found = records.published(path.stem)
        assert found.source.startswith("github.com/")
        assert re.fullmatch("[0-9a-f]{40}", found.commit)
    rows = {row["experiment"]: row for row in records.published("peft-metamathqa").rows}
    assert round(rows["lora/llama-3.2-3B-rank32"]["tokens_per_second"]) == 7194
    assert round(rows["full-finetuning/llama-3.2-3B-lr_0.00001"]["mean_allocated_bytes"] / 1e9, 2) == 26.06


@pytest.mark.parametrize("changes", [{"commit": 1}, {"date": "2026"}, {"rows": [{"a": math.inf}]}, {"note": "by hand"}])
def test_published_numbers_that_do_not_conform_are_refused(tmp_path, changes):
    whole = json.loads((ROOT / "records" / "published" / "torchtune.json").read_text(encoding="utf-8"))
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "theirs.json").write_text(json.dumps(whole | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"theirs\.json is not a file of published .*{next(iter(changes))}.* anew\.$"):
        records.published("theirs", tmp_path)
