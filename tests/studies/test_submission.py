"""What is a whole record: those that are here, and none of which something is missing."""

import json
import re

import pytest

from lora_lab.studies.submission import check
from tests.helpers import COMMIT, ROOT, command, error_line

RECORDS = sorted((ROOT / "records").glob("*.json"))
MEMORY = ROOT / "records" / "intel-xeon-processor-2-cores-memory.json"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_records_that_are_here_are_whole(path):
    assert check(path).name == path.stem


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
    ({"date": "9999-12-31"}, "9999-12-31"),
    ({"command": "lora-lab record memory --models small"}, "--models small'"),
    ({"settings": {"setups": {"full": {}, "IA3": {}}}}, "no row of IA3"),
    ({"settings": {"docs": {"setups": {"full": {}}}}}, "no row of full on docs"),
    (without("model"), "the claim .*'model'"),
    ({"rows": []}, "rows.*at least 1 item"),
    ({"schema": 2}, "schema"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED)
def test_a_broken_record_is_refused_and_what_is_wrong_is_named(tmp_path, changes, named):
    path = write(tmp_path, changes)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} [^\n]*{named}[^\n]*; [^\n]*\\.$"):
        check(path)


def test_what_would_be_refused_is_not_if_nothing_is_changed(tmp_path):
    assert check(write(tmp_path, {})).what == "memory"
    facts = of_a_gpu(gpu="NVIDIA H100 80GB HBM3, 79 GiB, CUDA 12.8", driver="570.1")
    device = {"device": "NVIDIA H100 80GB HBM3"}
    assert check(write(tmp_path, facts | device, "nvidia-h100-80gb-hbm3-memory.json")).device == device["device"]
    assert check(write(tmp_path, {"settings": {"setups": ["full", "LoRA r=8"]}})).rows


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
