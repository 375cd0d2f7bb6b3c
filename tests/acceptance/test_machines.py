"""Other machines than a laptop: two processes, a Dask cluster, a GPU, no network, an empty environment."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv

import joblib
import pytest
import torch

import lora_lab as ll
from lora_lab.models.digits import DigitsMLP
from tests.acceptance import ROOT

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def python(*arguments, **options):
    call = [sys.executable, *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True, env=ENVIRONMENT | options.pop("env", {}), **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Several processes


@pytest.mark.slow
def test_two_processes_under_torchrun_train_as_one_does(lora_lab, stranger, sums, tmp_path):
    options = ["--steps", 6, "--batch", 5, "--eval-examples", 4, "--lr", 0.01, "--device", "cpu"]
    arguments = ["finetune", "--task", sums, "--model", stranger, *options]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "lora_lab"]
    printed = python(*torchrun, *arguments, "--out", tmp_path / "two", cwd=tmp_path)
    assert printed.count("Saved in") == 1
    lora_lab(*arguments, "--out", tmp_path / "one")
    two, one = (json.loads((tmp_path / name / "history.json").read_text())["rows"] for name in ("two", "one"))
    for name in ("train_loss", "validation_loss", "grad_norm"):
        assert [row[name] for row in two[1:]] == pytest.approx([row[name] for row in one[1:]], rel=1e-4)
    assert two[-1]["validation_loss"] < two[0]["validation_loss"]


def sweep(**options):
    grid = ll.Grid([1, 2], [1e-2], range(2), [ll.LoRA()], steps=3)
    frame = ll.ablate(lambda: DigitsMLP(width=8), ll.tasks.digits("adapt"), grid, progress=False, **options)
    return frame[["rank", "seed", "step", "train_loss", "validation_loss", "test_loss"]]


@pytest.mark.slow
def test_a_sweep_on_a_dask_cluster_gives_what_one_process_gives():
    distributed = pytest.importorskip("distributed")
    settings = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with distributed.LocalCluster(**settings, memory_limit=0) as cluster, distributed.Client(cluster) as client:
        with joblib.parallel_config(backend="dask", client=client):
            found = sweep(engine="separate")
        assert len(client.scheduler_info()["workers"]) == 2
    expected = sweep(engine="separate", n_jobs=1)
    assert found.equals(expected)
    assert expected["validation_loss"].nunique() > 4


# A GPU


def test_make_lab_gpu_runs_every_lesson_at_full_effort_on_cuda():
    recipe = subprocess.run(["make", "-n", "lab-gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in recipe.splitlines() if "pytest" in line]
    for text in ("LORA_LAB_DEVICE=cuda", "LORA_LAB_EFFORT=full", "--nbval-lax"):
        assert text in line
    assert line.split()[-1] == "notebooks"


def test_a_gpu_that_is_asked_for_and_not_there_is_a_sentence(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("LORA_LAB_DEVICE", "cuda")
    with pytest.raises((ValueError, RuntimeError), match="cuda"):
        ll.device.pick_device()


# No network

OFFLINE = """
import socket, sys

def refuse(*_, **__):
    raise AssertionError("something asks for the network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import lora_lab as ll
from lora_lab.cli import main

assert main(["fetch"]) == 0
assert main(["chat", "A story:", "--adapter", str(ll.adapters.shipped("lighthouse-keeper")), "--tokens", "8"]) == 0
model, tokenizer = ll.load_pretrained(device="cpu")
task = ll.tasks.docs(tokenizer, seq_len=16)
ll.fit(model, task, ll.LoRA(rank=2), steps=1, lr=1e-3, batch_size=1, eval_examples=1)
assert main(["course", "mine", "--only", "01"]) == 0
assert ll.tasks.digits("adapt").train and ll.tasks.sentiment(tokenizer).train
"""


@pytest.mark.slow
def test_everything_works_offline_with_a_filled_cache(lora_lab, tmp_path):
    lora_lab("fetch")
    python("-c", OFFLINE, cwd=tmp_path)
    assert (tmp_path / "mine" / "01_low_rank.ipynb").is_file()


# An empty environment


@pytest.mark.slow
def test_the_wheel_holds_all_that_the_package_needs(tmp_path):
    """The checkout is not on the path; the libraries are those of this environment."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "*.egg-info", "__pycache__", "runs", "my_lessons")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    name = python("-c", build, tmp_path, cwd=source, env={"PYTHONPATH": ""}).split()[-1]
    venv.create(tmp_path / "empty", with_pip=False)
    site = next((tmp_path / "empty").rglob("site-packages"))
    shutil.unpack_archive(tmp_path / name, site, "zip")
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries), encoding="utf-8")
    call = [tmp_path / "empty" / "bin" / "python", ROOT / ".ci" / "smoke.py"]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"lora_lab {re.escape(ll.__version__)} in {re.escape(str(site))}", done.stdout)
