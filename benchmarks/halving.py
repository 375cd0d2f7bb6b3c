"""What stopping learning rates early saves, and whether the verdicts stay the same.

    python benchmarks/halving.py [--only records studies ablation] [--folder runs/halving]

    records    replays of the records that ship, as far as they hold curves
    studies    digits and planted ranks, with a decaying and a constant rate: two draws of 5 ranks x 4 rates x 5 seeds
               train to the end (a minute), and are replayed by several rules; the defaults were chosen on the first
    ablation   the record of ranks on SmolLM2-135M holds no curves: the trials of its first seed train again with
               halving (half an hour; a run that was stopped continues), and its other seeds count at the rates left

A share of steps is of the whole grid: all rates with all seeds. "Rates" counts the groups with the same chosen rate.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import common
import pandas

from lora_lab import records
from lora_lab.ablation import Halving, RankVerdict, ablate, overfitting, smallest_sufficient_rank, studies
from lora_lab.ablation.compare import best_rates
from lora_lab.ablation.halving import replay, share_of_steps
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


def rules(margin: float, **options: bool) -> dict[str, Halving]:
    """The rules that are compared, by name, for a verdict with a margin."""
    return {
        "all seeds choose": Halving(**options),
        "three seeds choose": Halving(choose=3, **options),
        "one seed, slack = margin": Halving(choose=1, slack=margin, **options),
        "one seed": Halving(choose=1, **options),
        "no noise, no trend": Halving(cautious=False, **options),
        "the same, from a tenth": Halving(rungs=[0.1], cautious=False, **options),
    }


def of_studies() -> None:
    """Small nets, in full and replayed."""
    for draw, study, schedule in itertools.product(DRAWS, ("digits", "planted"), ("cosine", "constant")):
        model, task = studies.study(study)
        margin, (ranks, seeds) = studies.defaults_of(study).margin, DRAWS[draw]
        trials = studies.grid(study, "lora", ranks, None, seeds, alpha_per_rank=2, schedule=schedule)
        frame = ablate(model, task, trials, engine="packed", progress=False)
        whole = smallest_sufficient_rank(frame, margin)
        print(f"\n{study}, {schedule}, {draw} draw: {len(trials)} trials of {trials[0].steps} steps: {whole.answer}")
        for name, rule in rules(margin).items():
            less = replay(frame, rule)
            compare(name, whole, smallest_sufficient_rank(less, margin), share_of_steps(less))


def of_records() -> None:
    """The shipped records."""
    group = ["n_train", "setup"]
    margin = studies.defaults_of("docs").margin
    of_one_seed = {
        "one seed, slack = margin",
        "one seed",
        "no noise, no trend",
    }  # the record has one seed at most rates
    for name, record in records.load_all("overfitting").items():
        frame, seeds = record.frame(), record.settings["seeds"]
        rates = {setup: len(settings["lrs"]) for setup, settings in record.settings["setups"].items()}
        groups = frame.drop_duplicates(group)
        full = sum(rates[row.setup] * seeds * row.steps for row in groups.itertuples())
        taken = frame.drop_duplicates([*group, "lr", "seed"])["steps"].sum()
        print(f"\n{name}: all rates on one seed and the best one on {seeds}, {taken / full:.1%} of the grid's steps")
        whole = best_rates(frame).merge(overfitting.summarise_trials(frame))
        for rule_name, rule in rules(margin, best_so_far=True).items():
            if rule_name not in of_one_seed:
                continue
            less = replay(frame, replace(rule, choose=1), group)
            best = best_rates(less).merge(overfitting.summarise_trials(less))
            same = len(whole[[*group, "lr"]].drop_duplicates().merge(best[[*group, "lr"]].drop_duplicates()))
            # The record has the other seeds at its own best rate only, so another rate leaves no verdict.
            verdicts = "the same verdicts" if whole.equals(best) else "ANOTHER RATE, so no verdict"
            share = share_of_steps(less) * taken / full
            print(f"  {rule_name:<26}{share:6.1%} of the steps: {verdicts}, rates {same}/{len(groups)}")
    for name, record in (records.load_all("ablation") | records.load_all("downstream")).items():
        print(
            f"\n{name}: {record.settings['seeds']} seeds; no losses between the first step and the last, so no replay"
        )


def of_ablation(folder: Path) -> None:
    """The rates of the record of ranks, chosen again on its first seed."""
    device, margin = pick_device()[0], studies.defaults_of("docs").margin
    planned, whole = spectra.plan(device), records.load_all("ablation")["amd-epyc-2-cores-ablation"].frame()
    options = {name: planned[name] for name in ("steps", "batch_size", "eval_examples")}
    options |= {"alpha_per_rank": 2, "eval_every": planned["steps"] // 10}
    model, task = studies.study("docs", planned["seq_len"], device)
    grids = [studies.grid("docs", "lora", [int(rank)], lrs, [0], **options) for rank, lrs in planned["lrs"].items()]
    trials = list(itertools.chain.from_iterable(grids))
    frame = ablate(model, task, trials, folder, n_jobs=studies.processes(device), halving=Halving(slack=margin))
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
    parser.add_argument("--only", nargs="+", choices=["records", "studies", "ablation"], default=["records", "studies"])
    parser.add_argument("--folder", type=Path, default=Path("runs/halving"))
    options = parser.parse_args()
    common.print_machine()
    if "records" in options.only:
        of_records()
    if "studies" in options.only:
        of_studies()
    if "ablation" in options.only:
        of_ablation(options.folder)


if __name__ == "__main__":
    main()
