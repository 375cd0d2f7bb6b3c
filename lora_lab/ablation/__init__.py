"""Ablations: many runs, packed or apart, and which rank they show to be enough.

In reading order:

    grid      what a trial is, as data with an identity; products of ranks, rates, seeds and methods
    packed    many adapters over one frozen base in one pass
    run       run trials here, in processes or on a cluster; stop and go on; the table of results
    studies   models and tasks to begin with
    verdict   the smallest rank that is enough, or that more seeds are needed
    learning  what was learned, overfitted and forgotten, read off the curves
"""

from lora_lab.ablation.grid import Grid, Trial
from lora_lab.ablation.packed import fit_packed
from lora_lab.ablation.run import ablate, load
from lora_lab.ablation.verdict import Verdict, summary

__all__ = ["Grid", "Trial", "Verdict", "ablate", "fit_packed", "load", "summary"]
