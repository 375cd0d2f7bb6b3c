"""``lora-lab record speed``: predicted and measured step times, full fine-tuning beside LoRA, in turn."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lora_lab.costs.cost_model import cost_model
from lora_lab.costs.flops import flops
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import step_time
from lora_lab.experiments.recorder import Recorder, with_bar
from lora_lab.experiments.step_memory import BF16, SMALL, case_columns, chosen, leave_out, random_model
from lora_lab.inject import last_blocks
from lora_lab.methods import FullFineTuning, LoRA


@dataclass(frozen=True)
class Comparison:
    """Ways to train that are timed in turn on one batch; the first is what the others are compared with."""

    model: str
    batch_size: int
    seq_len: int
    setups: Mapping[str, Setup]
    rounds: int


def speed_cases(device: torch.device, models: list[str] | None = None) -> list[Comparison]:
    """Tokens a step from 32 to 4,096, ranks from 1 to 256, all blocks and the last ones, two sizes; more on a GPU."""

    def setups(name: str, ranks: tuple[int, ...], blocks: tuple[int, ...], **options: Any) -> dict[str, Setup]:
        with torch.device("meta"):
            model = random_model(name)
        found = {"full": Setup(FullFineTuning(), **options)}
        found |= {f"LoRA r={rank}": Setup(LoRA(rank, 2 * rank), **options) for rank in ranks}
        lasts = {n: LoRA(8, 16, targets=last_blocks(model, n)) for n in blocks}
        return found | {f"LoRA r=8, last {n} block{'s' * (n > 1)}": Setup(m, **options) for n, m in lasts.items()}

    sizes = ((1, 32), (1, 128), (4, 128), (8, 256), (8, 512))
    cases = []
    for batch_size, seq_len in sizes:
        rounds = 9 if batch_size * seq_len <= 512 else 6
        cases.append(Comparison(SMALL, batch_size, seq_len, setups(SMALL, (1, 8, 64, 256), (1, 4)), rounds))
    for batch_size, seq_len in sizes:
        tokens = batch_size * seq_len
        rounds = 9 if tokens <= 128 else 6 if tokens <= 512 else 3
        ranks, blocks = ((1, 8, 64, 256), (1, 10)) if tokens <= 512 else ((8, 256), (1,))
        cases.append(Comparison("smollm2-135m", batch_size, seq_len, setups("smollm2-135m", ranks, blocks), rounds))
    if device.type == "cuda":
        for name in ("smollm2-135m", "llama-3.2-1b", "llama-3-8b"):
            for batch_size, seq_len in ((1, 128), (4, 512), (8, 1024)):
                ways = setups(name, (8, 64), (1,), dtype=BF16)
                if name == "llama-3-8b":  # all ways are in memory at once, and AdamW's state for 8B fills a card alone
                    del ways["full"]
                cases.append(Comparison(name, batch_size, seq_len, {f"{k}, bf16": v for k, v in ways.items()}, 9))
    return chosen(cases, models)


def speed(device: torch.device, models: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a speed record, as they are measured: each comparison is predicted, then timed in turn.

    One that does not fit into memory is left out, and said to be on stderr.

    Args:
        models: only cases of these.

    Raises:
        ValueError: there are no cases of one.
    """
    cases = speed_cases(device, models)
    costs = cost_model(device)
    for case in with_bar(cases):
        factory = partial(random_model, case.model)
        predicted = costs.predict(factory, case.setups, case.batch_size, case.seq_len)
        try:
            times = step_time(
                factory, case.setups, case.batch_size, case.seq_len, rounds=case.rounds, device=device, progress=False
            )
        except torch.OutOfMemoryError:
            leave_out(f"{case.model}, {case.batch_size} x {case.seq_len}")
            continue
        for label, setup in case.setups.items():
            low, high = times.quartiles_s(label)
            yield {
                "model": case.model,
                "batch": case.batch_size,
                "length": case.seq_len,
                "setup": label,
                "tokens": case.batch_size * case.seq_len,
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
        gc.collect()


def settings(device: torch.device) -> dict[str, Any]:
    """What a record says of how its rows were measured."""
    return {"environment": {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "")}, "weights": "random"}


def line(row: dict[str, Any]) -> str:
    """A row for a person to read."""
    off = row["predicted_ratio"] / row["ratio"] - 1
    spread = f"[{row['lower_quartile_s'] * 1e3:,.1f}-{row['upper_quartile_s'] * 1e3:,.1f}]"
    times = f"{row['seconds'] * 1e3:10,.1f} ms {spread:<22}ratio {row['ratio']:.3f}"
    return f"{case_columns(row)}{times}  predicted {row['predicted_ratio']:.3f} ({off:+.0%})"


RECORDER = Recorder("speed", settings, speed, line, of_models=True)
