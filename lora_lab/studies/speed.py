"""``lora-lab record speed``: predicted and measured step times of full fine-tuning and of LoRA, interleaved."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lora_lab.costs.cost_model import CostModel, cost_model
from lora_lab.costs.flops import flops
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import step_time
from lora_lab.inject import last_blocks
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.studies.memory import BF16, SMALL, case_columns, random_model, report_skipped, select_models
from lora_lab.studies.recorder import Recorder
from lora_lab.system.wording import counted, progress_bar


@dataclass(frozen=True)
class Comparison:
    """Setups that are timed in turn on one batch, by their labels; the first is the baseline of the others."""

    model: str
    batch_size: int
    seq_len: int
    setups: Mapping[str, Setup]
    rounds: int

    def describe(self) -> str:
        """Such as "small, 4 x 128"."""
        return f"{self.model}, {self.batch_size} x {self.seq_len}"


# (batch size, sequence length) -> rounds of the small model, and of SmolLM2
ROUNDS = {(1, 32): (9, 9), (1, 128): (9, 9), (4, 128): (9, 6), (8, 256): (6, 3), (8, 512): (6, 3)}


def speed_cases(device: torch.device, models: Sequence[str] | None = None) -> list[Comparison]:
    """32 to 4,096 tokens a step, ranks 1 to 256, all blocks or the last ones, two models; more on a GPU."""
    small = compared_setups(SMALL, (1, 8, 64, 256), (1, 4))
    many, few = (
        compared_setups("smollm2-135m", (1, 8, 64, 256), (1, 10)),
        compared_setups("smollm2-135m", (8, 256), (1,)),
    )
    cases = [Comparison(SMALL, *size, small, rounds) for size, (rounds, _) in ROUNDS.items()]
    for (batch_size, seq_len), (_, rounds) in ROUNDS.items():
        setups = many if batch_size * seq_len <= 512 else few
        cases.append(Comparison("smollm2-135m", batch_size, seq_len, setups, rounds))
    if device.type == "cuda":
        for model in ("smollm2-135m", "llama-3.2-1b", "llama-3-8b"):
            setups = compared_setups(model, (8, 64), (1,))
            if model == "llama-3-8b":  # all setups are in memory at once, and AdamW's state for 8B fills a GPU alone
                del setups["full"]
            setups = {f"{label}, bf16": replace(setup, dtype=BF16) for label, setup in setups.items()}
            cases += [Comparison(model, *size, setups, 9) for size in ((1, 128), (4, 512), (8, 1024))]
    return select_models(cases, models)


def compared_setups(model: str, ranks: Sequence[int], last: Sequence[int]) -> dict[str, Setup]:
    """Full fine-tuning, LoRA of these ranks in all blocks, and LoRA in so many of the last blocks."""
    with torch.device("meta"):
        llama = random_model(model)
    setups = {"full": Setup(FullFineTuning())} | {f"LoRA r={rank}": Setup(LoRA(rank, 2 * rank)) for rank in ranks}
    for count in last:
        label = f"LoRA r=8, last {counted(count, 'block')}"
        setups[label] = Setup(LoRA(8, 16, targets=last_blocks(llama, count)))
    return setups


def rows(device: torch.device, models: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a speed record, as they are measured: each comparison is predicted, then timed in turn.

    A comparison that does not fit into memory is skipped and reported on stderr.

    Args:
        device: where to measure.
        models: measure only these.

    Raises:
        ValueError: there are no cases of one of the models.
    """
    cases = speed_cases(device, models)
    costs = cost_model(device)
    with progress_bar(len(cases), "record speed", None, "case") as bar:
        for case in cases:
            bar.set_postfix_str(case.describe())
            yield from compare(case, costs, device)
            gc.collect()
            bar.update()


def compare(case: Comparison, costs: CostModel, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each setup, or none if they do not fit into memory."""
    factory = partial(random_model, case.model)
    predicted = costs.predict(factory, case.setups, case.batch_size, case.seq_len)
    try:
        times = step_time(
            factory, case.setups, case.batch_size, case.seq_len, rounds=case.rounds, device=device, progress=False
        )
    except torch.OutOfMemoryError:
        report_skipped(case.describe())
        return
    for label, setup in case.setups.items():
        low, high = times.quartiles_s(label)
        yield {
            "model": case.model,
            "batch": case.batch_size,
            "length": case.seq_len,
            "setup": label,
            "tokens": case.batch_size * case.seq_len,
            "rounds": case.rounds,
            "seconds": times.median_s(label),
            "lower_quartile_s": low,
            "upper_quartile_s": high,
            "ratio": times.ratio(label),
            "verdict": "" if label == next(iter(case.setups)) else times.verdict(label),
            "predicted_seconds": predicted.total_s(label),
            "predicted_ratio": predicted.ratio(label),
            "doubts": " ".join(predicted.doubts),
            "flops": flops(factory, setup, case.batch_size, case.seq_len).total,
        }


def settings(device: torch.device) -> dict[str, Any]:
    """How the rows are measured, as the record states it."""
    return {"environment": {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "")}, "weights": "random"}


def line(row: dict[str, Any]) -> str:
    """A row as a line for people."""
    error = row["predicted_ratio"] / row["ratio"] - 1
    spread = f"[{row['lower_quartile_s'] * 1e3:,.1f}-{row['upper_quartile_s'] * 1e3:,.1f}]"
    times = f"{row['seconds'] * 1e3:10,.1f} ms {spread:<22}ratio {row['ratio']:.3f}"
    return f"{case_columns(row)}{times}  predicted {row['predicted_ratio']:.3f} ({error:+.0%})"


RECORDER = Recorder(settings, rows, line)
