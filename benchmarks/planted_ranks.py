"""How often does ``lora-lab rank`` find a rank that is known?

    python benchmarks/planted_ranks.py [--seeds 20]    # an hour on two cores

For each seed and each of the ranks 1, 4 and 16 an update of that rank is hidden in a net, and ``find_rank`` looks for
it among 1, 4, 16 and 64, as the command does. The aim: 18 of 20 right or open at each rank, and none of the others far.
A table says how many answers were right, open, too low and too high.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter

import common
import torch
from tqdm import tqdm

from lora_lab import tasks
from lora_lab.ablation.rank_search import find_rank
from lora_lab.models.digits import DigitsMLP

RANKS, PLANTED = (1, 4, 16, 64), (1, 4, 16)
RUNS = {"lr": 8e-3, "steps": 600, "batch_size": 32, "margin": 0.005, "seeds": 5, "n_jobs": 2, "progress": False}


def judge(found: int | None, planted: int) -> str:
    """Return how an answer compares with the rank that was planted."""
    return "open" if found is None else "right" if found == planted else "too low" if found < planted else "too high"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    count = parser.parse_args().seeds
    common.print_machine()
    answers = {planted: Counter() for planted in PLANTED}
    for seed in tqdm(range(count)):
        for planted in PLANTED:
            net = DigitsMLP(seed=seed, dtype=torch.float64)
            task = tasks.planted(net, planted, n_train=4096, seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                found = find_rank(net, task, RANKS, folder=folder, **RUNS).rank
            answers[planted][judge(found, planted)] += 1
    print(f"\n{'planted':<10}{'right':>8}{'open':>8}{'too low':>9}{'too high':>10}   of {count}")
    for planted, counted in answers.items():
        print(f"{planted:<10}{counted['right']:>8}{counted['open']:>8}{counted['too low']:>9}{counted['too high']:>10}")
        if counted["right"] + counted["open"] < 0.9 * count:
            print(f"{'':<10}fewer than nine of ten are right or open")


if __name__ == "__main__":
    main()
