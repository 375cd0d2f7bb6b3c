"""Ablations: many runs, packed or separate, and which rank they show to be enough.

In reading order:

    grid           what a trial is, as data with an identity; products of ranks, rates, seeds and methods
    packed         many adapters over one frozen base in one pass, and which runs can share one
    results        a trial's file, and the table of all results
    stats          losses by blocks of examples; bounds, intervals, the best rate between those tried
    halving        stop trials that validation rules out
    run            run trials here, in processes or on a cluster, in packs that fit; stop and go on
    materials      models and tasks to begin with
    compare        choose each setup's rate, compare in pairs with bounds, judge; which rank is enough
    rank_search    which rank is enough for a task of yours, by a short sweep
    overfitting    what was learned, overfitted and forgotten, read off the curves
"""

import lazy_loader

from lora_lab.ablation.compare import RankVerdict, smallest_sufficient_rank
from lora_lab.ablation.grid import Grid, Trial
from lora_lab.ablation.halving import Halving
from lora_lab.ablation.packed import fit_packed
from lora_lab.ablation.results import load
from lora_lab.ablation.run import ablate

__all__ = [
    "Grid",
    "Halving",
    "RankVerdict",
    "Trial",
    "ablate",
    "fit_packed",
    "load",
    "smallest_sufficient_rank",
]

# The other files are loaded already.
__getattr__, _, _ = lazy_loader.attach(__name__, ["materials", "overfitting", "rank_search", "stats"])
