"""Losses and accuracies by blocks of examples, so that an interval can account for the choice of examples.

    frame = ablate(model, task, trials, folder, judge=BlockLosses({"validation": 256, "test": 512}))
    block_losses_of(row, "test")    # of a row of the frame: 64 losses of 8 examples each

The mean loss of a few hundred examples depends on the choice of examples as much as on the seed. Trials that are
compared share their examples. A bootstrap over blocks of examples measures this effect (see
:mod:`lora_lab.ablation.learning_rate`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import nn

from lora_lab.ablation.results import SCORE
from lora_lab.task import Task
from lora_lab.tasks.generate import answers
from lora_lab.tasks.instruction import PairTask
from lora_lab.train import batch_losses

if TYPE_CHECKING:
    import pandas

_DIGITS = 6  # after the decimal point


@dataclass(frozen=True)
class BlockLosses:
    """A judge for :func:`lora_lab.ablation.ablate`: the mean loss of each block of neighbouring examples.

    Its scores are texts by part, such as "[2.310521, 2.294387]".

    Args:
        examples: of each part, how many, from its first; examples are in random order.
        block: examples in a block, which are evaluated together. The last block may have fewer, and still counts as
            much as the others.
        answered: the prompts of the test part are answered too (:func:`lora_lab.tasks.generate.answers`): the score
            "accuracy" is the share of answers in each block that equal the reference. For a PairTask only.
    """

    examples: Mapping[str, int]
    block: int = 8
    answered: bool = False

    def __call__(self, model: nn.Module, task: Task) -> dict[str, str]:
        scores = {
            part: [round(loss.item(), _DIGITS) for loss, _ in batch_losses(model, task, part, self.block, limit)]
            for part, limit in self.examples.items()
        }
        if self.answered:
            scores["accuracy"] = self._accuracies(model, cast(PairTask, task))
        return {name: json.dumps(by_block) for name, by_block in scores.items()}

    def _accuracies(self, model: nn.Module, task: PairTask) -> list[float]:
        limit = self.examples.get("test")
        predictions = answers(model, task, limit=limit)
        right = [a == pair.answer for a, pair in zip(predictions, task.pairs["test"][:limit], strict=True)]
        starts = range(0, len(right), self.block)
        return [round(fmean(right[start : start + self.block]), _DIGITS) for start in starts]


def losses_by_seed(rows: pandas.DataFrame, by: str, part: str) -> dict[Any, np.ndarray]:
    """Return the losses of trials with a result for every seed, as :func:`block_losses_of` gives them.

    Args:
        rows: the last row of each trial.
        by: the column in which those that belong together agree, such as "setup" or "lr".
        part: as for :func:`block_losses_of`.

    Returns:
        Each value of that column, ascending -> (seeds, blocks).
    """
    seeds = sorted(rows["seed"].unique())
    done = rows[rows["outcome"] == "done"].sort_values("seed")
    return {
        value: np.array([block_losses_of(row, part) for row in of_value.to_dict("records")])
        for value, of_value in done.groupby(by)
        if of_value["seed"].tolist() == seeds
    }


def block_losses_of(row: Mapping[Any, Any], part: str) -> list[float]:
    """The losses of a trial's blocks from its last row in the table; those of one block if it was not judged so.

    Args:
        row: has the score, or ``<part>_loss``.
        part: such as "validation"; or "accuracy", for the shares of right answers.
    """
    text = row.get(SCORE + part)
    return json.loads(text) if isinstance(text, str) else [float(row[f"{part}_loss"])]
