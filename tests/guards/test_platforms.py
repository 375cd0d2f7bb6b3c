"""What other systems and settings change: encodings, names of files, a home that cannot be written to."""

import ast
import json
import os
import subprocess
import sys

import pytest

from lora_lab import Llama, LoRA, save_model
from lora_lab.ablation.grid import Trial
from lora_lab.system.provenance import slug
from tests.helpers import ROOT, names

SOURCES = sorted((ROOT / "lora_lab").rglob("*.py"))
OPENING = {"open", "read_text", "write_text"}
RESERVED = {"con", "prn", "aux", "nul", *(f"{device}{i}" for device in ("com", "lpt") for i in range(10))}
SCRIPT = """
import sys
from lora_lab.cli import main
folder, text = sys.argv[1:]
model = ["--model", folder + "/model", "--device", "cpu"]
task = ["--task", folder + "/mine.jsonl", "--out", folder + "/adapter", "--rank", "2", "--steps", "2", "--batch", "2"]
status = [main(["finetune", *task, "--eval-examples", "2", *model])]
status += [main(["chat", text, "--temperature", "0", *model]), main(["chat", "--tokens", "2", *model])]
status += [main(["chat", "The model is not here.", "--plain"])]
print("status", *status)
"""


def without_encoding(source):
    """The lines of a source that open a text file in the encoding of the system."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and not any(keyword.arg == "encoding" for keyword in node.keywords):
            function = node.func
            method = isinstance(function, ast.Attribute) and function.attr in OPENING - {"open"}
            plain = isinstance(function, ast.Name) and function.id == "open"
            if method or (plain and not any("b" in str(getattr(mode, "value", "")) for mode in node.args[1:2])):
                yield ast.unparse(node)


def test_every_file_is_opened_with_its_encoding():
    opened = {path.name: lines for path in SOURCES if (lines := [*without_encoding(path.read_text(encoding="utf-8"))])}
    assert opened == {}
    assert [*without_encoding("open(p); open(p, 'rb'); p.read_text(); p.write_text('', encoding='utf-8')")] == [
        "open(p)",
        "p.read_text()",
    ]


@pytest.fixture
def ascii_alone(tmp_path):
    """An environment whose encoding has no letters but ASCII's, and whose home cannot be written to."""
    (tmp_path / "file").write_text("no folder")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON", "XDG_"))}
    changes = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:surrogateescape", "PYTHONPATH": str(ROOT)}
    return kept | changes | {"HOME": str(tmp_path / "file" / "home"), "LORA_LAB_CACHE": "", "OMP_NUM_THREADS": "1"}


def test_the_help_is_shown_in_ascii_too(ascii_alone):
    call = [sys.executable, "-m", "lora_lab", "finetune", "--help"]
    done = subprocess.run(call, env=ascii_alone, capture_output=True, check=True)
    assert b"--allow-special" in done.stdout
    assert done.stderr == b""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="names of files and arguments are in Unicode there")
@pytest.mark.skipif(not sys.prefix.isascii(), reason="torch cannot be imported from such a folder there")
def test_m8_a_fine_tuning_in_a_folder_of_any_name_where_the_system_knows_ascii_alone(
    ascii_alone, tmp_path, tiny_config, chatter
):
    folder = tmp_path / "mein Ördner ü 東"
    save_model(Llama(tiny_config, seed=1).eval(), folder / "model", chatter)
    rows = [{"prompt": f"größe {i} 東?", "answer": f"é{i}\u2028"} for i in range(12)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "mine.jsonl").write_text(lines, encoding="utf-8")
    call = [sys.executable, "-c", SCRIPT, str(folder).encode(), b"gr\xf6sse"]
    done = subprocess.run(call, env=ascii_alone, capture_output=True, input=b"gr\xf6sse\nhi\n")
    printed, errors = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert printed.endswith("status 0 1 0 1\n"), errors
    assert names(folder / "adapter") == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "history.json",
        "result.json",
    ]
    assert "gr\\xf6\\xdfe" in printed
    assert "lora-lab: A text holds '\\udcf6', which is half a character" in errors  # the argument
    assert "base> A text holds '\\udcf6', which is half a character" in printed  # the question
    assert errors.count("Traceback") == 0
    assert "lora-lab cannot be written to" in errors.replace("lora_lab", "lora-lab")
    assert "LORA_LAB_CACHE names it" in errors


def test_names_of_files_suit_windows_and_systems_that_ignore_capitals():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = listed.rstrip("\0").split("\0")
    assert len({path.casefold() for path in paths}) == len(paths)
    for part in {part for path in paths for part in path.split("/")}:
        assert not set(part) & set('<>:"|?*\\'), part
        assert not part.endswith((".", " ")), part
        assert part.split(".")[0].lower() not in RESERVED, part
    key = Trial(LoRA(2), 1e-3, steps=1).key
    assert key == key.lower()
    assert slug('Some "CPU" <1>: 2 Cores? / GPU') == "some-cpu-1-2-cores-gpu"
