"""What stopping learning rates early saves, and whether the verdicts stay the same.

    python benchmarks/halving.py [--only studies ablation] [--folder runs/halving]

    studies    digits and planted ranks, with a decaying and a constant rate: two draws of 5 ranks x 4 rates x 5 seeds
               train to the end (a minute), and are replayed by several rules; the defaults were chosen on the first
    ablation   the record of ranks on SmolLM2-135M holds no curves: the trials of its first seed train again with
               halving (half an hour; a run that was stopped continues), and its other seeds count at the rates left

A share of steps is of the whole grid: all rates with all seeds. "Rates" counts the groups with the same chosen rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import common
import pandas

from lora_lab import records
from lora_lab.ablation import Halving, RankVerdict, Trial, ablate, materials, smallest_sufficient_rank
from lora_lab.ablation.halving import PAUSED, next_round
from lora_lab.studies import spectra
from lora_lab.system.device import pick_device

DRAWS = {"first": ([1, 2, 4, 8, 16], range(5)), "second": ([1, 3, 6, 12, 24], range(10, 15))}  # ranks and seeds


def compare(name: str, whole: RankVerdict, less: RankVerdict, share: float) -> None:
    """Print a line: the share of steps, and what of the verdict is the same."""
    rates = sum(a.lr == b.lr for a, b in zip(whole.ranks, less.ranks, strict=True))
    statuses = sum(a.status == b.status for a, b in zip(whole.ranks, less.ranks, strict=True))
    answer = "the same answer" if whole.rank == less.rank else f"ANOTHER ANSWER ({less.answer}, not {whole.answer})"
    count = len(whole.ranks)
    print(
        f"  {name:<26}{share:6.1%} of the steps: {answer}, statuses {statuses}/{count}, rates {rates}/{count}",
        flush=True,
    )


def replay(frame: pandas.DataFrame, trials: Sequence[Trial], halving: Halving) -> pandas.DataFrame:
    """Return the frame that ``ablate`` would have returned with ``halving``, from one without."""
    identity = {"task": frame["task"].iloc[0], "model": frame["model"].iloc[0]}
    trials = [dataclasses.replace(trial, **identity) for trial in trials]
    rows_of, results = dict(iter(frame.groupby("key"))), {}
    last = dict.fromkeys(trials, 0)  # the step to which each has trained
    due, stopped = next_round(halving, trials, results)
    while due:
        for until, trial in [(until, trial) for until, waiting in due.items() for trial in waiting]:
            rows = rows_of[trial.key]
            last[trial] = trial.steps if until is None else until
            seen = rows[rows["step"] <= last[trial]].to_dict("records")
            outcome = rows["outcome"].iloc[0] if until is None or not seen else PAUSED
            results[trial.key] = {"outcome": outcome, "history": {"rows": seen}}
        due, stopped = next_round(halving, trials, results)
    parts = []
    for trial in trials:
        rows = rows_of[trial.key]
        if trial in stopped:
            rows = rows[rows["step"] <= last[trial]]
            rows = rows.assign(outcome="stopped", reason=stopped[trial], test_loss=math.nan)
        parts.append(rows)
    return pandas.concat(parts, ignore_index=True)


def share_of_steps(frame: pandas.DataFrame) -> float:
    """Return the steps that trials took, as a share of those that they were to take; failed ones count in full."""
    taken = frame["step"].where(frame["outcome"] == "stopped", frame["steps"])
    last = frame.assign(taken=taken.fillna(0)).groupby("key")[["taken", "steps"]].max()
    return float(last["taken"].sum() / last["steps"].sum())


def rules(margin: float) -> dict[str, Halving]:
    """The rules that are compared, by name, for a verdict with a margin."""
    return {"no slack": Halving(), "slack = margin": Halving(slack=margin)}


def of_studies() -> None:
    """Small nets, in full and replayed."""
    for draw, study, schedule in itertools.product(DRAWS, ("digits", "planted"), ("cosine", "constant")):
        model, task = materials.get(study)
        margin, (ranks, seeds) = materials.defaults_of(study).margin, DRAWS[draw]
        trials = materials.grid(study, "lora", ranks, None, seeds, alpha_per_rank=2, schedule=schedule)
        frame = ablate(model, task, trials, engine="packed", progress=False)
        whole = smallest_sufficient_rank(frame, margin)
        print(f"\n{study}, {schedule}, {draw} draw: {len(trials)} trials of {trials[0].steps} steps: {whole.answer}")
        for name, rule in rules(margin).items():
            less = replay(frame, trials, rule)
            compare(name, whole, smallest_sufficient_rank(less, margin), share_of_steps(less))


def of_ablation(folder: Path) -> None:
    """The rates of the record of ranks, chosen again on its first seed."""
    device, margin = pick_device()[0], materials.defaults_of("docs").margin
    planned, whole = spectra.plan(device), records.load_all("ablation")["amd-epyc-2-cores-ablation"].frame()
    options = {name: planned[name] for name in ("steps", "batch_size", "eval_examples")}
    options |= {"alpha_per_rank": 2, "eval_every": planned["steps"] // 10}
    model, task = materials.get("docs", planned["seq_len"], device)
    grids = [materials.grid("docs", "lora", [int(rank)], lrs, [0], **options) for rank, lrs in planned["lrs"].items()]
    trials = list(itertools.chain.from_iterable(grids))
    frame = ablate(model, task, trials, folder, n_jobs=materials.processes(device), halving=Halving(slack=margin))
    chosen = frame[frame["outcome"] == "done"][["rank", "lr"]].drop_duplicates().assign(left=True)
    left = whole.merge(chosen, "left", ["rank", "lr"])["left"].notna()
    out = whole[~left & (whole["step"] == 0)].assign(outcome="stopped")
    total = len(trials) * planned["seeds"]
    share = (share_of_steps(frame) * len(trials) + len(chosen) * (planned["seeds"] - 1)) / total
    print(f"\nThe record of ranks on SmolLM2-135M, margin {margin:g}")
    verdicts = [smallest_sufficient_rank(each, margin) for each in (whole, pandas.concat([whole[left], out]))]
    compare("one seed, slack = margin", *verdicts, share)


def main() -> None:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["studies", "ablation"], default=["studies"])
    parser.add_argument("--folder", type=Path, default=Path("runs/halving"))
    options = parser.parse_args()
    common.print_machine()
    if "studies" in options.only:
        of_studies()
    if "ablation" in options.only:
        of_ablation(options.folder)


if __name__ == "__main__":
    main()
