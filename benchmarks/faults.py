"""What a sweep survives, and how large a folder of results may be.

    python benchmarks/faults.py workers    one of two Dask workers is killed every 10 seconds (--seconds)
    python benchmarks/faults.py disk       the disk is full in mid-sweep (Linux, as root)
    python benchmarks/faults.py users      two users at once, in one folder and one cache (Linux, as root)
    python benchmarks/faults.py sleep      all processes of a sweep stop for 60 seconds (--seconds), and go on
    python benchmarks/faults.py trials     seconds to load 1,000 and 10,000 trials (--count)
    python benchmarks/faults.py table      seconds and memory to load 200 MB of trials (--megabytes)

The first four compare the table of the disturbed sweep with that of an undisturbed one, and raise AssertionError if
a number differs. Folders are made in the system's folder for temporary files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import joblib
import pandas
import torch

import lora_lab as ll
from lora_lab.ablation import Grid, ablate, load
from lora_lab.ablation.run import fingerprint
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.pretrained import FILE, cache_folder
from lora_lab.system.device import peak_bytes, run_in_subprocess
from lora_lab.system.files import write_json

VARYING = ["seconds", "date", "engine", "commit"]
USERS = (65533, 65534)  # of the system; they own no files


def sweep(folder: Path | None, steps: int = 600, **options: Any) -> pandas.DataFrame:
    """The sweep that is disturbed: 40 trials of a small net, each of which takes seconds."""
    trials = Grid([1, 2, 4, 8, 16], [1e-2], range(8), steps=steps, batch_size=32)
    task = ll.tasks.digits().limited(200)
    return ablate(DigitsMLP(width=32), task, trials, folder, engine="separate", progress=False, **options)


def check_same(frame: pandas.DataFrame, expected: pandas.DataFrame, what: str) -> None:
    """Raise AssertionError if a number of the two tables differs."""
    pandas.testing.assert_frame_equal(frame.drop(columns=VARYING), expected.drop(columns=VARYING))
    print(f"{what}: {frame['key'].nunique()} trials, every number as in an undisturbed sweep", flush=True)


def of_workers(folder: Path, arguments: argparse.Namespace) -> None:
    """Kill one of the two workers of a Dask cluster, the one and the other in turn, until the sweep has ended."""
    from distributed import Client, LocalCluster

    expected, killed, ended = sweep(None, steps=1500, n_jobs=2), [], threading.Event()
    options: dict[str, Any] = {"dashboard_address": None, "memory_limit": 0}
    with LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster, Client(cluster) as client:

        def kill_in_turn() -> None:
            for name in itertools.cycle(list(cluster.workers)):
                if ended.wait(arguments.seconds):
                    break
                killed.append(cluster.workers[name].pid)  # its nanny starts another worker
                os.kill(killed[-1], signal.SIGKILL)

        killer = threading.Thread(target=kill_in_turn)
        killer.start()
        started, frame = time.perf_counter(), None
        try:
            while frame is None:
                try:
                    with joblib.parallel_config(backend="dask", client=client):
                        frame = sweep(folder, steps=1500, timeout_s=300)
                except RuntimeError as error:  # a trial has lost four workers, and Dask has given it up
                    print(f"after {len(list(folder.glob('*.json')))} results: {error}", flush=True)
        finally:
            ended.set()
            killer.join()
    print(f"{len(killed)} workers killed in {time.perf_counter() - started:.0f} s")
    check_same(frame, expected, "workers")
    check_same(load(folder), expected, "workers, the folder")


def of_disk(folder: Path, arguments: argparse.Namespace) -> None:
    """Run the sweep on a disk with room for about half of its results, and once more when there is room."""
    expected = sweep(None, n_jobs=2)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=True)
    try:
        try:
            sweep(folder / "runs", n_jobs=2)
            raise AssertionError("The disk was not full.")
        except OSError as error:
            print(f"{type(error).__name__}: {error}")
        before = {path.name: path.read_bytes() for path in (folder / "runs").iterdir()}
        assert {Path(name).suffix for name in before} == {".json"}
        print(f"{load(folder / 'runs')['key'].nunique()} results are there, and no other file")
        subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
        check_same(sweep(folder / "runs", n_jobs=2), expected, "disk")
        assert all((folder / "runs" / name).read_bytes() == content for name, content in before.items())
    finally:
        subprocess.run(["umount", folder], check=True)


def of_users(folder: Path, arguments: argparse.Namespace) -> None:
    """Let two users of one group load SmolLM2 from one cache at once, and run the same sweep at once in one folder."""
    expected = sweep(None, n_jobs=2)
    for name in ("runs", "cache"):
        (folder / name).mkdir()
        (folder / name).chmod(0o2777)
    shutil.copy(cache_folder() / FILE, folder / "cache")
    folder.chmod(0o755)
    processes = [multiprocessing.get_context("spawn").Process(target=as_user, args=(user, folder)) for user in USERS]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    check_same(load(folder / "runs"), expected, "users")
    print("results by user:", dict(Counter(path.stat().st_uid for path in (folder / "runs").iterdir())))


def as_user(user: int, folder: Path) -> None:
    """Load the model and run the sweep as a user, after all has been imported that the user may not be able to read."""
    sweep(None, steps=1)
    ll.load_pretrained(device="cpu")
    os.setgroups([])
    os.setgid(USERS[0])
    os.setuid(user)
    os.umask(0o002)
    os.environ["LORA_LAB_CACHE"] = str(folder / "cache")
    ll.load_pretrained(device="cpu")
    print(f"user {user} has loaded the model and begins", flush=True)
    sweep(folder / "runs")


def of_sleep(folder: Path, arguments: argparse.Namespace) -> None:
    """Stop the process of a sweep and its two workers, and let them go on after a while."""
    expected = sweep(None, n_jobs=2)
    command = [sys.executable, __file__, "sweep", "--folder", str(folder)]
    process = subprocess.Popen(command, start_new_session=True)
    while len(list(folder.glob("[!.]*.json"))) < 5:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGSTOP)
    count = len(list(folder.glob("*.json")))
    time.sleep(arguments.seconds)
    assert len(list(folder.glob("*.json"))) == count
    os.killpg(process.pid, signal.SIGCONT)
    print(f"Stopped for {arguments.seconds:g} s after {count} results; exit status {process.wait()}")
    check_same(load(folder), expected, "sleep")


def clones(folder: Path, count: int, steps: int) -> float:
    """Write results of so many trials that differ in their seeds, with the numbers of one; returns their megabytes."""
    model, task = DigitsMLP(width=32), ll.tasks.digits().limited(200)
    (first,) = Grid([4], [1e-2], [0], steps=steps, batch_size=32)
    ablate(model, task, [first], folder, progress=False)
    first = replace(first, task=task.fingerprint, model=fingerprint(model))
    result = json.loads((folder / f"{first.key}.json").read_text(encoding="utf-8"))
    for seed in range(1, count):
        trial = replace(first, seed=seed)
        (folder / f"{trial.key}.json").write_text(
            json.dumps(result | {"key": trial.key, "trial": trial.to_dict()}, sort_keys=True) + "\n", encoding="utf-8"
        )
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def loaded(folder: Path) -> tuple[float, int, int, int]:
    """Seconds to load a folder, the rows of its table, and this process's peak memory before and after, in bytes."""
    cpu = torch.device("cpu")
    load(Path(__file__).parents[1] / "tests" / "data" / "sweep")  # imports pandas
    before, started = peak_bytes(cpu), time.perf_counter()
    frame = load(folder)
    return time.perf_counter() - started, len(frame), before, peak_bytes(cpu)


def run_again(folder: Path, count: int, steps: int) -> float:
    """Seconds of a sweep whose trials have all been run."""
    trials = Grid([4], [1e-2], range(count), steps=steps, batch_size=32)
    started = time.perf_counter()
    ablate(DigitsMLP(width=32), ll.tasks.digits().limited(200), trials, folder, progress=False)
    return time.perf_counter() - started


def written(folder: Path) -> float:
    """Milliseconds to write a small file into a folder with so many."""
    started = time.perf_counter()
    for number in range(100):
        write_json(folder / f"{number}.txt", {"number": number})
    return (time.perf_counter() - started) * 10


def of_trials(folder: Path, arguments: argparse.Namespace) -> None:
    """Print the seconds for each number of trials, in a fresh process each."""
    for count in arguments.count:
        place = folder / str(count)
        megabytes = clones(place, count, steps=20)
        seconds, rows, before, after = run_in_subprocess(loaded, place)
        again = run_in_subprocess(run_again, place, count, 20)
        print(
            f"{count} trials, {megabytes:.0f} MB: loaded in {seconds:.2f} s ({rows} rows, {(after - before) / 1e6:.0f} "
            f"MB of memory), run again in {again:.2f} s, a file more in {written(place):.1f} ms",
            flush=True,
        )


def of_table(folder: Path, arguments: argparse.Namespace) -> None:
    """Print the seconds and the memory."""
    steps = 200
    one = clones(folder / "one", 1, steps)
    count = round(arguments.megabytes / one)
    megabytes = clones(folder / "all", count, steps)
    seconds, rows, before, after = run_in_subprocess(loaded, folder / "all")
    print(
        f"{count} trials of {steps} steps, {megabytes:.0f} MB: loaded in {seconds:.1f} s ({rows} rows), with "
        f"{(after - before) / 1e6:.0f} MB of memory more than the {before / 1e6:.0f} MB of the process"
    )


FAULTS = {
    "workers": of_workers,
    "disk": of_disk,
    "users": of_users,
    "sleep": of_sleep,
    "trials": of_trials,
    "table": of_table,
}


def main() -> None:
    """Run one of the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=[*FAULTS, "sweep"])
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--count", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--folder", type=Path, help="of the sweep that is run in a process of its own")
    arguments = parser.parse_args()
    if arguments.fault == "sweep":
        sweep(arguments.folder, n_jobs=2)
        return
    arguments.seconds = arguments.seconds or {"workers": 10, "sleep": 60}.get(arguments.fault)
    common.print_machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        FAULTS[arguments.fault](Path(folder), arguments)


if __name__ == "__main__":
    main()
