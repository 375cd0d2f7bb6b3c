"""``lora-lab record translation``: can 135 million parameters learn to translate, and what can they not?

Names from English into French, and sentences of a small grammar in both directions, with combinations or with words
that training never shows. A translation counts if it is exact and no baseline gets it right: copying, a dictionary,
rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch

from lora_lab.ablation import studies
from lora_lab.ablation.compare import Study, rates_around
from lora_lab.ablation.grid import Trial
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.studies.recorder import Planned, Row, plan_trial, record_tuned, tell_tuned
from lora_lab.tasks.instruction import PairTask
from lora_lab.tasks.metrics import trivial
from lora_lab.tasks.sentences import kinds

NAMES, FRENCH, ENGLISH = "translate-fr", "sentences-fr", "sentences-en"
BY_A_BASELINE, BY_NONE = "right by a baseline", "right by no baseline"
CENTRES = {"LoRA r=8": 4e-3, "full": 2e-4}  # of the first grids
# Data -> tokens of an example, prompt and chat template included, and its test part.
SIZES = {NAMES: (56, 92), FRENCH: (64, 160), ENGLISH: (64, 160)}


def plan(device: torch.device) -> dict[str, Planned]:
    """What two cores can do in an evening, with LoRA alone; on a GPU full fine-tuning, too, and more steps."""
    gpu = device.type == "cuda"
    setups: dict[str, Trial] = {"LoRA r=8": plan_trial(LoRA(8, 16), 600 if gpu else 150, 8, Lean(torch.bfloat16))}
    if gpu:
        setups["full"] = plan_trial(FullFineTuning(), 600, 8)
    lrs = {setup: rates_around(CENTRES[setup], count=3) for setup in setups}
    judging = range(2, 7 if gpu else 5)
    return {
        data: Planned(Study(setups, lrs, range(2), judging, 64, {"test": size}, block=1, answered=True), seq_len)
        for data, (seq_len, size) in SIZES.items()
    }


def examples(data: str, task: PairTask) -> Iterator[Row]:
    """A row for each example of the test part, in its order: its kind, and what it needs of French grammar.

    The kind is :data:`BY_A_BASELINE` if the source as it is or in lower case, the dictionary of
    :func:`lora_lab.tasks.metrics.trivial` or, for names, the rules of lesson 09 get it right. Other names are
    :data:`BY_NONE`, and other sentences of their own kinds.
    """
    by_prompt = {} if data == NAMES else kinds(data.removeprefix("sentences-"))
    for i, (pair, looked_up) in enumerate(zip(task.pairs["test"], trivial(task), strict=True)):
        source = pair.prompt.partition(": ")[2]
        solved = pair.answer in {source, source.lower(), looked_up, guess_french(source) if data == NAMES else source}
        kind, sentence = by_prompt.get(pair.prompt, (BY_NONE, None))
        row = {"data": data, "stage": "example", "position": i, "kind": BY_A_BASELINE if solved else kind}
        row["features"] = ", ".join(sentence.features()) if sentence else ""
        yield row | {"prompt": pair.prompt, "reference": pair.answer}


def all_examples(device: torch.device) -> Iterator[Row]:
    """Yield the examples of all data."""
    for data in SIZES:
        _, task = studies.study(data, device=device)
        yield from examples(data, cast(PairTask, task() if callable(task) else task))


def guess_french(name: str) -> str:
    """Guess a French name from an English one, knowing hardly a word: lower case, two endings, adjective last."""
    words = name.lower().replace("ian", "ien").replace("islands", "îles").split()
    return " ".join(reversed(words)) if len(words) == 2 else " ".join(words)


# The score "accuracy" of a trial is 1 or 0 for each example.
TRANSLATION = record_tuned(
    "translation",
    plan,
    after=all_examples,
    line=lambda row: None if row["stage"] == "example" else tell_tuned(row),
)
